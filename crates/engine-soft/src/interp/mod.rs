//! Handlers of the integer and system instructions.
//!
//! Each module has a `lower` function that picks a handler for the instructions it knows. A handler is a plain function
//! `fn(&mut Cpu, &Op) -> Exec`; families over operand kinds and widths are generic functions.

mod alu;

use crate::decode::{Ctx, Handler};

/// The handler for an integer or system instruction.
pub fn lower(ctx: &mut Ctx<'_>) -> Option<Handler> {
    alu::lower(ctx)
}
