//! The keyboard controller of a PC (Intel 8042 as in the IBM PS/2 Hardware Interface Technical Reference), with a
//! PS/2 keyboard and a PS/2 mouse.

mod keyboard;
mod mouse;
mod scancodes;
#[cfg(test)]
mod tests;

use crate::ports;
use crate::power::{PowerEvent, PowerSink};
use keyboard::Keyboard;
use mouse::Mouse;
use ringfort_bus::{Device, Format, IrqLine, PioDevice, Section, StateError};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::Arc;

/// Data port.
pub const DATA: u16 = 0x60;
/// Status and command port.
pub const COMMAND: u16 = 0x64;
/// ISA interrupts of keyboard and mouse.
pub const IRQS: (u8, u8) = (1, 12);
const KIND: &str = "i8042";
/// How the state is laid out.
pub(crate) const FORMAT: Format = Format::of::<State>(KIND, 1);

mod config {
    pub const KEYBOARD_IRQ: u8 = 1;
    pub const MOUSE_IRQ: u8 = 2;
    pub const SYSTEM: u8 = 4;
    pub const KEYBOARD_OFF: u8 = 0x10;
    pub const MOUSE_OFF: u8 = 0x20;
    pub const TRANSLATE: u8 = 0x40;
}
/// Output port: not in reset, A20 open.
const OUTPUT_RESET: u8 = 1;
const OUTPUT_A20: u8 = 2;
/// Answers of the controller that may wait.
const ROOM: usize = 16;

/// A byte for the host, and whether the mouse side sent it.
type Answer = (u8, bool);

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    /// The controller's RAM; byte 0 is the configuration byte.
    ram: [u8; 32],
    output_port: u8,
    /// The command whose data byte comes next at the data port.
    command: u8,
    last_was_command: bool,
    buffer: Option<Answer>,
    /// What the data port gives when the buffer is empty.
    stale: u8,
    answers: VecDeque<Answer>,
    released: bool,
    keyboard: Keyboard,
    mouse: Mouse,
}

impl State {
    fn new() -> State {
        let mut ram = [0; 32];
        // As firmware leaves it: both interrupts on, translation to set 1.
        ram[0] = config::KEYBOARD_IRQ | config::MOUSE_IRQ | config::SYSTEM | config::TRANSLATE;
        State {
            ram,
            output_port: OUTPUT_RESET | OUTPUT_A20,
            command: 0,
            last_was_command: false,
            buffer: None,
            stale: 0,
            answers: VecDeque::new(),
            released: false,
            keyboard: Keyboard::new(),
            mouse: Mouse::new(),
        }
    }

    fn valid(&self) -> bool {
        self.answers.len() <= ROOM && self.output_port < 4 && self.keyboard.valid() && self.mouse.valid()
    }
}

/// Controller, keyboard and mouse.
pub struct I8042 {
    state: State,
    irqs: [Arc<dyn IrqLine>; 2],
    a20: Arc<dyn IrqLine>,
    power: Arc<dyn PowerSink>,
}

impl I8042 {
    /// A controller. `irqs` are IRQ 1 and 12, `a20` is high while the A20 gate is open (the machine ORs it with
    /// port 0x92's), `power` gets resets (command 0xFE and the output port).
    pub fn new(irqs: [Arc<dyn IrqLine>; 2], a20: Arc<dyn IrqLine>, power: Arc<dyn PowerSink>) -> I8042 {
        let c = I8042 { state: State::new(), irqs, a20, power };
        c.a20.set(true);
        c
    }

    /// A key goes down or up. `key` is its set 1 make code: 0x1E for A, 0xE0xx for the extended keys (0xE01D right
    /// Ctrl, 0xE037 Print Screen), 0xE11D for Pause. Repeats are the caller's: a further `down` sends the code
    /// again.
    pub fn key(&mut self, key: u16, down: bool) {
        self.state.keyboard.key(key, down);
        self.fill();
    }

    /// The mouse moved by `dx` to the right, `dy` down, its wheel by `dz` towards the user; `buttons` are those
    /// held now: bit 0 left, 1 right, 2 middle, 3 and 4 the side buttons.
    pub fn mouse(&mut self, dx: i32, dy: i32, dz: i32, buttons: u8) {
        self.state.mouse.moved(dx, dy, dz, buttons);
        self.fill();
    }

    /// The keyboard's lights: bit 0 Scroll Lock, 1 Num Lock, 2 Caps Lock.
    pub fn leds(&self) -> u8 {
        self.state.keyboard.leds
    }

    fn config(&self) -> u8 {
        self.state.ram[0]
    }

    /// Put the next byte into an empty output buffer, controller first, and drive the lines.
    fn fill(&mut self) {
        let config = self.config();
        let s = &mut self.state;
        if s.buffer.is_none() {
            s.buffer = s.answers.pop_front();
        }
        while s.buffer.is_none() && config & config::KEYBOARD_OFF == 0 {
            let Some(v) = s.keyboard.take() else { break };
            let v = if config & config::TRANSLATE != 0 {
                scancodes::translate(v, &mut s.released)
            } else {
                Some(v)
            };
            s.buffer = v.map(|v| (v, false));
        }
        if s.buffer.is_none() && config & config::MOUSE_OFF == 0 {
            s.buffer = s.mouse.take().map(|v| (v, true));
        }
        self.drive();
    }

    fn drive(&self) {
        let (b, config) = (self.state.buffer, self.config());
        self.irqs[0].set(b.is_some_and(|b| !b.1) && config & config::KEYBOARD_IRQ != 0);
        self.irqs[1].set(b.is_some_and(|b| b.1) && config & config::MOUSE_IRQ != 0);
    }

    fn answer(&mut self, v: u8, mouse: bool) {
        if self.state.answers.len() < ROOM {
            self.state.answers.push_back((v, mouse));
        }
    }

    fn status(&self) -> u8 {
        let s = &self.state;
        let full = match s.buffer {
            None => 0,
            Some((_, false)) => 1,
            Some((_, true)) => 0x21,
        };
        // Bit 4: the keyboard is not locked.
        full | s.ram[0] & config::SYSTEM | u8::from(s.last_was_command) << 3 | 0x10
    }

    fn read_data(&mut self) -> u8 {
        if let Some((v, _)) = self.state.buffer.take() {
            self.state.stale = v;
            // Lines fall before the next byte raises them: each byte is an edge.
            self.drive();
            self.fill();
            return v;
        }
        self.state.stale
    }

    fn set_output_port(&mut self, v: u8) {
        self.state.output_port = v & OUTPUT_A20 | OUTPUT_RESET;
        self.a20.set(v & OUTPUT_A20 != 0);
        if v & OUTPUT_RESET == 0 {
            self.power.event(PowerEvent::Reset);
        }
    }

    fn command(&mut self, v: u8) {
        self.state.last_was_command = true;
        self.state.command = 0;
        match v {
            0x20..=0x3f => {
                let b = self.state.ram[usize::from(v & 31)];
                self.answer(b, false);
            }
            0x60..=0x7f | 0xd1..=0xd4 => self.state.command = v,
            0xa7 => self.state.ram[0] |= config::MOUSE_OFF,
            0xa8 => self.state.ram[0] &= !config::MOUSE_OFF,
            // Interface tests: no fault.
            0xa9 | 0xab => self.answer(0, false),
            0xaa => {
                self.state.ram[0] |= config::SYSTEM;
                self.answer(0x55, false);
            }
            0xad => self.state.ram[0] |= config::KEYBOARD_OFF,
            0xae => self.state.ram[0] &= !config::KEYBOARD_OFF,
            // Input port: not locked.
            0xc0 => self.answer(0x80, false),
            0xd0 => {
                let pending = match self.state.buffer {
                    None => 0,
                    Some((_, false)) => 0x10,
                    Some((_, true)) => 0x20,
                };
                let port = self.state.output_port | pending;
                self.answer(port, false);
            }
            0xdd => self.set_output_port(self.state.output_port & !OUTPUT_A20),
            0xdf => self.set_output_port(self.state.output_port | OUTPUT_A20),
            // Pulse the output lines whose bit is 0; bit 0 is the processor's reset.
            0xf0..=0xff if v & 1 == 0 => self.power.event(PowerEvent::Reset),
            _ => {}
        }
        self.fill();
    }

    fn write_data(&mut self, v: u8) {
        self.state.last_was_command = false;
        match std::mem::take(&mut self.state.command) {
            c @ 0x60..=0x7f => self.state.ram[usize::from(c & 31)] = v,
            0xd1 => self.set_output_port(v),
            0xd2 => self.answer(v, false),
            0xd3 => self.answer(v, true),
            0xd4 => self.state.mouse.write(v),
            _ => {
                // Talking to the keyboard opens its clock line.
                self.state.ram[0] &= !config::KEYBOARD_OFF;
                self.state.keyboard.write(v);
            }
        }
        self.fill();
    }
}

impl PioDevice for I8042 {
    fn pio_read(&mut self, port: u16, data: &mut [u8]) {
        ports::read(port, data, |p| match p {
            DATA => self.read_data(),
            COMMAND => self.status(),
            _ => 0xff,
        });
    }

    fn pio_write(&mut self, port: u16, data: &[u8]) {
        ports::write(port, data, |p, v| match p {
            DATA => self.write_data(v),
            COMMAND => self.command(v),
            _ => {}
        });
    }
}

impl Device for I8042 {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn reset(&mut self) {
        self.state = State::new();
        self.a20.set(true);
        self.drive();
    }

    fn save(&self) -> Section {
        Section::new(KIND, 0, 1, &self.state)
    }

    fn load(&mut self, section: &Section) -> Result<(), StateError> {
        let s: State = section.decode(KIND, 1)?;
        if !s.valid() {
            return Err(section.invalid("a register holds an impossible value"));
        }
        self.state = s;
        self.a20.set(self.state.output_port & OUTPUT_A20 != 0);
        self.drive();
        Ok(())
    }
}
