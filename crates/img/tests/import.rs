//! Images of other programs: every kind that qemu-img can make is read as qemu-img reads it.

mod common;

use common::{Dir, json, mixed, ok, ours, theirs, they_can};

/// Format, options, and whether the format must be told.
const KINDS: &[(&str, &str, bool)] = &[
    ("vmdk", "subformat=monolithicSparse", false),
    ("vmdk", "subformat=monolithicSparse,zeroed_grain=on", false),
    ("vmdk", "subformat=monolithicFlat", false),
    ("vmdk", "subformat=twoGbMaxExtentSparse", false),
    ("vmdk", "subformat=twoGbMaxExtentFlat", false),
    ("vmdk", "subformat=streamOptimized", false),
    ("vmdk", "subformat=monolithicSparse,adapter_type=lsilogic,hwversion=6", false),
    ("vpc", "subformat=dynamic", false),
    ("vpc", "subformat=dynamic,force_size=on", false),
    ("vpc", "subformat=fixed", true),
    ("vhdx", "subformat=dynamic", false),
    ("vhdx", "subformat=dynamic,block_size=1M,log_size=2M", false),
    ("vhdx", "subformat=dynamic,block_state_zero=off", false),
    ("vhdx", "subformat=fixed", false),
    ("vdi", "", false),
    ("vdi", "static=on", false),
];

#[test]
fn every_kind_is_read() {
    let d = Dir::new("import");
    let raw = d.path("a.raw");
    std::fs::write(&raw, mixed((11 << 20) + 512 * 9, 21)).expect("a file");
    for (i, (format, options, told)) in KINDS.iter().enumerate() {
        let (image, a, b) = (d.path(&format!("{i}.{format}")), d.path("ours"), d.path("theirs"));
        let mut args = vec!["convert", "-f", "raw", "-O", format];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.extend([raw.as_str(), &image]);
        if !they_can(&args) {
            eprintln!("skipped: {format} {options}: this qemu-img does not make it");
            continue;
        }
        let tell: &[&str] = if *told { &["-f", format] } else { &[] };
        ok(ours(&[&["convert"][..], tell, &["-O", "raw", &image, &a]].concat()));
        ok(theirs(&["convert", "-f", format, "-O", "raw", &image, &b]));
        assert!(std::fs::read(&a).expect("ours") == std::fs::read(&b).expect("theirs"), "{format} {options}");
        ok(ours(&[&["convert", "-c", "-O", "qcow2"][..], tell, &[&image, &a]].concat()));
        ok(theirs(&["compare", "-f", "qcow2", "-F", format, &a, &image]));
        let size = |run: fn(&[&str]) -> common::Said| {
            json(&ok(run(&["info", "-f", format, "--output=json", &image])))["virtual-size"].clone()
        };
        assert_eq!(size(ours), size(theirs), "{format} {options}");
        // As a backing file it is read as well, and never written.
        let top = d.path("top");
        ok(ours(&["create", "-q", "-f", "qcow2", "-b", &image, "-F", format, &top]));
        ok(ours(&[&["compare", "-f", "qcow2"][..], &["-F", format], &[&top, &image]].concat()));
        common::io("qcow2", &top, &["write -P 1 0 1M".into()]);
        let said = ours(&["commit", &top]);
        assert!(said.0 == 1 && said.2.contains("can only be read"), "{}", said.2);
        for args in [["resize", "-f", format, &image, "+1M"], ["check", "-r", "all", "-f", format]] {
            let args = if args[0] == "check" { [&args[..], &[&image]].concat() } else { args.to_vec() };
            assert_ne!(ours(&args).0, 0, "{args:?}");
        }
        assert_eq!(ours(&["create", "-f", format, &d.path("new"), "1M"]).0, 1);
    }
}

#[test]
fn what_stands_on_another_image_is_read_or_refused() {
    let d = Dir::new("parents");
    let (raw, base, top, a, b) =
        (d.path("a.raw"), d.path("base.vmdk"), d.path("top.vmdk"), d.path("ours"), d.path("theirs"));
    std::fs::write(&raw, mixed(5 << 20, 22)).expect("a file");
    ok(theirs(&["convert", "-f", "raw", "-O", "vmdk", &raw, &base]));
    ok(theirs(&["create", "-q", "-f", "vmdk", "-b", &base, "-F", "vmdk", &top]));
    common::io("vmdk", &top, &["write -P 1 1M 1M".into(), "write -P 2 4M 512".into()]);
    ok(ours(&["convert", "-O", "raw", &top, &a]));
    ok(theirs(&["convert", "-O", "raw", &top, &b]));
    assert!(std::fs::read(&a).expect("ours") == std::fs::read(&b).expect("theirs"));
    // A chain that comes back to itself.
    std::fs::copy(&top, &base).expect("a copy");
    let text = String::from_utf8_lossy(&std::fs::read(&base).expect("an image")).into_owned();
    assert!(text.contains("base.vmdk"));
    let said = ours(&["convert", "-O", "raw", &top, &a]);
    assert!(said.0 == 1 && said.2.contains("comes back to itself"), "{}", said.2);
    // The other formats' differencing disks: the type field says so.
    let vdi = d.path("x.vdi");
    ok(theirs(&["convert", "-f", "raw", "-O", "vdi", &raw, &vdi]));
    patch(&vdi, 0x4c, &[4]);
    refused(&["info", &vdi], "differencing");
}

fn patch(path: &str, at: usize, bytes: &[u8]) {
    let mut b = std::fs::read(path).expect("an image");
    b[at..at + bytes.len()].copy_from_slice(bytes);
    std::fs::write(path, b).expect("an image");
}

fn refused(args: &[&str], what: &str) {
    let said = ours(args);
    assert!(said.0 != 0 && said.2.contains(what) && said.2.lines().count() == 1, "{args:?}: {:?}", said.2);
}

#[test]
fn damaged_images_are_named() {
    let d = Dir::new("damaged-imports");
    let raw = d.path("a.raw");
    std::fs::write(&raw, mixed(5 << 20, 23)).expect("a file");
    for (format, at, bytes, what) in [
        ("vpc", 8, &[0xff][..], "checksum"),
        ("vhdx", 64 << 10, &[0], "right checksum"),
        ("vdi", 0x178, &[3, 0], "block size"),
        ("vmdk", 4, &[9], "version 9"),
    ] {
        let image = d.path(format);
        ok(theirs(&["convert", "-f", "raw", "-O", format, &raw, &image]));
        let mut b = std::fs::read(&image).expect("an image");
        b[at..at + bytes.len()].copy_from_slice(bytes);
        if format == "vpc" {
            let end = b.len() - 512;
            b[end + at] = 0xff;
        }
        if format == "vhdx" {
            b[128 << 10] = 0;
        }
        std::fs::write(&image, &b).expect("an image");
        refused(&["convert", "-f", format, "-O", "raw", &image, &d.path("out")], what);
        // Cut short, at the front or in the middle of the data: an error, or what qemu-img reads as well.
        ok(theirs(&["convert", "-f", "raw", "-O", format, &raw, &image]));
        let whole = std::fs::read(&image).expect("an image");
        for len in [300, 1000, 70_000, 1 << 20, whole.len() / 2] {
            std::fs::write(&image, &whole[..len.min(whole.len())]).expect("an image");
            let said = ours(&["convert", "-f", format, "-O", "raw", &image, &d.path("out")]);
            assert!(said.0 != 0, "{format} cut to {len}");
            assert!(said.2.contains("ringfort img: ") && said.2.lines().count() == 1, "{}", said.2);
        }
    }
    assert!(!std::path::Path::new(&d.path("out")).exists());
}

/// CRC-32C, bit by bit.
fn crc32c(data: &[u8]) -> u32 {
    let mut c = !0u32;
    for b in data {
        c ^= u32::from(*b);
        for _ in 0..8 {
            c = if c & 1 != 0 { c >> 1 ^ 0x82f6_3b78 } else { c >> 1 };
        }
    }
    !c
}

#[test]
fn a_vhdx_log_is_applied() {
    let d = Dir::new("vhdx-log");
    let (raw, image, out) = (d.path("a.raw"), d.path("a.vhdx"), d.path("out"));
    std::fs::write(&raw, mixed(5 << 20, 24)).expect("a file");
    ok(theirs(&["convert", "-f", "raw", "-O", "vhdx", &raw, &image]));
    ok(ours(&["convert", "-O", "raw", &image, &out]));
    let want = std::fs::read(&out).expect("the copy");
    let mut b = std::fs::read(&image).expect("an image");
    let word = |b: &[u8], at: usize| u32::from_le_bytes(b[at..at + 4].try_into().expect("four"));
    let long = |b: &[u8], at: usize| u64::from_le_bytes(b[at..at + 8].try_into().expect("eight"));
    let header = [64 << 10, 128 << 10].into_iter().max_by_key(|h| long(&b, h + 8)).expect("two");
    let log = long(&b, header + 72) as usize;
    // The block table, whose first page moves to the log and is overwritten in place.
    let table = (0..2047)
        .map(|i| (192 << 10) + 16 + i * 32)
        .find(|e| word(&b, *e) == 0x2dc2_7766)
        .map(|e| long(&b, e + 16) as usize)
        .expect("a block table");
    let page = b[table..table + 4096].to_vec();
    b[table..table + 4096].fill(0xee);
    let guid = [7u8; 16];
    let end = b.len() as u64;
    let mut entry = vec![0u8; 8192];
    entry[..4].copy_from_slice(b"loge");
    entry[8..12].copy_from_slice(&8192u32.to_le_bytes());
    entry[16..24].copy_from_slice(&5u64.to_le_bytes());
    entry[24..28].copy_from_slice(&1u32.to_le_bytes());
    entry[32..48].copy_from_slice(&guid);
    entry[48..56].copy_from_slice(&end.to_le_bytes());
    entry[56..64].copy_from_slice(&end.to_le_bytes());
    entry[64..68].copy_from_slice(b"desc");
    entry[68..72].copy_from_slice(&page[4092..]);
    entry[72..80].copy_from_slice(&page[..8]);
    entry[80..88].copy_from_slice(&(table as u64).to_le_bytes());
    entry[88..96].copy_from_slice(&5u64.to_le_bytes());
    entry[4096..4100].copy_from_slice(b"data");
    entry[4104..8188].copy_from_slice(&page[8..4092]);
    entry[8188..].copy_from_slice(&5u32.to_le_bytes());
    let sum = crc32c(&entry);
    entry[4..8].copy_from_slice(&sum.to_le_bytes());
    b[log..log + 8192].copy_from_slice(&entry);
    b[header + 48..header + 64].copy_from_slice(&guid);
    b[header + 4..header + 8].fill(0);
    let sum = crc32c(&b[header..header + 4096]);
    b[header + 4..header + 8].copy_from_slice(&sum.to_le_bytes());
    std::fs::write(&image, &b).expect("an image");
    ok(ours(&["convert", "-O", "raw", &image, &out]));
    assert!(std::fs::read(&out).expect("the copy") == want, "by our replay");
    // QEMU, which writes the log back into the file, agrees about the content.
    ok(theirs(&["check", "-r", "all", &image]));
    ok(theirs(&["convert", "-O", "raw", &image, &out]));
    assert!(std::fs::read(&out).expect("the copy") == want, "by their replay");
    // A log whose entry is damaged is told.
    b[log + 100] ^= 1;
    std::fs::write(&image, &b).expect("an image");
    refused(&["info", &image], "its log");
}
