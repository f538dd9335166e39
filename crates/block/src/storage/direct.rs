//! Direct I/O (O_DIRECT) for callers whose buffers and offsets are not aligned.
//!
//! The kernel wants memory, offset and length to be multiples of the device's block. What is not goes through an
//! aligned copy; a write that covers blocks in part reads them first. Such a read-modify-write excludes all other
//! writes, so that a neighbour's bytes in the same block are not put back to what they were.

use super::file::{read_fd, read_some, write_fd};
use crate::gate::{Gate, Hold};
use crate::{SharedSlice, SharedSliceMut, gather, scatter, slice_of, slice_of_mut, total, total_mut};
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::fs::File;
use std::io;

/// The largest aligned copy, in bytes: longer requests are done in pieces.
const CHUNK: u64 = 256 << 10;

/// An aligned buffer.
struct Bounce {
    ptr: *mut u8,
    layout: Layout,
}

impl Bounce {
    fn new(len: usize, align: usize) -> io::Result<Bounce> {
        let layout = Layout::from_size_align(len.max(align), align)
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e.to_string()))?;
        // SAFETY: the layout's size is not zero.
        let ptr = unsafe { alloc_zeroed(layout) };
        if ptr.is_null() {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        Ok(Bounce { ptr, layout })
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the allocation is initialised, of this size, and borrowed through `self`.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.layout.size()) }
    }
}

impl Drop for Bounce {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.ptr, self.layout) };
    }
}

/// Fill `area` from `at` on, both aligned, as far as the file reaches; gives the bytes. What is behind is zero.
fn read_block(file: &File, area: &mut [u8], at: u64) -> io::Result<usize> {
    let there = file.metadata().map(|m| m.len())?;
    let mut done = 0;
    while done < area.len() {
        let rest = SharedSliceMut::new(&mut area[done..]);
        match read_some(file, &rest, at + done as u64)? {
            0 => break,
            n => done += n,
        }
        // After a short read the next would not be aligned: that was the end.
        if at + done as u64 >= there && there > 0 {
            break;
        }
    }
    area[done..].fill(0);
    Ok(done)
}

/// Aligned access to a file opened with O_DIRECT. The file may end inside a block: a read of that block is short, and a
/// write of it is cut back to where the data ends.
pub struct Direct {
    align: u64,
    order: Gate,
}

impl Direct {
    pub fn new(align: u64) -> Direct {
        Direct { align, order: Gate::default() }
    }

    pub fn align(&self) -> u64 {
        self.align
    }

    /// Keep whoever reads, changes and writes blocks out, for a write of whole blocks; `None` while one is in.
    pub fn share(&self) -> Option<Hold> {
        self.order.try_share()
    }

    /// Keep all other writes out, while the file's length changes.
    pub fn alone(&self) -> impl Drop + '_ {
        self.order.alone()
    }

    fn fits<'a>(&self, offset: u64, mut parts: impl Iterator<Item = (usize, usize)> + 'a) -> bool {
        let mask = self.align - 1;
        offset & mask == 0 && parts.all(|(addr, len)| (addr as u64 | len as u64) & mask == 0)
    }

    pub fn read(&self, file: &File, bufs: &[SharedSliceMut<'_>], offset: u64) -> io::Result<()> {
        if self.fits(offset, bufs.iter().map(|b| (b.addr(), b.len()))) {
            return read_fd(file, bufs, offset);
        }
        let (mut done, len) = (0, total_mut(bufs));
        while done < len {
            let (at, head, want, span) = self.window(offset + done, len - done);
            let mut bounce = Bounce::new(span as usize, self.align as usize)?;
            let area = &mut bounce.bytes()[..span as usize];
            if read_block(file, area, at)? < (head + want) as usize {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the image has become shorter"));
            }
            scatter(&slice_of_mut(bufs, done, want), &area[head as usize..(head + want) as usize]);
            done += want;
        }
        Ok(())
    }

    pub fn write(&self, file: &File, bufs: &[SharedSlice<'_>], offset: u64) -> io::Result<()> {
        if self.fits(offset, bufs.iter().map(|b| (b.addr(), b.len()))) {
            let _shared = self.order.share();
            return write_fd(file, bufs, offset);
        }
        let (mut done, len) = (0, total(bufs));
        while done < len {
            let (at, head, want, span) = self.window(offset + done, len - done);
            let mut bounce = Bounce::new(span as usize, self.align as usize)?;
            let area = &mut bounce.bytes()[..span as usize];
            let part = slice_of(bufs, done, want);
            if want == span {
                gather(&part, area);
                let _shared = self.order.share();
                write_fd(file, &[SharedSlice::new(area)], at)?;
            } else {
                let _alone = self.order.alone();
                let there = read_block(file, area, at)?;
                gather(&part, &mut area[head as usize..(head + want) as usize]);
                write_fd(file, &[SharedSlice::new(area)], at)?;
                let end = there.max((head + want) as usize);
                if end < area.len() {
                    file.set_len(at + end as u64)?;
                }
            }
            done += want;
        }
        Ok(())
    }

    /// The aligned window for the next piece: its offset, the bytes before the piece, the piece, the window's length.
    fn window(&self, offset: u64, left: u64) -> (u64, u64, u64, u64) {
        let at = offset & !(self.align - 1);
        let head = offset - at;
        let want = left.min(CHUNK.max(self.align) - head);
        (at, head, want, (head + want).next_multiple_of(self.align))
    }
}
