//! The guard acts on the whole process, so each case runs in a child: this test program again, on a pseudo-terminal.

use super::*;
use std::{
    fs::File,
    io::{Read as _, Write as _},
    os::{fd::FromRawFd as _, unix::process::ExitStatusExt as _},
    process::{Command, ExitStatus, Stdio},
};

const CHILD: &str = "RINGFORT_TEST_TERMINAL_CHILD";

/// What the child does; in the parent's run this test is empty.
#[test]
fn child() {
    let Ok(what) = std::env::var(CHILD) else { return };
    // What started the tests may have them ignored (nohup(1), a shell's `&`), which the guard rightly leaves so.
    for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM] {
        // SAFETY: the child has set no handler of its own yet.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    let stdin = io::stdin();
    let guard = RawTerminal::enter(&stdin).expect("enter").expect("a terminal");
    assert!(RawTerminal::enter(&stdin).is_err(), "one guard at a time");
    let mut byte = [0];
    // Unbuffered and without waiting for a line: only raw mode gives a single byte.
    File::from(stdin.as_fd().try_clone_to_owned().expect("clone")).read_exact(&mut byte).expect("a byte");
    assert_eq!(byte, [3], "Ctrl-C is a byte like any other");
    match what.as_str() {
        "drop" => drop(guard),
        "again" => {
            drop(guard);
            drop(RawTerminal::enter(&stdin).expect("enter").expect("a terminal"));
        }
        "panic" => panic!("on purpose"),
        // A guard that is never dropped, as when another thread panics and the process is ended.
        "thread" => {
            std::mem::forget(guard);
            assert!(std::thread::spawn(|| panic!("on purpose")).join().is_err());
        }
        "abort" => std::process::abort(),
        "segv" => {
            // SAFETY: not sound at all: the point is the fault. The address is not mapped in any process.
            unsafe { std::ptr::without_provenance_mut::<u8>(8).write_volatile(1) }
        }
        "overflow" => {
            std::mem::forget(guard);
            assert_ne!(overflow(1), 0);
        }
        "wait" => loop {
            // SAFETY: pause has no preconditions.
            unsafe { libc::pause() };
        },
        other => panic!("unknown case {other}"),
    }
}

#[allow(unconditional_recursion)]
fn overflow(n: u64) -> u64 {
    let page = std::hint::black_box([n; 512]);
    overflow(page[(n % 512) as usize] + 1) + page[0]
}

fn pty() -> (OwnedFd, OwnedFd) {
    let (mut master, mut slave) = (-1, -1);
    // SAFETY: both numbers are there to be written; the other pointers may be null.
    let r = unsafe {
        libc::openpty(
            &raw mut master,
            &raw mut slave,
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
        )
    };
    assert_eq!(r, 0, "{}", io::Error::last_os_error());
    // SAFETY: both descriptors are new and nobody else's.
    unsafe { (OwnedFd::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) }
}

fn flags(fd: &OwnedFd) -> (libc::tcflag_t, libc::tcflag_t, libc::tcflag_t, libc::tcflag_t) {
    let s = settings(fd.as_fd()).expect("settings");
    (s.c_iflag, s.c_oflag, s.c_cflag, s.c_lflag)
}

/// Run a case to its end; the terminal must be as before, and must have been raw in between.
fn case(what: &str, kill: Option<libc::c_int>) -> ExitStatus {
    let (master, slave) = pty();
    let before = flags(&slave);
    assert_ne!(before.3 & (libc::ICANON | libc::ECHO), 0, "a new terminal is not raw");
    let mut child = Command::new(std::env::current_exe().expect("self"))
        .args(["--exact", "terminal::tests::child", "--nocapture"])
        .env(CHILD, what)
        .env("RUST_BACKTRACE", "0")
        .stdin(slave.try_clone().expect("clone"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("child");
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while flags(&slave).3 & (libc::ICANON | libc::ECHO | libc::ISIG) != 0 {
        assert!(std::time::Instant::now() < deadline, "{what}: never raw");
        assert!(child.try_wait().expect("wait").is_none(), "{what}: ended early");
        std::thread::yield_now();
    }
    if let Some(signal) = kill {
        // SAFETY: the child is ours and has not been waited for.
        unsafe { libc::kill(child.id() as libc::pid_t, signal) };
    } else {
        File::from(master.try_clone().expect("clone")).write_all(&[3]).expect("write");
    }
    let status = child.wait().expect("wait");
    assert_eq!(flags(&slave), before, "{what}: the terminal is not as it was");
    status
}

#[test]
fn restored_on_drop_and_usable_again() {
    assert!(case("drop", None).success());
    assert!(case("again", None).success());
}

#[test]
fn restored_on_panic_of_any_thread() {
    assert_eq!(case("panic", None).code(), Some(101));
    assert!(case("thread", None).success());
}

#[test]
fn restored_when_the_process_crashes() {
    assert_eq!(case("abort", None).signal(), Some(libc::SIGABRT));
    assert_eq!(case("segv", None).signal(), Some(libc::SIGSEGV));
    assert_eq!(case("overflow", None).signal(), Some(libc::SIGABRT));
}

#[test]
fn restored_when_a_signal_ends_the_process() {
    for signal in [libc::SIGTERM, libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGSEGV, libc::SIGBUS] {
        assert_eq!(case("wait", Some(signal)).signal(), Some(signal));
    }
}

#[test]
fn what_is_no_terminal_is_left_alone() {
    let file = File::open("/dev/null").expect("null");
    assert!(RawTerminal::enter(&file).expect("enter").is_none());
}
