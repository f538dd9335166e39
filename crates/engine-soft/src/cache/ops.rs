//! The decoded ops of blocks. Once a block has a translation they are seldom wanted: the oldest are dropped then, and decoded again for
//! whoever wants them, from code that has not changed.

use super::Block;
use crate::cpu::Cpu;
use crate::decode::{self, Fetched, Op, op_flags};
use crate::hash::mix;
use std::cell::Cell;
use std::collections::VecDeque;
use std::ptr;

/// Ops held of blocks that have a translation.
const MOST_KEPT: usize = 16_000;
/// See [`Recent`].
const RECENT: usize = 64;
/// Bytes of code that most blocks do with.
const FEW: usize = 192;

impl Drop for Block {
    fn drop(&mut self) {
        self.let_go();
    }
}

impl Block {
    /// The ops; none if they were dropped ([`Cpu::ops_of`] has them back). A block without a translation has always all of them.
    ///
    /// # Safety
    /// The answer must not be used any more when a block gets a translation or dropped ops are had back.
    pub unsafe fn ops(&self) -> &[Op] {
        if self.held.get().is_null() {
            return &[];
        }
        // SAFETY: so many are there, until [`Kept::add`] lets them go.
        unsafe { std::slice::from_raw_parts(self.held.get(), self.count()) }
    }

    /// Free the ops. Nobody has them.
    fn let_go(&self) {
        let held = self.held.replace(ptr::null_mut());
        if !held.is_null() {
            // SAFETY: from `Box::into_raw` of so many, and forgotten now.
            drop(unsafe { Box::from_raw(ptr::slice_from_raw_parts_mut(held, self.count())) });
        }
    }
}

/// Blocks with a translation whose ops are there, oldest first. Not those that are one instruction of two pages.
#[derive(Default)]
pub(crate) struct Kept {
    blocks: VecDeque<*const Block>,
    ops: usize,
    recent: Recent,
}

/// Ops that translated code has executed by their handlers lately, each by the name that it has there.
struct Recent([(u32, *const Op); RECENT]);

impl Default for Recent {
    fn default() -> Recent {
        Recent([(u32::MAX, ptr::null()); RECENT])
    }
}

impl Recent {
    /// Where the op of a name may be.
    fn slot(name: u32) -> usize {
        (mix(name.into()) >> 32) as usize % RECENT
    }
}

impl Kept {
    /// The op of that name, if it was noted and is still there.
    #[inline]
    pub fn recent(&self, name: u32) -> Option<*const Op> {
        let (known, op) = self.recent.0[Recent::slot(name)];
        (known == name && !op.is_null()).then_some(op)
    }

    /// This is the op of that name.
    pub fn note(&mut self, name: u32, op: *const Op) {
        self.recent.0[Recent::slot(name)] = (name, op);
    }

    /// `b` has got a translation, or its ops back. The oldest give way, but for those that were wanted lately.
    pub fn add(&mut self, b: &Block) {
        b.used.set(true);
        self.blocks.push_back(b);
        self.ops += b.count();
        while self.ops > MOST_KEPT
            && let Some(old) = self.blocks.pop_front()
        {
            // SAFETY: the cache keeps its blocks until it is emptied, when this is as well.
            let block = unsafe { &*old };
            if block.used.take() {
                self.blocks.push_back(old);
                continue;
            }
            self.ops -= block.count();
            block.let_go();
            self.recent = Recent::default();
        }
    }
}

/// What [`Cpu::decode_run`] found.
pub(super) struct Run {
    pub ops: Box<[Op]>,
    /// Bytes that they take.
    pub bytes: usize,
    /// There are none, because the bytes end inside the first instruction.
    pub cut: bool,
}

/// Room for the ops of a block that is being decoded, which goes back to where it is from.
struct Scratch<'a> {
    ops: Vec<Op>,
    from: &'a Cell<Vec<Op>>,
}

impl Scratch<'_> {
    fn take(from: &Cell<Vec<Op>>) -> Scratch<'_> {
        let mut ops = from.take();
        ops.clear();
        Scratch { ops, from }
    }
}

impl Drop for Scratch<'_> {
    fn drop(&mut self) {
        self.from.set(std::mem::take(&mut self.ops));
    }
}

impl Cpu {
    /// The ops of a block of this cache, which is to be executed in the mode in force; `None` if they were dropped and the code has changed
    /// since. They hold until a block gets a translation or other ops are had back.
    pub(crate) fn ops_of(&mut self, b: &Block) -> Option<*const [Op]> {
        b.used.set(true);
        // SAFETY: just looked at.
        if unsafe { b.ops() }.is_empty() {
            self.decode_again(b)?;
        }
        Some(ptr::slice_from_raw_parts(b.held.get(), b.count()))
    }

    #[cold]
    fn decode_again(&mut self, b: &Block) -> Option<()> {
        if b.key() & 0xff != self.mode_key {
            return None;
        }
        let (slot, offset) = self.mmu.ram.find(b.gpa())?;
        let left = (0x1000 - b.first()).min(b.bytes.into()) as usize;
        // SAFETY: as many bytes from the offset lie in the same RAM page.
        let run = unsafe { self.decode_run(slot.host.add(offset as usize), left, b.gpa(), b.count()) };
        // Read before this: they are what they were decoded from the first time.
        if !b.is_fresh() || run.ops.len() != b.count() {
            return None;
        }
        b.held.set(Box::into_raw(run.ops).cast());
        self.cache.kept.add(b);
        Some(())
    }

    /// Decode a block of up to `most` instructions of the `left` bytes at `host`, in the mode in force; they lie at `gpa`.
    ///
    /// # Safety
    /// The bytes must be there; others may write to them meanwhile.
    pub(super) unsafe fn decode_run(&self, host: *const u8, left: usize, gpa: u64, most: usize) -> Run {
        // SAFETY: passed on.
        unsafe {
            let bytes: [u8; FEW] = copy(host, left);
            let (run, ended) = self.decode_bytes(&bytes[..left.min(FEW)], gpa, most);
            if ended || left <= FEW {
                return run;
            }
            let bytes: [u8; 4096] = copy(host, left);
            self.decode_bytes(&bytes[..left.min(4096)], gpa, most).0
        }
    }

    /// As [`Cpu::decode_run`]; and whether the block ends before the bytes do.
    fn decode_bytes(&self, bytes: &[u8], gpa: u64, most: usize) -> (Run, bool) {
        let first = (gpa & 0xfff) as usize;
        let mut decoder = decode::decoder(bytes, first as u64, self.mode, self.decode_options);
        let mut scratch = Scratch::take(&self.cache.scratch);
        let ops = &mut scratch.ops;
        let mut used = 0;
        while ops.len() < most {
            let off = decoder.position();
            let at = (first + off) as u16;
            match decode::next(&mut decoder) {
                Fetched::Instruction(i) => {
                    let end = off + i.len().max(1);
                    let op =
                        decode::lower(&i, &bytes[off..end.min(bytes.len())], at, self.mode, &self.features);
                    used = end;
                    let last =
                        op.flags & op_flags::END != 0 || i.flow_control() != iced_x86::FlowControl::Next;
                    ops.push(op);
                    if last {
                        return (Run { ops: ops.as_slice().into(), bytes: used, cut: false }, true);
                    }
                }
                Fetched::TooLong => {
                    let mut op =
                        decode::lower(&iced_x86::Instruction::default(), &[], at, self.mode, &self.features);
                    op.run = decode::too_long;
                    ops.push(op);
                    return (Run { ops: ops.as_slice().into(), bytes: bytes.len(), cut: false }, true);
                }
                Fetched::Incomplete => {
                    let cut = ops.is_empty();
                    return (Run { ops: ops.as_slice().into(), bytes: used, cut }, false);
                }
            }
        }
        (Run { ops: ops.as_slice().into(), bytes: used, cut: false }, true)
    }
}

/// Up to `N` of the `left` bytes at `from`, zeroes behind them.
///
/// # Safety
/// As for [`Cpu::decode_run`].
pub(super) unsafe fn copy<const N: usize>(from: *const u8, left: usize) -> [u8; N] {
    let mut bytes = [0; N];
    // SAFETY: as many are there, and fit.
    unsafe { ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), left.min(N)) };
    bytes
}

#[cfg(test)]
mod tests {
    use super::super::{BlockCache, Stamp};
    use super::*;
    use std::sync::atomic::AtomicU32;

    #[test]
    fn the_oldest_ops_give_way_but_not_those_in_use() {
        static WORD: AtomicU32 = AtomicU32::new(0);
        let mut m = crate::testing::Machine::new(crate::testing::TestMode::Long64);
        m.load_code(&[0x90, 0xf4]);
        let block = m.cpu.find_block(true).unwrap();
        // SAFETY: just found.
        let op = unsafe { (&*block).ops() }[0].clone();
        let block = |n: u64| {
            let ops = vec![op.clone(); 10].into_boxed_slice();
            Box::new(Block::new(ops, 1, n << 8, Stamp { word: &WORD, value: 0 }, None))
        };
        let mut cache = BlockCache::default();
        let mut add = |n: u64| {
            cache.insert(block(n));
            cache.grown(n << 8);
            cache.by_key(n << 8).unwrap()
        };
        let all: Vec<_> = (0..MOST_KEPT as u64 / 10).map(&mut add).collect();
        // SAFETY: the cache holds them.
        let there = |b: *const Block| !unsafe { (&*b).ops() }.is_empty();
        assert!(all.iter().all(|&b| there(b)));
        // All were wanted when they came; nobody wants any but the second now.
        add(10_000);
        assert!(!there(all[0]));
        // SAFETY: as above.
        unsafe { (*all[1]).used.set(true) };
        let newest: Vec<_> = (20_000..20_100).map(&mut add).collect();
        assert!(there(all[1]) && newest.iter().all(|&b| there(b)));
        assert!(!all[2..102].iter().any(|&b| there(b)) && there(all[102]));
        assert_eq!(cache.kept.ops, MOST_KEPT);
        // SAFETY: as above.
        assert_eq!((unsafe { &*all[0] }.count(), cache.ops), (10, 0));
        cache.clear();
        assert_eq!((cache.kept.ops, cache.kept.blocks.len()), (0, 0));
    }

    #[test]
    fn ops_are_had_back_as_long_as_the_code_is_what_it_was() {
        let mut m = crate::testing::Machine::new(crate::testing::TestMode::Long64);
        // mov eax, 5; add eax, ebx; ret
        m.load_code(&[0xb8, 5, 0, 0, 0, 0x01, 0xd8, 0xc3]);
        let block = m.cpu.find_block(false).unwrap();
        // SAFETY: the cache holds it.
        let b = unsafe { &*block };
        let look = |ops: &[Op]| ops.iter().map(|o| (o.run as usize, o.imm, o.off, o.len)).collect::<Vec<_>>();
        // SAFETY: used at once.
        let before = look(unsafe { b.ops() });
        assert_eq!(before.len(), 3);
        b.let_go();
        let again = m.cpu.ops_of(b).unwrap();
        // SAFETY: just had back.
        assert_eq!(look(unsafe { &*again }), before);
        assert_eq!(m.cpu.cache.kept.ops, 3);
        b.let_go();
        m.load_code(&[0xb8, 6, 0, 0, 0, 0x01, 0xd8, 0xc3]);
        assert!(!b.is_fresh() && m.cpu.ops_of(b).is_none());
    }
}
