//! Virtio over PCI, modern interface (virtio 1.3 section 4.1).
//!
//! BAR 4 holds the four structures, a page each: common configuration, ISR, device configuration, doorbells. BAR 1
//! holds the MSI-X table. Doorbells lie [`NOTIFY_MULTIPLIER`] bytes apart and take no lock that is common to two
//! queues.

mod bells;
#[cfg(test)]
mod bells_tests;
mod common;
mod interrupt;
#[cfg(test)]
mod tests;

use crate::{Core, CoreState, VirtioDevice};
use bells::Bells;
use common::Vectors;
use interrupt::PciInterrupt;
use ringfort_bus::{DoorbellSink, Format, IrqLine, MsiSink, NoDoorbells, Section, StateError, lock};
use ringfort_devices::pci::{
    BarKind, BarWindow, CAP_ID_VENDOR, ConfigSpace, Identity, MsixLayout, MsixState, PciConfig,
    PciConfigState, PciError, PciFunction, PcieKind,
};
use ringfort_memory::RamMap;
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::{Arc, Mutex};

/// Virtio's vendor ID.
const VENDOR: u16 = 0x1af4;
/// PCI device ID of device type 0 (virtio 1.3 section 4.1.2.1).
const DEVICE_BASE: u16 = 0x1040;
/// Subsystem ID of modern devices; any from 0x40 on does.
const SUBSYSTEM: u16 = 0x1100;

const BAR: u8 = 4;
const BAR_LEN: u64 = 0x4000;
const COMMON_AT: u64 = 0;
const COMMON_LEN: u64 = 64;
const ISR_AT: u64 = 0x1000;
const DEVICE_AT: u64 = 0x2000;
const NOTIFY_AT: u64 = 0x3000;
const PAGE: u64 = 0x1000;
const MSIX_BAR: u8 = 1;
const MSIX_BAR_LEN: u64 = 0x1000;
const MSIX_PBA_AT: u32 = 0x800;

/// Bytes between the doorbells of two queues.
pub const NOTIFY_MULTIPLIER: u32 = 4;
/// Most queues of a device: what the doorbell page and the MSI-X page have room for.
pub const MAX_QUEUES: usize = 64;

// Capability types (virtio 1.3 section 4.1.4).
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

/// Version of the saved state's layout.
const STATE_VERSION: u32 = 1;

/// Why a device cannot be put on PCI.
#[derive(Debug, thiserror::Error)]
pub enum VirtioPciError {
    /// The function cannot be described.
    #[error("{kind}: {source}")]
    Pci {
        /// Device.
        kind: &'static str,
        /// What is wrong.
        source: PciError,
    },
    /// Too many queues.
    #[error("{kind}: {queues} queues are too many; the most is {MAX_QUEUES}")]
    Queues {
        /// Device.
        kind: &'static str,
        /// Wanted.
        queues: usize,
    },
    /// The host gives no event descriptor.
    #[error("{kind}: cannot make an event descriptor: {source}; raise the limit on open files")]
    Event {
        /// Device.
        kind: &'static str,
        /// The host's words.
        source: io::Error,
    },
}

#[derive(Serialize, Deserialize)]
struct Saved {
    config: PciConfigState,
    vectors: Vectors,
    isr: u8,
    core: CoreState,
}

/// How the state of each device of this crate is laid out when it is a PCI function.
pub const FORMATS: [Format; 5] = [
    Format::of::<Saved>("virtio-balloon", STATE_VERSION),
    Format::of::<Saved>("virtio-blk", STATE_VERSION),
    Format::of::<Saved>("virtio-console", STATE_VERSION),
    Format::of::<Saved>("virtio-net", STATE_VERSION),
    Format::of::<Saved>("virtio-rng", STATE_VERSION),
];

/// A virtio device as a PCI function.
pub struct VirtioPci {
    kind: &'static str,
    /// Before the rest: it lets go of the queues' descriptors.
    bells: Bells,
    core: Core,
    config: Arc<PciConfig>,
    msix: Arc<MsixState>,
    irq: Arc<PciInterrupt>,
    /// Offset of the PCI configuration access capability.
    window_cap: u16,
    /// Accesses through that capability, one at a time.
    window: Mutex<()>,
}

impl VirtioPci {
    /// Put `device` on PCI. MSI goes to `msi`; `line` is the INTx line of its place.
    ///
    /// # Errors
    /// [`VirtioPciError`].
    pub fn new(
        device: Arc<dyn VirtioDevice>,
        ram: Arc<RamMap>,
        msi: Arc<dyn MsiSink>,
        line: Arc<dyn IrqLine>,
    ) -> Result<VirtioPci, VirtioPciError> {
        let kind = device.kind();
        let queues = device.queue_sizes().len();
        if queues > MAX_QUEUES {
            return Err(VirtioPciError::Queues { kind, queues });
        }
        let fail = |source| VirtioPciError::Pci { kind, source };
        let (space, msix, window_cap) = describe(&*device, queues, msi).map_err(fail)?;
        let config = Arc::new(PciConfig::new(space, Some(msix.clone()), line));
        let irq = Arc::new(PciInterrupt::new(config.clone(), msix.clone(), queues));
        let core =
            Core::new(device, ram, irq.clone()).map_err(|source| VirtioPciError::Event { kind, source })?;
        core.set_dma(false);
        let bells = Bells::new(Arc::new(NoDoorbells));
        Ok(VirtioPci { kind, bells, core, config, msix, irq, window_cap, window: Mutex::new(()) })
    }

    /// Have doorbells connected to the I/O threads by `sink`, while the driver uses the device. Before it is put on a bus.
    #[must_use]
    pub fn with_doorbells(self, sink: Arc<dyn DoorbellSink>) -> VirtioPci {
        VirtioPci { bells: Bells::new(sink), ..self }
    }

    /// The device behind the transport: pause, resume, doorbell descriptors.
    pub fn core(&self) -> &Core {
        &self.core
    }

    /// Where a queue's doorbell is: BAR, and offset in it.
    pub fn doorbell(queue: u16) -> (u8, u64) {
        (BAR, NOTIFY_AT + u64::from(queue) * u64::from(NOTIFY_MULTIPLIER))
    }

    fn reset_device(&self) {
        self.core.reset();
        self.irq.reset();
        self.bells.follow(&self.core);
    }

    /// The guest reaches a BAR through configuration space (virtio 1.3 section 4.1.4.9). Gives the access if it is
    /// one that a BAR access could be.
    fn window_access(&self) -> Option<(u64, usize)> {
        let cap = self.window_cap;
        let (bar, offset, len) =
            self.config.with(|s| (s.u8(cap + 4), u64::from(s.u32(cap + 8)), s.u32(cap + 12)));
        let len = [1usize, 2, 4].into_iter().find(|&l| l == len as usize)?;
        (bar == BAR && offset.is_multiple_of(len as u64) && offset + len as u64 <= BAR_LEN)
            .then_some((offset, len))
    }

    /// Whether a configuration access touches the window's data.
    fn touches_window(&self, offset: u16, len: usize) -> bool {
        let data = self.window_cap + 16;
        offset < data + 4 && usize::from(offset) + len > usize::from(data)
    }
}

fn describe(
    device: &dyn VirtioDevice,
    queues: usize,
    msi: Arc<dyn MsiSink>,
) -> Result<(ConfigSpace, Arc<MsixState>, u16), PciError> {
    let mut space = ConfigSpace::new(&Identity {
        vendor: VENDOR,
        device: DEVICE_BASE + device.device_type(),
        revision: 1,
        class: device.pci_class(),
        subsystem_vendor: VENDOR,
        subsystem: SUBSYSTEM,
    });
    space.add_bar(MSIX_BAR, BarKind::Mem32 { prefetchable: false }, MSIX_BAR_LEN)?;
    space.add_bar(BAR, BarKind::Mem64 { prefetchable: true }, BAR_LEN)?;
    let layout =
        MsixLayout { table_bar: MSIX_BAR, table_offset: 0, pba_bar: MSIX_BAR, pba_offset: MSIX_PBA_AT };
    let msix = Arc::new(MsixState::new(queues as u16 + 1, layout, msi)?);
    space.add_pcie(PcieKind::RootComplexEndpoint)?;
    space.add_msix(&msix)?;
    let capability = |kind: u8, at: u64, len: u64| {
        // Length, type, BAR, id and padding, offset, length (virtio 1.3 section 4.1.4).
        let mut body = vec![16, kind, BAR, 0, 0, 0];
        body.extend_from_slice(&(at as u32).to_le_bytes());
        body.extend_from_slice(&(len as u32).to_le_bytes());
        body
    };
    space.add_capability(CAP_ID_VENDOR, &capability(CFG_COMMON, COMMON_AT, COMMON_LEN), &[])?;
    space.add_capability(CAP_ID_VENDOR, &capability(CFG_ISR, ISR_AT, 1), &[])?;
    space.add_capability(CAP_ID_VENDOR, &capability(CFG_DEVICE, DEVICE_AT, PAGE), &[])?;
    let mut notify = capability(CFG_NOTIFY, NOTIFY_AT, (queues.max(1) as u64) * u64::from(NOTIFY_MULTIPLIER));
    notify[0] = 20;
    notify.extend_from_slice(&NOTIFY_MULTIPLIER.to_le_bytes());
    space.add_capability(CAP_ID_VENDOR, &notify, &[])?;
    let mut window = capability(CFG_PCI, 0, 0);
    window[0] = 20;
    window[2] = 0;
    window.extend_from_slice(&[0; 4]);
    // Writable: BAR, offset, length, data.
    let mut mask = [0xff; 18];
    mask[..2].fill(0);
    mask[3..6].fill(0);
    let window_cap = space.add_capability(CAP_ID_VENDOR, &window, &mask)?;
    space.set_interrupt_pin(1);
    Ok((space, msix, window_cap))
}

impl PciFunction for VirtioPci {
    fn kind(&self) -> &'static str {
        self.kind
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) {
        if self.touches_window(offset, data.len()) {
            let _one = lock(&self.window);
            if let Some((at, len)) = self.window_access() {
                let mut value = [0; 4];
                self.bar_read(BAR, at, &mut value[..len]);
                let cap = self.window_cap;
                self.config.with(|s| s.set_u32(cap + 16, u32::from_le_bytes(value)));
            }
        }
        self.config.read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let events = self.config.write(offset, data);
        if events.function_reset {
            self.reset_device();
        }
        self.core.set_dma(events.bus_master);
        if self.touches_window(offset, data.len()) {
            let _one = lock(&self.window);
            if let Some((at, len)) = self.window_access() {
                let cap = self.window_cap;
                let value = self.config.with(|s| s.u32(cap + 16)).to_le_bytes();
                self.bar_write(BAR, at, &value[..len]);
            }
        }
    }

    fn windows(&self) -> [Option<BarWindow>; 7] {
        self.config.windows()
    }

    fn bars(&self) -> [Option<(BarKind, u64)>; 7] {
        self.config.bars()
    }

    fn mapped(&self, bar: u8, base: Option<u64>) {
        if bar == BAR {
            self.bells.moved(base, &self.core);
        }
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        if self.msix.bar_read(bar, offset, data) {
            return;
        }
        data.fill(0);
        if bar != BAR {
            return;
        }
        match offset & !(PAGE - 1) {
            COMMON_AT => self.common_read(offset, data),
            ISR_AT if offset == ISR_AT && !data.is_empty() => data[0] = self.irq.take_isr(),
            DEVICE_AT => self.core.read_config(offset - DEVICE_AT, data),
            _ => {}
        }
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        if bar == BAR && offset >= NOTIFY_AT {
            // Where it is written says which queue; the value repeats that (virtio 1.3 section 4.1.5.2).
            let queue = (offset - NOTIFY_AT) / u64::from(NOTIFY_MULTIPLIER);
            return self.core.notify(queue as u16);
        }
        if self.msix.bar_write(bar, offset, data) || bar != BAR {
            return;
        }
        match offset & !(PAGE - 1) {
            COMMON_AT => self.common_write(offset, data),
            DEVICE_AT => self.core.write_config(offset - DEVICE_AT, data),
            _ => {}
        }
    }

    fn reset(&self) {
        self.reset_device();
        self.config.reset();
        self.core.set_dma(false);
    }

    fn save(&self) -> Section {
        let (vectors, isr) = self.irq.save();
        let saved = Saved { config: self.config.save(), vectors, isr, core: self.core.save() };
        Section::new(self.kind, 0, STATE_VERSION, &saved)
    }

    fn load(&self, section: &Section) -> Result<(), StateError> {
        let saved: Saved = section.decode(self.kind, STATE_VERSION)?;
        if !self.irq.fits(&saved.vectors) {
            return Err(section.invalid("another number of queues"));
        }
        self.core.check(&saved.core).map_err(|e| section.invalid(e))?;
        let old = self.config.save();
        self.config.load(&saved.config).map_err(|e| section.invalid(e))?;
        if let Err(e) = self.core.load(&saved.core) {
            // What was there before fits by nature.
            let _ = self.config.load(&old);
            return Err(section.invalid(e));
        }
        self.irq.load(&saved.vectors, saved.isr);
        self.core.set_dma(self.config.bus_master());
        self.bells.follow(&self.core);
        Ok(())
    }
}
