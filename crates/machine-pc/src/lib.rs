//! The PC: its memory map, what firmware would leave in memory (ACPI, SMBIOS, boot protocols), and the wiring of
//! its devices.
#![forbid(unsafe_code)]

pub mod acpi;
pub mod boot;
mod bytes;
pub mod layout;
pub mod machine;
pub mod mptable;
pub mod smbios;

pub use machine::{Identity, Pc, PcConfig, PcError, SerialPort, Timers};
