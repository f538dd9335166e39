//! Doorbells connected to the I/O threads' event descriptors, where the engine's host can ring those (ioeventfd): then a store to one
//! does not bring the vCPU out to the device.

use super::VirtioPci;
use crate::Core;
use ringfort_bus::{DoorbellSink, lock};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex};
use vmm_sys_util::eventfd::EventFd;

struct Bell {
    address: u64,
    fd: Arc<EventFd>,
}

impl Bell {
    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as `self.fd` holds it, and that is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.fd.as_raw_fd()) }
    }
}

#[derive(Default)]
struct State {
    /// Where the BAR with the doorbells is.
    base: Option<u64>,
    /// What is connected, and for which queues that was tried.
    bells: Vec<Bell>,
    tried: Option<(u64, Vec<u16>)>,
}

/// A function's doorbells.
pub struct Bells {
    sink: Arc<dyn DoorbellSink>,
    state: Mutex<State>,
}

impl Bells {
    pub fn new(sink: Arc<dyn DoorbellSink>) -> Bells {
        Bells { sink, state: Mutex::default() }
    }

    /// The BAR has moved.
    pub fn moved(&self, base: Option<u64>, core: &Core) {
        let mut s = lock(&self.state);
        s.base = base;
        self.update(&mut s, core);
    }

    /// Queues have begun or ended to be served.
    pub fn follow(&self, core: &Core) {
        self.update(&mut lock(&self.state), core);
    }

    /// Have those of the queues that are served connected, where the BAR is now: connecting is slow, and drivers move BARs about before
    /// they start.
    fn update(&self, s: &mut State, core: &Core) {
        let wanted = core.device().by_thread();
        let want = s.base.filter(|_| wanted).map(|base| (base, core.served_queues()));
        let want = want.filter(|(_, queues)| !queues.is_empty());
        if s.tried == want {
            return;
        }
        for bell in s.bells.drain(..) {
            self.sink.disconnect(bell.address, bell.fd());
        }
        for &queue in want.iter().flat_map(|(_, queues)| queues) {
            let (_, offset) = VirtioPci::doorbell(queue);
            let (Some(base), Some(fd)) = (s.base, core.kick_fd(queue)) else { continue };
            let bell = Bell { address: base + offset, fd };
            if self.sink.connect(bell.address, bell.fd()) {
                s.bells.push(bell);
            }
        }
        s.tried = want;
    }
}

impl Drop for Bells {
    fn drop(&mut self) {
        for bell in lock(&self.state).bells.drain(..) {
            self.sink.disconnect(bell.address, bell.fd());
        }
    }
}
