//! The guest's serial port and console, joined to where they lead.

use crate::chardev::{Chardev, Input, Output};
use ringfort_bus::{Shared, lock};
use ringfort_devices::serial::{Serial, SerialSink};
use ringfort_virtio::console::Console;
use std::io;
use std::sync::{Arc, Mutex, OnceLock, Weak};

/// Where a machine's character devices lead.
pub struct Lines {
    /// The first serial port.
    pub serial: Chardev,
    /// The virtio console, if there is to be one.
    pub console: Option<Chardev>,
}

/// What a device calls when it can take input again. It is known only after the device was made.
#[derive(Default, Clone)]
pub struct Room(Arc<OnceLock<Arc<dyn Fn() + Send + Sync>>>);

impl Room {
    /// For the device.
    pub fn caller(&self) -> Box<dyn Fn() + Send + Sync> {
        let room = self.0.clone();
        Box::new(move || {
            if let Some(call) = room.get() {
                call();
            }
        })
    }

    /// From the other end.
    fn set(&self, line: &Chardev) {
        // Each is joined once.
        let _ = self.0.set(line.unblock());
    }
}

/// A device's way out.
struct ToOutput(Arc<Output>);

impl SerialSink for ToOutput {
    fn write(&mut self, bytes: &[u8]) -> usize {
        self.0.write(bytes)
    }
}

/// A device's way out to `line`.
pub fn sink(line: &Chardev) -> Box<dyn SerialSink> {
    Box::new(ToOutput(line.output()))
}

/// A way in. Once the device is gone nobody waits for what is typed.
struct ToSerial(Weak<Mutex<Serial>>);

impl Input for ToSerial {
    fn receive(&self, bytes: &[u8]) -> usize {
        self.0.upgrade().map_or(bytes.len(), |port| lock(&port).receive(bytes))
    }
}

struct ToConsole(Weak<Console>);

impl Input for ToConsole {
    fn receive(&self, bytes: &[u8]) -> usize {
        self.0.upgrade().map_or(bytes.len(), |console| console.input(bytes))
    }
}

/// Join a serial port, made with [`sink`] and `room`, to `line`.
///
/// # Errors
/// When the host has no more threads or descriptors.
pub fn join_serial(port: &Shared<Serial>, line: &mut Chardev, room: &Room) -> io::Result<()> {
    let weak = Arc::downgrade(port);
    let ready = weak.clone();
    line.output().when_writable(Arc::new(move || {
        if let Some(port) = ready.upgrade() {
            lock(&port).transmit_ready();
        }
    }));
    line.connect(Arc::new(ToSerial(weak)))?;
    room.set(line);
    Ok(())
}

/// A virtio console that leads to `line`.
///
/// # Errors
/// When the host has no more threads or descriptors.
pub fn console(line: &mut Chardev) -> io::Result<Arc<Console>> {
    let room = Room::default();
    let console = Arc::new(Console::new(sink(line), room.caller()));
    let ready = Arc::downgrade(&console);
    line.output().when_writable(Arc::new(move || {
        if let Some(console) = ready.upgrade() {
            console.transmit_ready();
        }
    }));
    line.connect(Arc::new(ToConsole(Arc::downgrade(&console))))?;
    room.set(line);
    Ok(console)
}
