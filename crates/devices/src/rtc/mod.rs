//! The CMOS real-time clock and its RAM (Motorola MC146818A data sheet; ports as in the ICH9 data sheet section 13.6).
//!
//! The date is the machine's wall clock plus what the guest set it off by. Flags are computed when somebody looks
//! or an enabled interrupt is due, so a clock that nobody uses costs nothing.

mod calendar;
#[cfg(test)]
mod tests;

use crate::alarm::Alarm;
use crate::line::Output;
use crate::ports;
use calendar::DateTime;
use ringfort_bus::{Clock, Device, Format, IrqLine, PioDevice, Section, StateError, Timer, TimerDevice};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// First port; the second is the data port.
pub const BASE: u16 = 0x70;
/// Ports.
pub const LEN: u16 = 2;
/// ISA interrupt.
pub const IRQ: u8 = 8;
/// CMOS byte with the century, in BCD or binary as the clock is; FADT points to it.
pub const CENTURY: u8 = 0x32;
const KIND: &str = "mc146818";
/// How the state is laid out.
pub(crate) const FORMAT: Format = Format::of::<State>(KIND, 1);
const SECOND: i128 = 1_000_000_000;
/// "Update in progress" shows this long before the seconds change (data sheet figure 14).
const UIP_NS: i128 = 244_000;

const A: usize = 10;
const B: usize = 11;
const C: usize = 12;
mod b {
    pub const SET: u8 = 0x80;
    pub const PIE: u8 = 0x40;
    pub const AIE: u8 = 0x20;
    pub const UIE: u8 = 0x10;
    pub const SQWE: u8 = 0x08;
    pub const BINARY: u8 = 0x04;
    pub const HOURS_24: u8 = 0x02;
}
/// Registers that hold date and time.
const TIME: [u8; 8] = [0, 2, 4, 6, 7, 8, 9, CENTURY];

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    index: u8,
    nmi_masked: bool,
    cmos: Vec<u8>,
    /// Nanoseconds that the guest's clock is ahead of the machine's wall clock.
    offset: i128,
    /// The clock stands still (SET, or divider in reset): the phase within the second at which it goes on.
    stopped: Option<u32>,
    /// Second for which update and alarm flags have been computed.
    seen_second: i64,
    /// Ticks of the 32 kHz clock for which the periodic flag has been computed.
    seen_tick: u64,
}

/// Clock and 128 bytes of CMOS RAM.
pub struct Rtc {
    state: State,
    clock: Arc<dyn Clock>,
    alarm: Alarm,
    irq: Output,
}

impl Rtc {
    /// A clock that shows the machine's wall clock, 24-hour BCD, with zeroed RAM. `irq` is IRQ 8; `timer` is bound
    /// to its [`TimerDevice`].
    pub fn new(clock: Arc<dyn Clock>, timer: Arc<dyn Timer>, irq: Arc<dyn IrqLine>) -> Rtc {
        let mut cmos = vec![0; 128];
        cmos[A] = 0x26;
        cmos[B] = b::HOURS_24;
        let state = State {
            index: 0,
            nmi_masked: false,
            cmos,
            offset: 0,
            stopped: None,
            seen_second: 0,
            seen_tick: 0,
        };
        let mut rtc = Rtc { state, clock, alarm: Alarm::new(timer), irq: Output::new(irq) };
        rtc.state.seen_second = rtc.second();
        rtc.state.seen_tick = rtc.tick();
        rtc
    }

    /// Put a byte into CMOS RAM (14 to 127 but the century), as firmware would: memory size, boot order.
    pub fn set_cmos(&mut self, index: u8, value: u8) {
        if index > 13 && index != CENTURY && index < 128 {
            self.state.cmos[usize::from(index)] = value;
        }
    }

    /// Bit 7 of port 0x70: NMIs are held back.
    pub fn nmi_masked(&self) -> bool {
        self.state.nmi_masked
    }

    /// Show local time or any other offset from the wall clock, in seconds.
    pub fn set_offset(&mut self, seconds: i64) {
        self.state.offset = i128::from(seconds) * SECOND;
        self.state.seen_second = self.second();
        self.schedule();
    }

    /// Guest time in nanoseconds since 1970.
    fn guest_ns(&self) -> i128 {
        i128::from(self.clock.wall_ns()) + self.state.offset
    }

    fn second(&self) -> i64 {
        i64::try_from(self.guest_ns().div_euclid(SECOND)).unwrap_or(0)
    }

    /// Ticks of the 32768 Hz clock since machine start.
    fn tick(&self) -> u64 {
        (u128::from(self.clock.now_ns()) * 32_768 / 1_000_000_000) as u64
    }

    /// Ticks per periodic flag; `None` when the rate is 0 or the divider is in reset.
    fn period(&self) -> Option<u64> {
        let a = self.state.cmos[A];
        match a & 15 {
            0 => None,
            _ if a & 0x60 == 0x60 => None,
            // The two lowest codes are the rates of 8 and 9 again.
            r @ 1..=2 => Some(1 << (r + 6)),
            r => Some(1 << (r - 1)),
        }
    }

    fn encode(&self, v: u8) -> u8 {
        if self.state.cmos[B] & b::BINARY != 0 { v } else { (v / 10) << 4 | (v % 10) }
    }

    fn decode(&self, v: u8) -> u8 {
        if self.state.cmos[B] & b::BINARY != 0 { v } else { (v >> 4).saturating_mul(10) + (v & 15) }
    }

    fn encode_hour(&self, h: u8) -> u8 {
        if self.state.cmos[B] & b::HOURS_24 != 0 {
            return self.encode(h);
        }
        let twelve = match h % 12 {
            0 => 12,
            h => h,
        };
        self.encode(twelve) | if h >= 12 { 0x80 } else { 0 }
    }

    fn decode_hour(&self, v: u8) -> u8 {
        if self.state.cmos[B] & b::HOURS_24 != 0 {
            return self.decode(v);
        }
        self.decode(v & 0x7f) % 12 + if v & 0x80 != 0 { 12 } else { 0 }
    }

    /// Bring the time registers up to now.
    fn show(&mut self) {
        if self.state.stopped.is_some() {
            return;
        }
        let d = DateTime::from_unix(self.second());
        let values = [
            self.encode(d.second),
            self.encode(d.minute),
            self.encode_hour(d.hour),
            self.encode(d.weekday()),
            self.encode(d.day),
            self.encode(d.month),
            self.encode((d.year % 100) as u8),
            self.encode((d.year / 100) as u8),
        ];
        for (i, v) in TIME.into_iter().zip(values) {
            self.state.cmos[usize::from(i)] = v;
        }
    }

    /// Take date and time from the registers; `phase` is the part of the second that has passed.
    fn adopt(&mut self, phase: u32) {
        let r = |i: u8| self.decode(self.state.cmos[usize::from(i)]);
        let d = DateTime {
            year: u16::from(r(CENTURY).min(99)) * 100 + u16::from(r(9).min(99)),
            month: r(8).clamp(1, 12),
            day: r(7).clamp(1, 31),
            hour: self.decode_hour(self.state.cmos[4]).min(23),
            minute: r(2).min(59),
            second: r(0).min(59),
        };
        let guest = i128::from(d.to_unix()) * SECOND + i128::from(phase);
        self.state.offset = guest - i128::from(self.clock.wall_ns());
        self.state.seen_second = self.second();
    }

    /// SET or the divider changed: stop, or go on.
    fn run_or_stop(&mut self, divider_was_reset: bool) {
        let (ra, rb) = (self.state.cmos[A], self.state.cmos[B]);
        let divider_reset = ra & 0x60 == 0x60;
        let stop = rb & b::SET != 0 || divider_reset;
        match self.state.stopped {
            None if stop => {
                self.show();
                self.state.stopped = Some(self.guest_ns().rem_euclid(SECOND) as u32);
            }
            // Out of reset the first update comes after half a second (data sheet, divider control).
            Some(_) if stop && divider_was_reset && !divider_reset => self.state.stopped = Some(500_000_000),
            Some(_) if !stop && divider_was_reset => {
                self.state.stopped = None;
                self.adopt(500_000_000);
            }
            Some(phase) if !stop => {
                self.state.stopped = None;
                self.adopt(phase);
            }
            _ => {}
        }
    }

    fn alarm_matches(&self, register: usize, value: u8) -> bool {
        let v = self.state.cmos[register];
        // Both top bits set: any value.
        v & 0xc0 == 0xc0 || if register == 5 { self.decode_hour(v) == value } else { self.decode(v) == value }
    }

    /// First second after `from` at which the alarm matches, within a day.
    fn next_alarm(&self, from: i64) -> Option<i64> {
        let start = from.checked_add(1)?;
        let today = start.div_euclid(86_400);
        let now = start.rem_euclid(86_400);
        let (h0, m0, s0) = (now / 3600, now / 60 % 60, now % 60);
        for day in 0..2 {
            for h in (0..24i64).filter(|&h| self.alarm_matches(5, h as u8)) {
                if day == 0 && h < h0 {
                    continue;
                }
                for m in (0..60i64).filter(|&m| self.alarm_matches(3, m as u8)) {
                    if day == 0 && h == h0 && m < m0 {
                        continue;
                    }
                    let low = if day == 0 && (h, m) == (h0, m0) { s0 } else { 0 };
                    if let Some(s) = (low..60).find(|&s| self.alarm_matches(1, s as u8)) {
                        return Some((today + day) * 86_400 + h * 3600 + m * 60 + s);
                    }
                }
            }
        }
        None
    }

    /// Compute the flags up to now and drive the line.
    fn sync(&mut self) {
        let tick = self.tick();
        if let Some(p) = self.period()
            && tick / p > self.state.seen_tick / p
        {
            self.state.cmos[C] |= b::PIE;
        }
        self.state.seen_tick = tick;
        if self.state.stopped.is_none() {
            let second = self.second();
            if second > self.state.seen_second {
                self.state.cmos[C] |= b::UIE;
                if self.next_alarm(self.state.seen_second).is_some_and(|at| at <= second) {
                    self.state.cmos[C] |= b::AIE;
                }
            }
            // A wall clock that was set back is followed without an event.
            self.state.seen_second = second;
        }
        self.schedule();
    }

    /// Drive the line, and set the alarm for the next flag that would raise it.
    fn schedule(&mut self) {
        let (enabled, flags) = (self.state.cmos[B], self.state.cmos[C]);
        let asks = enabled & flags & (b::PIE | b::AIE | b::UIE) != 0;
        self.state.cmos[C] = flags & 0x70 | if asks { 0x80 } else { 0 };
        self.irq.set(asks);
        let now = self.clock.now_ns();
        let wait = enabled & !flags;
        let mut next: Option<u64> = None;
        let mut at = |t: u64| next = Some(next.map_or(t, |n| n.min(t)));
        if wait & b::PIE != 0
            && let Some(p) = self.period()
        {
            let tick = u128::from((self.state.seen_tick / p + 1) * p);
            at(u64::try_from((tick * 1_000_000_000).div_ceil(32_768)).unwrap_or(u64::MAX));
        }
        if self.state.stopped.is_none() {
            let guest = self.guest_ns();
            let mut at_second = |s: i64| {
                let ahead = (i128::from(s) * SECOND - guest).max(0);
                at(now.saturating_add(u64::try_from(ahead).unwrap_or(u64::MAX)));
            };
            if wait & b::UIE != 0 {
                at_second(self.state.seen_second.saturating_add(1));
            }
            if wait & b::AIE != 0
                && let Some(s) = self.next_alarm(self.state.seen_second)
            {
                at_second(s);
            }
        }
        // While the line is up nothing more can raise it; reading register C schedules anew.
        match next.filter(|_| !asks) {
            Some(t) => self.alarm.arm(t),
            None => self.alarm.cancel(),
        }
    }

    fn read_register(&mut self) -> u8 {
        let i = self.state.index;
        self.sync();
        match usize::from(i) {
            A => {
                let phase = self.guest_ns().rem_euclid(SECOND);
                let updating = self.state.stopped.is_none() && phase >= SECOND - UIP_NS;
                self.state.cmos[A] | if updating { 0x80 } else { 0 }
            }
            C => {
                let v = self.state.cmos[C];
                self.state.cmos[C] = 0;
                self.schedule();
                v
            }
            13 => 0x80,
            _ => {
                if TIME.contains(&i) {
                    self.show();
                }
                self.state.cmos[usize::from(i)]
            }
        }
    }

    fn write_register(&mut self, v: u8) {
        let i = self.state.index;
        self.sync();
        let divider_was_reset = self.state.cmos[A] & 0x60 == 0x60;
        match usize::from(i) {
            A => {
                self.state.cmos[A] = v & 0x7f;
                self.run_or_stop(divider_was_reset);
            }
            B => {
                if v & b::SET != 0 {
                    // The last update shows in the mode that it was made in; SET ends the update interrupt.
                    self.show();
                    self.state.cmos[B] = v & !b::UIE;
                } else {
                    self.state.cmos[B] = v;
                }
                self.run_or_stop(divider_was_reset);
            }
            C | 13 => {}
            _ if TIME.contains(&i) && self.state.stopped.is_none() => {
                self.show();
                self.state.cmos[usize::from(i)] = v;
                self.adopt(self.guest_ns().rem_euclid(SECOND) as u32);
            }
            n => self.state.cmos[n] = v,
        }
        self.schedule();
    }
}

impl PioDevice for Rtc {
    fn pio_read(&mut self, port: u16, data: &mut [u8]) {
        ports::read(port, data, |p| if p == BASE + 1 { self.read_register() } else { 0xff });
    }

    fn pio_write(&mut self, port: u16, data: &[u8]) {
        ports::write(port, data, |p, v| match p.wrapping_sub(BASE) {
            0 => {
                self.state.index = v & 0x7f;
                self.state.nmi_masked = v & 0x80 != 0;
            }
            1 => self.write_register(v),
            _ => {}
        });
    }
}

impl TimerDevice for Rtc {
    fn timer_expired(&mut self, _index: u32) {
        self.alarm.expired();
        self.sync();
    }
}

impl Device for Rtc {
    fn kind(&self) -> &'static str {
        KIND
    }

    /// Reset ends interrupts; time, modes and RAM are on the battery.
    fn reset(&mut self) {
        self.sync();
        self.state.cmos[B] &= !(b::PIE | b::AIE | b::UIE | b::SQWE);
        self.state.cmos[C] = 0;
        self.state.index = 0;
        self.state.nmi_masked = false;
        self.schedule();
    }

    fn save(&self) -> Section {
        Section::new(KIND, 0, 1, &self.state)
    }

    fn load(&mut self, section: &Section) -> Result<(), StateError> {
        let s: State = section.decode(KIND, 1)?;
        let far = 400_000_000_000 * SECOND;
        let sane = s.cmos.len() == 128
            && s.index < 128
            && (-far..far).contains(&s.offset)
            && s.stopped.is_none_or(|p| i128::from(p) < SECOND)
            && s.seen_second.unsigned_abs() < 1 << 60
            && s.seen_tick < 1 << 60;
        // The clock stands still exactly when SET or a divider in reset holds it.
        if !sane || s.stopped.is_some() != (s.cmos[B] & b::SET != 0 || s.cmos[A] & 0x60 == 0x60) {
            return Err(section.invalid("a register holds an impossible value"));
        }
        self.state = s;
        self.irq.set(self.state.cmos[C] & 0x80 != 0);
        // What fell due while the state lay in a file comes with the alarm.
        self.alarm.arm(self.clock.now_ns());
        Ok(())
    }
}
