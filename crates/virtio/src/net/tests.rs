use super::*;
use crate::feature::EVENT_IDX;
use crate::status;
use crate::testing::{BUFFERS, Rig};
use ringfort_net::GsoKind;
use std::collections::VecDeque;

const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
const GROUP: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
const OTHER: [u8; 6] = [0x52, 0x54, 0, 9, 9, 9];

/// Keeps what is sent; gives what the test puts in.
#[derive(Default)]
struct Wire {
    sent: Mutex<Vec<(u16, VnetHeader, Vec<u8>)>>,
    inbound: Mutex<VecDeque<(VnetHeader, Vec<u8>)>>,
    offloads: Mutex<Offloads>,
    pairs: AtomicU64,
    events: OnceLock<Arc<dyn NetEvents>>,
    full: std::sync::atomic::AtomicBool,
    flushed: AtomicU64,
    /// Who took the last frame.
    taker: Mutex<Option<std::thread::ThreadId>>,
}

impl NetBackend for Wire {
    fn accepts(&self) -> Offloads {
        Offloads::ALL
    }
    fn produces(&self) -> Offloads {
        Offloads::ALL
    }
    fn max_pairs(&self) -> u16 {
        4
    }
    fn attach(&self, events: Arc<dyn NetEvents>) {
        let _ = self.events.set(events);
    }
    fn set_offloads(&self, offloads: Offloads) {
        *lock(&self.offloads) = offloads;
    }
    fn set_pairs(&self, pairs: u16) {
        self.pairs.store(pairs.into(), Ordering::SeqCst);
    }
    fn send(&self, pair: u16, header: &VnetHeader, frame: &[u8]) -> Sent {
        if self.full.load(Ordering::SeqCst) {
            return Sent::Full;
        }
        lock(&self.sent).push((pair, *header, frame.to_vec()));
        Sent::Done
    }
    fn flush(&self, _pair: u16) {
        self.flushed.fetch_add(1, Ordering::SeqCst);
    }
    fn receive(&self, _pair: u16, frame: &mut Vec<u8>) -> Option<VnetHeader> {
        let (header, data) = lock(&self.inbound).pop_front()?;
        *frame = data;
        *lock(&self.taker) = Some(std::thread::current().id());
        Some(header)
    }
}

impl Wire {
    fn give(&self, header: VnetHeader, frame: Vec<u8>) {
        lock(&self.inbound).push_back((header, frame));
        self.events.get().expect("attached").readable(0);
    }
}

fn frame_to(to: [u8; 6], len: usize) -> Vec<u8> {
    let mut f = vec![0; len];
    f[..6].copy_from_slice(&to);
    f[6..12].copy_from_slice(&OTHER);
    (12..len).for_each(|i| f[i] = i as u8);
    f[12..14].copy_from_slice(&[8, 0]);
    f
}

fn net(pairs: u16) -> (Arc<Wire>, Arc<Net>) {
    let wire = Arc::new(Wire::default());
    let net = Net::new(wire.clone(), NetOptions { mac: MAC, pairs, mtu: Some(1500), rss: false }).unwrap();
    (wire, net)
}

/// Send a control command; gives the answer.
fn control(rig: &mut Rig, queue: u16, command: &[u8]) -> u8 {
    const AT: u64 = BUFFERS + 0x20_0000;
    rig.write(AT, command);
    rig.write(AT + 0x1000, &[0xee]);
    rig.send(queue, &[(AT, command.len() as u32, false), (AT + 0x1000, 1, true)]);
    assert_eq!(rig.used(queue).1, 1);
    rig.read(AT + 0x1000, 1)[0]
}

#[test]
fn options_out_of_range_are_refused() {
    let make = |mac, pairs, mtu| {
        Net::new(Arc::new(Wire::default()), NetOptions { mac, pairs, mtu, rss: false }).map(drop)
    };
    assert!(make(MAC, 5, None).unwrap_err().contains("1 to 4"));
    assert!(make(MAC, 0, None).is_err());
    assert!(make(GROUP, 1, None).unwrap_err().contains("unicast"));
    assert!(make([0; 6], 1, None).is_err());
    assert!(make(MAC, 1, Some(67)).unwrap_err().contains("MTU"));
    assert!(make(MAC, 4, Some(68)).is_ok());
}

#[test]
fn a_frame_is_sent_with_its_header() {
    let (wire, device) = net(1);
    let mut rig = Rig::new(device.clone(), F_CSUM | F_HOST_TSO4);
    let frame = frame_to(OTHER, 3000);
    let header =
        VnetHeader { checksum: Some((34, 16)), gso: Some((GsoKind::Tcp4, 1448)), ..VnetHeader::default() };
    rig.write(BUFFERS, &header.encode(0));
    rig.write(BUFFERS + 12, &frame);
    // Header and frame in one buffer, cut at any place (virtio 1.3 section 5.1.6.2).
    rig.send(1, &[(BUFFERS, 5, false), (BUFFERS + 5, 100, false), (BUFFERS + 105, 2907, false)]);
    assert_eq!(rig.used(1).1, 0);
    assert_eq!(*lock(&wire.sent), [(0, header, frame)]);
    assert!(wire.flushed.load(Ordering::SeqCst) > 0);
    assert_eq!(device.statistics()[0].tx_bytes, 3000);
    assert_eq!(device.statistics().len(), 1);
}

#[test]
fn frames_that_break_rules_are_dropped_one_by_one() {
    let (wire, device) = net(1);
    let mut rig = Rig::new(device.clone(), F_CSUM);
    let good = VnetHeader::default().encode(0);
    let with = |at: usize, value: &[u8]| {
        let mut h = good;
        h[at..at + value.len()].copy_from_slice(value);
        h
    };
    let bad = [
        // Segmentation that was not agreed on, an unknown kind, a checksum beyond the frame.
        (with(0, &[1, 1, 0, 0, 100, 0, 34, 0, 16, 0]), 60),
        (with(1, &[3]), 60),
        (with(0, &[1, 0, 0, 0, 0, 0, 50, 0, 9, 0]), 60),
        (with(0, &[1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]), 60),
        // Too short for an Ethernet header, nothing at all, too long.
        (good, 13),
        (good, 0),
        (good, MAX_FRAME as u32 + 1),
    ];
    for (n, (header, len)) in bad.into_iter().enumerate() {
        rig.write(BUFFERS, &header);
        rig.send(1, &[(BUFFERS, 12 + len, false)]);
        rig.used(1);
        assert!(lock(&wire.sent).is_empty(), "{n}");
    }
    // A chain without a whole header, one that only the device may write.
    rig.send(1, &[(BUFFERS, 11, false)]);
    rig.used(1);
    rig.send(1, &[(BUFFERS, 100, true)]);
    rig.used(1);
    assert_eq!(device.statistics()[0].tx_dropped, 9);
    rig.write(BUFFERS, &good);
    rig.send(1, &[(BUFFERS, 12 + 60, false)]);
    rig.used(1);
    assert_eq!(lock(&wire.sent).len(), 1);
    assert_eq!(rig.core.status() & status::NEEDS_RESET, 0);
}

#[test]
fn a_full_back_end_keeps_frames_with_the_driver() {
    let (wire, device) = net(1);
    let mut rig = Rig::new(device, 0);
    wire.full.store(true, Ordering::SeqCst);
    for n in 0..3 {
        rig.write(BUFFERS + n * 0x100, &VnetHeader::default().encode(0));
        rig.write(BUFFERS + n * 0x100 + 12, &frame_to(OTHER, 60 + n as usize));
        rig.send(1, &[(BUFFERS + n * 0x100, 72 + n as u32, false)]);
    }
    rig.core.pause();
    assert!(rig.rings[1].take_used().is_none());
    rig.core.resume();
    wire.full.store(false, Ordering::SeqCst);
    wire.events.get().unwrap().writable(0);
    for n in 0..3 {
        assert_eq!(rig.used(1).0, n);
    }
    let lengths: Vec<usize> = lock(&wire.sent).iter().map(|f| f.2.len()).collect();
    assert_eq!(lengths, [60, 61, 62]);
}

#[test]
fn received_frames_wait_for_buffers() {
    let (wire, device) = net(1);
    let mut rig = Rig::new(device, F_GUEST_CSUM);
    wire.give(VnetHeader { valid: true, ..VnetHeader::default() }, frame_to(MAC, 90));
    rig.send(0, &[(BUFFERS, 12, true), (BUFFERS + 0x100, 1514, true)]);
    assert_eq!(rig.used(0).1, 102);
    assert_eq!(rig.read(BUFFERS, 12), VnetHeader { valid: true, ..VnetHeader::default() }.encode(1));
    assert_eq!(rig.read(BUFFERS + 0x100, 90), frame_to(MAC, 90));
    assert_eq!(rig.read(BUFFERS + 0x100 + 90, 2), [0, 0]);
    // Without mergeable buffers a frame that is too long is lost, and its buffer serves the next one.
    rig.send(0, &[(BUFFERS, 100, true)]);
    wire.give(VnetHeader::default(), frame_to(MAC, 89));
    wire.give(VnetHeader::default(), frame_to(MAC, 88));
    assert_eq!(rig.used(0).1, 100);
}

#[test]
fn long_frames_are_spread_over_mergeable_buffers() {
    for events in [0, EVENT_IDX] {
        let (wire, device) = net(1);
        let mut rig = Rig::new(device, F_MRG_RXBUF | F_GUEST_CSUM | F_GUEST_TSO4 | events);
        if events != 0 {
            rig.rings[0].set_used_event(2);
        }
        let header = VnetHeader {
            checksum: Some((34, 16)),
            gso: Some((GsoKind::Tcp4, 1000)),
            ..VnetHeader::default()
        };
        rig.send(0, &[(BUFFERS, 1000, true)]);
        rig.send(0, &[(BUFFERS + 0x1000, 1000, true)]);
        wire.give(header, frame_to(MAC, 2500));
        // Two buffers are not enough; the driver is asked for the third, and both wait.
        let asked =
            || if events != 0 { rig.rings[0].avail_event() == 2 } else { rig.rings[0].used_flags() == 0 };
        while !(asked() && lock(&wire.inbound).is_empty()) {
            std::thread::yield_now();
        }
        rig.core.pause();
        assert_eq!(rig.rings[0].used_index(), 0);
        rig.core.resume();
        rig.send(0, &[(BUFFERS + 0x2000, 1000, true)]);
        let lengths: Vec<u32> = (0..3).map(|_| rig.used(0).1).collect();
        assert_eq!(lengths, [1000, 1000, 512]);
        assert_eq!(rig.read(BUFFERS, 12), header.encode(3));
        let all =
            [rig.read(BUFFERS + 12, 988), rig.read(BUFFERS + 0x1000, 1000), rig.read(BUFFERS + 0x2000, 512)]
                .concat();
        assert!(all == frame_to(MAC, 2500));
    }
}

#[test]
fn a_back_ends_thread_serves_the_queue_itself() {
    let (wire, device) = net(1);
    let mut rig = Rig::new(device, 0);
    let mut here = 0;
    for n in 0..100 {
        rig.send(0, &[(BUFFERS, 2000, true)]);
        lock(&wire.inbound).push_back((VnetHeader::default(), frame_to(MAC, 60 + n)));
        wire.events.get().expect("attached").take_now(0);
        // The I/O thread may have been at the queue just then, and does it in that case.
        assert_eq!(rig.used(0).1, 72 + n as u32);
        here += u32::from(*lock(&wire.taker) == Some(std::thread::current().id()));
    }
    assert!(here > 0);
    // After a reset nobody serves it.
    rig.core.reset();
    lock(&wire.inbound).push_back((VnetHeader::default(), frame_to(MAC, 60)));
    wire.events.get().expect("attached").take_now(0);
    assert_eq!(lock(&wire.inbound).len(), 1);
}

#[test]
fn a_receive_buffer_without_room_for_the_header_needs_a_reset() {
    let (wire, device) = net(1);
    let mut rig = Rig::new(device, F_MRG_RXBUF);
    rig.send(0, &[(BUFFERS, 11, true)]);
    wire.give(VnetHeader::default(), frame_to(MAC, 60));
    rig.interrupts.wait(None, 1);
    assert_ne!(rig.core.status() & status::NEEDS_RESET, 0);
}

#[test]
fn empty_buffers_do_not_make_it_loop() {
    let (wire, device) = net(1);
    let mut rig = Rig::new(device, F_MRG_RXBUF);
    rig.rings[0].add(&[(BUFFERS, 12, true)]);
    for _ in 0..255 {
        rig.rings[0].add(&[(BUFFERS, 0, true)]);
    }
    rig.core.notify(0);
    wire.give(VnetHeader::default(), frame_to(MAC, 60));
    while !lock(&wire.inbound).is_empty() {
        std::thread::yield_now();
    }
    rig.core.pause();
    assert_eq!(rig.rings[0].used_index(), 0);
}

#[test]
fn configuration_tells_address_status_pairs_and_mtu() {
    let (_, device) = net(3);
    let rig = Rig::new(device.clone(), F_STATUS | F_MQ | F_GUEST_ANNOUNCE | F_CTRL_VQ);
    let config = || {
        let mut b = [0xff; 16];
        rig.core.read_config(0, &mut b);
        b
    };
    assert_eq!(config(), [0x52, 0x54, 0, 1, 2, 3, 1, 0, 3, 0, 0xdc, 5, 0, 0, 0, 0]);
    device.set_link(false);
    device.set_link(false);
    assert_eq!((config()[6], rig.interrupts.count(None)), (0, 1));
    device.announce();
    assert_eq!(config()[6], 0, "nobody hears it");
    device.set_link(true);
    device.announce();
    assert_eq!((config()[6], rig.interrupts.count(None)), (3, 3));
}

#[test]
fn no_frame_passes_while_the_link_is_down() {
    let (wire, device) = net(1);
    let mut rig = Rig::new(device.clone(), 0);
    device.set_link(false);
    rig.write(BUFFERS, &VnetHeader::default().encode(0));
    rig.send(1, &[(BUFFERS, 80, false)]);
    rig.used(1);
    rig.send(0, &[(BUFFERS, 200, true)]);
    wire.give(VnetHeader::default(), frame_to(MAC, 60));
    while device.statistics()[0].rx_dropped == 0 {
        std::thread::yield_now();
    }
    device.set_link(true);
    wire.give(VnetHeader::default(), frame_to(MAC, 61));
    assert_eq!(rig.used(0).1, 73);
    assert!(lock(&wire.sent).is_empty());
}

#[test]
fn commands_are_checked() {
    let (wire, device) = net(2);
    let features = F_CTRL_VQ
        | F_CTRL_RX
        | F_CTRL_RX_EXTRA
        | F_CTRL_VLAN
        | F_CTRL_MAC_ADDR
        | F_MQ
        | F_GUEST_ANNOUNCE
        | F_CTRL_GUEST_OFFLOADS
        | F_GUEST_CSUM
        | F_GUEST_TSO4
        | F_STATUS;
    let mut rig = Rig::new(device.clone(), features);
    const Q: u16 = 4;
    assert_eq!(control(&mut rig, Q, &[1, 1, 0x52, 0x54, 0, 7, 7, 7]), 0);
    let mut mac = [0; 6];
    rig.core.read_config(0, &mut mac);
    assert_eq!(mac, [0x52, 0x54, 0, 7, 7, 7]);
    for (good, bad) in [
        (&[0u8, 0, 0][..], &[0u8, 0, 2][..]),
        (&[0, 5, 1], &[0, 6, 1]),
        (&[2, 0, 0xff, 0x0f], &[2, 0, 0, 0x10]),
        (&[4, 0, 2, 0], &[4, 0, 3, 0]),
        (&[4, 0, 1, 0], &[4, 0, 0, 0]),
        (&[3, 0], &[3, 1]),
        (&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[1, 0, 0, 0, 0, 0, 0, 0, 0]),
        (&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]),
        (&[5, 0, 2, 0, 0, 0, 0, 0, 0, 0], &[5, 0, 0, 1, 0, 0, 0, 0, 0, 0]),
        (&[1, 1, 2, 2, 2, 2, 2, 2], &[1, 1, 3, 2, 2, 2, 2, 2]),
        (&[0, 0, 1], &[9, 9, 9, 9]),
        (&[0, 0, 1], &[0, 0]),
    ] {
        assert_eq!((control(&mut rig, Q, good), control(&mut rig, Q, bad)), (0, 1), "{good:?} {bad:?}");
    }
    assert_eq!(*lock(&wire.offloads), Offloads { checksum: true, ..Offloads::default() });
    // Only offloads that were agreed on; checksums alone, then with segmentation.
    assert_eq!(control(&mut rig, Q, &[5, 0, 0x82, 0, 0, 0, 0, 0, 0, 0]), 0);
    assert_eq!(*lock(&wire.offloads), Offloads { checksum: true, tso4: true, ..Offloads::default() });
    // No room for the answer: nothing sensible can be done.
    rig.write(BUFFERS, &[0, 0, 1]);
    rig.send(Q, &[(BUFFERS, 3, false)]);
    rig.interrupts.wait(None, 1);
    assert_ne!(rig.core.status() & status::NEEDS_RESET, 0);
}

#[test]
fn the_control_queue_is_the_third_without_multiqueue() {
    let (_, device) = net(4);
    let mut rig = Rig::new(device, F_CTRL_VQ | F_CTRL_RX);
    assert_eq!(control(&mut rig, 2, &[0, 0, 0]), 0);
    assert_eq!(control(&mut rig, 2, &[4, 0, 2, 0]), 1, "not agreed on");
}

#[test]
fn filters_keep_frames_out() {
    let mut f = Filter::default();
    let wants = |f: &Filter, to| f.wants(&frame_to(to, 60), &MAC, false);
    assert!(wants(&f, OTHER), "all pass at first");
    f.promiscuous = false;
    assert_eq!([MAC, OTHER, GROUP, [0xff; 6]].map(|to| wants(&f, to)), [true, false, false, true]);
    f.all_multicast = true;
    f.unicast.addresses.push(OTHER);
    assert!(wants(&f, GROUP) && wants(&f, OTHER));
    (f.no_multicast, f.no_unicast, f.no_broadcast) = (true, true, true);
    assert_eq!([MAC, OTHER, GROUP, [0xff; 6]].map(|to| wants(&f, to)), [false; 4]);
    let f = Filter {
        promiscuous: false,
        multicast: filter::Table { overflow: true, ..Default::default() },
        ..Filter::default()
    };
    assert!(wants(&f, GROUP));
    assert!(!f.wants(&[0xff; 13], &MAC, false), "no header");

    let mut f = Filter::default();
    let mut tagged = frame_to(MAC, 60);
    tagged[12..16].copy_from_slice(&[0x81, 0, 0xe1, 0x23]);
    assert!(f.wants(&tagged, &MAC, false) && !f.wants(&tagged, &MAC, true));
    assert!(f.set_vlan(0x123, true) && f.wants(&tagged, &MAC, true));
    assert!(f.set_vlan(0x123, false) && !f.wants(&tagged, &MAC, true));
    assert!(!f.wants(&tagged[..14], &MAC, true) && !f.set_vlan(4096, true));
}

#[test]
fn more_addresses_than_are_kept_let_all_pass() {
    let (wire, device) = net(1);
    let mut rig = Rig::new(device, F_CTRL_VQ | F_CTRL_RX);
    let mut command = vec![1, 0, 0, 0, 0, 0];
    command.extend_from_slice(&100u32.to_le_bytes());
    (0..100).for_each(|n| command.extend_from_slice(&[0x33, 0x33, 0, 0, 1, n]));
    assert_eq!(control(&mut rig, 2, &command), 0);
    assert_eq!(control(&mut rig, 2, &[0, 0, 0]), 0);
    rig.send(0, &[(BUFFERS, 200, true)]);
    rig.send(0, &[(BUFFERS, 200, true)]);
    wire.give(VnetHeader::default(), frame_to(OTHER, 60));
    wire.give(VnetHeader::default(), frame_to(GROUP, 61));
    assert_eq!(rig.used(0).1, 73);
}

#[test]
fn pairs_serve_once_they_are_switched_on() {
    let (wire, device) = net(2);
    let mut rig = Rig::new(device, F_CTRL_VQ | F_MQ);
    rig.write(BUFFERS, &VnetHeader::default().encode(0));
    rig.send(3, &[(BUFFERS, 80, false)]);
    assert_eq!(control(&mut rig, 4, &[4, 0, 2, 0]), 0);
    rig.used(3);
    assert_eq!(lock(&wire.sent)[0].0, 1);
}

/// A frame of TCP over IPv4 between these ports.
fn tcp(from: u16, to: u16) -> Vec<u8> {
    let mut f = frame_to(MAC, 70);
    f[14..34].copy_from_slice(&[0x45, 0, 0, 56, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    f[34..36].copy_from_slice(&from.to_be_bytes());
    f[36..38].copy_from_slice(&to.to_be_bytes());
    f
}

#[test]
fn flows_are_spread_by_the_drivers_table_and_their_hash_is_told() {
    let wire = Arc::new(Wire::default());
    let options = NetOptions { mac: MAC, pairs: 4, mtu: None, rss: true };
    let device = Net::new(wire.clone(), options).unwrap();
    let mut rig = Rig::new(device.clone(), F_CTRL_VQ | F_MQ | F_RSS | F_HASH_REPORT);
    let mut config = [0; 24];
    rig.core.read_config(0, &mut config);
    assert_eq!(config[17..], [40, 128, 0, 0xff, 1, 0, 0]);
    const Q: u16 = 8;
    let key: Vec<u8> = (1..=40).collect();
    let command = |types: u32, table: &[u16], default: u16, transmit: u16, key: &[u8]| {
        let mut c = vec![4, 1];
        c.extend(types.to_le_bytes());
        c.extend((table.len() as u16).wrapping_sub(1).to_le_bytes());
        c.extend(default.to_le_bytes());
        table.iter().for_each(|t| c.extend(t.to_le_bytes()));
        c.extend(transmit.to_le_bytes());
        c.push(key.len() as u8);
        c.extend(key);
        c
    };
    for bad in [
        command(0x200, &[0], 0, 1, &key),
        command(2, &[0, 1, 2], 0, 1, &key),
        command(2, &[0, 4], 0, 1, &key),
        command(2, &[0], 4, 1, &key),
        command(2, &[0], 0, 5, &key),
        command(2, &[0], 0, 0, &key),
        command(2, &[0], 0, 1, &[0; 41]),
        command(2, &[], 0, 1, &key),
        command(2, &[0; 256], 0, 1, &key),
        command(2, &[0], 0, 1, &key)[..20].to_vec(),
    ] {
        assert_eq!(control(&mut rig, Q, &bad), 1, "{bad:?}");
    }
    assert_eq!(control(&mut rig, Q, &command(types_tcp(), &[1, 2], 3, 4, &key)), 0);
    assert_eq!(wire.pairs.load(Ordering::SeqCst), 4);
    let toeplitz = hash::Toeplitz::new(&key);
    for n in 1..4 {
        (0..4).for_each(|i| {
            rig.send(2 * n, &[(BUFFERS + u64::from(n) * 0x8000 + i * 0x1000, 1000, true)]);
        });
    }
    let mut counts = [0u16; 4];
    for port in 0..4u16 {
        let frame = tcp(1000 + port, 80);
        let (value, _) = toeplitz.of_frame(&frame, types_tcp()).unwrap();
        let to = [1, 2][value as usize & 1];
        wire.give(VnetHeader::default(), frame.clone());
        let (_, len) = rig.used(2 * to);
        let at = BUFFERS + u64::from(to) * 0x8000 + u64::from(counts[usize::from(to)]) * 0x1000;
        counts[usize::from(to)] += 1;
        assert_eq!(len, 20 + 70);
        let header = rig.read(at, 20);
        assert_eq!((&header[12..16], &header[16..18]), (&value.to_le_bytes()[..], &[2, 0][..]));
        assert!(rig.read(at + 20, 70) == frame);
    }
    // What has no hash goes to the default queue, and says that it has none.
    wire.give(VnetHeader::default(), frame_to(MAC, 60));
    rig.used(6);
    assert_eq!(rig.read(BUFFERS + 3 * 0x8000 + 12, 6), [0; 6]);
    // Both directions have the longer header.
    rig.write(BUFFERS, &[VnetHeader::default().encode(0).as_slice(), &[0; 8], &frame_to(OTHER, 60)].concat());
    rig.send(1, &[(BUFFERS, 80, false)]);
    rig.used(1);
    assert_eq!(lock(&wire.sent)[0].2, frame_to(OTHER, 60));
    // Without scaling, hashes are still told: of addresses now.
    assert_eq!(control(&mut rig, Q, &[4, 0, 1, 0]), 0);
    assert_eq!(
        control(&mut rig, Q, &[&[4, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 40][..], &key].concat()),
        0
    );
    rig.send(0, &[(BUFFERS, 1000, true)]);
    wire.give(VnetHeader::default(), tcp(1, 2));
    rig.used(0);
    assert_eq!(rig.read(BUFFERS + 16, 2), [1, 0]);
    let saved = device.save();
    device.load(&saved).unwrap();
    let mut s = lock(&device.state).clone();
    s.rss.table = vec![0; 3];
    assert!(device.load(&crate::transport::encode(&s)).is_err());
}

fn types_tcp() -> u32 {
    hash::types::TCPV4
}

#[test]
fn state_survives_and_wrong_state_is_refused() {
    let (_, device) = net(1);
    let mut rig = Rig::new(device.clone(), F_CTRL_VQ | F_CTRL_RX | F_CTRL_MAC_ADDR | F_GUEST_CSUM);
    assert_eq!(control(&mut rig, 2, &[1, 1, 2, 2, 2, 2, 2, 2]), 0);
    rig.core.pause();
    let state = rig.core.save();
    let Rig { core, memory, .. } = rig;
    drop(core);
    let (wire, other) = net(1);
    let rig = Rig::over(other.clone(), memory);
    rig.core.load(&state).unwrap();
    let mut mac = [0; 6];
    rig.core.read_config(0, &mut mac);
    assert_eq!(mac, [2; 6]);
    assert!(lock(&wire.offloads).checksum);
    let mut s = lock(&other.state).clone();
    s.control.pairs = 2;
    assert!(other.load(&crate::transport::encode(&s)).is_err());
    s.control = ControlState { pairs: 1, offloads: F_GUEST_TSO6 };
    assert!(other.load(&crate::transport::encode(&s)).is_err());
    assert!(other.load(&[0xff; 90]).is_err());
    rig.core.write_status(0);
    rig.core.read_config(0, &mut mac);
    assert_eq!(mac, MAC);
}

#[test]
fn features_that_need_others_are_not_had_without_them() {
    let (_, device) = net(2);
    let all = device.features();
    assert!(device.fits(all) && device.fits(0));
    for (without, what) in [
        (F_CSUM, "segmentation needs checksums"),
        (F_GUEST_CSUM, "so it does on reception"),
        (F_HOST_TSO4 | F_HOST_TSO6, "ECN needs segmentation"),
        (F_GUEST_TSO4 | F_GUEST_TSO6, "ECN needs segmentation on reception"),
        (F_CTRL_VQ, "commands need a queue"),
    ] {
        assert!(!device.fits(all & !without), "{what}");
    }
    assert!(device.fits(all & !(F_CTRL_VQ | NEEDS[4].0)) && device.fits(all & !F_HOST_TSO4));
    // Without them the device takes no driver.
    let wire = Arc::new(Wire::default());
    let net = Net::new(wire, NetOptions { mac: MAC, pairs: 1, mtu: None, rss: false }).unwrap();
    let rig = Rig::idle(net);
    let core = &rig.core;
    core.write_status(status::ACKNOWLEDGE | status::DRIVER);
    for (half, features) in [(0, F_HOST_TSO4 as u32), (1, 1)] {
        core.set_driver_select(half);
        core.set_driver_features(features);
    }
    core.write_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
    assert_eq!(core.status() & status::FEATURES_OK, 0);
}

#[test]
fn a_driver_gets_no_flags_that_it_has_not_asked_for_and_nothing_longer_than_its_mtu() {
    let valid = VnetHeader { valid: true, ..VnetHeader::default() };
    for (features, flags) in [(0, 0), (F_MTU, 0), (F_GUEST_CSUM, 2), (F_GUEST_CSUM | F_MTU, 2)] {
        let (wire, device) = net(1);
        let mut rig = Rig::new(device.clone(), features);
        let mut tagged = frame_to(MAC, 1518);
        tagged[12..16].copy_from_slice(&[0x81, 0, 0, 1]);
        for frame in [frame_to(MAC, 1514), frame_to(MAC, 1515), tagged, frame_to(MAC, 60)] {
            wire.give(valid, frame);
        }
        let lengths: &[u32] = if features & F_MTU == 0 { &[1514, 1515, 1518, 60] } else { &[1514, 1518, 60] };
        for n in lengths {
            rig.send(0, &[(BUFFERS, 2000, true)]);
            assert_eq!(rig.used(0).1, 12 + n, "{features:#x}");
            assert_eq!(rig.read(BUFFERS, 1), [flags], "{features:#x}");
        }
        assert_eq!(device.statistics()[0].rx_dropped, u64::from(features & F_MTU != 0));
    }
    // What the driver says of its own frames is not taken for granted.
    let (wire, device) = net(1);
    let mut rig = Rig::new(device, F_CSUM);
    rig.write(BUFFERS, &valid.encode(0));
    rig.write(BUFFERS + 12, &frame_to(OTHER, 60));
    rig.send(1, &[(BUFFERS, 72, false)]);
    rig.used(1);
    assert!(!lock(&wire.sent)[0].1.valid);
}
