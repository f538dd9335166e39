//! What CPUID can at most declare under this engine.

use ringfort_engine::{CpuidTable, FeatureSet};
use ringfort_x86::cpuid::Leaf;
use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

/// Feature bits of one output register.
struct Word {
    function: u32,
    index: Option<u32>,
    /// Position of the register in EAX, EBX, ECX, EDX.
    register: usize,
    /// Done by the engine, whatever the host has.
    engine: u32,
    /// Executed on the host's CPU: offered if the host has them.
    host: u32,
}

const fn bits<const N: usize>(list: [u32; N]) -> u32 {
    let (mut all, mut n) = (0, 0);
    while n < N {
        all |= 1 << list[n];
        n += 1;
    }
    all
}

/// Every feature that the engine implements. Not among them: AVX-512 and AMX, MPX, PKU, CET, TSX, VMX and SVM, SGX, MONITOR, performance
/// counters, and the speculation controls (guest code never runs natively).
static WORDS: [Word; 12] = [
    // FPU VME DE PSE TSC MSR PAE MCE CX8 APIC SEP MTRR PGE MCA CMOV PAT PSE36 CLFSH | MMX FXSR SSE SSE2
    Word {
        function: 1,
        index: None,
        register: 3,
        engine: bits([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 19, 24]),
        host: bits([23, 25, 26]),
    },
    // CX16 PCID X2APIC MOVBE TSC-DEADLINE XSAVE | SSE3 PCLMULQDQ SSSE3 FMA SSE4.1 SSE4.2 POPCNT AES AVX F16C RDRAND
    Word {
        function: 1,
        index: None,
        register: 2,
        engine: bits([13, 17, 21, 22, 24, 26]),
        host: bits([0, 1, 9, 12, 19, 20, 23, 25, 28, 29, 30]),
    },
    // ARAT: the timer is not tied to power states.
    Word { function: 6, index: None, register: 0, engine: bits([2]), host: 0 },
    // FSGSBASE TSC_ADJUST SMEP ERMS INVPCID SMAP CLFLUSHOPT CLWB | BMI1 AVX2 BMI2 RDSEED ADX SHA
    Word {
        function: 7,
        index: Some(0),
        register: 1,
        engine: bits([0, 1, 7, 9, 10, 20, 23, 24]),
        host: bits([3, 5, 8, 18, 19, 29]),
    },
    // UMIP RDPID | GFNI VAES VPCLMULQDQ
    Word { function: 7, index: Some(0), register: 2, engine: bits([2, 22]), host: bits([8, 9, 10]) },
    // FSRM
    Word { function: 7, index: Some(0), register: 3, engine: bits([4]), host: 0 },
    // AVX-VNNI AVX-IFMA
    Word { function: 7, index: Some(1), register: 0, engine: 0, host: bits([4, 23]) },
    // XSAVEOPT XSAVEC XGETBV(1) XSAVES
    Word { function: 0xd, index: Some(1), register: 0, engine: bits([0, 1, 2, 3]), host: 0 },
    // LAHF CR8LEGACY 3DNOWPREFETCH | ABM SSE4A
    Word { function: 0x8000_0001, index: None, register: 2, engine: bits([0, 4, 8]), host: bits([5, 6]) },
    // SYSCALL NX PDPE1GB RDTSCP LM | MMXEXT
    Word {
        function: 0x8000_0001,
        index: None,
        register: 3,
        engine: bits([11, 20, 26, 27, 29]),
        host: bits([22]),
    },
    // The guest's TSC is the host's plus an offset.
    Word { function: 0x8000_0007, index: None, register: 3, engine: 0, host: bits([8]) },
    // XSAVEERPTR WBNOINVD
    Word { function: 0x8000_0008, index: None, register: 1, engine: bits([2, 9]), host: 0 },
];

/// Features that are not offered, and that a guest which has seen them elsewhere can go on with: what an operating system does about
/// speculation (its MSRs hold what is written to them), hints that have no effect of their own, and words about errata.
pub const CARRIED: &str = "spec-ctrl stibp ssbd flush-l1d md-clear arch-capabilities ibpb ibrs amd-stibp stibp-always-on amd-ssbd \
     virt-ssbd amd-no-ssb amd-psfd osvw ss cldemote fdp-excptn-only zero-fcs-fds fzrm fsrs fsrc";

/// Physical address bits: as many as page walks handle, and no more than the host has, so that passing devices through stays possible.
const PHYSICAL_BITS: u32 = 48;

fn host(function: u32, index: u32) -> [u32; 4] {
    // The highest leaf of the range decides whether there is an answer.
    let top = __cpuid_count(function & 0x8000_0000, 0).eax;
    if function > top {
        return [0; 4];
    }
    let r = __cpuid_count(function, index);
    [r.eax, r.ebx, r.ecx, r.edx]
}

fn put(t: &mut CpuidTable, function: u32, index: Option<u32>, v: [u32; 4]) {
    t.leaves.push(Leaf { function, index, eax: v[0], ebx: v[1], ecx: v[2], edx: v[3] });
}

fn build() -> CpuidTable {
    let mut t = CpuidTable::default();
    let native = crate::native::available();
    let avx = native && std::arch::is_x86_feature_detected!("avx");
    let [_, b, c, d] = host(0, 0);
    put(&mut t, 0, None, [0xd, b, c, d]);
    put(&mut t, 1, None, [host(1, 0)[0], 0, 0, 0]);
    // Cache descriptions, for models that follow the host.
    for i in 0..8 {
        let v = host(4, i);
        if v[0] & 31 == 0 {
            break;
        }
        // Without the core counts, which are the machine's to say.
        put(&mut t, 4, Some(i), [v[0] & 0x3fff, v[1], v[2], v[3]]);
    }
    put(&mut t, 6, None, [0; 4]);
    put(&mut t, 7, Some(0), [1, 0, 0, 0]);
    put(&mut t, 7, Some(1), [0; 4]);
    let (mask, size) = if avx { (7, crate::native::XSAVE_SIZE as u32) } else { (3, 576) };
    put(&mut t, 0xd, Some(0), [mask, 576, size, 0]);
    put(&mut t, 0xd, Some(1), [0, 576, 0, 0]);
    if avx {
        put(&mut t, 0xd, Some(2), [crate::native::AVX_SIZE as u32, crate::native::AVX_AT as u32, 0, 0]);
    }
    put(&mut t, 0x8000_0000, None, [0x8000_0021, b, c, d]);
    put(&mut t, 0x8000_0001, None, [host(0x8000_0001, 0)[0], 0, 0, 0]);
    for f in 0x8000_0002..=0x8000_0006 {
        put(&mut t, f, None, host(f, 0));
    }
    put(&mut t, 0x8000_0007, None, [0; 4]);
    let physical = match host(0x8000_0008, 0)[0] & 0xff {
        0 => 40,
        n => n.min(PHYSICAL_BITS),
    };
    put(&mut t, 0x8000_0008, None, [48 << 8 | physical, 0, 0, 0]);
    for i in 0..8 {
        let v = host(0x8000_001d, i);
        if v[0] & 31 == 0 {
            break;
        }
        put(&mut t, 0x8000_001d, Some(i), [v[0] & 0x3fff, v[1], v[2], v[3]]);
    }
    // LFENCE serializes: instructions are executed in order.
    put(&mut t, 0x8000_0021, None, [1 << 2, 0, 0, 0]);
    for w in &WORDS {
        let native_bits =
            if native { host(w.function, w.index.unwrap_or(0))[w.register] & w.host } else { 0 };
        let value = native_bits | w.engine;
        let leaf = t.leaves.iter_mut().find(|l| l.function == w.function && l.index == w.index);
        if let Some(l) = leaf {
            *[&mut l.eax, &mut l.ebx, &mut l.ecx, &mut l.edx][w.register] |= value;
        }
    }
    if crate::flaws::arch_capabilities() != 0
        && let Some(l) = t.leaves.iter_mut().find(|l| (l.function, l.index) == (7, Some(0)))
    {
        l.edx |= 1 << 29;
    }
    // The kernel may have AVX switched off (XCR0) where CPUID has it: then nothing that VEX encodes can be executed.
    if !avx {
        for (f, i, register, gone) in [
            (1, None, 2, bits([12, 28, 29])),
            (7, Some(0), 1, bits([5])),
            (7, Some(0), 2, bits([9, 10])),
            (7, Some(1), 0, bits([4, 23])),
        ] {
            if let Some(l) = t.leaves.iter_mut().find(|l| l.function == f && l.index == i) {
                *[&mut l.eax, &mut l.ebx, &mut l.ecx, &mut l.edx][register] &= !gone;
            }
        }
    }
    t
}

/// All features that a guest under this engine can have seen: what is offered, and what it can go on with.
pub fn bearable() -> FeatureSet {
    FeatureSet::from_table(offered()).or(&FeatureSet::of(CARRIED))
}

/// Whether the host's CPU is AMD's (or Hygon's), as which the engine behaves where makers differ.
pub fn host_is_amd() -> bool {
    offered().find(0, 0).is_some_and(|l| matches!(&l.ebx.to_le_bytes(), b"Auth" | b"Hygo"))
}

/// CPUID as the engine can at most offer it on this host: what it does itself, and what the host's CPU can execute for it. Made once.
pub fn offered() -> &'static CpuidTable {
    static TABLE: OnceLock<CpuidTable> = OnceLock::new();
    TABLE.get_or_init(build)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_offered_that_the_host_must_execute_and_cannot() {
        let t = offered();
        for w in &WORDS {
            let l = t.find(w.function, w.index.unwrap_or(0)).expect("every word has its leaf");
            let got = [l.eax, l.ebx, l.ecx, l.edx][w.register];
            let has = host(w.function, w.index.unwrap_or(0))[w.register];
            assert_eq!(got & w.engine, w.engine, "leaf {:#x}", w.function);
            assert_eq!(got & w.host & !has, 0, "leaf {:#x}", w.function);
        }
    }

    #[test]
    fn avx512_and_virtualization_are_never_offered() {
        let t = offered();
        let seven = t.find(7, 0).expect("leaf 7");
        assert_eq!(seven.ebx & bits([4, 11, 14, 16, 17, 21, 28, 30, 31]), 0);
        assert_eq!(seven.ecx & bits([1, 3, 4, 6, 7, 11, 12, 14, 16]), 0);
        assert_eq!(t.find(1, 0).expect("leaf 1").ecx & bits([3, 5, 6]), 0);
        assert_eq!(t.find(0x8000_0001, 0).expect("extended leaf 1").ecx & bits([2, 11, 16]), 0);
        assert_eq!(t.find(0xd, 0).expect("leaf 0xd").eax & !7, 0);
    }
}
