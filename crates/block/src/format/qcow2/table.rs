//! Metadata tables kept in memory: L2 tables and refcount blocks, each one cluster of big-endian numbers.

use crate::error::Damage;
use crate::storage::FileStorage;
use crate::{SharedSlice, SharedSliceMut};
use std::collections::HashMap;
use std::io;

/// The unit in which changes are written back, in bytes (or the cluster, if smaller).
const SLICE: usize = 4096;

/// Something to write: where, and what.
pub type Piece = (u64, Vec<u8>);

/// One table.
pub struct Table {
    /// Where it lies in the file.
    pub offset: u64,
    bytes: Vec<u8>,
    /// One bit per slice: memory is newer than the file.
    dirty: Vec<u64>,
    /// A copy is being written: the file may still be older than memory.
    busy: bool,
    used: u64,
}

impl Table {
    /// A new table of zeroes that the file does not hold yet.
    pub fn new(offset: u64, cluster: usize) -> Table {
        let mut t = Table::clean(offset, vec![0; cluster]);
        t.dirty_all();
        t
    }

    fn clean(offset: u64, bytes: Vec<u8>) -> Table {
        let slices = bytes.len().div_ceil(SLICE);
        Table { offset, bytes, dirty: vec![0; slices.div_ceil(64)], busy: false, used: 0 }
    }

    /// All of it must be written.
    pub fn dirty_all(&mut self) {
        for s in 0..self.bytes.len().div_ceil(SLICE) {
            self.dirty[s / 64] |= 1 << (s % 64);
        }
    }

    fn is_dirty(&self) -> bool {
        self.dirty.iter().any(|&w| w != 0)
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The word of 64 bits number `i`.
    pub fn word(&self, i: usize) -> u64 {
        let at = i * 8;
        self.bytes[at..at + 8].try_into().map_or(0, u64::from_be_bytes)
    }

    /// Change the word number `i`.
    pub fn set_word(&mut self, i: usize, value: u64) {
        let at = i * 8;
        self.bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        self.touch(at);
    }

    fn touch(&mut self, at: usize) {
        let s = at / SLICE;
        self.dirty[s / 64] |= 1 << (s % 64);
    }

    /// Refcount number `i` of `1 << order` bits.
    pub fn refcount(&self, i: usize, order: u32) -> u64 {
        match order {
            0..=2 => {
                let bits = 1 << order;
                let per = 8 >> order;
                u64::from(self.bytes[i / per] >> (i % per * bits)) & ((1 << bits) - 1)
            }
            _ => {
                let n = 1usize << (order - 3);
                self.bytes[i * n..(i + 1) * n].iter().fold(0, |v, &b| v << 8 | u64::from(b))
            }
        }
    }

    /// Change refcount number `i`.
    pub fn set_refcount(&mut self, i: usize, order: u32, value: u64) {
        let at = match order {
            0..=2 => {
                let bits = 1 << order;
                let per = 8 >> order;
                let (at, shift) = (i / per, i % per * bits);
                let mask = (((1u16 << bits) - 1) as u8) << shift;
                self.bytes[at] = self.bytes[at] & !mask | (value as u8) << shift & mask;
                at
            }
            _ => {
                let n = 1usize << (order - 3);
                self.bytes[i * n..(i + 1) * n].copy_from_slice(&value.to_be_bytes()[8 - n..]);
                i * n
            }
        };
        self.touch(at);
    }

    /// Copies of what must be written.
    pub fn pieces(&self, out: &mut Vec<Piece>) {
        let mut last = None;
        for s in 0..self.bytes.len().div_ceil(SLICE) {
            if self.dirty[s / 64] >> (s % 64) & 1 == 0 {
                continue;
            }
            let end = ((s + 1) * SLICE).min(self.bytes.len());
            let part = &self.bytes[s * SLICE..end];
            match (last, out.last_mut()) {
                (Some(l), Some(p)) if l + 1 == s => p.1.extend_from_slice(part),
                _ => out.push((self.offset + (s * SLICE) as u64, part.to_vec())),
            }
            last = Some(s);
        }
    }
}

/// Tables by number. Clean ones leave when there are too many.
pub struct Tables {
    map: HashMap<u64, Table>,
    limit: usize,
    clock: u64,
}

impl Tables {
    /// Room for `limit` clean tables.
    pub fn new(limit: usize) -> Tables {
        Tables { map: HashMap::new(), limit: limit.max(4), clock: 0 }
    }

    /// Table `key` if it is here.
    pub fn peek(&self, key: u64) -> Option<&Table> {
        self.map.get(&key)
    }

    /// Table `key`, read from `offset` if it is not here.
    ///
    /// # Errors
    /// The host's; [`io::ErrorKind::InvalidData`] when the table does not lie in the file.
    pub fn load(
        &mut self,
        key: u64,
        offset: u64,
        cluster: u64,
        file: &FileStorage,
    ) -> io::Result<&mut Table> {
        self.clock += 1;
        let clock = self.clock;
        if !self.map.contains_key(&key) {
            if !offset.is_multiple_of(cluster) || offset == 0 || offset.saturating_add(cluster) > file.len() {
                return Err(damaged(format!("a table at {offset:#x} lies outside the image")));
            }
            self.make_room();
            let mut bytes = vec![0; cluster as usize];
            file.read(&[SharedSliceMut::new(&mut bytes)], offset)?;
            self.map.insert(key, Table::clean(offset, bytes));
        }
        let t = self.map.get_mut(&key).ok_or_else(|| damaged("a table is missing".into()))?;
        t.used = clock;
        Ok(t)
    }

    /// Put a table in.
    pub fn insert(&mut self, key: u64, table: Table) {
        self.make_room();
        self.map.insert(key, table);
    }

    /// Forget a table.
    pub fn remove(&mut self, key: u64) -> Option<Table> {
        self.map.remove(&key)
    }

    /// Forget all.
    pub fn clear(&mut self) {
        self.map.clear();
    }

    fn make_room(&mut self) {
        if self.map.len() < self.limit {
            return;
        }
        // A quarter at a time, the longest unused first.
        let mut clean: Vec<(u64, u64)> =
            self.map.iter().filter(|(_, t)| !t.busy && !t.is_dirty()).map(|(k, t)| (t.used, *k)).collect();
        clean.sort_unstable();
        for (_, key) in clean.iter().take(self.limit / 4) {
            self.map.remove(key);
        }
    }

    /// Whether there are more tables than wanted, because they cannot leave before they are written.
    pub fn crowded(&self) -> bool {
        self.map.len() > self.limit
    }

    /// Copies of all changes; afterwards the tables count as being written.
    pub fn begin_write(&mut self, out: &mut Vec<Piece>) -> Vec<(u64, Vec<u64>)> {
        let mut taken = Vec::new();
        for (key, t) in &mut self.map {
            if t.is_dirty() {
                t.pieces(out);
                let none = vec![0; t.dirty.len()];
                taken.push((*key, std::mem::replace(&mut t.dirty, none)));
                t.busy = true;
            }
        }
        taken
    }

    /// End of [`begin_write`](Self::begin_write); on failure the changes are still to be written.
    pub fn end_write(&mut self, taken: &[(u64, Vec<u64>)], written: bool) {
        for (key, dirty) in taken {
            if let Some(t) = self.map.get_mut(key) {
                t.busy = false;
                if !written {
                    t.dirty.iter_mut().zip(dirty).for_each(|(now, then)| *now |= then);
                }
            }
        }
    }

    /// Copies of all changes, which stay to be written.
    pub fn changes(&self, out: &mut Vec<Piece>) {
        self.map.values().for_each(|t| t.pieces(out));
    }

    /// Whether anything is to be written.
    pub fn any_dirty(&self) -> bool {
        self.map.values().any(Table::is_dirty)
    }
}

/// Write all pieces.
///
/// # Errors
/// The host's.
pub fn write_pieces(file: &FileStorage, pieces: &[Piece]) -> io::Result<()> {
    pieces.iter().try_for_each(|(at, bytes)| file.write(&[SharedSlice::new(bytes)], *at))
}

/// What is wrong with an image, found while it is in use.
pub fn damaged(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, Damage(what))
}
