//! KVM's paravirtual interface: what Linux and others use when CPUID leaf 4000_0000h says "KVMKVMKVM" (Linux
//! Documentation/virt/kvm/x86/{cpuid,msr,hypercalls}.rst).
//!
//! Offered: the clock (a page from which the guest computes nanoseconds by its TSC), PV EOI, HLT polling control, and the hypercalls that
//! send IPIs, wake a halted vCPU and yield. Steal time reads as none, and says of every vCPU that it runs; it is there so that a guest
//! that was started under another engine can go on here. All of it acts only if the guest's CPUID declares it.

use super::env::request;
use super::time::clock_ns;
use crate::apic::{Delivery, reg};
use crate::cpu::{Cpu, gpr};
use crate::decode::{Ctx, Exec, Flow, Handler, Op};
use iced_x86::Mnemonic;
use ringfort_engine::CpuidTable;
use ringfort_x86::msr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// Feature bits of CPUID leaf 4000_0001h EAX.
pub mod feature {
    /// Clock by the old MSR numbers.
    pub const CLOCKSOURCE: u32 = 1 << 0;
    /// Port I/O needs no delay.
    pub const NOP_IO_DELAY: u32 = 1 << 1;
    /// Clock by the new MSR numbers.
    pub const CLOCKSOURCE2: u32 = 1 << 3;
    /// Time that the vCPU wanted to run and could not is told in memory.
    pub const STEAL_TIME: u32 = 1 << 5;
    /// End of interrupt by a flag in memory.
    pub const PV_EOI: u32 = 1 << 6;
    /// A halted vCPU can be woken by hypercall.
    pub const PV_UNHALT: u32 = 1 << 7;
    /// TLBs of vCPUs that steal time says do not run are flushed when they next do.
    pub const PV_TLB_FLUSH: u32 = 1 << 9;
    /// IPIs to many by hypercall.
    pub const PV_SEND_IPI: u32 = 1 << 11;
    /// HLT polling control.
    pub const POLL_CONTROL: u32 = 1 << 12;
    /// Yield to a vCPU.
    pub const PV_SCHED_YIELD: u32 = 1 << 13;
    /// Message addresses carry 15 destination bits.
    pub const MSI_EXT_DEST_ID: u32 = 1 << 15;
    /// The clock is the same on all vCPUs.
    pub const CLOCKSOURCE_STABLE: u32 = 1 << 24;
}

/// The features implemented here: what CPUID leaf 4000_0001h EAX may offer.
pub fn paravirt_features() -> u32 {
    use feature::*;
    CLOCKSOURCE
        | NOP_IO_DELAY
        | CLOCKSOURCE2
        | STEAL_TIME
        | PV_EOI
        | PV_UNHALT
        | PV_TLB_FLUSH
        | PV_SEND_IPI
        | POLL_CONTROL
        | PV_SCHED_YIELD
        | MSI_EXT_DEST_ID
        | CLOCKSOURCE_STABLE
}

/// "KVMKVMKVM\0\0\0" in EBX, ECX, EDX.
const SIGNATURE: (u32, u32, u32) = (0x4b4d_564b, 0x564b_4d56, 0x4d);

/// Results of hypercalls.
const ENOSYS: i64 = -1000;
const EPERM: i64 = -1;
const EINVAL: i64 = -22;

/// Hypercall numbers.
mod call {
    pub const VAPIC_POLL_IRQ: u64 = 1;
    pub const KICK_CPU: u64 = 5;
    pub const SEND_IPI: u64 = 10;
    pub const SCHED_YIELD: u64 = 11;
}

/// Paravirtual state of one vCPU.
#[derive(Debug, Default)]
pub struct Paravirt {
    /// Features that the guest's CPUID declares and that are implemented.
    features: u32,
    /// MSR_KVM_SYSTEM_TIME: address and enable bit.
    system_time: u64,
    /// Version of the time page.
    version: u32,
    wall_clock: u64,
    /// MSR_KVM_PV_EOI_EN: address and enable bit.
    eoi: u64,
    /// The flag in memory says that the guest may skip the EOI of this interrupt in service.
    eoi_offered: bool,
    poll_control: u64,
    /// MSR_KVM_STEAL_TIME: address and enable bit.
    steal: u64,
    /// What the time page was last filled with.
    pub(super) clock_offset: u64,
}

impl Paravirt {
    /// For a guest with this CPUID.
    pub fn new(cpuid: &CpuidTable) -> Paravirt {
        let declared = if is_kvm(cpuid) { cpuid.find(0x4000_0001, 0).map_or(0, |l| l.eax) } else { 0 };
        Paravirt { features: declared & paravirt_features(), poll_control: 1, ..Paravirt::default() }
    }

    /// After reset or INIT.
    pub(crate) fn reset(&mut self) {
        *self = Paravirt { features: self.features, poll_control: 1, ..Paravirt::default() };
    }

    /// Whether HLT may watch for interrupts before it sleeps: a guest that does so itself switches it off.
    pub(crate) fn wants_polling(&self) -> bool {
        self.poll_control & 1 != 0
    }

    fn has(&self, feature: u32) -> bool {
        self.features & feature != 0
    }
}

impl Cpu {
    /// Which feature an MSR belongs to.
    fn paravirt_msr(&self, n: u32) -> bool {
        let needs = match n {
            msr::KVM_WALL_CLOCK | msr::KVM_SYSTEM_TIME => feature::CLOCKSOURCE,
            msr::KVM_WALL_CLOCK_NEW | msr::KVM_SYSTEM_TIME_NEW => feature::CLOCKSOURCE2,
            msr::KVM_PV_EOI_EN => feature::PV_EOI,
            msr::KVM_POLL_CONTROL => feature::POLL_CONTROL,
            msr::KVM_STEAL_TIME => feature::STEAL_TIME,
            _ => 0,
        };
        self.local.pv.has(needs)
    }

    /// The paravirtual MSRs that hold state, for saving: those which the guest's CPUID declares.
    pub fn paravirt_msrs(&self) -> Vec<u32> {
        let all = [
            msr::KVM_WALL_CLOCK_NEW,
            msr::KVM_SYSTEM_TIME_NEW,
            msr::KVM_STEAL_TIME,
            msr::KVM_PV_EOI_EN,
            msr::KVM_POLL_CONTROL,
        ];
        all.into_iter().filter(|&n| self.paravirt_msr(n)).collect()
    }

    pub(crate) fn paravirt_read_msr(&mut self, n: u32) -> Option<u64> {
        if !self.paravirt_msr(n) {
            return None;
        }
        Some(match n {
            msr::KVM_WALL_CLOCK | msr::KVM_WALL_CLOCK_NEW => self.local.pv.wall_clock,
            msr::KVM_SYSTEM_TIME | msr::KVM_SYSTEM_TIME_NEW => self.local.pv.system_time,
            msr::KVM_PV_EOI_EN => self.local.pv.eoi,
            msr::KVM_STEAL_TIME => self.local.pv.steal,
            _ => self.local.pv.poll_control,
        })
    }

    /// WRMSR; `Some(false)` for #GP, `None` if the MSR is not known.
    pub(crate) fn paravirt_write_msr(&mut self, n: u32, v: u64) -> Option<bool> {
        if !self.paravirt_msr(n) {
            return None;
        }
        Some(match n {
            msr::KVM_WALL_CLOCK | msr::KVM_WALL_CLOCK_NEW => {
                self.local.pv.wall_clock = v;
                self.write_wall_clock(v);
                true
            }
            msr::KVM_SYSTEM_TIME | msr::KVM_SYSTEM_TIME_NEW => {
                self.local.pv.system_time = v;
                self.refresh_system_time();
                true
            }
            msr::KVM_PV_EOI_EN => {
                // 4-byte aligned; bit 0 enables, bit 1 is reserved.
                let ok = v & 2 == 0;
                if ok {
                    self.sync_pv_eoi();
                    self.local.pv.eoi = v;
                }
                ok
            }
            msr::KVM_STEAL_TIME => {
                // 64-byte aligned; bit 0 enables, the others are reserved.
                let ok = v & 0x3e == 0;
                if ok {
                    self.local.pv.steal = v;
                    if v & 1 != 0 {
                        // The byte "preempted": this vCPU runs, and its TLB holds nothing that was to be flushed.
                        self.write_guest((v & !0x3f).wrapping_add(16), &[0]);
                    }
                }
                ok
            }
            _ => {
                let ok = v & !1 == 0;
                if ok {
                    self.local.pv.poll_control = v;
                }
                ok
            }
        })
    }

    /// Write to guest memory on the engine's own account, if `gpa` is RAM and the bytes lie in one page.
    fn write_guest(&mut self, gpa: u64, bytes: &[u8]) {
        if (gpa & 0xfff) as usize + bytes.len() > 0x1000 {
            return;
        }
        if let Some(p) = self.mmu.ram.host(gpa) {
            // SAFETY: RamMap's pointer is valid to the end of its page, and the bytes end before that.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), p, bytes.len()) };
            if self.mmu.ram.note_write(gpa) {
                self.stop_block();
            }
        }
    }

    /// Fill the guest's wall-clock structure: version, then seconds and nanoseconds of the moment when system time was zero.
    fn write_wall_clock(&mut self, gpa: u64) {
        let at_zero = clock_ns(libc::CLOCK_REALTIME).saturating_sub(self.env.vm.time.ns());
        let (sec, ns) = ((at_zero / 1_000_000_000) as u32, (at_zero % 1_000_000_000) as u32);
        let mut out = [0; 12];
        out[4..8].copy_from_slice(&sec.to_le_bytes());
        out[8..].copy_from_slice(&ns.to_le_bytes());
        // Odd while it changes. The guest's own thread reads it after the MSR write, so two steps are enough.
        self.write_guest(gpa & !3, &1u32.to_le_bytes());
        self.write_guest((gpa & !3).wrapping_add(4), &out[4..]);
        self.write_guest(gpa & !3, &2u32.to_le_bytes());
    }

    /// Fill the guest's system-time structure, if it asked for one. Its values change only when this vCPU's TSC is moved: system time is
    /// the VM's TSC in nanoseconds.
    pub(crate) fn refresh_system_time(&mut self) {
        self.local.pv.clock_offset = self.env.vm.time.clock_offset();
        let msr = self.local.pv.system_time;
        if msr & 1 == 0 {
            return;
        }
        let (mul, shift) = scale(self.env.vm.tsc_hz());
        let mut out = [0; 32];
        // System time zero is the VM's TSC zero, which this vCPU's TSC shows as its adjustment.
        out[8..16].copy_from_slice(&self.local.tsc_adjust.to_le_bytes());
        let offset = self.local.pv.clock_offset;
        out[16..24].copy_from_slice(&offset.to_le_bytes());
        out[24..28].copy_from_slice(&mul.to_le_bytes());
        out[28] = shift as u8;
        // PVCLOCK_TSC_STABLE_BIT: the same on all vCPUs.
        out[29] = u8::from(self.local.pv.has(feature::CLOCKSOURCE_STABLE) && self.local.tsc_adjust == 0);
        let gpa = msr & !1;
        let version = self.local.pv.version.wrapping_add(2) & !1;
        self.local.pv.version = version;
        self.write_guest(gpa, &(version | 1).to_le_bytes());
        self.write_guest(gpa.wrapping_add(4), &out[4..]);
        std::sync::atomic::fence(Ordering::SeqCst);
        self.write_guest(gpa, &version.to_le_bytes());
    }

    /// The PV EOI flag, if the guest has one.
    fn eoi_flag(&self) -> Option<&AtomicU8> {
        let msr = self.local.pv.eoi;
        if msr & 1 == 0 {
            return None;
        }
        let p = self.mmu.ram.host(msr & !3)?;
        // SAFETY: the pointer is valid while guest memory lives, which `mmu.ram` holds; the guest changes the byte by single
        // instructions only, as AtomicU8 does.
        Some(unsafe { AtomicU8::from_ptr(p) })
    }

    /// `vector` is now in service: let the guest end it by clearing a flag, if nothing needs to happen at its end.
    pub(crate) fn offer_pv_eoi(&mut self, vector: u8) {
        if self.local.pv.eoi & 1 == 0 {
            return;
        }
        let lapic = &self.env.me.lapic;
        let alone = (reg::ISR..reg::ISR + 8).map(|n| lapic.get(n).count_ones()).sum::<u32>() == 1;
        if !alone || lapic.is_level(vector) || lapic.pending() {
            return;
        }
        let gpa = self.local.pv.eoi & !3;
        if let Some(flag) = self.eoi_flag() {
            flag.fetch_or(1, Ordering::SeqCst);
            self.local.pv.eoi_offered = true;
            self.mmu.ram.note_write(gpa);
        }
    }

    /// Before anything looks at ISR: carry out an EOI that the guest gave by clearing the flag, and withdraw the offer.
    #[inline]
    pub(crate) fn sync_pv_eoi(&mut self) {
        if self.local.pv.eoi_offered {
            self.end_pv_eoi();
        }
    }

    #[cold]
    fn end_pv_eoi(&mut self) {
        self.local.pv.eoi_offered = false;
        let left = self.eoi_flag().is_some_and(|f| f.fetch_and(!1, Ordering::SeqCst) & 1 != 0);
        if !left {
            self.end_of_interrupt();
        }
    }

    /// VMCALL and VMMCALL: number in RAX, arguments in RBX, RCX, RDX, RSI; the answer goes to RAX.
    pub fn hypercall(&mut self) {
        let wide = self.code64();
        let arg = |n: usize| if wide { self.regs[n] } else { self.regs[n] & 0xffff_ffff };
        let (number, a, b, c, d) =
            (arg(gpr::RAX), arg(gpr::RBX), arg(gpr::RCX), arg(gpr::RDX), arg(gpr::RSI));
        let result = if self.cpl != 0 {
            EPERM
        } else {
            match number {
                call::VAPIC_POLL_IRQ => 0,
                call::KICK_CPU if self.local.pv.has(feature::PV_UNHALT) => {
                    self.with_vcpu(b, |v| v.request(request::UNHALT));
                    0
                }
                call::SEND_IPI if self.local.pv.has(feature::PV_SEND_IPI) => {
                    let (mask, min) = if wide {
                        (u128::from(b) << 64 | u128::from(a), c)
                    } else {
                        (u128::from(a | b << 32), c)
                    };
                    self.send_ipis(mask, min, d)
                }
                call::SCHED_YIELD if self.local.pv.has(feature::PV_SCHED_YIELD) => {
                    std::thread::yield_now();
                    0
                }
                _ => ENOSYS,
            }
        } as u64;
        self.regs[gpr::RAX] = if wide { result } else { result & 0xffff_ffff };
    }

    fn with_vcpu(&self, apic_id: u64, f: impl FnOnce(&Arc<super::VcpuShared>)) -> bool {
        let vcpus = self.env.vm.vcpus();
        let found = vcpus.iter().find(|v| u64::from(v.apic_id) == apic_id);
        found.map(f).is_some()
    }

    /// KVM_HC_SEND_IPI: to the APIC IDs that `mask` has, counted from `min`. Gives how many were reached.
    fn send_ipis(&mut self, mask: u128, min: u64, icr: u64) -> i64 {
        let delivery = Delivery::from_bits((icr >> 8) as u32);
        let vector = icr as u8;
        if icr >> 32 != 0 || !matches!(delivery, Delivery::Fixed | Delivery::Nmi) {
            return EINVAL;
        }
        if delivery == Delivery::Fixed && vector < 16 {
            return EINVAL;
        }
        let vcpus = self.env.vm.vcpus();
        let mut sent = 0;
        for v in vcpus.iter() {
            let bit = u64::from(v.apic_id).wrapping_sub(min);
            if bit < 128 && mask >> bit & 1 != 0 {
                v.accept(vector, delivery, false);
                sent += 1;
            }
        }
        sent
    }
}

/// VMCALL and VMMCALL as instructions. They exist for guests whose CPUID has KVM's leaf (see `decode::FeatureSet`): those are told to use
/// either, whatever the vendor.
pub(crate) fn lower(ctx: &mut Ctx<'_>) -> Option<Handler> {
    matches!(ctx.i.mnemonic(), Mnemonic::Vmcall | Mnemonic::Vmmcall).then_some(vmcall as Handler)
}

fn vmcall(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.hypercall();
    Ok(Flow::EndBlock)
}

/// Whether CPUID says that the hypervisor is KVM.
pub(crate) fn is_kvm(cpuid: &CpuidTable) -> bool {
    cpuid.find(0x4000_0000, 0).is_some_and(|l| (l.ebx, l.ecx, l.edx) == SIGNATURE)
}

/// Factor and shift by which the guest turns TSC ticks into nanoseconds: ns = (ticks << shift) · mul >> 32, a negative shift goes to the
/// right.
fn scale(hz: u64) -> (u32, i8) {
    let mut shift = 0i8;
    // Keep mul in [2^31, 2^32): the most bits.
    let mut num = u128::from(1_000_000_000u64) << 32;
    let hz = u128::from(hz.max(1));
    while num / hz >= 1 << 32 {
        num >>= 1;
        shift += 1;
    }
    while num / hz < 1 << 31 {
        num <<= 1;
        shift -= 1;
    }
    ((num / hz) as u32, shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_turns_ticks_into_nanoseconds() {
        for hz in [1_000_000_000, 2_596_118_000, 999_999_999, 19_200_000, 6_000_000_001] {
            let (mul, shift) = scale(hz);
            assert!(mul >= 1 << 31);
            let ticks = u128::from(hz) * 1000;
            let shifted = if shift >= 0 { ticks << shift } else { ticks >> -shift };
            let ns = (shifted * u128::from(mul)) >> 32;
            // 1000 s, exact to a microsecond.
            assert!(ns.abs_diff(1_000_000_000_000) < 1000, "{hz}: {ns}");
        }
    }
}
