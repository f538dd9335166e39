//! Interrupt controllers and timer of the PC in the engine's host, for engines that were asked to have them there.

use crate::EngineError;
use ringfort_bus::irqchip::{IoApicRegisters, PicRegisters, PitRegisters};

/// The optional capability behind [`crate::Vm::irqchip`]: 8259 pair, I/O APIC and 8254 belong to the engine, and the machine only drives their
/// inputs and carries their state.
pub trait Irqchip: Send + Sync {
    /// Drive input `input` (0 to 15) of the 8259 pair.
    fn set_pic(&self, input: u8, high: bool);
    /// Drive input `pin` of the I/O APIC.
    fn set_ioapic(&self, pin: u8, high: bool);
    /// Registers of the 8259 pair, master first. Nothing may run.
    ///
    /// # Errors
    /// The host's.
    fn pics(&self) -> Result<[PicRegisters; 2], EngineError>;
    /// Registers of the I/O APIC.
    ///
    /// # Errors
    /// The host's.
    fn ioapic(&self) -> Result<IoApicRegisters, EngineError>;
    /// Registers of the timer.
    ///
    /// # Errors
    /// The host's.
    fn pit(&self) -> Result<PitRegisters, EngineError>;
    /// Replace all of them. Nothing may run. Counts of the timer begin anew.
    ///
    /// # Errors
    /// The host's.
    fn set(
        &self,
        pics: &[PicRegisters; 2],
        ioapic: &IoApicRegisters,
        pit: &PitRegisters,
    ) -> Result<(), EngineError>;
}
