//! Many requests at once, and host errors that stop the machine.

use super::*;
use crate::testing::{BUFFERS, RamDisk, Rig};
use ringfort_block::node::{Fault, Faulty};
use ringfort_block::{ImageOptions, open_image};

const IN: u32 = 0;
const OUT: u32 = 1;

/// Guest addresses of request `n`: header, status, data.
fn place(n: u64) -> (u64, u64, u64) {
    let base = BUFFERS + n * 0x2000;
    (base, base + 0x100, base + 0x1000)
}

fn send(rig: &mut Rig, queue: u16, n: u64, kind: u32, sector: u64, len: u32) -> u16 {
    let (header, status, data) = place(n);
    let mut raw = kind.to_le_bytes().to_vec();
    raw.extend_from_slice(&[0; 4]);
    raw.extend_from_slice(&sector.to_le_bytes());
    rig.write(header, &raw);
    rig.write(status, &[0xee]);
    rig.send(queue, &[(header, 16, false), (data, len, kind == IN), (status, 1, true)])
}

fn status_of(rig: &Rig, n: u64) -> u8 {
    rig.read(place(n).1, 1)[0]
}

type Told = Arc<Mutex<Vec<(bool, Option<i32>, Action)>>>;

fn faulty(options: &BlkOptions) -> (Arc<Faulty>, Arc<Blk>, Told) {
    let backend = Arc::new(Faulty::new(Arc::new(RamDisk::new(1 << 20))));
    let blk = Arc::new(Blk::new(backend.clone(), options).unwrap());
    let told = Told::default();
    let list = told.clone();
    blk.on_host_error(Box::new(move |e| lock(&list).push((e.write, e.error.raw_os_error(), e.action))));
    (backend, blk, told)
}

#[test]
fn a_full_host_stops_the_machine_and_the_requests_are_done_when_it_goes_on() {
    for quick in [true, false] {
        let (backend, blk, told) = faulty(&BlkOptions { quick, queues: 2, ..Default::default() });
        let mut rig = Rig::new(blk, F_FLUSH | F_MQ);
        backend.set(Some(Fault::no_space()));
        for n in 0..4 {
            rig.write(place(n).2, &[n as u8 + 1; 512]);
            send(&mut rig, (n % 2) as u16, n, OUT, n, 512);
        }
        // What the main loop does when it is told. Pausing waits for what is under way.
        while lock(&told).is_empty() {
            std::thread::yield_now();
        }
        rig.core.pause();
        assert_eq!(*lock(&told), [(true, Some(libc::ENOSPC), Action::Stop)], "told once");
        assert!((0..4).all(|n| status_of(&rig, n) == 0xee), "nothing is complete");
        // Still full: told again, since it went on.
        rig.core.resume();
        while lock(&told).len() < 2 {
            std::thread::yield_now();
        }
        rig.core.pause();
        backend.set(None);
        assert!((0..4).all(|n| status_of(&rig, n) == 0xee));
        rig.core.resume();
        for n in 0..4 {
            rig.used((n % 2) as u16);
        }
        assert!((0..4).all(|n| status_of(&rig, n) == 0));
        send(&mut rig, 0, 9, IN, 3, 512);
        rig.used(0);
        assert_eq!((status_of(&rig, 9), rig.read(place(9).2, 512)), (0, vec![4; 512]));
        assert_eq!(lock(&told).len(), 2);
    }
}

#[test]
fn requests_that_wait_for_space_outlive_a_save_or_end_at_a_reset() {
    let (backend, blk, told) = faulty(&BlkOptions { quick: false, ..Default::default() });
    let mut rig = Rig::new(blk, F_FLUSH);
    backend.set(Some(Fault::no_space()));
    rig.write(place(0).2, &[0x5a; 512]);
    let head = send(&mut rig, 0, 0, OUT, 7, 512);
    while lock(&told).is_empty() {
        std::thread::yield_now();
    }
    rig.core.pause();
    let state = rig.core.save();
    let Rig { core, mut rings, memory, .. } = rig;
    // Here it ends: the driver's memory is left alone from now on.
    core.reset();
    core.resume();
    drop(core);

    let (_, blk, _) = faulty(&BlkOptions { quick: false, ..Default::default() });
    let mut rig = Rig::over(blk, memory);
    assert_eq!(status_of(&rig, 0), 0xee);
    rig.core.load(&state).unwrap();
    assert_eq!(rig.core.save(), state);
    std::mem::swap(&mut rig.rings, &mut rings);
    rig.core.resume();
    assert_eq!(rig.used(0), (head.into(), 1));
    assert_eq!(status_of(&rig, 0), 0);
    send(&mut rig, 0, 1, IN, 7, 512);
    rig.used(0);
    assert_eq!(rig.read(place(1).2, 512), [0x5a; 512]);

    // A saved request of a queue that is not there.
    let saved = Saved { features: 0, writeback: true, capacity: 1 << 20, parked: vec![(5, 0)] };
    let (_, blk, _) = faulty(&BlkOptions::default());
    assert!(blk.load(&crate::transport::encode(&saved)).unwrap_err().contains("queue"));
}

#[test]
fn errors_are_reported_ignored_or_stop_as_asked() {
    let eio = |read| Fault { read, write: !read, flush: !read, errno: libc::EIO, after: 0, times: u64::MAX };
    for (rerror, werror, read, status, action) in [
        (OnError::Report, OnError::Enospc, true, 1, Action::Report),
        (OnError::Report, OnError::Enospc, false, 1, Action::Report),
        (OnError::Ignore, OnError::Ignore, true, 0, Action::Ignore),
        (OnError::Ignore, OnError::Ignore, false, 0, Action::Ignore),
        (OnError::Stop, OnError::Report, true, 0xee, Action::Stop),
        (OnError::Report, OnError::Stop, false, 0xee, Action::Stop),
    ] {
        let (backend, blk, told) = faulty(&BlkOptions { rerror, werror, ..Default::default() });
        let mut rig = Rig::new(blk, F_FLUSH);
        backend.set(Some(eio(read)));
        send(&mut rig, 0, 0, if read { IN } else { OUT }, 0, 512);
        if action == Action::Stop {
            while lock(&told).is_empty() {
                std::thread::yield_now();
            }
        } else {
            rig.used(0);
        }
        assert_eq!(status_of(&rig, 0), status);
        assert_eq!(*lock(&told), [(!read, Some(libc::EIO), action)]);
    }
}

#[test]
fn a_ring_full_of_requests_is_done_whatever_the_way_and_pauses_lose_none() {
    let path = std::env::temp_dir().join(format!("ringfort-depth-{}.img", std::process::id()));
    let content: Vec<u8> = (0..4 << 20).map(|i| (i / 512 % 251) as u8).collect();
    std::fs::write(&path, &content).unwrap();
    for (aio, direct) in [(Aio::best(), false), (Aio::best(), true), (Aio::Threads, true)] {
        let options = ImageOptions { direct, ..Default::default() };
        let Ok(backend) = open_image(&path, &options) else {
            eprintln!("skipped: this file system has no direct I/O");
            continue;
        };
        let options = BlkOptions { aio, quick: false, queues: 2, ..Default::default() };
        let mut rig = Rig::new(Arc::new(Blk::new(backend, &options).unwrap()), F_FLUSH | F_MQ);
        let mut rng = fastrand::Rng::with_seed(7);
        for round in 0..6 {
            let mut wanted = Vec::new();
            for n in 0..160u64 {
                // Disjoint places: writes put back what is there.
                let sector = n * 8 + rng.u64(..4) * 2048;
                let kind = if n % 3 == 0 { OUT } else { IN };
                let (_, _, data) = place(n);
                let is = content[sector as usize * 512..][..4096].to_vec();
                rig.write(data, if kind == OUT { &is } else { &[0; 4096] });
                wanted.push((data, is));
                send(&mut rig, (n % 2) as u16, n, kind, sector, 4096);
                if n == 50 && round % 2 == 1 {
                    rig.core.pause();
                    // Nothing moves now.
                    let used = [0, 1].map(|q: usize| rig.rings[q].used_index());
                    let seen = rig.read(BUFFERS, 0x20_0000);
                    std::thread::yield_now();
                    assert_eq!(used, [0, 1].map(|q: usize| rig.rings[q].used_index()));
                    assert!(seen == rig.read(BUFFERS, 0x20_0000));
                    rig.core.resume();
                }
                if n % 80 == 79 {
                    // The descriptor table has room for so many.
                    for q in 0..2 {
                        for _ in 0..40 {
                            rig.used(q);
                        }
                    }
                }
            }
            for (n, (data, is)) in wanted.iter().enumerate() {
                assert_eq!(status_of(&rig, n as u64), 0);
                assert!(rig.read(*data, 4096) == *is, "request {n}");
            }
        }
        drop(rig);
        assert!(std::fs::read(&path).unwrap() == content);
    }
    std::fs::remove_file(&path).unwrap();
}
