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
    /// All of them.
    pub const ALL: u32 = 0x3f;
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
        let (addresses, ports, tcp, v6) = parse(frame)?;
        let (ip, tcp_type, udp_type) = if v6 {
            (types::IPV6, types::TCPV6, types::UDPV6)
        } else {
            (types::IPV4, types::TCPV4, types::UDPV4)
        };
        let with_ports = if tcp { tcp_type } else { udp_type };
        match ports {
            Some(p) if allowed & with_ports != 0 => Some((self.hash(&[addresses, p]), with_ports)),
            _ if allowed & ip != 0 => Some((self.hash(&[addresses]), ip)),
            _ => None,
        }
    }
}

/// Both addresses, both ports if there are any, whether these are of TCP, and whether it is IPv6.
type Flow<'a> = (&'a [u8], Option<&'a [u8]>, bool, bool);

fn parse(frame: &[u8]) -> Option<Flow<'_>> {
    const TCP: u8 = 6;
    const UDP: u8 = 17;
    let mut at = 12;
    while matches!(frame.get(at..at + 2)?, [0x81, 0] | [0x88, 0xa8]) {
        at += 4;
    }
    let ip = frame.get(at + 2..)?;
    match frame[at..at + 2] {
        [8, 0] => {
            let addresses = ip.get(12..20)?;
            let len = usize::from(ip[0] & 15) * 4;
            // A fragment has no ports that all of its packet's fragments share.
            let whole = u16::from_be_bytes([ip[6], ip[7]]) & 0x3fff == 0;
            let ports = ip.get(len..len + 4).filter(|_| whole && len >= 20 && matches!(ip[9], TCP | UDP));
            Some((addresses, ports, ip[9] == TCP, false))
        }
        [0x86, 0xdd] => {
            let addresses = ip.get(8..40)?;
            let (mut next, mut at) = (ip[6], 40);
            // Hop-by-hop and destination options and routing headers are passed over (RFC 8200 section 4).
            while matches!(next, 0 | 43 | 60) {
                let Some(h) = ip.get(at..at + 2) else { break };
                next = h[0];
                at += 8 + 8 * usize::from(h[1]);
            }
            let ports = ip.get(at..at + 4).filter(|_| matches!(next, TCP | UDP));
            Some((addresses, ports, next == TCP, true))
        }
        _ => None,
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
        assert_eq!(t.of_frame(&f, types::ALL), Some((0x4020_7d3d, types::TCPV6)));
        assert_eq!(t.of_frame(&f, types::IPV6), Some((0x2cc1_8cd5, types::IPV6)));
        f.truncate(60);
        assert_eq!(t.of_frame(&f, types::ALL).unwrap().1, types::IPV6);
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
