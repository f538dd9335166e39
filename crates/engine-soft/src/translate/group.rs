//! Groups: instructions in a row whose memory operands lie close together at one register take one probe of the TLB for all of them.
//!
//! The probe asks for the whole range at once: all of it must lie in one page that allows what any of them does. If not, the handlers do the
//! whole group, one by one, so that each fault is found where it belongs.

use super::asm::SP;
use super::block::{Emit, number, pinned};
use super::choose::{How, alignment, writes_memory};
use crate::cpu::ZERO;
use crate::decode::{Op, op_flags};
use crate::native;
use iced_x86::{Code as I, Instruction, OpKind, Register};

/// Widest range of a group, in bytes: the wider, the oftener it does not lie in one page.
const WIDEST: i32 = 192;

/// A group of instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Group {
    /// First and last instruction.
    pub first: usize,
    /// See `first`.
    pub last: usize,
    /// Host register that holds the base.
    pub base: u8,
    /// The range, relative to what the base is at first.
    pub low: i32,
    /// Its end.
    pub high: i32,
    /// Some of it is written.
    pub write: bool,
}

/// A memory operand in terms of a base register.
struct Access {
    base: u8,
    disp: i32,
    size: i32,
    write: bool,
}

/// How many general registers that live in memory `i` names.
fn homed(i: &Instruction) -> usize {
    let mut seen = 0u32;
    for n in 0..i.op_count() {
        let r = i.op_register(n);
        if i.op_kind(n) == OpKind::Register && r.is_gpr() && pinned(number(r)).is_none() {
            seen |= 1 << number(r);
        }
    }
    seen.count_ones() as usize
}

/// The operand of `i` if a group can hold it. `moved` is how far the stack pointer is from where the group began.
fn access(i: &Instruction, op: &Op, how: How, moved: i32) -> Option<Access> {
    match how {
        How::Push => Some(Access { base: SP, disp: moved - 8, size: 8, write: true }),
        How::Pop if op.dst / 8 != 4 => Some(Access { base: SP, disp: moved, size: 8, write: false }),
        How::Return => Some(Access { base: SP, disp: moved, size: 8, write: false }),
        How::CallRelative => Some(Access { base: SP, disp: moved - 8, size: 8, write: true }),
        How::Same | How::Vector { .. }
            if alignment(i, how) == 1
                && op.flags & op_flags::MEM != 0
                && op.flags & op_flags::FLAT != 0
                && op.index == ZERO
                && homed(i) <= 1 =>
        {
            let base = pinned(op.base)?;
            let disp = i32::try_from(op.disp as i64).ok().filter(|d| d.abs() < 1 << 20)?;
            let write = if how == How::Same { writes_memory(i) } else { native::stores(i) };
            let moved = if base == SP { moved } else { 0 };
            Some(Access { base, disp: disp + moved, size: i32::from(op.memsize).max(1), write })
        }
        _ => None,
    }
}

/// What `i` adds to the stack pointer, if it does nothing else with it.
fn stack_step(i: &Instruction, how: How) -> Option<i32> {
    let by_immediate = |sign: i32| {
        (i.op0_register() == Register::RSP)
            .then(|| i32::try_from(i.immediate32to64()).ok()?.checked_mul(sign))
            .flatten()
    };
    match (how, i.code()) {
        (How::Push | How::CallRelative, _) => Some(-8),
        (How::Pop, _) => Some(8),
        (How::Same, I::Add_rm64_imm8) => {
            (i.op0_register() == Register::RSP).then(|| i.immediate8to64() as i32)
        }
        (How::Same, I::Sub_rm64_imm8) => {
            (i.op0_register() == Register::RSP).then(|| -(i.immediate8to64() as i32))
        }
        (How::Same, I::Add_rm64_imm32) => by_immediate(1),
        (How::Same, I::Sub_rm64_imm32) => by_immediate(-1),
        _ => None,
    }
}

/// Whether `i`, which touches no memory, can stand between members of a group: it leaves a scratch register alone.
fn neutral(i: &Instruction, op: &Op, how: How) -> bool {
    match how {
        How::Nothing => true,
        How::Same | How::Vector { .. } => op.flags & op_flags::MEM == 0 && homed(i) <= 1,
        How::Lea => {
            Emit::reachable(op)
                && (op.index == ZERO || pinned(op.index).is_some())
                && pinned(op.dst / 8).is_some()
        }
        _ => false,
    }
}

impl Emit<'_> {
    /// The groups of the block's instructions, in order.
    pub(super) fn plan_groups(&self, instructions: &[Instruction], ops: &[Op]) -> Vec<Group> {
        let mut groups = Vec::new();
        let mut n = 0;
        while n < ops.len() {
            match self.group_at(instructions, ops, n) {
                Some(g) => {
                    n = g.last + 1;
                    groups.push(g);
                }
                None => n += 1,
            }
        }
        groups
    }

    /// The group that begins with instruction `first`, if one does.
    fn group_at(&self, instructions: &[Instruction], ops: &[Op], first: usize) -> Option<Group> {
        let a = access(&instructions[first], &ops[first], self.hows[first], 0)?;
        let guest = (0..16).find(|&g| pinned(g) == Some(a.base))?;
        let mut g =
            Group { first, last: first, base: a.base, low: a.disp, high: a.disp + a.size, write: a.write };
        let mut moved = 0;
        for n in first..ops.len() {
            let (i, op, how) = (&instructions[n], &ops[n], self.hows[n]);
            let a = access(i, op, how, moved);
            match a {
                Some(a) if a.base == g.base => {
                    let (low, high) = (g.low.min(a.disp), g.high.max(a.disp + a.size));
                    if high - low > WIDEST {
                        break;
                    }
                    g = Group { last: n, low, high, write: g.write | a.write, ..g };
                }
                Some(_) => break,
                None if neutral(i, op, how) => {}
                None => break,
            }
            if matches!(how, How::Return | How::CallRelative) {
                break;
            }
            match stack_step(i, how) {
                Some(by) if g.base == SP => {
                    moved += by;
                    if moved.abs() > 1 << 20 {
                        break;
                    }
                }
                // The base changes: what comes next has another.
                _ if self.uses[n].writes & 1 << guest != 0 => break,
                _ => {}
            }
        }
        (g.last > first).then_some(g)
    }
}
