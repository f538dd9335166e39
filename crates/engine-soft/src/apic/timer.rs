//! The APIC timer (Intel SDM 3A section 12.5.4): nothing ticks; counts are computed from the host's clock.
//!
//! Deadlines are in ticks of the host's clock. The vCPU's thread looks at them between blocks and sleeps no longer than to the next one.

use super::{LVT_MASKED, reg};
use crate::cpu::Cpu;
use std::time::Duration;

/// Frequency that the timer counts at with divisor 1: KVM's, so that guests which know KVM take it for granted.
pub const TIMER_HZ: u64 = 1_000_000_000;

/// No deadline.
const NEVER: u64 = u64::MAX;

/// LVT timer modes: bits 17 and 18.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TimerMode {
    OneShot,
    Periodic,
    TscDeadline,
    Reserved,
}

fn mode(lvt: u32) -> TimerMode {
    match lvt >> 17 & 3 {
        0 => TimerMode::OneShot,
        1 => TimerMode::Periodic,
        2 => TimerMode::TscDeadline,
        _ => TimerMode::Reserved,
    }
}

/// State of the timer.
#[derive(Debug, Clone, Copy)]
pub struct Timer {
    /// When it next expires, in ticks of the host's clock; `u64::MAX` for never.
    deadline: u64,
    /// IA32_TSC_DEADLINE; zero when disarmed.
    tsc_deadline: u64,
}

impl Default for Timer {
    fn default() -> Timer {
        Timer { deadline: NEVER, tsc_deadline: 0 }
    }
}

/// The divisor that the divide configuration register means.
fn divisor(dcr: u32) -> u64 {
    let code = dcr & 3 | dcr >> 1 & 4;
    1 << ((code + 1) & 7)
}

impl Cpu {
    /// Look at the APIC timer: note an interrupt if it has expired.
    #[inline]
    pub fn check_timer(&mut self) {
        if self.local.timer.deadline != NEVER && self.local.clock.now() >= self.local.timer.deadline {
            self.timer_expired();
        }
        // Whoever sets IF calls `interrupts_maybe`; this bounds the harm of one that forgets.
        if self.local.held != 0 && self.sys_flags & ringfort_x86::flags::IF != 0 {
            self.interrupts_maybe();
        }
    }

    /// How long until the timer expires; `None` if it does not run.
    pub(crate) fn timer_wait(&self) -> Option<Duration> {
        let t = &self.local.timer;
        // A masked timer counts but wakes nobody.
        let masked = self.env.me.lapic.get(reg::LVT_TIMER) & LVT_MASKED != 0;
        (t.deadline != NEVER && !masked).then(|| {
            let left = t.deadline.saturating_sub(self.local.clock.now());
            Duration::from_nanos(self.local.clock.ns(left))
        })
    }

    /// Host ticks of `counts` counts at the current divisor.
    fn count_ticks(&self, counts: u32) -> u64 {
        let div = divisor(self.env.me.lapic.get(reg::DIVIDE));
        // At most 2^32 · 128 counts: no overflow in 128 bits, and the result fits for any clock below 2^54 Hz.
        (u128::from(counts) * u128::from(div) * u128::from(self.local.clock.hz()) / u128::from(TIMER_HZ))
            as u64
    }

    #[cold]
    fn timer_expired(&mut self) {
        let lapic = &self.env.me.lapic;
        self.local.timer.deadline = match mode(lapic.get(reg::LVT_TIMER)) {
            TimerMode::Periodic => {
                let period = self.count_ticks(lapic.get(reg::INITIAL_COUNT)).max(1);
                // Periods that passed unseen are one interrupt: IRR holds no more.
                let late = self.local.clock.now().saturating_sub(self.local.timer.deadline);
                self.local.timer.deadline.saturating_add((late / period + 1).saturating_mul(period))
            }
            _ => NEVER,
        };
        self.local.timer.tsc_deadline = 0;
        self.local_interrupt(reg::LVT_TIMER);
    }

    /// Before the state is read: what has run down by its moment, and has not been noticed, is noted. Afterwards a count of zero is one that
    /// is over, not one whose interrupt is still to come.
    pub(crate) fn settle_timer(&mut self) {
        if self.local.timer.deadline <= self.env.vm.time.host_moment() {
            self.timer_expired();
        }
    }

    /// The VM's time has stood still for `ticks`: a count that runs goes on where it was.
    pub(crate) fn hold_back_timer(&mut self, ticks: u64) {
        let t = &mut self.local.timer;
        if t.deadline != NEVER {
            t.deadline = t.deadline.saturating_add(ticks).min(NEVER - 1);
        }
    }

    /// The current count register.
    pub(super) fn current_count(&self) -> u32 {
        self.count_at(self.local.clock.now())
    }

    /// The current count register as it is saved: standing still while the VM's time does.
    pub(super) fn saved_count(&self) -> u32 {
        self.count_at(self.env.vm.time.host_moment())
    }

    fn count_at(&self, now: u64) -> u32 {
        let t = &self.local.timer;
        let lapic = &self.env.me.lapic;
        if t.deadline == NEVER
            || !matches!(mode(lapic.get(reg::LVT_TIMER)), TimerMode::OneShot | TimerMode::Periodic)
        {
            return 0;
        }
        let mut left = t.deadline.saturating_sub(now);
        let initial = lapic.get(reg::INITIAL_COUNT);
        if left == 0 && mode(lapic.get(reg::LVT_TIMER)) == TimerMode::Periodic {
            let period = self.count_ticks(initial).max(1);
            left = period - (now - t.deadline) % period;
        }
        let div = divisor(lapic.get(reg::DIVIDE));
        let hz = u128::from(self.local.clock.hz()) * u128::from(div);
        let count = (u128::from(left) * u128::from(TIMER_HZ)).div_ceil(hz);
        count.min(u128::from(initial)) as u32
    }

    /// A write to the initial count register. It starts the timer, or stops it with zero.
    pub(super) fn set_initial_count(&mut self, count: u32) {
        let lapic = &self.env.me.lapic;
        if mode(lapic.get(reg::LVT_TIMER)) == TimerMode::TscDeadline {
            return;
        }
        lapic.set(reg::INITIAL_COUNT, count);
        self.start_count(count);
    }

    /// Let the timer expire after `count` counts.
    pub(super) fn start_count(&mut self, count: u32) {
        self.local.timer.deadline =
            if count == 0 { NEVER } else { self.local.clock.now().saturating_add(self.count_ticks(count)) };
    }

    /// A write to the divide configuration register: the current count goes on at the new pace.
    pub(super) fn set_divide(&mut self, dcr: u32) {
        let left = self.current_count();
        self.env.me.lapic.set(reg::DIVIDE, dcr & 0xb);
        if left != 0 {
            self.start_count(left);
        }
    }

    /// A write to the timer's LVT entry, already masked to its valid bits.
    pub(super) fn set_timer_lvt(&mut self, v: u32) {
        let lapic = &self.env.me.lapic;
        let (old, new) = (mode(lapic.get(reg::LVT_TIMER)), mode(v));
        lapic.set(reg::LVT_TIMER, v);
        let deadline_mode = |m| m == TimerMode::TscDeadline;
        if old != new && (deadline_mode(old) || deadline_mode(new)) {
            // Switching between TSC-deadline and the other modes disarms the timer.
            lapic.set(reg::INITIAL_COUNT, 0);
            self.local.timer = Timer::default();
        }
    }

    /// IA32_TSC_DEADLINE.
    pub(crate) fn tsc_deadline(&self) -> u64 {
        self.local.timer.tsc_deadline
    }

    /// Write IA32_TSC_DEADLINE: ignored in the other modes.
    pub(crate) fn set_tsc_deadline(&mut self, v: u64) {
        if mode(self.env.me.lapic.get(reg::LVT_TIMER)) != TimerMode::TscDeadline {
            return;
        }
        self.local.timer.tsc_deadline = v;
        self.follow_tsc_deadline();
        // One in the past goes off at once.
        self.check_timer();
    }

    /// Convert the deadline again, after the guest's TSC or the deadline was written.
    pub(crate) fn follow_tsc_deadline(&mut self) {
        let t = self.local.timer.tsc_deadline;
        if mode(self.env.me.lapic.get(reg::LVT_TIMER)) == TimerMode::TscDeadline {
            let now = self.local.clock.now();
            let left = t.saturating_sub(now.wrapping_add(self.tsc_offset));
            self.local.timer.deadline = if t == 0 { NEVER } else { now.saturating_add(left).min(NEVER - 1) };
        }
    }
}
