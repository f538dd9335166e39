//! Delivery of exceptions and interrupts.

use super::{Activity, Cpu, TrapInfo};

impl Cpu {
    /// Deliver an exception raised at `regs[RIP]`; nested faults become #DF and shutdown.
    pub fn deliver_exception(&mut self, _info: TrapInfo) {
        self.activity = Activity::Shutdown;
    }
}
