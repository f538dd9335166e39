//! Intel MultiProcessor Specification 1.4 table, for kernels without ACPI.

use crate::layout;
use ringfort_memory::{Bytes, GuestAddress, GuestMemory};

/// Most processors that fit in the EBDA beside the interrupt entries; further ones only ACPI tells of.
const MAX_CPUS: usize = 24;
const IOAPIC_ID: u8 = 0;

fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |s, b| s.wrapping_add(*b)).wrapping_neg()
}

/// The floating pointer and the table, to lie at [`layout::EBDA_BASE`]. `signature` and `features` are EAX and EDX of CPUID
/// leaf 1.
pub fn build(apic_ids: &[u32], signature: u32, features: u32) -> Vec<u8> {
    let base = layout::EBDA_BASE as u32;
    let mut entries: Vec<u8> = Vec::new();
    let mut count = 0u16;
    let mut add = |e: &[u8]| {
        entries.extend(e);
        count += 1;
    };
    for (i, &id) in apic_ids.iter().filter(|&&id| id < 255).take(MAX_CPUS).enumerate() {
        let mut e = vec![0, id as u8, 0x14, if i == 0 { 3 } else { 1 }];
        e.extend(signature.to_le_bytes());
        e.extend(features.to_le_bytes());
        e.extend([0; 8]);
        add(&e);
    }
    const PCI: u8 = 0;
    const ISA: u8 = 1;
    add(&[1, PCI, b'P', b'C', b'I', b' ', b' ', b' ']);
    add(&[1, ISA, b'I', b'S', b'A', b' ', b' ', b' ']);
    let mut io = vec![2, IOAPIC_ID, 0x20, 1];
    io.extend((layout::IOAPIC_BASE as u32).to_le_bytes());
    add(&io);
    for irq in (0..16u8).filter(|&i| i != 2) {
        // The SCI is level-triggered, active high; the others are as the bus has them.
        let flags = if irq == layout::SCI_IRQ { 0x0d } else { 0 };
        add(&[3, 0, flags, 0, ISA, irq, IOAPIC_ID, if irq == 0 { 2 } else { irq }]);
    }
    // INTA of every device: the pin that devices here use. Level-triggered, active low.
    for device in 1..32u8 {
        add(&[3, 0, 0x0f, 0, PCI, device << 2, IOAPIC_ID, layout::pci_gsi(device, 1) as u8]);
    }
    // ExtINT on LINT0, NMI on LINT1.
    add(&[4, 3, 0, 0, ISA, 0, 0xff, 0]);
    add(&[4, 1, 0, 0, ISA, 0, 0xff, 1]);

    let mut table = b"PCMP".to_vec();
    table.extend((44 + entries.len() as u16).to_le_bytes());
    table.extend([4, 0]);
    table.extend(b"RINGFORTPC          ");
    table.extend([0; 6]);
    table.extend(count.to_le_bytes());
    table.extend((layout::LAPIC_BASE as u32).to_le_bytes());
    table.extend([0; 4]);
    table.extend(entries);
    table[7] = checksum(&table);

    let mut out = b"_MP_".to_vec();
    out.extend((base + 16).to_le_bytes());
    out.extend([1, 4, 0, 0, 0, 0, 0, 0]);
    out[10] = checksum(&out);
    out.extend(table);
    out
}

/// Write the table, and the BIOS data area's words for the EBDA segment and the size of conventional memory.
///
/// # Errors
/// When RAM is not there.
pub fn install(memory: &GuestMemory, table: &[u8]) -> Result<(), vm_memory::GuestMemoryError> {
    memory.write_slice(table, GuestAddress(layout::EBDA_BASE))?;
    memory.write_slice(&((layout::EBDA_BASE >> 4) as u16).to_le_bytes(), GuestAddress(0x40e))?;
    memory.write_slice(&((layout::EBDA_BASE >> 10) as u16).to_le_bytes(), GuestAddress(0x413))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::{u16_at, u32_at};

    #[test]
    fn sums_counts_and_size() {
        let ids: Vec<u32> = (0..64).collect();
        for n in [1, 4, 64] {
            let t = build(&ids[..n], 0x600f12, 0x0783_fbff);
            assert!(t.len() as u64 <= layout::LOW_END - layout::EBDA_BASE, "{}", t.len());
            assert_eq!(checksum(&t[..16]), 0);
            assert_eq!(u32_at(&t, 4), layout::EBDA_BASE as u32 + 16);
            let table = &t[16..];
            assert_eq!(checksum(table), 0);
            assert_eq!(u16_at(table, 4) as usize, table.len());
            let (mut at, mut entries, mut cpus) = (44, 0, 0);
            while at < table.len() {
                cpus += usize::from(table[at] == 0);
                at += if table[at] == 0 { 20 } else { 8 };
                entries += 1;
            }
            assert_eq!((at, entries), (table.len(), u16_at(table, 34)));
            assert_eq!(cpus, n.min(MAX_CPUS));
        }
    }
}
