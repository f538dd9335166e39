//! What a machine is made of on the host: memory, placement of vCPUs, and which engine is taken and why.

mod support;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use support::tiny::Code;
use support::*;

/// A guest that says that it runs and then does nothing, with these options.
fn idle(scratch: &Scratch, options: &[&str]) -> Guest {
    let kernel = scratch.file("kernel", &Code::new().print("running\n").halt().multiboot());
    let mut args = vec!["run", "--kernel", text(&kernel)];
    args.extend(options);
    let mut g = Guest::start(ringfort(&args));
    g.expect("running");
    g
}

/// The one line of a refusal.
fn refused(command: &mut Command) -> String {
    let out = command.stdin(Stdio::null()).output().expect("the command");
    let said = String::from_utf8(out.stderr).expect("text");
    assert_eq!(out.status.code(), Some(2), "{command:?}: {said}");
    assert_eq!(said.lines().count(), 1, "{command:?}: {said}");
    said
}

/// Name, and a line of `status`, of every thread of a process.
fn threads(pid: u32, key: &str) -> Vec<(String, String)> {
    let folder = PathBuf::from(format!("/proc/{pid}/task"));
    let read = |p: PathBuf| std::fs::read_to_string(p).expect("a thread's file");
    std::fs::read_dir(folder)
        .expect("threads")
        .map(|t| {
            let t = t.expect("a thread").path();
            let status = read(t.join("status"));
            let value =
                status.lines().find_map(|l| l.strip_prefix(key)).unwrap_or_default().trim().to_owned();
            (read(t.join("comm")).trim().to_owned(), value)
        })
        .collect()
}

#[test]
fn vcpu_threads_have_names_and_run_where_they_should() {
    let scratch = Scratch::new("pin");
    let cpus = ringfort_base::threads::usable_cpus().expect("CPUs");
    let (first, last) = (cpus[0].to_string(), cpus[cpus.len() - 1].to_string());
    let option = format!("2,pin={last}+{first}");
    let g = idle(&scratch, &["--accel", "soft", "--memory", "64M", "--cpus", &option]);
    let all = threads(g.pid(), "Cpus_allowed_list:");
    assert!(all.contains(&("vcpu0".into(), last)), "{all:?}");
    assert!(all.contains(&("vcpu1".into(), first)), "{all:?}");
}

/// What /proc says of the mapping whose line has `name` in it: field's name and value.
fn mapping(g: &Guest, name: &str) -> HashMap<String, String> {
    let maps = std::fs::read_to_string(format!("/proc/{}/smaps", g.pid())).expect("its mappings");
    let mut lines = maps.lines().skip_while(|l| !l.contains(name));
    assert!(lines.next().is_some(), "no mapping {name}: {maps}");
    let field = |l: &str| {
        l.split_once(':').filter(|(k, _)| !k.contains(' ')).map(|(k, v)| (k.to_owned(), v.trim().to_owned()))
    };
    let all: HashMap<_, _> = lines.map_while(field).collect();
    assert!(all.contains_key("VmFlags"), "{all:?}");
    all
}

#[test]
fn vcpu_threads_have_the_priority_that_was_asked_for() {
    // Without the right, or in a control group without a share of real time.
    let may = Command::new("chrt").args(["-f", "1", "true"]).output();
    if !may.as_ref().is_ok_and(|o| o.status.success()) {
        println!("skipped: no real-time priority to be had: {may:?}");
        return;
    }
    let scratch = Scratch::new("realtime");
    let g = idle(&scratch, &["--accel", "soft", "--memory", "64M", "--cpus", "2,realtime=7"]);
    let stat = |name: &str| {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", g.pid())).expect("threads");
        let stats = tasks.map(|t| std::fs::read_to_string(t.expect("a thread").path().join("stat")));
        let stat = stats.map(|s| s.expect("a thread's state")).find(|s| s.contains(&format!("({name})")));
        let stat = stat.expect("a thread of that name");
        // Fields 40 and 41 of proc_pid_stat(5): priority and policy (1: SCHED_FIFO, 2: SCHED_RR).
        let fields: Vec<String> =
            stat.rsplit_once(") ").expect("fields").1.split(' ').map(str::to_owned).collect();
        (fields[37].clone(), fields[38].clone())
    };
    for name in ["vcpu0", "vcpu1"] {
        let (priority, policy) = stat(name);
        assert!(priority == "7" && (policy == "1" || policy == "2"), "{name}: {priority}, policy {policy}");
    }
}

#[test]
fn memory_is_made_of_what_was_asked_for() {
    let scratch = Scratch::new("backing");
    let g = idle(&scratch, &["--accel", "soft", "--memory", "size=64M,shared=on,prealloc=on,thp=off"]);
    let ram = mapping(&g, "guest-ram");
    assert_eq!((ram["Size"].as_str(), ram["Rss"].as_str()), ("65536 kB", "65536 kB"));
}

/// The host's pool of huge pages, made larger for a while.
struct HugePages(String);

impl HugePages {
    const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

    /// None where there are no such pages to be had.
    fn more(count: u64) -> Option<HugePages> {
        let had = std::fs::read_to_string(Self::POOL).ok()?;
        let wanted = had.trim().parse::<u64>().ok()? + count;
        let pool = HugePages(had);
        std::fs::write(Self::POOL, wanted.to_string()).ok()?;
        let has = std::fs::read_to_string(Self::POOL).ok()?;
        (has.trim().parse() == Ok(wanted)).then_some(pool)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = std::fs::write(Self::POOL, &self.0);
    }
}

#[test]
fn memory_of_huge_pages() {
    let Some(_pool) = HugePages::more(16) else {
        println!("skipped: the host has no huge pages to give");
        return;
    };
    let scratch = Scratch::new("huge");
    let engines: &[&str] =
        if Path::new("/dev/kvm").exists() && root() { &["soft", "kvm"] } else { &["soft"] };
    for engine in engines {
        let g = idle(&scratch, &["--accel", engine, "--memory", "size=32M,hugepages=2M,prealloc=on"]);
        let ram = mapping(&g, "hugepage");
        assert_eq!(
            (ram["Size"].as_str(), ram["KernelPageSize"].as_str()),
            ("32768 kB", "2048 kB"),
            "{engine}"
        );
        drop(g);
    }
    // One page more than there are.
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
        .expect("a number");
    let size = format!("{}M,hugepages=2M", 2 * (free.trim().parse::<u64>().expect("a number") + 1));
    let kernel = text(&scratch.0.join("kernel")).to_owned();
    let said = refused(&mut ringfort(&["run", "--accel", "soft", "--kernel", &kernel, "--memory", &size]));
    assert!(said.contains("nr_hugepages"), "{said}");
}

#[test]
fn memory_that_the_host_may_merge() {
    let on = "/sys/kernel/mm/ksm/run";
    if !Path::new(on).exists() {
        println!("skipped: the host's kernel merges no pages (no {on})");
        return;
    }
    let scratch = Scratch::new("merge");
    let flags = |memory: &str| {
        let g = idle(&scratch, &["--accel", "soft", "--memory", memory]);
        let maps = std::fs::read_to_string(format!("/proc/{}/smaps", g.pid())).expect("its mappings");
        maps.lines().filter(|l| l.starts_with("VmFlags:") && l.split(' ').any(|f| f == "mg")).count()
    };
    assert_eq!(flags("64M"), 0);
    assert!(flags("64M,merge=on") > 0);
}

#[test]
fn what_the_host_does_not_have_is_refused() {
    let scratch = Scratch::new("host-bad");
    let kernel = scratch.file("kernel", &Code::new().halt().multiboot());
    let run = |options: &[&str]| {
        let mut c = ringfort(&["run", "--kernel", text(&kernel), "--accel", "soft"]);
        c.args(options);
        refused(&mut c)
    };
    for (options, says) in [
        (["--memory", "64M,hugepages=512G"], "--memory: "),
        (["--memory", "65M,hugepages=2M"], "no whole number of 2M pages"),
        (["--memory", "64M,node=999"], "no such NUMA node"),
        (["--memory", "64M,huge=on"], "unknown memory option 'huge'"),
        (["--cpus", "2,pin=0"], "pin names 1 host CPUs for 2 vCPUs"),
        (["--cpus", "1,pin=4000"], "--cpus: pin: no vCPU can run on host CPU 4000"),
        (["--cpus", "1,realtime=100"], "from 1 to 99"),
        (["--accel", "kvm,dirty-ring=many"], "number of entries"),
        (["--accel", "auto,halt-poll=5"], "name an engine"),
    ] {
        let said = match options[0] {
            "--accel" => refused(&mut ringfort(&["run", "--kernel", text(&kernel), options[0], options[1]])),
            _ => run(&options),
        };
        assert!(said.contains(says), "{options:?}: {said}");
    }
}

/// Whether this process may mount.
fn root() -> bool {
    std::fs::read_to_string("/proc/self/status")
        .is_ok_and(|s| s.contains("CapEff:\t000001f") || s.contains("CapEff:\t000003f"))
}

#[test]
fn a_kvm_that_cannot_be_used_says_why() {
    let scratch = Scratch::new("kvm-bad");
    let kernel = scratch.file("kernel", &Code::new().halt().multiboot());
    let ringfort = env!("CARGO_BIN_EXE_ringfort");
    let run = format!("{ringfort} run --accel kvm --kernel {}", text(&kernel));
    if !Path::new("/dev/kvm").exists() {
        let said = refused(Command::new("sh").args(["-c", &run]));
        assert!(said.contains("there is no /dev/kvm"), "{said}");
        println!("skipped in part: there is no /dev/kvm");
        return;
    }
    let mut unshared = Command::new("unshare");
    // In a mount name space of its own, another device lies over the real one.
    let over = |what: &str| format!("mount --bind {what} /dev/kvm && exec {run}");
    if !root() || !Command::new("unshare").args(["-m", "true"]).status().is_ok_and(|s| s.success()) {
        println!("skipped: this needs the right to mount");
        return;
    }
    let said = refused(unshared.args(["-m", "sh", "-c", &over("/dev/null")]));
    assert!(said.contains("/dev/kvm is no KVM device"), "{said}");
    let file = scratch.file("closed", b"");
    Command::new("chmod").args(["600", text(&file)]).status().expect("chmod");
    // As a user who may not: the programs' folders must be open to it.
    let copy = scratch.0.join("ringfort");
    std::fs::copy(ringfort, &copy).expect("a copy");
    Command::new("chmod").args(["755", text(&scratch.0), text(&copy)]).status().expect("chmod");
    let command = format!(
        "mount --bind {} /dev/kvm && exec setpriv --reuid 65534 --regid 65534 --clear-groups {} run --accel kvm --kernel {}",
        text(&file),
        text(&copy),
        text(&kernel)
    );
    let said = refused(Command::new("unshare").args(["-m", "sh", "-c", &command]));
    assert!(said.contains("may not be used by this user") && said.contains("group"), "{said}");
}

#[test]
fn a_kvm_that_is_busy_or_lacks_something_says_so() {
    if !Path::new("/dev/kvm").exists() {
        println!("skipped: there is no /dev/kvm");
        return;
    }
    let scratch = Scratch::new("kvm-lacks");
    let kernel = scratch.file("kernel", &Code::new().power_off().multiboot());
    let script = scratch.file("refuse.py", include_bytes!("support/refuse.py"));
    // KVM_CREATE_VM and KVM_CHECK_EXTENSION, and the argument to refuse; all if it is -1.
    let refusing = |request: &str, argument: &str, errno: libc::c_int, command: &[&str]| {
        let mut c = Command::new("python3");
        c.args([text(&script), request, argument, &errno.to_string(), env!("CARGO_BIN_EXE_ringfort")]);
        c.args(command);
        c
    };
    let (make, ask) = ("0xae01", "0xae03");
    let (halt_poll, pit) = ("182", "33");
    for (request, argument, errno, accel, says) in [
        (make, "-1", libc::EBUSY, "kvm", "in use by another hypervisor; end that one"),
        (make, "-1", libc::ENOMEM, "kvm", "no memory for another VM"),
        (ask, "121", 0, "kvm", "lacks KVM_CAP_SPLIT_IRQCHIP (I/O APIC and 8259 outside of the kernel)"),
        (ask, "77", 0, "kvm", "lacks KVM_CAP_SIGNAL_MSI (message-signalled interrupts)"),
        (ask, halt_poll, 0, "kvm,halt-poll=0", "lacks KVM_CAP_HALT_POLL; leave halt-poll out"),
        (ask, pit, 0, "kvm,irqchip=kernel", "lacks KVM_CAP_PIT2 or KVM_CAP_PIT_STATE2; give irqchip=split"),
    ] {
        let run = ["run", "--accel", accel, "--kernel", text(&kernel), "--memory", "64M"];
        let said = refused(&mut refusing(request, argument, errno, &run));
        assert!(said.contains(says), "{says}: {said}");
    }
    let auto = ["run", "--accel", "auto", "--kernel", text(&kernel), "--memory", "64M"];
    let out = refusing(make, "-1", libc::EBUSY, &auto).stdin(Stdio::null()).output().expect("ringfort");
    let said = String::from_utf8(out.stderr).expect("text");
    assert_eq!(out.status.code(), Some(0), "{said}");
    assert!(
        said.contains("engine: soft (/dev/kvm is there, but unfit: ") && said.contains("another hypervisor"),
        "{said}"
    );
    let out = refusing(make, "-1", libc::EBUSY, &["doctor"]).stdin(Stdio::null()).output().expect("ringfort");
    let said = String::from_utf8(out.stdout).expect("text");
    assert!(said.contains("end the other hypervisor"), "{said}");
}

#[test]
fn auto_says_in_one_line_which_engine_and_why() {
    let scratch = Scratch::new("auto");
    let kernel = scratch.file("kernel", &Code::new().power_off().multiboot());
    let out = ringfort(&["run", "--kernel", text(&kernel), "--memory", "64M"])
        .stdin(Stdio::null())
        .output()
        .expect("ringfort");
    let said = String::from_utf8(out.stderr).expect("text");
    assert_eq!(out.status.code(), Some(0), "{said}");
    let lines: Vec<&str> = said.lines().filter(|l| l.contains("engine: ")).collect();
    assert_eq!(lines.len(), 1, "{said}");
    assert!(lines[0].contains("engine: soft (") || lines[0].contains("engine: kvm ("), "{said}");
    assert!(lines[0].contains("kvm"), "says what stands with KVM: {said}");
}

/// The hardware's abilities by `lscpu`, which is part of every system, and by libvirt's host validation where that is installed.
#[test]
fn info_says_of_the_hardware_what_others_say() {
    let out = ringfort(&["info", "--json"]).output().expect("ringfort");
    let info: serde_json::Value = serde_json::from_slice(&out.stdout).expect("JSON");
    let state = |what: &str| info["hardware"][what]["state"].as_str().expect("a state").to_owned();
    let told = |program: &str, args: &[&str]| {
        let out = Command::new(program).args(args).env("LC_ALL", "C").output().ok()?;
        Some(String::from_utf8_lossy(&out.stdout).into_owned())
    };
    let Some(lscpu) = told("lscpu", &[]) else {
        println!("skipped: there is no lscpu here");
        return;
    };
    let line = |name: &str| lscpu.lines().find_map(|l| l.strip_prefix(name)).map(str::trim);
    let flag = |name: &str| line("Flags:").is_some_and(|f| f.split(' ').any(|f| f == name));
    if let Some(name) = line("Virtualization:") {
        assert_eq!(info["hardware"]["cpu"]["name"], name);
    }
    for (what, by_lscpu) in
        [("cpu", line("Virtualization:").is_some()), ("paging", flag("ept") || flag("npt"))]
    {
        // What a kernel hides from its programs it may still use itself.
        let ours = state(what);
        assert!(ours == "on" || by_lscpu == (ours != "absent"), "{what} is {ours}: {lscpu}");
    }
    let Some(libvirt) = told("virt-host-validate", &["qemu"]) else {
        println!("skipped in part: there is no virt-host-validate here");
        return;
    };
    let verdict =
        |of: &str| libvirt.lines().find(|l| l.contains(of)).unwrap_or_else(|| panic!("no {of}: {libvirt}"));
    let hardware = verdict("Checking for hardware virtualization");
    assert_eq!(hardware.contains("PASS"), state("cpu") != "absent", "{hardware}");
    let iommu = verdict("IOMMU support");
    assert_eq!(iommu.contains("PASS"), state("iommu") != "absent", "{iommu}");
}
