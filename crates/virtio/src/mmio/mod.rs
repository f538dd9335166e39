//! Virtio over MMIO, version 2 (virtio 1.3 section 4.2).

#[cfg(test)]
mod tests;

use crate::transport::RingArea;
use crate::{Core, CoreState, Interrupt, VirtioDevice};
use ringfort_bus::{IrqLine, Mmio, Section, StateError, lock};
use ringfort_memory::RamMap;
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::{Arc, Mutex};

/// Bytes of a device's register window.
pub const WINDOW_LEN: u64 = 0x200;

const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "RFRT".
const VENDOR: u32 = 0x5452_4652;
const STATE_VERSION: u32 = 1;

const ISR_QUEUE: u32 = 1;
const ISR_CONFIG: u32 = 2;

// Register offsets (table 4.1 of section 4.2.2).
const MAGIC_VALUE: u64 = 0x000;
const DEVICE_VERSION: u64 = 0x004;
const DEVICE_ID: u64 = 0x008;
const VENDOR_ID: u64 = 0x00c;
const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SEL: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SEL: u64 = 0x024;
const QUEUE_SEL: u64 = 0x030;
const QUEUE_SIZE_MAX: u64 = 0x034;
const QUEUE_SIZE: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
const QUEUE_NOTIFY: u64 = 0x050;
const INTERRUPT_STATUS: u64 = 0x060;
const INTERRUPT_ACK: u64 = 0x064;
const STATUS: u64 = 0x070;
const QUEUE_DESC_LOW: u64 = 0x080;
const QUEUE_DESC_HIGH: u64 = 0x084;
const QUEUE_DRIVER_LOW: u64 = 0x090;
const QUEUE_DRIVER_HIGH: u64 = 0x094;
const QUEUE_DEVICE_LOW: u64 = 0x0a0;
const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
const SHM_LEN_LOW: u64 = 0x0b0;
const SHM_BASE_HIGH: u64 = 0x0bc;
const CONFIG_GENERATION: u64 = 0x0fc;
const CONFIG: u64 = 0x100;

/// The interrupt status register and the line.
struct MmioInterrupt {
    line: Arc<dyn IrqLine>,
    status: Mutex<u32>,
}

impl MmioInterrupt {
    fn change(&self, f: impl FnOnce(&mut u32)) {
        let mut s = lock(&self.status);
        f(&mut s);
        // Under the lock, so that levels cannot overtake each other.
        self.line.set(*s != 0);
    }
}

impl Interrupt for MmioInterrupt {
    fn queue(&self, _index: u16) {
        self.change(|s| *s |= ISR_QUEUE);
    }
    fn config(&self) {
        self.change(|s| *s |= ISR_CONFIG);
    }
}

#[derive(Serialize, Deserialize)]
struct Saved {
    interrupt: u32,
    core: CoreState,
}

/// A virtio device as a window of registers.
pub struct VirtioMmio {
    core: Core,
    irq: Arc<MmioInterrupt>,
}

impl VirtioMmio {
    /// Put `device` behind registers; `line` is level-triggered.
    ///
    /// # Errors
    /// When the host gives no event descriptor.
    pub fn new(
        device: Arc<dyn VirtioDevice>,
        ram: Arc<RamMap>,
        line: Arc<dyn IrqLine>,
    ) -> io::Result<VirtioMmio> {
        let irq = Arc::new(MmioInterrupt { line, status: Mutex::new(0) });
        Ok(VirtioMmio { core: Core::new(device, ram, irq.clone())?, irq })
    }

    /// The device behind the transport: pause, resume, doorbell descriptors.
    pub fn core(&self) -> &Core {
        &self.core
    }

    /// The state after power-on.
    pub fn reset(&self) {
        self.core.reset();
        self.irq.change(|s| *s = 0);
    }

    /// The whole state; the device must be paused.
    pub fn save(&self) -> Section {
        let saved = Saved { interrupt: *lock(&self.irq.status), core: self.core.save() };
        Section::new(self.core.device().kind(), 0, STATE_VERSION, &saved)
    }

    /// Take over a saved state; the device is paused afterwards.
    ///
    /// # Errors
    /// When the state is another device's, too new or impossible; then nothing has changed.
    pub fn load(&self, section: &Section) -> Result<(), StateError> {
        let saved: Saved = section.decode(self.core.device().kind(), STATE_VERSION)?;
        self.core.load(&saved.core).map_err(|e| section.invalid(e))?;
        self.irq.change(|s| *s = saved.interrupt & (ISR_QUEUE | ISR_CONFIG));
        Ok(())
    }

    fn register(&self, offset: u64) -> u32 {
        let c = &self.core;
        match offset {
            MAGIC_VALUE => MAGIC,
            DEVICE_VERSION => VERSION,
            DEVICE_ID => c.device().device_type().into(),
            VENDOR_ID => VENDOR,
            DEVICE_FEATURES => c.device_features(),
            QUEUE_SIZE_MAX => c.queue_limit().into(),
            QUEUE_READY => c.queue_enabled().into(),
            INTERRUPT_STATUS => *lock(&self.irq.status),
            STATUS => c.status().into(),
            // No shared memory regions: length and base are all ones.
            SHM_LEN_LOW..=SHM_BASE_HIGH => u32::MAX,
            CONFIG_GENERATION => c.generation(),
            _ => 0,
        }
    }

    fn set_register(&self, offset: u64, value: u32) {
        let c = &self.core;
        let low = |area| c.set_queue_area(area, value.into(), 0xffff_ffff);
        let high = |area| c.set_queue_area(area, u64::from(value) << 32, 0xffff_ffff << 32);
        match offset {
            DEVICE_FEATURES_SEL => c.set_device_select(value),
            DRIVER_FEATURES => c.set_driver_features(value),
            DRIVER_FEATURES_SEL => c.set_driver_select(value),
            QUEUE_SEL => c.set_queue_select(u16::try_from(value).unwrap_or(u16::MAX)),
            QUEUE_SIZE => c.set_queue_size(u16::try_from(value).unwrap_or(0)),
            QUEUE_READY if value == 1 => c.set_queue_enabled(),
            QUEUE_READY if value == 0 => c.set_queue_disabled(),
            QUEUE_NOTIFY => c.notify(value as u16),
            INTERRUPT_ACK => self.irq.change(|s| *s &= !value),
            STATUS if value as u8 == 0 => self.reset(),
            STATUS => c.write_status(value as u8),
            QUEUE_DESC_LOW => low(RingArea::Desc),
            QUEUE_DESC_HIGH => high(RingArea::Desc),
            QUEUE_DRIVER_LOW => low(RingArea::Avail),
            QUEUE_DRIVER_HIGH => high(RingArea::Avail),
            QUEUE_DEVICE_LOW => low(RingArea::Used),
            QUEUE_DEVICE_HIGH => high(RingArea::Used),
            _ => {}
        }
    }
}

impl Mmio for VirtioMmio {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= CONFIG {
            self.core.read_config(offset - CONFIG, data);
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            data.copy_from_slice(&self.register(offset).to_le_bytes());
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset >= CONFIG {
            self.core.write_config(offset - CONFIG, data);
        } else if let &[a, b, c, d] = data
            && offset.is_multiple_of(4)
        {
            self.set_register(offset, u32::from_le_bytes([a, b, c, d]));
        }
    }
}
