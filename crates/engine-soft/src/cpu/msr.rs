//! Model-specific registers (Intel SDM 4; AMD APM 2 appendix A). Unknown ones are #GP(0), as under KVM, but for a few that systems
//! probe without looking first.

use super::segmentation::canonical;
use super::{Cpu, Trap};
use ringfort_x86::msr::*;
use ringfort_x86::segment::{FS, GS};

/// Machine-check banks.
const BANKS: u32 = 10;
/// Variable MTRRs.
const VARIABLE_MTRRS: u32 = 8;
/// MTRRCAP: 8 variable ranges, fixed ranges, write combining.
const MTRRCAP: u64 = 0x508;
/// PAT after reset (Intel SDM 3A table 12-12).
const PAT_RESET: u64 = 0x0007_0406_0007_0406;
const IA32_FLUSH_CMD: u32 = 0x10b;
const AMD_TSEG_ADDR: u32 = 0xc001_0112;
const AMD_TSEG_MASK: u32 = 0xc001_0113;
const AMD_HSAVE: u32 = 0xc001_0117;
const AMD_NB_CFG: u32 = 0xc001_001f;
const AMD_PATCH_LOADER: u32 = 0xc001_0020;
const AMD_DC_CFG: u32 = 0xc001_1022;
const AMD_BU_CFG2: u32 = 0xc001_102a;
const AMD_EX_CFG: u32 = 0xc001_102c;
const UCODE_WRITE: u32 = 0x79;
const EBL_CR_POWERON: u32 = 0x2a;
const PERF_STATUS: u32 = 0x198;
const PERF_CTL: u32 = 0x199;
/// Last branch and last interrupt, from and to, of the P6.
const LAST_BRANCH_FROM: u32 = 0x1db;
const LAST_INTERRUPT_TO: u32 = 0x1de;
const AMD_INTERRUPT_PENDING: u32 = 0xc001_0055;
const AMD_MMIO_CONFIGURATION: u32 = 0xc001_0058;
const AMD_TW_CFG: u32 = 0xc001_1023;

/// Memory types that PAT and MTRRs can name: UC, WC, WT, WP, WB, and UC- for PAT only.
fn memory_type(t: u64, pat: bool) -> bool {
    matches!(t, 0 | 1 | 4 | 5 | 6) || pat && t == 7
}

fn all_memory_types(v: u64, pat: bool) -> bool {
    v.to_le_bytes().iter().all(|&b| memory_type(b.into(), pat))
}

fn is_mtrr(n: u32) -> bool {
    matches!(n, IA32_MTRR_PHYSBASE0..=IA32_MTRR_PHYSMASK7
        | IA32_MTRR_FIX64K_00000 | IA32_MTRR_FIX16K_80000 | IA32_MTRR_FIX16K_A0000
        | IA32_MTRR_FIX4K_C0000..=IA32_MTRR_FIX4K_F8000 | IA32_MTRR_DEF_TYPE)
}

fn is_bank(n: u32) -> bool {
    (IA32_MC0_CTL..IA32_MC0_CTL + 4 * BANKS).contains(&n)
}

/// MSRs that only store a value and belong in a saved state (beside those with their own field).
pub fn stored_msrs() -> impl Iterator<Item = u32> {
    [
        IA32_PAT,
        IA32_MISC_ENABLE,
        IA32_SPEC_CTRL,
        IA32_MCG_STATUS,
        IA32_MCG_CTL,
        AMD_HWCR,
        AMD_DE_CFG,
        AMD_VIRT_SPEC_CTRL,
        IA32_ARCH_CAPABILITIES,
        IA32_TSX_CTRL,
        AMD_OSVW_ID_LENGTH,
        AMD_OSVW_STATUS,
    ]
    .into_iter()
    .chain(IA32_MTRR_PHYSBASE0..IA32_MTRR_PHYSBASE0 + 2 * VARIABLE_MTRRS)
    .chain([IA32_MTRR_FIX64K_00000, IA32_MTRR_FIX16K_80000, IA32_MTRR_FIX16K_A0000, IA32_MTRR_DEF_TYPE])
    .chain(IA32_MTRR_FIX4K_C0000..=IA32_MTRR_FIX4K_F8000)
    .chain(IA32_MC0_CTL..IA32_MC0_CTL + 4 * BANKS)
}

impl Cpu {
    /// Whether CPUID declares a feature: leaf, register (0 EAX to 3 EDX), bit.
    pub(super) fn declares(&self, function: u32, register: u8, bit: u32) -> bool {
        self.cpuid.find(function, 0).is_some_and(|l| {
            let v = [l.eax, l.ebx, l.ecx, l.edx][usize::from(register)];
            v >> bit & 1 != 0
        })
    }

    fn has_spec_ctrl(&self) -> bool {
        self.declares(7, 3, 26)
            || self.declares(7, 3, 27)
            || [14, 15, 24].into_iter().any(|b| self.declares(0x8000_0008, 1, b))
    }

    fn stored(&self, n: u32, reset: u64) -> u64 {
        self.msrs.get(&n).copied().unwrap_or(reset)
    }

    /// RDMSR.
    ///
    /// # Errors
    /// #GP(0) for MSRs that do not exist.
    pub fn read_msr(&mut self, n: u32) -> Result<u64, Trap> {
        if let Some(r) = self.apic_read_msr(n) {
            return r;
        }
        match self.plain_msr(n) {
            Some(v) => Ok(v),
            None => Err(self.gp(0)),
        }
    }

    fn plain_msr(&self, n: u32) -> Option<u64> {
        Some(match n {
            EFER => self.efer,
            STAR => self.star,
            LSTAR => self.lstar,
            CSTAR => self.cstar,
            SFMASK => self.sfmask,
            FS_BASE => self.seg[FS].base,
            GS_BASE => self.seg[GS].base,
            KERNEL_GS_BASE => self.kernel_gs_base,
            TSC_AUX if self.has_tsc_aux() => self.tsc_aux,
            IA32_SYSENTER_CS => self.sysenter[0],
            IA32_SYSENTER_ESP => self.sysenter[1],
            IA32_SYSENTER_EIP => self.sysenter[2],
            IA32_PAT => self.stored(n, PAT_RESET),
            IA32_MTRRCAP if self.declares(1, 3, 12) => MTRRCAP,
            _ if is_mtrr(n) && self.declares(1, 3, 12) => self.stored(n, 0),
            IA32_MISC_ENABLE => self.stored(n, self.misc_enable_reset()),
            IA32_MCG_CAP if self.declares(1, 3, 14) => {
                u64::from(BANKS) | 1 << 8 | if self.amd { 0 } else { 1 << 24 }
            }
            IA32_MCG_STATUS | IA32_MCG_CTL if self.declares(1, 3, 14) => self.stored(n, 0),
            _ if is_bank(n) && self.declares(1, 3, 14) => self.stored(n, 0),
            IA32_SPEC_CTRL if self.has_spec_ctrl() => self.stored(n, 0),
            IA32_ARCH_CAPABILITIES if self.declares(7, 3, 29) => self.stored(n, 0),
            // Exists where the capabilities say so (bit 7); there are no transactions to disable.
            IA32_TSX_CTRL
                if self.declares(7, 3, 29) && self.stored(IA32_ARCH_CAPABILITIES, 0) >> 7 & 1 != 0 =>
            {
                self.stored(n, 0)
            }
            IA32_XSS if self.cpuid.find(0xd, 1).is_some_and(|l| l.eax & 8 != 0) => 0,
            IA32_BIOS_SIGN_ID => self.stored(n, self.microcode()),
            // TscFreqSel: the TSC counts at the P0 frequency.
            AMD_HWCR if self.amd => self.stored(n, 1 << 24),
            AMD_DE_CFG if self.amd => self.stored(n, 0),
            AMD_VIRT_SPEC_CTRL if self.declares(0x8000_0008, 1, 25) => self.stored(n, 0),
            // Errata that systems work around: none that matter here (AMD APM 2 appendix D).
            AMD_OSVW_ID_LENGTH | AMD_OSVW_STATUS if self.declares(0x8000_0001, 2, 9) => self.stored(n, 0),
            AMD_SYSCFG
            | AMD_TSEG_ADDR
            | AMD_TSEG_MASK
            | AMD_HSAVE
            | AMD_NB_CFG
            | AMD_PATCH_LOADER
            | AMD_BU_CFG2
            | AMD_DC_CFG
            | AMD_EX_CFG
            | AMD_INTERRUPT_PENDING
            | AMD_MMIO_CONFIGURATION
            | AMD_TW_CFG
                if self.amd =>
            {
                0
            }
            IA32_PLATFORM_ID | EBL_CR_POWERON | IA32_DEBUGCTL => 0,
            // What older systems read and write without asking; nothing stands behind them.
            PERF_CTL | LAST_BRANCH_FROM..=LAST_INTERRUPT_TO => 0,
            PERF_STATUS if !self.amd => 1000 | 4 << 40,
            // RAPL's units and counters: no energy is counted.
            0x606 | 0x611 | 0x619 | 0x639 | 0x641 if !self.amd => 0,
            _ => return None,
        })
    }

    /// Bit 0 fast strings; no branch trace, no event sampling.
    fn misc_enable_reset(&self) -> u64 {
        if self.amd { 0 } else { 1 | 1 << 11 | 1 << 12 }
    }

    /// A microcode revision that systems take as new enough to trust feature bits.
    fn microcode(&self) -> u64 {
        if self.amd { 0x0100_0065 } else { 0x1_0000_0000 }
    }

    fn has_tsc_aux(&self) -> bool {
        self.declares(0x8000_0001, 3, 27) || self.declares(7, 2, 22)
    }

    /// WRMSR.
    ///
    /// # Errors
    /// #GP(0) for MSRs that do not exist or cannot hold the value.
    pub fn write_msr(&mut self, n: u32, v: u64) -> Result<(), Trap> {
        if let Some(r) = self.apic_write_msr(n, v) {
            return r;
        }
        if n == EFER {
            return self.set_efer(v);
        }
        if self.store_msr(n, v) { Ok(()) } else { Err(self.gp(0)) }
    }

    /// Put `v` in an MSR that has no further effects; false if it cannot be.
    fn store_msr(&mut self, n: u32, v: u64) -> bool {
        let exists = self.plain_msr(n).is_some();
        let canon = canonical(v);
        match n {
            STAR => self.star = v,
            LSTAR if canon => self.lstar = v,
            CSTAR if canon => self.cstar = v,
            SFMASK => self.sfmask = v & 0xffff_ffff,
            FS_BASE if canon => self.seg[FS].base = v,
            GS_BASE if canon => self.seg[GS].base = v,
            KERNEL_GS_BASE if canon => self.kernel_gs_base = v,
            TSC_AUX if exists && (self.amd || v >> 32 == 0) => self.tsc_aux = v & 0xffff_ffff,
            IA32_SYSENTER_CS => self.sysenter[0] = v & 0xffff_ffff,
            IA32_SYSENTER_ESP if canon => self.sysenter[1] = v,
            IA32_SYSENTER_EIP if canon => self.sysenter[2] = v,
            LSTAR | CSTAR | FS_BASE | GS_BASE | KERNEL_GS_BASE | TSC_AUX | IA32_SYSENTER_ESP
            | IA32_SYSENTER_EIP => return false,
            IA32_PRED_CMD => {
                let ibpb = self.declares(7, 3, 26) || self.declares(0x8000_0008, 1, 12);
                let sbpb = self.declares(0x8000_0021, 0, 27);
                return ibpb && v & !(1 | u64::from(sbpb) << 7) == 0;
            }
            IA32_FLUSH_CMD => return self.declares(7, 3, 28) && v & !1 == 0,
            IA32_PLATFORM_ID | IA32_MTRRCAP | IA32_MCG_CAP | IA32_ARCH_CAPABILITIES | PERF_STATUS => {
                return false;
            }
            // Only block stepping and branch records, which are not there: the bits are dropped, as KVM does.
            IA32_DEBUGCTL => return v & !3 == 0,
            IA32_XSS => return exists && v == 0,
            // Intel clears the revision before CPUID loads it again; updates are accepted and change nothing.
            IA32_BIOS_SIGN_ID | UCODE_WRITE | AMD_PATCH_LOADER => return true,
            _ if !exists => return false,
            _ => return self.store_checked(n, v),
        }
        true
    }

    fn store_checked(&mut self, n: u32, v: u64) -> bool {
        let v = match n {
            IA32_PAT if all_memory_types(v, true) => v,
            IA32_MTRR_DEF_TYPE if v & !0xcff == 0 && memory_type(v & 0xff, false) => v,
            IA32_MTRR_PHYSBASE0..=IA32_MTRR_PHYSMASK7 => {
                let reserved = if n & 1 == 0 { 0xf00 } else { 0x7ff };
                if v & (reserved | self.masks.beyond_physical) != 0
                    || n & 1 == 0 && !memory_type(v & 0xff, false)
                {
                    return false;
                }
                v
            }
            IA32_PAT | IA32_MTRR_DEF_TYPE => return false,
            _ if is_mtrr(n) => {
                if !all_memory_types(v, false) {
                    return false;
                }
                v
            }
            IA32_MCG_STATUS if v & !7 != 0 => return false,
            IA32_MCG_CTL if v != 0 && v != u64::MAX => return false,
            _ if is_bank(n) => {
                let clear_only = n & 3 == 1 && self.stored(AMD_HWCR, 0) & 1 << 18 == 0;
                // Linux leaves one bit out on some CPUs (bit 10: GART errors).
                let odd = n & 3 == 0 && v != 0 && v | 1 << 10 | 1 != u64::MAX;
                if clear_only && v != 0 || odd {
                    return false;
                }
                v
            }
            IA32_SPEC_CTRL if v & !0x5ff != 0 => return false,
            IA32_TSX_CTRL if v & !3 != 0 => return false,
            // Bits that mean something here: McStatusWrEn; the rest that systems set (TscFreqSel, ...) is kept as it is harmless.
            AMD_HWCR => v & (1 << 18 | 1 << 24 | 1 << 27),
            AMD_DE_CFG => v & (1 << 1 | 1 << 9),
            AMD_SYSCFG
            | AMD_TSEG_ADDR
            | AMD_TSEG_MASK
            | AMD_HSAVE
            | AMD_NB_CFG
            | AMD_BU_CFG2
            | AMD_DC_CFG
            | AMD_EX_CFG
            | AMD_INTERRUPT_PENDING
            | AMD_MMIO_CONFIGURATION
            | AMD_TW_CFG => {
                return true;
            }
            EBL_CR_POWERON | PERF_CTL => return true,
            LAST_BRANCH_FROM..=LAST_INTERRUPT_TO => return false,
            0x606..=0x641 => return false,
            _ => v,
        };
        self.msrs.insert(n, v);
        true
    }
}
