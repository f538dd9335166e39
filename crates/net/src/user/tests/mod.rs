//! A guest with a TCP/IP implementation of its own (smoltcp's) behind the NAT.

mod raw;
mod services;
mod trouble;

use super::*;
use crate::resolver::Resolver;
use crate::wire;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::{dhcpv4, icmp, tcp, udp};
use smoltcp::time::Instant as Clock;
use smoltcp::wire::{
    EthernetAddress, HardwareAddress, Icmpv4Packet, Icmpv4Repr, IpAddress, IpCidr, IpEndpoint, Ipv4Address,
};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};

const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
/// Only a hang runs into it.
const PATIENCE: Duration = Duration::from_secs(60);

struct Bell(Mutex<Sender<()>>);

impl NetEvents for Bell {
    fn readable(&self, _: u16) {
        let _ = lock(&self.0).send(());
    }
    fn writable(&self, _: u16) {}
    fn link(&self, _: bool) {}
}

/// The guest's network card.
struct Card {
    net: UserNet,
    /// Frames that the guest loses: every so many, if not 0.
    lose: usize,
    count: usize,
}

struct Rx(Vec<u8>);
struct Tx<'a>(&'a UserNet);

impl RxToken for Rx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}
impl TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let r = f(&mut frame);
        assert_eq!(self.0.send(0, &VnetHeader::default(), &frame), Sent::Done);
        r
    }
}

impl Device for Card {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx<'a>;
    fn receive(&mut self, _: Clock) -> Option<(Rx, Tx<'_>)> {
        loop {
            let mut frame = Vec::new();
            self.net.receive(0, &mut frame)?;
            self.count += 1;
            if self.lose == 0 || !self.count.is_multiple_of(self.lose) {
                return Some((Rx(frame), Tx(&self.net)));
            }
        }
    }
    fn transmit(&mut self, _: Clock) -> Option<Tx<'_>> {
        Some(Tx(&self.net))
    }
    fn capabilities(&self) -> DeviceCapabilities {
        let mut c = DeviceCapabilities::default();
        c.medium = Medium::Ethernet;
        c.max_transmission_unit = 1514;
        let mut sums = ChecksumCapabilities::default();
        sums.ipv4 = Checksum::Both;
        c.checksum = sums;
        c
    }
}

struct Guest {
    card: Card,
    iface: Interface,
    sockets: SocketSet<'static>,
    bell: Receiver<()>,
    port: u16,
}

impl Guest {
    fn new(config: UserConfig) -> Guest {
        let net = UserNet::new(config, None).expect("network");
        let (ring, bell) = channel();
        net.attach(Arc::new(Bell(Mutex::new(ring))));
        let mut card = Card { net, lose: 0, count: 0 };
        let hardware = HardwareAddress::Ethernet(EthernetAddress(MAC));
        let mut iface = Interface::new(Config::new(hardware), &mut card, Clock::now());
        iface.update_ip_addrs(|a| {
            a.push(IpCidr::new(IpAddress::v4(10, 0, 2, 15), 24)).expect("room");
            a.push(IpCidr::new(IpAddress::v6(0xfec0, 0, 0, 0, 0, 0, 0, 0x15), 64)).expect("room");
        });
        iface.routes_mut().add_default_ipv4_route(Ipv4Address::new(10, 0, 2, 2)).expect("room");
        Guest { card, iface, sockets: SocketSet::new(vec![]), bell, port: 40_000 }
    }

    fn inner(&self) -> &Inner {
        &self.card.net.inner
    }

    fn poll(&mut self) {
        self.iface.poll(Clock::now(), &mut self.card, &mut self.sockets);
        self.card.net.flush(0);
    }

    /// Run the guest until `done` gives something.
    fn run<R>(&mut self, mut done: impl FnMut(&mut Guest) -> Option<R>) -> R {
        let end = Instant::now() + PATIENCE;
        loop {
            self.poll();
            if let Some(r) = done(self) {
                return r;
            }
            assert!(Instant::now() < end, "the guest waits in vain");
            // Frames that came meanwhile ring; the guest has timers, too.
            let _ = self.bell.recv_timeout(Duration::from_millis(5));
        }
    }

    fn connect(&mut self, to: (IpAddress, u16)) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 128 << 10]);
        let mut s = tcp::Socket::new(buffer(), buffer());
        self.port += 1;
        s.connect(self.iface.context(), to, self.port).expect("connect");
        self.sockets.add(s)
    }

    fn tcp(&mut self, h: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(h)
    }

    /// Wait for the end of connecting; true if it went well.
    fn connected(&mut self, h: SocketHandle) -> bool {
        self.run(|g| match g.tcp(h).state() {
            tcp::State::Established | tcp::State::CloseWait => Some(true),
            tcp::State::Closed => Some(false),
            _ => None,
        })
    }
}

fn open() -> UserConfig {
    UserConfig { host_loopback: true, ..UserConfig::default() }
}

const GATEWAY: IpAddress = IpAddress::v4(10, 0, 2, 2);

/// Bytes that depend on their place.
fn pattern(len: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(5);
    (0..len).map(|_| random.u8(..)).collect()
}

/// A server on the host that gives back what it gets, after all of it came.
fn echo_after_end() -> SocketAddr {
    // The standard library's queue of 128 overflows when a thousand come at once; the kernel resets what it then has no state of.
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    socket.bind(&"127.0.0.1:0".parse::<SocketAddr>().expect("an address").into()).expect("bind");
    socket.listen(4096).expect("listen");
    let listener = TcpListener::from(socket);
    let at = listener.local_addr().expect("address");
    std::thread::spawn(move || {
        while let Ok((mut s, _)) = listener.accept() {
            std::thread::spawn(move || {
                let mut all = Vec::new();
                if s.read_to_end(&mut all).is_ok() {
                    let _ = s.write_all(&all);
                }
            });
        }
    });
    at
}

/// Send all, half-close, and read to the end.
fn exchange(g: &mut Guest, h: SocketHandle, data: &[u8]) -> Vec<u8> {
    let (mut sent, mut got) = (0, Vec::new());
    g.run(|g| {
        let s = g.tcp(h);
        if sent < data.len() {
            if s.can_send() {
                sent += s.send_slice(&data[sent..]).expect("send");
            }
            if sent == data.len() {
                s.close();
            }
        }
        while s.can_recv() {
            s.recv(|b| {
                got.extend_from_slice(b);
                (b.len(), ())
            })
            .expect("receive");
        }
        (sent == data.len() && !s.may_recv()).then_some(())
    });
    got
}

#[test]
fn a_large_transfer_goes_both_ways_past_a_half_closed_end() {
    let server = echo_after_end();
    let mut g = Guest::new(open());
    let data = pattern(6 << 20);
    let h = g.connect((GATEWAY, server.port()));
    assert!(g.connected(h));
    assert!(exchange(&mut g, h, &data) == data);
    // Both sides closed: nothing is kept.
    g.run(|g| lock(&g.inner().stack).tcp.is_empty().then_some(()));
}

#[test]
fn what_the_guest_loses_is_sent_again() {
    let server = echo_after_end();
    let mut g = Guest::new(open());
    let data = pattern(300_000);
    g.card.lose = 23;
    let h = g.connect((GATEWAY, server.port()));
    assert!(g.connected(h));
    assert!(exchange(&mut g, h, &data) == data);
}

#[test]
fn ipv6_connections_work_the_same() {
    let Ok(listener) = TcpListener::bind("[::1]:0") else {
        eprintln!("skipped: this host has no IPv6 loopback");
        return;
    };
    let port = listener.local_addr().expect("address").port();
    let t = std::thread::spawn(move || {
        let (mut s, _) = listener.accept().expect("accept");
        let mut all = Vec::new();
        s.read_to_end(&mut all).expect("read");
        s.write_all(&all).expect("write");
    });
    let mut g = Guest::new(open());
    let h = g.connect((IpAddress::v6(0xfec0, 0, 0, 0, 0, 0, 0, 2), port));
    assert!(g.connected(h));
    let data = pattern(100_000);
    assert!(exchange(&mut g, h, &data) == data);
    t.join().expect("server");
}

#[test]
fn an_alias_leads_to_the_hosts_loopback() {
    let server = echo_after_end();
    let alias = IpAddress::v4(10, 0, 2, 100);
    let mut g = Guest::new(UserConfig {
        host_alias: Some(Ipv4Addr::new(10, 0, 2, 100).into()),
        ..UserConfig::default()
    });
    let h = g.connect((alias, server.port()));
    assert!(g.connected(h), "the alias was found and leads to the server");
    let h = g.connect((GATEWAY, server.port()));
    assert!(!g.connected(h), "and the gateway is as closed as before");
}

#[test]
fn the_hosts_loopback_is_closed_unless_opened() {
    let server = echo_after_end();
    let mut g = Guest::new(UserConfig::default());
    let h = g.connect((GATEWAY, server.port()));
    assert!(!g.connected(h), "the gateway's address leads to the host's loopback");
    let mut c = lock(&g.inner().stack);
    for text in [
        "127.0.0.1:1",
        "127.8.8.8:1",
        "0.0.0.0:1",
        "0.1.2.3:1",
        "224.0.0.1:1",
        "255.255.255.255:1",
        "240.0.0.1:1",
        "10.0.2.99:1",
        "10.0.2.255:1",
        "[::1]:1",
        "[::]:1",
        "[::ffff:127.0.0.1]:1",
        "[::127.0.0.1]:1",
        "[ff02::1]:1",
        "[::ffff:0:127.0.0.1]:1",
        "[fe80::1]:1",
        "[fec0::77]:1",
        "[64:ff9b::127.0.0.1]:1",
        "[2002:7f00:1::1]:1",
    ] {
        assert_eq!(c.common.target(text.parse().unwrap()), stack::Target::Nowhere, "{text}");
    }
    for text in ["10.0.2.2:80", "10.0.2.3:80", "[fec0::2]:1", "[fec0::3]:80"] {
        assert_eq!(c.common.target(text.parse().unwrap()), stack::Target::Refused, "{text}");
    }
    for text in ["1.2.3.4:5", "192.168.0.1:1", "[2001:db8::1]:9", "[64:ff9b::8.8.8.8]:1"] {
        let a = text.parse().unwrap();
        assert_eq!(c.common.target(a), stack::Target::Host(a));
    }
}

#[test]
fn a_closed_port_refuses() {
    let free = TcpListener::bind("127.0.0.1:0").expect("listen").local_addr().expect("address").port();
    let mut g = Guest::new(open());
    let h = g.connect((GATEWAY, free));
    assert!(!g.connected(h));
    assert!(lock(&g.inner().stack).tcp.is_empty());
}

#[test]
fn restricted_guests_reach_nothing() {
    let mut g = Guest::new(UserConfig { restrict: true, ..open() });
    let server = echo_after_end();
    let h = g.connect((GATEWAY, server.port()));
    assert!(!g.connected(h));
    let mut s = lock(&g.inner().stack);
    assert_eq!(s.common.target("1.2.3.4:5".parse().unwrap()), stack::Target::Nowhere);
    assert_eq!(s.common.target("10.0.2.3:53".parse().unwrap()), stack::Target::Refused);
}

#[test]
fn a_reset_by_the_host_reaches_the_guest_and_back() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let mut g = Guest::new(open());
    let to = (GATEWAY, listener.local_addr().expect("address").port());
    let h = g.connect(to);
    assert!(g.connected(h));
    let (s, _) = listener.accept().expect("accept");
    socket2::SockRef::from(&s).set_linger(Some(Duration::ZERO)).expect("linger");
    drop(s);
    g.run(|g| (g.tcp(h).state() == tcp::State::Closed).then_some(()));
    let h = g.connect(to);
    assert!(g.connected(h));
    let (mut s, _) = listener.accept().expect("accept");
    g.tcp(h).abort();
    g.poll();
    assert_eq!(s.read(&mut [0]).map_err(|e| e.kind()), Err(io::ErrorKind::ConnectionReset));
}

#[test]
fn forwarded_ports_lead_into_the_guest() {
    let forward = |udp| Forward {
        udp,
        host: "127.0.0.1:0".parse().unwrap(),
        guest: SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 22),
    };
    let config = UserConfig { forwards: vec![forward(false), forward(true)], ..UserConfig::default() };
    let mut g = Guest::new(config);
    let [by_tcp, by_udp] = g.card.net.forwards().try_into().expect("two");
    let buffer = || tcp::SocketBuffer::new(vec![0; 65536]);
    let mut s = tcp::Socket::new(buffer(), buffer());
    s.listen(22).expect("listen");
    let h = g.sockets.add(s);
    // The guest must have spoken once for its address to be known; its first ARP request does.
    let ping = g.connect((GATEWAY, 9));
    g.connected(ping);
    let client = std::thread::spawn(move || {
        let mut s = TcpStream::connect(by_tcp).expect("connect");
        s.write_all(&pattern(200_000)).expect("write");
        s.shutdown(Shutdown::Write).expect("shutdown");
        let mut all = Vec::new();
        s.read_to_end(&mut all).expect("read");
        all
    });
    g.run(|g| g.tcp(h).is_active().then_some(()));
    let got = {
        let mut got = Vec::new();
        g.run(|g| {
            let s = g.tcp(h);
            while s.can_recv() {
                s.recv(|b| (b.len(), got.extend_from_slice(b))).expect("receive");
            }
            (got.len() >= 200_000 && !s.may_recv()).then_some(())
        });
        got
    };
    assert!(got == pattern(200_000));
    assert_eq!(g.tcp(h).remote_endpoint().expect("peer").addr, GATEWAY);
    g.tcp(h).send_slice(b"done").expect("send");
    g.tcp(h).close();
    g.run(|g| (!g.tcp(h).is_open()).then_some(()).or(client.is_finished().then_some(())));
    assert_eq!(client.join().expect("client"), b"done");

    let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 8], vec![0; 8192]);
    let mut s = udp::Socket::new(buffer(), buffer());
    s.bind(22).expect("bind");
    let h = g.sockets.add(s);
    let client = UdpSocket::bind("127.0.0.1:0").expect("socket");
    client.send_to(b"question", by_udp).expect("send");
    g.run(|g| {
        let s = g.sockets.get_mut::<udp::Socket<'_>>(h);
        let (data, from) = s.recv().ok()?;
        assert_eq!((data, from.endpoint.addr), (&b"question"[..], GATEWAY));
        s.send_slice(b"answer", from.endpoint).expect("send");
        Some(())
    });
    g.poll();
    client.set_read_timeout(Some(PATIENCE)).expect("timeout");
    let mut b = [0; 64];
    let (n, from) = client.recv_from(&mut b).expect("an answer");
    assert_eq!((&b[..n], from), (&b"answer"[..], by_udp));
}

#[test]
fn a_port_that_is_taken_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("listen");
    let host = taken.local_addr().expect("address");
    let forwards = vec![Forward { udp: false, host, guest: "0.0.0.0:22".parse().unwrap() }];
    let e = UserNet::new(UserConfig { forwards, ..UserConfig::default() }, None)
        .err()
        .expect("an error")
        .to_string();
    assert!(e.contains(&host.to_string()) && e.contains("another port"), "{e}");
}

#[test]
fn dhcp_gives_address_router_and_name_server() {
    let mut g = Guest::new(UserConfig { hostname: Some("box".into()), ..UserConfig::default() });
    g.iface.update_ip_addrs(|a| a.clear());
    let h = g.sockets.add(dhcpv4::Socket::new());
    let (address, router, dns) = g.run(|g| match g.sockets.get_mut::<dhcpv4::Socket<'_>>(h).poll() {
        Some(dhcpv4::Event::Configured(c)) => Some((c.address, c.router, c.dns_servers.clone())),
        _ => None,
    });
    assert_eq!(address.to_string(), "10.0.2.15/24");
    assert_eq!(router, Some(Ipv4Addr::new(10, 0, 2, 2)));
    assert_eq!(dns[..], [Ipv4Addr::new(10, 0, 2, 3)]);
}

#[test]
fn names_are_looked_up_at_the_hosts_server() {
    let server = UdpSocket::bind("127.0.0.1:0").expect("socket");
    let at = server.local_addr().expect("address");
    std::thread::spawn(move || {
        let mut b = [0; 4096];
        while let Ok((n, peer)) = server.recv_from(&mut b) {
            b[..n].reverse();
            let _ = server.send_to(&b[..n], peer);
        }
    });
    let mut g = Guest::new(UserConfig::default());
    lock(&g.inner().stack).common.resolver = Resolver::new(&[at]);
    let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 512], vec![0; 65536]);
    let mut s = udp::Socket::new(buffer(), buffer());
    s.bind(5353).expect("bind");
    let h = g.sockets.add(s);
    let dns = IpEndpoint::new(IpAddress::v4(10, 0, 2, 3), 53);
    for n in 0..200u16 {
        g.sockets.get_mut::<udp::Socket<'_>>(h).send_slice(&[1, (n >> 8) as u8, n as u8], dns).expect("send");
        let answer = g.run(|g| {
            let (data, from) = g.sockets.get_mut::<udp::Socket<'_>>(h).recv().ok()?;
            assert_eq!(from.endpoint, dns);
            Some(data.to_vec())
        });
        assert_eq!(answer, [n as u8, (n >> 8) as u8, 1]);
    }
}

#[test]
fn the_gateway_answers_pings() {
    let mut g = Guest::new(UserConfig::default());
    let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 4], vec![0; 4096]);
    let mut s = icmp::Socket::new(buffer(), buffer());
    s.bind(icmp::Endpoint::Ident(77)).expect("bind");
    let ping = Icmpv4Repr::EchoRequest { ident: 77, seq_no: 3, data: b"hello" };
    let raw = s.send(ping.buffer_len(), GATEWAY).expect("send");
    ping.emit(&mut Icmpv4Packet::new_unchecked(raw), &ChecksumCapabilities::default());
    let h = g.sockets.add(s);
    g.run(|g| {
        let (data, from) = g.sockets.get_mut::<icmp::Socket<'_>>(h).recv().ok()?;
        let p = Icmpv4Packet::new_checked(data).expect("a message");
        assert_eq!((from, p.echo_ident(), p.echo_seq_no(), p.data()), (GATEWAY, 77, 3, &b"hello"[..]));
        Some(())
    });
}

#[test]
fn a_thousand_connections_at_once() {
    let server = echo_after_end();
    let mut g = Guest::new(open());
    // smoltcp looks at each socket for each packet; small buffers keep that quick.
    let handles: Vec<_> = (0..1000)
        .map(|_| {
            let buffer = || tcp::SocketBuffer::new(vec![0; 256]);
            let mut s = tcp::Socket::new(buffer(), buffer());
            g.port += 1;
            s.connect(g.iface.context(), (GATEWAY, server.port()), g.port).expect("connect");
            g.sockets.add(s)
        })
        .collect();
    g.run(|g| handles.iter().all(|&h| g.tcp(h).may_send()).then_some(()));
    assert_eq!(lock(&g.inner().stack).tcp.len(), 1000);
    for (n, &h) in handles.iter().enumerate() {
        g.tcp(h).send_slice(&(n as u32).to_le_bytes()).expect("send");
        g.tcp(h).close();
    }
    let mut got = vec![Vec::new(); handles.len()];
    g.run(|g| {
        for (h, got) in handles.iter().zip(&mut got) {
            let s = g.tcp(*h);
            while s.can_recv() {
                s.recv(|b| (b.len(), got.extend_from_slice(b))).expect("receive");
            }
        }
        got.iter().all(|g| g.len() == 4).then_some(())
    });
    for (n, got) in got.iter().enumerate() {
        assert_eq!(*got, (n as u32).to_le_bytes());
    }
}

#[test]
fn long_datagrams_come_and_go_in_fragments() {
    let mut g = Guest::new(open());
    let server = UdpSocket::bind("127.0.0.1:0").expect("socket");
    let to = SocketAddr::new(Ipv4Addr::new(10, 0, 2, 2).into(), server.local_addr().expect("address").port());
    let from: SocketAddr = "10.0.2.15:4000".parse().unwrap();
    let data = pattern(20_000);
    let path = wire::Path { from: MAC, to: stack::GATEWAY_MAC, src: from.ip(), dst: to.ip() };
    let mut whole = Vec::new();
    wire::udp(&mut whole, &path, (from.port(), to.port()), &data, false);
    let frames: Vec<Vec<u8>> = wire::fragments(&path, wire::UDP, &whole[wire::ETH + 20..], 1500, 7).collect();
    assert!(frames.len() > 13 && frames.iter().all(|f| f.len() <= 1514));
    // In any order.
    for f in frames.iter().rev() {
        g.card.net.send(0, &VnetHeader::default(), f);
    }
    server.set_read_timeout(Some(PATIENCE)).expect("timeout");
    let mut b = vec![0; 65_536];
    let (n, peer) = server.recv_from(&mut b).expect("the datagram");
    assert!(b[..n] == data);
    server.send_to(&data, peer).expect("send");
    let mut whole = fragments::Fragments::default();
    let end = Instant::now() + PATIENCE;
    loop {
        assert!(Instant::now() < end, "no answer");
        let mut f = Vec::new();
        if g.card.net.receive(0, &mut f).is_none() {
            let _ = g.bell.recv_timeout(Duration::from_millis(100));
            continue;
        }
        let p = smoltcp::wire::Ipv4Packet::new_checked(&f[14..]).expect("a packet");
        assert!(p.verify_checksum() && f.len() <= 1514);
        let key = (IpAddr::V4(p.src_addr()), IpAddr::V4(p.dst_addr()), p.ident().into(), 17);
        if let Some(d) = whole.add(key, p.frag_offset().into(), p.more_frags(), p.payload()) {
            let u = smoltcp::wire::UdpPacket::new_checked(&d[..]).expect("a datagram");
            assert!(u.verify_checksum(&p.src_addr().into(), &p.dst_addr().into()));
            assert!(u.payload() == data && u.dst_port() == 4000);
            break;
        }
    }
    let _ = &mut g;
}

#[test]
fn fragments_that_overlap_or_never_end_are_given_up() {
    let key = |n| (IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V4(Ipv4Addr::LOCALHOST), n, 17);
    let mut f = fragments::Fragments::default();
    assert_eq!(f.add(key(0), 0, true, &[0; 16]), None);
    assert_eq!(f.add(key(0), 8, true, &[0; 16]), None, "overlap");
    assert_eq!(f.add(key(0), 16, false, &[0; 4]), None, "the rest is void");
    assert_eq!(f.add(key(1), 65_528, false, &[0; 16]), None, "too long");
    assert_eq!(f.add(key(1), 0, true, &[0; 15]), None, "not in units");
    (0..1000).for_each(|n| assert_eq!(f.add(key(n + 10), 0, true, &[0; 8]), None));
    assert_eq!(f.add(key(1009), 8, false, &[1; 3]).map(|d| d.len()), Some(11));
    f.tick(Instant::now() + Duration::from_secs(11));
    assert_eq!(f.add(key(1008), 8, false, &[1; 3]), None);
}

#[test]
fn routers_and_neighbours_are_found() {
    let g = Guest::new(UserConfig { search: vec!["example.org".into()], ..UserConfig::default() });
    let own: Ipv6Addr = "fe80::5054:ff:fe12:3456".parse().unwrap();
    let ask = |to: &str, message: &[u8]| {
        let path = wire::Path {
            from: MAC,
            to: [0x33, 0x33, 0, 0, 0, 2],
            src: own.into(),
            dst: IpAddr::V6(to.parse().unwrap()),
        };
        g.card.net.send(0, &VnetHeader::default(), &wire::icmp(&path, message));
        let mut f = Vec::new();
        g.card.net.receive(0, &mut f).map(|_| f)
    };
    let ra = ask("ff02::2", &[133, 0, 0, 0, 0, 0, 0, 0]).expect("an advertisement");
    assert_eq!((&ra[..6], ra[54]), (&MAC[..], 134));
    for part in ["fec0::", "fec0::3"] {
        let octets = part.parse::<Ipv6Addr>().unwrap().octets();
        assert!(ra.windows(16).any(|w| w == octets), "{part}");
    }
    assert!(ra.windows(13).any(|w| w == b"\x07example\x03org\0"));
    let mut ns = vec![135, 0, 0, 0, 0, 0, 0, 0];
    ns.extend_from_slice(&"fec0::2".parse::<Ipv6Addr>().unwrap().octets());
    let na = ask("ff02::1:ff00:2", &ns).expect("an answer");
    assert_eq!((na[54], &na[na.len() - 6..]), (136, &stack::GATEWAY_MAC[..]));
    ns[23] = 9;
    assert!(ask("ff02::1:ff00:9", &ns).is_none(), "somebody else's address");
}

#[test]
fn noise_is_dropped() {
    let g = Guest::new(UserConfig { restrict: true, ..UserConfig::default() });
    let mut random = fastrand::Rng::with_seed(11);
    for n in 0..60_000 {
        let mut f: Vec<u8> = (0..random.usize(0..200)).map(|_| random.u8(..)).collect();
        if f.len() > 40 {
            f[..6].copy_from_slice(&stack::GATEWAY_MAC);
            f[6] &= 0xfe;
            match n % 4 {
                0 => f[12..14].copy_from_slice(&[8, 6]),
                1 | 2 => {
                    f[12..24].copy_from_slice(&[8, 0, 0x45, 0, 0, 0, 0, 0, 0, 0, 64, [1, 6, 17][n % 3]]);
                    let len = (f.len() - 14) as u16;
                    f[16..18].copy_from_slice(&len.to_be_bytes());
                    if n % 8 == 1 {
                        f[20] = 0x20;
                    }
                    f[24..30].copy_from_slice(&[0, 0, 10, 0, 2, 15]);
                    let c = wire::checksum(&f[14..34]);
                    f[24..26].copy_from_slice(&c.to_be_bytes());
                }
                _ => {
                    f[12..22].copy_from_slice(&[
                        0x86,
                        0xdd,
                        0x60,
                        0,
                        0,
                        0,
                        0,
                        0,
                        [0, 6, 17, 44, 58, 60][n % 6],
                        255,
                    ]);
                    let len = (f.len() - 54.min(f.len())) as u16;
                    f[18..20].copy_from_slice(&len.to_be_bytes());
                }
            }
        }
        // As if the driver had left the checksum to us: it does not protect what lies behind it.
        let header = VnetHeader { checksum: Some((34, 16)), ..VnetHeader::default() };
        g.card.net.send(0, &header, &f);
        let mut out = Vec::new();
        while g.card.net.receive(0, &mut out).is_some() {}
    }
}

#[test]
fn wrong_options_are_named() {
    let names = |c: UserConfig| c.problems().into_iter().map(|p| p.0).collect::<Vec<_>>();
    assert!(names(UserConfig::default()).is_empty());
    let d = UserConfig::default;
    assert!(names(d().with_network(Ipv4Addr::new(192, 168, 7, 0), 24)).is_empty());
    assert_eq!(names(d().with_network(Ipv4Addr::new(192, 168, 7, 0), 31)), ["net"]);
    assert_eq!(names(UserConfig { gateway: Ipv4Addr::new(10, 0, 3, 2), ..d() }), ["host"]);
    assert_eq!(names(UserConfig { guest: Ipv4Addr::new(10, 0, 2, 255), ..d() }), ["dhcpstart"]);
    assert_eq!(names(UserConfig { dns: Ipv4Addr::new(10, 0, 2, 2), ..d() }), ["host"]);
    assert_eq!(names(UserConfig { mtu: 1000, ..d() }), ["mtu"]);
    assert_eq!(names(UserConfig { lease: 9, ..d() }), ["lease"]);
    assert_eq!(names(UserConfig { hostname: Some("a b".into()), ..d() }), ["hostname"]);
    let forward = |guest: &str| Forward {
        udp: false,
        host: "127.0.0.1:2222".parse().unwrap(),
        guest: guest.parse().unwrap(),
    };
    let with = |f: Vec<Forward>| names(UserConfig { forwards: f, ..d() });
    assert_eq!(with(vec![forward("0.0.0.0:22"), forward("10.0.2.15:23")]), ["hostfwd"]);
    assert_eq!(with(vec![forward("10.0.2.15:0")]), ["hostfwd"]);
    assert_eq!(with(vec![forward("10.0.3.15:1")]), ["hostfwd"]);
    assert_eq!(with(vec![forward("10.0.2.2:1")]), ["hostfwd"]);
}

#[test]
fn a_capture_holds_all_frames() {
    let path = std::env::temp_dir().join(format!("ringfort-pcap-{}", std::process::id()));
    let mut g = Guest::new(UserConfig { dump: Some(path.clone()), ..UserConfig::default() });
    let h = g.connect((GATEWAY, 9));
    g.connected(h);
    let n = g.card.count;
    drop(g);
    let file = std::fs::read(&path).expect("the capture");
    std::fs::remove_file(&path).expect("remove");
    assert_eq!(&file[..4], &0xa1b2_c3d4u32.to_le_bytes());
    let (mut at, mut frames, mut to_guest) = (24, 0, 0);
    while at < file.len() {
        let len = u32::from_le_bytes(file[at + 8..at + 12].try_into().unwrap()) as usize;
        to_guest += usize::from(file[at + 16..at + 22] == MAC);
        (at, frames) = (at + 16 + len, frames + 1);
    }
    // ARP question and answer, SYN and RST.
    assert_eq!((at, to_guest), (file.len(), n));
    assert!(frames >= 4 && n >= 2, "{frames} frames");
}
