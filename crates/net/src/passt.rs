//! Networking by the program passt, which this process starts and which ends with it. It speaks QEMU's form of a stream over a unix
//! socket.

use crate::stream::{Stream, StreamAddress, StreamConfig};
use crate::{NetBackend, NetError, NetEvents, Offloads, Sent, VnetHeader};
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder};
use std::io::{ErrorKind, Read as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// How long passt may take to listen.
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

/// The program and its folder; both go away with this value.
struct Process {
    child: Child,
    folder: PathBuf,
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

impl Passt {
    /// Start passt and connect to it.
    ///
    /// # Errors
    /// [`NetError`]: there is no such program, or what it says itself. Nothing is left behind.
    pub fn start(config: &PasstConfig) -> Result<Passt, NetError> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("ringfort-passt-{}-{number}", std::process::id()));
        // As root it becomes another user before it makes its socket; what keeps others out is that it takes one client only.
        DirBuilder::new()
            .mode(0o700)
            .create(&folder)
            .map_err(NetError::host(format!("passt: making {}", folder.display())))?;
        let opened = fs::set_permissions(&folder, std::os::unix::fs::PermissionsExt::from_mode(0o1733));
        let socket = folder.join("socket");
        let program = config.path.clone().unwrap_or_else(|| "passt".into());
        let spawned = opened.and_then(|()| {
            Command::new(&program)
                // Stay in the foreground, end with the one client.
                .args(["-f", "-1", "-s"])
                .arg(&socket)
                .args(&config.arguments)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
        });
        let child = match spawned {
            Ok(child) => child,
            Err(e) => {
                let _ = fs::remove_dir_all(&folder);
                if e.kind() == ErrorKind::NotFound {
                    let what = format!("{}: no such program; install passt or give path=", program.display());
                    return Err(NetError::Refused(what));
                }
                return Err(NetError::host(format!("starting {}", program.display()))(e));
            }
        };
        let mut process = Process { child, folder };
        wait_for(&socket, &mut process.child, &program)?;
        let config = StreamConfig { address: StreamAddress::Unix(socket), server: false, reconnect: None };
        // It has its socket a moment before it listens there.
        let end = Instant::now() + START;
        let stream = loop {
            match Stream::new(&config) {
                Ok(s) => break s,
                Err(e) if Instant::now() > end => return Err(e),
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        Ok(Passt { stream, _process: process })
    }
}

/// Return once passt listens. Its remarks go nowhere from then on.
fn wait_for(socket: &Path, child: &mut Child, program: &Path) -> Result<(), NetError> {
    let mut remarks = child.stderr.take();
    let end = Instant::now() + START;
    loop {
        if socket.exists() {
            break;
        }
        if let Ok(Some(status)) = child.try_wait() {
            let mut said = String::new();
            if let Some(r) = &mut remarks {
                let _ = r.take(16 << 10).read_to_string(&mut said);
            }
            let last = said.lines().map(str::trim).rfind(|l| !l.is_empty() && !l.contains("syslog"));
            let why = last.unwrap_or("it gave no reason");
            return Err(NetError::Refused(format!("{} ended at once ({status}): {why}", program.display())));
        }
        if Instant::now() > end {
            return Err(NetError::Refused(format!(
                "{} does not listen after {} s",
                program.display(),
                START.as_secs()
            )));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    if let Some(mut r) = remarks {
        let drain = move || _ = std::io::copy(&mut r, &mut std::io::sink());
        std::thread::Builder::new()
            .name("net-passt".into())
            .spawn(drain)
            .map_err(NetError::host("a thread for passt's remarks"))?;
    }
    Ok(())
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
    fn what_does_not_start_is_told() {
        assert!(error("/no/such/passt", &[]).contains("install passt"));
        let said = error("sh", &[]);
        assert!(said.starts_with("sh ended at once"), "{said}");
    }
}
