//! `--accel kvm` with real guests: in a lab where an emulated AMD CPU has hardware virtualization, and what is said where KVM cannot be
//! had.

mod support;

use ringfort_guest::{LAB, LabRun, TEST_PROMPT, TEST_READY};
use support::*;

/// A lab that runs `script`, with `ringfort` and the test guest's `vmlinuz` and `initrd` in it.
fn lab(script: &str, scratch: &Scratch) -> Guest {
    let cache = ringfort_guest::cache_dir().expect("a cache folder");
    let lab = ringfort_guest::ensure_lab(&cache, &mut ()).expect("the lab");
    let guest = test_guest();
    let files = [
        ("ringfort", std::path::Path::new(env!("CARGO_BIN_EXE_ringfort"))),
        ("vmlinuz", &guest.kernel),
        ("initrd", &guest.initrd),
    ];
    let run = LabRun { script, files: &files, cpus: 1, memory: 1024 };
    let mut g = Guest::start(lab.command(&run, &scratch.0).expect("the lab's command"));
    g.expect(&format!("{LAB}ready"));
    g
}

const RUN: &str = "./ringfort run --kernel vmlinuz --initrd initrd --memory 128M";

#[test]
fn debian_boots_under_kvm_with_one_and_two_vcpus_and_either_irqchip() {
    let _turn = one_at_a_time();
    let scratch = Scratch::new("kvm-lab");
    let quiet = "console=ttyS0 panic=-1 quiet";
    let script = format!(
        "set -e\n\
         {RUN} --accel kvm --cpus 1 --cmdline '{quiet}'\n\
         {RUN} --accel auto --cpus 2 --cmdline '{quiet}'\n\
         {RUN} --accel kvm,irqchip=kernel,halt-poll=0 --cpus 2 --cmdline '{quiet}'\n"
    );
    let mut g = lab(&script, &scratch);
    for (run, cpus) in ["1", "2", "2"].into_iter().enumerate() {
        let said = g.expect(TEST_READY);
        if run == 1 {
            assert!(said.contains("engine: kvm (/dev/kvm runs guests at "), "{said}");
        }
        g.expect(TEST_PROMPT);
        assert_eq!(g.shell("grep -c ^processor /proc/cpuinfo"), cpus);
        // Every vCPU runs what is given to it, and gets its timer's interrupts.
        for n in 0..cpus.parse().expect("a number") {
            assert_eq!(g.shell(&format!("taskset -c {n} cut -d' ' -f39 /proc/self/stat")), n.to_string());
            g.shell(&format!("taskset -c {n} sleep 0.1"));
        }
        assert!(g.shell("dmesg | grep -i hypervisor").contains("KVM"));
        assert_eq!(
            g.shell("cat /sys/devices/system/clocksource/clocksource0/current_clocksource"),
            "kvm-clock"
        );
        // The disk controller's and serial port's interrupts come, by message and by line.
        let interrupts = g.shell("cat /proc/interrupts");
        assert!(interrupts.contains("ttyS0") && interrupts.contains("virtio"), "{interrupts}");
        g.shell("head -c 1000000 /dev/urandom | sha256sum");
        g.send("poweroff -f\n");
    }
    g.expect(&format!("{LAB}exit 0"));
    assert_eq!(g.wait().code(), Some(0));
}
