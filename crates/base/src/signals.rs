//! Signals: as events for a loop, and as kicks that make a blocking call of one thread return.

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

/// For a handler that stands before another: let `previous` have a signal that the process did not ignore. `ending` is called first
/// whenever the process is going to end by it, and must be async-signal-safe.
///
/// # Safety
/// To be called by a handler with SA_SIGINFO, with what the kernel has given to it. `previous` is what sigaction(2) said was in force before.
pub unsafe fn pass_on(
    previous: &libc::sigaction,
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
    ending: fn(),
) {
    if previous.sa_sigaction == libc::SIG_DFL {
        ending();
        // SAFETY: `previous` is a valid action; raise takes a number. The signal is blocked here, so it takes effect on
        // return; a fault happens again then by itself, but one that was sent does not.
        unsafe {
            libc::sigaction(signal, previous, std::ptr::null_mut());
            libc::raise(signal);
        }
        return;
    }
    // Somebody else's handler: it may put the fault right (an engine probing guest memory) or give up, as Rust's own
    // handler for stack overflows does by setting the default action and returning.
    // SAFETY: a handler that is neither default nor ignored is a function of the kind that its flags say.
    unsafe {
        if previous.sa_flags & libc::SA_SIGINFO != 0 {
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                std::mem::transmute(previous.sa_sigaction);
            handler(signal, info, context);
        } else {
            let handler: extern "C" fn(libc::c_int) = std::mem::transmute(previous.sa_sigaction);
            handler(signal);
        }
    }
    let mut now = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: asks only; `now` has room for the answer and is read after success.
    let gave_up = unsafe {
        libc::sigaction(signal, std::ptr::null(), now.as_mut_ptr()) == 0
            && now.assume_init().sa_sigaction == libc::SIG_DFL
    };
    if gave_up {
        ending();
        // SAFETY: the kernel passes a valid siginfo to a handler with SA_SIGINFO; raise takes a number. A fault comes
        // again by itself when the instruction is tried again; a signal that a process sent (code 0 or below) does not.
        unsafe {
            if (*info).si_code <= 0 {
                libc::raise(signal);
            }
        }
    }
}

/// Signals that come as readable events on a file descriptor (signalfd(2)) instead of interrupting a thread.
#[derive(Debug)]
pub struct SignalFd {
    fd: OwnedFd,
}

impl SignalFd {
    /// Block `signals` in the calling thread and take them by this descriptor, which does not block.
    ///
    /// Threads inherit the mask of the one that starts them: call this before starting any, or a signal may still go
    /// to a thread that has it open.
    ///
    /// # Errors
    /// When a number is no signal, or the process is out of file descriptors.
    pub fn new(signals: &[libc::c_int]) -> io::Result<Self> {
        let set = block(signals)?;
        // SAFETY: `set` is valid for the length of the call.
        let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// The next signal's number, or none if none is waiting.
    ///
    /// # Errors
    /// As read(2).
    pub fn next(&self) -> io::Result<Option<libc::c_int>> {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let size = size_of::<libc::signalfd_siginfo>();
        // SAFETY: `info` has room for `size` bytes.
        let n = unsafe { libc::read(self.fd.as_raw_fd(), info.as_mut_ptr().cast(), size) };
        if n == size as isize {
            // SAFETY: the kernel filled all of it; any bytes make a valid value of plain integers.
            let info = unsafe { info.assume_init() };
            return Ok(Some(info.ssi_signo as libc::c_int));
        }
        match io::Error::last_os_error() {
            e if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(None),
            e => Err(e),
        }
    }
}

impl AsFd for SignalFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn set_of(signals: &[libc::c_int]) -> io::Result<libc::sigset_t> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initializes the whole set.
    let mut set = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        set.assume_init()
    };
    for &signal in signals {
        // SAFETY: `set` is initialized; a bad number is reported, not undefined.
        if unsafe { libc::sigaddset(&raw mut set, signal) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(set)
}

/// Block `signals` in the calling thread; returns them as a set.
///
/// # Errors
/// When a number is no signal.
pub fn block(signals: &[libc::c_int]) -> io::Result<libc::sigset_t> {
    let set = set_of(signals)?;
    // SAFETY: `set` is initialized, and the old mask is not asked for.
    match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) } {
        0 => Ok(set),
        e => Err(io::Error::from_raw_os_error(e)),
    }
}

/// The signal by which a vCPU thread is kicked out of a blocking call: the first real-time signal.
#[must_use]
pub fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Give the kick signal a handler that does nothing, so that it interrupts system calls (`EINTR`) and no more.
///
/// # Errors
/// When the system refuses, which it does not for this signal.
pub fn install_kick_handler() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: an all-zero sigaction is a valid one; it is filled below.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
    // SAFETY: the action is initialized, and its handler does nothing, which is safe in a signal.
    if unsafe { libc::sigaction(kick_signal(), &raw const action, std::ptr::null_mut()) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// A thread that can be kicked.
#[derive(Debug, Clone, Copy)]
pub struct ThreadId(libc::pid_t);

impl ThreadId {
    /// The calling thread.
    #[must_use]
    pub fn current() -> Self {
        // SAFETY: gettid has no preconditions.
        Self(unsafe { libc::gettid() })
    }

    /// Send the kick signal; a thread that has ended is no error, and since the process is named too, a stranger that
    /// got its number cannot be hit.
    pub fn kick(self) {
        // SAFETY: tgkill takes numbers only.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), self.0, kick_signal()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn signals_become_events() {
        let thread = std::thread::spawn(|| {
            let fd = SignalFd::new(&[libc::SIGUSR2]).expect("signalfd");
            assert_eq!(fd.next().expect("read"), None);
            // SAFETY: raise takes a number; the signal is blocked in this thread.
            unsafe { libc::raise(libc::SIGUSR2) };
            assert_eq!(fd.next().expect("read"), Some(libc::SIGUSR2));
            assert_eq!(fd.next().expect("read"), None);
        });
        thread.join().expect("thread");
        assert!(SignalFd::new(&[9999]).is_err());
    }

    #[test]
    fn a_kick_interrupts_a_blocking_call() {
        install_kick_handler().expect("handler");
        let (tx, rx) = mpsc::channel();
        let (a, _b) = std::os::unix::net::UnixStream::pair().expect("pair");
        let thread = std::thread::spawn(move || {
            tx.send(ThreadId::current()).expect("send");
            let mut byte = 0u8;
            // SAFETY: one byte is there to be written to.
            let n = unsafe { libc::read(a.as_raw_fd(), (&raw mut byte).cast(), 1) };
            (n, io::Error::last_os_error().raw_os_error())
        });
        let id = rx.recv().expect("id");
        // The thread may not be in its call yet, so kick until it has returned.
        while !thread.is_finished() {
            id.kick();
            std::thread::yield_now();
        }
        assert_eq!(thread.join().expect("thread"), (-1, Some(libc::EINTR)));
        id.kick();
    }
}
