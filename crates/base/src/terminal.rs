//! The terminal in raw mode, put back however the process ends.
//!
//! A [`RawTerminal`] restores the settings when dropped, when any thread panics (before the message is printed), and
//! when a signal ends the process. `SIGKILL` alone cannot be helped.

use std::{
    cell::UnsafeCell,
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::{
        Once,
        atomic::{AtomicBool, AtomicI32, Ordering},
    },
};

/// Signals whose default is to end the process, and that a VMM may meet.
const FATAL: [libc::c_int; 14] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGILL,
    libc::SIGTRAP,
    libc::SIGABRT,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGSEGV,
    libc::SIGTERM,
    libc::SIGXCPU,
    libc::SIGXFSZ,
    libc::SIGSYS,
    libc::SIGUSR1,
];

/// What a signal handler must know, readable without locks.
struct Saved {
    /// The terminal to restore, or -1. Written last when set and first when cleared.
    fd: AtomicI32,
    settings: UnsafeCell<MaybeUninit<libc::termios>>,
    /// What the signals of [`FATAL`] did before, same order.
    previous: UnsafeCell<[MaybeUninit<libc::sigaction>; FATAL.len()]>,
}

// SAFETY: `settings` is written only by the one thread that won `TAKEN`, while `fd` is -1, and read only after `fd` was
// seen to be set. Each of `previous` is written once, under a `Once`, before the handler that reads it is installed.
unsafe impl Sync for Saved {}

static SAVED: Saved = Saved {
    fd: AtomicI32::new(-1),
    settings: UnsafeCell::new(MaybeUninit::uninit()),
    previous: UnsafeCell::new([const { MaybeUninit::uninit() }; FATAL.len()]),
};
static TAKEN: AtomicBool = AtomicBool::new(false);
static HOOKS: Once = Once::new();

/// A terminal in raw mode: bytes go both ways as they are, nothing is echoed, no key makes a signal. One per process.
///
/// While it lives, a message meant for the terminal must end its lines in `\r\n`.
#[derive(Debug)]
pub struct RawTerminal {
    /// A descriptor of our own, so that the handlers do not act on one that was closed and given out anew.
    _fd: OwnedFd,
}

impl RawTerminal {
    /// Put the terminal `fd` into raw mode; `None` if `fd` is no terminal.
    ///
    /// # Errors
    /// When another guard lives, or the terminal does not take the settings.
    pub fn enter(fd: &impl AsFd) -> io::Result<Option<Self>> {
        let fd = fd.as_fd();
        if !is_terminal(fd) {
            return Ok(None);
        }
        let own = fd.try_clone_to_owned()?;
        let settings = settings(own.as_fd())?;
        if TAKEN.swap(true, Ordering::AcqRel) {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "the terminal is in raw mode already"));
        }
        HOOKS.call_once(install_hooks);
        // SAFETY: `fd` is -1 and this thread holds TAKEN, so nobody reads or writes the settings now.
        unsafe { (*SAVED.settings.get()).write(settings) };
        SAVED.fd.store(own.as_raw_fd(), Ordering::Release);
        let mut raw = settings;
        // SAFETY: `raw` is a valid termios.
        unsafe { libc::cfmakeraw(&raw mut raw) };
        let guard = Self { _fd: own };
        // SAFETY: the descriptor is open and `raw` is valid for the length of the call.
        if unsafe { libc::tcsetattr(guard._fd.as_raw_fd(), libc::TCSADRAIN, &raw const raw) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Some(guard))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
        SAVED.fd.store(-1, Ordering::Release);
        TAKEN.store(false, Ordering::Release);
    }
}

/// Whether `fd` is a terminal.
#[must_use]
pub fn is_terminal(fd: BorrowedFd<'_>) -> bool {
    // SAFETY: isatty takes a number only.
    unsafe { libc::isatty(fd.as_raw_fd()) == 1 }
}

fn settings(fd: BorrowedFd<'_>) -> io::Result<libc::termios> {
    let mut settings = MaybeUninit::uninit();
    // SAFETY: `settings` has room for a termios.
    if unsafe { libc::tcgetattr(fd.as_raw_fd(), settings.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: tcgetattr succeeded, so it filled the structure.
    Ok(unsafe { settings.assume_init() })
}

/// Give the terminal its former settings, if a guard lives. Safe to call in a signal handler and more than once.
///
/// A signal handler that ends the process by itself (an engine's, for a fault that is not the guest's) calls this first.
pub fn restore() {
    let fd = SAVED.fd.load(Ordering::Acquire);
    if fd < 0 {
        return;
    }
    // SAFETY: `fd` was set, so the settings were written before; tcsetattr is async-signal-safe (POSIX.1-2017 2.4.3).
    unsafe { libc::tcsetattr(fd, libc::TCSANOW, (*SAVED.settings.get()).as_ptr()) };
}

fn install_hooks() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        before(info);
    }));
    for (i, signal) in FATAL.into_iter().enumerate() {
        let mut old = MaybeUninit::<libc::sigaction>::uninit();
        // SAFETY: a null new action asks only; `old` has room for the answer.
        if unsafe { libc::sigaction(signal, std::ptr::null(), old.as_mut_ptr()) } != 0 {
            continue;
        }
        // SAFETY: sigaction succeeded, so it filled the structure.
        let old = unsafe { old.assume_init() };
        // Ignored on purpose (nohup): stays so.
        if old.sa_sigaction == libc::SIG_IGN {
            continue;
        }
        // SAFETY: the handler that reads this slot is not installed yet, and the Once lets in one thread only.
        unsafe { (*SAVED.previous.get())[i].write(old) };
        // SAFETY: an all-zero sigaction is a valid one; it is filled below.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction =
            on_fatal as extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: the handler calls async-signal-safe functions only.
        unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) };
    }
}

/// Restores the terminal if the signal is going to end the process, and lets it do what it did before.
extern "C" fn on_fatal(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let Some(i) = FATAL.iter().position(|s| *s == signal) else { return };
    // SAFETY: this handler was installed after the slot had been written.
    let previous = unsafe { (*SAVED.previous.get())[i].assume_init() };
    // SAFETY: this is a handler with SA_SIGINFO, and the action was in force before it.
    unsafe { crate::signals::pass_on(&previous, signal, info, context, restore) };
}

#[cfg(test)]
mod tests;
