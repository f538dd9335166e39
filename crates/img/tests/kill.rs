//! kill -9 at random moments of everything that writes: no corruption, leaks at most, which `check -r leaks` mends; and
//! no half image under the name of a new one.

mod common;

use common::{Dir, mixed, ok, ours, theirs};
use ringfort_block::{Format, ImageOptions, SharedSlice, SharedSliceMut, open_image};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Kills of each kind of work.
fn kills() -> u32 {
    let usual = if std::env::var_os("RINGFORT_TEST_LONG").is_some() { 200 } else { 3 };
    std::env::var("RINGFORT_TEST_KILLS")
        .map_or(usual, |n| n.parse().expect("RINGFORT_TEST_KILLS is a number"))
}

/// The words of the command line that a child runs, one a line.
const WORDS: &str = "RINGFORT_TEST_WORDS";

/// What the children of the other tests are: one verb, or a storm of writes.
#[test]
fn child() {
    let Ok(words) = std::env::var(WORDS) else { return };
    let args: Vec<String> = words.lines().map(String::from).collect();
    if args[0] == "storm" {
        storm(&args[1]);
    }
    let (mut out, mut err) = (std::io::stdout(), std::io::stderr());
    let status = ringfort_img::run(&args, &mut ringfort_img::Streams { out: &mut out, err: &mut err });
    std::process::exit(status.into());
}

fn start(args: &[&str]) -> Child {
    // What started the tests may have SIGINT ignored (nohup(1), a shell's `&`), and a program leaves it so.
    Command::new("env")
        .arg("--default-signal=INT")
        .arg(std::env::current_exe().expect("this program"))
        .args(["--exact", "child", "--nocapture"])
        .env(WORDS, args.join("\n"))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("starts")
}

/// How long it takes when nobody disturbs it.
fn time(args: &[&str]) -> Duration {
    let start_time = Instant::now();
    let status = start(args).wait().expect("ends");
    assert!(status.success(), "{args:?}");
    start_time.elapsed()
}

/// Start it and kill it at a random moment of its usual time; true if it had ended by itself.
fn kill(args: &[&str], usual: Duration, rng: &mut fastrand::Rng) -> bool {
    let mut child = start(args);
    std::thread::sleep(usual.mul_f64(rng.f64() * 1.1));
    let done = child.try_wait().expect("a child").is_some();
    let _ = child.kill();
    let _ = child.wait();
    done
}

/// After a kill: nothing worse than leaks, which `check -r leaks` mends.
fn mend(path: &str, bitmaps: bool, rng: &mut fastrand::Rng) {
    let found = theirs(&["check", "-f", "qcow2", path]);
    // While a snapshot comes or goes refcounts are too high for the flags of the tables, in QEMU's images as well; a check
    // counts that as errors, and with the leaks it is mended.
    let wrong = |l: &&str| l.starts_with("ERROR") && !l.starts_with("ERROR OFLAG_COPIED");
    let worse = found.2.lines().chain(found.1.lines()).find(wrong);
    assert!(matches!(found.0, 0 | 2 | 3) && worse.is_none(), "{} {} {}", found.0, found.1, found.2);
    let leaks = found.2.contains("Leaked cluster") || found.1.contains("Leaked cluster");
    assert!(found.0 != 2 || leaks, "{} {}", found.1, found.2);
    let mine = ours(&["check", path]);
    assert_eq!(mine.0, found.0, "both find the same: {} {}", mine.1, found.1);
    // QEMU's repair loses the snapshots of an image that has bitmaps as well (7.2 and 10.0 do).
    let run = if bitmaps || rng.bool() { ours } else { theirs };
    let mended = run(&["check", "-f", "qcow2", "-r", "leaks", path]);
    assert_eq!(mended.0, 0, "{} {}", mended.1, mended.2);
    ok(theirs(&["check", "-f", "qcow2", path]));
}

fn holds(path: &str, raw: &str) {
    ok(theirs(&["compare", "-f", "qcow2", "-F", "raw", path, raw]));
}

#[test]
fn a_killed_convert_leaves_no_half_image() {
    let d = Dir::new("kill-convert");
    let (raw, out) = (d.path("a.raw"), d.path("out"));
    std::fs::write(&raw, mixed(40 << 20, 41)).expect("a file");
    let mut rng = fastrand::Rng::with_seed(42);
    let (from, to, empty) = (format!("if={raw}"), format!("of={out}"), d.path("empty.raw"));
    std::fs::File::create(&empty).and_then(|f| f.set_len(40 << 20)).expect("a file");
    let convert = |more: &[&'static str]| [&["convert", "-f", "raw", "-O", "qcow2"], more].concat();
    for (args, names, raw) in [
        (convert(&[]), vec![&raw, &out], &raw),
        (convert(&["-c"]), vec![&raw, &out], &raw),
        (convert(&["-t", "writeback", "-S", "0"]), vec![&raw, &out], &raw),
        (convert(&["-o", "preallocation=full"]), vec![&raw, &out], &raw),
        (vec!["dd", "-f", "raw", "-O", "qcow2", "bs=1M"], vec![&from, &to], &raw),
        (vec!["create", "-q", "-f", "qcow2", "-o", "preallocation=full,size=40M"], vec![&out], &empty),
    ] {
        let args: Vec<&str> = args.into_iter().chain(names.into_iter().map(String::as_str)).collect();
        let usual = time(&args);
        for round in 0..kills() {
            // Now over nothing, now over an older image, which stays whole until the new one is.
            let old = round % 2 == 1;
            let _ = std::fs::remove_file(&out);
            if old {
                ok(ours(&["create", "-q", "-f", "qcow2", &out, "1M"]));
            }
            kill(&args, usual, &mut rng);
            if !Path::new(&out).exists() {
                assert!(!old);
                continue;
            }
            ok(theirs(&["check", "-f", "qcow2", &out]));
            let size = common::json(&ok(theirs(&["info", "--output=json", &out])))["virtual-size"].as_u64();
            if size == Some(1 << 20) {
                assert!(old);
            } else {
                holds(&out, raw);
            }
        }
    }
}

#[test]
fn interrupted_by_the_user_it_leaves_nothing() {
    let d = Dir::new("interrupt");
    let (raw, out) = (d.path("a.raw"), d.path("out"));
    std::fs::write(&raw, mixed(20 << 20, 43)).expect("a file");
    // So slow that it is at work for certain.
    let args = ["convert", "-p", "-r", "1M", "-S", "0", "-f", "raw", "-O", "qcow2", &raw, &out];
    let mut child = start(&args);
    let mut lines = BufReader::new(child.stdout.take().expect("its output"));
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains("/100%)") {
        let n = lines.read_until(b'%', &mut seen).expect("progress");
        assert!(n > 0, "it says how far it is");
    }
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().expect("kill runs").success());
    assert!(!child.wait().expect("ends").success());
    let left: Vec<_> =
        std::fs::read_dir(&d.0).expect("the folder").flatten().map(|e| e.file_name()).collect();
    assert_eq!(left, ["a.raw"], "nothing but the source");
}

/// `count` clusters more at the end of an image of 4 KiB clusters, which are counted and belong to nothing.
fn with_leaks(mut image: Vec<u8>, count: usize) -> Vec<u8> {
    let word = |image: &[u8], at: usize| {
        u64::from_be_bytes(image[at..at + 8].try_into().expect("eight bytes")) as usize
    };
    // qcow2: the refcount table's offset is the header's seventh word; a block of 4 KiB counts 2048 clusters.
    let table = word(&image, 48);
    let first = image.len().div_ceil(4096);
    image.resize((first + count) * 4096, 0);
    for cluster in first..first + count {
        let block = word(&image, table + cluster / 2048 * 8);
        assert_ne!(block, 0, "the end lies inside a counted range");
        image[block + cluster % 2048 * 2 + 1] = 1;
    }
    image
}

#[test]
fn killed_changes_leave_leaks_at_most() {
    let d = Dir::new("kill-verbs");
    let mut rng = fastrand::Rng::with_seed(44);
    let (raw, base, other, master, image, want) =
        (d.path("a.raw"), d.path("base"), d.path("other"), d.path("master"), d.path("image"), d.path("want"));
    std::fs::write(&raw, mixed(24 << 20, 45)).expect("a file");
    ok(ours(&["convert", "-f", "raw", "-O", "qcow2", &raw, &base]));
    ok(ours(&["create", "-q", "-f", "qcow2", &other, "20M"]));
    // An overlay with small clusters, two snapshots and a bitmap: there is much to do.
    ok(ours(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=4k",
        "-b",
        "base",
        "-F",
        "qcow2",
        &master,
        "26M",
    ]));
    std::fs::write(&raw, mixed(12 << 20, 46)).expect("a file");
    ok(ours(&["convert", "-n", "-f", "raw", "-O", "qcow2", &raw, &master]));
    ok(theirs(&["convert", "-O", "raw", &master, &want]));
    let plain = d.path("plain");
    std::fs::copy(&master, &plain).expect("a copy");
    ok(ours(&["snapshot", "-c", "s1", &master]));
    common::io("qcow2", &master, &["write -P 3 0 9M".into(), "write -z 10M 3M".into()]);
    ok(ours(&["snapshot", "-c", "s2", &master]));
    ok(theirs(&["convert", "-O", "raw", &master, &raw]));
    let leaky = d.path("leaky");
    std::fs::write(&leaky, with_leaks(std::fs::read(&master).expect("an image"), 40)).expect("an image");
    assert_eq!(theirs(&["check", &leaky]).0, 3);
    for args in [
        vec!["check", "-r", "leaks"],
        vec!["snapshot", "-c", "s3"],
        vec!["snapshot", "-d", "s1"],
        vec!["resize", "-q", "300M"],
        vec!["bitmap", "--add", "-g", "512", "b"],
        vec!["amend", "-o", "refcount_bits=64"],
        vec!["snapshot", "-a", "s1"],
        vec!["check", "-r", "all"],
        // Without snapshots.
        vec!["rebase", "-b", "other", "-F", "qcow2"],
        vec!["rebase", "-b", ""],
        vec!["commit"],
        vec!["convert", "-n", "-f", "raw", "-O", "qcow2"],
    ] {
        let snapshots = matches!(args[0], "snapshot" | "resize" | "bitmap" | "amend" | "check");
        let from = match args[..] {
            ["check", _, "leaks"] => &leaky,
            _ if snapshots => &master,
            _ => &plain,
        };
        let full: Vec<&str> = match args[0] {
            // The file stands before the last word.
            "resize" => vec![args[0], args[1], &image, args[2]],
            "bitmap" => vec![args[0], args[1], args[2], args[3], &image, args[4]],
            "convert" => [&args[..], &[&raw, &image]].concat(),
            _ => [&args[..], &[&image]].concat(),
        };
        let kept = std::fs::read(&base).expect("the base");
        std::fs::copy(from, &image).expect("a copy");
        let usual = time(&full);
        for _ in 0..kills() {
            std::fs::write(&base, &kept).expect("the base");
            std::fs::copy(from, &image).expect("a copy");
            let done = kill(&full, usual, &mut rng);
            mend(&image, args[0] == "bitmap", &mut rng);
            match (args[0], args[1..].first()) {
                // Either what it was or what it is to be.
                ("snapshot", Some(&"-a")) => {
                    let (a, b) = (
                        theirs(&["compare", "-f", "qcow2", "-F", "raw", &image, &raw]).0,
                        theirs(&["compare", "-f", "qcow2", "-F", "raw", &image, &want]).0,
                    );
                    assert!(b == 0 || a == 0 && !done, "{full:?}");
                }
                ("convert", _) => {
                    if done {
                        holds(&image, &raw);
                    }
                }
                ("commit", _) => {
                    mend(&base, false, &mut rng);
                    holds(&image, &want);
                }
                _ => holds(&image, if snapshots { &raw } else { &want }),
            }
            if snapshots {
                // The other snapshot is whole as well.
                let out = d.path("s2");
                let said = theirs(&["convert", "-l", "s2", "-O", "raw", &image, &out]);
                assert_eq!(
                    said.0,
                    0,
                    "{full:?}, done: {done}: {} {:?}",
                    said.2,
                    ours(&["snapshot", "-l", &image])
                );
                // It has the size that the disk has now.
                let mut have = std::fs::read(&out).expect("the copy");
                have.truncate(26 << 20);
                assert!(have == std::fs::read(&raw).expect("what it was"), "{full:?}");
            }
        }
        std::fs::write(&base, &kept).expect("the base");
    }
}

/// Bytes of a record of the storm, and records on the disk.
const RECORD: u64 = 3 << 10;
const RECORDS: u64 = 4000;

/// Write numbered records to random places, some with zeroes and discards between them on the other half of the disk;
/// after each flush say how many of them are safe.
fn storm(path: &str) -> ! {
    let options = ImageOptions { format: Some(Format::Qcow2), ..ImageOptions::default() };
    let disk = open_image(Path::new(path), &options).expect("opens");
    let mut rng = fastrand::Rng::new();
    let mut out = std::io::stdout();
    writeln!(out, "storm").expect("says so");
    for n in 1u64.. {
        let place = rng.u64(..RECORDS);
        let record = n.to_le_bytes().repeat(RECORD as usize / 8);
        disk.write_at(&[SharedSlice::new(&record)], place * RECORD).expect("writes");
        writeln!(out, "wrote {n} {place}").expect("says so");
        let elsewhere = RECORD * RECORDS + rng.u64(..RECORD * RECORDS - 200_000);
        match rng.u8(..6) {
            0 => disk.write_zeroes(elsewhere, rng.u64(1..200_000), rng.bool()).expect("zeroes"),
            1 => disk.discard(elsewhere, rng.u64(1..200_000)).expect("discards"),
            2 => disk.write_at(&[SharedSlice::new(&record)], elsewhere).expect("writes"),
            3 => {
                disk.flush().expect("flushes");
                writeln!(out, "safe {n}").expect("says so");
            }
            _ => {}
        }
    }
    unreachable!("counting does not end")
}

#[test]
fn what_was_flushed_survives_a_kill() {
    let d = Dir::new("kill-storm");
    let mut rng = fastrand::Rng::with_seed(47);
    let (base, image) = (d.path("base"), d.path("image"));
    std::fs::write(&base, mixed(10 << 20, 48)).expect("a file");
    for options in [
        "cluster_size=64k",
        "cluster_size=4k,refcount_bits=32",
        "extended_l2=on",
        "compat=0.10,cluster_size=512",
    ] {
        ok(ours(&["create", "-q", "-f", "qcow2", "-o", options, "-b", "base", "-F", "raw", &image, "30M"]));
        ok(ours(&["snapshot", "-c", "s", &image]));
        for _ in 0..kills() {
            let mut child = start(&["storm", &image]);
            let out = BufReader::new(child.stdout.take().expect("its output"));
            let (after, mut seen) = (rng.usize(1..3000), 0);
            // By place: the newest record, those that may be there after the last that is safe.
            let mut safe: std::collections::HashMap<u64, u64> = std::collections::HashMap::new();
            let mut open: Vec<(u64, u64)> = Vec::new();
            for line in out.split(b'\n') {
                // The last line may be cut.
                let line = String::from_utf8_lossy(&line.expect("its output")).into_owned();
                let words: Vec<&str> = line.split(' ').collect();
                match words.as_slice() {
                    ["wrote", n, place] => {
                        open.push((n.parse().expect("n"), place.parse().unwrap_or(u64::MAX)))
                    }
                    ["safe", n] => {
                        let n: u64 = n.parse().unwrap_or(0);
                        open.iter().filter(|o| o.0 <= n).for_each(|o| {
                            safe.insert(o.1, o.0);
                        });
                        open.retain(|o| o.0 > n);
                    }
                    _ => {}
                }
                seen += 1;
                if seen == after {
                    child.kill().expect("is killed");
                }
            }
            let _ = child.wait();
            mend(&image, false, &mut rng);
            let options =
                ImageOptions { format: Some(Format::Qcow2), read_only: true, ..ImageOptions::default() };
            let disk = open_image(Path::new(&image), &options).expect("opens");
            for (place, n) in safe {
                let mut record = vec![0; RECORD as usize];
                disk.read_at(&[SharedSliceMut::new(&mut record)], place * RECORD).expect("reads");
                let later: Vec<u64> =
                    open.iter().filter(|o| o.1 == place || o.1 == u64::MAX).map(|o| o.0).collect();
                for word in record.chunks_exact(8) {
                    let have = u64::from_le_bytes(word.try_into().expect("eight"));
                    // The record that was being written when the end came was not told.
                    assert!(
                        have == n || have > n && (later.contains(&have) || !open.iter().any(|o| o.0 == have)),
                        "{have} for {n} at {place}"
                    );
                }
            }
        }
        ok(ours(&["snapshot", "-a", "s", &image]));
        holds(&image, &base);
    }
}
