use super::*;
use crate::testing::{Ring, fuzz_queue};
use ringfort_memory::{Bytes, GuestAddress};
use ringfort_memory::{GuestMemory, allocate};

fn memory() -> GuestMemory {
    allocate(&[(0, 0x10_0000), (0x10_0000, 0x10_0000)]).unwrap()
}

fn pair(size: u16, event_idx: bool) -> (Ring, Queue, Arc<crate::testing::Recorder>) {
    let mut ring = Ring::new(&memory(), 0x1000, size);
    ring.layout.event_idx = event_idx;
    let (queue, interrupts) = ring.device(QueueProgress::default()).unwrap();
    (ring, queue, interrupts)
}

#[test]
fn chains_arrive_as_the_driver_built_them() {
    let (mut ring, mut queue, interrupts) = pair(8, false);
    ring.memory.write_slice(b"hello world", GuestAddress(0x8000)).unwrap();
    let head = ring.add(&[(0x8000, 5, false), (0x8005, 6, false), (0x9000, 4, true), (0xa000, 4, true)]);
    let chain = queue.pop().unwrap().unwrap();
    assert_eq!((chain.head(), chain.readable(), chain.writable()), (head, 11, 8));
    let mut text = [0; 16];
    assert_eq!(chain.read(3, &mut text), 8);
    assert_eq!(&text[..8], b"lo world");
    assert_eq!(chain.read_array::<4>(8), None);
    assert_eq!(chain.write(2, b"abcdefgh"), 6);
    queue.complete(chain, 8);
    assert_eq!(ring.take_used(), Some((head.into(), 8)));
    let mut back = [0; 4];
    ring.memory.read_slice(&mut back, GuestAddress(0x9000)).unwrap();
    assert_eq!(&back, b"\0\0ab");
    ring.memory.read_slice(&mut back, GuestAddress(0xa000)).unwrap();
    assert_eq!(&back, b"cdef");
    assert_eq!(interrupts.count(Some(0)), 1);
    assert!(queue.pop().unwrap().is_none());
}

#[test]
fn indices_and_rings_wrap() {
    let mut ring = Ring::new(&memory(), 0x1000, 4);
    let progress = ring.start_at(0xfffd);
    let (mut queue, _) = ring.device(progress).unwrap();
    for i in 0..50u32 {
        let head = ring.add(&[(0x8000 + u64::from(i), 1, true), (0x9000, 1, true), (0x9001, 1, true)]);
        let chain = queue.pop().unwrap().unwrap();
        assert_eq!(chain.writable(), 3);
        queue.complete(chain, i);
        assert_eq!(ring.take_used(), Some((head.into(), i)));
    }
}

#[test]
fn a_buffer_may_span_two_pieces_of_ram_but_no_hole() {
    let (mut ring, mut queue, _) = pair(8, false);
    ring.add(&[(0xf_fffe, 4, true)]);
    let chain = queue.pop().unwrap().unwrap();
    assert_eq!((chain.writable(), chain.write_slices(0, 4).len()), (4, 2));
    assert_eq!(chain.write(0, b"wxyz"), 4);
    let mut back = [0; 2];
    ring.memory.read_slice(&mut back, GuestAddress(0x10_0000)).unwrap();
    assert_eq!(&back, b"yz");
    ring.add(&[(0x1f_fffe, 4, true)]);
    assert!(matches!(queue.pop(), Err(QueueError::Buffer { .. })));
}

#[test]
fn indirect_tables() {
    let (mut ring, mut queue, _) = pair(4, false);
    // More buffers than the ring has entries, and a table that is not aligned.
    let many: Vec<_> = (0..300u64).map(|i| (0x8000 + i, 1, i >= 100)).collect();
    ring.add_indirect(0x4001, &many);
    let chain = queue.pop().unwrap().unwrap();
    assert_eq!((chain.readable(), chain.writable()), (100, 200));

    // A direct descriptor before the indirect one.
    ring.write_desc(0x6000, 0, (0x8000, 7, true), 0, 0);
    ring.write_desc(0x1000, 2, (0x8000, 3, false), 1, 3);
    ring.write_desc(0x1000, 3, (0x6000, 16, false), 4, 0);
    ring.offer(2);
    let chain = queue.pop().unwrap().unwrap();
    assert_eq!((chain.readable(), chain.writable()), (3, 7));
}

#[test]
fn hostile_descriptors_are_refused() {
    type Spoil = fn(&mut Ring);
    let cases: [(Spoil, QueueError); 13] = [
        // A loop of two.
        (
            |r| {
                r.write_desc(0x1000, 0, (0x8000, 1, false), 1, 1);
                r.write_desc(0x1000, 1, (0x8000, 1, false), 1, 0);
                r.offer(0);
            },
            QueueError::TooLong(0),
        ),
        (|r| r.offer(8), QueueError::Index(8)),
        (
            |r| {
                r.write_desc(0x1000, 0, (0x8000, 1, false), 1, 999);
                r.offer(0);
            },
            QueueError::Index(999),
        ),
        (|r| r.set_avail_index(9), QueueError::AvailIndex { found: 9, expected: 0 }),
        (|r| r.set_avail_index(0xffff), QueueError::AvailIndex { found: 0xffff, expected: 0 }),
        (|r| _ = r.add(&[(0x20_0000, 1, false)]), QueueError::Buffer { address: 0x20_0000, len: 1 }),
        (|r| _ = r.add(&[(u64::MAX, 2, true)]), QueueError::Buffer { address: u64::MAX, len: 2 }),
        (|r| _ = r.add(&[(0, u32::MAX, true)]), QueueError::Buffer { address: 0, len: u32::MAX }),
        (|r| _ = r.add(&[(0x8000, 1, true), (0x8000, 1, false)]), QueueError::Order(0)),
        // Indirect: no whole entries, empty, with a next, nested.
        (
            |r| {
                r.write_desc(0x1000, 0, (0x8000, 17, false), 4, 0);
                r.offer(0);
            },
            QueueError::Indirect(0),
        ),
        (
            |r| {
                r.write_desc(0x1000, 0, (0x8000, 0, false), 4, 0);
                r.offer(0);
            },
            QueueError::Indirect(0),
        ),
        (
            |r| {
                r.write_desc(0x1000, 0, (0x8000, 16, false), 5, 1);
                r.offer(0);
            },
            QueueError::Indirect(0),
        ),
        (
            |r| {
                r.write_desc(0x8000, 0, (0x8000, 16, false), 4, 0);
                r.write_desc(0x1000, 0, (0x8000, 16, false), 4, 0);
                r.offer(0);
            },
            QueueError::Indirect(0),
        ),
    ];
    for (i, (spoil, want)) in cases.into_iter().enumerate() {
        let (mut ring, mut queue, _) = pair(8, false);
        spoil(&mut ring);
        assert_eq!(queue.pop().err(), Some(want), "case {i}");
    }
    // A loop inside an indirect table, and a table partly outside RAM.
    let (mut ring, mut queue, _) = pair(8, false);
    ring.write_desc(0x8000, 0, (0x9000, 1, false), 1, 0);
    ring.write_desc(0x1000, 0, (0x8000, 32, false), 4, 0);
    ring.offer(0);
    assert_eq!(queue.pop().err(), Some(QueueError::TooLong(0)));
    let (mut ring, mut queue, _) = pair(8, false);
    ring.write_desc(0x1000, 0, (0x1f_fff8, 16, false), 4, 0);
    ring.offer(0);
    assert!(matches!(queue.pop(), Err(QueueError::Buffer { .. })));
    // Indirect without the feature.
    let mut ring = Ring::new(&memory(), 0x1000, 8);
    ring.layout.indirect = false;
    let (mut queue, _) = ring.device(QueueProgress::default()).unwrap();
    ring.add_indirect(0x8000, &[(0x9000, 1, false)]);
    assert_eq!(queue.pop().err(), Some(QueueError::Indirect(0)));
}

#[test]
fn more_than_four_gigabytes_in_one_chain_are_too_much() {
    let memory = allocate(&[(0, 8 << 20)]).unwrap();
    let mut ring = Ring::new(&memory, 0x1000, 1024);
    let (mut queue, _) = ring.device(QueueProgress::default()).unwrap();
    let many = vec![(0, 8 << 20, true); 513];
    ring.add(&many);
    assert_eq!(queue.pop().err(), Some(QueueError::TooLong(0)));
}

#[test]
fn wrong_rings_are_refused_at_activation() {
    let good = Ring::new(&memory(), 0x1000, 8).layout;
    let bad = [
        QueueLayout { size: 0, ..good },
        QueueLayout { size: 7, ..good },
        QueueLayout { size: 0xffff, ..good },
        QueueLayout { desc: good.desc + 8, ..good },
        QueueLayout { avail: good.avail + 1, ..good },
        QueueLayout { used: good.used + 2, ..good },
        QueueLayout { desc: 0x20_0000, ..good },
        QueueLayout { desc: 0x20_0000 - 16, ..good },
        QueueLayout { used: u64::MAX - 3, ..good },
        // Rings must not span two pieces: their host addresses would not be contiguous.
        QueueLayout { avail: 0xf_fffe, ..good },
    ];
    for layout in bad {
        let ring = Ring { layout, ..Ring::new(&memory(), 0x1000, 8) };
        assert!(ring.device(QueueProgress::default()).is_err(), "{layout:?}");
    }
}

#[test]
fn interrupts_are_suppressed_by_flag_and_by_event_index() {
    let (mut ring, mut queue, interrupts) = pair(8, false);
    ring.set_avail_flags(1);
    ring.add(&[(0x8000, 1, true)]);
    let c = queue.pop().unwrap().unwrap();
    queue.complete(c, 0);
    assert_eq!(interrupts.count(Some(0)), 0);

    let mut ring = Ring::new(&memory(), 0x1000, 8);
    ring.layout.event_idx = true;
    let progress = ring.start_at(0xfffe);
    let (mut queue, interrupts) = ring.device(QueueProgress { signalled: Some(0xfffe), ..progress }).unwrap();
    // Wanted when the entry with index 1 is used: the fourth.
    ring.set_used_event(1);
    let mut seen = Vec::new();
    for _ in 0..6 {
        ring.add(&[(0x8000, 1, true)]);
        let c = queue.pop().unwrap().unwrap();
        queue.complete(c, 0);
        seen.push(interrupts.count(Some(0)));
    }
    assert_eq!(seen, [0, 0, 0, 1, 1, 1]);
    // Several at once that step over the event index.
    ring.set_used_event(5);
    for _ in 0..3 {
        ring.add(&[(0x8000, 1, true)]);
        let c = queue.pop().unwrap().unwrap();
        queue.push(c, 0);
    }
    queue.signal();
    assert_eq!(interrupts.count(Some(0)), 2);
    queue.signal();
    assert_eq!(interrupts.count(Some(0)), 2);
}

#[test]
fn notifications_are_asked_for_and_refused() {
    let (mut ring, mut queue, _) = pair(8, false);
    queue.disable_notifications();
    assert_eq!(ring.used_flags(), 1);
    ring.add(&[(0x8000, 1, true)]);
    assert!(queue.enable_notifications(), "work came meanwhile");
    assert_eq!(ring.used_flags(), 0);
    queue.pop().unwrap().unwrap();
    assert!(!queue.enable_notifications());

    let (mut ring, mut queue, _) = pair(8, true);
    ring.add(&[(0x8000, 1, true)]);
    ring.add(&[(0x8000, 1, true)]);
    queue.pop().unwrap().unwrap();
    assert!(queue.enable_notifications());
    assert_eq!(ring.avail_event(), 1);
    queue.pop().unwrap().unwrap();
    assert!(!queue.enable_notifications());
    assert_eq!(ring.avail_event(), 2);
}

#[test]
fn a_chain_put_back_comes_again() {
    let (mut ring, mut queue, _) = pair(8, false);
    ring.add(&[(0x8000, 1, true)]);
    let c = queue.pop().unwrap().unwrap();
    queue.undo_pop(c);
    assert!(queue.has_work());
    assert_eq!(queue.pop().unwrap().unwrap().head(), 0);
    assert!(!queue.has_work());
}

#[test]
fn device_writes_reach_the_page_tracker() {
    let (mut ring, mut queue, _) = pair(8, false);
    let map = RamMap::new(&ring.memory);
    let tracker = map.slots()[0].tracker.clone();
    let (data, _) = tracker.begin_code(8);
    let (used, _) = tracker.begin_code(1);
    ring.memory.write_slice(&[0], GuestAddress(0x3000)).unwrap();
    tracker.set_logging(true);
    ring.add(&[(0x8ffe, 4, true)]);
    tracker.take_dirty();
    tracker.begin_code(1);
    let used_before = tracker.generation(1);
    let c = queue.pop().unwrap().unwrap();
    assert_eq!(c.write(1, &[9]), 1);
    assert_eq!(tracker.take_dirty()[0], 1 << 8, "only the page that was written");
    c.mark_written(0, 4);
    assert_eq!(tracker.take_dirty()[0], 1 << 8 | 1 << 9);
    assert_ne!(tracker.generation(8), data);
    queue.complete(c, 1);
    assert_eq!(tracker.take_dirty()[0], 1 << 1, "the used ring");
    assert_ne!(tracker.generation(1), used_before);
    assert_ne!(tracker.generation(1), used);
}

#[test]
fn a_closed_gate_hands_out_nothing() {
    let mut ring = Ring::new(&memory(), 0x1000, 8);
    let gate = Arc::new(Gate::default());
    let ram = Arc::new(RamMap::new(&ring.memory));
    let mut queue = Queue::new(
        &ram,
        &ring.layout,
        QueueProgress::default(),
        0,
        gate.clone(),
        Arc::new(crate::testing::Recorder::default()),
    )
    .unwrap();
    ring.add(&[(0x8000, 1, true)]);
    gate.set_paused(true);
    assert!(queue.pop().unwrap().is_none() && !queue.has_work());
    gate.set_paused(false);
    gate.set_dma(false);
    assert!(queue.pop().unwrap().is_none());
    gate.set_dma(true);
    assert!(queue.pop().unwrap().is_some());
}

#[test]
fn random_rings_never_crash() {
    let mut rng = fastrand::Rng::with_seed(20_26);
    for round in 0..3000 {
        let mut data = vec![0u8; rng.usize(..4000)];
        if round % 3 == 0 {
            rng.fill(&mut data);
        } else {
            // Mostly plausible rings with a few wild bytes.
            for (i, b) in data.iter_mut().enumerate() {
                *b = match rng.u8(..10) {
                    0 => rng.u8(..),
                    1..4 => rng.u8(..8),
                    _ => (i % 16 == 8) as u8,
                };
            }
        }
        if data.len() > 16 && rng.bool() {
            let size = 1u16 << rng.u8(..9);
            data[..2].copy_from_slice(&size.to_le_bytes());
            data[2..8].fill(0);
            data[4] = rng.u8(..64) * 4;
            data[6] = rng.u8(..64) * 4;
            data[10..14].fill(0);
        }
        fuzz_queue(&data);
    }
}
