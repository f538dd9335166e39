//! INTx wires: sharing a line and the pin swizzle.

use ringfort_bus::{IrqLine, lock};
use std::sync::{Arc, Mutex};

/// A line that several sources pull: it is high while any of them is.
pub struct WiredOr {
    target: Arc<dyn IrqLine>,
    levels: Mutex<Vec<bool>>,
}

struct Input {
    joint: Arc<WiredOr>,
    index: usize,
}

impl WiredOr {
    /// Drive `target`.
    pub fn new(target: Arc<dyn IrqLine>) -> Arc<WiredOr> {
        Arc::new(WiredOr { target, levels: Mutex::default() })
    }

    /// One more source.
    pub fn input(self: &Arc<Self>) -> Arc<dyn IrqLine> {
        let mut levels = lock(&self.levels);
        levels.push(false);
        Arc::new(Input { joint: self.clone(), index: levels.len() - 1 })
    }
}

impl IrqLine for Input {
    fn set(&self, high: bool) {
        let mut levels = lock(&self.joint.levels);
        let before = levels.iter().any(|&l| l);
        levels[self.index] = high;
        let after = levels.iter().any(|&l| l);
        if before != after {
            // Under the lock, so that two sources cannot swap their changes on the way to the target.
            self.joint.target.set(after);
        }
    }
}

/// The bus line (0 for INTA to 3 for INTD) that `pin` (1 to 4) of `device` drives behind a bridge or on a root
/// bus with the usual routing (PCI-to-PCI Bridge 1.2 section 9.1).
pub const fn swizzle(device: u8, pin: u8) -> u8 {
    (pin.wrapping_sub(1).wrapping_add(device)) & 3
}
