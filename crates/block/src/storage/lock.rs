//! Image locks, as QEMU takes them.
//!
//! Each permission has a number. A process that uses permission `i` holds a shared lock on byte `100 + i` of the
//! image; one that does not let others use permission `i` holds a shared lock on byte `200 + i`. Nobody ever holds
//! an exclusive lock: to find a conflict, a process asks whether it *could* lock the opposite byte exclusively.
//! The locks belong to the open file (`F_OFD_SETLK`, fcntl(2)), so they end when it is closed, however that happens.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

/// How long locks may outlive a killed process, and how often to look.
const LINGERING: Duration = Duration::from_millis(300);
const STEP: Duration = Duration::from_millis(5);

/// The first byte of the "permission in use" range.
const PERM_BASE: i64 = 100;
/// The first byte of the "permission not shared" range.
const SHARED_BASE: i64 = 200;

/// Read data that is consistent.
const CONSISTENT_READ: u32 = 1 << 0;
/// Change data.
const WRITE: u32 = 1 << 1;
/// Write the same data again (copy on read, for instance).
const WRITE_UNCHANGED: u32 = 1 << 2;
/// Change the size.
const RESIZE: u32 = 1 << 3;
const COUNT: u32 = 4;

/// How an image is used, and what others may do meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    perm: u32,
    shared: u32,
}

impl Access {
    /// Read only; others may read too.
    pub const READ: Access = Access { perm: CONSISTENT_READ, shared: CONSISTENT_READ | WRITE_UNCHANGED };
    /// Read and write; others may not write, nor read if they need that nobody writes.
    pub const WRITE: Access =
        Access { perm: CONSISTENT_READ | WRITE | RESIZE, shared: CONSISTENT_READ | WRITE_UNCHANGED };
}

/// Why a lock cannot be had.
#[derive(Debug)]
pub enum LockError {
    /// Another process is in the way.
    Conflict(&'static str),
    /// The host refuses.
    Io(io::Error),
}

fn request(kind: i32, byte: i64) -> libc::flock {
    requests(kind, byte, 1)
}

fn requests(kind: i32, first: i64, bytes: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: first,
        l_len: bytes,
        l_pid: 0,
    }
}

/// Take a shared lock of one byte.
fn hold(file: &File, byte: i64) -> io::Result<()> {
    let lock = request(libc::F_RDLCK, byte);
    // SAFETY: F_OFD_SETLK reads the structure, which lives through the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Whether anybody else holds a lock of the byte.
fn held_by_other(file: &File, byte: i64) -> io::Result<bool> {
    let mut lock = request(libc::F_WRLCK, byte);
    // SAFETY: F_OFD_GETLK reads and writes the structure, which lives through the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut lock) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

/// The permissions: their bits and their numbers.
fn bits() -> impl Iterator<Item = (u32, i64)> {
    (0..COUNT).map(|i| (1 << i, i64::from(i)))
}

/// Lock `file` for as long as it is open.
///
/// # Errors
/// [`LockError::Conflict`] when another process uses it in a way that does not go together with `access`, and still does after
/// [`LINGERING`]. Then none is held.
pub fn acquire(file: &File, access: Access) -> Result<(), LockError> {
    try_to_acquire(file, access).inspect_err(|_| release(file))
}

/// A file that gives up its locks before it is closed. They would end with it, but if this process is just starting another one, not before
/// that has closed what it inherited.
pub struct Locked(pub File);

impl std::ops::Deref for Locked {
    type Target = File;
    fn deref(&self) -> &File {
        &self.0
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        release(&self.0);
    }
}

/// Give up all locks of `file`.
fn release(file: &File) {
    let lock = requests(libc::F_UNLCK, PERM_BASE, SHARED_BASE + i64::from(COUNT) - PERM_BASE);
    // That it cannot be done does not matter: there are none, or they end with the file.
    // SAFETY: F_OFD_SETLK reads the structure, which lives through the call.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) };
}

fn try_to_acquire(file: &File, access: Access) -> Result<(), LockError> {
    for (bit, i) in bits() {
        // First take, then look: of two that come at once, at least one sees the other.
        if access.perm & bit != 0 {
            take(file, PERM_BASE + i)?;
        }
        if access.shared & bit == 0 {
            take(file, SHARED_BASE + i)?;
        }
    }
    // The kernel ends a killed process's requests, and with them its locks, some time after its parent has heard of its end; no event tells
    // when.
    let patience = Instant::now() + LINGERING;
    while let Some(why) = conflict(file, access)? {
        if Instant::now() >= patience {
            return Err(LockError::Conflict(why));
        }
        std::thread::sleep(STEP);
    }
    Ok(())
}

/// What of another process's use does not go together with `access`.
fn conflict(file: &File, access: Access) -> Result<Option<&'static str>, LockError> {
    for (bit, i) in bits() {
        if access.shared & bit == 0 && held_by_other(file, PERM_BASE + i).map_err(LockError::Io)? {
            return Ok(Some(match bit {
                WRITE => "it is being written",
                RESIZE => "it may be resized",
                _ => "it is being read",
            }));
        }
        if access.perm & bit != 0 && held_by_other(file, SHARED_BASE + i).map_err(LockError::Io)? {
            return Ok(Some(match bit {
                WRITE | RESIZE => "its user does not let others write",
                _ => "its user does not let others read",
            }));
        }
    }
    Ok(None)
}

fn take(file: &File, byte: i64) -> Result<(), LockError> {
    hold(file, byte).map_err(|e| match e.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => LockError::Conflict("it is locked as a whole"),
        _ => LockError::Io(e),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_end_before_the_file_does() {
        let dir = super::super::tests::TempDir::new();
        let path = dir.file("image", &[0; 512]);
        let open = || File::options().read(true).write(true).open(&path).unwrap();
        let first = Locked(open());
        // As a process that was just started has it for a moment.
        let inherited = first.try_clone().unwrap();
        acquire(&first, Access::WRITE).unwrap();
        assert!(matches!(acquire(&open(), Access::WRITE), Err(LockError::Conflict(_))));
        drop(first);
        acquire(&open(), Access::WRITE).unwrap();
        drop(inherited);
    }
}
