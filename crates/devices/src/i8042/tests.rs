use super::*;
use crate::testing::{Events, Ports, Wire, hammer_ports};

struct Rig {
    c: I8042,
    kbd: Arc<Wire>,
    aux: Arc<Wire>,
    a20: Arc<Wire>,
    power: Arc<Events>,
}

fn rig() -> Rig {
    let (kbd, aux, a20, power) = (Wire::new(), Wire::new(), Wire::new(), Arc::new(Events::default()));
    Rig { c: I8042::new([kbd.clone(), aux.clone()], a20.clone(), power.clone()), kbd, aux, a20, power }
}

impl Rig {
    fn cmd(&mut self, v: u8) {
        self.c.outb(COMMAND, v);
    }
    fn config(&mut self, v: u8) {
        self.cmd(0x60);
        self.c.outb(DATA, v);
    }
    fn drain(&mut self) -> Vec<u8> {
        let mut v = Vec::new();
        while self.c.inb(COMMAND) & 1 != 0 {
            v.push(self.c.inb(DATA));
        }
        v
    }
    fn kbd(&mut self, bytes: &[u8]) -> Vec<u8> {
        bytes.iter().for_each(|&b| self.c.outb(DATA, b));
        self.drain()
    }
    fn mouse(&mut self, bytes: &[u8]) -> Vec<u8> {
        for &b in bytes {
            self.cmd(0xd4);
            self.c.outb(DATA, b);
        }
        self.drain()
    }
}

#[test]
fn controller_commands() {
    let mut r = rig();
    for (c, want) in [(0xaa, 0x55), (0xa9, 0), (0xab, 0), (0x20, 0x47), (0xc0, 0x80), (0xd0, 3)] {
        r.cmd(c);
        assert_eq!(r.c.inb(COMMAND), 0x1d, "full, system, command, not locked");
        assert_eq!(r.drain(), [want], "command {c:#x}");
    }
    r.cmd(0xa7);
    r.cmd(0xad);
    r.cmd(0x20);
    assert_eq!(r.drain(), [0x77]);
    r.cmd(0xa8);
    r.cmd(0xae);
    r.cmd(0x75);
    r.c.outb(DATA, 0x5a);
    r.cmd(0x35);
    assert_eq!(r.drain(), [0x5a], "RAM");
    r.cmd(0xd2);
    r.c.outb(DATA, 0x12);
    assert!(r.kbd.high());
    r.cmd(0xd3);
    r.c.outb(DATA, 0x34);
    assert_eq!(r.c.inb(DATA), 0x12);
    assert_eq!((r.kbd.high(), r.aux.high(), r.c.inb(COMMAND) & 0x21), (false, true, 0x21));
    assert_eq!((r.c.inb(DATA), r.c.inb(DATA)), (0x34, 0x34), "an empty buffer gives the last byte");
}

#[test]
fn reset_and_a20() {
    let mut r = rig();
    assert!(r.a20.high());
    r.cmd(0xdd);
    assert!(!r.a20.high());
    r.cmd(0xd0);
    assert_eq!(r.drain(), [1]);
    r.cmd(0xdf);
    assert!(r.a20.high());
    r.cmd(0xff);
    r.cmd(0xd1);
    r.c.outb(DATA, 1);
    assert!(!r.a20.high() && r.power.take().is_empty());
    r.cmd(0xfe);
    r.cmd(0xd1);
    r.c.outb(DATA, 2);
    assert_eq!(r.power.take(), [PowerEvent::Reset; 2]);
    assert!(r.a20.high());
}

#[test]
fn keyboard_commands() {
    let mut r = rig();
    r.config(0x07);
    assert_eq!(r.kbd(&[0xff]), [0xfa, 0xaa]);
    assert_eq!(r.kbd(&[0xf2]), [0xfa, 0xab, 0x83]);
    assert_eq!(r.kbd(&[0xee]), [0xee]);
    assert_eq!(r.kbd(&[0xed, 6]), [0xfa, 0xfa]);
    assert_eq!(r.c.leds(), 6);
    assert_eq!(r.kbd(&[0xf0, 0]), [0xfa, 0xfa, 2]);
    assert_eq!(r.kbd(&[0xf3, 0x20, 0xf3, 0x80]), [0xfa, 0xfa, 0xfa, 0xfe]);
    assert_eq!(r.kbd(&[0xfe]), [0xfa], "resend gives the last byte that was no resend");
    assert_eq!(r.kbd(&[0xed, 0xf4]), [0xfa, 0xfa], "a command in a parameter's place");
    assert_eq!(r.kbd(&[0x12]), [0xfe]);
    assert_eq!(r.kbd(&[0xf5]), [0xfa]);
    r.c.key(0x1e, true);
    assert!(r.drain().is_empty(), "disabled");
    r.kbd(&[0xf4]);
    // Under translation the identity and the set number come translated as well.
    r.config(0x47);
    assert_eq!(r.kbd(&[0xf2]), [0xfa, 0xab, 0x41]);
}

/// A key and what its press and release are in each set.
type Key = (u16, &'static [u8], &'static [u8], &'static [u8]);

#[test]
fn scan_codes_in_all_sets() {
    let keys: [Key; 5] = [
        (0x1e, &[0x1e, 0x9e], &[0x1c, 0xf0, 0x1c], &[0x1c, 0xf0, 0x1c]),
        (0xe01d, &[0xe0, 0x1d, 0xe0, 0x9d], &[0xe0, 0x14, 0xe0, 0xf0, 0x14], &[0x58, 0xf0, 0x58]),
        (0x41, &[0x41, 0xc1], &[0x83, 0xf0, 0x83], &[0x37, 0xf0, 0x37]),
        (
            0xe037,
            &[0xe0, 0x2a, 0xe0, 0x37, 0xe0, 0xb7, 0xe0, 0xaa],
            &[0xe0, 0x12, 0xe0, 0x7c, 0xe0, 0xf0, 0x7c, 0xe0, 0xf0, 0x12],
            &[0x57, 0xf0, 0x57],
        ),
        (
            0xe11d,
            &[0xe1, 0x1d, 0x45, 0xe1, 0x9d, 0xc5],
            &[0xe1, 0x14, 0x77, 0xe1, 0xf0, 0x14, 0xf0, 0x77],
            &[0x62, 0xf0, 0x62],
        ),
    ];
    let mut r = rig();
    for (key, one, two, three) in keys {
        for (set, want) in [(1, one), (2, two), (3, three)] {
            r.config(0x07);
            r.kbd(&[0xf0, set]);
            r.c.key(key, true);
            r.c.key(key, false);
            assert_eq!(r.drain(), want, "key {key:#x} set {set}");
        }
        r.kbd(&[0xf0, 2]);
        r.config(0x47);
        r.c.key(key, true);
        r.c.key(key, false);
        assert_eq!(r.drain(), one, "key {key:#x} translated");
    }
    r.config(0x07);
    r.kbd(&[0xf0, 3, 0xfb, 0x1c]);
    r.c.key(0x1e, true);
    r.c.key(0x1e, false);
    assert_eq!(r.drain(), [0x1c], "this key repeats only");
    r.kbd(&[0xf8]);
    r.c.key(0x1e, false);
    assert_eq!(r.drain(), [0xf0, 0x1c]);
}

#[test]
fn every_byte_is_an_interrupt_and_overruns_are_told() {
    let mut r = rig();
    r.c.key(0x1e, true);
    r.c.key(0x1e, false);
    assert_eq!(r.kbd.take_edges(), 1);
    r.c.inb(DATA);
    assert_eq!(r.kbd.take_edges(), 1);
    r.drain();
    r.config(0x46);
    r.c.key(0x1e, true);
    assert!(!r.kbd.high());
    r.cmd(0xad);
    r.drain();
    for _ in 0..40 {
        r.c.key(0x1e, true);
    }
    assert!(r.drain().is_empty(), "the keyboard's clock is off");
    r.cmd(0xae);
    let got = r.drain();
    assert_eq!((got.len(), got[16]), (17, 0xff), "the translated overrun code");
    for _ in 0..100 {
        r.cmd(0x20);
    }
    assert_eq!(r.drain().len(), 17);
}

#[test]
fn mouse_protocols() {
    let mut r = rig();
    assert_eq!(r.mouse(&[0xff]), [0xfa, 0xaa, 0]);
    assert!(!r.aux.high());
    r.c.mouse(5, 5, 0, 0);
    assert!(r.drain().is_empty(), "reporting is off");
    assert_eq!(r.mouse(&[0xf6, 0xf4]), [0xfa, 0xfa]);
    r.c.mouse(3, 4, 1, 1);
    assert_eq!(r.drain(), [0x29, 3, 0xfc]);
    r.c.mouse(-300, 0, 0, 1);
    assert_eq!(r.drain(), [0x19, 1, 0, 0x19, (-45i8) as u8, 0]);
    assert_eq!(r.mouse(&[0xe9]), [0xfa, 0x24, 2, 100]);
    assert_eq!(
        r.mouse(&[0xf3, 200, 0xf3, 100, 0xf3, 80, 0xf2]),
        [0xfa; 7].into_iter().chain([3]).collect::<Vec<_>>()
    );
    r.c.mouse(0, 0, -1, 0);
    assert_eq!(r.drain(), [8, 0, 0, 0xff]);
    r.mouse(&[0xf3, 200, 0xf3, 200, 0xf3, 80]);
    assert_eq!(r.mouse(&[0xf2]), [0xfa, 4]);
    r.c.mouse(0, 0, 1, 0x18);
    assert_eq!(r.drain(), [8, 0, 0, 0x31]);
    r.mouse(&[0xe7]);
    r.c.mouse(5, 0, 0, 0x18);
    assert_eq!(r.drain()[1], 9, "scaling 2:1");
    assert_eq!(r.mouse(&[0xf0]), [0xfa]);
    r.c.mouse(7, 0, 0, 0);
    assert!(r.drain().is_empty());
    assert_eq!(r.mouse(&[0xeb]), [0xfa, 8, 7, 0, 0]);
    assert_eq!(r.mouse(&[0xee, 0x55, 0xec]), [0xfa, 0x55, 0xfa]);
    assert_eq!(r.mouse(&[0x55]), [0xfe]);
}

#[test]
fn movement_that_does_not_fit_is_summed() {
    let mut r = rig();
    r.mouse(&[0xf4]);
    for _ in 0..1000 {
        r.c.mouse(10, 0, 0, 0);
    }
    let sum: u32 = r.drain().chunks(3).map(|p| u32::from(p[1])).sum();
    assert_eq!(sum, 10_000);
    r.c.mouse(i32::MIN, i32::MIN, i32::MAX, 0xff);
    r.c.mouse(i32::MIN, i32::MAX, i32::MAX, 0);
}

#[test]
fn hammer() {
    hammer_ports(
        8042,
        || I8042::new([Wire::new(), Wire::new()], Wire::new(), Arc::new(Events::default())),
        &[0x60, 0x64],
        |c, r| match r.u8(..4) {
            0 => c.key(r.u16(..), r.bool()),
            1 => c.mouse(r.i32(..), r.i32(-300..300), r.i32(-9..9), r.u8(..)),
            _ => {
                c.outb(COMMAND, *r.choice(&[0xd4, 0xd1, 0x60, 0xa8, 0xae]).unwrap_or(&0));
                c.outb(DATA, *r.choice(&[0xf3, 0xf4, 0xff, 0xf2, 200, 100, 80, 0x47]).unwrap_or(&0));
            }
        },
    );
}
