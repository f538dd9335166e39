//! What a managed network is to be.

use crate::netlink;
use crate::{MacAddr, NetError};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// Longest name of a network.
const LONGEST_NAME: usize = 32;

/// An address and the length of its network's prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cidr {
    /// The address.
    pub address: IpAddr,
    /// Bits of the network.
    pub prefix: u8,
}

impl Cidr {
    fn bits(self) -> (u128, u32) {
        match self.address {
            IpAddr::V4(a) => (u128::from(u32::from(a)), 32),
            IpAddr::V6(a) => (u128::from(a), 128),
        }
    }

    fn at(self, value: u128) -> IpAddr {
        match self.address {
            IpAddr::V4(_) => Ipv4Addr::from(value as u32).into(),
            IpAddr::V6(_) => Ipv6Addr::from(value).into(),
        }
    }

    fn host_mask(self) -> u128 {
        let (_, len) = self.bits();
        let host = len - u32::from(self.prefix);
        1u128.checked_shl(host).map_or(u128::MAX, |n| n - 1)
    }

    /// The network's own address.
    pub fn network(self) -> IpAddr {
        self.at(self.bits().0 & !self.host_mask())
    }

    /// The address number `n` of the network.
    pub fn nth(self, n: u128) -> IpAddr {
        self.at((self.bits().0 & !self.host_mask()) | (n & self.host_mask()))
    }

    /// Addresses after the network's own, without the last (broadcast) one of IPv4.
    pub fn last_host(self) -> u128 {
        self.host_mask().saturating_sub(1)
    }

    /// Whether it is an address of this network.
    pub fn contains(self, a: IpAddr) -> bool {
        let other = Cidr { address: a, prefix: self.prefix };
        a.is_ipv4() == self.address.is_ipv4() && other.network() == self.network()
    }

    /// Whether two networks share addresses.
    pub fn overlaps(self, other: Cidr) -> bool {
        self.contains(other.network()) || other.contains(self.network())
    }

    /// The host's address in the network: the one that was given, or the first if that was the network's own.
    pub fn gateway(self) -> IpAddr {
        if self.address == self.network() { self.nth(1) } else { self.address }
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl FromStr for Cidr {
    type Err = String;
    fn from_str(text: &str) -> Result<Cidr, String> {
        let fail = || format!("'{text}': give a network as 192.168.124.0/24 or fd00:124::/64");
        let (address, prefix) = text.split_once('/').ok_or_else(fail)?;
        let address: IpAddr = address.parse().map_err(|_| fail())?;
        let prefix: u8 = prefix.parse().map_err(|_| fail())?;
        if prefix > if address.is_ipv4() { 32 } else { 128 } {
            return Err(fail());
        }
        Ok(Cidr { address, prefix })
    }
}

impl TryFrom<String> for Cidr {
    type Error = String;
    fn try_from(text: String) -> Result<Cidr, String> {
        text.parse()
    }
}

impl From<Cidr> for String {
    fn from(c: Cidr) -> String {
        c.to_string()
    }
}

/// Where guests can get to beyond their network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Forward {
    /// Everywhere that the host can, with the host's addresses; nobody gets in.
    #[default]
    Nat,
    /// Everywhere, with their own addresses; whoever has a route gets in.
    Route,
    /// Nowhere.
    None,
}

impl FromStr for Forward {
    type Err = String;
    fn from_str(text: &str) -> Result<Forward, String> {
        match text {
            "nat" => Ok(Forward::Nat),
            "route" => Ok(Forward::Route),
            "none" => Ok(Forward::None),
            _ => Err(format!("'{text}': give nat, route or none")),
        }
    }
}

/// Who answers DHCP and DNS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Service {
    /// dnsmasq where it is installed, otherwise this program.
    #[default]
    Auto,
    /// dnsmasq.
    Dnsmasq,
    /// This program.
    Builtin,
    /// Nobody.
    None,
}

impl FromStr for Service {
    type Err = String;
    fn from_str(text: &str) -> Result<Service, String> {
        match text {
            "auto" => Ok(Service::Auto),
            "dnsmasq" => Ok(Service::Dnsmasq),
            "builtin" => Ok(Service::Builtin),
            "none" => Ok(Service::None),
            _ => Err(format!("'{text}': give auto, dnsmasq, builtin or none")),
        }
    }
}

/// A guest whose address is settled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StaticHost {
    /// Its card's address.
    pub mac: MacAddr,
    /// Its IPv4 address.
    pub address: Ipv4Addr,
    /// Its name.
    #[serde(default)]
    pub name: Option<String>,
}

impl FromStr for StaticHost {
    type Err = String;

    /// `MAC,ADDRESS[,NAME]`.
    fn from_str(text: &str) -> Result<StaticHost, String> {
        let mut parts = text.split(',');
        let mut next = || parts.next().filter(|p| !p.is_empty());
        let fail = || format!("'{text}': give MAC,ADDRESS[,NAME]");
        let mac = next().ok_or_else(fail)?.parse().map_err(|e: crate::MacError| e.to_string())?;
        let address = next().ok_or_else(fail)?.parse().map_err(|_| fail())?;
        let name = next().map(str::to_owned);
        if next().is_some() {
            return Err(fail());
        }
        Ok(StaticHost { mac, address, name })
    }
}

/// A network of the host that guests share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkConfig {
    /// Its name.
    pub name: String,
    /// The bridge that it is; `rf-NAME` if not given.
    #[serde(default)]
    pub bridge: Option<String>,
    /// IPv4 network and the host's address in it.
    #[serde(default)]
    pub ipv4: Option<Cidr>,
    /// IPv6 network (64 bits) and the host's address in it.
    #[serde(default)]
    pub ipv6: Option<Cidr>,
    /// Where guests get to.
    #[serde(default)]
    pub forward: Forward,
    /// Guests do not reach each other.
    #[serde(default)]
    pub isolate: bool,
    /// Guests reach nothing of the host but DHCP, DNS and echo.
    #[serde(default)]
    pub shield_host: bool,
    /// Who answers DHCP and DNS.
    #[serde(default)]
    pub service: Service,
    /// First and last address that DHCP gives; all that are free if not given.
    #[serde(default)]
    pub dhcp: Option<(Ipv4Addr, Ipv4Addr)>,
    /// Guests whose addresses are settled.
    #[serde(default)]
    pub hosts: Vec<StaticHost>,
    /// The guests' domain.
    #[serde(default)]
    pub domain: Option<String>,
}

impl NetworkConfig {
    /// A network with NAT.
    pub fn new(name: &str, ipv4: Option<Cidr>) -> NetworkConfig {
        NetworkConfig {
            name: name.into(),
            bridge: None,
            ipv4,
            ipv6: None,
            forward: Forward::Nat,
            isolate: false,
            shield_host: false,
            service: Service::Auto,
            dhcp: None,
            hosts: Vec::new(),
            domain: None,
        }
    }

    /// The bridge's name.
    pub fn bridge(&self) -> String {
        self.bridge.clone().unwrap_or_else(|| format!("rf-{}", self.name))
    }

    /// The bridge's address: the same at every start.
    pub fn mac(&self) -> [u8; 6] {
        MacAddr::from_seed(&format!("network/{}", self.name)).bytes()
    }

    /// First and last address that DHCP gives.
    pub fn range(&self) -> Option<(Ipv4Addr, Ipv4Addr)> {
        let net = self.ipv4?;
        self.dhcp.or_else(|| match (net.nth(2), net.nth(net.last_host())) {
            (IpAddr::V4(first), IpAddr::V4(last)) if first <= last => Some((first, last)),
            _ => None,
        })
    }

    /// All networks that it has.
    pub fn networks(&self) -> impl Iterator<Item = Cidr> {
        self.ipv4.into_iter().chain(self.ipv6)
    }

    /// Check everything that can be checked without the host.
    ///
    /// # Errors
    /// The first thing that is wrong, and what to do.
    pub fn check(&self) -> Result<(), NetError> {
        let wrong = |option: &'static str, what: String| Err(NetError::Option { option, what });
        if !valid_network_name(&self.name) {
            let text = format!(
                "'{}': give 1 to {LONGEST_NAME} letters, digits, hyphens and underscores, a letter first",
                self.name
            );
            return wrong("name", text);
        }
        if !netlink::valid_name(&self.bridge()) {
            let text = format!(
                "'{}' is no name of a link of at most {} bytes; give --bridge NAME",
                self.bridge(),
                netlink::NAME_MAX
            );
            return wrong("bridge", text);
        }
        if self.ipv4.is_none() && self.ipv6.is_none() {
            return wrong("ipv4", "a network needs --ipv4 or --ipv6".into());
        }
        if let Some(c) = self.ipv4 {
            let a = match c.address {
                IpAddr::V4(a) => a,
                IpAddr::V6(_) => return wrong("ipv4", format!("{c} is IPv6; give it as --ipv6")),
            };
            if !(8..=29).contains(&c.prefix) {
                return wrong("ipv4", format!("{c}: give 8 to 29 bits of prefix"));
            }
            if a.is_loopback()
                || a.is_multicast()
                || a.is_link_local()
                || a.octets()[0] == 0
                || a.is_broadcast()
            {
                return wrong("ipv4", format!("{c} is no network for guests"));
            }
            if c.gateway() == c.nth(u128::MAX) {
                return wrong(
                    "ipv4",
                    format!("{c}: that is the broadcast address; give another for the host"),
                );
            }
        }
        if let Some(c) = self.ipv6 {
            match c.address {
                IpAddr::V4(_) => return wrong("ipv6", format!("{c} is IPv4; give it as --ipv4")),
                IpAddr::V6(a)
                    if a.is_loopback()
                        || a.is_multicast()
                        || a.is_unicast_link_local()
                        || a.is_unspecified() =>
                {
                    return wrong("ipv6", format!("{c} is no network for guests"));
                }
                // Guests make their addresses themselves (RFC 4862), which takes 64 bits.
                IpAddr::V6(_) if c.prefix != 64 => {
                    return wrong("ipv6", format!("{c}: give 64 bits of prefix"));
                }
                IpAddr::V6(_) => {}
            }
        }
        if let Some((first, last)) = self.dhcp {
            let inside = |a: Ipv4Addr| {
                self.ipv4.is_some_and(|c| {
                    c.contains(a.into()) && IpAddr::V4(a) != c.network() && IpAddr::V4(a) != c.nth(u128::MAX)
                })
            };
            if !inside(first) || !inside(last) || first > last {
                return wrong("dhcp", format!("{first} to {last} is no range within the network"));
            }
        }
        for (n, h) in self.hosts.iter().enumerate() {
            let address = IpAddr::V4(h.address);
            if !self.ipv4.is_some_and(|c| c.contains(address) && address != c.gateway()) {
                return wrong("host", format!("{} is no guest's address in the network", h.address));
            }
            if self.hosts[..n].iter().any(|o| o.mac == h.mac || o.address == h.address) {
                return wrong("host", format!("{} or {} is given twice", h.mac, h.address));
            }
            if let Some(name) = h.name.as_ref().filter(|n| !valid_domain(n)) {
                return wrong("host", format!("'{name}' is no host name"));
            }
        }
        match self.domain.as_ref().filter(|d| !valid_domain(d)) {
            Some(d) => wrong("domain", format!("'{d}' is no domain name")),
            None => Ok(()),
        }
    }
}

/// Whether a network may have this name; it is a file's name, too.
pub fn valid_network_name(name: &str) -> bool {
    name.len() <= LONGEST_NAME
        && name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
}

/// Labels of letters, digits and hyphens (RFC 1123 section 2.1).
pub fn valid_domain(name: &str) -> bool {
    name.len() <= 253
        && name.split('.').all(|l| {
            (1..=63).contains(&l.len())
                && !l.starts_with('-')
                && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        })
}
