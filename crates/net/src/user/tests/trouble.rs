//! What the router tells the guest of packets that do not arrive, and what does not arrive in one piece.

use super::raw::{GUEST, Hand, ROUTER, path};
use super::*;
use crate::testing::new_namespace;
use crate::user::icmp::MOST;
use smoltcp::wire::{EthernetFrame, Ipv4Packet, Ipv6Packet};
use std::net::UdpSocket;

const FAR: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 9);
const GUEST6: Ipv6Addr = Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, 0x15);
const ROUTER6: Ipv6Addr = Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, 2);

impl Hand {
    fn put(&self, frame: &[u8]) {
        assert_eq!(self.net.send(0, &VnetHeader::default(), frame), Sent::Done);
        self.net.flush(0);
    }

    fn udp(&self, to: SocketAddr, data: &[u8], hops: u8) {
        let src: IpAddr = if to.is_ipv4() { GUEST.into() } else { GUEST6.into() };
        let mut f = Vec::new();
        wire::udp(&mut f, &path(src, to.ip()), (777, to.port()), data, false);
        self.put(&with_hops(f, hops));
    }

    /// The next IP packet for the guest that `wanted` takes: protocol, source, and what is behind the headers.
    fn packet<R>(&self, wanted: impl Fn(u8, IpAddr, &[u8]) -> Option<R>) -> R {
        let mut f = Vec::new();
        let end = Instant::now() + PATIENCE;
        loop {
            if self.net.receive(0, &mut f).is_none() {
                assert!(Instant::now() < end, "no packet came");
                let _ = self.bell.recv_timeout(Duration::from_millis(20));
                continue;
            }
            let eth = EthernetFrame::new_checked(&f[..]).expect("a frame");
            let found = match u16::from(eth.ethertype()) {
                0x0800 => {
                    let p = Ipv4Packet::new_checked(eth.payload()).expect("a packet");
                    assert!(p.verify_checksum());
                    wanted(p.next_header().into(), p.src_addr().into(), p.payload())
                }
                0x86dd => {
                    let p = Ipv6Packet::new_checked(eth.payload()).expect("a packet");
                    wanted(p.next_header().into(), p.src_addr().into(), p.payload())
                }
                _ => None,
            };
            if let Some(r) = found {
                return r;
            }
        }
    }

    /// The next ICMP message but echoes: type, code, second word, who says it, and what it is about.
    fn trouble(&self) -> (u8, u8, u32, IpAddr, Vec<u8>) {
        self.packet(|protocol, src, m| {
            let error = (protocol == wire::ICMP && m[0] != 0) || (protocol == wire::ICMP6 && m[0] < 128);
            error.then(|| (m[0], m[1], u32::from_be_bytes(m[4..8].try_into().unwrap()), src, m[8..].to_vec()))
        })
    }
}

fn with_hops(mut frame: Vec<u8>, hops: u8) -> Vec<u8> {
    if frame[12..14] == [0x86, 0xdd] {
        frame[21] = hops;
    } else {
        frame[22] = hops;
        frame[24..26].fill(0);
        let sum = wire::checksum(&frame[14..34]).to_be_bytes();
        frame[24..26].copy_from_slice(&sum);
    }
    frame
}

#[test]
fn a_closed_port_of_udp_is_told() {
    for open in [true, false] {
        // With the host's loopback it is the host that says so, otherwise the router.
        let hand = Hand::new(UserConfig { host_loopback: open, ..UserConfig::default() });
        for (host, router) in [("127.0.0.1:0", IpAddr::from(ROUTER)), ("[::1]:0", ROUTER6.into())] {
            let Ok(socket) = UdpSocket::bind(host) else {
                eprintln!("skipped: {host} is no address here");
                continue;
            };
            let port = socket.local_addr().unwrap().port();
            drop(socket);
            for _ in 0..3 {
                hand.udp(SocketAddr::new(router, port), b"hello", 64);
                let (kind, code, _, src, about) = hand.trouble();
                let v4 = router.is_ipv4();
                assert_eq!((kind, code, src), if v4 { (3, 3, router) } else { (1, 4, router) });
                let at = if v4 { 20 } else { 40 };
                assert_eq!(about[at..at + 4], [777u16.to_be_bytes(), port.to_be_bytes()].concat());
                assert_eq!(&about[at + 8..], b"hello");
            }
        }
    }
}

#[test]
fn what_has_no_way_is_told() {
    if !new_namespace() {
        return;
    }
    let hand = Hand::new(UserConfig::default());
    hand.udp(SocketAddr::new(FAR.into(), 99), b"hello", 64);
    let (kind, code, _, src, about) = hand.trouble();
    assert_eq!((kind, code, src, &about[12..20]), (3, 0, ROUTER.into(), &[10, 0, 2, 15, 192, 0, 2, 9][..]));
    // A connection, too: not refused, but out of reach.
    let mut f = Vec::new();
    let start = wire::ip(&mut f, &path(GUEST, FAR), wire::TCP, 20);
    f.extend([3, 9, 0, 99, 1, 2, 3, 4, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0]);
    wire::finish(&mut f, &path(GUEST, FAR), wire::TCP, start, 16, false);
    hand.put(&f);
    let (kind, code, _, _, about) = hand.trouble();
    assert_eq!((kind, code, &about[20..28]), (3, 0, &[3, 9, 0, 99, 1, 2, 3, 4][..]));
    assert!(lock(&hand.net.inner.stack).tcp.is_empty());
    // An echo.
    hand.put(&wire::icmp(&path(GUEST, FAR), &[8, 0, 0, 0, 7, 7, 0, 1, 1, 2, 3, 4]));
    let (kind, code, _, _, about) = hand.trouble();
    assert_eq!((kind, code, &about[24..28]), (3, 0, &[7, 7, 0, 1][..]));
    let far6 = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
    hand.udp(SocketAddr::new(far6.into(), 99), b"hello", 64);
    let (kind, code, _, src, about) = hand.trouble();
    assert_eq!((kind, code, src, &about[40..44]), (1, 0, ROUTER6.into(), &[3, 9, 0, 99][..]));
}

#[test]
fn packets_go_as_far_as_they_may() {
    if !new_namespace() {
        return;
    }
    let hand = Hand::new(UserConfig::default());
    let far6 = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
    for (to, router, numbers) in
        [(IpAddr::from(FAR), IpAddr::from(ROUTER), (11, 0)), (far6.into(), ROUTER6.into(), (3, 0))]
    {
        hand.udp(SocketAddr::new(to, 33434), b"probe", 1);
        let (kind, code, _, src, _) = hand.trouble();
        assert_eq!((kind, code, src), (numbers.0, numbers.1, router));
    }
    // Groups are told nothing, and the router itself is where one hop leads to.
    hand.udp("224.0.0.251:5353".parse().unwrap(), b"who", 1);
    hand.put(&with_hops(wire::icmp(&path(GUEST, ROUTER), &[8, 0, 0, 0, 1, 1, 0, 1]), 1));
    let kind = hand.packet(|p, _, m| (p == wire::ICMP).then_some(m[0]));
    assert_eq!(kind, 0, "an answer to the echo, and nothing before it");
}

#[test]
fn messages_about_troubles_are_limited() {
    let hand = Hand::new(UserConfig::default());
    for _ in 0..3 * MOST {
        hand.udp(SocketAddr::new(ROUTER.into(), 9), b"", 64);
    }
    let mut f = Vec::new();
    let count = std::iter::from_fn(|| hand.net.receive(0, &mut f)).count();
    // A sweep or two may have come in between.
    assert!((MOST as usize..3 * MOST as usize).contains(&count), "{count}");
    lock(&hand.net.inner.stack).tick(Instant::now());
    hand.udp(SocketAddr::new(ROUTER.into(), 9), b"", 64);
    assert_eq!(hand.trouble().0, 3);
}

#[test]
fn long_echoes_come_back_in_fragments() {
    let hand = Hand::new(UserConfig::default());
    let message = [&[8, 0, 0, 0, 7, 7, 0, 1][..], &pattern(4000)].concat();
    let way = path(GUEST, ROUTER);
    let whole = wire::icmp(&way, &message);
    for part in wire::fragments(&way, wire::ICMP, &whole[34..], 1500, 5) {
        hand.put(&part);
    }
    let mut got = Vec::new();
    while got.len() < message.len() {
        got.extend(hand.packet(|p, _, m| (p == wire::ICMP).then(|| m.to_vec())));
    }
    assert_eq!((got[0], wire::checksum(&got)), (0, 0));
    assert!(got[4..] == message[4..]);
    // The same in IPv6, with destination options behind the fragment header, each piece twice.
    let way = path(GUEST6, ROUTER6);
    let whole = wire::icmp(&way, &[&[128, 0, 0, 0, 7, 7, 0, 2][..], &pattern(4000)].concat());
    let inner = [&[wire::ICMP6, 0, 1, 4, 0, 0, 0, 0], &whole[54..]].concat();
    for part in wire::fragments(&way, 60, &inner, 1500, 6) {
        hand.put(&part);
        hand.put(&part);
    }
    let (mut got, mut parts) = (Vec::new(), 0);
    while got.len() < 4008 {
        // Fragment headers are 8 bytes.
        got.extend(hand.packet(|p, _, m| (p == 44).then(|| m[8..].to_vec())));
        parts += 1;
    }
    assert_eq!((parts, got[0], got.len()), (3, 129, 4008));
    assert!(got[8..] == pattern(4000));
}

#[test]
fn the_router_says_again_what_holds_for_a_while() {
    let hand = Hand::new(UserConfig::default());
    let advertised = |hand: &Hand| {
        let mut f = Vec::new();
        std::iter::from_fn(|| hand.net.receive(0, &mut f).map(|_| f.clone())).filter(|f| f[54] == 134).count()
    };
    let tick = |after: Duration| lock(&hand.net.inner.stack).tick(Instant::now() + after);
    tick(neighbours::INTERVAL / 2);
    assert_eq!(advertised(&hand), 0);
    tick(neighbours::INTERVAL);
    tick(neighbours::INTERVAL + neighbours::INTERVAL / 2);
    tick(2 * neighbours::INTERVAL);
    assert_eq!(advertised(&hand), 2);
}

#[test]
fn solicitations_that_break_a_rule_get_no_answer() {
    let hand = Hand::new(UserConfig::default());
    let ask = |src: Ipv6Addr, dst: Ipv6Addr, target: Ipv6Addr, options: &[u8]| {
        let m = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &target.octets(), options].concat();
        hand.put(&wire::icmp(&path(src, dst), &m));
        let mut f = Vec::new();
        hand.net.receive(0, &mut f).is_some()
    };
    let own = [&[1, 1][..], &MAC].concat();
    let group: Ipv6Addr = "ff02::1:ff00:2".parse().unwrap();
    let nobody = Ipv6Addr::UNSPECIFIED;
    assert!(ask(GUEST6, group, ROUTER6, &own) && ask(GUEST6, ROUTER6, ROUTER6, &[]));
    assert!(ask(nobody, group, ROUTER6, &[]));
    // To somebody from nobody; with an address of nobody's; an option without an end, or of no length; a group.
    assert!(!ask(nobody, ROUTER6, ROUTER6, &[]) && !ask(nobody, group, ROUTER6, &own));
    assert!(
        !ask(GUEST6, group, ROUTER6, &own[..7]) && !ask(GUEST6, group, ROUTER6, &[1, 0, 0, 0, 0, 0, 0, 0])
    );
    assert!(!ask(GUEST6, group, "ff02::2".parse().unwrap(), &[]));
}

#[test]
fn messages_with_a_wrong_checksum_are_not_heard() {
    let hand = Hand::new(UserConfig::default());
    for (src, dst, kind) in
        [(IpAddr::from(GUEST), IpAddr::from(ROUTER), 8), (GUEST6.into(), ROUTER6.into(), 128)]
    {
        let mut f = wire::icmp(&path(src, dst), &[kind, 0, 0, 0, 7, 7, 0, 1, 1, 2, 3, 4]);
        let mut answer = Vec::new();
        *f.last_mut().expect("bytes") ^= 1;
        hand.put(&f);
        assert!(hand.net.receive(0, &mut answer).is_none());
        *f.last_mut().expect("bytes") ^= 1;
        hand.put(&f);
        assert!(hand.net.receive(0, &mut answer).is_some());
    }
    let discover = crate::dhcp::testing::request(1, 7, &[61, 3, 1, 2, 3]);
    let way = path(Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST);
    let mut f = Vec::new();
    wire::udp(&mut f, &way, (68, 67), &discover, false);
    f[40] ^= 1;
    hand.put(&f);
    f[40] ^= 1;
    hand.put(&f);
    // One answer, to the address that it gives, with the client's own name for itself.
    let mut answer = Vec::new();
    assert!(hand.net.receive(0, &mut answer).is_some());
    assert_eq!((&answer[..6], &answer[30..34]), (&MAC[..], &GUEST.octets()[..]));
    assert!(answer.windows(5).any(|w| w == [61, 3, 1, 2, 3]));
    assert!(hand.net.receive(0, &mut answer).is_none());
    // A client that hears only what is sent to all says so.
    let mut deaf = discover;
    deaf[10] = 0x80;
    wire::udp(&mut f, &way, (68, 67), &deaf, false);
    hand.put(&f);
    assert!(hand.net.receive(0, &mut answer).is_some());
    assert_eq!((&answer[..6], &answer[30..34]), (&[0xff; 6][..], &[0xff; 4][..]));
}
