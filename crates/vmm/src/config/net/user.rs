//! `--net user`: user-mode networking.

use super::KeyValue;
use crate::config::ParseError;
use ringfort_net::user::{Forward, UserConfig};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

const KNOWN: &str = "net, host, dns, nameserver, dhcpstart, lease, ipv6, ipv6-prefix, hostname, domainname, dnssearch, restrict, \
    host-loopback, hostalias, hostfwd, tftp, bootfile, dump";

pub(super) fn options(c: &mut UserConfig, options: &[KeyValue<'_>]) -> Result<(), ParseError> {
    // The other addresses lie in that network, wherever it stands.
    for o in options.iter().filter(|o| o.key == "net") {
        let (address, prefix) = cidr(o)?;
        *c = std::mem::take(c).with_network(address, prefix);
    }
    for o in options {
        match o.key {
            "net" => {}
            "host" => c.gateway = o.parse(V4)?,
            "dns" => c.dns = o.parse(V4)?,
            "nameserver" => c.nameservers.push(nameserver(o)?),
            "dhcpstart" => c.guest = o.parse(V4)?,
            "lease" => c.lease = o.parse("a number of seconds")?,
            "ipv6" => c.ipv6 = o.switch()?,
            "ipv6-prefix" => c.prefix6 = prefix6(o)?,
            "hostname" => c.hostname = Some(o.need()?.into()),
            "domainname" => c.domain = Some(o.need()?.into()),
            "dnssearch" => c.search.push(o.need()?.into()),
            "restrict" => c.restrict = o.switch()?,
            "host-loopback" => c.host_loopback = o.switch()?,
            "hostalias" => c.host_alias = Some(o.parse("an IPv4 or IPv6 address")?),
            "hostfwd" => c.forwards.push(forward(o.need()?)?),
            "tftp" => c.tftp = Some(o.need()?.into()),
            "bootfile" => c.bootfile = Some(o.need()?.into()),
            "dump" => c.dump = Some(o.need()?.into()),
            _ => return Err(o.unknown("user", KNOWN)),
        }
    }
    Ok(())
}

const V4: &str = "an IPv4 address";

/// `ADDRESS` or `ADDRESS:PORT`; an IPv6 address with a port stands in brackets.
fn nameserver(o: &KeyValue<'_>) -> Result<SocketAddr, ParseError> {
    let v = o.need()?;
    v.parse().or_else(|_| {
        o.parse("an address, or an address and a port as 127.0.0.1:5353").map(|a| SocketAddr::new(a, 53))
    })
}

/// `A.B.C.D/N`.
fn cidr(o: &KeyValue<'_>) -> Result<(Ipv4Addr, u8), ParseError> {
    let v = o.need()?;
    let fail = || ParseError(format!("net={v}: give a network as 10.0.2.0/24"));
    let (address, prefix) = v.split_once('/').ok_or_else(fail)?;
    let prefix: u8 = prefix.parse().map_err(|_| fail())?;
    if prefix > 32 {
        return Err(fail());
    }
    Ok((address.parse().map_err(|_| fail())?, prefix))
}

/// `X::` or `X::/64`.
fn prefix6(o: &KeyValue<'_>) -> Result<Ipv6Addr, ParseError> {
    let v = o.need()?;
    let fail = || ParseError(format!("ipv6-prefix={v}: give 64 bits of network, as fd00:1:2:3::/64"));
    let (address, bits) = v.split_once('/').unwrap_or((v, "64"));
    let address: Ipv6Addr = address.parse().map_err(|_| fail())?;
    if bits != "64" || address.segments()[4..] != [0; 4] {
        return Err(fail());
    }
    Ok(address)
}

/// `tcp|udp:[HOSTADDRESS]:PORT-[GUESTADDRESS]:PORT`, as in QEMU; IPv6 addresses stand in brackets.
fn forward(text: &str) -> Result<Forward, ParseError> {
    let fail = |what: &str| {
        ParseError(format!(
            "hostfwd={text}: {what}; write for instance tcp:127.0.0.1:2222-:22 or udp:[::1]:53-:53"
        ))
    };
    let (protocol, rest) = text.split_once(':').ok_or_else(|| fail("tcp: or udp: must come first"))?;
    let udp = match protocol {
        "tcp" | "" => false,
        "udp" => true,
        _ => return Err(fail("the protocol is neither tcp nor udp")),
    };
    // A hyphen separates the two ends; neither has one inside.
    let (host, guest) = rest.split_once('-').ok_or_else(|| fail("a hyphen must separate host and guest"))?;
    let host = end(host).ok_or_else(|| fail("the host's end is no address and port"))?;
    let guest = end(guest).ok_or_else(|| fail("the guest's end is no address and port"))?;
    if guest.port() == 0 {
        return Err(fail("the guest's port is missing"));
    }
    Ok(Forward { udp, host, guest })
}

/// `[ADDRESS]:PORT`; no address is any address.
fn end(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.rsplit_once(':')?;
    if port.is_empty() || !port.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let address: IpAddr = match address.strip_prefix('[').and_then(|a| a.strip_suffix(']')) {
        Some(v6) => v6.parse::<Ipv6Addr>().ok()?.into(),
        None if address.is_empty() => Ipv4Addr::UNSPECIFIED.into(),
        None => address.parse::<Ipv4Addr>().ok()?.into(),
    };
    Some(SocketAddr::new(address, port.parse().ok()?))
}
