//! Doorbells, interrupts by descriptor, queued stores.

use crate::programs;
use crate::support::*;
use ringfort_engine::{Doorbell, DoorbellAddress, MpState, VcpuExit};
use ringfort_engine_kvm::KvmOptions;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex};
use vmm_sys_util::eventfd::EventFd;

fn borrowed(fd: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open while `fd` is borrowed.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}

fn event() -> EventFd {
    EventFd::new(libc::EFD_NONBLOCK).expect("an eventfd")
}

fn rung(fd: &EventFd) -> u64 {
    fd.read().unwrap_or(0)
}

#[test]
fn doorbells_count_and_pass_the_bus_by() {
    let Some(kvm) = kvm() else { return };
    let mut g = Guest::new(&kvm, 1);
    let vm = g.vm.clone();
    let fds = vm.eventfds().expect("event descriptors");
    let (seven, any) = (event(), event());
    let by_value = Doorbell { address: DoorbellAddress::Port(0x700), len: 4, value: Some(7) };
    let by_address = Doorbell { address: DoorbellAddress::Mmio(0xd000_0000), len: 0, value: None };
    fds.add_doorbell(&by_value, borrowed(&seven)).unwrap();
    fds.add_doorbell(&by_address, borrowed(&any)).unwrap();
    assert!(fds.add_doorbell(&by_value, borrowed(&any)).is_err(), "taken");
    let wrong = Doorbell { len: 3, ..by_value };
    assert!(fds.add_doorbell(&wrong, borrowed(&any)).is_err());
    g.load_long(programs::doorbells());
    assert_eq!(g.run(), VcpuExit::Kicked);
    assert_eq!((rung(&seven), rung(&any)), (1, 2));
    assert_eq!(g.bus.take(), [Seen::Out(0x700, vec![8, 0, 0, 0]), Seen::Out(0x704, vec![8])]);
    fds.remove_doorbell(&by_value, borrowed(&seven)).unwrap();
    fds.remove_doorbell(&by_address, borrowed(&any)).unwrap();
    g.set(|s| s.rip = CODE_AT);
    assert_eq!(g.run(), VcpuExit::Kicked);
    assert_eq!((rung(&seven), rung(&any)), (0, 0));
    assert_eq!(g.bus.take().len(), 5);
}

#[test]
fn a_descriptor_interrupts_while_it_has_a_message() {
    let Some(kvm) = kvm() else { return };
    let mut g = Guest::new(&kvm, 1);
    g.gate(0x50, CODE_AT + 0x100);
    g.load_long(programs::wait());
    g.set(apic_on);
    let vm = g.vm.clone();
    let fds = vm.eventfds().expect("event descriptors");
    let fd = event();
    let interrupt = fds.add_interrupt(borrowed(&fd)).unwrap();
    // Held back until there is a message.
    fd.write(1).unwrap();
    fds.set_message(interrupt, Some((0xfee0_0000, 0x50))).unwrap();
    g.run_until(|g| g.bus.outs(0x80) == 1);
    fd.write(1).unwrap();
    g.run_until(|g| g.bus.outs(0x80) == 2);
    fds.set_message(interrupt, None).unwrap();
    fd.write(1).unwrap();
    assert_eq!(rung(&fd), 1, "nobody takes it");
    fds.remove_interrupt(interrupt).unwrap();
    assert!(fds.set_message(interrupt, None).is_err(), "gone");
}

#[test]
fn interrupts_that_settle_are_neither_lost_nor_doubled() {
    for options in [KvmOptions::default(), KvmOptions { kernel_irqchip: true, ..KvmOptions::default() }] {
        let Some(kvm) = kvm_with(options) else { return };
        let mut g = Guest::new(&kvm, 1);
        [0x50, 0x51].into_iter().for_each(|v| g.gate(v, CODE_AT + 0x100));
        g.load_long(programs::wait());
        g.set(apic_on);
        let vm = g.vm.clone();
        let fds = vm.eventfds().expect("event descriptors");
        let (fd, other) = (event(), event());
        let interrupt = fds.add_interrupt(borrowed(&fd)).unwrap();
        let idle = fds.add_interrupt(borrowed(&other)).unwrap();
        let mut told = 0;
        for round in 0..20 {
            // A message for every CPU may go by way of a work item of the host's.
            let address = if round % 2 == 0 { 0xfee0_0000 } else { 0xfeef_f000 };
            fds.set_message(interrupt, Some((address, 0x50 + round % 4 / 2))).unwrap();
            fd.write(1).unwrap();
            fds.settle().unwrap();
            assert!(requested(&mut g, 0x50 + round % 4 / 2), "round {round}");
            told += 1;
            g.run_until(|g| g.bus.outs(0x80) == told);
        }
        other.write(1).unwrap();
        fds.settle().unwrap();
        assert_eq!(rung(&other), 1, "without a message it is held back");
        assert_eq!(g.bus.outs(0x80), told);
        fds.remove_interrupt(idle).unwrap();
    }
}

/// Whether the first vCPU's local APIC has a vector in its request register (Intel SDM 3A section 11.8.4).
fn requested(g: &mut Guest, vector: u32) -> bool {
    let apic = g.vcpus[0].state().expect("its state").apic;
    apic[0x200 + vector as usize / 32 * 16 + vector as usize % 32 / 8] >> (vector % 8) & 1 != 0
}

#[test]
fn unwanted_descriptors_are_refused() {
    let off = KvmOptions { ioeventfd: false, irqfd: false, coalesce: false, ..KvmOptions::default() };
    let Some(kvm) = kvm_with(off) else { return };
    let g = Guest::new(&kvm, 1);
    let fds = g.vm.eventfds().expect("event descriptors");
    let bell = Doorbell { address: DoorbellAddress::Mmio(0xd000_0000), len: 0, value: None };
    assert!(fds.add_doorbell(&bell, borrowed(&event())).is_err());
    assert!(fds.add_interrupt(borrowed(&event())).is_err());
    assert!(fds.coalesce(bell.address, 4).is_err() && fds.coalesce(DoorbellAddress::Port(0x70), 1).is_err());
}

#[test]
fn queued_stores_of_two_cpus_come_before_their_next_exits() {
    let Some(kvm) = kvm() else { return };
    let mut g = Guest::new(&kvm, 2);
    g.vm.eventfds().expect("event descriptors").coalesce(DoorbellAddress::Mmio(0xd000_0000), 16).unwrap();
    g.load_long(programs::store_and_tell());
    for (n, vcpu) in (0..).zip(&mut g.vcpus) {
        let mut s = vcpu.state().expect("its state");
        long(&mut s);
        (s.rip, s.gpr[2], s.gpr[6], s.mp_state) = (CODE_AT, 0x80 + n, n, MpState::Runnable);
        vcpu.set_state(&s).expect("a new state");
    }
    let bus = g.bus.clone();
    let late = Arc::new(Mutex::new(Vec::new()));
    let found = late.clone();
    let check = move |port: u16, _: &[u8]| {
        let seen = bus.seen.lock().expect("not poisoned");
        let mine = vec![port as u8 - 0x80, 0, 0, 0];
        let stores = seen.iter().filter(|s| matches!(s, Seen::Store(_, v) if *v == mine)).count();
        let outs = seen.iter().filter(|s| matches!(s, Seen::Out(p, _) if *p == port)).count();
        if stores != outs + 1 {
            found.lock().expect("not poisoned").push((port, stores, outs));
        }
    };
    g.bus.on_out.set(Box::new(check)).unwrap_or_else(|_| panic!("once"));
    let mut other = g.vcpus.pop().expect("two");
    let kicker = other.kicker();
    let thread = std::thread::spawn(move || run(other.as_mut()));
    g.run_until(|g| g.bus.outs(0x80) == 200 && g.bus.outs(0x81) == 200);
    kicker.kick();
    assert_eq!(thread.join().expect("the vCPU's thread"), VcpuExit::Kicked);
    assert_eq!(*late.lock().expect("not poisoned"), [], "port, own stores, own OUTs before");
}

#[test]
fn queued_stores_come_before_the_next_exit() {
    let Some(kvm) = kvm() else { return };
    let mut g = Guest::new(&kvm, 1);
    let vm = g.vm.clone();
    vm.eventfds().expect("event descriptors").coalesce(DoorbellAddress::Mmio(0xd000_0000), 16).unwrap();
    g.load_long(programs::doorbells());
    assert_eq!(g.run(), VcpuExit::Kicked);
    let seen = g.bus.take();
    let stores: Vec<&Seen> = seen.iter().filter(|s| matches!(s, Seen::Store(..))).collect();
    assert_eq!(stores, [&Seen::Store(0xd000_0000, vec![1, 0]), &Seen::Store(0xd000_0000, vec![2, 0, 0, 0])]);
    let queued = vm.statistics().into_iter().find(|s| s.0 == "coalesced-stores").expect("a counter").1;
    assert_eq!(queued, 2);
}
