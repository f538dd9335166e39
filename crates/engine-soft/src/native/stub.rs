//! Native stubs: for one guest encoding, the code that loads its registers, executes it on the host, and stores what it changed.
//!
//! Registers are renamed so that a stub serves every choice of them: operand `k` is XMM/YMM `k+1` or R8+k, and the op says where in
//! [`Cpu`] it lives ([`slots`]); memory is `[RSI]`. MMX and x87 registers stay what they are, because they are live in the host.
//! The number of stubs is thereby bounded by opcodes times immediates, whatever a guest does.
//!
//! Legacy SSE instructions load and store only the low 128 bits, so that the upper halves are kept; VEX instructions store whole YMM
//! registers, whose upper half the host has zeroed.

use super::area::{Area, HOST_MXCSR_AT};
use crate::cpu::{Cpu, Vectors};
use crate::decode::Op;
use iced_x86::{
    Encoder, EncodingKind, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register as R,
};
use std::collections::HashMap;
use std::mem::offset_of;
use std::sync::{Mutex, OnceLock, PoisonError};

/// A stub: 0, or the vector (16, 19) of a numeric exception that kept the instruction from completing.
///
/// Arguments: the vCPU; the memory operand; the op, whose `imm` holds [`slots`].
pub(super) type Stub = unsafe extern "sysv64" fn(*mut Cpu, *mut u8, *const Op) -> u32;

const VEC: usize = offset_of!(Cpu, vec) + offset_of!(Vectors, ymm);
const MXCSR: usize = offset_of!(Cpu, vec) + offset_of!(Vectors, mxcsr);
const ARITH: usize = offset_of!(Cpu, arith);
const SLOTS: usize = offset_of!(Op, imm);
const _: () = assert!(VEC + 16 * 32 <= 0xffff && SLOTS + 8 <= 0x7f);

/// What the process's stubs are kept in.
struct Stubs {
    area: Area,
    known: HashMap<u64, usize>,
    info: InstructionInfoFactory,
}

fn stubs() -> Option<&'static Mutex<Stubs>> {
    static STUBS: OnceLock<Option<Mutex<Stubs>>> = OnceLock::new();
    STUBS
        .get_or_init(|| {
            let area = Area::new().ok()?;
            Some(Mutex::new(Stubs { area, known: HashMap::new(), info: InstructionInfoFactory::new() }))
        })
        .as_ref()
}

/// Whether native code can run here: the host lets the process map executable memory.
pub fn available() -> bool {
    stubs().is_some()
}

/// Where the register operands of `i` live in [`Cpu`]: 16 bits for each of the four operands.
pub(super) fn slots(i: &Instruction) -> u64 {
    let mut all = 0;
    for n in 0..i.op_count().min(4) {
        if i.op_kind(n) == OpKind::Register {
            let r = i.op_register(n);
            let at = if r.is_gpr() {
                r.number() * 8
            } else if r.is_xmm() || r.is_ymm() {
                VEC + r.number() * 32
            } else {
                0
            };
            all |= (at as u64) << (16 * n);
        }
    }
    all
}

/// The stub for a SIMD instruction (not x87), made if need be. `None` if it cannot be had: no executable memory, or nothing that can be
/// executed this way.
pub(super) fn simd(i: &Instruction) -> Option<usize> {
    let mut i = *i;
    if matches!(i.mnemonic(), Mnemonic::Extrq | Mnemonic::Insertq) && i.op_count() > 2 {
        // Only six bits of either immediate count; 65,536 stubs for each would be too many.
        i.set_immediate8(i.immediate8() & 0x3f);
        i.set_immediate8_2nd(i.immediate8_2nd() & 0x3f);
    }
    let i = &i;
    let mut key = i.code() as u64;
    for n in 0..i.op_count() {
        match i.op_kind(n) {
            OpKind::Register if i.op_register(n).is_mm() => {
                key |= (8 | i.op_register(n).number() as u64) << (40 + 4 * n);
            }
            OpKind::Register => {}
            OpKind::Memory => key |= 1 << 32,
            OpKind::Immediate8 => key |= u64::from(i.immediate8()) << 16,
            OpKind::Immediate8_2nd => key |= u64::from(i.immediate8_2nd()) << 24,
            _ => return None,
        }
    }
    get(key, |s| build(i, s))
}

/// The stub for an x87 instruction given by its two opcode bytes; a memory form's ModRM byte has RSI as its base. `flags` if it reads
/// or writes RFLAGS.
pub(super) fn x87(opcode: [u8; 2], flags: bool) -> Option<usize> {
    let key = 1 << 63 | u64::from(opcode[0]) << 8 | u64::from(opcode[1]);
    get(key, |_| {
        let mut c = Vec::with_capacity(32);
        if flags {
            load_flags(&mut c);
        }
        match opcode {
            [0x9b, _] => c.push(0x9b),
            [a, b] if b < 0xc0 => c.extend([a, b & 0x38 | 6]),
            [a, b] => c.extend([a, b]),
        }
        if flags {
            store_flags(&mut c);
        }
        c.extend([0x31, 0xc0, 0xc3]); // xor eax, eax; ret
        Some(c)
    })
}

fn get(key: u64, make: impl FnOnce(&mut Stubs) -> Option<Vec<u8>>) -> Option<usize> {
    let mut s = stubs()?.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(&at) = s.known.get(&key) {
        return Some(at);
    }
    let code = make(&mut s)?;
    let at = s.area.add(&code)?;
    s.known.insert(key, at);
    Some(at)
}

/// Whether results depend on MXCSR or raise numeric exceptions: everything that computes on floating-point numbers (the approximations
/// RCP and RSQRT are not among them).
pub fn uses_mxcsr(i: &Instruction) -> bool {
    let name = format!("{:?}", i.mnemonic()).to_ascii_lowercase();
    let name = name.strip_prefix('v').unwrap_or(&name);
    let fp_suffix = |p: &str| {
        name.strip_prefix(p).is_some_and(|s| ["ps", "pd", "ss", "sd"].iter().any(|f| s.ends_with(f)))
    };
    ["add", "sub", "mul", "div", "sqrt", "min", "max", "cmp", "comi", "ucomi", "round", "dp", "hadd", "hsub"]
        .iter()
        .any(|p| fp_suffix(p))
        || ["cvt", "fmadd", "fmsub", "fnmadd", "fnmsub", "bcstne"].iter().any(|p| name.starts_with(p))
}

fn build(i: &Instruction, s: &mut Stubs) -> Option<Vec<u8>> {
    let vex = i.encoding() != EncodingKind::Legacy;
    let mut native = *i;
    let mut regs = Vec::new();
    for n in 0..i.op_count() {
        match i.op_kind(n) {
            OpKind::Register => {
                let r = i.op_register(n);
                let to = if r.is_xmm() {
                    R::XMM1 + n
                } else if r.is_ymm() {
                    R::YMM1 + n
                } else if r.is_gpr32() {
                    R::R8D + n
                } else if r.is_gpr64() {
                    R::R8 + n
                } else if r.is_mm() {
                    continue;
                } else {
                    return None;
                };
                native.set_op_register(n, to);
                regs.push((n, to));
            }
            OpKind::Memory => {
                native.set_memory_base(R::RSI);
                native.set_memory_index(R::None);
                native.set_memory_index_scale(1);
                native.set_memory_displacement64(0);
                native.set_memory_displ_size(0);
                native.set_segment_prefix(R::None);
            }
            _ => {}
        }
    }
    let info = s.info.info(&native);
    let access: Vec<OpAccess> = (0..5).map(|n| info.op_access(n)).collect();
    let implicit = |r: R, write: bool| {
        info.used_registers().iter().any(|u| {
            u.register().full_register() == r.full_register()
                && match u.access() {
                    OpAccess::Read | OpAccess::CondRead => !write,
                    OpAccess::Write | OpAccess::CondWrite => write,
                    OpAccess::ReadWrite | OpAccess::ReadCondWrite => true,
                    _ => false,
                }
        })
    };
    let writes = |n: u32| {
        use OpAccess as A;
        matches!(access[n as usize], A::Write | A::CondWrite | A::ReadWrite | A::ReadCondWrite)
    };
    let fp = uses_mxcsr(i);
    let flags = native.rflags_modified() != 0;

    let mut c = Vec::with_capacity(128);
    c.extend([0x49, 0x89, 0xd3]); // mov r11, rdx
    for &(n, r) in &regs {
        // iced calls the destination of INSERTQ only written, but bits around the field are kept.
        if access[n as usize] == OpAccess::Write && !r.is_gpr() && i.mnemonic() != Mnemonic::Insertq {
            continue;
        }
        // movzx eax, word [r11 + slot]
        c.extend([0x41, 0x0f, 0xb7, 0x43, SLOTS as u8 + 2 * n as u8]);
        move_operand(&mut c, n, r, vex, false);
    }
    if implicit(R::XMM0, false) {
        c.extend([0x0f, 0x28, 0x87]); // movaps xmm0, [rdi + vec]
        c.extend((VEC as u32).to_le_bytes());
    }
    if flags {
        load_flags(&mut c);
    }
    if implicit(R::RDX, false) {
        c.extend([0x48, 0x8b, 0x47, 0]); // mov rax, [rdi + RAX]
        c.extend([0x48, 0x8b, 0x57, 16]); // mov rdx, [rdi + RDX]
    }
    if fp {
        c.extend([0x0f, 0xae, 0x97]); // ldmxcsr [rdi + mxcsr]
        c.extend((MXCSR as u32).to_le_bytes());
    }
    let mut encoder = Encoder::new(64);
    encoder.encode(&native, 0).ok()?;
    c.extend(encoder.take_buffer());
    if fp {
        c.extend([0x0f, 0xae, 0x9f]); // stmxcsr [rdi + mxcsr]
        c.extend((MXCSR as u32).to_le_bytes());
        load_host_mxcsr(&mut c, s.area.next(), s.area.address(HOST_MXCSR_AT));
    }
    if flags {
        store_flags(&mut c);
    }
    for &(n, r) in regs.iter().filter(|(n, _)| writes(*n)) {
        c.extend([0x41, 0x0f, 0xb7, 0x43, SLOTS as u8 + 2 * n as u8]);
        move_operand(&mut c, n, r, vex, true);
    }
    if implicit(R::XMM0, true) {
        if vex {
            c.extend([0xc5, 0xfc, 0x29, 0x87]); // vmovaps [rdi + vec], ymm0
        } else {
            c.extend([0x0f, 0x29, 0x87]); // movaps [rdi + vec], xmm0
        }
        c.extend((VEC as u32).to_le_bytes());
    }
    if implicit(R::RCX, true) {
        c.extend([0x48, 0x89, 0x4f, 8]); // mov [rdi + RCX], rcx
    }
    if vex {
        c.extend([0xc5, 0xf8, 0x77]); // vzeroupper
    }
    c.extend([0x31, 0xc0, 0xc3]); // xor eax, eax; ret
    Some(c)
}

/// Move operand `n`, which is register `r`, from or to `[rdi + rax]`.
fn move_operand(c: &mut Vec<u8>, n: u32, r: R, vex: bool, store: bool) {
    let dir = u8::from(store);
    let n = n as u8;
    if r.is_gpr() {
        // A 32-bit result has zeroed the upper half of the host's register, as the guest's shall be.
        c.extend([0x4c, if store { 0x89 } else { 0x8b }, n << 3 | 4, 0x07]);
    } else if vex && (r.is_ymm() || store) {
        c.extend([0xc5, 0xfc, 0x28 | dir, (n + 1) << 3 | 4, 0x07]);
    } else if vex {
        c.extend([0xc5, 0xf8, 0x28 | dir, (n + 1) << 3 | 4, 0x07]);
    } else {
        c.extend([0x0f, 0x28 | dir, (n + 1) << 3 | 4, 0x07]);
    }
}

/// RFLAGS from [`Cpu::arith`]; changes RAX.
fn load_flags(c: &mut Vec<u8>) {
    c.extend([0x0f, 0xb7, 0x87]); // movzx eax, word [rdi + arith]
    c.extend((ARITH as u32).to_le_bytes());
    c.extend([0x04, 0x7f, 0x9e]); // add al, 0x7f (OF if it was 1); sahf
}

/// RFLAGS to [`Cpu::arith`]; changes RAX.
fn store_flags(c: &mut Vec<u8>) {
    c.extend([0x9f, 0x0f, 0x90, 0xc0]); // lahf; seto al
    c.extend([0x66, 0x89, 0x87]); // mov [rdi + arith], ax
    c.extend((ARITH as u32).to_le_bytes());
}

/// `ldmxcsr [rip + host's]`, in a stub that begins at `start`.
fn load_host_mxcsr(c: &mut Vec<u8>, start: usize, value_at: usize) {
    c.extend([0x0f, 0xae, 0x15]);
    let distance = value_at.wrapping_sub(start + c.len() + 4) as u32;
    c.extend(distance.to_le_bytes());
}

/// Where a stub continues after a numeric exception: EAX is its result. After #XM the guest's MXCSR, with the flags that the host set, is
/// the one in force.
pub(super) fn fault_exit(start: usize, after_xm: bool, host_mxcsr: usize) -> Vec<u8> {
    let mut c = Vec::new();
    if after_xm {
        c.extend([0x0f, 0xae, 0x9f]);
        c.extend((MXCSR as u32).to_le_bytes());
    }
    load_host_mxcsr(&mut c, start, host_mxcsr);
    if std::arch::is_x86_feature_detected!("avx") {
        c.extend([0xc5, 0xf8, 0x77]);
    }
    c.push(0xc3);
    c
}
