//! VDI, VirtualBox's format (VDICore.h of VirtualBox; QEMU block/vdi.c names the same fields).

use super::{Layout, Place, bytes, disk_size, le32, le64};
use crate::BlockError;
use crate::format::Format;
use crate::storage::FileStorage;
use std::io;

/// A block that is nowhere, and one that was thrown away: both read as zeroes.
const UNUSED: u32 = 0xffff_fffe;

/// An open image.
pub struct Vdi {
    file: FileStorage,
    size: u64,
    block: u64,
    /// Bytes in front of each block's data.
    extra: u64,
    map: u64,
    data: u64,
}

impl Vdi {
    /// Read and check the header.
    pub fn open(file: FileStorage) -> Result<Vdi, BlockError> {
        let path = file.path();
        let bad = |what: String| BlockError::Broken { path: path.into(), format: "vdi", what };
        let no = |what: String| BlockError::Feature { path: path.into(), what };
        if file.len() < 512 {
            return Err(bad("it has no header".into()));
        }
        let h: [u8; 512] = bytes(&file, 0).map_err(|e| BlockError::host(path, "cannot read", e))?;
        if le32(&h, 0x40) != 0xbeda_107f {
            return Err(bad("it has no VDI signature".into()));
        }
        let version = le32(&h, 0x44);
        if version != 0x0001_0001 {
            return Err(no(format!("VDI version {}.{}", version >> 16, version & 0xffff)));
        }
        match le32(&h, 0x4c) {
            1 | 2 => {}
            3 => return Err(no("a VDI undo image".into())),
            4 => return Err(no("a VDI differencing image".into())),
            other => return Err(bad(format!("its type {other} is unknown"))),
        }
        if h[0x1a8..0x1c8].iter().any(|b| *b != 0) {
            return Err(no("a VDI image that stands on another one".into()));
        }
        let block = u64::from(le32(&h, 0x178));
        let blocks = u64::from(le32(&h, 0x180));
        let size = disk_size(le64(&h, 0x170)).ok_or_else(|| bad("its size is out of range".into()))?;
        if !block.is_power_of_two() || !(512..=1 << 30).contains(&block) || le32(&h, 0x168) != 512 {
            return Err(bad(format!("its block size of {block} bytes is out of range")));
        }
        if blocks * block < size {
            return Err(bad(format!("its {blocks} blocks are too few for its size")));
        }
        let vdi = Vdi {
            size,
            block,
            extra: u64::from(le32(&h, 0x17c)),
            map: u64::from(le32(&h, 0x154)),
            data: u64::from(le32(&h, 0x158)),
            file,
        };
        if vdi.map < 512 || vdi.map + size.div_ceil(block) * 4 > vdi.file.len() {
            return Err(BlockError::Broken {
                path: vdi.file.path().into(),
                format: "vdi",
                what: "its block map lies outside the file".into(),
            });
        }
        Ok(vdi)
    }
}

impl Layout for Vdi {
    fn format(&self) -> Format {
        Format::Vdi
    }
    fn size(&self) -> u64 {
        self.size
    }
    fn find(&self, offset: u64, len: u64) -> io::Result<(u64, Place<'_>)> {
        let (i, within) = (offset / self.block, offset % self.block);
        let n = (self.block - within).min(len);
        let entry = le32(&bytes::<4>(&self.file, self.map + i * 4)?, 0);
        Ok(if entry >= UNUSED {
            (n, Place::Below)
        } else {
            let at = self.data + u64::from(entry) * (self.block + self.extra) + self.extra + within;
            (n, Place::Data(&self.file, at))
        })
    }
}
