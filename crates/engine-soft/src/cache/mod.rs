//! Blocks of decoded ops, by guest physical address and mode, and the jump cache that finds them by linear address.
//!
//! Each vCPU has its own cache, so the run path takes no lock. A block is valid while the code word of the page (or the two pages) that
//! it was decoded from is unchanged; whoever writes to the page moves that word on (see `ringfort_memory::PageTracker`).

mod ops;
mod sync;

use ops::Kept;
pub use sync::CodeSync;

use crate::cpu::{Cpu, Trap};
use crate::decode::{self, Fetched, Mode, Op};
use crate::hash::{BuildKeyHasher, mix};
use crate::mmu::{Access, Fetch, Mapping};
use ringfort_memory::{PAGE_SHIFT, PageTracker};
use ringfort_x86::segment::{CS, DS, ES, SS};
use std::cell::Cell;
use std::collections::HashMap;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

/// Most ops in a block.
const MAX_OPS: usize = 48;
/// Entries of the jump cache.
const JUMPS: usize = 16384;
/// Ops of blocks that have no translation held before the cache is emptied.
const CAPACITY: usize = 1_000_000;
/// Blocks whose executions are counted also while the block is forgotten; further ones share a count.
const HEATS: usize = 1 << 17;
/// Ops held in blocks that have no translation (yet) before those are forgotten: most code of a boot executes once or twice.
const YOUNG: usize = 30_000;
/// Most blocks that are freed at once: so that emptying a full cache does not keep the guest waiting, they go a few with each that comes.
const FREED_AT_ONCE: usize = 16;

/// The state of one page's code when a block was decoded from it.
#[derive(Clone, Copy)]
struct Stamp {
    word: *const AtomicU32,
    value: u32,
}

impl Stamp {
    #[inline(always)]
    fn fresh(&self) -> bool {
        // SAFETY: the word belongs to a page tracker that lives as long as guest memory, which the Cpu owning this cache holds.
        unsafe { &*self.word }.load(Ordering::Acquire) == self.value
    }
}

/// The extent of a block's translation.
#[derive(Debug, Clone, Copy, Default)]
pub struct Place {
    /// Offset in code memory of the part that seldom executes; the instructions' marks follow it.
    pub seldom: u32,
    /// Bytes of that.
    pub seldom_size: u16,
    /// Bytes from [`Block::code`] on.
    pub size: u16,
    /// How many marks there are.
    pub marks: u8,
}

/// A run of decoded instructions. There are a hundred thousand of them, so it is kept small.
pub struct Block {
    /// The ops, from `Box::into_raw`; null while they are not there.
    held: Cell<*mut Op>,
    key: u64,
    /// Address of its translation; 0 while it has none.
    pub code: Cell<usize>,
    /// The page's code word.
    word: *const AtomicU32,
    /// For a block that is one page-crossing instruction: the second page's address and stamp.
    second: Option<Box<(u64, Stamp)>>,
    /// Where the rest of the translation lies.
    pub place: Cell<Place>,
    /// What the code word was when it was decoded.
    value: u32,
    /// What translated code names it by, or [`NO_NUMBER`].
    number: Cell<u32>,
    /// Bytes of guest code.
    pub bytes: u16,
    /// How many ops.
    count: u8,
    /// The ops were wanted since somebody looked.
    used: Cell<bool>,
    /// Times that the interpreter executed it.
    heat: Cell<u8>,
    /// Its translation holds only while more than its page is as it was: it says so itself, and is made anew then.
    pub guarded: Cell<bool>,
}

const _: () = assert!(size_of::<Block>() == 72 && MAX_OPS <= u8::MAX as usize);

/// Not named by translated code.
const NO_NUMBER: u32 = u32::MAX;

impl Block {
    /// Guest physical address of the first byte.
    #[inline(always)]
    pub fn gpa(&self) -> u64 {
        self.key >> 8
    }

    /// Where its first instruction lies in its page.
    #[inline(always)]
    pub fn first(&self) -> u64 {
        self.gpa() & 0xfff
    }

    fn new(ops: Box<[Op]>, bytes: u16, key: u64, stamp: Stamp, second: Option<(u64, Stamp)>) -> Block {
        let count = ops.len() as u8;
        Block {
            held: Cell::new(Box::into_raw(ops).cast()),
            key,
            code: Cell::new(0),
            word: stamp.word,
            second: second.map(Box::new),
            place: Cell::default(),
            value: stamp.value,
            number: Cell::new(NO_NUMBER),
            bytes,
            count,
            used: Cell::new(false),
            heat: Cell::new(0),
            guarded: Cell::new(false),
        }
    }

    /// What translated code names it by, given by `give` the first time.
    pub fn number(&self, give: impl FnOnce() -> u32) -> u32 {
        if self.number.get() == NO_NUMBER {
            self.number.set(give());
        }
        self.number.get()
    }

    /// It has to become hot again before it is translated.
    pub fn cool(&self) {
        self.heat.set(0);
    }

    /// How many instructions it has.
    pub fn count(&self) -> usize {
        self.count.into()
    }

    /// What it is found by: its address and, in the low byte, its decoding mode.
    pub fn key(&self) -> u64 {
        self.key
    }

    /// Whether all of it lies in one page of RAM.
    pub fn one_page(&self) -> bool {
        self.second.is_none()
    }

    /// Whether the code is still what it was decoded from.
    pub fn is_fresh(&self) -> bool {
        self.fresh()
    }

    /// For a block that is one page-crossing instruction the second page's physical address, its code word, and that one's value when the block
    /// was decoded.
    pub fn second_page(&self) -> Option<(u64, *const AtomicU32, u32)> {
        self.second.as_ref().map(|s| (s.0, s.1.word, s.1.value))
    }

    /// The page's code word, and its value when the block was decoded.
    pub fn stamp(&self) -> (*const AtomicU32, u32) {
        (self.word, self.value)
    }

    #[inline(always)]
    fn fresh(&self) -> bool {
        let stamp = Stamp { word: self.word, value: self.value };
        stamp.fresh() && self.second.as_ref().is_none_or(|s| s.1.fresh())
    }
}

#[derive(Clone, Copy)]
struct Jump {
    rip: u64,
    context: u64,
    block: *const Block,
}

const NO_JUMP: Jump = Jump { rip: 0, context: u64::MAX, block: ptr::null() };

/// All blocks of one vCPU.
pub struct BlockCache {
    #[allow(clippy::vec_box, reason = "jump-cache entries point to the blocks, so they must not move")]
    blocks: HashMap<u64, Box<Block>, BuildKeyHasher>,
    /// Those that have no translation yet.
    #[allow(clippy::vec_box, reason = "as for `blocks`")]
    young: HashMap<u64, Box<Block>, BuildKeyHasher>,
    jumps: Box<[Jump; JUMPS]>,
    /// A block that must not be found again: its bytes are not in RAM.
    transient: Option<Box<Block>>,
    /// Blocks that others have taken the place of; kept until the cache is emptied.
    #[allow(clippy::vec_box, reason = "as for `blocks`")]
    replaced: Vec<Box<Block>>,
    /// Blocks of before the cache was emptied, which nothing leads to any more, on their way out.
    leaving: Vec<std::collections::hash_map::IntoValues<u64, Box<Block>>>,
    /// The same of `replaced`.
    #[allow(clippy::vec_box, reason = "as for `blocks`: moving pointers is quicker than moving blocks")]
    leaving_replaced: Vec<Box<Block>>,
    /// How often blocks without a translation were executed, by a hash of the key.
    heats: Box<[u8; HEATS]>,
    /// Ops in `young` and `replaced`.
    ops: usize,
    /// Ops in `young`.
    young_ops: usize,
    /// Those blocks of `blocks` (and `replaced`) whose ops are there.
    pub(crate) kept: Kept,
    /// Room for ops.
    scratch: Cell<Vec<Op>>,
    /// Blocks decoded so far.
    pub decoded: u64,
    /// Under which context the block found last was remembered.
    pub context: u64,
}

// SAFETY: the raw pointers point into boxes that the cache owns and to words that outlive it; it is used by one thread at a time.
unsafe impl Send for BlockCache {}

impl Default for BlockCache {
    fn default() -> Self {
        let blocks = HashMap::default();
        BlockCache {
            blocks,
            young: HashMap::default(),
            jumps: Box::new([NO_JUMP; JUMPS]),
            transient: None,
            replaced: Vec::new(),
            leaving: Vec::new(),
            leaving_replaced: Vec::new(),
            heats: Box::new([0; HEATS]),
            ops: 0,
            young_ops: 0,
            kept: Kept::default(),
            scratch: Cell::default(),
            decoded: 0,
            context: 0,
        }
    }
}

impl BlockCache {
    /// The blocks that have a translation.
    pub fn translated(&self) -> impl Iterator<Item = &Block> {
        self.blocks.values().chain(&self.replaced).map(|b| &**b).filter(|b| b.code.get() != 0)
    }

    /// The block with this key.
    pub fn by_key(&self, key: u64) -> Option<*const Block> {
        self.blocks.get(&key).or_else(|| self.young.get(&key)).map(|b| &raw const **b)
    }

    /// Enter a block that was just decoded.
    fn insert(&mut self, block: Box<Block>) {
        let (key, ops) = (block.key, block.count());
        if self.young_ops > YOUNG {
            self.forget_young();
        }
        self.ops += ops;
        self.young_ops += ops;
        block.heat.set(self.heats[heat_slot(key)]);
        // Jump-cache entries may still point to what it takes the place of; they find it stale, or their context has changed.
        if let Some(old) = self.young.insert(key, block) {
            self.young_ops -= old.count();
            self.replaced.push(old);
        }
        self.replaced.extend(self.blocks.remove(&key));
    }

    /// The interpreter is going to execute a block: how often that was, with this time.
    pub fn warm(&mut self, b: &Block) -> u32 {
        let heat = b.heat.get().saturating_add(1);
        b.heat.set(heat);
        self.heats[heat_slot(b.key)] = heat;
        heat.into()
    }

    /// A block has got a translation.
    pub fn grown(&mut self, key: u64) {
        if let Some(block) = self.young.remove(&key) {
            self.young_ops -= block.count();
            self.ops -= block.count();
            if block.one_page() {
                self.kept.add(&block);
            }
            self.blocks.insert(key, block);
        }
    }

    /// Forget the blocks that have no translation. They are freed bit by bit.
    fn forget_young(&mut self) {
        let room = self.young.len();
        let fresh = HashMap::with_capacity_and_hasher(room, BuildKeyHasher::default());
        self.leaving.push(std::mem::replace(&mut self.young, fresh).into_values());
        self.jumps.fill(NO_JUMP);
        self.ops -= self.young_ops;
        self.young_ops = 0;
    }

    /// Nothing is found any more. Translations must go as well. What was there is freed bit by bit ([`BlockCache::free_some`]), and stays
    /// valid until another block is decoded.
    pub fn clear(&mut self) {
        self.forget_young();
        let room = self.blocks.len();
        let fresh = HashMap::with_capacity_and_hasher(room, BuildKeyHasher::default());
        self.leaving.push(std::mem::replace(&mut self.blocks, fresh).into_values());
        self.leaving_replaced.append(&mut self.replaced);
        self.kept = Kept::default();
        self.jumps.fill(NO_JUMP);
        self.ops = 0;
    }

    /// Free a few blocks of before the cache was emptied.
    fn free_some(&mut self) {
        for _ in 0..FREED_AT_ONCE {
            if self.leaving_replaced.pop().is_some() {
                continue;
            }
            let Some(last) = self.leaving.last_mut() else { return };
            if last.next().is_none() {
                self.leaving.pop();
            }
        }
    }
}

fn heat_slot(key: u64) -> usize {
    (mix(key) >> 47) as usize % HEATS
}

impl Cpu {
    /// The decoding mode in force.
    pub fn decode_mode(&self) -> Mode {
        let flat_segment = |n: usize| {
            let s = &self.seg[n];
            s.base == 0 && s.limit == u32::MAX && s.present()
        };
        let flat_data = |n: usize| {
            use ringfort_x86::segment::{CODE, EC, RW};
            flat_segment(n) && self.seg[n].attrs & (CODE | EC | RW) == RW
        };
        let flat = self.code_size == crate::cpu::CodeSize::Bits32
            && flat_segment(CS)
            && flat_data(SS)
            && flat_data(DS)
            && flat_data(ES);
        Mode { code: self.code_size, stack: self.stack_size(), flat, real: self.real_segments() }
    }

    /// Recompute the key of the decoding mode; after any change of CS, SS, DS, ES, CR0.PE, EFER or RFLAGS.VM.
    pub fn update_decode_mode(&mut self) {
        self.update_code_size();
        self.mode = self.decode_mode();
        self.mode_key = self.mode.key();
    }

    /// The block at CS:RIP. With `single`, a block of just one instruction, not kept.
    ///
    /// # Errors
    /// What the fetch raises.
    #[inline]
    pub fn find_block(&mut self, single: bool) -> Result<*const Block, Trap> {
        let rip = self.regs[usize::from(crate::cpu::RIP)];
        let lin = if self.code64() { rip } else { self.seg[CS].base.wrapping_add(rip) & 0xffff_ffff };
        let slot = (lin ^ lin >> 12) as usize % JUMPS;
        let j = &self.cache.jumps[slot];
        // SAFETY: a jump entry's block lives as long as the cache's map, which clears both together.
        if j.rip == lin && self.in_force(j.context) && !single && unsafe { &*j.block }.fresh() {
            // Outside 64-bit mode the CS limit is part of what a fetch checks; blocks do not span it because CS loads end blocks and
            // change nothing under a running one.
            if self.code64() || rip + u64::from(unsafe_len(j.block)) <= u64::from(self.seg[CS].limit) + 1 {
                self.cache.context = j.context >> 8;
                return Ok(j.block);
            }
        }
        let (block, from) = self.look_up_block(lin, rip, single)?;
        let global = from.global;
        self.cache.context = self.code_context(global);
        if !single && self.cache.transient.as_deref().is_none_or(|t| !ptr::eq(t, block)) {
            let context = self.code_context(global) << 8 | self.mode_key;
            self.mmu.note_fetched(lin, &from);
            // Of two pages it is another block at another address, which then takes this one's place.
            // SAFETY: just found.
            if unsafe { &*block }.one_page() {
                self.cache.jumps[slot] = Jump { rip: lin, context, block };
            }
        }
        Ok(block)
    }

    /// What identifies where code lies: in global pages or others.
    #[inline]
    pub(crate) fn code_context(&self, global: bool) -> u64 {
        if global { self.mmu.global_context } else { self.mmu.context }
    }

    #[inline(always)]
    fn in_force(&self, context: u64) -> bool {
        context == self.mmu.context << 8 | self.mode_key
            || context == self.mmu.global_context << 8 | self.mode_key
    }

    /// The block, and where it lies.
    #[cold]
    fn look_up_block(&mut self, lin: u64, rip: u64, single: bool) -> Result<(*const Block, Fetch), Trap> {
        if self.code64() {
            if (rip << 16) as i64 >> 16 != rip as i64 {
                return Err(self.gp(0));
            }
        } else if rip > u64::from(self.seg[CS].limit) {
            return Err(self.gp(0));
        }
        let mut from = self.fetch_translate(lin)?;
        let gpa = from.gpa;
        if single {
            return Ok((self.decode_block(lin, rip, gpa, 1, true)?, from));
        }
        let key = self.block_key(gpa);
        if let Some(block) = self.cache.by_key(key) {
            // SAFETY: the cache keeps a block until another is decoded.
            let b = unsafe { &*block };
            if b.fresh() && (self.code64() || rip + u64::from(b.bytes) <= u64::from(self.seg[CS].limit) + 1) {
                match b.second.as_deref() {
                    None => return Ok((block, from)),
                    // The page that follows by linear address may be another one now.
                    Some(&(second, _)) => {
                        let next = (lin | 0xfff).wrapping_add(1);
                        if self.fetch_translate(next)?.gpa == second {
                            self.note_second(next, &mut from)?;
                            return Ok((block, from));
                        }
                    }
                }
            }
        }
        self.replace_crossing(key);
        let block = self.decode_block(lin, rip, gpa, MAX_OPS, false)?;
        // SAFETY: just decoded, and kept.
        if unsafe { &*block }.second.is_some() {
            self.note_second((lin | 0xfff).wrapping_add(1), &mut from)?;
        }
        Ok((block, from))
    }

    /// A block of two pages is the same in all address spaces only if both are; the second begins at `next`.
    fn note_second(&mut self, next: u64, from: &mut Fetch) -> Result<(), Trap> {
        let next = if self.long_mode() { next } else { next & 0xffff_ffff };
        let tail = self.fetch_translate(next)?;
        from.global &= tail.global;
        self.mmu.note_fetched(next, &Fetch { global: from.global, ..tail });
        Ok(())
    }

    /// Translate a fetch at `lin`.
    pub(crate) fn fetch_translate(&mut self, lin: u64) -> Result<Fetch, Trap> {
        if let Some(hit) = self.mmu.fetch_hit(lin) {
            return Ok(hit);
        }
        let mode = self.mmu.fetch_mode();
        let t = self.translate(lin, Access::Fetch, mode)?;
        if let Some((slot, offset)) = self.mmu.ram.find(t.gpa) {
            // SAFETY: `find` gives an offset inside the slot's mapping.
            let host = unsafe { slot.host.add(offset as usize) };
            let (large, global) = (t.large, t.global);
            let mapping = Mapping { gpa: t.gpa, host, write: false, fetch: true, large, global };
            self.mmu.insert_fetch(lin, &mapping);
        }
        Ok(Fetch { gpa: t.gpa, global: t.global, large: t.large.is_some() })
    }

    /// Decode up to `most` instructions at `gpa`.
    fn decode_block(
        &mut self,
        lin: u64,
        rip: u64,
        gpa: u64,
        most: usize,
        transient: bool,
    ) -> Result<*const Block, Trap> {
        // What CS's limit leaves, in bytes; beyond it a fetch is #GP.
        let limit = if self.code64() { u64::MAX } else { u64::from(self.seg[CS].limit) + 1 - rip };
        let left = (0x1000 - (gpa & 0xfff)).min(limit) as usize;
        let found = self.mmu.ram.find(gpa).map(|(s, off)| (s.host, off, s.tracker.clone()));
        let Some((host, offset, tracker)) = found else {
            return self.decode_outside_ram(lin, gpa, limit);
        };
        let page = offset >> PAGE_SHIFT;
        let stamp = self.begin_code(&tracker, page, gpa);
        // SAFETY: `left` bytes from the offset lie in the same RAM page.
        let run = unsafe { self.decode_run(host.add(offset as usize), left, gpa, most) };
        if run.cut {
            if left as u64 == limit {
                return Err(self.gp(0));
            }
            // SAFETY: as above; it is fewer than 15.
            let head: [u8; 15] = unsafe { ops::copy(host.add(offset as usize), left) };
            return self.decode_crossing(lin, gpa, &head[..left], stamp, limit, transient);
        }
        let block = Block::new(run.ops, run.bytes as u16, self.block_key(gpa), stamp, None);
        Ok(self.keep(block, transient))
    }

    /// Decode the one instruction that begins at `gpa` with `head` and goes on in the next page.
    fn decode_crossing(
        &mut self,
        lin: u64,
        gpa: u64,
        head: &[u8],
        stamp: Stamp,
        limit: u64,
        transient: bool,
    ) -> Result<*const Block, Trap> {
        let next_lin = (lin | 0xfff).wrapping_add(1);
        let next_lin = if self.long_mode() { next_lin } else { next_lin & 0xffff_ffff };
        let next = self.fetch_translate(next_lin)?.gpa;
        let found = self.mmu.ram.find(next).map(|(s, off)| (s.host, off, s.tracker.clone()));
        let mut buf = [0u8; 30];
        buf[..head.len()].copy_from_slice(head);
        let more = (15 - head.len()).min((limit - head.len() as u64) as usize);
        let tail = &mut buf[head.len()..head.len() + more];
        let second = match found {
            Some((host, offset, tracker)) => {
                let second = self.begin_code(&tracker, offset >> PAGE_SHIFT, next);
                // SAFETY: fewer than 15 bytes from the start of a RAM page.
                unsafe { ptr::copy_nonoverlapping(host.add(offset as usize), tail.as_mut_ptr(), more) };
                Some((next, second))
            }
            None => {
                for (n, b) in tail.iter_mut().enumerate() {
                    self.env.bus.mmio_read(next + n as u64, std::slice::from_mut(b));
                }
                None
            }
        };
        let op = self.decode_one(&buf[..head.len() + more], gpa, limit)?;
        let len = op.len.into();
        let block = Block::new(Box::new([op]), len, self.block_key(gpa), stamp, second);
        Ok(self.keep(block, transient || second.is_none()))
    }

    /// Decode one instruction whose bytes come from a device.
    fn decode_outside_ram(&mut self, lin: u64, gpa: u64, limit: u64) -> Result<*const Block, Trap> {
        let mut buf = [0u8; 15];
        let here = (0x1000 - (gpa & 0xfff)).min(15).min(limit) as usize;
        for (n, b) in buf[..here].iter_mut().enumerate() {
            self.env.bus.mmio_read(gpa + n as u64, std::slice::from_mut(b));
        }
        let mut have = here;
        if here < 15 && (here as u64) < limit {
            let mut d = decode::decoder(&buf[..here], 0, self.mode, self.decode_options);
            if matches!(decode::next(&mut d), Fetched::Incomplete) {
                let next = self.fetch_translate((lin | 0xfff).wrapping_add(1))?.gpa;
                have = (limit.min(15)) as usize;
                for (n, b) in buf[here..have].iter_mut().enumerate() {
                    match self.mmu.ram.host(next + n as u64) {
                        // SAFETY: a byte of a RAM page.
                        Some(p) => *b = unsafe { p.read() },
                        None => self.env.bus.mmio_read(next + n as u64, std::slice::from_mut(b)),
                    }
                }
            }
        }
        let op = self.decode_one(&buf[..have], gpa, limit)?;
        static ALWAYS: AtomicU32 = AtomicU32::new(0);
        let stamp = Stamp { word: &ALWAYS, value: 0 };
        let len = op.len.into();
        let block = Block::new(Box::new([op]), len, self.block_key(gpa), stamp, None);
        Ok(self.keep(block, true))
    }

    fn decode_one(&mut self, bytes: &[u8], gpa: u64, limit: u64) -> Result<Op, Trap> {
        let at = gpa & 0xfff;
        let mut d = decode::decoder(bytes, at, self.mode, self.decode_options);
        match decode::next(&mut d) {
            Fetched::Instruction(i) => {
                let len = i.len().max(1).min(bytes.len());
                Ok(decode::lower(&i, &bytes[..len], at as u16, self.mode, &self.features))
            }
            Fetched::Incomplete if bytes.len() as u64 == limit => Err(self.gp(0)),
            _ => Err(self.gp(0)),
        }
    }

    /// The key of a block at `gpa` in the mode in force.
    fn block_key(&self, gpa: u64) -> u64 {
        gpa << 8 | self.mode_key
    }

    fn keep(&mut self, block: Block, transient: bool) -> *const Block {
        self.cache.decoded += 1;
        self.cache.free_some();
        let block = Box::new(block);
        let at: *const Block = &raw const *block;
        if transient {
            self.cache.transient = Some(block);
        } else {
            if self.cache.ops > CAPACITY {
                self.drop_translations();
            }
            self.cache.insert(block);
        }
        at
    }

    /// Declare that code of `page` is being decoded, before its bytes are read.
    fn begin_code(&mut self, tracker: &PageTracker, page: u64, gpa: u64) -> Stamp {
        self.env.vm.code_sync.begin();
        let (generation, stores_unseen) = tracker.begin_code(page);
        if stores_unseen {
            self.env.vm.code_sync.announce(&self.env, gpa & !0xfff);
        }
        self.env.vm.code_sync.end();
        // Another vCPU may have found code here first, and its post to this one be under way.
        if stores_unseen || !self.env.vm.code_sync.settled() {
            self.mmu.drop_writes_to(gpa & !0xfff);
        }
        Stamp { word: tracker.word(page), value: generation | PageTracker::CODE_BIT }
    }

    /// As [`Cpu::begin_code`]: the code word of the page at `offset` of a RAM slot, and what it must hold.
    pub(crate) fn code_stamp(
        &mut self,
        tracker: &PageTracker,
        offset: u64,
        gpa: u64,
    ) -> (*const AtomicU32, u32) {
        let s = self.begin_code(tracker, offset >> PAGE_SHIFT, gpa);
        (s.word, s.value)
    }

    /// End the running block after the current instruction.
    #[inline]
    pub fn stop_block(&mut self) {
        self.block_end = ptr::null();
    }
}

fn unsafe_len(block: *const Block) -> u16 {
    // SAFETY: called only with a block that the cache holds.
    unsafe { (*block).bytes }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_translation_is_forgotten_but_not_how_often_it_was_executed() {
        static WORD: AtomicU32 = AtomicU32::new(0);
        let mut m = crate::testing::Machine::new(crate::testing::TestMode::Long64);
        m.load_code(&[0x90, 0xf4]);
        let block = m.cpu.find_block(true).unwrap();
        // SAFETY: just found.
        let op = unsafe { (&*block).ops() }[0].clone();
        let mut cache = BlockCache::default();
        let block = |key| {
            let ops = vec![op.clone(); 10].into_boxed_slice();
            Box::new(Block::new(ops, 1, key, Stamp { word: &WORD, value: 0 }, None))
        };
        let most = YOUNG as u64 / 10;
        cache.insert(block(7));
        cache.insert(block(8));
        // SAFETY: nothing was decoded, nothing freed.
        let b = unsafe { &*cache.by_key(7).unwrap() };
        assert_eq!((cache.warm(b), cache.warm(b)), (1, 2));
        cache.grown(8);
        // Another with the key of one that has a translation takes its place.
        cache.insert(block(9));
        cache.grown(9);
        cache.insert(block(9));
        assert_eq!((cache.replaced.len(), cache.blocks.len(), cache.young.len()), (1, 1, 2));
        (0..=most).for_each(|n| cache.insert(block(1000 + n)));
        assert!(cache.by_key(7).is_none() && cache.by_key(8).is_some());
        assert!(cache.young_ops <= YOUNG + 10);
        assert_eq!(cache.ops, cache.young_ops);
        cache.insert(block(7));
        // SAFETY: as above.
        assert_eq!(unsafe { &*cache.by_key(7).unwrap() }.heat.get(), 2);
        cache.clear();
        assert_eq!((cache.ops, cache.young_ops, cache.by_key(8)), (0, 0, None));
    }

    #[test]
    fn a_full_cache_is_freed_bit_by_bit() {
        static WORD: AtomicU32 = AtomicU32::new(0);
        let block = |key| Box::new(Block::new(Box::default(), 1, key, Stamp { word: &WORD, value: 0 }, None));
        let mut cache = BlockCache::default();
        for n in 0..1000 {
            cache.blocks.insert(n, block(n));
            if n % 4 == 0 {
                cache.replaced.push(block(n));
            }
        }
        let left = |c: &BlockCache| {
            c.leaving.iter().map(ExactSizeIterator::len).sum::<usize>() + c.leaving_replaced.len()
        };
        cache.clear();
        assert_eq!((cache.blocks.len(), left(&cache)), (0, 1250));
        // Emptied again before all have left.
        cache.free_some();
        assert_eq!(left(&cache), 1250 - FREED_AT_ONCE);
        cache.blocks.insert(1, block(1));
        cache.clear();
        let mut steps = 0;
        while left(&cache) > 0 {
            let before = left(&cache);
            cache.free_some();
            assert!(before - left(&cache) <= FREED_AT_ONCE);
            steps += 1;
        }
        assert!((1234 / FREED_AT_ONCE..200).contains(&steps));
        cache.free_some();
        assert!(cache.leaving.is_empty());
    }
}
