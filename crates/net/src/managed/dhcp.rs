//! The built-in DHCP server of a network (RFC 2131, RFC 2132).

use super::config::NetworkConfig;
use super::leases::Lease;
use crate::MacAddr;
use std::net::{IpAddr, Ipv4Addr};

const COOKIE: [u8; 4] = [99, 130, 83, 99];
/// Bytes before the options.
const FIXED: usize = 240;
/// Seconds that an address is given for.
pub const LEASE: u32 = 3600;
/// Seconds that an offered address is kept for.
const OFFERED: u64 = 60;
/// Most leases, whatever the network has room for.
const MOST: usize = 4096;

const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const DECLINE: u8 = 4;
const ACK: u8 = 5;
const NAK: u8 = 6;
const RELEASE: u8 = 7;
const INFORM: u8 = 8;

/// An answer.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// The message.
    pub message: Vec<u8>,
    /// To this address; to all if not given.
    pub to: Option<Ipv4Addr>,
}

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

/// Find an option.
fn option(options: &[u8], wanted: u8) -> Option<&[u8]> {
    let mut rest = options;
    loop {
        match *rest.first()? {
            0 => rest = &rest[1..],
            255 => return None,
            code => {
                let len = usize::from(*rest.get(1)?);
                let value = rest.get(2..2 + len)?;
                if code == wanted {
                    return Some(value);
                }
                rest = &rest[2 + len..];
            }
        }
    }
}

fn address(raw: &[u8]) -> Option<Ipv4Addr> {
    Some(Ipv4Addr::from(<[u8; 4]>::try_from(raw).ok()?))
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
        if request.len() < FIXED || request[..3] != [1, 1, 6] || request[236..240] != COOKIE {
            return None;
        }
        let mac: [u8; 6] = request[28..34].try_into().ok()?;
        MacAddr::new(mac).ok()?;
        let options = &request[FIXED..];
        let client = address(&request[12..16])?;
        let kind = *option(options, 53)?.first()?;
        let server = option(options, 54).and_then(address);
        let wanted = option(options, 50).and_then(address);
        let name = option(options, 12)
            .and_then(|n| std::str::from_utf8(n).ok())
            .map(|n| n.trim_end_matches('\0').to_owned())
            .filter(|n| super::config::valid_domain(n) && !n.contains('.'));
        let name = self.settled(mac).and_then(|h| h.name.clone()).or(name);
        let (reply, yours) = match kind {
            DISCOVER => {
                let a = self.choose(mac, wanted, now)?;
                self.keep(mac, a, now, false, name).then_some(())?;
                (OFFER, a)
            }
            REQUEST if server.is_some_and(|s| s != self.gateway) => {
                // It took another server's offer.
                self.entries.retain(|e| e.mac != mac || e.bound);
                return None;
            }
            REQUEST => {
                let a = wanted.unwrap_or(client);
                if self.may_have(mac, a, now) && self.keep(mac, a, now, true, name) {
                    (ACK, a)
                } else {
                    (NAK, Ipv4Addr::UNSPECIFIED)
                }
            }
            INFORM => (ACK, Ipv4Addr::UNSPECIFIED),
            RELEASE => {
                self.entries.retain(|e| e.mac != mac || e.address != client);
                return None;
            }
            DECLINE => {
                // Somebody uses the address who does not have it from us: leave it alone for a while.
                let a = wanted?;
                if let Some(e) = self.entries.iter_mut().find(|e| e.mac == mac && e.address == a) {
                    e.mac = [2, 0, 0, 0, 0, 0];
                    (e.expires, e.bound) = (now + u64::from(LEASE), false);
                }
                return None;
            }
            _ => return None,
        };
        Some(self.message(request, reply, yours, client, kind == INFORM))
    }

    fn message(&self, request: &[u8], reply: u8, yours: Ipv4Addr, client: Ipv4Addr, inform: bool) -> Answer {
        let mut m = vec![0; FIXED];
        m[..3].copy_from_slice(&[2, 1, 6]);
        m[4..8].copy_from_slice(&request[4..8]);
        m[10..12].copy_from_slice(&request[10..12]);
        m[28..44].copy_from_slice(&request[28..44]);
        m[236..240].copy_from_slice(&COOKIE);
        if reply != NAK {
            m[12..16].copy_from_slice(&request[12..16]);
            m[16..20].copy_from_slice(&yours.octets());
            m[20..24].copy_from_slice(&self.gateway.octets());
        }
        let mut put = |code: u8, value: &[u8]| {
            if let Ok(len) = u8::try_from(value.len()) {
                m.extend_from_slice(&[code, len]);
                m.extend_from_slice(value);
            }
        };
        put(53, &[reply]);
        put(54, &self.gateway.octets());
        if reply != NAK {
            if !inform {
                put(51, &LEASE.to_be_bytes());
            }
            put(1, &self.mask.octets());
            if self.config.forward != super::Forward::None {
                put(3, &self.gateway.octets());
            }
            put(6, &self.gateway.octets());
            if let Some(d) = &self.config.domain {
                put(15, d.as_bytes());
            }
        }
        m.push(255);
        // RFC 1542 section 2.1: no shorter than BOOTP's messages.
        if m.len() < 300 {
            m.resize(300, 0);
        }
        let to_all = reply == NAK || client.is_unspecified();
        Answer { message: m, to: (!to_all).then_some(client) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(kind: u8, mac: u8, options: &[u8]) -> Vec<u8> {
        let mut m = vec![0; FIXED];
        m[..3].copy_from_slice(&[1, 1, 6]);
        m[4..8].copy_from_slice(&[1, 2, 3, mac]);
        m[28..34].copy_from_slice(&[0x52, 0x54, 0, 0, 0, mac]);
        m[236..240].copy_from_slice(&COOKIE);
        m.extend([53, 1, kind]);
        m.extend(options);
        m.push(255);
        m
    }

    fn yours(a: &Answer) -> (u8, [u8; 4]) {
        (option(&a.message[FIXED..], 53).unwrap()[0], a.message[16..20].try_into().unwrap())
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
        assert_eq!(option(&ack.message[FIXED..], 1), Some(&[255, 255, 255, 248][..]));
        assert_eq!(option(&ack.message[FIXED..], 3), Some(&[10, 9, 0, 1][..]));
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
