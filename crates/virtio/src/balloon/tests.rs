use super::*;
use crate::testing::{BUFFERS, Rig};
use ringfort_memory::RamMap;

#[derive(Default)]
struct Log(Mutex<Vec<(u64, u64)>>);

impl MemoryReleaser for Log {
    fn release(&self, gpa: u64, len: u64) {
        lock(&self.0).push((gpa, len));
    }
}

fn balloon() -> (Arc<Balloon>, Arc<Log>) {
    let log = Arc::new(Log::default());
    (Arc::new(Balloon::new(BalloonOptions::default(), log.clone())), log)
}

const ALL: u64 = F_STATS_VQ | F_DEFLATE_ON_OOM | F_REPORTING;

fn pfns(rig: &Rig, list: &[u32]) -> u32 {
    let raw: Vec<u8> = list.iter().flat_map(|n| n.to_le_bytes()).collect();
    rig.write(BUFFERS, &raw);
    raw.len() as u32
}

#[test]
fn inflated_pages_are_released_together_where_they_touch() {
    let (device, log) = balloon();
    let mut rig = Rig::new(device, ALL);
    let n = pfns(&rig, &[0x300, 0x302, 0x301, 0x301, 0x500, u32::MAX]);
    rig.send(0, &[(BUFFERS, 6, false), (BUFFERS + 6, n - 6, false)]);
    rig.used(0);
    let want = [(0x30_0000, 0x3000), (0x50_0000, 0x1000), (u64::from(u32::MAX) << 12, 0x1000)];
    assert_eq!(*lock(&log.0), want);
    rig.send(1, &[(BUFFERS, n, false)]);
    rig.used(1);
    assert_eq!(lock(&log.0).len(), 3);
}

#[test]
fn a_request_may_hold_many_pages_but_not_any_number() {
    let (device, log) = balloon();
    let mut rig = Rig::new(device, ALL);
    // Half a million equal page numbers, and an odd tail.
    rig.send(0, &[(0x20_0000, 0x20_0003, false)]);
    rig.used(0);
    assert_eq!(lock(&log.0).len() as u64, MOST_PAGES / BATCH as u64);
}

#[test]
fn the_host_gets_the_memory_and_engines_hear_of_it() {
    let memory = ringfort_memory::allocate(&[(0, crate::testing::MEMORY)]).unwrap();
    let ram = Arc::new(RamMap::new(&memory));
    let tracker = ram.slots()[0].tracker.clone();
    let device = Balloon::new(BalloonOptions::default(), Arc::new(HostRelease::new(ram)));
    let mut rig = Rig::over(Arc::new(device), memory);
    rig.set_up(ALL | crate::feature::VERSION_1);
    rig.write(0x40_0000, &[7; 0x3000]);
    let (generation, _) = tracker.begin_code(0x401);
    tracker.set_logging(true);
    // One page of RAM, one beyond its end.
    let n = pfns(&rig, &[0x401, 0x8000]);
    rig.send(0, &[(BUFFERS, n, false)]);
    rig.used(0);
    assert_eq!(rig.read(0x40_0fff, 1), [7]);
    assert_eq!(rig.read(0x40_1000, 0x1000), [0; 0x1000]);
    assert_eq!(rig.read(0x40_2000, 1), [7]);
    assert_ne!(tracker.generation(0x401), generation);
    assert_ne!(tracker.take_dirty()[0x401 / 64] & 1 << (0x401 % 64), 0);
}

#[test]
fn reported_pages_are_released_unless_poisoned() {
    let (device, log) = balloon();
    let mut rig = Rig::new(device, ALL | F_PAGE_POISON);
    let reporting = 3;
    // Whole pages only.
    rig.send(reporting, &[(0x30_0100, 0x2f00, true), (0x40_0000, 0x800, true)]);
    rig.used(reporting);
    assert_eq!(*lock(&log.0), [(0x30_1000, 0x2000)]);
    rig.core.write_config(12, &0xaaaa_aaaau32.to_le_bytes());
    rig.send(reporting, &[(0x50_0000, 0x1000, true)]);
    rig.used(reporting);
    assert_eq!(lock(&log.0).len(), 1);
}

#[test]
fn queues_of_features_not_taken_do_not_exist() {
    let (device, log) = balloon();
    let mut rig = Rig::new(device, F_REPORTING);
    rig.send(2, &[(0x30_0000, 0x1000, true)]);
    rig.used(2);
    assert_eq!(*lock(&log.0), [(0x30_0000, 0x1000)]);
}

fn put_stats(rig: &Rig, entries: &[(u16, u64)]) -> u32 {
    let mut raw = Vec::new();
    for (tag, value) in entries {
        raw.extend_from_slice(&tag.to_le_bytes());
        raw.extend_from_slice(&value.to_le_bytes());
    }
    rig.write(BUFFERS, &raw);
    raw.len() as u32
}

#[test]
fn statistics_come_when_asked_for() {
    let (device, _) = balloon();
    let mut rig = Rig::new(device.clone(), ALL);
    let n = put_stats(&rig, &[(4, 1000), (5, 2000), (77, 1), (4, 1500)]);
    // The driver's first buffer stays with the device until the host asks.
    let head = rig.send(2, &[(BUFFERS, n + 3, false)]);
    rig.core.pause();
    rig.core.resume();
    device.request_stats();
    assert_eq!(rig.used(2), (head.into(), 0));
    assert_eq!(device.stats().get(Stat::Free), Some(1500));
    assert_eq!(device.stats().get(Stat::Total), Some(2000));
    assert_eq!(device.stats().get(Stat::SwapIn), None);
}

#[test]
fn a_held_statistics_buffer_survives_saving() {
    let (device, _) = balloon();
    device.set_target(64 << 20);
    let mut rig = Rig::new(device.clone(), ALL);
    let n = put_stats(&rig, &[(4, 1000)]);
    let head = rig.send(2, &[(BUFFERS, n, false)]);
    rig.core.write_config(4, &5u32.to_le_bytes());
    // Make sure that it was taken: the thread serves the deflate request after the kick for it.
    rig.send(1, &[(BUFFERS, 4, false)]);
    rig.used(1);
    while device.stats().get(Stat::Free).is_none() {
        std::thread::yield_now();
    }
    rig.core.pause();
    let state = rig.core.save();
    let Rig { core, mut rings, memory, .. } = rig;
    drop(core);
    let (other, _) = balloon();
    let mut rig = Rig::over(other.clone(), memory);
    rig.core.load(&state).unwrap();
    std::mem::swap(&mut rig.rings, &mut rings);
    rig.core.resume();
    assert_eq!((other.target(), other.actual()), (64 << 20, 5 * 4096));
    assert_eq!(other.stats().get(Stat::Free), Some(1000));
    other.request_stats();
    assert_eq!(rig.used(2), (head.into(), 0));
}

#[test]
fn the_target_is_told_and_stays_over_a_reset() {
    let (device, _) = balloon();
    let rig = Rig::new(device.clone(), ALL);
    device.set_target((3 << 20) + 5);
    let mut b = [0; 20];
    rig.core.read_config(0, &mut b);
    assert_eq!(u32::from_le_bytes([b[0], b[1], b[2], b[3]]), 768);
    assert_eq!(rig.interrupts.count(None), 1);
    rig.core.write_config(4, &768u32.to_le_bytes());
    assert_eq!(device.actual(), 3 << 20);
    rig.core.reset();
    assert_eq!((device.target(), device.actual()), (3 << 20, 0));
    let plain = BalloonOptions { deflate_on_oom: false, free_page_reporting: false };
    let plain = Balloon::new(plain, Arc::new(Log::default()));
    assert_eq!((plain.features(), plain.queue_sizes().len()), (F_STATS_VQ, 3));
}
