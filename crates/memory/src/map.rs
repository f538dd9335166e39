//! Guest physical address to host pointer, for engines.

use crate::{GuestMemory, PAGE_SHIFT, PageTracker};
use std::os::fd::{AsRawFd as _, RawFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

/// One contiguous piece of RAM.
#[derive(Debug, Clone)]
pub struct RamSlot {
    /// Guest physical address of the first byte.
    pub base: u64,
    /// Bytes.
    pub size: u64,
    /// Host virtual address of the first byte; valid while the [`GuestMemory`] lives.
    pub host: *mut u8,
    /// The pages' tracker; page numbers count from `base`.
    pub tracker: PageTracker,
    /// The file that it is, by a descriptor that is open while the [`GuestMemory`] lives, and where it begins there; of memory that other
    /// processes can share.
    pub file: Option<(RawFd, u64)>,
}

/// A flat list of a machine's RAM with raw host pointers. Holds the memory alive.
#[derive(Debug, Clone)]
pub struct RamMap {
    slots: Vec<RamSlot>,
    _keep: GuestMemory,
}

// SAFETY: the pointers are plain addresses of a shared mapping which `_keep` holds alive; every use of one is its own
// unsafe access.
unsafe impl Send for RamMap {}
// SAFETY: as above; the map itself is never changed after it was made.
unsafe impl Sync for RamMap {}

impl RamMap {
    /// The RAM of `memory`.
    pub fn new(memory: &GuestMemory) -> RamMap {
        let slots = memory
            .iter()
            .map(|r| RamSlot {
                base: r.start_addr().raw_value(),
                size: r.len(),
                // The regions of GuestMemory are mmaped, so each has a host address.
                host: r.get_host_address(vm_memory::MemoryRegionAddress(0)).unwrap_or(std::ptr::null_mut()),
                tracker: r.get_mmap().bitmap().clone(),
                file: r.file_offset().map(|f| (f.file().as_raw_fd(), f.start())),
            })
            .collect();
        RamMap { slots, _keep: memory.clone() }
    }

    /// The pieces, by ascending address.
    pub fn slots(&self) -> &[RamSlot] {
        &self.slots
    }

    /// The slot that holds `gpa`, and the offset in it.
    #[inline]
    pub fn find(&self, gpa: u64) -> Option<(&RamSlot, u64)> {
        self.slots.iter().find_map(|s| {
            let offset = gpa.wrapping_sub(s.base);
            (offset < s.size).then_some((s, offset))
        })
    }

    /// Host pointer to `gpa`, valid to the end of its page at least.
    #[inline]
    pub fn host(&self, gpa: u64) -> Option<*mut u8> {
        // SAFETY: find() guarantees that offset lies inside the mapping.
        self.find(gpa).map(|(s, offset)| unsafe { s.host.add(offset as usize) })
    }

    /// Report a write of the page that holds `gpa`; true if it held code.
    #[inline]
    pub fn note_write(&self, gpa: u64) -> bool {
        self.find(gpa).is_some_and(|(s, offset)| s.tracker.note_write(offset >> PAGE_SHIFT))
    }
}
