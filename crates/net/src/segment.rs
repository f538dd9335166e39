//! What a network card does to packets: checksums, and cutting long TCP packets into segments, for those who have to do without help.

use crate::VnetHeader;

/// The Internet checksum of some bytes (RFC 1071), as it stands in a header.
pub fn checksum(data: &[u8]) -> u16 {
    crate::wire::checksum(data)
}

/// What was found out about a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Verified {
    /// It is IPv4.
    pub v4: bool,
    /// The header's checksum is right (IPv4).
    pub ip_good: bool,
    /// It is UDP.
    pub udp: bool,
    /// The checksum of TCP or UDP is right; `None` if there is none to check.
    pub l4_good: Option<bool>,
    /// Bytes of all headers, that of TCP or UDP included, from the frame's beginning.
    pub headers: usize,
}

/// Check a frame's checksums. `None` for what is no IP or is cut short.
pub fn verify(frame: &[u8]) -> Option<Verified> {
    const TCP: u8 = 6;
    const UDP: u8 = 17;
    let at = if frame.get(12..14)? == [0x81, 0] { 18 } else { 14 };
    let ip = frame.get(at..)?;
    let (v4, header, len, protocol) = match frame.get(at - 2..at)? {
        [8, 0] => {
            let header = usize::from(ip.first()? & 15) * 4;
            let len = usize::from(u16::from_be_bytes([*ip.get(2)?, *ip.get(3)?]));
            (true, header, len, *ip.get(9)?)
        }
        [0x86, 0xdd] => {
            let len = usize::from(u16::from_be_bytes([*ip.get(4)?, *ip.get(5)?]));
            (false, 40, len + 40, *ip.get(6)?)
        }
        _ => return None,
    };
    let ip = ip.get(..len)?;
    if header < 20 || header > len {
        return None;
    }
    let mut v = Verified { v4, headers: at + header, ..Verified::default() };
    v.ip_good = !v4 || checksum(&ip[..header]) == 0;
    let fragment = v4 && u16::from_be_bytes([ip[6], ip[7]]) & 0x3fff != 0;
    let l4 = &ip[header..];
    if fragment || !matches!((protocol, l4.len()), (TCP, 20..) | (UDP, 8..)) {
        return Some(v);
    }
    v.udp = protocol == UDP;
    v.headers += if v.udp { 8 } else { usize::from(l4[12] >> 4) * 4 };
    // UDP over IPv4 may come without.
    if !(v.udp && v4 && l4[6..8] == [0, 0]) {
        let addresses = if v4 { &ip[12..20] } else { &ip[8..40] };
        let whole = [addresses, &(l4.len() as u32).to_be_bytes(), &[0, 0, 0, protocol], l4].concat();
        v.l4_good = Some(checksum(&whole) == 0);
    }
    Some(v)
}

/// Cut a long TCP packet whose header says how ([`VnetHeader::gso`], [`VnetHeader::checksum`]) into frames that need nothing any more.
/// One that does not fit its header is lost.
pub fn split(header: &VnetHeader, frame: &[u8], mut give: impl FnMut(&[u8])) {
    let (Some((_, size)), Some((tcp, _))) = (header.gso, header.checksum) else { return };
    let (tcp, size) = (usize::from(tcp), usize::from(size));
    let mut ip = 14;
    while ip < 64 && matches!(frame.get(ip - 2..ip), Some([0x81, 0])) {
        ip += 4;
    }
    let Some(offset) = frame.get(tcp + 12).map(|b| usize::from(b >> 4) * 4) else { return };
    let headers = tcp + offset;
    let v4 = frame.get(ip).is_some_and(|b| b >> 4 == 4);
    if size == 0 || offset < 20 || headers > frame.len() || ip + if v4 { 20 } else { 40 } > tcp {
        return;
    }
    let (head, payload) = frame.split_at(headers);
    let sequence = u32::from_be_bytes([head[tcp + 4], head[tcp + 5], head[tcp + 6], head[tcp + 7]]);
    let id = u16::from_be_bytes([head[ip + 4], head[ip + 5]]);
    let count = payload.len().div_ceil(size).max(1);
    let mut out = Vec::with_capacity(headers + size);
    for n in 0..count {
        let part = &payload[(n * size).min(payload.len())..((n + 1) * size).min(payload.len())];
        out.clear();
        out.extend_from_slice(head);
        out.extend_from_slice(part);
        let len = out.len();
        out[tcp + 4..tcp + 8].copy_from_slice(&sequence.wrapping_add((n * size) as u32).to_be_bytes());
        // FIN and PSH belong to the last, CWR to the first (RFC 3168 section 6.1.2).
        if n + 1 < count {
            out[tcp + 13] &= !0x09;
        }
        if n > 0 {
            out[tcp + 13] &= !0x80;
        }
        let addresses = if v4 {
            out[ip + 2..ip + 4].copy_from_slice(&((len - ip) as u16).to_be_bytes());
            out[ip + 4..ip + 6].copy_from_slice(&id.wrapping_add(n as u16).to_be_bytes());
            out[ip + 10..ip + 12].fill(0);
            let sum = checksum(&out[ip..tcp]);
            out[ip + 10..ip + 12].copy_from_slice(&sum.to_be_bytes());
            ip + 12..ip + 20
        } else {
            out[ip + 4..ip + 6].copy_from_slice(&((len - ip - 40) as u16).to_be_bytes());
            ip + 8..ip + 40
        };
        out[tcp + 16..tcp + 18].fill(0);
        let whole =
            [&out[addresses], &((len - tcp) as u32).to_be_bytes(), &[0, 0, 0, 6], &out[tcp..]].concat();
        let sum = checksum(&whole);
        out[tcp + 16..tcp + 18].copy_from_slice(&sum.to_be_bytes());
        give(&out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::GsoKind;

    fn long(v4: bool, payload: usize) -> Vec<u8> {
        let mut f = vec![2; 12];
        if v4 {
            f.extend([8, 0, 0x45, 0, 0, 0, 0xff, 0xff, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        } else {
            f.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, 6, 64]);
            f.extend([7; 32]);
        }
        f.extend([0, 80, 0, 81, 0xff, 0xff, 0xff, 0, 0, 0, 0, 1, 0x50, 0x99, 0xff, 0xff, 0, 0, 0, 0]);
        f.extend((0..payload).map(|n| n as u8));
        f
    }

    #[test]
    fn segments_are_right_and_whole() {
        for (v4, tcp) in [(true, 34), (false, 54)] {
            let f = long(v4, 2500);
            let kind = if v4 { GsoKind::Tcp4 } else { GsoKind::Tcp6 };
            let h =
                VnetHeader { checksum: Some((tcp, 16)), gso: Some((kind, 1000)), ..VnetHeader::default() };
            let mut parts = Vec::new();
            split(&h, &f, |p| parts.push(p.to_vec()));
            assert_eq!(parts.len(), 3);
            let mut all = Vec::new();
            let tcp = usize::from(tcp);
            for (n, p) in parts.iter().enumerate() {
                let v = verify(p).unwrap();
                assert_eq!((v.ip_good, v.l4_good, v.headers), (true, Some(true), tcp + 20));
                let sequence = u32::from_be_bytes(p[tcp + 4..tcp + 8].try_into().unwrap());
                assert_eq!(sequence, 0xffff_ff00u32.wrapping_add(1000 * n as u32));
                all.extend_from_slice(&p[tcp + 20..]);
            }
            assert!(all == f[tcp + 20..]);
            assert_eq!([0, 1, 2].map(|n: usize| parts[n][tcp + 13]), [0x90, 0x10, 0x19]);
            let mut bad = parts[0].clone();
            *bad.last_mut().unwrap() ^= 1;
            assert_eq!(verify(&bad).unwrap().l4_good, Some(false));
            for n in 0..f.len().min(120) {
                split(&h, &f[..n], |_| ());
                let _ = verify(&f[..n]);
            }
        }
    }
}
