//! Options of the command line.

use ringfort_vmm::config::{Accel, Disk, NetOption, Serial, format_size, parse_size};
use ringfort_x86::cpuid::CpuSpec;

/// Any text is an option or an error on one line.
pub fn options(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    check(text.parse::<Disk>());
    check(text.parse::<Serial>());
    check(text.parse::<Accel>());
    check(text.parse::<NetOption>());
    check(text.parse::<CpuSpec>());
    for unit in [1, 1 << 20] {
        // What is shown to people may be rounded, by less than a hundredth; near 2^64 it may round up to what is too large.
        if let Ok(size @ 0..=0x0fff_ffff_ffff_ffff) = parse_size(text, unit) {
            let shown = format_size(size);
            let again = parse_size(&shown, 1).expect("what is shown is a size");
            assert!(again.abs_diff(size) <= size / 100, "{text:?} is shown as {shown:?}");
        }
    }
}

fn check<T, E: std::fmt::Display>(parsed: Result<T, E>) {
    if let Err(e) = parsed {
        assert!(!e.to_string().is_empty());
    }
}
