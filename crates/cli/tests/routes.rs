//! What a guest sees of the ways beyond its host: real routers in network namespaces, which tests make, as root, and remove; elsewhere they
//! say that they were skipped.

mod support;

use ringfort_guest::TEST_PROMPT;
use std::process::Command;
use support::netns::{NetNs, pings, until};
use support::*;

/// Networks between host, two routers and the far end: the first three bytes, and the first four groups of the IPv6 one.
const LINKS: [(&str, &str); 3] =
    [("198.51.100", "2001:db8:1:0"), ("192.0.2", "2001:db8:2:0"), ("203.0.113", "2001:db8:3:0")];

/// Host, router, router, far end, each one link further.
fn row() -> Option<[NetNs; 4]> {
    let row = [NetNs::new("near")?, NetNs::new("first")?, NetNs::new("second")?, NetNs::new("far")?];
    for (n, (v4, v6)) in LINKS.into_iter().enumerate() {
        let (left, right) = (&row[n], &row[n + 1]);
        left.ip(&format!("link add next0 type veth peer name prev0 netns {}", right.0));
        for (ns, link, host) in [(left, "next0", 1), (right, "prev0", 2)] {
            ns.ip(&format!("addr add {v4}.{host}/24 dev {link}"));
            ns.ip(&format!("addr add {v6}::{host}/64 dev {link} nodad"));
            ns.ip(&format!("link set {link} up"));
        }
        if n < 2 {
            let on = "echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding";
            assert!(right.command("sh").args(["-c", on]).status().expect("sh").success());
        }
    }
    // Down the row by default, and back.
    for (n, ns) in row.iter().enumerate() {
        if let Some((v4, v6)) = LINKS.get(n) {
            ns.ip(&format!("route add default via {v4}.2"));
            ns.ip(&format!("-6 route add default via {v6}::2"));
        }
        for (v4, v6) in LINKS.into_iter().take(n.saturating_sub(1)) {
            let (by4, by6) = LINKS[n - 1];
            ns.ip(&format!("route add {v4}.0/24 via {by4}.1"));
            ns.ip(&format!("-6 route add {v6}::/64 via {by6}::1"));
        }
    }
    Some(row)
}

/// The routers that a traceroute names, in their order.
fn hops(said: &str) -> Vec<String> {
    let second = |l: &str| {
        let mut words = l.split_whitespace();
        words.next()?.parse::<u8>().ok()?;
        words.next().map(str::to_owned)
    };
    said.lines().filter_map(second).collect()
}

#[test]
fn a_guest_finds_the_routers_on_its_way() {
    let _turn = one_at_a_time();
    let Some(row) = row() else { return };
    let [near, _first, second, _far] = &row;
    let scratch = Scratch::new("routes");
    let capture = scratch.0.join("frames.pcap");
    let mut g = near.guest(&["--net", &format!("user,dump={}", text(&capture))]);
    g.expect(TEST_PROMPT);
    g.shell("ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up; ip route add default via 10.0.2.2");
    assert!(pings(&mut g, "203.0.113.2"));

    // By UDP: the NAT itself, both routers, and the far end, which has nobody on the port.
    let said = g.shell("traceroute -n -q 1 -w 10 -m 8 203.0.113.2");
    assert_eq!(hops(&said), ["10.0.2.2", "198.51.100.2", "192.0.2.2", "203.0.113.2"], "{said}");
    until("an IPv6 address", || {
        g.shell("ip -6 addr show dev eth0 scope site; ip -6 route").contains("default")
            && !g.shell("ip -6 addr show dev eth0").contains("tentative")
    });
    assert!(g.shell("if ping6 -c 2 -W 5 2001:db8:3::2 >/dev/null; then echo yes; fi") == "yes");
    let said = g.shell("traceroute6 -n -q 1 -w 10 -m 8 2001:db8:3::2");
    assert_eq!(hops(&said), ["fec0::2", "2001:db8:1::2", "2001:db8:2::2", "2001:db8:3::2"], "{said}");

    // By echoes that may go so far only, as traceroute -I sends them; who answers is in the capture.
    for ttl in 1..=3 {
        g.shell(&format!("if ping -c 1 -W 1 -t {ttl} 203.0.113.2 >/dev/null; then false; fi"));
    }
    assert!(g.shell("ping -c 1 -W 20 -t 4 203.0.113.2").contains("1 packets received"));

    // A network that the last router knows no way to, and one that it lets nobody into.
    second.ip("route add unreachable 203.0.114.0/24");
    second.ip("route add prohibit 203.0.115.0/24");
    let said = g.shell("traceroute -n -q 1 -w 10 -m 8 203.0.114.9");
    assert!(said.contains("192.0.2.2") && said.contains("!H"), "{said}");
    let said = g.shell("traceroute -n -q 1 -w 10 -m 8 203.0.115.9");
    assert!(said.contains("192.0.2.2") && said.contains("!A"), "{said}");

    g.send("poweroff -f\n");
    assert!(g.wait().success());
    // Messages about datagrams, and about echoes (the protocol is in the header that is quoted): one about each, whichever kind of socket
    // the host has for echoes.
    for (quoted, expected) in [(17, [3, 3, 1]), (1, [1, 1, 1])] {
        let filter = format!("icmp[0] == 11 and icmp[17] == {quoted}");
        let read = match Command::new("tcpdump").args(["-n", "-r", text(&capture), &filter]).output() {
            Ok(o) => o,
            Err(e) => return eprintln!("skipped: tcpdump: {e}"),
        };
        let lines = String::from_utf8_lossy(&read.stdout).into_owned();
        assert!(read.status.success(), "{}", String::from_utf8_lossy(&read.stderr));
        let from = |router| format!("IP {router} > 10.0.2.15: ICMP time exceeded in-transit");
        let told = ["10.0.2.2", "198.51.100.2", "192.0.2.2"].map(|r| lines.matches(&from(r)).count());
        assert_eq!(told, expected, "{lines}");
    }
}
