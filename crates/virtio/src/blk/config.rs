//! Configuration space (virtio 1.3 section 5.2.4).

use super::{Blk, QUEUE_SIZE, SECTOR_SIZE};
use std::sync::atomic::Ordering;

/// Bytes of it.
pub const CONFIG_LEN: usize = 60;
/// Offset of the `writeback` field.
pub const WRITEBACK_AT: u64 = 32;

/// Most data buffers of a request: the queue's size without header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Most sectors of one discard or write-zeroes range: 2 GiB.
pub const MAX_RANGE_SECTORS: u32 = 1 << 22;
/// Most ranges in one discard request.
pub const MAX_DISCARD_RANGES: u32 = 256;
/// Most ranges in one write-zeroes request: few, since a host may have to write each of them out.
pub const MAX_ZERO_RANGES: u32 = 16;

/// The space as the driver sees it.
pub fn fields(disk: &Blk) -> [u8; CONFIG_LEN] {
    let mut c = [0; CONFIG_LEN];
    let mut put = |at: usize, bytes: &[u8]| c[at..at + bytes.len()].copy_from_slice(bytes);
    let limits = disk.backend.limits();
    let writable = !disk.backend.read_only();
    put(0, &(disk.backend.size() / SECTOR_SIZE).to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &limits.block_size.to_le_bytes());
    // Topology: log2 of logical blocks per physical one, alignment, minimal and best I/O size in blocks.
    let per_physical = (limits.physical_block_size / limits.block_size).max(1);
    put(24, &[per_physical.ilog2() as u8, 0]);
    put(26, &(per_physical.min(0xffff) as u16).to_le_bytes());
    put(WRITEBACK_AT as usize, &[disk.writeback.load(Ordering::Relaxed).into()]);
    put(34, &disk.queues.to_le_bytes());
    if writable && limits.discard {
        put(36, &MAX_RANGE_SECTORS.to_le_bytes());
        put(40, &MAX_DISCARD_RANGES.to_le_bytes());
        put(44, &(limits.discard_granularity / SECTOR_SIZE as u32).max(1).to_le_bytes());
    }
    if writable {
        put(48, &MAX_RANGE_SECTORS.to_le_bytes());
        put(52, &MAX_ZERO_RANGES.to_le_bytes());
        put(56, &[u8::from(limits.discard)]);
    }
    c
}
