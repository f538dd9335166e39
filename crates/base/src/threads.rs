//! Where and how urgently the calling thread runs, and what child processes have used.

use std::io;

/// Host CPUs that this process may use, ascending (sched_getaffinity(2)).
///
/// # Errors
/// The system's.
pub fn usable_cpus() -> io::Result<Vec<u32>> {
    // SAFETY: a zeroed set is a valid empty one, and the kernel writes no more than its size.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut set) != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok((0..libc::CPU_SETSIZE as u32).filter(|&n| libc::CPU_ISSET(n as usize, &set)).collect())
    }
}

/// Let the calling thread run on host CPU `cpu` only.
///
/// # Errors
/// The system's; `EINVAL` when there is no such CPU.
pub fn pin(cpu: u32) -> io::Result<()> {
    if cpu >= libc::CPU_SETSIZE as u32 {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: a zeroed set is a valid empty one, and `cpu` is a bit of it.
    let done = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu as usize, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set)
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Let the calling thread run before every thread of ordinary priority, first come first served at `priority` (1 to 99).
///
/// # Errors
/// The system's; `EPERM` without the right to (CAP_SYS_NICE, or a limit on real-time priority, `ulimit -r`).
pub fn real_time(priority: u8) -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: priority.into() };
    // A child process must not get the priority along with the thread's.
    let policy = libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK;
    // SAFETY: the parameters are valid for the call.
    if unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// CPU time of all child processes that have ended and been waited for (getrusage(2)), to the microsecond.
///
/// # Errors
/// The host's.
pub fn children_cpu_time() -> io::Result<std::time::Duration> {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::uninit();
    // SAFETY: the structure may be written to.
    if unsafe { libc::getrusage(libc::RUSAGE_CHILDREN, usage.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so it is filled.
    let usage = unsafe { usage.assume_init() };
    let time = |t: libc::timeval| std::time::Duration::new(t.tv_sec as u64, t.tv_usec as u32 * 1000);
    Ok(time(usage.ru_utime) + time(usage.ru_stime))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pinned_thread_runs_where_it_should() {
        let all = usable_cpus().expect("CPUs");
        assert!(!all.is_empty());
        for &cpu in &all {
            let there = std::thread::spawn(move || pin(cpu).map(|()| usable_cpus()));
            assert_eq!(there.join().expect("a thread").expect("pinned").expect("CPUs"), [cpu]);
        }
        assert_eq!(usable_cpus().expect("CPUs"), all, "other threads stay as they were");
        assert!(pin(1023).is_err() && pin(5000).is_err());
    }

    #[test]
    fn real_time_is_set_or_refused() {
        let tried = std::thread::spawn(|| {
            real_time(1).map(|()| {
                // SAFETY: asks about the calling thread.
                unsafe { libc::sched_getscheduler(0) & !libc::SCHED_RESET_ON_FORK }
            })
        });
        match tried.join().expect("a thread") {
            Ok(policy) => assert_eq!(policy, libc::SCHED_FIFO),
            Err(e) => assert_eq!(e.raw_os_error(), Some(libc::EPERM)),
        }
        assert!(real_time(0).is_err() && real_time(100).is_err());
    }
}
