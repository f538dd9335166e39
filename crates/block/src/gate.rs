//! A gate that many hold at once and one has alone. Holding it is a value that can be kept and moved, so that a request
//! under way in the kernel can hold it, which a lock's guard cannot.
//!
//! Neither side starves. Who comes after one that waits to be alone waits too, and after each that was alone those who
//! waited meanwhile go first. While requests in the kernel hold the gate, though, nobody waits for who waits to be alone:
//! the thread that is to collect those requests would wait for itself. No further such request comes in then, so that
//! this ends soon.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

#[derive(Default)]
struct State {
    /// Holds since the last [`Gate::grace`] began, and older ones: which of the two is which changes each time.
    shared: [usize; 2],
    young: usize,
    /// Someone waits for the older ones to end.
    grace: bool,
    /// Holds that end only when a thread gets round to it.
    kept: usize,
    /// So many wait to be alone.
    waiting: usize,
    alone: bool,
    /// So many have been.
    loners: u64,
    /// So many wait to share it; those who did when the last one that was alone left go before the next one.
    queued: usize,
    first: usize,
}

impl State {
    fn enter(&mut self, kept: bool) -> usize {
        self.shared[self.young] += 1;
        self.kept += usize::from(kept);
        self.young
    }

    fn occupied(&self) -> bool {
        self.shared != [0; 2]
    }
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

/// A share of a [`Gate`]. Who holds one must not ask to be alone, nor for another one by [`Gate::share`].
pub struct Hold {
    gate: Arc<Inner>,
    era: usize,
    kept: bool,
}

/// A [`Gate`] that nobody else is in.
pub struct Alone<'a>(&'a Inner);

impl Gate {
    fn hold(&self, era: usize, kept: bool) -> Hold {
        Hold { gate: self.0.clone(), era, kept }
    }

    /// Come in, once nobody is alone and whoever waits to be has been.
    pub fn share(&self) -> Hold {
        let mut s = self.0.state();
        if s.alone || s.waiting > 0 && s.kept == 0 {
            s.queued += 1;
            let before = s.loners;
            while s.alone || s.waiting > 0 && s.kept == 0 && s.loners == before {
                s = self.0.wait(s);
            }
            s.queued -= 1;
            s.first -= usize::from(s.loners != before);
        }
        self.hold(s.enter(false), false)
    }

    /// Come in if that takes no waiting.
    pub fn try_share(&self) -> Option<Hold> {
        self.try_enter(false)
    }

    /// As [`try_share`](Self::try_share) for a request in the kernel, whose hold a thread ends that may do something else
    /// before.
    pub fn try_keep(&self) -> Option<Hold> {
        self.try_enter(true)
    }

    fn try_enter(&self, kept: bool) -> Option<Hold> {
        let mut s = self.0.state();
        if s.alone || s.waiting > 0 {
            return None;
        }
        Some(self.hold(s.enter(kept), kept))
    }

    /// Be alone, once all others have left.
    pub fn alone(&self) -> Alone<'_> {
        let mut s = self.0.state();
        s.waiting += 1;
        while s.alone || s.occupied() || s.first > 0 {
            s = self.0.wait(s);
        }
        s.waiting -= 1;
        s.alone = true;
        Alone(&self.0)
    }

    /// Wait until whoever is in now has left. Others come and go meanwhile.
    pub fn grace(&self) {
        let mut s = self.0.state();
        while s.grace {
            s = self.0.wait(s);
        }
        s.grace = true;
        let old = s.young;
        s.young ^= 1;
        while s.shared[old] > 0 {
            s = self.0.wait(s);
        }
        s.grace = false;
        drop(s);
        self.0.changed.notify_all();
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut s = self.gate.state();
        s.shared[self.era] -= 1;
        s.kept -= usize::from(self.kept);
        if s.shared[self.era] == 0 && (s.grace || s.waiting > 0) {
            self.gate.changed.notify_all();
        }
    }
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        let mut s = self.0.state();
        s.alone = false;
        s.loners += 1;
        s.first = s.queued;
        drop(s);
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread::{scope, yield_now};

    fn until(gate: &Gate, state: impl Fn(&State) -> bool) {
        while !state(&gate.0.state()) {
            yield_now();
        }
    }

    #[test]
    fn one_that_waits_to_be_alone_goes_before_later_ones() {
        let (gate, alone_was) = (Gate::default(), AtomicUsize::new(0));
        let first = gate.share();
        scope(|s| {
            s.spawn(|| {
                let _alone = gate.alone();
                alone_was.store(1, Ordering::SeqCst);
            });
            until(&gate, |s| s.waiting == 1);
            assert!(gate.try_share().is_none() && gate.try_keep().is_none());
            s.spawn(|| {
                let _late = gate.share();
                assert_eq!(alone_was.load(Ordering::SeqCst), 1);
            });
            until(&gate, |s| s.queued == 1);
            drop(first);
        });
        assert!(gate.try_share().is_some());
    }

    #[test]
    fn who_waited_while_one_was_alone_goes_before_the_next_one() {
        let (gate, shared_was) = (Gate::default(), AtomicUsize::new(0));
        let first = gate.alone();
        scope(|s| {
            s.spawn(|| {
                let _shared = gate.share();
                shared_was.store(1, Ordering::SeqCst);
            });
            until(&gate, |s| s.queued == 1);
            s.spawn(|| {
                let _second = gate.alone();
                assert_eq!(shared_was.load(Ordering::SeqCst), 1);
            });
            until(&gate, |s| s.waiting == 1);
            drop(first);
        });
    }

    #[test]
    fn who_is_to_end_a_hold_does_not_wait_for_who_waits_for_that() {
        let gate = Gate::default();
        let in_kernel = gate.try_keep().unwrap();
        scope(|s| {
            let alone = s.spawn(|| drop(gate.alone()));
            until(&gate, |s| s.waiting == 1);
            // This thread comes in before it ends its hold; more it may not put into the kernel.
            drop(gate.share());
            assert!(gate.try_keep().is_none());
            drop(in_kernel);
            alone.join().unwrap();
        });
    }

    #[test]
    fn grace_waits_for_those_who_are_in_and_for_nobody_else() {
        let gate = Gate::default();
        for _ in 0..3 {
            let ended = AtomicUsize::new(0);
            let old = gate.share();
            scope(|s| {
                let grace = s.spawn(|| {
                    gate.grace();
                    assert_eq!(ended.load(Ordering::SeqCst), 1);
                });
                until(&gate, |s| s.grace);
                let young = (gate.share(), gate.try_share().unwrap(), gate.try_keep().unwrap());
                ended.store(1, Ordering::SeqCst);
                drop(old);
                grace.join().unwrap();
                drop(young);
            });
        }
        drop(gate.alone());
    }

    #[test]
    fn shares_and_loners_exclude_each_other() {
        let gate = Gate::default();
        let inside = AtomicUsize::new(0);
        scope(|s| {
            for n in 0..6 {
                let (gate, inside) = (&gate, &inside);
                s.spawn(move || {
                    for i in 0..2000 {
                        match n {
                            0 | 1 => {
                                let _alone = gate.alone();
                                assert_eq!(inside.load(Ordering::SeqCst), 0);
                            }
                            2 => gate.grace(),
                            _ => {
                                let hold = if i % 3 == 0 { gate.try_keep() } else { Some(gate.share()) };
                                let Some(_hold) = hold else { continue };
                                inside.fetch_add(1, Ordering::SeqCst);
                                inside.fetch_sub(1, Ordering::SeqCst);
                            }
                        }
                    }
                });
            }
        });
        assert!(!gate.0.state().occupied() && gate.0.state().kept == 0);
    }
}
