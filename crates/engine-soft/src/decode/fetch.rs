//! From bytes to instructions: prefixes, sizes, limits.

use super::Mode;
use crate::cpu::CodeSize;
use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, Instruction, OpKind, Register};

/// One decoding step.
pub enum Fetched {
    /// An instruction (possibly one that iced finds invalid: then its code is `INVALID`).
    Instruction(Instruction),
    /// The bytes end inside the instruction.
    Incomplete,
    /// More than 15 bytes.
    TooLong,
}

/// A decoder for `bytes` in `mode`, addresses counted from 0.
pub fn decoder(bytes: &[u8], mode: Mode) -> Decoder<'_> {
    let bits = match mode.code {
        CodeSize::Bits16 => 16,
        CodeSize::Bits32 => 32,
        CodeSize::Bits64 => 64,
    };
    Decoder::with_ip(bits, bytes, 0, DecoderOptions::NONE)
}

/// Take the next instruction.
pub fn next(d: &mut Decoder<'_>) -> Fetched {
    let left = d.max_position() - d.position();
    let i = d.decode();
    if i.code() == Code::INVALID && d.last_error() == DecoderError::NoMoreBytes {
        return if left >= 15 { Fetched::TooLong } else { Fetched::Incomplete };
    }
    Fetched::Instruction(i)
}

/// Address size in bytes of an instruction with a memory operand or string addressing.
pub(super) fn address_size(i: &Instruction, mode: Mode) -> u8 {
    for n in 0..i.op_count() {
        match i.op_kind(n) {
            OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => return 2,
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => return 4,
            OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => return 8,
            OpKind::Memory => {
                let reg = if i.memory_base() != Register::None { i.memory_base() } else { i.memory_index() };
                return match reg {
                    Register::None => match i.memory_displ_size() {
                        2 => 2,
                        4 if mode.code != CodeSize::Bits64 => 4,
                        // A 32-bit displacement without registers in 64-bit code: sign-extended 64-bit, or zero-extended with a 67h
                        // prefix; iced has folded the difference into the displacement's value.
                        _ => match mode.code {
                            CodeSize::Bits16 => 2,
                            CodeSize::Bits32 => 4,
                            CodeSize::Bits64 => 8,
                        },
                    },
                    Register::RIP => 8,
                    Register::EIP => 4,
                    r if r.is_gpr() => r.size() as u8,
                    // VSIB without a base.
                    _ => match mode.code {
                        CodeSize::Bits64 => 8,
                        _ => 4,
                    },
                };
            }
            _ => {}
        }
    }
    match mode.code {
        CodeSize::Bits64 => 8,
        CodeSize::Bits32 => 4,
        CodeSize::Bits16 => 2,
    }
}

/// Operand size in bytes as prefixes and mode give it, for handlers whose operands do not show it (PUSH, RET, string operations...): 2,
/// 4 or 8, taken from the suffix of iced's `Code` where the instruction has explicit register or memory operands.
pub(super) fn operand_size(i: &Instruction, mode: Mode) -> u8 {
    for n in 0..i.op_count() {
        if i.op_kind(n) == OpKind::Register {
            let r = i.op_register(n);
            if r.is_gpr() {
                return r.size() as u8;
            }
        }
    }
    if i.memory_size().size() > 0 && i.memory_size().size() <= 8 {
        return i.memory_size().size() as u8;
    }
    match mode.code {
        CodeSize::Bits16 => 2,
        _ => 4,
    }
}
