//! VHD, the format of Virtual PC (Microsoft, Virtual Hard Disk Image Format Specification 1.0). QEMU calls it vpc.

use super::{Layout, Place, be32, be64, bytes, disk_size};
use crate::BlockError;
use crate::format::Format;
use crate::storage::FileStorage;
use std::io;

/// A block that is nowhere.
const UNUSED: u32 = 0xffff_ffff;

/// An open image.
pub struct Vhd {
    file: FileStorage,
    size: u64,
    dynamic: Option<Dynamic>,
}

struct Dynamic {
    table: u64,
    entries: u64,
    block: u64,
    /// Bytes of the bitmap in front of each block's data.
    bitmap: u64,
}

/// The complement of the sum of all bytes but those of the sum itself.
fn checksum(b: &[u8], at: usize) -> u32 {
    let sum = b.iter().enumerate().filter(|(i, _)| !(at..at + 4).contains(i));
    !sum.fold(0u32, |s, (_, x)| s.wrapping_add(u32::from(*x)))
}

fn is_footer(f: &[u8]) -> bool {
    f.starts_with(b"conectix") && checksum(f, 0x40) == be32(f, 0x40)
}

/// Bytes of the disk. Virtual PC counts in cylinders, heads and sectors, others in bytes (creator application, and the
/// largest geometry, which stands for "more").
fn virtual_size(f: &[u8]) -> Option<u64> {
    let (cylinders, heads, sectors) =
        (u64::from(f[0x38]) << 8 | u64::from(f[0x39]), u64::from(f[0x3a]), u64::from(f[0x3b]));
    let geometry = cylinders * heads * sectors;
    let by_geometry = matches!(&f[0x1c..0x20], b"vpc " | b"qemu") && geometry < 65535 * 16 * 255;
    disk_size(if by_geometry { geometry * 512 } else { be64(f, 0x30) })
}

impl Vhd {
    /// Read and check footer and header.
    pub fn open(file: FileStorage) -> Result<Vhd, BlockError> {
        let path = file.path();
        let bad = |what: &str| BlockError::Broken { path: path.into(), format: "vpc", what: what.into() };
        let host = |e| BlockError::host(path, "cannot read", e);
        if file.len() < 512 {
            return Err(bad("it has no footer"));
        }
        // One copy in front (not for fixed disks), one at the end.
        let (first, last) =
            (bytes::<512>(&file, 0).map_err(host)?, bytes::<512>(&file, file.len() - 512).map_err(host)?);
        let f = [first, last]
            .into_iter()
            .find(|f| is_footer(f))
            .ok_or_else(|| bad("neither its beginning nor its end is a footer with a right checksum"))?;
        let size = virtual_size(&f).ok_or_else(|| bad("its size is out of range"))?;
        let dynamic = match be32(&f, 0x3c) {
            2 => None,
            3 => Some(be64(&f, 0x10)),
            4 => {
                return Err(BlockError::Feature {
                    path: path.into(),
                    what: "a differencing VHD, which stands on another one".into(),
                });
            }
            _ => return Err(bad("its disk type is unknown")),
        };
        let Some(at) = dynamic else {
            if size > file.len() - 512 {
                return Err(bad("it is shorter than its disk: it has been cut short"));
            }
            return Ok(Vhd { file, size, dynamic: None });
        };
        if at.checked_add(1024).is_none_or(|end| end > file.len()) {
            return Err(bad("its header lies outside the file"));
        }
        let h: [u8; 1024] = bytes(&file, at).map_err(host)?;
        if !h.starts_with(b"cxsparse") || checksum(&h, 0x24) != be32(&h, 0x24) {
            return Err(bad("its header has a wrong signature or checksum"));
        }
        let (table, entries, block) = (be64(&h, 0x10), u64::from(be32(&h, 0x1c)), u64::from(be32(&h, 0x20)));
        if !block.is_power_of_two() || !(512..=1 << 30).contains(&block) {
            return Err(bad("its block size is out of range"));
        }
        if entries * block < size {
            return Err(bad("its block table is too small for its size"));
        }
        if table.checked_add(entries * 4).is_none_or(|end| end > file.len()) {
            return Err(bad("its block table lies outside the file"));
        }
        let bitmap = (block / 512).div_ceil(8).next_multiple_of(512);
        Ok(Vhd { file, size, dynamic: Some(Dynamic { table, entries, block, bitmap }) })
    }
}

impl Layout for Vhd {
    fn format(&self) -> Format {
        Format::Vpc
    }
    fn size(&self) -> u64 {
        self.size
    }
    fn find(&self, offset: u64, len: u64) -> io::Result<(u64, Place<'_>)> {
        let Some(d) = &self.dynamic else { return Ok((len, Place::Data(&self.file, offset))) };
        let (i, within) = (offset / d.block, offset % d.block);
        let n = (d.block - within).min(len);
        if i >= d.entries {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let entry = be32(&bytes::<4>(&self.file, d.table + i * 4)?, 0);
        // The bitmap in front says which sectors were written; the others are zeroes in the data as well.
        Ok(match entry {
            UNUSED => (n, Place::Below),
            sector => (n, Place::Data(&self.file, u64::from(sector) * 512 + d.bitmap + within)),
        })
    }
}
