//! Block device (virtio 1.3 section 5.2).

mod config;
#[cfg(test)]
mod depth_tests;
mod lanes;
mod request;
#[cfg(test)]
mod tests;

use crate::{Grouping, Queue, QueueError, Quick, Served, Signals, VirtioDevice};
use config::{CONFIG_LEN, WRITEBACK_AT, fields};
use lanes::Slot;
use ringfort_block::aio::Aio;
use ringfort_block::{BlockBackend, SECTOR_SIZE};
use ringfort_bus::lock;
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

// Feature bits (virtio 1.3 section 5.2.3).
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
const F_CONFIG_WCE: u64 = 1 << 11;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// Entries of each queue.
const QUEUE_SIZE: u16 = 256;
/// Most queues.
pub const MAX_QUEUES: u16 = 16;
/// Bytes of a serial number (section 5.2.6, VIRTIO_BLK_T_GET_ID).
pub const SERIAL_LEN: usize = 20;

/// What becomes of a request that fails on the host, as QEMU's `werror` and `rerror`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnError {
    /// The driver gets an I/O error.
    Report,
    /// The driver is told that it succeeded.
    Ignore,
    /// The machine stops; the request is tried again when it goes on.
    Stop,
    /// Stop when the host has no space, report anything else.
    Enospc,
}

/// A request that failed on the host.
pub struct HostError<'a> {
    /// It was to change the disk or to make changes durable.
    pub write: bool,
    /// What the host says.
    pub error: &'a io::Error,
    /// What becomes of the request.
    pub action: Action,
}

/// What was done about a request that failed, by [`OnError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The driver was told of the error.
    Report,
    /// The driver was told that it succeeded.
    Ignore,
    /// The machine is to stop. Told once until it goes on.
    Stop,
}

/// Who hears of host errors. Called on I/O threads and vCPUs; it must not wait for the device.
pub type OnHostError = Box<dyn Fn(&HostError<'_>) + Send + Sync>;

/// How a disk is presented.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlkOptions {
    /// Number of queues, 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// Serial number, at most [`SERIAL_LEN`] bytes.
    pub serial: String,
    /// Do short requests whose data is in the host's page cache on the vCPU that rings.
    pub quick: bool,
    /// How requests that wait for the host are done.
    pub aio: Aio,
    /// Writes are complete only when durable, until the driver asks for a write cache.
    pub write_through: bool,
    /// Failing reads.
    pub rerror: OnError,
    /// Failing writes, flushes and discards.
    pub werror: OnError,
}

impl Default for BlkOptions {
    fn default() -> Self {
        BlkOptions {
            queues: 1,
            serial: String::new(),
            quick: true,
            aio: Aio::best(),
            write_through: false,
            rerror: OnError::Report,
            werror: OnError::Enospc,
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Saved {
    features: u64,
    writeback: bool,
    capacity: u64,
    /// Requests that failed on the host and are to be tried again: queue, and first descriptor of the chain.
    parked: Vec<(u16, u16)>,
}

/// A disk.
pub struct Blk {
    backend: Arc<dyn BlockBackend>,
    queues: u16,
    serial: [u8; SERIAL_LEN],
    quick: bool,
    aio: Aio,
    write_through: bool,
    rerror: OnError,
    werror: OnError,
    features: AtomicU64,
    /// What the driver chose by VIRTIO_BLK_F_CONFIG_WCE: writes may stay in a cache until flushed.
    writeback: AtomicBool,
    signals: OnceLock<Arc<Signals>>,
    on_error: OnceLock<OnHostError>,
    /// One for each queue; locked after the queue.
    slots: Vec<Mutex<Slot>>,
    /// A request failed in a way that stops the machine: nothing is begun until it goes on.
    held: AtomicBool,
}

impl Blk {
    /// A disk on `backend`.
    ///
    /// # Errors
    /// When an option is out of range, in words.
    pub fn new(backend: Arc<dyn BlockBackend>, options: &BlkOptions) -> Result<Blk, String> {
        if !(1..=MAX_QUEUES).contains(&options.queues) {
            return Err(format!("{} disk queues: choose 1 to {MAX_QUEUES}", options.queues));
        }
        let text = options.serial.as_bytes();
        let mut serial = [0; SERIAL_LEN];
        serial
            .get_mut(..text.len())
            .ok_or_else(|| format!("disk serial number {:?}: at most {SERIAL_LEN} bytes", options.serial))?
            .copy_from_slice(text);
        Ok(Blk {
            backend,
            queues: options.queues,
            serial,
            quick: options.quick,
            aio: options.aio,
            write_through: options.write_through,
            rerror: options.rerror,
            werror: options.werror,
            features: AtomicU64::new(0),
            writeback: AtomicBool::new(!options.write_through),
            signals: OnceLock::new(),
            on_error: OnceLock::new(),
            slots: (0..options.queues).map(|_| Mutex::default()).collect(),
            held: AtomicBool::new(false),
        })
    }

    /// Have `listener` told of host errors. Only the first one given counts.
    pub fn on_host_error(&self, listener: OnHostError) {
        let _ = self.on_error.set(listener);
    }

    fn tell(&self, write: bool, error: &io::Error, action: Action) {
        if let Some(listener) = self.on_error.get() {
            listener(&HostError { write, error, action });
        }
    }

    /// The disk behind the device.
    pub fn backend(&self) -> &Arc<dyn BlockBackend> {
        &self.backend
    }

    /// Change the disk's size and tell the driver.
    ///
    /// # Errors
    /// The back end's; then nothing has changed.
    pub fn resize(&self, bytes: u64) -> io::Result<()> {
        self.backend.resize(bytes)?;
        if let Some(s) = self.signals.get() {
            s.config_changed();
        }
        Ok(())
    }

    /// End all requests without telling the driver. No queue is being served.
    fn forget_all(&self) {
        // First what the kernel has: it may keep requests of other queues waiting.
        self.slots.iter().for_each(|s| lock(s).quiesce());
        self.slots.iter().for_each(|s| lock(s).forget());
    }

    fn parked(&self) -> Vec<(u16, u16)> {
        let of = |(queue, slot): (usize, &Mutex<Slot>)| -> Vec<_> {
            lock(slot).parked_heads().map(|head| (queue as u16, head)).collect()
        };
        self.slots.iter().enumerate().flat_map(of).collect()
    }

    fn has(&self, feature: u64) -> bool {
        self.features.load(Ordering::Relaxed) & feature != 0
    }

    /// Whether a write is complete before it is durable (section 5.2.5.2).
    fn write_cached(&self) -> bool {
        if self.has(F_CONFIG_WCE) {
            self.writeback.load(Ordering::Relaxed)
        } else {
            self.has(F_FLUSH) && !self.write_through
        }
    }
}

impl Drop for Blk {
    fn drop(&mut self) {
        self.forget_all();
    }
}

impl VirtioDevice for Blk {
    fn kind(&self) -> &'static str {
        "virtio-blk"
    }

    fn device_type(&self) -> u16 {
        2
    }

    fn pci_class(&self) -> u32 {
        0x01_00_00
    }

    fn features(&self) -> u64 {
        let mut f = F_SEG_MAX | F_BLK_SIZE | F_TOPOLOGY | F_FLUSH | F_CONFIG_WCE;
        if self.queues > 1 {
            f |= F_MQ;
        }
        if self.backend.read_only() {
            return f | F_RO;
        }
        if self.backend.limits().discard {
            f |= F_DISCARD;
        }
        f | F_WRITE_ZEROES
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; usize::from(self.queues)]
    }

    fn grouping(&self) -> Grouping {
        Grouping::PerQueue
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let image = fields(self);
        for (at, b) in (offset..CONFIG_LEN as u64).zip(data) {
            *b = image[at as usize];
        }
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        if let (WRITEBACK_AT, [value]) = (offset, data)
            && self.has(F_CONFIG_WCE)
        {
            self.writeback.store(*value != 0, Ordering::Relaxed);
        }
    }

    fn attach(&self, signals: Arc<Signals>) {
        let _ = self.signals.set(signals);
    }

    fn activate(&self, features: u64) {
        self.features.store(features, Ordering::Relaxed);
    }

    fn service(&self, queue: &mut Queue) -> Result<Served, QueueError> {
        self.service_queue(queue)
    }

    fn collect(&self, queue: &mut Queue, broken: bool) {
        self.collect_queue(queue, broken);
    }

    fn drain(&self, queue: &mut Queue, broken: bool) {
        self.drain_queue(queue, broken);
    }

    fn resumed(&self) {
        self.held.store(false, Ordering::SeqCst);
    }

    fn has_quick(&self) -> bool {
        self.quick
    }

    fn quick(&self, queue: &mut Queue) -> Result<Quick, QueueError> {
        self.quick_queue(queue)
    }

    fn reset(&self) {
        self.features.store(0, Ordering::Relaxed);
        self.writeback.store(!self.write_through, Ordering::Relaxed);
        self.forget_all();
        self.held.store(false, Ordering::SeqCst);
    }

    fn save(&self) -> Vec<u8> {
        let saved = Saved {
            features: self.features.load(Ordering::Relaxed),
            writeback: self.writeback.load(Ordering::Relaxed),
            capacity: self.backend.size(),
            parked: self.parked(),
        };
        crate::transport::encode(&saved)
    }

    fn load(&self, state: &[u8]) -> Result<(), String> {
        let saved: Saved = crate::transport::decode(state)?;
        if saved.parked.iter().any(|(queue, _)| *queue >= self.queues) {
            return Err("a request of a queue that the disk does not have".into());
        }
        if saved.capacity != self.backend.size() {
            return Err(format!(
                "the disk has {} bytes, the saved machine's had {}",
                self.backend.size(),
                saved.capacity
            ));
        }
        self.features.store(saved.features, Ordering::Relaxed);
        self.writeback.store(saved.writeback, Ordering::Relaxed);
        self.forget_all();
        for (queue, head) in saved.parked {
            lock(&self.slots[usize::from(queue)]).heads.push(head);
        }
        Ok(())
    }
}
