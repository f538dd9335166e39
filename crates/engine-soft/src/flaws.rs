//! Of which flaws of Intel's CPUs guests are told that theirs has none (IA32_ARCH_CAPABILITIES: Intel SDM 4, table 2-2).
//!
//! Meltdown and its kin are no flaws of this engine, which checks each access before it makes it; what systems do about them (a second set of
//! page tables, buffers emptied on the way back to user code) would cost their guests dearly and help nobody. But a guest can go on under
//! KVM, where it needs all that if the CPU does: so where there is KVM it is told what holds of the host's CPU as well. Elsewhere it may come
//! to a host with such a CPU later, whose KVM engine looks at what it was told.

use ringfort_x86::msr::arch_capabilities::*;
use std::sync::OnceLock;

/// What the host's kernel calls a flaw, and what says that a CPU lacks it.
const FLAWS: [(&str, u64); 9] = [
    ("meltdown", RDCL_NO),
    ("l1tf", RDCL_NO),
    ("mds", MDS_NO),
    ("itlb_multihit", PSCHANGE_MC_NO),
    ("tsx_async_abort", TAA_NO),
    ("mmio_stale_data", SBDR_SSDP_NO | FBSDP_NO | PSDP_NO),
    ("gather_data_sampling", GDS_NO),
    ("reg_file_data_sampling", RFDS_NO),
    ("indirect_target_selection", ITS_NO),
];

/// What the host's kernel says of a flaw that its CPU lacks.
const NOT_AFFECTED: &str = "Not affected";

/// What guests read from IA32_ARCH_CAPABILITIES; 0 if there is nothing to tell and they do not have it.
pub(crate) fn arch_capabilities() -> u64 {
    static TOLD: OnceLock<u64> = OnceLock::new();
    *TOLD.get_or_init(|| {
        let intel = std::arch::x86_64::__cpuid(0).ebx.to_le_bytes() == *b"Genu";
        let read = |flaw: &str| {
            std::fs::read_to_string(format!("/sys/devices/system/cpu/vulnerabilities/{flaw}")).ok()
        };
        match (intel, std::path::Path::new("/dev/kvm").exists()) {
            (false, _) => 0,
            (true, true) => lacked(read),
            (true, false) => lacked(|_| Some(NOT_AFFECTED.into())),
        }
    })
}

/// The flaws that the host lacks; `read` gives what it says of one.
fn lacked(read: impl Fn(&str) -> Option<String>) -> u64 {
    let not_affected = |flaw| read(flaw).is_some_and(|said| said.trim() == NOT_AFFECTED);
    let (mut has, mut lacks) = (0, 0);
    for (flaw, bits) in FLAWS {
        *if not_affected(flaw) { &mut lacks } else { &mut has } |= bits;
    }
    // One bit may stand for several.
    lacks & !has
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_host_says_nothing_of_it_may_have() {
        assert_eq!(lacked(|_| None), 0);
        assert_eq!(lacked(|_| Some("Mitigation: PTI\n".into())), 0);
        let but = |one: &'static str| {
            lacked(move |flaw| Some(if flaw == one { "Vulnerable\n" } else { "Not affected\n" }.into()))
        };
        assert_eq!(but("none") & (RDCL_NO | MDS_NO | ITS_NO), RDCL_NO | MDS_NO | ITS_NO);
        for (flaw, bits) in FLAWS {
            assert_eq!(but(flaw), but("none") & !bits, "{flaw}");
        }
    }
}
