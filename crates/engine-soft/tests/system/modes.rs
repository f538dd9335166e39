//! From real mode through every other and back.

use crate::support::{End, Guest, assemble_at};
use iced_x86::code_asm::*;
use ringfort_engine_soft::cpu::{CodeSize, gpr};
use ringfort_engine_soft::testing::{Machine, TestMode, layout, selector};
use ringfort_x86::cr::*;

/// Identity tables for the first 2 MiB pages, long mode form, at `at`.
fn long_tables(m: &Machine, at: u64) {
    m.fill(at, 0x3000, 0);
    m.write(at, &(at + 0x1003).to_le_bytes());
    m.write(at + 0x1000, &(at + 0x2003).to_le_bytes());
    for n in 0..8 {
        m.write(at + 0x2000 + n * 8, &(n << 21 | 0x83).to_le_bytes());
    }
}

#[test]
fn from_reset_state_to_64_bit_and_back() {
    let mut m = Machine::new(TestMode::Real);
    long_tables(&m, layout::TABLES);
    // Descriptor-table operands at a place that 16-bit code reaches.
    m.write(0x600, &[0x5f, 0]);
    m.write(0x602, &(layout::GDT as u32).to_le_bytes());
    let mut code = vec![0xf4u8; 0x400];
    let mut put = |at: usize, bytes: Vec<u8>| code[at..at + bytes.len()].copy_from_slice(&bytes);
    let linear = |at: u64| layout::CODE + at;
    put(
        0,
        assemble_at(16, 0, |a| {
            a.cli().unwrap();
            a.lgdt(dword_ptr(0x600)).unwrap();
            a.mov(eax, cr0).unwrap();
            a.or(eax, 1).unwrap();
            a.mov(cr0, eax).unwrap();
            // jmp far CODE32:linear(0x100), 32-bit offset
            a.db(&[0x66, 0xea]).unwrap();
            a.dd(&[linear(0x100) as u32]).unwrap();
            a.dw(&[selector::CODE32]).unwrap();
        }),
    );
    put(
        0x100,
        assemble_at(32, linear(0x100), |a| {
            a.mov(eax, u32::from(selector::DATA)).unwrap();
            a.mov(ds, eax).unwrap();
            a.mov(ss, eax).unwrap();
            a.mov(esp, layout::STACK_TOP as u32).unwrap();
            a.mov(eax, CR4_PAE as u32).unwrap();
            a.mov(cr4, eax).unwrap();
            a.mov(eax, layout::TABLES as u32).unwrap();
            a.mov(cr3, eax).unwrap();
            a.mov(ecx, 0xc000_0080u32).unwrap();
            a.rdmsr().unwrap();
            a.or(eax, 0x100).unwrap();
            a.wrmsr().unwrap();
            a.mov(eax, cr0).unwrap();
            a.or(eax, 0x8000_0000u32 as i32).unwrap();
            a.mov(cr0, eax).unwrap();
            a.rdmsr().unwrap();
            a.mov(ebx, eax).unwrap();
            a.db(&[0xea]).unwrap();
            a.dd(&[linear(0x200) as u32]).unwrap();
            a.dw(&[selector::CODE64]).unwrap();
        }),
    );
    put(
        0x200,
        assemble_at(64, linear(0x200), |a| {
            a.mov(r15, 0x1234_5678_9abc_def0u64).unwrap();
            a.push(r15).unwrap();
            a.pop(r14).unwrap();
            // Back to 32-bit compatibility code, by a far return.
            a.mov(rax, u64::from(selector::CODE32)).unwrap();
            a.push(rax).unwrap();
            a.mov(rax, linear(0x300)).unwrap();
            a.push(rax).unwrap();
            a.db(&[0x48, 0xcb]).unwrap();
        }),
    );
    put(
        0x300,
        assemble_at(32, linear(0x300), |a| {
            a.mov(eax, cr0).unwrap();
            a.and(eax, 0x7fff_ffff).unwrap();
            a.mov(cr0, eax).unwrap();
            a.rdmsr().unwrap();
            a.mov(esi, eax).unwrap();
            a.mov(eax, u32::from(selector::DATA16)).unwrap();
            a.mov(ss, eax).unwrap();
            a.mov(ds, eax).unwrap();
            // A 16-bit code segment whose base is 0 cannot hold our offset: jump to its copy in low memory.
            a.db(&[0xea]).unwrap();
            a.dd(&[0x7000]).unwrap();
            a.dw(&[selector::CODE16]).unwrap();
        }),
    );
    m.write(
        0x7000,
        &assemble_at(16, 0x7000, |a| {
            a.mov(eax, cr0).unwrap();
            a.and(eax, !1).unwrap();
            a.mov(cr0, eax).unwrap();
            a.db(&[0xea]).unwrap();
            a.dw(&[0x20, 0x700]).unwrap();
        }),
    );
    m.write(
        0x7020,
        &assemble_at(16, 0x20, |a| {
            a.mov(ax, 0x1111).unwrap();
            a.mov(es, ax).unwrap();
            a.hlt().unwrap();
        }),
    );
    m.load_code(&code);
    let mut widths = Vec::new();
    for _ in 0..200 {
        if m.cpu.activity != ringfort_engine_soft::cpu::Activity::Running {
            break;
        }
        if widths.last() != Some(&m.cpu.code_size) {
            widths.push(m.cpu.code_size);
        }
        m.cpu.step_block();
    }
    use CodeSize::*;
    assert_eq!(widths, [Bits16, Bits32, Bits64, Bits32, Bits16]);
    assert_eq!(m.cpu.regs[14], 0x1234_5678_9abc_def0);
    assert_eq!(m.cpu.regs[gpr::RBX], EFER_LME | EFER_LMA);
    assert_eq!(m.cpu.regs[gpr::RSI], EFER_LME, "LMA follows paging");
    assert_eq!((m.cpu.seg[0].selector, m.cpu.seg[0].base), (0x1111, 0x1_1110));
    assert_eq!(m.rip(), 0x26);
}

#[test]
fn unreal_mode_keeps_the_limit() {
    let mut g = Guest::new(TestMode::Real);
    g.m.write(layout::DATA + 0x10, &[0x77]);
    let (gdt, data) = (layout::GDT as u32, selector::DATA);
    g.m.write(0x600, &[0x5f, 0]);
    g.m.write(0x602, &gdt.to_le_bytes());
    g.halts(|a| {
        a.lgdt(dword_ptr(0x600)).unwrap();
        a.mov(eax, cr0).unwrap();
        a.or(al, 1).unwrap();
        a.mov(cr0, eax).unwrap();
        a.mov(bx, u32::from(data)).unwrap();
        a.mov(ds, bx).unwrap();
        a.and(al, 0xfeu32 as i32).unwrap();
        a.mov(cr0, eax).unwrap();
        a.xor(bx, bx).unwrap();
        a.mov(ds, bx).unwrap();
        a.mov(esi, layout::DATA as u32 + 0x10).unwrap();
        a.mov(cl, byte_ptr(esi)).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(g.reg(gpr::RCX) & 0xff, 0x77);
    // Without it the limit is 64 KiB.
    let mut g = Guest::new(TestMode::Real);
    let v = g.vector_of(|a| {
        a.mov(esi, layout::DATA as u32 + 0x10).unwrap();
        a.mov(cl, byte_ptr(esi)).unwrap();
    });
    assert_eq!(v, 13);
}

#[test]
fn real_mode_accesses_beyond_the_segment_fault() {
    let mut g = Guest::new(TestMode::Real);
    let v = g.vector_of(|a| {
        a.mov(bx, 0xffff).unwrap();
        a.mov(ax, word_ptr(bx)).unwrap();
    });
    assert_eq!(v, 13);
    let mut g = Guest::new(TestMode::Real);
    let v = g.vector_of(|a| {
        a.mov(bp, 0xffff).unwrap();
        a.mov(ax, word_ptr(bp)).unwrap();
    });
    assert_eq!(v, 12);
}

#[test]
fn segment_types_and_limits_are_checked_in_protected_mode() {
    let mut g = Guest::new(TestMode::Protected32);
    // 0x60: read-only data; 0x68: execute-only code; 0x70: expand-down, limit 0xfff, B; 0x78: limit 0x1f, byte-granular.
    g.descriptor(0x60, 0x00cf_9100_0000_ffff);
    g.descriptor(0x68, 0x00cf_9900_0000_ffff);
    g.descriptor(0x70, 0x0040_9700_0000_0fff);
    g.descriptor(0x78, 0x0040_9300_0000_001f);
    let mut on = |sel: u32, offset: u32, store: bool| {
        g.cpu().regs[gpr::RSP] = layout::STACK_TOP;
        g.code(|a| {
            a.mov(eax, sel).unwrap();
            a.mov(es, eax).unwrap();
            a.mov(esi, offset).unwrap();
            if store {
                a.mov(dword_ptr(esi).es(), eax).unwrap();
            } else {
                a.mov(eax, dword_ptr(esi).es()).unwrap();
            }
            a.hlt().unwrap();
        });
        let end = g.run();
        match end {
            End::Vector(v) => Some((v, g.stack(0))),
            _ => None,
        }
    };
    let gp = Some((13, 0));
    assert_eq!(on(0x60, 0x10_0000, false), None);
    assert_eq!(on(0x60, 0x10_0000, true), gp);
    assert_eq!(on(0x68, 0x10_0000, false), Some((13, 0x68)), "execute-only does not load");
    assert_eq!(on(0x70, 0xffd, true), gp);
    assert_eq!(on(0x70, 0x1000, true), None);
    assert_eq!(on(0x78, 0x1c, true), None);
    assert_eq!(on(0x78, 0x1d, true), gp);
    assert_eq!(on(0, 0x1000, false), gp, "null segments load and do not serve");
    assert_eq!(on(0x78 | 4, 0, false), Some((13, 0x7c)), "no LDT");
    assert_eq!(on(0xfff8, 0, false), Some((13, 0xfff8)), "beyond the table");
}

#[test]
fn loads_set_the_accessed_bit_and_check_presence() {
    let mut g = Guest::new(TestMode::Protected32);
    g.descriptor(0x60, 0x00cf_9200_0000_ffff);
    g.descriptor(0x68, 0x00cf_1200_0000_ffff);
    g.halts(|a| {
        a.mov(eax, 0x60).unwrap();
        a.mov(es, eax).unwrap();
        a.mov(ebx, es).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(g.m.read(layout::GDT + 0x65, 1), [0x93]);
    assert_eq!(g.reg(gpr::RBX), 0x60);
    let v = g.vector_of(|a| {
        a.mov(eax, 0x68).unwrap();
        a.mov(es, eax).unwrap();
    });
    assert_eq!((v, g.stack(0)), (11, 0x68));
    g.cpu().regs[gpr::RSP] = layout::STACK_TOP;
    let v = g.vector_of(|a| {
        a.mov(eax, 0x68).unwrap();
        a.mov(ss, eax).unwrap();
    });
    assert_eq!((v, g.stack(0)), (12, 0x68));
    g.cpu().regs[gpr::RSP] = layout::STACK_TOP;
    let v = g.vector_of(|a| {
        a.xor(eax, eax).unwrap();
        a.mov(ss, eax).unwrap();
    });
    assert_eq!((v, g.stack(0)), (13, 0));
}

#[test]
fn lar_lsl_verr_verw_and_arpl() {
    let mut g = Guest::new(TestMode::Protected32);
    g.descriptor(0x60, 0x0040_9100_0000_001f);
    g.halts(|a| {
        a.mov(ecx, 0x60).unwrap();
        a.lar(eax, ecx).unwrap();
        a.setz(dl).unwrap();
        a.lsl(ebx, ecx).unwrap();
        a.verr(cx).unwrap();
        a.setz(dh).unwrap();
        a.verw(cx).unwrap();
        a.mov(esi, 0).unwrap();
        a.setz(cl).unwrap();
        a.mov(edi, 0xfff8).unwrap();
        a.lsl(esi, edi).unwrap();
        a.setz(ch).unwrap();
        a.mov(ebp, 0x10).unwrap();
        a.mov(edi, 3).unwrap();
        a.arpl(bp, di).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(g.reg(gpr::RAX), 0x0040_9100);
    assert_eq!(g.reg(gpr::RBX), 0x1f);
    assert_eq!(g.reg(gpr::RDX) & 0xffff, 0x0101);
    assert_eq!(g.reg(gpr::RCX) & 0xffff, 0, "not writable; beyond the table");
    assert_eq!(g.reg(gpr::RSI), 0);
    assert_eq!(g.reg(gpr::RBP), 0x13);
}

#[test]
fn fs_and_gs_have_bases_in_64_bit_mode() {
    let mut g = Guest::new(TestMode::Long64);
    g.m.write(layout::DATA + 0x28, &0x1122_3344_5566_7788u64.to_le_bytes());
    g.halts(|a| {
        a.mov(rax, layout::DATA).unwrap();
        a.wrfsbase(rax).unwrap();
        a.mov(rbx, qword_ptr(0x28).fs()).unwrap();
        a.rdfsbase(rcx).unwrap();
        a.mov(ecx, 0xc000_0102u32).unwrap();
        a.xor(edx, edx).unwrap();
        a.mov(eax, layout::DATA as u32 + 8).unwrap();
        a.wrmsr().unwrap();
        a.swapgs().unwrap();
        a.mov(rdi, qword_ptr(0x20).gs()).unwrap();
        // Loading the selector replaces the base.
        a.mov(eax, u32::from(selector::DATA)).unwrap();
        a.mov(fs, eax).unwrap();
        a.rdfsbase(rsi).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(g.reg(gpr::RBX), 0x1122_3344_5566_7788);
    assert_eq!(g.reg(gpr::RDI), 0x1122_3344_5566_7788);
    assert_eq!(g.reg(gpr::RSI), 0);
}
