//! What a virtual machine is to be: one typed description that the command line, files and later the management interfaces all become.
//!
//! [`VmConfig::validate`] gives all errors at once, each naming its field.

mod disk;
mod hardware;
mod net;
mod parse;
mod size;

pub use disk::{Discard, Disk, DiskFormat};
pub use hardware::{CpusOption, KvmConfig, KvmIrqchip, MemoryBacking, MemoryOption, Placement, Policy};
pub use net::{Link, MAX_NICS, NetOption, Nic, NicModel};
pub use parse::ParseError;
pub use size::{format_size, parse_size};

use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;

/// Least guest memory, in bytes.
pub const MIN_MEMORY: u64 = 8 << 20;
/// Most vCPUs of one machine.
pub const MAX_CPUS: u32 = 16;
/// Most disks of one machine.
pub const MAX_DISKS: usize = 16;
/// The longest kernel command line, in bytes without the final NUL: what Linux on x86 takes (COMMAND_LINE_SIZE - 1).
pub const MAX_CMDLINE: usize = 2047;

/// Which engine runs the vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// The best one that this host has.
    #[default]
    Auto,
    /// /dev/kvm.
    Kvm,
    /// The software engine.
    Soft,
}

/// How the software engine executes guest code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// Hot code translated, the rest interpreted.
    #[default]
    Translate,
    /// All interpreted, for debugging.
    Interp,
}

/// What `--accel` says: an engine, and for the software engine how it works.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AccelOption {
    /// The engine.
    pub accel: Accel,
    /// How the software engine works.
    pub tier: Tier,
    /// How KVM is used.
    pub kvm: KvmConfig,
}

/// What to start.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Boot {
    /// A bzImage, an ELF kernel with a PVH note or 64-bit entry, or a multiboot image.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    #[serde(default)]
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    #[serde(default)]
    pub cmdline: String,
}

/// Where a serial port or console leads.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Serial {
    /// The terminal that Ringfort was started from.
    #[default]
    Stdio,
    /// Output to a file.
    File(PathBuf),
    /// A new pseudo-terminal, whose name is printed.
    Pty,
    /// A listening unix socket.
    Unix(PathBuf),
    /// Nowhere.
    None,
}

/// A virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VmConfig {
    /// Its name, for people and process lists.
    pub name: String,
    /// Engine.
    pub accel: Accel,
    /// How the software engine executes guest code.
    pub tier: Tier,
    /// How KVM is used.
    pub kvm: KvmConfig,
    /// CPU model with features: `MODEL[,+feature,-feature…]`.
    pub cpu: String,
    /// vCPUs.
    pub cpus: u32,
    /// Where and how vCPUs' threads run.
    pub placement: Placement,
    /// RAM in bytes.
    pub memory: u64,
    /// What RAM is made of.
    pub backing: MemoryBacking,
    /// What to start.
    pub boot: Boot,
    /// Disks, in order.
    pub disks: Vec<Disk>,
    /// First serial port.
    pub serial: Serial,
    /// Virtio console; there is no such device if it leads nowhere.
    pub console: Serial,
    /// Network cards, in order.
    pub nets: Vec<Nic>,
    /// End when the guest resets, instead of starting it anew.
    pub no_reboot: bool,
}

impl Default for VmConfig {
    fn default() -> Self {
        VmConfig {
            name: "guest".into(),
            accel: Accel::Auto,
            tier: Tier::Translate,
            kvm: KvmConfig::default(),
            cpu: "max".into(),
            cpus: 1,
            placement: Placement::default(),
            memory: 1 << 30,
            backing: MemoryBacking::default(),
            boot: Boot::default(),
            disks: Vec::new(),
            serial: Serial::default(),
            console: Serial::None,
            nets: vec![Nic::default()],
            no_reboot: false,
        }
    }
}

/// One thing wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The field, as in the configuration file, for instance `disks[1].path`.
    pub field: String,
    /// What is wrong and what to do.
    pub what: String,
}

/// Everything wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct InvalidConfig(pub Vec<Problem>);

impl fmt::Display for InvalidConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, p) in self.0.iter().enumerate() {
            let sep = if n == 0 { "" } else { "; " };
            write!(f, "{sep}{}: {}", p.field, p.what)?;
        }
        Ok(())
    }
}

impl VmConfig {
    /// Check everything that can be checked without touching the host's devices.
    ///
    /// # Errors
    /// All problems.
    pub fn validate(&self, host_memory: u64) -> Result<(), InvalidConfig> {
        let mut problems = Vec::new();
        let mut problem = |field: &str, what: String| problems.push(Problem { field: field.into(), what });
        if self.name.is_empty()
            || self.name.len() > 64
            || self.name.chars().any(|c| c.is_control() || c == '/')
        {
            problem("name", "give 1 to 64 characters without control characters or slashes".into());
        }
        if self.cpus == 0 || self.cpus > MAX_CPUS {
            problem("cpus", format!("{} vCPUs; give 1 to {MAX_CPUS}", self.cpus));
        }
        if self.memory < MIN_MEMORY {
            problem(
                "memory",
                format!(
                    "{} is too little; give at least {}",
                    format_size(self.memory),
                    format_size(MIN_MEMORY)
                ),
            );
        } else if self.memory > host_memory {
            let (want, have) = (format_size(self.memory), format_size(host_memory));
            problem("memory", format!("{want} is more than this host has ({have}); give less"));
        } else if !self.memory.is_multiple_of(1 << 20) {
            problem("memory", format!("{} bytes is not a whole number of MiB", self.memory));
        }
        if let Err(e) = self.cpu.parse::<ringfort_x86::cpuid::CpuSpec>() {
            problem("cpu", e.to_string());
        }
        if self.boot.kernel.as_os_str().is_empty() {
            problem("boot.kernel", "no kernel given; name one with --kernel".into());
        }
        if self.boot.cmdline.len() > MAX_CMDLINE {
            problem("boot.cmdline", format!("{} bytes; at most {MAX_CMDLINE} fit", self.boot.cmdline.len()));
        }
        if self.boot.cmdline.contains('\0') {
            problem("boot.cmdline", "contains a NUL byte".into());
        }
        if self.disks.len() > MAX_DISKS {
            problem("disks", format!("{} disks; at most {MAX_DISKS} fit", self.disks.len()));
        }
        if self.console == self.serial && !matches!(self.serial, Serial::None | Serial::Pty) {
            problem("console", "leads to the same place as the serial port; give one of them another".into());
        }
        for (field, what) in disk::problems(&self.disks) {
            problem(&field, what);
        }
        if self.nets.len() > MAX_NICS {
            problem("nets", format!("{} network cards; at most {MAX_NICS} fit", self.nets.len()));
        }
        for (n, nic) in self.nets.iter().enumerate() {
            for (field, what) in nic.problems() {
                problem(&format!("nets[{n}].{field}"), what);
            }
            if nic.mac.is_some() && self.nets[..n].iter().any(|o| o.mac == nic.mac) {
                problem(&format!("nets[{n}].mac"), "is another card's as well; give each its own".into());
            }
        }
        problems.extend(self.backing.problems(self.memory));
        problems.extend(self.placement.problems(self.cpus));
        if problems.is_empty() { Ok(()) } else { Err(InvalidConfig(problems)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_problems_come_at_once_with_their_fields() {
        let config = VmConfig {
            name: "a/b".into(),
            cpus: 0,
            memory: 0,
            disks: vec!["path=x,serial=123456789012345678901".parse().unwrap(), "path=x".parse().unwrap()],
            ..VmConfig::default()
        };
        let InvalidConfig(p) = config.validate(1 << 34).unwrap_err();
        let fields: Vec<&str> = p.iter().map(|p| p.field.as_str()).collect();
        assert_eq!(fields, ["name", "cpus", "memory", "boot.kernel", "disks[0].serial", "disks[1].path"]);
    }

    #[test]
    fn more_memory_than_the_host_has_is_refused() {
        let mut config = VmConfig { memory: 2 << 30, ..VmConfig::default() };
        config.boot.kernel = "k".into();
        assert!(config.validate(1 << 30).unwrap_err().to_string().contains("this host has (1G)"));
        assert!(config.validate(2 << 30).is_ok());
    }

    #[test]
    fn console_and_serial_port_do_not_share_an_end() {
        let mut config = VmConfig { console: Serial::Stdio, ..VmConfig::default() };
        config.boot.kernel = "k".into();
        assert!(config.validate(1 << 40).unwrap_err().to_string().starts_with("console: "));
        config.serial = Serial::None;
        assert_eq!(config.validate(1 << 40), Ok(()));
        (config.serial, config.console) = (Serial::Pty, Serial::Pty);
        assert_eq!(config.validate(1 << 40), Ok(()));
    }

    #[test]
    fn survives_json() {
        let config = VmConfig { serial: Serial::Unix("/run/x".into()), ..VmConfig::default() };
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<VmConfig>(&text).unwrap(), config);
        assert!(serde_json::from_str::<VmConfig>(r#"{"memroy": 5}"#).is_err());
    }
}
