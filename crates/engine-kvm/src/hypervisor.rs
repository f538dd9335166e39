//! Opening KVM, and what it can do.

use crate::error::{host, open_failed, unavailable};
use crate::vm::KvmVm;
use crate::{caps, cpuid, msr};
use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_HALT_POLL, KVM_MAX_CPUID_ENTRIES,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use ringfort_engine::{Capabilities, CpuidTable, EngineError, FeatureSet, Hypervisor, MachineBus, Vm};
use ringfort_memory::GuestMemory;
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where KVM is.
pub const DEVICE: &str = "/dev/kvm";
/// The only version of the API there has been since 2007.
const API_VERSION: i32 = 12;
/// Input clock of KVM's local APIC timers, in kHz.
const APIC_KHZ: u32 = 1_000_000;
/// Paravirtual features that are passed on where KVM has them: those that the software engine has as well, so that a guest can move.
/// Clock, I/O delay, new clock, steal time, PV EOI, unhalt, TLB flush, IPIs, poll control, yield, stable clock (Linux
/// Documentation/virt/kvm/x86/cpuid.rst).
const PARAVIRT: u32 =
    1 << 0 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 9 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 24;
/// Message addresses carry 15 destination bits: not KVM's to have, but of whoever makes the messages.
const EXTENDED_DESTINATION: u32 = 1 << 15;

/// How to use KVM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvmOptions {
    /// The device.
    pub device: PathBuf,
    /// I/O APIC, 8259 and 8254 in the kernel as well, and not in the machine.
    pub kernel_irqchip: bool,
    /// Log the guest's writes in a ring of this many entries per vCPU (a power of two), instead of in bitmaps.
    pub dirty_ring: Option<u32>,
    /// How long the kernel watches for interrupts before a halted vCPU's thread sleeps, in nanoseconds; the host's default if not
    /// given.
    pub halt_poll_ns: Option<u32>,
    /// Doorbells by event descriptor (ioeventfd), where KVM has them.
    pub ioeventfd: bool,
    /// Interrupts by event descriptor (irqfd), where KVM has them.
    pub irqfd: bool,
    /// Stores without immediate effect wait for the next exit (coalesced MMIO and PIO), where KVM has that.
    pub coalesce: bool,
}

impl Default for KvmOptions {
    fn default() -> KvmOptions {
        KvmOptions {
            device: DEVICE.into(),
            kernel_irqchip: false,
            dirty_ring: None,
            halt_poll_ns: None,
            ioeventfd: true,
            irqfd: true,
            coalesce: true,
        }
    }
}

/// The engine.
pub struct KvmHypervisor {
    kvm: Kvm,
    options: KvmOptions,
    capabilities: Capabilities,
    /// MSRs of a vCPU's state.
    msrs: Arc<[u32]>,
}

fn open_device(device: &Path) -> Result<Kvm, EngineError> {
    let path = CString::new(device.as_os_str().as_bytes())
        .map_err(|_| unavailable(format!("{}: the path holds a NUL byte", device.display())))?;
    Kvm::new_with_path(&path).map_err(|e| open_failed(device, e.errno()))
}

/// Open KVM and look at what it can do.
///
/// # Errors
/// [`EngineError::Unavailable`], saying what is in the way and what to do.
pub fn open(options: KvmOptions) -> Result<KvmHypervisor, EngineError> {
    let kvm = open_device(&options.device)?;
    let version = kvm.get_api_version();
    if version != API_VERSION {
        let path = options.device.display();
        return Err(unavailable(if version < 0 {
            format!("{path} is no KVM device; check it, or give --accel soft")
        } else {
            format!("{path} has KVM API version {version} instead of {API_VERSION}; give --accel soft")
        }));
    }
    caps::check(|c| kvm.check_extension(c))?;
    if let Some(entries) = options.dirty_ring {
        let most = ring_bytes(&kvm).1 / 16;
        if most <= 0 {
            return Err(unavailable("the host's KVM lacks KVM_CAP_DIRTY_LOG_RING; leave dirty-ring out"));
        }
        if !entries.is_power_of_two() || entries < 1024 || i64::from(entries) > i64::from(most) {
            return Err(unavailable(format!(
                "dirty-ring={entries}: give a power of two from 1024 to {most}"
            )));
        }
    }
    if options.kernel_irqchip && !(kvm.check_extension(Cap::Pit2) && kvm.check_extension(Cap::PitState2)) {
        return Err(unavailable(
            "the host's KVM lacks KVM_CAP_PIT2 or KVM_CAP_PIT_STATE2; give irqchip=split",
        ));
    }
    if options.halt_poll_ns.is_some() && kvm.check_extension_raw(KVM_CAP_HALT_POLL.into()) <= 0 {
        return Err(unavailable("the host's KVM lacks KVM_CAP_HALT_POLL; leave halt-poll out"));
    }
    let supported =
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(host("asking for supported CPUID leaves"))?;
    let supported = cpuid::table(supported.as_slice());
    let paravirt = supported.find(0x4000_0001, 0).map_or(0, |l| l.eax) & PARAVIRT | EXTENDED_DESTINATION;
    let listed = kvm.get_msr_index_list().map_err(host("asking for the list of MSRs"))?;
    let cpuid = cpuid::offered(supported, kvm.check_extension(Cap::TscDeadlineTimer));
    let capabilities = Capabilities {
        max_vcpus: u32::try_from(kvm.get_max_vcpus()).unwrap_or(u32::MAX).min(255),
        software: false,
        tsc_khz: tsc_khz(&kvm)?,
        cpuid,
        carried: FeatureSet::of(cpuid::HINTS),
        paravirt,
        apic_khz: APIC_KHZ,
    };
    Ok(KvmHypervisor { kvm, options, capabilities, msrs: msr::state_list(listed.as_slice()).into() })
}

/// The dirty ring's capability, and the most bytes that a ring can have; zero if there are no rings.
fn ring_bytes(kvm: &Kvm) -> (u32, i32) {
    [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING]
        .map(|c| (c, kvm.check_extension_raw(c.into())))
        .into_iter()
        .find(|r| r.1 > 0)
        .unwrap_or((0, 0))
}

/// A VM. The host gives up with EINTR when a signal comes for the process meanwhile, which says nothing about it.
fn new_vm(kvm: &Kvm) -> Result<VmFd, EngineError> {
    loop {
        match kvm.create_vm() {
            Err(e) if e.errno() == libc::EINTR => {}
            vm => return vm.map_err(|e| crate::error::vm_failed(e.errno())),
        }
    }
}

/// The frequency of guests' TSCs, which only a vCPU tells.
fn tsc_khz(kvm: &Kvm) -> Result<u32, EngineError> {
    let vm = new_vm(kvm)?;
    let vcpu = vm.create_vcpu(0).map_err(host("making a vCPU"))?;
    vcpu.get_tsc_khz().map_err(host("asking for the TSC's frequency"))
}

impl KvmHypervisor {
    /// Names of optional abilities of this KVM, and whether it has them: for reports.
    pub fn optional(&self) -> Vec<(&'static str, bool)> {
        let has = |c| self.kvm.check_extension(c);
        vec![
            ("irqfd", has(Cap::Irqfd)),
            ("ioeventfd", has(Cap::Ioeventfd)),
            ("dirty-ring", ring_bytes(&self.kvm).1 > 0),
            ("coalesced-mmio", has(Cap::CoalescedMmio)),
            ("halt-poll", self.kvm.check_extension_raw(KVM_CAP_HALT_POLL.into()) > 0),
            ("tsc-deadline", has(Cap::TscDeadlineTimer)),
            ("xsave2", has(Cap::Xsave2)),
            ("msr-filter", has(Cap::X86MsrFilter)),
            ("guest-debug", has(Cap::SetGuestDebug)),
        ]
    }

    /// Most vCPUs that the host recommends, and has at most.
    pub fn vcpu_limits(&self) -> (usize, usize) {
        (self.kvm.get_nr_vcpus(), self.kvm.get_max_vcpus())
    }

    /// What guests may be offered.
    pub fn cpuid(&self) -> &CpuidTable {
        &self.capabilities.cpuid
    }
}

impl Hypervisor for KvmHypervisor {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn create_vm(&self, memory: GuestMemory, bus: Arc<dyn MachineBus>) -> Result<Arc<dyn Vm>, EngineError> {
        let fd = new_vm(&self.kvm)?;
        let ring = self.options.dirty_ring.map(|entries| (ring_bytes(&self.kvm).0, entries));
        Ok(Arc::new(KvmVm::new(fd, &self.options, ring, self.msrs.clone(), memory, bus)?))
    }
}
