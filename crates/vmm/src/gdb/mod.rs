//! gdb's remote protocol: a socket that gdb connects to, and the machine behind it.
//!
//! A thread waits for a client and hands what it sends to the main loop, where the [`Session`] is: everything about the machine happens there.
//! While gdb has the machine stopped it is paused as a whole, its clocks included.

mod arch;
mod monitor;
mod target;

use crate::machine::Machine;
use gdbstub::common::Signal;
use gdbstub::conn::Connection;
use gdbstub::stub::state_machine::GdbStubStateMachine;
use gdbstub::stub::{BaseStopReason, DisconnectReason, GdbStub, MultiThreadStopReason};
use ringfort_engine::DebugStop;
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::rc::Rc;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use target::Debuggee;

/// How long a client may take to take what it asked for.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where gdb is waited for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GdbOption {
    /// The socket.
    pub address: GdbAddress,
    /// The guest does not start before gdb says so.
    pub wait: bool,
}

/// A socket's address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GdbAddress {
    /// Host and port.
    Tcp(String),
    /// A unix socket.
    Unix(PathBuf),
    /// A serial device, set up for raw bytes.
    Device(PathBuf),
}

impl FromStr for GdbOption {
    type Err = String;

    /// `[HOST]:PORT`, `PORT`, `unix:PATH` or `dev:PATH`, then `,wait=on|off`. Without a host it is this one alone.
    fn from_str(text: &str) -> Result<GdbOption, String> {
        let (place, wait) = match text.rsplit_once(",wait=") {
            None => (text, true),
            Some((place, "on")) => (place, true),
            Some((place, "off")) => (place, false),
            Some((_, other)) => return Err(format!("wait={other}: give on or off")),
        };
        let place = place.strip_prefix("tcp:").unwrap_or(place);
        for (kind, make) in
            [("unix:", GdbAddress::Unix as fn(PathBuf) -> GdbAddress), ("dev:", GdbAddress::Device)]
        {
            if let Some(path) = place.strip_prefix(kind) {
                if path.is_empty() {
                    return Err(format!("{kind} a path must follow"));
                }
                return Ok(GdbOption { address: make(path.into()), wait });
            }
        }
        let (host, port) = place.rsplit_once(':').unwrap_or(("", place));
        let host = if host.is_empty() { "127.0.0.1" } else { host };
        let bad = || format!("'{text}': give [HOST]:PORT, unix:PATH or dev:PATH, for instance :1234");
        let port: u16 = port.parse().map_err(|_| bad())?;
        Ok(GdbOption { address: GdbAddress::Tcp(format!("{host}:{port}")), wait })
    }
}

impl fmt::Display for GdbAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GdbAddress::Tcp(a) => f.write_str(a),
            GdbAddress::Unix(p) | GdbAddress::Device(p) => p.display().fmt(f),
        }
    }
}

trait Stream: Read + Write + Send {
    fn duplicate(&self) -> io::Result<Box<dyn Stream>>;
}

impl Stream for TcpStream {
    fn duplicate(&self) -> io::Result<Box<dyn Stream>> {
        self.set_nodelay(true)?;
        self.set_write_timeout(Some(PATIENCE))?;
        Ok(Box::new(self.try_clone()?))
    }
}

impl Stream for UnixStream {
    fn duplicate(&self) -> io::Result<Box<dyn Stream>> {
        self.set_write_timeout(Some(PATIENCE))?;
        Ok(Box::new(self.try_clone()?))
    }
}

impl Stream for File {
    fn duplicate(&self) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(self.try_clone()?))
    }
}

/// gdb's side of a connection.
pub struct Client {
    stream: Box<dyn Stream>,
    out: Vec<u8>,
}

impl Connection for Client {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.out.push(byte);
        Ok(())
    }
    fn flush(&mut self) -> io::Result<()> {
        let sent = self.stream.write_all(&self.out).and_then(|()| self.stream.flush());
        self.out.clear();
        sent
    }
}

/// What comes from the socket.
pub enum GdbEvent {
    /// A client.
    Connected(Client),
    /// It sends.
    Data(Vec<u8>),
    /// It is gone.
    Closed,
}

/// The socket. Dropping it removes a unix socket's file.
pub struct Server {
    /// Where it listens, the port chosen.
    pub address: GdbAddress,
}

impl Drop for Server {
    fn drop(&mut self) {
        if let GdbAddress::Unix(path) = &self.address {
            // Nobody can be helped if it is gone already.
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Server {
    /// Listen, and post what comes, from a thread that lasts as long as the process.
    ///
    /// # Errors
    /// When the address cannot be had.
    pub fn start(address: &GdbAddress, post: impl Fn(GdbEvent) + Send + 'static) -> io::Result<Server> {
        let named =
            |e: io::Error| io::Error::new(e.kind(), format!("{address}: {e}; choose another address"));
        match address {
            GdbAddress::Tcp(at) => {
                let all: Vec<_> = at.to_socket_addrs().map_err(named)?.collect();
                let listener = TcpListener::bind(&all[..]).map_err(named)?;
                let address = GdbAddress::Tcp(listener.local_addr()?.to_string());
                serve(move || listener.accept().map(|(s, _)| Box::new(s) as Box<dyn Stream>), post)?;
                Ok(Server { address })
            }
            GdbAddress::Unix(path) => {
                crate::chardev::remove_stale(path).map_err(named)?;
                let listener = UnixListener::bind(path).map_err(named)?;
                serve(move || listener.accept().map(|(s, _)| Box::new(s) as Box<dyn Stream>), post)?;
                Ok(Server { address: address.clone() })
            }
            GdbAddress::Device(path) => {
                let device = File::options().read(true).write(true).open(path).map_err(named)?;
                if !device.metadata().map_err(named)?.file_type().is_char_device() {
                    return Err(named(io::Error::other("is no serial device")));
                }
                // Whoever is at its other end is there from the start, and stays.
                let once = Mutex::new(Some(device));
                let accept = move || {
                    let device = once.lock().unwrap_or_else(PoisonError::into_inner).take();
                    device
                        .map(|d| Box::new(d) as Box<dyn Stream>)
                        .ok_or_else(|| io::ErrorKind::NotConnected.into())
                };
                serve(accept, post)?;
                Ok(Server { address: address.clone() })
            }
        }
    }
}

/// One client after the other.
fn serve(
    accept: impl Fn() -> io::Result<Box<dyn Stream>> + Send + 'static,
    post: impl Fn(GdbEvent) + Send + 'static,
) -> io::Result<()> {
    std::thread::Builder::new().name("gdb".into()).spawn(move || {
        while let Ok(mut stream) = accept() {
            let Ok(answers) = stream.duplicate() else { continue };
            post(GdbEvent::Connected(Client { stream: answers, out: Vec::new() }));
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = stream.read(&mut buffer) {
                post(GdbEvent::Data(buffer[..n].to_vec()));
            }
            post(GdbEvent::Closed);
        }
    })?;
    Ok(())
}

type Stub = GdbStubStateMachine<'static, Debuggee, Client>;

/// What is to happen after something was handed to a [`Session`].
#[derive(Debug, PartialEq, Eq)]
pub enum After {
    /// Nothing.
    GoOn,
    /// gdb ended the machine.
    Kill,
}

/// The debugger's side of a machine.
pub struct Session {
    machine: Rc<Machine>,
    debuggee: Debuggee,
    stub: Option<Stub>,
    /// The machine waits for its first debugger.
    waiting: bool,
}

impl Session {
    /// For a machine that is paused, and stays so until gdb lets it run if it is to `wait`.
    pub fn new(machine: Rc<Machine>, wait: bool) -> Session {
        Session { debuggee: Debuggee::new(machine.clone()), machine, stub: None, waiting: wait }
    }

    /// Whether the machine is to stay paused for gdb's sake.
    pub fn holds(&self) -> bool {
        self.waiting || matches!(self.stub, Some(Stub::Idle(_)))
    }

    /// Whether a debugger is connected.
    pub fn is_connected(&self) -> bool {
        self.stub.is_some()
    }

    /// Something came from the socket.
    pub fn event(&mut self, event: GdbEvent) -> After {
        match event {
            GdbEvent::Connected(client) => {
                self.machine.pause();
                self.waiting = false;
                // It only fails for targets without software breakpoints.
                self.stub = GdbStub::new(client).run_state_machine(&mut self.debuggee).ok();
            }
            GdbEvent::Data(bytes) => {
                for byte in bytes {
                    let Some(stub) = self.stub.take() else { break };
                    let next = match stub {
                        Stub::Idle(s) => s.incoming_data(&mut self.debuggee, byte),
                        Stub::Running(s) => s.incoming_data(&mut self.debuggee, byte),
                        other => Ok(other),
                    };
                    if self.settle(next.ok()) == After::Kill {
                        return After::Kill;
                    }
                }
            }
            GdbEvent::Closed if self.stub.is_some() => self.leave(),
            GdbEvent::Closed => {}
        }
        After::GoOn
    }

    /// A vCPU stopped by what the debugger asked for.
    pub fn stopped(&mut self, vcpu: usize, stop: DebugStop) -> After {
        match self.stub.take() {
            Some(Stub::Running(stub)) => {
                self.machine.pause();
                match self.debuggee.stopped(vcpu, stop) {
                    Some(reason) => {
                        let next = stub.report_stop(&mut self.debuggee, reason);
                        self.settle(next.ok())
                    }
                    None => {
                        self.machine.resume();
                        self.stub = Some(Stub::Running(stub));
                        After::GoOn
                    }
                }
            }
            other => {
                self.stub = other;
                if self.stub.is_some() {
                    self.debuggee.also_stopped(vcpu, stop);
                } else if !self.holds() {
                    // Left over from a debugger that has gone: the vCPU goes on.
                    self.machine.pause();
                    self.machine.resume();
                }
                After::GoOn
            }
        }
    }

    /// The machine ends, with this status.
    pub fn ended(&mut self, status: u8) {
        if let Some(Stub::Running(stub)) = self.stub.take() {
            // A client that does not hear of it sees the connection close.
            let _ = stub.report_stop(&mut self.debuggee, MultiThreadStopReason::Exited(status));
        }
    }

    /// Take the stub's next state, as far as it goes by itself. `None` is a connection that broke.
    fn settle(&mut self, mut next: Option<Stub>) -> After {
        loop {
            match next {
                Some(Stub::CtrlCInterrupt(stub)) => {
                    self.machine.pause();
                    let tid = gdbstub::common::Tid::MIN.saturating_add(self.debuggee.current);
                    let reason = BaseStopReason::SignalWithThread { tid, signal: Signal::SIGINT };
                    next = stub.interrupt_handled(&mut self.debuggee, Some(reason)).ok();
                }
                Some(Stub::Running(stub)) => {
                    let Some(reason) = self.debuggee.at_once.take() else {
                        self.stub = Some(Stub::Running(stub));
                        return After::GoOn;
                    };
                    next = stub.report_stop(&mut self.debuggee, reason).ok();
                }
                Some(Stub::Disconnected(stub)) if stub.get_reason() == DisconnectReason::Kill => {
                    return After::Kill;
                }
                Some(Stub::Disconnected(_)) | None => {
                    self.leave();
                    return After::GoOn;
                }
                idle @ Some(Stub::Idle(_)) => {
                    self.stub = idle;
                    return After::GoOn;
                }
            }
        }
    }

    /// The debugger is gone: the machine runs as if it had never been there.
    fn leave(&mut self) {
        self.stub = None;
        self.machine.pause();
        self.debuggee.release();
        self.machine.resume();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let tcp = |a: &str| GdbAddress::Tcp(a.into());
        for (text, address, wait) in [
            (":1234", tcp("127.0.0.1:1234"), true),
            ("1234,wait=off", tcp("127.0.0.1:1234"), false),
            ("0.0.0.0:0", tcp("0.0.0.0:0"), true),
            ("tcp:[::1]:99", tcp("[::1]:99"), true),
            ("dev:/dev/ttyS1", GdbAddress::Device("/dev/ttyS1".into()), true),
            ("unix:/run/x,y", GdbAddress::Unix("/run/x,y".into()), true),
        ] {
            assert_eq!(text.parse(), Ok(GdbOption { address, wait }), "{text}");
        }
        for bad in ["", ":", "x", "unix:", ":99999", ":1,wait=maybe"] {
            assert!(bad.parse::<GdbOption>().is_err(), "{bad}");
        }
    }
}
