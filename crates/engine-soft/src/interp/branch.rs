//! Near branches, calls and returns, loops, and the instructions that do nothing here: NOPs, prefetches, cache hints, fences.

use crate::cpu::{Cpu, Int, RIP, Trap, cond, gpr};
use crate::decode::{Ctx, Exec, Flow, Handler, Op};
use crate::mmu::Access;
use iced_x86::{Code, Mnemonic, OpKind};
use ringfort_x86::segment::CS;

#[inline(always)]
fn canonical(address: u64) -> bool {
    (address << 16) as i64 >> 16 == address as i64
}

/// `target` as an offset that code may go on at, or #GP(0): canonical in 64-bit code, else within CS's limit.
#[inline(always)]
fn target<T: Int>(cpu: &mut Cpu, target: u64) -> Result<u64, Trap> {
    let to = T::from_u64(target).to_u64();
    let good = if T::SIZE == 8 { canonical(to) } else { to <= u64::from(cpu.seg[CS].limit) || cpu.code64() };
    if good { Ok(to) } else { Err(cpu.gp(0)) }
}

#[inline(always)]
fn go<T: Int>(cpu: &mut Cpu, to: u64) -> Exec {
    let to = target::<T>(cpu, to)?;
    cpu.regs[usize::from(RIP)] = to;
    Ok(Flow::Branch)
}

/// Where a relative branch leads.
#[inline(always)]
fn relative(cpu: &Cpu, op: &Op) -> u64 {
    cpu.regs[usize::from(RIP)].wrapping_add(op.imm)
}

#[inline(always)]
fn memory<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<u64, Trap> {
    let lin = cpu.linear(op, T::SIZE, Access::Read)?;
    Ok(cpu.load::<T>(lin)?.to_u64())
}

fn jcc<const C: u8, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    if cond::<C>(cpu.arith) { go::<T>(cpu, relative(cpu, op)) } else { cpu.then(op) }
}

fn jmp_rel<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    go::<T>(cpu, relative(cpu, op))
}

fn jmp_reg<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let to = cpu.reg::<T>(op.dst).to_u64();
    go::<T>(cpu, to)
}

fn jmp_mem<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let to = memory::<T>(cpu, op)?;
    go::<T>(cpu, to)
}

#[inline(always)]
fn call<T: Int>(cpu: &mut Cpu, op: &Op, to: u64) -> Exec {
    let to = match target::<T>(cpu, to) {
        Ok(to) => to,
        Err(_) => return Err(call_fault::<T>(cpu)),
    };
    let back = cpu.next_ip(op);
    cpu.push(T::from_u64(back))?;
    cpu.regs[usize::from(RIP)] = to;
    Ok(Flow::Branch)
}

/// A call to where code cannot go: if the stack would fault too, that comes first.
#[cold]
fn call_fault<T: Int>(cpu: &mut Cpu) -> Trap {
    match cpu.probe_push(T::SIZE) {
        Ok(()) => cpu.gp(0),
        Err(t) => t,
    }
}

/// In 64-bit code: no segment, no masks.
fn call_rel64(cpu: &mut Cpu, op: &Op) -> Exec {
    let to = relative(cpu, op);
    let back = cpu.regs[usize::from(RIP)].wrapping_add(u64::from(op.off) + u64::from(op.len));
    let sp = cpu.regs[gpr::RSP].wrapping_sub(8);
    let (true, Some(p)) = (canonical(to), cpu.probe(sp, 8, true)) else { return call_rel::<u64>(cpu, op) };
    // SAFETY: as in `Cpu::store`.
    unsafe { p.cast::<u64>().write_unaligned(back) };
    cpu.regs[gpr::RSP] = sp;
    cpu.regs[usize::from(RIP)] = to;
    Ok(Flow::Branch)
}

/// RET without immediate in 64-bit code.
fn ret64(cpu: &mut Cpu, op: &Op) -> Exec {
    let sp = cpu.regs[gpr::RSP];
    let Some(p) = cpu.probe(sp, 8, false) else { return ret::<u64>(cpu, op) };
    // SAFETY: as in `Cpu::load`.
    let to = unsafe { p.cast::<u64>().read_unaligned() };
    if !canonical(to) {
        return ret::<u64>(cpu, op);
    }
    cpu.regs[gpr::RSP] = sp.wrapping_add(8);
    cpu.regs[usize::from(RIP)] = to;
    Ok(Flow::Branch)
}

#[inline(never)]
fn call_rel<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    call::<T>(cpu, op, relative(cpu, op))
}

fn call_reg<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let to = cpu.reg::<T>(op.dst).to_u64();
    call::<T>(cpu, op, to)
}

fn call_mem<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let to = memory::<T>(cpu, op)?;
    call::<T>(cpu, op, to)
}

/// RET; the immediate (zero without one) is dropped from the stack as well.
#[inline(never)]
fn ret<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let sp = cpu.sp();
    let to = cpu.load_stack::<T>(sp)?;
    let to = target::<T>(cpu, to.to_u64())?;
    cpu.set_sp(sp.wrapping_add(T::SIZE as u64).wrapping_add(op.imm & 0xffff));
    cpu.regs[usize::from(RIP)] = to;
    Ok(Flow::Branch)
}

const RCX: u8 = gpr::RCX as u8 * 8;

/// JCXZ, JECXZ, JRCXZ: `N` is the counter's width.
fn jcxz<N: Int, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    if cpu.reg::<N>(RCX) == N::default() { go::<T>(cpu, relative(cpu, op)) } else { cpu.then(op) }
}

/// LOOP (`KIND` 0), LOOPE (1), LOOPNE (2).
fn loop_<const KIND: u8, N: Int, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let count = N::from_u64(cpu.reg::<N>(RCX).to_u64().wrapping_sub(1));
    let taken = count != N::default()
        && match KIND {
            0 => true,
            1 => cond::<4>(cpu.arith),
            _ => cond::<5>(cpu.arith),
        };
    let to = if taken { Some(target::<T>(cpu, relative(cpu, op))?) } else { None };
    cpu.set_reg(RCX, count);
    if let Some(to) = to {
        cpu.regs[usize::from(RIP)] = to;
        return Ok(Flow::Branch);
    }
    cpu.then(op)
}

fn nop(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.then(op)
}

fn pause(cpu: &mut Cpu, op: &Op) -> Exec {
    std::hint::spin_loop();
    cpu.then(op)
}

/// MFENCE, and the others that order stores against later loads: other vCPUs are other host threads.
fn fence(cpu: &mut Cpu, op: &Op) -> Exec {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    cpu.then(op)
}

/// CLFLUSH and the like: they only check the address, as a load of a byte does.
fn cache_line(cpu: &mut Cpu, op: &Op) -> Exec {
    let lin = cpu.linear(op, 1, Access::Read)?;
    cpu.probe_read(lin, 1)?;
    cpu.then(op)
}

/// The counter's width in bytes of a LOOP or JCXZ instruction.
fn counter_width(code: Code) -> u8 {
    use Code::*;
    match code {
        Loop_rel8_16_CX | Loop_rel8_32_CX | Loope_rel8_16_CX | Loope_rel8_32_CX | Loopne_rel8_16_CX
        | Loopne_rel8_32_CX | Jcxz_rel8_16 | Jcxz_rel8_32 => 2,
        Loop_rel8_16_RCX | Loop_rel8_64_RCX | Loope_rel8_16_RCX | Loope_rel8_64_RCX | Loopne_rel8_16_RCX
        | Loopne_rel8_64_RCX | Jrcxz_rel8_16 | Jrcxz_rel8_64 => 8,
        _ => 4,
    }
}

macro_rules! counted {
    ($count:expr, $to:expr, $f:ident $(, $g:expr)*) => {
        match ($count, $to) {
            (2, 2) => $f::<$($g,)* u16, u16>,
            (2, _) => $f::<$($g,)* u16, u32>,
            (4, 2) => $f::<$($g,)* u32, u16>,
            (4, 4) => $f::<$($g,)* u32, u32>,
            (4, _) => $f::<$($g,)* u32, u64>,
            (_, 2) => $f::<$($g,)* u64, u16>,
            (_, _) => $f::<$($g,)* u64, u64>,
        }
    };
}

pub(super) fn lower(ctx: &mut Ctx<'_>) -> Option<Handler> {
    use Mnemonic as M;
    let i = ctx.i;
    let to = match i.op0_kind() {
        OpKind::NearBranch16 => 2,
        OpKind::NearBranch32 => 4,
        OpKind::NearBranch64 => 8,
        _ => ctx.width(0),
    };
    if i.is_jcc_short_or_near() {
        let cc = (i.condition_code() as u8).wrapping_sub(1);
        return Some(match to {
            2 => condition!(cc, jcc, u16),
            4 => condition!(cc, jcc, u32),
            _ => condition!(cc, jcc, u64),
        });
    }
    let n = counter_width(i.code());
    Some(match i.mnemonic() {
        M::Jmp if i.is_jmp_short_or_near() => wide!(to, jmp_rel),
        M::Jmp if i.is_jmp_near_indirect() && ctx.mem(0) => wide!(to, jmp_mem),
        M::Jmp if i.is_jmp_near_indirect() => wide!(to, jmp_reg),
        M::Call if i.is_call_near() && to == 8 => call_rel64,
        M::Call if i.is_call_near() => wide!(to, call_rel),
        M::Call if i.is_call_near_indirect() && ctx.mem(0) => wide!(to, call_mem),
        M::Call if i.is_call_near_indirect() => wide!(to, call_reg),
        M::Ret => match i.code() {
            Code::Retnw | Code::Retnw_imm16 => ret::<u16>,
            Code::Retnd | Code::Retnd_imm16 => ret::<u32>,
            Code::Retnq => ret64,
            _ => ret::<u64>,
        },
        M::Jcxz | M::Jecxz | M::Jrcxz => counted!(n, to, jcxz),
        M::Loop => counted!(n, to, loop_, 0),
        M::Loope => counted!(n, to, loop_, 1),
        M::Loopne => counted!(n, to, loop_, 2),
        M::Nop
        | M::Reservednop
        | M::Endbr32
        | M::Endbr64
        | M::Prefetch
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchw
        | M::Prefetchwt1
        | M::Cldemote => nop,
        M::Pause => pause,
        M::Mfence => fence,
        // Loads are done in order and stores become visible in order, as on every x86 host.
        M::Lfence | M::Sfence => nop,
        M::Clflush | M::Clflushopt | M::Clwb => cache_line,
        _ => return None,
    })
}
