//! The whole state of a vCPU, in the form that all engines share.

use super::{KvmVcpu, regs};
use crate::error::host;
use crate::msr::{state_list, zero_is_silent};
use crate::time::host_tsc;
use kvm_bindings::{
    KVM_MAX_MSR_ENTRIES, KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_SIPI_RECEIVED, KVM_MP_STATE_UNINITIALIZED, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET,
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, KVM_VCPUEVENT_VALID_SIPI_VECTOR,
    KVM_X86_SHADOW_INT_MOV_SS, KVM_X86_SHADOW_INT_STI, Msrs, Xsave, kvm_debugregs, kvm_device_attr,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::Cap;
use ringfort_engine::{CpuEvents, CpuState, EngineError, MpState, PendingException};
use ringfort_x86::cr::{CR0_PG, CR4_PAE, EFER_LMA};
use ringfort_x86::msr::arch_capabilities::FLAWLESS;
use ringfort_x86::msr::{
    AMD_HWCR, IA32_APIC_BASE, IA32_ARCH_CAPABILITIES, IA32_TSC, IA32_TSC_ADJUST, IA32_TSC_DEADLINE,
    KVM_WALL_CLOCK_NEW,
};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, kvm_bindings::KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, kvm_bindings::KVMIO, 0xe2, kvm_device_attr);

/// Bytes of the local APIC's register page that are kept.
const APIC_PAGE: usize = 1024;
/// Least bytes of an XSAVE area: legacy region and header (Intel SDM 1 section 13.4).
const XSAVE_LEAST: usize = 576;
/// TscFreqSel of HWCR (AMD PPR family 17h, MSRC001_0015).
const TSC_FREQ_SEL: u64 = 1 << 24;
/// Local APIC after reset: enabled, at its usual place.
const APIC_BASE_RESET: u64 = 0xfee0_0900;

fn refuse(what: impl Into<String>) -> EngineError {
    EngineError::State(what.into())
}

/// A part of a state that KVM does not take.
fn refused(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> EngineError {
    move |e| refuse(format!("KVM refuses the {what}: {}", crate::error::io_error(e)))
}

impl KvmVcpu {
    /// The guest's TSC now, or at the moment when time was stopped, with IA32_TSC_ADJUST being `adjust`.
    pub(super) fn guest_tsc(&self, adjust: u64) -> u64 {
        let vm = &self.vm;
        vm.time
            .moment()
            .wrapping_add(vm.time.first_offset())
            .wrapping_add(vm.time.shift())
            .wrapping_add(adjust)
    }

    /// Before a run: take off the guest's TSC what a pause has taken.
    pub(super) fn begin_time(&mut self) -> Result<(), EngineError> {
        if self.shift == self.vm.time.shift() {
            return Ok(());
        }
        // KVM reckons a deadline in host time when it is set.
        let deadline = self.read_msrs(&[IA32_TSC_DEADLINE]).first().map_or(0, |m| m.1);
        self.tsc_base =
            self.current_offset().unwrap_or(self.tsc_base.wrapping_add(self.shift)).wrapping_sub(self.shift);
        self.apply_tsc_offset()?;
        if deadline != 0 {
            self.write_msr(IA32_TSC_DEADLINE, deadline)?;
        }
        // Lets the guest's watchdogs know. It is refused where the guest has no such clock.
        let _ = self.fd.kvmclock_ctrl();
        Ok(())
    }

    fn tsc_attribute(at: &mut u64) -> kvm_device_attr {
        kvm_device_attr {
            flags: 0,
            group: KVM_VCPU_TSC_CTRL,
            attr: KVM_VCPU_TSC_OFFSET.into(),
            addr: std::ptr::from_mut(at) as u64,
        }
    }

    /// Guest TSC minus the host's, as KVM has it: the guest may have moved it.
    fn current_offset(&self) -> Option<u64> {
        if !self.vm.tsc_offsets {
            return None;
        }
        let mut offset = 0u64;
        let attribute = Self::tsc_attribute(&mut offset);
        // SAFETY: KVM writes eight bytes to `addr`, which is `offset`, alive and not otherwise used meanwhile.
        let done = unsafe { ioctl_with_ref(&self.fd, KVM_GET_DEVICE_ATTR(), &attribute) };
        (done == 0).then_some(offset)
    }

    /// Put the vCPU's TSC offset in force.
    pub(super) fn apply_tsc_offset(&mut self) -> Result<(), EngineError> {
        self.shift = self.vm.time.shift();
        let mut offset = self.tsc_base.wrapping_add(self.shift);
        if self.vm.tsc_offsets {
            let attribute = Self::tsc_attribute(&mut offset);
            // SAFETY: KVM reads eight bytes at `addr`, which is `offset`, alive meanwhile.
            if unsafe { ioctl_with_ref(&self.fd, KVM_SET_DEVICE_ATTR(), &attribute) } < 0 {
                let source = std::io::Error::last_os_error();
                return Err(EngineError::Host { what: "KVM: setting the TSC's offset".into(), source });
            }
            Ok(())
        } else {
            self.write_msr(IA32_TSC, host_tsc().wrapping_add(offset))
        }
    }

    /// Those of these MSRs that the vCPU has.
    fn read_msrs(&self, numbers: &[u32]) -> Vec<(u32, u64)> {
        let mut out = Vec::with_capacity(numbers.len());
        let mut rest = numbers;
        while !rest.is_empty() {
            let some = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
            let entries: Vec<kvm_msr_entry> =
                some.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
            let Ok(mut msrs) = Msrs::from_entries(&entries) else { return out };
            let read = self.fd.get_msrs(&mut msrs).unwrap_or(0);
            out.extend(msrs.as_slice().iter().take(read).map(|e| (e.index, e.data)));
            // KVM stops at the first that the CPU model lacks.
            rest = &rest[(read + usize::from(read < some.len())).min(rest.len())..];
        }
        out
    }

    fn write_msr(&self, index: u32, data: u64) -> Result<(), EngineError> {
        if index == IA32_ARCH_CAPABILITIES {
            self.check_flaws(data)?;
        }
        let entry = kvm_msr_entry { index, data, ..Default::default() };
        let msrs = Msrs::from_entries(&[entry]).map_err(|_| EngineError::Internal("one MSR".into()))?;
        if self.fd.set_msrs(&msrs).is_ok_and(|n| n == 1) {
            return Ok(());
        }
        // A register that the CPU model lacks reads as zero elsewhere, and a constant has the value it has.
        if data == 0 || self.read_msrs(&[index]).first().is_some_and(|m| m.1 == data) {
            return Ok(());
        }
        Err(refuse(format!("MSR {index:#x} cannot hold {data:#x} on this CPU model under KVM")))
    }

    /// A guest that was told that its CPU lacks a flaw does nothing about it; KVM itself takes its word.
    fn check_flaws(&self, told: u64) -> Result<(), EngineError> {
        let here = self.read_msrs(&[IA32_ARCH_CAPABILITIES]).first().map_or(0, |m| m.1);
        match told & FLAWLESS & !here {
            0 => Ok(()),
            flaws => Err(refuse(format!(
                "the guest was told that its CPU lacks flaws that this host's has (IA32_ARCH_CAPABILITIES {flaws:#x}); \
                 use another host or engine, or save a machine that runs with --cpu portable"
            ))),
        }
    }

    /// Read the whole state.
    pub(super) fn read_state(&mut self) -> Result<CpuState, EngineError> {
        // The multiprocessor state first: asking for it acts on INIT and SIPI that have arrived.
        let mp = self.fd.get_mp_state().map_err(host("reading the multiprocessor state"))?;
        let mut s = CpuState::default();
        regs::take_regs(&mut s, &self.fd.get_regs().map_err(host("reading registers"))?);
        let sregs = self.fd.get_sregs().map_err(host("reading system registers"))?;
        regs::take_sregs(&mut s, &sregs);
        if s.cr0 & CR0_PG != 0 && s.cr4 & CR4_PAE != 0 && s.efer & EFER_LMA == 0 {
            s.pdptrs = self.pdptrs(s.cr3);
        }
        s.xcr0 = 1;
        if self.vm.fd.check_extension(Cap::Xcrs)
            && let Ok(x) = self.fd.get_xcrs()
            && let Some(x) = x.xcrs.iter().take(x.nr_xcrs as usize).find(|x| x.xcr == 0)
        {
            s.xcr0 = x.value;
        }
        let d = self.fd.get_debug_regs().map_err(host("reading debug registers"))?;
        (s.dr, s.dr6, s.dr7) = (d.db, d.dr6, d.dr7);
        s.xsave = self.read_xsave()?;
        let lapic = self.fd.get_lapic().map_err(host("reading the local APIC"))?;
        s.apic = lapic.regs.iter().map(|&b| b as u8).collect();
        keep_due_timer(&mut s.apic);

        let mut msrs = self.read_msrs(&self.vm.msrs.clone());
        msrs.retain(|m| (m.1 != 0 || !zero_is_silent(m.0)) && !self.hidden.contains(&m.0));
        msrs.push((IA32_APIC_BASE, sregs.apic_base));
        let own = self.read_msrs(&[IA32_TSC_DEADLINE, IA32_TSC_ADJUST]);
        let value = |n: u32| own.iter().find(|m| m.0 == n).map(|m| m.1);
        if let Some(deadline) = value(IA32_TSC_DEADLINE) {
            msrs.push((IA32_TSC_DEADLINE, deadline));
        }
        let offset = match self.current_offset() {
            // What is in force does not know of the last pause yet.
            Some(o) => o.wrapping_sub(self.shift).wrapping_add(self.vm.time.shift()),
            None => self.tsc_base.wrapping_add(self.vm.time.shift()),
        };
        msrs.push((IA32_TSC, self.vm.time.moment().wrapping_add(offset)));
        msrs.sort_unstable();
        msrs.dedup_by_key(|m| m.0);
        s.msrs = msrs;

        let e = self.fd.get_vcpu_events().map_err(host("reading pending events"))?;
        s.events = take_events(&e, mp.mp_state == KVM_MP_STATE_SIPI_RECEIVED);
        s.mp_state = match mp.mp_state {
            KVM_MP_STATE_RUNNABLE => MpState::Runnable,
            KVM_MP_STATE_HALTED => MpState::Halted,
            KVM_MP_STATE_INIT_RECEIVED | KVM_MP_STATE_SIPI_RECEIVED => MpState::WaitForSipi,
            KVM_MP_STATE_UNINITIALIZED => MpState::Uninitialized,
            other => return Err(EngineError::Internal(format!("KVM: multiprocessor state {other}"))),
        };
        Ok(s)
    }

    /// The page-directory-pointer entries that CR3 points to. KVM keeps them with the registers; the guest is not to change them in memory
    /// without reloading CR3 (Intel SDM 3A section 4.4.1).
    fn pdptrs(&self, cr3: u64) -> [u64; 4] {
        let Some(p) = self.vm.ram.host(cr3 & 0xffff_ffe0) else { return [0; 4] };
        // SAFETY: the pointer is valid to the end of its page, and 32 bytes on a 32-byte boundary end within it; the guest does not run on this
        // vCPU, and another's changes give one value or the other.
        std::array::from_fn(|n| unsafe { p.cast::<u64>().add(n).read_volatile() })
    }

    fn read_xsave(&self) -> Result<Vec<u8>, EngineError> {
        let what = || host("reading vector registers");
        let words: Vec<u32> = if self.vm.xsave_size > size_of::<kvm_xsave>() {
            let extra = (self.vm.xsave_size - size_of::<kvm_xsave>()).div_ceil(4);
            let mut x = Xsave::new(extra).map_err(|_| EngineError::Internal("XSAVE area".into()))?;
            // SAFETY: the buffer is as long as KVM says that it writes (KVM_CAP_XSAVE2).
            unsafe { self.fd.get_xsave2(&mut x) }.map_err(what())?;
            x.as_fam_struct_ref().xsave.region.to_vec()
        } else {
            self.fd.get_xsave().map_err(what())?.region.to_vec()
        };
        let mut bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        bytes.truncate(self.xsave_bytes.min(bytes.len()));
        // The software's own bytes are none of the guest's.
        bytes[464..512].fill(0);
        Ok(bytes)
    }

    fn write_xsave(&self, area: &[u8]) -> Result<(), EngineError> {
        let most = self.vm.xsave_size;
        if area.len() < XSAVE_LEAST || area.len() > most {
            return Err(refuse(format!(
                "an XSAVE area of {} bytes; KVM takes {XSAVE_LEAST} to {most}",
                area.len()
            )));
        }
        let word = |n: usize| {
            let mut b = [0; 4];
            for (b, a) in b.iter_mut().zip(area.iter().skip(n * 4)) {
                *b = *a;
            }
            u32::from_le_bytes(b)
        };
        let region: [u32; 1024] = std::array::from_fn(word);
        if most > size_of::<kvm_xsave>() {
            let extra = (most - size_of::<kvm_xsave>()).div_ceil(4);
            let mut x = Xsave::new(extra).map_err(|_| EngineError::Internal("XSAVE area".into()))?;
            // SAFETY: only the fixed part is written; the length of the rest stays.
            unsafe { x.as_mut_fam_struct() }.xsave.region = region;
            for (n, w) in (1024..).zip(x.as_mut_slice()) {
                *w = word(n);
            }
            // SAFETY: the buffer is as long as KVM reads (KVM_CAP_XSAVE2).
            unsafe { self.fd.set_xsave2(&x) }.map_err(refused("vector registers"))
        } else {
            let mut x = kvm_xsave { region, ..Default::default() };
            x.region = region;
            // SAFETY: without larger components KVM reads the 4096 bytes of the structure.
            unsafe { self.fd.set_xsave(&x) }.map_err(refused("vector registers"))
        }
    }

    /// Put a state in force. Some of the old one is lost when it fails.
    pub(super) fn write_state(&mut self, s: &CpuState) -> Result<(), EngineError> {
        let value = |n: u32| s.msrs.iter().find(|m| m.0 == n).map(|m| m.1);
        if s.cr8 > 15 {
            return Err(refuse(format!("CR8 {:#x} is above 15", s.cr8)));
        }
        if s.xcr0 & 1 == 0 {
            return Err(refuse(format!("XCR0 {:#x} lacks x87", s.xcr0)));
        }
        if !s.apic.is_empty() && s.apic.len() != APIC_PAGE {
            return Err(refuse(format!("a local APIC of {} bytes instead of {APIC_PAGE}", s.apic.len())));
        }
        // No pending event of the old state shall meet the new one.
        self.fd.set_vcpu_events(&no_events()).map_err(refused("pending events"))?;
        let apic_base = value(IA32_APIC_BASE).unwrap_or(match self.apic_id {
            0 => APIC_BASE_RESET,
            _ => APIC_BASE_RESET & !0x100,
        });
        let mut general = regs::to_regs(s);
        if s.events.exception.is_some_and(|e| by_instruction(e.vector)) {
            // RIP is behind the instruction, where its frame points; KVM wants it at the instruction, and steps over it.
            general.rip = general.rip.wrapping_sub(1);
        }
        self.fd.set_regs(&general).map_err(refused("registers"))?;
        self.fd.set_sregs(&regs::to_sregs(s, apic_base)).map_err(refused("system registers"))?;
        if self.vm.fd.check_extension(Cap::Xcrs) {
            let mut x = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
            x.xcrs[0].value = s.xcr0;
            // A CPU model without XSAVE has only the value after reset.
            self.fd
                .set_xcrs(&x)
                .or_else(|e| if s.xcr0 == 1 { Ok(()) } else { Err(e) })
                .map_err(refused("XCR0"))?;
        }
        self.write_xsave(&s.xsave)?;
        let d = kvm_debugregs { db: s.dr, dr6: s.dr6, dr7: s.dr7, ..Default::default() };
        self.fd.set_debug_regs(&d).map_err(refused("debug registers"))?;
        if !s.apic.is_empty() {
            let mut lapic = kvm_lapic_state::default();
            for (to, from) in lapic.regs.iter_mut().zip(&s.apic) {
                *to = *from as _;
            }
            self.fd.set_lapic(&lapic).map_err(refused("local APIC"))?;
        }
        if let Some(tsc) = value(IA32_TSC) {
            let base = tsc.wrapping_sub(self.vm.time.moment()).wrapping_sub(self.vm.time.shift());
            let behind = self.tsc_base.wrapping_sub(base);
            // While time runs, a value that was read less than a second ago (a debugger writes a register back) moves nothing.
            let read_back = self.vm.time.stopped_clock().is_none() && behind < self.tsc_hz;
            if !read_back {
                self.tsc_base = base;
            }
        }
        self.apply_tsc_offset()?;
        if let Some(adjust) = value(IA32_TSC_ADJUST) {
            self.write_msr(IA32_TSC_ADJUST, adjust)?;
        }
        let known = state_list(&self.vm.msrs);
        // The deadline last: its timer counts from the TSC, in a mode that the APIC has by now.
        for &(n, v) in s
            .msrs
            .iter()
            .filter(|m| !matches!(m.0, IA32_TSC | IA32_TSC_ADJUST | IA32_TSC_DEADLINE | IA32_APIC_BASE))
        {
            // KVM fills in the wall clock on every write, which a guest that has no such structure would not like.
            if n == KVM_WALL_CLOCK_NEW && v == 0 {
                continue;
            }
            if v != 0 || known.contains(&n) {
                // Older kernels do not keep the word that the TSC counts at P0's frequency, and count it so all the same.
                let least = if n == AMD_HWCR { v & !TSC_FREQ_SEL } else { v };
                self.write_msr(n, v)
                    .or_else(|e| if least == v { Err(e) } else { self.write_msr(n, least) })?;
            }
        }
        if let Some(deadline) = value(IA32_TSC_DEADLINE) {
            self.write_msr(IA32_TSC_DEADLINE, deadline)?;
        }
        self.fd.set_vcpu_events(&to_events(&s.events)).map_err(refused("pending events"))?;
        self.set_mp_state(s)
    }

    pub(super) fn set_mp_state(&self, s: &CpuState) -> Result<(), EngineError> {
        let mp_state = match (s.mp_state, s.events.sipi_vector) {
            (MpState::Runnable, _) => KVM_MP_STATE_RUNNABLE,
            (MpState::Halted, _) => KVM_MP_STATE_HALTED,
            (MpState::WaitForSipi, Some(_)) => KVM_MP_STATE_SIPI_RECEIVED,
            (MpState::WaitForSipi, None) => KVM_MP_STATE_INIT_RECEIVED,
            (MpState::Uninitialized, _) => KVM_MP_STATE_UNINITIALIZED,
        };
        self.fd.set_mp_state(kvm_mp_state { mp_state }).map_err(refused("multiprocessor state"))
    }
}

/// Registers of the local APIC's page by their offset (Intel SDM 3A table 12-1): timer entry, initial and current count.
const LVT_TIMER: usize = 0x320;
const INITIAL_COUNT: usize = 0x380;
const CURRENT_COUNT: usize = 0x390;

/// A one-shot count that has run down since the guest was last entered reads as zero, as one that is long over: KVM posts its interrupt only
/// at the next entry. One count before the end it comes in any case; KVM itself takes it to be due when it is given a zero.
fn keep_due_timer(page: &mut [u8]) {
    let word = |at: usize| page.get(at..at + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    let lvt = word(LVT_TIMER);
    let one_shot = lvt >> 17 & 3 == 0 && lvt >> 16 & 1 == 0;
    if one_shot && word(INITIAL_COUNT) != 0 && word(CURRENT_COUNT) == 0 {
        page[CURRENT_COUNT] = 1;
    }
}

fn no_events() -> kvm_vcpu_events {
    to_events(&CpuEvents::default())
}

/// Exceptions that INT3 and INTO raise, each one byte long; KVM injects them as those instructions.
fn by_instruction(vector: u8) -> bool {
    matches!(vector, 3 | 4)
}

/// KVM's events in our form. `started`: a start-up message is pending.
fn take_events(e: &kvm_vcpu_events, started: bool) -> CpuEvents {
    // INT n, INT3 and INTO that were about to be delivered are executed again: RIP still points to them.
    let raised = (e.exception.injected != 0 || e.exception.pending != 0) && !by_instruction(e.exception.nr);
    CpuEvents {
        exception: raised.then(|| PendingException {
            vector: e.exception.nr,
            error_code: (e.exception.has_error_code != 0).then_some(e.exception.error_code),
        }),
        interrupt: (e.interrupt.injected != 0 && e.interrupt.soft == 0).then_some(e.interrupt.nr),
        sti_shadow: u32::from(e.interrupt.shadow) & KVM_X86_SHADOW_INT_STI != 0,
        mov_ss_shadow: u32::from(e.interrupt.shadow) & KVM_X86_SHADOW_INT_MOV_SS != 0,
        nmi_pending: e.nmi.pending != 0 || e.nmi.injected != 0,
        nmi_blocked: e.nmi.masked != 0 && e.nmi.injected == 0,
        sipi_vector: started.then_some(e.sipi_vector as u8),
    }
}

fn to_events(s: &CpuEvents) -> kvm_vcpu_events {
    let mut e = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
        ..Default::default()
    };
    if let Some(x) = s.exception {
        e.exception.injected = 1;
        e.exception.nr = x.vector;
        e.exception.has_error_code = u8::from(x.error_code.is_some());
        e.exception.error_code = x.error_code.unwrap_or(0);
    }
    if let Some(vector) = s.interrupt {
        e.interrupt.injected = 1;
        e.interrupt.nr = vector;
    }
    let shadow = |on: bool, bit: u32| if on { bit as u8 } else { 0 };
    e.interrupt.shadow =
        shadow(s.sti_shadow, KVM_X86_SHADOW_INT_STI) | shadow(s.mov_ss_shadow, KVM_X86_SHADOW_INT_MOV_SS);
    e.nmi.pending = s.nmi_pending.into();
    e.nmi.masked = s.nmi_blocked.into();
    if let Some(v) = s.sipi_vector {
        e.flags |= KVM_VCPUEVENT_VALID_SIPI_VECTOR;
        e.sipi_vector = v.into();
    }
    e
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_survive_both_ways() {
        let all = CpuEvents {
            exception: Some(PendingException { vector: 14, error_code: Some(2) }),
            interrupt: None,
            sti_shadow: true,
            mov_ss_shadow: false,
            nmi_pending: true,
            nmi_blocked: true,
            sipi_vector: Some(0x9a),
        };
        assert_eq!(take_events(&to_events(&all), true), all);
        let other = CpuEvents { interrupt: Some(0x31), mov_ss_shadow: true, ..CpuEvents::default() };
        assert_eq!(take_events(&to_events(&other), false), other);
    }

    #[test]
    fn a_timer_that_is_due_is_not_taken_for_one_that_is_over() {
        let page = |lvt: u32, initial: u8, current: u8| {
            let mut p = vec![0; APIC_PAGE];
            p[LVT_TIMER..LVT_TIMER + 4].copy_from_slice(&lvt.to_le_bytes());
            (p[INITIAL_COUNT], p[CURRENT_COUNT]) = (initial, current);
            keep_due_timer(&mut p);
            p[CURRENT_COUNT]
        };
        assert_eq!(page(0xec, 9, 0), 1);
        assert_eq!(page(0xec, 9, 5), 5);
        // Stopped, masked, periodic, by TSC deadline.
        for (lvt, initial) in [(0xec, 0), (0x100ec, 9), (0x200ec, 9), (0x400ec, 9)] {
            assert_eq!(page(lvt, initial, 0), 0, "{lvt:#x}");
        }
    }

    #[test]
    fn instructions_that_raise_are_executed_again() {
        let mut e = kvm_vcpu_events::default();
        e.exception.injected = 1;
        e.exception.nr = 3;
        e.interrupt.injected = 1;
        e.interrupt.soft = 1;
        assert_eq!(take_events(&e, false), CpuEvents::default());
        // An NMI on its way comes again.
        e = kvm_vcpu_events::default();
        e.nmi.injected = 1;
        e.nmi.masked = 1;
        let s = take_events(&e, false);
        assert!(s.nmi_pending && !s.nmi_blocked);
    }
}
