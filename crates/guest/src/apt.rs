//! Debian packages by way of the host's apt, without touching the host.
//!
//! apt runs with its state and cache in a scratch folder but with the host's own sources, keys and proxy settings;
//! it verifies the signed lists and the checksums of what it downloads.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    GuestError, Progress,
    cache::{Cache, Recipe},
    io_at, tool,
};

/// The Debian release that guests are made of.
pub(crate) const RELEASE: &str = "bookworm";
/// Steps that [`ensure_kernel`] reports.
pub(crate) const STEPS: usize = 3;

const KERNEL_META: &str = "linux-image-cloud-amd64";
const BUSYBOX: &str = "busybox-static";
/// Debian's public mirror and its key, for hosts whose own sources are of another release.
const PUBLIC_MIRROR: &str = "http://deb.debian.org/debian";
const PUBLIC_SECURITY: &str = "http://deb.debian.org/debian-security";
const PUBLIC_KEY: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// apt with private state.
pub(crate) struct Apt {
    apt_get: PathBuf,
    apt_cache: PathBuf,
    options: Vec<String>,
    /// Where packages that it fetches go.
    archives: PathBuf,
    /// Sources of the release, in one-line format, for mmdebstrap.
    pub sources: PathBuf,
}

impl Apt {
    /// Fetch the package lists into `dir`, an empty folder.
    pub fn prepare(dir: &Path, progress: &mut dyn Progress) -> Result<Self, GuestError> {
        let apt_get = tool::find("apt-get", "apt")?;
        let apt_cache = tool::find("apt-cache", "apt")?;
        for sub in ["state/lists/partial", "cache/archives/partial", "parts"] {
            let path = dir.join(sub);
            fs::create_dir_all(&path).map_err(io_at("create", &path))?;
        }
        let status = dir.join("state/status");
        fs::write(&status, "").map_err(io_at("write", &status))?;
        let shown = |p: PathBuf| p.to_string_lossy().into_owned();
        let options = [
            format!("Dir::State={}", shown(dir.join("state"))),
            format!("Dir::State::status={}", shown(status)),
            format!("Dir::Cache={}", shown(dir.join("cache"))),
            "APT::Architecture=amd64".into(),
            "Acquire::Languages=none".into(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".into(),
            "Dir::Etc::preferences=/dev/null".into(),
            format!("Dir::Etc::preferencesparts={}", shown(dir.join("parts"))),
        ];
        let mut apt = Self {
            apt_get,
            apt_cache,
            options: options.iter().flat_map(|o| ["-o".to_owned(), o.clone()]).collect(),
            archives: dir.join("cache/archives"),
            sources: dir.join("sources.list"),
        };
        // One source that does not answer fails the whole update; what counts is whether ours came through.
        let updated = apt.update(progress);
        let mut lines = apt.release_sources()?;
        let own = lines.is_empty();
        if own {
            if !Path::new(PUBLIC_KEY).exists() {
                updated?;
                return Err(GuestError::Unavailable {
                    what: format!(
                        "apt's sources name no Debian {RELEASE}, and Debian's archive key (package debian-archive-keyring) is missing"
                    ),
                });
            }
            lines = [(PUBLIC_MIRROR, ""), (PUBLIC_MIRROR, "-updates"), (PUBLIC_SECURITY, "-security")]
                .map(|(uri, suffix)| format!("deb [signed-by={PUBLIC_KEY}] {uri} {RELEASE}{suffix} main"))
                .into();
        }
        let text: String = lines.iter().map(|l| format!("{l}\n")).collect();
        fs::write(&apt.sources, text).map_err(io_at("write", &apt.sources))?;
        apt.options.extend(["-o".into(), format!("Dir::Etc::sourcelist={}", shown(apt.sources.clone()))]);
        apt.options.extend(["-o".into(), format!("Dir::Etc::sourceparts={}", shown(dir.join("parts")))]);
        if own {
            apt.update(progress)?;
        }
        Ok(apt)
    }

    fn update(&self, progress: &mut dyn Progress) -> Result<(), GuestError> {
        let mut command = Command::new(&self.apt_get);
        command.args(&self.options).args(["-q", "update"]);
        tool::run(command, progress).map_err(|e| match e {
            GuestError::Tool { tail, .. } => {
                GuestError::Unavailable { what: format!("Debian's package lists cannot be fetched ({tail})") }
            }
            other => other,
        })
    }

    /// Sources of the release among those that apt has verified lists of.
    fn release_sources(&self) -> Result<BTreeSet<String>, GuestError> {
        const FORMAT: &str =
            "$(ORIGIN)|$(CODENAME)|$(TRUSTED)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(FILENAME)";
        let mut args = self.options.clone();
        args.extend(["indextargets", "--format", FORMAT, "Created-By: Packages"].map(str::to_owned));
        let text = tool::output(&self.apt_get, &args)?;
        Ok(text.lines().filter_map(source_line).collect())
    }

    /// The kernel package that the meta package stands for today.
    fn kernel_package(&self) -> Result<String, GuestError> {
        let mut args = self.options.clone();
        args.extend(["depends", KERNEL_META].map(str::to_owned));
        let missing = |_| GuestError::Unavailable { what: format!("apt offers no package {KERNEL_META}") };
        let text = tool::output(&self.apt_cache, &args).map_err(missing)?;
        text.lines()
            .filter_map(|l| l.trim().strip_prefix("Depends: "))
            .find(|p| p.starts_with("linux-image-"))
            .map(str::to_owned)
            .ok_or_else(|| GuestError::Unavailable { what: format!("{KERNEL_META} names no kernel") })
    }

    /// Fetch `packages` and everything that they need, as for a system that has nothing; gives the folder that they are in.
    pub fn fetch(&self, packages: &[&str], progress: &mut dyn Progress) -> Result<PathBuf, GuestError> {
        let mut command = Command::new(&self.apt_get);
        command.args(&self.options).args(["-q", "-y", "--download-only", "--no-install-recommends"]);
        command.args(["-o", "Debug::NoLocking=1", "install"]).args(packages);
        tool::run(command, progress)?;
        Ok(self.archives.clone())
    }

    fn download(&self, packages: &[&str], to: &Path, progress: &mut dyn Progress) -> Result<(), GuestError> {
        fs::create_dir_all(to).map_err(io_at("create", to))?;
        let mut command = Command::new(&self.apt_get);
        command.args(&self.options).args(["-q", "download"]).args(packages).current_dir(to);
        tool::run(command, progress)
    }
}

/// A source in one-line format from a line of `apt-get indextargets`, if it is one of the release's main components.
/// A user name and password in the address are for the host's eyes and stay out of the guest.
fn source_line(line: &str) -> Option<String> {
    let fields: Vec<&str> = line.split('|').collect();
    let &[origin, codename, trusted, uri, suite, component, file] = fields.as_slice() else { return None };
    let wanted = [RELEASE.to_owned(), format!("{RELEASE}-updates"), format!("{RELEASE}-security")];
    let ours = origin == "Debian" && trusted == "yes" && component == "main";
    (ours && wanted.iter().any(|w| w == codename) && !file.is_empty() && !uri.contains(char::is_whitespace))
        .then(|| format!("deb {uri} {suite} {component}"))
}

/// What a kernel entry of the cache holds.
pub(crate) struct Kernel {
    pub vmlinuz: PathBuf,
    /// The folder named after the version, with `kernel/` below it.
    pub modules: PathBuf,
    /// The version, as `uname -r` gives it.
    pub version: String,
    pub busybox: PathBuf,
}

/// apt, made ready when first needed.
pub(crate) struct LazyApt {
    dir: PathBuf,
    apt: Option<Apt>,
}

impl LazyApt {
    pub fn new(dir: PathBuf) -> Self {
        Self { dir, apt: None }
    }

    pub fn get(&mut self, progress: &mut dyn Progress, total: usize) -> Result<&Apt, GuestError> {
        if self.apt.is_none() {
            progress.step(1, total, "fetching Debian's package lists");
            fs::create_dir_all(&self.dir).map_err(io_at("create", &self.dir))?;
            self.apt = Some(Apt::prepare(&self.dir, progress)?);
        }
        self.apt.as_ref().ok_or_else(|| GuestError::Content("apt is not ready".into()))
    }
}

fn kernel_recipe() -> Recipe {
    Recipe { kind: "kernel", text: format!("1 {RELEASE} {KERNEL_META} {BUSYBOX}") }
}

/// The kernel entry, built first if the cache has none.
pub(crate) fn ensure_kernel(
    cache: &Cache,
    apt: &mut LazyApt,
    progress: &mut dyn Progress,
    total: usize,
) -> Result<Kernel, GuestError> {
    let dir = cache.entry(&kernel_recipe(), |_, scratch| {
        let dpkg_deb = tool::find("dpkg-deb", "dpkg")?;
        let apt = apt.get(progress, total)?;
        let package = apt.kernel_package()?;
        progress.step(2, total, &format!("downloading {package} and {BUSYBOX}"));
        let debs = scratch.join("debs");
        apt.download(&[&package, BUSYBOX], &debs, progress)?;
        progress.step(3, total, "unpacking the kernel");
        let tree = scratch.join("tree");
        for deb in children(&debs)? {
            let mut command = Command::new(&dpkg_deb);
            command.arg("-x").arg(&deb).arg(&tree);
            tool::run(command, progress)?;
        }
        take_kernel(&tree, scratch)?;
        crate::cache::remove_tree(&tree)?;
        crate::cache::remove_tree(&debs)
    })?;
    let modules = only_child(&dir.join("modules"))?;
    let version = modules.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(Kernel { vmlinuz: dir.join("vmlinuz"), modules, version, busybox: dir.join("busybox") })
}

/// Move the parts of the unpacked packages to their places in the entry.
fn take_kernel(tree: &Path, entry: &Path) -> Result<(), GuestError> {
    let vmlinuz = children(&tree.join("boot"))?
        .into_iter()
        .find(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("vmlinuz-")))
        .ok_or_else(|| GuestError::Content("the kernel package has no boot/vmlinuz-*".into()))?;
    let first = |names: [&str; 2]| names.map(|n| tree.join(n)).into_iter().find(|p| p.exists());
    let modules = first(["usr/lib/modules", "lib/modules"])
        .ok_or_else(|| GuestError::Content("the kernel package has no modules".into()))?;
    only_child(&modules)?;
    let busybox = first(["usr/bin/busybox", "bin/busybox"])
        .ok_or_else(|| GuestError::Content(format!("{BUSYBOX} has no busybox")))?;
    for (from, to) in [(vmlinuz, "vmlinuz"), (modules, "modules"), (busybox, "busybox")] {
        fs::rename(&from, entry.join(to)).map_err(io_at("move", &from))?;
    }
    Ok(())
}

fn children(dir: &Path) -> Result<Vec<PathBuf>, GuestError> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).map_err(io_at("read", dir))? {
        all.push(entry.map_err(io_at("read", dir))?.path());
    }
    all.sort();
    Ok(all)
}

fn only_child(dir: &Path) -> Result<PathBuf, GuestError> {
    let mut all = children(dir)?;
    match (all.pop(), all.is_empty()) {
        (Some(one), true) => Ok(one),
        _ => Err(GuestError::Content(format!("expected one kernel version in {}", dir.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_verified_sources_of_the_release_are_taken() {
        let take = |l: &str| source_line(l);
        assert_eq!(
            take("Debian|bookworm|yes|http://mirror/debian/|bookworm|main|/l").as_deref(),
            Some("deb http://mirror/debian/ bookworm main")
        );
        assert_eq!(
            take("Debian|bookworm-security|yes|http://m/sec/|stable-security|main|/l").as_deref(),
            Some("deb http://m/sec/ stable-security main"),
            "an alias for the suite is kept"
        );
        for other in [
            "Debian|trixie|yes|http://mirror/debian/|trixie|main|/l",
            "Debian|bookworm|no|http://mirror/debian/|bookworm|main|/l",
            "Debian|bookworm|yes|http://mirror/debian/|bookworm|non-free|/l",
            "Elsewhere|bookworm|yes|http://mirror/x/|bookworm|main|/l",
            "Debian|bookworm-backports|yes|http://m/|bookworm-backports|main|/l",
            "Debian|bookworm|yes|http://m/ [trusted=yes]|bookworm|main|/l",
            "garbage",
            "",
        ] {
            assert_eq!(take(other), None, "{other}");
        }
    }
}
