//! Multiboot 0.6.96 (version 1 of the specification).

use super::elf::{self, Elf};
use super::image::{Image, zero};
use super::{Boot, BootError, Entry, Loaded, load_modules, loadable, place, write, write_cmdline};
use crate::bytes::u32_at;
use crate::layout::{EBDA_BASE, EXTENDED_BASE, Layout};
use ringfort_memory::GuestMemory;

const HEADER_MAGIC: u32 = 0x1bad_b002;
const LOADER_MAGIC: u32 = 0x2bad_b002;
/// The header lies wholly within this.
const SEARCH: usize = 8192;
const NAME: &[u8] = b"Ringfort\0";

const ADDRESSES_VALID: u32 = 1 << 16;
/// Page-aligned modules, memory information, video mode. The last is a preference: no mode is offered.
const KNOWN_REQUIRED: u32 = 0b111;

pub(super) struct Header {
    offset: u64,
    flags: u32,
    /// header_addr, load_addr, load_end_addr, bss_end_addr, entry_addr.
    addresses: [u32; 5],
}

/// The Multiboot header, if there is one.
pub(super) fn find_header(image: &mut Image<'_>) -> Result<Option<Header>, BootError> {
    let bytes = image.some(0, SEARCH)?;
    Ok((0..bytes.len().saturating_sub(11)).step_by(4).find_map(|at| {
        let flags = u32_at(&bytes, at + 4);
        let sum = HEADER_MAGIC.wrapping_add(flags).wrapping_add(u32_at(&bytes, at + 8));
        (u32_at(&bytes, at) == HEADER_MAGIC && sum == 0).then(|| Header {
            offset: at as u64,
            flags,
            addresses: std::array::from_fn(|i| u32_at(&bytes, at + 12 + 4 * i)),
        })
    }))
}

pub(super) fn load(
    memory: &GuestMemory,
    image: &mut Image<'_>,
    boot: &mut Boot<'_>,
) -> Result<Loaded, BootError> {
    let header = find_header(image)?
        .ok_or_else(|| BootError::Header("no Multiboot header in the first 8 KiB".into()))?;
    let unknown = header.flags & 0xffff & !KNOWN_REQUIRED;
    if unknown != 0 {
        return Err(BootError::Unsupported(format!(
            "Multiboot header requires unknown features {unknown:#x}"
        )));
    }
    let (kernel, entry) = if header.flags & ADDRESSES_VALID != 0 {
        load_by_addresses(memory, image, &header, boot.layout)?
    } else if elf::is_elf(image)? {
        let elf = Elf::parse(image)?;
        (elf.load(memory, image, boot.layout)?, elf.entry)
    } else {
        return Err(BootError::Header(
            "Multiboot header without load addresses in a file that is no ELF".into(),
        ));
    };
    let eip = u32::try_from(entry)
        .ok()
        .filter(|&e| (kernel.0..kernel.1).contains(&e.into()))
        .ok_or_else(|| BootError::Header(format!("entry point {entry:#x} lies outside the kernel")))?;
    write_cmdline(memory, boot.cmdline, usize::MAX)?;
    let modules = load_modules(memory, boot, kernel.1, u32::MAX.into(), false)?;
    write_info(memory, boot, &modules)?;
    let entry = Entry::Protected { eip, eax: LOADER_MAGIC, ebx: place::INFO as u32, esi: 0 };
    entry.prepare(memory)?;
    Ok(Loaded { protocol: "Multiboot", entry, kernel, modules })
}

/// The "a.out kludge": addresses in the header.
fn load_by_addresses(
    memory: &GuestMemory,
    image: &mut Image<'_>,
    header: &Header,
    layout: &Layout,
) -> Result<((u64, u64), u64), BootError> {
    image.require("Multiboot header", header.offset, 32)?;
    let [header_addr, load, load_end, bss_end, entry] = header.addresses.map(u64::from);
    let bad = |what: &str| BootError::Header(format!("Multiboot header: {what}"));
    let before = header_addr.checked_sub(load).ok_or_else(|| bad("loaded above its own header"))?;
    let offset = header.offset.checked_sub(before).ok_or_else(|| bad("begins before the file does"))?;
    let size = match load_end {
        0 => image.len() - offset,
        end => end.checked_sub(load).ok_or_else(|| bad("ends before it begins"))?,
    };
    image.require("Multiboot kernel", offset, size)?;
    let end = match bss_end {
        0 => load + size,
        end if end >= load + size => end,
        _ => return Err(bad("cleared memory ends before the kernel does")),
    };
    if !loadable(layout, load, end - load) {
        return Err(BootError::NoRoom { what: "kernel", base: load, size: end - load });
    }
    image.copy_to(memory, offset, size, load)?;
    zero(memory, load + size, end - load - size)?;
    Ok(((load, end), entry))
}

/// The Multiboot information structure (specification section 3.3) and what it points to.
fn write_info(memory: &GuestMemory, boot: &Boot<'_>, modules: &[(u64, u64)]) -> Result<(), BootError> {
    const SIZE: usize = 120;
    let modules_at = place::INFO as usize + SIZE;
    let map_at = modules_at + 16 * modules.len();
    let e820 = boot.layout.e820();
    let name_at = map_at + 24 * e820.len();
    let mut strings_at = name_at + NAME.len();
    let mut out = vec![0; SIZE];
    let mut set = |at: usize, v: u32| out[at..at + 4].copy_from_slice(&v.to_le_bytes());
    // mem_lower and mem_upper, cmdline, mods, mmap, boot_loader_name.
    set(0, 1 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9);
    set(4, (EBDA_BASE >> 10) as u32);
    set(8, ((boot.layout.low_usable_end() - EXTENDED_BASE) >> 10) as u32);
    set(16, place::CMDLINE as u32);
    set(20, modules.len() as u32);
    set(24, modules_at as u32);
    set(44, 24 * e820.len() as u32);
    set(48, map_at as u32);
    set(64, name_at as u32);
    for (&(base, size), m) in modules.iter().zip(&boot.modules) {
        for v in [base as u32, (base + size) as u32, strings_at as u32, 0] {
            out.extend(v.to_le_bytes());
        }
        strings_at += m.cmdline.len() + 1;
    }
    for e in &e820 {
        // "size" does not count itself.
        out.extend(20u32.to_le_bytes());
        out.extend(e.base.to_le_bytes());
        out.extend(e.size.to_le_bytes());
        out.extend((e.kind as u32).to_le_bytes());
    }
    out.extend(NAME);
    for m in &boot.modules {
        out.extend(m.cmdline.as_bytes());
        out.push(0);
    }
    let room = (place::INFO_END - place::INFO) as usize;
    if out.len() > room {
        return Err(BootError::Cmdline { len: out.len(), max: room });
    }
    write(memory, place::INFO, &out)
}
