//! Messages, the 8259's line, level-triggered interrupts, timers, start-up of processors.

use crate::programs;
use crate::support::*;
use ringfort_bus::irqchip::{PicRegisters, PitChannel};
use ringfort_engine::{MpState, VcpuExit};
use ringfort_engine_kvm::KvmOptions;
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
fn controllers_and_timer_in_the_kernel() {
    let Some(kvm) = kvm_with(KvmOptions { kernel_irqchip: true, ..KvmOptions::default() }) else { return };
    let mut g = Guest::new(&kvm, 1);
    g.gate(0x30, CODE_AT + 0x100);
    g.load_long(programs::wait_extint());
    let vm = g.vm.clone();
    let chip = vm.irqchip().expect("controllers in the kernel");
    let (mut pics, mut ioapic, mut pit) = (chip.pics().unwrap(), chip.ioapic().unwrap(), chip.pit().unwrap());
    // Vectors from 0x30 on, input 0 open, interrupts end by themselves.
    pics[0] = PicRegisters { imr: 0xfe, base: 0x30, lowest: 7, auto_eoi: true, ..PicRegisters::default() };
    pics[1] = PicRegisters { imr: 0xff, base: 0x38, lowest: 7, ..PicRegisters::default() };
    // 100 Hz.
    pit.channels[0] = PitChannel {
        count: 11932,
        mode: 2,
        access: 3,
        gate: true,
        elapsed_ns: Some(0),
        ..PitChannel::default()
    };
    (ioapic.id, ioapic.select) = (3, 0x12);
    ioapic.entries[5] = 1 << 56 | 0x1_8945;
    ioapic.entries[23] = 0x1_0077;
    chip.set(&pics, &ioapic, &pit).unwrap();
    g.run_until(|g| g.bus.outs(0x80) >= 3);
    assert!(!g.bus.take().contains(&Seen::ExtInt), "the kernel acknowledges");
    // Another line, by hand.
    let back = chip.pics().unwrap();
    assert_eq!((back[0].base, back[0].imr, back[0].auto_eoi, back[1].base), (0x30, 0xfe, true, 0x38));
    assert_eq!(chip.ioapic().unwrap(), ioapic);
    let c = chip.pit().unwrap().channels[0];
    assert_eq!((c.count, c.mode, c.access), (11932, 2, 3));
    assert!(c.elapsed_ns.is_some_and(|ns| ns < 60_000_000_000), "{c:?}");
    pics[0].imr = 0xfd;
    chip.set(&pics, &ioapic, &pit).unwrap();
    g.gate(0x31, CODE_AT + 0x100);
    g.bus.take();
    chip.set_pic(1, true);
    g.run_until(|g| g.bus.outs(0x80) == 1);
    chip.set_pic(1, false);
    // Through the I/O APIC: fixed, edge, vector 0x50, to APIC 0.
    g.gate(0x50, CODE_AT + 0x100);
    ioapic.entries[20] = 0x50;
    chip.set(&pics, &ioapic, &pit).unwrap();
    g.set(apic_on);
    chip.set_ioapic(20, true);
    g.run_until(|g| g.bus.outs(0x80) == 2);
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
