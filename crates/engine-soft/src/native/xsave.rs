//! The XSAVE family: XSAVE, XSAVEOPT, XSAVEC, XSAVES, XRSTOR, XRSTORS (Intel SDM 1 chapter 13), for x87, SSE and AVX state.
//!
//! The modified optimization is not used: XSAVEOPT and XSAVES write every requested component that is in use.

use super::state::{MXCSR_AT, MXCSR_MASK, Pointers, XMM_AT};
use crate::cpu::{Cpu, Trap, gpr};
use crate::decode::{Ctx, Exec, Flow, Handler, Op};
use crate::mmu::Access;
use iced_x86::Mnemonic;
use ringfort_x86::cr::*;

/// Bytes of the legacy region and the header.
pub const XSAVE_HEADER_END: usize = 576;
/// Bytes of the AVX component.
pub const AVX_SIZE: usize = 256;
/// Offset of the AVX component in the standard format (and in the compacted one, where it is the first).
pub const AVX_AT: usize = XSAVE_HEADER_END;
/// Bytes of a standard-format area with all components.
pub const XSAVE_SIZE: usize = AVX_AT + AVX_SIZE;
/// The components that exist.
pub const XCR0_VALID: u64 = XCR0_X87 | XCR0_SSE | XCR0_AVX;

/// Offset of XSTATE_BV; XCOMP_BV follows.
const HEADER: usize = 512;
/// XCOMP_BV: compacted format.
const COMPACTED: u64 = 1 << 63;

fn u64_at(b: &[u8], at: usize) -> u64 {
    let mut v = [0; 8];
    v.copy_from_slice(&b[at..at + 8]);
    u64::from_le_bytes(v)
}

impl Cpu {
    /// The components that are not in their initial configuration (XINUSE).
    pub(crate) fn xinuse(&mut self) -> u64 {
        let x87 = self.x87_image(Pointers::Offset64);
        let mut initial = [0u8; 160];
        initial[..2].copy_from_slice(&0x37fu16.to_le_bytes());
        let zero = |half: std::ops::Range<usize>| {
            self.vec
                .ymm
                .iter()
                .all(|y| u128::from_le_bytes(y.0[half.clone()].try_into().unwrap_or([1; 16])) == 0)
        };
        let mut used = 0;
        if x87 != initial {
            used |= XCR0_X87;
        }
        if !zero(0..16) {
            used |= XCR0_SSE;
        }
        if !zero(16..32) {
            used |= XCR0_AVX;
        }
        used
    }

    fn put_sse(&self, area: &mut [u8], count: usize) {
        for n in 0..count {
            area[XMM_AT + 16 * n..][..16].copy_from_slice(self.xmm(n));
        }
    }

    fn put_avx(&self, area: &mut [u8], count: usize) {
        for n in 0..count {
            area[AVX_AT + 16 * n..][..16].copy_from_slice(&self.vec.ymm[n].0[16..]);
        }
    }

    /// Load or initialise the components of `rfbm` from an area in standard layout.
    fn take_components(&mut self, area: &[u8], rfbm: u64, present: u64, form: Pointers, count: usize) {
        if rfbm & XCR0_X87 != 0 {
            if present & XCR0_X87 != 0 { self.set_x87_image(area, form) } else { self.init_x87() }
        }
        for n in 0..count {
            let y = &mut self.vec.ymm[n].0;
            if rfbm & XCR0_SSE != 0 {
                if present & XCR0_SSE != 0 {
                    y[..16].copy_from_slice(&area[XMM_AT + 16 * n..][..16]);
                } else {
                    y[..16].fill(0);
                }
            }
            if rfbm & XCR0_AVX != 0 {
                if present & XCR0_AVX != 0 {
                    y[16..].copy_from_slice(&area[AVX_AT + 16 * n..][..16]);
                } else {
                    y[16..].fill(0);
                }
            }
        }
    }

    /// The XSAVE area in standard format with everything in it.
    pub fn export_xsave(&mut self) -> Vec<u8> {
        let mut area = vec![0u8; XSAVE_SIZE];
        area[..160].copy_from_slice(&self.x87_image(Pointers::Offset64));
        area[MXCSR_AT..28].copy_from_slice(&self.vec.mxcsr.to_le_bytes());
        area[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
        self.put_sse(&mut area, 16);
        self.put_avx(&mut area, 16);
        area[HEADER..HEADER + 8].copy_from_slice(&XCR0_VALID.to_le_bytes());
        area
    }

    /// Take all x87, SSE and AVX state from a standard-format area. Components that XSTATE_BV lacks, or that lie beyond the area's end,
    /// get their initial values.
    ///
    /// # Errors
    /// What is wrong with the area; nothing has changed then.
    pub fn import_xsave(&mut self, area: &[u8]) -> Result<(), String> {
        if area.len() < XSAVE_HEADER_END {
            return Err(format!("the XSAVE area has {} bytes, {XSAVE_HEADER_END} are the least", area.len()));
        }
        let (mut present, comp) = (u64_at(area, HEADER), u64_at(area, HEADER + 8));
        if comp != 0 {
            return Err("the XSAVE area is compacted; the standard format is wanted".into());
        }
        if present & !XCR0_VALID != 0 {
            return Err(format!(
                "the XSAVE area has components {present:#x}; this engine has {XCR0_VALID:#x}"
            ));
        }
        let mxcsr = u32::from_le_bytes([area[24], area[25], area[26], area[27]]);
        if mxcsr & !MXCSR_MASK != 0 {
            return Err(format!("MXCSR {mxcsr:#x} in the XSAVE area has bits that do not exist"));
        }
        let mut whole = vec![0u8; XSAVE_SIZE];
        let n = area.len().min(XSAVE_SIZE);
        whole[..n].copy_from_slice(&area[..n]);
        if n < XSAVE_SIZE {
            present &= !XCR0_AVX;
        }
        self.take_components(&whole, XCR0_VALID, present, Pointers::Offset64, 16);
        self.vec.mxcsr = mxcsr;
        self.update_vectors();
        Ok(())
    }

    /// Bytes of an area in standard format for the components enabled in XCR0 (CPUID leaf 0DH subleaf 0 EBX).
    pub fn xsave_size(&self) -> u32 {
        if self.xcr0 & XCR0_AVX != 0 { XSAVE_SIZE as u32 } else { XSAVE_HEADER_END as u32 }
    }
}

fn check(cpu: &mut Cpu) -> Result<(), Trap> {
    if cpu.cr4 & CR4_OSXSAVE == 0 {
        return Err(cpu.ud());
    }
    if cpu.cr0 & CR0_TS != 0 {
        return Err(cpu.nm());
    }
    Ok(())
}

fn rfbm(cpu: &Cpu) -> u64 {
    (cpu.regs[gpr::RDX] << 32 | cpu.regs[gpr::RAX] & 0xffff_ffff) & cpu.xcr0
}

/// Operand of an XSAVE or XRSTOR: #GP unless aligned to 64 bytes. Its size depends on what is requested.
fn area(cpu: &mut Cpu, op: &Op, rfbm: u64, access: Access) -> Result<(u64, usize), Trap> {
    let size = if rfbm & XCR0_AVX != 0 { XSAVE_SIZE } else { XSAVE_HEADER_END };
    Ok((cpu.aligned(op, size, 64, access)?, size))
}

fn form(op: &Op) -> Pointers {
    if op.opsize == 8 { Pointers::Offset64 } else { Pointers::Offset32 }
}

const PLAIN: u8 = 0;
const OPT: u8 = 1;
const COMPACT: u8 = 2;
const SUPERVISOR: u8 = 3;

fn xsave<const KIND: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    check(cpu)?;
    if KIND == SUPERVISOR && cpu.cpl != 0 {
        return Err(cpu.gp(0));
    }
    let rfbm = rfbm(cpu);
    let (lin, size) = area(cpu, op, rfbm, Access::Write)?;
    cpu.probe_write(lin, size)?;
    let mut used = cpu.xinuse();
    if KIND >= COMPACT && cpu.vec.mxcsr != 0x1f80 {
        used |= XCR0_SSE;
    }
    // XSAVE writes what is requested, the others what is also in use.
    let write = if KIND == PLAIN { rfbm } else { rfbm & used };
    let mut image = [0u8; XSAVE_SIZE];
    if write & XCR0_X87 != 0 {
        image[..160].copy_from_slice(&cpu.x87_image(form(op)));
        cpu.store_bytes(lin, &image[..MXCSR_AT])?;
        cpu.store_bytes(lin + 32, &image[32..160])?;
    }
    let mxcsr = if KIND >= COMPACT { write & XCR0_SSE } else { rfbm & (XCR0_SSE | XCR0_AVX) };
    if mxcsr != 0 {
        image[MXCSR_AT..28].copy_from_slice(&cpu.vec.mxcsr.to_le_bytes());
        image[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
        cpu.store_bytes(lin + MXCSR_AT as u64, &image[MXCSR_AT..32])?;
    }
    let n = cpu.xmm_count();
    if write & XCR0_SSE != 0 {
        cpu.put_sse(&mut image, n);
        cpu.store_bytes(lin + XMM_AT as u64, &image[XMM_AT..XMM_AT + 16 * n])?;
    }
    if write & XCR0_AVX != 0 {
        cpu.put_avx(&mut image, n);
        cpu.store_bytes(lin + AVX_AT as u64, &image[AVX_AT..AVX_AT + 16 * n])?;
    }
    if KIND >= COMPACT {
        let mut header = [0u8; 64];
        header[..8].copy_from_slice(&(rfbm & used).to_le_bytes());
        header[8..16].copy_from_slice(&(COMPACTED | rfbm).to_le_bytes());
        cpu.store_bytes(lin + HEADER as u64, &header[..16])?;
    } else {
        let mut old = [0u8; 8];
        cpu.load_bytes(lin + HEADER as u64, &mut old)?;
        let bv = u64::from_le_bytes(old) & !rfbm | used & rfbm;
        cpu.store_bytes(lin + HEADER as u64, &bv.to_le_bytes())?;
    }
    Ok(Flow::Next)
}

fn xrstor<const KIND: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    check(cpu)?;
    if KIND == SUPERVISOR && cpu.cpl != 0 {
        return Err(cpu.gp(0));
    }
    let rfbm = rfbm(cpu);
    let lin = cpu.aligned(op, XSAVE_HEADER_END, 64, Access::Read)?;
    let mut data = [0u8; XSAVE_SIZE];
    cpu.load_bytes(lin, &mut data[..XSAVE_HEADER_END])?;
    let (present, comp) = (u64_at(&data, HEADER), u64_at(&data, HEADER + 8));
    let compacted = comp & COMPACTED != 0;
    let good = if compacted {
        comp & !COMPACTED & !cpu.xcr0 == 0
            && present & !comp == 0
            && data[HEADER + 16..XSAVE_HEADER_END].iter().all(|&b| b == 0)
    } else {
        KIND != SUPERVISOR
            && present & !cpu.xcr0 == 0
            && data[HEADER + 8..HEADER + 24].iter().all(|&b| b == 0)
    };
    if !good {
        return Err(cpu.gp(0));
    }
    let mxcsr = u32::from_le_bytes([data[24], data[25], data[26], data[27]]);
    let new_mxcsr = if !compacted {
        (rfbm & (XCR0_SSE | XCR0_AVX) != 0).then_some(mxcsr)
    } else if rfbm & XCR0_SSE != 0 {
        Some(if present & XCR0_SSE != 0 { mxcsr } else { 0x1f80 })
    } else {
        None
    };
    if let Some(v) = new_mxcsr {
        cpu.check_mxcsr(v)?;
    }
    if rfbm & present & XCR0_AVX != 0 {
        let (lin, size) = area(cpu, op, rfbm, Access::Read)?;
        cpu.load_bytes(lin + AVX_AT as u64, &mut data[AVX_AT..size])?;
    }
    if let Some(v) = new_mxcsr {
        cpu.vec.mxcsr = v;
        cpu.update_vectors();
    }
    let count = cpu.xmm_count();
    cpu.take_components(&data, rfbm, present, form(op), count);
    Ok(Flow::Next)
}

pub(super) fn lower(ctx: &mut Ctx<'_>) -> Option<Handler> {
    use Mnemonic as M;
    let (run, long): (Handler, bool) = match ctx.i.mnemonic() {
        M::Xsave => (xsave::<PLAIN>, false),
        M::Xsave64 => (xsave::<PLAIN>, true),
        M::Xsaveopt => (xsave::<OPT>, false),
        M::Xsaveopt64 => (xsave::<OPT>, true),
        M::Xsavec => (xsave::<COMPACT>, false),
        M::Xsavec64 => (xsave::<COMPACT>, true),
        M::Xsaves => (xsave::<SUPERVISOR>, false),
        M::Xsaves64 => (xsave::<SUPERVISOR>, true),
        M::Xrstor => (xrstor::<PLAIN>, false),
        M::Xrstor64 => (xrstor::<PLAIN>, true),
        M::Xrstors => (xrstor::<SUPERVISOR>, false),
        M::Xrstors64 => (xrstor::<SUPERVISOR>, true),
        _ => return None,
    };
    ctx.op.opsize = if long { 8 } else { 4 };
    Some(run)
}
