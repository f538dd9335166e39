//! System calls that no safe interface has.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, ErrorKind, Read as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

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

/// Let the process that `command` starts have `fd` under the number that it has here.
pub fn inherit(command: &mut Command, fd: impl Into<OwnedFd>) {
    let fd = fd.into();
    // SAFETY: between fork and exec only one system call is made, on a descriptor that the closure owns.
    unsafe {
        command.pre_exec(move || match libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0) {
            n if n < 0 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        })
    };
}

/// The event of a file's being written in a folder: the first one that somebody closes there (inotify(7)).
pub struct Created {
    events: File,
    until: Instant,
}

impl Created {
    /// Watch a folder for `patience` from now on.
    ///
    /// # Errors
    /// The host's.
    pub fn watch(folder: &Path, patience: Duration) -> io::Result<Created> {
        // SAFETY: takes flags only.
        let fd = unsafe { libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        let events = unsafe { File::from_raw_fd(fd) };
        let folder = CString::new(folder.as_os_str().as_bytes())?;
        // SAFETY: the descriptor is open, and the path ends with a zero byte.
        if unsafe { libc::inotify_add_watch(fd, folder.as_ptr(), libc::IN_CLOSE_WRITE) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Created { events, until: Instant::now() + patience })
    }

    /// Wait for the file; false if `writer`, the process that is to write it, ends before, or nothing comes in time.
    ///
    /// # Errors
    /// The host's.
    pub fn wait(mut self, writer: &Child) -> io::Result<bool> {
        // SAFETY: takes a number and flags only.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, writer.id() as libc::pid_t, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        let writer = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        let poll = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        loop {
            let left = self.until.saturating_duration_since(Instant::now()).as_millis() as i32;
            // A process that has ended reads as readable (pidfd_open(2)).
            let mut fds = [poll(self.events.as_raw_fd()), poll(writer.as_raw_fd())];
            // SAFETY: the array is valid for its length during the call.
            match unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, left) } {
                0 => return Ok(false),
                n if n < 0 => match io::Error::last_os_error() {
                    e if e.kind() == ErrorKind::Interrupted => continue,
                    e => return Err(e),
                },
                _ => {}
            }
            match self.events.read(&mut [0; 1024]) {
                Ok(n) if n > 0 => return Ok(true),
                Err(e) if e.kind() != ErrorKind::WouldBlock => return Err(e),
                _ if fds[1].revents != 0 => return Ok(false),
                _ => {}
            }
        }
    }
}
