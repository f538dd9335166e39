//! Pseudo-terminals.

use std::ffi::{CStr, OsStr};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// Open a new pseudo-terminal in raw mode: its master side, and the name of the other side.
///
/// # Errors
/// The host's.
pub fn open() -> io::Result<(OwnedFd, PathBuf)> {
    // SAFETY: plain system call; the result is checked.
    let fd = unsafe { libc::posix_openpt(libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just opened and belongs to nobody else.
    let master = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut name = [0 as libc::c_char; 128];
    // SAFETY: `master` is an open pseudo-terminal and `name` is writable for its length.
    let ok = unsafe {
        libc::grantpt(fd) == 0
            && libc::unlockpt(fd) == 0
            && libc::ptsname_r(fd, name.as_mut_ptr(), name.len()) == 0
    };
    if !ok {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: ptsname_r has written a NUL-terminated name.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) };
    // SAFETY: an all-zero termios is a valid value to be filled in.
    let mut t: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: `t` is a termios; the descriptor is open.
    unsafe {
        if libc::tcgetattr(master.as_raw_fd(), &mut t) == 0 {
            libc::cfmakeraw(&mut t);
            libc::tcsetattr(master.as_raw_fd(), libc::TCSANOW, &t);
        }
    }
    Ok((master, PathBuf::from(OsStr::from_bytes(name.to_bytes()))))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    #[test]
    fn bytes_pass_both_ways_unchanged() {
        let (master, name) = super::open().unwrap();
        let mut master = std::fs::File::from(master);
        let mut slave = std::fs::OpenOptions::new().read(true).write(true).open(name).unwrap();
        slave.write_all(b"a\nb").unwrap();
        let mut buf = [0; 3];
        master.read_exact(&mut buf).unwrap();
        assert_eq!(&buf, b"a\nb");
        master.write_all(&[3, 4, 13]).unwrap();
        slave.read_exact(&mut buf).unwrap();
        assert_eq!(buf, [3, 4, 13]);
    }
}
