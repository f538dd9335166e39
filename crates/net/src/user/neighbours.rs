//! ARP (RFC 826), and neighbour discovery with router advertisements (RFC 4861, RFC 8106).

use super::stack::Common;
use crate::VnetHeader;
use crate::wire::{self, Mac, Path};
use smoltcp::wire::{ArpHardware, ArpOperation, ArpPacket, EthernetProtocol};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

/// Seconds that what routers say holds.
const LIFETIME: u32 = 1800;
/// How often it is said without a question (RFC 4861 section 6.2.1), so that it does not run out.
pub const INTERVAL: Duration = Duration::from_secs(450);

/// Answer questions for the addresses that the host has in the guest's network.
pub fn arp(c: &mut Common, packet: &[u8]) {
    let Ok(p) = ArpPacket::new_checked(packet) else { return };
    let well_formed = p.hardware_type() == ArpHardware::Ethernet
        && p.protocol_type() == EthernetProtocol::Ipv4
        && (p.hardware_len(), p.protocol_len()) == (6, 4)
        && p.operation() == ArpOperation::Request;
    if !well_formed {
        return;
    }
    let (Ok(asks), Ok(mac)) =
        (<[u8; 4]>::try_from(p.source_protocol_addr()), <Mac>::try_from(p.source_hardware_addr()))
    else {
        return;
    };
    let Ok(wanted) = <[u8; 4]>::try_from(p.target_protocol_addr()) else { return };
    let wanted_address = Ipv4Addr::from(wanted);
    let ours = [Some(c.config.gateway.into()), Some(c.config.dns.into()), c.config.host_alias];
    if !ours.contains(&Some(IpAddr::V4(wanted_address))) || wanted == asks {
        return;
    }
    let mut f = Vec::with_capacity(60);
    f.extend_from_slice(&mac);
    f.extend_from_slice(&c.mac);
    f.extend_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
    f.extend_from_slice(&c.mac);
    f.extend_from_slice(&wanted);
    f.extend_from_slice(&mac);
    f.extend_from_slice(&asks);
    c.push(VnetHeader::default(), f);
}

/// The link-local address made of an Ethernet address (RFC 4291 appendix A).
pub fn link_local(m: &Mac) -> Ipv6Addr {
    let half = |a: u8, b: u8| u16::from_be_bytes([a, b]);
    Ipv6Addr::new(0xfe80, 0, 0, 0, half(m[0] ^ 2, m[1]), half(m[2], 0xff), half(0xfe, m[3]), half(m[4], m[5]))
}

/// Neighbour and router solicitations. True if the message was of that family.
pub fn ndp(c: &mut Common, path: &Path, hops: u8, message: &[u8]) -> bool {
    let Some(&[kind, code]) = message.first_chunk() else { return true };
    if !(133..=137).contains(&kind) {
        return false;
    }
    // RFC 4861 section 7.1.1: from this link only, and whole.
    let (IpAddr::V6(src), IpAddr::V6(dst)) = (path.src, path.dst) else { return true };
    let fixed = if kind == 133 { 8 } else { 24 };
    if hops != 255 || code != 0 || !is_whole(path, message) || !are_options(message.get(fixed..)) {
        return true;
    }
    let Some(guest_mac) = c.guest_mac else { return true };
    let own = link_local(&c.mac);
    match kind {
        133 => advertise(c, if src.is_unspecified() { None } else { Some(src) }),
        135 => {
            let Some(raw) = message.get(8..24) else { return true };
            let Ok(raw) = <[u8; 16]>::try_from(raw) else { return true };
            let wanted = Ipv6Addr::from(raw);
            // Who has no address yet asks the group of those who could have it, and gives no address of its card.
            let strange = src.is_unspecified()
                && (!solicits(dst, wanted) || message.get(24..).is_some_and(|o| o.first() == Some(&1)));
            if wanted.is_multicast() || strange {
                return true;
            }
            // A host that tries out an address of its own is not answered for others'.
            if [own, c.config.gateway6(), c.config.dns6()].contains(&wanted)
                || c.config.host_alias == Some(wanted.into())
            {
                let (to, flags) = if src.is_unspecified() { (ALL_NODES, 0xa0) } else { (src, 0xe0) };
                let mac = if src.is_unspecified() { [0x33, 0x33, 0, 0, 0, 1] } else { guest_mac };
                let mut m = vec![136, 0, 0, 0, flags, 0, 0, 0];
                m.extend_from_slice(&wanted.octets());
                m.extend_from_slice(&[2, 1]);
                m.extend_from_slice(&c.mac);
                let path = Path { from: c.mac, to: mac, src: wanted.into(), dst: to.into() };
                c.push(VnetHeader::default(), wire::icmp(&path, &m));
            }
        }
        _ => {}
    }
    true
}

/// Whether options fill what is behind the fixed part: none is empty (RFC 4861 section 4.6).
fn are_options(rest: Option<&[u8]>) -> bool {
    let Some(mut rest) = rest else { return false };
    while let Some(&[_, len]) = rest.first_chunk() {
        let Some(more) = rest.get(8 * usize::from(len)..).filter(|_| len > 0) else { return false };
        rest = more;
    }
    rest.is_empty()
}

/// Whether `group` is where an address is asked for (RFC 4291 section 2.7.1).
fn solicits(group: Ipv6Addr, address: Ipv6Addr) -> bool {
    group.octets()[..13] == [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff]
        && group.octets()[13..] == address.octets()[13..]
}

/// Say again to all what a router says, before it runs out.
pub fn advertise_to_all(c: &mut Common) {
    if c.config.ipv6 && c.guest_mac.is_some() {
        advertise(c, None);
    }
}

const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// A router advertisement: prefix, MTU, DNS server and domains.
fn advertise(c: &mut Common, to: Option<Ipv6Addr>) {
    // Hop limit 64; an address and other configuration by DHCPv6, too; router for this long.
    let mut m = vec![134, 0, 0, 0, 64, 0xc0];
    m.extend_from_slice(&(if c.config.restrict { 0 } else { LIFETIME as u16 }).to_be_bytes());
    m.extend_from_slice(&[0; 8]);
    m.extend_from_slice(&[1, 1]);
    m.extend_from_slice(&c.mac);
    m.extend_from_slice(&[5, 1, 0, 0]);
    m.extend_from_slice(&u32::from(c.config.mtu).to_be_bytes());
    // On link, and for addresses that hosts make themselves.
    m.extend_from_slice(&[3, 4, 64, 0xc0]);
    m.extend_from_slice(&86_400u32.to_be_bytes());
    m.extend_from_slice(&14_400u32.to_be_bytes());
    m.extend_from_slice(&[0; 4]);
    m.extend_from_slice(&c.config.prefix6.octets());
    if !c.config.restrict {
        m.extend_from_slice(&[25, 3, 0, 0]);
        m.extend_from_slice(&LIFETIME.to_be_bytes());
        m.extend_from_slice(&c.config.dns6().octets());
    }
    if !c.config.search.is_empty() {
        let mut names = crate::dhcp::names(&c.config.search);
        names.resize(names.len().next_multiple_of(8), 0);
        m.extend_from_slice(&[31, 1 + (names.len() / 8) as u8, 0, 0]);
        m.extend_from_slice(&LIFETIME.to_be_bytes());
        m.extend_from_slice(&names);
    }
    let mac = c.guest_mac.filter(|_| to.is_some()).unwrap_or([0x33, 0x33, 0, 0, 0, 1]);
    let path =
        Path { from: c.mac, to: mac, src: link_local(&c.mac).into(), dst: to.unwrap_or(ALL_NODES).into() };
    c.push(VnetHeader::default(), wire::icmp(&path, &m));
}

/// Whether an ICMPv6 message has the right checksum.
pub fn is_whole(path: &Path, message: &[u8]) -> bool {
    let mut copy = message.to_vec();
    if copy.len() < 8 {
        return false;
    }
    wire::finish(&mut copy, path, wire::ICMP6, 0, 2, false);
    copy[2..4] == message[2..4]
}
