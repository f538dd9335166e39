//! The whole state of a vCPU, in the form that all engines share.

use super::msr::stored_msrs;
use super::segmentation::canonical;
use super::{Activity, Cpu, RIP, Shadow};
use crate::vcpu::request;
use ringfort_engine::{CpuEvents, CpuState, EngineError, MpState};
use ringfort_x86::cr::*;
use ringfort_x86::flags::VM;
use ringfort_x86::msr::*;
use ringfort_x86::segment::SS;
use std::sync::atomic::Ordering;

/// MSRs that have a field of [`CpuState`] or a treatment of their own.
fn elsewhere(n: u32) -> bool {
    matches!(n, IA32_APIC_BASE | IA32_TSC | IA32_TSC_ADJUST | IA32_TSC_DEADLINE | EFER | FS_BASE | GS_BASE)
}

fn refuse(what: impl Into<String>) -> EngineError {
    EngineError::State(what.into())
}

impl Cpu {
    /// Read the whole state, between instructions.
    pub fn to_state(&mut self) -> CpuState {
        self.settle();
        let mut numbers = vec![
            IA32_TSC,
            IA32_TSC_ADJUST,
            IA32_APIC_BASE,
            IA32_TSC_DEADLINE,
            STAR,
            LSTAR,
            CSTAR,
            SFMASK,
            KERNEL_GS_BASE,
            TSC_AUX,
            IA32_SYSENTER_CS,
            IA32_SYSENTER_ESP,
            IA32_SYSENTER_EIP,
        ];
        numbers.extend(stored_msrs());
        numbers.extend(self.paravirt_msrs());
        numbers.sort_unstable();
        numbers.dedup();
        let mut msrs = Vec::with_capacity(numbers.len());
        for n in numbers {
            // What the CPU model lacks is #GP, and not part of its state.
            if let Ok(v) = self.read_msr(n) {
                msrs.push((n, if n == IA32_TSC { self.saved_tsc() } else { v }));
            }
        }
        let requests = self.env.me.requests.load(Ordering::SeqCst) | self.local.held;
        let mut gpr = [0; 16];
        gpr.copy_from_slice(&self.regs[..16]);
        CpuState {
            gpr,
            rip: self.regs[usize::from(RIP)],
            rflags: self.rflags(),
            segments: self.seg,
            tr: self.tr,
            ldtr: self.ldtr,
            gdtr: self.gdtr,
            idtr: self.idtr,
            cr0: self.cr0,
            cr2: self.cr2,
            cr3: self.cr3,
            cr4: self.cr4,
            cr8: self.cr8(),
            pdptrs: self.pdptrs,
            efer: self.efer,
            xcr0: self.xcr0,
            dr: self.dr,
            dr6: self.dr6,
            dr7: self.dr7,
            msrs,
            xsave: self.export_xsave(),
            apic: self.save_apic(),
            events: CpuEvents {
                exception: None,
                interrupt: None,
                sti_shadow: self.shadow == Shadow::Sti,
                mov_ss_shadow: self.shadow == Shadow::MovSs,
                nmi_pending: requests & request::NMI != 0,
                nmi_blocked: self.nmi_blocked,
                sipi_vector: (requests & request::SIPI != 0)
                    .then(|| self.env.me.sipi_vector.load(Ordering::SeqCst) as u8),
            },
            mp_state: match self.activity {
                Activity::Running | Activity::Shutdown => MpState::Runnable,
                Activity::Halted => MpState::Halted,
                Activity::Waiting(m) => m,
            },
        }
    }

    /// Replace the whole state.
    ///
    /// # Errors
    /// [`EngineError::State`] when this CPU model cannot be in it; then the old state stays.
    pub fn from_state(&mut self, s: &CpuState) -> Result<(), EngineError> {
        self.check_state(s)?;
        let before = self.to_state();
        self.take_state(s).inspect_err(|_| {
            // What this vCPU gave it also takes back.
            let _ = self.take_state(&before);
        })
    }

    /// What can be wrong with a state without trying it.
    fn check_state(&self, s: &CpuState) -> Result<(), EngineError> {
        let paging = s.cr0 & CR0_PG != 0;
        let long = s.efer & EFER_LMA != 0;
        if s.cr0 & !CR0_VALID != 0 || s.cr0 & (CR0_PG | CR0_PE) == CR0_PG {
            return Err(refuse(format!("CR0 {:#x} is not possible", s.cr0)));
        }
        if s.cr4 & !self.masks.cr4 != 0 {
            return Err(refuse(format!(
                "CR4 {:#x} has bits {:#x} that this CPU model lacks",
                s.cr4,
                s.cr4 & !self.masks.cr4
            )));
        }
        if s.efer & !self.masks.efer != 0 {
            return Err(refuse(format!(
                "EFER {:#x} has bits {:#x} that this CPU model lacks",
                s.efer,
                s.efer & !self.masks.efer
            )));
        }
        if long != (paging && s.efer & EFER_LME != 0) || long && s.cr4 & CR4_PAE == 0 {
            return Err(refuse(format!(
                "EFER {:#x}, CR0 {:#x} and CR4 {:#x} contradict each other",
                s.efer, s.cr0, s.cr4
            )));
        }
        if s.cr4 & CR4_PCIDE != 0 && !long {
            return Err(refuse("CR4.PCIDE is set outside long mode"));
        }
        if s.cr3 & self.masks.beyond_physical != 0 {
            return Err(refuse(format!("CR3 {:#x} lies beyond the physical address bits", s.cr3)));
        }
        if s.xcr0 & !self.masks.xcr0 != 0 || s.xcr0 & XCR0_X87 == 0 {
            return Err(refuse(format!(
                "XCR0 {:#x}: this CPU model has components {:#x}",
                s.xcr0, self.masks.xcr0
            )));
        }
        if s.cr8 > 15 {
            return Err(refuse(format!("CR8 {:#x} is above 15", s.cr8)));
        }
        if (s.dr6 | s.dr7) >> 32 != 0 {
            return Err(refuse("DR6 or DR7 has bits above 31"));
        }
        let bases = [s.gdtr.base, s.idtr.base, s.tr.base, s.ldtr.base];
        if bases.into_iter().chain(s.segments.iter().map(|g| g.base)).any(|b| !canonical(b)) {
            return Err(refuse("a segment or table base is not canonical"));
        }
        if s.rflags & VM != 0 && (long || s.cr0 & CR0_PE == 0) {
            return Err(refuse("RFLAGS.VM is set outside legacy protected mode"));
        }
        Ok(())
    }

    fn take_state(&mut self, s: &CpuState) -> Result<(), EngineError> {
        let value = |n: u32| s.msrs.iter().find(|m| m.0 == n).map(|m| m.1);
        self.import_xsave(&s.xsave).map_err(refuse)?;
        let base = value(IA32_APIC_BASE).unwrap_or(self.env.me.lapic.base());
        self.load_apic(&s.apic, base).map_err(refuse)?;
        // Paging first: MSR writes of the paravirtual clock store to guest memory, by physical address.
        self.regs[..16].copy_from_slice(&s.gpr);
        self.regs[usize::from(RIP)] = s.rip;
        self.set_rflags_raw(s.rflags);
        self.seg = s.segments;
        self.tr = s.tr;
        self.ldtr = s.ldtr;
        self.gdtr = s.gdtr;
        self.idtr = s.idtr;
        self.cr0 = s.cr0 | CR0_ET;
        self.cr2 = s.cr2;
        self.cr3 = s.cr3;
        self.cr4 = s.cr4;
        self.pdptrs = s.pdptrs;
        self.efer = s.efer;
        self.xcr0 = s.xcr0;
        self.dr = s.dr;
        self.dr6 = s.dr6 | DR6_FIXED;
        self.dr7 = s.dr7 & 0xffff_23ff | DR7_FIXED;
        self.pending_db = 0;
        self.cpl = if !self.protected() {
            0
        } else if self.v86() {
            3
        } else {
            self.seg[SS].dpl()
        };
        self.mmu.flush_all();
        let pcid = if self.cr4 & CR4_PCIDE != 0 { (self.cr3 & 0xfff) as u16 } else { 0 };
        self.mmu.switch(pcid, false);
        self.update_watched();
        self.update_decode_mode();
        self.update_mmu_mode();

        if let Some(tsc) = value(IA32_TSC) {
            self.restore_tsc(tsc, value(IA32_TSC_ADJUST).unwrap_or(0));
        }
        for &(n, v) in s.msrs.iter().filter(|m| !elsewhere(m.0)) {
            self.restore_msr(n, v)?;
        }
        if let Some(v) = value(IA32_TSC_DEADLINE) {
            self.restore_msr(IA32_TSC_DEADLINE, v)?;
        }
        // TPR is in the APIC's page; CR8 is only its upper half.
        if self.cr8() != s.cr8 && self.set_cr8(s.cr8).is_err() {
            return Err(refuse("CR8 is not possible"));
        }

        self.shadow = match (s.events.sti_shadow, s.events.mov_ss_shadow) {
            (_, true) => Shadow::MovSs,
            (true, _) => Shadow::Sti,
            _ => Shadow::None,
        };
        self.nmi_blocked = s.events.nmi_blocked;
        let me = self.env.me.clone();
        let mine = request::NMI | request::INIT | request::SIPI | request::UNHALT;
        me.requests.fetch_and(!mine, Ordering::SeqCst);
        self.local.held &= !mine;
        let mut requests = request::INTERRUPT;
        if s.events.nmi_pending {
            requests |= request::NMI;
        }
        if let Some(v) = s.events.sipi_vector {
            me.sipi_vector.store(v.into(), Ordering::SeqCst);
            requests |= request::SIPI;
        }
        me.requests.fetch_or(requests, Ordering::SeqCst);
        self.activity = match s.mp_state {
            MpState::Runnable => Activity::Running,
            MpState::Halted => Activity::Halted,
            m => Activity::Waiting(m),
        };
        if let Some(e) = s.events.exception {
            self.deliver_exception(super::TrapInfo {
                vector: e.vector,
                error: e.error_code.unwrap_or(0),
                address: self.cr2,
                non_canonical: false,
            });
        }
        if let Some(vector) = s.events.interrupt {
            self.deliver_interrupt(vector, super::InterruptKind::Hardware);
        }
        Ok(())
    }

    fn restore_msr(&mut self, n: u32, v: u64) -> Result<(), EngineError> {
        // A restored value is not subject to what only the guest's writes are (read-only, write-to-clear).
        let read_only = match n {
            IA32_MC0_CTL.. if stored_msrs().any(|m| m == n) && n < IA32_MC0_CTL + 0x100 => true,
            IA32_BIOS_SIGN_ID | IA32_ARCH_CAPABILITIES => true,
            _ => false,
        };
        if read_only && self.read_msr(n).is_ok() {
            self.msrs.insert(n, v);
            return Ok(());
        }
        if self.write_msr(n, v).is_ok() || v == 0 || self.read_msr(n).is_ok_and(|now| now == v) {
            return Ok(());
        }
        Err(refuse(format!("MSR {n:#x} cannot hold {v:#x} on this CPU model")))
    }
}
