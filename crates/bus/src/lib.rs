//! What a device is, and the buses it sits on.
//!
//! A device is a plain struct that knows its registers and nothing of the host: time, interrupts, byte streams
//! and messages come in as traits. It implements [`Device`] and, as far as it has them, the capabilities
//! [`PioDevice`], [`MmioDevice`] and [`TimerDevice`]. The machine wraps it in a mutex (`Arc<Mutex<T>>` is itself
//! a port or MMIO target) and puts it on a bus. A device whose registers must not share one lock (a virtio doorbell)
//! implements [`PortIo`] or [`Mmio`] itself.
#![forbid(unsafe_code)]

mod address;
mod doorbell;
mod irq;
pub mod irqchip;
mod time;

pub use address::{Bus, BusError, MmioBus, PioBus};
pub use doorbell::{DoorbellSink, NoDoorbells};
pub use irq::{IrqLine, MsiChannel, MsiMessage, MsiSink, NoIrq};
pub use ringfort_state::{Format, Section, StateError};
pub use time::{Clock, FakeClock, ManualTimer, Timer, TimerDevice};

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What every device can do.
pub trait Device: Send {
    /// Model name, also the kind of its state section, for instance `"serial16550"`.
    fn kind(&self) -> &'static str;

    /// Which one of several of this kind.
    fn instance(&self) -> u32 {
        0
    }

    /// Return to the state after power-on reset. Connections to the host stay.
    fn reset(&mut self);

    /// The whole guest-visible and internal state, as one section.
    fn save(&self) -> Section;

    /// Take over a saved state.
    ///
    /// # Errors
    /// When the section is of another kind, too new, or holds what this device cannot be; then nothing has changed.
    fn load(&mut self, section: &Section) -> Result<(), StateError>;
}

/// Registers in I/O port space. `data` is 1, 2 or 4 bytes, little endian.
pub trait PioDevice: Send {
    /// The guest reads `data.len()` bytes at `port` (absolute). Fill all of `data`; all ones where nothing answers.
    fn pio_read(&mut self, port: u16, data: &mut [u8]);
    /// The guest writes `data` at `port` (absolute).
    fn pio_write(&mut self, port: u16, data: &[u8]);
}

/// Registers in memory space. `data` is 1 to 8 bytes (larger accesses are split by the engine), little endian.
pub trait MmioDevice: Send {
    /// The guest reads `data.len()` bytes at `offset` from the start of the mapped range.
    fn mmio_read(&mut self, offset: u64, data: &mut [u8]);
    /// The guest writes `data` at `offset` from the start of the mapped range.
    fn mmio_write(&mut self, offset: u64, data: &[u8]);
}

/// A target on a port bus; shared between vCPUs.
pub trait PortIo: Send + Sync {
    /// See [`PioDevice::pio_read`].
    fn read(&self, port: u16, data: &mut [u8]);
    /// See [`PioDevice::pio_write`].
    fn write(&self, port: u16, data: &[u8]);
}

/// A target on a memory bus; shared between vCPUs.
pub trait Mmio: Send + Sync {
    /// See [`MmioDevice::mmio_read`].
    fn read(&self, offset: u64, data: &mut [u8]);
    /// See [`MmioDevice::mmio_write`].
    fn write(&self, offset: u64, data: &[u8]);
}

/// Lock a device. A thread that panicked with the lock held leaves a usable device behind (registers are plain
/// values), so poisoning is not an error.
pub fn lock<T: ?Sized>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<T: PioDevice + ?Sized> PortIo for Mutex<T> {
    fn read(&self, port: u16, data: &mut [u8]) {
        lock(self).pio_read(port, data);
    }
    fn write(&self, port: u16, data: &[u8]) {
        lock(self).pio_write(port, data);
    }
}

impl<T: MmioDevice + ?Sized> Mmio for Mutex<T> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        lock(self).mmio_read(offset, data);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        lock(self).mmio_write(offset, data);
    }
}

/// A device shared between its buses, its timers and its back end.
pub type Shared<T> = Arc<Mutex<T>>;

/// Wrap a device for sharing.
pub fn shared<T>(device: T) -> Shared<T> {
    Arc::new(Mutex::new(device))
}
