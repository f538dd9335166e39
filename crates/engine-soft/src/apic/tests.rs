//! The local APIC against the SDM, by its registers.

use super::*;
use crate::cpu::{Cpu, Trap};
use crate::testing::{BusEvent, RecordingBus};
use crate::vcpu::{Env, VcpuShared, VmShared, request};
use ringfort_engine::CpuidTable;
use ringfort_memory::RamMap;
use ringfort_x86::cpuid::Leaf;
use ringfort_x86::msr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

const PAGE: u64 = DEFAULT_BASE;

struct Vm {
    shared: Arc<VmShared>,
    bus: Arc<RecordingBus>,
    #[allow(clippy::vec_box, reason = "as the seam holds them")]
    cpus: Vec<Box<Cpu>>,
}

fn cpuid() -> CpuidTable {
    let leaf = |function, [eax, ebx, ecx, edx]: [u32; 4]| Leaf { function, index: None, eax, ebx, ecx, edx };
    CpuidTable {
        leaves: vec![
            leaf(0, [1, 0, 0, 0]),
            leaf(1, [0, 0, 1 << 21 | 1 << 24, 1 << 9]),
            leaf(0x4000_0000, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
            leaf(0x4000_0001, [crate::vcpu::paravirt_features(), 0, 0, 0]),
        ],
    }
}

fn vm(ids: &[u32]) -> Vm {
    let memory = ringfort_memory::allocate(&[(0, 1 << 20)]).unwrap();
    let (shared, bus) = (Arc::new(VmShared::new()), Arc::new(RecordingBus::default()));
    let cpus = ids
        .iter()
        .map(|&id| {
            let me = Arc::new(VcpuShared::new(id));
            shared.add_vcpu(me.clone());
            let env = Env { bus: bus.clone(), vm: shared.clone(), me };
            let mut c = Cpu::new(RamMap::new(&memory), cpuid(), env);
            c.write(reg::SVR, 0x1ff);
            c
        })
        .collect();
    Vm { shared, bus, cpus }
}

fn one() -> Vm {
    vm(&[0])
}

impl Cpu {
    fn write(&mut self, n: usize, v: u32) {
        assert!(self.apic_mmio_write(self.local.page + n as u64 * 16, &v.to_le_bytes()));
    }
    fn read(&mut self, n: usize) -> u32 {
        let mut b = [0; 4];
        assert!(self.apic_mmio_read(self.local.page + n as u64 * 16, &mut b));
        u32::from_le_bytes(b)
    }
    fn rd(&mut self, n: u32) -> Result<u64, Trap> {
        self.apic_read_msr(n).expect("an MSR of the APIC")
    }
    fn wr(&mut self, n: u32, v: u64) -> Result<(), Trap> {
        self.apic_write_msr(n, v).expect("an MSR of the APIC")
    }
    fn x2apic(&mut self) {
        let base = self.rd(msr::IA32_APIC_BASE).unwrap();
        self.wr(msr::IA32_APIC_BASE, base | BASE_EXTD).unwrap();
    }
    fn irr(&self, v: u8) -> bool {
        self.env.me.lapic.bit(reg::IRR, v)
    }
    fn takes(&mut self) -> Option<u8> {
        self.take_interrupt()
    }
    fn asked(&self) -> u32 {
        self.env.me.requests.swap(0, Ordering::SeqCst)
    }
}

mod paravirt;
mod timer;

/// (message address, data) of a fixed interrupt.
fn msi(dest: u64, vector: u32) -> (u64, u32) {
    (PAGE | dest << 12, vector)
}

impl Vm {
    fn send(&self, (address, data): (u64, u32)) -> usize {
        self.shared.deliver(&Message::from_msi(address, data).unwrap(), None)
    }
    fn pending(&self, v: u8) -> Vec<u32> {
        self.cpus.iter().filter(|c| c.irr(v)).map(|c| c.env.me.apic_id).collect()
    }
}

#[test]
fn reset_values() {
    let mut vm = vm(&[0, 3]);
    for (c, id) in vm.cpus.iter_mut().zip([0u32, 3]) {
        c.apic_reset(false);
        assert_eq!(c.read(reg::ID), id << 24);
        assert_eq!(c.read(reg::VERSION), 0x0006_0014);
        assert_eq!(c.read(reg::SVR), 0xff);
        assert_eq!(c.read(reg::DFR), u32::MAX);
        for n in lapic::LVTS {
            let virtual_wire = id == 0 && n == reg::LVT_LINT0;
            assert_eq!(c.read(n), if virtual_wire { 0x700 } else { LVT_MASKED }, "{n:#x}");
        }
        let bsp = if id == 0 { BASE_BSP } else { 0 };
        assert_eq!(c.rd(msr::IA32_APIC_BASE), Ok(PAGE | BASE_ENABLE | bsp));
    }
}

#[test]
fn accesses_beside_the_registers_do_no_harm() {
    let mut c = one().cpus.remove(0);
    let mut b = [0xffu8; 8];
    assert!(c.apic_mmio_read(PAGE + 0x34, &mut b) && b == [0; 8]);
    let mut b = [0xffu8; 1];
    assert!(c.apic_mmio_read(PAGE + 0x32, &mut b) && b == [6]);
    // Stores of other sizes and to other places are ignored.
    assert!(c.apic_mmio_write(PAGE + 0x84, &[1, 0, 0, 0]) && c.apic_mmio_write(PAGE + 0x80, &[0x55]));
    assert_eq!(c.read(reg::TPR), 0);
    let mut b = [0; 4];
    assert!(!c.apic_mmio_read(PAGE + 0x1000, &mut b) && !c.apic_mmio_read(PAGE - 4, &mut b));
    // Every offset of the page, read and written: no panic, and reserved ones are an error in ESR.
    for at in (0..0x1000).step_by(4) {
        c.apic_mmio_write(PAGE + at, &[0xff; 4]);
        c.apic_mmio_read(PAGE + at, &mut b);
    }
    c.write(reg::ESR, 0);
    assert_ne!(c.read(reg::ESR) & esr::ILLEGAL_REGISTER, 0);
    c.write(reg::ESR, 0);
    assert_eq!(c.read(reg::ESR), 0);
}

#[test]
fn priorities_decide_what_is_taken() {
    let mut vm = one();
    let c = &mut vm.cpus[0];
    for v in [0x31, 0x52, 0x35, 0x58] {
        c.env.me.accept(v, Delivery::Fixed, false);
    }
    assert_eq!(c.takes(), Some(0x58));
    assert_eq!(c.read(reg::PPR), 0x50);
    // The same class waits for the EOI; then for the next.
    assert_eq!(c.takes(), None);
    c.write(reg::EOI, 0);
    assert_eq!(c.takes(), Some(0x52));
    c.env.me.accept(0x61, Delivery::Fixed, false);
    assert_eq!(c.takes(), Some(0x61));
    assert_eq!(c.read(reg::ISR + 2), 1 << (0x52 - 0x40));
    assert_eq!(c.read(reg::ISR + 3), 1 << 1);
    // EOI ends the highest one in service.
    c.write(reg::EOI, 0);
    assert_eq!((c.read(reg::ISR + 3), c.read(reg::PPR)), (0, 0x50));
    c.write(reg::EOI, 0);
    // TPR: its class and below wait.
    c.write(reg::TPR, 0x3f);
    assert_eq!((c.takes(), c.read(reg::PPR), c.cr8()), (None, 0x3f, 3));
    c.write(reg::TPR, 0x2f);
    assert_eq!(c.takes(), Some(0x35));
    c.write(reg::EOI, 0);
    assert_eq!(c.takes(), Some(0x31));
    c.write(reg::EOI, 0);
    assert_eq!((c.takes(), c.read(reg::PPR)), (None, 0x2f));
    // An EOI with nothing in service is harmless.
    c.write(reg::EOI, 0);
    assert!(vm.bus.take().is_empty());
}

#[test]
fn level_interrupts_tell_the_io_apics_their_end() {
    let mut vm = one();
    vm.send((PAGE, 0x40 | 1 << 15 | 1 << 14));
    vm.send((PAGE, 0x41));
    let c = &mut vm.cpus[0];
    assert_eq!((c.read(reg::TMR + 2), c.read(reg::IRR + 2)), (1, 3));
    assert_eq!(c.takes(), Some(0x41));
    c.write(reg::EOI, 0);
    assert!(vm.bus.take().is_empty());
    assert_eq!(c.takes(), Some(0x40));
    c.write(reg::EOI, 0);
    assert_eq!(vm.bus.take(), [BusEvent::Eoi(0x40)]);
    // The same vector as an edge.
    vm.send((PAGE, 0x40));
    let c = &mut vm.cpus[0];
    assert_eq!((c.read(reg::TMR + 2), c.takes()), (0, Some(0x40)));
    c.write(reg::EOI, 0);
    assert!(vm.bus.take().is_empty());
}

#[test]
fn physical_destinations() {
    let mut vm = vm(&[0, 1, 5, 16]);
    assert_eq!(vm.send(msi(5, 0x30)), 1);
    assert_eq!(vm.pending(0x30), [5]);
    assert_eq!(vm.send(msi(7, 0x31)), 0);
    assert_eq!(vm.send(msi(0xff, 0x32)), 4);
    // An ID above 255 by the extended destination bits is somebody else.
    assert_eq!(vm.send((PAGE | 5 << 12 | 1 << 5, 0x33)), 0);
    assert_eq!(vm.send((PAGE | 5 << 12 | 1 << 40, 0x33)), 0);
    // A changed xAPIC ID counts, and a switch to x2APIC mode brings the initial one back.
    vm.cpus[1].write(reg::ID, 9 << 24);
    assert_eq!((vm.send(msi(1, 0x34)), vm.send(msi(9, 0x34))), (0, 1));
    vm.cpus[1].x2apic();
    assert_eq!((vm.send(msi(1, 0x35)), vm.send(msi(9, 0x35))), (1, 0));
    // Outside the interrupt range.
    assert!(Message::from_msi(0xfed0_0000, 0x30).is_none());
    assert!(Message::from_msi(0x1_0000, 0x30).is_none());
}

#[test]
fn logical_destinations_flat_and_cluster() {
    let mut vm = vm(&[0, 1, 2, 3]);
    for (n, c) in vm.cpus.iter_mut().enumerate() {
        c.write(reg::LDR, 1 << (24 + n));
    }
    let logical = |mda: u64, v: u32| (PAGE | mda << 12 | 4, v);
    vm.send(logical(0b0110, 0x30));
    assert_eq!(vm.pending(0x30), [1, 2]);
    assert_eq!(vm.send(logical(0xff, 0x31)), 4);
    assert_eq!(vm.send(logical(0x10, 0x32)), 0);
    // Cluster 1: CPUs 0 and 1; cluster 2: CPUs 2 and 3.
    for (c, ldr) in vm.cpus.iter_mut().zip([0x11u32, 0x12, 0x21, 0x22]) {
        c.write(reg::DFR, 0x0fff_ffff);
        c.write(reg::LDR, ldr << 24);
    }
    vm.send(logical(0x13, 0x40));
    assert_eq!(vm.pending(0x40), [0, 1]);
    vm.send(logical(0x22, 0x41));
    assert_eq!(vm.pending(0x41), [3]);
    assert_eq!(vm.send(logical(0x31, 0x42)), 0);
    assert_eq!(vm.send(logical(0xff, 0x43)), 4);
}

#[test]
fn x2apic_logical_destinations() {
    let mut vm = vm(&[0, 1, 16, 17, 40]);
    for c in &mut vm.cpus {
        c.x2apic();
    }
    assert_eq!(vm.cpus[3].rd(0x80d), Ok(0x1_0002));
    assert_eq!(vm.cpus[4].rd(0x80d), Ok(0x2_0100));
    // From CPU 0 to cluster 1, members 0 and 1: fixed, logical.
    vm.cpus[0].wr(0x830, 0x1_0003 << 32 | 1 << 11 | 0x50).unwrap();
    assert_eq!(vm.pending(0x50), [16, 17]);
    // 32-bit physical and broadcast; 0xff is an ID like any other.
    vm.cpus[0].wr(0x830, 40 << 32 | 0x51).unwrap();
    assert_eq!(vm.pending(0x51), [40]);
    vm.cpus[0].wr(0x830, 0xff << 32 | 0x52).unwrap();
    assert!(vm.pending(0x52).is_empty());
    vm.cpus[0].wr(0x830, 0xffff_ffff << 32 | 0x53).unwrap();
    assert_eq!(vm.pending(0x53), [0, 1, 16, 17, 40]);
    assert_eq!(vm.cpus[0].rd(0x830), Ok(0xffff_ffff << 32 | 0x53));
}

#[test]
fn lowest_priority_goes_to_the_least_busy() {
    let mut vm = vm(&[0, 1, 2]);
    for (c, tpr) in vm.cpus.iter_mut().zip([0x40, 0x20, 0x30]) {
        c.write(reg::LDR, 0xff00_0000);
        c.write(reg::TPR, tpr);
    }
    for v in 0x50..0x60 {
        assert_eq!(vm.send((PAGE | 0xff << 12 | 4 | 8, 1 << 8 | v)), 1);
        assert_eq!(vm.pending(v as u8), [1]);
    }
    // Equals take turns; one that SVR disables is left out.
    vm.cpus[0].write(reg::TPR, 0x20);
    vm.cpus[2].write(reg::TPR, 0x10);
    vm.cpus[2].write(reg::SVR, 0xff);
    for v in 0x60..0x70 {
        vm.send((PAGE | 0xff << 12 | 4 | 8, 1 << 8 | v));
    }
    let took = |n: usize| (0x60..0x70).filter(|&v| vm.cpus[n].irr(v)).count();
    assert_eq!((took(0), took(1), took(2)), (8, 8, 0));
}

#[test]
fn shorthands() {
    let mut vm = vm(&[0, 1, 2]);
    vm.cpus[1].write(reg::ICR, 1 << 18 | 0x40);
    assert_eq!(vm.pending(0x40), [1]);
    vm.cpus[1].write(reg::ICR, 2 << 18 | 0x41);
    assert_eq!(vm.pending(0x41), [0, 1, 2]);
    vm.cpus[1].write(reg::ICR, 3 << 18 | 0x42);
    assert_eq!(vm.pending(0x42), [0, 2]);
    vm.cpus[1].write(reg::ICR2, 2 << 24);
    vm.cpus[1].write(reg::ICR, 0x43);
    assert_eq!(vm.pending(0x43), [2]);
    // Delivery status reads idle.
    assert_eq!(vm.cpus[1].read(reg::ICR), 0x43);
}

#[test]
fn init_and_start_up_messages() {
    let mut vm = vm(&[0, 1]);
    vm.cpus[0].asked();
    vm.cpus[1].asked();
    vm.cpus[0].write(reg::ICR2, 1 << 24);
    vm.cpus[0].write(reg::ICR, 0x4500);
    assert_eq!(vm.cpus[1].asked(), request::INIT);
    // INIT level de-assert does nothing.
    vm.cpus[0].write(reg::ICR, 0x8500);
    assert_eq!(vm.cpus[1].asked(), 0);
    vm.cpus[0].write(reg::ICR, 0x4600 | 0x9a);
    assert_eq!(vm.cpus[1].asked(), request::SIPI);
    assert_eq!(vm.cpus[1].env.me.sipi_vector.load(Ordering::SeqCst), 0x9a);
    // INIT forgets an earlier start-up message.
    vm.cpus[0].write(reg::ICR, 0x4600 | 0x11);
    vm.cpus[0].write(reg::ICR, 0x4500);
    assert_eq!(vm.cpus[1].asked(), request::INIT);
    // NMI and INIT pass an APIC that SVR disables; SMI and reserved modes do nothing.
    vm.cpus[1].write(reg::SVR, 0xff);
    vm.cpus[0].write(reg::ICR, 0x4400);
    assert_eq!(vm.cpus[1].asked(), request::NMI);
    for mode in [2, 3, 7] {
        vm.cpus[0].write(reg::ICR, mode << 8 | 0x44);
    }
    vm.cpus[0].write(reg::ICR, 0x44);
    assert_eq!((vm.cpus[1].asked(), vm.cpus[1].env.me.lapic.pending()), (0, false));
}

#[test]
fn software_disable_masks_and_keeps() {
    let mut vm = one();
    let c = &mut vm.cpus[0];
    c.write(reg::LVT_TIMER, 0x20);
    c.env.me.accept(0x77, Delivery::Fixed, false);
    c.write(reg::SVR, 0xef);
    assert_eq!(c.read(reg::LVT_TIMER), LVT_MASKED | 0x20);
    c.write(reg::LVT_TIMER, 0x21);
    assert_eq!(c.read(reg::LVT_TIMER), LVT_MASKED | 0x21);
    // New ones are not taken in, but what waited is delivered (Intel SDM 3A section 12.4.7.2).
    c.env.me.accept(0x78, Delivery::Fixed, false);
    assert_eq!((c.irr(0x78), c.takes()), (false, Some(0x77)));
    c.write(reg::SVR, 0x1ef);
    c.write(reg::LVT_TIMER, 0x21);
    assert_eq!(c.read(reg::LVT_TIMER), 0x21);
}

#[test]
fn illegal_vectors_are_errors() {
    let mut vm = one();
    let c = &mut vm.cpus[0];
    c.write(reg::LVT_ERROR, 0xfe);
    c.write(reg::ICR, 1 << 18 | 0x0f);
    assert!(c.irr(0xfe));
    assert_eq!(c.read(reg::ESR), 0);
    c.write(reg::ESR, 0);
    assert_eq!(c.read(reg::ESR), esr::SEND_ILLEGAL_VECTOR);
    assert_eq!(c.takes(), Some(0xfe));
    c.write(reg::EOI, 0);
    vm.send(msi(0, 3));
    let c = &mut vm.cpus[0];
    c.write(reg::ESR, 0);
    assert_eq!(c.read(reg::ESR), esr::RECEIVED_ILLEGAL_VECTOR);
    assert_eq!(c.takes(), Some(0xfe));
    // An illegal error vector does not recurse.
    c.write(reg::LVT_ERROR, 2);
    c.write(reg::ICR, 1 << 18 | 1);
    c.write(reg::ESR, 0);
    assert_eq!(c.read(reg::ESR), esr::SEND_ILLEGAL_VECTOR | esr::RECEIVED_ILLEGAL_VECTOR);
}

#[test]
fn base_register_transitions() {
    let mut vm = one();
    let c = &mut vm.cpus[0];
    let on = PAGE | BASE_BSP | BASE_ENABLE;
    // Reserved bits, x2APIC without enable.
    for bad in [on | 1, on | 1 << 9, on | 1 << 63, PAGE | BASE_EXTD] {
        assert!(c.wr(msr::IA32_APIC_BASE, bad).is_err(), "{bad:#x}");
    }
    // Move the page.
    c.wr(msr::IA32_APIC_BASE, 0xfed0_0000 | BASE_ENABLE).unwrap();
    let mut b = [0; 4];
    assert!(!c.apic_mmio_read(PAGE + 0x30, &mut b) && c.apic_mmio_read(0xfed0_0030, &mut b));
    // xAPIC to x2APIC: the page is gone, the registers stay.
    c.write(reg::TPR, 0x55);
    c.wr(msr::IA32_APIC_BASE, on | BASE_EXTD).unwrap();
    assert!(!c.apic_mmio_read(PAGE + 0x30, &mut b));
    assert_eq!(c.rd(0x808), Ok(0x55));
    // Back to xAPIC only through disabled.
    assert!(c.wr(msr::IA32_APIC_BASE, on).is_err());
    c.wr(msr::IA32_APIC_BASE, PAGE | BASE_BSP).unwrap();
    assert!(!c.apic_enabled() && c.rd(0x808).is_err() && !c.apic_mmio_read(PAGE, &mut b));
    assert_eq!(vm.send(msi(0, 0x40)), 0);
    let c = &mut vm.cpus[0];
    assert!(c.wr(msr::IA32_APIC_BASE, on | BASE_EXTD).is_err());
    c.wr(msr::IA32_APIC_BASE, on).unwrap();
    // Its state is lost.
    assert_eq!((c.read(reg::TPR), c.read(reg::SVR)), (0, 0xff));
}

#[test]
fn x2apic_msrs_refuse_what_does_not_exist() {
    let mut vm = one();
    let c = &mut vm.cpus[0];
    assert!(c.rd(0x802).is_err() && c.wr(0x808, 0).is_err());
    c.x2apic();
    for n in 0..0x100u32 {
        let readable =
            matches!(n, 0x02 | 0x03 | 0x08 | 0x0a | 0x0d | 0x0f..=0x28 | 0x2f | 0x30 | 0x32..=0x39 | 0x3e);
        assert_eq!(c.rd(0x800 + n).is_ok(), readable, "read {n:#x}");
    }
    for (n, bad) in [
        (0x02, 1),
        (0x03, 1),
        (0x08, 0x100),
        (0x0a, 0),
        (0x0b, 1),
        (0x0d, 1),
        (0x0e, 0),
        (0x0f, 0x400),
        (0x0f, 1 << 32),
        (0x10, 0),
        (0x20, 0),
        (0x28, 1),
        (0x31, 0),
        (0x30, 1 << 13 | 0x71),
        (0x30, 1 << 16 | 0x71),
        (0x30, 1 << 31 | 0x71),
        (0x32, 1 << 20),
        (0x37, 0x100),
        (0x39, 0),
        (0x3e, 4),
        (0x3f, 0x100),
        (0x40, 0),
    ] {
        assert!(c.wr(0x800 + n, bad).is_err(), "write {n:#x} {bad:#x}");
    }
    for (n, good) in [(0x0b, 0), (0x28, 0), (0x08, 0x20), (0x3e, 0xb), (0x38, 0)] {
        c.wr(0x800 + n, good).unwrap();
    }
    // Self-IPI.
    c.wr(0x83f, 0x71).unwrap();
    assert_eq!(c.takes(), Some(0x71));
}

#[test]
fn init_keeps_mode_and_id() {
    let mut vm = vm(&[0, 7]);
    let c = &mut vm.cpus[1];
    c.x2apic();
    c.wr(0x808, 0x33).unwrap();
    c.apic_reset(true);
    assert_eq!((c.rd(0x802), c.rd(0x808), c.rd(0x80f)), (Ok(7), Ok(0), Ok(0xff)));
    assert_eq!(c.rd(0x80d), Ok(0x80));
    c.apic_reset(false);
    assert_eq!(c.env.me.lapic.mode(), Mode::XApic);
}

#[test]
fn extint_passes_lint0() {
    let mut vm = vm(&[0, 1]);
    for c in &mut vm.cpus {
        c.write(reg::LVT_LINT0, LVT_MASKED);
        c.asked();
    }
    vm.shared.set_extint(true);
    assert_eq!((vm.cpus[0].asked(), vm.cpus[1].asked()), (0, 0));
    // Unmasking shows the line that is already up. 0x20 is the test bus' vector.
    vm.cpus[0].write(reg::LVT_LINT0, 0x700);
    assert_eq!(vm.cpus[0].asked(), request::INTERRUPT);
    assert_eq!((vm.cpus[0].takes(), vm.cpus[1].takes()), (Some(0x20), None));
    // It takes no part in ISR and priorities.
    assert_eq!(vm.cpus[0].read(reg::PPR), 0);
    // Down again before it was taken: nothing there.
    vm.shared.set_extint(false);
    assert_eq!(vm.cpus[0].takes(), None);
    // With the APIC disabled the line goes straight to the CPU.
    vm.cpus[1].wr(msr::IA32_APIC_BASE, PAGE).unwrap();
    vm.shared.set_extint(true);
    assert_ne!(vm.cpus[1].asked() & request::INTERRUPT, 0);
    assert_eq!(vm.cpus[1].takes(), Some(0x20));
    // As NMI and as a fixed interrupt: on the edge.
    vm.shared.set_extint(false);
    vm.cpus[0].asked();
    vm.cpus[0].write(reg::LVT_LINT0, 0x400);
    vm.cpus[0].asked();
    vm.shared.set_extint(true);
    vm.shared.set_extint(true);
    assert_eq!(vm.cpus[0].asked(), request::NMI);
    vm.shared.set_extint(false);
    vm.cpus[0].write(reg::LVT_LINT0, 0x66);
    vm.shared.set_extint(true);
    assert_eq!(vm.cpus[0].takes(), Some(0x66));
}

#[test]
fn the_saved_page_is_the_whole_state() {
    let mut vm = vm(&[0, 1]);
    let c = &mut vm.cpus[0];
    c.write(reg::LVT_TIMER, 0x40);
    c.write(reg::DIVIDE, 11);
    c.write(reg::INITIAL_COUNT, 4_000_000_000);
    c.write(reg::TPR, 0x21);
    c.write(reg::LDR, 0x0400_0000);
    for v in [0x55, 0x66] {
        c.env.me.accept(v, Delivery::Fixed, v == 0x66);
    }
    assert_eq!(c.takes(), Some(0x66));
    let (page, base) = (c.save_apic(), c.rd(msr::IA32_APIC_BASE).unwrap());
    assert_eq!(page.len(), 1024);
    c.apic_reset(false);
    c.load_apic(&page, base).unwrap();
    let again = c.save_apic();
    for n in (0..reg::COUNT).filter(|&n| n != reg::CURRENT_COUNT) {
        assert_eq!(page[n * 16..n * 16 + 16], again[n * 16..n * 16 + 16], "{n:#x}");
    }
    assert!(c.read(reg::CURRENT_COUNT) > 3_000_000_000);
    c.write(reg::EOI, 0);
    assert_eq!(vm.bus.take(), [BusEvent::Eoi(0x66)]);
    assert_eq!(vm.cpus[0].takes(), Some(0x55));
    // Rubbish is refused whole, or cut to what can be.
    let c = &mut vm.cpus[1];
    assert!(c.load_apic(&page[1..], base).is_err());
    assert!(c.load_apic(&page, BASE_EXTD).is_err());
    assert_eq!(c.read(reg::TPR), 0);
    c.load_apic(&[0xff; 1024], PAGE | BASE_ENABLE).unwrap();
    assert_eq!(c.read(reg::VERSION), 0x0006_0014);
    assert_eq!(c.read(reg::IRR) & 0xffff, 0);
    c.takes();
    c.write(reg::EOI, 0);
}

#[test]
fn whatever_the_guest_does_nothing_breaks() {
    let mut rng = fastrand::Rng::with_seed(0x1a91c);
    for _ in 0..20 {
        let mut vm = vm(&[0, 1, 17]);
        let mut saved: Option<(Vec<u8>, u64)> = None;
        for _ in 0..4000 {
            let n = rng.usize(0..3);
            let value = match rng.u8(0..4) {
                0 => rng.u64(..),
                1 => rng.u64(..) >> rng.u32(0..64),
                2 => u64::MAX << rng.u32(0..64),
                _ => u64::from(rng.u8(..)) << rng.u32(0..32) & 0xffff_ffff,
            };
            let c = &mut vm.cpus[n];
            match rng.u8(0..12) {
                0..3 => {
                    c.apic_mmio_write(
                        c.local.page.wrapping_add(rng.u64(0..0x1000) & !3),
                        &value.to_le_bytes()[..4],
                    );
                }
                3 => {
                    let mut b = [0; 8];
                    let len = 1 << rng.u32(0..4);
                    c.apic_mmio_read(c.local.page.wrapping_add(rng.u64(0..0x1000)), &mut b[..len]);
                }
                4..6 => {
                    let _ = c.apic_write_msr(0x800 + rng.u32(0..0x100), value);
                }
                6 => {
                    let all = [
                        msr::IA32_APIC_BASE,
                        msr::IA32_TSC_DEADLINE,
                        msr::IA32_TSC,
                        msr::IA32_TSC_ADJUST,
                        msr::KVM_SYSTEM_TIME_NEW,
                        msr::KVM_WALL_CLOCK,
                        msr::KVM_PV_EOI_EN,
                        msr::KVM_POLL_CONTROL,
                    ];
                    let m = all[rng.usize(0..all.len())];
                    // Mostly bases that exist.
                    let v = if m == msr::IA32_APIC_BASE { value & 0xd00 | PAGE } else { value };
                    let _ = c.apic_write_msr(m, v);
                    let _ = c.apic_read_msr(m);
                    c.apic_read_msr(0x800 + rng.u32(0..0x100));
                }
                7 => {
                    c.check_timer();
                    if let Some(v) = c.takes() {
                        assert!(v >= 16);
                    }
                }
                8 => {
                    c.code_size =
                        [crate::cpu::CodeSize::Bits32, crate::cpu::CodeSize::Bits64][rng.usize(0..2)];
                    for r in [0, 1, 2, 3, 6] {
                        c.regs[r] = value.rotate_left(r as u32 * 13);
                    }
                    c.regs[0] = rng.u64(0..16);
                    c.hypercall();
                }
                9 => {
                    let base = c.env.me.lapic.base();
                    if let Some((page, base)) = &saved {
                        let mut page = page.clone();
                        page[rng.usize(0..1024)] = value as u8;
                        let _ = c.load_apic(&page, *base);
                    }
                    saved = Some((c.save_apic(), base));
                }
                10 => vm.shared.set_extint(rng.bool()),
                _ => {
                    if let Some(m) =
                        Message::from_msi(PAGE | value & 0xf_ffff | value & !0xffff_ffff, rng.u32(..))
                    {
                        vm.shared.deliver(&m, None);
                    }
                }
            }
        }
        for c in &mut vm.cpus {
            // What is in IRR and ISR are real vectors, and reset brings everything back.
            let words = (c.env.me.lapic.get(reg::IRR), c.env.me.lapic.get(reg::ISR));
            assert_eq!((words.0 & 0xffff, words.1 & 0xffff), (0, 0));
            c.apic_reset(false);
            assert_eq!((c.read(reg::SVR), c.read(reg::PPR), c.timer_wait()), (0xff, 0, None));
        }
    }
}
