//! Doorbells, interrupts by descriptor, queued stores.

use crate::programs;
use crate::support::*;
use ringfort_engine::{Doorbell, DoorbellAddress, VcpuExit};
use std::os::fd::{AsRawFd, BorrowedFd};
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
