//! What the devices' tests share.

use ringfort_bus::{Device, IrqLine, MsiMessage, MsiSink, PioDevice, lock};
use std::sync::{Arc, Mutex};

/// A line that notes its level and counts rises.
#[derive(Default)]
pub(crate) struct Wire(Mutex<(bool, usize)>);

impl Wire {
    pub(crate) fn new() -> Arc<Wire> {
        Arc::default()
    }
    pub(crate) fn high(&self) -> bool {
        lock(&self.0).0
    }
    pub(crate) fn take_edges(&self) -> usize {
        std::mem::take(&mut lock(&self.0).1)
    }
}

impl IrqLine for Wire {
    fn set(&self, high: bool) {
        let mut s = lock(&self.0);
        if high && !s.0 {
            s.1 += 1;
        }
        s.0 = high;
    }
}

/// Keeps messages.
#[derive(Default)]
pub(crate) struct Messages(Mutex<Vec<MsiMessage>>);

impl Messages {
    pub(crate) fn take(&self) -> Vec<MsiMessage> {
        std::mem::take(&mut *lock(&self.0))
    }
}

impl MsiSink for Messages {
    fn send(&self, msg: MsiMessage) {
        lock(&self.0).push(msg);
    }
}

/// Port access in one line.
pub(crate) trait Ports: PioDevice {
    fn inb(&mut self, port: u16) -> u8 {
        let mut d = [0];
        self.pio_read(port, &mut d);
        d[0]
    }
    fn outb(&mut self, port: u16, v: u8) {
        self.pio_write(port, &[v]);
    }
    fn inw(&mut self, port: u16) -> u16 {
        let mut d = [0; 2];
        self.pio_read(port, &mut d);
        u16::from_le_bytes(d)
    }
    fn outw(&mut self, port: u16, v: u16) {
        self.pio_write(port, &v.to_le_bytes());
    }
    fn inl(&mut self, port: u16) -> u32 {
        let mut d = [0; 4];
        self.pio_read(port, &mut d);
        u32::from_le_bytes(d)
    }
    fn outl(&mut self, port: u16, v: u32) {
        self.pio_write(port, &v.to_le_bytes());
    }
}

impl<T: PioDevice + ?Sized> Ports for T {}

/// Random port accesses of every size, with a save, load and comparison now and then: the loaded twin must save
/// the same and read the same at every port.
pub(crate) fn hammer_ports<D: Device + PioDevice>(
    seed: u64,
    make: impl Fn() -> D,
    ports: &[u16],
    mut also: impl FnMut(&mut D, &mut fastrand::Rng),
) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut d = make();
    for n in 1..20_001 {
        let port = ports[rng.usize(..ports.len())];
        let len = [1, 1, 1, 2, 4][rng.usize(..5)];
        let mut data = [rng.u8(..), rng.u8(..), rng.u8(..), rng.u8(..)];
        match rng.u8(..4) {
            0 => d.pio_read(port, &mut data[..len]),
            1 => also(&mut d, &mut rng),
            _ => d.pio_write(port, &data[..len]),
        }
        if n % 500 == 0 {
            let mut twin = make();
            let saved = d.save();
            twin.load(&saved).unwrap();
            assert_eq!(twin.save(), saved, "{} after {n}", d.kind());
            for &p in ports {
                assert_eq!(twin.inb(p), d.inb(p), "{} port {p:#x} after {n}", d.kind());
            }
            assert_eq!(twin.save(), d.save());
            d = twin;
        }
        if n % 7000 == 0 {
            d.reset();
        }
    }
    refuses_bad_state(&mut d);
}

/// Cut, foreign and newer sections are refused and change nothing; damaged ones never panic.
pub(crate) fn refuses_bad_state<D: Device>(d: &mut D) {
    let good = d.save();
    let foreign = ringfort_bus::Section { kind: "other".into(), ..good.clone() };
    let newer = ringfort_bus::Section { version: 99, ..good.clone() };
    let cut = ringfort_bus::Section { body: good.body[..good.body.len() / 2].to_vec(), ..good.clone() };
    for bad in [foreign, newer, cut] {
        assert!(d.load(&bad).is_err());
        assert_eq!(d.save(), good);
    }
    let mut rng = fastrand::Rng::with_seed(1);
    for _ in 0..300 {
        let mut s = good.clone();
        for _ in 0..rng.usize(1..4) {
            let at = rng.usize(..s.body.len());
            s.body[at] = rng.u8(..);
        }
        let before = d.save();
        if d.load(&s).is_err() {
            assert_eq!(d.save(), before, "a refused load changed something");
        }
    }
    d.load(&good).unwrap();
    assert_eq!(d.save(), good);
}

/// Keeps power events.
#[derive(Default)]
pub(crate) struct Events(Mutex<Vec<crate::power::PowerEvent>>);

impl Events {
    pub(crate) fn take(&self) -> Vec<crate::power::PowerEvent> {
        std::mem::take(&mut *lock(&self.0))
    }
}

impl crate::power::PowerSink for Events {
    fn event(&self, event: crate::power::PowerEvent) {
        lock(&self.0).push(event);
    }
}
