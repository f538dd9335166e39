//! The kernel's io_uring.

use io_uring::{IoUring, Probe, opcode, types};
use std::io;
use std::os::fd::RawFd;
use std::sync::OnceLock;

/// Entries of a ring's submission queue.
const ENTRIES: u32 = 256;

/// Whether this host lets this process use io_uring, for what is needed here. Containers often do not.
pub fn available() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        let Ok(ring) = IoUring::new(4) else { return false };
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe).is_ok()
            && probe.is_supported(opcode::Readv::CODE)
            && probe.is_supported(opcode::Writev::CODE)
    })
}

/// A ring.
pub struct Ring {
    ring: IoUring,
    /// Entries that the kernel has not been told of.
    unsubmitted: usize,
}

impl Ring {
    /// A ring that writes to the event descriptor `wake` at each completion.
    pub fn new(wake: RawFd) -> io::Result<Ring> {
        let ring = IoUring::new(ENTRIES)?;
        ring.submitter().register_eventfd(wake)?;
        Ok(Ring { ring, unsubmitted: 0 })
    }

    /// Move `iovs` from or to `offset` of `fd`. The completion carries `tag`.
    ///
    /// # Errors
    /// The host's; then the request was not taken.
    ///
    /// # Safety
    /// `iovs` and the memory that it names must stay valid, and `fd` open, until the completion with `tag` was seen.
    pub unsafe fn start(
        &mut self,
        write: bool,
        fd: RawFd,
        iovs: &[libc::iovec],
        offset: u64,
        tag: u64,
    ) -> io::Result<()> {
        let (fd, n) = (types::Fd(fd), iovs.len() as u32);
        let entry = if write {
            opcode::Writev::new(fd, iovs.as_ptr(), n).offset(offset).build()
        } else {
            opcode::Readv::new(fd, iovs.as_ptr(), n).offset(offset).build()
        };
        let entry = entry.user_data(tag);
        // SAFETY: by this function's own contract.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.submit()?;
            // SAFETY: as above.
            unsafe { self.ring.submission().push(&entry) }.map_err(io::Error::other)?;
        }
        self.unsubmitted += 1;
        Ok(())
    }

    /// Tell the kernel of all that was started.
    ///
    /// # Errors
    /// The host's; what was started may be told again.
    pub fn submit(&mut self) -> io::Result<()> {
        while self.unsubmitted > 0 {
            match self.ring.submit() {
                Ok(n) => self.unsubmitted -= n.min(self.unsubmitted),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Wait for a completion, after [`submit`](Self::submit).
    ///
    /// # Errors
    /// The host's.
    pub fn wait(&mut self) -> io::Result<()> {
        loop {
            match self.ring.submit_and_wait(1) {
                Ok(n) => {
                    self.unsubmitted -= n.min(self.unsubmitted);
                    return Ok(());
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// The next completion: its tag, and bytes moved or an error number below zero.
    pub fn next(&mut self) -> Option<(u64, i32)> {
        self.ring.completion().next().map(|c| (c.user_data(), c.result()))
    }
}
