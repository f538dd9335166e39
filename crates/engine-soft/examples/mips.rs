//! How fast the engine is: millions of guest instructions per second on a few kinds of loops.
//!
//! `cargo run --release -p ringfort-engine-soft --example mips [NAME]`; `RINGFORT_TIER=interp` leaves the translator out.

use ringfort_engine_soft::cpu::{Activity, RIP, gpr};
use ringfort_engine_soft::testing::{Machine, TestMode, layout};
use ringfort_engine_soft::translate::Translator;
use std::arch::global_asm;
use std::time::Instant;

// Position-independent guest code, each piece counted by RCX and ending at its end label.
global_asm!(
    ".pushsection .rodata",
    // 9 instructions a round: register arithmetic.
    "mips_xorshift:",
    "2: mov rax, rbx",
    "shl rax, 13",
    "xor rbx, rax",
    "mov rax, rbx",
    "shr rax, 7",
    "xor rbx, rax",
    "add rdx, rbx",
    "dec rcx",
    "jnz 2b",
    "mips_xorshift_end:",
    // 7 a round: loads and stores.
    "mips_memory:",
    "2: mov rax, [rsi + rdx * 8]",
    "add rax, rbx",
    "mov [rdi + rdx * 8], rax",
    "inc rdx",
    "and edx, 511",
    "dec rcx",
    "jnz 2b",
    "mips_memory_end:",
    // 11 a round: calls, pushes, pops.
    "mips_calls:",
    "2: call 3f",
    "dec rcx",
    "jnz 2b",
    "jmp mips_calls_end",
    "3: push rbp",
    "mov rbp, rsp",
    "push rbx",
    "lea rbx, [rax + 3]",
    "xor rax, rbx",
    "pop rbx",
    "pop rbp",
    "ret",
    "mips_calls_end:",
    // 10 a round: bytes through a table, a branch that varies.
    "mips_bytes:",
    "2: movzx eax, byte ptr [rsi + rdx]",
    "movzx eax, byte ptr [rdi + rax]",
    "add rbx, rax",
    "test bl, 8",
    "jz 3f",
    "xor ebx, 0x55",
    "3: inc edx",
    "and edx, 1023",
    "cmp rcx, 1",
    "lea rcx, [rcx - 1]",
    "jne 2b",
    "mips_bytes_end:",
    // 4 a round, of which one copies 1 KiB.
    "mips_copy:",
    "2: mov r8, rcx",
    "mov ecx, 128",
    "lea rsi, [rip + mips_copy]",
    "and rsi, -4096",
    "mov rdi, r9",
    "rep movsq",
    "mov rcx, r8",
    "dec rcx",
    "jnz 2b",
    "mips_copy_end:",
    ".popsection",
);

macro_rules! piece {
    ($name:literal, $start:ident, $end:ident, $rounds:expr, $per_round:expr) => {{
        unsafe extern "C" {
            static $start: u8;
            static $end: u8;
        }
        // SAFETY: both labels stand in the assembly above, in this order.
        let code = unsafe {
            let start = &raw const $start;
            std::slice::from_raw_parts(start, (&raw const $end).offset_from(start) as usize)
        };
        ($name, code, $rounds, $per_round)
    }};
}

fn main() {
    let only = std::env::args().nth(1).unwrap_or_default();
    let pieces: [(&str, &[u8], u64, f64); 5] = [
        piece!("xorshift", mips_xorshift, mips_xorshift_end, 10_000_000, 9.0),
        piece!("memory", mips_memory, mips_memory_end, 10_000_000, 7.0),
        piece!("calls", mips_calls, mips_calls_end, 5_000_000, 11.0),
        piece!("bytes", mips_bytes, mips_bytes_end, 5_000_000, 10.5),
        piece!("copy", mips_copy, mips_copy_end, 1_000_000, 9.0),
    ];
    for (name, code, rounds, per_round) in pieces {
        if !name.contains(&only) {
            continue;
        }
        let mut best = f64::INFINITY;
        for _ in 0..3 {
            let mut m = Machine::new(TestMode::Long64);
            m.load_code(code);
            if std::env::var_os("RINGFORT_TIER").is_none_or(|t| t != "interp") {
                m.cpu.translator = Some(Translator::new().expect("memory for code"));
            }
            let r = &mut m.cpu.regs;
            r[gpr::RCX] = rounds;
            r[gpr::RDX] = 0;
            r[gpr::RBX] = 0x1234_5678_9abc_def1;
            r[gpr::RSI] = layout::DATA;
            r[gpr::RDI] = layout::DATA + 0x2000;
            r[9] = layout::DATA + 0x8000;
            let end = layout::CODE + code.len() as u64;
            let start = Instant::now();
            while m.cpu.regs[usize::from(RIP)] != end {
                m.cpu.step_block();
                assert_eq!(m.cpu.activity, Activity::Running, "{name} faults");
            }
            best = best.min(start.elapsed().as_secs_f64());
            assert_eq!(m.cpu.regs[gpr::RCX], 0, "{name} went wrong");
        }
        println!("{name:10} {:7.1} MIPS", rounds as f64 * per_round / best / 1e6);
    }
}
