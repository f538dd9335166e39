//! Every instruction that the engine's CPUID can declare has a handler.

use iced_x86::{Code, Decoder, DecoderOptions, Instruction};
use ringfort_engine_soft::cpu::CodeSize;
use ringfort_engine_soft::cpuid::offered;
use ringfort_engine_soft::decode::{FeatureSet, Mode, lower, undefined};
use std::collections::BTreeSet;

/// Random bytes, most of them plausible instructions.
fn bytes(r: &mut fastrand::Rng, bits: u32) -> [u8; 16] {
    let mut b = [0; 16];
    r.fill(&mut b);
    let mut at = 0;
    if r.u8(0..3) == 0 {
        b[at] = [0x66, 0xf2, 0xf3, 0x67, 0xf0][r.usize(0..5)];
        at += 1;
    }
    match r.u8(0..8) {
        0..3 => {
            if bits == 64 && r.bool() {
                b[at] = 0x40 | r.u8(0..16);
                at += 1;
            }
            b[at] = 0x0f;
            at += 1;
            match r.u8(0..4) {
                0 => b[at] = 0x38,
                1 => b[at] = 0x3a,
                _ => {}
            }
        }
        3..6 => {
            b[at] = 0xc4;
            b[at + 1] = b[at + 1] & 0xe0 | r.u8(1..4);
            if bits != 64 {
                b[at + 1] |= 0xc0;
                b[at + 2] |= 0x40;
            }
        }
        6 if bits == 64 => b[at] = 0x40 | r.u8(0..16),
        _ => {}
    }
    b
}

#[test]
fn whatever_can_be_declared_is_implemented() {
    let features = FeatureSet::from_cpuid(offered());
    let mut r = fastrand::Rng::with_seed(3);
    let mut missing = BTreeSet::new();
    let mut seen: BTreeSet<u16> = BTreeSet::new();
    for (bits, code) in [(64, CodeSize::Bits64), (32, CodeSize::Bits32), (16, CodeSize::Bits16)] {
        let mode = Mode { code, stack: (bits / 8) as u8, flat: false };
        for _ in 0..400_000 {
            let b = bytes(&mut r, bits);
            let i: Instruction = Decoder::new(bits, &b, DecoderOptions::NONE).decode();
            if i.is_invalid()
                || !features.allows(&i)
                || !seen.insert(i.code() as u16 | (bits as u16) << 9 & 0x8000)
            {
                continue;
            }
            let op = lower(&i, &b[..i.len()], 0, mode, &features);
            // The instructions that are there to be undefined.
            let on_purpose =
                matches!(i.code(), Code::Ud0 | Code::Ud0_r16_rm16 | Code::Ud0_r32_rm32 | Code::Ud0_r64_rm64)
                    || matches!(i.mnemonic(), iced_x86::Mnemonic::Ud1 | iced_x86::Mnemonic::Ud2);
            if op.run as usize == undefined as *const () as usize && !on_purpose {
                missing.insert(format!("{:?} ({:?}, {bits}-bit)", i.code(), i.cpuid_features()));
            }
        }
    }
    assert!(seen.len() > 1500, "only {} encodings were tried", seen.len());
    assert!(missing.is_empty(), "no handler for {missing:#?}");
}
