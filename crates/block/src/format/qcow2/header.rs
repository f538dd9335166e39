//! The header of a qcow2 image and its extensions (QEMU docs/interop/qcow2.txt). Everything here is hostile input.

use crate::BlockError;
use crate::storage::FileStorage;
use crate::{SharedSlice, SharedSliceMut};
use std::io;
use std::path::Path;

/// First four bytes.
pub const MAGIC: u32 = 0x5146_49fb;
/// Incompatible feature: refcounts may be wrong (lazy refcounts).
pub const INCOMPAT_DIRTY: u64 = 1 << 0;
/// Incompatible feature: metadata is damaged.
pub const INCOMPAT_CORRUPT: u64 = 1 << 1;
/// Incompatible feature: guest data lies in another file.
pub const INCOMPAT_DATA_FILE: u64 = 1 << 2;
/// Incompatible feature: a compression type other than zlib.
pub const INCOMPAT_COMPRESSION: u64 = 1 << 3;
/// Incompatible feature: L2 entries of 128 bits with subclusters.
pub const INCOMPAT_EXTENDED_L2: u64 = 1 << 4;
const INCOMPAT_KNOWN: u64 = 0x1f;
/// Compatible feature: lazy refcounts may be used.
pub const COMPAT_LAZY: u64 = 1 << 0;
/// Autoclear feature: persistent bitmaps are consistent.
pub const AUTOCLEAR_BITMAPS: u64 = 1 << 0;
/// Autoclear feature: the external data file can be read as a raw image.
pub const AUTOCLEAR_RAW_DATA: u64 = 1 << 1;

const EXT_END: u32 = 0;
/// Extension: the backing file's format.
pub const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
/// Extension: names of feature bits.
pub const EXT_FEATURES: u32 = 0x6803_f857;
/// Extension: persistent bitmaps.
pub const EXT_BITMAPS: u32 = 0x2385_2875;
/// Extension: name of the external data file.
pub const EXT_DATA_FILE: u32 = 0x4441_5441;

/// Largest L1 table, in entries (QEMU's limit of 32 MiB).
pub const MAX_L1: u64 = (32 << 20) / 8;
/// Largest refcount table in bytes (QEMU's limit).
pub const MAX_REFTABLE: u64 = 8 << 20;
/// Most internal snapshots (QEMU's limit).
pub const MAX_SNAPSHOTS: u32 = 65536;
/// Longest backing file name.
pub const MAX_NAME: u32 = 1023;

/// How compressed clusters are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate.
    Zlib,
    /// Zstandard.
    Zstd,
}

impl Compression {
    /// The name in options.
    pub fn name(self) -> &'static str {
        match self {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        }
    }
}

/// A header, checked: all offsets lie on clusters, all sizes inside the limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size, 9 to 21.
    pub cluster_bits: u32,
    /// Virtual size in bytes.
    pub size: u64,
    /// L1 entries.
    pub l1_size: u32,
    /// Where the L1 table is.
    pub l1_offset: u64,
    /// Where the refcount table is.
    pub reftable_offset: u64,
    /// Its length in clusters.
    pub reftable_clusters: u32,
    /// Internal snapshots.
    pub snapshots: u32,
    /// Where their table is.
    pub snapshots_offset: u64,
    /// Incompatible features.
    pub incompatible: u64,
    /// Compatible features.
    pub compatible: u64,
    /// Autoclear features.
    pub autoclear: u64,
    /// log2 of the bits of a refcount.
    pub refcount_order: u32,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// Backing file, as written in the image.
    pub backing: Option<String>,
    /// Its format.
    pub backing_format: Option<String>,
    /// External data file, as written in the image.
    pub data_file: Option<String>,
    /// Other extensions, kept as they are: type and content.
    pub extensions: Vec<(u32, Vec<u8>)>,
    /// Header bytes behind the fields known here.
    pub tail: Vec<u8>,
}

fn be32(b: &[u8], at: usize) -> u32 {
    b.get(at..at + 4).and_then(|s| s.try_into().ok()).map_or(0, u32::from_be_bytes)
}

fn be64(b: &[u8], at: usize) -> u64 {
    b.get(at..at + 8).and_then(|s| s.try_into().ok()).map_or(0, u64::from_be_bytes)
}

impl Header {
    /// Bytes in a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Whether L2 entries have subclusters.
    pub fn extended_l2(&self) -> bool {
        self.incompatible & INCOMPAT_EXTENDED_L2 != 0
    }

    /// Words of 64 bits in an L2 entry.
    pub fn l2_words(&self) -> usize {
        1 + usize::from(self.extended_l2())
    }

    /// Entries in an L2 table.
    pub fn l2_entries(&self) -> u64 {
        self.cluster_size() / (8 * self.l2_words() as u64)
    }

    /// L1 entries that a disk of `size` bytes needs.
    pub fn l1_needed(&self, size: u64) -> u64 {
        size.div_ceil(self.cluster_size() * self.l2_entries())
    }

    /// Bits in a refcount.
    pub fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order
    }

    /// Refcounts in a refcount block.
    pub fn refblock_entries(&self) -> u64 {
        self.cluster_size() * 8 / u64::from(self.refcount_bits())
    }

    /// Read and check the header.
    ///
    /// # Errors
    /// [`BlockError::Damaged`], [`BlockError::Feature`], or the host's.
    pub fn read(storage: &FileStorage) -> Result<Header, BlockError> {
        let path = storage.path();
        let mut first = vec![0; 4096.min(storage.len() as usize)];
        storage
            .read(&[SharedSliceMut::new(&mut first)], 0)
            .map_err(|e| BlockError::host(path, "cannot read the header", e))?;
        // Extensions and the name end where the first cluster does.
        if first.len() >= 24 {
            let bits = be32(&first, 20);
            if (9..=21).contains(&bits) && (1u64 << bits) > first.len() as u64 {
                let len = (1u64 << bits).min(storage.len()) as usize;
                let have = first.len();
                first.resize(len, 0);
                storage
                    .read(&[SharedSliceMut::new(&mut first[have..])], have as u64)
                    .map_err(|e| BlockError::host(path, "cannot read the header", e))?;
            }
        }
        Header::parse(path, &first)
    }

    /// Check the bytes of the first cluster.
    ///
    /// # Errors
    /// [`BlockError::Damaged`] or [`BlockError::Feature`].
    pub fn parse(path: &Path, b: &[u8]) -> Result<Header, BlockError> {
        let bad = |what: String| BlockError::Damaged { path: path.into(), what };
        let no = |what: String| BlockError::Feature { path: path.into(), what };
        if b.len() < 72 || be32(b, 0) != MAGIC {
            return Err(bad("it has no qcow2 header".into()));
        }
        let version = be32(b, 4);
        if !(2..=3).contains(&version) {
            return Err(no(format!("qcow2 version {version}")));
        }
        let cluster_bits = be32(b, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(bad(format!("its cluster size of 2^{cluster_bits} bytes is out of range")));
        }
        let cluster = 1u64 << cluster_bits;
        match be32(b, 32) {
            0 => {}
            1 => return Err(no("AES encryption".into())),
            2 => return Err(no("LUKS encryption".into())),
            other => return Err(no(format!("encryption method {other}"))),
        }
        let v3 = version == 3;
        if v3 && b.len() < 104 {
            return Err(bad("its header is cut short".into()));
        }
        let word = |at| if v3 { be64(b, at) } else { 0 };
        let (incompatible, compatible, autoclear) = (word(72), word(80), word(88));
        let refcount_order = if v3 { be32(b, 96) } else { 4 };
        let header_length = if v3 { be32(b, 100) } else { 72 };
        if refcount_order > 6 {
            return Err(bad(format!("its refcount width of 2^{refcount_order} bits is out of range")));
        }
        if v3 && (header_length < 104 || !header_length.is_multiple_of(8)) || header_length as usize > b.len()
        {
            return Err(bad(format!("its header length of {header_length} is wrong")));
        }
        let compression = match if header_length > 104 { b[104] } else { 0 } {
            0 => Compression::Zlib,
            1 => Compression::Zstd,
            other => return Err(no(format!("compression type {other}"))),
        };
        if (compression != Compression::Zlib) != (incompatible & INCOMPAT_COMPRESSION != 0) {
            return Err(bad("its compression type and feature bit disagree".into()));
        }
        let mut h = Header {
            version,
            cluster_bits,
            size: be64(b, 24),
            l1_size: be32(b, 36),
            l1_offset: be64(b, 40),
            reftable_offset: be64(b, 48),
            reftable_clusters: be32(b, 56),
            snapshots: be32(b, 60),
            snapshots_offset: be64(b, 64),
            incompatible,
            compatible,
            autoclear,
            refcount_order,
            compression,
            backing: None,
            backing_format: None,
            data_file: None,
            extensions: Vec::new(),
            tail: b.get(112..header_length as usize).unwrap_or(&[]).to_vec(),
        };
        h.parse_extensions(b, header_length as usize, path)?;
        let unknown = incompatible & !INCOMPAT_KNOWN;
        if unknown != 0 {
            return Err(no(h.feature_names(unknown)));
        }
        if h.extended_l2() && cluster_bits < 14 {
            return Err(bad("extended L2 entries need clusters of 16 KiB or more".into()));
        }
        let (name_at, name_len) = (be64(b, 8), be32(b, 16));
        if name_at != 0 && name_len != 0 {
            let name = (name_len <= MAX_NAME)
                .then(|| usize::try_from(name_at).ok())
                .flatten()
                .and_then(|at| b.get(at..at.checked_add(name_len as usize)?))
                .ok_or_else(|| bad("the name of its backing file lies outside the header".into()))?;
            let name = std::str::from_utf8(name)
                .map_err(|_| bad("the name of its backing file is not UTF-8".into()))?;
            if name.contains('\0') {
                return Err(bad("the name of its backing file holds a zero byte".into()));
            }
            h.backing = Some(name.into());
        }
        let aligned = |offset: u64, what: &str| {
            if offset.is_multiple_of(cluster) && offset < 1 << 56 {
                Ok(())
            } else {
                Err(bad(format!("the offset of its {what} ({offset:#x}) is wrong")))
            }
        };
        aligned(h.l1_offset, "L1 table")?;
        aligned(h.reftable_offset, "refcount table")?;
        if h.reftable_offset == 0 || (h.l1_offset == 0 && h.l1_size != 0) {
            return Err(bad("a table lies over the header".into()));
        }
        if u64::from(h.reftable_clusters) * cluster > MAX_REFTABLE || h.reftable_clusters == 0 {
            return Err(bad(format!(
                "its refcount table of {} clusters is out of range",
                h.reftable_clusters
            )));
        }
        if u64::from(h.l1_size) > MAX_L1 {
            return Err(bad(format!("its L1 table of {} entries is too large", h.l1_size)));
        }
        if h.size > 1 << 62 || h.l1_needed(h.size) > u64::from(h.l1_size) {
            return Err(bad(format!("its L1 table of {} entries is too small for its size", h.l1_size)));
        }
        if h.snapshots > MAX_SNAPSHOTS {
            return Err(bad(format!("its {} snapshots are too many", h.snapshots)));
        }
        if h.snapshots > 0 {
            aligned(h.snapshots_offset, "snapshot table")?;
        }
        Ok(h)
    }

    fn parse_extensions(&mut self, b: &[u8], start: usize, path: &Path) -> Result<(), BlockError> {
        let bad = |what: &str| BlockError::Damaged { path: path.into(), what: what.into() };
        // A version 2 header is followed by extensions as well, unless the backing name stands there.
        let end = match be64(b, 8) {
            0 => b.len(),
            at => (at as usize).min(b.len()),
        };
        let mut at = start;
        while at + 8 <= end {
            let (kind, len) = (be32(b, at), be32(b, at + 4) as usize);
            if kind == EXT_END {
                break;
            }
            at += 8;
            let data = at.checked_add(len).and_then(|e| b[..end].get(at..e));
            let data = data.ok_or_else(|| bad("a header extension is cut short"))?;
            let text = || {
                std::str::from_utf8(data)
                    .map(String::from)
                    .map_err(|_| bad("a name in its header is not UTF-8"))
            };
            match kind {
                EXT_BACKING_FORMAT => self.backing_format = Some(text()?),
                EXT_DATA_FILE => self.data_file = Some(text()?),
                _ => self.extensions.push((kind, data.to_vec())),
            }
            at += len.next_multiple_of(8);
        }
        Ok(())
    }

    /// Names of incompatible features, as the image itself gives them.
    fn feature_names(&self, bits: u64) -> String {
        let table =
            self.extensions.iter().find(|e| e.0 == EXT_FEATURES).map(|e| e.1.as_slice()).unwrap_or(&[]);
        let name = |bit: u32| {
            let entry = table.chunks_exact(48).find(|e| e[0] == 0 && u32::from(e[1]) == bit);
            match entry {
                Some(e) => {
                    let text: Vec<u8> = e[2..].iter().copied().take_while(|&c| c != 0).collect();
                    String::from_utf8_lossy(&text).chars().filter(|c| !c.is_control()).collect()
                }
                None => format!("incompatible feature bit {bit}"),
            }
        };
        let names: Vec<String> = (0..64).filter(|b| bits >> b & 1 != 0).map(name).collect();
        names.join(", ")
    }

    /// The first cluster's content.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] when names and extensions do not fit into the cluster.
    pub fn to_bytes(&self) -> io::Result<Vec<u8>> {
        let mut b = Vec::with_capacity(512);
        let header_length: u32 = match self.version {
            2 => 72,
            _ => 112 + self.tail.len() as u32,
        };
        let mut exts = Vec::new();
        let mut ext = |kind: u32, data: &[u8]| {
            exts.extend_from_slice(&kind.to_be_bytes());
            exts.extend_from_slice(&(data.len() as u32).to_be_bytes());
            exts.extend_from_slice(data);
            exts.resize(exts.len().next_multiple_of(8), 0);
        };
        if let (Some(f), Some(_)) = (&self.backing_format, &self.backing) {
            ext(EXT_BACKING_FORMAT, f.as_bytes());
        }
        if let Some(f) = &self.data_file {
            ext(EXT_DATA_FILE, f.as_bytes());
        }
        let name = self.backing.as_deref().unwrap_or("").as_bytes();
        let lengths = self.extensions.iter().map(|e| 8 + e.1.len().next_multiple_of(8));
        let names = [&self.backing_format, &self.data_file]
            .map(|n| n.as_ref().map_or(0, |n| 8 + n.len().next_multiple_of(8)));
        let all =
            header_length as usize + lengths.sum::<usize>() + names.iter().sum::<usize>() + 8 + name.len();
        // In the smallest clusters the table of feature names, which is for people only, makes way.
        let crowded = all > self.cluster_size() as usize;
        for (kind, data) in self.extensions.iter().filter(|e| !crowded || e.0 != EXT_FEATURES) {
            ext(*kind, data);
        }
        ext(EXT_END, &[]);
        let name_at = if name.is_empty() { 0 } else { u64::from(header_length) + exts.len() as u64 };
        if header_length as usize + exts.len() + name.len() > self.cluster_size() as usize
            || name.len() > MAX_NAME as usize
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the backing file's name does not fit into the header",
            ));
        }
        b.extend_from_slice(&MAGIC.to_be_bytes());
        b.extend_from_slice(&self.version.to_be_bytes());
        b.extend_from_slice(&name_at.to_be_bytes());
        b.extend_from_slice(&(name.len() as u32).to_be_bytes());
        b.extend_from_slice(&self.cluster_bits.to_be_bytes());
        b.extend_from_slice(&self.size.to_be_bytes());
        b.extend_from_slice(&0u32.to_be_bytes());
        b.extend_from_slice(&self.l1_size.to_be_bytes());
        b.extend_from_slice(&self.l1_offset.to_be_bytes());
        b.extend_from_slice(&self.reftable_offset.to_be_bytes());
        b.extend_from_slice(&self.reftable_clusters.to_be_bytes());
        b.extend_from_slice(&self.snapshots.to_be_bytes());
        b.extend_from_slice(&self.snapshots_offset.to_be_bytes());
        if self.version >= 3 {
            b.extend_from_slice(&self.incompatible.to_be_bytes());
            b.extend_from_slice(&self.compatible.to_be_bytes());
            b.extend_from_slice(&self.autoclear.to_be_bytes());
            b.extend_from_slice(&self.refcount_order.to_be_bytes());
            b.extend_from_slice(&header_length.to_be_bytes());
            b.push(u8::from(self.compression == Compression::Zstd));
            b.extend_from_slice(&[0; 7]);
            b.extend_from_slice(&self.tail);
        }
        b.extend_from_slice(&exts);
        b.extend_from_slice(name);
        Ok(b)
    }

    /// Write the header, filled up with zeroes to 512 bytes at least.
    ///
    /// # Errors
    /// As for [`to_bytes`](Self::to_bytes), or the host's.
    pub fn write(&self, storage: &FileStorage) -> io::Result<()> {
        let mut b = self.to_bytes()?;
        b.resize(b.len().next_multiple_of(512), 0);
        storage.write(&[SharedSlice::new(&b)], 0)
    }

    /// The table of feature names that QEMU puts into images of version 3.
    pub fn feature_table() -> (u32, Vec<u8>) {
        let names: [(u8, u8, &str); 8] = [
            (0, 0, "dirty bit"),
            (0, 1, "corrupt bit"),
            (0, 2, "external data file"),
            (0, 3, "compression type"),
            (0, 4, "extended L2 entries"),
            (1, 0, "lazy refcounts"),
            (2, 0, "bitmaps"),
            (2, 1, "raw external data"),
        ];
        let mut data = Vec::new();
        for (kind, bit, name) in names {
            data.extend_from_slice(&[kind, bit]);
            data.extend_from_slice(name.as_bytes());
            data.resize(data.len().next_multiple_of(48), 0);
        }
        (EXT_FEATURES, data)
    }
}
