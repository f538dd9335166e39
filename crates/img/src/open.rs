//! Opening images as options say.

use crate::Failure;
use crate::args::Parsed;
use ringfort_block::format::{Qcow2, detect};
use ringfort_block::storage::{FileStorage, StorageOptions};
use ringfort_block::{BlockBackend, Format, ImageOptions, open_storage_image};
use std::path::Path;
use std::sync::Arc;

/// A format by its name.
pub fn format(name: Option<&str>) -> Result<Option<Format>, Failure> {
    name.map(|n| {
        n.parse().map_err(|_| Failure::new(format!("Unknown file format '{n}'; there are raw and qcow2")))
    })
    .transpose()
}

/// The file, locked unless `-U` is given.
pub fn storage(path: &str, read_only: bool, p: &Parsed) -> Result<FileStorage, Failure> {
    let options = StorageOptions { read_only, direct: false, lock: !p.has("U") };
    Ok(FileStorage::open_any_size(Path::new(path), options)?)
}

/// How to open it.
pub fn options(format: Format, read_only: bool, p: &Parsed) -> ImageOptions {
    ImageOptions { format: Some(format), read_only, lock: !p.has("U"), ..ImageOptions::default() }
}

/// The disk in `path`, and its format.
pub fn image(
    path: &str,
    name: Option<&str>,
    read_only: bool,
    p: &Parsed,
) -> Result<(Arc<dyn BlockBackend>, Format), Failure> {
    let file = storage(path, read_only, p)?;
    let format = match format(name)? {
        Some(f) => f,
        None => detect(&file)?,
    };
    Ok((open_storage_image(file, &options(format, read_only, p))?, format))
}

/// The qcow2 image in `path`; `None` if it has another format.
pub fn qcow2(
    path: &str,
    name: Option<&str>,
    options: impl FnOnce(ImageOptions) -> ImageOptions,
    read_only: bool,
    p: &Parsed,
) -> Result<Option<Qcow2>, Failure> {
    let file = storage(path, read_only, p)?;
    let format = match format(name)? {
        Some(f) => f,
        None => detect(&file)?,
    };
    match format {
        Format::Raw => Ok(None),
        Format::Qcow2 => Ok(Some(Qcow2::open(file, &options(self::options(format, read_only, p)))?)),
    }
}
