//! Guest bytes to [`Op`]s, once.
//!
//! iced-x86 decodes; [`lower`] turns its instruction into an [`Op`]: operands resolved to register offsets and an address form, and
//! a [`Handler`] chosen that knows the operand kinds and widths. Each group of instructions has its own lowering function beside its
//! handlers; the first that knows the instruction wins.

mod features;
mod fetch;

pub use features::FeatureSet;
pub use fetch::{Fetched, decoder, next, options};

use crate::cpu::{CodeSize, Cpu, RIP, Trap, ZERO};
use iced_x86::{EncodingKind, Instruction, OpKind, Register};
use ringfort_x86::segment::CS;

/// What a handler says about how execution goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// With the next op of the block.
    Next,
    /// `regs[RIP]` has been set to the address of the next instruction.
    Branch,
    /// With the next instruction, but not in this block: something that blocks depend on has changed (mode, mapping,
    /// interrupt flag), or the run loop must look up (HLT, interrupt shadow).
    EndBlock,
}

/// The outcome of one instruction. On `Err` nothing that the guest can see has changed (but A/D bits and what the
/// architecture allows to be partly done: string iterations, XSAVE), and `regs[RIP]` still is that of the page.
pub type Exec = Result<Flow, Trap>;

/// Executes one op.
pub type Handler = fn(&mut Cpu, &Op) -> Exec;

/// [`Op::flags`] bits.
pub mod op_flags {
    /// The address is base + index·scale + disp in 64 bits, with nothing added and nothing checked.
    pub const FLAT: u16 = 1 << 0;
    /// As [`FLAT`], but truncated to 32 bits: 32-bit code whose segments are all flat, or a 32-bit address in 64-bit mode.
    pub const FLAT32: u16 = 1 << 1;
    /// LOCK prefix (or XCHG with memory).
    pub const LOCK: u16 = 1 << 2;
    /// REP or REPE prefix.
    pub const REP: u16 = 1 << 3;
    /// REPNE prefix.
    pub const REPNE: u16 = 1 << 4;
    /// The op has a memory operand.
    pub const MEM: u16 = 1 << 5;
    /// 16-bit address size.
    pub const ADDR16: u16 = 1 << 6;
    /// 32-bit address size.
    pub const ADDR32: u16 = 1 << 7;
    /// The last op of its block, whatever its handler answers.
    pub const END: u16 = 1 << 8;
    /// The address is that of [`FLAT`] plus the base of the segment: FS or GS in 64-bit code.
    pub const BASED: u16 = 1 << 15;
}

/// One decoded instruction.
#[derive(Clone)]
#[repr(C)]
pub struct Op {
    /// Executes it.
    pub run: Handler,
    /// Immediate, sign-extended to 64 bits; for near branches the target's distance from the beginning of the op's page.
    pub imm: u64,
    /// Displacement of the memory operand, sign-extended; with RIP as base relative to the beginning of the op's page.
    pub disp: u64,
    /// The handler's own (for instance the address of a native stub).
    pub aux: u64,
    /// iced's `Code` as a number.
    pub code: u16,
    /// Offset in its page, in bytes.
    pub off: u16,
    /// See [`op_flags`].
    pub flags: u16,
    /// Length in bytes.
    pub len: u8,
    /// Operand 0, if a register: general registers as byte offset for [`Cpu::reg`], others by number.
    pub dst: u8,
    /// Operand 1, if a register.
    pub src: u8,
    /// Operand 2 (or 3 where operand 2 is none), if a register.
    pub third: u8,
    /// Base register of the address: number in [`Cpu::regs`].
    pub base: u8,
    /// Index register of the address: number in [`Cpu::regs`].
    pub index: u8,
    /// log2 of the index scale.
    pub scale: u8,
    /// Segment of the memory operand, prefixes considered.
    pub seg: u8,
    /// Operand size in bytes where the handler needs it at run time (2, 4, 8), from prefixes and mode.
    pub opsize: u8,
    /// Bytes of the memory operand, as iced states it (0 when unknown).
    pub memsize: u8,
}

/// What decoding depends on beside the bytes. Part of a block's key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Mode {
    /// Width of code.
    pub code: CodeSize,
    /// Width of the stack pointer in bytes.
    pub stack: u8,
    /// Protected mode with flat 4 GiB read-write segments in ES, SS, DS and a flat CS (only looked at for 32-bit code).
    pub flat: bool,
    /// Real or virtual-8086 mode, where VEX-encoded instructions do not exist.
    pub real: bool,
}

impl Mode {
    /// As a small number, for keys.
    pub fn key(self) -> u64 {
        self.code as u64 | u64::from(self.stack) << 2 | u64::from(self.flat) << 6 | u64::from(self.real) << 7
    }
}

/// What a lowering function sees.
pub struct Ctx<'a> {
    /// The instruction, decoded as if its page began at address 0.
    pub i: &'a Instruction,
    /// Its bytes.
    pub bytes: &'a [u8],
    /// The op, with everything filled in but `run` and what only the handler knows.
    pub op: &'a mut Op,
    /// The mode that the block is decoded for.
    pub mode: Mode,
}

impl Ctx<'_> {
    /// Whether operand `n` is memory.
    pub fn mem(&self, n: u32) -> bool {
        self.i.op_kind(n) == OpKind::Memory
    }
    /// Whether operand `n` is a register.
    pub fn is_reg(&self, n: u32) -> bool {
        self.i.op_kind(n) == OpKind::Register
    }
    /// Width in bytes of operand `n`: a register's, else the memory operand's, else the operand size.
    pub fn width(&self, n: u32) -> usize {
        if self.is_reg(n) {
            self.i.op_register(n).size()
        } else if self.mem(n) && self.op.memsize != 0 {
            usize::from(self.op.memsize)
        } else {
            usize::from(self.op.opsize)
        }
    }
}

/// Choose the handler for `i`, which begins `off` bytes into its page.
pub fn lower(i: &Instruction, bytes: &[u8], off: u16, mode: Mode, features: &FeatureSet) -> Op {
    let mut op = generic(i, off, mode);
    if !features.allows(i) || mode.real && i.encoding() == EncodingKind::VEX {
        op.run = undefined;
        op.flags |= op_flags::END;
        return op;
    }
    let mut ctx = Ctx { i, bytes, op: &mut op, mode };
    let run = crate::interp::lower(&mut ctx).or_else(|| crate::native::lower(&mut ctx));
    match run {
        Some(run) => op.run = run,
        None => {
            op.run = undefined;
            op.flags |= op_flags::END;
        }
    }
    op
}

/// An op that raises #UD.
pub fn undefined(cpu: &mut Cpu, _: &Op) -> Exec {
    Err(cpu.ud())
}

/// An op that raises #GP(0): an instruction of more than 15 bytes.
pub fn too_long(cpu: &mut Cpu, _: &Op) -> Exec {
    Err(cpu.gp(0))
}

/// The byte offset in [`Cpu::regs`] of a general register; the number of any other.
fn reg_code(r: Register) -> u8 {
    use Register as R;
    match r {
        R::None => 0,
        R::AH | R::CH | R::DH | R::BH => (r as u8 - R::AH as u8) * 8 + 1,
        // Not `number` of the register itself: among byte registers that counts AH to BH too.
        _ if r.is_gpr() => r.full_register().number() as u8 * 8,
        _ => r.number() as u8,
    }
}

fn address_reg(r: Register) -> u8 {
    match r {
        Register::None => ZERO,
        Register::RIP | Register::EIP => RIP,
        _ if r.is_gpr() => r.number() as u8,
        _ => ZERO, // VSIB: the handler looks at the instruction itself
    }
}

/// Everything of an op that does not depend on what the instruction does.
fn generic(i: &Instruction, off: u16, mode: Mode) -> Op {
    use op_flags::*;
    let mut op = Op {
        run: undefined,
        imm: 0,
        disp: 0,
        aux: 0,
        code: i.code() as u16,
        off,
        flags: 0,
        len: i.len() as u8,
        dst: 0,
        src: 0,
        third: 0,
        base: ZERO,
        index: ZERO,
        scale: 0,
        seg: 0,
        opsize: fetch::operand_size(i, mode),
        memsize: i.memory_size().size().min(255) as u8,
    };
    let mut addr_size = match mode.code {
        CodeSize::Bits64 => 8,
        CodeSize::Bits32 => 4,
        CodeSize::Bits16 => 2,
    };
    for n in 0..i.op_count() {
        match i.op_kind(n) {
            OpKind::Register => {
                let code = reg_code(i.op_register(n));
                match n {
                    0 => op.dst = code,
                    1 => op.src = code,
                    _ => op.third = code,
                }
            }
            OpKind::Memory => {
                op.flags |= MEM;
                op.base = address_reg(i.memory_base());
                op.index = address_reg(i.memory_index());
                op.scale = i.memory_index_scale().trailing_zeros() as u8;
                op.disp = i.memory_displacement64();
                op.seg = (i.memory_segment().number()) as u8;
                addr_size = fetch::address_size(i, mode);
                if i.memory_base() == Register::EIP {
                    // EIP-relative: iced gives the sum; regs[RIP] is added and the result truncated like any 32-bit address.
                    addr_size = 4;
                }
            }
            OpKind::NearBranch16 => op.imm = u64::from(i.near_branch16()),
            OpKind::NearBranch32 => op.imm = u64::from(i.near_branch32()),
            OpKind::NearBranch64 => op.imm = i.near_branch64(),
            OpKind::FarBranch16 | OpKind::FarBranch32 => {
                op.imm = u64::from(i.far_branch32());
                op.aux = u64::from(i.far_branch_selector());
            }
            OpKind::MemorySegSI
            | OpKind::MemorySegESI
            | OpKind::MemorySegRSI
            | OpKind::MemorySegDI
            | OpKind::MemorySegEDI
            | OpKind::MemorySegRDI => {
                op.seg = i.memory_segment().number() as u8;
                addr_size = fetch::address_size(i, mode);
            }
            OpKind::MemoryESDI | OpKind::MemoryESEDI | OpKind::MemoryESRDI => {
                addr_size = fetch::address_size(i, mode);
            }
            OpKind::Immediate8_2nd => op.aux = u64::from(i.immediate8_2nd()),
            _ => op.imm = i.immediate(n),
        }
    }
    let seg_is_plain = op.seg < 4;
    op.flags |= match (mode.code, addr_size) {
        (CodeSize::Bits64, 8) if seg_is_plain => FLAT,
        (CodeSize::Bits64, 4) if seg_is_plain => FLAT32,
        (CodeSize::Bits64, 8) => BASED,
        // A code segment is not writable, and perhaps not readable.
        (CodeSize::Bits32, 4) if seg_is_plain && op.seg != CS as u8 && mode.flat => FLAT32,
        _ => 0,
    };
    op.flags |= match addr_size {
        2 => ADDR16,
        4 => ADDR32,
        _ => 0,
    };
    if i.has_lock_prefix() {
        op.flags |= LOCK;
    }
    if i.has_repe_prefix() {
        op.flags |= REP;
    }
    if i.has_repne_prefix() {
        op.flags |= REPNE;
    }
    op
}
