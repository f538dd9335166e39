//! One vCPU.

mod debug;
mod kick;
mod regs;
mod run;
mod state;
#[cfg(test)]
mod tests;

pub(crate) use kick::KickTarget;

use crate::error::host;
use crate::vm::VmShared;
use crate::{cpuid, msr};
use kvm_bindings::KVM_CAP_ENFORCE_PV_FEATURE_CPUID;
use kvm_bindings::kvm_enable_cap;
use kvm_ioctls::VcpuFd;
use ringfort_engine::{
    CpuState, CpuidTable, DebugRequest, DebugVcpu, EngineError, Kick, MpState, Vcpu, VcpuExit,
};
use std::sync::Arc;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

ioctl_iow_nr!(KVM_X86_SETUP_MCE, kvm_bindings::KVMIO, 0x9c, u64);

/// A vCPU. Fields are dropped in order: the vCPU before the memory that it runs on.
pub(crate) struct KvmVcpu {
    fd: VcpuFd,
    apic_id: u32,
    intel: bool,
    /// MSRs that the CPU model lacks.
    hidden: Vec<u32>,
    /// Bytes of a saved XSAVE area: what the CPU model's components take.
    xsave_bytes: usize,
    target: Arc<KickTarget>,
    /// TSC minus the host's, without what pauses have taken off; and what of those is in force.
    tsc_base: u64,
    shift: u64,
    tsc_hz: u64,
    debug: DebugRequest,
    /// The state after power-on.
    initial: CpuState,
    vm: Arc<VmShared>,
}

impl KvmVcpu {
    pub(crate) fn new(vm: Arc<VmShared>, apic_id: u32, table: CpuidTable) -> Result<KvmVcpu, EngineError> {
        kick::install();
        let mut fd = vm
            .fd
            .create_vcpu(apic_id.into())
            .map_err(host(format!("making the vCPU with APIC ID {apic_id}")))?;
        let target = Arc::new(KickTarget::new(fd.get_kvm_run()));
        if vm.fd.check_extension_raw(KVM_CAP_ENFORCE_PV_FEATURE_CPUID.into()) > 0 {
            let cap = kvm_enable_cap {
                cap: KVM_CAP_ENFORCE_PV_FEATURE_CPUID,
                args: [1, 0, 0, 0],
                ..Default::default()
            };
            fd.enable_cap(&cap)
                .map_err(host("holding guests to the paravirtual features they were told of"))?;
        }
        fd.set_cpuid2(&cpuid::to_kvm(&table)?).map_err(host("setting CPUID"))?;
        let intel = table.find(0, 0).is_some_and(|l| l.ebx == u32::from_le_bytes(*b"Genu"));
        let mcg = msr::mcg_cap(intel);
        // SAFETY: the ioctl reads the eight bytes it is given.
        if unsafe { ioctl_with_ref(&fd, KVM_X86_SETUP_MCE(), &mcg) } < 0 {
            let bare = mcg & 0x1ff;
            // Some hosts have no recovery of software errors.
            // SAFETY: as above.
            if unsafe { ioctl_with_ref(&fd, KVM_X86_SETUP_MCE(), &bare) } < 0 {
                let source = std::io::Error::last_os_error();
                return Err(EngineError::Host { what: "KVM: setting up machine checks".into(), source });
            }
        }
        vm.dirty.map_for(&fd)?;
        if vm.coalescing.load(std::sync::atomic::Ordering::SeqCst) {
            fd.map_coalesced_mmio_ring().map_err(host("mapping the queue of stores"))?;
        }
        let xsave_bytes = match table.find(0xd, 0) {
            Some(l) if table.find(1, 0).is_some_and(|f| f.ecx >> 26 & 1 != 0) => (l.ecx as usize).max(576),
            _ => 576,
        };
        let mut vcpu = KvmVcpu {
            tsc_base: vm.time.first_offset(),
            shift: 0,
            tsc_hz: u64::from(fd.get_tsc_khz().map_err(host("asking for the TSC's frequency"))?) * 1000,
            fd,
            apic_id,
            intel,
            hidden: msr::hidden(&table),
            xsave_bytes,
            target,
            debug: DebugRequest::default(),
            initial: CpuState::default(),
            vm,
        };
        vcpu.apply_tsc_offset()?;
        let mut initial = vcpu.read_state()?;
        if apic_id != 0 {
            // Application processors have been through the BIOS-less part of the start-up protocol (Intel SDM 3A section 9.4.3).
            initial.mp_state = MpState::WaitForSipi;
            vcpu.set_mp_state(&initial)?;
        }
        vcpu.initial = initial;
        Ok(vcpu)
    }

    pub(crate) fn target(&self) -> Arc<KickTarget> {
        self.target.clone()
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        self.target.gone();
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self) -> Result<VcpuExit, EngineError> {
        self.target.enter();
        let target = self.target.clone();
        // Left by a panic of a device as well.
        struct Leave(Arc<KickTarget>);
        impl Drop for Leave {
            fn drop(&mut self) {
                self.0.leave();
            }
        }
        let _leave = Leave(target);
        self.run_loop()
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::new(kick::Kicker(self.target.clone()))
    }

    fn state(&mut self) -> Result<CpuState, EngineError> {
        self.read_state()
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        let before = self.read_state()?;
        self.write_state(state).inspect_err(|_| {
            // What this vCPU gave it also takes back.
            let _ = self.write_state(&before);
        })
    }

    fn reset(&mut self) -> Result<(), EngineError> {
        let mut state = self.initial.clone();
        // Time goes on, as for every other vCPU.
        let tsc = self.guest_tsc(0);
        for m in state.msrs.iter_mut().filter(|m| m.0 == ringfort_x86::msr::IA32_TSC) {
            m.1 = tsc;
        }
        self.write_state(&state)
    }

    fn debugger(&mut self) -> Option<&mut dyn DebugVcpu> {
        self.vm.fd.check_extension(kvm_ioctls::Cap::SetGuestDebug).then_some(self)
    }
}
