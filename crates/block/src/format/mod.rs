//! Image formats: what the bytes of a file mean.

mod import;
pub mod qcow2;
mod raw;

pub use qcow2::Qcow2;
pub use raw::Raw;

use crate::error::BACKING;
use crate::node::Joint;
use crate::storage::{FileStorage, StorageOptions};
use crate::{BlockBackend, BlockError, SharedSliceMut};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Longest backing chain.
const MAX_CHAIN: usize = 128;

/// The formats known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The file is the disk.
    Raw,
    /// QEMU's format: grows as needed, snapshots, backing files.
    Qcow2,
    /// VMware's: read only.
    Vmdk,
    /// Virtual PC's (VHD): read only.
    Vpc,
    /// Hyper-V's: read only.
    Vhdx,
    /// VirtualBox's: read only.
    Vdi,
}

/// All formats.
const FORMATS: [Format; 6] =
    [Format::Raw, Format::Qcow2, Format::Vmdk, Format::Vpc, Format::Vhdx, Format::Vdi];

impl Format {
    /// The name in options.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
            Format::Vmdk => "vmdk",
            Format::Vpc => "vpc",
            Format::Vhdx => "vhdx",
            Format::Vdi => "vdi",
        }
    }

    /// Whether images of this format can be made and changed.
    pub fn writable(self) -> bool {
        matches!(self, Format::Raw | Format::Qcow2)
    }
}

impl std::str::FromStr for Format {
    type Err = String;
    fn from_str(s: &str) -> Result<Format, String> {
        let found = FORMATS.into_iter().find(|f| f.name() == s || s == "vhd" && *f == Format::Vpc);
        found.ok_or_else(|| {
            let names: Vec<&str> = FORMATS.iter().map(|f| f.name()).collect();
            format!("disk format {s:?} is not supported; supported: {}", names.join(", "))
        })
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
    /// Open the backing file of an image that has one.
    pub backing: bool,
    /// Files that the image names may be opened although its format was found out by its first bytes. True for a
    /// file that the user names, never for one that another image names.
    pub backing_trusted: bool,
    /// Open damaged images as well, to mend them.
    pub repairing: bool,
}

impl Default for ImageOptions {
    fn default() -> Self {
        ImageOptions {
            format: None,
            read_only: false,
            direct: false,
            lock: true,
            backing: true,
            backing_trusted: true,
            repairing: false,
        }
    }
}

/// First bytes by which other formats are known.
const MAGICS: [(&[u8], &str); 8] = [
    (b"QFI\xfb", "qcow2"),
    (b"QED\0", "qed"),
    (b"KDMV", "vmdk"),
    (b"COWD", "vmdk"),
    (b"# Disk DescriptorFile", "vmdk"),
    (b"conectix", "vpc"),
    (b"vhdxfile", "vhdx"),
    (b"LUKS\xba\xbe", "luks"),
];

/// Open the disk image at `path`.
///
/// Without a format it is found out by the first bytes. An image found to be raw then refuses writes that would make
/// it look like another format, so that a guest cannot choose what the next start takes it for.
///
/// # Errors
/// [`BlockError`] names the file and the way out.
pub fn open_image(path: &Path, options: &ImageOptions) -> Result<Arc<dyn BlockBackend>, BlockError> {
    let storage = open_storage(path, options)?;
    let chain = Chain::start(&storage)?;
    open_storage_as(storage, options, &chain)
}

/// Open the disk image that `storage` is.
///
/// # Errors
/// As for [`open_image`].
pub fn open_storage_image(
    storage: FileStorage,
    options: &ImageOptions,
) -> Result<Arc<dyn BlockBackend>, BlockError> {
    let chain = Chain::start(&storage)?;
    open_storage_as(storage, options, &chain)
}

fn open_storage(path: &Path, options: &ImageOptions) -> Result<FileStorage, BlockError> {
    FileStorage::open(
        path,
        StorageOptions { read_only: options.read_only, direct: options.direct, lock: options.lock },
    )
}

fn open_storage_as(
    storage: FileStorage,
    options: &ImageOptions,
    chain: &Chain,
) -> Result<Arc<dyn BlockBackend>, BlockError> {
    match (options.format, options.format.map_or_else(|| detect(&storage), Ok)?) {
        (Some(_), Format::Raw) => Ok(Arc::new(Raw::new(storage))),
        (None, Format::Raw) => Ok(Arc::new(Raw::guarded(storage))),
        (_, Format::Qcow2) => Ok(Arc::new(Qcow2::open_in(storage, options, chain)?)),
        (_, other) => import::open(storage, other, options, chain),
    }
}

/// Find out the format by the first bytes.
///
/// # Errors
/// [`BlockError::Format`] for a format that cannot be opened; the host's.
pub fn detect(storage: &FileStorage) -> Result<Format, BlockError> {
    let path = storage.path();
    match probe(storage).map_err(|e| BlockError::host(path, "cannot read", e))? {
        None => Ok(Format::Raw),
        Some(found) => found.parse().map_err(|_| BlockError::Format { path: path.into(), found }),
    }
}

/// The files of a backing chain from the top down, to find loops.
pub(crate) struct Chain {
    files: Vec<(u64, u64)>,
}

impl Chain {
    pub(crate) fn start(storage: &FileStorage) -> Result<Chain, BlockError> {
        Ok(Chain { files: vec![storage.identity()?] })
    }

    fn with(&self, top: &Path, storage: &FileStorage) -> Result<Chain, BlockError> {
        let identity = storage.identity()?;
        if self.files.contains(&identity) {
            return Err(BlockError::Damaged {
                path: top.into(),
                what: "its backing chain comes back to itself".into(),
            });
        }
        if self.files.len() >= MAX_CHAIN {
            return Err(BlockError::Damaged {
                path: top.into(),
                what: format!("its backing chain is longer than {MAX_CHAIN} files"),
            });
        }
        let mut files = self.files.clone();
        files.push(identity);
        Ok(Chain { files })
    }
}

/// The file that an image in `image` means by `name`: relative names start at the image's folder.
pub fn relative_to(image: &Path, name: &str) -> PathBuf {
    let name = Path::new(name.strip_prefix("file:").unwrap_or(name));
    match image.parent() {
        Some(dir) if name.is_relative() => dir.join(name),
        _ => name.into(),
    }
}

/// The file below an image in `image` that names it so.
///
/// # Errors
/// [`BlockError::Missing`] if there is no such file.
pub fn backing_of(image: &Path, name: &str) -> Result<PathBuf, BlockError> {
    let path = relative_to(image, name);
    match path.try_exists() {
        Ok(false) => Err(BlockError::NotFound(path).named_by(image, BACKING)),
        _ => Ok(path),
    }
}

/// The external data file that an image in `image` means by `name`. QEMU starts relative names at the working folder,
/// which is where they are looked for first; an image that was moved along with its data file finds it beside itself.
pub fn data_file_of(image: &Path, name: &str) -> PathBuf {
    let here = Path::new(name.strip_prefix("file:").unwrap_or(name));
    if here.is_relative() && !here.exists() { relative_to(image, name) } else { here.into() }
}

/// Whether a name in an image means something other than a file: a protocol, or QEMU's JSON notation.
fn is_protocol(name: &str) -> bool {
    let head = name.split('/').next().unwrap_or(name);
    head.split_once(':').is_some_and(|(scheme, _)| scheme != "file" && !scheme.is_empty())
}

/// Open what an image names as its backing file, for reading.
fn open_backing(
    top: &FileStorage,
    name: &str,
    format: Option<&str>,
    options: &ImageOptions,
    chain: &Chain,
) -> Result<Arc<Joint>, BlockError> {
    let path = top.path();
    if options.format.is_none() && !options.backing_trusted {
        return Err(BlockError::Reference { path: path.into(), name: name.into() });
    }
    if is_protocol(name) {
        return Err(BlockError::Feature {
            path: path.into(),
            what: format!("the backing file {name:?}, which is not a plain file name"),
        });
    }
    let format = match format {
        None => None,
        Some(f) => match f.parse::<Format>() {
            Ok(f) => Some(f),
            Err(_) => {
                return Err(BlockError::Feature {
                    path: path.into(),
                    what: format!("a backing file in {f:?} format"),
                });
            }
        },
    };
    let below =
        ImageOptions { format, read_only: true, backing_trusted: false, repairing: false, ..*options };
    let storage = open_storage(&relative_to(path, name), &below).map_err(|e| e.named_by(path, BACKING))?;
    let chain = chain.with(path, &storage)?;
    Ok(Arc::new(Joint::new(open_storage_as(storage, &below, &chain)?)))
}

/// Whether these first bytes make an image look like something other than raw.
fn looks_formatted(head: &[u8]) -> bool {
    MAGICS.iter().any(|(magic, _)| head.starts_with(magic)) || head.get(0x40..0x44) == Some(&VDI_MAGIC)
}

/// VDI's mark, behind a line of text.
const VDI_MAGIC: [u8; 4] = [0x7f, 0x10, 0xda, 0xbe];

/// The format other than raw that the image begins with.
fn probe(storage: &FileStorage) -> std::io::Result<Option<&'static str>> {
    let mut head = [0; 512];
    let n = storage.len().min(512) as usize;
    storage.read(&[SharedSliceMut::new(&mut head[..n])], 0)?;
    let by_magic = MAGICS.iter().find(|(magic, _)| head.starts_with(magic)).map(|m| m.1);
    Ok(by_magic.or_else(|| (head[0x40..0x44] == VDI_MAGIC).then_some("vdi")))
}
