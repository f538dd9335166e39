//! The software TLB.
//!
//! A direct-mapped array of entries for each of three access modes, in one slot per recently used address space (PCID), so that a
//! switch of address spaces by a guest that uses PCIDs empties nothing.

use ringfort_memory::RamMap;

/// log2 of the entries per set.
pub const TLB_BITS: u32 = 10;
/// Entries per set.
pub const TLB_ENTRIES: usize = 1 << TLB_BITS;
/// Address spaces kept.
pub const SLOTS: usize = 8;
/// A tag that matches no page.
pub const NO_PAGE: u64 = u64::MAX;

/// Access modes, one TLB set each.
pub mod mode {
    /// Supervisor, may not touch user pages (SMAP with AC clear).
    pub const SUPERVISOR: usize = 0;
    /// Supervisor, may touch user pages.
    pub const SUPERVISOR_USER: usize = 1;
    /// User.
    pub const USER: usize = 2;
    /// How many there are.
    pub const COUNT: usize = 3;
}

/// One page's translation. A tag is the page's linear address when the access is allowed without further ado, else [`NO_PAGE`].
#[derive(Debug, Clone, Copy)]
#[repr(C, align(32))]
pub struct TlbEntry {
    /// Tag for loads.
    pub read: u64,
    /// Tag for stores: only while the page's D bit is set, it holds no decoded code, and no dirty log wants its first store.
    pub write: u64,
    /// Tag for fetches.
    pub fetch: u64,
    /// Host address minus linear address.
    pub addend: u64,
}

const EMPTY: TlbEntry = TlbEntry { read: NO_PAGE, write: NO_PAGE, fetch: NO_PAGE, addend: 0 };

/// The entries of one access mode.
#[repr(C, align(64))]
pub struct TlbSet {
    /// Indexed by the low bits of the page number.
    pub entries: [TlbEntry; TLB_ENTRIES],
    /// Guest physical page addresses of the entries.
    pub gpa: [u64; TLB_ENTRIES],
}

/// One address space's translations.
pub struct Slot {
    /// PCID it belongs to.
    pub pcid: u16,
    /// Holds translations of `pcid`; else they must be cleared before use.
    pub live: bool,
    /// For eviction: when it was last switched to.
    pub used: u64,
    /// Changes when any translation of the slot may have been dropped. Never the same for two slots.
    pub epoch: u64,
    /// Lowest and highest linear address that is covered by a large page, for INVLPG.
    pub large: (u64, u64),
    /// Per access mode.
    pub sets: Box<[TlbSet; mode::COUNT]>,
}

impl Slot {
    fn new() -> Slot {
        let set = || TlbSet { entries: [EMPTY; TLB_ENTRIES], gpa: [0; TLB_ENTRIES] };
        Slot {
            pcid: 0,
            live: false,
            used: 0,
            epoch: 0,
            large: (u64::MAX, 0),
            sets: Box::new([set(), set(), set()]),
        }
    }

    fn clear(&mut self) {
        for set in self.sets.iter_mut() {
            set.entries.fill(EMPTY);
        }
        self.large = (u64::MAX, 0);
    }
}

/// TLB and RAM of one vCPU.
pub struct Mmu {
    /// The entries in force: of the current slot and access mode.
    pub tlb: *mut TlbEntry,
    /// Identifies slot, access mode and their state: what a jump cache may key on. Changes whenever a fetch could translate otherwise.
    pub context: u64,
    /// Current access mode.
    pub access_mode: usize,
    /// Current slot.
    pub slot: usize,
    /// All slots.
    pub slots: Vec<Slot>,
    /// RAM.
    pub ram: RamMap,
    /// Physical address bits beyond MAXPHYADDR: reserved in page-table entries.
    pub reserved_addr: u64,
    /// Pages that hold watchpoints (data breakpoints): page addresses, [`NO_PAGE`] when unused.
    pub watched: [u64; 8],
    /// Counters.
    pub misses: u64,
    next_epoch: u64,
    clock: u64,
    /// While every access must take the slow path: a set of entries that match nothing.
    nothing: Option<Box<[TlbEntry; TLB_ENTRIES]>>,
}

// SAFETY: `tlb` points into `slots`, which the Mmu owns; whoever owns the Mmu owns both.
unsafe impl Send for Mmu {}

impl Mmu {
    /// An empty TLB over `ram`, with `maxphyaddr` physical address bits.
    pub fn new(ram: RamMap, maxphyaddr: u32) -> Mmu {
        let mut m = Mmu {
            tlb: std::ptr::null_mut(),
            context: 0,
            access_mode: mode::SUPERVISOR_USER,
            slot: 0,
            slots: (0..SLOTS).map(|_| Slot::new()).collect(),
            ram,
            reserved_addr: !((1u64 << maxphyaddr.clamp(32, 52)) - 1) & 0x000f_ffff_ffff_ffff,
            watched: [NO_PAGE; 8],
            misses: 0,
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
        let slot = self.slot;
        self.revive(slot);
        self.select();
    }

    fn revive(&mut self, slot: usize) {
        let s = &mut self.slots[slot];
        s.clear();
        s.live = true;
        self.next_epoch += 1;
        s.epoch = self.next_epoch;
    }

    /// Use the translations of `pcid` from now on; drop them first unless `keep`.
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
        self.slots[slot].pcid = pcid;
        self.slots[slot].used = self.clock;
        self.slot = slot;
        self.select();
    }

    /// Drop all translations of `pcid`.
    pub fn flush_pcid(&mut self, pcid: u16) {
        if let Some(i) = self.slots.iter().position(|s| s.live && s.pcid == pcid) {
            self.revive(i);
            self.select();
        }
    }

    /// Drop the translations of `lin`'s page in every slot.
    pub fn flush_page(&mut self, lin: u64) {
        let page = lin & !0xfff;
        let index = (lin >> 12) as usize % TLB_ENTRIES;
        for i in 0..SLOTS {
            let s = &mut self.slots[i];
            if !s.live {
                continue;
            }
            if (s.large.0..=s.large.1).contains(&lin) {
                self.revive(i);
                continue;
            }
            let mut fetched = false;
            for set in s.sets.iter_mut() {
                let e = &mut set.entries[index];
                fetched |= e.fetch == page;
                if e.read == page || e.write == page || e.fetch == page {
                    *e = EMPTY;
                }
            }
            // An evicted entry may still have a trace in a jump cache, so any drop of a mapping moves the epoch.
            let _ = fetched;
            self.next_epoch += 1;
            s.epoch = self.next_epoch;
        }
        self.select();
    }

    /// Drop the fast store paths to the physical page `gpa` (page address), in every slot.
    pub fn drop_writes_to(&mut self, gpa: u64) {
        for s in self.slots.iter_mut().filter(|s| s.live) {
            for set in s.sets.iter_mut() {
                for (e, &g) in set.entries.iter_mut().zip(&set.gpa) {
                    if g == gpa {
                        e.write = NO_PAGE;
                    }
                }
            }
        }
    }

    /// Drop all fast store paths.
    pub fn drop_all_writes(&mut self) {
        for s in self.slots.iter_mut().filter(|s| s.live) {
            for e in s.sets.iter_mut().flat_map(|set| set.entries.iter_mut()) {
                e.write = NO_PAGE;
            }
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
        self.nothing = on.then(|| Box::new([EMPTY; TLB_ENTRIES]));
        self.select();
    }

    fn select(&mut self) {
        let s = &mut self.slots[self.slot];
        self.tlb = match &mut self.nothing {
            Some(none) => none.as_mut_ptr(),
            None => s.sets[self.access_mode].entries.as_mut_ptr(),
        };
        self.context = s.epoch << 2 | self.access_mode as u64;
    }

    /// Enter a translation into the current slot's set of `m`.
    #[allow(clippy::too_many_arguments, reason = "one call site; a struct would only rename them")]
    pub fn insert(
        &mut self,
        m: usize,
        lin: u64,
        gpa: u64,
        host: *mut u8,
        write: bool,
        fetch: bool,
        large: Option<u64>,
    ) {
        let page = lin & !0xfff;
        let index = (lin >> 12) as usize % TLB_ENTRIES;
        let s = &mut self.slots[self.slot];
        if let Some(size) = large {
            let start = lin & !(size - 1);
            s.large = (s.large.0.min(start), s.large.1.max(start + (size - 1)));
        }
        let set = &mut s.sets[m];
        set.gpa[index] = gpa & !0xfff;
        let e = &mut set.entries[index];
        // The permissions of another access to the same page stay; those of another page go.
        if e.read != page {
            *e = EMPTY;
        }
        e.read = page;
        e.addend = (host as u64 & !0xfff).wrapping_sub(page);
        if write {
            e.write = page;
        }
        if fetch {
            e.fetch = page;
        }
    }
}

impl Mmu {
    /// The host address for an access of `size` bytes at `lin` in access mode `m` if the TLB allows it at once.
    #[inline]
    pub fn hit(&self, m: usize, lin: u64, size: usize, write: bool) -> Option<*mut u8> {
        let e = &self.slots[self.slot].sets[m].entries[(lin >> 12) as usize % TLB_ENTRIES];
        let page = lin.wrapping_add(size as u64 - 1) & !0xfff;
        let tag = if write { e.write } else { e.read };
        // Both ends, as `size` may be more than what two neighbouring pages' tags can tell apart.
        (page == tag && lin & !0xfff == tag).then(|| lin.wrapping_add(e.addend) as *mut u8)
    }

    /// The physical address of a fetch at `lin`, if the TLB has it.
    #[inline]
    pub fn fetch_hit(&self, lin: u64) -> Option<u64> {
        let index = (lin >> 12) as usize % TLB_ENTRIES;
        let set = &self.slots[self.slot].sets[self.access_mode];
        (set.entries[index].fetch == lin & !0xfff).then(|| set.gpa[index] | lin & 0xfff)
    }

    /// Enter a translation that was made for a fetch: it says nothing about loads and stores.
    pub fn insert_fetch(&mut self, m: usize, lin: u64, gpa: u64, host: *mut u8, large: Option<u64>) {
        let page = lin & !0xfff;
        let index = (lin >> 12) as usize % TLB_ENTRIES;
        let s = &mut self.slots[self.slot];
        if let Some(size) = large {
            let start = lin & !(size - 1);
            s.large = (s.large.0.min(start), s.large.1.max(start + (size - 1)));
        }
        let set = &mut s.sets[m];
        let e = &mut set.entries[index];
        if e.read != page {
            *e = EMPTY;
        }
        e.fetch = page;
        e.addend = (host as u64 & !0xfff).wrapping_sub(page);
        set.gpa[index] = gpa & !0xfff;
    }
}
