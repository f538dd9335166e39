//! Files that get their name when they are complete.
//!
//! A new image is written to a file without a name, so that whatever ends the work early, Ctrl-C or a crash, leaves
//! nothing behind. Where the file system has no such files it has a temporary name instead.

use super::{FileStorage, StorageOptions};
use crate::BlockError;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A file being made. Dropping it leaves nothing.
pub struct NewFile {
    file: File,
    target: PathBuf,
    temporary: PathBuf,
    named: bool,
    /// Holds the locks of the file that will be replaced.
    _replaced: Option<FileStorage>,
}

impl NewFile {
    /// A file that will be `target`; what is there already is replaced, unless another process uses it.
    ///
    /// # Errors
    /// [`BlockError`] says what is wrong with the place.
    pub fn create(target: &Path) -> Result<NewFile, BlockError> {
        // A link's target is replaced, not the link.
        let target = std::fs::canonicalize(target).unwrap_or_else(|_| target.into());
        let host = |e| BlockError::host(&target, "cannot create", e);
        let replaced = match std::fs::metadata(&target) {
            Ok(_) => {
                let options = StorageOptions { read_only: false, direct: false, lock: true };
                Some(FileStorage::open_any_size(&target, options)?)
            }
            Err(_) => None,
        };
        let dir = match target.parent() {
            Some(d) if !d.as_os_str().is_empty() => d.to_path_buf(),
            _ => PathBuf::from("."),
        };
        let name = target.file_name().ok_or_else(|| BlockError::Directory(target.clone()))?;
        let mut part = std::ffi::OsString::from(".");
        part.push(name);
        part.push(format!(".{}.part", std::process::id()));
        let temporary = dir.join(part);
        let open = |path: &Path, flags: i32, new: bool| {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create_new(new).mode(0o644).custom_flags(flags).open(path)
        };
        let (file, named) = match open(&dir, libc::O_TMPFILE, false) {
            Ok(f) => (f, false),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR)) => {
                (open(&temporary, 0, true).map_err(host)?, true)
            }
            Err(e) => return Err(host(e)),
        };
        Ok(NewFile { file, target, temporary, named, _replaced: replaced })
    }

    /// The file, to write to. Relative names in it count from where it will be.
    ///
    /// # Errors
    /// [`BlockError::Host`].
    pub fn storage(&self) -> Result<FileStorage, BlockError> {
        let host = |e| BlockError::host(&self.target, "cannot use", e);
        let file = self.file.try_clone().map_err(host)?;
        let len = file.metadata().map_err(host)?.len();
        Ok(FileStorage::anonymous(file, self.target.clone(), len))
    }

    /// The file opened for direct I/O, as [`storage`](Self::storage).
    ///
    /// # Errors
    /// [`BlockError`] says what the file system does not offer.
    pub fn direct_storage(&self) -> Result<FileStorage, BlockError> {
        let name = PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()));
        FileStorage::open_any_size(&name, StorageOptions { read_only: false, direct: true, lock: false })
    }

    /// Make it durable and give it its name.
    ///
    /// # Errors
    /// [`BlockError::Host`].
    pub fn publish(mut self) -> Result<(), BlockError> {
        self.try_publish(true).map_err(|e| BlockError::host(&self.target, "cannot put in place", e))
    }

    /// Give it its name; that it reaches the disk is left to the host.
    ///
    /// # Errors
    /// [`BlockError::Host`].
    pub fn publish_without_sync(mut self) -> Result<(), BlockError> {
        self.try_publish(false).map_err(|e| BlockError::host(&self.target, "cannot put in place", e))
    }

    fn try_publish(&mut self, sync: bool) -> io::Result<()> {
        if sync {
            self.file.sync_all()?;
        }
        if !self.named {
            let from = std::ffi::CString::new(format!("/proc/self/fd/{}", self.file.as_raw_fd()))?;
            let to = std::ffi::CString::new(self.temporary.as_os_str().as_bytes())?;
            // SAFETY: both are strings that live through the call.
            let r = unsafe {
                libc::linkat(
                    libc::AT_FDCWD,
                    from.as_ptr(),
                    libc::AT_FDCWD,
                    to.as_ptr(),
                    libc::AT_SYMLINK_FOLLOW,
                )
            };
            if r != 0 {
                return Err(io::Error::last_os_error());
            }
            self.named = true;
        }
        std::fs::rename(&self.temporary, &self.target)?;
        self.named = false;
        if !sync {
            return Ok(());
        }
        let dir = self.target.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(dir)?.sync_all()
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if self.named {
            // A leftover with a temporary name is all that a failure here means.
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}
