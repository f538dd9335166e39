//! Debian's kernel with drivers for real hardware: the one of the test guest is made for clouds and has none.

use super::Scratch;
use ringfort_guest::CpioWriter;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Run a program; gives what it said, or why not.
fn run(command: &mut Command) -> Result<String, String> {
    let o = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    if o.status.success() {
        return Ok(String::from_utf8_lossy(&o.stdout).into_owned());
    }
    Err(format!("{command:?}: {}", String::from_utf8_lossy(&o.stderr).trim()))
}

/// The tree of the kernel's package.
fn tree() -> Result<PathBuf, String> {
    let depends = run(Command::new("apt-cache").args(["depends", "linux-image-amd64"]))?;
    let name = depends
        .lines()
        .find_map(|l| l.trim().strip_prefix("Depends: ").filter(|p| p.starts_with("linux-image-")))
        .ok_or("linux-image-amd64 depends on no kernel")?
        .to_owned();
    package(&name)
}

/// The tree of a Debian package, fetched on first use into the cache.
pub fn package(package: &str) -> Result<PathBuf, String> {
    let cache = ringfort_guest::cache_dir().map_err(|e| e.to_string())?;
    let dir = cache.join(format!("full-{package}"));
    if dir.is_dir() {
        return Ok(dir);
    }
    let scratch = cache.join(format!("full-{package}.{}", std::process::id()));
    std::fs::create_dir_all(&scratch).map_err(|e| e.to_string())?;
    // Fetched by whoever runs the test, not by apt's own user, who may not write here.
    let fetched = run(Command::new("apt-get")
        .args(["-o", "APT::Sandbox::User=root", "download", package])
        .current_dir(&scratch));
    let done = fetched.and_then(|_| {
        let deb = std::fs::read_dir(&scratch)
            .ok()
            .and_then(|mut d| {
                d.find_map(|e| Some(e.ok()?.path()).filter(|p| p.extension().is_some_and(|x| x == "deb")))
            })
            .ok_or("apt-get fetched nothing")?;
        run(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(scratch.join("tree")))?;
        std::fs::rename(scratch.join("tree"), &dir).map_err(|e| e.to_string())
    });
    let _ = std::fs::remove_dir_all(&scratch);
    done.map(|()| dir)
}

fn find(dir: &Path, name: &str) -> Option<PathBuf> {
    std::fs::read_dir(dir).ok()?.flatten().find_map(|e| {
        let path = e.path();
        if e.file_type().ok()?.is_dir() {
            find(&path, name)
        } else {
            (e.file_name() == *name).then_some(path)
        }
    })
}

/// That kernel, and the test guest's initramfs with these of its modules instead of its own, in loading order.
pub fn full_kernel(scratch: &Scratch, initrd: &Path, modules: &[&str]) -> Result<(PathBuf, PathBuf), String> {
    let tree = tree()?;
    let boot = std::fs::read_dir(tree.join("boot")).map_err(|e| e.to_string())?;
    let kernel = boot
        .flatten()
        .map(|e| e.path())
        .find(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("vmlinuz")))
        .ok_or("the package has no kernel")?;
    // The kernel unpacks archives one after the other, later files over earlier ones (Documentation/driver-api/early-userspace/buffer-format.rst).
    let mut image = std::fs::read(initrd).map_err(|e| e.to_string())?;
    image.resize(image.len().next_multiple_of(512), 0);
    let mut more = Vec::new();
    let mut archive = CpioWriter::new(&mut more);
    let mut order = String::new();
    for m in modules {
        let Some(path) = find(&tree.join("lib/modules"), &format!("{m}.ko")) else { continue };
        let data = std::fs::read(path).map_err(|e| e.to_string())?;
        archive.file(&format!("modules/{m}.ko"), 0o644, &data).map_err(|e| e.to_string())?;
        order.push_str(&format!("{m}.ko\n"));
    }
    archive.file("modules/order", 0o644, order.as_bytes()).map_err(|e| e.to_string())?;
    archive.finish().map_err(|e| e.to_string())?;
    image.extend(more);
    Ok((kernel, scratch.file("initrd", &image)))
}
