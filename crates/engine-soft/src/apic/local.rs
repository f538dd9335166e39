//! What the vCPU's own thread does with its local APIC: priorities, acceptance, end of interrupt.

use super::timer::Timer;
use super::{Delivery, Mode, reg};
use crate::cpu::{Cpu, Shadow};
use crate::vcpu::time::HostClock;
use crate::vcpu::{Paravirt, request};
use std::sync::atomic::Ordering;

/// What belongs to a vCPU's interrupts and time and is touched by its own thread alone.
pub struct Local {
    /// The APIC timer.
    pub timer: Timer,
    /// The host's clock, which the guest's TSC follows.
    pub clock: HostClock,
    /// IA32_TSC_ADJUST: this vCPU's TSC minus the VM's.
    pub tsc_adjust: u64,
    /// Page address of the MMIO page, `u64::MAX` when it is not there (disabled or x2APIC).
    pub page: u64,
    /// Requests that could not be acted on and that [`Cpu::interrupts_maybe`] raises again.
    pub held: u32,
    /// How long HLT watches for a request before it sleeps, in nanoseconds; see `vcpu::look_up`.
    pub poll_ns: u32,
    /// PV unhalt: the next HLT ends at once.
    pub unhalted: bool,
    /// Paravirtual interface.
    pub pv: Paravirt,
    /// Interrupts taken.
    pub interrupts: u64,
    /// Times slept in HLT.
    pub sleeps: u64,
}

impl Local {
    /// After power-on.
    pub fn new(cpuid: &ringfort_engine::CpuidTable) -> Local {
        Local {
            timer: Timer::default(),
            clock: HostClock::get(),
            tsc_adjust: 0,
            page: super::DEFAULT_BASE,
            held: 0,
            poll_ns: 0,
            unhalted: false,
            pv: Paravirt::new(cpuid),
            interrupts: 0,
            sleeps: 0,
        }
    }
}

impl Cpu {
    /// Call after whatever may let a waiting interrupt through: IF became set, TPR or PPR fell, NMIs are unblocked (IRET). Cheap. The
    /// interrupt is taken between blocks, so the instruction must end its block.
    #[inline(always)]
    pub fn interrupts_maybe(&mut self) {
        if self.local.held != 0 {
            self.raise_held();
        }
    }

    #[cold]
    fn raise_held(&mut self) {
        // In an interrupt shadow it is called once more when that ends.
        if self.shadow != Shadow::None {
            return;
        }
        let held = std::mem::take(&mut self.local.held);
        self.env.me.requests.fetch_or(held, Ordering::SeqCst);
        self.stop_block();
    }

    /// Keep requests `bits` until [`Cpu::interrupts_maybe`].
    pub(crate) fn hold(&mut self, bits: u32) {
        self.local.held |= bits;
    }

    /// Tell this vCPU itself to look up, at the end of the current instruction.
    pub(crate) fn request_own(&mut self, bits: u32) {
        self.env.me.requests.fetch_or(bits, Ordering::SeqCst);
        self.stop_block();
    }

    /// Return the local APIC to its state after reset, or after INIT. Part of [`Cpu::reset`].
    pub fn apic_reset(&mut self, init: bool) {
        self.env.me.lapic.reset(init);
        self.local.timer = Timer::default();
        self.local.held = 0;
        self.local.unhalted = false;
        self.local.pv.reset();
        if !init {
            self.local.tsc_adjust = 0;
        }
        self.follow_tsc();
        self.follow_apic_base();
    }

    /// Recompute where the MMIO page is.
    pub(super) fn follow_apic_base(&mut self) {
        let lapic = &self.env.me.lapic;
        self.local.page =
            if lapic.mode() == Mode::XApic { lapic.base() & super::access::BASE_ADDRESS } else { u64::MAX };
    }

    /// Compute PPR (Intel SDM 3A section 12.8.3.1).
    fn update_ppr(&mut self) -> u32 {
        let lapic = &self.env.me.lapic;
        let tpr = lapic.get(reg::TPR);
        let service = lapic.highest(reg::ISR).map_or(0, |v| u32::from(v) & 0xf0);
        let ppr = if tpr & 0xf0 >= service { tpr } else { service };
        lapic.set(reg::PPR, ppr);
        ppr
    }

    /// PPR as the guest reads it.
    pub(super) fn read_ppr(&mut self) -> u32 {
        self.sync_pv_eoi();
        self.update_ppr()
    }

    /// The APIC interrupt to take now, if one is above the processor's priority.
    fn deliverable(&mut self) -> Option<u8> {
        let lapic = &self.env.me.lapic;
        let v = lapic.highest(reg::IRR)?;
        if lapic.mode() == Mode::Disabled {
            return None;
        }
        let ppr = self.update_ppr();
        (u32::from(v) & 0xf0 > ppr & 0xf0).then_some(v)
    }

    /// Whether any maskable interrupt waits, deliverable or not.
    pub(crate) fn interrupt_waits(&self) -> bool {
        self.env.me.lapic.highest(reg::IRR).is_some()
            || self.env.vm.extint.load(Ordering::SeqCst) && self.env.me.takes_extint()
    }

    /// Whether [`Cpu::take_interrupt`] would give one.
    pub(crate) fn interrupt_deliverable(&mut self) -> bool {
        self.env.vm.extint.load(Ordering::SeqCst) && self.env.me.takes_extint()
            || self.deliverable().is_some()
    }

    /// Accept the interrupt to be delivered now: the 8259's first, then the local APIC's highest. The caller has checked IF and shadow.
    pub(crate) fn take_interrupt(&mut self) -> Option<u8> {
        self.sync_pv_eoi();
        if self.env.vm.extint.load(Ordering::SeqCst) && self.env.me.takes_extint() {
            return Some(self.env.bus.extint_vector());
        }
        let v = self.deliverable()?;
        let lapic = &self.env.me.lapic;
        lapic.clear_bit(reg::IRR, v);
        lapic.set_bit(reg::ISR, v);
        self.update_ppr();
        self.offer_pv_eoi(v);
        Some(v)
    }

    /// A write to EOI.
    pub(crate) fn apic_eoi(&mut self) {
        self.sync_pv_eoi();
        self.end_of_interrupt();
    }

    /// End the interrupt in service of the highest priority.
    pub(crate) fn end_of_interrupt(&mut self) {
        let lapic = &self.env.me.lapic;
        let Some(v) = lapic.highest(reg::ISR) else { return };
        lapic.clear_bit(reg::ISR, v);
        let level = lapic.bit(reg::TMR, v);
        self.update_ppr();
        if level {
            self.env.bus.ioapic_eoi(v);
        }
        self.interrupts_maybe();
    }

    /// CR8: the task priority class, 0 to 15.
    pub fn cr8(&self) -> u64 {
        u64::from(self.env.me.lapic.get(reg::TPR) >> 4)
    }

    /// Set the task priority (the 8-bit TPR; CR8 is its upper half).
    pub fn set_tpr(&mut self, tpr: u8) {
        self.sync_pv_eoi();
        self.env.me.lapic.set(reg::TPR, tpr.into());
        self.update_ppr();
        self.interrupts_maybe();
    }

    /// Whether CPUID leaf 1 shows an APIC: IA32_APIC_BASE enables it (Intel SDM 3A section 12.4.3).
    pub fn apic_enabled(&self) -> bool {
        self.env.me.lapic.mode() != Mode::Disabled
    }

    /// Raise what an LVT entry asks for. `entry` is its register number.
    pub(super) fn local_interrupt(&mut self, entry: usize) {
        let lvt = self.env.me.lapic.get(entry);
        if lvt & super::LVT_MASKED != 0 {
            return;
        }
        // The timer's entry has no delivery mode: always fixed.
        let fixed = entry == reg::LVT_TIMER || Delivery::from_bits(lvt >> 8) == Delivery::Fixed;
        if fixed && self.env.me.lapic.post(lvt as u8, false) {
            self.request_own(request::INTERRUPT);
        } else if !fixed && Delivery::from_bits(lvt >> 8) == Delivery::Nmi {
            self.request_own(request::NMI);
        }
    }
}
