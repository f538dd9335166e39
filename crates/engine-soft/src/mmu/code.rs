//! Where linked code lies.
//!
//! A jump of translated code into another page is good for as long as the page that it leads to is where it was. The jump asks a slot of the
//! TLB set in force ([`super::TlbSet`]), chosen by the page's linear address, so that a set that was emptied costs one look at each page that
//! code is in, not one at each jump. Slots are dropped whenever a fetch's translation is, and are not the TLB's own entries, because what a
//! jump needs is not to give way to data.

use super::Translation;
use super::tlb::{TLB_ENTRIES, TlbSet, WORDS, bit, set_bit};

/// Slots of a set; [`super::INDEX_MASK`] chooses one.
const SLOTS: usize = TLB_ENTRIES;

/// Where one page lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct CodeSlot {
    /// Linear address of the page.
    pub page: u64,
    /// What stands for where it lies ([`frame`]); 0 if there is none.
    pub frame: u64,
}

/// The slots of a TLB set. Zero bytes are a value, and mean that there is nothing. The layout of the slots is known to generated code.
#[repr(C)]
pub struct CodeSlots {
    /// By [`index`].
    pub slots: [CodeSlot; SLOTS],
    /// Those that may be filled.
    touched: [u64; WORDS],
    /// Some are of pages that are not global.
    local: bool,
    /// Some are of pages of 1 GiB.
    huge: bool,
    /// The 2 MiB regions of large pages, several to a bit.
    large: [u64; WORDS],
}

/// The slot of the page at `lin`.
pub fn index(lin: u64) -> usize {
    (lin >> 12) as usize % SLOTS
}

/// What stands for the physical page at `gpa`, if it has a number of 32 bits other than 0.
pub fn frame(gpa: u64) -> Option<u32> {
    u32::try_from((gpa >> 12) + 1).ok()
}

/// A slot that holds nothing.
const NONE: CodeSlot = CodeSlot { page: 0, frame: 0 };

/// The bit of a 2 MiB region, of as many as a bitmap has.
fn region(lin: u64) -> usize {
    (lin >> 21) as usize % (WORDS * 64)
}

impl CodeSlots {
    /// The page of `lin` lies there.
    pub fn fill(&mut self, lin: u64, frame: u32, from: &Translation) {
        let n = index(lin);
        set_bit(&mut self.touched, n);
        self.slots[n] = CodeSlot { page: lin & !0xfff, frame: frame.into() };
        self.local |= !from.global;
        if let Some(size) = from.large {
            self.huge |= size > 4 << 20;
            // The larger kind of the old paging modes is two regions.
            for lin in [lin, lin ^ u64::from(size > 2 << 20) << 21] {
                set_bit(&mut self.large, region(lin));
            }
        }
    }

    /// Drop all.
    pub fn clear(&mut self) {
        let touched = std::mem::replace(&mut self.touched, [0; WORDS]);
        TlbSet::each(&touched, |n| self.slots[n] = NONE);
        self.local = false;
        self.huge = false;
        self.large = [0; WORDS];
    }

    /// Drop what is not global.
    pub fn clear_local(&mut self) {
        if self.local {
            self.clear();
        }
    }

    /// Drop the page of `lin`, and with a large page that may cover it everything.
    pub fn drop_page(&mut self, lin: u64) {
        if self.huge || bit(&self.large, region(lin)) {
            return self.clear();
        }
        let slot = &mut self.slots[index(lin)];
        if slot.page == lin & !0xfff {
            *slot = NONE;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slots() -> Box<CodeSlots> {
        // SAFETY: zero bytes are a value.
        unsafe { Box::new_zeroed().assume_init() }
    }

    fn from(large: Option<u64>, global: bool) -> Translation {
        Translation { gpa: 0, write: false, fetch: true, large, global }
    }

    fn has(s: &CodeSlots, lin: u64) -> bool {
        let slot = s.slots[index(lin)];
        slot.page == lin & !0xfff && slot.frame != 0
    }

    #[test]
    fn what_is_dropped_is_gone() {
        let mut s = slots();
        assert!(!has(&s, 0));
        for _ in 0..3 {
            for n in 0..2 * SLOTS as u64 {
                s.fill(n << 12, 7, &from(None, true));
                s.drop_page(n << 12);
                assert!(!has(&s, n << 12));
                s.fill(n << 12, 7, &from(None, true));
            }
            s.clear_local();
            assert!(has(&s, (2 * SLOTS as u64 - 1) << 12) && !has(&s, 0));
            s.clear();
            assert!((0..SLOTS as u64).all(|n| s.slots[n as usize].frame == 0));
        }
        s.fill(0x1000, 7, &from(None, false));
        s.clear_local();
        assert!(!has(&s, 0x1000));
    }

    #[test]
    fn a_large_page_takes_its_neighbours_along() {
        for (size, dropped) in [(2 << 20, 0x1f_f000), (4 << 20, 0x3f_f000), (1 << 30, 0x3fff_f000)] {
            let mut s = slots();
            s.fill(0x1000, 7, &from(Some(size), true));
            s.drop_page(1 << 31);
            assert_eq!(has(&s, 0x1000), size <= 4 << 20);
            s.fill(0x1000, 7, &from(Some(size), true));
            s.drop_page(dropped);
            assert!(!has(&s, 0x1000));
        }
    }

    #[test]
    fn frames_have_numbers() {
        assert_eq!(frame(0), Some(1));
        assert_eq!(frame(0x1000 * 0xffff_fffe), Some(u32::MAX));
        assert_eq!(frame(0x1000 * 0xffff_ffff), None);
    }
}
