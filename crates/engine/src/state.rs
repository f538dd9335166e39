//! The whole architectural state of one vCPU, as every engine reads and writes it.

use ringfort_x86::segment::{Segment, TableRegister};
use serde::{Deserialize, Serialize};

/// Multiprocessor state of a vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum MpState {
    /// Executing.
    #[default]
    Runnable,
    /// In HLT (or MWAIT), until an interrupt.
    Halted,
    /// An application processor before INIT.
    Uninitialized,
    /// After INIT, waiting for a start-up message.
    WaitForSipi,
}

/// An exception raised but not yet delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingException {
    /// Its vector.
    pub vector: u8,
    /// Its error code, where it has one.
    pub error_code: Option<u32>,
}

/// Events in flight at an instruction boundary.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CpuEvents {
    /// Raised and not yet delivered.
    pub exception: Option<PendingException>,
    /// An external interrupt that the APIC or 8259 has handed over (it is in service there) and that is not yet delivered.
    pub interrupt: Option<u8>,
    /// Interrupts are held off for one instruction after STI.
    pub sti_shadow: bool,
    /// Interrupts and debug traps are held off for one instruction after MOV SS or POP SS.
    pub mov_ss_shadow: bool,
    /// An NMI waits.
    pub nmi_pending: bool,
    /// NMIs are blocked until IRET.
    pub nmi_blocked: bool,
    /// SIPI vector received and not yet acted on.
    pub sipi_vector: Option<u8>,
}

/// All of a vCPU. Does not say which engine it was read from.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CpuState {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15: the hardware's numbering.
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS.
    pub segments: [Segment; 6],
    /// Task register.
    pub tr: Segment,
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// Global descriptor table.
    pub gdtr: TableRegister,
    /// Interrupt descriptor table.
    pub idtr: TableRegister,
    /// Control registers.
    pub cr0: u64,
    /// Page-fault address.
    pub cr2: u64,
    /// Page-table root.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: u64,
    /// Task priority.
    pub cr8: u64,
    /// PAE page-directory-pointer entries, as loaded with CR3.
    pub pdptrs: [u64; 4],
    /// Extended feature enable register.
    pub efer: u64,
    /// Enabled XSAVE components.
    pub xcr0: u64,
    /// DR0 to DR3.
    pub dr: [u64; 4],
    /// Debug status.
    pub dr6: u64,
    /// Debug control.
    pub dr7: u64,
    /// Further MSRs by number, ascending. TSC and TSC_DEADLINE are here as well.
    pub msrs: Vec<(u32, u64)>,
    /// The XSAVE area in standard (not compacted) format, at least 576 bytes (Intel SDM 1 section 13.4).
    pub xsave: Vec<u8>,
    /// The 1 KiB register page of the local APIC (Intel SDM 3A table 10-1), as KVM_GET_LAPIC has it.
    pub apic: Vec<u8>,
    /// Events in flight.
    pub events: CpuEvents,
    /// Multiprocessor state.
    pub mp_state: MpState,
}
