//! Which form an instruction gets.

use super::block::{Emit, number, pinned};
use crate::decode::{Op, op_flags};
use crate::native;
use iced_x86::{Code as I, Instruction, Mnemonic as M, OpKind, Register};
use ringfort_x86::segment::{FS, GS};

/// How an instruction is translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// By the handler.
    Call,
    /// As itself, with registers and memory operand replaced.
    Same,
    /// No effect.
    Nothing,
    /// An address.
    Lea,
    /// A 64-bit register or immediate.
    Push,
    /// PUSH of 64 bits of memory.
    PushMemory,
    /// A 64-bit register.
    Pop,
    /// LEAVE.
    Leave,
    /// DIV or IDIV of 32 or 64 bits.
    Divide,
    /// BT and its kin of memory, by the number of a bit in a register of 32 or 64 bits.
    BitString,
    /// REP STOS, or REP MOVS.
    Repeat {
        /// MOVS.
        moves: bool,
        /// Bytes of an element.
        size: u8,
    },
    /// A direct jump.
    Jump,
    /// Jcc.
    Conditional,
    /// A direct call.
    CallRelative,
    /// JMP to the address in a register or in memory.
    JumpIndirect,
    /// CALL of it.
    CallIndirect,
    /// A near return.
    Return,
    /// CLI.
    DisableInterrupts,
    /// STI.
    EnableInterrupts,
    /// SWAPGS.
    SwapGs,
    /// STAC (true) or CLAC.
    UserAccess(bool),
    /// PUSHF of 64 bits.
    PushFlags,
    /// RDTSC.
    ReadTime,
    /// As [`How::Same`], on vector registers, which live in the host's.
    Vector {
        /// Alignment that its memory operand must have.
        align: u8,
    },
}

/// The form for `i`, lowered to `op`.
pub fn how(i: &Instruction, op: &Op) -> How {
    use op_flags::*;
    let locks = op.flags & LOCK != 0 && op.flags & MEM != 0;
    if let Some(repeat) = repeat(i, op) {
        return repeat;
    }
    if op.flags & (REP | REPNE) != 0 && !locks && !matches!(i.mnemonic(), M::Ret | M::Jmp | M::Call) {
        return How::Call;
    }
    if op.flags & END != 0 && i.flow_control() == iced_x86::FlowControl::Next {
        // Not declared by the guest's CPUID, or something that the run loop must see.
        return How::Call;
    }
    let plain_memory =
        op.flags & MEM == 0 || (op.flags & (FLAT | FLAT32) != 0 || fs_or_gs(op)) && Emit::reachable(op);
    match i.code() {
        I::Push_r64 | I::Pushq_imm8 | I::Pushq_imm32 => return How::Push,
        I::Push_rm64 if i.op0_kind() == OpKind::Register => return How::Push,
        I::Push_rm64 if plain_memory => return How::PushMemory,
        I::Pop_r64 => return How::Pop,
        I::Pop_rm64 if i.op0_kind() == OpKind::Register => return How::Pop,
        I::Leaveq => return How::Leave,
        I::Div_rm32 | I::Div_rm64 | I::Idiv_rm32 | I::Idiv_rm64 if plain_memory => return How::Divide,
        I::Jmp_rel8_64 | I::Jmp_rel32_64 => return How::Jump,
        I::Call_rel32_64 => return How::CallRelative,
        I::Retnq | I::Retnq_imm16 => return How::Return,
        I::Cli => return How::DisableInterrupts,
        I::Sti => return How::EnableInterrupts,
        I::Swapgs => return How::SwapGs,
        I::Stac => return How::UserAccess(true),
        I::Clac => return How::UserAccess(false),
        I::Pushfq => return How::PushFlags,
        I::Rdtsc => return How::ReadTime,
        I::Jmp_rm64 if plain_memory => return How::JumpIndirect,
        I::Call_rm64 if plain_memory => return How::CallIndirect,
        I::Lea_r64_m | I::Lea_r32_m if op.flags & (ADDR16 | ADDR32) == 0 => return How::Lea,
        // Addresses that no other form can have.
        I::Mov_AL_moffs8
        | I::Mov_AX_moffs16
        | I::Mov_EAX_moffs32
        | I::Mov_RAX_moffs64
        | I::Mov_moffs8_AL
        | I::Mov_moffs16_AX
        | I::Mov_moffs32_EAX
        | I::Mov_moffs64_RAX => return How::Call,
        // AMD reads four bytes for it, which may reach beyond what was probed.
        I::Movsxd_r16_rm16 => return How::Call,
        _ => {}
    }
    if plain_memory && let Some(align) = native::inline(i) {
        return How::Vector { align };
    }
    if i.is_jcc_short_or_near() && matches!(i.op0_kind(), OpKind::NearBranch64) {
        return How::Conditional;
    }
    let same = match i.mnemonic() {
        M::Nop
        | M::Reservednop
        | M::Endbr64
        | M::Endbr32
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchnta
        | M::Prefetchw
        | M::Lfence => return How::Nothing,
        M::Add
        | M::Or
        | M::Adc
        | M::Sbb
        | M::And
        | M::Sub
        | M::Xor
        | M::Cmp
        | M::Test
        | M::Inc
        | M::Dec
        | M::Neg
        | M::Not
        | M::Mov
        | M::Movzx
        | M::Movsx
        | M::Movsxd
        | M::Imul
        | M::Mul
        | M::Shl
        | M::Shr
        | M::Sar
        | M::Rol
        | M::Ror
        | M::Shld
        | M::Shrd
        | M::Bsf
        | M::Bsr
        | M::Tzcnt
        | M::Lzcnt
        | M::Popcnt
        | M::Bswap
        | M::Cbw
        | M::Cwde
        | M::Cdqe
        | M::Cwd
        | M::Cdq
        | M::Cqo
        | M::Andn
        | M::Bextr
        | M::Blsi
        | M::Blsr
        | M::Blsmsk
        | M::Bzhi
        | M::Shlx
        | M::Shrx
        | M::Sarx
        | M::Rorx
        | M::Pdep
        | M::Pext
        | M::Mulx
        | M::Adcx
        | M::Adox
        | M::Rcl
        | M::Rcr
        | M::Clc
        | M::Stc
        | M::Cmc
        | M::Lahf
        | M::Sahf
        | M::Xadd
        | M::Cmpxchg
        | M::Cmpxchg8b
        | M::Cmpxchg16b
        | M::Xchg
        | M::Movbe => true,
        M::Bt | M::Bts | M::Btr | M::Btc => {
            if i.op0_kind() == OpKind::Memory
                && i.op1_kind() == OpKind::Register
                && plain_memory
                && op.opsize >= 4
            {
                return How::BitString;
            }
            i.op0_kind() == OpKind::Register || i.op1_kind() == OpKind::Immediate8
        }
        m => is_setcc(m) || is_cmov(m),
    };
    let sane = (0..i.op_count()).all(|n| match i.op_kind(n) {
        OpKind::Register => i.op_register(n).is_gpr(),
        OpKind::Memory => plain_memory,
        _ => true,
    });
    // AH and its kin cannot be named together with the registers that operands are moved to.
    let high = (0..i.op_count()).any(|n| {
        i.op_kind(n) == OpKind::Register && (Register::AH..=Register::BH).contains(&i.op_register(n))
    });
    let moved =
        op.flags & MEM != 0 || (0..i.op_count()).any(|n| host(i.op_register(n)).is_none_or(|h| h >= 8));
    if same && sane && !(high && moved) { How::Same } else { How::Call }
}

/// REP STOS and REP MOVS with 64-bit addresses that no segment adds to.
fn repeat(i: &Instruction, op: &Op) -> Option<How> {
    use op_flags::*;
    let moves = match i.mnemonic() {
        M::Stosb | M::Stosw | M::Stosd | M::Stosq => false,
        // As an SSE2 instruction MOVSD has the same name.
        M::Movsb | M::Movsw | M::Movsd | M::Movsq if i.is_string_instruction() => true,
        _ => return None,
    };
    let plain = op.flags & (REP | REPNE | FLAT | ADDR16 | ADDR32) == REP | FLAT;
    (plain && matches!(op.opsize, 1 | 2 | 4 | 8)).then_some(How::Repeat { moves, size: op.opsize })
}

fn is_setcc(m: M) -> bool {
    matches!(
        m,
        M::Seta
            | M::Setae
            | M::Setb
            | M::Setbe
            | M::Sete
            | M::Setg
            | M::Setge
            | M::Setl
            | M::Setle
            | M::Setne
            | M::Setno
            | M::Setnp
            | M::Setns
            | M::Seto
            | M::Setp
            | M::Sets
    )
}

fn is_cmov(m: M) -> bool {
    matches!(
        m,
        M::Cmova
            | M::Cmovae
            | M::Cmovb
            | M::Cmovbe
            | M::Cmove
            | M::Cmovg
            | M::Cmovge
            | M::Cmovl
            | M::Cmovle
            | M::Cmovne
            | M::Cmovno
            | M::Cmovnp
            | M::Cmovns
            | M::Cmovo
            | M::Cmovp
            | M::Cmovs
    )
}

fn fs_or_gs(op: &Op) -> bool {
    (usize::from(op.seg) == FS || usize::from(op.seg) == GS)
        && op.flags & (op_flags::ADDR16 | op_flags::ADDR32) == 0
}

/// The host register of a guest register operand; `Some(0)` for what is no register.
fn host(r: Register) -> Option<u8> {
    if r.is_gpr() { pinned(number(r)) } else { Some(0) }
}

/// The condition's number in Jcc.
pub fn condition(i: &Instruction) -> u8 {
    use iced_x86::ConditionCode as C;
    match i.condition_code() {
        C::o => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        _ => 15,
    }
}

/// Whether the memory operand of an instruction on the [`How::Same`] list is written.
pub fn writes_memory(i: &Instruction) -> bool {
    i.op0_kind() == OpKind::Memory && !matches!(i.mnemonic(), M::Cmp | M::Test | M::Bt | M::Mul | M::Imul)
}

/// What the address of a memory operand must be a multiple of for `i`, whose host form is `how`.
pub(super) fn alignment(i: &Instruction, how: How) -> u8 {
    match how {
        How::Vector { align } => align,
        How::Same if i.mnemonic() == M::Cmpxchg16b => 16,
        _ => 1,
    }
}
