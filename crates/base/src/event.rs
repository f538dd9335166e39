//! Event descriptors.

use std::io;
use std::os::fd::{FromRawFd as _, OwnedFd};

/// A new event descriptor, which counts what is written to it and never makes a reader or writer wait (eventfd(2)).
///
/// # Errors
/// The system's, when there are no more descriptors.
pub fn event() -> io::Result<OwnedFd> {
    // SAFETY: the call takes two numbers and touches no memory of ours.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read as _, Write as _};

    #[test]
    fn counts() {
        let mut f = std::fs::File::from(super::event().expect("a descriptor"));
        let mut n = [0; 8];
        assert_eq!(f.read(&mut n).expect_err("nothing yet").kind(), ErrorKind::WouldBlock);
        for _ in 0..3 {
            f.write_all(&1u64.to_ne_bytes()).expect("room");
        }
        assert_eq!((f.read(&mut n).expect("a count"), u64::from_ne_bytes(n)), (8, 3));
    }
}
