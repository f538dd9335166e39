use super::*;
use crate::rng::Rng;
use crate::testing::Ring;
use ringfort_memory::GuestMemory;
use std::sync::Condvar;
use std::time::Duration;

#[derive(Default)]
struct Line {
    high: Mutex<bool>,
    change: Condvar,
}

impl IrqLine for Line {
    fn set(&self, high: bool) {
        *lock(&self.high) = high;
        self.change.notify_all();
    }
}

impl Line {
    fn wait_high(&self) {
        let (_level, timeout) =
            self.change.wait_timeout_while(lock(&self.high), Duration::from_secs(30), |h| !*h).unwrap();
        assert!(!timeout.timed_out(), "no interrupt");
    }
}

fn machine(memory: &GuestMemory) -> (VirtioMmio, Arc<Line>) {
    let line = Arc::new(Line::default());
    let ram = Arc::new(RamMap::new(memory));
    (VirtioMmio::new(Arc::new(Rng::new()), ram, line.clone()).unwrap(), line)
}

fn get(m: &VirtioMmio, at: u64) -> u32 {
    let mut b = [0; 4];
    m.read(at, &mut b);
    u32::from_le_bytes(b)
}

fn set(m: &VirtioMmio, at: u64, value: u32) {
    m.write(at, &value.to_le_bytes());
}

fn drive(m: &VirtioMmio, memory: &GuestMemory) -> Ring {
    set(m, STATUS, 0);
    set(m, STATUS, 3);
    set(m, DEVICE_FEATURES_SEL, 1);
    assert_eq!(get(m, DEVICE_FEATURES), 1);
    set(m, DRIVER_FEATURES_SEL, 1);
    set(m, DRIVER_FEATURES, 1);
    set(m, STATUS, 0xb);
    assert_eq!(get(m, STATUS), 0xb);
    set(m, QUEUE_SEL, 0);
    assert_eq!((get(m, QUEUE_SIZE_MAX), get(m, QUEUE_READY)), (64, 0));
    let ring = Ring::new(memory, 0x1000, 16);
    set(m, QUEUE_SIZE, 16);
    for (at, v) in [(0x80, ring.layout.desc), (0x90, ring.layout.avail), (0xa0, ring.layout.used)] {
        set(m, at, v as u32);
        set(m, at + 4, (v >> 32) as u32);
    }
    set(m, QUEUE_READY, 1);
    set(m, STATUS, 0xf);
    assert_eq!((get(m, STATUS), get(m, QUEUE_READY)), (0xf, 1));
    ring
}

#[test]
fn a_driver_gets_bytes_and_acknowledges_the_interrupt() {
    let memory = ringfort_memory::allocate(&[(0, 1 << 20)]).unwrap();
    let (m, line) = machine(&memory);
    assert_eq!((get(&m, 0), get(&m, 4), get(&m, 8)), (0x7472_6976, 2, 4));
    let mut ring = drive(&m, &memory);
    for n in 0..3 {
        ring.add(&[(0x8000, 32, true)]);
        set(&m, QUEUE_NOTIFY, 0);
        line.wait_high();
        assert_eq!(get(&m, INTERRUPT_STATUS), 1);
        assert_eq!(ring.take_used(), Some((n, 32)));
        set(&m, INTERRUPT_ACK, 1);
        assert!(!*lock(&line.high));
    }
}

#[test]
fn odd_accesses_do_nothing() {
    let memory = ringfort_memory::allocate(&[(0, 1 << 20)]).unwrap();
    let (m, _) = machine(&memory);
    let mut two = [0xff; 2];
    m.read(0, &mut two);
    assert_eq!(two, [0; 2]);
    m.write(STATUS, &[3]);
    m.write(STATUS + 2, &[3; 4]);
    assert_eq!(get(&m, STATUS), 0);
    set(&m, QUEUE_SEL, 0x1_0000);
    assert_eq!(get(&m, QUEUE_SIZE_MAX), 0);
    set(&m, QUEUE_NOTIFY, u32::MAX);
    // Shared memory regions do not exist; configuration space is empty.
    assert_eq!((get(&m, 0xb0), get(&m, 0xbc), get(&m, CONFIG)), (u32::MAX, u32::MAX, 0));
    // A queue can be unmade until the driver is ready.
    set(&m, QUEUE_SEL, 0);
    set(&m, QUEUE_READY, 1);
    set(&m, QUEUE_READY, 0);
    assert_eq!(get(&m, QUEUE_READY), 0);
}

#[test]
fn state_moves_to_another_machine() {
    let memory = ringfort_memory::allocate(&[(0, 1 << 20)]).unwrap();
    let (m, line) = machine(&memory);
    let mut ring = drive(&m, &memory);
    ring.add(&[(0x8000, 32, true)]);
    set(&m, QUEUE_NOTIFY, 0);
    line.wait_high();
    m.core().pause();
    ring.add(&[(0x8000, 32, true)]);
    let state = m.save();
    drop(m);
    let (other, line) = machine(&memory);
    other.load(&state).unwrap();
    assert!(*lock(&line.high), "the level is part of the state");
    assert_eq!(other.save(), state);
    set(&other, INTERRUPT_ACK, 3);
    other.core().resume();
    line.wait_high();
    ring.take_used().unwrap();
    assert_eq!(ring.take_used(), Some((1, 32)));
    other.reset();
    assert_eq!((get(&other, STATUS), *lock(&line.high)), (0, false));
}
