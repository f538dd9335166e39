//! Boot loaders: what firmware and a boot loader would have done for a kernel given on the command line.
//!
//! Files are hostile input: every length and address in them is checked against the file and against RAM before
//! it is used, and what does not fit is a [`BootError`]. [`load`] recognises the kind; the loaders of the kinds are public
//! too, and take any `Read + Seek`, so that tests and fuzz targets can feed them bytes.

mod cpu;
mod elf;
mod image;
mod linux;
mod multiboot;
mod pvh;
#[cfg(test)]
mod tests;

pub use cpu::{Entry, reset_state};
pub use image::{Image, ImageFile};

use crate::layout::{self, Layout};
use ringfort_memory::{Bytes, GuestAddress, GuestMemory};

/// Boot data in low memory, all within conventional RAM that kernels treat as usable.
pub(crate) mod place {
    /// GDT for the entry state.
    pub const GDT: u64 = 0x500;
    /// PVH hvm_start_info, module list and memory map; or the Multiboot information.
    pub const INFO: u64 = 0x1000;
    /// End of that.
    pub const INFO_END: u64 = 0x7000;
    /// Linux boot_params.
    pub const BOOT_PARAMS: u64 = 0x7000;
    /// Top of a small stack.
    pub const STACK: u64 = 0x8ff0;
    /// Page tables: PML4, PDPT, four page directories.
    pub const PAGE_TABLES: u64 = 0x9000;
    /// Command line.
    pub const CMDLINE: u64 = 0x2_0000;
    /// End of all boot data.
    pub const END: u64 = 0x3_0000;
}

/// Why a kernel cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Reading failed.
    #[error("{what}: cannot read: {source}")]
    Read {
        /// Which file.
        what: &'static str,
        /// The host's words.
        source: std::io::Error,
    },
    /// The file is none of the known kinds.
    #[error(
        "kernel: no kernel that can be booted; name a bzImage, an ELF with a PVH note or of Linux, or a Multiboot 1 image"
    )]
    Unknown,
    /// The file is cut short.
    #[error("{what}: cut short: {part} needs {need} bytes, the file has {have}; copy or download it again")]
    Truncated {
        /// Which file.
        what: &'static str,
        /// What is missing.
        part: &'static str,
        /// Bytes that the file should have.
        need: u64,
        /// Bytes it has.
        have: u64,
    },
    /// A header says what cannot be.
    #[error("kernel: {0}")]
    Header(String),
    /// The kernel is of a kind or age that is not supported.
    #[error("kernel: {0}")]
    Unsupported(String),
    /// Something has no room in the guest's RAM.
    #[error("{what}: {size} bytes at {base:#x} do not fit in the guest's usable RAM; give it more memory")]
    NoRoom {
        /// What.
        what: &'static str,
        /// Address wanted, or lowest address possible.
        base: u64,
        /// Bytes.
        size: u64,
    },
    /// The command line is too long.
    #[error("command line: {len} bytes are more than the {max} that this kernel takes")]
    Cmdline {
        /// Its length.
        len: usize,
        /// Most.
        max: usize,
    },
    /// The command line holds a NUL.
    #[error("command line: must not hold a NUL character")]
    CmdlineNul,
    /// Guest memory refused an access (a layout that does not fit it).
    #[error("guest memory at {0:#x}: {1}")]
    Memory(u64, String),
}

/// A file loaded beside the kernel: an initial RAM disk or a Multiboot module.
pub struct Module<'a> {
    /// Its bytes.
    pub file: &'a mut dyn ImageFile,
    /// Its own command line (Multiboot and PVH; Linux has none).
    pub cmdline: String,
}

/// What to boot with.
pub struct Boot<'a> {
    /// The machine's memory map.
    pub layout: &'a Layout,
    /// Kernel command line.
    pub cmdline: &'a str,
    /// Files beside the kernel, in order. Linux sees them as one initial RAM disk.
    pub modules: Vec<Module<'a>>,
    /// Address of the RSDP, if ACPI tables are there.
    pub rsdp: Option<u64>,
}

/// How a kernel was loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// `"bzImage"`, `"PVH"`, `"Multiboot"` or `"vmlinux"`.
    pub protocol: &'static str,
    /// How the boot vCPU begins.
    pub entry: Entry,
    /// Range of the kernel in RAM, with the memory it needs at once: base and end.
    pub kernel: (u64, u64),
    /// Where modules are: base and bytes.
    pub modules: Vec<(u64, u64)>,
}

/// Load a kernel of any known kind, its modules and command line into `memory`. Order of recognition, as QEMU has it:
/// bzImage, Multiboot 1, ELF with a PVH note, ELF of 64-bit Linux.
///
/// # Errors
/// [`BootError`]; RAM may then hold parts.
pub fn load(
    memory: &GuestMemory,
    kernel: &mut dyn ImageFile,
    boot: &mut Boot<'_>,
) -> Result<Loaded, BootError> {
    let mut image = Image::new("kernel", kernel)?;
    if linux::is_bzimage(&mut image)? {
        return load_bzimage(memory, image.file(), boot);
    }
    if multiboot::find_header(&mut image)?.is_some() {
        return load_multiboot(memory, image.file(), boot);
    }
    if elf::is_elf(&mut image)? {
        return load_elf(memory, image.file(), boot);
    }
    Err(BootError::Unknown)
}

/// Load a Linux bzImage.
///
/// # Errors
/// [`BootError`].
pub fn load_bzimage(
    memory: &GuestMemory,
    kernel: &mut dyn ImageFile,
    boot: &mut Boot<'_>,
) -> Result<Loaded, BootError> {
    check_cmdline(boot)?;
    linux::load(memory, &mut Image::new("kernel", kernel)?, boot)
}

/// Load an ELF kernel: by its PVH note, or as 64-bit Linux without one.
///
/// # Errors
/// [`BootError`].
pub fn load_elf(
    memory: &GuestMemory,
    kernel: &mut dyn ImageFile,
    boot: &mut Boot<'_>,
) -> Result<Loaded, BootError> {
    check_cmdline(boot)?;
    let mut image = Image::new("kernel", kernel)?;
    let elf = elf::Elf::parse(&mut image)?;
    match elf.pvh_entry(&mut image)? {
        Some(entry) => pvh::load(memory, &mut image, &elf, entry, boot),
        None => linux::load_vmlinux(memory, &mut image, &elf, boot),
    }
}

/// Load a Multiboot 1 kernel.
///
/// # Errors
/// [`BootError`].
pub fn load_multiboot(
    memory: &GuestMemory,
    kernel: &mut dyn ImageFile,
    boot: &mut Boot<'_>,
) -> Result<Loaded, BootError> {
    check_cmdline(boot)?;
    multiboot::load(memory, &mut Image::new("kernel", kernel)?, boot)
}

fn check_cmdline(boot: &Boot<'_>) -> Result<(), BootError> {
    let mut all = std::iter::once(boot.cmdline).chain(boot.modules.iter().map(|m| m.cmdline.as_str()));
    if all.any(|c| c.contains('\0')) { Err(BootError::CmdlineNul) } else { Ok(()) }
}

/// Put the kernel's command line in its place; `max` excludes the terminating NUL.
fn write_cmdline(memory: &GuestMemory, cmdline: &str, max: usize) -> Result<(), BootError> {
    let max = max.min((place::END - place::CMDLINE) as usize - 1);
    if cmdline.len() > max {
        return Err(BootError::Cmdline { len: cmdline.len(), max });
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    write(memory, place::CMDLINE, &bytes)
}

fn write(memory: &GuestMemory, at: u64, bytes: &[u8]) -> Result<(), BootError> {
    memory.write_slice(bytes, GuestAddress(at)).map_err(|e| BootError::Memory(at, e.to_string()))
}

/// Whether `base..base + size` is RAM that a kernel may be loaded to: not boot data, firmware areas or ACPI tables.
fn loadable(layout: &Layout, base: u64, size: u64) -> bool {
    let Some(end) = base.checked_add(size) else { return false };
    let mut free = vec![(place::END, layout::EBDA_BASE), (layout::EXTENDED_BASE, layout.low_usable_end())];
    free.extend(layout.ram_ranges().get(1).map(|r| (r.0, r.0 + r.1)));
    free.iter().any(|f| base >= f.0 && end <= f.1)
}

/// Load the modules as high as possible in low RAM, in order, each at a multiple of `align`, above `floor` and with the
/// last byte at most at `last`. Packed modules follow each other at 4-byte boundaries, as one initial RAM disk.
fn load_modules(
    memory: &GuestMemory,
    boot: &mut Boot<'_>,
    floor: u64,
    last: u64,
    packed: bool,
) -> Result<Vec<(u64, u64)>, BootError> {
    const WHAT: &str = "initrd";
    let mut images = Vec::new();
    for m in &mut boot.modules {
        images.push(Image::new(WHAT, &mut *m.file)?);
    }
    let align = if packed { 4 } else { 4096 };
    let mut total = 0u64;
    for i in &images {
        total = total
            .checked_next_multiple_of(align)
            .and_then(|t| t.checked_add(i.len()))
            .ok_or(BootError::NoRoom { what: WHAT, base: floor, size: i.len() })?;
    }
    if total == 0 {
        return Ok(images.iter().map(|_| (0, 0)).collect());
    }
    let end = boot.layout.low_usable_end().min(last.saturating_add(1));
    let base = end
        .checked_sub(total)
        .map(|b| b & !4095)
        .filter(|&b| b >= floor.max(layout::EXTENDED_BASE))
        .ok_or(BootError::NoRoom { what: WHAT, base: floor, size: total })?;
    let mut at = base;
    let mut placed = Vec::new();
    for i in &mut images {
        let start = at.next_multiple_of(align);
        // Padding between packed archives must be zero bytes.
        write(memory, at, &vec![0; if packed { (start - at) as usize } else { 0 }])?;
        i.copy_to(memory, 0, i.len(), start)?;
        placed.push((start, i.len()));
        at = start + i.len();
    }
    Ok(placed)
}
