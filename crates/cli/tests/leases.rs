//! Leases and connections that outlast pauses.

mod support;

use ringfort_guest::TEST_PROMPT;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::Path;
use std::time::Duration;
use support::*;

/// A number that a command in the guest says.
fn number(g: &mut Guest, command: &str) -> u64 {
    let said = g.shell(command);
    said.trim().parse().unwrap_or_else(|_| panic!("{command}: {said}"))
}

/// DHCP's answers of a kind in a capture (RFC 2132 section 9.6).
fn acknowledged(capture: &Path) -> usize {
    let data = std::fs::read(capture).unwrap_or_default();
    let pattern = [99, 130, 83, 99, 53, 1, 5];
    data.windows(pattern.len()).filter(|w| *w == pattern).count()
}

#[test]
fn leases_are_renewed_and_connections_stay_while_the_guest_stands_still() {
    let _turn = one_at_a_time();
    let guest = test_guest();
    let scratch = Scratch::new("lease");
    let capture = scratch.0.join("frames.pcap");
    // The host's end of a connection that rests.
    let server = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = server.local_addr().expect("its address").port();
    let net = format!("user,host-loopback=on,lease=14,dump={}", text(&capture));
    let mut g = Guest::run(&run_args(
        "soft",
        &guest.kernel,
        &guest.initrd,
        &guest.cmdline,
        &["--memory", "256M", "--net", &net],
    ));
    g.expect(TEST_PROMPT);
    g.shell(
        "printf '#!/bin/sh\\ncase $1 in deconfig) ip addr flush dev eth0;; bound|renew) ip addr replace $ip/$mask dev eth0; \
         ip route replace default via $router; echo $1 >>/tmp/said;; esac\\n' >/tmp/s; chmod +x /tmp/s; ip link set eth0 up",
    );
    g.shell(
        "udhcpc -i eth0 -f -s /tmp/s >/tmp/dhcp 2>&1 & until grep -q bound /tmp/said; do sleep 0.2; done",
    );
    g.shell(&format!(
        "mkfifo /tmp/in; (nc 10.0.2.2 {port} </tmp/in >/tmp/out; echo over >/tmp/over) & exec 5>/tmp/in; true"
    ));
    let (mut peer, _) = server.accept().expect("the guest");
    peer.set_read_timeout(Some(PATIENCE)).expect("a limit");
    let mut both_ways = |g: &mut Guest, word: &str| {
        g.shell(&format!("echo {word} >&5"));
        let mut got = vec![0; word.len() + 1];
        peer.read_exact(&mut got).expect("what the guest says");
        assert_eq!(got, format!("{word}\n").as_bytes());
        peer.write_all(&got).expect("an answer");
        g.shell(&format!("until grep -q {word} /tmp/out; do sleep 0.1; done"));
    };
    both_ways(&mut g, "first");
    g.shell("until [ $(grep -c renew /tmp/said) -ge 2 ]; do sleep 0.2; done");
    both_ways(&mut g, "renewed");
    // It stands still for longer than its lease, by far in the long form; the address is the same afterwards.
    g.signal("STOP");
    let pause = if std::env::var_os("RINGFORT_TEST_LONG").is_some() { 300 } else { 18 };
    std::thread::sleep(Duration::from_secs(pause));
    g.signal("CONT");
    let before = number(&mut g, "wc -l </tmp/said");
    g.shell(&format!("until [ $(wc -l </tmp/said) -gt {before} ]; do sleep 0.2; done"));
    assert!(g.shell("ip -4 -o addr show dev eth0").contains("10.0.2.15/24"));
    both_ways(&mut g, "later");
    g.shell("test ! -e /tmp/over");
    g.send("poweroff -f\n");
    assert_eq!(g.wait().code(), Some(0));
    assert!(acknowledged(&capture) >= 4, "{} answers in the capture", acknowledged(&capture));
}
