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
         grep -qE '^flags.* svm.* npt' /proc/cpuinfo\n\
         ./ringfort info\n\
         {RUN} --accel kvm --cpus 1 --cmdline '{quiet}'\n\
         mount -t debugfs debug /sys/kernel/debug\n\
         (set +e; while sleep 0.3; do cat /sys/kernel/debug/kvm/hypercalls; done >/tmp/hypercalls) 2>/dev/null &\n\
         {RUN} --accel auto --cpus 2 --save /tmp/state --cmdline '{quiet}'\n\
         kill $!\n\
         echo \"hypercalls: $(sort -n /tmp/hypercalls | tail -n 1) end\"\n\
         ./ringfort state show /tmp/state >/tmp/shown\n\
         echo \"pv-eoi: $(grep -c '\"0x4b564d04\": \"0x[0-9a-f]*[13579bdf]\"' /tmp/shown) end\"\n\
         {RUN} --accel kvm,irqchip=kernel,halt-poll=0 --cpus 2 --cmdline '{quiet}'\n"
    );
    let mut g = lab(&script, &scratch);
    for (run, cpus) in ["1", "2", "2"].into_iter().enumerate() {
        let said = g.expect(TEST_READY);
        if run == 0 {
            for (name, state) in [("AMD-V", "on"), ("NPT", "on"), ("AVIC", "absent"), ("AMD-Vi", "absent")] {
                assert!(said.contains(&format!("{name:<19}{state}")), "{name}: {said}");
            }
        }
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
        // The mode of the timers on the local APICs.
        let timer = g.shell("cat /sys/devices/system/clockevents/clockevent0/current_device");
        assert_eq!(timer, "lapic-deadline");
        if run != 1 {
            g.send("poweroff -f\n");
            continue;
        }
        // What KVM offers to save exits, and that the guest uses it.
        let log = g.shell("dmesg | grep -iE 'kvm|hypervisor'");
        for sign in
            ["kvm-clock: using sched offset", "setup PV IPIs", "pv remote TLB flush", "PV spinlocks enabled"]
        {
            assert!(log.contains(sign), "no {sign:?}: {log}");
        }
        g.send("\x01s");
        let said = g.expect(" end");
        let calls = said.split("hypercalls: ").nth(1).and_then(|n| n.split(' ').next()).map(str::parse);
        assert!(matches!(calls, Some(Ok(1u64..))), "no interrupts were sent by hypercall: {said}");
        let said = g.expect("pv-eoi: 2 end");
        println!("{calls:?} {said}");
    }
    g.expect(&format!("{LAB}exit 0"));
    assert_eq!(g.wait().code(), Some(0));
}

#[test]
fn the_hosts_kernel_moves_a_guests_frames() {
    let _turn = one_at_a_time();
    let scratch = Scratch::new("vhost-lab");
    // The tap is made by the run, and its address by this loop; what serves a tap's queues in the kernel is a thread of that name.
    let host = |seen: &str| {
        format!(
            "(set +e; until ip addr add 10.9.0.1/24 dev rftap0; do sleep 0.2; done; \
             until ps | grep '[v]host-' >{seen}; do sleep 0.2; done) >/dev/null 2>&1 &\n"
        )
    };
    let script = format!(
        "set -e\n\
         head -c 4000000 /dev/urandom >/tmp/blob\n\
         httpd -p 8080 -h /tmp\n\
         {}\
         {RUN} --accel kvm --net tap,vhost=on --save /tmp/state --cmdline 'console=ttyS0 panic=-1 quiet'\n\
         {}\
         ./ringfort restore /tmp/state --accel kvm --stats /tmp/stats\n\
         md5sum </tmp/blob\n\
         cat /tmp/first /tmp/second /tmp/stats\n",
        host("/tmp/first"),
        host("/tmp/second"),
    );
    let mut g = lab(&script, &scratch);
    let said = g.expect(TEST_PROMPT);
    assert!(!said.contains("no vhost-net"), "{said}");
    let reach = "until ping -c 1 -W 1 10.9.0.1 >/dev/null; do :; done";
    g.shell(&format!("ip addr add 10.9.0.2/24 dev eth0; ip link set eth0 up; {reach}"));
    let sum = g.shell("wget -q -O - http://10.9.0.1:8080/blob | md5sum | cut -c-32");
    // Without the cable nothing passes; with it the queues go on where they were.
    g.send("\x01l");
    g.shell("until grep -q 0 /sys/class/net/eth0/carrier; do sleep 0.1; done");
    g.shell("if ping -c 1 -W 1 10.9.0.1 >/dev/null; then false; fi");
    g.send("\x01l");
    g.shell(reach);
    // Saved and gone on with, on a new tap: the queues go on where the kernel left them.
    g.shell("(while :; do sleep 1; echo alive; done) & echo $! >/tmp/pid");
    g.send("\x01s");
    let said = g.expect("network: tap ");
    assert!(!said.contains("no vhost-net"), "{said}");
    g.expect("alive");
    g.shell("kill $(cat /tmp/pid)");
    g.shell(reach);
    assert_eq!(g.shell("wget -q -O - http://10.9.0.1:8080/blob | md5sum | cut -c-32"), sum);
    g.send("poweroff -f\n");
    let rest = g.expect(&format!("{LAB}exit 0"));
    assert!(rest.contains(&sum), "the sum on the host's side: {rest}");
    assert!(
        rest.matches("vhost-").count() >= 2,
        "a thread of the kernel's serves the queues each time: {rest}"
    );
    let counter = |name: &str| {
        let at = rest.find(&format!("\"{name}\": ")).unwrap_or_else(|| panic!("no {name}: {rest}"));
        rest[at..].split([' ', ',', '\r', '\n']).nth(1).and_then(|n| n.parse::<u64>().ok()).expect("a number")
    };
    assert_eq!(counter("net0_queue0_rx_frames"), 0, "frames went through this process");
    assert!(counter("net0_tap_rx_bytes") > 4_000_000);
    g.wait();
}
