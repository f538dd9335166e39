//! The firmware configuration device (QEMU's specification `docs/specs/fw_cfg`): firmware reads tables, the kernel
//! and settings from it, byte by byte or by DMA.

#[cfg(test)]
mod tests;

use ringfort_bus::{Device, Format, PioDevice, Section, StateError};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;

/// First port: selector at +0 (16 bits), data at +1, DMA address at +4 (64 bits, big endian).
pub const BASE: u16 = 0x510;
/// Ports.
pub const LEN: u16 = 12;
/// Key of the signature `QEMU`.
pub const KEY_SIGNATURE: u16 = 0x00;
/// Key of the feature bits.
pub const KEY_ID: u16 = 0x01;
/// Key of the file directory.
pub const KEY_DIRECTORY: u16 = 0x19;
/// Key of the first file.
pub const KEY_FIRST_FILE: u16 = 0x20;
const KIND: &str = "fw-cfg";
/// How the state is laid out.
pub(crate) const FORMAT: Format = Format::of::<State>(KIND, 1);
/// What the DMA address register reads as.
const DMA_SIGNATURE: u64 = 0x5145_4d55_2043_4647;
const NAME_LEN: usize = 55;
const MAX_FILES: u16 = 0x1000;
/// DMA moves this many bytes at a time.
const CHUNK: usize = 1 << 16;

mod dma {
    pub const ERROR: u32 = 1;
    pub const READ: u32 = 2;
    pub const SKIP: u32 = 4;
    pub const SELECT: u32 = 8;
    pub const WRITE: u32 = 16;
}

/// Guest memory, as DMA sees it.
pub trait DmaMemory: Send {
    /// Fill `data` from guest-physical address `gpa`; false when any of it is no RAM.
    fn read(&self, gpa: u64, data: &mut [u8]) -> bool;
    /// Write `data` at `gpa`; false when any of it is no RAM.
    fn write(&self, gpa: u64, data: &[u8]) -> bool;
}

/// Why a file cannot be added.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FwCfgError {
    /// The name is empty, longer than 55 bytes, or not plain ASCII.
    #[error("fw_cfg file name {0:?}: must be 1 to 55 printable ASCII characters")]
    Name(String),
    /// There is such a file.
    #[error("fw_cfg file {0:?} is there already")]
    Taken(String),
    /// No more keys, or the content is 4 GiB or more.
    #[error("fw_cfg file {0:?} does not fit")]
    Full(String),
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    selector: u16,
    offset: u32,
    /// The DMA address register: upper half written first.
    address: u64,
}

/// The device. What it serves is set up by the machine and not part of its state.
pub struct FwCfg {
    state: State,
    items: BTreeMap<u16, Arc<[u8]>>,
    files: Vec<(String, u16, u32)>,
    memory: Box<dyn DmaMemory>,
}

impl FwCfg {
    /// A device with signature, features and an empty directory.
    pub fn new(memory: Box<dyn DmaMemory>) -> FwCfg {
        let mut d = FwCfg { state: State::default(), items: BTreeMap::new(), files: Vec::new(), memory };
        d.set_item(KEY_SIGNATURE, *b"QEMU");
        // Traditional interface and DMA.
        d.set_item(KEY_ID, 3u32.to_le_bytes());
        d.write_directory();
        d
    }

    /// Set the content of a fixed key (CPU count, kernel and so on). Keys from 0x4000 on are not reachable.
    pub fn set_item(&mut self, key: u16, content: impl Into<Arc<[u8]>>) {
        self.items.insert(key, content.into());
    }

    /// Add a named file; returns its key.
    ///
    /// # Errors
    /// When the name is unfit or taken, or there is no room.
    pub fn add_file(&mut self, name: &str, content: impl Into<Arc<[u8]>>) -> Result<u16, FwCfgError> {
        let content = content.into();
        if name.is_empty() || name.len() > NAME_LEN || !name.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(FwCfgError::Name(name.into()));
        }
        if self.files.iter().any(|f| f.0 == name) {
            return Err(FwCfgError::Taken(name.into()));
        }
        let index = u16::try_from(self.files.len()).ok().filter(|&i| i < MAX_FILES);
        let (Some(index), Ok(size)) = (index, u32::try_from(content.len())) else {
            return Err(FwCfgError::Full(name.into()));
        };
        let key = KEY_FIRST_FILE + index;
        self.files.push((name.into(), key, size));
        self.items.insert(key, content);
        self.write_directory();
        Ok(key)
    }

    fn write_directory(&mut self) {
        // Sorted by name, as readers may expect.
        let mut files: Vec<_> = self.files.iter().collect();
        files.sort();
        let mut d = (files.len() as u32).to_be_bytes().to_vec();
        for (name, key, size) in files {
            d.extend_from_slice(&size.to_be_bytes());
            d.extend_from_slice(&key.to_be_bytes());
            d.extend_from_slice(&[0; 2]);
            let mut field = [0; NAME_LEN + 1];
            field[..name.len()].copy_from_slice(name.as_bytes());
            d.extend_from_slice(&field);
        }
        self.items.insert(KEY_DIRECTORY, d.into());
    }

    fn select(&mut self, key: u16) {
        // Bit 14 was for writing, which is not offered.
        self.state.selector = key & 0xbfff;
        self.state.offset = 0;
    }

    /// Fill `out` from the selected item on; beyond its end, and for unknown keys, zeroes.
    fn take(&mut self, out: &mut [u8]) {
        out.fill(0);
        let from = self.state.offset as usize;
        if let Some(rest) = self.items.get(&self.state.selector).and_then(|i| i.get(from..)) {
            let n = rest.len().min(out.len());
            out[..n].copy_from_slice(&rest[..n]);
        }
        self.state.offset = self.state.offset.saturating_add(out.len() as u32);
    }

    /// Run the transfer that the 16-byte block at the DMA address describes.
    fn transfer(&mut self) {
        let at = std::mem::take(&mut self.state.address);
        let mut block = [0; 16];
        if !self.memory.read(at, &mut block) {
            // There is nowhere to report an error to.
            return;
        }
        let be = |b: &[u8]| b.iter().fold(0u64, |v, &b| v << 8 | u64::from(b));
        let (control, len, mut to) = (be(&block[..4]) as u32, be(&block[4..8]), be(&block[8..]));
        if control & dma::SELECT != 0 {
            self.select((control >> 16) as u16);
        }
        let mut result = 0;
        if control & dma::READ != 0 {
            let mut buffer = vec![0; CHUNK.min(len as usize)];
            let mut left = len;
            while left > 0 {
                let n = left.min(CHUNK as u64) as usize;
                self.take(&mut buffer[..n]);
                if !self.memory.write(to, &buffer[..n]) {
                    result = dma::ERROR;
                    break;
                }
                to = to.saturating_add(n as u64);
                left -= n as u64;
            }
        } else if control & dma::WRITE != 0 {
            result = dma::ERROR;
        } else if control & dma::SKIP != 0 {
            self.state.offset = self.state.offset.saturating_add(len as u32);
        }
        self.memory.write(at, &result.to_be_bytes());
    }
}

impl PioDevice for FwCfg {
    fn pio_read(&mut self, port: u16, data: &mut [u8]) {
        match port.wrapping_sub(BASE) {
            // The data port gives the next bytes of the item however wide the access.
            1 => self.take(data),
            i @ 4..12 => {
                let bytes = DMA_SIGNATURE.to_be_bytes();
                for (n, b) in data.iter_mut().enumerate() {
                    *b = bytes.get(usize::from(i) - 4 + n).copied().unwrap_or(0);
                }
            }
            0 => data.fill(0),
            _ => data.fill(0xff),
        }
    }

    fn pio_write(&mut self, port: u16, data: &[u8]) {
        match (port.wrapping_sub(BASE), data) {
            (0, [low, high, ..]) => self.select(u16::from_le_bytes([*low, *high])),
            (0, [low]) => self.select(u16::from(*low)),
            (4, &[a, b, c, d]) => {
                self.state.address = u64::from(u32::from_be_bytes([a, b, c, d])) << 32;
            }
            (8, &[a, b, c, d]) => {
                self.state.address |= u64::from(u32::from_be_bytes([a, b, c, d]));
                self.transfer();
            }
            _ => {}
        }
    }
}

impl Device for FwCfg {
    fn kind(&self) -> &'static str {
        KIND
    }
    fn reset(&mut self) {
        self.state = State::default();
    }
    fn save(&self) -> Section {
        Section::new(KIND, 0, 1, &self.state)
    }
    fn load(&mut self, section: &Section) -> Result<(), StateError> {
        let s: State = section.decode(KIND, 1)?;
        if s.address as u32 != 0 || s.selector & 0x4000 != 0 {
            return Err(section.invalid("a register holds an impossible value"));
        }
        self.state = s;
        Ok(())
    }
}
