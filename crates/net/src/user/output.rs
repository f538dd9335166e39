//! Frames on their way to the guest.

use crate::{Offloads, VnetHeader};
use std::collections::VecDeque;

/// Bytes that wait before connections stop adding to them.
const ROOM: usize = 2 << 20;
/// Frames and bytes that wait before anything more is dropped.
const MOST_FRAMES: usize = 4096;
const MOST_BYTES: usize = 2 * ROOM;
/// Empty buffers kept for reuse.
const SPARE: usize = 64;

/// The queue, and who waits for what of it.
#[derive(Default)]
pub struct Output {
    frames: VecDeque<(VnetHeader, Vec<u8>)>,
    bytes: usize,
    spare: Vec<Vec<u8>>,
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
    pub fn push(&mut self, header: VnetHeader, frame: Vec<u8>) -> bool {
        if self.frames.len() >= MOST_FRAMES || self.bytes >= MOST_BYTES {
            return false;
        }
        self.bytes += frame.len();
        self.frames.push_back((header, frame));
        std::mem::take(&mut self.reader_waits)
    }

    /// An empty buffer.
    pub fn buffer(&mut self) -> Vec<u8> {
        self.spare.pop().unwrap_or_default()
    }

    /// Take the next frame, leaving the old buffer. The second value: connections may go on.
    pub fn pop(&mut self, frame: &mut Vec<u8>) -> (Option<VnetHeader>, bool) {
        let Some((header, mut data)) = self.frames.pop_front() else {
            self.reader_waits = true;
            return (None, std::mem::take(&mut self.writer_waits));
        };
        self.bytes -= data.len();
        std::mem::swap(frame, &mut data);
        if self.spare.len() < SPARE {
            self.spare.push(data);
        }
        let wake = self.bytes < ROOM / 2 && std::mem::take(&mut self.writer_waits);
        (Some(header), wake)
    }
}
