//! A place in the graph where what lies below can be exchanged while requests come from above: where a job puts its
//! filter in, or moves a disk to another image.

use crate::gate::Gate;
use crate::{BlockBackend, Limits, Located, SharedSlice, SharedSliceMut, Status};
use std::io;
use std::sync::{Arc, PoisonError, RwLock};

/// The joint.
pub struct Joint {
    below: RwLock<Arc<dyn BlockBackend>>,
    /// Held by every request for as long as it uses what is below.
    gate: Gate,
}

impl Joint {
    /// A joint on `below`.
    pub fn new(below: Arc<dyn BlockBackend>) -> Joint {
        Joint { below: RwLock::new(below), gate: Gate::default() }
    }

    /// What is below now.
    pub fn below(&self) -> Arc<dyn BlockBackend> {
        self.below.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Once no request is under way, put what `make` makes of the disk below in its place; requests that come meanwhile
    /// wait. Gives the disk that was below.
    ///
    /// # Errors
    /// `make`'s; then nothing has changed. [`io::ErrorKind::InvalidInput`] if the new disk is of another size.
    pub fn exchange(
        &self,
        make: impl FnOnce(&Arc<dyn BlockBackend>) -> io::Result<Arc<dyn BlockBackend>>,
    ) -> io::Result<Arc<dyn BlockBackend>> {
        let _alone = self.gate.alone();
        let old = self.below();
        let new = make(&old)?;
        if new.size() != old.size() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the new disk is of another size"));
        }
        *self.below.write().unwrap_or_else(PoisonError::into_inner) = new;
        Ok(old)
    }
}

impl BlockBackend for Joint {
    fn size(&self) -> u64 {
        self.below().size()
    }
    fn read_only(&self) -> bool {
        self.below().read_only()
    }
    fn limits(&self) -> Limits {
        self.below().limits()
    }
    fn read_at(&self, bufs: &[SharedSliceMut<'_>], offset: u64) -> io::Result<()> {
        let _shared = self.gate.share();
        self.below().read_at(bufs, offset)
    }
    fn try_read_at(&self, bufs: &[SharedSliceMut<'_>], offset: u64) -> io::Result<bool> {
        let Some(_shared) = self.gate.try_share() else { return Ok(false) };
        self.below().try_read_at(bufs, offset)
    }
    fn locate(&self, write: bool, offset: u64, len: u64, found: &mut Located) -> io::Result<bool> {
        let Some(shared) = self.gate.try_share() else { return Ok(false) };
        found.hold(shared);
        self.below().locate(write, offset, len, found)
    }
    fn writes_are_cached(&self) -> bool {
        self.below().writes_are_cached()
    }
    fn write_at(&self, bufs: &[SharedSlice<'_>], offset: u64) -> io::Result<()> {
        let _shared = self.gate.share();
        self.below().write_at(bufs, offset)
    }
    fn flush(&self) -> io::Result<()> {
        let _shared = self.gate.share();
        self.below().flush()
    }
    fn flush_is_quick(&self) -> bool {
        self.below().flush_is_quick()
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let _shared = self.gate.share();
        self.below().discard(offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let _shared = self.gate.share();
        self.below().write_zeroes(offset, len, unmap)
    }
    fn status(&self, offset: u64, len: u64) -> io::Result<Status> {
        let _shared = self.gate.share();
        self.below().status(offset, len)
    }
    fn come_to_rest(&self) -> io::Result<()> {
        self.below().come_to_rest()
    }
    fn resize(&self, size: u64) -> io::Result<()> {
        let _shared = self.gate.share();
        self.below().resize(size)
    }
}
