//! Disk images.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use ringfort_block::format::Qcow2;
use ringfort_block::format::qcow2::bitmap::Change;
use ringfort_block::format::qcow2::check::Repair;
use ringfort_block::format::qcow2::{CreateOptions, create};
use ringfort_block::storage::{FileStorage, StorageOptions};
use ringfort_block::{BlockBackend, Format, ImageOptions, SharedSlice, SharedSliceMut, open_storage_image};

use crate::Input;

/// A file that goes away.
struct Scratch(PathBuf);

impl Scratch {
    fn new(content: &[u8]) -> Option<Scratch> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("ringfort-fuzz-{}-{n}", std::process::id()));
        std::fs::write(&path, content).ok()?;
        Some(Scratch(path))
    }

    fn open(&self) -> Option<FileStorage> {
        let options = StorageOptions { read_only: false, direct: false, lock: false };
        FileStorage::open_any_size(&self.0, options).ok().map(FileStorage::without_syncs)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Whether it stays behind says nothing about the code under test.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Put bytes of the input over an image, near places that matter.
fn patch(image: &mut [u8], input: &mut Input<'_>, places: &[usize]) {
    while !input.is_empty() {
        let (place, offset, kind) = (input.u8(), usize::from(input.u8()), input.u8());
        let at = places[usize::from(place) % places.len()] + offset;
        let bytes = match kind % 4 {
            0 => vec![input.u8()],
            1 => vec![0xff; 4],
            2 => input.bytes::<4>().to_vec(),
            _ => input.bytes::<8>().to_vec(),
        };
        if let Some(to) = image.get_mut(at..at + bytes.len()) {
            to.copy_from_slice(&bytes);
        }
    }
}

/// Read here and there, and ask where things lie.
fn look(disk: &dyn BlockBackend) {
    let size = disk.size();
    let mut buffer = vec![0; 3000];
    for at in [0, 511, 4096, size / 2, size.saturating_sub(3000)] {
        let n = size.saturating_sub(at).min(3000) as usize;
        // An error is as good as content.
        let _ = disk.read_at(&[SharedSliceMut::new(&mut buffer[..n])], at);
    }
    let (mut at, mut steps) = (0, 0);
    while at < size && steps < 100 {
        let Ok(s) = disk.status(at, size - at) else { break };
        assert!(s.len > 0 && s.len <= size - at, "a piece lies on the disk");
        at += s.len;
        steps += 1;
    }
}

/// A small sound image with data, compressed data, a snapshot and a bitmap.
fn qcow2_template(extended: bool) -> &'static [u8] {
    static PLAIN: OnceLock<Vec<u8>> = OnceLock::new();
    static WIDE: OnceLock<Vec<u8>> = OnceLock::new();
    (if extended { &WIDE } else { &PLAIN }).get_or_init(|| {
        let make = || -> Option<Vec<u8>> {
            let file = Scratch::new(&[])?;
            let cluster_size = if extended { 16 << 10 } else { 512 };
            let options =
                CreateOptions { size: 1 << 20, cluster_size, extended_l2: extended, ..Default::default() };
            create(&file.open()?, &options).ok()?;
            let q = Qcow2::open(file.open()?, &ImageOptions::default()).ok()?;
            q.write_at(&[SharedSlice::new(&[7; 5000])], 300).ok()?;
            let packed = q.pack(&vec![3; cluster_size as usize]).ok()??;
            q.write_packed(64 << 10, &packed).ok()?;
            q.snapshot_create("s", Duration::from_secs(1)).ok()?;
            q.write_at(&[SharedSlice::new(&[8; 2000])], 0).ok()?;
            q.change_bitmap("b", &Change::Add(Some(512))).ok()?;
            q.close().ok()?;
            std::fs::read(&file.0).ok()
        };
        make().expect("a sound image can be made")
    })
}

/// qcow2: any header, and an image of which tables and header have been changed, read, checked, mended and written to.
pub fn disk_qcow2(data: &[u8]) {
    let mut input = Input(data);
    let mode = input.u8();
    let image = if mode & 1 == 0 {
        let mut image = qcow2_template(mode & 2 != 0).to_vec();
        // The beginnings of all clusters: whatever tables there are begin at one.
        let cluster = if mode & 2 != 0 { 16 << 10 } else { 512 };
        let places: Vec<usize> = (0..image.len() / cluster).map(|c| c * cluster).collect();
        patch(&mut image, &mut input, &places);
        image
    } else {
        let mut image = b"QFI\xfb\0\0\0\x03".to_vec();
        image.extend_from_slice(input.rest());
        image
    };
    let Some(file) = Scratch::new(&image) else { return };
    let (Some(storage), options) =
        (file.open(), ImageOptions { format: Some(Format::Qcow2), ..Default::default() })
    else {
        return;
    };
    let reading = ImageOptions { read_only: true, repairing: true, backing: false, ..options };
    if let Ok(q) = Qcow2::open(storage, &reading) {
        look(&q);
        let _ = q.check(Repair::None);
        let _ = (q.snapshots(), q.bitmaps());
        if let Ok(s) = q.into_snapshot("s") {
            look(&s);
        }
    }
    let Some(storage) = file.open() else { return };
    let writing = ImageOptions { repairing: mode & 4 != 0, backing: false, ..options };
    let Ok(q) = Qcow2::open(storage, &writing) else { return };
    if mode & 4 != 0 {
        let _ = q.check(if mode & 8 != 0 { Repair::All } else { Repair::Leaks });
        return;
    }
    let _ = match mode >> 4 & 7 {
        0 => q.snapshot_create("t", Duration::ZERO),
        1 => q.snapshot_delete("s"),
        2 => q.snapshot_apply("s"),
        3 => q.change_bitmap("b", &Change::Clear),
        4 => q.make_empty(),
        5 => q.resize(q.size() / 2 / 512 * 512),
        6 => q.discard(0, q.size().min(1 << 20)),
        _ => q.write_zeroes(0, q.size().min(1 << 20), true),
    };
    let n = q.size().min(9000) as usize;
    let _ = q.write_at(&[SharedSlice::new(&vec![5; n])], 0);
    let _ = q.close();
    // Nothing is written far behind what was there.
    assert!(std::fs::metadata(&file.0).is_ok_and(|m| m.len() < 1 << 40));
}

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

fn vdi() -> (Vec<u8>, Vec<usize>) {
    let mut b = vec![0; 8192];
    put(&mut b, 0x40, &0xbeda_107fu32.to_le_bytes());
    put(&mut b, 0x44, &0x0001_0001u32.to_le_bytes());
    put(&mut b, 0x4c, &1u32.to_le_bytes());
    for (at, n) in [(0x154, 512u32), (0x158, 1024), (0x168, 512), (0x178, 1024), (0x180, 4)] {
        put(&mut b, at, &n.to_le_bytes());
    }
    put(&mut b, 0x170, &4096u64.to_le_bytes());
    (b, vec![0x40, 0x154, 0x170, 512])
}

fn vmdk() -> (Vec<u8>, Vec<usize>) {
    let mut b = vec![0; 65536];
    put(&mut b, 0, b"KDMV\x01\0\0\0\x03\0\x03\0");
    for (at, n) in [(12, 64u64), (20, 8), (28, 1), (36, 4), (48, 0), (56, 8), (64, 16)] {
        put(&mut b, at, &n.to_le_bytes());
    }
    put(&mut b, 44, &4u32.to_le_bytes());
    put(&mut b, 77, &1u16.to_le_bytes());
    put(&mut b, 512, b"# Disk DescriptorFile\nparentCID=ffffffff\nRW 64 SPARSE \"x\"\n");
    put(&mut b, 4096, &10u32.to_le_bytes());
    put(&mut b, 5120, &16u32.to_le_bytes());
    (b, vec![0, 20, 44, 512, 560, 4096, 5120, 8192])
}

fn vhd() -> (Vec<u8>, Vec<usize>) {
    let mut b = vec![0; 16384];
    put(&mut b, 0, b"conectix");
    put(&mut b, 16, &512u64.to_be_bytes());
    put(&mut b, 28, b"win ");
    put(&mut b, 48, &8192u64.to_be_bytes());
    put(&mut b, 60, &3u32.to_be_bytes());
    put(&mut b, 512, b"cxsparse");
    put(&mut b, 528, &1536u64.to_be_bytes());
    put(&mut b, 540, &4u32.to_be_bytes());
    put(&mut b, 544, &2048u32.to_be_bytes());
    put(&mut b, 1536, &[0xff; 16]);
    put(&mut b, 1536, &8u32.to_be_bytes());
    (b, vec![0, 48, 512, 528, 1536])
}

fn sum(b: &mut [u8], at: usize) {
    b[at..at + 4].fill(0);
    let s = !b.iter().fold(0u32, |s, x| s.wrapping_add(u32::from(*x)));
    b[at..at + 4].copy_from_slice(&s.to_be_bytes());
}

fn crc(b: &mut [u8]) {
    b[4..8].fill(0);
    let mut c = !0u32;
    for x in b.iter() {
        c ^= u32::from(*x);
        for _ in 0..8 {
            c = if c & 1 != 0 { c >> 1 ^ 0x82f6_3b78 } else { c >> 1 };
        }
    }
    b[4..8].copy_from_slice(&(!c).to_le_bytes());
}

const MIB: usize = 1 << 20;

fn vhdx() -> (Vec<u8>, Vec<usize>) {
    let mut b = vec![0; 3 * MIB + 8192];
    put(&mut b, 0, b"vhdxfile");
    put(&mut b, 65536, b"head");
    put(&mut b, 65536 + 66, &[1]);
    put(&mut b, 65536 + 68, &(MIB as u32).to_le_bytes());
    put(&mut b, 65536 + 72, &(MIB as u64).to_le_bytes());
    let regions = 192 << 10;
    put(&mut b, regions, b"regi");
    put(&mut b, regions + 8, &[2]);
    put(
        &mut b,
        regions + 16,
        &[0x66, 0x77, 0xc2, 0x2d, 0x23, 0xf6, 0, 0x42, 0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 8],
    );
    put(&mut b, regions + 32, &(3 * MIB as u64).to_le_bytes());
    put(&mut b, regions + 40, &4096u32.to_le_bytes());
    put(
        &mut b,
        regions + 48,
        &[6, 0xa2, 0x7c, 0x8b, 0x90, 0x47, 0x9a, 0x4b, 0xb8, 0xfe, 0x57, 0x5f, 5, 0x0f, 0x88, 0x6e],
    );
    put(&mut b, regions + 64, &(2 * MIB as u64).to_le_bytes());
    put(&mut b, regions + 72, &(MIB as u32).to_le_bytes());
    let meta = 2 * MIB;
    put(&mut b, meta, b"metadata");
    put(&mut b, meta + 10, &[3]);
    let items: [(&[u8; 16], u32, [u8; 8]); 3] = [
        (
            &[0x37, 0x67, 0xa1, 0xca, 0x36, 0xfa, 0x43, 0x4d, 0xb3, 0xb6, 0x33, 0xf0, 0xaa, 0x44, 0xe7, 0x6b],
            65536,
            (MIB as u64).to_le_bytes(),
        ),
        (
            &[0x24, 0x42, 0xa5, 0x2f, 0x1b, 0xcd, 0x76, 0x48, 0xb2, 0x11, 0x5d, 0xbe, 0xd8, 0x3b, 0xf4, 0xb8],
            65544,
            (4 * MIB as u64).to_le_bytes(),
        ),
        (
            &[0x1d, 0xbf, 0x41, 0x81, 0x6f, 0xa9, 9, 0x47, 0xba, 0x47, 0xf2, 0x33, 0xa8, 0xfa, 0xab, 0x5f],
            65552,
            512u64.to_le_bytes(),
        ),
    ];
    for (i, (guid, offset, value)) in items.into_iter().enumerate() {
        let e = meta + 32 + i * 32;
        put(&mut b, e, guid);
        put(&mut b, e + 16, &offset.to_le_bytes());
        put(&mut b, e + 20, &8u32.to_le_bytes());
        put(&mut b, e + 24, &[4]);
        put(&mut b, meta + offset as usize, &value);
    }
    put(&mut b, 3 * MIB, &(2u64 << 20 | 6).to_le_bytes());
    // A log entry, valid but for its checksum and the log's name in the header.
    put(&mut b, MIB, b"loge");
    put(&mut b, MIB + 8, &8192u32.to_le_bytes());
    put(&mut b, MIB + 16, &[1]);
    put(&mut b, MIB + 24, &[1]);
    put(&mut b, MIB + 32, &[7; 16]);
    put(&mut b, MIB + 64, b"desc");
    put(&mut b, MIB + 80, &(3 * MIB as u64).to_le_bytes());
    put(&mut b, MIB + 88, &[1]);
    put(&mut b, MIB + 4096, b"data");
    put(&mut b, MIB + 8188, &[1]);
    (b, vec![65536, 65536 + 66, regions, regions + 32, meta, meta + 32, meta + 65536, MIB, MIB + 64, 3 * MIB])
}

/// VMDK, VHD, VHDX and VDI: sound images with changes (and right checksums where there are any), and anything else.
pub fn disk_import(data: &[u8]) {
    let mut input = Input(data);
    let mode = input.u8();
    let format = [Format::Vmdk, Format::Vpc, Format::Vhdx, Format::Vdi][usize::from(mode) % 4];
    let image = if mode & 4 == 0 {
        let (mut image, places) = match format {
            Format::Vmdk => vmdk(),
            Format::Vpc => vhd(),
            Format::Vhdx => vhdx(),
            _ => vdi(),
        };
        if format == Format::Vhdx && mode & 8 != 0 {
            put(&mut image, 65536 + 48, &[7; 16]);
        }
        patch(&mut image, &mut input, &places);
        match format {
            Format::Vpc => {
                sum(&mut image[..512], 0x40);
                sum(&mut image[512..1536], 0x24);
            }
            Format::Vhdx => {
                crc(&mut image[65536..65536 + 4096]);
                crc(&mut image[192 << 10..256 << 10]);
                crc(&mut image[MIB..MIB + 8192]);
            }
            _ => {}
        }
        image
    } else {
        // A descriptor's text, or noise.
        let mut image = if mode & 8 != 0 { b"# Disk DescriptorFile\n".to_vec() } else { Vec::new() };
        image.extend_from_slice(input.rest());
        image
    };
    let Some(storage) = Scratch::new(&image).and_then(|file| file.open()) else { return };
    let options = ImageOptions { format: Some(format), read_only: true, lock: false, ..Default::default() };
    if let Ok(disk) = open_storage_image(storage, &options) {
        look(&*disk);
    }
}
