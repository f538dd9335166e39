//! Memory accesses that remember the page they went to last.
//!
//! Each access (or group of them) has a [`Place`] in every TLB set: the check compares the address with the place's page and takes the
//! distance to host memory from there, so that the access itself waits for neither. One that goes to another page asks the TLB, by a
//! stub, and the place takes that page over. Those that seldom find the same page again probe the TLB instead, once somebody has noticed
//! ([`Cpu::reconsider`]): their block is translated anew.

use super::asm::{Address, Code, Hole, Holes, SP, T0, T1, TLB};
use super::block::Emit;
use super::memory::{Operand, Wanted};
use super::stubs::{MISSING, Saved};
use super::{MOST_PER_OP, Translator, refill};
use crate::cpu::{Cpu, RIP, ZERO};
use crate::decode::{Op, op_flags};
use crate::hash::{BuildKeyHasher, mix};
use crate::mmu::{INDEX_MASK, PATIENCE, PLACES, Place, Places, TlbSet};
use std::collections::HashMap;
use std::mem::offset_of;

/// Places that several accesses share because they go to the same page; further ones belong to one access each.
const SHARED: u16 = 1536;
/// Places of the others.
const OWN: usize = PLACES - SHARED as usize;
/// Accesses whose site is known, 16 bytes each. What is forgotten may miss a better translation, nothing else.
const MOST_SITES: usize = 256 * OWN;
/// A place misses too often if it takes no more ticks than this from one miss to the next.
const SELDOM: u64 = 300;

/// Where an access belongs that may turn out to miss too often.
#[derive(Clone, Copy)]
pub(super) struct Site {
    /// Its block: see [`crate::cache::Block::key`].
    block: u64,
    /// Number of the instruction in the block.
    op: u8,
}

/// Which place an access has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Which {
    /// This one; what goes there always goes to the same page, as long as pages lie where they lie.
    Fixed(u16),
    /// One of its own.
    Own,
}

/// All accesses that remember.
pub(super) struct Recall {
    /// By number among those that have a place of their own; of the last [`MOST_SITES`] of them.
    sites: Vec<Site>,
    /// Accesses with a place of their own so far.
    own: usize,
    /// When each place's patience ended last.
    ended: Box<[u64; PLACES]>,
    /// For blocks which of their instructions do not remember.
    probing: HashMap<u64, u64, BuildKeyHasher>,
}

/// What a miss of a place needs.
#[derive(Clone, Copy)]
pub(super) struct Recalled {
    /// The address; if there is none it is in [`T0`], where the host address goes as well.
    ea: Option<Address>,
    id: u32,
    wanted: Wanted,
    /// Where to go on, the distance being in [`T1`], or the host address in [`T0`].
    back: usize,
}

impl Recall {
    pub fn new() -> Recall {
        Recall { sites: Vec::new(), own: 0, ended: Box::new([0; PLACES]), probing: HashMap::default() }
    }

    /// Nothing is translated any more.
    pub fn clear(&mut self) {
        self.sites.clear();
        self.own = 0;
        self.probing.clear();
    }

    /// Which instructions of the block do not remember, a bit each.
    pub fn probing(&self, block: u64) -> u64 {
        self.probing.get(&block).copied().unwrap_or(0)
    }

    /// The number of an access: its place's, and from [`PLACES`] on what tells it from others that have the same.
    fn add(&mut self, which: Which, write: bool, site: Site) -> u32 {
        if let Which::Fixed(place) = which {
            return u32::from(place | u16::from(write));
        }
        let n = self.own % MOST_SITES;
        self.own += 1;
        match self.sites.get_mut(n) {
            Some(of_old) => *of_old = site,
            None => self.sites.push(site),
        }
        (n / OWN * PLACES + usize::from(SHARED) + n % OWN) as u32
    }

    /// The site of the access with this number, unless its place is shared. That of a later one where there were too many.
    fn site(&self, id: u32) -> Option<Site> {
        let (round, place) = (id as usize / PLACES, id as usize % PLACES);
        let own = place.checked_sub(SHARED.into())?;
        self.sites.get(round * OWN + own).copied()
    }
}

/// Offset of a field of the [`Places`] in the TLB set.
const fn at(field: usize) -> i32 {
    (offset_of!(TlbSet, places) + field) as i32
}

/// Offset of a place.
fn place(id: u32, field: usize) -> i32 {
    at(offset_of!(Places, entries)) + (id as usize % PLACES * size_of::<Place>() + field) as i32
}

/// Bits of an access's number.
const IDS: u32 = 0xff_ffff;

const _: () = assert!(size_of::<Place>() == 16 && PLACES.is_power_of_two() && PLACES > SHARED as usize);
const _: () = assert!(MOST_SITES / OWN * PLACES <= IDS as usize + 1);

/// The place of loads from what `n` stands for; stores have the next one, as a page may be there to be read only.
fn shared(n: u64) -> u16 {
    (mix(n) >> 32) as u16 % (SHARED / 2) * 2
}

impl Emit<'_> {
    /// The place of the op's memory operand, if it is to have one.
    pub(super) fn place_of(&self, op: &Op) -> Option<Which> {
        let page = op.disp >> 12;
        let flat = op.flags & op_flags::FLAT != 0;
        match (op.base, op.index) {
            (RIP, ZERO) if flat => Some(Which::Fixed(shared((self.page >> 12).wrapping_add(page)))),
            (ZERO, ZERO) if flat => Some(Which::Fixed(shared(page))),
            (ZERO, ZERO) => Some(Which::Fixed(shared(page ^ u64::from(op.seg) << 52))),
            _ => self.loops.then_some(Which::Own),
        }
    }

    /// The place of an access by this host register. Not by the stack pointer: which page that is in changes with the depth of calls.
    pub(super) fn place_at(&self, base: u8) -> Option<Which> {
        (self.loops && base != SP).then_some(Which::Own)
    }

    /// Whether the access of the instruction at hand may remember its page.
    pub(super) fn recalls(&self, wanted: Wanted) -> bool {
        wanted.size <= 256 && self.probing >> self.n & 1 == 0
    }

    /// Check the place of an access; then the distance from guest to host addresses is in [`T1`] if `distance`, or the host address in [`T0`].
    pub(super) fn recall(
        &mut self,
        which: Which,
        ea: Address,
        wanted: Wanted,
        distance: bool,
    ) -> (Hole, Recalled) {
        let id = self.recall.add(which, wanted.write, Site { block: self.key, op: self.n as u8 });
        self.linear(ea);
        let checked = if distance {
            T0
        } else {
            self.c.mov(T1, T0);
            T1
        };
        self.c.rm(0x33, checked, TLB, place(id, offset_of!(Place, page)));
        let miss = self.in_page(checked, wanted);
        let addend = place(id, offset_of!(Place, addend));
        if distance {
            self.c.load(T1, TLB, addend);
        } else {
            self.c.rm(0x03, T0, TLB, addend);
        }
        let ea = distance.then_some(ea);
        (miss, Recalled { ea, id, wanted, back: self.c.at() })
    }

    /// A linear address into [`T0`].
    pub(super) fn linear(&mut self, ea: Address) {
        match ea {
            Address { base: Some(T0), index: None, disp: 0 } => {}
            Address { base: Some(r), index: None, disp: 0 } => self.c.mov(T0, r),
            _ => self.c.mem(0x8d, T0, ea),
        }
    }

    /// An operand at a place.
    pub(super) fn recalled_operand(
        &mut self,
        which: Which,
        ea: Address,
        uses_t0: bool,
        wanted: Wanted,
    ) -> Operand {
        match ea.single() {
            Some(index) if !uses_t0 => {
                let (from, recalled) = self.recall(which, ea, wanted, true);
                let at = Address { base: Some(T1), index: Some(index), disp: ea.disp };
                Operand { at, spare: T0, miss: Some((from, recalled).into()) }
            }
            None if !uses_t0 && ea.base.is_some() => {
                let (from, recalled) = self.recall(which, ea, wanted, true);
                // The access waits for the index no longer than it would without us.
                if let Some(base) = ea.base {
                    self.c.rr(0x01, base, T1); // add r14, base
                }
                let at = Address { base: Some(T1), ..ea };
                Operand { at, spare: T0, miss: Some((from, recalled).into()) }
            }
            _ => {
                let (from, recalled) = self.recall(which, ea, wanted, false);
                let at = Address { base: Some(T0), index: None, disp: 0 };
                Operand { at, spare: T1, miss: Some((from, recalled).into()) }
            }
        }
    }

    /// What a miss of a place leads to; from the holes it goes on to what cannot be done at once.
    pub(super) fn emit_recalled(&mut self, r: Recalled) -> Holes {
        let mut slow = Holes::default();
        if let Some(ea) = r.ea {
            self.linear(ea);
        }
        if let Some(hole) = self.misaligned(r.wanted) {
            slow.push(hole);
        }
        self.c.raw(&[0x68]); // push
        self.c.raw(&(r.id | (r.wanted.size.max(1) as u32 - 1) << 24).to_le_bytes());
        let (base, to) =
            (self.base, if r.wanted.write { self.stubs.recall_write } else { self.stubs.recall_read });
        self.c.far(0xe8, base, to);
        slow.push(self.c.jcc(5));
        if r.ea.is_none() {
            self.c.rr(0x01, T1, T0); // add r13, r14
        }
        let back = self.c.jmp();
        self.c.fill(back, r.back);
        slow
    }
}

/// The stub that a miss of a place calls, having pushed the place's number and the access's size less one from bit 24 on: the linear address
/// in [`T0`] is looked up, and entered at the place. With ZF the distance is in [`T1`]; without, the handler is to do it.
pub(super) fn stub(c: &mut Code, write: bool, fast_pext: bool, saved: &Saved) {
    let again = c.at();
    let tags = if write { offset_of!(TlbSet, write) } else { offset_of!(TlbSet, read) };
    let entry = |disp: usize| Address { base: Some(TLB), index: Some((T1, 3)), disp: disp as i32 };
    if fast_pext {
        c.raw(&[0xc4, 0x42, 0x92, 0xf5, 0x37]); // pext r14, r13, [r15]
    } else {
        c.mov(T1, T0);
        c.raw(&[0x49, 0xc1, 0xee, 12]); // shr r14, 12
        c.raw(&[0x41, 0x81, 0xe6]); // and r14d
        c.raw(&((INDEX_MASK >> 12) as u32).to_le_bytes());
    }
    c.raw(&[0x50]); // push rax
    c.raw(&[0x0f, 0xb6, 0x44, 0x24, 0x13]); // movzx eax, byte [rsp + 19]
    c.rr(0x01, T0, 0); // add rax, r13
    c.raw(&[0x48, 0x25, 0, 0xf0, 0xff, 0xff]); // and rax, -4096
    c.mem(0x3b, 0, entry(tags)); // cmp rax, [tags + r14 * 8]
    let fail = c.jcc(5);
    c.raw(&[0x43, 0x80, 0xbc, 0x37]); // cmp byte [r15 + r14 + lasting], 0
    c.raw(&at(offset_of!(Places, lasting)).to_le_bytes());
    c.raw(&[0]);
    let passing = c.jcc(4);
    c.raw(&[0x51]); // push rcx
    let number = |c: &mut Code| {
        c.raw(&[0x8b, 0x4c, 0x24, 0x18, 0x81, 0xe1]); // mov ecx, [rsp + 24]; and ecx
        c.raw(&(PLACES as u32 - 1).to_le_bytes());
    };
    number(c);
    c.raw(&[0x43, 0xc6, 0x84, 0x37]); // mov byte [r15 + r14 + pages], 1
    c.raw(&at(offset_of!(Places, pages)).to_le_bytes());
    c.raw(&[1]);
    c.mem(0x8b, T1, entry(offset_of!(TlbSet, addend)));
    c.raw(&[0x01, 0xc9]); // add ecx, ecx
    let field = |disp: usize| Address {
        base: Some(TLB),
        index: Some((1, 3)),
        disp: at(offset_of!(Places, entries) + disp),
    };
    c.mem(0x89, 0, field(offset_of!(Place, page)));
    c.mem(0x89, T1, field(offset_of!(Place, addend)));
    if write {
        c.rr(0x01, T1, 0); // add rax, r14
        c.raw(&[0x48, 0xc1, 0xe8, 12, 0x25]); // shr rax, 12; and eax
        c.raw(&((INDEX_MASK >> 12) as u32).to_le_bytes());
        c.raw(&[0x41, 0xc6, 0x84, 0x07]); // mov byte [r15 + rax + stores], 1
        c.raw(&at(offset_of!(Places, stores)).to_le_bytes());
        c.raw(&[1]);
    }
    c.raw(&[0xc1, 0xe9, 7, 0x41, 0xc6, 0x84, 0x0f]); // shr ecx, 7; mov byte [r15 + rcx + dirty], 1
    c.raw(&at(offset_of!(Places, dirty)).to_le_bytes());
    c.raw(&[1]);
    number(c);
    c.raw(&[0x41, 0x83, 0xac, 0x8f]); // sub dword [r15 + rcx * 4 + patience], 1
    c.raw(&at(offset_of!(Places, patience)).to_le_bytes());
    c.raw(&[1]);
    let tired = c.jcc(8);
    c.raw(&[0x59, 0x58, 0x39, 0xc0, 0xc2, 8, 0]); // pop rcx; pop rax; cmp eax, eax; ret 8
    c.land(tired);
    c.raw(&[0x41, 0xc7, 0x84, 0x8f]); // mov dword [r15 + rcx * 4 + patience]
    c.raw(&at(offset_of!(Places, patience)).to_le_bytes());
    c.raw(&PATIENCE.to_le_bytes());
    c.raw(&[0x8b, 0x4c, 0x24, 0x18, 0x0f, 0xba, 0xe9, 31]); // mov ecx, [rsp + 24]; bts ecx, 31
    c.cpu32(&[0x89], 1, MISSING);
    c.raw(&[0x59, 0x58, 0x83, 0xfc, 0, 0xc2, 8, 0]); // pop rcx; pop rax; cmp esp, 0; ret 8
    c.land(passing);
    c.mem(0x8b, T1, entry(offset_of!(TlbSet, addend)));
    c.raw(&[0x58, 0x39, 0xc0, 0xc2, 8, 0]); // pop rax; cmp eax, eax; ret 8
    c.land(fail);
    c.raw(&[0x58]); // pop rax
    refill::body(c, write, saved, 3);
    let filled = c.jcc(4);
    c.fill(filled, again);
    c.raw(&[0xc2, 8, 0]); // ret 8
}

impl Translator {
    /// The block and instruction of a place that misses too often.
    fn misses_too_often(&mut self, id: u32, now: u64) -> Option<Site> {
        let site = self.recall.site(id);
        let ended = &mut self.recall.ended[id as usize % PLACES];
        let took = now.wrapping_sub(std::mem::replace(ended, now));
        if took > SELDOM * u64::from(PATIENCE) {
            return None;
        }
        site
    }
}

impl Cpu {
    /// The patience with a place's misses has ended: if it misses too often its block is translated anew, so that it probes the TLB.
    #[cold]
    pub(super) fn reconsider(&mut self) {
        let id = std::mem::take(&mut self.hot.missing) & IDS;
        // SAFETY: RDTSC only reads the counter; every x86-64 CPU has it.
        let now = unsafe { std::arch::x86_64::_rdtsc() };
        let Some(site) = self.translator.as_mut().and_then(|t| t.misses_too_often(id, now)) else { return };
        let Some(block) = self.cache.by_key(site.block) else { return };
        // SAFETY: the cache keeps a block until another is decoded.
        let b = unsafe { &*block };
        let Some(t) = self.translator.as_mut() else { return };
        let old = b.code.get();
        if old == 0 || b.guarded.get() || !b.is_fresh() || t.room() < (b.count() + 4) * MOST_PER_OP {
            return;
        }
        *t.recall.probing.entry(site.block).or_default() |= 1 << site.op;
        if self.translate_block(b)
            && let Some(t) = self.translator.as_mut()
        {
            t.divert(old, b.code.get());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sites_are_found_by_number_and_bounded() {
        let mut recall = Recall::new();
        let add = |recall: &mut Recall, n: usize| {
            recall.add(Which::Own, false, Site { block: n as u64, op: (n % 64) as u8 })
        };
        let ids: Vec<u32> = (0..MOST_SITES).map(|n| add(&mut recall, n)).collect();
        for (n, &id) in ids.iter().enumerate() {
            assert!((usize::from(SHARED)..PLACES).contains(&(id as usize % PLACES)) && id <= IDS);
            assert_eq!(recall.site(id).map(|s| (s.block, s.op)), Some((n as u64, (n % 64) as u8)));
        }
        for n in MOST_SITES..MOST_SITES + 10 {
            let id = add(&mut recall, n);
            assert_eq!(recall.site(id).map(|s| s.block), Some(n as u64));
        }
        assert_eq!(recall.sites.len(), MOST_SITES);
        let shared = recall.add(Which::Fixed(6), true, Site { block: 0, op: 0 });
        assert!(shared == 7 && recall.site(shared).is_none());
        recall.clear();
        assert!(recall.site(ids[0]).is_none());
    }
}
