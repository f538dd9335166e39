//! Where the guest's arithmetic flags are, and how they come back after a TLB probe has clobbered the host's.
//!
//! Saving them costs more than the probe. Most instructions that set them can be asked again instead as long as their registers still
//! hold what they held: a comparison is done once more, a sum is undone and done again in a scratch register. Only what cannot is saved.

use super::asm::{RAX, T0, T1};
use super::block::{Emit, How, in_width, number};
use super::stubs::{ARITH, UNDO, reg_at};
use iced_x86::{Code as I, Instruction, Mnemonic as M, OpKind, Register};

/// What [`Cpu::arith`](crate::cpu::Cpu::arith) holds after a result of zero without carry: ZF, PF and the bit that is always set, in the upper byte.
const OF_ZERO: u16 = 0x4600;

/// Where the guest's arithmetic flags are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum At {
    /// In the host's flags only.
    Host,
    /// In [`Cpu::arith`](crate::cpu::Cpu::arith) only.
    Memory,
    /// In both.
    Both,
    /// In neither: [`Emit::producer`] gives them again.
    Lost,
}

/// The instruction that gave the flags their values, as the host executed it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Producer {
    i: Instruction,
    /// Guest registers that giving them again depends on, a bit each.
    pub(super) guests: u32,
    /// The one of them that lives in memory, and the host register that stands for it in the instruction.
    home: Option<(u8, u8)>,
    /// What operand 0 held before is in [`UNDO`].
    undo: bool,
    /// It may have left the flags as they are in memory.
    may_keep: bool,
}

impl Producer {
    /// For host instruction `i`, which sets all flags and has these guest registers as operands; those of `homes` live in memory, and host
    /// registers stood for them.
    ///
    /// `first` is that of operand 0.
    pub(super) fn new(i: &Instruction, first: u32, guests: u32, homes: &[(u8, u8)]) -> Option<Producer> {
        let register = |n| i.op_kind(n) == OpKind::Register;
        if i.op_count() == 0 || !register(0) || (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory) {
            return None;
        }
        let high = |n| register(n) && (Register::AH..=Register::BH).contains(&i.op_register(n));
        let two = i.op_count() == 2;
        let twice = two && register(1) && i.op_register(0) == i.op_register(1);
        let same_full = two && register(1) && number(i.op_register(0)) == number(i.op_register(1));
        let accumulator = matches!(
            i.code(),
            I::Add_AL_imm8
                | I::Add_AX_imm16
                | I::Add_EAX_imm32
                | I::Add_RAX_imm32
                | I::Sub_AL_imm8
                | I::Sub_AX_imm16
                | I::Sub_EAX_imm32
                | I::Sub_RAX_imm32
        );
        // One scratch register is all that there is to give them again.
        let home = match i.mnemonic() {
            M::And | M::Or | M::Xor => homes.iter().find(|h| number(i.op_register(0)) == h.1).copied(),
            M::Cmp | M::Test if homes.len() > 1 => return None,
            M::Add | M::Sub if two && register(1) => match *homes {
                [] => None,
                [home] if number(i.op_register(0)) == home.1 || i.op_register(0).size() >= 4 => Some(home),
                _ => return None,
            },
            _ => homes.first().copied(),
        };
        let fits = match i.mnemonic() {
            M::Cmp | M::Test => true,
            // Nothing is left to depend on.
            M::Xor | M::Sub if twice => {
                return Some(Producer { i: *i, guests: 0, home: None, undo: false, may_keep: false });
            }
            M::And | M::Or | M::Xor => {
                return Some(Producer { i: *i, guests: first, home, undo: false, may_keep: false });
            }
            M::Neg => !high(0),
            M::Add | M::Sub => two && !same_full && !high(0) && !high(1) && !accumulator,
            _ => false,
        };
        fits.then_some(Producer { i: *i, guests, home, undo: false, may_keep: false })
    }

    /// Whether the flags are those of zero, made by XOR or SUB of a register with itself.
    fn is_constant(&self) -> bool {
        self.guests == 0 && !self.undo && !self.may_keep && matches!(self.i.mnemonic(), M::Xor | M::Sub)
    }

    /// For a shift by a constant, whose register's value of before is kept.
    pub(super) fn shift(i: &Instruction) -> Producer {
        Producer { i: *i, guests: 0, home: None, undo: true, may_keep: false }
    }
}

/// The form of a shift by CL that leaves the flags alone.
fn without_flags(i: &Instruction) -> Option<I> {
    Some(match i.code() {
        I::Shl_rm32_CL => I::VEX_Shlx_r32_rm32_r32,
        I::Shl_rm64_CL => I::VEX_Shlx_r64_rm64_r64,
        I::Shr_rm32_CL => I::VEX_Shrx_r32_rm32_r32,
        I::Shr_rm64_CL => I::VEX_Shrx_r64_rm64_r64,
        I::Sar_rm32_CL => I::VEX_Sarx_r32_rm32_r32,
        I::Sar_rm64_CL => I::VEX_Sarx_r64_rm64_r64,
        _ => return None,
    })
}

/// Whether `i` is a shift that can only be done again with what its register held before.
fn is_shift(i: &Instruction) -> bool {
    matches!(i.mnemonic(), M::Shl | M::Sal | M::Shr | M::Sar)
        && i.op0_kind() == OpKind::Register
        && i.op1_kind() == OpKind::Immediate8
        && !(Register::AH..=Register::BH).contains(&i.op0_register())
}

impl Emit<'_> {
    /// Whether the instruction at hand, of which `i` is the host's form, is a shift whose flags will have to be had again: then the value of its
    /// register goes to memory first.
    pub(super) fn keep_for_shift(&mut self, i: &Instruction) -> bool {
        let spared = || {
            (self.n + 1..self.hows.len())
                .take_while(|&m| self.wanted[m - 1] != 0 && self.hows[m] != How::Call)
                .any(|m| self.touches[m])
        };
        let keep = is_shift(i) && spared();
        if keep {
            self.c.store_cpu(number(i.op0_register()), UNDO);
        }
        keep
    }

    /// A shift of a register by CL, which leaves the flags alone if CL is zero: as one that always does, the flags to be had again from what
    /// the register held and the flags of before, which are in memory. False if it must be done otherwise.
    pub(super) fn shift_by_cl(&mut self, i: &Instruction) -> bool {
        const RCX: u8 = 1;
        let (Some(code), true) = (without_flags(i), self.bmi2 && i.op0_kind() == OpKind::Register) else {
            return false;
        };
        let guest = number(i.op0_register());
        let wanted = self.wanted[self.n] != 0;
        if guest == RCX || wanted && !self.survives(1 << RCX) {
            return false;
        }
        if wanted {
            self.save_flags();
        }
        let at = self.value(guest, T0);
        if wanted {
            self.c.store_cpu(at, UNDO);
        }
        let (like, mut shift) = (i.op0_register(), Instruction::new());
        shift.set_code(code);
        for (n, r) in [at, at, RCX].into_iter().enumerate() {
            shift.set_op_kind(n as u32, OpKind::Register);
            shift.set_op_register(n as u32, in_width(r, like));
        }
        self.must(&shift);
        if at == T0 {
            self.c.store_cpu(T0, reg_at(guest));
        }
        if wanted {
            self.producer =
                Some(Producer { i: *i, guests: 1 << RCX, home: None, undo: true, may_keep: true });
            self.at = At::Lost;
            self.fresh = true;
        }
        true
    }

    /// Flags go to memory if they are not there.
    pub(super) fn save_flags(&mut self) {
        // Within a group the other one is not free.
        let temp = if self.group_base().is_some() { T0 } else { T1 };
        if matches!(self.at, At::Host | At::Lost) && self.producer.is_some_and(|p| p.is_constant()) {
            self.c.raw(&[0x66]);
            self.c.cpu32(&[0xc7], 0, ARITH); // mov word gs:[arith]
            self.c.raw(&OF_ZERO.to_le_bytes());
            self.at = if self.at == At::Host { At::Both } else { At::Memory };
            return;
        }
        if self.at == At::Lost {
            self.replay(temp);
        }
        if matches!(self.at, At::Host | At::Lost) {
            self.flags_to_memory(temp);
            self.at = At::Both;
        }
    }

    pub(super) fn flags_to_memory(&mut self, temp: u8) {
        self.c.mov(temp, RAX);
        self.c.raw(&[0x9f, 0x0f, 0x90, 0xc0]); // lahf; seto al
        self.c.raw(&[0x66]);
        self.c.cpu32(&[0x89], RAX, ARITH); // mov gs:[arith], ax
        self.c.mov(RAX, temp);
    }

    /// Flags come into the host's if they are not there; `temp` is clobbered.
    pub(super) fn load_flags(&mut self, temp: u8) {
        match self.at {
            At::Memory => {
                self.flags_from_memory(temp);
                self.at = At::Both;
            }
            At::Lost => {
                self.replay(temp);
                self.at = At::Host;
            }
            At::Host | At::Both => {}
        }
    }

    pub(super) fn flags_from_memory(&mut self, temp: u8) {
        self.c.mov(temp, RAX);
        self.c.cpu32(&[0x0f, 0xb7], RAX, ARITH); // movzx eax, word gs:[arith]
        self.c.raw(&[0x04, 0x7f, 0x9e]); // add al, 7fh: OF if al was 1; sahf
        self.c.mov(RAX, temp);
    }

    /// Before a TLB probe of the instruction at hand clobbers the host's flags: unless they can be had again for as long as anybody may ask for
    /// them, the guest's go to memory.
    pub(super) fn spare_flags(&mut self) {
        match self.at {
            At::Host if self.producer.is_some_and(|p| self.survives(p.guests)) => self.at = At::Lost,
            At::Lost => {}
            _ => {
                self.save_flags();
                self.at = At::Memory;
            }
        }
    }

    /// Whether these guest registers stay what they are from the instruction at hand until its flags are dead or saved.
    fn survives(&self, guests: u32) -> bool {
        for n in self.n..self.wanted.len() {
            if self.wanted[n] == 0 || self.hows[n] == How::Call {
                return true;
            }
            if self.uses[n].writes & guests != 0 {
                return false;
            }
        }
        true
    }

    /// Give the host's flags the values that [`Emit::producer`] gave them; `temp` is clobbered.
    pub(super) fn replay(&mut self, temp: u8) {
        if let Some(p) = self.producer {
            self.replay_of(p, temp);
        }
    }

    pub(super) fn replay_of(&mut self, p: Producer, temp: u8) {
        let mut i = p.i;
        if p.may_keep {
            self.flags_from_memory(temp);
        }
        if let Some((guest, stood)) = p.home
            && matches!(i.mnemonic(), M::Add | M::Sub)
            && number(i.op_register(0)) != stood
        {
            // Operand 1 is where it lives.
            let wide = i.op_register(0).size() == 8;
            let (undo, again) = if i.mnemonic() == M::Add { (0x2b, 0x03) } else { (0x03, 0x2b) };
            self.c.mov(temp, number(i.op_register(0)));
            for opcode in [undo, again] {
                if wide {
                    self.c.cpu(opcode, temp, reg_at(guest));
                } else {
                    self.c.cpu32(&[opcode], temp, reg_at(guest));
                }
            }
            return;
        }
        if let Some((guest, stood)) = p.home {
            self.c.load_cpu(temp, reg_at(guest));
            for n in 0..i.op_count() {
                let r = i.op_register(n);
                if i.op_kind(n) == OpKind::Register && number(r) == stood {
                    i.set_op_register(n, in_width(temp, r));
                }
            }
        }
        let dst = i.op_register(0);
        let mut renamed = i;
        renamed.set_op_register(0, in_width(temp, dst));
        if p.undo {
            self.c.load_cpu(temp, UNDO);
            return self.must(&renamed);
        }
        match i.mnemonic() {
            M::Cmp | M::Test => self.must(&i),
            _ if p.guests == 0 => self.c.rr(0x31, temp, temp), // xor temp, temp
            M::And | M::Or | M::Xor => {
                let code = match dst.size() {
                    1 => I::Test_rm8_r8,
                    2 => I::Test_rm16_r16,
                    4 => I::Test_rm32_r32,
                    _ => I::Test_rm64_r64,
                };
                let mut test = Instruction::new();
                test.set_code(code);
                for n in 0..2 {
                    test.set_op_kind(n, OpKind::Register);
                    test.set_op_register(n, dst);
                }
                self.must(&test);
            }
            M::Neg => {
                if number(dst) != temp {
                    self.c.mov(temp, number(dst));
                }
                self.must(&renamed);
                self.must(&renamed);
            }
            _ => {
                // Undone, then done again: ADD by SUB and the other way round.
                if number(dst) != temp {
                    self.c.mov(temp, number(dst));
                }
                let from = self.c.at();
                self.must(&renamed);
                invert(&mut self.c.bytes[from..]);
                self.must(&renamed);
            }
        }
    }

    /// Encode what is a variation of an instruction that could be encoded.
    fn must(&mut self, i: &Instruction) {
        let done = self.host(i);
        debug_assert!(done, "{i}");
    }
}

/// Make ADD of SUB, or SUB of ADD, in an encoding without memory operand.
fn invert(bytes: &mut [u8]) {
    let at = bytes.iter().position(|&b| b != 0x66 && b & 0xf0 != 0x40).unwrap_or(0);
    // ADD is operation 0, SUB 5: in the opcode, or in ModRM for immediates.
    let at = if bytes[at] & 0xfc == 0x80 { at + 1 } else { at };
    bytes[at] ^= 5 << 3;
}
