//! The split virtqueue, device side (virtio 1.3 section 2.7).
//!
//! The three rings are checked once, when the queue is made: each lies aligned and whole in one piece of RAM, whose
//! host address is kept. What the guest writes into them later is never trusted: indices are reduced, chains are
//! bounded, buffers are checked against RAM before device code sees them. A ring that breaks the rules gives a
//! [`QueueError`]; the transport then sets DEVICE_NEEDS_RESET and the queue is not touched again.

mod chain;
#[cfg(test)]
mod tests;

pub use chain::Chain;

use crate::Interrupt;
use chain::Segment;
use ringfort_memory::{PAGE_SHIFT, RamMap};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

/// Largest queue size (virtio 1.3 section 2.7).
pub const MAX_QUEUE_SIZE: u16 = 32768;
/// Most descriptors in one chain, those of an indirect table included. Chains in the ring itself are bounded by the
/// queue's size as well.
pub const MAX_CHAIN: usize = 1024;
/// Most bytes in one chain (virtio 1.3 section 2.7.4: at most 2^32).
const MAX_CHAIN_BYTES: u64 = 1 << 32;

const DESC_LEN: u64 = 16;
const DESC_F_NEXT: u16 = 1;
const DESC_F_WRITE: u16 = 2;
const DESC_F_INDIRECT: u16 = 4;
const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;

/// How a guest broke the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// The size is 0, no power of two, or larger than the device offers.
    #[error("queue size {0} is not a power of two up to the device's limit")]
    Size(u16),
    /// A ring is not aligned, or not in RAM.
    #[error("{ring} ring at {address:#x} is misaligned or not in RAM")]
    Ring {
        /// Which one.
        ring: &'static str,
        /// Its guest physical address.
        address: u64,
    },
    /// The available index ran ahead by more than the ring holds.
    #[error("available index {found} is more than the queue's size ahead of {expected}")]
    AvailIndex {
        /// The driver's.
        found: u16,
        /// The next to be processed.
        expected: u16,
    },
    /// A descriptor number beyond the table.
    #[error("descriptor {0} is beyond the table")]
    Index(u16),
    /// More descriptors than a chain may have, most likely a loop.
    #[error("descriptor chain from {0} is too long or loops")]
    TooLong(u16),
    /// A buffer outside RAM.
    #[error("buffer {address:#x}+{len:#x} is not in RAM")]
    Buffer {
        /// Guest physical address.
        address: u64,
        /// Bytes.
        len: u32,
    },
    /// A device-readable buffer after a device-writable one.
    #[error("readable buffer after a writable one in chain {0}")]
    Order(u16),
    /// A wrong indirect descriptor.
    #[error("indirect descriptor in chain {0} breaks the rules")]
    Indirect(u16),
    /// The chain does not have the shape that the device needs.
    #[error("request has no room for its header or status")]
    Shape,
}

/// Where a queue's rings lie, as the driver programmed them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct QueueLayout {
    /// Entries; a power of two.
    pub size: u16,
    /// Descriptor table, guest physical.
    pub desc: u64,
    /// Available ring (driver area), guest physical.
    pub avail: u64,
    /// Used ring (device area), guest physical.
    pub used: u64,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// VIRTIO_F_INDIRECT_DESC was negotiated.
    pub indirect: bool,
}

/// How far a queue has got; what is saved of it beyond its layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct QueueProgress {
    /// Next entry of the available ring.
    pub next_avail: u16,
    /// Next entry of the used ring.
    pub next_used: u16,
    /// Used index at the last decision about an interrupt.
    pub signalled: Option<u16>,
}

/// What keeps queues from handing out work: a paused machine, a driver that took DMA away.
#[derive(Debug, Default)]
pub struct Gate {
    paused: AtomicBool,
    no_dma: AtomicBool,
}

impl Gate {
    /// Hold back, or let go on.
    pub fn set_paused(&self, paused: bool) {
        self.paused.store(paused, Ordering::SeqCst);
    }
    /// Whether the device may access memory.
    pub fn set_dma(&self, allowed: bool) {
        self.no_dma.store(!allowed, Ordering::SeqCst);
    }
    /// Whether queues hand out work.
    pub fn is_open(&self) -> bool {
        !self.paused.load(Ordering::SeqCst) && !self.no_dma.load(Ordering::SeqCst)
    }
}

/// One active queue.
pub struct Queue {
    ram: Arc<RamMap>,
    gate: Arc<Gate>,
    interrupt: Arc<dyn Interrupt>,
    index: u16,
    size: u16,
    event_idx: bool,
    indirect: bool,
    desc: *const u8,
    avail: *const u8,
    used: Segment,
    progress: QueueProgress,
}

// SAFETY: the pointers stand for guest RAM that `ram` holds alive; all access goes through atomics or raw copies.
unsafe impl Send for Queue {}

impl Queue {
    /// Check a layout and make the queue.
    ///
    /// # Errors
    /// [`QueueError::Size`] or [`QueueError::Ring`].
    pub fn new(
        ram: &Arc<RamMap>,
        layout: &QueueLayout,
        progress: QueueProgress,
        index: u16,
        gate: Arc<Gate>,
        interrupt: Arc<dyn Interrupt>,
    ) -> Result<Queue, QueueError> {
        let size = layout.size;
        if !size.is_power_of_two() || size > MAX_QUEUE_SIZE {
            return Err(QueueError::Size(size));
        }
        let n = u64::from(size);
        // Lengths and alignments: virtio 1.3 section 2.7; each ring has room for its event field.
        let place = |ring, address: u64, len: u64, align: u64| {
            Segment::find(ram, address, len)
                .filter(|_| address.is_multiple_of(align))
                .ok_or(QueueError::Ring { ring, address })
        };
        let desc = place("descriptor", layout.desc, n * DESC_LEN, 16)?;
        let avail = place("available", layout.avail, 6 + 2 * n, 2)?;
        let used = place("used", layout.used, 6 + 8 * n, 4)?;
        Ok(Queue {
            ram: ram.clone(),
            gate,
            interrupt,
            index,
            size,
            event_idx: layout.event_idx,
            indirect: layout.indirect,
            desc: desc.host,
            avail: avail.host,
            used,
            progress,
        })
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The queue's number in its device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// How far it has got.
    pub fn progress(&self) -> QueueProgress {
        self.progress
    }

    /// Go on after somebody else has served the queue up to `next_avail`; how much of it was used stands in the ring.
    pub(crate) fn resume_at(&mut self, next_avail: u16) {
        let next_used = u16::from_le(self.used_u16(2).load(Ordering::Acquire));
        self.progress = QueueProgress { next_avail, next_used, signalled: None };
    }

    fn avail_u16(&self, offset: usize) -> &AtomicU16 {
        debug_assert!(offset + 2 <= 6 + 2 * usize::from(self.size));
        // SAFETY: `offset` is even and inside the available ring, which was checked to lie aligned in RAM that
        // `self.ram` holds; the guest's concurrent access is atomic from the processor's point of view.
        unsafe { AtomicU16::from_ptr(self.avail.add(offset).cast_mut().cast()) }
    }

    fn used_u16(&self, offset: usize) -> &AtomicU16 {
        debug_assert!(offset + 2 <= 6 + 8 * usize::from(self.size));
        // SAFETY: as for the available ring.
        unsafe { AtomicU16::from_ptr(self.used.host.add(offset).cast()) }
    }

    fn slot(&self, position: u16) -> usize {
        usize::from(position & (self.size - 1))
    }

    /// The next chain that the driver made available. `None` when there is none, or when the machine is paused.
    ///
    /// # Errors
    /// [`QueueError`]; the queue must then not be used any more.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        if !self.gate.is_open() {
            return Ok(None);
        }
        // Acquire: the ring entry and the descriptors were written before the index.
        let found = u16::from_le(self.avail_u16(2).load(Ordering::Acquire));
        let expected = self.progress.next_avail;
        let ready = found.wrapping_sub(expected);
        if ready == 0 {
            return Ok(None);
        }
        if ready > self.size {
            return Err(QueueError::AvailIndex { found, expected });
        }
        let at = 4 + 2 * self.slot(expected);
        let head = u16::from_le(self.avail_u16(at).load(Ordering::Relaxed));
        let chain = self.walk(head)?;
        self.progress.next_avail = expected.wrapping_add(1);
        Ok(Some(chain))
    }

    /// Put the chain that was popped last back, as if it had not been seen.
    pub fn undo_pop(&mut self, _chain: Chain) {
        self.progress.next_avail = self.progress.next_avail.wrapping_sub(1);
    }

    /// A chain that was handed out before a save and is to be completed after it, by its first descriptor.
    ///
    /// # Errors
    /// As for [`pop`](Self::pop).
    pub fn reopen(&self, head: u16) -> Result<Chain, QueueError> {
        self.walk(head)
    }

    /// Whether the queue hands out work: the machine is not paused, and the driver allows DMA.
    pub fn is_open(&self) -> bool {
        self.gate.is_open()
    }

    /// Whether a chain is waiting (what [`pop`](Self::pop) would look at).
    pub fn has_work(&self) -> bool {
        self.gate.is_open()
            && u16::from_le(self.avail_u16(2).load(Ordering::Acquire)) != self.progress.next_avail
    }

    fn walk(&self, head: u16) -> Result<Chain, QueueError> {
        let mut chain = Chain::new(head, self.ram.clone());
        let (mut table, mut entries, mut in_table) = (self.desc, u64::from(self.size), false);
        let (mut next, mut bytes, mut budget) = (head, 0u64, MAX_CHAIN.min(usize::from(self.size)));
        loop {
            if u64::from(next) >= entries {
                return Err(QueueError::Index(next));
            }
            if budget == 0 {
                return Err(QueueError::TooLong(head));
            }
            budget -= 1;
            // SAFETY: `next` is below the table's entries, and the table lies whole in RAM, aligned to 16 (the ring)
            // or possibly not at all (an indirect table): hence the unaligned, volatile-like copy of one entry.
            let (address, len, flags, link) = unsafe { descriptor(table.add(usize::from(next) * 16)) };
            if flags & DESC_F_INDIRECT != 0 {
                let count = u64::from(len) / DESC_LEN;
                if !self.indirect
                    || in_table
                    || flags & DESC_F_NEXT != 0
                    || len == 0
                    || !u64::from(len).is_multiple_of(DESC_LEN)
                    || count > MAX_CHAIN as u64
                {
                    return Err(QueueError::Indirect(head));
                }
                let place = Segment::find(&self.ram, address, u64::from(len))
                    .ok_or(QueueError::Buffer { address, len })?;
                (table, entries, in_table, next, budget) = (place.host, count, true, 0, count as usize);
                continue;
            }
            bytes += u64::from(len);
            if bytes > MAX_CHAIN_BYTES {
                return Err(QueueError::TooLong(head));
            }
            let writable = flags & DESC_F_WRITE != 0;
            if !writable && chain.has_writable() {
                return Err(QueueError::Order(head));
            }
            chain.add(address, len, writable)?;
            if flags & DESC_F_NEXT == 0 {
                return Ok(chain);
            }
            next = link;
        }
    }

    /// Give a chain back, with the number of bytes written to it. Does not interrupt; see [`signal`](Self::signal).
    pub fn push(&mut self, chain: Chain, written: u32) {
        self.push_head(chain.head(), written);
    }

    pub(crate) fn push_head(&mut self, head: u16, written: u32) {
        let position = self.progress.next_used;
        let at = 4 + 8 * self.slot(position);
        // SAFETY: both words are inside the used ring, aligned to 4.
        unsafe {
            let entry = self.used.host.add(at);
            AtomicU32::from_ptr(entry.cast()).store(u32::from(head).to_le(), Ordering::Relaxed);
            AtomicU32::from_ptr(entry.add(4).cast()).store(written.to_le(), Ordering::Relaxed);
        }
        self.progress.next_used = position.wrapping_add(1);
        // Release: entry and buffers are written before the index that announces them.
        self.used_u16(2).store(self.progress.next_used.to_le(), Ordering::Release);
        self.mark_used(at, 8);
        self.mark_used(2, 2);
    }

    /// Interrupt the driver about what was pushed since the last call, if it wants that.
    pub fn signal(&mut self) {
        if self.needs_interrupt() {
            self.interrupt.queue(self.index);
        }
    }

    /// [`push`](Self::push) and [`signal`](Self::signal).
    pub fn complete(&mut self, chain: Chain, written: u32) {
        self.push(chain, written);
        self.signal();
    }

    /// Whether the driver wants an interrupt for what was pushed since the last call (virtio 1.3 section 2.7.7.2).
    pub fn needs_interrupt(&mut self) -> bool {
        let new = self.progress.next_used;
        let old = self.progress.signalled;
        if old == Some(new) {
            return false;
        }
        // The used index must be visible before the driver's wish is read; the driver does the reverse.
        fence(Ordering::SeqCst);
        self.progress.signalled = Some(new);
        if !self.event_idx {
            let flags = u16::from_le(self.avail_u16(0).load(Ordering::Relaxed));
            return flags & AVAIL_F_NO_INTERRUPT == 0;
        }
        let event = u16::from_le(self.avail_u16(4 + 2 * usize::from(self.size)).load(Ordering::Relaxed));
        match old {
            // Was the event index among those just used?
            Some(old) => new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old),
            None => true,
        }
    }

    /// Ask the driver not to notify: the device looks by itself. A hint.
    pub fn disable_notifications(&mut self) {
        // With event indexes, leaving the old index in place does it.
        if !self.event_idx {
            self.used_u16(0).store(USED_F_NO_NOTIFY.to_le(), Ordering::Relaxed);
            self.mark_used(0, 2);
        }
    }

    /// Ask the driver to notify about the next chain. True when one came meanwhile: then look again.
    pub fn enable_notifications(&mut self) -> bool {
        self.wait_beyond(0)
    }

    /// As [`enable_notifications`](Self::enable_notifications), for a device that needs more than the `seen` chains
    /// that it looked at and put back.
    pub fn wait_beyond(&mut self, seen: u16) -> bool {
        let next = self.progress.next_avail.wrapping_add(seen);
        if self.event_idx {
            let at = 4 + 8 * usize::from(self.size);
            self.used_u16(at).store(next.to_le(), Ordering::Relaxed);
            self.mark_used(at, 2);
        } else {
            self.used_u16(0).store(0, Ordering::Relaxed);
            self.mark_used(0, 2);
        }
        // The wish must be visible before the index is read again; the driver does the reverse.
        fence(Ordering::SeqCst);
        self.gate.is_open() && u16::from_le(self.avail_u16(2).load(Ordering::Acquire)) != next
    }

    fn mark_used(&self, offset: usize, len: usize) {
        self.used.mark(&self.ram, offset as u64, len as u64);
    }
}

/// Read one descriptor: address, length, flags, next.
///
/// # Safety
/// `at..at + 16` must be mapped guest RAM.
unsafe fn descriptor(at: *const u8) -> (u64, u32, u16, u16) {
    if at.addr().is_multiple_of(8) {
        // SAFETY: aligned to 8 and inside RAM; atomics because the guest may write meanwhile.
        let (address, rest) = unsafe {
            (
                AtomicU64::from_ptr(at.cast_mut().cast()).load(Ordering::Relaxed),
                AtomicU64::from_ptr(at.add(8).cast_mut().cast()).load(Ordering::Relaxed),
            )
        };
        let rest = u64::from_le(rest);
        return (u64::from_le(address), rest as u32, (rest >> 32) as u16, (rest >> 48) as u16);
    }
    let mut raw = [0u8; 16];
    // SAFETY: inside RAM; the copy is private from then on.
    unsafe { std::ptr::copy_nonoverlapping(at, raw.as_mut_ptr(), 16) };
    let u16_at = |i: usize| u16::from_le_bytes([raw[i], raw[i + 1]]);
    let u32_at = |i: usize| u32::from(u16_at(i)) | u32::from(u16_at(i + 2)) << 16;
    (u64::from(u32_at(0)) | u64::from(u32_at(4)) << 32, u32_at(8), u16_at(12), u16_at(14))
}

/// Pages that a range of a slot touches.
fn pages(offset: u64, len: u64) -> std::ops::RangeInclusive<u64> {
    offset >> PAGE_SHIFT..=(offset + len - 1) >> PAGE_SHIFT
}
