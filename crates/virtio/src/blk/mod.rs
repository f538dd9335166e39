//! Block device (virtio 1.3 section 5.2).

mod config;
mod request;
#[cfg(test)]
mod tests;

use crate::{Grouping, Queue, QueueError, Quick, Served, Signals, VirtioDevice};
use config::{CONFIG_LEN, WRITEBACK_AT, fields};
use request::Request;
use ringfort_block::{BlockBackend, SECTOR_SIZE};
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

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
/// Most bytes that a vCPU moves at one ring of the doorbell; more is the I/O thread's.
const QUICK_BYTES: u64 = 512 << 10;
/// Longest single request that a vCPU does.
const QUICK_REQUEST: u64 = 128 << 10;

/// How a disk is presented.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlkOptions {
    /// Number of queues, 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// Serial number, at most [`SERIAL_LEN`] bytes.
    pub serial: String,
    /// Do short requests whose data is in the host's page cache on the vCPU that rings.
    pub quick: bool,
}

impl Default for BlkOptions {
    fn default() -> Self {
        BlkOptions { queues: 1, serial: String::new(), quick: true }
    }
}

#[derive(Serialize, Deserialize)]
struct Saved {
    features: u64,
    writeback: bool,
    capacity: u64,
}

/// A disk.
pub struct Blk {
    backend: Arc<dyn BlockBackend>,
    queues: u16,
    serial: [u8; SERIAL_LEN],
    quick: bool,
    features: AtomicU64,
    /// What the driver chose by VIRTIO_BLK_F_CONFIG_WCE: writes may stay in a cache until flushed.
    writeback: AtomicBool,
    signals: OnceLock<Arc<Signals>>,
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
            features: AtomicU64::new(0),
            writeback: AtomicBool::new(true),
            signals: OnceLock::new(),
        })
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

    fn has(&self, feature: u64) -> bool {
        self.features.load(Ordering::Relaxed) & feature != 0
    }

    /// Whether a write is complete before it is durable (section 5.2.5.2).
    fn write_cached(&self) -> bool {
        if self.has(F_CONFIG_WCE) { self.writeback.load(Ordering::Relaxed) } else { self.has(F_FLUSH) }
    }

    fn request<'a>(&'a self, chain: &'a crate::Chain) -> Result<Request<'a>, QueueError> {
        Request::parse(self, chain)
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
        while let Some(chain) = queue.pop()? {
            let written = self.request(&chain)?.execute();
            queue.complete(chain, written);
        }
        Ok(Served::Drained)
    }

    fn has_quick(&self) -> bool {
        self.quick
    }

    fn quick(&self, queue: &mut Queue) -> Result<Quick, QueueError> {
        let mut budget = QUICK_BYTES;
        while let Some(chain) = queue.pop()? {
            let request = self.request(&chain)?;
            let size = request.size();
            let outcome = if size > budget.min(QUICK_REQUEST) { None } else { request.try_execute() };
            match outcome {
                Some(written) => queue.complete(chain, written),
                None => {
                    queue.undo_pop(chain);
                    return Ok(Quick::Later);
                }
            }
            budget -= size;
        }
        Ok(Quick::Done)
    }

    fn reset(&self) {
        self.features.store(0, Ordering::Relaxed);
        self.writeback.store(true, Ordering::Relaxed);
    }

    fn save(&self) -> Vec<u8> {
        let saved = Saved {
            features: self.features.load(Ordering::Relaxed),
            writeback: self.writeback.load(Ordering::Relaxed),
            capacity: self.backend.size(),
        };
        crate::transport::encode(&saved)
    }

    fn load(&self, state: &[u8]) -> Result<(), String> {
        let saved: Saved = crate::transport::decode(state)?;
        if saved.capacity != self.backend.size() {
            return Err(format!(
                "the disk has {} bytes, the saved machine's had {}",
                self.backend.size(),
                saved.capacity
            ));
        }
        self.features.store(saved.features, Ordering::Relaxed);
        self.writeback.store(saved.writeback, Ordering::Relaxed);
        Ok(())
    }
}
