//! A throw-away layer of changes.
//!
//! Reads come from the disk below until a block is written; writes go to a temporary file without a name, which the
//! host removes when the process ends, however it ends. A bitmap says which 4 KiB blocks the file holds. 4 KiB is
//! what guests' file systems write, so that filling up a block from below is the exception.

#[cfg(test)]
mod tests;

use crate::storage::FileStorage;
use crate::{
    BlockBackend, BlockError, Limits, Located, SharedSlice, SharedSliceMut, check_range, gather, slice_of,
    slice_of_mut, total, total_mut,
};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::FromRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

/// The unit of the bitmap, in bytes.
const BLOCK: u64 = 4096;

/// Words in a leaf of the bitmap: one leaf stands for 128 MiB of disk.
const LEAF: usize = 512;

/// Bits, of which whole leaves are made when the first of theirs is set: huge sparse disks cost little.
struct Bitmap {
    leaves: Vec<OnceLock<Box<[AtomicU64]>>>,
}

impl Bitmap {
    fn new(bits: u64) -> Bitmap {
        let leaves = bits.div_ceil(LEAF as u64 * 64);
        Bitmap { leaves: (0..leaves).map(|_| OnceLock::new()).collect() }
    }

    /// Leaf, word in it, mask in that.
    fn place(bit: u64) -> (usize, usize, u64) {
        let word = (bit / 64) as usize;
        (word / LEAF, word % LEAF, 1 << (bit % 64))
    }

    fn get(&self, bit: u64) -> bool {
        let (leaf, word, mask) = Bitmap::place(bit);
        self.leaves[leaf].get().is_some_and(|l| l[word].load(Ordering::Acquire) & mask != 0)
    }

    fn set(&self, bit: u64) {
        let (leaf, word, mask) = Bitmap::place(bit);
        let make = || (0..LEAF).map(|_| AtomicU64::new(0)).collect();
        self.leaves[leaf].get_or_init(make)[word].fetch_or(mask, Ordering::Release);
    }

    /// The first bit that is set at or after `from`.
    fn next_set(&self, from: u64) -> Option<u64> {
        let (mut leaf, mut word, mask) = Bitmap::place(from);
        let mut wanted = !(mask - 1);
        while leaf < self.leaves.len() {
            if let Some(words) = self.leaves[leaf].get() {
                for (n, w) in words.iter().enumerate().skip(word) {
                    let bits = w.load(Ordering::Acquire) & wanted;
                    if bits != 0 {
                        return Some(((leaf * LEAF + n) * 64) as u64 + u64::from(bits.trailing_zeros()));
                    }
                    wanted = !0;
                }
            }
            (leaf, word, wanted) = (leaf + 1, 0, !0);
        }
        None
    }

    fn count(&self) -> u64 {
        let words = self.leaves.iter().filter_map(OnceLock::get).flatten();
        words.map(|w| u64::from(w.load(Ordering::Relaxed).count_ones())).sum()
    }
}

/// A disk whose changes last as long as this value.
pub struct Overlay {
    base: Arc<dyn BlockBackend>,
    top: FileStorage,
    size: u64,
    /// One bit per block: the temporary file holds it. A bit is set once, after its data is there.
    held: Bitmap,
    /// Writes share it; whoever fills a block up from below or gives blocks back is alone.
    order: RwLock<()>,
}

impl Overlay {
    /// Where temporary files of disks belong: `$TMPDIR`, else `/var/tmp`, which unlike `/tmp` is seldom in memory.
    pub fn default_dir() -> PathBuf {
        let named = std::env::var_os("TMPDIR").filter(|d| !d.is_empty()).map(PathBuf::from);
        let usual = ["/var/tmp", "/tmp"].map(PathBuf::from).into_iter().find(|d| d.is_dir());
        named.or(usual).unwrap_or_else(std::env::temp_dir)
    }

    /// A layer on `base`, with its temporary file in `dir`.
    ///
    /// # Errors
    /// [`BlockError::Overlay`].
    pub fn new(base: Arc<dyn BlockBackend>, dir: &Path) -> Result<Overlay, BlockError> {
        let size = base.size();
        let fail = |source| BlockError::Overlay { dir: dir.into(), source };
        let file = unnamed_file(dir).map_err(fail)?;
        file.set_len(size.next_multiple_of(BLOCK)).map_err(fail)?;
        Ok(Overlay {
            base,
            top: FileStorage::anonymous(file, PathBuf::from(dir), size.next_multiple_of(BLOCK)),
            size,
            held: Bitmap::new(size.div_ceil(BLOCK)),
            order: RwLock::new(()),
        })
    }

    fn holds(&self, block: u64) -> bool {
        self.held.get(block)
    }

    fn mark(&self, block: u64) {
        self.held.set(block);
    }

    /// Bytes that the layer holds.
    pub fn held_bytes(&self) -> u64 {
        self.held.count() * BLOCK
    }

    /// The next run that the layer holds at or after `from`: offset and length. To be called while nobody writes.
    pub fn next_held(&self, from: u64) -> Option<(u64, u64)> {
        let first = self.held.next_set(from.div_ceil(BLOCK))?;
        let mut end = first + 1;
        while end * BLOCK < self.size && self.holds(end) {
            end += 1;
        }
        let start = first * BLOCK;
        (start < self.size).then(|| (start, (end * BLOCK).min(self.size) - start))
    }

    /// Cut a range into runs that lie in one file: (offset, length, held).
    fn runs(&self, offset: u64, len: u64) -> impl Iterator<Item = (u64, u64, bool)> {
        let (mut at, end) = (offset, offset + len);
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let (start, held) = (at, self.holds(at / BLOCK));
            while at < end && self.holds(at / BLOCK) == held {
                at = ((at / BLOCK + 1) * BLOCK).min(end);
            }
            Some((start, at - start, held))
        })
    }

    /// Bring a block up from below and put `change` into it. The caller is alone.
    fn fill_up(&self, block: u64, change: impl FnOnce(&mut [u8])) -> io::Result<()> {
        let start = block * BLOCK;
        let mut data = [0u8; BLOCK as usize];
        let n = BLOCK.min(self.size - start) as usize;
        self.base.read_at(&[SharedSliceMut::new(&mut data[..n])], start)?;
        change(&mut data);
        self.top.write(&[SharedSlice::new(&data)], start)?;
        self.mark(block);
        Ok(())
    }

    /// The blocks that a range covers from end to end (the disk's end counts as one), as a range of numbers.
    fn whole_blocks(&self, offset: u64, len: u64) -> std::ops::Range<u64> {
        let end = offset + len;
        let last = if end == self.size { end.div_ceil(BLOCK) } else { end / BLOCK };
        let first = offset.div_ceil(BLOCK);
        first..last.max(first)
    }
}

/// A file that no directory names. Where the file system cannot make one so, it is made and removed at once; and
/// where the directory is not to be written, it lies in memory.
fn unnamed_file(dir: &Path) -> io::Result<File> {
    let open = |flags: i32, path: &Path, new: bool| {
        OpenOptions::new().read(true).write(true).create_new(new).mode(0o600).custom_flags(flags).open(path)
    };
    match open(libc::O_TMPFILE, dir, false) {
        Ok(f) => return Ok(f),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::ENOENT)) => {}
        Err(e) if e.raw_os_error() == Some(libc::EROFS) => return memory_file(),
        Err(e) => return Err(e),
    }
    for attempt in 0..16u32 {
        let path = dir.join(format!(".ringfort-overlay-{}-{attempt}", std::process::id()));
        match open(libc::O_NOFOLLOW, &path, true) {
            Ok(f) => {
                std::fs::remove_file(&path)?;
                return Ok(f);
            }
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

fn memory_file() -> io::Result<File> {
    // SAFETY: a constant name; the call makes a descriptor or fails.
    let fd = unsafe { libc::memfd_create(c"ringfort-overlay".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { File::from_raw_fd(fd) })
}

impl BlockBackend for Overlay {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        false
    }

    fn limits(&self) -> Limits {
        Limits {
            physical_block_size: BLOCK as u32,
            discard_granularity: BLOCK as u32,
            discard: true,
            block_size: self.base.limits().block_size.min(BLOCK as u32),
        }
    }

    fn read_at(&self, bufs: &[SharedSliceMut<'_>], offset: u64) -> io::Result<()> {
        let len = total_mut(bufs);
        check_range(self.size, offset, len)?;
        for (at, n, held) in self.runs(offset, len) {
            let part;
            let target = if n == len {
                bufs
            } else {
                part = slice_of_mut(bufs, at - offset, n);
                &part
            };
            if held { self.top.read(target, at)? } else { self.base.read_at(target, at)? }
        }
        Ok(())
    }

    fn try_read_at(&self, bufs: &[SharedSliceMut<'_>], offset: u64) -> io::Result<bool> {
        let len = total_mut(bufs);
        check_range(self.size, offset, len)?;
        for (at, n, held) in self.runs(offset, len) {
            let part;
            let target = if n == len {
                bufs
            } else {
                part = slice_of_mut(bufs, at - offset, n);
                &part
            };
            if !(if held { self.top.try_read(target, at)? } else { self.base.try_read_at(target, at)? }) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Reads only: what is written has to be entered in the bitmap afterwards.
    fn locate(&self, write: bool, offset: u64, len: u64, found: &mut Located) -> io::Result<bool> {
        check_range(self.size, offset, len)?;
        if write {
            return Ok(false);
        }
        for (at, n, held) in self.runs(offset, len) {
            let there = if held {
                self.top.locate(false, at, n, found)
            } else {
                self.base.locate(false, at, n, found)?
            };
            if !there {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn writes_are_cached(&self) -> bool {
        true
    }

    fn write_at(&self, bufs: &[SharedSlice<'_>], offset: u64) -> io::Result<()> {
        let len = total(bufs);
        check_range(self.size, offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let whole = self.whole_blocks(offset, len);
        let blocks = offset / BLOCK..(offset + len).div_ceil(BLOCK);
        // At most the first and the last block are covered in part.
        let edges = [blocks.start, blocks.end - 1];
        let missing = |b: u64| !whole.contains(&b) && !self.holds(b);
        if edges.iter().any(|&b| missing(b)) {
            let _alone = self.order.write().unwrap_or_else(PoisonError::into_inner);
            for b in edges {
                if missing(b) {
                    let start = (b * BLOCK).max(offset);
                    let end = ((b + 1) * BLOCK).min(offset + len);
                    let part = slice_of(bufs, start - offset, end - start);
                    self.fill_up(b, |data| {
                        gather(&part, &mut data[(start - b * BLOCK) as usize..]);
                    })?;
                }
            }
        }
        let _shared = self.order.read().unwrap_or_else(PoisonError::into_inner);
        self.top.write(bufs, offset)?;
        whole.for_each(|b| self.mark(b));
        Ok(())
    }

    /// Nothing of an overlay outlives the process, so there is nothing to make durable.
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn flush_is_quick(&self) -> bool {
        true
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        check_range(self.size, offset, len)?;
        let whole = self.whole_blocks(offset, len);
        if whole.is_empty() {
            return Ok(());
        }
        // The blocks then read as zeroes, not as the data below: nobody may see that again.
        let _alone = self.order.write().unwrap_or_else(PoisonError::into_inner);
        let start = whole.start * BLOCK;
        self.top.write_zeroes(start, whole.end * BLOCK - start, true)?;
        whole.for_each(|b| self.mark(b));
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> io::Result<()> {
        check_range(self.size, offset, len)?;
        let whole = self.whole_blocks(offset, len);
        let _alone = self.order.write().unwrap_or_else(PoisonError::into_inner);
        for b in offset / BLOCK..(offset + len).div_ceil(BLOCK) {
            if whole.contains(&b) {
                continue;
            }
            let start = (b * BLOCK).max(offset);
            let end = ((b + 1) * BLOCK).min(offset + len);
            if self.holds(b) {
                self.top.write_zeroes(start, end - start, false)?;
            } else {
                let from = (start - b * BLOCK) as usize;
                self.fill_up(b, |data| data[from..from + (end - start) as usize].fill(0))?;
            }
        }
        if !whole.is_empty() {
            let start = whole.start * BLOCK;
            self.top.write_zeroes(start, whole.end * BLOCK - start, true)?;
            whole.for_each(|b| self.mark(b));
        }
        Ok(())
    }
}
