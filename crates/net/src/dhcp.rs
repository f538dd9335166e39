//! DHCP's messages (RFC 2131, RFC 2132): what the servers for one guest and for a network both read and write.

use std::net::Ipv4Addr;

const COOKIE: [u8; 4] = [99, 130, 83, 99];
/// Bytes before the options.
const FIXED: usize = 240;
/// RFC 1542 section 2.1: no shorter than BOOTP's messages.
const SHORTEST: usize = 300;

/// Kinds of messages (RFC 2132 section 9.6).
pub mod kind {
    pub const DISCOVER: u8 = 1;
    pub const OFFER: u8 = 2;
    pub const REQUEST: u8 = 3;
    pub const DECLINE: u8 = 4;
    pub const ACK: u8 = 5;
    pub const NAK: u8 = 6;
    pub const RELEASE: u8 = 7;
    pub const INFORM: u8 = 8;
}

/// Options (RFC 2132, RFC 3397).
pub mod option {
    pub const NETMASK: u8 = 1;
    pub const ROUTER: u8 = 3;
    pub const NAME_SERVER: u8 = 6;
    pub const HOST_NAME: u8 = 12;
    pub const DOMAIN: u8 = 15;
    pub const MTU: u8 = 26;
    pub const WANTED: u8 = 50;
    pub const LEASE: u8 = 51;
    pub const KIND: u8 = 53;
    pub const SERVER: u8 = 54;
    pub const CLIENT: u8 = 61;
    pub const BOOT_SERVER: u8 = 66;
    pub const BOOT_FILE: u8 = 67;
    pub const SEARCH: u8 = 119;
}

/// A client's message.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    raw: &'a [u8],
    /// What it is ([`kind`]).
    pub kind: u8,
    /// The card's address.
    pub mac: [u8; 6],
    /// The address that the client has and uses; all zeroes if none.
    pub client: Ipv4Addr,
    /// The server that it means.
    pub server: Option<Ipv4Addr>,
    /// The address that it asks for.
    pub wanted: Option<Ipv4Addr>,
}

fn address(raw: &[u8]) -> Option<Ipv4Addr> {
    Some(Ipv4Addr::from(<[u8; 4]>::try_from(raw).ok()?))
}

/// Find an option; the first that is cut short ends the search.
fn find(options: &[u8], wanted: u8) -> Option<&[u8]> {
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

impl<'a> Request<'a> {
    /// Take a message apart; `None` for what is no request over Ethernet.
    pub fn parse(raw: &'a [u8]) -> Option<Request<'a>> {
        if raw.len() < FIXED || raw[..3] != [1, 1, 6] || raw[236..240] != COOKIE {
            return None;
        }
        let options = &raw[FIXED..];
        Some(Request {
            raw,
            kind: *find(options, option::KIND)?.first()?,
            mac: raw[28..34].try_into().ok()?,
            client: address(&raw[12..16])?,
            server: find(options, option::SERVER).and_then(address),
            wanted: find(options, option::WANTED).and_then(address),
        })
    }

    /// Whether the client hears only what is sent to all, because it has no address yet (RFC 2131 section 4.1).
    pub fn needs_broadcast(&self) -> bool {
        self.raw[10] & 0x80 != 0
    }

    /// The value of an option.
    pub fn option(&self, code: u8) -> Option<&'a [u8]> {
        find(&self.raw[FIXED..], code)
    }
}

/// An answer.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// The message.
    pub message: Vec<u8>,
    /// To this address; to all if not given.
    pub to: Option<Ipv4Addr>,
}

/// An answer that is being written.
pub struct Reply {
    message: Vec<u8>,
    to: Option<Ipv4Addr>,
}

impl Reply {
    /// The answer of `kind` to a request, by `server`, which gives the client the address `yours` (all zeroes for none).
    pub fn new(request: &Request<'_>, kind: u8, server: Ipv4Addr, yours: Ipv4Addr) -> Reply {
        let mut m = vec![0; FIXED];
        m[..3].copy_from_slice(&[2, 1, 6]);
        // Transaction, flags and hardware address come back.
        for range in [4..8, 10..12, 28..44] {
            m[range.clone()].copy_from_slice(&request.raw[range]);
        }
        m[236..240].copy_from_slice(&COOKIE);
        let refusal = kind == kind::NAK;
        if !refusal {
            m[12..16].copy_from_slice(&request.client.octets());
            m[16..20].copy_from_slice(&yours.octets());
            m[20..24].copy_from_slice(&server.octets());
        }
        let to = (!refusal && !request.client.is_unspecified()).then_some(request.client);
        let mut reply = Reply { message: m, to };
        reply.put(option::KIND, &[kind]);
        reply.put(option::SERVER, &server.octets());
        // RFC 6842 section 3.
        if let Some(id) = request.option(option::CLIENT) {
            reply.put(option::CLIENT, id);
        }
        reply
    }

    /// The file that the client boots from, on this server. It stands where BOOTP has it, too, if it fits (RFC 2131 section 2).
    pub fn boot_file(&mut self, server: Ipv4Addr, file: &str) {
        if file.len() < 128 {
            self.message[108..108 + file.len()].copy_from_slice(file.as_bytes());
        }
        self.put(option::BOOT_SERVER, server.to_string().as_bytes());
        self.put(option::BOOT_FILE, file.as_bytes());
    }

    /// Add an option; one that is too long is left out.
    pub fn put(&mut self, code: u8, value: &[u8]) {
        if let Ok(len) = u8::try_from(value.len()) {
            self.message.extend_from_slice(&[code, len]);
            self.message.extend_from_slice(value);
        }
    }

    /// The whole answer.
    pub fn finish(mut self) -> Answer {
        self.message.push(255);
        if self.message.len() < SHORTEST {
            self.message.resize(SHORTEST, 0);
        }
        Answer { message: self.message, to: self.to }
    }
}

/// Domain names in DNS form (RFC 3397, RFC 8106).
pub fn names(list: &[String]) -> Vec<u8> {
    let mut out = Vec::new();
    for name in list {
        for label in name.split('.').filter(|l| l.len() <= 63) {
            out.push(label.len() as u8);
            out.extend_from_slice(label.as_bytes());
        }
        out.push(0);
    }
    out
}

/// Messages for tests.
#[cfg(test)]
pub mod testing {
    use super::{Answer, COOKIE, FIXED, find};

    /// A request of `kind` from the card 52:54:00:00:00:`mac`, with these options behind the first.
    pub fn request(kind: u8, mac: u8, options: &[u8]) -> Vec<u8> {
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

    /// An answer's option.
    pub fn value(a: &Answer, code: u8) -> Option<&[u8]> {
        find(&a.message[FIXED..], code)
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{request, value};
    use super::*;

    #[test]
    fn what_a_request_says_comes_back_in_the_answer() {
        let mut m =
            request(kind::REQUEST, 7, &[0, 50, 4, 10, 0, 0, 9, 54, 4, 10, 0, 0, 1, 12, 2, b'v', b'm']);
        m[10] = 0x80;
        let r = Request::parse(&m).unwrap();
        assert_eq!((r.kind, r.mac[5], r.client), (kind::REQUEST, 7, Ipv4Addr::UNSPECIFIED));
        assert_eq!((r.wanted, r.server), (Some([10, 0, 0, 9].into()), Some([10, 0, 0, 1].into())));
        assert_eq!(r.option(option::HOST_NAME), Some(&b"vm"[..]));
        let mut reply = Reply::new(&r, kind::ACK, [10, 0, 0, 1].into(), [10, 0, 0, 9].into());
        reply.boot_file([10, 0, 0, 1].into(), "pxe.0");
        reply.put(option::DOMAIN, &[b'x'; 300]);
        let a = reply.finish();
        assert_eq!((a.message[10], a.message[33], &a.message[4..8]), (0x80, 7, &[1, 2, 3, 7][..]));
        assert_eq!((&a.message[16..20], a.to), (&[10, 0, 0, 9][..], None));
        assert_eq!((&a.message[108..114], value(&a, 67)), (&b"pxe.0\0"[..], Some(&b"pxe.0"[..])));
        assert_eq!((value(&a, option::DOMAIN), a.message.len() >= SHORTEST), (None, true));
        m[12..16].copy_from_slice(&[10, 0, 0, 9]);
        let r = Request::parse(&m).unwrap();
        let to = |kind| Reply::new(&r, kind, [10, 0, 0, 1].into(), r.client).finish().to;
        assert_eq!([to(kind::ACK), to(kind::NAK)], [Some([10, 0, 0, 9].into()), None]);
    }

    #[test]
    fn noise_is_no_request() {
        let m = request(kind::DISCOVER, 1, &[12, 1, b'a']);
        for n in 0..m.len() {
            if let Some(r) = Request::parse(&m[..n]) {
                assert!(r.option(option::HOST_NAME).is_none_or(|v| v == b"a"));
            }
        }
        for (at, value) in [(0, 2), (1, 6), (2, 16), (236, 0), (240, 55)] {
            let mut bad = m.clone();
            bad[at] = value;
            assert!(Request::parse(&bad).is_none(), "{at}");
        }
    }
}
