//! The PS/2 keyboard (IBM PS/2 Hardware Interface Technical Reference, keyboard section).

use super::scancodes;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

const ACK: u8 = 0xfa;
const RESEND: u8 = 0xfe;
const PASSED: u8 = 0xaa;
/// Bytes of scan codes that are kept; answers to commands have room beyond.
const SCAN_ROOM: usize = 16;
const ROOM: usize = 32;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Keyboard {
    queue: VecDeque<u8>,
    enabled: bool,
    set: u8,
    /// Bits 2:0: Scroll Lock, Num Lock, Caps Lock.
    pub(super) leds: u8,
    typematic: u8,
    /// The command that waits for its parameter.
    command: u8,
    last_sent: u8,
    /// Set 3: keys (by code) whose release is not sent.
    silent: [u8; 32],
}

impl Keyboard {
    pub(super) fn new() -> Keyboard {
        Keyboard {
            queue: VecDeque::new(),
            enabled: true,
            set: 2,
            leds: 0,
            typematic: 0x2b,
            command: 0,
            last_sent: 0,
            silent: [0; 32],
        }
    }

    pub(super) fn valid(&self) -> bool {
        self.queue.len() <= ROOM && matches!(self.set, 1..=3) && self.leds < 8 && self.typematic < 0x80
    }

    fn answer(&mut self, bytes: &[u8]) {
        if self.queue.len() + bytes.len() <= ROOM {
            self.queue.extend(bytes);
        }
    }

    pub(super) fn key(&mut self, key: u16, down: bool) {
        if !self.enabled {
            return;
        }
        let breaks = |c: u8| self.silent[usize::from(c / 8)] & 1 << (c % 8) == 0;
        let bytes = scancodes::bytes(key, down, self.set, breaks);
        if self.queue.len() + bytes.len() <= SCAN_ROOM {
            self.queue.extend(bytes);
        } else if self.queue.len() <= SCAN_ROOM {
            // The overrun code, once, in the place after the last that fits.
            let overrun = if self.set == 1 { 0xff } else { 0 };
            if self.queue.back() != Some(&overrun) {
                self.queue.push_back(overrun);
            }
        }
    }

    pub(super) fn take(&mut self) -> Option<u8> {
        let v = self.queue.pop_front()?;
        if v != RESEND {
            self.last_sent = v;
        }
        Some(v)
    }

    fn defaults(&mut self) {
        *self = Keyboard { last_sent: self.last_sent, leds: self.leds, ..Keyboard::new() };
    }

    pub(super) fn write(&mut self, v: u8) {
        // A command byte in a parameter's place is a new command.
        if self.command != 0 && v < 0xed {
            return self.parameter(v);
        }
        self.command = 0;
        match v {
            0xed | 0xf0 | 0xf3 | 0xfb..=0xfd => {
                self.command = v;
                self.answer(&[ACK]);
            }
            0xee => self.answer(&[0xee]),
            0xf2 => self.answer(&[ACK, 0xab, 0x83]),
            0xf4 => {
                self.queue.clear();
                self.enabled = true;
                self.answer(&[ACK]);
            }
            0xf5 => {
                self.defaults();
                self.enabled = false;
                self.answer(&[ACK]);
            }
            0xf6 => {
                self.defaults();
                self.answer(&[ACK]);
            }
            // All keys: repeat only, make and break, make only, all three.
            0xf7..=0xfa => {
                self.silent = if v == 0xf7 || v == 0xf9 { [0xff; 32] } else { [0; 32] };
                self.answer(&[ACK]);
            }
            0xfe => {
                let last = self.last_sent;
                self.answer(&[last]);
            }
            0xff => {
                *self = Keyboard::new();
                self.answer(&[ACK, PASSED]);
            }
            _ => self.answer(&[RESEND]),
        }
    }

    fn parameter(&mut self, v: u8) {
        let command = std::mem::take(&mut self.command);
        match (command, v) {
            (0xed, _) => self.leds = v & 7,
            (0xf3, 0..0x80) => self.typematic = v,
            (0xf0, 0) => {
                let set = self.set;
                return self.answer(&[ACK, set]);
            }
            (0xf0, 1..=3) => self.set = v,
            (0xfb..=0xfd, _) => {
                let (byte, bit) = (usize::from(v / 8), 1 << (v % 8));
                if command == 0xfc {
                    self.silent[byte] &= !bit
                } else {
                    self.silent[byte] |= bit
                }
                // More key codes may follow.
                self.command = command;
            }
            _ => return self.answer(&[RESEND]),
        }
        self.answer(&[ACK]);
    }
}
