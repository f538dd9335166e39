//! What a debugger wants of a vCPU, for engines that can.

use crate::EngineError;

/// What a hardware breakpoint or watchpoint looks for (Intel SDM 3B section 18.2.4, the R/W field of DR7).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WatchKind {
    /// Execution of the instruction at the address; length 1.
    Execute,
    /// Stores.
    Write,
    /// Loads and stores.
    Access,
}

/// A breakpoint or watchpoint that the engine watches for without changing the guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Watch {
    /// What to look for.
    pub kind: WatchKind,
    /// Linear address, aligned to `len`.
    pub address: u64,
    /// Bytes: 1, 2, 4 or 8.
    pub len: u8,
}

/// What a debugger wants to be told of.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DebugRequest {
    /// Stop after one instruction.
    pub step: bool,
    /// Stop before an INT3 instead of giving it to the guest: the debugger has put it there.
    pub software: bool,
    /// Breakpoints and watchpoints; at most [`DebugVcpu::max_watches`].
    pub watches: Vec<Watch>,
}

/// Why a vCPU stopped for its debugger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DebugStop {
    /// One instruction was executed.
    Step,
    /// RIP is at an INT3 (not after it).
    Software,
    /// The watch of this number in [`DebugRequest::watches`] was hit: before an instruction, after an access.
    Watch(usize),
}

/// A vCPU that can be debugged: the optional capability behind [`crate::Vcpu::debugger`].
pub trait DebugVcpu {
    /// How many watches there can be at once.
    fn max_watches(&self) -> usize;
    /// Replace what is asked for; an empty request ends debugging. Takes effect with the next run. A stop leaves the
    /// request in force.
    ///
    /// # Errors
    /// When the engine or host cannot do it; then the old request stays.
    fn set_debug(&mut self, request: &DebugRequest) -> Result<(), EngineError>;
    /// The physical address that a linear address is mapped to now, or `None`.
    ///
    /// # Errors
    /// When the engine cannot tell.
    fn translate(&mut self, address: u64) -> Result<Option<u64>, EngineError>;
}
