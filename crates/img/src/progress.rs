//! `-p`: how far the work is, on standard output.

use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Counts work done by several threads.
pub struct Progress<'a> {
    out: Option<Mutex<&'a mut (dyn Write + Send)>>,
    total: u64,
    done: AtomicU64,
    shown: AtomicU64,
}

impl<'a> Progress<'a> {
    /// `total` units of work, shown if `wanted`.
    pub fn new(out: &'a mut (dyn Write + Send), wanted: bool, total: u64) -> Progress<'a> {
        let p = Progress {
            out: wanted.then(|| Mutex::new(out)),
            total: total.max(1),
            done: AtomicU64::new(0),
            shown: AtomicU64::new(0),
        };
        p.show(0.0);
        p
    }

    fn show(&self, percent: f64) {
        if let Some(out) = &self.out {
            let mut out = out.lock().unwrap_or_else(PoisonError::into_inner);
            // Work goes on when nobody listens.
            let _ = write!(out, "    ({percent:.2}/100%)\r").and_then(|()| out.flush());
        }
    }

    /// `units` more are done.
    pub fn add(&self, units: u64) {
        self.set(self.done.fetch_add(units, Ordering::Relaxed) + units);
    }

    /// `done` units are done in all.
    pub fn set(&self, done: u64) {
        let percent = (done as f64 / self.total as f64 * 100.0).min(100.0);
        if self.shown.fetch_max(percent as u64, Ordering::Relaxed) < percent as u64 {
            self.show(percent);
        }
    }

    /// All is done.
    pub fn end(self) {
        self.show(100.0);
        if let Some(out) = self.out {
            let out = out.into_inner().unwrap_or_else(PoisonError::into_inner);
            let _ = writeln!(out);
        }
    }
}
