//! Control and debug registers, flags, MSRs, CPUID, time, TLB maintenance, halting.

use super::segment::{read_selector, umip, write_operand};
use crate::cpu::{Activity, Cpu, Shadow, Trap, gpr};
use crate::decode::{Ctx, Exec, Flow, Handler, Op, op_flags};
use crate::mmu::Access;
use iced_x86::{Code, Mnemonic, Register};
use ringfort_x86::cr::*;
use ringfort_x86::flags::*;
use std::time::Duration;

/// How long MWAIT sleeps at most: another vCPU's store to the monitored line does not wake it.
const MWAIT_NAP: Duration = Duration::from_micros(50);
/// Executed PAUSEs between two offers of the core to other threads.
const PAUSES: u32 = 64;

fn privileged(cpu: &mut Cpu) -> Result<(), Trap> {
    if cpu.cpl != 0 { Err(cpu.gp(0)) } else { Ok(()) }
}

/// Outside 64-bit mode CR8 is reached as LOCK MOV CR0, on AMD only (APM 3 "MOV CRn").
fn alternate_cr8(cpu: &mut Cpu, register: u8) -> Result<(), Trap> {
    if register == 8 && !cpu.code64() && !cpu.amd { Err(cpu.ud()) } else { Ok(()) }
}

fn mov_from_cr(cpu: &mut Cpu, op: &Op) -> Exec {
    alternate_cr8(cpu, op.src)?;
    privileged(cpu)?;
    let v = match op.src {
        0 => cpu.cr0,
        2 => cpu.cr2,
        3 => cpu.cr3,
        4 => cpu.cr4,
        8 => cpu.cr8(),
        _ => return Err(cpu.ud()),
    };
    put(cpu, op, v);
    Ok(Flow::Next)
}

fn put(cpu: &mut Cpu, op: &Op, v: u64) {
    if op.opsize == 8 { cpu.set_reg(op.dst, v) } else { cpu.set_reg(op.dst, v as u32) }
}

fn source(cpu: &Cpu, op: &Op) -> u64 {
    if op.opsize == 8 { cpu.reg::<u64>(op.src) } else { cpu.reg::<u32>(op.src).into() }
}

fn mov_to_cr(cpu: &mut Cpu, op: &Op) -> Exec {
    alternate_cr8(cpu, op.dst)?;
    privileged(cpu)?;
    let v = source(cpu, op);
    match op.dst {
        0 => cpu.set_cr0(v)?,
        2 => cpu.cr2 = v,
        3 => cpu.set_cr3(v)?,
        4 => cpu.set_cr4(v)?,
        8 => {
            cpu.set_cr8(v)?;
            cpu.interrupts_maybe();
        }
        _ => return Err(cpu.ud()),
    }
    Ok(Flow::EndBlock)
}

fn mov_from_dr(cpu: &mut Cpu, op: &Op) -> Exec {
    let v = cpu.read_dr(op.src.into())?;
    put(cpu, op, v);
    Ok(Flow::Next)
}

fn mov_to_dr(cpu: &mut Cpu, op: &Op) -> Exec {
    let v = source(cpu, op);
    cpu.write_dr(op.dst.into(), v)?;
    cpu.serialize();
    Ok(Flow::EndBlock)
}

fn clts(cpu: &mut Cpu, _: &Op) -> Exec {
    privileged(cpu)?;
    cpu.cr0 &= !CR0_TS;
    Ok(Flow::EndBlock)
}

fn lmsw(cpu: &mut Cpu, op: &Op) -> Exec {
    privileged(cpu)?;
    let v = u64::from(read_selector(cpu, op, op.dst)?) & 15;
    // PE can be set so, but not cleared.
    let v = cpu.cr0 & !0xe | v;
    cpu.set_cr0(v)?;
    Ok(Flow::EndBlock)
}

fn smsw(cpu: &mut Cpu, op: &Op) -> Exec {
    umip(cpu)?;
    let size = if op.flags & op_flags::MEM != 0 { 2 } else { usize::from(op.opsize) };
    let v = cpu.cr0;
    write_operand(cpu, op, size, v)?;
    Ok(Flow::Next)
}

fn invlpg(cpu: &mut Cpu, op: &Op) -> Exec {
    privileged(cpu)?;
    let offset = cpu.truncate(op, cpu.effective(op));
    let seg = usize::from(op.seg);
    let flat = cpu.code64() && seg < 4;
    let lin = if flat { offset } else { offset.wrapping_add(cpu.seg[seg].base) };
    cpu.invlpg(lin);
    cpu.serialize();
    Ok(Flow::EndBlock)
}

fn invpcid(cpu: &mut Cpu, op: &Op) -> Exec {
    privileged(cpu)?;
    let kind = if cpu.code64() { cpu.reg::<u64>(op.dst) } else { cpu.reg::<u32>(op.dst).into() };
    let lin = cpu.linear(op, 16, Access::Read)?;
    let mut b = [0; 16];
    cpu.load_bytes(lin, &mut b)?;
    let v = u128::from_le_bytes(b);
    cpu.invpcid(kind, v as u64, (v >> 64) as u64)?;
    cpu.serialize();
    Ok(Flow::EndBlock)
}

/// INVD, WBINVD, WBNOINVD: caches are coherent, nothing is to be done.
fn cache_flush(cpu: &mut Cpu, _: &Op) -> Exec {
    privileged(cpu)?;
    cpu.serialize();
    Ok(Flow::EndBlock)
}

/// What CLI and STI act on.
enum InterruptFlag {
    Real,
    Virtual,
}

fn interrupt_flag(cpu: &mut Cpu) -> Result<InterruptFlag, Trap> {
    if !cpu.protected() || cpu.iopl() >= cpu.cpl {
        return Ok(InterruptFlag::Real);
    }
    let extension = if cpu.v86() { CR4_VME } else { CR4_PVI };
    if cpu.cpl == 3 && cpu.cr4 & extension != 0 { Ok(InterruptFlag::Virtual) } else { Err(cpu.gp(0)) }
}

fn cli(cpu: &mut Cpu, _: &Op) -> Exec {
    match interrupt_flag(cpu)? {
        InterruptFlag::Real => cpu.sys_flags &= !IF,
        InterruptFlag::Virtual => cpu.sys_flags &= !VIF,
    }
    Ok(Flow::Next)
}

fn sti(cpu: &mut Cpu, _: &Op) -> Exec {
    match interrupt_flag(cpu)? {
        InterruptFlag::Real => {
            if cpu.sys_flags & IF == 0 {
                cpu.sys_flags |= IF;
                cpu.shadow = Shadow::Sti;
                cpu.interrupts_maybe();
            }
        }
        InterruptFlag::Virtual => {
            if cpu.sys_flags & VIP != 0 {
                return Err(cpu.gp(0));
            }
            cpu.sys_flags |= VIF;
        }
    }
    Ok(Flow::EndBlock)
}

fn clac_stac<const SET: bool>(cpu: &mut Cpu, _: &Op) -> Exec {
    if cpu.cpl != 0 {
        return Err(cpu.ud());
    }
    cpu.sys_flags = cpu.sys_flags & !AC | if SET { AC } else { 0 };
    cpu.update_mmu_mode();
    Ok(Flow::Next)
}

fn pushf(cpu: &mut Cpu, op: &Op) -> Exec {
    let mut v = cpu.rflags() & !(VM | RF);
    if cpu.v86() && cpu.iopl() < 3 {
        if cpu.cr4 & CR4_VME == 0 || op.opsize != 2 {
            return Err(cpu.gp(0));
        }
        v = v & !IF | IOPL | if v & VIF != 0 { IF } else { 0 };
    }
    let mut stack = cpu.current_stack();
    cpu.push_frame(&mut stack, &[v], op.opsize.into())?;
    cpu.set_stack_pointer(&stack);
    Ok(Flow::Next)
}

fn popf(cpu: &mut Cpu, op: &Op) -> Exec {
    let mut mask = ARITH | TF | DF | NT;
    if op.opsize > 2 {
        mask |= AC | ID | RF;
    }
    let virtual_if = cpu.v86() && cpu.iopl() < 3;
    if virtual_if {
        if cpu.cr4 & CR4_VME == 0 || op.opsize != 2 {
            return Err(cpu.gp(0));
        }
        mask |= VIF;
    } else if !cpu.protected() || cpu.cpl <= cpu.iopl() {
        mask |= IF;
    }
    if cpu.cpl == 0 {
        mask |= IOPL;
    }
    let mut stack = cpu.current_stack();
    let mut v = [0];
    cpu.peek_frame(&stack, 0, &mut v, op.opsize.into())?;
    let mut v = v[0] & !RF;
    if virtual_if {
        if v & TF != 0 || v & IF != 0 && cpu.sys_flags & VIP != 0 {
            return Err(cpu.gp(0));
        }
        v = v & !VIF | if v & IF != 0 { VIF } else { 0 };
    }
    stack.sp = stack.offset(op.opsize.into());
    cpu.set_stack_pointer(&stack);
    cpu.write_rflags(v, mask);
    cpu.interrupts_maybe();
    Ok(Flow::EndBlock)
}

fn rdmsr(cpu: &mut Cpu, _: &Op) -> Exec {
    privileged(cpu)?;
    let v = cpu.read_msr(cpu.regs[gpr::RCX] as u32)?;
    set_edx_eax(cpu, v);
    Ok(Flow::Next)
}

fn wrmsr(cpu: &mut Cpu, _: &Op) -> Exec {
    privileged(cpu)?;
    let v = edx_eax(cpu);
    cpu.write_msr(cpu.regs[gpr::RCX] as u32, v)?;
    Ok(Flow::EndBlock)
}

fn set_edx_eax(cpu: &mut Cpu, v: u64) {
    cpu.regs[gpr::RAX] = v & 0xffff_ffff;
    cpu.regs[gpr::RDX] = v >> 32;
}

fn edx_eax(cpu: &Cpu) -> u64 {
    cpu.regs[gpr::RDX] << 32 | cpu.regs[gpr::RAX] & 0xffff_ffff
}

fn cpuid(cpu: &mut Cpu, _: &Op) -> Exec {
    let [a, b, c, d] = cpu.cpuid_values(cpu.regs[gpr::RAX] as u32, cpu.regs[gpr::RCX] as u32);
    cpu.regs[gpr::RAX] = a.into();
    cpu.regs[gpr::RBX] = b.into();
    cpu.regs[gpr::RCX] = c.into();
    cpu.regs[gpr::RDX] = d.into();
    cpu.serialize();
    Ok(Flow::EndBlock)
}

fn hlt(cpu: &mut Cpu, _: &Op) -> Exec {
    privileged(cpu)?;
    cpu.activity = Activity::Halted;
    Ok(Flow::EndBlock)
}

fn monitor(cpu: &mut Cpu, op: &Op) -> Exec {
    if cpu.cpl != 0 {
        return Err(cpu.ud());
    }
    if cpu.regs[gpr::RCX] as u32 != 0 {
        return Err(cpu.gp(0));
    }
    let offset = match op.opsize {
        2 => cpu.regs[gpr::RAX] & 0xffff,
        4 => cpu.regs[gpr::RAX] & 0xffff_ffff,
        _ => cpu.regs[gpr::RAX],
    };
    let lin = cpu.segmented(op.seg.into(), offset, 1, Access::Read)?;
    cpu.probe_read(lin, 1)?;
    Ok(Flow::Next)
}

/// MWAIT ends at will ("for implementation-dependent reasons"), so a short nap is right whatever is monitored.
fn mwait(cpu: &mut Cpu, _: &Op) -> Exec {
    if cpu.cpl != 0 {
        return Err(cpu.ud());
    }
    if cpu.regs[gpr::RCX] as u32 & !1 != 0 {
        return Err(cpu.gp(0));
    }
    let epoch = cpu.enter_sleep();
    cpu.env.me.wait(Some(MWAIT_NAP));
    cpu.leave_sleep(epoch);
    Ok(Flow::EndBlock)
}

/// A vCPU that spins may be waiting for one whose thread does not run: offer it the core now and then.
fn pause(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.pauses += 1;
    if cpu.pauses >= PAUSES {
        cpu.pauses = 0;
        if cpu.env.vm.vcpus().len() > 1 {
            std::thread::yield_now();
        }
    }
    std::hint::spin_loop();
    Ok(Flow::EndBlock)
}

fn tsc_allowed(cpu: &mut Cpu) -> Result<(), Trap> {
    if cpu.cr4 & CR4_TSD != 0 && cpu.cpl != 0 { Err(cpu.gp(0)) } else { Ok(()) }
}

fn rdtsc(cpu: &mut Cpu, _: &Op) -> Exec {
    tsc_allowed(cpu)?;
    let v = cpu.tsc();
    set_edx_eax(cpu, v);
    Ok(Flow::Next)
}

fn rdtscp(cpu: &mut Cpu, _: &Op) -> Exec {
    tsc_allowed(cpu)?;
    let v = cpu.tsc();
    set_edx_eax(cpu, v);
    cpu.regs[gpr::RCX] = cpu.tsc_aux & 0xffff_ffff;
    Ok(Flow::Next)
}

fn rdpid(cpu: &mut Cpu, op: &Op) -> Exec {
    let v = cpu.tsc_aux & 0xffff_ffff;
    put(cpu, op, v);
    Ok(Flow::Next)
}

/// There are no performance counters.
fn rdpmc(cpu: &mut Cpu, _: &Op) -> Exec {
    Err(cpu.gp(0))
}

fn xgetbv(cpu: &mut Cpu, _: &Op) -> Exec {
    if cpu.cr4 & CR4_OSXSAVE == 0 {
        return Err(cpu.ud());
    }
    let in_use = cpu.cpuid.find(0xd, 1).is_some_and(|l| l.eax & 4 != 0);
    let v = match cpu.regs[gpr::RCX] as u32 {
        0 => cpu.xcr0,
        1 if in_use => cpu.xcr0 & cpu.xinuse(),
        _ => return Err(cpu.gp(0)),
    };
    set_edx_eax(cpu, v);
    Ok(Flow::Next)
}

fn xsetbv(cpu: &mut Cpu, _: &Op) -> Exec {
    if cpu.cr4 & CR4_OSXSAVE == 0 {
        return Err(cpu.ud());
    }
    privileged(cpu)?;
    if cpu.regs[gpr::RCX] as u32 != 0 {
        return Err(cpu.gp(0));
    }
    cpu.set_xcr0(edx_eax(cpu))?;
    Ok(Flow::EndBlock)
}

pub(super) fn lower(ctx: &mut Ctx<'_>) -> Option<Handler> {
    use Code::*;
    let i = ctx.i;
    let code = i.code();
    let wide = |w: bool| if w { 8 } else { 4 };
    Some(match i.mnemonic() {
        Mnemonic::Mov => match code {
            Mov_r32_cr | Mov_r64_cr => {
                ctx.op.opsize = wide(code == Mov_r64_cr);
                mov_from_cr
            }
            Mov_cr_r32 | Mov_cr_r64 => {
                ctx.op.opsize = wide(code == Mov_cr_r64);
                mov_to_cr
            }
            Mov_r32_dr | Mov_r64_dr => {
                ctx.op.opsize = wide(code == Mov_r64_dr);
                mov_from_dr
            }
            Mov_dr_r32 | Mov_dr_r64 => {
                ctx.op.opsize = wide(code == Mov_dr_r64);
                mov_to_dr
            }
            _ => return None,
        },
        Mnemonic::Clts => clts,
        Mnemonic::Lmsw => lmsw,
        Mnemonic::Smsw => {
            let r = i.op0_register();
            ctx.op.opsize = if r == Register::None { 2 } else { r.size() as u8 };
            smsw
        }
        Mnemonic::Invlpg => invlpg,
        Mnemonic::Invpcid => invpcid,
        Mnemonic::Invd | Mnemonic::Wbinvd | Mnemonic::Wbnoinvd => cache_flush,
        Mnemonic::Cli => cli,
        Mnemonic::Sti => sti,
        Mnemonic::Clac => clac_stac::<false>,
        Mnemonic::Stac => clac_stac::<true>,
        Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq => {
            ctx.op.opsize = flags_size(code);
            pushf
        }
        Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq => {
            ctx.op.opsize = flags_size(code);
            popf
        }
        Mnemonic::Rdmsr => rdmsr,
        Mnemonic::Wrmsr => wrmsr,
        Mnemonic::Cpuid => cpuid,
        Mnemonic::Hlt => hlt,
        Mnemonic::Monitor => {
            ctx.op.opsize = match code {
                Monitorw => 2,
                Monitord => 4,
                _ => 8,
            };
            ctx.op.seg = i.memory_segment().number() as u8;
            if i.segment_prefix() == Register::None {
                ctx.op.seg = ringfort_x86::segment::DS as u8;
            }
            monitor
        }
        Mnemonic::Mwait => mwait,
        Mnemonic::Pause => pause,
        Mnemonic::Rdtsc => rdtsc,
        Mnemonic::Rdtscp => rdtscp,
        Mnemonic::Rdpid => {
            ctx.op.opsize = wide(code == Rdpid_r64);
            rdpid
        }
        Mnemonic::Rdpmc => rdpmc,
        Mnemonic::Xgetbv => xgetbv,
        Mnemonic::Xsetbv => xsetbv,
        _ => return None,
    })
}

fn flags_size(code: Code) -> u8 {
    match code {
        Code::Pushfw | Code::Popfw => 2,
        Code::Pushfd | Code::Popfd => 4,
        _ => 8,
    }
}
