//! ELF files (System V gABI chapters 4 and 5), 32 and 64 bit.

use super::image::{Image, zero};
use super::{BootError, loadable};
use crate::bytes::{u16_at, u32_at, u64_at};
use crate::layout::Layout;
use ringfort_memory::GuestMemory;

const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;
/// Xen's note with the 32-bit entry point (xen/include/public/elfnote.h).
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
/// Most notes looked at, in bytes; Linux has a few hundred.
const MAX_NOTES: u64 = 1 << 20;
const MAX_HEADERS: u16 = 256;

struct Header {
    kind: u32,
    offset: u64,
    physical: u64,
    file_size: u64,
    memory_size: u64,
    align: u64,
}

/// A parsed ELF file.
pub(super) struct Elf {
    /// 64-bit class and x86-64.
    pub long: bool,
    /// Entry point as the file says.
    pub entry: u64,
    headers: Vec<Header>,
}

pub(super) fn is_elf(image: &mut Image<'_>) -> Result<bool, BootError> {
    Ok(image.some(0, 4)? == b"\x7fELF")
}

fn bad(text: impl Into<String>) -> BootError {
    BootError::Header(format!("ELF: {}", text.into()))
}

impl Elf {
    pub(super) fn parse(image: &mut Image<'_>) -> Result<Elf, BootError> {
        let h = image.some(0, 64)?;
        if h.len() < 52 || &h[..4] != b"\x7fELF" {
            return Err(bad("no ELF header"));
        }
        let (class, data, machine) = (h[4], h[5], u16_at(&h, 18));
        let long = match (class, machine) {
            (2, 62) if h.len() == 64 => true,
            (1, 3) => false,
            _ => return Err(BootError::Unsupported("ELF file is not for x86-64 or i386".into())),
        };
        if data != 1 || !matches!(u16_at(&h, 16), 2 | 3) {
            return Err(bad("not a little-endian executable"));
        }
        let (entry, table, entry_size, count) = if long {
            (u64_at(&h, 24), u64_at(&h, 32), u16_at(&h, 54), u16_at(&h, 56))
        } else {
            (u32_at(&h, 24).into(), u32_at(&h, 28).into(), u16_at(&h, 42), u16_at(&h, 44))
        };
        let least = if long { 56 } else { 32 };
        if count == 0 || count > MAX_HEADERS || !(least..=256).contains(&entry_size) {
            return Err(bad(format!("{count} program headers of {entry_size} bytes are not possible")));
        }
        let size = u64::from(count) * u64::from(entry_size);
        image.require("ELF program headers", table, size)?;
        let bytes = image.some(table, size as usize)?;
        let headers = bytes
            .chunks_exact(entry_size.into())
            .map(|p| {
                let w = |at| u64::from(u32_at(p, at));
                if long {
                    Header {
                        kind: u32_at(p, 0),
                        offset: u64_at(p, 8),
                        physical: u64_at(p, 24),
                        file_size: u64_at(p, 32),
                        memory_size: u64_at(p, 40),
                        align: u64_at(p, 48),
                    }
                } else {
                    Header {
                        kind: u32_at(p, 0),
                        offset: w(4),
                        physical: w(12),
                        file_size: w(16),
                        memory_size: w(20),
                        align: w(28),
                    }
                }
            })
            .collect::<Vec<_>>();
        if headers.iter().any(|h: &Header| h.kind == PT_INTERP) {
            return Err(BootError::Unsupported(
                "ELF program that needs a loader of its operating system, no kernel; name a kernel".into(),
            ));
        }
        Ok(Elf { long, entry, headers })
    }

    /// The PVH entry point, if a note gives one.
    pub(super) fn pvh_entry(&self, image: &mut Image<'_>) -> Result<Option<u32>, BootError> {
        for n in self.headers.iter().filter(|h| h.kind == PT_NOTE) {
            if n.file_size > MAX_NOTES {
                continue;
            }
            image.require("ELF notes", n.offset, n.file_size)?;
            let notes = image.some(n.offset, n.file_size as usize)?;
            let align = if n.align == 8 { 8 } else { 4 };
            let mut at = 0usize;
            while at + 12 <= notes.len() {
                let name_size = u32_at(&notes, at) as usize;
                let size = u32_at(&notes, at + 4) as usize;
                let kind = u32_at(&notes, at + 8);
                let name = at + 12;
                // All values are below 2^32 and usize has 64 bits: nothing wraps.
                let desc = (name + name_size).next_multiple_of(align);
                let end = desc + size;
                if end > notes.len() {
                    break;
                }
                if kind == XEN_ELFNOTE_PHYS32_ENTRY && notes[name..].starts_with(b"Xen\0") {
                    let entry = match size {
                        4 => u32_at(&notes, desc).into(),
                        8 => u64_at(&notes, desc),
                        _ => return Err(bad(format!("PVH note of {size} bytes"))),
                    };
                    let entry = u32::try_from(entry)
                        .map_err(|_| bad(format!("PVH entry {entry:#x} beyond 4 GiB")))?;
                    return Ok(Some(entry));
                }
                at = end.next_multiple_of(align);
            }
        }
        Ok(None)
    }

    /// Load all segments to their physical addresses. Gives the range they span: base and end.
    pub(super) fn load(
        &self,
        memory: &GuestMemory,
        image: &mut Image<'_>,
        layout: &Layout,
    ) -> Result<(u64, u64), BootError> {
        let mut segments: Vec<&Header> =
            self.headers.iter().filter(|h| h.kind == PT_LOAD && h.memory_size > 0).collect();
        segments.sort_by_key(|h| h.physical);
        let mut previous_end = 0;
        for s in &segments {
            if s.file_size > s.memory_size {
                return Err(bad(format!("segment at {:#x} has more file than memory", s.physical)));
            }
            image.require("ELF segment", s.offset, s.file_size)?;
            if !loadable(layout, s.physical, s.memory_size) {
                return Err(BootError::NoRoom {
                    what: "kernel segment",
                    base: s.physical,
                    size: s.memory_size,
                });
            }
            if s.physical < previous_end {
                return Err(bad(format!("segment at {:#x} overlaps another", s.physical)));
            }
            previous_end = s.physical + s.memory_size;
        }
        let Some(first) = segments.first() else { return Err(bad("nothing to load")) };
        let base = first.physical;
        for s in &segments {
            image.copy_to(memory, s.offset, s.file_size, s.physical)?;
            zero(memory, s.physical + s.file_size, s.memory_size - s.file_size)?;
        }
        Ok((base, previous_end))
    }
}
