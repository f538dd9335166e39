use super::*;
use std::process::Command;

fn config(layout: &Layout) -> SmbiosConfig<'_> {
    SmbiosConfig {
        layout,
        topology: (2, 4, 2),
        cpuid: (0x0080_0f12, 0x178b_fbff),
        cpu_vendor: "AuthenticAMD",
        cpu_brand: "AMD EPYC Processor",
        cpu_mhz: 2600,
        uuid: [0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc, 0x4d, 0xef, 0x80, 1, 2, 3, 4, 5, 6, 7],
        version: "0.1.0",
        serial: "s\u{7}é1",
    }
}

#[test]
fn entry_points_and_structures_hold_together() {
    let layout = Layout::new(40 << 30, 40).unwrap();
    let b = build(&config(&layout)).unwrap();
    let sum = |r: std::ops::Range<usize>| b[r].iter().fold(0u8, |s, v| s.wrapping_add(*v));
    assert_eq!((sum(0..24), sum(0x20..0x3f), sum(0x30..0x3f)), (0, 0, 0));
    let (mut at, mut kinds) = (TABLE, Vec::new());
    while at < b.len() {
        kinds.push(b[at]);
        at += usize::from(b[at + 1]);
        while b[at..at + 2] != [0, 0] {
            at += 1;
        }
        at += 2;
    }
    assert_eq!(at, b.len());
    assert_eq!(kinds, [0, 1, 3, 4, 4, 16, 17, 17, 17, 19, 19, 32, 127]);
    let mut c = config(&layout);
    c.topology = (5000, 1, 1);
    assert!(build(&c).is_err());
}

#[test]
fn dmidecode_reads_it_back() {
    if Command::new("dmidecode").arg("-V").output().is_err() {
        eprintln!("skipped: dmidecode is not installed (Debian package dmidecode)");
        return;
    }
    let file = std::env::temp_dir().join(format!("ringfort-dmi-{}", std::process::id()));
    let layout = Layout::new(20 << 30, 40).unwrap();
    let b = build(&config(&layout)).unwrap();
    // dmidecode's own dump format: entry point at 0, structures at 32.
    let mut dump = vec![0; 32];
    dump[..24].copy_from_slice(&b[..24]);
    dump[16..24].copy_from_slice(&32u64.to_le_bytes());
    dump[5] = 0;
    dump[5] = dump[..24].iter().fold(0u8, |s, v| s.wrapping_add(*v)).wrapping_neg();
    dump.extend(&b[TABLE..]);
    std::fs::write(&file, dump).unwrap();
    let out = Command::new("dmidecode").arg("--from-dump").arg(&file).output().unwrap();
    std::fs::remove_file(&file).unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{text}");
    for want in [
        "Manufacturer: Ringfort",
        "UUID: 12345678-9abc-4def-8001-020304050607",
        "Serial Number: s1",
        "Core Count: 4",
        "Thread Count: 8",
        "Size: 16 GB",
        "Size: 4 GB",
        "Range Size: 3 GB",
        "Range Size: 17 GB",
        "End Of Table",
    ] {
        assert!(text.contains(want), "{want} not in\n{text}");
    }
    for bad in ["bad", "BROKEN", "TRUNCATED", "Wrong", "<OUT OF SPEC>", "invalid"] {
        assert!(!text.contains(bad), "{bad} in\n{text}");
    }
}
