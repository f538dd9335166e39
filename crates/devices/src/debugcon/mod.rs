//! The debug console port of Bochs and QEMU: firmware writes its log there.

use ringfort_bus::{Device, Format, PioDevice, Section, StateError};

/// Usual port.
pub const PORT: u16 = 0x402;
/// What reading gives, so that firmware knows that somebody listens.
pub const PRESENT: u8 = 0xe9;
const KIND: &str = "debugcon";
/// How the state is laid out.
pub(crate) const FORMAT: Format = Format::of::<()>(KIND, 1);

type Sink = Box<dyn FnMut(&[u8]) + Send>;

/// Bytes go to a sink as they come.
pub struct DebugCon {
    sink: Sink,
}

impl DebugCon {
    /// A port whose bytes go to `sink`, which must not wait.
    pub fn new(sink: impl FnMut(&[u8]) + Send + 'static) -> DebugCon {
        DebugCon { sink: Box::new(sink) }
    }
}

impl PioDevice for DebugCon {
    fn pio_read(&mut self, _port: u16, data: &mut [u8]) {
        data.fill(PRESENT);
    }
    fn pio_write(&mut self, _port: u16, data: &[u8]) {
        (self.sink)(data);
    }
}

impl Device for DebugCon {
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
    use crate::testing::Ports;
    use std::sync::{Arc, Mutex};

    #[test]
    fn bytes_come_out() {
        let log: Arc<Mutex<Vec<u8>>> = Arc::default();
        let l = log.clone();
        let mut d = DebugCon::new(move |b| ringfort_bus::lock(&l).extend_from_slice(b));
        assert_eq!(d.inb(PORT), 0xe9);
        d.outb(PORT, b'h');
        d.outw(PORT, u16::from_le_bytes(*b"i\n"));
        assert_eq!(*ringfort_bus::lock(&log), b"hi\n");
    }
}
