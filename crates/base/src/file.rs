//! Files.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::path::Path;

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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

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
