//! CPUID tables, the names of features, CPU models, and building a vCPU's table.
//!
//! Sources: Intel SDM 2A, CPUID; AMD APM 3 appendix E; Linux Documentation/virt/kvm/x86/cpuid.rst.

mod build;
mod feature;
mod model;
mod spec;
#[cfg(test)]
mod tests;

pub use build::{CpuBuilder, Dropped, Hypervisor, Topology};
pub use feature::{FeatureSet, FeatureWord, Register, WORDS, canonical, feature_names};
pub use model::{Cache, CacheKind, MODELS, Model, Scope, Vendor, find_model};
pub use spec::{CpuSpec, SpecError};

use serde::{Deserialize, Serialize};

/// One CPUID leaf or subleaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leaf {
    /// EAX on entry.
    pub function: u32,
    /// ECX on entry, or `None` when the leaf has no subleaves (any ECX).
    pub index: Option<u32>,
    /// Result.
    pub eax: u32,
    /// Result.
    pub ebx: u32,
    /// Result.
    pub ecx: u32,
    /// Result.
    pub edx: u32,
}

/// What CPUID answers on one vCPU. Bits that follow run-time state (OSXSAVE, APIC ID, XSAVE area size) are patched
/// in by the engine.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CpuidTable {
    /// All leaves; functions outside the highest basic, hypervisor and extended leaf follow the vendor's rule.
    pub leaves: Vec<Leaf>,
}

impl CpuidTable {
    /// The leaf that answers (function, index), if there is one.
    pub fn find(&self, function: u32, index: u32) -> Option<&Leaf> {
        self.leaves.iter().find(|l| l.function == function && l.index.is_none_or(|i| i == index))
    }
}

impl Leaf {
    /// A leaf from its four results.
    pub fn new(function: u32, index: Option<u32>, [eax, ebx, ecx, edx]: [u32; 4]) -> Leaf {
        Leaf { function, index, eax, ebx, ecx, edx }
    }
}
