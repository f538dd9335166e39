//! Port I/O: IN, OUT, INS, OUTS.

use crate::cpu::{Cpu, Trap, gpr};
use crate::decode::{Ctx, Exec, Flow, Handler, Op, op_flags};
use crate::mmu::Access;
use iced_x86::{Mnemonic, OpKind};
use ringfort_x86::flags::TF;
use ringfort_x86::segment::ES;
use std::sync::atomic::Ordering;

/// String iterations between two looks at what waits.
const BURST: u32 = 1024;

impl Cpu {
    /// Whether the current privilege allows access to `size` ports from `port`: IOPL, or the TSS's I/O permission bitmap.
    ///
    /// # Errors
    /// #GP(0); what reading the TSS raises.
    pub fn check_port(&mut self, port: u16, size: u64) -> Result<(), Trap> {
        if !self.protected() || !self.v86() && self.cpl <= self.iopl() {
            return Ok(());
        }
        let limit = u64::from(self.tr.limit);
        // Only 32- and 64-bit TSSs have a bitmap.
        if !self.tr.present() || self.tr.kind() & 8 == 0 || limit < 103 {
            return Err(self.gp(0));
        }
        let base = self.tr.base;
        let map = u64::from(self.load_system::<u16>(self.wrap_linear(base.wrapping_add(102)))?);
        let at = map + u64::from(port / 8);
        // Two bytes are always read.
        if at + 1 > limit {
            return Err(self.gp(0));
        }
        let bits = self.load_system::<u16>(self.wrap_linear(base.wrapping_add(at)))?;
        let wanted = ((1u16 << size) - 1) << (port % 8);
        if bits & wanted != 0 { Err(self.gp(0)) } else { Ok(()) }
    }

    fn port_in(&mut self, port: u16, size: usize) -> u32 {
        let mut b = [0; 4];
        self.env.bus.pio_read(port, &mut b[..size]);
        self.check_io_watch(port, size);
        u32::from_le_bytes(b)
    }

    fn port_out(&mut self, port: u16, size: usize, v: u32) {
        self.env.bus.pio_write(port, &v.to_le_bytes()[..size]);
        self.check_io_watch(port, size);
    }
}

fn port(cpu: &Cpu, op: &Op) -> u16 {
    if op.aux != 0 { op.imm as u8 as u16 } else { cpu.regs[gpr::RDX] as u16 }
}

fn input<const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Exec {
    let port = port(cpu, op);
    cpu.check_port(port, SIZE as u64)?;
    let v = cpu.port_in(port, SIZE);
    match SIZE {
        1 => cpu.set_reg(0, v as u8),
        2 => cpu.set_reg(0, v as u16),
        _ => cpu.set_reg(0, v),
    }
    Ok(Flow::EndBlock)
}

fn output<const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Exec {
    let port = port(cpu, op);
    cpu.check_port(port, SIZE as u64)?;
    let v = cpu.regs[gpr::RAX] as u32;
    cpu.port_out(port, SIZE, v);
    Ok(Flow::EndBlock)
}

/// Move a register by a string step at the instruction's address size.
fn step(cpu: &mut Cpu, op: &Op, reg: usize, by: u64) {
    let v = cpu.regs[reg].wrapping_add(by);
    cpu.regs[reg] = merge(cpu, op, reg, v);
}

/// `v` as address-size register contents: 16-bit ones keep the upper bits.
fn merge(cpu: &Cpu, op: &Op, reg: usize, v: u64) -> u64 {
    if op.flags & op_flags::ADDR16 != 0 {
        cpu.regs[reg] & !0xffff | v & 0xffff
    } else if op.flags & op_flags::ADDR32 != 0 {
        v & 0xffff_ffff
    } else {
        v
    }
}

/// Run `one` once, or as often as RCX says with a REP prefix; the instruction is restarted where something waits.
fn repeat(cpu: &mut Cpu, op: &Op, one: fn(&mut Cpu, &Op) -> Result<(), Trap>) -> Exec {
    if op.flags & (op_flags::REP | op_flags::REPNE) == 0 {
        one(cpu, op)?;
        return Ok(Flow::EndBlock);
    }
    let single = cpu.sys_flags & TF != 0 || cpu.debug_armed();
    let mut left = if single { 1 } else { BURST };
    loop {
        if cpu.truncate(op, cpu.regs[gpr::RCX]) == 0 {
            return Ok(Flow::EndBlock);
        }
        one(cpu, op)?;
        step(cpu, op, gpr::RCX, u64::MAX);
        left -= 1;
        if cpu.truncate(op, cpu.regs[gpr::RCX]) == 0 {
            return Ok(Flow::EndBlock);
        }
        if left == 0 || cpu.env.me.requests.load(Ordering::Relaxed) != 0 {
            let here = cpu.this_ip(op);
            cpu.set_rip(here);
            return Ok(Flow::Branch);
        }
    }
}

fn ins_once<const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let port = cpu.regs[gpr::RDX] as u16;
    cpu.check_port(port, SIZE as u64)?;
    let offset = cpu.truncate(op, cpu.regs[gpr::RDI]);
    let lin = cpu.segmented(ES, offset, SIZE, Access::Write)?;
    // The device's register may be read only once, so the store must not fault after it.
    cpu.probe_write(lin, SIZE)?;
    let v = cpu.port_in(port, SIZE);
    match SIZE {
        1 => cpu.store(lin, v as u8)?,
        2 => cpu.store(lin, v as u16)?,
        _ => cpu.store(lin, v)?,
    }
    let by = cpu.string_step(SIZE as u64);
    step(cpu, op, gpr::RDI, by);
    Ok(())
}

fn outs_once<const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let port = cpu.regs[gpr::RDX] as u16;
    cpu.check_port(port, SIZE as u64)?;
    let offset = cpu.truncate(op, cpu.regs[gpr::RSI]);
    let lin = cpu.segmented(op.seg.into(), offset, SIZE, Access::Read)?;
    let v = match SIZE {
        1 => cpu.load::<u8>(lin)?.into(),
        2 => cpu.load::<u16>(lin)?.into(),
        _ => cpu.load::<u32>(lin)?,
    };
    cpu.port_out(port, SIZE, v);
    let by = cpu.string_step(SIZE as u64);
    step(cpu, op, gpr::RSI, by);
    Ok(())
}

fn ins<const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Exec {
    repeat(cpu, op, ins_once::<SIZE>)
}

fn outs<const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Exec {
    repeat(cpu, op, outs_once::<SIZE>)
}

pub(super) fn lower(ctx: &mut Ctx<'_>) -> Option<Handler> {
    let i = ctx.i;
    match i.mnemonic() {
        Mnemonic::In => {
            ctx.op.aux = u64::from(i.op1_kind() == OpKind::Immediate8);
            Some(match i.op0_register().size() {
                1 => input::<1>,
                2 => input::<2>,
                _ => input::<4>,
            })
        }
        Mnemonic::Out => {
            ctx.op.aux = u64::from(i.op0_kind() == OpKind::Immediate8);
            Some(match i.op1_register().size() {
                1 => output::<1>,
                2 => output::<2>,
                _ => output::<4>,
            })
        }
        Mnemonic::Insb => Some(ins::<1>),
        Mnemonic::Insw => Some(ins::<2>),
        Mnemonic::Insd => Some(ins::<4>),
        Mnemonic::Outsb => Some(outs::<1>),
        Mnemonic::Outsw => Some(outs::<2>),
        Mnemonic::Outsd => Some(outs::<4>),
        _ => None,
    }
}
