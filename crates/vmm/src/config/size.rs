//! Sizes with suffixes, as qemu-img takes them.

/// Bytes from `"512M"`, `"1.5G"`, `"4096"` (plain numbers count in `unit`).
///
/// # Errors
/// One line that says what is accepted.
pub fn parse_size(text: &str, unit: u64) -> Result<u64, String> {
    let bad = || format!("'{text}' is no size; write for instance 512M, 1.5G or 2T");
    let t = text.trim();
    let digits = t.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let scale = match t[digits.len()..].to_ascii_lowercase().as_str() {
        "" => unit,
        "b" => 1,
        "k" | "kb" | "kib" => 1 << 10,
        "m" | "mb" | "mib" => 1 << 20,
        "g" | "gb" | "gib" => 1 << 30,
        "t" | "tb" | "tib" => 1 << 40,
        _ => return Err(bad()),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let all_digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || !all_digits(whole) || !all_digits(fraction) || fraction.len() > 9 {
        return Err(bad());
    }
    let too_large = || format!("'{text}' is too large");
    let mut bytes =
        whole.parse::<u64>().map_err(|_| too_large())?.checked_mul(scale).ok_or_else(too_large)?;
    if !fraction.is_empty() {
        let numerator: u64 = fraction.parse().map_err(|_| bad())?;
        let part = u128::from(numerator) * u128::from(scale) / 10u128.pow(fraction.len() as u32);
        bytes = bytes.checked_add(part as u64).ok_or_else(too_large)?;
    }
    Ok(bytes)
}

/// A size for people: whole in the largest unit that gives a whole number, unless ten or more of a larger unit are
/// shorter with one decimal, rounded.
pub fn format_size(bytes: u64) -> String {
    for (shift, suffix) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
        if bytes >= 1 << shift && bytes.is_multiple_of(1 << shift) {
            return format!("{}{suffix}", bytes >> shift);
        }
        if bytes >= 10 << shift {
            return format!("{:.1}{suffix}", bytes as f64 / (1u64 << shift) as f64);
        }
    }
    bytes.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("1G", 1), Ok(1 << 30));
        assert_eq!(parse_size("512", 1 << 20), Ok(512 << 20));
        assert_eq!(parse_size("1.5g", 1), Ok(3 << 29));
        assert_eq!(parse_size("64KiB", 1), Ok(65536));
        for bad in
            ["", "G", "-1", "1e3", "1.2.3G", "0x10", "1Q", "1 G G", "20000000000T", "99999999999999999999"]
        {
            assert!(parse_size(bad, 1).is_err(), "{bad}");
        }
        assert_eq!(format_size(1 << 30), "1G");
        assert_eq!(format_size(0), "0");
        assert_eq!(format_size(1025 << 20), "1025M");
        assert_eq!(format_size((23 << 30) + (1 << 20)), "23.0G");
    }
}
