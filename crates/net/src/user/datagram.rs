//! UDP and ICMP echo: a socket of the host for each of the guest's, given up when it was idle for a while.

use super::icmp::{self, Trouble};
use super::stack::{Common, Target};
use crate::wire::{self, ICMP, ICMP6, Path, UDP};
use crate::{VnetHeader, sys};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
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
/// Failures of datagrams taken from one socket at a time.
const FAILURES: usize = 32;
/// Packets that may go this far or further are sent as far as the host sends its own; others are for finding out the way.
const FAR: u8 = 33;
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
    /// How far its packets may go, if not as far as the host's own.
    hops: Option<u8>,
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
    fn new(kind: Kind, socket: UdpSocket) -> Flow {
        Flow { kind, socket, last: Instant::now(), hops: None, dns: None }
    }

    /// Send no further than the guest wants, this router counted.
    fn limit(&mut self, hops: u8, v4: bool) {
        let wanted = (hops < FAR).then_some(hops.saturating_sub(1).max(1));
        if wanted == self.hops {
            return;
        }
        let value = u32::from(wanted.unwrap_or(64));
        let s = SockRef::from(&self.socket);
        // What cannot be set stays as it is: the packet goes further.
        let _ = if v4 { s.set_ttl_v4(value) } else { s.set_unicast_hops_v6(value) };
        self.hops = wanted;
    }

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
        self.flows.insert(id, Flow::new(Kind::Forward(to), socket));
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
        self.flows.insert(id, Flow::new(kind, socket));
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
    pub fn udp(&mut self, c: &mut Common, from: SocketAddr, to: SocketAddr, hops: u8, data: &[u8]) {
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
        let real = match c.target(to) {
            Target::Host(real) => real,
            Target::Refused => return failed(c, from, to, data, Trouble::Port, Some(to.ip())),
            Target::Nowhere => return,
        };
        let only = (real != to).then_some(to);
        let key = UdpKey { guest: from, only };
        let id = match self.udp.get(&key) {
            Some(&id) => id,
            None => {
                let socket = match udp_socket(real, only.is_some()) {
                    Ok(s) => s,
                    Err(e) => return lost(c, from, to, data, &e),
                };
                // A name server that fails is passed over.
                if !c.is_dns(to.ip()) {
                    // Without it the guest is not told, which is all that is lost.
                    let _ = sys::keep_failures(socket.as_raw_fd(), real.is_ipv4());
                }
                let Some(id) = self.add(c, Kind::Udp(key), socket) else { return };
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
        f.limit(hops, real.is_ipv4());
        let send = |f: &Flow| {
            let done = if only.is_some() { f.socket.send(data) } else { f.socket.send_to(data, real) };
            done.err().filter(|e| e.kind() != ErrorKind::WouldBlock)
        };
        let Some(e) = send(f) else { return };
        if f.dns.is_some() {
            if e.kind() == ErrorKind::ConnectionRefused {
                self.ask_next(c, id);
            }
            return;
        }
        // It may be a former datagram's failure that is told now, and once only.
        self.failures(c, id);
        if let Some(e) = self.flows.get(&id).and_then(send) {
            lost(c, from, to, data, &e);
        }
    }

    /// Tell the guest what became of datagrams of a socket.
    fn failures(&mut self, c: &mut Common, id: u64) {
        let Some(f) = self.flows.get(&id) else { return };
        for _ in 0..FAILURES {
            let Ok(found) = sys::take_failure(f.socket.as_raw_fd(), &mut self.buffer) else { return };
            let Some(e) = found else { continue };
            let v4 = e.to.is_ipv4();
            let Some(what) = Trouble::of_host(v4, e.icmp, e.errno, e.info) else { continue };
            match f.kind {
                Kind::Udp(key) => {
                    let to = key.only.unwrap_or(e.to);
                    let by = match what {
                        Trouble::Port => Some(to.ip()),
                        _ => e.by,
                    };
                    failed(c, key.guest, to, &self.buffer, what, by);
                }
                Kind::Echo(key, raw) => {
                    let path = Path { from: [0; 6], to: [0; 6], src: key.guest, dst: key.far };
                    // Raw sockets are told the failures of all echoes to their peer.
                    let own = |ident: &[u8]| raw.is_none_or(|r| *ident == r.to_be_bytes());
                    if let Some(ident) = self.buffer.get_mut(4..6).filter(|i| own(i)) {
                        ident.copy_from_slice(&key.ident.to_be_bytes());
                        icmp::report(c, &path, if v4 { ICMP } else { ICMP6 }, &self.buffer, what, e.by);
                    }
                }
                Kind::Forward(_) => {}
            }
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
    pub fn echo(&mut self, c: &mut Common, path: &Path, hops: u8, message: &[u8]) {
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
                let (socket, raw) = match echo_socket(path.dst) {
                    Ok(s) => s,
                    Err(e) => {
                        let what =
                            Trouble::of_host(path.src.is_ipv4(), None, e.raw_os_error().unwrap_or(0), 0);
                        let protocol = if path.src.is_ipv4() { ICMP } else { ICMP6 };
                        // A host that allows no echoes is silent.
                        if let Some(w @ (Trouble::Network | Trouble::Host)) = what {
                            icmp::report(c, path, protocol, message, w, None);
                        }
                        return;
                    }
                };
                let _ = sys::keep_failures(socket.as_raw_fd(), path.dst.is_ipv4());
                let kind = Kind::Echo(key, raw.then(|| fastrand::u16(..)));
                let Some(id) = self.add(c, kind, socket) else { return };
                id
            }
        };
        if let Some(f) = self.flows.get_mut(&id) {
            f.last = Instant::now();
            f.limit(hops, path.dst.is_ipv4());
            let mut m = message.to_vec();
            if let Kind::Echo(_, Some(ident)) = f.kind {
                m[4..6].copy_from_slice(&ident.to_be_bytes());
            }
            // The kernel fills in the checksum of ping sockets and of raw ones for IPv6.
            m[2..4].fill(0);
            let sum = wire::checksum(&m);
            m[2..4].copy_from_slice(&sum.to_be_bytes());
            // The first may be told a former one's failure.
            if f.socket.send(&m).is_err() {
                let _ = f.socket.send(&m);
            }
        }
    }

    /// Something came for a socket. False if `id` is none of ours.
    pub fn ready(&mut self, c: &mut Common, id: u64, failed: bool) -> bool {
        if failed {
            self.failures(c, id);
        }
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
    let mtu = usize::from(c.config.mtu);
    if frame.len() - wire::ETH <= mtu {
        return c.push(VnetHeader::default(), frame);
    }
    // A long question came in fragments, and its answer goes in such.
    let protocol = if src.is_ipv4() { ICMP } else { ICMP6 };
    let whole = &frame[frame.len() - message.len()..];
    for part in wire::fragments(&path, protocol, whole, mtu, fastrand::u32(..)) {
        c.push(VnetHeader::default(), part);
    }
}

/// Tell the guest what became of a datagram.
fn failed(c: &mut Common, from: SocketAddr, to: SocketAddr, data: &[u8], what: Trouble, by: Option<IpAddr>) {
    let path = Path { from: [0; 6], to: [0; 6], src: from.ip(), dst: to.ip() };
    let mut m = Vec::new();
    wire::udp(&mut m, &path, (from.port(), to.port()), data, false);
    let header = m.len() - data.len() - 8;
    icmp::report(c, &path, UDP, &m[header..], what, by);
}

/// The same for a datagram that did not leave the host. Other losses are UDP's nature.
fn lost(c: &mut Common, from: SocketAddr, to: SocketAddr, data: &[u8], e: &io::Error) {
    if let Some(what) = Trouble::of_host(to.is_ipv4(), None, e.raw_os_error().unwrap_or(0), 0) {
        failed(c, from, to, data, what, None);
    }
}
