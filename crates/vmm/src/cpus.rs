//! What the vCPUs look like: the CPU model asked for, cut to what the engine offers.

use crate::config::VmConfig;
use crate::error::VmmError;
use ringfort_engine::{CpuidTable, FeatureSet, Hypervisor};
use ringfort_engine_kvm::KvmOptions;
use ringfort_x86::cpuid::{CpuBuilder, CpuSpec, Hypervisor as HypervisorLeaves, Scope, SpecError, Topology};

/// What a guest may have seen if it is to go on under another engine of this host.
struct Elsewhere {
    features: FeatureSet,
    cpuid: CpuidTable,
    paravirt: u32,
}

impl Elsewhere {
    fn soft() -> Elsewhere {
        Elsewhere {
            features: ringfort_engine_soft::cpuid::bearable(),
            cpuid: ringfort_engine_soft::cpuid::offered().clone(),
            paravirt: ringfort_engine_soft::vcpu::paravirt_features(),
        }
    }

    fn kvm() -> Result<Elsewhere, String> {
        let kvm = ringfort_engine_kvm::open(KvmOptions::default()).map_err(|e| e.to_string())?;
        let offered = kvm.capabilities();
        Ok(Elsewhere {
            features: FeatureSet::from_table(&offered.cpuid).or(&offered.carried),
            cpuid: offered.cpuid.clone(),
            paravirt: offered.paravirt,
        })
    }
}

fn physical_bits(table: &CpuidTable) -> Option<u32> {
    table.find(0x8000_0008, 0).map(|l| l.eax & 0xff)
}

/// The vCPUs that `config` asks for. What a `saved` machine's CPUs have is in its state, and what is missing is none of this one's
/// troubles. `say` gets a line about what is missing.
///
/// # Errors
/// [`VmmError::Cpu`].
pub(crate) fn describe(
    config: &VmConfig,
    engine: &dyn Hypervisor,
    saved: bool,
    say: &mut dyn FnMut(&str),
) -> Result<CpuBuilder, VmmError> {
    let mut spec: CpuSpec = config.cpu.parse().map_err(|e: SpecError| VmmError::Cpu(e.to_string()))?;
    let offered = engine.capabilities();
    let scope = if saved { Scope::Own } else { spec.model.scope };
    let elsewhere = match (scope, offered.software) {
        (Scope::Own | Scope::Engine, _) | (Scope::Software, true) => None,
        (Scope::Software | Scope::Portable, false) => Some(Elsewhere::soft()),
        (Scope::Portable, true) => match Elsewhere::kvm() {
            Ok(it) => Some(it),
            Err(why) => {
                say(&format!(
                    "CPU model {}: what the engine {} has, as KVM cannot be asked ({why})",
                    config.cpu,
                    engine.name()
                ));
                None
            }
        },
    };
    spec.within = elsewhere.as_ref().map(|e| e.features);
    let paravirt = elsewhere.as_ref().map_or(!0, |e| e.paravirt);
    let leaves = HypervisorLeaves {
        features: offered.paravirt & paravirt,
        hints: 0,
        tsc_khz: offered.tsc_khz,
        apic_khz: offered.apic_khz,
    };
    let (mut cpus, dropped) = CpuBuilder::new(&spec, &offered.cpuid, Topology::flat(config.cpus), leaves);
    if let Some(bits) = elsewhere.as_ref().and_then(|e| physical_bits(&e.cpuid)) {
        cpus.set_physical_bits(bits);
    }
    if saved {
        return Ok(cpus);
    }
    if !dropped.requested.is_empty() {
        return Err(VmmError::Cpu(format!(
            "not to be had here: {}; leave them out (`ringfort doctor` lists what this host has)",
            dropped.requested.join(", ")
        )));
    }
    if !dropped.of_model.is_empty() {
        say(&format!("CPU model {}: without {}", config.cpu, dropped.of_model.join(", ")));
    }
    Ok(cpus)
}
