use super::tests::{BASE, Machine};
use super::*;
use crate::console::Console;
use crate::rng::Rng;
use ringfort_devices::pci::{command, reg};
use ringfort_devices::serial::SerialSink;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::os::fd::BorrowedFd;

/// What an engine's host would have.
#[derive(Default)]
struct Host(Mutex<BTreeMap<u64, File>>);

impl DoorbellSink for Host {
    fn connect(&self, address: u64, bell: BorrowedFd<'_>) -> bool {
        let bell = File::from(bell.try_clone_to_owned().unwrap());
        assert!(lock(&self.0).insert(address, bell).is_none(), "connected twice");
        true
    }
    fn disconnect(&self, address: u64, _bell: BorrowedFd<'_>) {
        assert!(lock(&self.0).remove(&address).is_some(), "not connected");
    }
}

impl Host {
    fn connected(&self) -> Vec<u64> {
        lock(&self.0).keys().copied().collect()
    }
    /// A store to the address; false if nothing is connected there.
    fn ring(&self, address: u64) -> bool {
        lock(&self.0).get(&address).is_some_and(|mut f| f.write_all(&1u64.to_ne_bytes()).is_ok())
    }
}

/// Takes everything and keeps nothing.
struct Silent;

impl SerialSink for Silent {
    fn write(&mut self, bytes: &[u8]) -> usize {
        bytes.len()
    }
}

const BELL: u64 = BASE + NOTIFY_AT;

fn machine() -> (Machine, Arc<Host>) {
    let host = Arc::new(Host::default());
    let memory = ringfort_memory::allocate(&[(0, 1 << 20)]).unwrap();
    let m = Machine::with_doorbells(Arc::new(Rng::new()), memory, host.clone());
    m.map();
    (m, host)
}

#[test]
fn doorbells_are_connected_while_the_driver_uses_the_device() {
    let (m, host) = machine();
    assert!(host.connected().is_empty(), "nobody has begun");
    let mut ring = m.drive(true);
    assert_eq!(host.connected(), [BELL]);
    for n in 1..4 {
        ring.add(&[(0x8000, 32, true)]);
        assert!(host.ring(BELL));
        m.messages.wait(n);
        assert_eq!(ring.take_used(), Some((n as u32 - 1, 32)));
    }
    // The other way is open as well: the doorbell through configuration space, or a host that has lost it.
    ring.add(&[(0x8000, 32, true)]);
    m.write(NOTIFY_AT, 2, 0);
    m.messages.wait(4);
    m.write(0x14, 1, 0);
    assert!(host.connected().is_empty(), "reset by the driver");
    m.drive(true);
    m.bus.reset();
    assert!(host.connected().is_empty(), "reset of the machine");
    m.map();
    m.drive(true);
    assert_eq!(host.connected(), [BELL]);
    m.bus.remove(super::tests::AT);
    assert!(host.connected().is_empty(), "unplugged");
}

#[test]
fn a_console_is_served_by_the_vcpu_that_rings() {
    let host = Arc::new(Host::default());
    let memory = ringfort_memory::allocate(&[(0, 1 << 20)]).unwrap();
    let m = Machine::with_doorbells(
        Arc::new(Console::new(Box::new(Silent), Box::new(|| {}))),
        memory,
        host.clone(),
    );
    m.map();
    m.drive(true);
    assert!(host.connected().is_empty());
}

#[test]
fn doorbells_follow_the_bar() {
    let (m, host) = machine();
    m.drive(true);
    m.set_config(reg::BAR0 + 20, 9);
    assert_eq!(host.connected(), [0x9_0000_0000 + NOTIFY_AT]);
    m.set_config(reg::COMMAND, u32::from(command::BUS_MASTER));
    assert!(host.connected().is_empty(), "decoding is off");
    m.map();
    assert_eq!(host.connected(), [BELL]);
}

#[test]
fn doorbells_of_a_restored_device_are_connected() {
    let (m, host) = machine();
    m.drive(true);
    m.function.core().pause();
    let saved = m.bus.save();
    let (other, its_host) = machine();
    other.bus.load(&saved).unwrap();
    assert_eq!(its_host.connected(), host.connected());
    assert_eq!(its_host.connected(), [BELL]);
    // Back to a device that nobody drives.
    let (idle, _) = machine();
    other.bus.load(&idle.bus.save()).unwrap();
    assert!(its_host.connected().is_empty());
}
