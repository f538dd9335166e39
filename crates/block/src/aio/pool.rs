//! Threads that may wait. They come when there is more work than threads at leisure, and leave when they find none.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, OnceLock, PoisonError};
use std::time::Duration;

/// Most threads, whatever the number of disks: as many as QEMU's pool has.
const MAX_THREADS: usize = 64;
/// How long a thread waits for work before it leaves.
const LEISURE: Duration = Duration::from_secs(10);

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

#[derive(Default)]
struct Pool {
    state: Mutex<State>,
    work: Condvar,
}

fn pool() -> &'static Pool {
    static POOL: OnceLock<Pool> = OnceLock::new();
    POOL.get_or_init(Pool::default)
}

/// Have a thread do `job`. Where the host gives no thread at all, the caller does it.
pub fn spawn(job: impl FnOnce() + Send + 'static) {
    let pool = pool();
    let mut s = pool.state.lock().unwrap_or_else(PoisonError::into_inner);
    s.jobs.push_back(Box::new(job));
    if s.idle >= s.jobs.len() {
        pool.work.notify_one();
        return;
    }
    if s.threads < MAX_THREADS {
        s.threads += 1;
        match std::thread::Builder::new().name("disk-io".into()).spawn(move || run(pool)) {
            Ok(_) => return,
            Err(_) => s.threads -= 1,
        }
    }
    pool.work.notify_one();
    if s.threads == 0
        && let Some(job) = s.jobs.pop_back()
    {
        drop(s);
        job();
    }
}

fn run(pool: &Pool) {
    let mut s = pool.state.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        if let Some(job) = s.jobs.pop_front() {
            drop(s);
            job();
            s = pool.state.lock().unwrap_or_else(PoisonError::into_inner);
            continue;
        }
        s.idle += 1;
        let (again, late) = match pool.work.wait_timeout(s, LEISURE) {
            Ok((s, t)) => (s, t.timed_out()),
            Err(e) => (e.into_inner().0, false),
        };
        s = again;
        s.idle -= 1;
        if late && s.jobs.is_empty() {
            s.threads -= 1;
            return;
        }
    }
}
