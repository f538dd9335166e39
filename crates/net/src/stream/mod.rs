//! Machines joined over sockets, in the form that QEMU's `-netdev stream` and `-netdev dgram` have on the wire: over a
//! stream each frame follows its length (32 bits, big endian); a datagram is a frame.

pub mod address;
mod calls;
mod datagram;
#[cfg(test)]
mod tests;
mod wire;

pub use address::{DatagramAddress, StreamAddress};
pub(crate) use calls::receive;
pub use datagram::{DatagramConfig, Datagrams};
pub use wire::{Frames, Scan};

use crate::{NetBackend, NetError, NetEvents, Offloads, Sent, VnetHeader};
use ringfort_bus::lock;
use serde::{Deserialize, Serialize};
use socket2::Socket;
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use wire::{Reader, Writer};

/// How long a connection may take to come about.
const CONNECT: Duration = Duration::from_secs(10);

const WAKE: u64 = 0;
const LISTENER: u64 = 1;
const CONNECTION: u64 = 2;

/// How to find the other machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamConfig {
    /// Where.
    pub address: StreamAddress,
    /// Listen there, otherwise connect.
    pub server: bool,
    /// Connect again after this time, and go on trying; otherwise a connection that is lost stays so.
    pub reconnect: Option<Duration>,
}

struct Connection {
    socket: Socket,
    reader: Mutex<Reader>,
    writer: Mutex<Writer>,
    broken: AtomicBool,
}

impl Connection {
    fn new(socket: Socket) -> Arc<Connection> {
        Arc::new(Connection {
            socket,
            reader: Mutex::default(),
            writer: Mutex::default(),
            broken: AtomicBool::new(false),
        })
    }
}

struct Inner {
    connection: Mutex<Option<Arc<Connection>>>,
    events: OnceLock<Arc<dyn NetEvents>>,
    wake: EventFd,
    stop: AtomicBool,
}

impl Inner {
    fn current(&self) -> Option<Arc<Connection>> {
        lock(&self.connection).clone().filter(|c| !c.broken.load(Ordering::SeqCst))
    }

    /// The connection is no good any more; the thread looks after it.
    fn lost(&self, c: &Connection) {
        c.broken.store(true, Ordering::SeqCst);
        let _ = self.wake.write(1);
    }

    fn set(&self, c: Option<Arc<Connection>>) {
        let up = c.is_some();
        *lock(&self.connection) = c;
        if let Some(e) = self.events.get() {
            e.link(up);
            if up {
                e.readable(0);
            }
            e.writable(0);
        }
    }
}

/// A cable to another machine over a stream socket. While there is no connection the link is down.
pub struct Stream {
    inner: Arc<Inner>,
    /// Where it listens, which is forgotten at the end.
    leaves: Option<StreamAddress>,
    thread: Option<JoinHandle<()>>,
    listens: Option<Arc<Socket>>,
}

impl Stream {
    /// Listen or connect.
    ///
    /// # Errors
    /// [`NetError`]: nobody can listen there, or nobody answers and there is no `reconnect`.
    pub fn new(config: &StreamConfig) -> Result<Stream, NetError> {
        let address = config.address.clone();
        let (mut listens, mut first, mut target) = (None, None, None);
        if config.server {
            listens = Some(Arc::new(address.listen()?));
        } else {
            let to = address.resolve()?;
            if config.reconnect.is_none() {
                first = Some(address.connect(&to, CONNECT)?);
            }
            target = Some(to);
        }
        let listening = listens.is_some();
        match Stream::start(first, listens, target, config.reconnect) {
            Ok(mut s) => {
                s.leaves = listening.then_some(address);
                Ok(s)
            }
            Err(e) => {
                if listening {
                    address.forget();
                }
                Err(e)
            }
        }
    }

    /// One end of a connection that there is; when it ends, it stays so.
    ///
    /// # Errors
    /// The host gives no thread or descriptors.
    pub fn over(socket: Socket) -> Result<Stream, NetError> {
        Stream::start(Some(socket), None, None, None)
    }

    fn start(
        first: Option<Socket>,
        listens: Option<Arc<Socket>>,
        target: Option<socket2::SockAddr>,
        reconnect: Option<Duration>,
    ) -> Result<Stream, NetError> {
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(NetError::host("an event descriptor"))?;
        let thread = Thread {
            inner: Arc::new(Inner {
                connection: Mutex::new(None),
                events: OnceLock::new(),
                wake,
                stop: AtomicBool::new(false),
            }),
            epoll: Epoll::new().map_err(NetError::host("an event queue"))?,
            listener: listens.clone(),
            target,
            reconnect,
            connected: None,
            connecting: None,
            next_try: reconnect.map(|_| Instant::now()),
        };
        let inner = thread.inner.clone();
        let thread = thread
            .prepare(first)
            .and_then(|t| std::thread::Builder::new().name("net-stream".into()).spawn(move || t.run()))
            .map_err(NetError::host("a thread for the network"))?;
        Ok(Stream { inner, leaves: None, thread: Some(thread), listens })
    }

    /// Where it listens, if it does so over TCP: the port is known then, whatever was asked for.
    pub fn local_address(&self) -> Option<std::net::SocketAddr> {
        self.listens.as_ref()?.local_addr().ok()?.as_socket()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.inner.stop.store(true, Ordering::SeqCst);
        let _ = self.inner.wake.write(1);
        if let Some(t) = self.thread.take() {
            let _ = t.join();
        }
        if let Some(a) = &self.leaves {
            a.forget();
        }
    }
}

impl NetBackend for Stream {
    /// The form on the wire has no room for work left undone.
    fn accepts(&self) -> Offloads {
        Offloads::default()
    }

    fn produces(&self) -> Offloads {
        Offloads::default()
    }

    fn attach(&self, events: Arc<dyn NetEvents>) {
        // The lock keeps the thread from changing the connection in between; whoever is told may come back for frames at once.
        let up = {
            let connection = lock(&self.inner.connection);
            if self.inner.events.set(events.clone()).is_err() {
                return;
            }
            connection.is_some()
        };
        events.link(up);
        if up {
            events.readable(0);
        }
    }

    fn set_offloads(&self, _offloads: Offloads) {}

    fn send(&self, _pair: u16, _header: &VnetHeader, frame: &[u8]) -> Sent {
        let Some(c) = self.inner.current() else { return Sent::Done };
        match lock(&c.writer).send(c.socket.as_raw_fd(), frame) {
            Ok(true) => Sent::Done,
            Ok(false) => Sent::Full,
            Err(_) => {
                self.inner.lost(&c);
                Sent::Done
            }
        }
    }

    fn receive(&self, _pair: u16, frame: &mut Vec<u8>) -> Option<VnetHeader> {
        let c = self.inner.current()?;
        match lock(&c.reader).receive(&c.socket, frame) {
            Ok(true) => Some(VnetHeader::default()),
            Ok(false) => None,
            Err(_) => {
                self.inner.lost(&c);
                None
            }
        }
    }
}

/// What the thread has: it makes connections and tells what happens on them.
struct Thread {
    inner: Arc<Inner>,
    epoll: Epoll,
    listener: Option<Arc<Socket>>,
    target: Option<socket2::SockAddr>,
    reconnect: Option<Duration>,
    connected: Option<Arc<Connection>>,
    connecting: Option<(Socket, Instant)>,
    next_try: Option<Instant>,
}

impl Thread {
    fn prepare(mut self, first: Option<Socket>) -> io::Result<Thread> {
        let wake = self.inner.wake.as_raw_fd();
        self.epoll.ctl(ControlOperation::Add, wake, EpollEvent::new(EventSet::IN, WAKE))?;
        if let Some(s) = first {
            self.adopt(s)?;
        } else {
            self.await_next()?;
        }
        Ok(self)
    }

    /// Without a connection: accept the next, or connect when it is time.
    fn await_next(&mut self) -> io::Result<()> {
        if let Some(l) = &self.listener {
            let event = EpollEvent::new(EventSet::IN, LISTENER);
            self.epoll.ctl(ControlOperation::Add, l.as_raw_fd(), event)?;
        }
        Ok(())
    }

    fn adopt(&mut self, socket: Socket) -> io::Result<()> {
        socket.set_nonblocking(true)?;
        // Frames are whole when they are written; a unix socket has no such option.
        let _ = socket.set_tcp_nodelay(true);
        let c = Connection::new(socket);
        let interest = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        self.epoll.ctl(ControlOperation::Add, c.socket.as_raw_fd(), EpollEvent::new(interest, CONNECTION))?;
        self.connected = Some(c.clone());
        self.next_try = None;
        self.inner.set(Some(c));
        Ok(())
    }

    fn accept(&mut self) {
        let Some(l) = self.listener.clone() else { return };
        // Whoever gave up meanwhile, or has to wait: there will be another event.
        if let Ok((s, _)) = l.accept() {
            let _ = self.epoll.ctl(ControlOperation::Delete, l.as_raw_fd(), EpollEvent::default());
            if self.adopt(s).is_err() {
                let _ = self.await_next();
            }
        }
    }

    fn connect(&mut self) {
        let Some(target) = &self.target else { return };
        self.next_try = self.reconnect.map(|r| Instant::now() + r);
        let begun = address::socket(target).and_then(|s| {
            s.set_nonblocking(true)?;
            match s.connect(target) {
                Err(e) if e.raw_os_error() != Some(libc::EINPROGRESS) => return Err(e),
                _ => {}
            }
            self.epoll.ctl(
                ControlOperation::Add,
                s.as_raw_fd(),
                EpollEvent::new(EventSet::OUT, CONNECTION),
            )?;
            Ok(s)
        });
        if let Ok(s) = begun {
            self.connecting = Some((s, Instant::now() + CONNECT));
        }
    }

    /// The attempt to connect came to an end.
    fn connect_ended(&mut self) {
        let Some((s, _)) = self.connecting.take() else { return };
        let _ = self.epoll.ctl(ControlOperation::Delete, s.as_raw_fd(), EpollEvent::default());
        if let (Ok(None), Ok(_)) = (s.take_error(), s.peer_addr()) {
            let _ = self.adopt(s);
        }
    }

    /// Let a broken connection go.
    fn look_after(&mut self) {
        if self.connected.as_ref().is_some_and(|c| c.broken.load(Ordering::SeqCst)) {
            if let Some(c) = self.connected.take() {
                let _ = self.epoll.ctl(ControlOperation::Delete, c.socket.as_raw_fd(), EpollEvent::default());
                let _ = c.socket.shutdown(std::net::Shutdown::Both);
            }
            self.inner.set(None);
            self.next_try = self.reconnect.map(|r| Instant::now() + r);
            let _ = self.await_next();
        }
    }

    fn connection_event(&mut self, set: EventSet) {
        let Some(c) = self.connected.clone() else { return self.connect_ended() };
        let broken = set.intersects(EventSet::ERROR | EventSet::HANG_UP | EventSet::READ_HANG_UP);
        if broken || set.contains(EventSet::OUT) {
            // Without the lock whoever is told may send at once.
            let flushed = lock(&c.writer).flush(c.socket.as_raw_fd());
            if flushed.is_err() {
                return self.inner.lost(&c);
            }
            if let Some(e) = self.inner.events.get() {
                e.writable(0);
            }
        }
        if broken || set.contains(EventSet::IN) {
            // The end is found by whoever reads, after what came before it; without a reader, here.
            match self.inner.events.get() {
                Some(e) => e.readable(0),
                None if broken => self.inner.lost(&c),
                None => {}
            }
            if broken && !lock(&c.reader).has_more(&c.socket) {
                self.inner.lost(&c);
            }
        }
    }

    fn run(mut self) {
        let mut events = [EpollEvent::default(); 8];
        loop {
            let now = Instant::now();
            if self.connecting.as_ref().is_some_and(|c| c.1 <= now) {
                self.connect_ended();
            }
            if self.connected.is_none()
                && self.connecting.is_none()
                && self.next_try.is_some_and(|t| t <= now)
            {
                self.connect();
            }
            let deadline = match (&self.connected, &self.connecting) {
                (Some(_), _) => None,
                (None, Some(c)) => Some(c.1),
                (None, None) => self.next_try,
            };
            let timeout = deadline.map_or(-1, |d| {
                d.saturating_duration_since(Instant::now()).as_millis().min(60_000) as i32 + 1
            });
            let n = match self.epoll.wait(timeout, &mut events) {
                Ok(n) => n,
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(_) => return,
            };
            if self.inner.stop.load(Ordering::SeqCst) {
                return;
            }
            for e in &events[..n] {
                match e.data() {
                    LISTENER => self.accept(),
                    CONNECTION => self.connection_event(e.event_set()),
                    _ => _ = self.inner.wake.read(),
                }
            }
            self.look_after();
        }
    }
}
