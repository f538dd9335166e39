//! The guest's serial port and console, joined to where they lead.

use crate::chardev::{Chardev, Input, Output};
use ringfort_bus::{Shared, lock};
use ringfort_devices::serial::{Serial, SerialSink};
use ringfort_virtio::console::Console;
use std::io;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, Weak};

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
struct ToSerial(Weak<Mutex<Serial>>, Arc<Hold>);

impl Input for ToSerial {
    fn receive(&self, bytes: &[u8]) -> usize {
        self.1.pass(|| self.0.upgrade().map_or(bytes.len(), |port| lock(&port).receive(bytes))).unwrap_or(0)
    }
}

struct ToConsole(Weak<Console>, Arc<Hold>);

impl Input for ToConsole {
    fn receive(&self, bytes: &[u8]) -> usize {
        self.1.pass(|| self.0.upgrade().map_or(bytes.len(), |console| console.input(bytes))).unwrap_or(0)
    }
}

type Call = Arc<dyn Fn() + Send + Sync>;

/// Keeps what comes from outside away from the devices while they must not change.
#[derive(Default)]
pub struct Hold {
    held: RwLock<bool>,
    /// What is to be called when it ends: devices that wait for room to write, readers that wait for room to read into.
    afterwards: Mutex<Vec<Call>>,
}

impl Hold {
    /// Do `f` unless held.
    fn pass<T>(&self, f: impl FnOnce() -> T) -> Option<T> {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        (!*held).then(f)
    }

    fn afterwards(&self, call: Call) {
        lock(&self.afterwards).push(call);
    }

    /// On return nothing from outside is on its way into a device, and nothing comes.
    pub fn hold(&self) {
        *self.held.write().unwrap_or_else(PoisonError::into_inner) = true;
    }

    /// Go on, with what was held up.
    pub fn release(&self) {
        let was = std::mem::take(&mut *self.held.write().unwrap_or_else(PoisonError::into_inner));
        if was {
            lock(&self.afterwards).iter().for_each(|call| call());
        }
    }
}

/// Join a serial port, made with [`sink`] and `room`, to `line`.
///
/// # Errors
/// When the host has no more threads or descriptors.
pub fn join_serial(
    port: &Shared<Serial>,
    line: &mut Chardev,
    room: &Room,
    hold: &Arc<Hold>,
) -> io::Result<()> {
    let weak = Arc::downgrade(port);
    let ready = weak.clone();
    let writable = hold.clone();
    let transmit: Call = Arc::new(move || {
        let port = ready.upgrade();
        // What is held up is called again when that ends.
        let _ = writable.pass(|| port.map(|p| lock(&p).transmit_ready()));
    });
    hold.afterwards(transmit.clone());
    line.output().when_writable(transmit);
    line.connect(Arc::new(ToSerial(weak, hold.clone())))?;
    room.set(line);
    hold.afterwards(line.unblock());
    Ok(())
}

/// A virtio console that leads to `line`.
///
/// # Errors
/// When the host has no more threads or descriptors.
pub fn console(line: &mut Chardev, hold: &Arc<Hold>) -> io::Result<Arc<Console>> {
    let room = Room::default();
    let console = Arc::new(Console::new(sink(line), room.caller()));
    let ready = Arc::downgrade(&console);
    let writable = hold.clone();
    let transmit: Call = Arc::new(move || {
        let console = ready.upgrade();
        let _ = writable.pass(|| console.map(|c| c.transmit_ready()));
    });
    hold.afterwards(transmit.clone());
    line.output().when_writable(transmit);
    line.connect(Arc::new(ToConsole(Arc::downgrade(&console), hold.clone())))?;
    room.set(line);
    hold.afterwards(line.unblock());
    Ok(console)
}
