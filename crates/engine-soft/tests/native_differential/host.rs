//! The other side of the comparison: the same bytes, executed by the host's CPU directly.

use std::arch::global_asm;
use std::mem::offset_of;
use std::sync::atomic::{AtomicPtr, Ordering};

/// Registers before and after. RSP and R15 are the harness's.
#[repr(C, align(64))]
#[derive(Clone)]
pub struct Context {
    /// x87 (and other things that are not looked at).
    pub fx: [u8; 512],
    /// YMM0 to YMM15.
    pub ymm: [[u8; 32]; 16],
    /// RAX to R15.
    pub gpr: [u64; 16],
    /// RFLAGS.
    pub flags: u64,
    /// MXCSR.
    pub mxcsr: u32,
    /// Trap number plus one, 0 if it completed.
    pub trap: u32,
    /// CR2 at a page fault.
    pub cr2: u64,
    code: u64,
    stack: u64,
}

impl Context {
    /// All zero.
    pub fn new() -> Context {
        Context {
            fx: [0; 512],
            ymm: [[0; 32]; 16],
            gpr: [0; 16],
            flags: 2,
            mxcsr: 0x1f80,
            trap: 0,
            cr2: 0,
            code: 0,
            stack: 0,
        }
    }
}

global_asm!(
    ".globl ringfort_test_run_host",
    "ringfort_test_run_host:",
    "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
    "mov r15, rdi",
    "mov [r15 + {code}], rsi",
    "mov [r15 + {stack}], rsp",
    "fxrstor64 [r15 + {fx}]",
    "vmovdqu ymm0, [r15+{ymm}]", "vmovdqu ymm1, [r15+{ymm}+32]", "vmovdqu ymm2, [r15+{ymm}+64]",
    "vmovdqu ymm3, [r15+{ymm}+96]", "vmovdqu ymm4, [r15+{ymm}+128]", "vmovdqu ymm5, [r15+{ymm}+160]",
    "vmovdqu ymm6, [r15+{ymm}+192]", "vmovdqu ymm7, [r15+{ymm}+224]", "vmovdqu ymm8, [r15+{ymm}+256]",
    "vmovdqu ymm9, [r15+{ymm}+288]", "vmovdqu ymm10, [r15+{ymm}+320]", "vmovdqu ymm11, [r15+{ymm}+352]",
    "vmovdqu ymm12, [r15+{ymm}+384]", "vmovdqu ymm13, [r15+{ymm}+416]", "vmovdqu ymm14, [r15+{ymm}+448]",
    "vmovdqu ymm15, [r15+{ymm}+480]",
    "ldmxcsr [r15 + {mxcsr}]",
    "push qword ptr [r15 + {flags}]", "popfq",
    "mov rax, [r15+{gpr}]", "mov rcx, [r15+{gpr}+8]", "mov rdx, [r15+{gpr}+16]", "mov rbx, [r15+{gpr}+24]",
    "mov rbp, [r15+{gpr}+40]", "mov rsi, [r15+{gpr}+48]", "mov rdi, [r15+{gpr}+56]", "mov r8, [r15+{gpr}+64]",
    "mov r9, [r15+{gpr}+72]", "mov r10, [r15+{gpr}+80]", "mov r11, [r15+{gpr}+88]", "mov r12, [r15+{gpr}+96]",
    "mov r13, [r15+{gpr}+104]", "mov r14, [r15+{gpr}+112]",
    "jmp qword ptr [r15 + {code}]",
    ".globl ringfort_test_host_exit",
    "ringfort_test_host_exit:",
    "mov [r15+{gpr}], rax", "mov [r15+{gpr}+8], rcx", "mov [r15+{gpr}+16], rdx", "mov [r15+{gpr}+24], rbx",
    "mov [r15+{gpr}+40], rbp", "mov [r15+{gpr}+48], rsi", "mov [r15+{gpr}+56], rdi", "mov [r15+{gpr}+64], r8",
    "mov [r15+{gpr}+72], r9", "mov [r15+{gpr}+80], r10", "mov [r15+{gpr}+88], r11", "mov [r15+{gpr}+96], r12",
    "mov [r15+{gpr}+104], r13", "mov [r15+{gpr}+112], r14",
    "pushfq", "pop qword ptr [r15 + {flags}]",
    "pushfq", "and dword ptr [rsp], 0xfffbffff", "popfq", // RFLAGS.AC
    "stmxcsr [r15 + {mxcsr}]",
    "fxsave64 [r15 + {fx}]", "fninit",
    "vmovdqu [r15+{ymm}], ymm0", "vmovdqu [r15+{ymm}+32], ymm1", "vmovdqu [r15+{ymm}+64], ymm2",
    "vmovdqu [r15+{ymm}+96], ymm3", "vmovdqu [r15+{ymm}+128], ymm4", "vmovdqu [r15+{ymm}+160], ymm5",
    "vmovdqu [r15+{ymm}+192], ymm6", "vmovdqu [r15+{ymm}+224], ymm7", "vmovdqu [r15+{ymm}+256], ymm8",
    "vmovdqu [r15+{ymm}+288], ymm9", "vmovdqu [r15+{ymm}+320], ymm10", "vmovdqu [r15+{ymm}+352], ymm11",
    "vmovdqu [r15+{ymm}+384], ymm12", "vmovdqu [r15+{ymm}+416], ymm13", "vmovdqu [r15+{ymm}+448], ymm14",
    "vmovdqu [r15+{ymm}+480], ymm15",
    "vzeroupper",
    "mov rsp, [r15 + {stack}]",
    "push 0x1f80", "ldmxcsr [rsp]", "pop rax",
    "cld",
    "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
    "ret",
    fx = const offset_of!(Context, fx),
    ymm = const offset_of!(Context, ymm),
    gpr = const offset_of!(Context, gpr),
    flags = const offset_of!(Context, flags),
    mxcsr = const offset_of!(Context, mxcsr),
    code = const offset_of!(Context, code),
    stack = const offset_of!(Context, stack),
);

unsafe extern "sysv64" {
    fn ringfort_test_run_host(context: *mut Context, code: *const u8);
    fn ringfort_test_host_exit();
}

/// Start of the page that holds the code under test.
static CODE: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());

/// The host, ready to execute.
pub struct Host {
    code: *mut u8,
    /// Guest-equal data memory.
    pub data: *mut u8,
}

// SAFETY: the mappings belong to the process.
unsafe impl Send for Host {}

impl Host {
    /// Install the handlers, and map `bytes` of data at the address that the guest's data has.
    pub fn new(address: u64, bytes: usize) -> Host {
        // SAFETY: system calls; the fixed mapping is refused if the place is taken.
        unsafe {
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let anon = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let code = libc::mmap(std::ptr::null_mut(), 4096, prot | libc::PROT_EXEC, anon, -1, 0);
            let at = address as *mut libc::c_void;
            let data = libc::mmap(at, bytes, prot, anon | libc::MAP_FIXED_NOREPLACE, -1, 0);
            assert!(code != libc::MAP_FAILED && data == at, "memory at the guest's address");
            CODE.store(code.cast(), Ordering::SeqCst);
            for signal in [libc::SIGFPE, libc::SIGILL, libc::SIGSEGV, libc::SIGBUS] {
                let mut a: libc::sigaction = std::mem::zeroed();
                a.sa_sigaction = on_signal as *const () as usize;
                a.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
                assert_eq!(libc::sigaction(signal, &a, std::ptr::null_mut()), 0);
            }
            Host { code: code.cast(), data: data.cast() }
        }
    }

    /// Execute one instruction.
    pub fn run(&mut self, instruction: &[u8], c: &mut Context) {
        c.trap = 0;
        c.cr2 = 0;
        let mut bytes = instruction.to_vec();
        // JMP [RIP+..]; the address is aligned, because alignment checks may be on.
        bytes.extend([0xff, 0x25]);
        bytes.extend((60 - bytes.len() as u32).to_le_bytes());
        bytes.resize(64, 0xcc);
        bytes.extend((ringfort_test_host_exit as *const () as u64).to_le_bytes());
        // SAFETY: the code fits its page; it was filtered to SIMD and x87 instructions that touch only registers saved and
        // restored, and the data at its fixed place. Faults come back through the handler.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.code, bytes.len());
            ringfort_test_run_host(c, self.code);
        }
    }
}

unsafe extern "C" fn on_signal(signal: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel hands a valid context.
    let g = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let code = CODE.load(Ordering::SeqCst) as i64;
    if g[libc::REG_RIP as usize] != code {
        // SAFETY: restoring the default action lets the kernel kill the process on return.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
        return;
    }
    // SAFETY: R15 is the context while code under test runs.
    let c = unsafe { &mut *(g[libc::REG_R15 as usize] as *mut Context) };
    c.trap = g[libc::REG_TRAPNO as usize] as u32 + 1;
    c.cr2 = g[libc::REG_CR2 as usize] as u64;
    g[libc::REG_RIP as usize] = ringfort_test_host_exit as *const () as i64;
}
