//! Between blocks: requests of other threads, interrupts, and the states in which nothing executes.

use super::env::request;
use crate::cpu::{Activity, Cpu, InterruptKind, Shadow};
use ringfort_engine::{MpState, VcpuExit};
use ringfort_x86::flags::IF;
use ringfort_x86::segment::CS;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// About what it takes to wake a sleeping thread. A timer that is due sooner is waited for awake.
const WAKE_UP: Duration = Duration::from_micros(60);
/// The longest that HLT watches before it sleeps.
const POLL_MAX: Duration = Duration::from_micros(200);

impl Cpu {
    /// Act on requests and on states other than running; an exit if the caller is needed. A request that cannot be acted on
    /// yet is held until [`Cpu::interrupts_maybe`], so that it does not bring the run loop here again and again.
    #[cold]
    pub(super) fn look_up(&mut self) -> Option<VcpuExit> {
        let requests = self.env.me.requests.load(Ordering::SeqCst);
        if requests & request::KICK != 0 {
            self.done(request::KICK);
            return Some(VcpuExit::Kicked);
        }
        if requests & request::DROP_WRITES != 0 {
            self.mmu.drop_all_writes();
            // Cleared afterwards: who asked waits for it.
            self.done(request::DROP_WRITES);
        }
        if requests & request::CODE_PAGES != 0 {
            self.done(request::CODE_PAGES);
            self.take_code_posts();
        }
        if requests & request::TIMER != 0 {
            self.done(request::TIMER);
            self.check_timer();
        }
        if requests & request::INIT != 0 {
            self.done(request::INIT);
            self.init();
        }
        if requests & request::SIPI != 0 {
            self.done(request::SIPI);
            self.start_up();
        }
        match self.activity {
            Activity::Shutdown => return Some(VcpuExit::Shutdown),
            Activity::Waiting(_) => {
                // Interrupts stay in IRR, an NMI stays pending.
                self.hold_back(requests & (request::INTERRUPT | request::NMI));
                self.done(request::UNHALT);
                self.idle(None);
                return None;
            }
            Activity::Halted | Activity::Running => {}
        }
        if requests & request::NMI != 0 {
            self.look_at_nmi();
        } else if requests & request::INTERRUPT != 0 {
            self.look_at_interrupts();
        }
        if requests & request::UNHALT != 0 {
            self.done(request::UNHALT);
            self.local.unhalted = true;
        }
        if self.activity == Activity::Halted {
            // Not to sleep on what could be taken, should an instruction have forgotten `interrupts_maybe`.
            let held = self.local.held;
            let nmi = held & request::NMI != 0 && !self.nmi_blocked;
            let interrupt =
                held & request::INTERRUPT != 0 && self.sys_flags & IF != 0 && self.interrupt_deliverable();
            if nmi || interrupt {
                self.interrupts_maybe();
                return None;
            }
            if std::mem::take(&mut self.local.unhalted) {
                self.activity = Activity::Running;
            } else {
                self.idle(self.timer_wait());
            }
        }
        None
    }

    /// Before the state is read: act on what other threads and the timer have asked for and what has no place in a state.
    pub(crate) fn settle(&mut self) {
        self.settle_timer();
        let requests = self.env.me.requests.load(Ordering::SeqCst);
        if requests & request::INIT != 0 {
            self.done(request::INIT);
            self.init();
        }
        if self.activity == Activity::Halted && (requests & request::UNHALT != 0 || self.local.unhalted) {
            self.done(request::UNHALT);
            self.local.unhalted = false;
            self.activity = Activity::Running;
        }
    }

    fn done(&mut self, bits: u32) {
        self.env.me.requests.fetch_and(!bits, Ordering::SeqCst);
    }

    /// Clear request bits and keep them for later.
    fn hold_back(&mut self, bits: u32) {
        if bits != 0 {
            self.done(bits);
            self.hold(bits);
        }
    }

    fn look_at_nmi(&mut self) {
        // An NMI after STI waits as well: else `STI; HLT` could sleep through the interrupt that it waits for.
        if self.nmi_blocked || self.shadow != Shadow::None {
            self.hold_back(request::NMI);
            return;
        }
        self.done(request::NMI);
        self.activity = Activity::Running;
        self.nmi_blocked = true;
        self.deliver_interrupt(2, InterruptKind::Nmi);
    }

    fn look_at_interrupts(&mut self) {
        // Cleared before IRR is read: what is posted from now on sets it again.
        self.done(request::INTERRUPT);
        // A debugger's step waits for HLT's end like anybody else.
        let step = self.debugger.holds_interrupts() && self.activity == Activity::Running;
        if self.sys_flags & IF != 0 && self.shadow == Shadow::None && !step {
            if let Some(vector) = self.take_interrupt() {
                self.activity = Activity::Running;
                self.local.interrupts += 1;
                self.deliver_interrupt(vector, InterruptKind::Hardware);
            }
            // Another one that can be taken at once (through a trap gate, which leaves IF set).
            if self.sys_flags & IF != 0 && self.interrupt_deliverable() {
                self.env.me.requests.fetch_or(request::INTERRUPT, Ordering::SeqCst);
                return;
            }
        }
        if self.interrupt_waits() {
            self.hold(request::INTERRUPT);
        }
    }

    /// Wait until a request or `timeout`: watch for a moment where that is likely to pay, then sleep.
    fn idle(&mut self, timeout: Option<Duration>) {
        self.publish_counters();
        let clock = self.local.clock;
        let start = clock.now();
        let near = timeout.is_some_and(|t| t < WAKE_UP);
        if near || self.polls() {
            let window = if near { WAKE_UP } else { Duration::from_nanos(self.local.poll_ns.into()) };
            let window = timeout.map_or(window, |t| t.min(window)).as_nanos() as u64;
            while self.env.me.requests.load(Ordering::SeqCst) == 0
                && clock.ns(clock.now().saturating_sub(start)) < window
            {
                std::hint::spin_loop();
            }
        }
        let timeout = self.timer_wait();
        if self.env.me.requests.load(Ordering::SeqCst) == 0 && timeout.is_none_or(|t| !t.is_zero()) {
            self.local.sleeps += 1;
            let epoch = self.enter_sleep();
            self.env.vm.awake.fetch_sub(1, Ordering::Relaxed);
            self.env.me.wait(timeout);
            self.env.vm.awake.fetch_add(1, Ordering::Relaxed);
            self.leave_sleep(epoch);
        }
        self.check_timer();
        self.adapt_polling(clock.ns(clock.now().saturating_sub(start)));
    }

    /// Whether watching is allowed: the guest has not asked to do without, and no other vCPU waits for a host CPU.
    fn polls(&self) -> bool {
        self.local.poll_ns != 0
            && self.activity == Activity::Halted
            && self.local.pv.wants_polling()
            && self.env.vm.awake.load(Ordering::Relaxed) <= self.env.vm.host_cpus
    }

    /// Short waits make the next one watch, up to longer than a wake-up takes; long ones make it sleep at once, so that an idle guest
    /// costs nothing.
    fn adapt_polling(&mut self, waited_ns: u64) {
        let most = POLL_MAX.as_nanos() as u64;
        self.local.poll_ns =
            if waited_ns <= most { (self.local.poll_ns * 2).clamp(20_000, most as u32) } else { 0 };
    }

    /// INIT: the boot processor starts over at the reset vector, others wait for a start-up message (Intel SDM 3A section 9.4).
    fn init(&mut self) {
        self.done(request::INTERRUPT | request::UNHALT);
        self.reset(true);
        if self.env.me.lapic.base() & crate::apic::BASE_BSP == 0 {
            self.activity = Activity::Waiting(MpState::WaitForSipi);
        }
    }

    /// A start-up message: only a processor that waits for one takes it.
    fn start_up(&mut self) {
        if self.activity != Activity::Waiting(MpState::WaitForSipi) {
            return;
        }
        let vector = self.env.me.sipi_vector.load(Ordering::SeqCst) & 0xff;
        self.activity = Activity::Running;
        self.seg[CS].selector = (vector << 8) as u16;
        self.seg[CS].base = u64::from(vector) << 12;
        self.regs[usize::from(crate::cpu::RIP)] = 0;
        self.update_decode_mode();
        // An NMI that came while waiting.
        self.interrupts_maybe();
    }

    /// Bring the shared counters up to date.
    pub(super) fn publish_counters(&mut self) {
        let c = &self.env.me.counters;
        c.blocks.store(self.cache.decoded, Ordering::Relaxed);
        c.tlb_misses.store(self.mmu.misses, Ordering::Relaxed);
        c.interrupts.store(self.local.interrupts, Ordering::Relaxed);
        c.sleeps.store(self.local.sleeps, Ordering::Relaxed);
        if let Some(t) = &self.translator {
            c.translated.store(t.blocks, Ordering::Relaxed);
            c.flushes.store(t.flushes, Ordering::Relaxed);
            c.links.store(t.linked, Ordering::Relaxed);
            for (to, n) in c.exits.iter().zip(t.exits) {
                to.store(n, Ordering::Relaxed);
            }
        }
    }
}
