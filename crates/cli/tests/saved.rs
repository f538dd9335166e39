//! Saving a machine and going on with it: what runs goes on, time does not go back, and what cannot be taken over is told in one line.

mod support;

use ringfort_guest::TEST_PROMPT;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use support::tiny::Code;
use support::*;

/// Rounds of saving and restoring a Linux guest: more with RINGFORT_TEST_LONG.
fn rounds() -> usize {
    if std::env::var_os("RINGFORT_TEST_LONG").is_some() { 20 } else { 4 }
}

/// A small guest that sends back what is typed, with a disk, and where its state goes.
struct Echo {
    scratch: Scratch,
    disk: PathBuf,
    state: PathBuf,
}

impl Echo {
    fn new(name: &str) -> Echo {
        let scratch = Scratch::new(name);
        scratch.file("kernel", &Code::new().print("up\n").echo().multiboot());
        let disk = scratch.disk("disk.img", 1 << 20);
        let state = scratch.0.join("state");
        Echo { scratch, disk, state }
    }

    fn start(&self, options: &[&str]) -> Guest {
        let mut g = Guest::start(self.command(options));
        g.expect("up\n");
        g
    }

    fn command(&self, options: &[&str]) -> Command {
        let disk = format!("path={}", text(&self.disk));
        let mut args = vec!["run", "--kernel", "kernel", "--disk", &disk, "--net", "none"];
        for (option, value) in [("--accel", "soft"), ("--memory", "64M"), ("--save", "state")] {
            if !options.contains(&option) {
                args.extend([option, value]);
            }
        }
        args.extend(options);
        let mut command = ringfort(&args);
        command.current_dir(&self.scratch.0);
        command
    }

    /// Start it, let it say something, save it.
    fn saved(&self, options: &[&str]) {
        let mut g = self.start(options);
        g.send("before");
        g.expect("before");
        g.send("\x01s");
        assert_eq!(g.wait().code(), Some(0));
        assert!(self.state.exists());
    }

    fn restore(&self, options: &[&str]) -> Command {
        let mut c = ringfort(&["restore", text(&self.state)]);
        if !options.contains(&"--accel") {
            c.args(["--accel", "soft"]);
        }
        c.args(options);
        c
    }

    /// Restoring is refused with one line that has all of `parts`.
    fn refuses(&self, options: &[&str], parts: &[&str]) {
        let out = self.restore(options).stdin(Stdio::null()).output().expect("ringfort");
        let said = String::from_utf8(out.stderr).expect("text");
        assert_eq!(out.status.code(), Some(2), "{parts:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(out.stdout.is_empty(), "something ran");
        for part in parts.iter().chain(&[text(&self.state)]) {
            assert!(said.contains(part), "no {part:?} in: {said}");
        }
    }
}

#[test]
fn a_guest_goes_on_where_it_was_again_and_again() {
    let e = Echo::new("saved-echo");
    e.saved(&[]);
    for round in 0..3 {
        // The first restored one saves to the same file by default.
        let mut g = Guest::start(e.restore(&[]));
        g.send(&format!("round {round}"));
        g.expect(&format!("round {round}"));
        assert!(!g.said.contains("up"), "it was booted: {}", g.said);
        if round == 2 {
            // A reset boots the kernel of the configuration.
            g.send("\x01r");
            g.expect("up\n");
            g.send("\x01x");
        } else {
            g.signal("USR1");
        }
        assert_eq!(g.wait().code(), Some(0));
    }
}

#[test]
fn saving_that_fails_leaves_the_guest_running_and_no_file() {
    let e = Echo::new("saved-fails");
    let folder = e.scratch.0.join("gone");
    std::fs::create_dir(&folder).expect("a folder");
    let mut g = e.start(&["--save", "gone/state"]);
    std::fs::remove_dir(&folder).expect("an empty folder");
    g.send("\x01s");
    g.send("still here");
    g.expect("still here");
    std::fs::create_dir(&folder).expect("a folder");
    g.send("\x01s");
    assert_eq!(g.wait().code(), Some(0));
    assert!(folder.join("state").exists());
    // Without a name of its own it does not take the place of a file.
    let kept = e.scratch.file("guest.rfstate", b"precious");
    let mut g = Guest::start({
        let mut c =
            ringfort(&["run", "--accel", "soft", "--memory", "64M", "--kernel", "kernel", "--net", "none"]);
        c.current_dir(&e.scratch.0);
        c
    });
    g.expect("up\n");
    g.signal("USR1");
    g.send("and here");
    g.expect("and here");
    std::fs::remove_file(&kept).expect("the file");
    g.signal("USR1");
    assert_eq!(g.wait().code(), Some(0));
    assert!(kept.exists());
}

#[test]
fn killed_while_saving_leaves_nothing() {
    let e = Echo::new("saved-killed");
    let before = std::fs::read_dir(&e.scratch.0).expect("the folder").count();
    // Memory that takes a moment to go through; on a machine that is too quick for that, more of it.
    for memory in ["768M", "1G", "1500M", "2G"] {
        let (mut g, _terminal) = Guest::on_terminal(e.command(&["--memory", memory]));
        g.expect("up\n");
        g.send("\x01s");
        g.expect("saving ");
        g.signal("KILL");
        let ended = g.end();
        if ended.code() == Some(0) {
            std::fs::remove_file(&e.state).expect("the state");
            continue;
        }
        assert_eq!(std::fs::read_dir(&e.scratch.0).expect("the folder").count(), before);
        return;
    }
    println!("skipped: saving was always done before the process could be killed");
}

#[test]
fn state_files_that_cannot_be_taken_over_are_refused() {
    let e = Echo::new("saved-bad");
    e.refuses(&[], &["no such file"]);
    e.saved(&[]);
    let good = std::fs::read(&e.state).expect("the state");
    let put = |bytes: &[u8]| std::fs::write(&e.state, bytes).expect("the state");
    for cut in [0, 5, 8, 100, good.len() / 2, good.len() - 1] {
        put(&good[..cut]);
        e.refuses(&[], &["cut short"]);
    }
    let flipped = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 0x10;
        bytes
    };
    for at in [200, good.len() / 2, good.len() - 40] {
        put(&flipped(at));
        e.refuses(&[], &["damaged"]);
    }
    put(&[&b"RFSTATE9"[..], &good[8..]].concat());
    e.refuses(&[], &["format version 9"]);
    put(b"something else entirely");
    e.refuses(&[], &["no saved state"]);
    put(&[&good[..], b"more"].concat());
    e.refuses(&[], &["behind its end"]);
    // Sections as they are, but of a machine with more, fewer, newer ones: through the library, which counts the checksums anew.
    put(&rewritten(&good, |s| s.instance += u32::from(s.kind == "serial16550") * 7));
    e.refuses(&[], &["of another machine", "serial"]);
    put(&rewritten(&good, |s| s.version += u32::from(s.kind == "i8254") * 7));
    e.refuses(&[], &["newer", "i8254"]);
    put(&rewritten(&good, |s| {
        if s.kind == "vcpu" {
            s.body.truncate(20);
        }
    }));
    e.refuses(&[], &["vcpu", "does not decode"]);
    put(&good);
    e.refuses(&["--disk", "2=x.img"], &["--disk 2", "1 disks"]);
    e.refuses(&["--console", "pty"], &["--console"]);
    // The disk: gone, changed, of another size.
    let aside = e.scratch.0.join("aside.img");
    std::fs::rename(&e.disk, &aside).expect("the disk");
    e.refuses(&[], &["disk.img", "no such file"]);
    let mut g = Guest::start(e.restore(&["--disk", &format!("1={}", text(&aside))]));
    g.send("moved");
    g.expect("moved");
    g.send("\x01x");
    assert_eq!(g.wait().code(), Some(0));
    std::fs::rename(&aside, &e.disk).expect("the disk");
    std::fs::write(&e.disk, vec![1; 1 << 20]).expect("the disk");
    e.refuses(&[], &["disk.img", "written to since", "--ignore-disk-changes"]);
    let mut g = Guest::start(e.restore(&["--ignore-disk-changes"]));
    g.send("anyway");
    g.expect("anyway");
    g.send("\x01x");
    assert_eq!(g.wait().code(), Some(0));
    std::fs::write(&e.disk, vec![1; 2 << 20]).expect("the disk");
    e.refuses(&["--ignore-disk-changes"], &["2097152 bytes", "1048576"]);
}

/// The same state with sections changed by `f`.
fn rewritten(state: &[u8], f: impl Fn(&mut ringfort_state::Section)) -> Vec<u8> {
    let mut reader = ringfort_state::Reader::new(state).expect("a state");
    let mut writer = ringfort_state::Writer::new(Vec::new()).expect("memory");
    while let Some(mut section) = reader.next_section().expect("a section") {
        f(&mut section);
        writer.section(&section).expect("memory");
    }
    let mut out = writer.finish().expect("memory");
    out.extend_from_slice(reader.into_inner());
    out
}

#[test]
fn show_tells_what_is_in_it() {
    let e = Echo::new("saved-show");
    e.saved(&["--cpus", "2", "--name", "somebody"]);
    let show = |path: &Path| ringfort(&["state", "show", text(path)]).output().expect("ringfort");
    let out = show(&e.state);
    assert_eq!(out.status.code(), Some(0));
    let v: serde_json::Value = serde_json::from_slice(&out.stdout).expect("JSON");
    assert_eq!(v["config"]["name"], "somebody");
    assert_eq!(v["vcpus"].as_array().map(Vec::len), Some(2));
    let rip = v["vcpus"][0]["registers"]["rip"].as_str().expect("a register");
    assert!(rip.starts_with("0x1000") && rip.len() == 8, "in the echo loop: {rip}");
    let ram = &v["streams"][0];
    let all = ram["data-bytes"].as_u64().zip(ram["zero-bytes"].as_u64()).map(|(a, b)| a + b);
    assert_eq!(all, Some(64 << 20));
    let sections = v["sections"].as_array().expect("sections");
    // The machine's own are shown by other names.
    for s in
        sections.iter().filter(|s| !["machine", "clocks", "vcpu", "disk"].iter().any(|k| s["kind"] == *k))
    {
        assert!(s.get("state").is_some() && s.get("error").is_none(), "its fields: {s}");
    }
    let of =
        |kind: &str| sections.iter().find(|s| s["kind"] == kind).unwrap_or_else(|| panic!("no {kind}: {v}"));
    // As after reset: 9600 baud.
    assert_eq!(of("serial16550")["state"]["divisor"], 12, "{v}");
    // Vendor and device of virtio 1.3 section 4.1.2.
    let config = of("virtio-blk")["state"]["config"]["registers"].as_str().expect("bytes");
    assert!(config.starts_with("f41a4210"), "{config}");
    let show_bodies = ringfort(&["state", "show", "--bodies", text(&e.state)]).output().expect("ringfort");
    let b: serde_json::Value = serde_json::from_slice(&show_bodies.stdout).expect("JSON");
    assert!(b["sections"][0]["body"].is_string() && v["sections"][0]["body"].is_null());
    std::fs::write(&e.state, &std::fs::read(&e.state).expect("it")[..300]).expect("it");
    assert_eq!(show(&e.state).status.code(), Some(2));
}

/// Start counting, with the uptime and the time of day, and hashing: whoever is told wrong sums or sees time go back says WRONG.
const COUNT: &str = "(n=0; while :; do n=$((n+1)); read up idle </proc/uptime; echo count $n $up $(date +%s) end; usleep 20000; done) &\n";
const HASH: &str = "(s=$(sha256sum </tmp/noise); while [ \"$s\" = \"$(sha256sum </tmp/noise)\" ]; do echo h >>/tmp/hashes; done; echo WRO''NG) &\n";

/// Check all that a guest has said over its lives: it counted on without a gap, and neither clock went back. Lines of Ringfort's own are
/// left out; they may stand in the middle of the guest's. The last count.
fn check_counts(said: &str) -> f64 {
    assert!(!said.contains("WRONG"), "a sum was wrong:\n{said}");
    let mut guests = String::new();
    for line in said.split_inclusive('\n') {
        guests += line.find("ringfort: ").map_or(line, |at| &line[..at]);
    }
    let mut last = [0.0; 3];
    for line in guests.lines() {
        let Some(rest) = line.trim_end().strip_prefix("count ").and_then(|l| l.strip_suffix(" end")) else {
            continue;
        };
        let words: Vec<f64> = rest.split(' ').map(|w| w.parse().expect("a number")).collect();
        let now = <[f64; 3]>::try_from(words).expect("three numbers");
        // The first lines stand among what was typed.
        assert!(last[0] == 0.0 || now[0] == last[0] + 1.0, "the count jumped: {last:?}, {now:?}");
        assert!(now[1] >= last[1] && now[2] >= last[2], "time went back: {last:?}, {now:?}");
        // The guest stood still meanwhile: its clocks do not jump ahead either.
        assert!(last[0] == 0.0 || now[1] - last[1] < 30.0, "time jumped: {last:?}, {now:?}");
        last = now;
    }
    last[0]
}

/// A Linux guest with two vCPUs counts and hashes while it is saved and restored, each time under the next of `engines`.
fn goes_on(name: &str, engines: &[&str]) {
    let _turn = one_at_a_time();
    let guest = test_guest();
    let scratch = Scratch::new(name);
    let (disk, layer) = (scratch.disk("disk.img", 16 << 20), scratch.disk("layer.img", 16 << 20));
    let state = scratch.0.join("state");
    let mut g = Guest::run(&run_args(
        engines[0],
        &guest.kernel,
        &guest.initrd,
        &guest.cmdline,
        &[
            "--memory",
            "256M",
            "--cpus",
            "2",
            "--disk",
            &format!("path={}", text(&disk)),
            "--disk",
            &format!("path={},snapshot=on", text(&layer)),
            "--save",
            text(&state),
        ],
    ));
    g.expect(TEST_PROMPT);
    g.shell("head -c 300000 /dev/urandom >/tmp/noise; dd if=/tmp/noise of=/dev/vda conv=fsync 2>/dev/null; dd if=/tmp/noise of=/dev/vdb conv=fsync 2>/dev/null");
    let sum = g.shell("sha256sum </tmp/noise");
    g.shell("dd if=/tmp/noise of=/dev/vdb bs=4096 seek=1000 conv=notrunc,fsync 2>/dev/null");
    g.send(HASH);
    g.send(COUNT);
    g.expect("count 10 ");
    let mut said = String::new();
    for round in 1..=rounds() {
        g.send("\x01s");
        said += &g.ended_well();
        let engine = engines[round % engines.len()];
        g = Guest::start(ringfort(&["restore", text(&state), "--accel", engine]));
        for _ in 0..10 {
            g.expect("count ");
        }
    }
    said += &g.said;
    assert!(check_counts(&said) >= 10.0 * rounds() as f64);
    // All of it works: both vCPUs, timers, disks with what was written to them.
    g.send("kill %1 %2\n");
    g.expect("\n");
    assert_eq!(g.shell("sha256sum </tmp/noise"), sum);
    assert_eq!(g.shell("dd if=/dev/vda bs=300000 count=1 2>/dev/null | sha256sum"), sum);
    assert_eq!(g.shell("dd if=/dev/vdb bs=4096 skip=1000 2>/dev/null | head -c 300000 | sha256sum"), sum);
    for cpu in ["0", "1"] {
        assert_eq!(g.shell(&format!("taskset -c {cpu} cut -d' ' -f39 /proc/self/stat")), cpu);
    }
    let hashes: u32 = g.shell("wc -l </tmp/hashes").parse().expect("a number");
    assert!(hashes > rounds() as u32, "{hashes}");
    let problems = g.shell("dmesg | grep -icE 'unstable|stall|BUG:|lockup|skew' || true");
    assert_eq!(problems, "0", "{}", g.shell("dmesg | tail -30"));
    g.send("poweroff -f\n");
    assert_eq!(g.wait().code(), Some(0));
    assert!(std::fs::read(&layer).expect("the disk").iter().all(|&b| b == 0));
}

#[test]
fn linux_goes_on_under_translator_and_interpreter_in_turn() {
    goes_on("saved-linux", &["soft", "soft,tier=interp"]);
}

/// A guest in C (`support/moving.c`): its image, or `None` where there is no C compiler for it.
fn moving_guest(scratch: &Scratch) -> Option<PathBuf> {
    let (elf, image) = (scratch.0.join("moving.elf"), scratch.0.join("moving"));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/moving.c");
    let built = Command::new("gcc")
        .args("-m32 -march=i686 -O2 -ffreestanding -fno-pic -no-pie -nostdlib -static -fno-stack-protector -mno-sse".split(' '))
        .args("-fcf-protection=none -Wl,-Ttext=0x100040 -Wl,--section-start=.boot=0x100000 -Wl,-N -Wl,--build-id=none".split(' '))
        .args(["-Wl,--no-warnings", "-o", text(&elf), text(&source)])
        .output();
    let flat = Command::new("objcopy").args(["-O", "binary", text(&elf), text(&image)]).status();
    match (built, flat) {
        (Ok(out), Ok(flat)) if out.status.success() && flat.success() => Some(image),
        (Ok(out), _) => panic!("gcc: {}", String::from_utf8_lossy(&out.stderr)),
        _ => {
            println!("skipped: there is no gcc here");
            None
        }
    }
}

/// A line of that guest: count, TSC, paravirtual clock and HPET in nanoseconds, hash.
struct Line {
    count: u64,
    tsc: u64,
    paravirt: u64,
    hpet: u64,
    hash: String,
}

fn moving_lines(said: &str) -> Vec<Line> {
    let period =
        said.split("period ").nth(1).and_then(|p| u64::from_str_radix(&p[..8], 16).ok()).expect("a period");
    let line = |l: &str| {
        let words: Vec<&str> = l.strip_prefix("count ")?.strip_suffix(" end")?.split(' ').collect();
        let n = |at: usize| u64::from_str_radix(words[at], 16).expect("a number");
        // The HPET's period is in millionths of nanoseconds.
        let hpet = (u128::from(n(3)) * u128::from(period) / 1_000_000) as u64;
        Some(Line { count: n(0), tsc: n(1), paravirt: n(2), hpet, hash: words[5].into() })
    };
    said.lines().filter_map(line).collect()
}

/// What the guest's CPUs have by default can be gone on with in software; what has all of KVM's features is told what stands in the way,
/// and the model that both have goes either way.
#[test]
fn default_guests_move_from_kvm_to_the_software_engine() {
    if let Err(e) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        println!("skipped: /dev/kvm: {e}");
        return;
    }
    let e = Echo::new("saved-default");
    let goes_on = |engine: &str, what: &str| {
        let mut g = Guest::start(e.restore(&["--accel", engine]));
        g.send(what);
        g.expect(what);
        g.send("\x01s");
        g.ended_well()
    };
    e.saved(&["--accel", "kvm"]);
    let said = goes_on("soft", "from KVM");
    // It is told what it does in vain.
    let shown = ringfort(&["state", "show", text(&e.state)]).output().expect("ringfort").stdout;
    let shown: serde_json::Value = serde_json::from_slice(&shown).expect("JSON");
    let has = |f: &str| shown["cpu-features"].as_array().expect("a list").iter().any(|n| n == f);
    let mitigations = ["spec-ctrl", "stibp", "ssbd", "ibpb", "ibrs", "amd-ssbd", "virt-ssbd", "md-clear"];
    assert_eq!(
        said.contains("against speculation has no effect"),
        mitigations.into_iter().any(has),
        "{said}"
    );
    goes_on("kvm", "and back");
    goes_on("soft", "and again");
    // Where KVM has less, it is said which, and with what it would have gone.
    std::fs::remove_file(&e.state).expect("the state");
    e.saved(&[]);
    let mut tried = e.restore(&["--accel", "kvm"]);
    let out = tried.stdin(Stdio::null()).output().expect("ringfort");
    let said = String::from_utf8(out.stderr).expect("text");
    if out.status.code() == Some(2) {
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(said.contains("the engine kvm lacks here: ") && said.contains("--cpu portable"), "{said}");
    }
    std::fs::remove_file(&e.state).expect("the state");
    e.saved(&["--cpu", "portable"]);
    goes_on("kvm", "from software");
    goes_on("soft", "and back");
}

/// A guest counts, hashes and tells time while it goes from the software engine to KVM and back, ten times.
#[test]
fn a_guest_moves_between_the_engines_ten_times() {
    if let Err(e) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        println!("skipped: /dev/kvm: {e}");
        return;
    }
    let scratch = Scratch::new("saved-moves");
    let Some(image) = moving_guest(&scratch) else { return };
    let state = scratch.0.join("state");
    let mut g = Guest::start(ringfort(&[
        "run",
        "--accel",
        "soft",
        "--memory",
        "32M",
        "--net",
        "none",
        "--cpu",
        "portable",
        "--kernel",
        text(&image),
        "--save",
        text(&state),
    ]));
    let mut said = String::new();
    for turn in 0..=20 {
        for _ in 0..20 {
            g.expect("count ");
        }
        if turn < 20 {
            g.send("\x01s");
            said += &g.ended_well();
            let engine = ["kvm", "soft"][turn % 2];
            g = Guest::start(ringfort(&["restore", text(&state), "--accel", engine]));
        }
    }
    g.send("\x01x");
    said += &g.ended_well();
    let lines = moving_lines(&said);
    assert!(lines.len() >= 21 * 15, "{} lines", lines.len());
    for (n, pair) in lines.windows(2).enumerate() {
        let (a, b) = (&pair[0], &pair[1]);
        assert_eq!((a.count, b.count), (n as u64 + 1, n as u64 + 2), "it counts on");
        assert!(b.tsc > a.tsc, "TSC: {:#x}, then {:#x}", a.tsc, b.tsc);
        assert!(b.paravirt > a.paravirt, "paravirtual clock: {}, then {}", a.paravirt, b.paravirt);
        assert!(b.hpet > a.hpet, "HPET: {}, then {}", a.hpet, b.hpet);
    }
    // The clocks agree about how long it all took. Each round may be held up between one clock and the next, but that does not add up.
    let (first, last) = (&lines[0], &lines[lines.len() - 1]);
    let (by_paravirt, by_hpet) = (last.paravirt - first.paravirt, last.hpet - first.hpet);
    let apart = by_paravirt.abs_diff(by_hpet);
    assert!(apart < by_hpet / 50 + 200_000_000, "{by_paravirt} ns by the one, {by_hpet} by the other");
    // All hashes, by somebody else's SHA-256.
    let check = "import sys, hashlib\nh = bytes(32)\nfor line in sys.stdin:\n    h = hashlib.sha256(h).digest()\n    assert h.hex() == line.strip()";
    let mut python =
        Command::new("python3").args(["-c", check]).stdin(Stdio::piped()).spawn().expect("python3");
    let all: String = lines.iter().map(|l| format!("{}\n", l.hash)).collect();
    std::io::Write::write_all(&mut python.stdin.take().expect("piped"), all.as_bytes())
        .expect("python3 reads");
    assert!(python.wait().expect("its status").success(), "a hash is wrong");
}
