//! The interactive terminal: raw while the guest runs, with an escape key, and as before however it ends.

mod support;

use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use support::tiny::Code;
use support::*;

/// A guest that sends back what is typed, on a terminal; with the terminal's settings from before.
struct Session {
    guest: Guest,
    terminal: PathBuf,
    before: String,
    /// Kept so that the terminal outlives the process.
    _held: std::fs::File,
    _scratch: Scratch,
}

impl Session {
    fn start(name: &str) -> Session {
        let scratch = Scratch::new(name);
        let kernel = scratch.file("kernel", &Code::new().print("up\n").echo().multiboot());
        let command = ringfort(&["run", "--memory", "64M", "--kernel", text(&kernel)]);
        // The settings to compare with are those of a terminal in its usual state.
        let (guest, terminal) = Guest::on_terminal(command);
        let held = std::fs::File::open(&terminal).expect("the terminal");
        let mut s = Session { guest, terminal, before: String::new(), _held: held, _scratch: scratch };
        s.guest.expect("up\n");
        let now = stty(&s.terminal, &["-a"]);
        for off in ["-icanon", "-echo ", "-isig", "-ixon"] {
            assert!(now.contains(off), "not raw, {off} is missing: {now}");
        }
        s.before = usual();
        s
    }

    /// Ended, with the terminal as it was.
    fn restored(&self, why: &str) {
        assert_eq!(stty(&self.terminal, &["-g"]), self.before, "{why}");
    }
}

/// The settings of a terminal that nobody has touched but `stty sane`.
fn usual() -> String {
    let (_master, name) = ringfort_base::pty::open().expect("a terminal");
    stty(&name, &["sane"]);
    stty(&name, &["-g"])
}

#[test]
fn keys_go_to_the_guest_as_they_are() {
    let mut s = Session::start("term-keys");
    // Interrupt, suspend, quit, end of file, stop and go on; twice, for whoever presses them harder.
    let keys = "\x03\x1a\x1c\x04\x13\x11\r";
    for _ in 0..2 {
        s.guest.send(keys);
        s.guest.expect(keys);
    }
    s.guest.send("\x01h");
    let help = s.guest.expect("send Ctrl-A to the guest");
    for key in ["Ctrl-A h", "Ctrl-A x", "Ctrl-A p", "Ctrl-A r"] {
        assert!(help.contains(key), "no {key} in {help}");
    }
    assert!(help.lines().skip(1).all(|l| !l.contains('\n')) && help.contains("\r\n"));
    // Reset: the guest starts anew, on the same terminal.
    s.guest.send("\x01r");
    s.guest.expect("up\n");
    s.guest.send("still here");
    s.guest.expect("still here");
    s.guest.send("\x01x");
    assert_eq!(s.guest.end().code(), Some(0));
    s.restored("");
}

#[test]
fn a_signal_that_asks_to_end_restores_the_terminal() {
    for name in ["TERM", "INT", "HUP"] {
        let mut s = Session::start(&format!("term-{name}"));
        s.guest.signal(name);
        assert_eq!(s.guest.end().code(), Some(0), "{name}");
        s.restored(name);
    }
}

/// Whether this process ignores signal `number` (proc(5), SigIgn).
fn ignored(number: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").expect("own status");
    let mask = status.lines().find_map(|l| l.strip_prefix("SigIgn:")).expect("a mask");
    u64::from_str_radix(mask.trim(), 16).expect("hexadecimal") >> (number - 1) & 1 != 0
}

#[test]
fn a_crash_restores_the_terminal() {
    for (name, number) in [("SEGV", 11), ("ABRT", 6), ("BUS", 7), ("ILL", 4), ("QUIT", 3)] {
        // Whoever started the tests may have had a signal ignored (a shell does so in the background), which children inherit.
        if ignored(number) {
            continue;
        }
        let mut s = Session::start(&format!("term-{name}"));
        s.guest.signal(name);
        assert_eq!(s.guest.end().signal(), Some(number), "{name}");
        s.restored(name);
    }
}

#[test]
fn a_run_that_comes_to_nothing_leaves_the_terminal_alone() {
    let (mut guest, terminal) = Guest::on_terminal(ringfort(&["run", "--kernel", "/nowhere"]));
    let held = std::fs::File::open(&terminal).expect("the terminal");
    guest.expect("/nowhere");
    assert_eq!(guest.end().code(), Some(2));
    assert_eq!(stty(&terminal, &["-g"]), usual());
    drop(held);
}
