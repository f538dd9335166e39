//! Tests of native execution: what goes wrong must go wrong as on hardware. That results are right is the differential tests' job.

use crate::cpu::gpr::*;
use crate::testing::{Machine, TestMode, layout};
use ringfort_x86::cr::*;

const DATA: u64 = layout::DATA;

fn f32s(v: [f32; 4]) -> [u8; 16] {
    let mut b = [0; 16];
    for (o, x) in b.chunks_exact_mut(4).zip(v) {
        o.copy_from_slice(&x.to_le_bytes());
    }
    b
}

fn machine() -> Machine {
    let mut m = Machine::new(TestMode::Long64);
    m.cpu.regs[RAX] = DATA;
    m
}

fn set_xmm(m: &mut Machine, n: usize, v: [u8; 16]) {
    m.cpu.vec.ymm[n].0[..16].copy_from_slice(&v);
}

fn xmm(m: &Machine, n: usize) -> [u8; 16] {
    let mut v = [0; 16];
    v.copy_from_slice(&m.cpu.vec.ymm[n].0[..16]);
    v
}

#[test]
fn legacy_sse_keeps_upper_halves_and_vex_clears_them() {
    let mut m = machine();
    m.cpu.vec.ymm[9].0 = [7; 32];
    set_xmm(&mut m, 9, f32s([1.0, 2.0, 3.0, 4.0]));
    set_xmm(&mut m, 15, f32s([10.0, 20.0, 30.0, 40.0]));
    m.run_code(&[0x45, 0x0f, 0x58, 0xcf]).expect("addps xmm9, xmm15");
    assert_eq!(xmm(&m, 9), f32s([11.0, 22.0, 33.0, 44.0]));
    assert_eq!(m.cpu.vec.ymm[9].0[16..], [7; 16]);
    m.run_code(&[0xc4, 0x41, 0x30, 0x58, 0xcf]).expect("vaddps xmm9, xmm9, xmm15");
    assert_eq!(xmm(&m, 9), f32s([21.0, 42.0, 63.0, 84.0]));
    assert_eq!(m.cpu.vec.ymm[9].0[16..], [0; 16]);
}

#[test]
fn memory_operands_in_place_across_pages_and_misaligned() {
    let mut m = machine();
    let bytes: Vec<u8> = (1..=16).collect();
    for at in [DATA, DATA + 5, DATA + 0xff8, DATA + 0xfff] {
        m.write(at, &bytes);
        m.cpu.regs[RAX] = at;
        for _ in 0..2 {
            set_xmm(&mut m, 3, [0; 16]);
            m.run_code(&[0xf3, 0x0f, 0x6f, 0x18]).expect("movdqu xmm3, [rax]");
            assert_eq!(xmm(&m, 3)[..], bytes[..]);
        }
        m.cpu.regs[RAX] = at + 0x2000;
        m.run_code(&[0xf3, 0x0f, 0x7f, 0x18]).expect("movdqu [rax], xmm3");
        assert_eq!(m.read(at + 0x2000, 16), bytes);
    }
    m.cpu.regs[RAX] = DATA + 8;
    for code in [[0x0f, 0x28, 0x18], [0x0f, 0x29, 0x18], [0x0f, 0x58, 0x18]] {
        assert_eq!(m.run_code(&code).expect_err("misaligned").vector, 13, "{code:x?}");
    }
    m.run_code(&[0xc5, 0xe0, 0x58, 0x18]).expect("vaddps xmm3, xmm3, [rax] may be misaligned");
    m.run_code(&[0x0f, 0x6f, 0x18]).expect("movq mm3, [rax] may be misaligned");
}

#[test]
fn a_fault_in_the_second_page_stores_nothing() {
    let mut m = machine();
    m.map(DATA + 0x1000, 0, 0);
    m.refresh();
    m.fill(DATA + 0xf00, 0x100, 0xaa);
    m.cpu.regs[RAX] = DATA + 0xff8;
    let f = m.run_code(&[0x0f, 0x11, 0x18]).expect_err("movups [rax], xmm3");
    assert_eq!((f.vector, f.address, f.error), (14, DATA + 0x1000, 2));
    assert_eq!(m.read(DATA + 0xff8, 8), [0xaa; 8]);
    let f = m.run_code(&[0xdb, 0x78, 0x00]).expect_err("fstp tbyte [rax]");
    assert_eq!((f.vector, f.address, f.error), (14, DATA + 0x1000, 2));
    assert_eq!(m.read(DATA + 0xff8, 8), [0xaa; 8]);
    m.cpu.regs[RAX] = DATA + 0xe08;
    m.run_code(&[0x0f, 0xae, 0x00]).expect_err("fxsave at 8 mod 16");
    m.cpu.regs[RAX] = DATA + 0xe10;
    let f = m.run_code(&[0x0f, 0xae, 0x00]).expect_err("fxsave [rax]");
    assert_eq!((f.vector, f.address), (14, DATA + 0x1000));
    assert_eq!(m.read(DATA + 0xe10, 8), [0; 8]);
}

#[test]
fn control_registers_decide_who_may_execute() {
    let addps: &[u8] = &[0x0f, 0x58, 0xc1];
    let vaddps: &[u8] = &[0xc5, 0xf0, 0x58, 0xc2];
    let paddb: &[u8] = &[0x0f, 0xfc, 0xc1];
    let fld1: &[u8] = &[0xd9, 0xe8];
    let fwait: &[u8] = &[0x9b];
    let ok = None;
    let none = [ok; 5];
    let cases: [(u64, u64, u64, [Option<u8>; 5]); 7] = [
        // cr0 bits to set, cr4 bits to clear, xcr0 bits to clear; addps vaddps paddb fld1 fwait
        (0, 0, 0, none),
        (CR0_TS, 0, 0, [Some(7), Some(7), Some(7), Some(7), Some(7)]),
        (CR0_EM, 0, 0, [Some(6), ok, Some(6), Some(7), ok]),
        (0, CR4_OSFXSR, 0, [Some(6), ok, ok, ok, ok]),
        (0, CR4_OSXSAVE, 0, [ok, Some(6), ok, ok, ok]),
        (0, 0, XCR0_AVX, [ok, Some(6), ok, ok, ok]),
        (CR0_EM | CR0_TS, 0, 0, [Some(6), Some(7), Some(6), Some(7), Some(7)]),
    ];
    for (cr0, cr4, xcr0, want) in cases {
        for (code, want) in [addps, vaddps, paddb, fld1, fwait].into_iter().zip(want) {
            let mut m = machine();
            m.cpu.cr0 |= cr0;
            m.cpu.cr4 &= !cr4;
            m.cpu.xcr0 &= !xcr0;
            let got = m.run_code(code).err().map(|t| t.vector);
            assert_eq!(got, want, "cr0 {cr0:x} cr4 {cr4:x} xcr0 {xcr0:x} {code:x?}");
        }
    }
    let mut m = Machine::new(TestMode::Real);
    assert_eq!(m.run_code(&[0xc5, 0xf8, 0x58, 0xc2]).expect_err("VEX in real mode").vector, 6);
    m.run_code(addps).expect("SSE in real mode");
}

#[test]
fn unmasked_simd_exceptions_are_precise() {
    let mut m = machine();
    let one = f32s([1.0, 1.0, 1.0, 1.0]);
    set_xmm(&mut m, 0, one);
    set_xmm(&mut m, 1, f32s([1.0, 0.0, 2.0, 1.0]));
    // All but division by zero masked.
    m.cpu.vec.mxcsr = 0x1f80 & !(1 << 9);
    let divps = [0x0f, 0x5e, 0xc1];
    assert_eq!(m.run_code(&divps).expect_err("divide by zero").vector, 19);
    assert_eq!(xmm(&m, 0), one);
    assert_eq!(m.cpu.vec.mxcsr & 0x3f, 1 << 2);
    m.cpu.cr4 &= !CR4_OSXMMEXCPT;
    assert_eq!(m.run_code(&divps).expect_err("divide by zero").vector, 6);
    m.cpu.vec.mxcsr = 0x1f80;
    m.run_code(&divps).expect("masked");
    assert_eq!(xmm(&m, 0), f32s([1.0, f32::INFINITY, 0.5, 1.0]));
    assert_eq!(m.cpu.vec.mxcsr, 0x1f80 | 1 << 2);
    // Rust code runs with its own masks again.
    let mut host = 0u32;
    // SAFETY: stores MXCSR to a local.
    unsafe { std::arch::asm!("stmxcsr [{0}]", in(reg) &mut host) };
    assert_eq!(host & 0x1f80, 0x1f80);
    // A converting store that faults numerically stores nothing.
    m.cpu.vec.mxcsr = 0x1f80 & !(1 << 12);
    m.cpu.cr4 |= CR4_OSXMMEXCPT;
    m.cpu.vec.ymm[1].0[..4].copy_from_slice(&1.0001f32.to_le_bytes());
    m.fill(DATA, 16, 0x55);
    let f = m.run_code(&[0xc4, 0xe3, 0x79, 0x1d, 0x08, 0x04]).expect_err("vcvtps2ph [rax], xmm1, 4");
    assert_eq!(f.vector, 19);
    assert_eq!(m.read(DATA, 8), [0x55; 8]);
}

#[test]
fn comparisons_set_flags_and_string_compare_its_index() {
    let mut m = machine();
    set_xmm(&mut m, 2, f32s([1.0, 0.0, 0.0, 0.0]));
    set_xmm(&mut m, 3, f32s([2.0, 0.0, 0.0, 0.0]));
    m.run_code(&[0x0f, 0x2f, 0xd3]).expect("comiss xmm2, xmm3");
    assert_eq!(m.cpu.rflags() & 0x8d5, 1);
    m.run_code(&[0x0f, 0x2f, 0xd2]).expect("comiss xmm2, xmm2");
    assert_eq!(m.cpu.rflags() & 0x8d5, 0x40);
    set_xmm(&mut m, 4, *b"needle\0\0haystack");
    set_xmm(&mut m, 5, *b"xxneedle\0\0\0\0\0\0\0\0");
    m.cpu.regs[RCX] = u64::MAX;
    m.run_code(&[0x66, 0x0f, 0x3a, 0x63, 0xe5, 0x0c]).expect("pcmpistri xmm4, xmm5, equal ordered");
    assert_eq!(m.cpu.regs[RCX], 2);
    assert!(m.cpu.cf());
    (m.cpu.regs[RAX], m.cpu.regs[RDX]) = (3, 8);
    m.run_code(&[0x66, 0x0f, 0x3a, 0x60, 0xe5, 0x4c]).expect("pcmpestrm xmm4, xmm5, bytes mask");
    assert_eq!(xmm(&m, 0), [0, 0, 255, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(m.cpu.regs[RAX], 3);
}

#[test]
fn general_registers_go_in_and_out() {
    let mut m = machine();
    m.cpu.regs[R_11] = 0xffff_ffff_8000_0005;
    m.run_code(&[0xf2, 0x45, 0x0f, 0x2a, 0xf3]).expect("cvtsi2sd xmm14, r11d");
    assert_eq!(m.cpu.vec.ymm[14].0[..8], f64::from(i32::MIN + 5).to_le_bytes());
    m.run_code(&[0xf2, 0x4d, 0x0f, 0x2c, 0xde]).expect("cvttsd2si r11, xmm14");
    assert_eq!(m.cpu.regs[R_11], (i64::from(i32::MIN) + 5) as u64);
    m.run_code(&[0x66, 0x45, 0x0f, 0x50, 0xde]).expect("movmskpd r11d, xmm14");
    assert_eq!(m.cpu.regs[R_11], 1);
    m.cpu.regs[RBX] = 0x1234_5678_9abc_def0;
    m.run_code(&[0x66, 0x48, 0x0f, 0x6e, 0xd3, 0x66, 0x48, 0x0f, 0x7e, 0xd5])
        .expect("movq xmm2, rbx; movq rbp, xmm2");
    assert_eq!(m.cpu.regs[RBP], 0x1234_5678_9abc_def0);
    m.run_code(&[0x66, 0x0f, 0x3a, 0x14, 0x10, 0x03]).expect("pextrb [rax], xmm2, 3");
    assert_eq!(m.read(DATA, 2), [0x9a, 0]);
}

const R_11: usize = 11;

#[test]
fn x87_computes_and_remembers_where() {
    let mut m = machine();
    m.write(DATA, &3.5f64.to_le_bytes());
    // fninit; fld qword [rax]; fadd st0, st0; fstp qword [rax+8]
    let code = [0xdb, 0xe3, 0xdd, 0x00, 0xd8, 0xc0, 0xdd, 0x58, 0x08];
    m.run_code(&code).expect("plain x87");
    assert_eq!(m.read(DATA + 8, 8), 7.0f64.to_le_bytes());
    let area = m.cpu.export_xsave();
    assert_eq!(area[..8], [0x7f, 3, 0, 0, 0, 0, 0x58, 5]);
    assert_eq!(area[8..16], (layout::CODE + 6).to_le_bytes());
    assert_eq!(area[16..24], (DATA + 8).to_le_bytes());
}

#[test]
fn pending_x87_errors_surface_at_the_next_waiting_instruction() {
    let mut m = machine();
    m.write(DATA, &0x37bu16.to_le_bytes()); // division by zero unmasked
    // fninit; fldcw [rax]; fld1; fldz; fdivp; fnop-like non-waiting fnstsw ax; fld1
    let setup = [0xdb, 0xe3, 0xd9, 0x28, 0xd9, 0xe8, 0xd9, 0xee, 0xde, 0xf9];
    m.run_code(&setup).expect("the error only becomes pending");
    m.run_code(&[0xdf, 0xe0]).expect("fnstsw ax");
    assert_eq!(m.cpu.regs[RAX] as u16 & 0x80ff, 0x8084);
    m.cpu.regs[RAX] = DATA;
    for waiting in
        [&[0xd9, 0xe8][..], &[0x9b], &[0x0f, 0x77], &[0xd9, 0x00], &[0x0f, 0xfc, 0xc1], &[0xd9, 0x20]]
    {
        assert_eq!(m.run_code(waiting).expect_err("pending").vector, 16, "{waiting:x?}");
    }
    // #MF comes before a fault of the operand.
    m.map(DATA + 0x1000, 0, 0);
    m.refresh();
    m.cpu.regs[RAX] = DATA + 0x1000;
    assert_eq!(m.run_code(&[0xd9, 0x00]).expect_err("pending").vector, 16);
    // With NE clear the line to the interrupt controller is not wired: execution goes on.
    m.cpu.cr0 &= !CR0_NE;
    m.run_code(&[0xd9, 0xe8]).expect("ignored");
    m.cpu.cr0 |= CR0_NE;
    assert_eq!(m.run_code(&[0xd9, 0xe8]).expect_err("still pending").vector, 16);
    m.run_code(&[0xdb, 0xe2, 0xd9, 0xe8]).expect("fnclex; fld1");
}

#[test]
fn an_unmasked_overflow_keeps_a_store_from_happening() {
    for at in [DATA, DATA + 0xffe] {
        let mut m = machine();
        m.cpu.regs[RAX] = at;
        m.cpu.regs[RBX] = DATA + 0x3000;
        m.write(DATA + 0x3000, &1e300f64.to_le_bytes());
        m.write(DATA + 0x3010, &0x377u16.to_le_bytes()); // overflow unmasked
        m.write(DATA + 0x3018, &0x35fu16.to_le_bytes()); // precision unmasked
        m.fill(at, 4, 0x5a);
        // fninit; fldcw [rbx+16]; fld qword [rbx]; fstp dword [rax]
        m.run_code(&[0xdb, 0xe3, 0xd9, 0x6b, 0x10, 0xdd, 0x03, 0xd9, 0x18]).expect("pending only");
        assert_eq!(m.read(at, 4), [0x5a; 4]);
        // fninit; fldcw [rbx+24]; fldpi; fstp dword [rax]: precision is reported after the store
        m.run_code(&[0xdb, 0xe3, 0xd9, 0x6b, 0x18, 0xd9, 0xeb, 0xd9, 0x18]).expect("pending only");
        assert_eq!(m.read(at, 4), std::f32::consts::PI.to_le_bytes());
        assert_eq!(m.run_code(&[0x9b]).expect_err("precision").vector, 16);
    }
}

#[test]
fn two_vcpus_on_one_thread_keep_their_x87_states_apart() {
    let mut a = machine();
    let mut b = machine();
    a.run_code(&[0xdb, 0xe3, 0xd9, 0xe8]).expect("fninit; fld1");
    b.run_code(&[0xdb, 0xe3, 0xd9, 0xeb]).expect("fninit; fldpi");
    a.run_code(&[0xdd, 0x18]).expect("fstp qword [rax]");
    b.run_code(&[0xdd, 0x18]).expect("fstp qword [rax]");
    assert_eq!(a.read(DATA, 8), 1f64.to_le_bytes());
    assert_eq!(b.read(DATA, 8), std::f64::consts::PI.to_le_bytes());
}

#[test]
fn fcmov_and_fcomi_use_rflags() {
    let mut m = machine();
    m.cpu.set_rflags_raw(0x8d7);
    // fninit; fldz; fld1; fcomi st0, st1
    m.run_code(&[0xdb, 0xe3, 0xd9, 0xee, 0xd9, 0xe8, 0xdb, 0xf1]).expect("fcomi");
    assert_eq!(m.cpu.rflags() & 0x45, 0);
    // fcmovb st0, st1 with CF: st0 becomes 0; fistp dword [rax]
    m.cpu.set_cf(true);
    m.run_code(&[0xda, 0xc1, 0xdb, 0x18]).expect("fcmovb");
    assert_eq!(m.read(DATA, 4), [0; 4]);
}

#[test]
fn environment_formats_follow_mode_and_operand_size() {
    let mut m = Machine::new(TestMode::Real);
    m.cpu.seg[3].base = DATA;
    m.cpu.seg[3].selector = (DATA >> 4) as u16;
    // fninit; fld1; fnstenv [0]; fldz; o32 fnstenv [0x20]
    m.run_code(&[0xdb, 0xe3, 0xd9, 0xe8, 0xd9, 0x36, 0, 0]).expect("16-bit real format");
    let e = m.read(DATA, 14);
    assert_eq!(e[..6], [0x7f, 3, 0, 0x38, 0xff, 0x3f]);
    let fip = layout::CODE + 2;
    assert_eq!(e[6..8], (fip as u16).to_le_bytes());
    assert_eq!(e[8..10], ((fip >> 16 << 12) as u16 | 0x1e8).to_le_bytes());
    m.run_code(&[0x66, 0xd9, 0x36, 0x20, 0]).expect("32-bit real format");
    let e = m.read(DATA + 0x20, 28);
    assert_eq!(e[12..16], (fip as u32 & 0xffff).to_le_bytes());
    assert_eq!(e[16..20], ((fip >> 16 << 12) as u32 | 0x1e8).to_le_bytes());
    let mut m = Machine::new(TestMode::Protected32);
    m.cpu.regs[RAX] = DATA;
    // fninit; fld qword [eax]; fnsave [eax+16]; frstor [eax+16]; fstp qword [eax+8]
    m.write(DATA, &2.5f64.to_le_bytes());
    m.run_code(&[0xdb, 0xe3, 0xdd, 0x00, 0xdd, 0x70, 0x10]).expect("save");
    let e = m.read(DATA + 16, 28);
    assert_eq!(e[12..16], (layout::CODE as u32 + 2).to_le_bytes());
    assert_eq!(e[16..20], (0x18u32 | 0x500 << 16).to_le_bytes());
    assert_eq!(e[20..24], (DATA as u32).to_le_bytes());
    assert_eq!(e[24..26], [0x10, 0]);
    m.run_code(&[0xdd, 0x60, 0x10, 0xdd, 0x58, 0x08]).expect("restore");
    assert_eq!(m.read(DATA + 8, 8), 2.5f64.to_le_bytes());
}

/// What the host's own FXSAVE and XSAVE write is what the guest's write, for the same state.
#[test]
fn images_equal_the_hosts() {
    #[repr(align(64))]
    struct Area([u8; 1024]);
    let mut m = machine();
    for n in 0..16 {
        for k in 0..32 {
            m.cpu.vec.ymm[n].0[k] = (n * 37 + k * 11) as u8;
        }
    }
    m.cpu.regs[RDX] = 0;
    // fninit; fldpi; fld1; fldl2e; then saves
    m.run_code(&[0xdb, 0xe3, 0xd9, 0xeb, 0xd9, 0xe8, 0xd9, 0xea]).expect("x87");
    m.fill(DATA, 0x1000, 0xcc);
    m.run_code(&[0x48, 0x0f, 0xae, 0x00]).expect("fxsave64 [rax]");
    m.cpu.regs[RBX] = DATA + 0x400;
    m.fill(DATA + 0x400 + 512, 64, 0);
    m.cpu.regs[RAX] = 7;
    m.run_code(&[0x48, 0x0f, 0xae, 0x23]).expect("xsave64 [rbx]");
    let (fx, xs) = (m.read(DATA, 512), m.read(DATA + 0x400, 832));
    m.cpu.fpu_save();
    let ymm = m.cpu.vec.ymm;
    let mut host = Area([0xcc; 1024]);
    let mut hostx = Area([0xcc; 1024]);
    hostx.0[512..576].fill(0);
    if !std::arch::is_x86_feature_detected!("avx") {
        return;
    }
    // SAFETY: loads the vector registers (declared clobbered) and x87 (given back empty), and saves them to local areas.
    unsafe {
        std::arch::asm!(
            "vmovups ymm0, [{v}]", "vmovups ymm1, [{v}+32]", "vmovups ymm2, [{v}+64]", "vmovups ymm3, [{v}+96]",
            "vmovups ymm4, [{v}+128]", "vmovups ymm5, [{v}+160]", "vmovups ymm6, [{v}+192]", "vmovups ymm7, [{v}+224]",
            "vmovups ymm8, [{v}+256]", "vmovups ymm9, [{v}+288]", "vmovups ymm10, [{v}+320]", "vmovups ymm11, [{v}+352]",
            "vmovups ymm12, [{v}+384]", "vmovups ymm13, [{v}+416]", "vmovups ymm14, [{v}+448]", "vmovups ymm15, [{v}+480]",
            "fninit", "fldpi", "fld1", "fldl2e",
            "fxsave64 [{f}]", "xsave64 [{x}]", "fninit", "vzeroupper",
            v = in(reg) ymm.as_ptr(), f = in(reg) host.0.as_mut_ptr(), x = in(reg) hostx.0.as_mut_ptr(),
            inout("eax") 7 => _, inout("edx") 0 => _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _, out("xmm6") _,
            out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _, out("xmm12") _,
            out("xmm13") _, out("xmm14") _, out("xmm15") _,
        );
    }
    // Bytes 6 to 24 (pointers) and 28 to 32 (mask) differ by design.
    for (guest, host) in [(&fx, &host), (&xs, &hostx)] {
        assert_eq!(guest[..6], host.0[..6]);
        assert_eq!(guest[24..28], host.0[24..28]);
        assert_eq!(guest[32..416], host.0[32..416]);
        assert_eq!(guest[416..512], host.0[416..512], "not written");
    }
    assert_eq!(xs[512..832], hostx.0[512..832]);
    assert_eq!(fx[28..32], 0xffffu32.to_le_bytes());
}

#[test]
fn fxrstor_and_ldmxcsr_refuse_reserved_bits() {
    let mut m = machine();
    m.run_code(&[0x0f, 0xae, 0x00]).expect("fxsave");
    m.write(DATA + 24, &0x1_1f80u32.to_le_bytes());
    assert_eq!(m.run_code(&[0x0f, 0xae, 0x08]).expect_err("fxrstor").vector, 13);
    m.cpu.regs[RAX] = DATA + 24;
    assert_eq!(m.run_code(&[0x0f, 0xae, 0x10]).expect_err("ldmxcsr").vector, 13);
    assert_eq!(m.cpu.vec.mxcsr, 0x1f80);
    m.write(DATA + 24, &0xffbfu32.to_le_bytes());
    m.run_code(&[0x0f, 0xae, 0x10, 0x0f, 0xae, 0x58, 0x08]).expect("ldmxcsr; stmxcsr [rax+8]");
    assert_eq!(m.read(DATA + 32, 4), 0xffbfu32.to_le_bytes());
}

#[test]
fn xsave_tracks_what_is_in_use_and_xrstor_initialises() {
    let mut m = machine();
    let at = DATA + 0x40;
    m.cpu.regs[RBX] = at;
    (m.cpu.regs[RAX], m.cpu.regs[RDX]) = (7, 0);
    m.fill(DATA, 0x1000, 0);
    m.cpu.vec.ymm[3].0[20] = 9;
    m.run_code(&[0x0f, 0xc7, 0x23]).expect("xsavec [rbx]");
    assert_eq!(m.read_u64(at + 512), 4);
    assert_eq!(m.read_u64(at + 520), 1 << 63 | 7);
    assert_eq!(m.read(at, 512), vec![0; 512], "nothing else is in use");
    assert_eq!(m.read(at + 576 + 3 * 16 + 4, 1), [9]);
    m.cpu.vec.ymm[5].0 = [1; 32];
    m.cpu.vec.mxcsr = 0x1fa0;
    m.run_code(&[0x0f, 0xae, 0x2b]).expect("xrstor [rbx], compacted");
    assert_eq!(m.cpu.vec.ymm[5].0, [0; 32]);
    assert_eq!(m.cpu.vec.mxcsr, 0x1f80);
    assert_eq!(m.cpu.vec.ymm[3].0[20], 9);
    m.cpu.regs[RCX] = 1;
    m.run_code(&[0x0f, 0x01, 0xd0]).expect("xgetbv");
    assert_eq!((m.cpu.regs[RAX], m.cpu.regs[RDX]), (4, 0));
    // Malformed headers.
    m.cpu.regs[RAX] = 7;
    for (offset, value) in [(512, 8u64), (520, 1 << 63 | 3), (528, 1), (568, 1)] {
        let old = m.read_u64(at + offset);
        m.write(at + offset, &value.to_le_bytes());
        let f = m.run_code(&[0x0f, 0xae, 0x2b]).expect_err("malformed");
        assert_eq!(f.vector, 13, "{offset}");
        m.write(at + offset, &old.to_le_bytes());
    }
    m.cpu.regs[RBX] = at + 16;
    for code in [[0x0f, 0xae, 0x2b], [0x0f, 0xae, 0x23], [0x0f, 0xae, 0x33], [0x0f, 0xc7, 0x2b]] {
        assert_eq!(m.run_code(&code).expect_err("misaligned").vector, 13);
    }
}

#[test]
fn exported_state_comes_back() {
    let mut a = machine();
    a.run_code(&[0xdb, 0xe3, 0xd9, 0xeb]).expect("fninit; fldpi");
    a.cpu.vec.ymm[11].0 = [0x42; 32];
    a.cpu.vec.mxcsr = 0x7f80;
    let area = a.cpu.export_xsave();
    let mut b = machine();
    b.cpu.import_xsave(&area).expect("own export");
    assert_eq!(b.cpu.export_xsave(), area);
    assert_eq!(b.cpu.vec.mxcsr, 0x7f80);
    b.run_code(&[0xdd, 0x18]).expect("fstp qword [rax]");
    assert_eq!(b.read(DATA, 8), std::f64::consts::PI.to_le_bytes());
    for (at, v) in [(512, 8u8), (520, 1), (27, 1)] {
        let mut bad = area.clone();
        bad[at] = v;
        b.cpu.import_xsave(&bad).expect_err("malformed");
    }
    b.cpu.import_xsave(&area[..575]).expect_err("short");
}

#[test]
fn masked_moves_touch_only_what_the_mask_says() {
    let mut m = machine();
    m.map(DATA + 0x1000, 0, 0);
    m.refresh();
    m.cpu.regs[RAX] = DATA + 0x1000 - 8;
    m.write(DATA + 0xff8, &[1, 2, 3, 4, 5, 6, 7, 8]);
    let mut mask = [0u8; 16];
    mask[3] = 0x80;
    mask[7] = 0x80;
    m.cpu.vec.ymm[2].0 = [0; 32];
    set_xmm(&mut m, 2, mask);
    m.run_code(&[0xc4, 0xe2, 0x69, 0x2c, 0x08]).expect("vmaskmovps xmm1, xmm2, [rax]");
    assert_eq!(xmm(&m, 1), [1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0]);
    set_xmm(&mut m, 1, [0x99; 16]);
    m.run_code(&[0xc4, 0xe2, 0x69, 0x2e, 0x08]).expect("vmaskmovps [rax], xmm2, xmm1");
    assert_eq!(m.read(DATA + 0xff8, 8), [0x99; 8]);
    mask[11] = 0x80;
    set_xmm(&mut m, 2, mask);
    set_xmm(&mut m, 1, [0x77; 16]);
    let f = m.run_code(&[0xc4, 0xe2, 0x69, 0x2e, 0x08]).expect_err("third element");
    assert_eq!((f.vector, f.address), (14, DATA + 0x1000));
    assert_eq!(m.read(DATA + 0xff8, 8), [0x99; 8], "all or none");
    m.cpu.regs[RDI] = DATA + 0xff0;
    m.write(DATA + 0xff8, &[0x99; 8]);
    mask[11] = 0;
    set_xmm(&mut m, 2, mask);
    m.run_code(&[0x66, 0x0f, 0xf7, 0xca]).expect("maskmovdqu xmm1, xmm2");
    assert_eq!(m.read(DATA + 0xff0, 8), [0, 0, 0, 0x77, 0, 0, 0, 0x77]);
    m.cpu.regs[RDI] = DATA + 0xff1;
    assert_eq!(m.run_code(&[0x66, 0x0f, 0xf7, 0xca]).expect_err("maskmovdqu, beyond its mask").vector, 14);
    // movq mm0, [rbx]; pcmpeqd mm1, mm1; maskmovq mm0, mm1
    m.cpu.regs[RBX] = DATA + 0x10;
    m.write(DATA + 0x10, &[8, 7, 6, 5, 4, 3, 2, 1]);
    m.cpu.regs[RDI] = DATA + 0xff8;
    m.run_code(&[0x0f, 0x6f, 0x03, 0x0f, 0x76, 0xc9, 0x0f, 0xf7, 0xc1]).expect("maskmovq");
    assert_eq!(m.read(DATA + 0xff8, 8), [8, 7, 6, 5, 4, 3, 2, 1]);
}

#[test]
fn gathers_complete_up_to_a_fault() {
    let mut m = machine();
    m.map(DATA + 0x1000, 0, 0);
    m.refresh();
    let lanes = |v: [i32; 4]| {
        let mut b = [0; 16];
        for (o, x) in b.chunks_exact_mut(4).zip(v) {
            o.copy_from_slice(&x.to_le_bytes());
        }
        b
    };
    m.cpu.regs[RAX] = DATA + 0x800;
    m.write(DATA + 0x7fc, &0x1111u32.to_le_bytes());
    m.write(DATA + 0x810, &0x2222u32.to_le_bytes());
    m.cpu.vec.ymm[1].0 = [0xee; 32];
    m.cpu.vec.ymm[3].0 = [0xff; 32];
    set_xmm(&mut m, 2, lanes([-1, 4, 0x200, 0]));
    let code = [0xc4, 0xe2, 0x61, 0x90, 0x0c, 0x90]; // vpgatherdd xmm1, [rax+xmm2*4], xmm3
    let f = m.run_code(&code).expect_err("third element");
    assert_eq!((f.vector, f.address), (14, DATA + 0x1000));
    assert_eq!(xmm(&m, 1)[..8], lanes([0x1111, 0x2222, 0, 0])[..8]);
    assert_eq!(xmm(&m, 3), lanes([0, 0, -1, -1]));
    m.map(DATA + 0x1000, DATA + 0x1000, 7);
    m.refresh();
    m.write(DATA + 0x1000, &0x3333u32.to_le_bytes());
    m.write(DATA + 0x800, &0x4444u32.to_le_bytes());
    m.run_code(&code).expect("now complete");
    assert_eq!(xmm(&m, 1), lanes([0x1111, 0x2222, 0x3333, 0x4444]));
    assert_eq!(m.cpu.vec.ymm[1].0[16..], [0; 16]);
    assert_eq!(m.cpu.vec.ymm[3].0, [0; 32]);
    let same = [0xc4, 0xe2, 0x71, 0x90, 0x0c, 0x90];
    assert_eq!(m.run_code(&same).expect_err("mask is the destination").vector, 6);
}

#[test]
fn a_store_to_a_page_of_code_is_seen() {
    let mut m = machine();
    // movups [rax], xmm0, with rax pointing at the next instruction, which becomes PXOR XMM1, XMM1 four times
    let mut pxor = [0; 16];
    pxor.copy_from_slice(&[0x66, 0x0f, 0xef, 0xc9].repeat(4));
    set_xmm(&mut m, 0, pxor);
    let mut code = vec![0x0f, 0x11, 0x00];
    code.extend([0x0f, 0x0b].repeat(8));
    m.cpu.regs[RAX] = layout::CODE + 3;
    m.run_code(&code).expect("the undefined instructions were overwritten");
}

#[test]
fn a_vcpu_moves_between_threads_and_faults_on_each() {
    let setup = [0xdb, 0xe3, 0xd9, 0xeb, 0x0f, 0x57, 0xc0]; // fninit; fldpi; xorps xmm0, xmm0
    let divps = [0x0f, 0x5e, 0xc0];
    let threads: Vec<_> = (0..4)
        .map(|n| {
            let mut m = machine();
            m.run_code(&setup).expect("setup");
            m.cpu.fpu_save();
            std::thread::spawn(move || {
                // A thread that blocks all signals, as vCPU threads may.
                // SAFETY: changes only this thread's mask.
                unsafe {
                    let mut all = std::mem::zeroed();
                    libc::sigfillset(&mut all);
                    libc::pthread_sigmask(libc::SIG_BLOCK, &all, std::ptr::null_mut());
                }
                m.cpu.fpu_load();
                m.cpu.vec.mxcsr = 0x1f00; // invalid operation unmasked
                for _ in 0..200 {
                    assert_eq!(m.run_code(&divps).expect_err("0/0").vector, 19);
                    assert_eq!(m.cpu.vec.mxcsr & 0x3f, 1);
                }
                m.cpu.regs[RAX] = DATA + n * 8;
                m.run_code(&[0xdd, 0x10]).expect("fst qword [rax]");
                m.cpu.fpu_save();
                m
            })
        })
        .collect();
    for (n, t) in threads.into_iter().enumerate() {
        let mut m = t.join().expect("no panic");
        assert_eq!(m.read(DATA + n as u64 * 8, 8), std::f64::consts::PI.to_le_bytes());
        m.cpu.regs[RAX] = DATA;
        m.run_code(&[0xdd, 0x18]).expect("fstp qword [rax], here again");
        assert_eq!(m.read(DATA, 8), std::f64::consts::PI.to_le_bytes());
    }
}

/// The area must hold every stub that a guest can cause to be made.
#[test]
fn all_stubs_fit_their_area() {
    use iced_x86::{Code, EncodingKind, Instruction, OpKind};
    use std::collections::BTreeMap;
    // One sample of each encoding, by decoding what random bytes give; the bound below takes immediates and MMX registers into account.
    let mut r = fastrand::Rng::with_seed(11);
    let mut stubs: BTreeMap<(Code, bool), u64> = BTreeMap::new();
    for _ in 0..1_500_000 {
        let mut b = [0u8; 16];
        r.fill(&mut b);
        match r.u8(0..3) {
            0 => {
                b[0] = [0x66, 0xf2, 0xf3, 0x0f][r.usize(0..4)];
                b[usize::from(b[0] != 0x0f)] = 0x0f;
                let at = 1 + usize::from(b[0] != 0x0f);
                b[at] = [b[at], 0x38, 0x3a, b[at]][r.usize(0..4)];
            }
            _ => {
                b[0] = 0xc4;
                b[1] = b[1] & 0xe0 | r.u8(1..4);
            }
        }
        let i: Instruction = iced_x86::Decoder::new(64, &b, 0).decode();
        let native = i.cpuid_features().iter().all(|&f| super::is_simd(f));
        if !native || i.is_invalid() || !matches!(i.encoding(), EncodingKind::Legacy | EncodingKind::VEX) {
            continue;
        }
        let ops = || (0..i.op_count()).map(|n| i.op_kind(n));
        let memory = ops().any(|k| k == OpKind::Memory);
        let mut each: u64 = 1;
        for n in 0..i.op_count() {
            each *= match i.op_kind(n) {
                OpKind::Immediate8 | OpKind::Immediate8_2nd
                    if i.op_count() > 2 && ops().any(|k| k == OpKind::Immediate8_2nd) =>
                {
                    64
                }
                OpKind::Immediate8 | OpKind::Immediate8_2nd => 256,
                OpKind::Register if i.op_register(n).is_mm() => 8,
                _ => 1,
            };
        }
        stubs.insert((i.code(), memory), each);
    }
    let number: u64 = stubs.values().sum();
    // The longest stub there is: an instruction of 15 bytes with four registers, all implicit operands, flags and MXCSR.
    let longest = 3 + 4 * 9 + 8 + 10 + 8 + 7 + 15 + 14 + 11 + 4 * 9 + 8 + 4 + 3 + 3;
    assert!(stubs.len() > 900, "only {} encodings were found", stubs.len());
    assert!(number * (longest as u64).next_multiple_of(16) < 32 << 20, "{number} stubs");
}
