//! The control group that this process is in (Linux Documentation/admin-guide/cgroup-v2.rst).

use std::path::{Path, PathBuf};

use super::read_trimmed;

/// What control groups offer here.
#[derive(Debug, Clone, PartialEq)]
pub struct Cgroup {
    /// Our folder in the version 2 hierarchy; none on a host with version 1 only.
    pub path: Option<PathBuf>,
    /// Controllers that this folder has.
    pub controllers: Vec<String>,
    /// Whether we may make groups below it.
    pub writable: bool,
    /// The tightest memory limit of our folder and those above, in bytes.
    pub memory_max: Option<u64>,
    /// The tightest processor quota of the same, in processors.
    pub cpu_max: Option<f64>,
}

/// The group of this process.
#[must_use]
pub fn cgroup() -> Cgroup {
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    read(Path::new("/sys/fs/cgroup"), &own)
}

fn read(mount: &Path, own: &str) -> Cgroup {
    let mut group =
        Cgroup { path: None, controllers: Vec::new(), writable: false, memory_max: None, cpu_max: None };
    // Version 2 is the one mounted with this file in its root; its line in /proc/self/cgroup is number 0.
    if !mount.join("cgroup.controllers").exists() {
        return group;
    }
    let Some(relative) = own.lines().find_map(|l| l.strip_prefix("0::/")) else { return group };
    let mut dir = mount.join(relative);
    if !dir.is_dir() {
        // Inside a container the path can be that of the host, which is not visible here.
        dir = mount.to_path_buf();
    }
    group.controllers = read_trimmed(&dir.join("cgroup.controllers"))
        .unwrap_or_default()
        .split_whitespace()
        .map(str::to_owned)
        .collect();
    group.writable = may_write(&dir.join("cgroup.procs"));
    for level in dir.ancestors().take_while(|d| d.starts_with(mount)) {
        let memory = read_trimmed(&level.join("memory.max")).and_then(|t| t.parse().ok());
        group.memory_max = group.memory_max.into_iter().chain(memory).min();
        let cpu = read_trimmed(&level.join("cpu.max")).and_then(|t| quota(&t));
        group.cpu_max = group.cpu_max.into_iter().chain(cpu).reduce(f64::min);
    }
    group.path = Some(dir);
    group
}

/// `cpu.max` is quota and period in microseconds, or `max` and the period.
fn quota(text: &str) -> Option<f64> {
    let mut fields = text.split_whitespace();
    let quota: f64 = fields.next()?.parse().ok()?;
    let period: f64 = fields.next()?.parse().ok()?;
    (period > 0.0).then_some(quota / period)
}

fn may_write(file: &Path) -> bool {
    std::fs::OpenOptions::new().write(true).open(file).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn the_tightest_limit_on_the_way_up_counts() {
        let mount = std::env::temp_dir().join(format!("ringfort-cgroup-{}", std::process::id()));
        let own = mount.join("slice/own");
        fs::create_dir_all(&own).expect("folders");
        let put = |dir: &Path, name: &str, text: &str| fs::write(dir.join(name), text).expect("file");
        put(&mount, "cgroup.controllers", "cpu memory pids\n");
        put(&own, "cgroup.controllers", "cpu memory\n");
        put(&own, "cgroup.procs", "");
        put(&own, "memory.max", "max\n");
        put(&own, "cpu.max", "150000 100000\n");
        put(&mount.join("slice"), "memory.max", "1073741824\n");
        put(&mount.join("slice"), "cpu.max", "max 100000\n");
        let g = read(&mount, "0::/slice/own\n");
        let none = read(&mount, "12:cpu:/x\n");
        let v1 = read(&mount.join("slice"), "0::/slice/own\n");
        fs::remove_dir_all(&mount).expect("clean up");
        assert_eq!(g.path, Some(own));
        assert_eq!(g.controllers, ["cpu", "memory"]);
        assert!(g.writable);
        assert_eq!(g.memory_max, Some(1 << 30));
        assert_eq!(g.cpu_max, Some(1.5));
        assert_eq!(none.path, None);
        assert_eq!(v1.path, None);
    }
}
