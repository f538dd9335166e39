//! XCHG, XADD, CMPXCHG, CMPXCHG8B, CMPXCHG16B; ADCX and ADOX.

use super::alu;
use crate::cpu::{A_CF, A_OF, A_ZF, Cpu, Int, Trap, gpr};
use crate::decode::{Ctx, Exec, Flow, Handler, Op, op_flags};
use crate::mmu::Access;
use iced_x86::Mnemonic;
use std::arch::asm;

/// Read, change, write back; atomically with LOCK.
#[inline(always)]
fn update<T: Int>(cpu: &mut Cpu, op: &Op, mut f: impl FnMut(T) -> T) -> Result<(), Trap> {
    let lin = cpu.linear(op, T::SIZE, Access::Write)?;
    if op.flags & op_flags::LOCK == 0 { cpu.modify::<T>(lin, &mut f) } else { cpu.modify_locked::<T>(lin, f) }
}

fn xchg_reg<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (a, b) = (cpu.reg::<T>(op.dst), cpu.reg::<T>(op.src));
    cpu.set_reg(op.dst, b);
    cpu.set_reg(op.src, a);
    Ok(Flow::Next)
}

/// The register is operand `$reg`; XCHG with memory locks by itself.
fn xchg_mem<const REG: u8, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let at = if REG == 0 { op.dst } else { op.src };
    let new = cpu.reg::<T>(at);
    let lin = cpu.linear(op, T::SIZE, Access::Write)?;
    let mut old = new;
    cpu.modify_locked::<T>(lin, |a| {
        old = a;
        new
    })?;
    cpu.set_reg(at, old);
    Ok(Flow::Next)
}

fn xchg_mem_reg<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    xchg_mem::<1, T>(cpu, op)
}

fn xchg_reg_mem<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    xchg_mem::<0, T>(cpu, op)
}

fn xadd_reg<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (a, b) = (cpu.reg::<T>(op.dst), cpu.reg::<T>(op.src));
    let sum = alu::add(a, b, &mut cpu.arith);
    cpu.set_reg(op.src, a);
    cpu.set_reg(op.dst, sum);
    Ok(Flow::Next)
}

fn xadd_mem<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = cpu.reg::<T>(op.src);
    let mut old = b;
    let mut flags = cpu.arith;
    update::<T>(cpu, op, |a| {
        old = a;
        alu::add(a, b, &mut flags)
    })?;
    cpu.set_reg(op.src, old);
    cpu.arith = flags;
    Ok(Flow::Next)
}

fn cmpxchg_reg<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (acc, dest, new) = (cpu.reg::<T>(0), cpu.reg::<T>(op.dst), cpu.reg::<T>(op.src));
    alu::compare(acc, dest, &mut cpu.arith);
    if acc == dest {
        cpu.set_reg(op.dst, new);
    } else {
        cpu.set_reg(0, dest);
    }
    Ok(Flow::Next)
}

fn cmpxchg_mem<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (acc, new) = (cpu.reg::<T>(0), cpu.reg::<T>(op.src));
    let mut old = acc;
    // Written in any case, so that it faults as a write in any case.
    update::<T>(cpu, op, |a| {
        old = a;
        if a == acc { new } else { a }
    })?;
    alu::compare(acc, old, &mut cpu.arith);
    if old != acc {
        cpu.set_reg(0, old);
    }
    Ok(Flow::Next)
}

fn set_zf(cpu: &mut Cpu, on: bool) {
    cpu.arith = cpu.arith & !A_ZF | if on { A_ZF } else { 0 };
}

fn cmpxchg8b(cpu: &mut Cpu, op: &Op) -> Exec {
    let pair = |cpu: &Cpu, high: usize, low: usize| cpu.regs[high] << 32 | cpu.regs[low] & 0xffff_ffff;
    let expected = pair(cpu, gpr::RDX, gpr::RAX);
    let new = pair(cpu, gpr::RCX, gpr::RBX);
    let mut old = expected;
    update::<u64>(cpu, op, |a| {
        old = a;
        if a == expected { new } else { a }
    })?;
    set_zf(cpu, old == expected);
    if old != expected {
        cpu.set_reg(gpr::RAX as u8 * 8, old as u32);
        cpu.set_reg(gpr::RDX as u8 * 8, (old >> 32) as u32);
    }
    Ok(Flow::Next)
}

fn cmpxchg16b(cpu: &mut Cpu, op: &Op) -> Exec {
    let lin = cpu.linear(op, 16, Access::Write)?;
    if lin & 15 != 0 {
        return Err(cpu.gp(0));
    }
    let pair =
        |cpu: &Cpu, high: usize, low: usize| u128::from(cpu.regs[high]) << 64 | u128::from(cpu.regs[low]);
    let expected = pair(cpu, gpr::RDX, gpr::RAX);
    let new = pair(cpu, gpr::RCX, gpr::RBX);
    let old = match cpu.host_run(lin, Access::Write)? {
        // SAFETY: 16 aligned bytes of a mapped RAM page.
        Some((p, _)) => unsafe { host_cmpxchg16b(p, expected, new) },
        None => {
            // SAFETY: as above.
            let done = cpu.update_in_ram(lin, 16, |p| unsafe { host_cmpxchg16b(p, expected, new) })?;
            match done {
                Some(old) => old,
                None => {
                    let mut buf = [0; 16];
                    cpu.load_bytes(lin, &mut buf)?;
                    let old = u128::from_le_bytes(buf);
                    let store = if old == expected { new } else { old };
                    cpu.store_bytes(lin, &store.to_le_bytes())?;
                    old
                }
            }
        }
    };
    set_zf(cpu, old == expected);
    if old != expected {
        cpu.regs[gpr::RAX] = old as u64;
        cpu.regs[gpr::RDX] = (old >> 64) as u64;
    }
    Ok(Flow::Next)
}

/// The host's LOCK CMPXCHG16B; gives what was there.
///
/// # Safety
/// `p` points to 16 aligned bytes of mapped memory.
unsafe fn host_cmpxchg16b(p: *mut u8, expected: u128, new: u128) -> u128 {
    let (mut low, mut high) = (expected as u64, (expected >> 64) as u64);
    // RBX is not available as an operand: exchange it by hand.
    // SAFETY: the caller's; only those 16 bytes are touched.
    unsafe {
        asm!("xchg rsi, rbx", "lock cmpxchg16b [rdi]", "mov rbx, rsi",
            inout("rsi") new as u64 => _, in("rdi") p, in("rcx") (new >> 64) as u64,
            inout("rax") low, inout("rdx") high, options(nostack));
    }
    u128::from(high) << 64 | u128::from(low)
}

/// ADCX and ADOX: add with the carry in CF or OF, and no other flag.
fn add_flag<const CARRY: bool, const MEM: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = if MEM {
        let lin = cpu.linear(op, T::SIZE, Access::Read)?;
        cpu.load::<T>(lin)?
    } else {
        cpu.reg::<T>(op.src)
    };
    let flag = if CARRY { A_CF } else { A_OF };
    let carry = u128::from(cpu.arith & flag != 0);
    let sum = u128::from(cpu.reg::<T>(op.dst).to_u64()) + u128::from(b.to_u64()) + carry;
    cpu.set_reg(op.dst, T::from_u64(sum as u64));
    cpu.arith = cpu.arith & !flag | if sum >> T::BITS != 0 { flag } else { 0 };
    Ok(Flow::Next)
}

fn lower_add_flag<const CARRY: bool>(ctx: &Ctx<'_>) -> Handler {
    match (ctx.mem(1), ctx.width(0)) {
        (false, 4) => add_flag::<CARRY, false, u32>,
        (false, _) => add_flag::<CARRY, false, u64>,
        (true, 4) => add_flag::<CARRY, true, u32>,
        (true, _) => add_flag::<CARRY, true, u64>,
    }
}

pub(super) fn lower(ctx: &mut Ctx<'_>) -> Option<Handler> {
    let w = ctx.width(0);
    Some(match ctx.i.mnemonic() {
        Mnemonic::Xchg if ctx.mem(0) => width!(w, xchg_mem_reg),
        Mnemonic::Xchg if ctx.mem(1) => width!(w, xchg_reg_mem),
        Mnemonic::Xchg => width!(w, xchg_reg),
        Mnemonic::Xadd if ctx.mem(0) => width!(w, xadd_mem),
        Mnemonic::Xadd => width!(w, xadd_reg),
        Mnemonic::Cmpxchg if ctx.mem(0) => width!(w, cmpxchg_mem),
        Mnemonic::Cmpxchg => width!(w, cmpxchg_reg),
        Mnemonic::Cmpxchg8b => cmpxchg8b,
        Mnemonic::Cmpxchg16b => cmpxchg16b,
        Mnemonic::Adcx => lower_add_flag::<true>(ctx),
        Mnemonic::Adox => lower_add_flag::<false>(ctx),
        _ => return None,
    })
}
