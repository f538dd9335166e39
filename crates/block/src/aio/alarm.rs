//! Wakes lanes at a time: requests that a limit of speed holds back.

use super::lane::Wake;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::Instant;

struct Entry {
    at: Instant,
    wake: Arc<Wake>,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Entry) -> bool {
        self.at == other.at
    }
}
impl Eq for Entry {}
impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Entry) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Entry {
    fn cmp(&self, other: &Entry) -> std::cmp::Ordering {
        self.at.cmp(&other.at)
    }
}

#[derive(Default)]
struct Clock {
    entries: Mutex<BinaryHeap<Reverse<Entry>>>,
    changed: Condvar,
}

/// Wake `wake` at `at`.
pub fn set(at: Instant, wake: Arc<Wake>) {
    static CLOCK: OnceLock<Arc<Clock>> = OnceLock::new();
    let clock = CLOCK.get_or_init(|| {
        let clock = Arc::new(Clock::default());
        let mine = clock.clone();
        // Without the thread, requests that are held back go on at the next one's arrival or completion.
        let _ = std::thread::Builder::new().name("disk-pace".into()).spawn(move || run(&mine));
        clock
    });
    clock.entries.lock().unwrap_or_else(PoisonError::into_inner).push(Reverse(Entry { at, wake }));
    clock.changed.notify_one();
}

fn run(clock: &Clock) {
    let mut entries = clock.entries.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        let now = Instant::now();
        entries = match entries.peek() {
            None => clock.changed.wait(entries).unwrap_or_else(PoisonError::into_inner),
            Some(Reverse(e)) if e.at > now => {
                let left = e.at - now;
                clock.changed.wait_timeout(entries, left).map_or_else(|e| e.into_inner().0, |r| r.0)
            }
            Some(_) => {
                if let Some(Reverse(e)) = entries.pop() {
                    e.wake.wake();
                }
                entries
            }
        };
    }
}
