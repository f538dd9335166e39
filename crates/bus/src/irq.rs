//! Interrupt lines and messages.

/// A wire to an interrupt controller's input.
pub trait IrqLine: Send + Sync {
    /// Drive the line. Edge-triggered inputs see a rise; level-triggered ones stay asserted until it falls.
    fn set(&self, high: bool);

    /// One edge.
    fn pulse(&self) {
        self.set(true);
        self.set(false);
    }
}

/// A line that leads nowhere.
pub struct NoIrq;

impl IrqLine for NoIrq {
    fn set(&self, _high: bool) {}
}

/// A message-signalled interrupt (PCI 3.0 section 6.8; Intel SDM 3A section 11.11).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct MsiMessage {
    /// Address, 0xFEEx_xxxx for interrupts.
    pub address: u64,
    /// Data: vector, delivery mode, trigger mode.
    pub data: u32,
}

/// Where message-signalled interrupts go.
pub trait MsiSink: Send + Sync {
    /// Deliver `msg`.
    fn send(&self, msg: MsiMessage);

    /// A channel for one source that sends often; `None` where there is nothing better than [`send`](Self::send).
    fn channel(&self) -> Option<Box<dyn MsiChannel>> {
        None
    }
}

/// A way for the messages of one source, which is quick while it sends the same one.
pub trait MsiChannel: Send {
    /// Deliver `msg`. False if this channel cannot; the message has to go to the sink then.
    fn send(&mut self, msg: MsiMessage) -> bool;
}
