//! What each place in translated code found when it accessed memory last.
//!
//! A place (a memory access of a translated block, or a group of them) that goes to the same page again need not look the page up in the
//! [`super::TlbSet`]: its own entry, at a fixed offset, has the page and the distance to host memory, so that neither the comparison nor the
//! distance waits for the address. Entries are filled by generated code ([`crate::translate`]) from the TLB set that holds them, and are dropped
//! whenever a translation of that set is; they may outlive the TLB entry that they came from.

use super::tlb::TLB_ENTRIES;
use crate::hash::BuildKeyHasher;
use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};

/// Entries; places beyond share them.
pub const PLACES: usize = 2048;
/// Entries that are looked at together when some are to be dropped.
const CHUNK: usize = 64;
/// Misses between two looks at how often a place misses.
pub const PATIENCE: u32 = 128;
/// Large pages remembered.
const MOST_LARGE: usize = 256;
/// What makes a page's address one that is not canonical, however many bits linear addresses have: bits 62 and 63 differ.
const NOT_CANONICAL: u64 = 1 << 63;
/// The bits of the page of an entry that holds none which chance decides.
const CHANCE: u64 = (1 << 62) - 0x1000;

/// One place's page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Place {
    /// Linear address of the page.
    pub page: u64,
    /// Host address minus linear address.
    pub addend: u64,
}

/// Where the addresses of a page that is none lead.
#[repr(C, align(4096))]
struct Nowhere(std::cell::UnsafeCell<[u8; 8192]>);

// SAFETY: only generated code accesses it, what it holds means nothing, and no reference to the bytes is ever made.
unsafe impl Sync for Nowhere {}

static NOWHERE: Nowhere = Nowhere(std::cell::UnsafeCell::new([0; 8192]));

impl Place {
    /// For entries that hold no page. Every page is one that the guest can ask for, as all that is compared is 64 bits of an address. So the page
    /// is never a translation's, as it is not canonical, and one of 2^50 that nobody can know: whoever tries them finds a fault at each.
    fn none() -> Place {
        let page = NOT_CANONICAL | RandomState::new().hash_one(0) & CHANCE;
        Place { page, addend: (NOWHERE.0.get() as u64).wrapping_sub(page) }
    }
}

/// The places of a TLB set. The layout is known to generated code.
#[repr(C)]
pub struct Places {
    /// By number of the place.
    pub entries: [Place; PLACES],
    /// Misses of each until somebody looks how often it misses.
    pub patience: [u32; PLACES],
    /// For each index in the TLB whether some entry's page may be of it.
    pub pages: [u8; TLB_ENTRIES],
    /// For each low part of a host page's number whether some place may store there.
    pub stores: [u8; TLB_ENTRIES],
    /// For each chunk whether something was entered.
    pub dirty: [u8; PLACES / CHUNK],
    /// For each index in the TLB whether places may take its page over: whatever drops it drops it here as well.
    pub lasting: [u8; TLB_ENTRIES],
    /// Whether what is not global may be taken over. It goes whenever the address space changes, places would go with it.
    local: bool,
    /// Numbers of the 2 MiB regions of large pages that may have been entered.
    large: HashSet<u64, BuildKeyHasher>,
    /// A page of 1 GiB may have been entered.
    huge: bool,
    /// What an entry is that holds no page.
    none: Place,
}

impl Places {
    /// Give memory its value: nothing entered.
    ///
    /// # Safety
    /// `at` is valid for writes.
    pub unsafe fn init(at: *mut Places, local: bool) {
        let none = Place::none();
        // SAFETY: by the caller's word; each field is written as a whole.
        unsafe {
            (&raw mut (*at).entries).write([none; PLACES]);
            (&raw mut (*at).none).write(none);
            (&raw mut (*at).patience).write([PATIENCE; PLACES]);
            (&raw mut (*at).pages).write([0; TLB_ENTRIES]);
            (&raw mut (*at).stores).write([0; TLB_ENTRIES]);
            (&raw mut (*at).dirty).write([0; PLACES / CHUNK]);
            (&raw mut (*at).lasting).write([0; TLB_ENTRIES]);
            (&raw mut (*at).local).write(local);
            (&raw mut (*at).large).write(HashSet::default());
            (&raw mut (*at).huge).write(false);
        }
    }

    /// A translation was entered into the TLB set, so that places may take it over.
    pub fn note(&mut self, lin: u64, large: Option<u64>, global: bool) {
        let index = (lin >> 12) as usize % TLB_ENTRIES;
        let lasting = global || self.local;
        self.lasting[index] = lasting.into();
        if !lasting {
            return;
        }
        let Some(size) = large else { return };
        // The larger kind of the old paging modes is two regions.
        let both = u64::from(size > 2 << 20);
        self.huge |= size > 4 << 20 || self.large.len() > MOST_LARGE;
        if !self.huge {
            self.large.extend([lin >> 21, lin >> 21 ^ both]);
        }
    }

    /// Drop all.
    pub fn clear(&mut self) {
        let mut some = false;
        for (n, dirty) in self.dirty.iter_mut().enumerate() {
            if std::mem::take(dirty) != 0 {
                self.entries[n * CHUNK..(n + 1) * CHUNK].fill(self.none);
                some = true;
            }
        }
        if some {
            self.pages.fill(0);
            self.stores.fill(0);
        }
        self.large.clear();
        self.huge = false;
    }

    /// Drop the page of `lin`, and with a large page that may cover it everything.
    pub fn drop_page(&mut self, lin: u64) {
        if self.huge || self.large.contains(&(lin >> 21)) {
            return self.clear();
        }
        let index = (lin >> 12) as usize % TLB_ENTRIES;
        if self.pages[index] != 0 {
            self.drop_where(|p| p.page == lin & !0xfff);
        }
    }

    /// Drop what leads to the host's page at `host`.
    pub fn drop_stores_to(&mut self, host: u64) {
        let index = (host >> 12) as usize % TLB_ENTRIES;
        if self.stores[index] != 0 {
            self.drop_where(|p| p.page.wrapping_add(p.addend) == host & !0xfff);
        }
    }

    fn drop_where(&mut self, which: impl Fn(&Place) -> bool) {
        for (n, _) in self.dirty.iter().enumerate().filter(|d| *d.1 != 0) {
            for p in &mut self.entries[n * CHUNK..(n + 1) * CHUNK] {
                if which(p) {
                    *p = self.none;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_page_is_not_canonical_and_no_constant() {
        let (a, b) = (Place::none(), Place::none());
        for p in [a, b] {
            for bits in [48, 57] {
                assert_ne!((p.page << (64 - bits)) as i64 >> (64 - bits), p.page as i64, "{bits} bits");
            }
            assert_eq!(p.page & 0xfff, 0);
            assert_eq!(p.page.wrapping_add(p.addend), NOWHERE.0.get() as u64);
        }
        assert_ne!(a.page, b.page);
    }
}
