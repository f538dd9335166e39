//! What a router tells of packets that it cannot carry (RFC 792, RFC 1812, RFC 4443), and what it hears about its own.

use super::stack::Common;
use super::tcp::Pair;
use crate::VnetHeader;
use crate::wire::{self, Path, TCP};
use std::net::{IpAddr, SocketAddr};

/// Messages between two sweeps: RFC 4443 section 2.4 (f) wants them limited.
pub const MOST: u32 = 500;
/// Bytes of a message's own header.
const HEADER: usize = 8;

/// What is the matter with a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// There is no way to the network.
    Network,
    /// The host does not answer.
    Host,
    /// Nobody listens there.
    Port,
    /// Somebody on the way does not let it pass.
    Forbidden,
    /// It is longer than a link on the way carries: this many bytes.
    TooBig(u32),
    /// It may go no further.
    Expired,
}

impl Trouble {
    /// Type, code, and the second word of the message.
    fn numbers(self, v4: bool) -> (u8, u8, u32) {
        match (self, v4) {
            (Trouble::Network, true) => (3, 0, 0),
            (Trouble::Host, true) => (3, 1, 0),
            (Trouble::Port, true) => (3, 3, 0),
            (Trouble::TooBig(mtu), true) => (3, 4, mtu & 0xffff),
            (Trouble::Forbidden, true) => (3, 13, 0),
            (Trouble::Expired, true) => (11, 0, 0),
            (Trouble::Network, false) => (1, 0, 0),
            (Trouble::Forbidden, false) => (1, 1, 0),
            (Trouble::Host, false) => (1, 3, 0),
            (Trouble::Port, false) => (1, 4, 0),
            (Trouble::TooBig(mtu), false) => (2, 0, mtu),
            (Trouble::Expired, false) => (3, 0, 0),
        }
    }

    /// What the host met on the guest's behalf: the kind and code of an ICMP message with its further word, or an error number.
    pub fn of_host(v4: bool, icmp: Option<(u8, u8)>, errno: i32, info: u32) -> Option<Trouble> {
        Some(match (icmp, v4) {
            (Some((3, 0 | 5 | 6 | 11)), true) | (Some((1, 0 | 2)), false) => Trouble::Network,
            (Some((3, 3)), true) | (Some((1, 4)), false) => Trouble::Port,
            (Some((3, 4)), true) | (Some((2, _)), false) => Trouble::TooBig(info),
            (Some((3, 9 | 10 | 13)), true) | (Some((1, 1 | 5)), false) => Trouble::Forbidden,
            (Some((3, _)), true) | (Some((1, _)), false) => Trouble::Host,
            (Some((11, 0)), true) | (Some((3, 0)), false) => Trouble::Expired,
            (Some(_), _) => return None,
            (None, _) => match errno {
                libc::ECONNREFUSED => Trouble::Port,
                // The last one is what hosts without an IPv6 address of their own say.
                libc::ENETUNREACH | libc::ENETDOWN | libc::EADDRNOTAVAIL => Trouble::Network,
                libc::EHOSTUNREACH | libc::EHOSTDOWN | libc::ETIMEDOUT => Trouble::Host,
                libc::EMSGSIZE if info > 0 => Trouble::TooBig(info),
                libc::EACCES | libc::EPERM => Trouble::Forbidden,
                _ => return None,
            },
        })
    }
}

/// Tell the guest about a packet of its own with `data` behind the IP header, in the name of `by`, or of the router.
pub fn report(c: &mut Common, path: &Path, protocol: u8, data: &[u8], what: Trouble, by: Option<IpAddr>) {
    let (Some(guest_mac), Some(left)) = (c.guest_mac, c.troubles.checked_sub(1)) else { return };
    c.troubles = left;
    let v4 = path.src.is_ipv4();
    // Groups and everybody get no answer (RFC 1122 section 3.2.2).
    if path.dst.is_multicast() || path.src.is_unspecified() {
        return;
    }
    let (kind, code, word) = what.numbers(v4);
    let mut m = vec![kind, code, 0, 0];
    m.extend_from_slice(&word.to_be_bytes());
    let mut quoted = Vec::new();
    let start = wire::ip(&mut quoted, path, protocol, data.len());
    // As much as fits the shortest packet that everybody takes (RFC 1812 section 4.3.2.3, RFC 4443 section 2.4).
    let most = if v4 { 576 - 20 } else { 1280 - 40 } - HEADER - (start - wire::ETH);
    quoted.extend_from_slice(&data[..data.len().min(most)]);
    m.extend_from_slice(&quoted[wire::ETH..]);
    let by = by.filter(|a| a.is_ipv4() == v4 && super::stack::may_leave(*a) && !c.config.is_local(*a));
    let src = by.unwrap_or_else(|| c.gateway(path.src));
    let way = Path { from: c.mac, to: guest_mac, src, dst: path.src };
    let frame = wire::icmp(&way, &m);
    c.push_as(VnetHeader::default(), frame, true);
}

/// The guest, or who is behind it, cannot carry a segment of ours of a connection: which, and how long a packet may be.
pub fn too_big(path: &Path, message: &[u8]) -> Option<(Pair, usize)> {
    let (&[kind, code, _, _, w0, w1, w2, w3], quoted) = message.split_first_chunk()?;
    let v4 = path.src.is_ipv4();
    let fits = if v4 { (kind, code) == (3, 4) } else { (kind, code) == (2, 0) };
    if !fits {
        return None;
    }
    let mtu = u32::from_be_bytes(if v4 { [0, 0, w2, w3] } else { [w0, w1, w2, w3] });
    // What is quoted is cut off, so there is no length to be checked.
    let (src, dst, tcp): (IpAddr, IpAddr, _) = if v4 {
        let header = usize::from(quoted.first()? & 15) * 4;
        (quoted.get(9) == Some(&TCP)).then_some(())?;
        let a = quoted.get(12..20)?;
        (
            <[u8; 4]>::try_from(&a[..4]).ok()?.into(),
            <[u8; 4]>::try_from(&a[4..]).ok()?.into(),
            quoted.get(header.max(20)..)?,
        )
    } else {
        (quoted.get(6) == Some(&TCP)).then_some(())?;
        let a = quoted.get(8..40)?;
        (
            <[u8; 16]>::try_from(&a[..16]).ok()?.into(),
            <[u8; 16]>::try_from(&a[16..]).ok()?.into(),
            quoted.get(40..)?,
        )
    };
    let &[s0, s1, d0, d1] = tcp.first_chunk()?;
    let end = |ip, a, b| SocketAddr::new(ip, u16::from_be_bytes([a, b]));
    Some((Pair { far: end(src, s0, s1), guest: end(dst, d0, d1) }, mtu as usize))
}
