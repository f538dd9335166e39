//! The PVH boot protocol (Xen, docs/misc/pvh.pandoc; xen/include/public/arch-x86/hvm/start_info.h).

use super::elf::Elf;
use super::image::Image;
use super::{Boot, BootError, Entry, Loaded, load_modules, place, write, write_cmdline};
use ringfort_memory::GuestMemory;

const MAGIC: u32 = 0x336e_c578;
/// Sizes of hvm_start_info version 1, a module entry, a memory map entry.
const INFO_SIZE: u64 = 56;
const MODULE_SIZE: u64 = 32;

pub(super) fn load(
    memory: &GuestMemory,
    image: &mut Image<'_>,
    elf: &Elf,
    entry: u32,
    boot: &mut Boot<'_>,
) -> Result<Loaded, BootError> {
    let kernel = elf.load(memory, image, boot.layout)?;
    if !(kernel.0..kernel.1).contains(&entry.into()) {
        return Err(BootError::Header(format!("PVH entry {entry:#x} lies outside the kernel")));
    }
    write_cmdline(memory, boot.cmdline, usize::MAX)?;
    let modules = load_modules(memory, boot, kernel.1, u32::MAX.into(), false)?;

    let list = place::INFO + INFO_SIZE;
    let map = list + MODULE_SIZE * modules.len() as u64;
    let e820 = boot.layout.e820();
    let mut strings = map + 24 * e820.len() as u64;
    let mut out = Vec::new();
    let d = |out: &mut Vec<u8>, v: u32| out.extend(v.to_le_bytes());
    let q = |out: &mut Vec<u8>, v: u64| out.extend(v.to_le_bytes());
    d(&mut out, MAGIC);
    d(&mut out, 1);
    d(&mut out, 0);
    d(&mut out, modules.len() as u32);
    q(&mut out, if modules.is_empty() { 0 } else { list });
    q(&mut out, place::CMDLINE);
    q(&mut out, boot.rsdp.unwrap_or(0));
    q(&mut out, map);
    d(&mut out, e820.len() as u32);
    d(&mut out, 0);
    for (&(base, size), m) in modules.iter().zip(&boot.modules) {
        q(&mut out, base);
        q(&mut out, size);
        q(&mut out, if m.cmdline.is_empty() { 0 } else { strings });
        q(&mut out, 0);
        strings += if m.cmdline.is_empty() { 0 } else { m.cmdline.len() as u64 + 1 };
    }
    for e in &e820 {
        q(&mut out, e.base);
        q(&mut out, e.size);
        d(&mut out, e.kind as u32);
        d(&mut out, 0);
    }
    for m in boot.modules.iter().filter(|m| !m.cmdline.is_empty()) {
        out.extend(m.cmdline.as_bytes());
        out.push(0);
    }
    let room = (place::INFO_END - place::INFO) as usize;
    if out.len() > room {
        return Err(BootError::Cmdline { len: out.len(), max: room });
    }
    write(memory, place::INFO, &out)?;
    let entry = Entry::Protected { eip: entry, eax: 0, ebx: place::INFO as u32, esi: 0 };
    entry.prepare(memory)?;
    Ok(Loaded { protocol: "PVH", entry, kernel, modules })
}
