//! Whether a machine can go on under the engine at hand.

use super::MachineState;
use ringfort_engine::{Capabilities, CpuidTable};
use ringfort_x86::cpuid::FeatureSet;

/// Why a saved machine cannot go on here; one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfit(pub String);

/// Features that CPUID tables show and that no engine has to offer: they are made from the topology or say that there is a hypervisor.
const MADE: &str = "hypervisor topoext ht cmp-legacy";
/// What systems switch on and off against speculation. The software engine takes it, and it does nothing there.
const MITIGATIONS: &str = "spec-ctrl stibp ssbd flush-l1d md-clear ibpb ibrs amd-stibp amd-ssbd virt-ssbd";
/// How far TSC frequencies may lie apart, in millionths: KVM's default, and what clocks are kept in step over anyway.
const TSC_TOLERANCE: u64 = 250;

/// The CPUID tables that the vCPUs have to go on with, if the engine can give them: the guest has seen what they say, and must not see
/// anything else now.
pub(super) fn cpuid<'a>(
    saved: &'a MachineState,
    engine: &str,
    offered: &Capabilities,
) -> Result<&'a [CpuidTable], Unfit> {
    let available = FeatureSet::from_table(&offered.cpuid).or(&FeatureSet::of(MADE)).or(&offered.carried);
    for table in &saved.cpuid {
        let missing = FeatureSet::from_table(table).minus(&available);
        if missing != FeatureSet::default() {
            return Err(Unfit(format!(
                "its CPUs have features that the engine {engine} lacks here: {}; use another engine or host, or save a machine that runs with --cpu portable, or with --cpu …,-{}",
                missing.names().join(", "),
                missing.names().join(",-"),
            )));
        }
        let bits = |t: &CpuidTable| t.find(0x8000_0008, 0).map_or(36, |l| l.eax & 0xff);
        if bits(table) > bits(&offered.cpuid) {
            return Err(Unfit(format!(
                "its CPUs have {} physical address bits, the engine {engine} has {} here",
                bits(table),
                bits(&offered.cpuid)
            )));
        }
        let wants = table.find(0x4000_0001, 0).map_or(0, |l| l.eax);
        if wants & !offered.paravirt != 0 {
            return Err(Unfit(format!(
                "its guest uses paravirtual features {:#x} (CPUID leaf 40000001h) that the engine {engine} lacks here",
                wants & !offered.paravirt
            )));
        }
    }
    let (then, now) = (u64::from(saved.tsc_khz), u64::from(offered.tsc_khz));
    if then.abs_diff(now) * 1_000_000 > then * TSC_TOLERANCE {
        return Err(Unfit(format!(
            "its TSC runs at {then} kHz, here it runs at {now} kHz, and the guest's clocks would be wrong; restore it on a host like the one it comes from"
        )));
    }
    Ok(&saved.cpuid)
}

/// A line about what the guest does against speculation and that does nothing under the engine at hand; `None` if it does no such thing.
pub(super) fn idle_mitigations(saved: &MachineState, engine: &str, offered: &Capabilities) -> Option<String> {
    let idle = FeatureSet::of(MITIGATIONS).and(&offered.carried);
    let all = saved.cpuid.iter().fold(FeatureSet::default(), |all, t| all.or(&FeatureSet::from_table(t)));
    let names = all.and(&idle).names();
    (!names.is_empty()).then(|| {
        format!(
            "engine: {engine}, where what the guest's CPUs have against speculation has no effect ({})",
            names.join(", ")
        )
    })
}
