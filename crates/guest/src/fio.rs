//! The test guest with fio: Debian's packages in one cpio archive, the test guest's own behind it.

use std::{
    fs::{self, File},
    io,
    path::Path,
};

use crate::{
    GuestError, Progress, TEST_CMDLINE, TestGuest,
    apt::{self, LazyApt},
    cache::{Cache, Recipe, remove_tree},
    initramfs, io_at,
    userland::{Userland, ensure_packages},
};

/// What fio brings along that a guest that only runs fio does not look at.
const EXCLUDED: [&str; 5] = [
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/locale/*",
    "/usr/share/zoneinfo/*",
    "/usr/lib/x86_64-linux-gnu/gconv/*",
];

/// Where fio is in it.
pub const FIO: &str = "/usr/bin/fio";

/// The test guest with Debian's fio at [`FIO`], built first if the cache has none for today's recipe.
///
/// # Errors
/// As [`crate::ensure`].
pub fn ensure_fio(cache: &Path, progress: &mut dyn Progress) -> Result<TestGuest, GuestError> {
    let userland = Userland {
        name: "fio",
        packages: &["fio"],
        excluded: &EXCLUDED,
        programs: &[],
        headers: &[],
        files: &[],
    };
    let test = initramfs::test_recipe();
    let recipe = Recipe { kind: "fio", text: format!("1 {userland:?} {}", test.text) };
    let total = apt::STEPS + 3;
    let dir = Cache::open(cache)?.entry(&recipe, |cache, scratch| {
        let mut apt = LazyApt::new(scratch.join("apt"));
        let kernel = apt::ensure_kernel(cache, &mut apt, progress, total)?;
        let packages = ensure_packages(cache, &userland, &mut apt, progress)?;
        progress.step(total, total, "packing the initramfs");
        initramfs::build_test(&kernel, scratch)?;
        // The kernel unpacks one archive after the other, and what comes later counts: so it is the test guest's init.
        let (initrd, own) = (scratch.join("initrd"), scratch.join("own"));
        fs::rename(&initrd, &own).map_err(io_at("move", &initrd))?;
        let join = || -> io::Result<()> {
            let mut to = File::create(&initrd)?;
            io::copy(&mut File::open(packages.join("root.cpio"))?, &mut to)?;
            io::copy(&mut File::open(&own)?, &mut to)?;
            Ok(())
        };
        join().map_err(io_at("write", &initrd))?;
        fs::remove_file(&own).map_err(io_at("remove", &own))?;
        remove_tree(&scratch.join("apt"))
    })?;
    Ok(TestGuest {
        kernel: dir.join("vmlinuz"),
        initrd: dir.join("initrd"),
        cmdline: TEST_CMDLINE.to_owned(),
    })
}
