//! ACPI tables (ACPI 6.5 chapter 5; PCI Firmware 3.3 section 4.1.2; IA-PC HPET 1.0a section 3.2.4).
//!
//! All tables lie in one block at the top of low RAM, which the E820 map gives as ACPI memory; only the RSDP is in the
//! firmware area, where a kernel that is not told its address finds it.

mod dsdt;
#[cfg(test)]
mod tests;

use crate::layout::{self, Layout};
use ringfort_memory::{Bytes, GuestAddress, GuestMemory};

const OEM_ID: &[u8; 6] = b"RNGFRT";
const OEM_TABLE_ID: &[u8; 8] = b"RNGFRTPC";
const CREATOR_ID: &[u8; 4] = b"RNGF";

/// Register block for [`AcpiConfig`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SmiCommand {
    /// Port.
    pub port: u16,
    /// Value that hands the hardware to ACPI.
    pub enable: u8,
    /// Value that takes it back.
    pub disable: u8,
}

/// What the tables describe.
#[derive(Debug, Clone)]
pub struct AcpiConfig<'a> {
    /// Memory map.
    pub layout: &'a Layout,
    /// APIC IDs of the vCPUs; the first is the boot processor.
    pub apic_ids: &'a [u32],
    /// Serial ports that exist: port base and IRQ.
    pub serial: &'a [(u16, u8)],
    /// Whether there is a HPET.
    pub hpet: bool,
    /// Whether there is an i8042 with keyboard and mouse.
    pub i8042: bool,
    /// Whether there is a pvpanic device.
    pub pvpanic: bool,
    /// SLP_TYP value of S5.
    pub s5_type: u8,
    /// How ACPI mode is switched on; `None` when it always is.
    pub smi_command: Option<SmiCommand>,
    /// Whether the PM timer counts 32 bits (24 otherwise).
    pub pm_timer_32: bool,
    /// IRQ of the 8259s that each PIRQ (A to H) leads to, for kernels without I/O APIC.
    pub pirq: [u8; 8],
}

/// The built tables.
#[derive(Debug, Clone)]
pub struct AcpiTables {
    /// Guest physical address of `block`.
    pub base: u64,
    /// All tables but the RSDP.
    pub block: Vec<u8>,
    /// The RSDP, to lie at [`layout::RSDP_ADDRESS`].
    pub rsdp: Vec<u8>,
    /// Signature, offset in `block` and length of each table.
    pub tables: Vec<([u8; 4], usize, usize)>,
}

/// Why tables cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// They are larger than their place.
    #[error("ACPI tables of {0} bytes are larger than their place of {1}; use fewer vCPUs")]
    TooLarge(usize, u64),
    /// More vCPUs than there are names for.
    #[error("ACPI tables: {0} vCPUs are too many; use at most 4096 (fewer vCPUs)")]
    TooMany(usize),
    /// RAM is not there.
    #[error("ACPI tables: guest memory: {0}")]
    Memory(String),
}

/// A table with its header, filled in.
struct Table(Vec<u8>);

impl Table {
    fn new(signature: &[u8; 4], revision: u8) -> Table {
        let mut t = Vec::with_capacity(256);
        t.extend(signature);
        t.extend([0; 4]);
        t.extend([revision, 0]);
        t.extend(OEM_ID);
        t.extend(OEM_TABLE_ID);
        t.extend(1u32.to_le_bytes());
        t.extend(CREATOR_ID);
        t.extend(1u32.to_le_bytes());
        Table(t)
    }
    fn u8(&mut self, v: u8) -> &mut Table {
        self.0.push(v);
        self
    }
    fn u16(&mut self, v: u16) -> &mut Table {
        self.0.extend(v.to_le_bytes());
        self
    }
    fn u32(&mut self, v: u32) -> &mut Table {
        self.0.extend(v.to_le_bytes());
        self
    }
    fn u64(&mut self, v: u64) -> &mut Table {
        self.0.extend(v.to_le_bytes());
        self
    }
    fn bytes(&mut self, v: &[u8]) -> &mut Table {
        self.0.extend(v);
        self
    }
    /// A generic address structure (section 5.2.3.2). Spaces: 0 memory, 1 I/O.
    fn gas(&mut self, space: u8, bits: u8, access: u8, address: u64) -> &mut Table {
        self.bytes(&[space, bits, 0, access]).u64(address)
    }
    fn finish(mut self) -> Vec<u8> {
        let len = self.0.len() as u32;
        self.0[4..8].copy_from_slice(&len.to_le_bytes());
        self.0[9] = checksum(&self.0);
        self.0
    }
}

/// What makes the bytes' sum zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |s, b| s.wrapping_add(*b)).wrapping_neg()
}

/// Make the tables.
///
/// # Errors
/// When they do not fit in their place.
pub fn build(config: &AcpiConfig<'_>) -> Result<AcpiTables, AcpiError> {
    if config.apic_ids.len() > 4096 {
        return Err(AcpiError::TooMany(config.apic_ids.len()));
    }
    let (base, room) = config.layout.acpi();
    let mut t = AcpiTables { base, block: Vec::new(), rsdp: Vec::new(), tables: Vec::new() };
    // FACS first: it wants 64-byte alignment, which the page-aligned base gives.
    let facs = t.add(facs());
    let dsdt = t.add(dsdt::build(config));
    let mut listed = vec![t.add(fadt(config, facs, dsdt)), t.add(madt(config)), t.add(mcfg())];
    if config.hpet {
        listed.push(t.add(hpet()));
    }
    listed.push(t.add(waet()));
    let mut rsdt = Table::new(b"RSDT", 1);
    let mut xsdt = Table::new(b"XSDT", 1);
    for &a in &listed {
        rsdt.u32(a as u32);
        xsdt.u64(a);
    }
    let rsdt = t.add(rsdt.finish());
    let xsdt = t.add(xsdt.finish());
    t.rsdp = rsdp(rsdt, xsdt);
    if t.block.len() as u64 > room {
        return Err(AcpiError::TooLarge(t.block.len(), room));
    }
    Ok(t)
}

impl AcpiTables {
    fn add(&mut self, table: Vec<u8>) -> u64 {
        let at = self.block.len().next_multiple_of(64);
        self.block.resize(at, 0);
        let mut signature = [0; 4];
        signature.copy_from_slice(&table[..4]);
        self.tables.push((signature, at, table.len()));
        self.block.extend(table);
        self.base + at as u64
    }

    /// Write the tables to RAM; gives the RSDP's address.
    ///
    /// # Errors
    /// When RAM is not where the layout says.
    pub fn install(&self, memory: &GuestMemory) -> Result<u64, AcpiError> {
        let fail = |e: vm_memory::GuestMemoryError| AcpiError::Memory(e.to_string());
        memory.write_slice(&self.block, GuestAddress(self.base)).map_err(fail)?;
        memory.write_slice(&self.rsdp, GuestAddress(layout::RSDP_ADDRESS)).map_err(fail)?;
        Ok(layout::RSDP_ADDRESS)
    }
}

fn rsdp(rsdt: u64, xsdt: u64) -> Vec<u8> {
    let mut r = b"RSD PTR \0".to_vec();
    r.extend(OEM_ID);
    r.push(2);
    r.extend((rsdt as u32).to_le_bytes());
    r[8] = checksum(&r);
    r.extend(36u32.to_le_bytes());
    r.extend(xsdt.to_le_bytes());
    r.push(0);
    r[32] = checksum(&r);
    r.extend([0; 3]);
    r
}

fn facs() -> Vec<u8> {
    let mut f = b"FACS".to_vec();
    f.extend(64u32.to_le_bytes());
    f.resize(64, 0);
    f[32] = 2;
    f
}

fn fadt(c: &AcpiConfig<'_>, facs: u64, dsdt: u64) -> Vec<u8> {
    let pm = u32::from(layout::PM_BASE);
    let (event, control, timer) = (pm, pm + 4, pm + 8);
    let smi = c.smi_command.unwrap_or(SmiCommand { port: 0, enable: 0, disable: 0 });
    // 8042 (when there), other legacy devices, no VGA.
    let arch = 1 | u16::from(c.i8042) << 1 | 1 << 2;
    // WBINVD works, C1 works, RTC wake status is not in the fixed registers, timer width, reset register, PM timer and HPET
    // are the platform's clocks. Power and sleep button flags stay 0: both are fixed-feature buttons.
    let flags: u32 = 1 | 1 << 2 | 1 << 6 | u32::from(c.pm_timer_32) << 8 | 1 << 10 | 1 << 15;
    let mut t = Table::new(b"FACP", 6);
    t.u32(facs as u32).u32(dsdt as u32).u8(0);
    // Desktop.
    t.u8(1).u16(layout::SCI_IRQ.into()).u32(smi.port.into());
    t.bytes(&[smi.enable, smi.disable, 0, 0]);
    t.u32(event).u32(0).u32(control).u32(0).u32(0).u32(timer).u32(0).u32(0);
    t.bytes(&[4, 2, 0, 4, 0, 0, 0, 0]);
    // C2 and C3 latencies that say "not there".
    t.u16(0x0fff).u16(0x0fff).u16(0).u16(0);
    // Duty cycle; day and month alarm absent; century in CMOS byte 0x32.
    t.bytes(&[0, 0, 0, 0, 0x32]).u16(arch).u8(0).u32(flags);
    // Reset control register.
    t.gas(1, 8, 1, 0xcf9).u8(0x0f).u16(0).u8(5);
    t.u64(0).u64(dsdt);
    t.gas(1, 32, 2, event.into()).gas(0, 0, 0, 0);
    t.gas(1, 16, 2, control.into()).gas(0, 0, 0, 0).gas(0, 0, 0, 0);
    t.gas(1, 32, 3, timer.into());
    for _ in 0..4 {
        t.gas(0, 0, 0, 0);
    }
    t.u64(0);
    t.finish()
}

fn madt(c: &AcpiConfig<'_>) -> Vec<u8> {
    let mut t = Table::new(b"APIC", 5);
    // 8259s are there as well.
    t.u32(layout::LAPIC_BASE as u32).u32(1);
    let small = |id: u32| id < 255;
    for (uid, &id) in (0u32..).zip(c.apic_ids) {
        if small(id) && uid < 255 {
            t.bytes(&[0, 8, uid as u8, id as u8]).u32(1);
        } else {
            t.bytes(&[9, 16, 0, 0]).u32(id).u32(1).u32(uid);
        }
    }
    t.bytes(&[1, 12, 0, 0]).u32(layout::IOAPIC_BASE as u32).u32(0);
    // The PIT is on input 2; the SCI is level-triggered, active high.
    t.bytes(&[2, 10, 0, 0]).u32(2).u16(0);
    t.bytes(&[2, 10, 0, layout::SCI_IRQ]).u32(layout::SCI_IRQ.into()).u16(0x000d);
    // NMI on LINT1 of all.
    t.bytes(&[4, 6, 0xff]).u16(0).u8(1);
    if !c.apic_ids.iter().all(|&id| small(id)) || c.apic_ids.len() >= 255 {
        t.bytes(&[10, 12]).u16(0).u32(u32::MAX).bytes(&[1, 0, 0, 0]);
    }
    t.finish()
}

fn mcfg() -> Vec<u8> {
    let mut t = Table::new(b"MCFG", 1);
    t.u64(0).u64(layout::ECAM_BASE).u16(0).bytes(&[0, 255]).u32(0);
    t.finish()
}

fn hpet() -> Vec<u8> {
    let mut t = Table::new(b"HPET", 1);
    // Revision 1, three 64-bit comparators, legacy replacement, vendor 8086.
    t.u32(0x8086_a201).gas(0, 64, 0, layout::HPET_BASE).u8(0).u16(100).u8(0);
    t.finish()
}

/// Windows ACPI emulated devices table: the PM timer needs no double reads.
fn waet() -> Vec<u8> {
    let mut t = Table::new(b"WAET", 1);
    t.u32(2);
    t.finish()
}
