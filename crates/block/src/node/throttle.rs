//! Limits of speed, as QEMU's throttling has them: bytes and operations per second, for reads, writes, or both, with
//! bursts.
//!
//! Each limit is a leaky bucket. Its level rises with every request and sinks at the average rate; a request waits while
//! the bucket is fuller than it may be. Without a burst rate it holds a tenth of a second's worth, so that single
//! requests do not wait; with one it holds `max` times `length` seconds, and a second, smaller bucket keeps the
//! burst itself to its rate.

use crate::{BlockBackend, Limits, Located, SharedSlice, SharedSliceMut, Status, total, total_mut};
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The largest rate, per second.
pub const MAX_RATE: u64 = 1_000_000_000_000_000;

/// One limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Bucket {
    /// Units per second in the long run; 0 for no limit.
    pub avg: u64,
    /// Units per second in a burst; 0 for no bursts.
    pub max: u64,
    /// How long a burst may last, in seconds; 0 counts as 1.
    pub length: u64,
}

/// All limits of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ThrottleConfig {
    /// Bytes, read or written.
    pub bps: Bucket,
    /// Bytes read.
    pub bps_rd: Bucket,
    /// Bytes written.
    pub bps_wr: Bucket,
    /// Operations.
    pub iops: Bucket,
    /// Reads.
    pub iops_rd: Bucket,
    /// Writes.
    pub iops_wr: Bucket,
    /// Bytes that count as one operation: a larger request counts as several. 0: every request is one.
    pub iops_size: u64,
}

impl ThrottleConfig {
    /// Whether anything is limited.
    pub fn is_limited(&self) -> bool {
        self.named().iter().any(|(_, b)| b.avg > 0)
    }

    fn named(&self) -> [(&'static str, Bucket); 6] {
        [
            ("bps", self.bps),
            ("bps_rd", self.bps_rd),
            ("bps_wr", self.bps_wr),
            ("iops", self.iops),
            ("iops_rd", self.iops_rd),
            ("iops_wr", self.iops_wr),
        ]
    }

    /// Check that the limits go together.
    ///
    /// # Errors
    /// What does not, in words.
    pub fn validate(&self) -> Result<(), String> {
        for (both, rd, wr, what) in
            [(self.bps, self.bps_rd, self.bps_wr, "bps"), (self.iops, self.iops_rd, self.iops_wr, "iops")]
        {
            if both.avg > 0 && (rd.avg > 0 || wr.avg > 0) {
                return Err(format!("{what} limits both directions: give it, or {what}_rd and {what}_wr"));
            }
            if both.max > 0 && (rd.max > 0 || wr.max > 0) {
                return Err(format!(
                    "{what}_max limits both directions: give it, or {what}_rd_max and {what}_wr_max"
                ));
            }
        }
        for (name, b) in self.named() {
            if b.avg > MAX_RATE || b.max > MAX_RATE {
                return Err(format!("{name}: at most {MAX_RATE} per second"));
            }
            if b.max > 0 && b.avg == 0 {
                return Err(format!("{name}_max needs {name}"));
            }
            if b.max > 0 && b.max < b.avg {
                return Err(format!("{name}_max={} is less than {name}={}", b.max, b.avg));
            }
            if b.length > 1 && b.max == 0 {
                return Err(format!("{name}_max_length needs {name}_max"));
            }
            if b.length > 0 && u128::from(b.max) * u128::from(b.length) > u128::from(MAX_RATE) {
                return Err(format!("{name}_max_length={}: the burst is too long for its rate", b.length));
            }
        }
        if self.iops_size > 0 && [self.iops, self.iops_rd, self.iops_wr].iter().all(|b| b.avg == 0) {
            return Err("iops_size needs iops, iops_rd or iops_wr".into());
        }
        Ok(())
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Level {
    rule: Bucket,
    level: f64,
    burst: f64,
}

impl Level {
    fn leak(&mut self, seconds: f64) {
        self.level = (self.level - self.rule.avg as f64 * seconds).max(0.0);
        self.burst = (self.burst - self.rule.max as f64 * seconds).max(0.0);
    }

    /// Seconds until the next request may go.
    fn wait(&self) -> f64 {
        let b = self.rule;
        if b.avg == 0 {
            return 0.0;
        }
        let (avg, max) = (b.avg as f64, b.max as f64);
        let room = if b.max == 0 { avg / 10.0 } else { max * b.length.max(1) as f64 };
        let over = self.level - room;
        if over > 0.0 {
            return over / avg;
        }
        if b.length > 1 {
            return ((self.burst - max / 10.0) / max).max(0.0);
        }
        0.0
    }
}

struct State {
    at: Instant,
    /// In the order of [`ThrottleConfig::named`].
    levels: [Level; 6],
}

/// The limits of one disk, and how far they are used.
pub struct Throttle {
    state: Mutex<State>,
    iops_size: u64,
}

/// Which levels count for a direction.
const READS: [usize; 4] = [0, 1, 3, 4];
const WRITES: [usize; 4] = [0, 2, 3, 5];

impl Throttle {
    /// Limits that [`ThrottleConfig::validate`] approved.
    pub fn new(config: &ThrottleConfig) -> Throttle {
        let levels = config.named().map(|(_, rule)| Level { rule, ..Level::default() });
        Throttle { state: Mutex::new(State { at: Instant::now(), levels }), iops_size: config.iops_size }
    }

    /// Let a request of `len` bytes go and count it, or say how long it has to wait before it may ask again.
    pub fn admit(&self, write: bool, len: u64, now: Instant) -> Result<(), Duration> {
        let mut s = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let passed = now.saturating_duration_since(s.at).as_secs_f64();
        s.at = s.at.max(now);
        s.levels.iter_mut().for_each(|l| l.leak(passed));
        let mine = if write { WRITES } else { READS };
        let wait = mine.iter().map(|&i| s.levels[i].wait()).fold(0.0, f64::max);
        if wait > 0.0 {
            // Rounded up, so that it is over then.
            return Err(Duration::from_secs_f64(wait.min(3600.0)) + Duration::from_micros(1));
        }
        let ops =
            if self.iops_size > 0 && len > self.iops_size { len as f64 / self.iops_size as f64 } else { 1.0 };
        for i in mine {
            let units = if i < 3 { len as f64 } else { ops };
            s.levels[i].level += units;
            s.levels[i].burst += units;
        }
        Ok(())
    }

    fn pass(&self, write: bool, len: u64) {
        while let Err(wait) = self.admit(write, len, Instant::now()) {
            std::thread::sleep(wait);
        }
    }
}

/// A disk with limits of speed. Flushes pass at once.
pub struct Throttled {
    limits: Arc<Throttle>,
    below: Arc<dyn BlockBackend>,
}

impl Throttled {
    /// `below`, no faster than `limits` allow.
    pub fn new(below: Arc<dyn BlockBackend>, limits: Arc<Throttle>) -> Throttled {
        Throttled { limits, below }
    }
}

impl BlockBackend for Throttled {
    fn size(&self) -> u64 {
        self.below.size()
    }
    fn read_only(&self) -> bool {
        self.below.read_only()
    }
    fn limits(&self) -> Limits {
        self.below.limits()
    }
    fn read_at(&self, bufs: &[SharedSliceMut<'_>], offset: u64) -> io::Result<()> {
        self.limits.pass(false, total_mut(bufs));
        self.below.read_at(bufs, offset)
    }
    fn write_at(&self, bufs: &[SharedSlice<'_>], offset: u64) -> io::Result<()> {
        self.limits.pass(true, total(bufs));
        self.below.write_at(bufs, offset)
    }
    fn locate(&self, _: bool, _: u64, _: u64, _: &mut Located) -> io::Result<bool> {
        Ok(false)
    }
    fn paced(&self) -> Option<(Arc<Throttle>, Arc<dyn BlockBackend>)> {
        Some((self.limits.clone(), self.below.clone()))
    }
    fn flush(&self) -> io::Result<()> {
        self.below.flush()
    }
    fn flush_is_quick(&self) -> bool {
        self.below.flush_is_quick()
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.limits.pass(true, len);
        self.below.discard(offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.limits.pass(true, len);
        self.below.write_zeroes(offset, len, unmap)
    }
    fn status(&self, offset: u64, len: u64) -> io::Result<Status> {
        self.below.status(offset, len)
    }
    fn come_to_rest(&self) -> io::Result<()> {
        self.below.come_to_rest()
    }
    fn resize(&self, size: u64) -> io::Result<()> {
        self.below.resize(size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(avg: u64, max: u64, length: u64) -> Bucket {
        Bucket { avg, max, length }
    }

    /// Requests of `len` bytes as fast as they may go, on a clock of the test's own; gives how many went in `seconds`.
    fn run(config: &ThrottleConfig, write: bool, len: u64, seconds: u64) -> u64 {
        config.validate().unwrap();
        let t = Throttle::new(config);
        let start = Instant::now();
        let (mut now, mut count) = (start, 0);
        while now < start + Duration::from_secs(seconds) {
            match t.admit(write, len, now) {
                Ok(()) => count += 1,
                Err(wait) => now += wait,
            }
        }
        count
    }

    fn near(found: u64, wanted: u64) {
        assert!(found.abs_diff(wanted) <= wanted / 50 + 2, "{found}, wanted {wanted}");
    }

    #[test]
    fn averages_hold() {
        let iops = ThrottleConfig { iops: rule(100, 0, 0), ..Default::default() };
        near(run(&iops, true, 4096, 10), 1000 + 10);
        near(run(&iops, false, 1 << 20, 10), 1000 + 10);
        let bps = ThrottleConfig { bps_wr: rule(1 << 20, 0, 0), ..Default::default() };
        near(run(&bps, true, 65536, 20), 16 * 20 + 2);
        let sized = ThrottleConfig { iops: rule(100, 0, 0), iops_size: 4096, ..Default::default() };
        near(run(&sized, false, 16384, 10), 250 + 3);
    }

    #[test]
    fn directions_are_apart() {
        let c = ThrottleConfig { iops_rd: rule(10, 0, 0), bps_wr: rule(512, 0, 0), ..Default::default() };
        near(run(&c, false, 1 << 20, 10), 101);
        let t = Throttle::new(&c);
        let now = Instant::now();
        while t.admit(true, 512, now).is_ok() {}
        assert!(t.admit(false, 512, now).is_ok(), "a full write bucket holds up reads");
    }

    #[test]
    fn bursts_last_as_long_as_they_may() {
        // A burst of 1000 a second for 5 seconds' worth, then 100 a second.
        let c = ThrottleConfig { iops: rule(100, 1000, 5), ..Default::default() };
        let (two, ten) = (run(&c, true, 512, 2), run(&c, true, 512, 10));
        near(two, 2000 + 100);
        near(ten, 5000 + 1000);
        // Without a length a burst is a second's worth at any speed.
        let c = ThrottleConfig { iops: rule(100, 1000, 0), ..Default::default() };
        near(run(&c, true, 512, 1), 1100);
    }

    #[test]
    fn limits_that_do_not_go_together_are_told() {
        for (c, says) in [
            (ThrottleConfig { bps: rule(1, 0, 0), bps_rd: rule(1, 0, 0), ..Default::default() }, "bps_rd"),
            (ThrottleConfig { iops: rule(0, 5, 0), ..Default::default() }, "iops_max needs iops"),
            (ThrottleConfig { iops: rule(9, 5, 0), ..Default::default() }, "less than"),
            (ThrottleConfig { iops: rule(9, 0, 5), ..Default::default() }, "iops_max_length needs"),
            (ThrottleConfig { bps: rule(9, 0, 0), iops_size: 5, ..Default::default() }, "iops_size needs"),
            (ThrottleConfig { bps: rule(MAX_RATE + 1, 0, 0), ..Default::default() }, "at most"),
            (ThrottleConfig { bps: rule(1, MAX_RATE, 9), ..Default::default() }, "too long"),
        ] {
            let told = c.validate().unwrap_err();
            assert!(told.contains(says), "{told}");
        }
        assert!(ThrottleConfig::default().validate().is_ok() && !ThrottleConfig::default().is_limited());
    }
}
