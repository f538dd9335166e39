//! DIV and IDIV.

use super::asm::{T0, T1};
use super::block::Emit;
use super::memory::{Miss, Wanted};
use crate::decode::{Op, op_flags};
use iced_x86::{Instruction, Mnemonic as M};

impl Emit<'_> {
    /// DIV or IDIV of 32 or 64 bits: by the host where the quotient certainly fits, else by the handler. The guest's flags stay, as the
    /// handler has it.
    pub(super) fn divide(&mut self, i: &Instruction, op: &Op) {
        self.spare_flags();
        let lost = self.lost();
        let wide = op.opsize == 8;
        // The divisor into T0.
        let mut misses: Vec<Miss> = Vec::new();
        if op.flags & op_flags::MEM != 0 {
            let o = self.operand(op, Wanted { size: op.memsize.into(), write: false, align: 1 });
            let from = self.c.at();
            self.c.mem(0x8b, T0, o.at);
            if !wide {
                self.c.bytes[from] &= !8; // without REX.W
            }
            misses.extend(o.miss);
        } else {
            let value = self.value(op.dst / 8, T0);
            self.c.mov(T0, value);
        }
        let w = u8::from(wide) << 3;
        if i.mnemonic() == M::Div {
            self.c.raw(&[0x44 | w, 0x39, 0xea]); // cmp (r)dx, r13
            misses.push(self.c.jcc(3).into());
            self.c.raw(&[0x41 | w, 0xf7, 0xf5]); // div r13
        } else {
            // The dividend is what CDQ or CQO makes, and the divisor neither 0 nor -1.
            self.c.mov(T1, 0);
            self.c.raw(&[0x41 | w, 0xc1, 0xfe, if wide { 63 } else { 31 }]); // sar r14
            self.c.raw(&[0x41 | w, 0x39, 0xd6]); // cmp r14, (r)dx
            misses.push(self.c.jcc(5).into());
            self.c.raw(&[0x45 | w, 0x8d, 0x75, 0x01]); // lea r14, [r13 + 1]
            self.c.raw(&[0x41 | w, 0x83, 0xfe, 0x01]); // cmp r14, 1
            misses.push(self.c.jcc(6).into());
            self.c.raw(&[0x41 | w, 0xf7, 0xfd]); // idiv r13
        }
        for miss in misses {
            self.slow_path(miss, op, lost);
        }
    }
}
