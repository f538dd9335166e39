//! FXSAVE, FXRSTOR, LDMXCSR, STMXCSR, VZEROALL, VZEROUPPER, MOVNTI, and the images that they and the XSAVE family share.

use crate::cpu::{Cpu, Trap};
use crate::decode::{Ctx, Exec, Flow, Handler, Op};
use crate::mmu::Access;
use iced_x86::{Code, Mnemonic};
use ringfort_x86::cr::*;

/// The MXCSR bits that exist: no misaligned-SSE mode.
pub const MXCSR_MASK: u32 = 0xffff;

/// Offset of MXCSR in an FXSAVE image; MXCSR_MASK follows.
pub(super) const MXCSR_AT: usize = 24;
/// Offset of XMM0 in an FXSAVE image.
pub(super) const XMM_AT: usize = 160;

/// How instruction and data pointers stand in an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pointers {
    /// 64-bit offsets (REX.W).
    Offset64,
    /// 32-bit offset, selector.
    Offset32,
}

impl Cpu {
    /// How many XMM registers the mode has.
    pub(super) fn xmm_count(&self) -> usize {
        if self.code64() { 16 } else { 8 }
    }

    /// The x87 part (bytes 0 to 159, without MXCSR) of an FXSAVE image.
    pub(super) fn x87_image(&mut self, form: Pointers) -> [u8; 160] {
        self.fpu_save();
        let mut out = [0u8; 160];
        out.copy_from_slice(&self.fpu.image[..160]);
        let f = &self.fpu;
        out[6..8].copy_from_slice(&(f.fop & 0x7ff).to_le_bytes());
        match form {
            Pointers::Offset64 => {
                out[8..16].copy_from_slice(&f.fip.to_le_bytes());
                out[16..24].copy_from_slice(&f.fdp.to_le_bytes());
            }
            Pointers::Offset32 => {
                for (at, offset, selector) in [(8, f.fip, f.fcs), (16, f.fdp, f.fds)] {
                    out[at..at + 4].copy_from_slice(&(offset as u32).to_le_bytes());
                    out[at + 4..at + 6].copy_from_slice(&selector.to_le_bytes());
                    out[at + 6..at + 8].fill(0);
                }
            }
        }
        out[5] = 0;
        out[MXCSR_AT..32].fill(0);
        for st in out[32..].chunks_exact_mut(16) {
            st[10..].fill(0);
        }
        out
    }

    /// Take the x87 part from an FXSAVE image.
    pub(super) fn set_x87_image(&mut self, image: &[u8], form: Pointers) {
        self.fpu_save();
        let w = |at: usize| u16::from_le_bytes([image[at], image[at + 1]]);
        let d = |at: usize| u64::from(w(at)) | u64::from(w(at + 2)) << 16;
        let f = &mut self.fpu;
        f.image[..160].copy_from_slice(&image[..160]);
        f.fop = w(6) & 0x7ff;
        (f.fip, f.fdp) = (d(8), d(16));
        match form {
            Pointers::Offset64 => {
                f.fip |= d(12) << 32;
                f.fdp |= d(20) << 32;
                (f.fcs, f.fds) = (0, 0);
            }
            Pointers::Offset32 => (f.fcs, f.fds) = (w(12), w(20)),
        }
        // The host's own pointers are never looked at; keep guest values out of them.
        f.image[6..24].fill(0);
        // The summary bits follow the exceptions and their masks, whatever the image says.
        let pending = f.image[2] & !f.image[0] & 0x3f != 0;
        f.image[2] = f.image[2] & 0x7f | u8::from(pending) << 7;
        f.image[3] = f.image[3] & 0x7f | u8::from(pending) << 7;
    }

    /// The x87 state that FNINIT leaves, with registers zeroed.
    pub(super) fn init_x87(&mut self) {
        self.fpu_save();
        self.fpu.image[..160].fill(0);
        self.fpu.image[..2].copy_from_slice(&0x37fu16.to_le_bytes());
        self.clear_pointers();
    }

    /// XMM register `n`.
    pub(super) fn xmm(&self, n: usize) -> &[u8] {
        &self.vec.ymm[n].0[..16]
    }

    /// #GP if `v` has bits that MXCSR has not.
    ///
    /// # Errors
    /// #GP(0).
    pub(super) fn check_mxcsr(&mut self, v: u32) -> Result<(), Trap> {
        if v & !MXCSR_MASK != 0 { Err(self.gp(0)) } else { Ok(()) }
    }

    /// The linear address of `op`'s operand, which must be aligned to `align`.
    pub(super) fn aligned(&mut self, op: &Op, size: usize, align: u64, access: Access) -> Result<u64, Trap> {
        let lin = self.linear(op, size, access)?;
        if lin & (align - 1) != 0 {
            return Err(self.gp(0));
        }
        Ok(lin)
    }
}

fn check_fx(cpu: &mut Cpu) -> Result<(), Trap> {
    if cpu.cr0 & (CR0_EM | CR0_TS) != 0 { Err(cpu.nm()) } else { Ok(()) }
}

fn form(op: &Op) -> Pointers {
    if op.opsize == 8 { Pointers::Offset64 } else { Pointers::Offset32 }
}

fn fxsave(cpu: &mut Cpu, op: &Op) -> Exec {
    check_fx(cpu)?;
    let lin = cpu.aligned(op, 512, 16, Access::Write)?;
    cpu.probe_write(lin, 512)?;
    let mut out = [0u8; 416];
    out[..160].copy_from_slice(&cpu.x87_image(form(op)));
    out[MXCSR_AT..28].copy_from_slice(&cpu.vec.mxcsr.to_le_bytes());
    out[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
    let mut len = XMM_AT;
    if cpu.cr4 & CR4_OSFXSR != 0 {
        len += 16 * cpu.xmm_count();
        for n in 0..cpu.xmm_count() {
            out[XMM_AT + 16 * n..][..16].copy_from_slice(cpu.xmm(n));
        }
    }
    cpu.store_bytes(lin, &out[..len])?;
    Ok(Flow::Next)
}

fn fxrstor(cpu: &mut Cpu, op: &Op) -> Exec {
    check_fx(cpu)?;
    let lin = cpu.aligned(op, 512, 16, Access::Read)?;
    let mut image = [0u8; 512];
    cpu.load_bytes(lin, &mut image)?;
    let sse = cpu.cr4 & CR4_OSFXSR != 0;
    if sse {
        let mxcsr = u32::from_le_bytes([image[24], image[25], image[26], image[27]]);
        cpu.check_mxcsr(mxcsr)?;
        cpu.vec.mxcsr = mxcsr;
        cpu.update_vectors();
        for n in 0..cpu.xmm_count() {
            cpu.vec.ymm[n].0[..16].copy_from_slice(&image[XMM_AT + 16 * n..][..16]);
        }
    }
    cpu.set_x87_image(&image, form(op));
    Ok(Flow::Next)
}

fn ldmxcsr<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    if VEX {
        cpu.check_avx()?
    } else {
        cpu.check_sse()?
    }
    let lin = cpu.linear(op, 4, Access::Read)?;
    let v = cpu.load::<u32>(lin)?;
    cpu.check_mxcsr(v)?;
    cpu.vec.mxcsr = v;
    cpu.update_vectors();
    Ok(Flow::Next)
}

fn stmxcsr<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    if VEX {
        cpu.check_avx()?
    } else {
        cpu.check_sse()?
    }
    let lin = cpu.linear(op, 4, Access::Write)?;
    cpu.store::<u32>(lin, cpu.vec.mxcsr)?;
    Ok(Flow::Next)
}

fn vzeroupper(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.check_avx()?;
    let n = cpu.xmm_count();
    cpu.vec.ymm[..n].iter_mut().for_each(|y| y.0[16..].fill(0));
    Ok(Flow::Next)
}

fn vzeroall(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.check_avx()?;
    let n = cpu.xmm_count();
    cpu.vec.ymm[..n].fill(Default::default());
    Ok(Flow::Next)
}

fn movnti<const LONG: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    if LONG {
        let lin = cpu.linear(op, 8, Access::Write)?;
        cpu.store::<u64>(lin, cpu.reg(op.src))?;
    } else {
        let lin = cpu.linear(op, 4, Access::Write)?;
        cpu.store::<u32>(lin, cpu.reg(op.src))?;
    }
    Ok(Flow::Next)
}

pub(super) fn lower(ctx: &mut Ctx<'_>) -> Option<Handler> {
    ctx.op.opsize = match ctx.i.code() {
        Code::Fxsave64_m512byte | Code::Fxrstor64_m512byte => 8,
        _ => ctx.op.opsize,
    };
    if matches!(ctx.i.code(), Code::Fxsave_m512byte | Code::Fxrstor_m512byte) {
        ctx.op.opsize = 4;
    }
    Some(match ctx.i.mnemonic() {
        Mnemonic::Fxsave | Mnemonic::Fxsave64 => fxsave,
        Mnemonic::Fxrstor | Mnemonic::Fxrstor64 => fxrstor,
        Mnemonic::Ldmxcsr => ldmxcsr::<false>,
        Mnemonic::Vldmxcsr => ldmxcsr::<true>,
        Mnemonic::Stmxcsr => stmxcsr::<false>,
        Mnemonic::Vstmxcsr => stmxcsr::<true>,
        Mnemonic::Vzeroupper => vzeroupper,
        Mnemonic::Vzeroall => vzeroall,
        Mnemonic::Movnti if ctx.width(1) == 8 => movnti::<true>,
        Mnemonic::Movnti => movnti::<false>,
        _ => return None,
    })
}
