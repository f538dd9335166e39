//! Checked reading of files.

use super::BootError;
use ringfort_memory::{Bytes, GuestAddress, GuestMemory};
use std::io::{Read, Seek, SeekFrom};

/// A file to load from: anything that can be read and sought.
pub trait ImageFile: Read + Seek {}
impl<T: Read + Seek + ?Sized> ImageFile for T {}

/// A file with its name for messages and its length.
pub struct Image<'a> {
    what: &'static str,
    file: &'a mut dyn ImageFile,
    len: u64,
}

/// Bytes copied at once.
const CHUNK: usize = 256 << 10;

impl<'a> Image<'a> {
    /// Measure the file.
    ///
    /// # Errors
    /// When it cannot be sought.
    pub fn new(what: &'static str, file: &'a mut dyn ImageFile) -> Result<Image<'a>, BootError> {
        let len = file.seek(SeekFrom::End(0)).map_err(|source| BootError::Read { what, source })?;
        Ok(Image { what, file, len })
    }

    pub(super) fn file(&mut self) -> &mut dyn ImageFile {
        self.file
    }

    /// Bytes in the file.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the file is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Check that `part`, `size` bytes at `offset`, is in the file.
    pub(super) fn require(&self, part: &'static str, offset: u64, size: u64) -> Result<(), BootError> {
        let need = offset.saturating_add(size);
        if need > self.len {
            return Err(BootError::Truncated { what: self.what, part, need, have: self.len });
        }
        Ok(())
    }

    /// Up to `most` bytes from `offset`; fewer at the end of the file.
    pub(super) fn some(&mut self, offset: u64, most: usize) -> Result<Vec<u8>, BootError> {
        let n = (most as u64).min(self.len.saturating_sub(offset)) as usize;
        let mut buf = vec![0; n];
        self.exact(offset, &mut buf)?;
        Ok(buf)
    }

    /// Fill `buf` from `offset`.
    pub(super) fn exact(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), BootError> {
        self.require("data", offset, buf.len() as u64)?;
        let what = self.what;
        self.file
            .seek(SeekFrom::Start(offset))
            .and_then(|_| self.file.read_exact(buf))
            .map_err(|source| BootError::Read { what, source })
    }

    /// Copy a part of the file into RAM. The caller has checked the target.
    pub(super) fn copy_to(
        &mut self,
        memory: &GuestMemory,
        offset: u64,
        size: u64,
        to: u64,
    ) -> Result<(), BootError> {
        self.require("data", offset, size)?;
        let mut buf = vec![0; CHUNK.min(size as usize)];
        let mut done = 0;
        while done < size {
            let n = (size - done).min(CHUNK as u64) as usize;
            self.exact(offset + done, &mut buf[..n])?;
            let at = to + done;
            memory
                .write_slice(&buf[..n], GuestAddress(at))
                .map_err(|e| BootError::Memory(at, e.to_string()))?;
            done += n as u64;
        }
        Ok(())
    }
}

/// Fill RAM with zeros. The caller has checked the target.
pub(super) fn zero(memory: &GuestMemory, at: u64, size: u64) -> Result<(), BootError> {
    let zeros = vec![0; CHUNK.min(size as usize)];
    let mut done = 0;
    while done < size {
        let n = (size - done).min(CHUNK as u64);
        super::write(memory, at + done, &zeros[..n as usize])?;
        done += n;
    }
    Ok(())
}
