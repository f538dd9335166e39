//! Messages, the 8259's line, level-triggered interrupts, timers, start-up of processors.

use crate::programs;
use crate::support::*;
use ringfort_engine::{MpState, VcpuExit};
use ringfort_memory::{Bytes, GuestAddress};

const VECTOR: u8 = 0x50;

fn waiting(engine: &dyn ringfort_engine::Hypervisor) -> Guest {
    let mut g = Guest::new(engine, 1);
    g.gate(VECTOR, CODE_AT + 0x100);
    g.load_long(programs::wait());
    g.set(apic_on);
    g
}

#[test]
fn messages_interrupt() {
    let Some(kvm) = kvm() else { return };
    let mut g = waiting(&kvm);
    for n in 1..=3 {
        g.vm.send_msi(0xfee0_0000, VECTOR.into());
        g.run_until(|g| g.bus.outs(0x80) == n);
    }
    // To nobody: lost.
    g.vm.send_msi(0xfee0_7000, VECTOR.into());
    assert!(!g.bus.take().iter().any(|s| matches!(s, Seen::Eoi(_))), "edges end without a report");
}

#[test]
fn ends_of_level_triggered_interrupts_are_reported() {
    let Some(kvm) = kvm() else { return };
    let mut g = waiting(&kvm);
    let level = u32::from(VECTOR) | 0xc000;
    g.vm.ioapic_route(20, 0xfee0_0000, level, false);
    g.vm.send_msi(0xfee0_0000, level);
    g.run_until(|g| g.bus.seen.lock().unwrap().contains(&Seen::Eoi(VECTOR)));
    // A masked pin keeps its route until another takes its place.
    g.bus.take();
    g.vm.ioapic_route(20, 0xfee0_0000, level, true);
    g.vm.send_msi(0xfee0_0000, level);
    g.run_until(|g| g.bus.seen.lock().unwrap().contains(&Seen::Eoi(VECTOR)));
}

#[test]
fn the_8259_interrupts_through_lint0() {
    let Some(kvm) = kvm() else { return };
    let mut g = Guest::new(&kvm, 1);
    g.gate(0x31, CODE_AT + 0x100);
    g.load_long(programs::wait_extint());
    let vm = g.vm.clone();
    // The line falls in the acknowledge cycle, as the 8259's does; here with the handler's first access.
    let lower = vm.clone();
    g.bus.on_out.set(Box::new(move |_, _| lower.set_extint(false))).unwrap_or_else(|_| panic!("once"));
    // While it waits in HLT, and before it runs.
    vm.set_extint(true);
    g.run_until(|g| g.bus.outs(0x80) >= 1);
    let raise = vm.clone();
    let before = g.bus.outs(0x80);
    let later = std::thread::spawn(move || raise.set_extint(true));
    g.run_until(|g| g.bus.outs(0x80) > before);
    later.join().unwrap();
    assert!(g.bus.take().contains(&Seen::ExtInt));
}

#[test]
fn an_nmi_is_delivered() {
    let Some(kvm) = kvm() else { return };
    let mut g = Guest::new(&kvm, 1);
    g.gate(2, CODE_AT + 0x100);
    g.load_long(programs::wait());
    g.vm.inject_nmi(0);
    g.run_until(|g| g.bus.outs(0x80) == 1);
}

#[test]
fn tsc_deadlines_come() {
    let Some(kvm) = kvm() else { return };
    let mut g = Guest::new(&kvm, 1);
    g.gate(0x40, CODE_AT + 0x100);
    g.load_long(programs::deadlines());
    assert_eq!(g.run(), VcpuExit::Kicked);
    assert_eq!(g.bus.outs(0x80), 10);
}

#[test]
fn a_second_processor_is_started() {
    let Some(kvm) = kvm() else { return };
    let mut g = Guest::new(&kvm, 2);
    g.load_long(programs::start_other());
    g.write(0x8000, programs::other());
    let memory = g.memory.clone();
    let told = move |port: u16, data: &[u8]| {
        if port == 0x88 {
            assert_eq!(data, 0x800u16.to_le_bytes());
            memory.write_obj(0x600du32, GuestAddress(DATA_AT)).expect("in memory");
        }
    };
    g.bus.on_out.set(Box::new(told)).unwrap_or_else(|_| panic!("once"));
    assert_eq!(g.vcpus[1].state().unwrap().mp_state, MpState::WaitForSipi);
    let mut other = g.vcpus.pop().expect("two");
    let kicker = other.kicker();
    let thread = std::thread::spawn(move || {
        let exit = run(other.as_mut());
        (exit, other)
    });
    assert_eq!(g.run(), VcpuExit::Kicked);
    kicker.kick();
    let (exit, mut other) = thread.join().unwrap();
    assert_eq!(exit, VcpuExit::Kicked);
    let s = other.state().unwrap();
    assert_eq!((s.segments[1].selector, s.segments[1].base), (0x800, 0x8000));
}
