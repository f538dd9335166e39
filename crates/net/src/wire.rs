//! Building Ethernet, IP and transport headers. (Reading them: the checked types of `smoltcp::wire`.)

use crate::VnetHeader;
use std::net::{IpAddr, Ipv6Addr};

/// Bytes of an Ethernet header.
pub const ETH: usize = 14;
/// Protocol numbers (IANA).
pub const ICMP: u8 = 1;
/// TCP.
pub const TCP: u8 = 6;
/// UDP.
pub const UDP: u8 = 17;
/// ICMP for IPv6.
pub const ICMP6: u8 = 58;
/// IPv6 fragment header.
const FRAGMENT6: u8 = 44;

/// An Ethernet address.
pub type Mac = [u8; 6];

/// Ones' complement sum (RFC 1071) of `data`, going on from `start`; not folded.
fn sum(data: &[u8], start: u64) -> u64 {
    let mut total = start;
    let (words, rest) = data.as_chunks::<4>();
    for w in words {
        total += u64::from(u32::from_be_bytes(*w));
    }
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    total + u64::from(u32::from_be_bytes(last))
}

fn fold(mut total: u64) -> u16 {
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}

/// Internet checksum of `data`.
pub fn checksum(data: &[u8]) -> u16 {
    !fold(sum(data, 0))
}

fn pseudo(src: IpAddr, dst: IpAddr, protocol: u8, len: usize) -> u64 {
    let addresses = match (src, dst) {
        (IpAddr::V4(s), IpAddr::V4(d)) => sum(&s.octets(), sum(&d.octets(), 0)),
        (IpAddr::V6(s), IpAddr::V6(d)) => sum(&s.octets(), sum(&d.octets(), 0)),
        _ => 0,
    };
    addresses + u64::from(protocol) + len as u64
}

/// Where packets go in a frame, and how.
#[derive(Debug, Clone, Copy)]
pub struct Path {
    /// Sender's Ethernet address.
    pub from: Mac,
    /// Receiver's.
    pub to: Mac,
    /// Sender's IP address.
    pub src: IpAddr,
    /// Receiver's; of the same version.
    pub dst: IpAddr,
}

/// Begin a frame: Ethernet header and IP header for `len` bytes of `protocol`. Gives where those begin.
pub fn ip(frame: &mut Vec<u8>, path: &Path, protocol: u8, len: usize) -> usize {
    ip_part(frame, path, protocol, len, None)
}

/// As [`ip`], for a fragment: its identification, offset in bytes, and whether more follow.
fn ip_part(
    frame: &mut Vec<u8>,
    p: &Path,
    protocol: u8,
    len: usize,
    part: Option<(u32, usize, bool)>,
) -> usize {
    frame.clear();
    frame.extend_from_slice(&p.to);
    frame.extend_from_slice(&p.from);
    match (p.src, p.dst) {
        (IpAddr::V4(s), IpAddr::V4(d)) => {
            frame.extend_from_slice(&[8, 0, 0x45, 0]);
            frame.extend_from_slice(&((20 + len) as u16).to_be_bytes());
            let (id, flags) = match part {
                None => (0, 0x4000),
                Some((id, at, more)) => (id as u16, (at / 8) as u16 | if more { 0x2000 } else { 0 }),
            };
            frame.extend_from_slice(&id.to_be_bytes());
            frame.extend_from_slice(&flags.to_be_bytes());
            frame.extend_from_slice(&[64, protocol, 0, 0]);
            frame.extend_from_slice(&s.octets());
            frame.extend_from_slice(&d.octets());
            let c = checksum(&frame[ETH..]);
            frame[ETH + 10..ETH + 12].copy_from_slice(&c.to_be_bytes());
        }
        (s, d) => {
            let octets = |a| match a {
                IpAddr::V6(a) => Ipv6Addr::octets(&a),
                IpAddr::V4(a) => a.to_ipv6_mapped().octets(),
            };
            frame.extend_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0]);
            let extra = if part.is_some() { 8 } else { 0 };
            frame.extend_from_slice(&((len + extra) as u16).to_be_bytes());
            frame.extend_from_slice(&[if part.is_some() { FRAGMENT6 } else { protocol }, 255]);
            frame.extend_from_slice(&octets(s));
            frame.extend_from_slice(&octets(d));
            if let Some((id, at, more)) = part {
                frame.extend_from_slice(&[protocol, 0]);
                frame.extend_from_slice(&(at as u16 | u16::from(more)).to_be_bytes());
                frame.extend_from_slice(&id.to_be_bytes());
            }
        }
    }
    frame.len()
}

/// Fill in the transport checksum at `field` bytes behind `start`: whole, or, if `partial`, left to the receiver.
pub fn finish(
    frame: &mut [u8],
    path: &Path,
    protocol: u8,
    start: usize,
    field: usize,
    partial: bool,
) -> VnetHeader {
    let begin = pseudo(path.src, path.dst, protocol, frame.len() - start);
    let at = start + field;
    frame[at..at + 2].fill(0);
    if partial {
        let seed = fold(begin);
        frame[at..at + 2].copy_from_slice(&seed.to_be_bytes());
        return VnetHeader { checksum: Some((start as u16, field as u16)), ..VnetHeader::default() };
    }
    let c = match !fold(sum(&frame[start..], begin)) {
        // In UDP zero means that there is none.
        0 if protocol == UDP => 0xffff,
        c => c,
    };
    frame[at..at + 2].copy_from_slice(&c.to_be_bytes());
    VnetHeader::default()
}

/// A UDP datagram into an empty frame, of any length; its checksum is left to the receiver if `partial`.
pub fn udp(frame: &mut Vec<u8>, path: &Path, ports: (u16, u16), data: &[u8], partial: bool) -> VnetHeader {
    frame.reserve(ETH + 48 + data.len());
    let start = ip(frame, path, UDP, 8 + data.len());
    frame.extend_from_slice(&ports.0.to_be_bytes());
    frame.extend_from_slice(&ports.1.to_be_bytes());
    frame.extend_from_slice(&((8 + data.len()) as u16).to_be_bytes());
    frame.extend_from_slice(&[0, 0]);
    frame.extend_from_slice(data);
    finish(frame, path, UDP, start, 6, partial)
}

/// Frames with the parts of a packet of `protocol` that is longer than `mtu` allows; `id` numbers them.
pub fn fragments(
    path: &Path,
    protocol: u8,
    whole: &[u8],
    mtu: usize,
    id: u32,
) -> impl Iterator<Item = Vec<u8>> {
    // Offsets count in units of 8 bytes (RFC 791, RFC 8200 section 4.5).
    let headers = if path.src.is_ipv6() { 48 } else { 20 };
    let room = mtu.saturating_sub(headers).max(8) & !7;
    whole.chunks(room).enumerate().map(move |(n, piece)| {
        let at = n * room;
        let mut f = Vec::with_capacity(ETH + 48 + piece.len());
        ip_part(&mut f, path, protocol, piece.len(), Some((id, at, at + piece.len() < whole.len())));
        f.extend_from_slice(piece);
        f
    })
}

/// An ICMP message (either version); its checksum is filled in.
pub fn icmp(path: &Path, message: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(ETH + 40 + message.len());
    let protocol = if path.src.is_ipv4() { ICMP } else { ICMP6 };
    let start = ip(&mut frame, path, protocol, message.len());
    frame.extend_from_slice(message);
    if protocol == ICMP6 {
        finish(&mut frame, path, protocol, start, 2, false);
    } else {
        frame[start + 2..start + 4].fill(0);
        let c = checksum(&frame[start..]);
        frame[start + 2..start + 4].copy_from_slice(&c.to_be_bytes());
    }
    frame
}
