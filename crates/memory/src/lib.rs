//! Guest RAM.
//!
//! RAM is a few `mmap`ed regions, held by vm-memory, so that devices use its checked, volatile accessors. Each
//! region carries a [`PageTracker`]: one word per 4 KiB page that says whether the page was written (dirty logging)
//! and whether an engine holds decoded or translated code from it. Because vm-memory reports every write to the
//! tracker, a device that writes into code (DMA) invalidates it exactly as a guest store does.
//!
//! Engines do not go through the accessors on their hot paths: they take a host pointer when they fill a TLB
//! entry ([`RamMap`]) and report to the tracker themselves (see [`PageTracker::note_write`]).

mod map;
mod tracker;

pub use map::{RamMap, RamSlot};
pub use tracker::{PAGE_SHIFT, PAGE_SIZE, PageTracker};
pub use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestUsize};

/// The RAM of one machine. Cloning shares it.
pub type GuestMemory = vm_memory::GuestMemoryMmap<PageTracker>;

/// Why RAM cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The layout is empty, unaligned or overlapping.
    #[error("memory layout: {0}")]
    Layout(String),
    /// The host refuses.
    #[error("cannot allocate {size} bytes of guest memory at {base:#x}: {reason}")]
    Allocate {
        /// Guest physical address.
        base: u64,
        /// Bytes wanted.
        size: u64,
        /// The host's words.
        reason: String,
    },
}

/// Allocate anonymous RAM for the given (guest physical base, size in bytes) pairs, in ascending order. Pages are
/// taken from the host on first touch, in 2 MiB pieces where the host offers transparent huge pages.
///
/// # Errors
/// [`MemoryError`].
pub fn allocate(layout: &[(u64, u64)]) -> Result<GuestMemory, MemoryError> {
    for &(base, size) in layout {
        if size == 0 || size % PAGE_SIZE != 0 || base % PAGE_SIZE != 0 {
            return Err(MemoryError::Layout(format!("{base:#x}+{size:#x} is not a whole number of pages")));
        }
        let fail = |reason: String| MemoryError::Allocate { base, size, reason };
        usize::try_from(size).map_err(|e| fail(e.to_string()))?;
    }
    let ranges: Vec<(GuestAddress, usize)> =
        layout.iter().map(|&(base, size)| (GuestAddress(base), size as usize)).collect();
    let memory = GuestMemory::from_ranges(&ranges).map_err(|e| MemoryError::Allocate {
        base: layout.first().map_or(0, |l| l.0),
        size: layout.iter().map(|l| l.1).sum(),
        reason: e.to_string(),
    })?;
    for slot in RamMap::new(&memory).slots() {
        // SAFETY: the range is exactly one live anonymous mapping owned by `memory`; MADV_HUGEPAGE only advises.
        // A host without huge pages refuses, which changes nothing.
        unsafe { libc::madvise(slot.host.cast(), slot.size as usize, libc::MADV_HUGEPAGE) };
    }
    Ok(memory)
}
