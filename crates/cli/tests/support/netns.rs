//! Network namespaces that tests make, as root, and that go away with them.

use super::{Guest, test_guest, text};
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// A network namespace with a name.
pub struct NetNs(pub String);

impl NetNs {
    /// A new one; `None`, and why on standard error, where that is not allowed.
    pub fn new(name: &str) -> Option<NetNs> {
        let name = format!("rf{}-{name}", std::process::id());
        for needed in ["/dev/net/tun", "/proc/self/ns/net"] {
            if let Err(e) = std::fs::metadata(needed) {
                eprintln!("skipped: {needed}: {e}");
                return None;
            }
        }
        let made = Command::new("ip").args(["netns", "add", &name]).output();
        match made {
            Ok(o) if o.status.success() => {
                let ns = NetNs(name);
                ns.ip("link set lo up");
                Some(ns)
            }
            Ok(o) => {
                eprintln!("skipped: no network namespace: {}", String::from_utf8_lossy(&o.stderr).trim());
                None
            }
            Err(e) => {
                eprintln!("skipped: ip (package iproute2): {e}");
                None
            }
        }
    }

    /// A command in it.
    pub fn command(&self, program: &str) -> Command {
        let mut c = Command::new("ip");
        c.args(["netns", "exec", &self.0, program]);
        c
    }

    pub fn output(&self, words: &str) -> Output {
        let mut words = words.split_whitespace();
        let program = words.next().expect("a program");
        self.command(program).args(words).output().expect("ip netns exec")
    }

    /// Run a command that must succeed; gives what it said.
    pub fn run(&self, words: &str) -> String {
        let o = self.output(words);
        assert!(o.status.success(), "{words}: {}", String::from_utf8_lossy(&o.stderr));
        String::from_utf8_lossy(&o.stdout).into_owned()
    }

    pub fn ip(&self, words: &str) -> String {
        self.run(&format!("ip {words}"))
    }

    /// A command that must fail; gives its one line.
    pub fn fails(&self, words: &str) -> String {
        let o = self.output(words);
        let said = String::from_utf8_lossy(&o.stderr).into_owned();
        assert!(!o.status.success(), "{words} did not fail");
        assert_eq!(said.lines().count(), 1, "{said}");
        said
    }

    /// What a network could leave behind: links and rules.
    pub fn traces(&self) -> (String, String) {
        (self.ip("-o -br link"), self.run("nft list ruleset"))
    }

    /// A guest in it, at its shell.
    pub fn guest(&self, options: &[&str]) -> Guest {
        let guest = test_guest();
        self.guest_of(&guest.kernel, &guest.initrd, options)
    }

    /// The same, with this kernel.
    pub fn guest_of(&self, kernel: &Path, initrd: &Path, options: &[&str]) -> Guest {
        let guest = test_guest();
        let mut c = self.command(env!("CARGO_BIN_EXE_ringfort"));
        c.args(["run", "--accel", "soft", "--memory", "256M", "--cmdline", &guest.cmdline]);
        c.args(["--kernel", text(kernel), "--initrd", text(initrd)]).args(options);
        Guest::start(c)
    }
}

impl Drop for NetNs {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).output();
    }
}

/// Wait until `done`, which no event tells of.
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < end, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Whether one of some pings is answered.
pub fn pings(g: &mut Guest, to: &str) -> bool {
    g.shell(&format!(
        "if ping -c 1 -W 3 {to} >/dev/null || ping -c 2 -W 3 {to} >/dev/null; then echo yes; else echo no; fi"
    )) == "yes"
}
