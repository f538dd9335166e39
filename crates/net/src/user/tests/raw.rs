//! A guest that speaks TCP by hand, to do what a well-behaved one does not.

use super::*;
use smoltcp::wire::{EthernetFrame, Ipv4Packet, TcpPacket};
use socket2::SockRef;

pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
pub const ROUTER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);

/// From the guest's card to the router's.
pub fn path(src: impl Into<IpAddr>, dst: impl Into<IpAddr>) -> wire::Path {
    wire::Path { from: MAC, to: stack::GATEWAY_MAC, src: src.into(), dst: dst.into() }
}

pub struct Hand {
    pub net: UserNet,
    pub bell: Receiver<()>,
}

/// What a segment says.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Segment {
    ports: (u16, u16),
    seq: u32,
    ack: u32,
    flags: u8,
    /// The byte that is urgent.
    urgent: Option<u8>,
    data: Vec<u8>,
}

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;
const URG: u8 = 32;

impl Hand {
    pub fn new(config: UserConfig) -> Hand {
        let net = UserNet::new(config, Some(MacAddr::new(MAC).expect("an address"))).expect("network");
        let (ring, bell) = channel();
        net.attach(Arc::new(Bell(Mutex::new(ring))));
        Hand { net, bell }
    }

    fn send(&self, ports: (u16, u16), seq: u32, ack: u32, flags: u8, data: &[u8]) {
        self.send_urgent(ports, seq, ack, flags, 0, data);
    }

    fn send_urgent(&self, ports: (u16, u16), seq: u32, ack: u32, flags: u8, urgent: u16, data: &[u8]) {
        let path = path(GUEST, ROUTER);
        let mut f = Vec::new();
        let start = wire::ip(&mut f, &path, wire::TCP, 20 + data.len());
        f.extend_from_slice(&ports.0.to_be_bytes());
        f.extend_from_slice(&ports.1.to_be_bytes());
        f.extend_from_slice(&seq.to_be_bytes());
        f.extend_from_slice(&ack.to_be_bytes());
        f.extend_from_slice(&[0x50, flags, 0xff, 0xff, 0, 0]);
        f.extend_from_slice(&urgent.to_be_bytes());
        f.extend_from_slice(data);
        wire::finish(&mut f, &path, wire::TCP, start, 16, false);
        assert_eq!(self.net.send(0, &VnetHeader::default(), &f), Sent::Done);
        self.net.flush(0);
    }

    /// The next segment for the guest.
    fn next(&self) -> Segment {
        let mut f = Vec::new();
        let end = Instant::now() + PATIENCE;
        loop {
            if self.net.receive(0, &mut f).is_none() {
                assert!(Instant::now() < end, "no segment came");
                let _ = self.bell.recv_timeout(Duration::from_millis(20));
                continue;
            }
            let eth = EthernetFrame::new_checked(&f[..]).expect("a frame");
            let Ok(ip) = Ipv4Packet::new_checked(eth.payload()) else { continue };
            let Ok(t) = TcpPacket::new_checked(ip.payload()) else { continue };
            let flag = |on, bit| if on { bit } else { 0 };
            return Segment {
                ports: (t.src_port(), t.dst_port()),
                seq: t.seq_number().0 as u32,
                ack: if t.ack() { t.ack_number().0 as u32 } else { 0 },
                flags: flag(t.fin(), FIN) | flag(t.syn(), SYN) | flag(t.rst(), RST) | flag(t.ack(), ACK),
                urgent: t
                    .payload()
                    .get(usize::from(t.urgent_at()).wrapping_sub(1))
                    .filter(|_| t.urg())
                    .copied(),
                data: t.payload().to_vec(),
            };
        }
    }
}

fn forwarded() -> (Hand, SocketAddr) {
    let forward = Forward {
        udp: false,
        host: "127.0.0.1:0".parse().expect("an address"),
        guest: "0.0.0.0:22".parse().expect("an address"),
    };
    let hand = Hand::new(UserConfig { forwards: vec![forward], ..UserConfig::default() });
    let at = hand.net.forwards()[0];
    (hand, at)
}

/// A client of the host's with a port that is the same each time.
fn client(port: u16, to: SocketAddr) -> TcpStream {
    let s = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    s.set_reuse_address(true).expect("reuse");
    s.bind(&SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port).into()).expect("its port");
    s.connect(&to.into()).expect("connect");
    s.into()
}

/// The guest closes first and is then in TIME-WAIT; the host's client comes again from the same port.
#[test]
fn a_client_of_the_same_port_gets_through_to_a_guest_in_time_wait() {
    let (hand, at) = forwarded();
    let port = Socket::new(Domain::IPV4, Type::STREAM, None)
        .and_then(|s| s.bind(&"127.0.0.1:0".parse::<SocketAddr>().expect("an address").into()).map(|()| s))
        .and_then(|s| s.local_addr())
        .expect("a free port")
        .as_socket()
        .expect("an address")
        .port();
    let first = client(port, at);
    let syn = hand.next();
    assert_eq!((syn.flags, syn.ports), (SYN, (port, 22)));
    let ports = (22, port);
    hand.send(ports, 1000, syn.seq.wrapping_add(1), SYN | ACK, b"");
    assert_eq!(hand.next().flags, ACK);
    hand.send(ports, 1001, syn.seq.wrapping_add(1), FIN | ACK, b"");
    let acknowledged = hand.next();
    assert_eq!((acknowledged.flags, acknowledged.ack), (ACK, 1002));
    // The client sees the end, and ends as well.
    assert_eq!((&first).read(&mut [0; 4]).expect("the end"), 0);
    drop(first);
    let end = hand.next();
    assert_eq!(end.flags, FIN | ACK);
    hand.send(ports, 1002, end.seq.wrapping_add(1), ACK, b"");

    let second = client(port, at);
    let again = hand.next();
    assert_eq!(again.flags, SYN);
    let ahead = again.seq.wrapping_sub(end.seq);
    assert!(ahead > 0 && ahead < 1 << 31, "a guest in TIME-WAIT takes only a number beyond the last");
    // A guest that holds on to the old connection all the same acknowledges that; it is reset, and asked again at once.
    hand.send(ports, 1002, end.seq.wrapping_add(1), ACK, b"");
    let reset = hand.next();
    assert_eq!((reset.flags, reset.seq), (RST, end.seq.wrapping_add(1)));
    let third = hand.next();
    assert_eq!((third.flags, third.seq), (SYN, again.seq));
    hand.send(ports, 5000, third.seq.wrapping_add(1), SYN | ACK, b"");
    assert_eq!(hand.next().flags, ACK);
    hand.send(ports, 5001, third.seq.wrapping_add(1), ACK, b"hello");
    let mut got = [0; 5];
    (&second).read_exact(&mut got).expect("data");
    assert_eq!(&got, b"hello");
}

/// A forwarded port is open before the guest's network is.
#[test]
fn a_client_waits_for_a_guest_that_has_not_spoken() {
    let (hand, at) = forwarded();
    let c = TcpStream::connect(at).expect("connect");
    let (one, two) = (hand.next(), hand.next());
    assert_eq!((one.flags, one.seq), (SYN, two.seq), "asked until it answers");
    let ports = (22, one.ports.0);
    hand.send(ports, 7, one.seq.wrapping_add(1), SYN | ACK, b"");
    hand.send(ports, 8, one.seq.wrapping_add(1), ACK, b"x");
    assert_eq!((&c).read(&mut [0; 4]).expect("data"), 1);
}

/// What is less than a segment is acknowledged by the answer, or a little later; a whole segment at once.
#[test]
fn little_data_is_acknowledged_by_the_answer_or_a_little_later() {
    let (hand, at) = forwarded();
    let mut c = TcpStream::connect(at).expect("connect");
    let syn = hand.next();
    let ports = (22, syn.ports.0);
    let mut next = syn.seq.wrapping_add(1);
    hand.send(ports, 7, next, SYN | ACK, b"");
    assert_eq!(hand.next().flags, ACK);
    hand.send(ports, 8, next, ACK, b"x");
    c.read_exact(&mut [0]).expect("data");
    c.write_all(b"y").expect("write");
    // The answer may come so late on a busy machine that the acknowledgement went alone.
    let mut answer = hand.next();
    if answer.data.is_empty() {
        assert_eq!((answer.flags, answer.ack), (ACK, 9));
        answer = hand.next();
    }
    assert_eq!((answer.ack, &answer.data[..]), (9, &b"y"[..]));
    next = next.wrapping_add(1);
    let sent = Instant::now();
    hand.send(ports, 9, next, ACK, b"z");
    let alone = hand.next();
    assert_eq!((alone.flags, alone.ack, alone.data.len()), (ACK, 10, 0));
    assert!(sent.elapsed() >= Duration::from_millis(5));
    hand.send(ports, 10, next, ACK, &[1; 1460]);
    assert_eq!(hand.next().ack, 1470);
}

impl Hand {
    /// A connection of a client's by a forwarded port: the ports, and the next numbers of both ends.
    fn connected(&self, at: SocketAddr) -> (TcpStream, (u16, u16), u32, u32) {
        let c = TcpStream::connect(at).expect("connect");
        let syn = self.next();
        let (ports, next) = ((22, syn.ports.0), syn.seq.wrapping_add(1));
        self.send(ports, 7, next, SYN | ACK, b"");
        assert_eq!(self.next().flags, ACK);
        (c, ports, 8, next)
    }
}

/// RFC 6093: an urgent byte keeps its place in the stream, and whoever wants may know of it.
#[test]
fn urgent_bytes_are_urgent_at_the_other_end_and_in_their_place() {
    let (hand, at) = forwarded();
    let (mut c, ports, seq, ack) = hand.connected(at);
    SockRef::from(&c).set_out_of_band_inline(false).expect("an option");
    hand.send_urgent(ports, seq, ack, ACK | URG, 3, b"ab!cd");
    let mut got = [0; 2];
    c.read_exact(&mut got).expect("data");
    assert_eq!(&got, b"ab");
    let end = Instant::now() + PATIENCE;
    while SockRef::from(&c).recv_out_of_band(&mut [std::mem::MaybeUninit::new(0)]).is_err() {
        assert!(Instant::now() < end, "the urgent byte stands apart");
        std::thread::yield_now();
    }
    c.read_exact(&mut got).expect("data");
    assert_eq!(&got, b"cd");
    // The other way.
    c.write_all(b"wx").expect("write");
    SockRef::from(&c).send_out_of_band(b"?").expect("write");
    c.write_all(b"yz").expect("write");
    let (mut data, mut urgent) = (Vec::new(), None);
    let mut seq_expected = ack;
    while data.len() < 5 {
        let s = hand.next();
        assert_eq!(s.seq, seq_expected);
        seq_expected = s.seq.wrapping_add(s.data.len() as u32);
        urgent = urgent.or(s.urgent);
        data.extend(s.data);
        hand.send(ports, seq + 5, seq_expected, ACK, b"");
    }
    assert_eq!((&data[..], urgent), (&b"wx?yz"[..], Some(b'?')));
}

/// RFC 1191: somebody behind the guest has a shorter link.
#[test]
fn segments_become_as_short_as_the_path_wants() {
    let (hand, at) = forwarded();
    let mut c = TcpStream::connect(at).expect("connect");
    let syn = hand.next();
    let (ports, ack) = ((22u16, syn.ports.0), syn.seq.wrapping_add(1));
    // An option with a segment size of 1460 makes the header longer: it is sent by hand.
    let path = path(GUEST, ROUTER);
    let mut f = Vec::new();
    let start = wire::ip(&mut f, &path, wire::TCP, 24);
    f.extend([ports.0.to_be_bytes(), ports.1.to_be_bytes()].concat());
    f.extend([7u32.to_be_bytes(), ack.to_be_bytes()].concat());
    f.extend([0x60, SYN | ACK, 0xff, 0xff, 0, 0, 0, 0, 2, 4, 5, 180]);
    wire::finish(&mut f, &path, wire::TCP, start, 16, false);
    let put = |f: &[u8]| assert_eq!(hand.net.send(0, &VnetHeader::default(), f), Sent::Done);
    put(&f);
    assert_eq!(hand.next().flags, ACK);
    c.write_all(&[1; 1460]).expect("write");
    let first = hand.next();
    assert_eq!((first.seq, first.data.len()), (ack, 1460));
    let told = |mtu: u16, port: u16| {
        let mut m = vec![3, 4, 0, 0, 0, 0];
        m.extend(mtu.to_be_bytes());
        m.extend([0x45, 0, 5, 220, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 2, 2, 10, 0, 2, 15]);
        m.extend([port.to_be_bytes(), 22u16.to_be_bytes()].concat());
        m.extend(ack.to_be_bytes());
        put(&wire::icmp(&path, &m));
    };
    // Of another connection: nothing happens. Then shorter than anybody's, and the rest in such pieces.
    told(1000, ports.1 ^ 1);
    told(300, ports.1);
    let pieces: Vec<(u32, usize)> = std::iter::repeat_with(|| hand.next())
        .map(|s| (s.seq.wrapping_sub(ack), s.data.len()))
        .take_while(|(at, n)| at + (*n as u32) < 1460)
        .collect();
    assert_eq!(pieces, [(0, 536), (536, 536)]);
    hand.send(ports, 8, ack.wrapping_add(1460), ACK, b"");
    c.write_all(&[2; 600]).expect("write");
    assert_eq!(hand.next().data.len(), 536);
}
