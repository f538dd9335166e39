//! The memory map.
//!
//! ```text
//! 0                        RAM, up to 3 GiB
//!   0x0000_0500            boot data (GDT, start info, boot_params, page tables, command line), see boot
//!   0x0009_fc00..0xa0000   extended BIOS data area, holds the MP table
//!   0x000e_0000..0x10_0000 firmware area: RSDP, SMBIOS
//!   last 512 KiB below     ACPI tables
//! 0xc000_0000..0xe000_0000 PCI memory, 32 bit
//! 0xe000_0000..0xf000_0000 PCI configuration space (ECAM), 256 buses
//! 0xf000_0000..0xfec0_0000 PCI memory, 32 bit
//! 0xfec0_0000              I/O APIC
//! 0xfed0_0000              HPET
//! 0xfee0_0000              local APICs, and where MSIs are sent
//! 0x1_0000_0000            RAM beyond 3 GiB
//! above RAM                PCI memory, 64 bit, on a GiB boundary
//! ```

#[cfg(test)]
mod tests;

use ringfort_memory::{Backing, GuestMemory, MemoryError, PAGE_SIZE};

/// RAM below 4 GiB ends here at the latest.
pub const LOW_RAM_LIMIT: u64 = 0xc000_0000;
/// RAM beyond [`LOW_RAM_LIMIT`] begins here.
pub const HIGH_RAM_BASE: u64 = 1 << 32;
/// PCI configuration space in memory.
pub const ECAM_BASE: u64 = 0xe000_0000;
/// Its size: 256 buses.
pub const ECAM_SIZE: u64 = 256 << 20;
/// First PCI memory window below 4 GiB: base and bytes.
pub const PCI_MEM32: (u64, u64) = (0xc000_0000, 0x2000_0000);
/// Second PCI memory window below 4 GiB: base and bytes.
pub const PCI_MEM32_HIGH: (u64, u64) = (0xf000_0000, 0x0ec0_0000);
/// I/O APIC registers.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Bytes of the I/O APIC's range.
pub const IOAPIC_SIZE: u64 = 0x1000;
/// HPET registers.
pub const HPET_BASE: u64 = 0xfed0_0000;
/// Bytes of the HPET's range.
pub const HPET_SIZE: u64 = 0x400;
/// Local APIC registers.
pub const LAPIC_BASE: u64 = 0xfee0_0000;
/// PCI I/O ports for BARs: first port and count. Below lie the legacy devices and the ACPI registers.
pub const PCI_IO: (u64, u64) = (0xc000, 0x4000);
/// Base of the ACPI register block (PM1 event +0, PM1 control +4, PM timer +8, GPE0 +0x20).
pub const PM_BASE: u16 = 0x600;
/// Length of the ACPI register block.
pub const PM_SIZE: u16 = 0x80;
/// pvpanic.
pub const PVPANIC_PORT: u16 = 0x505;

/// Extended BIOS data area.
pub const EBDA_BASE: u64 = 0x9_fc00;
/// End of conventional memory.
pub const LOW_END: u64 = 0xa_0000;
/// Firmware area: the first byte of 128 KiB.
pub const FIRMWARE_BASE: u64 = 0xe_0000;
/// RSDP.
pub const RSDP_ADDRESS: u64 = 0xe_0000;
/// SMBIOS entry points and tables.
pub const SMBIOS_BASE: u64 = 0xf_0000;
/// One megabyte: extended memory begins.
pub const EXTENDED_BASE: u64 = 0x10_0000;
/// Bytes at the top of low RAM for ACPI tables.
pub const ACPI_SIZE: u64 = 512 << 10;
/// Least RAM.
pub const MIN_RAM: u64 = 4 << 20;

/// GSI of the SCI.
pub const SCI_IRQ: u8 = 9;
/// First of the GSIs (16 to 23) that PCI interrupt pins lead to.
pub const PCI_GSI_BASE: u32 = 16;

/// GSI that pin `pin` (1 for INTA to 4 for INTD) of a device on bus 0 leads to.
pub const fn pci_gsi(device: u8, pin: u8) -> u32 {
    // Eight inputs for 32 devices with four pins: neighbours do not share.
    PCI_GSI_BASE + ((device as u32) + (pin.wrapping_sub(1) & 3) as u32) % 8
}

/// Kinds of memory in an E820 map (ACPI 6.5 section 15).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum E820Kind {
    /// Usable.
    Ram = 1,
    /// Not to be used.
    Reserved = 2,
    /// ACPI tables; usable after they were read.
    Acpi = 3,
}

/// One range of an E820 map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct E820Entry {
    /// First byte.
    pub base: u64,
    /// Bytes.
    pub size: u64,
    /// What it is.
    pub kind: E820Kind,
}

/// Where things are in a machine with a given amount of RAM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    ram: u64,
    physical_bits: u32,
}

impl Layout {
    /// The layout for `ram` bytes. `physical_bits` is what the CPUs have (36 to 52): RAM and PCI must fit below.
    ///
    /// # Errors
    /// [`MemoryError::Layout`] when that is no whole number of pages, too little, or more than can be addressed.
    pub fn new(ram: u64, physical_bits: u32) -> Result<Layout, MemoryError> {
        if ram < MIN_RAM {
            return Err(MemoryError::Layout(format!("{ram} bytes of RAM are too few; give at least 4M")));
        }
        if !ram.is_multiple_of(PAGE_SIZE) {
            return Err(MemoryError::Layout(format!("{ram} bytes of RAM are no multiple of 4096")));
        }
        let layout = Layout { ram, physical_bits: physical_bits.clamp(36, 52) };
        let most = (1u64 << layout.physical_bits) - HIGH_RAM_BASE - (1 << 30) + LOW_RAM_LIMIT;
        if ram > most {
            return Err(MemoryError::Layout(format!(
                "{ram} bytes of RAM do not fit in {} physical address bits; give at most {} GiB",
                layout.physical_bits,
                most >> 30
            )));
        }
        Ok(layout)
    }

    /// Allocate the RAM.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn allocate(&self) -> Result<GuestMemory, MemoryError> {
        self.allocate_with(&Backing::default())
    }

    /// Allocate the RAM, made of what `backing` says.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn allocate_with(&self, backing: &Backing) -> Result<GuestMemory, MemoryError> {
        ringfort_memory::allocate_with(&self.ram_ranges(), backing)
    }

    /// RAM in bytes.
    pub fn ram(&self) -> u64 {
        self.ram
    }

    /// RAM ranges: base and bytes.
    pub fn ram_ranges(&self) -> Vec<(u64, u64)> {
        let low = self.low_ram_end();
        let mut ranges = vec![(0, low)];
        if self.ram > low {
            ranges.push((HIGH_RAM_BASE, self.ram - low));
        }
        ranges
    }

    /// End of RAM below 4 GiB.
    pub fn low_ram_end(&self) -> u64 {
        self.ram.min(LOW_RAM_LIMIT)
    }

    /// Where ACPI tables go: base and bytes.
    pub fn acpi(&self) -> (u64, u64) {
        (self.low_ram_end() - ACPI_SIZE, ACPI_SIZE)
    }

    /// End of low RAM that a boot loader may use.
    pub fn low_usable_end(&self) -> u64 {
        self.acpi().0
    }

    /// PCI memory window above RAM: base and bytes.
    pub fn pci_mem64(&self) -> (u64, u64) {
        let ram_end = HIGH_RAM_BASE + self.ram.saturating_sub(LOW_RAM_LIMIT);
        let base = ram_end.next_multiple_of(1 << 30);
        (base, ((1u64 << self.physical_bits) - base).min(256 << 30))
    }

    /// The E820 map.
    pub fn e820(&self) -> Vec<E820Entry> {
        let (acpi, acpi_size) = self.acpi();
        let e = |base, end: u64, kind| E820Entry { base, size: end - base, kind };
        let mut map = vec![
            e(0, EBDA_BASE, E820Kind::Ram),
            e(EBDA_BASE, LOW_END, E820Kind::Reserved),
            e(FIRMWARE_BASE, EXTENDED_BASE, E820Kind::Reserved),
            e(EXTENDED_BASE, acpi, E820Kind::Ram),
            e(acpi, acpi + acpi_size, E820Kind::Acpi),
            e(ECAM_BASE, ECAM_BASE + ECAM_SIZE, E820Kind::Reserved),
            e(IOAPIC_BASE, IOAPIC_BASE + IOAPIC_SIZE, E820Kind::Reserved),
            e(LAPIC_BASE, LAPIC_BASE + 0x1000, E820Kind::Reserved),
        ];
        if self.ram > LOW_RAM_LIMIT {
            map.push(e(HIGH_RAM_BASE, HIGH_RAM_BASE + self.ram - LOW_RAM_LIMIT, E820Kind::Ram));
        }
        map
    }
}
