//! ADD, OR, ADC, SBB, AND, SUB, XOR, CMP, TEST, INC, DEC, NEG, NOT: executed by the host's own ALU, flags kept as LAHF/SETO leave them.

use crate::cpu::{Cpu, Int};
use crate::decode::{Ctx, Exec, Handler, Op, op_flags};
use crate::mmu::Access;
use iced_x86::{Mnemonic, OpKind};
use std::arch::asm;

/// A two-operand ALU operation.
trait Binary {
    /// The result of `a op b`; `flags` in [`Cpu::arith`] form, in and out.
    fn apply<T: Int>(a: T, b: T, flags: &mut u16) -> T;
    /// Whether the result is written back.
    const WRITES: bool = true;
}

// The flags come out in RAX. LAHF and SETO write parts of it, so it is cleared before: else every operation would wait for the
// flags of the one before.
macro_rules! binary {
    (@run $text:expr, $r:ident, $b:ident, $f:ident, $old:expr,) => {
        // SAFETY: register-only arithmetic.
        unsafe {
            asm!("xor eax, eax", $text, "lahf", "seto al", r = inout(reg) $r, b = in(reg) $b, out("rax") $f,
                options(pure, nomem, nostack))
        }
    };
    (@run $text:expr, $r:ident, $b:ident, $f:ident, $old:expr, $carry:literal) => {
        // SAFETY: register-only arithmetic.
        unsafe {
            asm!("xor eax, eax", $carry, $text, "lahf", "seto al", r = inout(reg) $r, b = in(reg) $b,
                old = in(reg) u32::from($old), out("rax") $f, options(pure, nomem, nostack))
        }
    };
    ($name:ident, $mnemonic:literal, $writes:expr, $($carry:literal)?) => {
        struct $name;
        impl Binary for $name {
            const WRITES: bool = $writes;
            #[inline(always)]
            fn apply<T: Int>(a: T, b: T, flags: &mut u16) -> T {
                let mut r = a.to_u64();
                let b = b.to_u64();
                let f: u64;
                macro_rules! run {
                    ($operands:literal) => {
                        binary!(@run concat!($mnemonic, $operands), r, b, f, *flags, $($carry)?)
                    };
                }
                match T::SIZE {
                    1 => run!(" {r:l}, {b:l}"),
                    2 => run!(" {r:x}, {b:x}"),
                    4 => run!(" {r:e}, {b:e}"),
                    _ => run!(" {r}, {b}"),
                }
                *flags = f as u16;
                T::from_u64(r)
            }
        }
    };
}

binary!(Add, "add", true,);
binary!(Or, "or", true,);
binary!(Adc, "adc", true, "bt {old:e}, 8");
binary!(Sbb, "sbb", true, "bt {old:e}, 8");
binary!(And, "and", true,);
binary!(Sub, "sub", true,);
binary!(Xor, "xor", true,);
binary!(Cmp, "cmp", false,);
binary!(Test, "test", false,);

fn reg_reg<O: Binary, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (a, b) = (cpu.reg::<T>(op.dst), cpu.reg::<T>(op.src));
    let r = O::apply(a, b, &mut cpu.arith);
    if O::WRITES {
        cpu.set_reg(op.dst, r);
    }
    cpu.then(op)
}

fn reg_imm<O: Binary, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let a = cpu.reg::<T>(op.dst);
    let r = O::apply(a, T::from_u64(op.imm), &mut cpu.arith);
    if O::WRITES {
        cpu.set_reg(op.dst, r);
    }
    cpu.then(op)
}

fn reg_mem<O: Binary, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let Some(b) = cpu.quick_load::<T>(op) else { return reg_mem_slow::<O, T>(cpu, op) };
    let r = O::apply(cpu.reg::<T>(op.dst), b, &mut cpu.arith);
    if O::WRITES {
        cpu.set_reg(op.dst, r);
    }
    cpu.then(op)
}

#[inline(never)]
fn reg_mem_slow<O: Binary, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let lin = cpu.linear(op, T::SIZE, Access::Read)?;
    let b = cpu.load::<T>(lin)?;
    let r = O::apply(cpu.reg::<T>(op.dst), b, &mut cpu.arith);
    if O::WRITES {
        cpu.set_reg(op.dst, r);
    }
    cpu.then(op)
}

#[inline(always)]
fn into_mem<O: Binary, T: Int>(cpu: &mut Cpu, op: &Op, b: T) -> Exec {
    if !O::WRITES {
        let Some(a) = cpu.quick_load::<T>(op) else { return into_mem_slow::<O, T>(cpu, op, b) };
        O::apply(a, b, &mut cpu.arith);
        return cpu.then(op);
    }
    if op.flags & op_flags::LOCK != 0 || cpu.quick_modify::<T>(op, |a, flags| O::apply(a, b, flags)).is_none()
    {
        return into_mem_slow::<O, T>(cpu, op, b);
    }
    cpu.then(op)
}

#[inline(never)]
fn into_mem_slow<O: Binary, T: Int>(cpu: &mut Cpu, op: &Op, b: T) -> Exec {
    if !O::WRITES {
        let lin = cpu.linear(op, T::SIZE, Access::Read)?;
        let a = cpu.load::<T>(lin)?;
        O::apply(a, b, &mut cpu.arith);
        return cpu.then(op);
    }
    let lin = cpu.linear(op, T::SIZE, Access::Write)?;
    let before = cpu.arith;
    let mut flags = before;
    if op.flags & op_flags::LOCK == 0 {
        cpu.modify(lin, |a| O::apply(a, b, &mut flags))?;
    } else {
        cpu.modify_locked(lin, |a| {
            flags = before;
            O::apply(a, b, &mut flags)
        })?;
    }
    cpu.arith = flags;
    cpu.then(op)
}

fn mem_reg<O: Binary, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = cpu.reg::<T>(op.src);
    into_mem::<O, T>(cpu, op, b)
}

fn mem_imm<O: Binary, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    into_mem::<O, T>(cpu, op, T::from_u64(op.imm))
}

fn by_form<O: Binary, T: Int>(a: OpKind, b: OpKind) -> Handler {
    match (a, b) {
        (OpKind::Register, OpKind::Register) => reg_reg::<O, T>,
        (OpKind::Register, OpKind::Memory) => reg_mem::<O, T>,
        (OpKind::Memory, OpKind::Register) => mem_reg::<O, T>,
        (OpKind::Memory, _) => mem_imm::<O, T>,
        _ => reg_imm::<O, T>,
    }
}

fn by_width<O: Binary>(ctx: &Ctx<'_>) -> Handler {
    let (a, b) = (ctx.i.op0_kind(), ctx.i.op1_kind());
    match ctx.width(0) {
        1 => by_form::<O, u8>(a, b),
        2 => by_form::<O, u16>(a, b),
        4 => by_form::<O, u32>(a, b),
        _ => by_form::<O, u64>(a, b),
    }
}

/// A one-operand ALU operation.
trait Unary {
    /// The result; `flags` in [`Cpu::arith`] form, in and out.
    fn apply<T: Int>(a: T, flags: &mut u16) -> T;
}

macro_rules! unary {
    ($name:ident, $mnemonic:literal) => {
        struct $name;
        impl Unary for $name {
            #[inline(always)]
            fn apply<T: Int>(a: T, flags: &mut u16) -> T {
                let mut r = a.to_u64();
                let f: u64;
                macro_rules! run {
                    ($operand:literal) => {
                        // CF first: INC and DEC keep it.
                        // SAFETY: register-only arithmetic.
                        unsafe {
                            asm!("xor eax, eax", "bt {old:e}, 8", concat!($mnemonic, $operand), "lahf", "seto al",
                                r = inout(reg) r, old = in(reg) u32::from(*flags), out("rax") f,
                                options(pure, nomem, nostack))
                        }
                    };
                }
                match T::SIZE {
                    1 => run!(" {r:l}"),
                    2 => run!(" {r:x}"),
                    4 => run!(" {r:e}"),
                    _ => run!(" {r}"),
                }
                *flags = f as u16;
                T::from_u64(r)
            }
        }
    };
}

unary!(Inc, "inc");
unary!(Dec, "dec");
unary!(Neg, "neg");

struct Not;
impl Unary for Not {
    #[inline(always)]
    fn apply<T: Int>(a: T, _: &mut u16) -> T {
        T::from_u64(!a.to_u64())
    }
}

fn unary_reg<O: Unary, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let a = cpu.reg::<T>(op.dst);
    let r = O::apply(a, &mut cpu.arith);
    cpu.set_reg(op.dst, r);
    cpu.then(op)
}

fn unary_mem<O: Unary, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    if op.flags & op_flags::LOCK != 0 || cpu.quick_modify::<T>(op, |a, flags| O::apply(a, flags)).is_none() {
        return unary_mem_slow::<O, T>(cpu, op);
    }
    cpu.then(op)
}

#[inline(never)]
fn unary_mem_slow<O: Unary, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let lin = cpu.linear(op, T::SIZE, Access::Write)?;
    let before = cpu.arith;
    let mut flags = before;
    if op.flags & op_flags::LOCK == 0 {
        cpu.modify::<T>(lin, |a| O::apply(a, &mut flags))?;
    } else {
        cpu.modify_locked::<T>(lin, |a| {
            flags = before;
            O::apply(a, &mut flags)
        })?;
    }
    cpu.arith = flags;
    cpu.then(op)
}

fn one<O: Unary>(ctx: &Ctx<'_>) -> Handler {
    if ctx.mem(0) { width!(ctx.width(0), unary_mem, O) } else { width!(ctx.width(0), unary_reg, O) }
}

/// The sum as ADD makes it, flags included.
#[inline(always)]
pub(super) fn add<T: Int>(a: T, b: T, flags: &mut u16) -> T {
    Add::apply(a, b, flags)
}

/// The flags of CMP `a`, `b`.
#[inline(always)]
pub(super) fn compare<T: Int>(a: T, b: T, flags: &mut u16) {
    Cmp::apply(a, b, flags);
}

pub(super) fn lower(ctx: &mut Ctx<'_>) -> Option<Handler> {
    Some(match ctx.i.mnemonic() {
        Mnemonic::Add => by_width::<Add>(ctx),
        Mnemonic::Or => by_width::<Or>(ctx),
        Mnemonic::Adc => by_width::<Adc>(ctx),
        Mnemonic::Sbb => by_width::<Sbb>(ctx),
        Mnemonic::And => by_width::<And>(ctx),
        Mnemonic::Sub => by_width::<Sub>(ctx),
        Mnemonic::Xor => by_width::<Xor>(ctx),
        Mnemonic::Cmp => by_width::<Cmp>(ctx),
        Mnemonic::Test => by_width::<Test>(ctx),
        Mnemonic::Inc => one::<Inc>(ctx),
        Mnemonic::Dec => one::<Dec>(ctx),
        Mnemonic::Neg => one::<Neg>(ctx),
        Mnemonic::Not => one::<Not>(ctx),
        _ => return None,
    })
}
