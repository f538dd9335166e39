//! VHDX, Hyper-V's format (Microsoft [MS-VHDX]).
//!
//! A log that was not applied when the image was last closed is applied in memory: what it holds goes in front of the
//! file for every read of a table. Data blocks are never in the log.

use super::{Layout, Place, bytes, damaged, disk_size, le32, le64};
use crate::format::Format;
use crate::storage::FileStorage;
use crate::{BlockError, SharedSliceMut};
use std::collections::BTreeMap;
use std::io;

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;
/// The unit of the log.
const PAGE: u64 = 4096;
/// Most that a log may change, in pages: 64 MiB.
const MAX_PAGES: usize = 16384;

/// A GUID as the text that people write gives it: the first three groups are little endian.
const fn guid(a: u32, b: u16, c: u16, d: [u8; 8]) -> [u8; 16] {
    let (a, b, c) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes());
    [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]]
}

const REGION_BAT: [u8; 16] =
    guid(0x2dc2_7766, 0xf623, 0x4200, [0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 0x08]);
const REGION_METADATA: [u8; 16] =
    guid(0x8b7c_a206, 0x4790, 0x4b9a, [0xb8, 0xfe, 0x57, 0x5f, 0x05, 0x0f, 0x88, 0x6e]);
const FILE_PARAMETERS: [u8; 16] =
    guid(0xcaa1_6737, 0xfa36, 0x4d43, [0xb3, 0xb6, 0x33, 0xf0, 0xaa, 0x44, 0xe7, 0x6b]);
const DISK_SIZE: [u8; 16] =
    guid(0x2fa5_4224, 0xcd1b, 0x4876, [0xb2, 0x11, 0x5d, 0xbe, 0xd8, 0x3b, 0xf4, 0xb8]);
const LOGICAL_SECTOR: [u8; 16] =
    guid(0x8141_bf1d, 0xa96f, 0x4709, [0xba, 0x47, 0xf2, 0x33, 0xa8, 0xfa, 0xab, 0x5f]);
const PHYSICAL_SECTOR: [u8; 16] =
    guid(0xcda3_48c7, 0x445d, 0x4471, [0x9c, 0xc9, 0xe9, 0x88, 0x52, 0x51, 0xc5, 0x56]);
const PAGE_83: [u8; 16] = guid(0xbeca_12ab, 0xb2e6, 0x4523, [0x93, 0xef, 0xc3, 0x09, 0xe0, 0x00, 0xc7, 0x46]);

/// CRC-32C (Castagnoli), which all structures are secured by.
fn crc32c(data: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut t = [0u32; 256];
        let mut i = 0;
        while i < 256 {
            let mut c = i as u32;
            let mut k = 0;
            while k < 8 {
                c = if c & 1 != 0 { c >> 1 ^ 0x82f6_3b78 } else { c >> 1 };
                k += 1;
            }
            t[i] = c;
            i += 1;
        }
        t
    };
    !data.iter().fold(!0u32, |c, b| c >> 8 ^ TABLE[((c ^ u32::from(*b)) & 0xff) as usize])
}

/// Whether a structure begins with `mark` and its checksum, at byte 4, is right.
fn sound(b: &mut [u8], mark: &[u8; 4]) -> bool {
    let sum = le32(b, 4);
    let right = b.starts_with(mark) && {
        b[4..8].fill(0);
        crc32c(b) == sum
    };
    b[4..8].copy_from_slice(&sum.to_le_bytes());
    right
}

/// The file with what its log holds in front of it.
struct Logged {
    file: FileStorage,
    pages: BTreeMap<u64, Vec<u8>>,
}

impl Logged {
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(out.len() as u64).ok_or(io::ErrorKind::InvalidInput)?;
        let there = self.file.len().saturating_sub(offset).min(out.len() as u64) as usize;
        let past = self.pages.range(end.saturating_sub(1) / PAGE..).next().is_some();
        if there < out.len() && !past {
            return Err(damaged(Format::Vhdx, format!("a table at {offset:#x} lies outside the file")));
        }
        self.file.read(&[SharedSliceMut::new(&mut out[..there])], offset)?;
        for (page, data) in self.pages.range(offset / PAGE..end.div_ceil(PAGE)) {
            let (from, to) = ((page * PAGE).max(offset), ((page + 1) * PAGE).min(end));
            out[(from - offset) as usize..(to - offset) as usize]
                .copy_from_slice(&data[(from - page * PAGE) as usize..(to - page * PAGE) as usize]);
        }
        Ok(())
    }

    fn bytes<const N: usize>(&self, offset: u64) -> io::Result<[u8; N]> {
        let mut b = [0; N];
        self.read(offset, &mut b)?;
        Ok(b)
    }
}

/// An open image.
pub struct Vhdx {
    file: Logged,
    size: u64,
    block: u64,
    /// Payload blocks between two entries of sector bitmaps.
    ratio: u64,
    bat: u64,
    bat_len: u64,
}

/// What the metadata says.
#[derive(Default)]
struct Facts {
    block: u64,
    parent: bool,
    size: u64,
    sector: u64,
}

impl Vhdx {
    /// Read and check headers, log, regions and metadata.
    pub fn open(file: FileStorage) -> Result<Vhdx, BlockError> {
        let path = file.path().to_path_buf();
        let bad = |what: String| BlockError::Broken { path: path.clone(), format: "vhdx", what };
        let io_bad = |e: io::Error| match e.kind() {
            io::ErrorKind::InvalidData => BlockError::Broken {
                path: path.clone(),
                format: "vhdx",
                what: e.to_string().replace("the vhdx image is damaged: ", ""),
            },
            _ => BlockError::host(&path, "cannot read", e),
        };
        if file.len() < MIB {
            return Err(bad("it is shorter than its headers".into()));
        }
        let mut headers = Vec::new();
        for at in [64 * KIB, 128 * KIB] {
            let mut h: [u8; 4096] = bytes(&file, at).map_err(io_bad)?;
            if sound(&mut h, b"head") {
                headers.push(h);
            }
        }
        let h = headers
            .into_iter()
            .max_by_key(|h| le64(h, 8))
            .ok_or_else(|| bad("neither of its headers has a right checksum".into()))?;
        let version = h[66];
        if version != 1 || h[67] != 0 {
            return Err(BlockError::Feature { path, what: format!("VHDX version {version}") });
        }
        let mut file = Logged { file, pages: BTreeMap::new() };
        if h[48..64].iter().any(|b| *b != 0) {
            let (at, len) = (le64(&h, 72), u64::from(le32(&h, 68)));
            let guid: [u8; 16] = h[48..64].try_into().unwrap_or_default();
            file.pages = replay(&file.file, at, len, &guid).map_err(io_bad)?;
        }
        let (bat, metadata) = regions(&file).map_err(io_bad)?;
        let f = metadata_facts(&file, metadata).map_err(io_bad)?;
        if f.parent {
            return Err(BlockError::Feature {
                path,
                what: "a differencing VHDX, which stands on another one".into(),
            });
        }
        if !f.block.is_power_of_two() || !(MIB..=256 * MIB).contains(&f.block) {
            return Err(bad(format!("its block size of {} bytes is out of range", f.block)));
        }
        if !matches!(f.sector, 512 | 4096) {
            return Err(bad(format!("its sector size of {} bytes is out of range", f.sector)));
        }
        let size = disk_size(f.size)
            .filter(|s| *s <= 64 << 40)
            .ok_or_else(|| bad("its size is out of range".into()))?;
        let ratio = (f.sector << 23) / f.block;
        let blocks = size.div_ceil(f.block);
        let entries = blocks + blocks.saturating_sub(1) / ratio;
        if entries * 8 > bat.1 {
            return Err(bad("its block table is too small for its size".into()));
        }
        Ok(Vhdx { file, size, block: f.block, ratio, bat: bat.0, bat_len: bat.1 })
    }
}

/// A region of the file: offset and length.
type Region = (u64, u64);

/// Where block table and metadata are.
fn regions(file: &Logged) -> io::Result<(Region, Region)> {
    let bad = |what: &str| damaged(Format::Vhdx, what.into());
    let mut table = vec![0; 64 << 10];
    let mut found = false;
    for at in [192 * KIB, 256 * KIB] {
        file.read(at, &mut table)?;
        if sound(&mut table, b"regi") {
            found = true;
            break;
        }
    }
    let count = le32(&table, 8) as usize;
    if !found || count > 2047 {
        return Err(bad("neither of its region tables has a right checksum"));
    }
    let (mut bat, mut metadata) = (None, None);
    for e in table[16..].chunks_exact(32).take(count) {
        let region = (le64(e, 16), u64::from(le32(e, 24)));
        if e[..16] == REGION_BAT {
            bat = Some(region);
        } else if e[..16] == REGION_METADATA {
            metadata = Some(region);
        } else if le32(e, 28) & 1 != 0 {
            return Err(bad("it has a region that is needed and not known"));
        }
    }
    let inside = |r: &Region| r.0 >= MIB && r.0.checked_add(r.1).is_some_and(|end| end <= i64::MAX as u64);
    match (bat.filter(inside), metadata.filter(inside)) {
        (Some(b), Some(m)) => Ok((b, m)),
        _ => Err(bad("its block table or its metadata is missing")),
    }
}

fn metadata_facts(file: &Logged, (at, len): Region) -> io::Result<Facts> {
    let bad = |what: &str| damaged(Format::Vhdx, what.into());
    if len < 64 * KIB {
        return Err(bad("its metadata is cut short"));
    }
    let mut table = vec![0; 64 << 10];
    file.read(at, &mut table)?;
    let count = usize::from(table[10]) | usize::from(table[11]) << 8;
    if !table.starts_with(b"metadata") || count > 2047 {
        return Err(bad("its metadata has no signature"));
    }
    let mut f = Facts::default();
    let mut seen = 0;
    for e in table[32..].chunks_exact(32).take(count) {
        let (offset, n, flags) = (u64::from(le32(e, 16)), u64::from(le32(e, 20)), le32(e, 24));
        let item = || -> io::Result<[u8; 8]> {
            if offset < 64 * KIB || offset + 8 > len || n < 4 {
                return Err(bad("a piece of its metadata lies outside"));
            }
            file.bytes(at + offset)
        };
        let known = [FILE_PARAMETERS, DISK_SIZE, LOGICAL_SECTOR, PHYSICAL_SECTOR, PAGE_83];
        match known.iter().position(|k| e[..16] == *k) {
            Some(0) => {
                let b = item()?;
                f.block = u64::from(le32(&b, 0));
                f.parent = le32(&b, 4) & 2 != 0;
                seen |= 1;
            }
            Some(1) => {
                f.size = le64(&item()?, 0);
                seen |= 2;
            }
            Some(2) => {
                f.sector = u64::from(le32(&item()?, 0));
                seen |= 4;
            }
            Some(_) => {}
            // Needed, and no parent locator, whose flag stands in the file parameters as well.
            None if flags & 4 != 0 && !f.parent => {
                return Err(bad("it has metadata that is needed and not known"));
            }
            None => {}
        }
    }
    if seen != 7 {
        return Err(bad("its metadata lacks block size, disk size or sector size"));
    }
    Ok(f)
}

/// One entry of the log, checked as a whole.
struct Entry {
    at: u64,
    len: u64,
    tail: u64,
    sequence: u64,
    data: Vec<u8>,
}

/// Bytes at a place of the log, which is a ring.
fn ring(file: &FileStorage, log: u64, size: u64, at: u64, len: u64) -> io::Result<Vec<u8>> {
    let mut out = vec![0; len as usize];
    let first = len.min(size - at);
    let (a, b) = out.split_at_mut(first as usize);
    file.read(&[SharedSliceMut::new(a)], log + at)?;
    file.read(&[SharedSliceMut::new(b)], log)?;
    Ok(out)
}

fn entry(file: &FileStorage, log: u64, size: u64, at: u64, guid: &[u8; 16]) -> io::Result<Option<Entry>> {
    let head = ring(file, log, size, at, 64)?;
    let (len, tail, descriptors) =
        (u64::from(le32(&head, 8)), u64::from(le32(&head, 12)), u64::from(le32(&head, 24)));
    let whole = len >= PAGE && len <= size && len.is_multiple_of(PAGE);
    let fits = 64 + descriptors * 32 <= len && tail.is_multiple_of(PAGE) && tail < size;
    if !head.starts_with(b"loge") || head[32..48] != *guid || !whole || !fits {
        return Ok(None);
    }
    let mut data = ring(file, log, size, at, len)?;
    let sequence = le64(&head, 16);
    Ok((sequence != 0 && sound(&mut data, b"loge")).then_some(Entry { at, len, tail, sequence, data }))
}

/// What the log holds: the pages of the file that it changes.
fn replay(file: &FileStorage, log: u64, size: u64, guid: &[u8; 16]) -> io::Result<BTreeMap<u64, Vec<u8>>> {
    let bad = |what: &str| damaged(Format::Vhdx, what.into());
    let inside = log.checked_add(size).is_some_and(|end| end <= file.len());
    if log < MIB || size == 0 || !size.is_multiple_of(MIB) || size > 64 * MIB || !inside {
        return Err(bad("its log lies outside the file"));
    }
    // Entries by place, then the sequence that ends with the highest number and reaches back to its own tail.
    let mut entries: BTreeMap<u64, Entry> = BTreeMap::new();
    let mut at = 0;
    while at < size {
        match entry(file, log, size, at, guid)? {
            Some(e) => {
                at += e.len;
                entries.insert(e.at, e);
            }
            None => at += PAGE,
        }
    }
    let mut heads: Vec<&Entry> = entries.values().collect();
    heads.sort_by_key(|e| std::cmp::Reverse(e.sequence));
    for head in heads {
        let mut chain = Vec::new();
        let mut at = head.tail;
        while let Some(e) = entries.get(&at) {
            let follows = chain.last().is_none_or(|l: &&Entry| e.sequence == l.sequence + 1);
            if !follows || chain.len() > entries.len() {
                break;
            }
            chain.push(e);
            if e.at == head.at {
                return apply(file, &chain);
            }
            at = (at + e.len) % size;
        }
    }
    Err(bad("its log should be applied, but holds no whole sequence of entries"))
}

fn apply(file: &FileStorage, chain: &[&Entry]) -> io::Result<BTreeMap<u64, Vec<u8>>> {
    let bad = || damaged(Format::Vhdx, "an entry of its log is out of range".into());
    let mut pages = BTreeMap::new();
    for e in chain {
        let count = le32(&e.data, 24) as usize;
        let mut sector = (64 + count * 32).next_multiple_of(PAGE as usize);
        for d in e.data[64..].chunks_exact(32).take(count) {
            let (at, sequence) = (le64(d, 16), le64(d, 24));
            if sequence != e.sequence || !at.is_multiple_of(PAGE) {
                return Err(bad());
            }
            if d.starts_with(b"zero") {
                let len = le64(d, 8);
                if !len.is_multiple_of(PAGE) || len / PAGE > MAX_PAGES as u64 || at.checked_add(len).is_none()
                {
                    return Err(bad());
                }
                for page in at / PAGE..(at + len) / PAGE {
                    pages.insert(page, vec![0; PAGE as usize]);
                }
            } else if d.starts_with(b"desc") {
                let s = e.data.get(sector..sector + PAGE as usize).ok_or_else(bad)?;
                let number = u64::from(le32(s, 4)) << 32 | u64::from(le32(s, 4092));
                if !s.starts_with(b"data") || number != sequence {
                    return Err(bad());
                }
                let mut page = s.to_vec();
                page[..8].copy_from_slice(&d[8..16]);
                page[4092..].copy_from_slice(&d[4..8]);
                pages.insert(at / PAGE, page);
                sector += PAGE as usize;
            } else {
                return Err(bad());
            }
            if pages.len() > MAX_PAGES {
                return Err(bad());
            }
        }
    }
    // What lies behind the end of the file all the same has been cut off.
    let last = chain.last().map_or(0, |e| le64(&e.data, 48));
    if file.len() < last {
        return Err(damaged(Format::Vhdx, "it is shorter than its log says: it has been cut short".into()));
    }
    Ok(pages)
}

impl Layout for Vhdx {
    fn format(&self) -> Format {
        Format::Vhdx
    }
    fn size(&self) -> u64 {
        self.size
    }
    fn find(&self, offset: u64, len: u64) -> io::Result<(u64, Place<'_>)> {
        let (i, within) = (offset / self.block, offset % self.block);
        let n = (self.block - within).min(len);
        let at = (i + i / self.ratio) * 8;
        if at + 8 > self.bat_len {
            return Err(damaged(Format::Vhdx, "its block table is cut short".into()));
        }
        let entry = le64(&self.file.bytes::<8>(self.bat + at)?, 0);
        Ok(match entry & 7 {
            // Not present, undefined, zero, unmapped.
            0..=3 => (n, if entry & 7 == 2 { Place::Zero } else { Place::Below }),
            6 => (n, Place::Data(&self.file.file, (entry & !(MIB - 1)) + within)),
            state => return Err(damaged(Format::Vhdx, format!("block {i} has the unknown state {state}"))),
        })
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_checksum_is_crc_32c() {
        // RFC 3720, appendix B.4.
        assert_eq!(super::crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(super::crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(super::crc32c(b"123456789"), 0xe306_9283);
    }
}
