//! Small bare-metal guests that exercise what the architecture does beside arithmetic: modes, paging, exceptions, privilege, tasks.

/// Whether 64-bit code is translated at its first execution; `tests/system_translated` is this with true.
const TRANSLATED: bool = false;

mod code;
mod control;
mod debug;
mod debugger;
mod delivery;
mod hostile;
mod modes;
mod paging;
mod recall;
mod support;
mod tasks;
mod transfer;
mod v86;
