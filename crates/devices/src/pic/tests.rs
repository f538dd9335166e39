use super::*;
use crate::testing::{Ports, Wire, hammer_ports};

fn pic() -> (Pic, Arc<Wire>) {
    let w = Wire::new();
    let mut p = Pic::new(w.clone());
    init(&mut p, 1);
    (p, w)
}

fn init(p: &mut Pic, icw4: u8) {
    for (port, base, icw3) in [(0x20, 0x20, 4), (0xa0, 0x28, 2)] {
        p.outb(port, 0x11);
        p.outb(port + 1, base);
        p.outb(port + 1, icw3);
        p.outb(port + 1, icw4);
    }
}

fn pulse(p: &mut Pic, n: u8) {
    p.set_irq(n, true);
    p.set_irq(n, false);
}

#[test]
fn vectors_and_priorities() {
    let (mut p, w) = pic();
    pulse(&mut p, 4);
    assert!(w.high());
    pulse(&mut p, 1);
    pulse(&mut p, 12);
    assert_eq!(p.acknowledge(), 0x21, "1 before 8..15 before 4");
    assert!(!w.high(), "lower ones wait for the EOI");
    p.outb(0x20, 0x20);
    assert_eq!(p.acknowledge(), 0x2c);
    pulse(&mut p, 9);
    assert!(!w.high(), "the cascade input itself is in service");
    p.outb(0xa0, 0x20);
    p.outb(0x20, 0x20);
    assert_eq!(p.acknowledge(), 0x29);
    pulse(&mut p, 0);
    assert_eq!(p.acknowledge(), 0x20, "nested");
    p.outb(0x20, 0x60);
    p.outb(0xa0, 0x61);
    p.outb(0x20, 0x62);
    assert_eq!(p.acknowledge(), 0x24);
    p.outb(0x20, 0x20);
    assert!(!w.high());
}

#[test]
fn masks_and_register_reads() {
    let (mut p, w) = pic();
    p.outb(0x21, 0xfe);
    p.outb(0xa1, 0xff);
    pulse(&mut p, 3);
    pulse(&mut p, 8);
    assert!(!w.high());
    assert_eq!((p.inb(0x21), p.inb(0xa1), p.inb(0x20), p.inb(0xa0)), (0xfe, 0xff, 8, 1));
    p.outb(0x21, 0xf6);
    assert_eq!(p.acknowledge(), 0x23);
    p.outb(0x20, 0x0b);
    assert_eq!(p.inb(0x20), 8);
    p.outb(0x20, 0x0a);
    assert_eq!(p.inb(0x20), 0);
    assert_eq!(p.inw(0x20), 0xf600, "a word is two bytes");
}

#[test]
fn level_inputs_ask_until_released() {
    let (mut p, w) = pic();
    p.outb(0x4d0, 0xff);
    p.outb(0x4d1, 0xff);
    assert_eq!((p.inb(0x4d0), p.inb(0x4d1)), (0xf8, 0xde));
    p.set_irq(11, true);
    assert_eq!(p.acknowledge(), 0x2b);
    p.outb(0xa0, 0x20);
    p.outb(0x20, 0x20);
    assert!(w.high(), "still asserted");
    p.set_irq(11, false);
    // The master has latched the slave's request: the slave answers with its spurious vector.
    assert_eq!(p.acknowledge(), 0x2f);
    p.outb(0x20, 0x0b);
    p.outb(0xa0, 0x0b);
    assert_eq!((p.inb(0x20), p.inb(0xa0)), (4, 0), "only the master has something in service");
    p.outb(0x20, 0x20);
    p.set_irq(5, true);
    p.set_irq(5, false);
    assert!(!w.high());
    assert_eq!(p.acknowledge(), 0x27);
    assert_eq!(p.inb(0x20), 0);
}

#[test]
fn an_edge_counts_once() {
    let (mut p, w) = pic();
    p.set_irq(3, true);
    assert_eq!(p.acknowledge(), 0x23);
    p.outb(0x20, 0x20);
    p.set_irq(3, true);
    assert!(!w.high());
    p.set_irq(3, false);
    p.set_irq(3, true);
    assert!(w.high());
    p.outb(0x20, 0x11);
    assert!(!w.high(), "ICW1 forgets edges");
}

#[test]
fn automatic_eoi_and_rotation() {
    let (mut p, w) = pic();
    init(&mut p, 3);
    p.outb(0x20, 0x80);
    for _ in 0..2 {
        pulse(&mut p, 3);
        pulse(&mut p, 4);
        assert_eq!([p.acknowledge(), p.acknowledge()], [0x23, 0x24]);
        assert!(!w.high());
    }
    pulse(&mut p, 4);
    pulse(&mut p, 5);
    assert_eq!([p.acknowledge(), p.acknowledge()], [0x25, 0x24], "4 was served last: lowest");
    pulse(&mut p, 8);
    pulse(&mut p, 9);
    assert_eq!([p.acknowledge(), p.acknowledge()], [0x28, 0x29]);
    assert!(!w.high());
    let (mut p, _) = pic();
    pulse(&mut p, 6);
    p.acknowledge();
    p.outb(0x20, 0xa0);
    pulse(&mut p, 6);
    pulse(&mut p, 7);
    assert_eq!(p.acknowledge(), 0x27, "rotate on non-specific EOI");
    p.outb(0x20, 0xe7);
    p.outb(0x20, 0xc4);
    pulse(&mut p, 5);
    assert_eq!(p.acknowledge(), 0x25, "set priority: 5 is first");
}

#[test]
fn special_mask_and_special_fully_nested() {
    let (mut p, w) = pic();
    pulse(&mut p, 1);
    p.acknowledge();
    pulse(&mut p, 6);
    assert!(!w.high());
    p.outb(0x21, 2);
    assert!(!w.high());
    p.outb(0x20, 0x68);
    assert_eq!(p.acknowledge(), 0x26);
    p.outb(0x20, 0x48);
    let (mut p, w) = pic();
    init(&mut p, 0x11);
    pulse(&mut p, 12);
    p.acknowledge();
    pulse(&mut p, 9);
    assert!(w.high());
    assert_eq!(p.acknowledge(), 0x29);
    pulse(&mut p, 14);
    assert!(!w.high());
}

#[test]
fn poll_mode() {
    let (mut p, w) = pic();
    p.outb(0x20, 0x0c);
    assert_eq!(p.inb(0x20), 7);
    pulse(&mut p, 10);
    p.outb(0xa0, 0x0c);
    assert_eq!(p.inb(0xa0), 0x82);
    assert!(!w.high());
    p.outb(0xa0, 0x0b);
    assert_eq!(p.inb(0xa0), 4);
    pulse(&mut p, 5);
    p.outb(0x20, 0x0c);
    assert_eq!(p.inb(0x21), 0x85);
    p.outb(0x20, 0x0b);
    assert_eq!(p.inb(0x20), 0x20);
}

#[test]
fn short_initialisation() {
    let (mut p, _) = pic();
    p.outb(0x20, 0x12);
    p.outb(0x21, 0x47);
    p.outb(0x21, 0xfb);
    assert_eq!(p.inb(0x21), 0xfb, "single, no ICW4: the second word is the mask");
    p.outb(0x21, 0);
    pulse(&mut p, 1);
    assert_eq!(p.acknowledge(), 0x41);
}

#[test]
fn hammer() {
    hammer_ports(
        8259,
        || Pic::new(Wire::new()),
        &[0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1],
        |p, r| {
            if r.bool() {
                p.set_irq(r.u8(..20), r.bool());
            } else {
                p.acknowledge();
            }
        },
    );
}
