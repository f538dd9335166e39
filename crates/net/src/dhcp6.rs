//! A DHCPv6 server's messages (RFC 8415). Who gets which address is its [`Addresses`]' business.

use crate::dhcp::names;
use std::net::Ipv6Addr;

pub(crate) const SOLICIT: u8 = 1;
pub(crate) const ADVERTISE: u8 = 2;
pub(crate) const REQUEST: u8 = 3;
pub(crate) const CONFIRM: u8 = 4;
pub(crate) const RENEW: u8 = 5;
pub(crate) const REBIND: u8 = 6;
pub(crate) const REPLY: u8 = 7;
pub(crate) const RELEASE: u8 = 8;
pub(crate) const DECLINE: u8 = 9;
pub(crate) const INFORMATION_REQUEST: u8 = 11;

pub(crate) const CLIENT_ID: u16 = 1;
pub(crate) const SERVER_ID: u16 = 2;
pub(crate) const IA_NA: u16 = 3;
pub(crate) const IA_ADDRESS: u16 = 5;
pub(crate) const STATUS: u16 = 13;
pub(crate) const RAPID_COMMIT: u16 = 14;
pub(crate) const DNS: u16 = 23;
pub(crate) const DOMAINS: u16 = 24;

// Status codes (RFC 8415 section 21.13).
pub(crate) const SUCCESS: u16 = 0;
pub(crate) const NO_ADDRESS: u16 = 2;
pub(crate) const NOT_ON_LINK: u16 = 4;

/// Options that are looked at; a client has a handful.
const MOST_OPTIONS: usize = 64;
/// Longest identification of a client (RFC 8415 section 11.1).
const MOST_ID: usize = 130;
/// Associations that get an address or a refusal; the answer fits a packet.
const MOST_ASSOCIATIONS: usize = 16;

/// A client's association: its identification, and the association's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Association<'a> {
    /// The client's DUID.
    pub client: &'a [u8],
    /// The association's number.
    pub number: [u8; 4],
}

/// Who gets which address.
pub trait Addresses {
    /// The address of an association, which is the message's number `index`; it would like to have `wanted`. It is only offered unless
    /// `bind`. `None` if there is none.
    fn give(
        &mut self,
        who: &Association<'_>,
        index: usize,
        wanted: Option<Ipv6Addr>,
        bind: bool,
    ) -> Option<Ipv6Addr>;

    /// An association's address is given back, or somebody else uses it (`declined`).
    fn release(&mut self, who: &Association<'_>, declined: bool) {
        let _ = (who, declined);
    }

    /// Whether an address is of the network.
    fn on_link(&self, address: Ipv6Addr) -> bool;
}

/// What a server tells its clients beside addresses.
#[derive(Debug, Clone, Default)]
pub struct Server {
    /// Its Ethernet address, of which it makes its identification.
    pub mac: [u8; 6],
    /// Seconds that addresses are valid for; they are preferred half as long.
    pub valid: u32,
    /// The name server.
    pub dns: Option<Ipv6Addr>,
    /// Domains that are searched.
    pub search: Vec<String>,
}

/// Code and value of each option; ends at the first that is cut short.
fn options(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let (&[c0, c1, l0, l1], tail) = rest.split_first_chunk()?;
        let (value, more) = tail.split_at_checked(usize::from(u16::from_be_bytes([l0, l1])))?;
        rest = more;
        Some((u16::from_be_bytes([c0, c1]), value))
    })
    .take(MOST_OPTIONS)
}

pub(crate) fn put(m: &mut Vec<u8>, code: u16, value: &[u8]) {
    m.extend_from_slice(&code.to_be_bytes());
    m.extend_from_slice(&(value.len() as u16).to_be_bytes());
    m.extend_from_slice(value);
}

fn status(code: u16) -> [u8; 2] {
    code.to_be_bytes()
}

/// An association's number and the first address in it, if `option` is one for plain addresses.
fn association(option: (u16, &[u8])) -> Option<([u8; 4], Option<Ipv6Addr>)> {
    let (IA_NA, value) = option else { return None };
    let (number, rest) = value.split_first_chunk::<4>()?;
    let inner = rest.get(8..)?;
    let address = |(code, v): (u16, &[u8])| {
        (code == IA_ADDRESS).then_some(())?;
        v.first_chunk::<16>().map(|raw| Ipv6Addr::from(*raw))
    };
    Some((*number, options(inner).find_map(address)))
}

/// Answer a client's message; `None` if there is nothing to say.
pub fn answer(server: &Server, addresses: &mut dyn Addresses, request: &[u8]) -> Option<Vec<u8>> {
    let (&[kind, t0, t1, t2], body) = request.split_first_chunk()?;
    // A DUID of type 3, made of the link-layer address.
    let mut own_id = vec![0, 3, 0, 1];
    own_id.extend_from_slice(&server.mac);
    let find = |wanted| options(body).find(|(code, _)| *code == wanted).map(|(_, value)| value);
    let client = find(CLIENT_ID).filter(|id| !id.is_empty() && id.len() <= MOST_ID);
    let meant = find(SERVER_ID);
    let rapid = kind == SOLICIT && find(RAPID_COMMIT).is_some();
    // Who must name us and who must not: RFC 8415 section 16.
    let fits = match kind {
        SOLICIT | CONFIRM | REBIND => client.is_some() && meant.is_none(),
        REQUEST | RENEW | RELEASE | DECLINE => client.is_some() && meant == Some(&own_id),
        // RFC 8415 section 16.12.
        INFORMATION_REQUEST => meant.is_none_or(|s| s == own_id) && find(IA_NA).is_none(),
        _ => false,
    };
    if !fits {
        return None;
    }
    let reply = if kind == SOLICIT && !rapid { ADVERTISE } else { REPLY };
    let mut m = vec![reply, t0, t1, t2];
    put(&mut m, SERVER_ID, &own_id);
    if let Some(id) = client {
        put(&mut m, CLIENT_ID, id);
    }
    let id = client.unwrap_or_default();
    let associations = options(body).filter_map(association).take(MOST_ASSOCIATIONS);
    match kind {
        CONFIRM => {
            // Without an address there is nothing to say (RFC 8415 section 18.3.3).
            let mut asked = associations.filter_map(|(_, a)| a).peekable();
            asked.peek()?;
            let fits = asked.all(|a| addresses.on_link(a));
            put(&mut m, STATUS, &status(if fits { SUCCESS } else { NOT_ON_LINK }));
            return Some(m);
        }
        RELEASE | DECLINE => {
            for (number, _) in associations {
                addresses.release(&Association { client: id, number }, kind == DECLINE);
            }
            put(&mut m, STATUS, &status(SUCCESS));
            return Some(m);
        }
        _ => {}
    }
    if rapid {
        put(&mut m, RAPID_COMMIT, &[]);
    }
    if kind != INFORMATION_REQUEST {
        let preferred = server.valid / 2;
        for (n, (number, wanted)) in associations.enumerate() {
            // It asks again after half the time, and others after most of it.
            let mut ia = number.to_vec();
            ia.extend_from_slice(&(preferred / 2).to_be_bytes());
            ia.extend_from_slice(&(preferred / 5 * 4).to_be_bytes());
            match addresses.give(&Association { client: id, number }, n, wanted, reply == REPLY) {
                Some(a) => {
                    let mut address = a.octets().to_vec();
                    address.extend_from_slice(&preferred.to_be_bytes());
                    address.extend_from_slice(&server.valid.to_be_bytes());
                    put(&mut ia, IA_ADDRESS, &address);
                    // What it has had and shall not have any more is over (RFC 8415 sections 18.3.4 and 18.3.5).
                    if let Some(old) = wanted.filter(|w| *w != a && matches!(kind, RENEW | REBIND)) {
                        put(&mut ia, IA_ADDRESS, &[&old.octets()[..], &[0; 8]].concat());
                    }
                }
                None => put(&mut ia, STATUS, &status(NO_ADDRESS)),
            }
            put(&mut m, IA_NA, &ia);
        }
    }
    if let Some(dns) = server.dns {
        put(&mut m, DNS, &dns.octets());
    }
    if !server.search.is_empty() {
        put(&mut m, DOMAINS, &names(&server.search));
    }
    Some(m)
}

/// Messages for tests.
#[cfg(test)]
pub mod testing {
    pub(crate) use super::{
        ADVERTISE, CLIENT_ID, CONFIRM, DECLINE, DNS, DOMAINS, IA_ADDRESS, IA_NA, INFORMATION_REQUEST,
        RAPID_COMMIT, RELEASE, RENEW, REPLY, REQUEST, SERVER_ID, SOLICIT, STATUS, put,
    };

    /// A client's message with these options.
    pub fn message(kind: u8, parts: &[(u16, &[u8])]) -> Vec<u8> {
        let mut m = vec![kind, 1, 2, 3];
        parts.iter().for_each(|(code, value)| put(&mut m, *code, value));
        m
    }

    /// All options of an answer.
    pub fn all(answer: &[u8]) -> Vec<(u16, Vec<u8>)> {
        super::options(&answer[4..]).map(|(c, v)| (c, v.to_vec())).collect()
    }

    /// The value of an answer's option.
    pub fn value(answer: &[u8], code: u16) -> Option<Vec<u8>> {
        all(answer).into_iter().find(|(c, _)| *c == code).map(|(_, v)| v)
    }

    /// An association without an address in it.
    pub const IA: [u8; 12] = [9, 9, 9, 9, 0, 0, 0, 0, 0, 0, 0, 0];
}
