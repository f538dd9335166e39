//! What is known of a block's instructions before any is translated: the registers they use, the flags that are wanted between them, and the
//! vector state they need.

use super::block::number;
use super::choose::How;
use super::flags::{self, ALL};
use super::stubs::live;
use crate::decode::{Op, op_flags};
use crate::native;
use iced_x86::{Instruction, InstructionInfoFactory, OpAccess};

/// Which general registers an instruction reads and writes, a bit each.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Registers {
    pub(super) reads: u32,
    pub(super) writes: u32,
}

/// The general registers that `i` reads and writes. Of what it writes in part it reads the rest.
pub(super) fn registers(i: &Instruction, info: &mut InstructionInfoFactory) -> Registers {
    let mut all = Registers::default();
    for u in info.info(i).used_registers() {
        let r = u.register();
        if !r.is_gpr() {
            continue;
        }
        let bit = 1 << number(r);
        use OpAccess::*;
        let (reads, writes) = match u.access() {
            None | NoMemAccess => (false, false),
            Read | CondRead => (true, false),
            Write => (r.size() < 4, true),
            CondWrite | ReadWrite | ReadCondWrite => (true, true),
        };
        all.reads |= if reads { bit } else { 0 };
        all.writes |= if writes { bit } else { 0 };
    }
    all
}

/// For each instruction the flags that are read after it, into `wanted`, which is empty; and of a conditional jump at the end those that are
/// read where it leads and behind it.
pub(super) fn wanted_after(
    instructions: &[Instruction],
    hows: &[How],
    ops: &[Op],
    next: i64,
    look: impl Fn(i64) -> u32,
    wanted: &mut Vec<u32>,
) -> (u32, u32) {
    let mut edges = (ALL, ALL);
    let mut live = match (hows.last(), ops.last()) {
        (Some(How::Jump), Some(op)) => look(op.imm as i64),
        (Some(How::Conditional), Some(op)) => {
            edges = (look(op.imm as i64), look(next));
            edges.0 | edges.1
        }
        (Some(How::CallRelative), Some(op)) => look(op.imm as i64),
        (Some(How::Call | How::Return | How::JumpIndirect | How::CallIndirect), _) | (None, _) => ALL,
        _ => look(next),
    };
    wanted.resize(instructions.len(), 0);
    for n in (0..instructions.len()).rev() {
        wanted[n] = live;
        let u = flags::of(&instructions[n]);
        live = u.reads | live & !u.kills;
        // What may fault shows the flags to the fault's handler, as they were before it.
        let touches_memory =
            ops[n].flags & op_flags::MEM != 0 && hows[n] != How::Lea && hows[n] != How::Nothing;
        let may_fault = matches!(
            hows[n],
            How::Call
                | How::Push
                | How::PushMemory
                | How::ReadTime
                | How::Pop
                | How::Leave
                | How::Divide
                | How::Repeat { .. }
                | How::CallRelative
                | How::JumpIndirect
                | How::CallIndirect
                | How::Return
                | How::DisableInterrupts
                | How::EnableInterrupts
                | How::SwapGs
                | How::UserAccess(_)
                | How::PushFlags
        );
        if touches_memory || may_fault {
            live = ALL;
        }
    }
    edges
}

/// What of the vector state an instruction needs.
pub(super) fn vector_needs(i: &Instruction) -> u8 {
    live::SSE
        | if i.encoding() == iced_x86::EncodingKind::Legacy { 0 } else { live::AVX }
        | if native::uses_mxcsr(i) { live::MXCSR } else { 0 }
}
