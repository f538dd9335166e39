//! The guest's time: its TSC as the host's plus an offset, and the paravirtual clock.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// The host's TSC.
pub(crate) fn host_tsc() -> u64 {
    // SAFETY: RDTSC only reads the counter; every x86-64 CPU has it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// Time of a VM, shared by its vCPUs.
pub(crate) struct VmTime {
    state: Mutex<State>,
}

struct State {
    /// TSC offset of a vCPU that has not been given a value of its own.
    first: u64,
    /// What pauses have added to every offset since the VM was made.
    shift: u64,
    /// Host TSC and paravirtual clock at which time stands still.
    stopped: Option<(u64, u64)>,
}

impl VmTime {
    /// TSC zero is now, and time runs.
    pub(crate) fn new() -> VmTime {
        VmTime { state: Mutex::new(State { first: host_tsc().wrapping_neg(), shift: 0, stopped: None }) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stop, at the paravirtual clock that `clock` gives. Does nothing while time stands still.
    pub(crate) fn stop(&self, clock: impl FnOnce() -> u64) {
        let mut s = self.lock();
        if s.stopped.is_none() {
            s.stopped = Some((host_tsc(), clock()));
        }
    }

    /// Start. Gives the paravirtual clock to go on from, if time stood still.
    pub(crate) fn start(&self) -> Option<u64> {
        let mut s = self.lock();
        let (at, clock) = s.stopped.take()?;
        s.shift = s.shift.wrapping_sub(host_tsc().wrapping_sub(at));
        Some(clock)
    }

    /// The clock at which time stands still.
    pub(crate) fn stopped_clock(&self) -> Option<u64> {
        self.lock().stopped.map(|s| s.1)
    }

    /// Change it; false if time runs.
    pub(crate) fn set_stopped_clock(&self, ns: u64) -> bool {
        let mut s = self.lock();
        s.stopped.as_mut().map(|s| s.1 = ns).is_some()
    }

    /// Host TSC that guest TSCs are counted from: now, or when time was stopped.
    pub(crate) fn moment(&self) -> u64 {
        self.lock().stopped.map_or_else(host_tsc, |s| s.0)
    }

    /// Ticks that all offsets are to be moved by.
    pub(crate) fn shift(&self) -> u64 {
        self.lock().shift
    }

    /// The offset that vCPUs have at first.
    pub(crate) fn first_offset(&self) -> u64 {
        self.lock().first
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_is_taken_off_every_offset() {
        let t = VmTime::new();
        assert_eq!((t.shift(), t.stopped_clock()), (0, None));
        t.stop(|| 77);
        let stood = t.moment();
        std::thread::sleep(std::time::Duration::from_millis(5));
        t.stop(|| unreachable!("it stands already"));
        assert_eq!((t.moment(), t.stopped_clock()), (stood, Some(77)));
        assert!(t.set_stopped_clock(99));
        assert_eq!(t.start(), Some(99));
        // A vCPU's TSC goes on at the value it had: host ticks plus shift.
        let resumed = host_tsc().wrapping_add(t.shift());
        assert!(resumed >= stood && resumed - stood < 5_000_000, "{stood} {resumed}");
        assert_eq!(t.start(), None);
        assert!(!t.set_stopped_clock(1));
    }
}
