//! Which model-specific registers make up a vCPU's state, and what those that KVM does not have read as.

use ringfort_engine::{CpuidTable, FeatureSet};
use ringfort_x86::msr::*;

/// Machine-check banks of every vCPU, with a control register: as many as the other engine has.
pub(crate) const BANKS: u32 = 10;
/// MCG_CAP: number of banks, MCG_CTL_P, and MCG_SER_P on Intel (Intel SDM 3B section 16.3.1.1).
pub(crate) fn mcg_cap(intel: bool) -> u64 {
    u64::from(BANKS) | 1 << 8 | u64::from(intel) << 24
}

/// MSRs that are saved whatever their value is. Ascending.
fn always() -> impl Iterator<Item = u32> {
    [
        IA32_TSC_ADJUST,
        IA32_SYSENTER_CS,
        IA32_SYSENTER_ESP,
        IA32_SYSENTER_EIP,
        IA32_MCG_STATUS,
        IA32_MCG_CTL,
        IA32_MISC_ENABLE,
        IA32_PAT,
        IA32_MTRR_DEF_TYPE,
        STAR,
        LSTAR,
        CSTAR,
        SFMASK,
        KERNEL_GS_BASE,
        TSC_AUX,
        KVM_WALL_CLOCK_NEW,
        KVM_SYSTEM_TIME_NEW,
        KVM_STEAL_TIME,
        KVM_PV_EOI_EN,
        KVM_POLL_CONTROL,
        IA32_SPEC_CTRL,
        AMD_VIRT_SPEC_CTRL,
        AMD_HWCR,
        AMD_DE_CFG,
    ]
    .into_iter()
    .chain(IA32_MTRR_PHYSBASE0..=IA32_MTRR_PHYSMASK7)
    .chain([IA32_MTRR_FIX64K_00000, IA32_MTRR_FIX16K_80000, IA32_MTRR_FIX16K_A0000])
    .chain(IA32_MTRR_FIX4K_C0000..=IA32_MTRR_FIX4K_F8000)
    .chain(IA32_MC0_CTL..IA32_MC0_CTL + 4 * BANKS)
}

/// MSRs of KVM's list that are no state of a guest: constants, what has a field of its own, and what guests are not offered (counters,
/// nested virtualization, other hypervisors' interfaces).
fn not_state(n: u32) -> bool {
    matches!(n,
        IA32_TSC | IA32_TSC_DEADLINE | IA32_APIC_BASE | EFER | FS_BASE | GS_BASE
        | KVM_WALL_CLOCK | KVM_SYSTEM_TIME
        | IA32_BIOS_SIGN_ID | IA32_MTRRCAP | IA32_MCG_CAP | IA32_PLATFORM_ID
        // Platform information, performance capabilities, control of locked features, SMM.
        | 0xce | 0x345 | IA32_FEATURE_CONTROL | 0x9e | 0x34 | 0x140
        // Counters (Intel SDM 3B chapter 20; AMD APM 2 section 13.2).
        | 0xc1..=0xc8 | 0x186..=0x18d | 0x309..=0x30c | 0x38d..=0x390 | 0x3f1 | 0x600 | 0xc001_0000..=0xc001_0007
        | 0xc001_0200..=0xc001_020b | 0xc000_0300..=0xc000_0302
        // TSC ratio of nested guests.
        | 0xc000_0104
        // VMX capabilities, SVM's host save area.
        | 0x480..=0x493 | 0xc001_0114..=0xc001_0117
        // Hyper-V.
        | 0x4000_0000..=0x4000_0200)
}

/// The MSRs to read for a state, of those that the host's KVM lists; and of those, which are told only if they are not zero.
pub(crate) fn state_list(listed: &[u32]) -> Vec<u32> {
    let mut all: Vec<u32> = always().chain(listed.iter().copied().filter(|&n| !not_state(n))).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// MSRs of a state that a guest with this CPUID does not have, though KVM may tell their values.
pub(crate) fn hidden(table: &CpuidTable) -> Vec<u32> {
    let declares = FeatureSet::from_table(table);
    let mut all = Vec::new();
    if !declares.has("arch-capabilities") {
        all.push(IA32_ARCH_CAPABILITIES);
    }
    if !declares.has("osvw") {
        all.extend([AMD_OSVW_ID_LENGTH, AMD_OSVW_STATUS]);
    }
    all
}

/// Whether a zero in this MSR need not be told.
pub(crate) fn zero_is_silent(n: u32) -> bool {
    !always().any(|m| m == n)
}

/// What a guest reads from an MSR that KVM does not have, and that systems read without looking whether it exists; `None` for #GP(0).
/// The same as the software engine's answers.
pub(crate) fn unknown_read(n: u32, intel: bool) -> Option<u64> {
    match n {
        IA32_PLATFORM_ID | 0x2a => Some(0),
        0x198 if intel => Some(1000 | 4 << 40),
        0x606 | 0x611 | 0x619 | 0x639 | 0x641 if intel => Some(0),
        AMD_SYSCFG | 0xc001_0112 | 0xc001_0113 | 0xc001_0117 | 0xc001_001f | 0xc001_0020 | 0xc001_102a
        | 0xc001_1022 | 0xc001_102c
            if !intel =>
        {
            Some(0)
        }
        _ => None,
    }
}

/// Whether a guest's write to an MSR that KVM does not have is taken, and changes nothing; else #GP(0).
pub(crate) fn unknown_write(n: u32, intel: bool) -> bool {
    // Microcode updates: taken as done.
    n == 0x79
        || n == 0xc001_0020
        || !(0x606..=0x641).contains(&n) && n != 0x198 && unknown_read(n, intel).is_some()
}

/// MSRs that no guest may touch even though KVM has them: first and count. Performance counters and nested virtualization are
/// not in any CPU model, so what is left would only tell of the host.
pub(crate) const FILTERED: [(u32, u32); 9] = [
    (0xc1, 8),
    (0x186, 8),
    (0x309, 4),
    (0x38d, 4),
    (0x480, 0x14),
    (0xc001_0000, 8),
    (0xc001_0200, 12),
    (0xc001_0114, 4),
    (0x4c1, 8),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constants_and_counters_are_no_state() {
        let list =
            state_list(&[IA32_TSC, 0xc1, 0x480, IA32_ARCH_CAPABILITIES, 0xda0, 0x4000_0001, STAR, 0xe1]);
        for n in [STAR, 0xda0, IA32_ARCH_CAPABILITIES, 0xe1, IA32_PAT, IA32_MC0_CTL, KVM_STEAL_TIME] {
            assert_eq!(list.iter().filter(|&&m| m == n).count(), 1, "{n:#x}");
        }
        for n in [IA32_TSC, 0xc1, 0x480, 0x4000_0001] {
            assert!(!list.contains(&n), "{n:#x}");
        }
        assert!(list.is_sorted());
        assert!(zero_is_silent(0xe1) && !zero_is_silent(STAR));
    }

    #[test]
    fn probes_of_absent_registers_get_an_answer() {
        assert_eq!(unknown_read(0x606, true), Some(0));
        assert_eq!(unknown_read(0x606, false), None);
        assert_eq!(unknown_read(0xdead, true), None);
        assert!(unknown_write(0x79, true) && unknown_write(0xc001_001f, false));
        assert!(!unknown_write(0x606, true) && !unknown_write(0xdead, false));
    }
}
