//! What a fatal signal in a vCPU's thread leaves behind: where the guest was, where the host was, and the block between the two.
//!
//! A fault in translated code is a bug of the engine (no guest access ever faults on the host), and so is one in what it calls. The process
//! ends by the signal as it would without the report. The handler runs on a stack of its own, takes no lock, allocates nothing and reads what may
//! be gone through the kernel (`process_vm_readv`), which fails where a plain load would fault once more.

use crate::cpu::{Cpu, RIP};
use crate::decode::Op;
use std::cell::Cell;
use std::fmt::Write;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::Once;

/// The signals that a broken program gets, and their names.
const SIGNALS: [(libc::c_int, &str); 5] = [
    (libc::SIGSEGV, "SIGSEGV"),
    (libc::SIGBUS, "SIGBUS"),
    (libc::SIGILL, "SIGILL"),
    (libc::SIGFPE, "SIGFPE"),
    (libc::SIGABRT, "SIGABRT"),
];

/// Bytes of the stack that handlers run on: a signal frame with AVX-512 state takes about 3.5 KiB, other handlers are called on it as well.
const STACK: usize = 64 << 10;

/// What the signals of [`SIGNALS`] did before. Written once, before the handler is there.
struct Previous(Cell<[MaybeUninit<libc::sigaction>; SIGNALS.len()]>);

// SAFETY: written under a `Once` before the handlers that read it are installed.
unsafe impl Sync for Previous {}

static PREVIOUS: Previous = Previous(Cell::new([const { MaybeUninit::uninit() }; SIGNALS.len()]));

thread_local! {
    /// The vCPU that this thread executes. Needs neither initialisation nor a destructor, so a handler may read it.
    static RUNNING: Cell<*const Cpu> = const { Cell::new(ptr::null()) };
    static HANDLERS_STACK: Option<AltStack> = AltStack::new();
}

/// A thread's stack for signal handlers.
struct AltStack(*mut libc::c_void);

impl AltStack {
    /// In force at once. `None` if the host has no memory for it: whatever stack there is has to do then.
    fn new() -> Option<AltStack> {
        // SAFETY: a mapping of this function's own, which becomes this thread's signal stack as a whole.
        unsafe {
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let at = libc::mmap(ptr::null_mut(), STACK, prot, flags, -1, 0);
            if at == libc::MAP_FAILED {
                return None;
            }
            let stack = AltStack(at);
            let new = libc::stack_t { ss_sp: at, ss_flags: 0, ss_size: STACK };
            (libc::sigaltstack(&raw const new, ptr::null_mut()) == 0).then_some(stack)
        }
    }
}

impl Drop for AltStack {
    fn drop(&mut self) {
        // SAFETY: the thread ends (or never used the stack); its handlers use the ordinary stack from here on.
        unsafe {
            let mut now: libc::stack_t = std::mem::zeroed();
            if libc::sigaltstack(ptr::null(), &raw mut now) == 0 && now.ss_sp == self.0 {
                let off = libc::stack_t { ss_sp: ptr::null_mut(), ss_flags: libc::SS_DISABLE, ss_size: 0 };
                libc::sigaltstack(&raw const off, ptr::null_mut());
            }
            libc::munmap(self.0, STACK);
        }
    }
}

/// Report fatal signals from now on. Once per process; later calls change nothing.
pub fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let mut previous = [const { MaybeUninit::uninit() }; SIGNALS.len()];
        for (slot, (signal, _)) in previous.iter_mut().zip(SIGNALS) {
            // SAFETY: asks only; an all-zero action is a valid one, and stays where the kernel does not answer.
            unsafe {
                let mut old: libc::sigaction = std::mem::zeroed();
                libc::sigaction(signal, ptr::null(), &raw mut old);
                *slot = MaybeUninit::new(old);
            }
        }
        PREVIOUS.0.set(previous);
        for (old, (signal, _)) in previous.iter().zip(SIGNALS) {
            // SAFETY: filled just now. What is ignored on purpose stays so.
            if unsafe { old.assume_init_ref() }.sa_sigaction == libc::SIG_IGN {
                continue;
            }
            // SAFETY: the handler calls async-signal-safe functions only, and those that were there before it.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction =
                    on_signal as extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                libc::sigaction(signal, &raw const action, ptr::null_mut());
            }
        }
    });
}

/// Marks the thread as one that executes a vCPU, while it lives.
pub struct Executing(());

impl Executing {
    /// `cpu` must outlive the value; it is used again only by [`on_signal`].
    pub fn new(cpu: *const Cpu) -> Executing {
        HANDLERS_STACK.with(|_| ());
        RUNNING.set(cpu);
        Executing(())
    }
}

impl Drop for Executing {
    fn drop(&mut self) {
        RUNNING.set(ptr::null());
    }
}

extern "C" fn on_signal(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let Some(n) = SIGNALS.iter().position(|(s, _)| *s == signal) else { return };
    let cpu = RUNNING.get();
    // SAFETY: the kernel passes both to a handler with SA_SIGINFO; a sender is given for what was sent (code 0 or below).
    let (info_ref, ours) = unsafe {
        let i = &*info;
        (i, i.si_code > 0 || i.si_pid() == libc::getpid())
    };
    if ours {
        // Once: what is reported here may fault again.
        RUNNING.set(ptr::null());
        // SAFETY: as above, for the context.
        let context = unsafe { &*context.cast::<libc::ucontext_t>() };
        report_host(SIGNALS[n].1, info_ref, context);
        // A thread that executes a vCPU has a stack of ours, with room for more.
        if !cpu.is_null() {
            report_guest(context, cpu);
        }
    }
    // SAFETY: written before this handler was installed; an action is plain data.
    let previous = unsafe { (*PREVIOUS.0.as_ptr())[n].assume_init() };
    // SAFETY: this is a handler with SA_SIGINFO, and the action was in force before it.
    unsafe { ringfort_base::signals::pass_on(&previous, signal, info, context, || ()) };
}

/// What can be said in any thread. Never part of [`on_signal`], whose frame has to fit every thread's stack for signals, which may be one page
/// beside what the kernel puts there.
#[inline(never)]
#[cold]
fn report_host(signal: &str, info: &libc::siginfo_t, context: &libc::ucontext_t) {
    let t = &mut Text::<256>::default();
    let host = context.uc_mcontext.gregs[libc::REG_RIP as usize] as u64;
    let mut name = [0u8; 16];
    // SAFETY: PR_GET_NAME writes at most 16 bytes.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    let name = std::str::from_utf8(&name).unwrap_or("").trim_end_matches('\0');
    let _ = write!(t, "ringfort: {signal} in thread {name} at host RIP {host:#x}");
    if info.si_code > 0 {
        // SAFETY: faults have an address.
        let _ = write!(t, ", fault address {:#x}", unsafe { info.si_addr() } as u64);
    }
    t.line();
}

/// Where the guest was. Takes several pages of stack.
#[inline(never)]
#[cold]
fn report_guest(context: &libc::ucontext_t, cpu: *const Cpu) {
    let t = &mut Text::<2048>::default();
    let host = context.uc_mcontext.gregs[libc::REG_RIP as usize] as u64;
    // SAFETY: `Executing` says that the vCPU is there. The thread is stopped somewhere: plain words are read as they happen to be.
    let (rip, cs, cpl, cr3, current, id) = unsafe {
        let c = &raw const *cpu;
        let me = &(*c).env.me;
        (
            (&raw const (*c).regs[RIP as usize]).read_volatile(),
            (&raw const (*c).seg[1].selector).read_volatile(),
            (&raw const (*c).cpl).read_volatile(),
            (&raw const (*c).cr3).read_volatile(),
            (&raw const (*c).current).read_volatile(),
            me.apic_id,
        )
    };
    // SAFETY: the translator is made before the vCPU runs and stays.
    let translator = unsafe { (*cpu).translator.as_deref() };
    let place = translator.filter(|t| t.holds(host as usize));
    let _ = write!(t, "  vCPU {id}, CPL {cpl}, CR3 {cr3:#x}: ");
    if place.is_none() {
        // In a handler, RIP is the page's that its op lies in; else it is the next instruction's.
        let mut op = MaybeUninit::<Op>::uninit();
        // SAFETY: any bytes will do for the plain fields that are looked at, and only where they were read.
        let within = read(current as u64, unsafe {
            std::slice::from_raw_parts_mut(op.as_mut_ptr().cast::<u8>(), size_of::<Op>())
        });
        let _ = write!(t, "in the engine's own code, guest CS:RIP {cs:#x}:{rip:#x}");
        if within && rip & 0xfff == 0 {
            // SAFETY: filled just now.
            let (off, code) =
                unsafe { ((&raw const (*op.as_ptr()).off).read(), (&raw const (*op.as_ptr()).code).read()) };
            let name = iced_x86::Code::try_from(usize::from(code)).unwrap_or_default();
            let _ =
                write!(t, "; if a handler was called, for {name:?} at {:#x}", rip.wrapping_add(off.into()));
        }
        t.line();
        return;
    }
    // Translated code runs, so nothing is changing the cache or the translator.
    // SAFETY: therefore they may be read.
    let (cache, translator) = unsafe { (&(*cpu).cache, translator) };
    let found =
        translator.and_then(|t| cache.translated().find_map(|b| Some((b, t.within(b, host as usize)?))));
    let Some((block, place)) = found else {
        let _ = write!(t, "in translated code between blocks, guest CS:RIP {cs:#x}:{rip:#x}");
        t.line();
        return;
    };
    let start = |n: usize| {
        // SAFETY: as for the bytes below.
        let host = unsafe { (*cpu).mmu.ram.host(block.gpa()) }?;
        let mut bytes = [0; 0x1000];
        let bytes = &mut bytes[..(0x1000 - block.first()).min(block.bytes.into()) as usize];
        if !read(host as u64, bytes) {
            return None;
        }
        let mut decoder =
            iced_x86::Decoder::with_ip(64, bytes, block.first(), iced_x86::DecoderOptions::NONE);
        for _ in 0..n {
            let _ = decoder.decode();
        }
        Some(decoder.ip())
    };
    let at = place.op.and_then(start).unwrap_or(block.first());
    let exactly = if place.op.is_some() { "" } else { " (the block's beginning)" };
    let _ = write!(t, "in translated code, guest CS:RIP {cs:#x}:{:#x}{exactly}", (rip & !0xfff) + at);
    t.line();
    let _ = write!(t, "  block at guest physical {:#x}, {} bytes:", block.gpa(), block.bytes);
    // SAFETY: the map of memory is changed by the vCPU's own thread only.
    let bytes = unsafe { (*cpu).mmu.ram.host(block.gpa()) };
    let room = (0x1000 - block.first()).min(block.bytes.into()) as usize;
    t.bytes(bytes.map_or(0, |p| p as u64), room);
    t.line();
    let part = if place.seldom { "part that seldom executes" } else { "block's code" };
    let _ = write!(t, "  host code {:#x} bytes into the {part}:", place.offset);
    t.bytes(host, 16);
    t.line();
    for (n, name) in crate::translate::REGISTERS {
        let value = match crate::translate::pinned(n) {
            Some(h) => context.uc_mcontext.gregs[GREGS[usize::from(h)] as usize] as u64,
            // SAFETY: as for RIP.
            None => unsafe { (&raw const (*cpu).regs[usize::from(n)]).read_volatile() },
        };
        let _ = write!(t, "{}{name} {value:016x}", if n % 4 == 0 { "  " } else { " " });
        if n % 4 == 3 {
            t.line();
        }
    }
    let _ = write!(t, "  This is a bug in ringfort; --accel soft,tier=interp does without translated code.");
    t.line();
}

/// Where a signal's context has the host's general registers, in the order of their numbers.
pub const GREGS: [libc::c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// Read this process's memory, or say that it is not there.
fn read(at: u64, out: &mut [u8]) -> bool {
    let local = libc::iovec { iov_base: out.as_mut_ptr().cast(), iov_len: out.len() };
    let remote = libc::iovec { iov_base: at as *mut libc::c_void, iov_len: out.len() };
    // SAFETY: writes to `out` only; the kernel checks what it reads.
    let n = unsafe { libc::process_vm_readv(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0) };
    n == out.len() as isize
}

/// A message to standard error that is made without allocating.
struct Text<const ROOM: usize> {
    bytes: [u8; ROOM],
    used: usize,
}

impl<const ROOM: usize> Default for Text<ROOM> {
    fn default() -> Self {
        Text { bytes: [0; ROOM], used: 0 }
    }
}

impl<const ROOM: usize> Write for Text<ROOM> {
    fn write_str(&mut self, s: &str) -> std::fmt::Result {
        for &b in s.as_bytes() {
            if let Some(slot) = self.bytes.get_mut(self.used) {
                *slot = b;
                self.used += 1;
            }
        }
        Ok(())
    }
}

impl<const ROOM: usize> Text<ROOM> {
    /// End a line and write what there is, in case that the next one does not come about. The terminal may be raw.
    fn line(&mut self) {
        let _ = self.write_str("\r\n");
        self.flush();
    }

    /// Memory in hexadecimal, if it is there.
    fn bytes(&mut self, at: u64, count: usize) {
        let mut some = [0u8; 256];
        let some = &mut some[..count.min(256)];
        if read(at, some) {
            for b in some {
                let _ = write!(self, " {b:02x}");
            }
        } else {
            let _ = self.write_str(" (not readable)");
        }
    }

    fn flush(&mut self) {
        // SAFETY: the bytes are this value's. A message that cannot be written is lost.
        unsafe { libc::write(libc::STDERR_FILENO, self.bytes.as_ptr().cast(), self.used) };
        self.used = 0;
    }
}

#[cfg(test)]
mod tests;
