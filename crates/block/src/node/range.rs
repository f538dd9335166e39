//! Disks put together from pieces of others, for reading: several in a row, or a part of one.

use crate::{BlockBackend, Limits, SharedSlice, SharedSliceMut, Status};
use std::io;
use std::sync::Arc;

/// Several disks, one behind the other, for reading.
pub struct Concat {
    disks: Vec<(u64, Arc<dyn BlockBackend>)>,
    size: u64,
}

impl Concat {
    /// The disks in order.
    pub fn new(disks: Vec<Arc<dyn BlockBackend>>) -> Concat {
        let mut size = 0u64;
        let mut list = Vec::new();
        for d in disks {
            list.push((size, d.clone()));
            size = u64::saturating_add(size, d.size());
        }
        Concat { disks: list, size }
    }

    /// The disk at `offset` and where it begins.
    fn at(&self, offset: u64) -> io::Result<&(u64, Arc<dyn BlockBackend>)> {
        let i = self.disks.partition_point(|(start, _)| *start <= offset);
        i.checked_sub(1).and_then(|i| self.disks.get(i)).ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}

impl BlockBackend for Concat {
    fn size(&self) -> u64 {
        self.size
    }
    fn read_only(&self) -> bool {
        true
    }
    fn limits(&self) -> Limits {
        Limits { block_size: 512, physical_block_size: 4096, discard_granularity: 4096, discard: false }
    }
    fn read_at(&self, bufs: &[SharedSliceMut<'_>], offset: u64) -> io::Result<()> {
        let len = crate::total_mut(bufs);
        crate::check_range(self.size, offset, len)?;
        let mut done = 0;
        while done < len {
            let (start, disk) = self.at(offset + done)?;
            let here = offset + done - start;
            let n = (disk.size() - here).min(len - done);
            disk.read_at(&crate::slice_of_mut(bufs, done, n), here)?;
            done += n;
        }
        Ok(())
    }
    fn write_at(&self, _: &[SharedSlice<'_>], _: u64) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EROFS))
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EROFS))
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EROFS))
    }
    fn status(&self, offset: u64, len: u64) -> io::Result<Status> {
        crate::check_range(self.size, offset, len)?;
        let (start, disk) = self.at(offset)?;
        let here = offset - start;
        disk.status(here, len.min(disk.size() - here))
    }
}

/// A piece of a disk, for reading.
pub struct Window {
    disk: Arc<dyn BlockBackend>,
    start: u64,
    len: u64,
}

impl Window {
    /// The `len` bytes of `disk` from `start` on, as far as they exist.
    pub fn new(disk: Arc<dyn BlockBackend>, start: u64, len: u64) -> Window {
        let start = start.min(disk.size());
        let len = len.min(disk.size() - start);
        Window { disk, start, len }
    }
}

impl BlockBackend for Window {
    fn size(&self) -> u64 {
        self.len
    }
    fn read_only(&self) -> bool {
        true
    }
    fn limits(&self) -> Limits {
        self.disk.limits()
    }
    fn read_at(&self, bufs: &[SharedSliceMut<'_>], offset: u64) -> io::Result<()> {
        crate::check_range(self.len, offset, crate::total_mut(bufs))?;
        self.disk.read_at(bufs, self.start + offset)
    }
    fn write_at(&self, _: &[SharedSlice<'_>], _: u64) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EROFS))
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EROFS))
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EROFS))
    }
    fn status(&self, offset: u64, len: u64) -> io::Result<Status> {
        crate::check_range(self.len, offset, len)?;
        self.disk.status(self.start + offset, len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::tests::TempDir;

    fn disk(name: &str, fill: u8) -> Arc<dyn BlockBackend> {
        let dir = TempDir::new();
        let path = dir.file(name, &[fill; 8192]);
        crate::open_image(&path, &crate::ImageOptions::default()).expect("opens")
    }

    #[test]
    fn disks_stand_one_behind_the_other() {
        let c = Concat::new(vec![disk("concat-a", 1), disk("concat-b", 2)]);
        assert_eq!(c.size(), 16384);
        let mut b = vec![0; 4096];
        c.read_at(&[SharedSliceMut::new(&mut b)], 8192 - 100).expect("reads");
        assert!(b[..100].iter().all(|x| *x == 1) && b[100..].iter().all(|x| *x == 2));
        assert!(c.read_at(&[SharedSliceMut::new(&mut b)], 16384 - 100).is_err());
        assert_eq!(c.status(8000, 5000).expect("known").len, 192);
    }
}
