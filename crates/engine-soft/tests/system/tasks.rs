//! Task switches by JMP, CALL, IRET and interrupts.

use crate::support::{End, Guest};
use iced_x86::code_asm::*;
use ringfort_engine_soft::cpu::gpr;
use ringfort_engine_soft::testing::{TestMode, layout, selector};
use ringfort_x86::cr::CR0_TS;
use ringfort_x86::flags::NT;

/// The second task's TSS and its selector.
const TSS2: u64 = 0x3800;
const SEL2: u16 = 0x60;
const ENTRY: u64 = 0x4_0000;

fn guest() -> Guest {
    let mut g = Guest::new(TestMode::Protected32);
    g.m.fill(layout::TSS, 0x68, 0);
    g.m.fill(TSS2, 0x68, 0);
    g.descriptor(SEL2, 0x67 | TSS2 << 16 | 0x89 << 40);
    // Mark the running task's descriptor busy, as LTR would have.
    let at = layout::GDT + u64::from(selector::TSS) + 5;
    g.m.write(at, &[0x8b]);
    let put = |at: u64, v: u32| g.m.write(TSS2 + at, &v.to_le_bytes());
    put(0x20, ENTRY as u32);
    put(0x24, 2);
    put(0x28, 0x1234);
    put(0x38, 0xa_0000);
    for n in 0..6 {
        put(0x48 + n * 4, if n == 1 { selector::CODE32 } else { selector::DATA }.into());
    }
    g
}

fn descriptor_type(g: &Guest, sel: u16) -> u8 {
    g.m.read(layout::GDT + u64::from(sel) + 5, 1)[0] & 15
}

fn saved(g: &Guest, tss: u64, at: u64) -> u32 {
    u32::from_le_bytes(g.m.read(tss + at, 4).try_into().unwrap())
}

#[test]
fn a_jump_switches_tasks() {
    let mut g = guest();
    g.code_at(32, ENTRY, |a| a.hlt().unwrap());
    g.code(|a| {
        a.mov(ebx, 0x77).unwrap();
        a.db(&[0xea]).unwrap();
        a.dd(&[0]).unwrap();
        a.dw(&[SEL2]).unwrap();
    });
    assert_eq!(g.run(), End::Halted(ENTRY));
    assert_eq!((g.reg(gpr::RAX), g.reg(gpr::RSP)), (0x1234, 0xa_0000));
    assert_eq!((descriptor_type(&g, selector::TSS), descriptor_type(&g, SEL2)), (9, 11));
    assert_eq!(saved(&g, layout::TSS, 0x20), layout::CODE as u32 + 12, "EIP after the jump");
    assert_eq!(saved(&g, layout::TSS, 0x34), 0x77);
    assert_eq!(g.cpu().tr.selector, SEL2);
    assert_ne!(g.cpu().cr0 & CR0_TS, 0);
    assert_eq!(g.cpu().rflags() & NT, 0);
}

#[test]
fn a_call_nests_and_iret_returns() {
    let mut g = guest();
    g.code_at(32, ENTRY, |a| {
        a.inc(eax).unwrap();
        a.iretd().unwrap();
        // A second call comes back here.
        a.mov(esi, eax).unwrap();
        a.iretd().unwrap();
    });
    g.halts(|a| {
        for _ in 0..2 {
            a.db(&[0x9a]).unwrap();
            a.dd(&[0]).unwrap();
            a.dw(&[SEL2]).unwrap();
        }
        a.hlt().unwrap();
    });
    assert_eq!(g.cpu().tr.selector, selector::TSS);
    assert_eq!((descriptor_type(&g, selector::TSS), descriptor_type(&g, SEL2)), (11, 9));
    assert_eq!(saved(&g, TSS2, 0), u32::from(selector::TSS));
    assert_eq!((saved(&g, TSS2, 0x28), saved(&g, TSS2, 0x40)), (0x1235, 0x1235));
    assert_eq!(u64::from(saved(&g, TSS2, 0x24)) & NT, 0, "IRET clears NT in the task that it leaves");
    assert_eq!(g.reg(gpr::RSP), layout::STACK_TOP);
}

#[test]
fn an_exception_through_a_task_gate_pushes_its_error_code_there() {
    let mut g = guest();
    g.code_at(32, ENTRY, |a| {
        a.pop(ebx).unwrap();
        a.hlt().unwrap();
    });
    g.m.write(layout::IDT + 13 * 8, &(u64::from(SEL2) << 16 | 0x85 << 40).to_le_bytes());
    g.code(|a| {
        a.mov(eax, 0x1230).unwrap();
        a.mov(es, eax).unwrap();
    });
    assert_eq!(g.run(), End::Halted(ENTRY + 1));
    assert_eq!(g.reg(gpr::RBX), 0x1230);
    assert_eq!(saved(&g, layout::TSS, 0x20), layout::CODE as u32 + 5, "the faulting instruction");
    assert_ne!(g.cpu().rflags() & NT, 0);
    assert_eq!(saved(&g, TSS2, 0) & 0xffff, u32::from(selector::TSS));
}

#[test]
fn a_busy_or_short_task_is_refused_before_anything_changes() {
    let mut g = guest();
    let jump = |a: &mut CodeAssembler, sel: u16| {
        a.db(&[0xea]).unwrap();
        a.dd(&[0]).unwrap();
        a.dw(&[sel]).unwrap();
    };
    let v = g.vector_of(|a| jump(a, selector::TSS));
    assert_eq!((v, g.stack(0)), (13, selector::TSS.into()));
    g.descriptor(SEL2, 0x66 | TSS2 << 16 | 0x89 << 40);
    let v = g.vector_of(|a| jump(a, SEL2));
    assert_eq!((v, g.stack(0)), (10, SEL2.into()));
    g.descriptor(SEL2, 0x67 | TSS2 << 16 | 0x09 << 40);
    let v = g.vector_of(|a| jump(a, SEL2));
    assert_eq!((v, g.stack(0)), (11, SEL2.into()));
    assert_eq!(g.cpu().tr.selector, selector::TSS);
    assert_eq!(saved(&g, layout::TSS, 0x20), 0);
}

#[test]
fn a_bad_segment_in_the_new_task_faults_there() {
    let mut g = guest();
    g.m.write(TSS2 + 0x54, &0x1230u32.to_le_bytes());
    let v = g.vector_of(|a| {
        a.db(&[0xea]).unwrap();
        a.dd(&[0]).unwrap();
        a.dw(&[SEL2]).unwrap();
    });
    assert_eq!((v, g.stack(0), g.stack(1)), (10, 0x1230, ENTRY));
    assert_eq!(g.cpu().tr.selector, SEL2);
    assert_eq!(g.reg(gpr::RSP), 0xa_0000 - 16);
}
