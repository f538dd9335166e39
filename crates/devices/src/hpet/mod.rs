//! The high-precision event timer (IA-PC HPET Specification 1.0a): a 64-bit counter of 10 ns ticks and 3 to 32
//! comparators, each one-shot or periodic, delivered on a pin, by message (FSB), or in place of PIT and RTC.

#[cfg(test)]
mod tests;

use crate::alarm::Alarm;
use crate::line::LineMux;
use ringfort_bus::{
    Clock, Device, Format, IrqLine, MmioDevice, MsiMessage, MsiSink, Section, StateError, Timer, TimerDevice,
};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Where a PC has it.
pub const BASE: u64 = 0xfed0_0000;
/// Bytes of its registers.
pub const LEN: u64 = 0x400;
/// Nanoseconds per tick.
pub const TICK_NS: u64 = 10;
/// I/O APIC inputs that a comparator can be routed to.
pub const ROUTES: u32 = 0x00ff_0104;
const KIND: &str = "hpet";
/// How the state is laid out.
pub(crate) const FORMAT: Format = Format::of::<State>(KIND, 1);
/// A periodic comparator wakes the host at most this often, whatever the guest programs.
const MIN_PERIOD_NS: u64 = 10_000;

mod conf {
    pub const LEVEL: u64 = 1 << 1;
    pub const ENABLE: u64 = 1 << 2;
    pub const PERIODIC: u64 = 1 << 3;
    pub const SET_VALUE: u64 = 1 << 6;
    pub const BITS_32: u64 = 1 << 8;
    pub const FSB: u64 = 1 << 14;
    /// Capabilities: periodic, 64 bits, FSB delivery, and the routes.
    pub const FIXED: u64 = 1 << 4 | 1 << 5 | 1 << 15 | (super::ROUTES as u64) << 32;
    pub const WRITABLE: u64 = LEVEL | ENABLE | PERIODIC | SET_VALUE | BITS_32 | 31 << 9 | FSB;
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Comparator {
    config: u64,
    value: u64,
    period: u64,
    /// Message: address in 63:32, data in 31:0.
    fsb: u64,
}

impl Comparator {
    fn new() -> Comparator {
        Comparator { config: 0, value: u64::MAX, period: 0, fsb: 0 }
    }

    fn mask(&self) -> u64 {
        if self.config & conf::BITS_32 != 0 { 0xffff_ffff } else { u64::MAX }
    }

    /// Ticks from `counter` until it equals the comparator next; `None` when that is a full turn of 64 bits away.
    fn distance(&self, counter: u64) -> Option<u64> {
        let mask = self.mask();
        match self.value.wrapping_sub(counter) & mask {
            0 if mask == u64::MAX => None,
            0 => Some(mask + 1),
            d => Some(d),
        }
    }

    fn route(&self) -> u8 {
        (self.config >> 9 & 31) as u8
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    enabled: bool,
    legacy: bool,
    status: u32,
    /// The counter when it stands still, else what to add to the machine's ticks.
    base: u64,
    /// Counter value up to which matches have been found.
    seen: u64,
    comparators: Vec<Comparator>,
}

/// Where comparators' interrupts go.
pub struct Outputs {
    /// I/O APIC inputs by number; `None` where [`ROUTES`] has no bit or nothing is connected.
    pub pins: Vec<Option<Arc<dyn IrqLine>>>,
    /// IRQ 0 and IRQ 8. With legacy replacement on, source 1 (`input(true)`) of each is selected, which
    /// comparators 0 and 1 drive.
    pub legacy: [Arc<LineMux>; 2],
    /// For messages.
    pub msi: Arc<dyn MsiSink>,
}

/// The timer block.
pub struct Hpet {
    state: State,
    clock: Arc<dyn Clock>,
    alarm: Alarm,
    out: Outputs,
    legacy: [Arc<dyn IrqLine>; 2],
    /// Levels that the pins (bits 31:0) and legacy lines (33:32) have.
    driven: u64,
}

impl Hpet {
    /// A block with `comparators` (cut to 3..=32). `timer` is bound to its [`TimerDevice`].
    pub fn new(comparators: u8, clock: Arc<dyn Clock>, timer: Arc<dyn Timer>, out: Outputs) -> Hpet {
        let legacy = [out.legacy[0].input(true), out.legacy[1].input(true)];
        let state = Self::power_on(usize::from(comparators.clamp(3, 32)));
        Hpet { state, clock, alarm: Alarm::new(timer), out, legacy, driven: 0 }
    }

    fn power_on(n: usize) -> State {
        State {
            enabled: false,
            legacy: false,
            status: 0,
            base: 0,
            seen: 0,
            comparators: vec![Comparator::new(); n],
        }
    }

    fn counter(&self) -> u64 {
        let run = if self.state.enabled { self.clock.now_ns() / TICK_NS } else { 0 };
        self.state.base.wrapping_add(run)
    }

    /// Make the counter show `value` now.
    fn set_counter(&mut self, value: u64) {
        let run = if self.state.enabled { self.clock.now_ns() / TICK_NS } else { 0 };
        self.state.base = value.wrapping_sub(run);
        self.state.seen = value;
    }

    /// Find the matches up to now and deliver them, then set the alarm for the next.
    fn sync(&mut self) {
        let now = self.counter();
        let elapsed = now.wrapping_sub(self.state.seen);
        let mut fired = false;
        if self.state.enabled && elapsed > 0 {
            for i in 0..self.state.comparators.len() {
                let seen = self.state.seen;
                let c = &mut self.state.comparators[i];
                if c.distance(seen).is_none_or(|d| d > elapsed) {
                    continue;
                }
                if c.config & conf::PERIODIC != 0 && c.period != 0 {
                    // On to the first period's end that is still to come.
                    let mask = c.mask();
                    let late = now.wrapping_sub(c.value) & mask;
                    let on = (late / c.period).wrapping_add(1).wrapping_mul(c.period);
                    c.value = c.value.wrapping_add(on) & mask;
                }
                fired |= c.config & conf::ENABLE != 0;
                self.fire(i);
            }
        }
        self.state.seen = now;
        self.schedule(now, fired);
    }

    fn schedule(&mut self, now: u64, fired: bool) {
        let open = |c: &&Comparator| c.config & conf::ENABLE != 0;
        let next = self.state.comparators.iter().filter(open).filter_map(|c| c.distance(now)).min();
        match next.filter(|_| self.state.enabled) {
            Some(d) => {
                let t = self.clock.now_ns();
                let at = (t / TICK_NS).saturating_add(d).saturating_mul(TICK_NS);
                self.alarm.arm(if fired { at.max(t.saturating_add(MIN_PERIOD_NS)) } else { at });
            }
            None => self.alarm.cancel(),
        }
    }

    fn fire(&mut self, i: usize) {
        let c = &self.state.comparators[i];
        if c.config & conf::ENABLE == 0 {
            return;
        }
        if c.config & conf::FSB != 0 {
            self.out.msi.send(MsiMessage { address: c.fsb >> 32, data: c.fsb as u32 });
        } else if c.config & conf::LEVEL != 0 {
            self.state.status |= 1 << i;
            self.drive();
        } else if let Some(line) = self.line(i)
            && self.driven & 1 << self.line_number(i) == 0
        {
            line.pulse();
        }
    }

    /// Number in `driven` of the line that comparator `i` uses.
    fn line_number(&self, i: usize) -> u32 {
        if self.state.legacy && i < 2 { 32 + i as u32 } else { u32::from(self.state.comparators[i].route()) }
    }

    fn line(&self, i: usize) -> Option<&Arc<dyn IrqLine>> {
        let n = self.line_number(i);
        self.line_at(n)
    }

    fn line_at(&self, n: u32) -> Option<&Arc<dyn IrqLine>> {
        match n {
            32 | 33 => self.legacy.get(n as usize - 32),
            n if ROUTES & 1 << n != 0 => self.out.pins.get(n as usize)?.as_ref(),
            _ => None,
        }
    }

    /// Put level-triggered comparators' state on their lines.
    fn drive(&mut self) {
        let mut want = 0u64;
        for (i, c) in self.state.comparators.iter().enumerate() {
            let open = c.config & (conf::ENABLE | conf::FSB | conf::LEVEL) == conf::ENABLE | conf::LEVEL;
            if open && self.state.enabled && self.state.status & 1 << i != 0 {
                want |= 1 << self.line_number(i);
            }
        }
        let changed = want ^ self.driven;
        self.driven = want;
        for n in (0..34).filter(|n| changed & 1 << n != 0) {
            if let Some(l) = self.line_at(n) {
                l.set(want & 1 << n != 0);
            }
        }
    }

    fn select_legacy(&self) {
        self.out.legacy.iter().for_each(|m| m.select(self.state.legacy));
    }

    fn read_register(&self, at: u64) -> u64 {
        let s = &self.state;
        match at {
            0x00 => {
                // Period in femtoseconds, vendor, legacy capable, 64 bits, last comparator, revision.
                let timers = (s.comparators.len() as u64 - 1) << 8;
                (TICK_NS * 1_000_000) << 32 | 0x8086 << 16 | 1 << 15 | 1 << 13 | timers | 1
            }
            0x10 => u64::from(s.enabled) | u64::from(s.legacy) << 1,
            0x20 => u64::from(s.status),
            0xf0 => self.counter(),
            0x100.. => match s.comparators.get((at as usize - 0x100) / 0x20) {
                Some(c) => match at & 0x18 {
                    0x00 => c.config | conf::FIXED,
                    0x08 => c.value,
                    0x10 => c.fsb,
                    _ => 0,
                },
                None => 0,
            },
            _ => 0,
        }
    }

    /// Write the bits of `mask`.
    fn write_register(&mut self, at: u64, v: u64, mask: u64) {
        self.sync();
        let merge = |old: u64| old & !mask | v & mask;
        match at {
            0x10 => {
                let new = merge(u64::from(self.state.enabled) | u64::from(self.state.legacy) << 1);
                let counter = self.counter();
                self.state.enabled = new & 1 != 0;
                self.set_counter(counter);
                if self.state.legacy != (new & 2 != 0) {
                    // Let go of the lines that comparators 0 and 1 used so far, then switch.
                    let held = std::mem::take(&mut self.state.status);
                    self.drive();
                    self.state.status = held;
                    self.state.legacy = new & 2 != 0;
                    self.select_legacy();
                }
            }
            0x20 => self.state.status &= !((v & mask) as u32),
            0xf0 => {
                let new = merge(self.counter());
                self.set_counter(new);
            }
            0x100.. => {
                let i = (at as usize - 0x100) / 0x20;
                if i < self.state.comparators.len() {
                    self.write_comparator(i, at & 0x18, merge);
                }
            }
            _ => {}
        }
        self.drive();
        let counter = self.counter();
        self.state.seen = counter;
        self.schedule(counter, false);
    }

    fn write_comparator(&mut self, i: usize, at: u64, merge: impl Fn(u64) -> u64) {
        let c = &mut self.state.comparators[i];
        match at {
            0x00 => {
                let mut new = merge(c.config) & conf::WRITABLE;
                if ROUTES & 1 << (new >> 9 & 31) == 0 {
                    // A route that does not exist reads back as another: so software finds out.
                    new &= !(31 << 9);
                }
                if new & conf::PERIODIC == 0 {
                    new &= !conf::SET_VALUE;
                }
                c.config = new;
                c.value &= c.mask();
                c.period &= c.mask();
                if new & (conf::LEVEL | conf::ENABLE) != conf::LEVEL | conf::ENABLE {
                    self.state.status &= !(1 << i);
                }
            }
            0x08 => {
                let new = merge(if c.config & conf::PERIODIC != 0 { c.period } else { c.value }) & c.mask();
                if c.config & conf::PERIODIC == 0 || c.config & conf::SET_VALUE != 0 {
                    c.value = new;
                }
                if c.config & conf::PERIODIC != 0 {
                    c.period = new;
                }
                c.config &= !conf::SET_VALUE;
            }
            0x10 => c.fsb = merge(c.fsb),
            _ => {}
        }
    }
}

impl MmioDevice for Hpet {
    fn mmio_read(&mut self, offset: u64, data: &mut [u8]) {
        let at = offset & !7 & (LEN - 1);
        // The counter is a clock source that guests read all the time; nothing else depends on it being read.
        if at != 0xf0 {
            self.sync();
        }
        let bytes = self.read_register(at).to_le_bytes();
        data.fill(0);
        data.iter_mut().zip(&bytes[(offset & 7) as usize..]).for_each(|(d, b)| *d = *b);
    }

    fn mmio_write(&mut self, offset: u64, data: &[u8]) {
        let at = offset & !7 & (LEN - 1);
        let (mut v, mut mask) = ([0u8; 8], [0u8; 8]);
        for (i, &b) in ((offset & 7) as usize..8).zip(data) {
            (v[i], mask[i]) = (b, 0xff);
        }
        self.write_register(at, u64::from_le_bytes(v), u64::from_le_bytes(mask));
    }
}

impl TimerDevice for Hpet {
    fn timer_expired(&mut self, _index: u32) {
        self.alarm.expired();
        self.sync();
    }
}

impl Device for Hpet {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn reset(&mut self) {
        self.state.status = 0;
        self.drive();
        self.state = Self::power_on(self.state.comparators.len());
        self.select_legacy();
        self.alarm.cancel();
    }

    fn save(&self) -> Section {
        Section::new(KIND, 0, 1, &self.state)
    }

    fn load(&mut self, section: &Section) -> Result<(), StateError> {
        let s: State = section.decode(KIND, 1)?;
        let n = self.state.comparators.len();
        if s.comparators.len() != n {
            return Err(section.invalid(format!("has {} comparators, not {n}", s.comparators.len())));
        }
        let fits = |c: &Comparator| {
            c.config & !conf::WRITABLE == 0
                && (c.route() == 0 || ROUTES & 1 << c.route() != 0)
                && (c.value | c.period) & !c.mask() == 0
        };
        if !s.comparators.iter().all(fits) || n < 32 && s.status >> n != 0 {
            return Err(section.invalid("a register holds an impossible value"));
        }
        self.state.status = 0;
        self.drive();
        self.state = s;
        self.select_legacy();
        self.drive();
        // What fell due while the state lay in a file comes with the alarm.
        self.alarm.arm(self.clock.now_ns());
        Ok(())
    }
}
