//! The host's rules for a network, as transactions of nftables (libnftables-json(5)), given to `nft -j`.
//!
//! Each network has a table of its own, in which nothing else is, so that taking it away takes all of its rules away at once.

use super::config::{Cidr, Forward, NetworkConfig};
use crate::NetError;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::IpAddr;
use std::process::{Command, Stdio};

/// The name of a network's tables.
pub fn table(network: &str) -> String {
    format!("ringfort-{network}")
}

fn matches(left: Value, op: &str, right: Value) -> Value {
    json!({"match": {"op": op, "left": left, "right": right}})
}

fn meta(key: &str, link: &str) -> Value {
    matches(json!({"meta": {"key": key}}), "==", json!(link))
}

fn field(c: Cidr, name: &str, op: &str) -> Value {
    let protocol = if c.address.is_ipv4() { "ip" } else { "ip6" };
    let network = json!({"prefix": {"addr": c.network().to_string(), "len": c.prefix}});
    matches(json!({"payload": {"protocol": protocol, "field": name}}), op, network)
}

fn group(c: Cidr) -> Value {
    let all = match c.address {
        IpAddr::V4(_) => "224.0.0.0/3".parse::<Cidr>(),
        IpAddr::V6(_) => "ff00::/8".parse(),
    };
    // Both are well-formed.
    field(all.unwrap_or(c), "daddr", "==")
}

fn ports(protocol: &str, list: &[u16]) -> Value {
    matches(json!({"payload": {"protocol": protocol, "field": "dport"}}), "==", json!({"set": list}))
}

/// What sets a network's rules up: one transaction.
pub fn up(config: &NetworkConfig) -> Value {
    let (name, bridge) = (table(&config.name), config.bridge());
    let mut all = Vec::new();
    let mut add = |kind: &str, value: Value| all.push(json!({"add": {kind: value}}));
    add("table", json!({"family": "inet", "name": name}));
    let mut chain = |chain: &str, kind: &str, hook: &str, priority: i32| {
        add(
            "chain",
            json!({"family": "inet", "table": name, "name": chain, "type": kind, "hook": hook, "prio": priority, "policy": "accept"}),
        );
    };
    chain("postrouting", "nat", "postrouting", 100);
    chain("forward", "filter", "forward", 0);
    chain("input", "filter", "input", 0);
    let mut rule = |chain: &str, expr: Vec<Value>| {
        add("rule", json!({"family": "inet", "table": name, "chain": chain, "expr": expr}));
    };
    let (accept, drop) = (json!({"accept": null}), json!({"drop": null}));
    let (from, to) = (meta("iifname", &bridge), meta("oifname", &bridge));
    if config.forward == Forward::Nat {
        for c in config.networks() {
            let out = field(c, "saddr", "==");
            rule("postrouting", vec![out.clone(), group(c), json!({"return": null})]);
            rule("postrouting", vec![out, field(c, "daddr", "!="), json!({"masquerade": null})]);
        }
    }
    // What passes from port to port of the bridge comes here, too, where the host filters bridges.
    rule(
        "forward",
        vec![from.clone(), to.clone(), if config.isolate { drop.clone() } else { accept.clone() }],
    );
    if config.forward != Forward::None {
        let known = matches(json!({"ct": {"key": "state"}}), "in", json!(["established", "related"]));
        rule("forward", vec![to.clone(), known, accept.clone()]);
        for c in config.networks() {
            rule("forward", vec![from.clone(), field(c, "saddr", "=="), accept.clone()]);
            if config.forward == Forward::Route {
                rule("forward", vec![to.clone(), field(c, "daddr", "=="), accept.clone()]);
            }
        }
    }
    // Whoever is not meant to get in; and guests that say they were somebody else.
    rule("forward", vec![to, drop.clone()]);
    rule("forward", vec![from.clone(), drop.clone()]);
    if config.shield_host {
        let known = matches(json!({"ct": {"key": "state"}}), "in", json!(["established", "related"]));
        rule("input", vec![from.clone(), known, accept.clone()]);
        rule("input", vec![from.clone(), ports("udp", &[53, 67, 547]), accept.clone()]);
        rule("input", vec![from.clone(), ports("tcp", &[53]), accept.clone()]);
        let icmp = matches(json!({"meta": {"key": "l4proto"}}), "==", json!({"set": ["icmp", "ipv6-icmp"]}));
        rule("input", vec![from.clone(), icmp, accept]);
        rule("input", vec![from, drop.clone()]);
    }
    json!({"nftables": all})
}

/// What takes a network's rules away, whether or not they are there.
pub fn down(network: &str) -> Value {
    let name = table(network);
    let t = json!({"family": "inet", "name": name});
    // One that is not there cannot be deleted; one that is there can be added.
    json!({"nftables": [{"add": {"table": t}}, {"delete": {"table": t}}]})
}

/// Have nftables carry a transaction out: all of it or nothing.
///
/// # Errors
/// nft is not there, or refuses.
pub fn apply(transaction: &Value) -> Result<(), NetError> {
    let mut child = Command::new("nft")
        .args(["-j", "-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(NetError::advise("nft", "; install the package nftables"))?;
    if let Some(mut to) = child.stdin.take() {
        // A program that does not read ends with an error, which is told below.
        let _ = to.write_all(transaction.to_string().as_bytes());
    }
    let mut words = String::new();
    let mut read = |from: Option<&mut dyn Read>| {
        if let Some(f) = from {
            let _ = f.take(4096).read_to_string(&mut words);
        }
    };
    read(child.stderr.as_mut().map(|f| f as &mut dyn Read));
    read(child.stdout.as_mut().map(|f| f as &mut dyn Read));
    let status = child.wait().map_err(NetError::host("nft"))?;
    if status.success() {
        return Ok(());
    }
    let words = words.split_whitespace().take(60).collect::<Vec<_>>().join(" ");
    Err(NetError::Refused(format!(
        "nftables refuses the rules ({words}); run as root, on a kernel with nf_tables"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_table_holds_everything() {
        let mut c = NetworkConfig::new("lab", Some("10.9.0.0/24".parse().unwrap()));
        let text = up(&c).to_string();
        assert!(text.contains("masquerade"), "{text}");
        (c.forward, c.isolate) = (Forward::None, true);
        let text = up(&c).to_string();
        assert!(!text.contains("masquerade") && !text.contains("established"));
        let rules = up(&c)["nftables"].as_array().unwrap().clone();
        for r in rules {
            let at = &r["add"];
            let name = at["table"]["name"]
                .as_str()
                .or(at["chain"]["table"].as_str())
                .or(at["rule"]["table"].as_str());
            assert_eq!(name, Some("ringfort-lab"), "{r}");
        }
        assert_eq!(down("lab")["nftables"].as_array().unwrap().len(), 2);
    }
}
