//! Instructions that access memory by elements, each only if its mask says so: AVX2 gathers, VMASKMOV and VPMASKMOV (where what is
//! masked off never faults), MASKMOVQ and MASKMOVDQU.

use crate::cpu::{Cpu, Int, Trap, gpr};
use crate::decode::{Ctx, Exec, Flow, Handler, Op, op_flags};
use crate::mmu::Access;
use iced_x86::{EncodingKind, Mnemonic, OpKind};
use std::arch::asm;

impl Cpu {
    /// The linear address of an element `distance` bytes from `op`'s base address.
    #[inline(always)]
    fn element(&mut self, op: &Op, distance: u64, size: usize, access: Access) -> Result<u64, Trap> {
        let ea = self.effective(op).wrapping_add(distance);
        if op.flags & op_flags::FLAT != 0 {
            Ok(ea)
        } else if op.flags & op_flags::FLAT32 != 0 {
            Ok(u64::from(ea as u32))
        } else {
            self.segmented(op.seg.into(), self.truncate(op, ea), size, access)
        }
    }

    /// Load one element: never an alignment check.
    #[inline(always)]
    fn load_element<T: Int>(&mut self, lin: u64) -> Result<T, Trap> {
        if self.probe(lin, T::SIZE, false).is_some() {
            return self.load(lin);
        }
        let mut v = [0; 8];
        self.load_bytes(lin, &mut v[..T::SIZE])?;
        Ok(T::from_u64(u64::from_le_bytes(v)))
    }

    #[inline(always)]
    fn lane<T: Int>(&self, reg: usize, n: usize) -> T {
        let mut v = [0; 8];
        v[..T::SIZE].copy_from_slice(&self.vec.ymm[reg].0[n * T::SIZE..][..T::SIZE]);
        T::from_u64(u64::from_le_bytes(v))
    }

    #[inline(always)]
    fn set_lane<T: Int>(&mut self, reg: usize, n: usize, v: T) {
        self.vec.ymm[reg].0[n * T::SIZE..][..T::SIZE].copy_from_slice(&v.to_u64().to_le_bytes()[..T::SIZE]);
    }
}

/// A gather of elements `T` by indices `I`: `dst`, index (in `imm`), mask (`third`); `aux` elements.
///
/// A fault leaves what was gathered before it in the destination, with those elements' masks cleared (Intel SDM 2C, VGATHERDPS).
fn gather<T: Int, I: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.check_avx()?;
    let (dst, index, mask) = (usize::from(op.dst), op.imm as usize, usize::from(op.third));
    if dst == index || dst == mask || index == mask {
        return Err(cpu.ud());
    }
    let count = op.aux as usize;
    let wanted: u32 = (0..count).filter(|&n| cpu.lane::<T>(mask, n).to_i64() < 0).map(|n| 1 << n).sum();
    for n in 0..count {
        if wanted >> n & 1 == 0 {
            continue;
        }
        let distance = (cpu.lane::<I>(index, n).to_i64() as u64) << op.scale;
        let loaded = match cpu.element(op, distance, T::SIZE, Access::Read) {
            Ok(lin) => cpu.load_element::<T>(lin),
            Err(t) => Err(t),
        };
        match loaded {
            Ok(v) => cpu.set_lane(dst, n, v),
            Err(t) => {
                cpu.vec.ymm[mask].0[..n * T::SIZE].fill(0);
                return Err(t);
            }
        }
    }
    cpu.vec.ymm[dst].0[count * T::SIZE..].fill(0);
    cpu.vec.ymm[mask].0.fill(0);
    Ok(Flow::Next)
}

/// VMASKMOVPS and relatives, load: `dst`, mask (`src`); `aux` elements.
fn masked_load<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.check_avx()?;
    let mask = usize::from(op.src);
    let mut out = crate::cpu::Ymm::default();
    for n in 0..op.aux as usize {
        if cpu.lane::<T>(mask, n).to_i64() < 0 {
            let lin = cpu.element(op, (n * T::SIZE) as u64, T::SIZE, Access::Read)?;
            let v = cpu.load_element::<T>(lin)?;
            out.0[n * T::SIZE..][..T::SIZE].copy_from_slice(&v.to_u64().to_le_bytes()[..T::SIZE]);
        }
    }
    cpu.vec.ymm[usize::from(op.dst)] = out;
    Ok(Flow::Next)
}

/// Store the elements of `data` that `on` names, all or none.
fn store_elements<T: Int>(
    cpu: &mut Cpu,
    op: &Op,
    count: usize,
    on: impl Fn(usize) -> bool,
    data: &[u8],
) -> Result<(), Trap> {
    for n in (0..count).filter(|&n| on(n)) {
        let lin = cpu.element(op, (n * T::SIZE) as u64, T::SIZE, Access::Write)?;
        if cpu.probe(lin, T::SIZE, true).is_none() {
            cpu.probe_write(lin, T::SIZE)?;
        }
    }
    for n in (0..count).filter(|&n| on(n)) {
        let lin = cpu.element(op, (n * T::SIZE) as u64, T::SIZE, Access::Write)?;
        let from = &data[n * T::SIZE..][..T::SIZE];
        match cpu.probe(lin, T::SIZE, true) {
            // SAFETY: a hit means that the bytes lie in one RAM page that may be written without notice.
            Some(p) => unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), p, T::SIZE) },
            None => cpu.store_bytes(lin, from)?,
        }
    }
    Ok(())
}

/// VMASKMOVPS and relatives, store: mask (`src`), data (`third`); `aux` elements.
fn masked_store<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.check_avx()?;
    let mask = cpu.vec.ymm[usize::from(op.src)];
    let data = cpu.vec.ymm[usize::from(op.third)];
    let on = |n: usize| mask.0[(n + 1) * T::SIZE - 1] & 0x80 != 0;
    store_elements::<T>(cpu, op, op.aux as usize, on, &data.0)?;
    Ok(Flow::Next)
}

/// MASKMOVQ and MASKMOVDQU fault for the whole operand, as a store of it would (the manuals leave it open; AMD's CPUs do so).
fn store_bytewise<const N: usize>(cpu: &mut Cpu, op: &Op, data: &[u8], mask: &[u8]) -> Exec {
    let lin = cpu.element(op, 0, N, Access::Write)?;
    if cpu.probe(lin, N, true).is_none() {
        cpu.check_alignment(lin, 8)?;
        cpu.probe_write(lin, N)?;
    }
    store_elements::<u8>(cpu, op, N, |n| mask[n] & 0x80 != 0, data)?;
    Ok(Flow::Next)
}

fn maskmovdqu<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    if VEX {
        cpu.check_avx()?
    } else {
        cpu.check_sse()?
    }
    let data = cpu.vec.ymm[usize::from(op.src)];
    let mask = cpu.vec.ymm[usize::from(op.third)];
    store_bytewise::<16>(cpu, op, &data.0, &mask.0)
}

fn maskmovq(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.check_mmx()?;
    cpu.check_pending()?;
    cpu.own_fpu();
    let data = mm(op.src).to_le_bytes();
    let mask = mm(op.third).to_le_bytes();
    store_bytewise::<8>(cpu, op, &data, &mask)
}

/// MMX register `n` of the guest, which owns the host's registers. Nothing may be pending.
fn mm(n: u8) -> u64 {
    let mut v = 0u64;
    macro_rules! read {
        ($reg:literal) => {
            // SAFETY: stores an MMX register to a local; the x87 registers are the guest's.
            unsafe { asm!(concat!("movq [{0}], ", $reg), in(reg) &mut v, options(nostack)) }
        };
    }
    match n {
        0 => read!("mm0"),
        1 => read!("mm1"),
        2 => read!("mm2"),
        3 => read!("mm3"),
        4 => read!("mm4"),
        5 => read!("mm5"),
        6 => read!("mm6"),
        _ => read!("mm7"),
    }
    v
}

/// Whether an instruction accesses memory by elements.
pub(super) fn by_element(m: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        m,
        M::Vgatherdps
            | M::Vpgatherdd
            | M::Vgatherqps
            | M::Vpgatherqd
            | M::Vgatherdpd
            | M::Vpgatherdq
            | M::Vgatherqpd
            | M::Vpgatherqq
            | M::Vmaskmovps
            | M::Vpmaskmovd
            | M::Vmaskmovpd
            | M::Vpmaskmovq
            | M::Maskmovdqu
            | M::Vmaskmovdqu
            | M::Maskmovq
    )
}

pub(super) fn lower(ctx: &mut Ctx<'_>) -> Option<Handler> {
    use Mnemonic as M;
    let i = ctx.i;
    if !matches!(i.encoding(), EncodingKind::Legacy | EncodingKind::VEX) {
        return None;
    }
    let m = i.mnemonic();
    let run: Handler = match m {
        M::Vgatherdps | M::Vpgatherdd => gather::<u32, u32>,
        M::Vgatherqps | M::Vpgatherqd => gather::<u32, u64>,
        M::Vgatherdpd | M::Vpgatherdq => gather::<u64, u32>,
        M::Vgatherqpd | M::Vpgatherqq => gather::<u64, u64>,
        M::Vmaskmovps | M::Vpmaskmovd if i.op0_kind() == OpKind::Memory => masked_store::<u32>,
        M::Vmaskmovpd | M::Vpmaskmovq if i.op0_kind() == OpKind::Memory => masked_store::<u64>,
        M::Vmaskmovps | M::Vpmaskmovd => masked_load::<u32>,
        M::Vmaskmovpd | M::Vpmaskmovq => masked_load::<u64>,
        M::Maskmovdqu => maskmovdqu::<false>,
        M::Vmaskmovdqu => maskmovdqu::<true>,
        M::Maskmovq => maskmovq,
        _ => return None,
    };
    let quads = matches!(m, M::Vmaskmovpd | M::Vpmaskmovq);
    match m {
        M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu => {
            ctx.op.base = gpr::RDI as u8;
            ctx.op.flags |= op_flags::MEM;
        }
        M::Vmaskmovps | M::Vpmaskmovd | M::Vmaskmovpd | M::Vpmaskmovq => {
            ctx.op.aux = (i.op1_register().size() / if quads { 8 } else { 4 }) as u64;
        }
        _ => {
            let index = i.memory_index();
            let by_qword_index = matches!(m, M::Vgatherqps | M::Vpgatherqd | M::Vgatherqpd | M::Vpgatherqq);
            let wide = matches!(m, M::Vgatherdpd | M::Vpgatherdq);
            let bytes = if by_qword_index { index.size() } else { i.op0_register().size() };
            ctx.op.aux = (bytes / if by_qword_index || wide { 8 } else { 4 }) as u64;
            ctx.op.imm = index.number() as u64;
        }
    }
    Some(run)
}
