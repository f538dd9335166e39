//! Whole-register moves, by far the most frequent vector instructions: done here, without a stub.

use super::alignment;
use crate::cpu::{Cpu, Trap, Ymm};
use crate::decode::{Ctx, Exec, Flow, Handler, Op};
use crate::mmu::Access;
use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind};

/// Write the low `N` bytes of a register: a VEX instruction clears the rest, a legacy one keeps it.
#[inline(always)]
fn set<const N: usize, const VEX: bool>(y: &mut Ymm, from: *const u8) {
    // SAFETY: the callers give N readable bytes, which no Rust reference covers but the register's own.
    unsafe { std::ptr::copy(from, y.0.as_mut_ptr(), N) };
    if VEX {
        y.0[N..].fill(0);
    }
}

#[inline(always)]
fn check<const VEX: bool>(cpu: &mut Cpu) -> Result<(), Trap> {
    if VEX { cpu.check_avx() } else { cpu.check_sse() }
}

fn load<const N: usize, const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<VEX>(cpu)?;
    let lin = cpu.linear(op, N, Access::Read)?;
    if lin & u64::from(op.opsize) != 0 {
        return Err(cpu.gp(0));
    }
    let dst = usize::from(op.dst & 15);
    match cpu.probe(lin, N, false) {
        Some(p) => set::<N, VEX>(&mut cpu.vec.ymm[dst], p),
        None => {
            cpu.check_alignment(lin, N.min(16))?;
            let mut buf = [0; N];
            cpu.load_bytes(lin, &mut buf)?;
            set::<N, VEX>(&mut cpu.vec.ymm[dst], buf.as_ptr());
        }
    }
    Ok(Flow::Next)
}

fn store<const N: usize, const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<VEX>(cpu)?;
    let lin = cpu.linear(op, N, Access::Write)?;
    if lin & u64::from(op.opsize) != 0 {
        return Err(cpu.gp(0));
    }
    let from = cpu.vec.ymm[usize::from(op.src & 15)].0;
    match cpu.probe(lin, N, true) {
        // SAFETY: a hit means that N bytes lie in one RAM page that may be written without notice.
        Some(p) => unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), p, N) },
        None => {
            cpu.check_alignment(lin, N.min(16))?;
            cpu.store_bytes(lin, &from[..N])?;
        }
    }
    Ok(Flow::Next)
}

fn copy<const N: usize, const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<VEX>(cpu)?;
    let from = cpu.vec.ymm[usize::from(op.src & 15)];
    set::<N, VEX>(&mut cpu.vec.ymm[usize::from(op.dst & 15)], from.0.as_ptr());
    Ok(Flow::Next)
}

fn is_move(i: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        i.mnemonic(),
        M::Movaps
            | M::Movups
            | M::Movapd
            | M::Movupd
            | M::Movdqa
            | M::Movdqu
            | M::Lddqu
            | M::Movntps
            | M::Movntpd
            | M::Movntdq
            | M::Movntdqa
            | M::Vmovaps
            | M::Vmovups
            | M::Vmovapd
            | M::Vmovupd
            | M::Vmovdqa
            | M::Vmovdqu
            | M::Vlddqu
            | M::Vmovntps
            | M::Vmovntpd
            | M::Vmovntdq
            | M::Vmovntdqa
    )
}

pub(super) fn lower(ctx: &mut Ctx<'_>) -> Option<Handler> {
    let i = ctx.i;
    let vex = match i.encoding() {
        EncodingKind::Legacy => false,
        EncodingKind::VEX => true,
        _ => return None,
    };
    if !is_move(i) {
        return None;
    }
    let wide = (0..2).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_ymm());
    ctx.op.opsize = alignment(i).wrapping_sub(1);
    Some(match (i.op0_kind(), i.op1_kind(), vex, wide) {
        (OpKind::Register, OpKind::Register, false, _) => copy::<16, false>,
        (OpKind::Register, OpKind::Register, _, false) => copy::<16, true>,
        (OpKind::Register, OpKind::Register, ..) => copy::<32, true>,
        (OpKind::Register, _, false, _) => load::<16, false>,
        (OpKind::Register, _, _, false) => load::<16, true>,
        (OpKind::Register, ..) => load::<32, true>,
        (_, _, false, _) => store::<16, false>,
        (_, _, _, false) => store::<16, true>,
        _ => store::<32, true>,
    })
}
