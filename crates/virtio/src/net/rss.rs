//! Receive-side scaling and hash reports (virtio 1.3 sections 5.1.6.4.3 and 5.1.6.5.7).

use crate::Chain;
use ringfort_net::hash::{KEY_LEN, Toeplitz, types};
use serde::{Deserialize, Serialize};

/// Most entries of the table of queues.
pub const MAX_TABLE: u16 = 128;

/// What the driver set.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RssState {
    /// What is hashed ([`types`]).
    pub types: u32,
    /// The key, at most [`KEY_LEN`] bytes.
    pub key: Vec<u8>,
    /// The pair for each value of the hash's low bits; empty without scaling. A power of two of them.
    pub table: Vec<u16>,
    /// The pair for frames without a hash.
    pub default: u16,
}

impl RssState {
    /// Whether saved values can be ours, on a device of so many pairs.
    pub fn check(&self, pairs: u16) -> Result<(), String> {
        let sizes = self.table.is_empty()
            || (self.table.len().is_power_of_two() && self.table.len() <= usize::from(MAX_TABLE));
        let queues = self.table.iter().chain([&self.default]).all(|&q| q < pairs);
        if self.types & !types::ALL != 0 || self.key.len() > KEY_LEN || !sizes || !queues {
            return Err("receive-side scaling is set to what this device has not".into());
        }
        Ok(())
    }

    /// `struct virtio_net_rss_config` behind the command's head; also the number of transmit queues in it.
    pub fn from_rss(chain: &Chain, pairs: u16) -> Option<(RssState, u16)> {
        let half = |at| Some(u16::from_le_bytes(chain.read_array(at)?));
        let entries = half(6)?.checked_add(1)?;
        if !entries.is_power_of_two() || entries > MAX_TABLE {
            return None;
        }
        let table = (0..u64::from(entries)).map(|n| half(10 + 2 * n)).collect::<Option<Vec<u16>>>()?;
        let at = 10 + 2 * u64::from(entries);
        let state = RssState {
            types: u32::from_le_bytes(chain.read_array(2)?),
            key: key(chain, at + 2)?,
            table,
            default: half(8)?,
        };
        state.check(pairs).ok()?;
        let transmit = half(at)?;
        (1..=pairs).contains(&transmit).then_some((state, transmit))
    }

    /// `struct virtio_net_hash_config` behind the command's head: reports without scaling.
    pub fn from_hash(chain: &Chain) -> Option<RssState> {
        let state = RssState {
            types: u32::from_le_bytes(chain.read_array(2)?),
            key: key(chain, 14)?,
            ..RssState::default()
        };
        state.check(1).ok()?;
        Some(state)
    }
}

/// A key with its length before it.
fn key(chain: &Chain, at: u64) -> Option<Vec<u8>> {
    let [len] = chain.read_array::<1>(at)?;
    let mut key = vec![0; usize::from(len)];
    (key.len() <= KEY_LEN && chain.read(at + 1, &mut key) == key.len()).then_some(key)
}

/// The same, made ready for frames.
pub struct Scaling {
    state: RssState,
    hash: Toeplitz,
}

/// What is known of a frame: its hash with virtio's number for the report (section 5.1.6.4.3.5), and its queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Verdict {
    pub hash: u32,
    pub report: u16,
    pub pair: Option<u16>,
}

impl Scaling {
    pub fn new(state: &RssState) -> Scaling {
        Scaling { hash: Toeplitz::new(&state.key), state: state.clone() }
    }

    pub fn judge(&self, frame: &[u8]) -> Verdict {
        let scaled = !self.state.table.is_empty();
        match self.hash.of_frame(frame, self.state.types) {
            Some((hash, kind)) => Verdict {
                hash,
                report: kind.trailing_zeros() as u16 + 1,
                pair: scaled.then(|| self.state.table[hash as usize & (self.state.table.len() - 1)]),
            },
            None => Verdict { pair: scaled.then_some(self.state.default), ..Verdict::default() },
        }
    }
}
