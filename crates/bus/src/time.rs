//! Time as devices see it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Two clocks of the machine.
pub trait Clock: Send + Sync {
    /// Nanoseconds of machine time: monotonic, from machine start, stands still while the machine is paused.
    fn now_ns(&self) -> u64;
    /// Wall-clock time in nanoseconds since 1970-01-01 UTC.
    fn wall_ns(&self) -> u64;
}

/// One alarm of the machine's timer service. When it goes off, the service calls
/// [`TimerDevice::timer_expired`] of the device that it was bound to.
pub trait Timer: Send + Sync {
    /// Go off at `deadline_ns` of [`Clock::now_ns`] (at once if that has passed); replaces an earlier deadline.
    fn arm(&self, deadline_ns: u64);
    /// Do not go off. An expiry already under way may still arrive: devices re-check the clock.
    fn cancel(&self);
}

/// A device with timers.
pub trait TimerDevice: Send {
    /// Timer number `index` (the device's own numbering) may have expired; check the clock.
    fn timer_expired(&mut self, index: u32);
}

/// A clock that tests move by hand.
#[derive(Default)]
pub struct FakeClock {
    now: AtomicU64,
    wall_offset: AtomicU64,
}

impl FakeClock {
    /// A clock at zero.
    pub fn new() -> Arc<FakeClock> {
        Arc::default()
    }
    /// Move on.
    pub fn advance(&self, ns: u64) {
        self.now.fetch_add(ns, Ordering::SeqCst);
    }
    /// Set what wall time machine start was at.
    pub fn set_wall(&self, ns: u64) {
        self.wall_offset.store(ns, Ordering::SeqCst);
    }
}

impl Clock for FakeClock {
    fn now_ns(&self) -> u64 {
        self.now.load(Ordering::SeqCst)
    }
    fn wall_ns(&self) -> u64 {
        self.wall_offset.load(Ordering::SeqCst) + self.now_ns()
    }
}

/// A timer that only notes its deadline, for tests.
pub struct ManualTimer(AtomicU64);

impl ManualTimer {
    /// Not armed.
    pub fn new() -> Arc<ManualTimer> {
        Arc::new(ManualTimer(AtomicU64::new(u64::MAX)))
    }
    /// The deadline, if armed.
    pub fn deadline(&self) -> Option<u64> {
        Some(self.0.load(Ordering::SeqCst)).filter(|&d| d != u64::MAX)
    }
}

impl Timer for ManualTimer {
    fn arm(&self, deadline_ns: u64) {
        self.0.store(deadline_ns, Ordering::SeqCst);
    }
    fn cancel(&self) {
        self.0.store(u64::MAX, Ordering::SeqCst);
    }
}
