//! Files.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// Copy a file, leaving holes where the original has them (and sharing its blocks where the file system can), and flush the copy to disk.
///
/// # Errors
/// The host's; the copy may then be half there.
pub fn copy_sparse(from: &Path, to: &Path) -> io::Result<()> {
    let mut source = File::open(from)?;
    let size = source.metadata()?.len();
    let mut target = File::options().write(true).create_new(true).open(to)?;
    // SAFETY: both descriptors are open; FICLONE takes the source descriptor by value and touches no memory of ours.
    if unsafe { libc::ioctl(target.as_raw_fd(), libc::FICLONE, source.as_raw_fd()) } != 0 {
        target.set_len(size)?;
        let mut at = 0;
        while let Some((start, end)) = next_data(&source, at, size)? {
            source.seek(SeekFrom::Start(start))?;
            target.seek(SeekFrom::Start(start))?;
            io::copy(&mut Read::take(&source, end - start), &mut target)?;
            at = end;
        }
        target.flush()?;
    }
    target.sync_all()
}

/// The next run of data at or after `at`: start and end.
fn next_data(file: &File, at: u64, size: u64) -> io::Result<Option<(u64, u64)>> {
    if at >= size {
        return Ok(None);
    }
    // SAFETY: plain system calls on an open descriptor.
    let start = unsafe { libc::lseek(file.as_raw_fd(), at as libc::off_t, libc::SEEK_DATA) };
    if start < 0 {
        let e = io::Error::last_os_error();
        return match e.raw_os_error() {
            Some(libc::ENXIO) => Ok(None),
            // A file system without holes: everything is data.
            Some(libc::EINVAL) => Ok(Some((at, size))),
            _ => Err(e),
        };
    }
    // SAFETY: as above.
    let end = unsafe { libc::lseek(file.as_raw_fd(), start, libc::SEEK_HOLE) };
    let end = if end < 0 { size } else { end as u64 };
    Ok(Some((start as u64, end.min(size))))
}

/// A file that gets its name only when it is whole. Until then it has none where the file system can do so, so that nothing is left behind
/// however the process ends; elsewhere a hidden one in the same folder.
pub struct NewFile {
    file: Option<File>,
    target: PathBuf,
    /// The hidden name, if it has one.
    scratch: Option<PathBuf>,
}

impl NewFile {
    /// Begin a file that is to be `target`, readable by its owner alone.
    ///
    /// # Errors
    /// When the folder is missing or takes no files, or `target` is something that is not replaced (a folder, a device).
    pub fn create(target: &Path) -> io::Result<NewFile> {
        match std::fs::metadata(target) {
            Ok(m) if !m.is_file() => {
                return Err(io::Error::new(io::ErrorKind::AlreadyExists, "exists and is no regular file"));
            }
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let mut new = NewFile { file: None, target: target.into(), scratch: None };
        let folder = new.folder().to_owned();
        let mut options = File::options();
        options.write(true).mode(0o600);
        match options.clone().custom_flags(libc::O_TMPFILE).open(&folder) {
            Ok(f) => new.file = Some(f),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR)) => {
                let scratch = new.scratch_name();
                new.file = Some(options.create_new(true).open(&scratch)?);
                new.scratch = Some(scratch);
            }
            Err(e) => return Err(e),
        }
        Ok(new)
    }

    fn folder(&self) -> &Path {
        self.target.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
    }

    fn scratch_name(&self) -> PathBuf {
        let name = self.target.file_name().unwrap_or_default().to_string_lossy();
        self.folder().join(format!(".{name}.{}.new", std::process::id()))
    }

    /// Flush to disk and give it its name, in the place of what has that name.
    ///
    /// # Errors
    /// The host's; what had the name before still has it then.
    pub fn commit(mut self) -> io::Result<()> {
        let Some(file) = self.file.take() else { return Ok(()) };
        file.sync_all()?;
        if self.scratch.is_none() {
            let scratch = self.scratch_name();
            // Left over from a process of the same number that was killed between the two steps below.
            let _ = std::fs::remove_file(&scratch);
            link_open_file(&file, &scratch)?;
            self.scratch = Some(scratch);
        }
        if let Some(scratch) = &self.scratch {
            std::fs::rename(scratch, &self.target)?;
            self.scratch = None;
        }
        // The name is durable once its folder is.
        File::open(self.folder())?.sync_all()
    }
}

impl Write for NewFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.file {
            Some(f) => f.write(bytes),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(scratch) = &self.scratch {
            // It stays if the folder does not let it go.
            let _ = std::fs::remove_file(scratch);
        }
    }
}

/// Give an open file that has no name the name `path`.
fn link_open_file(file: &File, path: &Path) -> io::Result<()> {
    let from = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    let to = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: both are NUL-terminated and live for the length of the call.
    let done = unsafe {
        libc::linkat(libc::AT_FDCWD, from.as_ptr(), libc::AT_FDCWD, to.as_ptr(), libc::AT_SYMLINK_FOLLOW)
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_new_file_has_its_name_only_when_it_is_whole() {
        let dir = std::env::temp_dir().join(format!("ringfort-newfile-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let target = dir.join("a");
        let mut f = NewFile::create(&target).unwrap();
        f.write_all(b"first").unwrap();
        drop(f);
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);
        let mut f = NewFile::create(&target).unwrap();
        f.write_all(b"second").unwrap();
        assert!(!target.exists());
        f.commit().unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"second");
        let mut f = NewFile::create(&target).unwrap();
        f.write_all(b"third").unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"second");
        f.commit().unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"third");
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 1);
        assert!(NewFile::create(&dir).is_err());
        assert!(NewFile::create(&dir.join("no/where")).is_err());
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn holes_stay_holes_and_data_stays_data() {
        let dir = std::env::temp_dir().join(format!("ringfort-file-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (a, b) = (dir.join("a"), dir.join("b"));
        let mut f = File::create(&a).unwrap();
        f.write_all(&[1; 5000]).unwrap();
        f.seek(SeekFrom::Start(50 << 20)).unwrap();
        f.write_all(&[2; 70_000]).unwrap();
        f.set_len(64 << 20).unwrap();
        drop(f);
        copy_sparse(&a, &b).unwrap();
        assert!(std::fs::read(&a).unwrap() == std::fs::read(&b).unwrap());
        assert!(std::fs::metadata(&b).unwrap().blocks() * 512 < 8 << 20);
        assert!(copy_sparse(&a, &b).is_err(), "an existing file must not be overwritten");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
