use super::*;
use ringfort_bus::{FakeClock, ManualTimer};
use ringfort_devices::power::PowerEvent;
use ringfort_engine::{CpuidTable, EngineError, Vcpu};
use ringfort_x86::cpuid::{Hypervisor, Topology};
use std::io::Cursor;

#[derive(Default)]
struct Events(Mutex<Vec<PowerEvent>>);
impl PowerSink for Events {
    fn event(&self, e: PowerEvent) {
        lock(&self.0).push(e);
    }
}

#[derive(Default)]
struct FakeVm {
    msis: Mutex<Vec<(u64, u32)>>,
    extint: Mutex<bool>,
}
impl Vm for FakeVm {
    fn create_vcpu(&self, _: u32, _: CpuidTable) -> Result<Box<dyn Vcpu>, EngineError> {
        Err(EngineError::Internal("no CPUs here".into()))
    }
    fn send_msi(&self, address: u64, data: u32) {
        lock(&self.msis).push((address, data));
    }
    fn set_extint(&self, high: bool) {
        *lock(&self.extint) = high;
    }
    fn inject_nmi(&self, _: u32) {}
    fn set_time_running(&self, _: bool) {}
    fn paravirt_clock(&self) -> u64 {
        0
    }
    fn set_paravirt_clock(&self, _: u64) {}
    fn set_dirty_logging(&self, _: bool) {}
}

type Bound = (Arc<ManualTimer>, Option<Weak<Mutex<dyn TimerDevice>>>);
#[derive(Default)]
struct FakeTimers(Mutex<Vec<Bound>>);
impl Timers for FakeTimers {
    fn timer(&self) -> (Arc<dyn Timer>, usize) {
        let t = ManualTimer::new();
        let mut all = lock(&self.0);
        all.push((t.clone(), None));
        (t, all.len() - 1)
    }
    fn bind(&self, number: usize, device: Weak<Mutex<dyn TimerDevice>>, _index: u32) {
        lock(&self.0)[number].1 = Some(device);
    }
}

impl FakeTimers {
    /// Let everything that is due at `now` go off.
    fn run(&self, now: u64) {
        let due: Vec<_> = lock(&self.0)
            .iter()
            .filter(|t| t.0.deadline().is_some_and(|d| d <= now))
            .map(|t| t.1.clone().unwrap())
            .collect();
        for d in due {
            lock(&*d.upgrade().expect("the machine keeps its devices")).timer_expired(0);
        }
    }
}

#[derive(Clone, Default)]
struct Out(Arc<Mutex<Vec<u8>>>);
impl SerialSink for Out {
    fn write(&mut self, bytes: &[u8]) -> usize {
        lock(&self.0).extend(bytes);
        bytes.len()
    }
}

struct Rig {
    pc: Arc<Pc>,
    vm: Arc<FakeVm>,
    events: Arc<Events>,
    clock: Arc<FakeClock>,
    timers: FakeTimers,
    out: Out,
}

impl Rig {
    fn new() -> Rig {
        let layout = Layout::new(32 << 20, 40).unwrap();
        let (events, clock, timers) = (Arc::new(Events::default()), FakeClock::new(), FakeTimers::default());
        let out = Out::default();
        let config = PcConfig {
            memory: layout.allocate().unwrap(),
            layout,
            clock: clock.clone(),
            power: events.clone(),
            serial: vec![SerialPort { sink: Box::new(out.clone()), room: Box::new(|| {}) }],
            debugcon: Some((0x402, Box::new(|_| {}))),
            debug_exit: Some(debug_exit::PORT),
            pvpanic: true,
            hpet: true,
            host_irqchip: false,
            log: Arc::new(|_| {}),
        };
        let pc = Pc::new(config, &timers).unwrap();
        let vm = Arc::new(FakeVm::default());
        pc.connect(vm.clone());
        Rig { pc, vm, events, clock, timers, out }
    }
    fn outb(&self, port: u16, v: u8) {
        self.pc.pio_write(port, &[v]);
    }
    fn inb(&self, port: u16) -> u8 {
        let mut b = [0];
        self.pc.pio_read(port, &mut b);
        b[0]
    }
    fn io_pin(&self, pin: u8, entry: u64) {
        for (half, v) in [(0u8, entry as u32), (1, (entry >> 32) as u32)] {
            self.pc.mmio_write(layout::IOAPIC_BASE, &u32::from(0x10 + 2 * pin + half).to_le_bytes());
            self.pc.mmio_write(layout::IOAPIC_BASE + 0x10, &v.to_le_bytes());
        }
    }
    fn init_pics(&self) {
        for (base, vector, cascade) in [(0x20u16, 0x20u8, 4u8), (0xa0, 0x28, 2)] {
            self.outb(base, 0x11);
            self.outb(base + 1, vector);
            self.outb(base + 1, cascade);
            self.outb(base + 1, 1);
            self.outb(base + 1, 0);
        }
    }
    fn msis(&self) -> Vec<(u64, u32)> {
        std::mem::take(&mut *lock(&self.vm.msis))
    }
    fn identity(cpu: &CpuBuilder) -> Identity<'_> {
        Identity { cpu, tsc_khz: 2_000_000, uuid: [7; 16], version: "0", serial: "" }
    }
}

fn cpus(n: u32) -> CpuBuilder {
    let spec = "qemu64".parse().unwrap();
    CpuBuilder::new(&spec, &CpuidTable::default(), Topology::flat(n), Hypervisor::default()).0
}

#[test]
fn the_pit_reaches_both_controllers() {
    let r = Rig::new();
    // Setting the mode raises the output, before anybody listens.
    r.outb(0x43, 0x34);
    r.init_pics();
    r.io_pin(2, 0x42);
    r.outb(0x40, 0);
    r.outb(0x40, 4);
    r.clock.advance(2_000_000);
    r.timers.run(2_000_000);
    assert_eq!(r.msis(), [(0xfee0_0000, 0x42)]);
    assert!(*lock(&r.vm.extint));
    assert_eq!(r.pc.extint_vector(), 0x20);
    assert!(!*lock(&r.vm.extint));
}

#[test]
fn the_hpet_replaces_the_pit() {
    let r = Rig::new();
    r.io_pin(2, 0x42);
    r.io_pin(20, 0x54);
    let write = |at: u64, v: u64| r.pc.mmio_write(layout::HPET_BASE + at, &v.to_le_bytes());
    // Comparator 0 in legacy mode and comparator 2 on input 20, both one-shot after 100 ticks of 10 ns.
    write(0x100, 1 << 2);
    write(0x108, 100);
    write(0x140, 1 << 2 | 20 << 9);
    write(0x148, 100);
    write(0x10, 3);
    r.outb(0x43, 0x34);
    r.outb(0x40, 1);
    r.outb(0x40, 0);
    r.msis();
    r.clock.advance(1000);
    r.timers.run(1000);
    let mut got = r.msis();
    got.sort();
    assert_eq!(got, [(0xfee0_0000, 0x42), (0xfee0_0000, 0x54)]);
}

#[test]
fn serial_output_and_interrupt() {
    let r = Rig::new();
    r.io_pin(4, 0x34);
    r.outb(0x3f8, b'x');
    assert_eq!(*lock(&r.out.0), b"x");
    // Interrupts need OUT2; received data raises one.
    r.outb(0x3fc, 8);
    r.outb(0x3f9, 1);
    lock(&r.pc.serial()[0]).receive(b"y");
    assert_eq!(r.msis().last(), Some(&(0xfee0_0000, 0x34)));
    assert_eq!(r.inb(0x3f8), b'y');
}

#[test]
fn every_way_to_reset_and_to_stop() {
    let r = Rig::new();
    r.outb(0xcf9, 6);
    r.outb(0x64, 0xfe);
    r.outb(0x92, 1);
    r.outb(0x505, 1);
    r.pc.pio_write(0xf4, &[1, 0, 0, 0]);
    let s5 = u16::from(acpi_pm::sleep_type::S5) << 10 | 1 << 13;
    r.pc.pio_write(0x604, &s5.to_le_bytes());
    let e = lock(&r.events.0).clone();
    assert_eq!(e[..3], [PowerEvent::Reset; 3]);
    assert_eq!(e[3], PowerEvent::Panicked);
    assert!(matches!(e[4], PowerEvent::DebugExit(_)));
    assert_eq!(e[5], PowerEvent::PowerOff);
}

#[test]
fn pci_is_there_both_ways_and_its_pins_lead_to_the_controllers() {
    let r = Rig::new();
    r.pc.pio_write(0xcf8, &0x8000_0000u32.to_le_bytes());
    let mut id = [0; 4];
    r.pc.pio_read(0xcfc, &mut id);
    assert_eq!(u32::from_le_bytes(id), 0x29c0_8086);
    r.pc.mmio_read(layout::ECAM_BASE + (0x1f << 15), &mut id);
    assert_eq!(u32::from_le_bytes(id), 0x2918_8086);

    r.init_pics();
    // Level-triggered 10 and 11 on the slave; I/O APIC input 17 level, masked off again by nobody.
    r.outb(0x4d1, 0x0c);
    r.io_pin(17, 0x51 | 1 << 15);
    let a = r.pc.intx(1, 1);
    let b = r.pc.intx(9, 1);
    a.set(true);
    b.set(true);
    assert_eq!(r.msis(), [(0xfee0_0000, 0xc051)]);
    assert_eq!(r.pc.extint_vector(), 0x20 + 10);
    a.set(false);
    // The other still holds the line: EOI brings it again.
    r.pc.ioapic_eoi(0x51);
    assert_eq!(r.msis().len(), 1);
    b.set(false);
    r.pc.ioapic_eoi(0x51);
    assert_eq!(r.msis(), []);

    // The guest routes PIRQB to IRQ 11 while it is high.
    r.outb(0xa0, 0x20);
    r.outb(0x20, 0x20);
    a.set(true);
    r.pc.mmio_write(layout::ECAM_BASE + (0x1f << 15) + 0x61, &[11]);
    assert_eq!(r.pc.extint_vector(), 0x20 + 11);
}

#[test]
fn power_button_reaches_the_guest_as_sci() {
    let r = Rig::new();
    r.io_pin(9, 0x39 | 1 << 15);
    assert!(!r.pc.power_button());
    assert_eq!(r.msis(), []);
    r.pc.pio_write(0x602, &(1u16 << 8).to_le_bytes());
    assert!(r.pc.power_button());
    assert_eq!(r.msis(), [(0xfee0_0000, 0xc039)]);
}

#[test]
fn rubbish_everywhere_never_panics() {
    let r = Rig::new();
    let mut x = 0x1234_5678_9abc_def1u64;
    for port in 0..=u16::MAX {
        for len in [1usize, 2, 4] {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let mut d = x.to_le_bytes();
            r.pc.pio_write(port, &d[..len]);
            r.pc.pio_read(port, &mut d[..len]);
        }
    }
    for i in 0..20_000u64 {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let base =
            [layout::IOAPIC_BASE, layout::ECAM_BASE, layout::HPET_BASE, layout::PCI_MEM32.0][i as usize & 3];
        let mut d = x.to_be_bytes();
        let len = [1, 2, 4, 8][(x >> 40) as usize & 3];
        r.pc.mmio_write(base + (x >> 44 & 0xf_ffff), &d[..len]);
        r.pc.mmio_read(base + (x >> 44 & 0xf_ffff), &mut d[..len]);
    }
    r.pc.reset();
    // After a reset everything is where it was.
    let mut id = [0; 4];
    r.pc.mmio_read(layout::ECAM_BASE, &mut id);
    assert_eq!(u32::from_le_bytes(id), 0x29c0_8086);
    assert_ne!(r.inb(0x608) & r.inb(0x609), 0xff);
}

#[test]
fn state_goes_round() {
    let r = Rig::new();
    r.init_pics();
    r.io_pin(4, 0x34);
    r.outb(0x3ff, 0x5a);
    r.pc.pio_write(0xcf8, &0x8000_f840u32.to_le_bytes());
    r.pc.pio_write(0xcfc, &0x0000_0701u32.to_le_bytes());
    let saved = r.pc.save().unwrap();
    let other = Rig::new();
    other.pc.load(&saved).unwrap();
    assert_eq!(other.pc.save().unwrap(), saved);
    assert_eq!(other.inb(0x3ff), 0x5a);
    // The ACPI block moved with the bridge's register.
    let mut d = [0; 2];
    other.pc.pio_read(0x704, &mut d);
    assert_eq!(u16::from_le_bytes(d) & 1, 1);
    for i in 0..saved.len() {
        let mut less = saved.clone();
        let gone = less.remove(i);
        let e = Rig::new().pc.load(&less).unwrap_err();
        assert!(matches!(e, StateError::Missing(_)), "{}: {e}", gone.kind);
    }
}

#[test]
fn a_kernel_is_loaded_with_its_tables() {
    let r = Rig::new();
    let cpu = cpus(4);
    let mut k = vec![0u8; 0x1000];
    let flags = 1u32 << 16;
    let header = [0x1bad_b002, flags, 0u32.wrapping_sub(0x1bad_b002).wrapping_sub(flags)];
    let addresses = [0x10_0000u32, 0x10_0000, 0, 0, 0x10_0020];
    for (i, v) in header.iter().chain(&addresses).enumerate() {
        k[4 * i..4 * i + 4].copy_from_slice(&v.to_le_bytes());
    }
    for _ in 0..2 {
        let l = r.pc.boot_kernel(&Rig::identity(&cpu), &mut Cursor::new(&k), vec![], "a b").unwrap();
        assert_eq!(l.protocol, "Multiboot");
        use ringfort_memory::{Bytes, GuestAddress};
        let mut sig = [0; 8];
        r.pc.memory().read_slice(&mut sig, GuestAddress(layout::RSDP_ADDRESS)).unwrap();
        assert_eq!(&sig, b"RSD PTR ");
        r.pc.memory().read_slice(&mut sig, GuestAddress(layout::SMBIOS_BASE)).unwrap();
        assert_eq!(&sig[..5], b"_SM3_");
        r.pc.reset();
    }
    let e = r.pc.boot_kernel(&Rig::identity(&cpu), &mut Cursor::new(&k[..16]), vec![], "").unwrap_err();
    assert!(e.to_string().starts_with("kernel: "), "{e}");
}
