//! The engine seam: [`SoftHypervisor`], its VMs and vCPUs.

use super::env::{Env, VcpuShared, VmShared, request};
use super::time::HostClock;
use crate::apic::Message;
use crate::cpu::{Activity, Cpu, RIP};
use crate::translate::Translator;
use ringfort_engine::{
    Capabilities, CpuState, CpuidTable, DebugRequest, DebugVcpu, EngineError, FeatureSet, Hypervisor, Kick,
    MachineBus, MpState, Vcpu, VcpuExit, Vm,
};
use ringfort_memory::{GuestMemory, RamMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

/// Most vCPUs of a VM: xAPIC IDs 0 to 254.
const MAX_VCPUS: u32 = 255;

/// How guest code is executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Tier {
    /// Cold code by the interpreter, hot code translated.
    #[default]
    Translate,
    /// All code by the interpreter, for debugging.
    Interpret,
}

/// The software engine.
pub struct SoftHypervisor {
    tier: Tier,
    capabilities: Capabilities,
}

/// Open the software engine. Measures the host's TSC, once per process.
///
/// # Errors
/// [`EngineError::Unavailable`] when the host lacks what the engine needs.
pub fn open(tier: Tier) -> Result<SoftHypervisor, EngineError> {
    if !crate::native::available() {
        return Err(EngineError::Unavailable {
            engine: "soft",
            reason:
                "the host refuses executable shared memory (memfd with PROT_EXEC); allow it for this process"
                    .into(),
        });
    }
    crate::crash::install();
    let clock = HostClock::get();
    let capabilities = Capabilities {
        max_vcpus: MAX_VCPUS,
        software: true,
        tsc_khz: u32::try_from(clock.hz() / 1000).unwrap_or(u32::MAX),
        cpuid: crate::cpuid::offered().clone(),
        carried: FeatureSet::of(crate::cpuid::CARRIED),
        paravirt: super::paravirt_features(),
        apic_khz: (crate::apic::TIMER_HZ / 1000) as u32,
    };
    Ok(SoftHypervisor { tier, capabilities })
}

impl Hypervisor for SoftHypervisor {
    fn name(&self) -> &'static str {
        "soft"
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn create_vm(&self, memory: GuestMemory, bus: Arc<dyn MachineBus>) -> Result<Arc<dyn Vm>, EngineError> {
        Ok(Arc::new(SoftVm {
            shared: Arc::new(VmShared::new()),
            tier: self.tier,
            ram: RamMap::new(&memory),
            bus,
            creating: Mutex::default(),
        }))
    }
}

struct SoftVm {
    tier: Tier,
    shared: Arc<VmShared>,
    ram: RamMap,
    bus: Arc<dyn MachineBus>,
    /// Serialises the making of vCPUs.
    creating: Mutex<()>,
}

impl Vm for SoftVm {
    fn create_vcpu(&self, apic_id: u32, cpuid: CpuidTable) -> Result<Box<dyn Vcpu>, EngineError> {
        let _one = self.creating.lock().unwrap_or_else(PoisonError::into_inner);
        if apic_id >= MAX_VCPUS {
            return Err(EngineError::Internal(format!(
                "APIC ID {apic_id} is beyond the last one, {}",
                MAX_VCPUS - 1
            )));
        }
        if self.shared.vcpus().iter().any(|v| v.apic_id == apic_id) {
            return Err(EngineError::Internal(format!("APIC ID {apic_id} is in use")));
        }
        let me = Arc::new(VcpuShared::new(apic_id));
        // Not running yet: nobody waits for it.
        me.asleep.store(true, Ordering::SeqCst);
        let bus = Arc::new(CountingBus { bus: self.bus.clone(), me: me.clone() });
        let env = Env { bus, vm: self.shared.clone(), me: me.clone() };
        let mut cpu = Cpu::new(self.ram.clone(), cpuid, env);
        if self.tier == Tier::Translate {
            let translator = Translator::new();
            cpu.translator =
                Some(translator.map_err(|source| EngineError::Host {
                    what: "memory for translated code".into(),
                    source,
                })?);
        }
        cpu.activity = at_reset(apic_id);
        let epoch = cpu.enter_sleep();
        self.shared.add_vcpu(me);
        Ok(Box::new(SoftVcpu { cpu, epoch, failed: None }))
    }

    fn send_msi(&self, address: u64, data: u32) {
        if let Some(m) = Message::from_msi(address, data) {
            self.shared.deliver(&m, None);
        }
    }

    fn set_extint(&self, high: bool) {
        self.shared.set_extint(high);
    }

    fn inject_nmi(&self, apic_id: u32) {
        self.shared.inject_nmi(apic_id);
    }

    fn set_time_running(&self, running: bool) {
        self.shared.time.set_running(running);
    }

    fn paravirt_clock(&self) -> u64 {
        self.shared.time.ns()
    }

    fn set_paravirt_clock(&self, ns: u64) {
        self.shared.time.set_ns(ns);
    }

    /// Returns when every vCPU's next store to any page will be logged. Once logged, a page's stores take the fast path again, so this is
    /// called with `true` after each taking of the log as well, before the pages are read. Not to be called on a vCPU's thread.
    fn set_dirty_logging(&self, on: bool) {
        for slot in self.ram.slots() {
            slot.tracker.set_logging(on);
        }
        if !on {
            // Stores are noticed until the fast paths come back by themselves; nothing is lost.
            return;
        }
        let vcpus: Vec<Arc<VcpuShared>> = self.shared.vcpus().clone();
        for v in &vcpus {
            v.request(request::DROP_WRITES);
        }
        for v in &vcpus {
            // A sleeping one acts on it before it executes anything.
            while v.requests.load(Ordering::SeqCst) & request::DROP_WRITES != 0
                && !v.asleep.load(Ordering::SeqCst)
            {
                std::thread::yield_now();
            }
        }
    }

    fn statistics(&self) -> Vec<(String, u64)> {
        let mut out = Vec::new();
        for v in self.shared.vcpus().iter() {
            let c = &v.counters;
            let named = [
                ("blocks-decoded", &c.blocks),
                ("tlb-misses", &c.tlb_misses),
                ("interrupts", &c.interrupts),
                ("sleeps", &c.sleeps),
                ("kicks", &c.kicks),
                ("port-accesses", &c.port),
                ("mmio-accesses", &c.mmio),
                ("blocks-translated", &c.translated),
                ("translation-flushes", &c.flushes),
                ("jumps-linked", &c.links),
            ];
            out.extend(
                named.map(|(name, n)| (format!("vcpu{}.{name}", v.apic_id), n.load(Ordering::Relaxed))),
            );
            out.extend(crate::translate::EXITS.iter().zip(&c.exits).map(|(name, n)| {
                (format!("vcpu{}.translated-exits.{name}", v.apic_id), n.load(Ordering::Relaxed))
            }));
        }
        out
    }
}

/// The machine's bus as one vCPU uses it: counts.
struct CountingBus {
    bus: Arc<dyn MachineBus>,
    me: Arc<VcpuShared>,
}

impl MachineBus for CountingBus {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.me.counters.port.fetch_add(1, Ordering::Relaxed);
        self.bus.pio_read(port, data);
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        self.me.counters.port.fetch_add(1, Ordering::Relaxed);
        self.bus.pio_write(port, data);
    }
    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        self.me.counters.mmio.fetch_add(1, Ordering::Relaxed);
        self.bus.mmio_read(address, data);
    }
    fn mmio_write(&self, address: u64, data: &[u8]) {
        self.me.counters.mmio.fetch_add(1, Ordering::Relaxed);
        self.bus.mmio_write(address, data);
    }
    fn extint_vector(&self) -> u8 {
        self.bus.extint_vector()
    }
    fn ioapic_eoi(&self, vector: u8) {
        self.bus.ioapic_eoi(vector);
    }
}

/// What a vCPU does after power-on: application processors have been through the BIOS-less part of the start-up protocol and wait for
/// a start-up message (Intel SDM 3A section 9.4.3).
fn at_reset(apic_id: u32) -> Activity {
    if apic_id == 0 { Activity::Running } else { Activity::Waiting(MpState::WaitForSipi) }
}

struct SoftVcpu {
    cpu: Box<Cpu>,
    /// What `leave_sleep` wants: between runs the vCPU counts as asleep.
    epoch: u64,
    /// Why it cannot go on.
    failed: Option<String>,
}

/// Marks the vCPU as awake while it lives; as asleep again when a run ends, by a panic too.
struct Awake<'a>(&'a mut SoftVcpu);

impl<'a> Awake<'a> {
    fn new(v: &'a mut SoftVcpu) -> Awake<'a> {
        v.cpu.leave_sleep(v.epoch);
        v.cpu.begin_time();
        v.cpu.env.vm.awake.fetch_add(1, Ordering::Relaxed);
        v.cpu.fpu_load();
        Awake(v)
    }
}

impl Drop for Awake<'_> {
    fn drop(&mut self) {
        self.0.cpu.publish_counters();
        self.0.cpu.env.vm.awake.fetch_sub(1, Ordering::Relaxed);
        self.0.cpu.fpu_save();
        self.0.epoch = self.0.cpu.enter_sleep();
    }
}

impl Vcpu for SoftVcpu {
    fn run(&mut self) -> Result<VcpuExit, EngineError> {
        if let Some(why) = &self.failed {
            return Err(EngineError::Internal(why.clone()));
        }
        super::time::precise_sleeps();
        let ended = {
            let awake = Awake::new(self);
            let cpu = &mut awake.0.cpu;
            let _executing = crate::crash::Executing::new(&raw const **cpu);
            // After a panic the state is only good for a report; `failed` keeps it from running again.
            catch_unwind(AssertUnwindSafe(|| cpu.run_loop()))
        };
        match ended {
            Ok(exit) => {
                if exit == VcpuExit::Kicked {
                    self.cpu.env.me.counters.kicks.fetch_add(1, Ordering::Relaxed);
                }
                Ok(exit)
            }
            Err(panic) => {
                let what = panic
                    .downcast_ref::<&str>()
                    .map(ToString::to_string)
                    .or_else(|| panic.downcast_ref::<String>().cloned())
                    .unwrap_or_default();
                let (id, cs, rip) =
                    (self.cpu.env.me.apic_id, self.cpu.seg[1].selector, self.cpu.regs[usize::from(RIP)]);
                let why = format!("vCPU {id} near CS:RIP {cs:#x}:{rip:#x}: {what}");
                self.failed = Some(why.clone());
                Err(EngineError::Internal(why))
            }
        }
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::new(Kicker(self.cpu.env.me.clone()))
    }

    fn state(&mut self) -> Result<CpuState, EngineError> {
        Ok(self.cpu.to_state())
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.cpu.from_state(state)?;
        self.failed = None;
        Ok(())
    }

    fn reset(&mut self) -> Result<(), EngineError> {
        let me = &self.cpu.env.me;
        let pending = request::INTERRUPT | request::NMI | request::INIT | request::SIPI | request::UNHALT;
        me.requests.fetch_and(!pending, Ordering::SeqCst);
        self.cpu.reset(false);
        self.cpu.activity = at_reset(self.cpu.env.me.apic_id);
        self.failed = None;
        Ok(())
    }

    fn debugger(&mut self) -> Option<&mut dyn DebugVcpu> {
        Some(self)
    }
}

impl DebugVcpu for SoftVcpu {
    fn max_watches(&self) -> usize {
        super::debug::MAX_WATCHES
    }

    fn set_debug(&mut self, request: &DebugRequest) -> Result<(), EngineError> {
        self.cpu.set_debug_request(request)
    }

    fn translate(&mut self, address: u64) -> Result<Option<u64>, EngineError> {
        Ok(self.cpu.translate_debug(address))
    }
}

struct Kicker(Arc<VcpuShared>);

impl Kick for Kicker {
    fn kick(&self) {
        self.0.request(request::KICK);
    }
}
