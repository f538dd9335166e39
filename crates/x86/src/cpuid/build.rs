//! From a CPU description and what the engine offers to the table of one vCPU.

use super::model::{AMD_CACHES, INTEL_CACHES};
use super::{Cache, CacheKind, CpuSpec, CpuidTable, FeatureSet, Leaf, Register, Vendor};

/// How many sockets, cores per socket and threads per core a machine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    /// Sockets.
    pub sockets: u32,
    /// Cores of a socket.
    pub cores: u32,
    /// Threads of a core.
    pub threads: u32,
}

impl Topology {
    /// One socket, one thread per core.
    pub fn flat(cpus: u32) -> Topology {
        Topology { sockets: 1, cores: cpus.max(1), threads: 1 }
    }

    /// vCPUs in all.
    pub fn cpus(&self) -> u32 {
        self.sockets.saturating_mul(self.cores).saturating_mul(self.threads)
    }

    fn thread_bits(&self) -> u32 {
        bits(self.threads)
    }

    /// Bits of the APIC ID below the package number.
    fn package_bits(&self) -> u32 {
        bits(self.threads) + bits(self.cores)
    }

    /// APIC ID of vCPU `index`, counted thread first, then core, then socket. Each level takes whole bits, so IDs have
    /// gaps when a level's size is no power of two (Intel SDM 3A section 9.9).
    pub fn apic_id(&self, index: u32) -> u32 {
        let (threads, cores) = (self.threads.max(1), self.cores.max(1));
        let thread = index % threads;
        let core = index / threads % cores;
        let socket = index / threads / cores;
        socket << self.package_bits() | core << self.thread_bits() | thread
    }
}

/// Bits that number `n` things.
fn bits(n: u32) -> u32 {
    n.max(1).next_power_of_two().trailing_zeros()
}

/// The paravirtual leaves (Linux Documentation/virt/kvm/x86/cpuid.rst).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Hypervisor {
    /// EAX of 0x40000001: what the engine's KVM interface has.
    pub features: u32,
    /// EDX of 0x40000001: hints.
    pub hints: u32,
    /// Frequency of the TSC in kHz, for 0x40000010.
    pub tsc_khz: u32,
    /// Frequency of the local APIC's timer in kHz, for 0x40000010; 0 when not told.
    pub apic_khz: u32,
}

/// Features that were asked for and cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Dropped {
    /// Asked for with `+feature`.
    pub requested: Vec<&'static str>,
    /// Part of the model.
    pub of_model: Vec<&'static str>,
}

impl Dropped {
    /// Whether everything asked for is there.
    pub fn is_empty(&self) -> bool {
        self.requested.is_empty() && self.of_model.is_empty()
    }
}

/// Builds the tables of a machine's vCPUs.
#[derive(Debug, Clone)]
pub struct CpuBuilder {
    vendor: Vendor,
    signature: u32,
    brand: [u8; 48],
    caches: Vec<Cache>,
    features: FeatureSet,
    level: u32,
    ext_21: u32,
    physical_bits: u32,
    topology: Topology,
    hypervisor: Hypervisor,
    extended_topology: bool,
}

/// Given to every model where the engine has them: the guest runs better and a QEMU user expects them.
const ALWAYS: &str = "x2apic tsc-deadline tsc-adjust arat";
/// Made by the builder, whatever the engine says.
const MADE: &str = "hypervisor topoext";
/// Not to be seen on CPUs by Intel, whatever the engine says: where the bits are not reserved there, systems do not look at them.
const AMD_ONLY: &str = "topoext cr8legacy misalignsse osvw xsaveerptr clzero";
/// Made by the builder from the topology; asking changes nothing.
const FROM_TOPOLOGY: &str = "ht cmp-legacy";

impl CpuBuilder {
    /// Cut `spec` to what the engine offers (`offered`: its capabilities' table). The second value names what was
    /// asked for and is not there.
    pub fn new(
        spec: &CpuSpec,
        offered: &CpuidTable,
        topology: Topology,
        hypervisor: Hypervisor,
    ) -> (CpuBuilder, Dropped) {
        let m = spec.model;
        let host_vendor = offered.find(0, 0).map(|l| match &l.ebx.to_le_bytes() {
            b"Genu" => Vendor::Intel,
            _ => Vendor::Amd,
        });
        let vendor = if m.host() { host_vendor.unwrap_or(m.vendor) } else { m.vendor };

        let mut available = FeatureSet::from_table(offered);
        available = available.or(&FeatureSet::of(MADE)).minus(&FeatureSet::of(FROM_TOPOLOGY));
        if vendor == Vendor::Intel {
            available = available.minus(&FeatureSet::of(AMD_ONLY));
        }
        let kept = |set: FeatureSet| spec.within.filter(|_| m.host()).map_or(set, |w| set.and(&w));
        let mut wanted = FeatureSet::default();
        if m.host() {
            wanted = kept(available).or(&available.and(&FeatureSet::of(MADE)));
        }
        for list in m.features {
            wanted = wanted.or(&FeatureSet::of(list));
        }
        wanted = wanted.or(&kept(FeatureSet::of(ALWAYS).and(&available)));
        wanted.set("hypervisor", true);
        let mut requested = FeatureSet::default();
        for &(name, on) in &spec.changes {
            wanted.set(name, on);
            requested.set(name, on);
        }
        let wanted = wanted.minus(&FeatureSet::of(FROM_TOPOLOGY));
        let requested = requested.minus(&FeatureSet::of(FROM_TOPOLOGY));
        let mut features = wanted.and(&available);
        features.drop_unsupported_dependents();
        // What falls because the user took away its base is the user's doing and not worth a warning, unless it was
        // asked for by name.
        let mut possible = wanted;
        possible.drop_unsupported_dependents();
        let missing = wanted.minus(&features);
        let dropped = Dropped {
            requested: missing.and(&requested).names(),
            of_model: missing.minus(&requested).and(&possible).names(),
        };

        let found = |f| offered.find(f, 0);
        let signature = match found(1).filter(|l| m.host() && l.eax != 0) {
            Some(l) => l.eax,
            None => signature(m.family, m.model, m.stepping),
        };
        let mut brand = [0; 48];
        match (found(0x8000_0002), found(0x8000_0003), found(0x8000_0004)) {
            (Some(a), Some(b), Some(c)) if m.host() && a.eax != 0 => {
                let words = [a, b, c].into_iter().flat_map(|l| [l.eax, l.ebx, l.ecx, l.edx]);
                for (to, w) in brand.chunks_mut(4).zip(words) {
                    to.copy_from_slice(&w.to_le_bytes());
                }
                brand[47] = 0;
            }
            _ => {
                let text = m.brand.as_bytes();
                let n = text.len().min(47);
                brand[..n].copy_from_slice(&text[..n]);
            }
        }
        let caches = if m.host() { offered_caches(offered, vendor) } else { m.caches.to_vec() };
        let level = if m.host() { found(0).map_or(m.level, |l| l.eax).clamp(0xd, 0x1f) } else { m.level };
        let physical_bits = found(0x8000_0008).map_or(40, |l| l.eax & 0xff).clamp(36, 52);
        // Facts about selectors and LFENCE, not things to switch: pass on what holds.
        let ext_21 = found(0x8000_0021).map_or(0, |l| l.eax & (1 << 0 | 1 << 2 | 1 << 6));
        let builder = CpuBuilder {
            vendor,
            signature,
            brand,
            caches,
            features,
            level: if features.has("xsave") { level.max(0xd) } else { level },
            ext_21: if vendor == Vendor::Amd { ext_21 } else { 0 },
            physical_bits,
            topology,
            hypervisor,
            extended_topology: m.host() && vendor == Vendor::Intel && level >= 0x1f,
        };
        (builder, dropped)
    }

    /// Offer fewer physical address bits than the engine (for guests that must move to smaller hosts).
    pub fn set_physical_bits(&mut self, bits: u32) {
        self.physical_bits = bits.clamp(36, self.physical_bits);
    }

    /// Physical address bits.
    pub fn physical_bits(&self) -> u32 {
        self.physical_bits
    }

    /// Features that the vCPUs have.
    pub fn features(&self) -> &FeatureSet {
        &self.features
    }

    /// Vendor.
    pub fn vendor(&self) -> Vendor {
        self.vendor
    }

    /// Leaf 1 EAX: stepping, model and family, packed.
    pub fn signature(&self) -> u32 {
        self.signature
    }

    /// Brand string.
    pub fn brand(&self) -> String {
        String::from_utf8_lossy(&self.brand).trim_end_matches('\0').trim().to_owned()
    }

    /// Topology.
    pub fn topology(&self) -> Topology {
        self.topology
    }

    /// The table of the vCPU with this APIC ID (see [`Topology::apic_id`]).
    pub fn table(&self, apic_id: u32) -> CpuidTable {
        let mut t = CpuidTable::default();
        self.basic(&mut t, apic_id);
        self.topology_leaves(&mut t, apic_id);
        self.xsave(&mut t);
        self.paravirtual(&mut t);
        self.extended(&mut t, apic_id);
        t.leaves.sort_by_key(|l| (l.function, l.index));
        t
    }

    fn word(&self, function: u32, index: Option<u32>, register: Register) -> u32 {
        self.features.word(function, index, register)
    }

    /// Threads of one package, as APIC IDs are laid out.
    fn package_ids(&self) -> u32 {
        1 << self.topology.package_bits()
    }

    fn basic(&self, t: &mut CpuidTable, apic_id: u32) {
        let [b, d, c] = vendor_words(self.vendor);
        put(t, 0, None, [self.level, b, c, d]);
        let per_package = self.topology.cores.max(1) * self.topology.threads.max(1);
        let logical = self.package_ids().min(255);
        let mut edx = self.word(1, None, Register::Edx);
        if per_package > 1 {
            edx |= 1 << 28;
        }
        // CLFLUSH line in 8-byte units, logical processors, initial APIC ID.
        let ebx = 8 << 8 | logical << 16 | (apic_id & 0xff) << 24;
        put(t, 1, None, [self.signature, ebx, self.word(1, None, Register::Ecx), edx]);
        if self.vendor == Vendor::Intel {
            // Descriptors of a Haswell: TLBs and prefetch; 0xff sends the reader to leaf 4 for caches.
            put(t, 2, None, [0x7603_6301, 0x00f0_b5ff, 0, 0x00c3_0000]);
            for (i, cache) in (0..).zip(&self.caches) {
                put(t, 4, Some(i), self.cache_leaf(cache, true));
            }
            put(t, 4, Some(self.caches.len() as u32), [0; 4]);
        }
        if self.features.has("monitor") {
            // One 64-byte line; extensions exist, interrupts wake MWAIT even when masked.
            put(t, 5, None, [64, 64, 3, 0]);
        }
        put(t, 6, None, [self.word(6, None, Register::Eax), 0, 0, 0]);
        let seven_1 = self.word(7, Some(1), Register::Eax);
        let r = |register| self.word(7, Some(0), register);
        put(t, 7, Some(0), [u32::from(seven_1 != 0), r(Register::Ebx), r(Register::Ecx), r(Register::Edx)]);
        if seven_1 != 0 {
            put(t, 7, Some(1), [seven_1, 0, 0, 0]);
        }
        // No performance counters.
        put(t, 0xa, None, [0; 4]);
    }

    fn topology_leaves(&self, t: &mut CpuidTable, apic_id: u32) {
        let topo = self.topology;
        let per_package = topo.cores.max(1) * topo.threads.max(1);
        let levels = [(1, topo.thread_bits(), topo.threads.max(1)), (2, topo.package_bits(), per_package)];
        let leaves: &[u32] = if self.extended_topology { &[0xb, 0x1f] } else { &[0xb] };
        for &function in leaves {
            for (i, (kind, shift, count)) in (0..).zip(levels) {
                put(t, function, Some(i), [shift, count, kind << 8 | i, apic_id]);
            }
            // The level that says "no more" still tells the x2APIC ID.
            put(t, function, Some(2), [0, 0, 2, apic_id]);
        }
    }

    fn xsave(&self, t: &mut CpuidTable) {
        if !self.features.has("xsave") {
            return;
        }
        let avx = self.features.has("avx");
        let (mask, size) = if avx { (7, 832) } else { (3, 576) };
        // EBX is the size for XCR0 as it is after reset (x87 only): 512 bytes legacy and the header.
        put(t, 0xd, Some(0), [mask, 576, size, 0]);
        let one = self.word(0xd, Some(1), Register::Eax);
        put(t, 0xd, Some(1), [one, if one & 0b1010 != 0 { 576 } else { 0 }, 0, 0]);
        if avx {
            put(t, 0xd, Some(2), [256, 576, 0, 0]);
        }
    }

    fn paravirtual(&self, t: &mut CpuidTable) {
        if !self.features.has("hypervisor") {
            return;
        }
        let h = &self.hypervisor;
        let [b, c, d] = words(b"KVMKVMKVM\0\0\0");
        put(t, 0x4000_0000, None, [0x4000_0010, b, c, d]);
        put(t, 0x4000_0001, None, [h.features, 0, 0, h.hints]);
        put(t, 0x4000_0010, None, [h.tsc_khz, h.apic_khz, 0, 0]);
    }

    fn extended(&self, t: &mut CpuidTable, apic_id: u32) {
        let amd = self.vendor == Vendor::Amd;
        let topoext = amd && self.features.has("topoext");
        let highest = match (amd, topoext) {
            (true, _) if self.ext_21 != 0 => 0x8000_0021,
            (true, true) => 0x8000_001e,
            _ => 0x8000_0008,
        };
        let [b, d, c] = if amd { vendor_words(self.vendor) } else { [0; 3] };
        put(t, 0x8000_0000, None, [highest, b, c, d]);
        let per_package = self.topology.cores.max(1) * self.topology.threads.max(1);
        let mut ecx = self.word(0x8000_0001, None, Register::Ecx);
        let mut edx = self.word(0x8000_0001, None, Register::Edx);
        if amd {
            // AMD repeats these bits of leaf 1 (APM 3, Fn8000_0001_EDX).
            edx |= self.word(1, None, Register::Edx) & 0x0183_f3ff;
            if per_package > 1 {
                ecx |= 1 << 1;
            }
        }
        put(t, 0x8000_0001, None, [if amd { self.signature } else { 0 }, 0, ecx, edx]);
        for (i, c) in (0..).zip(self.brand.chunks(16)) {
            let w = |n: usize| u32::from_le_bytes([c[n], c[n + 1], c[n + 2], c[n + 3]]);
            put(t, 0x8000_0002 + i, None, [w(0), w(4), w(8), w(12)]);
        }
        let cache = |level, kind| self.caches.iter().find(|c| c.level == level && c.kind == kind);
        let kib = |c: Option<&Cache>| c.map_or(0, |c| c.size >> 10);
        if amd {
            let l1 = |kind| {
                let c = cache(1, kind);
                kib(c).min(255) << 24 | c.map_or(0, |c| c.ways).min(255) << 16 | 1 << 8 | 64
            };
            // TLBs: 64 fully associative entries each.
            put(
                t,
                0x8000_0005,
                None,
                [0xff40_ff40, 0xff40_ff40, l1(CacheKind::Data), l1(CacheKind::Instruction)],
            );
        }
        let l2 = cache(2, CacheKind::Unified);
        let l2_word = kib(l2).min(0xffff) << 16 | l2.map_or(0, |c| associativity(c.ways)) << 12 | 1 << 8 | 64;
        let l3 = cache(3, CacheKind::Unified).filter(|_| amd);
        let l3_word =
            l3.map_or(0, |c| (c.size >> 19).min(0x3fff) << 18 | associativity(c.ways) << 12 | 1 << 8 | 64);
        put(t, 0x8000_0006, None, [0, 0, l2_word, l3_word]);
        put(t, 0x8000_0007, None, [0, 0, 0, self.word(0x8000_0007, None, Register::Edx)]);
        let size = if amd && per_package > 1 {
            self.topology.package_bits() << 12 | (per_package - 1).min(255)
        } else {
            0
        };
        let ebx = self.word(0x8000_0008, None, Register::Ebx);
        put(t, 0x8000_0008, None, [self.physical_bits | 48 << 8, ebx, size, 0]);
        if topoext {
            for (i, cache) in (0..).zip(&self.caches) {
                put(t, 0x8000_001d, Some(i), self.cache_leaf(cache, false));
            }
            put(t, 0x8000_001d, Some(self.caches.len() as u32), [0; 4]);
            let core = apic_id >> self.topology.thread_bits() & ((1 << bits(self.topology.cores)) - 1);
            let node = apic_id >> self.topology.package_bits();
            let threads = self.topology.threads.max(1);
            put(t, 0x8000_001e, None, [apic_id, (threads - 1) << 8 | core & 0xff, node & 0xff, 0]);
        }
        if self.ext_21 != 0 && amd {
            put(t, 0x8000_0021, None, [self.ext_21, 0, 0, 0]);
        }
    }

    /// Deterministic cache parameters: Intel leaf 4, and nearly the same at AMD's 0x8000001D.
    fn cache_leaf(&self, c: &Cache, intel: bool) -> [u32; 4] {
        let sharing = if c.level >= 3 { self.package_ids() } else { 1 << self.topology.thread_bits() };
        let cores = if intel { ((1u32 << bits(self.topology.cores)) - 1).min(63) << 26 } else { 0 };
        let eax = c.kind as u32 | u32::from(c.level) << 5 | 1 << 8 | (sharing - 1).min(0xfff) << 14 | cores;
        let ways = c.ways.max(1);
        let sets = (c.size / 64 / ways).max(1);
        // Intel's last level covers the levels below it.
        let edx = if c.level == 3 && intel { 2 } else { 0 };
        [eax, (ways - 1) << 22 | 63, sets - 1, edx]
    }
}

fn put(t: &mut CpuidTable, function: u32, index: Option<u32>, values: [u32; 4]) {
    t.leaves.push(Leaf::new(function, index, values));
}

fn words(text: &[u8; 12]) -> [u32; 3] {
    std::array::from_fn(|i| {
        u32::from_le_bytes([text[4 * i], text[4 * i + 1], text[4 * i + 2], text[4 * i + 3]])
    })
}

/// The vendor's name as EBX, EDX, ECX.
fn vendor_words(vendor: Vendor) -> [u32; 3] {
    words(vendor.id())
}

fn signature(family: u32, model: u32, stepping: u32) -> u32 {
    let (base, extended) = if family > 15 { (15, family - 15) } else { (family, 0) };
    extended << 20 | (model >> 4 & 15) << 16 | base << 8 | (model & 15) << 4 | stepping & 15
}

/// AMD's code for associativity (APM 3, table for Fn8000_0006).
fn associativity(ways: u32) -> u32 {
    match ways {
        0 | 1 => 1,
        2..=3 => 2,
        4..=7 => 4,
        8..=15 => 6,
        16..=31 => 8,
        32..=47 => 10,
        48..=63 => 11,
        64..=95 => 12,
        96..=127 => 13,
        _ => 14,
    }
}

/// The host's caches, where the engine tells them, else what the vendor's models have.
fn offered_caches(offered: &CpuidTable, vendor: Vendor) -> Vec<Cache> {
    let (function, fallback) =
        if vendor == Vendor::Intel { (4, INTEL_CACHES) } else { (0x8000_001d, AMD_CACHES) };
    let caches: Vec<Cache> = (0..8)
        .map_while(|i| offered.find(function, i).filter(|l| l.index.is_some() && l.eax & 31 != 0))
        .filter_map(|l| {
            let kind = match l.eax & 31 {
                1 => CacheKind::Data,
                2 => CacheKind::Instruction,
                3 => CacheKind::Unified,
                _ => return None,
            };
            let ways = (l.ebx >> 22) + 1;
            let line = (l.ebx & 0xfff) + 1;
            let partitions = (l.ebx >> 12 & 0x3ff) + 1;
            let size =
                [ways, line, partitions, l.ecx.saturating_add(1)].into_iter().fold(1u32, u32::saturating_mul);
            Some(Cache { level: (l.eax >> 5 & 7) as u8, kind, size, ways })
        })
        .collect();
    if caches.is_empty() { fallback.to_vec() } else { caches }
}
