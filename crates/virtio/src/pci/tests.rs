use super::*;
use crate::balloon::{Balloon, BalloonOptions, HostRelease};
use crate::rng::Rng;
use crate::testing::Ring;
use crate::{feature, status};
use ringfort_bus::{MmioBus, MsiMessage, NoIrq, PioBus};
use ringfort_devices::pci::{Bdf, PciBus, command, reg};
use ringfort_memory::{Bytes, GuestAddress, GuestMemory};
use std::sync::Condvar;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

#[derive(Default)]
pub(super) struct Messages {
    list: Mutex<Vec<MsiMessage>>,
    more: Condvar,
}

impl MsiSink for Messages {
    fn send(&self, msg: MsiMessage) {
        lock(&self.list).push(msg);
        self.more.notify_all();
    }
}

impl Messages {
    pub(super) fn wait(&self, n: usize) -> Vec<MsiMessage> {
        let (list, timeout) =
            self.more.wait_timeout_while(lock(&self.list), Duration::from_secs(30), |l| l.len() < n).unwrap();
        assert!(!timeout.timed_out(), "no interrupt");
        list.clone()
    }
}

#[derive(Default)]
pub(super) struct Line {
    high: Mutex<bool>,
    change: Condvar,
}

impl IrqLine for Line {
    fn set(&self, high: bool) {
        *lock(&self.high) = high;
        self.change.notify_all();
    }
}

impl Line {
    fn wait(&self, want: bool) {
        let (_level, timeout) = self
            .change
            .wait_timeout_while(lock(&self.high), Duration::from_secs(30), |h| *h != want)
            .unwrap();
        assert!(!timeout.timed_out(), "line is not {want}");
    }
}

/// A machine with one virtio function, reached as a guest does.
pub(super) struct Machine {
    pub(super) bus: Arc<PciBus>,
    pub(super) mmio: Arc<MmioBus>,
    pub(super) function: Arc<VirtioPci>,
    pub(super) messages: Arc<Messages>,
    pub(super) line: Arc<Line>,
    pub(super) memory: GuestMemory,
}

pub(super) const AT: Bdf = Bdf::new(0, 3, 0);
pub(super) const BASE: u64 = 0x8_0000_0000;
const MSIX_BASE: u64 = 0xe000_0000;

impl Machine {
    fn new(device: Arc<dyn VirtioDevice>, memory: GuestMemory) -> Machine {
        Machine::with_doorbells(device, memory, Arc::new(NoDoorbells))
    }

    pub(super) fn with_doorbells(
        device: Arc<dyn VirtioDevice>,
        memory: GuestMemory,
        bells: Arc<dyn DoorbellSink>,
    ) -> Machine {
        let (mmio, pio) = (Arc::new(MmioBus::default()), Arc::new(PioBus::default()));
        let (messages, line) = (Arc::new(Messages::default()), Arc::new(Line::default()));
        let ram = Arc::new(RamMap::new(&memory));
        let function = VirtioPci::new(device, ram, messages.clone(), line.clone()).unwrap();
        let function = Arc::new(function.with_doorbells(bells));
        let bus = PciBus::new(mmio.clone(), pio, |_| {});
        bus.add(AT, function.clone()).unwrap();
        Machine { bus, mmio, function, messages, line, memory }
    }

    fn rng() -> Machine {
        let memory = ringfort_memory::allocate(&[(0, 1 << 20)]).unwrap();
        let m = Machine::new(Arc::new(Rng::new()), memory);
        m.map();
        m
    }

    fn config(&self, offset: u16) -> u32 {
        let mut b = [0; 4];
        self.bus.config_read(AT, offset, &mut b);
        u32::from_le_bytes(b)
    }

    pub(super) fn set_config(&self, offset: u16, value: u32) {
        self.bus.config_write(AT, offset, &value.to_le_bytes());
    }

    pub(super) fn map(&self) {
        self.set_config(reg::BAR0 + 4, MSIX_BASE as u32);
        self.set_config(reg::BAR0 + 16, BASE as u32);
        self.set_config(reg::BAR0 + 20, (BASE >> 32) as u32);
        self.set_config(reg::COMMAND, u32::from(command::MEMORY | command::BUS_MASTER));
    }

    fn read(&self, offset: u64, len: usize) -> u64 {
        let mut b = [0; 8];
        self.mmio.read(BASE + offset, &mut b[..len]);
        u64::from_le_bytes(b)
    }

    pub(super) fn write(&self, offset: u64, len: usize, value: u64) {
        self.mmio.write(BASE + offset, &value.to_le_bytes()[..len]);
    }

    /// The capabilities: (ID, offset).
    fn capabilities(&self) -> Vec<(u8, u16)> {
        let mut list = Vec::new();
        let mut at = self.config(0x34) as u16 & 0xff;
        while at != 0 && list.len() < 48 {
            let head = self.config(at);
            list.push((head as u8, at));
            at = (head >> 8) as u16 & 0xff;
        }
        list
    }

    fn enable_msix(&self, vectors: u64) {
        for v in 0..vectors {
            for (word, value) in [(0, 0xfee0_0000u32), (4, 0), (8, 0x40 + v as u32), (12, 0)] {
                self.mmio.write(MSIX_BASE + v * 16 + word, &value.to_le_bytes());
            }
        }
        let cap = self.capabilities().iter().find(|c| c.0 == 0x11).unwrap().1;
        self.bus.config_write(AT, cap + 2, &0x8000u16.to_le_bytes());
    }

    /// What a driver does; gives the ring of queue 0.
    pub(super) fn drive(&self, msix: bool) -> Ring {
        self.write(0x14, 1, 0);
        assert_eq!(self.read(0x14, 1), 0);
        self.write(0x14, 1, 1);
        self.write(0x14, 1, 3);
        let mut offered = 0;
        for half in 0..2 {
            self.write(0x00, 4, half);
            offered |= self.read(0x04, 4) << (32 * half);
        }
        assert_eq!(offered & feature::COMMON, feature::COMMON);
        let wanted = feature::VERSION_1 | feature::INDIRECT_DESC;
        for half in 0..2 {
            self.write(0x08, 4, half);
            self.write(0x0c, 4, wanted >> (32 * half) & 0xffff_ffff);
        }
        self.write(0x14, 1, 0xb);
        assert_eq!(self.read(0x14, 1), 0xb);
        self.write(0x16, 2, 0);
        assert!([64, 128].contains(&self.read(0x18, 2)));
        self.write(0x18, 2, 16);
        let ring = Ring::new(&self.memory, 0x1000, 16);
        // One address whole, the others in halves.
        self.write(0x20, 8, ring.layout.desc);
        self.write(0x28, 4, ring.layout.avail);
        self.write(0x2c, 4, 0);
        self.write(0x30, 4, ring.layout.used);
        self.write(0x34, 4, 0);
        if msix {
            self.enable_msix(2);
            self.write(0x10, 2, 0);
            self.write(0x1a, 2, 1);
            assert_eq!((self.read(0x10, 2), self.read(0x1a, 2)), (0, 1));
        }
        self.write(0x1c, 2, 1);
        assert_eq!(self.read(0x1c, 2), 1);
        self.write(0x14, 1, 0xf);
        assert_eq!(self.read(0x14, 1), 0xf);
        ring
    }

    /// Set queue 0 up over whatever memory holds and offer random requests; how many came back at once.
    fn random_requests(&self, rng: &mut fastrand::Rng) -> u16 {
        let put = |at: u64, v: u64, len: usize| self.function.bar_write(BAR, at, &v.to_le_bytes()[..len]);
        self.bus.config_write(AT, reg::COMMAND, &7u16.to_le_bytes());
        [0, 3].into_iter().for_each(|v| put(0x14, v, 1));
        [(8, 1), (12, 1), (8, 0), (12, 0x3000_7e44)].into_iter().for_each(|(at, v)| put(at, v, 4));
        put(0x14, 0xb, 1);
        put(0x16, 0, 2);
        put(0x18, 16, 2);
        let mut ring = Ring::new(&self.memory, 0x1000, 16);
        ring.start_at(0);
        let areas = [(0x20, ring.layout.desc), (0x28, ring.layout.avail), (0x30, ring.layout.used)];
        areas.into_iter().for_each(|(at, v)| put(at, v, 8));
        put(0x1c, 1, 2);
        put(0x14, 0xf, 1);
        for _ in 0..rng.u8(1..6) {
            let mut header = [0; 16];
            header[0] = [0, 1, 4, 8, 11, 13, 99][rng.usize(..7)];
            header[8] = rng.u8(..);
            let _ = self.memory.write_slice(&header, GuestAddress(0x8000));
            let wild = if rng.u8(..8) == 0 { rng.u64(..) } else { rng.u64(..0x80) * 512 };
            let data = (wild, rng.u32(..64) * 256, rng.bool());
            if data.2 {
                ring.add(&[(0x8000, 16, false), data, (0x9000, 1, true)]);
            } else {
                ring.add(&[(0x8000, 16, false), data, (0x9000, rng.u32(..3), true)]);
            }
            put(NOTIFY_AT, 0, 2);
        }
        // Data may have gone over the rings: any index is possible then.
        ring.used_index().min(6)
    }

    fn bytes(&self, at: u64) -> [u8; 32] {
        let mut b = [0; 32];
        self.memory.read_slice(&mut b, GuestAddress(at)).unwrap();
        b
    }
}

#[test]
fn capabilities_name_all_structures() {
    let m = Machine::rng();
    assert_eq!(m.config(0), 0x1044_1af4);
    assert_eq!(m.config(8) & 0xff, 1);
    let mut kinds = Vec::new();
    for (_, at) in m.capabilities().into_iter().filter(|c| c.0 == CAP_ID_VENDOR) {
        let kind = (m.config(at) >> 24) as u8;
        let len = (m.config(at) >> 16) as u8;
        let (bar, offset, size) = (m.config(at + 4) as u8, m.config(at + 8), m.config(at + 12));
        kinds.push(kind);
        match kind {
            CFG_COMMON => assert_eq!((len, bar, offset, size), (16, 4, 0, 64)),
            CFG_ISR => assert_eq!((len, bar, offset), (16, 4, 0x1000)),
            CFG_DEVICE => assert_eq!((len, bar, offset), (16, 4, 0x2000)),
            CFG_NOTIFY => {
                assert_eq!((len, bar, offset, size), (20, 4, 0x3000, 4));
                assert_eq!(m.config(at + 16), NOTIFY_MULTIPLIER);
            }
            CFG_PCI => assert_eq!(len, 20),
            other => panic!("capability type {other}"),
        }
    }
    kinds.sort_unstable();
    assert_eq!(kinds, [1, 2, 3, 4, 5]);
}

#[test]
fn msix_interrupts_arrive_by_the_queues_vector() {
    let m = Machine::rng();
    let mut ring = m.drive(true);
    for n in 1..5 {
        ring.add(&[(0x8000, 32, true)]);
        m.write(NOTIFY_AT, 2, 0);
        let got = m.messages.wait(n);
        assert_eq!(got[n - 1], MsiMessage { address: 0xfee0_0000, data: 0x41 });
        assert_eq!(ring.take_used(), Some((n as u32 - 1, 32)));
    }
    assert_ne!(m.bytes(0x8000), [0; 32]);
    assert_eq!(m.read(ISR_AT, 1), 0);
    assert!(!*lock(&m.line.high));
    // A queue without a vector interrupts nobody; one with a wrong number has none.
    m.write(0x1a, 2, 99);
    assert_eq!(m.read(0x1a, 2), 0xffff);
}

#[test]
fn without_msix_the_line_rises_and_reading_isr_lowers_it() {
    let m = Machine::rng();
    let mut ring = m.drive(false);
    ring.add(&[(0x8000, 32, true)]);
    m.write(NOTIFY_AT, 2, 0);
    m.line.wait(true);
    assert_eq!(m.read(ISR_AT, 1), 1);
    assert!(!*lock(&m.line.high));
    assert_eq!(m.read(ISR_AT, 1), 0);
    // Interrupt disable keeps the line low, the bit stays.
    m.set_config(reg::COMMAND, u32::from(command::MEMORY | command::BUS_MASTER | command::INTX_DISABLE));
    ring.add(&[(0x8000, 0x10_0000, true)]);
    m.write(NOTIFY_AT, 2, 0);
}

#[test]
fn a_broken_ring_sets_needs_reset_and_tells_by_the_config_vector() {
    let m = Machine::rng();
    let told = Arc::new(Mutex::new(Vec::new()));
    let log = told.clone();
    m.function.core().set_log(move |text| lock(&log).push(text.to_owned()));
    let ring = m.drive(true);
    ring.set_avail_index(500);
    m.write(NOTIFY_AT, 2, 0);
    assert_eq!(m.messages.wait(1)[0].data, 0x40);
    assert_eq!(m.read(0x14, 1), 0x4f);
    let text = "virtio-rng: queue 0: available index 500 is more than the queue's size ahead of 0";
    assert_eq!(*lock(&told), [text]);
    // The driver cannot take the bit back, only reset.
    m.write(0x14, 1, 0xf);
    assert_eq!(m.read(0x14, 1), 0x4f);
    m.memory.write_slice(&[0; 0x1000], GuestAddress(0x1000)).unwrap();
    let mut ring = m.drive(true);
    ring.add(&[(0x8000, 32, true)]);
    m.write(NOTIFY_AT, 2, 0);
    assert_eq!(m.messages.wait(2)[1].data, 0x41);
}

#[test]
fn rings_outside_ram_break_at_driver_ok() {
    let m = Machine::rng();
    m.write(0x14, 1, 3);
    m.write(0x08, 4, 1);
    m.write(0x0c, 4, 1);
    m.write(0x14, 1, 0xb);
    m.write(0x20, 8, u64::MAX - 15);
    m.write(0x1c, 2, 1);
    m.write(0x14, 1, 0xf);
    assert_eq!(m.read(0x14, 1) as u8 & status::NEEDS_RESET, status::NEEDS_RESET);
    m.write(NOTIFY_AT, 2, 0);
    m.write(0x14, 1, 0);
    assert_eq!((m.read(0x14, 1), m.read(0x1c, 2), m.read(0x20, 8)), (0, 0, 0));
}

#[test]
fn features_must_be_offered_and_modern() {
    let m = Machine::rng();
    for (low, high) in [(0, 0), (1, 1), (0, 3)] {
        m.write(0x14, 1, 0);
        m.write(0x14, 1, 3);
        for (half, value) in [(0, low), (1, high)] {
            m.write(0x08, 4, half);
            m.write(0x0c, 4, value);
        }
        m.write(0x14, 1, 0xb);
        assert_eq!(m.read(0x14, 1), 3, "{low:x} {high:x}");
        m.write(0x14, 1, 7);
        assert_eq!(m.read(0x14, 1), 3, "not ready without features");
    }
    m.write(0x08, 4, 2);
    assert_eq!(m.read(0x0c, 4), 0);
    m.write(0x00, 4, 7);
    assert_eq!(m.read(0x04, 4), 0);
}

#[test]
fn without_bus_mastering_memory_is_left_alone() {
    let m = Machine::rng();
    m.set_config(reg::COMMAND, u32::from(command::MEMORY));
    let mut ring = m.drive(false);
    ring.add(&[(0x8000, 32, true)]);
    m.write(NOTIFY_AT, 2, 0);
    m.function.core().pause();
    assert_eq!(m.bytes(0x8000), [0; 32]);
    m.function.core().resume();
    // What was rung meanwhile is done when it comes back.
    m.set_config(reg::COMMAND, u32::from(command::MEMORY | command::BUS_MASTER));
    m.line.wait(true);
    assert!(ring.take_used().is_some());
}

#[test]
fn bars_are_reached_through_configuration_space() {
    let m = Machine::rng();
    let cap = m
        .capabilities()
        .into_iter()
        .find(|&(id, at)| id == CAP_ID_VENDOR && m.config(at) >> 24 == u32::from(CFG_PCI))
        .unwrap()
        .1;
    let select = |bar: u32, offset: u32, len: u32| {
        m.bus.config_write(AT, cap + 4, &[bar as u8]);
        m.set_config(cap + 8, offset);
        m.set_config(cap + 12, len);
    };
    select(4, 0x14, 1);
    m.bus.config_write(AT, cap + 16, &[3]);
    assert_eq!(m.read(0x14, 1), 3);
    assert_eq!(m.config(cap + 16) & 0xff, 3);
    select(4, 0x12, 2);
    assert_eq!(m.config(cap + 16) & 0xffff, 1);
    // Impossible windows do nothing.
    for (bar, offset, len) in [(4, 0x3fff, 4), (4, u32::MAX, 1), (9, 0, 4), (4, 0, 3), (4, 2, 4), (4, 0, 0)] {
        select(bar, offset, len);
        m.config(cap + 16);
        m.set_config(cap + 16, 0);
    }
    assert_eq!(m.read(0x14, 1), 3);
}

#[test]
fn function_level_and_machine_reset_start_over() {
    for machine in [false, true] {
        let m = Machine::rng();
        let mut ring = m.drive(true);
        ring.add(&[(0x8000, 32, true)]);
        if machine {
            m.bus.reset();
        } else {
            let cap = m.capabilities().iter().find(|c| c.0 == 0x10).unwrap().1;
            m.bus.config_write(AT, cap + 8, &0x8000u16.to_le_bytes());
        }
        assert_eq!(m.function.core().status(), 0);
        assert_eq!(m.config(reg::COMMAND) & 7, 0);
        m.map();
        assert_eq!((m.read(0x14, 1), m.read(0x10, 2)), (0, 0xffff));
        m.memory.write_slice(&[0; 0x1000], GuestAddress(0x1000)).unwrap();
        let mut ring = m.drive(true);
        ring.add(&[(0x8000, 32, true)]);
        m.write(NOTIFY_AT, 2, 0);
        m.messages.wait(1);
    }
}

#[test]
fn a_saved_function_goes_on_in_another_machine() {
    let m = Machine::rng();
    let mut ring = m.drive(true);
    ring.add(&[(0x8000, 32, true)]);
    m.write(NOTIFY_AT, 2, 0);
    m.messages.wait(1);
    ring.take_used().unwrap();
    m.function.core().pause();
    ring.add(&[(0x9000, 32, true)]);
    m.write(NOTIFY_AT, 2, 0);
    let sections = m.bus.save();

    let other = Machine::new(Arc::new(Rng::new()), m.memory.clone());
    drop(m);
    other.bus.load(&sections).unwrap();
    assert_eq!(other.bus.save(), sections);
    assert_eq!(other.read(0x14, 1), 0xf);
    assert_eq!(ring.take_used(), None);
    other.function.core().resume();
    assert_eq!(other.messages.wait(1)[0].data, 0x41);
    assert_eq!(ring.take_used(), Some((1, 32)));

    let other_ram = Arc::new(RamMap::new(&ring.memory));
    let balloon = Balloon::new(BalloonOptions::default(), Arc::new(HostRelease::new(other_ram)));
    let wrong = Machine::new(Arc::new(balloon), ring.memory.clone());
    assert!(wrong.bus.load(&sections).is_err());
    let mut spoiled = sections[0].clone();
    for i in 0..spoiled.body.len() {
        spoiled.body[i] ^= 0x55;
        // Must not panic; a state that is taken must be one that can be saved again.
        if other.function.load(&spoiled).is_ok() {
            other.function.save();
        }
        spoiled.body[i] ^= 0x55;
    }
    other.function.load(&sections[0]).unwrap();
}

/// Random accesses to configuration space and all registers, with real rings now and then: nothing may crash, hang or
/// leave the device unusable.
#[test]
fn a_hammer_on_all_registers_leaves_a_usable_device() {
    let disk = |n| {
        let memory: Arc<dyn ringfort_block::BlockBackend> = Arc::new(crate::testing::RamDisk::new(1 << 20));
        let options = crate::blk::BlkOptions { queues: n, ..Default::default() };
        Arc::new(crate::blk::Blk::new(memory, &options).unwrap()) as Arc<dyn VirtioDevice>
    };
    let mut served = 0u32;
    for seed in 0..12 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let memory = ringfort_memory::allocate(&[(0, 1 << 20)]).unwrap();
        let m = Machine::new(disk(1 + seed as u16 % 3), memory);
        m.map();
        for step in 0..4000 {
            if step % 500 == 0 {
                m.map();
            }
            let len = [1usize, 2, 4, 8][rng.usize(..4)];
            let value = match rng.u8(..4) {
                0 => rng.u64(..),
                1 => rng.u64(..4),
                2 => 1 << rng.u8(..64),
                _ => rng.u64(..1 << 20) & !15,
            };
            match rng.u8(..16) {
                0 => m.set_config(rng.u16(..256), value as u32),
                1 => _ = m.config(rng.u16(..)),
                2..4 => {
                    m.function.bar_write(rng.u8(..6), rng.u64(..BAR_LEN - 8), &value.to_le_bytes()[..len])
                }
                4 => m.function.bar_read(rng.u8(..6), rng.u64(..BAR_LEN - 8), &mut [0; 8][..len]),
                5 => m.function.bar_write(BAR, 0x14, &[rng.u8(..) & 0xf]),
                6 => m.function.bar_write(BAR, 0x14, &[[0, 3, 0xb, 0xf][rng.usize(..4)]]),
                7 => {
                    for (at, v) in [(8, 1u32), (12, 1), (8, 0), (12, value as u32 & 0x3000_0000)] {
                        m.function.bar_write(BAR, at, &v.to_le_bytes());
                    }
                }
                8..11 => m.function.bar_write(BAR, NOTIFY_AT + rng.u64(..4) * 4, &[0, 0]),
                11 => _ = m.memory.write_slice(&value.to_le_bytes(), GuestAddress(rng.u64(..0xff000))),
                12 => m.function.bar_write(BAR, 0x1c, &1u16.to_le_bytes()),
                13 => m.function.bar_read(BAR, ISR_AT, &mut [0]),
                14 => served += u32::from(m.random_requests(&mut rng)),
                _ => m.function.bar_write(BAR, rng.u64(..16) * 4, &value.to_le_bytes()[..4]),
            }
        }
        m.bus.reset();
        m.map();
        let state = m.function.save();
        m.function.load(&state).unwrap();
        assert_eq!(m.read(0x14, 1), 0);
    }
    assert!(served > 100, "only {served} requests came through");
}

#[test]
fn doorbells_of_different_queues_do_not_wait_for_each_other() {
    // A back end that holds queue 0's vCPU inside its doorbell until queue 1's doorbell was heard.
    struct Two {
        heard: AtomicBool,
        first_is_in: (Mutex<bool>, Condvar),
    }
    impl VirtioDevice for Two {
        fn kind(&self) -> &'static str {
            "two"
        }
        fn device_type(&self) -> u16 {
            4
        }
        fn features(&self) -> u64 {
            0
        }
        fn queue_sizes(&self) -> Vec<u16> {
            vec![16, 16]
        }
        fn read_config(&self, _: u64, _: &mut [u8]) {}
        fn has_quick(&self) -> bool {
            true
        }
        fn service(&self, _: &mut crate::Queue) -> Result<crate::Served, crate::QueueError> {
            Ok(crate::Served::Waiting)
        }
        fn quick(&self, queue: &mut crate::Queue) -> Result<crate::Quick, crate::QueueError> {
            if queue.index() == 1 {
                self.heard.store(true, Ordering::SeqCst);
                return Ok(crate::Quick::Done);
            }
            *self.first_is_in.0.lock().unwrap() = true;
            self.first_is_in.1.notify_all();
            let deadline = std::time::Instant::now() + Duration::from_secs(30);
            while !self.heard.load(Ordering::SeqCst) {
                assert!(std::time::Instant::now() < deadline, "queue 1 waits for queue 0");
                std::thread::yield_now();
            }
            Ok(crate::Quick::Done)
        }
    }
    let two = Arc::new(Two { heard: AtomicBool::new(false), first_is_in: Default::default() });
    let memory = ringfort_memory::allocate(&[(0, 1 << 20)]).unwrap();
    let ram = Arc::new(RamMap::new(&memory));
    let f = VirtioPci::new(two.clone(), ram, Arc::new(Messages::default()), Arc::new(NoIrq)).unwrap();
    f.core.set_dma(true);
    f.core.write_status(3);
    f.core.set_driver_select(1);
    f.core.set_driver_features(1);
    f.core.write_status(0xb);
    for q in 0..2u16 {
        f.core.set_queue_select(q);
        let r = Ring::new(&memory, 0x1000 * (u64::from(q) + 1), 16).layout;
        for (at, v) in [(0x20, r.desc), (0x28, r.avail), (0x30, r.used)] {
            f.bar_write(BAR, at, &v.to_le_bytes());
        }
        f.bar_write(BAR, 0x18, &16u16.to_le_bytes());
        f.core.set_queue_enabled();
    }
    f.core.write_status(0xf);
    std::thread::scope(|s| {
        s.spawn(|| f.bar_write(BAR, NOTIFY_AT, &[0, 0]));
        let (flag, change) = &two.first_is_in;
        drop(change.wait_while(flag.lock().unwrap(), |is_in| !*is_in).unwrap());
        f.bar_write(BAR, NOTIFY_AT + 4, &[1, 0]);
    });
}
