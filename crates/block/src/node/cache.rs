//! What an attachment's options change about a disk: flushes that are not waited for, discards that are ignored.

use crate::{BlockBackend, Limits, Located, SharedSlice, SharedSliceMut, Status};
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::Arc;

/// How the host caches a disk, by QEMU's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheMode {
    /// The host's page cache is used; what the guest flushes is durable.
    #[default]
    Writeback,
    /// The page cache is bypassed (O_DIRECT); what the guest flushes is durable.
    None,
    /// The page cache is used; every write is durable when it is complete.
    Writethrough,
    /// The page cache is bypassed; every write is durable when it is complete.
    Directsync,
    /// The page cache is used, and flushes are ignored: a crash of the host may lose everything.
    Unsafe,
}

impl CacheMode {
    /// Whether the page cache is bypassed.
    pub fn is_direct(self) -> bool {
        matches!(self, CacheMode::None | CacheMode::Directsync)
    }

    /// Whether a write is complete only when it is durable.
    pub fn is_write_through(self) -> bool {
        matches!(self, CacheMode::Writethrough | CacheMode::Directsync)
    }
}

impl std::str::FromStr for CacheMode {
    type Err = String;
    fn from_str(s: &str) -> Result<CacheMode, String> {
        Ok(match s {
            "writeback" => CacheMode::Writeback,
            "none" | "off" => CacheMode::None,
            "writethrough" => CacheMode::Writethrough,
            "directsync" => CacheMode::Directsync,
            "unsafe" => CacheMode::Unsafe,
            other => {
                return Err(format!(
                    "cache mode {other:?}: give none, writeback, writethrough, directsync or unsafe"
                ));
            }
        })
    }
}

/// A disk with parts of its behaviour turned off.
pub struct Tuned {
    below: Arc<dyn BlockBackend>,
    /// Flushes do nothing.
    pub no_flush: bool,
    /// Discards do nothing, and zeroes keep their space.
    pub no_unmap: bool,
}

impl Tuned {
    /// `below`, with nothing turned off.
    pub fn new(below: Arc<dyn BlockBackend>) -> Tuned {
        Tuned { below, no_flush: false, no_unmap: false }
    }
}

impl BlockBackend for Tuned {
    fn size(&self) -> u64 {
        self.below.size()
    }
    fn read_only(&self) -> bool {
        self.below.read_only()
    }
    fn limits(&self) -> Limits {
        let below = self.below.limits();
        Limits { discard: below.discard && !self.no_unmap, ..below }
    }
    fn read_at(&self, bufs: &[SharedSliceMut<'_>], offset: u64) -> io::Result<()> {
        self.below.read_at(bufs, offset)
    }
    fn try_read_at(&self, bufs: &[SharedSliceMut<'_>], offset: u64) -> io::Result<bool> {
        self.below.try_read_at(bufs, offset)
    }
    fn locate(&self, write: bool, offset: u64, len: u64, found: &mut Located) -> io::Result<bool> {
        self.below.locate(write, offset, len, found)
    }
    fn writes_are_cached(&self) -> bool {
        self.below.writes_are_cached()
    }
    fn write_at(&self, bufs: &[SharedSlice<'_>], offset: u64) -> io::Result<()> {
        self.below.write_at(bufs, offset)
    }
    fn flush(&self) -> io::Result<()> {
        if self.no_flush { Ok(()) } else { self.below.flush() }
    }
    fn flush_is_quick(&self) -> bool {
        self.no_flush || self.below.flush_is_quick()
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.no_unmap {
            return crate::check_range(self.size(), offset, len);
        }
        self.below.discard(offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.below.write_zeroes(offset, len, unmap && !self.no_unmap)
    }
    fn status(&self, offset: u64, len: u64) -> io::Result<Status> {
        self.below.status(offset, len)
    }
    fn come_to_rest(&self) -> io::Result<()> {
        self.below.come_to_rest()
    }
    fn resize(&self, size: u64) -> io::Result<()> {
        self.below.resize(size)
    }
}
