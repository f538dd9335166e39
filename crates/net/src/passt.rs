//! Networking by the program passt, which this process starts and which ends with it. It speaks QEMU's form of a stream over a pair of unix
//! sockets.

use crate::stream::Stream;
use crate::sys::{Created, inherit};
use crate::{NetBackend, NetError, NetEvents, Offloads, Sent, VnetHeader};
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder};
use std::io::{ErrorKind, Read as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// How long passt may take to be ready.
const START: Duration = Duration::from_secs(10);
/// The largest IP packet that passt carries, and what it tells guests by default: passt(1), `--mtu`.
const MTU: u16 = 65_520;

/// How passt is used.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PasstConfig {
    /// The program; looked for in the search path if not given.
    pub path: Option<PathBuf>,
    /// Further arguments for it, as they stand in passt(1).
    pub arguments: Vec<String>,
}

/// A running passt, and the connection to it.
pub struct Passt {
    stream: Stream,
    _process: Process,
}

/// The program; it goes away with this value.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The folder in which the program says that it is ready; it goes away with this value.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Passt {
    /// Start passt at one end of a pair of sockets.
    ///
    /// # Errors
    /// [`NetError`]: there is no such program, or what it says itself. Nothing is left behind.
    pub fn start(config: &PasstConfig) -> Result<Passt, NetError> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("ringfort-passt-{}-{number}", std::process::id()));
        DirBuilder::new()
            .mode(0o700)
            .create(&folder)
            .map_err(NetError::host(format!("passt: making {}", folder.display())))?;
        let program = config.path.clone().unwrap_or_else(|| "passt".into());
        // Only for as long as it starts: should this process be killed later, nothing is left behind.
        let folder = Folder(folder);
        let (process, ours, mut remarks) = Process::spawn(&program, config, &folder.0)?;
        drop(folder);
        // It goes on saying things, which nobody reads; a full pipe must not stop it.
        let drain = move || _ = std::io::copy(&mut remarks, &mut std::io::sink());
        std::thread::Builder::new()
            .name("net-passt".into())
            .spawn(drain)
            .map_err(NetError::host("a thread for passt's remarks"))?;
        Ok(Passt { stream: Stream::over(ours.into())?, _process: process })
    }
}

impl Process {
    /// Start `program` and wait until it says in `folder` that it is ready: our end of the sockets, and what it says.
    fn spawn(
        program: &Path,
        config: &PasstConfig,
        folder: &Path,
    ) -> Result<(Process, UnixStream, ChildStderr), NetError> {
        let fail = |e| NetError::host(format!("starting {}", program.display()))(e);
        // As root it becomes another user before it writes the file that says that it is ready.
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o1733);
        fs::set_permissions(folder, mode).map_err(fail)?;
        let (ours, theirs) = UnixStream::pair().map_err(fail)?;
        let started = Created::watch(folder, START).map_err(fail)?;
        let mut command = Command::new(program);
        command
            // Stay in the foreground; it ends with its socket.
            .args(["-f", "-F", &theirs.as_raw_fd().to_string(), "-P"])
            .arg(folder.join("pid"))
            .args(&config.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        inherit(&mut command, theirs);
        let spawned = command.spawn();
        // The other end of the sockets is the child's alone from here on.
        drop(command);
        let mut process = match spawned {
            Ok(child) => Process(child),
            Err(e) if e.kind() == ErrorKind::NotFound => {
                let what = format!("{}: no such program; install passt or give path=", program.display());
                return Err(NetError::Refused(what));
            }
            Err(e) => return Err(fail(e)),
        };
        let child = &mut process.0;
        let ready = started.wait(child).map_err(fail)?;
        let remarks = child.stderr.take().ok_or_else(|| fail(ErrorKind::BrokenPipe.into()))?;
        match child.try_wait().map_err(fail)? {
            None if ready => Ok((process, ours, remarks)),
            None => {
                let what = format!("{} is not ready after {} s", program.display(), START.as_secs());
                Err(NetError::Refused(what))
            }
            Some(status) => {
                let mut said = String::new();
                let _ = remarks.take(16 << 10).read_to_string(&mut said);
                let why = reason(&said).unwrap_or("it gave no reason");
                Err(NetError::Refused(format!("{} ended at once ({status}): {why}", program.display())))
            }
        }
    }
}

/// What a program that ended said of why: its last line, or, if that is of an explanation of its options, the line that complains.
fn reason(said: &str) -> Option<&str> {
    const COMPLAINTS: [&str; 7] =
        ["unrecognized", "nvalid", "requires an argument", "ailed", "annot", "ouldn't", "rror"];
    let lines = || said.lines().map(str::trim).filter(|l| !l.is_empty() && !l.contains("syslog"));
    let explained = said.contains("Usage:");
    let complaint = lines().find(|l| explained && COMPLAINTS.iter().any(|c| l.contains(c)));
    complaint.or_else(|| lines().next_back())
}

impl NetBackend for Passt {
    fn accepts(&self) -> Offloads {
        self.stream.accepts()
    }

    fn produces(&self) -> Offloads {
        self.stream.produces()
    }

    fn mtu(&self) -> Option<u16> {
        Some(MTU)
    }

    fn attach(&self, events: Arc<dyn NetEvents>) {
        self.stream.attach(events);
    }

    fn set_offloads(&self, offloads: Offloads) {
        self.stream.set_offloads(offloads);
    }

    fn send(&self, pair: u16, header: &VnetHeader, frame: &[u8]) -> Sent {
        self.stream.send(pair, header, frame)
    }

    fn flush(&self, pair: u16) {
        self.stream.flush(pair);
    }

    fn receive(&self, pair: u16, frame: &mut Vec<u8>) -> Option<VnetHeader> {
        self.stream.receive(pair, frame)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(path: &str, arguments: &[&str]) -> String {
        let arguments = arguments.iter().map(|a| (*a).to_owned()).collect();
        let config = PasstConfig { path: Some(path.into()), arguments };
        Passt::start(&config).err().expect("an error").to_string()
    }

    #[test]
    fn the_reason_is_among_what_was_said() {
        let usage =
            "passt: unrecognized option '--x'\nUsage: passt [OPTION]...\n\n  -h  help\n    default: none\n";
        assert_eq!(reason(usage), Some("passt: unrecognized option '--x'"));
        assert_eq!(
            reason("No interfaces\nFailed to bind port 22\n(see syslog)\n"),
            Some("Failed to bind port 22")
        );
        assert_eq!(reason("\n"), None);
    }

    #[test]
    fn what_does_not_start_is_told() {
        assert!(error("/no/such/passt", &[]).contains("install passt"));
        let said = error("sh", &[]);
        assert!(said.starts_with("sh ended at once"), "{said}");
    }
}
