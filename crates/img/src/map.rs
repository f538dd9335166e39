//! `map`: where each piece of a disk lies.

use crate::args::parse;
use crate::{Done, Streams, open, size};
use ringfort_block::format::qcow2::header::Header;
use ringfort_block::format::{data_file_of, relative_to};
use ringfort_block::{Format, Status};
use std::path::PathBuf;

pub fn run(arguments: &[String], s: &mut Streams<'_>) -> Done {
    let p = parse(
        arguments,
        &["U", "image-opts"],
        &["f", "output", "start-offset", "max-length", "s", "l", "object"],
    )?;
    let json = p.json()?;
    let (path, format) = open::name(p.one_file()?, p.value("f"), &p, "image-opts")?;
    let (disk, format) = open::image(&path, &open::How::reading(format.as_deref()), &p)?;
    let start =
        p.value("start-offset").or(p.value("s")).map(size::parse).transpose()?.unwrap_or(0).min(disk.size());
    let most = p.value("max-length").or(p.value("l")).map(size::parse).transpose()?.unwrap_or(u64::MAX);
    let end = start.saturating_add(most).min(disk.size());
    let files = if json { Vec::new() } else { chain(&path, format, &p)? };
    if !json {
        writeln!(s.out, "{:<16}{:<16}{:<16}File", "Offset", "Length", "Mapped to")?;
    }
    let mut at = start;
    let mut first = true;
    let mut pending: Option<(u64, Status)> = None;
    loop {
        let next = if at < end { Some(disk.status(at, end - at)?) } else { None };
        if let (Some((_, have)), Some(n)) = (&mut pending, &next) {
            let follows = match (have.offset, n.offset) {
                (Some(a), Some(b)) => a + have.len == b,
                (None, None) => true,
                _ => false,
            };
            let same = Status { len: n.len, offset: n.offset, ..*have } == *n;
            if follows && same {
                have.len += n.len;
                at += n.len;
                continue;
            }
        }
        if let Some((from, x)) = pending.take() {
            if json {
                write!(
                    s.out,
                    "{}{{ \"start\": {from}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \"data\": {}, \"compressed\": {}",
                    if first { "[" } else { ",\n" },
                    x.len,
                    x.depth,
                    x.present,
                    x.zero,
                    x.data,
                    x.compressed
                )?;
                if let Some(o) = x.offset {
                    write!(s.out, ", \"offset\": {o}")?;
                }
                write!(s.out, "}}")?;
                first = false;
            } else if let (true, false, Some(o), Some(file)) =
                (x.data, x.zero, x.offset, files.get(x.depth as usize))
            {
                let hex = |n: u64| if n == 0 { "0".to_owned() } else { format!("{n:#x}") };
                writeln!(s.out, "{:<16}{:<16}{:<16}{}", hex(from), hex(x.len), hex(o), file.display())?;
            } else if x.compressed {
                return Err(crate::Failure::new("File contains external, encrypted or compressed clusters."));
            }
        }
        match next {
            Some(n) => {
                pending = Some((at, n));
                at += n.len;
            }
            None => break,
        }
    }
    if json {
        writeln!(s.out, "{}]", if first { "[" } else { "" })?;
    }
    Ok(0)
}

/// The files of the chain that hold data, from the top. Opening the disk has shown that it has no loop.
fn chain(path: &str, format: Format, p: &crate::args::Parsed) -> Result<Vec<PathBuf>, crate::Failure> {
    let mut list = Vec::new();
    let mut next = Some((PathBuf::from(path), format));
    while let Some((path, format)) = next.take() {
        if format != Format::Qcow2 {
            list.push(path);
            break;
        }
        let file = open::storage(&path.to_string_lossy(), true, p)?;
        let h = Header::read(&file)?;
        if let Some(b) = &h.backing {
            let below = relative_to(&path, b);
            let format = match open::format(h.backing_format.as_deref())? {
                Some(f) => f,
                None => ringfort_block::format::detect(&open::storage(&below.to_string_lossy(), true, p)?)?,
            };
            next = Some((below, format));
        }
        list.push(h.data_file.as_deref().map_or(path.clone(), |d| data_file_of(&path, d)));
    }
    Ok(list)
}
