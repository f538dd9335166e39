//! A type 0 configuration space: registers, per-bit write masks, BARs and the capability list.

use super::{MsixState, PciError};

/// Bytes of PCI Express configuration space; the first 256 are conventional.
pub const CONFIG_SIZE: usize = 4096;
/// BAR number by which the expansion ROM goes.
pub const ROM_BAR: u8 = 6;
/// Power management capability.
pub const CAP_ID_PM: u8 = 0x01;
/// MSI capability.
pub const CAP_ID_MSI: u8 = 0x05;
/// Vendor-specific capability (virtio's structures).
pub const CAP_ID_VENDOR: u8 = 0x09;
/// PCI Express capability.
pub const CAP_ID_PCIE: u8 = 0x10;
/// MSI-X capability.
pub const CAP_ID_MSIX: u8 = 0x11;

/// Offsets of standard registers (PCI 3.0 section 6.1).
pub mod reg {
    /// Command, 16 bits.
    pub const COMMAND: u16 = 0x04;
    /// Status, 16 bits.
    pub const STATUS: u16 = 0x06;
    /// First BAR.
    pub const BAR0: u16 = 0x10;
    /// Expansion ROM base address.
    pub const ROM: u16 = 0x30;
    /// Head of the capability list.
    pub const CAPABILITIES: u16 = 0x34;
    /// Interrupt line: scratch for software.
    pub const INTERRUPT_LINE: u16 = 0x3c;
    /// Interrupt pin: 0 none, 1 to 4 INTA to INTD.
    pub const INTERRUPT_PIN: u16 = 0x3d;
}

/// Bits of the command register.
pub mod command {
    /// Answer I/O space accesses.
    pub const IO: u16 = 1 << 0;
    /// Answer memory space accesses.
    pub const MEMORY: u16 = 1 << 1;
    /// May master the bus: DMA and MSI.
    pub const BUS_MASTER: u16 = 1 << 2;
    /// Do not assert INTx.
    pub const INTX_DISABLE: u16 = 1 << 10;
    /// All bits that can be written: also parity response and SERR# enable.
    pub const WRITABLE: u16 = IO | MEMORY | BUS_MASTER | 1 << 6 | 1 << 8 | INTX_DISABLE;
}

/// Bits of the status register.
pub mod status {
    /// INTx is asserted inside the function, whether or not it is disabled.
    pub const INTX: u16 = 1 << 3;
    /// There is a capability list.
    pub const CAPABILITIES: u16 = 1 << 4;
    /// Error bits; writing one clears them.
    pub const ERRORS: u16 = 0xf900;
}

/// What the first registers say about a function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Class in bits 23:16, subclass in 15:8, programming interface in 7:0.
    pub class: u32,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// What kind of addresses a BAR takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// 32-bit memory.
    Mem32 {
        /// Reads have no side effects.
        prefetchable: bool,
    },
    /// 64-bit memory; takes this BAR register and the next.
    Mem64 {
        /// Reads have no side effects.
        prefetchable: bool,
    },
}

/// The space that a BAR decodes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarSpace {
    /// I/O ports.
    Io,
    /// Memory.
    Memory,
}

/// Where a BAR decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarWindow {
    /// Ports or memory.
    pub space: BarSpace,
    /// First address.
    pub base: u64,
    /// Bytes.
    pub len: u64,
}

/// Device/port type of a PCI Express capability (PCIe 3.0 section 7.8.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PcieKind {
    /// A function behind a port.
    Endpoint,
    /// A function on the root bus.
    RootComplexEndpoint,
}

/// Registers with their write masks.
#[derive(Clone)]
pub struct ConfigSpace {
    regs: Vec<u8>,
    /// Bits that a write sets.
    writable: Vec<u8>,
    /// Bits that writing one clears.
    clearable: Vec<u8>,
    bars: [Option<(BarKind, u64)>; 7],
    /// BAR registers that are the upper half of a 64-bit BAR.
    upper: [bool; 6],
    next_cap: u16,
    last_cap: u16,
    pub(super) pcie: Option<u16>,
    pub(super) msix: Option<u16>,
}

impl ConfigSpace {
    /// A function with this identity, no BARs, no capabilities, no interrupt pin.
    pub fn new(id: &Identity) -> ConfigSpace {
        let mut s = ConfigSpace {
            regs: vec![0; CONFIG_SIZE],
            writable: vec![0; CONFIG_SIZE],
            clearable: vec![0; CONFIG_SIZE],
            bars: [None; 7],
            upper: [false; 6],
            next_cap: 0x40,
            last_cap: reg::CAPABILITIES,
            pcie: None,
            msix: None,
        };
        s.set_u16(0x00, id.vendor);
        s.set_u16(0x02, id.device);
        s.set_u32(0x08, id.class << 8 | u32::from(id.revision));
        s.set_u16(0x2c, id.subsystem_vendor);
        s.set_u16(0x2e, id.subsystem);
        s.allow(reg::COMMAND, &command::WRITABLE.to_le_bytes());
        s.clearable[0x06..0x08].copy_from_slice(&status::ERRORS.to_le_bytes());
        s.allow(0x0c, &[0xff]);
        s.allow(reg::INTERRUPT_LINE, &[0xff]);
        s
    }

    /// Add a BAR of `size` bytes (a power of two; at least 4 for I/O, 16 for memory). `index` 0 to 5, or
    /// [`ROM_BAR`] for an expansion ROM (`Mem32`, at least 2 KiB).
    ///
    /// # Errors
    /// When size or number are impossible or the BAR is taken.
    pub fn add_bar(&mut self, index: u8, kind: BarKind, size: u64) -> Result<(), PciError> {
        let bad = |reason| Err(PciError::Bar { index, size, reason });
        let i = usize::from(index);
        let (min, max) = match kind {
            BarKind::Io => (4, 256),
            BarKind::Mem32 { .. } if index == ROM_BAR => (2048, 16 << 20),
            BarKind::Mem32 { .. } => (16, 2 << 30),
            BarKind::Mem64 { .. } => (16, 1 << 46),
        };
        if !size.is_power_of_two() || size < min || size > max {
            return bad("size must be a power of two within what the kind allows");
        }
        if i > 6 || self.bars[i].is_some() || (i < 6 && self.upper[i]) {
            return bad("no such BAR, or it is taken");
        }
        let mask = !(size - 1);
        if index == ROM_BAR {
            if !matches!(kind, BarKind::Mem32 { .. }) {
                return bad("an expansion ROM is 32-bit memory");
            }
            self.allow(reg::ROM, &(mask as u32 & 0xffff_f800 | 1).to_le_bytes());
        } else {
            let at = reg::BAR0 + u16::from(index) * 4;
            let low = match kind {
                BarKind::Io => 1,
                BarKind::Mem32 { prefetchable } => u32::from(prefetchable) << 3,
                BarKind::Mem64 { prefetchable } => u32::from(prefetchable) << 3 | 4,
            };
            if let BarKind::Mem64 { .. } = kind {
                if i >= 5 || self.bars[i + 1].is_some() || self.upper[i + 1] {
                    return bad("a 64-bit BAR needs the next one too");
                }
                self.upper[i + 1] = true;
                self.allow(at + 4, &((mask >> 32) as u32).to_le_bytes());
            }
            self.set_u32(at, low);
            self.allow(at, &(mask as u32 & if kind == BarKind::Io { !3 } else { !15 }).to_le_bytes());
        }
        self.bars[i] = Some((kind, size));
        Ok(())
    }

    /// Append a capability: `body` is what follows ID and next pointer, `writable` the write mask of `body`
    /// (shorter means read-only from there). Returns the offset of the ID byte.
    ///
    /// # Errors
    /// When the first 256 bytes are full.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<u16, PciError> {
        let len = body.len() + 2;
        let at = self.next_cap;
        let end = usize::from(at) + len;
        if end > 256 || writable.len() > body.len() {
            return Err(PciError::NoRoom { id, len });
        }
        self.regs[usize::from(at)] = id;
        self.regs[usize::from(at) + 2..end].copy_from_slice(body);
        self.allow(at + 2, writable);
        // The list's tail: the head pointer, or the next pointer of the capability before.
        let link = if self.last_cap == reg::CAPABILITIES { self.last_cap } else { self.last_cap + 1 };
        self.regs[usize::from(link)] = at as u8;
        self.last_cap = at;
        self.next_cap = (end as u16 + 3) & !3;
        self.set_u16(reg::STATUS, self.u16(reg::STATUS) | status::CAPABILITIES);
        Ok(at)
    }

    /// Keep the capability list out of `0x40..offset`, where the function has registers of its own.
    pub fn reserve_until(&mut self, offset: u16) {
        self.next_cap = self.next_cap.max((offset + 3) & !3);
    }

    /// Add the MSI-X capability of `msix` (PCI 3.0 section 6.8.2).
    ///
    /// # Errors
    /// When there is no room, or table or PBA do not fit in their BARs (add BARs first).
    pub fn add_msix(&mut self, msix: &MsixState) -> Result<u16, PciError> {
        let (l, n) = (msix.layout(), msix.vectors());
        let fits = |bar: u8, offset: u32, len: u64| {
            self.bars.get(usize::from(bar)).is_some_and(|b| {
                b.is_some_and(|(k, size)| k != BarKind::Io && u64::from(offset) + len <= size && bar < 6)
            })
        };
        if !fits(l.table_bar, l.table_offset, msix.table_len())
            || !fits(l.pba_bar, l.pba_offset, msix.pba_len())
        {
            return Err(PciError::Msix { vectors: n, reason: "table or PBA do not fit in their BARs" });
        }
        let mut body = (n - 1).to_le_bytes().to_vec();
        body.extend_from_slice(&(l.table_offset | u32::from(l.table_bar)).to_le_bytes());
        body.extend_from_slice(&(l.pba_offset | u32::from(l.pba_bar)).to_le_bytes());
        let at = self.add_capability(CAP_ID_MSIX, &body, &[0, 0xc0])?;
        self.msix = Some(at);
        Ok(at)
    }

    /// Add a version 2 PCI Express capability with function-level reset (PCIe 3.0 section 7.8).
    ///
    /// # Errors
    /// When there is no room.
    pub fn add_pcie(&mut self, kind: PcieKind) -> Result<u16, PciError> {
        let mut body = [0u8; 0x3a];
        let mut writable = [0u8; 0x3a];
        let put = |b: &mut [u8], at: usize, v: u32| b[at - 2..at + 2].copy_from_slice(&v.to_le_bytes());
        let port = if kind == PcieKind::Endpoint { 0 } else { 9u32 };
        body[0..2].copy_from_slice(&(2 | (port as u16) << 4).to_le_bytes());
        // Device capabilities: role-based error reporting, function-level reset, payload 128 bytes.
        put(&mut body, 4, 1 << 15 | 1 << 28);
        // Device control: relaxed ordering, no snoop, read requests of 512 bytes; all but the reset bit writable.
        put(&mut body, 8, 1 << 4 | 1 << 11 | 2 << 12);
        put(&mut writable, 8, 0x7fff);
        if kind == PcieKind::Endpoint {
            // Link: 2.5 GT/s, one lane, both supported and negotiated; ASPM and common clock are writable.
            put(&mut body, 0xc, 1 | 1 << 4);
            put(&mut body, 0x10, (1 | 1 << 4) << 16);
            put(&mut writable, 0x10, 0x01c3);
        }
        let at = self.add_capability(CAP_ID_PCIE, &body, &writable)?;
        // Device status: four error bits that writing one clears.
        self.clearable[usize::from(at) + 0xa] = 0x0f;
        self.pcie = Some(at);
        Ok(at)
    }

    /// Use INTx pin 1 (INTA) to 4 (INTD); 0 for none.
    pub fn set_interrupt_pin(&mut self, pin: u8) {
        self.regs[usize::from(reg::INTERRUPT_PIN)] = if pin <= 4 { pin } else { 0 };
    }

    /// Make bits writable: `mask` is OR-ed to the write mask from `offset` on.
    pub fn allow(&mut self, offset: u16, mask: &[u8]) {
        for (w, m) in self.writable.iter_mut().skip(usize::from(offset)).zip(mask) {
            *w |= m;
        }
    }

    /// Make bits clear on writing one: `mask` is OR-ed to that mask from `offset` on.
    pub fn allow_clear(&mut self, offset: u16, mask: &[u8]) {
        for (w, m) in self.clearable.iter_mut().skip(usize::from(offset)).zip(mask) {
            *w |= m;
        }
    }

    /// A byte, whoever may write it. Beyond the end: 0.
    pub fn u8(&self, offset: u16) -> u8 {
        self.regs.get(usize::from(offset)).copied().unwrap_or(0)
    }

    /// 16 bits, little endian.
    pub fn u16(&self, offset: u16) -> u16 {
        u16::from_le_bytes([self.u8(offset), self.u8(offset.saturating_add(1))])
    }

    /// 32 bits, little endian.
    pub fn u32(&self, offset: u16) -> u32 {
        u32::from(self.u16(offset)) | u32::from(self.u16(offset.saturating_add(2))) << 16
    }

    /// Set a byte from the device's side, regardless of masks. Beyond the end: nothing.
    pub fn set_u8(&mut self, offset: u16, value: u8) {
        if let Some(b) = self.regs.get_mut(usize::from(offset)) {
            *b = value;
        }
    }

    /// Set 16 bits from the device's side.
    pub fn set_u16(&mut self, offset: u16, value: u16) {
        for (i, b) in value.to_le_bytes().into_iter().enumerate() {
            self.set_u8(offset.saturating_add(i as u16), b);
        }
    }

    /// Set 32 bits from the device's side.
    pub fn set_u32(&mut self, offset: u16, value: u32) {
        for (i, b) in value.to_le_bytes().into_iter().enumerate() {
            self.set_u8(offset.saturating_add(i as u16), b);
        }
    }

    /// The guest reads.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (i, b) in data.iter_mut().enumerate() {
            *b = self.regs.get(usize::from(offset) + i).copied().unwrap_or(0xff);
        }
    }

    /// The guest writes: masks apply bit by bit.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (at, &v) in (usize::from(offset)..CONFIG_SIZE).zip(data) {
            let w = self.writable[at];
            self.regs[at] = ((self.regs[at] & !w) | (v & w)) & !(v & self.clearable[at]);
        }
    }

    /// What the BARs are.
    pub fn bars(&self) -> [Option<(BarKind, u64)>; 7] {
        self.bars
    }

    /// Where the BARs decode now: enabled by the command register, with an address that is not 0 and not the
    /// all-ones pattern of sizing.
    pub fn windows(&self) -> [Option<BarWindow>; 7] {
        let mut out = [None; 7];
        let cmd = self.u16(reg::COMMAND);
        for (i, bar) in self.bars.iter().enumerate() {
            let Some((kind, len)) = *bar else { continue };
            let at = if i == 6 { reg::ROM } else { reg::BAR0 + i as u16 * 4 };
            let low = self.u32(at);
            let (space, base, limit) = match kind {
                BarKind::Io => (BarSpace::Io, u64::from(low & !3), 0xffff),
                BarKind::Mem32 { .. } if i == 6 => {
                    (BarSpace::Memory, u64::from(low & 0xffff_f800), 0xffff_ffff)
                }
                BarKind::Mem32 { .. } => (BarSpace::Memory, u64::from(low & !15), 0xffff_ffff),
                BarKind::Mem64 { .. } => {
                    (BarSpace::Memory, u64::from(low & !15) | u64::from(self.u32(at + 4)) << 32, u64::MAX)
                }
            };
            let enable = if space == BarSpace::Io { command::IO } else { command::MEMORY };
            let rom_off = i == 6 && low & 1 == 0;
            // The last page below the limit is what a BAR shows while it is being sized: never a real address.
            let fits = base.checked_add(len - 1).is_some_and(|last| last < limit);
            if cmd & enable != 0 && !rom_off && base != 0 && fits {
                out[i] = Some(BarWindow { space, base, len });
            }
        }
        out
    }

    pub(super) fn registers(&self) -> &[u8] {
        &self.regs
    }

    /// Take over saved registers. `false`, with nothing changed, when a bit differs that neither guest nor device
    /// can change: the state is another device's.
    pub(super) fn restore(&mut self, saved: &[u8], device_bits: &[(u16, u8)]) -> bool {
        if saved.len() != CONFIG_SIZE {
            return false;
        }
        for (at, (&new, &old)) in saved.iter().zip(&self.regs).enumerate() {
            let own: u8 = device_bits.iter().filter(|d| usize::from(d.0) == at).fold(0, |m, d| m | d.1);
            if (new ^ old) & !(self.writable[at] | self.clearable[at] | own) != 0 {
                return false;
            }
        }
        self.regs.copy_from_slice(saved);
        true
    }

    pub(super) fn reset_to(&mut self, image: &[u8]) {
        self.regs.copy_from_slice(image);
    }
}
