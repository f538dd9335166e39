use super::*;

fn user(text: &str) -> UserConfig {
    match nic(text).link {
        Link::User(c) => *c,
        other => panic!("{other:?}"),
    }
}

fn nic(text: &str) -> Nic {
    text.parse().unwrap_or_else(|e| panic!("{text}: {e}"))
}

#[test]
fn taps_bridges_and_sockets() {
    let tap = |text: &str| match nic(text).link {
        Link::Tap(c) => *c,
        other => panic!("{other:?}"),
    };
    let c = tap("tap,ifname=t0,bridge=br0,isolated,vhost=off,helper=/h,queues=4");
    assert_eq!((c.ifname.as_deref(), c.bridge.as_deref(), c.make_bridge), (Some("t0"), Some("br0"), false));
    assert!(c.isolated && c.helper == Some("/h".into()));
    assert_eq!(tap("tap,fd=7,fd=8").fds, [7, 8]);
    assert_eq!(nic("tap,fds=7:8:9").pairs(1), 3);
    assert_eq!((nic("tap").pairs(4), nic("tap,queues=2").pairs(1)), (1, 2));
    let c = tap("bridge=lab,isolated=on");
    assert!(c.make_bridge && c.isolated && c.bridge.as_deref() == Some("lab"));
    let told = |text: &str| match nic(text).link {
        Link::Stream(c) => format!("{} {} {:?}", c.address, c.server, c.reconnect),
        Link::Dgram(c) => format!("{} {}", c.local.map_or(String::new(), |l| l.to_string()), c.remote),
        other => panic!("{other:?}"),
    };
    assert_eq!(told("stream,addr=unix:/s,server=on"), "unix:/s true None");
    assert_eq!(told("stream,addr.type=unix,addr.path=/s"), "unix:/s false None");
    assert_eq!(
        told("stream,addr.type=inet,addr.host=::1,addr.port=5,reconnect=3"),
        "tcp:[::1]:5 false Some(3s)"
    );
    assert_eq!(told("dgram,local=udp:0.0.0.0:1,remote=udp:h:2"), "udp:0.0.0.0:1 udp:h:2");
    assert_eq!(
        told("dgram,remote.type=unix,remote.path=/b,local.type=unix,local.path=/a"),
        "unix:/a unix:/b"
    );
    let n = nic("tap,tx-rate=10M,rx-packets=1k,rx-packets-burst=5,macguard,rss,queues=2");
    assert!(n.guard.mac && n.rss && n.guard.rx.bytes.is_none());
    assert_eq!(n.guard.tx.bytes.map(|r| (r.per_second, r.burst)), Some((10 << 20, 1 << 20)));
    assert_eq!(n.guard.rx.packets.map(|r| (r.per_second, r.burst)), Some((1024, 5)));
    for (bad, says) in [
        ("tap,fd=x", "inherited descriptor"),
        ("tap,vhost=perhaps", "give on or off"),
        ("bridge=", "bridge needs a value"),
        ("bridge", "the networks are"),
        ("bridge=a,bridge=b", "unknown option 'bridge'"),
        ("network", "the networks are"),
        ("network=", "network needs a value"),
        ("network=lab,bridge=b", "unknown option 'bridge' of managed networks"),
        ("stream", "needs addr="),
        ("stream,addr=/s", "give unix:PATH or tcp:HOST:PORT"),
        ("stream,addr.type=inet,addr.path=/s", "a host and a port"),
        ("stream,addr.type=fd", "inet and unix"),
        ("stream,addr=unix:/s,server,reconnect=1", "leave it out"),
        ("dgram,local=udp:h:1", "needs remote="),
        ("dgram,remote=unix:/b", "local:"),
        ("dgram,remote=udp:h", "give HOST:PORT"),
        ("user,tx-burst=5", "tx-rate-burst: there is no limit"),
        ("user,rx-rate=much", "give a number"),
    ] {
        let e = bad.parse::<Nic>().unwrap_err().to_string();
        assert!(e.contains(says) && !e.contains('\n'), "{bad}: {e}");
    }
    for (bad, field) in [
        ("tap,ifname=a/b", "ifname"),
        ("bridge=1234567890123456", "bridge"),
        ("tap,fd=1", "fd"),
        ("tap,queues=17", "queues"),
        ("stream,addr=unix:/s,queues=2", "queues"),
        ("user,tx-packets=0", "tx-packets"),
    ] {
        let problems = nic(bad).problems();
        assert_eq!(problems.first().map(|p| p.0), Some(field), "{bad}: {problems:?}");
    }
    for text in [
        "tap,ifname=t0,tx-rate=5",
        "bridge=lab",
        "network=lab,state-dir=/x",
        "stream,addr=unix:/s,reconnect=1",
        "dgram,remote=udp:h:2",
    ] {
        let json = serde_json::to_string(&nic(text)).unwrap();
        assert_eq!(serde_json::from_str::<Nic>(&json).unwrap(), nic(text));
    }
}

#[test]
fn everything_that_a_user_network_can_be_told() {
    assert_eq!(user("user"), UserConfig::default());
    let c = user(
        "user,host=10.9.0.9,net=10.9.0.0/16,ipv6=off,hostname=a,domainname=b.c,dnssearch=d,dnssearch=e.f,restrict,nameserver=9.9.9.9,nameserver=[::1]:5353,\
         hostfwd=tcp:127.0.0.1:2222-:22,hostfwd=udp:[::1]:53-10.9.0.15:5353,hostfwd=::80-:8080,mtu=9000,dump=/x,,y,\
         hostalias=10.9.0.7,tftp=/srv,bootfile=pxe.0,host-loopback=off",
    );
    assert_eq!(
        (c.gateway, c.dns, c.guest),
        ([10, 9, 0, 9].into(), [10, 9, 0, 3].into(), [10, 9, 0, 15].into())
    );
    assert_eq!(c.network, ([10, 9, 0, 0].into(), 16));
    assert!(!c.ipv6 && c.restrict && !c.host_loopback);
    assert_eq!(c.search, ["d", "e.f"]);
    assert_eq!(c.nameservers, ["9.9.9.9:53".parse().unwrap(), "[::1]:5353".parse().unwrap()]);
    assert_eq!(c.mtu, 9000);
    assert_eq!(c.dump, Some("/x,y".into()));
    let told: Vec<String> = c.forwards.iter().map(|f| format!("{} {} {}", f.udp, f.host, f.guest)).collect();
    let expected =
        ["false 127.0.0.1:2222 0.0.0.0:22", "true [::1]:53 10.9.0.15:5353", "false 0.0.0.0:80 0.0.0.0:8080"];
    assert_eq!(told, expected);
    assert_eq!(c.problems(), []);
}

#[test]
fn what_is_wrong_is_told_with_what_to_do() {
    for (bad, says) in [
        ("", "the networks are"),
        ("users", "the networks are"),
        ("none,mac=x", "has no options"),
        ("user,mac=1:2:3", "six bytes in hex"),
        ("user,mac=", "mac needs a value"),
        ("user,model=ne2000", "the models are virtio-net, e1000e"),
        ("user,mtu=big", "give a number, 576 to 65535"),
        ("user,queues=70000", "give a number, 1 to"),
        ("user,colour=red", "unknown option 'colour' of user networks"),
        ("user,net=10.0.0.0", "give a network as"),
        ("user,net=10.0.0.0/33", "give a network as"),
        ("user,nameserver=one", "an address and a port as"),
        ("user,host=nowhere", "give an IPv4 address"),
        ("user,ipv6-prefix=fd00::1/64", "64 bits"),
        ("user,restrict=perhaps", "give on or off"),
        ("user,hostfwd=tcp", "must come first"),
        ("user,hostfwd=sctp:1:2-3:4", "neither tcp nor udp"),
        ("user,hostfwd=tcp:127.0.0.1:22", "a hyphen must separate"),
        ("user,hostfwd=tcp:127.0.0.1:99999-:22", "the host's end"),
        ("user,hostfwd=tcp:127.0.0.1:22-22", "the guest's end"),
        ("user,hostfwd=tcp:::1:22-:22", "the host's end"),
        ("passt,colour=red", "unknown option 'colour' of passt networks"),
        ("passt,path=", "path needs a value"),
        ("user,hostfwd=tcp:127.0.0.1:22-:0", "the guest's port is missing"),
    ] {
        let e = bad.parse::<Nic>().unwrap_err().to_string();
        assert!(e.contains(says) && !e.contains('\n'), "{bad}: {e}");
    }
    for (bad, field) in [
        ("user,net=10.0.0.0/31", "net"),
        ("user,host=1.2.3.4", "host"),
        ("user,mtu=600", "mtu"),
        ("user,queues=2", "queues"),
        ("user,hostname=a b", "hostname"),
        ("user,hostfwd=tcp::1-:2,hostfwd=tcp::1-:3", "hostfwd"),
    ] {
        let problems = bad.parse::<Nic>().unwrap_or_else(|e| panic!("{bad}: {e}")).problems();
        assert_eq!(problems.first().map(|p| p.0), Some(field), "{bad}: {problems:?}");
    }
}

#[test]
fn cards_of_a_command_line() {
    let nics = |all: &[&str]| NetOption::nics(all.iter().map(|t| t.parse().expect("an option")).collect());
    assert_eq!(nics(&[]), Ok(vec![Nic::default()]));
    assert_eq!(nics(&["none"]), Ok(vec![]));
    assert_eq!(nics(&["user", "user,mtu=1400"]).map(|n| n.len()), Ok(2));
    assert!(nics(&["user", "none"]).unwrap_err().to_string().contains("none stands alone"));
}

#[test]
fn addresses_last_and_differ() {
    let nic = Nic::default();
    assert_eq!(nic.address("a", 0), nic.address("a", 0));
    assert_ne!(nic.address("a", 0), nic.address("b", 0));
    assert_ne!(nic.address("a", 0), nic.address("a", 1));
    let given: Nic = "user,mac=52:54:00:00:00:09".parse().unwrap();
    assert_eq!(given.address("a", 0).to_string(), "52:54:00:00:00:09");
    assert_eq!((nic.pairs(4), given.pairs(1)), (1, 1));
}

#[test]
fn survives_json() {
    let nic: Nic = "user,hostfwd=tcp::1-:2,mac=52:54:00:00:00:09,hostalias=fec0::9".parse().unwrap();
    let text = serde_json::to_string(&nic).unwrap();
    assert_eq!(serde_json::from_str::<Nic>(&text).unwrap(), nic);
    assert!(serde_json::from_str::<Nic>(r#"{"link": {"kind": "user", "colour": 1}}"#).is_err());
    assert!(
        serde_json::from_str::<Nic>(r#"{"link": {"kind": "user"}, "mac": "ff:ff:ff:ff:ff:ff"}"#).is_err()
    );
}
