//! Image formats: what the bytes of a file mean.

mod raw;

pub use raw::Raw;

use crate::storage::{FileStorage, StorageOptions};
use crate::{BlockBackend, BlockError, SharedSliceMut};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::Arc;

/// The formats known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The file is the disk.
    Raw,
}

impl std::str::FromStr for Format {
    type Err = String;
    fn from_str(s: &str) -> Result<Format, String> {
        match s {
            "raw" => Ok(Format::Raw),
            other => Err(format!("disk format {other:?} is not supported; supported: raw")),
        }
    }
}

/// How to open an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageOptions {
    /// The format; found out by the first bytes if not given.
    pub format: Option<Format>,
    /// Never write.
    pub read_only: bool,
    /// Bypass the host's page cache.
    pub direct: bool,
    /// Refuse images that other processes use, and make them refuse this one.
    pub lock: bool,
}

impl Default for ImageOptions {
    fn default() -> Self {
        ImageOptions { format: None, read_only: false, direct: false, lock: true }
    }
}

/// First bytes by which other formats are known.
const MAGICS: [(&[u8], &str); 7] = [
    (b"QFI\xfb", "qcow2"),
    (b"QED\0", "qed"),
    (b"KDMV", "vmdk"),
    (b"# Disk DescriptorFile", "vmdk"),
    (b"conectix", "vpc"),
    (b"vhdxfile", "vhdx"),
    (b"LUKS\xba\xbe", "luks"),
];

/// Open the disk image at `path`.
///
/// # Errors
/// [`BlockError`] names the file and the way out.
pub fn open_image(path: &Path, options: &ImageOptions) -> Result<Arc<dyn BlockBackend>, BlockError> {
    let storage = FileStorage::open(
        path,
        StorageOptions { read_only: options.read_only, direct: options.direct, lock: options.lock },
    )?;
    if options.format.is_none()
        && let Some(found) = probe(&storage).map_err(|e| BlockError::host(path, "cannot read", e))?
    {
        return Err(BlockError::Format { path: path.into(), found });
    }
    Ok(Arc::new(Raw::new(storage)))
}

/// The format other than raw that the image begins with.
fn probe(storage: &FileStorage) -> std::io::Result<Option<&'static str>> {
    let mut head = [0; 512];
    let n = storage.len().min(512) as usize;
    storage.read(&[SharedSliceMut::new(&mut head[..n])], 0)?;
    let by_magic = MAGICS.iter().find(|(magic, _)| head.starts_with(magic)).map(|m| m.1);
    // VDI's mark stands behind a line of text.
    Ok(by_magic.or_else(|| (head[0x40..0x44] == [0x7f, 0x10, 0xda, 0xbe]).then_some("vdi")))
}
