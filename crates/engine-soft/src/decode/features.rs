//! Which instructions the guest's CPUID declares: any other is #UD.

use iced_x86::{CpuidFeature as F, Instruction};
use ringfort_engine::CpuidTable;

/// A set of iced CPUID features.
#[derive(Debug, Clone, Default)]
pub struct FeatureSet {
    bits: [u64; 4],
}

/// A CPUID output register.
#[derive(Clone, Copy)]
enum Reg {
    A,
    B,
    C,
    D,
}
use Reg::*;

/// Where each feature is declared: leaf, subleaf, register, bit (Intel SDM 2A CPUID; AMD APM 3 appendix E). A feature that appears
/// several times is declared by any of its bits. What is in no table is never allowed: privileged extensions that the engine does not have,
/// AVX-512 and everything EVEX, and instructions of other vendors.
const DECLARED: &[(F, u32, u32, Reg, u32)] = &[
    (F::SSE3, 1, 0, C, 0),
    (F::PCLMULQDQ, 1, 0, C, 1),
    (F::MONITOR, 1, 0, C, 3),
    (F::SSSE3, 1, 0, C, 9),
    (F::FMA, 1, 0, C, 12),
    (F::CMPXCHG16B, 1, 0, C, 13),
    (F::SSE4_1, 1, 0, C, 19),
    (F::SSE4_2, 1, 0, C, 20),
    (F::MOVBE, 1, 0, C, 22),
    (F::POPCNT, 1, 0, C, 23),
    (F::AES, 1, 0, C, 25),
    (F::XSAVE, 1, 0, C, 26),
    (F::AVX, 1, 0, C, 28),
    (F::F16C, 1, 0, C, 29),
    (F::RDRAND, 1, 0, C, 30),
    (F::FPU, 1, 0, D, 0),
    (F::FPU287, 1, 0, D, 0),
    (F::FPU387, 1, 0, D, 0),
    (F::TSC, 1, 0, D, 4),
    (F::MSR, 1, 0, D, 5),
    (F::CX8, 1, 0, D, 8),
    (F::SEP, 1, 0, D, 11),
    (F::CMOV, 1, 0, D, 15),
    (F::CLFSH, 1, 0, D, 19),
    (F::MMX, 1, 0, D, 23),
    (F::FXSR, 1, 0, D, 24),
    (F::SSE, 1, 0, D, 25),
    (F::SSE2, 1, 0, D, 26),
    (F::FSGSBASE, 7, 0, B, 0),
    (F::BMI1, 7, 0, B, 3),
    (F::AVX2, 7, 0, B, 5),
    (F::BMI2, 7, 0, B, 8),
    (F::INVPCID, 7, 0, B, 10),
    (F::RDSEED, 7, 0, B, 18),
    (F::ADX, 7, 0, B, 19),
    (F::SMAP, 7, 0, B, 20),
    (F::CLFLUSHOPT, 7, 0, B, 23),
    (F::CLWB, 7, 0, B, 24),
    (F::SHA, 7, 0, B, 29),
    (F::GFNI, 7, 0, C, 8),
    (F::VAES, 7, 0, C, 9),
    (F::VPCLMULQDQ, 7, 0, C, 10),
    (F::RDPID, 7, 0, C, 22),
    (F::MOVDIRI, 7, 0, C, 27),
    (F::MOVDIR64B, 7, 0, C, 28),
    (F::SERIALIZE, 7, 0, D, 14),
    (F::AVX_VNNI, 7, 1, A, 4),
    (F::AVX_IFMA, 7, 1, A, 23),
    (F::AVX_VNNI_INT8, 7, 1, D, 4),
    (F::AVX_NE_CONVERT, 7, 1, D, 5),
    (F::AVX_VNNI_INT16, 7, 1, D, 10),
    (F::XSAVEOPT, 0xd, 1, A, 0),
    (F::XSAVEC, 0xd, 1, A, 1),
    (F::XSAVES, 0xd, 1, A, 3),
    (F::LZCNT, 0x8000_0001, 0, C, 5),
    (F::SSE4A, 0x8000_0001, 0, C, 6),
    (F::SYSCALL, 0x8000_0001, 0, D, 11),
    (F::RDTSCP, 0x8000_0001, 0, D, 27),
    (F::X64, 0x8000_0001, 0, D, 29),
    (F::CLZERO, 0x8000_0008, 0, B, 0),
    (F::WBNOINVD, 0x8000_0008, 0, B, 9),
];

/// What every processor of the architecture has, or executes as a no-operation (or as an older instruction) where its feature is absent:
/// PREFETCHW and its like, ENDBR and RDSSP (reserved NOPs), CLDEMOTE, PREFETCHIT, PAUSE.
const ALWAYS: &[F] = &[
    F::INTEL8086,
    F::INTEL186,
    F::INTEL286,
    F::INTEL386,
    F::INTEL486,
    F::CPUID,
    F::PAUSE,
    F::MULTIBYTENOP,
    F::RDPMC,
    F::PREFETCHW,
    F::PREFETCHWT1,
    F::PREFETCHITI,
    F::CLDEMOTE,
    F::CET_IBT,
];

impl FeatureSet {
    /// What `table` declares and the engine and this host can execute.
    pub fn from_cpuid(table: &CpuidTable) -> FeatureSet {
        let offered = crate::cpuid::offered();
        let mut set = FeatureSet::default();
        for &(f, leaf, sub, reg, bit) in DECLARED {
            let declared = |t: &CpuidTable| {
                t.find(leaf, sub).is_some_and(|l| {
                    let v = match reg {
                        A => l.eax,
                        B => l.ebx,
                        C => l.ecx,
                        D => l.edx,
                    };
                    v >> bit & 1 != 0
                })
            };
            if declared(table) && declared(offered) {
                set.add(f);
            }
        }
        ALWAYS.iter().for_each(|&f| set.add(f));
        if crate::vcpu::is_kvm(table) {
            // For VMCALL and VMMCALL; nothing else of these has a handler.
            set.add(F::VMX);
            set.add(F::SVM);
        }
        set
    }

    fn add(&mut self, f: F) {
        self.bits[f as usize / 64] |= 1 << (f as usize % 64);
    }

    /// Whether the set has `f`.
    pub fn has(&self, f: F) -> bool {
        self.bits[f as usize / 64] >> (f as usize % 64) & 1 != 0
    }

    /// Whether all features that `i` needs are declared.
    pub fn allows(&self, i: &Instruction) -> bool {
        use iced_x86::Mnemonic as M;
        i.cpuid_features().iter().all(|&f| self.has(f)) || matches!(i.mnemonic(), M::Rdsspd | M::Rdsspq)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    fn decode(bytes: &[u8]) -> Instruction {
        Decoder::new(64, bytes, DecoderOptions::NONE).decode()
    }

    #[test]
    fn only_declared_instructions_are_allowed() {
        let none = FeatureSet::from_cpuid(&CpuidTable::default());
        let all = FeatureSet::from_cpuid(crate::cpuid::offered());
        let addps: &[u8] = &[0x0f, 0x58, 0xc1];
        let evex: &[u8] = &[0x62, 0xf1, 0x7c, 0x48, 0x58, 0xc1];
        let endbr: &[u8] = &[0xf3, 0x0f, 0x1e, 0xfa];
        let rdssp: &[u8] = &[0xf3, 0x48, 0x0f, 0x1e, 0xc8];
        let wrpkru: &[u8] = &[0x0f, 0x01, 0xef];
        assert!(all.allows(&decode(addps)) && !none.allows(&decode(addps)));
        for never in [evex, wrpkru] {
            assert!(!all.allows(&decode(never)), "{never:x?}");
        }
        for always in [endbr, rdssp, &[0x90], &[0x0f, 0x1f, 0xc0]] {
            assert!(none.allows(&decode(always)), "{always:x?}");
        }
    }

    #[test]
    fn each_bit_of_the_table_turns_on_its_feature_alone() {
        for &(f, leaf, sub, reg, bit) in DECLARED {
            let mut l = ringfort_x86::cpuid::Leaf {
                function: leaf,
                index: Some(sub),
                eax: 0,
                ebx: 0,
                ecx: 0,
                edx: 0,
            };
            *match reg {
                A => &mut l.eax,
                B => &mut l.ebx,
                C => &mut l.ecx,
                D => &mut l.edx,
            } = 1 << bit;
            let one = FeatureSet::from_cpuid(&CpuidTable { leaves: vec![l] });
            let all = FeatureSet::from_cpuid(crate::cpuid::offered());
            assert_eq!(one.has(f), all.has(f), "{f:?}");
            let others = DECLARED
                .iter()
                .filter(|o| o.0 != f && one.has(o.0) && !matches!(o.0, F::FPU | F::FPU287 | F::FPU387));
            assert_eq!(others.count(), 0, "{f:?}");
        }
    }
}
