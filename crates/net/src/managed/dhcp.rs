//! The built-in DHCP server of a network.

use super::config::NetworkConfig;
use super::leases::Lease;
use crate::MacAddr;
use crate::dhcp::{Answer, Reply, Request, kind, option};
use std::net::{IpAddr, Ipv4Addr};

/// Seconds that an address is given for.
pub const LEASE: u32 = 3600;
/// Seconds that an offered address is kept for.
const OFFERED: u64 = 60;
/// Most leases, whatever the network has room for.
const MOST: usize = 4096;

struct Entry {
    mac: [u8; 6],
    address: Ipv4Addr,
    expires: u64,
    name: Option<String>,
    /// The guest took it.
    bound: bool,
}

/// The server: who has which address.
pub struct Server {
    config: NetworkConfig,
    gateway: Ipv4Addr,
    mask: Ipv4Addr,
    range: (Ipv4Addr, Ipv4Addr),
    entries: Vec<Entry>,
}

impl Server {
    /// A server for a network, with the leases that it gave before. `None` without IPv4.
    pub fn new(config: &NetworkConfig, before: &[Lease]) -> Option<Server> {
        let net = config.ipv4?;
        let IpAddr::V4(gateway) = net.gateway() else { return None };
        let entries = before
            .iter()
            .take(MOST)
            .filter_map(|l| match (l.mac.parse::<MacAddr>(), l.address) {
                (Ok(mac), IpAddr::V4(a)) if net.contains(l.address) => Some(Entry {
                    mac: mac.bytes(),
                    address: a,
                    expires: l.expires,
                    name: l.name.clone(),
                    bound: true,
                }),
                _ => None,
            })
            .collect();
        let mask = u32::MAX.checked_shl(32 - u32::from(net.prefix)).unwrap_or(0);
        Some(Server { config: config.clone(), gateway, mask: mask.into(), range: config.range()?, entries })
    }

    /// The leases that are in use at `now`, in seconds since 1970.
    pub fn leases(&self, now: u64) -> Vec<Lease> {
        let in_use = self.entries.iter().filter(|e| e.bound && e.expires > now);
        in_use
            .map(|e| Lease {
                expires: e.expires,
                mac: MacAddr::new(e.mac).map_or_else(|_| String::new(), |m| m.to_string()),
                address: e.address.into(),
                name: e.name.clone(),
            })
            .collect()
    }

    fn settled(&self, mac: [u8; 6]) -> Option<&super::config::StaticHost> {
        self.config.hosts.iter().find(|h| h.mac.bytes() == mac)
    }

    /// Whether a client may have an address.
    fn may_have(&self, mac: [u8; 6], a: Ipv4Addr, now: u64) -> bool {
        if let Some(h) = self.settled(mac) {
            return h.address == a;
        }
        (self.range.0..=self.range.1).contains(&a)
            && a != self.gateway
            && !self.config.hosts.iter().any(|h| h.address == a)
            && !self.entries.iter().any(|e| e.address == a && e.mac != mac && e.expires > now)
    }

    /// An address for a client: the one it had, the one it asks for, or a free one.
    fn choose(&self, mac: [u8; 6], wanted: Option<Ipv4Addr>, now: u64) -> Option<Ipv4Addr> {
        if let Some(h) = self.settled(mac) {
            return Some(h.address);
        }
        let had = self.entries.iter().find(|e| e.mac == mac).map(|e| e.address);
        had.into_iter().chain(wanted).find(|&a| self.may_have(mac, a, now)).or_else(|| {
            // Those not in use are at most as many tries away as there are that are.
            let (first, last) = (u32::from(self.range.0), u32::from(self.range.1));
            let tries = MOST as u32 + self.config.hosts.len() as u32 + 2;
            (first..=last).take(tries as usize).map(Ipv4Addr::from).find(|&a| self.may_have(mac, a, now))
        })
    }

    fn keep(&mut self, mac: [u8; 6], a: Ipv4Addr, now: u64, bound: bool, name: Option<String>) -> bool {
        self.entries.retain(|e| e.mac == mac || (e.address != a && e.expires > now));
        let expires = now + if bound { u64::from(LEASE) } else { OFFERED };
        let full = self.entries.len() >= MOST;
        match self.entries.iter_mut().find(|e| e.mac == mac) {
            // An offer does not shorten what the client has.
            Some(e) if !bound && e.bound && e.address == a => {}
            Some(e) => *e = Entry { mac, address: a, expires, name, bound },
            None if full => return false,
            None => self.entries.push(Entry { mac, address: a, expires, name, bound }),
        }
        true
    }

    /// A client's message at `now`, in seconds since 1970. `None` if there is nothing to say.
    pub fn handle(&mut self, request: &[u8], now: u64) -> Option<Answer> {
        let r = Request::parse(request)?;
        let mac = MacAddr::new(r.mac).ok()?.bytes();
        let name = r
            .option(option::HOST_NAME)
            .and_then(|n| std::str::from_utf8(n).ok())
            .map(|n| n.trim_end_matches('\0').to_owned())
            .filter(|n| super::config::valid_domain(n) && !n.contains('.'));
        let name = self.settled(mac).and_then(|h| h.name.clone()).or(name);
        let (reply, yours) = match r.kind {
            kind::DISCOVER => {
                let a = self.choose(mac, r.wanted, now)?;
                self.keep(mac, a, now, false, name).then_some(())?;
                (kind::OFFER, a)
            }
            kind::REQUEST if r.server.is_some_and(|s| s != self.gateway) => {
                // It took another server's offer.
                self.entries.retain(|e| e.mac != mac || e.bound);
                return None;
            }
            kind::REQUEST => {
                let a = r.wanted.unwrap_or(r.client);
                if self.may_have(mac, a, now) && self.keep(mac, a, now, true, name) {
                    (kind::ACK, a)
                } else {
                    (kind::NAK, Ipv4Addr::UNSPECIFIED)
                }
            }
            kind::INFORM => (kind::ACK, Ipv4Addr::UNSPECIFIED),
            kind::RELEASE => {
                self.entries.retain(|e| e.mac != mac || e.address != r.client);
                return None;
            }
            kind::DECLINE => {
                // Somebody uses the address who does not have it from us: leave it alone for a while.
                let a = r.wanted?;
                if let Some(e) = self.entries.iter_mut().find(|e| e.mac == mac && e.address == a) {
                    e.mac = [2, 0, 0, 0, 0, 0];
                    (e.expires, e.bound) = (now + u64::from(LEASE), false);
                }
                return None;
            }
            _ => return None,
        };
        let mut m = Reply::new(&r, reply, self.gateway, yours);
        if reply != kind::NAK {
            self.tell(&mut m, r.kind == kind::INFORM);
        }
        Some(m.finish())
    }

    /// What a client is to know.
    fn tell(&self, m: &mut Reply, inform: bool) {
        if !inform {
            m.put(option::LEASE, &LEASE.to_be_bytes());
        }
        m.put(option::NETMASK, &self.mask.octets());
        if self.config.forward != super::Forward::None {
            m.put(option::ROUTER, &self.gateway.octets());
        }
        m.put(option::NAME_SERVER, &self.gateway.octets());
        if let Some(d) = &self.config.domain {
            m.put(option::DOMAIN, d.as_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dhcp::testing::{request, value};
    use kind::*;

    fn yours(a: &Answer) -> (u8, [u8; 4]) {
        (value(a, 53).unwrap()[0], a.message[16..20].try_into().unwrap())
    }

    fn server(hosts: Vec<super::super::config::StaticHost>) -> Server {
        let mut c = NetworkConfig::new("lab", Some("10.9.0.0/29".parse().unwrap()));
        c.hosts = hosts;
        c.check().unwrap();
        Server::new(&c, &[]).unwrap()
    }

    #[test]
    fn a_client_gets_keeps_and_gives_back_an_address() {
        let mut s = server(vec![]);
        let offer = s.handle(&request(DISCOVER, 1, &[12, 2, b'v', b'm']), 100).unwrap();
        assert_eq!((yours(&offer), offer.to), ((OFFER, [10, 9, 0, 2]), None));
        assert_eq!(s.leases(100), []);
        let ack = s.handle(&request(REQUEST, 1, &[50, 4, 10, 9, 0, 2, 12, 2, b'v', b'm']), 101).unwrap();
        assert_eq!(yours(&ack), (ACK, [10, 9, 0, 2]));
        assert_eq!(value(&ack, 1), Some(&[255, 255, 255, 248][..]));
        assert_eq!(value(&ack, 3), Some(&[10, 9, 0, 1][..]));
        let l = s.leases(101);
        assert_eq!((l[0].name.as_deref(), l[0].expires), (Some("vm"), 101 + 3600));
        // Another one asks for the same: refused, and offered the next.
        assert_eq!(yours(&s.handle(&request(REQUEST, 2, &[50, 4, 10, 9, 0, 2]), 102).unwrap()).0, NAK);
        assert_eq!(yours(&s.handle(&request(DISCOVER, 2, &[]), 102).unwrap()), (OFFER, [10, 9, 0, 3]));
        // After a restart of the server the client still has it.
        let mut again = Server::new(&s.config, &l).unwrap();
        assert_eq!(yours(&again.handle(&request(DISCOVER, 1, &[]), 200).unwrap()), (OFFER, [10, 9, 0, 2]));
        let mut release = request(RELEASE, 1, &[]);
        release[12..16].copy_from_slice(&[10, 9, 0, 2]);
        assert_eq!(s.handle(&release, 103), None);
        assert_eq!(s.leases(103), []);
    }

    #[test]
    fn a_full_network_gives_no_more_until_leases_end() {
        let mut s = server(vec!["52:54:00:00:00:09,10.9.0.4,nine".parse().unwrap()]);
        let mut got = Vec::new();
        for mac in 1..=4 {
            let a = yours(&s.handle(&request(DISCOVER, mac, &[]), 0).unwrap()).1;
            s.handle(&request(REQUEST, mac, &[&[50, 4][..], &a].concat()), 0).unwrap();
            got.push(a[3]);
        }
        assert_eq!(got, [2, 3, 5, 6]);
        assert_eq!(s.handle(&request(DISCOVER, 5, &[]), 1), None);
        assert_eq!(yours(&s.handle(&request(DISCOVER, 9, &[]), 1).unwrap()).1, [10, 9, 0, 4]);
        assert!(s.handle(&request(DISCOVER, 5, &[]), 3601).is_some());
        let elsewhere = request(REQUEST, 6, &[54, 4, 1, 1, 1, 1, 50, 4, 10, 9, 0, 2]);
        assert_eq!(s.handle(&elsewhere, 3602), None);
    }

    #[test]
    fn noise_is_not_answered() {
        let mut s = server(vec![]);
        let good = request(DISCOVER, 1, &[12, 1, b'a']);
        for n in 0..good.len() {
            let _ = s.handle(&good[..n], 0);
        }
        for bad in [request(99, 1, &[]), request(DISCOVER, 1, &[12, 200])[..].to_vec(), vec![0; 300]] {
            let _ = s.handle(&bad, 0);
        }
        let mut group = good;
        group[28] = 1;
        assert_eq!(s.handle(&group, 0), None);
    }
}
