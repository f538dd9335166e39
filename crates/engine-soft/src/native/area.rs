//! The executable area that holds native stubs, and the SIGFPE handler that turns numeric exceptions raised by a stub into a result.
//!
//! The area is shared by all vCPUs of the process and only grows: the number of distinct stubs is bounded (see [`super::stub`]).

use crate::codemem::CodeMemory;
use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

/// Bytes of the area. Every encoding there is (about 100,000, most of them one per immediate) takes less than half of it.
const SIZE: usize = 32 << 20;

/// Offset in the area of the MXCSR value that Rust code runs with.
pub(super) const HOST_MXCSR_AT: usize = 0;

/// The area, mapped.
pub(super) struct Area {
    memory: CodeMemory,
    used: usize,
}

/// First address of the executable mapping; 0 until there is one. For the signal handler.
static START: AtomicUsize = AtomicUsize::new(0);
/// Where a stub goes on after #XM. For the signal handler.
static EXIT_XM: AtomicUsize = AtomicUsize::new(0);
/// Where a stub goes on after #MF. For the signal handler.
static EXIT_MF: AtomicUsize = AtomicUsize::new(0);
/// The SIGFPE action that was in force before ours; leaked, so that the handler may read it at any time.
static PREVIOUS: AtomicPtr<libc::sigaction> = AtomicPtr::new(std::ptr::null_mut());

impl Area {
    /// Map an area, write the common exits, and install the signal handler. Once per process.
    pub(super) fn new() -> io::Result<Area> {
        let mut memory = CodeMemory::new(SIZE, false)?;
        // All exceptions masked, round to nearest: what the ABI promises to compiled code.
        memory.write(HOST_MXCSR_AT, &0x1f80u32.to_le_bytes());
        let mut area = Area { memory, used: 64 };
        for (after_xm, exit) in [(true, &EXIT_XM), (false, &EXIT_MF)] {
            let code = super::stub::fault_exit(area.next(), after_xm, area.address(HOST_MXCSR_AT));
            let at = area.add(&code).ok_or(io::ErrorKind::OutOfMemory)?;
            exit.store(at, Ordering::Relaxed);
        }
        install_handler()?;
        START.store(area.address(0), Ordering::Release);
        Ok(area)
    }

    /// The executable address of an offset.
    pub(super) fn address(&self, offset: usize) -> usize {
        self.memory.address(offset)
    }

    /// The address that the next piece of code added will have.
    pub(super) fn next(&self) -> usize {
        self.address(self.used)
    }

    /// Add code; its executable address. `None` when the area is full.
    pub(super) fn add(&mut self, code: &[u8]) -> Option<usize> {
        if code.len() > SIZE - self.used {
            return None;
        }
        // Nobody executes it yet: the range has never been handed out.
        self.memory.write(self.used, code);
        let at = self.next();
        self.used = (self.used + code.len()).next_multiple_of(16).min(SIZE);
        Some(at)
    }
}

fn install_handler() -> io::Result<()> {
    static DONE: OnceLock<Result<(), i32>> = OnceLock::new();
    let done = DONE.get_or_init(|| {
        // SAFETY: both structures are valid; the handler only does what a signal handler may do.
        unsafe {
            let mut old: libc::sigaction = std::mem::zeroed();
            let mut new: libc::sigaction = std::mem::zeroed();
            if libc::sigaction(libc::SIGFPE, std::ptr::null(), &mut old) != 0 {
                return Err(io::Error::last_os_error().raw_os_error().unwrap_or(0));
            }
            // Before ours is in force, so that it never runs without knowing its predecessor.
            PREVIOUS.store(Box::into_raw(Box::new(old)), Ordering::Release);
            new.sa_sigaction = on_sigfpe as *const () as usize;
            // On the thread's own stack: stubs run there, and an alternate one may be just large enough for the signal frame.
            new.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
            libc::sigemptyset(&mut new.sa_mask);
            if libc::sigaction(libc::SIGFPE, &new, std::ptr::null_mut()) != 0 {
                return Err(io::Error::last_os_error().raw_os_error().unwrap_or(0));
            }
        }
        Ok(())
    });
    done.map_err(io::Error::from_raw_os_error)
}

/// Hardware vector numbers as the kernel reports them in the signal context.
const TRAP_MF: i64 = 16;
const TRAP_XM: i64 = 19;

/// A numeric exception: if a stub raised it, go on at its exit with the vector as its result.
unsafe extern "C" fn on_sigfpe(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel hands a valid context.
    let gregs = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let pc = gregs[libc::REG_RIP as usize] as usize;
    let start = START.load(Ordering::Acquire);
    if start != 0 && pc.wrapping_sub(start) < SIZE {
        let trap = gregs[libc::REG_TRAPNO as usize];
        let exit = if trap == TRAP_XM { &EXIT_XM } else { &EXIT_MF };
        gregs[libc::REG_RAX as usize] = if trap == TRAP_XM { TRAP_XM } else { TRAP_MF };
        gregs[libc::REG_RIP as usize] = exit.load(Ordering::Relaxed) as i64;
        return;
    }
    let previous = PREVIOUS.load(Ordering::Acquire);
    // SAFETY: stored once, never freed.
    let previous = unsafe { &*previous };
    match previous.sa_sigaction {
        libc::SIG_DFL | libc::SIG_IGN => {
            // The kernel's own action, on return to the faulting instruction (SIG_IGN means death for a synchronous fault).
            // SAFETY: a valid structure; sigaction may be called in a handler.
            unsafe {
                let mut dfl: libc::sigaction = std::mem::zeroed();
                dfl.sa_sigaction = libc::SIG_DFL;
                libc::sigaction(signal, &dfl, std::ptr::null_mut());
            }
        }
        handler if previous.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: whoever installed it promised this type.
            let f: unsafe extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
                unsafe { std::mem::transmute(handler) };
            // SAFETY: called as the kernel would call it.
            unsafe { f(signal, info, context) }
        }
        handler => {
            // SAFETY: as above, for a handler without SA_SIGINFO.
            let f: unsafe extern "C" fn(i32) = unsafe { std::mem::transmute(handler) };
            // SAFETY: called as the kernel would call it.
            unsafe { f(signal) }
        }
    }
}

/// Let SIGFPE reach this thread: the kernel kills a process whose thread blocks a synchronous signal.
pub(super) fn unblock_sigfpe() {
    // SAFETY: a valid set; changes only this thread's mask.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGFPE);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut());
    }
}
