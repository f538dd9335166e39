//! Real guests on the software engine: Debian's kernel with 1, 2 and 4 vCPUs to a shell, and a whole Debian disk to a login.

mod support;

use ringfort_guest::{TEST_PROMPT, TEST_READY};
use support::*;

/// A `ringfort run` of the test guest with `extra` on its kernel command line.
fn test_run(extra: &str, options: &[&str]) -> Guest {
    let guest = test_guest();
    let cmdline = format!("{} {extra}", guest.cmdline);
    let mut all = vec!["--memory", "512M"];
    all.extend(options);
    Guest::run(&run_args("soft", &guest.kernel, &guest.initrd, &cmdline, &all))
}

/// The guest's clock against the host's: read while the host's clock stands between two readings.
fn check_clock(g: &mut Guest) {
    let before = host_seconds();
    let guest: i64 = g.shell("date +%s").parse().expect("seconds");
    let after = host_seconds();
    assert!(
        (before - 2..=after + 2).contains(&guest),
        "the guest's clock says {guest}, the host's {before} to {after}"
    );
}

/// Boot the test guest and do what a user would.
fn boot(cpus: u32) {
    const SUM: &str = "dd if=/dev/vda bs=4096 skip=100 count=256 2>/dev/null | md5sum";
    let _turn = one_at_a_time();
    let scratch = Scratch::new(&format!("boot{cpus}"));
    let disk = scratch.disk("disk.img", 64 << 20);
    let other = scratch.disk("other.img", 8 << 20);
    let sealed = scratch.disk("sealed.img", 1 << 20);
    let mut g = test_run(
        "",
        &[
            "--cpus",
            &cpus.to_string(),
            "--disk",
            &format!("path={},serial=RF0001,format=raw", text(&disk)),
            "--disk",
            &format!("path={},snapshot=on", text(&other)),
            "--disk",
            &format!("path={},readonly=on", text(&sealed)),
        ],
    );
    g.expect(TEST_PROMPT);
    assert_eq!(g.shell("grep -c ^processor /proc/cpuinfo"), cpus.to_string());
    assert_eq!(g.shell("cat /sys/devices/system/cpu/online"), online(cpus));
    assert!(g.shell("grep -m1 ^flags /proc/cpuinfo").contains(" sse2 "));
    // Every vCPU runs what is given to it.
    for n in 0..cpus {
        assert_eq!(g.shell(&format!("taskset -c {n} cut -d' ' -f39 /proc/self/stat")), n.to_string());
    }
    // What lspci would show: host bridge, ISA bridge, disks.
    let pci = g.shell(
        "cd /sys/bus/pci/devices && for d in *; do echo $(cat $d/vendor) $(cat $d/device); done; cd /",
    );
    for id in ["0x8086 0x29c0", "0x8086 0x2918", "0x1af4 0x1042", "0x1af4 0x1044", "0x1af4 0x1045"] {
        assert!(pci.contains(id), "no {id} in:\n{pci}");
    }
    assert_eq!(pci.matches("0x1af4 0x1042").count(), 3, "{pci}");
    // What lsblk would show.
    assert_eq!(g.shell("cat /sys/block/vda/size"), ((64u32 << 20) / 512).to_string());
    assert_eq!(g.shell("cat /sys/block/vda/serial"), "RF0001");
    assert_eq!(g.shell("cat /sys/block/vda/ro /sys/block/vdc/ro"), "0\n1");
    assert_eq!(g.shell("ls /sys/block/vda/mq | wc -l"), cpus.to_string());
    check_clock(&mut g);
    g.shell("head -c 1048576 /dev/urandom > /tmp/data");
    g.shell("dd if=/tmp/data of=/dev/vda bs=4096 seek=100 conv=notrunc,fsync 2>/dev/null");
    g.shell("dd if=/tmp/data of=/dev/vdb bs=1M conv=notrunc,fsync 2>/dev/null");
    g.shell("! dd if=/tmp/data of=/dev/vdc bs=1M conv=notrunc,fsync 2>/dev/null");
    let sum = g.shell("md5sum </tmp/data");
    // Without --no-reboot a reset boots it again.
    g.send("reboot -f\n");
    // The old system's shell prompts too: the new one's comes after its init.
    g.expect(TEST_READY);
    g.expect(TEST_PROMPT);
    assert_eq!(g.shell(SUM), sum);
    assert_eq!(g.shell("dd if=/dev/vdb bs=1M count=1 2>/dev/null | md5sum"), sum);
    check_clock(&mut g);
    g.send("poweroff -f\n");
    assert_eq!(g.wait().code(), Some(0));
    // What was written is in the file; a throw-away layer leaves its file alone.
    let written = std::fs::read(&disk).expect("the disk");
    assert!(written[409_600..409_600 + 1_048_576].iter().any(|&b| b != 0));
    assert!(std::fs::read(&other).expect("the other disk").iter().all(|&b| b == 0));
    assert_eq!(written.len(), 64 << 20);
}

/// How Linux writes the CPUs that are up.
fn online(cpus: u32) -> String {
    if cpus == 1 { "0".into() } else { format!("0-{}", cpus - 1) }
}

#[test]
fn one_vcpu() {
    boot(1);
}

#[test]
fn two_vcpus() {
    boot(2);
}

#[test]
fn four_vcpus() {
    boot(4);
}

#[test]
fn the_virtio_console_carries_a_shell() {
    let _turn = one_at_a_time();
    let scratch = Scratch::new("hvc");
    let serial = scratch.0.join("serial.out");
    // The console that is named last is the guest's /dev/console. The serial port is free for a file then.
    let place = format!("file:{}", text(&serial));
    let mut g = test_run("console=hvc0", &["--serial", &place, "--console", "stdio"]);
    g.expect(TEST_PROMPT);
    assert!(g.shell("cat /sys/class/tty/console/active").ends_with("hvc0"));
    assert_eq!(g.shell("tty"), "/dev/hvc0");
    // More than any buffer on the way holds, in both directions.
    let lines = g.shell("seq 1 40000 | tail -n +1");
    assert_eq!(lines.lines().count(), 40000);
    assert_eq!(lines.lines().last(), Some("40000"));
    g.send("poweroff -f\n");
    assert_eq!(g.wait().code(), Some(0));
    let said = std::fs::read_to_string(&serial).expect("what the serial port said");
    assert!(said.contains("Linux version"), "{said}");
}

#[test]
fn every_cpu_model_boots() {
    let _turn = one_at_a_time();
    for model in ["qemu64", "Nehalem", "Haswell", "Skylake", "EPYC", "host", "max,-avx,-x2apic"] {
        let mut g = test_run("ringfort.init=poweroff", &["--cpu", model, "--cpus", "2"]);
        g.expect(TEST_READY);
        assert_eq!(g.wait().code(), Some(0), "{model}");
    }
}

#[test]
fn a_reset_that_is_not_to_boot_again_is_an_exit_status() {
    let _turn = one_at_a_time();
    let mut g = test_run("ringfort.init=reboot", &["--no-reboot"]);
    g.expect(TEST_READY);
    assert_eq!(g.wait().code(), Some(3));
}

#[test]
fn debian_boots_to_a_login() {
    let _turn = one_at_a_time();
    let guest = debian_guest();
    let mut g = Guest::run(&run_args(
        "soft",
        &guest.kernel,
        &guest.initrd,
        &guest.cmdline,
        &["--memory", "1G", "--cpus", "2", "--disk", &format!("path={},snapshot=on", text(&guest.disk))],
    ));
    log_in(&mut g);
    assert_eq!(g.shell("nproc"), "2");
    let pci = g.shell("lspci -nn");
    for part in ["Host bridge", "ISA bridge", "[1af4:1042]"] {
        assert!(pci.contains(part), "no {part} in:\n{pci}");
    }
    assert!(g.shell("lsblk -ndo NAME,TYPE").lines().any(|l| l.split_whitespace().eq(["vda", "disk"])));
    check_clock(&mut g);
    assert_eq!(
        g.shell("systemctl is-system-running --wait; systemctl --failed --no-legend --plain"),
        "running"
    );
    g.shell("echo kept > /root/file; sync");
    g.send("systemctl reboot\n");
    log_in(&mut g);
    assert_eq!(g.shell("cat /root/file"), "kept");
    // The power button, as Ctrl-A p presses it, shuts a system down in order once logind listens to it. That a system
    // is running does not say so: the button is a device that udev brings late, with its driver.
    g.send("journalctl --boot --unit=systemd-logind --output=cat --lines=all --follow\n");
    g.expect("Watching system buttons");
    g.send("\x01p");
    assert_eq!(g.wait().code(), Some(0));
}
