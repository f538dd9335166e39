//! Single step, breakpoints and watchpoints.

use crate::support::{Guest, HANDLERS};
use iced_x86::code_asm::*;
use ringfort_engine_soft::cpu::gpr;
use ringfort_engine_soft::testing::{TestMode, layout, selector};
use ringfort_x86::cr::*;
use ringfort_x86::flags::{RF, TF};

const BS: u64 = DR6_BS;

#[test]
fn tf_traps_after_each_instruction() {
    let mut g = Guest::new(TestMode::Long64);
    let v = g.vector_of(|a| {
        a.push(TF as i32 | 2).unwrap();
        a.popfq().unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
    });
    assert_eq!(v, 1);
    assert_eq!(g.stack(0), layout::CODE + 5 + 1 + 1, "after the instruction behind POPF");
    assert_eq!(g.stack(2) & (TF | RF), TF);
    assert_eq!(g.cpu().dr6, DR6_FIXED | BS);
    // Count steps: the handler returns.
    let mut g = Guest::new(TestMode::Long64);
    g.code_at(64, HANDLERS + 0x10, |a| {
        a.inc(r15).unwrap();
        a.iretq().unwrap();
    });
    g.halts(|a| {
        a.push(TF as i32 | 2).unwrap();
        a.popfq().unwrap();
        a.mov(ecx, 3).unwrap();
        a.mov(esi, layout::DATA as i32).unwrap();
        a.mov(edi, layout::DATA as i32 + 0x100).unwrap();
        a.rep().movsb().unwrap();
        a.push(2).unwrap();
        a.popfq().unwrap();
        a.nop().unwrap();
        a.hlt().unwrap();
    });
    // 3 moves, 3 iterations, PUSH, POPF (which had TF set when it began).
    assert_eq!(g.reg(15), 8);
}

#[test]
fn mov_ss_delays_the_trap() {
    let mut g = Guest::new(TestMode::Protected32);
    let v = g.vector_of(|a| {
        a.mov(eax, u32::from(selector::DATA)).unwrap();
        a.push(TF as i32 | 2).unwrap();
        a.popfd().unwrap();
        a.mov(ss, eax).unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
    });
    assert_eq!((v, g.stack(0)), (1, layout::CODE + 5 + 5 + 1 + 2 + 1));
}

#[test]
fn instruction_breakpoints_fault_before_and_rf_passes_them() {
    let mut g = Guest::new(TestMode::Long64);
    g.code_at(64, HANDLERS + 0x10, |a| {
        a.inc(r15).unwrap();
        a.mov(r14, qword_ptr(rsp)).unwrap();
        a.bts(qword_ptr(rsp + 16), 16).unwrap();
        a.iretq().unwrap();
    });
    g.cpu().dr[2] = layout::CODE + 1;
    g.cpu().dr7 = DR7_FIXED | 2 << 4;
    g.halts(|a| {
        a.nop().unwrap();
        a.inc(rbx).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!((g.reg(15), g.reg(gpr::RBX), g.reg(14)), (1, 1, layout::CODE + 1));
    assert_eq!(g.cpu().dr6, DR6_FIXED | 4);
}

/// RF holds until a repeated instruction is done, and is set in what a trap between its iterations saves.
#[test]
fn a_breakpoint_on_a_repeated_instruction_hits_once() {
    for trap in [false, true] {
        let mut g = Guest::new(TestMode::Long64);
        g.code_at(64, HANDLERS + 0x10, |a| {
            a.inc(r15).unwrap();
            a.mov(eax, dword_ptr(rsp + 16)).unwrap();
            a.shr(eax, 16).unwrap();
            a.and(eax, 1).unwrap();
            a.add(r14, rax).unwrap();
            a.bts(qword_ptr(rsp + 16), 16).unwrap();
            a.iretq().unwrap();
        });
        let start = if trap { 5 + 1 } else { 0 };
        g.cpu().dr[0] = layout::CODE + 10 + start;
        g.cpu().dr7 = DR7_FIXED | 2;
        g.halts(|a| {
            a.mov(ecx, 5).unwrap();
            a.mov(edi, layout::DATA as i32).unwrap();
            if trap {
                a.push(TF as i32 | 2).unwrap();
                a.popfq().unwrap();
            }
            a.rep().stosb().unwrap();
            a.push(2).unwrap();
            a.popfq().unwrap();
            a.hlt().unwrap();
        });
        // The breakpoint; with TF, a trap after each of the five iterations, four times with RF, and after PUSH and POPF.
        assert_eq!((g.reg(15), g.reg(14)), if trap { (8, 4) } else { (1, 0) }, "TF {trap}");
        assert_eq!(g.reg(gpr::RCX), 0);
    }
}

/// RF is gone by the time that an instruction itself enters a handler.
#[test]
fn int_n_does_not_save_the_rf_that_let_it_run() {
    let mut g = Guest::new(TestMode::Long64);
    g.cpu().sys_flags |= RF;
    assert_eq!(g.vector_of(|a| a.int(0x40).unwrap()), 0x40);
    assert_eq!(g.stack(2) & RF, 0);
    let mut g = Guest::new(TestMode::Long64);
    assert_eq!(g.vector_of(|a| a.ud2().unwrap()), 6);
    assert_eq!(g.stack(2) & RF, RF, "a fault");
}

#[test]
fn watchpoints_trap_after_the_access() {
    let mut g = Guest::new(TestMode::Long64);
    // The page is in the TLB before the watchpoint is set.
    g.m.write(layout::DATA, &[0; 16]);
    let arm = |a: &mut CodeAssembler, enables: u32| {
        a.mov(rsi, layout::DATA).unwrap();
        a.mov(qword_ptr(rsi + 8), 0).unwrap();
        a.lea(rax, qword_ptr(rsi + 4)).unwrap();
        a.mov(dr0, rax).unwrap();
        a.mov(eax, enables).unwrap();
        a.mov(dr7, rax).unwrap();
    };
    // Writes to 4 bytes at +4.
    let v = g.vector_of(|a| {
        arm(a, 1 | 0xd << 16);
        a.mov(eax, dword_ptr(rsi + 4)).unwrap();
        a.mov(byte_ptr(rsi + 3), 1).unwrap();
        a.mov(byte_ptr(rsi + 8), 1).unwrap();
        a.mov(byte_ptr(rsi + 7), 1).unwrap();
        a.nop().unwrap();
    });
    assert_eq!((v, g.cpu().dr6), (1, DR6_FIXED | 1));
    assert_eq!(g.m.read(layout::DATA + 7, 1), [1]);
    let at = g.stack(0);
    assert_eq!(g.m.read(at, 1), [0x90], "the instruction after the access");
    // Reads as well.
    let mut g = Guest::new(TestMode::Long64);
    let v = g.vector_of(|a| {
        arm(a, 1 | 0xf << 16);
        a.mov(eax, dword_ptr(rsi + 1)).unwrap();
    });
    assert_eq!((v, g.cpu().dr6), (1, DR6_FIXED | 1));
}

#[test]
fn gd_guards_the_debug_registers() {
    let mut g = Guest::new(TestMode::Long64);
    g.cpu().dr7 = DR7_FIXED | DR7_GD;
    let v = g.vector_of(|a| a.mov(rax, dr0).unwrap());
    assert_eq!((v, g.stack(0)), (1, layout::CODE), "a fault");
    assert_eq!(g.cpu().dr6, DR6_FIXED | DR6_BD);
    assert_eq!(g.cpu().dr7 & DR7_GD, 0);
}

#[test]
fn dr4_and_dr5_are_aliases_without_de() {
    let mut g = Guest::new(TestMode::Long64);
    g.cpu().dr7 = DR7_FIXED;
    g.halts(|a| {
        a.db(&[0x0f, 0x21, 0xe8]).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(g.reg(gpr::RAX), DR7_FIXED);
    g.cpu().cr4 |= CR4_DE;
    assert_eq!(g.vector_of(|a| a.db(&[0x0f, 0x21, 0xe8]).unwrap()), 6);
    let v = g.vector_of(|a| {
        a.mov(rax, 1u64 << 32).unwrap();
        a.mov(dr6, rax).unwrap();
    });
    assert_eq!(v, 13);
}

#[test]
fn io_breakpoints_need_de() {
    let mut g = Guest::new(TestMode::Long64);
    g.cpu().dr[1] = 0x60;
    g.cpu().dr7 = DR7_FIXED | 1 << 2 | 2 << 20;
    g.halts(|a| {
        a.in_(al, 0x60).unwrap();
        a.hlt().unwrap();
    });
    g.cpu().cr4 |= CR4_DE;
    assert_eq!(g.vector_of(|a| a.in_(al, 0x60).unwrap()), 1);
    assert_eq!((g.cpu().dr6, g.stack(0)), (DR6_FIXED | 2, layout::CODE + 2));
}

#[test]
fn int1_traps_without_dr6() {
    let mut g = Guest::new(TestMode::Long64);
    assert_eq!(g.vector_of(|a| a.db(&[0xf1]).unwrap()), 1);
    assert_eq!((g.stack(0), g.cpu().dr6), (layout::CODE + 1, DR6_FIXED));
}
