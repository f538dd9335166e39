//! Time: the host's clock, and the guest's TSC as that clock plus an offset.
//!
//! Guest TSC = host ticks + the VM's offset + IA32_TSC_ADJUST. All vCPUs share the VM's offset, so their TSCs are equal unless the guest
//! makes them differ, and the guest may be told that they are stable. [`Cpu::tsc_offset`] is the sum of the two.

use super::env::VmShared;
use crate::cpu::Cpu;
use std::arch::x86_64::{__cpuid, __cpuid_count, _rdtsc};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Nanoseconds per second.
const NS: u64 = 1_000_000_000;

/// A monotonic clock that is cheap to read and the same on all host CPUs: the host's TSC, or where that is not stable the kernel's clock.
#[derive(Debug, Clone, Copy)]
pub struct HostClock {
    tsc: bool,
    hz: u64,
}

impl HostClock {
    /// Offset of the byte that says whether the clock is the host's TSC, for generated code.
    pub const TSC: usize = std::mem::offset_of!(HostClock, tsc);

    /// The clock of this host. Measured at the first call, which may take some 20 ms.
    pub fn get() -> HostClock {
        static CLOCK: OnceLock<HostClock> = OnceLock::new();
        *CLOCK.get_or_init(|| {
            if tsc_is_stable() {
                HostClock { tsc: true, hz: stated_hz().unwrap_or_else(measured_hz) }
            } else {
                HostClock::kernel()
            }
        })
    }

    /// The kernel's clock, in nanoseconds.
    fn kernel() -> HostClock {
        HostClock { tsc: false, hz: NS }
    }

    /// Ticks since some point in the past.
    #[inline(always)]
    pub fn now(&self) -> u64 {
        if self.tsc {
            // SAFETY: RDTSC only reads the counter; every x86-64 CPU has it.
            unsafe { _rdtsc() }
        } else {
            clock_ns(libc::CLOCK_MONOTONIC)
        }
    }

    /// Ticks per second.
    #[inline(always)]
    pub fn hz(&self) -> u64 {
        self.hz
    }

    /// Nanoseconds of `ticks`, rounded up, so that a sleep of them does not end early.
    #[inline]
    pub fn ns(&self, ticks: u64) -> u64 {
        u64::try_from((u128::from(ticks) * u128::from(NS)).div_ceil(u128::from(self.hz))).unwrap_or(u64::MAX)
    }
}

/// Let this thread's sleeps end when they should: by default the kernel may add 50 µs.
pub(super) fn precise_sleeps() {
    thread_local!(static DONE: std::cell::Cell<bool> = const { std::cell::Cell::new(false) });
    if !DONE.replace(true) {
        // SAFETY: PR_SET_TIMERSLACK takes a plain number and changes nothing else.
        unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1 as libc::c_ulong) };
    }
}

/// A kernel clock in nanoseconds.
pub(super) fn clock_ns(id: libc::clockid_t) -> u64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `t` is valid for writes; the clocks used here always exist, and on failure `t` stays zero.
    unsafe { libc::clock_gettime(id, &mut t) };
    (t.tv_sec as u64).wrapping_mul(NS).wrapping_add(t.tv_nsec as u64)
}

/// Whether the TSC runs at one rate on all CPUs and in all power states. The kernel watches it and takes it off its list if it does not.
fn tsc_is_stable() -> bool {
    match std::fs::read_to_string("/sys/devices/system/clocksource/clocksource0/available_clocksource") {
        Ok(list) => list.split_whitespace().any(|c| c == "tsc"),
        // Without the kernel's word: the invariant-TSC bit (AMD APM 3 appendix E, leaf 8000_0007h).
        Err(_) => __cpuid(0x8000_0000).eax >= 0x8000_0007 && __cpuid(0x8000_0007).edx >> 8 & 1 != 0,
    }
}

/// The TSC frequency as CPUID states it: by leaf 15h (Intel SDM 2A), or the timing leaf that hypervisors share.
fn stated_hz() -> Option<u64> {
    let top = __cpuid(0).eax;
    if top >= 0x15 {
        let l = __cpuid_count(0x15, 0);
        if l.eax != 0 && l.ebx != 0 && l.ecx != 0 {
            return Some(u64::from(l.ecx) * u64::from(l.ebx) / u64::from(l.eax));
        }
    }
    let hypervisor = __cpuid(1).ecx >> 31 != 0;
    if hypervisor && (0x4000_0010..0x4001_0000).contains(&__cpuid(0x4000_0000).eax) {
        let khz = __cpuid(0x4000_0010).eax;
        return (khz != 0).then(|| u64::from(khz) * 1000);
    }
    None
}

/// The TSC and the kernel's raw clock at the same moment: of several tries the one that took the shortest.
fn pair() -> (u64, u64) {
    let mut best = (0, 0, u64::MAX);
    for _ in 0..64 {
        // SAFETY: as in `HostClock::now`.
        let before = unsafe { _rdtsc() };
        let ns = clock_ns(libc::CLOCK_MONOTONIC_RAW);
        // SAFETY: as above.
        let after = unsafe { _rdtsc() };
        let took = after.wrapping_sub(before);
        if took < best.2 {
            best = (before.wrapping_add(took / 2), ns, took);
        }
    }
    (best.0, best.1)
}

/// Measure the TSC against the kernel's raw clock for 20 ms: the error is a few parts per million.
fn measured_hz() -> u64 {
    let (tsc0, ns0) = pair();
    std::thread::sleep(std::time::Duration::from_millis(20));
    let (tsc1, ns1) = pair();
    let ticks = u128::from(tsc1.wrapping_sub(tsc0));
    (ticks * u128::from(NS) / u128::from(ns1.wrapping_sub(ns0).max(1))).max(1) as u64
}

/// The time that a VM's vCPUs share.
pub struct VmTime {
    clock: HostClock,
    /// VM's TSC minus the host's ticks.
    offset: AtomicU64,
    /// A saved TSC was loaded since a vCPU last ran.
    restored: AtomicBool,
    /// The TSC at which time stands still.
    stopped: Mutex<Option<u64>>,
    /// The paravirtual clock minus the TSC in nanoseconds.
    clock_offset: AtomicU64,
}

impl VmTime {
    /// TSC zero is now.
    pub fn new() -> VmTime {
        let clock = HostClock::get();
        VmTime {
            clock,
            offset: AtomicU64::new(clock.now().wrapping_neg()),
            restored: AtomicBool::new(false),
            stopped: Mutex::new(None),
            clock_offset: AtomicU64::new(0),
        }
    }

    /// The VM's TSC, without any vCPU's adjustment.
    pub fn tsc(&self) -> u64 {
        self.stopped().unwrap_or_else(|| self.clock.now().wrapping_add(self.offset()))
    }

    /// The TSC at which time stands still, if it does.
    fn stopped(&self) -> Option<u64> {
        *self.stopped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The host's ticks now, or at the moment at which time stands still.
    pub(crate) fn host_moment(&self) -> u64 {
        self.stopped().map_or_else(|| self.clock.now(), |tsc| tsc.wrapping_sub(self.offset()))
    }

    /// Stop or start. No vCPU runs meanwhile.
    pub fn set_running(&self, running: bool) {
        let mut stopped = self.stopped.lock().unwrap_or_else(PoisonError::into_inner);
        if !running {
            stopped.get_or_insert_with(|| self.clock.now().wrapping_add(self.offset()));
        } else if let Some(tsc) = stopped.take() {
            self.offset.store(tsc.wrapping_sub(self.clock.now()), Ordering::SeqCst);
        }
    }

    fn offset(&self) -> u64 {
        self.offset.load(Ordering::SeqCst)
    }

    /// The paravirtual clock in nanoseconds: since the VM's TSC was zero, unless it was set.
    pub fn ns(&self) -> u64 {
        let since = (u128::from(self.tsc()) * u128::from(NS) / u128::from(self.clock.hz)) as u64;
        since.wrapping_add(self.clock_offset())
    }

    /// Set the paravirtual clock. No vCPU runs meanwhile; each follows when it next does.
    pub fn set_ns(&self, ns: u64) {
        let ahead = ns.wrapping_sub(self.ns());
        self.clock_offset.fetch_add(ahead, Ordering::SeqCst);
    }

    /// What the paravirtual clock is ahead of the TSC, in nanoseconds; wraps.
    pub fn clock_offset(&self) -> u64 {
        self.clock_offset.load(Ordering::SeqCst)
    }

    /// Continue from a saved TSC value (less adjustment). The values of one machine's vCPUs were read at slightly different moments and
    /// are loaded at such, while none of them runs: the first one counts, and what is within a second of it is the same clock. A value
    /// that was read less than a second ago (a debugger writes a register back) moves nothing.
    fn resume_at(&self, tsc: u64) {
        let mut stopped = self.stopped.lock().unwrap_or_else(PoisonError::into_inner);
        if stopped.is_some() {
            // Read while time stood still as well: the values are equal.
            *stopped = Some(tsc);
            self.offset.store(tsc.wrapping_sub(self.clock.now()), Ordering::SeqCst);
            return;
        }
        drop(stopped);
        let ahead = tsc.wrapping_sub(self.tsc()) as i64;
        let first = !self.restored.swap(true, Ordering::SeqCst);
        if ahead.unsigned_abs() > self.clock.hz || first && ahead > 0 {
            self.offset.store(tsc.wrapping_sub(self.clock.now()), Ordering::SeqCst);
        }
    }
}

impl Default for VmTime {
    fn default() -> Self {
        Self::new()
    }
}

impl VmShared {
    /// Frequency of the guest's TSC.
    pub fn tsc_hz(&self) -> u64 {
        self.time.clock.hz
    }
}

impl Cpu {
    /// The guest's TSC, read in program order: what the guest loaded before was loaded before.
    #[inline(always)]
    pub fn tsc(&self) -> u64 {
        // The guest's own LFENCE lies too many host instructions back to say anything about the host's RDTSC.
        // SAFETY: SSE2, which every x86-64 CPU has.
        unsafe { std::arch::x86_64::_mm_lfence() };
        self.local.clock.now().wrapping_add(self.tsc_offset)
    }

    /// The guest's TSC as it is saved: standing still while the VM's time does.
    pub(crate) fn saved_tsc(&self) -> u64 {
        self.env.vm.time.stopped().map_or_else(|| self.tsc(), |t| t.wrapping_add(self.local.tsc_adjust))
    }

    /// Recompute what follows from the VM's offset and the adjustment.
    pub(crate) fn follow_tsc(&mut self) {
        self.tsc_offset = self.env.vm.time.offset().wrapping_add(self.local.tsc_adjust);
        self.follow_tsc_deadline();
        self.refresh_system_time();
    }

    /// A run begins: follow the VM's offset, should another vCPU's saved state have moved it.
    pub(crate) fn begin_time(&mut self) {
        let time = &self.env.vm.time;
        time.restored.store(false, Ordering::SeqCst);
        // Only a pause takes ticks off the TSC; a saved one that was loaded has been followed already.
        let stood = self.tsc_offset.wrapping_sub(self.local.tsc_adjust).wrapping_sub(time.offset());
        if (stood as i64) > 0 {
            self.hold_back_timer(stood);
        }
        let time = &self.env.vm.time;
        if self.tsc_offset != time.offset().wrapping_add(self.local.tsc_adjust)
            || self.local.pv.clock_offset != time.clock_offset()
        {
            self.follow_tsc();
        }
    }

    /// The guest writes IA32_TSC: the adjustment moves with it (Intel SDM 3B section 18.17.3).
    pub(crate) fn set_tsc(&mut self, v: u64) {
        self.local.tsc_adjust = self.local.tsc_adjust.wrapping_add(v.wrapping_sub(self.tsc()));
        self.follow_tsc();
    }

    /// The guest writes IA32_TSC_ADJUST.
    pub(crate) fn set_tsc_adjust(&mut self, v: u64) {
        self.local.tsc_adjust = v;
        self.follow_tsc();
    }

    /// Load a saved TSC and IA32_TSC_ADJUST: time goes on from there, for the whole VM.
    pub fn restore_tsc(&mut self, tsc: u64, adjust: u64) {
        self.local.tsc_adjust = adjust;
        self.env.vm.time.resume_at(tsc.wrapping_sub(adjust));
        self.follow_tsc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conversions_do_not_overflow() {
        let c = HostClock { tsc: true, hz: 2_596_118_000 };
        assert_eq!(c.ns(2_596_118_000), NS);
        assert_eq!(c.ns(1), 1);
        // 100 years.
        let century = 100 * 365 * 86400 * 2_596_118_000u64;
        assert_eq!(c.ns(century), 100 * 365 * 86400 * NS);
        assert_eq!(HostClock { tsc: true, hz: 1 }.ns(u64::MAX), u64::MAX);
    }

    #[test]
    fn the_clock_keeps_time_with_the_kernel() {
        let c = HostClock::get();
        let (t0, k0) = (c.now(), clock_ns(libc::CLOCK_MONOTONIC_RAW));
        while clock_ns(libc::CLOCK_MONOTONIC_RAW) - k0 < 50_000_000 {
            std::hint::spin_loop();
        }
        let (t1, k1) = (c.now(), clock_ns(libc::CLOCK_MONOTONIC_RAW));
        let (ours, kernels) = (c.ns(t1 - t0) as f64, (k1 - k0) as f64);
        // 0.5 % leaves room for being preempted between the two reads.
        assert!((ours / kernels - 1.0).abs() < 0.005, "{ours} {kernels}");
    }

    #[test]
    fn stopped_time_goes_on_where_it_stood() {
        let t = VmTime::new();
        t.set_running(false);
        let stood = t.tsc();
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert_eq!((t.tsc(), t.tsc()), (stood, stood));
        t.set_running(false);
        t.set_running(true);
        let after = t.tsc();
        assert!(after >= stood && after - stood < t.clock.hz() / 100, "{stood} {after}");
        // A saved value counts while time stands still, be it ahead or behind.
        for saved in [after + 5 * t.clock.hz(), 1000] {
            t.set_running(false);
            t.resume_at(saved);
            assert_eq!(t.tsc(), saved);
            t.set_running(true);
            assert!(t.tsc() - saved < t.clock.hz() / 100);
        }
    }

    #[test]
    fn the_paravirtual_clock_goes_on_where_it_is_set() {
        let t = VmTime::new();
        for ns in [5 * NS, 1000] {
            t.set_running(false);
            t.set_ns(ns);
            assert_eq!(t.ns(), ns);
            t.set_running(true);
            assert!((ns..ns + NS / 100).contains(&t.ns()), "{}", t.ns());
        }
    }

    #[test]
    fn the_kernel_clock_counts_nanoseconds() {
        let c = HostClock::kernel();
        let before = c.now();
        assert_eq!((c.hz(), c.ns(17)), (NS, 17));
        assert!(c.now() >= before);
    }
}
