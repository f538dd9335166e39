//! What the host does to an image: power that fails at any moment, and writes that fail.

use super::*;
use crate::storage::hook::Change;
use std::sync::Mutex;

/// What happened, in order: changes of the file, and where the test was.
enum Event {
    File(Change),
    /// A request is about to change this range of the disk.
    Begins(std::ops::Range<usize>),
    /// What the disk holds has been made durable.
    Flushed(Arc<Vec<u8>>),
}

type Log = Arc<Mutex<Vec<Event>>>;

/// The bytes of a file, as changes make them.
fn apply(file: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Write(at, bytes) => {
            let at = *at as usize;
            file.resize(file.len().max(at + bytes.len()), 0);
            file[at..at + bytes.len()].copy_from_slice(bytes);
        }
        Change::Zero(at, len) => {
            let end = file.len().min((at + len) as usize);
            file[(*at as usize).min(end)..end].fill(0);
        }
        Change::Length(len) => file.resize(*len as usize, 0),
        Change::Sync => {}
    }
}

/// The parts of a change that may reach the disk without each other: sectors.
fn sectors(change: &Change) -> Vec<Change> {
    match change {
        Change::Write(at, bytes) => bytes
            .chunks(512)
            .enumerate()
            .map(|(n, c)| Change::Write(at + n as u64 * 512, c.to_vec()))
            .collect(),
        other => vec![other.clone()],
    }
}

/// The file after a power failure: all that was there at the last sync, and of what came later whatever the host had
/// got round to.
fn after_power_failure(start: &[u8], events: &[Event], rng: &mut Rng) -> Vec<u8> {
    let is_sync = |e: &Event| matches!(e, Event::File(Change::Sync));
    let safe = events.iter().rposition(is_sync).unwrap_or(0);
    let mut file = start.to_vec();
    let likely = [0.0, 0.1, 0.5, 0.9, 1.0][rng.usize(..5)];
    for (n, e) in events.iter().enumerate() {
        let Event::File(change) = e else { continue };
        if n <= safe {
            apply(&mut file, change);
        } else if rng.bool() {
            sectors(change).iter().filter(|_| rng.f64() < likely).for_each(|part| apply(&mut file, part));
        } else if rng.f64() < likely {
            apply(&mut file, change);
        }
    }
    file
}

/// Open the image that `bytes` are, mend its leaks (it has nothing worse), and hand it on.
fn recovered(path: &Path, bytes: &[u8], by_qemu: bool, what: &str) -> Qcow2 {
    std::fs::write(path, bytes).expect("the image");
    let repairing =
        ImageOptions { format: Some(Format::Qcow2), repairing: true, lock: false, ..ImageOptions::default() };
    let q = Qcow2::open(storage(path), &repairing).unwrap_or_else(|e| panic!("{what}: {e}"));
    let found = q.check(Repair::None).expect("checks");
    // While a snapshot comes or goes refcounts are too high for the flags of the tables, which a check counts as
    // errors (QEMU's images are so as well); when the refcounts are mended the flags are right.
    let other = |l: &&String| l.starts_with("ERROR") && !l.starts_with("ERROR OFLAG_COPIED");
    assert!(found.check_errors == 0 && found.lines.iter().find(other).is_none(), "{what}: {:?}", found.lines);
    q.check(Repair::Leaks).expect("mends");
    let found = q.check(Repair::None).expect("checks");
    assert_eq!((found.corruptions, found.leaks), (0, 0), "{what}: {:?}", found.lines);
    q.close().expect("closes");
    if by_qemu {
        qemu_ok(&["check", "-f", "qcow2", text(path)]);
    }
    open(path)
}

/// Cut the story at a random place and look at what is left.
fn cut(path: &Path, start: &[u8], events: &[Event], by_qemu: bool, rng: &mut Rng, name: &str) {
    let end = rng.usize(..=events.len());
    let file = after_power_failure(start, &events[..end], rng);
    let what = format!("{name}, cut at {end} of {}", events.len());
    let q = recovered(path, &file, by_qemu, &what);
    let flushed = events[..end].iter().rposition(|e| matches!(e, Event::Flushed(_)));
    let Some(Event::Flushed(model)) = flushed.map(|n| &events[n]) else { return };
    let mut now = read(&q, 0, q.size() as usize);
    now.resize(model.len(), 0);
    let mut want = (**model).clone();
    // What was changed later may be there or not, or in part.
    for e in &events[flushed.unwrap_or(0)..end] {
        if let Event::Begins(range) = e {
            let range = range.start.min(want.len())..range.end.min(want.len());
            want[range.clone()].copy_from_slice(&now[range]);
        }
    }
    let wrong = now.iter().zip(&want).position(|(a, b)| a != b);
    assert!(wrong.is_none(), "{what}: byte {wrong:?} was flushed and is lost");
}

fn note(log: &Log, e: Event) {
    log.lock().expect("nobody panicked").push(e);
}

/// Random requests, each noted before it is made.
fn noted_step(q: &Qcow2, model: &mut [u8], log: &Log, rng: &mut Rng) {
    let size = model.len() as u64;
    let at = rng.u64(0..size / 512) * 512;
    let most = (size - at).min(if rng.u8(..) < 40 { 300 << 10 } else { 20 << 10 });
    let len = rng.u64(1..=most / 512) * 512;
    let range = at as usize..(at + len) as usize;
    match rng.u8(..100) {
        0..50 => {
            note(log, Event::Begins(range.clone()));
            let data: Vec<u8> = std::iter::repeat_with(|| rng.u8(1..)).take(len as usize).collect();
            write(q, at, &data);
            model[range].copy_from_slice(&data);
        }
        50..65 => {
            note(log, Event::Begins(range.clone()));
            q.write_zeroes(at, len, rng.bool()).expect("zeroes");
            model[range].fill(0);
        }
        65..80 => {
            note(log, Event::Begins(range.clone()));
            q.discard(at, len).expect("discards");
            model[range].copy_from_slice(&read(q, at, len as usize));
        }
        _ => {
            q.flush().expect("flushes");
            note(log, Event::Flushed(Arc::new(model.to_vec())));
        }
    }
}

/// Variants on nothing, and over a raw base.
fn images(dir: &Dir, rng: &mut Rng) -> Vec<(String, CreateOptions, Vec<u8>)> {
    let base: Vec<u8> = std::iter::repeat_with(|| rng.u8(..)).take((1 << 20) + 1536).collect();
    std::fs::write(dir.file("base.raw"), &base).expect("a base");
    let mut all = Vec::new();
    for (name, options) in variants() {
        let options = CreateOptions { size: 3 << 20, ..options };
        let mut below = base.clone();
        below.resize(options.size as usize, 0);
        let over = CreateOptions {
            backing: Some("base.raw".into()),
            backing_format: Some("raw".into()),
            ..options.clone()
        };
        all.push((name.to_owned(), options.clone(), vec![0; options.size as usize]));
        all.push((format!("{name} over a base"), over, below));
    }
    all
}

#[test]
fn power_that_fails_at_any_moment_leaks_at_worst_and_takes_nothing_that_was_flushed() {
    let rounds = if std::env::var_os("RINGFORT_TEST_LONG").is_some() { 400 } else { 16 };
    let dir = Dir::new("power");
    let seed = Rng::new().get_seed();
    eprintln!("seed {seed:#x}");
    let mut rng = Rng::with_seed(seed);
    for (name, options, model) in images(&dir, &mut rng) {
        let (path, left) = (dir.file("a.qcow2"), dir.file("left.qcow2"));
        make(&path, &options);
        let start = std::fs::read(&path).expect("the image");
        let log = Log::default();
        let hears = log.clone();
        let file = storage(&path).hooked(Arc::new(move |c| {
            note(&hears, Event::File(c));
            Ok(())
        }));
        let how = ImageOptions { format: Some(Format::Qcow2), lock: false, ..ImageOptions::default() };
        let q = Qcow2::open(file, &how).expect("opens");
        let mut model = model;
        let mut kept: Vec<(String, Vec<u8>)> = Vec::new();
        let all = 0..usize::MAX;
        for n in 0..120 {
            noted_step(&q, &mut model, &log, &mut rng);
            match rng.u8(..60) {
                0 | 1 => {
                    q.snapshot_create(&format!("s{n}"), std::time::Duration::ZERO).expect("a snapshot");
                    kept.push((format!("s{n}"), model.clone()));
                }
                2 if !kept.is_empty() => {
                    note(&log, Event::Begins(all.clone()));
                    let (tag, then) = &kept[rng.usize(..kept.len())];
                    q.snapshot_apply(tag).expect("applies");
                    model = then.clone();
                }
                3 if !kept.is_empty() => {
                    let (tag, _) = kept.remove(rng.usize(..kept.len()));
                    q.snapshot_delete(&tag).expect("deletes");
                }
                4 if kept.is_empty() => {
                    let size = model.len() + rng.usize(1..3000) * 512;
                    note(&log, Event::Begins(model.len()..size));
                    q.resize(size as u64).expect("resizes");
                    model.resize(size, 0);
                }
                _ => {}
            }
        }
        q.close().expect("closes");
        let events = std::mem::take(&mut *log.lock().expect("nobody panicked"));
        for round in 0..rounds {
            cut(&left, &start, &events, round % 8 == 0, &mut rng, &name);
        }
    }
}

#[test]
fn a_host_that_fails_now_and_then_damages_nothing() {
    let rounds = if std::env::var_os("RINGFORT_TEST_LONG").is_some() { 60 } else { 2 };
    let dir = Dir::new("failures");
    let seed = Rng::new().get_seed();
    eprintln!("seed {seed:#x}");
    let mut rng = Rng::with_seed(seed);
    for (name, options, model) in images(&dir, &mut rng) {
        for round in 0..rounds {
            let path = dir.file("a.qcow2");
            make(&path, &options);
            // The host is full for a while, one change in `rarely` fails, and in the end all is well.
            let rarely = rng.u64(5..60);
            let state = Arc::new(Mutex::new((false, Rng::with_seed(rng.u64(..)), false)));
            let of_hook = state.clone();
            let file = storage(&path).hooked(Arc::new(move |c| {
                let mut s = of_hook.lock().expect("nobody panicked");
                let errno = match c {
                    Change::Write(..) | Change::Length(_) if s.0 => libc::ENOSPC,
                    _ if !s.2 && s.1.u64(..rarely) == 0 => libc::EIO,
                    _ => return Ok(()),
                };
                Err(io::Error::from_raw_os_error(errno))
            }));
            let how = ImageOptions { format: Some(Format::Qcow2), lock: false, ..ImageOptions::default() };
            // Opening may fail as well; then nothing was done.
            let Ok(q) = Qcow2::open(file, &how) else { continue };
            let mut model = model.clone();
            let mut failed = 0;
            for n in 0..150 {
                if n % 30 == 0 {
                    let mut s = state.lock().expect("nobody panicked");
                    s.0 = n % 60 == 30;
                }
                let size = model.len() as u64;
                let at = rng.u64(0..size / 512) * 512;
                let len = rng.u64(1..=(size - at).min(60 << 10) / 512) * 512;
                let range = at as usize..(at + len) as usize;
                let (done, new) = match rng.u8(..10) {
                    0..6 => {
                        let data: Vec<u8> =
                            std::iter::repeat_with(|| rng.u8(1..)).take(len as usize).collect();
                        (q.write_at(&[SharedSlice::new(&data)], at), Some(data))
                    }
                    6 => (q.write_zeroes(at, len, rng.bool()), Some(vec![0; len as usize])),
                    7 => (q.discard(at, len), None),
                    _ => (q.flush(), None),
                };
                failed += u32::from(done.is_err());
                // What failed may be there in part, and so may what was discarded; nothing else has changed.
                match new.filter(|_| done.is_ok()) {
                    Some(data) => model[range].copy_from_slice(&data),
                    None => model[range.clone()].copy_from_slice(&read(&q, at, len as usize)),
                }
                if n % 15 == 0 {
                    let now = read(&q, 0, model.len());
                    let wrong = now.iter().zip(&model).position(|(a, b)| a != b);
                    assert!(wrong.is_none(), "{name}, round {round}, request {n}: byte {wrong:?}");
                }
            }
            assert!(failed > 0, "{name}: nothing failed");
            // The host is well again: all that is there becomes durable, whatever failed before.
            *state.lock().expect("nobody panicked") = (false, Rng::new(), true);
            let what = format!("{name}, round {round}");
            q.flush().expect("flushes");
            let bytes = std::fs::read(&path).expect("the image");
            let left = dir.file("left.qcow2");
            let now = recovered(&left, &bytes, round == 0, &what);
            assert!(read(&now, 0, model.len()) == model, "{what}: the content is the model's");
            drop(now);
            q.close().expect("closes");
            let bytes = std::fs::read(&path).expect("the image");
            let now = recovered(&left, &bytes, round == 0, &what);
            assert!(read(&now, 0, model.len()) == model, "{what}: the content is the model's after closing");
        }
    }
}
