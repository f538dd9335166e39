//! Socket calls that no safe interface has.

use std::io;
use std::os::fd::RawFd;

/// Append at most `most` bytes of a socket to `data`; 0 at its end.
pub fn receive(fd: RawFd, data: &mut Vec<u8>, most: usize) -> io::Result<usize> {
    data.reserve(most);
    let room = data.spare_capacity_mut();
    // SAFETY: `most` bytes of spare capacity were reserved.
    let n = unsafe { libc::recv(fd, room.as_mut_ptr().cast(), most, 0) };
    if n < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel wrote that many bytes there.
    unsafe { data.set_len(data.len() + n as usize) };
    Ok(n as usize)
}

/// Bytes of a socket that wait to be read.
pub fn waiting(fd: RawFd) -> usize {
    let mut n: libc::c_int = 0;
    // SAFETY: the request writes one integer.
    if unsafe { libc::ioctl(fd, libc::FIONREAD, &mut n) } < 0 { 0 } else { n as usize }
}

/// Send at most two pieces in one go; gives how many bytes were taken.
pub fn send(fd: RawFd, pieces: &[&[u8]]) -> io::Result<usize> {
    let mut list = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; 2];
    for (to, p) in list.iter_mut().zip(pieces) {
        *to = libc::iovec { iov_base: p.as_ptr().cast_mut().cast(), iov_len: p.len() };
    }
    // SAFETY: an all-zero message header is a valid value.
    let mut m: libc::msghdr = unsafe { std::mem::zeroed() };
    m.msg_iov = list.as_mut_ptr();
    m.msg_iovlen = pieces.len().min(2) as _;
    // SAFETY: the pieces are valid for their lengths, and are only read. A closed socket gives an error, no signal.
    let n = unsafe { libc::sendmsg(fd, &m, libc::MSG_NOSIGNAL) };
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(n as usize) }
}
