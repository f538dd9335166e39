use super::*;
use crate::GsoKind;
use crate::testing::{Ear, frame};
use std::collections::VecDeque;
use std::time::Duration;

const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
const OTHER: [u8; 6] = [0x52, 0x54, 0, 9, 9, 9];

#[derive(Default)]
struct Wire {
    sent: Mutex<Vec<Vec<u8>>>,
    inbound: Mutex<VecDeque<Vec<u8>>>,
}

impl NetBackend for Wire {
    fn accepts(&self) -> Offloads {
        Offloads::ALL
    }
    fn produces(&self) -> Offloads {
        Offloads::default()
    }
    fn attach(&self, _events: Arc<dyn NetEvents>) {}
    fn set_offloads(&self, _offloads: Offloads) {}
    fn send(&self, _pair: u16, _header: &VnetHeader, frame: &[u8]) -> Sent {
        lock(&self.sent).push(frame.to_vec());
        Sent::Done
    }
    fn receive(&self, _pair: u16, frame: &mut Vec<u8>) -> Option<VnetHeader> {
        *frame = lock(&self.inbound).pop_front()?;
        Some(VnetHeader::default())
    }
}

fn guard(config: GuardConfig) -> (Arc<Wire>, Guard) {
    let wire = Arc::new(Wire::default());
    (wire.clone(), Guard::new(wire, &config, MacAddr::new(MAC).unwrap()).unwrap())
}

fn arp(from: [u8; 6], says: [u8; 6], tags: usize) -> Vec<u8> {
    let tag = [0x81, 0, 0, 5].repeat(tags);
    [&[0xff; 6], &from[..], &tag, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &says, &[10, 0, 0, 1], &[0; 10]].concat()
}

#[test]
fn frames_from_other_addresses_are_lost() {
    let (wire, g) = guard(GuardConfig { mac: true, ..GuardConfig::default() });
    let none = VnetHeader::default();
    let good = [frame(OTHER, MAC, &[1; 50]), arp(MAC, MAC, 0), arp(MAC, MAC, 2)];
    let bad = [
        frame(MAC, OTHER, &[1; 50]),
        arp(OTHER, OTHER, 0),
        arp(MAC, OTHER, 0),
        arp(MAC, OTHER, 2),
        arp(MAC, MAC, 0)[..20].to_vec(),
        vec![0; 9],
    ];
    for f in good.iter().chain(&bad) {
        assert_eq!(g.send(0, &none, f), Sent::Done);
    }
    assert!(*lock(&wire.sent) == good);
    assert_eq!(g.statistics(), GuardStatistics { spoofed: bad.len() as u64, ..Default::default() });
}

#[test]
fn limits_hold_back_and_wake() {
    let rate = Some(Rate { per_second: 200, burst: 2 });
    let limit = Limit { packets: rate, bytes: None };
    let (wire, g) = guard(GuardConfig { tx: limit, rx: limit, mac: false });
    let ear = Ear::at(&g);
    let f = frame(OTHER, MAC, &[1; 50]);
    let start = Instant::now();
    let mut sent = 0;
    while sent < 12 {
        match g.send(0, &VnetHeader::default(), &f) {
            Sent::Done => sent += 1,
            Sent::Full => {
                let before = g.statistics().tx_held;
                ear.wait("room", |h| h.writable >= before);
            }
        }
    }
    // Two at once, ten at 200 a second.
    assert!(start.elapsed() >= Duration::from_millis(45), "{:?}", start.elapsed());
    assert_eq!(lock(&wire.sent).len(), 12);
    let start = Instant::now();
    (0..12).for_each(|_| lock(&wire.inbound).push_back(f.clone()));
    for _ in 0..12 {
        assert!(ear.frame(&g, 0, |_| true).1 == f);
    }
    assert!(start.elapsed() >= Duration::from_millis(45), "{:?}", start.elapsed());
    assert!(g.statistics().rx_held > 0);
}

#[test]
fn long_frames_count_as_what_they_become() {
    for (kind, offset, headers) in [(GsoKind::Tcp4, 16, 66), (GsoKind::Udp, 6, 42)] {
        // A guest may say that all of it is headers.
        for header_len in [0, headers, 0xffff] {
            let h = VnetHeader {
                gso: Some((kind, 1448)),
                checksum: Some((34, offset)),
                header_len,
                ..VnetHeader::default()
            };
            let mut f = vec![0; usize::from(headers) + 1448 * 3 + 1];
            f[34 + 12] = 0x80;
            assert_eq!(packets(&h, &f), 4);
            assert_eq!(packets(&h, &[0; 20]), 1);
        }
    }
    assert_eq!(packets(&VnetHeader::default(), &[0; 2000]), 1);
    let zero = GuardConfig {
        tx: Limit { bytes: Some(Rate { per_second: 0, burst: 1 }), packets: None },
        ..GuardConfig::default()
    };
    assert_eq!(zero.problems()[0].0, "tx-rate");
}
