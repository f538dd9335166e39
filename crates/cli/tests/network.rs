//! A whole Debian guest on a user network: one boot, in which it does what a user's guest does.

#[path = "support/servers.rs"]
mod servers;
mod support;

use servers::Web;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::UdpSocket;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use support::*;

/// What the guest installs from the mirror that the test serves.
const PACKAGES: [&str; 3] = ["curl", "dropbear-bin", "busybox-static"];
/// The router, and the other address of the host.
const ROUTER: &str = "10.0.2.2";
const HOST: &str = "10.0.2.100";

/// Connect to HOST PORT COUNT times at once, and get a line back on each.
const MANY: &str = r#"
use strict; use IO::Socket::INET; my ($host, $port, $n) = @ARGV; my @s;
for my $i (0 .. $n - 1) {
    push @s, IO::Socket::INET->new(PeerAddr => $host, PeerPort => $port, Timeout => 120) || die "connection $i: $!";
}
syswrite $s[$_], "hello $_\n" for 0 .. $#s;
my $good = 0;
for my $i (0 .. $#s) { my $l = readline $s[$i]; $good++ if defined $l && $l eq "hello $i\n"; }
print "$good\n";
"#;

/// Ask the name server at HOST COUNT questions by UDP, 64 at a time from sockets of their own, and one by TCP.
const NAMES: &str = r#"
use strict; use IO::Socket::INET; use IO::Select; use Time::HiRes 'time';
my ($host, $count) = @ARGV; my ($next, $good, $wrong, $again) = (0, 0, 0, 0);
sub query { my $n = shift; my $l = "n$n";
    pack("n6", $n, 0x100, 1, 0, 0, 0) . chr(length $l) . $l . "\4test\0" . pack("n2", 1, 1) }
my $select = IO::Select->new; my %asked;
sub ask { my $s = shift; my $n = $next++; $s->send(query($n)); $asked{$s} = [$s, $n, time]; }
for (1 .. 64) { my $s = IO::Socket::INET->new(PeerAddr => $host, PeerPort => 53, Proto => "udp") or die; $select->add($s); ask($s); }
while ($good + $wrong < $count) {
    for my $s ($select->can_read(1)) {
        my $a; defined $s->recv($a, 1500) or next;
        my $n = $asked{$s}[1];
        if (unpack("n", $a) == $n && unpack("N", substr $a, -4) == $n) { $good++ } else { $wrong++ }
        delete $asked{$s}; ask($s) if $next < $count;
    }
    for my $a (values %asked) { if (time - $a->[2] > 5) { $again++; $a->[2] = time; $a->[0]->send(query($a->[1])); } }
}
my $t = IO::Socket::INET->new(PeerAddr => $host, PeerPort => 53) or die "tcp: $!";
my $q = query(70000); syswrite $t, pack("n", length $q) . $q; read $t, my $l, 2; read $t, my $a, unpack("n", $l);
print "good $good wrong $wrong again $again tcp ", unpack("N", substr $a, -4), "\n";
"#;

/// Sends each datagram that comes to port 7007 back.
const ECHO: &str = r#"use IO::Socket::INET; my $s = IO::Socket::INET->new(LocalPort => 7007, Proto => "udp"); while (1) { my $d; $s->recv($d, 65536); $s->send($d); }"#;

/// Messages of `kind` from the DHCP server in a capture (RFC 2132 section 9.6).
fn dhcp_messages(capture: &std::path::Path, kind: u8) -> usize {
    let data = std::fs::read(capture).unwrap_or_default();
    let mut rest = data.get(24..).unwrap_or_default();
    let mut found = 0;
    while let Some(head) = rest.first_chunk::<16>() {
        let len = u32::from_le_bytes([head[8], head[9], head[10], head[11]]) as usize;
        let Some(frame) = rest.get(16..16 + len) else { break };
        rest = &rest[16 + len..];
        // Ethernet, IPv4 without options, UDP from port 67, BOOTP with its cookie, the kind first among the options.
        let is_answer = frame.get(12..15) == Some(&[8, 0, 0x45]) && frame.get(34..36) == Some(&[0, 67]);
        found += usize::from(is_answer && frame.get(282..285) == Some(&[53, 1, kind]));
    }
    found
}

/// Wait for something on the host that no message tells of.
fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < end, "{what} did not come");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn sha256(path: &std::path::Path) -> String {
    let out = Command::new("sha256sum").arg(path).output().expect("sha256sum");
    String::from_utf8_lossy(&out.stdout).split_whitespace().next().expect("a sum").to_owned()
}

/// Until `command` succeeds in the guest.
fn until(g: &mut Guest, command: &str) {
    g.shell(&format!("until {command}; do sleep 0.2; done"));
}

#[test]
fn a_debian_guest_is_online() {
    let _turn = one_at_a_time();
    let cache = ringfort_guest::cache_dir().expect("a cache folder");
    let mirror = ringfort_guest::ensure_mirror(&cache, &PACKAGES, &mut ()).expect("the mirror");
    let guest = debian_guest();
    let scratch = Scratch::new("online");
    let capture = scratch.0.join("frames.pcap");
    let mut random = fastrand::Rng::with_seed(11);
    let bytes = |len: usize, random: &mut fastrand::Rng| (0..len).map(|_| random.u8(..)).collect::<Vec<u8>>();
    let large = scratch.file("large", &bytes(24 << 20, &mut random));
    let tftp = scratch.0.join("tftp");
    std::fs::create_dir(&tftp).expect("a folder");
    std::fs::write(tftp.join("boot.img"), bytes(300_000, &mut random)).expect("a file");
    scratch.file("many.pl", MANY.as_bytes());
    scratch.file("names.pl", NAMES.as_bytes());
    let key = scratch.0.join("key");
    let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key).status();
    assert!(made.expect("ssh-keygen").success());

    let web = Web::start("127.0.0.1:0", &[&mirror, &scratch.0]).expect("a web server");
    let web6 = Web::start("[::1]:0", &[&scratch.0]);
    let (ssh, http) = (servers::free_port(), servers::free_port());
    let (echo, http6) = (servers::free_udp_port(), servers::free_port());
    let forward6 =
        if web6.is_some() { format!("hostfwd=tcp:[::1]:{http6}-[fec0::f]:80,") } else { String::new() };
    let net = format!(
        "user,nameserver={},hostalias={HOST},host-loopback=on,hostname=netbox,domainname=example.test,\
         dnssearch=example.test,hostfwd=tcp:127.0.0.1:{ssh}-:22,hostfwd=tcp:127.0.0.1:{http}-:80,{forward6}hostfwd=udp:127.0.0.1:{echo}-:7007,tftp={},dump={}",
        servers::names(),
        text(&tftp),
        text(&capture),
    );
    let mut g = Guest::run(&run_args(
        "soft",
        &guest.kernel,
        &guest.initrd,
        &guest.cmdline,
        &[
            "--memory",
            "1G",
            "--cpus",
            "2",
            "--disk",
            &format!("path={},snapshot=on", text(&guest.disk)),
            "--net",
            &net,
        ],
    ));
    log_in(&mut g);

    // Addresses, by DHCP and router advertisements.
    let card = g.shell("cd /sys/class/net; ls -d e*; cd");
    until(&mut g, &format!("networkctl status {card} | grep -q 'State: routable (configured)'"));
    // Routable by IPv4 alone is not enough: the router's advertisement may still be on its way.
    until(&mut g, &format!("ip -o address show {card} -tentative | grep -q 'inet6 fec0::'"));
    let addresses = g.shell(&format!("ip -o address show {card}"));
    assert!(addresses.contains("inet 10.0.2.15/24") && addresses.contains("inet6 fec0::"), "{addresses}");
    assert!(g.shell("ip route").contains("default via 10.0.2.2"));
    let lease = g.shell("cat /run/systemd/netif/leases/*");
    for part in ["HOSTNAME=netbox", "DOMAINNAME=example.test", "DNS=10.0.2.3"] {
        assert!(lease.contains(part), "no {part} in:\n{lease}");
    }
    let resolver = g.shell("resolvectl status --no-pager");
    assert!(resolver.contains("10.0.2.3") && resolver.contains("example.test"), "{resolver}");
    assert!(g.shell("resolvectl query --no-pager -4 n167838211.test").contains("10.1.2.3"));

    // Packages from a mirror on the host.
    let source = format!("deb [trusted=yes] http://{HOST}:{} ./", web.at.port());
    g.shell(&format!("rm -rf /etc/apt/sources.list.d; echo '{source}' > /etc/apt/sources.list"));
    g.shell("apt-get -q update");
    let names = PACKAGES.join(" ");
    g.shell(&format!("DEBIAN_FRONTEND=noninteractive apt-get -q -y --no-install-recommends install {names}"));

    // curl out: large files with checksums, both ways.
    let url = format!("http://{HOST}:{}", web.at.port());
    let sum = sha256(&large);
    assert_eq!(g.shell(&format!("curl -fsS {url}/large | tee /tmp/large | sha256sum | cut -c-64")), sum);
    g.shell(&format!("curl -fsS -T /tmp/large {url}/back"));
    let back = web.put.recv_timeout(PATIENCE).expect("what the guest sent");
    assert!(back == std::fs::read(&large).expect("the file"), "the file came back otherwise");
    // An end that half-closes still gets its answer.
    let end = servers::after_the_end();
    let said = g.shell(&format!("head -c 3000000 /tmp/large | busybox nc {HOST} {}", end.port()));
    assert_eq!(said, "3000000 bytes");
    // The host is there by IPv6, too, and answers pings.
    match &web6 {
        Some(w) => {
            let got = g.shell(&format!("curl -fsSg http://[fec0::2]:{}/large | sha256sum", w.at.port()));
            assert_eq!(got[..64], sum);
        }
        None => eprintln!("skipped: IPv6 connections: this host has no ::1"),
    }
    g.shell(&format!("busybox ping -c 2 -W 5 {ROUTER} >/dev/null"));
    g.shell("busybox ping6 -c 2 -W 5 fec0::2 >/dev/null");
    // Files for those who boot from the network.
    let got = g.shell(&format!("curl -fsS tftp://{ROUTER}/boot.img | sha256sum"));
    assert_eq!(got[..64], sha256(&tftp.join("boot.img")));

    // In by forwarded ports: curl, and ssh with a session that stays.
    g.shell("cp /tmp/large /srv/; busybox httpd -p 80 -h /srv");
    let out = Command::new("curl").args(["-fsS", &format!("http://127.0.0.1:{http}/large")]).output();
    assert!(out.expect("curl").stdout == std::fs::read(&large).expect("the file"));
    // By IPv6 to an address of its own, and by UDP.
    if web6.is_some() {
        // The address that DHCPv6 gives.
        until(&mut g, &format!("ip -o address show {card} -tentative | grep -q 'inet6 fec0::f/'"));
        let out = Command::new("curl").args(["-gfsS", &format!("http://[::1]:{http6}/large")]).output();
        assert!(out.expect("curl").stdout == std::fs::read(&large).expect("the file"));
    }
    g.shell(&format!("perl -e '{ECHO}' >/dev/null 2>&1 & true"));
    let udp = UdpSocket::bind("127.0.0.1:0").expect("a port");
    udp.set_read_timeout(Some(Duration::from_secs(1))).expect("a limit");
    udp.connect(("127.0.0.1", echo)).expect("an address");
    for len in [1, 1400, 9000] {
        let sent: Vec<u8> = (0..len).map(|_| random.u8(..)).collect();
        let mut got = [0; 10_000];
        // Datagrams may be lost, the first ones before the guest listens.
        let came = (0..60).any(|_| {
            udp.send(&sent).expect("a datagram");
            udp.recv(&mut got).is_ok_and(|n| got[..n] == sent)
        });
        assert!(came, "{len} bytes by UDP");
    }
    let public = std::fs::read_to_string(key.with_extension("pub")).expect("the key");
    g.shell(&format!("mkdir -m 700 -p .ssh; echo '{}' > .ssh/authorized_keys", public.trim()));
    g.shell("dropbearkey -t ed25519 -f /tmp/hostkey >/dev/null 2>&1; dropbear -r /tmp/hostkey -p 22");
    let mut session = Child(
        Command::new("ssh")
            .args(["-F", "none", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"])
            .args(["-o", "BatchMode=yes", "-o", "LogLevel=ERROR", "-p", &ssh.to_string(), "-i"])
            .args([text(&key), "root@127.0.0.1", "cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("ssh"),
    );
    let mut to_guest = session.0.stdin.take().expect("piped");
    let mut from_guest = BufReader::new(session.0.stdout.take().expect("piped"));
    let mut over_ssh = |word: &str| {
        writeln!(to_guest, "{word}").expect("ssh");
        let mut line = String::new();
        from_guest.read_line(&mut line).expect("ssh");
        assert_eq!(line.trim(), word);
    };
    over_ssh("one");

    // Crowds.
    g.shell(&format!("cd /tmp; for f in many.pl names.pl; do curl -fsSO {url}/$f; done"));
    let crowd = servers::crowd(1000);
    assert_eq!(g.shell(&format!("ulimit -n 4096; perl /tmp/many.pl {HOST} {} 1000", crowd.port())), "1000");
    let said = g.shell("perl /tmp/names.pl 10.0.2.3 3000");
    assert_eq!(said, "good 3000 wrong 0 again 0 tcp 70000");

    // The lease is renewed.
    wait_for("the first DHCP answer", || dhcp_messages(&capture, 5) > 0);
    let before = dhcp_messages(&capture, 5);
    g.shell(&format!("networkctl renew {card}"));
    wait_for("another DHCP answer", || dhcp_messages(&capture, 5) > before);

    // The cable is pulled in the middle of a transfer, and plugged in again.
    let download = format!(
        "rm -f /tmp/done /tmp/half; (curl -fsS {url}/gated/large > /tmp/half; sha256sum /tmp/half | cut -c-64 > /tmp/sum; \
         touch /tmp/done) & true"
    );
    let carrier = |up: u8| format!("grep -q {up} /sys/class/net/{card}/carrier");
    g.shell(&download);
    until(&mut g, "test -s /tmp/half");
    g.send("\x01l");
    until(&mut g, &carrier(0));
    web.gate.send(()).expect("the web server");
    g.shell("sleep 1; test ! -e /tmp/done");
    g.send("\x01l");
    until(&mut g, &carrier(1));
    until(&mut g, "test -e /tmp/done");
    assert_eq!(g.shell("cat /tmp/sum"), sum);
    over_ssh("two");

    // Nothing of it runs for a while.
    g.shell(&download);
    until(&mut g, "test -s /tmp/half");
    g.signal("STOP");
    web.gate.send(()).expect("the web server");
    std::thread::sleep(Duration::from_secs(15));
    g.signal("CONT");
    until(&mut g, "test -e /tmp/done");
    assert_eq!(g.shell("cat /tmp/sum"), sum);
    over_ssh("three");

    // Taken down and up by the guest itself.
    g.shell(&format!("ip link set {card} down; ip link set {card} up"));
    until(&mut g, &format!("curl -fsS -m 5 -o /dev/null {url}/many.pl"));
    over_ssh("four");
    drop(session);
    g.send("systemctl poweroff\n");
    assert_eq!(g.wait().code(), Some(0));
}

#[test]
fn passt_carries_a_guests_frames_when_it_is_there() {
    let _turn = one_at_a_time();
    if Command::new("passt").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err() {
        eprintln!("skipped: passt is not installed");
        return;
    }
    let guest = test_guest();
    let scratch = Scratch::new("passt");
    let mut random = fastrand::Rng::with_seed(12);
    let content: Vec<u8> = (0..4 << 20).map(|_| random.u8(..)).collect();
    let file = scratch.file("file", &content);
    let web = Web::start("127.0.0.1:0", &[&scratch.0]).expect("a web server");
    let mut g = Guest::run(&run_args(
        "soft",
        &guest.kernel,
        &guest.initrd,
        &guest.cmdline,
        &["--memory", "512M", "--net", "passt,arg=-a,arg=10.5.0.15,arg=-n,arg=24,arg=-g,arg=10.5.0.2"],
    ));
    g.expect(ringfort_guest::TEST_PROMPT);
    // Its frames are as large as it can carry.
    assert_eq!(g.shell("cat /sys/class/net/eth0/mtu"), "65520");
    g.shell("ip addr add 10.5.0.15/24 dev eth0; ip link set eth0 up; ip route add default via 10.5.0.2");
    // For passt the router's address is the host's loopback.
    let got = g.shell(&format!("wget -q -O - http://10.5.0.2:{}/file | sha256sum", web.at.port()));
    assert_eq!(got[..64], sha256(&file));
    // Even when it is killed, nothing is left behind.
    let pid = g.pid();
    let folders = format!("ringfort-passt-{pid}-");
    let children = Command::new("pgrep").args(["-P", &pid.to_string()]).output().expect("pgrep");
    let children = String::from_utf8(children.stdout).expect("numbers");
    let passt = children.trim();
    let name = |of: &str| std::fs::read_to_string(format!("/proc/{of}/comm")).unwrap_or_default();
    assert!(name(passt).starts_with("passt"), "{children}");
    g.signal("KILL");
    g.end();
    let ended = || {
        let stat = std::fs::read_to_string(format!("/proc/{passt}/stat")).unwrap_or_default();
        // Whoever inherits it may take a while to ask for its status.
        stat.is_empty() || stat.contains(") Z ")
    };
    wait_for("the end of passt", ended);
    let left = std::fs::read_dir(std::env::temp_dir()).expect("the folder").filter_map(Result::ok);
    let left: Vec<_> = left.filter(|e| e.file_name().to_string_lossy().starts_with(&folders)).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn user_networks_keep_to_what_they_were_told() {
    let _turn = one_at_a_time();
    let guest = test_guest();
    let scratch = Scratch::new("told");
    let content: Vec<u8> = (0..3_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    let file = scratch.file("file", &content);
    let small = scratch.file("small", &content[..300_000]);
    let tftp = scratch.0.join("tftp");
    std::fs::create_dir(&tftp).expect("a folder");
    std::fs::copy(&small, tftp.join("pxe.0")).expect("a file");
    let capture = scratch.0.join("frames.pcap");
    let web = Web::start("127.0.0.1:0", &[&scratch.0]).expect("a web server");
    let end = servers::after_the_end();
    let port = web.at.port();
    let into = servers::free_port();
    let cards = [
        // Nothing but a port that leads in.
        format!(
            "user,net=10.3.0.0/24,ipv6=off,restrict=on,host-loopback=on,hostfwd=tcp:127.0.0.1:{into}-:80"
        ),
        // The host's loopback by one address only; names, and files to boot from.
        format!(
            "user,net=10.4.0.0/24,ipv6=off,hostalias=10.4.0.100,hostname=box,domainname=a.test,dnssearch=b.test,dnssearch=c.test,\
             tftp={},bootfile=pxe.0,dump={}",
            text(&tftp),
            text(&capture)
        ),
        // Bytes per second; packets per second.
        "user,net=10.5.0.0/24,ipv6=off,host-loopback=on,rx-rate=1M,rx-burst=64k,tx-rate=1M,tx-burst=64k"
            .into(),
        "user,net=10.6.0.0/24,ipv6=off,host-loopback=on,rx-packets=50,rx-packets-burst=10".into(),
        "user,net=10.7.0.0/24,ipv6=off,host-loopback=on,tx-packets=50,tx-packets-burst=10".into(),
    ];
    let mut args = vec!["run", "--accel", "soft", "--memory", "256M", "--cmdline", &guest.cmdline];
    args.extend(["--kernel", text(&guest.kernel), "--initrd", text(&guest.initrd)]);
    cards.iter().for_each(|c| args.extend(["--net", c]));
    let mut g = Guest::start(ringfort(&args));
    g.expect(ringfort_guest::TEST_PROMPT);
    for n in 0..cards.len() {
        g.shell(&format!("ip addr add 10.{}.0.15/24 dev eth{n}; ip link set eth{n} up", n + 3));
    }
    g.shell("mkdir /tmp/www; echo inside >/tmp/www/f; httpd -p 80 -h /tmp/www");
    let reaches = |g: &mut Guest, at: &str| {
        g.shell(&format!(
            "if timeout 5 wget -q -O /dev/null http://{at}:{port}/small 2>/dev/null; then echo yes; else echo no; fi"
        ))
    };
    // restrict=on: in by the port, out to nowhere, the open loopback included.
    let out = Command::new("curl").args(["-fsS", &format!("http://127.0.0.1:{into}/f")]).output();
    assert_eq!(out.expect("curl").stdout, b"inside\n");
    assert_eq!(reaches(&mut g, "10.3.0.2"), "no");
    // The loopback is closed by itself, and open at the alias.
    assert_eq!((reaches(&mut g, "10.4.0.2"), reaches(&mut g, "10.4.0.100")), ("no".into(), "yes".into()));
    // What DHCP tells, and the file that it names.
    let script = "printf '#!/bin/sh\\nenv >/tmp/$1\\n' >/tmp/s; chmod +x /tmp/s; udhcpc -i eth1 -n -q -t 20 -T 1 -O bootfile -O search -O tftp \
                  -s /tmp/s >/dev/null 2>&1; cat /tmp/bound";
    let told = g.shell(script);
    for part in [
        "ip=10.4.0.15",
        "router=10.4.0.2",
        "dns=10.4.0.3",
        "hostname=box",
        "domain=a.test",
        "b.test c.test",
        "pxe.0",
    ] {
        assert!(told.contains(part), "no {part}: {told}");
    }
    g.shell("cd /tmp; tftp -g -r pxe.0 -l pxe 10.4.0.2");
    assert_eq!(g.shell("sha256sum </tmp/pxe | cut -c-64"), sha256(&small));
    assert!(dhcp_messages(&capture, 5) == 1, "the capture has the answer");
    // The burst goes at once, and the last frame, of up to 64 KiB, is paid off when all is over: 3 MB at 1 MiB/s take longer than
    // 2.7 s either way. 300 kB are 206 packets at least; less a burst of 10 and 46 in the last frame they take 3 s.
    let timed = |g: &mut Guest, least: f64, command: &str| {
        let start = Instant::now();
        let said = g.shell(command);
        assert!(start.elapsed().as_secs_f64() > least, "{command} took {:?}", start.elapsed());
        said
    };
    let said =
        timed(&mut g, 2.6, &format!("wget -q -O - http://10.5.0.2:{port}/file | tee /tmp/file | sha256sum"));
    assert_eq!(said[..64], sha256(&file));
    let said = timed(&mut g, 2.6, &format!("nc 10.5.0.2 {} </tmp/file", end.port()));
    assert_eq!(said, "3000000 bytes");
    let said = timed(&mut g, 2.9, &format!("wget -q -O - http://10.6.0.2:{port}/small | sha256sum"));
    assert_eq!(said[..64], sha256(&small));
    let said = timed(&mut g, 2.9, &format!("head -c 300000 /tmp/file | nc 10.7.0.2 {}", end.port()));
    assert_eq!(said, "300000 bytes");
    g.send("poweroff -f\n");
    assert_eq!(g.wait().code(), Some(0));
}
