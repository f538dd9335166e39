//! The software TLB.
//!
//! A direct-mapped [`TlbSet`] for each access mode. Supervisor sets are shared by all address spaces, because nearly everything in them is
//! global; what is not leaves them when the address space changes. User sets are kept for several recently used address spaces (PCIDs), so
//! that a switch of address spaces by a guest that uses PCIDs empties nothing.

use super::Translation;
use super::code::CodeSlots;
use super::places::Places;
use crate::hash::BuildKeyHasher;
use ringfort_memory::RamMap;
use std::collections::HashSet;

/// log2 of the entries per set.
pub const TLB_BITS: u32 = 12;
/// Entries per set.
pub const TLB_ENTRIES: usize = 1 << TLB_BITS;
/// The bits of a linear address that choose the entry.
pub const INDEX_MASK: u64 = ((TLB_ENTRIES as u64) - 1) << 12;
/// Address spaces whose user sets are kept.
pub const SLOTS: usize = 12;
/// No page's address.
pub const NO_PAGE: u64 = u64::MAX;

/// The tag of an entry that allows nothing: a page whose entry is another one, and not a neighbour, so that no access that is looked up here
/// begins or ends there. Only such a tag differs from every address by more than what an offset in a page can be.
const fn empty_tag(index: usize) -> u64 {
    ((index ^ (TLB_ENTRIES / 2)) as u64) << 12
}

/// Words of a bitmap with a bit per entry.
pub(super) const WORDS: usize = TLB_ENTRIES / 64;

/// Access modes, one TLB set each.
pub mod mode {
    /// Supervisor, may not touch user pages (SMAP with AC clear).
    pub const SUPERVISOR: usize = 0;
    /// Supervisor, may touch user pages.
    pub const SUPERVISOR_USER: usize = 1;
    /// User.
    pub const USER: usize = 2;
}

/// What a page walk found out about a page, for an entry.
#[derive(Debug, Clone, Copy)]
pub struct Mapping {
    /// Guest physical address.
    pub gpa: u64,
    /// Host address of the same byte.
    pub host: *mut u8,
    /// Stores may go there without further ado.
    pub write: bool,
    /// Fetches may.
    pub fetch: bool,
    /// Size of the page if larger than 4 KiB.
    pub large: Option<u64>,
    /// The same in all address spaces.
    pub global: bool,
}

/// Where code lies.
#[derive(Debug, Clone, Copy)]
pub struct Fetch {
    /// Guest physical address.
    pub gpa: u64,
    /// The page is the same in all address spaces.
    pub global: bool,
    /// It is larger than 4 KiB.
    pub large: bool,
}

/// The entries of one access mode: arrays, as generated code addresses them by index. A tag is the page's linear address when the
/// access is allowed without further ado, else that of a page which is looked up elsewhere.
#[repr(C, align(64))]
pub struct TlbSet {
    /// [`INDEX_MASK`], where generated code finds it.
    pub index_mask: u64,
    /// Tags for loads.
    pub read: [u64; TLB_ENTRIES],
    /// Tags for stores: only while the page's D bit is set, it holds no decoded code, and no dirty log wants its first store.
    pub write: [u64; TLB_ENTRIES],
    /// Host address minus linear address.
    pub addend: [u64; TLB_ENTRIES],
    /// Host address of the page.
    pub host: [u64; TLB_ENTRIES],
    /// Tags for fetches.
    pub fetch: [u64; TLB_ENTRIES],
    /// Guest physical page addresses of the entries.
    pub gpa: [u64; TLB_ENTRIES],
    /// Entries that may hold something.
    touched: [u64; WORDS],
    /// Entries that may hold something which is not global.
    local: [u64; WORDS],
    /// Entries that come from large pages.
    large: [u64; WORDS],
    /// Some entry may come from a page of 1 GiB.
    huge: bool,
    /// What places in translated code have taken over from here.
    pub places: Places,
    /// What jumps of translated code into other pages go by.
    pub code: CodeSlots,
}

pub(super) fn bit(words: &[u64], n: usize) -> bool {
    words[n / 64 % words.len()] >> (n % 64) & 1 != 0
}

pub(super) fn set_bit(words: &mut [u64], n: usize) {
    let len = words.len();
    words[n / 64 % len] |= 1 << (n % 64);
}

impl TlbSet {
    fn new(user: bool) -> Box<TlbSet> {
        // By way of the heap: a set is too large for some threads' stacks.
        let mut set: Box<std::mem::MaybeUninit<TlbSet>> = Box::new_uninit();
        // SAFETY: all fields but the places are integers and arrays of them, for which zero bytes are a value; the tags get theirs next.
        let mut set = unsafe {
            std::ptr::write_bytes(set.as_mut_ptr(), 0, 1);
            Places::init(&raw mut (*set.as_mut_ptr()).places, user);
            set.assume_init()
        };
        set.index_mask = INDEX_MASK;
        (0..TLB_ENTRIES).for_each(|i| set.empty(i));
        set
    }

    fn empty(&mut self, index: usize) {
        self.read[index] = empty_tag(index);
        self.write[index] = empty_tag(index);
        self.fetch[index] = empty_tag(index);
    }

    /// The page that an entry is for, if any.
    fn page(&self, index: usize) -> Option<u64> {
        [self.read[index], self.write[index], self.fetch[index]].into_iter().find(|&t| t != empty_tag(index))
    }

    /// Call `f` for the entries in `which` (a bitmap's words).
    pub(super) fn each(words: &[u64; WORDS], mut f: impl FnMut(usize)) {
        for (w, &bits) in words.iter().enumerate() {
            let mut bits = bits;
            while bits != 0 {
                f(w * 64 + bits.trailing_zeros() as usize);
                bits &= bits - 1;
            }
        }
    }

    fn clear(&mut self) {
        let touched = self.touched;
        TlbSet::each(&touched, |i| self.empty(i));
        self.touched = [0; WORDS];
        self.local = [0; WORDS];
        self.large = [0; WORDS];
        self.huge = false;
        self.places.clear();
        self.code.clear();
    }

    /// Drop what is not global.
    fn clear_local(&mut self) {
        let local = self.local;
        TlbSet::each(&local, |i| self.empty(i));
        self.local = [0; WORDS];
        self.code.clear_local();
    }

    /// Drop the page of `lin`, or all entries from the large page that covers it.
    fn drop_page(&mut self, lin: u64) {
        self.places.drop_page(lin);
        self.code.drop_page(lin);
        let index = (lin >> 12) as usize % TLB_ENTRIES;
        if self.page(index) == Some(lin & !0xfff) {
            self.empty(index);
        }
        // The entries of 4 MiB (the largest page below 1 GiB) lie side by side.
        let (words, shift) = if self.huge {
            (0..WORDS, 18)
        } else {
            let first = (index & !1023) / 64;
            (first..first + 16, 10)
        };
        for w in words {
            let mut bits = self.large[w];
            while bits != 0 {
                let i = w * 64 + bits.trailing_zeros() as usize;
                bits &= bits - 1;
                if self.page(i).is_some_and(|page| page >> 12 >> shift == lin >> 12 >> shift) {
                    self.empty(i);
                }
            }
        }
    }

    /// Drop the fast store paths to the physical page `gpa`.
    fn drop_writes_to(&mut self, gpa: u64, host: Option<u64>) {
        if let Some(host) = host {
            self.places.drop_stores_to(host);
        }
        let touched = self.touched;
        TlbSet::each(&touched, |i| {
            if self.gpa[i] == gpa {
                self.write[i] = empty_tag(i);
            }
        });
    }

    fn drop_all_writes(&mut self) {
        let touched = self.touched;
        TlbSet::each(&touched, |i| self.write[i] = empty_tag(i));
        self.places.clear();
    }

    /// Enter a page; `data` if loads are allowed as well (a walk for a fetch does not say so).
    fn insert(&mut self, lin: u64, m: &Mapping, data: bool) {
        if data {
            self.places.note(lin, m.large, m.global);
        }
        let page = lin & !0xfff;
        let index = (lin >> 12) as usize % TLB_ENTRIES;
        self.huge |= m.large.is_some_and(|size| size > 4 << 20);
        if m.large.is_some() {
            set_bit(&mut self.large, index);
        } else {
            self.large[index / 64] &= !(1 << (index % 64));
        }
        // The permissions of another access to the same page stay; those of another page go.
        if self.page(index) != Some(page) {
            self.empty(index);
        }
        self.gpa[index] = m.gpa & !0xfff;
        self.host[index] = m.host as u64 & !0xfff;
        self.addend[index] = self.host[index].wrapping_sub(page);
        if data {
            self.read[index] = page;
            if m.write {
                self.write[index] = page;
            }
        }
        if m.fetch {
            self.fetch[index] = page;
        }
        set_bit(&mut self.touched, index);
        if m.global {
            self.local[index / 64] &= !(1 << (index % 64));
        } else {
            set_bit(&mut self.local, index);
        }
    }
}

/// Where code was fetched from.
struct Fetched {
    /// Numbers of 4 KiB pages; if there are more than [`MOST_PAGES`] any may be one.
    pages: HashSet<u64, BuildKeyHasher>,
    /// 1 GiB regions with code in large pages; a region not among them has none, unless there are more than these.
    large: Vec<u64>,
}

/// 4 KiB pages remembered: a guest can fetch from one page of RAM at as many addresses as it likes.
const MOST_PAGES: usize = 16384;
/// Regions remembered.
const MOST_LARGE: usize = 8;

impl Fetched {
    fn new() -> Fetched {
        Fetched { pages: HashSet::default(), large: Vec::new() }
    }

    fn note(&mut self, lin: u64, large: bool) {
        if !large {
            if self.pages.len() <= MOST_PAGES {
                self.pages.insert(lin >> 12);
            }
        } else if self.large.len() <= MOST_LARGE && !self.large.contains(&(lin >> 30)) {
            self.large.push(lin >> 30);
        }
    }

    /// Whether code may have been fetched from `lin`'s page.
    fn holds(&self, lin: u64) -> bool {
        self.pages.contains(&(lin >> 12))
            || self.pages.len() > MOST_PAGES
            || self.large.len() > MOST_LARGE
            || self.large.contains(&(lin >> 30))
    }

    fn clear(&mut self) {
        self.pages.clear();
        self.large.clear();
    }
}

/// One address space's translations.
struct Slot {
    /// PCID it belongs to.
    pcid: u16,
    /// Holds translations of `pcid`; else they must be cleared before use.
    live: bool,
    /// For eviction: when it was last switched to.
    used: u64,
    /// Changes when the translation of a page that code was fetched from may have been dropped. Never the same for two slots.
    epoch: u64,
    fetched: Fetched,
    /// For user accesses.
    user: Box<TlbSet>,
}

/// TLB and RAM of one vCPU.
pub struct Mmu {
    /// The set in force.
    pub tlb: *mut TlbSet,
    /// Identifies the address space and privilege: what may be remembered of where code lies, for pages that are not global. Changes
    /// whenever a fetch could translate otherwise.
    pub context: u64,
    /// The same for global pages.
    pub global_context: u64,
    /// Current access mode.
    pub access_mode: usize,
    slot: usize,
    slots: Vec<Slot>,
    supervisor: [Box<TlbSet>; 2],
    global_epoch: u64,
    global_fetched: Fetched,
    /// RAM.
    pub ram: RamMap,
    /// Physical address bits beyond MAXPHYADDR: reserved in page-table entries.
    pub reserved_addr: u64,
    /// Pages that hold watchpoints (data breakpoints): page addresses, [`NO_PAGE`] when unused.
    pub watched: [u64; 8],
    /// Counters.
    pub misses: u64,
    /// Address spaces emptied.
    pub flushes: u64,
    next_epoch: u64,
    clock: u64,
    /// While every access must take the slow path: a set that matches nothing.
    nothing: Option<Box<TlbSet>>,
}

// SAFETY: `tlb` points into sets that the Mmu owns; whoever owns the Mmu owns both.
unsafe impl Send for Mmu {}

impl Mmu {
    /// Offset of the pointers to the two supervisor sets: [`mode::SUPERVISOR`], then [`mode::SUPERVISOR_USER`].
    pub const SUPERVISOR_SETS: usize = std::mem::offset_of!(Mmu, supervisor);

    /// An empty TLB over `ram`, with `maxphyaddr` physical address bits.
    pub fn new(ram: RamMap, maxphyaddr: u32) -> Mmu {
        let slot = || Slot {
            pcid: 0,
            live: false,
            used: 0,
            epoch: 0,
            fetched: Fetched::new(),
            user: TlbSet::new(true),
        };
        let mut m = Mmu {
            tlb: std::ptr::null_mut(),
            context: 0,
            global_context: 0,
            access_mode: mode::SUPERVISOR_USER,
            slot: 0,
            slots: (0..SLOTS).map(|_| slot()).collect(),
            supervisor: [TlbSet::new(false), TlbSet::new(false)],
            global_epoch: 0,
            global_fetched: Fetched::new(),
            ram,
            reserved_addr: !((1u64 << maxphyaddr.clamp(32, 52)) - 1) & 0x000f_ffff_ffff_ffff,
            watched: [NO_PAGE; 8],
            misses: 0,
            flushes: 0,
            next_epoch: 0,
            clock: 0,
            nothing: None,
        };
        m.flush_all();
        m.switch(0, false);
        m
    }

    /// Forget everything.
    pub fn flush_all(&mut self) {
        for s in &mut self.slots {
            s.live = false;
        }
        for set in &mut self.supervisor {
            set.clear();
        }
        self.global_fetched.clear();
        self.global_epoch = self.new_epoch();
        let slot = self.slot;
        self.revive(slot);
        self.select();
    }

    fn new_epoch(&mut self) -> u64 {
        self.next_epoch += 1;
        self.next_epoch
    }

    /// Empty a slot.
    fn revive(&mut self, slot: usize) {
        let epoch = self.new_epoch();
        let s = &mut self.slots[slot];
        s.user.clear();
        s.fetched.clear();
        s.live = true;
        s.epoch = epoch;
        self.flushes += 1;
    }

    /// Use the translations of `pcid` from now on; drop those that are not global first unless `keep`.
    pub fn switch(&mut self, pcid: u16, keep: bool) {
        self.clock += 1;
        let found = self.slots.iter().position(|s| s.live && s.pcid == pcid);
        let slot = found.unwrap_or_else(|| {
            let victim = (0..SLOTS).min_by_key(|&i| (self.slots[i].live, self.slots[i].used));
            victim.unwrap_or(0)
        });
        if found.is_none() || !keep {
            self.revive(slot);
        }
        if found.is_none() || !keep || slot != self.slot {
            for set in &mut self.supervisor {
                set.clear_local();
            }
        }
        self.slots[slot].pcid = pcid;
        self.slots[slot].used = self.clock;
        self.slot = slot;
        self.select();
    }

    /// Drop all translations of `pcid` that are not global.
    pub fn flush_pcid(&mut self, pcid: u16) {
        if let Some(i) = self.slots.iter().position(|s| s.live && s.pcid == pcid) {
            self.revive(i);
            if i == self.slot {
                for set in &mut self.supervisor {
                    set.clear_local();
                }
            }
            self.select();
        }
    }

    /// Drop the translations of `lin`'s page, in every address space.
    pub fn flush_page(&mut self, lin: u64) {
        for s in self.slots.iter_mut().filter(|s| s.live) {
            s.user.drop_page(lin);
        }
        for set in &mut self.supervisor {
            set.drop_page(lin);
        }
        // Jump caches remember where code lay also after its entry was evicted: they go by the epoch.
        for i in 0..SLOTS {
            if self.slots[i].live && self.slots[i].fetched.holds(lin) {
                self.slots[i].epoch = self.new_epoch();
                self.slots[i].fetched.clear();
            }
        }
        if self.global_fetched.holds(lin) {
            self.global_epoch = self.new_epoch();
            self.global_fetched.clear();
        }
        self.select();
    }

    /// Drop the fast store paths to the physical page `gpa` (page address), in every address space.
    pub fn drop_writes_to(&mut self, gpa: u64) {
        let host = self.ram.host(gpa).map(|h| h as u64);
        for s in self.slots.iter_mut().filter(|s| s.live) {
            s.user.drop_writes_to(gpa, host);
        }
        for set in &mut self.supervisor {
            set.drop_writes_to(gpa, host);
        }
    }

    /// Drop all fast store paths.
    pub fn drop_all_writes(&mut self) {
        for s in self.slots.iter_mut().filter(|s| s.live) {
            s.user.drop_all_writes();
        }
        for set in &mut self.supervisor {
            set.drop_all_writes();
        }
    }

    /// Set the access mode ([`mode`]).
    pub fn set_access_mode(&mut self, m: usize) {
        self.access_mode = m;
        self.select();
    }

    /// Whether [`Mmu::bypass`] is on.
    #[inline]
    pub fn bypassed(&self) -> bool {
        self.nothing.is_some()
    }

    /// Send every ordinary load and store by the slow path, or no longer.
    pub fn bypass(&mut self, on: bool) {
        self.nothing = on.then(|| TlbSet::new(false));
        self.select();
    }

    fn select(&mut self) {
        let m = self.access_mode;
        self.tlb = match &mut self.nothing {
            Some(none) => &raw mut **none,
            None => &raw mut *self.set_mut(m),
        };
        let user = u64::from(m == mode::USER);
        self.context = self.slots[self.slot].epoch << 1 | user;
        self.global_context = self.global_epoch << 1 | user;
    }

    #[inline]
    fn set(&self, m: usize) -> &TlbSet {
        if m == mode::USER { &self.slots[self.slot].user } else { &self.supervisor[m & 1] }
    }

    #[inline]
    fn set_mut(&mut self, m: usize) -> &mut TlbSet {
        if m == mode::USER { &mut self.slots[self.slot].user } else { &mut self.supervisor[m & 1] }
    }

    /// Enter a translation that a load or store in access mode `m` asked for.
    pub fn insert(&mut self, m: usize, lin: u64, mapping: &Mapping) {
        self.set_mut(m).insert(lin, mapping, true);
    }

    /// The host address for an access of `size` bytes at `lin` in access mode `m` if the TLB allows it at once.
    #[inline]
    pub fn hit(&self, m: usize, lin: u64, size: usize, write: bool) -> Option<*mut u8> {
        let set = self.set(m);
        let index = (lin >> 12) as usize % TLB_ENTRIES;
        let last = lin.wrapping_add(size as u64 - 1) & !0xfff;
        let tag = if write { set.write[index] } else { set.read[index] };
        // Both ends, as `size` may be more than what two neighbouring pages' tags can tell apart.
        (last == tag && lin & !0xfff == tag).then(|| lin.wrapping_add(set.addend[index]) as *mut u8)
    }

    /// The access mode whose set fetches use: what AC says about user pages does not matter to them.
    #[inline]
    pub fn fetch_mode(&self) -> usize {
        if self.access_mode == mode::USER { mode::USER } else { mode::SUPERVISOR }
    }

    /// The physical address of a fetch at `lin`, if the TLB has it.
    #[inline]
    pub fn fetch_hit(&self, lin: u64) -> Option<Fetch> {
        let index = (lin >> 12) as usize % TLB_ENTRIES;
        let set = self.set(self.fetch_mode());
        (set.fetch[index] == lin & !0xfff).then(|| Fetch {
            gpa: set.gpa[index] | lin & 0xfff,
            global: !bit(&set.local, index),
            large: bit(&set.large, index),
        })
    }

    /// Enter a translation that was made for a fetch: it says nothing about loads and stores.
    pub fn insert_fetch(&mut self, lin: u64, mapping: &Mapping) {
        let m = self.fetch_mode();
        self.set_mut(m).insert(lin, mapping, false);
    }

    /// Jumps may go by it that the page of `lin` lies at `frame` ([`super::frame`]), as a walk for a fetch has just found.
    pub fn note_code(&mut self, lin: u64, frame: u32, from: &Translation) {
        if self.access_mode == mode::USER {
            self.slots[self.slot].user.code.fill(lin, frame, from);
        } else {
            // What AC says does not matter to fetches.
            for set in &mut self.supervisor {
                set.code.fill(lin, frame, from);
            }
        }
    }

    /// Where code lies is going to be remembered under [`Mmu::context`], or [`Mmu::global_context`] if the page is global.
    #[inline]
    pub fn note_fetched(&mut self, lin: u64, from: &Fetch) {
        let fetched = if from.global { &mut self.global_fetched } else { &mut self.slots[self.slot].fetched };
        fetched.note(lin, from.large);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_remembered_of_fetches_is_bounded_and_forgets_nothing() {
        let mut f = Fetched::new();
        f.note(0x1000, false);
        assert!(f.holds(0x1fff) && !f.holds(0x2000));
        // One page of RAM at a great many addresses.
        (0..MOST_PAGES as u64 * 4).for_each(|n| f.note(n << 12, false));
        assert!(f.pages.len() <= MOST_PAGES + 1);
        assert!(f.holds(0x1000) && f.holds((MOST_PAGES as u64 * 4 - 1) << 12));
        f.clear();
        assert!(!f.holds(0x1000));
    }
}
