//! Memory of the host, from `/proc/meminfo` (proc(5)) and the control group.

use std::path::Path;

/// The host's memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// All that the kernel manages.
    pub total: u64,
    /// What can be had without swapping, as the kernel estimates it.
    pub available: u64,
    /// Huge pages set aside, and free of those.
    pub huge_pages: (u64, u64),
    /// Size of one of those.
    pub huge_page_size: u64,
    /// Whether anonymous memory may get huge pages by itself: `always`, `madvise`, or `never`.
    pub transparent: Transparent,
}

/// Policy of transparent huge pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transparent {
    /// Everywhere.
    Always,
    /// Where asked for.
    Madvise,
    /// Nowhere, or the kernel does not have them.
    Never,
}

/// The host's memory; all zero where `/proc` cannot be read.
#[must_use]
pub fn memory() -> Memory {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let policy = super::read_trimmed(Path::new("/sys/kernel/mm/transparent_hugepage/enabled"));
    parse(&text, policy.as_deref())
}

fn parse(meminfo: &str, policy: Option<&str>) -> Memory {
    let field = |name: &str| -> u64 {
        meminfo
            .lines()
            .find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))
            .and_then(|v| v.split_whitespace().next()?.parse().ok())
            .unwrap_or(0)
    };
    let kib = |name: &str| field(name).saturating_mul(1024);
    Memory {
        total: kib("MemTotal"),
        available: kib("MemAvailable"),
        huge_pages: (field("HugePages_Total"), field("HugePages_Free")),
        huge_page_size: kib("Hugepagesize"),
        transparent: match policy {
            Some(p) if p.contains("[always]") => Transparent::Always,
            Some(p) if p.contains("[madvise]") => Transparent::Madvise,
            _ => Transparent::Never,
        },
    }
}

/// A pool of huge pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HugePagePool {
    /// Bytes of a page.
    pub size: u64,
    /// Pages in it.
    pub total: u64,
    /// Of those, free.
    pub free: u64,
}

/// The host's pools of huge pages, by ascending page size.
#[must_use]
pub fn huge_page_pools() -> Vec<HugePagePool> {
    let number = |p: std::path::PathBuf| super::read_trimmed(&p)?.parse::<u64>().ok();
    let mut all: Vec<HugePagePool> = std::fs::read_dir("/sys/kernel/mm/hugepages")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| {
            let name = e.file_name().into_string().ok()?;
            let kib: u64 = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
            let of = |file: &str| number(e.path().join(file)).unwrap_or(0);
            Some(HugePagePool { size: kib << 10, total: of("nr_hugepages"), free: of("free_hugepages") })
        })
        .collect();
    all.sort_by_key(|p| p.size);
    all
}

/// Numbers of the host's NUMA nodes, ascending.
#[must_use]
pub fn numa_nodes() -> Vec<u32> {
    let mut all: Vec<u32> = std::fs::read_dir("/sys/devices/system/node")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.strip_prefix("node")?.parse().ok())
        .collect();
    all.sort_unstable();
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read() {
        let text = "MemTotal:       24563000 kB\nMemFree: 1 kB\nMemAvailable:   23000000 kB\n\
                    HugePages_Total:       8\nHugePages_Free:        5\nHugepagesize:       2048 kB\n";
        let m = parse(text, Some("always [madvise] never"));
        assert_eq!(m.total, 24_563_000 << 10);
        assert_eq!(m.available, 23_000_000 << 10);
        assert_eq!(m.huge_pages, (8, 5));
        assert_eq!(m.huge_page_size, 2 << 20);
        assert_eq!(m.transparent, Transparent::Madvise);
        assert_eq!(parse("", None).total, 0);
    }

    #[test]
    fn this_host_has_memory() {
        let m = memory();
        assert!(m.available > 0 && m.available <= m.total);
    }
}
