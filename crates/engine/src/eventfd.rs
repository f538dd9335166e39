//! Doorbells and interrupts that bypass the vCPU's thread, for engines whose host has them.

use crate::EngineError;
use std::os::fd::BorrowedFd;

/// Where a doorbell is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DoorbellAddress {
    /// An I/O port.
    Port(u16),
    /// A physical address that is no RAM.
    Mmio(u64),
}

/// A guest's store that becomes an event instead of an exit to the machine's bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Doorbell {
    /// Where.
    pub address: DoorbellAddress,
    /// Bytes that the store must have: 1, 2, 4 or 8; 0 for any length (then there is no value to compare).
    pub len: u8,
    /// Only stores of this value.
    pub value: Option<u64>,
}

/// Event descriptors connected to a VM: the optional capability behind [`crate::Vm::eventfds`].
pub trait EventFds: Send + Sync {
    /// Count each store to the doorbell on the eventfd `fd`, instead of telling the machine's bus.
    ///
    /// # Errors
    /// When the host refuses, for instance because the doorbell exists.
    fn add_doorbell(&self, doorbell: &Doorbell, fd: BorrowedFd<'_>) -> Result<(), EngineError>;
    /// Take it away again.
    ///
    /// # Errors
    /// When there is no such doorbell.
    fn remove_doorbell(&self, doorbell: &Doorbell, fd: BorrowedFd<'_>) -> Result<(), EngineError>;
    /// Make an interrupt that every write to the eventfd `fd` sends. It sends nothing until it has a message.
    ///
    /// # Errors
    /// When the host has no more.
    fn add_interrupt(&self, fd: BorrowedFd<'_>) -> Result<u32, EngineError>;
    /// The message (MSI address and data) that the interrupt sends from now on; `None` holds writes back.
    ///
    /// # Errors
    /// When there is no such interrupt or the host refuses.
    fn set_message(&self, interrupt: u32, message: Option<(u64, u32)>) -> Result<(), EngineError>;
    /// End it.
    ///
    /// # Errors
    /// When there is no such interrupt.
    fn remove_interrupt(&self, interrupt: u32) -> Result<(), EngineError>;
    /// Return when everything that was written to interrupts' descriptors has arrived at the CPUs: the host may do that a moment later.
    /// Nobody writes to one meanwhile.
    ///
    /// # Errors
    /// When the host refuses.
    fn settle(&self) -> Result<(), EngineError>;
    /// Let stores to a register that has no immediate effect wait in a queue until the next exit of any other kind, in order.
    ///
    /// # Errors
    /// When the host refuses.
    fn coalesce(&self, address: DoorbellAddress, len: u32) -> Result<(), EngineError>;
}
