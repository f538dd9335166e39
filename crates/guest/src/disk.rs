//! The Debian root disk: packages by mmdebstrap, a few settings, an ext4 image.
//!
//! mmdebstrap makes a tar archive; it is unpacked by whoever runs the build, so the owners of the files get lost unless
//! that is root. They are read from the archive and written into the finished image with debugfs, which needs no rights.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write as _},
    os::unix::{
        ffi::OsStrExt as _,
        fs::{MetadataExt as _, PermissionsExt as _, symlink},
    },
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    DEFAULT_CMDLINE, GuestError, Progress,
    apt::{Kernel, LazyApt, RELEASE, STEPS as APT_STEPS},
    cache::{Recipe, remove_tree},
    initramfs, io_at, tar, tool,
};

/// Steps that [`build`] reports, after those of the kernel.
pub(crate) const STEPS: usize = 3;

/// Packages beyond the essential ones and apt.
const PACKAGES: [&str; 11] = [
    "systemd-sysv",
    "systemd-resolved",
    "udev",
    "dbus",
    "kmod",
    "util-linux",
    "procps",
    "iproute2",
    "pciutils",
    "less",
    "nano-tiny",
];
/// Size of the image; it is sparse.
const IMAGE_SIZE: &str = "2G";
/// Inodes of the image. Fewer than the default, so that the tables need not be zeroed in the running guest.
const INODES: &str = "65536";

const ISSUE: &str = "\\S{PRETTY_NAME} on \\l, a guest of Ringfort.\n\
    Log in as root, no password. To leave: poweroff, or press Ctrl-A and then x.\n\n";

/// All network cards: addresses by DHCP and router advertisements.
const NETWORK: &str = "[Match]\nType=ether\nKind=!*\n\n[Network]\nDHCP=yes\n\n\
    [DHCPv4]\nUseDomains=yes\n\n[IPv6AcceptRA]\nUseDomains=yes\n";

/// Links: where, and to what.
const LINKS: [(&str, &str); 5] = [
    ("etc/resolv.conf", "../run/systemd/resolve/stub-resolv.conf"),
    ("etc/systemd/system/multi-user.target.wants/systemd-networkd.service", NETWORKD),
    ("etc/systemd/system/dbus-org.freedesktop.network1.service", NETWORKD),
    (
        "etc/systemd/system/sockets.target.wants/systemd-networkd.socket",
        "/lib/systemd/system/systemd-networkd.socket",
    ),
    (
        "etc/systemd/system/multi-user.target.wants/systemd-resolved.service",
        "/lib/systemd/system/systemd-resolved.service",
    ),
];
const NETWORKD: &str = "/lib/systemd/system/systemd-networkd.service";

/// Files that the guest gets, beyond what its packages bring.
const FILES: [(&str, &str); 8] = [
    ("etc/hostname", "ringfort\n"),
    ("etc/hosts", "127.0.0.1 localhost\n127.0.1.1 ringfort\n::1 localhost ip6-localhost ip6-loopback\n"),
    ("etc/fstab", "# The initramfs mounts the root file system, from root= of the kernel command line.\n"),
    ("etc/issue", ISSUE),
    ("etc/motd", ""),
    // Empty, not absent: each fresh boot makes itself an identity.
    ("etc/machine-id", ""),
    ("etc/systemd/network/80-ethernet.network", NETWORK),
    ("etc/systemd/journald.conf.d/ringfort.conf", "[Journal]\nStorage=volatile\nRuntimeMaxUse=16M\n"),
];

/// Units that only cost time in a guest that is thrown away after use.
const MASKED: [&str; 6] = [
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "getty-static.service",
    "systemd-update-utmp-runlevel.service",
    "e2scrub_reap.service",
];

/// Files that no guest reads: documentation (licences stay), translations.
const EXCLUDED: [&str; 6] = [
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/lib/udev/hwdb.d/*",
];

/// The recipe of the default guest.
pub(crate) fn recipe() -> Recipe {
    let text = format!(
        "1 {RELEASE} {PACKAGES:?} {IMAGE_SIZE} {INODES} {FILES:?} {LINKS:?} {MASKED:?} {EXCLUDED:?} {DEFAULT_CMDLINE} {}",
        initramfs::debian_recipe_text()
    );
    Recipe { kind: "debian", text }
}

/// The programs that the build runs, looked up before anything is downloaded.
pub(crate) struct Tools {
    mmdebstrap: PathBuf,
    mke2fs: PathBuf,
    debugfs: PathBuf,
    tar: PathBuf,
}

impl Tools {
    pub fn find() -> Result<Self, GuestError> {
        tool::find("apt-get", "apt")?;
        Ok(Self {
            mmdebstrap: tool::find("mmdebstrap", "mmdebstrap")?,
            mke2fs: tool::find("mke2fs", "e2fsprogs")?,
            debugfs: tool::find("debugfs", "e2fsprogs")?,
            tar: tool::find("tar", "tar")?,
        })
    }
}

/// Fill `entry` with kernel, initramfs and root disk.
pub(crate) fn build(
    tools: &Tools,
    kernel: &Kernel,
    apt: &mut LazyApt,
    entry: &Path,
    progress: &mut dyn Progress,
) -> Result<(), GuestError> {
    let total = APT_STEPS + STEPS;
    let sources = apt.get(progress, total)?.sources.clone();
    progress.step(APT_STEPS + 1, total, &format!("installing Debian {RELEASE} (about 100 packages)"));
    let archive = entry.join("root.tar");
    let what = Bootstrap { variant: "apt", packages: &PACKAGES, excluded: &[], kernel: Some(kernel) };
    bootstrap(tools, &what, &sources, &archive, progress)?;

    progress.step(APT_STEPS + 2, total, "unpacking and setting up");
    let tree = entry.join("tree");
    fs::create_dir(&tree).map_err(io_at("create", &tree))?;
    let mut command = Command::new(&tools.tar);
    // Device nodes need root, and the guest's kernel makes its own in devtmpfs.
    command.args(["-x", "-p", "--no-same-owner", "--exclude=./dev/*", "-f"]).arg(&archive);
    command.arg("-C").arg(&tree);
    tool::run(command, progress)?;
    set_up(&tree)?;
    initramfs::build_debian(kernel, entry)?;

    progress.step(APT_STEPS + 3, total, "making the disk image");
    let image = entry.join("root.img");
    let mut command = Command::new(&tools.mke2fs);
    command.args(["-q", "-F", "-t", "ext4", "-L", "ringfort-root", "-m", "1", "-N", INODES]);
    command.args(["-J", "size=16", "-E", "root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0", "-d"]);
    command.arg(&tree).arg(&image).arg(IMAGE_SIZE);
    tool::run(command, progress)?;
    give_owners(tools, &archive, &tree, &image, entry, progress)?;
    remove_tree(&tree)?;
    fs::remove_file(&archive).map_err(io_at("remove", &archive))
}

/// What mmdebstrap is to install.
pub(crate) struct Bootstrap<'a> {
    /// Its variant: which packages come unasked.
    pub variant: &'a str,
    /// Packages beyond those of the variant.
    pub packages: &'a [&'a str],
    /// Paths that are left out, beyond documentation and translations.
    pub excluded: &'a [&'a str],
    /// Whose modules are put in.
    pub kernel: Option<&'a Kernel>,
}

/// Make a root file system's archive, in whichever of mmdebstrap's modes works on this host.
pub(crate) fn bootstrap(
    tools: &Tools,
    what: &Bootstrap<'_>,
    sources: &Path,
    archive: &Path,
    progress: &mut dyn Progress,
) -> Result<(), GuestError> {
    let mut modes = vec!["unshare"];
    // /proc/self belongs to the effective user of this process.
    if fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0) {
        modes.push("root");
    }
    if tool::find("fakechroot", "fakechroot").is_ok() && tool::find("fakeroot", "fakeroot").is_ok() {
        modes.push("fakechroot");
    }
    let mut first_error = None;
    for mode in modes {
        let mut command = Command::new(&tools.mmdebstrap);
        command.arg(format!("--mode={mode}"));
        command.arg(format!("--variant={}", what.variant)).args(["--format=tar", "--architectures=amd64"]);
        command.arg(format!("--include={}", what.packages.join(",")));
        command.args(["--aptopt=APT::Install-Recommends \"false\"", "--aptopt=Acquire::Languages \"none\""]);
        command.args(host_acquire_options().into_iter().map(|o| format!("--aptopt={o}")));
        command.args(EXCLUDED.map(|o| format!("--dpkgopt={o}")));
        command.args(what.excluded.iter().map(|path| format!("--dpkgopt=path-exclude={path}")));
        if let Some(kernel) = what.kernel {
            command.arg(format!("--customize-hook=copy-in {} /usr/lib/modules", quoted(&kernel.modules)));
            command.arg(format!("--customize-hook=chroot \"$1\" depmod {}", kernel.version));
        }
        command.arg("--customize-hook=rm -f \"$1\"/etc/apt/apt.conf.d/99mmdebstrap \"$1\"/etc/resolv.conf");
        command.arg("--essential-hook=mkdir -p \"$1\"/usr/lib/modules");
        command.arg(RELEASE).arg(archive).arg(sources);
        match tool::run(command, progress) {
            Ok(()) => return Ok(()),
            Err(e) => {
                let _ = fs::remove_file(archive);
                progress.detail(&format!("mmdebstrap --mode={mode} did not work here"));
                first_error.get_or_insert(e);
            }
        }
    }
    Err(first_error.unwrap_or_else(|| GuestError::Content("mmdebstrap has no usable mode".into())))
}

/// The host's settings of how to reach its mirrors, which mmdebstrap leaves out: proxies, and whether to believe
/// lists past their date (as a snapshot mirror's are).
fn host_acquire_options() -> Vec<String> {
    let Ok(apt_config) = tool::find("apt-config", "apt") else { return Vec::new() };
    let text = tool::output(&apt_config, &["dump", "--no-empty", "Acquire"]).unwrap_or_default();
    text.lines().filter(|l| is_reach_option(l)).map(|l| l.trim_end_matches(';').to_owned()).collect()
}

fn is_reach_option(line: &str) -> bool {
    let name = line.split_whitespace().next().unwrap_or_default().to_ascii_lowercase();
    matches!(
        name.as_str(),
        "acquire::http::proxy"
            | "acquire::https::proxy"
            | "acquire::check-valid-until"
            | "acquire::check-date"
            | "acquire::retries"
    )
}

/// `path` as one word of a shell command.
fn quoted(path: &Path) -> String {
    format!("'{}'", path.to_string_lossy().replace('\'', "'\\''"))
}

/// Make the unpacked tree a guest that one can log in to.
fn set_up(tree: &Path) -> Result<(), GuestError> {
    // Some folders of Debian's are closed even to their owner's writing.
    for dir in ["etc", "etc/systemd", "etc/systemd/system"] {
        let path = tree.join(dir);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).map_err(io_at("open up", &path))?;
    }
    for (name, text) in FILES {
        let path = tree.join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(io_at("create", parent))?;
        }
        // A link there (as for /etc/resolv.conf) may lead out of the tree.
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(io_at("replace", &path)(e)),
            _ => fs::write(&path, text).map_err(io_at("write", &path))?,
        }
    }
    for (name, target) in LINKS {
        let path = tree.join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(io_at("create", parent))?;
        }
        let _ = fs::remove_file(&path);
        symlink(target, &path).map_err(io_at("write", &path))?;
    }
    for unit in MASKED {
        let path = tree.join("etc/systemd/system").join(unit);
        let _ = fs::remove_file(&path);
        symlink("/dev/null", &path).map_err(io_at("write", &path))?;
    }
    let shadow = tree.join("etc/shadow");
    let text = fs::read_to_string(&shadow).map_err(io_at("read", &shadow))?;
    let open = open_root_account(&text)
        .ok_or_else(|| GuestError::Content("the new system's /etc/shadow has no root".into()))?;
    fs::write(&shadow, open).map_err(io_at("write", &shadow))
}

/// `/etc/shadow` with an empty password for root, and everything else as it was.
fn open_root_account(shadow: &str) -> Option<String> {
    let mut found = false;
    let lines: Vec<String> = shadow
        .lines()
        .map(|line| {
            let mut fields: Vec<&str> = line.split(':').collect();
            if fields.first() == Some(&"root") && fields.len() > 1 {
                fields[1] = "";
                found = true;
            }
            fields.join(":")
        })
        .collect();
    found.then(|| lines.join("\n") + "\n")
}

/// Give the files of `image` the owners that the archive names; root owns the rest.
fn give_owners(
    tools: &Tools,
    archive: &Path,
    tree: &Path,
    image: &Path,
    scratch: &Path,
    progress: &mut dyn Progress,
) -> Result<(), GuestError> {
    let owners = File::open(archive)
        .and_then(|f| tar::owners(io::BufReader::new(f)))
        .map_err(io_at("read", archive))?;
    let script = scratch.join("owners");
    let mut out = BufWriter::new(File::create(&script).map_err(io_at("create", &script))?);
    let mut todo = vec![PathBuf::new()];
    while let Some(relative) = todo.pop() {
        let dir = tree.join(&relative);
        for child in fs::read_dir(&dir).map_err(io_at("read", &dir))? {
            let child = child.map_err(io_at("read", &dir))?;
            let meta = child.metadata().map_err(io_at("look at", &child.path()))?;
            let name = relative.join(child.file_name());
            let (uid, gid) = owners.get(name.as_os_str().as_bytes()).copied().unwrap_or((0, 0));
            let shown = name.to_str().filter(|n| !n.contains(['"', '\n'])).ok_or_else(|| {
                GuestError::Content(format!("a file of the new system has an odd name: {name:?}"))
            })?;
            for (field, is, wanted) in [("uid", meta.uid(), uid), ("gid", meta.gid(), gid)] {
                if is != wanted {
                    writeln!(out, "sif \"/{shown}\" {field} {wanted}").map_err(io_at("write", &script))?;
                }
            }
            if meta.is_dir() {
                todo.push(name);
            }
        }
    }
    out.into_inner().map_err(io::IntoInnerError::into_error).map_err(io_at("write", &script))?;
    let mut command = Command::new(&tools.debugfs);
    command.args(["-w", "-f"]).arg(&script).arg(image);
    // debugfs reports a failed command on its output and still ends well.
    let mut watch = Watch { inner: progress, complaint: None };
    tool::run(command, &mut watch)?;
    if let Some(line) = watch.complaint {
        return Err(GuestError::Content(format!("the image's owners could not be set: {line}")));
    }
    fs::remove_file(&script).map_err(io_at("remove", &script))
}

/// Catches what debugfs says beyond its greeting and the echo of its commands.
struct Watch<'a> {
    inner: &'a mut dyn Progress,
    complaint: Option<String>,
}

impl Progress for Watch<'_> {
    fn step(&mut self, index: usize, total: usize, what: &str) {
        self.inner.step(index, total, what);
    }

    fn detail(&mut self, line: &str) {
        if !line.starts_with("debugfs") && self.complaint.is_none() {
            self.complaint = Some(line.to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::tests::TempDir;

    #[test]
    fn only_root_loses_its_password() {
        let before = "root:*:19000:0:99999:7:::\ndaemon:*:19000:0:99999:7:::\nrooty:!:1::::::\n";
        let after = "root::19000:0:99999:7:::\ndaemon:*:19000:0:99999:7:::\nrooty:!:1::::::\n";
        assert_eq!(open_root_account(before).as_deref(), Some(after));
        assert_eq!(open_root_account("daemon:*:1:\n"), None);
    }

    #[test]
    fn a_path_stays_one_word_for_the_shell() {
        for path in ["/plain", "/with blank", "/it's", "/$(touch x)"] {
            let script = format!("printf %s {}", quoted(Path::new(path)));
            let out = Command::new("sh").args(["-c", &script]).output().expect("sh");
            assert_eq!(out.stdout, path.as_bytes());
        }
    }

    #[test]
    fn only_options_of_reach_are_passed_on() {
        assert!(is_reach_option("Acquire::http::Proxy \"http://proxy:3128\";"));
        assert!(is_reach_option("Acquire::Check-Valid-Until \"false\";"));
        assert!(!is_reach_option("Acquire::AllowInsecureRepositories \"1\";"));
        assert!(!is_reach_option(""));
    }

    #[test]
    fn setting_up_replaces_links_rather_than_following_them() {
        let tmp = TempDir::new();
        let (tree, outside) = (tmp.0.join("tree"), tmp.0.join("outside"));
        fs::create_dir_all(tree.join("etc/systemd/system")).expect("tree");
        fs::write(&outside, "untouched").expect("file");
        symlink(&outside, tree.join("etc/motd")).expect("link");
        fs::write(tree.join("etc/shadow"), "root:*:1::::::\n").expect("shadow");
        set_up(&tree).expect("set up");
        assert_eq!(fs::read_to_string(&outside).ok().as_deref(), Some("untouched"));
        assert_eq!(fs::read_to_string(tree.join("etc/shadow")).ok().as_deref(), Some("root::1::::::\n"));
        assert!(fs::read_to_string(tree.join("etc/issue")).expect("issue").contains("no password"));
        assert_eq!(
            fs::read_link(tree.join("etc/systemd/system/apt-daily.timer")).expect("mask"),
            Path::new("/dev/null")
        );
    }

    #[test]
    fn owners_reach_the_image() {
        let Ok(tools) = Tools::find() else {
            panic!("this test needs mmdebstrap and e2fsprogs");
        };
        let tmp = TempDir::new();
        let tree = tmp.0.join("tree");
        fs::create_dir_all(tree.join("sub\\x2d dir")).expect("tree");
        fs::write(tree.join("sub\\x2d dir/mail"), "x").expect("file");
        fs::write(tree.join("plain"), "x").expect("file");
        let archive = tmp.0.join("a.tar");
        let status = Command::new("tar")
            .args(["--owner=8", "--group=1777", "-cf"])
            .arg(&archive)
            .arg("-C")
            .arg(&tree)
            .args(["./sub\\x2d dir/mail"])
            .status()
            .expect("tar");
        assert!(status.success());
        let image = tmp.0.join("img");
        let mut mke2fs = Command::new(&tools.mke2fs);
        mke2fs.args(["-q", "-F", "-t", "ext4", "-d"]).arg(&tree).arg(&image).arg("8M");
        tool::run(mke2fs, &mut ()).expect("mke2fs");
        give_owners(&tools, &archive, &tree, &image, &tmp.0, &mut ()).expect("owners");
        let stat = |name: &str| {
            tool::output(&tools.debugfs, &["-R", &format!("stat \"{name}\""), image.to_str().expect("path")])
                .expect("debugfs")
        };
        let words = |text: String| text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(
            words(stat("/sub\\x2d dir/mail")).contains("User: 8 Group: 1777"),
            "{}",
            stat("/sub\\x2d dir/mail")
        );
        assert!(words(stat("/plain")).contains("User: 0 Group: 0"));
    }
}
