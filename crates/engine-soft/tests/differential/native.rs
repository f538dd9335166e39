//! Runs a few instructions on the host's own CPU with every register under control, and survives whatever they raise.
//!
//! Code and data lie at fixed addresses below 4 GiB, the same as in the guest, so that addresses mean the same in both. Faults come
//! back as what the CPU raised (vector, error code, CR2), from the signal's context.

use ringfort_engine_soft::testing::GREGS;
use std::arch::global_asm;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Where code is executed.
pub const CODE: u64 = 0x3100_0000;
/// Bytes of code space.
pub const CODE_SIZE: usize = 0x3000;
/// Where memory operands lie; the pages around are not mapped.
pub const DATA: u64 = 0x3200_0000;
/// Bytes of data space.
pub const DATA_SIZE: usize = 0x4000;

/// Everything that instructions of user code read and write, but memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct State {
    /// RAX..R15.
    pub gpr: [u64; 16],
    /// RFLAGS.
    pub flags: u64,
    /// Address that execution ended at.
    pub rip: u64,
    pad: [u64; 6],
    /// FXSAVE64 image: x87, MXCSR. Its XMM part is not used.
    pub fx: Fx,
    /// YMM0..YMM15.
    pub ymm: [[u8; 32]; 16],
}

/// See [`State::fx`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct Fx(pub [u8; 512]);

impl Default for State {
    fn default() -> Self {
        let mut fx = Fx([0; 512]);
        fx.0[..2].copy_from_slice(&0x37fu16.to_le_bytes());
        fx.0[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        State { gpr: [0; 16], flags: 2, rip: 0, pad: [0; 6], fx, ymm: [[0; 32]; 16] }
    }
}

/// An exception.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Vector.
    pub vector: u8,
    /// Error code (0 where there is none).
    pub error: u32,
    /// CR2, for page faults.
    pub address: u64,
}

// Offsets in State.
const FLAGS: usize = 128;
const FX: usize = 192;
const YMM: usize = 704;

global_asm!(
    ".pushsection .bss",
    ".balign 64",
    "diff_state: .skip 1280",
    "diff_host_rsp: .skip 8",
    "diff_target: .skip 8",
    ".popsection",
    ".pushsection .rodata",
    "diff_mxcsr: .long 0x1f80",
    ".popsection",
    ".globl diff_enter, diff_tail, diff_exit, diff_state, diff_host_rsp",
    "diff_enter:",
    "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
    "mov [rip + diff_host_rsp], rsp",
    "mov [rip + diff_target], rdi",
    "lea rdi, [rip + diff_state]",
    "fxrstor64 [rdi + {FX}]",
    "vmovdqu ymm0, [rdi + {YMM}]", "vmovdqu ymm1, [rdi + {YMM} + 32]",
    "vmovdqu ymm2, [rdi + {YMM} + 64]", "vmovdqu ymm3, [rdi + {YMM} + 96]",
    "vmovdqu ymm4, [rdi + {YMM} + 128]", "vmovdqu ymm5, [rdi + {YMM} + 160]",
    "vmovdqu ymm6, [rdi + {YMM} + 192]", "vmovdqu ymm7, [rdi + {YMM} + 224]",
    "vmovdqu ymm8, [rdi + {YMM} + 256]", "vmovdqu ymm9, [rdi + {YMM} + 288]",
    "vmovdqu ymm10, [rdi + {YMM} + 320]", "vmovdqu ymm11, [rdi + {YMM} + 352]",
    "vmovdqu ymm12, [rdi + {YMM} + 384]", "vmovdqu ymm13, [rdi + {YMM} + 416]",
    "vmovdqu ymm14, [rdi + {YMM} + 448]", "vmovdqu ymm15, [rdi + {YMM} + 480]",
    "push [rdi + {FLAGS}]",
    "popfq",
    "mov rax, [rdi]", "mov rcx, [rdi + 8]", "mov rdx, [rdi + 16]", "mov rbx, [rdi + 24]",
    "mov rsp, [rdi + 32]", "mov rbp, [rdi + 40]", "mov rsi, [rdi + 48]",
    "mov r8, [rdi + 64]", "mov r9, [rdi + 72]", "mov r10, [rdi + 80]", "mov r11, [rdi + 88]",
    "mov r12, [rdi + 96]", "mov r13, [rdi + 104]", "mov r14, [rdi + 112]", "mov r15, [rdi + 120]",
    "mov rdi, [rdi + 56]",
    "jmp [rip + diff_target]",
    // The code under test ends by jumping here.
    "diff_exit:",
    "mov [rip + diff_state], rax", "mov [rip + diff_state + 8], rcx", "mov [rip + diff_state + 16], rdx",
    "mov [rip + diff_state + 24], rbx", "mov [rip + diff_state + 32], rsp", "mov [rip + diff_state + 40], rbp",
    "mov [rip + diff_state + 48], rsi", "mov [rip + diff_state + 56], rdi", "mov [rip + diff_state + 64], r8",
    "mov [rip + diff_state + 72], r9", "mov [rip + diff_state + 80], r10", "mov [rip + diff_state + 88], r11",
    "mov [rip + diff_state + 96], r12", "mov [rip + diff_state + 104], r13", "mov [rip + diff_state + 112], r14",
    "mov [rip + diff_state + 120], r15",
    "mov rsp, [rip + diff_host_rsp]",
    "pushfq",
    "pop [rip + diff_state + {FLAGS}]",
    // After a signal, whose handler has stored the general registers.
    "diff_tail:",
    "cld",
    "lea rdi, [rip + diff_state]",
    "vmovdqu [rdi + {YMM}], ymm0", "vmovdqu [rdi + {YMM} + 32], ymm1",
    "vmovdqu [rdi + {YMM} + 64], ymm2", "vmovdqu [rdi + {YMM} + 96], ymm3",
    "vmovdqu [rdi + {YMM} + 128], ymm4", "vmovdqu [rdi + {YMM} + 160], ymm5",
    "vmovdqu [rdi + {YMM} + 192], ymm6", "vmovdqu [rdi + {YMM} + 224], ymm7",
    "vmovdqu [rdi + {YMM} + 256], ymm8", "vmovdqu [rdi + {YMM} + 288], ymm9",
    "vmovdqu [rdi + {YMM} + 320], ymm10", "vmovdqu [rdi + {YMM} + 352], ymm11",
    "vmovdqu [rdi + {YMM} + 384], ymm12", "vmovdqu [rdi + {YMM} + 416], ymm13",
    "vmovdqu [rdi + {YMM} + 448], ymm14", "vmovdqu [rdi + {YMM} + 480], ymm15",
    "fxsave64 [rdi + {FX}]",
    "fninit",
    "ldmxcsr [rip + diff_mxcsr]",
    "vzeroupper",
    "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
    "ret",
    FX = const FX,
    YMM = const YMM,
    FLAGS = const FLAGS,
);

unsafe extern "C" {
    fn diff_enter(code: u64);
    fn diff_tail();
    fn diff_exit();
    static mut diff_state: State;
    static diff_host_rsp: u64;
}

static mut FAULT: Option<Fault> = None;
static ONE: Mutex<()> = Mutex::new(());

const SIGNALS: [i32; 5] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP];

extern "C" fn on_signal(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a ucontext; `diff_state` and FAULT belong to the one thread that runs native code (see `Runner`).
    unsafe {
        let g = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let at = |r: i32| r as usize;
        let state = &raw mut diff_state;
        for (n, r) in GREGS.into_iter().enumerate() {
            (*state).gpr[n] = g[at(r)] as u64;
        }
        (*state).flags = g[at(libc::REG_EFL)] as u64;
        (*state).rip = g[at(libc::REG_RIP)] as u64;
        let vector = g[at(libc::REG_TRAPNO)] as u8;
        let address = if vector == 14 { g[at(libc::REG_CR2)] as u64 } else { 0 };
        let mut error = if matches!(vector, 8 | 10..=14 | 17) { g[at(libc::REG_ERR)] as u32 } else { 0 };
        if address >= 0x7fff_ffff_f000 {
            // Linux claims that all of its own part is present.
            error &= !1;
        }
        FAULT = Some(Fault { vector, error, address });
        g[at(libc::REG_RIP)] = diff_tail as *const () as i64;
        g[at(libc::REG_RSP)] = diff_host_rsp as i64;
        g[at(libc::REG_EFL)] = 0x202;
    }
}

/// The right to run native code; one at a time.
pub struct Runner {
    code: *mut u8,
    _one: MutexGuard<'static, ()>,
    _stack: Vec<u8>,
}

impl Runner {
    /// Map code and data, and give this thread a signal stack.
    pub fn new() -> Runner {
        let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let mut stack = vec![0u8; 1 << 17];
        // SAFETY: maps fixed ranges below 4 GiB that nothing else uses (MAP_FIXED_NOREPLACE refuses otherwise; a second Runner finds its own
        // mappings gone, because drop unmaps them).
        let code = unsafe {
            let fd = libc::memfd_create(c"code".as_ptr(), 0);
            assert!(fd >= 0 && libc::ftruncate(fd, CODE_SIZE as i64) == 0);
            let rw = libc::PROT_READ | libc::PROT_WRITE;
            let fixed = libc::MAP_FIXED_NOREPLACE;
            let map = |at: u64, len, prot, flags, fd| {
                let p = libc::mmap(at as *mut libc::c_void, len, prot, flags, fd, 0);
                assert!(at == 0 || p as u64 == at, "cannot map {at:#x}: {}", std::io::Error::last_os_error());
                p.cast::<u8>()
            };
            map(CODE, CODE_SIZE, libc::PROT_READ | libc::PROT_EXEC, libc::MAP_SHARED | fixed, fd);
            map(DATA, DATA_SIZE, rw, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | fixed, -1);
            let code = map(0, CODE_SIZE, rw, libc::MAP_SHARED, fd);
            libc::close(fd);
            let s = libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: stack.len() };
            assert_eq!(libc::sigaltstack(&s, std::ptr::null_mut()), 0);
            code
        };
        Runner { code, _one: one, _stack: stack }
    }

    /// The code page's content.
    pub fn code(&mut self) -> &mut [u8] {
        // SAFETY: the writable mapping of the code page; nothing executes meanwhile.
        unsafe { std::slice::from_raw_parts_mut(self.code, CODE_SIZE) }
    }

    /// The data window's content.
    pub fn data(&mut self) -> &mut [u8] {
        // SAFETY: mapped by `new`; nothing executes meanwhile.
        unsafe { std::slice::from_raw_parts_mut(DATA as *mut u8, DATA_SIZE) }
    }

    /// Where the code has to jump to when it is done.
    pub fn exit(&self) -> u64 {
        diff_exit as *const () as u64
    }

    /// Execute from `start` in the code page with `state`, until the exit or a fault.
    pub fn run(&mut self, state: &mut State, start: u64) -> Option<Fault> {
        // SAFETY: only one Runner exists. The code may do what it likes to registers (all are saved around it) and to memory that it can
        // reach by the addresses it was given; signals bring control back.
        unsafe {
            let mut old: [libc::sigaction; SIGNALS.len()] = std::mem::zeroed();
            let mut new: libc::sigaction = std::mem::zeroed();
            new.sa_sigaction = on_signal as *const () as usize;
            new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            for (s, old) in SIGNALS.into_iter().zip(&mut old) {
                libc::sigaction(s, &new, old);
            }
            FAULT = None;
            diff_state = *state;
            diff_state.rip = 0;
            diff_enter(start);
            *state = diff_state;
            for (s, old) in SIGNALS.into_iter().zip(&old) {
                libc::sigaction(s, old, std::ptr::null_mut());
            }
            FAULT
        }
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        // SAFETY: the mappings that `new` made.
        unsafe {
            let off = libc::stack_t { ss_sp: std::ptr::null_mut(), ss_flags: libc::SS_DISABLE, ss_size: 0 };
            libc::sigaltstack(&off, std::ptr::null_mut());
            libc::munmap(CODE as *mut libc::c_void, CODE_SIZE);
            libc::munmap(DATA as *mut libc::c_void, DATA_SIZE);
            libc::munmap(self.code.cast(), CODE_SIZE);
        }
    }
}
