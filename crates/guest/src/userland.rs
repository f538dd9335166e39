//! Guests for measuring and checking: Debian packages and a caller's own C programs in one initramfs.
//!
//! Two cache entries: `packages-…` holds what mmdebstrap installs (as tar and as cpio archive), and one named by the
//! caller holds kernel and initramfs. A change of the programs makes only the second anew. The kernel takes
//! an initramfs of several cpio archives, one after the other (Linux Documentation/driver-api/early-userspace/
//! buffer-format.rst): the packages', then the programs'.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, BufWriter},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    CpioWriter, GuestError, Progress,
    apt::{self, LazyApt, RELEASE},
    cache::{Cache, Recipe, remove_tree},
    disk::{Bootstrap, Tools, bootstrap},
    initramfs, io_at, tool,
};

/// A C program of the caller's, compiled by the host's gcc with `-O2 -static`.
#[derive(Debug, Clone, Copy)]
pub struct Program<'a> {
    /// Where it goes, for instance `bench/run`.
    pub path: &'a str,
    /// Its source text.
    pub source: &'a str,
    /// Further flags for gcc.
    pub flags: &'a [&'a str],
}

/// What goes into the guest.
#[derive(Debug, Clone, Copy)]
pub struct Userland<'a> {
    /// Name of the cache entry, letters only.
    pub name: &'static str,
    /// Debian packages beyond the essential ones; what they depend on comes along, what they recommend does not.
    pub packages: &'a [&'a str],
    /// Paths in packages that are left out, in dpkg's pattern syntax (`path-exclude` of dpkg(1)).
    pub excluded: &'a [&'a str],
    /// Programs of the caller's.
    pub programs: &'a [Program<'a>],
    /// Header files that the programs include, by name.
    pub headers: &'a [(&'a str, &'a str)],
    /// Further files: path, permission bits, content. One of them, or a program, must be `init`.
    pub files: &'a [(&'a str, u32, &'a [u8])],
}

/// A guest made by [`ensure_userland`].
#[derive(Debug, Clone)]
pub struct UserlandGuest {
    /// Kernel, a bzImage.
    pub kernel: PathBuf,
    /// Initramfs with everything in it; the guest's whole file system.
    pub initrd: PathBuf,
    /// The packages alone, as a tar archive.
    pub packages: PathBuf,
    /// The programs and files alone, as a folder.
    pub own: PathBuf,
    /// Kernel command line that goes with it.
    pub cmdline: String,
}

const STEPS: usize = apt::STEPS + 3;

impl Userland<'_> {
    fn packages_recipe(&self) -> Recipe {
        let Self { packages, excluded, .. } = self;
        Recipe { kind: "packages", text: format!("1 {RELEASE} {packages:?} {excluded:?}") }
    }

    fn recipe(&self) -> Recipe {
        Recipe { kind: self.name, text: format!("1 {RELEASE} {self:?}") }
    }
}

/// The guest with `userland`, built first if the cache has none for today's recipe.
///
/// # Errors
/// As [`crate::ensure`]; also when a program does not compile.
pub fn ensure_userland(
    cache: &Path,
    userland: &Userland<'_>,
    progress: &mut dyn Progress,
) -> Result<UserlandGuest, GuestError> {
    let cache = Cache::open(cache)?;
    let mut packages = None;
    let dir = cache.entry(&userland.recipe(), |cache, scratch| {
        let mut apt = LazyApt::new(scratch.join("apt"));
        let kernel = apt::ensure_kernel(cache, &mut apt, progress, STEPS)?;
        let base = ensure_packages(cache, userland, &mut apt, progress)?;
        progress.step(STEPS, STEPS, "compiling the programs and packing the initramfs");
        let own = scratch.join("own");
        write_own(userland, &own, scratch, progress)?;
        let to = scratch.join("initrd");
        fs::copy(base.join("root.cpio"), &to).map_err(io_at("write", &to))?;
        let file = File::options().append(true).open(&to).map_err(io_at("write", &to))?;
        archive(&own, file).map_err(io_at("write", &to))?;
        initramfs::link_kernel(&kernel, scratch)?;
        packages = Some(base);
        remove_tree(&scratch.join("apt"))
    })?;
    let packages = match packages {
        Some(p) => p,
        // Swept from the cache by hand, perhaps: it is made again.
        None => {
            let mut apt = LazyApt::new(dir.join("apt"));
            let base = ensure_packages(&cache, userland, &mut apt, progress)?;
            remove_tree(&dir.join("apt"))?;
            base
        }
    };
    Ok(UserlandGuest {
        kernel: dir.join("vmlinuz"),
        initrd: dir.join("initrd"),
        packages: packages.join("root.tar"),
        own: dir.join("own"),
        cmdline: crate::TEST_CMDLINE.to_owned(),
    })
}

/// The entry of the packages.
pub(crate) fn ensure_packages(
    cache: &Cache,
    userland: &Userland<'_>,
    apt: &mut LazyApt,
    progress: &mut dyn Progress,
) -> Result<PathBuf, GuestError> {
    cache.entry(&userland.packages_recipe(), |_, scratch| {
        let tools = Tools::find()?;
        let sources = apt.get(progress, STEPS)?.sources.clone();
        progress.step(apt::STEPS + 1, STEPS, &format!("installing packages of Debian {RELEASE}"));
        let tar = scratch.join("root.tar");
        let what = Bootstrap {
            variant: "essential",
            packages: userland.packages,
            excluded: userland.excluded,
            kernel: None,
        };
        bootstrap(&tools, &what, &sources, &tar, progress)?;
        progress.step(apt::STEPS + 2, STEPS, "packing them");
        let tree = scratch.join("tree");
        unpack(&tar, &tree, progress)?;
        let cpio = scratch.join("root.cpio");
        File::create(&cpio).and_then(|f| archive(&tree, f)).map_err(io_at("write", &cpio))?;
        remove_tree(&tree)
    })
}

/// Unpack a tar archive of packages into the new folder `to`, as whoever runs this and without device nodes.
///
/// # Errors
/// When the folder cannot be made or tar fails.
pub fn unpack(tar: &Path, to: &Path, progress: &mut dyn Progress) -> Result<(), GuestError> {
    fs::create_dir(to).map_err(io_at("create", to))?;
    let mut command = Command::new(tool::find("tar", "tar")?);
    command.args(["-x", "-p", "--no-same-owner", "--exclude=./dev/*", "-f"]).arg(tar).arg("-C").arg(to);
    tool::run(command, progress)
}

/// Compile the programs and write the files below `own`.
fn write_own(
    userland: &Userland<'_>,
    own: &Path,
    scratch: &Path,
    progress: &mut dyn Progress,
) -> Result<(), GuestError> {
    let sources = scratch.join("source");
    fs::create_dir(&sources).map_err(io_at("create", &sources))?;
    let put = |path: &Path, mode: u32, data: &[u8]| {
        let parent = path.parent().unwrap_or(own);
        fs::create_dir_all(parent).map_err(io_at("create", parent))?;
        fs::write(path, data).map_err(io_at("write", path))?;
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(io_at("write", path))
    };
    for (name, text) in userland.headers {
        put(&sources.join(name), 0o644, text.as_bytes())?;
    }
    for program in userland.programs {
        let source = sources.join(format!("{}.c", program.path.replace('/', "-")));
        put(&source, 0o644, program.source.as_bytes())?;
        let to = own.join(program.path);
        put(&to, 0o755, &[])?;
        let mut gcc = Command::new(tool::find("gcc", "gcc")?);
        gcc.args(["-O2", "-static", "-o"]).arg(&to).arg(&source).args(program.flags);
        tool::run(gcc, progress)?;
    }
    for (path, mode, data) in userland.files {
        put(&own.join(path), *mode, data)?;
    }
    remove_tree(&sources)
}

/// Write the tree `root` as a cpio archive.
fn archive(root: &Path, to: File) -> io::Result<()> {
    let mut archive = CpioWriter::new(BufWriter::new(to));
    add(&mut archive, root, "")?;
    archive.finish()?.into_inner().map_err(io::IntoInnerError::into_error)?;
    Ok(())
}

fn add(archive: &mut CpioWriter<BufWriter<File>>, dir: &Path, name: &str) -> io::Result<()> {
    let entries = fs::read_dir(dir)?.map(|e| Ok(e?.path())).collect::<io::Result<BTreeSet<_>>>()?;
    for path in entries {
        let Some(file) = path.file_name().and_then(|n| n.to_str()) else { continue };
        let name = if name.is_empty() { file.to_owned() } else { format!("{name}/{file}") };
        let meta = fs::symlink_metadata(&path)?;
        let mode = meta.permissions().mode();
        if meta.is_dir() {
            archive.dir(&name, mode)?;
            add(archive, &path, &name)?;
        } else if meta.is_symlink() {
            archive.symlink(&name, &fs::read_link(&path)?.to_string_lossy())?;
        } else if meta.is_file() {
            archive.file(&name, mode, &fs::read(&path)?)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::tests::TempDir;

    const PLAIN: Userland<'_> = Userland {
        name: "sample",
        packages: &[],
        excluded: &[],
        programs: &[Program {
            path: "bin/answer",
            source: "#include \"n.h\"\nint main(void) { return N; }",
            flags: &[],
        }],
        headers: &[("n.h", "#define N 42\n")],
        files: &[("etc/deep/er/file", 0o640, b"text")],
    };

    #[test]
    fn programs_are_compiled_and_files_written() {
        let tmp = TempDir::new();
        let own = tmp.0.join("own");
        write_own(&PLAIN, &own, &tmp.0, &mut ()).expect("written");
        let status = Command::new(own.join("bin/answer")).status().expect("the program");
        assert_eq!(status.code(), Some(42));
        assert_eq!(fs::read(own.join("etc/deep/er/file")).expect("file"), b"text");
        let bad = [Program { path: "x", source: "int main(void) { return M; }", flags: &[] }];
        let e = write_own(&Userland { programs: &bad, ..PLAIN }, &own, &tmp.0, &mut ()).expect_err("no M");
        assert!(e.to_string().contains("gcc"), "{e}");
    }

    #[test]
    fn a_tree_becomes_an_archive() {
        let tmp = TempDir::new();
        let tree = tmp.0.join("tree");
        fs::create_dir_all(tree.join("a/b")).expect("dir");
        fs::write(tree.join("a/b/file"), "12345").expect("file");
        std::os::unix::fs::symlink("b/file", tree.join("a/link")).expect("link");
        let to = tmp.0.join("cpio");
        archive(&tree, File::create(&to).expect("archive")).expect("packed");
        let out = Command::new("cpio")
            .args(["-t", "-v", "--quiet", "-F"])
            .arg(&to)
            .env("LC_ALL", "C")
            .output()
            .expect("cpio (Debian package cpio)");
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let names: Vec<_> = text.lines().filter_map(|l| l.split_whitespace().nth(8)).collect();
        assert_eq!(names, ["a", "a/b", "a/b/file", "a/link"], "{text}");
        assert!(text.contains("a/link -> b/file"), "{text}");
    }

    #[test]
    fn every_change_makes_another_entry() {
        let name = |u: &Userland<'_>| u.recipe().entry_name();
        let other = Userland { headers: &[("n.h", "#define N 43\n")], ..PLAIN };
        assert_ne!(name(&PLAIN), name(&other));
        assert_eq!(PLAIN.packages_recipe().entry_name(), other.packages_recipe().entry_name());
        let other = Userland { packages: &["xz-utils"], ..PLAIN };
        assert_ne!(PLAIN.packages_recipe().entry_name(), other.packages_recipe().entry_name());
    }
}
