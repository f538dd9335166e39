//! What guest memory and vCPUs are made of on the host: `--memory`, `--cpus` and the options of `--accel kvm`.

use super::parse::{ParseError, split, switch};
use super::{Problem, format_size, parse_size};
use ringfort_memory::{Backing, NodePolicy};
use serde::{Deserialize, Serialize};
use std::str::FromStr;

/// How RAM is spread over NUMA nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// From the nodes named only.
    #[default]
    Bind,
    /// From the first one while it has some.
    Preferred,
    /// From all in turns.
    Interleave,
}

/// What RAM is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MemoryBacking {
    /// Size of huge pages from the host's pool, in bytes.
    pub hugepages: Option<u64>,
    /// A memory file that other processes can map.
    pub shared: bool,
    /// Take all pages from the host at the start.
    pub prealloc: bool,
    /// NUMA nodes of the host.
    pub nodes: Vec<u32>,
    /// How RAM is spread over them.
    pub policy: Policy,
    /// Let the host merge equal pages (KSM).
    pub merge: bool,
    /// Let the host use transparent huge pages.
    pub thp: bool,
}

impl Default for MemoryBacking {
    fn default() -> MemoryBacking {
        MemoryBacking {
            hugepages: None,
            shared: false,
            prealloc: false,
            nodes: Vec::new(),
            policy: Policy::default(),
            merge: false,
            thp: true,
        }
    }
}

impl MemoryBacking {
    /// In terms of the memory itself.
    pub fn backing(&self) -> Backing {
        Backing {
            huge_pages: self.hugepages,
            shared: self.shared,
            prealloc: self.prealloc,
            nodes: self.nodes.clone(),
            policy: match self.policy {
                Policy::Bind => NodePolicy::Bind,
                Policy::Preferred => NodePolicy::Preferred,
                Policy::Interleave => NodePolicy::Interleave,
            },
            merge: self.merge,
            transparent: self.thp,
        }
    }

    pub(super) fn problems(&self, memory: u64) -> Vec<Problem> {
        let mut all = Vec::new();
        let mut problem = |what: String| all.push(Problem { field: "memory".into(), what });
        if let Some(page) = self.hugepages {
            if !page.is_power_of_two() || page < 4096 {
                problem(format!(
                    "hugepages={}: give a page size of the host, for instance 2M",
                    format_size(page)
                ));
            } else if !memory.is_multiple_of(page) {
                problem(format!("{} is no whole number of {} pages", format_size(memory), format_size(page)));
            }
            if self.merge {
                problem("merge=on: huge pages are never merged; leave one of the two out".into());
            }
        }
        if self.policy != Policy::Bind && self.nodes.is_empty() {
            problem("policy says how nodes are used; name some with node=0-1".into());
        }
        all
    }
}

/// What `--memory` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryOption {
    /// Bytes.
    pub size: u64,
    /// What it is made of.
    pub backing: MemoryBacking,
}

/// Numbers and ranges joined by `+` or `,`: `2-5`, `0+2`, `0-1+4`.
fn ranges(key: &str, text: &str) -> Result<Vec<u32>, ParseError> {
    let bad = || ParseError(format!("{key}={text}: give numbers and ranges, for instance 2-5 or 0-1+4"));
    let mut all = Vec::new();
    for part in text.split(['+', ',']) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().map_err(|_| bad())?, last.parse().map_err(|_| bad())?);
        if first > last || last > 4095 {
            return Err(bad());
        }
        all.extend(first..=last);
    }
    Ok(all)
}

/// `key=value` parts; a first part without `=` is the value of `first`.
fn pairs<'a>(first: &'a str, parts: &'a [String]) -> impl Iterator<Item = (&'a str, Option<&'a str>)> {
    parts.iter().enumerate().map(move |(n, part)| match part.split_once('=') {
        Some((k, v)) => (k, Some(v)),
        None if n == 0 => (first, Some(part.as_str())),
        None => (part.as_str(), None),
    })
}

fn need<'a>(key: &str, value: Option<&'a str>) -> Result<&'a str, ParseError> {
    value.filter(|v| !v.is_empty()).ok_or_else(|| ParseError(format!("{key} needs a value")))
}

impl FromStr for MemoryOption {
    type Err = ParseError;

    /// `[size=]SIZE[,hugepages=SIZE][,shared=on][,prealloc=on][,node=N-M][,policy=…][,merge=on][,thp=off]`.
    fn from_str(text: &str) -> Result<MemoryOption, ParseError> {
        let (mut size, mut backing) = (None, MemoryBacking::default());
        for (key, value) in pairs("size", &split(text)) {
            match key {
                "size" => size = Some(parse_size(need(key, value)?, 1 << 20).map_err(ParseError)?),
                "hugepages" => {
                    let page = need(key, value)?;
                    // As a switch it means the usual size.
                    backing.hugepages = match page {
                        "off" => None,
                        "on" => Some(2 << 20),
                        _ => Some(parse_size(page, 1 << 20).map_err(ParseError)?),
                    };
                }
                "shared" => backing.shared = switch(key, value)?,
                "prealloc" => backing.prealloc = switch(key, value)?,
                "merge" => backing.merge = switch(key, value)?,
                "thp" => backing.thp = switch(key, value)?,
                "node" => backing.nodes = ranges(key, need(key, value)?)?,
                "policy" => {
                    backing.policy = match need(key, value)? {
                        "bind" => Policy::Bind,
                        "preferred" => Policy::Preferred,
                        "interleave" => Policy::Interleave,
                        other => {
                            return Err(ParseError(format!(
                                "policy={other}: give bind, preferred or interleave"
                            )));
                        }
                    }
                }
                _ => {
                    return Err(ParseError(format!(
                        "unknown memory option '{key}'; known are size, hugepages, shared, prealloc, node, policy, merge, thp"
                    )));
                }
            }
        }
        let size =
            size.ok_or_else(|| ParseError("memory needs a size, for instance 2G or size=2G".into()))?;
        Ok(MemoryOption { size, backing })
    }
}

/// Where and how vCPUs' threads run.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Placement {
    /// Host CPU of each vCPU; anywhere if empty.
    pub pin: Vec<u32>,
    /// Real-time priority, 1 to 99.
    pub realtime: Option<u8>,
}

impl Placement {
    pub(super) fn problems(&self, cpus: u32) -> Vec<Problem> {
        let mut all = Vec::new();
        let mut problem = |what: String| all.push(Problem { field: "cpus".into(), what });
        if !self.pin.is_empty() && self.pin.len() != cpus as usize {
            problem(format!("pin names {} host CPUs for {cpus} vCPUs; name one for each", self.pin.len()));
        }
        if self.realtime.is_some_and(|p| p == 0 || p > 99) {
            problem("realtime: give a priority from 1 to 99".into());
        }
        all
    }
}

/// What `--cpus` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpusOption {
    /// How many.
    pub count: u32,
    /// Where they run.
    pub placement: Placement,
}

impl FromStr for CpusOption {
    type Err = ParseError;

    /// `[count=]N[,pin=A-B][,realtime=P]`.
    fn from_str(text: &str) -> Result<CpusOption, ParseError> {
        let (mut count, mut placement) = (None, Placement::default());
        for (key, value) in pairs("count", &split(text)) {
            let number = |what: &str| {
                let v = need(key, value)?;
                v.parse::<u32>().map_err(|_| ParseError(format!("'{v}': give {what}")))
            };
            match key {
                "count" => count = Some(number("a number of vCPUs")?),
                "pin" => placement.pin = ranges(key, need(key, value)?)?,
                "realtime" => {
                    placement.realtime = Some(number("a priority from 1 to 99")?.min(255) as u8);
                }
                _ => {
                    return Err(ParseError(format!(
                        "unknown option '{key}'; known are count, pin and realtime"
                    )));
                }
            }
        }
        let count = count.ok_or_else(|| ParseError("give a number of vCPUs first".into()))?;
        Ok(CpusOption { count, placement })
    }
}

/// Where I/O APIC, 8259 and 8254 are under KVM; the local APICs are always in the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvmIrqchip {
    /// In the machine.
    #[default]
    Split,
    /// In the kernel; the machine has no HPET then.
    Kernel,
}

/// How KVM is used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KvmConfig {
    /// Where I/O APIC, 8259 and 8254 are.
    pub irqchip: KvmIrqchip,
    /// Log the guest's writes in a ring of this many entries per vCPU instead of in bitmaps.
    pub dirty_ring: Option<u32>,
    /// How long a halted vCPU's thread watches for interrupts before it sleeps, in nanoseconds.
    pub halt_poll_ns: Option<u32>,
    /// Doorbells go to the devices' I/O threads without an exit to the vCPU's, where KVM can do that.
    #[serde(skip_serializing_if = "is_on")]
    pub ioeventfd: bool,
    /// Busy interrupts are raised by event descriptors, where KVM can do that.
    #[serde(skip_serializing_if = "is_on")]
    pub irqfd: bool,
    /// Stores without immediate effect wait for the next exit, where KVM can do that.
    #[serde(skip_serializing_if = "is_on")]
    pub coalesce: bool,
}

impl Default for KvmConfig {
    fn default() -> KvmConfig {
        KvmConfig {
            irqchip: KvmIrqchip::default(),
            dirty_ring: None,
            halt_poll_ns: None,
            ioeventfd: true,
            irqfd: true,
            coalesce: true,
        }
    }
}

/// Left out of saved configurations, which then are read by versions that do not know the switch.
#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes fields by reference")]
fn is_on(switch: &bool) -> bool {
    *switch
}

/// A time with its unit; plain numbers are nanoseconds.
fn nanoseconds(key: &str, text: &str) -> Result<u32, ParseError> {
    let bad = || ParseError(format!("{key}={text}: give a time, for instance 200us or 0"));
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let scale = match &text[digits.len()..] {
        "" | "ns" => 1,
        "us" => 1_000,
        "ms" => 1_000_000,
        _ => return Err(bad()),
    };
    digits.parse::<u32>().ok().and_then(|n| n.checked_mul(scale)).ok_or_else(bad)
}

impl KvmConfig {
    /// The options after `kvm,`.
    pub(super) fn from_options(text: &str) -> Result<KvmConfig, ParseError> {
        let mut config = KvmConfig::default();
        for part in split(text) {
            let (key, value) = part.split_once('=').map_or((part.as_str(), None), |(k, v)| (k, Some(v)));
            match key {
                "dirty-ring" => {
                    let v = need(key, value)?;
                    let n = v.parse().map_err(|_| {
                        ParseError(format!("{key}={v}: give a number of entries, for instance 4096"))
                    })?;
                    config.dirty_ring = Some(n);
                }
                "irqchip" => {
                    config.irqchip = match need(key, value)? {
                        "split" => KvmIrqchip::Split,
                        "kernel" => KvmIrqchip::Kernel,
                        v => return Err(ParseError(format!("irqchip={v}: give split or kernel"))),
                    }
                }
                "ioeventfd" => config.ioeventfd = switch(key, value)?,
                "irqfd" => config.irqfd = switch(key, value)?,
                "coalesce" => config.coalesce = switch(key, value)?,
                "halt-poll" => config.halt_poll_ns = Some(nanoseconds(key, need(key, value)?)?),
                _ => {
                    return Err(ParseError(format!(
                        "kvm has no option '{key}'; it has irqchip=split|kernel, dirty-ring=ENTRIES, halt-poll=TIME, ioeventfd=off, irqfd=off and coalesce=off"
                    )));
                }
            }
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory() {
        let m: MemoryOption = "512M".parse().unwrap();
        assert_eq!((m.size, m.backing), (512 << 20, MemoryBacking::default()));
        let m: MemoryOption =
            "size=4G,hugepages=2M,shared=on,prealloc,node=0-1,policy=interleave,thp=off".parse().unwrap();
        let want = MemoryBacking {
            hugepages: Some(2 << 20),
            shared: true,
            prealloc: true,
            nodes: vec![0, 1],
            policy: Policy::Interleave,
            merge: false,
            thp: false,
        };
        assert_eq!((m.size, m.backing), (4 << 30, want));
        for (bad, says) in [
            ("shared=on", "needs a size"),
            ("", "needs a value"),
            ("1G,colour=red", "unknown memory option 'colour'"),
            ("1G,policy=some", "bind, preferred or interleave"),
            ("1G,node=3-1", "ranges"),
            ("1G,hugepages=", "needs a value"),
            ("lots", "no size"),
        ] {
            let e = bad.parse::<MemoryOption>().unwrap_err().to_string();
            assert!(e.contains(says), "{bad}: {e}");
        }
        let all = |m: &str, size| m.parse::<MemoryOption>().unwrap().backing.problems(size);
        assert_eq!(all("1G,hugepages=3M,merge=on", 1 << 30).len(), 2);
        assert_eq!(all("1G,hugepages=1G", 3 << 29).len(), 1);
        assert_eq!(all("1G,policy=preferred", 1 << 30).len(), 1);
        assert!(all("1G,hugepages=on", 1 << 30).is_empty());
    }

    #[test]
    fn cpus() {
        let c: CpusOption = "4,pin=2-5,realtime=10".parse().unwrap();
        assert_eq!(
            (c.count, c.placement.pin.as_slice(), c.placement.realtime),
            (4, &[2, 3, 4, 5][..], Some(10))
        );
        let c: CpusOption = "count=3,pin=0+2,,7".parse().unwrap();
        assert_eq!(c.placement.pin, [0, 2, 7]);
        assert!(c.placement.problems(3).is_empty());
        assert_eq!(c.placement.problems(2).len(), 1);
        let none = Placement { realtime: Some(100), ..Placement::default() };
        assert_eq!(none.problems(1).len(), 1);
        for bad in ["", "many", "pin=1", "2,pin=", "2,pin=a", "2,turbo=on", "2,realtime=high"] {
            assert!(bad.parse::<CpusOption>().is_err(), "{bad}");
        }
    }

    #[test]
    fn kvm() {
        let k = KvmConfig::from_options("irqchip=kernel,dirty-ring=4096,halt-poll=200us").unwrap();
        assert_eq!(k.irqchip, KvmIrqchip::Kernel);
        assert_eq!((k.dirty_ring, k.halt_poll_ns), (Some(4096), Some(200_000)));
        assert!(k.ioeventfd && k.irqfd && k.coalesce);
        let k = KvmConfig::from_options("ioeventfd=off,irqfd=off,coalesce=off").unwrap();
        assert!(!k.ioeventfd && !k.irqfd && !k.coalesce);
        let json = serde_json::to_string(&KvmConfig::default()).unwrap();
        assert!(!json.contains("eventfd"), "{json}");
        for bad in [
            "",
            "irqfd=maybe",
            "irqchip=half",
            "halt-poll=5h",
            "halt-poll=5000ms",
            "dirty-ring=big",
            "tier=interp",
        ] {
            assert!(KvmConfig::from_options(bad).is_err(), "{bad}");
        }
    }
}
