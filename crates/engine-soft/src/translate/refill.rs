//! Misses of the TLB: its entry is made, and the access tried again. Only what that does not help goes to the op's handler.

use super::asm::{Address, Code, Hole, Holes, T0, T1};
use super::block::Emit;
use super::memory::Wanted;
use super::refill_tlb;
use super::stubs::{LIVE, SELF, Saved};

/// See [`refill_tlb`].
pub(super) const WRITE: u32 = 1 << 16;

/// What a probe's miss needs.
#[derive(Clone, Copy)]
pub(super) struct Refill {
    /// The address, in terms of registers that the probe leaves alone.
    pub ea: Address,
    pub wanted: Wanted,
    /// Where the probe begins.
    pub again: usize,
}

impl Refill {
    /// For a probe of `ea` that begins at `again`, if it leaves the address alone.
    pub fn new(ea: Address, wanted: Wanted, again: usize) -> Option<Refill> {
        let scratch = |r: u8| r == T0 || r == T1;
        let gone = ea.base.is_some_and(scratch) || ea.index.is_some_and(|i| scratch(i.0));
        (!gone && wanted.size <= 256).then_some(Refill { ea, wanted, again })
    }
}

impl Emit<'_> {
    /// What a probe's miss leads to; from the holes it goes on to what that does not help.
    pub(super) fn emit_refill(&mut self, r: Refill) -> Holes {
        let mut slow = Holes::default();
        self.linear(r.ea);
        if let Some(hole) = self.misaligned(r.wanted) {
            slow.push(hole);
        }
        self.c.raw(&[0x6a, (r.wanted.size.max(1) - 1) as u8]); // push
        let (base, to) =
            (self.base, if r.wanted.write { self.stubs.refill_write } else { self.stubs.refill_read });
        self.c.far(0xe8, base, to);
        let done = self.c.jcc(4);
        self.c.fill(done, r.again);
        slow
    }

    /// A hole to jump from if the address in [`T0`] is not aligned as wanted.
    pub(super) fn misaligned(&mut self, wanted: Wanted) -> Option<Hole> {
        (wanted.align > 1).then(|| {
            self.c.raw(&[0x41, 0xf6, 0xc5, wanted.align - 1]); // test r13b
            self.c.jcc(5)
        })
    }
}

/// The stub that a probe's miss calls with the address in [`T0`], having pushed the access's size less one: with ZF the access is to be
/// tried again.
pub(super) fn stub(c: &mut Code, write: bool, saved: &Saved) {
    body(c, write, saved, 0);
    c.raw(&[0xc2, 8, 0]); // ret 8
}

/// Make the TLB's entry for the address in [`T0`], which stays, and for the access whose size less one is in the byte at `byte` of what was
/// pushed before this was called. ZF if that helps. The vector state stays where it is. Clobbers [`T1`].
pub(super) fn body(c: &mut Code, write: bool, saved: &Saved, byte: u8) {
    saved.spill(c);
    c.cpu32(&[0x0f, 0xb6], 0, LIVE); // movzx eax, byte [live]
    c.raw(&[0x41, 0x55, 0x50]); // push r13; push rax
    saved.vectors(c);
    c.load_cpu(7, SELF);
    c.mov(6, T0);
    c.raw(&[0x0f, 0xb6, 0x54, 0x24, 24 + byte]); // movzx edx, byte [rsp + 24 + byte]
    if write {
        c.raw(&[0x81, 0xca]); // or edx
        c.raw(&WRITE.to_le_bytes());
    }
    c.imm64(0, refill_tlb as *const () as u64);
    c.raw(&[0xff, 0xd0]); // call rax
    c.raw(&[0x41, 0x89, 0xc6]); // mov r14d, eax
    c.raw(&[0x58, 0x41, 0x5d]); // pop rax; pop r13
    saved.vectors_back(c);
    saved.reload(c);
    c.raw(&[0x45, 0x85, 0xf6]); // test r14d, r14d
}
