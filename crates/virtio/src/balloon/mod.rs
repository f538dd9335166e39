//! Memory balloon (virtio 1.3 section 5.5): inflate and deflate, statistics, free page reporting.

mod release;
mod stats;
#[cfg(test)]
mod tests;

pub use release::{HostRelease, MemoryReleaser};
pub use stats::{BalloonStats, Stat};

use crate::{Chain, Queue, QueueError, Served, Signals, VirtioDevice};
use ringfort_bus::lock;
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, OnceLock};

const F_STATS_VQ: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_PAGE_POISON: u64 = 1 << 4;
const F_REPORTING: u64 = 1 << 5;

/// A balloon page in bytes, whatever the guest's page size.
const PAGE: u64 = 4096;
/// Page numbers read at a time.
const BATCH: usize = 1024;
/// Most page numbers of one request; drivers send a few hundred.
const MOST_PAGES: u64 = 64 << 10;

/// What the balloon offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BalloonOptions {
    /// The driver takes pages back when the guest is out of memory.
    pub deflate_on_oom: bool,
    /// The driver tells of free pages by itself.
    pub free_page_reporting: bool,
}

impl Default for BalloonOptions {
    fn default() -> Self {
        BalloonOptions { deflate_on_oom: true, free_page_reporting: true }
    }
}

/// What a queue is for. Which number it has depends on the features negotiated: queues of features that were not do not
/// exist, and the later ones move up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Stats,
    Reporting,
}

#[derive(Default)]
struct State {
    features: u64,
    /// Pages that the host wants, and that the driver says to have given.
    target: u32,
    actual: u32,
    poison: u32,
    stats: BalloonStats,
    /// The statistics buffer, kept until the host asks for new ones.
    held: Option<Held>,
    wanted: bool,
}

enum Held {
    Chain(Chain),
    /// From a saved state: its head.
    Head(u16),
}

#[derive(Serialize, Deserialize)]
struct Saved {
    features: u64,
    target: u32,
    actual: u32,
    poison: u32,
    stats: BalloonStats,
    held: Option<u16>,
}

/// A balloon.
pub struct Balloon {
    options: BalloonOptions,
    releaser: Arc<dyn MemoryReleaser>,
    state: Mutex<State>,
    signals: OnceLock<Arc<Signals>>,
}

impl Balloon {
    /// An empty balloon; pages that the guest gives go to `releaser`.
    pub fn new(options: BalloonOptions, releaser: Arc<dyn MemoryReleaser>) -> Balloon {
        Balloon { options, releaser, state: Mutex::default(), signals: OnceLock::new() }
    }

    /// Ask the guest to give `bytes` of its memory (rounded down to pages), or take back what is above.
    pub fn set_target(&self, bytes: u64) {
        lock(&self.state).target = u32::try_from(bytes / PAGE).unwrap_or(u32::MAX);
        if let Some(s) = self.signals.get() {
            s.config_changed();
        }
    }

    /// Bytes asked for.
    pub fn target(&self) -> u64 {
        u64::from(lock(&self.state).target) * PAGE
    }

    /// Bytes that the driver says to have given.
    pub fn actual(&self) -> u64 {
        u64::from(lock(&self.state).actual) * PAGE
    }

    /// The latest statistics.
    pub fn stats(&self) -> BalloonStats {
        lock(&self.state).stats.clone()
    }

    /// Ask the driver for new statistics; they arrive some time later.
    pub fn request_stats(&self) {
        let queue = {
            let mut s = lock(&self.state);
            s.wanted = true;
            roles(s.features).position(|r| r == Role::Stats)
        };
        if let (Some(s), Some(q)) = (self.signals.get(), queue) {
            s.kick(q as u16);
        }
    }

    fn inflate(&self, queue: &mut Queue) -> Result<Served, QueueError> {
        let mut pages = Vec::with_capacity(BATCH);
        let mut raw = [0; BATCH * 4];
        while let Some(chain) = queue.pop()? {
            let end = chain.readable().min(MOST_PAGES * 4);
            let mut at = 0;
            while at < end {
                let want = (end - at).min(raw.len() as u64) as usize;
                let n = chain.read(at, &mut raw[..want]);
                pages.clear();
                pages.extend(
                    raw[..n]
                        .chunks_exact(4)
                        .map(|b| u64::from(u32::from_le_bytes([b[0], b[1], b[2], b[3]])) * PAGE),
                );
                self.release_pages(&mut pages);
                at += n.max(1) as u64;
            }
            queue.complete(chain, 0);
        }
        Ok(Served::Drained)
    }

    /// Release pages, neighbours together.
    fn release_pages(&self, pages: &mut [u64]) {
        pages.sort_unstable();
        let mut rest = &*pages;
        while let Some(&start) = rest.first() {
            let mut end = start + PAGE;
            let run = rest.iter().take_while(|&&p| {
                let joins = p <= end;
                if p == end {
                    end += PAGE;
                }
                joins
            });
            let n = run.count();
            self.releaser.release(start, end - start);
            rest = &rest[n.max(1)..];
        }
    }

    /// The driver takes pages back: they come back from the host when they are touched.
    fn deflate(&self, queue: &mut Queue) -> Result<Served, QueueError> {
        while let Some(chain) = queue.pop()? {
            queue.complete(chain, 0);
        }
        Ok(Served::Drained)
    }

    fn report(&self, queue: &mut Queue) -> Result<Served, QueueError> {
        while let Some(chain) = queue.pop()? {
            // A poisoned page must still hold the poison when the guest sees it again; a released one holds zeroes.
            let poisoned = {
                let s = lock(&self.state);
                s.features & F_PAGE_POISON != 0 && s.poison != 0
            };
            if !poisoned {
                for (address, len) in chain.writable_ranges() {
                    let start = address.next_multiple_of(PAGE);
                    let end = (address + len) & !(PAGE - 1);
                    if start < end {
                        self.releaser.release(start, end - start);
                    }
                }
            }
            queue.complete(chain, 0);
        }
        Ok(Served::Drained)
    }

    fn statistics(&self, queue: &mut Queue) -> Result<Served, QueueError> {
        loop {
            let mut s = lock(&self.state);
            if s.held.is_some() {
                if !s.wanted {
                    return Ok(Served::Waiting);
                }
                s.wanted = false;
                match s.held.take() {
                    Some(Held::Chain(c)) => queue.push(c, 0),
                    Some(Held::Head(h)) => queue.push_head(h, 0),
                    None => {}
                }
                drop(s);
                queue.signal();
                continue;
            }
            let Some(chain) = queue.pop()? else { return Ok(Served::Drained) };
            s.stats = stats::parse(&chain);
            s.held = Some(Held::Chain(chain));
        }
    }
}

/// The queues that exist with these features, in order.
fn roles(features: u64) -> impl Iterator<Item = Role> {
    [
        (Role::Inflate, true),
        (Role::Deflate, true),
        (Role::Stats, features & F_STATS_VQ != 0),
        (Role::Reporting, features & F_REPORTING != 0),
    ]
    .into_iter()
    .filter_map(|(r, there)| there.then_some(r))
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> &'static str {
        "virtio-balloon"
    }

    fn device_type(&self) -> u16 {
        5
    }

    fn features(&self) -> u64 {
        F_STATS_VQ
            | if self.options.deflate_on_oom { F_DEFLATE_ON_OOM } else { 0 }
            | if self.options.free_page_reporting { F_REPORTING | F_PAGE_POISON } else { 0 }
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![128; roles(self.features()).count()]
    }

    /// Target, actual, free page hint (not offered), poison value.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let s = lock(&self.state);
        let words = [s.target, s.actual, 0, s.poison];
        for (at, b) in (offset..16).zip(data) {
            *b = words[at as usize / 4].to_le_bytes()[at as usize % 4];
        }
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        let &[a, b, c, d] = data else { return };
        let value = u32::from_le_bytes([a, b, c, d]);
        let mut s = lock(&self.state);
        match offset {
            4 => s.actual = value,
            12 => s.poison = value,
            _ => {}
        }
    }

    fn attach(&self, signals: Arc<Signals>) {
        let _ = self.signals.set(signals);
    }

    fn activate(&self, features: u64) {
        lock(&self.state).features = features;
    }

    fn service(&self, queue: &mut Queue) -> Result<Served, QueueError> {
        let features = lock(&self.state).features;
        match roles(features).nth(usize::from(queue.index())) {
            Some(Role::Inflate) => self.inflate(queue),
            Some(Role::Deflate) => self.deflate(queue),
            Some(Role::Stats) => self.statistics(queue),
            Some(Role::Reporting) => self.report(queue),
            None => Ok(Served::Waiting),
        }
    }

    fn reset(&self) {
        let mut s = lock(&self.state);
        let target = s.target;
        *s = State { target, ..State::default() };
    }

    fn save(&self) -> Vec<u8> {
        let s = lock(&self.state);
        crate::transport::encode(&Saved {
            features: s.features,
            target: s.target,
            actual: s.actual,
            poison: s.poison,
            stats: s.stats.clone(),
            held: s.held.as_ref().map(|h| match h {
                Held::Chain(c) => c.head(),
                Held::Head(h) => *h,
            }),
        })
    }

    fn load(&self, state: &[u8]) -> Result<(), String> {
        let s: Saved = crate::transport::decode(state)?;
        *lock(&self.state) = State {
            features: s.features,
            target: s.target,
            actual: s.actual,
            poison: s.poison,
            stats: s.stats,
            held: s.held.map(Held::Head),
            wanted: false,
        };
        Ok(())
    }
}
