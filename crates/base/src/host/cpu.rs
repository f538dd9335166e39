//! The host's processor, as far as an engine for x86-64 guests cares.

use std::path::Path;

/// One feature and what it gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuFeature {
    /// Name as in `/proc/cpuinfo`.
    pub name: &'static str,
    /// Whether the processor has it and the system uses it.
    pub present: bool,
    /// What it is for here.
    pub gives: &'static str,
}

/// The host's processor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cpu {
    /// Name that the processor gives itself.
    pub model: String,
    /// Processors that this process may use.
    pub count: usize,
    /// Hardware virtualization that the system shows: `vmx` (Intel), `svm` (AMD).
    pub virtualization: Option<&'static str>,
    /// Whether the system runs under another hypervisor.
    pub virtual_machine: bool,
    /// Features that a guest gets only if the host has them.
    pub features: Vec<CpuFeature>,
}

/// The host's processor.
#[must_use]
pub fn cpu() -> Cpu {
    let info = std::fs::read_to_string(Path::new("/proc/cpuinfo")).unwrap_or_default();
    let count = std::thread::available_parallelism().map_or(1, usize::from);
    parse(&info, count)
}

/// Features and what they give: the software engine runs SIMD instructions of the guest on the host's own units.
const FEATURES: [(&str, &str); 17] = [
    ("sse4_2", "x86-64-v2 guests"),
    ("popcnt", "x86-64-v2 guests"),
    ("cx16", "CMPXCHG16B, which 64-bit Windows needs"),
    ("avx", "AVX in guests"),
    ("avx2", "x86-64-v3 guests"),
    ("fma", "x86-64-v3 guests"),
    ("bmi1", "x86-64-v3 guests"),
    ("bmi2", "x86-64-v3 guests"),
    ("movbe", "x86-64-v3 guests"),
    ("f16c", "x86-64-v3 guests"),
    ("abm", "x86-64-v3 guests (LZCNT)"),
    ("aes", "AES in guests"),
    ("pclmulqdq", "carry-less multiplication in guests"),
    ("sha_ni", "SHA in guests"),
    ("rdrand", "random numbers in guests"),
    ("fsgsbase", "fast thread pointers in the engine"),
    ("constant_tsc", "a steady clock for guests"),
];

fn parse(info: &str, count: usize) -> Cpu {
    let field = |name: &str| {
        info.lines().find_map(|l| {
            let (key, value) = l.split_once(':')?;
            (key.trim() == name).then(|| value.trim())
        })
    };
    let flags: Vec<&str> = field("flags").unwrap_or_default().split_whitespace().collect();
    Cpu {
        model: field("model name").unwrap_or("unknown").to_owned(),
        count,
        virtualization: ["vmx", "svm"].into_iter().find(|v| flags.contains(v)),
        virtual_machine: flags.contains(&"hypervisor"),
        features: FEATURES
            .iter()
            .map(|&(name, gives)| CpuFeature { name, present: flags.contains(&name), gives })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpuinfo_is_read() {
        let text = "processor : 0\nmodel name : Some CPU @ 3GHz\nflags : fpu avx avx2 svm hypervisor\n\nprocessor: 1\n";
        let c = parse(text, 2);
        assert_eq!(c.model, "Some CPU @ 3GHz");
        assert_eq!(c.virtualization, Some("svm"));
        assert!(c.virtual_machine);
        let has = |n: &str| c.features.iter().find(|f| f.name == n).expect("listed").present;
        assert!(has("avx2") && !has("sha_ni"));
        assert_eq!(parse("", 1).model, "unknown");
    }

    #[test]
    fn it_agrees_with_the_processor_itself() {
        let c = cpu();
        assert!(c.count >= 1);
        let has = |n: &str| c.features.iter().find(|f| f.name == n).expect("listed").present;
        assert_eq!(has("avx2"), std::arch::is_x86_feature_detected!("avx2"));
        assert_eq!(has("sse4_2"), std::arch::is_x86_feature_detected!("sse4.2"));
    }
}
