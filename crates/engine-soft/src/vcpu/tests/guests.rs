//! The guest programs: 64-bit code with the APIC ID in EDI, position-independent, at 0x1_0000. Data at 0x10_0000 (RBX).
//!
//! Each begins with `bring_up` on the boot processor: INIT and two start-up messages to all others.

use std::arch::global_asm;

/// A guest program.
pub struct Program {
    /// Its code.
    pub code: &'static [u8],
    /// Vectors and the offsets of their handlers.
    pub handlers: Vec<(u64, u64)>,
}

macro_rules! program {
    ($name:ident, $start:ident, $end:ident, [$($vector:literal => $handler:ident),*], $($line:expr),+ $(,)?) => {
        global_asm!(
            ".pushsection .rodata",
            concat!(".global ", stringify!($start)),
            concat!(stringify!($start), ":"),
            "mov ebx, 0x100000",
            "mov r12d, 0xfee00000",
            // Enable the APIC.
            "mov dword ptr [r12 + 0xf0], 0x1ff",
            "test edi, edi",
            "jnz 777f",
            "cmp dword ptr [rbx + 0x800], 1",
            "je 777f",
            // INIT, then start-up at 0x8000, to all but this one.
            "mov dword ptr [r12 + 0x300], 0xc4500",
            "mov dword ptr [r12 + 0x300], 0xc4608",
            "mov dword ptr [r12 + 0x300], 0xc4608",
            "777:",
            $($line,)+
            // Sleep for good.
            "888:",
            "cli",
            "hlt",
            "jmp 888b",
            concat!(".global ", stringify!($end)),
            concat!(stringify!($end), ":"),
            ".popsection",
        );
        pub fn $name() -> Program {
            unsafe extern "C" {
                static $start: u8;
                static $end: u8;
                $(static $handler: u8;)*
            }
            let (start, end) = (&raw const $start, &raw const $end);
            // SAFETY: the two symbols enclose the bytes assembled above.
            let code = unsafe { std::slice::from_raw_parts(start, end as usize - start as usize) };
            #[allow(unused_unsafe, reason = "programs without handlers")]
            let handlers = vec![$(($vector, &raw const $handler as u64 - start as u64)),*];
            Program { code, handlers }
        }
    };
}

program!(
    bring_up,
    guest_bring_up,
    guest_bring_up_end,
    [],
    "lea eax, [rdi + 0x5a00]",
    "mov [rbx + rdi * 8 + 0x100], rax",
    "lock inc qword ptr [rbx]",
    "test edi, edi",
    "jnz 888f",
    "2: pause",
    "mov rax, [rbx]",
    "cmp rax, [rbx + 0x800]",
    "jne 2b",
    "out 0xf4, eax",
);

program!(
    spinlock,
    guest_spinlock,
    guest_spinlock_end,
    [],
    "mov ecx, [rbx + 0x808]",
    "2: lock inc qword ptr [rbx + 128]",
    "3: mov eax, 1",
    "xchg [rbx], eax",
    "test eax, eax",
    "jz 5f",
    "4: pause",
    "cmp dword ptr [rbx], 0",
    "jne 4b",
    "jmp 3b",
    "5: inc qword ptr [rbx + 64]",
    "mov dword ptr [rbx], 0",
    "dec ecx",
    "jnz 2b",
    "lock inc qword ptr [rbx + 192]",
    "test edi, edi",
    "jnz 888f",
    "6: pause",
    "mov rax, [rbx + 192]",
    "cmp rax, [rbx + 0x800]",
    "jne 6b",
    "out 0xf4, eax",
);

// CPU 0 sends 0x40 to CPU 1, which answers with 0x41; both wait in HLT. [rbx]: pings taken, [rbx + 64]: pongs taken.
program!(
    ping_pong, guest_ping_pong, guest_ping_pong_end, [0x40 => guest_ping, 0x41 => guest_pong],
    "xor ecx, ecx",
    "test edi, edi",
    "jnz 5f",
    // CPU 1 says that it is ready.
    "2: pause",
    "cmp dword ptr [rbx + 128], 0",
    "je 2b",
    "mov dword ptr [r12 + 0x310], 0x01000000",
    "3: mov dword ptr [r12 + 0x300], 0x4040",
    "inc ecx",
    "4: cli",
    "cmp [rbx + 64], ecx",
    "je 44f",
    "sti",
    "hlt",
    "jmp 4b",
    "44: cmp ecx, [rbx + 0x808]",
    "jne 3b",
    "mov eax, ecx",
    "out 0xf4, eax",
    "jmp 888f",
    "5: mov dword ptr [r12 + 0x310], 0",
    "mov dword ptr [rbx + 128], 1",
    "6: cli",
    "cmp [rbx], ecx",
    "jne 7f",
    "sti",
    "hlt",
    "jmp 6b",
    "7: inc ecx",
    "mov dword ptr [r12 + 0x300], 0x4041",
    "jmp 6b",
    ".global guest_ping",
    "guest_ping: inc dword ptr [rbx]",
    "mov dword ptr [r12 + 0xb0], 0",
    "iretq",
    ".global guest_pong",
    "guest_pong: inc dword ptr [rbx + 64]",
    "mov dword ptr [r12 + 0xb0], 0",
    "iretq",
);

// TSC deadlines 0.5 to 2 ms ahead. [rbx + 8]: sum of delays, [rbx + 16]: greatest, [rbx + 24]: early ones. R14: the deadline.
program!(
    deadlines, guest_deadlines, guest_deadlines_end, [0x50 => guest_deadline],
    "mov dword ptr [r12 + 0x320], 0x40050",
    "xor r13d, r13d",
    "2: rdtsc",
    "shl rdx, 32",
    "lea r14, [rax + rdx + 1000000]",
    "mov eax, r13d",
    "and eax, 3",
    "imul eax, eax, 1000000",
    "add r14, rax",
    "mov eax, r14d",
    "mov rdx, r14",
    "shr rdx, 32",
    "mov ecx, 0x6e0",
    "xor esi, esi",
    "wrmsr",
    "3: cli",
    "test esi, esi",
    "jnz 4f",
    "sti",
    "hlt",
    "jmp 3b",
    "4: inc r13d",
    "cmp r13d, [rbx + 0x808]",
    "jne 2b",
    "mov eax, r13d",
    "out 0xf4, eax",
    "jmp 888f",
    ".global guest_deadline",
    "guest_deadline: rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "sub rax, r14",
    "jnc 5f",
    "inc qword ptr [rbx + 24]",
    "5: add [rbx + 8], rax",
    "cmp rax, [rbx + 16]",
    "jb 6f",
    "mov [rbx + 16], rax",
    "6: mov esi, 1",
    "mov dword ptr [r12 + 0xb0], 0",
    "iretq",
);

// CPU 0 sends NMIs to CPU 1, which is in HLT with IF clear. [rbx]: taken, [rbx + 8]: inside the handler, [rbx + 16]: nested.
program!(
    nmi, guest_nmi, guest_nmi_end, [2 => guest_nmi_handler],
    "xor ecx, ecx",
    "xor edx, edx",
    "test edi, edi",
    "jz 1f",
    "mov dword ptr [rbx + 128], 1",
    "jmp 888f",
    "1: pause",
    "cmp dword ptr [rbx + 128], 0",
    "je 1b",
    "mov dword ptr [r12 + 0x310], 0x01000000",
    "2: mov dword ptr [r12 + 0x300], 0x4400",
    // A second one at once: at most one waits while the first is served.
    "mov dword ptr [r12 + 0x300], 0x4400",
    "inc ecx",
    "3: pause",
    "mov eax, [rbx]",
    "cmp eax, edx",
    "je 3b",
    "mov edx, eax",
    "cmp ecx, [rbx + 0x808]",
    "jne 2b",
    // Let the last one end.
    "mov esi, 100000",
    "4: pause",
    "dec esi",
    "jnz 4b",
    "mov eax, ecx",
    "out 0xf4, eax",
    "jmp 888f",
    ".global guest_nmi_handler",
    "guest_nmi_handler: push rax",
    "mov eax, 1",
    "xchg [rbx + 8], rax",
    "add [rbx + 16], rax",
    "mov eax, 200",
    "5: dec eax",
    "jnz 5b",
    "mov dword ptr [rbx + 8], 0",
    "inc dword ptr [rbx]",
    "pop rax",
    "iretq",
);

// CPU 0 writes `mov eax, n; ret` and then n to [rbx]; CPU 1 waits for n, serialises, calls, compares. [rbx + 64]: answered,
// [rbx + 16]: mismatches.
program!(
    cross_modify,
    guest_cross_modify,
    guest_cross_modify_end,
    [],
    "mov r13d, 0x120000",
    "mov r14d, 1",
    "test edi, edi",
    "jnz 5f",
    "mov byte ptr [r13 + 5], 0xc3",
    "2: mov [r13 + 1], r14d",
    "mov byte ptr [r13], 0xb8",
    "mov [rbx], r14",
    "3: pause",
    "cmp [rbx + 64], r14",
    "jne 3b",
    "inc r14d",
    "cmp r14d, [rbx + 0x808]",
    "jbe 2b",
    "lea eax, [r14 - 1]",
    "out 0xf4, eax",
    "jmp 888f",
    "5: pause",
    "cmp [rbx], r14",
    "jne 5b",
    "push rbx",
    "xor eax, eax",
    "cpuid",
    "pop rbx",
    "call r13",
    "cmp eax, r14d",
    "je 6f",
    "inc qword ptr [rbx + 16]",
    "6: mov [rbx + 64], r14",
    "inc r14d",
    "jmp 5b",
);

// Both CPUs execute the same page and each changes the instruction that it is about to execute. [rbx + 16]: mismatches, [rbx]: done.
macro_rules! patches_itself {
    () => {
        concat!(
            "mov ecx, [rbx + 0x808];",
            "lea rsi, [rip + 4f + 1];",
            "2: mov [rsi], ecx;",
            // What is read makes the page one that may be stored to, if it is not known as code.
            "mov r8d, [rsi];",
            "4: mov eax, 0x11111111;",
            "cmp eax, ecx;",
            "je 5f;",
            "lock inc qword ptr [rbx + 16];",
            "5: dec ecx;",
            "jnz 2b;",
            "lock inc qword ptr [rbx];"
        )
    };
}

program!(
    self_modify,
    guest_self_modify,
    guest_self_modify_end,
    [],
    "test edi, edi",
    "jnz 6f",
    patches_itself!(),
    "7: pause",
    "cmp dword ptr [rbx], 2",
    "jne 7b",
    "mov eax, [rbx + 16]",
    "out 0xf4, eax",
    "jmp 888f",
    "6:",
    patches_itself!(),
);

// Reports the vector times 0x10000 plus a running number.
program!(
    wait_for_interrupts, guest_wait, guest_wait_end, [0x30 => guest_wait_30, 0x31 => guest_wait_31, 0x32 => guest_wait_32],
    "xor esi, esi",
    "xor eax, eax",
    "out 0xf4, eax",
    "2: sti",
    "hlt",
    "jmp 2b",
    // Masks LINT0 first: once is enough.
    ".global guest_wait_30",
    "guest_wait_30: mov dword ptr [r12 + 0x350], 0x10700",
    "mov eax, 0x300000",
    "jmp 3f",
    ".global guest_wait_31",
    "guest_wait_31: mov eax, 0x310000",
    "jmp 4f",
    ".global guest_wait_32",
    "guest_wait_32: mov eax, 0x320000",
    "4: mov dword ptr [r12 + 0xb0], 0",
    "3: inc esi",
    "add eax, esi",
    "out 0xf4, eax",
    "iretq",
);

// The APIC timer at 100 Hz, HLT between. [rbx]: interrupts.
program!(
    idle, guest_idle, guest_idle_end, [0x51 => guest_idle_tick],
    "mov dword ptr [r12 + 0x3e0], 0xb",
    "mov dword ptr [r12 + 0x320], 0x20051",
    "mov dword ptr [r12 + 0x380], 10000000",
    "xor eax, eax",
    "out 0xf4, eax",
    "2: sti",
    "hlt",
    "jmp 2b",
    ".global guest_idle_tick",
    "guest_idle_tick: inc qword ptr [rbx]",
    "mov dword ptr [r12 + 0xb0], 0",
    "iretq",
);

// In x2APIC mode: priorities by CR8, self-IPIs, IPIs by hypercall. [rbx]: bits of the vectors taken (from 0x60), in R13 the order.
program!(
    x2apic, guest_x2apic, guest_x2apic_end,
    [0x61 => guest_x2apic_61, 0x72 => guest_x2apic_72, 0x83 => guest_x2apic_83],
    "mov ecx, 0x1b",
    "rdmsr",
    "or eax, 0x400",
    "wrmsr",
    "mov r12d, 0",
    "xor r13d, r13d",
    // Class 7 and below wait.
    "mov eax, 7",
    "mov cr8, rax",
    "sti",
    "mov ecx, 0x83f",
    "xor edx, edx",
    "mov eax, 0x61",
    "wrmsr",
    "mov eax, 0x72",
    "wrmsr",
    "nop",
    "mov eax, r13d",
    "out 0xf4, eax",
    // By hypercall to itself: vector 0x83 is above the class.
    "push rbx",
    "mov eax, 10",
    "mov ebx, 1",
    "xor ecx, ecx",
    "xor edx, edx",
    "mov esi, 0x83",
    "vmcall",
    "pop rbx",
    "mov eax, r13d",
    "out 0xf4, eax",
    // Lowering CR8 lets them in, the higher one first.
    "xor eax, eax",
    "mov cr8, rax",
    "nop",
    "mov eax, r13d",
    "out 0xf4, eax",
    // With IF clear, one that POPF lets in at once.
    "pushfq",
    "cli",
    "mov ecx, 0x83f",
    "xor edx, edx",
    "mov eax, 0x61",
    "wrmsr",
    "nop",
    "mov eax, r13d",
    "out 0xf4, eax",
    "popfq",
    "nop",
    "mov eax, r13d",
    "out 0xf4, eax",
    "jmp 888f",
    ".global guest_x2apic_61",
    "guest_x2apic_61: shl r13d, 4",
    "or r13d, 1",
    "jmp 2f",
    ".global guest_x2apic_72",
    "guest_x2apic_72: shl r13d, 4",
    "or r13d, 2",
    "jmp 2f",
    ".global guest_x2apic_83",
    "guest_x2apic_83: shl r13d, 4",
    "or r13d, 3",
    "2: push rax",
    "push rcx",
    "push rdx",
    "mov ecx, 0x80b",
    "xor eax, eax",
    "xor edx, edx",
    "wrmsr",
    "pop rdx",
    "pop rcx",
    "pop rax",
    "iretq",
);

// Port 0xf5 makes the test's bus panic.
program!(defect, guest_defect, guest_defect_end, [], "in al, 0xf5",);

// Every CPU stores to [rbx + 0x3000] and [rbx + 0x4000] for ever.
program!(
    writers,
    guest_writers,
    guest_writers_end,
    [],
    "lock inc qword ptr [rbx]",
    "test edi, edi",
    "jnz 3f",
    "2: pause",
    "mov rax, [rbx]",
    "cmp rax, [rbx + 0x800]",
    "jne 2b",
    "out 0xf4, eax",
    "3: inc qword ptr [rbx + 0x4000]",
    "lock inc qword ptr [rbx + 0x3000]",
    "jmp 3b",
);
