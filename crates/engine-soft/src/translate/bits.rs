//! BT, BTS, BTR and BTC of memory by the number of a bit in a register: the bit may lie anywhere before or behind the operand (Intel SDM 2A,
//! "BT").

use super::asm::{Address, T0, T1};
use super::block::Emit;
use super::memory::Wanted;
use super::replay::At;
use super::stubs::KEPT;
use crate::decode::{Op, op_flags};
use iced_x86::{Instruction, Mnemonic as M};

impl Emit<'_> {
    /// Such an instruction, of 32 or 64 bits; `flags` if other flags than CF must be there.
    pub(super) fn bit_string(&mut self, i: &Instruction, op: &Op, flags: bool) {
        self.spare_flags();
        let lost = self.lost();
        let wide = op.opsize == 8;
        let (bytes, shift) = if wide { (8, 6) } else { (4, 5) };
        // The address of the element that holds the bit, into T0.
        let at = self.address(op);
        self.linear(at);
        let number = self.value(op.src / 8, T1);
        if wide {
            self.c.mov(T1, number);
        } else {
            self.c.raw(&[0x4c | number >> 3, 0x63, 0xf0 | number & 7]); // movsxd r14, number
        }
        self.c.raw(&[0x49, 0xc1, 0xfe, shift]); // sar r14
        self.c.lea(T0, Some(T0), Some((T1, if wide { 3 } else { 2 })), 0);
        self.keep(T0);
        let element = Address { base: Some(T0), index: None, disp: 0 };
        let write = i.mnemonic() != M::Bt;
        let miss = self.probe(element, Wanted { size: bytes, write, align: 1 });
        self.c.mem(0x8b, T0, Emit::addend());
        self.c.cpu(0x03, T0, KEPT);
        // The bit's number within it.
        let number = self.value(op.src / 8, T1);
        self.c.mov(T1, number);
        self.c.raw(&[0x41, 0x83, 0xe6, bytes as u8 * 8 - 1]); // and r14d
        if flags {
            self.keep(T1);
            self.load_flags(T1);
            self.kept(T1);
        }
        if op.flags & op_flags::LOCK != 0 {
            self.c.raw(&[0xf0]);
        }
        let opcode = match i.mnemonic() {
            M::Bt => 0xa3,
            M::Bts => 0xab,
            M::Btr => 0xb3,
            _ => 0xbb,
        };
        self.c.raw(&[0x45 | u8::from(wide) << 3, 0x0f, opcode, 0x75, 0]); // bt [r13], r14
        self.at = At::Host;
        self.producer = None;
        self.fresh = true;
        self.slow_path(miss, op, lost);
    }
}
