//! The initramfs of both guests: busybox, the modules in loading order, and a first program.

use std::{
    fs::{self, File},
    io::{self, BufWriter},
    path::Path,
};

use crate::{
    CpioWriter, GuestError, TEST_PROMPT, TEST_READY, apt::Kernel, cache::Recipe, io_at, modules::ModuleTree,
};

const INIT_DEBIAN: &str = include_str!("files/init-debian.sh");
const INIT_TEST: &str = include_str!("files/init-test.sh");

/// Modules that a guest of ours meets. Those that a kernel has built in are passed over.
const MODULES: [&str; 10] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "virtio_rng",
    "virtio_balloon",
    "virtio_net",
    "virtio_scsi",
    "ext4",
    "pvpanic_mmio",
    "pvpanic_pci",
];

/// The one without which a guest finds no disk.
const NEEDED: &str = "virtio_blk.ko";

/// Applets that the first program of the default guest calls.
const APPLETS: [&str; 10] =
    ["sh", "mount", "insmod", "findfs", "sleep", "setsid", "switch_root", "cat", "ls", "dmesg"];

/// What the default guest's initramfs is made from.
pub(crate) fn debian_recipe_text() -> String {
    format!("{INIT_DEBIAN}{MODULES:?}{APPLETS:?}")
}

/// What the test guest is made from.
pub(crate) fn test_recipe() -> Recipe {
    Recipe { kind: "test", text: format!("1 {INIT_TEST}{MODULES:?}{TEST_READY}{TEST_PROMPT}") }
}

/// Fill `entry` with the test guest.
pub(crate) fn build_test(kernel: &Kernel, entry: &Path) -> Result<(), GuestError> {
    let init = INIT_TEST.replace("@READY@", TEST_READY);
    write(kernel, &entry.join("initrd"), &init, &MODULES, NEEDED, |archive| {
        archive.file("etc/shrc", 0o644, format!("PS1='{TEST_PROMPT}'\n").as_bytes())
    })?;
    link_kernel(kernel, entry)
}

/// Fill `entry` with the default guest's kernel and initramfs.
pub(crate) fn build_debian(kernel: &Kernel, entry: &Path) -> Result<(), GuestError> {
    write(kernel, &entry.join("initrd"), INIT_DEBIAN, &MODULES, NEEDED, |archive| {
        APPLETS
            .iter()
            .filter(|a| **a != "sh")
            .try_for_each(|applet| archive.symlink(&format!("bin/{applet}"), "busybox"))
    })?;
    link_kernel(kernel, entry)
}

/// The entry gets the kernel as a file of its own, so that it stays whole whatever becomes of the kernel entry.
pub(crate) fn link_kernel(kernel: &Kernel, entry: &Path) -> Result<(), GuestError> {
    let to = entry.join("vmlinuz");
    fs::hard_link(&kernel.vmlinuz, &to)
        .or_else(|_| fs::copy(&kernel.vmlinuz, &to).map(drop))
        .map_err(io_at("write", &to))
}

/// Write an initramfs to `to`: busybox, `wanted` modules and what they need, `init`, and what `more` adds. `needed` is the file name of a
/// module that must be among them.
pub(crate) fn write(
    kernel: &Kernel,
    to: &Path,
    init: &str,
    wanted: &[&str],
    needed: &str,
    more: impl FnOnce(&mut CpioWriter<BufWriter<File>>) -> io::Result<()>,
) -> Result<(), GuestError> {
    let order = ModuleTree::scan(&kernel.modules)?.load_order(wanted)?;
    let mut modules = Vec::new();
    for path in &order {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        modules.push((name, fs::read(path).map_err(io_at("read", path))?));
    }
    if !modules.iter().any(|(name, _)| name == needed) {
        return Err(GuestError::Content(format!("the kernel package has no uncompressed {needed}")));
    }
    let busybox = fs::read(&kernel.busybox).map_err(io_at("read", &kernel.busybox))?;
    let file = File::create(to).map_err(io_at("create", to))?;
    let pack = || -> io::Result<()> {
        let mut archive = CpioWriter::new(BufWriter::new(file));
        for dir in ["bin", "dev", "etc", "modules", "proc", "root", "sys", "tmp"] {
            archive.dir(dir, 0o755)?;
        }
        archive.char_device("dev/console", 0o600, 5, 1)?;
        archive.char_device("dev/null", 0o666, 1, 3)?;
        archive.file("bin/busybox", 0o755, &busybox)?;
        archive.symlink("bin/sh", "busybox")?;
        let names: String = modules.iter().map(|(name, _)| format!("{name}\n")).collect();
        archive.file("modules/order", 0o644, names.as_bytes())?;
        for (name, image) in &modules {
            archive.file(&format!("modules/{name}"), 0o644, image)?;
        }
        more(&mut archive)?;
        archive.file("init", 0o755, init.as_bytes())?;
        archive.finish()?.into_inner().map_err(io::IntoInnerError::into_error)?;
        Ok(())
    };
    pack().map_err(io_at("write", to))
}
