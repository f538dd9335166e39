//! What `ringfort doctor` looks at.

use std::path::Path;

use ringfort_base::{
    host::{self, Ability, Access, Cgroup, Cpu, Limit, Memory, Virtualization},
    kvm_probe::{self, KvmFitness},
};

use super::{Finding, Status};

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;
/// Memory below which the default guest (1 GiB) and this program do not both fit.
const ENOUGH_MEMORY: u64 = 3 * GIB / 2;
/// Open files that a VM with many disks, queues and consoles may come to.
const ENOUGH_FILES: u64 = 1024;

/// Every check, in the order of the report.
pub fn all() -> Vec<Finding> {
    let cpu = host::cpu();
    let fitness = kvm_probe::probe();
    let mut findings = vec![processor(&cpu), features(&cpu), kvm(&fitness, &cpu), engine(&fitness)];
    findings.extend(nested(&fitness));
    findings.extend(hardware(&host::virtualization()));
    let cgroup = host::cgroup();
    findings.push(memory(&host::memory(), &cgroup));
    findings.push(huge_pages(&host::memory()));
    findings.push(control_group(&cgroup));
    findings.push(tun(host::access(Path::new("/dev/net/tun"))));
    findings.push(user_namespaces(host::user_namespaces()));
    findings.push(open_files(host::open_files_limit()));
    findings.push(locked_memory(host::locked_memory_limit()));
    for (id, title, program, package, needed_for) in TOOLS {
        findings.push(tool(id, title, host::find_program(program).is_some(), package, needed_for));
    }
    findings
}

fn finding(id: &'static str, title: &'static str, status: Status, found: impl Into<String>) -> Finding {
    Finding { id, title, status, found: found.into(), advice: None }
}

impl Finding {
    fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }
}

fn processor(cpu: &Cpu) -> Finding {
    let inside = if cpu.virtual_machine { ", itself a virtual machine" } else { "" };
    let found = format!("{}, {} usable{inside}", cpu.model, cpu.count);
    if !cfg!(target_arch = "x86_64") {
        return finding("cpu.model", "Processor", Status::Error, found)
            .advise("Ringfort runs on x86-64 hosts only");
    }
    finding("cpu.model", "Processor", Status::Ok, found)
}

fn features(cpu: &Cpu) -> Finding {
    let (have, lack): (Vec<_>, Vec<_>) = cpu.features.iter().partition(|f| f.present);
    let names = |list: &[&host::CpuFeature]| list.iter().map(|f| f.name).collect::<Vec<_>>().join(" ");
    if lack.is_empty() {
        return finding("cpu.features", "CPU features", Status::Ok, names(&have));
    }
    let found = format!("has {}; lacks {}", names(&have), names(&lack));
    let mut losses: Vec<&str> = lack.iter().map(|f| f.gives).collect();
    losses.dedup();
    finding("cpu.features", "CPU features", Status::Info, found)
        .advise(format!("without these there are no {}", losses.join(", no ")))
}

fn kvm(fitness: &KvmFitness, cpu: &Cpu) -> Finding {
    let of = |status, found: String| finding("kvm.fitness", "KVM", status, found);
    let millions = |speed: &f64| format!("{:.0} million instructions a second in 64-bit ring 0", speed / 1e6);
    match fitness {
        KvmFitness::Fit { speed } => of(Status::Ok, format!("fit: a guest ran at {}", millions(speed))),
        KvmFitness::Slow { speed } => of(
            Status::Warning,
            format!(
                "not fit: a guest ran at {:.1} million instructions a second in 64-bit ring 0",
                speed / 1e6
            ),
        )
        .advise("this KVM has no hardware behind it; the software engine is used instead, and is quicker"),
        KvmFitness::Broken { reason } => of(Status::Warning, format!("not fit: {reason}")).advise(
            if reason.contains("another hypervisor") {
                "the software engine is used instead; end the other hypervisor (VirtualBox, VMware, …)"
            } else {
                "the software engine is used instead; the kernel's log may say more"
            },
        ),
        KvmFitness::Denied => of(Status::Warning, "/dev/kvm is there, but not for this user".into())
            .advise("add yourself to its group and log in again: sudo usermod -aG kvm \"$USER\""),
        KvmFitness::Absent => {
            let advice = match (cpu.virtualization, cpu.virtual_machine) {
                (Some("svm"), _) => "the processor has SVM: sudo modprobe kvm-amd",
                (Some(_), _) => "the processor has VMX: sudo modprobe kvm-intel",
                (None, true) => {
                    "this is a virtual machine: nested virtualization must be switched on from outside"
                }
                (None, false) => "switch on virtualization (VT-x, AMD-V, SVM) in the firmware's set-up",
            };
            of(Status::Info, "no /dev/kvm: guests run on the software engine".into()).advise(advice)
        }
    }
}

fn engine(fitness: &KvmFitness) -> Finding {
    let found = match fitness {
        KvmFitness::Fit { .. } => "kvm",
        _ => "soft",
    };
    finding("engine", "Engine for guests", Status::Ok, found)
}

/// A finding for each ability of the hardware that speeds up guests under KVM.
fn hardware(found: &Virtualization) -> Vec<Finding> {
    let ids = ["hardware.cpu", "hardware.paging", "hardware.interrupts", "hardware.iommu"];
    let found = ids.into_iter().zip(found.all());
    found
        .map(|(id, (_, title, name, ability))| {
            let of = |how: &str| finding(id, title, Status::Info, format!("{name} {how}"));
            match ability {
                Ability::On => finding(id, title, Status::Ok, format!("{name} in use")),
                Ability::Absent => of("is not there, or hidden from this system"),
                Ability::Off => of("is there, and not in use").advise(match name {
                    "VT-x" => "sudo modprobe kvm-intel",
                    "AMD-V" => "sudo modprobe kvm-amd",
                    "EPT" => "load kvm-intel with ept=1",
                    "NPT" => "load kvm-amd with npt=1",
                    "APICv" => "load kvm-intel with enable_apicv=1",
                    "AVIC" => "load kvm-amd with avic=1",
                    "VT-d" => "start the host's kernel with intel_iommu=on to pass devices through",
                    _ => "switch the IOMMU on in the firmware's set-up to pass devices through",
                }),
            }
        })
        .collect()
}

fn nested(fitness: &KvmFitness) -> Option<Finding> {
    if !matches!(fitness, KvmFitness::Fit { .. }) {
        return None;
    }
    let (module, value) = ["kvm_intel", "kvm_amd"].into_iter().find_map(|m| {
        let value = std::fs::read_to_string(format!("/sys/module/{m}/parameters/nested")).ok()?;
        Some((m, value.trim().to_owned()))
    })?;
    Some(if matches!(value.as_str(), "Y" | "1") {
        finding("kvm.nested", "Nested KVM", Status::Ok, "guests could have a KVM of their own")
    } else {
        finding("kvm.nested", "Nested KVM", Status::Info, "off").advise(format!(
            "echo options {module} nested=1 | sudo tee /etc/modprobe.d/kvm.conf, and load the module anew"
        ))
    })
}

fn memory(memory: &Memory, cgroup: &Cgroup) -> Finding {
    let limit = cgroup.memory_max.filter(|max| *max < memory.total);
    let usable = limit.map_or(memory.available, |max| max.min(memory.available));
    let mut found = format!("{} available of {}", size(memory.available), size(memory.total));
    if let Some(max) = limit {
        found += &format!("; this control group may have {}", size(max));
    }
    if usable < ENOUGH_MEMORY {
        return finding("memory", "Memory", Status::Warning, found)
            .advise("the default guest wants 1G: free some, or run guests with --memory 512M");
    }
    finding("memory", "Memory", Status::Ok, found)
}

fn huge_pages(memory: &Memory) -> Finding {
    let (all, free) = memory.huge_pages;
    let policy = match memory.transparent {
        host::Transparent::Always => "always",
        host::Transparent::Madvise => "where asked for",
        host::Transparent::Never => "never",
    };
    let found =
        format!("transparent: {policy}; set aside: {free} free of {all} ({})", size(memory.huge_page_size));
    let status = if memory.transparent == host::Transparent::Never && free == 0 {
        return finding("memory.huge_pages", "Huge pages", Status::Info, found).advise(
            "guests run quicker with: echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        );
    } else {
        Status::Ok
    };
    finding("memory.huge_pages", "Huge pages", status, found)
}

fn control_group(group: &Cgroup) -> Finding {
    let of = |status, found: String| finding("cgroup", "Control groups", status, found);
    let Some(path) = &group.path else {
        return of(Status::Info, "no version 2 hierarchy at /sys/fs/cgroup".into()).advise(
            "VMs run without limits of their own; boot with systemd.unified_cgroup_hierarchy=1 for version 2",
        );
    };
    let mut found = format!("version 2, {}, controllers: {}", path.display(), group.controllers.join(" "));
    if let Some(cpus) = group.cpu_max {
        found += &format!("; limited to {cpus:.1} processors");
    }
    if !group.writable {
        return of(Status::Info, found)
            .advise("this user may not make groups here; systemd-run --user --scope gives one that may");
    }
    of(Status::Ok, found)
}

fn tun(access: Access) -> Finding {
    let of = |status, found: &str| finding("net.tun", "Network taps", status, found);
    match access {
        Access::Usable => of(Status::Ok, "/dev/net/tun opens"),
        Access::Denied => of(Status::Info, "/dev/net/tun is there, but not for this user")
            .advise("bridged networks need it: sudo chmod 0666 /dev/net/tun, as most distributions have it"),
        Access::Absent => {
            of(Status::Info, "no /dev/net/tun").advise("bridged networks need it: sudo modprobe tun")
        }
    }
}

fn user_namespaces(possible: bool) -> Finding {
    if possible {
        return finding("user_namespaces", "User namespaces", Status::Ok, "this user may make them");
    }
    finding("user_namespaces", "User namespaces", Status::Info, "not for this user").advise(
        "building the default guest without root needs them: sudo sysctl kernel.unprivileged_userns_clone=1, \
         and user.max_user_namespaces above 0",
    )
}

fn open_files(limit: Limit) -> Finding {
    let shown = |v: Option<u64>| v.map_or("no limit".to_owned(), |n| n.to_string());
    let found = format!("{} (may be raised to {})", shown(limit.soft), shown(limit.hard));
    if limit.soft.is_some_and(|n| n < ENOUGH_FILES) {
        return finding("limits.open_files", "Open files", Status::Warning, found)
            .advise(format!("a VM with many disks can run out: ulimit -n {ENOUGH_FILES}"));
    }
    finding("limits.open_files", "Open files", Status::Ok, found)
}

fn locked_memory(limit: Limit) -> Finding {
    let found = limit.soft.map_or("no limit".to_owned(), size);
    if limit.soft.is_some_and(|n| n < 64 * MIB) {
        return finding("limits.locked_memory", "Locked memory", Status::Info, found)
            .advise("guest memory cannot be locked; only device assignment will need that (ulimit -l)");
    }
    finding("limits.locked_memory", "Locked memory", Status::Ok, found)
}

/// Identifier, title, program, Debian package, and what for.
const TOOLS: [(&str, &str, &str, &str, &str); 5] = [
    (
        "tools.apt_get",
        "apt-get",
        "apt-get",
        "apt",
        "building the default guest; else give --kernel and --disk",
    ),
    ("tools.mmdebstrap", "mmdebstrap", "mmdebstrap", "mmdebstrap", "building the default guest"),
    ("tools.mke2fs", "mke2fs", "mke2fs", "e2fsprogs", "building the default guest"),
    ("tools.qemu_img", "qemu-img", "qemu-img", "qemu-utils", "making and converting disk images"),
    ("tools.passt", "passt", "passt", "passt", "fast user-mode networking, once Ringfort has networks"),
];

fn tool(
    id: &'static str,
    title: &'static str,
    there: bool,
    package: &'static str,
    needed_for: &'static str,
) -> Finding {
    if there {
        return finding(id, title, Status::Ok, "installed");
    }
    finding(id, title, Status::Info, format!("not installed; for {needed_for}"))
        .advise(format!("sudo apt-get install {package}"))
}

/// Bytes for people, in binary units.
fn size(bytes: u64) -> String {
    match bytes {
        b if b >= GIB => format!("{:.1} GiB", b as f64 / GIB as f64),
        b if b >= MIB => format!("{} MiB", b / MIB),
        b => format!("{} KiB", b >> 10),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn a_cpu() -> Cpu {
        Cpu {
            model: "X".into(),
            count: 2,
            virtualization: None,
            virtual_machine: false,
            features: vec![
                host::CpuFeature { name: "avx2", present: true, gives: "v3" },
                host::CpuFeature { name: "sha_ni", present: false, gives: "SHA in guests" },
            ],
        }
    }

    #[test]
    fn every_state_of_kvm_is_told_with_a_way_out() {
        let cpu = a_cpu();
        let fit = kvm(&KvmFitness::Fit { speed: 3.2e9 }, &cpu);
        assert_eq!((fit.status, fit.advice), (Status::Ok, None));
        assert!(fit.found.contains("3200 million"));
        let slow = kvm(&KvmFitness::Slow { speed: 1.25e6 }, &cpu);
        assert!(slow.status == Status::Warning && slow.found.contains("1.2 million"));
        assert!(kvm(&KvmFitness::Denied, &cpu).advice.expect("advice").contains("usermod"));
        let absent = |virtualization, virtual_machine| {
            let cpu = Cpu { virtualization, virtual_machine, ..a_cpu() };
            kvm(&KvmFitness::Absent, &cpu).advice.expect("advice")
        };
        assert!(absent(Some("svm"), false).contains("kvm-amd"));
        assert!(absent(Some("vmx"), true).contains("kvm-intel"));
        assert!(absent(None, true).contains("nested"));
        assert!(absent(None, false).contains("firmware"));
    }

    #[test]
    fn what_is_missing_is_advised_upon_and_what_is_there_is_not() {
        let f = features(&a_cpu());
        assert!(f.found.contains("lacks sha_ni") && f.advice.expect("advice").contains("SHA in guests"));
        assert!(tool("a", "a", true, "p", "x").advice.is_none());
        assert!(tool("a", "a", false, "p", "x").advice.expect("advice").ends_with("install p"));
        assert!(tun(Access::Usable).advice.is_none());
        assert!(tun(Access::Absent).advice.is_some());
        assert!(user_namespaces(false).advice.is_some());
        assert_eq!(open_files(Limit { soft: Some(256), hard: Some(4096) }).status, Status::Warning);
        assert_eq!(open_files(Limit { soft: None, hard: None }).status, Status::Ok);
    }

    #[test]
    fn a_control_group_counts_against_memory() {
        let m = Memory {
            total: 16 * GIB,
            available: 12 * GIB,
            huge_pages: (0, 0),
            huge_page_size: 2 * MIB,
            transparent: host::Transparent::Always,
        };
        let mut g =
            Cgroup { path: None, controllers: vec![], writable: false, memory_max: None, cpu_max: None };
        assert_eq!(memory(&m, &g).status, Status::Ok);
        g.memory_max = Some(GIB);
        let tight = memory(&m, &g);
        assert!(tight.status == Status::Warning && tight.found.contains("1.0 GiB"));
    }

    #[test]
    fn identifiers_are_unique() {
        let mut ids: Vec<_> = all().iter().map(|f| f.id).collect();
        let count = ids.len();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), count);
        assert!(count >= 15);
    }
}
