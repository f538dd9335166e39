//! TCP: each connection of the guest ends here and goes on as a connection of the host (RFC 9293 towards the guest).
//!
//! The link to the guest neither loses nor reorders segments unless the guest has no buffers left, so this side needs no
//! congestion control; it resends from the first unacknowledged byte when an answer does not come.

use super::stack::{Common, Target};
use crate::wire::{self, Path, TCP};
use crate::{GsoKind, VnetHeader};
use ringfort_bus::lock;
use smoltcp::wire::{TcpOption, TcpPacket};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

/// Most connections of one guest.
const MOST: usize = 16_384;
/// Most connections that are being made; more is a flood.
const MOST_OPENING: usize = 4096;
/// Bytes read ahead for the guest, per connection; and less once all together hold [`TIGHT`].
const SEND_ROOM: usize = 1 << 20;
const SEND_ROOM_TIGHT: usize = 64 << 10;
/// Bytes that the host does not take yet, per connection.
const RECEIVE_ROOM: usize = 256 << 10;
const TIGHT: usize = 64 << 20;
/// Largest payload of one frame.
const MOST_PAYLOAD: usize = 62 << 10;
/// Our window scale.
const SCALE: u8 = 3;
/// First wait for an answer of the guest, doubled each time; how often.
const RTO: Duration = Duration::from_millis(300);
const MOST_TRIES: u32 = 10;
/// A connection idle for longer may be given up for a new one when there are [`MOST`].
const IDLE: Duration = Duration::from_secs(7200);

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const PSH: u8 = 8;
const ACK: u8 = 16;

/// A connection's two ends, as the guest sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Pair {
    pub guest: SocketAddr,
    pub far: SocketAddr,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The host's connection is being made; the guest waits.
    Connecting,
    /// The host's is there (by a forwarded port); the guest was asked.
    SynSent,
    /// The host's is there; the guest was told.
    SynReceived,
    Open,
}

struct Flow {
    pair: Pair,
    stream: TcpStream,
    phase: Phase,
    /// First sequence number that the guest has not acknowledged; in [`Phase::Open`] that of `buf`'s first byte.
    una: u32,
    /// Bytes for the guest, from `una` on.
    buf: VecDeque<u8>,
    /// How many of them are sent, and were sent at most.
    sent: usize,
    max_sent: usize,
    window: usize,
    scale: u8,
    mss: usize,
    host_eof: bool,
    fin_sent: bool,
    fin_ever_sent: bool,
    fin_acked: bool,
    /// Next byte expected of the guest.
    next: u32,
    /// Bytes of the guest that the host has not taken.
    to_host: VecDeque<u8>,
    our_scale: u8,
    guest_fin: bool,
    host_shut: bool,
    /// The window told last, in bytes.
    told: usize,
    ack_due: bool,
    /// The host may have data, as far as known.
    readable: bool,
    deadline: Option<Instant>,
    /// Where its entry in the timers stands.
    queued: Option<Instant>,
    /// It waits for room towards the guest.
    blocked: bool,
    tries: u32,
    repeats: u32,
    last: Instant,
}

/// A checked segment.
struct Segment<'a> {
    seq: u32,
    ack: Option<u32>,
    flags: u8,
    window: u16,
    mss: Option<u16>,
    scale: Option<u8>,
    data: &'a [u8],
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
    blocked: VecDeque<u64>,
    scratch: Vec<u8>,
}

fn parse<'a>(p: &TcpPacket<&'a [u8]>) -> Option<Segment<'a>> {
    let flag = |on: bool, bit: u8| if on { bit } else { 0 };
    let flags = flag(p.fin(), FIN) | flag(p.syn(), SYN) | flag(p.rst(), RST) | flag(p.ack(), ACK);
    let (mut mss, mut scale) = (None, None);
    if p.syn() {
        let mut rest = p.options();
        while !rest.is_empty() {
            let (next, option) = TcpOption::parse(rest).ok()?;
            match option {
                TcpOption::EndOfList => break,
                TcpOption::MaxSegmentSize(v) => mss = Some(v),
                // RFC 7323 section 2.3: 14 at most.
                TcpOption::WindowScale(v) => scale = Some(v.min(14)),
                _ => {}
            }
            rest = next;
        }
    }
    Some(Segment {
        seq: p.seq_number().0 as u32,
        ack: p.ack().then(|| p.ack_number().0 as u32),
        flags,
        window: p.window_len(),
        mss,
        scale,
        data: p.payload(),
    })
}

impl Flow {
    fn new(pair: Pair, stream: TcpStream, phase: Phase, now: Instant) -> Flow {
        Flow {
            pair,
            stream,
            phase,
            una: fastrand::u32(..),
            buf: VecDeque::new(),
            sent: 0,
            max_sent: 0,
            window: 0,
            scale: 0,
            mss: 536,
            host_eof: false,
            fin_sent: false,
            fin_ever_sent: false,
            fin_acked: false,
            next: 0,
            to_host: VecDeque::new(),
            our_scale: 0,
            guest_fin: false,
            host_shut: false,
            told: 0,
            ack_due: false,
            readable: false,
            deadline: None,
            queued: None,
            blocked: false,
            tries: 0,
            repeats: 0,
            last: now,
        }
    }

    /// What the guest's SYN says.
    fn meet(&mut self, s: &Segment<'_>, mtu: usize) {
        let headers = if self.pair.guest.is_ipv6() { 60 } else { 40 };
        let most = mtu.saturating_sub(headers).max(536);
        self.mss = usize::from(s.mss.unwrap_or(536)).clamp(64, most);
        self.window = usize::from(s.window);
        (self.scale, self.our_scale) = s.scale.map_or((0, 0), |v| (v, SCALE));
        self.next = s.seq.wrapping_add(1);
    }

    fn free(&self) -> usize {
        let most = if self.our_scale == 0 { 0xffff } else { RECEIVE_ROOM };
        most.saturating_sub(self.to_host.len())
    }

    fn is_opening(&self) -> bool {
        self.phase != Phase::Open
    }

    fn is_done(&self) -> bool {
        self.guest_fin && self.host_shut && self.fin_acked
    }

    /// Send a segment with `len` bytes of the buffer from `at` on.
    fn emit(&mut self, c: &mut Common, flags: u8, at: usize, len: usize) {
        let Some(guest_mac) = c.guest_mac else { return };
        let path = Path { from: c.mac, to: guest_mac, src: self.pair.far.ip(), dst: self.pair.guest.ip() };
        let options: &[u8] = &if flags & SYN != 0 {
            let headers = if path.src.is_ipv6() { 60 } else { 40 };
            let mss = (c.config.mtu - headers).to_be_bytes();
            // The scale answers the guest's, or is offered first.
            let scaled = flags & ACK == 0 || self.our_scale > 0;
            if scaled { vec![2, 4, mss[0], mss[1], 1, 3, 3, SCALE] } else { vec![2, 4, mss[0], mss[1]] }
        } else {
            Vec::new()
        };
        let (mut frame, offloads) = {
            let mut out = lock(&c.output);
            (out.buffer(), out.offloads)
        };
        let start = wire::ip(&mut frame, &path, TCP, 20 + options.len() + len);
        let free = self.free();
        let window = if flags & SYN != 0 { free } else { free >> self.our_scale }.min(0xffff);
        let seq = self.una.wrapping_add(at as u32);
        frame.extend_from_slice(&self.pair.far.port().to_be_bytes());
        frame.extend_from_slice(&self.pair.guest.port().to_be_bytes());
        frame.extend_from_slice(&seq.to_be_bytes());
        frame.extend_from_slice(&if flags & ACK != 0 { self.next } else { 0 }.to_be_bytes());
        frame.extend_from_slice(&[(((20 + options.len()) / 4) << 4) as u8, flags]);
        frame.extend_from_slice(&(window as u16).to_be_bytes());
        frame.extend_from_slice(&[0; 4]);
        frame.extend_from_slice(options);
        let (a, b) = self.buf.as_slices();
        let from_a = a.get(at..(at + len).min(a.len())).unwrap_or_default();
        frame.extend_from_slice(from_a);
        let skip = (at + from_a.len()).saturating_sub(a.len());
        frame.extend_from_slice(b.get(skip..skip + len - from_a.len()).unwrap_or_default());
        let mut header = wire::finish(&mut frame, &path, TCP, start, 16, offloads.checksum);
        header.valid = true;
        if len > self.mss {
            let kind = if path.src.is_ipv4() { GsoKind::Tcp4 } else { GsoKind::Tcp6 };
            header.gso = Some((kind, self.mss as u16));
            header.header_len = (start + 20 + options.len()) as u16;
        }
        self.told = free;
        self.ack_due = false;
        c.push(header, frame);
    }

    fn next_seq_offset(&self) -> usize {
        self.sent + usize::from(self.fin_sent)
    }

    fn acknowledge(&mut self, c: &mut Common) {
        self.emit(c, ACK, self.next_seq_offset(), 0);
    }

    /// Tell the guest that it is over.
    fn refuse(&mut self, c: &mut Common) {
        if self.phase == Phase::Connecting {
            // The guest's SYN is answered: our sequence number does not count.
            self.una = 0;
        }
        self.emit(c, RST | ACK, self.next_seq_offset(), 0);
    }

    /// Tell the host's other end that it was not a clean end.
    fn abort(&self) {
        // The connection goes away in any case.
        let _ = SockRef::from(&self.stream).set_linger(Some(Duration::ZERO));
    }

    /// Give the host what it takes. An error ends the connection.
    fn give_host(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut taken = 0;
        if self.to_host.is_empty() {
            while taken < data.len() {
                match self.stream.write(&data[taken..]) {
                    Ok(0) => break,
                    Ok(n) => taken += n,
                    Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                    Err(e) if e.kind() == ErrorKind::Interrupted => {}
                    Err(e) => return Err(e),
                }
            }
        }
        let kept = (data.len() - taken).min(self.free());
        self.to_host.extend(&data[taken..taken + kept]);
        Ok(taken + kept)
    }

    fn drain_to_host(&mut self) -> io::Result<()> {
        while !self.to_host.is_empty() {
            let (a, _) = self.to_host.as_slices();
            match self.stream.write(a) {
                Ok(0) => break,
                Ok(n) => drop(self.to_host.drain(..n)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        if self.to_host.is_empty() {
            if self.to_host.capacity() > 4096 {
                self.to_host = VecDeque::new();
            }
            if self.guest_fin && !self.host_shut {
                self.host_shut = true;
                // The peer may have closed already.
                let _ = self.stream.shutdown(Shutdown::Write);
            }
        }
        Ok(())
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

/// Both are wishes that need not be granted.
fn settle(stream: &TcpStream) {
    let _ = stream.set_nodelay(true);
    let _ = SockRef::from(stream).set_keepalive(true);
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
        let Ok(stream) = connect(to) else { return reset(c, pair, s) };
        let mut flow = Flow::new(pair, stream, Phase::Connecting, Instant::now());
        flow.meet(s, c.config.mtu.into());
        self.add(c, flow);
    }

    /// A connection came in by a forwarded port.
    pub fn accept(&mut self, c: &mut Common, listener: &TcpListener, to: SocketAddr) {
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
            let flow = Flow::new(pair, stream, Phase::SynSent, Instant::now());
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
            self.held -= f.buf.len();
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

    fn syn_sent(&mut self, c: &mut Common, id: u64, s: &Segment<'_>) {
        let Some(f) = self.flows.get_mut(&id) else { return };
        if s.ack != Some(f.una.wrapping_add(1)) {
            return;
        }
        if s.flags & RST != 0 {
            f.abort();
            return self.remove(id);
        }
        if s.flags & SYN == 0 {
            return;
        }
        f.meet(s, c.config.mtu.into());
        f.una = f.una.wrapping_add(1);
        f.acknowledge(c);
        self.opened(c, id);
    }

    fn opened(&mut self, c: &mut Common, id: u64) {
        let Some(f) = self.flows.get_mut(&id) else { return };
        f.phase = Phase::Open;
        f.readable = true;
        f.tries = 0;
        self.opening -= 1;
        self.pump(c, id);
    }

    fn synchronized(&mut self, c: &mut Common, id: u64, s: &Segment<'_>) {
        let Some(f) = self.flows.get_mut(&id) else { return };
        if s.flags & RST != 0 {
            // RFC 5961 section 3.2: only the exact number counts; others are answered.
            if s.seq == f.next {
                f.abort();
                self.remove(id);
            } else if s.seq.wrapping_sub(f.next) < f.free() as u32 {
                f.acknowledge(c);
            }
            return;
        }
        if s.flags & SYN != 0 {
            if f.phase == Phase::SynReceived && s.seq.wrapping_add(1) == f.next {
                return self.send_syn(c, id);
            }
            // RFC 5961 section 4.2: a guest that began anew answers this with a reset.
            return f.acknowledge(c);
        }
        let Some(ack) = s.ack else { return };
        if f.phase == Phase::SynReceived {
            if ack != f.una.wrapping_add(1) {
                return;
            }
            f.una = ack;
            f.window = usize::from(s.window) << f.scale;
            self.opened(c, id);
        }
        let Some(f) = self.flows.get_mut(&id) else { return };
        let acked = ack.wrapping_sub(f.una) as usize;
        let outstanding = f.max_sent + usize::from(f.fin_ever_sent);
        let window = usize::from(s.window) << f.scale;
        if acked <= outstanding {
            if acked > 0 {
                let data = acked.min(f.buf.len());
                f.buf.drain(..data);
                self.held -= data;
                f.sent = f.sent.saturating_sub(data);
                f.max_sent -= data.min(f.max_sent);
                f.una = f.una.wrapping_add(data as u32);
                if acked > data {
                    f.fin_acked = true;
                    f.fin_sent = true;
                }
                (f.tries, f.repeats) = (0, 0);
                arm(&mut self.timers, c, id, f, true);
                if f.buf.is_empty() && f.buf.capacity() > 4096 {
                    f.buf = VecDeque::new();
                }
            } else if s.data.is_empty() && s.flags & FIN == 0 && f.sent > 0 && window == f.window {
                f.repeats += 1;
                if f.repeats == 3 {
                    // The guest misses a segment: give it again at once (RFC 5681 section 3.2).
                    let n = f.mss.min(f.buf.len());
                    f.emit(c, ACK, 0, n);
                }
            }
            f.window = window;
            // Whoever answers is alive, with a closed window, too.
            f.tries = f.tries.min(MOST_TRIES / 2);
        } else if (acked as i32) > 0 {
            // It acknowledges what was never sent.
            return f.acknowledge(c);
        }
        if self.data(c, id, s) {
            self.pump(c, id);
        }
    }

    /// Take the segment's data and end; false when the connection is gone.
    fn data(&mut self, c: &mut Common, id: u64, s: &Segment<'_>) -> bool {
        let Some(f) = self.flows.get_mut(&id) else { return false };
        let old = f.next.wrapping_sub(s.seq) as usize;
        let fin = s.flags & FIN != 0;
        if s.data.is_empty() && !fin {
            // A probe from outside the window wants an answer (RFC 9293 section 3.10.7.4).
            if s.seq != f.next {
                f.acknowledge(c);
            }
            return true;
        }
        if old > s.data.len() || f.guest_fin {
            // From the future, or all of it known.
            f.acknowledge(c);
            return true;
        }
        let fresh = &s.data[old..];
        let taken = match f.give_host(fresh) {
            Ok(n) => n,
            // Nobody reads what the guest sends; what the host sent before may still be read, but a reset loses it as well.
            Err(_) => {
                self.fail(c, id);
                return false;
            }
        };
        f.next = f.next.wrapping_add(taken as u32);
        if fin && taken == fresh.len() {
            f.next = f.next.wrapping_add(1);
            f.guest_fin = true;
            if f.drain_to_host().is_err() {
                self.fail(c, id);
                return false;
            }
            f.acknowledge(c);
        } else if !f.ack_due {
            f.ack_due = true;
            self.due.push(id);
        }
        if f.is_done() {
            self.remove(id);
            return false;
        }
        true
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

    /// Acknowledge what a batch of segments brought.
    pub fn flush(&mut self, c: &mut Common) {
        for id in std::mem::take(&mut self.due) {
            if let Some(f) = self.flows.get_mut(&id)
                && f.ack_due
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
            let failed = !matches!(f.stream.take_error(), Ok(None));
            if failed {
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
            if f.drain_to_host().is_err() {
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
            if let Some(id) = self.blocked.pop_front()
                && let Some(f) = self.flows.get_mut(&id)
            {
                f.blocked = false;
                self.pump(c, id);
            }
        }
    }

    /// Bring data of the host to the guest, as far as there is some and both sides have room.
    fn pump(&mut self, c: &mut Common, id: u64) {
        let Some(f) = self.flows.get_mut(&id) else { return };
        if f.phase != Phase::Open {
            return;
        }
        let tso = {
            let o = lock(&c.output).offloads;
            if f.pair.guest.is_ipv4() { o.tso4 } else { o.tso6 }
        };
        let chunk = if tso { (MOST_PAYLOAD / f.mss).max(1) * f.mss } else { f.mss };
        let limit = if self.held > TIGHT { SEND_ROOM_TIGHT } else { SEND_ROOM };
        let mut sent_any = false;
        loop {
            let open = f.window.saturating_sub(f.sent);
            if !lock(&c.output).has_room() {
                lock(&c.output).writer_waits = true;
                if !std::mem::replace(&mut f.blocked, true) {
                    self.blocked.push_back(id);
                }
                break;
            }
            if f.sent < f.buf.len() && open > 0 {
                let n = (f.buf.len() - f.sent).min(open).min(chunk);
                let last = f.sent + n == f.buf.len();
                f.emit(c, if last { ACK | PSH } else { ACK }, f.sent, n);
                f.sent += n;
                f.max_sent = f.max_sent.max(f.sent);
                sent_any = true;
                continue;
            }
            let room = limit.saturating_sub(f.buf.len());
            if f.readable && !f.host_eof && open > 0 && room > 0 {
                let want = chunk.min(open).min(room);
                self.scratch.resize(MOST_PAYLOAD + 0xffff, 0);
                match f.stream.read(&mut self.scratch[..want]) {
                    Ok(0) => f.host_eof = true,
                    Ok(n) => {
                        f.buf.extend(&self.scratch[..n]);
                        self.held += n;
                        f.last = Instant::now();
                    }
                    Err(e) if e.kind() == ErrorKind::WouldBlock => f.readable = false,
                    Err(e) if e.kind() == ErrorKind::Interrupted => {}
                    Err(_) => return self.fail(c, id),
                }
                continue;
            }
            // A closed window does not hold back the end, which takes no room.
            if f.readable && !f.host_eof && open == 0 && f.buf.is_empty() {
                match f.stream.peek(&mut [0]) {
                    Ok(0) => f.host_eof = true,
                    Err(e) if e.kind() == ErrorKind::WouldBlock => f.readable = false,
                    _ => break,
                }
                continue;
            }
            if f.host_eof && f.sent == f.buf.len() && !f.fin_sent {
                f.emit(c, FIN | ACK, f.sent, 0);
                (f.fin_sent, f.fin_ever_sent) = (true, true);
                sent_any = true;
                continue;
            }
            break;
        }
        if f.is_done() {
            return self.remove(id);
        }
        arm(&mut self.timers, c, id, f, sent_any && f.deadline.is_none());
    }

    /// When a timer is due next.
    pub fn next_timer(&self) -> Option<Instant> {
        self.timers.peek().map(|t| t.0.0)
    }

    /// Serve the timers that are due.
    pub fn tick(&mut self, c: &mut Common, now: Instant) {
        while let Some(&Reverse((at, id))) = self.timers.peek() {
            if at > now {
                return;
            }
            self.timers.pop();
            let Some(f) = self.flows.get_mut(&id) else { continue };
            if f.queued != Some(at) {
                continue;
            }
            f.queued = None;
            match f.deadline {
                None => continue,
                Some(d) if d > now => {
                    f.queued = Some(d);
                    self.timers.push(Reverse((d, id)));
                    continue;
                }
                Some(_) => {}
            }
            f.deadline = None;
            f.tries += 1;
            // A guest that answers probes with a closed window is alive; one that answers nothing is not.
            if f.tries > MOST_TRIES {
                self.fail(c, id);
                continue;
            }
            match f.phase {
                Phase::Connecting => {}
                Phase::SynSent | Phase::SynReceived => self.send_syn(c, id),
                Phase::Open if f.window == 0 => {
                    // An old sequence number makes the guest tell its window.
                    f.una = f.una.wrapping_sub(1);
                    f.acknowledge(c);
                    f.una = f.una.wrapping_add(1);
                    arm(&mut self.timers, c, id, f, true);
                }
                Phase::Open => {
                    f.sent = 0;
                    if !f.fin_acked {
                        f.fin_sent = false;
                    }
                    self.pump(c, id);
                }
            }
        }
    }
}

/// Set a connection's timer if it waits for something; `anew` puts it off.
fn arm(timers: &mut BinaryHeap<Reverse<(Instant, u64)>>, c: &mut Common, id: u64, f: &mut Flow, anew: bool) {
    let unanswered = f.max_sent > 0 || (f.fin_ever_sent && !f.fin_acked) || f.is_opening();
    let shut_out = f.window == 0 && (f.readable || !f.buf.is_empty()) && !f.fin_acked;
    if !unanswered && !shut_out {
        f.deadline = None;
        return;
    }
    if f.deadline.is_some() && !anew {
        return;
    }
    let at = Instant::now() + RTO * (1 << f.tries.min(7));
    f.deadline = Some(at);
    if f.queued.is_none_or(|q| q > at) {
        f.queued = Some(at);
        timers.push(Reverse((at, id)));
        c.timer_set(at);
    }
}

/// Answer a segment that belongs to no connection (RFC 9293 section 3.10.7.1).
fn reset(c: &mut Common, pair: Pair, s: &Segment<'_>) {
    let Some(guest_mac) = c.guest_mac.filter(|_| s.flags & RST == 0) else { return };
    let path = Path { from: c.mac, to: guest_mac, src: pair.far.ip(), dst: pair.guest.ip() };
    let len = s.data.len() as u32 + u32::from(s.flags & SYN != 0) + u32::from(s.flags & FIN != 0);
    let (seq, ack, flags) = match s.ack {
        Some(ack) => (ack, 0, RST),
        None => (0, s.seq.wrapping_add(len), RST | ACK),
    };
    let mut frame = Vec::new();
    let start = wire::ip(&mut frame, &path, TCP, 20);
    frame.extend_from_slice(&pair.far.port().to_be_bytes());
    frame.extend_from_slice(&pair.guest.port().to_be_bytes());
    frame.extend_from_slice(&seq.to_be_bytes());
    frame.extend_from_slice(&ack.to_be_bytes());
    frame.extend_from_slice(&[0x50, flags, 0, 0, 0, 0, 0, 0]);
    wire::finish(&mut frame, &path, TCP, start, 16, false);
    c.push(VnetHeader { valid: true, ..VnetHeader::default() }, frame);
}
