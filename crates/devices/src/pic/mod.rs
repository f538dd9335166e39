//! The pair of 8259A interrupt controllers of a PC, with the edge/level control registers (Intel 8259A data sheet;
//! ICH9 data sheet section 13.4).

#[cfg(test)]
mod tests;

use crate::line::{Inputs, Output};
use crate::ports;
use ringfort_bus::irqchip::PicRegisters;
use ringfort_bus::{Device, Format, IrqLine, PioDevice, Section, StateError};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Ports of the pair: first port and length of each range.
pub const PORTS: [(u16, u16); 3] = [(0x20, 2), (0xa0, 2), (0x4d0, 2)];
/// Inputs that may be level-triggered, master and slave: not 0, 1, 2, 8 and 13.
const ELCR_MASK: [u8; 2] = [0xf8, 0xde];
const KIND: &str = "i8259";
/// How the state is laid out.
pub(crate) const FORMAT: Format = Format::of::<[Chip; 2]>(KIND, 1);
/// The master's input that the slave hangs on.
const CASCADE: u8 = 2;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Chip {
    irr: u8,
    imr: u8,
    isr: u8,
    /// Levels on the input pins.
    lines: u8,
    elcr: u8,
    /// The input with lowest priority.
    lowest: u8,
    /// The upper five bits of vectors.
    base: u8,
    /// Initialisation word that the next write to the odd port is: 2, 3, 4; 0 when it is the mask.
    expect: u8,
    need_icw4: bool,
    single: bool,
    auto_eoi: bool,
    rotate_on_aeoi: bool,
    special_mask: bool,
    special_fully_nested: bool,
    poll: bool,
    read_isr: bool,
}

impl Chip {
    fn new() -> Chip {
        Chip { lowest: 7, ..Chip::default() }
    }

    fn set(&mut self, n: u8, high: bool) {
        let bit = 1 << n;
        let rise = high && self.lines & bit == 0;
        self.lines = self.lines & !bit | if high { bit } else { 0 };
        if self.elcr & bit != 0 {
            self.irr = self.irr & !bit | self.lines & bit;
        } else if rise {
            self.irr |= bit;
        }
    }

    /// Rank of the most urgent of `bits`, 0 first; 8 when there is none.
    fn rank(&self, bits: u8) -> u8 {
        if bits == 0 { 8 } else { bits.rotate_right(u32::from(self.lowest + 1) & 7).trailing_zeros() as u8 }
    }

    fn at_rank(&self, rank: u8) -> u8 {
        (rank + self.lowest + 1) & 7
    }

    /// The input that asks for service and may have it.
    fn request(&self, master: bool) -> Option<u8> {
        let rank = self.rank(self.irr & !self.imr);
        let mut in_service = self.isr;
        if self.special_mask {
            in_service &= !self.imr;
        }
        if self.special_fully_nested && master {
            in_service &= !(1 << CASCADE);
        }
        (rank < self.rank(in_service)).then(|| self.at_rank(rank))
    }

    fn acknowledge(&mut self, n: u8) {
        let bit = 1 << n;
        if self.elcr & bit == 0 {
            self.irr &= !bit;
        }
        if !self.auto_eoi {
            self.isr |= bit;
        } else if self.rotate_on_aeoi {
            self.lowest = n;
        }
    }

    fn command(&mut self, v: u8) {
        if v & 0x10 != 0 {
            // ICW1. Edge requests are forgotten, levels stay; mask, modes and priorities start over.
            *self = Chip {
                irr: self.lines & self.elcr,
                lines: self.lines,
                elcr: self.elcr,
                base: self.base,
                expect: 2,
                need_icw4: v & 1 != 0,
                single: v & 2 != 0,
                ..Chip::new()
            };
        } else if v & 8 != 0 {
            // OCW3.
            self.poll = v & 4 != 0;
            if v & 2 != 0 {
                self.read_isr = v & 1 != 0;
            }
            if v & 0x40 != 0 {
                self.special_mask = v & 0x20 != 0;
            }
        } else {
            // OCW2: rotate, specific, EOI.
            let n = v & 7;
            match v >> 5 {
                0 | 4 => self.rotate_on_aeoi = v & 0x80 != 0,
                1 | 5 => {
                    let open = if self.special_mask { self.isr & !self.imr } else { self.isr };
                    let rank = self.rank(open);
                    if rank < 8 {
                        let done = self.at_rank(rank);
                        self.isr &= !(1 << done);
                        if v & 0x80 != 0 {
                            self.lowest = done;
                        }
                    }
                }
                3 => self.isr &= !(1 << n),
                6 => self.lowest = n,
                7 => {
                    self.isr &= !(1 << n);
                    self.lowest = n;
                }
                _ => {}
            }
        }
    }

    fn data(&mut self, v: u8) {
        match self.expect {
            2 => {
                self.base = v & 0xf8;
                self.expect = match (self.single, self.need_icw4) {
                    (false, _) => 3,
                    (true, true) => 4,
                    (true, false) => 0,
                };
            }
            // ICW3 says which input the slave is on, which the board has fixed.
            3 => self.expect = if self.need_icw4 { 4 } else { 0 },
            4 => {
                self.auto_eoi = v & 2 != 0;
                self.special_fully_nested = v & 0x10 != 0;
                self.expect = 0;
            }
            _ => self.imr = v,
        }
    }

    fn valid(&self, elcr_mask: u8) -> bool {
        self.lowest < 8
            && self.base & 7 == 0
            && matches!(self.expect, 0 | 2..=4)
            && self.elcr & !elcr_mask == 0
    }
}

/// Both chips. Inputs are 0 to 15; input 2 is the cascade and cannot be driven.
pub struct Pic {
    chips: [Chip; 2],
    out: Output,
}

impl Pic {
    /// A pair whose INTR output is `out`.
    pub fn new(out: Arc<dyn IrqLine>) -> Pic {
        Pic { chips: [Chip::new(); 2], out: Output::new(out) }
    }

    /// Drive input `n`. A pulse latches on an edge-triggered input.
    pub fn set_irq(&mut self, n: u8, high: bool) {
        if n < 16 && n != CASCADE {
            self.chips[usize::from(n >> 3)].set(n & 7, high);
            self.update();
        }
    }

    /// The INTR output: the processor shall run an interrupt acknowledge cycle.
    pub fn intr(&self) -> bool {
        self.chips[0].request(true).is_some()
    }

    /// An interrupt acknowledge cycle: the vector. When the request has gone meanwhile, the spurious vector (IRQ 7,
    /// or 15 when only the slave's request has gone).
    pub fn acknowledge(&mut self) -> u8 {
        // INTR falls in the cycle and rises again for a further request: an input that takes edges sees each.
        self.out.set(false);
        let [master, slave] = &mut self.chips;
        let vector = match master.request(true) {
            Some(CASCADE) => {
                master.acknowledge(CASCADE);
                let n = slave.request(false);
                if let Some(n) = n {
                    slave.acknowledge(n);
                }
                // The slave's INT is low for the rest of the cycle, so that a further request is an edge.
                master.set(CASCADE, false);
                slave.base | n.unwrap_or(7)
            }
            Some(n) => {
                master.acknowledge(n);
                master.base | n
            }
            None => master.base | 7,
        };
        self.update();
        vector
    }

    fn update(&mut self) {
        let slave = self.chips[1].request(false).is_some();
        self.chips[0].set(CASCADE, slave);
        let intr = self.intr();
        self.out.set(intr);
    }

    fn read_port(&mut self, port: u16) -> u8 {
        let i = match port & !1 {
            0x20 => 0,
            0xa0 => 1,
            0x4d0 => return self.chips[usize::from(port & 1)].elcr,
            _ => return 0xff,
        };
        if self.chips[i].poll {
            return self.poll(i);
        }
        let c = &self.chips[i];
        match (port & 1, c.read_isr) {
            (1, _) => c.imr,
            (_, true) => c.isr,
            (_, false) => c.irr,
        }
    }

    /// A read in poll mode is an acknowledge cycle: bit 7 says that there was a request, bits 2:0 which.
    fn poll(&mut self, i: usize) -> u8 {
        self.chips[i].poll = false;
        let n = self.chips[i].request(i == 0);
        if let Some(n) = n {
            self.chips[i].acknowledge(n);
            if i == 1 {
                // Served behind the master's back: its latch would else give a spurious interrupt.
                self.chips[0].set(CASCADE, false);
                self.chips[0].irr &= !(1 << CASCADE);
            }
        }
        self.update();
        n.map_or(7, |n| 0x80 | n)
    }

    fn write_port(&mut self, port: u16, v: u8) {
        match (port & !1, port & 1) {
            (0x20, 0) => self.chips[0].command(v),
            (0x20, _) => self.chips[0].data(v),
            (0xa0, 0) => self.chips[1].command(v),
            (0xa0, _) => self.chips[1].data(v),
            (0x4d0, i) => {
                let i = usize::from(i);
                let c = &mut self.chips[i];
                c.elcr = v & ELCR_MASK[i];
                c.irr = c.irr & !c.elcr | c.lines & c.elcr;
            }
            _ => return,
        }
        self.update();
    }
}

impl Pic {
    /// Registers, master first, for a host that has the pair in its kernel.
    pub fn registers(&self) -> [PicRegisters; 2] {
        self.chips.map(|c| PicRegisters {
            irr: c.irr,
            imr: c.imr,
            isr: c.isr,
            lines: c.lines,
            elcr: c.elcr,
            lowest: c.lowest,
            base: c.base,
            expect: c.expect,
            need_icw4: c.need_icw4,
            auto_eoi: c.auto_eoi,
            rotate_on_aeoi: c.rotate_on_aeoi,
            special_mask: c.special_mask,
            special_fully_nested: c.special_fully_nested,
            poll: c.poll,
            read_isr: c.read_isr,
        })
    }

    /// Take registers over from such a host.
    pub fn set_registers(&mut self, registers: &[PicRegisters; 2]) {
        for ((c, r), mask) in self.chips.iter_mut().zip(registers).zip(ELCR_MASK) {
            *c = Chip {
                irr: r.irr,
                imr: r.imr,
                isr: r.isr,
                lines: r.lines,
                elcr: r.elcr & mask,
                lowest: r.lowest & 7,
                base: r.base & 0xf8,
                expect: if matches!(r.expect, 2..=4) { r.expect } else { 0 },
                need_icw4: r.need_icw4,
                single: false,
                auto_eoi: r.auto_eoi,
                rotate_on_aeoi: r.rotate_on_aeoi,
                special_mask: r.special_mask,
                special_fully_nested: r.special_fully_nested,
                poll: r.poll,
                read_isr: r.read_isr,
            };
        }
        let intr = self.intr();
        self.out.set(intr);
    }
}

impl Inputs for Pic {
    fn set_input(&mut self, n: u8, high: bool) {
        self.set_irq(n, high);
    }
}

impl PioDevice for Pic {
    fn pio_read(&mut self, port: u16, data: &mut [u8]) {
        ports::read(port, data, |p| self.read_port(p));
    }
    fn pio_write(&mut self, port: u16, data: &[u8]) {
        ports::write(port, data, |p, v| self.write_port(p, v));
    }
}

impl Device for Pic {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn reset(&mut self) {
        for c in &mut self.chips {
            *c = Chip { lines: c.lines, ..Chip::new() };
        }
        self.chips[0].lines &= !(1 << CASCADE);
        self.update();
    }

    fn save(&self) -> Section {
        Section::new(KIND, 0, 1, &self.chips)
    }

    fn load(&mut self, section: &Section) -> Result<(), StateError> {
        let chips: [Chip; 2] = section.decode(KIND, 1)?;
        if !chips.iter().zip(ELCR_MASK).all(|(c, m)| c.valid(m)) {
            return Err(section.invalid("a register holds an impossible value"));
        }
        self.chips = chips;
        let intr = self.intr();
        self.out.set(intr);
        Ok(())
    }
}
