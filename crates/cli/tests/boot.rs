//! Real guests on the software engine: Debian's kernel with 1, 2 and 4 vCPUs to a shell, and a whole Debian disk to a login.

mod support;

use support::*;

/// Boot the test guest and do what a user would.
fn boot(cpus: u32) {
    let _turn = one_at_a_time();
    let guest = test_guest();
    let scratch = Scratch::new(&format!("boot{cpus}"));
    let disk = scratch.disk("disk.img", 64 << 20);
    let start = |disk_options: &str| {
        Guest::start(ringfort(&[
            "run",
            "--kernel",
            text(&guest.kernel),
            "--initrd",
            text(&guest.initrd),
            "--cmdline",
            &guest.cmdline,
            "--memory",
            "512M",
            "--cpus",
            &cpus.to_string(),
            "--accel",
            "soft",
            "--disk",
            &format!("path={}{disk_options}", text(&disk)),
        ]))
    };
    let mut g = start(",serial=RF0001");
    g.expect(ringfort_guest::TEST_PROMPT);
    assert_eq!(g.shell("grep -c ^processor /proc/cpuinfo"), cpus.to_string());
    assert!(g.shell("grep -m1 ^flags /proc/cpuinfo").contains(" sse2 "));
    let pci = g.shell("lspci");
    for id in ["8086:29c0", "8086:2918", "1af4:1042"] {
        assert!(pci.contains(id), "no {id} in:\n{pci}");
    }
    assert_eq!(g.shell("cat /sys/block/vda/size"), ((64u32 << 20) / 512).to_string());
    assert_eq!(g.shell("cat /sys/block/vda/serial"), "RF0001");
    let guest_time: i64 = g.shell("date +%s").parse().expect("seconds");
    assert!((guest_time - host_seconds()).abs() <= 5, "the guest's clock says {guest_time}");
    g.shell("head -c 1000000 /dev/urandom > /tmp/data && dd if=/tmp/data of=/dev/vda bs=4096 seek=100 conv=notrunc,fsync 2>/dev/null");
    let sum = g.shell("dd if=/dev/vda bs=4096 skip=100 count=244 2>/dev/null | md5sum");
    // Without --no-reboot a reset boots it again.
    g.send("reboot -f\n");
    g.expect(ringfort_guest::TEST_PROMPT);
    assert_eq!(g.shell("dd if=/dev/vda bs=4096 skip=100 count=244 2>/dev/null | md5sum"), sum);
    g.send("poweroff -f\n");
    assert_eq!(g.wait().code(), Some(0));
    // What was written is in the file, and a throw-away layer leaves it alone.
    let before = std::fs::read(&disk).expect("the disk");
    assert!(before.iter().any(|&b| b != 0));
    let mut g = start(",snapshot=on");
    g.expect(ringfort_guest::TEST_PROMPT);
    g.shell("dd if=/dev/zero of=/dev/vda bs=1M count=8 conv=notrunc,fsync 2>/dev/null");
    g.send("poweroff -f\n");
    assert_eq!(g.wait().code(), Some(0));
    assert!(std::fs::read(&disk).expect("the disk") == before);
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
fn the_way_a_guest_ends_is_the_exit_status() {
    let _turn = one_at_a_time();
    let guest = test_guest();
    let end = |extra: &str| {
        let cmdline = format!("{} {extra}", guest.cmdline);
        let mut g = Guest::start(ringfort(&[
            "run",
            "--kernel",
            text(&guest.kernel),
            "--initrd",
            text(&guest.initrd),
            "--cmdline",
            &cmdline,
            "--memory",
            "256M",
            "--accel",
            "soft",
            "--no-reboot",
        ]));
        g.expect(ringfort_guest::TEST_READY);
        g
    };
    assert_eq!(end("ringfort.init=poweroff").wait().code(), Some(0));
    assert_eq!(end("ringfort.init=reboot").wait().code(), Some(3));
    let mut g = end("ringfort.init=shell");
    g.expect(ringfort_guest::TEST_PROMPT);
    g.send("\x01x");
    assert_eq!(g.wait().code(), Some(0));
    let mut g = end("ringfort.init=shell");
    g.expect(ringfort_guest::TEST_PROMPT);
    // The pvpanic driver is a module of the cloud kernel or absent; the port is there in any case.
    g.send("printf '\\001' | dd of=/dev/port bs=1 seek=1285 conv=notrunc 2>/dev/null\n");
    assert_eq!(g.wait().code(), Some(4));
}

#[test]
fn debian_boots_to_a_login() {
    let _turn = one_at_a_time();
    let guest = debian_guest();
    let mut g = Guest::start(ringfort(&[
        "run",
        "--kernel",
        text(&guest.kernel),
        "--initrd",
        text(&guest.initrd),
        "--cmdline",
        &guest.cmdline,
        "--memory",
        "1G",
        "--accel",
        "soft",
        "--disk",
        &format!("path={},snapshot=on", text(&guest.disk)),
    ]));
    g.expect("login:");
    g.send("root\n");
    g.expect("# ");
    assert_eq!(g.shell("nproc"), "1");
    assert!(g.shell("lspci").contains("Virtio"));
    assert!(g.shell("lsblk").contains("vda"));
    let guest_time: i64 = g.shell("date +%s").parse().expect("seconds");
    assert!((guest_time - host_seconds()).abs() <= 5, "the guest's clock says {guest_time}");
    g.shell("echo kept > /root/file; sync");
    g.send("reboot\n");
    g.expect("login:");
    g.send("root\n");
    g.expect("# ");
    assert_eq!(g.shell("cat /root/file"), "kept");
    assert_eq!(
        g.shell("systemctl is-system-running --wait; systemctl --failed --no-legend | wc -l"),
        "running\n0"
    );
    g.send("poweroff\n");
    assert_eq!(g.wait().code(), Some(0));
}
