//! Networks of the host: taps, bridges, managed networks with NAT, cables to QEMU, Intel's card. Everything happens in network namespaces
//! that the tests make, as root, and remove; elsewhere they say that they were skipped.

mod support;

use ringfort_guest::TEST_PROMPT;
use std::path::Path;
use std::process::{Command, Stdio};
use support::netns::{NetNs, pings, until};
use support::*;

const RINGFORT: &str = env!("CARGO_BIN_EXE_ringfort");

/// Have a guest get its address by DHCP.
fn dhcp(g: &mut Guest) -> String {
    g.shell(
        "printf '#!/bin/sh\\n[ \"$1\" = bound ] && ip addr add $ip/$mask dev $interface && \
         ip route add default via $router; exit 0\\n' >/tmp/s; chmod +x /tmp/s; ip link set eth0 up",
    );
    g.shell(
        "udhcpc -i eth0 -n -q -t 20 -T 1 -s /tmp/s -F $(hostname) >/tmp/dhcp 2>&1 || (cat /tmp/dhcp; false)",
    );
    let address = g.shell("ip -4 -o addr show dev eth0 | awk '{print $4}' | cut -d/ -f1");
    assert!(!address.is_empty());
    address
}

/// Whether not even one of two goes through.
fn is_cut_off(g: &mut Guest, from: &str) -> bool {
    g.shell(&format!("if ping -c 2 -W 1 {from} >/dev/null; then echo no; else echo yes; fi")) == "yes"
}

/// A host, and a world beyond it that knows no way back to the host's networks.
fn host_and_world() -> Option<(NetNs, NetNs)> {
    let (host, world) = (NetNs::new("host")?, NetNs::new("world")?);
    host.ip(&format!("link add up0 type veth peer name up1 netns {}", world.0));
    host.ip("addr add 198.51.100.1/24 dev up0");
    host.ip("link set up0 up");
    world.ip("addr add 198.51.100.2/24 dev up1");
    world.ip("link set up1 up");
    Some((host, world))
}

#[test]
fn two_guests_on_a_managed_network_reach_each_other_and_the_world_and_nothing_is_left_behind() {
    let _turn = one_at_a_time();
    let Some((host, world)) = host_and_world() else { return };
    let scratch = Scratch::new("managed");
    let net = |words: &str| host.run(&format!("{RINGFORT} net --state-dir {} {words}", text(&scratch.0)));
    let refused =
        |words: &str| host.fails(&format!("{RINGFORT} net --state-dir {} {words}", text(&scratch.0)));
    let before = host.traces();
    let forwarding = host.run("cat /proc/sys/net/ipv4/ip_forward");

    net("define lab --ipv4 10.77.0.0/24 --ipv6 fd00:77::/64 --domain lab.test");
    assert!(refused("define other --ipv4 10.77.0.128/25").contains("overlaps"));
    assert!(refused("define other --ipv4 10.77.0.0").contains("give a network as"));
    net("define uplink --ipv4 198.51.100.0/25");
    assert!(refused("start uplink").contains("which the host has on up0"));
    assert!(refused("start nothing").contains("no network 'nothing'"));
    assert_eq!(host.traces(), before);

    net("start lab");
    assert!(refused("start lab").contains("up already"));
    let listed = net("list --json");
    let listed: serde_json::Value = serde_json::from_str(&listed).expect("JSON");
    let lab = listed.as_array().and_then(|a| a.iter().find(|n| n["name"] == "lab")).expect("lab");
    assert_eq!(lab["active"], true);
    assert_eq!(host.run("cat /proc/sys/net/ipv4/ip_forward").trim(), "1");

    let card = ["--net", "tap,bridge=rf-lab,macguard"];
    let mut a = host.guest(&card);
    let mut b = host.guest(&card);
    a.expect(TEST_PROMPT);
    b.expect(TEST_PROMPT);
    a.shell("hostname alpha");
    let (at_a, at_b) = (dhcp(&mut a), dhcp(&mut b));
    assert_ne!(at_a, at_b);
    let leases: serde_json::Value = serde_json::from_str(&net("leases lab --json")).expect("JSON");
    let addresses: Vec<&str> =
        leases.as_array().expect("leases").iter().filter_map(|l| l["address"].as_str()).collect();
    assert!(addresses.contains(&at_a.as_str()) && addresses.contains(&at_b.as_str()), "{leases}");
    assert!(pings(&mut a, &at_b) && pings(&mut b, &at_a));
    // The world has no route back: what it answers to is the host's address.
    assert!(!world.output(&format!("ping -c 1 -W 1 {at_a}")).status.success());
    assert!(pings(&mut a, "198.51.100.2"));
    // IPv6 by router advertisement.
    until("an IPv6 address", || a.shell("ip -6 addr show dev eth0").contains("fd00:77:"));
    assert!(pings(&mut a, "fd00:77::1"));
    // Nobody from outside gets in, even with a route.
    world.ip("route add 10.77.0.0/24 via 198.51.100.1");
    assert!(!world.output(&format!("ping -c 1 -W 1 {at_a}")).status.success());
    // A guest that calls itself something else is not heard.
    assert!(pings(&mut b, "10.77.0.1"));
    b.shell("ip link set eth0 down; ip link set eth0 address 52:54:00:66:66:66; ip link set eth0 up");
    b.shell("ip route replace default via 10.77.0.1 || true");
    assert!(is_cut_off(&mut b, "10.77.0.1"));

    for mut g in [a, b] {
        g.send("poweroff -f\n");
        assert!(g.wait().success());
    }
    net("stop lab");
    assert!(refused("stop lab").contains("is not up"));
    assert_eq!(host.traces(), before);
    assert_eq!(host.run("cat /proc/sys/net/ipv4/ip_forward"), forwarding);

    // A keeper that is killed: its watcher takes everything down.
    net("start lab");
    let listed: serde_json::Value = serde_json::from_str(&net("list --json")).expect("JSON");
    let pid = listed.as_array().and_then(|a| a.iter().find_map(|n| n["pid"].as_u64())).expect("a keeper");
    assert!(host.traces() != before);
    host.run(&format!("kill -9 {pid}"));
    until("the watcher's work", || host.traces() == before);
    until("the end of its processes", || {
        let all = Command::new("pgrep").args(["-f", text(&scratch.0)]).output().expect("pgrep");
        all.stdout.is_empty()
    });
    assert_eq!(host.run("cat /proc/sys/net/ipv4/ip_forward"), forwarding);

    // The watcher as well: what is left is named, and removed on request.
    net("start lab");
    let listed: serde_json::Value = serde_json::from_str(&net("list --json")).expect("JSON");
    let pid = listed.as_array().and_then(|a| a.iter().find_map(|n| n["pid"].as_u64())).expect("a keeper");
    host.run(&format!("kill -STOP {pid}"));
    // The brackets keep whoever runs this from being meant.
    host.run(&format!("pkill -KILL -f {}.watch.la[b]", text(&scratch.0)));
    host.run(&format!("kill -KILL {pid}"));
    until("the keeper's end", || !Path::new(&format!("/proc/{pid}")).exists());
    let told = host
        .command(RINGFORT)
        .args(["net", "--state-dir", text(&scratch.0), "list"])
        .output()
        .expect("ringfort");
    let told = String::from_utf8_lossy(&told.stderr);
    assert!(told.contains("network lab: its keeper was killed; `ringfort net recover`"), "{told}");
    assert_eq!(net("recover"), "network lab\n");
    assert_eq!(host.traces(), before);
}

#[test]
fn guests_of_an_isolated_network_reach_only_what_they_may() {
    let _turn = one_at_a_time();
    let Some((host, _world)) = host_and_world() else { return };
    let scratch = Scratch::new("isolated");
    let net = |words: &str| host.run(&format!("{RINGFORT} net --state-dir {} {words}", text(&scratch.0)));
    let before = host.traces();
    net(
        "define alone --ipv4 10.78.0.0/24 --isolate --shield-host --service builtin --host 52:54:00:00:00:0a,10.78.0.10,ten",
    );
    net("start alone");
    let mut a = host.guest(&["--net", "tap,bridge=rf-alone,mac=52:54:00:00:00:0a"]);
    let mut b = host.guest(&["--net", "tap,bridge=rf-alone"]);
    a.expect(TEST_PROMPT);
    b.expect(TEST_PROMPT);
    assert_eq!(dhcp(&mut a), "10.78.0.10");
    let at_b = dhcp(&mut b);
    assert!(net("leases alone").contains(&at_b));
    // Out, but not to each other; of the host, echo and names, and nothing else.
    assert!(pings(&mut a, "198.51.100.2"));
    assert!(is_cut_off(&mut b, "10.78.0.10") && is_cut_off(&mut a, &at_b));
    assert!(b.shell("nslookup ten 10.78.0.1").contains("10.78.0.10"));
    let mut server = host.command("python3");
    server.args(["-m", "http.server", "7777", "--bind", "10.78.0.1", "--directory", text(&scratch.0)]);
    let _server = Child(server.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("python3"));
    until("the server", || host.run("cat /proc/net/tcp").contains(":1E61"));
    assert_eq!(
        b.shell("if nc -w 2 10.78.0.1 7777 </dev/null 2>/dev/null; then echo in; else echo out; fi"),
        "out"
    );
    for mut g in [a, b] {
        g.send("poweroff -f\n");
        assert!(g.wait().success());
    }
    net("stop alone");
    assert_eq!(host.traces(), before);
}

#[test]
fn an_intel_card_and_a_bridge_that_goes_with_its_last_guest() {
    let _turn = one_at_a_time();
    let Some(host) = NetNs::new("intel") else { return };
    let before = host.ip("-o -br link");
    let scratch = Scratch::new("intel");
    let modules = ["pps_core", "ptp", "e1000e"];
    let (kernel, initrd) = match support::full_kernel::full_kernel(&scratch, &test_guest().initrd, &modules) {
        Ok(found) => found,
        Err(e) => {
            eprintln!("skipped: Debian's kernel with drivers for hardware: {e}");
            return;
        }
    };
    let mut g = host.guest_of(&kernel, &initrd, &["--net", "bridge=rflab,model=e1000e"]);
    g.expect(TEST_PROMPT);
    host.ip("addr add 10.79.0.1/24 dev rflab");
    let driver = g.shell("readlink /sys/class/net/eth0/device/driver || echo none");
    assert!(driver.ends_with("/e1000e"), "{driver}");
    g.shell("ip addr add 10.79.0.2/24 dev eth0; ip link set eth0 up");
    until("a link", || g.shell("cat /sys/class/net/eth0/carrier 2>/dev/null || echo 0") == "1");
    assert!(pings(&mut g, "10.79.0.1"));
    assert!(g.shell("grep eth0 /proc/interrupts").contains("MSI"));
    // Large transfers both ways keep their content: segmentation and checksums hold.
    let blob: Vec<u8> = (0..3_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let file = scratch.file("blob", &blob);
    let mut server = host.command("python3");
    server.args(["-m", "http.server", "8080", "--bind", "10.79.0.1", "--directory", text(&scratch.0)]);
    let _server = Child(server.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("python3"));
    until("the server", || {
        host.output("ip -o link").status.success() && host.run("cat /proc/net/tcp").contains(":1F90")
    });
    let sum = host.run(&format!("md5sum {}", text(&file)));
    let sum = sum.split_whitespace().next().expect("a sum").to_owned();
    assert_eq!(
        g.shell("wget -q -O /tmp/b http://10.79.0.1:8080/blob && md5sum </tmp/b | cut -d' ' -f1"),
        sum
    );
    let mut sink = host.command("python3");
    sink.args(["-c", "import socket,hashlib\ns=socket.create_server(('10.79.0.1',8081))\nprint('up',flush=True)\nc,_=s.accept()\nh=hashlib.md5()\nwhile d:=c.recv(65536): h.update(d)\nprint(h.hexdigest())"]);
    let sink = sink.stdout(Stdio::piped()).spawn().expect("python3");
    until("the other server", || host.run("cat /proc/net/tcp").contains(":1F91"));
    g.shell("nc 10.79.0.1 8081 </tmp/b");
    let said = sink.wait_with_output().expect("its sum");
    assert!(String::from_utf8_lossy(&said.stdout).contains(&sum));
    // The driver's other ways of interrupts: by line, and one message.
    for (mode, kind) in [(0, "IO-APIC"), (1, "MSI")] {
        g.shell(&format!("ip link set eth0 down; rmmod e1000e; insmod /modules/e1000e.ko IntMode={mode}"));
        g.shell("ip addr add 10.79.0.2/24 dev eth0; ip link set eth0 up; until ping -c 1 -W 2 10.79.0.1 >/dev/null; do :; done");
        let lines = g.shell("grep eth0 /proc/interrupts");
        assert!(lines.lines().count() == 1 && lines.contains(kind), "mode {mode}: {lines}");
        let got = g.shell("wget -q -O - http://10.79.0.1:8080/blob | md5sum | cut -d' ' -f1");
        assert_eq!(got, sum, "mode {mode}");
    }
    // The cable out and in again.
    g.send("\x01l");
    until("no link", || g.shell("cat /sys/class/net/eth0/carrier") == "0");
    g.send("\x01l");
    until("a link", || g.shell("cat /sys/class/net/eth0/carrier") == "1");
    assert!(pings(&mut g, "10.79.0.1"));
    g.send("poweroff -f\n");
    assert!(g.wait().success());
    assert_eq!(host.ip("-o -br link"), before);
}

/// The cables between a guest of QEMU's and one of Ringfort's, in QEMU's words and in ours: streams over a unix socket and TCP, datagrams
/// over UDP and unix sockets.
fn cables(dir: &Path) -> [(String, String); 4] {
    let at = |name: &str| dir.join(name).display().to_string();
    let (unix, ours, theirs) = (at("stream"), at("ours"), at("theirs"));
    let [tcp, a, b] = [(); 3].map(|()| {
        let s = std::net::UdpSocket::bind("127.0.0.1:0").expect("a port");
        s.local_addr().expect("its address").port()
    });
    [
        (
            format!("stream,id=n0,server=on,addr.type=unix,addr.path={unix}"),
            format!("stream,addr=unix:{unix},reconnect=1"),
        ),
        (
            format!("stream,id=n1,server=on,addr.type=inet,addr.host=127.0.0.1,addr.port={tcp}"),
            format!("stream,addr=tcp:127.0.0.1:{tcp},reconnect=1"),
        ),
        (
            format!(
                "dgram,id=n2,local.type=inet,local.host=127.0.0.1,local.port={a},remote.type=inet,remote.host=127.0.0.1,remote.port={b}"
            ),
            format!("dgram,local=udp:127.0.0.1:{b},remote=udp:127.0.0.1:{a}"),
        ),
        (
            format!("dgram,id=n3,local.type=unix,local.path={theirs},remote.type=unix,remote.path={ours}"),
            format!("dgram,local=unix:{ours},remote=unix:{theirs}"),
        ),
    ]
}

#[test]
fn a_guest_of_qemu_and_one_of_ringfort_on_cables_of_every_kind() {
    let _turn = one_at_a_time();
    if Command::new("qemu-system-x86_64").arg("--version").output().is_err() {
        eprintln!("skipped: no qemu-system-x86_64 (package qemu-system-x86)");
        return;
    }
    let scratch = Scratch::new("cable");
    let guest = test_guest();
    let cables = cables(&scratch.0);
    let start_qemu = || {
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args([
            "-accel",
            "tcg",
            "-m",
            "256M",
            "-nodefaults",
            "-no-user-config",
            "-nographic",
            "-serial",
            "stdio",
        ]);
        qemu.args(["-kernel", text(&guest.kernel), "-initrd", text(&guest.initrd), "-append"]);
        // Its timer's interrupts may come late on a busy host.
        qemu.arg(format!("{} no_timer_check", guest.cmdline));
        for (n, (theirs, _)) in cables.iter().enumerate() {
            qemu.args(["-netdev", theirs, "-device", &format!("virtio-net-pci,netdev=n{n}")]);
        }
        Guest::start(qemu)
    };
    let mut q = start_qemu();
    let mut args = vec!["run", "--accel", "soft", "--memory", "256M", "--cmdline", &guest.cmdline];
    args.extend(["--kernel", text(&guest.kernel), "--initrd", text(&guest.initrd)]);
    cables.iter().for_each(|(_, ours)| args.extend(["--net", ours]));
    let mut r = Guest::start(ringfort(&args));
    r.expect(TEST_PROMPT);
    q.expect(TEST_PROMPT);
    let up = |g: &mut Guest, host: u8| {
        for n in 0..4 {
            g.shell(&format!("ip addr add 10.8{n}.0.{host}/24 dev eth{n}; ip link set eth{n} up"));
        }
        // Something to fetch, of the same content each time.
        g.shell("awk 'BEGIN { for (i = 0; i < 200000; i++) print i * 7919 }' >/tmp/b; httpd -p 5000 -h /tmp");
    };
    up(&mut r, 1);
    up(&mut q, 2);
    let sum = r.shell("md5sum </tmp/b | cut -d' ' -f1");
    let exchange = |r: &mut Guest, q: &mut Guest, cables: std::ops::Range<usize>| {
        for n in cables {
            // A connection that was lost is made again within some seconds.
            r.shell(&format!("until ping -c 1 -W 2 10.8{n}.0.2 >/dev/null; do sleep 0.2; done"));
            for (g, from) in [(&mut *r, 2), (&mut *q, 1)] {
                let got =
                    g.shell(&format!("wget -q -O - http://10.8{n}.0.{from}:5000/b | md5sum | cut -d' ' -f1"));
                assert_eq!(got, sum, "cable {n}");
            }
        }
    };
    exchange(&mut r, &mut q, 0..4);
    // The other side goes away: links of streams are down until there is one again.
    drop(q);
    r.shell("until grep -q 0 /sys/class/net/eth0/carrier && grep -q 0 /sys/class/net/eth1/carrier; do sleep 0.1; done");
    for (name, socket) in [("stream", true), ("theirs", true), ("ours", false)] {
        // QEMU that is killed leaves its sockets; it wants them away.
        if socket {
            let _ = std::fs::remove_file(scratch.0.join(name));
        }
    }
    let mut q = start_qemu();
    q.expect(TEST_PROMPT);
    up(&mut q, 2);
    exchange(&mut r, &mut q, 0..4);
    for mut g in [r, q] {
        g.send("poweroff -f\n");
        g.wait();
    }
    assert!(!scratch.0.join("ours").exists(), "its socket is left behind");
}

#[test]
fn a_tap_by_descriptor_a_network_by_name_and_what_a_killed_guest_leaves() {
    let _turn = one_at_a_time();
    let Some(host) = NetNs::new("kinds") else { return };
    let scratch = Scratch::new("kinds");
    let before = host.ip("-o -br link");
    let state = text(&scratch.0).to_owned();
    let net = |words: &str| host.run(&format!("{RINGFORT} net --state-dir {state} {words}"));
    // A network's name is all that a guest has to know.
    let at = format!("network=lab,state-dir={state}");
    let guest = test_guest();
    let run = |card: &str| {
        format!("{RINGFORT} run --accel soft --memory 64M --kernel {} --net {card}", text(&guest.kernel))
    };
    assert!(host.fails(&run(&at)).contains("there is no network 'lab'"));
    net(
        "define lab --ipv4 10.91.0.0/24 --ipv6 fd00:91::/64 --domain lab.test --service builtin --host 52:54:00:00:00:0c,10.91.0.77,twelve",
    );
    assert!(host.fails(&run(&at)).contains("network lab is not up; `ringfort net start lab`"));
    net("start lab");
    // The second card is on a tap that somebody else opened, and passes on as a descriptor.
    let opener = "import fcntl,os,struct,sys\nf=os.open('/dev/net/tun',os.O_RDWR)\n\
        fcntl.ioctl(f,0x400454ca,struct.pack('16sH22x',b'rfgiven',0x5002))\nos.dup2(f,9)\nos.dup2(1,2)\nos.set_inheritable(9,True)\nos.execv(sys.argv[1],sys.argv[1:])";
    let stats = scratch.0.join("stats");
    let mut c = host.command("python3");
    c.args([
        "-c",
        opener,
        RINGFORT,
        "run",
        "--accel",
        "soft",
        "--memory",
        "256M",
        "--cmdline",
        &guest.cmdline,
    ]);
    c.args(["--kernel", text(&guest.kernel), "--initrd", text(&guest.initrd), "--stats", text(&stats)]);
    c.args(["--net", &format!("{at},mac=52:54:00:00:00:0c,queues=2"), "--net", "tap,fd=9", "--cpus", "2"]);
    let mut g = Guest::start(c);
    g.expect(TEST_PROMPT);
    assert_eq!(dhcp(&mut g), "10.91.0.77");
    assert!(pings(&mut g, "10.91.0.1"));
    // Names by UDP and TCP.
    assert!(g.shell("nslookup twelve.lab.test 10.91.0.1").contains("10.91.0.77"));
    let query = r"\000\041\000\001\001\000\000\001\000\000\000\000\000\000\006twelve\003lab\004test\000\000\001\000\001";
    let answer = g
        .shell(&format!("printf '{query}' | nc -w 9 10.91.0.1 53 | tail -c 4 | hexdump -v -e '1/1 \"%d.\"'"));
    assert_eq!(answer, "10.91.0.77.");
    host.ip("addr add 10.92.0.1/24 dev rfgiven");
    host.ip("link set rfgiven up");
    g.shell("ip addr add 10.92.0.2/24 dev eth1; ip link set eth1 up");
    assert!(pings(&mut g, "10.92.0.1"));
    // What the cards have counted is there while it runs (on standard error, which is the same here), and at the end.
    g.send("\x01n");
    let shown = g.expect("net1_tap_tx_dropped");
    assert!(shown.contains("net0_queue1_tx_frames ") && shown.contains("net1_queue0_rx_frames "), "{shown}");
    g.send("\npoweroff -f\n");
    assert!(g.wait().success());
    let counted: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&stats).expect("statistics")).expect("JSON");
    let frames = |name: &str| counted[name].as_u64().unwrap_or_else(|| panic!("no {name}: {counted}"));
    assert!(frames("net0_queue0_rx_frames") + frames("net0_queue1_rx_frames") > 3);
    assert!(frames("net1_queue0_tx_frames") > 1 && frames("net1_queue0_tx_bytes") > 100);
    net("stop lab");
    assert_eq!(host.ip("-o -br link"), before);

    // Two on a bridge that is made for them; both are killed.
    let [mut a, mut b] = [(); 2].map(|()| host.guest(&["--net", "bridge=rfkill"]));
    a.expect(TEST_PROMPT);
    b.expect(TEST_PROMPT);
    drop(a);
    assert_eq!(net("recover"), "", "one is on it still");
    assert!(host.ip("-o -br link").contains("rfkill"));
    drop(b);
    let told = host.output(&format!("{RINGFORT} net --state-dir {state} list"));
    assert!(String::from_utf8_lossy(&told.stderr).contains("bridge rfkill: its last guest was killed"));
    assert_eq!(net("recover"), "bridge rfkill\n");
    assert_eq!(host.ip("-o -br link"), before);
}

#[test]
fn what_cannot_be_had_is_told_in_one_line_and_leaves_nothing() {
    let _turn = one_at_a_time();
    let Some(host) = NetNs::new("bad") else { return };
    let guest = test_guest();
    let before = host.ip("-o -br link");
    for (card, says) in [
        ("tap,bridge=nobridge", "there is no nobridge"),
        ("tap,bridge=lo", "lo is no bridge"),
        ("tap,ifname=lo", "lo"),
        ("tap,fd=77", "no such descriptor"),
        ("tap,mac=1:2:3", "six bytes in hex"),
        ("tap,mac=01:00:00:00:00:01", "six bytes in hex"),
        ("bridge=rfx,helper=/nowhere,tx-rate=0", "lets nothing pass"),
        ("stream,addr=unix:/nowhere/x", "start the other side first"),
    ] {
        let words =
            format!("{RINGFORT} run --accel soft --memory 64M --kernel {} --net {card}", text(&guest.kernel));
        let said = host.fails(&words);
        assert!(said.contains(says), "{card}: {said}");
        assert_eq!(host.ip("-o -br link"), before, "{card}");
    }
}

#[test]
fn users_without_rights_get_a_tap_by_the_helper_as_its_list_allows() {
    let _turn = one_at_a_time();
    let Some(host) = NetNs::new("helper") else { return };
    let helper = Path::new(env!("CARGO_BIN_EXE_ringfort-bridge-helper"));
    let scratch = Scratch::new("helper");
    let guest = test_guest();
    host.ip("link add rfbr0 type bridge");
    host.ip("link set rfbr0 up");
    // What others may read and run, with a device node and an access list of its own that go with the mount namespace.
    let script = scratch.file(
        "as-nobody",
        format!(
            "set -e\nmount -t tmpfs t /mnt\nchmod 755 /mnt\ncp {RINGFORT} {} {} {} /mnt/\nchmod 4755 /mnt/ringfort-bridge-helper\n\
             mkdir -p /mnt/etc /etc/ringfort\nmount --bind /mnt/etc /etc/ringfort\necho \"$1\" >/etc/ringfort/bridge.conf\n\
             mkdir /mnt/net\nmknod /mnt/net/tun c 10 200\nchmod 666 /mnt/net/tun\nmount --bind /mnt/net /dev/net\n\
             mount --make-private /sys 2>/dev/null || true\n\
             exec setpriv --reuid 65534 --regid 65534 --clear-groups /mnt/ringfort run --accel soft --memory 256M \
             --kernel /mnt/vmlinuz --initrd /mnt/initrd --cmdline \"$2\" --net tap,bridge=rfbr0\n",
            text(helper),
            text(&guest.kernel),
            text(&guest.initrd),
        )
        .as_bytes(),
    );
    let run = |list: &str| {
        let mut c = host.command("unshare");
        c.args(["-m", "sh", text(&script), list, &guest.cmdline]);
        c
    };
    let denied = run("deny all").output().expect("unshare");
    let said = String::from_utf8_lossy(&denied.stderr).into_owned();
    assert!(!denied.status.success() && said.contains("does not allow it"), "{said}");
    let mut g = Guest::start(run("allow rfbr0"));
    g.expect(TEST_PROMPT);
    host.ip("addr add 10.81.0.1/24 dev rfbr0");
    g.shell("ip addr add 10.81.0.2/24 dev eth0; ip link set eth0 up");
    assert!(pings(&mut g, "10.81.0.1"));
    g.send("poweroff -f\n");
    assert!(g.wait().success());
    assert!(!host.ip("-o -br link").contains("rftap"));
}
