//! What a disk is to a device model.

use crate::gate::Hold;
use crate::node::Throttle;
use crate::{SharedSlice, SharedSliceMut};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

/// The unit of disk addresses in most protocols, in bytes.
pub const SECTOR_SIZE: u64 = 512;

/// What a back end prefers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Smallest unit that can be read or written without extra work, in bytes; a power of two, at least 512.
    pub block_size: u32,
    /// Smallest unit that is written without a read first, in bytes; a power of two multiple of `block_size`.
    pub physical_block_size: u32,
    /// Unit and alignment in which discard gives space back, in bytes.
    pub discard_granularity: u32,
    /// Whether discard has an effect.
    pub discard: bool,
}

/// What is known about a piece of a disk without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// Length of the piece in bytes; not zero.
    pub len: u64,
    /// Reads as zeroes for certain.
    pub zero: bool,
    /// Takes space on the host.
    pub data: bool,
    /// Compressed in its file.
    pub compressed: bool,
    /// Some file of the chain says what is here; if not, it is what lies below the last one: zeroes.
    pub present: bool,
    /// Files between the top one and the one that holds the piece.
    pub depth: u32,
    /// Where the piece lies in that file, if it lies there as it is.
    pub offset: Option<u64>,
}

/// One piece of what [`BlockBackend::locate`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Piece {
    /// Bytes of an open file, in memory, offset and length aligned to `align`.
    File { fd: RawFd, offset: u64, len: u64, align: u64 },
    /// Zeroes that lie nowhere.
    Zeroes { len: u64 },
}

/// Where the bytes of a range lie, piece by piece, for whoever moves them without the back end's help. They stay there
/// for as long as this value lives.
#[derive(Default)]
pub struct Located {
    pub(crate) pieces: Vec<Piece>,
    holds: Vec<Hold>,
}

impl Located {
    /// The next `len` bytes lie in `file`, which stays open as long as the back end.
    pub(crate) fn file(&mut self, file: &File, offset: u64, len: u64, align: u64) {
        self.pieces.push(Piece::File { fd: file.as_raw_fd(), offset, len, align });
    }

    /// The next `len` bytes are zeroes; true.
    pub(crate) fn zeroes(&mut self, len: u64) -> bool {
        self.pieces.push(Piece::Zeroes { len });
        true
    }

    /// Keep `hold` as long as this.
    pub(crate) fn hold(&mut self, hold: Hold) {
        self.holds.push(hold);
    }
}

/// A disk. All calls may come from several threads at once; overlapping ones are not ordered among each other.
///
/// Ranges are in bytes and need no alignment (aligned ones are faster). A range beyond [`size`](Self::size) is
/// [`io::ErrorKind::InvalidInput`].
pub trait BlockBackend: Send + Sync {
    /// Size in bytes, a multiple of [`SECTOR_SIZE`].
    fn size(&self) -> u64;

    /// Whether writes are refused.
    fn read_only(&self) -> bool;

    /// What is fast here.
    fn limits(&self) -> Limits;

    /// Fill `bufs` from `offset` on.
    ///
    /// # Errors
    /// The host's; parts of `bufs` may have been filled.
    fn read_at(&self, bufs: &[SharedSliceMut<'_>], offset: u64) -> io::Result<()>;

    /// As [`read_at`](Self::read_at) if the data is at hand; `false`, and any content of `bufs`, if the caller would
    /// have to wait for a disk.
    ///
    /// # Errors
    /// As for [`read_at`](Self::read_at).
    fn try_read_at(&self, bufs: &[SharedSliceMut<'_>], offset: u64) -> io::Result<bool> {
        let _ = (bufs, offset);
        Ok(false)
    }

    /// Say where the bytes of a range lie, so that the caller can move them itself: for the kernel's asynchronous I/O.
    /// False, and anything in `found`, if this cannot be said without waiting, or if more is to be done than to move
    /// bytes. While the caller keeps `found`, it must not wait for other requests of the same back end.
    ///
    /// # Errors
    /// As for [`read_at`](Self::read_at).
    fn locate(&self, write: bool, offset: u64, len: u64, found: &mut Located) -> io::Result<bool> {
        let _ = (write, offset, len, found);
        Ok(false)
    }

    /// The limits of speed that this node stands for, and the disk below it, which knows none. Asynchronous users keep to
    /// the limits themselves and use the disk below; the other calls here wait.
    fn paced(&self) -> Option<(Arc<Throttle>, Arc<dyn BlockBackend>)> {
        None
    }

    /// Whether writes only go to the host's page cache, so that short ones seldom wait.
    fn writes_are_cached(&self) -> bool {
        false
    }

    /// Write `bufs` from `offset` on.
    ///
    /// # Errors
    /// The host's; parts may have been written.
    fn write_at(&self, bufs: &[SharedSlice<'_>], offset: u64) -> io::Result<()>;

    /// Make all completed writes durable.
    ///
    /// # Errors
    /// The host's: data may be lost.
    fn flush(&self) -> io::Result<()>;

    /// Whether [`flush`](Self::flush) has nothing to wait for.
    fn flush_is_quick(&self) -> bool {
        false
    }

    /// The content of a range is no longer needed; it reads as anything afterwards.
    ///
    /// # Errors
    /// The host's. A back end that cannot discard does nothing.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Make a range read as zeroes; `unmap` allows to give its space back.
    ///
    /// # Errors
    /// The host's.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;

    /// What is known about the piece at `offset`, at most `len` bytes long (`len` is not zero).
    ///
    /// # Errors
    /// The host's.
    fn status(&self, offset: u64, len: u64) -> io::Result<Status> {
        check_range(self.size(), offset, len)?;
        Ok(Status { len, zero: false, data: true, compressed: false, present: true, depth: 0, offset: None })
    }

    /// [`flush`](Self::flush), and leave nothing to be written later: until the next request that changes the disk its
    /// files stay as they are, also when the back end goes.
    ///
    /// # Errors
    /// The host's.
    fn come_to_rest(&self) -> io::Result<()> {
        self.flush()
    }

    /// Change the size to `size` bytes, a multiple of [`SECTOR_SIZE`]. What is new reads as zeroes.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] when the back end cannot, or the host's.
    fn resize(&self, size: u64) -> io::Result<()> {
        let _ = size;
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Check that a range lies inside a disk of `size` bytes.
///
/// # Errors
/// [`io::ErrorKind::InvalidInput`].
pub fn check_range(size: u64, offset: u64, len: u64) -> io::Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "range beyond the end of the disk")),
    }
}
