//! Persistent dirty bitmaps (QEMU docs/interop/qcow2.txt, "Bitmaps"): which pieces of the disk changed since when.
//!
//! A directory lists them; each has a table of clusters that hold its bits, lowest bit first. Changes are written to new
//! places and become valid by one write of the header.

use super::Qcow2;
use super::header::{AUTOCLEAR_BITMAPS, EXT_BITMAPS, Header};
use super::meta::{OFFSET, Pending, read_words, words_to_bytes};
use super::table::damaged;
use crate::{BlockBackend, SharedSlice, SharedSliceMut};
use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// Its bits may be wrong: it was in use when the image was last closed.
const IN_USE: u32 = 1 << 0;
/// Writes are to be recorded in it.
const AUTO: u32 = 1 << 1;
/// Programs that do not know its extra data may use it all the same.
const EXTRA_COMPATIBLE: u32 = 1 << 2;
/// Most bitmaps (QEMU's limit).
const MAX_BITMAPS: u64 = 65535;
/// Largest directory, in bytes (QEMU's limit).
const MAX_DIRECTORY: u64 = MAX_BITMAPS * 1024;
/// Largest bitmap, in bytes (QEMU's limit).
const MAX_BITS: u64 = 512 << 20;
/// Longest name (QEMU's limit).
pub const MAX_BITMAP_NAME: usize = 1023;

/// A bitmap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name.
    pub name: String,
    /// log2 of the bytes that a bit stands for.
    pub granularity_bits: u32,
    flags: u32,
    table: u64,
    table_size: u32,
    extra: Vec<u8>,
}

impl Bitmap {
    /// Bytes that a bit stands for.
    pub fn granularity(&self) -> u64 {
        1 << self.granularity_bits
    }
    /// Whether its bits may be wrong.
    pub fn inconsistent(&self) -> bool {
        self.flags & IN_USE != 0
    }
    /// Whether writes are to be recorded in it.
    pub fn enabled(&self) -> bool {
        self.flags & AUTO != 0
    }
    /// Where its table is, and its entries.
    pub(super) fn table(&self) -> (u64, u32) {
        (self.table, self.table_size)
    }
    /// Names of its flags.
    pub fn flag_names(&self) -> Vec<&'static str> {
        [(IN_USE, "in-use"), (AUTO, "auto")].iter().filter(|f| self.flags & f.0 != 0).map(|f| f.1).collect()
    }
}

/// Set bits: by number of the bitmap's cluster, its bytes; without bytes all bits are set. What is not there is zero.
type Bits = BTreeMap<u64, Option<Vec<u8>>>;

fn no(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

fn num(b: &[u8], at: usize, n: usize) -> Option<u64> {
    b.get(at..at.checked_add(n)?).map(|b| b.iter().fold(0, |v, &x| v << 8 | u64::from(x)))
}

/// Count, length and place of the directory that the header names.
fn directory(h: &Header) -> io::Result<Option<(u64, u64, u64)>> {
    let Some((_, ext)) = h.extensions.iter().find(|e| e.0 == EXT_BITMAPS) else { return Ok(None) };
    let (Some(count), Some(len), Some(at)) = (num(ext, 0, 4), num(ext, 8, 8), num(ext, 16, 8)) else {
        return Err(damaged("the bitmaps extension is cut short".into()));
    };
    if count > MAX_BITMAPS || len > MAX_DIRECTORY {
        return Err(damaged("the bitmap directory is too large".into()));
    }
    Ok(Some((count, len, at)))
}

/// The bitmaps that a directory lists.
pub fn parse_directory(dir: &[u8], count: u64) -> io::Result<Vec<Bitmap>> {
    let bad = || damaged("the bitmap directory is cut short".into());
    let mut list = Vec::new();
    let mut at = 0usize;
    for _ in 0..count {
        let e = dir.get(at..).ok_or_else(bad)?;
        let field = |at, n| num(e, at, n).ok_or_else(bad);
        let (name_len, extra_len) = (field(18, 2)? as usize, field(20, 4)? as usize);
        let extra = e.get(24..24usize.saturating_add(extra_len)).ok_or_else(bad)?;
        let name = e.get(24 + extra_len..24 + extra_len + name_len).ok_or_else(bad)?;
        let name = std::str::from_utf8(name).map_err(|_| damaged("a bitmap's name is not UTF-8".into()))?;
        let granularity_bits = field(17, 1)? as u32;
        if field(16, 1)? != 1 || !(9..=31).contains(&granularity_bits) {
            return Err(damaged(format!("the bitmap {name:?} has an unknown type or granularity")));
        }
        list.push(Bitmap {
            name: name.into(),
            granularity_bits,
            flags: field(12, 4)? as u32,
            table: field(0, 8)?,
            table_size: field(8, 4)? as u32,
            extra: extra.to_vec(),
        });
        at += (24 + extra_len + name_len).next_multiple_of(8);
    }
    Ok(list)
}

fn directory_bytes(list: &[Bitmap]) -> Vec<u8> {
    let mut out = Vec::new();
    for b in list {
        out.extend_from_slice(&b.table.to_be_bytes());
        out.extend_from_slice(&b.table_size.to_be_bytes());
        out.extend_from_slice(&b.flags.to_be_bytes());
        out.extend_from_slice(&[1, b.granularity_bits as u8]);
        out.extend_from_slice(&(b.name.len() as u16).to_be_bytes());
        out.extend_from_slice(&(b.extra.len() as u32).to_be_bytes());
        out.extend_from_slice(&b.extra);
        out.extend_from_slice(b.name.as_bytes());
        out.resize(out.len().next_multiple_of(8), 0);
    }
    out
}

/// One change of a bitmap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Make it, with that granularity in bytes or the usual one, enabled.
    Add(Option<u64>),
    /// Take it away.
    Remove,
    /// Make all bits zero.
    Clear,
    /// Record writes from now on.
    Enable,
    /// Record no more.
    Disable,
}

/// What is recorded while an image is open for writing.
///
/// The first write marks all enabled bitmaps on disk as in use and takes their bits into memory; closing stores them.
/// After a crash they are still marked, so that nobody relies on them.
#[derive(Default)]
pub(super) struct Recording {
    /// There are enabled bitmaps.
    wanted: AtomicBool,
    /// The bits of each, by its place in the directory, once a write has come.
    open: Mutex<Option<Vec<(usize, u32, Bits)>>>,
}

impl Qcow2 {
    /// Note whether writes are to be recorded.
    pub(super) fn prepare_recording(&self) {
        let wanted = match self.bitmaps() {
            Ok(list) => list.iter().any(|b| b.enabled() && !b.inconsistent()),
            // What is damaged is found by a check; here it is as if they were in use.
            Err(_) => {
                let mut m = self.meta();
                m.header.autoclear &= !AUTOCLEAR_BITMAPS;
                let _ = m.header.write(&self.file);
                false
            }
        };
        self.recording.wanted.store(wanted, Ordering::Release);
    }

    /// Whether writes are recorded.
    pub(super) fn records(&self) -> bool {
        self.recording.wanted.load(Ordering::Acquire)
    }

    /// A piece of the disk is about to change.
    pub(super) fn record(&self, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 || !self.records() {
            return Ok(());
        }
        let mut open = self.recording.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.is_none() {
            *open = Some(self.start_recording()?);
        }
        for (_, shift, bits) in open.iter_mut().flatten() {
            mark(bits, self.shape.cluster, *shift, offset, offset + len);
        }
        Ok(())
    }

    fn start_recording(&self) -> io::Result<Vec<(usize, u32, Bits)>> {
        let mut list = self.bitmaps()?;
        let mut bits = Vec::new();
        for (i, b) in list.iter_mut().enumerate().filter(|(_, b)| b.enabled() && !b.inconsistent()) {
            bits.push((i, b.granularity_bits, self.read_bits(b)?));
            b.flags |= IN_USE;
        }
        if let Some((at, len)) = self.bitmap_directory_place()? {
            let dir = directory_bytes(&list);
            if dir.len() as u64 > len {
                return Err(damaged("the bitmap directory is cut short".into()));
            }
            self.file.write(&[SharedSlice::new(&dir)], at)?;
            self.file.sync()?;
        }
        Ok(bits)
    }

    /// Store what was recorded.
    pub(super) fn end_recording(&self) -> io::Result<()> {
        let open = self.recording.open.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(open) = open.filter(|o| !o.is_empty()) else { return Ok(()) };
        let mut list = self.bitmaps()?;
        let mut gone = Vec::new();
        for (i, _, bits) in open {
            let Some(b) = list.get_mut(i) else { continue };
            gone.extend(self.places(b)?);
            self.write_bits(b, &bits)?;
            b.flags &= !IN_USE;
        }
        self.write_directory(&list, gone)
    }

    /// All bitmaps with their bits, before the disk's size changes.
    pub(super) fn take_bitmaps(&self) -> io::Result<Vec<(Bitmap, Bits)>> {
        self.end_recording()?;
        let list = self.bitmaps()?;
        list.into_iter()
            .map(|b| {
                let bits = if b.inconsistent() { Bits::new() } else { self.read_bits(&b)? };
                Ok((b, bits))
            })
            .collect()
    }

    /// Put them back, cut to the new size.
    pub(super) fn put_bitmaps(&self, kept: Vec<(Bitmap, Bits)>) -> io::Result<()> {
        if kept.is_empty() {
            return Ok(());
        }
        let (mut list, mut gone) = (Vec::new(), Vec::new());
        for (mut b, mut bits) in kept {
            gone.extend(self.places(&b)?);
            let count = BlockBackend::size(self).div_ceil(b.granularity());
            let per = self.shape.cluster * 8;
            bits.retain(|i, _| i * per < count);
            if let Some(Some(last)) = bits.get_mut(&(count / per)) {
                let n = count % per;
                last[n.div_ceil(8) as usize..].fill(0);
                if !n.is_multiple_of(8) {
                    last[(n / 8) as usize] &= (1u8 << (n % 8)) - 1;
                }
            }
            self.write_bits(&mut b, &bits)?;
            list.push(b);
        }
        self.write_directory(&list, gone)
    }

    /// The persistent bitmaps.
    ///
    /// # Errors
    /// The host's, or what is damaged.
    pub fn bitmaps(&self) -> io::Result<Vec<Bitmap>> {
        let h = self.header();
        let Some((count, len, at)) = directory(&h)? else { return Ok(Vec::new()) };
        if at.saturating_add(len) > self.file.len() {
            return Err(damaged("the bitmap directory lies outside the image".into()));
        }
        let mut dir = vec![0; len as usize];
        self.file.read(&[SharedSliceMut::new(&mut dir)], at)?;
        let mut list = parse_directory(&dir, count)?;
        if h.autoclear & AUTOCLEAR_BITMAPS == 0 {
            // Somebody wrote without keeping them up.
            list.iter_mut().for_each(|b| b.flags |= IN_USE);
        }
        Ok(list)
    }

    /// Place and length of the directory of bitmaps.
    pub(super) fn bitmap_directory_place(&self) -> io::Result<Option<(u64, u64)>> {
        Ok(directory(&self.header())?.map(|(_, len, at)| (at, len)))
    }

    /// Clusters that one bitmap of this granularity needs for its bits.
    fn bit_clusters(&self, granularity_bits: u32) -> io::Result<u64> {
        let bytes = BlockBackend::size(self).div_ceil(1 << granularity_bits).div_ceil(8);
        if bytes > MAX_BITS {
            return Err(no("Too much space will be occupied by the bitmap. Use larger granularity".into()));
        }
        Ok(bytes.div_ceil(self.shape.cluster))
    }

    /// Bytes that the persistent bitmaps of this image take in another one with clusters of `cluster` bytes.
    ///
    /// # Errors
    /// What is damaged.
    pub fn bitmaps_size(&self, cluster: u64) -> io::Result<u64> {
        let list = self.bitmaps()?;
        let mut sum = 0;
        for b in list.iter().filter(|b| !b.inconsistent()) {
            let bytes = BlockBackend::size(self).div_ceil(b.granularity()).div_ceil(8);
            let data = bytes.div_ceil(cluster);
            sum += (data + (data * 8).div_ceil(cluster)) * cluster;
        }
        let dir = directory_bytes(&list).len() as u64;
        Ok(sum + dir.div_ceil(cluster) * cluster)
    }

    fn read_bits(&self, b: &Bitmap) -> io::Result<Bits> {
        let (cluster, clusters) = (self.shape.cluster, self.bit_clusters(b.granularity_bits)?);
        if !b.table.is_multiple_of(cluster) || u64::from(b.table_size) != clusters {
            return Err(damaged(format!("the bitmap {:?} has a table of a wrong size", b.name)));
        }
        let mut bits = Bits::new();
        let words = read_words(&self.file, b.table, b.table_size as usize)?;
        if words.iter().filter(|w| **w & OFFSET != 0).count() as u64 * cluster > self.file.len() {
            return Err(damaged(format!("bits of {:?} overlap", b.name)));
        }
        for (i, entry) in words.into_iter().enumerate() {
            let at = entry & OFFSET;
            let bytes = if at != 0 {
                if !at.is_multiple_of(cluster) || at.saturating_add(cluster) > self.file.len() {
                    return Err(damaged(format!("bits of {:?} lie outside the image", b.name)));
                }
                let mut bytes = vec![0; cluster as usize];
                self.file.read(&[SharedSliceMut::new(&mut bytes)], at)?;
                Some(bytes)
            } else if entry & 1 != 0 {
                None
            } else {
                continue;
            };
            bits.insert(i as u64, bytes);
        }
        Ok(bits)
    }

    /// Write bits to new places and enter them into `b`; gives the places.
    fn write_bits(&self, b: &mut Bitmap, bits: &Bits) -> io::Result<()> {
        let (cluster, clusters) = (self.shape.cluster, self.bit_clusters(b.granularity_bits)?);
        let mut table = vec![0u64; clusters as usize];
        for (i, bytes) in bits {
            table[*i as usize] = match bytes {
                None => 1,
                Some(bytes) if bytes.iter().all(|x| *x == 0) => 0,
                Some(bytes) => {
                    let at = self.new_place(1)?;
                    self.file.write(&[SharedSlice::new(bytes)], at)?;
                    at
                }
            };
        }
        let place = (clusters * 8).div_ceil(cluster).max(1);
        let mut words = words_to_bytes(&table);
        words.resize((place * cluster) as usize, 0);
        b.table = self.new_place(place)?;
        b.table_size = clusters as u32;
        self.file.write(&[SharedSlice::new(&words)], b.table)
    }

    fn new_place(&self, clusters: u64) -> io::Result<u64> {
        Ok(self.meta().alloc_run(clusters, &self.file)? * self.shape.cluster)
    }

    /// The host clusters that a bitmap takes.
    fn places(&self, b: &Bitmap) -> io::Result<Vec<Pending>> {
        let cluster = self.shape.cluster;
        let table = u64::from(b.table_size) * 8;
        let mut all = vec![(b.table / cluster, table.div_ceil(cluster).max(1))];
        let words = read_words(&self.file, b.table, b.table_size as usize)?;
        all.extend(words.iter().map(|w| w & OFFSET).filter(|o| *o != 0).map(|o| (o / cluster, 1)));
        Ok(all)
    }

    /// Write the directory to a new place and name it; `gone` becomes free.
    fn write_directory(&self, list: &[Bitmap], mut gone: Vec<Pending>) -> io::Result<()> {
        let cluster = self.shape.cluster;
        if let Some((_, len, at)) = directory(&self.header())? {
            gone.push((at / cluster, len.div_ceil(cluster)));
        }
        let mut dir = directory_bytes(list);
        let len = dir.len() as u64;
        let mut at = 0;
        if len > 0 {
            let clusters = len.div_ceil(cluster);
            dir.resize((clusters * cluster) as usize, 0);
            at = self.new_place(clusters)?;
            self.file.write(&[SharedSlice::new(&dir)], at)?;
        }
        // All that the directory names is counted and written before the header names it.
        self.commit()?;
        let mut m = self.meta();
        let mut h = m.header.clone();
        h.extensions.retain(|e| e.0 != EXT_BITMAPS);
        h.autoclear &= !AUTOCLEAR_BITMAPS;
        if len > 0 {
            let mut ext = Vec::new();
            ext.extend_from_slice(&(list.len() as u32).to_be_bytes());
            ext.extend_from_slice(&[0; 4]);
            ext.extend_from_slice(&len.to_be_bytes());
            ext.extend_from_slice(&at.to_be_bytes());
            h.extensions.push((EXT_BITMAPS, ext));
            h.autoclear |= AUTOCLEAR_BITMAPS;
        }
        h.write(&self.file)?;
        self.file.sync()?;
        m.header = h;
        m.pending.extend(gone);
        drop(m);
        self.prepare_recording();
        self.commit()?;
        self.commit()
    }

    /// Granularity of a bitmap that is not told one, in bytes.
    fn usual_granularity(&self) -> u64 {
        self.shape.cluster.clamp(4096, 65536)
    }

    /// Change the bitmap `name`. No request may run meanwhile.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] with the reason, in qemu-img's words where it has some; the host's.
    pub fn change_bitmap(&self, name: &str, change: &Change) -> io::Result<()> {
        self.writable()?;
        self.end_recording()?;
        let mut list = self.bitmaps()?;
        let found = list.iter().position(|b| b.name == name);
        let mut gone = Vec::new();
        match (change, found) {
            (Change::Add(_), Some(_)) => return Err(no(format!("Bitmap already exists: {name}"))),
            (Change::Add(granularity), None) => {
                let g = granularity.unwrap_or_else(|| self.usual_granularity());
                if self.shape.version < 3 {
                    return Err(no("Cannot store dirty bitmaps in qcow2 v2 files".into()));
                }
                if !g.is_power_of_two() || !(512..=1 << 31).contains(&g) {
                    return Err(no(
                        "Granularity must be a power of two of at least 512 bytes and at most 2G".into(),
                    ));
                }
                if name.is_empty() || name.len() > MAX_BITMAP_NAME {
                    return Err(no("Bitmap name too long or empty".into()));
                }
                if list.len() as u64 >= MAX_BITMAPS {
                    return Err(no("Maximum number of persistent bitmaps is already reached".into()));
                }
                let mut b = Bitmap {
                    name: name.into(),
                    granularity_bits: g.trailing_zeros(),
                    flags: AUTO,
                    table: 0,
                    table_size: 0,
                    extra: Vec::new(),
                };
                self.write_bits(&mut b, &Bits::new())?;
                list.push(b);
            }
            (_, None) => return Err(no(format!("Dirty bitmap '{name}' not found"))),
            (Change::Remove, Some(i)) => gone = self.places(&list.remove(i))?,
            (change, Some(i)) => {
                self.usable(&list[i])?;
                match change {
                    Change::Enable => list[i].flags |= AUTO,
                    Change::Disable => list[i].flags &= !AUTO,
                    _ => {
                        gone = self.places(&list[i])?;
                        self.write_bits(&mut list[i], &Bits::new())?;
                    }
                }
            }
        }
        self.write_directory(&list, gone)
    }

    fn usable(&self, b: &Bitmap) -> io::Result<()> {
        if b.inconsistent() {
            return Err(no(format!("Bitmap '{}' is inconsistent and cannot be used: remove it", b.name)));
        }
        if !b.extra.is_empty() && b.flags & EXTRA_COMPATIBLE == 0 {
            return Err(no(format!("Bitmap '{}' has extra data that is not known", b.name)));
        }
        Ok(())
    }

    /// Add to the bitmap `name` what is set in `source`'s bitmap `other`. No request may run meanwhile.
    ///
    /// # Errors
    /// As for [`change_bitmap`](Self::change_bitmap).
    pub fn merge_bitmap(&self, name: &str, source: &Qcow2, other: &str) -> io::Result<()> {
        self.writable()?;
        self.end_recording()?;
        let find = |list: &[Bitmap], name: &str| {
            list.iter()
                .position(|b| b.name == name)
                .ok_or_else(|| no(format!("Dirty bitmap '{name}' not found")))
        };
        let theirs = source.bitmaps()?;
        let from = &theirs[find(&theirs, other)?];
        let mut list = self.bitmaps()?;
        let i = find(&list, name)?;
        self.usable(&list[i])?;
        source.usable(from)?;
        if BlockBackend::size(self) != BlockBackend::size(source) {
            return Err(no(
                "Bitmaps are of different sizes (destination size and source size) and can't be merged"
                    .into(),
            ));
        }
        let mut bits = self.read_bits(&list[i])?;
        let (shift, size) = (list[i].granularity_bits, BlockBackend::size(self));
        let set = source.read_bits(from)?;
        set_ranges(&set, source.shape.cluster, from.granularity_bits, size, |from, to| {
            mark(&mut bits, self.shape.cluster, shift, from, to);
        });
        let gone = self.places(&list[i])?;
        self.write_bits(&mut list[i], &bits)?;
        self.write_directory(&list, gone)
    }

    /// Make copies of `source`'s persistent bitmaps here; inconsistent ones are left out if `skip_broken`.
    ///
    /// # Errors
    /// As for [`change_bitmap`](Self::change_bitmap).
    pub fn copy_bitmaps(&self, source: &Qcow2, skip_broken: bool) -> io::Result<Vec<String>> {
        let mut skipped = Vec::new();
        for b in source.bitmaps()? {
            if b.inconsistent() {
                if skip_broken {
                    skipped.push(b.name);
                    continue;
                }
                return Err(no(format!("Cannot copy inconsistent bitmap '{}'", b.name)));
            }
            self.change_bitmap(&b.name, &Change::Add(Some(b.granularity())))?;
            self.merge_bitmap(&b.name, source, &b.name)?;
            if !b.enabled() {
                self.change_bitmap(&b.name, &Change::Disable)?;
            }
        }
        Ok(skipped)
    }
}

/// Tell the byte ranges of the disk that set bits stand for.
fn set_ranges(bits: &Bits, cluster: u64, shift: u32, size: u64, mut tell: impl FnMut(u64, u64)) {
    let mut open: Option<(u64, u64)> = None;
    let mut add = |from: u64, to: u64| {
        let to = to.min(size);
        match &mut open {
            _ if from >= to => {}
            Some(o) if o.1 == from => o.1 = to,
            o => {
                if let Some((from, to)) = o.replace((from, to)) {
                    tell(from, to);
                }
            }
        }
    };
    for (i, bytes) in bits {
        let start = i * cluster * 8;
        let Some(bytes) = bytes else {
            add(start << shift, (start + cluster * 8) << shift);
            continue;
        };
        for (k, byte) in bytes.iter().enumerate().filter(|b| *b.1 != 0) {
            for bit in (0..8).filter(|bit| byte >> bit & 1 != 0) {
                let n = start + k as u64 * 8 + bit;
                add(n << shift, (n + 1) << shift);
            }
        }
    }
    if let Some((from, to)) = open {
        tell(from, to);
    }
}

/// Set the bits of a byte range that is not empty.
fn mark(bits: &mut Bits, cluster: u64, shift: u32, from: u64, to: u64) {
    for n in from >> shift..=(to - 1) >> shift {
        let (byte, bit) = (n / 8, n % 8);
        let piece = bits.entry(byte / cluster).or_insert_with(|| Some(vec![0; cluster as usize]));
        if let Some(piece) = piece {
            piece[(byte % cluster) as usize] |= 1 << bit;
        }
    }
}
