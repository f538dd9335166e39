//! One request (virtio 1.3 section 5.2.6).

use super::config::{MAX_DISCARD_RANGES, MAX_RANGE_SECTORS, MAX_ZERO_RANGES};
use super::{Blk, F_DISCARD, F_WRITE_ZEROES, SECTOR_SIZE, SERIAL_LEN};
use crate::{Chain, QueueError};
use ringfort_block::aio::{Op, Payload, Range, Request};
use ringfort_block::{SharedSlice, SharedSliceMut};
use std::io;

const HEADER_LEN: u64 = 16;
const RANGE_LEN: u64 = 16;
const UNMAP: u32 = 1;

// Request types.
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// The status byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

impl From<&io::Error> for Outcome {
    fn from(e: &io::Error) -> Outcome {
        match e.kind() {
            io::ErrorKind::Unsupported => Outcome::Unsupported,
            _ => Outcome::IoError,
        }
    }
}

/// What is to be done about a request.
pub enum Step {
    /// This, by the back end.
    Start(Request),
    /// Nothing more.
    End(Outcome),
}

/// A chain with a whole header and room for a status.
pub struct Transfer {
    chain: Chain,
    kind: u32,
    sector: u64,
    /// Data bytes: behind the header, or before the status.
    out_len: u64,
    in_len: u64,
}

impl Payload for Transfer {
    fn targets(&self) -> Vec<SharedSliceMut<'_>> {
        self.chain.write_slices(0, self.in_len)
    }

    fn sources(&self) -> Vec<SharedSlice<'_>> {
        self.chain.read_slices(HEADER_LEN, self.out_len)
    }
}

impl Transfer {
    pub fn parse(chain: Chain) -> Result<Transfer, QueueError> {
        let header: [u8; HEADER_LEN as usize] = chain.read_array(0).ok_or(QueueError::Shape)?;
        let in_len = chain.writable().checked_sub(1).ok_or(QueueError::Shape)?;
        let out_len = chain.readable() - HEADER_LEN;
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let kind = u32::from_le_bytes([a, b, c, d]);
        Ok(Transfer { chain, kind, sector: u64::from_le_bytes(sector), out_len, in_len })
    }

    /// Bytes of data.
    pub fn size(&self) -> u64 {
        self.out_len.max(self.in_len)
    }

    /// Number of the chain's first descriptor.
    pub fn head(&self) -> u16 {
        self.chain.head()
    }

    pub fn into_chain(self) -> Chain {
        self.chain
    }

    /// Whether it changes the disk, or makes changes durable.
    pub fn is_write(&self) -> bool {
        self.kind != IN
    }

    /// Set the status; gives the number of bytes written to the chain.
    pub fn finish(&self, outcome: Outcome) -> u32 {
        if self.kind == IN {
            // Also after an error: a part may have been filled.
            self.chain.mark_written(0, self.in_len);
        }
        self.chain.write(self.in_len, &[outcome as u8]);
        let data = match (self.kind, outcome) {
            (IN, _) => self.in_len,
            (GET_ID, Outcome::Ok) => self.in_len.min(SERIAL_LEN as u64),
            _ => 0,
        };
        u32::try_from(data + 1).unwrap_or(u32::MAX)
    }

    /// What to do for `disk`. What the driver got wrong ends here, as an error that is its own.
    pub fn plan(&self, disk: &Blk) -> Step {
        let through = !disk.write_cached();
        match self.kind {
            IN => self.data(disk, Op::Read, self.in_len),
            OUT if disk.backend.read_only() => Step::End(Outcome::IoError),
            OUT => self.data(disk, Op::Write { through }, self.out_len),
            FLUSH => Step::Start(Request::other(Op::Flush)),
            GET_ID => {
                let len = self.in_len.min(SERIAL_LEN as u64) as usize;
                self.chain.write(0, &disk.serial[..len]);
                Step::End(Outcome::Ok)
            }
            DISCARD | WRITE_ZEROES => match self.ranges(disk) {
                Ok(ranges) if self.kind == DISCARD => Step::Start(Request::other(Op::Discard(ranges))),
                Ok(ranges) => Step::Start(Request::other(Op::Zeroes { ranges, through })),
                Err(outcome) => Step::End(outcome),
            },
            _ => Step::End(Outcome::Unsupported),
        }
    }

    /// A transfer of whole sectors inside the disk.
    fn data(&self, disk: &Blk, op: Op, len: u64) -> Step {
        let offset = self.sector.checked_mul(SECTOR_SIZE);
        match offset {
            Some(offset)
                if len.is_multiple_of(SECTOR_SIZE)
                    && ringfort_block::check_range(disk.backend.size(), offset, len).is_ok() =>
            {
                Step::Start(Request { op, offset, len })
            }
            _ => Step::End(Outcome::IoError),
        }
    }

    /// The ranges of discard and write-zeroes (sections 5.2.6.2 and 5.2.6.3 say which errors are which), all of them
    /// checked.
    fn ranges(&self, disk: &Blk) -> Result<Vec<Range>, Outcome> {
        let discard = self.kind == DISCARD;
        if disk.backend.read_only() {
            return Err(Outcome::IoError);
        }
        if !disk.has(if discard { F_DISCARD } else { F_WRITE_ZEROES }) {
            return Err(Outcome::Unsupported);
        }
        let count = self.out_len / RANGE_LEN;
        let most = if discard { MAX_DISCARD_RANGES } else { MAX_ZERO_RANGES };
        if !self.out_len.is_multiple_of(RANGE_LEN) || count == 0 || count > u64::from(most) {
            return Err(Outcome::IoError);
        }
        let mut list = Vec::with_capacity(count as usize);
        for i in 0..count {
            let raw: [u8; 16] = self.chain.read_array(HEADER_LEN + i * RANGE_LEN).ok_or(Outcome::IoError)?;
            let word = |at: usize| u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
            let (sector, sectors, flags) = (u64::from(word(0)) | u64::from(word(4)) << 32, word(8), word(12));
            if flags & !UNMAP != 0 || (discard && flags != 0) {
                return Err(Outcome::Unsupported);
            }
            let len = u64::from(sectors) * SECTOR_SIZE;
            let offset = sector.checked_mul(SECTOR_SIZE).ok_or(Outcome::IoError)?;
            if sectors > MAX_RANGE_SECTORS
                || ringfort_block::check_range(disk.backend.size(), offset, len).is_err()
            {
                return Err(Outcome::IoError);
            }
            list.push(Range { offset, len, unmap: flags & UNMAP != 0 });
        }
        list.retain(|r| r.len > 0);
        Ok(list)
    }
}
