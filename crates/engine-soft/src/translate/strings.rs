//! REP STOS and REP MOVS of what lies in one page: kernels and libraries use them for small things as well. The rest is the handlers' part.

use super::asm::{Address, T0, T1, TLB};
use super::block::Emit;
use super::memory::Miss;
use super::system::SYS_FLAGS;
use crate::decode::Op;
use crate::mmu::TlbSet;
use ringfort_x86::flags::DF;
use std::mem::offset_of;

const RCX: u8 = 1;
const RSI: u8 = 6;
const RDI: u8 = 7;

impl Emit<'_> {
    /// One of them, of elements of `size` bytes.
    pub(super) fn repeat(&mut self, op: &Op, moves: bool, size: u8) {
        self.spare_flags();
        let lost = self.lost();
        let mut misses: Vec<Miss> = Vec::new();
        self.c.test_cpu8(SYS_FLAGS + 1, (DF >> 8) as u8);
        misses.push(self.c.jcc(5).into());
        self.c.raw(&[0x48, 0x81, 0xf9]); // cmp rcx
        self.c.raw(&(0x1000 / u32::from(size)).to_le_bytes());
        misses.push(self.c.jcc(7).into());
        misses.push(self.within_page(RDI, size, true));
        self.c.mem(0x8b, T1, Emit::addend());
        if moves {
            self.keep(T1);
            misses.push(self.within_page(RSI, size, false));
            self.c.mem(0x8b, T1, Emit::addend());
            self.kept(T0);
            self.c.rr(0x01, T1, RSI); // add rsi, r14
        } else {
            self.c.mov(T0, T1);
        }
        self.c.rr(0x01, T0, RDI); // add rdi, r13
        let operation = if moves { 0xa4 } else { 0xaa };
        match size {
            1 => self.c.raw(&[0xf3, operation]),
            2 => self.c.raw(&[0x66, 0xf3, operation | 1]),
            4 => self.c.raw(&[0xf3, operation | 1]),
            _ => self.c.raw(&[0xf3, 0x48, operation | 1]),
        }
        self.c.rr(0x29, T0, RDI); // sub rdi, r13
        if moves {
            self.c.rr(0x29, T1, RSI); // sub rsi, r14
        }
        for miss in misses {
            self.slow_path(miss, op, lost);
        }
    }

    /// Probe for RCX elements from `at` on, no more than a page holds; the index of the TLB's entry is in [`T1`] then. What is empty lies where
    /// the byte before it does.
    fn within_page(&mut self, at: u8, size: u8, write: bool) -> Miss {
        let scale = size.trailing_zeros() as u8;
        self.index_of(at);
        self.c.lea(T0, Some(at), Some((RCX, scale)), -1);
        self.c.raw(&[0x49, 0x81, 0xe5, 0, 0xf0, 0xff, 0xff]); // and r13, -4096
        let tags = if write { offset_of!(TlbSet, write) } else { offset_of!(TlbSet, read) };
        self.c.mem(0x3b, T0, Address { base: Some(TLB), index: Some((T1, 3)), disp: tags as i32 });
        self.c.jcc(5).into()
    }
}
