//! Far transfers, returns from interrupts, fast system calls, software interrupts.

use crate::cpu::{Cpu, InterruptKind, RIP, Trap};
use crate::decode::{Ctx, Exec, Flow, Handler, Op};
use crate::mmu::Access;
use iced_x86::{Code, Mnemonic};
use ringfort_x86::Vector;
use ringfort_x86::flags::OF;

fn branched(r: Result<(), Trap>) -> Exec {
    r.map(|()| Flow::Branch)
}

fn far_jump_direct(cpu: &mut Cpu, op: &Op) -> Exec {
    branched(cpu.far_jump(op, op.aux as u16, op.imm))
}

fn far_call_direct(cpu: &mut Cpu, op: &Op) -> Exec {
    branched(cpu.far_call(op, op.aux as u16, op.imm, op.opsize.into()))
}

/// Offset and selector of an m16:16, m16:32 or m16:64 operand.
pub(super) fn far_pointer(cpu: &mut Cpu, op: &Op) -> Result<(u16, u64), Trap> {
    let size = usize::from(op.opsize);
    let lin = cpu.linear(op, size + 2, Access::Read)?;
    let mut b = [0; 10];
    cpu.load_bytes(cpu.wrap_linear(lin), &mut b[..size + 2])?;
    let selector = u16::from_le_bytes([b[size], b[size + 1]]);
    let mut offset = [0; 8];
    offset[..size].copy_from_slice(&b[..size]);
    Ok((selector, u64::from_le_bytes(offset)))
}

fn far_jump_memory(cpu: &mut Cpu, op: &Op) -> Exec {
    let (selector, offset) = far_pointer(cpu, op)?;
    branched(cpu.far_jump(op, selector, offset))
}

fn far_call_memory(cpu: &mut Cpu, op: &Op) -> Exec {
    let (selector, offset) = far_pointer(cpu, op)?;
    branched(cpu.far_call(op, selector, offset, op.opsize.into()))
}

fn far_return(cpu: &mut Cpu, op: &Op) -> Exec {
    branched(cpu.far_return(op.opsize.into(), op.imm & 0xffff))
}

fn iret(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.iret(op, op.opsize.into())?;
    cpu.serialize();
    cpu.interrupts_maybe();
    Ok(Flow::Branch)
}

fn syscall(cpu: &mut Cpu, op: &Op) -> Exec {
    branched(cpu.syscall(op))
}

fn sysret(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.sysret(op.opsize.into())?;
    cpu.interrupts_maybe();
    Ok(Flow::Branch)
}

fn sysenter(cpu: &mut Cpu, _: &Op) -> Exec {
    branched(cpu.sysenter())
}

fn sysexit(cpu: &mut Cpu, op: &Op) -> Exec {
    branched(cpu.sysexit(op.opsize.into()))
}

/// Deliver a software interrupt: RIP must be the instruction's own for faults on the way and for a task switch.
fn raise(cpu: &mut Cpu, vector: u8, kind: InterruptKind) -> Exec {
    // The single-step trap that TF would bring is lost: the interrupt has cleared TF.
    cpu.no_step_trap = true;
    branched(cpu.interrupt(vector, kind))
}

fn int_n(cpu: &mut Cpu, op: &Op) -> Exec {
    let next = cpu.next_ip(op);
    raise(cpu, op.imm as u8, InterruptKind::Software(next))
}

fn int3(cpu: &mut Cpu, op: &Op) -> Exec {
    if cpu.debugger_takes_int3() {
        let own = cpu.this_ip(op);
        cpu.regs[usize::from(RIP)] = own;
        cpu.no_step_trap = true;
        return Ok(Flow::Branch);
    }
    let next = cpu.next_ip(op);
    raise(cpu, Vector::Breakpoint as u8, InterruptKind::IntTrap(next))
}

fn int1(cpu: &mut Cpu, op: &Op) -> Exec {
    let next = cpu.next_ip(op);
    raise(cpu, Vector::Debug as u8, InterruptKind::Icebp(next))
}

fn into(cpu: &mut Cpu, op: &Op) -> Exec {
    if cpu.rflags() & OF == 0 {
        return Ok(Flow::Next);
    }
    let next = cpu.next_ip(op);
    raise(cpu, Vector::Overflow as u8, InterruptKind::IntTrap(next))
}

fn bound(cpu: &mut Cpu, op: &Op) -> Exec {
    let size = usize::from(op.opsize);
    let lin = cpu.linear(op, size * 2, Access::Read)?;
    let mut b = [0; 8];
    cpu.load_bytes(lin, &mut b[..size * 2])?;
    let outside = if size == 2 {
        let i = cpu.reg::<u16>(op.dst) as i16;
        i < i16::from_le_bytes([b[0], b[1]]) || i > i16::from_le_bytes([b[2], b[3]])
    } else {
        let i = cpu.reg::<u32>(op.dst) as i32;
        i < i32::from_le_bytes([b[0], b[1], b[2], b[3]]) || i > i32::from_le_bytes([b[4], b[5], b[6], b[7]])
    };
    if outside { Err(cpu.raise(Vector::BoundRange, 0)) } else { Ok(Flow::Next) }
}

pub(super) fn lower(ctx: &mut Ctx<'_>) -> Option<Handler> {
    use Code::*;
    let code = ctx.i.code();
    // Operand size, where the instruction has one.
    let size = match code {
        Jmp_ptr1616 | Call_ptr1616 | Jmp_m1616 | Call_m1616 | Retfw | Retfw_imm16 | Iretw
        | Bound_r16_m1616 => 2,
        Jmp_ptr1632 | Call_ptr1632 | Jmp_m1632 | Call_m1632 | Retfd | Retfd_imm16 | Iretd
        | Bound_r32_m3232 | Sysretd | Sysexitd => 4,
        Jmp_m1664 | Call_m1664 | Retfq | Retfq_imm16 | Iretq | Sysretq | Sysexitq => 8,
        _ => ctx.op.opsize,
    };
    let run: Handler = match ctx.i.mnemonic() {
        Mnemonic::Jmp if matches!(code, Jmp_ptr1616 | Jmp_ptr1632) => far_jump_direct,
        Mnemonic::Jmp if matches!(code, Jmp_m1616 | Jmp_m1632 | Jmp_m1664) => far_jump_memory,
        Mnemonic::Call if matches!(code, Call_ptr1616 | Call_ptr1632) => far_call_direct,
        Mnemonic::Call if matches!(code, Call_m1616 | Call_m1632 | Call_m1664) => far_call_memory,
        Mnemonic::Retf => far_return,
        Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq => iret,
        Mnemonic::Syscall => syscall,
        Mnemonic::Sysret | Mnemonic::Sysretq => sysret,
        Mnemonic::Sysenter => sysenter,
        Mnemonic::Sysexit | Mnemonic::Sysexitq => sysexit,
        Mnemonic::Int => int_n,
        Mnemonic::Int3 => int3,
        Mnemonic::Int1 => int1,
        Mnemonic::Into => into,
        Mnemonic::Bound => bound,
        _ => return None,
    };
    ctx.op.opsize = size;
    Some(run)
}
