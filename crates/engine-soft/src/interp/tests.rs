//! Behaviour that the comparison with the host's CPU (see `tests/differential`) does not reach: other modes, faults in the middle,
//! RSP as operand, interruptible repetitions.

use crate::cpu::gpr::*;
use crate::cpu::{RIP, TrapInfo};
use crate::testing::{Machine, TestMode, layout};
use ringfort_x86::flags::{CF, ZF};

fn long() -> Machine {
    Machine::new(TestMode::Long64)
}

fn vector(r: Result<(), TrapInfo>) -> u8 {
    r.expect_err("an exception").vector
}

#[test]
fn pop_to_memory_uses_the_incremented_stack_pointer() {
    let mut m = long();
    let sp = layout::STACK_TOP - 0x100;
    m.cpu.regs[RSP] = sp;
    m.write(sp, &0x1122_3344_5566_7788u64.to_le_bytes());
    // POP QWORD [RSP]
    m.run_code(&[0x8f, 0x04, 0x24]).unwrap();
    assert_eq!(m.cpu.regs[RSP], sp + 8);
    assert_eq!(m.read_u64(sp + 8), 0x1122_3344_5566_7788);
    // PUSH RSP pushes the old value; POP RSP keeps the popped one.
    m.run_code(&[0x54]).unwrap();
    assert_eq!(m.read_u64(sp), sp + 8);
    m.run_code(&[0x5c]).unwrap();
    assert_eq!(m.cpu.regs[RSP], sp + 8);
}

#[test]
fn a_fault_leaves_the_stack_pointer() {
    let mut m = long();
    m.cpu.regs[RSP] = 0x7000_0004;
    assert_eq!(vector(m.run_code(&[0x50])), 14);
    assert_eq!((m.cpu.regs[RSP], m.rip()), (0x7000_0004, layout::CODE));
    m.cpu.regs[RSP] = 0x8000_0000_0000_0010;
    assert_eq!(vector(m.run_code(&[0x50])), 12, "a non-canonical stack is #SS");
    // POP QWORD [RAX] where the store faults.
    m.cpu.regs[RSP] = layout::STACK_TOP - 8;
    m.cpu.regs[RAX] = 0x7000_0000;
    assert_eq!(vector(m.run_code(&[0x8f, 0x00])), 14);
    assert_eq!(m.cpu.regs[RSP], layout::STACK_TOP - 8);
    // CALL whose push faults does not jump.
    m.cpu.regs[RSP] = 0x7000_0000;
    assert_eq!(vector(m.run_code(&[0xe8, 0, 1, 0, 0])), 14);
    assert_eq!(m.rip(), layout::CODE);
}

#[test]
fn branches_to_non_canonical_addresses_fault_at_the_branch() {
    let mut m = long();
    m.cpu.regs[RAX] = 0x0001_0000_0000_0000;
    assert_eq!(vector(m.run_code(&[0xff, 0xe0])), 13);
    assert_eq!(m.rip(), layout::CODE);
    assert_eq!(vector(m.run_code(&[0xff, 0xd0])), 13);
    m.cpu.regs[RSP] = layout::STACK_TOP - 8;
    m.write(layout::STACK_TOP - 8, &m.cpu.regs[RAX].to_le_bytes());
    assert_eq!(vector(m.run_code(&[0xc3])), 13);
    assert_eq!(m.cpu.regs[RSP], layout::STACK_TOP - 8);
}

#[test]
fn calls_and_returns_in_every_mode() {
    for (mode, size) in [
        (TestMode::Real, 2u64),
        (TestMode::Protected16, 2),
        (TestMode::Protected32, 4),
        (TestMode::Compat32, 4),
        (TestMode::Long64, 8),
    ] {
        let mut m = Machine::new(mode);
        // CALL over two NOPs; RET imm16 8 there.
        let code: &[u8] = if size == 2 {
            &[0xe8, 2, 0, 0x90, 0x90, 0xc2, 8, 0]
        } else {
            &[0xe8, 2, 0, 0, 0, 0x90, 0x90, 0xc2, 8, 0]
        };
        m.load_code(code);
        let (start, sp) = (m.rip(), m.cpu.regs[RSP]);
        let after = start + code.len() as u64 - 5;
        m.step().unwrap();
        assert_eq!(m.rip(), after + 2, "{mode:?}");
        assert_eq!(m.cpu.regs[RSP], sp - size, "{mode:?}");
        m.step().unwrap();
        assert_eq!(m.rip(), after, "{mode:?}");
        assert_eq!(m.cpu.regs[RSP], sp + 8, "{mode:?}");
    }
}

#[test]
fn sixteen_bit_stack_wraps_and_keeps_the_upper_half() {
    let mut m = Machine::new(TestMode::Protected16);
    m.cpu.regs[RSP] = 0xabcd_0000;
    m.cpu.regs[RAX] = 0x1234;
    m.run_code(&[0x50]).unwrap(); // PUSH AX
    assert_eq!(m.cpu.regs[RSP], 0xabcd_fffe);
    assert_eq!(m.read(m.cpu.seg[2].base + 0xfffe, 2), [0x34, 0x12]);
    m.run_code(&[0x5b]).unwrap(); // POP BX
    assert_eq!((m.cpu.regs[RSP], m.cpu.regs[RBX]), (0xabcd_0000, 0x1234));
}

#[test]
fn pusha_and_popa() {
    let mut m = Machine::new(TestMode::Protected32);
    for n in 0..8 {
        if n != RSP {
            m.cpu.regs[n] = 0x1000 + n as u64;
        }
    }
    let sp = m.cpu.regs[RSP];
    m.run_code(&[0x60]).unwrap();
    assert_eq!(m.cpu.regs[RSP], sp - 32);
    assert_eq!(m.read(sp - 20, 4), (sp as u32).to_le_bytes());
    for n in (0..8).filter(|&n| n != RSP) {
        m.cpu.regs[n] = 0;
    }
    m.run_code(&[0x61]).unwrap();
    assert_eq!(m.cpu.regs[RSP], sp);
    assert!((0..8).filter(|&n| n != RSP).all(|n| m.cpu.regs[n] == 0x1000 + n as u64));
}

#[test]
fn enter_links_the_outer_frames() {
    let mut m = long();
    let top = layout::STACK_TOP;
    m.cpu.regs[RBP] = top - 0x100;
    m.write(top - 0x108, &0xaaaau64.to_le_bytes());
    m.cpu.regs[RSP] = top - 0x200;
    m.run_code(&[0xc8, 0x20, 0, 3]).unwrap(); // ENTER 32, 3
    let frame = top - 0x208;
    assert_eq!(m.cpu.regs[RBP], frame);
    assert_eq!(m.cpu.regs[RSP], frame - 24 - 32);
    assert_eq!(m.read_u64(frame), top - 0x100);
    assert_eq!(m.read_u64(frame - 8), 0xaaaa);
    assert_eq!(m.read_u64(frame - 24), frame);
    m.run_code(&[0xc9]).unwrap(); // LEAVE
    assert_eq!((m.cpu.regs[RSP], m.cpu.regs[RBP]), (top - 0x200, top - 0x100));
}

#[test]
fn decimal_adjustments() {
    let mut m = Machine::new(TestMode::Protected32);
    m.cpu.regs[RAX] = 0x79;
    m.cpu.regs[RBX] = 0x35;
    m.run_code(&[0x00, 0xd8, 0x27]).unwrap(); // ADD AL, BL; DAA
    assert_eq!((m.cpu.regs[RAX] & 0xff, m.cpu.cf()), (0x14, true));
    m.cpu.regs[RAX] = 0x35;
    m.cpu.regs[RBX] = 0x47;
    m.run_code(&[0x28, 0xd8, 0x2f]).unwrap(); // SUB AL, BL; DAS
    assert_eq!((m.cpu.regs[RAX] & 0xff, m.cpu.cf()), (0x88, true));
    m.cpu.regs[RAX] = 0x0f;
    m.run_code(&[0x37]).unwrap(); // AAA
    assert_eq!(m.cpu.regs[RAX] & 0xffff, 0x105);
    m.cpu.regs[RAX] = 0x4e;
    m.run_code(&[0xd4, 10]).unwrap(); // AAM
    assert_eq!(m.cpu.regs[RAX] & 0xffff, 0x708);
    m.run_code(&[0xd5, 10]).unwrap(); // AAD
    assert_eq!(m.cpu.regs[RAX] & 0xffff, 0x4e);
    assert_eq!(vector(m.run_code(&[0xd4, 0])), 0);
}

#[test]
fn repeated_strings_cross_pages_and_stop_at_faults() {
    let mut m = long();
    let (from, to) = (layout::DATA + 0x800, layout::DATA + 0x1_0ff8);
    let data: Vec<u8> = (0..0x5000u32).map(|n| ((n * 7) >> 3) as u8).collect();
    m.write(from, &data);
    m.cpu.regs[RSI] = from;
    m.cpu.regs[RDI] = to;
    m.cpu.regs[RCX] = 0x5000;
    m.run_code(&[0xf3, 0xa4]).unwrap();
    assert_eq!(m.read(to, 0x5000), data);
    assert_eq!((m.cpu.regs[RCX], m.cpu.regs[RSI], m.cpu.regs[RDI]), (0, from + 0x5000, to + 0x5000));
    // The third page is missing: what fits is done, the rest stays to do.
    m.map(layout::DATA + 0x2000, 0, 0);
    m.refresh();
    m.cpu.regs[RDI] = layout::DATA + 0xffc;
    m.cpu.regs[RCX] = 0x1000;
    m.cpu.regs[RAX] = 0x5a5a_5a5a_5a5a_5a5a;
    let t = m.run_code(&[0xf3, 0x48, 0xab]).unwrap_err(); // REP STOSQ
    assert_eq!((t.vector, t.address), (14, layout::DATA + 0x2000));
    assert_eq!(m.rip(), layout::CODE);
    assert_eq!(m.cpu.regs[RDI], layout::DATA + 0x1ffc);
    assert_eq!(m.cpu.regs[RCX], 0x1000 - 0x200);
    assert_eq!(m.read(layout::DATA + 0xffb, 2)[1], 0x5a);
    assert_ne!(
        m.read(layout::DATA + 0x1ff8, 8)[4..],
        [0x5a; 4],
        "an element that faults is not stored in part"
    );
}

#[test]
fn overlapping_copies_smear() {
    for size in [1usize, 2, 4, 8] {
        for shift in [1usize, 3, 8, 24] {
            let mut m = long();
            let base = layout::DATA + 0xfc0;
            let mut want: Vec<u8> = (0..=255).collect();
            m.write(base, &want);
            for at in (0..160usize).step_by(size) {
                // An element is read whole before it is stored.
                let e = want[at..at + size].to_vec();
                want[at + shift..at + shift + size].copy_from_slice(&e);
            }
            m.cpu.regs[RSI] = base;
            m.cpu.regs[RDI] = base + shift as u64;
            m.cpu.regs[RCX] = (160 / size) as u64;
            let code: &[u8] = match size {
                1 => &[0xf3, 0xa4],
                2 => &[0xf3, 0x66, 0xa5],
                4 => &[0xf3, 0xa5],
                _ => &[0xf3, 0x48, 0xa5],
            };
            m.run_code(code).unwrap();
            assert_eq!(m.read(base, 256), want, "{size} {shift}");
        }
    }
}

#[test]
fn a_request_interrupts_a_repetition_between_pages() {
    let mut m = long();
    m.cpu.regs[RDI] = layout::DATA;
    m.cpu.regs[RCX] = 0x4000;
    m.load_code(&[0xf3, 0xaa]);
    m.cpu.env.me.request(crate::vcpu::request::INTERRUPT);
    m.step().unwrap();
    assert_eq!((m.rip(), m.cpu.regs[RCX]), (layout::CODE, 0x3000));
    m.cpu.env.me.requests.store(0, std::sync::atomic::Ordering::SeqCst);
    m.step().unwrap();
    assert_eq!((m.rip(), m.cpu.regs[RCX]), (layout::CODE + 2, 0));
}

#[test]
fn real_mode_string_offsets_wrap() {
    let mut m = Machine::new(TestMode::Real);
    m.cpu.regs[RDI] = 0xfffe;
    m.cpu.regs[RCX] = 4;
    m.cpu.regs[RAX] = 0x41;
    m.run_code(&[0xf3, 0xaa]).unwrap(); // REP STOSB
    assert_eq!(m.read(0xfffe, 2), [0x41; 2]);
    assert_eq!(m.read(0, 2), [0x41; 2], "the offset wraps in the segment");
    assert_eq!((m.cpu.regs[RDI], m.cpu.regs[RCX]), (2, 0));
}

#[test]
fn stores_into_code_take_effect_at_the_next_instruction() {
    let mut m = long();
    // MOV BYTE [RIP+1], 0x41 makes the next instruction INC ... here: MOV AL, 0 -> MOV AL, 0x41.
    m.load_code(&[0xc6, 0x05, 0x01, 0, 0, 0, 0x41, 0xb0, 0x00, 0xf4]);
    m.cpu.step_block();
    if m.rip() == layout::CODE + 7 {
        m.cpu.step_block();
    }
    assert_eq!(m.cpu.regs[RAX] & 0xff, 0x41);
}

#[test]
fn cmpxchg16b_wants_alignment_and_compares_both_halves() {
    let mut m = long();
    let at = layout::DATA + 0x40;
    m.cpu.regs[RDI] = at + 8;
    let code = [0xf0, 0x48, 0x0f, 0xc7, 0x0f];
    assert_eq!(vector(m.run_code(&code)), 13);
    m.cpu.regs[RDI] = at;
    m.write(at, &5u64.to_le_bytes());
    m.write(at + 8, &6u64.to_le_bytes());
    m.cpu.regs[RAX] = 5;
    m.cpu.regs[RDX] = 7;
    m.cpu.regs[RBX] = 50;
    m.cpu.regs[RCX] = 60;
    m.run_code(&code).unwrap();
    assert_eq!(m.cpu.rflags() & ZF, 0);
    assert_eq!((m.cpu.regs[RAX], m.cpu.regs[RDX]), (5, 6));
    m.run_code(&code).unwrap();
    assert_ne!(m.cpu.rflags() & ZF, 0);
    assert_eq!((m.read_u64(at), m.read_u64(at + 8)), (50, 60));
}

#[test]
fn bit_strings_reach_backwards_and_beyond() {
    let mut m = long();
    m.cpu.regs[RDI] = layout::DATA + 0x100;
    m.cpu.regs[RCX] = (-65i64) as u64;
    m.run_code(&[0xf0, 0x48, 0x0f, 0xab, 0x0f]).unwrap(); // LOCK BTS [RDI], RCX
    assert_eq!(m.read_u64(layout::DATA + 0xf0), 1 << 63);
    assert!(!m.cpu.cf());
    m.run_code(&[0x48, 0x0f, 0xb3, 0x0f]).unwrap(); // BTR
    assert_eq!((m.read_u64(layout::DATA + 0xf0), m.cpu.rflags() & CF), (0, CF));
}

#[test]
fn narrow_addresses_truncate_in_64_bit_code() {
    let mut m = long();
    m.cpu.regs[RAX] = 0xffff_ffff_0000_0000 | layout::DATA;
    m.write(layout::DATA, &0x1234_5678u32.to_le_bytes());
    m.run_code(&[0x67, 0x8b, 0x08]).unwrap(); // MOV ECX, [EAX]
    assert_eq!(m.cpu.regs[RCX], 0x1234_5678);
    // LEA RCX, [EAX-1] and LEA ECX, [RAX-1]
    m.cpu.regs[RAX] = 0x1_0000_0000;
    m.run_code(&[0x67, 0x48, 0x8d, 0x48, 0xff]).unwrap();
    assert_eq!(m.cpu.regs[RCX], 0xffff_ffff);
    // MOV EAX, [disp32] with and without 67h, and RIP-relative with both.
    m.write(layout::DATA + 8, &0xaabb_ccddu32.to_le_bytes());
    for code in [&[0x8b, 0x04, 0x25, 8, 0, 0x10, 0][..], &[0x67, 0x8b, 0x04, 0x25, 8, 0, 0x10, 0]] {
        m.cpu.regs[RAX] = 0;
        m.run_code(code).unwrap();
        assert_eq!(m.cpu.regs[RAX], 0xaabb_ccdd);
    }
    let rel = (layout::DATA + 8).wrapping_sub(layout::CODE + 6) as u32;
    let mut code = vec![0x8b, 0x05];
    code.extend(rel.to_le_bytes());
    m.cpu.regs[RAX] = 0;
    m.run_code(&code).unwrap();
    assert_eq!(m.cpu.regs[RAX], 0xaabb_ccdd);
    let mut code = vec![0x67, 0x8b, 0x05];
    code.extend((rel - 1).to_le_bytes());
    m.cpu.regs[RAX] = 0;
    m.run_code(&code).unwrap();
    assert_eq!(m.cpu.regs[RAX], 0xaabb_ccdd);
}

#[test]
fn loops_count_in_the_address_size() {
    let mut m = long();
    m.cpu.regs[RCX] = 0x5_0000_0001;
    m.load_code(&[0x67, 0xe2, 0x10]); // LOOP with ECX
    m.step().unwrap();
    assert_eq!((m.rip(), m.cpu.regs[RCX]), (layout::CODE + 3, 0));
    m.cpu.regs[RCX] = 0x5_0000_0001;
    m.load_code(&[0xe2, 0x10]);
    m.step().unwrap();
    assert_eq!((m.rip(), m.cpu.regs[RCX]), (layout::CODE + 0x12, 0x5_0000_0000));
    let mut m = Machine::new(TestMode::Real);
    m.cpu.regs[RCX] = 0x1_0001;
    m.load_code(&[0xe2, 0xf0]);
    m.step().unwrap();
    assert_eq!((m.rip(), m.cpu.regs[RCX]), (2, 0x1_0000));
    assert_eq!(m.cpu.regs[usize::from(RIP)], 2);
}
