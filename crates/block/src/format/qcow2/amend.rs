//! Changing the features of an image that exists.

use super::Qcow2;
use super::extent::ExtentKind;
use super::header::{
    AUTOCLEAR_RAW_DATA, COMPAT_LAZY, EXT_FEATURES, Header, INCOMPAT_CORRUPT, INCOMPAT_DIRTY, MAX_L1,
};
use super::meta::{COMPRESSED, ZERO, read_words};
use crate::{BlockBackend, SharedSlice};
use std::io;

/// What is to change; `None` stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// Version 2 or 3.
    pub version: Option<u32>,
    /// Whether programs may bring refcounts up to date late.
    pub lazy_refcounts: Option<bool>,
    /// Bits of a refcount.
    pub refcount_bits: Option<u32>,
    /// The external data file's name; empty takes the name out.
    pub data_file: Option<String>,
    /// Whether the data file is to be readable as a raw image.
    pub data_file_raw: Option<bool>,
    /// The disk's size.
    pub size: Option<u64>,
}

fn no(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, why.into())
}

impl Qcow2 {
    /// Make the changes. All that does not go together is refused before anything changes. No request may run
    /// meanwhile.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] with the reason; the host's.
    pub fn amend(&self, changes: &Changes) -> io::Result<()> {
        self.writable()?;
        let h = self.header();
        let version = changes.version.unwrap_or(h.version);
        let bits = changes.refcount_bits.unwrap_or(h.refcount_bits());
        if !bits.is_power_of_two() || bits > 64 {
            return Err(no("Refcount width must be a power of two and may not exceed 64 bits"));
        }
        if version < 3 {
            if bits != 16 {
                return Err(no(
                    "Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)",
                ));
            }
            if changes.lazy_refcounts == Some(true) {
                return Err(no(
                    "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)",
                ));
            }
        }
        if let Some(raw) = changes.data_file_raw
            && raw != (h.autoclear & AUTOCLEAR_RAW_DATA != 0)
        {
            return Err(no(if raw {
                "data-file-raw cannot be set on existing images"
            } else {
                "data-file-raw=off: convert the image to change that"
            }));
        }
        if changes.data_file.is_some() && !self.shape.external {
            return Err(no("data-file can only be set for images that use an external data file"));
        }
        if version == 2 && h.version == 3 {
            self.check_downgrade(&h)?;
        }
        if version == 3 && h.version == 2 {
            self.change_header(|h| {
                h.version = 3;
                h.extensions.push(Header::feature_table());
            })?;
        }
        if bits != h.refcount_bits() {
            self.change_refcount_bits(bits)?;
        }
        if let Some(lazy) = changes.lazy_refcounts {
            // Nothing here leaves refcounts behind, so there is nothing to bring up to date.
            self.change_header(|h| {
                h.compatible &= !COMPAT_LAZY;
                h.compatible |= if lazy { COMPAT_LAZY } else { 0 };
            })?;
        }
        if let Some(name) = &changes.data_file {
            self.change_header(|h| h.data_file = Some(name.clone()).filter(|n| !n.is_empty()))?;
        }
        if let Some(size) = changes.size {
            self.resize(size.next_multiple_of(crate::SECTOR_SIZE))?;
        }
        if version == 2 && h.version == 3 {
            self.downgrade()?;
        }
        self.flush()
    }

    /// Change the header on disk, then in memory.
    fn change_header(&self, change: impl FnOnce(&mut Header)) -> io::Result<()> {
        self.commit()?;
        let mut m = self.meta();
        let mut h = m.header.clone();
        change(&mut h);
        h.write(&self.file)?;
        self.file.sync()?;
        m.header = h;
        Ok(())
    }

    fn check_downgrade(&self, h: &Header) -> io::Result<()> {
        if h.incompatible & !(INCOMPAT_DIRTY | INCOMPAT_CORRUPT) != 0 {
            return Err(no(
                "Cannot downgrade an image with incompatible features set: an external data file, a compression type other than zlib or extended L2 entries",
            ));
        }
        if !self.bitmaps()?.is_empty() {
            return Err(no("Cannot downgrade an image with persistent bitmaps: remove them first"));
        }
        for s in self.snapshots()? {
            if s.disk_size != h.size || s.vm_state_size > u64::from(u32::MAX) {
                return Err(no("Internal snapshots prevent downgrade of image: they are of another size"));
            }
            let (at, n) = s.l1();
            if u64::from(n) > MAX_L1 {
                return Err(super::table::damaged("a snapshot's L1 table is out of range".into()));
            }
            for entry in read_words(&self.file, at, n as usize)? {
                let at = entry & super::meta::OFFSET;
                if at == 0 {
                    continue;
                }
                let table = read_words(&self.file, at, (self.shape.cluster / 8) as usize)?;
                if table.iter().any(|d| d & COMPRESSED == 0 && d & ZERO != 0) {
                    return Err(no(format!(
                        "the snapshot {:?} holds clusters marked as zeroes, which compat=0.10 has not: delete it first",
                        s.name
                    )));
                }
            }
        }
        Ok(())
    }

    /// To version 2, which has no clusters marked as zeroes.
    fn downgrade(&self) -> io::Result<()> {
        static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
        let (size, below) = (BlockBackend::size(self), self.header().backing.is_some());
        let mut at = 0;
        while at < size {
            let x = self.map(at, size - at)?;
            if matches!(x.kind, ExtentKind::Zero { .. }) {
                let end = at + x.len;
                let mut to = at;
                while to < end {
                    let n = (end - to).min(ZEROES.len() as u64);
                    if below {
                        self.write_at(&[SharedSlice::new(&ZEROES[..n as usize])], to)?;
                    } else {
                        let g = to / self.shape.cluster;
                        self.forget_cluster(g)?;
                        to = ((g + 1) * self.shape.cluster).min(end);
                        continue;
                    }
                    to += n;
                }
            }
            at += x.len;
        }
        self.commit()?;
        self.commit()?;
        self.change_header(|h| {
            h.version = 2;
            (h.incompatible, h.compatible, h.autoclear) = (0, 0, 0);
            h.extensions.retain(|e| e.0 != EXT_FEATURES);
            h.tail.clear();
        })
    }

    fn change_refcount_bits(&self, bits: u32) -> io::Result<()> {
        self.rebuild_refcounts(Some(bits.trailing_zeros())).map(|_| ())
    }
}
