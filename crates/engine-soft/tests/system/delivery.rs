//! Exceptions and interrupts: frames, stacks, nesting.

use crate::support::{End, Guest, HANDLERS};
use iced_x86::code_asm::*;
use ringfort_engine_soft::cpu::{InterruptKind, gpr};
use ringfort_engine_soft::testing::{TestMode, layout, selector};
use ringfort_x86::flags::{AC, IF, NT, RF};
use ringfort_x86::segment::{CS, SS};

#[test]
fn a_fault_pushes_the_faulting_instruction_and_rf() {
    let mut g = Guest::new(TestMode::Long64);
    let v = g.vector_of(|a| {
        a.nop().unwrap();
        a.ud2().unwrap();
    });
    assert_eq!(v, 6);
    assert_eq!(g.stack(0), layout::CODE + 1);
    assert_eq!(g.stack(1), u64::from(selector::CODE64));
    assert_eq!(g.stack(2), 2 | RF);
    assert_eq!(g.stack(3), layout::STACK_TOP);
    assert_eq!(g.stack(4), u64::from(selector::DATA));
}

#[test]
fn a_trap_pushes_the_next_instruction_without_rf() {
    let mut g = Guest::new(TestMode::Long64);
    assert_eq!(g.vector_of(|a| a.int3().unwrap()), 3);
    assert_eq!((g.stack(0), g.stack(2)), (layout::CODE + 1, 2));
    let v = g.vector_of(|a| a.int(0x80).unwrap());
    assert_eq!((v, g.stack(0)), (0x80, layout::CODE + 2));
}

#[test]
fn the_frame_is_aligned_in_64_bit_mode() {
    let mut g = Guest::new(TestMode::Long64);
    g.cpu().regs[gpr::RSP] = layout::STACK_TOP - 3;
    assert_eq!(g.vector_of(|a| a.ud2().unwrap()), 6);
    assert_eq!(g.reg(gpr::RSP), layout::STACK_TOP - 16 - 40);
    assert_eq!(g.stack(3), layout::STACK_TOP - 3);
}

#[test]
fn interrupt_gates_clear_if_and_trap_gates_do_not() {
    let mut g = Guest::new(TestMode::Long64);
    g.gate64(0x41, selector::CODE64, HANDLERS + 0x410, 0x8f, 0);
    for (vector, left) in [(0x40u32, 0), (0x41, IF)] {
        g.cpu().set_rflags_raw(IF | NT | AC);
        let v = g.vector_of(|a| a.int(vector).unwrap());
        assert_eq!(u32::from(v), vector);
        assert_eq!(g.cpu().rflags(), 2 | AC | left, "NT goes, AC stays");
        assert_eq!(g.stack(2), 2 | IF | NT | AC);
    }
}

#[test]
fn user_mode_switches_to_the_tss_stack_and_back() {
    let mut g = Guest::new(TestMode::Long64);
    g.tss64(0x9_0000, [0; 3]);
    g.m.set_user();
    // The handler of #UD skips the instruction.
    g.code_at(64, HANDLERS + 0x60, |a| {
        a.add(qword_ptr(rsp), 2).unwrap();
        a.iretq().unwrap();
    });
    let v = g.vector_of(|a| {
        a.ud2().unwrap();
        a.mov(eax, 7).unwrap();
        a.int(0x33).unwrap();
    });
    // INT through a gate with DPL 0: #GP that names the gate.
    assert_eq!((v, g.stack(0)), (13, 0x33 * 8 + 2));
    assert_eq!(g.reg(gpr::RAX), 7);
    assert_eq!(g.reg(gpr::RSP), 0x9_0000 - 48);
    assert_eq!(g.stack(2), u64::from(selector::USER_CODE64));
    assert_eq!(g.stack(5), u64::from(selector::USER_DATA));
    assert_eq!((g.cpu().cpl, g.cpu().seg[SS].selector), (0, 0));
    assert_eq!(g.cpu().seg[CS].selector, selector::CODE64);
}

#[test]
fn interrupt_stack_tables_switch_stacks_at_any_level() {
    let mut g = Guest::new(TestMode::Long64);
    g.tss64(0x9_0000, [0xa_0008, 0xb_0000, 0]);
    g.gate64(6, selector::CODE64, HANDLERS + 0x60, 0x8e, 1);
    assert_eq!(g.vector_of(|a| a.ud2().unwrap()), 6);
    assert_eq!(g.reg(gpr::RSP), 0xa_0000 - 40);
    assert_eq!(g.cpu().seg[SS].selector, selector::DATA);
    assert_eq!(g.stack(3), layout::STACK_TOP);
    g.m.set_user();
    assert_eq!(g.vector_of(|a| a.ud2().unwrap()), 6);
    assert_eq!(g.reg(gpr::RSP), 0xa_0000 - 40);
}

#[test]
fn a_fault_during_a_page_fault_is_a_double_fault() {
    let mut g = Guest::new(TestMode::Long64);
    g.tss64(0, [0xa_0000, 0, 0]);
    g.gate64(8, selector::CODE64, HANDLERS + 0x80, 0x8e, 1);
    g.cpu().regs[gpr::RSP] = 0x4000_0000;
    let v = g.vector_of(|a| a.push(rax).unwrap());
    assert_eq!((v, g.stack(0)), (8, 0));
    assert_eq!(g.stack(1), layout::CODE);
    // Which slot of the frame faults first is not what this is about.
    assert!((0x4000_0000 - 48..0x4000_0000).contains(&g.cpu().cr2), "{:#x}: in the frame", g.cpu().cr2);
}

#[test]
fn a_fault_during_a_double_fault_shuts_down() {
    let mut g = Guest::new(TestMode::Long64);
    g.cpu().regs[gpr::RSP] = 0x4000_0000;
    g.code(|a| a.push(rax).unwrap());
    assert_eq!(g.run(), End::Shutdown);
    let mut g = Guest::new(TestMode::Long64);
    g.cpu().idtr.limit = 0;
    g.code(|a| a.ud2().unwrap());
    assert_eq!(g.run(), End::Shutdown);
}

#[test]
fn contributory_faults_double_and_benign_ones_do_not() {
    let mut g = Guest::new(TestMode::Long64);
    // #GP whose gate is not present: #NP while delivering #GP is #DF.
    g.gate64(13, selector::CODE64, HANDLERS, 0x0e, 0);
    assert_eq!(g.vector_of(|a| a.int(0xff).unwrap()), 0xff);
    let v = g.vector_of(|a| {
        a.mov(eax, 0x58).unwrap();
        a.mov(ds, eax).unwrap();
    });
    assert_eq!(v, 8);
    // #UD whose gate is not present: #NP, with the gate and EXT.
    g.gate64(6, selector::CODE64, HANDLERS, 0x0e, 0);
    let v = g.vector_of(|a| a.ud2().unwrap());
    assert_eq!((v, g.stack(0)), (11, 6 * 8 + 3));
    // INT n through the same gate: no EXT.
    let v = g.vector_of(|a| a.int(6).unwrap());
    assert_eq!((v, g.stack(0)), (11, 6 * 8 + 2));
}

#[test]
fn gates_are_checked() {
    let mut g = Guest::new(TestMode::Long64);
    let mut fault = |code: u16, offset: u64, attrs: u8| {
        g.gate64(0x50, code, offset, attrs, 0);
        let v = g.vector_of(|a| a.int(0x50).unwrap());
        (v, g.stack(0))
    };
    assert_eq!(fault(0, HANDLERS, 0x8e), (13, 0));
    assert_eq!(fault(selector::CODE32, HANDLERS, 0x8e), (13, selector::CODE32.into()));
    assert_eq!(fault(selector::DATA, HANDLERS, 0x8e), (13, selector::DATA.into()));
    assert_eq!(fault(selector::USER_CODE64, HANDLERS, 0x8e), (13, u64::from(selector::USER_CODE64 & !3)));
    assert_eq!(fault(selector::CODE64, 1 << 47, 0x8e), (13, 0));
    assert_eq!(fault(selector::CODE64, HANDLERS, 0x8d), (13, 0x50 * 8 + 2));
    assert_eq!(fault(0x1000, HANDLERS, 0x8e), (13, 0x1000));
}

#[test]
fn external_interrupts_set_ext_and_nmis_block_nmis() {
    let mut g = Guest::new(TestMode::Long64);
    g.code(|a| a.nop().unwrap());
    g.gate64(0x50, selector::CODE64, HANDLERS, 0x0e, 0);
    g.cpu().deliver_interrupt(0x50, InterruptKind::Hardware);
    assert_eq!(g.run(), End::Vector(11));
    assert_eq!(g.stack(0), 0x50 * 8 + 3);
    g.code(|a| a.nop().unwrap());
    g.cpu().deliver_interrupt(2, InterruptKind::Nmi);
    assert!(g.cpu().nmi_blocked);
    g.code_at(64, HANDLERS + 0x20, |a| a.iretq().unwrap());
    g.m.write(layout::CODE, &[0xf4]);
    assert_eq!(g.run(), End::Halted(layout::CODE));
    assert!(!g.cpu().nmi_blocked);
}

#[test]
fn real_mode_uses_the_vector_table() {
    let mut g = Guest::new(TestMode::Real);
    g.cpu().set_rflags_raw(IF);
    let v = g.vector_of(|a| a.int(0x21).unwrap());
    assert_eq!(v, 0x21);
    assert_eq!(g.stack(0), 2);
    assert_eq!(g.stack(1), layout::CODE >> 4);
    assert_eq!(g.stack(2), 2 | IF);
    assert_eq!(g.cpu().rflags() & IF, 0);
    // Beyond the table: #GP, then #DF, then shutdown.
    let mut g = Guest::new(TestMode::Real);
    g.cpu().idtr.limit = 0x21 * 4;
    assert_eq!(g.vector_of(|a| a.int(0x21).unwrap()), 13);
    g.cpu().idtr.limit = 3;
    g.code(|a| a.int(0x21).unwrap());
    assert_eq!(g.run(), End::Shutdown);
}

#[test]
fn protected_mode_frames_have_the_gates_width() {
    let mut g = Guest::new(TestMode::Protected32);
    assert_eq!(g.vector_of(|a| a.ud2().unwrap()), 6);
    assert_eq!(g.reg(gpr::RSP), layout::STACK_TOP - 12);
    assert_eq!((g.stack(0), g.stack(2)), (layout::CODE, 2 | RF));
    g.cpu().regs[gpr::RSP] = layout::STACK_TOP;
    // A 16-bit interrupt gate: 16-bit frame, 16-bit offset.
    g.gate32(6, selector::CODE32, 0x1_9000, 0x86);
    g.m.write(0x9000, &[0xf4]);
    g.code(|a| a.ud2().unwrap());
    assert_eq!(g.run(), End::Halted(0x9000));
    assert_eq!(g.reg(gpr::RSP), layout::STACK_TOP - 6);
    assert_eq!(g.slot(0, 2), layout::CODE & 0xffff);
}

#[test]
fn an_outer_level_interrupt_in_protected_mode_switches_stacks() {
    let mut g = Guest::new(TestMode::Protected32);
    g.tss32(0x9_0000);
    g.m.set_user();
    g.cpu().seg[4].attrs = 0;
    assert_eq!(g.vector_of(|a| a.hlt().unwrap()), 13);
    assert_eq!(g.reg(gpr::RSP), 0x9_0000 - 24);
    assert_eq!(g.stack(0), 0);
    assert_eq!(g.stack(4), layout::STACK_TOP);
    assert_eq!(g.stack(5), u64::from(selector::USER_DATA));
    assert_eq!(g.cpu().seg[SS].selector, selector::DATA);
    // A TSS without room: #TS with its selector and EXT, delivered at the same level it cannot be either: shutdown.
    let mut g = Guest::new(TestMode::Protected32);
    g.m.set_user();
    g.cpu().tr.limit = 5;
    g.code(|a| a.hlt().unwrap());
    assert_eq!(g.run(), End::Shutdown);
}

#[test]
fn into_and_bound_raise_where_they_should() {
    let mut g = Guest::new(TestMode::Protected32);
    g.halts(|a| {
        a.xor(eax, eax).unwrap();
        a.into().unwrap();
        a.hlt().unwrap();
    });
    let v = g.vector_of(|a| {
        a.mov(eax, 0x7fff_ffff).unwrap();
        a.inc(eax).unwrap();
        a.into().unwrap();
    });
    assert_eq!(v, 4);
    g.m.write(layout::DATA, &(-5i32).to_le_bytes());
    g.m.write(layout::DATA + 4, &5i32.to_le_bytes());
    for (index, raises) in [(-5i32, false), (5, false), (-6, true), (6, true)] {
        g.code(|a| {
            a.mov(eax, index).unwrap();
            a.bound(eax, qword_ptr(layout::DATA)).unwrap();
            a.hlt().unwrap();
        });
        let want = raises.then_some(5);
        let got = match g.run() {
            End::Vector(v) => Some(v),
            _ => None,
        };
        assert_eq!(got, want, "{index}");
        if raises {
            assert_eq!(g.stack(0), layout::CODE + 5, "a fault");
        }
    }
}

#[test]
fn alignment_is_checked_at_level_3_with_ac_and_am() {
    let mut g = Guest::new(TestMode::Long64);
    g.tss64(0x9_0000, [0; 3]);
    let mut ends = |cr0_bits: u64, flags: u64, user: bool| {
        g.m.set_mode(TestMode::Long64);
        g.cpu().cr0 |= cr0_bits;
        if user {
            g.m.set_user();
        }
        g.cpu().set_rflags_raw(flags);
        g.cpu().update_mmu_mode();
        g.vector_of(|a| {
            a.mov(rsi, layout::DATA).unwrap();
            // The page is in the TLB from here on.
            a.mov(rax, qword_ptr(rsi)).unwrap();
            a.mov(al, byte_ptr(rsi + 1)).unwrap();
            a.mov(dword_ptr(rsi + 2), eax).unwrap();
            a.ud2().unwrap();
        })
    };
    let am = ringfort_x86::cr::CR0_AM;
    assert_eq!(ends(am, AC, true), 17);
    assert_eq!(ends(0, AC, true), 6);
    assert_eq!(ends(am, 0, true), 6);
    assert_eq!(ends(am, AC, false), 6);
    assert_eq!(ends(am, AC, true), 17);
    assert_eq!(g.stack(0), 0);
}

#[test]
fn stores_through_cs_are_refused() {
    let mut g = Guest::new(TestMode::Protected32);
    let v = g.vector_of(|a| {
        a.mov(esi, layout::DATA as u32).unwrap();
        a.mov(eax, dword_ptr(esi).cs()).unwrap();
        a.mov(dword_ptr(esi).cs(), eax).unwrap();
    });
    assert_eq!((v, g.stack(0), g.stack(1)), (13, 0, layout::CODE + 5 + 3));
}
