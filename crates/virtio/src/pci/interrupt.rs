//! Interrupts of a virtio PCI function: MSI-X vectors, or INTx with the ISR register (virtio 1.3 sections 4.1.4.5,
//! 4.1.5.3 and 4.1.5.4).

use super::common::{NO_VECTOR, Vectors};
use crate::Interrupt;
use ringfort_bus::lock;
use ringfort_devices::pci::{MsixState, PciConfig};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};

/// A queue's buffers were used.
const ISR_QUEUE: u8 = 1;
/// Configuration changed.
const ISR_CONFIG: u8 = 2;

pub struct PciInterrupt {
    config: Arc<PciConfig>,
    msix: Arc<MsixState>,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    /// The ISR register; the lock also keeps its changes and the line's in the same order.
    isr: Mutex<u8>,
}

impl PciInterrupt {
    pub fn new(config: Arc<PciConfig>, msix: Arc<MsixState>, queues: usize) -> PciInterrupt {
        PciInterrupt {
            config,
            msix,
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: Mutex::new(0),
        }
    }

    fn raise(&self, vector: &AtomicU16, isr: u8) {
        if self.msix.is_enabled() {
            // NO_VECTOR is beyond every table.
            self.msix.notify(vector.load(Ordering::SeqCst));
        } else {
            let mut bits = lock(&self.isr);
            *bits |= isr;
            self.config.set_intx(true);
        }
    }

    /// Read the ISR register: clears it and releases the line.
    pub fn take_isr(&self) -> u8 {
        let mut bits = lock(&self.isr);
        let value = std::mem::take(&mut *bits);
        if value != 0 {
            self.config.set_intx(false);
        }
        value
    }

    pub fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::SeqCst)
    }

    pub fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(self.checked(vector), Ordering::SeqCst);
    }

    pub fn queue_vector(&self, queue: u16) -> u16 {
        self.queue_vectors.get(usize::from(queue)).map_or(NO_VECTOR, |v| v.load(Ordering::SeqCst))
    }

    pub fn set_queue_vector(&self, queue: u16, vector: u16) {
        if let Some(v) = self.queue_vectors.get(usize::from(queue)) {
            v.store(self.checked(vector), Ordering::SeqCst);
        }
    }

    /// A vector that is not there reads back as "none" (virtio 1.3 section 4.1.5.1.2.1).
    fn checked(&self, vector: u16) -> u16 {
        if vector < self.msix.vectors() { vector } else { NO_VECTOR }
    }

    pub fn reset(&self) {
        self.config_vector.store(NO_VECTOR, Ordering::SeqCst);
        self.queue_vectors.iter().for_each(|v| v.store(NO_VECTOR, Ordering::SeqCst));
        self.take_isr();
    }

    pub fn save(&self) -> (Vectors, u8) {
        let queues = self.queue_vectors.iter().map(|v| v.load(Ordering::SeqCst)).collect();
        (Vectors { config: self.config_vector(), queues }, *lock(&self.isr))
    }

    pub fn fits(&self, v: &Vectors) -> bool {
        v.queues.len() == self.queue_vectors.len()
            && v.queues.iter().chain([&v.config]).all(|&n| self.checked(n) == n)
    }

    /// Take over vectors that [`fits`](Self::fits) approved; the line's level comes with configuration space.
    pub fn load(&self, v: &Vectors, isr: u8) {
        self.config_vector.store(v.config, Ordering::SeqCst);
        for (mine, &new) in self.queue_vectors.iter().zip(&v.queues) {
            mine.store(new, Ordering::SeqCst);
        }
        let mut bits = lock(&self.isr);
        *bits = isr & (ISR_QUEUE | ISR_CONFIG);
        self.config.set_intx(*bits != 0);
    }
}

impl Interrupt for PciInterrupt {
    fn queue(&self, index: u16) {
        if let Some(v) = self.queue_vectors.get(usize::from(index)) {
            self.raise(v, ISR_QUEUE);
        }
    }

    fn config(&self) {
        self.raise(&self.config_vector, ISR_CONFIG);
    }
}
