//! Where the pieces of the guest's disk lie.

use super::Qcow2;
use super::meta::{COMPRESSED, COPIED, Entry, Meta, OFFSET, ZERO};
use super::table::damaged;
use std::io;

/// Most lookups for one extent: others wait for the metadata meanwhile. The rest of a longer one comes as another.
pub(super) const LOOKUPS: u32 = 1 << 15;

/// Where a piece of the guest's disk lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentKind {
    /// In the data file, uncompressed, from this offset on.
    Data(u64),
    /// Reads as zeroes by a mark in the image; a host cluster may be kept for it.
    Zero {
        /// Offset of the kept cluster.
        host: Option<u64>,
    },
    /// The image says nothing: it is what the backing file says, or zeroes.
    Below,
    /// In a compressed cluster with this descriptor.
    Compressed(u64),
}

/// A piece of the guest's disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Guest offset.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Where it lies.
    pub kind: ExtentKind,
}

impl Qcow2 {
    /// What an entry says of the guest offset `at` inside the cluster, and how many bytes from there on it says so of.
    pub(super) fn kind_of(&self, e: Entry, at: u64) -> io::Result<(ExtentKind, u64)> {
        let rest = self.shape.cluster - at;
        if e.desc & COMPRESSED != 0 {
            if self.shape.external {
                return Err(damaged("a compressed cluster in an image with an external data file".into()));
            }
            return Ok((ExtentKind::Compressed(e.desc), rest));
        }
        let host = e.desc & OFFSET;
        if host & (self.shape.cluster - 1) != 0 {
            return Err(damaged(format!("a data cluster at {host:#x} is not aligned")));
        }
        let present = host != 0 || (self.shape.external && e.desc & COPIED != 0);
        let kept = present.then_some(host + at);
        if self.shape.subs == 1 {
            let kind = match kept {
                _ if e.desc & ZERO != 0 && self.shape.version >= 3 => ExtentKind::Zero { host: kept },
                Some(h) => ExtentKind::Data(h),
                None => ExtentKind::Below,
            };
            return Ok((kind, rest));
        }
        let step = self.shape.cluster / self.shape.subs;
        let sub = at / step;
        let (bits, zeroes) = (e.bitmap as u32, (e.bitmap >> 32) as u32);
        let (allocated, zero) = (bits >> sub & 1 != 0, zeroes >> sub & 1 != 0);
        let kind = match (allocated, zero, kept) {
            (true, true, _) => return Err(damaged("a subcluster is both allocated and zero".into())),
            (true, false, Some(h)) => ExtentKind::Data(h),
            (true, false, None) => return Err(damaged("a subcluster is allocated without a cluster".into())),
            (false, true, _) => ExtentKind::Zero { host: kept },
            (false, false, _) => ExtentKind::Below,
        };
        // The subclusters that follow with the same two bits.
        let all = |set: bool| if set { u32::MAX } else { 0 };
        let other = (bits ^ all(allocated) | zeroes ^ all(zero)) >> sub;
        let alike = u64::from(other.trailing_zeros()).min(self.shape.subs - sub);
        Ok((kind, alike * step - at % step))
    }

    /// The extent at `offset`, at most `len` bytes long. `look` finds the L2 entry of a guest cluster, and how many
    /// clusters up to the given last one have the same.
    pub(super) fn extent(
        &self,
        offset: u64,
        len: u64,
        mut look: impl FnMut(u64, u64) -> io::Result<Option<(Entry, u64)>>,
    ) -> io::Result<Option<Extent>> {
        let end = offset + len;
        let mut first: Option<Extent> = None;
        let (mut at, mut lookups) = (offset, 0);
        while at < end && lookups < LOOKUPS {
            lookups += 1;
            let g = at / self.shape.cluster;
            let Some((entry, alike)) = look(g, (end - 1) / self.shape.cluster)? else { return Ok(first) };
            // Several clusters have the same entry only if it is empty, and so one kind.
            let looked_at = ((g + alike) * self.shape.cluster).min(end);
            while at < looked_at {
                let (kind, n) = self.kind_of(entry, at % self.shape.cluster)?;
                let n = if alike > 1 { looked_at - at } else { n.min(looked_at - at) };
                match &mut first {
                    None => first = Some(Extent { offset: at, len: n, kind }),
                    Some(x) => {
                        let more = match (x.kind, kind) {
                            (ExtentKind::Data(h), ExtentKind::Data(k)) => h + x.len == k,
                            (ExtentKind::Zero { host: a }, ExtentKind::Zero { host: b }) => {
                                a.map(|h| h + x.len) == b
                            }
                            (ExtentKind::Below, ExtentKind::Below) => true,
                            _ => false,
                        };
                        if !more {
                            return Ok(first);
                        }
                        x.len += n;
                    }
                }
                at += n;
            }
        }
        Ok(first)
    }

    /// The extent at `offset`, at most `len` bytes long, from the tables.
    pub(super) fn extent_in(&self, m: &mut Meta, offset: u64, len: u64) -> io::Result<Extent> {
        let found = self.extent(offset, len, |g, last| m.run(g, last, &self.file).map(Some))?;
        found.ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    /// What the image itself says about the disk from `offset` on: a piece of at most `len` bytes, which the next may
    /// continue.
    ///
    /// # Errors
    /// The host's, or what is damaged.
    pub fn map(&self, offset: u64, len: u64) -> io::Result<Extent> {
        crate::check_range(crate::BlockBackend::size(self), offset, len)?;
        self.extent_in(&mut self.meta(), offset, len)
    }
}
