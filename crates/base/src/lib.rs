//! What every Ringfort process needs of the host.

pub mod pty;
