use super::*;
use crate::testing::{Ports, Wire, hammer_ports};
use ringfort_bus::{FakeClock, ManualTimer};

struct Rig {
    pit: Pit,
    clock: Arc<FakeClock>,
    timer: Arc<ManualTimer>,
    wire: Arc<Wire>,
}

fn rig() -> Rig {
    let (clock, timer, wire) = (FakeClock::new(), ManualTimer::new(), Wire::new());
    Rig { pit: Pit::new(clock.clone(), timer.clone(), wire.clone()), clock, timer, wire }
}

impl Rig {
    /// Let time pass until `tick` ticks from machine start, firing the alarm as it comes.
    fn to(&mut self, tick: u64) {
        let end = nanoseconds(tick);
        while let Some(d) = self.timer.deadline().filter(|&d| d <= end) {
            let now = self.clock.now_ns();
            self.clock.advance(d.saturating_sub(now));
            self.pit.timer_expired(0);
        }
        self.clock.advance(end.saturating_sub(self.clock.now_ns()));
    }
    fn program(&mut self, channel: u8, mode: u8, count: u16) {
        self.pit.outb(0x43, channel << 6 | 0x30 | mode << 1);
        self.count(channel, count);
    }
    fn count(&mut self, channel: u8, count: u16) {
        self.pit.outb(0x40 + u16::from(channel), count as u8);
        self.pit.outb(0x40 + u16::from(channel), (count >> 8) as u8);
    }
    fn read(&mut self, channel: u8) -> u16 {
        self.pit.outb(0x43, channel << 6);
        let low = self.pit.inb(0x40 + u16::from(channel));
        u16::from(low) | u16::from(self.pit.inb(0x40 + u16::from(channel))) << 8
    }
    fn out2(&mut self) -> bool {
        self.pit.inb(0x61) & 0x20 != 0
    }
    fn status(&mut self, channel: u8) -> u8 {
        self.pit.outb(0x43, 0xe0 | 2 << channel);
        self.pit.inb(0x40 + u16::from(channel))
    }
}

#[test]
fn periodic_interrupts_do_not_drift() {
    let mut r = rig();
    r.program(0, 2, 1193);
    r.wire.take_edges();
    r.to(FREQUENCY * 100);
    assert_eq!(r.wire.take_edges() as u64, FREQUENCY * 100 / 1193);
    r.program(0, 3, 11932);
    r.wire.take_edges();
    let t = ticks(r.clock.now_ns());
    r.to(t + 11932 * 50);
    assert_eq!(r.wire.take_edges(), 50);
}

#[test]
fn late_alarm_gives_one_edge_and_keeps_the_schedule() {
    let mut r = rig();
    r.program(0, 2, 1000);
    r.wire.take_edges();
    r.clock.advance(nanoseconds(5500));
    r.pit.timer_expired(0);
    assert_eq!(r.wire.take_edges(), 1);
    assert_eq!(r.timer.deadline(), Some(nanoseconds(6000)));
    // The shortest period does not flood the host.
    r.program(0, 2, 1);
    r.wire.take_edges();
    let t = ticks(r.clock.now_ns());
    r.to(t + FREQUENCY);
    let n = r.wire.take_edges();
    assert!((40_000..51_000).contains(&n), "{n}");
}

#[test]
fn one_shot_modes() {
    let mut r = rig();
    r.program(0, 0, 100);
    assert!(!r.wire.high());
    assert_eq!(r.timer.deadline(), Some(nanoseconds(100)));
    r.to(99);
    assert!(!r.wire.high());
    r.to(100);
    assert!(r.wire.high());
    assert_eq!(r.timer.deadline(), None);
    r.to(103);
    assert_eq!(r.read(0), 0xfffd, "goes on counting");
    // Mode 4, as Linux's one-shot clock event: each count fires once, and rearming needs no control word.
    r.program(0, 4, 50);
    r.wire.take_edges();
    r.to(1000);
    assert_eq!(r.wire.take_edges(), 1);
    r.count(0, 10);
    r.to(1010);
    assert_eq!(r.wire.take_edges(), 0);
    r.to(1011);
    assert_eq!(r.wire.take_edges(), 1);
    assert_eq!(r.timer.deadline(), None);
}

#[test]
fn channel_2_calibrates() {
    let mut r = rig();
    r.pit.outb(0x61, 1);
    r.program(2, 0, 0xffff);
    assert!(!r.out2());
    r.to(0xfffe);
    assert!(!r.out2());
    r.to(0xffff);
    assert!(r.out2());
    // The gate stops it and lets it go on.
    r.program(2, 0, 100);
    let t = ticks(r.clock.now_ns());
    r.to(t + 40);
    r.pit.outb(0x61, 0);
    r.to(t + 400);
    assert_eq!(r.read(2), 60);
    r.pit.outb(0x61, 1);
    r.to(t + 459);
    assert!(!r.out2());
    r.to(t + 460);
    assert!(r.out2());
    assert_eq!(r.pit.inb(0x61) & 0xf, 1);
}

#[test]
fn retriggered_modes_wait_for_the_gate() {
    let mut r = rig();
    r.program(2, 1, 30);
    assert!(r.out2());
    r.pit.outb(0x61, 1);
    assert!(!r.out2());
    r.to(29);
    assert!(!r.out2());
    r.pit.outb(0x61, 0);
    r.pit.outb(0x61, 1);
    r.to(58);
    assert!(!r.out2(), "triggered again");
    r.to(59);
    assert!(r.out2());
    r.program(2, 5, 10);
    r.pit.outb(0x61, 0);
    assert!(r.out2());
    r.pit.outb(0x61, 1);
    r.to(69);
    assert!(!r.out2(), "strobe");
    r.to(70);
    assert!(r.out2());
}

#[test]
fn square_wave_shape_and_counts() {
    let mut r = rig();
    r.pit.outb(0x61, 1);
    for n in [6u16, 7] {
        r.program(2, 3, n);
        let t = ticks(r.clock.now_ns());
        let mut shape = Vec::new();
        for d in 0..u64::from(n) {
            r.to(t + d);
            shape.push((r.out2(), r.read(2)));
        }
        let high = usize::from(n).div_ceil(2);
        assert!(shape.iter().enumerate().all(|(i, s)| s.0 == (i < high)), "{shape:?}");
        assert_eq!(shape.iter().take(3).map(|s| s.1).collect::<Vec<_>>(), [6, 4, 2]);
        r.pit.outb(0x61, 0);
        assert!(r.out2(), "gate low: output high");
        r.pit.outb(0x61, 1);
    }
}

#[test]
fn a_new_count_waits_for_the_cycle() {
    let mut r = rig();
    r.program(0, 2, 1000);
    r.wire.take_edges();
    r.to(300);
    r.count(0, 200);
    assert_eq!(r.status(0) & 0x40, 0x40, "null count until loaded");
    assert_eq!(r.read(0), 700);
    r.to(999);
    assert_eq!(r.wire.take_edges(), 0);
    r.to(1000);
    assert_eq!(r.wire.take_edges(), 1);
    assert_eq!(r.status(0) & 0x40, 0);
    r.to(1400);
    assert_eq!(r.wire.take_edges(), 2);
    // Mode 3 takes it at the half: high till 500 of 1000, low for 100 of the new 200, then rises.
    r.program(0, 3, 1000);
    r.wire.take_edges();
    let t = ticks(r.clock.now_ns());
    r.to(t + 20);
    r.count(0, 200);
    r.to(t + 599);
    assert_eq!(r.wire.take_edges(), 0);
    r.to(t + 600);
    assert_eq!(r.wire.take_edges(), 1);
    r.to(t + 1000);
    assert_eq!(r.wire.take_edges(), 2);
}

#[test]
fn latches_bytes_and_bcd() {
    let mut r = rig();
    r.program(0, 2, 0x1234);
    r.pit.outb(0x43, 0);
    r.to(0x100);
    r.pit.outb(0x43, 0);
    assert_eq!((r.pit.inb(0x40), r.pit.inb(0x40)), (0x34, 0x12), "the first latch holds");
    assert_eq!((r.pit.inb(0x40), r.pit.inb(0x40)), (0x34, 0x11));
    r.pit.outb(0x43, 0xc2);
    assert_eq!((r.pit.inb(0x40), r.pit.inb(0x40), r.pit.inb(0x40)), (0xb4, 0x34, 0x11), "status, then count");
    r.pit.outb(0x43, 0x14);
    r.pit.outb(0x40, 10);
    assert_eq!((r.pit.inb(0x40), r.pit.inb(0x40)), (10, 10));
    r.pit.outb(0x43, 0x24);
    r.pit.outb(0x40, 2);
    assert_eq!(r.pit.inb(0x40), 2);
    r.pit.outb(0x43, 0x31);
    r.pit.outb(0x40, 0x00);
    r.pit.outb(0x40, 0x10);
    let t = ticks(r.clock.now_ns());
    r.to(t + 1);
    assert_eq!(r.read(0), 0x0999);
    r.to(t + 1001);
    assert_eq!(r.read(0), 0x9999);
    r.pit.outb(0x43, 0x31);
    r.pit.outb(0x40, 0);
    r.pit.outb(0x40, 0);
    r.to(t + 1002);
    assert_eq!(r.read(0), 0x9999, "0 is 10000");
    assert_eq!(r.pit.inb(0x43), 0xff);
}

#[test]
fn refresh_toggles_and_state_survives() {
    let mut r = rig();
    let a = r.pit.inb(0x61) & 0x10;
    r.to(18);
    assert_ne!(r.pit.inb(0x61) & 0x10, a);
    r.program(0, 2, 500);
    let s = r.pit.save();
    let mut q = rig();
    q.clock.advance(r.clock.now_ns());
    q.pit.load(&s).unwrap();
    assert_eq!(q.timer.deadline(), r.timer.deadline());
    assert!(q.wire.high() && q.wire.take_edges() == 1, "the line is as it was");
    q.to(2100);
    r.wire.take_edges();
    r.to(2100);
    assert_eq!(q.wire.take_edges(), r.wire.take_edges());
    assert_eq!(q.pit.save(), r.pit.save());
    r.pit.reset();
    assert_eq!(r.timer.deadline(), None);
}

#[test]
fn hammer() {
    let clock = FakeClock::new();
    let c = clock.clone();
    hammer_ports(
        8254,
        move || Pit::new(c.clone(), ManualTimer::new(), Wire::new()),
        &[0x40, 0x41, 0x42, 0x43, 0x61],
        |p, r| {
            let bits = r.u8(1..34);
            clock.advance(r.u64(..1 << bits));
            p.timer_expired(r.u32(..));
            p.speaker();
        },
    );
}
