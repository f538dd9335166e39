//! Shifts and rotates, executed by the host: a masked count of zero leaves flags alone there as it must here, and what the
//! architecture leaves undefined is the host's answer.

use crate::cpu::{Cpu, Int};
use crate::decode::{Ctx, Exec, Flow, Handler, Op};
use crate::mmu::Access;
use iced_x86::{Mnemonic, OpKind, Register};

/// A shift or rotate of one operand.
trait Shift {
    /// The result; `flags` in [`Cpu::arith`] form, in and out.
    fn apply<T: Int>(a: T, count: u8, flags: &mut u16) -> T;
}

macro_rules! shift {
    ($name:ident, $mnemonic:literal) => {
        struct $name;
        impl Shift for $name {
            #[inline(always)]
            fn apply<T: Int>(a: T, count: u8, flags: &mut u16) -> T {
                let mut r = a.to_u64();
                let mut f = u64::from(*flags);
                // SAFETY: register-only arithmetic.
                unsafe {
                    match T::SIZE {
                        1 => with_flags!(f, [concat!($mnemonic, " {r:l}, cl")], r = inout(reg) r, in("cl") count,),
                        2 => with_flags!(f, [concat!($mnemonic, " {r:x}, cl")], r = inout(reg) r, in("cl") count,),
                        4 => with_flags!(f, [concat!($mnemonic, " {r:e}, cl")], r = inout(reg) r, in("cl") count,),
                        _ => with_flags!(f, [concat!($mnemonic, " {r}, cl")], r = inout(reg) r, in("cl") count,),
                    }
                }
                *flags = f as u16;
                T::from_u64(r)
            }
        }
    };
}

shift!(Shl, "shl");
shift!(Shr, "shr");
shift!(Sar, "sar");
shift!(Rol, "rol");
shift!(Ror, "ror");
shift!(Rcl, "rcl");
shift!(Rcr, "rcr");

macro_rules! plain_shift {
    ($name:ident, $mnemonic:literal) => {
        /// A shift by an immediate that is not zero: it does not depend on the flags before.
        fn $name<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
            let mut r = cpu.reg::<T>(op.dst).to_u64();
            let f: u64;
            macro_rules! run {
                ($operands:literal) => {
                    // SAFETY: register-only arithmetic.
                    unsafe {
                        std::arch::asm!("xor eax, eax", concat!($mnemonic, $operands), "lahf", "seto al",
                            r = inout(reg) r, in("cl") op.imm as u8, out("rax") f, options(pure, nomem, nostack))
                    }
                };
            }
            match T::SIZE {
                1 => run!(" {r:l}, cl"),
                2 => run!(" {r:x}, cl"),
                4 => run!(" {r:e}, cl"),
                _ => run!(" {r}, cl"),
            }
            cpu.arith = f as u16;
            cpu.set_reg(op.dst, T::from_u64(r));
            Ok(Flow::Next)
        }
    };
}

plain_shift!(shl_imm, "shl");
plain_shift!(shr_imm, "shr");
plain_shift!(sar_imm, "sar");

/// Whether the count is an immediate that shifts a register at all.
fn plain(ctx: &Ctx<'_>) -> bool {
    let mask = if ctx.width(0) == 8 { 63 } else { 31 };
    !ctx.mem(0) && ctx.i.op1_kind() != OpKind::Register && ctx.op.imm & mask != 0
}

fn reg_imm<O: Shift, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let a = cpu.reg::<T>(op.dst);
    let r = O::apply(a, op.imm as u8, &mut cpu.arith);
    cpu.set_reg(op.dst, r);
    cpu.then(op)
}

fn reg_cl<O: Shift, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (a, count) = (cpu.reg::<T>(op.dst), cpu.reg::<u8>(8));
    let r = O::apply(a, count, &mut cpu.arith);
    cpu.set_reg(op.dst, r);
    cpu.then(op)
}

fn mem<O: Shift, T: Int>(cpu: &mut Cpu, op: &Op, count: u8) -> Exec {
    let lin = cpu.linear(op, T::SIZE, Access::Write)?;
    let mut flags = cpu.arith;
    cpu.modify::<T>(lin, |a| O::apply(a, count, &mut flags))?;
    cpu.arith = flags;
    cpu.then(op)
}

fn mem_imm<O: Shift, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    mem::<O, T>(cpu, op, op.imm as u8)
}

fn mem_cl<O: Shift, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let count = cpu.reg::<u8>(8);
    mem::<O, T>(cpu, op, count)
}

fn one<O: Shift>(ctx: &Ctx<'_>) -> Handler {
    let w = ctx.width(0);
    match (ctx.mem(0), ctx.i.op1_kind() == OpKind::Register) {
        (false, false) => width!(w, reg_imm, O),
        (false, true) => width!(w, reg_cl, O),
        (true, false) => width!(w, mem_imm, O),
        (true, true) => width!(w, mem_cl, O),
    }
}

/// SHLD or SHRD of `a`, shifting bits of `b` in.
#[inline(always)]
fn double<const LEFT: bool, T: Int>(a: T, b: T, count: u8, flags: &mut u16) -> T {
    let mut r = a.to_u64();
    let b = b.to_u64();
    let mut f = u64::from(*flags);
    macro_rules! run {
        ($text:literal) => {
            // SAFETY: register-only arithmetic.
            unsafe { with_flags!(f, [$text], r = inout(reg) r, b = in(reg) b, in("cl") count,) }
        };
    }
    match (LEFT, T::SIZE) {
        (true, 2) => run!("shld {r:x}, {b:x}, cl"),
        (true, 4) => run!("shld {r:e}, {b:e}, cl"),
        (true, _) => run!("shld {r}, {b}, cl"),
        (false, 2) => run!("shrd {r:x}, {b:x}, cl"),
        (false, 4) => run!("shrd {r:e}, {b:e}, cl"),
        (false, _) => run!("shrd {r}, {b}, cl"),
    }
    *flags = f as u16;
    T::from_u64(r)
}

/// The count: an immediate, or CL.
#[inline(always)]
fn double_count(cpu: &Cpu, op: &Op) -> u8 {
    if op.aux != 0 { cpu.reg::<u8>(8) } else { op.imm as u8 }
}

fn double_reg<const LEFT: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let count = double_count(cpu, op);
    let (a, b) = (cpu.reg::<T>(op.dst), cpu.reg::<T>(op.src));
    let r = double::<LEFT, T>(a, b, count, &mut cpu.arith);
    cpu.set_reg(op.dst, r);
    cpu.then(op)
}

fn double_mem<const LEFT: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let count = double_count(cpu, op);
    let lin = cpu.linear(op, T::SIZE, Access::Write)?;
    let b = cpu.reg::<T>(op.src);
    let mut flags = cpu.arith;
    cpu.modify::<T>(lin, |a| double::<LEFT, T>(a, b, count, &mut flags))?;
    cpu.arith = flags;
    cpu.then(op)
}

fn lower_double<const LEFT: bool>(ctx: &mut Ctx<'_>) -> Handler {
    ctx.op.aux = u64::from(ctx.i.op2_kind() == OpKind::Register && ctx.i.op2_register() == Register::CL);
    match (ctx.mem(0), ctx.width(0)) {
        (false, 2) => double_reg::<LEFT, u16>,
        (false, 4) => double_reg::<LEFT, u32>,
        (false, _) => double_reg::<LEFT, u64>,
        (true, 2) => double_mem::<LEFT, u16>,
        (true, 4) => double_mem::<LEFT, u32>,
        (true, _) => double_mem::<LEFT, u64>,
    }
}

/// Which flagless shift.
const SHLX: u8 = 0;
const SHRX: u8 = 1;
const SARX: u8 = 2;
const RORX: u8 = 3;

/// SHLX, SHRX, SARX, RORX.
#[inline(always)]
fn flagless<const KIND: u8, T: Int>(a: T, count: u64) -> T {
    let n = (count as u32) & (T::BITS - 1);
    let v = a.to_u64();
    T::from_u64(match KIND {
        SHLX => v << n,
        SHRX => v >> n,
        SARX => (a.to_i64() >> n) as u64,
        _ if T::SIZE == 4 => u64::from((v as u32).rotate_right(n)),
        _ => v.rotate_right(n),
    })
}

fn flagless_reg<const KIND: u8, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let count = if KIND == RORX { op.imm } else { cpu.reg::<T>(op.third).to_u64() };
    let r = flagless::<KIND, T>(cpu.reg::<T>(op.src), count);
    cpu.set_reg(op.dst, r);
    cpu.then(op)
}

fn flagless_mem<const KIND: u8, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let lin = cpu.linear(op, T::SIZE, Access::Read)?;
    let a = cpu.load::<T>(lin)?;
    let count = if KIND == RORX { op.imm } else { cpu.reg::<T>(op.third).to_u64() };
    cpu.set_reg(op.dst, flagless::<KIND, T>(a, count));
    cpu.then(op)
}

fn lower_flagless<const KIND: u8>(ctx: &Ctx<'_>) -> Handler {
    match (ctx.mem(1), ctx.width(0)) {
        (false, 4) => flagless_reg::<KIND, u32>,
        (false, _) => flagless_reg::<KIND, u64>,
        (true, 4) => flagless_mem::<KIND, u32>,
        (true, _) => flagless_mem::<KIND, u64>,
    }
}

pub(super) fn lower(ctx: &mut Ctx<'_>) -> Option<Handler> {
    Some(match ctx.i.mnemonic() {
        Mnemonic::Shl | Mnemonic::Sal if plain(ctx) => width!(ctx.width(0), shl_imm),
        Mnemonic::Shr if plain(ctx) => width!(ctx.width(0), shr_imm),
        Mnemonic::Sar if plain(ctx) => width!(ctx.width(0), sar_imm),
        Mnemonic::Shl | Mnemonic::Sal => one::<Shl>(ctx),
        Mnemonic::Shr => one::<Shr>(ctx),
        Mnemonic::Sar => one::<Sar>(ctx),
        Mnemonic::Rol => one::<Rol>(ctx),
        Mnemonic::Ror => one::<Ror>(ctx),
        Mnemonic::Rcl => one::<Rcl>(ctx),
        Mnemonic::Rcr => one::<Rcr>(ctx),
        Mnemonic::Shld => lower_double::<true>(ctx),
        Mnemonic::Shrd => lower_double::<false>(ctx),
        Mnemonic::Shlx => lower_flagless::<SHLX>(ctx),
        Mnemonic::Shrx => lower_flagless::<SHRX>(ctx),
        Mnemonic::Sarx => lower_flagless::<SARX>(ctx),
        Mnemonic::Rorx => lower_flagless::<RORX>(ctx),
        _ => return None,
    })
}
