//! What this host has: memory, processors, control groups, devices, limits.

mod cgroup;
mod cpu;
mod memory;
mod virtualization;

pub use cgroup::{Cgroup, cgroup};
pub use cpu::{Cpu, CpuFeature, cpu};
pub use memory::{HugePagePool, Memory, Transparent, huge_page_pools, memory, numa_nodes};
pub use virtualization::{Ability, Virtualization, virtualization};

use std::path::{Path, PathBuf};

/// Where a device file stands with us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// There, and we may read and write it.
    Usable,
    /// There, but not for us.
    Denied,
    /// Not there.
    Absent,
}

/// Whether `path` can be read and written by this process.
#[must_use]
pub fn access(path: &Path) -> Access {
    match std::fs::OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Access::Usable,
        Err(e) => match e.raw_os_error() {
            Some(libc::ENOENT | libc::ENXIO | libc::ENODEV | libc::ENOTDIR) => Access::Absent,
            _ => Access::Denied,
        },
    }
}

/// A resource limit (setrlimit(2)): soft and hard value, `None` for no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// What holds now.
    pub soft: Option<u64>,
    /// To what this process may raise it.
    pub hard: Option<u64>,
}

/// The limit on open files.
#[must_use]
pub fn open_files_limit() -> Limit {
    limit(libc::RLIMIT_NOFILE)
}

/// The limit on locked memory, in bytes.
#[must_use]
pub fn locked_memory_limit() -> Limit {
    limit(libc::RLIMIT_MEMLOCK)
}

fn limit(resource: libc::__rlimit_resource_t) -> Limit {
    let mut value = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: `value` is there to be written; a failure leaves "no limit".
    unsafe { libc::getrlimit(resource, &raw mut value) };
    let of = |v: libc::rlim_t| (v != libc::RLIM_INFINITY).then_some(v);
    Limit { soft: of(value.rlim_cur), hard: of(value.rlim_max) }
}

/// Where `program` is: in `PATH`, or in the folders for administration that a user's `PATH` often lacks.
#[must_use]
pub fn find_program(program: &str) -> Option<PathBuf> {
    use std::os::unix::fs::PermissionsExt as _;
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|f| std::fs::metadata(f).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0))
}

/// Whether this process may make user namespaces, tried in a child that does nothing else.
#[must_use]
pub fn user_namespaces() -> bool {
    // SAFETY: the child calls only unshare and _exit, which are async-signal-safe, so forking is sound even with
    // other threads around.
    unsafe {
        let child = libc::fork();
        if child < 0 {
            return false;
        }
        if child == 0 {
            let ok = libc::unshare(libc::CLONE_NEWUSER) == 0;
            libc::_exit(i32::from(!ok));
        }
        let mut status = 0;
        while libc::waitpid(child, &raw mut status, 0) < 0 {
            if *libc::__errno_location() != libc::EINTR {
                return false;
            }
        }
        libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0
    }
}

/// A small file under `/proc` or `/sys`, trimmed.
fn read_trimmed(path: &Path) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|t| t.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_told_apart() {
        assert_eq!(access(Path::new("/dev/null")), Access::Usable);
        assert_eq!(access(Path::new("/dev/no-such-device")), Access::Absent);
        assert_eq!(access(Path::new("/")), Access::Denied, "a folder cannot be opened for writing");
    }

    #[test]
    fn limits_and_programs() {
        let files = open_files_limit();
        assert!(files.soft.is_none_or(|n| n >= 3));
        assert!(files.hard.is_none() || files.soft <= files.hard);
        assert!(find_program("sh").is_some());
        assert!(find_program("no-such-program-here").is_none());
    }

    #[test]
    fn asking_for_user_namespaces_leaves_this_process_alone() {
        let before = std::fs::read_link("/proc/self/ns/user").expect("link");
        let _ = user_namespaces();
        assert_eq!(std::fs::read_link("/proc/self/ns/user").expect("link"), before);
    }
}
