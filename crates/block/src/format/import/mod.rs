//! Formats that are only read, to be converted: VMDK, VHD, VHDX, VDI.
//!
//! Each says where a piece of the disk lies; reading is common to all. Tables are read when they are needed and entry by
//! entry, so that an image cannot make anybody allocate by its say-so. Everything is hostile input.

pub mod vdi;
pub mod vhd;
pub mod vhdx;
pub mod vmdk;

use super::{Chain, Format, ImageOptions};
use crate::storage::FileStorage;
use crate::{
    BlockBackend, BlockError, Limits, SECTOR_SIZE, SharedSlice, SharedSliceMut, Status, check_range, scatter,
    slice_of_mut, total_mut,
};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

/// Where a piece of the disk lies.
enum Place<'a> {
    /// In a file, from this offset on.
    Data(&'a FileStorage, u64),
    /// Nowhere: it reads as zeroes.
    Zero,
    /// It is what the disk below holds, or zeroes.
    Below,
    /// In a compressed unit.
    Packed(Unit<'a>),
}

/// A compressed unit.
struct Unit<'a> {
    file: &'a FileStorage,
    /// Where in the file.
    at: u64,
    /// Offset of the unit's first byte on the disk.
    start: u64,
    /// Bytes of the unit, unpacked.
    len: u64,
}

/// What a format knows.
trait Layout: Send + Sync {
    fn format(&self) -> Format;
    /// Bytes of the disk, a multiple of 512.
    fn size(&self) -> u64;
    /// Where the piece at `offset` lies, and its length: not zero, at most `len`. The range lies on the disk.
    fn find(&self, offset: u64, len: u64) -> io::Result<(u64, Place<'_>)>;
    /// Unpack a unit.
    fn unpack(&self, _unit: &Unit<'_>) -> io::Result<Vec<u8>> {
        Err(io::ErrorKind::Unsupported.into())
    }
    /// The disk below.
    fn backing(&self) -> Option<&Arc<dyn BlockBackend>> {
        None
    }
}

/// Open an image for reading.
pub(super) fn open(
    storage: FileStorage,
    format: Format,
    options: &ImageOptions,
    chain: &Chain,
) -> Result<Arc<dyn BlockBackend>, BlockError> {
    if !options.read_only {
        return Err(BlockError::OnlyRead { path: storage.path().into(), format: format.name() });
    }
    let layout: Box<dyn Layout> = match format {
        Format::Vmdk => Box::new(vmdk::Vmdk::open(storage, options, chain)?),
        Format::Vpc => Box::new(vhd::Vhd::open(storage)?),
        Format::Vhdx => Box::new(vhdx::Vhdx::open(storage)?),
        Format::Vdi => Box::new(vdi::Vdi::open(storage)?),
        Format::Raw | Format::Qcow2 => {
            return Err(BlockError::Format { path: storage.path().into(), found: format.name() });
        }
    };
    Ok(Arc::new(Import { layout, unpacked: Mutex::new(None) }))
}

/// An image of one of these formats.
struct Import {
    layout: Box<dyn Layout>,
    /// The unit unpacked last, by its place on the disk.
    unpacked: Mutex<Option<(u64, Arc<[u8]>)>>,
}

impl Import {
    fn read_piece(&self, bufs: &[SharedSliceMut<'_>], offset: u64, place: &Place<'_>) -> io::Result<()> {
        let len = total_mut(bufs);
        match place {
            Place::Zero => bufs.iter().for_each(SharedSliceMut::zero),
            Place::Below => {
                let backing = self.layout.backing();
                let there = backing.map_or(0, |b| b.size().saturating_sub(offset).min(len));
                if let (Some(b), true) = (backing, there > 0) {
                    b.read_at(&slice_of_mut(bufs, 0, there), offset)?;
                }
                slice_of_mut(bufs, there, len - there).iter().for_each(SharedSliceMut::zero);
            }
            Place::Data(file, at) => {
                let there = self.there(file, *at, len)?;
                file.read(&slice_of_mut(bufs, 0, there), *at)?;
                slice_of_mut(bufs, there, len - there).iter().for_each(SharedSliceMut::zero);
            }
            Place::Packed(unit) => {
                let data = self.unit(unit)?;
                let from = (offset - unit.start) as usize;
                scatter(bufs, &data[from..from + len as usize]);
            }
        }
        Ok(())
    }

    /// The bytes of a piece that the file holds. Of VMDK's last grain the part that was never written is left out; others
    /// write whole blocks.
    fn there(&self, file: &FileStorage, at: u64, len: u64) -> io::Result<u64> {
        let there = file.len().saturating_sub(at).min(len);
        if there == 0 || there < len && self.layout.format() != Format::Vmdk {
            return Err(self.damaged(format!("data at {at:#x} lies behind its end: it has been cut short")));
        }
        Ok(there)
    }

    fn unit(&self, unit: &Unit<'_>) -> io::Result<Arc<[u8]>> {
        let kept = self.unpacked.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some((_, data)) = kept.filter(|(start, _)| *start == unit.start) {
            return Ok(data);
        }
        let data: Arc<[u8]> = self.layout.unpack(unit)?.into();
        if (data.len() as u64) < unit.len {
            return Err(self.damaged(format!("a compressed piece at {:#x} is too short", unit.at)));
        }
        *self.unpacked.lock().unwrap_or_else(PoisonError::into_inner) = Some((unit.start, data.clone()));
        Ok(data)
    }

    fn damaged(&self, what: String) -> io::Error {
        damaged(self.layout.format(), what)
    }
}

/// What is wrong with an image, found while it is read.
fn damaged(format: Format, what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the {} image is damaged: {what}", format.name()))
}

impl BlockBackend for Import {
    fn size(&self) -> u64 {
        self.layout.size()
    }
    fn read_only(&self) -> bool {
        true
    }
    fn limits(&self) -> Limits {
        Limits { block_size: 512, physical_block_size: 4096, discard_granularity: 4096, discard: false }
    }
    fn read_at(&self, bufs: &[SharedSliceMut<'_>], offset: u64) -> io::Result<()> {
        let len = total_mut(bufs);
        check_range(self.size(), offset, len)?;
        let mut done = 0;
        while done < len {
            let (n, place) = self.layout.find(offset + done, len - done)?;
            self.read_piece(&slice_of_mut(bufs, done, n), offset + done, &place)?;
            done += n;
        }
        Ok(())
    }
    fn write_at(&self, _: &[SharedSlice<'_>], _: u64) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EROFS))
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EROFS))
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EROFS))
    }
    fn status(&self, offset: u64, len: u64) -> io::Result<Status> {
        check_range(self.size(), offset, len)?;
        let (n, place) = self.layout.find(offset, len)?;
        let here = Status {
            len: n,
            zero: false,
            data: true,
            compressed: false,
            present: true,
            depth: 0,
            offset: None,
        };
        Ok(match place {
            Place::Zero => Status { zero: true, data: false, ..here },
            Place::Packed(_) => Status { compressed: true, ..here },
            Place::Data(file, at) => {
                self.there(file, at, n)?;
                let (n, data) = file.extent(at, n)?;
                Status { len: n, zero: !data, offset: Some(at), ..here }
            }
            Place::Below => match self.layout.backing() {
                Some(b) if b.size() > offset => {
                    let below = b.status(offset, n.min(b.size() - offset))?;
                    Status { depth: below.depth + 1, ..below }
                }
                _ => Status { zero: true, data: false, present: false, ..here },
            },
        })
    }
}

/// A size in bytes that a disk can have.
fn disk_size(bytes: u64) -> Option<u64> {
    bytes.checked_next_multiple_of(SECTOR_SIZE).filter(|s| *s <= i64::MAX as u64)
}

/// Read `N` bytes at `offset`.
fn bytes<const N: usize>(file: &FileStorage, offset: u64) -> io::Result<[u8; N]> {
    let mut b = [0; N];
    file.read(&[SharedSliceMut::new(&mut b)], offset)?;
    Ok(b)
}

fn le32(b: &[u8], at: usize) -> u32 {
    b.get(at..at + 4).and_then(|s| s.try_into().ok()).map_or(0, u32::from_le_bytes)
}
fn le64(b: &[u8], at: usize) -> u64 {
    b.get(at..at + 8).and_then(|s| s.try_into().ok()).map_or(0, u64::from_le_bytes)
}
fn be32(b: &[u8], at: usize) -> u32 {
    b.get(at..at + 4).and_then(|s| s.try_into().ok()).map_or(0, u32::from_be_bytes)
}
fn be64(b: &[u8], at: usize) -> u64 {
    b.get(at..at + 8).and_then(|s| s.try_into().ok()).map_or(0, u64::from_be_bytes)
}
