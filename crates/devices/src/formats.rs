//! The layouts of the devices' saved states, for whoever looks into them.

use crate::pci::{ConfigPorts, HostBridge, Lpc};
use crate::{
    acpi_pm, debug_exit, debugcon, e1000e, fw_cfg, hpet, i8042, ioapic, pic, pit, pvpanic, rtc, serial,
    system_port,
};
use ringfort_bus::Format;

/// One for each kind of device in this crate.
pub const FORMATS: [Format; 19] = [
    acpi_pm::FORMAT,
    acpi_pm::RESET_FORMAT,
    debug_exit::FORMAT,
    debugcon::FORMAT,
    e1000e::FORMAT,
    fw_cfg::FORMAT,
    hpet::FORMAT,
    i8042::FORMAT,
    ioapic::FORMAT,
    pic::FORMAT,
    pit::FORMAT,
    pvpanic::FORMAT,
    rtc::FORMAT,
    serial::FORMAT,
    system_port::FORMAT,
    system_port::PAGES_FORMAT,
    ConfigPorts::FORMAT,
    HostBridge::FORMAT,
    Lpc::FORMAT,
];
