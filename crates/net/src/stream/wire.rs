//! Frames in a stream of bytes: each after its length, 32 bits, big endian (QEMU net/socket.c and net/net.c).

use crate::MAX_FRAME;
use socket2::Socket;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, RawFd};

/// Bytes of the length.
const LENGTH: usize = 4;
/// Longest frame that QEMU knows (NET_BUFSIZE). More means that the stream is out of step.
const LONGEST: usize = 4096 + 65536;
/// Bytes read at a time.
const CHUNK: usize = 256 << 10;

/// What stands at the beginning of some bytes.
#[derive(Debug, PartialEq, Eq)]
pub enum Scan {
    /// The beginning of a frame at most.
    Part,
    /// A frame: this many bytes behind its length.
    Frame(usize),
    /// No frame is that long.
    OutOfStep,
}

/// Bytes that came and are not taken yet.
#[derive(Debug, Default)]
pub struct Frames {
    data: Vec<u8>,
    start: usize,
}

impl Frames {
    /// Look at what is there.
    pub fn scan(&self) -> Scan {
        let rest = &self.data[self.start..];
        let Some(head) = rest.first_chunk::<LENGTH>() else { return Scan::Part };
        match u32::from_be_bytes(*head) as usize {
            len if len > LONGEST => Scan::OutOfStep,
            len if rest.len() - LENGTH >= len => Scan::Frame(len),
            _ => Scan::Part,
        }
    }

    /// Take the next frame. Those that no network device may have are passed over.
    ///
    /// # Errors
    /// When the stream is out of step.
    pub fn take(&mut self, frame: &mut Vec<u8>) -> io::Result<bool> {
        loop {
            match self.scan() {
                Scan::Part => return Ok(false),
                Scan::OutOfStep => return Err(ErrorKind::InvalidData.into()),
                Scan::Frame(len) => {
                    let at = self.start + LENGTH;
                    self.start = at + len;
                    if (1..=MAX_FRAME).contains(&len) {
                        frame.clear();
                        frame.extend_from_slice(&self.data[at..at + len]);
                        return Ok(true);
                    }
                }
            }
        }
    }

    /// Add what came.
    pub fn push(&mut self, bytes: &[u8]) {
        self.make_room();
        self.data.extend_from_slice(bytes);
    }

    fn make_room(&mut self) {
        self.data.drain(..self.start);
        self.start = 0;
    }
}

/// The receiving side of a connection.
#[derive(Default)]
pub struct Reader {
    frames: Frames,
}

impl Reader {
    /// The next frame, if there is a whole one.
    ///
    /// # Errors
    /// When the connection is over or out of step.
    pub fn receive(&mut self, socket: &Socket, frame: &mut Vec<u8>) -> io::Result<bool> {
        loop {
            if self.frames.take(frame)? {
                return Ok(true);
            }
            self.frames.make_room();
            match super::calls::receive(socket.as_raw_fd(), &mut self.frames.data, CHUNK) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(e) => return Err(e),
            }
        }
    }

    /// Whether whoever reads will find something before the end.
    pub fn has_more(&self, socket: &Socket) -> bool {
        matches!(self.frames.scan(), Scan::Frame(_)) || super::calls::waiting(socket.as_raw_fd()) > 0
    }
}

/// The sending side of a connection.
#[derive(Default)]
pub struct Writer {
    /// The rest of a frame that the socket took only a part of.
    rest: Vec<u8>,
    done: usize,
}

impl Writer {
    /// Send what is left of the last frame; `false` if some is still left.
    ///
    /// # Errors
    /// The host's.
    pub fn flush(&mut self, fd: RawFd) -> io::Result<bool> {
        while self.done < self.rest.len() {
            match super::calls::send(fd, &[&self.rest[self.done..]]) {
                Ok(n) => self.done += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(e) => return Err(e),
            }
        }
        self.rest.clear();
        self.done = 0;
        Ok(true)
    }

    /// Send a frame; `false` if there is no room for it.
    ///
    /// # Errors
    /// The host's.
    pub fn send(&mut self, fd: RawFd, frame: &[u8]) -> io::Result<bool> {
        if !self.flush(fd)? {
            return Ok(false);
        }
        let length = (frame.len() as u32).to_be_bytes();
        loop {
            match super::calls::send(fd, &[&length, frame]) {
                Ok(n) => {
                    // What the socket did not take of it must follow before anything else.
                    self.rest.extend_from_slice(&length[n.min(LENGTH)..]);
                    self.rest.extend_from_slice(&frame[n.saturating_sub(LENGTH)..]);
                    return Ok(true);
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(e) => return Err(e),
            }
        }
    }
}
