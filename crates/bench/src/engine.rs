//! Where rows run: the host itself, Ringfort, and QEMU with two CPU models.

use std::{ffi::OsStr, path::PathBuf, process::Command};

use serde::Serialize;

/// Who runs the rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Engine {
    /// The host's CPU, in a change of root to the guest's files.
    Native,
    /// `ringfort run`.
    Ringfort,
    /// QEMU's TCG with `-cpu qemu64`.
    Qemu64,
    /// QEMU's TCG with `-cpu max,-erms,-fsrm`: with ERMS told to the guest it would pick REP MOVSB, which is the
    /// worst that TCG can be given.
    QemuMax,
}

impl Engine {
    /// All of them, in the order in which a round runs them.
    pub const ALL: [Engine; 4] = [Engine::Native, Engine::Ringfort, Engine::Qemu64, Engine::QemuMax];

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Engine::Native => "native",
            Engine::Ringfort => "ringfort",
            Engine::Qemu64 => "qemu64",
            Engine::QemuMax => "qemu max",
        }
    }
}

/// The programs and what is common to all their runs.
#[derive(Debug, Clone)]
pub struct Setup {
    /// The ringfort program.
    pub ringfort: PathBuf,
    /// The QEMU program.
    pub qemu: PathBuf,
    /// What `--accel` of `ringfort run` is given.
    pub accel: String,
    /// Guest memory in MiB.
    pub memory: u32,
    /// Further arguments for `ringfort run`.
    pub ringfort_args: Vec<String>,
    /// Further arguments for QEMU.
    pub qemu_args: Vec<String>,
}

/// A guest to boot.
#[derive(Debug, Clone, Copy)]
pub struct Boot<'a> {
    /// Kernel.
    pub kernel: &'a OsStr,
    /// Initramfs.
    pub initrd: &'a OsStr,
    /// Kernel command line.
    pub cmdline: &'a str,
    /// A raw image as first virtio disk; what is written to it is thrown away.
    pub disk: Option<&'a OsStr>,
    /// Virtual CPUs.
    pub cpus: u32,
}

impl Setup {
    /// The command that boots `guest` under `engine`; none for the host itself.
    pub fn command(&self, engine: Engine, guest: &Boot<'_>) -> Option<Command> {
        match engine {
            Engine::Native => None,
            Engine::Ringfort => Some(self.ringfort_command(guest)),
            Engine::Qemu64 => Some(self.qemu_command("qemu64", guest)),
            Engine::QemuMax => Some(self.qemu_command("max,-erms,-fsrm", guest)),
        }
    }

    fn ringfort_command(&self, guest: &Boot<'_>) -> Command {
        let mut c = Command::new(&self.ringfort);
        c.args(["run", "--accel", &self.accel, "--net", "none", "--serial", "stdio", "--no-reboot"]);
        c.arg("--kernel").arg(guest.kernel).arg("--initrd").arg(guest.initrd);
        c.args(["--cmdline", guest.cmdline]);
        c.args(["--memory", &format!("{}M", self.memory), "--cpus", &guest.cpus.to_string()]);
        if let Some(disk) = guest.disk {
            c.arg("--disk").arg(with_path("path=", disk, ",format=raw,snapshot=on"));
        }
        c.args(&self.ringfort_args);
        c
    }

    fn qemu_command(&self, cpu: &str, guest: &Boot<'_>) -> Command {
        let mut c = Command::new(&self.qemu);
        c.args(["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", cpu]);
        c.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"]);
        c.arg("-kernel").arg(guest.kernel).arg("-initrd").arg(guest.initrd);
        c.args(["-append", guest.cmdline]);
        c.args(["-m", &self.memory.to_string(), "-smp", &guest.cpus.to_string()]);
        if let Some(disk) = guest.disk {
            // A comma in a value is written twice (QEMU's option syntax).
            let doubled = disk.to_string_lossy().replace(',', ",,");
            c.arg("-drive").arg(with_path("if=virtio,format=raw,snapshot=on,file=", doubled.as_ref(), ""));
        }
        c.args(&self.qemu_args);
        c
    }
}

fn with_path(before: &str, path: &OsStr, after: &str) -> std::ffi::OsString {
    let mut text = std::ffi::OsString::from(before);
    text.push(path);
    text.push(after);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_boot_the_same() {
        let setup = Setup {
            ringfort: "rf".into(),
            qemu: "qemu".into(),
            accel: "soft,tier=interp".into(),
            memory: 700,
            ringfort_args: vec!["--cpu=max".into()],
            qemu_args: vec!["-S".into()],
        };
        let disk: &OsStr = "/a,b".as_ref();
        let guest =
            Boot { kernel: "k".as_ref(), initrd: "i".as_ref(), cmdline: "a b", disk: Some(disk), cpus: 2 };
        let line = |engine| {
            let command = setup.command(engine, &guest)?;
            Some(command.get_args().map(|a| a.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" "))
        };
        assert_eq!(line(Engine::Native), None);
        let rf = line(Engine::Ringfort).expect("a command");
        assert!(rf.contains("--accel soft,tier=interp") && rf.contains("--memory 700M --cpus 2"), "{rf}");
        assert!(rf.ends_with("--cpu=max") && rf.contains("--cmdline a b"), "{rf}");
        let qemu = line(Engine::QemuMax).expect("a command");
        assert!(qemu.contains("-cpu max,-erms,-fsrm") && qemu.contains("-m 700 -smp 2"), "{qemu}");
        assert!(qemu.contains("file=/a,,b") && qemu.ends_with("-S"), "{qemu}");
    }
}
