use super::*;
use crate::bytes::{u32_at, u64_at};
use std::io::Cursor;

const RAM: u64 = 64 << 20;

fn layout() -> Layout {
    Layout::new(RAM, 40).unwrap()
}

fn boot<'a>(layout: &'a Layout, cmdline: &'a str, modules: Vec<Module<'a>>) -> Boot<'a> {
    Boot { layout, cmdline, modules, rsdp: Some(0xe0000) }
}

fn read(m: &GuestMemory, at: u64, n: usize) -> Vec<u8> {
    let mut b = vec![0; n];
    m.read_slice(&mut b, GuestAddress(at)).unwrap();
    b
}

fn set(b: &mut [u8], at: usize, v: &[u8]) {
    b[at..at + v.len()].copy_from_slice(v);
}

/// A bzImage of four setup sectors with the usual header, and `size` bytes of kernel.
fn bzimage(size: usize) -> Vec<u8> {
    let mut f = vec![0; 5 * 512];
    f[0x1f1] = 4;
    set(&mut f, 0x1f4, &((size / 16) as u32).to_le_bytes());
    set(&mut f, 0x1fe, &[0x55, 0xaa]);
    f[0x201] = 0x6a;
    set(&mut f, 0x202, b"HdrS");
    set(&mut f, 0x206, &0x020fu16.to_le_bytes());
    f[0x211] = 1;
    set(&mut f, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    set(&mut f, 0x230, &0x20_0000u32.to_le_bytes());
    f[0x234] = 1;
    set(&mut f, 0x236, &3u16.to_le_bytes());
    set(&mut f, 0x238, &2047u32.to_le_bytes());
    set(&mut f, 0x258, &0x100_0000u64.to_le_bytes());
    set(&mut f, 0x260, &0x80_0000u32.to_le_bytes());
    f.extend((0..size).map(|i| i as u8 | 1));
    f
}

fn error(kernel: Vec<u8>) -> String {
    let l = layout();
    let m = l.allocate().unwrap();
    let e = load(&m, &mut Cursor::new(kernel), &mut boot(&l, "", vec![])).unwrap_err().to_string();
    assert!(!e.contains('\n'));
    e
}

#[test]
fn bzimage_by_the_64_bit_entry() {
    let l = layout();
    let m = l.allocate().unwrap();
    let kernel = bzimage(0x10_0000);
    let mut initrd = Cursor::new(vec![7u8; 5001]);
    let mut second = Cursor::new(vec![9u8; 10]);
    let modules = vec![
        Module { file: &mut initrd, cmdline: String::new() },
        Module { file: &mut second, cmdline: String::new() },
    ];
    let mut b = boot(&l, "console=ttyS0 quiet", modules);
    let r = load(&m, &mut Cursor::new(kernel.clone()), &mut b).unwrap();
    assert_eq!(r.protocol, "bzImage");
    assert_eq!(r.entry, Entry::Long { rip: 0x100_0200, rsi: place::BOOT_PARAMS });
    assert_eq!(r.kernel, (0x100_0000, 0x180_0000));
    assert_eq!(read(&m, 0x100_0000, 0x10_0000), kernel[5 * 512..]);
    let p = read(&m, place::BOOT_PARAMS, 4096);
    assert_eq!(&p[0x202..0x206], b"HdrS");
    assert_eq!((p[0x210], u32_at(&p, 0x228)), (0xff, place::CMDLINE as u32));
    assert_eq!(u64_at(&p, 0x70), 0xe0000);
    assert_eq!(read(&m, place::CMDLINE, 20), b"console=ttyS0 quiet\0");
    let (at, size) = (u64::from(u32_at(&p, 0x218)), u32_at(&p, 0x21c) as usize);
    assert_eq!((at % 4096, size), (0, 5004 + 10));
    assert!(at >= r.kernel.1 && at + size as u64 <= l.low_usable_end());
    let i = read(&m, at, size);
    assert!(i[..5001].iter().all(|b| *b == 7) && i[5001..5004] == [0; 3] && i[5004..] == [9; 10]);
    assert_eq!(usize::from(p[0x1e8]), l.e820().len());
    assert_eq!(u64_at(&p, 0x2d0 + 8), layout::EBDA_BASE);

    // The entry state refers to what was written.
    let s = r.entry.state(0x600);
    assert_eq!((s.cr3, s.efer & 0x500, s.cr4 & 0x20), (place::PAGE_TABLES, 0x500, 0x20));
    let gdt = read(&m, s.gdtr.base + 0x10, 16);
    let code = Segment::from_descriptor(0x10, u64_at(&gdt, 0));
    assert_eq!(code, s.segments[1]);
    assert_eq!(Segment::from_descriptor(0x18, u64_at(&gdt, 8)), s.segments[3]);
    let entry = |table: u64, i: u64| u64_at(&read(&m, table + 8 * i, 8), 0);
    for address in [0u64, 0x0123_4567, 0xffff_ffff] {
        let pdpt = entry(s.cr3, 0) & !0xfff;
        let pd = entry(pdpt, address >> 30) & !0xfff;
        let e = entry(pd, address >> 21 & 511);
        assert_eq!(e & 0x83, 0x83);
        assert_eq!((e & !0x1f_ffff) | (address & 0x1f_ffff), address);
    }
    assert_eq!(entry(s.cr3, 1), 0);
}

use ringfort_x86::Segment;

#[test]
fn bzimage_moves_when_its_preferred_place_is_taken() {
    let l = Layout::new(32 << 20, 40).unwrap();
    let m = l.allocate().unwrap();
    let mut k = bzimage(4096);
    set(&mut k, 0x258, &(31u64 << 20).to_le_bytes());
    let r = load(&m, &mut Cursor::new(k.clone()), &mut boot(&l, "", vec![])).unwrap();
    assert_eq!(r.kernel.0, 0x20_0000);
    k[0x234] = 0;
    let e = load(&m, &mut Cursor::new(k.clone()), &mut boot(&l, "", vec![])).unwrap_err().to_string();
    assert!(e.contains("more memory"), "{e}");
    // The last of the 16-byte units that the header counts need not be whole.
    let mut k = bzimage(4096);
    k.truncate(k.len() - 15);
    load(&m, &mut Cursor::new(k), &mut boot(&l, "", vec![])).unwrap();
    // 32-bit kernels are entered in protected mode.
    let mut k = bzimage(4096);
    set(&mut k, 0x236, &[0, 0]);
    let r = load(&m, &mut Cursor::new(k), &mut boot(&l, "", vec![])).unwrap();
    assert_eq!(r.entry, Entry::Protected { eip: 0x100_0000, eax: 0, ebx: 0, esi: place::BOOT_PARAMS as u32 });
    let s = r.entry.state(0);
    assert_eq!((s.cr0, s.efer, s.segments[1].db(), s.segments[1].long()), (0x11, 0, true, false));
}

#[test]
fn lying_bzimage_headers_are_refused() {
    assert!(error(vec![]).contains("no kernel that can"));
    let zeroes = error(vec![0; 100_000]);
    assert!(zeroes.contains("no kernel that can"), "{zeroes}");
    let full = bzimage(0x10_000);
    for cut in [0x206, 0x210, 0x28f, 0x290, 2559, 2560, 2561, full.len() - 16] {
        let e = error(full[..cut].to_vec());
        assert!(e.contains("cut short") || e.contains("no protected-mode"), "{cut}: {e}");
    }
    let with = |at: usize, v: &[u8]| {
        let mut k = full.clone();
        set(&mut k, at, v);
        error(k)
    };
    assert!(with(0x206, &[5, 2]).contains("too old"));
    assert!(with(0x211, &[0]).contains("zImage"));
    assert!(with(0x1f1, &[255]).contains("cut short"));
    assert!(with(0x1f4, &[0xff; 4]).contains("cut short"));
    assert!(with(0x260, &[0xff; 4]).contains("do not fit"));
    assert!(with(0x260, &[0, 0, 0, 0xff]).contains("do not fit"));
    let mut k = full.clone();
    set(&mut k, 0x258, &[0xff; 8]);
    set(&mut k, 0x230, &[3, 0, 0, 0]);
    assert!(error(k).contains("alignment"));
    let l = layout();
    let m = l.allocate().unwrap();
    let long = "x".repeat(2048);
    let e = load(&m, &mut Cursor::new(full.clone()), &mut boot(&l, &long, vec![])).unwrap_err().to_string();
    assert!(e.contains("2048 bytes are more than the 2047"), "{e}");
    let e = load(&m, &mut Cursor::new(full.clone()), &mut boot(&l, "a\0b", vec![])).unwrap_err().to_string();
    assert!(e.contains("NUL"), "{e}");
}

/// A file that claims to be huge without being it.
struct Huge(u64);
impl std::io::Read for Huge {
    fn read(&mut self, b: &mut [u8]) -> std::io::Result<usize> {
        b.fill(0);
        Ok(b.len())
    }
}
impl std::io::Seek for Huge {
    fn seek(&mut self, p: std::io::SeekFrom) -> std::io::Result<u64> {
        Ok(if let std::io::SeekFrom::Start(n) = p { n } else { self.0 })
    }
}

#[test]
fn initrd_larger_than_memory_is_refused() {
    let l = layout();
    let m = l.allocate().unwrap();
    for size in [RAM, 40 << 20, u64::MAX, u64::MAX - 2] {
        let mut initrd = Huge(size);
        let modules = vec![Module { file: &mut initrd, cmdline: String::new() }];
        let e =
            load(&m, &mut Cursor::new(bzimage(4096)), &mut boot(&l, "", modules)).unwrap_err().to_string();
        assert!(e.starts_with("initrd: ") && e.contains("more memory"), "{e}");
    }
    // initrd_addr_max is kept.
    let mut k = bzimage(4096);
    set(&mut k, 0x22c, &0x1ff_ffffu32.to_le_bytes());
    let mut initrd = Cursor::new(vec![1; 4097]);
    let modules = vec![Module { file: &mut initrd, cmdline: String::new() }];
    let r = load(&m, &mut Cursor::new(k), &mut boot(&l, "", modules)).unwrap();
    assert_eq!(r.modules, [(0x1ff_e000, 4097)]);
}

/// An ELF64 file with one loaded segment (`body` at `at`, in memory `memory` bytes) and perhaps a note.
fn elf64(at: u64, body: &[u8], memory: u64, entry: u64, note: Option<&[u8]>) -> Vec<u8> {
    let mut f = vec![0; 64 + 2 * 56];
    set(&mut f, 0, b"\x7fELF\x02\x01\x01");
    set(&mut f, 16, &[2, 0, 62, 0]);
    set(&mut f, 24, &entry.to_le_bytes());
    set(&mut f, 32, &64u64.to_le_bytes());
    set(&mut f, 54, &56u16.to_le_bytes());
    set(&mut f, 56, &2u16.to_le_bytes());
    let offset = f.len() as u64;
    for (i, v) in [1 | 7 << 32, offset, 0, at, body.len() as u64, memory, 4096].into_iter().enumerate() {
        set(&mut f, 64 + 8 * i, &v.to_le_bytes());
    }
    f.extend(body);
    if let Some(n) = note {
        let offset = f.len() as u64;
        for (i, v) in [4u64, offset, 0, 0, n.len() as u64, n.len() as u64, 4].into_iter().enumerate() {
            set(&mut f, 120 + 8 * i, &v.to_le_bytes());
        }
        f.extend(n);
    }
    f
}

fn pvh_note(entry: u32) -> Vec<u8> {
    // Another note first, with sizes that need padding.
    let mut n = Vec::new();
    n.extend([5, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0]);
    n.extend(b"Linux\0\0\0abc\0"[..8].iter());
    n.extend(b"abc\0");
    n.extend([4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
    n.extend(b"Xen\0");
    n.extend(entry.to_le_bytes());
    n
}

#[test]
fn elf_by_pvh() {
    let l = layout();
    let m = l.allocate().unwrap();
    m.write_slice(&[0xee; 4096], GuestAddress(0x20_0000)).unwrap();
    let k = elf64(0x20_0000, b"kernel", 4096, 0xffff_ffff_8000_0000, Some(&pvh_note(0x20_0002)));
    let mut file = Cursor::new(vec![3u8; 100]);
    let modules = vec![Module { file: &mut file, cmdline: "mod arg".into() }];
    let r = load(&m, &mut Cursor::new(k), &mut boot(&l, "hello", modules)).unwrap();
    assert_eq!((r.protocol, r.kernel), ("PVH", (0x20_0000, 0x20_1000)));
    let Entry::Protected { eip, ebx, .. } = r.entry else { panic!("{:?}", r.entry) };
    assert_eq!(eip, 0x20_0002);
    assert_eq!(read(&m, 0x20_0000, 6), b"kernel");
    assert!(read(&m, 0x20_0006, 4090).iter().all(|b| *b == 0), "bss is cleared");
    let i = read(&m, ebx.into(), 56);
    assert_eq!((u32_at(&i, 0), u32_at(&i, 4), u32_at(&i, 12)), (0x336e_c578, 1, 1));
    assert_eq!(read(&m, u64_at(&i, 24), 6), b"hello\0");
    assert_eq!(u64_at(&i, 32), 0xe0000);
    let module = read(&m, u64_at(&i, 16), 32);
    assert_eq!((u64_at(&module, 0), u64_at(&module, 8)), r.modules[0]);
    assert_eq!(read(&m, u64_at(&module, 16), 8), b"mod arg\0");
    assert_eq!(read(&m, r.modules[0].0, 100), [3; 100]);
    let map = read(&m, u64_at(&i, 40), 24 * u32_at(&i, 48) as usize);
    for (e, b) in l.e820().iter().zip(map.chunks(24)) {
        assert_eq!((u64_at(b, 0), u64_at(b, 8), u32_at(b, 16)), (e.base, e.size, e.kind as u32));
    }
}

#[test]
fn vmlinux_without_a_note() {
    let l = layout();
    let m = l.allocate().unwrap();
    let k = elf64(0x100_0000, &[0x90; 64], 0x1000, 0x100_0010, None);
    let r = load(&m, &mut Cursor::new(k), &mut boot(&l, "x", vec![])).unwrap();
    assert_eq!((r.protocol, r.entry), ("vmlinux", Entry::Long { rip: 0x100_0010, rsi: place::BOOT_PARAMS }));
    assert!(error(elf64(0x100_0000, &[0x90; 64], 0x1000, 0xffff_ffff_8100_0000, None)).contains("physical"));
}

#[test]
fn lying_elf_files_are_refused() {
    let good = elf64(0x20_0000, b"kernel", 4096, 0x20_0000, Some(&pvh_note(0x20_0002)));
    for cut in 4..good.len() {
        error(good[..cut].to_vec());
    }
    let with = |at: usize, v: &[u8]| {
        let mut k = good.clone();
        set(&mut k, at, v);
        error(k)
    };
    assert!(with(18, &[40, 0]).contains("x86-64"));
    assert!(with(56, &[0xff, 0xff]).contains("program headers"));
    assert!(with(54, &[1, 0]).contains("program headers"));
    assert!(with(32, &[0xff; 8]).contains("cut short"));
    assert!(with(64 + 8, &[0xff; 8]).contains("cut short"));
    assert!(with(64 + 40, &[1, 0]).contains("more file than memory"));
    assert!(with(64 + 40, &[0xff; 8]).contains("do not fit"));
    for place in [0u64, 0x9000, 0x9f000, 0xf0000, RAM - 4096, RAM, 3 << 30, u64::MAX - 100] {
        assert!(with(64 + 24, &place.to_le_bytes()).contains("do not fit"), "{place:#x}");
    }
    let n = good.len() - 4;
    assert!(with(n, &0x30_0000u32.to_le_bytes()).contains("outside"));
    // Two segments in one place.
    let mut k = good.clone();
    let one = k[64..120].to_vec();
    set(&mut k, 120, &one);
    assert!(error(k).contains("overlaps"));
}

fn multiboot(flags: u32, addresses: [u32; 5]) -> Vec<u8> {
    let mut f = vec![0x90; 0x1000];
    let mut h = Vec::new();
    for v in [0x1bad_b002, flags, 0u32.wrapping_sub(0x1bad_b002).wrapping_sub(flags)].iter().chain(&addresses)
    {
        h.extend(v.to_le_bytes());
    }
    set(&mut f, 0x40, &h);
    f
}

#[test]
fn multiboot_by_addresses_and_by_elf() {
    let l = layout();
    let m = l.allocate().unwrap();
    let k = multiboot(1 << 16 | 3, [0x10_0040, 0x10_0000, 0x10_0800, 0x10_2000, 0x10_0100]);
    let mut file = Cursor::new(vec![5u8; 10]);
    let modules = vec![Module { file: &mut file, cmdline: "m1".into() }];
    let r = load(&m, &mut Cursor::new(k.clone()), &mut boot(&l, "args", modules)).unwrap();
    assert_eq!((r.protocol, r.kernel), ("Multiboot", (0x10_0000, 0x10_2000)));
    let Entry::Protected { eip, eax, ebx, .. } = r.entry else { panic!() };
    assert_eq!((eip, eax), (0x10_0100, 0x2bad_b002));
    assert_eq!(read(&m, 0x10_0000, 0x800), k[..0x800]);
    assert_eq!(read(&m, 0x10_0800, 0x800), [0; 0x800]);
    let i = read(&m, ebx.into(), 120);
    assert_eq!((u32_at(&i, 4), u32_at(&i, 20)), (639, 1));
    assert_eq!(read(&m, u32_at(&i, 16).into(), 5), b"args\0");
    let module = read(&m, u32_at(&i, 24).into(), 16);
    assert_eq!(u64::from(u32_at(&module, 0)), r.modules[0].0);
    assert_eq!(read(&m, u32_at(&module, 8).into(), 3), b"m1\0");
    let map = read(&m, u32_at(&i, 48).into(), u32_at(&i, 44) as usize);
    assert_eq!((u32_at(&map, 0), u64_at(&map, 12), u32_at(&map, 20)), (20, layout::EBDA_BASE, 1));

    let inner = multiboot(0, [0; 5]);
    let k = elf64(0x40_0000, &inner, 0x2000, 0x40_0200, None);
    let r = load(&m, &mut Cursor::new(k), &mut boot(&l, "", vec![])).unwrap();
    assert_eq!((r.protocol, r.kernel.0), ("Multiboot", 0x40_0000));
}

#[test]
fn lying_multiboot_headers_are_refused() {
    let a = 1 << 16;
    let e = |flags, addresses| error(multiboot(flags, addresses));
    assert!(e(a | 8, [0x10_0040, 0x10_0000, 0, 0, 0x10_0000]).contains("unknown features 0x8"));
    assert!(e(0, [0; 5]).contains("no ELF"));
    assert!(e(a, [0x10_0000, 0x10_0040, 0, 0, 0x10_0000]).contains("above its own header"));
    assert!(e(a, [0x10_0100, 0x10_0000, 0, 0, 0x10_0000]).contains("before the file"));
    assert!(e(a, [0x10_0040, 0x10_0000, 0xf_0000, 0, 0]).contains("ends before"));
    assert!(e(a, [0x10_0040, 0x10_0000, 0x20_0000, 0, 0]).contains("cut short"));
    assert!(e(a, [0x10_0040, 0x10_0000, 0, 0x10_0001, 0]).contains("cleared memory"));
    assert!(e(a, [0x10_0040, 0x10_0000, 0, 0xffff_ffff, 0x10_0000]).contains("do not fit"));
    assert!(e(a, [0x10_0040, 0x10_0000, 0, 0, 0x20_0000]).contains("outside"));
    assert!(e(a, [0x7040, 0x7000, 0, 0, 0x7000]).contains("do not fit"));
}

#[test]
fn reset_state_is_the_architecture_s() {
    let s = reset_state(0x00a2_0f12);
    assert_eq!(s.segments[1].base + s.rip, 0xffff_fff0);
    assert_eq!((s.cr0, s.gpr[2], s.rflags), (0x6000_0010, 0x00a2_0f12, 2));
    let mut t = s.clone();
    Entry::Reset.apply(&mut t);
    assert_eq!(s, t);
}

/// The host's own kernel, where there is one.
#[test]
fn a_real_kernel_loads() {
    let kernels: Vec<_> =
        std::fs::read_dir(std::env::var("RINGFORT_TEST_KERNELS").unwrap_or_else(|_| "/boot".into()))
            .into_iter()
            .flatten()
            .flatten()
            .filter(|e| e.file_name().to_string_lossy().starts_with("vmlinuz"))
            .filter_map(|e| std::fs::File::open(e.path()).ok())
            .collect();
    if kernels.is_empty() {
        eprintln!("skipped: no readable vmlinuz* in /boot (RINGFORT_TEST_KERNELS names another directory)");
    }
    for mut k in kernels {
        let l = Layout::new(512 << 20, 40).unwrap();
        let m = l.allocate().unwrap();
        let r = load(&m, &mut k, &mut boot(&l, "console=ttyS0", vec![])).unwrap();
        assert_eq!(r.protocol, "bzImage");
    }
}
