//! Page-table entry bits (Intel SDM 3A chapter 4).

/// Present.
pub const P: u64 = 1 << 0;
/// Writable.
pub const W: u64 = 1 << 1;
/// User.
pub const U: u64 = 1 << 2;
/// Write-through.
pub const PWT: u64 = 1 << 3;
/// Cache disable.
pub const PCD: u64 = 1 << 4;
/// Accessed.
pub const A: u64 = 1 << 5;
/// Dirty.
pub const D: u64 = 1 << 6;
/// Page size (a large page, in a directory entry).
pub const PS: u64 = 1 << 7;
/// Global.
pub const G: u64 = 1 << 8;
/// PAT, in a directory entry of a large page.
pub const PAT_LARGE: u64 = 1 << 12;
/// No execute.
pub const NX: u64 = 1 << 63;
/// The address bits of a 4 KiB entry, for 52 physical address bits.
pub const ADDR: u64 = 0x000f_ffff_ffff_f000;
