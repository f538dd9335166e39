//! Code that changes: by its own stores, through aliases, by other mappings; and what must interrupt code that is already translated.

use crate::support::{End, Guest, HANDLERS};
use iced_x86::{IcedError, code_asm::*};
use ringfort_engine::{MachineBus, VcpuExit};
use ringfort_engine_soft::cpu::gpr;
use ringfort_engine_soft::testing::{TestMode, host_cpuid, layout};
use ringfort_engine_soft::vcpu::request;
use ringfort_memory::{Bytes, GuestAddress, GuestMemory};
use ringfort_x86::cr::CR4_PGE;
use ringfort_x86::cr::DR6_BS;
use std::sync::Arc;
use std::time::Duration;

/// A linear address beyond RAM, free to map.
const LIN: u64 = 0x4000_0000;
/// Free pages of RAM.
const PAGE: u64 = 0x30_0000;

fn guest() -> Guest {
    Guest::new(TestMode::Long64)
}

#[test]
fn real_and_virtual_8086_mode_have_no_vex() {
    // ANDN EAX, ECX, EDX; VZEROUPPER.
    for bytes in [&[0xc4u8, 0xe2, 0x70, 0xf2, 0xc2][..], &[0xc5, 0xf8, 0x77]] {
        let mut g = Guest::new(TestMode::Real);
        assert_eq!(g.vector_of(|a| a.db(bytes).unwrap()), 6, "{bytes:x?}");
    }
    if host_cpuid().find(7, 0).is_some_and(|l| l.ebx >> 3 & 1 != 0) {
        let mut g = Guest::new(TestMode::Protected16);
        g.cpu().regs[gpr::RCX] = 5;
        g.cpu().regs[gpr::RDX] = 7;
        g.halts(|a| {
            a.db(&[0xc4, 0xe2, 0x70, 0xf2, 0xc2]).unwrap();
            a.hlt().unwrap();
        });
        assert_eq!(g.reg(gpr::RAX) as u32, 2);
    }
}

#[test]
fn a_store_into_its_own_block_counts_at_once() {
    let mut g = guest();
    g.halts(|a| {
        let (mut top, mut patch) = (a.create_label(), a.create_label());
        a.mov(ecx, 50).unwrap();
        a.xor(ebx, ebx).unwrap();
        a.set_label(&mut top).unwrap();
        a.lea(rsi, ptr(patch)).unwrap();
        a.mov(byte_ptr(rsi + 1), cl).unwrap();
        a.set_label(&mut patch).unwrap();
        a.mov(edx, 0).unwrap();
        a.add(ebx, edx).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(top).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(g.reg(gpr::RBX), 50 * 51 / 2);
}

#[test]
fn a_store_into_a_linked_block_counts_at_once() {
    let mut g = guest();
    g.halts(|a| {
        let (mut top, mut patch, mut next) = (a.create_label(), a.create_label(), a.create_label());
        a.mov(ecx, 200).unwrap();
        a.xor(ebx, ebx).unwrap();
        a.lea(rsi, ptr(patch)).unwrap();
        a.set_label(&mut top).unwrap();
        a.test(ecx, 3).unwrap();
        // Three rounds of four run unmodified code, so that jumps are linked when it changes.
        a.jnz(patch).unwrap();
        a.mov(byte_ptr(rsi + 1), cl).unwrap();
        a.jmp(patch).unwrap();
        a.set_label(&mut patch).unwrap();
        a.mov(edx, 0).unwrap();
        a.jmp(next).unwrap();
        a.set_label(&mut next).unwrap();
        a.add(ebx, edx).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(top).unwrap();
        a.hlt().unwrap();
    });
    let want: u64 = (1..=50).map(|n| n * 4 * 4).sum();
    // What is patched at 4n holds for 4n, 4n-1, 4n-2 and 4n-3.
    assert_eq!(g.reg(gpr::RBX), want);
}

/// A device that writes to the page of the code that reads its register, as another vCPU may at any time.
struct Meddler(GuestMemory);

impl MachineBus for Meddler {
    fn pio_read(&self, _: u16, _: &mut [u8]) {}
    fn pio_write(&self, _: u16, _: &[u8]) {}
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        self.0.write_slice(&[0xf4], GuestAddress(layout::CODE + 0xf00)).unwrap();
        data.fill(0);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) {}
    fn extint_vector(&self) -> u8 {
        0
    }
    fn ioapic_eoi(&self, _: u8) {}
}

/// Somebody else has written to the page just before, so it is no longer known as one with code when its own code stores to it.
#[test]
fn a_store_into_its_own_page_counts_after_somebody_elses() {
    type Store = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    let stores: [Store; 4] = [
        |a| a.mov(byte_ptr(rsi + 1), cl),
        // A load may be what makes the page one that can be stored to unseen.
        |a| a.mov(r8, ptr(rsi)).and_then(|()| a.mov(byte_ptr(rsi + 1), cl)),
        |a| a.mov(eax, ecx).and_then(|()| a.lock().xchg(byte_ptr(rsi + 1), al)),
        |a| {
            a.lea(rdi, ptr(rsi + 1))?;
            a.mov(eax, ecx)?;
            a.stosb()
        },
    ];
    for (n, store) in stores.into_iter().enumerate() {
        let mut g = guest();
        g.cpu().env.bus = Arc::new(Meddler(g.m.memory.clone()));
        g.m.map(LIN, 0xd000_0000, 3);
        g.halts(|a| {
            let (mut top, mut patch) = (a.create_label(), a.create_label());
            a.mov(ecx, 50).unwrap();
            a.xor(ebx, ebx).unwrap();
            a.lea(rsi, ptr(patch)).unwrap();
            a.mov(r9d, LIN as u32).unwrap();
            a.set_label(&mut top).unwrap();
            a.mov(eax, ptr(r9)).unwrap();
            store(a).unwrap();
            a.set_label(&mut patch).unwrap();
            a.mov(edx, 0).unwrap();
            a.add(ebx, edx).unwrap();
            a.dec(ecx).unwrap();
            a.jnz(top).unwrap();
            a.hlt().unwrap();
        });
        assert_eq!(g.reg(gpr::RBX), 50 * 51 / 2, "store {n}");
    }
}

/// Flags that only the replaced instruction would have overwritten are still there.
#[test]
fn flags_survive_when_what_would_replace_them_goes() {
    let mut g = guest();
    g.halts(|a| {
        let (mut top, mut patch, mut no) = (a.create_label(), a.create_label(), a.create_label());
        a.mov(ecx, 3).unwrap();
        a.xor(ebx, ebx).unwrap();
        a.lea(rsi, ptr(patch)).unwrap();
        a.set_label(&mut top).unwrap();
        a.mov(eax, -1).unwrap();
        a.add(eax, 1).unwrap();
        a.mov(dword_ptr(rsi), 0x90u32 * 0x0101_0101).unwrap();
        a.set_label(&mut patch).unwrap();
        // TEST RAX, RAX with superfluous prefixes: four bytes, clears CF.
        a.db(&[0x3e, 0x48, 0x85, 0xc0]).unwrap();
        a.jnc(no).unwrap();
        a.inc(ebx).unwrap();
        a.set_label(&mut no).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(top).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(g.reg(gpr::RBX), 3);
}

#[test]
fn code_at_two_addresses() {
    let mut g = guest();
    g.m.map(LIN, PAGE, 3);
    g.m.map(LIN + 0x1000, PAGE, 3);
    g.m.refresh();
    // MOV EAX, 0; RET
    g.m.write(PAGE, &[0xb8, 0, 0, 0, 0, 0xc3]);
    g.halts(|a| {
        let mut top = a.create_label();
        a.mov(ecx, 300).unwrap();
        a.xor(ebx, ebx).unwrap();
        a.mov(rsi, LIN).unwrap();
        a.lea(rdi, qword_ptr(rsi + 0x1000)).unwrap();
        a.set_label(&mut top).unwrap();
        a.call(rsi).unwrap();
        a.add(ebx, eax).unwrap();
        a.call(rdi).unwrap();
        a.add(ebx, eax).unwrap();
        a.mov(dword_ptr(rdi + 1), ecx).unwrap();
        a.call(rsi).unwrap();
        a.sub(eax, ecx).unwrap();
        a.or(ebp, eax).unwrap();
        a.mov(dword_ptr(PAGE + 1), 0).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(top).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(g.reg(gpr::RBX), 0);
    assert_eq!(g.reg(gpr::RBP) as u32, 0);
}

/// With PAGE at two addresses, PAGE + 0x1000 behind it at the first and PAGE + 0x2000 at the second, and `code` at offsets from PAGE: call what
/// lies `at` bytes into it 300 times at the first address, then at either in turns; the sum of what comes back in EAX.
fn called_at_two_addresses(code: &[(u64, &[u8])], at: u64) -> u64 {
    let mut g = guest();
    for (lin, gpa) in [(0, PAGE), (0x1000, PAGE + 0x1000), (0x10000, PAGE), (0x11000, PAGE + 0x2000)] {
        g.m.map(LIN + lin, gpa, 3);
    }
    g.m.refresh();
    for (offset, bytes) in code {
        g.m.write(PAGE + offset, bytes);
    }
    g.halts(|a| {
        a.mov(rsi, LIN + at).unwrap();
        a.lea(rdi, qword_ptr(rsi + 0x10000)).unwrap();
        a.xor(ebx, ebx).unwrap();
        // Long enough at the first address for its jumps to be linked.
        for addresses in [&[rsi][..], &[rdi, rsi]] {
            let mut top = a.create_label();
            a.mov(ecx, 300).unwrap();
            a.set_label(&mut top).unwrap();
            for &address in addresses {
                a.call(address).unwrap();
                a.add(ebx, eax).unwrap();
            }
            a.dec(ecx).unwrap();
            a.jnz(top).unwrap();
        }
        a.hlt().unwrap();
    });
    g.reg(gpr::RBX)
}

/// A page at two addresses that goes on in the page behind it, which is another one at each.
#[test]
fn code_at_two_addresses_goes_on_in_different_pages() {
    // JMP to the next page's beginning; there MOV EAX, value; RET
    let code: [(u64, &[u8]); 3] = [
        (0, &[0xe9, 0xfb, 0x0f, 0, 0]),
        (0x1000, &[0xb8, 1, 0, 0, 0, 0xc3]),
        (0x2000, &[0xb8, 100, 0, 0, 0, 0xc3]),
    ];
    assert_eq!(called_at_two_addresses(&code, 0), 300 + 300 * 101);
}

/// The same where an instruction lies across the boundary.
#[test]
fn an_instruction_across_pages_at_two_addresses_ends_in_different_pages() {
    // NOP; JMP to the next; MOV EAX, imm32 from the last two bytes of the page on; RET.
    let code: [(u64, &[u8]); 3] =
        [(0xffb, &[0x90, 0xeb, 0x00, 0xb8, 0]), (0x1000, &[1, 0, 0, 0xc3]), (0x2000, &[100, 0, 0, 0xc3])];
    assert_eq!(called_at_two_addresses(&code, 0xffb), (300 + 300 * 101) << 8);
}

/// What stands for a return against speculation, at two addresses.
#[test]
fn a_safe_return_at_two_addresses() {
    // MOV EAX, 7; CALL the next but INT3; INT3; LEA RSP, [RSP + 8]; RET
    let code = [0xb8, 7, 0, 0, 0, 0xe8, 1, 0, 0, 0, 0xcc, 0x48, 0x8d, 0x64, 0x24, 0x08, 0xc3];
    assert_eq!(called_at_two_addresses(&[(0, &code)], 0), 900 * 7);
}

/// The page that a linked jump leads to becomes another by INVLPG and by CR3, as one that is the same in all address spaces and as one that is
/// not; and it is only flushed, with which the jump stays linked.
#[test]
fn a_page_that_a_jump_leads_to_becomes_another() {
    for rights in [0x003u64, 0x103] {
        let mut g = guest();
        g.cpu().cr4 |= CR4_PGE;
        g.m.map(LIN, PAGE, 3);
        g.m.map(LIN + 0x1000, PAGE + 0x1000, rights);
        g.m.refresh();
        let entry = entry_of(&g, LIN + 0x1000);
        // JMP to the next page's beginning; there MOV EAX, value; RET. The two pages differ in a bit of their address.
        g.m.write(PAGE, &[0xe9, 0xfb, 0x0f, 0, 0]);
        g.m.write(PAGE + 0x1000, &[0xb8, 1, 0, 0, 0, 0xc3]);
        g.m.write(PAGE + 0x3000, &[0xb8, 100, 0, 0, 0, 0xc3]);
        g.halts(|a| {
            let mut top = a.create_label();
            a.mov(rsi, LIN).unwrap();
            a.mov(rdi, entry).unwrap();
            a.xor(ebx, ebx).unwrap();
            a.mov(ebp, 100).unwrap();
            a.set_label(&mut top).unwrap();
            for (swap, invlpg) in [(true, true), (false, true), (rights & 0x100 == 0, false), (false, false)]
            {
                if swap {
                    a.xor(qword_ptr(rdi), 0x2000).unwrap();
                }
                if invlpg {
                    a.invlpg(byte_ptr(rsi + 0x1000)).unwrap();
                } else {
                    a.mov(rax, cr3).unwrap();
                    a.mov(cr3, rax).unwrap();
                }
                for _ in 0..4 {
                    a.call(rsi).unwrap();
                    a.add(ebx, eax).unwrap();
                }
            }
            a.dec(ebp).unwrap();
            a.jnz(top).unwrap();
            a.hlt().unwrap();
        });
        // Half of all calls go to each page, whether it changes twice in each turn or once.
        assert_eq!(g.reg(gpr::RBX), 100 * 8 * 101);
    }
}

/// Where the page-table entry of `lin` lies.
fn entry_of(g: &Guest, lin: u64) -> u64 {
    let mut table = layout::TABLES;
    for level in (1..4).rev() {
        table = g.m.read_u64(table + (lin >> (12 + 9 * level) & 0x1ff) * 8) & 0x000f_ffff_ffff_f000;
    }
    table + (lin >> 12 & 0x1ff) * 8
}

#[test]
fn a_page_that_becomes_another() {
    let mut g = guest();
    for (n, add) in [(0, 1u8), (1, 100)] {
        // MOV ECX, 3; ADD RAX, add; DEC ECX; JNZ; RET
        let code = [0xb9, 3, 0, 0, 0, 0x48, 0x83, 0xc0, add, 0xff, 0xc9, 0x75, 0xf8, 0xc3];
        g.m.write(PAGE + n * 0x1000, &code);
    }
    g.m.map(LIN, PAGE, 3);
    g.m.refresh();
    let entry = entry_of(&g, LIN);
    g.halts(|a| {
        let mut top = a.create_label();
        a.mov(rsi, LIN).unwrap();
        a.mov(rdi, entry).unwrap();
        a.xor(ebx, ebx).unwrap();
        a.mov(ebp, 40).unwrap();
        a.set_label(&mut top).unwrap();
        a.xor(eax, eax).unwrap();
        a.call(rsi).unwrap();
        a.call(rsi).unwrap();
        a.cmp(rax, 6).unwrap();
        a.setne(al).unwrap();
        a.or(bl, al).unwrap();
        // Without INVLPG either page may run; it must be one of them.
        a.xor(qword_ptr(rdi), 0x1000).unwrap();
        a.xor(eax, eax).unwrap();
        a.call(rsi).unwrap();
        a.invlpg(byte_ptr(rsi)).unwrap();
        a.xor(eax, eax).unwrap();
        a.call(rsi).unwrap();
        a.cmp(rax, 300).unwrap();
        a.setne(al).unwrap();
        a.or(bl, al).unwrap();
        // And back, by CR3.
        a.xor(qword_ptr(rdi), 0x1000).unwrap();
        a.mov(rax, cr3).unwrap();
        a.mov(cr3, rax).unwrap();
        a.dec(ebp).unwrap();
        a.jnz(top).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(g.reg(gpr::RBX), 0);
}

/// The very page that executes is replaced: what follows INVLPG comes from the new one.
#[test]
fn the_running_page_becomes_another() {
    let mut g = guest();
    g.m.map(LIN, PAGE, 3);
    g.m.refresh();
    let entry = entry_of(&g, LIN);
    for (n, value) in [(0, 1), (1, 2)] {
        g.code_at(64, PAGE + n * 0x1000, |a| {
            // XOR [RDI], 0x1000; INVLPG [RSI]; MOV EAX, value; HLT
            a.xor(qword_ptr(rdi), 0x1000).unwrap();
            a.invlpg(byte_ptr(rsi)).unwrap();
            a.mov(eax, value).unwrap();
            a.hlt().unwrap();
        });
    }
    for want in [2, 1, 2, 1, 2] {
        g.cpu().regs[gpr::RDI] = entry;
        g.cpu().regs[gpr::RSI] = LIN;
        g.set_rip(LIN);
        assert!(matches!(g.run(), End::Halted(_)));
        assert_eq!(g.reg(gpr::RAX), want);
    }
}

#[test]
fn an_instruction_across_pages_changes() {
    let mut g = guest();
    // MOV EAX, imm32 from the last two bytes of a page on; JMP to the next.
    g.m.write(PAGE + 0xffe, &[0xb8, 0, 0, 0, 0, 0xc3]);
    g.halts(|a| {
        let mut top = a.create_label();
        a.mov(ecx, 60).unwrap();
        a.xor(ebx, ebx).unwrap();
        a.mov(esi, PAGE as u32 + 0xffe).unwrap();
        a.set_label(&mut top).unwrap();
        a.mov(byte_ptr(rsi + 1), cl).unwrap();
        a.call(rsi).unwrap();
        a.add(ebx, eax).unwrap();
        a.mov(byte_ptr(rsi + 2), cl).unwrap();
        a.call(rsi).unwrap();
        a.movzx(eax, ah).unwrap();
        a.add(ebx, eax).unwrap();
        a.mov(byte_ptr(rsi + 2), 0).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(top).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(g.reg(gpr::RBX), 60 * 61);
}

/// The page that an instruction ends in is replaced, or only flushed, while jumps from the page that it begins in stay.
#[test]
fn an_instruction_across_pages_goes_on_elsewhere() {
    let mut g = guest();
    g.m.map(LIN - 0x1000, PAGE + 0x3000, 3);
    g.m.map(LIN, PAGE, 3);
    g.m.refresh();
    let entry = entry_of(&g, LIN);
    // NOP; JMP to the next; MOV EAX, imm32 from the last two bytes of the page on; RET.
    g.m.write(PAGE + 0x3ffb, &[0x90, 0xeb, 0x00, 0xb8, 1]);
    for (n, byte) in [(0, 2), (1, 3)] {
        g.m.write(PAGE + n * 0x1000, &[byte, 0, 0, 0xc3]);
    }
    g.halts(|a| {
        let mut top = a.create_label();
        a.mov(ebp, 200).unwrap();
        a.xor(ebx, ebx).unwrap();
        a.mov(rdi, entry).unwrap();
        a.mov(rsi, LIN).unwrap();
        a.set_label(&mut top).unwrap();
        // Every fourth time to the other page.
        a.mov(eax, ebp).unwrap();
        a.and(eax, 3).unwrap();
        a.cmp(eax, 1).unwrap();
        a.sbb(rax, rax).unwrap();
        a.and(eax, 0x1000).unwrap();
        a.xor(qword_ptr(rdi), rax).unwrap();
        a.invlpg(byte_ptr(rsi)).unwrap();
        for _ in 0..3 {
            a.lea(rax, qword_ptr(rsi - 5)).unwrap();
            a.call(rax).unwrap();
            a.add(ebx, eax).unwrap();
        }
        a.dec(ebp).unwrap();
        a.jnz(top).unwrap();
        a.hlt().unwrap();
    });
    // The first change comes at once, so the pages are in force 100 times each.
    assert_eq!(g.reg(gpr::RBX), 300 * (0x201 + 0x301));
    if let Some(t) = &g.cpu().translator {
        assert!(t.exits[6] < 20, "interpreted {} times", t.exits[6]);
    }
}

#[test]
fn more_code_than_code_memory_holds() {
    let mut g = guest();
    if crate::TRANSLATED {
        g.m.translate(1, 64 << 10);
    }
    g.halts(|a| {
        let mut top = a.create_label();
        a.mov(ecx, 4).unwrap();
        a.xor(ebx, ebx).unwrap();
        a.set_label(&mut top).unwrap();
        for n in 0..2000 {
            let mut next = a.create_label();
            a.add(rbx, n).unwrap();
            a.jnz(next).unwrap();
            a.nop().unwrap();
            a.set_label(&mut next).unwrap();
        }
        a.dec(ecx).unwrap();
        a.jnz(top).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(g.reg(gpr::RBX), 4 * (1999 * 2000 / 2));
    if let Some(t) = &g.cpu().translator {
        assert!(t.flushes > 2, "{} flushes", t.flushes);
    }
}

/// A kick ends every kind of endless loop.
#[test]
fn every_loop_looks_up() {
    type Make = fn(&mut CodeAssembler);
    let loops: [(&str, Make); 6] = [
        ("jmp", |a| a.db(&[0xeb, 0xfe]).unwrap()),
        ("jcc", |a| a.db(&[0x31, 0xc0, 0x74, 0xfc]).unwrap()),
        ("indirect", |a| {
            a.mov(eax, layout::CODE as u32).unwrap();
            a.jmp(rax).unwrap();
        }),
        ("call and return", |a| {
            let (mut f, mut top) = (a.create_label(), a.create_label());
            a.set_label(&mut top).unwrap();
            a.call(f).unwrap();
            a.jmp(top).unwrap();
            a.set_label(&mut f).unwrap();
            a.ret().unwrap();
        }),
        ("loop", |a| {
            a.xor(ecx, ecx).unwrap();
            let mut top = a.create_label();
            a.set_label(&mut top).unwrap();
            a.loop_(top).unwrap();
            a.jmp(top).unwrap();
        }),
        ("rep", |a| {
            let mut top = a.create_label();
            a.set_label(&mut top).unwrap();
            a.mov(ecx, 0x1000).unwrap();
            a.mov(edi, layout::DATA as u32).unwrap();
            a.rep().stosb().unwrap();
            a.jmp(top).unwrap();
        }),
    ];
    for (name, make) in loops {
        let mut g = guest();
        g.code(make);
        let me = g.cpu().env.me.clone();
        let kicker = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(10));
            me.request(request::KICK);
        });
        assert_eq!(g.cpu().run_loop(), VcpuExit::Kicked, "{name}");
        kicker.join().unwrap();
    }
}

#[test]
fn breakpoints_and_steps_inside_code_that_has_run() {
    let mut g = guest();
    let program = |a: &mut CodeAssembler| {
        let mut top = a.create_label();
        a.mov(ecx, 100).unwrap(); // 5 bytes
        a.set_label(&mut top).unwrap();
        a.inc(rax).unwrap(); // 3
        a.inc(rdx).unwrap(); // 3, at 8
        a.mov(qword_ptr(layout::DATA), rdx).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(top).unwrap();
        a.hlt().unwrap();
    };
    (g.cpu().regs[gpr::RAX], g.cpu().regs[gpr::RDX]) = (0, 0);
    g.halts(program);
    assert_eq!(g.reg(gpr::RAX), 100);
    // An instruction breakpoint in the middle of the loop's block.
    g.cpu().write_dr(0, layout::CODE + 8).unwrap();
    g.cpu().write_dr(7, 1).unwrap();
    g.set_rip(layout::CODE);
    assert_eq!(g.run(), End::Vector(1));
    assert_eq!((g.stack(0), g.cpu().dr6 & 0xf), (layout::CODE + 8, 1));
    assert_eq!((g.reg(gpr::RAX), g.reg(gpr::RDX)), (101, 100));
    // A watchpoint on what it stores: 8 bytes, writes.
    g.cpu().write_dr(7, 0x9_0001).unwrap();
    g.cpu().write_dr(0, layout::DATA).unwrap();
    g.cpu().dr6 = 0;
    g.set_rip(layout::CODE);
    assert_eq!(g.run(), End::Vector(1));
    assert_eq!(g.cpu().dr6 & 0xf, 1);
    assert_eq!((g.reg(gpr::RAX), g.reg(gpr::RDX)), (102, 101));
    // Single step.
    g.cpu().write_dr(7, 0).unwrap();
    g.cpu().dr6 = 0;
    g.cpu().set_rflags_raw(0x102);
    g.set_rip(layout::CODE);
    assert_eq!(g.run(), End::Vector(1));
    assert_eq!((g.stack(0), g.cpu().dr6 & DR6_BS), (layout::CODE + 5, DR6_BS));
}

/// What CPUID does not declare raises #UD, and TZCNT is BSF then, whatever the host has.
#[test]
fn instructions_that_the_guest_lacks() {
    let mut cpuid = host_cpuid();
    for l in cpuid.leaves.iter_mut().filter(|l| l.function == 7 && l.index == Some(0)) {
        l.ebx &= !(1 << 3 | 1 << 8);
    }
    let mut g = Guest::with_cpuid(TestMode::Long64, cpuid);
    assert_eq!(g.vector_of(|a| a.andn(eax, ebx, ecx).unwrap()), 6);
    assert_eq!(g.vector_of(|a| a.shlx(eax, ebx, ecx).unwrap()), 6);
    assert_eq!(g.stack(0), layout::CODE);
    g.cpu().regs[gpr::RAX] = 0x77;
    g.cpu().regs[gpr::RBX] = 0;
    g.halts(|a| {
        a.tzcnt(rax, rbx).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(g.reg(gpr::RAX), 0x77);
}

/// A fault in the middle of a block: everything before it has happened, nothing of it, and it can be resumed.
#[test]
fn a_fault_in_the_middle_is_precise() {
    let mut g = guest();
    g.m.map(LIN, PAGE, 3);
    g.m.map(LIN + 0x1000, 0, 0);
    g.m.refresh();
    let entry = entry_of(&g, LIN + 0x1000);
    // The handler maps the page and returns; the error code goes first.
    g.code_at(64, HANDLERS + 14 * 16, |a| a.jmp(HANDLERS + 0x2000).unwrap());
    g.code_at(64, HANDLERS + 0x2000, |a| {
        a.inc(r15).unwrap();
        a.mov(r14, qword_ptr(rsp + 24)).unwrap();
        a.mov(r13, qword_ptr(rsp + 8)).unwrap();
        a.mov(r12, PAGE + 0x1003).unwrap();
        a.mov(qword_ptr(entry), r12).unwrap();
        a.add(rsp, 8).unwrap();
        a.iretq().unwrap();
    });
    g.cpu().regs[15] = 0;
    g.cpu().regs[gpr::RBP] = 1;
    g.halts(|a| {
        a.mov(rsi, LIN + 0xffc).unwrap(); // 10 bytes
        a.mov(eax, -1).unwrap(); // 5
        a.db(&[0x83, 0xc0, 1]).unwrap(); // ADD EAX, 1: CF, ZF
        a.mov(qword_ptr(rsi), rbp).unwrap(); // crosses into what is missing
        a.lea(rbx, qword_ptr(rbp + 1)).unwrap();
        a.add(rbp, rbx).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(g.reg(15), 1);
    assert_eq!(g.reg(13), layout::CODE + 18);
    assert_eq!(g.reg(14) & 0x8d5, 0x55, "CF, PF, AF and ZF of the ADD, although a later one overwrites them");
    assert_eq!(g.reg(gpr::RBP), 3);
    assert_eq!(g.m.read_u64(PAGE + 0xffc), 1);
}
