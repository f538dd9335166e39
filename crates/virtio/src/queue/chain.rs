//! A descriptor chain as checked buffers.

use super::{QueueError, pages};
use ringfort_block::{SharedSlice, SharedSliceMut};
use ringfort_memory::RamMap;
use std::sync::Arc;

/// A piece of guest RAM, contiguous in the host.
#[derive(Debug, Clone, Copy)]
pub(super) struct Segment {
    pub host: *mut u8,
    pub len: u64,
    /// Slot number in the RAM map, and offset in it.
    slot: usize,
    offset: u64,
}

impl Segment {
    /// `len` bytes at `address`, if they lie in one slot.
    pub fn find(ram: &RamMap, address: u64, len: u64) -> Option<Segment> {
        Segment::find_first(ram, address, len).filter(|s| s.len == len)
    }

    /// As much of `len` bytes at `address` as the slot has that holds the first of them.
    fn find_first(ram: &RamMap, address: u64, len: u64) -> Option<Segment> {
        let (slot, s) =
            ram.slots().iter().enumerate().find(|(_, s)| address.wrapping_sub(s.base) < s.size)?;
        let offset = address - s.base;
        // SAFETY: `offset` is below the slot's size, so the pointer stays inside its mapping.
        let host = unsafe { s.host.add(offset as usize) };
        Some(Segment { host, len: len.min(s.size - offset), slot, offset })
    }

    /// Report a write of `len` bytes at `at` in this segment.
    pub fn mark(&self, ram: &RamMap, at: u64, len: u64) {
        if len > 0
            && let Some(slot) = ram.slots().get(self.slot)
        {
            for page in pages(self.offset + at, len) {
                slot.tracker.note_write(page);
            }
        }
    }
}

/// One request of the driver: buffers that the device reads, then buffers that it writes. All of them lie in RAM.
///
/// Offsets count through the readable or the writable bytes as if they were one buffer each, since the driver is free
/// in how it cuts them up (virtio 1.3 section 2.7.4).
#[derive(Debug)]
pub struct Chain {
    head: u16,
    ram: Arc<RamMap>,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
    read_len: u64,
    write_len: u64,
}

// SAFETY: the segments point into RAM that `ram` holds alive; they are only accessed by raw copies.
unsafe impl Send for Chain {}

impl Chain {
    pub(super) fn new(head: u16, ram: Arc<RamMap>) -> Chain {
        Chain { head, ram, readable: Vec::new(), writable: Vec::new(), read_len: 0, write_len: 0 }
    }

    pub(super) fn has_writable(&self) -> bool {
        !self.writable.is_empty()
    }

    pub(super) fn add(&mut self, address: u64, len: u32, writable: bool) -> Result<(), QueueError> {
        let bad = QueueError::Buffer { address, len };
        let (list, total) = if writable {
            (&mut self.writable, &mut self.write_len)
        } else {
            (&mut self.readable, &mut self.read_len)
        };
        // Slots may touch each other, so that a buffer may span two; there are only a few slots.
        let (mut at, mut left) = (address, u64::from(len));
        address.checked_add(left).ok_or(bad)?;
        while left > 0 {
            let s = Segment::find_first(&self.ram, at, left).ok_or(bad)?;
            at += s.len;
            left -= s.len;
            *total += s.len;
            list.push(s);
        }
        Ok(())
    }

    /// Number of the first descriptor.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Bytes to read.
    pub fn readable(&self) -> u64 {
        self.read_len
    }

    /// Bytes to write.
    pub fn writable(&self) -> u64 {
        self.write_len
    }

    /// Copy readable bytes from `at` on; gives how many there were.
    pub fn read(&self, at: u64, out: &mut [u8]) -> usize {
        let mut done = 0;
        for b in self.read_slices(at, out.len() as u64) {
            done += b.copy_to(&mut out[done..]);
        }
        done
    }

    /// `N` readable bytes from `at` on, if there are as many.
    pub fn read_array<const N: usize>(&self, at: u64) -> Option<[u8; N]> {
        let mut out = [0; N];
        (self.read(at, &mut out) == N).then_some(out)
    }

    /// Copy `data` to the writable bytes from `at` on; gives how many found room.
    pub fn write(&self, at: u64, data: &[u8]) -> usize {
        let mut done = 0;
        for b in self.write_slices(at, data.len() as u64) {
            done += b.copy_from(&data[done..]);
        }
        self.mark_written(at, done as u64);
        done
    }

    /// The readable bytes `skip..skip + len`, as far as they exist.
    pub fn read_slices(&self, skip: u64, len: u64) -> Vec<SharedSlice<'_>> {
        let mut out = Vec::with_capacity(self.readable.len());
        cut(&self.readable, skip, len, |s, from, n| {
            // SAFETY: inside the segment, which lies in RAM that `self` holds; no Rust reference to guest RAM exists.
            out.push(unsafe { SharedSlice::from_raw(s.host.add(from as usize), n as usize) });
        });
        out
    }

    /// The writable bytes `skip..skip + len`, as far as they exist. Whoever writes them reports it with
    /// [`mark_written`](Self::mark_written).
    pub fn write_slices(&self, skip: u64, len: u64) -> Vec<SharedSliceMut<'_>> {
        let mut out = Vec::with_capacity(self.writable.len());
        cut(&self.writable, skip, len, |s, from, n| {
            // SAFETY: as above.
            out.push(unsafe { SharedSliceMut::from_raw(s.host.add(from as usize), n as usize) });
        });
        out
    }

    /// Report that the writable bytes `skip..skip + len` were written, for dirty logging and code invalidation.
    pub fn mark_written(&self, skip: u64, len: u64) {
        cut(&self.writable, skip, len, |s, from, n| s.mark(&self.ram, from, n));
    }

    /// The guest physical ranges of the writable buffers, for devices to which addresses mean something (balloon).
    pub fn writable_ranges(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.writable.iter().filter_map(|s| Some((self.ram.slots().get(s.slot)?.base + s.offset, s.len)))
    }
}

/// Call `f` with each segment, offset in it and length that make up `skip..skip + len`.
fn cut(segments: &[Segment], mut skip: u64, mut len: u64, mut f: impl FnMut(&Segment, u64, u64)) {
    for s in segments {
        if len == 0 {
            return;
        }
        if skip >= s.len {
            skip -= s.len;
            continue;
        }
        let n = len.min(s.len - skip);
        f(s, skip, n);
        len -= n;
        skip = 0;
    }
}
