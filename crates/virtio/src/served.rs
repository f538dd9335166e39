//! Queues that somebody else serves: the host's kernel (vhost), or another process (vhost-user).
//!
//! The transport hands them over when the driver is ready and takes them back when the machine pauses; their progress is then known again, so
//! that a saved machine does not tell who served them.

use std::io;
use vmm_sys_util::eventfd::EventFd;

/// A queue that is handed over.
#[derive(Debug, Clone, Copy)]
pub struct ServedQueue<'a> {
    /// Its number in the device.
    pub index: u16,
    /// Entries.
    pub size: u16,
    /// Descriptor table, guest physical; the rings were checked to lie in RAM.
    pub desc: u64,
    /// Available ring, guest physical.
    pub avail: u64,
    /// Used ring, guest physical.
    pub used: u64,
    /// Next entry of the available ring.
    pub next_avail: u16,
    /// Written when the driver rings.
    pub kick: &'a EventFd,
    /// To be written when the driver is to be interrupted.
    pub call: &'a EventFd,
}

/// Who serves queues instead of the device.
pub trait QueueServer: Send + Sync {
    /// Begin to serve these queues, with the features that the driver took.
    ///
    /// # Errors
    /// The host's; none of them is served then, and the device does it.
    fn start(&self, features: u64, queues: &[ServedQueue<'_>]) -> io::Result<()>;

    /// Serve none any more; gives the next entry of the available ring for each that was served. Guest memory is not touched from then on.
    fn stop(&self) -> Vec<(u16, u16)>;

    /// A network card's cable was plugged in or pulled: without it nothing passes.
    fn set_link(&self, up: bool) {
        let _ = up;
    }
}
