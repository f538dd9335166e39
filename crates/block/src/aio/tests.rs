mod races;

use super::*;
use crate::format::qcow2::{CreateOptions, create};
use crate::node::{Fault, Faulty, Joint, Throttle, ThrottleConfig, Throttled};
use crate::storage::tests::{TempDir, read};
use crate::{BlockBackend, Format, ImageOptions, Limits, Overlay, SharedSlice, SharedSliceMut, open_image};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// A buffer that may be written through a shared reference, as a guest's memory is.
struct Buffer {
    data: Box<[std::cell::UnsafeCell<u8>]>,
    /// Where the buffer is cut in two.
    cut: usize,
    /// Alignment for direct I/O: offset of the first byte used.
    skip: usize,
    len: usize,
    tag: usize,
}

// SAFETY: one thread at a time uses it: the test before and after, the lane between.
unsafe impl Send for Buffer {}

impl Buffer {
    fn new(content: &[u8], cut: usize, tag: usize) -> Buffer {
        let data: Box<[_]> = (0..content.len() + 4096).map(|_| std::cell::UnsafeCell::new(0)).collect();
        let skip = data.as_ptr().align_offset(4096);
        let b = Buffer { data, cut: cut.min(content.len()), skip, len: content.len(), tag };
        for (cell, byte) in b.data[skip..].iter().zip(content) {
            // SAFETY: nobody else has it yet.
            unsafe { *cell.get() = *byte };
        }
        b
    }

    fn base(&self) -> *mut u8 {
        self.data[self.skip..].as_ptr() as *mut u8
    }

    fn bytes(&self) -> Vec<u8> {
        // SAFETY: the lane has given it back.
        unsafe { std::slice::from_raw_parts(self.base(), self.len) }.to_vec()
    }
}

impl Payload for Buffer {
    fn targets(&self) -> Vec<SharedSliceMut<'_>> {
        // SAFETY: both parts lie in the buffer, whose cells may be written through `&self`.
        unsafe {
            vec![
                SharedSliceMut::from_raw(self.base(), self.cut),
                SharedSliceMut::from_raw(self.base().add(self.cut), self.len - self.cut),
            ]
        }
    }
    fn sources(&self) -> Vec<SharedSlice<'_>> {
        // SAFETY: as above.
        unsafe {
            vec![
                SharedSlice::from_raw(self.base(), self.cut),
                SharedSlice::from_raw(self.base().add(self.cut), self.len - self.cut),
            ]
        }
    }
}

fn event() -> Arc<OwnedFd> {
    // SAFETY: makes a descriptor or fails.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: fresh, and nobody else's.
    Arc::new(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn lane(disk: &Arc<dyn BlockBackend>, aio: Aio) -> (Lane<Buffer>, Arc<OwnedFd>) {
    let wake = event();
    (Lane::new(disk.clone(), aio, wake.clone()), wake)
}

fn qcow2(dir: &TempDir, name: &str, size: u64, backing: Option<&Path>, extended: bool) -> PathBuf {
    let path = dir.0.join(name);
    let options = CreateOptions {
        size,
        backing: backing.map(|b| b.to_str().unwrap().to_owned()),
        backing_format: backing.map(|_| "raw".to_owned()),
        extended_l2: extended,
        cluster_size: if extended { 1 << 14 } else { 1 << 12 },
        ..CreateOptions::default()
    };
    let storage = crate::storage::NewFile::create(&path).unwrap();
    create(&storage.storage().unwrap(), &options).unwrap();
    storage.publish().unwrap();
    path
}

/// Wait until an event descriptor says that something may be done.
fn wait_for_any(lanes: &mut [(Lane<Buffer>, Arc<OwnedFd>)]) {
    let poll =
        |(_, fd): &(_, Arc<OwnedFd>)| libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let mut fds: Vec<libc::pollfd> = lanes.iter().map(poll).collect();
    lanes.iter_mut().for_each(|(lane, _)| lane.submit());
    // What was done at once tells nobody: hence the limit.
    // SAFETY: the structures live through the call; then eight bytes to the stack.
    unsafe {
        libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, 5);
        for f in fds.iter().filter(|f| f.revents != 0) {
            let mut n = [0u8; 8];
            libc::read(f.fd, n.as_mut_ptr().cast(), 8);
        }
    }
}

/// Random requests at depth, against a plain vector. Requests under way never overlap one that changes what they touch,
/// so that the outcome is certain; everything else is up to the lane.
fn hammer(
    lanes: &mut [(Lane<Buffer>, Arc<OwnedFd>)],
    disk: &Arc<dyn BlockBackend>,
    model: &mut [u8],
    seed: u64,
    unit: usize,
) {
    struct Under {
        range: std::ops::Range<usize>,
        change: Option<Vec<u8>>,
        want: Option<Vec<u8>>,
        vague: bool,
    }
    let mut rng = fastrand::Rng::with_seed(seed);
    let size = model.len();
    let mut under: Vec<Option<Under>> = Vec::new();
    let settle = |done: Done<Buffer>, under: &mut Vec<Option<Under>>, model: &mut [u8]| {
        done.result.unwrap();
        let u = under[done.payload.tag].take().expect("each request completes once");
        if let Some(want) = u.want {
            assert!(done.payload.bytes() == want, "request {}: {:?}", done.payload.tag, u.range);
        }
        if u.vague {
            // After a discard: what is there, if it was there or is zero.
            let now = read(&**disk, u.range.start as u64, u.range.len());
            for (m, n) in model[u.range.clone()].iter_mut().zip(&now) {
                assert!(*n == *m || *n == 0, "discard made data up");
                *m = *n;
            }
        } else if let Some(change) = u.change {
            model[u.range].copy_from_slice(&change);
        }
    };
    for step in 0..1200 {
        let at = rng.usize(..size) / unit * unit;
        let len = (rng.usize(..(size - at).min(24_000) + 1)).div_ceil(unit) * unit;
        let range = at..(at + len).min(size);
        let len = range.len();
        let kind = rng.u8(..16);
        let overlaps = |u: &Under| {
            u.range.start < range.end
                && range.start < u.range.end
                && (u.change.is_some() || u.vague || kind >= 7)
        };
        let which = rng.usize(..lanes.len());
        while under.iter().flatten().any(overlaps) || under.iter().flatten().count() > 40 {
            wait_for_any(lanes);
            for (lane, _) in lanes.iter_mut() {
                while let Some(done) = lane.poll() {
                    settle(done, &mut under, model);
                }
            }
        }
        let lane = &mut lanes[which].0;
        lane.set_inline(rng.u8(..4) == 0);
        let tag = under.len();
        let cut = rng.usize(..len + 1) / unit * unit;
        let ranges = || {
            let middle = cut as u64;
            vec![
                Range { offset: at as u64, len: middle, unmap: step % 2 == 0 },
                Range { offset: at as u64 + middle, len: len as u64 - middle, unmap: step % 3 == 0 },
            ]
        };
        let (op, content) = match kind {
            0..7 => (Op::Read, vec![0xa5; len]),
            7..13 => {
                let fill = rng.u8(..);
                let data = (0..len).map(|i| fill.wrapping_add((i / 7) as u8)).collect();
                (Op::Write { through: kind == 12 }, data)
            }
            13 => (Op::Zeroes { ranges: ranges(), through: rng.bool() }, Vec::new()),
            14 => (Op::Discard(ranges()), Vec::new()),
            _ => (Op::Flush, Vec::new()),
        };
        let here = Under {
            range: if op == Op::Flush { 0..0 } else { range.clone() },
            change: match &op {
                Op::Write { .. } => Some(content.clone()),
                Op::Zeroes { .. } => Some(vec![0; len]),
                _ => None,
            },
            want: (op == Op::Read).then(|| model[range.clone()].to_vec()),
            vague: matches!(op, Op::Discard(_)),
        };
        under.push(Some(here));
        let request = match op {
            Op::Read | Op::Write { .. } => Request { op, offset: at as u64, len: len as u64 },
            other => Request::other(other),
        };
        lane.start(request, Buffer::new(&content, cut, tag));
        if rng.bool() {
            lane.submit();
        }
        if rng.u8(..3) == 0 {
            while let Some(done) = lane.poll() {
                settle(done, &mut under, model);
            }
        }
    }
    lanes.iter_mut().for_each(|(lane, _)| lane.quiesce());
    for (lane, _) in lanes.iter_mut() {
        lane.drain(|done| settle(done, &mut under, model));
        assert!(lane.is_empty());
    }
    assert!(under.iter().all(Option::is_none));
    disk.flush().unwrap();
    assert!(read(&**disk, 0, size) == model);
}

fn kinds() -> Vec<Aio> {
    if io_uring_available() {
        vec![Aio::Threads, Aio::IoUring]
    } else {
        eprintln!("skipped: this host gives no io_uring; threads only");
        vec![Aio::Threads]
    }
}

fn check(path: &Path) {
    let out = std::process::Command::new("qemu-img").arg("check").arg(path).output();
    match out {
        Ok(o) => assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stdout)),
        Err(e) => eprintln!("skipped: qemu-img is not installed ({e}): image not checked by it"),
    }
}

#[test]
fn random_requests_at_depth_match_a_model() {
    let dir = TempDir::new();
    let size = 256 << 10;
    let base = dir.file("base.img", &vec![0x22; size]);
    let mut seed = 1;
    for aio in kinds() {
        for direct in [false, true] {
            let open = |path: &Path| {
                open_image(path, &ImageOptions { direct, ..Default::default() })
                    .inspect_err(|e| assert!(direct, "{e}"))
                    .ok()
            };
            let raw = dir.file("raw.img", &vec![0x11; size]);
            let plain = qcow2(&dir, "plain.qcow2", size as u64, None, false);
            let over = qcow2(&dir, "over.qcow2", size as u64, Some(&base), false);
            let subs = qcow2(&dir, "subs.qcow2", size as u64, Some(&base), true);
            for (path, fill) in [(raw, 0x11), (plain, 0), (over, 0x22), (subs, 0x22)] {
                seed += 1;
                // A host whose file system has no direct I/O has been told of.
                let Some(disk) = open(&path) else { continue };
                let mut lanes = [lane(&disk, aio), lane(&disk, aio)];
                let unit = if seed % 2 == 0 { 512 } else { 4096 };
                hammer(&mut lanes, &disk, &mut vec![fill; size], seed, unit);
                lanes.iter_mut().for_each(|(lane, _)| lane.quiesce());
                drop((lanes, disk));
                if path.extension().is_some_and(|e| e == "qcow2") {
                    check(&path);
                }
            }
        }
        let below = open_image(&base, &ImageOptions { read_only: true, ..Default::default() }).unwrap();
        let disk: Arc<dyn BlockBackend> = Arc::new(Overlay::new(below, &dir.0).unwrap());
        let disk: Arc<dyn BlockBackend> = Arc::new(Joint::new(disk));
        let mut lanes = [lane(&disk, aio), lane(&disk, aio)];
        hammer(&mut lanes, &disk, &mut vec![0x22; size], seed, 512);
    }
}

#[test]
fn a_guarded_raw_image_keeps_its_format_at_depth() {
    let dir = TempDir::new();
    let path = dir.file("disk.img", &[0; 8192]);
    let disk = open_image(&path, &ImageOptions::default()).unwrap();
    for aio in kinds() {
        let (mut lane, _) = lane(&disk, aio);
        for inline in [true, false] {
            lane.set_inline(inline);
            let mut evil = vec![0; 4096];
            evil[..4].copy_from_slice(b"QFI\xfb");
            let request = Request { op: Op::Write { through: false }, offset: 0, len: 4096 };
            lane.start(request.clone(), Buffer::new(&evil, 2, 0));
            lane.drain(|done| assert!(done.result.is_err()));
            lane.start(request, Buffer::new(&[7; 4096], 512, 0));
            lane.drain(|done| done.result.unwrap());
        }
    }
    drop(disk);
    assert_eq!(std::fs::read(&path).unwrap()[..512], [7; 512]);
    let disk = open_image(&path, &ImageOptions { format: Some(Format::Raw), ..Default::default() }).unwrap();
    assert_eq!(read(&*disk, 0, 1), [7]);
}

#[test]
fn faults_are_told_and_pass() {
    let dir = TempDir::new();
    let path = dir.file("disk.img", &[0; 65536]);
    let below = open_image(&path, &ImageOptions::default()).unwrap();
    let faulty = Arc::new(Faulty::new(below));
    let disk: Arc<dyn BlockBackend> = faulty.clone();
    for aio in kinds() {
        let (mut lane, _) = lane(&disk, aio);
        faulty.set(Some(Fault { after: 1, times: 2, ..Fault::no_space() }));
        let mut results = Vec::new();
        for tag in 0..4 {
            lane.start(
                Request { op: Op::Write { through: false }, offset: 0, len: 512 },
                Buffer::new(&[tag as u8; 512], 0, tag),
            );
            lane.drain(|done| results.push(done.result.err().and_then(|e| e.raw_os_error())));
        }
        assert_eq!(results, [None, Some(libc::ENOSPC), Some(libc::ENOSPC), None]);
        faulty.set(Some(Fault { flush: true, errno: libc::EIO, ..Fault::no_space() }));
        lane.start(Request::other(Op::Flush), Buffer::new(&[], 0, 0));
        lane.drain(|done| assert_eq!(done.result.unwrap_err().raw_os_error(), Some(libc::EIO)));
        faulty.set(None);
    }
}

/// A disk whose reads wait until they are let go.
struct Stuck {
    inside: AtomicUsize,
    open: Mutex<bool>,
    opened: Condvar,
}

impl BlockBackend for Stuck {
    fn size(&self) -> u64 {
        1 << 20
    }
    fn read_only(&self) -> bool {
        false
    }
    fn limits(&self) -> Limits {
        Limits { block_size: 512, physical_block_size: 512, discard_granularity: 512, discard: false }
    }
    fn read_at(&self, _: &[SharedSliceMut<'_>], _: u64) -> io::Result<()> {
        self.inside.fetch_add(1, Ordering::SeqCst);
        let mut open = self.open.lock().unwrap();
        while !*open {
            open = self.opened.wait(open).unwrap();
        }
        Ok(())
    }
    fn write_at(&self, _: &[SharedSlice<'_>], _: u64) -> io::Result<()> {
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn slow_requests_are_under_way_together_and_the_descriptor_tells_of_their_end() {
    let stuck =
        Arc::new(Stuck { inside: AtomicUsize::new(0), open: Mutex::new(false), opened: Condvar::new() });
    let disk: Arc<dyn BlockBackend> = stuck.clone();
    let (mut lane, wake) = lane(&disk, Aio::Threads);
    for tag in 0..16 {
        lane.start(Request { op: Op::Read, offset: 0, len: 512 }, Buffer::new(&[0; 512], 0, tag));
    }
    let deadline = Instant::now() + Duration::from_secs(60);
    while stuck.inside.load(Ordering::SeqCst) < 16 {
        assert!(Instant::now() < deadline, "{} of 16", stuck.inside.load(Ordering::SeqCst));
        std::thread::yield_now();
    }
    assert!(lane.poll().is_none());
    *stuck.open.lock().unwrap() = true;
    stuck.opened.notify_all();
    let mut seen = 0;
    while seen < 16 {
        let mut p = libc::pollfd { fd: wake.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one structure on the stack; then eight bytes to the stack.
        unsafe {
            assert_eq!(libc::poll(&mut p, 1, 60_000), 1, "no wake after {seen}");
            let mut n = [0u8; 8];
            libc::read(wake.as_raw_fd(), n.as_mut_ptr().cast(), 8);
        }
        while lane.poll().is_some() {
            seen += 1;
        }
    }
    assert!(lane.is_empty());
}

#[test]
fn limits_of_speed_hold_requests_back_and_a_drain_lets_them_go() {
    let dir = TempDir::new();
    let path = dir.file("disk.img", &[0; 65536]);
    let below = open_image(&path, &ImageOptions::default()).unwrap();
    let rule = crate::node::Bucket { avg: 200, ..Default::default() };
    let config = ThrottleConfig { iops: rule, ..Default::default() };
    let disk: Arc<dyn BlockBackend> = Arc::new(Throttled::new(below, Arc::new(Throttle::new(&config))));
    let (mut lane, _) = lane(&disk, Aio::best());
    let start = Instant::now();
    // Twenty go at once (a tenth of a second's worth), the others at 5 ms each.
    for tag in 0..60 {
        lane.start(Request { op: Op::Read, offset: 0, len: 512 }, Buffer::new(&[0; 512], 0, tag));
    }
    let mut order = Vec::new();
    while order.len() < 50 {
        lane.wait();
        while let Some(done) = lane.poll() {
            order.push(done.payload.tag);
        }
    }
    assert!(start.elapsed() >= Duration::from_millis(140), "{:?}", start.elapsed());
    assert!(order.is_sorted(), "{order:?}");
    lane.drain(|done| order.push(done.payload.tag));
    assert_eq!(order.len(), 60);
}

#[test]
fn a_joint_changes_the_disk_under_requests_at_depth() {
    let dir = TempDir::new();
    let (a, b) = (dir.file("a.img", &vec![1; 1 << 20]), dir.file("b.img", &vec![2; 1 << 20]));
    let [a, b] = [a, b].map(|p| open_image(&p, &ImageOptions::default()).unwrap());
    let joint = Arc::new(Joint::new(a));
    let disk: Arc<dyn BlockBackend> = joint.clone();
    for aio in kinds() {
        let (mut lane, _) = lane(&disk, aio);
        lane.set_inline(false);
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|s| {
            let swaps = s.spawn(|| {
                let mut other = b.clone();
                let mut n = 0;
                while !stop.load(Ordering::SeqCst) || n < 4 {
                    let new = other.clone();
                    other = joint.exchange(|_| Ok(new)).unwrap();
                    n += 1;
                }
            });
            for round in 0..200 {
                for tag in 0..8 {
                    let request = Request { op: Op::Read, offset: tag * 4096, len: 4096 };
                    lane.start(request, Buffer::new(&[9; 4096], round, tag as usize));
                }
                lane.drain(|done| {
                    done.result.unwrap();
                    let bytes = done.payload.bytes();
                    assert!(bytes[0] != 9 && bytes.iter().all(|x| *x == bytes[0]));
                });
            }
            stop.store(true, Ordering::SeqCst);
            swaps.join().unwrap();
        });
    }
}
