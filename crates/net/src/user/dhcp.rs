//! DHCP server for one guest.

use super::config::UserConfig;
use crate::dhcp::{Answer, Reply, Request, kind, names, option};
use std::net::Ipv4Addr;

/// Answer a client's message; `None` if there is nothing to say.
pub fn answer(config: &UserConfig, request: &[u8]) -> Option<Answer> {
    let r = Request::parse(request)?;
    let reply = match r.kind {
        kind::DISCOVER => kind::OFFER,
        // A request to another server takes our offer back.
        kind::REQUEST if r.server.is_some_and(|s| s != config.gateway) => return None,
        kind::REQUEST if r.wanted.unwrap_or(r.client) != config.guest => {
            return Some(Reply::new(&r, kind::NAK, config.gateway, Ipv4Addr::UNSPECIFIED).finish());
        }
        kind::REQUEST | kind::INFORM => kind::ACK,
        _ => return None,
    };
    let inform = r.kind == kind::INFORM;
    let yours = if inform { Ipv4Addr::UNSPECIFIED } else { config.guest };
    let mut m = Reply::new(&r, reply, config.gateway, yours);
    if !inform {
        m.put(option::LEASE, &config.lease.to_be_bytes());
    }
    m.put(option::NETMASK, &config.netmask().octets());
    if !config.restrict {
        m.put(option::ROUTER, &config.gateway.octets());
        m.put(option::NAME_SERVER, &config.dns.octets());
    }
    m.put(option::MTU, &config.mtu.to_be_bytes());
    if let Some(file) = &config.bootfile {
        m.boot_file(config.gateway, file);
    }
    if let Some(name) = &config.hostname {
        m.put(option::HOST_NAME, name.as_bytes());
    }
    if let Some(name) = &config.domain {
        m.put(option::DOMAIN, name.as_bytes());
    }
    if !config.search.is_empty() {
        m.put(option::SEARCH, &names(&config.search));
    }
    let mut answer = m.finish();
    // A card takes what is sent to its address, whether or not that is known there yet (RFC 2131 section 4.1).
    if answer.to.is_none() && !inform && !r.needs_broadcast() {
        answer.to = Some(config.guest);
    }
    Some(answer)
}
