//! ACPI fixed hardware: PM1 event and control blocks, PM timer, GPE0 block, SMI command port (ACPI 6.5 section 4.8;
//! offsets as in the ICH9 data sheet section 13.8.3).

mod reset;
#[cfg(test)]
mod tests;

pub(crate) use reset::FORMAT as RESET_FORMAT;
pub use reset::ResetControl;

use crate::alarm::Alarm;
use crate::line::Output;
use crate::power::{PowerEvent, PowerSink};
use ringfort_bus::{Clock, Device, Format, IrqLine, PioDevice, Section, StateError, Timer, TimerDevice};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Usual first port of the register block.
pub const BASE: u16 = 0x600;
/// Ports of the register block.
pub const LEN: u16 = 0x80;
/// Offset of the PM1a event block (4 bytes: status, enable).
pub const PM1_EVENT: u16 = 0;
/// Offset of the PM1a control block (2 bytes).
pub const PM1_CONTROL: u16 = 4;
/// Offset of the PM timer (4 bytes).
pub const PM_TIMER: u16 = 8;
/// Offset of the GPE0 block.
pub const GPE0: u16 = 0x20;
/// Bytes of the GPE0 block: half status, half enable.
pub const GPE0_LEN: u16 = 16;
/// SMI command port.
pub const SMI_COMMAND: u16 = 0xb2;
/// Value for [`SMI_COMMAND`] that switches ACPI on.
pub const ACPI_ENABLE: u8 = 0x02;
/// Value for [`SMI_COMMAND`] that switches ACPI off.
pub const ACPI_DISABLE: u8 = 0x03;
/// PM timer frequency, Hz.
pub const TIMER_FREQUENCY: u64 = 3_579_545;

/// SLP_TYP values, for the `\_Sx` packages of the DSDT (ICH9 data sheet, PM1_CNT).
pub mod sleep_type {
    /// Working.
    pub const S0: u8 = 0;
    /// Power-on suspend.
    pub const S1: u8 = 1;
    /// Suspend to RAM.
    pub const S3: u8 = 5;
    /// Suspend to disk.
    pub const S4: u8 = 6;
    /// Soft off.
    pub const S5: u8 = 7;
}

mod sts {
    pub const TIMER: u16 = 1;
    pub const POWER_BUTTON: u16 = 1 << 8;
    pub const SLEEP_BUTTON: u16 = 1 << 9;
    pub const RTC: u16 = 1 << 10;
    pub const WAKE: u16 = 1 << 15;
    pub const ALL: u16 = TIMER | 1 << 4 | 1 << 5 | POWER_BUTTON | SLEEP_BUTTON | RTC | WAKE;
    /// Events that have an enable bit.
    pub const ENABLES: u16 = TIMER | 1 << 5 | POWER_BUTTON | SLEEP_BUTTON | RTC;
}
const SCI_ENABLE: u16 = 1;
const SLEEP_ENABLE: u16 = 1 << 13;
/// SCI_EN, BM_RLD, SLP_TYP; GBL_RLS and SLP_EN read as 0.
const CONTROL_BITS: u16 = SCI_ENABLE | 2 | 7 << 10;
const KIND: &str = "acpi-pm";
/// How the state is laid out.
pub(crate) const FORMAT: Format = Format::of::<(State, bool)>(KIND, 1);

/// How the block is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// ACPI mode is on after reset (a machine without SMM and firmware); else the SMI command port switches it on.
    pub acpi_on: bool,
    /// The PM timer has 32 bits (FADT flag TMR_VAL_EXT), else 24.
    pub timer_32bit: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    status: u16,
    enable: u16,
    control: u16,
    gpe_status: u64,
    gpe_enable: u64,
    smi: [u8; 2],
    /// How often the timer's top bit had changed when TMR_STS was last brought up to date.
    seen_toggles: u64,
}

/// The register block, wherever the LPC bridge's PMBASE puts it, and ports 0xB2/0xB3.
pub struct AcpiPm {
    state: State,
    config: Config,
    base: u16,
    clock: Arc<dyn Clock>,
    alarm: Alarm,
    sci: Output,
    power: Arc<dyn PowerSink>,
}

impl AcpiPm {
    /// A block at [`BASE`]. `sci` is the level-triggered system control interrupt (IRQ 9 on a PC); `timer` is bound
    /// to its [`TimerDevice`].
    pub fn new(
        config: Config,
        clock: Arc<dyn Clock>,
        timer: Arc<dyn Timer>,
        sci: Arc<dyn IrqLine>,
        power: Arc<dyn PowerSink>,
    ) -> AcpiPm {
        let mut pm = AcpiPm {
            state: Self::power_on(config),
            config,
            base: BASE,
            clock,
            alarm: Alarm::new(timer),
            sci: Output::new(sci),
            power,
        };
        pm.state.seen_toggles = pm.toggles();
        pm
    }

    fn power_on(config: Config) -> State {
        State {
            status: 0,
            enable: 0,
            control: u16::from(config.acpi_on) * SCI_ENABLE,
            gpe_status: 0,
            gpe_enable: 0,
            smi: [0; 2],
            seen_toggles: 0,
        }
    }

    /// The guest moved the block (PMBASE). The machine also moves it on its port bus.
    pub fn set_base(&mut self, base: u16) {
        self.base = base;
    }

    /// The power button was pressed: the guest gets an event. Until it enables it, only the status bit shows.
    pub fn power_button(&mut self) {
        self.raise(sts::POWER_BUTTON);
    }

    /// The sleep button was pressed.
    pub fn sleep_button(&mut self) {
        self.raise(sts::SLEEP_BUTTON);
    }

    /// The real-time clock's alarm went off.
    pub fn rtc_alarm(&mut self) {
        self.raise(sts::RTC);
    }

    /// General-purpose event `n` (0 to 63).
    pub fn gpe(&mut self, n: u8) {
        if n < 64 {
            self.state.gpe_status |= 1 << n;
            self.update();
        }
    }

    /// The guest listens to the power button (so that pressing it can be expected to do something).
    pub fn power_button_enabled(&self) -> bool {
        self.state.control & SCI_ENABLE != 0 && self.state.enable & sts::POWER_BUTTON != 0
    }

    fn raise(&mut self, bit: u16) {
        self.state.status |= bit;
        self.update();
    }

    fn count(&self) -> u64 {
        (u128::from(self.clock.now_ns()) * u128::from(TIMER_FREQUENCY) / 1_000_000_000) as u64
    }

    fn top_bit(&self) -> u32 {
        if self.config.timer_32bit { 31 } else { 23 }
    }

    fn toggles(&self) -> u64 {
        self.count() >> self.top_bit()
    }

    /// Bring TMR_STS up to date, drive the SCI, set the alarm for the timer's next event.
    fn update(&mut self) {
        let toggles = self.toggles();
        if toggles > self.state.seen_toggles {
            self.state.status |= sts::TIMER;
        }
        self.state.seen_toggles = toggles;
        let s = &self.state;
        let events = s.status & s.enable & sts::ENABLES != 0 || s.gpe_status & s.gpe_enable != 0;
        self.sci.set(events && s.control & SCI_ENABLE != 0);
        if s.enable & sts::TIMER != 0 && s.status & sts::TIMER == 0 {
            let at = u128::from(toggles + 1) << self.top_bit();
            let ns = (at * 1_000_000_000).div_ceil(u128::from(TIMER_FREQUENCY));
            self.alarm.arm(u64::try_from(ns).unwrap_or(u64::MAX));
        } else {
            self.alarm.cancel();
        }
    }

    fn read_byte(&self, port: u16, count: u64) -> u8 {
        let s = &self.state;
        if port & !1 == SMI_COMMAND {
            return s.smi[usize::from(port & 1)];
        }
        let byte = |v: u64, i: u16| v.to_le_bytes()[usize::from(i)];
        match port.wrapping_sub(self.base) {
            i @ 0..2 => byte(u64::from(s.status), i),
            i @ 2..4 => byte(u64::from(s.enable), i - 2),
            i @ 4..6 => byte(u64::from(s.control), i - 4),
            i @ 8..12 => {
                let mask = if self.config.timer_32bit { 0xffff_ffff } else { 0xff_ffff };
                byte(count & mask, i - 8)
            }
            i @ 0x20..0x28 => byte(s.gpe_status, i - 0x20),
            i @ 0x28..0x30 => byte(s.gpe_enable, i - 0x28),
            0..LEN => 0,
            _ => 0xff,
        }
    }

    fn write_byte(&mut self, port: u16, v: u8) {
        if port & !1 == SMI_COMMAND {
            self.state.smi[usize::from(port & 1)] = v;
            match (port, v) {
                (SMI_COMMAND, ACPI_ENABLE) => self.state.control |= SCI_ENABLE,
                (SMI_COMMAND, ACPI_DISABLE) => self.state.control &= !SCI_ENABLE,
                _ => {}
            }
            return;
        }
        let s = &mut self.state;
        let set = |old: u64, i: u16| old & !(0xff << (8 * i)) | u64::from(v) << (8 * i);
        match port.wrapping_sub(self.base) {
            i @ 0..2 => s.status &= !(u16::from(v) << (8 * i)),
            i @ 2..4 => s.enable = set(u64::from(s.enable), i - 2) as u16 & sts::ENABLES,
            i @ 4..6 => {
                let written = set(u64::from(s.control), i - 4) as u16;
                s.control = written & CONTROL_BITS;
                if i == 5 && written & SLEEP_ENABLE != 0 {
                    self.sleep((written >> 10 & 7) as u8);
                }
            }
            i @ 0x20..0x28 => s.gpe_status &= !(u64::from(v) << (8 * (i - 0x20))),
            i @ 0x28..0x30 => s.gpe_enable = set(s.gpe_enable, i - 0x28),
            _ => {}
        }
    }

    fn sleep(&mut self, kind: u8) {
        match kind {
            sleep_type::S4 | sleep_type::S5 => self.power.event(PowerEvent::PowerOff),
            kind => {
                if kind == sleep_type::S3 {
                    self.power.event(PowerEvent::Suspend);
                }
                // Awake again at once: the guest waits for this bit.
                self.state.status |= sts::WAKE;
            }
        }
    }
}

impl PioDevice for AcpiPm {
    fn pio_read(&mut self, port: u16, data: &mut [u8]) {
        self.update();
        // One count for all bytes of the access.
        let count = self.count();
        for (i, b) in data.iter_mut().enumerate() {
            *b = self.read_byte(port.wrapping_add(i as u16), count);
        }
    }

    fn pio_write(&mut self, port: u16, data: &[u8]) {
        self.update();
        for (i, &b) in data.iter().enumerate() {
            self.write_byte(port.wrapping_add(i as u16), b);
        }
        self.update();
    }
}

impl TimerDevice for AcpiPm {
    fn timer_expired(&mut self, _index: u32) {
        self.alarm.expired();
        self.update();
    }
}

impl Device for AcpiPm {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn reset(&mut self) {
        self.state = State { seen_toggles: self.toggles(), ..Self::power_on(self.config) };
        self.update();
    }

    fn save(&self) -> Section {
        Section::new(KIND, 0, 1, &(self.state, self.config.timer_32bit))
    }

    fn load(&mut self, section: &Section) -> Result<(), StateError> {
        let (s, wide): (State, bool) = section.decode(KIND, 1)?;
        if wide != self.config.timer_32bit {
            return Err(section.invalid("the PM timer is of another width"));
        }
        let bad =
            s.status & !sts::ALL != 0 || s.enable & !sts::ENABLES != 0 || s.control & !CONTROL_BITS != 0;
        if bad || s.seen_toggles >> 60 != 0 {
            return Err(section.invalid("a register holds an impossible value"));
        }
        self.state = s;
        self.update();
        Ok(())
    }
}
