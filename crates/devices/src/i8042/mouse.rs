//! The PS/2 mouse with the wheel and five-button extensions (IBM PS/2 Hardware Interface Technical Reference, mouse
//! section; Microsoft IntelliMouse).

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

const ACK: u8 = 0xfa;
const RESEND: u8 = 0xfe;
/// Bytes of movement that are kept; what does not fit stays summed up. Answers have room beyond.
const STREAM_ROOM: usize = 16;
const ROOM: usize = 32;
/// Limit of the sums: far more than any screen.
const FAR: i32 = 1 << 20;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Mouse {
    queue: VecDeque<u8>,
    enabled: bool,
    remote: bool,
    wrap: bool,
    scale_2: bool,
    resolution: u8,
    rate: u8,
    /// 0 plain, 3 with wheel, 4 with wheel and five buttons.
    id: u8,
    /// The last three sample rates set: the knock that opens the extensions.
    knock: [u8; 3],
    command: u8,
    last_sent: u8,
    dx: i32,
    dy: i32,
    dz: i32,
    buttons: u8,
    /// Buttons as last reported.
    reported: u8,
}

impl Mouse {
    pub(super) fn new() -> Mouse {
        Mouse {
            queue: VecDeque::new(),
            enabled: false,
            remote: false,
            wrap: false,
            scale_2: false,
            resolution: 2,
            rate: 100,
            id: 0,
            knock: [0; 3],
            command: 0,
            last_sent: 0,
            dx: 0,
            dy: 0,
            dz: 0,
            buttons: 0,
            reported: 0,
        }
    }

    pub(super) fn valid(&self) -> bool {
        let near = |v: i32| (-FAR..=FAR).contains(&v);
        self.queue.len() <= ROOM
            && self.resolution < 4
            && matches!(self.id, 0 | 3 | 4)
            && near(self.dx)
            && near(self.dy)
            && near(self.dz)
            && self.buttons < 32
            && self.reported < 32
    }

    fn answer(&mut self, bytes: &[u8]) {
        if self.queue.len() + bytes.len() <= ROOM {
            self.queue.extend(bytes);
        }
    }

    pub(super) fn moved(&mut self, dx: i32, dy: i32, dz: i32, buttons: u8) {
        let sum = |a: i32, b: i32| a.saturating_add(b).clamp(-FAR, FAR);
        self.dx = sum(self.dx, dx);
        // Screens count down, mice up.
        self.dy = sum(self.dy, dy.saturating_neg());
        self.dz = sum(self.dz, dz);
        self.buttons = buttons & 0x1f;
        self.stream();
    }

    /// Send what has summed up, as far as there is room.
    fn stream(&mut self) {
        while self.enabled
            && !self.remote
            && !self.wrap
            && self.queue.len() + 4 <= STREAM_ROOM
            && (self.dx != 0 || self.dy != 0 || self.dz != 0 && self.id != 0 || self.buttons != self.reported)
        {
            let packet = self.packet(self.scale_2);
            self.queue.extend(packet);
        }
    }

    fn packet(&mut self, scaled: bool) -> Vec<u8> {
        let part = |v: &mut i32, limit: i32| {
            let p = (*v).clamp(-limit, limit);
            *v -= p;
            p
        };
        let scale = |v: i32| match (scaled, v.abs()) {
            (false, _) | (_, 0 | 1) => v,
            (_, 2) => v.signum(),
            (_, 3) => v,
            (_, 4) => v.signum() * 6,
            (_, 5) => v.signum() * 9,
            _ => (v * 2).clamp(-255, 255),
        };
        let (x, y) = (scale(part(&mut self.dx, 255)), scale(part(&mut self.dy, 255)));
        let sign = |v: i32, bit: u8| if v < 0 { 1 << bit } else { 0 };
        let mut p = vec![8 | self.buttons & 7 | sign(x, 4) | sign(y, 5), x as u8, y as u8];
        match self.id {
            3 => p.push(part(&mut self.dz, 7) as u8),
            4 => p.push(part(&mut self.dz, 7) as u8 & 15 | (self.buttons & 0x18) << 1),
            _ => self.dz = 0,
        }
        self.reported = self.buttons;
        p
    }

    pub(super) fn take(&mut self) -> Option<u8> {
        let v = self.queue.pop_front()?;
        self.last_sent = v;
        self.stream();
        Some(v)
    }

    fn defaults(&mut self) {
        *self = Mouse { id: self.id, buttons: self.buttons, last_sent: self.last_sent, ..Mouse::new() };
    }

    pub(super) fn write(&mut self, v: u8) {
        if self.wrap && v != 0xec && v != 0xff {
            return self.answer(&[v]);
        }
        match std::mem::take(&mut self.command) {
            0xe8 if v < 4 => {
                self.resolution = v;
                return self.answer(&[ACK]);
            }
            0xf3 if v < 0xe6 => {
                self.rate = v;
                self.knock = [self.knock[1], self.knock[2], v];
                match self.knock {
                    [200, 100, 80] if self.id == 0 => self.id = 3,
                    [200, 200, 80] if self.id == 3 => self.id = 4,
                    _ => {}
                }
                return self.answer(&[ACK]);
            }
            _ => {}
        }
        match v {
            0xe6 => self.scale_2 = false,
            0xe7 => self.scale_2 = true,
            0xe8 | 0xf3 => self.command = v,
            0xe9 => {
                let b = self.buttons;
                let flags = u8::from(self.remote) << 6
                    | u8::from(self.enabled) << 5
                    | u8::from(self.scale_2) << 4
                    | (b & 1) << 2
                    | (b & 4) >> 1
                    | (b & 2) >> 1;
                let answer = [ACK, flags, self.resolution, self.rate];
                return self.answer(&answer);
            }
            0xea => (self.remote, self.wrap) = (false, false),
            0xeb => {
                self.queue.clear();
                let packet = self.packet(false);
                self.answer(&[ACK]);
                return self.answer(&packet);
            }
            0xec => self.wrap = false,
            0xee => self.wrap = true,
            0xf0 => self.remote = true,
            0xf2 => {
                let id = self.id;
                return self.answer(&[ACK, id]);
            }
            0xf4 => self.enabled = true,
            0xf5 => self.enabled = false,
            0xf6 => self.defaults(),
            0xfe => {
                let last = self.last_sent;
                return self.answer(&[last]);
            }
            0xff => {
                *self = Mouse { buttons: self.buttons, ..Mouse::new() };
                return self.answer(&[ACK, 0xaa, 0]);
            }
            _ => return self.answer(&[RESEND]),
        }
        self.answer(&[ACK]);
        self.stream();
    }
}
