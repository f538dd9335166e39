//! Frames that others on a network send to a guest's card, and what name servers answer: filters by address and VLAN, receive-side scaling,
//! checks of checksums, guards.

use crate::Input;
use crate::cards::{MAC, Silent, memory};
use ringfort_bus::NoIrq;
use ringfort_devices::e1000e::E1000e;
use ringfort_devices::pci::PciFunction;
use ringfort_memory::{Bytes, GuestAddress, RamMap};
use ringfort_net::guard::{Guard, GuardConfig, Limit, Rate};
use ringfort_net::managed::dns;
use ringfort_net::{MAX_FRAME, MacAddr, NetBackend, NetEvents, Offloads, Sent, VnetHeader};
use ringfort_virtio::VirtioDevice;
use ringfort_virtio::net::{Net, NetOptions};
use ringfort_virtio::queue::{Gate, Queue, QueueLayout, QueueProgress};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

/// A network on which the frames of the input come.
struct Others(Mutex<VecDeque<(VnetHeader, Vec<u8>)>>);

impl NetBackend for Others {
    fn accepts(&self) -> Offloads {
        Offloads::ALL
    }
    fn produces(&self) -> Offloads {
        Offloads::ALL
    }
    fn max_pairs(&self) -> u16 {
        2
    }
    fn attach(&self, _events: Arc<dyn NetEvents>) {}
    fn set_offloads(&self, _offloads: Offloads) {}
    fn send(&self, _pair: u16, _header: &VnetHeader, frame: &[u8]) -> Sent {
        // Behind the guard: what is sent is from the card.
        assert_eq!(frame[6..12], MAC);
        Sent::Done
    }
    fn receive(&self, _pair: u16, frame: &mut Vec<u8>) -> Option<VnetHeader> {
        let (header, data) = self.0.lock().ok()?.pop_front()?;
        *frame = data;
        Some(header)
    }
}

/// The same frames for a guard, for a card of virtio with a filter and scaling, and for Intel's; the same bytes as an answer of a name server.
pub fn net_frames(data: &[u8]) {
    let mut input = Input(data);
    let (options, filter, vlan) = (input.u8(), input.u8(), input.u16());
    let raw = input.bytes::<{ VnetHeader::LEN }>();
    let rest = input.rest();
    let mut frames = VecDeque::new();
    let mut left = rest;
    while let Some((&[kind, len], tail)) = left.split_first_chunk() {
        let (body, more) = tail.split_at(usize::from(len).min(tail.len()));
        left = more;
        let to = [MAC, [0xff; 6], [0x33, 0x33, 0, 0, 0, 1], [2; 6]][usize::from(kind & 3)];
        let ethertype = [&[8, 0][..], &[8, 6], &[0x86, 0xdd], &[0x81, 0]][usize::from(kind >> 2 & 3)];
        let frame = match kind & 0x80 {
            0 => [&to[..], &MAC, ethertype, body].concat(),
            _ => body.to_vec(),
        };
        // Back ends give whole Ethernet headers.
        if (14..MAX_FRAME).contains(&frame.len()) {
            let header = VnetHeader::decode(&raw, frame.len(), Offloads::ALL).unwrap_or_default();
            frames.push_back((header, frame));
        }
    }
    let network = || Arc::new(Others(Mutex::new(frames.clone())));

    // In front of a network: what is not from the card's own address does not pass.
    let limit = Limit {
        bytes: None,
        packets: (options & 1 != 0).then_some(Rate { per_second: 1 << 40, burst: 1 << 40 }),
    };
    let config = GuardConfig { tx: limit, rx: limit, mac: true };
    let guard = Guard::new(network(), &config, MacAddr::new(MAC).expect("unicast")).expect("a guard");
    for (header, frame) in &frames {
        guard.send(0, header, frame);
    }
    let mut frame = Vec::new();
    while guard.receive(0, &mut frame).is_some() {}

    // The card of virtio: scaling by all kinds of hashes, and a filter set by the control queue.
    let device = Net::new(network(), NetOptions { mac: MAC, pairs: 2, mtu: Some(1500), rss: true })
        .expect("good options");
    device.activate(device.features() & !(u64::from(options & 2) << 14));
    let ram = memory(&[]);
    let map = Arc::new(RamMap::new(&ram));
    let gate = Arc::new(Gate::default());
    // Commands lie one after the other, each with a byte for the answer.
    let mut commands: Vec<Vec<u8>> = vec![vec![0, 0, filter & 1], vec![0, 1, filter >> 1 & 1], vec![2, 0]];
    commands[2].extend((vlan & 0xfff).to_le_bytes());
    let mut rss = vec![4, 1];
    rss.extend(0x1ffu32.to_le_bytes());
    rss.extend([1, 0, 0, 0, 0, 0, 1, 0, 2, 0, 40]);
    rss.extend([0x6d; 40]);
    commands.push(rss);
    let put = |at: u64, bytes: &[u8]| ram.write_slice(bytes, GuestAddress(at)).expect("RAM");
    let descriptor = |at: u64, len: u32, flags: u16, next: u16| {
        [&at.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat()
    };
    for (n, c) in (0u16..).zip(&commands) {
        let at = 0x4000 + 0x100 * u64::from(n);
        put(at, c);
        put(32 * u64::from(n), &descriptor(at, c.len() as u32, 1, 2 * n + 1));
        put(32 * u64::from(n) + 16, &descriptor(at + 0x80, 1, 2, 0));
        put(0x104 + 2 * u64::from(n), &(2 * n).to_le_bytes());
    }
    put(0x102, &(commands.len() as u16).to_le_bytes());
    let queue = |base: u64, index: u16| {
        let layout = QueueLayout {
            size: 16,
            desc: base,
            avail: base + 0x100,
            used: base + 0x200,
            event_idx: false,
            indirect: false,
        };
        Queue::new(&map, &layout, QueueProgress::default(), index, gate.clone(), Arc::new(Silent))
    };
    device.service(&mut queue(0, 4).expect("a queue")).expect("good commands");
    let mut answer = [9];
    for n in 0..commands.len() as u64 {
        ram.read_slice(&mut answer, GuestAddress(0x4080 + 0x100 * n)).expect("RAM");
        assert_eq!(answer, [0], "command {n}");
    }
    for (index, base) in [(0, 0x1000u64), (2, 0x2000)] {
        for n in 0..16u16 {
            let at = 0x2_0000 + u64::from(index) * 0x1_0000 + u64::from(n) * 0x800;
            put(base + 16 * u64::from(n), &descriptor(at, 0x800, 2, 0));
            put(base + 0x104 + 2 * u64::from(n), &n.to_le_bytes());
        }
        put(base + 0x102, &16u16.to_le_bytes());
        device.service(&mut queue(base, index).expect("a queue")).expect("good buffers");
    }

    // Intel's card, with the same frames.
    let ram = memory(&[]);
    for n in 0..16u64 {
        ram.write_slice(&(0x1_0000 + 0x800 * n).to_le_bytes(), GuestAddress(16 * n)).expect("RAM");
    }
    let mac = MacAddr::new(MAC).expect("unicast");
    let card = E1000e::new(network(), mac, ram, Arc::new(Silent), Arc::new(NoIrq)).expect("a card");
    card.config_write(4, &[6, 0]);
    card.resume();
    let rctl = 0x0000_8002 | u32::from(filter) << 3 & 0x18 | u32::from(filter & 4) << 16;
    for (at, value) in [
        (0x5600 + u64::from(vlan >> 5 & 127) * 4, 1 << (vlan & 31)),
        (0x5000, if options & 4 != 0 { 0x2300 } else { 0x300 }),
        (0x5818, 0x0037_0001),
        (0x5008, u32::from(options & 8) << 12),
        (0, if options & 16 != 0 { 0x4000_0040 } else { 0x40 }),
        (0x2800, 0),
        (0x2808, 256),
        (0x2818, 15),
        (0x100, rctl),
    ] {
        card.bar_write(0, at, &u32::to_le_bytes(value));
    }
    card.pause();

    if let Some(q) = dns::question(rest) {
        let own = dns::answer(rest, &q, None);
        assert!(dns::responds(&own, [rest[0], rest[1]], rest));
        let _ = dns::responds(data, raw[..2].try_into().expect("two bytes"), rest);
    } else if rest.len() > 12 {
        // A real query, and these bytes for an answer.
        let query = [&rest[..2], &[1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, b'a', 0, 0, 1, 0, 1]].concat();
        if dns::responds(rest, [rest[0], rest[1]], &query) {
            assert!(rest[2] & 0x80 != 0);
        }
    }
}
