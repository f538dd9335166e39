//! Frames on their way to the guest.

use crate::{Offloads, VnetHeader};
use std::collections::VecDeque;

/// Bytes that wait before connections stop adding to them.
const ROOM: usize = 2 << 20;
/// Frames and bytes that wait before anything more is dropped.
const MOST_FRAMES: usize = 4096;
const MOST_BYTES: usize = 2 * ROOM;
/// Empty buffers kept for reuse, and their bytes.
const SPARE: usize = 64;
const SPARE_BYTES: usize = 1 << 20;
/// Urgent frames that go before a bulk frame that waits.
const URGENT_FIRST: u32 = 16;

type Queue = VecDeque<(VnetHeader, Vec<u8>)>;

/// The queues, and who waits for what of them.
#[derive(Default)]
pub struct Output {
    bulk: Queue,
    /// What goes first: frames of connections that have nothing else on its way.
    urgent: Queue,
    /// How many urgent ones went since the last of the others.
    in_a_row: u32,
    bytes: usize,
    spare: Vec<Vec<u8>>,
    spare_bytes: usize,
    /// The device found nothing and wants to be told.
    reader_waits: bool,
    /// Connections wait for room.
    pub writer_waits: bool,
    /// What the guest's driver can take.
    pub offloads: Offloads,
}

impl Output {
    /// Whether data may be added.
    pub fn has_room(&self) -> bool {
        self.bytes < ROOM
    }

    /// Add a frame, or drop it as a full network would. True if the device is to be told.
    pub fn push(&mut self, header: VnetHeader, frame: Vec<u8>, urgent: bool) -> bool {
        if self.bulk.len() + self.urgent.len() >= MOST_FRAMES || self.bytes >= MOST_BYTES {
            self.give_back(frame);
            return false;
        }
        self.bytes += frame.len();
        if urgent { &mut self.urgent } else { &mut self.bulk }.push_back((header, frame));
        std::mem::take(&mut self.reader_waits)
    }

    /// An empty buffer.
    pub fn buffer(&mut self) -> Vec<u8> {
        let mut b = self.spare.pop().unwrap_or_default();
        self.spare_bytes -= b.capacity();
        b.clear();
        b
    }

    fn give_back(&mut self, buffer: Vec<u8>) {
        if self.spare.len() < SPARE && self.spare_bytes + buffer.capacity() <= SPARE_BYTES {
            self.spare_bytes += buffer.capacity();
            self.spare.push(buffer);
        }
    }

    /// Take the next frame, leaving the old buffer. The second value: connections may go on.
    pub fn pop(&mut self, frame: &mut Vec<u8>) -> (Option<VnetHeader>, bool) {
        let turn_of_bulk = self.in_a_row >= URGENT_FIRST && !self.bulk.is_empty();
        let urgent = if turn_of_bulk { None } else { self.urgent.pop_front() };
        self.in_a_row = if urgent.is_some() { self.in_a_row + 1 } else { 0 };
        let Some((header, mut data)) = urgent.or_else(|| self.bulk.pop_front()) else {
            self.reader_waits = true;
            return (None, std::mem::take(&mut self.writer_waits));
        };
        self.bytes -= data.len();
        std::mem::swap(frame, &mut data);
        self.give_back(data);
        let wake = self.bytes < ROOM / 2 && std::mem::take(&mut self.writer_waits);
        (Some(header), wake)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urgent_frames_overtake_but_do_not_starve_the_others() {
        let mut out = Output::default();
        for n in 0..40u8 {
            out.push(VnetHeader::default(), vec![n; 14], false);
            out.push(VnetHeader::default(), vec![100 + n; 14], true);
        }
        let mut frame = Vec::new();
        let mut order = Vec::new();
        while out.pop(&mut frame).0.is_some() {
            order.push(frame[0]);
        }
        assert_eq!(order[..18], [vec![100, 101, 102], (103..116).collect(), vec![0, 116]].concat());
        assert_eq!(order.len(), 80);
        let of = |urgent: bool| order.iter().filter(|&&b| (b >= 100) == urgent).copied().collect::<Vec<_>>();
        assert!(of(false).is_sorted() && of(true).is_sorted(), "each kind keeps its order");
    }

    #[test]
    fn what_does_not_fit_is_dropped() {
        let mut out = Output::default();
        for _ in 0..MOST_FRAMES + 10 {
            out.push(VnetHeader::default(), vec![0; 14], false);
        }
        assert_eq!(out.bulk.len(), MOST_FRAMES);
    }
}
