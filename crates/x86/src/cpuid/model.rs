//! Named CPU models. AVX-512, TSX, protection keys and nested virtualization are left out of the models that have them
//! in silicon, because no engine offers them; they can still be asked for by name, and are then reported as missing.

/// Who made a CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vendor {
    /// `GenuineIntel`.
    Intel,
    /// `AuthenticAMD`.
    Amd,
}

impl Vendor {
    /// The 12 letters of leaf 0.
    pub fn id(self) -> &'static [u8; 12] {
        match self {
            Vendor::Intel => b"GenuineIntel",
            Vendor::Amd => b"AuthenticAMD",
        }
    }
}

/// What a cache holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheKind {
    /// Data.
    Data = 1,
    /// Instructions.
    Instruction = 2,
    /// Both.
    Unified = 3,
}

/// One cache. The line is 64 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cache {
    /// 1 to 3. Level 3 is shared by the package, the others by the threads of a core.
    pub level: u8,
    /// What it holds.
    pub kind: CacheKind,
    /// Size in bytes.
    pub size: u32,
    /// Associativity.
    pub ways: u32,
}

const fn caches(l1d: (u32, u32), l1i: (u32, u32), l2: (u32, u32), l3: (u32, u32)) -> [Cache; 4] {
    [
        Cache { level: 1, kind: CacheKind::Data, size: l1d.0 << 10, ways: l1d.1 },
        Cache { level: 1, kind: CacheKind::Instruction, size: l1i.0 << 10, ways: l1i.1 },
        Cache { level: 2, kind: CacheKind::Unified, size: l2.0 << 10, ways: l2.1 },
        Cache { level: 3, kind: CacheKind::Unified, size: l3.0 << 10, ways: l3.1 },
    ]
}

pub(super) const INTEL_CACHES: [Cache; 4] = caches((32, 8), (32, 8), (256, 8), (16384, 16));
pub(super) const SERVER_CACHES: [Cache; 4] = caches((32, 8), (32, 8), (1024, 16), (16384, 16));
pub(super) const AMD_CACHES: [Cache; 4] = caches((32, 8), (64, 4), (512, 8), (8192, 16));

/// Which features a model has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Its own.
    Own,
    /// All that the engine offers.
    Engine,
    /// Of those, the ones that a guest can take along to the software engine.
    Software,
    /// Those that all engines of the host offer: a guest can go from each to each.
    Portable,
}

/// A CPU model.
#[derive(Debug)]
pub struct Model {
    /// Its name on the command line.
    pub name: &'static str,
    /// Other names for it.
    pub aliases: &'static [&'static str],
    /// Which features it has. Unless they are its own, vendor, signature, brand and caches are taken from what the engine offers as well;
    /// the fields below are then only used where the engine does not say.
    pub scope: Scope,
    /// What it is, in a few words.
    pub about: &'static str,
    /// Vendor.
    pub vendor: Vendor,
    /// Display family.
    pub family: u32,
    /// Display model.
    pub model: u32,
    /// Stepping.
    pub stepping: u32,
    /// Brand string, at most 47 letters.
    pub brand: &'static str,
    /// Caches.
    pub caches: [Cache; 4],
    /// Highest basic leaf.
    pub level: u32,
    /// Features, in pieces.
    pub features: &'static [&'static str],
}

/// What every 64-bit CPU has.
const BASE: &str = "fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 pni cx16 \
     syscall nx lm lahf-lm";
const NEHALEM: &str = "vme ssse3 sse4.1 sse4.2 popcnt";
const HASWELL: &str = "pclmulqdq fma pcid movbe aes xsave avx f16c rdrand x2apic tsc-deadline rdtscp abm fsgsbase bmi1 avx2 smep bmi2 \
     erms invpcid xsaveopt arat";
const SKYLAKE: &str = "3dnowprefetch rdseed adx smap xsavec xgetbv1";
const SKYLAKE_SERVER: &str = "pdpe1gb clflushopt clwb";
const EPYC: &str = "vme ssse3 sse4.1 sse4.2 popcnt pclmulqdq monitor fma movbe aes xsave avx f16c rdrand rdtscp pdpe1gb fxsr-opt mmxext \
     osvw 3dnowprefetch misalignsse sse4a abm cr8legacy topoext fsgsbase bmi1 avx2 smep bmi2 rdseed adx smap \
     clflushopt sha-ni xsaveopt xsavec xgetbv1 arat";

/// A model that takes from the engine what it says.
const fn follows(name: &'static str, scope: Scope, about: &'static str) -> Model {
    Model {
        name,
        aliases: &[],
        scope,
        about,
        vendor: Vendor::Amd,
        family: 15,
        model: 107,
        stepping: 1,
        brand: "Virtual x86-64 CPU",
        caches: AMD_CACHES,
        level: 0xd,
        features: &[],
    }
}

/// All models.
pub static MODELS: [Model; 9] = [
    Model {
        name: "qemu64",
        aliases: &[],
        scope: Scope::Own,
        about: "the least that 64-bit systems want",
        vendor: Vendor::Amd,
        family: 15,
        model: 107,
        stepping: 1,
        brand: "QEMU Virtual CPU version 2.5+",
        caches: AMD_CACHES,
        level: 0xd,
        features: &[BASE],
    },
    Model {
        name: "Nehalem",
        aliases: &[],
        scope: Scope::Own,
        about: "Intel, 2008",
        vendor: Vendor::Intel,
        family: 6,
        model: 26,
        stepping: 3,
        brand: "Intel Core i7 9xx (Nehalem Class Core i7)",
        caches: INTEL_CACHES,
        level: 0xb,
        features: &[BASE, NEHALEM],
    },
    Model {
        name: "Haswell",
        aliases: &["Haswell-noTSX"],
        scope: Scope::Own,
        about: "Intel, 2013, without TSX",
        vendor: Vendor::Intel,
        family: 6,
        model: 60,
        stepping: 4,
        brand: "Intel Core Processor (Haswell)",
        caches: INTEL_CACHES,
        level: 0xd,
        features: &[BASE, NEHALEM, HASWELL],
    },
    Model {
        name: "Skylake-Client",
        aliases: &["Skylake", "Skylake-Client-noTSX-IBRS"],
        scope: Scope::Own,
        about: "Intel, 2015, without TSX",
        vendor: Vendor::Intel,
        family: 6,
        model: 94,
        stepping: 3,
        brand: "Intel Core Processor (Skylake)",
        caches: INTEL_CACHES,
        level: 0xd,
        features: &[BASE, NEHALEM, HASWELL, SKYLAKE],
    },
    Model {
        name: "Skylake-Server",
        aliases: &["Skylake-Server-noTSX-IBRS"],
        scope: Scope::Own,
        about: "Intel, 2017, without TSX and AVX-512",
        vendor: Vendor::Intel,
        family: 6,
        model: 85,
        stepping: 4,
        brand: "Intel Xeon Processor (Skylake)",
        caches: SERVER_CACHES,
        level: 0xd,
        features: &[BASE, NEHALEM, HASWELL, SKYLAKE, SKYLAKE_SERVER],
    },
    Model {
        name: "EPYC",
        aliases: &[],
        scope: Scope::Own,
        about: "AMD, 2017",
        vendor: Vendor::Amd,
        family: 23,
        model: 1,
        stepping: 2,
        brand: "AMD EPYC Processor",
        caches: AMD_CACHES,
        level: 0xd,
        features: &[BASE, EPYC],
    },
    follows(
        "max",
        Scope::Software,
        "all that the engine has here, as far as the software engine can go on with it",
    ),
    follows("host", Scope::Engine, "all that the engine has here"),
    follows(
        "portable",
        Scope::Portable,
        "what KVM and the software engine both have here: saved machines go from each to each",
    ),
];

impl Model {
    /// Whether it follows the engine.
    pub fn host(&self) -> bool {
        self.scope != Scope::Own
    }
}

/// The model of this name or alias; case does not matter.
pub fn find_model(name: &str) -> Option<&'static Model> {
    let same = |n: &&str| n.eq_ignore_ascii_case(name);
    MODELS.iter().find(|m| same(&m.name) || m.aliases.iter().any(same))
}
