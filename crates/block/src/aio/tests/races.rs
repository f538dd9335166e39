//! Discards that race with new writes to the same clusters, while commits give freed clusters to others.

use super::*;
use crate::backend::{Located, Piece};
use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

const SECTOR: usize = 512;
const SIZE: usize = 1 << 20;
/// The first half of the disk is raced for; the second half belongs to one thread, which takes what becomes free.
const RACED: usize = SIZE / 2;
const ROUNDS: u32 = 25;

/// Moments, counted by all threads together.
#[derive(Default)]
struct Clock(AtomicUsize);

impl Clock {
    fn now(&self) -> usize {
        self.0.fetch_add(1, Ordering::SeqCst) + 1
    }
}

/// What was last done to a sector. Moments are 0 for never.
#[derive(Clone, Copy, Default)]
struct Last {
    start: usize,
    end: usize,
    version: u32,
}

/// The content of a sector: its number and a version, again and again.
fn stamped(from: usize, sectors: usize, version: u32) -> Vec<u8> {
    let stamp = |s: usize| ((u64::from(version) << 32) | (s as u64 + 1)).to_le_bytes().repeat(SECTOR / 8);
    (from..from + sectors).flat_map(stamp).collect()
}

/// Ranges of `unit` sectors each, which do not overlap, inside the raced half.
fn some_ranges(rng: &mut fastrand::Rng, unit: usize, longest: usize) -> Vec<std::ops::Range<usize>> {
    let mut ranges = Vec::new();
    let mut at = rng.usize(..8);
    let end = RACED / SECTOR / unit;
    while at < end {
        let n = rng.usize(1..=longest).min(end - at);
        ranges.push(at * unit..(at + n) * unit);
        at += n + rng.usize(..16);
    }
    rng.shuffle(&mut ranges);
    ranges
}

/// Start requests at depth and wait for all of them; tells of each range when it was under way.
fn round(
    disk_lane: &mut Lane<Buffer>,
    clock: &Clock,
    rng: &mut fastrand::Rng,
    ranges: &[std::ops::Range<usize>],
    request: impl Fn(&std::ops::Range<usize>) -> (Request, Vec<u8>),
    mut each: impl FnMut(&std::ops::Range<usize>, usize, usize),
) {
    let mut starts = Vec::new();
    for (tag, range) in ranges.iter().enumerate() {
        disk_lane.set_inline(rng.u8(..4) == 0);
        let (request, content) = request(range);
        starts.push(clock.now());
        disk_lane.start(request, Buffer::new(&content, SECTOR, tag));
    }
    disk_lane.drain(|done| {
        done.result.expect("no request fails");
        let tag = done.payload.tag;
        each(&ranges[tag], starts[tag], clock.now());
    });
}

fn bytes_of(range: &std::ops::Range<usize>) -> (u64, u64) {
    ((range.start * SECTOR) as u64, (range.len() * SECTOR) as u64)
}

/// Writes of single sectors and more, each with a version of its own.
fn writer(disk: &Arc<dyn BlockBackend>, aio: Aio, clock: &Clock, turns: SyncSender<()>) -> Vec<Last> {
    let (mut lane, _) = lane(disk, aio);
    let mut rng = fastrand::Rng::with_seed(1);
    let mut last = vec![Last::default(); RACED / SECTOR];
    for version in 1..=ROUNDS {
        turns.send(()).expect("the other goes on");
        let unit = if version % 2 == 0 { 8 } else { 1 };
        let ranges = some_ranges(&mut rng, unit, 40);
        let request = |range: &std::ops::Range<usize>| {
            let (offset, len) = bytes_of(range);
            let request = Request { op: Op::Write { through: false }, offset, len };
            (request, stamped(range.start, range.len(), version))
        };
        round(&mut lane, clock, &mut rng, &ranges, request, |range, start, end| {
            last[range.clone()].fill(Last { start, end, version });
        });
    }
    last
}

/// Discards of whole clusters: a round to each of the writer's, at the same time.
fn discarder(
    disk: &Arc<dyn BlockBackend>,
    aio: Aio,
    clock: &Clock,
    cluster: usize,
    turns: Receiver<()>,
) -> Vec<Last> {
    let (mut lane, _) = lane(disk, aio);
    let mut rng = fastrand::Rng::with_seed(2);
    let mut last = vec![Last::default(); RACED / SECTOR];
    while turns.recv().is_ok() {
        let ranges = some_ranges(&mut rng, cluster / SECTOR, 6);
        let request = |range: &std::ops::Range<usize>| {
            let (offset, len) = bytes_of(range);
            (Request::other(Op::Discard(vec![Range { offset, len, unmap: true }])), Vec::new())
        };
        round(&mut lane, clock, &mut rng, &ranges, request, |range, start, end| {
            for l in &mut last[range.clone()] {
                *l = Last { start: l.start.max(start), end: l.end.max(end), version: 0 };
            }
        });
    }
    last
}

/// Fills and empties its half, and always finds there what it left.
fn neighbour(disk: &Arc<dyn BlockBackend>, over: &AtomicBool) {
    let mut version = 0;
    while !over.load(Ordering::SeqCst) {
        version += 1;
        let ours = stamped(RACED / SECTOR, RACED / SECTOR, version);
        disk.write_at(&[SharedSlice::new(&ours)], RACED as u64).expect("writes");
        assert!(read(&**disk, RACED as u64, RACED) == ours, "what was written is there");
        disk.discard(RACED as u64, RACED as u64).expect("discards");
        assert!(read(&**disk, RACED as u64, RACED).iter().all(|b| *b == 0), "what was discarded is gone");
    }
}

/// Reads: of each sector its own content or nothing.
fn reader(disk: &Arc<dyn BlockBackend>, aio: Aio, over: &AtomicBool) {
    let (mut lane, _) = lane(disk, aio);
    while !over.load(Ordering::SeqCst) {
        for inline in [false, true] {
            lane.set_inline(inline);
            let request = Request { op: Op::Read, offset: 0, len: RACED as u64 };
            lane.start(request, Buffer::new(&vec![0xa5; RACED], RACED / 2, 0));
            lane.drain(|done| {
                done.result.expect("reads");
                for (i, word) in done.payload.bytes().chunks_exact(8).enumerate() {
                    let word = u64::from_le_bytes(word.try_into().expect("eight bytes"));
                    let sector = (i * 8 / SECTOR) as u64;
                    assert!(word == 0 || word & 0xffff_ffff == sector + 1, "sector {sector}: {word:#x}");
                }
            });
        }
    }
}

/// Ends the other threads' work, also when the one that holds it panics.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

fn race(disk: &Arc<dyn BlockBackend>, aio: Aio, cluster: usize) {
    let (clock, over) = (&Clock::default(), &AtomicBool::new(false));
    // Holds nothing: one waits for the other.
    let (to_writer, to_discarder) = sync_channel(0);
    let (written, discarded) = std::thread::scope(|s| {
        let _ends = Ends(over);
        let discards = s.spawn(move || discarder(disk, aio, clock, cluster, to_discarder));
        let others = [
            s.spawn(|| neighbour(disk, over)),
            s.spawn(|| reader(disk, aio, over)),
            s.spawn(|| {
                while !over.load(Ordering::SeqCst) {
                    disk.flush().expect("flushes");
                }
            }),
        ];
        let written = writer(disk, aio, clock, to_writer);
        over.store(true, Ordering::SeqCst);
        others.into_iter().for_each(|t| t.join().expect("no panic"));
        (written, discards.join().expect("no panic"))
    });
    let now = read(&**disk, 0, RACED);
    let (mut kept, mut gone) = (0, 0);
    for (sector, (w, d)) in written.iter().zip(&discarded).enumerate() {
        let there = &now[sector * SECTOR..][..SECTOR];
        let is_new = w.version > 0 && there == stamped(sector, 1, w.version);
        let is_empty = there.iter().all(|b| *b == 0);
        assert!(is_new || is_empty, "sector {sector} holds neither its last write nor nothing");
        // What did not overlap in time has a certain outcome.
        assert!(is_new || w.start <= d.end, "sector {sector} lost a write that came after the discard");
        assert!(is_empty || d.start <= w.end, "sector {sector} outlived a discard that came after");
        kept += usize::from(is_new);
        gone += usize::from(is_empty);
    }
    assert!(kept > 0 && gone > 0, "{kept} sectors hold data, {gone} nothing: both kinds have been seen");
}

#[test]
fn discards_race_with_new_writes_to_the_same_clusters() {
    let dir = TempDir::new();
    let base = dir.file("base.img", &vec![0; SIZE]);
    for aio in kinds() {
        for direct in [false, true] {
            let plain = qcow2(&dir, "plain.qcow2", SIZE as u64, None, false);
            let over = qcow2(&dir, "over.qcow2", SIZE as u64, Some(&base), false);
            let subs = qcow2(&dir, "subs.qcow2", SIZE as u64, Some(&base), true);
            for (path, cluster) in [(plain, 1 << 12), (over, 1 << 12), (subs, 1 << 14)] {
                // A host whose file system has no direct I/O has been told of.
                let opened = open_image(&path, &ImageOptions { direct, ..Default::default() });
                let Ok(disk) = opened.inspect_err(|e| assert!(direct, "{e}")) else { continue };
                race(&disk, aio, cluster);
                drop(disk);
                check(&path);
            }
        }
    }
}

/// A cluster that was discarded is another's only when no request is under way any more that was sent to it.
#[test]
fn a_late_write_does_not_reach_another_clusters_data() {
    const CLUSTER: usize = 1 << 12;
    let dir = TempDir::new();
    let path = qcow2(&dir, "late.qcow2", SIZE as u64, None, false);
    let disk = open_image(&path, &ImageOptions::default()).unwrap();
    disk.write_at(&[SharedSlice::new(&stamped(0, CLUSTER / SECTOR, 1))], 0).unwrap();
    disk.flush().unwrap();
    let mut late = Located::default();
    assert!(
        disk.locate(true, 0, CLUSTER as u64, &mut late).unwrap(),
        "a write in place, as io_uring does it"
    );
    disk.discard(0, CLUSTER as u64).unwrap();
    std::thread::scope(|s| {
        // Would give the cluster back, and waits for the write.
        let flush = s.spawn(|| disk.flush());
        while disk.locate(false, 0, CLUSTER as u64, &mut Located::default()).unwrap() {
            assert!(!flush.is_finished(), "the cluster was given back under a write");
            std::thread::yield_now();
        }
        // New data goes elsewhere, since the write may still come.
        let ours = stamped(RACED / SECTOR, RACED / SECTOR, 2);
        disk.write_at(&[SharedSlice::new(&ours)], RACED as u64).unwrap();
        let [Piece::File { offset, .. }] = late.pieces[..] else { panic!("one piece of a file") };
        std::fs::OpenOptions::new()
            .write(true)
            .open(&path)
            .unwrap()
            .write_all_at(&stamped(0, CLUSTER / SECTOR, 3), offset)
            .unwrap();
        assert!(read(&*disk, RACED as u64, RACED) == ours);
        drop(late);
        flush.join().unwrap().unwrap();
    });
    assert!(read(&*disk, 0, CLUSTER).iter().all(|b| *b == 0), "what was discarded is gone");
    drop(disk);
    check(&path);
}
