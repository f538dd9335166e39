//! A program whose output is watched: started, read until something is found, ended.

use std::{
    ops::ControlFlow,
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

/// Output that is kept to find something in and to show when it fails, in bytes.
const KEPT: usize = 64 << 10;

/// Ends the program whatever happens.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the program said so far, and when its last words came.
pub struct Said<'a> {
    /// Its output; the watcher takes away what it has dealt with.
    pub text: &'a mut Vec<u8>,
    /// When the last of it came.
    pub at: Instant,
    /// When the program was started.
    pub started: Instant,
    /// Its process number.
    pub pid: u32,
}

impl Said<'_> {
    /// Take the next whole line.
    pub fn line(&mut self) -> Option<String> {
        let end = self.text.iter().position(|b| *b == b'\n')?;
        let line: Vec<u8> = self.text.drain(..=end).collect();
        Some(String::from_utf8_lossy(&line).trim().to_owned())
    }
}

/// Run `command` until `watch` breaks off. `patience` is the longest that it may say nothing that satisfies `watch`,
/// counted from the start or from the last time that `watch` gave `Continue(true)`.
pub fn watch<T>(
    mut command: Command,
    patience: Duration,
    mut watch: impl FnMut(&mut Said<'_>) -> ControlFlow<T, bool>,
) -> Result<T, String> {
    let program = command.get_program().to_string_lossy().into_owned();
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let started = Instant::now();
    let mut child = Guard(command.spawn().map_err(|e| format!("cannot start {program}: {e}"))?);
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
    let (mut text, mut history) = (Vec::new(), Vec::new());
    let mut progress = started;
    loop {
        match rx.recv_timeout(patience.saturating_sub(progress.elapsed())) {
            Ok((at, data)) => {
                history.extend_from_slice(&data);
                text.extend_from_slice(&data);
                match watch(&mut Said { text: &mut text, at, started, pid: child.0.id() }) {
                    ControlFlow::Break(result) => return Ok(result),
                    ControlFlow::Continue(true) => progress = Instant::now(),
                    ControlFlow::Continue(false) => {}
                }
                for kept in [&mut text, &mut history] {
                    if kept.len() > KEPT {
                        kept.drain(..kept.len() - KEPT / 2);
                    }
                }
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {
                return Err(format!("it took more than {} s; {}", patience.as_secs(), tail(&history)));
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                let status = child.0.wait().map_or_else(|e| e.to_string(), |s| s.to_string());
                return Err(format!("it ended early ({status}); {}", tail(&history)));
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

fn tail(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let lines: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
    format!("its last lines:\n{}", lines[lines.len().saturating_sub(8)..].join("\n"))
}

/// CPU time that all threads of process `pid` have used, in seconds (`/proc/PID/task/*/schedstat`, in ns).
pub fn cpu_seconds(pid: u32) -> f64 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let ns: u64 = tasks
        .filter_map(|t| std::fs::read_to_string(t.path().join("schedstat")).ok())
        .filter_map(|text| text.split_whitespace().next()?.parse::<u64>().ok())
        .sum();
    ns as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    fn until_done(said: &mut Said<'_>) -> ControlFlow<Vec<String>, bool> {
        let mut lines = Vec::new();
        while let Some(line) = said.line() {
            lines.push(line);
        }
        if lines.iter().any(|l| l == "done") {
            ControlFlow::Break(lines)
        } else {
            ControlFlow::Continue(false)
        }
    }

    #[test]
    fn a_program_is_watched_to_what_it_should_say() {
        let lines = watch(sh("echo done; read x"), Duration::from_secs(60), until_done).expect("watched");
        assert_eq!(lines, ["done"]);
    }

    #[test]
    fn failures_show_what_was_said() {
        let e = watch(sh("echo no such option >&2; exit 2"), Duration::from_secs(60), until_done);
        let e = e.expect_err("ended");
        assert!(e.contains("exit status: 2") && e.contains("no such option"), "{e}");
        let e = watch(sh("echo stuck; exec cat"), Duration::from_millis(300), until_done).expect_err("stuck");
        assert!(e.contains("more than") && e.contains("stuck"), "{e}");
        assert!(watch(Command::new("/no/such/vmm"), Duration::ZERO, until_done).is_err());
    }

    #[test]
    fn this_process_has_used_some_cpu() {
        assert!(cpu_seconds(std::process::id()) > 0.0);
        assert_eq!(cpu_seconds(u32::MAX), 0.0);
    }
}
