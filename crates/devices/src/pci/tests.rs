use super::*;
use ringfort_bus::{IrqLine, MmioBus, MsiChannel, MsiMessage, MsiSink, NoIrq, PioBus, PortIo, lock, shared};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

#[derive(Default)]
struct Sink(Mutex<Vec<MsiMessage>>);
impl MsiSink for Sink {
    fn send(&self, m: MsiMessage) {
        lock(&self.0).push(m);
    }
}
impl Sink {
    fn take(&self) -> Vec<u32> {
        std::mem::take(&mut *lock(&self.0)).iter().map(|m| m.data).collect()
    }
}

/// A sink with channels, of which each takes so many messages.
struct Channels {
    direct: Sink,
    by_channel: Arc<Sink>,
    made: AtomicUsize,
    takes: usize,
}
impl MsiSink for Channels {
    fn send(&self, m: MsiMessage) {
        self.direct.send(m);
    }
    fn channel(&self) -> Option<Box<dyn MsiChannel>> {
        self.made.fetch_add(1, Ordering::SeqCst);
        Some(Box::new(Counted { to: self.by_channel.clone(), left: self.takes }))
    }
}
struct Counted {
    to: Arc<Sink>,
    left: usize,
}
impl MsiChannel for Counted {
    fn send(&mut self, m: MsiMessage) -> bool {
        let takes = self.left > 0;
        if takes {
            self.left -= 1;
            self.to.send(m);
        }
        takes
    }
}

#[derive(Default)]
struct Wire(AtomicBool);
impl IrqLine for Wire {
    fn set(&self, high: bool) {
        self.0.store(high, Ordering::SeqCst);
    }
}
impl Wire {
    fn high(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// 4 KiB of memory BAR 0, 32 ports of BAR 2, 16 KiB of 64-bit BAR 4 with MSI-X.
struct Card {
    config: PciConfig,
    msix: Arc<MsixState>,
    scratch: Mutex<[u8; 32]>,
    resets: AtomicUsize,
    told: Mutex<Vec<(u8, Option<u64>)>>,
}

fn card(sink: Arc<Sink>, line: Arc<dyn IrqLine>) -> Arc<Card> {
    let mut s = ConfigSpace::new(&Identity { vendor: 0x1234, device: 0x5678, ..Identity::default() });
    s.add_bar(0, BarKind::Mem32 { prefetchable: false }, 0x1000).unwrap();
    s.add_bar(2, BarKind::Io, 32).unwrap();
    s.add_bar(4, BarKind::Mem64 { prefetchable: true }, 0x4000).unwrap();
    s.add_pcie(PcieKind::RootComplexEndpoint).unwrap();
    let layout = MsixLayout { table_bar: 4, table_offset: 0x1000, pba_bar: 4, pba_offset: 0x2000 };
    let msix = Arc::new(MsixState::new(66, layout, sink).unwrap());
    s.add_msix(&msix).unwrap();
    s.set_interrupt_pin(1);
    let config = PciConfig::new(s, Some(msix.clone()), line);
    Arc::new(Card {
        config,
        msix,
        scratch: Mutex::default(),
        resets: AtomicUsize::new(0),
        told: Mutex::default(),
    })
}

impl PciFunction for Card {
    fn kind(&self) -> &'static str {
        "card"
    }
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        assert!(matches!(data.len(), 1 | 2 | 4) && usize::from(offset) % data.len() == 0);
        self.config.read(offset, data);
    }
    fn config_write(&self, offset: u16, data: &[u8]) {
        assert!(matches!(data.len(), 1 | 2 | 4) && usize::from(offset) % data.len() == 0);
        if self.config.write(offset, data).function_reset {
            self.resets.fetch_add(1, Ordering::SeqCst);
        }
    }
    fn windows(&self) -> [Option<BarWindow>; 7] {
        self.config.windows()
    }
    fn bars(&self) -> [Option<(BarKind, u64)>; 7] {
        self.config.bars()
    }
    fn mapped(&self, bar: u8, base: Option<u64>) {
        lock(&self.told).push((bar, base));
    }
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        if !self.msix.bar_read(bar, offset, data) {
            let s = lock(&self.scratch);
            for (i, b) in data.iter_mut().enumerate() {
                *b = s[(offset as usize + i) % 32] ^ bar;
            }
        }
    }
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        if !self.msix.bar_write(bar, offset, data) {
            let mut s = lock(&self.scratch);
            for (i, b) in data.iter().enumerate() {
                s[(offset as usize + i) % 32] = *b ^ bar;
            }
        }
    }
    fn reset(&self) {
        self.config.reset();
    }
    fn save(&self) -> Section {
        Section::new("card", 0, 1, &self.config.save())
    }
    fn load(&self, section: &Section) -> Result<(), StateError> {
        let s: PciConfigState = section.decode("card", 1)?;
        self.config.load(&s).map_err(|e| section.invalid(e))
    }
}

struct Rig {
    mmio: Arc<MmioBus>,
    pio: Arc<PioBus>,
    bus: Arc<PciBus>,
    ports: ConfigPorts,
    sink: Arc<Sink>,
    wire: Arc<Wire>,
    card: Arc<Card>,
    log: Arc<Mutex<Vec<String>>>,
}

const CARD: Bdf = Bdf::new(0, 3, 0);

fn rig() -> Rig {
    let (mmio, pio) = (Arc::new(MmioBus::default()), Arc::new(PioBus::default()));
    let log: Arc<Mutex<Vec<String>>> = Arc::default();
    let l = log.clone();
    let bus = PciBus::new(mmio.clone(), pio.clone(), move |m| lock(&l).push(m.into()));
    let (sink, wire) = (Arc::new(Sink::default()), Arc::new(Wire::default()));
    let card = card(sink.clone(), wire.clone());
    bus.add(CARD, card.clone()).unwrap();
    Rig { ports: ConfigPorts::new(bus.clone(), None), mmio, pio, bus, sink, wire, card, log }
}

impl Rig {
    fn w32(&self, at: u16, v: u32) {
        self.bus.config_write(CARD, at, &v.to_le_bytes());
    }
    fn r32(&self, at: u16) -> u32 {
        let mut d = [0; 4];
        self.bus.config_read(CARD, at, &mut d);
        u32::from_le_bytes(d)
    }
    fn command(&self, v: u16) {
        self.bus.config_write(CARD, reg::COMMAND, &v.to_le_bytes());
    }
    fn cap(&self, id: u8) -> u16 {
        let mut at = self.r32(0x34) as u16 & 0xff;
        while at != 0 {
            let v = self.r32(at);
            if v as u8 == id {
                return at;
            }
            at = (v >> 8) as u16 & 0xff;
        }
        panic!("no capability {id:#x}")
    }
    fn mapped(&self, name: &str) -> Vec<u64> {
        let all = self.mmio.ranges().into_iter().chain(self.pio.ranges());
        all.filter(|r| r.2.contains(name)).map(|r| r.0).collect()
    }
    fn msix_on(&self) -> u16 {
        let cap = self.cap(CAP_ID_MSIX);
        self.w32(cap, 0x8000_0000);
        cap
    }
    fn set_vector(&self, v: u64, data: u32, control: u32) {
        let at = 0x1000 + v * 16;
        self.card.bar_write(4, at, &0xfee0_0000u64.to_le_bytes());
        self.card.bar_write(4, at + 8, &data.to_le_bytes());
        self.card.bar_write(4, at + 12, &control.to_le_bytes());
    }
}

#[test]
fn bars_are_sized_and_masked() {
    let r = rig();
    assert_eq!(r.r32(0), 0x5678_1234);
    for (at, want) in [
        (0x10, 0xffff_f000),
        (0x14, 0),
        (0x18, 0xffff_ffe1),
        (0x20, 0xffff_c00c),
        (0x24, 0xffff_ffff),
        (0x30, 0),
    ] {
        r.w32(at, 0xffff_ffff);
        assert_eq!(r.r32(at), want, "BAR at {at:#x}");
    }
    r.w32(0, 0);
    assert_eq!(r.r32(0), 0x5678_1234, "identity is read-only");
    r.command(0xffff);
    assert_eq!(r.r32(4) as u16, command::WRITABLE);
    assert_eq!((r.r32(4) >> 16) as u16, status::CAPABILITIES);
}

#[test]
fn bars_map_move_and_unmap() {
    let r = rig();
    r.w32(0x10, 0xc000_0000);
    r.w32(0x18, 0xc000);
    assert!(r.mapped("card").is_empty(), "decoding is off");
    r.command(3);
    assert_eq!(r.mapped("card"), [0xc000_0000, 0xc000]);
    r.mmio.write(0xc000_0004, &[7]);
    let mut d = [0];
    r.pio.read(0xc004, &mut d);
    assert_eq!(d[0], 7 ^ 2, "same register, seen through BAR 2 by its own offset");
    r.w32(0x10, 0xd000_0000);
    assert_eq!(r.mapped("card"), [0xd000_0000, 0xc000]);
    r.w32(0x24, 0x10);
    r.w32(0x20, 0x4000);
    assert_eq!(r.mapped("card"), [0xd000_0000, 0x10_0000_4000, 0xc000]);
    r.command(1);
    assert_eq!(r.mapped("card"), [0xc000]);
    let told = std::mem::take(&mut *lock(&r.card.told));
    let moves = [(0, 0xc000_0000), (0, 0xd000_0000), (4, 0x10_0000_0000), (4, 0x10_0000_4000u64)];
    let [a, b, c, d] = moves.map(|(bar, base)| (bar, Some(base)));
    assert_eq!(told, [a, (0, None), b, c, (4, None), d, (0, None), (4, None)], "{told:x?}");
    r.command(2);
    assert_eq!(lock(&r.card.told).len(), 2);
    r.bus.remove(CARD);
    assert_eq!(lock(&r.card.told)[2..], [(0, None), (4, None)], "a function that goes");
    r.bus.add(CARD, r.card.clone()).unwrap();
    r.bus.reset();
    assert!(r.mapped("card").is_empty());
    r.command(3);
    assert!(r.mapped("card").is_empty(), "address 0 decodes nothing");
}

#[test]
fn overlap_leaves_the_first_and_is_told_once() {
    let r = rig();
    r.mmio.insert("ioapic", 0xfec0_0000, 0x1000, shared(Null)).unwrap();
    r.command(2);
    for _ in 0..3 {
        r.w32(0x10, 0xfec0_0000);
        r.w32(0x10, 0xd000_0000);
    }
    r.w32(0x10, 0xfec0_0000);
    assert_eq!(lock(&r.log).len(), 1, "{:?}", lock(&r.log));
    assert!(lock(&r.log)[0].contains("overlaps ioapic"));
    assert_eq!(r.mapped("ioapic"), [0xfec0_0000]);
    assert!(r.mapped("card").is_empty());
    // A second card in the way of the first gets its turn when the first goes.
    let other = card(Arc::new(Sink::default()), Arc::new(NoIrq));
    let place = Bdf::new(0, 4, 0);
    r.bus.add(place, other).unwrap();
    r.w32(0x10, 0xd000_0000);
    r.bus.config_write(place, 0x10, &0xd000_0000u32.to_le_bytes());
    r.bus.config_write(place, 4, &[2]);
    assert_eq!(r.mapped("00:03.0").len(), 1);
    assert!(r.mapped("00:04.0").is_empty());
    r.command(0);
    assert_eq!(r.mapped("00:04.0"), [0xd000_0000]);
    assert!(r.bus.remove(place).is_some());
    assert!(r.mapped("card").is_empty());
    assert_eq!(r.bus.add(CARD, r.card.clone()), Err(PciError::Taken(CARD)));
}

struct Null;
impl ringfort_bus::MmioDevice for Null {
    fn mmio_read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn mmio_write(&mut self, _: u64, _: &[u8]) {}
}

#[test]
fn msix_masks_keep_interrupts_pending() {
    let r = rig();
    let cap = r.cap(CAP_ID_MSIX);
    assert_eq!(r.r32(cap) >> 16, 65);
    r.set_vector(1, 0x41, 0);
    r.set_vector(65, 0x65, 0);
    r.card.msix.notify(1);
    assert!(r.sink.take().is_empty(), "off");
    r.msix_on();
    r.card.msix.notify(1);
    assert!(r.sink.take().is_empty(), "no bus mastering yet");
    r.command(4);
    assert_eq!(r.sink.take(), [0x41], "pending since it was raised with MSI-X on");
    r.w32(cap, 0xc000_0000);
    r.card.msix.notify(65);
    r.card.msix.notify(65);
    let mut pba = [0; 16];
    assert!(r.card.msix.bar_read(4, 0x2000, &mut pba));
    assert_eq!(u128::from_le_bytes(pba), 1 << 65);
    assert_eq!(r.card.msix.message(65), None);
    r.w32(cap, 0x8000_0000);
    assert_eq!(r.sink.take(), [0x65], "two edges while pending are one");
    r.card.msix.notify(2);
    assert!(r.sink.take().is_empty(), "vectors are masked after reset");
    r.set_vector(2, 0x42, 0);
    assert_eq!(r.sink.take(), [0x42]);
    r.card.msix.notify(0xffff);
    r.card.msix.notify(66);
    assert!(r.sink.take().is_empty());
    // The PBA is read-only, and vector control has one bit.
    r.card.bar_write(4, 0x2000, &[0xff; 8]);
    r.card.bar_write(4, 0x100c, &[0xff; 4]);
    let mut d = [0; 8];
    r.card.bar_read(4, 0x2000, &mut d);
    assert_eq!(d, [0; 8]);
    r.card.bar_read(4, 0x1008, &mut d);
    assert_eq!(d[4..], [1, 0, 0, 0]);
}

#[test]
fn busy_vectors_get_channels_and_lose_nothing() {
    for (takes, by_channel) in [(1000, 5), (2, 2), (0, 0)] {
        let sink = Arc::new(Channels {
            direct: Sink::default(),
            by_channel: Arc::default(),
            made: AtomicUsize::new(0),
            takes,
        });
        let layout = MsixLayout { table_bar: 0, table_offset: 0, pba_bar: 0, pba_offset: 0x800 };
        let m = MsixState::new(2, layout, sink.clone()).unwrap();
        let set = |word: u64, v: u32| assert!(m.bar_write(0, 16 + word * 4, &v.to_le_bytes()));
        set(2, 0x41);
        set(3, 0);
        m.set_control(true, false, true);
        (0..16).for_each(|_| m.notify(1));
        assert_eq!((sink.direct.take().len(), sink.made.load(Ordering::SeqCst)), (16, 0));
        m.notify(1);
        set(2, 0x42);
        m.notify(1);
        // Masked: pending in the table, not on its way; sent with what the vector says then.
        set(3, 1);
        m.notify(1);
        let mut pba = [0; 8];
        assert!(m.bar_read(0, 0x800, &mut pba));
        assert_eq!(u64::from_le_bytes(pba), 2);
        let [mut channel, mut direct] = [&sink.by_channel, &sink.direct].map(|s| s.take());
        set(2, 0x43);
        set(3, 0);
        m.set_control(true, true, true);
        m.notify(1);
        m.set_control(true, false, true);
        m.notify(1);
        channel.extend(sink.by_channel.take());
        direct.extend(sink.direct.take());
        assert_eq!(channel, [0x41, 0x42, 0x43, 0x43, 0x43][..by_channel]);
        assert_eq!(direct, [0x41, 0x42, 0x43, 0x43, 0x43][by_channel..]);
        assert_eq!(sink.made.load(Ordering::SeqCst), 1, "a channel that failed is not made again");
    }
}

#[test]
fn intx_follows_disable_and_msix() {
    let r = rig();
    r.card.config.set_intx(true);
    assert!(r.wire.high());
    assert_ne!(r.r32(4) >> 16 & 8, 0);
    r.command(command::INTX_DISABLE);
    assert!(!r.wire.high());
    assert_ne!(r.r32(4) >> 16 & 8, 0, "status shows it all the same");
    r.command(0);
    assert!(r.wire.high());
    r.msix_on();
    assert!(!r.wire.high());
    r.card.config.reset();
    assert!(!r.wire.high());
    assert_eq!(r.r32(4) >> 16 & 8, 0);
}

#[test]
fn function_level_reset() {
    let r = rig();
    let cap = r.cap(CAP_ID_PCIE);
    assert_eq!(r.r32(cap) >> 16 & 0xff, 0x92);
    r.command(2);
    r.w32(0x10, 0xd000_0000);
    r.msix_on();
    r.bus.config_write(CARD, cap + 8, &0x8010u16.to_le_bytes());
    assert_eq!(r.card.resets.load(Ordering::SeqCst), 1);
    assert!(r.mapped("card").is_empty());
    assert!(!r.card.msix.is_enabled());
    assert_eq!(r.r32(cap + 8) as u16, 0x2810);
    r.bus.config_write(CARD, cap + 9, &[0x28]);
    r.w32(cap + 8, 0x2810);
    assert_eq!(r.card.resets.load(Ordering::SeqCst), 1);
}

#[test]
fn mechanism_one_is_byte_accurate() {
    let r = rig();
    let read = |port: u16, n: usize| {
        let mut d = [0u8; 4];
        r.ports.read(port, &mut d[..n]);
        u32::from_le_bytes(d)
    };
    assert_eq!(read(0xcfc, 4), 0xffff_ffff, "not enabled");
    r.ports.write(0xcf8, &0xff00_1803u32.to_le_bytes());
    assert_eq!(read(0xcf8, 4), 0x8000_1800, "reserved bits read 0");
    assert_eq!(read(0xcfc, 4), 0x5678_1234);
    assert_eq!(read(0xcfd, 1), 0x12);
    assert_eq!(read(0xcfe, 2), 0x5678);
    assert_eq!(read(0xcfd, 2), 0x7812, "unaligned");
    r.ports.write(0xcf8, &[0]);
    r.ports.write(0xcf9, &[6]);
    r.ports.write(0xcfa, &[0, 0]);
    assert_eq!(read(0xcf8, 4), 0x8000_1800, "only a doubleword sets the address");
    r.ports.write(0xcf8, &0x8000_1810u32.to_le_bytes());
    r.ports.write(0xcff, &[0xd0]);
    assert_eq!(read(0xcfc, 4), 0xd000_0000);
    r.ports.write(0xcf8, &0x8000_2000u32.to_le_bytes());
    assert_eq!(read(0xcfc, 4), 0xffff_ffff, "nobody there");
    let saved = r.ports.save();
    r.ports.reset();
    assert_eq!(read(0xcf8, 4), 0);
    r.ports.load(&saved).unwrap();
    assert_eq!(read(0xcf8, 4), 0x8000_2000);
    struct Spy(Mutex<Vec<u8>>);
    impl PortIo for Spy {
        fn read(&self, _: u16, d: &mut [u8]) {
            d.fill(0xa5);
        }
        fn write(&self, _: u16, d: &[u8]) {
            lock(&self.0).extend_from_slice(d);
        }
    }
    let spy = Arc::new(Spy(Mutex::default()));
    let ports = ConfigPorts::new(r.bus.clone(), Some(spy.clone()));
    ports.write(0xcf9, &[6]);
    ports.write(0xcf8, &0x8000_0000u32.to_le_bytes());
    ports.write(0xcf8, &[1, 2]);
    assert_eq!(*lock(&spy.0), [6]);
    let mut d = [0];
    ports.read(0xcf9, &mut d);
    assert_eq!(d, [0xa5]);
}

#[test]
fn ecam_follows_pciexbar_and_shows_multifunction() {
    let r = rig();
    let host = HostBridge::new(&r.bus, Some(0xe000_0000));
    r.bus.add(HostBridge::BDF, host.clone()).unwrap();
    assert_eq!(r.mapped("ecam"), [0xe000_0000]);
    let at = |b: Bdf, reg: u64| 0xe000_0000 + (u64::from(b.id()) << 12) + reg;
    let mut d = [0; 4];
    r.mmio.read(at(HostBridge::BDF, 0), &mut d);
    assert_eq!(u32::from_le_bytes(d), 0x29c0_8086);
    r.mmio.read(at(CARD, 0xffc), &mut d);
    assert_eq!(d, [0; 4], "no extended capabilities");
    r.mmio.read(at(Bdf::new(255, 31, 7), 0xffc), &mut d);
    assert_eq!(d, [0xff; 4]);
    let mut one = [0];
    r.mmio.read(at(CARD, 0x0e), &mut one);
    assert_eq!(one[0], 0);
    let more = card(Arc::new(Sink::default()), Arc::new(NoIrq));
    r.bus.add(Bdf { function: 5, ..CARD }, more).unwrap();
    r.mmio.read(at(CARD, 0x0e), &mut one);
    assert_eq!(one[0], 0x80);
    r.mmio.read(at(CARD, 0x0c), &mut d);
    assert_eq!(d[2], 0x80);
    // 128 MiB at 4 GiB + 512 MiB; then off; then over something else, and back when that goes.
    r.bus.config_write(HostBridge::BDF, 0x60, &0x1_2800_0003u64.to_le_bytes());
    assert_eq!(host.ecam(), Some((0x1_2800_0000, 128 << 20)));
    assert_eq!(r.mapped("ecam"), [0x1_2800_0000]);
    r.bus.config_write(HostBridge::BDF, 0x60, &[0]);
    assert!(r.mapped("ecam").is_empty());
    r.w32(0x10, 0xc000_0000);
    r.command(2);
    r.bus.config_write(HostBridge::BDF, 0x60, &0xc000_0001u64.to_le_bytes());
    assert!(r.mapped("ecam").is_empty());
    r.command(0);
    assert_eq!(r.mapped("ecam"), [0xc000_0000]);
    r.bus.reset();
    assert_eq!(r.mapped("ecam"), [0xe000_0000]);
}

#[test]
fn lpc_routes() {
    #[derive(Default)]
    struct Ear(Mutex<Vec<String>>);
    impl LpcListener for Ear {
        fn pirq_changed(&self, n: u8, irq: Option<u8>) {
            lock(&self.0).push(format!("{n}:{irq:?}"));
        }
        fn acpi_base_changed(&self, base: Option<u16>) {
            lock(&self.0).push(format!("acpi {base:?}"));
        }
    }
    let lpc = Lpc::new(Some(0x600), [Some(10), Some(11), None, None, None, None, None, Some(2)]);
    let ear = Arc::new(Ear::default());
    lpc.set_listener(ear.clone());
    assert_eq!(lock(&ear.0).len(), 9);
    lock(&ear.0).clear();
    assert_eq!((lpc.pirq(0), lpc.pirq(2), lpc.pirq(7)), (Some(10), None, None));
    lpc.config_write(0x60, &[0x85]);
    lpc.config_write(0x60, &[0x05]);
    lpc.config_write(0x68, &[0x0d]);
    lpc.config_write(0x40, &0xb000u32.to_le_bytes());
    lpc.config_write(0x44, &[0]);
    assert_eq!(*lock(&ear.0), ["0:None", "0:Some(5)", "acpi Some(45056)", "acpi None"]);
    lpc.reset();
    assert_eq!(lpc.acpi_base(), Some(0x600));
    let saved = lpc.save();
    lpc.config_write(0x61, &[0x80]);
    lpc.load(&saved).unwrap();
    assert_eq!(lpc.pirq(1), Some(11));
}

#[test]
fn lines_are_shared() {
    let wire = Arc::new(Wire::default());
    let or = WiredOr::new(wire.clone());
    let (a, b) = (or.input(), or.input());
    a.set(true);
    b.set(true);
    a.set(false);
    assert!(wire.high());
    b.set(false);
    assert!(!wire.high());
    assert_eq!([swizzle(0, 1), swizzle(3, 1), swizzle(3, 2), swizzle(31, 4)], [0, 3, 0, 2]);
}

#[test]
fn addresses_are_assigned_without_overlap() {
    let r = rig();
    for d in 4..20 {
        r.bus.add(Bdf::new(0, d, 0), card(Arc::new(Sink::default()), Arc::new(NoIrq))).unwrap();
    }
    let windows = || Windows {
        io: Window::new(0xc000, 0x4000),
        mem32: Window::new(0xc000_0000, 0x1000_0000),
        mem64: Some(Window::new(0x10_0000_0000, 0x6000)),
    };
    r.bus.assign(&mut windows(), |b, pin| b.device + pin).unwrap();
    assert_eq!(r.mmio.ranges().len() + r.pio.ranges().len(), 17 * 3);
    assert_eq!(r.r32(0x3c) & 0xff, 4);
    assert!(lock(&r.log).is_empty());
    let small = Windows { io: Window::new(0xc000, 0x40), ..windows() };
    let e = r.bus.assign(&mut { small }, |_, _| 0).unwrap_err();
    assert!(e.to_string().contains("no room"), "{e}");
}

#[test]
fn impossible_descriptions_are_refused() {
    let mut s = ConfigSpace::new(&Identity::default());
    let m32 = BarKind::Mem32 { prefetchable: false };
    let m64 = BarKind::Mem64 { prefetchable: false };
    for (i, k, n) in
        [(0, m32, 3), (0, m32, 8), (0, BarKind::Io, 512), (5, m64, 4096), (7, m32, 4096), (6, m64, 4096)]
    {
        assert!(s.add_bar(i, k, n).is_err(), "{i} {k:?} {n}");
    }
    s.add_bar(1, m64, 4096).unwrap();
    assert!(s.add_bar(0, m64, 4096).is_err() && s.add_bar(2, m32, 4096).is_err());
    s.add_bar(ROM_BAR, m32, 4096).unwrap();
    let sink = Arc::new(Sink::default());
    let l = MsixLayout { table_bar: 1, table_offset: 0, pba_bar: 1, pba_offset: 0x800 };
    assert!(MsixState::new(0, l, sink.clone()).is_err());
    assert!(MsixState::new(129, l, sink.clone()).is_err(), "overlap");
    assert!(MsixState::new(2, MsixLayout { table_offset: 4, ..l }, sink.clone()).is_err());
    let far = MsixState::new(2, MsixLayout { pba_offset: 0x1000, ..l }, sink).unwrap();
    assert!(s.add_msix(&far).is_err(), "PBA beyond the BAR");
    assert!(s.add_capability(9, &[0; 0xd0], &[]).is_err());
    assert_eq!(s.add_capability(9, &[0; 3], &[]), Ok(0x40));
    assert_eq!(s.add_capability(9, &[0; 3], &[]), Ok(0x48));
}

#[test]
fn state_goes_round_and_foreign_state_is_refused() {
    let r = rig();
    r.w32(0x10, 0xd000_0000);
    r.command(0x406);
    r.msix_on();
    r.set_vector(3, 0x33, 1);
    r.card.msix.notify(3);
    r.card.config.set_intx(true);
    let saved = r.bus.save();
    let q = rig();
    q.bus.load(&saved).unwrap();
    assert_eq!(q.mapped("card"), [0xd000_0000]);
    assert_eq!(q.bus.save(), saved);
    q.set_vector(3, 0x33, 0);
    assert_eq!(q.sink.take(), [0x33]);
    assert!(matches!(q.bus.load(&[]), Err(StateError::Missing(_))));
    let mut s: PciConfigState = saved[0].decode("card", 1).unwrap();
    let lpc = Lpc::new(None, [None; 8]);
    assert!(lpc.load(&Section::new("ich9-lpc", 0, 1, &s)).is_err());
    s.clone_from(&q.card.config.save());
    let before = q.bus.save();
    assert!(q.card.load(&Section::new("card", 0, 1, &lpc_state(&lpc))).is_err());
    assert_eq!(q.bus.save(), before);
}

fn lpc_state(lpc: &Lpc) -> PciConfigState {
    lpc.save().decode("ich9-lpc", 1).unwrap()
}

#[test]
fn hammer() {
    let mut rng = fastrand::Rng::with_seed(0x5049);
    let mut r = rig();
    let host = HostBridge::new(&r.bus, Some(0xe000_0000));
    r.bus.add(HostBridge::BDF, host).unwrap();
    r.bus.add(Lpc::BDF, Lpc::new(Some(0x600), [None; 8])).unwrap();
    for n in 0..30_000 {
        let bdf = *rng.choice(&[CARD, HostBridge::BDF, Lpc::BDF]).unwrap();
        let len = *rng.choice(&[1, 2, 4, 8]).unwrap();
        let mut d: Vec<u8> = (0..len).map(|_| *rng.choice(&[0, 0xff, rng_byte(n)]).unwrap()).collect();
        let at = if rng.bool() { rng.u16(..0x80) } else { rng.u16(..0x1000) };
        match rng.u8(..10) {
            0..3 => r.bus.config_write(bdf, at, &d),
            3 => r.bus.config_read(bdf, at, &mut d),
            4 => r.ports.write(0xcf8 + rng.u16(..8), &d[..len.min(4)]),
            5 => r.ports.read(0xcf8 + rng.u16(..8), &mut d[..len.min(4)]),
            6 => {
                let all = r.mmio.ranges();
                if let Some((b, last, _)) = rng.choice(&all) {
                    r.mmio.write(rng.u64(*b..=*last), &d);
                    r.mmio.read(rng.u64(*b..=*last), &mut d);
                }
            }
            7 => r.pio.write(rng.u16(..), &d[..len.min(4)]),
            8 => r.card.msix.notify(rng.u16(..70)),
            _ => r.card.config.set_intx(rng.bool()),
        }
        r.sink.take();
        if n % 1000 == 999 {
            let saved = r.bus.save();
            let q = rig();
            q.bus.add(HostBridge::BDF, HostBridge::new(&q.bus, Some(0xe000_0000))).unwrap();
            q.bus.add(Lpc::BDF, Lpc::new(Some(0x600), [None; 8])).unwrap();
            q.bus.load(&saved).unwrap();
            assert_eq!(q.bus.save(), saved);
            assert_eq!(q.wire.high(), r.wire.high());
            r = q;
        }
    }
}

fn rng_byte(n: u32) -> u8 {
    (n.wrapping_mul(2_654_435_761) >> 24) as u8
}
