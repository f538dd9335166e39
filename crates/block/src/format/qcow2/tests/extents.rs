//! How much is looked at to say where a disk's pieces lie.

use super::super::extent::LOOKUPS;
use super::*;

const T: u64 = 1 << 40;

fn disk(path: &Path, size: u64, cluster_size: u64, extended_l2: bool) -> Qcow2 {
    make(path, &CreateOptions { size, cluster_size, extended_l2, ..Default::default() });
    open(path)
}

/// The disk's pieces, adjacent ones of a kind joined, and how often an entry was looked up for all of them.
fn pieces(q: &Qcow2) -> (Vec<(u64, u64, ExtentKind)>, u64) {
    let (size, mut at, mut lookups) = (q.size(), 0, 0);
    let mut list: Vec<(u64, u64, ExtentKind)> = Vec::new();
    let mut m = q.meta();
    while at < size {
        let before = lookups;
        let x = q.extent(at, size - at, |g, last| {
            lookups += 1;
            m.run(g, last, &q.file).map(Some)
        });
        let x = x.expect("sound").expect("a piece");
        assert!(lookups - before <= u64::from(LOOKUPS), "{} lookups under one lock", lookups - before);
        assert_eq!(x.offset, at);
        match list.last_mut() {
            Some(l) if l.2 == x.kind && !matches!(x.kind, ExtentKind::Data(_)) => l.1 += x.len,
            _ => list.push((at, x.len, x.kind)),
        }
        at += x.len;
    }
    (list, lookups)
}

#[test]
fn large_and_empty_is_a_step_and_what_is_there_costs_its_own_tables() {
    let dir = Dir::new("large");
    for (i, (size, wide)) in [(16 * T, true), (T, true), (8 * T, false)].into_iter().enumerate() {
        let path = dir.file(&format!("{i}.qcow2"));
        let q = disk(&path, size, 64 << 10, wide);
        assert_eq!(pieces(&q), (vec![(0, size, ExtentKind::Below)], 1));
        assert_eq!(q.status(0, size).expect("known").len, size);

        // Something in the middle and at the end: only their two tables are gone through.
        for at in [size / 2, size - 512] {
            q.write_at(&[SharedSlice::new(&[1; 512])], at).expect("written");
        }
        let (list, lookups) = pieces(&q);
        let unit = if wide { 2048 } else { 64 << 10 };
        let found: Vec<(u64, u64)> =
            list.iter().filter(|x| matches!(x.2, ExtentKind::Data(_))).map(|x| (x.0, x.1)).collect();
        assert_eq!(found, [(size / 2, unit), (size - unit, unit)]);
        assert_eq!(list.iter().map(|x| x.1).sum::<u64>(), size);
        let per = if wide { 4096 } else { 8192 };
        assert!(lookups < 2 * per + 8, "{lookups} lookups");

        // Giving up what is not there is no more work than looking.
        q.discard(0, size).expect("discarded");
        q.flush().expect("flushed");
        assert_eq!(pieces(&q).0, [(0, size, ExtentKind::Below)]);
        q.resize(1 << 20).expect("resized");
        q.close().expect("closed");
        let (ok, said) = qemu_img(&["check", text(&path)]);
        assert!(ok, "{said}");
    }
}

#[test]
fn long_runs_come_in_pieces_of_bounded_work() {
    let dir = Dir::new("bounded");
    let size = 3 * u64::from(LOOKUPS) * 512 + 512;
    let q = disk(&dir.file("a.qcow2"), size, 512, false);
    q.write_zeroes(0, size, false).expect("marked");
    let (list, lookups) = pieces(&q);
    assert_eq!(list, [(0, size, ExtentKind::Zero { host: None })]);
    assert_eq!(lookups, size / 512);
    assert_eq!(q.map(0, size).expect("known").len, u64::from(LOOKUPS) * 512);
    // Readers go on after the end of a piece.
    let mut data = vec![7; size as usize];
    q.read_at(&[SharedSliceMut::new(&mut data)], 0).expect("read");
    assert!(data.iter().all(|b| *b == 0));
}

#[test]
fn subclusters_of_one_kind_are_one_piece() {
    let dir = Dir::new("alike");
    let q = disk(&dir.file("a.qcow2"), 1 << 20, 64 << 10, true);
    let put = |sub: u64, n: u64| {
        q.write_at(&[SharedSlice::new(&vec![1; n as usize * 2048])], sub * 2048).expect("written");
    };
    put(3, 2);
    put(31, 1);
    put(32, 32);
    q.write_zeroes(64 * 2048, 64 << 10, false).expect("marked");
    let (list, lookups) = pieces(&q);
    let data = |x: &(u64, u64, ExtentKind)| matches!(x.2, ExtentKind::Data(_));
    let places: Vec<_> = list.iter().map(|x| (x.0 / 2048, x.1 / 2048, data(x))).collect();
    let tail = (1 << 20) / 2048 - 96;
    // The first table lies between the two clusters that were given out.
    let want = [
        (0, 3, false),
        (3, 2, true),
        (5, 26, false),
        (31, 1, true),
        (32, 32, true),
        (64, 32, false),
        (96, tail, false),
    ];
    assert_eq!(places, want);
    assert!(lookups < 40, "{lookups} lookups");
    // A piece may begin inside a subcluster.
    let x = q.map(4 * 2048 + 100, 1 << 19).expect("known");
    assert_eq!((x.len, data(&(0, 0, x.kind))), (1948, true));
    let x = q.map(6 * 2048 + 100, 5000).expect("known");
    assert_eq!((x.len, x.kind), (5000, ExtentKind::Below));
}
