//! UDP and ICMP echo: a socket of the host for each of the guest's, given up when it was idle for a while.

use super::stack::{Common, Target};
use crate::VnetHeader;
use crate::wire::{self, Path};
use socket2::{Domain, Protocol, Socket, Type};
use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

/// Most sockets of one guest, each kind.
const MOST: usize = 4096;
/// How long an idle one is kept (RFC 4787 section 4.3 asks for two minutes at least).
const IDLE: Duration = Duration::from_secs(180);
/// The same for the name server's port, and for echoes.
const IDLE_SHORT: Duration = Duration::from_secs(20);
/// How long a name server may take before the next one is asked, and how many are.
const DNS_PATIENCE: Duration = Duration::from_secs(2);
const MOST_SERVERS: u32 = 4;
/// Longest question that is kept for the next server.
const MOST_QUERY: usize = 4096;
/// Datagrams taken from one socket at a time.
const BATCH: usize = 256;
/// Longest datagram.
const MOST_BYTES: usize = 65_535;

/// The guest's socket, and its only peer if that is one whose address is translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct UdpKey {
    guest: SocketAddr,
    only: Option<SocketAddr>,
}

/// Who asks whom, and the guest's identifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct EchoKey {
    guest: IpAddr,
    far: IpAddr,
    ident: u16,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Udp(UdpKey),
    /// `raw`: the identifier on the wire, when the kernel does not translate it.
    Echo(EchoKey, Option<u16>),
    /// A port of the host that leads to this address of the guest.
    Forward(SocketAddr),
}

struct Flow {
    kind: Kind,
    socket: UdpSocket,
    last: Instant,
    /// For a flow to a name server: which one, and what was asked last while it has not answered.
    dns: Option<(SocketAddr, Option<Asked>)>,
}

/// A question to a name server.
struct Asked {
    query: Vec<u8>,
    at: Instant,
    /// Servers that had it.
    tries: u32,
}

impl Flow {
    fn idle(&self) -> Option<Duration> {
        match self.kind {
            Kind::Udp(_) if self.dns.is_some() => Some(IDLE_SHORT),
            Kind::Echo(..) => Some(IDLE_SHORT),
            Kind::Udp(_) => Some(IDLE),
            Kind::Forward(_) => None,
        }
    }
}

/// All of them.
#[derive(Default)]
pub struct Datagrams {
    flows: HashMap<u64, Flow>,
    udp: HashMap<UdpKey, u64>,
    echo: HashMap<EchoKey, u64>,
    /// Peers that came in by a forwarded port: the guest's and the seen address to the port and the real address.
    peers: HashMap<(SocketAddr, SocketAddr), (u64, SocketAddr, Instant)>,
    buffer: Vec<u8>,
}

fn udp_socket(peer: SocketAddr, only: bool) -> io::Result<UdpSocket> {
    let any: IpAddr =
        if peer.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = Socket::new(Domain::for_address(peer), Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_nonblocking(true)?;
    if peer.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&SocketAddr::new(any, 0).into())?;
    if only {
        socket.connect(&peer.into())?;
    }
    Ok(socket.into())
}

/// A socket for echoes with one peer; the second value: it is a raw one.
fn echo_socket(peer: IpAddr) -> io::Result<(UdpSocket, bool)> {
    let (domain, protocol) = match peer {
        IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
        IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
    };
    // Hosts allow the first to all users or to none, root included; raw ones need rights.
    let (socket, raw) = match Socket::new(domain, Type::DGRAM, Some(protocol)) {
        Ok(s) => (s, false),
        Err(_) => (Socket::new(domain, Type::RAW, Some(protocol))?, true),
    };
    socket.set_nonblocking(true)?;
    socket.connect(&SocketAddr::new(peer, 0).into())?;
    Ok((socket.into(), raw))
}

impl Datagrams {
    /// Listen on a port of the host for the guest.
    pub fn forward(&mut self, c: &mut Common, socket: UdpSocket, to: SocketAddr) -> io::Result<u64> {
        let id = c.new_id();
        c.watch_level(socket.as_raw_fd(), id)?;
        self.flows.insert(id, Flow { kind: Kind::Forward(to), socket, last: Instant::now(), dns: None });
        Ok(id)
    }

    fn add(&mut self, c: &mut Common, kind: Kind, socket: UdpSocket) -> Option<u64> {
        if self.flows.len() >= MOST {
            let idlest = self.flows.iter().filter(|(_, f)| f.idle().is_some()).min_by_key(|(_, f)| f.last);
            let id = *idlest?.0;
            self.remove(id);
        }
        let id = c.new_id();
        c.watch_level(socket.as_raw_fd(), id).ok()?;
        match kind {
            Kind::Udp(key) => drop(self.udp.insert(key, id)),
            Kind::Echo(key, _) => drop(self.echo.insert(key, id)),
            Kind::Forward(_) => {}
        }
        self.flows.insert(id, Flow { kind, socket, last: Instant::now(), dns: None });
        Some(id)
    }

    fn remove(&mut self, id: u64) {
        match self.flows.remove(&id).map(|f| f.kind) {
            Some(Kind::Udp(key)) => drop(self.udp.remove(&key)),
            Some(Kind::Echo(key, _)) => drop(self.echo.remove(&key)),
            _ => {}
        }
    }

    /// A datagram of the guest.
    pub fn udp(&mut self, c: &mut Common, from: SocketAddr, to: SocketAddr, data: &[u8]) {
        if from.port() == 0 || to.port() == 0 {
            return;
        }
        // An answer to a peer that came in by a forwarded port goes out by the same.
        if let Some((id, peer, last)) = self.peers.get_mut(&(from, to))
            && let Some(f) = self.flows.get(id)
        {
            *last = Instant::now();
            // Lost datagrams are UDP's nature.
            let _ = f.socket.send_to(data, *peer);
            return;
        }
        let Target::Host(real) = c.target(to) else { return };
        let only = (real != to).then_some(to);
        let key = UdpKey { guest: from, only };
        let id = match self.udp.get(&key) {
            Some(&id) => id,
            None => {
                let made = udp_socket(real, only.is_some());
                let Some(id) = made.ok().and_then(|s| self.add(c, Kind::Udp(key), s)) else { return };
                id
            }
        };
        let Some(f) = self.flows.get_mut(&id) else { return };
        f.last = Instant::now();
        if c.is_dns(to.ip()) {
            let server = f.dns.as_ref().map_or(real, |(s, _)| *s);
            let asked = Asked { query: data.to_vec(), at: f.last, tries: 1 };
            f.dns = Some((server, (data.len() <= MOST_QUERY).then_some(asked)));
        }
        let sent = if only.is_some() { f.socket.send(data) } else { f.socket.send_to(data, real) };
        // Other losses are UDP's nature.
        if sent.is_err_and(|e| e.kind() == ErrorKind::ConnectionRefused) {
            self.ask_next(c, id);
        }
    }

    /// The name server of a flow does not answer: ask the next one.
    fn ask_next(&mut self, c: &mut Common, id: u64) {
        let Some(f) = self.flows.get_mut(&id) else { return };
        let Some((server, Some(asked))) = &mut f.dns else { return };
        asked.tries += 1;
        if !c.resolver.failed(*server) || asked.tries > MOST_SERVERS {
            f.dns = Some((*server, None));
            return;
        }
        let Some(next) = c.resolver.address() else { return };
        let Ok(socket) = udp_socket(next, true) else { return };
        if c.watch_level(socket.as_raw_fd(), id).is_err() {
            return;
        }
        asked.at = Instant::now();
        *server = next;
        // The old one leaves the poll set as it closes.
        f.socket = socket;
        let _ = f.socket.send(&asked.query);
    }

    /// An echo request of the guest; other ICMP messages are not for us.
    pub fn echo(&mut self, c: &mut Common, path: &Path, message: &[u8]) {
        let request = if path.src.is_ipv4() { 8 } else { 128 };
        let Some(&[kind, 0, _, _, i0, i1]) = message.first_chunk() else { return };
        if kind != request || message.len() < 8 || message.len() > MOST_BYTES - 20 {
            return;
        }
        let config = &c.config;
        let own = match path.dst {
            IpAddr::V4(a) => a == config.gateway || a == config.dns,
            IpAddr::V6(a) => a == config.gateway6() || a == config.dns6(),
        };
        if own || config.host_alias == Some(path.dst) {
            let mut answer = message.to_vec();
            answer[0] = if request == 8 { 0 } else { 129 };
            return answer_echo(c, path.dst, path.src, &answer);
        }
        let Target::Host(_) = c.target(SocketAddr::new(path.dst, 0)) else { return };
        let key = EchoKey { guest: path.src, far: path.dst, ident: u16::from_be_bytes([i0, i1]) };
        let id = match self.echo.get(&key) {
            Some(&id) => id,
            None => {
                let Ok((socket, raw)) = echo_socket(path.dst) else { return };
                let kind = Kind::Echo(key, raw.then(|| fastrand::u16(..)));
                let Some(id) = self.add(c, kind, socket) else { return };
                id
            }
        };
        if let Some(f) = self.flows.get_mut(&id) {
            f.last = Instant::now();
            let mut m = message.to_vec();
            if let Kind::Echo(_, Some(ident)) = f.kind {
                m[4..6].copy_from_slice(&ident.to_be_bytes());
            }
            // The kernel fills in the checksum of ping sockets and of raw ones for IPv6.
            m[2..4].fill(0);
            let sum = wire::checksum(&m);
            m[2..4].copy_from_slice(&sum.to_be_bytes());
            let _ = f.socket.send(&m);
        }
    }

    /// Something came for a socket. False if `id` is none of ours.
    pub fn ready(&mut self, c: &mut Common, id: u64) -> bool {
        let Some(f) = self.flows.get_mut(&id) else { return false };
        self.buffer.resize(MOST_BYTES, 0);
        for _ in 0..BATCH {
            let (n, peer) = match f.socket.recv_from(&mut self.buffer) {
                Ok(got) => got,
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == ErrorKind::ConnectionRefused && f.dns.is_some() => {
                    self.ask_next(c, id);
                    return true;
                }
                // What a former datagram met; the next call has the next datagram.
                Err(_) => continue,
            };
            f.last = Instant::now();
            if let Some((_, asked)) = &mut f.dns {
                *asked = None;
            }
            let data = &self.buffer[..n];
            match f.kind {
                Kind::Udp(key) => {
                    let far = key.only.unwrap_or(peer);
                    let strange = key.only.is_none()
                        && (!super::stack::may_leave(peer.ip()) || c.config.is_local(peer.ip()));
                    if !strange {
                        c.push_udp(far, key.guest, data);
                    }
                }
                Kind::Echo(key, raw) => echo_came(c, key, raw, data),
                Kind::Forward(to) => {
                    let far = c.seen_as(peer, to);
                    if self.peers.len() < MOST || self.peers.contains_key(&(to, far)) {
                        self.peers.insert((to, far), (id, peer, Instant::now()));
                        c.push_udp(far, to, data);
                    }
                }
            }
        }
        true
    }

    /// Give up what was idle for too long.
    pub fn tick(&mut self, c: &mut Common, now: Instant) {
        let waits = |f: &Flow| matches!(&f.dns, Some((_, Some(a))) if now.saturating_duration_since(a.at) > DNS_PATIENCE);
        let silent: Vec<u64> = self.flows.iter().filter(|(_, f)| waits(f)).map(|(&id, _)| id).collect();
        silent.into_iter().for_each(|id| self.ask_next(c, id));
        let old = |f: &Flow| f.idle().is_some_and(|i| now.saturating_duration_since(f.last) > i);
        let gone: Vec<u64> = self.flows.iter().filter(|(_, f)| old(f)).map(|(&id, _)| id).collect();
        gone.into_iter().for_each(|id| self.remove(id));
        self.peers.retain(|_, (_, _, last)| now.saturating_duration_since(*last) <= IDLE);
    }
}

/// A message of ICMP on an echo socket.
fn echo_came(c: &mut Common, key: EchoKey, raw: Option<u16>, data: &[u8]) {
    let mut data = data;
    if raw.is_some() && key.far.is_ipv4() {
        // Raw sockets of IPv4 give the IP header, too.
        let header = usize::from(data.first().copied().unwrap_or(0) & 15) * 4;
        data = data.get(header..).unwrap_or_default();
    }
    let reply = if key.far.is_ipv4() { 0 } else { 129 };
    let Some(&[kind, _, _, _, i0, i1]) = data.first_chunk() else { return };
    if kind != reply || data.len() < 8 || raw.is_some_and(|r| r != u16::from_be_bytes([i0, i1])) {
        return;
    }
    let mut m = data.to_vec();
    m[4..6].copy_from_slice(&key.ident.to_be_bytes());
    answer_echo(c, key.far, key.guest, &m);
}

fn answer_echo(c: &mut Common, src: IpAddr, dst: IpAddr, message: &[u8]) {
    let Some(guest_mac) = c.guest_mac else { return };
    let path = Path { from: c.mac, to: guest_mac, src, dst };
    let frame = wire::icmp(&path, message);
    // Echoes longer than the link carries would have come in fragments; their answers are not cut.
    if frame.len() - wire::ETH <= usize::from(c.config.mtu) {
        c.push(VnetHeader::default(), frame);
    }
}
