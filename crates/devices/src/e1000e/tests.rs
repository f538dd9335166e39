use super::*;
use ringfort_bus::{MsiMessage, NoIrq};
use ringfort_memory::{Bytes, GuestAddress, allocate};
use ringfort_net::{GsoKind, Sent};
use std::time::Duration;

const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
const OTHER: [u8; 6] = [0x52, 0x54, 0, 9, 9, 9];
const RX: u64 = 0x1_0000;
const TX: u64 = 0x2_0000;
const BUFFERS: u64 = 0x10_0000;

#[derive(Default)]
struct Wire {
    sent: Mutex<Vec<(VnetHeader, Vec<u8>)>>,
    inbound: Mutex<VecDeque<Vec<u8>>>,
    can: Mutex<Offloads>,
    full: Mutex<bool>,
    events: OnceLock<Arc<dyn NetEvents>>,
}

impl NetBackend for Wire {
    fn accepts(&self) -> Offloads {
        *lock(&self.can)
    }
    fn produces(&self) -> Offloads {
        Offloads::default()
    }
    fn attach(&self, events: Arc<dyn NetEvents>) {
        let _ = self.events.set(events);
    }
    fn set_offloads(&self, _offloads: Offloads) {}
    fn send(&self, _pair: u16, header: &VnetHeader, frame: &[u8]) -> Sent {
        if *lock(&self.full) {
            return Sent::Full;
        }
        lock(&self.sent).push((*header, frame.to_vec()));
        Sent::Done
    }
    fn receive(&self, _pair: u16, frame: &mut Vec<u8>) -> Option<VnetHeader> {
        *frame = lock(&self.inbound).pop_front()?;
        Some(VnetHeader::default())
    }
}

#[derive(Default)]
struct Sink {
    sent: Mutex<Vec<u32>>,
    changed: Condvar,
}

impl MsiSink for Sink {
    fn send(&self, m: MsiMessage) {
        lock(&self.sent).push(m.data);
        self.changed.notify_all();
    }
}

impl Sink {
    fn wait(&self, count: usize) -> Vec<u32> {
        let mut s = lock(&self.sent);
        while s.len() < count {
            let (next, late) = self.changed.wait_timeout(s, Duration::from_secs(20)).unwrap();
            assert!(!late.timed_out(), "{next:?}");
            s = next;
        }
        s.clone()
    }
}

struct Rig {
    wire: Arc<Wire>,
    sink: Arc<Sink>,
    memory: GuestMemory,
    card: Arc<E1000e>,
}

impl Rig {
    /// A card as a driver has set it up: rings of 16, buffers of 2 KiB, memory and bus mastering on.
    fn new() -> Rig {
        let (wire, sink) = (Arc::new(Wire::default()), Arc::new(Sink::default()));
        let memory = allocate(&[(0, 4 << 20)]).unwrap();
        let mac = MacAddr::new(MAC).unwrap();
        let card = E1000e::new(wire.clone(), mac, memory.clone(), sink.clone(), Arc::new(NoIrq)).unwrap();
        card.resume();
        let r = Rig { wire, sink, memory, card };
        r.card.config_write(4, &[6, 0]);
        for (base, ring) in [(RDBAL, RX), (TDBAL, TX)] {
            r.write(base, ring as u32);
            r.write(base + LEN, 256);
        }
        r.write(regs::TCTL, regs::TCTL_EN);
        r.write(regs::RCTL, regs::rctl::EN | regs::rctl::BAM | regs::rctl::SECRC);
        for n in 0..16 {
            r.put(RX + 16 * n, &(BUFFERS + 2048 * n).to_le_bytes());
        }
        r
    }
    fn read(&self, at: u32) -> u32 {
        let mut d = [0; 4];
        self.card.bar_read(0, u64::from(at), &mut d);
        u32::from_le_bytes(d)
    }
    fn write(&self, at: u32, value: u32) {
        self.card.bar_write(0, u64::from(at), &value.to_le_bytes());
    }
    fn put(&self, at: u64, data: &[u8]) {
        self.memory.write_slice(data, GuestAddress(at)).unwrap();
    }
    fn look(&self, at: u64, len: usize) -> Vec<u8> {
        let mut d = vec![0; len];
        self.memory.read_slice(&mut d, GuestAddress(at)).unwrap();
        d
    }
    fn give(&self, frame: Vec<u8>) {
        lock(&self.wire.inbound).push_back(frame);
        self.wire.events.get().unwrap().readable(0);
    }
    /// Wait until a descriptor's status says that it is done.
    fn done(&self, at: u64) {
        let end = Instant::now() + Duration::from_secs(20);
        while self.look(at, 1)[0] & 1 == 0 {
            assert!(Instant::now() < end, "the descriptor at {at:#x} is not done");
            std::thread::yield_now();
        }
    }
    fn enable_msix(&self) {
        for v in 0..5u8 {
            for (at, value) in [(0, 0xfee0_0000), (4, 0), (8, 0x40 + u32::from(v)), (12, 0)] {
                self.card.bar_write(3, u64::from(v) * 16 + at, &value.to_le_bytes());
            }
        }
        let mut at = 0x34;
        loop {
            let mut d = [0; 2];
            self.card.config_read(at, &mut d[..1]);
            at = u16::from(d[0]);
            assert_ne!(at, 0);
            self.card.config_read(at, &mut d);
            if d[0] == 0x11 {
                break;
            }
            at += 1;
        }
        self.card.config_write(at + 2, &[0, 0x80]);
    }
}

fn udp(to: [u8; 6], payload: usize) -> Vec<u8> {
    let mut f = [&to[..], &OTHER, &[8, 0]].concat();
    let mut ip = vec![0x45, 0, 0, (28 + payload) as u8, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
    let sum = ringfort_net::segment::checksum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    f.extend(ip);
    f.extend([0, 1, 0, 2, 0, (8 + payload) as u8, 0, 0]);
    f.extend((0..payload).map(|n| n as u8));
    let whole = [&f[26..34], &[0, 17, 0, (8 + payload) as u8], &f[34..]].concat();
    let sum = ringfort_net::segment::checksum(&whole);
    f[40..42].copy_from_slice(&sum.to_be_bytes());
    f
}

#[test]
fn a_driver_finds_address_eeprom_and_link() {
    let r = Rig::new();
    assert_eq!((r.read(RAL), r.read(RAL + 4)), (0x0100_5452, 0x8000_0302));
    let word = |n: u32| {
        r.write(EERD, n << 2 | 1);
        assert_ne!(r.read(EERD) & 2, 0);
        (r.read(EERD) >> 16) as u16
    };
    assert_eq!((0..64).fold(0u16, |s, n| s.wrapping_add(word(n))), 0xbaba);
    assert_ne!(r.read(STATUS) & status::LU, 0);
    r.card.set_link(false);
    assert_eq!(r.read(STATUS) & status::LU, 0);
    assert_ne!(r.read(ICR) & cause::LSC, 0);
    assert_eq!(r.read(ICR), 0, "reading clears");
    assert_eq!(r.read(SWSM) & 1, 0);
    assert_eq!(r.read(SWSM) & 1, 1);
    r.write(CTRL, ctrl::RST);
    assert_eq!(r.read(regs::TCTL), 0);
}

#[test]
fn frames_come_by_legacy_and_extended_descriptors_with_checked_sums() {
    let r = Rig::new();
    r.write(regs::RXCSUM, regs::RXCSUM_IPOFL | regs::RXCSUM_TUOFL);
    r.write(RDBAL + TAIL, 15);
    let f = udp(MAC, 40);
    r.give(f.clone());
    r.done(RX + 12);
    let d = r.look(RX + 8, 8);
    assert_eq!((u16::from_le_bytes([d[0], d[1]]), d[4], d[5]), (f.len() as u16, 0x73, 0));
    assert!(r.look(BUFFERS, f.len()) == f);
    // Not for us; for all; a wrong sum, by an extended descriptor.
    r.write(regs::RFCTL, regs::RFCTL_EXTEN);
    r.give(udp(OTHER, 40));
    let mut bad = udp([0xff; 6], 41);
    *bad.last_mut().unwrap() ^= 1;
    r.give(bad);
    r.done(RX + 16 + 8);
    let d = r.look(RX + 16 + 8, 8);
    let status = u32::from_le_bytes([d[0], d[1], d[2], d[3]]);
    assert_eq!((status & 0xff, status >> 29 & 3), (0x73 | 0x80 & status, 1), "{status:#x}");
    assert_eq!(r.read(RDBAL + HEAD), 2);
    assert_eq!((r.read(regs::GPRC), r.read(regs::GPRC)), (2, 0));
}

#[test]
fn a_long_frame_takes_several_buffers_and_waits_for_them() {
    let r = Rig::new();
    r.write(regs::RCTL, regs::rctl::EN | regs::rctl::LPE | regs::rctl::SECRC);
    r.write(RDBAL + TAIL, 2);
    let mut f = udp(MAC, 40);
    f.resize(5000, 7);
    r.give(f.clone());
    while r.read(regs::RNBC) == 0 {
        std::thread::yield_now();
    }
    assert_eq!(r.read(RDBAL + HEAD), 0);
    r.write(RDBAL + TAIL, 5);
    r.done(RX + 2 * 16 + 12);
    assert!(r.look(BUFFERS, 2048 * 2 + 904)[..] == f[..]);
    assert_eq!(r.look(RX + 12, 1)[0] & 2, 0, "no end of packet yet");
    // Packet split: headers apart.
    r.write(regs::RFCTL, regs::RFCTL_EXTEN);
    r.write(PSRCTL_AT, 2 | 4 << 8 | 4 << 16);
    r.write(regs::RCTL, regs::rctl::EN | regs::rctl::SECRC | 1 << 10);
    r.write(RDBAL + HEAD, 0);
    r.write(RDBAL + TAIL, 0);
    for n in 0..4 {
        r.put(RX + 8 * n, &(BUFFERS + 0x4000 * n).to_le_bytes());
    }
    r.write(RDBAL + TAIL, 4);
    let f = udp(MAC, 60);
    r.give(f.clone());
    r.done(RX + 8);
    let d = r.look(RX, 32);
    assert_eq!((d[12], d[16], d[17] >> 7, d[18]), (42, 42, 1, 60));
    assert!(r.look(BUFFERS, 42) == f[..42] && r.look(BUFFERS + 0x4000, 60) == f[42..]);
}

const PSRCTL_AT: u32 = regs::PSRCTL;

fn data(address: u64, len: u32, command: u8, options: u8) -> Vec<u8> {
    let word = len | 1 << 20 | u32::from(command | 0x20) << 24;
    [&address.to_le_bytes()[..], &word.to_le_bytes(), &[0, options, 0, 0]].concat()
}

#[test]
fn what_is_sent_gets_its_sums_tag_and_segments() {
    let r = Rig::new();
    // Legacy, in two pieces.
    let f = udp(OTHER, 30);
    r.put(BUFFERS, &f);
    r.put(TX, &[&BUFFERS.to_le_bytes()[..], &[20, 0, 0, 0, 0, 0, 0, 0]].concat());
    r.put(
        TX + 16,
        &[&(BUFFERS + 20).to_le_bytes()[..], &[f.len() as u8 - 20, 0, 0, 0x0b, 0, 0, 0, 0]].concat(),
    );
    r.write(TDBAL + TAIL, 2);
    assert_eq!(lock(&r.wire.sent)[0].1, f);
    assert_eq!((r.look(TX + 12, 1)[0], r.look(TX + 28, 1)[0]), (0, 1));
    // Checksums of IP and UDP by context and data descriptor; with a VLAN tag.
    r.write(CTRL, ctrl::VME | ctrl::SLU);
    let mut blank = f.clone();
    blank[24..26].fill(0);
    let pseudo = [&f[26..34], &[0, 17, 0, f.len() as u8 - 34]].concat();
    blank[40..42].copy_from_slice(&(!ringfort_net::segment::checksum(&pseudo)).to_be_bytes());
    r.put(BUFFERS, &blank);
    let context = |tcp: u8, hdrlen: u8, mss: u16| {
        let mut c =
            vec![14, 24, 33, 0, 34, if tcp == 1 { 50 } else { 40 }, 0, 0, 0, 0, 0, 0x22 | tcp, 0, hdrlen];
        c.extend(mss.to_le_bytes());
        c
    };
    r.put(TX + 32, &context(0, 0, 0));
    let mut d = data(BUFFERS, f.len() as u32, 0x49, 3);
    d[14..16].copy_from_slice(&5u16.to_le_bytes());
    r.put(TX + 48, &d);
    r.write(TDBAL + TAIL, 4);
    let tagged = [&f[..12], &[0x81, 0, 0, 5], &f[12..]].concat();
    assert!(lock(&r.wire.sent)[1].1 == tagged);
    // A long segment: whole to a back end that takes it, in parts to one that does not.
    let mut tcp = [&f[..14], &[0x45, 0, 0, 0, 0, 9, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]].concat();
    tcp.extend([0, 80, 0, 81, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x18, 0xff, 0xff, 0, 0, 0, 0]);
    tcp.extend(vec![9; 2500]);
    r.put(BUFFERS, &tcp);
    for (n, can) in [(4, Offloads::ALL), (6, Offloads::default())] {
        *lock(&r.wire.can) = can;
        lock(&r.wire.sent).clear();
        r.put(TX + 16 * n, &context(3, 54, 1000));
        r.put(TX + 16 * n + 16, &data(BUFFERS, tcp.len() as u32, 0x0d, 3));
        r.write(TDBAL + TAIL, n as u32 + 2);
        let sent = lock(&r.wire.sent);
        if can.tso4 {
            let (h, whole) = &sent[0];
            assert_eq!(
                (h.gso, h.checksum, whole.len()),
                (Some((GsoKind::Tcp4, 1000)), Some((34, 16)), tcp.len())
            );
        } else {
            assert_eq!(sent.len(), 3);
            assert!(
                sent.iter().all(|(_, f)| ringfort_net::segment::verify(f).unwrap().l4_good == Some(true))
            );
        }
    }
    // No room: what was taken is kept, and the rest stays in the ring.
    *lock(&r.wire.full) = true;
    lock(&r.wire.sent).clear();
    r.put(BUFFERS, &f);
    (8..11).for_each(|n| r.put(TX + 16 * n, &data(BUFFERS, f.len() as u32, 0x09, 0)));
    r.write(TDBAL + TAIL, 11);
    assert_eq!(r.read(TDBAL + HEAD), 9);
    *lock(&r.wire.full) = false;
    r.wire.events.get().unwrap().writable(0);
    r.done(TX + 16 * 10 + 12);
    assert_eq!(lock(&r.wire.sent).len(), 3);
}

#[test]
fn vectors_are_told_once_and_mask_themselves() {
    let r = Rig::new();
    r.enable_msix();
    r.write(regs::IVAR, 8 | 9 << 8 | 10 << 16);
    r.write(regs::EIAC, cause::RXQ0 | cause::TXQ0);
    r.write(regs::IAM, u32::MAX);
    r.write(regs::CTRL_EXT, regs::ctrl_ext::EIAME);
    r.write(IMS, cause::RXQ0 | cause::TXQ0 | cause::OTHER);
    r.write(RDBAL + TAIL, 15);
    r.give(udp(MAC, 40));
    assert_eq!(r.sink.wait(1), [0x40]);
    r.give(udp(MAC, 40));
    r.done(RX + 16 + 12);
    assert_eq!(lock(&r.sink.sent).len(), 1, "masked until the driver has looked");
    r.write(IMS, cause::RXQ0);
    assert_eq!(r.sink.wait(2), [0x40, 0x40]);
    r.card.set_link(false);
    assert_eq!(r.sink.wait(3)[2], 0x42);
    assert_ne!(r.read(ICR) & (cause::LSC | cause::OTHER), 0);
    // Throttled: the second comes later, but it comes.
    r.card.set_link(true);
    lock(&r.sink.sent).clear();
    r.write(EITR, 40_000);
    for _ in 0..2 {
        r.write(ICS, cause::RXQ0);
        r.write(IMS, cause::RXQ0);
    }
    assert_eq!(r.sink.wait(2).iter().filter(|v| **v == 0x40).count().min(2), 2);
}

#[test]
fn state_survives_and_wrong_state_is_refused() {
    let r = Rig::new();
    r.write(RDBAL + TAIL, 7);
    r.card.set_link(false);
    r.card.pause();
    let saved = r.card.save();
    let other = Rig::new();
    other.card.load(&saved).unwrap();
    assert_eq!((other.read(RDBAL + TAIL), other.read(STATUS) & status::LU, other.card.link()), (7, 0, false));
    let bad: Saved = saved.decode(KIND, STATE_VERSION).unwrap();
    let bad = Section::new(KIND, 0, STATE_VERSION, &Saved { regs: vec![(u16::MAX, 1)], ..bad });
    assert!(other.card.load(&bad).is_err());
}

#[test]
fn what_it_sends_comes_back_in_loopback_and_all_is_counted() {
    let r = Rig::new();
    r.write(regs::TCTL, regs::TCTL_EN | regs::TCTL_PSP);
    r.write(RDBAL + TAIL, 15);
    let own = udp(MAC, 100);
    let short = [&[0xff; 6][..], &MAC, &[8, 0], b"x"].concat();
    let (mac, phy) = (1 << regs::RCTL_LOOPBACK_SHIFT, 1u32 << 14 | 0x140);
    let rctl = regs::rctl::EN | regs::rctl::BAM | regs::rctl::SECRC;
    for (n, f) in [(0u64, &own), (1, &short)] {
        // By the MAC's own, then by the PHY's.
        r.write(regs::RCTL, if n == 0 { rctl | mac } else { rctl });
        r.write(MDIC, 1 << 26 | 1 << 21 | if n == 0 { 0x1140 } else { phy });
        // Others' frames do not come meanwhile.
        r.give(udp(MAC, 10));
        r.put(BUFFERS + 0x1_0000, f);
        r.put(TX + 16 * n, &data(BUFFERS + 0x1_0000, f.len() as u32, 0x0b, 0));
        r.write(TDBAL + TAIL, n as u32 + 1);
        r.done(RX + 16 * n + 12);
        let mut padded = f.clone();
        padded.resize(f.len().max(60), 0);
        assert!(r.look(BUFFERS + 2048 * n, padded.len()) == padded);
    }
    assert!(lock(&r.wire.sent).is_empty());
    // Numbers of packets and of bytes, check sequence and filling included; each read clears.
    let bytes = own.len() as u32 + 4 + 64;
    let at = own.len() + 4;
    let class = [64, 127, 255].iter().take_while(|most| at > **most).count() as u32;
    for (register, count) in [
        (regs::GPTC, 2),
        (regs::GPRC, 2),
        (regs::BPTC, 1),
        (regs::BPRC, 1),
        (regs::MPTC, 0),
        (regs::PTC64, 1),
        (regs::PRC64, 1),
        (regs::PTC64 + 4 * class, 1),
        (regs::PRC64 + 4 * class, 1),
        (GOTCL, bytes),
        (regs::GORCL, bytes),
    ] {
        assert_eq!(r.read(register), count, "{register:#x}");
    }
    assert_eq!(r.read(regs::GPTC), 0);
    // Back on the network: a header alone is filled up, too.
    r.write(MDIC, 1 << 26 | 1 << 21 | 0x1140);
    r.give(own[..14].to_vec());
    r.done(RX + 16 * 2 + 12);
    assert_eq!(r.look(RX + 16 * 2 + 8, 2), [60, 0]);
}
