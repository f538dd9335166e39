//! One boot: start the VMM, wait for the guest's line, look at the memory, end it.

use std::{
    ffi::OsStr,
    io::Read as _,
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use ringfort_guest::TEST_READY;
use serde::Serialize;

use crate::memory::{self, Memory};

/// Output that is kept to find the line in and to show when a boot fails, in bytes.
const KEPT: usize = 64 << 10;

/// What one boot gave.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Boot {
    /// From the start of the process to the guest's line.
    pub seconds: f64,
    /// The guest's own clock at that line, which leaves out the VMM's start and the boot loader.
    pub guest_seconds: f64,
    /// Memory of the VMM at that line.
    pub memory: Memory,
}

type Common<'a> = [(&'a str, &'a OsStr); 3];

/// The command that boots under Ringfort.
pub fn ringfort(program: &Path, common: &Common<'_>, cpus: u32, mib: u32, more: &[String]) -> Command {
    let mut command = Command::new(program);
    command.arg("run");
    for (name, value) in common {
        command.arg(format!("--{name}")).arg(value);
    }
    command.args(["--memory", &format!("{mib}M"), "--cpus", &cpus.to_string()]);
    command.args(["--accel", "soft", "--net", "none", "--serial", "stdio"]).args(more);
    command
}

/// The command that boots under QEMU.
pub fn qemu(program: &Path, common: &Common<'_>, cpus: u32, mib: u32, more: &[String]) -> Command {
    let mut command = Command::new(program);
    for (name, value) in common {
        command.arg(if *name == "cmdline" { "-append".to_owned() } else { format!("-{name}") }).arg(value);
    }
    command.args(["-m", &mib.to_string(), "-smp", &cpus.to_string()]);
    command.args(["-machine", "q35", "-accel", "tcg", "-nodefaults", "-no-user-config", "-no-reboot"]);
    command.args(["-display", "none", "-serial", "stdio"]).args(more);
    command
}

/// Ends the VMM whatever happens.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Run `command` to the guest's line.
pub fn boot(mut command: Command, ram: u64, limit: Duration) -> Result<Boot, String> {
    let program = command.get_program().to_string_lossy().into_owned();
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let start = Instant::now();
    let child = command.spawn().map_err(|e| format!("cannot start {program}: {e}"))?;
    let mut child = Guard(child);
    // Kept open: the end of its input could make a VMM stop.
    let _stdin = child.0.stdin.take();
    let (tx, rx) = mpsc::channel();
    let stdout = child.0.stdout.take().ok_or("no standard output")?;
    let stderr = child.0.stderr.take().ok_or("no standard error")?;
    for stream in [Box::new(stdout) as Box<dyn std::io::Read + Send>, Box::new(stderr)] {
        let tx = tx.clone();
        std::thread::spawn(move || pump(stream, &tx));
    }
    drop(tx);
    let mut text = Vec::new();
    loop {
        match rx.recv_timeout(limit.saturating_sub(start.elapsed())) {
            Ok((at, data)) => {
                text.extend_from_slice(&data);
                if let Some(guest_seconds) = ready(&text) {
                    let memory = memory::of(child.0.id(), ram)
                        .ok_or_else(|| format!("{program} ended right after the guest's line"))?;
                    let seconds = at.duration_since(start).as_secs_f64();
                    return Ok(Boot { seconds, guest_seconds, memory });
                }
                if text.len() > KEPT {
                    text.drain(..text.len() - KEPT / 2);
                }
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {
                return Err(format!("no user space within {} s; {}", limit.as_secs(), tail(&text)));
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                let status = child.0.wait().map_or_else(|e| e.to_string(), |s| s.to_string());
                return Err(format!("it ended ({status}) before user space; {}", tail(&text)));
            }
        }
    }
}

fn pump(mut stream: Box<dyn std::io::Read + Send>, to: &mpsc::Sender<(Instant, Vec<u8>)>) {
    let mut buffer = [0; 4096];
    while let Ok(n) = stream.read(&mut buffer) {
        if n == 0 || to.send((Instant::now(), buffer[..n].to_vec())).is_err() {
            return;
        }
    }
}

/// The guest's clock, once its line is there in full.
fn ready(text: &[u8]) -> Option<f64> {
    let key = TEST_READY.as_bytes();
    let at = text.windows(key.len()).rposition(|w| w == key)? + key.len();
    let end = text[at..].iter().position(|b| matches!(b, b'\r' | b'\n'))?;
    std::str::from_utf8(&text[at..at + end]).ok()?.trim().parse().ok()
}

fn tail(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let lines: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
    format!("its last lines:\n{}", lines[lines.len().saturating_sub(8)..].join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_counts_only_when_it_is_whole() {
        assert_eq!(ready(b"noise ringfort-init: user space at 1.6"), None);
        assert_eq!(ready(b"noise\r\nringfort-init: user space at 1.68\r\n"), Some(1.68));
        assert_eq!(ready(b"ringfort-init: user space at rubbish\n"), None);
        assert_eq!(ready(b""), None);
    }

    fn sh(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_boot_is_timed_and_its_memory_read() {
        let boot =
            boot(sh("echo 'ringfort-init: user space at 2.5'; read x"), 1 << 40, Duration::from_secs(60));
        let boot = boot.expect("booted");
        assert_eq!(boot.guest_seconds, 2.5);
        assert!(boot.seconds > 0.0 && boot.memory.peak > 0);
    }

    #[test]
    fn failures_show_what_was_said() {
        let e = boot(sh("echo no such option >&2; exit 2"), 1, Duration::from_secs(60)).expect_err("ended");
        assert!(e.contains("exit status: 2") && e.contains("no such option"), "{e}");
        let e = boot(sh("echo stuck; exec cat"), 1, Duration::from_millis(300)).expect_err("stuck");
        assert!(e.contains("no user space") && e.contains("stuck"), "{e}");
        assert!(boot(Command::new("/no/such/vmm"), 1, Duration::ZERO).is_err());
    }
}
