//! What user-mode networking is to be.

use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

/// A port of the host that leads into the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Forward {
    /// UDP, otherwise TCP.
    pub udp: bool,
    /// Where the host listens.
    pub host: SocketAddr,
    /// Where it leads to; an unspecified address stands for the address that the guest gets by DHCP.
    pub guest: SocketAddr,
}

/// Options of user-mode networking. The defaults are the addresses that QEMU's user networking has, too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct UserConfig {
    /// The guest's IPv4 network, and the length of its prefix (8 to 30).
    pub network: (Ipv4Addr, u8),
    /// The host's address in it: router and DHCP server.
    pub gateway: Ipv4Addr,
    /// The address at which the guest finds a DNS server.
    pub dns: Ipv4Addr,
    /// The name servers that are asked, by turns when one does not answer; the host's if there is none.
    pub nameservers: Vec<SocketAddr>,
    /// The address that DHCP gives.
    pub guest: Ipv4Addr,
    /// IPv6 is there, too.
    pub ipv6: bool,
    /// The guest's IPv6 network: 64 bits of prefix.
    pub prefix6: Ipv6Addr,
    /// Nothing but forwarded ports leads out or in.
    pub restrict: bool,
    /// The gateway's address leads to the host's own loopback.
    pub host_loopback: bool,
    /// Another address that leads to the host's own loopback, whatever `host_loopback` says; of either version, in the
    /// guest's network or outside.
    pub host_alias: Option<IpAddr>,
    /// Ports that lead into the guest.
    pub forwards: Vec<Forward>,
    /// The guest's name, by DHCP.
    pub hostname: Option<String>,
    /// Seconds that DHCP gives addresses for, of either version; at least [`UserConfig::SHORTEST_LEASE`].
    pub lease: u32,
    /// Domain of the guest, by DHCP.
    pub domain: Option<String>,
    /// Domains that names are looked up in, by DHCP.
    pub search: Vec<String>,
    /// Files of this folder are served by TFTP at the router's address, for guests that boot from the network.
    pub tftp: Option<PathBuf>,
    /// The file that DHCP tells such a guest to load.
    pub bootfile: Option<String>,
    /// Largest IP packet of the link.
    pub mtu: u16,
    /// Record all frames in this file.
    pub dump: Option<PathBuf>,
}

impl Default for UserConfig {
    fn default() -> Self {
        UserConfig {
            network: (Ipv4Addr::new(10, 0, 2, 0), 24),
            gateway: Ipv4Addr::new(10, 0, 2, 2),
            dns: Ipv4Addr::new(10, 0, 2, 3),
            nameservers: Vec::new(),
            guest: Ipv4Addr::new(10, 0, 2, 15),
            ipv6: true,
            prefix6: Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, 0),
            restrict: false,
            host_loopback: false,
            host_alias: None,
            forwards: Vec::new(),
            hostname: None,
            lease: 86_400,
            domain: None,
            search: Vec::new(),
            tftp: None,
            bootfile: None,
            mtu: 1500,
            dump: None,
        }
    }
}

impl UserConfig {
    /// Put the other addresses at their places in another network.
    #[must_use]
    pub fn with_network(self, address: Ipv4Addr, prefix: u8) -> UserConfig {
        let base = u32::from(address) & mask(prefix);
        let at = |n: u32| Ipv4Addr::from(base | (n & !mask(prefix)));
        UserConfig { network: (at(0), prefix), gateway: at(2), dns: at(3), guest: at(15), ..self }
    }

    /// Fewest seconds of a lease: clients renew at half of it, and take fewer for a mistake.
    pub const SHORTEST_LEASE: u32 = 10;

    /// The netmask.
    pub fn netmask(&self) -> Ipv4Addr {
        Ipv4Addr::from(mask(self.network.1))
    }

    /// Whether an address is in the guest's IPv4 network.
    pub fn contains(&self, a: Ipv4Addr) -> bool {
        u32::from(a) & mask(self.network.1) == u32::from(self.network.0)
    }

    fn in_prefix6(&self, low: u16) -> Ipv6Addr {
        let mut s = self.prefix6.segments();
        s[7] = low;
        Ipv6Addr::from(s)
    }
    /// The host's IPv6 address in the guest's network.
    pub fn gateway6(&self) -> Ipv6Addr {
        self.in_prefix6(2)
    }
    /// The IPv6 address that DHCPv6 gives.
    pub fn guest6(&self) -> Ipv6Addr {
        self.in_prefix6(15)
    }
    /// The IPv6 address of the DNS server.
    pub fn dns6(&self) -> Ipv6Addr {
        self.in_prefix6(3)
    }
    /// Whether an address is in the guest's IPv6 network.
    pub fn contains6(&self, a: Ipv6Addr) -> bool {
        a.segments()[..4] == self.prefix6.segments()[..4]
    }
    /// Whether an address is in the guest's network.
    pub fn is_local(&self, a: IpAddr) -> bool {
        match a {
            IpAddr::V4(a) => self.contains(a),
            IpAddr::V6(a) => self.contains6(a),
        }
    }

    /// All that is wrong with it, each with the option's name.
    pub fn problems(&self) -> Vec<(&'static str, String)> {
        let mut p = Vec::new();
        if !(8..=30).contains(&self.network.1) {
            p.push(("net", format!("prefix of {} bits; give 8 to 30", self.network.1)));
            return p;
        }
        let (net, m) = (u32::from(self.network.0), mask(self.network.1));
        for (name, a) in [("host", self.gateway), ("dns", self.dns), ("dhcpstart", self.guest)] {
            let rest = u32::from(a) & !m;
            if !self.contains(a) || rest == 0 || rest == !m {
                let text = format!("{a} is no host's address in {}/{}", Ipv4Addr::from(net), self.network.1);
                p.push((name, text));
            }
        }
        if self.gateway == self.dns || self.gateway == self.guest || self.dns == self.guest {
            p.push(("host", "host, dns and dhcpstart must be three addresses".into()));
        }
        if let Some(a) = self.host_alias {
            let taken = [self.gateway, self.dns, self.guest].map(IpAddr::V4).contains(&a)
                || [self.gateway6(), self.dns6()].map(IpAddr::V6).contains(&a);
            if taken || a.is_unspecified() || a.is_multicast() || a.is_loopback() {
                p.push(("hostalias", format!("{a} is taken or no address of a host; give another")));
            }
        }
        if self.network.0.is_loopback() || self.network.0.is_multicast() {
            p.push(("net", format!("{} is no network for a guest", self.network.0)));
        }
        // IPv6 needs 1280 (RFC 8200 section 5), IPv4 576 of every host (RFC 791).
        let least = if self.ipv6 { 1280 } else { 576 };
        if self.mtu < least {
            p.push(("mtu", format!("{} is too small; give {least} to 65535", self.mtu)));
        }
        if self.lease < Self::SHORTEST_LEASE {
            p.push((
                "lease",
                format!("{} s is too short; give {} or more", self.lease, Self::SHORTEST_LEASE),
            ));
        }
        // The field of a DHCP message has 128 bytes, one of them the final zero.
        if self.bootfile.as_ref().is_some_and(|b| b.is_empty() || b.len() > 127 || b.contains('\0')) {
            p.push(("bootfile", "give 1 to 127 bytes".into()));
        }
        let names = self.hostname.iter().chain(&self.domain).chain(&self.search);
        for n in names {
            if !is_domain(n) {
                p.push(("hostname", format!("'{n}' is no host or domain name")));
            }
        }
        if self.search.iter().map(|s| s.len() + 2).sum::<usize>() > 255 {
            p.push(("dnssearch", "the domains are longer than 255 bytes together".into()));
        }
        for (n, f) in self.forwards.iter().enumerate() {
            if f.guest.port() == 0 {
                p.push(("hostfwd", "the guest's port is missing".into()));
            }
            let inside = f.guest.ip().is_unspecified()
                || (self.is_local(f.guest.ip())
                    && f.guest.ip() != IpAddr::V4(self.gateway)
                    && f.guest.ip() != IpAddr::V4(self.dns));
            if !inside {
                p.push(("hostfwd", format!("{} is not in the guest's network", f.guest.ip())));
            }
            if f.host.port() != 0 && self.forwards[..n].iter().any(|o| o.udp == f.udp && o.host == f.host) {
                p.push(("hostfwd", format!("{} is given twice", f.host)));
            }
        }
        p
    }
}

fn mask(prefix: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0)
}

/// Letters, digits, hyphens and underscores in labels of 1 to 63 bytes.
fn is_domain(name: &str) -> bool {
    name.len() <= 253
        && name.split('.').all(|label| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        })
}
