//! Bit tests, bit scans, counts, BMI, CRC32 and the random-number instructions.

use crate::cpu::{Cpu, Int, Trap};
use crate::decode::{Ctx, Exec, Handler, Op, op_flags};
use crate::mmu::Access;
use iced_x86::{Mnemonic, OpKind};
use std::arch::asm;

const TEST: u8 = 0;
const SET: u8 = 1;
const RESET: u8 = 2;
const COMPLEMENT: u8 = 3;

#[inline(always)]
fn changed<const KIND: u8, T: Int>(v: T, bit: u32) -> T {
    let mask = 1u64 << bit;
    T::from_u64(match KIND {
        SET => v.to_u64() | mask,
        RESET => v.to_u64() & !mask,
        COMPLEMENT => v.to_u64() ^ mask,
        _ => v.to_u64(),
    })
}

/// The bit offset operand: a register (`IMM` false) or an immediate.
#[inline(always)]
fn bit_offset<const IMM: bool, T: Int>(cpu: &Cpu, op: &Op) -> i64 {
    if IMM { op.imm as i64 } else { cpu.reg::<T>(op.src).to_i64() }
}

fn bt_reg<const KIND: u8, const IMM: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let bit = bit_offset::<IMM, T>(cpu, op) as u32 & (T::BITS - 1);
    let v = cpu.reg::<T>(op.dst);
    cpu.set_cf(v.to_u64() >> bit & 1 != 0);
    if KIND != TEST {
        cpu.set_reg(op.dst, changed::<KIND, T>(v, bit));
    }
    cpu.then(op)
}

fn bt_mem<const KIND: u8, const IMM: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let access = if KIND == TEST { Access::Read } else { Access::Write };
    let offset = bit_offset::<IMM, T>(cpu, op);
    let bit = offset as u32 & (T::BITS - 1);
    let lin = if IMM {
        cpu.linear(op, T::SIZE, access)?
    } else {
        // The offset is signed and may lead anywhere: the address is that of the operand-sized piece that holds the bit.
        let piece = (offset >> T::BITS.trailing_zeros()).wrapping_mul(T::SIZE as i64);
        let ea = cpu.truncate(op, cpu.effective(op).wrapping_add(piece as u64));
        if op.flags & op_flags::FLAT != 0 {
            ea
        } else if op.flags & op_flags::FLAT32 != 0 {
            u64::from(ea as u32)
        } else {
            cpu.segmented(op.seg.into(), ea, T::SIZE, access)?
        }
    };
    let mut found = false;
    let mut f = |v: T| {
        found = v.to_u64() >> bit & 1 != 0;
        changed::<KIND, T>(v, bit)
    };
    if KIND == TEST {
        f(cpu.load::<T>(lin)?);
    } else if op.flags & op_flags::LOCK == 0 {
        cpu.modify::<T>(lin, f)?;
    } else {
        cpu.modify_locked::<T>(lin, f)?;
    }
    cpu.set_cf(found);
    cpu.then(op)
}

fn bit_test<const KIND: u8>(ctx: &Ctx<'_>) -> Handler {
    fn form<const KIND: u8, const IMM: bool>(ctx: &Ctx<'_>) -> Handler {
        match (ctx.mem(0), ctx.width(0)) {
            (false, 2) => bt_reg::<KIND, IMM, u16>,
            (false, 4) => bt_reg::<KIND, IMM, u32>,
            (false, _) => bt_reg::<KIND, IMM, u64>,
            (true, 2) => bt_mem::<KIND, IMM, u16>,
            (true, 4) => bt_mem::<KIND, IMM, u32>,
            (true, _) => bt_mem::<KIND, IMM, u64>,
        }
    }
    if ctx.i.op1_kind() == OpKind::Register { form::<KIND, false>(ctx) } else { form::<KIND, true>(ctx) }
}

/// Operand 1: a register or memory.
#[inline(always)]
fn source<const MEM: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Result<T, Trap> {
    if MEM {
        let lin = cpu.linear(op, T::SIZE, Access::Read)?;
        cpu.load::<T>(lin)
    } else {
        Ok(cpu.reg::<T>(op.src))
    }
}

/// An instruction `op dst, src` that the host executes on whole registers: what it leaves of the destination (BSF and BSR of zero) is
/// left here too.
trait Scan {
    fn apply<T: Int>(dst: u64, src: T, flags: &mut u16) -> u64;
}

macro_rules! scan {
    ($name:ident, $mnemonic:literal) => {
        struct $name;
        impl Scan for $name {
            #[inline(always)]
            fn apply<T: Int>(mut dst: u64, src: T, flags: &mut u16) -> u64 {
                let s = src.to_u64();
                let mut f = u64::from(*flags);
                // SAFETY: register-only arithmetic.
                unsafe {
                    match T::SIZE {
                        2 => with_flags!(f, [concat!($mnemonic, " {d:x}, {s:x}")], d = inout(reg) dst, s = in(reg) s,),
                        4 => with_flags!(f, [concat!($mnemonic, " {d:e}, {s:e}")], d = inout(reg) dst, s = in(reg) s,),
                        _ => with_flags!(f, [concat!($mnemonic, " {d}, {s}")], d = inout(reg) dst, s = in(reg) s,),
                    }
                }
                *flags = f as u16;
                dst
            }
        }
    };
}

scan!(Bsf, "bsf");
scan!(Bsr, "bsr");
scan!(Tzcnt, "tzcnt");
scan!(Lzcnt, "lzcnt");
scan!(Popcnt, "popcnt");

fn scan<O: Scan, const MEM: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let s = source::<MEM, T>(cpu, op)?;
    let r = O::apply(cpu.reg::<u64>(op.dst), s, &mut cpu.arith);
    cpu.set_reg(op.dst, r);
    cpu.then(op)
}

fn lower_scan<O: Scan>(ctx: &Ctx<'_>) -> Handler {
    match (ctx.mem(1), ctx.width(0)) {
        (false, 2) => scan::<O, false, u16>,
        (false, 4) => scan::<O, false, u32>,
        (false, _) => scan::<O, false, u64>,
        (true, 2) => scan::<O, true, u16>,
        (true, 4) => scan::<O, true, u32>,
        (true, _) => scan::<O, true, u64>,
    }
}

/// A VEX-encoded instruction of BMI1 or BMI2 with one result and up to two sources.
trait Bmi {
    fn apply<T: Int>(a: T, b: T, flags: &mut u16) -> T;
}

macro_rules! bmi {
    ($name:ident, $narrow:literal, $wide:literal) => {
        struct $name;
        impl Bmi for $name {
            #[inline(always)]
            fn apply<T: Int>(a: T, b: T, flags: &mut u16) -> T {
                let (a, b) = (a.to_u64(), b.to_u64());
                let r: u64;
                let mut f = u64::from(*flags);
                // SAFETY: register-only arithmetic; the guest has the instruction only where the host has it.
                unsafe {
                    if T::SIZE == 4 {
                        with_flags!(f, [$narrow], r = lateout(reg) r, a = in(reg) a, b = in(reg) b,)
                    } else {
                        with_flags!(f, [$wide], r = lateout(reg) r, a = in(reg) a, b = in(reg) b,)
                    }
                }
                *flags = f as u16;
                T::from_u64(r)
            }
        }
    };
}

bmi!(Andn, "andn {r:e}, {a:e}, {b:e}", "andn {r}, {a}, {b}");
bmi!(Bextr, "bextr {r:e}, {a:e}, {b:e}", "bextr {r}, {a}, {b}");
bmi!(Bzhi, "bzhi {r:e}, {a:e}, {b:e}", "bzhi {r}, {a}, {b}");
bmi!(Pdep, "pdep {r:e}, {a:e}, {b:e}", "pdep {r}, {a}, {b}");
bmi!(Pext, "pext {r:e}, {a:e}, {b:e}", "pext {r}, {a}, {b}");
// One source; `b` only so that the forms are alike.
bmi!(Blsi, "blsi {r:e}, {a:e} # {b}", "blsi {r}, {a} # {b}");
bmi!(Blsr, "blsr {r:e}, {a:e} # {b}", "blsr {r}, {a} # {b}");
bmi!(Blsmsk, "blsmsk {r:e}, {a:e} # {b}", "blsmsk {r}, {a} # {b}");

/// Sources are operands 1 and 2, the latter a register or memory (ANDN, PDEP, PEXT).
fn bmi_rm_last<O: Bmi, const MEM: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = if MEM {
        let lin = cpu.linear(op, T::SIZE, Access::Read)?;
        cpu.load::<T>(lin)?
    } else {
        cpu.reg::<T>(op.third)
    };
    let r = O::apply(cpu.reg::<T>(op.src), b, &mut cpu.arith);
    cpu.set_reg(op.dst, r);
    cpu.then(op)
}

/// Sources are operands 1 and 2, the former a register or memory (BEXTR, BZHI), or operand 1 alone (BLSI...).
fn bmi_rm_first<O: Bmi, const MEM: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let a = source::<MEM, T>(cpu, op)?;
    let r = O::apply(a, cpu.reg::<T>(op.third), &mut cpu.arith);
    cpu.set_reg(op.dst, r);
    cpu.then(op)
}

fn rm_last<O: Bmi>(ctx: &Ctx<'_>) -> Handler {
    match (ctx.mem(2), ctx.width(0)) {
        (false, 4) => bmi_rm_last::<O, false, u32>,
        (false, _) => bmi_rm_last::<O, false, u64>,
        (true, 4) => bmi_rm_last::<O, true, u32>,
        (true, _) => bmi_rm_last::<O, true, u64>,
    }
}

fn rm_first<O: Bmi>(ctx: &Ctx<'_>) -> Handler {
    match (ctx.mem(1), ctx.width(0)) {
        (false, 4) => bmi_rm_first::<O, false, u32>,
        (false, _) => bmi_rm_first::<O, false, u64>,
        (true, 4) => bmi_rm_first::<O, true, u32>,
        (true, _) => bmi_rm_first::<O, true, u64>,
    }
}

fn crc32<const MEM: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let s = source::<MEM, T>(cpu, op)?.to_u64();
    // The destination is 32 or 64 bits wide; either way the result has 32 and the rest becomes zero.
    let mut r = cpu.reg::<u64>(op.dst);
    // SAFETY: register-only arithmetic; the guest has the instruction only where the host has it.
    unsafe {
        match T::SIZE {
            1 => asm!("crc32 {r:e}, {s:l}", r = inout(reg) r, s = in(reg) s, options(pure, nomem, nostack)),
            2 => asm!("crc32 {r:e}, {s:x}", r = inout(reg) r, s = in(reg) s, options(pure, nomem, nostack)),
            4 => asm!("crc32 {r:e}, {s:e}", r = inout(reg) r, s = in(reg) s, options(pure, nomem, nostack)),
            _ => asm!("crc32 {r}, {s}", r = inout(reg) r, s = in(reg) s, options(pure, nomem, nostack)),
        }
    }
    cpu.set_reg(op.dst, r);
    cpu.then(op)
}

/// RDRAND and RDSEED: CF says whether there was a number; the other flags are cleared.
fn random<const SEED: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let r: u64;
    let ok: u8;
    // SAFETY: reads the host's generator; the guest has the instruction only where the host has it.
    unsafe {
        if SEED {
            asm!("rdseed {r}", "setc {ok}", r = out(reg) r, ok = out(reg_byte) ok, options(nomem, nostack));
        } else {
            asm!("rdrand {r}", "setc {ok}", r = out(reg) r, ok = out(reg_byte) ok, options(nomem, nostack));
        }
    }
    cpu.set_reg(op.dst, T::from_u64(r));
    cpu.set_arith_flags(u64::from(ok));
    cpu.then(op)
}

pub(super) fn lower(ctx: &mut Ctx<'_>) -> Option<Handler> {
    let w = ctx.width(0);
    Some(match ctx.i.mnemonic() {
        Mnemonic::Bt => bit_test::<TEST>(ctx),
        Mnemonic::Bts => bit_test::<SET>(ctx),
        Mnemonic::Btr => bit_test::<RESET>(ctx),
        Mnemonic::Btc => bit_test::<COMPLEMENT>(ctx),
        Mnemonic::Bsf => lower_scan::<Bsf>(ctx),
        Mnemonic::Bsr => lower_scan::<Bsr>(ctx),
        Mnemonic::Tzcnt => lower_scan::<Tzcnt>(ctx),
        Mnemonic::Lzcnt => lower_scan::<Lzcnt>(ctx),
        Mnemonic::Popcnt => lower_scan::<Popcnt>(ctx),
        Mnemonic::Andn => rm_last::<Andn>(ctx),
        Mnemonic::Pdep => rm_last::<Pdep>(ctx),
        Mnemonic::Pext => rm_last::<Pext>(ctx),
        Mnemonic::Bextr => rm_first::<Bextr>(ctx),
        Mnemonic::Bzhi => rm_first::<Bzhi>(ctx),
        Mnemonic::Blsi => rm_first::<Blsi>(ctx),
        Mnemonic::Blsr => rm_first::<Blsr>(ctx),
        Mnemonic::Blsmsk => rm_first::<Blsmsk>(ctx),
        Mnemonic::Crc32 if ctx.mem(1) => width!(ctx.width(1), crc32_mem),
        Mnemonic::Crc32 => width!(ctx.width(1), crc32_reg),
        Mnemonic::Rdrand => wide!(w, rdrand),
        Mnemonic::Rdseed => wide!(w, rdseed),
        _ => return None,
    })
}

fn crc32_reg<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    crc32::<false, T>(cpu, op)
}

fn crc32_mem<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    crc32::<true, T>(cpu, op)
}

fn rdrand<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    random::<false, T>(cpu, op)
}

fn rdseed<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    random::<true, T>(cpu, op)
}
