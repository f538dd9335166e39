//! Ways to join interrupt lines: an input of a shared controller, and a switch between two sources.

use ringfort_bus::{IrqLine, Shared, lock};
use std::sync::{Arc, Mutex};

/// An interrupt controller with numbered inputs.
pub trait Inputs: Send {
    /// Drive input `n`; inputs that do not exist ignore it.
    fn set_input(&mut self, n: u8, high: bool);
}

struct Input<T> {
    controller: Shared<T>,
    n: u8,
}

impl<T: Inputs> IrqLine for Input<T> {
    fn set(&self, high: bool) {
        lock(&self.controller).set_input(self.n, high);
    }
}

/// A wire to input `n` of `controller`.
pub fn input<T: Inputs + 'static>(controller: &Shared<T>, n: u8) -> Arc<dyn IrqLine> {
    Arc::new(Input { controller: controller.clone(), n })
}

/// A device's output: passes changes on and keeps repetitions to itself.
pub(crate) struct Output {
    line: Arc<dyn IrqLine>,
    high: bool,
}

impl Output {
    /// An output that is low, as the line is.
    pub(crate) fn new(line: Arc<dyn IrqLine>) -> Output {
        Output { line, high: false }
    }

    pub(crate) fn set(&mut self, high: bool) {
        if self.high != high {
            self.high = high;
            self.line.set(high);
        }
    }
}

/// A line that drives several others alike (an ISA interrupt goes to the 8259 and to the IOAPIC).
pub struct Fan(pub Vec<Arc<dyn IrqLine>>);

impl IrqLine for Fan {
    fn set(&self, high: bool) {
        self.0.iter().for_each(|l| l.set(high));
    }
}

/// A switch: two sources, one target that sees the selected one. The HPET's legacy replacement takes IRQ 0 and 8
/// from PIT and RTC this way.
pub struct LineMux {
    target: Arc<dyn IrqLine>,
    state: Mutex<MuxState>,
}

#[derive(Default)]
struct MuxState {
    levels: [bool; 2],
    selected: usize,
}

struct MuxInput(Arc<LineMux>, usize);

impl LineMux {
    /// A switch onto `target`; source 0 is selected.
    pub fn new(target: Arc<dyn IrqLine>) -> Arc<LineMux> {
        Arc::new(LineMux { target, state: Mutex::default() })
    }

    /// The line of source 0 (`false`) or 1 (`true`).
    pub fn input(self: &Arc<Self>, second: bool) -> Arc<dyn IrqLine> {
        Arc::new(MuxInput(self.clone(), usize::from(second)))
    }

    /// Let source 0 (`false`) or 1 (`true`) through.
    pub fn select(&self, second: bool) {
        let mut s = lock(&self.state);
        let before = s.levels[s.selected];
        s.selected = usize::from(second);
        let after = s.levels[s.selected];
        if before != after {
            self.target.set(after);
        }
    }
}

impl IrqLine for MuxInput {
    fn set(&self, high: bool) {
        let mut s = lock(&self.0.state);
        let before = std::mem::replace(&mut s.levels[self.1], high);
        if s.selected == self.1 && before != high {
            self.0.target.set(high);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Wire;

    #[test]
    fn mux_switches() {
        let w = Wire::new();
        let m = LineMux::new(w.clone());
        let (a, b) = (m.input(false), m.input(true));
        b.set(true);
        assert!(!w.high());
        a.pulse();
        assert_eq!(w.take_edges(), 1);
        m.select(true);
        assert!(w.high());
        a.set(true);
        b.set(false);
        assert!(!w.high());
        m.select(false);
        assert!(w.high());
        let (x, y) = (Wire::new(), Wire::new());
        Fan(vec![x.clone(), y.clone()]).pulse();
        assert_eq!((x.take_edges(), y.take_edges()), (1, 1));
    }
}
