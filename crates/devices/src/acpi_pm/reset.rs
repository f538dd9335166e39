//! The reset control register at port 0xCF9 (ICH9 data sheet section 13.7.5).

use crate::power::{PowerEvent, PowerSink};
use ringfort_bus::{Device, Format, PioDevice, Section, StateError};
use std::sync::Arc;

const KIND: &str = "reset-control";
/// How the state is laid out.
pub(crate) const FORMAT: Format = Format::of::<u8>(KIND, 1);
const RST_CPU: u8 = 4;
/// System reset and full reset: kept; the CPU reset bit acts and falls back.
const KEPT: u8 = 2 | 8;

/// RST_CNT. Setting bit 2 resets; every kind of reset (0x04, 0x06, 0x0E) is a machine reset here.
pub struct ResetControl {
    value: u8,
    power: Arc<dyn PowerSink>,
}

impl ResetControl {
    /// The port; it lies among the PCI configuration ports, which pass it on.
    pub const PORT: u16 = 0xcf9;

    /// A register that reports to `power`.
    pub fn new(power: Arc<dyn PowerSink>) -> ResetControl {
        ResetControl { value: 0, power }
    }
}

impl PioDevice for ResetControl {
    fn pio_read(&mut self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(b) = data.first_mut() {
            *b = self.value;
        }
    }

    fn pio_write(&mut self, _port: u16, data: &[u8]) {
        if let Some(&v) = data.first() {
            self.value = v & KEPT;
            if v & RST_CPU != 0 {
                self.power.event(PowerEvent::Reset);
            }
        }
    }
}

impl Device for ResetControl {
    fn kind(&self) -> &'static str {
        KIND
    }
    fn reset(&mut self) {
        self.value = 0;
    }
    fn save(&self) -> Section {
        Section::new(KIND, 0, 1, &self.value)
    }
    fn load(&mut self, section: &Section) -> Result<(), StateError> {
        let v: u8 = section.decode(KIND, 1)?;
        if v & !KEPT != 0 {
            return Err(section.invalid("a register holds an impossible value"));
        }
        self.value = v;
        Ok(())
    }
}
