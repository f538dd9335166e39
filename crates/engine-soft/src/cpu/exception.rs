//! Delivery of exceptions and interrupts.

use super::{Activity, Cpu, TrapInfo};

/// What is being delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InterruptKind {
    /// An exception at the current instruction, with its error code if it has one.
    Exception(Option<u32>),
    /// INT n; the address of the next instruction.
    Software(u64),
    /// INT3 or INTO; the address of the next instruction. As INT n, but not subject to IOPL and redirection in virtual-8086 mode.
    IntTrap(u64),
    /// INT1; the address of the next instruction.
    Icebp(u64),
    /// An external interrupt.
    Hardware,
    /// An NMI.
    Nmi,
}

impl Cpu {
    /// Deliver an exception raised at `regs[RIP]`; nested faults become #DF and shutdown.
    pub fn deliver_exception(&mut self, _info: TrapInfo) {
        self.activity = Activity::Shutdown;
    }

    /// Deliver an interrupt.
    pub fn deliver_interrupt(&mut self, _vector: u8, _kind: InterruptKind) {
        self.activity = Activity::Shutdown;
    }
}
