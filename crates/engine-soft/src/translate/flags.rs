//! Which arithmetic flags an instruction reads and writes, and which are wanted after a block.

use crate::decode::{self, Fetched, Mode};
use iced_x86::{FlowControl, Instruction, Mnemonic, OpKind, RflagsBits};

/// The six arithmetic flags in iced's numbering.
pub const ALL: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// What an instruction does to the arithmetic flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Use {
    /// Reads these.
    pub reads: u32,
    /// May write some.
    pub writes: bool,
    /// Always gives these new values.
    pub kills: u32,
}

/// Instructions behind this many further ones are not looked at.
const AHEAD: usize = 12;

/// For one instruction.
pub fn of(i: &Instruction) -> Use {
    let writes = i.rflags_modified() & ALL;
    let by_count = matches!(
        i.mnemonic(),
        Mnemonic::Shl
            | Mnemonic::Sal
            | Mnemonic::Shr
            | Mnemonic::Sar
            | Mnemonic::Rol
            | Mnemonic::Ror
            | Mnemonic::Rcl
            | Mnemonic::Rcr
            | Mnemonic::Shld
            | Mnemonic::Shrd
    );
    // A shift by CL, or by an immediate that may be masked to zero, may leave all flags alone.
    let count = i.op_count() - u32::from(by_count && i.op_count() > 0);
    let sure = !by_count || (i.op_kind(count) == OpKind::Immediate8 && i.immediate8() & 0x1f != 0);
    // By 9 bits of a byte, say, a rotation through CF gives CF back, but AMD sets OF.
    if matches!(i.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr) {
        return Use { reads: RflagsBits::CF, writes: true, kills: 0 };
    }
    let repeats = i.has_rep_prefix() || i.has_repne_prefix();
    // What enters the kernel or leaves it takes the flags along.
    let carries = !matches!(
        i.flow_control(),
        FlowControl::Next
            | FlowControl::ConditionalBranch
            | FlowControl::UnconditionalBranch
            | FlowControl::IndirectBranch
            | FlowControl::Call
            | FlowControl::IndirectCall
            | FlowControl::Return
    );
    Use {
        reads: if carries { ALL } else { i.rflags_read() & ALL },
        writes: writes != 0,
        kills: if sure && !repeats { writes } else { 0 },
    }
}

/// The flags that code at the beginning of `bytes` (up to the page's end) may read before it writes them.
pub fn wanted(bytes: &[u8], mode: Mode, options: u32) -> u32 {
    let mut decoder = decode::decoder(bytes, 0, mode, options);
    let mut open = ALL;
    let mut wanted = 0;
    for _ in 0..AHEAD {
        let Fetched::Instruction(i) = decode::next(&mut decoder) else { return wanted | open };
        if i.is_invalid() {
            return wanted | open;
        }
        let touches =
            (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory) && i.mnemonic() != Mnemonic::Lea;
        // A fault's handler sees the flags.
        if touches || i.is_stack_instruction() || i.is_string_instruction() {
            return wanted | open;
        }
        let u = of(&i);
        wanted |= u.reads & open;
        open &= !u.kills;
        if open == 0 {
            return wanted;
        }
        if i.flow_control() != FlowControl::Next {
            return wanted | open;
        }
    }
    wanted | open
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::CodeSize;
    use iced_x86::DecoderOptions;

    fn first(bytes: &[u8]) -> Instruction {
        iced_x86::Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE).decode()
    }

    #[test]
    fn shifts_that_may_do_nothing_kill_nothing() {
        assert_eq!(of(&first(&[0x48, 0xc1, 0xe0, 0x03])).kills, ALL); // shl rax, 3
        assert_eq!(of(&first(&[0x48, 0xc1, 0xe0, 0x00])).kills, 0); // shl rax, 0
        assert_eq!(of(&first(&[0x48, 0xd3, 0xe0])).kills, 0); // shl rax, cl
        assert_eq!(of(&first(&[0x48, 0xd1, 0xe0])).kills, ALL); // shl rax, 1
        assert_eq!(of(&first(&[0x0f, 0x05])).reads, ALL); // syscall
        assert_eq!(of(&first(&[0xff, 0xc0])).kills & RflagsBits::CF, 0); // inc eax
    }

    #[test]
    fn looking_ahead() {
        let mode = Mode { code: CodeSize::Bits64, stack: 8, flat: false, real: false };
        // mov eax, ebx; xor ecx, ecx
        assert_eq!(wanted(&[0x89, 0xd8, 0x31, 0xc9], mode, 0), 0);
        // inc eax; jc
        assert_eq!(wanted(&[0xff, 0xc0, 0x72, 0x00], mode, 0) & RflagsBits::CF, RflagsBits::CF);
        // setz al; cmp ecx, edx
        assert_eq!(wanted(&[0x0f, 0x94, 0xc0, 0x39, 0xd1], mode, 0), RflagsBits::ZF);
        // ret: unknown code follows
        assert_eq!(wanted(&[0xc3], mode, 0), ALL);
    }
}
