//! The seam between a machine and the engine that runs its CPUs.
//!
//! A [`Hypervisor`] makes a [`Vm`], a `Vm` makes [`Vcpu`]s. The machine gives the engine one [`MachineBus`] for what lies
//! outside CPU and RAM; the engine never knows a device and a device never knows an engine. What only one engine
//! has is a [`Capabilities`] query or a side trait.
//!
//! The local APICs are part of the engine (hardware engines have their own, and a software engine wants their hot
//! registers close); I/O APIC and 8259 belong to the machine and reach the engine as messages and one line.
#![forbid(unsafe_code)]

mod debug;
mod eventfd;
mod irqchip;
mod state;

pub use debug::{DebugRequest, DebugStop, DebugVcpu, Watch, WatchKind};
pub use eventfd::{Doorbell, DoorbellAddress, EventFds};
pub use irqchip::Irqchip;
pub use ringfort_x86::cpuid::{CpuidTable, FeatureSet};
pub use state::{CpuEvents, CpuState, MpState, PendingException};

use ringfort_memory::GuestMemory;
use std::sync::Arc;

/// What went wrong in an engine.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The engine cannot be used here.
    #[error("{engine}: not usable on this host: {reason}")]
    Unavailable {
        /// Engine name.
        engine: &'static str,
        /// Why, and what to do.
        reason: String,
    },
    /// A state was offered that this engine or CPU model cannot take.
    #[error("CPU state: {0}")]
    State(String),
    /// The host refused something.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: String,
        /// The host's answer.
        source: std::io::Error,
    },
    /// The engine found itself in a condition that it cannot go on from; a bug or a host fault, never the guest's doing.
    #[error("engine: {0}")]
    Internal(String),
}

/// What an engine can do.
#[derive(Debug, Clone, Default)]
pub struct Capabilities {
    /// Most vCPUs per VM.
    pub max_vcpus: u32,
    /// Runs without help of the host CPU's virtualization.
    pub software: bool,
    /// Frequency of the guest's TSC, in kHz.
    pub tsc_khz: u32,
    /// CPUID as the engine can at most offer it: host features that it implements.
    pub cpuid: CpuidTable,
    /// Features beyond `cpuid` that new guests are not given, and that a guest which has seen them elsewhere can go on with: hints, and
    /// what systems do about faults of other CPUs, which is taken and has no effect.
    pub carried: FeatureSet,
    /// KVM's paravirtual features that the engine has: CPUID leaf 4000_0001h EAX.
    pub paravirt: u32,
    /// Input clock of the local APICs' timers, in kHz.
    pub apic_khz: u32,
}

/// An engine, opened.
pub trait Hypervisor: Send + Sync {
    /// `"soft"`, `"kvm"`.
    fn name(&self) -> &'static str;
    /// What it can do here.
    fn capabilities(&self) -> &Capabilities;
    /// Make a VM over `memory`. `bus` answers everything that is not RAM.
    ///
    /// # Errors
    /// When the host refuses.
    fn create_vm(&self, memory: GuestMemory, bus: Arc<dyn MachineBus>) -> Result<Arc<dyn Vm>, EngineError>;
}

/// One VM: its vCPUs share memory and interrupts.
pub trait Vm: Send + Sync {
    /// Make the vCPU with this APIC ID. Number 0 is the boot processor, the others wait for INIT and SIPI. The value is used by
    /// one thread at a time.
    ///
    /// # Errors
    /// When the engine cannot make another.
    fn create_vcpu(&self, apic_id: u32, cpuid: CpuidTable) -> Result<Box<dyn Vcpu>, EngineError>;
    /// Deliver a message-signalled interrupt (from a device or an I/O APIC). From any thread.
    fn send_msi(&self, address: u64, data: u32);
    /// The 8259's INTR output, wired to LINT0 of every local APIC (and to the CPU when the APIC is disabled). From any
    /// thread.
    fn set_extint(&self, high: bool);
    /// Raise NMI on one vCPU. From any thread.
    fn inject_nmi(&self, apic_id: u32);
    /// Stop or start the guest's time: TSC, its deadline and the paravirtual clock. Time runs at first. To be called only while all
    /// vCPUs are out of [`Vcpu::run`]; while time stands still, the TSCs in their states were all read at one moment, and a state that
    /// is set says where time goes on.
    fn set_time_running(&self, running: bool);
    /// KVM's paravirtual clock, in nanoseconds: what the guest computes from its time page. Saved beside the TSC, since the two need not run
    /// at exactly the same rate.
    fn paravirt_clock(&self) -> u64;
    /// Set it, while time stands still and after the vCPUs' states are set.
    fn set_paravirt_clock(&self, ns: u64);
    /// Begin or end logging of the guest's writes; the log itself is the memory's trackers.
    fn set_dirty_logging(&self, on: bool);
    /// Bring what the engine or host logged by itself into the memory's trackers. To be called before they are taken.
    ///
    /// # Errors
    /// When the host cannot tell; the log is then not to be relied on.
    fn sync_dirty_log(&self) -> Result<(), EngineError> {
        Ok(())
    }
    /// Pin `pin` of the I/O APIC sends this message from now on, unless `masked`. For engines whose local APICs must know which vectors'
    /// EOIs to report.
    fn ioapic_route(&self, pin: u8, address: u64, data: u32, masked: bool) {
        let _ = (pin, address, data, masked);
    }
    /// Interrupt controllers and timer, if this VM was made with them in the engine's host.
    fn irqchip(&self) -> Option<&dyn Irqchip> {
        None
    }
    /// Event descriptors, where the engine's host can serve them.
    fn eventfds(&self) -> Option<&dyn EventFds> {
        None
    }
    /// Counters of the engine, by name, for statistics output.
    fn statistics(&self) -> Vec<(String, u64)> {
        Vec::new()
    }
}

/// One virtual CPU.
pub trait Vcpu: Send {
    /// Run until something needs the caller. HLT is waited out inside.
    ///
    /// # Errors
    /// [`EngineError::Internal`] or [`EngineError::Host`]; the vCPU cannot go on.
    fn run(&mut self) -> Result<VcpuExit, EngineError>;
    /// A handle that makes `run` return [`VcpuExit::Kicked`], from any thread, at the next instruction boundary;
    /// sticky: a kick while not running ends the next run at once.
    fn kicker(&self) -> Arc<dyn Kick>;
    /// The whole architectural state. Only while not running.
    ///
    /// # Errors
    /// When the engine cannot read it.
    fn state(&mut self) -> Result<CpuState, EngineError>;
    /// Replace the whole state. Only while not running.
    ///
    /// # Errors
    /// [`EngineError::State`] when it cannot be; the old state stays.
    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError>;
    /// Return to the state after power-on reset (or after INIT of a waiting application processor, for numbers
    /// other than 0).
    ///
    /// # Errors
    /// When the engine cannot.
    fn reset(&mut self) -> Result<(), EngineError>;
    /// Debugging, where the engine can.
    fn debugger(&mut self) -> Option<&mut dyn DebugVcpu> {
        None
    }
}

/// Ends a run from outside.
pub trait Kick: Send + Sync {
    /// See [`Vcpu::kicker`].
    fn kick(&self);
}

/// Why a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VcpuExit {
    /// Somebody kicked.
    Kicked,
    /// A triple fault: the machine resets.
    Shutdown,
    /// What a debugger asked for ([`DebugVcpu::set_debug`]).
    Debug(DebugStop),
}

/// What the engine asks of the machine, on the vCPU's own thread. Answers are immediate.
pub trait MachineBus: Send + Sync {
    /// IN: `data` is 1, 2 or 4 bytes.
    fn pio_read(&self, port: u16, data: &mut [u8]);
    /// OUT.
    fn pio_write(&self, port: u16, data: &[u8]);
    /// A load from a physical address that is no RAM: 1 to 8 bytes, not crossing a naturally aligned 8 bytes... the
    /// engine splits wider or page-crossing accesses.
    fn mmio_read(&self, address: u64, data: &mut [u8]);
    /// A store to a physical address that is no RAM.
    fn mmio_write(&self, address: u64, data: &[u8]);
    /// The CPU takes an ExtINT: the 8259's vector (its INTA cycle).
    fn extint_vector(&self) -> u8;
    /// A level-triggered interrupt ended in a local APIC: the I/O APICs look at their pins again.
    fn ioapic_eoi(&self, vector: u8);
}
