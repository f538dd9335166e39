//! A node that fails on demand: what tests put under a device or a format, as QEMU's blkdebug.

use crate::{BlockBackend, Limits, SharedSlice, SharedSliceMut, Status};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Which calls fail, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Reads fail.
    pub read: bool,
    /// Writes, zeroes and discards fail.
    pub write: bool,
    /// Flushes fail.
    pub flush: bool,
    /// With this error number.
    pub errno: i32,
    /// After as many calls of the kind have succeeded.
    pub after: u64,
    /// How often; then all is well again.
    pub times: u64,
}

impl Fault {
    /// All writes fail for want of space until further notice.
    pub fn no_space() -> Fault {
        Fault { read: false, write: true, flush: false, errno: libc::ENOSPC, after: 0, times: u64::MAX }
    }
}

/// A disk with faults.
pub struct Faulty {
    below: Arc<dyn BlockBackend>,
    fault: Mutex<Option<Fault>>,
}

impl Faulty {
    /// `below`, without faults for now.
    pub fn new(below: Arc<dyn BlockBackend>) -> Faulty {
        Faulty { below, fault: Mutex::new(None) }
    }

    fn fault(&self) -> MutexGuard<'_, Option<Fault>> {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fail from now on as `fault` says, or not at all.
    pub fn set(&self, fault: Option<Fault>) {
        *self.fault() = fault;
    }

    fn check(&self, concerns: impl Fn(&Fault) -> bool) -> io::Result<()> {
        let mut guard = self.fault();
        let Some(f) = guard.as_mut().filter(|f| concerns(f)) else { return Ok(()) };
        if f.after > 0 {
            f.after -= 1;
            return Ok(());
        }
        if f.times == 0 {
            return Ok(());
        }
        f.times -= 1;
        Err(io::Error::from_raw_os_error(f.errno))
    }
}

impl BlockBackend for Faulty {
    fn size(&self) -> u64 {
        self.below.size()
    }
    fn read_only(&self) -> bool {
        self.below.read_only()
    }
    fn limits(&self) -> Limits {
        self.below.limits()
    }
    fn read_at(&self, bufs: &[SharedSliceMut<'_>], offset: u64) -> io::Result<()> {
        self.check(|f| f.read)?;
        self.below.read_at(bufs, offset)
    }
    fn writes_are_cached(&self) -> bool {
        self.below.writes_are_cached()
    }
    fn write_at(&self, bufs: &[SharedSlice<'_>], offset: u64) -> io::Result<()> {
        self.check(|f| f.write)?;
        self.below.write_at(bufs, offset)
    }
    fn flush(&self) -> io::Result<()> {
        self.check(|f| f.flush)?;
        self.below.flush()
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check(|f| f.write)?;
        self.below.discard(offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.check(|f| f.write)?;
        self.below.write_zeroes(offset, len, unmap)
    }
    fn status(&self, offset: u64, len: u64) -> io::Result<Status> {
        self.below.status(offset, len)
    }
    fn come_to_rest(&self) -> io::Result<()> {
        self.below.come_to_rest()
    }
    fn resize(&self, size: u64) -> io::Result<()> {
        self.check(|f| f.write)?;
        self.below.resize(size)
    }
}
