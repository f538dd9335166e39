//! A Linux guest at work, its disk and network card in use, goes on elsewhere as if nothing had happened: ten times with
//! `RINGFORT_TEST_LONG=1`, else three times.

mod support;

use ringfort_guest::{CpioWriter, TEST_PROMPT};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use support::*;

/// What every engine has, in the lab as well. AVX makes the vector registers longer than their legacy region.
const CPU: &str = "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+xsave,+avx,+avx2,+bmi1,+bmi2,+fsgsbase";
const CMDLINE: &str = "console=ttyS0 panic=-1 quiet";
/// Lines of the ticker that are waited for under each engine.
const TICKS: usize = 30;

fn long() -> bool {
    std::env::var_os("RINGFORT_TEST_LONG").is_some_and(|v| v != "0")
}

/// The test guest with the ticker (`support/ticker.c`) in it, and an empty qcow2 disk.
struct Files {
    kernel: PathBuf,
    initrd: PathBuf,
    disk: PathBuf,
}

/// None where there is no C compiler or qemu-img: the test is skipped.
fn files(scratch: &Scratch) -> Option<Files> {
    let guest = test_guest();
    let ticker = scratch.0.join("ticker");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/ticker.c");
    let gcc =
        Command::new("gcc").args(["-O2", "-static", "-pthread", "-o", text(&ticker), text(&source)]).output();
    let Ok(gcc) = gcc else {
        println!("skipped: there is no gcc here");
        return None;
    };
    assert!(gcc.status.success(), "gcc: {}", String::from_utf8_lossy(&gcc.stderr));
    let mut initrd = std::fs::read(&guest.initrd).expect("the initramfs");
    initrd.resize(initrd.len().next_multiple_of(512), 0);
    let mut archive = CpioWriter::new(Vec::new());
    archive.file("ticker", 0o755, &std::fs::read(&ticker).expect("the ticker")).expect("memory");
    initrd.extend(archive.finish().expect("memory"));
    let disk = scratch.0.join("disk.qcow2");
    let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", text(&disk), "16M"]).status();
    let Ok(made) = made else {
        println!("skipped: there is no qemu-img here");
        return None;
    };
    assert!(made.success());
    Some(Files { kernel: guest.kernel, initrd: scratch.file("initrd", &initrd), disk })
}

/// Blocks are written and read back, and the network's gateway is asked, again and again. What goes wrong is told.
const IN_USE: &str = "(n=0; while :; do n=$((n%8+1)); \
    dd if=/tmp/noise of=/dev/vda bs=65536 seek=$n count=1 conv=fsync 2>/dev/null; echo 3 >/proc/sys/vm/drop_caches; \
    dd if=/dev/vda bs=65536 skip=$n count=1 2>/dev/null | cmp -s - /tmp/noise && echo d >>/tmp/disks || echo WRO''NG disk; \
    ping -c 1 -W 2 10.0.2.2 >/dev/null && echo p >>/tmp/pings; done) &";

/// Let the guest that has just been started do all that must go on.
fn put_to_work(g: &mut Guest) {
    g.expect(TEST_PROMPT);
    g.shell("ip addr add 10.0.2.15/24 dev eth0 && ip link set eth0 up");
    // The kernel's doubts at its start are about the CPU model.
    g.shell("head -c 65536 /dev/urandom >/tmp/noise; dmesg -c >/dev/null");
    g.send(&format!("{IN_USE}\n/ticker &\n"));
}

/// After the last move: all of it still works.
fn check_work(g: &mut Guest, vcpus: usize) {
    g.send("kill -TERM $!\n");
    g.expect("ticker done");
    let count = |g: &mut Guest, what: &str| -> u32 {
        g.shell(&format!("wc -l </tmp/{what} 2>/dev/null || echo 0")).parse().expect("a number")
    };
    // Under the last engine, not only before.
    for what in ["disks", "pings"] {
        let before = count(g, what);
        while count(g, what) == before {
            g.shell("usleep 100000");
        }
    }
    for n in 0..vcpus {
        assert_eq!(g.shell(&format!("taskset -c {n} cut -d' ' -f39 /proc/self/stat")), n.to_string());
        g.shell(&format!("taskset -c {n} usleep 100000"));
    }
    let problems = g.shell("dmesg | grep -icE 'unstable|stall|BUG:|lockup|skew|backwards' || true");
    assert_eq!(problems, "0", "{}", g.shell("dmesg | tail -40"));
    g.send("poweroff -f\n");
}

/// A line of the ticker.
#[derive(Debug, Clone)]
struct Tick {
    number: u64,
    monotonic: u64,
    realtime: u64,
    hashes: Vec<(u64, String)>,
}

/// All lines that a guest has said over its lives. Lines of Ringfort's own are left out; they may stand in the middle of the guest's.
fn ticks(said: &str) -> Vec<Tick> {
    let mut guests = String::new();
    for line in said.split_inclusive('\n') {
        guests += line.find("ringfort: ").map_or(line, |at| &line[..at]);
    }
    let tick = |line: &str| {
        let words: Vec<&str> =
            line.trim_end().strip_suffix(" end")?.split_once("tick ")?.1.split(' ').collect();
        let n = |at: usize| words.get(at).and_then(|w| w.parse().ok());
        let hashes = words.get(4..)?.chunks(2).map(|h| Some((h[0].parse().ok()?, (*h.get(1)?).to_owned())));
        Some(Tick {
            number: n(0)?,
            monotonic: n(1)?,
            realtime: n(2)?,
            hashes: hashes.collect::<Option<_>>()?,
        })
    };
    guests.lines().filter_map(tick).collect()
}

/// The guest counted on, computed right, and neither of its clocks went back or jumped.
fn check_ticks(said: &str, vcpus: usize, least: usize) {
    assert!(!said.contains("WRONG"), "{}", said.lines().filter(|l| l.contains("WRONG")).collect::<String>());
    let all = ticks(said);
    assert!(all.len() >= least, "{} lines", all.len());
    let apart = |t: &Tick| t.realtime - t.monotonic;
    let base = all.iter().map(apart).min().expect("lines");
    for pair in all.windows(2) {
        let (a, b) = (&pair[0], &pair[1]);
        assert_eq!(b.number, a.number + 1, "the count jumped: {a:?}, {b:?}");
        assert!(b.monotonic > a.monotonic && b.realtime > a.realtime, "time went back: {a:?}, {b:?}");
        // The guest stood still meanwhile: its clocks do not jump ahead either.
        assert!(b.monotonic - a.monotonic < 60_000_000_000, "time jumped: {a:?}, {b:?}");
        assert_eq!(b.hashes.len(), vcpus);
    }
    // Read one after the other, mostly with nothing in between.
    let far = all.iter().filter(|t| apart(t) - base > 100_000_000).count();
    assert!(far < all.len() / 10, "the clocks are apart in {far} of {} lines", all.len());
    // All hashes, by somebody else's SHA-256.
    let check = "import sys, hashlib\nchains = {}\nfor line in sys.stdin:\n    cpu, count, told = line.split()\n    \
        n, h = chains.get(cpu, (0, bytes([int(cpu)]) + bytes(31)))\n    \
        while n < int(count):\n        h = hashlib.sha256(h).digest()\n        n += 1\n    \
        chains[cpu] = n, h\n    assert n == int(count) and (n == 0 or h[:8].hex() == told), line";
    let mut python =
        Command::new("python3").args(["-c", check]).stdin(Stdio::piped()).spawn().expect("python3");
    let lines: String = all
        .iter()
        .flat_map(|t| {
            t.hashes.iter().enumerate().map(|(cpu, (count, hash))| format!("{cpu} {count} {hash}\n"))
        })
        .collect();
    std::io::Write::write_all(&mut python.stdin.take().expect("piped"), lines.as_bytes())
        .expect("python3 reads");
    assert!(python.wait().expect("its status").success(), "a hash is wrong");
    for cpu in 0..vcpus {
        assert!(all.iter().any(|t| t.hashes[cpu].0 > 0), "vCPU {cpu} has computed nothing");
    }
}

#[test]
fn linux_moves_between_processes_and_goes_on() {
    let _turn = one_at_a_time();
    let scratch = Scratch::new("moves-soft");
    let Some(files) = files(&scratch) else { return };
    let disk = format!("path={}", text(&files.disk));
    let start = |args: &[&str]| {
        let mut command = ringfort(args);
        command.current_dir(&scratch.0);
        Guest::start(command)
    };
    let options = ["--cpu", CPU, "--cpus", "2", "--memory", "128M", "--disk", &disk, "--save", "state"];
    let args = run_args("soft", &files.kernel, &files.initrd, CMDLINE, &options);
    let mut g = start(&args.iter().map(String::as_str).collect::<Vec<_>>());
    put_to_work(&mut g);
    let rounds = if long() { 10 } else { 3 };
    let mut said = String::new();
    for _ in 0..rounds {
        for _ in 0..TICKS {
            g.expect("tick ");
        }
        g.send("\x01s");
        said += &g.ended_well();
        g = start(&["restore", "state", "--accel", "soft"]);
    }
    for _ in 0..TICKS {
        g.expect("tick ");
    }
    check_work(&mut g, 2);
    said += &g.wait_said();
    check_ticks(&said, 2, rounds * (TICKS - 1));
    let check = Command::new("qemu-img").args(["check", "-q", text(&files.disk)]).status();
    assert!(check.expect("qemu-img").success());
}
