//! PCI: configuration space, BARs, capabilities, MSI-X, INTx, the bus that maps BARs, and both ways to reach
//! configuration space (PCI Local Bus 3.0, PCI Express Base 3.0 chapter 7).
//!
//! # How a device becomes a PCI function
//! 1. Describe its configuration space: [`ConfigSpace::new`] with an [`Identity`], then
//!    [`ConfigSpace::add_bar`], [`ConfigSpace::add_pcie`], [`ConfigSpace::add_msix`],
//!    [`ConfigSpace::add_capability`] (id, body and per-bit write mask), [`ConfigSpace::set_interrupt_pin`].
//! 2. Wrap it: [`PciConfig::new`] takes the space, the [`MsixState`] if it has one, and the INTx line. From then
//!    on it does all the standard work behind `&self`: write masks, BAR sizing, command and status bits, MSI-X
//!    enable and mask, interrupt disable, function-level reset, save and load.
//! 3. Implement [`PciFunction`] (all `&self`): `config_read`/`config_write` hand over to [`PciConfig::read`] and
//!    [`PciConfig::write`]; `windows` is [`PciConfig::windows`]; `bar_read`/`bar_write` ask
//!    [`MsixState::bar_read`]/[`MsixState::bar_write`] first (true means it was the table's or the PBA's) and
//!    then do the device's own registers. BAR accesses take no lock here: a doorbell goes straight to the function.
//! 4. Interrupts: [`MsixState::notify`] for a vector when [`MsixState::is_enabled`], else
//!    [`PciConfig::set_intx`].
//! 5. [`PciBus::add`] puts it at a [`Bdf`]; the bus maps its BARs into the machine's `MmioBus` and `PioBus` as the
//!    guest programs them and keeps that up after every write to the command register or a BAR.
//!
//! ```
//! use ringfort_bus::{MmioBus, MsiMessage, MsiSink, NoIrq, PioBus};
//! use ringfort_devices::pci::*;
//! use std::sync::Arc;
//! struct NoMsi;
//! impl MsiSink for NoMsi { fn send(&self, _: MsiMessage) {} }
//!
//! let mut space = ConfigSpace::new(&Identity {
//!     vendor: 0x1af4, device: 0x1042, revision: 1, class: 0x01_00_00,
//!     subsystem_vendor: 0x1af4, subsystem: 0x1100,
//! });
//! space.add_bar(4, BarKind::Mem64 { prefetchable: true }, 0x4000)?;
//! let layout = MsixLayout { table_bar: 4, table_offset: 0x3000, pba_bar: 4, pba_offset: 0x3800 };
//! let msix = Arc::new(MsixState::new(3, layout, Arc::new(NoMsi))?);
//! space.add_msix(&msix)?;
//! space.set_interrupt_pin(1);
//! let config = PciConfig::new(space, Some(msix.clone()), Arc::new(NoIrq));
//! # Ok::<(), PciError>(())
//! ```
//!
//! # Locks
//! Order: bus mapping lock, then a function's configuration lock, then its MSI-X lock, then whatever the interrupt
//! line or [`MsiSink`](ringfort_bus::MsiSink) takes. A function must not call its [`PciBus`] while it holds its own locks.
//!
//! # Interrupt lines
//! [`WiredOr`] joins several functions onto one line; [`swizzle`] says which of INTA..INTD of the bus a pin of a
//! device is; [`Lpc::pirq`] gives the 8259 input that the guest routed a PIRQ to.

mod access;
mod assign;
mod bus;
mod common;
mod config;
mod host;
mod intx;
mod lpc;
mod msix;
#[cfg(test)]
mod tests;

pub use access::{ConfigPorts, Ecam};
pub use assign::{Window, Windows};
pub use bus::PciBus;
pub use common::{ConfigEvents, PciConfig, PciConfigState};
pub use config::{
    BarKind, BarSpace, BarWindow, CAP_ID_MSI, CAP_ID_MSIX, CAP_ID_PCIE, CAP_ID_PM, CAP_ID_VENDOR,
    CONFIG_SIZE, ConfigSpace, Identity, PcieKind, ROM_BAR, command, reg, status,
};
pub use host::HostBridge;
pub use intx::{WiredOr, swizzle};
pub use lpc::{Lpc, LpcListener};
pub use msix::{MsixLayout, MsixSaved, MsixState};

use ringfort_bus::{Section, StateError};

/// A function's place: bus, device, function.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Bdf {
    /// Bus number.
    pub bus: u8,
    /// Device number, 0 to 31.
    pub device: u8,
    /// Function number, 0 to 7.
    pub function: u8,
}

impl Bdf {
    /// A place; device and function are cut to their 5 and 3 bits.
    pub const fn new(bus: u8, device: u8, function: u8) -> Bdf {
        Bdf { bus, device: device & 31, function: function & 7 }
    }

    /// The requester ID: bus in bits 15:8, device in 7:3, function in 2:0.
    pub const fn id(self) -> u16 {
        (self.bus as u16) << 8 | (self.device as u16) << 3 | self.function as u16
    }

    /// The place that a requester ID names.
    pub const fn from_id(id: u16) -> Bdf {
        Bdf::new((id >> 8) as u8, (id >> 3) as u8, id as u8)
    }
}

impl std::fmt::Display for Bdf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:02x}:{:02x}.{}", self.bus, self.device, self.function)
    }
}

/// Why a function cannot be described or placed as asked.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PciError {
    /// Two functions want one place.
    #[error("PCI {0} is taken; choose another slot")]
    Taken(Bdf),
    /// A BAR's size is no power of two, below the minimum, or its number is used.
    #[error("PCI BAR {index} of {size:#x} bytes: {reason}")]
    Bar {
        /// BAR number.
        index: u8,
        /// Size in bytes.
        size: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// The capability does not fit in what is left of configuration space.
    #[error("PCI capability {id:#04x} of {len} bytes does not fit in configuration space")]
    NoRoom {
        /// Capability ID.
        id: u8,
        /// Length.
        len: usize,
    },
    /// The MSI-X layout is impossible.
    #[error("MSI-X with {vectors} vectors: {reason}")]
    Msix {
        /// Table size asked for.
        vectors: u16,
        /// What is wrong.
        reason: &'static str,
    },
    /// A BAR found no free address.
    #[error("PCI {bdf} BAR {bar}: no room for {size:#x} bytes in the machine's PCI windows")]
    NoAddress {
        /// Function.
        bdf: Bdf,
        /// BAR number.
        bar: u8,
        /// Size in bytes.
        size: u64,
    },
}

/// One PCI function. All methods take `&self`: the function chooses its own locks, so that accesses to different
/// parts of a BAR (doorbells of different queues) need not wait for each other.
pub trait PciFunction: Send + Sync {
    /// Model name, also the kind of its state section.
    fn kind(&self) -> &'static str;

    /// Read 1, 2 or 4 bytes of configuration space; the bus never lets an access cross a 4-byte boundary or the
    /// end at 4096.
    fn config_read(&self, offset: u16, data: &mut [u8]);

    /// Write 1, 2 or 4 bytes of configuration space, under the same guarantees. The bus calls
    /// [`PciFunction::windows`] afterwards when the command register or a BAR was touched.
    fn config_write(&self, offset: u16, data: &[u8]);

    /// Where each BAR (0 to 5, [`ROM_BAR`] for the expansion ROM) decodes now.
    fn windows(&self) -> [Option<BarWindow>; 7];

    /// A BAR in memory answers at `base` from now on, or nowhere (`None`). The bus's mapping lock is held.
    fn mapped(&self, bar: u8, base: Option<u64>) {
        let _ = (bar, base);
    }

    /// What each BAR is and how large, whether or not it decodes, for whoever assigns addresses.
    fn bars(&self) -> [Option<(BarKind, u64)>; 7];

    /// Read 1, 2, 4 or 8 bytes at `offset` of a BAR. The access lies within the BAR.
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]);

    /// Write 1, 2, 4 or 8 bytes at `offset` of a BAR. The access lies within the BAR.
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]);

    /// Return to the state after power-on.
    fn reset(&self);

    /// The whole state. The bus sets the section's instance to the requester ID.
    fn save(&self) -> Section;

    /// Take over a saved state; the bus maps BARs again afterwards.
    ///
    /// # Errors
    /// When the section is of another kind, too new or impossible; then nothing has changed.
    fn load(&self, section: &Section) -> Result<(), StateError>;
}
