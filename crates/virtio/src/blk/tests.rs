use super::*;
use crate::testing::{BUFFERS, Rig};
use crate::{feature, status};
use ringfort_block::{ImageOptions, Limits, SharedSlice, SharedSliceMut, open_image};
use std::io::Write;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::AtomicU32;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const ALL: u64 = F_SEG_MAX | F_BLK_SIZE | F_TOPOLOGY | F_FLUSH | F_DISCARD | F_WRITE_ZEROES;

const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x100;
const DATA: u64 = BUFFERS + 0x1000;

struct TempFile(PathBuf);

impl TempFile {
    fn new(content: &[u8]) -> TempFile {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("ringfort-blk-{}-{n}.img", std::process::id()));
        std::fs::File::create(&path).unwrap().write_all(content).unwrap();
        TempFile(path)
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn disk(content: &[u8], options: BlkOptions, read_only: bool) -> (TempFile, Arc<Blk>) {
    let file = TempFile::new(content);
    let backend = open_image(&file.0, &ImageOptions { read_only, ..Default::default() }).unwrap();
    (file, Arc::new(Blk::new(backend, &options).unwrap()))
}

/// One request with a data buffer; gives status and bytes written.
fn request(rig: &mut Rig, queue: u16, kind: u32, sector: u64, len: u32) -> (u8, u32) {
    let mut header = kind.to_le_bytes().to_vec();
    header.extend_from_slice(&[0; 4]);
    header.extend_from_slice(&sector.to_le_bytes());
    rig.write(HEADER, &header);
    rig.write(STATUS, &[0xee]);
    let mut chain = vec![(HEADER, 16, false)];
    if len > 0 {
        chain.push((DATA, len, matches!(kind, IN | GET_ID)));
    }
    chain.push((STATUS, 1, true));
    let head = rig.send(queue, &chain);
    let (id, written) = rig.used(queue);
    assert_eq!(id, u32::from(head));
    (rig.read(STATUS, 1)[0], written)
}

fn ranges(rig: &Rig, list: &[(u64, u32, u32)]) -> u32 {
    let mut raw = Vec::new();
    for (sector, n, flags) in list {
        raw.extend_from_slice(&sector.to_le_bytes());
        raw.extend_from_slice(&n.to_le_bytes());
        raw.extend_from_slice(&flags.to_le_bytes());
    }
    rig.write(DATA, &raw);
    raw.len() as u32
}

fn config<const N: usize>(rig: &Rig, offset: u64) -> [u8; N] {
    let mut b = [0; N];
    rig.core.read_config(offset, &mut b);
    b
}

#[test]
fn every_request_at_once_and_on_the_thread() {
    for quick in [true, false] {
        let content: Vec<u8> = (0..64 << 10).map(|i| (i / 512) as u8).collect();
        let options = BlkOptions { quick, serial: "RF-0001".into(), ..Default::default() };
        let (file, blk) = disk(&content, options, false);
        let mut rig = Rig::new(blk, ALL);

        assert_eq!(request(&mut rig, 0, IN, 3, 1024), (0, 1025));
        let data = rig.read(DATA, 1024);
        assert!(data[..512].iter().all(|&b| b == 3) && data[512..].iter().all(|&b| b == 4));

        rig.write(DATA, &[0x77; 512]);
        assert_eq!(request(&mut rig, 0, OUT, 9, 512), (0, 1));
        assert_eq!(request(&mut rig, 0, FLUSH, 0, 0), (0, 1));
        assert_eq!(std::fs::read(&file.0).unwrap()[9 * 512..10 * 512], [0x77; 512]);

        assert_eq!(request(&mut rig, 0, GET_ID, 0, 20), (0, 21));
        assert_eq!(rig.read(DATA, 20), b"RF-0001\0\0\0\0\0\0\0\0\0\0\0\0\0");

        let n = ranges(&rig, &[(16, 8, 0), (32, 8, 1)]);
        assert_eq!(request(&mut rig, 0, WRITE_ZEROES, 0, n), (0, 1));
        let now = std::fs::read(&file.0).unwrap();
        assert_eq!(now[16 * 512..24 * 512], [0; 4096]);
        assert_eq!(now[24 * 512..25 * 512], [24; 512]);
        assert_eq!(now[32 * 512..40 * 512], [0; 4096]);
        let n = ranges(&rig, &[(40, 8, 0)]);
        assert_eq!(request(&mut rig, 0, DISCARD, 0, n), (0, 1));
    }
}

/// A disk in memory that counts what is done on the thread that made it.
struct Witness {
    disk: crate::testing::RamDisk,
    home: std::thread::ThreadId,
    here: AtomicU32,
}

impl Witness {
    fn see(&self) {
        self.here.fetch_add(u32::from(std::thread::current().id() == self.home), Ordering::SeqCst);
    }
}

impl BlockBackend for Witness {
    fn size(&self) -> u64 {
        self.disk.size()
    }
    fn read_only(&self) -> bool {
        false
    }
    fn limits(&self) -> Limits {
        self.disk.limits()
    }
    fn read_at(&self, bufs: &[SharedSliceMut<'_>], offset: u64) -> io::Result<()> {
        self.see();
        self.disk.read_at(bufs, offset)
    }
    fn try_read_at(&self, bufs: &[SharedSliceMut<'_>], offset: u64) -> io::Result<bool> {
        self.see();
        self.disk.try_read_at(bufs, offset)
    }
    fn writes_are_cached(&self) -> bool {
        true
    }
    fn write_at(&self, bufs: &[SharedSlice<'_>], offset: u64) -> io::Result<()> {
        self.see();
        self.disk.write_at(bufs, offset)
    }
    fn flush(&self) -> io::Result<()> {
        self.see();
        Ok(())
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.disk.discard(offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.disk.write_zeroes(offset, len, unmap)
    }
}

#[test]
fn short_cached_requests_are_done_by_the_vcpu_and_no_others() {
    let disk = crate::testing::RamDisk::new(1 << 20);
    let home = std::thread::current().id();
    let witness = Arc::new(Witness { disk, home, here: AtomicU32::new(0) });
    let mut rig = Rig::new(Arc::new(Blk::new(witness.clone(), &BlkOptions::default()).unwrap()), F_FLUSH);
    for (kind, len, quick) in [(IN, 512, true), (OUT, 4096, true), (IN, 256 << 10, false), (FLUSH, 0, false)]
    {
        witness.here.store(0, Ordering::SeqCst);
        // The I/O thread may just be looking at the queue; not each time, though.
        for _ in 0..200 {
            assert_eq!(request(&mut rig, 0, kind, 0, len).0, 0);
        }
        let here = witness.here.load(Ordering::SeqCst);
        assert_eq!(here > 0, quick, "{kind} of {len} bytes: {here} of 200");
    }
}

#[test]
fn errors_have_the_right_status() {
    let (_file, blk) = disk(&[1; 8192], BlkOptions::default(), false);
    let mut rig = Rig::new(blk, ALL);
    // Beyond the end, overflowing, and no whole sectors.
    for (kind, sector, len) in
        [(IN, 16, 512), (IN, 15, 1024), (OUT, 16, 512), (IN, u64::MAX, 512), (IN, 0, 100), (OUT, 0, 511)]
    {
        assert_eq!(request(&mut rig, 0, kind, sector, len).0, 1, "{kind} {sector} {len}");
    }
    assert_eq!(request(&mut rig, 0, 99, 0, 0).0, 2);
    // Discard and write-zeroes: unknown flags, unmap on discard, beyond the end, too long, odd length, none.
    for (kind, range, want) in [
        (DISCARD, (0, 1, 2), 2),
        (DISCARD, (0, 1, 1), 2),
        (WRITE_ZEROES, (0, 1, 2), 2),
        (WRITE_ZEROES, (16, 1, 0), 1),
        (DISCARD, (u64::MAX, 1, 0), 1),
        (WRITE_ZEROES, (0, u32::MAX, 0), 1),
    ] {
        let n = ranges(&rig, &[range]);
        assert_eq!(request(&mut rig, 0, kind, 0, n).0, want, "{kind} {range:?}");
    }
    assert_eq!(request(&mut rig, 0, DISCARD, 0, 15).0, 1);
    assert_eq!(request(&mut rig, 0, DISCARD, 0, 0).0, 1);
    // Nothing of a list is done if one of it is wrong.
    let n = ranges(&rig, &[(0, 1, 0), (99, 1, 0)]);
    assert_eq!(request(&mut rig, 0, WRITE_ZEROES, 0, n).0, 1);
    assert_eq!(request(&mut rig, 0, IN, 0, 512).0, 0);
    assert_eq!(rig.read(DATA, 512), [1; 512]);
    assert_eq!(rig.core.status() & status::NEEDS_RESET, 0);
}

#[test]
fn a_read_only_disk_refuses_changes() {
    let (_file, blk) = disk(&[1; 4096], BlkOptions::default(), true);
    assert_eq!(blk.features() & (F_RO | F_DISCARD | F_WRITE_ZEROES), F_RO);
    let mut rig = Rig::new(blk, F_RO | F_FLUSH);
    assert_eq!(request(&mut rig, 0, OUT, 0, 512).0, 1);
    let n = ranges(&rig, &[(0, 1, 0)]);
    assert_eq!(request(&mut rig, 0, DISCARD, 0, n).0, 1);
    assert_eq!(request(&mut rig, 0, WRITE_ZEROES, 0, n).0, 1);
    assert_eq!(request(&mut rig, 0, IN, 0, 512).0, 0);
    assert_eq!(request(&mut rig, 0, FLUSH, 0, 0).0, 0);
}

#[test]
fn a_request_without_header_or_status_needs_a_reset() {
    for buffers in [vec![(HEADER, 15, false), (STATUS, 1, true)], vec![(HEADER, 16, false)]] {
        for quick in [true, false] {
            let (_file, blk) = disk(&[1; 4096], BlkOptions { quick, ..Default::default() }, false);
            let mut rig = Rig::new(blk, ALL);
            rig.send(0, &buffers);
            rig.interrupts.wait(None, 1);
            assert_ne!(rig.core.status() & status::NEEDS_RESET, 0);
            assert!(rig.core.fault().unwrap().contains("virtio-blk: queue 0"));
            // After a reset it works again.
            rig.core.reset();
            assert_eq!(rig.core.status(), 0);
            let memory = rig.memory.clone();
            let device = rig.core.device().clone();
            drop(rig);
            memory_clear(&memory);
            let mut rig = Rig::over(device, memory);
            rig.set_up(ALL | feature::VERSION_1);
            assert_eq!(request(&mut rig, 0, IN, 0, 512).0, 0);
        }
    }
}

fn memory_clear(memory: &ringfort_memory::GuestMemory) {
    use ringfort_memory::{Bytes, GuestAddress};
    memory.write_slice(&[0; 0x10000], GuestAddress(0)).unwrap();
}

#[test]
fn status_may_share_a_buffer_with_data_and_header_with_output() {
    let (file, blk) = disk(&[5; 4096], BlkOptions::default(), false);
    let mut rig = Rig::new(blk, ALL);
    rig.write(HEADER, &[0; 16]);
    rig.send(0, &[(HEADER, 3, false), (HEADER + 3, 13, false), (DATA, 513, true)]);
    assert_eq!(rig.used(0).1, 513);
    let data = rig.read(DATA, 513);
    assert!(data[..512].iter().all(|&b| b == 5) && data[512] == 0);
    let mut out = vec![0; 16 + 512];
    out[0] = OUT as u8;
    out[16..].fill(8);
    rig.write(DATA, &out);
    rig.send(0, &[(DATA, 528, false), (STATUS, 1, true)]);
    rig.used(0);
    assert_eq!(std::fs::read(&file.0).unwrap()[..512], [8; 512]);
}

#[test]
fn many_queues_work_side_by_side_with_event_indexes() {
    let options = BlkOptions { queues: 4, quick: false, ..Default::default() };
    let (_file, blk) = disk(&[3; 1 << 20], options, false);
    assert!(Blk::new(blk.backend.clone(), &BlkOptions { queues: 17, ..Default::default() }).is_err());
    assert_ne!(blk.features() & F_MQ, 0);
    let mut rig = Rig::idle(blk);
    rig.set_up(ALL | F_MQ | feature::COMMON);
    assert_eq!(config::<2>(&rig, 34), [4, 0]);
    rig.write(HEADER, &[0; 16]);
    for round in 0..100u64 {
        for q in 0..4 {
            let at = DATA + u64::from(q) * 0x10000;
            rig.rings[usize::from(q)].set_used_event(round as u16);
            rig.send(q, &[(HEADER, 16, false), (at, 4096, true), (STATUS + u64::from(q), 1, true)]);
        }
        for q in 0..4 {
            assert_eq!(rig.used(q).1, 4097);
        }
    }
    for q in 0..4 {
        assert_eq!(rig.read(DATA + q * 0x10000, 4096), [3; 4096]);
    }
}

#[test]
fn configuration_tells_size_limits_and_topology() {
    let (_file, blk) = disk(&[0; 1 << 20], BlkOptions::default(), false);
    let rig = Rig::new(blk.clone(), ALL);
    assert_eq!(u64::from_le_bytes(config(&rig, 0)), 2048);
    assert_eq!(u32::from_le_bytes(config(&rig, 12)), 254);
    assert_eq!(u32::from_le_bytes(config(&rig, 20)), 512);
    assert_eq!(config::<4>(&rig, 60), [0; 4]);
    assert_eq!(config::<8>(&rig, u64::MAX - 3), [0; 8]);
    let before = (rig.core.generation(), rig.interrupts.count(None));
    blk.resize(2 << 20).unwrap();
    assert_eq!(u64::from_le_bytes(config(&rig, 0)), 4096);
    assert_eq!((rig.core.generation(), rig.interrupts.count(None)), (before.0 + 1, before.1 + 1));
    assert!(blk.resize(100).is_err());
}

/// Counts flushes, and holds reads until it is let go.
struct Slow {
    flushes: AtomicU32,
    gate: Mutex<()>,
}

impl BlockBackend for Slow {
    fn size(&self) -> u64 {
        1 << 20
    }
    fn read_only(&self) -> bool {
        false
    }
    fn limits(&self) -> Limits {
        Limits { block_size: 512, physical_block_size: 4096, discard_granularity: 4096, discard: false }
    }
    fn read_at(&self, bufs: &[SharedSliceMut<'_>], _offset: u64) -> io::Result<()> {
        let _held = self.gate.lock().unwrap();
        bufs.iter().for_each(|b| _ = b.copy_from(&vec![0x42; b.len()]));
        Ok(())
    }
    fn write_at(&self, _bufs: &[SharedSlice<'_>], _offset: u64) -> io::Result<()> {
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }
    fn write_zeroes(&self, _offset: u64, _len: u64, _unmap: bool) -> io::Result<()> {
        Ok(())
    }
}

fn slow() -> Arc<Slow> {
    Arc::new(Slow { flushes: AtomicU32::new(0), gate: Mutex::new(()) })
}

#[test]
fn without_a_write_cache_every_write_is_flushed() {
    let backend = slow();
    let make = || Arc::new(Blk::new(backend.clone(), &BlkOptions::default()).unwrap());
    // A driver that cannot flush.
    let mut rig = Rig::new(make(), 0);
    assert_eq!(request(&mut rig, 0, OUT, 0, 512).0, 0);
    assert_eq!(backend.flushes.load(Ordering::SeqCst), 1);
    // One that can.
    let mut rig = Rig::new(make(), F_FLUSH);
    assert_eq!(request(&mut rig, 0, OUT, 0, 512).0, 0);
    assert_eq!(backend.flushes.load(Ordering::SeqCst), 1);
    // One that switches the cache off.
    let mut rig = Rig::new(make(), F_FLUSH | F_CONFIG_WCE);
    assert_eq!(config::<1>(&rig, 32), [1]);
    rig.core.write_config(32, &[0]);
    assert_eq!(config::<1>(&rig, 32), [0]);
    assert_eq!(request(&mut rig, 0, OUT, 0, 512).0, 0);
    assert_eq!(backend.flushes.load(Ordering::SeqCst), 2);
}

#[test]
fn pause_and_reset_wait_for_the_request_under_way() {
    for reset in [false, true] {
        let backend = slow();
        let held = backend.gate.lock().unwrap();
        let mut rig = Rig::new(Arc::new(Blk::new(backend.clone(), &BlkOptions::default()).unwrap()), F_FLUSH);
        rig.write(HEADER, &[0; 16]);
        let chain = [(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)];
        rig.send(0, &chain);
        std::thread::scope(|s| {
            let t = s.spawn(|| if reset { rig.core.reset() } else { rig.core.pause() });
            drop(held);
            t.join().unwrap();
        });
        // Whether the request was begun or not, memory is left alone from now on.
        let before = (rig.rings[0].used_index(), rig.read(DATA, 512));
        rig.send(0, &chain);
        assert_eq!((rig.rings[0].used_index(), rig.read(DATA, 512)), before);
        if !reset {
            rig.core.resume();
            rig.used(0);
            rig.used(0);
            assert_eq!(rig.read(DATA, 512), [0x42; 512]);
        }
    }
}

#[test]
fn a_saved_disk_goes_on_elsewhere_with_what_was_not_yet_done() {
    let (file, blk) = disk(&[6; 8192], BlkOptions::default(), false);
    let mut rig = Rig::new(blk, ALL);
    assert_eq!(request(&mut rig, 0, IN, 0, 512).0, 0);
    rig.core.pause();
    rig.write(HEADER, &[0; 16]);
    let head = rig.send(0, &[(HEADER, 16, false), (DATA, 1024, true), (STATUS, 1, true)]);
    let state = rig.core.save();
    let Rig { core, mut rings, memory, .. } = rig;
    drop(core);

    let backend = open_image(&file.0, &ImageOptions { lock: false, ..Default::default() }).unwrap();
    let other = Arc::new(Blk::new(backend, &BlkOptions::default()).unwrap());
    let mut rig = Rig::over(other, memory);
    rig.core.load(&state).unwrap();
    assert_eq!(rig.core.save(), state);
    std::mem::swap(&mut rig.rings, &mut rings);
    assert_eq!(rig.rings[0].take_used(), None);
    rig.core.resume();
    assert_eq!(rig.used(0), (head.into(), 1025));

    // What does not fit is refused and changes nothing.
    let (_file, small) = disk(&[6; 4096], BlkOptions::default(), false);
    let e = Rig::idle(small).core.load(&state).unwrap_err();
    assert!(e.contains("4096 bytes"), "{e}");
    let (_file, wide) = disk(&[6; 8192], BlkOptions { queues: 2, ..Default::default() }, false);
    let idle = Rig::idle(wide);
    assert!(idle.core.load(&state).unwrap_err().contains("queues"));
    assert_eq!(idle.core.status(), 0);
    let (_file, fixed) = disk(&[6; 8192], BlkOptions::default(), true);
    assert!(Rig::idle(fixed).core.load(&state).unwrap_err().contains("features"));
}

#[test]
fn a_serial_number_that_is_too_long_is_refused() {
    let e = Blk::new(slow(), &BlkOptions { serial: "x".repeat(21), ..Default::default() }).err().unwrap();
    assert!(e.contains("20 bytes"), "{e}");
}
