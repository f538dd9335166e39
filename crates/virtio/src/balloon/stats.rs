//! Statistics of the guest's memory (virtio 1.3 section 5.5.6.3).

use crate::Chain;
use serde::{Deserialize, Serialize};

/// Which statistic; the numbers are the tags of the specification and of Linux.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stat {
    /// Bytes swapped in.
    SwapIn = 0,
    /// Bytes swapped out.
    SwapOut = 1,
    /// Major page faults.
    MajorFaults = 2,
    /// Minor page faults.
    MinorFaults = 3,
    /// Bytes unused.
    Free = 4,
    /// Bytes in all.
    Total = 5,
    /// Bytes available to programs without swapping.
    Available = 6,
    /// Bytes in caches that can be given back quickly.
    Caches = 7,
    /// Huge page allocations that succeeded.
    HugePageAllocations = 8,
    /// Huge page allocations that failed.
    HugePageFailures = 9,
}

/// Tags that are kept.
const TAGS: usize = 16;
/// Bytes of one entry: tag and value.
const ENTRY: u64 = 10;

/// What the driver told last. Everything in here is the guest's word.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonStats {
    values: [Option<u64>; TAGS],
}

impl BalloonStats {
    /// One statistic, if the driver told it.
    pub fn get(&self, which: Stat) -> Option<u64> {
        self.values[which as usize]
    }
}

/// Read a statistics buffer. Unknown tags are left out; of one that comes twice the last counts.
pub fn parse(chain: &Chain) -> BalloonStats {
    let mut stats = BalloonStats::default();
    // No driver has more entries than there are tags by much.
    for i in 0..(chain.readable() / ENTRY).min(64) {
        let Some([a, b, value @ ..]) = chain.read_array::<{ ENTRY as usize }>(i * ENTRY) else { break };
        if let Some(v) = stats.values.get_mut(usize::from(u16::from_le_bytes([a, b]))) {
            *v = Some(u64::from_le_bytes(value));
        }
    }
    stats
}
