//! Disks beside a saved state: their files are not part of it, but must be as they were.

use crate::config::Disk;
use ringfort_block::{BlockBackend, Format, Overlay, SharedSlice};
use ringfort_state::{Chunk, PagesReader, PagesWriter, StateError};
use serde::{Deserialize, Serialize};
use std::io::Read;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;
use std::sync::Arc;

/// A machine's disk, as far as saving it goes.
pub struct OpenDisk {
    /// What the device reads and writes.
    pub backend: Arc<dyn BlockBackend>,
    /// Its throw-away layer, if it has one.
    pub overlay: Option<Arc<Overlay>>,
    /// What its file was taken for.
    pub format: Format,
}

/// How a disk stood when a machine was saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskState {
    /// Size that the guest sees, in bytes.
    pub size: u64,
    /// The file's length and when it was last changed (seconds and nanoseconds since 1970); of a block device nothing is known.
    pub file: Option<(u64, i64, i64)>,
    /// What the guest wrote is in the state file.
    pub overlay: bool,
}

impl DiskState {
    /// Of the disk at `path`, flushed.
    ///
    /// # Errors
    /// When its file is not there, in words.
    pub fn of(path: &Path, disk: &OpenDisk) -> Result<DiskState, String> {
        let file = stamp(path)?;
        Ok(DiskState { size: disk.backend.size(), file, overlay: disk.overlay.is_some() })
    }

    /// Check that the file of `disk` is as it was. To be called before it is opened.
    ///
    /// # Errors
    /// What is not, in words.
    pub fn check_file(&self, disk: &Disk) -> Result<(), String> {
        let path = disk.path.display();
        let now = stamp(&disk.path)?;
        if self.file.is_some() && self.file != now {
            let what = match (self.file, now) {
                (_, None) => "is a block device now",
                (Some((old, ..)), Some((new, ..))) if old != new => "has another length now",
                _ => "was written to since",
            };
            return Err(format!(
                "{path} {what}: the guest's file systems would be damaged; give the disk as it was, or --ignore-disk-changes"
            ));
        }
        Ok(())
    }
}

fn stamp(path: &Path) -> Result<Option<(u64, i64, i64)>, String> {
    let m = std::fs::metadata(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => {
            format!("{}: no such file; put it back, or name where it is with --disk N=FILE", path.display())
        }
        _ => format!("{}: {e}", path.display()),
    })?;
    Ok((!m.file_type().is_block_device()).then(|| (m.len(), m.mtime(), m.mtime_nsec())))
}

/// Bytes in one chunk of a layer.
const CHUNK: u64 = 256 << 10;

/// Write what a throw-away layer holds as a stream.
pub(super) fn write_overlay<W: std::io::Write>(
    overlay: &Overlay,
    pages: &mut PagesWriter<W>,
    mut done: impl FnMut(u64),
) -> Result<(), StateError> {
    let mut at = 0;
    let mut buffer = Vec::new();
    while let Some((start, len)) = overlay.next_held(at) {
        let len = len.min(CHUNK);
        buffer.resize(len as usize, 0);
        overlay.read_at(&[ringfort_block::SharedSliceMut::new(&mut buffer)], start)?;
        super::write::runs(pages, start, &buffer)?;
        done(len);
        at = start + len;
    }
    Ok(())
}

/// Fill a fresh throw-away layer from a stream.
pub(super) fn read_overlay<R: Read>(
    overlay: &Overlay,
    pages: &mut PagesReader<R>,
    mut done: impl FnMut(u64),
) -> Result<(), StateError> {
    while let Some(chunk) = pages.next_chunk()? {
        let (offset, len) = match &chunk {
            Chunk::Data(offset, bytes) => (*offset, bytes.len() as u64),
            Chunk::Zeroes(offset, len) => (*offset, *len),
        };
        if ringfort_block::check_range(overlay.size(), offset, len).is_err() {
            return Err(StateError::Stream("a disk's content reaches beyond its end".into()));
        }
        match chunk {
            Chunk::Data(_, bytes) => overlay.write_at(&[SharedSlice::new(bytes)], offset)?,
            Chunk::Zeroes(..) => overlay.write_zeroes(offset, len, true)?,
        }
        done(len);
    }
    Ok(())
}
