//! One counter of an 8254. Nothing ticks: output and count are computed from the number of clock ticks since
//! the count was loaded, so nothing drifts and nothing is lost.

use ringfort_bus::irqchip::PitChannel;
use serde::{Deserialize, Serialize};

/// More ticks than any machine lives: a bound for saved states.
const FAR: u64 = 1 << 60;

/// How a counter counts from its load on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Run {
    /// Tick at which the count was loaded (or the half-cycle of mode 3 began).
    start: u64,
    /// Ticks that had passed when the gate went low; counting stands still.
    held: Option<u64>,
    /// Mode 3: began with the low half.
    low_first: bool,
}

/// One of the three counters (Intel 8254 data sheet).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Counter {
    mode: u8,
    bcd: bool,
    /// 1 low byte, 2 high byte, 3 low then high.
    access: u8,
    gate: bool,
    /// Counter register and the count in use: 1 to 0x10000.
    register: u32,
    count: u32,
    /// A new count waits for the end of the cycle, since this tick.
    next: Option<u64>,
    run: Option<Run>,
    null_count: bool,
    /// A count has been written since the control word: a trigger can load it.
    armed: bool,
    /// Low byte written, high byte to come.
    low_byte: Option<u8>,
    read_high: bool,
    latched: Option<u16>,
    latched_status: Option<u8>,
}

impl Counter {
    pub(super) fn new(gate: bool) -> Counter {
        Counter {
            mode: 3,
            bcd: false,
            access: 3,
            gate,
            register: 0x10000,
            count: 0x10000,
            next: None,
            run: None,
            null_count: true,
            armed: false,
            low_byte: None,
            read_high: false,
            latched: None,
            latched_status: None,
        }
    }

    pub(super) fn valid(&self) -> bool {
        matches!(self.mode, 0..=5)
            && matches!(self.access, 1..=3)
            && (1..=0x10000).contains(&self.register)
            && (1..=0x10000).contains(&self.count)
            && self.run.is_none_or(|r| r.start < FAR && r.held.is_none_or(|h| h < FAR))
            && self.next.is_none_or(|t| t < FAR)
    }

    /// In the form that hosts exchange, at `tick`.
    pub(super) fn channel(&self, tick: u64) -> PitChannel {
        let elapsed = self.run.as_ref().map(|r| self.elapsed(r, tick));
        PitChannel {
            count: self.count,
            mode: self.mode,
            bcd: self.bcd,
            access: self.access,
            gate: self.gate,
            elapsed_ns: elapsed.map(super::nanoseconds),
            low_byte: self.low_byte,
            read_high: self.read_high,
            latched: self.latched,
            latched_status: self.latched_status,
        }
    }

    /// From that form.
    pub(super) fn from_channel(c: &PitChannel, tick: u64) -> Counter {
        let count = c.count.clamp(1, 0x10000);
        let elapsed = c.elapsed_ns.map(super::ticks);
        Counter {
            mode: c.mode.min(5),
            bcd: c.bcd,
            access: if matches!(c.access, 1..=3) { c.access } else { 3 },
            gate: c.gate,
            register: count,
            count,
            next: None,
            run: elapsed.map(|e| {
                // A machine that has not been up for so long: a whole number of periods later is the same.
                let e = if e > tick { e % u64::from(count) } else { e };
                Run { start: tick.saturating_sub(e), held: (!c.gate).then_some(e), low_first: false }
            }),
            null_count: elapsed.is_none(),
            armed: elapsed.is_some(),
            low_byte: c.low_byte,
            read_high: c.read_high,
            latched: c.latched,
            latched_status: c.latched_status,
        }
    }

    pub(super) fn gate(&self) -> bool {
        self.gate
    }

    fn radix(&self) -> u64 {
        if self.bcd { 10_000 } else { 0x10000 }
    }

    /// Ticks since the load.
    fn elapsed(&self, r: &Run, tick: u64) -> u64 {
        r.held.unwrap_or_else(|| tick.saturating_sub(r.start))
    }

    /// Length of the half of mode 3 in which the run began, and of the other.
    fn halves(&self, r: &Run) -> (u64, u64) {
        let n = u64::from(self.count);
        if r.low_first { (n / 2, n.div_ceil(2)) } else { (n.div_ceil(2), n / 2) }
    }

    /// Tick at which a count that waits takes over: the end of the cycle (mode 2) or half-cycle (mode 3) in which
    /// it was written; and whether that is in the middle of a mode 3 cycle.
    fn boundary(&self) -> Option<(u64, bool)> {
        let (since, r) = (self.next?, self.run.as_ref().filter(|r| r.held.is_none())?);
        let n = u64::from(self.count);
        let wrote = since.saturating_sub(r.start);
        let whole = wrote / n * n;
        let first = self.halves(r).0;
        let middle = self.mode == 3 && wrote % n < first && first < n;
        Some((r.start.checked_add(whole + if middle { first } else { n })?, middle))
    }

    /// Tick at which a waiting count takes over.
    pub(super) fn reload_at(&self) -> Option<u64> {
        self.boundary().map(|b| b.0)
    }

    /// Take over a count that waited for a time that has come by `tick`; true when OUT rose at it.
    pub(super) fn settle(&mut self, tick: u64) -> bool {
        let (Some((at, middle)), Some(r)) = (self.boundary().filter(|b| b.0 <= tick), self.run) else {
            return false;
        };
        let low_first = r.low_first ^ middle;
        self.run = Some(Run { start: at, held: None, low_first });
        self.count = self.register;
        self.next = None;
        self.null_count = false;
        !low_first
    }

    /// The OUT pin.
    pub(super) fn out(&self, tick: u64) -> bool {
        let Some(r) = &self.run else { return self.mode != 0 };
        let (d, n) = (self.elapsed(r, tick), u64::from(self.count));
        match self.mode {
            0 => self.low_byte.is_none() && d >= n,
            1 => d >= n,
            2 => !self.gate || d % n != n - 1,
            3 => !self.gate || (d % n < self.halves(r).0) != r.low_first,
            _ => d != n,
        }
    }

    /// The count, as read.
    fn value(&self, tick: u64) -> u16 {
        let v = match &self.run {
            None => u64::from(self.count),
            Some(r) => {
                let (d, n) = (self.elapsed(r, tick), u64::from(self.count));
                match self.mode {
                    2 => n - d % n,
                    3 => {
                        let p = d % n;
                        let first = self.halves(r).0;
                        let in_half = if p < first { p } else { p - first };
                        (n & !1).saturating_sub(2 * in_half)
                    }
                    _ => (n + self.radix() - d % self.radix()) % self.radix(),
                }
            }
        };
        let v = v % self.radix();
        if self.bcd {
            (0..4).fold(0, |b, i| b | ((v / 10u64.pow(i) % 10) as u16) << (4 * i))
        } else {
            v as u16
        }
    }

    /// Ticks from `tick` on until OUT rises next, when it will by itself.
    pub(super) fn next_rise(&self, tick: u64) -> Option<u64> {
        let r = self.run.as_ref().filter(|r| r.held.is_none())?;
        let (d, n) = (self.elapsed(r, tick), u64::from(self.count));
        match self.mode {
            0 | 1 => r.start.checked_add(n).filter(|_| d < n),
            2 if self.gate => r.start.checked_add((d / n + 1) * n),
            3 if self.gate => {
                let first = self.halves(r).0;
                let rise = if r.low_first { first } else { n };
                let at = d / n * n + rise;
                r.start.checked_add(if at > d { at } else { at + n })
            }
            4 | 5 => r.start.checked_add(n + 1).filter(|_| d <= n),
            _ => None,
        }
    }

    pub(super) fn control(&mut self, v: u8) {
        let gate = self.gate;
        *self = Counter::new(gate);
        self.access = v >> 4 & 3;
        self.mode = match v >> 1 & 7 {
            m @ 0..=5 => m,
            m => m & 3,
        };
        self.bcd = v & 1 != 0;
    }

    pub(super) fn latch(&mut self, tick: u64) {
        if self.latched.is_none() {
            self.latched = Some(self.value(tick));
        }
    }

    pub(super) fn latch_status(&mut self, tick: u64) {
        if self.latched_status.is_none() {
            let flags = u8::from(self.out(tick)) << 7 | u8::from(self.null_count) << 6;
            self.latched_status = Some(flags | self.access << 4 | self.mode << 1 | u8::from(self.bcd));
        }
    }

    pub(super) fn read(&mut self, tick: u64) -> u8 {
        if let Some(s) = self.latched_status.take() {
            return s;
        }
        let v = self.latched.unwrap_or_else(|| self.value(tick));
        let high = match self.access {
            1 => false,
            2 => true,
            _ => {
                self.read_high = !self.read_high;
                !self.read_high
            }
        };
        if self.access != 3 || high {
            self.latched = None;
        }
        v.to_le_bytes()[usize::from(high)]
    }

    pub(super) fn write(&mut self, tick: u64, v: u8) {
        let raw = match (self.access, self.low_byte.take()) {
            (1, _) => u16::from(v),
            (2, _) => u16::from(v) << 8,
            (_, Some(low)) => u16::from(low) | u16::from(v) << 8,
            (_, None) => {
                // In mode 0 the first byte stops counting and OUT stays low until the second has come.
                self.low_byte = Some(v);
                if self.mode == 0 {
                    self.run = None;
                }
                return;
            }
        };
        let n = if self.bcd {
            (0..4).fold(0, |n, i| n + u32::from(raw >> (4 * i) & 15) * 10u32.pow(i))
        } else {
            u32::from(raw)
        };
        // Digits above 9 make more than four of them; the counter has no more.
        self.register = if self.bcd { n.min(9999) } else { n };
        if self.register == 0 {
            self.register = self.radix() as u32;
        }
        self.null_count = true;
        self.armed = true;
        match (self.mode, self.run) {
            // Loaded by the next trigger only.
            (1 | 5, _) => {}
            (2 | 3, Some(_)) => self.next = Some(tick),
            _ => self.load(tick),
        }
    }

    fn load(&mut self, tick: u64) {
        self.count = self.register;
        self.next = None;
        self.null_count = false;
        let held = (!self.gate).then_some(0);
        self.run = Some(Run { start: tick, held, low_first: false });
    }

    pub(super) fn set_gate(&mut self, tick: u64, gate: bool) {
        if gate == self.gate {
            return;
        }
        self.gate = gate;
        match (self.mode, gate) {
            (0 | 4, false) => {
                if let Some(r) = &mut self.run {
                    r.held = Some(r.held.unwrap_or(tick.saturating_sub(r.start)));
                }
            }
            (0 | 4, true) => {
                if let Some(r) = &mut self.run
                    && let Some(d) = r.held.take()
                {
                    r.start = tick.saturating_sub(d);
                }
            }
            (2 | 3, false) => {
                if let Some(r) = &mut self.run {
                    r.held = Some(tick.saturating_sub(r.start));
                }
            }
            // A trigger: needs a count to have been written.
            (2 | 3, true) if self.run.is_some() => self.load(tick),
            (1 | 5, true) if self.armed => self.load(tick),
            _ => {}
        }
    }
}
