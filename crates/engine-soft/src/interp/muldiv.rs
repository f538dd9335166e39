//! MUL, IMUL, MULX, DIV, IDIV: executed by the host once it is certain that the quotient fits.

use crate::cpu::{Cpu, Int, Trap, gpr};
use crate::decode::{Ctx, Exec, Handler, Op};
use crate::mmu::Access;
use iced_x86::{Mnemonic, OpKind};

const RDX: u8 = gpr::RDX as u8 * 8;

/// Operand `n` (0 in `dst`, 1 in `src`), from a register or from memory.
#[inline(always)]
fn operand<const MEM: bool, T: Int>(cpu: &mut Cpu, op: &Op, reg: u8) -> Result<T, Trap> {
    if MEM {
        let lin = cpu.linear(op, T::SIZE, Access::Read)?;
        cpu.load::<T>(lin)
    } else {
        Ok(cpu.reg::<T>(reg))
    }
}

/// One-operand MUL or IMUL: rDX:rAX (AX for bytes).
fn multiply<const SIGNED: bool, const MEM: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = operand::<MEM, T>(cpu, op, op.dst)?.to_u64();
    let mut low = cpu.regs[gpr::RAX];
    let mut high = 0u64;
    let mut f = u64::from(cpu.arith);
    macro_rules! run {
        ($text:literal) => {
            // The flags go in and out through RAX, which the multiplication needs as well.
            // SAFETY: register-only arithmetic.
            unsafe {
                std::arch::asm!("add al, 127", "sahf", "mov rax, {low}", $text, "mov {low}, rax", "lahf", "seto al",
                    low = inout(reg) low, b = in(reg) b, inout("rax") f, inout("rdx") high,
                    options(pure, nomem, nostack))
            }
        };
    }
    match (SIGNED, T::SIZE) {
        (false, 1) => run!("mul {b:l}"),
        (false, 2) => run!("mul {b:x}"),
        (false, 4) => run!("mul {b:e}"),
        (false, _) => run!("mul {b}"),
        (true, 1) => run!("imul {b:l}"),
        (true, 2) => run!("imul {b:x}"),
        (true, 4) => run!("imul {b:e}"),
        (true, _) => run!("imul {b}"),
    }
    if T::SIZE == 1 {
        cpu.set_reg(0, low as u16);
    } else {
        cpu.set_reg(0, T::from_u64(low));
        cpu.set_reg(RDX, T::from_u64(high));
    }
    cpu.arith = f as u16;
    cpu.then(op)
}

#[inline(always)]
fn signed_product<T: Int>(a: T, b: T, flags: &mut u16) -> T {
    let mut r = a.to_u64();
    let b = b.to_u64();
    let mut f = u64::from(*flags);
    // SAFETY: register-only arithmetic.
    unsafe {
        match T::SIZE {
            2 => with_flags!(f, ["imul {r:x}, {b:x}"], r = inout(reg) r, b = in(reg) b,),
            4 => with_flags!(f, ["imul {r:e}, {b:e}"], r = inout(reg) r, b = in(reg) b,),
            _ => with_flags!(f, ["imul {r}, {b}"], r = inout(reg) r, b = in(reg) b,),
        }
    }
    *flags = f as u16;
    T::from_u64(r)
}

fn imul2<const MEM: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = operand::<MEM, T>(cpu, op, op.src)?;
    let a = cpu.reg::<T>(op.dst);
    let r = signed_product(a, b, &mut cpu.arith);
    cpu.set_reg(op.dst, r);
    cpu.then(op)
}

fn imul3<const MEM: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let a = operand::<MEM, T>(cpu, op, op.src)?;
    let r = signed_product(a, T::from_u64(op.imm), &mut cpu.arith);
    cpu.set_reg(op.dst, r);
    cpu.then(op)
}

fn mulx<const MEM: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = operand::<MEM, T>(cpu, op, op.third)?;
    let p = u128::from(cpu.reg::<T>(RDX).to_u64()) * u128::from(b.to_u64());
    // The high half last: it wins when both destinations are one register.
    cpu.set_reg(op.src, T::from_u64(p as u64));
    cpu.set_reg(op.dst, T::from_u64((p >> T::BITS) as u64));
    cpu.then(op)
}

/// Whether `high:low / d` has a quotient of `T`'s width.
#[inline(always)]
fn quotient_fits<const SIGNED: bool, T: Int>(high: T, low: T, d: T) -> bool {
    if d == T::default() {
        return false;
    }
    if !SIGNED {
        return high.to_u64() < d.to_u64();
    }
    let n = i128::from(high.to_i64()) << T::BITS | i128::from(low.to_u64());
    let d = i128::from(d.to_i64());
    let (un, ud) = (n.unsigned_abs(), d.unsigned_abs());
    // The largest magnitude that a quotient of this sign may have.
    let most = (1u128 << (T::BITS - 1)) - u128::from((n < 0) == (d < 0));
    un < (most + 1) * ud
}

fn divide<const SIGNED: bool, const MEM: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let d = operand::<MEM, T>(cpu, op, op.dst)?;
    let (high, low) = if T::SIZE == 1 {
        (T::from_u64(cpu.reg::<u8>(1).to_u64()), cpu.reg::<T>(0))
    } else {
        (cpu.reg::<T>(RDX), cpu.reg::<T>(0))
    };
    if !quotient_fits::<SIGNED, T>(high, low, d) {
        return Err(cpu.de());
    }
    let d = d.to_u64();
    let mut q = if T::SIZE == 1 { cpu.regs[gpr::RAX] } else { low.to_u64() };
    let mut r = high.to_u64();
    let mut f = u64::from(cpu.arith);
    macro_rules! run {
        ($text:literal) => {
            // SAFETY: register-only arithmetic; the quotient fits, so the host does not fault.
            unsafe {
                std::arch::asm!("add al, 127", "sahf", "mov rax, {q}", $text, "mov {q}, rax", "lahf", "seto al",
                    q = inout(reg) q, d = in(reg) d, inout("rax") f, inout("rdx") r, options(pure, nomem, nostack))
            }
        };
    }
    match (SIGNED, T::SIZE) {
        (false, 1) => run!("div {d:l}"),
        (false, 2) => run!("div {d:x}"),
        (false, 4) => run!("div {d:e}"),
        (false, _) => run!("div {d}"),
        (true, 1) => run!("idiv {d:l}"),
        (true, 2) => run!("idiv {d:x}"),
        (true, 4) => run!("idiv {d:e}"),
        (true, _) => run!("idiv {d}"),
    }
    if T::SIZE == 1 {
        cpu.set_reg(0, q as u16);
    } else {
        cpu.set_reg(0, T::from_u64(q));
        cpu.set_reg(RDX, T::from_u64(r));
    }
    cpu.arith = f as u16;
    cpu.then(op)
}

/// `$f::<..., MEM, T>` by whether operand `$n` is memory and by width.
macro_rules! by_form {
    ($mem:expr, $w:expr, $f:ident $(, $g:expr)*) => {
        match ($mem, $w) {
            (false, 2) => $f::<$($g,)* false, u16>,
            (false, 4) => $f::<$($g,)* false, u32>,
            (false, 8) => $f::<$($g,)* false, u64>,
            (true, 2) => $f::<$($g,)* true, u16>,
            (true, 4) => $f::<$($g,)* true, u32>,
            (true, 8) => $f::<$($g,)* true, u64>,
            _ => return None,
        }
    };
}

fn one_operand<const SIGNED: bool, const DIVIDE: bool>(ctx: &Ctx<'_>) -> Option<Handler> {
    let (m, w) = (ctx.mem(0), ctx.width(0));
    Some(match (DIVIDE, m, w) {
        (false, false, 1) => multiply::<SIGNED, false, u8>,
        (false, true, 1) => multiply::<SIGNED, true, u8>,
        (true, false, 1) => divide::<SIGNED, false, u8>,
        (true, true, 1) => divide::<SIGNED, true, u8>,
        (false, ..) => by_form!(m, w, multiply, SIGNED),
        (true, ..) => by_form!(m, w, divide, SIGNED),
    })
}

pub(super) fn lower(ctx: &mut Ctx<'_>) -> Option<Handler> {
    let w = ctx.width(0);
    Some(match (ctx.i.mnemonic(), ctx.i.op_count()) {
        (Mnemonic::Mul, _) => return one_operand::<false, false>(ctx),
        (Mnemonic::Imul, 1) => return one_operand::<true, false>(ctx),
        (Mnemonic::Imul, 2) => by_form!(ctx.mem(1), w, imul2),
        (Mnemonic::Imul, _) => by_form!(ctx.i.op1_kind() == OpKind::Memory, w, imul3),
        (Mnemonic::Div, _) => return one_operand::<false, true>(ctx),
        (Mnemonic::Idiv, _) => return one_operand::<true, true>(ctx),
        (Mnemonic::Mulx, _) => by_form!(ctx.mem(2), w, mulx),
        _ => return None,
    })
}
