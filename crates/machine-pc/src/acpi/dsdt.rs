//! The DSDT: what the machine has that cannot be found by asking.

use super::{AcpiConfig, CREATOR_ID, OEM_ID, OEM_TABLE_ID, checksum};
use crate::layout;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal, Field,
    FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Local, Memory32Fixed, Method, Name,
    NotEqual, OpRegion, OpRegionSpace, Or, PackageBuilder, Path, ResourceTemplate, Return, Scope, Store,
    Uuid,
};
use acpi_tables::{Aml, AmlSink};

/// Bytes that are AML already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// An ISA interrupt: edge, active high, not shared (small resource, ACPI 6.5 section 6.4.2.1).
fn irq(n: u8) -> Raw {
    let mask = 1u16 << (n & 15);
    Raw(vec![0x22, mask as u8, (mask >> 8) as u8])
}

fn aml(parts: &[&dyn Aml]) -> Raw {
    let mut bytes = Vec::new();
    for p in parts {
        p.to_aml_bytes(&mut bytes);
    }
    Raw(bytes)
}

fn hid(id: &str) -> Raw {
    aml(&[&Name::new("_HID".into(), &EISAName::new(id))])
}

fn uid(n: u32) -> Raw {
    aml(&[&Name::new("_UID".into(), &n)])
}

fn crs(resources: &[Raw]) -> Raw {
    let all = resources.iter().map(|r| r as &dyn Aml).collect();
    aml(&[&Name::new("_CRS".into(), &ResourceTemplate::new(all))])
}

fn ports(base: u16, len: u8) -> Raw {
    aml(&[&IO::new(base, base, 1, len)])
}

fn fixed(base: u64, len: u64) -> Raw {
    aml(&[&Memory32Fixed::new(true, base as u32, len as u32)])
}

fn device(name: &str, parts: &[Raw]) -> Raw {
    let all = parts.iter().map(|p| p as &dyn Aml).collect();
    aml(&[&Device::new(name.into(), all)])
}

pub(super) fn build(c: &AcpiConfig<'_>) -> Vec<u8> {
    let mut body = Vec::new();
    // PICF: 0 until the OS says that it uses I/O APICs.
    Name::new("PICF".into(), &0u8).to_aml_bytes(&mut body);
    Method::new("_PIC".into(), 1, false, vec![&Store::new(&Path::new("PICF"), &Arg(0))])
        .to_aml_bytes(&mut body);
    let mut s5 = PackageBuilder::new();
    for v in [c.s5_type, c.s5_type, 0, 0] {
        s5.add_element(&v);
    }
    Name::new("_S5_".into(), &s5).to_aml_bytes(&mut body);

    let mut system = vec![motherboard(), host_bridge(c)];
    if c.hpet {
        let range = fixed(layout::HPET_BASE, layout::HPET_SIZE);
        system.push(device("HPET", &[hid("PNP0103"), uid(0), crs(&[range])]));
    }
    system.extend((0u32..).zip(c.apic_ids).map(|(n, _)| {
        let id = aml(&[&Name::new("_HID".into(), &"ACPI0007")]);
        device(&format!("C{n:03X}"), &[id, uid(n)])
    }));
    Scope::new("_SB_".into(), system.iter().map(|d| d as &dyn Aml).collect()).to_aml_bytes(&mut body);

    let mut table = Vec::new();
    table.extend(b"DSDT");
    table.extend((36 + body.len() as u32).to_le_bytes());
    table.extend([2, 0]);
    table.extend(OEM_ID);
    table.extend(OEM_TABLE_ID);
    table.extend(1u32.to_le_bytes());
    table.extend(CREATOR_ID);
    table.extend(1u32.to_le_bytes());
    table.extend(body);
    table[9] = checksum(&table);
    table
}

/// Addresses that are taken and belong to no device: ECAM (PCI Firmware 3.3 section 4.1.2 asks for this), ACPI
/// registers, I/O APIC, local APIC.
fn motherboard() -> Raw {
    let resources = [
        fixed(layout::ECAM_BASE, layout::ECAM_SIZE),
        fixed(layout::IOAPIC_BASE, layout::IOAPIC_SIZE),
        fixed(layout::LAPIC_BASE, 0x10_0000),
        ports(layout::PM_BASE, layout::PM_SIZE as u8),
    ];
    device("MBRD", &[hid("PNP0C02"), uid(1), crs(&resources)])
}

fn host_bridge(c: &AcpiConfig<'_>) -> Raw {
    let (mem64, mem64_size) = c.layout.pci_mem64();
    let window32 = |(base, size): (u64, u64)| {
        aml(&[&AddressSpace::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            base as u32,
            (base + size - 1) as u32,
            None,
        )])
    };
    let resources = [
        aml(&[&AddressSpace::new_bus_number(0u16, 255u16)]),
        ports(0xcf8, 8),
        aml(&[&AddressSpace::new_io(0u16, 0xcf7u16, None)]),
        aml(&[&AddressSpace::new_io(0xd00u16, 0xffffu16, None)]),
        window32(layout::PCI_MEM32),
        window32(layout::PCI_MEM32_HIGH),
        aml(&[&AddressSpace::new_memory(
            AddressSpaceCacheable::Cacheable,
            true,
            mem64,
            mem64 + mem64_size - 1,
            None,
        )]),
    ];
    device(
        "PCI0",
        &[
            hid("PNP0A08"),
            aml(&[&Name::new("_CID".into(), &EISAName::new("PNP0A03"))]),
            aml(&[&Name::new("_SEG".into(), &0u8)]),
            aml(&[&Name::new("_BBN".into(), &0u8)]),
            uid(0),
            crs(&resources),
            osc(),
            routing("PRTA", |n| layout::PCI_GSI_BASE + n),
            routing("PRTP", |n| c.pirq[n as usize & 7].into()),
            aml(&[&Method::new(
                "_PRT".into(),
                0,
                false,
                vec![
                    &If::new(&Path::new("PICF"), vec![&Return::new(&Path::new("PRTA"))]),
                    &Return::new(&Path::new("PRTP")),
                ],
            )]),
            isa(c),
        ],
    )
}

/// Which features of PCI Express the OS may control: those of the PCIe capability structure. There is no native hot-plug,
/// PME or AER here (PCI Firmware 3.3 section 4.5).
fn osc() -> Raw {
    aml(&[&Method::new(
        "_OSC".into(),
        4,
        false,
        vec![
            &CreateDWordField::new(&Path::new("CDW1"), &Arg(3), &0u8),
            &If::new(
                &Equal::new(&Arg(0), &Uuid::new("33DB4D5B-1FF7-401C-9657-7441C03DD766")),
                vec![
                    &CreateDWordField::new(&Path::new("CDW3"), &Arg(3), &8u8),
                    &Store::new(&Local(0), &Path::new("CDW3")),
                    &And::new(&Path::new("CDW3"), &Local(0), &0x10u8),
                    // Tell the OS when bits were taken away.
                    &If::new(
                        &NotEqual::new(&Local(0), &Path::new("CDW3")),
                        vec![&Or::new(&Path::new("CDW1"), &Path::new("CDW1"), &0x10u8)],
                    ),
                ],
            ),
            // Unknown UUID.
            &Else::new(vec![&Or::new(&Path::new("CDW1"), &Path::new("CDW1"), &4u8)]),
            &Return::new(&Arg(3)),
        ],
    )])
}

/// A routing table for bus 0: all pins of all devices, `to` gives the interrupt of one of the eight inputs.
fn routing(name: &str, to: impl Fn(u32) -> u32) -> Raw {
    let mut table = PackageBuilder::new();
    for device in 0..32u8 {
        for pin in 0..4u8 {
            let input = layout::pci_gsi(device, pin + 1) - layout::PCI_GSI_BASE;
            let mut entry = PackageBuilder::new();
            entry.add_element(&(u32::from(device) << 16 | 0xffff));
            entry.add_element(&pin);
            entry.add_element(&0u8);
            entry.add_element(&to(input));
            table.add_element(&entry);
        }
    }
    aml(&[&Name::new(name.into(), &table)])
}

/// The LPC bridge with the devices behind it.
fn isa(c: &AcpiConfig<'_>) -> Raw {
    let mut parts = vec![aml(&[&Name::new("_ADR".into(), &0x001f_0000u32)])];
    if c.i8042 {
        parts.push(device("KBD_", &[hid("PNP0303"), crs(&[ports(0x60, 1), ports(0x64, 1), irq(1)])]));
        parts.push(device("MOU_", &[hid("PNP0F13"), crs(&[irq(12)])]));
    }
    parts.push(device("RTC_", &[hid("PNP0B00"), crs(&[ports(0x70, 2), irq(8)])]));
    parts.push(device("TIMR", &[hid("PNP0100"), crs(&[ports(0x40, 4), irq(0)])]));
    for (n, &(base, line)) in (1u32..).zip(c.serial.iter().take(9)) {
        parts.push(device(&format!("COM{n}"), &[hid("PNP0501"), uid(n), crs(&[ports(base, 8), irq(line)])]));
    }
    if c.pvpanic {
        parts.push(pvpanic());
    }
    device("ISA_", &parts)
}

/// As QEMU describes it (docs/specs/pvpanic).
fn pvpanic() -> Raw {
    let port = layout::PVPANIC_PORT;
    let field = Field::new(
        "PEOR".into(),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::Preserve,
        vec![FieldEntry::Named(*b"PEPT", 8)],
    );
    device(
        "PEVT",
        &[
            aml(&[&Name::new("_HID".into(), &"QEMU0001")]),
            crs(&[ports(port, 1)]),
            aml(&[&OpRegion::new("PEOR".into(), OpRegionSpace::SystemIO, &port, &1u8)]),
            aml(&[&field]),
            aml(&[&Name::new("_STA".into(), &0xfu8)]),
            aml(&[&Method::new("RDPT".into(), 0, false, vec![&Return::new(&Path::new("PEPT"))])]),
            aml(&[&Method::new("WRPT".into(), 1, false, vec![&Store::new(&Path::new("PEPT"), &Arg(0))])]),
        ],
    )
}
