//! Feature bits by name. Names are those of QEMU and Linux; `_` and `-` are the same, case does not matter.

use super::CpuidTable;

/// A result register of CPUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

/// One 32-bit word of feature bits and the names of its bits; an empty name is a bit that is reserved, follows run-time
/// state, or is made by the builder.
pub struct FeatureWord {
    /// Leaf.
    pub function: u32,
    /// Subleaf.
    pub index: Option<u32>,
    /// Which register.
    pub register: Register,
    /// Names of bits 0 to 31.
    pub names: [&'static str; 32],
}

macro_rules! word {
    ($f:expr, $i:expr, $r:ident, [$($bit:literal $name:literal),* $(,)?]) => {{
        let mut names = [""; 32];
        $( names[$bit] = $name; )*
        FeatureWord { function: $f, index: $i, register: Register::$r, names }
    }};
}

/// Every word that holds named features.
pub static WORDS: [FeatureWord; 12] = [
    word!(1, None, Edx, [
        0 "fpu", 1 "vme", 2 "de", 3 "pse", 4 "tsc", 5 "msr", 6 "pae", 7 "mce", 8 "cx8", 9 "apic", 11 "sep", 12 "mtrr",
        13 "pge", 14 "mca", 15 "cmov", 16 "pat", 17 "pse36", 18 "pn", 19 "clflush", 21 "ds", 22 "acpi", 23 "mmx",
        24 "fxsr", 25 "sse", 26 "sse2", 27 "ss", 28 "ht", 29 "tm", 31 "pbe",
    ]),
    word!(1, None, Ecx, [
        0 "pni", 1 "pclmulqdq", 2 "dtes64", 3 "monitor", 4 "ds-cpl", 5 "vmx", 6 "smx", 7 "est", 8 "tm2", 9 "ssse3",
        10 "cid", 12 "fma", 13 "cx16", 14 "xtpr", 15 "pdcm", 17 "pcid", 18 "dca", 19 "sse4.1", 20 "sse4.2",
        21 "x2apic", 22 "movbe", 23 "popcnt", 24 "tsc-deadline", 25 "aes", 26 "xsave", 28 "avx", 29 "f16c",
        30 "rdrand", 31 "hypervisor",
    ]),
    word!(6, None, Eax, [2 "arat"]),
    word!(7, Some(0), Ebx, [
        0 "fsgsbase", 1 "tsc-adjust", 2 "sgx", 3 "bmi1", 4 "hle", 5 "avx2", 6 "fdp-excptn-only", 7 "smep", 8 "bmi2",
        9 "erms", 10 "invpcid", 11 "rtm", 13 "zero-fcs-fds", 14 "mpx", 16 "avx512f", 17 "avx512dq", 18 "rdseed",
        19 "adx", 20 "smap", 21 "avx512ifma", 23 "clflushopt", 24 "clwb", 25 "intel-pt", 26 "avx512pf",
        27 "avx512er", 28 "avx512cd", 29 "sha-ni", 30 "avx512bw", 31 "avx512vl",
    ]),
    word!(7, Some(0), Ecx, [
        0 "prefetchwt1", 1 "avx512vbmi", 2 "umip", 3 "pku", 5 "waitpkg", 6 "avx512vbmi2", 7 "cet-ss", 8 "gfni",
        9 "vaes", 10 "vpclmulqdq", 11 "avx512vnni", 12 "avx512bitalg", 14 "avx512-vpopcntdq", 16 "la57",
        22 "rdpid", 24 "bus-lock-detect", 25 "cldemote", 27 "movdiri", 28 "movdir64b", 29 "enqcmd", 30 "sgxlc",
        31 "pks",
    ]),
    word!(7, Some(0), Edx, [
        2 "avx512-4vnniw", 3 "avx512-4fmaps", 4 "fsrm", 5 "uintr", 8 "avx512-vp2intersect", 10 "md-clear",
        14 "serialize", 16 "tsx-ldtrk", 18 "pconfig", 19 "arch-lbr", 20 "cet-ibt", 22 "amx-bf16", 23 "avx512-fp16",
        24 "amx-tile", 25 "amx-int8", 26 "spec-ctrl", 27 "stibp", 28 "flush-l1d", 29 "arch-capabilities",
        30 "core-capability", 31 "ssbd",
    ]),
    word!(7, Some(1), Eax, [
        0 "sha512", 1 "sm3", 2 "sm4", 4 "avx-vnni", 5 "avx512-bf16", 7 "cmpccxadd", 10 "fzrm", 11 "fsrs", 12 "fsrc",
        21 "amx-fp16", 23 "avx-ifma", 26 "lam",
    ]),
    word!(0xd, Some(1), Eax, [0 "xsaveopt", 1 "xsavec", 2 "xgetbv1", 3 "xsaves", 4 "xfd"]),
    word!(0x8000_0001, None, Ecx, [
        0 "lahf-lm", 1 "cmp-legacy", 2 "svm", 3 "extapic", 4 "cr8legacy", 5 "abm", 6 "sse4a", 7 "misalignsse",
        8 "3dnowprefetch", 9 "osvw", 10 "ibs", 11 "xop", 12 "skinit", 13 "wdt", 15 "lwp", 16 "fma4", 17 "tce",
        19 "nodeid-msr", 21 "tbm", 22 "topoext", 23 "perfctr-core", 24 "perfctr-nb", 29 "mwaitx",
    ]),
    word!(0x8000_0001, None, Edx, [
        11 "syscall", 19 "mp", 20 "nx", 22 "mmxext", 25 "fxsr-opt", 26 "pdpe1gb", 27 "rdtscp", 29 "lm",
        30 "3dnowext", 31 "3dnow",
    ]),
    word!(0x8000_0007, None, Edx, [8 "invtsc"]),
    word!(0x8000_0008, None, Ebx, [
        0 "clzero", 1 "irperf", 2 "xsaveerptr", 4 "rdpru", 9 "wbnoinvd", 12 "ibpb", 14 "ibrs", 15 "amd-stibp",
        17 "stibp-always-on", 24 "amd-ssbd", 25 "virt-ssbd", 26 "amd-no-ssb", 28 "amd-psfd",
    ]),
];

/// Other spellings in use, after normalisation.
const ALIASES: &[(&str, &str)] = &[
    ("sse3", "pni"),
    ("sse4-1", "sse4.1"),
    ("sse4-2", "sse4.2"),
    ("lzcnt", "abm"),
    ("i64", "lm"),
    ("xd", "nx"),
    ("sha", "sha-ni"),
    ("clfsh", "clflush"),
    ("ffxsr", "fxsr-opt"),
    ("tsc-deadline-timer", "tsc-deadline"),
    ("invariant-tsc", "invtsc"),
    ("cr8-legacy", "cr8legacy"),
    ("avx512-vbmi2", "avx512vbmi2"),
    ("avx512-vnni", "avx512vnni"),
    ("avx512-bitalg", "avx512bitalg"),
];

/// What cannot be without something else (Intel SDM 1 chapters 12 to 14): feature, what it needs.
const NEEDS: &[(&str, &str)] = &[
    ("sse", "fxsr"),
    ("sse2", "sse"),
    ("pni", "sse2"),
    ("ssse3", "pni"),
    ("sse4.1", "ssse3"),
    ("sse4.2", "sse4.1"),
    ("sse4a", "pni"),
    ("pclmulqdq", "sse2"),
    ("aes", "sse2"),
    ("sha-ni", "sse2"),
    ("gfni", "sse2"),
    ("avx", "xsave"),
    ("avx", "sse4.2"),
    ("xsaveopt", "xsave"),
    ("xsavec", "xsave"),
    ("xgetbv1", "xsave"),
    ("xsaves", "xsavec"),
    ("avx2", "avx"),
    ("fma", "avx"),
    ("f16c", "avx"),
    ("vaes", "avx"),
    ("vpclmulqdq", "avx"),
    ("avx-vnni", "avx2"),
    ("avx-ifma", "avx2"),
    ("avx512f", "avx2"),
    ("pcid", "lm"),
    ("invpcid", "pcid"),
    ("x2apic", "apic"),
    ("tsc-deadline", "apic"),
    ("mmxext", "mmx"),
    ("3dnow", "mmx"),
    ("3dnowext", "3dnow"),
];

/// The table's own spelling of a feature's name, or `None` when there is no such feature.
pub fn canonical(name: &str) -> Option<&'static str> {
    let n = name.trim().to_ascii_lowercase().replace('_', "-");
    let n = ALIASES.iter().find(|(a, _)| *a == n).map_or(n.as_str(), |(_, c)| c);
    feature_names().find(|known| *known == n)
}

/// All feature names, in the order of the words.
pub fn feature_names() -> impl Iterator<Item = &'static str> {
    WORDS.iter().flat_map(|w| w.names).filter(|n| !n.is_empty())
}

/// A set of named features.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FeatureSet {
    words: [u32; WORDS.len()],
}

impl FeatureSet {
    /// The named features of a whitespace-separated list; names that do not exist are left out.
    pub fn of(list: &str) -> FeatureSet {
        let mut set = FeatureSet::default();
        for name in list.split_whitespace() {
            set.set(name, true);
        }
        set
    }

    /// The named features that a table has.
    pub fn from_table(table: &CpuidTable) -> FeatureSet {
        let mut set = FeatureSet::default();
        for (word, w) in set.words.iter_mut().zip(&WORDS) {
            let Some(l) = table.find(w.function, w.index.unwrap_or(0)) else { continue };
            let bits = match w.register {
                Register::Eax => l.eax,
                Register::Ebx => l.ebx,
                Register::Ecx => l.ecx,
                Register::Edx => l.edx,
            };
            *word = bits & named(w);
        }
        set
    }

    /// Add or take away a feature by name (any spelling); false when there is no such feature.
    pub fn set(&mut self, name: &str, on: bool) -> bool {
        let Some((w, bit)) = position(name) else { return false };
        if on {
            self.words[w] |= 1 << bit;
        } else {
            self.words[w] &= !(1 << bit);
        }
        true
    }

    /// Whether the feature is in the set.
    pub fn has(&self, name: &str) -> bool {
        position(name).is_some_and(|(w, bit)| self.words[w] >> bit & 1 != 0)
    }

    /// Those in both.
    pub fn and(&self, other: &FeatureSet) -> FeatureSet {
        FeatureSet { words: std::array::from_fn(|i| self.words[i] & other.words[i]) }
    }

    /// Those in either.
    pub fn or(&self, other: &FeatureSet) -> FeatureSet {
        FeatureSet { words: std::array::from_fn(|i| self.words[i] | other.words[i]) }
    }

    /// Those here that are not in `other`.
    pub fn minus(&self, other: &FeatureSet) -> FeatureSet {
        FeatureSet { words: std::array::from_fn(|i| self.words[i] & !other.words[i]) }
    }

    /// Names of the features in the set.
    pub fn names(&self) -> Vec<&'static str> {
        let of_word = |(bits, w): (&u32, &'static FeatureWord)| {
            let bits = *bits;
            (0..32).filter(move |b| bits >> b & 1 != 0).map(|b| w.names[b])
        };
        self.words.iter().zip(&WORDS).flat_map(of_word).collect()
    }

    /// The bits of one word, as CPUID shows them.
    pub fn word(&self, function: u32, index: Option<u32>, register: Register) -> u32 {
        let i = WORDS.iter().position(|w| (w.function, w.index, w.register) == (function, index, register));
        i.map_or(0, |i| self.words[i])
    }

    /// Take away, until nothing changes, what needs a feature that is not there.
    pub fn drop_unsupported_dependents(&mut self) {
        loop {
            let before = *self;
            for (feature, needs) in NEEDS {
                if !self.has(needs) {
                    self.set(feature, false);
                }
            }
            if *self == before {
                return;
            }
        }
    }
}

fn named(w: &FeatureWord) -> u32 {
    (0..32).filter(|&b| !w.names[b].is_empty()).fold(0, |m, b| m | 1 << b)
}

fn position(name: &str) -> Option<(usize, usize)> {
    let name = canonical(name)?;
    WORDS.iter().enumerate().find_map(|(i, w)| Some((i, w.names.iter().position(|n| *n == name)?)))
}
