//! A device's side of its timer: says nothing to the timer service that it knows already.

use ringfort_bus::Timer;
use std::sync::Arc;

/// A timer and what it was last told. Registers are read far more often than deadlines change, and the service
/// behind a timer may be a system call away.
pub(crate) struct Alarm {
    timer: Arc<dyn Timer>,
    /// The deadline set, or that there is none; unknown after an expiry.
    known: Option<Option<u64>>,
}

impl Alarm {
    pub(crate) fn new(timer: Arc<dyn Timer>) -> Alarm {
        Alarm { timer, known: None }
    }

    pub(crate) fn arm(&mut self, deadline_ns: u64) {
        if self.known != Some(Some(deadline_ns)) {
            self.known = Some(Some(deadline_ns));
            self.timer.arm(deadline_ns);
        }
    }

    pub(crate) fn cancel(&mut self) {
        if self.known != Some(None) {
            self.known = Some(None);
            self.timer.cancel();
        }
    }

    /// The service called: what was set is used up, maybe.
    pub(crate) fn expired(&mut self) {
        self.known = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Calls(Mutex<Vec<Option<u64>>>);
    impl Timer for Calls {
        fn arm(&self, at: u64) {
            ringfort_bus::lock(&self.0).push(Some(at));
        }
        fn cancel(&self) {
            ringfort_bus::lock(&self.0).push(None);
        }
    }

    #[test]
    fn says_only_what_is_new() {
        let calls = Arc::new(Calls::default());
        let mut a = Alarm::new(calls.clone());
        a.cancel();
        a.cancel();
        a.arm(5);
        a.arm(5);
        a.expired();
        a.arm(5);
        a.cancel();
        assert_eq!(*ringfort_bus::lock(&calls.0), [None, Some(5), Some(5), None]);
    }
}
