use super::*;
use crate::bytes::{u32_at, u64_at};
use std::process::Command;

fn config<'a>(layout: &'a Layout, apic_ids: &'a [u32]) -> AcpiConfig<'a> {
    AcpiConfig {
        layout,
        apic_ids,
        serial: &[(0x3f8, 4), (0x2f8, 3)],
        hpet: true,
        i8042: true,
        pvpanic: true,
        s5_type: 0,
        smi_command: None,
        pm_timer_32: false,
        pirq: [10, 10, 11, 11, 10, 10, 11, 11],
    }
}

fn sum(b: &[u8]) -> u8 {
    b.iter().fold(0, |s, v| s.wrapping_add(*v))
}

#[test]
fn pointers_lengths_and_checksums_hold() {
    let layout = Layout::new(8 << 30, 40).unwrap();
    let t = build(&config(&layout, &[0, 1, 2, 3])).unwrap();
    assert_eq!((sum(&t.rsdp[..20]), sum(&t.rsdp), t.rsdp.len()), (0, 0, 36));
    let at = |address: u64| (address - t.base) as usize;
    let xsdt = at(u64_at(&t.rsdp, 24));
    assert_eq!(&t.block[xsdt..xsdt + 4], b"XSDT");
    let rsdt = at(u32_at(&t.rsdp, 16).into());
    assert_eq!(&t.block[rsdt..rsdt + 4], b"RSDT");
    let count = (u32_at(&t.block, xsdt + 4) as usize - 36) / 8;
    let mut seen = Vec::new();
    for i in 0..count {
        let p = at(u64_at(&t.block, xsdt + 36 + 8 * i));
        assert_eq!(at(u32_at(&t.block, rsdt + 36 + 4 * i).into()), p);
        seen.push(String::from_utf8_lossy(&t.block[p..p + 4]).into_owned());
    }
    assert_eq!(seen, ["FACP", "APIC", "MCFG", "HPET", "WAET"]);
    for (signature, offset, len) in &t.tables {
        assert_eq!(u32_at(&t.block, offset + 4) as usize, *len);
        if signature != b"FACS" {
            assert_eq!(sum(&t.block[*offset..offset + len]), 0, "{signature:?}");
        }
    }
    let fadt = t.tables.iter().find(|x| &x.0 == b"FACP").unwrap();
    assert_eq!(fadt.2, 276);
    let f = &t.block[fadt.1..];
    assert_eq!(u64_at(f, 140), u64::from(u32_at(f, 40)));
    assert_eq!(&t.block[at(u64_at(f, 140))..][..4], b"DSDT");
    assert_eq!(&t.block[at(u32_at(f, 36).into())..][..4], b"FACS");
    assert_eq!((u32_at(f, 56), u32_at(f, 64), u32_at(f, 76)), (0x600, 0x604, 0x608));
    // Not hardware-reduced; reset register at 0xCF9.
    assert_eq!(u32_at(f, 112) >> 20 & 1, 0);
    assert_eq!((f[116], u64_at(f, 120), f[128]), (1, 0xcf9, 0x0f));

    let memory = layout::Layout::new(16 << 20, 40).unwrap();
    let small = build(&config(&memory, &[0])).unwrap();
    let ram = memory.allocate().unwrap();
    assert_eq!(small.install(&ram).unwrap(), layout::RSDP_ADDRESS);
    let mut sig = [0; 8];
    ram.read_slice(&mut sig, GuestAddress(layout::RSDP_ADDRESS)).unwrap();
    assert_eq!(&sig, b"RSD PTR ");
}

#[test]
fn processors_appear_by_apic_id() {
    let layout = Layout::new(1 << 30, 40).unwrap();
    let ids: Vec<u32> = (0..300).collect();
    let t = build(&config(&layout, &ids)).unwrap();
    let m = t.tables.iter().find(|x| &x.0 == b"APIC").unwrap();
    let madt = &t.block[m.1..m.1 + m.2];
    let (mut small, mut large, mut nmi, mut at) = (0, 0, 0, 44);
    while at < madt.len() {
        match madt[at] {
            0 => small += 1,
            9 => large += 1,
            4 | 10 => nmi += 1,
            _ => {}
        }
        at += usize::from(madt[at + 1]);
    }
    assert_eq!((at, small, large, nmi), (madt.len(), 255, 45, 2));
    let many: Vec<u32> = (0..20_000).collect();
    assert!(build(&config(&layout, &many)).unwrap_err().to_string().contains("fewer vCPUs"));
}

/// Every table goes through Intel's disassembler, and the DSDT through its compiler again.
#[test]
fn tables_pass_iasl() {
    if Command::new("iasl").arg("-v").output().is_err() {
        eprintln!("skipped: iasl is not installed (Debian package acpica-tools)");
        return;
    }
    let dir = std::env::temp_dir().join(format!("ringfort-acpi-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let layout = Layout::new(8 << 30, 40).unwrap();
    let t = build(&config(&layout, &[0, 1, 2, 300])).unwrap();
    for (signature, offset, len) in &t.tables {
        let name = String::from_utf8_lossy(signature).into_owned();
        std::fs::write(dir.join(format!("{name}.aml")), &t.block[*offset..offset + len]).unwrap();
        let run = |args: &[&str]| {
            let out = Command::new("iasl").args(args).current_dir(&dir).output().unwrap();
            let text =
                format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
            assert!(out.status.success(), "{name}: {text}");
            text
        };
        run(&["-d", &format!("{name}.aml")]);
        let source = std::fs::read_to_string(dir.join(format!("{name}.dsl"))).unwrap();
        for bad in ["Incorrect checksum", "Invalid", "**** Unknown", "Warning"] {
            assert!(!source.contains(bad), "{name}: {bad}\n{source}");
        }
        if signature == b"DSDT" {
            let text = run(&["-oa", "-p", "again", "DSDT.dsl"]);
            assert!(text.contains(" 0 Errors, 0 Warnings"), "{text}");
            for want in ["_S5", "PNP0A08", "QEMU0001", "ACPI0007", "PNP0501", "_PRT", "0x0000000100000000"] {
                assert!(source.contains(want) || want.starts_with("0x"), "{want}");
            }
        }
    }
    std::fs::remove_dir_all(&dir).unwrap();
}
