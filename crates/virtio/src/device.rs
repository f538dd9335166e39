//! What a virtio device is, apart from how the guest reaches it.

use crate::queue::{Queue, QueueError};
use crate::served::QueueServer;
use ringfort_bus::lock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};
use vmm_sys_util::eventfd::EventFd;

/// Device status bits (virtio 1.3 section 2.1).
pub mod status {
    /// The guest found the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The guest has a driver for it.
    pub const DRIVER: u8 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 4;
    /// Features are settled.
    pub const FEATURES_OK: u8 = 8;
    /// The device met something that it cannot go on from.
    pub const NEEDS_RESET: u8 = 0x40;
    /// The driver gave up.
    pub const FAILED: u8 = 0x80;
}

/// Feature bits that belong to rings and transports (virtio 1.3 section 6).
pub mod feature {
    /// Indirect descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Event indexes.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// Virtio 1.0 or later.
    pub const VERSION_1: u64 = 1 << 32;
    /// What every device here offers.
    pub const COMMON: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1;
}

/// How the device reaches the driver; the transport provides it. No call waits for a device's or a queue's lock.
pub trait Interrupt: Send + Sync {
    /// Buffers of a queue were used.
    fn queue(&self, index: u16);
    /// Configuration space changed.
    fn config(&self);
}

/// How a device's queues share I/O threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grouping {
    /// One thread for each queue.
    PerQueue,
    /// One thread for all.
    Single,
}

/// Why a device stopped serving a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// The driver has made nothing more available; its next notification is wanted.
    Drained,
    /// Buffers may be there, but the device has nothing to put into them: it will kick the queue itself.
    Waiting,
}

/// What became of an attempt to do work at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quick {
    /// All that was there is done.
    Done,
    /// The I/O thread is to go on.
    Later,
}

/// A virtio device. All methods take `&self`; the device keeps its own locks, which it must not hold while it calls
/// [`Signals`].
pub trait VirtioDevice: Send + Sync {
    /// Model name, also the kind of its state section, for instance `"virtio-blk"`.
    fn kind(&self) -> &'static str;

    /// Device type (virtio 1.3 section 5), for instance 2 for block.
    fn device_type(&self) -> u16;

    /// PCI class code: class, subclass, programming interface.
    fn pci_class(&self) -> u32 {
        0x00_ff_00
    }

    /// Features offered, beyond [`feature::COMMON`].
    fn features(&self) -> u64;

    /// Whether a driver may choose these of its features together: some need others.
    fn fits(&self, features: u64) -> bool {
        let _ = features;
        true
    }

    /// The largest size of each queue; their number is the number of queues.
    fn queue_sizes(&self) -> Vec<u16>;

    /// How queues share threads.
    fn grouping(&self) -> Grouping {
        Grouping::Single
    }

    /// The driver reads configuration space. Bytes beyond its end read as zeroes (`data` comes zeroed).
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// The driver writes configuration space.
    fn write_config(&self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// The transport introduces itself, once.
    fn attach(&self, signals: Arc<Signals>) {
        let _ = signals;
    }

    /// The driver is ready and took these features. Queues are served from now on.
    fn activate(&self, features: u64) {
        let _ = features;
    }

    /// Who serves some of its queues instead.
    fn server(&self) -> Option<Arc<dyn QueueServer>> {
        None
    }

    /// Whether [`server`](Self::server) serves this queue.
    fn is_served(&self, queue: u16) -> bool {
        let _ = queue;
        true
    }

    /// Serve a queue until [`Queue::pop`] gives nothing, on an I/O thread. Called when the driver rings, and after
    /// [`Signals::kick`].
    ///
    /// # Errors
    /// When the driver broke the rules: the device then needs a reset.
    fn service(&self, queue: &mut Queue) -> Result<Served, QueueError>;

    /// Whether [`quick`](Self::quick) does anything.
    fn has_quick(&self) -> bool {
        false
    }

    /// Serve a queue on the vCPU that rang, as far as that does not wait for anything.
    ///
    /// # Errors
    /// As for [`service`](Self::service).
    fn quick(&self, queue: &mut Queue) -> Result<Quick, QueueError> {
        let _ = queue;
        Ok(Quick::Later)
    }

    /// Whether a doorbell is to reach the I/O thread without the vCPU's, where the host can do that. Not if the driver waits in a loop for what
    /// [`quick`](Self::quick) does at once.
    fn by_thread(&self) -> bool {
        true
    }

    /// Give the driver what was finished since the last look: called whenever the queue is kicked, also while the machine
    /// pauses. The queue must not be touched if it is `broken`.
    fn collect(&self, queue: &mut Queue, broken: bool) {
        let _ = (queue, broken);
    }

    /// Finish everything of the queue that is under way; on return no memory of the guest is touched. The queue must not
    /// be touched if it is `broken`.
    fn drain(&self, queue: &mut Queue, broken: bool) {
        let _ = (queue, broken);
    }

    /// The machine goes on. All queues are kicked afterwards.
    fn resumed(&self) {}

    /// Forget what the driver told, and end what is under way; no queue is being served.
    fn reset(&self) {}

    /// The device's own state, beyond transport and queues. No queue is being served.
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Take over a saved state; then nothing has changed on error.
    ///
    /// # Errors
    /// What does not fit, in words.
    fn load(&self, state: &[u8]) -> Result<(), String> {
        if state.is_empty() { Ok(()) } else { Err("state of another device".into()) }
    }
}

/// A queue that can be served on any thread.
pub(crate) trait Serve: Send + Sync {
    /// Serve it now; false if somebody else does.
    fn try_serve(&self) -> bool;
}

/// How a device starts things by itself.
pub struct Signals {
    kicks: Vec<Arc<EventFd>>,
    /// Who serves a queue on the spot, while the device is active.
    servers: RwLock<Vec<Weak<dyn Serve>>>,
    interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
    generation: AtomicU32,
}

impl Signals {
    pub(crate) fn new(kicks: Vec<Arc<EventFd>>) -> Signals {
        Signals {
            kicks,
            servers: RwLock::default(),
            interrupt: Mutex::new(None),
            generation: AtomicU32::new(0),
        }
    }

    pub(crate) fn connect(&self, interrupt: Option<Arc<dyn Interrupt>>) {
        *lock(&self.interrupt) = interrupt;
    }

    pub(crate) fn kicks(&self) -> &[Arc<EventFd>] {
        &self.kicks
    }

    /// Have a queue's I/O thread serve it.
    pub fn kick(&self, queue: u16) {
        if let Some(fd) = self.kicks.get(usize::from(queue)) {
            // Fails only when 2^64 kicks are outstanding; one is as good.
            let _ = fd.write(1);
        }
    }

    pub(crate) fn set_servers(&self, servers: Vec<Weak<dyn Serve>>) {
        *self.servers.write().unwrap_or_else(PoisonError::into_inner) = servers;
    }

    /// Serve a queue here and now, which spares a change of threads; if somebody else is at it, they are to look again. The caller holds
    /// no lock of the device's, and does not serve that queue itself.
    pub fn serve(&self, queue: u16) {
        let server = {
            let servers = self.servers.read().unwrap_or_else(PoisonError::into_inner);
            servers.get(usize::from(queue)).and_then(Weak::upgrade)
        };
        if server.is_none_or(|s| !s.try_serve()) {
            self.kick(queue);
        }
    }

    /// The content of configuration space changed: count it, and interrupt an active driver.
    pub fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        let interrupt = lock(&self.interrupt).clone();
        if let Some(i) = interrupt {
            i.config();
        }
    }

    /// How often configuration space changed.
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    pub(crate) fn set_generation(&self, value: u32) {
        self.generation.store(value, Ordering::SeqCst);
    }
}
