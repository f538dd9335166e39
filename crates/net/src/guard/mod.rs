//! Limits and checks in front of any back end: rates in both directions, and a guard against frames from addresses that are not
//! the guest's.
//!
//! A limit holds frames back and does not lose them: the guest's own queue fills, and what comes for the guest waits where it
//! comes from.

mod bucket;
#[cfg(test)]
mod tests;

pub use bucket::Rate;

use crate::{GsoKind, MacAddr, NetBackend, NetEvents, Offloads, Sent, VnetHeader};
use bucket::Bucket;
use ringfort_bus::lock;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::Instant;

/// Limits of one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limit {
    /// Bytes of frames.
    pub bytes: Option<Rate>,
    /// Packets as they are on a cable: a frame that is still to be cut counts as its parts.
    pub packets: Option<Rate>,
}

/// What is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GuardConfig {
    /// What the guest sends.
    pub tx: Limit,
    /// What the guest gets.
    pub rx: Limit,
    /// Lose what the guest sends from another address than its card's, and what says so in ARP.
    pub mac: bool,
}

impl GuardConfig {
    /// Whether there is nothing to check.
    pub fn is_empty(&self) -> bool {
        *self == GuardConfig::default()
    }

    /// What is wrong with it: the option, and what to do.
    pub fn problems(&self) -> Vec<(&'static str, String)> {
        [
            ("tx-rate", self.tx.bytes),
            ("tx-packets", self.tx.packets),
            ("rx-rate", self.rx.bytes),
            ("rx-packets", self.rx.packets),
        ]
        .into_iter()
        .filter(|(_, r)| r.is_some_and(|r| r.per_second == 0 || r.burst == 0))
        .map(|(name, _)| {
            (name, "a limit of 0 lets nothing pass; give at least 1, or leave it out".to_owned())
        })
        .collect()
    }
}

/// What a guard kept back or lost so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct GuardStatistics {
    /// Frames with another's address, lost.
    pub spoofed: u64,
    /// How often the guest had to wait.
    pub tx_held: u64,
    /// How often something for the guest had to wait.
    pub rx_held: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    Tx,
    Rx,
}

struct Buckets {
    bytes: Option<Bucket>,
    packets: Option<Bucket>,
    held: u64,
}

impl Buckets {
    fn new(l: &Limit, now: Instant) -> Buckets {
        let new = |r: Option<Rate>| r.map(|r| Bucket::new(r, now));
        Buckets { bytes: new(l.bytes), packets: new(l.packets), held: 0 }
    }

    /// When something may pass, if not now.
    fn closed_until(&mut self, now: Instant) -> Option<Instant> {
        let wait =
            [&mut self.bytes, &mut self.packets].into_iter().flatten().filter_map(|b| b.wait(now)).max()?;
        self.held += 1;
        Some(now + wait)
    }

    fn take(&mut self, header: &VnetHeader, frame: &[u8]) {
        if let Some(b) = &mut self.bytes {
            b.take(frame.len() as u64);
        }
        if let Some(b) = &mut self.packets {
            b.take(packets(header, frame));
        }
    }
}

/// How many packets a frame is on a cable. The header's own length of all headers is the guest's word, which it could give so that
/// a long frame counts as one.
fn packets(header: &VnetHeader, frame: &[u8]) -> u64 {
    let (Some((kind, size)), Some((start, _))) = (header.gso, header.checksum) else { return 1 };
    let start = usize::from(start);
    let of_transport = match kind {
        GsoKind::Udp => 8,
        GsoKind::Tcp4 | GsoKind::Tcp6 => frame.get(start + 12).map_or(0, |b| usize::from(b >> 4) * 4),
    };
    let payload = frame.len().saturating_sub(start + of_transport);
    payload.div_ceil(usize::from(size).max(1)).max(1) as u64
}

/// Wakes those that were held.
#[derive(Default)]
struct Alarm {
    state: Mutex<Alarms>,
    changed: Condvar,
}

#[derive(Default)]
struct Alarms {
    at: BTreeMap<(Way, u16), Instant>,
    stop: bool,
}

impl Alarm {
    fn set(&self, way: Way, pair: u16, at: Instant) {
        lock(&self.state).at.insert((way, pair), at);
        self.changed.notify_one();
    }

    fn run(&self, events: &OnceLock<Arc<dyn NetEvents>>) {
        let mut s = lock(&self.state);
        while !s.stop {
            let now = Instant::now();
            let due: Vec<_> = s.at.iter().filter(|(_, t)| **t <= now).map(|(k, _)| *k).collect();
            if !due.is_empty() {
                due.iter().for_each(|k| _ = s.at.remove(k));
                drop(s);
                for (way, pair) in due {
                    match (events.get(), way) {
                        (Some(e), Way::Tx) => e.writable(pair),
                        (Some(e), Way::Rx) => e.readable(pair),
                        (None, _) => {}
                    }
                }
                s = lock(&self.state);
                continue;
            }
            s = match s.at.values().min() {
                Some(next) => {
                    let wait = next.saturating_duration_since(now);
                    self.changed.wait_timeout(s, wait).map_or_else(|e| e.into_inner().0, |x| x.0)
                }
                None => self.changed.wait(s).unwrap_or_else(|e| e.into_inner()),
            };
        }
    }
}

/// A back end behind a guard.
pub struct Guard {
    inner: Arc<dyn NetBackend>,
    mac: Option<[u8; 6]>,
    spoofed: AtomicU64,
    tx: Option<Mutex<Buckets>>,
    rx: Option<Mutex<Buckets>>,
    events: Arc<OnceLock<Arc<dyn NetEvents>>>,
    alarm: Arc<Alarm>,
    thread: Option<JoinHandle<()>>,
}

impl Guard {
    /// Guard `inner`, the network of the card with the address `mac`.
    ///
    /// # Errors
    /// When the host gives no thread.
    pub fn new(inner: Arc<dyn NetBackend>, config: &GuardConfig, mac: MacAddr) -> io::Result<Guard> {
        let now = Instant::now();
        let buckets = |l: &Limit| (*l != Limit::default()).then(|| Mutex::new(Buckets::new(l, now)));
        let (tx, rx) = (buckets(&config.tx), buckets(&config.rx));
        let (alarm, events): (Arc<Alarm>, Arc<OnceLock<_>>) = Default::default();
        let thread = if tx.is_some() || rx.is_some() {
            let (alarm, events) = (alarm.clone(), events.clone());
            Some(std::thread::Builder::new().name("net-limit".into()).spawn(move || alarm.run(&events))?)
        } else {
            None
        };
        let mac = config.mac.then(|| mac.bytes());
        Ok(Guard { inner, mac, spoofed: AtomicU64::new(0), tx, rx, events, alarm, thread })
    }

    /// What it kept back or lost.
    pub fn statistics(&self) -> GuardStatistics {
        let held = |b: &Option<Mutex<Buckets>>| b.as_ref().map_or(0, |b| lock(b).held);
        GuardStatistics {
            spoofed: self.spoofed.load(Ordering::Relaxed),
            tx_held: held(&self.tx),
            rx_held: held(&self.rx),
        }
    }
}

/// Whether a frame is from the card with this address and says nothing else in ARP (RFC 826).
fn is_from(mac: &[u8; 6], frame: &[u8]) -> bool {
    if frame.get(6..12) != Some(mac) {
        return false;
    }
    // Behind VLAN tags, too.
    let mut at = 12;
    while matches!(frame.get(at..at + 2), Some([0x81, 0] | [0x88, 0xa8])) {
        at += 4;
    }
    frame.get(at..at + 2) != Some(&[8, 6]) || frame.get(at + 10..at + 16) == Some(mac)
}

impl Drop for Guard {
    fn drop(&mut self) {
        lock(&self.alarm.state).stop = true;
        self.alarm.changed.notify_one();
        if let Some(t) = self.thread.take() {
            let _ = t.join();
        }
    }
}

impl NetBackend for Guard {
    fn accepts(&self) -> Offloads {
        self.inner.accepts()
    }
    fn produces(&self) -> Offloads {
        self.inner.produces()
    }
    fn max_pairs(&self) -> u16 {
        self.inner.max_pairs()
    }
    fn mtu(&self) -> Option<u16> {
        self.inner.mtu()
    }
    fn attach(&self, events: Arc<dyn NetEvents>) {
        let _ = self.events.set(events.clone());
        self.inner.attach(events);
    }
    fn set_offloads(&self, offloads: Offloads) {
        self.inner.set_offloads(offloads);
    }
    fn set_pairs(&self, pairs: u16) {
        self.inner.set_pairs(pairs);
    }
    fn flush(&self, pair: u16) {
        self.inner.flush(pair);
    }
    fn counters(&self) -> Vec<(&'static str, u64)> {
        let s = self.statistics();
        let mut all = vec![("spoofed", s.spoofed), ("tx_held", s.tx_held), ("rx_held", s.rx_held)];
        all.extend(self.inner.counters());
        all
    }

    fn send(&self, pair: u16, header: &VnetHeader, frame: &[u8]) -> Sent {
        if self.mac.is_some_and(|m| !is_from(&m, frame)) {
            self.spoofed.fetch_add(1, Ordering::Relaxed);
            return Sent::Done;
        }
        let Some(buckets) = &self.tx else { return self.inner.send(pair, header, frame) };
        let mut b = lock(buckets);
        if let Some(at) = b.closed_until(Instant::now()) {
            drop(b);
            self.alarm.set(Way::Tx, pair, at);
            return Sent::Full;
        }
        let sent = self.inner.send(pair, header, frame);
        if sent == Sent::Done {
            b.take(header, frame);
        }
        sent
    }

    fn receive(&self, pair: u16, frame: &mut Vec<u8>) -> Option<VnetHeader> {
        let Some(buckets) = &self.rx else { return self.inner.receive(pair, frame) };
        let mut b = lock(buckets);
        if let Some(at) = b.closed_until(Instant::now()) {
            drop(b);
            self.alarm.set(Way::Rx, pair, at);
            return None;
        }
        let header = self.inner.receive(pair, frame)?;
        b.take(&header, frame);
        Some(header)
    }
}
