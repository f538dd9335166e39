//! Little-endian fields in byte slices. Reads outside give zero and writes outside are lost, so headers of hostile
//! files need one length check, not one per field.

pub(crate) fn u8_at(b: &[u8], at: usize) -> u8 {
    b.get(at).copied().unwrap_or(0)
}

pub(crate) fn u16_at(b: &[u8], at: usize) -> u16 {
    b.get(at..at + 2).map_or(0, |s| u16::from_le_bytes([s[0], s[1]]))
}

pub(crate) fn u32_at(b: &[u8], at: usize) -> u32 {
    b.get(at..at + 4).map_or(0, |s| u32::from_le_bytes([s[0], s[1], s[2], s[3]]))
}

pub(crate) fn u64_at(b: &[u8], at: usize) -> u64 {
    u64::from(u32_at(b, at)) | u64::from(u32_at(b, at + 4)) << 32
}

pub(crate) fn put(b: &mut [u8], at: usize, value: &[u8]) {
    if let Some(to) = b.get_mut(at..at + value.len()) {
        to.copy_from_slice(value);
    }
}
