//! A gate that many hold at once and one has alone. Holding it is a value that can be kept and moved, so that a request
//! under way in the kernel can hold it, which a lock's guard cannot.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

#[derive(Default)]
struct State {
    shared: usize,
    /// So many wait to be alone: nobody comes in by [`Gate::try_share`] before. [`Gate::share`] does not wait for them.
    waiting: usize,
    alone: bool,
}

#[derive(Default)]
struct Inner {
    state: Mutex<State>,
    changed: Condvar,
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, s: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(s).unwrap_or_else(PoisonError::into_inner)
    }
}

/// The gate.
#[derive(Default)]
pub struct Gate(Arc<Inner>);

/// A share of a [`Gate`]. Who holds one must not ask to be alone.
pub struct Hold(Arc<Inner>);

/// A [`Gate`] that nobody else is in.
pub struct Alone<'a>(&'a Inner);

impl Gate {
    /// Come in, once nobody is alone. Who waits to be alone is not waited for: it may wait for a hold that only this thread can end.
    pub fn share(&self) -> Hold {
        let mut s = self.0.state();
        while s.alone {
            s = self.0.wait(s);
        }
        s.shared += 1;
        Hold(self.0.clone())
    }

    /// Come in if that takes no waiting.
    pub fn try_share(&self) -> Option<Hold> {
        let mut s = self.0.state();
        if s.alone || s.waiting > 0 {
            return None;
        }
        s.shared += 1;
        Some(Hold(self.0.clone()))
    }

    /// Be alone, once all others have left.
    pub fn alone(&self) -> Alone<'_> {
        let mut s = self.0.state();
        s.waiting += 1;
        while s.alone || s.shared > 0 {
            s = self.0.wait(s);
        }
        s.waiting -= 1;
        s.alone = true;
        Alone(&self.0)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut s = self.0.state();
        s.shared -= 1;
        if s.shared == 0 && s.waiting > 0 {
            self.0.changed.notify_all();
        }
    }
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        self.0.state().alone = false;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn one_that_waits_to_be_alone_goes_before_later_ones() {
        let gate = Gate::default();
        let first = gate.share();
        std::thread::scope(|s| {
            let alone = s.spawn(|| drop(gate.alone()));
            // It is on its way in when others are kept out.
            while gate.try_share().is_some() {
                std::thread::yield_now();
            }
            drop(first);
            alone.join().unwrap();
        });
        assert!(gate.try_share().is_some());
    }

    #[test]
    fn shares_and_loners_exclude_each_other() {
        let gate = Gate::default();
        let inside = AtomicUsize::new(0);
        std::thread::scope(|s| {
            for n in 0..4 {
                let (gate, inside) = (&gate, &inside);
                s.spawn(move || {
                    for _ in 0..2000 {
                        if n == 0 {
                            let _alone = gate.alone();
                            assert_eq!(inside.load(Ordering::SeqCst), 0);
                        } else {
                            let _shared = gate.share();
                            inside.fetch_add(1, Ordering::SeqCst);
                            inside.fetch_sub(1, Ordering::SeqCst);
                        }
                    }
                });
            }
        });
    }
}
