//! TCP: each connection of the guest ends here and goes on as a connection of the host (RFC 9293 towards the guest).
//!
//! The link to the guest neither loses nor reorders segments unless the guest has no buffers left, so this side needs no
//! congestion control; it resends from the first unacknowledged byte when an answer does not come.

mod flow;
mod receive;
mod ring;
mod send;

use super::icmp::{self, Trouble};
use super::stack::{Common, Target};
use crate::wire::Path;
use flow::{ACK, Flow, Phase, RST, SYN, Segment, parse, reset};
use send::arm;
use smoltcp::wire::TcpPacket;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use std::cmp::Reverse;
use std::collections::hash_map::RandomState;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::hash::BuildHasher as _;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

/// Most connections of one guest.
const MOST: usize = 16_384;
/// Most connections that are being made; more is a flood.
const MOST_OPENING: usize = 4096;
/// Bytes read ahead for the guest, per connection; less once all together hold [`TIGHT`], and one segment once they hold [`FULL`].
const SEND_ROOM: usize = 1 << 20;
const SEND_ROOM_TIGHT: usize = 64 << 10;
/// Bytes that the host does not take yet, per connection; less as above.
const RECEIVE_ROOM: usize = 1 << 20;
const RECEIVE_ROOM_TIGHT: usize = 16 << 10;
const TIGHT: usize = 64 << 20;
const FULL: usize = 256 << 20;
/// Bytes that one connection brings to the guest before it lets others that wait go first.
const SHARE: usize = 256 << 10;
/// Largest payload of one frame.
const MOST_PAYLOAD: usize = 62 << 10;
/// Our window scale.
const SCALE: u8 = 5;
/// First wait for an answer of the guest, doubled each time; how often.
const RTO: Duration = Duration::from_millis(300);
const MOST_TRIES: u32 = 10;
/// How long the acknowledgement of little data may wait for data that goes with it.
const ACK_DELAY: Duration = Duration::from_millis(5);
/// With less room than this for the guest's data, it is told at once.
const ACK_ROOM: usize = 32 << 10;
/// A connection idle for longer keeps no buffers.
const REST: Duration = Duration::from_secs(2);
/// A connection idle for longer may be given up for a new one when there are [`MOST`].
const IDLE: Duration = Duration::from_secs(7200);

/// A connection's two ends, as the guest sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Pair {
    pub guest: SocketAddr,
    pub far: SocketAddr,
}

/// All connections.
#[derive(Default)]
pub struct Tcp {
    flows: HashMap<u64, Flow>,
    by_pair: HashMap<Pair, u64>,
    opening: usize,
    held: usize,
    timers: BinaryHeap<Reverse<(Instant, u64)>>,
    due: Vec<u64>,
    /// Acknowledgements that wait for something to go with, in order of time.
    delayed: VecDeque<(Instant, u64)>,
    blocked: VecDeque<u64>,
    numbers: Numbers,
}

/// Bytes that a connection may hold for the host while all hold `held`.
fn room(held: usize) -> usize {
    match held {
        ..TIGHT => RECEIVE_ROOM,
        TIGHT..FULL => RECEIVE_ROOM_TIGHT,
        FULL.. => 0,
    }
}

/// First sequence numbers (RFC 6528): they grow with time for the same ends, so that a guest that still has an old connection in
/// TIME-WAIT takes a new one at once.
struct Numbers {
    keys: RandomState,
    since: Instant,
}

impl Default for Numbers {
    fn default() -> Numbers {
        Numbers { keys: RandomState::new(), since: Instant::now() }
    }
}

impl Numbers {
    fn first(&self, pair: &Pair) -> u32 {
        // A step every 4 microseconds.
        (self.keys.hash_one(pair) as u32).wrapping_add((self.since.elapsed().as_micros() / 4) as u32)
    }
}

/// A non-blocking stream socket on its way to `to`.
fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    match socket.connect(&to.into()) {
        Err(e) if e.raw_os_error() != Some(libc::EINPROGRESS) => return Err(e),
        _ => {}
    }
    let stream = TcpStream::from(socket);
    settle(&stream);
    Ok(stream)
}

/// These are wishes that need not be granted.
fn settle(stream: &TcpStream) {
    let _ = stream.set_nodelay(true);
    let _ = SockRef::from(stream).set_keepalive(true);
    // Urgent bytes stay in their place, or they would be lost (RFC 6093).
    let _ = SockRef::from(stream).set_out_of_band_inline(true);
}

/// What a router would say of an attempt that failed because nobody was reached.
fn unreachable(e: &io::Error) -> Option<Trouble> {
    Trouble::of_host(true, None, e.raw_os_error()?, 0)
        .filter(|w| matches!(w, Trouble::Network | Trouble::Host))
}

/// Say it of the SYN with this number.
fn report(c: &mut Common, pair: Pair, number: u32, what: Trouble) {
    let path = Path { from: [0; 6], to: [0; 6], src: pair.guest.ip(), dst: pair.far.ip() };
    let mut syn = [0; 20];
    syn[..2].copy_from_slice(&pair.guest.port().to_be_bytes());
    syn[2..4].copy_from_slice(&pair.far.port().to_be_bytes());
    syn[4..8].copy_from_slice(&number.to_be_bytes());
    (syn[12], syn[13]) = (0x50, SYN);
    icmp::report(c, &path, crate::wire::TCP, &syn, what, None);
}

impl Tcp {
    /// A segment of the guest.
    pub fn segment(&mut self, c: &mut Common, path: &Path, p: &TcpPacket<&[u8]>) {
        let Some(s) = parse(p) else { return };
        let pair = Pair {
            guest: SocketAddr::new(path.src, p.src_port()),
            far: SocketAddr::new(path.dst, p.dst_port()),
        };
        if p.src_port() == 0 || p.dst_port() == 0 {
            return;
        }
        match self.by_pair.get(&pair).copied() {
            Some(id) => self.known(c, id, &s),
            None if s.flags & (SYN | ACK | RST) == SYN => self.open(c, pair, &s),
            None => reset(c, pair, &s),
        }
    }

    /// The guest wants a connection.
    fn open(&mut self, c: &mut Common, pair: Pair, s: &Segment<'_>) {
        let to = match c.target(pair.far) {
            Target::Host(to) => to,
            Target::Refused => return reset(c, pair, s),
            Target::Nowhere => return,
        };
        if self.opening >= MOST_OPENING || (self.flows.len() >= MOST && !self.give_up_idle(c)) {
            return reset(c, pair, s);
        }
        let stream = match connect(to) {
            Ok(s) => s,
            Err(e) => {
                return match unreachable(&e) {
                    Some(what) => report(c, pair, s.seq, what),
                    None => reset(c, pair, s),
                };
            }
        };
        let mut flow = Flow::new(pair, stream, Phase::Connecting, self.numbers.first(&pair), Instant::now());
        flow.meet(s, c.config.mtu.into());
        self.add(c, flow);
    }

    /// A connection came in by a forwarded port.
    pub fn accept(&mut self, c: &mut Common, listener: &TcpListener, to: SocketAddr) {
        let to = match to.ip() {
            IpAddr::V6(a) if a.is_unspecified() => {
                SocketAddr::new(c.guest6.unwrap_or_else(|| c.config.guest6()).into(), to.port())
            }
            _ => to,
        };
        // One round takes a bounded number, more than wait in the listener's queue.
        for _ in 0..2048 {
            let (stream, peer) = match listener.accept() {
                Ok(a) => a,
                Err(e) if e.kind() == ErrorKind::Interrupted || e.kind() == ErrorKind::ConnectionAborted => {
                    continue;
                }
                Err(_) => return,
            };
            let far = c.seen_as(peer, to);
            let mut pair = Pair { guest: to, far };
            // Two listeners may have got peers of the same port, which look alike behind the gateway's address.
            while self.by_pair.contains_key(&pair) {
                pair.far.set_port(fastrand::u16(1024..));
            }
            if self.opening >= MOST_OPENING || self.flows.len() >= MOST || c.guest_mac.is_none() {
                continue;
            }
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            settle(&stream);
            let flow = Flow::new(pair, stream, Phase::SynSent, self.numbers.first(&pair), Instant::now());
            if let Some(id) = self.add(c, flow) {
                self.send_syn(c, id);
            }
        }
    }

    fn add(&mut self, c: &mut Common, mut flow: Flow) -> Option<u64> {
        let id = c.new_id();
        if c.watch(flow.stream.as_raw_fd(), id).is_err() {
            flow.refuse(c);
            return None;
        }
        self.opening += 1;
        self.by_pair.insert(flow.pair, id);
        self.flows.insert(id, flow);
        Some(id)
    }

    fn remove(&mut self, id: u64) {
        // Closing the descriptor takes it out of the poll set.
        if let Some(f) = self.flows.remove(&id) {
            self.by_pair.remove(&f.pair);
            self.opening -= usize::from(f.is_opening());
            self.held -= f.buf.len() + f.to_host.len();
        }
    }

    fn give_up_idle(&mut self, c: &mut Common) -> bool {
        let oldest = self.flows.iter().min_by_key(|(_, f)| f.last).map(|(&id, f)| (id, f.last.elapsed()));
        match oldest {
            Some((id, idle)) if idle > IDLE => {
                self.fail(c, id);
                true
            }
            _ => false,
        }
    }

    /// End a connection that went wrong, towards both sides.
    fn fail(&mut self, c: &mut Common, id: u64) {
        if let Some(f) = self.flows.get_mut(&id) {
            f.refuse(c);
            f.abort();
        }
        self.remove(id);
    }

    fn send_syn(&mut self, c: &mut Common, id: u64) {
        let Some(f) = self.flows.get_mut(&id) else { return };
        let flags = if f.phase == Phase::SynSent { SYN } else { SYN | ACK };
        f.emit(c, flags, 0, 0);
        arm(&mut self.timers, c, id, f, true);
    }

    fn known(&mut self, c: &mut Common, id: u64, s: &Segment<'_>) {
        let Some(f) = self.flows.get_mut(&id) else { return };
        f.last = Instant::now();
        match f.phase {
            Phase::Connecting => {
                if s.flags & RST != 0 {
                    f.abort();
                    self.remove(id);
                }
            }
            Phase::SynSent => self.syn_sent(c, id, s),
            Phase::SynReceived | Phase::Open => self.synchronized(c, id, s),
        }
    }

    /// The host's end has an urgent byte on its way.
    pub fn urgent(&mut self, id: u64) {
        if let Some(f) = self.flows.get_mut(&id) {
            f.urgent_comes = true;
        }
    }

    /// Somebody behind the guest takes packets of a connection of at most `mtu` bytes (RFC 1191, RFC 8201).
    pub fn path_mtu(&mut self, c: &mut Common, pair: Pair, mtu: usize) {
        let Some(&id) = self.by_pair.get(&pair) else { return };
        let Some(f) = self.flows.get_mut(&id) else { return };
        // Nobody may make segments smaller than all take, or larger than they are.
        let (least, headers) = if pair.guest.is_ipv4() { (576, 40) } else { (1280, 60) };
        let mss = mtu.max(least) - headers;
        if mss < f.mss {
            f.mss = mss;
            if f.phase == Phase::Open && f.sent > 0 {
                // What was lost goes again, in smaller pieces.
                f.sent = 0;
                self.pump(c, id);
            }
        }
    }

    /// Number of connections.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.flows.len()
    }

    /// Whether there is none.
    #[cfg(test)]
    pub fn is_empty(&self) -> bool {
        self.flows.is_empty()
    }

    /// Acknowledge what a batch of segments brought: at once what is much, and a little later what is less than a segment, because
    /// the answer to it will carry the acknowledgement as a rule (RFC 9293 section 3.8.6.3).
    pub fn flush(&mut self, c: &mut Common) {
        for id in std::mem::take(&mut self.due) {
            let Some(f) = self.flows.get_mut(&id).filter(|f| f.ack_due) else { continue };
            if f.unacknowledged == 0 || f.unacknowledged >= f.mss || f.free() < ACK_ROOM {
                f.acknowledge(c);
                continue;
            }
            let at = Instant::now() + ACK_DELAY;
            if self.delayed.is_empty() && c.ack_timer.reset(ACK_DELAY, None).is_err() {
                f.acknowledge(c);
                continue;
            }
            f.delayed = Some(at);
            self.delayed.push_back((at, id));
        }
    }

    /// Acknowledge what no answer came for in time.
    pub fn acknowledge_delayed(&mut self, c: &mut Common) {
        // It has expired: this does not wait, and gives how often.
        let _ = c.ack_timer.wait();
        let now = Instant::now();
        while let Some(&(at, id)) = self.delayed.front() {
            if at > now {
                // Cannot fail with an open descriptor; if it did, the guest would send again.
                let _ = c.ack_timer.reset(at - now, None);
                return;
            }
            self.delayed.pop_front();
            if let Some(f) = self.flows.get_mut(&id)
                && f.delayed == Some(at)
            {
                f.acknowledge(c);
            }
        }
    }

    /// Something happened to a connection of the host.
    pub fn ready(&mut self, c: &mut Common, id: u64, readable: bool, writable: bool) {
        let Some(f) = self.flows.get_mut(&id) else { return };
        if f.phase == Phase::Connecting {
            if !writable && !readable {
                return;
            }
            let failed = f.stream.take_error();
            if !matches!(failed, Ok(None)) {
                if c.is_dns(f.pair.far.ip())
                    && let Some(server) = c.resolver.address()
                {
                    // The guest asks again.
                    c.resolver.failed(server);
                }
                if let Ok(Some(e)) = failed
                    && let Some(what) = unreachable(&e)
                {
                    report(c, f.pair, f.next.wrapping_sub(1), what);
                    return self.remove(id);
                }
                return self.fail(c, id);
            }
            // Woken without a result: a later event brings it.
            if f.stream.peer_addr().is_err() {
                return;
            }
            f.phase = Phase::SynReceived;
            f.readable = readable;
            return self.send_syn(c, id);
        }
        f.readable |= readable;
        if writable && !f.to_host.is_empty() {
            let before = f.to_host.len();
            let drained = f.drain_to_host();
            self.held -= before - f.to_host.len();
            f.room = room(self.held);
            if drained.is_err() {
                return self.fail(c, id);
            }
            // Told before that there was little room, the guest waits for better news.
            if f.free() >= f.told + (RECEIVE_ROOM / 4) || (f.told == 0 && f.free() > 0) {
                f.acknowledge(c);
            }
        }
        if f.is_done() {
            return self.remove(id);
        }
        self.pump(c, id);
    }

    /// There is room towards the guest again.
    pub fn unblock(&mut self, c: &mut Common) {
        for _ in 0..self.blocked.len() {
            if !ringfort_bus::lock(&c.output).has_room() {
                return;
            }
            if let Some(id) = self.blocked.pop_front()
                && let Some(f) = self.flows.get_mut(&id)
            {
                f.blocked = false;
                self.pump(c, id);
            }
        }
    }

    /// Give back the memory of connections that are at rest.
    pub fn sweep(&mut self, now: Instant) {
        for f in self.flows.values_mut().filter(|f| now.saturating_duration_since(f.last) > REST) {
            f.buf.release();
            f.to_host.release();
        }
    }
}
