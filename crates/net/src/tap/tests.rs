use super::*;
use crate::GsoKind;
use crate::testing::{Ear, frame, new_namespace};
use std::os::fd::IntoRawFd;

const A: [u8; 6] = [2, 0, 0, 0, 0, 0xa];
const B: [u8; 6] = [2, 0, 0, 0, 0, 0xb];

fn on_bridge(name: &str) -> TapConfig {
    TapConfig { bridge: Some(name.into()), make_bridge: true, ..TapConfig::default() }
}

/// Names of all links but loopback.
fn links() -> Vec<String> {
    let mut names: Vec<_> = Netlink::open().unwrap().links().unwrap().into_iter().map(|l| l.name).collect();
    names.retain(|n| {
        n != "lo"
            && !["tunl0", "sit0", "ip6tnl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "ip6gre0"]
                .contains(&n.as_str())
    });
    names.sort();
    names
}

#[test]
fn wrong_options_are_told_by_name() {
    let bad = |c: TapConfig| {
        let e = Tap::new(&c).map(drop).unwrap_err().to_string();
        assert!(!e.contains('\n'), "{e}");
        e
    };
    let d = TapConfig::default;
    assert!(bad(TapConfig { ifname: Some("a/b".into()), ..d() }).starts_with("ifname: 'a/b'"));
    assert!(bad(TapConfig { bridge: Some(String::new()), ..d() }).starts_with("bridge:"));
    assert!(bad(TapConfig { queues: 17, ..d() }).starts_with("queues: 17"));
    assert!(bad(TapConfig { fds: vec![1], ..d() }).starts_with("fd: 1 is standard"));
    assert!(bad(TapConfig { fds: vec![900, 901], ..d() }).contains("give one for each"));
    assert!(bad(TapConfig { fds: vec![900], ifname: Some("x".into()), ..d() }).contains("leave ifname"));
    assert!(bad(TapConfig { fds: vec![900], ..d() }).contains("no such descriptor"));
    let null = std::fs::File::open("/dev/null").unwrap().into_raw_fd();
    assert!(bad(TapConfig { fds: vec![null], ..d() }).contains("no tap"));
}

#[test]
fn two_taps_on_a_bridge_that_comes_and_goes_with_them() {
    if !new_namespace() {
        return;
    }
    let before = links();
    let (a, b) = (Tap::new(&on_bridge("rfbr")).unwrap(), Tap::new(&on_bridge("rfbr")).unwrap());
    assert_eq!(links().len(), before.len() + 3);
    let (_, ear) = (Ear::at(&a), Ear::at(&b));
    let sent = frame([0xff; 6], A, &[7; 100]);
    assert_eq!(a.send(0, &VnetHeader::default(), &sent), Sent::Done);
    let (header, got) = ear.frame(&b, 0, |f| f[6..12] == A);
    assert_eq!((header.gso, got), (None, sent));
    drop(a);
    assert_eq!(links().len(), before.len() + 2, "the other one still needs the bridge");
    drop(b);
    assert_eq!(links(), before);
}

/// A TCP segment over IPv4 with `payload` bytes, its checksum left to be completed.
fn long_segment(payload: usize) -> (VnetHeader, Vec<u8>) {
    let mut f = [&B[..], &A, &[8, 0]].concat();
    let total = (40 + payload) as u16;
    let mut ip =
        [&[0x45u8, 0][..], &total.to_be_bytes(), &[0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]]
            .concat();
    let sum = crate::wire::checksum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    f.extend_from_slice(&ip);
    let mut tcp = vec![0, 80, 0, 81, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x18, 0xff, 0xff, 0, 0, 0, 0];
    // The pseudo header's sum (virtio 1.3 section 5.1.6.2).
    let pseudo = [&ip[12..20], &[0, 6], &(20 + payload as u16).to_be_bytes()].concat();
    let sum = !crate::wire::checksum(&pseudo);
    tcp[16..18].copy_from_slice(&sum.to_be_bytes());
    f.extend_from_slice(&tcp);
    f.extend((0..payload).map(|n| n as u8));
    let header = VnetHeader {
        checksum: Some((34, 16)),
        gso: Some((GsoKind::Tcp4, 1000)),
        header_len: 54,
        ..VnetHeader::default()
    };
    (header, f)
}

#[test]
fn long_frames_pass_whole_or_are_cut_by_the_host() {
    if !new_namespace() {
        return;
    }
    let (a, b) = (Tap::new(&on_bridge("rfbr")).unwrap(), Tap::new(&on_bridge("rfbr")).unwrap());
    let ear = Ear::at(&b);
    let can = a.accepts();
    assert!(can.checksum && can.tso4 && can.tso6, "{can:?}");
    let (header, segment) = long_segment(2500);
    // The other side takes nothing off: three segments, with checksums.
    assert_eq!(a.send(0, &header, &segment), Sent::Done);
    let mut payload = Vec::new();
    for _ in 0..3 {
        let (h, f) = ear.frame(&b, 0, |f| f[6..12] == A);
        assert_eq!((h.gso, h.checksum), (None, None));
        let tcp = &f[34..];
        let pseudo = [&f[26..34], &[0, 6], &(tcp.len() as u16).to_be_bytes()].concat();
        assert_eq!(crate::wire::checksum(&[&pseudo[..], tcp].concat()), 0, "checksum");
        payload.extend_from_slice(&f[54..]);
    }
    assert!(payload == segment[54..]);
    // It takes all: one frame, with the work left to do.
    b.set_offloads(can);
    assert_eq!(a.send(0, &header, &segment), Sent::Done);
    let (h, f) = ear.frame(&b, 0, |f| f[6..12] == A);
    assert_eq!((h.gso, h.checksum, f.len()), (Some((GsoKind::Tcp4, 1000)), Some((34, 16)), segment.len()));
}

#[test]
fn a_named_tap_of_several_queues_and_one_by_descriptor() {
    if !new_namespace() {
        return;
    }
    let before = links();
    let config = TapConfig { ifname: Some("rf-many".into()), queues: 3, ..TapConfig::default() };
    let many = Tap::new(&config).unwrap();
    assert_eq!((many.name(), many.max_pairs(), many.mtu()), ("rf-many", 3, Some(1500)));
    many.set_pairs(1);
    many.set_pairs(3);
    let again = Tap::new(&TapConfig { queues: 1, ..config.clone() }).map(|t| t.max_pairs());
    assert_eq!(again.unwrap(), 1, "a fourth queue of the same tap");
    drop(many);
    assert_eq!(links(), before);
    let queue = TapQueue::open(Some("rf-fd"), 1).unwrap().swap_remove(0);
    let one = Tap::new(&TapConfig { ifname: Some("rf-fd".into()), ..TapConfig::default() });
    assert!(one.map(drop).unwrap_err().to_string().contains("another program has it"));
    // SAFETY: a new descriptor, given away at once.
    let fd = unsafe { libc::dup(queue.as_raw_fd()) };
    drop(queue);
    let tap = Tap::new(&TapConfig { fds: vec![fd], ..TapConfig::default() }).unwrap();
    assert_eq!(tap.name(), "rf-fd");
    drop(tap);
    assert_eq!(links(), before);
}

#[test]
fn a_missing_bridge_leaves_nothing_behind() {
    if !new_namespace() {
        return;
    }
    let before = links();
    let missing = TapConfig { bridge: Some("nobridge".into()), ..TapConfig::default() };
    let e = Tap::new(&missing).map(drop).unwrap_err().to_string();
    assert!(e.contains("there is no nobridge") && !e.contains('\n'), "{e}");
    let no_bridge = TapConfig { bridge: Some("lo".into()), make_bridge: true, ..TapConfig::default() };
    assert!(Tap::new(&no_bridge).map(drop).unwrap_err().to_string().contains("lo is no bridge"));
    assert_eq!(links(), before);
    // One that others made stays.
    let mut netlink = Netlink::open().unwrap();
    netlink.add_bridge("others", None, "somebody's").unwrap();
    drop(Tap::new(&on_bridge("others")).unwrap());
    assert_eq!(links().len(), before.len() + 1);
}

#[test]
fn isolated_ports_do_not_hear_each_other() {
    if !new_namespace() {
        return;
    }
    let isolated = TapConfig { isolated: true, ..on_bridge("rfbr") };
    let [a, b] = [0, 1].map(|_| Tap::new(&isolated).unwrap());
    let open = Tap::new(&on_bridge("rfbr")).unwrap();
    let (ear_b, ear_open) = (Ear::at(&b), Ear::at(&open));
    a.send(0, &VnetHeader::default(), &frame([0xff; 6], A, &[1; 60]));
    ear_open.frame(&open, 0, |f| f[6..12] == A);
    // What the open port says comes to the isolated one behind all that a could have said.
    open.send(0, &VnetHeader::default(), &frame([0xff; 6], B, &[2; 60]));
    let (_, first) = ear_b.frame(&b, 0, |f| f[12..14] == [0x88, 0xb5]);
    assert_eq!(first[6..12], B);
}
