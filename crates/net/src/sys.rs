//! System calls that no safe interface has.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, ErrorKind, Read as _};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
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

/// What became of a datagram (ip(7), IP_RECVERR).
#[derive(Debug)]
pub struct Failure {
    /// Where it was to go.
    pub to: SocketAddr,
    /// The host's error number.
    pub errno: i32,
    /// The kind and code of the ICMP message that told of it, if one did.
    pub icmp: Option<(u8, u8)>,
    /// More about it: the MTU of the path, if the datagram was too long for it.
    pub info: u32,
    /// Who told, as far as known.
    pub by: Option<IpAddr>,
}

/// Have failures of datagrams kept for [`take_failure`].
///
/// # Errors
/// The host's.
pub fn keep_failures(fd: RawFd, v4: bool) -> io::Result<()> {
    let (level, option) =
        if v4 { (libc::IPPROTO_IP, libc::IP_RECVERR) } else { (libc::IPPROTO_IPV6, libc::IPV6_RECVERR) };
    let on: libc::c_int = 1;
    // SAFETY: the value is a number that lives during the call, and its length is told.
    match unsafe {
        libc::setsockopt(
            fd,
            level,
            option,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn address(raw: &[u8]) -> Option<SocketAddr> {
    let port = u16::from_be_bytes(*raw.get(2..)?.first_chunk()?);
    // `struct sockaddr_in` and `struct sockaddr_in6` (ip(7), ipv6(7)).
    let ip: IpAddr = match i32::from(u16::from_ne_bytes(*raw.first_chunk()?)) {
        libc::AF_INET => (*raw.get(4..)?.first_chunk::<4>()?).into(),
        libc::AF_INET6 => (*raw.get(8..)?.first_chunk::<16>()?).into(),
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

/// Take the oldest failure that is kept, and the beginning of what was in the datagram.
///
/// # Errors
/// The host's: `WouldBlock` when there is none.
pub fn take_failure(fd: RawFd, data: &mut Vec<u8>) -> io::Result<Option<Failure>> {
    data.resize(1500, 0);
    let (mut name, mut control) = ([0u8; 28], [0u64; 32]);
    let mut iov = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
    // SAFETY: all zeroes is a valid value of this plain structure.
    let mut m: libc::msghdr = unsafe { std::mem::zeroed() };
    (m.msg_name, m.msg_namelen) = (name.as_mut_ptr().cast(), name.len() as libc::socklen_t);
    (m.msg_iov, m.msg_iovlen) = (&raw mut iov, 1);
    (m.msg_control, m.msg_controllen) = (control.as_mut_ptr().cast(), size_of_val(&control));
    // SAFETY: all that the message points to lives during the call and is as long as told.
    let n = unsafe { libc::recvmsg(fd, &raw mut m, libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT) };
    if n < 0 {
        return Err(io::Error::last_os_error());
    }
    data.truncate(n as usize);
    let Some(to) = name.get(..m.msg_namelen as usize).and_then(address) else { return Ok(None) };
    // SAFETY: the kernel has filled the control buffer, which `m` describes and which is aligned for its headers.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(&raw const m) };
    while !next.is_null() {
        // SAFETY: it points to a whole header in the control buffer.
        let c = unsafe { *next };
        let kinds = [(libc::IPPROTO_IP, libc::IP_RECVERR), (libc::IPPROTO_IPV6, libc::IPV6_RECVERR)];
        if kinds.contains(&(c.cmsg_level, c.cmsg_type)) {
            // SAFETY: as long as the header says, and within the buffer, as the kernel wrote it.
            let raw = unsafe {
                let len = (c.cmsg_len as usize).saturating_sub(libc::CMSG_LEN(0) as usize);
                std::slice::from_raw_parts(libc::CMSG_DATA(next), len)
            };
            // `struct sock_extended_err`: error, origin, type, code, padding, info, data; then who told.
            let Some(&[e0, e1, e2, e3, origin, kind, code, _, i0, i1, i2, i3]) = raw.first_chunk() else {
                return Ok(None);
            };
            return Ok(Some(Failure {
                to,
                errno: i32::from_ne_bytes([e0, e1, e2, e3]),
                // SO_EE_ORIGIN_ICMP and SO_EE_ORIGIN_ICMP6.
                icmp: matches!(origin, 2 | 3).then_some((kind, code)),
                info: u32::from_ne_bytes([i0, i1, i2, i3]),
                by: raw.get(16..).and_then(address).map(|a| a.ip()),
            }));
        }
        // SAFETY: both are as above.
        next = unsafe { libc::CMSG_NXTHDR(&raw const m, next) };
    }
    Ok(None)
}

/// Whether the next byte of a stream is its urgent one (sockatmark(3)).
pub fn at_mark(fd: RawFd) -> bool {
    /// From the kernel's `asm-generic/sockios.h`.
    const SIOCATMARK: libc::c_ulong = 0x8905;
    let mut at: libc::c_int = 0;
    // SAFETY: this request writes one number, which lives during the call.
    unsafe { libc::ioctl(fd, SIOCATMARK, &raw mut at) == 0 && at != 0 }
}
