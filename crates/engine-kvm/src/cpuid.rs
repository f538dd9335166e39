//! CPUID between KVM's form and ours, and what of the host's is offered to guests.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use ringfort_engine::{CpuidTable, EngineError};
use ringfort_x86::cpuid::Leaf;

/// Features that change nothing but speed: a guest that knows them from elsewhere can go on with them on any CPU with 64-bit mode, which
/// executes what is special about them as something plainer (PREFETCHW and CLDEMOTE as NOPs; Intel SDM 2, AMD APM 3).
pub(crate) const HINTS: &str = "erms fsrm fzrm fsrs fsrc 3dnowprefetch cldemote ss";

/// Features that KVM may offer and that are kept from guests, since a guest's state could not be told from another engine's: nested
/// virtualization, counters, and state components beyond AVX. Leaf, subleaf, register (0 EAX to 3 EDX), bits.
const KEPT_BACK: [(u32, u32, usize, u32); 7] = [
    // VMX, what counters can do.
    (1, 0, 2, 1 << 5 | 1 << 15),
    // TSX, MPX, AVX-512, Intel PT, SGX.
    (
        7,
        0,
        1,
        1 << 2
            | 1 << 4
            | 1 << 11
            | 1 << 14
            | 1 << 16
            | 1 << 17
            | 1 << 21
            | 1 << 25
            | 0xf << 26 & !(1 << 29)
            | 3 << 30,
    ),
    // Protection keys, CET, VBMI, 5-level paging, WAITPKG, ENQCMD, SGX.
    (
        7,
        0,
        2,
        1 << 1
            | 1 << 3
            | 1 << 5
            | 1 << 6
            | 1 << 7
            | 1 << 11
            | 1 << 12
            | 1 << 14
            | 1 << 16
            | 1 << 29
            | 3 << 30,
    ),
    // AVX-512, user interrupts, TSX, LBR, CET, AMX.
    (7, 0, 3, 3 << 2 | 1 << 5 | 1 << 8 | 1 << 16 | 1 << 19 | 1 << 20 | 0xf << 22),
    (7, 1, 0, 1 << 5 | 1 << 21 | 1 << 26),
    // XFD. XSAVES has no components of its own (IA32_XSS is zero), and the state is told in the standard form.
    (0xd, 1, 0, 1 << 4),
    // SVM, IBS, LWP, performance counters.
    (0x8000_0001, 0, 2, 1 << 2 | 1 << 10 | 1 << 12 | 1 << 15 | 3 << 23),
];

/// What KVM reports as supported, in our form.
pub(crate) fn table(entries: &[kvm_cpuid_entry2]) -> CpuidTable {
    let leaves = entries
        .iter()
        .map(|e| {
            let index = (e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0).then_some(e.index);
            Leaf::new(e.function, index, [e.eax, e.ebx, e.ecx, e.edx])
        })
        .collect();
    CpuidTable { leaves }
}

/// What guests can be offered of `supported`. `deadline` says that KVM's APIC timers have the TSC-deadline mode, which its list leaves
/// out (Linux Documentation/virt/kvm/api.rst, KVM_GET_SUPPORTED_CPUID).
pub(crate) fn offered(mut supported: CpuidTable, deadline: bool) -> CpuidTable {
    for l in &mut supported.leaves {
        for &(function, index, register, bits) in &KEPT_BACK {
            if l.function == function && l.index.unwrap_or(0) == index {
                let r = [&mut l.eax, &mut l.ebx, &mut l.ecx, &mut l.edx];
                *r[register] &= !bits;
            }
        }
        if l.function == 1 {
            l.ecx = l.ecx & !(1 << 24) | u32::from(deadline) << 24;
        }
    }
    supported
}

/// A vCPU's table in KVM's form.
pub(crate) fn to_kvm(table: &CpuidTable) -> Result<CpuId, EngineError> {
    let entries: Vec<kvm_cpuid_entry2> = table
        .leaves
        .iter()
        .map(|l| kvm_cpuid_entry2 {
            function: l.function,
            index: l.index.unwrap_or(0),
            flags: if l.index.is_some() { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
            eax: l.eax,
            ebx: l.ebx,
            ecx: l.ecx,
            edx: l.edx,
            ..Default::default()
        })
        .collect();
    CpuId::from_entries(&entries)
        .map_err(|_| EngineError::Internal(format!("{} CPUID leaves are more than KVM takes", entries.len())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_survive_both_ways() {
        let t = CpuidTable {
            leaves: vec![Leaf::new(0, None, [0xd, 1, 2, 3]), Leaf::new(7, Some(1), [4, 5, 6, 7])],
        };
        assert_eq!(table(to_kvm(&t).unwrap().as_slice()), t);
        let too_many = CpuidTable { leaves: vec![t.leaves[0]; 300] };
        assert!(to_kvm(&too_many).is_err());
    }

    #[test]
    fn nested_virtualization_and_large_state_are_kept_back() {
        let all = CpuidTable {
            leaves: vec![
                Leaf::new(1, None, [!0; 4]),
                Leaf::new(7, Some(0), [!0; 4]),
                Leaf::new(0xd, Some(1), [!0; 4]),
                Leaf::new(0x8000_0001, None, [!0; 4]),
            ],
        };
        let set = |deadline| ringfort_x86::cpuid::FeatureSet::from_table(&offered(all.clone(), deadline));
        let f = set(true);
        for gone in
            ["vmx", "svm", "avx512f", "avx512vl", "avx512bw", "pku", "la57", "amx-tile", "xfd", "rtm", "pdcm"]
        {
            assert!(!f.has(gone), "{gone}");
        }
        for there in [
            "avx2",
            "tsc-deadline",
            "sha-ni",
            "gfni",
            "vaes",
            "topoext",
            "spec-ctrl",
            "xsavec",
            "xsaves",
            "abm",
        ] {
            assert!(f.has(there), "{there}");
        }
        assert!(!set(false).has("tsc-deadline"));
    }
}
