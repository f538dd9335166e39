//! From bytes to instructions: prefixes, sizes, limits.

use super::Mode;
use crate::cpu::CodeSize;
use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use ringfort_engine::CpuidTable;

/// One decoding step.
pub enum Fetched {
    /// An instruction (possibly one that iced finds invalid: then its code is `INVALID`).
    Instruction(Instruction),
    /// The bytes end inside the instruction.
    Incomplete,
    /// More than 15 bytes.
    TooLong,
}

/// How the CPU that `cpuid` describes decodes, where CPUs differ: an iced option set for [`decoder`].
pub fn options(cpuid: &CpuidTable) -> u32 {
    // What 0F 0D and 0F 18 to 0F 1F encode is a hint or belongs to extensions that are never offered (MPX, CET): then it is a NOP.
    let mut o = DecoderOptions::FORCE_RESERVED_NOP;
    let leaf = |f, i| cpuid.find(f, i).copied();
    let vendor = leaf(0, 0).map(|l| [l.ebx, l.edx, l.ecx].map(u32::to_le_bytes).concat());
    if vendor.is_some_and(|v| v == b"AuthenticAMD" || v == b"HygonGenuine") {
        // 66h narrows near branches in 64-bit code; LOCK MOV CR0 is CR8.
        o |= DecoderOptions::AMD;
    }
    // The prefixes of TZCNT and LZCNT mean nothing to a CPU without them.
    if leaf(7, 0).is_none_or(|l| l.ebx >> 3 & 1 == 0) {
        o |= DecoderOptions::NO_MPFX_0FBC;
    }
    if leaf(0x8000_0001, 0).is_none_or(|l| l.ecx >> 5 & 1 == 0) {
        o |= DecoderOptions::NO_MPFX_0FBD;
    }
    if leaf(0x8000_0008, 0).is_none_or(|l| l.ebx >> 9 & 1 == 0) {
        o |= DecoderOptions::NO_WBNOINVD;
    }
    if leaf(0x8000_0001, 0).is_none_or(|l| l.ecx & 1 == 0) {
        o |= DecoderOptions::NO_LAHF_SAHF_64;
    }
    o
}

/// A decoder for `bytes` in `mode`, the first of which lies `at` bytes into its page; addresses are counted from the page's beginning.
pub fn decoder(bytes: &[u8], at: u64, mode: Mode, options: u32) -> Decoder<'_> {
    let bits = match mode.code {
        CodeSize::Bits16 => 16,
        CodeSize::Bits32 => 32,
        CodeSize::Bits64 => 64,
    };
    Decoder::with_ip(bits, bytes, at, options)
}

/// Take the next instruction.
pub fn next(d: &mut Decoder<'_>) -> Fetched {
    let i = d.decode();
    if i.code() == Code::INVALID {
        if d.last_error() == DecoderError::NoMoreBytes {
            return Fetched::Incomplete;
        }
        // With 15 bytes to read it calls what needs more of them invalid, of that length.
        if i.len() >= 15 {
            return Fetched::TooLong;
        }
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
                    // No register (moffs, or a displacement alone): iced gives the displacement's size, 8 for a 32-bit one that is
                    // extended to 64 bits.
                    Register::None => i.memory_displ_size() as u8,
                    Register::RIP => 8,
                    Register::EIP => 4,
                    r if r.is_gpr() => r.size() as u8,
                    // VSIB without a base.
                    _ if i.memory_displ_size() == 8 => 8,
                    _ => 4,
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

/// Operand size in bytes: of the data that IN, OUT and string instructions move; as prefixes and mode give it for what has no
/// operands that show it (PUSH of an immediate, ENTER, far RET, IRET...); else that of the first general register, or of memory.
pub(super) fn operand_size(i: &Instruction, mode: Mode) -> u8 {
    use Code::*;
    match i.code() {
        Enterw_imm16_imm8 | Leavew | Iretw | Retfw | Retfw_imm16 | Pushfw | Popfw | Pushaw | Popaw => {
            return 2;
        }
        Enterd_imm16_imm8 | Leaved | Iretd | Retfd | Retfd_imm16 | Pushfd | Popfd | Pushad | Popad => {
            return 4;
        }
        Enterq_imm16_imm8 | Leaveq | Iretq | Retfq | Retfq_imm16 | Pushfq | Popfq => return 8,
        _ => {}
    }
    match i.mnemonic() {
        Mnemonic::In => return i.op0_register().size() as u8,
        Mnemonic::Out => return i.op1_register().size() as u8,
        Mnemonic::Push | Mnemonic::Pop | Mnemonic::Call | Mnemonic::Ret
            if i.stack_pointer_increment() != 0 =>
        {
            return match i.code() {
                Retnw_imm16 => 2,
                Retnd_imm16 => 4,
                Retnq_imm16 => 8,
                _ => i.stack_pointer_increment().unsigned_abs() as u8,
            };
        }
        _ => {}
    }
    if i.is_string_instruction() {
        return i.memory_size().size() as u8;
    }
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
