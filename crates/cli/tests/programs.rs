//! Programs in the guest that give the same there as on the host: faults in the middle of instructions, code that changes
//! itself, locked operations, 32-bit code, and what real programs make of them (a compiler, a JIT, stress-ng).
//!
//! `RINGFORT_TEST_LONG=1` runs all of it on the interpreter as well, and more of everything.

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use ringfort_guest::{CpioWriter, TEST_PROMPT};
use support::*;

/// The programs of `tests/programs`, with what gcc needs to hear for each.
const PROGRAMS: [(&str, &[&str]); 4] = [
    ("snippets", &["-static", "-no-pie"]),
    ("modify", &["-static", "-pthread"]),
    ("locked", &["-static", "-pthread"]),
    // Nothing of a 32-bit C library, which a host need not have.
    (
        "i386",
        &[
            "-m32",
            "-march=i686",
            "-fno-pie",
            "-no-pie",
            "-nostdlib",
            "-static",
            "-ffreestanding",
            "-fno-stack-protector",
        ],
    ),
];

fn long() -> bool {
    std::env::var_os("RINGFORT_TEST_LONG").is_some_and(|v| v != "0")
}

/// Compile all programs into `dir`.
fn compile(dir: &Path) -> Vec<PathBuf> {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs");
    let one = |(name, flags): &(&str, &[&str])| {
        let to = dir.join(name);
        let out = Command::new("gcc")
            .args(["-O2", "-Wall", "-Wextra", "-o"])
            .arg(&to)
            .arg(sources.join(format!("{name}.c")))
            .args(*flags)
            .output()
            .expect("gcc");
        assert!(out.status.success(), "{name}: {}", String::from_utf8_lossy(&out.stderr));
        to
    };
    PROGRAMS.iter().map(one).collect()
}

/// The test guest with `programs` in `/t`.
fn start(scratch: &Scratch, programs: &[PathBuf], cpus: u32, accel: &str) -> Guest {
    let guest = test_guest();
    let mut archive = CpioWriter::new(Vec::new());
    archive.dir("t", 0o755).expect("packed");
    for program in programs {
        let name = program.file_name().and_then(|n| n.to_str()).expect("a name");
        let image = std::fs::read(program).expect("the program");
        archive.file(&format!("t/{name}"), 0o755, &image).expect("packed");
    }
    let mut initrd = std::fs::read(&guest.initrd).expect("the initramfs");
    initrd.extend(archive.finish().expect("packed"));
    let initrd = scratch.file("initrd", &initrd);
    let mut g = Guest::start(ringfort(&[
        "run",
        "--accel",
        accel,
        "--memory",
        "512M",
        "--cpus",
        &cpus.to_string(),
        "--cmdline",
        &guest.cmdline,
        "--kernel",
        text(&guest.kernel),
        "--initrd",
        text(&initrd),
    ]));
    g.expect(TEST_PROMPT);
    // What the kernel says of programs that fault would come between their lines.
    g.shell("dmesg -n 1");
    g
}

/// What a program of ours says on the host.
fn on_host(program: &Path, args: &[&str]) -> String {
    let out = Command::new(program).args(args).output().expect("the program");
    let said = String::from_utf8_lossy(&out.stdout).trim_end().to_owned();
    assert!(out.status.success(), "on the host itself: {:?} {said}", out.status);
    said
}

/// Every program says in the guest what it says on the host.
fn same_as_host(cpus: u32, accel: &str, only: &[&str]) {
    let _turn = one_at_a_time();
    let scratch = Scratch::new(&format!("programs{cpus}"));
    let programs = compile(&scratch.0);
    let mut g = start(&scratch, &programs, cpus, accel);
    let mut wrong = Vec::new();
    for program in &programs {
        let name = program.file_name().and_then(|n| n.to_str()).expect("a name");
        if !only.contains(&name) {
            continue;
        }
        let expected = on_host(program, &[]);
        let got = g.shell(&format!("/t/{name} >/tmp/out; echo status $? >>/tmp/out; cat /tmp/out"));
        let expected = format!("{expected}\nstatus 0");
        for (e, g) in expected.lines().zip(got.lines().chain(std::iter::repeat(""))).filter(|(e, g)| e != g) {
            wrong.push((name, format!("{name}: expected {e:?}, got {g:?}")));
        }
    }
    let mut details = String::new();
    for (name, what) in &wrong {
        details += &format!("{what}\n");
        // A piece of code that differs: in which of its runs, and how.
        let piece = what.split('"').nth(1).and_then(|w| w.split(' ').next()).unwrap_or_default();
        if *name == "snippets" {
            let program = scratch.0.join(name);
            let (host, guest) = (on_host(&program, &[piece]), g.shell(&format!("/t/snippets {piece}")));
            let pairs = host.lines().zip(guest.lines()).filter(|(a, b)| a != b).take(2);
            details.extend(pairs.map(|(a, b)| format!("  host  {a}\n  guest {b}\n")));
        }
    }
    g.send("poweroff -f\n");
    assert_eq!(g.wait().code(), Some(0));
    assert!(wrong.is_empty(), "{} with {accel} and {cpus} vCPUs:\n{details}", wrong.len());
}

#[test]
fn faults_and_states_are_those_of_the_host() {
    same_as_host(1, "soft", &["snippets", "i386"]);
}

#[test]
fn code_that_changes_itself() {
    same_as_host(1, "soft", &["modify"]);
}

#[test]
fn locked_operations_of_two_vcpus() {
    same_as_host(2, "soft", &["locked"]);
}

#[test]
fn code_that_changes_itself_on_two_vcpus() {
    same_as_host(2, "soft", &["modify"]);
}

#[test]
fn the_interpreter_gives_the_same() {
    if !long() {
        eprintln!("skipped: long (RINGFORT_TEST_LONG=1)");
        return;
    }
    same_as_host(2, "soft,tier=interp", &["snippets", "modify", "locked", "i386"]);
}
