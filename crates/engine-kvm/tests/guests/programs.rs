//! The guests' code. Each begins at its first byte; handlers are at multiples of 256 bytes after it.

use std::arch::global_asm;

/// Declare a program: its name, its mode, its lines.
macro_rules! program {
    ($name:ident, $mode:literal, $($line:literal),+ $(,)?) => {
        global_asm!(
            ".pushsection .rodata.guests, \"a\"",
            concat!(".global rf_", stringify!($name), "_begin"),
            concat!(".global rf_", stringify!($name), "_end"),
            ".balign 256",
            $mode,
            concat!("rf_", stringify!($name), "_begin:"),
            $($line,)+
            concat!("rf_", stringify!($name), "_end:"),
            ".code64",
            ".popsection",
        );
        pub fn $name() -> &'static [u8] {
            unsafe extern "C" {
                #[link_name = concat!("rf_", stringify!($name), "_begin")]
                static BEGIN: u8;
                #[link_name = concat!("rf_", stringify!($name), "_end")]
                static END: u8;
            }
            let (begin, end) = (&raw const BEGIN, &raw const END);
            // SAFETY: the labels enclose the bytes that were assembled between them.
            unsafe { std::slice::from_raw_parts(begin, end.offset_from(begin) as usize) }
        }
    };
}

// Ports in all widths and by string instructions; ES and DS are zero.
program!(
    ports,
    ".code16",
    "mov dx, 0x80",
    "in al, dx",
    "inc al",
    "out dx, al",
    "mov ax, 0x1234",
    "out dx, ax",
    "mov eax, 0x12345678",
    "out dx, eax",
    "cld",
    "mov si, 0x3000",
    "mov cx, 5",
    "rep outsb",
    "mov si, 0x3000",
    "mov cx, 2",
    "rep outsw",
    "mov di, 0x4000",
    "mov cx, 3",
    "rep insb",
    "mov dx, 0xf4",
    "out dx, al",
    "hlt",
);

// Loads and stores where no RAM is.
program!(
    mmio,
    ".code32",
    "mov ebx, 0xd0000000",
    "mov eax, dword ptr [ebx]",
    "inc eax",
    "mov dword ptr [ebx + 4], eax",
    "mov byte ptr [ebx + 9], 0x5a",
    "mov word ptr [ebx + 10], 0x1122",
    "mov dx, 0xf4",
    "out dx, al",
    "hlt",
);

// From 32-bit to 64-bit mode by the guest itself, with page tables at 0x10000 and a GDT whose selector 8 is 64-bit code.
program!(
    to_long,
    ".code32",
    "mov eax, cr4",
    "or eax, 0x20",
    "mov cr4, eax",
    "mov eax, 0x10000",
    "mov cr3, eax",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "or eax, 0x100",
    "wrmsr",
    "mov eax, cr0",
    "or eax, 0x80000000",
    "mov cr0, eax",
    "push 8",
    "call 2f",
    "2: add dword ptr [esp], 5",
    "retf",
    ".code64",
    "mov rax, 0x1122334455667788",
    "shr rax, 32",
    "mov dx, 0x80",
    "out dx, eax",
    "mov dx, 0xf4",
    "out dx, al",
    "hlt",
);

// Waits for interrupts. The handler (at 0x100) says so on a port and ends the interrupt.
program!(
    wait,
    ".code64",
    "sti",
    "2: hlt",
    "jmp 2b",
    ".balign 256",
    "push rax",
    "push rdx",
    "mov dx, 0x80",
    "mov al, 0xaa",
    "out dx, al",
    "mov eax, 0xfee000b0",
    "mov dword ptr [rax], 0",
    "pop rdx",
    "pop rax",
    "iretq",
);

// As `wait`, but the interrupt comes from the 8259 and is not the local APIC's to end.
program!(
    wait_extint,
    ".code64",
    "sti",
    "2: hlt",
    "jmp 2b",
    ".balign 256",
    "push rax",
    "push rdx",
    "mov dx, 0x80",
    "mov al, 0xee",
    "out dx, al",
    "pop rdx",
    "pop rax",
    "iretq",
);

// Sets the TSC deadline 1000000 ticks ahead, ten times; the handler says so.
program!(
    deadlines,
    ".code64",
    // Spurious vector and enable, timer in deadline mode with vector 0x40.
    "mov eax, 0xfee000f0",
    "mov dword ptr [rax], 0x1ff",
    "mov eax, 0xfee00320",
    "mov dword ptr [rax], 0x40040",
    "mfence",
    "mov ebx, 10",
    "2: rdtsc",
    "add eax, 1000000",
    "adc edx, 0",
    "mov ecx, 0x6e0",
    "cli",
    "wrmsr",
    "sti",
    "hlt",
    "dec ebx",
    "jnz 2b",
    "mov dx, 0xf4",
    "out dx, al",
    "hlt",
    ".balign 256",
    "push rax",
    "push rdx",
    "mov dx, 0x80",
    "mov al, 0x40",
    "out dx, al",
    "mov eax, 0xfee000b0",
    "mov dword ptr [rax], 0",
    "pop rdx",
    "pop rax",
    "iretq",
);

// Counts at 0x300000, and holds in 0x300008 the last TSC, in 0x300010 how often it went back. Does so until told to stop at 0x300018.
program!(
    count,
    ".code64",
    "mov ebx, 0x300000",
    "2: inc qword ptr [rbx]",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "cmp rax, [rbx + 8]",
    "jae 3f",
    "inc qword ptr [rbx + 0x10]",
    "3: mov [rbx + 8], rax",
    "cmp qword ptr [rbx + 0x18], 0",
    "je 2b",
    "mov dx, 0xf4",
    "out dx, al",
    "4: hlt",
    "jmp 4b",
);

// Writes one byte to the pages 0x300, 0x301, 0x305 and to the last of 4 MiB.
program!(
    dirty,
    ".code64",
    "mov byte ptr [0x300000], 1",
    "mov byte ptr [0x301234], 1",
    "mov byte ptr [0x305fff], 1",
    "mov byte ptr [0x3ff000], 1",
    "mov dx, 0xf4",
    "out dx, al",
    "hlt",
);

// Writes to every page from 0x200000 to 0x3fffff.
program!(
    dirty_all,
    ".code64",
    "mov rbx, 0x200000",
    "2: mov byte ptr [rbx], 1",
    "add rbx, 0x1000",
    "cmp rbx, 0x400000",
    "jb 2b",
    "mov dx, 0xf4",
    "out dx, al",
    "hlt",
);

// Stores to doorbells: ports 0x700 and 0x704, and an address.
program!(
    doorbells,
    ".code64",
    "mov dx, 0x700",
    "mov eax, 7",
    "out dx, eax",
    "mov eax, 8",
    "out dx, eax",
    "mov dx, 0x704",
    "out dx, al",
    "mov ebx, 0xd0000000",
    "mov word ptr [rbx], 1",
    "mov dword ptr [rbx], 2",
    "mov dx, 0xf4",
    "out dx, al",
    "hlt",
);

// Stores RSI to an address and tells so by the port in RDX, 200 times.
program!(
    store_and_tell,
    ".code64",
    "mov ebx, 0xd0000000",
    "mov ecx, 200",
    "2:",
    "mov [rbx], esi",
    "out dx, al",
    "dec ecx",
    "jnz 2b",
    "3:",
    "hlt",
    "jmp 3b",
);

// Reads MSRs named at 0x300000 (ends with zero) and writes what came to the places after; the #GP handler (at 0x100) skips RDMSR and gives
// all ones.
program!(
    rdmsrs,
    ".code64",
    "mov ebx, 0x300000",
    "mov edi, 0x300800",
    "2: mov ecx, [rbx]",
    "test ecx, ecx",
    "jz 3f",
    "rdmsr",
    "mov [rdi], eax",
    "mov [rdi + 4], edx",
    "add rbx, 4",
    "add rdi, 8",
    "jmp 2b",
    "3: mov dx, 0xf4",
    "out dx, al",
    "hlt",
    ".balign 256",
    "mov eax, -1",
    "mov edx, -1",
    "add qword ptr [rsp + 8], 2",
    "add rsp, 8",
    "iretq",
);

// Ten instructions of one byte each and a known store, for a debugger.
program!(
    steps,
    ".code64",
    "nop",
    "nop",
    "nop",
    "nop",
    "mov byte ptr [0x300040], 9",
    "nop",
    "nop",
    "mov dx, 0xf4",
    "out dx, al",
    "hlt",
);

// Executes an undefined instruction without an IDT: a triple fault.
program!(fault, ".code64", "ud2");

// Starts the processor with APIC ID 1 at 0x8000, and waits for what it writes to 0x300000.
program!(
    start_other,
    ".code64",
    "mov eax, 0xfee000f0",
    "mov dword ptr [rax], 0x1ff",
    "mov eax, 0xfee00310",
    "mov dword ptr [rax], 0x01000000",
    "mov eax, 0xfee00300",
    "mov dword ptr [rax], 0x4500",
    "mov dword ptr [rax], 0x4608",
    "2: pause",
    "cmp dword ptr [0x300000], 0x600d",
    "jne 2b",
    "mov dx, 0xf4",
    "out dx, al",
    "hlt",
);

// What the other does, in real mode at 0x800:0: says its code segment through a big real-mode data segment it does not have, hence by a
// port, and in memory by way of port 0x88 that the test turns into a store.
program!(other, ".code16", "mov ax, cs", "mov dx, 0x88", "out dx, ax", "2: hlt", "jmp 2b",);
