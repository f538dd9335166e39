//! The register page as saved state: the layout of KVM_GET_LAPIC.

use super::lapic::LVTS;
use super::{Mode, reg};
use crate::cpu::Cpu;
use crate::vcpu::request;

/// Bytes of the saved page.
const BYTES: usize = reg::COUNT * 16;

impl Cpu {
    /// The 1 KiB register page. In x2APIC mode the ID register holds the 32-bit ID. IA32_APIC_BASE and IA32_TSC_DEADLINE are MSRs.
    pub fn save_apic(&mut self) -> Vec<u8> {
        self.sync_pv_eoi();
        self.read_ppr();
        let lapic = &self.env.me.lapic;
        let mut page = vec![0; BYTES];
        for n in 0..reg::COUNT {
            let v = if n == reg::CURRENT_COUNT { self.saved_count() } else { lapic.get(n) };
            page[n * 16..n * 16 + 4].copy_from_slice(&v.to_le_bytes());
        }
        page
    }

    /// Take over a saved page, and IA32_APIC_BASE. A running timer goes on from its current count; IA32_TSC_DEADLINE is written
    /// afterwards, as an MSR.
    ///
    /// # Errors
    /// What is wrong with the page or the base; then nothing has changed.
    pub fn load_apic(&mut self, page: &[u8], base: u64) -> Result<(), String> {
        if page.len() != BYTES {
            return Err(format!("the local APIC's page has {} bytes, not {BYTES}", page.len()));
        }
        self.check_apic_base(base).map_err(|why| format!("IA32_APIC_BASE {base:#x}: {why}"))?;
        let word = |n: usize| u32::from_le_bytes(page[n * 16..n * 16 + 4].try_into().unwrap_or_default());
        let lapic = &self.env.me.lapic;
        lapic.set_base(base);
        for n in 0..reg::COUNT {
            let v = word(n);
            let v = match n {
                reg::VERSION => continue,
                // Vectors below 16 never get into these.
                reg::ISR | reg::TMR | reg::IRR => v & 0xffff_0000,
                reg::TPR => v & 0xff,
                reg::DFR => v | 0x0fff_ffff,
                reg::SVR => v & super::access::SVR_BITS,
                reg::DIVIDE => v & 0xb,
                reg::EOI | reg::SELF_IPI | reg::CURRENT_COUNT => 0,
                _ if LVTS.contains(&n) => v & super::access::lvt_bits(n),
                _ => v,
            };
            lapic.set(n, v);
        }
        if lapic.mode() == Mode::X2Apic {
            lapic.enter_x2apic();
        }
        self.local.timer = Default::default();
        self.follow_apic_base();
        self.start_count(word(reg::CURRENT_COUNT));
        self.read_ppr();
        self.request_own(request::INTERRUPT);
        Ok(())
    }
}
