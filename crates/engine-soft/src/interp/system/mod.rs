//! System instructions: control and debug registers, MSRs, segments, far transfers, interrupts, ports.

mod branch;
mod control;
mod io;
mod segment;

use crate::decode::{Ctx, Handler};

pub(super) fn lower(ctx: &mut Ctx<'_>) -> Option<Handler> {
    segment::lower(ctx)
        .or_else(|| branch::lower(ctx))
        .or_else(|| io::lower(ctx))
        .or_else(|| control::lower(ctx))
}
