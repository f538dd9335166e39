//! Reads who owns what from a tar archive (POSIX.1-1988 ustar and GNU headers; POSIX.1-2001 pax for long names).
//! The files themselves are unpacked by tar(1); an ordinary user cannot give them their owners, so the image is told later.

use std::{
    collections::BTreeMap,
    io::{self, Read, Seek, SeekFrom},
};

/// Largest extended header that is read, in bytes.
const MAX_EXTENDED: u64 = 1 << 20;

/// Path (without leading `./` or trailing `/`) to user and group number, for every entry that is not root's.
pub(crate) fn owners<R: Read + Seek>(mut archive: R) -> io::Result<BTreeMap<Vec<u8>, (u32, u32)>> {
    let mut owners = BTreeMap::new();
    let mut long_name: Option<Vec<u8>> = None;
    let mut block = [0u8; 512];
    loop {
        match archive.read_exact(&mut block) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Err(broken("it ends early")),
            Err(e) => return Err(e),
        }
        if block.iter().all(|b| *b == 0) {
            return Ok(owners);
        }
        check(&block)?;
        let size = number(&block[124..136])?;
        let padded = size.checked_next_multiple_of(512).ok_or_else(|| broken("a size is absurd"))?;
        match block[156] {
            kind @ (b'L' | b'x') => {
                if size > MAX_EXTENDED {
                    return Err(broken("an extended header is too large"));
                }
                let mut data = vec![0; padded as usize];
                archive.read_exact(&mut data)?;
                data.truncate(size as usize);
                if kind == b'L' {
                    data.retain(|b| *b != 0);
                    long_name = Some(data);
                } else if let Some(path) = pax_path(&data)? {
                    long_name = Some(path);
                }
                continue;
            }
            b'K' | b'g' => {}
            _ => {
                let (uid, gid) = (id(&block[108..116])?, id(&block[116..124])?);
                let name = long_name.take().unwrap_or_else(|| short_name(&block));
                if (uid, gid) != (0, 0) {
                    owners.insert(clean(&name), (uid, gid));
                }
            }
        }
        let skip = i64::try_from(padded).map_err(|_| broken("a size is absurd"))?;
        archive.seek(SeekFrom::Current(skip))?;
    }
}

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("not a sound tar archive: {what}"))
}

/// The header's checksum: the sum of its bytes with the field itself taken as blanks.
fn check(block: &[u8; 512]) -> io::Result<()> {
    let sum: u64 = block
        .iter()
        .enumerate()
        .map(|(i, b)| u64::from(if (148..156).contains(&i) { b' ' } else { *b }))
        .sum();
    if number(&block[148..156])? == sum { Ok(()) } else { Err(broken("a checksum is wrong")) }
}

/// An octal field, or a GNU base-256 one.
fn number(field: &[u8]) -> io::Result<u64> {
    if field[0] & 0x80 != 0 {
        let (head, tail) = field.split_at(field.len() - 8);
        if head.iter().skip(1).any(|b| *b != 0) || head.first().is_some_and(|b| *b != 0x80) {
            return Err(broken("a number is out of range"));
        }
        return Ok(tail.iter().fold(0, |n, b| n << 8 | u64::from(*b)));
    }
    let text = field.split(|b| *b == 0).next().unwrap_or_default();
    let text = text.trim_ascii();
    text.iter().try_fold(0u64, |n, b| match b {
        b'0'..=b'7' => Ok(n << 3 | u64::from(b - b'0')),
        _ => Err(broken("a number is not octal")),
    })
}

/// A user or group number. Its field is 8 bytes, so a base-256 one has its mark in the number's own top byte.
fn id(field: &[u8]) -> io::Result<u32> {
    let value = if field[0] & 0x80 != 0 {
        field.iter().fold(0, |n, b| n << 8 | u64::from(*b)) & !(0x80 << 56)
    } else {
        number(field)?
    };
    u32::try_from(value).map_err(|_| broken("an owner is out of range"))
}

fn short_name(block: &[u8; 512]) -> Vec<u8> {
    let text = |range: std::ops::Range<usize>| -> &[u8] {
        block[range].split(|b| *b == 0).next().unwrap_or_default()
    };
    let (name, prefix) = (text(0..100), text(345..500));
    // GNU archives use the prefix field for other things; POSIX ones say "ustar\0".
    if &block[257..263] == b"ustar\0" && !prefix.is_empty() {
        [prefix, b"/", name].concat()
    } else {
        name.to_vec()
    }
}

/// `path` of a pax header: records of `length key=value\n`, the length counting all of the record.
fn pax_path(mut data: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let mut found = None;
    while !data.is_empty() {
        let blank =
            data.iter().position(|b| *b == b' ').ok_or_else(|| broken("a pax record has no length"))?;
        let length: usize = std::str::from_utf8(&data[..blank])
            .ok()
            .and_then(|t| t.parse().ok())
            .filter(|n| *n > blank + 1 && *n <= data.len())
            .ok_or_else(|| broken("a pax record's length is wrong"))?;
        let record = data[blank + 1..length].strip_suffix(b"\n").unwrap_or(&data[blank + 1..length]);
        if let Some(path) = record.strip_prefix(b"path=") {
            found = Some(path.to_vec());
        }
        data = &data[length..];
    }
    Ok(found)
}

fn clean(name: &[u8]) -> Vec<u8> {
    let name = name.strip_prefix(b"./").unwrap_or(name);
    name.strip_suffix(b"/").unwrap_or(name).to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{io::Cursor, process::Command};

    use crate::cache::tests::TempDir;

    fn made_by_tar(format: &str) -> Vec<u8> {
        let tmp = TempDir::new();
        let deep = tmp.0.join("d".repeat(70)).join("e".repeat(70));
        std::fs::create_dir_all(&deep).expect("folders");
        std::fs::write(deep.join("f".repeat(60)), vec![7; 1300]).expect("file");
        std::fs::write(tmp.0.join("plain"), "x").expect("file");
        let out = Command::new("tar")
            .args(["--format", format, "--owner=42", "--group=2000000", "-C"])
            .arg(&tmp.0)
            .args(["-cf", "-", "."])
            .output()
            .expect("tar");
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        out.stdout
    }

    #[test]
    fn owners_are_read_from_every_common_format() {
        let deep = format!("{}/{}/{}", "d".repeat(70), "e".repeat(70), "f".repeat(60));
        for format in ["ustar", "gnu", "pax"] {
            let owners = owners(Cursor::new(made_by_tar(format))).expect(format);
            assert_eq!(owners.get(b"plain".as_slice()), Some(&(42, 2_000_000)), "{format}");
            assert_eq!(owners.get(deep.as_bytes()), Some(&(42, 2_000_000)), "{format}");
            assert_eq!(owners.len(), 5, "{format}");
        }
    }

    #[test]
    fn damage_is_noticed() {
        let good = made_by_tar("pax");
        assert!(owners(Cursor::new(&good[..700])).is_err(), "truncated");
        let mut bad = good.clone();
        bad[0] ^= 1;
        assert!(owners(Cursor::new(bad)).is_err(), "checksum");
        assert!(owners(Cursor::new(b"")).is_err(), "empty");
        assert!(pax_path(b"999 path=x\n").is_err());
        assert!(pax_path(b"nolength").is_err());
        assert_eq!(pax_path(b"10 path=x\n").expect("sound"), Some(b"x".to_vec()));
    }

    #[test]
    fn numbers_of_both_kinds() {
        assert_eq!(id(b"0000052\0").expect("octal"), 42);
        assert_eq!(id(&[0x80, 0, 0, 0, 0x00, 0x1e, 0x84, 0x80]).expect("base 256"), 2_000_000);
        assert!(id(&[0x80, 0, 0, 1, 0, 0, 0, 0]).is_err());
        assert!(number(b"12x45678").is_err());
    }
}
