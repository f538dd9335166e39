//! Frames of the guest, sorted by what they carry; and what all protocols share.

use super::config::UserConfig;
use super::datagram::Datagrams;
use super::fragments::Fragments;
use super::icmp::{self, Trouble};
use super::output::Output;
use super::tcp::Tcp;
use super::tftp::Tftp;
use super::{dhcp, dhcp6, neighbours};
use crate::VnetHeader;
use crate::pcap::Pcap;
use crate::resolver::Resolver;
use crate::wire::{self, ICMP, ICMP6, Mac, Path, TCP, UDP};
use ringfort_bus::lock;
use smoltcp::wire::{EthernetFrame, Ipv4Packet, Ipv6Packet, TcpPacket, UdpPacket};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex};
use std::time::Instant;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

/// The Ethernet address of router and DNS server: locally administered, as QEMU's.
pub const GATEWAY_MAC: Mac = [0x52, 0x55, 10, 0, 2, 2];

/// Where the guest's connections lead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// To this address, by the host's own means.
    Host(SocketAddr),
    /// Nobody listens there.
    Refused,
    /// Nothing answers there.
    Nowhere,
}

/// What all protocols share.
pub struct Common {
    pub config: UserConfig,
    pub mac: Mac,
    /// The guest's address: its card's, or the one that it sent from last.
    pub guest_mac: Option<Mac>,
    /// The guest's own IPv6 addresses, the last used one.
    pub guest6: Option<Ipv6Addr>,
    pub output: Arc<Mutex<Output>>,
    /// The device is to be told about frames.
    pub notify: bool,
    pub resolver: Resolver,
    pub dump: Option<Pcap>,
    pub epoll: Arc<Epoll>,
    /// Wakes the poll thread for acknowledgements that wait.
    pub ack_timer: TimerFd,
    /// Messages about the guest's packets that may still be sent before the next sweep.
    pub troubles: u32,
    next_id: u64,
    /// The poll thread sleeps until then.
    pub sleeps_until: Option<Instant>,
    /// It must be woken.
    pub wake: bool,
}

impl Common {
    pub fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// Have events of a descriptor reported, once each time something changes.
    pub fn watch(&self, fd: RawFd, id: u64) -> io::Result<()> {
        let set = EventSet::IN
            | EventSet::OUT
            | EventSet::PRIORITY
            | EventSet::READ_HANG_UP
            | EventSet::EDGE_TRIGGERED;
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(set, id))
    }

    /// As [`watch`](Self::watch), for as long as there is something to read.
    pub fn watch_level(&self, fd: RawFd, id: u64) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, id))
    }

    /// A timer was set; the poll thread may sleep for longer.
    pub fn timer_set(&mut self, at: Instant) {
        self.wake |= self.sleeps_until.is_some_and(|s| s > at);
    }

    /// Send a frame to the guest.
    pub fn push(&mut self, header: VnetHeader, frame: Vec<u8>) {
        self.push_as(header, frame, false);
    }

    /// Send a frame to the guest; an urgent one may overtake others.
    pub fn push_as(&mut self, header: VnetHeader, frame: Vec<u8>, urgent: bool) {
        if let Some(d) = &mut self.dump
            && d.frame(&frame).is_err()
        {
            // A full disk ends the capture, not the network.
            self.dump = None;
        }
        self.notify |= lock(&self.output).push(header, frame, urgent);
    }

    /// Send a whole UDP datagram to the guest.
    pub fn push_udp(&mut self, from: SocketAddr, to: SocketAddr, data: &[u8]) {
        if let Some(guest_mac) = self.guest_mac {
            self.push_udp_to(guest_mac, from, to, data);
        }
    }

    /// As [`push_udp`](Self::push_udp), to a given Ethernet address.
    pub fn push_udp_to(&mut self, mac: Mac, from: SocketAddr, to: SocketAddr, data: &[u8]) {
        let path = Path { from: self.mac, to: mac, src: from.ip(), dst: to.ip() };
        let (mut frame, offloads) = {
            let mut out = lock(&self.output);
            (out.buffer(), out.offloads)
        };
        let mtu = usize::from(self.config.mtu);
        let headers = wire::ETH + 8 + if from.is_ipv4() { 20 } else { 40 };
        let fits = headers + data.len() <= wire::ETH + mtu;
        let header = wire::udp(&mut frame, &path, (from.port(), to.port()), data, fits && offloads.checksum);
        if fits {
            return self.push_as(header, frame, true);
        }
        for part in wire::fragments(&path, UDP, &frame[headers - 8..], mtu, fastrand::u32(..)) {
            self.push_as(VnetHeader::default(), part, true);
        }
    }

    /// The gateway's address of the same version.
    pub fn gateway(&self, like: IpAddr) -> IpAddr {
        if like.is_ipv4() { self.config.gateway.into() } else { self.config.gateway6().into() }
    }

    /// What the guest takes a peer of the host's for that comes in by a forwarded port to `guest`.
    pub fn seen_as(&self, peer: SocketAddr, guest: SocketAddr) -> SocketAddr {
        let ip = peer.ip().to_canonical();
        let strange = ip.is_loopback()
            || ip.is_unspecified()
            || ip.is_ipv4() != guest.is_ipv4()
            || self.config.is_local(ip)
            || matches!(ip, IpAddr::V6(a) if a.is_unicast_link_local());
        SocketAddr::new(if strange { self.gateway(guest.ip()) } else { ip }, peer.port())
    }

    /// Whether an address is the name server's.
    pub fn is_dns(&self, a: IpAddr) -> bool {
        match a {
            IpAddr::V4(a) => a == self.config.dns,
            IpAddr::V6(a) => a == self.config.dns6(),
        }
    }

    /// Whether an address is the router's itself, by whatever name.
    pub fn is_own(&self, a: IpAddr) -> bool {
        a == self.gateway(a) || self.is_dns(a) || self.config.host_alias == Some(a)
    }

    /// Where a destination of the guest's leads.
    pub fn target(&mut self, to: SocketAddr) -> Target {
        let (gateway, dns) = match to.ip() {
            IpAddr::V4(a) => (a == self.config.gateway, a == self.config.dns),
            IpAddr::V6(a) => (a == self.config.gateway6(), a == self.config.dns6()),
        };
        if self.config.restrict {
            return if gateway || dns { Target::Refused } else { Target::Nowhere };
        }
        if dns {
            return match self.resolver.address() {
                Some(server) if to.port() == 53 => Target::Host(server),
                _ => Target::Refused,
            };
        }
        let alias = self.config.host_alias == Some(to.ip());
        if gateway || alias {
            let own: IpAddr =
                if to.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
            return if self.config.host_loopback || alias {
                Target::Host(SocketAddr::new(own, to.port()))
            } else {
                Target::Refused
            };
        }
        if self.config.is_local(to.ip()) || !may_leave(to.ip()) { Target::Nowhere } else { Target::Host(to) }
    }
}

/// Whether packets to an address may leave by the host: no loopback in any writing, nobody, no groups.
pub fn may_leave(a: IpAddr) -> bool {
    match a {
        IpAddr::V4(a) => {
            let first = a.octets()[0];
            // 0.0.0.0/8 is this host (RFC 1122), and 240.0.0.0/4 nobody.
            first != 0 && first != 127 && first < 224
        }
        IpAddr::V6(a) => {
            let s = a.segments();
            // ::/96 holds loopback, the unspecified and the IPv4-compatible addresses; then IPv4-mapped and -translated.
            !(s[..5] == [0; 5] || s[..4] == [0; 4] && s[4] == 0xffff || a.is_multicast() || a.is_unicast_link_local())
                // NAT64 and 6to4 of what must not leave as IPv4.
                && (s[..6] != [0x64, 0xff9b, 0, 0, 0, 0] || may_leave(embedded(s[6], s[7])))
                && (s[0] != 0x2002 || may_leave(embedded(s[1], s[2])))
        }
    }
}

fn embedded(high: u16, low: u16) -> IpAddr {
    Ipv4Addr::from(u32::from(high) << 16 | u32::from(low)).into()
}

/// A port of the host that leads into the guest.
pub enum Listener {
    Tcp(TcpListener, SocketAddr),
    Udp,
}

/// Everything of one guest's network.
pub struct Stack {
    pub common: Common,
    pub tcp: Tcp,
    pub datagrams: Datagrams,
    pub listeners: Vec<(u64, Listener)>,
    fragments: Fragments,
    tftp: Tftp,
    /// When the router was last heard by all.
    advertised: Instant,
}

/// What one packet carries, IP headers removed.
struct Packet<'a> {
    path: Path,
    protocol: u8,
    data: &'a [u8],
    hops: u8,
}

/// Pass over extension headers (RFC 8200 section 4): few, each at least 8 bytes. Routing headers are not for guests.
fn headers6(mut protocol: u8, mut data: &[u8]) -> Option<(u8, &[u8])> {
    for _ in 0..8 {
        // Hop-by-hop and destination options.
        if !matches!(protocol, 0 | 60) {
            break;
        }
        let &[next, len] = data.first_chunk()?;
        (protocol, data) = (next, data.get(8 + 8 * usize::from(len)..)?);
    }
    Some((protocol, data))
}

impl Stack {
    pub fn new(
        config: UserConfig,
        output: Arc<Mutex<Output>>,
        epoll: Arc<Epoll>,
        ack_timer: TimerFd,
        dump: Option<Pcap>,
        guest_mac: Option<Mac>,
    ) -> Stack {
        Stack {
            common: Common {
                mac: GATEWAY_MAC,
                guest_mac,
                guest6: None,
                output,
                notify: false,
                resolver: Resolver::new(&config.nameservers),
                config,
                dump,
                epoll,
                ack_timer,
                troubles: icmp::MOST,
                next_id: 0,
                sleeps_until: None,
                wake: false,
            },
            tcp: Tcp::default(),
            datagrams: Datagrams::default(),
            listeners: Vec::new(),
            fragments: Fragments::default(),
            tftp: Tftp::default(),
            advertised: Instant::now(),
        }
    }

    /// A frame of the guest. What makes no sense is dropped.
    pub fn frame(&mut self, header: &VnetHeader, frame: &[u8]) {
        if let Some(d) = &mut self.common.dump
            && d.frame(frame).is_err()
        {
            self.common.dump = None;
        }
        let Ok(eth) = EthernetFrame::new_checked(frame) else { return };
        let from = eth.src_addr();
        if !from.is_unicast() || from.0 == [0; 6] {
            return;
        }
        let to = eth.dst_addr();
        let ours = to.0 == self.common.mac || to.0[0] & 1 != 0;
        if !ours {
            return;
        }
        self.common.guest_mac = Some(from.0);
        match u16::from(eth.ethertype()) {
            0x0806 => neighbours::arp(&mut self.common, eth.payload()),
            0x0800 => self.ipv4(header, eth.payload()),
            0x86dd if self.common.config.ipv6 => self.ipv6(header, eth.payload()),
            _ => {}
        }
    }

    fn ipv4(&mut self, header: &VnetHeader, packet: &[u8]) {
        let Ok(p) = Ipv4Packet::new_checked(packet) else { return };
        if p.version() != 4 || p.header_len() < 20 || !p.verify_checksum() {
            return;
        }
        let (src, dst) = (p.src_addr(), p.dst_addr());
        let path = Path { from: [0; 6], to: [0; 6], src: src.into(), dst: dst.into() };
        let whole;
        let mut data = p.payload();
        let mut checked = header.checksum.is_some() || header.valid;
        if p.more_frags() || p.frag_offset() != 0 {
            let key = (path.src, path.dst, u32::from(p.ident()), p.next_header().into());
            let Some(d) = self.fragments.add(key, p.frag_offset().into(), p.more_frags(), data) else {
                return;
            };
            whole = d;
            data = &whole;
            checked = false;
        }
        let packet = Packet { path, protocol: p.next_header().into(), data, hops: p.hop_limit() };
        if packet.protocol == UDP && self.dhcp(&packet, checked) {
            return;
        }
        // What the guest may call itself; everything else is spoofed.
        let c = &self.common.config;
        if !c.contains(src) || src == c.gateway || src == c.dns || c.host_alias == Some(src.into()) {
            return;
        }
        self.packet(header, &packet, checked);
    }

    /// DHCP comes from guests without an address. True if it was that.
    fn dhcp(&mut self, packet: &Packet<'_>, checked: bool) -> bool {
        let Ok(udp) = UdpPacket::new_checked(packet.data) else { return false };
        if udp.dst_port() != 67 {
            return false;
        }
        if !checked && !udp.verify_checksum(&packet.path.src.into(), &packet.path.dst.into()) {
            return true;
        }
        let c = &mut self.common;
        if let Some(a) = dhcp::answer(&c.config, udp.payload())
            && let Some(guest_mac) = c.guest_mac
        {
            let to = SocketAddr::new(a.to.unwrap_or(Ipv4Addr::BROADCAST).into(), 68);
            let mac = if a.to.is_some() { guest_mac } else { [0xff; 6] };
            let from = SocketAddr::new(c.config.gateway.into(), 67);
            c.push_udp_to(mac, from, to, &a.message);
        }
        true
    }

    fn ipv6(&mut self, header: &VnetHeader, packet: &[u8]) {
        let Ok(p) = Ipv6Packet::new_checked(packet) else { return };
        if p.version() != 6 {
            return;
        }
        let (src, dst) = (p.src_addr(), p.dst_addr());
        let path = Path { from: [0; 6], to: [0; 6], src: src.into(), dst: dst.into() };
        let (mut protocol, mut data) = (u8::from(p.next_header()), p.payload());
        let mut checked = header.checksum.is_some() || header.valid;
        let mut whole = None;
        (protocol, data) = match headers6(protocol, data) {
            Some(rest) => rest,
            None => return,
        };
        if protocol == 44 {
            let Some((h, rest)) = data.split_first_chunk::<8>() else { return };
            let at = u16::from_be_bytes([h[2], h[3]]);
            let key = (path.src, path.dst, u32::from_be_bytes([h[4], h[5], h[6], h[7]]), h[0]);
            let Some(d) = self.fragments.add(key, usize::from(at & !7), at & 1 != 0, rest) else { return };
            checked = false;
            // Destination options may stand behind it, too.
            match headers6(h[0], whole.insert(d)) {
                Some(rest) => (protocol, data) = rest,
                None => return,
            }
        }
        let packet = Packet { path, protocol, data, hops: p.hop_limit() };
        if protocol == ICMP6 && neighbours::ndp(&mut self.common, &path, packet.hops, data) {
            return;
        }
        if protocol == UDP && self.dhcp6(&packet, checked) {
            return;
        }
        let c = &self.common.config;
        if !c.contains6(src) || src == c.gateway6() || src == c.dns6() || c.host_alias == Some(src.into()) {
            return;
        }
        self.common.guest6 = Some(src);
        self.packet(header, &packet, checked);
    }

    fn dhcp6(&mut self, packet: &Packet<'_>, checked: bool) -> bool {
        let Ok(udp) = UdpPacket::new_checked(packet.data) else { return false };
        if udp.dst_port() != 547 {
            return false;
        }
        // Clients speak to all servers unless a server asks them not to, and ours does not (RFC 8415 section 16).
        if !packet.path.dst.is_multicast()
            || (!checked && !udp.verify_checksum(&packet.path.src.into(), &packet.path.dst.into()))
        {
            return true;
        }
        let c = &mut self.common;
        if let Some(m) = dhcp6::answer(&c.config, udp.payload(), &c.mac) {
            let from = SocketAddr::new(neighbours::link_local(&c.mac).into(), 547);
            // Clients listen at this port, whatever they send from (RFC 8415 section 7.2).
            c.push_udp(from, SocketAddr::new(packet.path.src, 546), &m);
        }
        true
    }

    fn packet(&mut self, header: &VnetHeader, packet: &Packet<'_>, checked: bool) {
        let (path, data) = (&packet.path, packet.data);
        let ends = (path.src.into(), path.dst.into());
        // It goes no further than to the router, which is where it has to be (RFC 1812 section 5.3.1).
        if packet.hops <= 1 && may_leave(path.dst) && !self.common.is_own(path.dst) {
            return icmp::report(&mut self.common, path, packet.protocol, data, Trouble::Expired, None);
        }
        match packet.protocol {
            TCP => {
                if let Ok(p) = TcpPacket::new_checked(data)
                    && (checked || p.verify_checksum(&ends.0, &ends.1))
                {
                    self.tcp.segment(&mut self.common, path, &p);
                }
            }
            UDP => {
                if let Ok(p) = UdpPacket::new_checked(data)
                    && (checked || p.verify_checksum(&ends.0, &ends.1))
                {
                    let from = SocketAddr::new(path.src, p.src_port());
                    let to = SocketAddr::new(path.dst, p.dst_port());
                    let c = &mut self.common;
                    if to.ip() == c.gateway(to.ip()) && self.tftp.datagram(c, from, to, p.payload()) {
                        return;
                    }
                    match header.gso {
                        // Several datagrams in one.
                        Some((crate::GsoKind::Udp, size)) => {
                            let all = data.get(8..).unwrap_or_default();
                            for piece in all.chunks(size.into()) {
                                self.datagrams.udp(&mut self.common, from, to, packet.hops, piece);
                            }
                        }
                        _ => self.datagrams.udp(&mut self.common, from, to, packet.hops, p.payload()),
                    }
                }
            }
            ICMP | ICMP6 if path.src.is_ipv4() == (packet.protocol == ICMP) => {
                let whole = || match path.src.is_ipv4() {
                    true => wire::checksum(data) == 0,
                    false => neighbours::is_whole(path, data),
                };
                if header.checksum.is_none() && !whole() {
                    return;
                }
                if let Some((pair, mtu)) = icmp::too_big(path, data) {
                    self.tcp.path_mtu(&mut self.common, pair, mtu);
                } else {
                    self.datagrams.echo(&mut self.common, path, packet.hops, data);
                }
            }
            _ => {}
        }
    }

    /// An event of a descriptor.
    pub fn ready(&mut self, id: u64, set: EventSet) {
        let broken = set.intersects(EventSet::ERROR | EventSet::HANG_UP);
        let readable = broken || set.intersects(EventSet::IN | EventSet::READ_HANG_UP);
        let writable = broken || set.contains(EventSet::OUT);
        if let Some((_, Listener::Tcp(l, to))) = self.listeners.iter().find(|l| l.0 == id) {
            self.tcp.accept(&mut self.common, l, *to);
        } else if !self.datagrams.ready(&mut self.common, id, set.contains(EventSet::ERROR)) {
            if set.contains(EventSet::PRIORITY) {
                self.tcp.urgent(id);
            }
            self.tcp.ready(&mut self.common, id, readable, writable);
        }
    }

    /// Serve what is due.
    pub fn tick(&mut self, now: Instant) {
        // A listener whose connections could not be taken (no descriptors left) reports them only once.
        for (_, l) in &self.listeners {
            if let Listener::Tcp(l, to) = l {
                self.tcp.accept(&mut self.common, l, *to);
            }
        }
        self.common.troubles = icmp::MOST;
        if now.saturating_duration_since(self.advertised) >= neighbours::INTERVAL {
            self.advertised = now;
            neighbours::advertise_to_all(&mut self.common);
        }
        self.tcp.sweep(now);
        self.datagrams.tick(&mut self.common, now);
        self.tftp.tick(&mut self.common, now);
        self.fragments.tick(now);
    }
}
