//! Drives a guest over the serial console of the real `ringfort` binary.
#![allow(dead_code, reason = "each test crate uses its part")]

pub mod control;
pub mod full_kernel;
pub mod netns;
pub mod tiny;

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The longest that a guest may take for one step. Only a hang runs into it: steps end by what they wait for.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// Guests run one at a time, so that they do not take the CPU from each other.
pub fn one_at_a_time() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The test guest: kernel and busybox.
pub fn test_guest() -> ringfort_guest::TestGuest {
    let cache = ringfort_guest::cache_dir().expect("a cache folder");
    ringfort_guest::ensure_test(&cache, &mut ()).expect("the test guest")
}

/// The default guest: Debian with systemd.
pub fn debian_guest() -> ringfort_guest::DefaultGuest {
    let cache = ringfort_guest::cache_dir().expect("a cache folder");
    ringfort_guest::ensure(&cache, &mut ()).expect("the default guest")
}

/// A folder that goes away with the test.
pub struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Scratch {
        let dir = std::env::temp_dir().join(format!("ringfort-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a scratch folder");
        Scratch(dir)
    }

    /// A file with this content.
    pub fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, content).expect("a scratch file");
        path
    }

    /// An empty sparse file of `size` bytes.
    pub fn disk(&self, name: &str, size: u64) -> PathBuf {
        let path = self.0.join(name);
        std::fs::File::create(&path).and_then(|f| f.set_len(size)).expect("a disk file");
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A `ringfort` command line.
pub fn ringfort(args: &[&str]) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_ringfort"));
    c.args(args);
    c
}

/// The arguments that boot a kernel under an engine.
pub fn run_args(engine: &str, kernel: &Path, initrd: &Path, cmdline: &str, options: &[&str]) -> Vec<String> {
    let (kernel, initrd) = (text(kernel), text(initrd));
    let first = ["run", "--accel", engine, "--kernel", kernel, "--initrd", initrd, "--cmdline", cmdline];
    first.iter().chain(options).map(|s| (*s).to_owned()).collect()
}

/// The arguments that boot the test guest, without a network, with these disks.
pub fn test_run_args(options: &[&str], disks: &[String]) -> Vec<String> {
    let guest = test_guest();
    let mut all = vec!["--memory", "256M", "--net", "none"];
    all.extend(options);
    all.extend(disks.iter().flat_map(|d| ["--disk", d]));
    run_args("soft", &guest.kernel, &guest.initrd, &guest.cmdline, &all)
}

/// Log in to Debian as root, and have a shell that does not decorate what it prints.
pub fn log_in(g: &mut Guest) {
    g.expect("login: ");
    g.send("root\n");
    g.expect("# ");
    g.send("exec env TERM=dumb PS1='debian# ' sh\n");
    // Bash has put its cursor back to the margin before it hands over.
    g.expect("\rdebian# ");
}

/// A running guest.
pub struct Guest {
    child: std::process::Child,
    stdin: Box<dyn Write>,
    output: Receiver<Vec<u8>>,
    /// Everything the guest has said.
    pub said: String,
    /// How much of it has been matched.
    seen: usize,
}

impl Guest {
    /// Start `command`.
    pub fn start(mut command: Command) -> Guest {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("ringfort");
        let stdin = child.stdin.take().expect("piped");
        let stdout = child.stdout.take().expect("piped");
        Guest::with(child, Box::new(stdin), Box::new(stdout))
    }

    /// Start `ringfort` with these arguments.
    pub fn run(args: &[String]) -> Guest {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        Guest::start(ringfort(&args))
    }

    /// Start `command` on a terminal of its own; also gives the terminal's name.
    pub fn on_terminal(mut command: Command) -> (Guest, PathBuf) {
        let (master, name) = ringfort_base::pty::open().expect("a terminal");
        stty(&name, &["sane"]);
        let master = std::fs::File::from(master);
        let side = || std::fs::OpenOptions::new().read(true).write(true).open(&name).expect("the terminal");
        let child = command.stdin(side()).stdout(side()).stderr(side()).spawn().expect("ringfort");
        // The command holds the terminal's side open; without it the master reads as hung up.
        drop(command);
        let typing = master.try_clone().expect("a descriptor");
        (Guest::with(child, Box::new(typing), Box::new(master)), name)
    }

    fn with(child: std::process::Child, stdin: Box<dyn Write>, mut stdout: Box<dyn Read + Send>) -> Guest {
        let (tx, output) = channel();
        std::thread::spawn(move || {
            let mut buf = [0; 4096];
            while let Ok(n) = stdout.read(&mut buf) {
                if n == 0 || tx.send(buf[..n].to_vec()).is_err() {
                    break;
                }
            }
        });
        Guest { child, stdin, output, said: String::new(), seen: 0 }
    }

    /// Wait until the guest says `text`; gives what it said before that since the last match.
    pub fn expect(&mut self, text: &str) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.said[self.seen..].find(text) {
                let before = self.said[self.seen..self.seen + at].to_owned();
                self.seen += at + text.len();
                return before;
            }
            match self.output.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(bytes) => self.said.push_str(&String::from_utf8_lossy(&bytes)),
                Err(e) => {
                    let why = match e {
                        RecvTimeoutError::Timeout => "did not come in time",
                        RecvTimeoutError::Disconnected => "did not come before the guest ended",
                    };
                    panic!("{text:?} {why}; the guest said:\n{}", self.tail());
                }
            }
        }
    }

    /// Wait until the guest, and the process that runs it, have said all of `texts`, in whatever order.
    pub fn expect_each(&mut self, texts: &[&str]) {
        let from = self.seen;
        let mut end = from;
        for text in texts {
            self.seen = from;
            self.expect(text);
            end = end.max(self.seen);
        }
        self.seen = end;
    }

    /// The last lines of what it said.
    pub fn tail(&self) -> String {
        let lines: Vec<&str> = self.said.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    /// Type `text`.
    pub fn send(&mut self, text: &str) {
        self.stdin.write_all(text.as_bytes()).expect("the guest's input");
        self.stdin.flush().expect("the guest's input");
    }

    /// Run a shell command; gives its output, and checks that it succeeded.
    pub fn shell(&mut self, command: &str) -> String {
        // The marks are written so that the echo of the command line does not contain them. The kernel's messages would come in between what
        // the command says.
        self.send(&format!("dmesg -n 1 2>/dev/null; echo rf-'begin'; {command}; echo rf-'end':$?\n"));
        self.expect("rf-begin\r\n");
        let out = self.expect("rf-end:");
        let status = self.expect("\r\n");
        assert_eq!(status, "0", "`{command}` failed with {status}: {out}");
        out.replace('\r', "").trim_end().to_owned()
    }

    /// Wait for the process to end.
    pub fn wait(mut self) -> ExitStatus {
        let end = Instant::now() + PATIENCE;
        loop {
            match self.output.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(bytes) => self.said.push_str(&String::from_utf8_lossy(&bytes)),
                Err(RecvTimeoutError::Disconnected) => return self.child.wait().expect("its status"),
                Err(RecvTimeoutError::Timeout) => panic!("the guest did not end; it said:\n{}", self.tail()),
            }
        }
    }

    /// Wait for the process to end, however it does; gives all that it said.
    pub fn wait_said(mut self) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            match self.output.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(bytes) => self.said.push_str(&String::from_utf8_lossy(&bytes)),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => panic!("it did not end; it said:\n{}", self.tail()),
            }
        }
        self.child.wait().expect("its status");
        std::mem::take(&mut self.said)
    }

    /// Wait for the process to end with status 0; gives everything that it said.
    pub fn ended_well(&mut self) -> String {
        while let Ok(bytes) = self.output.recv_timeout(PATIENCE) {
            self.said.push_str(&String::from_utf8_lossy(&bytes));
        }
        assert_eq!(self.child.wait().expect("its status").code(), Some(0), "it said:\n{}", self.tail());
        std::mem::take(&mut self.said)
    }

    /// Wait for the process to end, whoever else holds its terminal.
    pub fn end(&mut self) -> ExitStatus {
        let end = Instant::now() + PATIENCE;
        while self.is_running() {
            assert!(Instant::now() < end, "it did not end; it said:\n{}", self.tail());
            // What it says is taken, so that it can finish saying it.
            if let Ok(bytes) = self.output.recv_timeout(Duration::from_millis(10)) {
                self.said.push_str(&String::from_utf8_lossy(&bytes));
            }
        }
        self.child.wait().expect("its status")
    }

    /// As [`wait`](Self::wait); when it has not ended after `patience`, first do `nudge`.
    pub fn wait_or(mut self, patience: Duration, nudge: impl FnOnce(&mut Guest)) -> ExitStatus {
        let end = Instant::now() + patience;
        loop {
            match self.output.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(bytes) => self.said.push_str(&String::from_utf8_lossy(&bytes)),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    nudge(&mut self);
                    break;
                }
            }
        }
        self.wait()
    }

    /// The process number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether the process is there.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("its status").is_none()
    }

    /// Send the process a signal, by its name without SIG.
    pub fn signal(&self, name: &str) {
        signal(self.child.id(), name);
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // A test that failed leaves no guest behind.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Run stty on a terminal.
pub fn stty(terminal: &Path, args: &[&str]) -> String {
    let side = std::fs::File::open(terminal).expect("the terminal");
    let out = Command::new("stty").args(args).stdin(side).output().expect("stty");
    assert!(out.status.success(), "stty: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).expect("text")
}

/// A process that does not outlive the test.
pub struct Child(pub std::process::Child);

impl Child {
    /// Send it a signal, by its name without SIG.
    pub fn signal(&self, name: &str) {
        signal(self.0.id(), name);
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn signal(pid: u32, name: &str) {
    let done = Command::new("kill").args(["-s", name, &pid.to_string()]).status().expect("kill");
    assert!(done.success());
}

/// Seconds since 1970 on the host.
pub fn host_seconds() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("a clock after 1970");
    now.as_secs() as i64
}

/// A path as text.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("a path that is text")
}

/// Wait until something is so that tells nobody of it.
pub fn patient(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < end, "{what} did not come about");
        std::thread::sleep(Duration::from_millis(20));
    }
}
