//! What lies outside one vCPU: the VM it belongs to, and what other threads may ask of it.

use super::time::VmTime;
use crate::apic::Lapic;
use crate::cache::CodeSync;
use ringfort_engine::MachineBus;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

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
    /// End a HLT without an interrupt (KVM's kick hypercall).
    pub const UNHALT: u32 = 1 << 8;
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
    /// Counters, for statistics.
    pub counters: Counters,
    code_pages: Mutex<Vec<u64>>,
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
            counters: Counters::default(),
            code_pages: Mutex::default(),
        }
    }

    /// Set request bits and wake the vCPU if it sleeps. From any thread.
    pub fn request(&self, bits: u32) {
        let before = self.requests.fetch_or(bits, Ordering::SeqCst);
        // A sleeper waits only while `requests` is zero, so whoever makes it other than zero wakes. The sleeper stores `asleep` before it
        // looks at `requests`, and this looks at `asleep` after storing `requests`: one of the two sees the other.
        if before == 0 && self.asleep.load(Ordering::SeqCst) {
            futex(&self.requests, libc::FUTEX_WAKE, i32::MAX as u32, None);
        }
    }

    /// Sleep until a request is there, or until `timeout`. Call between `enter_sleep` and `leave_sleep`.
    pub fn wait(&self, timeout: Option<Duration>) {
        // The kernel compares `requests` with zero once more before it puts the thread to sleep. Spurious returns are allowed: the caller
        // looks again.
        if self.requests.load(Ordering::SeqCst) == 0 {
            futex(&self.requests, libc::FUTEX_WAIT, 0, timeout);
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

/// One futex operation on `word`; waiting ends after `timeout`.
fn futex(word: &AtomicU32, operation: i32, value: u32, timeout: Option<Duration>) {
    let t = timeout.map(|t| libc::timespec {
        tv_sec: t.as_secs().min(i32::MAX as u64) as libc::time_t,
        tv_nsec: t.subsec_nanos().into(),
    });
    let t = t.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the word and the timeout live through the call. Errors (EAGAIN, EINTR, ETIMEDOUT) all mean "look again".
    unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), operation | libc::FUTEX_PRIVATE_FLAG, value, t);
    }
}

/// Counters of one vCPU, brought up to date whenever it looks up.
#[derive(Debug, Default)]
pub struct Counters {
    /// Blocks decoded.
    pub blocks: AtomicU64,
    /// TLB misses.
    pub tlb_misses: AtomicU64,
    /// Interrupts taken.
    pub interrupts: AtomicU64,
    /// Sleeps in HLT.
    pub sleeps: AtomicU64,
    /// Runs ended by a kick.
    pub kicks: AtomicU64,
    /// Port reads and writes.
    pub port: AtomicU64,
    /// MMIO loads and stores, the local APIC's page not counted.
    pub mmio: AtomicU64,
    /// Blocks translated.
    pub translated: AtomicU64,
    /// Times that all translations were dropped.
    pub flushes: AtomicU64,
    /// Jumps between translated blocks linked.
    pub links: AtomicU64,
    /// Ways back from translated code, by cause; see [`EXITS`](crate::translate::EXITS).
    pub exits: [AtomicU64; crate::translate::EXITS.len()],
}

/// What the vCPUs of one VM share.
pub struct VmShared {
    /// The 8259's output.
    pub extint: AtomicBool,
    /// Announcements of new code pages.
    pub code_sync: CodeSync,
    /// Time.
    pub time: VmTime,
    /// vCPUs that a host CPU runs or should run.
    pub(crate) awake: AtomicU32,
    /// Host CPUs that this process may use.
    pub(crate) host_cpus: u32,
    /// Whose turn it is among equals in lowest-priority delivery.
    pub(crate) turn: AtomicU32,
    vcpus: RwLock<Vec<Arc<VcpuShared>>>,
}

impl VmShared {
    /// No vCPUs yet.
    pub fn new() -> VmShared {
        VmShared {
            extint: AtomicBool::new(false),
            code_sync: CodeSync::default(),
            time: VmTime::new(),
            awake: AtomicU32::new(0),
            host_cpus: std::thread::available_parallelism().map_or(1, |n| n.get() as u32),
            turn: AtomicU32::new(0),
            vcpus: RwLock::default(),
        }
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
