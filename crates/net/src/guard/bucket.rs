//! Token buckets.

use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// So much per second, and so much at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// Bytes or packets per second; not 0.
    pub per_second: u64,
    /// What may pass at once after a rest; not 0.
    pub burst: u64,
}

/// A bucket that fills at a rate. What is larger than the bucket passes a full one, and is paid off afterwards.
#[derive(Debug)]
pub struct Bucket {
    rate: Rate,
    /// Below zero when something large has passed.
    level: f64,
    at: Instant,
}

impl Bucket {
    /// A full one.
    pub fn new(rate: Rate, now: Instant) -> Bucket {
        Bucket { rate, level: rate.burst as f64, at: now }
    }

    /// How long nothing passes; `None` when something may.
    pub fn wait(&mut self, now: Instant) -> Option<Duration> {
        let gained = now.saturating_duration_since(self.at).as_secs_f64() * self.rate.per_second as f64;
        self.level = (self.level + gained).min(self.rate.burst as f64);
        self.at = self.at.max(now);
        // One of the unit must be there, as far as the bucket can hold it.
        let missing = 1.0 - self.level;
        if missing <= 0.0 {
            return None;
        }
        // A year stands for rates that would wait longer than a clock can tell.
        Some(Duration::from_secs_f64((missing / self.rate.per_second as f64).min(31_536_000.0)))
    }

    /// Something passed.
    pub fn take(&mut self, amount: u64) {
        self.level -= amount as f64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_then_the_rate() {
        let start = Instant::now();
        let mut b = Bucket::new(Rate { per_second: 1000, burst: 5000 }, start);
        for _ in 0..5 {
            assert_eq!(b.wait(start), None);
            b.take(1000);
        }
        let mut now = start;
        let mut passed = 0;
        while now < start + Duration::from_secs(10) {
            match b.wait(now) {
                Some(d) => now += d,
                None => {
                    b.take(100);
                    passed += 100;
                }
            }
        }
        assert!((9_900..=10_200).contains(&passed), "{passed}");
        assert_eq!(b.wait(now + Duration::from_secs(1000)), None);
        assert!(b.level <= 5000.0);
    }

    #[test]
    fn what_is_larger_than_the_bucket_is_paid_off() {
        let start = Instant::now();
        let mut b = Bucket::new(Rate { per_second: 100, burst: 100 }, start);
        assert_eq!(b.wait(start), None);
        b.take(1100);
        let wait = b.wait(start).unwrap();
        assert!((9.9..10.1).contains(&wait.as_secs_f64()), "{wait:?}");
        // Clocks do not run backwards; if one did, nothing would be gained twice.
        assert!(b.wait(start - Duration::from_secs(5)).is_some());
        let mut slow = Bucket::new(Rate { per_second: 1, burst: 1 }, start);
        slow.take(u64::MAX);
        assert!(slow.wait(start).is_some());
    }
}
