use super::*;

fn everything(vendor: &[u8; 12]) -> CpuidTable {
    let mut all = FeatureSet::default();
    for n in feature_names().filter(|n| !n.contains("512") && *n != "pku") {
        all.set(n, true);
    }
    let mut t = CpuidTable::default();
    let w = |i: usize| u32::from_le_bytes(vendor[i..i + 4].try_into().unwrap());
    for f in [0u32, 1, 6, 7, 0xd, 0x8000_0001, 0x8000_0007, 0x8000_0008] {
        for index in WORDS.iter().filter(|x| x.function == f).map(|x| x.index).chain((f == 0).then_some(None))
        {
            if t.leaves.iter().any(|l| l.function == f && l.index == index) {
                continue;
            }
            let r = |r| all.word(f, index, r);
            let v = [r(Register::Eax), r(Register::Ebx), r(Register::Ecx), r(Register::Edx)];
            t.leaves.push(Leaf::new(f, index, v));
        }
    }
    t.leaves[0] = Leaf::new(0, None, [0x1f, w(0), w(8), w(4)]);
    for l in &mut t.leaves {
        match l.function {
            1 => l.eax = 0x00a2_0f12,
            0x8000_0008 => l.eax = 48 << 8 | 46,
            _ => {}
        }
    }
    t
}

fn build(spec: &str, cpus: Topology) -> (CpuBuilder, Dropped) {
    let hv = Hypervisor { features: 9, hints: 1, tsc_khz: 2_600_000, apic_khz: 0 };
    CpuBuilder::new(&spec.parse().unwrap(), &everything(b"AuthenticAMD"), cpus, hv)
}

#[test]
fn names_are_unique_and_found() {
    let all: Vec<_> = feature_names().collect();
    for (i, n) in all.iter().enumerate() {
        assert!(!all[..i].contains(n), "{n} twice");
        assert_eq!(canonical(n), Some(*n));
    }
    for (given, is) in
        [("SSE4_1", "sse4.1"), ("sse4-2", "sse4.2"), ("lzcnt", "abm"), ("tsc_adjust", "tsc-adjust")]
    {
        assert_eq!(canonical(given), Some(is));
    }
    for m in &MODELS {
        for f in m.features.iter().flat_map(|l| l.split_whitespace()) {
            assert!(canonical(f).is_some(), "{}: {f}", m.name);
        }
        assert!(m.brand.len() < 48);
    }
}

#[test]
fn bits_are_where_the_manual_has_them() {
    let s = FeatureSet::of("sse4.2 avx2 bmi1 erms fsgsbase nx lm invtsc clzero xsavec rdpid fsrm");
    assert_eq!(s.word(1, None, Register::Ecx), 1 << 20);
    assert_eq!(s.word(7, Some(0), Register::Ebx), 1 << 5 | 1 << 3 | 1 << 9 | 1);
    assert_eq!(s.word(7, Some(0), Register::Ecx), 1 << 22);
    assert_eq!(s.word(7, Some(0), Register::Edx), 1 << 4);
    assert_eq!(s.word(0x8000_0001, None, Register::Edx), 1 << 20 | 1 << 29);
    assert_eq!(s.word(0xd, Some(1), Register::Eax), 2);
    assert_eq!(s.word(0x8000_0007, None, Register::Edx), 1 << 8);
    assert_eq!(s.word(0x8000_0008, None, Register::Ebx), 1);
}

#[test]
fn bad_descriptions_say_what_to_do() {
    let e = |s: &str| s.parse::<CpuSpec>().unwrap_err().to_string();
    assert!(e("pentium9").contains("models: qemu64, Nehalem, Haswell"), "{}", e("pentium9"));
    assert!(e("").contains("models:"));
    assert!(e("host,+avx3").contains("did you mean") && e("host,+avx3").contains("avx2"));
    assert!(e("host,+sse42").contains("sse4.2"));
    let unknown = e("host,+zzzzzzzzzz");
    assert!(unknown.contains("zzzzzzzzzz") && unknown.contains("--cpu help"), "{unknown}");
    assert!(e("host,avx2").contains("+feature"));
    assert!(e("host,+").contains("not understood"));
    assert!(e("host,").contains("not understood"));
    assert!(e("host,é").contains("not understood"));
    assert!(e(&format!("host,+{}", "é".repeat(100_000))).contains("not known"));
}

#[test]
fn changes_are_applied_in_order_and_pull_down_dependents() {
    let (b, d) = build("Haswell,-avx,+avx,-aes,bmi2=off", Topology::flat(1));
    assert!(b.features().has("avx2") && !b.features().has("aes") && !b.features().has("bmi2"));
    assert!(d.is_empty(), "{d:?}");
    let (b, d) = build("Haswell,-xsave", Topology::flat(1));
    for f in ["avx", "avx2", "fma", "f16c", "xsaveopt"] {
        assert!(!b.features().has(f), "{f}");
    }
    assert!(d.is_empty(), "{d:?}");
    assert!(b.table(0).find(0xd, 0).is_none());
    let (_, d) = build("Haswell,+avx512f,+vmx,-sse4.2", Topology::flat(1));
    assert_eq!(d.requested, ["avx512f"]);
}

#[test]
fn the_engine_has_the_last_word() {
    let mut offered = everything(b"GenuineIntel");
    for l in &mut offered.leaves {
        if l.function == 7 {
            l.ebx = 0;
        }
    }
    let hv = Hypervisor::default();
    let (b, d) = CpuBuilder::new(&"Haswell,+adx".parse().unwrap(), &offered, Topology::flat(2), hv);
    assert!(d.of_model.contains(&"avx2") && d.of_model.contains(&"fsgsbase"));
    assert_eq!(d.requested, ["adx"]);
    assert_eq!(b.table(0).find(7, 0).unwrap().ebx, 0);
    let (b, d) = CpuBuilder::new(&"host".parse().unwrap(), &CpuidTable::default(), Topology::flat(1), hv);
    assert!(d.is_empty());
    assert_eq!(b.features().names(), ["hypervisor", "topoext"]);
}

#[test]
fn a_model_that_follows_the_engine_is_kept_to_what_it_may_have() {
    let with = |spec: &str, vendor: &[u8; 12]| {
        let mut spec: CpuSpec = spec.parse().unwrap();
        spec.within = Some(FeatureSet::of("fpu sse sse2 fxsr xsave avx apic x2apic sse4.2 lm"));
        CpuBuilder::new(&spec, &everything(vendor), Topology::flat(1), Hypervisor::default())
    };
    let amd = b"AuthenticAMD";
    for model in ["max", "portable"] {
        let (b, d) = with(model, amd);
        assert!(d.is_empty(), "{d:?}");
        // What needs something that is not in it is not in it either.
        let has = ["fpu", "apic", "fxsr", "sse", "sse2", "x2apic", "xsave", "hypervisor", "topoext", "lm"];
        assert_eq!(b.features().minus(&FeatureSet::of(&has.join(" "))), FeatureSet::default());
        assert!(has.iter().all(|f| b.features().has(f)), "{:?}", b.features().names());
    }
    // What is asked for by name is had all the same.
    let (b, d) = with("max,+clzero,-avx", amd);
    assert!(b.features().has("clzero") && !b.features().has("avx") && d.is_empty(), "{d:?}");
    // Models of their own are what they are.
    assert!(with("EPYC", amd).0.features().has("aes"));
    // Words of AMD's are not said by others.
    let (b, _) = CpuBuilder::new(
        &"host".parse().unwrap(),
        &everything(b"GenuineIntel"),
        Topology::flat(1),
        Hypervisor::default(),
    );
    assert!(!b.features().has("xsaveerptr") && b.features().has("wbnoinvd"));
}

#[test]
fn models_have_vendor_signature_and_brand() {
    let check = |spec, vendor: &[u8], signature, brand: &str| {
        let (b, _) = build(spec, Topology::flat(1));
        let t = b.table(0);
        let l = t.find(0, 0).unwrap();
        let id: Vec<u8> = [l.ebx, l.edx, l.ecx].iter().flat_map(|w| w.to_le_bytes()).collect();
        assert_eq!(id, vendor, "{spec}");
        assert_eq!(t.find(1, 0).unwrap().eax, signature, "{spec}");
        assert!(b.brand().starts_with(brand), "{spec}: {}", b.brand());
    };
    check("qemu64", b"AuthenticAMD", 0x0006_0fb1, "QEMU Virtual CPU");
    check("Nehalem", b"GenuineIntel", 0x0001_06a3, "Intel Core i7");
    check("haswell", b"GenuineIntel", 0x0003_06c4, "Intel Core Processor (Haswell)");
    check("Skylake", b"GenuineIntel", 0x0005_06e3, "Intel Core Processor (Skylake)");
    check("EPYC", b"AuthenticAMD", 0x0080_0f12, "AMD EPYC");
    check("host", b"AuthenticAMD", 0x00a2_0f12, "Virtual");
    let (b, _) = CpuBuilder::new(
        &"max".parse().unwrap(),
        &everything(b"GenuineIntel"),
        Topology::flat(1),
        Hypervisor::default(),
    );
    assert_eq!(b.vendor(), Vendor::Intel);
    assert!(b.table(0).find(0x1f, 1).is_some() && b.table(0).find(0x8000_001e, 0).is_none());
}

#[test]
fn topology_leaves_agree() {
    let topo = Topology { sockets: 2, cores: 3, threads: 2 };
    assert_eq!(topo.cpus(), 12);
    let ids: Vec<u32> = (0..12).map(|i| topo.apic_id(i)).collect();
    assert_eq!(ids, [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]);
    let (b, _) = build("EPYC", topo);
    let t = b.table(11);
    let one = t.find(1, 0).unwrap();
    assert_eq!((one.ebx >> 24, one.ebx >> 16 & 0xff, one.edx >> 28 & 1), (11, 8, 1));
    let (smt, core) = (t.find(0xb, 0).unwrap(), t.find(0xb, 1).unwrap());
    assert_eq!((smt.eax, smt.ebx, smt.ecx, smt.edx), (1, 2, 0x100, 11));
    assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (3, 6, 0x201, 11));
    let e = t.find(0x8000_001e, 0).unwrap();
    assert_eq!((e.eax, e.ebx, e.ecx), (11, 0x101, 1));
    assert_eq!(t.find(0x8000_0008, 0).unwrap().ecx, 3 << 12 | 5);
    let l3 = t.find(0x8000_001d, 3).unwrap();
    assert_eq!((l3.eax & 31, l3.eax >> 5 & 7, l3.eax >> 14 & 0xfff), (3, 3, 7));
    assert_eq!((l3.ebx >> 22) + 1, 16);
    assert_eq!(64 * 16 * (l3.ecx + 1), 8 << 20);
    let (b, _) = build("Haswell", Topology::flat(4));
    let t = b.table(2);
    assert_eq!(t.find(4, 0).unwrap().eax >> 26, 3);
    assert!(t.find(4, 4).unwrap().eax == 0);
    let (b, _) = build("Haswell", Topology::flat(1));
    assert_eq!(b.table(0).find(1, 0).unwrap().edx >> 28 & 1, 0);
}

#[test]
fn xsave_and_hypervisor_leaves() {
    let (b, _) = build("EPYC", Topology::flat(1));
    let t = b.table(0);
    let d = t.find(0xd, 0).unwrap();
    assert_eq!((d.eax, d.ebx, d.ecx), (7, 576, 832));
    let d = t.find(0xd, 2).unwrap();
    assert_eq!((d.eax, d.ebx), (256, 576));
    let h = t.find(0x4000_0000, 0).unwrap();
    let id: Vec<u8> = [h.ebx, h.ecx, h.edx].iter().flat_map(|w| w.to_le_bytes()).collect();
    assert_eq!(id, b"KVMKVMKVM\0\0\0");
    let k = t.find(0x4000_0001, 0).unwrap();
    assert_eq!((k.eax, k.edx), (9, 1));
    assert_eq!(t.find(0x4000_0010, 0).unwrap().eax, 2_600_000);
    assert_eq!(t.find(1, 0).unwrap().ecx >> 31, 1);
    let (b, _) = build("EPYC,-hypervisor", Topology::flat(1));
    assert!(b.table(0).find(0x4000_0000, 0).is_none());
    assert_eq!(b.table(0).find(1, 0).unwrap().ecx >> 31, 0);
    assert_eq!(t.find(0x8000_0008, 0).unwrap().eax, 46 | 48 << 8);
}
