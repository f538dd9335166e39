//! Putting fragments of the guest's packets together again, within bounds.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Packets being put together at once.
const MOST: usize = 32;
/// Longest packet.
const MOST_BYTES: usize = 65_535;
/// Pieces of one packet.
const MOST_PIECES: usize = 128;
/// How long a packet may take (RFC 8200 section 4.5 gives 60 seconds; fragments of a guest do not travel).
const PATIENCE: Duration = Duration::from_secs(10);

/// Source, destination, identification, protocol.
pub type Key = (IpAddr, IpAddr, u32, u8);

struct Partial {
    pieces: Vec<(usize, Vec<u8>)>,
    end: Option<usize>,
    since: Instant,
}

/// Packets that are not whole yet.
#[derive(Default)]
pub struct Fragments {
    partial: HashMap<Key, Partial>,
}

impl Fragments {
    /// Add a piece at `at`; gives the whole once it is there. Pieces that overlap make it all void (RFC 5722).
    pub fn add(&mut self, key: Key, at: usize, more: bool, data: &[u8]) -> Option<Vec<u8>> {
        let end = at + data.len();
        if data.is_empty() || end > MOST_BYTES || (more && !data.len().is_multiple_of(8)) {
            return None;
        }
        if !self.partial.contains_key(&key) && self.partial.len() >= MOST {
            let oldest = self.partial.iter().min_by_key(|(_, p)| p.since).map(|(k, _)| *k)?;
            self.partial.remove(&oldest);
        }
        let p = self.partial.entry(key).or_insert_with(|| Partial {
            pieces: Vec::new(),
            end: None,
            since: Instant::now(),
        });
        // The same once more is no harm (RFC 8200 section 4.5).
        if p.pieces.iter().any(|(a, d)| *a == at && d == data) {
            return None;
        }
        let overlaps = p.pieces.iter().any(|(a, d)| *a < end && at < a + d.len());
        let beyond = p.end.is_some_and(|e| end > e || !more)
            || (!more && p.pieces.iter().any(|(a, d)| a + d.len() > end));
        if overlaps || beyond || p.pieces.len() >= MOST_PIECES {
            self.partial.remove(&key);
            return None;
        }
        if !more {
            p.end = Some(end);
        }
        p.pieces.push((at, data.to_vec()));
        let have: usize = p.pieces.iter().map(|(_, d)| d.len()).sum();
        if p.end != Some(have) {
            return None;
        }
        let mut p = self.partial.remove(&key)?;
        p.pieces.sort_by_key(|(a, _)| *a);
        Some(p.pieces.into_iter().flat_map(|(_, d)| d).collect())
    }

    /// Give up what takes too long.
    pub fn tick(&mut self, now: Instant) {
        self.partial.retain(|_, p| now.saturating_duration_since(p.since) < PATIENCE);
    }
}
