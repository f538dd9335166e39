//! Raw: the file is the disk.
//!
//! A file whose size is no multiple of 512 has a last sector that the file holds in part: the rest of it reads as
//! zeroes, and a write to it makes the file longer, as in QEMU.

use crate::storage::FileStorage;
use crate::{
    BlockBackend, Limits, Located, SECTOR_SIZE, SharedSlice, SharedSliceMut, Status, check_range, gather,
    slice_of, slice_of_mut, total, total_mut,
};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

/// A raw image.
pub struct Raw {
    storage: FileStorage,
    size: AtomicU64,
    /// Refuse writes that would make it look like another format.
    guarded: bool,
}

impl Raw {
    /// The disk that `storage` is.
    pub fn new(storage: FileStorage) -> Raw {
        let size = storage.len().next_multiple_of(SECTOR_SIZE);
        Raw { storage, size: AtomicU64::new(size), guarded: false }
    }

    /// As [`new`](Self::new) for a file that only its first bytes say to be raw: writes that would make it look like
    /// another format, to be taken for that at the next start, are refused.
    pub fn guarded(storage: FileStorage) -> Raw {
        Raw { guarded: true, ..Raw::new(storage) }
    }

    /// The data to write, if it may be: checked in a copy, which no guest can change any more.
    fn checked<T>(
        &self,
        bufs: &[SharedSlice<'_>],
        offset: u64,
        write: impl FnOnce(&[SharedSlice<'_>]) -> io::Result<T>,
    ) -> io::Result<T> {
        if !self.guarded || offset >= SECTOR_SIZE {
            return write(bufs);
        }
        let mut head = [0; SECTOR_SIZE as usize];
        let there = self.storage.len().min(SECTOR_SIZE) as usize;
        self.storage.read(&[SharedSliceMut::new(&mut head[..there])], 0)?;
        let n = gather(&slice_of(bufs, 0, SECTOR_SIZE - offset), &mut head[offset as usize..]);
        if super::looks_formatted(&head) {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        let copy = &head[offset as usize..offset as usize + n];
        let mut parts = vec![SharedSlice::new(copy)];
        parts.extend(slice_of(bufs, n as u64, total(bufs) - n as u64));
        write(&parts)
    }

    fn writable(&self) -> io::Result<()> {
        if self.storage.read_only() {
            return Err(io::Error::from_raw_os_error(libc::EROFS));
        }
        Ok(())
    }
}

impl BlockBackend for Raw {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn read_only(&self) -> bool {
        self.storage.read_only()
    }

    fn limits(&self) -> Limits {
        let block = self.storage.sector();
        let physical = self.storage.physical().max(block);
        Limits {
            block_size: block,
            physical_block_size: physical,
            discard_granularity: physical,
            discard: !self.storage.read_only(),
        }
    }

    fn read_at(&self, bufs: &[SharedSliceMut<'_>], offset: u64) -> io::Result<()> {
        let len = total_mut(bufs);
        check_range(self.size(), offset, len)?;
        let in_file = self.storage.len().saturating_sub(offset).min(len);
        if in_file == len {
            return self.storage.read(bufs, offset);
        }
        self.storage.read(&slice_of_mut(bufs, 0, in_file), offset)?;
        slice_of_mut(bufs, in_file, len - in_file).iter().for_each(SharedSliceMut::zero);
        Ok(())
    }

    fn try_read_at(&self, bufs: &[SharedSliceMut<'_>], offset: u64) -> io::Result<bool> {
        let len = total_mut(bufs);
        check_range(self.size(), offset, len)?;
        if self.storage.len().saturating_sub(offset) < len {
            return Ok(false);
        }
        self.storage.try_read(bufs, offset)
    }

    fn locate(&self, write: bool, offset: u64, len: u64, found: &mut Located) -> io::Result<bool> {
        check_range(self.size(), offset, len)?;
        if write && self.guarded && offset < SECTOR_SIZE {
            return Ok(false);
        }
        Ok(self.storage.locate(write, offset, len, found))
    }

    fn writes_are_cached(&self) -> bool {
        !self.storage.is_direct()
    }

    fn write_at(&self, bufs: &[SharedSlice<'_>], offset: u64) -> io::Result<()> {
        self.writable()?;
        check_range(self.size(), offset, total(bufs))?;
        self.checked(bufs, offset, |b| self.storage.write(b, offset))
    }

    fn flush(&self) -> io::Result<()> {
        self.storage.sync()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.writable()?;
        check_range(self.size(), offset, len)?;
        self.storage.discard(offset, self.storage.len().saturating_sub(offset).min(len))
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.writable()?;
        check_range(self.size(), offset, len)?;
        self.storage.write_zeroes(offset, len, unmap)
    }

    fn status(&self, offset: u64, len: u64) -> io::Result<Status> {
        check_range(self.size(), offset, len)?;
        let (n, data) = self.storage.extent(offset, len)?;
        let known = Status {
            len: n,
            zero: !data,
            data,
            compressed: false,
            present: true,
            depth: 0,
            offset: Some(offset),
        };
        Ok(known)
    }

    fn resize(&self, size: u64) -> io::Result<()> {
        self.writable()?;
        if size == 0 || !size.is_multiple_of(SECTOR_SIZE) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // Growing: the file first; shrinking: nobody may look at what goes away.
        let old = self.size();
        self.size.store(size.min(old), Ordering::Release);
        self.storage.resize(size).inspect_err(|_| self.size.store(old, Ordering::Release))?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }
}
