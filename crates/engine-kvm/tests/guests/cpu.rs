//! Modes, accesses, MSRs, debugging, state.

use crate::support::*;
use crate::{programs, support};
use ringfort_engine::{CpuEvents, DebugRequest, DebugStop, MpState, VcpuExit, Watch, WatchKind};
use ringfort_x86::msr::*;

#[test]
fn real_mode_ports_and_strings() {
    let Some(kvm) = kvm() else { return };
    let mut g = Guest::new(&kvm, 1);
    g.write(0x3000, b"hello");
    g.load(programs::ports(), 0x1000, real);
    assert_eq!(g.run(), VcpuExit::Kicked);
    let out = |d: &[u8]| Seen::Out(0x80, d.to_vec());
    let mut want = vec![Seen::In(0x80, 1), out(&[1]), out(&[0x34, 0x12]), out(&[0x78, 0x56, 0x34, 0x12])];
    want.extend(b"hello".iter().map(|&b| out(&[b])));
    want.extend([out(b"he"), out(b"ll")]);
    want.extend([Seen::In(0x80, 1), Seen::In(0x80, 1), Seen::In(0x80, 1)]);
    assert_eq!(g.bus.take(), want);
    assert_eq!(g.read(0x4000) & 0xff_ffff, 0x03_02_01);
}

#[test]
fn accesses_where_no_ram_is() {
    let Some(kvm) = kvm() else { return };
    let mut g = Guest::new(&kvm, 1);
    g.load(programs::mmio(), CODE_AT, protected);
    assert_eq!(g.run(), VcpuExit::Kicked);
    let base = 0xd000_0000;
    let want = [
        Seen::Load(base, 4),
        Seen::Store(base + 4, vec![1, 0, 0, 0]),
        Seen::Store(base + 9, vec![0x5a]),
        Seen::Store(base + 10, vec![0x22, 0x11]),
    ];
    assert_eq!(g.bus.take(), want);
}

#[test]
fn a_guest_enters_64_bit_mode_by_itself() {
    let Some(kvm) = kvm() else { return };
    let mut g = Guest::new(&kvm, 1);
    g.load(programs::to_long(), CODE_AT, protected);
    assert_eq!(g.run(), VcpuExit::Kicked);
    assert_eq!(g.bus.take(), [Seen::Out(0x80, 0x1122_3344u32.to_le_bytes().to_vec())]);
    let s = g.vcpus[0].state().unwrap();
    assert_eq!((s.efer & 0x500, s.gpr[0]), (0x500, 0x1122_3344));
    assert!(s.segments[1].attrs & 1 << 13 != 0, "64-bit code");
}

#[test]
fn a_triple_fault_is_a_shutdown() {
    let Some(kvm) = kvm() else { return };
    let mut g = Guest::new(&kvm, 1);
    g.load_long(programs::fault());
    g.set(|s| s.idtr.limit = 0);
    assert_eq!(g.run(), VcpuExit::Shutdown);
    // After a reset it runs again.
    g.vcpus[0].reset().unwrap();
    let s = g.vcpus[0].state().unwrap();
    assert_eq!((s.rip, s.segments[1].base, s.mp_state), (0xfff0, 0xffff_0000, MpState::Runnable));
    g.load(programs::ports(), 0x1000, real);
    assert_eq!(g.run(), VcpuExit::Kicked);
}

#[test]
fn kicks_end_this_run_or_the_next() {
    let Some(kvm) = kvm() else { return };
    let mut g = Guest::new(&kvm, 1);
    g.load_long(programs::count());
    let kicker = g.vcpus[0].kicker();
    kicker.kick();
    assert_eq!(g.run(), VcpuExit::Kicked);
    assert_eq!(g.read(DATA_AT), 0, "a kick before the run lets nothing run");
    g.run_until(|g| g.read(DATA_AT) > 1000);
    let counted = g.read(DATA_AT);
    assert_eq!(g.vcpus[0].state().unwrap().gpr[3], DATA_AT);
    g.run_until(|g| g.read(DATA_AT) > counted + 1000);
    // Handles may outlive the vCPU.
    drop(g);
    kicker.kick();
}

#[test]
fn unknown_and_filtered_msrs() {
    let Some(kvm) = kvm() else { return };
    let mut g = Guest::new(&kvm, 1);
    g.gate(13, CODE_AT + 0x100);
    // TSC_AUX-like nonsense, a performance counter, VMX capabilities, two that systems probe, one that exists.
    let list = [0x1234_5678u32, 0xc1, 0x480, 0xc001_001f, IA32_PLATFORM_ID, IA32_SYSENTER_CS, 0];
    g.load_long(programs::rdmsrs());
    g.set(|s| {
        for m in s.msrs.iter_mut().filter(|m| m.0 == IA32_SYSENTER_CS) {
            m.1 = 0x77;
        }
    });
    for (n, m) in (0..).zip(list) {
        g.write(DATA_AT + n * 4, &m.to_le_bytes());
    }
    assert_eq!(g.run(), VcpuExit::Kicked);
    let got: Vec<u64> = (0..6).map(|n| g.read(DATA_AT + 0x800 + n * 8)).collect();
    let gp = u64::MAX;
    assert_eq!(got, [gp, gp, gp, 0, 0, 0x77], "{got:x?}");
}

#[test]
fn a_whole_state_comes_back_as_it_was_set() {
    let Some(kvm) = kvm() else { return };
    let mut g = Guest::new(&kvm, 2);
    g.vm.set_time_running(false);
    for n in 0..2 {
        let moves = moves_tsc(g.vcpus[n].as_mut());
        let mut s = g.vcpus[n].state().unwrap();
        support::long(&mut s);
        s.gpr = std::array::from_fn(|r| 0x0123_4567_89ab_0000 + r as u64);
        s.rip = 0x12_3456;
        s.rflags = 0x246;
        s.cr2 = 0xdead_b000;
        s.cr8 = 5;
        // Task and processor priority.
        (s.apic[0x80], s.apic[0xa0]) = (0x50, 0x50);
        support::apic_on(&mut s);
        s.segments[4].base = 0x7fff_1234_5000;
        s.segments[5].base = 0x7fff_1234_6000;
        s.dr = [0x1000, 0x2000, 0x3000, 0x4000];
        s.dr7 = 0x455;
        s.events =
            CpuEvents { interrupt: Some(0x55), nmi_pending: true, nmi_blocked: true, ..CpuEvents::default() };
        s.mp_state = if n == 0 { MpState::Runnable } else { MpState::Halted };
        for (msr, v) in [
            (STAR, 0x23_0010_0000_0000),
            (LSTAR, 0xffff_8000_0000_1000),
            (KERNEL_GS_BASE, 0xffff_8000_0000_2000),
            (IA32_SYSENTER_EIP, 0x8000_3000),
            (IA32_TSC, 0x77_0000_0000),
            (IA32_TSC_ADJUST, 0x1234),
        ]
        .into_iter()
        .filter(|m| moves || m.0 != IA32_TSC)
        {
            s.msrs.iter_mut().find(|m| m.0 == msr).unwrap_or_else(|| panic!("MSR {msr:#x}")).1 = v;
        }
        // XMM3.
        s.xsave[160 + 48..160 + 64].fill(0xc3);
        s.xsave[512] |= 3;
        g.vcpus[n].set_state(&s).unwrap();
        let back = g.vcpus[n].state().unwrap();
        for (a, b) in s.msrs.iter().zip(&back.msrs) {
            assert_eq!(a, b, "MSR {:#x}", a.0);
        }
        assert_eq!(back.apic, s.apic);
        assert_eq!(back.xsave, s.xsave);
        assert_eq!(back, s);
    }
}

#[test]
fn an_impossible_state_is_refused_and_leaves_the_old_one() {
    let Some(kvm) = kvm() else { return };
    let mut g = Guest::new(&kvm, 1);
    g.vm.set_time_running(false);
    let good = g.vcpus[0].state().unwrap();
    type Spoil = fn(&mut ringfort_engine::CpuState);
    let spoils: [(Spoil, &str); 5] = [
        (|s| s.cr0 = 0x8000_0000, "registers"),
        (|s| s.cr4 = 1 << 40, "registers"),
        (|s| s.xsave.truncate(100), "XSAVE area of 100 bytes"),
        (|s| s.apic.truncate(7), "local APIC of 7 bytes"),
        (|s| s.msrs.push((0xdead, 5)), "MSR 0xdead"),
    ];
    for (spoil, says) in spoils {
        let mut bad = good.clone();
        bad.rip = 0x4444;
        spoil(&mut bad);
        let e = g.vcpus[0].set_state(&bad).expect_err(says).to_string();
        assert!(e.contains(says), "{e}");
        assert_eq!(g.vcpus[0].state().unwrap(), good, "{says}");
    }
}

#[test]
fn time_stands_still_while_it_is_stopped() {
    let Some(kvm) = kvm() else { return };
    let mut g = Guest::new(&kvm, 2);
    let tsc = |g: &mut Guest, n: usize| {
        g.vcpus[n].state().unwrap().msrs.iter().find(|m| m.0 == IA32_TSC).expect("the TSC").1
    };
    g.load_long(programs::count());
    g.run_until(|g| g.read(DATA_AT) > 1000);
    g.vm.set_time_running(false);
    let (stood, clock) = (tsc(&mut g, 0), g.vm.paravirt_clock());
    assert!(stood > g.read(DATA_AT + 8), "later than what the guest has read");
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!((tsc(&mut g, 0), tsc(&mut g, 1), g.vm.paravirt_clock()), (stood, stood, clock));
    g.vm.set_time_running(true);
    let counted = g.read(DATA_AT);
    g.run_until(|g| g.read(DATA_AT) > counted);
    // The guest has seen time go on, by far less than the pause.
    let pause = 300 * u64::from(ringfort_engine::Hypervisor::capabilities(&kvm).tsc_khz);
    let first = g.read(DATA_AT + 8);
    assert!(first > stood && first - stood < pause * 20, "{stood} {first}");
    assert_eq!(g.read(DATA_AT + 0x10), 0, "it never went back");
    assert!(g.vm.paravirt_clock() > clock);
    // Set, it goes on from there.
    g.vm.set_time_running(false);
    g.vm.set_paravirt_clock(5_000_000_000);
    g.vm.set_time_running(true);
    let now = g.vm.paravirt_clock();
    assert!((5_000_000_000..35_000_000_000).contains(&now), "{now}");
}

#[test]
fn steps_and_breakpoints() {
    let Some(kvm) = kvm() else { return };
    let mut g = Guest::new(&kvm, 1);
    g.load_long(programs::steps());
    let debug = |g: &mut Guest, r: &DebugRequest| {
        g.vcpus[0].debugger().expect("debugging").set_debug(r).expect("a request");
    };
    debug(&mut g, &DebugRequest { step: true, ..DebugRequest::default() });
    for n in 1..=3 {
        assert_eq!(g.run(), VcpuExit::Debug(DebugStop::Step));
        assert_eq!(g.vcpus[0].state().unwrap().rip, CODE_AT + n);
    }
    assert_eq!(g.vcpus[0].debugger().unwrap().translate(CODE_AT).unwrap(), Some(CODE_AT));
    // QEMU 7.2, which the lab is, does not report breakpoints of its guest's debug registers.
    if !in_lab() {
        let watch = |kind, address, len| Watch { kind, address, len };
        debug(
            &mut g,
            &DebugRequest {
                watches: vec![watch(WatchKind::Execute, CODE_AT + 4, 1)],
                ..DebugRequest::default()
            },
        );
        assert_eq!(g.run(), VcpuExit::Debug(DebugStop::Watch(0)));
        assert_eq!(g.vcpus[0].state().unwrap().rip, CODE_AT + 4);
    }
    debug(&mut g, &DebugRequest::default());
    assert_eq!(g.run(), VcpuExit::Kicked);
    assert_eq!(g.read(DATA_AT + 0x40) & 0xff, 9);
}
