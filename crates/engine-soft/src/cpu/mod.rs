//! One vCPU's state, and what the architecture does with it.

mod control;
mod cpuid;
mod debug;
mod exception;
mod flags;
mod int;
mod msr;
mod new;
mod segmentation;
mod stack;
mod state;
mod task;
mod transfer;
mod trap;

pub use control::ControlMasks;
pub use exception::InterruptKind;
pub use flags::{A_AF, A_CF, A_OF, A_PF, A_SF, A_ZF, Cond, cond};
pub use int::Int;
pub use segmentation::canonical;
pub use task::TaskCause;
pub use trap::{Trap, TrapInfo};

use crate::mmu::Mmu;
use ringfort_engine::{CpuidTable, MpState};
use ringfort_x86::cr::*;
use ringfort_x86::segment::{CS, SS, Segment, TableRegister};
use std::collections::BTreeMap;

/// Index in [`Cpu::regs`] of a register that is always zero: the base or index of an address that has none.
pub const ZERO: u8 = 16;
/// Index in [`Cpu::regs`] of the instruction pointer (see [`Cpu::regs`] for what it means when).
pub const RIP: u8 = 17;

/// General register numbers.
#[allow(missing_docs, reason = "the names are the architecture's own")]
pub mod gpr {
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
}

/// How wide code is: decided by CS and EFER.LMA.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum CodeSize {
    /// Real mode, virtual-8086 mode, and 16-bit protected or compatibility code.
    Bits16 = 0,
    /// 32-bit protected or compatibility code.
    Bits32 = 1,
    /// 64-bit mode.
    Bits64 = 2,
}

/// What the vCPU is doing between instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activity {
    /// Executing.
    Running,
    /// In HLT or MWAIT, until an interrupt that is not held off (or any, for [`MpState`] changes).
    Halted,
    /// An application processor that waits for INIT, or after INIT for SIPI.
    Waiting(MpState),
    /// A triple fault happened.
    Shutdown,
}

/// One 256-bit vector register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C, align(32))]
pub struct Ymm(pub [u8; 32]);

/// The SSE and AVX state. x87 and MMX state is in [`Fpu`].
#[derive(Debug, Clone)]
#[repr(C, align(64))]
pub struct Vectors {
    /// YMM0 to YMM15; XMM is the low half.
    pub ymm: [Ymm; 16],
    /// MXCSR.
    pub mxcsr: u32,
}

/// The x87 state as a 512-byte FXSAVE64 image of which only the x87 part (bytes 0 to 159) counts, plus what an image cannot say.
/// While the vCPU runs, the live x87 state may be in the host's x87 registers: see [`crate::native`].
#[derive(Debug, Clone)]
#[repr(C, align(64))]
pub struct Fpu {
    /// FXSAVE64 layout (Intel SDM 1 table 10-2).
    pub image: [u8; 512],
    /// Offset (RIP) of the last non-control x87 instruction.
    pub fip: u64,
    /// CS selector of it.
    pub fcs: u16,
    /// Offset of its memory operand.
    pub fdp: u64,
    /// Data segment selector of it.
    pub fds: u16,
    /// Its opcode, 11 bits.
    pub fop: u16,
}

/// The state of one vCPU.
///
/// The layout is `repr(C)`, hot fields first, because generated code addresses it.
#[repr(C)]
pub struct Cpu {
    /// RAX..R15 in encoding order, then [`ZERO`], then [`RIP`].
    ///
    /// While a block executes, `regs[RIP]` is the offset (in CS) of the beginning of the *page* that the block lies in: an instruction's
    /// own address is that plus [`Op::off`](crate::decode::Op::off), so jumps within a page leave it alone. Between blocks it is the
    /// architectural RIP.
    pub regs: [u64; 18],
    /// The six arithmetic flags in the form that `LAHF; SETO AL` leaves in AX: AH = SF ZF 0 AF 0 PF 1 CF, AL = OF.
    pub arith: u16,
    /// What the current instruction raised; see [`Trap`].
    pub trap: TrapInfo,
    /// All other flags of RFLAGS (TF, IF, DF, IOPL, NT, RF, VM, AC, VIF, VIP, ID), in place; arithmetic bits and bit 1 are zero here.
    pub sys_flags: u64,
    /// Current privilege level.
    pub cpl: u8,
    /// Code width, follows CS.
    pub code_size: CodeSize,
    /// ES, CS, SS, DS, FS, GS.
    pub seg: [Segment; 6],
    /// End of the running block's ops; null makes it end after the current op.
    pub block_end: *const crate::decode::Op,
    /// The op that executes, within a block.
    pub current: *const crate::decode::Op,
    /// Decoding mode in force, and its key.
    pub mode: crate::decode::Mode,
    /// See [`Mode::key`](crate::decode::Mode::key).
    pub mode_key: u64,
    /// What translated code looks at.
    pub hot: crate::translate::Hot,
    /// SSE and AVX registers.
    pub vec: Vectors,
    /// x87 and MMX.
    pub fpu: Fpu,
    /// TLB, page walks, RAM.
    pub mmu: Mmu,

    /// Task register.
    pub tr: Segment,
    /// Local descriptor table.
    pub ldtr: Segment,
    /// Global descriptor table.
    pub gdtr: TableRegister,
    /// Interrupt descriptor table.
    pub idtr: TableRegister,
    /// CR0. Change through [`Cpu::set_cr0`] and friends, which keep what follows from it.
    pub cr0: u64,
    /// Page-fault address.
    pub cr2: u64,
    /// Page-table root.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// Enabled XSAVE components.
    pub xcr0: u64,
    /// PAE page-directory-pointer entries, loaded with CR3.
    pub pdptrs: [u64; 4],
    /// DR0 to DR3.
    pub dr: [u64; 4],
    /// Debug status.
    pub dr6: u64,
    /// Debug control.
    pub dr7: u64,
    /// DR6 bits of debug conditions met by the current instruction, to be delivered when it ends.
    pub pending_db: u64,

    /// SYSENTER_CS, ESP, EIP.
    pub sysenter: [u64; 3],
    /// STAR, LSTAR, CSTAR, SFMASK.
    pub star: u64,
    /// 64-bit SYSCALL target.
    pub lstar: u64,
    /// Compatibility-mode SYSCALL target.
    pub cstar: u64,
    /// RFLAGS bits that SYSCALL clears.
    pub sfmask: u64,
    /// What SWAPGS exchanges with the GS base.
    pub kernel_gs_base: u64,
    /// TSC_AUX, as RDTSCP and RDPID give it.
    pub tsc_aux: u64,
    /// Guest TSC minus host TSC.
    pub tsc_offset: u64,
    /// Remaining MSRs that only store a value.
    pub msrs: BTreeMap<u32, u64>,

    /// Interrupts are held off until the next instruction is done (STI, MOV SS).
    pub shadow: Shadow,
    /// NMIs are blocked until IRET.
    pub nmi_blocked: bool,
    /// What it is doing.
    pub activity: Activity,
    /// The current instruction suppresses the single-step trap that TF would bring after it.
    pub no_step_trap: bool,
    /// Interrupts and time, as far as they are this thread's own.
    pub local: crate::apic::Local,
    /// EXT bit of error codes: set while an interrupt or exception is being delivered.
    pub ext: u32,
    /// The CPU model is an AMD (or Hygon) one: decides where vendors differ.
    pub amd: bool,
    /// What the CPU model makes of control registers.
    pub masks: ControlMasks,
    /// PAUSEs since the last offer of the core.
    pub pauses: u32,
    /// What a debugger wants.
    pub debugger: crate::vcpu::Debugger,
    /// Translated blocks; none while only the interpreter is to run.
    pub translator: Option<Box<crate::translate::Translator>>,
    /// Decoded blocks.
    pub cache: crate::cache::BlockCache,
    /// Instructions that CPUID declares.
    pub features: crate::decode::FeatureSet,
    /// How it decodes where CPUs differ; see [`options`](crate::decode::options).
    pub decode_options: u32,
    /// CPUID's answers.
    pub cpuid: CpuidTable,
    /// Everything outside this vCPU.
    pub env: crate::vcpu::Env,
}

// SAFETY: the raw pointers in a Cpu (block end, TLB) point into what it owns; one thread uses it at a time.
unsafe impl Send for Cpu {}

/// An interrupt shadow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Shadow {
    /// None.
    #[default]
    None,
    /// After STI: maskable interrupts wait.
    Sti,
    /// After a load of SS: maskable interrupts, NMIs and debug traps wait.
    MovSs,
}

impl Cpu {
    /// A general register (or [`ZERO`], [`RIP`]).
    #[inline(always)]
    pub fn r(&self, n: usize) -> u64 {
        self.regs[n]
    }

    /// The operand register at byte offset `at` of [`Cpu::regs`] (8 times the number; plus 1 for AH, CH, DH, BH).
    #[inline(always)]
    pub fn reg<T: Int>(&self, at: u8) -> T {
        debug_assert!(usize::from(at) + T::SIZE <= 144);
        // SAFETY: the decoder only makes offsets of whole registers or of their second byte for T = u8, all inside `regs`.
        unsafe { self.regs.as_ptr().byte_add(usize::from(at)).cast::<T>().read_unaligned() }
    }

    /// Write the operand register at byte offset `at`; a 32-bit write clears the upper half, narrower ones keep the rest.
    #[inline(always)]
    pub fn set_reg<T: Int>(&mut self, at: u8, v: T) {
        debug_assert!(usize::from(at) + T::SIZE <= 128);
        // SAFETY: as in `reg`; writes never reach ZERO or RIP because no operand names them.
        unsafe {
            let p = self.regs.as_mut_ptr().byte_add(usize::from(at));
            if T::SIZE == 4 { p.write(v.to_u64()) } else { p.cast::<T>().write_unaligned(v) }
        }
    }

    /// Whether EFER.LMA: long mode, 64-bit or compatibility.
    #[inline(always)]
    pub fn long_mode(&self) -> bool {
        self.efer & EFER_LMA != 0
    }
    /// Whether code is 64-bit.
    #[inline(always)]
    pub fn code64(&self) -> bool {
        self.code_size == CodeSize::Bits64
    }
    /// Whether CR0.PE.
    #[inline(always)]
    pub fn protected(&self) -> bool {
        self.cr0 & CR0_PE != 0
    }
    /// Whether virtual-8086 mode.
    #[inline(always)]
    pub fn v86(&self) -> bool {
        self.sys_flags & ringfort_x86::flags::VM != 0
    }
    /// Whether segments work by real-mode rules (real or virtual-8086 mode).
    #[inline(always)]
    pub fn real_segments(&self) -> bool {
        !self.protected() || self.v86()
    }
    /// I/O privilege level.
    #[inline(always)]
    pub fn iopl(&self) -> u8 {
        (self.sys_flags >> 12 & 3) as u8
    }

    /// Width of stack addresses in bytes: 8 in 64-bit mode, else by SS.B.
    #[inline(always)]
    pub fn stack_size(&self) -> u8 {
        if self.code64() {
            8
        } else if self.seg[SS].db() {
            4
        } else {
            2
        }
    }

    /// Recompute what follows from CS, SS, EFER and RFLAGS.VM: code width. Call after changing any of them; changing
    /// `cpl`, CR0, CR4 or RFLAGS.AC needs [`Cpu::update_mmu_mode`].
    pub fn update_code_size(&mut self) {
        let cs = &self.seg[CS];
        self.code_size = if self.long_mode() && cs.long() {
            CodeSize::Bits64
        } else if cs.db() {
            CodeSize::Bits32
        } else {
            CodeSize::Bits16
        };
    }
}
