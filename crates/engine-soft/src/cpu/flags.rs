//! RFLAGS: the arithmetic flags live in [`Cpu::arith`] in LAHF/SETO form, the others in [`Cpu::sys_flags`].
//!
//! That form costs two one-cycle instructions after a natively executed ALU operation and keeps every flag exactly as the host's
//! CPU defines it, the undefined ones included.

use super::Cpu;
use ringfort_x86::flags::*;

/// [`Cpu::arith`]: carry.
pub const A_CF: u16 = 1 << 8;
/// [`Cpu::arith`]: parity.
pub const A_PF: u16 = 1 << 10;
/// [`Cpu::arith`]: auxiliary carry.
pub const A_AF: u16 = 1 << 12;
/// [`Cpu::arith`]: zero.
pub const A_ZF: u16 = 1 << 14;
/// [`Cpu::arith`]: sign.
pub const A_SF: u16 = 1 << 15;
/// [`Cpu::arith`]: overflow.
pub const A_OF: u16 = 1 << 0;

/// A condition code as encoded in Jcc, SETcc, CMOVcc: 0 O, 1 NO, 2 B, 3 AE, 4 E, 5 NE, 6 BE, 7 A, 8 S, 9 NS, 10 P, 11 NP, 12 L, 13 GE,
/// 14 LE, 15 G.
pub type Cond = u8;

/// Whether condition `C` holds for flags in [`Cpu::arith`] form.
#[inline(always)]
pub fn cond<const C: u8>(arith: u16) -> bool {
    let holds = match C >> 1 {
        0 => arith & A_OF != 0,
        1 => arith & A_CF != 0,
        2 => arith & A_ZF != 0,
        3 => arith & (A_CF | A_ZF) != 0,
        4 => arith & A_SF != 0,
        5 => arith & A_PF != 0,
        6 => (arith >> 15 ^ arith) & 1 != 0,
        _ => (arith >> 15 ^ arith) & 1 != 0 || arith & A_ZF != 0,
    };
    holds ^ (C & 1 != 0)
}

impl Cpu {
    /// RFLAGS, whole.
    pub fn rflags(&self) -> u64 {
        let ah = u64::from(self.arith >> 8) & (SF | ZF | AF | PF | CF);
        let of = u64::from(self.arith & 1) << 11;
        ah | of | self.sys_flags | FIXED
    }

    /// Replace the arithmetic flags by those of `v` (an RFLAGS value).
    #[inline]
    pub fn set_arith_flags(&mut self, v: u64) {
        self.arith = ((v & (SF | ZF | AF | PF | CF) | FIXED) << 8 | (v >> 11 & 1)) as u16;
    }

    /// Replace all of RFLAGS: bits that do not exist are dropped. What follows from TF, VM and AC is the caller's to update
    /// ([`Cpu::update_mmu_mode`] for AC and VM, [`Cpu::update_code_size`] for VM); TF is seen at the next instruction.
    pub fn set_rflags_raw(&mut self, v: u64) {
        self.set_arith_flags(v);
        self.sys_flags = v & (VALID & !ARITH);
    }

    /// CF.
    #[inline(always)]
    pub fn cf(&self) -> bool {
        self.arith & A_CF != 0
    }

    /// Set or clear CF.
    #[inline(always)]
    pub fn set_cf(&mut self, on: bool) {
        self.arith = self.arith & !A_CF | u16::from(on) << 8;
    }

    /// The step of string operations: `size` upwards, minus `size` (two's complement) with DF.
    #[inline(always)]
    pub fn string_step(&self, size: u64) -> u64 {
        if self.sys_flags & DF == 0 { size } else { size.wrapping_neg() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_agree_with_their_definitions() {
        for bits in 0..64u64 {
            let (cf, pf, af, zf, sf, of) =
                (bits & 1, bits >> 1 & 1, bits >> 2 & 1, bits >> 3 & 1, bits >> 4 & 1, bits >> 5);
            let arith = (sf << 15 | zf << 14 | af << 12 | pf << 10 | cf << 8 | of) as u16;
            let want = [of, cf, zf, cf | zf, sf, pf, sf ^ of, sf ^ of | zf];
            let got = [
                cond::<0>(arith),
                cond::<2>(arith),
                cond::<4>(arith),
                cond::<6>(arith),
                cond::<8>(arith),
                cond::<10>(arith),
                cond::<12>(arith),
                cond::<14>(arith),
            ];
            let neg = [
                cond::<1>(arith),
                cond::<3>(arith),
                cond::<5>(arith),
                cond::<7>(arith),
                cond::<9>(arith),
                cond::<11>(arith),
                cond::<13>(arith),
                cond::<15>(arith),
            ];
            for i in 0..8 {
                assert_eq!(got[i], want[i] != 0, "{bits:06b} condition {}", i * 2);
                assert_eq!(neg[i], want[i] == 0);
            }
        }
    }
}
