//! The common configuration structure (virtio 1.3 section 4.1.4.3).

use super::{COMMON_AT, COMMON_LEN, VirtioPci};
use crate::transport::RingArea;
use serde::{Deserialize, Serialize};

/// "No vector" (VIRTIO_MSI_NO_VECTOR).
pub const NO_VECTOR: u16 = 0xffff;

/// MSI-X vectors that the driver chose.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vectors {
    pub config: u16,
    pub queues: Vec<u16>,
}

// Offsets of the fields.
const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DEVICE_FEATURE: u64 = 0x04;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const CONFIG_MSIX_VECTOR: u64 = 0x10;
const NUM_QUEUES: u64 = 0x12;
const DEVICE_STATUS: u64 = 0x14;
const CONFIG_GENERATION: u64 = 0x15;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_MSIX_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_NOTIFY_OFF: u64 = 0x1e;
const QUEUE_DESC: u64 = 0x20;
const QUEUE_DRIVER: u64 = 0x28;
const QUEUE_DEVICE: u64 = 0x30;
const QUEUE_NOTIFY_DATA: u64 = 0x38;

/// Start and width of the field at `offset`.
const fn field(offset: u64) -> (u64, u64) {
    match offset {
        0x00..0x10 => (offset & !3, 4),
        DEVICE_STATUS => (DEVICE_STATUS, 1),
        CONFIG_GENERATION => (CONFIG_GENERATION, 1),
        0x20..0x38 => (offset & !7, 8),
        _ => (offset & !1, 2),
    }
}

impl VirtioPci {
    fn field_value(&self, start: u64) -> u64 {
        let c = &self.core;
        let q = c.queue_select();
        match start {
            DEVICE_FEATURE_SELECT => c.device_select().into(),
            DEVICE_FEATURE => c.device_features().into(),
            DRIVER_FEATURE_SELECT => c.driver_select().into(),
            DRIVER_FEATURE => c.driver_features().into(),
            CONFIG_MSIX_VECTOR => self.irq.config_vector().into(),
            NUM_QUEUES => c.queue_count().into(),
            DEVICE_STATUS => c.status().into(),
            CONFIG_GENERATION => u64::from(c.generation() as u8),
            QUEUE_SELECT => q.into(),
            QUEUE_SIZE => c.queue_size().into(),
            QUEUE_MSIX_VECTOR => self.irq.queue_vector(q).into(),
            QUEUE_ENABLE => c.queue_enabled().into(),
            QUEUE_NOTIFY_OFF | QUEUE_NOTIFY_DATA if q < c.queue_count() => q.into(),
            QUEUE_DESC => c.queue_area(RingArea::Desc),
            QUEUE_DRIVER => c.queue_area(RingArea::Avail),
            QUEUE_DEVICE => c.queue_area(RingArea::Used),
            _ => 0,
        }
    }

    /// A read of any width: byte by byte out of the fields that it covers.
    pub(super) fn common_read(&self, offset: u64, data: &mut [u8]) {
        let mut cached = None;
        for (at, b) in (offset - COMMON_AT..COMMON_LEN).zip(data) {
            let (start, _) = field(at);
            let value = match cached {
                Some((s, v)) if s == start => v,
                _ => {
                    let v = self.field_value(start);
                    cached = Some((start, v));
                    v
                }
            };
            *b = (value >> ((at - start) * 8)) as u8;
        }
    }

    /// A write takes effect if it is one of the widths that the driver has to use: the field's own, or 32 bits of a
    /// 64-bit field (virtio 1.3 section 4.1.3.1).
    pub(super) fn common_write(&self, offset: u64, data: &[u8]) {
        let at = offset - COMMON_AT;
        let (start, width) = field(at);
        let len = data.len() as u64;
        let half = width == 8 && len == 4 && at.is_multiple_of(4);
        if at >= COMMON_LEN || !(len == width && at == start || half) {
            return;
        }
        let mut raw = [0; 8];
        raw[..data.len()].copy_from_slice(data);
        let value = u64::from_le_bytes(raw);
        let shift = (at - start) * 8;
        let mask = if half { 0xffff_ffff << shift } else { u64::MAX };
        let c = &self.core;
        match start {
            DEVICE_FEATURE_SELECT => c.set_device_select(value as u32),
            DRIVER_FEATURE_SELECT => c.set_driver_select(value as u32),
            DRIVER_FEATURE => c.set_driver_features(value as u32),
            CONFIG_MSIX_VECTOR => self.irq.set_config_vector(value as u16),
            DEVICE_STATUS if value as u8 == 0 => self.reset_device(),
            DEVICE_STATUS => {
                c.write_status(value as u8);
                self.bells.follow(c);
            }
            QUEUE_SELECT => c.set_queue_select(value as u16),
            QUEUE_SIZE => c.set_queue_size(value as u16),
            QUEUE_MSIX_VECTOR => self.irq.set_queue_vector(c.queue_select(), value as u16),
            QUEUE_ENABLE if value == 1 => c.set_queue_enabled(),
            QUEUE_DESC => c.set_queue_area(RingArea::Desc, value << shift, mask),
            QUEUE_DRIVER => c.set_queue_area(RingArea::Avail, value << shift, mask),
            QUEUE_DEVICE => c.set_queue_area(RingArea::Used, value << shift, mask),
            _ => {}
        }
    }
}
