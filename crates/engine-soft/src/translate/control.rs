//! How blocks lead to one another.
//!
//! A jump within the page is patched to go straight to the next block's code. One into another page passes a guard as well: that the page it
//! was linked to still holds the code, and still lies where this one goes on ([`CodeSlots`]). Indirect jumps look in the jump table. Calls
//! leave a pair on the host's stack, with which the guest's RET becomes a host RET (see [`super::stubs`]).
//!
//! Every circle of blocks passes a poll: backward jumps, calls and look-ups have one.

use super::Link;
use super::asm::{Address, Hole, Holes, SP, T0, T1};
use super::block::Emit;
use super::memory::Wanted;
use super::replay::At;
use super::stubs::{BUDGET, CONTEXT, GLOBAL_CONTEXT, RELINK, RIP_AT};
use crate::decode::Op;
use crate::mmu::{CodeSlot, CodeSlots, INDEX_MASK, TlbSet, code_index};
use iced_x86::{Code as I, Instruction};
use std::mem::offset_of;

/// Offsets in the guard of a jump into another page, from its first byte ([`Emit::go_far`]).
pub(super) mod guard {
    /// The guard begins with this once it is linked: `mov r13, gs:[rip]`.
    pub const LOAD: [u8; 9] = {
        let rip = super::RIP_AT.to_le_bytes();
        [0x65, 0x4c, 0x8b, 0x2c, 0x25, rip[0], rip[1], rip[2], rip[3]]
    };
    /// Offset in the TLB set of the linear address of the page that its slot is of.
    pub const PAGE_AT: usize = 19;
    /// The same of the page's frame.
    pub const FRAME_AT: usize = 32;
    /// What that must be.
    pub const FRAME: usize = 36;
    /// Address of the target page's code word.
    pub const WORD: usize = 48;
    /// What it must hold.
    pub const VALUE: usize = 59;
    /// Distance of the jump to the target's code.
    pub const JUMP: usize = 79;
    /// Behind it.
    pub const END: usize = 83;
}

/// Offsets in what a guard's failure leads to, from its first byte.
pub(super) mod failure {
    /// The bits of the page's linear address that choose its slot.
    pub const INDEX: usize = 13;
    /// Offset in the TLB set of the frame there.
    pub const FRAME_AT: usize = 26;
    /// Behind the question whether there is one.
    pub const END: usize = 31;
}

/// Offset in the TLB set of a field of the slot of the page at `lin`.
pub(super) fn slot_at(lin: u64, field: usize) -> i32 {
    let slots = offset_of!(TlbSet, code) + offset_of!(CodeSlots, slots);
    (slots + code_index(lin) * size_of::<CodeSlot>() + field) as i32
}

/// A way out of a block's straight line.
pub(super) struct Out {
    /// From these jumps.
    from: Holes,
    /// To what lies so far from the beginning of the page.
    to: i64,
    why: Why,
}

/// Where a conditional jump leads that takes more than the jump.
pub(super) struct Later {
    from: Hole,
    to: i64,
    /// Flags, which are in the host's, go to memory.
    save: bool,
}

enum Why {
    /// Time to look whether somebody wants attention; the place to go on at if not.
    Poll(usize),
    /// Not linked yet.
    Link(u32),
    /// The link's guard has failed; from this jump because the page that it leads to may not be where it was.
    Guard(u32, Hole),
    /// The interpreter is to do it.
    Interpret,
}

impl Out {
    /// To the interpreter, for what lies `to` bytes from the page's beginning.
    pub(super) fn interpret(from: Holes, to: i64) -> Out {
        Out { from, to, why: Why::Interpret }
    }
}

impl Emit<'_> {
    /// Give way to whoever wants this vCPU's attention; RIP is then `to` bytes from the page's. Clobbers the scratch registers.
    fn poll(&mut self, to: i64) {
        self.c.decrement_cpu(BUDGET);
        let exhausted = self.c.jcc(8);
        let back = self.c.at();
        self.outs.push(Out { from: [exhausted].into(), to, why: Why::Poll(back) });
    }

    /// Go to what lies `to` bytes from the page's beginning. Flags are where the next block expects them; host flags are free.
    pub(super) fn go(&mut self, to: i64) {
        if !(0..4096).contains(&to) {
            return self.go_far(to);
        }
        if to <= self.here {
            self.poll(to);
        }
        let hole = self.c.jmp();
        self.link_within(hole, to);
    }

    /// As [`Emit::go`], if condition `cc` holds; `save` says that flags are to go to memory on that way. Host flags stay.
    fn go_if(&mut self, cc: u8, to: i64, save: bool) {
        let from = self.c.jcc(cc);
        if !save && (self.here + 1..4096).contains(&to) {
            self.link_within(from, to);
        } else {
            self.later.push(Later { from, to, save });
        }
    }

    /// The end of a block whose flags are in the host's: to `to` if condition `cc` holds, to `next` otherwise. Flags are saved on the ways that
    /// want them.
    pub(super) fn conditional(&mut self, cc: u8, to: i64, next: i64) {
        let wanted = (self.edges.0 != 0, self.edges.1 != 0);
        if wanted == (true, true) {
            self.save_flags();
        }
        let unsaved = self.at == At::Host;
        // A loop's way out is the jump.
        let back = (0..=self.here).contains(&to) && next < 4096;
        let (cc, jump, on) = if back {
            (cc ^ 1, (next, wanted.1), (to, wanted.0))
        } else {
            (cc, (to, wanted.0), (next, wanted.1))
        };
        self.go_if(cc, jump.0, unsaved && jump.1);
        if unsaved && on.1 {
            self.flags_to_memory(T1);
        }
        self.go(on.0);
    }

    fn link_within(&mut self, hole: Hole, to: i64) {
        let link = self.add_link(Link::within(self.memory_offset(hole.0), self.page));
        self.outs.push(Out { from: [hole].into(), to, why: Why::Link(link) });
    }

    fn add_link(&mut self, link: Link) -> u32 {
        self.links.push(link);
        (self.links.len() - 1) as u32
    }

    /// Into another page.
    fn go_far(&mut self, to: i64) {
        if to <= self.here {
            self.poll(to);
        }
        let Ok(distance) = i32::try_from(to & !0xfff) else {
            // Farther than a guard can say.
            self.c.imm(T0, to);
            self.c.cpu(0x03, T0, RIP_AT);
            return self.go_indirect();
        };
        let start = self.c.at();
        // In place of RIP's load, until it is linked.
        let skip = self.c.jmp();
        self.c.raw(&[0; guard::LOAD.len() - 5]);
        self.c.raw(&[0x49, 0x81, 0xc5]); // add r13, distance
        self.c.raw(&distance.to_le_bytes());
        self.c.raw(&[0x4d, 0x3b, 0xaf, 0, 0, 0, 0]); // cmp r13, [r15 + page]
        let elsewhere = self.c.jcc(5);
        self.c.raw(&[0x41, 0x81, 0xbf, 0, 0, 0, 0, 0, 0, 0, 0]); // cmp dword [r15 + frame], frame
        let another = self.c.jcc(5);
        self.c.imm64(T1, 0);
        self.c.raw(&[0x41, 0x81, 0x3e, 0, 0, 0, 0]); // cmp dword [r14], value
        let stale = self.c.jcc(5);
        self.c.store_cpu(T0, RIP_AT);
        // Leads nowhere until it is linked, and is not reached.
        let jump = self.c.jmp();
        debug_assert_eq!((jump.0 - start, self.c.at() - start), (guard::JUMP, guard::END));
        let link = self.add_link(Link::guarded(self.memory_offset(start)));
        self.outs.push(Out { from: [skip].into(), to, why: Why::Link(link) });
        self.outs.push(Out { from: [another, stale].into(), to, why: Why::Guard(link, elsewhere) });
    }

    /// Go to the guest address in [`T0`].
    pub(super) fn go_indirect(&mut self) {
        let (base, to) = (self.base, self.stubs.look_up);
        self.c.far(0xe8, base, to);
        self.c.raw(&[0x41, 0xff, 0xe6]); // jmp r14
    }

    /// A hole to jump from if the address in [`T0`] is not canonical. Clobbers [`T1`].
    pub(super) fn wild(&mut self) -> Hole {
        self.c.mov(T1, T0);
        self.c.raw(&[0x49, 0xc1, 0xfe, 0x2f]); // sar r14, 47
        self.c.raw(&[0x49, 0x83, 0xc6, 0x01]); // add r14, 1
        self.c.raw(&[0x49, 0x83, 0xfe, 0x01]); // cmp r14, 1
        self.c.jcc(7)
    }

    /// What conditional jumps lead to that is more than a jump.
    pub(super) fn emit_later(&mut self) {
        while let Some(Later { from, to, save }) = self.later.pop() {
            self.c.land(from);
            if save {
                self.flags_to_memory(T1);
            }
            self.go(to);
        }
    }

    /// The pieces that jumps out of the straight line lead to.
    pub(super) fn emit_outs(&mut self) {
        let base = self.base;
        let outs = std::mem::take(&mut self.outs);
        for out in &outs {
            let mut empty = None;
            if let Why::Guard(link, elsewhere) = out.why {
                // Where the set is empty it is filled; the same code at another address has another slot.
                self.c.land(elsewhere);
                let start = self.c.at();
                self.c.raw(&[0x45, 0x89, 0xee, 0x41, 0x81, 0xe6]); // mov r14d, r13d; and r14d
                self.c.raw(&(INDEX_MASK as u32).to_le_bytes());
                self.c.raw(&[0x41, 0x81, 0xfe, 0, 0, 0, 0]); // cmp r14d, index
                let alias = self.c.jcc(5);
                self.c.raw(&[0x41, 0x83, 0xbf, 0, 0, 0, 0, 0]); // cmp dword [r15 + frame], 0
                debug_assert_eq!(self.c.at() - start, failure::END);
                empty = Some(self.c.jcc(4));
                self.c.land(alias);
                let failure = self.memory_offset(start);
                self.links[link as usize].fails_at(failure);
            }
            for hole in out.from.iter() {
                self.c.land(hole);
            }
            if let Why::Guard(..) = out.why {
                // By the jump table, and now and then by a new link.
                self.c.decrement_cpu(RELINK);
                let again = self.c.jcc(8);
                self.c.imm(T0, out.to);
                self.c.cpu(0x03, T0, RIP_AT);
                self.go_indirect();
                self.c.land(again);
            }
            if let Some(empty) = empty {
                self.c.land(empty);
            }
            self.c.imm(T0, out.to);
            match out.why {
                Why::Link(link) | Why::Guard(link, _) => {
                    self.c.imm(T1, link.into());
                    self.c.far(0xe9, base, self.stubs.link);
                }
                Why::Interpret => self.c.far(0xe9, base, self.stubs.interpret),
                Why::Poll(back) => {
                    self.c.far(0xe8, base, self.stubs.poll);
                    let hole = self.c.jmp();
                    self.c.fill(hole, back);
                }
            }
        }
        self.outs = outs;
    }

    /// The guest's return address goes to its stack; it is also in [`T0`].
    fn push_return(&mut self, op: &Op, next: i64) {
        let (o, lost) = self.stack(SP, -8, true);
        let value = o.spare;
        self.c.load_cpu(value, RIP_AT);
        self.c.lea(value, Some(value), None, next as i32);
        self.c.mem(0x89, value, o.at);
        self.c.lea(SP, Some(SP), None, -8);
        self.slow_path(o.miss, op, lost);
        if value != T0 {
            self.c.mov(T0, value);
        }
        self.leave_group();
    }

    /// Host code that the guest's RET is to come back to, and the call of `callee`, which is emitted later.
    fn pair(&mut self, next: i64) -> Hole {
        self.c.raw(&[0x41, 0x55]); // push r13
        let call = self.c.call();
        // Back from there, with the guest's RIP in T0.
        self.c.raw(&[0x48, 0x8d, 0x64, 0x24, 0x08]); // lea rsp, [rsp + 8]
        self.c.lea(T0, Some(T0), None, -(next as i32));
        self.c.store_cpu(T0, RIP_AT);
        let here = std::mem::replace(&mut self.here, next - 1);
        self.go(next);
        self.here = here;
        call
    }

    /// CALL to what lies `to` bytes from the page's beginning.
    pub(super) fn call_relative(&mut self, op: &Op, to: i64, wanted: u32) {
        let next = i64::from(op.off) + i64::from(op.len);
        self.push_return(op, next);
        if wanted != 0 {
            self.save_flags();
        }
        if next < 4096 {
            let call = self.pair(next);
            self.c.land(call);
        }
        // The depth of pairs is bounded by this poll.
        self.poll(to);
        let here = std::mem::replace(&mut self.here, i64::MIN);
        self.go(to);
        self.here = here;
    }

    /// JMP to the address in a register or in memory.
    pub(super) fn jump_indirect(&mut self, i: &Instruction, op: &Op) {
        self.save_flags();
        self.spare_flags();
        self.target(i, op);
        let wild = self.wild();
        self.slow_path(wild, op, None);
        self.go_indirect();
    }

    /// CALL of the address in a register or in memory.
    pub(super) fn call_indirect(&mut self, i: &Instruction, op: &Op) {
        self.save_flags();
        self.spare_flags();
        self.target(i, op);
        let wild = self.wild();
        self.slow_path(wild, op, None);
        self.keep(T0);
        let next = i64::from(op.off) + i64::from(op.len);
        self.push_return(op, next);
        if next < 4096 {
            let call = self.pair(next);
            self.c.land(call);
        }
        self.kept(T0);
        self.go_indirect();
    }

    /// The operand of an indirect branch, into [`T0`].
    fn target(&mut self, i: &Instruction, op: &Op) {
        if i.op0_kind() == iced_x86::OpKind::Register {
            let value = self.value(op.dst / 8, T0);
            if value != T0 {
                self.c.mov(T0, value);
            }
        } else {
            let o = self.operand(op, Wanted::stack(false));
            self.c.mem(0x8b, T0, o.at);
            self.slow_path(o.miss, op, None);
        }
    }

    /// RET.
    pub(super) fn ret(&mut self, i: &Instruction, op: &Op) {
        // What the caller wants is not known.
        self.save_flags();
        let (o, lost) = self.stack(SP, 0, false);
        self.c.mem(0x8b, T0, o.at);
        self.leave_group();
        let more = if i.code() == I::Retnq_imm16 { i32::from(i.immediate16()) } else { 0 };
        // cmp r13, [rsp + 8]
        self.c.mem(0x3b, T0, Address { base: Some(super::asm::HOST_SP), index: None, disp: 8 });
        let other = self.c.jcc(5);
        self.c.lea(SP, Some(SP), None, 8 + more);
        self.c.raw(&[0xc3]);
        self.c.land(other);
        // A non-canonical target faults here, not there.
        let wild = self.wild();
        self.c.lea(SP, Some(SP), None, 8 + more);
        let (base, to) = (self.base, self.stubs.return_miss);
        self.c.far(0xe9, base, to);
        self.slow_path(o.miss, op, lost);
        self.slow_path(wild, op, lost);
    }
}

/// The context that a jump into a page is linked under: its offset in the `Cpu`.
pub(super) fn context_at(global: bool) -> i32 {
    if global { GLOBAL_CONTEXT } else { CONTEXT }
}
