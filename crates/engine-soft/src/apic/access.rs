//! Access to the registers: the MMIO page and the x2APIC MSRs.

use super::lapic::LVTS;
use super::{BASE_ENABLE, BASE_EXTD, LVT_MASKED, LVT_REMOTE_IRR, Message, Mode, SVR_ENABLE, esr, reg};
use crate::cpu::{Cpu, Trap};
use crate::vcpu::request;
use ringfort_x86::msr;

/// Address bits of IA32_APIC_BASE, as far as they can exist.
pub(super) const BASE_ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Bits of SVR that exist: vector, enable, focus-processor checking.
pub(super) const SVR_BITS: u32 = 0x3ff;
/// Last MSR of the x2APIC range.
const X2APIC_LAST: u32 = msr::X2APIC_BASE + 0xff;
/// Bits of the x2APIC ICR that are reserved (Intel SDM 3A figure 12-28). Delivery status, which is gone, is not among them, as on KVM.
const ICR_RESERVED: u64 = 0xfff3_2000;
/// LVT: delivery status; reads as zero here, since nothing stays on its way.
const LVT_STATUS: u32 = 1 << 12;

/// Bits that exist in LVT entry `n` (Intel SDM 3A figure 12-8).
pub(super) fn lvt_bits(n: usize) -> u32 {
    match n {
        reg::LVT_TIMER => 0x7_00ff,
        reg::LVT_LINT0 | reg::LVT_LINT1 => 0x1_a7ff | LVT_REMOTE_IRR,
        reg::LVT_ERROR => 0x1_00ff,
        _ => 0x1_07ff,
    }
}

/// What a register access comes to.
enum Access {
    Done(u64),
    /// No such register in this mode, or a reserved bit.
    Reserved,
}

impl Cpu {
    /// Answer a load from the local APIC's page; false if `gpa` lies elsewhere.
    pub fn apic_mmio_read(&mut self, gpa: u64, data: &mut [u8]) -> bool {
        if gpa & !0xfff != self.local.page {
            return false;
        }
        let offset = (gpa & 0xfff) as usize;
        let value = match self.read_register(offset >> 4, false) {
            Access::Done(v) => v as u32,
            Access::Reserved => {
                self.apic_error(esr::ILLEGAL_REGISTER);
                0
            }
        };
        // Registers are 32 bits at 16-byte boundaries; what lies between reads as zero.
        let bytes = u128::from(value).to_le_bytes();
        for (n, b) in data.iter_mut().enumerate() {
            *b = bytes.get((offset & 15) + n).copied().unwrap_or(0);
        }
        true
    }

    /// Take a store to the local APIC's page; false if `gpa` lies elsewhere.
    pub fn apic_mmio_write(&mut self, gpa: u64, data: &[u8]) -> bool {
        if gpa & !0xfff != self.local.page {
            return false;
        }
        let offset = (gpa & 0xfff) as usize;
        // Only aligned 32-bit stores are defined (Intel SDM 3A section 12.4.1); others are ignored.
        if let (0, [a, b, c, d, ..]) = (offset & 15, data) {
            let v = u32::from_le_bytes([*a, *b, *c, *d]);
            if let Access::Reserved = self.write_register(offset >> 4, v, false) {
                self.apic_error(esr::ILLEGAL_REGISTER);
            }
        }
        true
    }

    /// RDMSR of what the APIC, the clocks and the paravirtual interface own; `None` for any other MSR.
    #[allow(clippy::missing_errors_doc, reason = "the trap is RDMSR's #GP")]
    pub fn apic_read_msr(&mut self, n: u32) -> Option<Result<u64, Trap>> {
        Some(Ok(match n {
            msr::IA32_APIC_BASE => self.env.me.lapic.base(),
            msr::IA32_TSC_DEADLINE => self.tsc_deadline(),
            msr::IA32_TSC => self.tsc(),
            msr::IA32_TSC_ADJUST => self.local.tsc_adjust,
            msr::X2APIC_BASE..=X2APIC_LAST => {
                if self.env.me.lapic.mode() != Mode::X2Apic {
                    return Some(Err(self.gp(0)));
                }
                match self.read_register((n - msr::X2APIC_BASE) as usize, true) {
                    Access::Done(v) => v,
                    Access::Reserved => return Some(Err(self.gp(0))),
                }
            }
            _ => return self.paravirt_read_msr(n).map(Ok),
        }))
    }

    /// WRMSR of what the APIC, the clocks and the paravirtual interface own; `None` for any other MSR.
    #[allow(clippy::missing_errors_doc, reason = "the trap is WRMSR's #GP")]
    pub fn apic_write_msr(&mut self, n: u32, v: u64) -> Option<Result<(), Trap>> {
        let ok = match n {
            msr::IA32_APIC_BASE => self.set_apic_base(v),
            msr::IA32_TSC_DEADLINE => {
                self.set_tsc_deadline(v);
                true
            }
            msr::IA32_TSC => {
                self.set_tsc(v);
                true
            }
            msr::IA32_TSC_ADJUST => {
                self.set_tsc_adjust(v);
                true
            }
            msr::X2APIC_BASE..=X2APIC_LAST => {
                let n = (n - msr::X2APIC_BASE) as usize;
                self.env.me.lapic.mode() == Mode::X2Apic && self.write_x2apic(n, v)
            }
            _ => self.paravirt_write_msr(n, v)?,
        };
        Some(if ok { Ok(()) } else { Err(self.gp(0)) })
    }

    /// Whether IA32_APIC_BASE may hold `v` at all.
    pub(super) fn check_apic_base(&self, v: u64) -> Result<(), &'static str> {
        let exists = !self.mmu.reserved_addr & BASE_ADDRESS | super::BASE_BSP | BASE_EXTD | BASE_ENABLE;
        if v & !exists != 0 {
            return Err("a reserved bit is set");
        }
        if v & (BASE_ENABLE | BASE_EXTD) == BASE_EXTD {
            return Err("x2APIC mode without the APIC enabled");
        }
        if v & BASE_EXTD != 0 && self.cpuid.find(1, 0).is_none_or(|l| l.ecx >> 21 & 1 == 0) {
            return Err("the CPU has no x2APIC");
        }
        Ok(())
    }

    /// Write IA32_APIC_BASE; false for #GP (Intel SDM 3A section 12.12.5).
    fn set_apic_base(&mut self, v: u64) -> bool {
        let lapic = &self.env.me.lapic;
        let (old, both) = (lapic.base() & (BASE_ENABLE | BASE_EXTD), BASE_ENABLE | BASE_EXTD);
        let new = v & both;
        // From x2APIC mode only to disabled, and from disabled not straight to x2APIC.
        let refused = old == both && new == BASE_ENABLE || old == 0 && new == both;
        if refused || self.check_apic_base(v).is_err() {
            return false;
        }
        let lapic = &self.env.me.lapic;
        lapic.set_base(v);
        if old != new {
            match new {
                0 => {
                    // Disabling loses the state (Intel SDM 3A section 12.4.3).
                    lapic.reset(true);
                    self.local.timer = Default::default();
                }
                BASE_ENABLE => lapic.set(reg::ID, lapic.id << 24),
                _ => lapic.enter_x2apic(),
            }
        }
        self.follow_apic_base();
        self.request_own(request::INTERRUPT);
        true
    }

    fn apic_error(&mut self, bits: u32) {
        if self.env.me.lapic.error(bits) {
            self.request_own(request::INTERRUPT);
        }
    }

    fn read_register(&mut self, n: usize, x2apic: bool) -> Access {
        let lapic = &self.env.me.lapic;
        Access::Done(u64::from(match n {
            reg::PPR => self.read_ppr(),
            reg::ISR..reg::TMR => {
                self.sync_pv_eoi();
                self.env.me.lapic.get(n)
            }
            reg::TMR..reg::ESR | reg::ID | reg::VERSION | reg::TPR | reg::LDR | reg::SVR | reg::ESR => {
                lapic.get(n)
            }
            reg::ICR if x2apic => {
                return Access::Done(u64::from(lapic.get(n)) | u64::from(lapic.get(reg::ICR2)) << 32);
            }
            reg::ICR | reg::INITIAL_COUNT | reg::DIVIDE => lapic.get(n),
            reg::CURRENT_COUNT => self.current_count(),
            reg::APR | reg::RRD if !x2apic => 0,
            reg::DFR | reg::ICR2 if !x2apic => lapic.get(n),
            // Write-only; reads of the MMIO register are harmless.
            reg::EOI if !x2apic => 0,
            _ if LVTS.contains(&n) => lapic.get(n),
            _ => return Access::Reserved,
        }))
    }

    /// Write the x2APIC MSR at `n`; false for #GP.
    fn write_x2apic(&mut self, n: usize, v: u64) -> bool {
        if n == reg::ICR {
            if v & ICR_RESERVED != 0 {
                return false;
            }
            let (low, high) = (v as u32, (v >> 32) as u32);
            self.env.me.lapic.set(reg::ICR2, high);
            return matches!(self.write_register(n, low, true), Access::Done(_));
        }
        let Ok(v) = u32::try_from(v) else { return false };
        let allowed = match n {
            reg::TPR | reg::SELF_IPI => 0xff,
            // The read-only LDR and ID are refused below.
            reg::EOI | reg::ESR => 0,
            reg::SVR => SVR_BITS,
            reg::DIVIDE => 0xb,
            _ if LVTS.contains(&n) => lvt_bits(n) | LVT_STATUS,
            _ => u32::MAX,
        };
        v & !allowed == 0 && matches!(self.write_register(n, v, true), Access::Done(_))
    }

    fn write_register(&mut self, n: usize, v: u32, x2apic: bool) -> Access {
        let lapic = &self.env.me.lapic;
        match n {
            reg::TPR => self.set_tpr(v as u8),
            reg::EOI => self.apic_eoi(),
            reg::SVR => self.set_svr(v & SVR_BITS),
            reg::ESR => lapic.latch_errors(),
            reg::ICR => self.send_ipi(v, x2apic),
            reg::LVT_TIMER => {
                let v = self.lvt_value(n, v);
                self.set_timer_lvt(v);
            }
            _ if LVTS.contains(&n) => {
                let v = self.lvt_value(n, v);
                self.env.me.lapic.set(n, v);
                if n == reg::LVT_LINT0 {
                    // The 8259 may have waited for this.
                    self.request_own(request::INTERRUPT);
                }
            }
            reg::INITIAL_COUNT => self.set_initial_count(v),
            reg::DIVIDE => self.set_divide(v),
            reg::SELF_IPI if x2apic => self.send_ipi(v & 0xff | 1 << 18, true),
            reg::ID if !x2apic => lapic.set(n, v & 0xff00_0000),
            reg::LDR if !x2apic => lapic.set(n, v & 0xff00_0000),
            reg::DFR if !x2apic => lapic.set(n, v | 0x0fff_ffff),
            reg::ICR2 if !x2apic => lapic.set(n, v & 0xff00_0000),
            // Read-only registers of the MMIO page ignore stores.
            reg::VERSION | reg::APR..=reg::PPR | reg::RRD | reg::CURRENT_COUNT | reg::ISR..reg::ESR
                if !x2apic => {}
            _ => return Access::Reserved,
        }
        Access::Done(0)
    }

    /// What LVT entry `n` becomes when `v` is written: while SVR disables the APIC, entries stay masked.
    fn lvt_value(&self, n: usize, v: u32) -> u32 {
        let lapic = &self.env.me.lapic;
        let forced = if lapic.get(reg::SVR) & SVR_ENABLE == 0 { LVT_MASKED } else { 0 };
        let kept = lapic.get(n) & LVT_REMOTE_IRR & lvt_bits(n);
        v & lvt_bits(n) & !LVT_REMOTE_IRR | forced | kept
    }

    fn set_svr(&mut self, v: u32) {
        let lapic = &self.env.me.lapic;
        let before = lapic.get(reg::SVR);
        lapic.set(reg::SVR, v);
        if before & SVR_ENABLE != 0 && v & SVR_ENABLE == 0 {
            for n in LVTS {
                lapic.set(n, lapic.get(n) | LVT_MASKED);
            }
        }
    }

    /// A write to ICR's low half: send.
    fn send_ipi(&mut self, low: u32, x2apic: bool) {
        let lapic = &self.env.me.lapic;
        // Delivery status is never "pending": a message is delivered when the write is done.
        lapic.set(reg::ICR, low & 0x000c_cfff);
        let high = lapic.get(reg::ICR2);
        let high = if x2apic { high } else { high >> 24 };
        let m = Message::from_icr(low, high, x2apic);
        let needs_vector = matches!(m.delivery, super::Delivery::Fixed | super::Delivery::LowestPriority);
        if needs_vector && m.vector < 16 {
            self.apic_error(esr::SEND_ILLEGAL_VECTOR);
            return;
        }
        let me = self.env.me.apic_id;
        self.env.vm.deliver(&m, Some(me));
        if self.env.me.requests.load(std::sync::atomic::Ordering::Relaxed) != 0 {
            self.stop_block();
        }
    }
}
