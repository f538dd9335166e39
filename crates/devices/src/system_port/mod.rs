//! System control port A (0x92: A20 and fast reset), and the POST code and DMA page registers (0x80 to 0x8F), which
//! are plain storage here (ICH9 data sheet sections 13.7.2 and 13.2).

use crate::ports;
use crate::power::{PowerEvent, PowerSink};
use ringfort_bus::{Device, Format, IrqLine, PioDevice, Section, StateError};
use std::sync::Arc;

/// System control port A.
pub const PORT_A: u16 = 0x92;
/// First port of the POST code and DMA page registers.
pub const PAGES: u16 = 0x80;
/// Number of those.
pub const PAGES_LEN: u16 = 16;
const KIND: &str = "system-port-a";
/// How the state is laid out.
pub(crate) const FORMAT: Format = Format::of::<u8>(KIND, 1);
const PAGES_KIND: &str = "dma-pages";
pub(crate) const PAGES_FORMAT: Format = Format::of::<[u8; PAGES_LEN as usize]>(PAGES_KIND, 1);

/// Port 0x92. Bit 0 resets when it rises, bit 1 opens A20.
pub struct PortA {
    value: u8,
    a20: Arc<dyn IrqLine>,
    power: Arc<dyn PowerSink>,
}

impl PortA {
    /// A port that drives `a20` (high: open; the machine ORs it with the keyboard controller's) and reports
    /// reset to `power`.
    pub fn new(a20: Arc<dyn IrqLine>, power: Arc<dyn PowerSink>) -> PortA {
        PortA { value: 0, a20, power }
    }
}

impl PioDevice for PortA {
    fn pio_read(&mut self, port: u16, data: &mut [u8]) {
        ports::read(port, data, |p| if p == PORT_A { self.value } else { 0xff });
    }

    fn pio_write(&mut self, port: u16, data: &[u8]) {
        ports::write(port, data, |p, v| {
            if p == PORT_A {
                let rise = v & !self.value & 1 != 0;
                self.value = v & 3;
                self.a20.set(v & 2 != 0);
                if rise {
                    self.power.event(PowerEvent::Reset);
                }
            }
        });
    }
}

impl Device for PortA {
    fn kind(&self) -> &'static str {
        KIND
    }
    fn reset(&mut self) {
        self.value = 0;
        self.a20.set(false);
    }
    fn save(&self) -> Section {
        Section::new(KIND, 0, 1, &self.value)
    }
    fn load(&mut self, section: &Section) -> Result<(), StateError> {
        let v: u8 = section.decode(KIND, 1)?;
        if v > 3 {
            return Err(section.invalid("a register holds an impossible value"));
        }
        self.value = v;
        self.a20.set(v & 2 != 0);
        Ok(())
    }
}

/// Ports 0x80 to 0x8F. Guests write 0x80 to wait a moment, so this does nothing but remember.
#[derive(Default)]
pub struct DmaPages {
    values: [u8; PAGES_LEN as usize],
}

impl DmaPages {
    /// All zero.
    pub fn new() -> DmaPages {
        DmaPages::default()
    }

    /// The last POST code written.
    pub fn post_code(&self) -> u8 {
        self.values[0]
    }
}

impl PioDevice for DmaPages {
    fn pio_read(&mut self, port: u16, data: &mut [u8]) {
        ports::read(port, data, |p| {
            self.values.get(usize::from(p.wrapping_sub(PAGES))).copied().unwrap_or(0xff)
        });
    }

    fn pio_write(&mut self, port: u16, data: &[u8]) {
        ports::write(port, data, |p, v| {
            if let Some(b) = self.values.get_mut(usize::from(p.wrapping_sub(PAGES))) {
                *b = v;
            }
        });
    }
}

impl Device for DmaPages {
    fn kind(&self) -> &'static str {
        PAGES_KIND
    }
    fn reset(&mut self) {
        self.values = Default::default();
    }
    fn save(&self) -> Section {
        Section::new(PAGES_KIND, 0, 1, &self.values)
    }
    fn load(&mut self, section: &Section) -> Result<(), StateError> {
        self.values = section.decode(PAGES_KIND, 1)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Events, Ports, Wire, hammer_ports};

    #[test]
    fn a20_and_fast_reset() {
        let (a20, power) = (Wire::new(), Arc::new(Events::default()));
        let mut p = PortA::new(a20.clone(), power.clone());
        p.outb(PORT_A, 0xfe);
        assert!(a20.high());
        assert_eq!(p.inb(PORT_A), 2);
        p.outb(PORT_A, 3);
        p.outb(PORT_A, 3);
        assert_eq!(power.take(), [PowerEvent::Reset], "on the rise only");
        p.reset();
        assert!(!a20.high());
    }

    #[test]
    fn hammer() {
        let make = || PortA::new(Wire::new(), Arc::new(Events::default()));
        hammer_ports(0x92, make, &[0x91, 0x92, 0x93], |_, _| {});
        let ports: Vec<u16> = (0x7e..0x92).collect();
        hammer_ports(0x80, DmaPages::new, &ports, |d, _| {
            d.outb(0x80, 0x55);
            assert_eq!((d.post_code(), d.inb(0x80)), (0x55, 0x55));
        });
    }
}
