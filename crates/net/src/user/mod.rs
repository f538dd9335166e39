//! User-mode networking: a router with NAT, DHCP and DNS in this process, which needs no rights on the host.
//!
//! The guest's frames are taken apart as they come, on the thread that brings them; connections go on as sockets of the
//! host. One thread of its own waits for those sockets. Nothing here waits for the guest or for the network.

mod config;
mod datagram;
mod dhcp;
mod dhcp6;
mod fragments;
mod icmp;
mod neighbours;
mod output;
mod stack;
mod tcp;
#[cfg(test)]
mod tests;
mod tftp;

pub use config::{Forward, UserConfig};

use crate::pcap::Pcap;
use crate::{MacAddr, NetBackend, NetEvents, Offloads, Sent, VnetHeader};
use output::Output;
use ringfort_bus::lock;
use socket2::{Domain, Protocol, Socket, Type};
use stack::{Listener, Stack};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

/// How often idle things are looked for.
const SWEEP: Duration = Duration::from_secs(2);
/// Events taken at a time.
const EVENTS: usize = 256;
/// The waking descriptor among the events, and the timer of acknowledgements. (Identifiers of others count from 1.)
const WAKE: u64 = 0;
const ACK_TIMER: u64 = u64::MAX;

/// Why user-mode networking cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// The options are wrong.
    #[error("{option}: {what}")]
    Config {
        /// Which one.
        option: &'static str,
        /// What is wrong and what to do.
        what: String,
    },
    /// A port cannot be had.
    #[error("hostfwd: cannot listen on {protocol} {address}: {source}; choose another port or address")]
    Listen {
        /// `tcp` or `udp`.
        protocol: &'static str,
        /// Where.
        address: SocketAddr,
        /// The host's answer.
        source: io::Error,
    },
    /// The capture file cannot be had.
    #[error("dump={path}: {source}; name a file in a folder that is there and that you may write to")]
    Dump {
        /// The file.
        path: String,
        /// The host's answer.
        source: io::Error,
    },
    /// The host refuses threads or descriptors.
    #[error("user networking: {0}")]
    Host(#[from] io::Error),
}

struct Inner {
    stack: Mutex<Stack>,
    output: Arc<Mutex<Output>>,
    events: OnceLock<Arc<dyn NetEvents>>,
    epoll: Arc<Epoll>,
    wake: EventFd,
    stop: AtomicBool,
}

/// A guest's network in this process.
pub struct UserNet {
    inner: Arc<Inner>,
    mtu: u16,
    /// Where forwarded ports listen, in the order of the configuration.
    forwards: Vec<SocketAddr>,
    thread: Option<JoinHandle<()>>,
}

impl UserNet {
    /// Set the network up: ports are bound, a thread waits. `guest` is the address of the guest's card; without it, nothing can be
    /// sent to the guest before it has sent something itself.
    ///
    /// # Errors
    /// [`UserError`]; nothing is left behind.
    pub fn new(config: UserConfig, guest: Option<MacAddr>) -> Result<UserNet, UserError> {
        if let Some((option, what)) = config.problems().into_iter().next() {
            return Err(UserError::Config { option, what });
        }
        if let Some(folder) = &config.tftp
            && !folder.is_dir()
        {
            let what = format!("{} is no folder; name one that holds the files", folder.display());
            return Err(UserError::Config { option: "tftp", what });
        }
        let dump = match &config.dump {
            Some(path) => Some(
                Pcap::create(path)
                    .map_err(|source| UserError::Dump { path: path.display().to_string(), source })?,
            ),
            None => None,
        };
        let epoll = Arc::new(Epoll::new()?);
        let wake = EventFd::new(EFD_NONBLOCK)?;
        epoll.ctl(ControlOperation::Add, wake.as_raw_fd(), EpollEvent::new(EventSet::IN, WAKE))?;
        let ack_timer = TimerFd::new().map_err(io::Error::from)?;
        epoll.ctl(ControlOperation::Add, ack_timer.as_raw_fd(), EpollEvent::new(EventSet::IN, ACK_TIMER))?;
        let output: Arc<Mutex<Output>> = Arc::default();
        let mtu = config.mtu;
        let mut stack =
            Stack::new(config, output.clone(), epoll.clone(), ack_timer, dump, guest.map(MacAddr::bytes));
        let forwards = listen(&mut stack)?;
        crate::sys::raise_descriptor_limit();
        let inner = Arc::new(Inner {
            stack: Mutex::new(stack),
            output,
            events: OnceLock::new(),
            epoll,
            wake,
            stop: AtomicBool::new(false),
        });
        let of_thread = inner.clone();
        let thread = std::thread::Builder::new().name("net-user".into()).spawn(move || of_thread.run())?;
        Ok(UserNet { inner, mtu, forwards, thread: Some(thread) })
    }

    /// Where forwarded ports listen, in the order of the configuration (port 0 there is a free one here).
    pub fn forwards(&self) -> &[SocketAddr] {
        &self.forwards
    }
}

/// Bind all forwarded ports.
fn listen(stack: &mut Stack) -> Result<Vec<SocketAddr>, UserError> {
    let mut at = Vec::new();
    for f in stack.common.config.forwards.clone() {
        let protocol = if f.udp { "udp" } else { "tcp" };
        let fail = |source| UserError::Listen { protocol, address: f.host, source };
        let guest = match f.guest.ip() {
            ip if ip.is_unspecified() => IpAddr::V4(stack.common.config.guest),
            ip => ip,
        };
        let to = SocketAddr::new(guest, f.guest.port());
        let kind = if f.udp { Type::DGRAM } else { Type::STREAM };
        let number = if f.udp { Protocol::UDP } else { Protocol::TCP };
        let socket = Socket::new(Domain::for_address(f.host), kind, Some(number)).map_err(fail)?;
        socket.set_nonblocking(true).map_err(fail)?;
        if !f.udp {
            // Connections that linger from before do not hold the port.
            socket.set_reuse_address(true).map_err(fail)?;
        }
        socket.bind(&f.host.into()).map_err(fail)?;
        let local = socket.local_addr().map_err(fail)?.as_socket().unwrap_or(f.host);
        if f.udp {
            let id = stack.datagrams.forward(&mut stack.common, UdpSocket::from(socket), to).map_err(fail)?;
            stack.listeners.push((id, Listener::Udp));
        } else {
            socket.listen(1024).map_err(fail)?;
            let id = stack.common.new_id();
            stack.common.watch(socket.as_raw_fd(), id).map_err(fail)?;
            stack.listeners.push((id, Listener::Tcp(TcpListener::from(socket), to)));
        }
        at.push(local);
    }
    Ok(at)
}

impl Inner {
    /// Do something with the stack, and tell the device and the thread what came of it.
    fn with<R>(&self, f: impl FnOnce(&mut Stack) -> R) -> R {
        let (result, notify, wake) = {
            let mut s = lock(&self.stack);
            let result = f(&mut s);
            (result, std::mem::take(&mut s.common.notify), std::mem::take(&mut s.common.wake))
        };
        if wake {
            self.wake();
        }
        if notify && let Some(e) = self.events.get() {
            e.take_now(0);
        }
        result
    }

    fn wake(&self) {
        // Fails only when 2^64 wakes are outstanding; one is as good.
        let _ = self.wake.write(1);
    }

    /// The thread.
    fn run(&self) {
        let mut events = vec![EpollEvent::default(); EVENTS];
        let mut swept = Instant::now();
        while !self.stop.load(Ordering::SeqCst) {
            let until = {
                let mut s = lock(&self.stack);
                let sweep = swept + SWEEP;
                let until = s.tcp.next_timer().map_or(sweep, |t| t.min(sweep));
                s.common.sleeps_until = Some(until);
                until
            };
            let left = until.saturating_duration_since(Instant::now());
            // Rounded up, so that the timer is due when the wait ends.
            let n = match self.epoll.wait(left.as_millis() as i32 + 1, &mut events) {
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
                // The descriptor is ours and open; this cannot happen, and must not become a loop.
                Err(_) => return,
            };
            self.with(|s| {
                s.common.sleeps_until = None;
                for e in &events[..n] {
                    if e.data() == WAKE {
                        let _ = self.wake.read();
                    } else if e.data() == ACK_TIMER {
                        s.tcp.acknowledge_delayed(&mut s.common);
                    } else {
                        s.ready(e.data(), EventSet::from_bits_truncate(e.events()));
                    }
                }
                let now = Instant::now();
                s.tcp.unblock(&mut s.common);
                s.tcp.tick(&mut s.common, now);
                if now >= swept + SWEEP {
                    swept = now;
                    s.tick(now);
                    if let Some(d) = &mut s.common.dump {
                        // A full disk shows at the next frame.
                        let _ = d.flush();
                    }
                }
                s.tcp.flush(&mut s.common);
            });
        }
    }
}

impl NetBackend for UserNet {
    fn accepts(&self) -> Offloads {
        Offloads { ecn: false, ..Offloads::ALL }
    }

    fn produces(&self) -> Offloads {
        Offloads { ecn: false, uso: false, ..Offloads::ALL }
    }

    fn mtu(&self) -> Option<u16> {
        Some(self.mtu)
    }

    fn attach(&self, events: Arc<dyn NetEvents>) {
        let _ = self.inner.events.set(events);
    }

    fn set_offloads(&self, offloads: Offloads) {
        lock(&self.inner.output).offloads = offloads.and(self.produces());
    }

    fn send(&self, _pair: u16, header: &VnetHeader, frame: &[u8]) -> Sent {
        self.inner.with(|s| s.frame(header, frame));
        Sent::Done
    }

    fn flush(&self, _pair: u16) {
        self.inner.with(|s| s.tcp.flush(&mut s.common));
    }

    fn receive(&self, _pair: u16, frame: &mut Vec<u8>) -> Option<VnetHeader> {
        let (header, wake) = lock(&self.inner.output).pop(frame);
        if wake {
            self.inner.wake();
        }
        header
    }
}

impl Drop for UserNet {
    fn drop(&mut self) {
        self.inner.stop.store(true, Ordering::SeqCst);
        self.inner.wake();
        // The thread itself may be the last that knows the device, and with it this.
        if let Some(t) = self.thread.take().filter(|t| t.thread().id() != std::thread::current().id()) {
            // A panic was reported by the thread itself; in tests it must not go unnoticed.
            let ended = t.join().is_ok();
            debug_assert!(ended || std::thread::panicking(), "the thread of user networking panicked");
        }
    }
}
