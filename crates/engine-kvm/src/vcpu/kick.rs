//! Making a vCPU leave the guest, from another thread.

use crate::vm::locked;
use kvm_bindings::kvm_run;
use ringfort_engine::Kick;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, Once};

/// The signal that interrupts KVM_RUN. The first real-time signal that neither the C library nor others commonly use.
fn signal() -> libc::c_int {
    libc::SIGRTMIN() + 2
}

extern "C" fn ignore(_: libc::c_int) {}

/// Take the signal, once per process: its arrival is all that matters.
pub(super) fn install() {
    static DONE: Once = Once::new();
    DONE.call_once(|| {
        // SAFETY: the handler does nothing, which is safe at any time. No SA_RESTART: KVM_RUN shall end. A zeroed sigaction is valid.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = ignore as *const () as usize;
            libc::sigemptyset(&mut action.sa_mask);
            libc::sigaction(signal(), &action, std::ptr::null_mut());
        }
    });
}

struct State {
    /// The page shared with the kernel; gone when the vCPU is.
    run: Option<*mut kvm_run>,
    /// The thread that is in a run.
    thread: Option<libc::pid_t>,
}

// SAFETY: the pointer is only used under the lock, to set one byte atomically, while the vCPU that maps it lives.
unsafe impl Send for State {}

/// What a vCPU can be reached by.
pub(crate) struct KickTarget {
    state: Mutex<State>,
    /// Somebody wants the run to end.
    asked: AtomicBool,
}

impl KickTarget {
    /// For the vCPU with this shared page.
    pub(super) fn new(run: *mut kvm_run) -> KickTarget {
        KickTarget {
            state: Mutex::new(State { run: Some(run), thread: None }),
            asked: AtomicBool::new(false),
        }
    }

    fn immediate_exit(s: &State, on: bool) {
        if let Some(run) = s.run {
            // SAFETY: the page is mapped while `run` is there, and the byte is only accessed atomically on this side.
            unsafe { AtomicU8::from_ptr(&raw mut (*run).immediate_exit) }.store(on.into(), Ordering::SeqCst);
        }
    }

    /// Make the run look around: it leaves the guest once and goes on.
    pub(crate) fn nudge(&self) {
        let s = locked(&self.state);
        // The flag makes the next entry end at once, should the signal come before it.
        Self::immediate_exit(&s, true);
        if let Some(thread) = s.thread {
            // SAFETY: signals a thread of this process, which is in a run as long as the lock is held.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal()) };
        }
    }

    /// A run begins on this thread.
    pub(super) fn enter(&self) {
        // SAFETY: gettid has no arguments and cannot fail.
        locked(&self.state).thread = Some(unsafe { libc::gettid() });
    }

    /// The run has ended.
    pub(super) fn leave(&self) {
        locked(&self.state).thread = None;
    }

    /// KVM_RUN was interrupted: true if the run shall end, else it was only to look around.
    pub(super) fn interrupted(&self) -> bool {
        let s = locked(&self.state);
        Self::immediate_exit(&s, false);
        self.asked.swap(false, Ordering::SeqCst)
    }

    /// The vCPU goes away.
    pub(super) fn gone(&self) {
        locked(&self.state).run = None;
    }
}

/// The engine seam's handle.
pub(super) struct Kicker(pub(super) Arc<KickTarget>);

impl Kick for Kicker {
    fn kick(&self) {
        self.0.asked.store(true, Ordering::SeqCst);
        self.0.nudge();
    }
}
