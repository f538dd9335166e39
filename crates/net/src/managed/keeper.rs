//! The process that keeps a network up, and the one that watches it.

use super::service::Running;
use super::{Networks, State};
use crate::NetError;
use crate::netlink::Netlink;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// How often dnsmasq is started again before the network is given up.
const MOST_RESTARTS: u32 = 5;

/// Block these signals in this thread and those that it starts, so that they can be waited for.
fn block(signals: &[libc::c_int]) -> libc::sigset_t {
    // SAFETY: the set is written before it is read, and concerns this thread only.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for &s in signals {
            libc::sigaddset(&mut set, s);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        set
    }
}

fn start_watcher(watcher: &dyn Fn() -> Command, name: &str) -> Result<Child, NetError> {
    let mut command = watcher();
    // Its input ends with this process, however that ends.
    command.arg(name).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    // SAFETY: between fork and exec, a call that is allowed there: what is sent to this process's group is not for it.
    unsafe {
        command.pre_exec(|| {
            libc::setsid();
            Ok(())
        });
    }
    command.spawn().map_err(NetError::host("the network's watcher"))
}

/// Have all ports of an isolated network's bridge isolated, also those that others put on it.
fn isolate_ports(bridge: &str) {
    let Ok(mut netlink) = Netlink::open() else { return };
    let Ok(links) = netlink.links() else { return };
    let Some(index) = links.iter().find(|l| l.name == bridge).map(|l| l.index) else { return };
    for port in links.iter().filter(|l| l.master == Some(index)) {
        let _ = netlink.set_isolated(port.index, true);
    }
}

/// Set the network `name` up, say "ready" or what is wrong in one line to `tell`, keep it until SIGTERM or SIGINT, and take it down.
/// `watcher` is a command that calls [`watch`] with the name that follows.
///
/// # Errors
/// [`NetError`], which was told as well; nothing is left behind.
pub fn keep(
    networks: &Networks,
    name: &str,
    watcher: &dyn Fn() -> Command,
    tell: &mut dyn Write,
) -> Result<(), NetError> {
    // Before there are threads.
    let signals = block(&[libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGCHLD]);
    let mut up = match set_up(networks, name, watcher) {
        Ok(up) => up,
        Err(e) => {
            let _ = writeln!(tell, "{e}");
            return Err(e);
        }
    };
    let _ = writeln!(tell, "ready");
    let _ = tell.flush();
    let outcome = up.wait(&signals, watcher);
    let down = up.down();
    outcome.and(down)
}

struct Up<'a> {
    networks: &'a Networks,
    state: State,
    service: Option<Running>,
    watcher: Child,
    links: Option<std::os::fd::OwnedFd>,
    restarts: u32,
    _lock: std::fs::File,
}

fn set_up<'a>(networks: &'a Networks, name: &str, watcher: &dyn Fn() -> Command) -> Result<Up<'a>, NetError> {
    let config = networks.get(name)?;
    config.check()?;
    networks.recover()?;
    let lock =
        networks.try_lock(name)?.ok_or_else(|| NetError::Refused(format!("network {name} is up already")))?;
    let mut netlink = Netlink::open().map_err(NetError::host("route netlink"))?;
    networks.check_host(&config, &mut netlink)?;
    let mut state = State { config, pid: std::process::id(), service: "none".into() };
    // Written down before anything is made.
    Networks::write(&networks.state_file(name), &state)?;
    let made = (|| {
        let watcher = start_watcher(watcher, name)?;
        let links = if state.config.isolate {
            Some(Netlink::watch().map_err(NetError::host("watching links"))?)
        } else {
            None
        };
        networks.set_up(&state.config)?;
        let service = Running::start(&state.config, &networks.folder(name))?;
        state.service = service.name().into();
        Networks::write(&networks.state_file(name), &state)?;
        Ok((watcher, links, service))
    })();
    match made {
        Ok((watcher, links, service)) => {
            Ok(Up { networks, state, service: Some(service), watcher, links, restarts: 0, _lock: lock })
        }
        Err(e) => {
            // The watcher, if it is there, finds nothing left to do.
            let _ = networks.take_down(&state.config);
            Err(e)
        }
    }
}

impl Up<'_> {
    fn wait(&mut self, signals: &libc::sigset_t, watcher: &dyn Fn() -> Command) -> Result<(), NetError> {
        // SAFETY: the set is valid; the descriptor is checked.
        let fd = unsafe { libc::signalfd(-1, signals, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(NetError::host("taking signals")(std::io::Error::last_os_error()));
        }
        // SAFETY: a descriptor that was just made.
        let mut fd =
            std::fs::File::from(unsafe { <std::os::fd::OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd) });
        loop {
            let mut polls = [fd.as_raw_fd(), self.links.as_ref().map_or(-1, |l| l.as_raw_fd())]
                .map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
            // SAFETY: the list is valid for its length; a negative descriptor is passed over.
            unsafe { libc::poll(polls.as_mut_ptr(), 2, -1) };
            if polls[1].revents != 0
                && let Some(l) = &self.links
            {
                let mut gone = Vec::new();
                // What it says does not matter: everything is looked up.
                let _ = crate::stream::receive(l.as_raw_fd(), &mut gone, 64 << 10);
                isolate_ports(&self.state.config.bridge());
            }
            let mut info = [0; size_of::<libc::signalfd_siginfo>()];
            while let Ok(n) = fd.read(&mut info) {
                if n < 4 {
                    break;
                }
                match i32::from_ne_bytes([info[0], info[1], info[2], info[3]]) {
                    libc::SIGTERM | libc::SIGINT => return Ok(()),
                    libc::SIGCHLD => self.look_after_children(watcher)?,
                    _ => {}
                }
            }
        }
    }

    fn look_after_children(&mut self, watcher: &dyn Fn() -> Command) -> Result<(), NetError> {
        let name = &self.state.config.name;
        if !matches!(self.watcher.try_wait(), Ok(None)) {
            self.watcher = start_watcher(watcher, name)?;
        }
        if self.service.as_mut().is_some_and(Running::ended) {
            self.restarts += 1;
            if self.restarts > MOST_RESTARTS {
                return Err(NetError::Refused(format!("network {name}: dnsmasq ends again and again")));
            }
            self.service = None;
            std::thread::sleep(Duration::from_millis(100) * self.restarts);
            self.service = Some(Running::start(&self.state.config, &self.networks.folder(name))?);
        }
        Ok(())
    }

    fn down(mut self) -> Result<(), NetError> {
        self.service = None;
        self.networks.take_down(&self.state.config)?;
        // The watcher sees the end of its input, and nothing written down any more.
        drop(self.watcher.stdin.take());
        let _ = self.watcher.wait();
        Ok(())
    }
}

/// Wait for the end of `input`, which is the keeper's, and take down what it has left.
///
/// # Errors
/// [`NetError`]; what is left is still written down.
pub fn watch(networks: &Networks, name: &str, input: &mut dyn Read) -> Result<(), NetError> {
    let mut byte = [0; 1];
    while !matches!(input.read(&mut byte), Ok(0) | Err(_)) {}
    // The keeper's lock goes with it, at about the same time.
    if networks.state_file(name).exists() {
        let path = networks.folder(name).join("lock");
        if let Ok(f) = std::fs::File::open(&path) {
            f.lock().map_err(NetError::host(path.display().to_string()))?;
            // Let go again: it is taken anew below.
            drop(f);
        }
        networks.recover()?;
    }
    Ok(())
}
