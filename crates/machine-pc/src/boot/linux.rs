//! The Linux x86 boot protocol (Linux Documentation/arch/x86/boot.rst and zero-page.rst).

use super::elf::Elf;
use super::image::Image;
use super::{Boot, BootError, Entry, Loaded, load_modules, loadable, place, write, write_cmdline};
use crate::bytes::{put, u8_at, u16_at, u32_at, u64_at};
use crate::layout::{E820Entry, EXTENDED_BASE};
use ringfort_memory::GuestMemory;

/// Offset of the setup header in the file and in boot_params.
const HEADER: usize = 0x1f1;
/// The header cannot reach beyond this (boot_params: edd_mbr_sig_buffer).
const HEADER_END: usize = 0x290;
const BOOT_PARAMS_SIZE: usize = 4096;
/// Length of the command line when the header does not say (before 2.06).
const DEFAULT_CMDLINE: usize = 255;

const LOADED_HIGH: u8 = 1;
const CAN_USE_HEAP: u8 = 0x80;
const XLF_KERNEL_64: u16 = 1;

pub(super) fn is_bzimage(image: &mut Image<'_>) -> Result<bool, BootError> {
    let h = image.some(0, 0x206)?;
    Ok(h.get(0x202..0x206) == Some(b"HdrS") && u16_at(&h, 0x1fe) == 0xaa55)
}

pub(super) fn load(
    memory: &GuestMemory,
    image: &mut Image<'_>,
    boot: &mut Boot<'_>,
) -> Result<Loaded, BootError> {
    image.require("Linux setup header", 0, HEADER_END as u64)?;
    let h = image.some(0, HEADER_END)?;
    if h.get(0x202..0x206) != Some(b"HdrS") || u16_at(&h, 0x1fe) != 0xaa55 {
        return Err(BootError::Header("no Linux setup header".into()));
    }
    let version = u16_at(&h, 0x206);
    if version < 0x0206 {
        return Err(BootError::Unsupported(format!(
            "Linux boot protocol {}.{:02} is too old; 2.06 (Linux 2.6.22) or newer is needed",
            version >> 8,
            version & 0xff
        )));
    }
    if u8_at(&h, 0x211) & LOADED_HIGH == 0 {
        return Err(BootError::Unsupported("zImage kernels (loaded below 1 MiB) are not supported".into()));
    }
    let setup_sectors = match u8_at(&h, HEADER) {
        0 => 4,
        n => u64::from(n),
    };
    let body = (setup_sectors + 1) * 512;
    image.require("Linux setup code", 0, body)?;
    let size = image.len() - body;
    if size == 0 {
        return Err(BootError::Header("bzImage has no protected-mode kernel".into()));
    }
    // syssize counts 16-byte units, the last of which a file need not fill (memtest86+'s does not). A signature may follow the kernel, so it
    // may be longer.
    let least = u64::from(u32_at(&h, 0x1f4)).saturating_mul(16).saturating_sub(15).min(1 << 32);
    image.require("Linux kernel", body, least)?;

    let long = version >= 0x020c && u16_at(&h, 0x236) & XLF_KERNEL_64 != 0;
    let (base, need) = place_kernel(&h, version, size, boot)?;
    image.copy_to(memory, body, size, base)?;

    let cmdline_max = match u32_at(&h, 0x238) {
        0 => DEFAULT_CMDLINE,
        n => n as usize,
    };
    write_cmdline(memory, boot.cmdline, cmdline_max)?;

    let mut params = vec![0; BOOT_PARAMS_SIZE];
    let header_end = (0x202 + usize::from(u8_at(&h, 0x201))).clamp(0x214, HEADER_END);
    params[HEADER..header_end].copy_from_slice(&h[HEADER..header_end]);
    let initrd_last = u64::from(u32_at(&h, 0x22c));
    put(&mut params, 0x214, &(base as u32).to_le_bytes());
    let modules = finish(memory, &mut params, boot, base + need, initrd_last)?;

    let entry = if long {
        // The 64-bit entry lies 512 bytes into the kernel.
        if size <= 0x200 {
            return Err(BootError::Header("bzImage has no 64-bit entry point".into()));
        }
        Entry::Long { rip: base + 0x200, rsi: place::BOOT_PARAMS }
    } else {
        Entry::Protected { eip: base as u32, eax: 0, ebx: 0, esi: place::BOOT_PARAMS as u32 }
    };
    entry.prepare(memory)?;
    Ok(Loaded { protocol: "bzImage", entry, kernel: (base, base + need), modules })
}

/// Where the kernel goes and how much memory it needs from there to run until it reads the memory map.
fn place_kernel(h: &[u8], version: u16, size: u64, boot: &Boot<'_>) -> Result<(u64, u64), BootError> {
    if version < 0x020a {
        let need = size;
        return if loadable(boot.layout, EXTENDED_BASE, need) {
            Ok((EXTENDED_BASE, need))
        } else {
            Err(BootError::NoRoom { what: "kernel", base: EXTENDED_BASE, size: need })
        };
    }
    let need = size.max(u32_at(h, 0x260).into());
    let preferred = u64_at(h, 0x258);
    // Everything here stays in the 4 GiB that the entry state maps.
    let below_4g = |base: u64| base.checked_add(need).is_some_and(|e| e <= 1 << 32);
    if below_4g(preferred) && loadable(boot.layout, preferred, need) {
        return Ok((preferred, need));
    }
    let no_room = BootError::NoRoom { what: "kernel", base: preferred, size: need };
    if u8_at(h, 0x234) == 0 {
        return Err(no_room);
    }
    let align = u64::from(u32_at(h, 0x230));
    if !align.is_power_of_two() || align < 4096 {
        return Err(BootError::Header(format!("bzImage wants an impossible alignment of {align:#x}")));
    }
    let base = EXTENDED_BASE.next_multiple_of(align);
    if below_4g(base) && loadable(boot.layout, base, need) { Ok((base, need)) } else { Err(no_room) }
}

/// Everything in boot_params that does not depend on where the kernel came from; loads modules and writes boot_params.
fn finish(
    memory: &GuestMemory,
    params: &mut [u8],
    boot: &mut Boot<'_>,
    floor: u64,
    initrd_last: u64,
) -> Result<Vec<(u64, u64)>, BootError> {
    let modules = load_modules(memory, boot, floor, initrd_last, true)?;
    // Boot loader without an assigned number.
    put(params, 0x210, &[0xff]);
    params[0x211] |= CAN_USE_HEAP;
    // End of the real-mode heap; nobody runs real-mode code here, the field is only kept sensible.
    put(params, 0x224, &0xfe00u16.to_le_bytes());
    put(params, 0x228, &(place::CMDLINE as u32).to_le_bytes());
    // Text mode as a BIOS would leave it is not claimed: there is no video adapter.
    put(params, 0x1fa, &0xffffu16.to_le_bytes());
    if let (Some(first), Some(last)) = (modules.first(), modules.last())
        && last.0 + last.1 > first.0
    {
        put(params, 0x218, &(first.0 as u32).to_le_bytes());
        put(params, 0x21c, &((last.0 + last.1 - first.0) as u32).to_le_bytes());
    }
    put(params, 0x070, &boot.rsdp.unwrap_or(0).to_le_bytes());
    // Extended memory above 1 MiB in KiB.
    let kib = (boot.layout.low_usable_end() - EXTENDED_BASE) >> 10;
    put(params, 0x1e0, &(kib as u32).to_le_bytes());
    put(params, 0x002, &(kib.min(0xfc00) as u16).to_le_bytes());
    let map = boot.layout.e820();
    put(params, 0x1e8, &[map.len() as u8]);
    for (i, E820Entry { base, size, kind }) in map.into_iter().enumerate() {
        let at = 0x2d0 + i * 20;
        put(params, at, &base.to_le_bytes());
        put(params, at + 8, &size.to_le_bytes());
        put(params, at + 16, &(kind as u32).to_le_bytes());
    }
    write(memory, place::BOOT_PARAMS, params)?;
    Ok(modules)
}

/// An uncompressed 64-bit Linux (vmlinux) without a PVH note, by its own entry point.
pub(super) fn load_vmlinux(
    memory: &GuestMemory,
    image: &mut Image<'_>,
    elf: &Elf,
    boot: &mut Boot<'_>,
) -> Result<Loaded, BootError> {
    if !elf.long {
        return Err(BootError::Unsupported(
            "32-bit ELF file without a PVH note or Multiboot header; use the bzImage".into(),
        ));
    }
    let kernel = elf.load(memory, image, boot.layout)?;
    if !(kernel.0..kernel.1).contains(&elf.entry) || kernel.1 > 1 << 32 {
        return Err(BootError::Header(format!(
            "ELF entry point {:#x} is not a physical address inside the kernel (no vmlinux?)",
            elf.entry
        )));
    }
    write_cmdline(memory, boot.cmdline, 2047)?;
    let mut params = vec![0; BOOT_PARAMS_SIZE];
    // What a setup header would have said.
    put(&mut params, 0x1fe, &0xaa55u16.to_le_bytes());
    put(&mut params, 0x202, b"HdrS");
    put(&mut params, 0x206, &0x020fu16.to_le_bytes());
    put(&mut params, 0x211, &[LOADED_HIGH]);
    put(&mut params, 0x230, &0x0100_0000u32.to_le_bytes());
    let modules = finish(memory, &mut params, boot, kernel.1, 0x7fff_ffff)?;
    let entry = Entry::Long { rip: elf.entry, rsi: place::BOOT_PARAMS };
    entry.prepare(memory)?;
    Ok(Loaded { protocol: "vmlinux", entry, kernel, modules })
}
