//! The I/O APIC: 24 inputs, each a message to local APICs (Intel 82093AA data sheet; version 0x20 with the EOI
//! register of ICH9 data sheet section 13.5).
//!
//! Lines carry assertion, not voltage: a source that has something to say drives its line high whatever the
//! polarity bit says, which is kept for the guest to read back.

#[cfg(test)]
mod tests;

use crate::line::Inputs;
use ringfort_bus::irqchip::IoApicRegisters;
use ringfort_bus::{Device, Format, MmioDevice, MsiMessage, MsiSink, Section, StateError};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Where a PC has it.
pub const BASE: u64 = 0xfec0_0000;
/// Bytes of its window.
pub const LEN: u64 = 0x1000;
/// Inputs.
pub const PINS: u8 = 24;
const KIND: &str = "ioapic";
/// How the state is laid out.
pub(crate) const FORMAT: Format = Format::of::<State>(KIND, 1);

/// Bits of a redirection table entry.
mod rte {
    pub const STATUS: u64 = 1 << 12;
    pub const REMOTE_IRR: u64 = 1 << 14;
    pub const LEVEL: u64 = 1 << 15;
    pub const MASKED: u64 = 1 << 16;
    /// What a guest can write: all defined bits but delivery status and remote IRR. Bits 55:48 are the extended
    /// destination.
    pub const WRITABLE: u64 = 0xffff_0000_0001_afff;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    select: u8,
    id: u8,
    /// Levels of the inputs.
    lines: u32,
    entries: [u64; PINS as usize],
}

impl State {
    fn new(id: u8) -> State {
        State { select: 0, id, lines: 0, entries: [rte::MASKED; PINS as usize] }
    }
}

/// Who wants to know that an entry changed (an engine that has the local APICs in the kernel and must know which
/// vectors to report EOIs for).
pub trait RouteListener: Send + Sync {
    /// Pin `pin` sends `message` from now on, if not `masked`.
    fn route_changed(&self, pin: u8, message: MsiMessage, masked: bool);
}

/// The controller.
pub struct IoApic {
    state: State,
    power_on_id: u8,
    sink: Arc<dyn MsiSink>,
    listener: Option<Arc<dyn RouteListener>>,
}

/// The message that an entry sends, as the MSI that local APICs and KVM's split interrupt controller take: address
/// bits 19:12 destination, 11:5 its extension, 4 remappable format, 2 logical; data bits 7:0 vector, 10:8 delivery
/// mode, 14 assert and 15 level for level-triggered entries (Intel SDM 3A section 11.11).
fn message(entry: u64) -> MsiMessage {
    let address = 0xfee0_0000 | (entry >> 48 & 0xffff) << 4 | (entry >> 11 & 1) << 2;
    let level = if entry & rte::LEVEL != 0 { 0xc000 } else { 0 };
    MsiMessage { address, data: (entry & 0x7ff) as u32 | level }
}

/// Level trigger exists for fixed and lowest-priority delivery only; NMI, SMI, INIT and ExtINT are edges.
fn is_level(entry: u64) -> bool {
    entry & rte::LEVEL != 0 && entry >> 8 & 7 <= 1
}

impl IoApic {
    /// A controller with APIC ID `id` (0 to 15) that sends to `sink`. An ExtINT entry sends a message of delivery
    /// mode 7: the receiver takes the vector from the 8259's acknowledge cycle.
    pub fn new(id: u8, sink: Arc<dyn MsiSink>) -> IoApic {
        IoApic { state: State::new(id & 15), power_on_id: id & 15, sink, listener: None }
    }

    /// Tell `listener` of every entry now and whenever one changes.
    pub fn set_listener(&mut self, listener: Arc<dyn RouteListener>) {
        self.listener = Some(listener);
        self.tell_all();
    }

    /// What pin `pin` sends, and whether it is masked.
    pub fn route(&self, pin: u8) -> Option<(MsiMessage, bool)> {
        self.state.entries.get(usize::from(pin)).map(|&e| (message(e), e & rte::MASKED != 0))
    }

    /// Drive an input.
    pub fn set_irq(&mut self, pin: u8, high: bool) {
        if pin >= PINS {
            return;
        }
        let bit = 1 << pin;
        let rise = high && self.state.lines & bit == 0;
        self.state.lines = self.state.lines & !bit | if high { bit } else { 0 };
        let entry = self.state.entries[usize::from(pin)];
        if is_level(entry) {
            self.service(pin);
        } else if rise && entry & rte::MASKED == 0 {
            // An edge on a masked input is lost (82093AA section 3.2.4, interrupt mask).
            self.sink.send(message(entry));
        }
    }

    /// A local APIC ended a level-triggered interrupt (its EOI broadcast): every pin with that vector may ask again.
    pub fn eoi(&mut self, vector: u8) {
        for pin in 0..PINS {
            let e = &mut self.state.entries[usize::from(pin)];
            if *e as u8 == vector && *e & rte::REMOTE_IRR != 0 {
                *e &= !rte::REMOTE_IRR;
                self.service(pin);
            }
        }
    }

    /// Whether an EOI of `vector` matters here.
    pub fn wants_eoi(&self, vector: u8) -> bool {
        self.state.entries.iter().any(|&e| e as u8 == vector && is_level(e) && e & rte::MASKED == 0)
            || self.state.entries.iter().any(|&e| e as u8 == vector && e & rte::REMOTE_IRR != 0)
    }

    /// Send a level-triggered pin's message if it is asserted, open, and not in service.
    fn service(&mut self, pin: u8) {
        let e = &mut self.state.entries[usize::from(pin)];
        let asserted = self.state.lines & 1 << pin != 0;
        if asserted && is_level(*e) && *e & (rte::MASKED | rte::REMOTE_IRR) == 0 {
            *e |= rte::REMOTE_IRR;
            self.sink.send(message(*e));
        }
    }

    fn tell(&self, pin: u8) {
        if let (Some(l), Some((m, masked))) = (&self.listener, self.route(pin)) {
            l.route_changed(pin, m, masked);
        }
    }

    fn tell_all(&self) {
        (0..PINS).for_each(|p| self.tell(p));
    }

    fn read_register(&self) -> u32 {
        match self.state.select {
            // ID, and arbitration ID, which follows it.
            0 | 2 => u32::from(self.state.id) << 24,
            1 => u32::from(PINS - 1) << 16 | 0x20,
            s @ 0x10..0x40 => {
                (self.state.entries[usize::from((s - 0x10) / 2)] >> (u32::from(s & 1) * 32)) as u32
            }
            _ => 0,
        }
    }

    fn write_register(&mut self, v: u32) {
        match self.state.select {
            0 => self.state.id = (v >> 24) as u8 & 15,
            s @ 0x10..0x40 => {
                let pin = (s - 0x10) / 2;
                let e = &mut self.state.entries[usize::from(pin)];
                let shift = u32::from(s & 1) * 32;
                let half = 0xffff_ffffu64 << shift;
                let new = *e & !half | u64::from(v) << shift;
                *e = new & rte::WRITABLE | *e & (rte::REMOTE_IRR | rte::STATUS);
                if !is_level(*e) {
                    // How software clears a stuck remote IRR on chips without an EOI register.
                    *e &= !rte::REMOTE_IRR;
                }
                self.tell(pin);
                self.service(pin);
            }
            _ => {}
        }
    }
}

impl IoApic {
    /// Registers, for a host that has the controller in its kernel.
    pub fn registers(&self) -> IoApicRegisters {
        let State { select, id, lines, entries } = self.state;
        IoApicRegisters { select, id, lines, entries }
    }

    /// Take registers over from such a host.
    pub fn set_registers(&mut self, r: &IoApicRegisters) {
        let entries = r.entries.map(|e| {
            let e = e & (rte::WRITABLE | rte::REMOTE_IRR);
            if is_level(e) { e } else { e & !rte::REMOTE_IRR }
        });
        self.state = State { select: r.select, id: r.id & 15, lines: r.lines & 0xff_ffff, entries };
        self.tell_all();
    }
}

impl Inputs for IoApic {
    fn set_input(&mut self, n: u8, high: bool) {
        self.set_irq(n, high);
    }
}

impl MmioDevice for IoApic {
    fn mmio_read(&mut self, offset: u64, data: &mut [u8]) {
        let v = match offset & !3 & 0xff {
            0x00 => u32::from(self.state.select),
            0x10 => self.read_register(),
            _ => 0,
        };
        let bytes = (u64::from(v) >> ((offset & 3) * 8)).to_le_bytes();
        data.fill(0);
        data.iter_mut().zip(bytes).for_each(|(d, b)| *d = b);
    }

    fn mmio_write(&mut self, offset: u64, data: &[u8]) {
        // Registers are 32 bits and want whole, aligned writes; the selector and EOI take their low byte alone.
        let mut v = [0; 4];
        v.iter_mut().zip(data).for_each(|(v, d)| *v = *d);
        let v = u32::from_le_bytes(v);
        match offset & 0xff {
            0x00 => self.state.select = v as u8,
            0x10 if data.len() >= 4 => self.write_register(v),
            0x40 => self.eoi(v as u8),
            _ => {}
        }
    }
}

impl Device for IoApic {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn reset(&mut self) {
        self.state = State { lines: self.state.lines, ..State::new(self.power_on_id) };
        self.tell_all();
    }

    fn save(&self) -> Section {
        Section::new(KIND, 0, 1, &self.state)
    }

    fn load(&mut self, section: &Section) -> Result<(), StateError> {
        let s: State = section.decode(KIND, 1)?;
        let bits = rte::WRITABLE | rte::REMOTE_IRR;
        let bad = |e: &u64| e & !bits != 0 || e & rte::REMOTE_IRR != 0 && !is_level(*e);
        if s.id > 15 || s.lines >> PINS != 0 || s.entries.iter().any(bad) {
            return Err(section.invalid("a register holds an impossible value"));
        }
        self.state = s;
        self.tell_all();
        Ok(())
    }
}
