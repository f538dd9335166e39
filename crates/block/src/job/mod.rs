//! Work on disks that takes long: copying, committing, rebasing.
//!
//! A [`Job`] is what such work and its watcher share: how far it is, how fast it may go, and whether it is to stop. The
//! functions here work on [`BlockBackend`](crate::BlockBackend)s and hold no lock over a piece, so that a guest may use
//! the same disks meanwhile.

mod commit;
mod copy;
mod rebase;
mod relay;

pub use commit::commit;
pub use copy::{CopyOptions, Target, copy, is_zero};
pub use rebase::rebase;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Bytes that a job takes at a time: a multiple of every cluster size.
pub const STEP: u64 = 2 << 20;
/// Most threads of a job.
pub const MAX_THREADS: usize = 16;

/// Called with the bytes done so far and those in all.
pub type Watch<'a> = &'a (dyn Fn(u64, u64) + Sync);

/// A job's state.
pub struct Job<'a> {
    total: u64,
    done: AtomicU64,
    stop: AtomicBool,
    /// Bytes per second, and when the clock started.
    rate: Option<u64>,
    start: Instant,
    gate: Mutex<()>,
    woken: Condvar,
    watch: Option<Watch<'a>>,
}

impl<'a> Job<'a> {
    /// A job over `total` bytes that tells `watch` how far it is and copies at most `rate` bytes per second.
    pub fn new(total: u64, rate: Option<u64>, watch: Option<Watch<'a>>) -> Job<'a> {
        Job {
            total,
            done: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            rate: rate.filter(|r| *r > 0),
            start: Instant::now(),
            gate: Mutex::new(()),
            woken: Condvar::new(),
            watch,
        }
    }

    /// End it soon; the function that does the work gives [`io::ErrorKind::Interrupted`].
    pub fn cancel(&self) {
        self.stop.store(true, Ordering::Release);
        let _held = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        self.woken.notify_all();
    }

    /// Bytes done.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Whether it is to end.
    pub fn cancelled(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// `bytes` more are done, of which `moved` count for the rate. Waits when it goes too fast.
    fn advance(&self, bytes: u64, moved: u64) -> io::Result<()> {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if let Some(w) = self.watch {
            w(done, self.total);
        }
        if let (Some(rate), true) = (self.rate, moved > 0) {
            let due = Duration::from_secs_f64(done as f64 / rate as f64);
            let mut held = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
            while let Some(wait) = due.checked_sub(self.start.elapsed()).filter(|w| !w.is_zero()) {
                if self.cancelled() {
                    break;
                }
                held = self.woken.wait_timeout(held, wait).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        if self.cancelled() { Err(io::ErrorKind::Interrupted.into()) } else { Ok(()) }
    }
}

/// The first piece from a given one on at which there is something to do; the end if there is none.
type Skip<'a> = &'a (dyn Fn(u64) -> u64 + Sync);

/// Do `work` for every piece of `size` bytes by several threads, until one fails. A step is told where its piece begins
/// and gets a buffer as long as the piece.
fn in_steps(
    size: u64,
    step: u64,
    threads: usize,
    work: impl Fn(u64, &mut [u8]) -> io::Result<()> + Sync,
) -> io::Result<()> {
    in_some_steps(size, step, threads, &|at| at, work)
}

/// As [`in_steps`] without what `skip` leaves out.
fn in_some_steps(
    size: u64,
    step: u64,
    threads: usize,
    skip: Skip<'_>,
    work: impl Fn(u64, &mut [u8]) -> io::Result<()> + Sync,
) -> io::Result<()> {
    let next = Mutex::new(0);
    let failed: Mutex<Option<io::Error>> = Mutex::new(None);
    let stop = AtomicBool::new(false);
    let run = || {
        let mut buffer = vec![0u8; step.min(size) as usize];
        while !stop.load(Ordering::Relaxed) {
            let at = {
                let mut next = next.lock().unwrap_or_else(PoisonError::into_inner);
                let at = if *next < size { skip(*next) } else { *next };
                *next = at.saturating_add(step);
                at
            };
            if at >= size {
                break;
            }
            let n = step.min(size - at);
            if let Err(e) = work(at, &mut buffer[..n as usize]) {
                stop.store(true, Ordering::Relaxed);
                failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(e);
            }
        }
    };
    let threads = (threads.clamp(1, MAX_THREADS) as u64).min(size.div_ceil(step)).max(1);
    std::thread::scope(|s| {
        for _ in 1..threads {
            s.spawn(run);
        }
        run();
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_keeps_its_rate_and_ends_when_told() {
        let seen = Mutex::new(Vec::new());
        let watch = |done, total| seen.lock().expect("lock").push((done, total));
        let job = Job::new(100, Some(1000), Some(&watch));
        let start = Instant::now();
        job.advance(50, 50).expect("goes on");
        assert!(start.elapsed() >= Duration::from_millis(45));
        assert_eq!(*seen.lock().expect("lock"), [(50, 100)]);
        // Work that waits is woken.
        let slow = Job::new(100, Some(1), None);
        std::thread::scope(|s| {
            let t = s.spawn(|| slow.advance(100, 100).map_err(|e| e.kind()));
            slow.cancel();
            assert_eq!(t.join().expect("ends"), Err(io::ErrorKind::Interrupted));
        });
    }

    #[test]
    fn every_piece_is_done_once_and_a_failure_ends_it() {
        let sum = AtomicU64::new(0);
        in_steps(10 * STEP + 7, STEP, 4, |_, b| {
            sum.fetch_add(b.len() as u64, Ordering::Relaxed);
            Ok(())
        })
        .expect("done");
        assert_eq!(sum.into_inner(), 10 * STEP + 7);
        let e = in_steps(STEP * 100, STEP, 4, |at, _| {
            if at == 3 * STEP { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(()) }
        });
        assert_eq!(e.expect_err("fails").kind(), io::ErrorKind::BrokenPipe);
    }
}
