//! Random programs: blocks of integer instructions joined by jumps, loops, calls, returns and stack traffic, across page ends, with memory
//! operands that sometimes fault half-way through.

use super::generate;
use super::native::{CODE, CODE_SIZE, DATA, DATA_SIZE, State};
use fastrand::Rng;
use iced_x86::code_asm::{CodeAssembler, CodeLabel, r14d};
use iced_x86::{Code, Encoder, Instruction, Mnemonic as M, OpKind, Register};

/// Registers that keep pointing into the data window; instructions must not write them. R14 counts jumps back.
const POINTERS: [Register; 4] = [Register::RBX, Register::R12, Register::R8, Register::R13];
const KEPT: [Register; 6] =
    [Register::RBX, Register::R12, Register::R8, Register::R13, Register::R14, Register::RSP];
/// A masked index: below 64.
const INDEX: Register = Register::R15;

/// A program, and where it begins in the code window.
pub struct Program {
    /// It.
    pub bytes: Vec<u8>,
    /// Its first byte's distance from the window's start.
    pub at: usize,
}

/// Whether the instruction may change a register that must stay as it is.
fn spoils(i: &Instruction, info: &mut iced_x86::InstructionInfoFactory) -> bool {
    info.info(i).used_registers().iter().any(|u| {
        let writes = !matches!(
            u.access(),
            iced_x86::OpAccess::None
                | iced_x86::OpAccess::Read
                | iced_x86::OpAccess::CondRead
                | iced_x86::OpAccess::NoMemAccess
        );
        let full = u.register().full_register();
        writes && (KEPT.contains(&full) || full == INDEX)
    })
}

/// A random instruction whose memory operand, if it has one, lies near the pointers.
fn instruction(
    codes: &[Code],
    rng: &mut Rng,
    segments: bool,
    offers: &dyn Fn(&Instruction) -> bool,
) -> Instruction {
    let mut info = iced_x86::InstructionInfoFactory::new();
    loop {
        let code = codes[rng.usize(0..codes.len())];
        let Some(g) = generate::instruction(code, rng, CODE) else { continue };
        let mut i = g.instruction;
        if i.is_string_instruction()
            || i.is_stack_instruction()
            || !offers(&i)
            || i.has_lock_prefix() && rng.bool()
        {
            continue;
        }
        if matches!(
            i.mnemonic(),
            M::Xlatb | M::Clzero | M::Movdir64b | M::Maskmovq | M::Maskmovdqu | M::Enter | M::Leave
        ) {
            continue;
        }
        if (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory) && !moffs(&i) {
            i.set_memory_base(POINTERS[rng.usize(0..POINTERS.len())]);
            let indexed = rng.u32(0..3) == 0;
            i.set_memory_index(if indexed { INDEX } else { Register::None });
            i.set_memory_index_scale(if indexed { 1 << rng.u32(0..4) } else { 1 });
            let d = match rng.u32(0..64) {
                // Beyond the window, from any of the pointers.
                0 => 0x5000,
                1..10 => rng.i32(-8..9),
                _ => rng.i32(-0x3f0..0x3f0),
            };
            i.set_memory_displ_size(8);
            i.set_memory_displacement64(i64::from(d) as u64);
            if segments && rng.bool() {
                i.set_segment_prefix([Register::FS, Register::GS][rng.usize(0..2)]);
            }
            if rng.u32(0..16) == 0 {
                let full = i.memory_base().number() as u32;
                i.set_memory_base(Register::EAX + full);
                if indexed {
                    i.set_memory_index(Register::R15D);
                }
            }
            // A bit string's index would lead anywhere.
            if matches!(i.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc) && i.op1_kind() == OpKind::Register {
                continue;
            }
        }
        if spoils(&i, &mut info) || Encoder::new(64).encode(&i, CODE).is_err() {
            continue;
        }
        return i;
    }
}

fn moffs(i: &Instruction) -> bool {
    (0..i.op_code().op_count()).any(|n| i.op_code().op_kind(n) == iced_x86::OpCodeOperandKind::mem_offs)
        || i.is_ip_rel_memory_operand()
}

fn branch(a: &mut CodeAssembler, rng: &mut Rng, to: CodeLabel) -> Result<(), iced_x86::IcedError> {
    type J = fn(&mut CodeAssembler, CodeLabel) -> Result<(), iced_x86::IcedError>;
    let all: [J; 16] = [
        CodeAssembler::jo,
        CodeAssembler::jno,
        CodeAssembler::jb,
        CodeAssembler::jae,
        CodeAssembler::je,
        CodeAssembler::jne,
        CodeAssembler::jbe,
        CodeAssembler::ja,
        CodeAssembler::js,
        CodeAssembler::jns,
        CodeAssembler::jp,
        CodeAssembler::jnp,
        CodeAssembler::jl,
        CodeAssembler::jge,
        CodeAssembler::jle,
        CodeAssembler::jg,
    ];
    all[rng.usize(0..16)](a, to)
}

/// A random program of these instructions; it leaves at its end. With `segments`, memory operands may go by FS and GS.
pub fn program(
    codes: &[Code],
    rng: &mut Rng,
    segments: bool,
    offers: &dyn Fn(&Instruction) -> bool,
) -> Program {
    let mut made = None;
    while made.is_none() {
        made = attempt(codes, rng, segments, offers).ok();
    }
    made.unwrap_or_else(|| unreachable!("just made"))
}

fn attempt(
    codes: &[Code],
    rng: &mut Rng,
    segments: bool,
    offers: &dyn Fn(&Instruction) -> bool,
) -> Result<Program, iced_x86::IcedError> {
    use iced_x86::code_asm::registers as r;
    let mut a = CodeAssembler::new(64)?;
    let count = rng.usize(3..9);
    let mut labels: Vec<CodeLabel> = (0..count).map(|_| a.create_label()).collect();
    let mut functions: Vec<CodeLabel> = (0..2).map(|_| a.create_label()).collect();
    let mut end = a.create_label();
    let temporaries = [r::gpr64::rax, r::gpr64::rcx, r::gpr64::r11, r::gpr64::rdi, r::gpr64::r9];
    let some = |a: &mut CodeAssembler, rng: &mut Rng, most: usize| {
        for _ in 0..rng.usize(0..most) {
            a.add_instruction(instruction(codes, rng, segments, offers))?;
        }
        Ok::<(), iced_x86::IcedError>(())
    };
    for n in 0..count {
        a.set_label(&mut labels[n])?;
        if n > 0 {
            // The label's place must hold something.
            a.nop()?;
        }
        some(&mut a, rng, 5)?;
        let t = temporaries[rng.usize(0..temporaries.len())];
        match rng.u32(0..10) {
            0 | 1 if n + 1 < count => {
                let to = labels[rng.usize(n + 1..count)];
                branch(&mut a, rng, to)?;
            }
            2 if n + 1 < count => a.jmp(labels[rng.usize(n + 1..count)])?,
            3 | 4 => {
                a.sub(r14d, 1)?;
                a.js(end)?;
                some(&mut a, rng, 3)?;
                let to = labels[rng.usize(0..=n)];
                branch(&mut a, rng, to)?;
            }
            5 | 6 => a.call(functions[rng.usize(0..2)])?,
            7 => {
                a.push(t)?;
                some(&mut a, rng, 3)?;
                a.pop(temporaries[rng.usize(0..temporaries.len())])?;
            }
            8 if n + 1 < count => {
                a.lea(t, iced_x86::code_asm::ptr(labels[rng.usize(n + 1..count)]))?;
                some(&mut a, rng, 1)?;
                a.jmp(t)?;
            }
            _ => {
                a.pushfq()?;
                a.pop(t)?;
            }
        }
    }
    a.jmp(end)?;
    for (n, f) in functions.clone().iter_mut().enumerate() {
        a.set_label(f)?;
        functions[n] = *f;
        a.push(r::gpr64::rbp)?;
        a.mov(r::gpr64::rbp, r::gpr64::rsp)?;
        a.push(-5)?;
        some(&mut a, rng, 4)?;
        a.lea(r::gpr64::rsp, iced_x86::code_asm::qword_ptr(r::gpr64::rsp + 8))?;
        a.pop(r::gpr64::rbp)?;
        if rng.bool() {
            a.ret()?;
        } else {
            a.lea(r::gpr64::rsp, iced_x86::code_asm::qword_ptr(r::gpr64::rsp - 16))?;
            a.mov(temporaries[0], iced_x86::code_asm::qword_ptr(r::gpr64::rsp + 16))?;
            a.mov(iced_x86::code_asm::qword_ptr(r::gpr64::rsp), temporaries[0])?;
            a.ret_1(16)?;
        }
    }
    a.set_label(&mut end)?;
    a.nop()?;
    // Now and then across the first page's end.
    let at = if rng.bool() { rng.usize(0..64) } else { 0x1000 - rng.usize(1..400) };
    let bytes = a.assemble(CODE + at as u64)?;
    if at + bytes.len() + 64 > CODE_SIZE {
        return attempt(codes, rng, segments, offers);
    }
    Ok(Program { bytes, at })
}

/// A state for a program to start from.
pub fn state(rng: &mut Rng) -> State {
    let mut s = generate::any_state(rng);
    let near = |rng: &mut Rng| {
        if rng.u32(0..3) == 0 {
            // Around the end of a page of the window.
            DATA + 0x1000 * rng.u64(1..4) - rng.u64(0..9)
        } else {
            DATA + rng.u64(0x400..DATA_SIZE as u64 - 0x800)
        }
    };
    for p in POINTERS {
        s.gpr[p.number()] = near(rng);
    }
    s.gpr[14] = rng.u64(0..40);
    s.gpr[15] = rng.u64(0..64);
    s.gpr[4] = DATA + (rng.u64(0x400..DATA_SIZE as u64 - 0x400) & !7);
    if rng.u32(0..8) == 0 {
        // So near to the window's start that some push faults.
        s.gpr[4] = DATA + 8 * rng.u64(0..5);
    }
    s
}
