//! The CPUID instruction: the table, with what follows run-time state patched in (Intel SDM 2A "CPUID"; AMD APM 3 appendix E).

use super::Cpu;
use ringfort_engine::CpuidTable;
use ringfort_x86::cr::*;

/// Whether `t` describes a CPU whose vendor is AMD (or its licensee Hygon).
pub fn is_amd(t: &CpuidTable) -> bool {
    t.find(0, 0).is_some_and(|l| {
        let name = [l.ebx, l.edx, l.ecx].map(u32::to_le_bytes).concat();
        name == b"AuthenticAMD" || name == b"HygonGenuine"
    })
}

/// Bytes of a standard-format XSAVE area that holds components `mask`.
fn xsave_size(t: &CpuidTable, mask: u64) -> u32 {
    (2..63)
        .filter(|n| mask >> n & 1 != 0)
        .filter_map(|n| t.find(0xd, n))
        .map(|l| l.ebx.saturating_add(l.eax))
        .fold(576, u32::max)
}

/// Bytes of a compacted XSAVE area that holds components `mask`.
fn compacted_size(t: &CpuidTable, mask: u64) -> u32 {
    let mut size = 576u32;
    for l in (2..63).filter(|n| mask >> n & 1 != 0).filter_map(|n| t.find(0xd, n)) {
        if l.ecx & 2 != 0 {
            size = size.next_multiple_of(64);
        }
        size = size.saturating_add(l.eax);
    }
    size
}

impl Cpu {
    /// What CPUID answers now: EAX, EBX, ECX, EDX.
    pub fn cpuid_values(&mut self, function: u32, index: u32) -> [u32; 4] {
        let t = &self.cpuid;
        let max = |base: u32| t.find(base, 0).map_or(0, |l| l.eax);
        let mut function = function;
        let class = function & 0xc000_0000;
        let hypervisor = (0x4000_0000..0x5000_0000).contains(&function);
        let highest = if hypervisor { max(function & 0xffff_ff00) } else { max(class) };
        if function > highest.max(class) || highest == 0 {
            // Beyond the highest leaf of its range: zeros on AMD, the highest basic leaf on Intel.
            if self.amd {
                return [0; 4];
            }
            function = max(0);
        }
        let Some(mut l) = t.find(function, index).copied() else {
            // The topology leaves tell their input and the APIC ID in every subleaf.
            if matches!(function, 0xb | 0x1f) && t.find(function, 0).is_some() {
                return [0, 0, index & 0xff, self.env.me.apic_id];
            }
            return [0; 4];
        };
        let id = self.env.me.apic_id;
        match function {
            1 => {
                l.ebx = l.ebx & 0x00ff_ffff | id << 24;
                l.ecx = l.ecx & !(1 << 27) | u32::from(self.cr4 & CR4_OSXSAVE != 0) << 27;
                if !self.apic_enabled() {
                    l.edx &= !(1 << 9);
                }
            }
            0x8000_0001 if self.amd && !self.apic_enabled() => l.edx &= !(1 << 9),
            7 if index == 0 => {
                l.ecx = l.ecx & !(1 << 4) | u32::from(self.cr4 & CR4_PKE != 0) << 4;
            }
            0xb | 0x1f => l.edx = id,
            0xd if index == 0 => l.ebx = xsave_size(t, self.xcr0),
            // Without XSAVEC and XSAVES there is no compacted format to size.
            0xd if index == 1 && l.eax & 0b1010 != 0 => l.ebx = compacted_size(t, self.xcr0),
            0x8000_001e => l.eax = id,
            _ => {}
        }
        [l.eax, l.ebx, l.ecx, l.edx]
    }
}
