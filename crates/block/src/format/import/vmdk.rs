//! VMDK, VMware's format (VMware, Virtual Disk Format 5.0): sparse, flat, split and stream-optimized disks.
//!
//! A disk is a row of extents. A text, the descriptor, lists them: in a file of its own, or inside the only extent.

use super::{Layout, Place, Unit, bytes, damaged, disk_size, le32, le64};
use crate::format::{Chain, Format, ImageOptions, is_protocol, open_storage, open_storage_as, relative_to};
use crate::storage::{FileStorage, StorageOptions};
use crate::{BlockBackend, BlockError, SharedSliceMut};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Longest descriptor read, in bytes.
const MAX_DESCRIPTOR: u64 = 64 << 10;
/// Most extents of a disk.
const MAX_EXTENTS: usize = 4096;
/// Largest compressed unit, in bytes.
const MAX_PACKED: u64 = 16 << 20;
/// `gdOffset`: the header stands at the end of the file.
const AT_END: u64 = u64::MAX;

const FLAG_ZERO_GRAINS: u32 = 1 << 2;
const FLAG_COMPRESSED: u32 = 1 << 16;
const FLAG_MARKERS: u32 = 1 << 17;

/// An open image.
pub struct Vmdk {
    extents: Vec<Extent>,
    size: u64,
    backing: Option<Arc<dyn BlockBackend>>,
}

/// A piece of the disk.
struct Extent {
    /// Where it begins on the disk.
    start: u64,
    len: u64,
    kind: Kind,
}

enum Kind {
    Zero,
    /// The file's bytes from an offset on.
    Flat(FileStorage, u64),
    Sparse(Sparse),
}

struct Sparse {
    file: FileStorage,
    grain: u64,
    /// Grains in a grain table.
    per_table: u64,
    directory: u64,
    zero_grains: bool,
    compressed: bool,
    markers: bool,
}

/// What a descriptor says.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    kind: String,
    parent_cid: Option<String>,
    parent: Option<String>,
    extents: Vec<Line>,
}

/// A line for an extent.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    sectors: u64,
    kind: String,
    file: String,
    offset: u64,
}

/// Read a descriptor.
///
/// # Errors
/// What is wrong with it, in words.
pub fn parse_descriptor(text: &str) -> Result<Descriptor, String> {
    let mut d = Descriptor::default();
    for line in text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')) {
        let first = line.split_whitespace().next().unwrap_or("");
        if matches!(first, "RW" | "RDONLY" | "NOACCESS") {
            // RW 4192256 SPARSE "test-s001.vmdk"; a flat extent ends with its offset in sectors.
            let (head, rest) = line.split_once('"').unwrap_or((line, ""));
            let (file, tail) = rest.rsplit_once('"').unwrap_or(("", ""));
            let words: Vec<&str> = head.split_whitespace().collect();
            let [_, sectors, kind] = words.as_slice() else {
                return Err(format!("the extent {line:?} cannot be understood"));
            };
            let number = |t: &str| t.parse::<u64>().ok().filter(|n| *n <= i64::MAX as u64 / 512);
            let offset = tail.split_whitespace().next().unwrap_or("0");
            let (Some(sectors), Some(offset)) = (number(sectors), number(offset)) else {
                return Err(format!("the extent {line:?} is out of range"));
            };
            if d.extents.len() >= MAX_EXTENTS {
                return Err(format!("it has more than {MAX_EXTENTS} extents"));
            }
            d.extents.push(Line { sectors, kind: (*kind).into(), file: file.into(), offset });
        } else if let Some((key, value)) = line.split_once('=') {
            let value = value.trim().trim_matches('"').to_owned();
            match key.trim() {
                "createType" => d.kind = value,
                "parentCID" if !value.eq_ignore_ascii_case("ffffffff") => d.parent_cid = Some(value),
                "parentFileNameHint" => d.parent = Some(value),
                _ => {}
            }
        }
    }
    Ok(d)
}

fn text_of(b: &[u8]) -> String {
    let end = b.iter().position(|c| *c == 0).unwrap_or(b.len());
    String::from_utf8_lossy(&b[..end]).into_owned()
}

impl Vmdk {
    /// Open an image with its extents and what it stands on.
    pub(in crate::format) fn open(
        file: FileStorage,
        options: &ImageOptions,
        chain: &Chain,
    ) -> Result<Vmdk, BlockError> {
        let path = file.path().to_path_buf();
        let host = |e| BlockError::host(&path, "cannot read", e);
        let bad = |what: String| BlockError::Broken { path: path.clone(), format: "vmdk", what };
        let mut head = [0; 4];
        if file.len() >= 512 {
            file.read(&[SharedSliceMut::new(&mut head)], 0).map_err(host)?;
        }
        let (descriptor, extents) = match &head {
            b"KDMV" => {
                let (sparse, sectors, embedded) = Sparse::open(file)?;
                (embedded, vec![(sectors * 512, Kind::Sparse(sparse))])
            }
            b"COWD" => {
                return Err(BlockError::Feature {
                    path,
                    what: "an ESX server's sparse extent (COWD)".into(),
                });
            }
            _ => {
                let mut text = vec![0; file.len().min(MAX_DESCRIPTOR) as usize];
                file.read(&[SharedSliceMut::new(&mut text)], 0).map_err(host)?;
                if !text.starts_with(b"# Disk DescriptorFile") {
                    return Err(bad("it has neither a header nor a descriptor".into()));
                }
                let d = parse_descriptor(&text_of(&text)).map_err(bad)?;
                let named = d.extents.iter().find(|e| e.kind != "ZERO");
                if let (Some(e), None, false) = (named, options.format, options.backing_trusted) {
                    return Err(BlockError::Reference { path, name: e.file.clone() });
                }
                let mut list = Vec::new();
                for e in &d.extents {
                    list.push((e.sectors * 512, open_extent(&path, e, options)?));
                }
                (Some(d), list)
            }
        };
        let (mut at, mut list) = (0u64, Vec::new());
        for (len, kind) in extents {
            list.push(Extent { start: at, len, kind });
            at = at
                .checked_add(len)
                .and_then(disk_size)
                .ok_or_else(|| bad("its size is out of range".into()))?;
        }
        if list.is_empty() {
            return Err(bad("it has no extents".into()));
        }
        let backing = match descriptor {
            Some(Descriptor { parent_cid: Some(_), parent, .. }) if options.backing => {
                let name =
                    parent.ok_or_else(|| bad("it stands on another image, but does not name it".into()))?;
                Some(open_parent(&path, &name, options, chain)?)
            }
            _ => None,
        };
        Ok(Vmdk { extents: list, size: at, backing })
    }
}

/// Open what the image names as its parent.
fn open_parent(
    path: &Path,
    name: &str,
    options: &ImageOptions,
    chain: &Chain,
) -> Result<Arc<dyn BlockBackend>, BlockError> {
    if options.format.is_none() && !options.backing_trusted {
        return Err(BlockError::Reference { path: path.into(), name: name.into() });
    }
    let below = ImageOptions {
        format: Some(Format::Vmdk),
        read_only: true,
        backing_trusted: false,
        repairing: false,
        ..*options
    };
    let storage = open_storage(&file_beside(path, name)?, &below).map_err(|e| e.named_by(path, "parent"))?;
    let chain = chain.with(path, &storage)?;
    open_storage_as(storage, &below, &chain)
}

/// The file that an image means by a name.
fn file_beside(path: &Path, name: &str) -> Result<PathBuf, BlockError> {
    if is_protocol(name) || name.is_empty() {
        return Err(BlockError::Feature {
            path: path.into(),
            what: format!("the file {name:?}, which is not a plain file name"),
        });
    }
    Ok(relative_to(path, name))
}

fn open_extent(path: &Path, e: &Line, options: &ImageOptions) -> Result<Kind, BlockError> {
    let bad = |what: String| BlockError::Broken { path: path.into(), format: "vmdk", what };
    if e.kind == "ZERO" {
        return Ok(Kind::Zero);
    }
    if !matches!(e.kind.as_str(), "FLAT" | "VMFS" | "SPARSE") {
        return Err(BlockError::Feature { path: path.into(), what: format!("an extent of type {}", e.kind) });
    }
    let storage = StorageOptions { read_only: true, direct: options.direct, lock: options.lock };
    let file = FileStorage::open_any_size(&file_beside(path, &e.file)?, storage)?;
    if e.kind == "SPARSE" {
        let (sparse, sectors, _) = Sparse::open(file)?;
        if sectors < e.sectors {
            return Err(bad(format!("the extent {} is shorter than its {} sectors", e.file, e.sectors)));
        }
        return Ok(Kind::Sparse(sparse));
    }
    let offset = e.offset * 512;
    if offset.checked_add(e.sectors * 512).is_none_or(|end| end > file.len()) {
        return Err(bad(format!("the extent {} is shorter than its {} sectors", e.file, e.sectors)));
    }
    Ok(Kind::Flat(file, offset))
}

impl Sparse {
    /// Read and check a header; gives the sectors of the extent and the descriptor inside, if there is one.
    fn open(file: FileStorage) -> Result<(Sparse, u64, Option<Descriptor>), BlockError> {
        let path = file.path().to_path_buf();
        let bad = |what: &str| BlockError::Broken { path: path.clone(), format: "vmdk", what: what.into() };
        let host = |e| BlockError::host(&path, "cannot read", e);
        if file.len() < 512 {
            return Err(bad("it has no header"));
        }
        let mut h: [u8; 512] = bytes(&file, 0).map_err(host)?;
        if !h.starts_with(b"KDMV") {
            return Err(bad("an extent has no header"));
        }
        let descriptor = (le64(&h, 28), le64(&h, 36));
        if le64(&h, 56) == AT_END {
            // Written as a stream: the header that counts comes before the last marker.
            if file.len() < 2048 {
                return Err(bad("its footer is missing: it has been cut short"));
            }
            h = bytes(&file, file.len() - 1024).map_err(host)?;
            if !h.starts_with(b"KDMV") || le64(&h, 56) == AT_END {
                return Err(bad("its footer is missing: it has been cut short"));
            }
        }
        let version = le32(&h, 4);
        if !(1..=3).contains(&version) {
            return Err(BlockError::Feature { path, what: format!("VMDK version {version}") });
        }
        let (flags, capacity, grain) = (le32(&h, 8), le64(&h, 12), le64(&h, 20));
        let (per_table, directory) = (u64::from(le32(&h, 44)), le64(&h, 56));
        let compressed = flags & FLAG_COMPRESSED != 0;
        if compressed && (u16::from(h[77]) | u16::from(h[78]) << 8) != 1 {
            return Err(BlockError::Feature { path, what: "an unknown compression".into() });
        }
        if !grain.is_power_of_two() || grain > 1 << 21 || compressed && grain * 512 > MAX_PACKED {
            return Err(bad("its grain size is out of range"));
        }
        if per_table == 0 || per_table > 1 << 16 || capacity > i64::MAX as u64 / 512 {
            return Err(bad("its size is out of range"));
        }
        let tables = capacity.div_ceil(grain).div_ceil(per_table);
        let directory = directory.checked_mul(512).filter(|d| *d >= 512);
        let directory = directory
            .filter(|d| {
                tables.checked_mul(4).and_then(|n| n.checked_add(*d)).is_some_and(|e| e <= file.len())
            })
            .ok_or_else(|| bad("its grain directory lies outside the file"))?;
        let text = match descriptor {
            (0, _) | (_, 0) => None,
            (at, sectors) => {
                let at = at.checked_mul(512).filter(|at| *at < file.len());
                let at = at.ok_or_else(|| bad("its descriptor lies outside the file"))?;
                let len = sectors.saturating_mul(512).min(MAX_DESCRIPTOR).min(file.len() - at);
                let mut text = vec![0; len as usize];
                file.read(&[SharedSliceMut::new(&mut text)], at).map_err(host)?;
                Some(parse_descriptor(&text_of(&text)).map_err(|e| bad(&e))?)
            }
        };
        let sparse = Sparse {
            file,
            grain: grain * 512,
            per_table,
            directory,
            zero_grains: flags & FLAG_ZERO_GRAINS != 0,
            compressed,
            markers: flags & FLAG_MARKERS != 0,
        };
        Ok((sparse, capacity, text))
    }

    /// Where the grain at `offset` of the extent is; `start` is where the extent begins on the disk.
    fn find(&self, offset: u64, len: u64, start: u64) -> io::Result<(u64, Place<'_>)> {
        let (g, within) = (offset / self.grain, offset % self.grain);
        let n = (self.grain - within).min(len);
        let word = |at: u64| -> io::Result<u64> {
            if at.saturating_add(4) > self.file.len() {
                return Err(damaged(Format::Vmdk, format!("a grain table at {at:#x} lies outside the file")));
            }
            Ok(u64::from(le32(&bytes::<4>(&self.file, at)?, 0)))
        };
        let table = word(self.directory + g / self.per_table * 4)? * 512;
        if table == 0 {
            return Ok((n, Place::Below));
        }
        let place = match word(table + g % self.per_table * 4)? {
            0 => Place::Below,
            1 if self.zero_grains => Place::Zero,
            sector if self.compressed => Place::Packed(Unit {
                file: &self.file,
                at: sector * 512,
                start: start + g * self.grain,
                len: self.grain,
            }),
            sector => Place::Data(&self.file, sector * 512 + within),
        };
        Ok((n, place))
    }
}

impl Layout for Vmdk {
    fn format(&self) -> Format {
        Format::Vmdk
    }
    fn size(&self) -> u64 {
        self.size
    }
    fn backing(&self) -> Option<&Arc<dyn BlockBackend>> {
        self.backing.as_ref()
    }
    fn find(&self, offset: u64, len: u64) -> io::Result<(u64, Place<'_>)> {
        let i = self.extents.partition_point(|e| e.start + e.len <= offset);
        let e = self.extents.get(i).ok_or(io::ErrorKind::InvalidInput)?;
        let within = offset - e.start;
        let len = len.min(e.len - within);
        match &e.kind {
            Kind::Zero => Ok((len, Place::Zero)),
            Kind::Flat(file, at) => Ok((len, Place::Data(file, at + within))),
            Kind::Sparse(s) => s.find(within, len, e.start),
        }
    }
    fn unpack(&self, unit: &Unit<'_>) -> io::Result<Vec<u8>> {
        let bad = |what: &str| damaged(Format::Vmdk, format!("the grain at {:#x} {what}", unit.at));
        let there = unit.file.len().saturating_sub(unit.at);
        let i = self.extents.partition_point(|e| e.start + e.len <= unit.start);
        let markers = matches!(self.extents.get(i).map(|e| &e.kind), Some(Kind::Sparse(s)) if s.markers);
        let (skip, len) = if markers {
            if there < 12 {
                return Err(bad("lies outside the file"));
            }
            // A marker: the first sector on the disk, and the bytes that follow.
            (12, u64::from(le32(&bytes::<12>(unit.file, unit.at)?, 8)))
        } else {
            (0, (2 * unit.len).min(there))
        };
        if len == 0 || len > 2 * unit.len || skip + len > there {
            return Err(bad("has a wrong length"));
        }
        let mut packed = vec![0; len as usize];
        unit.file.read(&[SharedSliceMut::new(&mut packed)], unit.at + skip)?;
        let mut out = Vec::with_capacity(unit.len as usize);
        flate2::Decompress::new(true)
            .decompress_vec(&packed, &mut out, flate2::FlushDecompress::Finish)
            .map_err(|_| bad("does not unpack"))?;
        // The disk may end in the last grain.
        let left = self.size - unit.start;
        if (out.len() as u64) < left.min(unit.len) {
            return Err(bad("does not unpack"));
        }
        out.resize(unit.len as usize, 0);
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_read() {
        let d = parse_descriptor(
            "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"twoGbMaxExtentFlat\"\n\
             RW 4192256 FLAT \"a b-f001.vmdk\" 128\nRW 8 ZERO\nRDONLY 7 SPARSE \"x.vmdk\"\n",
        )
        .expect("reads");
        assert_eq!((d.kind.as_str(), d.parent_cid, d.parent), ("twoGbMaxExtentFlat", None, None));
        assert_eq!(
            d.extents[0],
            Line { sectors: 4_192_256, kind: "FLAT".into(), file: "a b-f001.vmdk".into(), offset: 128 }
        );
        assert_eq!((d.extents[1].kind.as_str(), d.extents[2].sectors), ("ZERO", 7));
        assert!(parse_descriptor("RW 99999999999999999999 FLAT \"a\" 0").is_err());
        assert!(parse_descriptor("RW FLAT \"a\" 0").is_err());
    }
}
