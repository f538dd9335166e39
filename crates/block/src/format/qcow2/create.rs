//! Making new images.

use super::header::{
    AUTOCLEAR_RAW_DATA, COMPAT_LAZY, Compression, Header, INCOMPAT_COMPRESSION, INCOMPAT_DATA_FILE,
    INCOMPAT_EXTENDED_L2,
};
use super::table::Table;
use crate::storage::FileStorage;
use crate::{SECTOR_SIZE, SharedSlice};
use std::io;

/// What a new image is like.
#[derive(Debug, Clone)]
pub struct CreateOptions {
    /// Virtual size in bytes.
    pub size: u64,
    /// 2 or 3.
    pub version: u32,
    /// Cluster size in bytes: a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
    /// Bits of a refcount: a power of two from 1 to 64; 16 in version 2.
    pub refcount_bits: u32,
    /// Refcounts may be brought up to date late by programs that do so.
    pub lazy_refcounts: bool,
    /// L2 entries with 32 subclusters.
    pub extended_l2: bool,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// Backing file as it is to be written into the image.
    pub backing: Option<String>,
    /// Its format.
    pub backing_format: Option<String>,
    /// External data file as it is to be written into the image.
    pub data_file: Option<String>,
    /// The data file is to be readable as a raw image.
    pub data_file_raw: bool,
}

impl Default for CreateOptions {
    fn default() -> Self {
        CreateOptions {
            size: 0,
            version: 3,
            cluster_size: 64 << 10,
            refcount_bits: 16,
            lazy_refcounts: false,
            extended_l2: false,
            compression: Compression::Zlib,
            backing: None,
            backing_format: None,
            data_file: None,
            data_file_raw: false,
        }
    }
}

impl CreateOptions {
    /// The header of such an image, with its tables right behind it.
    ///
    /// # Errors
    /// What does not go together, in words.
    pub fn header(&self) -> Result<Header, String> {
        if !self.cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&self.cluster_size) {
            return Err("Cluster size must be a power of two between 512 and 2048k".into());
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return Err("Refcount width must be a power of two and may not exceed 64 bits".into());
        }
        if self.version == 2 {
            if self.refcount_bits != 16 {
                return Err("Different refcount widths than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)".into());
            }
            let newer = [
                (
                    self.lazy_refcounts,
                    "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)",
                ),
                (
                    self.extended_l2,
                    "Extended L2 entries are only supported with compatibility level 1.1 and above (use version=v3 or greater)",
                ),
                (
                    self.compression != Compression::Zlib,
                    "Non-zlib compression type is only supported with compatibility level 1.1 and above (use version=v3 or greater)",
                ),
                (
                    self.data_file.is_some(),
                    "External data files are only supported with compatibility level 1.1 and above (use version=v3 or greater)",
                ),
            ];
            if let Some((_, why)) = newer.iter().find(|n| n.0) {
                return Err((*why).into());
            }
        }
        if self.extended_l2 && self.cluster_size < 16 << 10 {
            return Err(
                "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes".into()
            );
        }
        if self.data_file_raw && self.data_file.is_none() {
            return Err("data-file-raw requires data-file".into());
        }
        if self.data_file_raw && self.backing.is_some() {
            return Err("Backing file and data-file-raw cannot be used at the same time".into());
        }
        let bit = |on: bool, bit: u64| if on { bit } else { 0 };
        let mut h = Header {
            version: self.version,
            cluster_bits: self.cluster_size.trailing_zeros(),
            size: self.size.next_multiple_of(SECTOR_SIZE),
            l1_size: 0,
            l1_offset: 0,
            reftable_offset: self.cluster_size,
            reftable_clusters: 1,
            snapshots: 0,
            snapshots_offset: 0,
            incompatible: bit(self.extended_l2, INCOMPAT_EXTENDED_L2)
                | bit(self.compression != Compression::Zlib, INCOMPAT_COMPRESSION)
                | bit(self.data_file.is_some(), INCOMPAT_DATA_FILE),
            compatible: bit(self.lazy_refcounts, COMPAT_LAZY),
            autoclear: bit(self.data_file_raw, AUTOCLEAR_RAW_DATA),
            refcount_order: self.refcount_bits.trailing_zeros(),
            compression: self.compression,
            backing: self.backing.clone(),
            backing_format: self.backing_format.clone(),
            data_file: self.data_file.clone(),
            extensions: if self.version >= 3 { vec![Header::feature_table()] } else { Vec::new() },
            tail: Vec::new(),
        };
        let l1 = h.l1_needed(h.size);
        if self.size > 1 << 62 || l1 > super::header::MAX_L1 {
            return Err(
                "The image size is too large for file format 'qcow2' (try using a larger cluster size)"
                    .into(),
            );
        }
        h.l1_size = l1 as u32;
        Ok(h)
    }
}

/// Write an empty image into `storage`, which holds nothing yet.
///
/// # Errors
/// [`io::ErrorKind::InvalidInput`] with what does not go together, or the host's.
pub fn create(storage: &FileStorage, options: &CreateOptions) -> io::Result<()> {
    let invalid = |e: String| io::Error::new(io::ErrorKind::InvalidInput, e);
    let mut h = options.header().map_err(invalid)?;
    let (cluster, per) = (h.cluster_size(), h.refblock_entries());
    // Header, refcount table, refcount blocks, L1 table. A table of blocks for everything up to here suffices.
    let l1 = (u64::from(h.l1_size) * 8).div_ceil(cluster).max(1);
    let (mut table, mut blocks) = (1, 1);
    loop {
        let used = 1 + table + blocks + l1;
        let (b, t) = (used.div_ceil(per), (used.div_ceil(per) * 8).div_ceil(cluster));
        if b <= blocks && t <= table {
            break;
        }
        (blocks, table) = (blocks.max(b), table.max(t));
    }
    let first_block = 1 + table;
    h.reftable_clusters = table as u32;
    h.l1_offset = (first_block + blocks) * cluster;
    let used = first_block + blocks + l1;
    let mut reftable = vec![0; (table * cluster) as usize];
    for b in 0..blocks {
        let mut t = Table::new((first_block + b) * cluster, cluster as usize);
        for i in 0..per.min(used - b * per) {
            t.set_refcount(i as usize, h.refcount_order, 1);
        }
        write_front(storage, t.bytes(), t.offset)?;
        reftable[b as usize * 8..][..8].copy_from_slice(&t.offset.to_be_bytes());
    }
    write_front(storage, &reftable, cluster)?;
    h.write(storage)?;
    // The L1 table, and the rest of each cluster, are zeroes.
    storage.resize(used * cluster)
}

/// Write a table up to its last block that holds something.
fn write_front(storage: &FileStorage, table: &[u8], offset: u64) -> io::Result<()> {
    let end =
        table.iter().rposition(|b| *b != 0).map_or(0, |p| (p + 1).next_multiple_of(4096).min(table.len()));
    storage.write(&[SharedSlice::new(&table[..end])], offset)
}
