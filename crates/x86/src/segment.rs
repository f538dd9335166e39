//! Segment registers and descriptors (Intel SDM 3A sections 3.4 and 3.5).

use serde::{Deserialize, Serialize};

/// Index of ES in segment arrays (the hardware's own numbering).
pub const ES: usize = 0;
/// Index of CS.
pub const CS: usize = 1;
/// Index of SS.
pub const SS: usize = 2;
/// Index of DS.
pub const DS: usize = 3;
/// Index of FS.
pub const FS: usize = 4;
/// Index of GS.
pub const GS: usize = 5;

/// A segment register with its hidden part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Segment {
    /// The visible selector.
    pub selector: u16,
    /// Access rights, as in bytes 5 and 6 of a descriptor without the limit nibble: bits 0-3 type, 4 S, 5-6 DPL, 7 P,
    /// 12 AVL, 13 L, 14 D/B, 15 G.
    pub attrs: u16,
    /// Byte-granular limit (already scaled by G).
    pub limit: u32,
    /// Base address.
    pub base: u64,
}

/// attrs: accessed (data and code).
pub const ACCESSED: u16 = 1 << 0;
/// attrs: writable (data) or readable (code).
pub const RW: u16 = 1 << 1;
/// attrs: expand-down (data) or conforming (code).
pub const EC: u16 = 1 << 2;
/// attrs: code.
pub const CODE: u16 = 1 << 3;
/// attrs: code or data, not a system segment.
pub const S: u16 = 1 << 4;
/// attrs: present.
pub const PRESENT: u16 = 1 << 7;
/// attrs: 64-bit code.
pub const LONG: u16 = 1 << 13;
/// attrs: default operand size 32 (code), big (stack and expand-down).
pub const DB: u16 = 1 << 14;
/// attrs: limit counts 4 KiB pages.
pub const GRANULAR: u16 = 1 << 15;

impl Segment {
    /// A flat 4 GiB segment with the given selector and access rights.
    pub fn flat(selector: u16, attrs: u16) -> Segment {
        Segment { selector, attrs, limit: 0xffff_ffff, base: 0 }
    }

    /// A real-mode segment: base 16 times the selector, 64 KiB.
    pub fn real(selector: u16) -> Segment {
        Segment {
            selector,
            attrs: PRESENT | S | RW | ACCESSED,
            limit: 0xffff,
            base: u64::from(selector) << 4,
        }
    }

    /// The 8 bytes of a descriptor, decoded. For 64-bit system segments the upper half of the base is added by
    /// the caller.
    pub fn from_descriptor(selector: u16, raw: u64) -> Segment {
        let attrs = (raw >> 40 & 0xf0ff) as u16;
        let mut limit = (raw & 0xffff | raw >> 32 & 0xf_0000) as u32;
        if attrs & GRANULAR != 0 {
            limit = limit << 12 | 0xfff;
        }
        Segment { selector, attrs, limit, base: raw >> 16 & 0xff_ffff | raw >> 32 & 0xff00_0000 }
    }

    /// Descriptor privilege level.
    pub fn dpl(&self) -> u8 {
        (self.attrs >> 5 & 3) as u8
    }
    /// Requested privilege level of the selector.
    pub fn rpl(&self) -> u8 {
        (self.selector & 3) as u8
    }
    /// The type field: 4 bits.
    pub fn kind(&self) -> u8 {
        (self.attrs & 15) as u8
    }
    /// Whether it is present.
    pub fn present(&self) -> bool {
        self.attrs & PRESENT != 0
    }
    /// Whether it is a code segment.
    pub fn is_code(&self) -> bool {
        self.attrs & (S | CODE) == S | CODE
    }
    /// The D/B bit.
    pub fn db(&self) -> bool {
        self.attrs & DB != 0
    }
    /// The L bit.
    pub fn long(&self) -> bool {
        self.attrs & LONG != 0
    }
}

/// A descriptor-table register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TableRegister {
    /// Linear address.
    pub base: u64,
    /// Last valid byte offset.
    pub limit: u16,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptor_fields() {
        // Flat 64-bit code, as Linux has it.
        let s = Segment::from_descriptor(0x10, 0x00af_9b00_0000_ffff);
        assert_eq!((s.base, s.limit, s.dpl()), (0, 0xffff_ffff, 0));
        assert!(s.is_code() && s.long() && !s.db() && s.present());
        let s = Segment::from_descriptor(8, 0x1240_9234_5678_9abc);
        assert_eq!((s.base, s.limit, s.kind()), (0x1234_5678, 0x9abc, 2));
    }
}
