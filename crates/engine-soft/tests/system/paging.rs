//! Page faults and their error codes, in every paging form.

use crate::support::{End, Guest};
use iced_x86::code_asm::*;
use ringfort_engine_soft::cpu::gpr;
use ringfort_engine_soft::testing::{TestMode, layout};
use ringfort_x86::cr::*;
use ringfort_x86::flags::AC;

/// A linear address beyond RAM, free to map.
const LIN: u64 = 0x4000_0000;
const P: u64 = 1;
const W: u64 = 2;
const U: u64 = 4;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const NX: u64 = 1 << 63;

/// What an access does: the error code of its #PF, or nothing.
fn access(g: &mut Guest, f: impl FnOnce(&mut CodeAssembler)) -> Option<u64> {
    g.cpu().regs[gpr::RSP] = layout::STACK_TOP;
    g.cpu().regs[gpr::RSI] = LIN;
    g.cpu().regs[gpr::RBX] = LIN;
    let sel = g.cpu().seg;
    let cpl = g.cpu().cpl;
    g.code(|a| {
        f(a);
        a.int3().unwrap();
    });
    let end = g.run();
    let r = match end {
        End::Vector(14) => {
            assert_eq!(g.cpu().cr2, LIN);
            Some(g.stack(0))
        }
        End::Vector(3) => None,
        other => panic!("{other:x?} {:#x}", g.stack(0)),
    };
    g.cpu().seg = sel;
    g.cpu().cpl = cpl;
    g.cpu().set_rflags_raw(0);
    g.m.refresh();
    r
}

fn read(g: &mut Guest) -> Option<u64> {
    access(g, |a| a.mov(al, byte_ptr(rsi)).unwrap())
}
fn write(g: &mut Guest) -> Option<u64> {
    access(g, |a| a.mov(byte_ptr(rsi), al).unwrap())
}
/// The page holds RETs.
fn fetch(g: &mut Guest) -> Option<u64> {
    access(g, |a| a.call(rbx).unwrap())
}

fn guest() -> Guest {
    let mut g = Guest::new(TestMode::Long64);
    g.tss64(0x9_0000, [0; 3]);
    g.gate64(3, ringfort_engine_soft::testing::selector::CODE64, crate::support::HANDLERS + 0x30, 0xee, 0);
    g.m.fill(layout::DATA, 0x1000, 0xc3);
    g
}

fn map(g: &mut Guest, bits: u64) {
    g.m.map(LIN, layout::DATA, bits);
    g.m.refresh();
}

/// The entry of `LIN`, found by walking.
fn entry(g: &Guest) -> u64 {
    let mut table = layout::TABLES;
    for level in (0..4).rev() {
        let e = g.m.read_u64(table + (LIN >> (12 + 9 * level) & 0x1ff) * 8);
        if level == 0 {
            return e;
        }
        table = e & 0x000f_ffff_ffff_f000;
    }
    0
}

#[test]
fn supervisor_rights_in_four_level_tables() {
    let mut g = guest();
    assert_eq!((read(&mut g), write(&mut g), fetch(&mut g)), (Some(0), Some(2), Some(0x10)));
    map(&mut g, P);
    assert_eq!((read(&mut g), write(&mut g), fetch(&mut g)), (None, Some(3), None));
    g.cpu().cr0 &= !CR0_WP;
    g.m.refresh();
    assert_eq!(write(&mut g), None, "without WP");
    g.cpu().cr0 |= CR0_WP;
    map(&mut g, P | W | NX);
    assert_eq!((read(&mut g), write(&mut g), fetch(&mut g)), (None, None, Some(0x11)));
    map(&mut g, P | W | 1 << 51);
    let beyond = g.cpu().masks.beyond_physical >> 51 & 1 != 0;
    assert_eq!(read(&mut g), beyond.then_some(9));
    map(&mut g, P | W | NX);
    g.cpu().efer &= !EFER_NXE;
    g.m.refresh();
    assert_eq!((read(&mut g), write(&mut g), fetch(&mut g)), (Some(9), Some(0xb), Some(9)), "NX is reserved");
}

#[test]
fn user_rights_in_four_level_tables() {
    let mut g = guest();
    g.m.set_user();
    assert_eq!((read(&mut g), write(&mut g), fetch(&mut g)), (Some(4), Some(6), Some(0x14)));
    map(&mut g, P | W);
    assert_eq!((read(&mut g), write(&mut g), fetch(&mut g)), (Some(5), Some(7), Some(0x15)));
    map(&mut g, P | U);
    assert_eq!((read(&mut g), write(&mut g), fetch(&mut g)), (None, Some(7), None));
    map(&mut g, P | U | W | NX);
    assert_eq!((read(&mut g), write(&mut g), fetch(&mut g)), (None, None, Some(0x15)));
}

#[test]
fn smep_and_smap_guard_user_pages() {
    let mut g = guest();
    map(&mut g, P | U | W);
    assert_eq!((read(&mut g), write(&mut g), fetch(&mut g)), (None, None, None));
    g.cpu().set_cr4(CR4_PAE | CR4_SMEP).unwrap();
    // Code, stack and tables of the guest itself lie in user pages: give it supervisor ones.
    for page in (0..layout::RAM).step_by(0x1000) {
        g.m.map(page, page, P | W);
    }
    map(&mut g, P | U | W);
    assert_eq!((read(&mut g), write(&mut g), fetch(&mut g)), (None, None, Some(0x11)));
    g.cpu().set_cr4(CR4_PAE | CR4_SMAP).unwrap();
    assert_eq!((read(&mut g), write(&mut g), fetch(&mut g)), (Some(1), Some(3), None));
    let with_ac = access(&mut g, |a| {
        a.stac().unwrap();
        a.mov(byte_ptr(rsi), al).unwrap();
        a.clac().unwrap();
    });
    assert_eq!(with_ac, None);
    let after = access(&mut g, |a| {
        a.stac().unwrap();
        a.mov(al, byte_ptr(rsi)).unwrap();
        a.clac().unwrap();
        a.mov(al, byte_ptr(rsi)).unwrap();
    });
    assert_eq!(after, Some(1), "the TLB does not keep what AC allowed");
    let by_flags = access(&mut g, |a| {
        a.push(AC as i32).unwrap();
        a.popfq().unwrap();
        a.mov(al, byte_ptr(rsi)).unwrap();
    });
    assert_eq!(by_flags, None);
}

#[test]
fn accessed_and_dirty_bits_follow_accesses() {
    let mut g = guest();
    map(&mut g, P | W);
    assert_eq!(read(&mut g), None);
    assert_eq!(entry(&g) & (A | D), A);
    assert_eq!(write(&mut g), None);
    assert_eq!(entry(&g) & (A | D), A | D);
    // A read before the write in one go: the TLB entry of the read must not let the write pass without D.
    map(&mut g, P | W);
    let r = access(&mut g, |a| {
        a.mov(al, byte_ptr(rsi)).unwrap();
        a.mov(byte_ptr(rsi), al).unwrap();
    });
    assert_eq!((r, entry(&g) & (A | D)), (None, A | D));
    // A write that faults sets no D.
    map(&mut g, P);
    assert_eq!(write(&mut g), Some(3));
    assert_eq!(entry(&g) & D, 0);
}

#[test]
fn changed_entries_count_after_invlpg_and_cr3_loads() {
    let mut g = guest();
    map(&mut g, P | W);
    let pte = {
        let mut table = layout::TABLES;
        for level in (1..4).rev() {
            table = g.m.read_u64(table + (LIN >> (12 + 9 * level) & 0x1ff) * 8) & 0x000f_ffff_ffff_f000;
        }
        table + (LIN >> 12 & 0x1ff) * 8
    };
    for by_cr3 in [false, true] {
        map(&mut g, P | W);
        let r = access(&mut g, |a| {
            a.mov(byte_ptr(rsi), al).unwrap();
            a.mov(rdi, pte).unwrap();
            a.mov(qword_ptr(rdi), 0).unwrap();
            if by_cr3 {
                a.mov(rax, cr3).unwrap();
                a.mov(cr3, rax).unwrap();
            } else {
                a.invlpg(byte_ptr(rsi)).unwrap();
            }
            a.mov(byte_ptr(rsi), al).unwrap();
        });
        assert_eq!(r, Some(2));
    }
}

#[test]
fn large_pages_translate_whole() {
    let mut g = guest();
    // A 1 GiB page at LIN and a 2 MiB page above, onto the first RAM.
    let pml4e = g.m.read_u64(layout::TABLES) & 0x000f_ffff_ffff_f000;
    g.m.write(pml4e + 8, &(P | W | 1 << 7).to_le_bytes());
    g.m.refresh();
    g.m.write(layout::DATA + 0x123, &[0x5a]);
    g.code(|a| {
        a.mov(al, byte_ptr(LIN + layout::DATA + 0x123)).unwrap();
        a.int3().unwrap();
    });
    assert_eq!(g.run(), End::Vector(3));
    assert_eq!(g.reg(gpr::RAX) & 0xff, 0x5a);
    assert_eq!(g.m.read_u64(pml4e + 8) & (A | D), A);
    // Reserved bits of a large page: between the PAT bit and the page size.
    g.m.write(pml4e + 8, &(P | W | 1 << 7 | 1 << 13).to_le_bytes());
    g.m.refresh();
    assert_eq!(read(&mut g), Some(9));
}

#[test]
fn non_canonical_addresses_are_gp_or_ss() {
    let mut g = guest();
    let v = g.vector_of(|a| {
        a.mov(rax, 1u64 << 47).unwrap();
        a.mov(bl, byte_ptr(rax)).unwrap();
    });
    assert_eq!((v, g.stack(0)), (13, 0));
    let mut g = guest();
    let v = g.vector_of(|a| {
        a.mov(rbp, 1u64 << 47).unwrap();
        a.mov(bl, byte_ptr(rbp)).unwrap();
    });
    assert_eq!((v, g.stack(0)), (12, 0));
}

#[test]
fn an_access_across_two_pages_faults_on_the_second_and_changes_nothing() {
    let mut g = guest();
    g.m.map(LIN - 0x1000, layout::DATA, P | W);
    g.m.refresh();
    g.m.fill(layout::DATA, 0x1000, 0x11);
    let r = access(&mut g, |a| {
        a.mov(eax, -1).unwrap();
        a.mov(dword_ptr(rsi - 2), eax).unwrap();
    });
    assert_eq!(r, Some(2), "CR2 is the second page");
    assert_eq!(g.m.read(layout::DATA + 0xffc, 4), [0x11; 4]);
}

#[test]
fn an_instruction_across_two_pages_faults_on_the_second() {
    let mut g = guest();
    g.m.map(LIN - 0x1000, layout::DATA, P | W);
    g.m.refresh();
    // MOV EAX, imm32 begins two bytes before the end.
    g.m.write(layout::DATA + 0xffe, &[0xb8, 1]);
    g.set_rip(LIN - 2);
    assert_eq!(g.run(), End::Vector(14));
    assert_eq!((g.cpu().cr2, g.stack(0), g.stack(1)), (LIN, 0x10, LIN - 2));
    // With both pages there, physically apart.
    g.m.map(LIN, layout::DATA + 0x5000, P);
    g.m.write(layout::DATA + 0x5000, &[2, 3, 4, 0xcc]);
    g.m.refresh();
    g.set_rip(LIN - 2);
    assert_eq!(g.run(), End::Vector(3));
    assert_eq!(g.reg(gpr::RAX), 0x0403_0201);
}

/// 32-bit protected mode with paging on: `pae` or two-level tables, all of RAM mapped by large pages; returns the slot of LIN's entry.
fn paged32(pae: bool) -> (Guest, u64) {
    let mut g = Guest::new(TestMode::Protected32);
    g.tss32(0x9_0000);
    let t = layout::TABLES;
    g.m.fill(t, 0x6000, 0);
    let slot;
    if pae {
        g.m.write(t, &((t + 0x1000) | P).to_le_bytes());
        g.m.write(t + 8, &((t + 0x2000) | P).to_le_bytes());
        for n in 0..8 {
            g.m.write(t + 0x1000 + n * 8, &(n << 21 | 0x80 | P | W | U).to_le_bytes());
        }
        g.m.write(t + 0x2000, &((t + 0x3000) | P | W | U).to_le_bytes());
        slot = t + 0x3000;
        g.cpu().cr4 |= CR4_PAE;
        g.cpu().efer |= EFER_NXE;
    } else {
        for n in 0..4u32 {
            g.m.write(t + u64::from(n) * 4, &(n << 22 | 0x87).to_le_bytes());
        }
        g.m.write(t + (LIN >> 22) * 4, &((t + 0x3000) as u32 | 7).to_le_bytes());
        slot = t + 0x3000;
        g.cpu().cr4 |= CR4_PSE;
    }
    g.cpu().cr3 = t;
    let now = g.cpu().cr0;
    g.cpu().set_cr0(now | CR0_PG).unwrap();
    (g, slot)
}

#[test]
fn two_level_tables() {
    let (mut g, slot) = paged32(false);
    let mut probe = |pte: u32, f: fn(&mut CodeAssembler)| {
        g.m.write(slot, &pte.to_le_bytes());
        g.m.refresh();
        g.cpu().regs[gpr::RSP] = layout::STACK_TOP;
        g.code(|a| {
            a.mov(esi, LIN as u32).unwrap();
            f(a);
            a.int3().unwrap();
        });
        let r = match g.run() {
            End::Vector(14) => Some(g.stack(0)),
            End::Vector(3) => None,
            other => panic!("{other:x?}"),
        };
        (r, u32::from_le_bytes(g.m.read(slot, 4).try_into().unwrap()) & 0x60)
    };
    let load: fn(&mut CodeAssembler) = |a| a.mov(al, byte_ptr(esi)).unwrap();
    let store: fn(&mut CodeAssembler) = |a| a.mov(byte_ptr(esi), al).unwrap();
    let data = layout::DATA as u32;
    assert_eq!(probe(0, load), (Some(0), 0));
    assert_eq!(probe(0, store), (Some(2), 0));
    assert_eq!(probe(data | 1, load), (None, 0x20));
    assert_eq!(probe(data | 1, store), (Some(3), 0));
    assert_eq!(probe(data | 3, store), (None, 0x60));
}

/// EFER.NXE means nothing to tables that have no such bit: a fetch that faults is not told from a load, unless SMEP does.
#[test]
fn two_level_tables_know_no_fetch_with_nxe_alone() {
    for (smep, code) in [(0, 0), (CR4_SMEP, 0x10)] {
        let (mut g, _) = paged32(false);
        g.cpu().efer |= EFER_NXE;
        g.cpu().cr4 |= smep;
        // The test's own code in supervisor pages.
        g.m.write(layout::TABLES, &0x83u32.to_le_bytes());
        g.code(|a| {
            a.mov(esi, LIN as u32).unwrap();
            a.jmp(esi).unwrap();
        });
        assert_eq!((g.run(), g.stack(0), g.cpu().cr2), (End::Vector(14), code, LIN));
    }
}

#[test]
fn pae_tables() {
    let (mut g, slot) = paged32(true);
    let mut probe = |pte: u64, f: fn(&mut CodeAssembler)| {
        g.m.write(slot, &pte.to_le_bytes());
        g.m.refresh();
        g.cpu().regs[gpr::RSP] = layout::STACK_TOP;
        g.code(|a| {
            a.mov(esi, LIN as u32).unwrap();
            f(a);
            a.int3().unwrap();
        });
        match g.run() {
            End::Vector(14) => Some(g.stack(0)),
            End::Vector(3) => None,
            other => panic!("{other:x?}"),
        }
    };
    let load: fn(&mut CodeAssembler) = |a| a.mov(al, byte_ptr(esi)).unwrap();
    let store: fn(&mut CodeAssembler) = |a| a.mov(byte_ptr(esi), al).unwrap();
    let call: fn(&mut CodeAssembler) = |a| a.call(esi).unwrap();
    let data = layout::DATA;
    assert_eq!(probe(0, load), Some(0));
    assert_eq!(probe(0, call), Some(0x10));
    assert_eq!(probe(data | P, store), Some(3));
    assert_eq!(probe(data | P | W, store), None);
    assert_eq!(probe(data | P | W | NX, load), None);
    assert_eq!(probe(data | P | W | NX, call), Some(0x11));
    assert_eq!(probe(data | P | 1 << 62, load), Some(9));
}

#[test]
fn pae_pointers_are_loaded_with_cr3_and_checked() {
    let (mut g, _) = paged32(true);
    let t = layout::TABLES;
    // A changed pointer counts only after CR3 is loaded.
    g.m.write(t + 8, &0u64.to_le_bytes());
    g.m.write(t + 0x3000, &(layout::DATA | P).to_le_bytes());
    let v = g.vector_of(|a| {
        a.mov(esi, LIN as u32).unwrap();
        a.mov(al, byte_ptr(esi)).unwrap();
        a.mov(eax, cr3).unwrap();
        a.mov(cr3, eax).unwrap();
        a.mov(al, byte_ptr(esi)).unwrap();
    });
    assert_eq!((v, g.stack(1)), (14, layout::CODE + 5 + 2 + 3 + 3));
    g.cpu().regs[gpr::RSP] = layout::STACK_TOP;
    // Reserved bits: #GP, and the old pointers stay.
    g.m.write(t + 8, &(P | W).to_le_bytes());
    let v = g.vector_of(|a| {
        a.mov(eax, cr3).unwrap();
        a.mov(cr3, eax).unwrap();
    });
    assert_eq!((v, g.stack(1)), (13, layout::CODE + 3));
}

#[test]
fn pcids_keep_translations_apart() {
    let mut g = guest();
    let now = g.cpu().cr4;
    if g.cpu().masks.cr4 & CR4_PCIDE == 0 {
        return;
    }
    g.cpu().set_cr4(now | CR4_PCIDE).unwrap();
    // A second set of tables that differs in LIN only.
    let other = layout::TABLES + 0x10_0000;
    let pml4 = g.m.read(layout::TABLES, 0x1000);
    g.m.write(other, &pml4);
    map(&mut g, P | W);
    let pdpt = g.m.read_u64(layout::TABLES) & 0x000f_ffff_ffff_f000;
    let copy = g.m.read(pdpt, 0x1000);
    g.m.write(other + 0x1000, &copy);
    g.m.write(other + 0x1000 + 8, &(P | W | 1 << 7).to_le_bytes());
    g.m.write(other, &((other + 0x1000) | 7).to_le_bytes());
    g.m.write(layout::DATA, &[1]);
    g.m.write(0, &[2]);
    g.halts(|a| {
        a.mov(rsi, LIN).unwrap();
        a.mov(al, byte_ptr(rsi)).unwrap();
        a.mov(rdx, other | 5).unwrap();
        a.mov(cr3, rdx).unwrap();
        a.mov(ah, byte_ptr(rsi)).unwrap();
        // Back, keeping: bit 63.
        a.mov(rdx, layout::TABLES | 1 << 63).unwrap();
        a.mov(cr3, rdx).unwrap();
        a.mov(bl, byte_ptr(rsi)).unwrap();
        a.mov(rdi, cr3).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(g.reg(gpr::RAX) & 0xffff, 0x0201);
    assert_eq!(g.reg(gpr::RBX) & 0xff, 1);
    assert_eq!(g.reg(gpr::RDI), layout::TABLES, "bit 63 is not kept");
}
