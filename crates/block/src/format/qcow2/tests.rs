//! Against a model, and against qemu-img.

mod extents;
mod faults;

use super::check::Repair;
use super::*;
use crate::format::{Format, Raw};
use crate::open_image;
use fastrand::Rng;
use std::path::Path;
use std::process::Command;

/// A folder that goes away.
struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Dir {
        let dir = std::env::temp_dir().join(format!("ringfort-qcow2-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).expect("a folder");
        Dir(dir)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn qemu_img(args: &[&str]) -> (bool, String) {
    let out = Command::new("qemu-img")
        .args(args)
        .output()
        .expect("qemu-img (Debian package qemu-utils) is installed");
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    (out.status.success(), text)
}

fn qemu_ok(args: &[&str]) -> String {
    let (ok, text) = qemu_img(args);
    assert!(ok, "qemu-img {args:?}: {text}");
    text
}

fn text(p: &Path) -> &str {
    p.to_str().expect("a name in UTF-8")
}

/// Without locks: a child that another test starts holds copies of our descriptors until it runs its program.
fn storage(path: &Path) -> FileStorage {
    FileStorage::open_any_size(path, StorageOptions { read_only: false, direct: false, lock: false })
        .expect("opens")
}

fn make(path: &Path, options: &CreateOptions) {
    std::fs::File::create(path).expect("a file");
    create(&storage(path), options).expect("an image");
}

fn open(path: &Path) -> Qcow2 {
    Qcow2::open(
        storage(path),
        &ImageOptions { format: Some(Format::Qcow2), lock: false, ..ImageOptions::default() },
    )
    .expect("opens")
}

fn read(d: &dyn BlockBackend, at: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0xaa; len];
    d.read_at(&[SharedSliceMut::new(&mut out)], at).expect("reads");
    out
}

fn write(d: &dyn BlockBackend, at: u64, data: &[u8]) {
    d.write_at(&[SharedSlice::new(data)], at).expect("writes");
}

/// qemu-img and our own check find nothing wrong, and qemu-img reads what the model says.
fn agree(image: &Path, model: &[u8], dir: &Dir) {
    let raw = dir.file("model.raw");
    std::fs::write(&raw, model).expect("the model");
    qemu_ok(&["check", "-f", "qcow2", text(image)]);
    qemu_ok(&["compare", "-f", "qcow2", "-F", "raw", text(image), text(&raw)]);
    let options =
        ImageOptions { format: Some(Format::Qcow2), read_only: true, lock: false, ..ImageOptions::default() };
    let file = FileStorage::open(image, StorageOptions { read_only: true, direct: false, lock: false })
        .expect("opens");
    let q = Qcow2::open(file, &options).expect("opens");
    let report = q.check(Repair::None).expect("checks");
    assert_eq!((report.corruptions, report.leaks, report.check_errors), (0, 0, 0), "{:?}", report.lines);
    assert!(read(&q, 0, model.len()) == model, "the content is the model's");
}

/// One random request on image and model.
fn step(q: &Qcow2, model: &mut [u8], rng: &mut Rng) {
    let size = model.len() as u64;
    let at = rng.u64(0..size / 512) * 512;
    let most = (size - at).min(if rng.u8(..) < 40 { 600 << 10 } else { 20 << 10 });
    let len = rng.u64(1..=most / 512) * 512;
    let range = at as usize..(at + len) as usize;
    match rng.u8(..100) {
        0..50 => {
            let data: Vec<u8> = std::iter::repeat_with(|| rng.u8(1..)).take(len as usize).collect();
            write(q, at, &data);
            model[range].copy_from_slice(&data);
        }
        50..70 => {
            q.write_zeroes(at, len, rng.bool()).expect("zeroes");
            model[range].fill(0);
        }
        70..80 => {
            q.discard(at, len).expect("discards");
            let now = read(q, at, len as usize);
            for (new, old) in now.iter().zip(&model[range.clone()]) {
                assert!(*new == *old || *new == 0, "a discarded range reads as before or as zeroes");
            }
            model[range].copy_from_slice(&now);
        }
        80..95 => assert!(read(q, at, len as usize) == model[range], "reads what was written"),
        _ => q.flush().expect("flushes"),
    }
}

fn variants() -> Vec<(&'static str, CreateOptions)> {
    let base = CreateOptions { size: 5 << 20, ..CreateOptions::default() };
    vec![
        ("plain", base.clone()),
        ("v2", CreateOptions { version: 2, ..base.clone() }),
        ("tiny-clusters", CreateOptions { cluster_size: 512, size: 3 << 20, ..base.clone() }),
        ("wide-counts", CreateOptions { cluster_size: 1024, refcount_bits: 64, ..base.clone() }),
        ("narrow-counts", CreateOptions { cluster_size: 4096, refcount_bits: 4, ..base.clone() }),
        ("subclusters", CreateOptions { extended_l2: true, cluster_size: 16 << 10, ..base.clone() }),
        (
            "large-subclusters",
            CreateOptions {
                extended_l2: true,
                cluster_size: 128 << 10,
                lazy_refcounts: true,
                ..base.clone()
            },
        ),
        ("large-clusters", CreateOptions { cluster_size: 2 << 20, ..base }),
    ]
}

#[test]
fn random_requests_agree_with_a_model_and_qemu_img() {
    for (name, options) in variants() {
        let dir = Dir::new(&format!("random-{name}"));
        let path = dir.file("a.qcow2");
        make(&path, &options);
        let mut rng = Rng::with_seed(options.cluster_size + u64::from(options.version));
        let mut model = vec![0; options.size as usize];
        for _ in 0..3 {
            let q = open(&path);
            for _ in 0..150 {
                step(&q, &mut model, &mut rng);
            }
            q.close().expect("closes");
            agree(&path, &model, &dir);
        }
    }
}

#[test]
fn overlays_agree_with_a_model_and_qemu_img() {
    for (name, options) in variants() {
        let dir = Dir::new(&format!("overlay-{name}"));
        let (base, path) = (dir.file("base.raw"), dir.file("top.qcow2"));
        let mut rng = Rng::with_seed(7);
        // The base is shorter than the overlay, and its end lies in the middle of a cluster.
        let mut model: Vec<u8> =
            std::iter::repeat_with(|| rng.u8(..)).take(options.size as usize / 2 + 1536).collect();
        std::fs::write(&base, &model).expect("a base");
        model.resize(options.size as usize, 0);
        let options =
            CreateOptions { backing: Some("base.raw".into()), backing_format: Some("raw".into()), ..options };
        make(&path, &options);
        for _ in 0..2 {
            let q = open(&path);
            for _ in 0..100 {
                step(&q, &mut model, &mut rng);
            }
            q.close().expect("closes");
            agree(&path, &model, &dir);
        }
    }
}

#[test]
fn snapshots_and_resizing_agree_with_a_model_and_qemu_img() {
    for (name, options) in variants() {
        let dir = Dir::new(&format!("snapshots-{name}"));
        let path = dir.file("a.qcow2");
        make(&path, &options);
        let mut rng = Rng::with_seed(11);
        let mut model = vec![0; options.size as usize];
        let mut kept: Vec<(String, Vec<u8>)> = Vec::new();
        for round in 0..10 {
            let q = open(&path);
            for _ in 0..20 {
                step(&q, &mut model, &mut rng);
            }
            match rng.u8(..4) {
                0 | 1 if kept.len() < 4 => {
                    let tag = format!("s{round}");
                    q.snapshot_create(&tag, std::time::Duration::from_secs(1)).expect("a snapshot");
                    kept.push((tag, model.clone()));
                }
                2 if !kept.is_empty() => {
                    let (tag, then) = &kept[rng.usize(..kept.len())];
                    q.snapshot_apply(tag).expect("applies");
                    model = then.clone();
                }
                3 if !kept.is_empty() => {
                    let (tag, _) = kept.remove(rng.usize(..kept.len()));
                    q.snapshot_delete(&tag).expect("deletes");
                }
                _ if kept.is_empty() => {
                    let size = rng.u64(1..options.size / 512 + 4096) * 512;
                    q.resize(size).expect("resizes");
                    model.resize(size as usize, 0);
                }
                _ => {}
            }
            for _ in 0..20 {
                step(&q, &mut model, &mut rng);
            }
            q.close().expect("closes");
            agree(&path, &model, &dir);
        }
        // qemu-img finds each snapshot as it was.
        for (tag, then) in &kept {
            qemu_ok(&["snapshot", "-a", tag, text(&path)]);
            agree(&path, then, &dir);
        }
    }
}

#[test]
fn what_was_flushed_survives_the_end_of_the_process() {
    let options = CreateOptions { size: 4 << 20, cluster_size: 4096, ..CreateOptions::default() };
    let dir = Dir::new("crash");
    let mut rng = Rng::with_seed(3);
    for round in 0..12 {
        let path = dir.file(&format!("{round}.qcow2"));
        make(&path, &options);
        let mut flushed = vec![0u8; options.size as usize];
        let q = open(&path);
        for _ in 0..rng.u32(1..60) {
            step(&q, &mut flushed, &mut rng);
        }
        q.flush().expect("flushes");
        // Later requests may or may not be there; keep away from what was flushed by writing elsewhere only.
        for _ in 0..rng.u32(0..20) {
            let at = rng.u64(0..1024) * 4096;
            if flushed[at as usize..at as usize + 4096].iter().all(|b| *b == 0) {
                write(&q, at, &[9; 4096]);
            }
        }
        // As after kill -9: nothing that lies in memory is written.
        let copy = dir.file("copy.qcow2");
        std::fs::copy(&path, &copy).expect("copies");
        drop(q);
        let (_, said) = qemu_img(&["check", "-f", "qcow2", text(&copy)]);
        assert!(!said.contains("ERROR"), "only leaks are allowed: {said}");
        qemu_ok(&["check", "-r", "leaks", "-f", "qcow2", text(&copy)]);
        let q = open(&copy);
        let now = read(&q, 0, flushed.len());
        for (i, (a, b)) in now.iter().zip(&flushed).enumerate() {
            assert!(a == b || *b == 0, "byte {i} was flushed and is lost");
        }
    }
}

#[test]
fn several_threads_write_at_once() {
    for (name, options) in variants() {
        let dir = Dir::new(&format!("threads-{name}"));
        let path = dir.file("a.qcow2");
        make(&path, &options);
        let q = open(&path);
        let size = options.size as usize;
        let mut parts: Vec<Vec<u8>> = Vec::new();
        std::thread::scope(|s| {
            // Thread t owns the sectors whose number is t modulo 4: neighbours share clusters all the time.
            let work = |t: u64| {
                let (q, mut rng) = (&q, Rng::with_seed(t));
                let mut model = vec![0u8; size];
                for i in 0..250 {
                    let at = (rng.u64(0..size as u64 / 2048) * 4 + t) * 512;
                    let data = [rng.u8(1..); 512];
                    match rng.u8(..10) {
                        0 => q.flush().expect("flushes"),
                        1 => {
                            q.write_zeroes(at, 512, i % 2 == 0).expect("zeroes");
                            model[at as usize..][..512].fill(0);
                        }
                        2 | 3 => assert_eq!(read(q, at, 512), model[at as usize..][..512]),
                        _ => {
                            write(q, at, &data);
                            model[at as usize..][..512].copy_from_slice(&data);
                        }
                    }
                }
                model
            };
            let threads: Vec<_> = (0..4).map(|t| s.spawn(move || work(t))).collect();
            parts = threads.into_iter().map(|t| t.join().expect("no panic")).collect();
        });
        q.close().expect("closes");
        let mut model = vec![0u8; size];
        for part in parts {
            model.iter_mut().zip(part).for_each(|(m, p)| *m |= p);
        }
        agree(&path, &model, &dir);
    }
}

#[test]
fn compressed_images_of_both_kinds_are_read_and_written() {
    let dir = Dir::new("compressed");
    let mut rng = Rng::with_seed(5);
    let mut model = vec![0u8; 3 << 20];
    for (i, chunk) in model.chunks_mut(4096).enumerate() {
        match i % 3 {
            0 => chunk.fill(i as u8),
            1 => chunk.iter_mut().for_each(|b| *b = rng.u8(..)),
            _ => {}
        }
    }
    let raw = dir.file("a.raw");
    std::fs::write(&raw, &model).expect("a raw image");
    for kind in ["zlib", "zstd"] {
        let theirs = dir.file(&format!("{kind}.qcow2"));
        let option = format!("compression_type={kind}");
        qemu_ok(&["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &option, text(&raw), text(&theirs)]);
        let mut now = model.clone();
        let q = open(&theirs);
        assert!(read(&q, 0, model.len()) == model, "{kind} reads");
        for _ in 0..60 {
            step(&q, &mut now, &mut rng);
        }
        q.close().expect("closes");
        agree(&theirs, &now, &dir);

        let ours = dir.file(&format!("ours-{kind}.qcow2"));
        let compression = if kind == "zstd" { header::Compression::Zstd } else { header::Compression::Zlib };
        make(&ours, &CreateOptions { size: model.len() as u64, compression, ..CreateOptions::default() });
        let q = open(&ours);
        for (i, cluster) in model.chunks(65536).enumerate() {
            let at = i as u64 * 65536;
            match q.pack(cluster).expect("packs") {
                Some(p) => q.write_packed(at, &p).expect("stores"),
                None => write(&q, at, cluster),
            }
        }
        q.close().expect("closes");
        agree(&ours, &model, &dir);
    }
}

#[test]
fn images_that_qemu_img_makes_are_read_and_written() {
    let dir = Dir::new("theirs");
    let mut rng = Rng::with_seed(9);
    for (i, options) in [
        "compat=0.10",
        "cluster_size=512,refcount_bits=1",
        "preallocation=metadata",
        "preallocation=falloc,extended_l2=on",
        "lazy_refcounts=on,refcount_bits=32",
        "data_file=DIR/ext.raw,data_file_raw=on",
        "data_file=DIR/ext.data",
    ]
    .iter()
    .enumerate()
    {
        let path = dir.file(&format!("{i}.qcow2"));
        let options = options.replace("DIR", text(&dir.0));
        qemu_ok(&["create", "-f", "qcow2", "-o", &options, text(&path), "4M"]);
        let mut model = vec![0; 4 << 20];
        let q = open(&path);
        for _ in 0..100 {
            step(&q, &mut model, &mut rng);
        }
        q.close().expect("closes");
        agree(&path, &model, &dir);
        if options.contains("raw=on") {
            let raw = std::fs::read(dir.file("ext.raw")).expect("the data file");
            assert!(raw == model, "the data file is the disk");
        }
    }
}

#[test]
fn damage_is_found_and_mended() {
    let dir = Dir::new("mend");
    let path = dir.file("a.qcow2");
    make(&path, &CreateOptions { size: 4 << 20, cluster_size: 4096, ..CreateOptions::default() });
    let q = open(&path);
    let mut model = vec![0; 4 << 20];
    let mut rng = Rng::with_seed(1);
    for _ in 0..80 {
        step(&q, &mut model, &mut rng);
    }
    q.close().expect("closes");
    let good = std::fs::read(&path).expect("the image");
    let repairing =
        ImageOptions { format: Some(Format::Qcow2), repairing: true, lock: false, ..ImageOptions::default() };
    // The refcount table stands in the second cluster, the first refcount block in the third.
    for (what, at, bytes) in [
        ("a leak", 8192 + 2 * 900usize, [0u8, 1]),
        ("a count of zero", 8192 + 2 * 5, [0, 0]),
        ("a block that is nowhere", 4096 + 5, [0x77, 0x77]),
        ("no block", 4096 + 6, [0, 0]),
    ] {
        let mut bad = good.clone();
        bad[at..at + 2].copy_from_slice(&bytes);
        std::fs::write(&path, &bad).expect("the image");
        let q = Qcow2::open(storage(&path), &repairing).expect("opens");
        let found = q.check(Repair::None).expect("checks");
        assert!(found.corruptions + found.leaks > 0, "{what} is found");
        let fixed = q.check(Repair::All).expect("mends");
        assert_eq!(
            (fixed.corruptions, fixed.leaks),
            (fixed.corruptions_fixed, fixed.leaks_fixed),
            "{what}: {:?}",
            fixed.lines
        );
        q.close().expect("closes");
        agree(&path, &model, &dir);
    }
}

#[test]
fn chains_that_come_back_or_lie_are_refused() {
    let dir = Dir::new("chains");
    let (a, b) = (dir.file("a.qcow2"), dir.file("b.qcow2"));
    let on = |name: &str, format: Option<&str>| CreateOptions {
        size: 1 << 20,
        backing: Some(name.into()),
        backing_format: format.map(String::from),
        ..CreateOptions::default()
    };
    make(&a, &on("b.qcow2", Some("qcow2")));
    make(&b, &on("a.qcow2", Some("qcow2")));
    let read_only = ImageOptions { read_only: true, lock: false, ..ImageOptions::default() };
    let refused = |path: &Path| open_image(path, &read_only).err().expect("refused").to_string();
    assert!(refused(&a).contains("comes back to itself"));
    // A backing file of unstated format that names a third file.
    make(&a, &on("b.qcow2", None));
    make(&b, &on("/etc/passwd", Some("raw")));
    assert!(refused(&a).contains("names another file"), "{}", refused(&a));
    make(&a, &on("nbd://localhost/x", Some("raw")));
    assert!(refused(&a).contains("not a plain file name"));
    make(&a, &on("gone", Some("raw")));
    assert!(refused(&a).contains("a.qcow2: its backing file") && refused(&a).contains("rebase -u"));
    // Encryption method 2.
    let mut image = std::fs::read(&b).expect("the image");
    image[35] = 2;
    std::fs::write(&b, image).expect("the image");
    assert!(refused(&b).contains("LUKS"), "{}", refused(&b));
}

#[test]
fn a_raw_image_of_unstated_format_cannot_turn_into_another() {
    let dir = Dir::new("probe");
    let path = dir.file("a.raw");
    std::fs::write(&path, [0; 8192]).expect("a file");
    let d = open_image(&path, &ImageOptions { lock: false, ..ImageOptions::default() }).expect("opens");
    let mut sector = [0u8; 1024];
    sector[..4].copy_from_slice(b"QFI\xfb");
    assert_eq!(
        d.write_at(&[SharedSlice::new(&sector)], 0).expect_err("refused").raw_os_error(),
        Some(libc::EPERM)
    );
    // In two steps neither.
    write(&*d, 0, b"QF");
    assert!(d.write_at(&[SharedSlice::new(b"I\xfb")], 2).is_err());
    write(&*d, 512, &sector[..512]);
    drop(d);
    let d = Raw::new(storage(&path));
    write(&d, 0, &sector);
    assert_eq!(read(&d, 0, 4), b"QFI\xfb", "with the format stated everything may be written");
}

#[test]
fn random_damage_never_panics() {
    let dir = Dir::new("fuzz");
    let path = dir.file("a.qcow2");
    make(&path, &CreateOptions { size: 1 << 20, cluster_size: 512, ..CreateOptions::default() });
    let q = open(&path);
    let mut model = vec![0; 1 << 20];
    let mut rng = Rng::with_seed(21);
    for _ in 0..30 {
        step(&q, &mut model, &mut rng);
    }
    q.snapshot_create("s", std::time::Duration::ZERO).expect("a snapshot");
    q.close().expect("closes");
    let good = std::fs::read(&path).expect("the image");
    for round in 0..300 {
        let mut bad = good.clone();
        for _ in 0..rng.usize(1..6) {
            let at = if rng.bool() { rng.usize(..112) } else { rng.usize(..bad.len()) };
            bad[at] = rng.u8(..);
        }
        if rng.u8(..) < 30 {
            bad.truncate(rng.usize(512..bad.len()));
        }
        std::fs::write(&path, &bad).expect("the image");
        let repairing = round % 2 == 0;
        let options = ImageOptions {
            format: Some(Format::Qcow2),
            repairing,
            backing: false,
            ..ImageOptions::default()
        };
        let Ok(q) = Qcow2::open(storage(&path), &options) else { continue };
        let size = q.size().min(1 << 20);
        let mut out = vec![0; 4096];
        for at in (0..size.saturating_sub(4096)).step_by(40960) {
            // Errors are right; panics and hangs are not.
            let _ = q.read_at(&[SharedSliceMut::new(&mut out)], at);
            let _ = q.write_at(&[SharedSlice::new(&out)], at);
        }
        let _ = q.snapshots();
        let _ = q.check(if repairing { Repair::All } else { Repair::None });
        let _ = q.flush();
    }
}
