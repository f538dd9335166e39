//! Segment registers and descriptor tables.

use super::branch::far_pointer;
use crate::cpu::{Cpu, Shadow, Trap};
use crate::decode::{Ctx, Exec, Flow, Handler, Op, op_flags};
use crate::mmu::Access;
use iced_x86::{Code, Mnemonic, OpKind, Register};
use ringfort_x86::cr::CR4_UMIP;
use ringfort_x86::segment::*;

/// Write an operand of `size` bytes that is a register or memory.
pub(super) fn write_operand(cpu: &mut Cpu, op: &Op, size: usize, v: u64) -> Result<(), Trap> {
    if op.flags & op_flags::MEM != 0 {
        let lin = cpu.linear(op, size, Access::Write)?;
        match size {
            2 => cpu.store(lin, v as u16)?,
            4 => cpu.store(lin, v as u32)?,
            _ => cpu.store(lin, v)?,
        }
    } else {
        match size {
            2 => cpu.set_reg(op.dst, v as u16),
            4 => cpu.set_reg(op.dst, v as u32),
            _ => cpu.set_reg(op.dst, v),
        }
    }
    Ok(())
}

/// Read a 16-bit operand: the register at `reg`, or memory.
pub(super) fn read_selector(cpu: &mut Cpu, op: &Op, reg: u8) -> Result<u16, Trap> {
    if op.flags & op_flags::MEM == 0 {
        return Ok(cpu.reg::<u16>(reg));
    }
    let lin = cpu.linear(op, 2, Access::Read)?;
    cpu.load::<u16>(lin)
}

fn mov_to_sreg(cpu: &mut Cpu, op: &Op) -> Exec {
    let v = read_selector(cpu, op, op.src)?;
    load_sreg(cpu, op.dst.into(), v)
}

fn load_sreg(cpu: &mut Cpu, seg: usize, v: u16) -> Exec {
    cpu.load_segment(seg, v)?;
    if seg == SS {
        cpu.shadow = Shadow::MovSs;
    }
    Ok(Flow::EndBlock)
}

/// Memory gets 16 bits; a register its operand size, zero-extended.
fn mov_from_sreg(cpu: &mut Cpu, op: &Op) -> Exec {
    let v = u64::from(cpu.seg[usize::from(op.src)].selector);
    let size = if op.flags & op_flags::MEM != 0 { 2 } else { usize::from(op.opsize) };
    write_operand(cpu, op, size, v)?;
    Ok(Flow::Next)
}

fn push_sreg(cpu: &mut Cpu, op: &Op) -> Exec {
    let v = u64::from(cpu.seg[usize::from(op.dst)].selector);
    let mut stack = cpu.current_stack();
    cpu.push_frame(&mut stack, &[v], op.opsize.into())?;
    cpu.set_stack_pointer(&stack);
    Ok(Flow::Next)
}

fn pop_sreg(cpu: &mut Cpu, op: &Op) -> Exec {
    let mut stack = cpu.current_stack();
    let mut v = [0];
    // Only the selector's two bytes are read.
    cpu.peek_frame(&stack, 0, &mut v, 2)?;
    stack.sp = stack.offset(op.opsize.into());
    let flow = load_sreg(cpu, op.dst.into(), v[0] as u16)?;
    // POP SS: the pointer's width is the old stack's.
    cpu.set_stack_pointer(&stack);
    Ok(flow)
}

/// LDS, LES, LFS, LGS, LSS; the segment register is in `aux`.
fn load_far_pointer(cpu: &mut Cpu, op: &Op) -> Exec {
    let (selector, offset) = far_pointer(cpu, op)?;
    cpu.load_segment(op.aux as usize, selector)?;
    match op.opsize {
        2 => cpu.set_reg(op.dst, offset as u16),
        4 => cpu.set_reg(op.dst, offset as u32),
        _ => cpu.set_reg(op.dst, offset),
    }
    Ok(Flow::EndBlock)
}

fn privileged(cpu: &mut Cpu) -> Result<(), Trap> {
    if cpu.cpl != 0 { Err(cpu.gp(0)) } else { Ok(()) }
}

/// Instructions that UMIP makes privileged.
pub(super) fn umip(cpu: &mut Cpu) -> Result<(), Trap> {
    if cpu.cr4 & CR4_UMIP != 0 && cpu.cpl != 0 { Err(cpu.gp(0)) } else { Ok(()) }
}

/// Instructions that do not exist in real and virtual-8086 mode.
fn protected_only(cpu: &mut Cpu) -> Result<(), Trap> {
    if cpu.real_segments() { Err(cpu.ud()) } else { Ok(()) }
}

fn load_table(cpu: &mut Cpu, op: &Op) -> Result<TableRegister, Trap> {
    privileged(cpu)?;
    let wide = cpu.code64();
    let size = if wide { 10 } else { 6 };
    let lin = cpu.linear(op, size, Access::Read)?;
    let mut b = [0; 10];
    cpu.load_bytes(lin, &mut b[..size])?;
    let limit = u16::from_le_bytes([b[0], b[1]]);
    let mut base = [0; 8];
    base[..size - 2].copy_from_slice(&b[2..size]);
    let mut base = u64::from_le_bytes(base);
    if wide && !crate::cpu::canonical(base) {
        return Err(cpu.gp(0));
    }
    if !wide && op.opsize == 2 {
        base &= 0xff_ffff;
    }
    Ok(TableRegister { base, limit })
}

fn lgdt(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.gdtr = load_table(cpu, op)?;
    cpu.serialize();
    Ok(Flow::EndBlock)
}

fn lidt(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.idtr = load_table(cpu, op)?;
    cpu.serialize();
    Ok(Flow::EndBlock)
}

fn store_table(cpu: &mut Cpu, op: &Op, t: TableRegister) -> Exec {
    umip(cpu)?;
    // All bytes of the base are stored whatever the operand size, as by every processor since the 386.
    let size = if cpu.code64() { 10 } else { 6 };
    let lin = cpu.linear(op, size, Access::Write)?;
    let mut b = [0; 10];
    b[..2].copy_from_slice(&t.limit.to_le_bytes());
    b[2..].copy_from_slice(&t.base.to_le_bytes());
    cpu.store_bytes(lin, &b[..size])?;
    Ok(Flow::Next)
}

fn sgdt(cpu: &mut Cpu, op: &Op) -> Exec {
    store_table(cpu, op, cpu.gdtr)
}

fn sidt(cpu: &mut Cpu, op: &Op) -> Exec {
    store_table(cpu, op, cpu.idtr)
}

fn store_selector(cpu: &mut Cpu, op: &Op, selector: u16) -> Exec {
    let size = if op.flags & op_flags::MEM != 0 { 2 } else { usize::from(op.opsize) };
    write_operand(cpu, op, size, selector.into())?;
    Ok(Flow::Next)
}

fn sldt(cpu: &mut Cpu, op: &Op) -> Exec {
    protected_only(cpu)?;
    umip(cpu)?;
    store_selector(cpu, op, cpu.ldtr.selector)
}

fn str(cpu: &mut Cpu, op: &Op) -> Exec {
    protected_only(cpu)?;
    umip(cpu)?;
    store_selector(cpu, op, cpu.tr.selector)
}

fn lldt(cpu: &mut Cpu, op: &Op) -> Exec {
    protected_only(cpu)?;
    privileged(cpu)?;
    let selector = read_selector(cpu, op, op.dst)?;
    cpu.ldtr = cpu.load_ldt(selector, ringfort_x86::Vector::GeneralProtection)?;
    cpu.serialize();
    Ok(Flow::EndBlock)
}

fn ltr(cpu: &mut Cpu, op: &Op) -> Exec {
    protected_only(cpu)?;
    privileged(cpu)?;
    let selector = read_selector(cpu, op, op.dst)?;
    cpu.load_tr(selector)?;
    cpu.serialize();
    Ok(Flow::EndBlock)
}

fn set_zf(cpu: &mut Cpu, on: bool) {
    use crate::cpu::A_ZF;
    cpu.arith = cpu.arith & !A_ZF | if on { A_ZF } else { 0 };
}

fn verify(cpu: &mut Cpu, op: &Op, good: fn(&Segment) -> bool) -> Exec {
    protected_only(cpu)?;
    let selector = read_selector(cpu, op, op.dst)?;
    let found = cpu.visible_descriptor(selector)?;
    set_zf(cpu, found.is_some_and(|s| s.attrs & S != 0 && good(&s)));
    Ok(Flow::Next)
}

fn verr(cpu: &mut Cpu, op: &Op) -> Exec {
    verify(cpu, op, |s| s.attrs & CODE == 0 || s.attrs & RW != 0)
}

fn verw(cpu: &mut Cpu, op: &Op) -> Exec {
    verify(cpu, op, |s| s.attrs & (CODE | RW) == RW)
}

/// LAR and LSL: the visible descriptor, if its type is one that the instruction knows.
fn examine(cpu: &mut Cpu, op: &Op, gates: bool) -> Result<Option<(u64, Segment)>, Trap> {
    protected_only(cpu)?;
    let selector = read_selector(cpu, op, op.src)?;
    let Some(s) = cpu.visible_descriptor(selector)? else { return Ok(None) };
    let known = s.attrs & S != 0
        || match s.kind() {
            2 | 9 | 11 => true,
            1 | 3 => !cpu.long_mode(),
            12 => gates,
            4 | 5 => gates && !cpu.long_mode(),
            _ => false,
        };
    let Some(lin) = cpu.descriptor_address(selector, 8) else { return Ok(None) };
    if !known {
        return Ok(None);
    }
    let raw = cpu.load_system::<u64>(lin)?;
    Ok(Some((raw, s)))
}

fn put(cpu: &mut Cpu, op: &Op, v: u32) {
    match op.opsize {
        2 => cpu.set_reg(op.dst, v as u16),
        4 => cpu.set_reg(op.dst, v),
        _ => cpu.set_reg(op.dst, u64::from(v)),
    }
}

fn lar(cpu: &mut Cpu, op: &Op) -> Exec {
    let found = examine(cpu, op, true)?;
    if let Some((raw, _)) = found {
        put(cpu, op, (raw >> 32) as u32 & 0x00ff_ff00);
    }
    set_zf(cpu, found.is_some());
    Ok(Flow::Next)
}

fn lsl(cpu: &mut Cpu, op: &Op) -> Exec {
    let found = examine(cpu, op, false)?;
    if let Some((_, s)) = found {
        put(cpu, op, s.limit);
    }
    set_zf(cpu, found.is_some());
    Ok(Flow::Next)
}

fn arpl(cpu: &mut Cpu, op: &Op) -> Exec {
    protected_only(cpu)?;
    let source = cpu.reg::<u16>(op.src) & 3;
    if op.flags & op_flags::MEM == 0 {
        let v = cpu.reg::<u16>(op.dst);
        let raise = v & 3 < source;
        if raise {
            cpu.set_reg(op.dst, v & !3 | source);
        }
        set_zf(cpu, raise);
        return Ok(Flow::Next);
    }
    let lin = cpu.linear(op, 2, Access::Write)?;
    let mut raise = false;
    cpu.modify::<u16>(lin, |v| {
        raise = v & 3 < source;
        if raise { v & !3 | source } else { v }
    })?;
    set_zf(cpu, raise);
    Ok(Flow::Next)
}

/// RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE.
fn base_allowed(cpu: &mut Cpu) -> Result<(), Trap> {
    if cpu.cr4 & ringfort_x86::cr::CR4_FSGSBASE == 0 { Err(cpu.ud()) } else { Ok(()) }
}

fn read_base<const SEG: usize>(cpu: &mut Cpu, op: &Op) -> Exec {
    base_allowed(cpu)?;
    let v = cpu.seg[SEG].base;
    write_operand(cpu, op, op.opsize.into(), v)?;
    Ok(Flow::Next)
}

fn write_base<const SEG: usize>(cpu: &mut Cpu, op: &Op) -> Exec {
    base_allowed(cpu)?;
    let v = if op.opsize == 8 { cpu.reg::<u64>(op.dst) } else { cpu.reg::<u32>(op.dst).into() };
    if !crate::cpu::canonical(v) {
        return Err(cpu.gp(0));
    }
    cpu.seg[SEG].base = v;
    Ok(Flow::Next)
}

fn swapgs(cpu: &mut Cpu, _: &Op) -> Exec {
    privileged(cpu)?;
    std::mem::swap(&mut cpu.seg[GS].base, &mut cpu.kernel_gs_base);
    Ok(Flow::Next)
}

pub(super) fn lower(ctx: &mut Ctx<'_>) -> Option<Handler> {
    let i = ctx.i;
    let is_sreg = |n: u32| i.op_kind(n) == OpKind::Register && i.op_register(n).is_segment_register();
    let size = |r: Register| if r.is_gpr() { r.size() as u8 } else { 2 };
    Some(match i.mnemonic() {
        Mnemonic::Mov if is_sreg(0) => {
            // CS cannot be loaded so.
            if i.op_register(0) == Register::CS {
                return None;
            }
            mov_to_sreg
        }
        Mnemonic::Mov if is_sreg(1) => {
            ctx.op.opsize = size(i.op0_register());
            mov_from_sreg
        }
        Mnemonic::Push if is_sreg(0) => {
            ctx.op.opsize = match i.code() {
                Code::Pushw_FS
                | Code::Pushw_GS
                | Code::Pushw_ES
                | Code::Pushw_CS
                | Code::Pushw_SS
                | Code::Pushw_DS => 2,
                Code::Pushq_FS | Code::Pushq_GS => 8,
                _ => 4,
            };
            push_sreg
        }
        Mnemonic::Pop if is_sreg(0) => {
            ctx.op.opsize = match i.code() {
                Code::Popw_FS | Code::Popw_GS | Code::Popw_ES | Code::Popw_SS | Code::Popw_DS => 2,
                Code::Popq_FS | Code::Popq_GS => 8,
                _ => 4,
            };
            ctx.op.flags |= op_flags::END;
            pop_sreg
        }
        m @ (Mnemonic::Lds | Mnemonic::Les | Mnemonic::Lfs | Mnemonic::Lgs | Mnemonic::Lss) => {
            ctx.op.opsize = size(i.op0_register());
            ctx.op.aux = match m {
                Mnemonic::Lds => DS,
                Mnemonic::Les => ES,
                Mnemonic::Lfs => FS,
                Mnemonic::Lgs => GS,
                _ => SS,
            } as u64;
            load_far_pointer
        }
        m @ (Mnemonic::Lgdt | Mnemonic::Lidt) => {
            ctx.op.opsize = match i.code() {
                Code::Lgdt_m1632_16 | Code::Lidt_m1632_16 => 2,
                Code::Lgdt_m1632 | Code::Lidt_m1632 => 4,
                _ => 8,
            };
            if m == Mnemonic::Lgdt { lgdt } else { lidt }
        }
        Mnemonic::Sgdt => sgdt,
        Mnemonic::Sidt => sidt,
        Mnemonic::Sldt => {
            ctx.op.opsize = size(i.op0_register());
            sldt
        }
        Mnemonic::Str => {
            ctx.op.opsize = size(i.op0_register());
            str
        }
        Mnemonic::Lldt => lldt,
        Mnemonic::Ltr => ltr,
        Mnemonic::Verr => verr,
        Mnemonic::Verw => verw,
        Mnemonic::Lar => {
            ctx.op.opsize = size(i.op0_register());
            lar
        }
        Mnemonic::Lsl => {
            ctx.op.opsize = size(i.op0_register());
            lsl
        }
        Mnemonic::Arpl => arpl,
        Mnemonic::Rdfsbase => read_base::<FS>,
        Mnemonic::Rdgsbase => read_base::<GS>,
        Mnemonic::Wrfsbase => write_base::<FS>,
        Mnemonic::Wrgsbase => write_base::<GS>,
        Mnemonic::Swapgs => swapgs,
        _ => return None,
    })
}
