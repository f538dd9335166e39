//! One VM.

use crate::dirty::DirtyLog;
use crate::error::host;
use crate::eventfd::Routes;
use crate::hypervisor::KvmOptions;
use crate::msr::FILTERED;
use crate::time::VmTime;
use crate::vcpu::{KickTarget, KvmVcpu};
use kvm_bindings::{
    KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_CAP_HALT_POLL, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_VCPU_ATTRIBUTES,
    KVM_CAP_X2APIC_API, KVM_CAP_X86_USER_SPACE_MSR, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
    KVM_X2APIC_API_USE_32BIT_IDS, kvm_clock_data, kvm_enable_cap, kvm_msi, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, MsrExitReason, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};
use ringfort_engine::{CpuidTable, EngineError, EventFds, Irqchip, MachineBus, Vcpu, Vm};
use ringfort_memory::{GuestMemory, RamMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Identity map of Intel CPUs that cannot run real mode by themselves: one page, and three for a task state segment after it. Where no
/// machine has RAM or devices: below the largest firmware.
const IDENTITY_MAP: u64 = 0xfeff_c000;
/// The task state segment.
const TSS: u64 = IDENTITY_MAP + 0x1000;
/// Inputs of the machine's I/O APIC: routes that KVM keeps free for them.
pub(crate) const IOAPIC_PINS: u32 = 24;

pub(crate) fn locked<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a VM's vCPUs share. Fields are dropped in order: the VM before the memory it runs on.
pub(crate) struct VmShared {
    pub(crate) fd: VmFd,
    pub(crate) ram: RamMap,
    pub(crate) bus: Arc<dyn MachineBus>,
    pub(crate) time: VmTime,
    /// The 8259's INTR output.
    pub(crate) extint: AtomicBool,
    pub(crate) dirty: DirtyLog,
    pub(crate) routes: Routes,
    /// I/O APIC, 8259 and 8254 are in the kernel.
    pub(crate) kernel_irqchip: bool,
    /// TSC offsets can be set themselves.
    pub(crate) tsc_offsets: bool,
    /// Which of the event descriptors are to be used.
    pub(crate) events: Events,
    /// There are ranges whose stores wait in a queue.
    pub(crate) coalescing: AtomicBool,
    /// One vCPU at a time empties the queue; whoever comes meanwhile waits, since its own stores may be among those.
    pub(crate) queue: Mutex<()>,
    pub(crate) xsave_size: usize,
    pub(crate) msrs: Arc<[u32]>,
    targets: Mutex<Vec<(u32, Arc<KickTarget>)>>,
    pub(crate) counters: Counters,
}

/// What of the event descriptors is used.
pub(crate) struct Events {
    pub(crate) doorbells: bool,
    pub(crate) interrupts: bool,
    pub(crate) queued_mmio: bool,
    pub(crate) queued_ports: bool,
}

/// Exits by their reason, of all vCPUs.
#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) port: AtomicU64,
    pub(crate) mmio: AtomicU64,
    pub(crate) eoi: AtomicU64,
    pub(crate) msr: AtomicU64,
    pub(crate) kicks: AtomicU64,
    pub(crate) coalesced: AtomicU64,
}

/// A VM.
pub(crate) struct KvmVm {
    shared: Arc<VmShared>,
}

fn enable(fd: &VmFd, cap: u32, args: [u64; 2]) -> Result<(), kvm_ioctls::Error> {
    let mut c = kvm_enable_cap { cap, ..Default::default() };
    c.args[..2].copy_from_slice(&args);
    fd.enable_cap(&c)
}

impl KvmVm {
    pub(crate) fn new(
        fd: VmFd,
        options: &KvmOptions,
        ring: Option<(u32, u32)>,
        msrs: Arc<[u32]>,
        memory: GuestMemory,
        bus: Arc<dyn MachineBus>,
    ) -> Result<KvmVm, EngineError> {
        let ram = RamMap::new(&memory);
        fd.set_identity_map_address(IDENTITY_MAP).map_err(host("placing the identity map"))?;
        fd.set_tss_address(TSS as usize).map_err(host("placing the task state segment"))?;
        if options.kernel_irqchip {
            crate::irqchip::create(&fd)?;
        } else {
            enable(&fd, KVM_CAP_SPLIT_IRQCHIP, [IOAPIC_PINS.into(), 0])
                .map_err(host("putting the local APICs into the kernel"))?;
        }
        if fd.check_extension(Cap::X2ApicApi) {
            let flags = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
            enable(&fd, KVM_CAP_X2APIC_API, [flags.into(), 0]).map_err(host("wide APIC IDs"))?;
        }
        if fd.check_extension(Cap::X86UserSpaceMsr) {
            let reasons = MsrExitReason::Unknown | MsrExitReason::Filter;
            enable(&fd, KVM_CAP_X86_USER_SPACE_MSR, [reasons.bits().into(), 0])
                .map_err(host("exits for MSRs"))?;
            if fd.check_extension(Cap::X86MsrFilter) {
                filter_msrs(&fd).map_err(host("filtering MSRs"))?;
            }
        }
        if fd.check_extension_raw(KVM_CAP_ENFORCE_PV_FEATURE_CPUID.into()) > 0 {
            // A vCPU's capability on some kernels; there it is asked for with each vCPU.
            let _ = enable(&fd, KVM_CAP_ENFORCE_PV_FEATURE_CPUID, [1, 0]);
        }
        if let Some(ns) = options.halt_poll_ns {
            enable(&fd, KVM_CAP_HALT_POLL, [ns.into(), 0]).map_err(host("setting halt polling"))?;
        }
        let ring_entries = ring.map(|r| r.1);
        if let Some((cap, entries)) = ring {
            enable(&fd, cap, [u64::from(entries) * 16, 0]).map_err(host("making dirty rings"))?;
        }
        for (slot, s) in (0..).zip(ram.slots()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: s.base,
                memory_size: s.size,
                userspace_addr: s.host as u64,
            };
            // SAFETY: the range is mapped while `ram` lives, which VmShared keeps beside the VM and drops after it.
            unsafe { fd.set_user_memory_region(region) }.map_err(host("giving the VM its memory"))?;
        }
        let shared = VmShared {
            time: VmTime::new(),
            extint: AtomicBool::new(false),
            dirty: DirtyLog::new(ring_entries),
            routes: Routes::new(&fd, options.kernel_irqchip)?,
            kernel_irqchip: options.kernel_irqchip,
            tsc_offsets: fd.check_extension_raw(KVM_CAP_VCPU_ATTRIBUTES.into()) > 0,
            events: Events {
                doorbells: options.ioeventfd && fd.check_extension(Cap::Ioeventfd),
                interrupts: options.irqfd && fd.check_extension(Cap::Irqfd),
                queued_mmio: options.coalesce && fd.check_extension(Cap::CoalescedMmio),
                queued_ports: options.coalesce && fd.check_extension(Cap::CoalescedPio),
            },
            coalescing: AtomicBool::new(false),
            queue: Mutex::default(),
            xsave_size: usize::try_from(fd.check_extension_int(Cap::Xsave2)).unwrap_or(0).max(4096),
            msrs,
            targets: Mutex::default(),
            counters: Counters::default(),
            fd,
            ram,
            bus,
        };
        Ok(KvmVm { shared: Arc::new(shared) })
    }
}

fn filter_msrs(fd: &VmFd) -> Result<(), kvm_ioctls::Error> {
    // A zero bit denies.
    const NONE: [u8; 8] = [0; 8];
    let ranges: Vec<MsrFilterRange<'_>> = FILTERED
        .iter()
        .map(|&(base, count)| MsrFilterRange {
            flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
            base,
            msr_count: count,
            bitmap: &NONE,
        })
        .collect();
    fd.set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges)
}

impl VmShared {
    /// The paravirtual clock as it runs.
    fn clock(&self) -> u64 {
        // It fails only for a VM that is being torn down.
        self.fd.get_clock().map_or(0, |c| c.clock)
    }

    /// All vCPUs, to be told something.
    pub(crate) fn targets(&self) -> Vec<Arc<KickTarget>> {
        locked(&self.targets).iter().map(|t| t.1.clone()).collect()
    }
}

impl Vm for KvmVm {
    fn create_vcpu(&self, apic_id: u32, cpuid: CpuidTable) -> Result<Box<dyn Vcpu>, EngineError> {
        let vcpu = KvmVcpu::new(self.shared.clone(), apic_id, cpuid)?;
        locked(&self.shared.targets).push((apic_id, vcpu.target()));
        Ok(Box::new(vcpu))
    }

    fn send_msi(&self, address: u64, data: u32) {
        let (address_lo, address_hi) = crate::eventfd::msi_address(address);
        // A message to nobody is lost, as on hardware; no other failure is possible for one.
        let _ = self.shared.fd.signal_msi(kvm_msi { address_lo, address_hi, data, ..Default::default() });
    }

    fn set_extint(&self, high: bool) {
        self.shared.extint.store(high, Ordering::SeqCst);
        if high {
            // The 8259 is wired to every LINT0; whoever has it open takes it.
            self.shared.targets().iter().for_each(|t| t.nudge());
        }
    }

    fn inject_nmi(&self, apic_id: u32) {
        // A message of delivery mode NMI: the ioctl for it would wait for the vCPU to leave the guest.
        self.send_msi(0xfee0_0000 | u64::from(apic_id & 0xff) << 12, 4 << 8);
    }

    fn set_time_running(&self, running: bool) {
        let s = &self.shared;
        if !running {
            s.time.stop(|| s.clock());
        } else if let Some(clock) = s.time.start() {
            // It fails only for values that KVM did not give.
            let _ = s.fd.set_clock(&kvm_clock_data { clock, ..Default::default() });
        }
    }

    fn paravirt_clock(&self) -> u64 {
        self.shared.time.stopped_clock().unwrap_or_else(|| self.shared.clock())
    }

    fn set_paravirt_clock(&self, ns: u64) {
        if !self.shared.time.set_stopped_clock(ns) {
            let _ = self.shared.fd.set_clock(&kvm_clock_data { clock: ns, ..Default::default() });
        }
    }

    fn set_dirty_logging(&self, on: bool) {
        self.shared.dirty.set_logging(&self.shared, on);
    }

    fn sync_dirty_log(&self) -> Result<(), EngineError> {
        self.shared.dirty.sync(&self.shared)
    }

    fn ioapic_route(&self, pin: u8, address: u64, data: u32, masked: bool) {
        if self.shared.kernel_irqchip {
            return;
        }
        self.shared.routes.set_pin(&self.shared.fd, pin, address, data, masked);
    }

    fn irqchip(&self) -> Option<&dyn Irqchip> {
        self.shared.kernel_irqchip.then_some(&*self.shared as &dyn Irqchip)
    }

    fn eventfds(&self) -> Option<&dyn EventFds> {
        Some(&*self.shared)
    }

    fn statistics(&self) -> Vec<(String, u64)> {
        let c = &self.shared.counters;
        [
            ("port-exits", &c.port),
            ("mmio-exits", &c.mmio),
            ("eoi-exits", &c.eoi),
            ("msr-exits", &c.msr),
            ("kicks", &c.kicks),
            ("coalesced-stores", &c.coalesced),
        ]
        .map(|(name, n)| (name.to_owned(), n.load(Ordering::Relaxed)))
        .into()
    }
}
