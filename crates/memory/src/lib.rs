//! Guest RAM.
//!
//! RAM is a few `mmap`ed regions, held by vm-memory, so that devices use its checked, volatile accessors. Each
//! region carries a [`PageTracker`]: one word per 4 KiB page that says whether the page was written (dirty logging)
//! and whether an engine holds decoded or translated code from it. Because vm-memory reports every write to the
//! tracker, a device that writes into code (DMA) invalidates it exactly as a guest store does.
//!
//! Engines do not go through the accessors on their hot paths: they take a host pointer when they fill a TLB
//! entry ([`RamMap`]) and report to the tracker themselves (see [`PageTracker::note_write`]).

mod backing;
mod map;
mod tracker;

pub use backing::{Backing, NodePolicy, allocate_with};
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
    /// What RAM was to be made of cannot be had.
    #[error("{0}")]
    Backing(String),
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
    allocate_with(layout, &Backing::default())
}
