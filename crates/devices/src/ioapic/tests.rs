use super::*;
use crate::testing::{Messages, refuses_bad_state};
use std::sync::Mutex;

struct Rig {
    apic: IoApic,
    sink: Arc<Messages>,
}

fn rig() -> Rig {
    let sink = Arc::new(Messages::default());
    Rig { apic: IoApic::new(2, sink.clone()), sink }
}

impl Rig {
    fn write(&mut self, at: u8, v: u32) {
        self.apic.mmio_write(0, &u32::from(at).to_le_bytes());
        self.apic.mmio_write(0x10, &v.to_le_bytes());
    }
    fn read(&mut self, at: u8) -> u32 {
        self.apic.mmio_write(0, &[at]);
        let mut d = [0; 4];
        self.apic.mmio_read(0x10, &mut d);
        u32::from_le_bytes(d)
    }
    fn entry(&mut self, pin: u8, v: u64) {
        self.write(0x11 + pin * 2, (v >> 32) as u32);
        self.write(0x10 + pin * 2, v as u32);
    }
    fn sent(&mut self) -> Vec<u8> {
        self.sink.take().iter().map(|m| m.data as u8).collect()
    }
}

#[test]
fn registers() {
    let mut r = rig();
    assert_eq!((r.read(0), r.read(1), r.read(2)), (2 << 24, 0x0017_0020, 2 << 24));
    assert_eq!((r.read(0x10), r.read(0x3f), r.read(0x40)), (0x1_0000, 0, 0));
    r.write(0, 0xff00_0000);
    assert_eq!(r.read(0), 0x0f00_0000);
    r.write(1, 0);
    assert_eq!(r.read(1), 0x0017_0020);
    r.entry(23, u64::MAX);
    assert_eq!((r.read(0x3e), r.read(0x3f)), (0x1_afff, 0xffff_0000));
    r.apic.reset();
    assert_eq!((r.read(0), r.read(0x3e)), (2 << 24, 0x1_0000));
}

#[test]
fn messages_are_composed_from_the_entry() {
    let mut r = rig();
    r.entry(4, 0x05fe_0000_0000_0931);
    r.apic.set_irq(4, true);
    let m = r.sink.take();
    assert_eq!(m, [MsiMessage { address: 0xfee0_5fe4, data: 0x131 }], "extended ID in 11:5, logical in 2");
    r.entry(5, 0xff00_0000_0000_8032);
    r.apic.set_irq(5, true);
    assert_eq!(r.sink.take(), [MsiMessage { address: 0xfeef_f000, data: 0xc032 }]);
    r.entry(0, 0x0000_0000_0000_8700);
    r.apic.set_irq(0, true);
    r.apic.set_irq(0, true);
    assert_eq!(r.sink.take().len(), 1, "ExtINT is an edge even if marked level");
    assert_eq!(r.read(0x10) & 0x4000, 0);
}

#[test]
fn edges() {
    let mut r = rig();
    r.apic.set_irq(1, true);
    r.entry(1, 0x31);
    assert!(r.sent().is_empty(), "an edge while masked is lost");
    r.apic.set_irq(1, false);
    r.apic.set_irq(1, true);
    r.apic.set_irq(1, true);
    assert_eq!(r.sent(), [0x31]);
    r.apic.eoi(0x31);
    assert!(r.sent().is_empty());
    r.apic.set_irq(24, true);
    r.apic.set_irq(255, true);
}

#[test]
fn levels_repeat_after_eoi_only() {
    let mut r = rig();
    r.entry(16, 0x8041);
    r.entry(17, 0x8041);
    r.apic.set_irq(16, true);
    assert_eq!(r.sent(), [0x41]);
    assert_ne!(r.read(0x30) & 0x4000, 0);
    assert!(r.apic.wants_eoi(0x41) && !r.apic.wants_eoi(0x42));
    r.apic.set_irq(16, false);
    r.apic.set_irq(16, true);
    assert!(r.sent().is_empty());
    r.apic.set_irq(17, true);
    assert_eq!(r.sent(), [0x41]);
    r.apic.eoi(0x41);
    assert_eq!(r.sent(), [0x41, 0x41]);
    r.apic.set_irq(17, false);
    r.apic.mmio_write(0x40, &0x41u32.to_le_bytes());
    assert_eq!(r.sent(), [0x41], "the EOI register");
    // Masked while in service: asks when opened after the EOI.
    r.entry(16, 0x1_8041);
    r.apic.eoi(0x41);
    assert!(r.sent().is_empty());
    r.entry(16, 0x8041);
    assert_eq!(r.sent(), [0x41]);
    // Switching to edge and back clears remote IRR.
    r.entry(16, 0x1_0041);
    assert_eq!(r.read(0x30), 0x1_0041);
    r.entry(16, 0x8041);
    assert_eq!(r.sent(), [0x41]);
}

#[test]
fn listener_hears_changes() {
    #[derive(Default)]
    struct Ear(Mutex<Vec<(u8, u32, bool)>>);
    impl RouteListener for Ear {
        fn route_changed(&self, pin: u8, m: MsiMessage, masked: bool) {
            ringfort_bus::lock(&self.0).push((pin, m.data, masked));
        }
    }
    let mut r = rig();
    let ear = Arc::new(Ear::default());
    r.apic.set_listener(ear.clone());
    assert_eq!(std::mem::take(&mut *ringfort_bus::lock(&ear.0)).len(), 24);
    r.write(0x14, 0x55);
    assert_eq!(*ringfort_bus::lock(&ear.0), [(2, 0x55, false)]);
}

#[test]
fn hammer() {
    let mut rng = fastrand::Rng::with_seed(82093);
    let mut r = rig();
    for n in 1..30_000 {
        let mut d: Vec<u8> = (0..[1, 2, 4, 8][rng.usize(..4)]).map(|_| rng.u8(..)).collect();
        let at = if rng.bool() { rng.u64(..0x50) & !15 } else { rng.u64(..0x1000) };
        match rng.u8(..5) {
            0 => r.apic.mmio_read(at, &mut d),
            1 => r.apic.set_irq(rng.u8(..30), rng.bool()),
            2 => r.apic.eoi(rng.u8(..)),
            _ => r.apic.mmio_write(at, &d),
        }
        r.sink.take();
        if n % 500 == 0 {
            let saved = r.apic.save();
            let mut q = rig();
            q.apic.load(&saved).unwrap();
            assert_eq!(q.apic.save(), saved);
            assert!((0..0x50).all(|i| q.read(i) == r.read(i)));
            refuses_bad_state(&mut q.apic);
            r = q;
        }
    }
}
