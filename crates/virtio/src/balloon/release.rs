//! Giving guest memory back to the host.

use ringfort_memory::{PAGE_SHIFT, PAGE_SIZE, RamMap};
use std::sync::Arc;

/// Who takes pages that the guest does not need. Pages come back, filled with zeroes, when the guest touches them.
pub trait MemoryReleaser: Send + Sync {
    /// The guest does not need `len` bytes from guest physical address `gpa` on, both multiples of 4096. The range
    /// comes from the guest: what is not RAM is to be ignored.
    fn release(&self, gpa: u64, len: u64);
}

/// Releases pages with `madvise`: MADV_REMOVE where RAM is a memory file, else MADV_DONTNEED.
///
/// The host addresses stay mapped, so pointers that engines keep in their TLBs stay valid. The pages' content changes
/// to zeroes, which the page trackers are told: code decoded from them is dropped, and they count as written.
pub struct HostRelease {
    ram: Arc<RamMap>,
}

impl HostRelease {
    /// For the RAM of one machine.
    pub fn new(ram: Arc<RamMap>) -> HostRelease {
        HostRelease { ram }
    }
}

impl MemoryReleaser for HostRelease {
    fn release(&self, gpa: u64, len: u64) {
        if !gpa.is_multiple_of(PAGE_SIZE) || !len.is_multiple_of(PAGE_SIZE) {
            return;
        }
        let end = gpa.saturating_add(len);
        for slot in self.ram.slots() {
            let (from, to) = (gpa.max(slot.base), end.min(slot.base + slot.size));
            if from >= to {
                continue;
            }
            let offset = from - slot.base;
            // A memory file keeps its pages unless a hole is made in it; private memory has no file to make one in.
            let failed = [libc::MADV_REMOVE, libc::MADV_DONTNEED].into_iter().all(|advice| {
                // SAFETY: the range lies inside the slot's mapping, which `ram` holds; only the guest's data lives in it, and nobody holds
                // Rust references to guest RAM.
                let done = unsafe {
                    let at = slot.host.add(offset as usize).cast();
                    libc::madvise(at, (to - from) as usize, advice)
                };
                done != 0
            });
            // A host that refuses keeps the pages as they are, which is allowed.
            if !failed {
                for page in offset >> PAGE_SHIFT..(to - slot.base) >> PAGE_SHIFT {
                    slot.tracker.note_write(page);
                }
            }
        }
    }
}
