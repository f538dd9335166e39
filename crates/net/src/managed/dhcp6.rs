//! The built-in DHCPv6 server of a network: addresses beside those that guests make themselves, name server and domain.

use super::config::{Cidr, NetworkConfig};
use super::leases::Lease;
use crate::dhcp6::{self, Addresses, Association};
use std::net::{IpAddr, Ipv6Addr};

/// Seconds that an address is given for.
pub const LEASE: u32 = 3600;
/// Seconds that an offered address is kept for.
const OFFERED: u64 = 60;
/// Most leases.
const MOST: usize = 4096;
/// First and last address that is given, counted from the network's own.
pub const RANGE: (u32, u32) = (0x1_0000, 0x1_ffff);

struct Entry {
    client: Vec<u8>,
    number: [u8; 4],
    address: Ipv6Addr,
    expires: u64,
    /// The client took it.
    bound: bool,
}

impl Entry {
    fn is_of(&self, who: &Association<'_>) -> bool {
        self.client == who.client && self.number == who.number
    }
}

/// The server: who has which address.
pub struct Server {
    net: Cidr,
    told: dhcp6::Server,
    entries: Vec<Entry>,
    /// The time of the message under way, in seconds since 1970.
    now: u64,
}

/// A client as a word: its identification in hex, and its association's number.
fn word(client: &[u8], number: [u8; 4]) -> String {
    let hex: Vec<String> = client.iter().map(|b| format!("{b:02x}")).collect();
    format!("{}/{}", hex.join(":"), u32::from_be_bytes(number))
}

fn from_word(word: &str) -> Option<(Vec<u8>, [u8; 4])> {
    let (hex, number) = word.split_once('/')?;
    let client = hex.split(':').map(|b| u8::from_str_radix(b, 16).ok()).collect::<Option<_>>()?;
    Some((client, number.parse::<u32>().ok()?.to_be_bytes()))
}

impl Server {
    /// A server for a network, with the leases that it gave before; its card's address is `mac`. `None` without IPv6.
    pub fn new(config: &NetworkConfig, mac: [u8; 6], before: &[Lease]) -> Option<Server> {
        let net = config.ipv6?;
        let IpAddr::V6(gateway) = net.gateway() else { return None };
        let entries = before
            .iter()
            .take(MOST)
            .filter_map(|l| match (from_word(&l.mac), l.address) {
                (Some((client, number)), IpAddr::V6(address)) if net.contains(l.address) => {
                    Some(Entry { client, number, address, expires: l.expires, bound: true })
                }
                _ => None,
            })
            .collect();
        let told = dhcp6::Server {
            mac,
            valid: LEASE,
            dns: Some(gateway),
            search: config.domain.iter().cloned().collect(),
        };
        Some(Server { net, told, entries, now: 0 })
    }

    /// The leases that are in use at `now`, in seconds since 1970.
    pub fn leases(&self, now: u64) -> Vec<Lease> {
        let in_use = self.entries.iter().filter(|e| e.bound && e.expires > now);
        in_use
            .map(|e| Lease {
                expires: e.expires,
                mac: word(&e.client, e.number),
                address: e.address.into(),
                name: None,
            })
            .collect()
    }

    /// A client's message at `now`, in seconds since 1970. `None` if there is nothing to say.
    pub fn handle(&mut self, request: &[u8], now: u64) -> Option<Vec<u8>> {
        self.now = now;
        self.entries.retain(|e| e.expires > now);
        let told = self.told.clone();
        dhcp6::answer(&told, self, request)
    }

    fn is_free(&self, a: Ipv6Addr, who: &Association<'_>) -> bool {
        self.in_range(a) && !self.entries.iter().any(|e| e.address == a && !e.is_of(who))
    }

    fn in_range(&self, a: Ipv6Addr) -> bool {
        let at = |n: u32| self.net.nth(u128::from(n));
        (at(RANGE.0)..=at(RANGE.1)).contains(&IpAddr::V6(a)) && IpAddr::V6(a) != self.net.gateway()
    }

    fn choose(&self, who: &Association<'_>, wanted: Option<Ipv6Addr>) -> Option<Ipv6Addr> {
        if let Some(e) = self.entries.iter().find(|e| e.is_of(who)) {
            return Some(e.address);
        }
        // The same client begins at the same place each time (FNV-1a), so that it keeps its address when nobody remembers it.
        let seed = who
            .client
            .iter()
            .chain(&who.number)
            .fold(0x811c_9dc5u32, |h, &b| (h ^ u32::from(b)).wrapping_mul(0x0100_0193));
        let span = RANGE.1 - RANGE.0 + 1;
        let tries = (0..=MOST as u32).map(|n| RANGE.0 + seed.wrapping_add(n) % span);
        let address = |n: u32| match self.net.nth(u128::from(n)) {
            IpAddr::V6(a) => Some(a),
            IpAddr::V4(_) => None,
        };
        wanted.into_iter().chain(tries.filter_map(address)).find(|&a| self.is_free(a, who))
    }
}

impl Addresses for Server {
    fn give(
        &mut self,
        who: &Association<'_>,
        _index: usize,
        wanted: Option<Ipv6Addr>,
        bind: bool,
    ) -> Option<Ipv6Addr> {
        let address = self.choose(who, wanted)?;
        let expires = self.now + if bind { u64::from(LEASE) } else { OFFERED };
        let full = self.entries.len() >= MOST;
        match self.entries.iter_mut().find(|e| e.is_of(who)) {
            // An offer does not shorten what the client has.
            Some(e) if e.bound && !bind => {}
            Some(e) => (e.expires, e.bound) = (expires, bind),
            None if full => return None,
            None => self.entries.push(Entry {
                client: who.client.to_vec(),
                number: who.number,
                address,
                expires,
                bound: bind,
            }),
        }
        Some(address)
    }

    fn release(&mut self, who: &Association<'_>, declined: bool) {
        if declined && let Some(e) = self.entries.iter_mut().find(|e| e.is_of(who)) {
            // Somebody uses the address who does not have it from us: leave it alone for a while.
            (e.client, e.bound, e.expires) = (Vec::new(), false, self.now + u64::from(LEASE));
        }
        self.entries.retain(|e| !e.is_of(who));
    }

    fn on_link(&self, address: Ipv6Addr) -> bool {
        self.net.contains(address.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dhcp6::testing::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

    fn server() -> Server {
        let mut c = NetworkConfig::new("lab", None);
        c.ipv6 = Some("fd00:9::/64".parse().unwrap());
        c.domain = Some("lab.test".into());
        c.check().unwrap();
        Server::new(&c, MAC, &[]).unwrap()
    }

    /// The address in an answer, if there is one.
    fn given(answer: &[u8]) -> Option<Ipv6Addr> {
        let ia = value(answer, IA_NA)?;
        let raw: [u8; 16] = ia.get(16..32)?.try_into().ok()?;
        (ia[12..14] == [0, 5]).then(|| raw.into())
    }

    #[test]
    fn clients_get_keep_and_give_back_addresses() {
        let mut s = server();
        let solicit = |id: &[u8]| message(SOLICIT, &[(CLIENT_ID, id), (IA_NA, &IA)]);
        let offer = s.handle(&solicit(b"one"), 100).unwrap();
        let id = value(&offer, SERVER_ID).unwrap();
        let one = given(&offer).unwrap();
        assert!(s.net.contains(one.into()) && s.leases(100).is_empty());
        assert_eq!(value(&offer, DOMAINS).unwrap(), b"\x03lab\x04test\0");
        let ask = |kind: u8, who: &[u8], id: &[u8]| {
            message(kind, &[(CLIENT_ID, who), (SERVER_ID, id), (IA_NA, &IA)])
        };
        assert_eq!(given(&s.handle(&ask(REQUEST, b"one", &id), 101).unwrap()), Some(one));
        let two = given(&s.handle(&ask(REQUEST, b"two", &id), 102).unwrap()).unwrap();
        assert_ne!(one, two);
        let leases = s.leases(102);
        assert_eq!(
            leases.iter().map(|l| l.address).collect::<Vec<IpAddr>>(),
            [IpAddr::from(one), two.into()]
        );
        // After a restart the first still has it, and nobody else gets it by asking.
        let mut again = Server::new(
            &NetworkConfig { ipv6: Some(s.net), ..NetworkConfig::new("lab", None) },
            MAC,
            &leases,
        )
        .unwrap();
        assert_eq!(given(&again.handle(&ask(RENEW, b"one", &id), 200).unwrap()), Some(one));
        let mut wish = IA.to_vec();
        put(&mut wish, IA_ADDRESS, &[&one.octets()[..], &[0; 8]].concat());
        let m = message(SOLICIT, &[(CLIENT_ID, b"three"), (IA_NA, &wish)]);
        assert_ne!(given(&again.handle(&m, 200).unwrap()), Some(one));
        s.handle(&ask(RELEASE, b"one", &id), 103).unwrap();
        assert_eq!(given(&s.handle(&m, 104).unwrap()), Some(one), "it was given back, and may be wished for");
        // Declined: not given again for a while.
        s.handle(&ask(DECLINE, b"two", &id), 105).unwrap();
        assert_ne!(given(&s.handle(&ask(REQUEST, b"two", &id), 106).unwrap()), Some(two));
        // An address that is the host's or outside the range is not given whoever wishes for it.
        for bad in ["fd00:9::1", "fd00:8::1:5"] {
            let mut wish = IA.to_vec();
            put(&mut wish, IA_ADDRESS, &[&bad.parse::<Ipv6Addr>().unwrap().octets()[..], &[0; 8]].concat());
            let m = message(SOLICIT, &[(CLIENT_ID, bad.as_bytes()), (IA_NA, &wish)]);
            let got = given(&s.handle(&m, 107).unwrap()).unwrap();
            assert!(got.to_string() != bad && s.in_range(got));
        }
    }

    #[test]
    fn a_crowd_does_not_fill_the_memory() {
        let mut s = server();
        let id = [&[0, 3, 0, 1][..], &MAC].concat();
        let mut refused = 0;
        for n in 0..MOST as u32 + 10 {
            let m = message(REQUEST, &[(CLIENT_ID, &n.to_be_bytes()), (SERVER_ID, &id), (IA_NA, &IA)]);
            refused += u32::from(given(&s.handle(&m, 5).unwrap()).is_none());
        }
        assert_eq!((refused, s.leases(5).len()), (10, MOST));
        let m = message(REQUEST, &[(CLIENT_ID, b"late"), (SERVER_ID, &id), (IA_NA, &IA)]);
        assert!(given(&s.handle(&m, 5 + u64::from(LEASE)).unwrap()).is_some());
    }
}
