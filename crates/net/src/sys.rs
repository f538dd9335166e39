//! System calls that no safe interface has.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

/// Let this process open as many descriptors as it is allowed to: every connection of a guest takes one.
pub fn raise_descriptor_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a valid structure for the call's duration.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } != 0 {
        return;
    }
    let wanted = limit.rlim_max.min(65_536);
    if limit.rlim_cur < wanted {
        limit.rlim_cur = wanted;
        // SAFETY: as above. A refusal leaves the limit as it was, which only means fewer connections.
        unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) };
    }
}

/// Open a regular file below `root` for reading; nothing that leads out of it, by `..` or by links, is followed. A leading
/// slash stands for `root`.
///
/// # Errors
/// The host's; `InvalidInput` for what is no regular file.
pub fn open_below(root: &Path, name: &[u8]) -> io::Result<File> {
    let folder = File::options().read(true).custom_flags(libc::O_DIRECTORY).open(root)?;
    let first = name.iter().position(|b| *b != b'/').unwrap_or(name.len());
    let name = CString::new(&name[first..])?;
    // SAFETY: all zeroes is a valid value of this plain structure.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    // Opening a pipe would wait for a writer without O_NONBLOCK.
    how.flags = (libc::O_RDONLY | libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOCTTY) as u64;
    how.resolve = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_MAGICLINKS;
    // SAFETY: the descriptor is open, the name ends with a zero byte, and `how` is valid and as long as told.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_openat2,
            folder.as_raw_fd(),
            name.as_ptr(),
            &raw const how,
            std::mem::size_of::<libc::open_how>(),
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    let file = unsafe { File::from_raw_fd(fd as i32) };
    if !file.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(file)
}
