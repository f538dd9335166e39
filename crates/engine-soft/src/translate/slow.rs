//! What the ops' handlers do: instructions that have no host form, and accesses that the host cannot make at once.

use super::OpName;
use super::asm::{Holes, T0, T1};
use super::block::Emit;
use super::choose::How;
use super::memory::{Miss, Remedy};
use super::replay::{At, Producer};
use crate::decode::Op;

/// The slow path of memory accesses: the ops' handlers do all of it.
pub(super) struct Slow {
    pub from: Miss,
    /// One op, or a group's.
    pub op: *const Op,
    pub count: usize,
    pub back: usize,
    /// Flags must be in the host's flags afterwards.
    pub flags: bool,
    /// Gives the flags as they were before the op, if they are nowhere else.
    pub lost: Option<Producer>,
}

impl Emit<'_> {
    /// The handlers execute `count` ops from `op` on.
    fn call(&mut self, op: *const Op, count: usize) {
        // SAFETY: an op of the block that is being translated.
        let off = unsafe { (*op).off };
        self.c.imm(T0, OpName::new(self.number, off).0.into());
        let (base, mut to) = (self.base, self.stubs.call);
        if count > 1 {
            self.c.imm(T1, count as i64);
            to = self.stubs.call_several;
        }
        self.c.far(0xe8, base, to);
    }

    /// The handler executes `op`, which finds and leaves the flags in memory.
    pub(super) fn by_handler(&mut self, op: *const Op) {
        self.save_flags();
        self.call(op, 1);
        if self.hows[self.n + 1..].iter().any(|h| matches!(h, How::Vector { .. })) {
            self.need_vectors_after(op);
        }
        self.at = At::Memory;
    }

    /// A memory access's slow path, for when the fast one goes on here.
    pub(super) fn slow_path(&mut self, from: impl Into<Option<Miss>>, op: *const Op, lost: Option<Producer>) {
        let Some(from) = from.into() else { return };
        let flags = self.wanted[self.n] != 0 && matches!(self.at, At::Host | At::Both);
        self.slow.push(Slow { from, op, count: 1, back: self.c.at(), flags, lost });
    }

    /// For [`Emit::slow_path`]: what gives the flags, if they are lost.
    pub(super) fn lost(&self) -> Option<Producer> {
        self.producer.filter(|_| self.at == At::Lost)
    }

    /// The slow paths of memory accesses.
    pub(super) fn emit_slow(&mut self) {
        let slow = std::mem::take(&mut self.slow);
        for s in &slow {
            self.c.land(s.from.from);
            let further = match s.from.remedy {
                Some(Remedy::Recall(r)) => self.emit_recalled(r),
                Some(Remedy::Refill(r)) => self.emit_refill(r),
                None => Holes::default(),
            };
            for hole in further.iter() {
                self.c.land(hole);
            }
            if let Some(p) = s.lost {
                self.replay_of(p, T1);
                self.flags_to_memory(T1);
            }
            self.call(s.op, s.count);
            self.need_vectors_after(s.op.wrapping_add(s.count - 1));
            if s.flags {
                self.flags_from_memory(T1);
            }
            let back = self.c.jmp();
            self.c.fill(back, s.back);
        }
        self.slow = slow;
    }
}
