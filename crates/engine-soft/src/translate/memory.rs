//! Memory operands: from a guest address to a host address by an inline look at the TLB.
//!
//! [`Emit::operand`] is all that other forms need: it leaves a host address in terms of registers, and one scratch register free. Host flags
//! are lost; [`Emit::spare_flags`] comes first.

use super::asm::{Address, Hole, SP, T0, T1, TLB};
use super::block::{Emit, pinned};
use super::group::Group;
use super::recall::Recalled;
use super::refill::Refill;
use super::stubs::{KEPT, reg_at};
use crate::cpu::{Cpu, ZERO};
use crate::decode::{Op, op_flags};
use crate::mmu::{INDEX_MASK, TlbSet};
use std::mem::offset_of;

/// A memory operand after its probe.
pub(super) struct Operand {
    /// Where it is in host memory; valid until [`T0`] and [`T1`] change.
    pub at: Address,
    /// The scratch register that is not part of the address.
    pub spare: u8,
    /// Where a miss comes from; none within a group, whose own probe it is.
    pub miss: Option<Miss>,
}

/// Where an access that cannot be done at once comes from.
#[derive(Clone, Copy)]
pub(super) struct Miss {
    pub from: Hole,
    /// What may help without the op's handler.
    pub remedy: Option<Remedy>,
}

/// What may help an access that missed.
#[derive(Clone, Copy)]
pub(super) enum Remedy {
    /// It may only be that it went to another page than before.
    Recall(Recalled),
    /// It may only be that the TLB does not know the page yet.
    Refill(Refill),
}

impl From<Hole> for Miss {
    fn from(from: Hole) -> Miss {
        Miss { from, remedy: None }
    }
}

impl From<Hole> for Option<Miss> {
    fn from(from: Hole) -> Option<Miss> {
        Some(from.into())
    }
}

impl From<(Hole, Recalled)> for Miss {
    fn from((from, recalled): (Hole, Recalled)) -> Miss {
        Miss { from, remedy: Some(Remedy::Recall(recalled)) }
    }
}

/// What an access wants.
#[derive(Clone, Copy)]
pub(super) struct Wanted {
    /// Bytes.
    pub size: usize,
    /// It stores.
    pub write: bool,
    /// Alignment demanded, in bytes: misaligned accesses miss.
    pub align: u8,
}

impl Wanted {
    /// Eight bytes of stack.
    pub fn stack(write: bool) -> Wanted {
        Wanted { size: 8, write, align: 1 }
    }
}

const _: () = assert!(offset_of!(TlbSet, index_mask) == 0);

impl Emit<'_> {
    /// Whether [`Emit::operand`] can form the op's address.
    pub(super) fn reachable(op: &Op) -> bool {
        i32::try_from(op.disp as i64).is_ok_and(|d| d < i32::MAX - 64)
    }

    /// The linear address of the memory operand, in terms of host registers and perhaps [`T0`]. Clobbers flags where a segment base or
    /// two registers that live in memory take part.
    pub(super) fn address(&mut self, op: &Op) -> Address {
        let disp = op.disp as i32;
        let home = |n: u8| if n == ZERO { None } else { pinned(n).is_none().then_some(n) };
        let index = pinned(op.index).map(|r| (r, op.scale));
        let mut at = match (home(op.base), home(op.index)) {
            (None, None) => Address { base: pinned(op.base), index, disp },
            (Some(b), None) => {
                self.c.load_cpu(T0, reg_at(b));
                Address { base: Some(T0), index, disp }
            }
            (None, Some(i)) => {
                self.c.load_cpu(T0, reg_at(i));
                Address { base: pinned(op.base), index: Some((T0, op.scale)), disp }
            }
            (Some(b), Some(i)) => {
                self.c.load_cpu(T0, reg_at(i));
                self.c.lea(T0, None, Some((T0, op.scale)), 0);
                self.c.cpu(0x03, T0, reg_at(b));
                Address { base: Some(T0), index: None, disp }
            }
        };
        if op.flags & op_flags::FLAT == 0 {
            self.c.mem(0x8d, T0, at);
            at = Address { base: Some(T0), index: None, disp: 0 };
            if op.flags & op_flags::FLAT32 != 0 {
                self.c.raw(&[0x45, 0x89, 0xed]); // mov r13d, r13d
            } else {
                let base = offset_of!(Cpu, seg) + usize::from(op.seg) * size_of::<ringfort_x86::Segment>();
                self.c.cpu(0x03, T0, (base + offset_of!(ringfort_x86::Segment, base)) as i32);
            }
        }
        at
    }

    /// Probe the TLB for the op's memory operand.
    pub(super) fn operand(&mut self, op: &Op, wanted: Wanted) -> Operand {
        if let Some(base) = self.group_base() {
            debug_assert_eq!(pinned(op.base), Some(base));
            return Emit::in_group(base, op.disp as i32);
        }
        let at = self.address(op);
        let uses_t0 = at.base == Some(T0) || at.index.is_some_and(|i| i.0 == T0);
        if self.recalls(wanted)
            && let Some(which) = self.place_of(op)
        {
            return self.recalled_operand(which, at, uses_t0, wanted);
        }
        let miss = self.probe(at, wanted);
        self.placed(at, uses_t0, wanted, miss)
    }

    /// The same for an address in terms of host registers other than the scratch ones.
    pub(super) fn operand_at(&mut self, at: Address, wanted: Wanted) -> Operand {
        if let Some(base) = self.group_base() {
            debug_assert_eq!(at.base, Some(base));
            return Emit::in_group(base, at.disp);
        }
        if self.recalls(wanted)
            && let Some(which) = at.base.and_then(|base| self.place_at(base))
        {
            return self.recalled_operand(which, at, false, wanted);
        }
        let miss = self.probe(at, wanted);
        self.placed(at, false, wanted, miss)
    }

    /// An operand within a group, whose distance from guest to host addresses is in [`T1`].
    fn in_group(base: u8, disp: i32) -> Operand {
        Operand { at: Address { base: Some(T1), index: Some((base, 0)), disp }, spare: T0, miss: None }
    }

    /// Probe for a group; the distance comes into [`T1`], where it stays while the group lasts.
    pub(super) fn probe_group(&mut self, g: &Group) -> Miss {
        let at = Address { base: Some(g.base), index: None, disp: g.low };
        let wanted = Wanted { size: (g.high - g.low) as usize, write: g.write, align: 1 };
        if self.recalls(wanted)
            && let Some(which) = self.place_at(g.base)
        {
            return self.recall(which, at, wanted, true).into();
        }
        let miss = self.probe(at, wanted);
        self.c.mem(0x8b, T1, Emit::addend());
        miss
    }

    /// The index of the TLB's entry for the page of the address in `reg`, into [`T1`].
    pub(super) fn index_of(&mut self, reg: u8) {
        if self.fast_pext {
            // pext r14, reg, [r15]: the mask
            self.c.raw(&[0xc4, 0x42, (!reg & 15) << 3 | 0x82, 0xf5, 0x37]);
        } else {
            self.c.mov(T1, reg);
            self.c.raw(&[0x49, 0xc1, 0xee, 12]); // shr r14, 12
            self.c.raw(&[0x41, 0x81, 0xe6]); // and r14d
            self.c.raw(&((INDEX_MASK >> 12) as u32).to_le_bytes());
        }
    }

    /// An element of one of the TLB's arrays, by the index in [`T1`].
    fn entry(array: usize) -> Address {
        Address { base: Some(TLB), index: Some((T1, 3)), disp: array as i32 }
    }

    /// The distance from guest to host addresses in the TLB's entry whose index is in [`T1`].
    pub(super) fn addend() -> Address {
        Emit::entry(offset_of!(TlbSet, addend))
    }

    /// A jump from here unless scratch register `reg` is the offset in a page of an access that lies in it. Clobbers it if it must be aligned.
    pub(super) fn in_page(&mut self, reg: u8, wanted: Wanted) -> Hole {
        let shift = wanted.align.trailing_zeros() as u8;
        if shift > 0 {
            // What is misaligned becomes a large number.
            self.c.raw(&[0x49, 0xc1, 0xc8 | reg & 7, shift]); // ror
        }
        self.c.raw(&[0x49, 0x81, 0xf8 | reg & 7]); // cmp
        self.c.raw(&((4096 - wanted.size.max(1) as u32) >> shift).to_le_bytes());
        self.c.jcc(7)
    }

    /// Leaves the entry's index in [`T1`], and in [`T0`] the offset in the page unless it must be aligned.
    pub(super) fn probe(&mut self, at: Address, wanted: Wanted) -> Miss {
        let again = self.c.at();
        let tag = if wanted.write { offset_of!(TlbSet, write) } else { offset_of!(TlbSet, read) };
        match at {
            // The move costs nothing, and nothing waits for it.
            Address { base: Some(reg), index: None, disp: 0 } if reg != T0 => {
                self.index_of(reg);
                self.linear(at);
            }
            _ => {
                self.linear(at);
                self.index_of(T0);
            }
        }
        // The offset in the page, if this is the page.
        self.c.mem(0x33, T0, Emit::entry(tag)); // xor r13
        let from = self.in_page(T0, wanted);
        Miss { from, remedy: Refill::new(at, wanted, again).map(Remedy::Refill) }
    }

    fn placed(&mut self, at: Address, uses_t0: bool, wanted: Wanted, miss: Miss) -> Operand {
        let miss = Some(miss);
        match at.single() {
            // The access waits for the entry no longer than for its distance.
            Some(i) if !uses_t0 => {
                self.c.mem(0x8b, T1, Emit::addend());
                let at = Address { base: Some(T1), index: Some(i), disp: at.disp };
                Operand { at, spare: T0, miss }
            }
            _ => {
                let shift = wanted.align.trailing_zeros() as u8;
                if shift > 0 {
                    self.c.raw(&[0x49, 0xc1, 0xc5, shift]); // rol r13
                }
                self.c.mem(0x03, T0, Emit::entry(offset_of!(TlbSet, host))); // add r13
                Operand { at: Address { base: Some(T0), index: None, disp: 0 }, spare: T1, miss }
            }
        }
    }

    /// Put a scratch register aside, or get it back.
    pub(super) fn keep(&mut self, reg: u8) {
        self.c.store_cpu(reg, KEPT);
    }

    /// See [`Emit::keep`].
    pub(super) fn kept(&mut self, reg: u8) {
        self.c.load_cpu(reg, KEPT);
    }

    /// PUSH of eight bytes of memory.
    pub(super) fn push_memory(&mut self, op: &Op) {
        self.spare_flags();
        let lost = self.lost();
        let from = self.operand(op, Wanted::stack(false));
        self.c.mem(0x8b, T0, from.at);
        self.keep(T0);
        let (to, _) = self.stack(SP, -8, true);
        self.kept(to.spare);
        self.c.mem(0x89, to.spare, to.at);
        self.c.lea(SP, Some(SP), None, -8);
        self.slow_path(from.miss, op, lost);
        self.slow_path(to.miss, op, lost);
    }

    /// LEA, of 64 bits if `wide`, else of 32: no segment takes part. Host flags stay.
    pub(super) fn lea(&mut self, op: &Op, wide: bool) {
        let flat = Op { flags: op.flags | op_flags::FLAT, ..op.clone() };
        let index_in_memory = flat.index != ZERO && pinned(flat.index).is_none();
        let to = pinned(op.dst / 8).unwrap_or(T0);
        let last = if Emit::reachable(&flat) && !index_in_memory {
            let at = self.address(&flat);
            let last = self.c.at();
            self.c.mem(0x8d, to, at);
            last
        } else {
            self.c.imm64(T0, flat.disp);
            if flat.base != ZERO {
                let base = self.value(flat.base, T1);
                self.c.lea(T0, Some(T0), Some((base, 0)), 0);
            }
            if flat.index != ZERO {
                let index = self.value(flat.index, T1);
                self.c.lea(T0, Some(T0), Some((index, flat.scale)), 0);
            }
            let last = self.c.at();
            self.c.mov(to, T0);
            last
        };
        if !wide {
            self.c.bytes[last] &= !8; // without REX.W
        }
        if to == T0 {
            self.c.store_cpu(T0, reg_at(op.dst / 8));
        }
    }
}
