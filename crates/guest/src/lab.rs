//! A lab with hardware virtualization, for tests on hosts that have none: QEMU's own CPU in software with AMD's SVM runs a Debian kernel that
//! loads kvm-amd, and a script in it finds a working /dev/kvm.
//!
//! Files are given to it in a second archive after the initramfs's own; the kernel unpacks one after the other.

use crate::{
    CpioWriter, GuestError, Progress, apt,
    cache::{self, Cache, Recipe},
    initramfs, io_at, tool,
};
use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, BufWriter},
    path::{Path, PathBuf},
    process::Command,
};

const INIT: &str = include_str!("files/init-lab.sh");
const MODULES: [&str; 4] = ["kvm_amd", "virtio_pci", "tun", "vhost_net"];
/// What the lab's own lines on the second serial port begin with.
pub const LAB: &str = "ringfort-lab: ";
/// QEMU's program, and the Debian package that has it.
const QEMU: (&str, &str) = ("qemu-system-x86_64", "qemu-system-x86");
/// Of the lab's kernel. Mitigations cost exits and protect nothing here; its clock must be the TSC for guests to have a stable one.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable no_timer_check \
     random.trust_cpu=on";

/// The lab, ready to be started.
#[derive(Debug, Clone)]
pub struct Lab {
    kernel: PathBuf,
    initrd: PathBuf,
}

/// What runs in a lab.
#[derive(Debug, Clone)]
pub struct LabRun<'a> {
    /// Shell commands; their output is the started process's, their input its input. The folder is `/lab`, where `files` are.
    pub script: &'a str,
    /// Files by their name in the lab. Executables bring their shared libraries along.
    pub files: &'a [(&'a str, &'a Path)],
    /// Processors of the lab.
    pub cpus: u32,
    /// Its memory, in MiB.
    pub memory: u32,
}

fn recipe() -> Recipe {
    Recipe { kind: "lab", text: format!("1 {INIT}{MODULES:?}{LAB}") }
}

/// The lab, built first if the cache has none for today's recipe.
///
/// # Errors
/// As [`crate::ensure`].
pub fn ensure_lab(cache: &Path, progress: &mut dyn Progress) -> Result<Lab, GuestError> {
    let dir = Cache::open(cache)?.entry(&recipe(), |cache, scratch| {
        let total = apt::STEPS + 1;
        let mut apt = apt::LazyApt::new(scratch.join("apt"));
        let kernel = apt::ensure_kernel(cache, &mut apt, progress, total)?;
        progress.step(total, total, "packing the lab's initramfs");
        let init = INIT.replace("@LAB@", LAB);
        initramfs::write(&kernel, &scratch.join("initrd"), &init, &MODULES, "kvm-amd.ko", |_| Ok(()))?;
        initramfs::link_kernel(&kernel, scratch)?;
        cache::remove_tree(&scratch.join("apt"))
    })?;
    Ok(Lab { kernel: dir.join("vmlinuz"), initrd: dir.join("initrd") })
}

impl Lab {
    /// The command that runs `run`; `scratch` is an empty folder that must stay until it has ended. The lab's console is in its file
    /// `console`. The command's output ends with [`LAB`], `exit` and the script's status.
    ///
    /// # Errors
    /// When a file cannot be read or written, or QEMU is not installed.
    pub fn command(&self, run: &LabRun<'_>, scratch: &Path) -> Result<Command, GuestError> {
        let qemu = tool::find(QEMU.0, QEMU.1)?;
        let initrd = scratch.join("initrd");
        fs::copy(&self.initrd, &initrd).map_err(io_at("write", &initrd))?;
        let mut file = File::options().append(true).open(&initrd).map_err(io_at("open", &initrd))?;
        // An archive begins on a 4-byte boundary, or the kernel reads it as padding of the one before.
        let length = file.metadata().map_err(io_at("look at", &initrd))?.len();
        io::Write::write_all(&mut file, &[0; 512][..(length.next_multiple_of(512) - length) as usize])
            .map_err(io_at("write", &initrd))?;
        pack(run, file).map_err(io_at("write", &initrd))?;
        let mut command = Command::new(qemu);
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-machine", "pc"])
            .args(["-accel", "tcg", "-cpu", "EPYC,+svm", "-smp", &run.cpus.to_string()])
            .args(["-m", &run.memory.to_string(), "-append", CMDLINE])
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(&initrd)
            .arg("-serial")
            .arg(format!("file:{}", scratch.join("console").display()))
            .args(["-serial", "stdio"]);
        Ok(command)
    }
}

fn pack(run: &LabRun<'_>, file: File) -> io::Result<()> {
    let mut archive = CpioWriter::new(BufWriter::new(file));
    let mut folders = BTreeSet::new();
    let mut folder = |archive: &mut CpioWriter<BufWriter<File>>, of: &Path| -> io::Result<()> {
        let parents: Vec<&Path> = of.ancestors().skip(1).collect();
        for p in parents.iter().rev().filter(|p| p.parent().is_some()) {
            if folders.insert(p.to_path_buf()) {
                archive.dir(&p.to_string_lossy(), 0o755)?;
            }
        }
        Ok(())
    };
    let mut libraries = BTreeSet::new();
    folder(&mut archive, Path::new("/lab/run"))?;
    archive.file("lab/run", 0o755, run.script.as_bytes())?;
    for (name, path) in run.files {
        let data = fs::read(path)?;
        if data.starts_with(b"\x7fELF") {
            libraries.extend(libraries_of(path)?);
        }
        archive.file(&format!("lab/{name}"), 0o755, &data)?;
    }
    for l in &libraries {
        folder(&mut archive, l)?;
        archive.file(&l.to_string_lossy(), 0o755, &fs::read(l)?)?;
    }
    archive.finish()?.into_inner().map_err(io::IntoInnerError::into_error)?;
    Ok(())
}

/// The shared libraries that an executable is started with, its loader among them.
fn libraries_of(executable: &Path) -> io::Result<Vec<PathBuf>> {
    // A program that is linked statically has none, and ldd says so by its status.
    let out = Command::new("ldd").arg(executable).env("LC_ALL", "C").output()?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    Ok(text.split_whitespace().filter(|w| w.starts_with('/')).map(PathBuf::from).collect())
}
