//! Sizes as people write them.

use crate::Failure;

/// Bytes of a text like `10G` or `1.5M`.
pub fn parse(text: &str) -> Result<u64, Failure> {
    let bad = || {
        Failure::new(
            "Invalid image size specified. You may use k, M, G, T, P or E suffixes for kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes.",
        )
    };
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let shift = match suffix {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        "e" | "E" => 60,
        _ => return Err(bad()),
    };
    if let Ok(n) = number.parse::<u64>() {
        return n.checked_mul(1 << shift).filter(|n| *n <= i64::MAX as u64).ok_or_else(bad);
    }
    let n: f64 = number.parse().map_err(|_| bad())?;
    let bytes = n * (1u64 << shift) as f64;
    if bytes.is_finite() && bytes >= 0.0 && bytes < i64::MAX as f64 { Ok(bytes as u64) } else { Err(bad()) }
}

/// As people read it: three digits and a unit of 1024s.
pub fn human(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut n = bytes as f64;
    let mut unit = 0;
    while n >= 1000.0 && unit + 1 < units.len() {
        n /= 1024.0;
        unit += 1;
    }
    // Three significant digits, as printf's %0.3g.
    let digits = if n >= 100.0 || n == 0.0 {
        0
    } else if n >= 10.0 {
        1
    } else if n >= 1.0 {
        2
    } else {
        3
    };
    let text = format!("{n:.digits$}");
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{text} {}", units[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_written_as_by_qemu_img() {
        for (text, bytes) in [("8G", 8 << 30), ("1k", 1024), ("1.5M", 3 << 19), ("0", 0), ("512b", 512)] {
            assert_eq!(parse(text).expect("a size"), bytes, "{text}");
        }
        for text in ["", "1z", "-1", "16E", "nanM", "1.2.3k"] {
            assert!(parse(text).is_err(), "{text}");
        }
        for (bytes, text) in [
            (8u64 << 30, "8 GiB"),
            (200_704, "196 KiB"),
            (393_728, "384 KiB"),
            (0, "0 B"),
            (512, "512 B"),
            (1_048_575, "1 MiB"),
        ] {
            assert_eq!(human(bytes), text);
        }
    }
}
