//! SMBIOS 3.0 structures (DMTF DSP0134), with the 2.8 entry point beside the 64-bit one for older readers.

#[cfg(test)]
mod tests;

use crate::layout::{self, Layout};
use ringfort_memory::{Bytes, GuestAddress, GuestMemory};

/// Offset of the 2.x entry point from [`layout::SMBIOS_BASE`]; the 3.0 one is at 0.
const ENTRY_2: usize = 0x20;
/// Offset of the structures.
const TABLE: usize = 0x100;
/// Room for structures.
const ROOM: usize = 0xf000;
/// Length of the strings of one structure that readers accept.
const MAX_STRING: usize = 64;

/// What the structures say.
#[derive(Debug, Clone)]
pub struct SmbiosConfig<'a> {
    /// Memory map.
    pub layout: &'a Layout,
    /// Sockets, cores per socket, threads per core.
    pub topology: (u32, u32, u32),
    /// EAX and EDX of CPUID leaf 1.
    pub cpuid: (u32, u32),
    /// Vendor string of the CPU, for instance `GenuineIntel`.
    pub cpu_vendor: &'a str,
    /// Brand string of the CPU.
    pub cpu_brand: &'a str,
    /// TSC frequency in MHz.
    pub cpu_mhz: u16,
    /// UUID of the machine, in the order it is written in.
    pub uuid: [u8; 16],
    /// Version of the product.
    pub version: &'a str,
    /// Serial number; empty for none.
    pub serial: &'a str,
}

/// Why structures cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum SmbiosError {
    /// Larger than their place.
    #[error("SMBIOS structures of {0} bytes are larger than their place; use fewer sockets")]
    TooLarge(usize),
    /// RAM is not there.
    #[error("SMBIOS: guest memory: {0}")]
    Memory(String),
}

#[derive(Default)]
struct Structures {
    bytes: Vec<u8>,
    count: u16,
    largest: u16,
}

/// One structure: its formatted area (without header) and its strings.
struct Structure {
    kind: u8,
    handle: u16,
    body: Vec<u8>,
    strings: Vec<String>,
}

impl Structure {
    fn new(kind: u8, handle: u16) -> Structure {
        Structure { kind, handle, body: Vec::new(), strings: Vec::new() }
    }
    fn b(mut self, v: &[u8]) -> Structure {
        self.body.extend(v);
        self
    }
    fn w(self, v: u16) -> Structure {
        self.b(&v.to_le_bytes())
    }
    fn d(self, v: u32) -> Structure {
        self.b(&v.to_le_bytes())
    }
    fn q(self, v: u64) -> Structure {
        self.b(&v.to_le_bytes())
    }
    /// A string's number; 0 when there is nothing to say. Only printable ASCII is kept.
    fn s(mut self, text: &str) -> Structure {
        let clean: String =
            text.trim().chars().filter(|c| c.is_ascii_graphic() || *c == ' ').take(MAX_STRING).collect();
        if clean.is_empty() {
            return self.b(&[0]);
        }
        self.strings.push(clean);
        let n = self.strings.len() as u8;
        self.b(&[n])
    }
}

impl Structures {
    fn add(&mut self, s: Structure) {
        let start = self.bytes.len();
        self.bytes.extend([s.kind, s.body.len() as u8 + 4]);
        self.bytes.extend(s.handle.to_le_bytes());
        self.bytes.extend(&s.body);
        for text in &s.strings {
            self.bytes.extend(text.as_bytes());
            self.bytes.push(0);
        }
        if s.strings.is_empty() {
            self.bytes.push(0);
        }
        self.bytes.push(0);
        self.count += 1;
        self.largest = self.largest.max((self.bytes.len() - start) as u16);
    }
}

const MAKER: &str = "Ringfort";
const PRODUCT: &str = "Ringfort PC (Q35)";

/// Both entry points and the structures, to lie at [`layout::SMBIOS_BASE`].
///
/// # Errors
/// When they do not fit.
pub fn build(c: &SmbiosConfig<'_>) -> Result<Vec<u8>, SmbiosError> {
    let mut t = Structures::default();
    // BIOS: characteristics "not supported", extensions: ACPI; targeted content, virtual machine, UEFI absent.
    t.add(
        Structure::new(0, 0)
            .s(MAKER)
            .s(c.version)
            .w(0xe800)
            .s("01/01/2026")
            .b(&[0])
            .q(1 << 3)
            .b(&[1, 0x14, 0, 0, 0xff, 0xff])
            .w(0),
    );
    // The first three fields of a UUID are little endian since 2.6.
    let mut uuid = c.uuid;
    uuid[0..4].reverse();
    uuid[4..6].reverse();
    uuid[6..8].reverse();
    // Woken by the power switch.
    t.add(
        Structure::new(1, 0x100).s(MAKER).s(PRODUCT).s(c.version).s(c.serial).b(&uuid).b(&[6]).s("").s(MAKER),
    );
    // Chassis of kind "other"; states safe or unknown.
    t.add(
        Structure::new(3, 0x300)
            .s(MAKER)
            .b(&[1])
            .s(c.version)
            .s(c.serial)
            .s("")
            .b(&[3, 3, 3, 2])
            .d(0)
            .b(&[0, 0, 0, 0])
            .s(""),
    );
    let (sockets, cores, threads) = c.topology;
    let family: u16 = if c.cpu_vendor == "AuthenticAMD" { 0x6b } else { 0xb3 };
    let per_socket = cores.saturating_mul(threads);
    let byte = |n: u32| n.min(255) as u8;
    let word = |n: u32| n.min(0xfffe) as u16;
    for n in 0..sockets {
        // Central processor, populated and enabled; 64-bit, multi-core, threads, NX.
        t.add(
            Structure::new(4, 0x400 + n as u16)
                .s(&format!("CPU {n}"))
                .b(&[3, family as u8])
                .s(c.cpu_vendor)
                .d(c.cpuid.0)
                .d(c.cpuid.1)
                .s(c.cpu_brand)
                .b(&[0x8a])
                .w(0)
                .w(c.cpu_mhz)
                .w(c.cpu_mhz)
                .b(&[0x41, 1])
                .w(0xffff)
                .w(0xffff)
                .w(0xffff)
                .s("")
                .s("")
                .s("")
                .b(&[byte(cores), byte(cores), byte(per_socket)])
                .w(1 << 2 | 1 << 3 | 1 << 4 | 1 << 5)
                .w(family)
                .w(word(cores))
                .w(word(cores))
                .w(word(per_socket)),
        );
    }
    memory(&mut t, c.layout);
    // Booted without error.
    t.add(Structure::new(32, 0x2000).b(&[0; 6]).b(&[0]));
    t.add(Structure::new(127, 0x7f00));
    finish(&t)
}

/// Array, devices of at most 16 GiB, and mapped ranges.
fn memory(t: &mut Structures, layout: &Layout) {
    const DIMM: u64 = 16 << 30;
    let devices = layout.ram().div_ceil(DIMM);
    let kib = layout.ram() >> 10;
    let small = kib < 0x8000_0000;
    // On the board, system memory, multi-bit ECC.
    t.add(
        Structure::new(16, 0x1000)
            .b(&[3, 3, 6])
            .d(if small { kib as u32 } else { 0x8000_0000 })
            .w(0xfffe)
            .w(devices.min(0xffff) as u16)
            .q(if small { 0 } else { layout.ram() }),
    );
    for n in 0..devices.min(256) {
        let size = (layout.ram() - n * DIMM).min(DIMM);
        // Sizes in MiB, or in KiB with the top bit when no whole MiB.
        let field = if size.is_multiple_of(1 << 20) && size >> 20 < 0x7fff {
            (size >> 20) as u16
        } else if size >> 20 >= 0x7fff {
            0x7fff
        } else {
            0x8000 | (size >> 10).min(0x7ffe) as u16
        };
        // DIMM of RAM, no speeds known.
        t.add(
            Structure::new(17, 0x1100 + n as u16)
                .w(0x1000)
                .w(0xfffe)
                .w(0xffff)
                .w(0xffff)
                .w(field)
                .b(&[9, 0])
                .s(&format!("DIMM {n}"))
                .s("")
                .b(&[7])
                .w(2)
                .w(0)
                .s(MAKER)
                .s("")
                .s("")
                .s("")
                .b(&[0])
                .d((size >> 20) as u32)
                .w(0)
                .w(0)
                .w(0)
                .w(0),
        );
    }
    for (n, (base, size)) in (0u16..).zip(layout.ram_ranges()) {
        let (first, last) = (base >> 10, ((base + size) >> 10) - 1);
        let s = Structure::new(19, 0x1300 + n);
        t.add(if last < 0xffff_ffff {
            s.d(first as u32).d(last as u32).w(0x1000).b(&[1]).q(0).q(0)
        } else {
            s.d(u32::MAX).d(u32::MAX).w(0x1000).b(&[1]).q(base).q(base + size - 1)
        });
    }
}

fn finish(t: &Structures) -> Result<Vec<u8>, SmbiosError> {
    if t.bytes.len() > ROOM - TABLE {
        return Err(SmbiosError::TooLarge(t.bytes.len()));
    }
    let table = layout::SMBIOS_BASE + TABLE as u64;
    let sum = |b: &[u8]| b.iter().fold(0u8, |s, v| s.wrapping_add(*v)).wrapping_neg();
    let mut e3 = b"_SM3_".to_vec();
    e3.extend([0, 24, 3, 0, 0, 1, 0]);
    e3.extend((t.bytes.len() as u32).to_le_bytes());
    e3.extend(table.to_le_bytes());
    e3[5] = sum(&e3);

    let mut intermediate = b"_DMI_\0".to_vec();
    intermediate.extend((t.bytes.len() as u16).to_le_bytes());
    intermediate.extend((table as u32).to_le_bytes());
    intermediate.extend(t.count.to_le_bytes());
    intermediate.push(0x28);
    intermediate[5] = sum(&intermediate);
    let mut e2 = b"_SM_".to_vec();
    e2.extend([0, 31, 2, 8]);
    e2.extend(t.largest.to_le_bytes());
    e2.extend([0; 6]);
    e2.extend(intermediate);
    e2[4] = sum(&e2);

    let mut out = vec![0; TABLE];
    out[..e3.len()].copy_from_slice(&e3);
    out[ENTRY_2..ENTRY_2 + e2.len()].copy_from_slice(&e2);
    out.extend(&t.bytes);
    Ok(out)
}

/// Write what [`build`] made.
///
/// # Errors
/// When RAM is not there.
pub fn install(memory: &GuestMemory, bytes: &[u8]) -> Result<(), SmbiosError> {
    memory
        .write_slice(bytes, GuestAddress(layout::SMBIOS_BASE))
        .map_err(|e| SmbiosError::Memory(e.to_string()))
}
