//! Reading ahead of a writer: for targets that take one write at a time anyway, such as a file in the host's page cache.

use super::{MAX_THREADS, Skip};
use std::collections::VecDeque;
use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

struct Filled<T> {
    at: u64,
    buffer: Vec<u8>,
    len: usize,
    what: T,
}

struct State<T> {
    /// Where the next piece begins.
    next: u64,
    free: Vec<Vec<u8>>,
    ready: VecDeque<Filled<T>>,
    filling: usize,
    writing: bool,
    failed: Option<io::Error>,
}

/// What a thread does next.
enum Turn<T> {
    Fill(u64, Vec<u8>),
    Write(Filled<T>),
    Done,
}

struct Relay<'a, T> {
    size: u64,
    step: u64,
    skip: Skip<'a>,
    state: Mutex<State<T>>,
    changed: Condvar,
}

impl<T> Relay<'_, T> {
    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whoever has written goes on writing as long as others have something ready, so that writing never waits for a
    /// thread to wake up; who finds a writer at work reads.
    fn turn(&self) -> Turn<T> {
        let mut s = self.state();
        loop {
            if s.failed.is_some() {
                return Turn::Done;
            }
            if !s.writing {
                // The first piece there is: files are then laid out in order.
                let first = (0..s.ready.len()).min_by_key(|i| s.ready[*i].at);
                if let Some(f) = first.and_then(|i| s.ready.remove(i)) {
                    s.writing = true;
                    return Turn::Write(f);
                }
            }
            if s.next < self.size && !s.free.is_empty() {
                s.next = (self.skip)(s.next);
                if s.next >= self.size {
                    // Who waits for a piece may end.
                    self.changed.notify_all();
                } else if let Some(buffer) = s.free.pop() {
                    let at = s.next;
                    s.next += self.step;
                    s.filling += 1;
                    return Turn::Fill(at, buffer);
                }
            }
            if s.next >= self.size && s.filling == 0 && s.ready.is_empty() {
                return Turn::Done;
            }
            s = self.changed.wait(s).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn end(&self, change: impl FnOnce(&mut State<T>) -> io::Result<()>) {
        let mut s = self.state();
        if let Err(e) = change(&mut s) {
            s.failed.get_or_insert(e);
        }
        drop(s);
        self.changed.notify_all();
    }
}

/// `fill` every piece of `step` bytes of `size` by several threads, and `write` each by one thread at a time, until
/// something fails. Both are told where the piece begins; `write` gets what `fill` said of it. What `skip` says is left out.
pub fn relay<T: Send>(
    size: u64,
    step: u64,
    threads: usize,
    skip: Skip<'_>,
    fill: impl Fn(u64, &mut [u8]) -> io::Result<T> + Sync,
    write: impl Fn(u64, &[u8], T) -> io::Result<()> + Sync,
) -> io::Result<()> {
    let threads = (threads.clamp(1, MAX_THREADS) as u64).min(size.div_ceil(step)).max(1) as usize;
    let buffers = if threads == 1 { 1 } else { threads * 2 };
    let state = State {
        next: 0,
        free: (0..buffers).map(|_| vec![0; step.min(size) as usize]).collect(),
        ready: VecDeque::new(),
        filling: 0,
        writing: false,
        failed: None,
    };
    let r = Relay { size, step, skip, state: Mutex::new(state), changed: Condvar::new() };
    let run = || {
        loop {
            match r.turn() {
                Turn::Done => return,
                Turn::Fill(at, mut buffer) => {
                    let len = step.min(size - at) as usize;
                    let done = fill(at, &mut buffer[..len]);
                    r.end(|s| {
                        s.filling -= 1;
                        s.ready.push_back(Filled { at, buffer, len, what: done? });
                        Ok(())
                    });
                }
                Turn::Write(f) => {
                    let done = write(f.at, &f.buffer[..f.len], f.what);
                    r.end(|s| {
                        s.writing = false;
                        s.free.push(f.buffer);
                        done
                    });
                }
            }
        }
    };
    std::thread::scope(|s| {
        for _ in 1..threads {
            s.spawn(run);
        }
        run();
    });
    r.state.into_inner().unwrap_or_else(PoisonError::into_inner).failed.map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    #[test]
    fn every_piece_is_written_once_and_one_at_a_time() {
        for threads in [1, 2, 5] {
            let (inside, sum) = (AtomicBool::new(false), AtomicU64::new(0));
            relay(
                100_003,
                100,
                threads,
                &|at| at,
                |at, b| {
                    b.fill(at as u8);
                    Ok(at)
                },
                |at, b, what| {
                    assert!(!inside.swap(true, Ordering::SeqCst), "two write at once");
                    assert!(what == at && b.iter().all(|x| *x == at as u8));
                    sum.fetch_add(b.len() as u64 * (at + 1), Ordering::Relaxed);
                    inside.store(false, Ordering::SeqCst);
                    Ok(())
                },
            )
            .expect("done");
            let want: u64 = (0..1001).map(|i| (i * 100 + 1) * if i == 1000 { 3 } else { 100 }).sum();
            assert_eq!(sum.into_inner(), want);
        }
        relay(0, 100, 3, &|at| at, |_, _| Ok(()), |_, _, ()| Err(io::ErrorKind::Other.into()))
            .expect("nothing to do");
    }

    #[test]
    fn what_is_skipped_is_neither_read_nor_written() {
        for threads in [1, 4] {
            let seen = Mutex::new(Vec::new());
            // Nothing lies from 300 on to 90000, and nothing after 90200.
            let skip = |at| match at {
                300.. if at < 90_000 => 90_000,
                90_200.. => 100_000,
                at => at,
            };
            let write = |at, _: &[u8], filled| {
                assert_eq!(at, filled);
                seen.lock().unwrap().push(at);
                Ok(())
            };
            relay(100_000, 100, threads, &skip, |at, _| Ok(at), write).expect("done");
            let mut seen = seen.into_inner().unwrap();
            seen.sort_unstable();
            assert_eq!(seen, [0, 100, 200, 90_000, 90_100]);
        }
    }

    #[test]
    fn a_failure_of_either_side_ends_it() {
        for threads in [1, 4] {
            let fails =
                |bad: bool| if bad { Err(io::Error::from(io::ErrorKind::BrokenPipe)) } else { Ok(()) };
            let e = relay(1 << 20, 512, threads, &|at| at, |at, _| fails(at == 51_200), |_, _, ()| Ok(()));
            assert_eq!(e.expect_err("fails").kind(), io::ErrorKind::BrokenPipe);
            let e = relay(1 << 20, 512, threads, &|at| at, |_, _| Ok(()), |at, _, ()| fails(at == 51_200));
            assert_eq!(e.expect_err("fails").kind(), io::ErrorKind::BrokenPipe);
        }
    }
}
