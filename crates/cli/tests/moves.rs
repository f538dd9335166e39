//! A Linux guest at work, its disk and network card in use, goes on elsewhere as if nothing had happened, in another process or under
//! another engine: ten times with `RINGFORT_TEST_LONG=1`, else a few times.

mod support;

use ringfort_guest::{CpioWriter, LAB, LabRun, TEST_PROMPT};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use support::*;

/// AVX makes the vector registers longer than their legacy region.
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
    // The kernel shall not tell of each time.
    g.shell("echo 4 >/proc/sys/vm/drop_caches");
    g.send(&format!("{IN_USE}\necho $! >/tmp/user\n/ticker &\n"));
}

/// After the last move: all of it still works.
fn check_work(g: &mut Guest, vcpus: usize) {
    g.send("kill -TERM $!\n");
    g.expect("ticker done");
    // The shell says so, too, when it notices.
    g.shell("wait $!; true");
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
    // Devices are taken away from under whoever uses them when the power goes.
    g.shell("user=$(cat /tmp/user); kill $user; wait $user; true");
    for n in 0..vcpus {
        assert_eq!(g.shell(&format!("taskset -c {n} cut -d' ' -f39 /proc/self/stat")), n.to_string());
        g.shell(&format!("taskset -c {n} usleep 100000"));
    }
    let problems = g.shell("dmesg | grep -iE -A 3 'unstable|stall|BUG:|lockup|backwards' || true");
    assert_eq!(problems, "", "the kernel complains");
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
    if let Some(at) = said.find("WRONG") {
        let from = said[..at].rmatch_indices('\n').nth(8).map_or(0, |m| m.0);
        panic!("{}", said[from..].lines().take(20).collect::<Vec<_>>().join("\n"));
    }
    let all = ticks(said);
    assert!(all.len() >= least, "{} lines", all.len());
    let apart = |t: &Tick| t.realtime - t.monotonic;
    let base = all.iter().map(apart).min().expect("lines");
    for pair in all.windows(2) {
        let (a, b) = (&pair[0], &pair[1]);
        let between = || said.split_once(&format!("tick {} ", a.number)).map(|s| &s.1[..s.1.len().min(2000)]);
        assert_eq!(b.number, a.number + 1, "the count jumped: {a:?}, {b:?}: {:?}", between());
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

/// In the lab, under each of `engines` in turn, on CPUs of model `cpu`.
fn moves_in_the_lab(name: &str, cpu: &str, vcpus: usize, engines: &[&str]) {
    let _turn = one_at_a_time();
    let scratch = Scratch::new(name);
    let Some(files) = files(&scratch) else { return };
    let cache = ringfort_guest::cache_dir().expect("a cache folder");
    let lab = ringfort_guest::ensure_lab(&cache, &mut ()).expect("the lab");
    let run = format!(
        "run --cpu {cpu} --cpus {vcpus} --memory 128M --kernel vmlinuz --initrd initrd --cmdline '{CMDLINE}' \
         --disk path=disk.qcow2 --save state"
    );
    let mut script = String::new();
    for (n, engine) in engines.iter().enumerate() {
        let verb = if n == 0 { &run } else { "restore state" };
        // Its own lines stay out of the guest's.
        script += &format!(
            "./ringfort {verb} --accel {engine} 2>/tmp/said || {{ cat /tmp/said; exit 1; }}\ncat /tmp/said\necho 'ringfort: left {n}'\n"
        );
    }
    let inside = [
        ("ringfort", Path::new(env!("CARGO_BIN_EXE_ringfort"))),
        ("vmlinuz", &files.kernel),
        ("initrd", &files.initrd),
        ("disk.qcow2", &files.disk),
    ];
    let run = LabRun { script: &script, files: &inside, cpus: 1, memory: 1024 };
    let scratch = Scratch::new(&format!("{name}-lab"));
    let mut g = Guest::start(lab.command(&run, &scratch.0).expect("the lab's command"));
    g.expect(&format!("{LAB}ready"));
    put_to_work(&mut g);
    for (n, engine) in engines.iter().enumerate() {
        for _ in 0..TICKS {
            g.expect("tick ");
        }
        println!("{name}: {engine} works, {n} moves");
        if n + 1 < engines.len() {
            g.send("\x01s");
            g.expect(&format!("left {n}"));
        }
    }
    check_work(&mut g, vcpus);
    g.expect(&format!("{LAB}exit 0"));
    let said = g.wait_said();
    check_ticks(&said, vcpus, engines.len() * (TICKS - 1));
}

#[test]
fn linux_moves_between_the_engines_and_goes_on() {
    if long() {
        let there_and_back = |kvm: &'static str| ["soft", kvm].repeat(10);
        moves_in_the_lab("moves-1", "portable", 1, &[there_and_back("kvm"), vec!["soft"]].concat());
        let two = [there_and_back("kvm,irqchip=kernel"), vec!["soft"]].concat();
        moves_in_the_lab("moves-2", "portable", 2, &two);
    } else {
        // It boots where that is quicker.
        moves_in_the_lab("moves", "max", 2, &["kvm", "soft", "kvm,irqchip=kernel"]);
    }
}
