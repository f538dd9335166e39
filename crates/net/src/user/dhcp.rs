//! DHCP server for one guest (RFC 2131, RFC 2132).

use super::config::UserConfig;
use std::net::Ipv4Addr;

const COOKIE: [u8; 4] = [99, 130, 83, 99];
/// Bytes before the options.
const FIXED: usize = 240;
/// Seconds that an address is given for.
const LEASE: u32 = 86_400;

const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const ACK: u8 = 5;
const NAK: u8 = 6;
const INFORM: u8 = 8;

/// An answer, and whether it must be broadcast.
pub struct Answer {
    /// The message.
    pub message: Vec<u8>,
    /// To this address; broadcast if not given.
    pub to: Option<Ipv4Addr>,
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

/// Answer a client's message; `None` if there is nothing to say.
pub fn answer(config: &UserConfig, request: &[u8]) -> Option<Answer> {
    if request.len() < FIXED
        || request[0] != 1
        || request[1] != 1
        || request[2] != 6
        || request[236..240] != COOKIE
    {
        return None;
    }
    let address = |raw: &[u8]| raw.try_into().ok().map(|a: [u8; 4]| Ipv4Addr::from(a));
    let options = &request[FIXED..];
    let client = address(&request[12..16])?;
    let kind = *option(options, 53)?.first()?;
    let server = option(options, 54).and_then(address);
    let reply = match kind {
        DISCOVER => OFFER,
        // A request to another server takes our offer back.
        REQUEST if server.is_some_and(|s| s != config.gateway) => return None,
        REQUEST => {
            let wanted = option(options, 50).and_then(address).unwrap_or(client);
            if wanted == config.guest { ACK } else { NAK }
        }
        INFORM => ACK,
        _ => return None,
    };
    let mut m = vec![0; FIXED];
    m[..3].copy_from_slice(&[2, 1, 6]);
    m[4..8].copy_from_slice(&request[4..8]);
    m[10..12].copy_from_slice(&request[10..12]);
    m[28..44].copy_from_slice(&request[28..44]);
    m[236..240].copy_from_slice(&COOKIE);
    if reply != NAK {
        m[12..16].copy_from_slice(&request[12..16]);
        if kind != INFORM {
            m[16..20].copy_from_slice(&config.guest.octets());
        }
        m[20..24].copy_from_slice(&config.gateway.octets());
    }
    if reply != NAK
        && let Some(file) = &config.bootfile
    {
        // Next server, and the file, which is longest where it always stands (RFC 2131 section 2).
        m[20..24].copy_from_slice(&config.gateway.octets());
        m[108..108 + file.len()].copy_from_slice(file.as_bytes());
    }
    let mut put = |code: u8, value: &[u8]| {
        if let Ok(len) = u8::try_from(value.len()) {
            m.extend_from_slice(&[code, len]);
            m.extend_from_slice(value);
        }
    };
    put(53, &[reply]);
    put(54, &config.gateway.octets());
    if reply != NAK {
        if kind != INFORM {
            put(51, &LEASE.to_be_bytes());
        }
        put(1, &config.netmask().octets());
        if !config.restrict {
            put(3, &config.gateway.octets());
            put(6, &config.dns.octets());
        }
        put(26, &config.mtu.to_be_bytes());
        if let Some(file) = &config.bootfile {
            put(66, config.gateway.to_string().as_bytes());
            put(67, file.as_bytes());
        }
        if let Some(name) = &config.hostname {
            put(12, name.as_bytes());
        }
        if let Some(name) = &config.domain {
            put(15, name.as_bytes());
        }
        if !config.search.is_empty() {
            put(119, &names(&config.search));
        }
    }
    m.push(255);
    // RFC 1542 section 2.1: no shorter than BOOTP's messages.
    if m.len() < 300 {
        m.resize(300, 0);
    }
    let broadcast = reply == NAK || client.is_unspecified();
    Some(Answer { message: m, to: (!broadcast).then_some(client) })
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
