//! Doorbells that ring without a device's code being run for them.

use std::os::fd::BorrowedFd;

/// Where the doorbells of devices that wait for them on an event descriptor can be connected.
pub trait DoorbellSink: Send + Sync {
    /// Stores of any length to guest physical `address` count on `bell` from now on, instead of reaching the bus. False if that
    /// cannot be: they reach the bus as before.
    fn connect(&self, address: u64, bell: BorrowedFd<'_>) -> bool;

    /// Undo [`connect`](Self::connect); what has been rung is on the descriptor then.
    fn disconnect(&self, address: u64, bell: BorrowedFd<'_>);
}

/// Connects nothing.
pub struct NoDoorbells;

impl DoorbellSink for NoDoorbells {
    fn connect(&self, _address: u64, _bell: BorrowedFd<'_>) -> bool {
        false
    }
    fn disconnect(&self, _address: u64, _bell: BorrowedFd<'_>) {}
}
