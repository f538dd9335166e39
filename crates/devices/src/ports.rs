//! Wide accesses to registers that are one byte each: they are cut into bytes, as ISA does.

/// Read each byte from its own port.
pub(crate) fn read(port: u16, data: &mut [u8], mut f: impl FnMut(u16) -> u8) {
    for (i, b) in data.iter_mut().enumerate() {
        *b = f(port.wrapping_add(i as u16));
    }
}

/// Write each byte to its own port.
pub(crate) fn write(port: u16, data: &[u8], mut f: impl FnMut(u16, u8)) {
    for (i, &b) in data.iter().enumerate() {
        f(port.wrapping_add(i as u16), b);
    }
}
