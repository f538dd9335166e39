//! A thread that waits for descriptors and tells of each change once (edge-triggered).

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The waking descriptor among the events.
const WAKE: u64 = u64::MAX;
/// Events taken at a time.
const EVENTS: usize = 64;

/// What happened on a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ready {
    /// There is something to read, or an error or end to be found by reading.
    pub readable: bool,
    /// There is room to write, or an error to be found by writing.
    pub writable: bool,
}

/// The thread; ends when dropped.
pub struct Poller {
    epoll: Arc<Epoll>,
    fds: Vec<RawFd>,
    interest: EventSet,
    wake: EventFd,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Poller {
    /// Watch `fds` for `interest`, as long as the poller is there, for which they must stay open; `tell` gets the number of the one and
    /// what happened.
    ///
    /// # Errors
    /// The host's.
    pub fn start(
        name: &str,
        fds: &[RawFd],
        interest: EventSet,
        tell: impl Fn(usize, Ready) + Send + 'static,
    ) -> io::Result<Poller> {
        let epoll = Arc::new(Epoll::new()?);
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        epoll.ctl(ControlOperation::Add, wake.as_raw_fd(), EpollEvent::new(EventSet::IN, WAKE))?;
        let interest = interest | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        for (n, &fd) in fds.iter().enumerate() {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(interest, n as u64))?;
        }
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, of_thread) = (stop.clone(), epoll.clone());
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || {
            let mut events = vec![EpollEvent::default(); EVENTS];
            loop {
                let n = match of_thread.wait(-1, &mut events) {
                    Ok(n) => n,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                    // Cannot happen to an open epoll descriptor.
                    Err(_) => return,
                };
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                for e in events[..n].iter().filter(|e| e.data() != WAKE) {
                    let set = e.event_set();
                    let broken = set.intersects(EventSet::ERROR | EventSet::HANG_UP | EventSet::READ_HANG_UP);
                    let ready = Ready {
                        readable: broken || set.contains(EventSet::IN),
                        writable: broken || set.contains(EventSet::OUT),
                    };
                    tell(e.data() as usize, ready);
                }
            }
        })?;
        Ok(Poller { epoll, fds: fds.to_vec(), interest, wake, stop, thread: Some(thread) })
    }

    /// Tell nothing for a while, or go on; what is the case then is told.
    pub fn set_resting(&self, resting: bool) {
        let interest = if resting { EventSet::empty() } else { self.interest };
        for (n, &fd) in self.fds.iter().enumerate() {
            // Descriptors that are watched can be watched otherwise.
            let _ = self.epoll.ctl(ControlOperation::Modify, fd, EpollEvent::new(interest, n as u64));
        }
    }
}

impl Drop for Poller {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = self.wake.write(1);
        if let Some(t) = self.thread.take() {
            let _ = t.join();
        }
    }
}
