//! What a guest's driver has of its network card, seen with ethtool in the guest and with frames from the host.

mod support;

use ringfort_guest::{CpioWriter, TEST_PROMPT};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use support::full_kernel::full_kernel;
use support::netns::{NetNs, pings, until};
use support::*;

/// Sends COUNT frames to address MAC on link IF, with VLAN tag VID if there is one.
const INJECT: &str = "import socket,struct,sys\nname,mac,count=sys.argv[1],bytes.fromhex(sys.argv[2]),int(sys.argv[3])\n\
    tag=struct.pack('!HH',0x8100,int(sys.argv[4])) if len(sys.argv)>4 else b''\n\
    s=socket.socket(socket.AF_PACKET,socket.SOCK_RAW)\ns.bind((name,0))\n\
    for n in range(count): s.send(mac+bytes.fromhex('525400aaaaaa')+tag+struct.pack('!H',0x88b5)+bytes(60))\n";
/// Sends a datagram from each of COUNT ports.
const FLOWS: &str = "import socket,sys\nfor n in range(int(sys.argv[2])):\n s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\n \
    s.bind(('',20000+n))\n s.sendto(b'x',(sys.argv[1],9))\n";
/// Says so when the guest at an address announces it on link IF (RFC 5227 section 3).
const LISTEN: &str = "import socket,sys\ns=socket.socket(socket.AF_PACKET,socket.SOCK_RAW,socket.htons(0x806))\ns.bind((sys.argv[1],0))\n\
    a=socket.inet_aton(sys.argv[2])\nprint('listening',flush=True)\n\
    while True:\n f=s.recv(2000)\n if f[28:32]==a and f[38:42]==a: break\nprint('announced',flush=True)\n";
/// Sends each line to a server and says what comes back.
const TALK: &str = "import socket,sys\ns=socket.create_connection((sys.argv[1],int(sys.argv[2])))\n\
    for l in sys.stdin: s.sendall(l.encode()); print(s.recv(1000).decode(),end='',flush=True)\n";

/// What virtio-net and VLANs need of a kernel's modules, in loading order.
const MODULES: [&str; 13] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "failover",
    "net_failover",
    "virtio_net",
    "llc",
    "stp",
    "garp",
    "mrp",
    "8021q",
];

/// The packages' files behind the initramfs.
fn with_packages(initrd: &Path, packages: &[&str], scratch: &Scratch) -> PathBuf {
    let cache = ringfort_guest::cache_dir().expect("a cache folder");
    let mirror = ringfort_guest::ensure_mirror(&cache, packages, &mut ()).expect("packages");
    let tree = scratch.0.join("tree");
    for entry in std::fs::read_dir(mirror).expect("the packages") {
        let path = entry.expect("a package").path();
        if path.extension().is_some_and(|e| e == "deb") {
            let done = Command::new("dpkg-deb").arg("-x").arg(&path).arg(&tree).status().expect("dpkg-deb");
            assert!(done.success());
        }
    }
    for part in ["usr/share", "usr/lib/x86_64-linux-gnu/gconv"] {
        let _ = std::fs::remove_dir_all(tree.join(part));
    }
    let mut image = std::fs::read(initrd).expect("the initramfs");
    image.resize(image.len().next_multiple_of(512), 0);
    let mut archive = CpioWriter::new(Vec::new());
    pack(&mut archive, &tree, "");
    image.extend(archive.finish().expect("memory"));
    scratch.file("with-packages", &image)
}

fn pack(archive: &mut CpioWriter<Vec<u8>>, dir: &Path, name: &str) {
    for entry in std::fs::read_dir(dir).expect("a folder") {
        let entry = entry.expect("an entry");
        let (path, file) = (entry.path(), entry.file_name().into_string().expect("text"));
        let name = if name.is_empty() { file } else { format!("{name}/{file}") };
        let kind = entry.file_type().expect("its kind");
        if kind.is_dir() {
            archive.dir(&name, 0o755).expect("memory");
            pack(archive, &path, &name);
        } else if kind.is_symlink() {
            let to = std::fs::read_link(&path).expect("a link");
            archive.symlink(&name, text(&to)).expect("memory");
        } else {
            archive.file(&name, 0o755, &std::fs::read(&path).expect("a file")).expect("memory");
        }
    }
}

/// A number that a command in the guest says.
fn number(g: &mut Guest, command: &str) -> u64 {
    let said = g.shell(command);
    said.trim().parse().unwrap_or_else(|_| panic!("{command}: {said}"))
}

fn received(g: &mut Guest) -> u64 {
    number(g, "cat /sys/class/net/eth0/statistics/rx_packets")
}

/// Packets of each receive queue, as the driver counts them.
fn of_queues(g: &mut Guest) -> [u64; 2] {
    [0, 1].map(|q| {
        number(g, &format!("ethtool -S eth0 | grep -E ' rx(_queue_|){q}_packets:' | awk '{{print $2}}'"))
    })
}

#[test]
fn a_driver_finds_all_that_the_card_has_and_goes_on_elsewhere() {
    let _turn = one_at_a_time();
    let Some(host) = NetNs::new("cards") else { return };
    let scratch = Scratch::new("cards");
    let (kernel, initrd) = match full_kernel(&scratch, &test_guest().initrd, &MODULES) {
        Ok(found) => found,
        Err(e) => {
            eprintln!("skipped: Debian's kernel with VLANs: {e}");
            return;
        }
    };
    let initrd = with_packages(&initrd, &["ethtool"], &scratch);
    for (tap, address, queues) in [("rfc0", "10.93.0.1/24", "multi_queue"), ("rfc1", "10.94.0.1/24", "")] {
        host.ip(&format!("tuntap add {tap} mode tap {queues}"));
        host.ip(&format!("addr add {address} dev {tap}"));
        host.ip(&format!("link set {tap} up"));
    }
    let python = |program: &str, args: &str| {
        let mut c = host.command("python3");
        c.args(["-c", program]).args(args.split(' ')).stdin(Stdio::piped()).stdout(Stdio::piped());
        Child(c.spawn().expect("python3"))
    };
    let done =
        |program: &str, args: &str| assert!(python(program, args).0.wait().expect("python3").success());
    let (state, stats) = (scratch.0.join("state"), scratch.0.join("stats"));
    let mut g = host.guest_of(
        &kernel,
        &initrd,
        &[
            "--cpus",
            "2",
            "--save",
            text(&state),
            "--net",
            "tap,ifname=rfc0,queues=2,rss=on,mtu=1400,mac=52:54:00:00:00:01",
            "--net",
            "tap,ifname=rfc1,tx-packets=100,tx-packets-burst=20,macguard=on",
        ],
    );
    g.expect(TEST_PROMPT);
    g.shell("export PATH=$PATH:/sbin:/usr/sbin");
    for (n, to) in [(0, "10.93.0"), (1, "10.94.0")] {
        g.shell(&format!("ip addr add {to}.2/24 dev eth{n}; ip link set eth{n} up"));
        assert!(pings(&mut g, &format!("{to}.1")));
    }
    assert_eq!(g.shell("cat /sys/class/net/eth0/mtu"), "1400");
    let features = g.shell("ethtool -k eth0");
    for on in [
        "rx-checksumming",
        "tx-checksumming",
        "tcp-segmentation-offload",
        "generic-receive-offload",
        "rx-gro-hw",
        "rx-vlan-filter",
    ] {
        assert!(features.contains(&format!("{on}: on")), "no {on} in:\n{features}");
    }

    // Saved with a connection, and gone on with later: the driver announces itself, and the connection is there.
    g.shell("nc -ll -p 7 -e cat >/dev/null 2>&1 & until netstat -ltn | grep -q :7; do sleep 0.1; done");
    let mut talk = python(TALK, "10.93.0.2 7");
    let mut to_guest = talk.0.stdin.take().expect("piped");
    let mut from_guest = BufReader::new(talk.0.stdout.take().expect("piped"));
    let mut over_tcp = |word: &str| {
        writeln!(to_guest, "{word}").expect("python");
        let mut line = String::new();
        from_guest.read_line(&mut line).expect("python");
        assert_eq!(line.trim(), word);
    };
    over_tcp("before");
    g.send("\x01s");
    assert_eq!(g.wait().code(), Some(0));
    let pause = if std::env::var_os("RINGFORT_TEST_LONG").is_some() { 300 } else { 3 };
    std::thread::sleep(Duration::from_secs(pause));
    let mut listen = python(LISTEN, "rfc0 10.93.0.2");
    let mut heard = BufReader::new(listen.0.stdout.take().expect("piped"));
    let mut line = String::new();
    heard.read_line(&mut line).expect("python");
    let mut c = host.command(env!("CARGO_BIN_EXE_ringfort"));
    c.args(["restore", text(&state), "--accel", "soft", "--stats", text(&stats)]);
    let mut g = Guest::start(c);
    line.clear();
    heard.read_line(&mut line).expect("python");
    assert_eq!(line, "announced\n");
    over_tcp("after");
    g.shell("true");

    // Flows go to the queues that the guest's table says.
    g.shell("ethtool -L eth0 combined 2; ethtool -X eth0 equal 2");
    for (table, both) in [("equal 2", true), ("weight 1 0", false), ("weight 0 1", false)] {
        g.shell(&format!("ethtool -X eth0 {table}"));
        let before = of_queues(&mut g);
        done(FLOWS, "10.93.0.2 64");
        until("the flows", || {
            let now = of_queues(&mut g);
            now[0] + now[1] >= before[0] + before[1] + 64
        });
        let now = of_queues(&mut g);
        let [first, second] = [0, 1].map(|q| now[q] - before[q]);
        match (both, table.ends_with('0')) {
            (true, _) => assert!(first >= 12 && second >= 12, "{table}: {first} and {second}"),
            (_, true) => assert!(first >= 64 && second < 12, "{table}: {first} and {second}"),
            (_, false) => assert!(second >= 64 && first < 12, "{table}: {first} and {second}"),
        }
    }

    // Frames for others come only to a card that listens to all.
    for (setting, come) in [("off", false), ("on", true), ("off", false)] {
        g.shell(&format!("ip link set eth0 promisc {setting}"));
        let before = received(&mut g);
        done(INJECT, "rfc0 525400bbbbbb 50");
        done(INJECT, "rfc0 525400000001 30");
        let least = if come { 80 } else { 30 };
        until("frames for it", || received(&mut g) >= before + least);
        assert_eq!(received(&mut g) >= before + 50, come, "promisc {setting}");
    }
    // Of VLANs it gets those that it is in.
    for (command, vlan, come) in [
        ("ip link add link eth0 name v5 type vlan id 5; ip link set v5 up", 5, true),
        ("true", 6, false),
        ("ip link del v5", 5, false),
    ] {
        g.shell(command);
        let before = received(&mut g);
        done(INJECT, &format!("rfc0 525400000001 50 {vlan}"));
        done(INJECT, "rfc0 525400000001 30");
        let least = if come { 80 } else { 30 };
        until("frames for it", || received(&mut g) >= before + least);
        assert_eq!(received(&mut g) >= before + 50, come, "{command}, VLAN {vlan}");
    }

    // Long frames come whole as long as the driver wants them.
    let file = scratch.file("blob", &vec![7; 2_000_000]);
    let mut server = host.command("python3");
    server.args(["-m", "http.server", "8080", "--bind", "10.93.0.1", "--directory", text(&scratch.0)]);
    let _server = Child(server.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("python3"));
    until("the server", || host.run("cat /proc/net/tcp").contains(":1F90"));
    let sum = host.run(&format!("md5sum {}", text(&file)));
    for (setting, long) in [("on", true), ("off", false)] {
        g.shell(&format!("ethtool -K eth0 rx-gro-hw {setting}"));
        let mut totals = || {
            ["packets", "bytes"]
                .map(|what| number(&mut g, &format!("cat /sys/class/net/eth0/statistics/rx_{what}")))
        };
        let before = totals();
        let got = g.shell("wget -q -O - http://10.93.0.1:8080/blob | md5sum | cut -d' ' -f1");
        assert_eq!(sum.split(' ').next(), Some(got.as_str()));
        let mut totals = || {
            ["packets", "bytes"]
                .map(|what| number(&mut g, &format!("cat /sys/class/net/eth0/statistics/rx_{what}")))
        };
        let now = totals();
        let mean = (now[1] - before[1]) / (now[0] - before[0]).max(1);
        assert_eq!(mean > 1414, long, "{mean} bytes each with rx-gro-hw {setting}");
    }

    // The cable, as ethtool has it.
    for (key, says) in [("\x01l", "no"), ("\x01l", "yes")] {
        g.send(key);
        g.shell(&format!("until ethtool eth0 | grep -q 'Link detected: {says}'; do sleep 0.1; done"));
    }

    // What the guest sends is held back: 220 answers, 20 at once, the others at 100 a second.
    let start = Instant::now();
    let said = host.run("ping -f -q -c 220 10.94.0.2");
    assert!(start.elapsed() >= Duration::from_millis(1900), "{:?}: {said}", start.elapsed());
    // Another's address is of no use.
    g.shell("ip link set eth1 down; ip link set eth1 address 52:54:00:66:66:66; ip link set eth1 up");
    g.shell("if ping -c 2 -W 1 10.94.0.1 >/dev/null; then false; fi");
    drop(talk);
    g.send("poweroff -f\n");
    assert!(g.wait().success());
    let counted: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&stats).expect("statistics")).expect("JSON");
    let counter = |name: &str| counted[name].as_u64().unwrap_or_else(|| panic!("no {name}: {counted}"));
    assert!(counter("net0_queue0_rx_frames") > 64 && counter("net0_queue1_rx_frames") > 64, "{counted}");
    assert!(counter("net0_queue0_rx_dropped") + counter("net0_queue1_rx_dropped") >= 200, "{counted}");
    assert!(counter("net1_tx_held") > 10 && counter("net1_spoofed") > 1, "{counted}");
}

/// What its driver asks of the card at `ethtool -t`: registers, EEPROM, interrupts, frames that come back, the link.
#[test]
fn intels_card_passes_the_test_of_its_driver() {
    let _turn = one_at_a_time();
    let scratch = Scratch::new("intel");
    let modules = ["ptp", "pps_core", "e1000e"];
    let (kernel, initrd) = match full_kernel(&scratch, &test_guest().initrd, &modules) {
        Ok(found) => found,
        Err(e) => {
            eprintln!("skipped: Debian's kernel with drivers for real cards: {e}");
            return;
        }
    };
    let initrd = with_packages(&initrd, &["ethtool"], &scratch);
    let options = ["--memory", "256M", "--net", "user,model=e1000e"];
    let mut g = Guest::run(&run_args("soft", &kernel, &initrd, &test_guest().cmdline, &options));
    g.expect(TEST_PROMPT);
    g.shell("export PATH=$PATH:/sbin:/usr/sbin; ip link set eth0 up");
    g.shell("until ethtool eth0 | grep -q 'Link detected: yes'; do sleep 0.1; done");
    let said = g.shell("ethtool -t eth0 offline; true");
    assert!(said.contains("The test result is PASS"), "{said}");
    g.send("poweroff -f\n");
    assert!(g.wait().success());
}
