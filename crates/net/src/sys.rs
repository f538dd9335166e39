//! System calls that no safe interface has.

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
