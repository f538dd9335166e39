//! The part of a PCI function that is the same for all: configuration space tied to MSI-X and INTx.

use super::config::{command, reg, status};
use super::{BarKind, BarWindow, ConfigSpace, MsixSaved, MsixState};
use ringfort_bus::{IrqLine, lock};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex};

/// What a configuration write asks of the function beyond its registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConfigEvents {
    /// Function-level reset: configuration space and MSI-X are reset already; the device itself must do the same.
    pub function_reset: bool,
    /// Bus mastering is allowed after the write. While it is not, the device must not touch guest memory.
    pub bus_master: bool,
}

/// Saved configuration space, INTx level and MSI-X.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciConfigState {
    registers: Vec<u8>,
    intx: bool,
    msix: Option<MsixSaved>,
}

struct Inner {
    space: ConfigSpace,
    intx: bool,
}

/// A function's configuration space at work. See the [module](super) for how to use it.
pub struct PciConfig {
    inner: Mutex<Inner>,
    power_on: Vec<u8>,
    msix: Option<Arc<MsixState>>,
    line: Arc<dyn IrqLine>,
}

impl PciConfig {
    /// Put a described space to work: its content now is what reset returns to. `line` is the INTx pin's line
    /// ([`ringfort_bus::NoIrq`] without a pin).
    pub fn new(space: ConfigSpace, msix: Option<Arc<MsixState>>, line: Arc<dyn IrqLine>) -> PciConfig {
        let power_on = space.registers().to_vec();
        PciConfig { inner: Mutex::new(Inner { space, intx: false }), power_on, msix, line }
    }

    /// The guest reads.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        lock(&self.inner).space.read(offset, data);
    }

    /// The guest writes. Does everything that the standard registers ask for and says what the device must do.
    pub fn write(&self, offset: u16, data: &[u8]) -> ConfigEvents {
        let mut i = lock(&self.inner);
        i.space.write(offset, data);
        // Bit 15 of PCIe device control starts a function-level reset and always reads as 0.
        let flr = i.space.pcie.is_some_and(|cap| {
            (usize::from(cap) + 9)
                .checked_sub(usize::from(offset))
                .and_then(|n| data.get(n))
                .is_some_and(|b| b & 0x80 != 0)
        });
        if flr {
            self.reset_locked(&mut i);
        } else {
            self.follow(&i);
        }
        ConfigEvents { function_reset: flr, bus_master: i.space.u16(reg::COMMAND) & command::BUS_MASTER != 0 }
    }

    /// Look at or change registers from the device's side.
    pub fn with<R>(&self, f: impl FnOnce(&mut ConfigSpace) -> R) -> R {
        f(&mut lock(&self.inner).space)
    }

    /// Where the BARs decode now.
    pub fn windows(&self) -> [Option<BarWindow>; 7] {
        lock(&self.inner).space.windows()
    }

    /// What the BARs are.
    pub fn bars(&self) -> [Option<(BarKind, u64)>; 7] {
        lock(&self.inner).space.bars()
    }

    /// Bus mastering (DMA and MSI) is allowed.
    pub fn bus_master(&self) -> bool {
        lock(&self.inner).space.u16(reg::COMMAND) & command::BUS_MASTER != 0
    }

    /// Assert or release INTx. It shows in the status register, and on the line unless the guest disabled it or
    /// switched MSI-X on.
    pub fn set_intx(&self, asserted: bool) {
        let mut i = lock(&self.inner);
        i.intx = asserted;
        let s = i.space.u16(reg::STATUS) & !status::INTX;
        i.space.set_u16(reg::STATUS, s | if asserted { status::INTX } else { 0 });
        self.follow(&i);
    }

    /// Back to power-on, MSI-X and INTx included.
    pub fn reset(&self) {
        self.reset_locked(&mut lock(&self.inner));
    }

    fn reset_locked(&self, i: &mut Inner) {
        i.space.reset_to(&self.power_on);
        i.intx = false;
        if let Some(m) = &self.msix {
            m.reset();
        }
        self.follow(i);
    }

    /// Bring MSI-X and the line in step with the registers. The lock is held, so levels cannot overtake each other.
    fn follow(&self, i: &Inner) {
        let cmd = i.space.u16(reg::COMMAND);
        let mut msix_on = false;
        if let (Some(m), Some(cap)) = (&self.msix, i.space.msix) {
            let control = i.space.u16(cap + 2);
            msix_on = control & 0x8000 != 0;
            m.set_control(msix_on, control & 0x4000 != 0, cmd & command::BUS_MASTER != 0);
        }
        if i.space.u8(reg::INTERRUPT_PIN) != 0 {
            self.line.set(i.intx && !msix_on && cmd & command::INTX_DISABLE == 0);
        }
    }

    /// State for the function's section.
    pub fn save(&self) -> PciConfigState {
        let i = lock(&self.inner);
        PciConfigState {
            registers: i.space.registers().to_vec(),
            intx: i.intx,
            msix: self.msix.as_ref().map(|m| m.save()),
        }
    }

    /// Take over a saved state.
    ///
    /// # Errors
    /// What does not fit, in words; nothing has changed then.
    pub fn load(&self, saved: &PciConfigState) -> Result<(), &'static str> {
        let mut i = lock(&self.inner);
        match (&self.msix, &saved.msix) {
            (None, None) => {}
            (Some(m), Some(s)) if m.fits(s) => {}
            _ => return Err("MSI-X table is of another size"),
        }
        if saved.intx
            != (saved.registers.get(usize::from(reg::STATUS)).is_some_and(|s| s & status::INTX as u8 != 0))
        {
            return Err("INTx level and status register differ");
        }
        if !i.space.restore(&saved.registers, &[(reg::STATUS, status::INTX as u8)]) {
            return Err("configuration space is another device's");
        }
        i.intx = saved.intx;
        if let (Some(m), Some(s)) = (&self.msix, &saved.msix) {
            m.load(s);
        }
        self.follow(&i);
        Ok(())
    }
}
