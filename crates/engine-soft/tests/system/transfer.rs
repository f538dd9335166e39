//! Far transfers between privilege levels, IRET, SYSCALL and SYSENTER.

use crate::support::{End, Guest, HANDLERS};
use iced_x86::code_asm::*;
use ringfort_engine_soft::cpu::gpr;
use ringfort_engine_soft::testing::{TestMode, layout, selector};
use ringfort_x86::flags::{IF, RF, TF};
use ringfort_x86::segment::{CS, DS, SS};

const USER: u64 = 0x3_0000;

fn push_all(a: &mut CodeAssembler, values: &[u64]) {
    for v in values {
        a.mov(rax, *v).unwrap();
        a.push(rax).unwrap();
    }
}

#[test]
fn iretq_to_user_code_and_a_fault_back() {
    let mut g = Guest::new(TestMode::Long64);
    g.tss64(0x9_0000, [0; 3]);
    g.code_at(64, USER, |a| {
        a.mov(rbx, rsp).unwrap();
        a.hlt().unwrap();
    });
    let v = g.vector_of(|a| {
        push_all(a, &[selector::USER_DATA.into(), 0x7_0000, 2 | IF, selector::USER_CODE64.into(), USER]);
        a.iretq().unwrap();
    });
    assert_eq!((v, g.stack(0), g.stack(1)), (13, 0, USER + 3));
    assert_eq!(g.stack(3), 2 | IF | RF);
    assert_eq!(g.reg(gpr::RBX), 0x7_0000);
    // Data segments of level 0 do not go along.
    assert_eq!(g.cpu().seg[DS].selector, 0);
}

#[test]
fn iretq_checks_before_it_changes_anything() {
    let mut g = Guest::new(TestMode::Long64);
    let mut fault = |frame: [u64; 5]| {
        g.cpu().regs[gpr::RSP] = layout::STACK_TOP;
        let v = g.vector_of(|a| {
            push_all(a, &frame);
            a.iretq().unwrap();
        });
        assert_eq!(g.cpu().cpl, 0);
        assert_eq!(g.stack(4), layout::STACK_TOP - 40, "RSP as before IRETQ");
        (v, g.stack(0))
    };
    let (code, data) = (u64::from(selector::USER_CODE64), u64::from(selector::USER_DATA));
    assert_eq!(fault([data, 0, 2, code, 1 << 47]), (13, 0));
    assert_eq!(fault([0, 0, 2, code, 0]), (13, 0), "null SS for level 3");
    assert_eq!(fault([0x10, 0, 2, code, 0]), (13, 0x10));
    assert_eq!(fault([data, 0, 2, 0, 0]), (13, 0));
    assert_eq!(fault([data, 0, 2, 0x3000, 0]), (13, 0x3000));
    assert_eq!(fault([data, 0, 2, data, 0]), (13, data & !3));
}

#[test]
fn iretq_with_a_null_ss_stays_at_level_0() {
    let mut g = Guest::new(TestMode::Long64);
    g.code_at(64, USER, |a| a.hlt().unwrap());
    g.code(|a| {
        push_all(a, &[0, 0x7_0000, 2, selector::CODE64.into(), USER]);
        a.iretq().unwrap();
    });
    assert_eq!(g.run(), End::Halted(USER));
    assert_eq!((g.cpu().seg[SS].selector, g.reg(gpr::RSP)), (0, 0x7_0000));
}

#[test]
fn iret_with_nt_is_gp_in_long_mode() {
    let mut g = Guest::new(TestMode::Long64);
    g.cpu().set_rflags_raw(1 << 14);
    assert_eq!(g.vector_of(|a| a.iretq().unwrap()), 13);
}

#[test]
fn syscall_and_sysret() {
    let mut g = Guest::new(TestMode::Long64);
    g.tss64(0x9_0000, [0; 3]);
    let c = g.cpu();
    // SYSRET: 64-bit CS is base + 16, SS is base + 8.
    c.star = u64::from(selector::USER_DATA - 8) << 48 | u64::from(selector::CODE64) << 32;
    c.lstar = 0x4_0000;
    c.sfmask = IF | TF;
    g.code_at(64, 0x4_0000, |a| {
        a.pushfq().unwrap();
        a.pop(rdi).unwrap();
        a.sysretq().unwrap();
    });
    g.m.set_user();
    g.cpu().set_rflags_raw(IF | 1);
    let v = g.vector_of(|a| {
        a.syscall().unwrap();
        a.mov(rbx, rcx).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!((v, g.stack(1)), (13, layout::CODE + 5));
    assert_eq!(g.reg(gpr::RBX), layout::CODE + 2);
    assert_eq!(g.reg(11), 2 | IF | 1);
    assert_eq!(g.reg(gpr::RDI), 3, "IF masked");
    assert_eq!(g.stack(2), u64::from(selector::USER_CODE64));
    assert_eq!(g.stack(3), 2 | IF | 1 | RF);
    assert_eq!(g.stack(5), u64::from(selector::USER_DATA));
}

#[test]
fn syscall_without_sce_is_ud() {
    let mut g = Guest::new(TestMode::Long64);
    g.cpu().efer &= !1;
    assert_eq!(g.vector_of(|a| a.syscall().unwrap()), 6);
    assert_eq!(g.vector_of(|a| a.sysretq().unwrap()), 6);
}

#[test]
fn sysret_to_a_non_canonical_address_follows_the_vendor() {
    for amd in [true, false] {
        let mut g = Guest::new(TestMode::Long64);
        g.tss64(0x9_0000, [0; 3]);
        g.cpu().amd = amd;
        g.cpu().star = u64::from(selector::USER_DATA - 8) << 48;
        let v = g.vector_of(|a| {
            a.mov(rcx, 1u64 << 47).unwrap();
            a.sysretq().unwrap();
        });
        assert_eq!(v, 13);
        let from_user = g.stack(2) & 3 == 3;
        assert_eq!(from_user, amd, "Intel faults at level 0, AMD at level 3");
    }
}

#[test]
fn fast_system_calls_of_the_other_vendor_are_ud() {
    let mut g = Guest::new(TestMode::Long64);
    g.cpu().amd = true;
    assert_eq!(g.vector_of(|a| a.sysenter().unwrap()), 6);
    let mut g = Guest::new(TestMode::Compat32);
    g.cpu().amd = false;
    assert_eq!(g.vector_of(|a| a.syscall().unwrap()), 6);
}

#[test]
fn sysenter_and_sysexit() {
    let mut g = Guest::new(TestMode::Protected32);
    g.tss32(0x9_0000);
    // SYSENTER wants code, stack, user code, user stack in a row.
    for (n, d) in
        [0x00cf_9b00_0000_ffffu64, 0x00cf_9300_0000_ffff, 0x00cf_fb00_0000_ffff, 0x00cf_f300_0000_ffff]
            .into_iter()
            .enumerate()
    {
        g.descriptor(0x60 + n as u16 * 8, d);
    }
    g.cpu().sysenter = [0x60, 0x8_8000, 0x4_0000];
    g.code_at(32, 0x4_0000, |a| {
        a.mov(ebx, esp).unwrap();
        a.sysexit().unwrap();
    });
    g.m.set_user();
    g.code_at(32, USER, |a| a.hlt().unwrap());
    let v = g.vector_of(|a| {
        a.mov(ecx, 0x7_0000).unwrap();
        a.mov(edx, USER as u32).unwrap();
        a.sysenter().unwrap();
    });
    assert_eq!((v, g.stack(1), g.stack(2)), (13, USER, 0x73));
    assert_eq!(g.reg(gpr::RBX), 0x8_8000);
    assert_eq!((g.stack(4), g.stack(5)), (0x7_0000, 0x7b));
}

#[test]
fn a_call_gate_copies_parameters_to_the_inner_stack() {
    let mut g = Guest::new(TestMode::Protected32);
    g.tss32(0x9_0000);
    // 32-bit call gate, DPL 3, two parameters, to 0x4_0000 in CODE32.
    let gate = u64::from(selector::CODE32) << 16 | 2 << 32 | 0xec << 40 | 4 << 48;
    g.descriptor(0x60, gate);
    g.code_at(32, 0x4_0000, |a| {
        a.mov(ebx, dword_ptr(esp + 8)).unwrap();
        a.mov(ecx, dword_ptr(esp + 12)).unwrap();
        a.mov(esi, esp).unwrap();
        a.retf_1(8).unwrap();
    });
    g.m.set_user();
    let v = g.vector_of(|a| {
        a.push(0x1111).unwrap();
        a.push(0x2222).unwrap();
        a.db(&[0x9a]).unwrap();
        a.dd(&[0]).unwrap();
        a.dw(&[0x63]).unwrap();
        a.mov(edi, esp).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(v, 13, "back at level 3, HLT faults");
    assert_eq!((g.reg(gpr::RBX), g.reg(gpr::RCX)), (0x2222, 0x1111));
    assert_eq!(g.reg(gpr::RSI), 0x9_0000 - 24);
    assert_eq!(g.reg(gpr::RDI), layout::STACK_TOP, "RETF 8 releases on both stacks");
    assert_eq!(g.cpu().seg[CS].selector, selector::CODE32);
}

#[test]
fn a_64_bit_call_gate() {
    let mut g = Guest::new(TestMode::Long64);
    g.tss64(0x9_0000, [0; 3]);
    let gate = u64::from(selector::CODE64) << 16 | 0xec << 40 | 4 << 48;
    g.descriptor(0x60, gate);
    g.descriptor(0x68, 0);
    g.code_at(64, 0x4_0000, |a| {
        a.mov(rbx, rsp).unwrap();
        a.db(&[0x48, 0xcb]).unwrap();
    });
    g.m.write(layout::DATA, &[0, 0, 0, 0, 0x63, 0]);
    g.m.set_user();
    let v = g.vector_of(|a| {
        a.mov(rsi, layout::DATA).unwrap();
        // call far m16:32
        a.db(&[0xff, 0x1e]).unwrap();
        a.mov(rdi, rsp).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!((v, g.stack(2)), (13, u64::from(selector::USER_CODE64)));
    assert_eq!((g.reg(gpr::RBX), g.reg(gpr::RDI)), (0x9_0000 - 32, layout::STACK_TOP));
}

#[test]
fn far_calls_push_and_return_at_the_same_level() {
    let mut g = Guest::new(TestMode::Protected32);
    g.code_at(32, 0x4_0000, |a| a.retf().unwrap());
    g.halts(|a| {
        a.db(&[0x9a]).unwrap();
        a.dd(&[0x4_0000]).unwrap();
        a.dw(&[selector::CODE32]).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(g.reg(gpr::RSP), layout::STACK_TOP);
    // A jump beyond the limit, to data, to a level-3 segment, to nothing.
    g.descriptor(0x60, 0x0040_9b00_0000_0fff);
    for (sel, offset, error) in [
        (0x60, 0x1000, 0),
        (selector::DATA, 0, selector::DATA),
        (selector::USER_CODE32 & !3, 0, selector::USER_CODE32 & !3),
        (0, 0, 0),
        (0x200, 0, 0x200),
    ] {
        g.cpu().regs[gpr::RSP] = layout::STACK_TOP;
        let v = g.vector_of(|a| {
            a.db(&[0xea]).unwrap();
            a.dd(&[offset]).unwrap();
            a.dw(&[sel]).unwrap();
        });
        assert_eq!((v, g.stack(0)), (13, u64::from(error)), "{sel:#x}:{offset:#x}");
    }
}

#[test]
fn conforming_code_keeps_the_callers_level() {
    let mut g = Guest::new(TestMode::Protected32);
    g.tss32(0x9_0000);
    g.descriptor(0x60, 0x00cf_9f00_0000_ffff);
    g.code_at(32, 0x4_0000, |a| a.cli().unwrap());
    g.m.set_user();
    let v = g.vector_of(|a| {
        a.db(&[0xea]).unwrap();
        a.dd(&[0x4_0000]).unwrap();
        a.dw(&[0x60]).unwrap();
    });
    assert_eq!((v, g.stack(1), g.stack(2)), (13, 0x4_0000, 0x63));
}

#[test]
fn a_call_that_cannot_push_leaves_all_as_it_was() {
    let mut g = Guest::new(TestMode::Protected32);
    // A stack segment of 4 KiB: ESP 4 leaves no room for the two words.
    g.descriptor(0x60, 0x0040_9300_0000_0fff);
    g.gate32(12, selector::CODE32, (HANDLERS + 12 * 16) as u32, 0x8e);
    g.cpu().regs[gpr::RSP] = 4;
    let raw = g.m.read_u64(layout::GDT + 0x60);
    g.cpu().seg[SS] = ringfort_x86::segment::Segment::from_descriptor(0x60, raw);
    g.m.refresh();
    g.code(|a| {
        a.db(&[0x9a]).unwrap();
        a.dd(&[0x4_0000]).unwrap();
        a.dw(&[selector::CODE32]).unwrap();
    });
    // The frame of #SS does not fit either: #SS while delivering #SS is #DF, and that is a shutdown.
    assert_eq!(g.run(), End::Shutdown);
    assert_eq!((g.reg(gpr::RSP), g.m.rip()), (4, layout::CODE));
}
