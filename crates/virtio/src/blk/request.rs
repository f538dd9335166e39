//! One request (virtio 1.3 section 5.2.6).

use super::config::{MAX_DISCARD_RANGES, MAX_RANGE_SECTORS, MAX_ZERO_RANGES};
use super::{Blk, F_DISCARD, F_WRITE_ZEROES, SECTOR_SIZE, SERIAL_LEN};
use crate::{Chain, QueueError};
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

impl From<io::Result<()>> for Outcome {
    fn from(r: io::Result<()>) -> Outcome {
        match r {
            Ok(()) => Outcome::Ok,
            Err(e) if e.kind() == io::ErrorKind::Unsupported => Outcome::Unsupported,
            Err(_) => Outcome::IoError,
        }
    }
}

/// A request with a whole header and room for a status.
pub struct Request<'a> {
    disk: &'a Blk,
    chain: &'a Chain,
    kind: u32,
    sector: u64,
    /// Data bytes: behind the header, or before the status.
    out_len: u64,
    in_len: u64,
}

impl<'a> Request<'a> {
    pub fn parse(disk: &'a Blk, chain: &'a Chain) -> Result<Request<'a>, QueueError> {
        let header: [u8; HEADER_LEN as usize] = chain.read_array(0).ok_or(QueueError::Shape)?;
        let in_len = chain.writable().checked_sub(1).ok_or(QueueError::Shape)?;
        let out_len = chain.readable() - HEADER_LEN;
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let kind = u32::from_le_bytes([a, b, c, d]);
        Ok(Request { disk, chain, kind, sector: u64::from_le_bytes(sector), out_len, in_len })
    }

    /// Bytes of data.
    pub fn size(&self) -> u64 {
        self.out_len.max(self.in_len)
    }

    /// Set the status; gives the number of bytes written to the chain.
    fn finish(&self, outcome: Outcome) -> u32 {
        self.chain.write(self.in_len, &[outcome as u8]);
        let data = match (self.kind, outcome) {
            (IN, _) => self.in_len,
            (GET_ID, Outcome::Ok) => self.in_len.min(SERIAL_LEN as u64),
            _ => 0,
        };
        u32::try_from(data + 1).unwrap_or(u32::MAX)
    }

    /// Byte offset of the request, if its data are whole sectors inside the disk.
    fn offset(&self, len: u64) -> io::Result<u64> {
        let offset = self.sector.checked_mul(SECTOR_SIZE).ok_or(io::ErrorKind::InvalidInput)?;
        if !len.is_multiple_of(SECTOR_SIZE) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        ringfort_block::check_range(self.disk.backend.size(), offset, len)?;
        Ok(offset)
    }

    /// Do it, however long it takes.
    pub fn execute(&self) -> u32 {
        let backend = &self.disk.backend;
        let outcome = match self.kind {
            IN => self
                .offset(self.in_len)
                .and_then(|at| backend.read_at(&self.chain.write_slices(0, self.in_len), at))
                .into(),
            OUT => self.write().into(),
            FLUSH => backend.flush().into(),
            GET_ID => self.serial(),
            DISCARD | WRITE_ZEROES => self.ranges(),
            _ => Outcome::Unsupported,
        };
        if self.kind == IN {
            // Also after an error: a part may have been filled.
            self.chain.mark_written(0, self.in_len);
        }
        self.finish(outcome)
    }

    /// Do it if nothing has to be waited for.
    pub fn try_execute(&self) -> Option<u32> {
        let backend = &self.disk.backend;
        match self.kind {
            IN => {
                let at = self.offset(self.in_len).ok()?;
                let done = backend.try_read_at(&self.chain.write_slices(0, self.in_len), at);
                self.chain.mark_written(0, self.in_len);
                // Errors are found again, and reported, where all requests are done.
                done.ok().filter(|&d| d).map(|_| self.finish(Outcome::Ok))
            }
            OUT if backend.writes_are_cached() && self.disk.write_cached() => Some(self.execute()),
            FLUSH if backend.flush_is_quick() => Some(self.execute()),
            GET_ID => Some(self.execute()),
            _ => None,
        }
    }

    fn write(&self) -> io::Result<()> {
        let backend = &self.disk.backend;
        let at = self.offset(self.out_len)?;
        backend.write_at(&self.chain.read_slices(HEADER_LEN, self.out_len), at)?;
        if self.disk.write_cached() { Ok(()) } else { backend.flush() }
    }

    fn serial(&self) -> Outcome {
        let len = self.in_len.min(SERIAL_LEN as u64) as usize;
        self.chain.write(0, &self.disk.serial[..len]);
        Outcome::Ok
    }

    /// Discard and write-zeroes: a list of ranges (sections 5.2.6.2 and 5.2.6.3 say which errors are which).
    fn ranges(&self) -> Outcome {
        let discard = self.kind == DISCARD;
        let (disk, backend) = (self.disk, &self.disk.backend);
        if backend.read_only() || !disk.has(if discard { F_DISCARD } else { F_WRITE_ZEROES }) {
            return if backend.read_only() { Outcome::IoError } else { Outcome::Unsupported };
        }
        let count = self.out_len / RANGE_LEN;
        let most = if discard { MAX_DISCARD_RANGES } else { MAX_ZERO_RANGES };
        if !self.out_len.is_multiple_of(RANGE_LEN) || count == 0 || count > u64::from(most) {
            return Outcome::IoError;
        }
        // All are checked before the first is done.
        let mut list = Vec::with_capacity(count as usize);
        for i in 0..count {
            let Some(raw) = self.chain.read_array::<16>(HEADER_LEN + i * RANGE_LEN) else {
                return Outcome::IoError;
            };
            let word = |at: usize| u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
            let (sector, sectors, flags) = (u64::from(word(0)) | u64::from(word(4)) << 32, word(8), word(12));
            if flags & !UNMAP != 0 || (discard && flags != 0) {
                return Outcome::Unsupported;
            }
            let len = u64::from(sectors) * SECTOR_SIZE;
            let Some(at) = sector.checked_mul(SECTOR_SIZE) else { return Outcome::IoError };
            if sectors > MAX_RANGE_SECTORS || ringfort_block::check_range(backend.size(), at, len).is_err() {
                return Outcome::IoError;
            }
            list.push((at, len, flags & UNMAP != 0));
        }
        for (at, len, unmap) in list.into_iter().filter(|r| r.1 > 0) {
            let done = if discard { backend.discard(at, len) } else { backend.write_zeroes(at, len, unmap) };
            if done.is_err() {
                return Outcome::IoError;
            }
        }
        if discard || disk.write_cached() { Outcome::Ok } else { backend.flush().into() }
    }
}
