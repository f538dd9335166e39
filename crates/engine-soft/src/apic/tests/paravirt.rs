//! KVM's interface.

use super::*;
use crate::cpu::Activity;
use ringfort_engine::MpState;

#[test]
fn pv_eoi_ends_an_interrupt_without_a_write() {
    let mut vm = one();
    let flag = |vm: &Vm| {
        let mut b = [0; 1];
        // SAFETY: a byte of RAM.
        b[0] = unsafe { vm.cpus[0].mmu.ram.host(0x8000).unwrap().read() };
        b[0]
    };
    vm.cpus[0].wr(msr::KVM_PV_EOI_EN, 0x8001).unwrap();
    vm.cpus[0].env.me.accept(0x50, Delivery::Fixed, false);
    assert_eq!((vm.cpus[0].takes(), flag(&vm)), (Some(0x50), 1));
    // The guest clears the flag instead of writing EOI.
    // SAFETY: a byte of RAM.
    unsafe { vm.cpus[0].mmu.ram.host(0x8000).unwrap().write(0) };
    vm.cpus[0].env.me.accept(0x51, Delivery::Fixed, false);
    assert_eq!(vm.cpus[0].takes(), Some(0x51));
    // It has not cleared it: the interrupt stays in service, and the offer is withdrawn.
    vm.cpus[0].env.me.accept(0x52, Delivery::Fixed, false);
    assert_eq!((vm.cpus[0].takes(), flag(&vm)), (None, 0));
    vm.cpus[0].write(reg::EOI, 0);
    // Not offered: level-triggered, and with another one waiting.
    assert_eq!(vm.cpus[0].takes(), Some(0x52));
    vm.cpus[0].write(reg::EOI, 0);
    vm.cpus[0].env.me.accept(0x60, Delivery::Fixed, true);
    assert_eq!((vm.cpus[0].takes(), flag(&vm)), (Some(0x60), 0));
    vm.cpus[0].write(reg::EOI, 0);
    vm.cpus[0].env.me.accept(0x61, Delivery::Fixed, false);
    vm.cpus[0].env.me.accept(0x31, Delivery::Fixed, false);
    assert_eq!((vm.cpus[0].takes(), flag(&vm)), (Some(0x61), 0));
    assert!(vm.cpus[0].wr(msr::KVM_PV_EOI_EN, 3).is_err());
    // An address that is no RAM offers nothing.
    vm.cpus[0].write(reg::EOI, 0);
    vm.cpus[0].wr(msr::KVM_PV_EOI_EN, 0xffff_ffff_f001).unwrap();
    assert_eq!(vm.cpus[0].takes(), Some(0x31));
    vm.cpus[0].write(reg::EOI, 0);
    assert_eq!(vm.cpus[0].read(reg::ISR + 1), 0);
}

#[test]
fn hypercalls() {
    use crate::cpu::gpr::*;
    let mut vm = vm(&[0, 1, 5]);
    for c in &mut vm.cpus {
        c.asked();
    }
    let c = &mut vm.cpus[0];
    c.code_size = crate::cpu::CodeSize::Bits64;
    let call = |c: &mut Cpu, n: u64, args: [u64; 4]| {
        for (r, a) in [RBX, RCX, RDX, RSI].into_iter().zip(args) {
            c.regs[r] = a;
        }
        c.regs[RAX] = n;
        c.hypercall();
        c.regs[RAX] as i64
    };
    assert_eq!(call(c, 99, [0; 4]), -1000);
    assert_eq!(call(c, 10, [0b10001, 0, 1, 0x40]), 2);
    assert_eq!(call(c, 10, [1, 0, 0, 8]), -22);
    assert_eq!(call(c, 10, [u64::MAX, u64::MAX, u64::MAX, 0x40]), 3);
    assert_eq!(call(c, 5, [0, 5, 0, 0]), 0);
    assert_eq!(call(c, 5, [0, 6, 0, 0]), 0);
    assert_eq!(call(c, 11, [1, 0, 0, 0]), 0);
    c.cpl = 3;
    assert_eq!(call(c, 5, [0, 5, 0, 0]), -1);
    c.cpl = 0;
    c.code_size = crate::cpu::CodeSize::Bits32;
    assert_eq!(call(c, 99, [0; 4]), i64::from(-1000i32 as u32));
    assert_eq!(vm.pending(0x40), [0, 1, 5]);
    assert_eq!(vm.cpus[2].asked(), request::INTERRUPT | request::UNHALT);
}

#[test]
fn the_paravirtual_clock_agrees_with_the_tsc() {
    let mut vm = one();
    let c = &mut vm.cpus[0];
    // SAFETY: all the addresses below are RAM.
    let word = |c: &Cpu, at: u64| unsafe { c.mmu.ram.host(at).unwrap().cast::<u64>().read_unaligned() };
    let system_ns = |c: &Cpu| {
        let (stamp, base, scale) = (word(c, 0x9008), word(c, 0x9010), word(c, 0x9018));
        let (mul, shift) = (scale as u32, (scale >> 32) as i8);
        let d = u128::from(c.tsc() - stamp);
        let d = if shift >= 0 { d << shift } else { d >> -shift };
        base + ((d * u128::from(mul)) >> 32) as u64
    };
    c.wr(msr::KVM_SYSTEM_TIME_NEW, 0x9001).unwrap();
    let version = word(c, 0x9000) as u32;
    assert!(version != 0 && version & 1 == 0);
    assert_eq!(word(c, 0x9018) >> 40 & 1, 1);
    assert!(c.env.vm.time.ns().abs_diff(system_ns(c)) < 1_000_000);
    // Moving this vCPU's TSC does not move its time.
    let tsc = c.tsc();
    c.wr(msr::IA32_TSC, tsc + (1 << 45)).unwrap();
    assert!(c.env.vm.time.ns().abs_diff(system_ns(c)) < 1_000_000);
    assert_ne!(word(c, 0x9000) as u32, version);
    // The flag for "the same everywhere" is gone.
    assert_eq!(word(c, 0x9018) >> 40 & 1, 0);
    c.wr(msr::KVM_WALL_CLOCK_NEW, 0xa000).unwrap();
    let (sec, ns) = (word(c, 0xa000) >> 32, word(c, 0xa008) as u32);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let guests = Duration::new(sec, ns) + Duration::from_nanos(c.env.vm.time.ns());
    assert!(guests.abs_diff(now) < Duration::from_millis(100));
    // Where no RAM is, nothing happens.
    c.wr(msr::KVM_SYSTEM_TIME_NEW, 0xffff_ffff_ffff_fff1).unwrap();
    c.wr(msr::KVM_WALL_CLOCK_NEW, 0xfff8).unwrap();
    c.wr(msr::KVM_WALL_CLOCK_NEW, u64::MAX).unwrap();
}

#[test]
fn paravirtual_msrs_need_their_cpuid_bits() {
    let memory = ringfort_memory::allocate(&[(0, 1 << 20)]).unwrap();
    let me = Arc::new(VcpuShared::new(0));
    let env = Env { bus: Arc::new(RecordingBus::default()), vm: Arc::new(VmShared::new()), me };
    let mut c = Cpu::new(RamMap::new(&memory), CpuidTable::default(), env);
    assert!(c.apic_read_msr(msr::KVM_SYSTEM_TIME_NEW).is_none());
    assert!(c.apic_write_msr(msr::KVM_PV_EOI_EN, 1).is_none());
    assert!(c.paravirt_msrs().is_empty());
    assert!(c.apic_read_msr(msr::STAR).is_none());
}

#[test]
fn a_kick_that_a_halted_vcpu_has_not_seen_is_in_its_state() {
    let mut vm = one();
    let c = &mut vm.cpus[0];
    c.activity = Activity::Halted;
    assert_eq!(c.to_state().mp_state, MpState::Halted);
    c.env.me.request(request::UNHALT);
    // It waits for nothing else: restored as halted it would wait for ever.
    assert_eq!(c.to_state().mp_state, MpState::Runnable);
}
