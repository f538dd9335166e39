//! Virtual-8086 mode.

use crate::support::{End, Guest, HANDLERS, assemble_at};
use iced_x86::code_asm::*;
use ringfort_engine_soft::cpu::gpr;
use ringfort_engine_soft::testing::{TestMode, layout, selector};
use ringfort_x86::cr::CR4_VME;
use ringfort_x86::flags::{IF, IOPL, VIF, VIP, VM};
use ringfort_x86::segment::{DS, SS};

const CS16: u16 = 0x4000;
const LIN: u64 = (CS16 as u64) << 4;

/// Enter virtual-8086 mode with `flags` at CS16:0, where `code` is.
fn enter(flags: u64, extra: u64, code: impl FnOnce(&mut CodeAssembler)) -> (Guest, End) {
    let mut g = Guest::new(TestMode::Protected32);
    g.tss32(0x9_0000);
    // I/O map at 0x88, the redirection bitmap in the 32 bytes before: INT 21h is redirected, all others are not.
    g.m.write(layout::TSS + 102, &0x88u16.to_le_bytes());
    g.m.fill(layout::TSS + 0x68, 32, 0xff);
    g.m.write(layout::TSS + 0x68 + 4, &[0xfd]);
    g.m.fill(layout::TSS + 0x88, 0x10, 0xff);
    g.cpu().tr.limit = 0x97;
    g.cpu().cr4 |= extra;
    g.gate32(0x21, selector::CODE32, HANDLERS as u32 + 0x210, 0xee);
    // The 8086 program's own vector 21h: CS16:0x800.
    g.m.write(0x21 * 4, &[0, 8, CS16 as u8, (CS16 >> 8) as u8]);
    g.m.write(LIN, &assemble_at(16, 0, code));
    g.m.write(LIN + 0x800, &[0xf4]);
    g.code(|a| {
        for v in [0x5000u32, 0x5000, 0x5000, 0x5000, 0x6000, 0xfff0, (flags | VM) as u32, CS16.into(), 0] {
            a.push(v as i32).unwrap();
        }
        a.iretd().unwrap();
    });
    let end = g.run();
    (g, end)
}

#[test]
fn a_fault_comes_out_with_all_segments() {
    let (mut g, end) = enter(2, 0, |a| {
        a.mov(ax, ds).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(end, End::Vector(13));
    assert_eq!(g.reg(gpr::RAX) & 0xffff, 0x5000);
    let frame: Vec<u64> = (0..10).map(|n| g.stack(n)).collect();
    assert_eq!(frame[..3], [0, 2, u64::from(CS16)]);
    assert_ne!(frame[3] & VM, 0);
    assert_eq!(frame[4..], [0xfff0, 0x6000, 0x5000, 0x5000, 0x5000, 0x5000]);
    assert_eq!((g.cpu().seg[DS].selector, g.cpu().cpl), (0, 0));
    assert_eq!(g.cpu().rflags() & VM, 0);
    assert!(g.cpu().seg[SS].present());
}

#[test]
fn sensitive_instructions_need_iopl_3() {
    let instructions: [fn(&mut CodeAssembler); 5] = [
        |a| a.cli().unwrap(),
        |a| a.sti().unwrap(),
        |a| a.pushf().unwrap(),
        |a| a.popf().unwrap(),
        |a| a.int(0x21).unwrap(),
    ];
    for (n, f) in instructions.into_iter().enumerate() {
        let (g, end) = enter(2, 0, f);
        assert_eq!((end, g.stack(0), g.stack(1)), (End::Vector(13), 0, 0), "{n}");
    }
    let (g, end) = enter(2 | IOPL, 0, |a| {
        a.sti().unwrap();
        a.pushf().unwrap();
        a.pop(bx).unwrap();
        a.int(0x21).unwrap();
    });
    assert_eq!(end, End::Vector(0x21), "to the protected-mode handler");
    assert_ne!(g.reg(gpr::RBX) & IF, 0);
}

#[test]
fn vme_redirects_interrupts_and_virtualizes_if() {
    let (g, end) = enter(2 | VIF, CR4_VME, |a| {
        a.int(0x21).unwrap();
    });
    // The HLT of the 8086 handler faults.
    assert_eq!((end, g.stack(1), g.stack(2)), (End::Vector(13), 0x800, u64::from(CS16)));
    assert_eq!(g.stack(3) & VIF, 0);
    let pushed = u16::from_le_bytes(g.m.read(0x6_0000 + 0xffee, 2).try_into().unwrap());
    assert_eq!(u64::from(pushed), 2 | IF | IOPL);
    assert_eq!(g.stack(4), 0xffea);

    let (g, end) = enter(2, CR4_VME, |a| {
        a.sti().unwrap();
        a.pushf().unwrap();
        a.pop(bx).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(end, End::Vector(13));
    assert_ne!(g.reg(gpr::RBX) & IF, 0);
    assert_eq!(g.stack(3) & (VIF | IF), VIF);

    let (g, end) = enter(2 | VIP, CR4_VME, |a| a.sti().unwrap());
    assert_eq!((end, g.stack(1)), (End::Vector(13), 0), "a pending virtual interrupt");
    let (_, end) = enter(2, CR4_VME, |a| a.int(0x22).unwrap());
    assert_eq!(end, End::Vector(13), "not redirected, IOPL 0");
}

#[test]
fn ports_follow_the_bitmap_even_with_iopl_3() {
    let (g, end) = enter(2 | IOPL, 0, |a| {
        a.in_(al, 0x60).unwrap();
    });
    assert_eq!((end, g.stack(1)), (End::Vector(13), 0));
}
