//! Loops whose memory accesses go to the same page again and again, while that page becomes another, loses rights or gets code.

use crate::support::{End, Guest};
use iced_x86::code_asm::*;
use ringfort_engine_soft::cpu::gpr;
use ringfort_engine_soft::testing::{TestMode, layout};
use ringfort_x86::cr::CR4_PGE;

/// A linear address beyond RAM, free to map.
const LIN: u64 = 0x4000_0000;
/// Free pages of RAM.
const PAGE: u64 = 0x30_0000;
/// Present, writable, global.
const RIGHTS: u64 = 0x103;
const W: u64 = 2;

/// With LIN mapped to PAGE, globally; RDI and RSI are the addresses of its page-table entry and LIN.
fn guest() -> Guest {
    let mut g = Guest::new(TestMode::Long64);
    g.m.map(LIN, PAGE, RIGHTS);
    g.cpu().cr4 |= CR4_PGE;
    g.m.refresh();
    g.cpu().regs[gpr::RDI] = entry_of(&g, LIN);
    g.cpu().regs[gpr::RSI] = LIN;
    g
}

fn entry_of(g: &Guest, lin: u64) -> u64 {
    let mut table = layout::TABLES;
    for level in (1..4).rev() {
        table = g.m.read_u64(table + (lin >> (12 + 9 * level) & 0x1ff) * 8) & 0x000f_ffff_ffff_f000;
    }
    table + (lin >> 12 & 0x1ff) * 8
}

/// A block that loops `count` times over `f`, and nothing else.
fn repeat(a: &mut CodeAssembler, count: u32, f: impl FnOnce(&mut CodeAssembler)) {
    let mut top = a.create_label();
    let mut next = a.create_label();
    a.mov(ecx, count).unwrap();
    a.jmp(top).unwrap();
    a.set_label(&mut top).unwrap();
    f(a);
    a.dec(ecx).unwrap();
    a.jnz(top).unwrap();
    a.set_label(&mut next).unwrap();
    a.nop().unwrap();
}

#[test]
fn a_page_that_becomes_another_is_read_and_written_there() {
    let mut g = guest();
    g.m.write(PAGE, &1u64.to_le_bytes());
    g.m.write(PAGE + 0x1000, &100u64.to_le_bytes());
    g.halts(|a| {
        a.xor(eax, eax).unwrap();
        let mut again = a.create_label();
        a.mov(ebp, 30).unwrap();
        a.set_label(&mut again).unwrap();
        for _ in 0..2 {
            repeat(a, 5, |a| a.add(rax, qword_ptr(rsi)).unwrap());
            repeat(a, 3, |a| a.inc(dword_ptr(rsi + 8)).unwrap());
            a.xor(qword_ptr(rdi), 0x1000).unwrap();
            a.invlpg(byte_ptr(rsi)).unwrap();
        }
        a.dec(ebp).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(g.reg(gpr::RAX), 30 * 5 * 101);
    for page in [PAGE, PAGE + 0x1000] {
        assert_eq!(g.m.read_u64(page + 8), 90);
    }
}

#[test]
fn a_page_that_may_no_longer_be_written_faults_though_it_may_be_read() {
    let mut g = guest();
    g.cpu().cr0 |= 1 << 16;
    let end = {
        g.code(|a| {
            for _ in 0..2 {
                repeat(a, 40, |a| {
                    a.add(rax, qword_ptr(rsi)).unwrap();
                    a.mov(dword_ptr(rsi + 8), ecx).unwrap();
                });
                a.and(qword_ptr(rdi), !(W as i32)).unwrap();
                a.invlpg(byte_ptr(rsi)).unwrap();
            }
            a.hlt().unwrap();
        });
        g.run()
    };
    assert_eq!((end, g.stack(0), g.cpu().cr2), (End::Vector(14), 3, LIN + 8));
    assert_eq!(g.reg(gpr::RCX), 40);
}

#[test]
fn a_read_only_page_is_not_written_because_it_was_read() {
    let mut g = guest();
    g.cpu().cr0 |= 1 << 16;
    g.m.map(LIN, PAGE, RIGHTS & !W);
    g.m.refresh();
    g.code(|a| {
        repeat(a, 40, |a| a.add(rax, qword_ptr(rsi)).unwrap());
        repeat(a, 40, |a| a.mov(dword_ptr(rsi + 8), ecx).unwrap());
        a.hlt().unwrap();
    });
    assert_eq!((g.run(), g.stack(0)), (End::Vector(14), 3));
}

/// A table at a fixed address: loads and stores of it have places that several instructions share.
#[test]
fn a_fixed_address_that_becomes_read_only() {
    let mut g = guest();
    g.cpu().cr0 |= 1 << 16;
    g.code(|a| {
        for _ in 0..2 {
            repeat(a, 20, |a| {
                a.add(rax, qword_ptr(LIN)).unwrap();
                a.inc(dword_ptr(LIN + 8)).unwrap();
            });
            a.and(qword_ptr(rdi), !(W as i32)).unwrap();
            a.invlpg(byte_ptr(rsi)).unwrap();
        }
        a.hlt().unwrap();
    });
    assert_eq!((g.run(), g.stack(0)), (End::Vector(14), 3));
    assert_eq!(g.m.read_u64(PAGE + 8), 20);
}

#[test]
fn stores_into_a_page_that_got_code_count() {
    let mut g = guest();
    // MOV EDX, imm32; RET
    g.m.write(PAGE + 0x100, &[0xba, 0, 0, 0, 0, 0xc3]);
    g.halts(|a| {
        let mut again = a.create_label();
        a.xor(ebx, ebx).unwrap();
        a.mov(ebp, 50).unwrap();
        a.set_label(&mut again).unwrap();
        // Twice each: the page takes no code between the first two.
        repeat(a, 3, |a| a.mov(dword_ptr(rsi + 0x101), ebp).unwrap());
        a.lea(rax, qword_ptr(rsi + 0x100)).unwrap();
        a.call(rax).unwrap();
        a.add(ebx, edx).unwrap();
        a.call(rax).unwrap();
        a.add(ebx, edx).unwrap();
        a.dec(ebp).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(g.reg(gpr::RBX), 2 * 50 * 51 / 2);
}

/// Accesses that find another page each time; those give up remembering. Some cross pages, some are misaligned.
#[test]
fn walks_over_many_pages() {
    const PAGES: u64 = 16;
    let mut g = guest();
    for n in 0..PAGES {
        g.m.map(LIN + n * 0x1000, PAGE + n * 0x1000, RIGHTS);
    }
    g.m.refresh();
    let sum = (0..PAGES * 512).fold(0u64, |sum, n| {
        g.m.write(PAGE + n * 8, &(n * n * 0x1_0001).to_le_bytes());
        sum.wrapping_add(n * n * 0x1_0001)
    });
    for step in [8u64, 0x1000, 0x1008, 0x7f8] {
        g.halts(|a| {
            a.xor(eax, eax).unwrap();
            a.xor(edx, edx).unwrap();
            a.mov(r10, PAGES * 0x1000 - 1).unwrap();
            a.mov(rbx, LIN).unwrap();
            repeat(a, (PAGES * 512) as u32, |a| {
                a.add(rax, qword_ptr(rbx + rdx)).unwrap();
                a.shr(ebp, 1).unwrap();
                a.add(rdx, step as i32).unwrap();
                a.and(rdx, r10).unwrap();
            });
            a.hlt().unwrap();
        });
        let expected = match step {
            8 => sum,
            _ => {
                let at = |n: u64| LIN + (n * step) % (PAGES * 0x1000);
                (0..PAGES * 512).fold(0u64, |s, n| s.wrapping_add(g.m.read_u64(at(n) - LIN + PAGE)))
            }
        };
        assert_eq!(g.reg(gpr::RAX), expected, "{step:#x}");
    }
    // Across page boundaries, by words at odd addresses.
    g.halts(|a| {
        a.xor(eax, eax).unwrap();
        a.mov(rbx, LIN + 0xfff).unwrap();
        repeat(a, (PAGES - 1) as u32, |a| {
            a.add(ax, word_ptr(rbx)).unwrap();
            a.add(rbx, 0x1000).unwrap();
        });
        a.hlt().unwrap();
    });
    let words = (1..PAGES).fold(0u16, |s, n| {
        s.wrapping_add(u16::from_le_bytes(g.m.read(PAGE + n * 0x1000 - 1, 2).try_into().unwrap()))
    });
    assert_eq!(g.reg(gpr::RAX) as u16, words);
}

/// The flags of a shift, asked for only when the access after it faults.
#[test]
fn a_fault_after_a_shift_finds_its_flags() {
    let mut g = guest();
    g.m.map(LIN, PAGE, 0);
    g.m.refresh();
    for (value, count, flags) in [(0x8000_0001u32, 1, 0x805), (3, 1, 1), (2, 2, 0x45), (0xff, 4, 5)] {
        g.cpu().regs[gpr::RSI] = LIN;
        g.code(|a| {
            a.mov(ebx, value).unwrap();
            a.shr(ebx, count).unwrap();
            a.mov(edx, dword_ptr(rsi)).unwrap();
            a.add(edx, ebx).unwrap();
            a.hlt().unwrap();
        });
        assert_eq!(g.run(), End::Vector(14));
        // OF (of shifts by one), ZF, PF and CF.
        let mask = if count == 1 { 0x845 } else { 0x45 };
        assert_eq!(g.stack(3) & mask, flags & mask, "{value:#x} >> {count}");
        g.m.refresh();
    }
}

/// The same for shifts by CL, which leave the flags alone if CL is zero, and sums with a register that lives in memory.
#[test]
fn a_fault_after_a_shift_by_cl_or_a_sum_finds_the_flags() {
    let mut g = guest();
    g.m.map(LIN, PAGE, 0);
    g.m.refresh();
    let mut flags_at = |f: &mut dyn FnMut(&mut CodeAssembler)| {
        g.cpu().regs[gpr::RSI] = LIN;
        g.code(|a| {
            // CF, PF, AF, ZF, SF and OF as a sum leaves them: only OF, SF and AF.
            a.mov(edx, 0x7fff_ffff).unwrap();
            a.add(edx, 8).unwrap();
            f(a);
            a.mov(edx, dword_ptr(rsi)).unwrap();
            a.add(edx, ebx).unwrap();
            a.hlt().unwrap();
        });
        assert_eq!(g.run(), End::Vector(14));
        let flags = g.stack(3);
        g.m.refresh();
        flags & 0x8c5
    };
    for (count, flags) in [(0, 0x880), (1, 1), (33, 1), (32, 0x880)] {
        let found = flags_at(&mut |a| {
            a.mov(ebx, 0x8000_0003u32).unwrap();
            a.mov(ecx, count).unwrap();
            a.shr(ebx, cl).unwrap();
        });
        // OF of a shift right by one is the sign of before.
        let flags = if count % 32 == 1 { flags | 0x800 } else { flags };
        assert_eq!(found & !4, flags, "count {count}");
        let found = flags_at(&mut |a| {
            a.mov(r9, 0xc000_0003u64).unwrap();
            a.mov(ecx, count).unwrap();
            a.shl(r9d, cl).unwrap();
        });
        let flags = if count % 32 == 1 { 0x81 } else { 0x880 };
        assert_eq!(found & !4, flags, "count {count}");
    }
    let found = flags_at(&mut |a| {
        a.mov(rbx, u64::MAX - 4).unwrap();
        a.mov(r10, 5i64).unwrap();
        a.add(rbx, r10).unwrap();
    });
    assert_eq!(found, 0x45);
    let found = flags_at(&mut |a| {
        a.mov(ebx, 4).unwrap();
        a.mov(r10, 0x1_0000_0005i64).unwrap();
        a.sub(ebx, r10d).unwrap();
    });
    assert_eq!(found, 0x85);
    let found = flags_at(&mut |a| {
        a.mov(rbx, 3i64).unwrap();
        a.mov(r10, 5i64).unwrap();
        a.sub(r10, rbx).unwrap();
    });
    assert_eq!(found, 0);
}

/// REP STOS and MOVS over pages that follow each other in host memory, do not, or fault half-way.
#[test]
fn string_instructions_over_several_pages() {
    let mut g = guest();
    // Four pages in a row, one from elsewhere, one that is not there.
    for n in 0..4 {
        g.m.map(LIN + n * 0x1000, PAGE + n * 0x1000, RIGHTS);
    }
    g.m.map(LIN + 0x4000, PAGE + 0x9000, RIGHTS);
    g.m.map(LIN + 0x8000, PAGE + 0x5000, RIGHTS);
    g.m.map(LIN + 0x9000, PAGE + 0x6000, RIGHTS);
    g.m.refresh();
    for round in 0..2u8 {
        g.m.fill(PAGE, 0xa000, 0x11);
        g.code(|a| {
            a.mov(rdi, LIN + 0x10).unwrap();
            a.mov(ecx, 0x5000).unwrap();
            a.mov(al, i32::from(0x20 + round)).unwrap();
            a.rep().stosb().unwrap();
            a.hlt().unwrap();
        });
        assert_eq!((g.run(), g.cpu().cr2), (End::Vector(14), LIN + 0x5000));
        assert_eq!((g.reg(gpr::RDI), g.reg(gpr::RCX)), (LIN + 0x5000, 0x10));
        let fresh = vec![0x20 + round; 0x1000];
        assert_eq!(g.m.read(PAGE, 0x10), [0x11; 0x10]);
        assert_eq!(g.m.read(PAGE + 0x10, 0xff0), fresh[0x10..]);
        for page in [1, 2, 3, 9] {
            assert_eq!(g.m.read(PAGE + page * 0x1000, 0x1000), fresh);
        }
        assert_eq!(g.m.read(PAGE + 0x4000, 0x5000), [0x11; 0x5000]);
    }
    let source: Vec<u8> = (0..0x2000u32).map(|n| (n * 7 / 3) as u8).collect();
    g.m.write(PAGE, &source);
    g.halts(|a| {
        a.mov(rsi, LIN + 8).unwrap();
        a.mov(rdi, LIN + 0x8000).unwrap();
        a.mov(ecx, 0x1ff0 / 8).unwrap();
        a.rep().movsq().unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(g.m.read(PAGE + 0x5000, 0x1ff0), source[8..0x1ff8]);
}

/// Accesses that remember nothing yet are at no page, also not at one that cannot be: this is what stood for none once.
#[test]
fn no_page_is_where_nothing_was_found_before() {
    const ONCE: u64 = 0xa5c3_5a96_e17d_b000;
    for store in [false, true] {
        let mut g = guest();
        g.cpu().regs[gpr::RSI] = ONCE;
        g.code(|a| {
            repeat(a, 5, |a| match store {
                false => a.mov(rax, qword_ptr(rsi + 8)).unwrap(),
                true => a.mov(qword_ptr(rsi + 8), rax).unwrap(),
            });
            a.hlt().unwrap();
        });
        assert_eq!((g.run(), g.stack(0)), (End::Vector(13), 0), "store {store}");
    }
}
