//! Data moves: MOV in all general-register forms, extensions, LEA, CMOVcc, SETcc, BSWAP, MOVBE, XLAT, sign conversions of the
//! accumulator, and moves to and from single flags.

use crate::cpu::{A_CF, A_OF, Cpu, Int, cond, gpr};
use crate::decode::{Ctx, Exec, Handler, Op, op_flags};
use crate::mmu::Access;
use iced_x86::{Code, Mnemonic, OpKind};
use ringfort_x86::flags::DF;
use ringfort_x86::segment::{DS, ES};

fn mov_reg_reg<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let v = cpu.reg::<T>(op.src);
    cpu.set_reg(op.dst, v);
    cpu.then(op)
}

fn mov_reg_imm<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.set_reg(op.dst, T::from_u64(op.imm));
    cpu.then(op)
}

fn mov_reg_mem<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let Some(v) = cpu.quick_load::<T>(op) else { return mov_reg_mem_slow::<T>(cpu, op) };
    cpu.set_reg(op.dst, v);
    cpu.then(op)
}

#[inline(never)]
fn mov_reg_mem_slow<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let lin = cpu.linear(op, T::SIZE, Access::Read)?;
    let v = cpu.load::<T>(lin)?;
    cpu.set_reg(op.dst, v);
    cpu.then(op)
}

fn mov_mem_reg<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    if cpu.quick_store(op, cpu.reg::<T>(op.src)).is_none() {
        return mov_mem_reg_slow::<T>(cpu, op);
    }
    cpu.then(op)
}

#[inline(never)]
fn mov_mem_reg_slow<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let lin = cpu.linear(op, T::SIZE, Access::Write)?;
    cpu.store(lin, cpu.reg::<T>(op.src))?;
    cpu.then(op)
}

fn mov_mem_imm<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    if cpu.quick_store(op, T::from_u64(op.imm)).is_none() {
        return mov_mem_imm_slow::<T>(cpu, op);
    }
    cpu.then(op)
}

#[inline(never)]
fn mov_mem_imm_slow<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let lin = cpu.linear(op, T::SIZE, Access::Write)?;
    cpu.store(lin, T::from_u64(op.imm))?;
    cpu.then(op)
}

fn mov(ctx: &Ctx<'_>) -> Option<Handler> {
    let i = ctx.i;
    for n in 0..2 {
        if ctx.is_reg(n) && !i.op_register(n).is_gpr() {
            return None; // segment, control and debug registers
        }
    }
    let w = ctx.width(0);
    Some(match (i.op0_kind(), i.op1_kind()) {
        (OpKind::Register, OpKind::Register) => width!(w, mov_reg_reg),
        (OpKind::Register, OpKind::Memory) => width!(w, mov_reg_mem),
        (OpKind::Memory, OpKind::Register) => width!(w, mov_mem_reg),
        (OpKind::Memory, _) => width!(w, mov_mem_imm),
        _ => width!(w, mov_reg_imm),
    })
}

/// Widen `S` to `D`.
#[inline(always)]
fn widen<const SIGNED: bool, S: Int, D: Int>(v: S) -> D {
    D::from_u64(if SIGNED { v.to_i64() as u64 } else { v.to_u64() })
}

fn extend_reg<const SIGNED: bool, S: Int, D: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let v = cpu.reg::<S>(op.src);
    cpu.set_reg(op.dst, widen::<SIGNED, S, D>(v));
    cpu.then(op)
}

fn extend_mem<const SIGNED: bool, S: Int, D: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let Some(v) = cpu.quick_load::<S>(op) else { return extend_mem_slow::<SIGNED, S, D>(cpu, op) };
    cpu.set_reg(op.dst, widen::<SIGNED, S, D>(v));
    cpu.then(op)
}

#[inline(never)]
fn extend_mem_slow<const SIGNED: bool, S: Int, D: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let lin = cpu.linear(op, S::SIZE, Access::Read)?;
    let v = cpu.load::<S>(lin)?;
    cpu.set_reg(op.dst, widen::<SIGNED, S, D>(v));
    cpu.then(op)
}

fn extend<const SIGNED: bool>(ctx: &Ctx<'_>) -> Handler {
    fn from<const SIGNED: bool, S: Int>(ctx: &Ctx<'_>) -> Handler {
        match (ctx.mem(1), ctx.width(0)) {
            (false, 2) => extend_reg::<SIGNED, S, u16>,
            (false, 4) => extend_reg::<SIGNED, S, u32>,
            (false, _) => extend_reg::<SIGNED, S, u64>,
            (true, 2) => extend_mem::<SIGNED, S, u16>,
            (true, 4) => extend_mem::<SIGNED, S, u32>,
            (true, _) => extend_mem::<SIGNED, S, u64>,
        }
    }
    match ctx.width(1) {
        1 => from::<SIGNED, u8>(ctx),
        2 => from::<SIGNED, u16>(ctx),
        _ => from::<SIGNED, u32>(ctx),
    }
}

fn lea<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let ea = cpu.truncate(op, cpu.effective(op));
    cpu.set_reg(op.dst, T::from_u64(ea));
    cpu.then(op)
}

fn bswap<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let v = cpu.reg::<T>(op.dst);
    cpu.set_reg(op.dst, swapped(v));
    cpu.then(op)
}

/// BSWAP with a 16-bit operand is undefined; the CPUs at hand clear the register's low half.
fn bswap16(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.set_reg(op.dst, 0u16);
    cpu.then(op)
}

#[inline(always)]
fn swapped<T: Int>(v: T) -> T {
    T::from_u64(v.to_u64().swap_bytes() >> (64 - T::BITS))
}

fn movbe_load<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let lin = cpu.linear(op, T::SIZE, Access::Read)?;
    let v = cpu.load::<T>(lin)?;
    cpu.set_reg(op.dst, swapped(v));
    cpu.then(op)
}

fn movbe_store<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let lin = cpu.linear(op, T::SIZE, Access::Write)?;
    cpu.store(lin, swapped(cpu.reg::<T>(op.src)))?;
    cpu.then(op)
}

fn cmov_reg<const C: u8, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let at = if cond::<C>(cpu.arith) { op.src } else { op.dst };
    // Written in any case: a 32-bit destination loses its upper half even when the condition is false.
    let v = cpu.reg::<T>(at);
    cpu.set_reg(op.dst, v);
    cpu.then(op)
}

fn cmov_mem<const C: u8, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let lin = cpu.linear(op, T::SIZE, Access::Read)?;
    let v = cpu.load::<T>(lin)?;
    let v = if cond::<C>(cpu.arith) { v } else { cpu.reg::<T>(op.dst) };
    cpu.set_reg(op.dst, v);
    cpu.then(op)
}

fn set_reg<const C: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    let v = u8::from(cond::<C>(cpu.arith));
    cpu.set_reg(op.dst, v);
    cpu.then(op)
}

fn set_mem<const C: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    let lin = cpu.linear(op, 1, Access::Write)?;
    cpu.store(lin, u8::from(cond::<C>(cpu.arith)))?;
    cpu.then(op)
}

/// CBW, CWDE, CDQE: the lower half of the accumulator, sign-extended.
fn extend_accumulator<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    match T::SIZE {
        2 => cpu.set_reg(0, cpu.reg::<u8>(0).to_i64() as u16),
        4 => cpu.set_reg(0, cpu.reg::<u16>(0).to_i64() as u32),
        _ => cpu.set_reg(0, cpu.reg::<u32>(0).to_i64() as u64),
    }
    cpu.then(op)
}

/// CWD, CDQ, CQO: the accumulator's sign to all of rDX.
fn sign_to_dx<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let sign = (cpu.reg::<T>(0).to_i64() >> 63) as u64;
    cpu.set_reg(gpr::RDX as u8 * 8, T::from_u64(sign));
    cpu.then(op)
}

fn xlat(cpu: &mut Cpu, op: &Op) -> Exec {
    use crate::decode::op_flags::{FLAT, FLAT32};
    let ea = cpu.truncate(op, cpu.regs[gpr::RBX].wrapping_add(cpu.regs[gpr::RAX] & 0xff));
    let lin =
        if op.flags & (FLAT | FLAT32) != 0 { ea } else { cpu.segmented(op.seg.into(), ea, 1, Access::Read)? };
    let v = cpu.load::<u8>(lin)?;
    cpu.set_reg(0, v);
    cpu.then(op)
}

/// MOVDIR64B: 64 bytes to the aligned address in the register (in ES).
fn movdir64b(cpu: &mut Cpu, op: &Op) -> Exec {
    let mut line = [0; 64];
    let to = cpu.truncate(op, cpu.reg::<u64>(op.dst));
    let to = if cpu.code64() { to } else { cpu.segmented(ES, to, 64, Access::Write)? };
    let from = cpu.linear(op, 64, Access::Read)?;
    cpu.load_bytes(from, &mut line)?;
    if to & 63 != 0 {
        return Err(cpu.gp(0));
    }
    cpu.store_bytes(to, &line)?;
    cpu.then(op)
}

/// CLZERO: clears the 64 bytes around rAX.
fn clzero(cpu: &mut Cpu, op: &Op) -> Exec {
    let at = cpu.truncate(op, cpu.regs[gpr::RAX]) & !63;
    let lin = if cpu.code64() { at } else { cpu.segmented(DS, at, 64, Access::Write)? };
    cpu.store_bytes(lin, &[0; 64])?;
    cpu.then(op)
}

fn salc(cpu: &mut Cpu, op: &Op) -> Exec {
    let v = if cpu.cf() { 0xffu8 } else { 0 };
    cpu.set_reg(0, v);
    cpu.then(op)
}

fn lahf(cpu: &mut Cpu, op: &Op) -> Exec {
    let v = (cpu.arith >> 8) as u8;
    cpu.set_reg(1, v);
    cpu.then(op)
}

fn sahf(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.arith = u16::from(cpu.reg::<u8>(1) & 0xd5 | 2) << 8 | cpu.arith & A_OF;
    cpu.then(op)
}

fn clc(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.arith &= !A_CF;
    cpu.then(op)
}

fn stc(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.arith |= A_CF;
    cpu.then(op)
}

fn cmc(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.arith ^= A_CF;
    cpu.then(op)
}

fn cld(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.sys_flags &= !DF;
    cpu.then(op)
}

fn std(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.sys_flags |= DF;
    cpu.then(op)
}

pub(super) fn lower(ctx: &mut Ctx<'_>) -> Option<Handler> {
    use Mnemonic as M;
    let w = ctx.width(0);
    let cc = (ctx.i.condition_code() as u8).wrapping_sub(1);
    Some(match ctx.i.mnemonic() {
        M::Mov => return mov(ctx),
        M::Movzx => extend::<false>(ctx),
        M::Movsx | M::Movsxd => extend::<true>(ctx),
        M::Lea => wide!(w, lea),
        M::Movnti | M::Movdiri => wide!(w, mov_mem_reg),
        M::Movdir64b => movdir64b,
        M::Clzero => {
            // Its address has no operand that would show the size.
            ctx.op.flags &= !(op_flags::ADDR16 | op_flags::ADDR32);
            ctx.op.flags |= match ctx.i.code() {
                Code::Clzerow => op_flags::ADDR16,
                Code::Clzerod => op_flags::ADDR32,
                _ => 0,
            };
            clzero
        }
        M::Bswap if w == 2 => bswap16,
        M::Bswap => wide!(w, bswap),
        M::Movbe if ctx.mem(0) => wide!(w, movbe_store),
        M::Movbe => wide!(w, movbe_load),
        M::Cmovo
        | M::Cmovno
        | M::Cmovb
        | M::Cmovae
        | M::Cmove
        | M::Cmovne
        | M::Cmovbe
        | M::Cmova
        | M::Cmovs
        | M::Cmovns
        | M::Cmovp
        | M::Cmovnp
        | M::Cmovl
        | M::Cmovge
        | M::Cmovle
        | M::Cmovg => match (ctx.mem(1), w) {
            (false, 2) => condition!(cc, cmov_reg, u16),
            (false, 4) => condition!(cc, cmov_reg, u32),
            (false, _) => condition!(cc, cmov_reg, u64),
            (true, 2) => condition!(cc, cmov_mem, u16),
            (true, 4) => condition!(cc, cmov_mem, u32),
            (true, _) => condition!(cc, cmov_mem, u64),
        },
        M::Seto
        | M::Setno
        | M::Setb
        | M::Setae
        | M::Sete
        | M::Setne
        | M::Setbe
        | M::Seta
        | M::Sets
        | M::Setns
        | M::Setp
        | M::Setnp
        | M::Setl
        | M::Setge
        | M::Setle
        | M::Setg => {
            if ctx.mem(0) {
                condition!(cc, set_mem)
            } else {
                condition!(cc, set_reg)
            }
        }
        M::Cbw => extend_accumulator::<u16>,
        M::Cwde => extend_accumulator::<u32>,
        M::Cdqe => extend_accumulator::<u64>,
        M::Cwd => sign_to_dx::<u16>,
        M::Cdq => sign_to_dx::<u32>,
        M::Cqo => sign_to_dx::<u64>,
        M::Xlatb => xlat,
        M::Salc => salc,
        M::Lahf => lahf,
        M::Sahf => sahf,
        M::Clc => clc,
        M::Stc => stc,
        M::Cmc => cmc,
        M::Cld => cld,
        M::Std => std,
        _ => return None,
    })
}
