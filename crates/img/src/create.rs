//! `create`.

use crate::args::{Cache, pairs, parse};
use crate::new::{New, option_help, wants_help};
use crate::{Done, Failure, Streams, open, size};
use ringfort_block::format::{detect, relative_to};
use ringfort_block::storage::{FileStorage, StorageOptions};
use ringfort_block::{Format, ImageOptions, open_image};
use std::path::Path;

pub fn run(arguments: &[String], s: &mut Streams<'_>) -> Done {
    let p = parse(arguments, &["q", "u"], &["f", "b", "F", "o", "object"])?;
    let format = open::new_format(p.value("f"))?;
    if wants_help(p.values("o")) {
        write!(s.out, "{}", option_help(format))?;
        return Ok(0);
    }
    let (path, given) = match p.rest.as_slice() {
        [path] => (path, None),
        [path, bytes] => (path, Some(size::parse(bytes)?)),
        _ => return Err(Failure::new("Expecting image file name and size")),
    };
    let mut new = New::from_options(format, &pairs(p.values("o"))?)
        .map_err(|f| Failure::new(format!("{path}: {}", f.message)))?;
    if let Some(b) = p.value("b") {
        new.qcow2.backing = Some(b.into());
    }
    if let Some(f) = p.value("F") {
        new.qcow2.backing_format = Some(f.into());
    }
    let mut bytes = given.or(new.size);
    if let Some(name) = &new.qcow2.backing {
        if format == Format::Raw {
            return Err(Failure::new(format!("{path}: Backing file not supported for file format 'raw'")));
        }
        let below = relative_to(Path::new(path), name);
        match &new.qcow2.backing_format {
            None => {
                let options = StorageOptions { read_only: true, direct: false, lock: false };
                let found = FileStorage::open(&below, options).ok().and_then(|f| detect(&f).ok());
                let hint =
                    found.map_or(String::new(), |f| format!("; it looks like {0}: add -F {0}", f.name()));
                return Err(Failure::new(format!(
                    "{path}: Backing file specified without backing format{hint}"
                )));
            }
            Some(f) if !p.has("u") => {
                if same_file(Path::new(path), &below) {
                    return Err(Failure::new(format!(
                        "{path}: Error: Trying to create an image with the same filename as the backing file"
                    )));
                }
                let options = ImageOptions {
                    format: open::format(Some(f))?,
                    read_only: true,
                    ..ImageOptions::default()
                };
                let disk = open_image(&below, &options)?;
                bytes = bytes.or(Some(disk.size()));
            }
            Some(f) => {
                open::format(Some(f))?;
            }
        }
    }
    let bytes =
        bytes.ok_or_else(|| Failure::new(format!("{path}: Image creation needs a size parameter")))?;
    let bytes = bytes.next_multiple_of(512);
    if !p.has("q") {
        writeln!(s.out, "Formatting '{path}', {}", new.describe(bytes))?;
    }
    let (made, image) = new.lay_out(path, bytes, Cache::WRITEBACK, false)?;
    image.close()?;
    made.publish()?;
    Ok(0)
}

/// Whether two names mean the same file.
pub fn same_file(a: &Path, b: &Path) -> bool {
    match (std::fs::canonicalize(a), std::fs::canonicalize(b)) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    }
}
