//! Small bare-metal guests that exercise what the architecture does beside arithmetic: modes, paging, exceptions, privilege, tasks.

mod control;
mod debug;
mod delivery;
mod hostile;
mod modes;
mod paging;
mod support;
mod tasks;
mod transfer;
mod v86;
