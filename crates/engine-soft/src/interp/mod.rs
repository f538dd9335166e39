//! Handlers of the integer and system instructions.
//!
//! Each module has a `lower` function that picks a handler for the instructions it knows. A handler is a plain function
//! `fn(&mut Cpu, &Op) -> Exec`; families over operand kinds and widths are generic functions.

/// Execute host instructions with the guest's arithmetic flags (an `u64` in `Cpu::arith` form, in and out) in the host's.
macro_rules! with_flags {
    ($flags:ident, [$($line:expr),+], $($operands:tt)*) => {
        std::arch::asm!("add al, 127", "sahf", $($line,)+ "lahf", "seto al", inout("rax") $flags, $($operands)*
            options(pure, nomem, nostack))
    };
}

/// `$f::<..., T>` for the width in bytes `$w`.
macro_rules! width {
    ($w:expr, $f:ident $(, $g:ty)*) => {
        match $w {
            1 => $f::<$($g,)* u8>,
            2 => $f::<$($g,)* u16>,
            4 => $f::<$($g,)* u32>,
            _ => $f::<$($g,)* u64>,
        }
    };
}

/// `$f::<..., T>` for the width in bytes `$w`: 2, 4 or 8.
macro_rules! wide {
    ($w:expr, $f:ident $(, $g:ty)*) => {
        match $w {
            2 => $f::<$($g,)* u16>,
            4 => $f::<$($g,)* u32>,
            _ => $f::<$($g,)* u64>,
        }
    };
}

/// The function for condition code `$cc`: `$f::<CC, ...>`.
macro_rules! condition {
    ($cc:expr, $f:ident $(, $g:ty)*) => {
        match $cc {
            0 => $f::<0 $(, $g)*>,
            1 => $f::<1 $(, $g)*>,
            2 => $f::<2 $(, $g)*>,
            3 => $f::<3 $(, $g)*>,
            4 => $f::<4 $(, $g)*>,
            5 => $f::<5 $(, $g)*>,
            6 => $f::<6 $(, $g)*>,
            7 => $f::<7 $(, $g)*>,
            8 => $f::<8 $(, $g)*>,
            9 => $f::<9 $(, $g)*>,
            10 => $f::<10 $(, $g)*>,
            11 => $f::<11 $(, $g)*>,
            12 => $f::<12 $(, $g)*>,
            13 => $f::<13 $(, $g)*>,
            14 => $f::<14 $(, $g)*>,
            _ => $f::<15 $(, $g)*>,
        }
    };
}

mod alu;
mod bits;
mod branch;
mod decimal;
mod exchange;
mod mov;
mod muldiv;
mod shift;
mod stack;
mod string;
mod system;
#[cfg(test)]
mod tests;

use crate::decode::{Ctx, Handler};

/// The handler for an integer or system instruction.
pub fn lower(ctx: &mut Ctx<'_>) -> Option<Handler> {
    system::lower(ctx)
        .or_else(|| mov::lower(ctx))
        .or_else(|| alu::lower(ctx))
        .or_else(|| branch::lower(ctx))
        .or_else(|| stack::lower(ctx))
        .or_else(|| shift::lower(ctx))
        .or_else(|| bits::lower(ctx))
        .or_else(|| muldiv::lower(ctx))
        .or_else(|| exchange::lower(ctx))
        .or_else(|| string::lower(ctx))
        .or_else(|| decimal::lower(ctx))
        .or_else(|| crate::vcpu::lower(ctx))
}
