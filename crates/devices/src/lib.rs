//! Device models of the PC that are not virtio: interrupt controllers, timers, serial ports, the keyboard
//! controller, ACPI power management, PCI.
//!
//! Every device is a plain struct that knows its registers and nothing of the host. Time, interrupts and byte
//! streams come in as the traits of `ringfort-bus`, so each is tested against its data sheet without a machine.
//! One device lies in one folder: model, state and tests.
//!
//! # Loading a saved machine
//! Continue the machine's clock where it stood, then load the devices, and the interrupt controllers ([`pic`],
//! [`ioapic`]) last: devices drive their lines while they load, and what that latched is then replaced by what was
//! latched when the state was saved.
#![forbid(unsafe_code)]

pub mod acpi_pm;
mod alarm;
pub mod debug_exit;
pub mod debugcon;
pub mod e1000e;
mod formats;
pub mod fw_cfg;
pub mod hpet;
pub mod i8042;
pub mod ioapic;
pub mod line;
pub mod pci;
pub mod pic;
pub mod pit;
mod ports;
pub mod power;
pub mod pvpanic;
pub mod rtc;
pub mod serial;
pub mod system_port;
#[cfg(test)]
mod testing;

pub use formats::FORMATS;
