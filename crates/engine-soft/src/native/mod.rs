//! SIMD and x87 instructions, executed by the host's own CPU.

use crate::decode::{Ctx, Handler};

/// The handler for a SIMD, x87 or MMX instruction.
pub fn lower(_ctx: &mut Ctx<'_>) -> Option<Handler> {
    None
}
