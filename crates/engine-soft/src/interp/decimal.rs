//! The decimal adjustments, which 64-bit mode does not have: DAA, DAS, AAA, AAS, AAM, AAD (Intel SDM 2A). Flags that the architecture
//! leaves undefined follow the result or are cleared.

use crate::cpu::{Cpu, gpr};
use crate::decode::{Ctx, Exec, Flow, Handler, Op};
use iced_x86::Mnemonic;
use ringfort_x86::flags::{AF, CF, PF, SF, ZF};

/// SF, ZF and PF of a byte.
fn result_flags(v: u8) -> u64 {
    let mut f = 0;
    if v & 0x80 != 0 {
        f |= SF;
    }
    if v == 0 {
        f |= ZF;
    }
    if v.count_ones() & 1 == 0 {
        f |= PF;
    }
    f
}

fn packed<const ADD: bool>(cpu: &mut Cpu, _: &Op) -> Exec {
    let old = cpu.reg::<u8>(0);
    let flags = cpu.rflags();
    let low = old & 15 > 9 || flags & AF != 0;
    let high = old > 0x99 || flags & CF != 0;
    let step = if low { 6 } else { 0 } + if high { 0x60 } else { 0 };
    let new = if ADD { old.wrapping_add(step) } else { old.wrapping_sub(step) };
    // DAS also carries when the low correction alone borrows.
    let borrow = !ADD && low && old < 6;
    let carry = if high || borrow { CF } else { 0 };
    cpu.set_reg(0, new);
    cpu.set_arith_flags(result_flags(new) | carry | if low { AF } else { 0 });
    Ok(Flow::Next)
}

fn unpacked<const ADD: bool>(cpu: &mut Cpu, _: &Op) -> Exec {
    let ax = cpu.reg::<u16>(0);
    let adjust = ax & 15 > 9 || cpu.rflags() & AF != 0;
    let new = match (adjust, ADD) {
        (false, _) => ax,
        (true, true) => ax.wrapping_add(0x106),
        // AX minus 6, then AH minus 1.
        (true, false) => ax.wrapping_sub(6).wrapping_sub(0x100),
    };
    let new = new & 0xff0f;
    cpu.set_reg(0, new);
    cpu.set_arith_flags(result_flags(new as u8) | if adjust { AF | CF } else { 0 });
    Ok(Flow::Next)
}

fn aam(cpu: &mut Cpu, op: &Op) -> Exec {
    let base = op.imm as u8;
    let al = cpu.reg::<u8>(0);
    let (Some(high), Some(low)) = (al.checked_div(base), al.checked_rem(base)) else {
        return Err(cpu.de());
    };
    cpu.set_reg(gpr::RAX as u8, u16::from(high) << 8 | u16::from(low));
    cpu.set_arith_flags(result_flags(low));
    Ok(Flow::Next)
}

fn aad(cpu: &mut Cpu, op: &Op) -> Exec {
    let (al, ah) = (cpu.reg::<u8>(0), cpu.reg::<u8>(1));
    let v = al.wrapping_add(ah.wrapping_mul(op.imm as u8));
    cpu.set_reg(gpr::RAX as u8, u16::from(v));
    cpu.set_arith_flags(result_flags(v));
    Ok(Flow::Next)
}

pub(super) fn lower(ctx: &mut Ctx<'_>) -> Option<Handler> {
    Some(match ctx.i.mnemonic() {
        Mnemonic::Daa => packed::<true>,
        Mnemonic::Das => packed::<false>,
        Mnemonic::Aaa => unpacked::<true>,
        Mnemonic::Aas => unpacked::<false>,
        Mnemonic::Aam => aam,
        Mnemonic::Aad => aad,
        _ => return None,
    })
}
