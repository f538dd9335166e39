//! Control registers, MSRs, CPUID, ports, flags, and the saved state.

use crate::support::{End, Guest};
use iced_x86::code_asm::*;
use ringfort_engine::{CpuState, CpuidTable};
use ringfort_engine_soft::cpu::gpr;
use ringfort_engine_soft::testing::{BusEvent, TestMode, host_cpuid, layout};
use ringfort_x86::cpuid::Leaf;
use ringfort_x86::cr::*;
use ringfort_x86::flags::*;
use ringfort_x86::msr::*;

#[test]
fn impossible_control_registers_are_gp() {
    let mut g = Guest::new(TestMode::Long64);
    let cr0_now = g.cpu().cr0;
    let cr4_now = g.cpu().cr4;
    for bad in [cr0_now & !CR0_PE, cr0_now | CR0_NW, cr0_now | 1 << 32, cr0_now & !CR0_PG] {
        let v = g.vector_of(|a| {
            a.mov(rax, bad).unwrap();
            a.mov(cr0, rax).unwrap();
        });
        assert_eq!((v, g.cpu().cr0), (13, cr0_now), "{bad:#x}");
    }
    for bad in [cr4_now & !CR4_PAE, cr4_now | 1 << 15, cr4_now | 1 << 40] {
        let v = g.vector_of(|a| {
            a.mov(rax, bad).unwrap();
            a.mov(cr4, rax).unwrap();
        });
        assert_eq!((v, g.cpu().cr4), (13, cr4_now), "{bad:#x}");
    }
    let v = g.vector_of(|a| {
        a.mov(rax, layout::TABLES | 1 << 60).unwrap();
        a.mov(cr3, rax).unwrap();
    });
    assert_eq!((v, g.cpu().cr3), (13, layout::TABLES));
    let v = g.vector_of(|a| {
        a.mov(eax, 16).unwrap();
        a.mov(cr8, rax).unwrap();
    });
    assert_eq!(v, 13);
    // LME cannot change while paging.
    let v = g.vector_of(|a| {
        a.mov(ecx, EFER as i32).unwrap();
        a.mov(eax, EFER_NXE as i32).unwrap();
        a.xor(edx, edx).unwrap();
        a.wrmsr().unwrap();
    });
    assert_eq!(v, 13);
    assert_eq!(g.vector_of(|a| a.db(&[0x0f, 0x20, 0xc8]).unwrap()), 6, "CR1");
}

#[test]
fn cr8_is_the_task_priority() {
    let mut g = Guest::new(TestMode::Long64);
    g.halts(|a| {
        a.mov(eax, 5).unwrap();
        a.mov(cr8, rax).unwrap();
        a.mov(rbx, cr8).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(g.reg(gpr::RBX), 5);
}

#[test]
fn system_instructions_are_privileged() {
    let mut g = Guest::new(TestMode::Long64);
    g.tss64(0x9_0000, [0; 3]);
    let instructions: [fn(&mut CodeAssembler); 14] = [
        |a| a.hlt().unwrap(),
        |a| a.mov(rax, cr0).unwrap(),
        |a| a.mov(cr3, rax).unwrap(),
        |a| a.mov(rax, dr7).unwrap(),
        |a| a.clts().unwrap(),
        |a| a.wbinvd().unwrap(),
        |a| a.invlpg(byte_ptr(rax)).unwrap(),
        |a| a.rdmsr().unwrap(),
        |a| a.wrmsr().unwrap(),
        |a| a.lgdt(qword_ptr(rsp)).unwrap(),
        |a| a.ltr(ax).unwrap(),
        |a| a.cli().unwrap(),
        |a| a.swapgs().unwrap(),
        |a| a.in_(al, dx).unwrap(),
    ];
    for (n, f) in instructions.into_iter().enumerate() {
        g.cpu().regs[gpr::RSP] = layout::STACK_TOP;
        g.m.set_user();
        assert_eq!((g.vector_of(f), g.stack(0)), (13, 0), "{n}");
    }
    g.cpu().regs[gpr::RSP] = layout::STACK_TOP;
    g.m.set_user();
    let v = g.vector_of(|a| {
        a.sgdt(qword_ptr(rsp - 16)).unwrap();
        a.db(&[0xf4]).unwrap();
    });
    assert_eq!((v, g.stack(1)), (13, layout::CODE + 5), "SGDT is free without UMIP");
    g.cpu().cr4 |= CR4_UMIP;
    g.cpu().regs[gpr::RSP] = layout::STACK_TOP;
    g.m.set_user();
    assert_eq!(g.vector_of(|a| a.sgdt(qword_ptr(rsp - 16)).unwrap()), 13);
    assert_eq!(g.stack(1), layout::CODE);
}

fn msr(g: &mut Guest, n: u32, v: u64) -> Result<u64, u8> {
    g.cpu().regs[gpr::RSP] = layout::STACK_TOP;
    g.code(|a| {
        a.mov(ecx, n).unwrap();
        a.mov(eax, v as u32).unwrap();
        a.mov(edx, (v >> 32) as u32).unwrap();
        a.wrmsr().unwrap();
        a.xor(eax, eax).unwrap();
        a.xor(edx, edx).unwrap();
        a.rdmsr().unwrap();
        a.hlt().unwrap();
    });
    match g.run() {
        End::Halted(_) => Ok(g.reg(gpr::RDX) << 32 | g.reg(gpr::RAX)),
        End::Vector(v) => Err(v),
        End::Shutdown => panic!("shutdown"),
    }
}

#[test]
fn msrs_validate_what_they_take() {
    let mut g = Guest::new(TestMode::Long64);
    let high = 0xffff_8000_0000_1000u64;
    assert_eq!(msr(&mut g, LSTAR, high), Ok(high));
    assert_eq!(msr(&mut g, LSTAR, 1 << 47), Err(13));
    assert_eq!(msr(&mut g, KERNEL_GS_BASE, 1 << 63), Err(13));
    assert_eq!(msr(&mut g, FS_BASE, 0x1234), Ok(0x1234));
    assert_eq!(msr(&mut g, IA32_PAT, 0x0007_0106_0007_0406), Ok(0x0007_0106_0007_0406));
    assert_eq!(msr(&mut g, IA32_PAT, 2), Err(13));
    assert_eq!(msr(&mut g, IA32_MTRR_DEF_TYPE, 0xc06), Ok(0xc06));
    assert_eq!(msr(&mut g, IA32_MTRR_DEF_TYPE, 0x1000), Err(13));
    assert_eq!(msr(&mut g, IA32_MTRR_PHYSBASE0, 6), Ok(6));
    assert_eq!(msr(&mut g, IA32_MTRR_PHYSBASE0, 2), Err(13));
    assert_eq!(msr(&mut g, IA32_MTRRCAP, 0), Err(13));
    assert_eq!(msr(&mut g, 0x1234_5678, 0), Err(13));
    assert_eq!(msr(&mut g, SFMASK, 0x4_7700), Ok(0x4_7700));
    assert_eq!(msr(&mut g, EFER, EFER_LME | EFER_SCE), Ok(EFER_LME | EFER_LMA | EFER_SCE));
    assert_eq!(msr(&mut g, EFER, 1 << 63 | EFER_LME), Err(13));
}

#[test]
fn msrs_that_older_systems_use_unasked() {
    let mut g = Guest::new(TestMode::Long64);
    // IA32_PERF_CTL takes what it is given; the P6's last branch records are read-only.
    assert_eq!(msr(&mut g, 0x199, 0x600), Ok(0));
    assert_eq!(msr(&mut g, 0x1db, 0), Err(13));
    assert_eq!(g.cpu().read_msr(0x1de), Ok(0));
    let amd = g.cpu().amd;
    for n in [0xc001_0055, 0xc001_0058, 0xc001_1023] {
        assert_eq!(g.cpu().read_msr(n).ok(), amd.then_some(0), "{n:#x}");
    }
}

#[test]
fn invpcid_refuses_reserved_bits_whatever_its_type() {
    let mut g = Guest::new(TestMode::Long64);
    if g.cpu().cpuid.find(7, 0).is_none_or(|l| l.ebx >> 10 & 1 == 0) {
        return;
    }
    let mut one = |kind: u32, pcid: u64, lin: u64| {
        g.m.write(layout::DATA, &pcid.to_le_bytes());
        g.m.write(layout::DATA + 8, &lin.to_le_bytes());
        g.cpu().regs[gpr::RSP] = layout::STACK_TOP;
        g.code(|a| {
            a.mov(eax, kind).unwrap();
            a.mov(esi, layout::DATA as i32).unwrap();
            a.invpcid(rax, xmmword_ptr(rsi)).unwrap();
            a.hlt().unwrap();
        });
        match g.run() {
            End::Halted(_) => None,
            End::Vector(v) => Some(v),
            End::Shutdown => panic!("shutdown"),
        }
    };
    for kind in 0..4 {
        assert_eq!(one(kind, 0, 0), None, "type {kind}");
        assert_eq!(one(kind, 1 << 12, 0), Some(13), "type {kind}");
        assert_eq!(one(kind, 1, 0), (kind < 2).then_some(13), "type {kind}: no PCIDs");
        assert_eq!(one(kind, 0, 1 << 47), (kind == 0).then_some(13), "type {kind}");
    }
    assert_eq!(one(4, 0, 0), Some(13));
}

/// A guest that has seen them under another engine goes on with them: they hold what they held, and take what it writes.
#[test]
fn msrs_of_features_that_are_carried() {
    let mut t = host_cpuid();
    for l in &mut t.leaves {
        match (l.function, l.index) {
            // SPEC_CTRL, STIBP, L1D_FLUSH, ARCH_CAPABILITIES, SSBD.
            (7, Some(0)) => l.edx |= 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29 | 1 << 31,
            (0x8000_0001, _) => l.ecx |= 1 << 9,
            // IBPB, IBRS, STIBP, SSBD, VIRT_SSBD.
            (0x8000_0008, _) => l.ebx |= 1 << 12 | 1 << 14 | 1 << 15 | 1 << 24 | 1 << 25,
            _ => {}
        }
    }
    let mut g = Guest::with_cpuid(TestMode::Long64, t.clone());
    let mut s = g.cpu().to_state();
    // RDCL_NO, MDS_NO, TSX_CTRL; errata by number.
    let told =
        [(IA32_ARCH_CAPABILITIES, 1 << 0 | 1 << 5 | 1 << 7), (AMD_OSVW_ID_LENGTH, 4), (AMD_OSVW_STATUS, 9)];
    for (n, v) in told {
        s.msrs.retain(|m| m.0 != n);
        s.msrs.push((n, v));
    }
    s.msrs.push((IA32_TSX_CTRL, 3));
    s.msrs.sort_unstable();
    g.cpu().from_state(&s).unwrap();
    let read = |g: &mut Guest, n: u32| g.cpu().read_msr(n).ok();
    for (n, v) in told.into_iter().chain([(IA32_TSX_CTRL, 3)]) {
        assert_eq!(read(&mut g, n), Some(v), "{n:#x}");
    }
    for (n, takes) in [(IA32_SPEC_CTRL, 5), (AMD_VIRT_SPEC_CTRL, 4), (IA32_TSX_CTRL, 1), (AMD_OSVW_STATUS, 1)]
    {
        assert_eq!(msr(&mut g, n, takes), Ok(takes), "{n:#x}");
    }
    assert_eq!(msr(&mut g, IA32_ARCH_CAPABILITIES, 0), Err(13));
    // Commands: only written.
    for n in [IA32_PRED_CMD, 0x10b] {
        assert!(g.cpu().write_msr(n, 1).is_ok() && g.cpu().read_msr(n).is_err(), "{n:#x}");
    }
    assert_eq!(g.cpu().to_state().msrs.iter().find(|m| m.0 == IA32_ARCH_CAPABILITIES), Some(&told[0]));
    g.cpu().reset(false);
    assert_eq!(read(&mut g, IA32_ARCH_CAPABILITIES), Some(told[0].1), "a constant");
    assert_eq!(read(&mut g, IA32_SPEC_CTRL), Some(0));
    // Whoever was not told has none of them.
    for l in &mut t.leaves {
        match (l.function, l.index) {
            (7, Some(0)) => l.edx = 0,
            (0x8000_0001, _) => l.ecx = 0,
            (0x8000_0008, _) => l.ebx = 0,
            _ => {}
        }
    }
    let mut g = Guest::with_cpuid(TestMode::Long64, t);
    for n in [IA32_ARCH_CAPABILITIES, IA32_SPEC_CTRL, AMD_OSVW_STATUS, IA32_TSX_CTRL, AMD_VIRT_SPEC_CTRL] {
        assert_eq!(read(&mut g, n), None, "{n:#x}");
    }
}

fn table(vendor: [u32; 3]) -> CpuidTable {
    let mut t = host_cpuid();
    for l in &mut t.leaves {
        if l.function == 0 {
            (l.eax, l.ebx, l.edx, l.ecx) = (0x7, vendor[0], vendor[1], vendor[2]);
        }
    }
    t.leaves.retain(|l| l.function != 0xd || l.index.is_none());
    t.leaves.push(Leaf { function: 0x4000_0000, index: None, eax: 0x4000_0001, ebx: 1, ecx: 2, edx: 3 });
    t
}

#[test]
fn cpuid_follows_run_time_state_and_the_vendors_limits() {
    let intel = [0x756e_6547, 0x4965_6e69, 0x6c65_746e];
    let amd = [0x6874_7541, 0x6974_6e65, 0x444d_4163];
    for (vendor, is_amd) in [(intel, false), (amd, true)] {
        let mut g = Guest::with_cpuid(TestMode::Long64, table(vendor));
        assert_eq!(g.cpu().amd, is_amd);
        let mut ask = |f: u32, i: u32| {
            g.halts(|a| {
                a.mov(eax, f).unwrap();
                a.mov(ecx, i).unwrap();
                a.cpuid().unwrap();
                a.hlt().unwrap();
            });
            [0, 3, 1, 2].map(|r| g.reg(r) as u32)
        };
        assert_eq!(ask(0, 0)[1], vendor[0]);
        assert_ne!(ask(1, 0)[2] >> 27 & 1, 0, "OSXSAVE");
        let beyond = ask(0x20, 0);
        let last = ask(7, 0);
        assert_eq!(beyond, if is_amd { [0; 4] } else { last });
        assert_eq!(ask(0x4000_0000, 0), [0x4000_0001, 1, 2, 3]);
        assert_eq!(ask(0xd, 5)[0], if is_amd { 0 } else { ask(7, 5)[0] });
        g.cpu().cr4 &= !CR4_OSXSAVE;
        assert_eq!(g.cpu().cpuid_values(1, 0)[2] >> 27 & 1, 0);
    }
}

#[test]
fn the_io_bitmap_decides_below_iopl() {
    let mut g = Guest::new(TestMode::Long64);
    g.tss64(0x9_0000, [0; 3]);
    g.m.write(layout::TSS + 102, &0x68u16.to_le_bytes());
    g.m.fill(layout::TSS + 0x68, 0x20, 0);
    // Port 0x23 is closed.
    g.m.write(layout::TSS + 0x68 + 4, &[0b1000]);
    g.cpu().tr.limit = 0x68 + 0x1f;
    let mut open = |f: fn(&mut CodeAssembler)| {
        g.cpu().regs[gpr::RSP] = layout::STACK_TOP;
        g.m.set_user();
        g.cpu().set_rflags_raw(0);
        g.code(|a| {
            f(a);
            a.ud2().unwrap();
        });
        g.run() == End::Vector(6)
    };
    assert!(open(|a| a.in_(al, 0x22).unwrap()));
    assert!(!open(|a| a.in_(al, 0x23).unwrap()));
    assert!(!open(|a| a.in_(eax, 0x20).unwrap()));
    assert!(open(|a| a.in_(ax, 0x21).unwrap()));
    assert!(open(|a| a.out(0xef, al).unwrap()));
    assert!(!open(|a| a.out(0xff, al).unwrap()), "the byte after the last is read too, and missing");
}

#[test]
fn string_io_repeats_and_faults_before_it_reads_the_port() {
    let mut g = Guest::new(TestMode::Long64);
    g.m.bus.set_port(0x1f0, 0xabcd);
    let _ = g.m.bus.take();
    g.halts(|a| {
        a.mov(edx, 0x1f0).unwrap();
        a.mov(ecx, 5).unwrap();
        a.mov(edi, layout::DATA as i32).unwrap();
        a.cld().unwrap();
        a.rep().insw().unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(g.m.read(layout::DATA, 10), [0xcd, 0xab].repeat(5));
    assert_eq!(g.m.bus.take().len(), 5);
    assert_eq!((g.reg(gpr::RCX), g.reg(gpr::RDI)), (0, layout::DATA + 10));
    // Two words fit before the end of memory.
    let v = g.vector_of(|a| {
        a.mov(edx, 0x1f0).unwrap();
        a.mov(ecx, 5).unwrap();
        a.mov(edi, layout::RAM as i32 - 4).unwrap();
        a.rep().insw().unwrap();
    });
    assert_eq!((v, g.cpu().cr2), (14, layout::RAM));
    assert_eq!((g.reg(gpr::RCX), g.reg(gpr::RDI)), (3, layout::RAM));
    assert_eq!(g.m.bus.take(), vec![BusEvent::In(0x1f0, 2); 2]);
    g.m.write(layout::DATA, b"abc");
    g.cpu().regs[gpr::RSP] = layout::STACK_TOP;
    g.halts(|a| {
        a.mov(edx, 0x3f8).unwrap();
        a.mov(ecx, 3).unwrap();
        a.mov(esi, layout::DATA as i32).unwrap();
        a.rep().outsb().unwrap();
        a.hlt().unwrap();
    });
    let out: Vec<BusEvent> = b"abc".iter().map(|c| BusEvent::Out(0x3f8, vec![*c])).collect();
    assert_eq!(g.m.bus.take(), out);
}

#[test]
fn popf_changes_what_the_level_may() {
    let mut g = Guest::new(TestMode::Long64);
    g.halts(|a| {
        a.push(!(TF as i32)).unwrap();
        a.popfq().unwrap();
        a.pushfq().unwrap();
        a.pop(rbx).unwrap();
        a.push(2).unwrap();
        a.popfq().unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(g.reg(gpr::RBX), VALID & !(TF | VM | RF | VIF | VIP) | FIXED);
}

#[test]
fn the_state_goes_out_and_in() {
    let mut g = Guest::new(TestMode::Long64);
    g.cpu().regs[3] = 0x55;
    g.cpu().lstar = 0xffff_8000_0000_0000;
    g.m.set_user();
    let s = g.cpu().to_state();
    assert_eq!(s.gpr[3], 0x55);
    assert!(s.msrs.windows(2).all(|w| w[0].0 < w[1].0), "ascending");
    assert!(s.msrs.contains(&(LSTAR, 0xffff_8000_0000_0000)));

    let mut other = Guest::new(TestMode::Real);
    other.m.write(layout::TABLES, &g.m.read(layout::TABLES, 0x10_0000));
    other.cpu().from_state(&s).unwrap();
    let mut again = other.cpu().to_state();
    assert_eq!(other.cpu().cpl, 3);
    let strip = |s: &mut CpuState| s.msrs.retain(|m| m.0 != IA32_TSC);
    let mut s2 = s.clone();
    strip(&mut s2);
    strip(&mut again);
    assert_eq!(again, s2);

    // What cannot be is refused, and changes nothing.
    let mut bad = s.clone();
    bad.cr4 |= 1 << 15;
    other.cpu().from_state(&bad).unwrap_err();
    let mut bad = s.clone();
    bad.efer &= !EFER_LME;
    other.cpu().from_state(&bad).unwrap_err();
    let mut bad = s.clone();
    bad.msrs.push((0x1234_5678, 1));
    bad.gpr[3] = 0x66;
    other.cpu().from_state(&bad).unwrap_err();
    let mut now = other.cpu().to_state();
    strip(&mut now);
    assert_eq!(now, s2);
}

#[test]
fn strings_begin_at_linear_address_zero() {
    let mut g = Guest::new(TestMode::Long64);
    g.m.write(0, b"abc");
    g.halts(|a| {
        a.xor(esi, esi).unwrap();
        a.mov(edi, layout::DATA as i32).unwrap();
        a.mov(ecx, 3).unwrap();
        a.rep().movsb().unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(g.m.read(layout::DATA, 3), b"abc");
}

#[test]
fn the_alternate_encoding_of_cr8_is_amds() {
    for amd in [true, false] {
        let mut g = Guest::new(TestMode::Protected32);
        g.cpu().amd = amd;
        if amd {
            // Whatever the host is, whose CPUID the machine has.
            g.cpu().decode_options |= iced_x86::DecoderOptions::AMD;
        }
        g.code(|a| {
            a.mov(eax, 3).unwrap();
            // lock mov cr0, eax; lock mov ebx, cr0
            a.db(&[0xf0, 0x0f, 0x22, 0xc0, 0xf0, 0x0f, 0x20, 0xc3]).unwrap();
            a.hlt().unwrap();
        });
        let end = g.run();
        if amd {
            assert_eq!((end, g.reg(gpr::RBX), g.cpu().cr8()), (End::Halted(layout::CODE + 13), 3, 3));
        } else {
            assert_eq!(end, End::Vector(6));
        }
    }
}

#[test]
fn the_time_stamp_counter_goes_on_and_may_be_forbidden_to_user_code() {
    let mut g = Guest::new(TestMode::Long64);
    // The whole of RAX and RDX is written, the flags are not, and later is more.
    g.halts(|a| {
        for first in [rsi, rdi] {
            a.mov(rax, -1i64).unwrap();
            a.mov(rdx, -1i64).unwrap();
            a.stc().unwrap();
            a.rdtsc().unwrap();
            a.sbb(ecx, ecx).unwrap();
            a.shl(rdx, 32).unwrap();
            a.lea(first, qword_ptr(rax + rdx)).unwrap();
            a.shr(rax, 32).unwrap();
            a.add(rbx, rax).unwrap();
        }
        a.hlt().unwrap();
    });
    assert!(g.reg(gpr::RSI) < g.reg(gpr::RDI), "{:#x} {:#x}", g.reg(gpr::RSI), g.reg(gpr::RDI));
    assert_eq!((g.reg(gpr::RCX), g.reg(gpr::RBX)), (0xffff_ffff, 0));
    g.cpu().cr4 |= CR4_TSD;
    g.halts(|a| {
        a.rdtsc().unwrap();
        a.hlt().unwrap();
    });
    g.tss64(0x9_0000, [0; 3]);
    g.m.set_user();
    assert_eq!(g.vector_of(|a| a.rdtsc().unwrap()), 13);
}

#[test]
fn a_push_of_memory_reads_before_it_moves_the_stack() {
    let mut g = Guest::new(TestMode::Long64);
    g.halts(|a| {
        a.mov(rax, 0x1122_3344_5566_7788u64).unwrap();
        a.push(rax).unwrap();
        a.mov(r11, rsp).unwrap();
        a.xor(r9d, r9d).unwrap();
        a.stc().unwrap();
        a.push(qword_ptr(rsp)).unwrap();
        a.push(qword_ptr(r11 + r9 * 4)).unwrap();
        a.sbb(ecx, ecx).unwrap();
        a.pop(rbx).unwrap();
        a.pop(rdx).unwrap();
        a.hlt().unwrap();
    });
    let v = 0x1122_3344_5566_7788;
    assert_eq!((g.reg(gpr::RBX), g.reg(gpr::RDX), g.reg(gpr::RCX)), (v, v, 0xffff_ffff));
    assert_eq!(g.stack(0), v);
    // Where the operand cannot be read, nothing has happened.
    let stack = g.reg(gpr::RSP);
    assert_eq!(
        g.vector_of(|a| {
            a.mov(r15, 0x4000_0000_0000u64).unwrap();
            a.push(qword_ptr(r15)).unwrap();
        }),
        14
    );
    assert_eq!(g.stack(4), stack);
}
