//! Frames that a hostile guest sends to the router with NAT: ARP, IP with options and fragments, TCP, UDP, ICMP, DHCP of both
//! versions, neighbour discovery, TFTP.
//!
//! The network is a restricted one, so that nothing leaves this machine; a forwarded port with a client on it gives the frames a
//! connection to be part of.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use ringfort_net::user::{Forward, UserConfig, UserNet};
use ringfort_net::{MAX_FRAME, MacAddr, NetBackend, NetEvents, Offloads, VnetHeader};

use crate::Input;

const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
const ROUTER_MAC: [u8; 6] = [0x52, 0x55, 10, 0, 2, 2];
/// Frames of one input.
const MOST_FRAMES: usize = 200;

struct Deaf;

impl NetEvents for Deaf {
    fn readable(&self, _: u16) {}
    fn writable(&self, _: u16) {}
    fn link(&self, _: bool) {}
}

/// A folder for TFTP that goes away again.
struct Folder(std::path::PathBuf);

impl Folder {
    fn new() -> Folder {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let n = NUMBER.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("ringfort-fuzz-{}-{n}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a folder");
        std::fs::write(dir.join("f"), [7; 3000]).expect("a file");
        Folder(dir)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

struct Place {
    net: UserNet,
    _folder: Folder,
    /// The forwarded connection: the client's port, our next number, the other's next.
    flow: (u16, u32, u32),
    frame: Vec<u8>,
}

impl Place {
    fn new(options: u8) -> Place {
        let folder = Folder::new();
        let config = UserConfig {
            restrict: true,
            tftp: Some(folder.0.clone()),
            bootfile: Some("f".into()),
            hostname: Some("box".into()),
            search: vec!["a.example".into(), "b".into()],
            forwards: vec![Forward {
                udp: false,
                host: SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0),
                guest: SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 22),
            }],
            ..UserConfig::default()
        };
        let net = UserNet::new(config, MacAddr::new(GUEST_MAC).ok()).expect("a network");
        net.attach(Arc::new(Deaf));
        if options & 1 != 0 {
            net.set_offloads(Offloads::ALL);
        }
        Place { net, _folder: folder, flow: (0, 1, 0), frame: Vec::new() }
    }

    fn send(&mut self, header: &VnetHeader, frame: &[u8]) {
        self.net.send(0, header, frame);
        self.net.flush(0);
        self.drain();
    }

    /// Take what came for the guest, and learn from it where the connection stands.
    fn drain(&mut self) {
        while self.net.receive(0, &mut self.frame).is_some() {
            let f = &self.frame;
            assert!((14..=MAX_FRAME).contains(&f.len()));
            // IPv4 without options, TCP.
            if f.len() >= 54 && f[12..15] == [8, 0, 0x45] && f[23] == 6 {
                let number = |at: usize| u32::from_be_bytes([f[at], f[at + 1], f[at + 2], f[at + 3]]);
                self.flow.0 = u16::from_be_bytes([f[34], f[35]]);
                let len = f.len() as u32 - 54;
                self.flow.2 = number(38).wrapping_add(len + u32::from(f[47] & 1) + u32::from(f[47] >> 1 & 1));
                if f[47] & 16 != 0 {
                    self.flow.1 = number(42);
                }
            }
        }
    }
}

fn checksum(data: &[u8]) -> u16 {
    let mut sum: u32 =
        data.chunks(2).map(|c| u32::from(c[0]) << 8 | u32::from(*c.get(1).unwrap_or(&0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn eth(kind: u16) -> Vec<u8> {
    [&ROUTER_MAC[..], &GUEST_MAC, &kind.to_be_bytes()].concat()
}

/// IPv4 with `options` (a multiple of 4 bytes), as a fragment if `part` says so.
fn ip4(protocol: u8, options: &[u8], part: u16, payload: &[u8]) -> Vec<u8> {
    let words = 5 + (options.len() / 4).min(10);
    let options = &options[..(words - 5) * 4];
    let mut f = eth(0x0800);
    let len = (words * 4 + payload.len()) as u16;
    f.extend_from_slice(&[0x40 | words as u8, 0]);
    f.extend_from_slice(&len.to_be_bytes());
    f.extend_from_slice(&[0, 9]);
    f.extend_from_slice(&part.to_be_bytes());
    f.extend_from_slice(&[64, protocol, 0, 0, 10, 0, 2, 15, 10, 0, 2, 2]);
    f.extend_from_slice(options);
    let sum = checksum(&f[14..]).to_be_bytes();
    f[24..26].copy_from_slice(&sum);
    f.extend_from_slice(payload);
    f
}

fn ip6(protocol: u8, src: Ipv6Addr, dst: Ipv6Addr, payload: &[u8]) -> Vec<u8> {
    let mut f = eth(0x86dd);
    f.extend_from_slice(&[0x60, 0, 0, 0]);
    f.extend_from_slice(&(payload.len() as u16).to_be_bytes());
    f.extend_from_slice(&[protocol, 255]);
    f.extend_from_slice(&src.octets());
    f.extend_from_slice(&dst.octets());
    f.extend_from_slice(payload);
    f
}

fn udp(from: u16, to: u16, data: &[u8]) -> Vec<u8> {
    let mut m =
        [from.to_be_bytes(), to.to_be_bytes(), (8 + data.len() as u16).to_be_bytes(), [0; 2]].concat();
    m.extend_from_slice(data);
    m
}

/// The checksum that neighbour discovery asks for.
fn icmp6(src: Ipv6Addr, dst: Ipv6Addr, message: &[u8]) -> Vec<u8> {
    let mut m = message.to_vec();
    m.resize(m.len().max(8), 0);
    m[2..4].fill(0);
    let pseudo =
        [&src.octets()[..], &dst.octets(), &(m.len() as u32).to_be_bytes(), &[0, 0, 0, 58], &m].concat();
    let sum = checksum(&pseudo).to_be_bytes();
    m[2..4].copy_from_slice(&sum);
    m
}

/// A piece of the input, of a length that the input says.
fn piece<'a>(input: &mut Input<'a>) -> &'a [u8] {
    let len = usize::from(input.u16() & 0x3ff).min(input.0.len());
    let (head, tail) = input.0.split_at(len);
    input.0 = tail;
    head
}

/// A client, and then frames as the input has them.
pub fn user_network(data: &[u8]) {
    let mut input = Input(data);
    let options = input.u8();
    let mut place = Place::new(options);
    // The connection takes its turn of the network's thread: its first segment may come at any later time.
    let client = (options & 2 != 0).then(|| TcpStream::connect(place.net.forwards()[0]).ok());
    let link = Ipv6Addr::new(0xfe80, 0, 0, 0, 0x5054, 0xff, 0xfe01, 0x203);
    let site = Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, 15);
    let router = Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, 2);
    let all = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2);
    let valid = VnetHeader { valid: true, ..VnetHeader::default() };
    for _ in 0..MOST_FRAMES {
        if input.is_empty() {
            break;
        }
        let kind = input.u8();
        let v6 = kind & 0x80 != 0;
        let packet = |protocol: u8, payload: &[u8]| match v6 {
            false => ip4(protocol, &[], 0, payload),
            true => ip6(protocol, site, router, payload),
        };
        match kind & 15 {
            // Anything at all, with any header in front.
            0 | 1 => {
                let raw = input.bytes::<{ VnetHeader::LEN }>();
                let ethertype = [0x0806, 0x0800, 0x86dd, input.u16()][usize::from(input.u8() & 3)];
                let frame = [eth(ethertype).as_slice(), piece(&mut input)].concat();
                if let Some(h) = VnetHeader::decode(&raw, frame.len(), Offloads::ALL) {
                    place.send(&h, &frame);
                }
            }
            2 => {
                let body = piece(&mut input);
                place.send(&valid, &[eth(0x0806).as_slice(), &[0, 1, 8, 0, 6, 4, 0, 1], body].concat());
            }
            3 => {
                let options = piece(&mut input);
                place.send(&valid, &ip4(input.u8(), options, input.u16(), piece(&mut input)));
            }
            4 => {
                let (next, len) = (input.u8(), input.u8() & 3);
                let mut m = vec![next, len];
                m.extend_from_slice(piece(&mut input));
                place.send(&valid, &ip6([0, 44, 60, 43][usize::from(input.u8() & 3)], site, router, &m));
            }
            // A segment near where the connection stands.
            5..=7 => {
                let (port, seq, ack) = place.flow;
                let near = |n: u32, by: u8| n.wrapping_add((by as i8) as u32);
                let (flags, by_seq, by_ack) = (input.u8(), input.u8(), input.u8());
                let options = piece(&mut input);
                let words = 5 + (options.len() / 4).min(10);
                let mut m = [22u16.to_be_bytes(), port.to_be_bytes()].concat();
                m.extend_from_slice(&near(seq, if by_seq > 200 { by_seq } else { 0 }).to_be_bytes());
                m.extend_from_slice(&near(ack, if by_ack > 200 { by_ack } else { 0 }).to_be_bytes());
                m.extend_from_slice(&[(words as u8) << 4, flags & 0x3f]);
                m.extend_from_slice(&input.u16().to_be_bytes());
                m.extend_from_slice(&[0; 4]);
                m.extend_from_slice(&options[..(words - 5) * 4]);
                m.extend_from_slice(piece(&mut input));
                place.send(&valid, &packet(6, &m));
            }
            8 => {
                // A BOOTP message up to the options.
                let mut m = vec![0; 240];
                m[..3].copy_from_slice(&[1, 1, 6]);
                m[28..34].copy_from_slice(&GUEST_MAC);
                m[236..].copy_from_slice(&[99, 130, 83, 99]);
                m.extend_from_slice(piece(&mut input));
                place.send(&valid, &ip4(17, &[], 0, &udp(68, 67, &m)));
            }
            9 => place.send(&valid, &ip6(17, link, all, &udp(546, 547, piece(&mut input)))),
            10 => {
                let to = [69, 1024, 53, input.u16()][usize::from(input.u8() & 3)];
                let mut m = vec![0, input.u8() & 7];
                m.extend_from_slice(piece(&mut input));
                place.send(&valid, &packet(17, &udp(3000, to, &m)));
            }
            11 => {
                let kind = 133 + input.u8() % 5;
                let m = [&[kind, 0, 0, 0][..], piece(&mut input)].concat();
                place.send(&valid, &ip6(58, link, router, &icmp6(link, router, &m)));
            }
            12 => {
                let m = [&[if v6 { 128 } else { 8 }, 0, 0, 0][..], piece(&mut input)].concat();
                place.send(&valid, &packet(if v6 { 58 } else { 1 }, &m));
            }
            _ => place.drain(),
        }
    }
    drop(client);
}
