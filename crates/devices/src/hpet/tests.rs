use super::*;
use crate::testing::{Messages, Wire, refuses_bad_state};
use ringfort_bus::{FakeClock, ManualTimer};

struct Rig {
    h: Hpet,
    clock: Arc<FakeClock>,
    timer: Arc<ManualTimer>,
    pins: Vec<Arc<Wire>>,
    isa: [Arc<Wire>; 2],
    muxes: [Arc<LineMux>; 2],
    msi: Arc<Messages>,
}

fn rig_at(clock: Arc<FakeClock>) -> Rig {
    let timer = ManualTimer::new();
    let pins: Vec<_> = (0..24).map(|_| Wire::new()).collect();
    let isa = [Wire::new(), Wire::new()];
    let muxes = [LineMux::new(isa[0].clone()), LineMux::new(isa[1].clone())];
    let msi = Arc::new(Messages::default());
    let out = Outputs {
        pins: pins.iter().map(|p| Some(p.clone() as Arc<dyn IrqLine>)).collect(),
        legacy: muxes.clone(),
        msi: msi.clone(),
    };
    Rig { h: Hpet::new(3, clock.clone(), timer.clone(), out), clock, timer, pins, isa, muxes, msi }
}

fn rig() -> Rig {
    rig_at(FakeClock::new())
}

impl Rig {
    fn w(&mut self, at: u64, v: u64) {
        self.h.mmio_write(at, &v.to_le_bytes());
    }
    fn w32(&mut self, at: u64, v: u32) {
        self.h.mmio_write(at, &v.to_le_bytes());
    }
    fn r(&mut self, at: u64) -> u64 {
        let mut d = [0; 8];
        self.h.mmio_read(at, &mut d);
        u64::from_le_bytes(d)
    }
    fn pass(&mut self, ns: u64) {
        let end = self.clock.now_ns() + ns;
        while let Some(d) = self.timer.deadline().filter(|&d| d <= end) {
            let now = self.clock.now_ns();
            self.clock.advance(d.saturating_sub(now));
            self.h.timer_expired(0);
            assert_ne!(self.timer.deadline(), Some(d), "would spin");
        }
        let now = self.clock.now_ns();
        self.clock.advance(end - now);
    }
}

#[test]
fn capabilities_and_counter() {
    let mut r = rig();
    assert_eq!(r.r(0), 0x0098_9680_8086_a201);
    assert_eq!(r.r(0x100), 0x00ff_0104_0000_8030);
    r.pass(1000);
    assert_eq!(r.r(0xf0), 0, "halted");
    r.w(0xf0, 500);
    r.w(0x10, 1);
    r.pass(1000);
    assert_eq!(r.r(0xf0), 600);
    let mut d = [0; 4];
    r.h.mmio_read(4, &mut d);
    assert_eq!(u32::from_le_bytes(d), 10_000_000);
    r.w(0x10, 0);
    r.pass(1000);
    assert_eq!(r.r(0xf0), 600);
    r.w32(0xf4, 1);
    assert_eq!(r.r(0xf0), 1 << 32 | 600);
    assert_eq!((r.r(0x160), r.r(0x3f8)), (0, 0));
}

#[test]
fn one_shot_edge() {
    let mut r = rig();
    r.w(0x10, 1);
    r.w(0x100, conf::ENABLE | 16 << 9);
    r.w(0x108, 1000);
    assert_eq!(r.timer.deadline(), Some(10_000));
    r.pass(9_999);
    assert_eq!(r.pins[16].take_edges(), 0);
    r.pass(1);
    assert_eq!((r.pins[16].take_edges(), r.pins[16].high()), (1, false));
    assert_eq!(r.r(0x20), 0, "edges have no status");
    assert_eq!(r.timer.deadline(), None);
    r.w(0x108, 900);
    r.pass(1_000_000);
    assert_eq!(r.pins[16].take_edges(), 0, "a time that has passed matches no more");
    // In 32-bit mode it matches again after each turn of 32 bits.
    r.w(0x100, conf::ENABLE | 16 << 9 | conf::BITS_32);
    r.pass((1u64 << 32) * 10 * 3);
    assert_eq!(r.pins[16].take_edges(), 3);
    r.w(0x100, conf::ENABLE | 3 << 9);
    assert_eq!(r.r(0x100) >> 9 & 31, 0, "no such route");
}

#[test]
fn periodic_as_linux_sets_it() {
    let mut r = rig();
    r.w(0x10, 3);
    r.pass(12_340);
    let now = r.r(0xf0) as u32;
    r.w32(0x100, (conf::ENABLE | conf::PERIODIC | conf::SET_VALUE | conf::BITS_32) as u32);
    r.w32(0x108, now + 10_000);
    r.w32(0x108, 10_000);
    assert_eq!(r.r(0x100) & conf::SET_VALUE, 0);
    r.pass(1_000_000_000);
    assert_eq!(r.isa[0].take_edges(), 10_000);
    // The counter's 32 bits turn over: the rhythm stays.
    r.pass((1u64 << 32) * 10);
    assert_eq!(r.isa[0].take_edges() as u64, (1u64 << 32) / 10_000);
    // Late: one interrupt, and on with the schedule.
    r.clock.advance(1_050_000);
    r.h.timer_expired(0);
    assert_eq!(r.isa[0].take_edges(), 1);
    // The shortest period does not flood the host.
    r.w32(0x108, 1);
    r.pass(200_000);
    r.isa[0].take_edges();
    r.pass(10_000_000);
    let n = r.isa[0].take_edges();
    assert!((900..=1001).contains(&n), "{n}");
}

#[test]
fn legacy_replacement_takes_over_pit_and_rtc() {
    let mut r = rig();
    let pit = r.muxes[0].input(false);
    pit.pulse();
    assert_eq!(r.isa[0].take_edges(), 1);
    r.w(0x10, 3);
    pit.pulse();
    assert_eq!(r.isa[0].take_edges(), 0);
    r.w(0x120, conf::ENABLE | 16 << 9);
    r.w(0x128, 10);
    r.pass(200);
    assert_eq!((r.isa[1].take_edges(), r.pins[16].take_edges()), (1, 0));
    r.w(0x10, 1);
    pit.pulse();
    assert_eq!(r.isa[0].take_edges(), 1);
    r.w(0x10, 3);
    r.h.reset();
    pit.pulse();
    assert_eq!(r.isa[0].take_edges(), 1);
}

#[test]
fn level_and_messages() {
    let mut r = rig();
    r.w(0x10, 1);
    for t in [0x100, 0x120] {
        r.w(t, conf::ENABLE | conf::LEVEL | 20 << 9);
        r.w(t + 8, 100);
    }
    r.pass(1000);
    assert_eq!((r.r(0x20), r.pins[20].high()), (3, true));
    r.w(0x20, 1);
    assert!(r.pins[20].high(), "the other one shares the pin");
    r.w(0x10, 3);
    assert!(!r.pins[20].high() && r.isa[1].high());
    r.w(0x20, 2);
    assert!(!r.isa[1].high());
    r.w(0x140, conf::ENABLE | conf::FSB);
    r.w(0x150, 0xfee0_1000_0000_0041);
    r.w(0x148, 300);
    r.pass(5000);
    assert_eq!(r.msi.take(), [MsiMessage { address: 0xfee0_1000, data: 0x41 }]);
    r.w(0x100, conf::ENABLE | conf::LEVEL | 20 << 9);
    r.w(0x10, 1);
    r.w(0x108, 1000);
    r.pass(10_000);
    assert!(r.pins[20].high());
    r.w(0x100, conf::LEVEL | 20 << 9);
    assert!(!r.pins[20].high());
    assert_eq!(r.r(0x20), 0);
}

#[test]
fn hammer() {
    let mut rng = fastrand::Rng::with_seed(0x4854);
    let mut r = rig();
    for n in 1..30_000 {
        let mut d: Vec<u8> = (0..[1, 2, 4, 8][rng.usize(..4)]).map(|_| rng.u8(..) & rng.u8(..)).collect();
        let at = if rng.bool() { rng.u64(..0x160) & !7 } else { rng.u64(..0x400) };
        match rng.u8(..5) {
            0 => r.h.mmio_read(at, &mut d),
            1 => {
                let bits = rng.u8(1..45);
                r.clock.advance(rng.u64(..1 << bits));
                r.h.timer_expired(rng.u32(..));
            }
            _ => r.h.mmio_write(at, &d),
        }
        r.msi.take();
        if n % 500 == 0 {
            let saved = r.h.save();
            let mut q = rig_at(r.clock.clone());
            q.h.load(&saved).unwrap();
            assert_eq!(q.h.save(), saved);
            assert!((0..0x400).step_by(8).all(|i| q.r(i) == r.r(i)));
            assert!((0..24).all(|i| q.pins[i].high() == r.pins[i].high()));
            assert_eq!(q.h.save(), r.h.save());
            refuses_bad_state(&mut q.h);
            r = q;
        }
    }
}
