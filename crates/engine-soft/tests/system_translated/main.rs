//! The guests of `tests/system`, their 64-bit code translated at its first execution.

/// See `tests/system`.
const TRANSLATED: bool = true;

#[path = "../system/code.rs"]
mod code;
#[path = "../system/control.rs"]
mod control;
#[path = "../system/debug.rs"]
mod debug;
#[path = "../system/debugger.rs"]
mod debugger;
#[path = "../system/delivery.rs"]
mod delivery;
#[path = "../system/hostile.rs"]
mod hostile;
#[path = "../system/modes.rs"]
mod modes;
#[path = "../system/paging.rs"]
mod paging;
#[path = "../system/recall.rs"]
mod recall;
#[path = "../system/support.rs"]
mod support;
#[path = "../system/tasks.rs"]
mod tasks;
#[path = "../system/transfer.rs"]
mod transfer;
#[path = "../system/v86.rs"]
mod v86;
