//! Receive-side scaling: the Toeplitz hash of a packet's addresses and ports (virtio 1.3 section 5.1.6.4.3; Intel 82574 data
//! sheet section 7.1.11), by which flows are spread over queues.

/// Bytes of the longest key.
pub const KEY_LEN: usize = 40;
/// Bytes of the longest input: two IPv6 addresses and two ports.
const INPUT: usize = 36;

/// What may be hashed, as bits of virtio's `hash_types`.
pub mod types {
    /// Addresses of IPv4.
    pub const IPV4: u32 = 1 << 0;
    /// With ports of TCP.
    pub const TCPV4: u32 = 1 << 1;
    /// With ports of UDP.
    pub const UDPV4: u32 = 1 << 2;
    /// Addresses of IPv6.
    pub const IPV6: u32 = 1 << 3;
    /// With ports of TCP.
    pub const TCPV6: u32 = 1 << 4;
    /// With ports of UDP.
    pub const UDPV6: u32 = 1 << 5;
    /// Addresses of mobile IPv6: the home address option and the type 2 routing header stand for what the header says.
    pub const IPV6_EX: u32 = 1 << 6;
    /// With ports of TCP.
    pub const TCPV6_EX: u32 = 1 << 7;
    /// With ports of UDP.
    pub const UDPV6_EX: u32 = 1 << 8;
    /// All of them.
    pub const ALL: u32 = 0x1ff;
}

/// A key, prepared.
#[derive(Clone)]
pub struct Toeplitz {
    /// What each value of each byte of the input adds.
    table: Vec<[u32; 256]>,
}

impl Toeplitz {
    /// Prepare a key; one that is shorter than [`KEY_LEN`] is filled up with zeroes.
    pub fn new(key: &[u8]) -> Toeplitz {
        let bit = |n: usize| key.get(n / 8).is_some_and(|b| b & 0x80 >> (n % 8) != 0);
        let window = |n: usize| (0..32).fold(0u32, |w, i| w << 1 | u32::from(bit(n + i)));
        let table = (0..INPUT)
            .map(|at| {
                let of_bit: [u32; 8] = std::array::from_fn(|i| window(8 * at + i));
                std::array::from_fn(|value| {
                    (0..8).filter(|i| value & 0x80 >> i != 0).fold(0, |sum, i| sum ^ of_bit[i])
                })
            })
            .collect();
        Toeplitz { table }
    }

    /// The hash of some bytes, of which those beyond 36 do not count.
    pub fn hash(&self, parts: &[&[u8]]) -> u32 {
        let bytes = parts.iter().flat_map(|p| p.iter());
        self.table.iter().zip(bytes).fold(0, |sum, (t, &b)| sum ^ t[usize::from(b)])
    }

    /// The hash of a frame by the best of `allowed` that fits, and which that was (one of [`types`]).
    pub fn of_frame(&self, frame: &[u8], allowed: u32) -> Option<(u32, u32)> {
        let flow = parse(frame)?;
        let with_ports = |tcp_type, udp_type| match &flow.ports {
            Some((true, p)) => Some((tcp_type, *p)),
            Some((false, p)) => Some((udp_type, *p)),
            None => None,
        };
        let best = |addresses: [&[u8]; 2], ip, tcp_type, udp_type| match with_ports(tcp_type, udp_type) {
            Some((kind, p)) if allowed & kind != 0 => {
                Some((self.hash(&[addresses[0], addresses[1], p]), kind))
            }
            _ if allowed & ip != 0 => Some((self.hash(&addresses), ip)),
            _ => None,
        };
        if !flow.v6 {
            return best(flow.addresses, types::IPV4, types::TCPV4, types::UDPV4);
        }
        // Without a type for extension headers these are passed over (section 5.1.6.4.3.4).
        let extended = flow.extended.and_then(|a| best(a, types::IPV6_EX, types::TCPV6_EX, types::UDPV6_EX));
        extended.or_else(|| best(flow.addresses, types::IPV6, types::TCPV6, types::UDPV6))
    }
}

/// What a packet is hashed by.
struct Flow<'a> {
    v6: bool,
    /// Sender's and receiver's address, as the header has them.
    addresses: [&'a [u8]; 2],
    /// The same as mobile IPv6 has them, if there are extension headers.
    extended: Option<[&'a [u8]; 2]>,
    /// Whether they are of TCP, and both ports.
    ports: Option<(bool, &'a [u8])>,
}

const TCP: u8 = 6;
const UDP: u8 = 17;

fn parse(frame: &[u8]) -> Option<Flow<'_>> {
    let mut at = 12;
    while matches!(frame.get(at..at + 2)?, [0x81, 0] | [0x88, 0xa8]) {
        at += 4;
    }
    let ip = frame.get(at + 2..)?;
    match frame[at..at + 2] {
        [8, 0] => {
            let addresses = [ip.get(12..16)?, ip.get(16..20)?];
            let len = usize::from(ip[0] & 15) * 4;
            // A fragment has no ports that all of its packet's fragments share.
            let whole = u16::from_be_bytes([ip[6], ip[7]]) & 0x3fff == 0;
            let ports = ip.get(len..len + 4).filter(|_| whole && len >= 20 && matches!(ip[9], TCP | UDP));
            Some(Flow { v6: false, addresses, extended: None, ports: ports.map(|p| (ip[9] == TCP, p)) })
        }
        [0x86, 0xdd] => parse6(ip),
        _ => None,
    }
}

fn parse6(ip: &[u8]) -> Option<Flow<'_>> {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const DESTINATION: u8 = 60;
    let addresses = [ip.get(8..24)?, ip.get(24..40)?];
    let mut extended = None;
    let (mut next, mut at) = (ip[6], 40);
    // RFC 8200 section 4. A fragment has no ports that all of its packet's fragments share: its header ends the search.
    while matches!(next, HOP_BY_HOP | ROUTING | DESTINATION) {
        let Some(&[after, len]) = ip.get(at..).and_then(|h| h.first_chunk::<2>()) else { break };
        let end = at + 8 + 8 * usize::from(len);
        let Some(header) = ip.get(at..end) else { break };
        let [source, target] = extended.get_or_insert(addresses);
        match next {
            DESTINATION => *source = home_address(&header[2..]).unwrap_or(source),
            // RFC 6275 section 6.4: type 2, one address behind 8 bytes.
            ROUTING if header[2] == 2 => *target = header.get(8..24).unwrap_or(target),
            _ => {}
        }
        (next, at) = (after, end);
    }
    let ports = ip.get(at..at + 4).filter(|_| matches!(next, TCP | UDP));
    Some(Flow { v6: true, addresses, extended, ports: ports.map(|p| (next == TCP, p)) })
}

/// The home address option among destination options (RFC 6275 section 6.3).
fn home_address(mut options: &[u8]) -> Option<&[u8]> {
    const PAD1: u8 = 0;
    const HOME_ADDRESS: u8 = 201;
    loop {
        match *options {
            [PAD1, ref rest @ ..] => options = rest,
            [kind, len, ref rest @ ..] => {
                let value = rest.get(..usize::from(len))?;
                if kind == HOME_ADDRESS {
                    return (value.len() == 16).then_some(value);
                }
                options = &rest[value.len()..];
            }
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, Ipv6Addr};

    /// The key that Microsoft's verification suite for RSS uses.
    const KEY: [u8; 40] = [
        0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0, 0xd0,
        0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c, 0x6a, 0x42,
        0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
    ];

    fn v4(protocol: u8, from: ([u8; 4], u16), to: ([u8; 4], u16), fragment: u16) -> Vec<u8> {
        let mut f = vec![0; 12];
        f.extend([8, 0, 0x45, 0, 0, 40, 0, 0]);
        f.extend(fragment.to_be_bytes());
        f.extend([64, protocol, 0, 0]);
        f.extend([from.0, to.0].concat());
        f.extend([from.1.to_be_bytes(), to.1.to_be_bytes()].concat());
        f
    }

    #[test]
    fn the_published_values() {
        // "Verifying the RSS hash calculation", Microsoft.
        let t = Toeplitz::new(&KEY);
        let a: Ipv4Addr = "66.9.149.187".parse().unwrap();
        let b: Ipv4Addr = "161.142.100.80".parse().unwrap();
        let f = v4(6, (a.octets(), 2794), (b.octets(), 1766), 0);
        assert_eq!(t.of_frame(&f, types::ALL), Some((0x51cc_c178, types::TCPV4)));
        assert_eq!(t.of_frame(&f, types::IPV4), Some((0x323e_8fc2, types::IPV4)));
        assert_eq!(t.of_frame(&f, types::UDPV4), None);
        let a: Ipv6Addr = "3ffe:2501:200:1fff::7".parse().unwrap();
        let b: Ipv6Addr = "3ffe:2501:200:3::1".parse().unwrap();
        let mut f = vec![0; 12];
        f.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 20, 0, 64]);
        f.extend([a.octets(), b.octets()].concat());
        // Hop-by-hop options, then TCP.
        f.extend([6, 0, 0, 0, 0, 0, 0, 0]);
        f.extend([2794u16.to_be_bytes(), 1766u16.to_be_bytes()].concat());
        assert_eq!(t.of_frame(&f, 0x3f), Some((0x4020_7d3d, types::TCPV6)));
        // The hop-by-hop header has no other addresses, but is an extension header.
        assert_eq!(t.of_frame(&f, types::ALL), Some((0x4020_7d3d, types::TCPV6_EX)));
        assert_eq!(t.of_frame(&f, types::IPV6), Some((0x2cc1_8cd5, types::IPV6)));
        f.truncate(60);
        assert_eq!(t.of_frame(&f, 0x3f).unwrap().1, types::IPV6);
    }

    #[test]
    fn mobile_addresses_stand_for_those_of_the_header() {
        let t = Toeplitz::new(&KEY);
        let [a, b, home, care]: [Ipv6Addr; 4] =
            ["3ffe:2501:200:1fff::7", "3ffe:2501:200:3::1", "fd00::1", "fd00::2"].map(|a| a.parse().unwrap());
        let packet = |from: Ipv6Addr, to: Ipv6Addr, next: u8, headers: &[u8]| {
            let mut f = vec![0; 12];
            f.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 20, next, 64]);
            f.extend([from.octets(), to.octets()].concat());
            f.extend(headers);
            f.extend([2794u16.to_be_bytes(), 1766u16.to_be_bytes()].concat());
            f
        };
        // Destination options: two of padding, then the home address; a routing header of type 2.
        let mut options = vec![43, 2, 1, 2, 0, 0, 201, 16];
        options.extend(a.octets());
        let mut route = vec![17, 2, 2, 1, 0, 0, 0, 0];
        route.extend(b.octets());
        let f = packet(home, care, 60, &[options.clone(), route.clone()].concat());
        let plain = packet(a, b, 17, &[]);
        let (hash, kind) = t.of_frame(&f, types::ALL).unwrap();
        assert_eq!((Some((hash, types::UDPV6)), kind), (t.of_frame(&plain, types::ALL), types::UDPV6_EX));
        // Without the types for them, what the header says.
        let direct = packet(home, care, 17, &[]);
        assert_eq!(t.of_frame(&f, 0x3f), t.of_frame(&direct, 0x3f));
        let (hash, kind) = t.of_frame(&f, types::IPV6_EX | types::UDPV6).unwrap();
        assert_eq!((hash, kind), (t.of_frame(&plain, types::IPV6).unwrap().0, types::IPV6_EX));
        // Options of impossible lengths are none; whatever is cut off does no harm.
        options[7] = 200;
        let f = packet(home, care, 60, &[options, route].concat());
        assert!(t.of_frame(&f, types::ALL).is_some());
        for n in 0..f.len() {
            let _ = t.of_frame(&f[..n], types::ALL);
        }
    }

    #[test]
    fn fragments_tags_and_noise() {
        let t = Toeplitz::new(&KEY);
        for fragment in [0x2000, 5] {
            let f = v4(17, ([1; 4], 5), ([2; 4], 6), fragment);
            assert_eq!(t.of_frame(&f, types::ALL).unwrap().1, types::IPV4);
        }
        let f = v4(17, ([1; 4], 5), ([2; 4], 6), 0x4000);
        let mut tagged = f.clone();
        tagged.splice(12..12, [0x81, 0, 0, 7]);
        assert_eq!(t.of_frame(&f, types::ALL), t.of_frame(&tagged, types::ALL));
        assert_eq!(t.of_frame(&f, types::ALL).unwrap().1, types::UDPV4);
        for n in 0..f.len() {
            let _ = t.of_frame(&f[..n], types::ALL);
        }
        assert_eq!(t.of_frame(&[0x81, 0].repeat(40), types::ALL), None);
        assert_eq!(Toeplitz::new(&[]).hash(&[&[0xff; 50]]), 0);
    }
}
