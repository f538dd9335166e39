//! What earlier measurements left that were killed: folders and network namespaces named after processes that are no more.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What the folders' names begin with.
const FOLDER: &str = "ringfort-bench-net-";
/// What the namespaces' names begin with.
const NAMESPACE: &str = "rf-bench-";
/// Where iproute2 keeps namespaces.
const NAMESPACES: &str = "/run/netns";

/// This process's folder.
pub fn folder() -> PathBuf {
    std::env::temp_dir().join(format!("{FOLDER}{}", std::process::id()))
}

/// The name of this process's network namespace.
pub fn namespace() -> String {
    format!("{NAMESPACE}{}", std::process::id())
}

/// Those names in `folder` that begin with `prefix` and end with the number of a process that is no more.
fn orphans(folder: &Path, prefix: &str) -> Vec<String> {
    let names = fs::read_dir(folder).into_iter().flatten().flatten();
    let names = names.filter_map(|entry| entry.file_name().into_string().ok());
    let gone = |name: &String| {
        let pid = name.strip_prefix(prefix).and_then(|pid| pid.parse::<u32>().ok());
        pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
    };
    names.filter(gone).collect()
}

/// Remove it all.
pub fn remove() {
    let temporary = std::env::temp_dir();
    for name in orphans(&temporary, FOLDER) {
        let _ = fs::remove_dir_all(temporary.join(name));
    }
    for name in orphans(Path::new(NAMESPACES), NAMESPACE) {
        let _ = Command::new("ip").args(["netns", "del", &name]).status();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_belongs_to_the_living_stays() {
        let folder = std::env::temp_dir().join(format!("leftovers-{}", std::process::id()));
        let own = format!("{FOLDER}{}", std::process::id());
        // Beyond the largest process number (proc(5), pid_max).
        let gone = format!("{FOLDER}4194305");
        for name in [&own, &gone, &format!("{FOLDER}x"), "other-4194305"] {
            fs::create_dir_all(folder.join(name)).unwrap();
        }
        assert_eq!(orphans(&folder, FOLDER), [gone]);
        fs::remove_dir_all(folder).unwrap();
    }
}
