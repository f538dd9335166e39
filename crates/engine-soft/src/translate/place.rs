//! Which guest instruction a host address belongs to, for reports of faults. Allocates nothing.

use super::Translator;
use crate::cache::Block;

/// The guest's general registers.
pub(crate) const REGISTERS: [(u8, &str); 16] = [
    (0, "RAX"),
    (1, "RCX"),
    (2, "RDX"),
    (3, "RBX"),
    (4, "RSP"),
    (5, "RBP"),
    (6, "RSI"),
    (7, "RDI"),
    (8, "R8 "),
    (9, "R9 "),
    (10, "R10"),
    (11, "R11"),
    (12, "R12"),
    (13, "R13"),
    (14, "R14"),
    (15, "R15"),
];

/// Where in a block's translation an address lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Within {
    /// Bytes from the beginning of the part.
    pub offset: usize,
    /// In the part that seldom executes.
    pub seldom: bool,
    /// The number of the instruction, if it is known.
    pub op: Option<usize>,
}

impl Translator {
    /// Whether `host` lies in code memory.
    pub(crate) fn holds(&self, host: usize) -> bool {
        host.wrapping_sub(self.memory.address(0)) < self.memory.size()
    }

    /// Where `host` lies in the translation of `b`; `None` if it lies elsewhere.
    pub(crate) fn within(&self, b: &Block, host: usize) -> Option<Within> {
        let p = b.place.get();
        let offset = host.wrapping_sub(b.code.get());
        if offset < p.size as usize {
            let op = (0..p.marks as usize).take_while(|&n| self.mark(p, n) as usize <= offset).last();
            return Some(Within { offset, seldom: false, op });
        }
        let offset = host.wrapping_sub(self.memory.address(p.seldom as usize));
        (offset < p.seldom_size as usize).then_some(Within { offset, seldom: true, op: None })
    }

    /// Where the code of instruction `n` begins.
    fn mark(&self, p: crate::cache::Place, n: usize) -> u16 {
        let mut two = [0xff; 2];
        self.memory.read(p.seldom as usize + usize::from(p.seldom_size) + n * two.len(), &mut two);
        u16::from_le_bytes(two)
    }

    /// For tests: overwrite what instruction `op` of `b` became.
    #[cfg(test)]
    pub(crate) fn sabotage(&mut self, b: &Block, op: usize, bytes: &[u8]) {
        let at = b.code.get() - self.memory.address(0) + usize::from(self.mark(b.place.get(), op));
        self.memory.write(at, bytes);
    }
}
