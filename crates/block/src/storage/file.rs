//! Files and block devices.

use super::direct::Direct;
#[cfg(test)]
use super::hook::{Change, Hook};
use super::lock::{self, Access, LockError, Locked};
use crate::{
    BlockError, Located, SECTOR_SIZE, SharedSlice, SharedSliceMut, check_range, slice_of, total, total_mut,
};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Most buffers in one system call (IOV_MAX on Linux).
const IOV_MAX: usize = 1024;
/// Bytes from which on a write takes long enough to wait for another one.
const LONG: u64 = 128 << 10;
/// Most bytes of one write to the page cache. A file system takes memory for a write in folios as large as it is. Pieces
/// of 2 MiB are what the host has least of, and what a host that is a guest itself has given back to its own.
const CACHED: u64 = 256 << 10;
/// Bytes of zeroes written at a time where the host has no better way.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

// Block device requests (linux/fs.h).
const BLKSSZGET: libc::c_ulong = 0x1268;
const BLKPBSZGET: libc::c_ulong = 0x127b;
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
const BLKROGET: libc::c_ulong = 0x125e;

/// How to open a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StorageOptions {
    /// Never write.
    pub read_only: bool,
    /// Bypass the host's page cache (O_DIRECT).
    pub direct: bool,
    /// Take QEMU's locks.
    pub lock: bool,
}

/// A file or block device.
pub struct FileStorage {
    file: Locked,
    path: PathBuf,
    len: AtomicU64,
    block_device: bool,
    read_only: bool,
    sector: u32,
    physical: u32,
    direct: Option<Direct>,
    /// Whether [`sync`](Self::sync) does anything.
    syncs: bool,
    /// Whether the file system answers "not in the page cache" (RWF_NOWAIT).
    nowait: AtomicBool,
    /// Whether it can punch holes, and zero ranges.
    punch: AtomicBool,
    zero_range: AtomicBool,
    #[cfg(test)]
    hook: Option<Hook>,
    /// Long writes to a file go one after the other, see [`write`](Self::write).
    turn: Mutex<()>,
}

impl FileStorage {
    /// Open `path`.
    ///
    /// # Errors
    /// [`BlockError`] says what is wrong with the file.
    pub fn open(path: &Path, options: StorageOptions) -> Result<FileStorage, BlockError> {
        let storage = FileStorage::open_any_size(path, options)?;
        if storage.is_empty() {
            return Err(BlockError::Empty(path.into()));
        }
        Ok(storage)
    }

    /// As [`open`](Self::open), for files that may be empty: new ones, and data files.
    ///
    /// # Errors
    /// [`BlockError`] says what is wrong with the file.
    pub fn open_any_size(path: &Path, options: StorageOptions) -> Result<FileStorage, BlockError> {
        // Look first: opening a FIFO would wait, and a directory gives a worse message.
        let meta = std::fs::metadata(path).map_err(|e| open_error(path, options, e))?;
        let kind = meta.file_type();
        if kind.is_dir() {
            return Err(BlockError::Directory(path.into()));
        }
        if !kind.is_file() && !kind.is_block_device() {
            return Err(BlockError::NotAnImage(path.into()));
        }
        let flags = libc::O_NONBLOCK | if options.direct { libc::O_DIRECT } else { 0 };
        let file = OpenOptions::new()
            .read(true)
            .write(!options.read_only)
            .custom_flags(flags)
            .open(path)
            .map_err(|e| open_error(path, options, e))?;
        if options.lock {
            let access = if options.read_only { Access::READ } else { Access::WRITE };
            match lock::acquire(&file, access) {
                Ok(()) => {}
                Err(LockError::Conflict(conflict)) => {
                    return Err(BlockError::InUse {
                        path: path.into(),
                        conflict,
                        writing: !options.read_only,
                    });
                }
                // A file system without locks (some network mounts): as QEMU's locking=auto, go on without.
                Err(LockError::Io(e))
                    if matches!(
                        e.raw_os_error(),
                        Some(libc::EINVAL | libc::ENOLCK | libc::ENOSYS | libc::EOPNOTSUPP)
                    ) => {}
                Err(LockError::Io(e)) => return Err(BlockError::host(path, "cannot lock", e)),
            }
        }
        // The name may mean another file by now; what was opened counts.
        let meta = file.metadata().map_err(|e| BlockError::host(path, "cannot examine", e))?;
        let block_device = meta.file_type().is_block_device();
        if !block_device && !meta.is_file() {
            return Err(BlockError::NotAnImage(path.into()));
        }
        let (len, sector, physical) = if block_device {
            block_device_facts(&file, options.read_only).map_err(|e| match e.kind() {
                io::ErrorKind::PermissionDenied => {
                    BlockError::Permission { path: path.into(), writing: !options.read_only }
                }
                _ => BlockError::host(path, "cannot examine the block device", e),
            })?
        } else {
            (meta.len(), SECTOR_SIZE as u32, (meta.blksize() as u32).clamp(512, 4096))
        };
        let physical = if physical.is_power_of_two() { physical } else { 4096 };
        let direct = options.direct.then(|| {
            Direct::new(if block_device { u64::from(sector) } else { file_direct_alignment(&file) })
        });
        Ok(FileStorage {
            file: Locked(file),
            path: path.into(),
            len: AtomicU64::new(len),
            block_device,
            read_only: options.read_only,
            sector,
            physical,
            nowait: AtomicBool::new(direct.is_none()),
            direct,
            syncs: true,
            punch: AtomicBool::new(true),
            zero_range: AtomicBool::new(true),
            #[cfg(test)]
            hook: None,
            turn: Mutex::new(()),
        })
    }

    /// An open, unnamed file of the process's own, of `len` bytes.
    pub(crate) fn anonymous(file: File, path: PathBuf, len: u64) -> FileStorage {
        FileStorage {
            file: Locked(file),
            path,
            len: AtomicU64::new(len),
            block_device: false,
            read_only: false,
            sector: SECTOR_SIZE as u32,
            physical: 4096,
            direct: None,
            syncs: true,
            nowait: AtomicBool::new(true),
            punch: AtomicBool::new(true),
            zero_range: AtomicBool::new(true),
            #[cfg(test)]
            hook: None,
            turn: Mutex::new(()),
        }
    }

    /// The same file, whose writes are left to the host's page cache even when they are to be made durable: for work
    /// that is done again from the start if the host goes down (cache=unsafe).
    #[must_use]
    pub fn without_syncs(self) -> FileStorage {
        FileStorage { syncs: false, ..self }
    }

    /// The same file, of whose changes `hook` hears.
    #[cfg(test)]
    pub(crate) fn hooked(self, hook: Hook) -> FileStorage {
        FileStorage { hook: Some(hook), ..self }
    }

    #[cfg(test)]
    fn tell(&self, change: impl FnOnce() -> Change) -> io::Result<()> {
        self.hook.as_ref().map_or(Ok(()), |hook| hook(change()))
    }

    /// What tells this file from all others: device and inode.
    ///
    /// # Errors
    /// [`BlockError::Host`].
    pub fn identity(&self) -> Result<(u64, u64), BlockError> {
        let meta = self.file.metadata().map_err(|e| BlockError::host(&self.path, "cannot examine", e))?;
        Ok((meta.dev(), meta.ino()))
    }

    /// The file's name.
    pub fn path(&self) -> &Path {
        &self.path
    }
    /// Bytes.
    pub fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }
    /// Whether it has no bytes; never so after [`open`](Self::open).
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        self.read_only
    }
    /// Logical block size of the device, 512 for files.
    pub fn sector(&self) -> u32 {
        self.sector
    }
    /// Physical or file system block size.
    pub fn physical(&self) -> u32 {
        self.physical
    }
    /// Whether the host's page cache is bypassed.
    pub fn is_direct(&self) -> bool {
        self.direct.is_some()
    }

    /// Add to `found` that `len` bytes lie at `offset`, if they may be moved there by others than this type's own calls.
    pub(crate) fn locate(&self, write: bool, offset: u64, len: u64, found: &mut Located) -> bool {
        if check_range(self.len(), offset, len).is_err() || (write && self.read_only) {
            return false;
        }
        let mut align = 1;
        if let Some(d) = &self.direct {
            align = d.align();
            if write {
                let Some(shared) = d.share() else { return false };
                found.hold(shared);
            }
        }
        found.file(&self.file, offset, len, align);
        true
    }

    /// Fill `bufs` from `offset`, all inside the file.
    ///
    /// # Errors
    /// The host's; [`io::ErrorKind::UnexpectedEof`] when the file has become shorter.
    pub fn read(&self, bufs: &[SharedSliceMut<'_>], offset: u64) -> io::Result<()> {
        check_range(self.len(), offset, total_mut(bufs))?;
        match &self.direct {
            Some(d) => d.read(&self.file, bufs, offset),
            None => read_fd(&self.file, bufs, offset),
        }
    }

    /// [`read`](Self::read) if all is in the host's page cache; otherwise `false`.
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    pub fn try_read(&self, bufs: &[SharedSliceMut<'_>], offset: u64) -> io::Result<bool> {
        check_range(self.len(), offset, total_mut(bufs))?;
        if !self.nowait.load(Ordering::Relaxed) || bufs.len() > IOV_MAX {
            return Ok(false);
        }
        // SAFETY: each element is an iovec over memory valid for this call.
        let n = unsafe {
            libc::preadv2(
                self.file.as_raw_fd(),
                bufs.as_ptr().cast(),
                bufs.len() as libc::c_int,
                offset as libc::off_t,
                libc::RWF_NOWAIT,
            )
        };
        if n < 0 {
            let e = io::Error::last_os_error();
            return match e.raw_os_error() {
                Some(libc::EAGAIN | libc::EINTR) => Ok(false),
                Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL) => {
                    self.nowait.store(false, Ordering::Relaxed);
                    Ok(false)
                }
                _ => Err(e),
            };
        }
        // A part may be there and the rest not: then all is read again by the one who may wait.
        Ok(n as u64 == total_mut(bufs))
    }

    /// The piece at `offset`, at most `len` bytes long, that is either data or a hole: its length and whether it is
    /// data. Hosts that cannot tell say "data".
    ///
    /// # Errors
    /// The host's.
    pub fn extent(&self, offset: u64, len: u64) -> io::Result<(u64, bool)> {
        let there = self.len().saturating_sub(offset).min(len);
        if there == 0 {
            return Ok((len, false));
        }
        let start = check_offset(offset)?;
        // SAFETY: plain numbers on an open descriptor; nothing uses the file position.
        let data = unsafe { libc::lseek(self.file.as_raw_fd(), start, libc::SEEK_DATA) };
        if data < 0 {
            let e = io::Error::last_os_error();
            // Nothing but a hole until the end, or a host that cannot tell.
            return Ok((there, e.raw_os_error() != Some(libc::ENXIO)));
        }
        if data as u64 > offset {
            return Ok(((data as u64 - offset).min(there), false));
        }
        // SAFETY: as above.
        let hole = unsafe { libc::lseek(self.file.as_raw_fd(), start, libc::SEEK_HOLE) };
        if hole <= start { Ok((there, true)) } else { Ok(((hole as u64 - offset).min(there), true)) }
    }

    /// Bytes that the file takes on the host.
    ///
    /// # Errors
    /// The host's.
    pub fn allocated(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blocks() * 512)
    }

    /// Reserve space for the first `len` bytes, making the file longer if need be.
    ///
    /// # Errors
    /// The host's.
    pub fn reserve(&self, len: u64) -> io::Result<()> {
        #[cfg(test)]
        self.tell(|| Change::Length(len.max(self.len())))?;
        if len > 0 {
            let len = check_offset(len)?;
            let _alone = self.direct.as_ref().map(Direct::alone);
            // SAFETY: plain numbers on an open descriptor.
            if unsafe { libc::fallocate(self.file.as_raw_fd(), 0, 0, len) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        self.len.fetch_max(len, Ordering::AcqRel);
        Ok(())
    }

    /// Write `bufs` from `offset`; a write across the end makes the file longer.
    ///
    /// # Errors
    /// The host's.
    pub fn write(&self, bufs: &[SharedSlice<'_>], offset: u64) -> io::Result<()> {
        #[cfg(test)]
        self.tell(|| {
            let mut bytes = vec![0; total(bufs) as usize];
            crate::gather(bufs, &mut bytes);
            Change::Write(offset, bytes)
        })?;
        match &self.direct {
            Some(d) => d.write(&self.file, bufs, offset)?,
            None => {
                // The host lets one writer at a time into a file's page cache, and who comes meanwhile spins: CPU time
                // that another thread could read with, or a guest run on.
                let queue = !self.block_device && total(bufs) >= LONG;
                let _turn = queue.then(|| self.turn.lock().unwrap_or_else(PoisonError::into_inner));
                self.write_cached(bufs, offset)?;
            }
        }
        self.len.fetch_max(offset + total(bufs), Ordering::AcqRel);
        Ok(())
    }

    /// Write to the page cache, in pieces of at most [`CACHED`] bytes that end at multiples of it.
    fn write_cached(&self, bufs: &[SharedSlice<'_>], offset: u64) -> io::Result<()> {
        let len = total(bufs);
        if len <= CACHED {
            return write_fd(&self.file, bufs, offset);
        }
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let n = (CACHED - at % CACHED).min(len - done);
            write_fd(&self.file, &slice_of(bufs, done, n), at)?;
            done += n;
        }
        Ok(())
    }

    /// Make data durable (fdatasync).
    ///
    /// # Errors
    /// The host's.
    pub fn sync(&self) -> io::Result<()> {
        #[cfg(test)]
        self.tell(|| Change::Sync)?;
        if self.read_only || !self.syncs { Ok(()) } else { self.file.sync_data() }
    }

    /// Make a file longer (with zeroes) or shorter. A block device has the size that its host gave it; this finds out
    /// that it has another one now.
    ///
    /// # Errors
    /// The host's; [`io::ErrorKind::Unsupported`] for a size that a block device does not have.
    pub fn resize(&self, len: u64) -> io::Result<()> {
        if self.block_device {
            let (now, ..) = block_device_facts(&self.file, true)?;
            if len != now {
                let what = format!("the block device has {now} bytes, which only its host can change");
                return Err(io::Error::new(io::ErrorKind::Unsupported, what));
            }
            self.len.store(len, Ordering::Release);
            return Ok(());
        }
        #[cfg(test)]
        self.tell(|| Change::Length(len))?;
        let _alone = self.direct.as_ref().map(Direct::alone);
        self.file.set_len(len)?;
        self.len.store(len, Ordering::Release);
        Ok(())
    }

    /// Give space back where the host can; the range reads as anything, in practice zeroes.
    ///
    /// # Errors
    /// The host's.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.fallocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, &self.punch, offset, len)
            .map(|_| ())
    }

    /// Make a range read as zeroes.
    ///
    /// # Errors
    /// The host's.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let in_file = self.len().saturating_sub(offset).min(len);
        // Both forms read back as zeroes, on files and on block devices (fallocate(2)).
        let keep = libc::FALLOC_FL_KEEP_SIZE;
        let punch = || self.fallocate(libc::FALLOC_FL_PUNCH_HOLE | keep, &self.punch, offset, in_file);
        let zero = || self.fallocate(libc::FALLOC_FL_ZERO_RANGE | keep, &self.zero_range, offset, in_file);
        let done = if unmap { punch()? || zero()? } else { zero()? };
        let start = if done { offset + in_file } else { offset };
        let mut at = start;
        while at < offset + len {
            let n = (offset + len - at).min(ZEROES.len() as u64);
            self.write(&[SharedSlice::new(&ZEROES[..n as usize])], at)?;
            at += n;
        }
        Ok(())
    }

    /// False when the host has not this way.
    fn fallocate(&self, mode: i32, works: &AtomicBool, offset: u64, len: u64) -> io::Result<bool> {
        if len == 0 {
            return Ok(true);
        }
        if !works.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let unit = u64::from(self.sector);
        if self.block_device && !(offset | len).is_multiple_of(unit) {
            return Ok(false);
        }
        #[cfg(test)]
        self.tell(|| Change::Zero(offset, len))?;
        loop {
            // SAFETY: plain numbers on an open descriptor.
            let r = unsafe {
                libc::fallocate(self.file.as_raw_fd(), mode, offset as libc::off_t, len as libc::off_t)
            };
            if r == 0 {
                return Ok(true);
            }
            let e = io::Error::last_os_error();
            match e.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY | libc::EINVAL | libc::EPERM) => {
                    works.store(false, Ordering::Relaxed);
                    return Ok(false);
                }
                _ => return Err(e),
            }
        }
    }
}

fn open_error(path: &Path, options: StorageOptions, e: io::Error) -> BlockError {
    match e.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => BlockError::NotFound(path.into()),
        Some(libc::EACCES | libc::EPERM | libc::EROFS) => {
            BlockError::Permission { path: path.into(), writing: !options.read_only }
        }
        Some(libc::EINVAL) if options.direct => BlockError::host(
            path,
            "cannot open for direct I/O (the file system does not offer it; use cache=writeback)",
            e,
        ),
        _ => BlockError::host(path, "cannot open", e),
    }
}

/// Size, logical and physical block size.
fn block_device_facts(file: &File, read_only: bool) -> io::Result<(u64, u32, u32)> {
    let fd = file.as_raw_fd();
    let check = |r: i32| if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    let (mut len, mut sector, mut physical, mut locked) = (0u64, 0i32, 0u32, 0i32);
    // SAFETY: each request writes one number of the type of its argument (linux/fs.h).
    unsafe {
        check(libc::ioctl(fd, BLKGETSIZE64, &mut len))?;
        check(libc::ioctl(fd, BLKSSZGET, &mut sector))?;
        check(libc::ioctl(fd, BLKPBSZGET, &mut physical))?;
        check(libc::ioctl(fd, BLKROGET, &mut locked))?;
    }
    if locked != 0 && !read_only {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let sector = u32::try_from(sector).ok().filter(|s| s.is_power_of_two() && *s >= 512).unwrap_or(512);
    Ok((len, sector, physical.max(sector)))
}

/// What the file system wants for direct I/O (statx, Linux 6.1); 4096 suits all that do not say.
fn file_direct_alignment(file: &File) -> u64 {
    // SAFETY: all-zero is a valid statx.
    let mut s: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: an empty path with AT_EMPTY_PATH means the descriptor; the structure lives through the call.
    let r = unsafe {
        libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, &mut s)
    };
    let align = s.stx_dio_mem_align.max(s.stx_dio_offset_align);
    if r == 0 && s.stx_mask & libc::STATX_DIOALIGN != 0 && align.is_power_of_two() {
        u64::from(align.max(512))
    } else {
        4096
    }
}

fn check_offset(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

/// Fill `bufs` from `offset`, whatever the number of system calls.
pub fn read_fd(file: &File, bufs: &[SharedSliceMut<'_>], offset: u64) -> io::Result<()> {
    let (mut rest, mut at): (&[SharedSliceMut<'_>], u64) = (bufs, offset);
    // What the kernel left of the first buffer of `rest`.
    let mut skip = 0usize;
    while let Some(first) = rest.first() {
        if skip >= first.len() {
            rest = &rest[1..];
            skip = 0;
            continue;
        }
        let part;
        let batch: &[SharedSliceMut<'_>] = if skip > 0 {
            part = [first.part(skip, usize::MAX)];
            &part
        } else {
            &rest[..rest.len().min(IOV_MAX)]
        };
        let position = check_offset(at)?;
        // SAFETY: each element is an iovec over memory valid for this call.
        let n = unsafe {
            libc::preadv(file.as_raw_fd(), batch.as_ptr().cast(), batch.len() as libc::c_int, position)
        };
        let n = advance(n)?;
        let Some(mut n) = n else { continue };
        if n == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the image has become shorter"));
        }
        at += n as u64;
        n += skip;
        skip = 0;
        while let Some(b) = rest.first().filter(|b| n >= b.len()) {
            n -= b.len();
            rest = &rest[1..];
        }
        skip += n;
    }
    Ok(())
}

/// One read from `offset`; gives the bytes, 0 at the end of the file.
pub fn read_some(file: &File, buf: &SharedSliceMut<'_>, offset: u64) -> io::Result<usize> {
    let position = check_offset(offset)?;
    loop {
        // SAFETY: the element is an iovec over memory valid for this call.
        let n = unsafe { libc::preadv(file.as_raw_fd(), std::ptr::from_ref(buf).cast(), 1, position) };
        if let Some(n) = advance(n)? {
            return Ok(n);
        }
    }
}

/// Write `bufs` from `offset`, whatever the number of system calls.
pub fn write_fd(file: &File, bufs: &[SharedSlice<'_>], offset: u64) -> io::Result<()> {
    let (mut rest, mut at): (&[SharedSlice<'_>], u64) = (bufs, offset);
    let mut skip = 0usize;
    while let Some(first) = rest.first() {
        if skip >= first.len() {
            rest = &rest[1..];
            skip = 0;
            continue;
        }
        let part;
        let batch: &[SharedSlice<'_>] = if skip > 0 {
            part = [first.part(skip, usize::MAX)];
            &part
        } else {
            &rest[..rest.len().min(IOV_MAX)]
        };
        let position = check_offset(at)?;
        // SAFETY: each element is an iovec over memory valid for this call.
        let n = unsafe {
            libc::pwritev(file.as_raw_fd(), batch.as_ptr().cast(), batch.len() as libc::c_int, position)
        };
        let n = advance(n)?;
        let Some(mut n) = n else { continue };
        if n == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        at += n as u64;
        n += skip;
        skip = 0;
        while let Some(b) = rest.first().filter(|b| n >= b.len()) {
            n -= b.len();
            rest = &rest[1..];
        }
        skip += n;
    }
    Ok(())
}

/// The count that a system call gave; `None` to try again.
fn advance(n: libc::ssize_t) -> io::Result<Option<usize>> {
    match usize::try_from(n) {
        Ok(n) => Ok(Some(n)),
        Err(_) => match io::Error::last_os_error() {
            e if e.kind() == io::ErrorKind::Interrupted => Ok(None),
            e => Err(e),
        },
    }
}
