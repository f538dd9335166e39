//! The 8254 interval timer and system control port B (0x61) of a PC (Intel 8254 data sheet; ICH9 data sheet
//! section 13.7.1).
//!
//! Channel 0 drives IRQ 0, channel 1 was for DRAM refresh, channel 2 goes to the speaker and to bit 5 of port 0x61.
//! Time comes from the machine's clock; when the machine falls behind, edges that were missed are not made
//! up for: one is given and the schedule goes on where it would be.

mod counter;
#[cfg(test)]
mod tests;

use crate::alarm::Alarm;
use crate::ports;
use counter::Counter;
use ringfort_bus::irqchip::PitRegisters;
use ringfort_bus::{Clock, Device, Format, IrqLine, PioDevice, Section, StateError, Timer, TimerDevice};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Input clock, Hz.
pub const FREQUENCY: u64 = 1_193_182;
/// Ports: first and length of each range.
pub const PORTS: [(u16, u16); 2] = [(0x40, 4), (0x61, 1)];
const KIND: &str = "i8254";
/// How the state is laid out.
pub(crate) const FORMAT: Format = Format::of::<State>(KIND, 1);
/// A periodic channel 0 wakes the host at most this often, whatever the guest programs.
const MIN_PERIOD_NS: u64 = 20_000;

/// Ticks of the input clock in `ns`.
fn ticks(ns: u64) -> u64 {
    (u128::from(ns) * u128::from(FREQUENCY) / 1_000_000_000) as u64
}

/// First nanosecond at which `tick` has been reached.
fn nanoseconds(tick: u64) -> u64 {
    let ns = (u128::from(tick) * 1_000_000_000).div_ceil(u128::from(FREQUENCY));
    u64::try_from(ns).unwrap_or(u64::MAX)
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    counters: [Counter; 3],
    /// Bits 3:0 of port 0x61: gate 2, speaker, parity and channel check disable.
    control: u8,
    /// Tick of the next rise of OUT 0 that has not been given to the line.
    edge: Option<u64>,
    /// Level given to channel 0's line.
    level: bool,
}

impl State {
    fn new() -> State {
        State {
            counters: [Counter::new(true), Counter::new(true), Counter::new(false)],
            control: 0,
            edge: None,
            level: false,
        }
    }
}

/// Timer and port 0x61.
pub struct Pit {
    state: State,
    clock: Arc<dyn Clock>,
    alarm: Alarm,
    irq: Arc<dyn IrqLine>,
}

impl Pit {
    /// `irq` is IRQ 0; `timer` is bound to this device's [`TimerDevice`] with any index.
    pub fn new(clock: Arc<dyn Clock>, timer: Arc<dyn Timer>, irq: Arc<dyn IrqLine>) -> Pit {
        Pit { state: State::new(), clock, alarm: Alarm::new(timer), irq }
    }

    /// The speaker is on and its channel's output is high.
    pub fn speaker(&mut self) -> bool {
        let t = ticks(self.clock.now_ns());
        self.state.counters[2].settle(t);
        self.state.control & 2 != 0 && self.state.counters[2].out(t)
    }

    /// Give channel 0's line what is due by now, find the next rise, and set the alarm.
    fn sync(&mut self) -> u64 {
        let now = self.clock.now_ns();
        let t = ticks(now);
        for c in &mut self.state.counters[1..] {
            c.settle(t);
        }
        let c = &mut self.state.counters[0];
        let rose = c.settle(t) | self.state.edge.is_some_and(|e| e <= t);
        if rose {
            self.irq.set(false);
            self.irq.set(true);
            self.state.level = true;
        }
        self.schedule(now, t, rose);
        t
    }

    fn schedule(&mut self, now: u64, t: u64, rose: bool) {
        let c = &self.state.counters[0];
        let reload = c.reload_at();
        self.state.edge = if reload.is_some() { None } else { c.next_rise(t) };
        match reload.or(self.state.edge) {
            Some(at) => {
                let soonest = if rose { now.saturating_add(MIN_PERIOD_NS) } else { 0 };
                self.alarm.arm(nanoseconds(at).max(soonest));
            }
            None => self.alarm.cancel(),
        }
    }

    /// After a write to channel 0: its output may have changed at once.
    fn follow(&mut self, t: u64) {
        self.state.level = self.state.counters[0].out(t);
        self.irq.set(self.state.level);
        let now = self.clock.now_ns();
        self.schedule(now, t, false);
    }

    fn read_port(&mut self, port: u16) -> u8 {
        let t = self.sync();
        let s = &mut self.state;
        match port {
            0x40..=0x42 => s.counters[usize::from(port & 3)].read(t),
            0x61 => {
                // Refresh toggles with every 18 ticks of channel 1's usual programming.
                let refresh = u8::from(t / 18 % 2 == 1) << 4;
                s.control | refresh | u8::from(s.counters[2].out(t)) << 5
            }
            _ => 0xff,
        }
    }

    fn write_port(&mut self, port: u16, v: u8) {
        let t = self.sync();
        let s = &mut self.state;
        match port {
            0x40..=0x42 => s.counters[usize::from(port & 3)].write(t, v),
            0x43 if v >> 6 == 3 => {
                // Read-back: bit 5 low latches counts, bit 4 low latches status.
                for (i, c) in s.counters.iter_mut().enumerate().filter(|(i, _)| v & (2 << i) != 0) {
                    debug_assert!(i < 3);
                    if v & 0x20 == 0 {
                        c.latch(t);
                    }
                    if v & 0x10 == 0 {
                        c.latch_status(t);
                    }
                }
            }
            0x43 => {
                let c = &mut s.counters[usize::from(v >> 6)];
                if v & 0x30 == 0 {
                    c.latch(t);
                    return;
                }
                c.control(v);
            }
            0x61 => {
                s.control = v & 0x0f;
                s.counters[2].set_gate(t, v & 1 != 0);
            }
            _ => return,
        }
        if port == 0x40 || port == 0x43 && v >> 6 == 0 {
            self.follow(t);
        }
    }
}

impl Pit {
    /// Registers, for a host that has the timer in its kernel.
    pub fn registers(&self) -> PitRegisters {
        let t = ticks(self.clock.now_ns());
        let channels = self.state.counters.each_ref().map(|c| c.channel(t));
        PitRegisters { channels, speaker: self.state.control & 2 != 0 }
    }

    /// Take registers over from such a host.
    pub fn set_registers(&mut self, r: &PitRegisters) {
        let now = self.clock.now_ns();
        let t = ticks(now);
        self.state.counters = r.channels.each_ref().map(|c| Counter::from_channel(c, t));
        // Channels 0 and 1 have no gate that could be low.
        for c in &mut self.state.counters[..2] {
            c.set_gate(t, true);
        }
        let gate = self.state.counters[2].gate();
        self.state.control = u8::from(gate) | u8::from(r.speaker) << 1;
        self.state.level = self.state.counters[0].out(t);
        self.schedule(now, t, false);
    }
}

impl PioDevice for Pit {
    fn pio_read(&mut self, port: u16, data: &mut [u8]) {
        ports::read(port, data, |p| self.read_port(p));
    }
    fn pio_write(&mut self, port: u16, data: &[u8]) {
        ports::write(port, data, |p, v| self.write_port(p, v));
    }
}

impl TimerDevice for Pit {
    fn timer_expired(&mut self, _index: u32) {
        self.alarm.expired();
        self.sync();
    }
}

impl Device for Pit {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn reset(&mut self) {
        self.state = State::new();
        self.alarm.cancel();
        self.irq.set(false);
    }

    fn save(&self) -> Section {
        Section::new(KIND, 0, 1, &self.state)
    }

    fn load(&mut self, section: &Section) -> Result<(), StateError> {
        let s: State = section.decode(KIND, 1)?;
        let gates = s.counters.each_ref().map(Counter::gate) == [true, true, s.control & 1 != 0];
        if !gates || !s.counters.iter().all(Counter::valid) || s.control > 15 {
            return Err(section.invalid("a counter holds an impossible value"));
        }
        self.state = s;
        self.irq.set(self.state.level);
        // An edge that is due by now comes with the alarm, which goes off at once.
        match self.state.counters[0].reload_at().or(self.state.edge) {
            Some(at) => self.alarm.arm(nanoseconds(at)),
            None => self.alarm.cancel(),
        }
        Ok(())
    }
}
