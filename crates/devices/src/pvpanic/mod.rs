//! pvpanic: the guest's kernel says that it panicked (QEMU's specification of the ISA device, `docs/specs/pvpanic`).

use crate::ports;
use crate::power::{PowerEvent, PowerSink};
use ringfort_bus::{Device, Format, PioDevice, Section, StateError};
use std::sync::Arc;

/// Usual port.
pub const PORT: u16 = 0x505;
/// Bits that are understood: panicked, crash kernel loaded, orderly shutdown.
pub const EVENTS: u8 = 7;
const KIND: &str = "pvpanic";
/// How the state is laid out.
pub(crate) const FORMAT: Format = Format::of::<()>(KIND, 1);

/// One byte: reading gives the bits that are understood, writing reports.
pub struct PvPanic {
    power: Arc<dyn PowerSink>,
}

impl PvPanic {
    /// A device that reports to `power`.
    pub fn new(power: Arc<dyn PowerSink>) -> PvPanic {
        PvPanic { power }
    }
}

impl PioDevice for PvPanic {
    fn pio_read(&mut self, port: u16, data: &mut [u8]) {
        let mut first = true;
        ports::read(port, data, |_| if std::mem::take(&mut first) { EVENTS } else { 0xff });
    }

    fn pio_write(&mut self, _port: u16, data: &[u8]) {
        let bits = data.first().copied().unwrap_or(0);
        let all = [PowerEvent::Panicked, PowerEvent::CrashLoaded, PowerEvent::ShuttingDown];
        for (i, e) in all.into_iter().enumerate() {
            if bits & 1 << i != 0 {
                self.power.event(e);
            }
        }
    }
}

impl Device for PvPanic {
    fn kind(&self) -> &'static str {
        KIND
    }
    fn reset(&mut self) {}
    fn save(&self) -> Section {
        Section::new(KIND, 0, 1, &())
    }
    fn load(&mut self, section: &Section) -> Result<(), StateError> {
        section.decode(KIND, 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Events, Ports};

    #[test]
    fn reports_each_known_bit() {
        let power = Arc::new(Events::default());
        let mut d = PvPanic::new(power.clone());
        assert_eq!(d.inb(PORT), 7);
        d.outb(PORT, 0xf8);
        assert!(power.take().is_empty());
        d.outb(PORT, 1);
        d.outb(PORT, 2);
        d.outl(PORT, 0xff04);
        assert_eq!(power.take(), [PowerEvent::Panicked, PowerEvent::CrashLoaded, PowerEvent::ShuttingDown]);
        let s = d.save();
        d.load(&s).unwrap();
        assert!(d.load(&Section { kind: "x".into(), ..s }).is_err());
    }
}
