//! The two ways to configuration space: ports 0xCF8/0xCFC (mechanism #1, PCI 3.0 section 3.2.2.3.2) and the
//! memory-mapped window (ECAM, PCIe 3.0 section 7.2.2).

use super::{Bdf, PciBus};
use ringfort_bus::{Format, Mmio, PortIo, Section, StateError};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Weak};

/// Ports 0xCF8 to 0xCFF. Only a 4-byte write at 0xCF8 sets the address; a byte access at 0xCF9 belongs to the
/// reset control register, which is given at construction.
pub struct ConfigPorts {
    bus: Arc<PciBus>,
    address: AtomicU32,
    reset_control: Option<Arc<dyn PortIo>>,
}

impl ConfigPorts {
    /// First port.
    pub const BASE: u16 = 0xcf8;
    /// Ports.
    pub const LEN: u16 = 8;
    const KIND: &'static str = "pci-config-ports";
    /// How the state is laid out.
    pub(crate) const FORMAT: Format = Format::of::<u32>(Self::KIND, 1);

    /// Ports for `bus`; accesses that begin at 0xCF9 go to `reset_control`.
    pub fn new(bus: Arc<PciBus>, reset_control: Option<Arc<dyn PortIo>>) -> ConfigPorts {
        ConfigPorts { bus, address: AtomicU32::new(0), reset_control }
    }

    /// Address register to zero.
    pub fn reset(&self) {
        self.address.store(0, Ordering::Relaxed);
    }

    /// The address register, as a section.
    pub fn save(&self) -> Section {
        Section::new(Self::KIND, 0, 1, &self.address.load(Ordering::Relaxed))
    }

    /// Take over the address register.
    ///
    /// # Errors
    /// When the section is another's or too new.
    pub fn load(&self, section: &Section) -> Result<(), StateError> {
        self.address.store(section.decode::<u32>(Self::KIND, 1)? & ADDRESS_BITS, Ordering::Relaxed);
        Ok(())
    }

    /// Function and register for a data port, when the enable bit is set.
    fn target(&self, port: u16) -> Option<(Bdf, u16)> {
        let a = self.address.load(Ordering::Relaxed);
        (a & 1 << 31 != 0).then(|| (Bdf::from_id((a >> 8) as u16), (a as u16 & 0xfc) + (port & 3)))
    }
}

/// Bits of the address register that exist; bits 1:0 are always 0 and 30:24 reserved.
const ADDRESS_BITS: u32 = 0x80ff_fffc;

impl PortIo for ConfigPorts {
    fn read(&self, port: u16, data: &mut [u8]) {
        match (port, &self.reset_control) {
            (0xcf9, Some(r)) => {
                data.fill(0xff);
                r.read(port, &mut data[..1]);
            }
            (0xcfc..=0xcff, _) => match self.target(port) {
                Some((bdf, at)) => self.bus.config_read(bdf, at, data),
                None => data.fill(0xff),
            },
            _ => {
                let bytes = self.address.load(Ordering::Relaxed).to_le_bytes();
                for (p, b) in (port..).zip(data) {
                    match p {
                        0xcf8..=0xcfb => *b = bytes[usize::from(p & 3)],
                        _ => self.read(p, std::slice::from_mut(b)),
                    }
                }
            }
        }
    }

    fn write(&self, port: u16, data: &[u8]) {
        match (port, &self.reset_control, data) {
            (0xcf8, _, &[a, b, c, d]) => {
                let v = u32::from_le_bytes([a, b, c, d]);
                self.address.store(v & ADDRESS_BITS, Ordering::Relaxed);
            }
            (0xcf9, Some(r), [first, ..]) => r.write(port, &[*first]),
            (0xcfc..=0xcff, _, _) => {
                if let Some((bdf, at)) = self.target(port) {
                    self.bus.config_write(bdf, at, data);
                }
            }
            // Narrow writes to the address register are I/O cycles of no one; only what spills over counts.
            (0xcf8..=0xcfb, _, _) => {
                if let Some(over) = data.get(usize::from(0xcfc - port)..).filter(|o| !o.is_empty()) {
                    self.write(0xcfc, over);
                }
            }
            _ => {}
        }
    }
}

/// The memory-mapped window: 4 KiB per function, 1 MiB per bus.
pub struct Ecam {
    bus: Weak<PciBus>,
}

impl Ecam {
    /// A window onto `bus`.
    pub fn new(bus: &Arc<PciBus>) -> Ecam {
        Ecam { bus: Arc::downgrade(bus) }
    }
}

fn split(offset: u64) -> (Bdf, u16) {
    (Bdf::from_id((offset >> 12) as u16), offset as u16 & 0xfff)
}

impl Mmio for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let (bdf, at) = split(offset);
        match self.bus.upgrade() {
            Some(bus) => bus.config_read(bdf, at, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (bdf, at) = split(offset);
        if let Some(bus) = self.bus.upgrade() {
            bus.config_write(bdf, at, data);
        }
    }
}
