//! The 16550A UART (National Semiconductor PC16550D data sheet).
//!
//! Bytes go out as fast as the back end takes them: the baud rate is kept but not waited for (only the receive
//! timeout follows it). Nothing typed is lost: the back end offers what there is room for and is told when room
//! comes.

#[cfg(test)]
mod tests;

use crate::alarm::Alarm;
use crate::line::Output;
use crate::ports;
use ringfort_bus::{Clock, Device, Format, IrqLine, PioDevice, Section, StateError, Timer, TimerDevice};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::Arc;

/// Ports of one UART.
pub const LEN: u16 = 8;
/// First port and ISA interrupt of COM1 to COM4.
pub const COM: [(u16, u8); 4] = [(0x3f8, 4), (0x2f8, 3), (0x3e8, 4), (0x2e8, 3)];
const KIND: &str = "serial16550";
/// How the state is laid out.
pub(crate) const FORMAT: Format = Format::of::<State>(KIND, 1);
const FIFO: usize = 16;

mod ier {
    pub const RX: u8 = 1;
    pub const TX: u8 = 2;
    pub const LINE: u8 = 4;
    pub const MODEM: u8 = 8;
}
mod lsr {
    pub const DATA: u8 = 1;
    pub const OVERRUN: u8 = 2;
    pub const ERRORS: u8 = 0x1c;
    pub const FRAMING: u8 = 8;
    pub const BREAK: u8 = 0x10;
    pub const THR_EMPTY: u8 = 0x20;
    pub const TX_EMPTY: u8 = 0x40;
    pub const FIFO_ERROR: u8 = 0x80;
}
mod mcr {
    pub const OUT2: u8 = 8;
    pub const LOOP: u8 = 0x10;
}
mod msr {
    pub const RING: u8 = 0x40;
    /// CTS, DSR and DCD: somebody is at the other end.
    pub const CONNECTED: u8 = 0xb0;
}

/// Where a UART's output goes.
pub trait SerialSink: Send {
    /// Take as many bytes as possible without waiting, and say how many. When it is fewer than given, call
    /// [`Serial::transmit_ready`] once there is room again.
    fn write(&mut self, bytes: &[u8]) -> usize;
    /// The guest began or ended a break.
    fn set_break(&mut self, _on: bool) {}
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    divisor: u16,
    ier: u8,
    fifo: bool,
    /// Receive interrupt threshold in bytes: 1, 4, 8 or 14.
    trigger: u8,
    lcr: u8,
    mcr: u8,
    scratch: u8,
    /// MSR bits 3:0, the changes.
    modem_delta: u8,
    /// MSR bits 7:4 as the other end drives them.
    modem_lines: u8,
    /// Received bytes, each with its error bits.
    rx: VecDeque<(u8, u8)>,
    overrun: bool,
    tx: VecDeque<u8>,
    /// "Transmitter holding register empty" waits to be reported.
    tx_pending: bool,
    timed_out: bool,
    /// When the receive timeout comes.
    timeout_at: Option<u64>,
}

impl State {
    fn new(modem_lines: u8) -> State {
        State {
            divisor: 12,
            ier: 0,
            fifo: false,
            trigger: 1,
            lcr: 0,
            mcr: 0,
            scratch: 0,
            modem_delta: 0,
            modem_lines,
            rx: VecDeque::new(),
            overrun: false,
            tx: VecDeque::new(),
            tx_pending: false,
            timed_out: false,
            timeout_at: None,
        }
    }

    fn rx_room(&self) -> usize {
        (if self.fifo { FIFO } else { 1 }).saturating_sub(self.rx.len())
    }

    /// MSR bits 7:4 as the guest sees them: in loopback its own MCR outputs.
    fn modem(&self) -> u8 {
        if self.mcr & mcr::LOOP == 0 {
            return self.modem_lines;
        }
        let m = self.mcr;
        (m & 2) << 3 | (m & 1) << 5 | (m & 4) << 4 | (m & 8) << 4
    }

    fn line_status(&self) -> u8 {
        let mut v = self.rx.front().map_or(0, |f| lsr::DATA | f.1);
        if self.overrun {
            v |= lsr::OVERRUN;
        }
        if self.fifo && self.rx.iter().any(|f| f.1 != 0) {
            v |= lsr::FIFO_ERROR;
        }
        if self.tx.is_empty() {
            v |= lsr::THR_EMPTY | lsr::TX_EMPTY;
        }
        v
    }

    /// Interrupt identification, bits 3:0, most urgent first (data sheet table II).
    fn interrupt(&self) -> u8 {
        let status = self.line_status();
        if self.ier & ier::LINE != 0 && status & (lsr::OVERRUN | lsr::ERRORS) != 0 {
            6
        } else if self.ier & ier::RX != 0 && self.rx.len() >= usize::from(self.trigger) {
            4
        } else if self.ier & ier::RX != 0 && self.timed_out && !self.rx.is_empty() {
            12
        } else if self.ier & ier::TX != 0 && self.tx_pending {
            2
        } else if self.ier & ier::MODEM != 0 && self.modem_delta != 0 {
            0
        } else {
            1
        }
    }

    fn valid(&self) -> bool {
        self.rx.len() <= FIFO
            && self.tx.len() <= FIFO
            && self.ier < 16
            && self.mcr < 32
            && matches!(self.trigger, 1 | 4 | 8 | 14)
            && (self.fifo || self.trigger == 1)
            && self.modem_delta < 16
            && self.modem_lines & 15 == 0
            && self.rx.iter().all(|f| f.1 & !lsr::ERRORS == 0)
    }
}

/// One UART.
pub struct Serial {
    state: State,
    base: u16,
    instance: u32,
    irq: Output,
    sink: Box<dyn SerialSink>,
    clock: Arc<dyn Clock>,
    alarm: Alarm,
    room: Box<dyn Fn() + Send>,
}

impl Serial {
    /// A UART at `base..base + 8`. `timer` is bound to its [`TimerDevice`]; `room` is called, with the device
    /// locked, when the guest has read and [`Serial::receive`] would take bytes again after it had refused some.
    pub fn new(
        instance: u32,
        base: u16,
        irq: Arc<dyn IrqLine>,
        sink: Box<dyn SerialSink>,
        clock: Arc<dyn Clock>,
        timer: Arc<dyn Timer>,
        room: impl Fn() + Send + 'static,
    ) -> Serial {
        let room = Box::new(room);
        Serial {
            state: State::new(msr::CONNECTED),
            base,
            instance,
            irq: Output::new(irq),
            sink,
            clock,
            alarm: Alarm::new(timer),
            room,
        }
    }

    /// Bytes that [`Serial::receive`] would take now.
    pub fn receive_room(&self) -> usize {
        if self.state.mcr & mcr::LOOP != 0 { 0 } else { self.state.rx_room() }
    }

    /// Bytes from the other end; says how many were taken (the first ones).
    pub fn receive(&mut self, bytes: &[u8]) -> usize {
        let n = self.receive_room().min(bytes.len());
        bytes[..n].iter().for_each(|&b| self.push(b, 0));
        self.update();
        n
    }

    /// A break from the other end (a NUL with break and framing error). False when there is no room now.
    pub fn receive_break(&mut self) -> bool {
        let ok = self.receive_room() > 0;
        if ok {
            self.push(0, lsr::BREAK | lsr::FRAMING);
            self.update();
        }
        ok
    }

    /// The other end's modem lines: carrier, data set ready and clear to send on or off together.
    pub fn set_connected(&mut self, connected: bool) {
        let before = self.state.modem();
        self.state.modem_lines = if connected { msr::CONNECTED } else { 0 };
        self.modem_changed(before);
        self.update();
    }

    /// The sink has room again.
    pub fn transmit_ready(&mut self) {
        self.drain();
        self.update();
    }

    /// Everything the guest wrote has gone to the sink.
    pub fn is_drained(&self) -> bool {
        self.state.tx.is_empty()
    }

    fn push(&mut self, byte: u8, errors: u8) {
        let s = &mut self.state;
        if s.rx_room() == 0 {
            // Without FIFO the new byte replaces the old one, with it the new one is lost (LSR bit 1).
            s.overrun = true;
            if !s.fifo {
                s.rx.clear();
                s.rx.push_back((byte, errors));
            }
        } else {
            s.rx.push_back((byte, errors));
        }
        self.restart_timeout();
    }

    /// Receive timeout: four character times without a byte coming or going (data sheet, FIFO interrupt mode).
    fn restart_timeout(&mut self) {
        let s = &mut self.state;
        s.timed_out = false;
        s.timeout_at = (s.fifo && !s.rx.is_empty()).then(|| {
            let bits = 2 + 5 + u64::from(s.lcr & 3) + u64::from(s.lcr >> 2 & 1) + u64::from(s.lcr >> 3 & 1);
            // 115200 bit/s with divisor 1; divisor 0 counts as 65536.
            let divisor = if s.divisor == 0 { 65536 } else { u64::from(s.divisor) };
            self.clock.now_ns().saturating_add(4 * bits * divisor * 1_000_000_000 / 115_200)
        });
        match s.timeout_at {
            Some(at) => self.alarm.arm(at),
            None => self.alarm.cancel(),
        }
    }

    fn drain(&mut self) {
        let s = &mut self.state;
        if s.tx.is_empty() {
            return;
        }
        let n = self.sink.write(s.tx.make_contiguous()).min(s.tx.len());
        s.tx.drain(..n);
        if s.tx.is_empty() {
            s.tx_pending = true;
        }
    }

    fn transmit(&mut self, v: u8) {
        self.state.tx_pending = false;
        // The request goes and comes again, which an edge-triggered input must see.
        self.update();
        if self.state.mcr & mcr::LOOP != 0 {
            let mask = [0x1f, 0x3f, 0x7f, 0xff][usize::from(self.state.lcr & 3)];
            self.push(v & mask, 0);
            self.state.tx_pending = true;
            return;
        }
        let limit = if self.state.fifo { FIFO } else { 1 };
        if self.state.tx.len() >= limit {
            // A guest that does not wait for THRE overwrites the newest byte.
            self.state.tx.pop_back();
        }
        self.state.tx.push_back(v);
        self.drain();
    }

    fn modem_changed(&mut self, before: u8) {
        let s = &mut self.state;
        let changed = before ^ s.modem();
        // Ring counts when it ends, the others on any change.
        let ring_end = changed & before & msr::RING;
        s.modem_delta |= (changed & msr::CONNECTED | ring_end) >> 4;
    }

    fn update(&mut self) {
        let asks = self.state.interrupt() != 1 && self.state.mcr & mcr::OUT2 != 0;
        self.irq.set(asks);
    }

    fn read_port(&mut self, port: u16) -> u8 {
        let dlab = self.state.lcr & 0x80 != 0;
        let v = match port.wrapping_sub(self.base) {
            0 if dlab => return self.state.divisor as u8,
            1 if dlab => return (self.state.divisor >> 8) as u8,
            0 => {
                let full = self.receive_room() == 0;
                let v = self.state.rx.pop_front().map_or(0, |f| f.0);
                self.restart_timeout();
                if full && self.receive_room() > 0 {
                    (self.room)();
                }
                v
            }
            1 => return self.state.ier,
            2 => {
                let id = self.state.interrupt();
                if id == 2 {
                    self.state.tx_pending = false;
                }
                id | if self.state.fifo { 0xc0 } else { 0 }
            }
            3 => return self.state.lcr,
            4 => return self.state.mcr,
            5 => {
                let v = self.state.line_status();
                self.state.overrun = false;
                if let Some(f) = self.state.rx.front_mut() {
                    f.1 = 0;
                }
                v
            }
            6 => {
                let v = self.state.modem() | self.state.modem_delta;
                self.state.modem_delta = 0;
                v
            }
            7 => return self.state.scratch,
            _ => return 0xff,
        };
        self.update();
        v
    }

    fn write_port(&mut self, port: u16, v: u8) {
        let dlab = self.state.lcr & 0x80 != 0;
        match port.wrapping_sub(self.base) {
            0 if dlab => self.state.divisor = self.state.divisor & 0xff00 | u16::from(v),
            1 if dlab => self.state.divisor = self.state.divisor & 0xff | u16::from(v) << 8,
            0 => self.transmit(v),
            1 => {
                let turned_on = v & !self.state.ier;
                self.state.ier = v & 15;
                // Enabling the transmit interrupt while the register is empty reports it at once.
                if turned_on & ier::TX != 0 && self.state.tx.is_empty() {
                    self.state.tx_pending = true;
                }
            }
            2 => self.fifo_control(v),
            3 => {
                let changed = self.state.lcr ^ v;
                self.state.lcr = v;
                if changed & 0x40 != 0 {
                    if self.state.mcr & mcr::LOOP == 0 {
                        self.sink.set_break(v & 0x40 != 0);
                    } else if v & 0x40 != 0 {
                        self.push(0, lsr::BREAK | lsr::FRAMING);
                    }
                }
            }
            4 => {
                let before = self.state.modem();
                let was_loop = self.state.mcr & mcr::LOOP != 0;
                self.state.mcr = v & 0x1f;
                self.modem_changed(before);
                if was_loop && v & mcr::LOOP == 0 && self.receive_room() > 0 {
                    (self.room)();
                }
            }
            7 => self.state.scratch = v,
            // LSR and MSR are for reading (writing LSR is for factory tests).
            _ => return,
        }
        self.update();
    }

    fn fifo_control(&mut self, v: u8) {
        let full = self.receive_room() == 0;
        let s = &mut self.state;
        let on = v & 1 != 0;
        let switched = on != s.fifo;
        s.fifo = on;
        s.trigger = if on { [1, 4, 8, 14][usize::from(v >> 6)] } else { 1 };
        if switched || on && v & 2 != 0 {
            s.rx.clear();
            s.overrun = false;
        }
        if (switched || on && v & 4 != 0) && !s.tx.is_empty() {
            s.tx.clear();
            s.tx_pending = true;
        }
        self.restart_timeout();
        if full && self.receive_room() > 0 {
            (self.room)();
        }
    }
}

impl PioDevice for Serial {
    fn pio_read(&mut self, port: u16, data: &mut [u8]) {
        ports::read(port, data, |p| self.read_port(p));
    }
    fn pio_write(&mut self, port: u16, data: &[u8]) {
        ports::write(port, data, |p, v| self.write_port(p, v));
    }
}

impl TimerDevice for Serial {
    fn timer_expired(&mut self, _index: u32) {
        self.alarm.expired();
        if self.state.timeout_at.is_some_and(|at| at <= self.clock.now_ns()) {
            self.state.timeout_at = None;
            self.state.timed_out = true;
            self.update();
        }
    }
}

impl Device for Serial {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn instance(&self) -> u32 {
        self.instance
    }

    fn reset(&mut self) {
        let full = self.receive_room() == 0;
        self.state = State::new(self.state.modem_lines);
        self.alarm.cancel();
        self.update();
        if full {
            (self.room)();
        }
    }

    fn save(&self) -> Section {
        Section::new(KIND, self.instance, 1, &self.state)
    }

    fn load(&mut self, section: &Section) -> Result<(), StateError> {
        let s: State = section.decode(KIND, 1)?;
        if !s.valid() {
            return Err(section.invalid("a register holds an impossible value"));
        }
        self.state = s;
        match self.state.timeout_at {
            Some(at) => self.alarm.arm(at),
            None => self.alarm.cancel(),
        }
        // What waits to be sent stays until `transmit_ready`: its interrupt is none of the saved state's.
        self.update();
        Ok(())
    }
}
