//! A port by which a test guest ends the machine with a status (as QEMU's `isa-debug-exit`).

use crate::power::{PowerEvent, PowerSink};
use ringfort_bus::{Device, Format, PioDevice, Section, StateError};
use std::sync::Arc;

/// Usual first port.
pub const PORT: u16 = 0xf4;
/// Ports.
pub const LEN: u16 = 4;
const KIND: &str = "debug-exit";
/// How the state is laid out.
pub(crate) const FORMAT: Format = Format::of::<()>(KIND, 1);

/// Writing `v` reports exit status `v << 1 | 1`, so that a guest can never claim success (0).
pub struct DebugExit {
    power: Arc<dyn PowerSink>,
}

impl DebugExit {
    /// A device that reports to `power`.
    pub fn new(power: Arc<dyn PowerSink>) -> DebugExit {
        DebugExit { power }
    }
}

impl PioDevice for DebugExit {
    fn pio_read(&mut self, _port: u16, data: &mut [u8]) {
        data.fill(0);
    }

    fn pio_write(&mut self, _port: u16, data: &[u8]) {
        let v = data.iter().take(4).rev().fold(0u32, |v, &b| v << 8 | u32::from(b));
        self.power.event(PowerEvent::DebugExit(v << 1 | 1));
    }
}

impl Device for DebugExit {
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
    fn status_is_odd() {
        let power = Arc::new(Events::default());
        let mut d = DebugExit::new(power.clone());
        d.outb(PORT, 0);
        d.outb(PORT, 0x10);
        d.outl(PORT, 0xffff_ffff);
        assert_eq!(power.take(), [1, 0x21, 0xffff_ffff].map(PowerEvent::DebugExit));
        assert_eq!(d.inl(PORT), 0);
    }
}
