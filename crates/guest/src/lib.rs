//! The guests that `ringfort run` and the tests boot when nobody names a kernel: made from Debian's own packages,
//! once, into the user's cache directory.
//!
//! These entries live in the cache, each a folder named after the recipe that made it:
//!
//! | entry | files | made from |
//! |---|---|---|
//! | `kernel-…` | `vmlinuz`, `modules/`, `busybox` | `linux-image-cloud-amd64` and `busybox-static` |
//! | `test-…` | `vmlinuz`, `initrd` | the kernel entry: busybox, virtio modules, a shell on the serial port |
//! | `lab-…` | `vmlinuz`, `initrd` | the kernel entry: busybox, kvm-amd; see [`Lab`] |
//! | `debian-…` | `vmlinuz`, `initrd`, `root.img` | the kernel entry and a Debian root file system |
//! | `packages-…` | `root.tar`, `root.cpio` | packages that measuring and checking need |
//! | `bench-…` and the like | `vmlinuz`, `initrd`, `own/` | the kernel, such packages, and C programs of the caller's |
//!
//! Packages come through the host's own apt (its sources, its keys, its proxy), with apt's state in a private
//! folder, so nothing on the host changes and no root rights are needed; apt checks signatures and checksums. An
//! entry is built in a scratch folder, flushed to disk, and only then renamed to its name: what carries the name is whole.
#![forbid(unsafe_code)]

mod apt;
mod cache;
mod cpio;
mod disk;
mod fio;
mod initramfs;
mod lab;
mod mirror;
mod modules;
mod tar;
mod tool;
mod userland;

pub use cache::cache_dir;
pub use cpio::CpioWriter;
pub use fio::{FIO, ensure_fio};
pub use lab::{LAB, Lab, LabRun, ensure_lab};
pub use mirror::ensure_mirror;
pub use userland::{Program, Userland, UserlandGuest, ensure_userland, unpack};

use std::path::{Path, PathBuf};

/// Where a builder tells what it is doing. `()` says nothing.
pub trait Progress {
    /// Step `index` (from 1) of `total` begins.
    fn step(&mut self, index: usize, total: usize, what: &str);
    /// A line of output from the tool at work.
    fn detail(&mut self, line: &str);
}

impl Progress for () {
    fn step(&mut self, _: usize, _: usize, _: &str) {}
    fn detail(&mut self, _: &str) {}
}

/// Why a guest could not be had. Every message is one line: what failed and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// No place for a cache: neither `XDG_CACHE_HOME` nor `HOME` says where.
    #[error(
        "no cache directory: set HOME or XDG_CACHE_HOME, or give your own guest with --kernel and --disk"
    )]
    NoCacheDir,
    /// A program that the build runs is not installed.
    #[error(
        "the default guest cannot be built here: {program} is missing (Debian package {package}); install it, or give your own guest with --kernel and --disk"
    )]
    MissingTool {
        /// The program.
        program: &'static str,
        /// The Debian package that has it.
        package: &'static str,
    },
    /// apt does not offer what the guest is made of.
    #[error(
        "the default guest cannot be built here: {what}; check the network and apt's sources, or give your own guest with --kernel and --disk"
    )]
    Unavailable {
        /// What is missing.
        what: String,
    },
    /// A program of the build failed.
    #[error(
        "the default guest could not be built: {program} failed ({status}): {tail}; `--kernel` and `--disk` boot your own"
    )]
    Tool {
        /// The program.
        program: String,
        /// Its exit status.
        status: String,
        /// What it said last, on one line.
        tail: String,
    },
    /// A package does not hold what it should.
    #[error("the default guest could not be built: {0}")]
    Content(String),
    /// A file operation failed.
    #[error("the default guest could not be built: {op} {}: {source}", path.display())]
    Io {
        /// What was tried.
        op: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
}

pub(crate) fn io_at(op: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> GuestError {
    let path = path.to_path_buf();
    move |source| GuestError::Io { op, path, source }
}

/// A Debian system with systemd and a login on the serial console.
#[derive(Debug, Clone)]
pub struct DefaultGuest {
    /// Kernel, a bzImage.
    pub kernel: PathBuf,
    /// Initramfs that loads the virtio modules and mounts the root disk.
    pub initrd: PathBuf,
    /// Raw ext4 image of the root disk, without a partition table. Shared by all runs: give the guest an overlay of it.
    pub disk: PathBuf,
    /// Kernel command line that goes with it; the disk is expected as the first virtio block device.
    pub cmdline: String,
}

/// A kernel and a busybox initramfs: a root shell on the serial console a moment after the kernel starts.
///
/// Words on the kernel command line steer it: `ringfort.init=shell` (the default), `ringfort.init=poweroff` or
/// `ringfort.init=reboot` (say [`TEST_READY`] and leave at once).
#[derive(Debug, Clone)]
pub struct TestGuest {
    /// Kernel, a bzImage.
    pub kernel: PathBuf,
    /// Initramfs.
    pub initrd: PathBuf,
    /// Kernel command line that goes with it.
    pub cmdline: String,
}

/// The line that the test guest's init prints when user space runs; the uptime in seconds follows it.
pub const TEST_READY: &str = "ringfort-init: user space at ";
/// The prompt of the test guest's shell.
pub const TEST_PROMPT: &str = "ringfort# ";
/// Kernel command line of the default guest.
pub const DEFAULT_CMDLINE: &str = "console=ttyS0 root=/dev/vda rootfstype=ext4 rw";
/// Kernel command line of the test guest.
pub const TEST_CMDLINE: &str = "console=ttyS0 panic=-1";

/// The default guest, built first if the cache has none for today's recipe.
///
/// `cache` is a folder of Ringfort's own, see [`cache_dir`]. A second caller waits for the first to finish.
///
/// # Errors
/// See [`GuestError`]; the cache then holds no entry that looks whole and is not.
pub fn ensure(cache: &Path, progress: &mut dyn Progress) -> Result<DefaultGuest, GuestError> {
    let dir = cache::Cache::open(cache)?.entry(&disk::recipe(), |cache, scratch| {
        let tools = disk::Tools::find()?;
        let total = apt::STEPS + disk::STEPS;
        let mut apt = apt::LazyApt::new(scratch.join("apt"));
        let kernel = apt::ensure_kernel(cache, &mut apt, progress, total)?;
        disk::build(&tools, &kernel, &mut apt, scratch, progress)?;
        cache::remove_tree(&scratch.join("apt"))
    })?;
    Ok(DefaultGuest {
        kernel: dir.join("vmlinuz"),
        initrd: dir.join("initrd"),
        disk: dir.join("root.img"),
        cmdline: DEFAULT_CMDLINE.to_owned(),
    })
}

/// The test guest, built first if the cache has none for today's recipe.
///
/// # Errors
/// As [`ensure`].
pub fn ensure_test(cache: &Path, progress: &mut dyn Progress) -> Result<TestGuest, GuestError> {
    let dir = cache::Cache::open(cache)?.entry(&initramfs::test_recipe(), |cache, scratch| {
        let total = apt::STEPS + 1;
        let mut apt = apt::LazyApt::new(scratch.join("apt"));
        let kernel = apt::ensure_kernel(cache, &mut apt, progress, total)?;
        progress.step(total, total, "packing the initramfs");
        initramfs::build_test(&kernel, scratch)?;
        cache::remove_tree(&scratch.join("apt"))
    })?;
    Ok(TestGuest {
        kernel: dir.join("vmlinuz"),
        initrd: dir.join("initrd"),
        cmdline: TEST_CMDLINE.to_owned(),
    })
}
