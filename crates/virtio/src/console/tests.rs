use super::*;
use crate::status;
use crate::testing::{BUFFERS, Rig};
use std::sync::atomic::{AtomicU32, Ordering};

type Output = Arc<Mutex<Vec<u8>>>;

/// Takes what fits into a budget.
struct Sink(Output, Arc<AtomicU32>);

impl SerialSink for Sink {
    fn write(&mut self, bytes: &[u8]) -> usize {
        let n = bytes.len().min(self.1.load(Ordering::SeqCst) as usize);
        self.1.fetch_sub(n as u32, Ordering::SeqCst);
        lock(&self.0).extend_from_slice(&bytes[..n]);
        n
    }
}

#[test]
fn a_sink_without_room_holds_output_back() {
    let (output, budget) = (Output::default(), Arc::new(AtomicU32::new(3)));
    let sink = Sink(output.clone(), budget.clone());
    let device = Arc::new(Console::new(Box::new(sink), Box::new(|| {})));
    let mut rig = Rig::new(device.clone(), 0);
    rig.write(BUFFERS, b"hello world");
    rig.send(TX, &[(BUFFERS, 5, false)]);
    rig.send(TX, &[(BUFFERS + 5, 6, false)]);
    rig.core.pause();
    let state = rig.core.save();
    // The state may have been taken before the thread came to it: what counts is that nothing is lost or doubled.
    rig.core.load(&state).unwrap();
    rig.core.resume();
    budget.fetch_add(4, Ordering::SeqCst);
    device.transmit_ready();
    assert_eq!(rig.used(TX).0, 0);
    budget.fetch_add(100, Ordering::SeqCst);
    device.transmit_ready();
    assert_eq!(rig.used(TX).0, 1);
    assert_eq!(*lock(&output), b"hello world");
}

fn console() -> (Arc<Console>, Output, Arc<AtomicU32>) {
    let output = Output::default();
    let room = Arc::new(AtomicU32::new(0));
    let (sink, count) = (output.clone(), room.clone());
    let c = Console::new(
        Box::new(Sink(sink, Arc::new(AtomicU32::new(1 << 30)))),
        Box::new(move || _ = count.fetch_add(1, Ordering::SeqCst)),
    );
    (Arc::new(c), output, room)
}

#[test]
fn output_of_any_cut_arrives_whole_and_in_order() {
    let (device, output, _) = console();
    let mut rig = Rig::new(device, F_SIZE);
    let text: Vec<u8> = (0..20_000u32).map(|i| (i % 251) as u8).collect();
    rig.write(BUFFERS, &text);
    rig.send(TX, &[(BUFFERS, 1, false), (BUFFERS + 1, 9_000, false), (BUFFERS + 9_001, 10_999, false)]);
    assert_eq!(rig.used(TX).1, 0);
    assert!(*lock(&output) == text);
}

#[test]
fn short_output_goes_at_once() {
    let (device, output, _) = console();
    let mut rig = Rig::new(device, 0);
    rig.write(BUFFERS, b"login: ");
    // The I/O thread may just be looking at the queue; not each time, though.
    let at_once = (0..200).any(|_| {
        lock(&output).clear();
        rig.send(TX, &[(BUFFERS, 7, false)]);
        let done = rig.rings[1].take_used().is_some();
        if !done {
            rig.used(TX);
        }
        assert_eq!(*lock(&output), b"login: ");
        done
    });
    assert!(at_once, "never before the doorbell's write returned");
}

#[test]
fn input_waits_for_buffers_and_buffers_wait_for_input() {
    let (device, _, _) = console();
    let mut rig = Rig::new(device.clone(), 0);
    // Input first.
    assert_eq!(device.input(b"hello"), 5);
    rig.send(RX, &[(BUFFERS, 3, true)]);
    assert_eq!(rig.used(RX).1, 3);
    rig.send(RX, &[(BUFFERS + 3, 64, true)]);
    assert_eq!(rig.used(RX).1, 2);
    assert_eq!(rig.read(BUFFERS, 5), b"hello");
    // Buffers first.
    rig.send(RX, &[(BUFFERS, 2, true), (BUFFERS + 0x100, 64, true)]);
    assert_eq!(device.input(b"world"), 5);
    assert_eq!(rig.used(RX).1, 5);
    assert_eq!((rig.read(BUFFERS, 2), rig.read(BUFFERS + 0x100, 3)), (b"wo".to_vec(), b"rld".to_vec()));
}

#[test]
fn input_is_bounded_and_room_is_reported() {
    let (device, _, room) = console();
    let mut rig = Rig::new(device.clone(), 0);
    assert_eq!(device.input(&[7; 5000]), INPUT_ROOM);
    assert_eq!((device.input(&[8]), device.room()), (0, 0));
    rig.send(RX, &[(BUFFERS, 100, true)]);
    assert_eq!(rig.used(RX).1, 100);
    // Called after the buffer was given back; the pause waits for that.
    rig.core.pause();
    assert_eq!((device.room(), room.load(Ordering::SeqCst)), (100, 1));
}

#[test]
fn input_before_the_driver_is_kept() {
    let (device, _, _) = console();
    let mut rig = Rig::idle(device.clone());
    assert_eq!(device.input(b"early"), 5);
    rig.rings[0].add(&[(BUFFERS, 64, true)]);
    rig.set_up(crate::feature::VERSION_1);
    assert_eq!(rig.used(RX).1, 5);
}

#[test]
fn size_is_told_and_changes_interrupt() {
    let (device, _, _) = console();
    let rig = Rig::new(device.clone(), F_SIZE);
    let size = || {
        let mut b = [0; 8];
        rig.core.read_config(0, &mut b);
        b
    };
    assert_eq!(size(), [80, 0, 25, 0, 1, 0, 0, 0]);
    device.resize(300, 50);
    device.resize(300, 50);
    assert_eq!(size()[..4], [0x2c, 1, 50, 0]);
    assert_eq!((rig.interrupts.count(None), rig.core.generation()), (1, 1));
}

#[test]
fn emergency_write_needs_no_queue() {
    let (device, output, _) = console();
    let rig = Rig::idle(device);
    rig.core.write_config(8, &[b'!', 0, 0, 0]);
    rig.core.write_config(0, &[b'?', 0]);
    assert_eq!(*lock(&output), b"!");
}

#[test]
fn state_keeps_input_and_waiting_buffers() {
    let (device, _, _) = console();
    let mut rig = Rig::new(device.clone(), F_SIZE);
    rig.send(RX, &[(BUFFERS, 4, true)]);
    device.resize(100, 30);
    rig.core.pause();
    device.input(b"abcdef");
    let state = rig.core.save();
    let Rig { core, mut rings, memory, .. } = rig;
    drop(core);
    let (other, _, _) = console();
    let mut rig = Rig::over(other.clone(), memory);
    rig.core.load(&state).unwrap();
    std::mem::swap(&mut rig.rings, &mut rings);
    rig.core.resume();
    assert_eq!(rig.used(RX).1, 4);
    assert_eq!(rig.read(BUFFERS, 4), b"abcd");
    rig.core.pause();
    assert_eq!(other.room(), INPUT_ROOM - 2);
    let mut b = [0; 2];
    rig.core.read_config(0, &mut b);
    assert_eq!(b, [100, 0]);
    assert!(other.load(&[0xff; 40]).is_err());
    assert_eq!(rig.core.status() & status::NEEDS_RESET, 0);
}
