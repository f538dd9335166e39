//! What lies outside one vCPU: the VM it belongs to, and what other threads may ask of it.

use crate::apic::Lapic;
use crate::cache::CodeSync;
use ringfort_engine::MachineBus;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock, RwLockReadGuard};

/// Bits of [`VcpuShared::request`].
pub mod request {
    /// Leave the run loop.
    pub const KICK: u32 = 1 << 0;
    /// Look at the local APIC (and ExtINT) for an interrupt to take.
    pub const INTERRUPT: u32 = 1 << 1;
    /// An NMI waits.
    pub const NMI: u32 = 1 << 2;
    /// INIT arrived.
    pub const INIT: u32 = 1 << 3;
    /// A start-up message arrived; its vector is in [`super::VcpuShared::sipi_vector`].
    pub const SIPI: u32 = 1 << 4;
    /// Drop all fast store paths (dirty logging began).
    pub const DROP_WRITES: u32 = 1 << 5;
    /// Other vCPUs have posted pages that now hold code.
    pub const CODE_PAGES: u32 = 1 << 6;
    /// Look at the timer.
    pub const TIMER: u32 = 1 << 7;
}

/// The part of a vCPU that other threads touch.
pub struct VcpuShared {
    /// APIC ID.
    pub apic_id: u32,
    /// Request bits: non-zero makes the run loop look up at the next block.
    pub requests: AtomicU32,
    /// Start-up vector of a pending SIPI.
    pub sipi_vector: AtomicU32,
    /// In a sleep: see `cache::sync`.
    pub asleep: AtomicBool,
    /// The local APIC's state that messages reach.
    pub lapic: Lapic,
    code_pages: Mutex<Vec<u64>>,
    sleeping: Mutex<bool>,
    wake: Condvar,
}

impl VcpuShared {
    /// For APIC ID `apic_id`.
    pub fn new(apic_id: u32) -> VcpuShared {
        VcpuShared {
            apic_id,
            requests: AtomicU32::new(0),
            sipi_vector: AtomicU32::new(0),
            asleep: AtomicBool::new(false),
            lapic: Lapic::new(apic_id),
            code_pages: Mutex::default(),
            sleeping: Mutex::default(),
            wake: Condvar::new(),
        }
    }

    /// Set request bits and wake the vCPU if it sleeps. From any thread.
    pub fn request(&self, bits: u32) {
        let before = self.requests.fetch_or(bits, Ordering::SeqCst);
        // Whoever set the first bit wakes; a sleeper checks `requests` under the lock before it waits.
        if before & bits != bits && self.asleep.load(Ordering::SeqCst) {
            let _held = self.sleeping.lock().unwrap_or_else(PoisonError::into_inner);
            self.wake.notify_all();
        }
    }

    /// Sleep until a request is there, or until `timeout`. Call between `enter_sleep` and `leave_sleep`.
    pub fn wait(&self, timeout: Option<std::time::Duration>) {
        let guard = self.sleeping.lock().unwrap_or_else(PoisonError::into_inner);
        let idle = |_: &mut bool| self.requests.load(Ordering::SeqCst) == 0;
        match timeout {
            Some(t) => drop(self.wake.wait_timeout_while(guard, t, idle)),
            None => drop(self.wake.wait_while(guard, idle)),
        }
    }

    /// Note that `gpa` (a page address) now holds code.
    pub fn post_code_page(&self, gpa: u64) {
        self.code_pages.lock().unwrap_or_else(PoisonError::into_inner).push(gpa);
    }

    /// Take the posted pages.
    pub fn take_code_pages(&self) -> Vec<u64> {
        std::mem::take(&mut *self.code_pages.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What the vCPUs of one VM share.
pub struct VmShared {
    /// The 8259's output.
    pub extint: AtomicBool,
    /// Announcements of new code pages.
    pub code_sync: CodeSync,
    vcpus: RwLock<Vec<Arc<VcpuShared>>>,
}

impl VmShared {
    /// No vCPUs yet.
    pub fn new() -> VmShared {
        VmShared { extint: AtomicBool::new(false), code_sync: CodeSync::default(), vcpus: RwLock::default() }
    }

    /// All vCPUs.
    pub fn vcpus(&self) -> RwLockReadGuard<'_, Vec<Arc<VcpuShared>>> {
        self.vcpus.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Add one.
    pub fn add_vcpu(&self, vcpu: Arc<VcpuShared>) {
        self.vcpus.write().unwrap_or_else(PoisonError::into_inner).push(vcpu);
    }
}

impl Default for VmShared {
    fn default() -> Self {
        Self::new()
    }
}

/// Everything outside a vCPU.
pub struct Env {
    /// Ports, MMIO, interrupt acknowledge.
    pub bus: Arc<dyn MachineBus>,
    /// The VM.
    pub vm: Arc<VmShared>,
    /// This vCPU's own shared part.
    pub me: Arc<VcpuShared>,
}
