//! Guests that execute noise, in every mode: nothing may panic, hang or leave the engine in a state that contradicts itself.

use crate::support::Guest;
use ringfort_engine_soft::cpu::Activity;
use ringfort_engine_soft::testing::{TestMode, layout};
use ringfort_x86::cr::*;
use ringfort_x86::flags::VM;

/// Beginnings of system instructions; the rest is noise.
const OPENINGS: [&[u8]; 40] = [
    &[0x0f, 0x20],
    &[0x0f, 0x22],
    &[0x0f, 0x21],
    &[0x0f, 0x23],
    &[0x0f, 0x00],
    &[0x0f, 0x01],
    &[0x0f, 0x02],
    &[0x0f, 0x03],
    &[0x0f, 0x05],
    &[0x0f, 0x07],
    &[0x0f, 0x30],
    &[0x0f, 0x32],
    &[0x0f, 0x34],
    &[0x0f, 0x35],
    &[0x0f, 0xa2],
    &[0x0f, 0xb2],
    &[0x0f, 0xb4],
    &[0x0f, 0xc7],
    &[0x0f, 0xae],
    &[0x8e],
    &[0x8c],
    &[0xea],
    &[0x9a],
    &[0xcb],
    &[0xca],
    &[0xcf],
    &[0xcd],
    &[0xcc],
    &[0xce],
    &[0xf1],
    &[0x9c],
    &[0x9d],
    &[0xfa],
    &[0xfb],
    &[0xf3, 0x6c],
    &[0xf3, 0x6f],
    &[0xff],
    &[0x17],
    &[0x07],
    &[0x66, 0x0f, 0x38, 0x82],
];

/// Selectors, control values and MSR numbers that get somewhere.
fn value(r: &mut fastrand::Rng) -> u64 {
    match r.u8(0..8) {
        0 => u64::from([8u16, 0x10, 0x18, 0x20, 0x28, 0x33, 0x3b, 0x43, 0x48, 0x60, 0x68][r.usize(0..11)]),
        1 => layout::CODE + r.u64(0..0x1000),
        2 => layout::STACK_TOP - r.u64(0..0x1_0000),
        3 => {
            [CR0_PE | CR0_PG, CR0_PE, CR4_PAE, CR4_VME | CR4_PSE, 0xd, 1, EFER_LME | EFER_SCE][r.usize(0..7)]
        }
        4 => 0xc000_0080 + r.u64(0..0x90),
        5 => r.u64(0..0x300),
        6 => r.u64(..) & 0x3f_ffff,
        _ => r.u64(..),
    }
}

fn noise(r: &mut fastrand::Rng) -> Vec<u8> {
    let mut code = Vec::new();
    while code.len() < 0xf00 {
        if r.u8(0..4) == 0 {
            code.push([0x66, 0x67, 0x2e, 0x36, 0x26, 0x64, 0xf0, 0xf2, 0xf3, 0x48][r.usize(0..10)]);
        }
        if r.bool() {
            code.extend(OPENINGS[r.usize(0..OPENINGS.len())]);
        }
        for _ in 0..r.usize(1..8) {
            code.push(r.u8(..));
        }
    }
    code
}

/// What must hold between instructions.
fn check(g: &Guest, seed: u64) {
    let c = &g.m.cpu;
    assert!(c.cpl <= 3);
    if c.cr0 & CR0_PE == 0 || c.cr0 & CR0_PG == 0 {
        assert_eq!(c.efer & EFER_LMA, 0, "seed {seed}");
    }
    if c.efer & EFER_LMA != 0 {
        assert_ne!(c.cr4 & CR4_PAE, 0, "seed {seed}");
        assert_eq!(c.sys_flags & VM, 0, "seed {seed}");
    }
    assert_eq!(c.mode, c.decode_mode(), "seed {seed}: the decoding mode is out of date");
    assert_eq!(c.mmu.access_mode, c.mode_at(c.cpl), "seed {seed}: the access mode is out of date");
    assert_eq!(c.ext, 0, "seed {seed}");
    if c.sys_flags & VM != 0 {
        assert_eq!(c.cpl, 3, "seed {seed}");
    }
}

fn torture(mode: TestMode, seeds: std::ops::Range<u64>) {
    for seed in seeds {
        let mut r = fastrand::Rng::with_seed(seed);
        let mut g = Guest::new(mode);
        g.descriptor(0x60, 0x67 | 0x3800 << 16 | 0x89 << 40);
        g.descriptor(0x68, r.u64(..));
        let tss: Vec<u8> = (0..0x68).map(|_| r.u8(..)).collect();
        g.m.write(0x3800, &tss);
        g.tss64(layout::STACK_TOP - 0x2_0000, [layout::STACK_TOP - 0x3_0000; 3]);
        let code = noise(&mut r);
        g.m.load_code(&code);
        if r.bool() && mode != TestMode::Real && mode != TestMode::Protected16 {
            g.m.set_user();
        }
        for _ in 0..300 {
            if r.u8(0..3) == 0 {
                let n = r.usize(0..16);
                g.cpu().regs[n] = value(&mut r);
            }
            if r.u8(0..16) == 0 {
                g.set_rip(layout::CODE.wrapping_sub(g.m.cpu.seg[1].base).wrapping_add(r.u64(0..0xf00)));
            }
            match g.cpu().activity {
                Activity::Running => {
                    g.cpu().step_block();
                }
                Activity::Shutdown => break,
                _ => g.cpu().activity = Activity::Running,
            }
            check(&g, seed);
        }
        let state = g.cpu().to_state();
        // What the engine gives out it takes back.
        if let Err(e) = g.cpu().from_state(&state) {
            panic!("seed {seed}: {e}");
        }
        check(&g, seed);
    }
}

#[test]
fn noise_in_real_mode() {
    torture(TestMode::Real, 0..200);
}

#[test]
fn noise_in_16_bit_protected_mode() {
    torture(TestMode::Protected16, 1000..1200);
}

#[test]
fn noise_in_32_bit_protected_mode() {
    torture(TestMode::Protected32, 2000..2200);
}

#[test]
fn noise_in_compatibility_mode() {
    torture(TestMode::Compat32, 3000..3200);
}

#[test]
fn noise_in_64_bit_mode() {
    torture(TestMode::Long64, 4000..4200);
}
