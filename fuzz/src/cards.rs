//! Network cards and what answers a network's guests: headers and commands of virtio-net, descriptors and registers of Intel's card, DHCP
//! and DNS, frames in a stream.

use crate::Input;
use ringfort_bus::{MsiMessage, MsiSink, NoIrq};
use ringfort_devices::e1000e::E1000e;
use ringfort_devices::pci::PciFunction;
use ringfort_memory::{Bytes, GuestAddress, GuestMemory, RamMap};
use ringfort_net::managed::dhcp::Server;
use ringfort_net::managed::{NetworkConfig, dhcp6, dns, leases};
use ringfort_net::{MAX_FRAME, MacAddr, NetBackend, NetEvents, Offloads, Sent, VnetHeader, hash, segment};
use ringfort_virtio::VirtioDevice;
use ringfort_virtio::net::{Net, NetOptions};
use ringfort_virtio::queue::{Gate, Queue, QueueLayout, QueueProgress};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

pub(crate) const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
const MEMORY: u64 = 1 << 20;

/// Checks what it is given as a back end would, and gives some frames.
struct Wire {
    can: Offloads,
    left: AtomicU32,
    seed: u8,
}

impl NetBackend for Wire {
    fn accepts(&self) -> Offloads {
        self.can
    }
    fn produces(&self) -> Offloads {
        Offloads::default()
    }
    fn max_pairs(&self) -> u16 {
        2
    }
    fn attach(&self, _events: Arc<dyn NetEvents>) {}
    fn set_offloads(&self, _offloads: Offloads) {}
    fn send(&self, _pair: u16, header: &VnetHeader, frame: &[u8]) -> Sent {
        assert!((14..=MAX_FRAME + 4).contains(&frame.len()), "{} bytes", frame.len());
        if let Some((start, offset)) = header.checksum {
            assert!(self.can.checksum && usize::from(start) + usize::from(offset) + 2 <= frame.len() + 4);
        }
        segment::split(header, frame, |part| assert!(part.len() <= frame.len()));
        let _ = segment::verify(frame);
        Sent::Done
    }
    fn receive(&self, _pair: u16, frame: &mut Vec<u8>) -> Option<VnetHeader> {
        let n = self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).ok()?;
        frame.clear();
        frame.extend_from_slice(&[0xff; 6]);
        frame.extend((0..60 + n as usize * 700).map(|i| (i as u8).wrapping_mul(self.seed)));
        Some(VnetHeader::default())
    }
}

fn wire(options: u8) -> Arc<Wire> {
    let can = if options & 1 != 0 { Offloads::ALL } else { Offloads::default() };
    Arc::new(Wire { can, left: AtomicU32::new(u32::from(options >> 4)), seed: options | 1 })
}

pub(crate) fn memory(image: &[u8]) -> GuestMemory {
    let memory = ringfort_memory::allocate(&[(0, MEMORY)]).expect("memory");
    let n = image.len().min(MEMORY as usize);
    memory.write_slice(&image[..n], GuestAddress(0)).expect("RAM");
    memory
}

pub(crate) struct Silent;

impl ringfort_virtio::Interrupt for Silent {
    fn queue(&self, _: u16) {}
    fn config(&self) {}
}

impl MsiSink for Silent {
    fn send(&self, _: MsiMessage) {}
}

/// Headers, receive buffers and commands that a hostile driver of virtio-net wrote.
pub fn virtio_net(data: &[u8]) {
    let mut input = Input(data);
    let options = input.u8();
    let which = u16::from(input.u8() % 5);
    let mut features = u64::from_le_bytes(input.bytes());
    let device = Net::new(wire(options), NetOptions { mac: MAC, pairs: 2, mtu: None, rss: options & 2 != 0 })
        .expect("good options");
    features &= device.features();
    let layout = QueueLayout {
        size: 16,
        desc: 0,
        avail: 0x100,
        used: 0x200,
        event_idx: options & 4 != 0,
        indirect: options & 8 != 0,
    };
    let memory = memory(input.rest());
    let ram = Arc::new(RamMap::new(&memory));
    let progress = QueueProgress::default();
    let Ok(mut queue) =
        Queue::new(&ram, &layout, progress, which, Arc::new(Gate::default()), Arc::new(Silent))
    else {
        return;
    };
    device.activate(features);
    for _ in 0..4 {
        if device.service(&mut queue).is_err() {
            break;
        }
    }
    device.load(&device.save()).expect("its own state");
    device.reset();
}

/// Registers and descriptors that a hostile driver of Intel's card wrote.
pub fn e1000e(data: &[u8]) {
    let mut input = Input(data);
    let options = input.u8();
    let writes = input.u8() % 64;
    let mut list = Vec::new();
    for _ in 0..writes {
        list.push((input.u16(), input.u16(), input.u16()));
    }
    let memory = memory(input.rest());
    let mac = MacAddr::new(MAC).expect("unicast");
    let card = E1000e::new(wire(options), mac, memory, Arc::new(Silent), Arc::new(NoIrq)).expect("a card");
    card.config_write(4, &[6, 0]);
    card.resume();
    let write = |at: u64, value: u32| card.bar_write(0, at & 0x1_fffc, &value.to_le_bytes());
    // Both rings in memory, on; then whatever comes.
    for (at, value) in
        [(0x2800, 0), (0x2808, 256), (0x3800, 0x400), (0x3808, 256), (0x400, 2), (0x100, 0x0400_801a)]
    {
        write(at, value);
    }
    for (at, low, high) in list {
        let value = u32::from(low) | u32::from(high) << 16;
        // Half of the registers are those that matter most.
        let at = match at % 16 {
            0 => 0x3818,
            1 => 0x2818,
            2 => 0x100,
            3 => 0x5008,
            4 => 0x2170,
            5 => 0x5000,
            6 => 0x5818,
            7 => 0,
            _ => u64::from(at) * 4,
        };
        write(at, value);
        let mut read = [0; 4];
        card.bar_read(0, at & 0x1_fffc, &mut read);
    }
    write(0x3818, 15);
    card.pause();
    card.load(&card.save()).expect("its own state");
}

/// What guests send to the servers of their network, and what comes over a stream.
pub fn net_services(data: &[u8]) {
    let config = NetworkConfig::new("fuzz", "10.9.0.0/29".parse().ok());
    if let Some(mut server) = Server::new(&config, &leases::parse(&String::from_utf8_lossy(data))) {
        for (n, chunk) in data.chunks(330).enumerate() {
            let _ = server.handle(chunk, n as u64 * 1000);
            // The same behind a head that is right.
            let mut m = vec![0; 240];
            m[..3].copy_from_slice(&[1, 1, 6]);
            m[28] = 2;
            m[33] = n as u8;
            m[236..240].copy_from_slice(&[99, 130, 83, 99]);
            m.extend_from_slice(chunk);
            if let Some(a) = server.handle(&m, n as u64 * 1000) {
                assert!(a.message.len() >= 300);
            }
        }
        assert!(server.leases(0).len() <= 8);
    }
    let with6 = NetworkConfig { ipv6: "fd00:9::/64".parse().ok(), ..config };
    if let Some(mut server) = dhcp6::Server::new(&with6, MAC, &leases::parse(&String::from_utf8_lossy(data)))
    {
        for (n, chunk) in data.chunks(90).enumerate() {
            let _ = server.handle(chunk, n as u64 * 1000);
            // The same as options of a client that names itself, and the server where it has to.
            let kind = chunk.first().map_or(1, |k| k % 12);
            let mut m = vec![kind, 1, 2, 3, 0, 1, 0, 2, 7, n as u8];
            if matches!(kind, 3 | 5 | 8 | 9) {
                m.extend([0, 2, 0, 10, 0, 3, 0, 1]);
                m.extend(MAC);
            }
            m.extend_from_slice(chunk);
            if let Some(a) = server.handle(&m, n as u64 * 1000) {
                assert!((4..1500).contains(&a.len()) && a[1..4] == [1, 2, 3]);
            }
        }
        assert!(server.leases(0).len() <= 4096);
    }
    if let Some(q) = dns::question(data) {
        assert!(dns::answer(data, &q, Some([1, 2, 3, 4].into())).len() <= data.len() + 16);
        let _ = dns::failure(data, &q);
    }
    let mut frames = ringfort_net::stream::Frames::default();
    let mut frame = Vec::new();
    for chunk in data.chunks(7) {
        frames.push(chunk);
        while let Ok(true) = frames.take(&mut frame) {
            assert!((1..=MAX_FRAME).contains(&frame.len()));
        }
    }
    let _ = hash::Toeplitz::new(&data[..data.len().min(50)]).of_frame(data, hash::types::ALL);
}
