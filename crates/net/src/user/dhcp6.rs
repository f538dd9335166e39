//! DHCPv6 server for one guest (RFC 8415): the address that ports lead to, name server, domains.

use super::config::UserConfig;
use super::dhcp::names;
use crate::wire::Mac;
use std::net::Ipv6Addr;

const SOLICIT: u8 = 1;
const ADVERTISE: u8 = 2;
const REQUEST: u8 = 3;
const CONFIRM: u8 = 4;
const RENEW: u8 = 5;
const REBIND: u8 = 6;
const REPLY: u8 = 7;
const RELEASE: u8 = 8;
const DECLINE: u8 = 9;
const INFORMATION_REQUEST: u8 = 11;

const CLIENT_ID: u16 = 1;
const SERVER_ID: u16 = 2;
const IA_NA: u16 = 3;
const IA_ADDRESS: u16 = 5;
const STATUS: u16 = 13;
const RAPID_COMMIT: u16 = 14;
const DNS: u16 = 23;
const DOMAINS: u16 = 24;

// Status codes (RFC 8415 section 21.13).
const SUCCESS: u16 = 0;
const NO_ADDRESS: u16 = 2;
const NOT_ON_LINK: u16 = 4;

/// Seconds that an address is preferred and valid for.
const PREFERRED: u32 = 43_200;
const VALID: u32 = 86_400;
/// Options that are looked at; a client has a handful.
const MOST_OPTIONS: usize = 64;
/// Longest identification of a client (RFC 8415 section 11.1).
const MOST_ID: usize = 130;

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

fn put(m: &mut Vec<u8>, code: u16, value: &[u8]) {
    m.extend_from_slice(&code.to_be_bytes());
    m.extend_from_slice(&(value.len() as u16).to_be_bytes());
    m.extend_from_slice(value);
}

fn status(code: u16) -> [u8; 2] {
    code.to_be_bytes()
}

/// Whether all addresses in the associations are of the guest's network.
fn on_link(config: &UserConfig, request: &[u8]) -> bool {
    options(request)
        .filter(|(code, value)| *code == IA_NA && value.len() >= 12)
        .flat_map(|(_, value)| options(&value[12..]))
        .filter(|(code, _)| *code == IA_ADDRESS)
        .all(|(_, value)| {
            let raw = value.first_chunk::<16>();
            raw.is_some_and(|r| config.contains6(Ipv6Addr::from(*r)))
        })
}

/// Answer a client's message; `None` if there is nothing to say. `mac` is the server's.
pub fn answer(config: &UserConfig, request: &[u8], mac: &Mac) -> Option<Vec<u8>> {
    let (&[kind, t0, t1, t2], body) = request.split_first_chunk()?;
    // A DUID of type 3, made of the link-layer address.
    let mut own_id = vec![0, 3, 0, 1];
    own_id.extend_from_slice(mac);
    let find = |wanted| options(body).find(|(code, _)| *code == wanted).map(|(_, value)| value);
    let client = find(CLIENT_ID).filter(|id| !id.is_empty() && id.len() <= MOST_ID);
    let server = find(SERVER_ID);
    let rapid = kind == SOLICIT && find(RAPID_COMMIT).is_some();
    // Who must name us and who must not: RFC 8415 section 16.
    let fits = match kind {
        SOLICIT | CONFIRM | REBIND => client.is_some() && server.is_none(),
        REQUEST | RENEW | RELEASE | DECLINE => client.is_some() && server == Some(&own_id),
        INFORMATION_REQUEST => server.is_none_or(|s| s == own_id),
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
    match kind {
        CONFIRM => {
            let code = if on_link(config, body) { SUCCESS } else { NOT_ON_LINK };
            put(&mut m, STATUS, &status(code));
            return Some(m);
        }
        RELEASE | DECLINE => {
            put(&mut m, STATUS, &status(SUCCESS));
            return Some(m);
        }
        _ => {}
    }
    if rapid {
        put(&mut m, RAPID_COMMIT, &[]);
    }
    let associations = options(body).filter(|(code, value)| *code == IA_NA && value.len() >= 12);
    if kind != INFORMATION_REQUEST {
        for (n, (_, value)) in associations.enumerate() {
            // Its number; it asks again after half the time, and others after most of it.
            let mut ia = value[..4].to_vec();
            ia.extend_from_slice(&(PREFERRED / 2).to_be_bytes());
            ia.extend_from_slice(&(PREFERRED / 5 * 4).to_be_bytes());
            if n == 0 {
                let mut address = config.guest6().octets().to_vec();
                address.extend_from_slice(&PREFERRED.to_be_bytes());
                address.extend_from_slice(&VALID.to_be_bytes());
                put(&mut ia, IA_ADDRESS, &address);
            } else {
                put(&mut ia, STATUS, &status(NO_ADDRESS));
            }
            put(&mut m, IA_NA, &ia);
        }
    }
    if !config.restrict {
        put(&mut m, DNS, &config.dns6().octets());
    }
    if !config.search.is_empty() {
        put(&mut m, DOMAINS, &names(&config.search));
    }
    Some(m)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = [2, 0, 0, 0, 0, 1];

    fn message(kind: u8, parts: &[(u16, &[u8])]) -> Vec<u8> {
        let mut m = vec![kind, 1, 2, 3];
        parts.iter().for_each(|(code, value)| put(&mut m, *code, value));
        m
    }

    fn all(answer: &[u8]) -> Vec<(u16, Vec<u8>)> {
        options(&answer[4..]).map(|(c, v)| (c, v.to_vec())).collect()
    }

    fn value(answer: &[u8], code: u16) -> Option<Vec<u8>> {
        all(answer).into_iter().find(|(c, _)| *c == code).map(|(_, v)| v)
    }

    const IA: [u8; 12] = [9, 9, 9, 9, 0, 0, 0, 0, 0, 0, 0, 0];

    #[test]
    fn an_address_is_offered_given_and_renewed() {
        let config = UserConfig { search: vec!["a.b".into()], ..UserConfig::default() };
        let offer = answer(&config, &message(SOLICIT, &[(CLIENT_ID, b"me"), (IA_NA, &IA)]), &MAC).unwrap();
        assert_eq!(offer[..4], [ADVERTISE, 1, 2, 3]);
        let server = value(&offer, SERVER_ID).unwrap();
        assert_eq!(value(&offer, DNS).unwrap(), config.dns6().octets());
        assert_eq!(value(&offer, DOMAINS).unwrap(), b"\x01a\x01b\0");
        for kind in [REQUEST, RENEW] {
            let m = message(kind, &[(CLIENT_ID, b"me"), (SERVER_ID, &server), (IA_NA, &IA), (IA_NA, &IA)]);
            let given = answer(&config, &m, &MAC).unwrap();
            assert_eq!(given[0], REPLY);
            let ias: Vec<_> = all(&given).into_iter().filter(|(c, _)| *c == IA_NA).collect();
            assert_eq!(ias[0].1[..4], [9; 4]);
            assert_eq!(ias[0].1[16..32], config.guest6().octets());
            assert_eq!(ias[1].1[12..], [0, 13, 0, 2, 0, 2], "one guest has one address");
            let other = message(kind, &[(CLIENT_ID, b"me"), (SERVER_ID, b"other"), (IA_NA, &IA)]);
            assert!(answer(&config, &other, &MAC).is_none());
        }
        let quick = answer(
            &config,
            &message(SOLICIT, &[(CLIENT_ID, b"me"), (RAPID_COMMIT, &[]), (IA_NA, &IA)]),
            &MAC,
        );
        assert_eq!(quick.unwrap()[0], REPLY);
        let mut far = IA.to_vec();
        put(&mut far, IA_ADDRESS, &[0x20; 24]);
        let moved = answer(&config, &message(CONFIRM, &[(CLIENT_ID, b"me"), (IA_NA, &far)]), &MAC).unwrap();
        assert_eq!(value(&moved, STATUS).unwrap(), [0, 4]);
        let released = message(RELEASE, &[(CLIENT_ID, b"me"), (SERVER_ID, &server)]);
        assert_eq!(value(&answer(&config, &released, &MAC).unwrap(), STATUS).unwrap(), [0, 0]);
    }

    #[test]
    fn information_alone() {
        let told = answer(&UserConfig::default(), &message(INFORMATION_REQUEST, &[]), &MAC).unwrap();
        assert!(value(&told, IA_NA).is_none() && value(&told, DNS).is_some());
        let restricted = UserConfig { restrict: true, ..UserConfig::default() };
        let told = answer(&restricted, &message(INFORMATION_REQUEST, &[]), &MAC).unwrap();
        assert!(value(&told, DNS).is_none());
    }

    #[test]
    fn nonsense_gets_no_answer() {
        for bad in
            [&b""[..], &[1, 2], &[SOLICIT, 0, 0, 0], &[99, 0, 0, 0], &[SOLICIT, 0, 0, 0, 0, 1, 0xff, 0xff]]
        {
            assert!(answer(&UserConfig::default(), bad, &MAC).is_none());
        }
        let long = message(SOLICIT, &[(CLIENT_ID, &[1; 131])]);
        assert!(answer(&UserConfig::default(), &long, &MAC).is_none());
    }
}
