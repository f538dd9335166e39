//! Options of the command line.

use ringfort_vmm::config::{Accel, Disk, Net, Serial, format_size, parse_size};
use ringfort_x86::cpuid::CpuSpec;

/// Any text is an option or an error on one line.
pub fn options(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    check(text.parse::<Disk>());
    check(text.parse::<Serial>());
    check(text.parse::<Accel>());
    check(text.parse::<Net>());
    check(text.parse::<CpuSpec>());
    for unit in [1, 1 << 20] {
        if let Ok(size) = parse_size(text, unit) {
            assert_eq!(parse_size(&format_size(size), 1), Ok(size), "{text:?} does not come back");
        }
    }
}

fn check<T, E: std::fmt::Display>(parsed: Result<T, E>) {
    if let Err(e) = parsed {
        assert!(!e.to_string().is_empty());
    }
}
