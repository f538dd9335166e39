//! qcow2, versions 2 and 3 (QEMU docs/interop/qcow2.txt).
//!
//! Written for crash safety first. Metadata changes gather in memory and go out together (see `commit`), ordered so
//! that a crash at any moment leaks clusters at worst. Data of a new cluster is written before its L2 entry exists.
//! Any number of threads may read and write: the metadata lock is held for look-ups only, never over data I/O.
//!
//! Locks, in the order in which they are taken:
//! 1. `committing`: one commit at a time.
//! 2. `gate`: shared by every request for as long as it uses host offsets; taken alone before freed clusters may be
//!    used again, so that no late request reaches a cluster that has become another's.
//! 3. `meta`: the tables.

mod amend;
pub mod bitmap;
pub mod check;
mod compress;
pub mod create;
mod extent;
pub mod header;
mod io_path;
mod maintain;
mod meta;
pub mod snapshot;
mod table;
#[cfg(test)]
mod tests;

pub use amend::Changes;
pub use create::{CreateOptions, create};
pub use extent::{Extent, ExtentKind};
pub use header::Header;
pub use maintain::Preallocation;

use crate::gate::Gate;
use crate::node::Joint;
use crate::storage::{FileStorage, StorageOptions};
use crate::{
    BlockBackend, BlockError, ImageOptions, Limits, SECTOR_SIZE, SharedSlice, SharedSliceMut, Status,
    check_range,
};
use crate::{Located, total, total_mut};
use header::{AUTOCLEAR_BITMAPS, AUTOCLEAR_RAW_DATA, INCOMPAT_CORRUPT, INCOMPAT_DATA_FILE, INCOMPAT_DIRTY};
use meta::Meta;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use table::{Piece, write_pieces};

/// Freed clusters that may wait for the next flush before a commit is made for them.
const MAX_PENDING: usize = 4096;

/// Facts that do not change while an image is open.
#[derive(Debug, Clone, Copy)]
struct Shape {
    cluster: u64,
    /// Subclusters in a cluster: 1 or 32.
    subs: u64,
    version: u32,
    external: bool,
}

/// An open image.
pub struct Qcow2 {
    file: FileStorage,
    data: Option<FileStorage>,
    backing: Option<Arc<Joint>>,
    shape: Shape,
    read_only: bool,
    size: AtomicU64,
    meta: Mutex<Meta>,
    settled: Condvar,
    gate: Gate,
    committing: Mutex<()>,
    unpacked: compress::Cache,
    /// A commit is due although nobody asked for one: memory for tables or the list of freed clusters is full.
    overdue: AtomicBool,
    /// Writes are recorded in persistent bitmaps.
    recording: bitmap::Recording,
}

impl Qcow2 {
    /// Open an image with its backing chain and data file.
    ///
    /// # Errors
    /// [`BlockError`] names the file and the way out.
    pub fn open(storage: FileStorage, options: &ImageOptions) -> Result<Qcow2, BlockError> {
        let chain = super::Chain::start(&storage)?;
        Qcow2::open_in(storage, options, &chain)
    }

    pub(super) fn open_in(
        storage: FileStorage,
        options: &ImageOptions,
        chain: &super::Chain,
    ) -> Result<Qcow2, BlockError> {
        let header = Header::read(&storage)?;
        let backing = match &header.backing {
            Some(name) if options.backing => {
                Some(super::open_backing(&storage, name, header.backing_format.as_deref(), options, chain)?)
            }
            _ => None,
        };
        Qcow2::with_backing(storage, header, backing, options)
    }

    /// Open an image on a given backing disk.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn with_backing(
        storage: FileStorage,
        header: Header,
        backing: Option<Arc<Joint>>,
        options: &ImageOptions,
    ) -> Result<Qcow2, BlockError> {
        let path = storage.path();
        let data = match (&header.data_file, header.incompatible & INCOMPAT_DATA_FILE != 0) {
            (Some(name), true) => {
                if options.format.is_none() && !options.backing_trusted {
                    return Err(BlockError::Reference { path: path.into(), name: name.clone() });
                }
                let options = StorageOptions {
                    read_only: options.read_only,
                    direct: options.direct,
                    lock: options.lock,
                };
                let file = FileStorage::open_any_size(&super::data_file_of(path, name), options);
                Some(file.map_err(|e| e.named_by(path, "external data file"))?)
            }
            (None, true) => {
                return Err(BlockError::Damaged {
                    path: path.into(),
                    what: "it has an external data file, but does not name it".into(),
                });
            }
            _ => None,
        };
        Qcow2::with_files(storage, header, data, backing, options)
    }

    /// Open an image with a given data file, if it has one, on a given backing disk.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn with_files(
        storage: FileStorage,
        header: Header,
        data: Option<FileStorage>,
        backing: Option<Arc<Joint>>,
        options: &ImageOptions,
    ) -> Result<Qcow2, BlockError> {
        let path: PathBuf = storage.path().into();
        let damaged = |what: String| BlockError::Damaged { path: path.clone(), what };
        let writable = !options.read_only;
        if header.incompatible & INCOMPAT_CORRUPT != 0 && writable && !options.repairing {
            return Err(damaged("it is marked as corrupt".into()));
        }
        let host = |e| BlockError::host(&path, "cannot read the tables", e);
        let size = header.size.next_multiple_of(SECTOR_SIZE);
        let shape = Shape {
            cluster: header.cluster_size(),
            subs: if header.extended_l2() { 32 } else { 1 },
            version: header.version,
            external: data.is_some(),
        };
        let dirty = header.incompatible & INCOMPAT_DIRTY != 0;
        let meta = Meta::load(header, &storage, writable).map_err(host)?;
        let image = Qcow2 {
            file: storage,
            data,
            backing,
            shape,
            read_only: options.read_only,
            size: AtomicU64::new(size),
            meta: Mutex::new(meta),
            settled: Condvar::new(),
            gate: Gate::default(),
            committing: Mutex::new(()),
            unpacked: compress::Cache::new(shape.cluster),
            overdue: AtomicBool::new(false),
            recording: bitmap::Recording::default(),
        };
        if writable && !options.repairing {
            if dirty {
                // Left behind by a crash while refcounts were lazy: bring them up to date first.
                image.repair_in_place(check::Repair::All).map_err(host)?;
            }
            image.forget_autoclear().map_err(host)?;
            image.prepare_recording();
        }
        Ok(image)
    }

    /// Clear the autoclear bits of features that are not known, as the format demands before a write. Bitmaps are kept
    /// up (see `bitmap`).
    fn forget_autoclear(&self) -> io::Result<()> {
        let mut meta = self.meta();
        let keep = AUTOCLEAR_BITMAPS | if self.shape.external { AUTOCLEAR_RAW_DATA } else { 0 };
        if meta.header.autoclear & !keep != 0 {
            meta.header.autoclear &= keep;
            meta.header.write(&self.file)?;
            self.file.sync()?;
        }
        Ok(())
    }

    fn meta(&self) -> MutexGuard<'_, Meta> {
        self.meta.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn data_file(&self) -> &FileStorage {
        self.data.as_ref().unwrap_or(&self.file)
    }

    /// The header as it is now.
    pub fn header(&self) -> Header {
        self.meta().header.clone()
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The disk below.
    pub fn backing(&self) -> Option<&Arc<Joint>> {
        self.backing.as_ref()
    }

    fn writable(&self) -> io::Result<()> {
        if self.read_only { Err(io::Error::from_raw_os_error(libc::EROFS)) } else { Ok(()) }
    }

    /// Bring all metadata to the file, durably.
    ///
    /// Everything to be written is copied under the lock, as of one moment; requests go on while the copies are
    /// written. The order: refcounts (with all data), then L2 tables, then the L1 table; a barrier between each.
    fn commit(&self) -> io::Result<()> {
        self.commit_in_order(false)
    }

    /// As [`commit`](Self::commit) for changes that lower refcounts of clusters that stay in use: the tables first, then
    /// the refcounts. If it ends half way these are too high, which `check -r leaks` mends; lowered first, they would not
    /// fit the tables' flags, which it does not.
    fn commit_lowered(&self) -> io::Result<()> {
        self.commit_in_order(true)
    }

    fn commit_in_order(&self, tables_first: bool) -> io::Result<()> {
        let _one = self.committing.lock().unwrap_or_else(PoisonError::into_inner);
        self.overdue.store(false, Ordering::Relaxed);
        if let Some(d) = &self.data {
            d.sync()?;
        }
        let (mut counts, mut tables) = (Vec::<Piece>::new(), Vec::<Piece>::new());
        let (taken_counts, taken_tables, reftable, l1, pending);
        {
            let mut m = self.meta();
            // All clusters in use lie inside the file from now on; nobody writes behind `fresh` while the lock is held.
            if self.file.len() < m.fresh {
                self.file.resize(m.fresh)?;
            }
            taken_counts = m.refblocks.begin_write(&mut counts);
            taken_tables = m.l2.begin_write(&mut tables);
            reftable = std::mem::take(&mut m.reftable_dirty)
                .then(|| (m.header.reftable_offset, meta::words_to_bytes(&m.reftable)));
            l1 = std::mem::take(&mut m.l1_dirty);
            pending = std::mem::take(&mut m.pending);
        }
        let write_counts = || {
            write_pieces(&self.file, &counts)?;
            self.file.sync()?;
            if let Some((at, bytes)) = &reftable {
                self.file.write(&[SharedSlice::new(bytes)], *at)?;
                self.file.sync()?;
            }
            Ok(())
        };
        let write_tables = || {
            if !tables.is_empty() {
                write_pieces(&self.file, &tables)?;
                self.file.sync()?;
            }
            if !l1.is_empty() {
                let pieces: Vec<Piece> = {
                    let m = self.meta();
                    let at = m.header.l1_offset;
                    l1.iter().map(|&i| (at + i as u64 * 8, m.l1[i].to_be_bytes().to_vec())).collect()
                };
                write_pieces(&self.file, &pieces)?;
                self.file.sync()?;
            }
            Ok(())
        };
        let written: io::Result<()> = match tables_first {
            false => write_counts().and_then(|()| write_tables()),
            true => write_tables().and_then(|()| write_counts()),
        };
        {
            let mut m = self.meta();
            m.refblocks.end_write(&taken_counts, written.is_ok());
            m.l2.end_write(&taken_tables, written.is_ok());
            if written.is_err() {
                m.reftable_dirty |= reftable.is_some();
                m.l1_dirty.extend(l1);
                m.pending.extend(pending);
                return written;
            }
        }
        if pending.is_empty() { Ok(()) } else { self.release(&pending) }
    }

    /// Lower the refcounts of clusters that no table on disk names any more, and give free ones back to the host.
    fn release(&self, pending: &[meta::Pending]) -> io::Result<()> {
        let _alone = self.gate.alone();
        let mut m = self.meta();
        self.unpacked.clear();
        let discard = |first: u64, count: u64| {
            let at = first * self.shape.cluster;
            self.file.discard(at, self.file.len().saturating_sub(at).min(count * self.shape.cluster))
        };
        // Free clusters that follow each other go back in one request.
        let mut free = (0, 0);
        for c in pending.iter().flat_map(|&(first, count)| first..first + count) {
            m.adjust(c, 1, -1, &self.file)?;
            if m.refcount(c, &self.file)? == 0 {
                if m.packed.is_some_and(|(_, end)| end == (c + 1) * self.shape.cluster) {
                    m.packed = None;
                }
                if free.0 + free.1 == c {
                    free.1 += 1;
                } else {
                    discard(free.0, free.1)?;
                    free = (c, 1);
                }
            }
        }
        discard(free.0, free.1)
    }

    /// Whether metadata has changed since the last commit.
    fn unsettled(&self) -> bool {
        let m = self.meta();
        m.refblocks.any_dirty()
            || m.l2.any_dirty()
            || m.reftable_dirty
            || !m.l1_dirty.is_empty()
            || !m.pending.is_empty()
    }

    /// Make a commit if memory fills up. The caller holds no lock.
    fn settle(&self) -> io::Result<()> {
        if self.overdue.load(Ordering::Relaxed) { self.commit() } else { Ok(()) }
    }

    /// Remember that a commit is due.
    fn note(&self, m: &Meta) {
        if m.pending.len() > MAX_PENDING || m.l2.crowded() || m.refblocks.crowded() {
            self.overdue.store(true, Ordering::Relaxed);
        }
    }

    /// Write everything and end; errors that a drop would swallow are reported.
    ///
    /// # Errors
    /// The host's.
    pub fn close(self) -> io::Result<()> {
        self.come_to_rest()
    }
}

impl Drop for Qcow2 {
    fn drop(&mut self) {
        if !self.read_only {
            // Bitmaps that could not be stored stay marked as in use, that is, of no use.
            let _ = self.end_recording();
            for _ in 0..2 {
                // Nobody is left to tell: what a failure leaves behind is as after a crash.
                if !self.unsettled() || self.commit().is_err() {
                    break;
                }
            }
        }
    }
}

impl BlockBackend for Qcow2 {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn limits(&self) -> Limits {
        Limits {
            block_size: self.file.sector(),
            physical_block_size: self.file.physical().max(self.file.sector()),
            discard_granularity: (self.shape.cluster / self.shape.subs) as u32,
            discard: !self.read_only,
        }
    }

    fn read_at(&self, bufs: &[SharedSliceMut<'_>], offset: u64) -> io::Result<()> {
        check_range(self.size(), offset, total_mut(bufs))?;
        let _shared = self.gate.share();
        self.read_range(bufs, offset, total_mut(bufs))
    }

    fn try_read_at(&self, bufs: &[SharedSliceMut<'_>], offset: u64) -> io::Result<bool> {
        check_range(self.size(), offset, total_mut(bufs))?;
        let Some(_shared) = self.gate.try_share() else { return Ok(false) };
        self.try_read_range(bufs, offset)
    }

    fn locate(&self, write: bool, offset: u64, len: u64, found: &mut Located) -> io::Result<bool> {
        check_range(self.size(), offset, len)?;
        // Writes that bitmaps record go the longer way.
        if write && (self.read_only || self.records()) {
            return Ok(false);
        }
        let Some(shared) = self.gate.try_share() else { return Ok(false) };
        found.hold(shared);
        self.locate_range(write, offset, len, found)
    }

    fn writes_are_cached(&self) -> bool {
        !self.file.is_direct()
    }

    fn write_at(&self, bufs: &[SharedSlice<'_>], offset: u64) -> io::Result<()> {
        self.writable()?;
        check_range(self.size(), offset, total(bufs))?;
        self.record(offset, total(bufs))?;
        {
            let _shared = self.gate.share();
            self.write_range(bufs, offset)?;
        }
        self.settle()
    }

    fn flush(&self) -> io::Result<()> {
        if self.read_only { Ok(()) } else { self.commit() }
    }

    fn come_to_rest(&self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.end_recording()?;
        self.commit()?;
        // Refcounts that go down once no table on disk names their clusters.
        while self.unsettled() {
            self.commit()?;
        }
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.writable()?;
        check_range(self.size(), offset, len)?;
        self.record(offset, len)?;
        {
            let _shared = self.gate.share();
            self.discard_range(offset, len)?;
        }
        self.settle()
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.writable()?;
        check_range(self.size(), offset, len)?;
        self.record(offset, len)?;
        {
            let _shared = self.gate.share();
            self.zero_range(offset, len, unmap)?;
        }
        self.settle()
    }

    fn status(&self, offset: u64, len: u64) -> io::Result<Status> {
        let x = self.map(offset, len)?;
        let here = Status {
            len: x.len,
            zero: false,
            data: true,
            compressed: false,
            present: true,
            depth: 0,
            offset: None,
        };
        Ok(match x.kind {
            ExtentKind::Data(host) => {
                // A hole in the file, as preallocation leaves it, need not be read.
                let (len, data) = self.data_file().extent(host, x.len)?;
                Status { len, zero: !data, offset: Some(host), ..here }
            }
            ExtentKind::Compressed(_) => Status { compressed: true, ..here },
            ExtentKind::Zero { host } => Status { zero: true, data: false, offset: host, ..here },
            ExtentKind::Below => {
                let there = self.backing.as_ref().map_or(0, |b| b.size().saturating_sub(offset)).min(x.len);
                match &self.backing {
                    Some(b) if there > 0 => {
                        let below = b.status(offset, there)?;
                        Status { depth: below.depth + 1, ..below }
                    }
                    Some(_) => Status { zero: true, data: false, present: false, ..here },
                    None => Status { zero: true, data: false, present: false, ..here },
                }
            }
        })
    }

    fn resize(&self, size: u64) -> io::Result<()> {
        self.writable()?;
        let kept = self.take_bitmaps()?;
        self.resize_to(size)?;
        self.put_bitmaps(kept)
    }
}
