use crate::{
    BlockBackend, BlockError, ImageOptions, SharedSlice, SharedSliceMut, open_image, slice_of, slice_of_mut,
};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// A directory that goes away with the test.
pub struct TempDir(pub PathBuf);

impl TempDir {
    pub fn new() -> TempDir {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("ringfort-block-{}-{n}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        TempDir(dir)
    }
    pub fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, content).unwrap();
        path
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub fn read(disk: &dyn BlockBackend, offset: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0xa5; len];
    disk.read_at(&[SharedSliceMut::new(&mut data)], offset).unwrap();
    data
}

fn message(path: &Path, options: ImageOptions) -> String {
    open_image(path, &options).err().unwrap().to_string()
}

#[test]
fn bad_files_are_named_with_the_way_out() {
    let dir = TempDir::new();
    let options = ImageOptions::default();
    let missing = dir.0.join("none.img");
    assert!(message(&missing, options).contains("none.img: no such file"));
    assert!(message(&dir.0, options).contains("is a directory"));
    assert!(message(&dir.file("empty.img", b""), options).contains("is empty"));
    assert!(message(Path::new("/dev/null"), options).contains("neither a file nor a block device"));
    let mut qcow = vec![0; 1024];
    qcow[..4].copy_from_slice(b"QFI\xfb");
    let qcow = dir.file("q.qcow2", &qcow);
    assert!(message(&qcow, options).contains("qcow2 version 0"));
    assert!(message(&dir.file("v.vmdk", b"KDMV"), options).contains("vmdk format"));
    let raw = ImageOptions { format: Some("raw".parse().unwrap()), ..options };
    assert_eq!(&read(&*open_image(&qcow, &raw).unwrap(), 0, 4), b"QFI\xfb");
    assert!("qcow9".parse::<crate::Format>().unwrap_err().contains("qcow9"));
}

#[test]
fn a_file_without_rights_says_so() {
    let dir = TempDir::new();
    let path = dir.file("ro.img", &[1; 512]);
    let mut rights = std::fs::metadata(&path).unwrap().permissions();
    rights.set_readonly(true);
    std::fs::set_permissions(&path, rights).unwrap();
    // Root may write to anything: then there is no error to check.
    if std::fs::OpenOptions::new().write(true).open(&path).is_err() {
        let text = message(&path, ImageOptions::default());
        assert!(text.contains("permission denied") && text.contains("readonly=on"), "{text}");
    }
    let disk = open_image(&path, &ImageOptions { read_only: true, ..Default::default() }).unwrap();
    assert!(disk.read_only());
    assert!(disk.write_at(&[SharedSlice::new(&[0; 512])], 0).is_err());
    assert!(disk.discard(0, 512).is_err() && disk.write_zeroes(0, 512, true).is_err());
}

#[test]
fn the_last_partial_sector_reads_as_zeroes_and_grows_when_written() {
    let dir = TempDir::new();
    let path = dir.file("odd.img", &[7; 700]);
    let disk = open_image(&path, &ImageOptions::default()).unwrap();
    assert_eq!(disk.size(), 1024);
    let tail = read(&*disk, 512, 512);
    assert!(tail[..188].iter().all(|&b| b == 7) && tail[188..].iter().all(|&b| b == 0));
    let mut b = [0; 2];
    assert!(disk.read_at(&[SharedSliceMut::new(&mut b)], 1023).is_err());
    assert!(disk.read_at(&[SharedSliceMut::new(&mut b)], u64::MAX).is_err());
    disk.write_at(&[SharedSlice::new(&[9; 512])], 512).unwrap();
    assert_eq!(std::fs::read(&path).unwrap()[512..], [9; 512]);
}

#[test]
fn direct_io_reads_and_writes_a_file_that_ends_inside_a_block() {
    let dir = TempDir::new();
    let path = dir.file("odd.img", &[7; 4096 + 700]);
    let options = ImageOptions { direct: true, ..Default::default() };
    // tmpfs of old kernels has no direct I/O.
    let Ok(disk) = open_image(&path, &options) else { return };
    let tail = read(&*disk, 4096 + 512, 512);
    assert!(tail[..188].iter().all(|&b| b == 7) && tail[188..].iter().all(|&b| b == 0));
    disk.write_at(&[SharedSlice::new(&[9; 100])], 4096 + 50).unwrap();
    let now = std::fs::read(&path).unwrap();
    assert_eq!(now.len(), 4096 + 700, "the size stays");
    assert!(now[4096 + 50..4096 + 150].iter().all(|&b| b == 9) && now[4096 + 150..].iter().all(|&b| b == 7));
    disk.write_at(&[SharedSlice::new(&[8; 512])], 4096 + 512).unwrap();
    assert_eq!(std::fs::read(&path).unwrap()[4096 + 512..], [8; 512]);
}

#[test]
fn random_operations_match_a_model() {
    for direct in [false, true] {
        let dir = TempDir::new();
        let size = 64 << 10;
        let path = dir.file("disk.img", &vec![0x11; size]);
        let options = ImageOptions { direct, ..Default::default() };
        // tmpfs of old kernels has no direct I/O.
        let Ok(disk) = open_image(&path, &options) else {
            assert!(direct);
            continue;
        };
        hammer(&*disk, &mut vec![0x11; size], 77);
        disk.flush().unwrap();
    }
}

/// Random reads, writes, zeroes and discards with scattered buffers, against a plain vector.
pub fn hammer(disk: &dyn BlockBackend, model: &mut [u8], seed: u64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let size = model.len();
    for step in 0..1500 {
        let at = rng.usize(..size);
        let mut len = rng.usize(..(size - at).min(20_000) + 1);
        let mut start = at;
        if rng.bool() {
            start &= !511;
            len = (len & !511).min(size - start);
        }
        let cut = rng.usize(..len + 1);
        match rng.u8(..8) {
            0..3 => {
                let mut data = vec![0; len];
                {
                    let (a, b) = data.split_at_mut(cut);
                    disk.read_at(&[SharedSliceMut::new(a), SharedSliceMut::new(b)], start as u64).unwrap();
                }
                assert!(data == model[start..start + len], "step {step}: {start}+{len}");
                let mut again = vec![0; len];
                if disk.try_read_at(&[SharedSliceMut::new(&mut again)], start as u64).unwrap() {
                    assert!(again == data, "step {step}: try_read");
                }
            }
            3..6 => {
                let fill = rng.u8(..);
                let data: Vec<u8> = (0..len).map(|i| fill.wrapping_add(i as u8)).collect();
                let (a, b) = data.split_at(cut);
                disk.write_at(&[SharedSlice::new(a), SharedSlice::new(b)], start as u64).unwrap();
                model[start..start + len].copy_from_slice(&data);
            }
            6 => {
                disk.write_zeroes(start as u64, len as u64, rng.bool()).unwrap();
                model[start..start + len].fill(0);
            }
            _ => {
                disk.discard(start as u64, len as u64).unwrap();
                // Anything may be there now; what it is must not change by itself.
                let mut now = vec![0; len];
                disk.read_at(&[SharedSliceMut::new(&mut now)], start as u64).unwrap();
                for (m, n) in model[start..start + len].iter_mut().zip(&now) {
                    assert!(*n == *m || *n == 0, "step {step}: discard made data up");
                    *m = *n;
                }
            }
        }
    }
    assert!(read(disk, 0, size) == model);
}

#[test]
fn many_buffers_are_split_into_several_calls() {
    let dir = TempDir::new();
    let path = dir.file("disk.img", &vec![0; 8192]);
    let disk = open_image(&path, &ImageOptions::default()).unwrap();
    let data: Vec<u8> = (0..8192u32).map(|i| (i % 251) as u8).collect();
    let bufs: Vec<SharedSlice<'_>> = data.chunks(3).map(SharedSlice::new).collect();
    disk.write_at(&bufs, 0).unwrap();
    assert!(std::fs::read(&path).unwrap() == data);
    let mut back = vec![0; 8192];
    let bufs: Vec<SharedSliceMut<'_>> = back.chunks_mut(5).map(SharedSliceMut::new).collect();
    disk.read_at(&slice_of_mut(&bufs, 0, 8192), 0).unwrap();
    drop(bufs);
    assert!(back == data);
    assert_eq!(slice_of(&[SharedSlice::new(&data)], 8190, 10)[0].len(), 2);
}

#[test]
fn a_file_that_shrinks_gives_an_error_not_zeroes() {
    let dir = TempDir::new();
    let path = dir.file("disk.img", &[5; 4096]);
    let disk = open_image(&path, &ImageOptions::default()).unwrap();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1024).unwrap();
    let mut b = [0; 1024];
    assert!(disk.read_at(&[SharedSliceMut::new(&mut b)], 512).is_err());
}

#[test]
fn writers_are_alone_and_readers_share() {
    let dir = TempDir::new();
    let path = dir.file("disk.img", &[0; 512]);
    let (write, read) =
        (ImageOptions::default(), ImageOptions { read_only: true, ..ImageOptions::default() });
    let w = open_image(&path, &write).unwrap();
    for o in [write, read] {
        assert!(matches!(open_image(&path, &o), Err(BlockError::InUse { .. })));
    }
    assert!(message(&path, write).contains("in use by another process"));
    assert!(open_image(&path, &ImageOptions { lock: false, ..write }).is_ok());
    drop(w);
    let r = open_image(&path, &read).unwrap();
    let r2 = open_image(&path, &read).unwrap();
    assert!(matches!(open_image(&path, &write), Err(BlockError::InUse { .. })));
    drop((r, r2));
    open_image(&path, &write).unwrap();
}

const QEMU: &str = "/usr/bin/qemu-system-x86_64";

fn qemu(path: &Path, read_only: bool) -> Child {
    let mode = if read_only { "on" } else { "off" };
    Command::new(QEMU)
        .args(["-M", "q35,accel=tcg", "-S", "-nodefaults", "-display", "none", "-monitor", "stdio", "-drive"])
        .arg(format!("if=none,id=d,format=raw,file={},readonly={mode}", path.display()))
        .args(["-device", "virtio-blk-pci,drive=d"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Wait for the monitor's answer (the prompt alone comes before the images are open), or for the end of the program.
fn wait_until_open(child: &mut Child) -> bool {
    let _ = child.stdin.as_mut().unwrap().write_all(b"info status\n");
    let mut seen = Vec::new();
    let mut byte = [0];
    let out = child.stdout.as_mut().unwrap();
    while out.read(&mut byte).unwrap() == 1 {
        seen.push(byte[0]);
        if seen.ends_with(b"VM status:") {
            return true;
        }
    }
    false
}

#[test]
fn qemu_and_ringfort_refuse_each_other() {
    if !Path::new(QEMU).exists() {
        eprintln!("{QEMU} is not installed: not cross-checked");
        return;
    }
    let dir = TempDir::new();
    let path = dir.file("disk.img", &vec![0; 1 << 20]);
    // (who comes first and second read only?) -> do they go together?
    for (first_ro, second_ro, together) in
        [(false, false, false), (false, true, false), (true, false, false), (true, true, true)]
    {
        let ours = ImageOptions { read_only: first_ro, ..Default::default() };
        let disk = open_image(&path, &ours).unwrap();
        let mut child = qemu(&path, second_ro);
        let started = wait_until_open(&mut child);
        let _ = child.stdin.as_mut().unwrap().write_all(b"quit\n");
        let out = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(started, together, "Ringfort ro={first_ro}, then QEMU ro={second_ro}: {text}");
        assert!(together || text.contains("lock"), "{text}");
        drop(disk);

        let mut child = qemu(&path, first_ro);
        assert!(wait_until_open(&mut child));
        let ours = open_image(&path, &ImageOptions { read_only: second_ro, ..Default::default() });
        child.stdin.as_mut().unwrap().write_all(b"quit\n").unwrap();
        child.wait().unwrap();
        assert_eq!(ours.is_ok(), together, "QEMU ro={first_ro}, then Ringfort ro={second_ro}");
    }
}
