use super::*;
use crate::testing::{Ports, Wire, hammer_ports};
use ringfort_bus::{FakeClock, ManualTimer};

struct Rig {
    rtc: Rtc,
    clock: Arc<FakeClock>,
    timer: Arc<ManualTimer>,
    wire: Arc<Wire>,
}

/// 2024-02-28 23:59:58 UTC, a Wednesday.
const START: u64 = 1_709_164_798;

fn rig() -> Rig {
    let (clock, timer, wire) = (FakeClock::new(), ManualTimer::new(), Wire::new());
    clock.set_wall(START * 1_000_000_000);
    Rig { rtc: Rtc::new(clock.clone(), timer.clone(), wire.clone()), clock, timer, wire }
}

impl Rig {
    fn r(&mut self, i: u8) -> u8 {
        self.rtc.outb(0x70, i);
        self.rtc.inb(0x71)
    }
    fn w(&mut self, i: u8, v: u8) {
        self.rtc.outb(0x70, i);
        self.rtc.outb(0x71, v);
    }
    fn time(&mut self) -> [u8; 8] {
        [CENTURY, 9, 8, 7, 4, 2, 0, 6].map(|i| self.r(i))
    }
    fn pass(&mut self, ns: u64) {
        let end = self.clock.now_ns() + ns;
        while let Some(d) = self.timer.deadline().filter(|&d| d <= end) {
            let now = self.clock.now_ns();
            self.clock.advance(d.saturating_sub(now));
            self.rtc.timer_expired(0);
            assert_ne!(self.timer.deadline(), Some(d), "would spin");
        }
        let now = self.clock.now_ns();
        self.clock.advance(end - now);
    }
}

#[test]
fn shows_the_wall_clock() {
    let mut r = rig();
    assert_eq!(r.time(), [0x20, 0x24, 0x02, 0x28, 0x23, 0x59, 0x58, 4]);
    r.pass(2_000_000_000);
    assert_eq!(r.time(), [0x20, 0x24, 0x02, 0x29, 0, 0, 0, 5], "leap day");
    r.w(0x0b, 6);
    r.pass(13 * 3600 * 1_000_000_000);
    assert_eq!(r.time(), [20, 24, 2, 29, 13, 0, 0, 5], "binary");
    r.w(0x0b, 0);
    assert_eq!(r.r(4), 0x81, "1 pm");
    r.w(0x0b, 4);
    r.pass(11 * 3600 * 1_000_000_000);
    assert_eq!(r.r(4), 12, "midnight is 12 am");
    assert_eq!((r.r(0x0a), r.r(0x0d)), (0x26, 0x80));
    assert_eq!(r.rtc.inb(0x70), 0xff);
}

#[test]
fn update_in_progress_before_the_second() {
    let mut r = rig();
    r.pass(999_755_000);
    assert_eq!(r.r(0x0a) & 0x80, 0);
    r.pass(1_000);
    assert_eq!(r.r(0x0a) & 0x80, 0x80);
    assert_eq!(r.r(0), 0x58);
    r.pass(244_000);
    assert_eq!((r.r(0x0a) & 0x80, r.r(0)), (0, 0x59));
}

#[test]
fn the_guest_sets_the_time() {
    let mut r = rig();
    r.w(0x0b, 0x82);
    for (i, v) in [(0, 0x30), (2, 0x15), (4, 0x07), (7, 0x31), (8, 0x12), (9, 0x99), (CENTURY, 0x19)] {
        r.w(i, v);
    }
    r.pass(5_000_000_000);
    assert_eq!(r.r(0), 0x30, "stands still");
    r.w(0x0b, 2);
    r.pass(3_000_000_000);
    assert_eq!(r.time(), [0x19, 0x99, 0x12, 0x31, 7, 0x15, 0x33, 6]);
    // Divider reset: the first update comes after half a second.
    r.w(0x0a, 0x76);
    r.w(0, 0x10);
    r.pass(9_000_000_000);
    r.w(0x0a, 0x26);
    r.pass(499_000_000);
    assert_eq!(r.r(0), 0x10);
    r.pass(1_000_000);
    assert_eq!(r.r(0), 0x11);
    // A write while running takes effect at once; rubbish is bounded.
    r.w(2, 0x44);
    assert_eq!(r.r(2), 0x44);
    r.w(8, 0xff);
    assert_eq!(r.r(8), 0x12);
    let s = r.rtc.save();
    let mut q = rig();
    q.clock.advance(r.clock.now_ns());
    q.rtc.load(&s).unwrap();
    assert_eq!(q.time(), r.time());
}

#[test]
fn update_and_alarm_interrupts() {
    let mut r = rig();
    r.w(0x0b, 0x12);
    r.pass(1_000_000_000);
    assert!(r.wire.high());
    assert_eq!((r.r(0x0c), r.r(0x0c)), (0xd0, 0), "the periodic flag is set too, enabled or not");
    assert!(!r.wire.high());
    r.pass(3_000_000_000);
    assert_eq!(r.wire.take_edges(), 2, "no further edge until C is read");
    r.r(0x0c);
    // 00:00:10 exactly; then every minute at :05.
    r.w(0x0b, 0x22);
    for (i, v) in [(5, 0), (3, 0), (1, 0x10)] {
        r.w(i, v);
    }
    r.pass(7_999_999_999);
    assert_eq!((r.r(0x0c), r.r(0)), (0x50, 0x09), "updates are flagged though not enabled");
    r.pass(1);
    assert_eq!(r.r(0x0c), 0xf0);
    for (i, v) in [(5, 0xff), (3, 0xc0), (1, 0x05)] {
        r.w(i, v);
    }
    r.wire.take_edges();
    for _ in 0..3 {
        r.pass(60_000_000_000);
        assert_eq!((r.wire.take_edges(), r.r(0x0c) & 0x20), (1, 0x20));
    }
    // An alarm that can never match sets no alarm.
    r.w(1, 0x99);
    assert_eq!(r.timer.deadline(), None);
}

#[test]
fn periodic_interrupt() {
    let mut r = rig();
    r.w(0x0b, 0x42);
    let mut n = 0;
    for _ in 0..1024 {
        r.pass(976_563);
        n += usize::from(r.r(0x0c) == 0xc0 || r.wire.high());
    }
    assert!((1020..=1024).contains(&n), "{n}");
    r.w(0x0a, 0x21);
    r.r(0x0c);
    assert_eq!(r.timer.deadline().map(|d| d % 3_906_250), Some(0), "rate code 1 is 256 Hz");
    r.w(0x0a, 0x20);
    assert_eq!(r.timer.deadline(), None);
    r.w(0x0a, 0x2f);
    r.rtc.reset();
    assert_eq!(r.r(0x0b), 2);
    assert_eq!(r.timer.deadline(), None);
}

#[test]
fn ram_and_nmi_mask() {
    let mut r = rig();
    r.w(0xff, 0x5a);
    assert!(r.rtc.nmi_masked());
    assert_eq!(r.r(0x7f), 0x5a);
    assert!(!r.rtc.nmi_masked());
    r.rtc.set_cmos(0x34, 7);
    r.rtc.set_cmos(CENTURY, 7);
    r.rtc.set_cmos(200, 7);
    assert_eq!((r.r(0x34), r.r(CENTURY)), (7, 0x20));
    r.rtc.set_offset(3600);
    assert_eq!(r.r(4), 0);
    r.w(0x0d, 0);
    assert_eq!(r.r(0x0d), 0x80);
}

#[test]
fn hammer() {
    let clock = FakeClock::new();
    clock.set_wall(START * 1_000_000_000);
    let c = clock.clone();
    hammer_ports(
        146_818,
        move || Rtc::new(c.clone(), ManualTimer::new(), Wire::new()),
        &[0x70, 0x71],
        |d, r| {
            let bits = r.u8(1..40);
            clock.advance(r.u64(..1 << bits));
            d.timer_expired(0);
            d.outb(0x70, r.u8(..16));
            d.outb(0x71, r.u8(..));
        },
    );
}
