//! Differential test of native execution: random SIMD, MMX and x87 instructions with random state, by the engine and by the host's CPU
//! directly; everything that software can see must be equal. `RINGFORT_CASES` sets the number of cases, `RINGFORT_SEED` the first seed.
#![cfg(target_arch = "x86_64")]

mod host;

use fastrand::Rng;
use host::{Context, Host};
use iced_x86::{
    CpuidFeature as F, Decoder, DecoderOptions, EncodingKind, Instruction, InstructionInfoFactory, Mnemonic,
    OpKind, Register,
};
use ringfort_engine_soft::cpuid::host_is_amd;
use ringfort_engine_soft::testing::{Machine, TestMode, layout};
use ringfort_x86::cr::CR0_AM;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// Two pages of data; the third is not mapped.
const DATA: u64 = layout::DATA;
const BYTES: usize = 0x2000;

/// Bytes of a random instruction of the kinds under test.
fn bytes(r: &mut Rng) -> Vec<u8> {
    let mut b = Vec::with_capacity(15);
    // ModRM: a register, or memory at RBX plus a small displacement.
    let modrm = |r: &mut Rng| {
        let reg = r.u8(0..8) << 3;
        match r.u8(0..8) {
            0..4 => vec![0xc0 | reg | r.u8(0..8)],
            4 => vec![reg | 3],
            5 | 6 => vec![0x40 | reg | 3, r.u8(..)],
            _ => vec![0x44 | reg, r.u8(..) & !7 | 3, r.u8(..)],
        }
    };
    match r.u8(0..16) {
        0..3 => {
            b.push(0xd8 + r.u8(0..8));
            b.extend(modrm(r));
        }
        3..8 => {
            if let Some(p) = [None, Some(0x66), Some(0xf3), Some(0xf2)][r.usize(0..4)] {
                b.push(p);
            }
            if r.bool() {
                b.push(0x40 | r.u8(0..16) & !3 | r.u8(0..2) | r.u8(0..2) << 1 & 2);
            }
            b.push(0x0f);
            match r.u8(0..4) {
                0 => b.push(0x38),
                1 => b.push(0x3a),
                _ => {}
            }
            b.push(r.u8(..));
            b.extend(modrm(r));
        }
        _ => {
            let inverted = r.u8(0..8) << 5;
            let map = r.u8(1..4);
            b.extend([0xc4, inverted | map, r.u8(..), r.u8(..)]);
            b.extend(modrm(r));
        }
    }
    b.extend([r.u8(..), r.u8(..)]);
    b
}

/// Whether the harness can run it: user-mode SIMD or x87 that does not touch RSP, R15 or memory elsewhere.
fn wanted(i: &Instruction, info: &mut InstructionInfoFactory) -> bool {
    use Mnemonic as M;
    if i.is_invalid() || !matches!(i.encoding(), EncodingKind::Legacy | EncodingKind::VEX) {
        return false;
    }
    let kind = i.cpuid_features().iter().any(|f| {
        matches!(
            f,
            F::FPU
                | F::FPU287
                | F::FPU387
                | F::MMX
                | F::SSE
                | F::SSE2
                | F::SSE3
                | F::SSSE3
                | F::SSE4_1
                | F::SSE4_2
                | F::SSE4A
                | F::AES
                | F::PCLMULQDQ
                | F::SHA
                | F::GFNI
                | F::AVX
                | F::AVX2
                | F::F16C
                | F::FMA
                | F::VAES
                | F::VPCLMULQDQ
                | F::AVX_VNNI
                | F::AVX_IFMA
        )
    });
    if !kind
        || matches!(
            i.mnemonic(),
            // Images hold pointers, which differ; hints; another module's.
            M::Fxsave
                | M::Fxrstor
                | M::Fxsave64
                | M::Fxrstor64
                | M::Fnstenv
                | M::Fnsave
                | M::Monitor
                | M::Mwait
                | M::Crc32
                | M::Popcnt
                | M::Clflush
        )
    {
        return false;
    }
    // Implicit addresses.
    if (0..i.op_count()).any(|n| matches!(i.op_kind(n), OpKind::MemorySegRDI | OpKind::MemorySegEDI)) {
        return i.op_kind(0) == OpKind::MemorySegRDI;
    }
    if (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory) {
        let index = i.memory_index();
        if i.memory_base() != Register::RBX || !(index == Register::None || index.is_xmm() || index.is_ymm())
        {
            return false;
        }
    }
    info.info(i).used_registers().iter().all(|u| {
        let r = u.register().full_register();
        r != Register::RSP && r != Register::R15
    })
}

fn float32(r: &mut Rng) -> u32 {
    match r.u8(0..8) {
        0 => [
            0,
            1 << 31,
            0x3f80_0000,
            0x7f80_0000,
            0xff80_0000,
            0x7fc0_0000,
            0x7f80_0001,
            1,
            0x807f_ffff,
            0x7f7f_ffff,
        ][r.usize(0..10)],
        1 => r.u32(..) & 0x807f_ffff,
        2 => (r.i32(-1000..1000) as f32 * 0.5).to_bits(),
        _ => r.u32(..) & !(0x7f << 24) | r.u32(0x38..0x48) << 24,
    }
}

fn float64(r: &mut Rng) -> u64 {
    match r.u8(0..8) {
        0 => [
            0,
            1 << 63,
            0x3ff << 52,
            0x7ff << 52,
            0xfff << 52,
            0x7ff8 << 48,
            0x7ff << 52 | 1,
            1,
            0x7fef << 48,
        ][r.usize(0..9)],
        1 => r.u64(..) & !(0x7ff << 52),
        2 => (f64::from(r.i32(-1000..1000)) * 0.5).to_bits(),
        _ => r.u64(..) & !(0x7ff << 52) | r.u64(0x3d0..0x430) << 52,
    }
}

fn vector(r: &mut Rng) -> [u8; 32] {
    let mut v = [0; 32];
    match r.u8(0..4) {
        0 => v.chunks_exact_mut(4).for_each(|c| c.copy_from_slice(&float32(r).to_le_bytes())),
        1 => v.chunks_exact_mut(8).for_each(|c| c.copy_from_slice(&float64(r).to_le_bytes())),
        2 => v.iter_mut().for_each(|b| *b = r.u8(..)),
        _ => v.iter_mut().for_each(|b| *b = [0, 1, 0x7f, 0x80, 0xff, b'a'][r.usize(0..6)]),
    }
    v
}

fn extended(r: &mut Rng) -> [u8; 10] {
    let mut v = [0; 10];
    let (exponent, significand): (u16, u64) = match r.u8(0..8) {
        0 => [
            (0, 0),
            (0x8000, 0),
            (0x7fff, 1 << 63),
            (0xffff, 1 << 63),
            (0x7fff, 0xc000 << 48),
            (0x7fff, 0x8000 << 48 | 1),
            (0, 1),
            (0x3fff, 1 << 63),
            (0x4000, 1), // unsupported formats
            (0x7fff, 0),
            (0, 1 << 63),
        ][r.usize(0..11)],
        1 => (r.u16(..), r.u64(..) | 1 << 63),
        _ => (r.u16(0x3fc0..0x4040) | r.u16(0..2) << 15, r.u64(..) | 1 << 63),
    };
    v[..8].copy_from_slice(&significand.to_le_bytes());
    v[8..].copy_from_slice(&exponent.to_le_bytes());
    v
}

/// A random state.
fn state(r: &mut Rng, i: &Instruction, data: &mut [u8]) -> Context {
    let mut c = Context::new();
    c.ymm.iter_mut().for_each(|y| *y = vector(r));
    if r.u8(0..4) == 0 {
        // Equal operands.
        let v = c.ymm[r.usize(0..16)];
        c.ymm[r.usize(0..16)] = v;
    }
    for g in &mut c.gpr {
        *g = if r.bool() { r.u64(..) } else { r.u64(0..40) };
    }
    let near_end = if r.u8(0..16) == 0 { BYTES as u64 - r.u64(0..40) } else { 0x800 };
    let at = match r.u8(0..4) {
        0 => 0x800 + r.u64(0..64),
        1 => 0x1000 - r.u64(0..300),
        _ => near_end & !31,
    };
    c.gpr[3] = DATA + at;
    c.gpr[7] = DATA + 0x1000 - r.u64(0..32);
    if i.is_vsib() {
        let n = i.memory_index().number();
        let wide = i.is_vsib64();
        let small = |r: &mut Rng| {
            let end = if r.u8(0..8) == 0 { 0x1000 } else { 100 };
            r.i32(-100..end)
        };
        if wide {
            c.ymm[n].chunks_exact_mut(8).for_each(|l| l.copy_from_slice(&i64::from(small(r)).to_le_bytes()));
        } else {
            c.ymm[n].chunks_exact_mut(4).for_each(|l| l.copy_from_slice(&small(r).to_le_bytes()));
        }
    }
    let arith = 0x8d5;
    // Sometimes with alignment checks.
    c.flags = r.u64(..) & arith | 0x202 | if r.u8(0..8) == 0 { 1 << 18 } else { 0 };
    let masks = if r.u8(0..4) == 0 { r.u32(..) & 0x1f80 } else { 0x1f80 };
    let modes = if r.bool() { r.u32(..) & 0xe040 } else { 0 };
    c.mxcsr = masks | modes | if r.bool() { r.u32(..) & 0x3f } else { 0 };
    // x87.
    let mut fcw = 0x340u16 | if r.u8(0..4) == 0 { r.u16(..) & 0x3f } else { 0x3f };
    if r.bool() {
        fcw = fcw & !0xf00 | r.u16(..) & 0xf00;
    }
    let mut fsw = ((r.u16(0..8) << 11) * r.u16(0..2)) | r.u16(..) & 0x4700;
    if r.u8(0..3) == 0 {
        fsw |= r.u16(..) & 0x7f;
    }
    if fsw & !fcw & 0x3f != 0 {
        fsw |= 0x8080;
    }
    c.fx[..2].copy_from_slice(&fcw.to_le_bytes());
    c.fx[2..4].copy_from_slice(&fsw.to_le_bytes());
    c.fx[4] = if r.bool() { 0xff } else { r.u8(..) };
    for n in 0..8 {
        c.fx[32 + 16 * n..][..10].copy_from_slice(&extended(r));
    }
    c.fx[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    // The operand's surroundings.
    let base = at as usize & !31;
    for chunk in data[base.saturating_sub(0x100)..(base + 0x180).min(BYTES)].chunks_exact_mut(32) {
        chunk.copy_from_slice(&vector(r));
    }
    if r.u8(0..3) == 0 && (at as usize) + 10 <= BYTES {
        data[at as usize..][..10].copy_from_slice(&extended(r));
    }
    c
}

/// Make the guest's state that of `c`.
fn enter(m: &mut Machine, c: &Context) {
    m.cpu.regs[..16].copy_from_slice(&c.gpr);
    m.cpu.set_rflags_raw(c.flags & !0x200);
    m.cpu.update_mmu_mode();
    let mut area = vec![0u8; 832];
    area[..160].copy_from_slice(&c.fx[..160]);
    area[24..28].copy_from_slice(&c.mxcsr.to_le_bytes());
    area[512] = 7;
    for (n, y) in c.ymm.iter().enumerate() {
        area[160 + 16 * n..][..16].copy_from_slice(&y[..16]);
        area[576 + 16 * n..][..16].copy_from_slice(&y[16..]);
    }
    m.cpu.import_xsave(&area).expect("a valid state");
}

/// Whether the bytes mean the same in 32-bit code, and for register operands in 16-bit code.
fn elsewhere(b: &[u8], i: &Instruction, bits: u32) -> bool {
    let other = Decoder::new(bits, b, DecoderOptions::NONE).decode();
    let same = |n: u32| {
        i.op_kind(n) == other.op_kind(n)
            && (i.op_kind(n) != OpKind::Register || i.op_register(n) == other.op_register(n))
            && (bits == 32 || i.op_kind(n) != OpKind::Memory)
    };
    i.code() == other.code()
        && i.len() == other.len()
        && (0..i.op_count()).all(same)
        && !i.is_vsib()
        && !matches!(i.op0_kind(), OpKind::MemorySegRDI)
}

/// Execute in the other modes what the 64-bit machine has executed, and compare with it.
fn other_modes(
    others: &mut [(TestMode, Machine)],
    b: &[u8],
    i: &Instruction,
    before: &Context,
    data: &[u8],
    m: &mut Machine,
    trap: Option<u8>,
) -> Vec<String> {
    let mut problems = Vec::new();
    let area = m.cpu.export_xsave();
    for (mode, o) in others {
        if !elsewhere(b, i, if *mode == TestMode::Protected32 { 32 } else { 16 }) || trap == Some(14) {
            continue;
        }
        let memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
        if memory {
            o.write(DATA, data);
        }
        o.set_mode(*mode);
        if before.flags >> 18 & 1 != 0 {
            continue;
        }
        enter(o, before);
        o.cpu.regs[..16].iter_mut().for_each(|r| *r &= 0xffff_ffff);
        o.load_code(b);
        let got = o.step().err().map(|t| t.vector);
        let want = if *mode == TestMode::Real && i.encoding() == EncodingKind::VEX { Some(6) } else { trap };
        if got != want {
            problems.push(format!("{mode:?}: trap {got:?}, in 64-bit code {want:?}"));
        }
        if got.is_some() {
            continue;
        }
        let there = o.cpu.export_xsave();
        let high = |a: &[u8]| [&a[160..288], &a[576..704]].concat();
        if x87(&there) != x87(&area) || there[24..28] != area[24..28] || high(&there) != high(&area) {
            problems.push(format!("{mode:?}: vector or x87 state differs from that of 64-bit code"));
        }
        for n in (0..8).filter(|&n| n != 4) {
            let (a, b) = (o.cpu.regs[n] as u32, m.cpu.regs[n] as u32);
            if a != b {
                problems.push(format!("{mode:?}: GPR {n} {a:#x}, in 64-bit code {b:#x}"));
            }
        }
        if (o.cpu.rflags() ^ m.cpu.rflags()) & 0x8d5 != 0 {
            problems.push(format!("{mode:?}: flags differ from those of 64-bit code"));
        }
        if memory && o.read(DATA, BYTES) != m.read(DATA, BYTES) {
            problems.push(format!("{mode:?}: memory differs from that of 64-bit code"));
        }
    }
    problems
}

/// What of the x87 state is compared: control, status, tags, registers.
fn x87(image: &[u8]) -> Vec<u8> {
    let mut v = image[..5].to_vec();
    (0..8).for_each(|n| v.extend(&image[32 + 16 * n..][..10]));
    v
}

/// The one host there is.
fn host() -> MutexGuard<'static, Host> {
    static HOST: OnceLock<Mutex<Host>> = OnceLock::new();
    let host = HOST.get_or_init(|| Mutex::new(Host::new(DATA, BYTES)));
    host.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A random area for XRSTOR or FXRSTOR: mostly valid.
fn image(r: &mut Rng, before: &Context) -> Vec<u8> {
    let mut a: Vec<u8> = (0..832).map(|_| r.u8(..)).collect();
    a[..160].copy_from_slice(&before.fx[..160]);
    let mxcsr = r.u32(..) & 0xffff | if r.u8(0..8) == 0 { 1 << r.u32(18..32) } else { 0 };
    a[24..28].copy_from_slice(&mxcsr.to_le_bytes());
    a[512..576].fill(0);
    a[512] = r.u8(0..8);
    if r.bool() {
        a[520] = if r.u8(0..4) == 0 { r.u8(0..8) } else { a[512] | r.u8(0..8) };
        a[527] = 0x80;
    }
    if r.u8(0..12) == 0 {
        a[512 + r.usize(0..64)] |= 1;
    }
    a
}

#[test]
fn state_images_agree() {
    if !std::arch::is_x86_feature_detected!("avx2") {
        return;
    }
    // SAFETY: CPUID has this leaf wherever AVX is.
    let has = std::arch::x86_64::__cpuid_count(0xd, 1).eax;
    let mut host = host();
    let mut m = Machine::new(TestMode::Long64);
    let mut r = Rng::with_seed(5);
    let mut data = vec![0u8; BYTES];
    let add = Decoder::new(64, &[0x0f, 0x58, 0xc1], DecoderOptions::NONE).decode();
    let mut forms: Vec<(&str, Vec<u8>)> = vec![
        ("fxsave64", vec![0x48, 0x0f, 0xae, 0x03]),
        ("fxrstor64", vec![0x48, 0x0f, 0xae, 0x0b]),
        ("fxsave", vec![0x0f, 0xae, 0x03]),
        ("fxrstor", vec![0x0f, 0xae, 0x0b]),
        ("xsave64", vec![0x48, 0x0f, 0xae, 0x23]),
        ("xrstor64", vec![0x48, 0x0f, 0xae, 0x2b]),
        ("xrstor", vec![0x0f, 0xae, 0x2b]),
    ];
    if has & 2 != 0 {
        forms.push(("xsavec64", vec![0x48, 0x0f, 0xc7, 0x23]));
    }
    let mut faults = 0;
    for case in 0..60_000 {
        let (name, code) = &forms[r.usize(0..forms.len())];
        let mut c = state(&mut r, &add, &mut data);
        // All components are in use: when one counts as initial is the CPU's choice.
        let mut at = 0x840;
        if r.u8(0..16) == 0 {
            at += [8, 16, 32][r.usize(0..3)];
        }
        c.gpr[3] = DATA + at as u64;
        (c.gpr[0], c.gpr[2]) = (r.u64(0..8), 0);
        c.flags &= 0xfff;
        data[at..at + 832].copy_from_slice(&image(&mut r, &c));
        if name.contains("xsave") {
            // The header of an area that was never written.
            data[at + 512..at + 576].fill(0);
            data[at + 512] = r.u8(0..8);
        }
        // SAFETY: the host's data mapping has BYTES bytes.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), host.data, BYTES) };
        m.write(DATA, &data);
        enter(&mut m, &c);
        m.load_code(code);
        let got = m.step().err().map(|t| t.vector);
        let area = m.cpu.export_xsave();
        host.run(code, &mut c);
        let want = (c.trap != 0).then(|| c.trap as u8 - 1);
        assert_eq!(
            got,
            want,
            "{name} case {case}: RFBM {:x} header {:x?}",
            c.gpr[0],
            &data[at + 512..at + 576]
        );
        faults += u32::from(want.is_some());
        if want.is_some() && !host_is_amd() {
            continue;
        }
        assert_eq!(m.cpu.vec.mxcsr, c.mxcsr, "{name} case {case}");
        for n in 0..16 {
            assert_eq!(m.cpu.vec.ymm[n].0, c.ymm[n], "{name} case {case}: YMM{n}");
        }
        assert_eq!(x87(&area), x87(&c.fx), "{name} case {case}");
        let guest = m.read(DATA, BYTES);
        // SAFETY: as above.
        let mut native = unsafe { std::slice::from_raw_parts(host.data, BYTES) }.to_vec();
        if name.contains("save") {
            // Pointers and MXCSR_MASK are the engine's own.
            native[at + 6..at + 24].copy_from_slice(&guest[at + 6..at + 24]);
            native[at + 28..at + 32].copy_from_slice(&guest[at + 28..at + 32]);
        }
        let first = guest.iter().zip(&native).position(|(a, b)| a != b);
        let around = first.map(|n| (n - at, guest[n], native[n]));
        assert_eq!(first, None, "{name} case {case}: {around:x?}, RFBM {:x}", c.gpr[0]);
        data.copy_from_slice(&native);
    }
    assert!(faults > 1000, "only {faults} faults");
}

#[test]
fn engine_and_host_agree() {
    let number =
        |name: &str, default: u64| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default);
    if !std::arch::is_x86_feature_detected!("avx2") {
        return;
    }
    let cases = number("RINGFORT_CASES", 150_000);
    let mut r = Rng::with_seed(number("RINGFORT_SEED", 1));
    // First the test's own handlers: the engine's chain to them.
    let mut host = host();
    let mut m = Machine::new(TestMode::Long64);
    for page in (DATA + BYTES as u64..DATA + 0x2_0000).step_by(0x1000) {
        m.map(page, 0, 0);
    }
    m.cpu.cr0 |= CR0_AM;
    m.set_user();
    let features = m.cpu.features.clone();
    let mut info = InstructionInfoFactory::new();
    let mut others = [TestMode::Protected32, TestMode::Real].map(|mode| (mode, Machine::new(mode)));
    let mut data = vec![0u8; BYTES];
    let mut before_data = data.clone();
    let mut seen: BTreeMap<String, u64> = BTreeMap::new();
    let mut failed: BTreeMap<String, (u64, String)> = BTreeMap::new();
    let (mut done, mut trapped) = (0u64, [0u64; 32]);
    while done < cases {
        let b = bytes(&mut r);
        let i = Decoder::new(64, &b, DecoderOptions::NONE).decode();
        if !wanted(&i, &mut info) || !features.allows(&i) {
            continue;
        }
        done += 1;
        let b = &b[..i.len()];
        *seen.entry(format!("{:?}", i.code())).or_default() += 1;
        let mut c = state(&mut r, &i, &mut data);
        before_data.copy_from_slice(&data);
        // SAFETY: the host's data mapping has BYTES bytes.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), host.data, BYTES) };
        m.write(DATA, &data);
        enter(&mut m, &c);
        m.load_code(b);
        let mut got = m.step().err().map(|t| (t.vector, t.address));
        // Before the host's turn: the guest's x87 registers are in the host's own until then.
        let area = m.cpu.export_xsave();
        let start = c.clone();
        host.run(b, &mut c);
        let want = (c.trap != 0).then(|| (c.trap as u8 - 1, if c.trap == 15 { c.cr2 } else { 0 }));
        trapped[want.map_or(31, |w| usize::from(w.0) & 31)] += 1;
        // The faulting page counts; which byte of a crossing access is named is the hardware's choice.
        let page = |t: &mut Option<(u8, u64)>| {
            if let Some(t) = t {
                t.1 &= !0xfff
            }
        };
        let mut want_page = want;
        page(&mut got);
        page(&mut want_page);
        // What is left behind by a fault, and which of several comes first, is each maker's own; the engine does as AMD's CPUs.
        if !host_is_amd() && (want.is_some() || got.is_some()) {
            // SAFETY: as above.
            data.copy_from_slice(unsafe { std::slice::from_raw_parts(host.data, BYTES) });
            continue;
        }
        let mut problems = Vec::new();
        if done % 8 == 0 {
            problems = other_modes(&mut others, b, &i, &start, &before_data, &mut m, got.map(|t| t.0));
        }
        if got != want_page {
            problems.push(format!("trap: engine {got:x?}, host {want_page:x?}"));
        }
        for n in 0..15 {
            let g = m.cpu.regs[n];
            if g != c.gpr[n] && n != 4 {
                problems.push(format!("GPR {n}: engine {g:#x}, host {:#x}", c.gpr[n]));
            }
        }
        if (m.cpu.rflags() ^ c.flags) & 0x8d5 != 0 {
            problems.push(format!(
                "flags: engine {:#x}, host {:#x}",
                m.cpu.rflags() & 0x8d5,
                c.flags & 0x8d5
            ));
        }
        if m.cpu.vec.mxcsr != c.mxcsr {
            problems.push(format!("MXCSR: engine {:#x}, host {:#x}", m.cpu.vec.mxcsr, c.mxcsr));
        }
        for n in 0..16 {
            if m.cpu.vec.ymm[n].0 != c.ymm[n] {
                problems.push(format!("YMM{n}: engine {:02x?}, host {:02x?}", m.cpu.vec.ymm[n].0, c.ymm[n]));
            }
        }
        if x87(&area) != x87(&c.fx) {
            problems.push(format!("x87: engine {:02x?}, host {:02x?}", x87(&area), x87(&c.fx)));
        }
        let guest_data = m.read(DATA, BYTES);
        // SAFETY: as above.
        let host_data = unsafe { std::slice::from_raw_parts(host.data, BYTES) };
        if guest_data != host_data {
            let at = guest_data.iter().zip(host_data).position(|(a, b)| a != b);
            problems.push(format!("memory differs from {at:x?}"));
        }
        data.copy_from_slice(host_data);
        if !problems.is_empty() {
            let e = failed.entry(format!("{:?}", i.code())).or_insert_with(|| {
                let text = format!(
                    "{b:02x?} case {done}: {problems:#?}\n before: mxcsr {:#x} rbx {:#x} x87 {:02x?}",
                    start.mxcsr,
                    start.gpr[3],
                    x87(&start.fx)
                );
                (0, text)
            });
            e.0 += 1;
        }
    }
    eprintln!("{done} cases, {} encodings; by trap (31: none): {trapped:?}", seen.len());
    for (code, (n, text)) in failed.iter().take(12) {
        eprintln!("{code}: {n} times; {text}");
    }
    assert!(
        failed.is_empty(),
        "{} encodings disagree: {:?}",
        failed.len(),
        failed.keys().collect::<Vec<_>>()
    );
}
