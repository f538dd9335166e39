//! What the host's processor and chipset have for virtualization, and whether the host's KVM uses it.

use super::read_trimmed;
use std::path::Path;

/// One ability of the hardware.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ability {
    /// There, and in use.
    On,
    /// There, and switched off or not loaded.
    Off,
    /// Not there, or hidden from this system.
    Absent,
}

/// Virtualization by the hardware, by the vendor's names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Virtualization {
    /// VT-x or AMD-V: in use once the KVM module is loaded.
    pub cpu: (&'static str, Ability),
    /// EPT or NPT: the second level of page tables.
    pub paging: (&'static str, Ability),
    /// APICv or AVIC: interrupts delivered to a running guest without an exit.
    pub interrupts: (&'static str, Ability),
    /// VT-d or AMD-Vi: devices kept to the memory that they are given.
    pub iommu: (&'static str, Ability),
}

/// The host's.
#[must_use]
pub fn virtualization() -> Virtualization {
    look(Path::new("/"))
}

fn look(root: &Path) -> Virtualization {
    let info = std::fs::read_to_string(root.join("proc/cpuinfo")).unwrap_or_default();
    let field = |name: &str| {
        info.lines().find_map(|l| l.split_once(':').filter(|(k, _)| k.trim() == name)).map_or("", |(_, v)| v)
    };
    // Newer kernels list what belongs to VMX apart.
    let flags: Vec<&str> =
        field("flags").split_whitespace().chain(field("vmx flags").split_whitespace()).collect();
    let has = |flag: &str| flags.contains(&flag);
    let module = |name: &str| root.join("sys/module").join(name);
    let parameter = |m: &str, p: &str| {
        let value = read_trimmed(&module(m).join("parameters").join(p));
        value.map(|v| matches!(v.as_str(), "Y" | "1"))
    };
    let amd = field("vendor_id").trim() == "AuthenticAMD" || field("vendor_id").trim() == "HygonGenuine";
    let kvm = if amd { "kvm_amd" } else { "kvm_intel" };
    // A flag that this kernel does not show may still be used by KVM, and the other way round.
    let ability = |shown: bool, used: Option<bool>| match (shown, used) {
        (_, Some(true)) => Ability::On,
        (true, _) => Ability::Off,
        (false, _) => Ability::Absent,
    };
    let iommus = |prefix: &str| {
        std::fs::read_dir(root.join("sys/class/iommu"))
            .is_ok_and(|d| d.flatten().any(|e| e.file_name().to_string_lossy().starts_with(prefix)))
    };
    // The firmware's tables tell of an IOMMU that the kernel does not use.
    let table = |name: &str| root.join("sys/firmware/acpi/tables").join(name).exists();
    let loaded = Some(module(kvm).exists());
    if amd {
        Virtualization {
            cpu: ("AMD-V", ability(has("svm"), loaded)),
            paging: ("NPT", ability(has("npt"), parameter(kvm, "npt"))),
            interrupts: ("AVIC", ability(has("avic"), parameter(kvm, "avic"))),
            iommu: ("AMD-Vi", ability(table("IVRS"), Some(iommus("ivhd")))),
        }
    } else {
        let posted = has("posted_intr") || has("apicv");
        Virtualization {
            cpu: ("VT-x", ability(has("vmx"), loaded)),
            paging: ("EPT", ability(has("ept"), parameter(kvm, "ept"))),
            interrupts: ("APICv", ability(posted, parameter(kvm, "enable_apicv"))),
            iommu: ("VT-d", ability(table("DMAR"), Some(iommus("dmar")))),
        }
    }
}

impl Virtualization {
    /// All four: a stable name for programs, what it is for people, its vendor's name, and how it stands.
    #[must_use]
    pub fn all(&self) -> [(&'static str, &'static str, &'static str, Ability); 4] {
        let of = |id, title, (name, ability): (&'static str, Ability)| (id, title, name, ability);
        [
            of("cpu", "Virtualization by the processor", self.cpu),
            of("paging", "Nested page tables", self.paging),
            of("interrupts", "Posted interrupts", self.interrupts),
            of("iommu", "IOMMU", self.iommu),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    /// A host's files below a folder of their own.
    struct Host(PathBuf);

    impl Host {
        fn new(name: &str, files: &[(&str, &str)]) -> Host {
            let root = std::env::temp_dir().join(format!("ringfort-virt-{name}-{}", std::process::id()));
            for (path, text) in files {
                let path = root.join(path);
                std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
                std::fs::write(path, text).expect("a file");
            }
            Host(root)
        }
    }

    impl Drop for Host {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn intel_with_everything() {
        let h = Host::new(
            "intel",
            &[
                (
                    "proc/cpuinfo",
                    "vendor_id : GenuineIntel\nflags : fpu vmx ept vpid\nvmx flags : posted_intr\n",
                ),
                ("sys/module/kvm_intel/parameters/ept", "Y\n"),
                ("sys/module/kvm_intel/parameters/enable_apicv", "Y\n"),
                ("sys/class/iommu/dmar0/x", ""),
            ],
        );
        let want =
            [("VT-x", Ability::On), ("EPT", Ability::On), ("APICv", Ability::On), ("VT-d", Ability::On)];
        assert_eq!(look(&h.0).all().map(|a| (a.2, a.3)), want);
    }

    #[test]
    fn amd_with_some_switched_off() {
        let h = Host::new(
            "amd",
            &[
                ("proc/cpuinfo", "vendor_id : AuthenticAMD\nflags : fpu svm npt avic\n"),
                ("sys/module/kvm_amd/parameters/npt", "1\n"),
                ("sys/module/kvm_amd/parameters/avic", "N\n"),
                ("sys/firmware/acpi/tables/IVRS", ""),
            ],
        );
        let want =
            [("AMD-V", Ability::On), ("NPT", Ability::On), ("AVIC", Ability::Off), ("AMD-Vi", Ability::Off)];
        assert_eq!(look(&h.0).all().map(|a| (a.2, a.3)), want);
    }

    #[test]
    fn a_host_that_shows_nothing() {
        let h = Host::new("none", &[("proc/cpuinfo", "vendor_id : GenuineIntel\nflags : fpu\n")]);
        assert!(look(&h.0).all().iter().all(|a| a.3 == Ability::Absent));
        let h = Host::new("unloaded", &[("proc/cpuinfo", "vendor_id : GenuineIntel\nflags : vmx ept\n")]);
        assert_eq!((look(&h.0).cpu.1, look(&h.0).paging.1), (Ability::Off, Ability::Off));
        let _ = virtualization();
    }
}
