//! A guest that moves between this engine and the software engine goes on where it was.

use crate::programs;
use crate::support::*;
use ringfort_engine::{Hypervisor, VcpuExit};
use ringfort_engine_soft::vcpu::{Tier, open};

#[test]
fn ten_moves_there_and_back() {
    let Some(kvm) = kvm() else { return };
    let soft = open(Tier::Translate).expect("the software engine");
    let memory = new_memory();
    // One description of the CPU for both, with only what both have.
    let cpus = cpus(&kvm, 1);
    let make = |engine: &dyn Hypervisor| Guest::over(engine, 1, memory.clone(), &cpus);
    let (mut on_kvm, mut on_soft) = (make(&kvm), make(&soft));
    on_soft.vm.set_time_running(false);
    on_kvm.load_long(programs::count());
    let (mut last_tsc, mut last_clock) = (0, 0);
    for round in 0..10 {
        let (from, to) =
            if round % 2 == 0 { (&mut on_kvm, &mut on_soft) } else { (&mut on_soft, &mut on_kvm) };
        let counted = from.read(DATA_AT);
        from.vm.set_time_running(true);
        from.run_until(|g| g.read(DATA_AT) > counted + 5000);
        from.vm.set_time_running(false);
        let state = from.vcpus[0].state().expect("its state");
        let clock = from.vm.paravirt_clock();
        let tsc = state.msrs.iter().find(|m| m.0 == ringfort_x86::msr::IA32_TSC).expect("the TSC").1;
        assert!(tsc > last_tsc && clock > last_clock, "{round}: {last_tsc} {tsc} {last_clock} {clock}");
        (last_tsc, last_clock) = (tsc, clock);
        to.vm.set_time_running(false);
        to.vcpus[0].set_state(&state).unwrap_or_else(|e| panic!("{round}: {e}"));
        to.vm.set_paravirt_clock(clock);
        let back = to.vcpus[0].state().expect("its state");
        assert_eq!((back.gpr, back.rip, back.rflags), (state.gpr, state.rip, state.rflags));
        // The version register is each engine's own.
        let apic = |s: &ringfort_engine::CpuState| [&s.apic[..0x30], &s.apic[0x34..]].concat();
        assert!(apic(&back) == apic(&state), "the local APIC");
        assert_eq!(to.vm.paravirt_clock(), clock);
    }
    // To the end, on the last engine: an even number of moves leads back to KVM.
    on_kvm.vm.set_time_running(true);
    on_kvm.write(DATA_AT + 0x18, &1u64.to_le_bytes());
    assert_eq!(on_kvm.run(), VcpuExit::Kicked);
    assert!(on_kvm.read(DATA_AT) > 50_000);
    assert_eq!(on_kvm.read(DATA_AT + 0x10), 0, "the guest's time never went back");
}
