//! FNSTENV, FLDENV, FNSAVE, FRSTOR: the x87 environment in its four memory formats (Intel SDM 1 section 8.1.10).
//!
//! The host stores and loads its own 32-bit format; what differs is converted, and the pointers are those kept in software.

use super::Scratch;
use super::x87::fnstsw;
use crate::cpu::Cpu;
use crate::decode::{Exec, Flow, Op};
use crate::mmu::Access;
use std::arch::asm;

/// Bytes of an environment in 32-bit format.
const ENV32: usize = 28;
/// Bytes of an environment in 16-bit format.
const ENV16: usize = 14;
/// Bytes of the eight registers that follow it in a save image.
const REGS: usize = 80;

/// The parts of an environment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Environment {
    /// Control, status, tag word.
    words: [u16; 3],
    fip: u64,
    fcs: u16,
    fop: u16,
    fdp: u64,
    fds: u16,
}

impl Environment {
    /// In memory format: `long` for 32-bit, `real` for the formats of real and virtual-8086 mode. The number of bytes.
    fn write(&self, long: bool, real: bool, out: &mut [u8]) -> usize {
        let (fip, fdp) = (self.fip as u32, self.fdp as u32);
        // In the real formats pointers are linear addresses.
        let (lip, ldp) =
            ((u32::from(self.fcs) << 4).wrapping_add(fip), (u32::from(self.fds) << 4).wrapping_add(fdp));
        let fop = u32::from(self.fop & 0x7ff);
        if long {
            let [cw, sw, tw] = self.words.map(|w| u32::from(w) | 0xffff_0000);
            let all = if real {
                [cw, sw, tw, lip & 0xffff, lip >> 16 << 12 | fop, ldp & 0xffff, ldp >> 16 << 12]
            } else {
                [cw, sw, tw, fip, u32::from(self.fcs) | fop << 16, fdp, u32::from(self.fds) | 0xffff_0000]
            };
            for (o, v) in out.chunks_exact_mut(4).zip(all) {
                o.copy_from_slice(&v.to_le_bytes());
            }
            ENV32
        } else {
            let [cw, sw, tw] = self.words;
            let all = if real {
                let high = |p: u32| (p >> 16 << 12) as u16;
                [cw, sw, tw, lip as u16, high(lip) | fop as u16, ldp as u16, high(ldp)]
            } else {
                [cw, sw, tw, fip as u16, self.fcs, fdp as u16, self.fds]
            };
            for (o, v) in out.chunks_exact_mut(2).zip(all) {
                o.copy_from_slice(&v.to_le_bytes());
            }
            ENV16
        }
    }

    /// From memory format. Pointers of the real formats become offsets with a selector of 0.
    fn read(long: bool, real: bool, data: &[u8]) -> Environment {
        let w = |n: usize| u16::from_le_bytes([data[n], data[n + 1]]);
        let d = |n: usize| u32::from_le_bytes([data[n], data[n + 1], data[n + 2], data[n + 3]]);
        match (long, real) {
            (true, false) => Environment {
                words: [w(0), w(4), w(8)],
                fip: d(12).into(),
                fcs: w(16),
                fop: w(18) & 0x7ff,
                fdp: d(20).into(),
                fds: w(24),
            },
            (true, true) => Environment {
                words: [w(0), w(4), w(8)],
                fip: u64::from(w(12)) | u64::from(d(16) >> 12 & 0xffff) << 16,
                fop: w(16) & 0x7ff,
                fdp: u64::from(w(20)) | u64::from(d(24) >> 12 & 0xffff) << 16,
                ..Environment::default()
            },
            (false, false) => Environment {
                words: [w(0), w(2), w(4)],
                fip: w(6).into(),
                fcs: w(8),
                fop: 0,
                fdp: w(10).into(),
                fds: w(12),
            },
            (false, true) => Environment {
                words: [w(0), w(2), w(4)],
                fip: u64::from(w(6)) | u64::from(w(8) >> 12) << 16,
                fop: w(8) & 0x7ff,
                fdp: u64::from(w(10)) | u64::from(w(12) >> 12) << 16,
                ..Environment::default()
            },
        }
    }
}

impl Cpu {
    /// The environment, with words as the host stored them at the start of `host`.
    fn environment(&self, host: &[u8]) -> Environment {
        let w = |n: usize| u16::from_le_bytes([host[n], host[n + 1]]);
        let f = &self.fpu;
        Environment { words: [w(0), w(4), w(8)], fip: f.fip, fcs: f.fcs, fop: f.fop, fdp: f.fdp, fds: f.fds }
    }

    fn set_pointers(&mut self, e: &Environment) {
        let f = &mut self.fpu;
        (f.fip, f.fcs, f.fop, f.fdp, f.fds) = (e.fip, e.fcs, e.fop, e.fdp, e.fds);
    }
}

pub(super) fn fnstenv(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.check_x87()?;
    let long = op.opsize == 4;
    let size = if long { ENV32 } else { ENV16 };
    let lin = cpu.linear(op, size, Access::Write)?;
    cpu.check_alignment(lin, op.opsize.into())?;
    cpu.probe_write(lin, size)?;
    let mut host = Scratch([0; 64]);
    // SAFETY: stores 28 bytes to the buffer; never faults. It masks all exceptions, as the guest's shall be.
    unsafe { asm!("fnstenv [{0}]", in(reg) host.0.as_mut_ptr(), options(nostack)) };
    let mut out = [0; ENV32];
    let n = cpu.environment(&host.0).write(long, cpu.real_segments(), &mut out);
    cpu.store_bytes(lin, &out[..n])?;
    Ok(Flow::Next)
}

pub(super) fn fnsave(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.check_x87()?;
    let long = op.opsize == 4;
    let size = REGS + if long { ENV32 } else { ENV16 };
    let lin = cpu.linear(op, size, Access::Write)?;
    cpu.check_alignment(lin, op.opsize.into())?;
    cpu.probe_write(lin, size)?;
    let mut host = [0u8; ENV32 + REGS];
    // SAFETY: stores 108 bytes to the buffer and initialises the registers, which are the guest's; never faults.
    unsafe { asm!("fnsave [{0}]", in(reg) host.as_mut_ptr(), options(nostack)) };
    let mut out = [0; ENV32 + REGS];
    let n = cpu.environment(&host).write(long, cpu.real_segments(), &mut out[..ENV32]);
    out[n..n + REGS].copy_from_slice(&host[ENV32..]);
    cpu.clear_pointers();
    cpu.store_bytes(lin, &out[..size])?;
    Ok(Flow::Next)
}

pub(super) fn fldenv(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.check_x87()?;
    cpu.check_pending()?;
    let long = op.opsize == 4;
    let size = if long { ENV32 } else { ENV16 };
    let lin = cpu.linear(op, size, Access::Read)?;
    cpu.check_alignment(lin, op.opsize.into())?;
    let mut data = [0; ENV32];
    cpu.load_bytes(lin, &mut data[..size])?;
    let e = Environment::read(long, cpu.real_segments(), &data);
    cpu.set_pointers(&e);
    load_host_env(&e, None);
    Ok(Flow::Next)
}

pub(super) fn frstor(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.check_x87()?;
    cpu.check_pending()?;
    let long = op.opsize == 4;
    let env = if long { ENV32 } else { ENV16 };
    let lin = cpu.linear(op, env + REGS, Access::Read)?;
    cpu.check_alignment(lin, op.opsize.into())?;
    let mut data = [0; ENV32 + REGS];
    cpu.load_bytes(lin, &mut data[..env + REGS])?;
    let e = Environment::read(long, cpu.real_segments(), &data);
    cpu.set_pointers(&e);
    load_host_env(&e, Some(&data[env..env + REGS]));
    Ok(Flow::Next)
}

/// Load the host's x87 environment (and registers) from the guest's.
fn load_host_env(e: &Environment, regs: Option<&[u8]>) {
    let mut image = [0u8; ENV32 + REGS];
    Environment { words: e.words, ..Environment::default() }.write(true, false, &mut image[..ENV32]);
    // FLDENV and FRSTOR wait, so what is pending (and has been dealt with) must go first; they replace it anyway.
    if fnstsw() & 0x80 != 0 {
        // SAFETY: never faults.
        unsafe { asm!("fnclex", options(nomem, nostack)) };
    }
    match regs {
        Some(r) => {
            image[ENV32..].copy_from_slice(r);
            // SAFETY: loads 108 bytes; nothing is pending, so it does not fault.
            unsafe { asm!("frstor [{0}]", in(reg) image.as_ptr(), options(nostack)) };
        }
        // SAFETY: loads 28 bytes; nothing is pending, so it does not fault.
        None => unsafe { asm!("fldenv [{0}]", in(reg) image.as_ptr(), options(nostack)) },
    }
}
