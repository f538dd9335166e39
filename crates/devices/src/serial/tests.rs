use super::*;
use crate::testing::{Ports, Wire, hammer_ports};
use ringfort_bus::{FakeClock, ManualTimer, lock};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

#[derive(Clone, Default)]
struct Out(Arc<Mutex<Taken>>);

/// Bytes taken, how many more will be, breaks.
type Taken = (Vec<u8>, usize, Vec<bool>);

impl SerialSink for Out {
    fn write(&mut self, bytes: &[u8]) -> usize {
        let mut o = lock(&self.0);
        let n = bytes.len().min(o.1);
        o.1 -= n;
        o.0.extend_from_slice(&bytes[..n]);
        n
    }
    fn set_break(&mut self, on: bool) {
        lock(&self.0).2.push(on);
    }
}

struct Rig {
    s: Serial,
    out: Out,
    wire: Arc<Wire>,
    clock: Arc<FakeClock>,
    timer: Arc<ManualTimer>,
    room: Arc<AtomicUsize>,
}

fn rig() -> Rig {
    let (out, wire, clock, timer) = (Out::default(), Wire::new(), FakeClock::new(), ManualTimer::new());
    lock(&out.0).1 = usize::MAX;
    let room = Arc::new(AtomicUsize::new(0));
    let r = room.clone();
    let s =
        Serial::new(0, 0x3f8, wire.clone(), Box::new(out.clone()), clock.clone(), timer.clone(), move || {
            r.fetch_add(1, Ordering::SeqCst);
        });
    Rig { s, out, wire, clock, timer, room }
}

impl Rig {
    fn w(&mut self, reg: u16, v: u8) {
        self.s.outb(0x3f8 + reg, v);
    }
    fn r(&mut self, reg: u16) -> u8 {
        self.s.inb(0x3f8 + reg)
    }
}

#[test]
fn registers_after_reset() {
    let mut r = rig();
    assert_eq!([r.r(1), r.r(2), r.r(3), r.r(4), r.r(5), r.r(6)], [0, 1, 0, 0, 0x60, 0xb0]);
    r.w(7, 0x5a);
    assert_eq!(r.r(7), 0x5a);
    r.w(1, 0xff);
    assert_eq!(r.r(1), 15);
    r.w(3, 0x83);
    assert_eq!((r.r(0), r.r(1)), (12, 0));
    r.w(0, 1);
    r.w(1, 2);
    assert_eq!((r.r(0), r.r(1)), (1, 2));
    r.w(3, 3);
    assert_eq!(r.r(1), 15);
    r.s.reset();
    assert_eq!(r.r(1), 0);
}

#[test]
fn transmit_and_its_interrupt() {
    let mut r = rig();
    r.w(4, 8);
    r.w(1, 2);
    assert_eq!(r.wire.take_edges(), 1, "enabling reports an empty register");
    assert_eq!((r.r(2), r.r(2)), (2, 1), "reading IIR clears it");
    assert!(!r.wire.high());
    r.w(0, b'a');
    r.w(0, b'b');
    assert_eq!(r.wire.take_edges(), 2, "each byte is an edge");
    assert_eq!(lock(&r.out.0).0, b"ab");
    r.w(4, 0);
    assert!(!r.wire.high(), "OUT2 gates the line");
}

#[test]
fn a_slow_sink_holds_the_transmitter() {
    let mut r = rig();
    lock(&r.out.0).1 = 1;
    r.w(2, 1);
    r.w(4, 8);
    r.w(1, 2);
    r.r(2);
    for b in b"abc" {
        r.w(0, *b);
    }
    assert_eq!(r.r(5) & 0x60, 0);
    assert!(!r.wire.high() && !r.s.is_drained());
    lock(&r.out.0).1 = 1;
    r.s.transmit_ready();
    assert_eq!(r.r(5) & 0x60, 0);
    lock(&r.out.0).1 = 100;
    r.s.transmit_ready();
    assert_eq!(r.r(5) & 0x60, 0x60);
    assert!(r.wire.high());
    assert_eq!(lock(&r.out.0).0, b"abc");
    lock(&r.out.0).1 = 0;
    for b in 0..40 {
        r.w(0, b);
    }
    lock(&r.out.0).1 = 100;
    r.s.transmit_ready();
    assert_eq!(lock(&r.out.0).0.len(), 3 + 16);
}

#[test]
fn receive_without_fifo() {
    let mut r = rig();
    r.w(4, 8);
    r.w(1, 1);
    assert_eq!(r.s.receive(b"xy"), 1);
    assert_eq!((r.r(2), r.r(5) & 1), (4, 1));
    assert_eq!(r.s.receive_room(), 0);
    assert_eq!(r.r(0), b'x');
    assert_eq!(r.room.load(Ordering::SeqCst), 1);
    assert_eq!(r.r(2), 1);
    assert!(!r.wire.high());
}

#[test]
fn receive_fifo_triggers_and_times_out() {
    let mut r = rig();
    r.w(3, 3);
    r.w(4, 8);
    r.w(1, 1);
    r.w(2, 0x81);
    assert_eq!(r.s.receive(b"1234567"), 7);
    assert_eq!(r.r(2), 0xc1, "below the trigger");
    // 4 characters of 10 bits at 9600 bit/s.
    assert_eq!(r.timer.deadline(), Some(4 * 10 * 12 * 1_000_000_000 / 115_200));
    r.s.timer_expired(0);
    assert_eq!(r.r(2), 0xc1, "too early");
    r.clock.advance(5_000_000);
    r.s.timer_expired(0);
    assert_eq!(r.r(2), 0xcc);
    assert_eq!(r.r(0), b'1');
    assert_eq!(r.r(2), 0xc1, "reading starts it anew");
    assert_eq!(r.s.receive(b"abcdefghijklmn"), 10);
    assert_eq!(r.r(2), 0xc4);
    let got: Vec<u8> = (0..16).map(|_| r.r(0)).collect();
    assert_eq!(got, b"234567abcdefghij");
    assert_eq!(r.room.load(Ordering::SeqCst), 1, "told once, on the first read of a full FIFO");
    assert_eq!(r.timer.deadline(), None);
    r.s.receive(b"zz");
    r.w(2, 3);
    assert_eq!(r.r(5) & 1, 0, "cleared");
}

#[test]
fn loopback_modem_lines_and_overrun() {
    let mut r = rig();
    r.w(4, 0x1a);
    assert_eq!(r.r(6) & 0xf0, 0x90, "the classic presence test");
    r.r(6);
    r.w(1, 15);
    r.w(3, 3);
    r.r(2);
    r.w(0, 0x41);
    r.w(0, 0x42);
    assert_eq!(r.r(2), 6);
    assert_eq!(r.r(5) & 3, 3);
    assert_eq!(r.r(2), 4);
    assert_eq!(r.r(0), 0x42, "the newer byte stays");
    assert_eq!((r.r(2), r.r(2)), (2, 1));
    assert!(lock(&r.out.0).0.is_empty(), "nothing leaves");
    assert_eq!(r.s.receive(b"q"), 0, "and nothing comes in");
    r.w(4, 0x1e);
    assert_eq!(r.r(2), 1, "ring on is no event");
    r.w(4, 0x1a);
    assert_eq!((r.r(2), r.r(6), r.r(2)), (0, 0x94, 1));
    r.w(4, 0x0a);
    assert!(r.room.load(Ordering::SeqCst) > 0);
    r.w(2, 1);
    r.w(4, 0x1a);
    for b in 0..17 {
        r.w(0, b);
    }
    assert_eq!(r.r(5) & 2, 2);
    assert_eq!((0..16).map(|_| r.r(0)).collect::<Vec<_>>(), (0..16).collect::<Vec<_>>());
}

#[test]
fn breaks_and_hang_up() {
    let mut r = rig();
    r.w(2, 1);
    r.w(4, 8);
    r.w(1, 12);
    r.s.receive(b"a");
    assert!(r.s.receive_break());
    r.s.receive(b"b");
    assert_eq!(r.r(5), 0xe1, "an error further back");
    assert!(!r.wire.high());
    r.r(0);
    assert!(r.wire.high());
    assert_eq!((r.r(2), r.r(5), r.r(5)), (0xc6, 0xf9, 0x61));
    assert_eq!((r.r(0), r.r(0)), (0, b'b'));
    r.s.set_connected(false);
    assert_eq!((r.r(2), r.r(6)), (0xc0, 0x0b));
    r.w(3, 0x43);
    r.w(3, 3);
    assert_eq!(lock(&r.out.0).2, [true, false]);
}

#[test]
fn unsent_and_unread_bytes_survive() {
    let mut r = rig();
    lock(&r.out.0).1 = 0;
    r.w(2, 0x41);
    r.w(4, 8);
    r.w(1, 3);
    for b in b"out" {
        r.w(0, *b);
    }
    r.s.receive(b"in");
    let saved = r.s.save();
    let mut q = rig();
    lock(&q.out.0).1 = 0;
    q.s.load(&saved).unwrap();
    assert_eq!(q.s.save(), saved);
    assert_eq!(q.timer.deadline(), r.timer.deadline());
    lock(&q.out.0).1 = 10;
    q.s.transmit_ready();
    assert_eq!(lock(&q.out.0).0, b"out");
    assert!(q.wire.high());
    assert_eq!((q.r(0), q.r(0), q.r(2) & 15), (b'i', b'n', 2));
    // A sink that has room gets them afterwards as well: during the load nobody would see the interrupt that says so.
    let mut q = rig();
    q.s.load(&saved).unwrap();
    assert!(lock(&q.out.0).0.is_empty() && !q.s.is_drained());
    q.s.transmit_ready();
    assert_eq!(lock(&q.out.0).0, b"out");
    crate::testing::refuses_bad_state(&mut r.s);
}

#[test]
fn hammer() {
    let ports: Vec<u16> = (0x3f8..0x400).collect();
    let clock = FakeClock::new();
    let c = clock.clone();
    hammer_ports(
        16550,
        move || {
            let out = Out::default();
            lock(&out.0).1 = 200;
            Serial::new(0, 0x3f8, Wire::new(), Box::new(out), c.clone(), ManualTimer::new(), || {})
        },
        &ports,
        |s, r| match r.u8(..5) {
            0 => {
                s.receive(&[r.u8(..); 20][..r.usize(..20)]);
            }
            1 => s.transmit_ready(),
            2 => {
                clock.advance(r.u64(..10_000_000));
                s.timer_expired(0);
            }
            3 => s.set_connected(r.bool()),
            _ => {
                s.receive_break();
            }
        },
    );
}
