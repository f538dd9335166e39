//! Random instructions of a given `Code`, and states for them to start from.

use super::native::{CODE, DATA, DATA_SIZE, State};
use fastrand::Rng;
use iced_x86::*;

/// Distance from the start of the code to where its branches lead.
pub const BRANCH_TO: u64 = 0x80;

/// How an instruction's memory operand is addressed: the registers that make it point into the data window.
#[derive(Debug, Clone, Copy)]
pub struct Pointer {
    base: Option<usize>,
    index: Option<usize>,
    scale: u64,
    disp: u64,
    narrow: bool,
    size: usize,
}

/// One generated instruction.
#[derive(Debug, Clone)]
pub struct Generated {
    /// It.
    pub instruction: Instruction,
    /// Its encoding.
    pub bytes: Vec<u8>,
    /// Its memory operand, where registers take part.
    pub pointer: Option<Pointer>,
}

const GPR8: [Register; 20] = [
    Register::AL,
    Register::CL,
    Register::DL,
    Register::BL,
    Register::AH,
    Register::CH,
    Register::DH,
    Register::BH,
    Register::SPL,
    Register::BPL,
    Register::SIL,
    Register::DIL,
    Register::R8L,
    Register::R9L,
    Register::R10L,
    Register::R11L,
    Register::R12L,
    Register::R13L,
    Register::R14L,
    Register::R15L,
];

fn reg(first: Register, n: u32) -> Register {
    first + n
}

/// A value that likes to be on an edge.
pub fn value(rng: &mut Rng) -> u64 {
    match rng.u32(0..12) {
        0 => 0,
        1 => 1,
        2 => u64::MAX,
        3 => 1 << rng.u32(0..64),
        4 => (1u64 << rng.u32(0..64)).wrapping_sub(1),
        5 => !(1 << rng.u32(0..64)),
        6 => rng.u64(0..256),
        7 => (rng.i8(..) as i64) as u64,
        8 => u64::from(rng.u32(..)),
        9 => (rng.i32(..) as i64) as u64,
        _ => rng.u64(..),
    }
}

/// 8 bytes of vector or memory content: integers, and floats with all their special values.
pub fn lane(rng: &mut Rng) -> u64 {
    fn f32_bits(rng: &mut Rng) -> u32 {
        match rng.u32(0..12) {
            0 => 0,
            1 => 0x8000_0000,
            2 => 0x7f80_0000 | rng.u32(0..2) << 31,
            3 => 0x7fc0_0000 | rng.u32(..) & 0x803f_ffff,
            4 => 0x7f80_0001 | rng.u32(..) & 0x8000_ffff,
            5 => rng.u32(..) & 0x807f_ffff,
            6 => (rng.i32(-1000..1000) as f32).to_bits(),
            7 => (rng.i32(..) as f32 * 0.5).to_bits(),
            8 => 0x4f00_0000 | rng.u32(..) & 0x8000_0003,
            _ => rng.u32(..),
        }
    }
    fn f64_bits(rng: &mut Rng) -> u64 {
        match rng.u32(0..12) {
            0 => 0,
            1 => 1 << 63,
            2 => 0x7ff0_0000_0000_0000 | rng.u64(0..2) << 63,
            3 => 0x7ff8_0000_0000_0000 | rng.u64(..) & 0x8007_ffff_ffff_ffff,
            4 => 0x7ff0_0000_0000_0001 | rng.u64(..) & 0x8000_0000_ffff_ffff,
            5 => rng.u64(..) & 0x800f_ffff_ffff_ffff,
            6 => f64::from(rng.i32(-1000..1000)).to_bits(),
            7 => (rng.i64(..) as f64 * 0.5).to_bits(),
            8 => 0x41e0_0000_0000_0000 | rng.u64(..) & 0x8020_0000_0000_0003,
            _ => rng.u64(..),
        }
    }
    match rng.u32(0..4) {
        0 => u64::from(f32_bits(rng)) | u64::from(f32_bits(rng)) << 32,
        1 => f64_bits(rng),
        _ => value(rng),
    }
}

/// An 80-bit x87 value.
fn extended(rng: &mut Rng) -> [u8; 10] {
    let sign = rng.u16(0..2) << 15;
    let (exp, frac) = match rng.u32(0..10) {
        0 => (0, 0),
        1 => (0x7fff, 1 << 63),
        2 => (0x7fff, 3 << 62 | rng.u64(..) >> 2),
        3 => (0x7fff, 1 << 63 | rng.u64(1..1 << 40)),
        4 => (0, rng.u64(..) >> 1),
        5 => (rng.u16(1..0x7fff), rng.u64(..) >> 1), // unsupported
        6 => (0x3fff + rng.u16(0..64), 1 << 63 | rng.u64(..) << 32),
        7 => (0x3fff - rng.u16(0..16), 1 << 63),
        _ => (0x3fff - 70 + rng.u16(0..140), 1 << 63 | rng.u64(..)),
    };
    let mut b = [0; 10];
    b[..8].copy_from_slice(&frac.to_le_bytes());
    b[8..].copy_from_slice(&(exp | sign).to_le_bytes());
    b
}

/// A random instruction of `code`; `None` if this attempt has no encoding.
pub fn instruction(code: Code, rng: &mut Rng, at: u64) -> Option<Generated> {
    instruction_for(64, code, rng, at)
}

/// As [`instruction`], for code of another width (16 or 32 bits).
pub fn instruction_for(bits: u32, code: Code, rng: &mut Rng, at: u64) -> Option<Generated> {
    let info = code.op_code();
    let mut i = Instruction::new();
    i.set_code(code);
    let mut pointer = None;
    let mut used = Vec::new();
    let vsib = (0..info.op_count()).any(|n| format!("{:?}", info.op_kind(n)).contains("vsib"));
    let narrow = bits != 64 || !vsib && rng.u32(0..16) == 0;
    for n in 0..info.op_count() {
        operand(&mut i, n, info.op_kind(n), rng, at, narrow, &mut pointer, &mut used)?;
    }
    let memory_first = info.op_count() > 0 && i.op0_kind() == OpKind::Memory;
    if info.can_use_lock_prefix() && memory_first && rng.bool() {
        i.set_has_lock_prefix(true);
    }
    if i.is_string_instruction() {
        match rng.u32(0..3) {
            0 if info.can_use_rep_prefix() => i.set_has_repe_prefix(true),
            1 if info.can_use_repne_prefix() || info.can_use_rep_prefix() => i.set_has_repne_prefix(true),
            _ => {}
        }
    }
    let mut e = Encoder::new(bits);
    e.encode(&i, at).ok()?;
    let bytes = e.take_buffer();
    // What comes back is what is executed: lengths, and forms that the encoder normalises.
    let mut d = Decoder::with_ip(bits, &bytes, at, DecoderOptions::AMD);
    let instruction = d.decode();
    if instruction.is_invalid() || d.position() != bytes.len() {
        return None;
    }
    if let Some(p) = &mut pointer {
        let p: &mut Pointer = p;
        p.size = instruction.memory_size().size().max(1);
    }
    Some(Generated { instruction, bytes, pointer })
}

#[allow(clippy::too_many_arguments, reason = "one caller")]
fn operand(
    i: &mut Instruction,
    n: u32,
    kind: OpCodeOperandKind,
    rng: &mut Rng,
    at: u64,
    narrow: bool,
    pointer: &mut Option<Pointer>,
    used: &mut Vec<Register>,
) -> Option<()> {
    use OpCodeOperandKind as K;
    let mem = match kind {
        K::r8_or_mem
        | K::r16_or_mem
        | K::r32_or_mem
        | K::r64_or_mem
        | K::mm_or_mem
        | K::xmm_or_mem
        | K::ymm_or_mem => rng.bool(),
        K::mem | K::mem_offs | K::mem_vsib32x | K::mem_vsib64x | K::mem_vsib32y | K::mem_vsib64y => true,
        _ => false,
    };
    if mem {
        i.set_op_kind(n, OpKind::Memory);
        memory(i, kind, rng, narrow, pointer);
        return Some(());
    }
    let mut pick = |first: Register, count: u32, rng: &mut Rng| {
        let r = reg(first, rng.u32(0..count));
        used.push(r);
        r
    };
    let r = match kind {
        K::r8_or_mem | K::r8_reg | K::r8_opcode => GPR8[rng.usize(0..GPR8.len())],
        K::r16_or_mem | K::r16_reg | K::r16_reg_mem | K::r16_rm | K::r16_opcode => {
            pick(Register::AX, 16, rng)
        }
        K::r32_or_mem | K::r32_reg | K::r32_reg_mem | K::r32_rm | K::r32_opcode | K::r32_vvvv => {
            pick(Register::EAX, 16, rng)
        }
        K::r64_or_mem | K::r64_reg | K::r64_reg_mem | K::r64_rm | K::r64_opcode | K::r64_vvvv => {
            pick(Register::RAX, 16, rng)
        }
        K::mm_or_mem | K::mm_reg | K::mm_rm => pick(Register::MM0, 8, rng),
        K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 => pick(Register::XMM0, 16, rng),
        K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 => pick(Register::YMM0, 16, rng),
        K::al => Register::AL,
        K::cl => Register::CL,
        K::ax => Register::AX,
        K::dx => Register::DX,
        K::eax => Register::EAX,
        K::rax => Register::RAX,
        K::es => Register::ES,
        K::cs => Register::CS,
        K::ss => Register::SS,
        K::ds => Register::DS,
        K::fs => Register::FS,
        K::gs => Register::GS,
        K::seg_reg => pick([Register::ES, Register::DS, Register::SS][rng.usize(0..3)], 1, rng),
        K::cr_reg => pick(Register::CR0, 1, rng),
        K::dr_reg => pick(Register::DR6, 1, rng),
        K::st0 => Register::ST0,
        K::sti_opcode => pick(Register::ST0, 8, rng),
        _ => Register::None,
    };
    if r != Register::None {
        i.set_op_kind(n, OpKind::Register);
        i.set_op_register(n, r);
        return Some(());
    }
    let v = value(rng);
    match kind {
        K::imm8 | K::imm8_const_1 => {
            let v = match kind {
                K::imm8_const_1 => 1,
                // ENTER's nesting level.
                _ if n == 1 && i.op0_kind() == OpKind::Immediate16 => {
                    i.set_op_kind(n, OpKind::Immediate8_2nd);
                    i.set_immediate8_2nd(rng.u8(..) & 0x67);
                    return Some(());
                }
                _ => rng.u8(..),
            };
            i.set_op_kind(n, OpKind::Immediate8);
            i.set_immediate8(v);
        }
        K::imm8sex16 => {
            i.set_op_kind(n, OpKind::Immediate8to16);
            i.set_immediate8to16(v as i8 as i16);
        }
        K::imm8sex32 => {
            i.set_op_kind(n, OpKind::Immediate8to32);
            i.set_immediate8to32(v as i8 as i32);
        }
        K::imm8sex64 => {
            i.set_op_kind(n, OpKind::Immediate8to64);
            i.set_immediate8to64(v as i8 as i64);
        }
        K::imm16 => {
            i.set_op_kind(n, OpKind::Immediate16);
            i.set_immediate16(v as u16 & if i.mnemonic() == Mnemonic::Enter { 0x3ff } else { 0xffff });
        }
        K::imm32 => {
            i.set_op_kind(n, OpKind::Immediate32);
            i.set_immediate32(v as u32);
        }
        K::imm32sex64 => {
            i.set_op_kind(n, OpKind::Immediate32to64);
            i.set_immediate32to64(v as i32 as i64);
        }
        K::imm64 => {
            i.set_op_kind(n, OpKind::Immediate64);
            i.set_immediate64(v);
        }
        K::seg_rSI => i.set_op_kind(n, if narrow { OpKind::MemorySegESI } else { OpKind::MemorySegRSI }),
        K::es_rDI => i.set_op_kind(n, if narrow { OpKind::MemoryESEDI } else { OpKind::MemoryESRDI }),
        K::seg_rDI => i.set_op_kind(n, if narrow { OpKind::MemorySegEDI } else { OpKind::MemorySegRDI }),
        K::seg_rBX_al => {
            i.set_op_kind(n, OpKind::Memory);
            i.set_memory_base(if narrow { Register::EBX } else { Register::RBX });
            i.set_memory_index(Register::AL);
        }
        K::br16_1 | K::br16_2 => {
            i.set_op_kind(n, OpKind::NearBranch16);
            i.set_near_branch16((at + BRANCH_TO) as u16);
        }
        K::br32_1 | K::br32_4 => {
            i.set_op_kind(n, OpKind::NearBranch32);
            i.set_near_branch32((at + BRANCH_TO) as u32);
        }
        K::farbr2_2 => {
            i.set_op_kind(n, OpKind::FarBranch16);
            i.set_far_branch16(v as u16);
        }
        K::farbr4_2 => {
            i.set_op_kind(n, OpKind::FarBranch32);
            i.set_far_branch32(v as u32);
        }
        K::br64_1 | K::br64_4 => {
            i.set_op_kind(n, OpKind::NearBranch64);
            i.set_near_branch64(at + BRANCH_TO);
        }
        _ => return None,
    }
    Some(())
}

fn memory(
    i: &mut Instruction,
    kind: OpCodeOperandKind,
    rng: &mut Rng,
    narrow: bool,
    pointer: &mut Option<Pointer>,
) {
    use OpCodeOperandKind as K;
    let inside = (DATA + rng.u64(64..DATA_SIZE as u64 - 64)) & !rng.u64(0..64);
    if kind == K::mem_offs {
        i.set_memory_displ_size(if narrow { 4 } else { 8 });
        i.set_memory_displacement64(inside);
        return;
    }
    let vector_index = match kind {
        K::mem_vsib32x | K::mem_vsib64x => Some(Register::XMM0),
        K::mem_vsib32y | K::mem_vsib64y => Some(Register::YMM0),
        _ => None,
    };
    let first = if narrow { Register::EAX } else { Register::RAX };
    let full = if narrow { 4 } else { 8 };
    let form = if vector_index.is_some() { 3 } else { rng.u32(0..8) };
    match form {
        0 => {
            i.set_memory_displ_size(full);
            i.set_memory_displacement64(inside);
            return;
        }
        1 => {
            i.set_memory_base(if narrow { Register::EIP } else { Register::RIP });
            i.set_memory_displ_size(full);
            i.set_memory_displacement64(inside);
            return;
        }
        _ => {}
    }
    let base = rng.u32(0..16);
    i.set_memory_base(reg(first, base));
    let mut p = Pointer { base: Some(base as usize), index: None, scale: 1, disp: 0, narrow, size: 1 };
    if let Some(v) = vector_index {
        i.set_memory_index(reg(v, rng.u32(0..16)));
        i.set_memory_index_scale(1 << rng.u32(0..4));
    } else if form >= 5 {
        let index = rng.u32(0..16);
        if index != 4 && index != base {
            p.scale = 1 << rng.u32(0..4);
            i.set_memory_index(reg(first, index));
            i.set_memory_index_scale(p.scale as u32);
            p.index = Some(index as usize);
        }
    }
    let disp = match rng.u32(0..3) {
        0 => 0,
        1 => i64::from(rng.i8(..)),
        _ => i64::from(rng.i32(..)),
    };
    p.disp = disp as u64;
    let size = match disp {
        0 if base & 7 != 5 => 0,
        -128..=127 => 1,
        _ => full,
    };
    i.set_memory_displ_size(size);
    i.set_memory_displacement64(if narrow { disp as u32 as u64 } else { disp as u64 });
    *pointer = Some(p);
}

/// An address in the data window for an access of `size` bytes; now and then one at its edge or far outside.
fn address(rng: &mut Rng, size: usize) -> u64 {
    let size = size as u64;
    match rng.u32(0..64) {
        0 => DATA - rng.u64(0..size + 1),
        1 => DATA + DATA_SIZE as u64 - rng.u64(0..size + 1),
        2 => rng.u64(1 << 47..1 << 63),
        3..8 => (DATA + 0x1000 * rng.u64(1..4)).wrapping_sub(rng.u64(0..size + 1)),
        n => {
            let a = DATA + rng.u64(0x400..DATA_SIZE as u64 - 0x400);
            if n < 32 { a & !63 } else { a }
        }
    }
}

/// A random state for `g` to start from; `data` is the memory that it will find.
pub fn state(g: &Generated, rng: &mut Rng, data: &mut [u8]) -> State {
    let mut s = any_state(rng);
    aim(g, rng, &mut s, data);
    s
}

/// A random state; RSP points into the window.
pub fn any_state(rng: &mut Rng) -> State {
    let mut s = State::default();
    s.gpr.fill_with(|| value(rng));
    s.gpr[4] = DATA + (rng.u64(0x800..DATA_SIZE as u64 - 0x800) & !7);
    // Arithmetic flags and DF.
    s.flags = rng.u64(..) & 0xcd5 | 2;
    for v in &mut s.ymm {
        for l in v.chunks_exact_mut(8) {
            l.copy_from_slice(&lane(rng).to_le_bytes());
        }
    }
    let same = rng.usize(0..16);
    s.ymm[rng.usize(0..16)] = s.ymm[same];
    let fx = &mut s.fx.0;
    // Control word: precision, rounding, masks; status: TOP and condition codes.
    let masks = if rng.u32(0..4) == 0 { rng.u16(0..64) } else { 0x3f };
    let fcw = 0x40 | masks | rng.u16(0..4) << 10 | [0, 2, 3][rng.usize(0..3)] << 8;
    fx[0..2].copy_from_slice(&fcw.to_le_bytes());
    let fsw = rng.u16(0..8) << 11 | rng.u16(..) & 0x4700;
    fx[2..4].copy_from_slice(&fsw.to_le_bytes());
    fx[4] = if rng.u32(0..4) == 0 { rng.u8(..) } else { 0xff };
    for n in 0..8 {
        fx[32 + n * 16..42 + n * 16].copy_from_slice(&extended(rng));
    }
    let mx_masks = if rng.u32(0..8) == 0 { rng.u32(0..64) << 7 } else { 0x1f80 };
    let mxcsr = mx_masks
        | rng.u32(0..64) & rng.u32(0..64)
        | rng.u32(0..4) << 13
        | if rng.u32(0..4) == 0 { 0x8040 } else { 0 };
    fx[24..28].copy_from_slice(&mxcsr.to_le_bytes());
    s
}

/// Point the registers that `g` addresses memory with into the window.
pub fn aim(g: &Generated, rng: &mut Rng, s: &mut State, data: &mut [u8]) {
    let i = &g.instruction;
    let wide =
        |v: u64, rng: &mut Rng, narrow: bool| if narrow { v & 0xffff_ffff | value(rng) << 32 } else { v };
    let narrow_string = (0..i.op_count())
        .any(|n| matches!(i.op_kind(n), OpKind::MemorySegESI | OpKind::MemoryESEDI | OpKind::MemorySegEDI));
    if i.is_string_instruction()
        || matches!(i.mnemonic(), Mnemonic::Maskmovq | Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu)
    {
        for r in [6, 7] {
            s.gpr[r] = wide(address(rng, 16), rng, narrow_string);
        }
        if rng.u32(0..3) == 0 {
            // Close together: overlapping copies.
            s.gpr[7] = s.gpr[6].wrapping_add(rng.u64(0..64)).wrapping_sub(32);
        }
        let most = if rng.u32(0..8) == 0 { 2000 } else { 20 };
        let count = rng.u64(0..most);
        s.gpr[1] = wide(count, rng, narrow_string);
        if rng.bool() {
            let n = rng.usize(0..DATA_SIZE - 600);
            let b = s.gpr[0] as u8;
            data[n..n + 600].fill(b);
        }
    }
    match i.mnemonic() {
        Mnemonic::Xlatb => {
            s.gpr[3] =
                wide(address(rng, 1).wrapping_sub(s.gpr[0] & 0xff), rng, i.memory_base() == Register::EBX);
        }
        Mnemonic::Clzero => s.gpr[0] = wide(address(rng, 64), rng, i.code() == Code::Clzerod),
        Mnemonic::Movdir64b => {
            let r = i.op0_register();
            s.gpr[r.number()] = wide(address(rng, 64) & !(63 * rng.u64(0..2)), rng, r.size() == 4);
        }
        Mnemonic::Enter | Mnemonic::Leave => s.gpr[5] = address(rng, 8),
        Mnemonic::Loop
        | Mnemonic::Loope
        | Mnemonic::Loopne
        | Mnemonic::Jcxz
        | Mnemonic::Jecxz
        | Mnemonic::Jrcxz => {
            s.gpr[1] = value(rng) & rng.u64(0..4) | if rng.bool() { value(rng) << 32 } else { 0 };
        }
        Mnemonic::Div | Mnemonic::Idiv if rng.u32(0..4) != 0 => {
            // A high half that leaves a quotient more often than not.
            s.gpr[2] = match rng.u32(0..3) {
                0 => 0,
                1 => (s.gpr[0] as i64 >> 63) as u64,
                _ => value(rng) & 0xff,
            };
        }
        _ => {}
    }
    let in_window = |a: u64, size: usize| (DATA..=DATA + (DATA_SIZE - size) as u64).contains(&a);
    let mut target = None;
    if let Some(p) = &g.pointer {
        let to = if is_bit_string(i) { DATA + 0x2000 - rng.u64(0..64) } else { address(rng, p.size) };
        if is_bit_string(i) {
            let r = i.op1_register().number();
            s.gpr[r] = rng.i64(-0x8000..0x8000) as u64;
        }
        let index = p.index.map_or(0, |n| s.gpr[n]);
        let base = to.wrapping_sub(index.wrapping_mul(p.scale)).wrapping_sub(p.disp);
        if let Some(b) = p.base {
            s.gpr[b] = wide(base, rng, p.narrow);
        }
        target = Some(to);
    } else if (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory) {
        target = Some(i.memory_displacement64());
    }
    let Some(to) = target else {
        return branch_targets(i, rng, s, data, None);
    };
    // Equality is rare among random values, and some instructions live by it.
    if in_window(to, 16) && rng.bool() {
        let at = (to - DATA) as usize;
        let mut q = [0; 16];
        q.copy_from_slice(&data[at..at + 16]);
        let (low, high) = (u128::from_le_bytes(q) as u64, (u128::from_le_bytes(q) >> 64) as u64);
        let taken = |r: usize| g.pointer.is_some_and(|p| p.base == Some(r) || p.index == Some(r));
        match i.mnemonic() {
            Mnemonic::Cmpxchg if !taken(0) => s.gpr[0] = low,
            Mnemonic::Cmpxchg8b if !taken(0) && !taken(2) => {
                s.gpr[0] = low & 0xffff_ffff | s.gpr[0] << 32;
                s.gpr[2] = low >> 32 | s.gpr[2] << 32;
            }
            Mnemonic::Cmpxchg16b if !taken(0) && !taken(2) => {
                s.gpr[0] = low;
                s.gpr[2] = high;
            }
            _ => {}
        }
    }
    branch_targets(i, rng, s, data, in_window(to, 8).then_some(to));
}

fn is_bit_string(i: &Instruction) -> bool {
    matches!(i.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc)
        && i.op0_kind() == OpKind::Memory
        && i.op1_kind() == OpKind::Register
}

/// Let indirect branches and returns lead to where the code goes on.
fn branch_targets(i: &Instruction, rng: &mut Rng, s: &mut State, data: &mut [u8], operand: Option<u64>) {
    let to = if rng.u32(0..16) == 0 { value(rng) | 1 << 48 } else { CODE + BRANCH_TO };
    if i.mnemonic() == Mnemonic::Ret {
        let at = (s.gpr[4] - DATA) as usize;
        data[at..at + 8].copy_from_slice(&to.to_le_bytes());
    } else if i.is_jmp_near_indirect() || i.is_call_near_indirect() {
        match operand {
            Some(at) => data[(at - DATA) as usize..][..8].copy_from_slice(&to.to_le_bytes()),
            None if i.op0_kind() == OpKind::Register => s.gpr[i.op0_register().number()] = to,
            None => {}
        }
    }
}

/// Whether operands conflict so that the instruction's address would not be what was meant.
pub fn conflicts(g: &Generated) -> bool {
    let Some(p) = &g.pointer else { return false };
    if g.instruction.mnemonic() == Mnemonic::Movdir64b {
        let r = Some(g.instruction.op0_register().number());
        return p.base == r || p.index == r;
    }
    if !is_bit_string(&g.instruction) {
        return false;
    }
    let r = Some(g.instruction.op1_register().number());
    p.base == r || p.index == r
}
