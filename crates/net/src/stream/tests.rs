use super::*;
use crate::testing::{Ear, frame};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

const A: [u8; 6] = [2, 0, 0, 0, 0, 0xa];
const B: [u8; 6] = [2, 0, 0, 0, 0, 0xb];
const NONE: VnetHeader = VnetHeader { checksum: None, valid: false, gso: None, ecn: false, header_len: 0 };

fn path(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("rf-{name}-{}-{:x}.sock", std::process::id(), fastrand::u64(..)))
}

fn stream(address: StreamAddress, server: bool, reconnect: Option<Duration>) -> Result<Stream, NetError> {
    Stream::new(&StreamConfig { address, server, reconnect })
}

fn exchange(a: &dyn NetBackend, ear_a: &Ear, b: &dyn NetBackend, ear_b: &Ear) {
    for (from, to, ear, mac) in [(a, b, ear_b, A), (b, a, ear_a, B)] {
        let sent = frame([0xff; 6], mac, &[9; 1486]);
        from.send(0, &NONE, &sent);
        assert!(ear.frame(to, 0, |_| true).1 == sent);
    }
}

#[test]
fn addresses() {
    assert_eq!("unix:/a:b".parse(), Ok(StreamAddress::Unix("/a:b".into())));
    assert_eq!("tcp:[::1]:80".parse(), Ok(StreamAddress::Tcp("[::1]:80".into())));
    for bad in ["", "unix:", "tcp:1", "tcp::1", "tcp:h:65536", "udp:h:1", "/path"] {
        assert!(bad.parse::<StreamAddress>().is_err(), "{bad}");
    }
    assert!(format!("unix:{}", "x".repeat(108)).parse::<DatagramAddress>().is_err());
    assert_eq!("udp:230.0.0.1:9".parse::<DatagramAddress>().unwrap().to_string(), "udp:230.0.0.1:9");
}

#[test]
fn unix_and_tcp_connect_break_and_come_again() {
    let at = path("s");
    for tcp in [false, true] {
        let address =
            if tcp { StreamAddress::Tcp("127.0.0.1:0".into()) } else { StreamAddress::Unix(at.clone()) };
        let a = stream(address.clone(), true, None).unwrap();
        let ear_a = Ear::at(&a);
        ear_a.wait("no link", |h| h.link == Some(false));
        let address = a.local_address().map_or(address, |a| StreamAddress::Tcp(a.to_string()));
        for _ in 0..2 {
            let b = stream(address.clone(), false, None).unwrap();
            let ear_b = Ear::at(&b);
            ear_b.wait("a link", |h| h.link == Some(true));
            ear_a.wait("a link", |h| h.link == Some(true));
            exchange(&a, &ear_a, &b, &ear_b);
            drop(b);
            ear_a.wait("the end", |h| h.link == Some(false));
        }
        drop(a);
        let e = stream(address, false, None).map(drop).unwrap_err().to_string();
        assert!(e.contains("start the other side first") && !e.contains('\n'), "{e}");
    }
    assert!(!at.exists());
}

#[test]
fn a_client_tries_again_until_there_is_a_server() {
    let at = path("r");
    let b = stream(StreamAddress::Unix(at.clone()), false, Some(Duration::from_millis(20))).unwrap();
    let ear_b = Ear::at(&b);
    for _ in 0..2 {
        ear_b.wait("no link", |h| h.link == Some(false));
        let a = stream(StreamAddress::Unix(at.clone()), true, None).unwrap();
        let ear_a = Ear::at(&a);
        ear_b.wait("a link", |h| h.link == Some(true));
        ear_a.wait("a link", |h| h.link == Some(true));
        exchange(&a, &ear_a, &b, &ear_b);
    }
}

#[test]
fn a_place_that_is_taken_is_told_and_a_stale_one_replaced() {
    let at = path("t");
    let first = stream(StreamAddress::Unix(at.clone()), true, None).unwrap();
    let e = stream(StreamAddress::Unix(at.clone()), true, None).map(drop).unwrap_err().to_string();
    assert!(e.contains("listening at unix:") && e.contains("choose another"), "{e}");
    assert!(at.exists(), "the first one's socket is still there");
    drop(first);
    drop(UnixListener::bind(&at).unwrap());
    assert!(at.exists());
    drop(stream(StreamAddress::Unix(at.clone()), true, None).unwrap());
    std::fs::write(&at, "a file").unwrap();
    assert!(stream(StreamAddress::Unix(at.clone()), true, None).is_err());
    assert_eq!(std::fs::read(&at).unwrap(), b"a file");
    std::fs::remove_file(at).unwrap();
}

#[test]
fn frames_are_cut_anywhere_and_back_pressure_loses_nothing() {
    let at = path("w");
    let a = stream(StreamAddress::Unix(at.clone()), true, None).unwrap();
    let ear = Ear::at(&a);
    let mut peer = UnixStream::connect(&at).unwrap();
    ear.wait("a link", |h| h.link == Some(true));
    // QEMU's form, one byte at a time; then one with nothing in it, one that is too long, and a good one.
    let mut bytes = vec![0, 0, 0, 20];
    bytes.extend([5; 20]);
    bytes.extend([0; 4]);
    bytes.extend((MAX_FRAME as u32 + 1).to_be_bytes());
    bytes.extend(vec![1; MAX_FRAME + 1]);
    bytes.extend([0, 0, 0, 14]);
    bytes.extend([6; 14]);
    for b in &bytes[..24] {
        peer.write_all(&[*b]).unwrap();
    }
    assert_eq!(ear.frame(&a, 0, |_| true).1, [5; 20]);
    let mut writer = peer.try_clone().unwrap();
    let rest = bytes[24..].to_vec();
    let thread = std::thread::spawn(move || writer.write_all(&rest).unwrap());
    assert_eq!(ear.frame(&a, 0, |_| true).1, [6; 14]);
    thread.join().unwrap();
    // The peer does not read: at some time there is no room.
    let big = vec![8; 60_000];
    let mut sent = 0;
    while a.send(0, &NONE, &big) == Sent::Done {
        sent += 1;
        assert!(sent < 10_000);
    }
    let mut seen = Vec::new();
    let mut frames = 0;
    while frames < sent {
        let mut head = [0; 4];
        peer.read_exact(&mut head).unwrap();
        seen.resize(u32::from_be_bytes(head) as usize, 0);
        peer.read_exact(&mut seen).unwrap();
        assert!(seen == big);
        frames += 1;
    }
    ear.wait("room", |h| h.writable > 0);
    assert_eq!(a.send(0, &NONE, &big), Sent::Done);
    // A length that no frame has: the connection ends, the next may come.
    peer.write_all(&[0xff; 8]).unwrap();
    let mut f = Vec::new();
    while a.receive(0, &mut f).is_none() && a.inner.current().is_some() {
        std::thread::yield_now();
    }
    ear.wait("the end", |h| h.link == Some(false));
    let _again = UnixStream::connect(&at).unwrap();
    ear.wait("a link", |h| h.link == Some(true));
}

use crate::MAX_FRAME;

#[test]
fn datagrams_over_unix_udp_and_a_group() {
    let (p, q) = (path("a"), path("b"));
    let unix = |at: &PathBuf, to: &PathBuf| {
        Datagrams::new(&DatagramConfig {
            local: Some(DatagramAddress::Unix(at.clone())),
            remote: DatagramAddress::Unix(to.clone()),
        })
    };
    let (a, b) = (unix(&p, &q).unwrap(), unix(&q, &p).unwrap());
    exchange(&a, &Ear::at(&a), &b, &Ear::at(&b));
    assert!(unix(&p, &q).is_err(), "taken");
    drop((a, b));
    assert!(!p.exists() && !q.exists());

    let udp = |at: &str, to: &str| {
        Datagrams::new(&DatagramConfig {
            local: (!at.is_empty()).then(|| DatagramAddress::Udp(at.into())),
            remote: DatagramAddress::Udp(to.into()),
        })
    };
    let free = || std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let (x, y) = (free(), free());
    let (a, b) = (udp(&x, &y).unwrap(), udp(&y, &x).unwrap());
    exchange(&a, &Ear::at(&a), &b, &Ear::at(&b));

    let port = free().rsplit_once(':').unwrap().1.to_owned();
    let group = format!("239.1.2.3:{port}");
    match (udp("127.0.0.1:0", &group), udp("127.0.0.1:0", &group)) {
        (Ok(a), Ok(b)) => {
            let (ear_a, ear_b) = (Ear::at(&a), Ear::at(&b));
            exchange(&a, &ear_a, &b, &ear_b);
            // What a sent came back to it, too, but it is not given to the guest.
            assert_eq!(a.receive(0, &mut Vec::new()), None);
        }
        (Err(e), _) | (_, Err(e)) => eprintln!("skipped: no multicast on this host's loopback: {e}"),
    }
    // The address that cannot be had is named, and not the other. (192.0.2.0/24 is nobody's.)
    let c = DatagramConfig {
        local: Some("udp:192.0.2.1:5000".parse().unwrap()),
        remote: "udp:127.0.0.1:5000".parse().unwrap(),
    };
    let said = Datagrams::new(&c).map(drop).unwrap_err().to_string();
    assert!(said.starts_with("local=udp:192.0.2.1:5000: "), "{said}");
    for (local, remote) in [("udp:127.0.0.1:1", "unix:/x"), ("unix:/x", "udp:127.0.0.1:1")] {
        let c = DatagramConfig { local: Some(local.parse().unwrap()), remote: remote.parse().unwrap() };
        assert!(Datagrams::new(&c).map(drop).unwrap_err().to_string().starts_with("local:"));
    }
}
