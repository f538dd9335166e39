//! Debug registers, breakpoints, watchpoints, single step.

use super::Cpu;
use crate::mmu::Access;

impl Cpu {
    /// Whether DR7 enables any breakpoint.
    #[inline(always)]
    pub fn debug_armed(&self) -> bool {
        self.dr7 & 0xff != 0
    }

    /// Deliver #DB if an instruction breakpoint stands at the current RIP; true if so.
    pub fn instruction_breakpoint(&mut self) -> bool {
        false
    }

    /// A #DB trap with the given DR6 bits, after an instruction.
    pub fn deliver_debug(&mut self, _dr6: u64) {}

    /// Note in `pending_db` whether a data breakpoint matches an access that came by the slow path.
    pub fn check_watch(&mut self, _lin: u64, _len: usize, _access: Access) {}
}
