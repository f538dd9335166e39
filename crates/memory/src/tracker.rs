//! Per-page tracking of writes and of code.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};

/// log2 of the tracked page size.
pub const PAGE_SHIFT: u32 = 12;
/// The tracked page size in bytes.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;

/// The bit of a page's code word that says "an engine holds code decoded from here".
const CODE: u32 = 1 << 31;
/// The bit that says "some engine may store here without telling". Never together with [`CODE`].
const FAST: u32 = 1 << 30;
/// The generation's bits.
const GENERATION: u32 = FAST - 1;

#[derive(Debug, Default)]
struct Pages {
    /// Per page: [`CODE`], [`FAST`] and a 30-bit generation, which moves with each write to a page while it holds code.
    code: Vec<AtomicU32>,
    /// Per page one bit: written since the dirty log was last taken.
    dirty: Vec<AtomicU64>,
    logging: AtomicBool,
}

/// Tracks the pages of one RAM region. Cloning shares the tracker.
///
/// ## Code
/// An engine that decodes instructions calls [`begin_code`](Self::begin_code) and keeps the generation; the decoded
/// block is valid while [`generation`](Self::generation) is unchanged. Whoever writes to the page calls
/// [`note_write`](Self::note_write) (vm-memory's accessors do), which moves the generation on if the page holds code.
/// An engine's store fast path covers only pages for which [`allow_fast_writes`](Self::allow_fast_writes) said yes.
#[derive(Debug, Clone, Default)]
pub struct PageTracker {
    pages: Arc<Pages>,
}

impl PageTracker {
    /// See [`PageTracker::word`].
    pub const CODE_BIT: u32 = CODE;

    /// Declare that code of `page` (number within the region) is being decoded. Gives the generation to remember, and
    /// whether some engine may have a fast store path to the page: then stores are not yet seen, and the caller must make
    /// every vCPU drop such paths.
    pub fn begin_code(&self, page: u64) -> (u32, bool) {
        let word = &self.pages.code[page as usize];
        // Never fails to make progress: the closure always gives a value.
        let old = match word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |w| Some(w & !FAST | CODE)) {
            Ok(old) | Err(old) => old,
        };
        (old & GENERATION, old & FAST != 0)
    }

    /// Whether an engine may store to `page` without telling; remembered if so.
    #[inline]
    pub fn allow_fast_writes(&self, page: u64) -> bool {
        let word = &self.pages.code[page as usize];
        if word.load(Ordering::SeqCst) & (CODE | FAST) == FAST {
            return true;
        }
        let allow = |w: u32| (w & CODE == 0).then_some(w | FAST);
        word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, allow).is_ok()
    }

    /// Whether an engine holds code of `page`.
    #[inline]
    pub fn has_code(&self, page: u64) -> bool {
        self.pages.code[page as usize].load(Ordering::SeqCst) & CODE != 0
    }

    /// The page's code generation.
    #[inline]
    pub fn generation(&self, page: u64) -> u32 {
        self.pages.code[page as usize].load(Ordering::Acquire) & GENERATION
    }

    /// The page's code word itself, for engines that check generations inline: valid while the tracker lives.
    /// The word is [`CODE_BIT`](Self::CODE_BIT) plus the generation while what was decoded is valid.
    #[inline]
    pub fn word(&self, page: u64) -> *const AtomicU32 {
        &raw const self.pages.code[page as usize]
    }

    /// `page` was written. Marks it dirty; if it held code, moves its generation and forgets that it did. True if so.
    #[inline]
    pub fn note_write(&self, page: u64) -> bool {
        let p = page as usize;
        if self.pages.logging.load(Ordering::Relaxed) {
            self.pages.dirty[p / 64].fetch_or(1 << (p % 64), Ordering::SeqCst);
        }
        let word = &self.pages.code[p];
        if word.load(Ordering::SeqCst) & CODE == 0 {
            return false;
        }
        self.drop_code(page);
        true
    }

    /// Invalidate what is decoded from `page` without a write (for instance when stores may have gone unseen).
    pub fn drop_code(&self, page: u64) {
        let word = &self.pages.code[page as usize];
        // Never fails to make progress: the closure always gives a new value.
        let _ = word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |w| {
            Some((w & GENERATION).wrapping_add(1) & GENERATION | w & FAST)
        });
    }

    /// Invalidate what is decoded from `page`, as [`drop_code`](Self::drop_code), when stores may have gone unseen that
    /// were not the caller's. Unlike that it leaves the page one with code: whoever runs code of the page at this moment and stores
    /// to it must still hear from [`note_write`](Self::note_write) that it changed what it runs.
    pub fn outdate_code(&self, page: u64) {
        let word = &self.pages.code[page as usize];
        let outdate =
            |w: u32| (w & CODE != 0).then_some((w & GENERATION).wrapping_add(1) & GENERATION | CODE);
        // A page without code has nothing to invalidate.
        let _ = word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, outdate);
    }

    /// Begin or end dirty logging. The caller makes engines drop their fast store paths afterwards, so that the first
    /// store to each page is seen.
    pub fn set_logging(&self, on: bool) {
        self.pages.logging.store(on, Ordering::SeqCst);
    }

    /// Whether writes are being logged.
    pub fn logging(&self) -> bool {
        self.pages.logging.load(Ordering::SeqCst)
    }

    /// Take the dirty log: one bit per page, cleared in the tracker.
    pub fn take_dirty(&self) -> Vec<u64> {
        self.pages.dirty.iter().map(|w| w.swap(0, Ordering::SeqCst)).collect()
    }

    /// Pages tracked.
    pub fn page_count(&self) -> u64 {
        self.pages.code.len() as u64
    }
}

impl<'a> WithBitmapSlice<'a> for PageTracker {
    type S = RefSlice<'a, PageTracker>;
}

impl Bitmap for PageTracker {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len == 0 {
            return;
        }
        let last = (offset.saturating_add(len - 1) as u64) >> PAGE_SHIFT;
        let first = (offset as u64) >> PAGE_SHIFT;
        // Slices report offsets by plain arithmetic; what lies outside the region was never written.
        for page in first..=last.min(self.page_count().saturating_sub(1)) {
            self.note_write(page);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let p = offset >> PAGE_SHIFT;
        self.pages.dirty.get(p / 64).is_some_and(|w| w.load(Ordering::SeqCst) >> (p % 64) & 1 != 0)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, PageTracker> {
        RefSlice::new(self, offset)
    }
}

impl NewBitmap for PageTracker {
    fn with_len(len: usize) -> Self {
        let pages = len.div_ceil(PAGE_SIZE as usize);
        PageTracker {
            pages: Arc::new(Pages {
                code: (0..pages).map(|_| AtomicU32::new(0)).collect(),
                dirty: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
                logging: AtomicBool::new(false),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::allocate;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn outdated_code_is_still_told_of_writes() {
        let mem = allocate(&[(0, 0x10000)]).unwrap();
        let t = crate::RamMap::new(&mem).slots()[0].tracker.clone();
        assert!(t.allow_fast_writes(2));
        let (g, fast) = t.begin_code(2);
        assert!(fast);
        t.outdate_code(2);
        assert_eq!(t.generation(2), g + 1);
        assert!(t.has_code(2) && !t.allow_fast_writes(2));
        assert!(t.note_write(2) && !t.has_code(2));
        assert_eq!(t.generation(2), g + 2);
        t.outdate_code(2);
        assert_eq!(t.generation(2), g + 2, "no code to outdate");
    }

    #[test]
    fn device_writes_move_the_code_generation() {
        let mem = allocate(&[(0, 0x10000), (0x100000, 0x10000)]).unwrap();
        let t = crate::RamMap::new(&mem).slots()[1].tracker.clone();
        let (g, fresh) = t.begin_code(3);
        assert!(!fresh && t.has_code(3));
        mem.write_slice(&[1, 2], GuestAddress(0x104000)).unwrap();
        assert_eq!(t.generation(3), g);
        mem.write_slice(&[1, 2], GuestAddress(0x103fff)).unwrap();
        assert_eq!(t.generation(3), g + 1);
        assert!(!t.has_code(3));
    }

    #[test]
    fn dirty_log_is_exact_and_cleared_when_taken() {
        let t = PageTracker::with_len(130 * 4096);
        t.note_write(1);
        t.set_logging(true);
        t.mark_dirty(4096 * 64 + 4095, 2);
        t.mark_dirty(4096 * 129, 100_000);
        assert_eq!(t.take_dirty(), vec![0, 0b11, 0b10]);
        assert_eq!(t.take_dirty(), vec![0, 0, 0]);
    }
}
