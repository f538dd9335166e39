//! Opening images as options say.

use crate::Failure;
use crate::args::{Cache, Parsed, pairs};
use ringfort_block::format::{Qcow2, detect};
use ringfort_block::storage::{FileStorage, StorageOptions};
use ringfort_block::{BlockBackend, BlockError, Format, ImageOptions, open_storage_image};
use std::path::Path;
use std::sync::Arc;

/// A format by its name.
pub fn format(name: Option<&str>) -> Result<Option<Format>, Failure> {
    name.map(|n| {
        n.parse().map_err(|_| {
            Failure::new(format!(
                "Unknown file format '{n}'; there are raw and qcow2, and to read from vmdk, vpc, vhdx and vdi"
            ))
        })
    })
    .transpose()
}

/// A format that can be made.
pub fn new_format(name: Option<&str>) -> Result<Format, Failure> {
    let format = format(name)?.unwrap_or(Format::Raw);
    if format.writable() {
        Ok(format)
    } else {
        Err(Failure::new(format!(
            "Format driver '{}' does not support image creation; there are raw and qcow2",
            format.name()
        )))
    }
}

/// How to use an image.
#[derive(Clone, Copy)]
pub struct How<'a> {
    /// Its format, if it is given.
    pub format: Option<&'a str>,
    /// Never write.
    pub read_only: bool,
    /// Caching of the file.
    pub cache: Cache,
}

impl<'a> How<'a> {
    /// To read.
    pub fn reading(format: Option<&'a str>) -> How<'a> {
        How { format, read_only: true, cache: Cache::WRITEBACK }
    }

    /// To change.
    pub fn writing(format: Option<&'a str>) -> How<'a> {
        How { read_only: false, ..How::reading(format) }
    }
}

/// What `--image-opts` gives instead of a file name: `driver=qcow2,file.filename=NAME` and the like.
fn image_opts(text: &str) -> Result<(String, Option<String>), Failure> {
    let (mut file, mut driver) = (None, None);
    for (k, v) in pairs(std::iter::once(text))? {
        match k.as_str() {
            "driver" => driver = Some(v),
            "filename" | "file.filename" => file = Some(v),
            "file.driver" if v == "file" => {}
            _ => {
                return Err(Failure::new(format!(
                    "--image-opts: {k}={v} is not supported; there are driver, file.driver=file and file.filename"
                )));
            }
        }
    }
    let file = file.ok_or_else(|| Failure::new("--image-opts: a file.filename is missing"))?;
    // A file without a format driver above it is its own bytes.
    let driver = driver.map(|d| if d == "file" { "raw".to_owned() } else { d });
    Ok((file, driver))
}

/// The file name and format that an argument means.
pub fn name(
    text: &str,
    format: Option<&str>,
    p: &Parsed,
    option: &str,
) -> Result<(String, Option<String>), Failure> {
    if !p.has(option) {
        return Ok((text.into(), format.map(String::from)));
    }
    if format.is_some() {
        return Err(Failure::new(format!("--{option} and a format are mutually exclusive")));
    }
    image_opts(text)
}

/// The file, locked unless `-U` is given.
pub fn storage(path: &str, read_only: bool, p: &Parsed) -> Result<FileStorage, Failure> {
    storage_as(path, &How { read_only, ..How::reading(None) }, p)
}

/// As [`storage`] with a cache mode.
pub fn storage_as(path: &str, how: &How<'_>, p: &Parsed) -> Result<FileStorage, Failure> {
    if p.has("U") && !how.read_only {
        return Err(Failure::new("-U only goes with reading: leave it out"));
    }
    let options = StorageOptions { read_only: how.read_only, direct: how.cache.direct, lock: !p.has("U") };
    let file = FileStorage::open_any_size(Path::new(path), options)?;
    Ok(if how.cache.syncs { file } else { file.without_syncs() })
}

/// How to open it.
pub fn options(format: Format, read_only: bool, p: &Parsed) -> ImageOptions {
    ImageOptions { format: Some(format), read_only, lock: !p.has("U"), ..ImageOptions::default() }
}

/// The disk in `path`, and its format.
pub fn image(path: &str, how: &How<'_>, p: &Parsed) -> Result<(Arc<dyn BlockBackend>, Format), Failure> {
    let file = storage_as(path, how, p)?;
    let format = match format(how.format)? {
        Some(f) => f,
        None => detect(&file)?,
    };
    Ok((open_storage_image(file, &options(format, how.read_only, p))?, format))
}

/// The qcow2 image in `path`; `None` if it has another format.
pub fn qcow2(
    path: &str,
    how: &How<'_>,
    options: impl FnOnce(ImageOptions) -> ImageOptions,
    p: &Parsed,
) -> Result<Option<Qcow2>, Failure> {
    let file = storage_as(path, how, p)?;
    let format = match format(how.format)? {
        Some(f) => f,
        None => detect(&file)?,
    };
    match format {
        Format::Qcow2 => {
            let options = options(self::options(format, how.read_only, p));
            Qcow2::open(file, &options).map(Some).map_err(|e| match e {
                // Whoever is about to mend it is not sent to what mends it.
                BlockError::Damaged { path, what } if options.repairing => {
                    let path = path.display();
                    Failure::new(format!(
                        "disk image {path}: damaged: {what}; this cannot be mended: restore a backup"
                    ))
                }
                other => other.into(),
            })
        }
        _ => Ok(None),
    }
}

/// The snapshot that `-l` names: a name, an ID, or `snapshot.id=…,snapshot.name=…`.
pub fn snapshot_key(text: &str) -> Result<String, Failure> {
    if !text.starts_with("snapshot.") {
        return Ok(text.into());
    }
    let all = pairs(std::iter::once(text))?;
    let find = |key: &str| all.iter().find(|(k, _)| k == key).map(|(_, v)| v.clone());
    find("snapshot.name")
        .or_else(|| find("snapshot.id"))
        .ok_or_else(|| Failure::new("-l: snapshot.id or snapshot.name is missing"))
}

/// The disk in `path` as it was at a snapshot.
pub fn snapshot(path: &str, how: &How<'_>, key: &str, p: &Parsed) -> Result<Arc<dyn BlockBackend>, Failure> {
    let q = qcow2(path, how, |o| o, p)?
        .ok_or_else(|| Failure::new(format!("{path}: its format has no internal snapshots")))?;
    let q = q
        .into_snapshot(&snapshot_key(key)?)
        .map_err(|e| Failure::new(format!("Failed to load snapshot: {e}")))?;
    Ok(Arc::new(q))
}
