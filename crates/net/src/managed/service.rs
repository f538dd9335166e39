//! Who answers a network's guests: dnsmasq as a child, or threads of this process.

use super::config::{NetworkConfig, Service};
use super::leases::{self, Lease};
use super::{dhcp, dns};
use crate::NetError;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use std::fs;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// How often routers say that they are there.
const ADVERTISE: Duration = Duration::from_secs(60);
/// Queries that wait for the host's servers.
const MOST_QUERIES: usize = 1024;
/// How long they do.
const QUERY: Duration = Duration::from_secs(10);

/// File of the leases in a network's folder.
pub const LEASES: &str = "leases";

/// File of dnsmasq's process number.
const PID: &str = "dnsmasq.pid";
/// How long it may take to end.
const ENDING: Duration = Duration::from_secs(10);

/// End a dnsmasq whose keeper was killed: it gave up root's rights, and with them the kernel forgot that it was to go with its parent.
pub fn end_left_over(dir: &Path) {
    let Some(pid) = fs::read_to_string(dir.join(PID)).ok().and_then(|t| t.trim().parse::<i32>().ok()) else {
        return;
    };
    let conf = dir.join("dnsmasq.conf").display().to_string();
    // The number may have become another's meanwhile; only one with our file on its command line is meant.
    let is_ours = || {
        fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|c| String::from_utf8_lossy(&c).contains(&conf))
    };
    let end = Instant::now() + ENDING;
    if pid > 1 && is_ours() {
        // SAFETY: a plain call.
        unsafe { libc::kill(pid, libc::SIGTERM) };
        // It is no child of this process: there is nothing to wait for.
        while is_ours() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    let _ = fs::remove_file(dir.join(PID));
}

/// A running service.
pub enum Running {
    /// Nobody answers.
    None,
    /// A child.
    Dnsmasq(Child),
    /// Threads.
    Builtin(#[expect(dead_code, reason = "held for the time that it is there")] Builtin),
}

/// Whether dnsmasq is installed.
pub fn find_dnsmasq() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(usual).map(|d| d.join("dnsmasq")).find(|p| p.is_file())
}

/// What dnsmasq is told (dnsmasq(8)).
pub fn dnsmasq_conf(c: &NetworkConfig, dir: &Path) -> String {
    let mut lines = vec![
        format!("interface={}", c.bridge()),
        "bind-dynamic".into(),
        "except-interface=lo".into(),
        "dhcp-authoritative".into(),
        "dhcp-no-override".into(),
        "no-hosts".into(),
        format!("pid-file={}", dir.join(PID).display()),
        format!("dhcp-leasefile={}", dir.join(LEASES).display()),
        format!("log-facility={}", dir.join("dnsmasq.log").display()),
    ];
    if let (Some((first, last)), Some(net)) = (c.range(), c.ipv4) {
        let mask = Ipv4Addr::from(u32::MAX.checked_shl(32 - u32::from(net.prefix)).unwrap_or(0));
        lines.push(format!("dhcp-range={first},{last},{mask},{}s", dhcp::LEASE));
    }
    if c.forward == super::Forward::None {
        // An option without a value: no router.
        lines.push("dhcp-option=3".into());
    }
    if let Some(net) = c.ipv6 {
        lines.push(format!("dhcp-range={},ra-stateless,64", net.network()));
        lines.push("enable-ra".into());
    }
    if let Some(d) = &c.domain {
        lines.push(format!("domain={d}"));
        lines.push(format!("local=/{d}/"));
        lines.push("expand-hosts".into());
    }
    for h in &c.hosts {
        let name = h.name.as_ref().map_or(String::new(), |n| format!(",{n}"));
        lines.push(format!("dhcp-host={},{}{name}", h.mac, h.address));
    }
    lines.push(String::new());
    lines.join("\n")
}

impl Running {
    /// Start what the configuration asks for.
    ///
    /// # Errors
    /// [`NetError`].
    pub fn start(c: &NetworkConfig, dir: &Path) -> Result<Running, NetError> {
        match (c.service, find_dnsmasq()) {
            (Service::None, _) => Ok(Running::None),
            (Service::Dnsmasq | Service::Auto, Some(program)) => {
                dnsmasq(&program, c, dir).map(Running::Dnsmasq)
            }
            (Service::Dnsmasq, None) => Err(NetError::Refused(
                "dnsmasq is not installed; install the package dnsmasq-base, or give --service builtin"
                    .into(),
            )),
            (Service::Auto | Service::Builtin, _) => Builtin::start(c, dir).map(Running::Builtin),
        }
    }

    /// What it is, for people.
    pub fn name(&self) -> &'static str {
        match self {
            Running::None => "none",
            Running::Dnsmasq(_) => "dnsmasq",
            Running::Builtin(_) => "builtin",
        }
    }

    /// Whether it ended by itself.
    pub fn ended(&mut self) -> bool {
        match self {
            Running::Dnsmasq(c) => !matches!(c.try_wait(), Ok(None)),
            Running::None | Running::Builtin(_) => false,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Running::Dnsmasq(c) = self {
            // It writes its leases and ends; killed, it would lose at most the last one.
            // SAFETY: a plain call; the child was not waited for yet, so the number is still its.
            unsafe { libc::kill(c.id() as i32, libc::SIGTERM) };
            let _ = c.wait();
        }
    }
}

fn dnsmasq(program: &Path, c: &NetworkConfig, dir: &Path) -> Result<Child, NetError> {
    let conf = dir.join("dnsmasq.conf");
    leases::replace(&conf, dnsmasq_conf(c, dir).as_bytes())
        .map_err(NetError::host(conf.display().to_string()))?;
    let log = fs::File::create(dir.join("dnsmasq.err")).map_err(NetError::host("dnsmasq.err"))?;
    let mut command = Command::new(program);
    command
        .arg("--keep-in-foreground")
        .arg(format!("--conf-file={}", conf.display()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log);
    // SAFETY: between fork and exec, calls that are allowed there. Until it gives up root's rights the child goes with its parent.
    unsafe {
        command.pre_exec(|| {
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let mut child = command.spawn().map_err(NetError::host(program.display().to_string()))?;
    // It says that it is there by its port; one that cannot have it ends at once.
    let gateway = c.ipv4.or(c.ipv6).map(|n| n.gateway());
    let deadline = Instant::now() + Duration::from_secs(10);
    while let Some(g) = gateway {
        if let Ok(Some(status)) = child.try_wait() {
            let words = fs::read_to_string(dir.join("dnsmasq.err")).unwrap_or_default();
            let words = words.split_whitespace().collect::<Vec<_>>().join(" ");
            return Err(NetError::Refused(format!("dnsmasq ended ({status}): {words}")));
        }
        if std::net::TcpStream::connect_timeout(&SocketAddr::new(g, 53), Duration::from_millis(200)).is_ok() {
            break;
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            return Err(NetError::Refused("dnsmasq does not answer on its port".into()));
        }
        // There is no event to wait for: the port is opened by another process.
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(child)
}

/// Servers in this process.
pub struct Builtin {
    stop: Arc<EventFd>,
    threads: Vec<JoinHandle<()>>,
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Wait until one of `fds` can be read; gives which of them.
fn wait(fds: &[RawFd], patience: Option<Duration>) -> Vec<bool> {
    let mut polls: Vec<libc::pollfd> =
        fds.iter().map(|&fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 }).collect();
    let timeout = patience.map_or(-1, |d| d.as_millis().min(600_000) as i32);
    // SAFETY: the list is valid for its length. An interrupted call says that nothing can be read.
    if unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, timeout) } < 0 {
        return vec![false; fds.len()];
    }
    polls.iter().map(|p| p.revents != 0).collect()
}

fn bound(bridge: &str, at: SocketAddr) -> io::Result<UdpSocket> {
    let s = Socket::new(Domain::for_address(at), Type::DGRAM, Some(Protocol::UDP))?;
    s.set_reuse_address(true)?;
    s.bind_device(Some(bridge.as_bytes()))?;
    s.set_nonblocking(true)?;
    if at.is_ipv4() {
        s.set_broadcast(true)?;
    }
    s.bind(&at.into())?;
    Ok(s.into())
}

type Shared = Arc<Mutex<Option<dhcp::Server>>>;

impl Builtin {
    fn start(c: &NetworkConfig, dir: &Path) -> Result<Builtin, NetError> {
        let fail = |what: &str| NetError::host(format!("{}: {what}", c.bridge()));
        let stop = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(fail("an event descriptor"))?);
        let mut b = Builtin { stop, threads: Vec::new() };
        let file = dir.join(LEASES);
        let before = leases::read(&file).map_err(fail("leases"))?;
        let server: Shared = Arc::new(Mutex::new(dhcp::Server::new(c, &before)));
        if c.ipv4.is_some() {
            let s = bound(&c.bridge(), SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 67))
                .map_err(fail("DHCP port 67"))?;
            let server = server.clone();
            b.spawn("net-dhcp", move |stop| serve_dhcp(&s, &server, &file, stop))
                .map_err(fail("a thread"))?;
        }
        let sockets = c
            .networks()
            .map(|n| bound(&c.bridge(), SocketAddr::new(n.gateway(), 53)))
            .collect::<io::Result<Vec<_>>>()
            .map_err(fail("DNS port 53"))?;
        let (of_dns, config) = (server, c.clone());
        b.spawn("net-dns", move |stop| serve_dns(&sockets, &of_dns, &config, stop))
            .map_err(fail("a thread"))?;
        if let Some(net) = c.ipv6 {
            let s = router_socket(&c.bridge()).map_err(fail("a socket for router advertisements"))?;
            let message = advertisement(net.network(), net.gateway(), c.forward != super::Forward::None);
            b.spawn("net-ra", move |stop| advertise(&s, &message, stop)).map_err(fail("a thread"))?;
        }
        Ok(b)
    }

    fn spawn(&mut self, name: &str, f: impl FnOnce(&EventFd) + Send + 'static) -> io::Result<()> {
        let stop = self.stop.clone();
        self.threads.push(std::thread::Builder::new().name(name.into()).spawn(move || f(&stop))?);
        Ok(())
    }
}

impl Drop for Builtin {
    fn drop(&mut self) {
        // Nobody reads it, so that it stays readable for all.
        let _ = self.stop.write(1);
        self.threads.drain(..).for_each(|t| _ = t.join());
    }
}

fn serve_dhcp(socket: &UdpSocket, server: &Shared, file: &Path, stop: &EventFd) {
    let mut buffer = [0; 1500];
    loop {
        if wait(&[stop.as_raw_fd(), socket.as_raw_fd()], None)[0] {
            return;
        }
        while let Ok((n, _)) = socket.recv_from(&mut buffer) {
            let mut s = ringfort_bus::lock(server);
            let Some(server) = s.as_mut() else { return };
            let time = now();
            let before = server.leases(time);
            let answer = server.handle(&buffer[..n], time);
            let after = server.leases(time);
            drop(s);
            if after != before {
                // A lease that could not be written is a lease all the same; the guest asks again after a restart.
                let _ = leases::write(file, &after);
            }
            if let Some(a) = answer {
                let to = a.to.unwrap_or(Ipv4Addr::BROADCAST);
                let _ = socket.send_to(&a.message, (to, 68));
            }
        }
    }
}

/// A query that was handed on.
struct Asked {
    number: [u8; 2],
    theirs: [u8; 2],
    socket: usize,
    client: SocketAddr,
    since: Instant,
}

fn address_of(name: &str, config: &NetworkConfig, leases: &[Lease]) -> Option<Ipv4Addr> {
    let name = match &config.domain {
        Some(d) => name.strip_suffix(d.as_str()).and_then(|n| n.strip_suffix('.')).unwrap_or(name),
        None => name,
    };
    let settled =
        config.hosts.iter().find(|h| h.name.as_deref().is_some_and(|n| n.eq_ignore_ascii_case(name)));
    settled.map(|h| h.address).or_else(|| {
        leases.iter().find(|l| l.name.as_deref().is_some_and(|n| n.eq_ignore_ascii_case(name))).and_then(
            |l| match l.address {
                IpAddr::V4(a) => Some(a),
                IpAddr::V6(_) => None,
            },
        )
    })
}

/// The host's name servers (resolv.conf(5)).
fn upstream() -> Vec<SocketAddr> {
    let text = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    text.lines()
        .filter_map(|l| l.strip_prefix("nameserver")?.split_whitespace().next()?.parse::<IpAddr>().ok())
        .map(|a| SocketAddr::new(a, 53))
        .collect()
}

fn serve_dns(sockets: &[UdpSocket], server: &Shared, config: &NetworkConfig, stop: &EventFd) {
    let out: Vec<UdpSocket> = [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()]
        .into_iter()
        .filter_map(|a| {
            let s = UdpSocket::bind((a, 0)).ok()?;
            s.set_nonblocking(true).ok()?;
            Some(s)
        })
        .collect();
    let mut fds = vec![stop.as_raw_fd()];
    fds.extend(sockets.iter().chain(&out).map(|s| s.as_raw_fd()));
    let mut asked: Vec<Asked> = Vec::new();
    let mut buffer = vec![0; dns::LONGEST];
    loop {
        if wait(&fds, None)[0] {
            return;
        }
        for (n, socket) in sockets.iter().enumerate() {
            while let Ok((len, client)) = socket.recv_from(&mut buffer) {
                let query = &buffer[..len];
                let Some(q) = dns::question(query) else { continue };
                let known = ringfort_bus::lock(server).as_ref().map_or(Vec::new(), |s| s.leases(now()));
                let own = config
                    .domain
                    .as_ref()
                    .is_some_and(|d| q.name == *d || q.name.ends_with(&format!(".{d}")));
                let found = address_of(&q.name, config, &known);
                if found.is_some() || own || !q.name.contains('.') {
                    let _ = socket.send_to(&dns::answer(query, &q, found), client);
                    continue;
                }
                asked.retain(|a| a.since.elapsed() < QUERY);
                let servers = upstream();
                let to = servers.first().copied().filter(|_| asked.len() < MOST_QUERIES);
                let via = to.and_then(|t| {
                    out.iter().find(|s| s.local_addr().is_ok_and(|a| a.is_ipv4() == t.is_ipv4()))
                });
                let (Some(to), Some(via)) = (to, via) else {
                    let _ = socket.send_to(&dns::failure(query, &q), client);
                    continue;
                };
                // A number that others cannot guess, and that is not in use.
                let number = std::iter::repeat_with(|| fastrand::u16(..).to_be_bytes())
                    .find(|i| asked.iter().all(|a| a.number != *i))
                    .unwrap_or_default();
                asked.push(Asked {
                    number,
                    theirs: [query[0], query[1]],
                    socket: n,
                    client,
                    since: Instant::now(),
                });
                buffer[..2].copy_from_slice(&number);
                let _ = via.send_to(&buffer[..len], to);
            }
        }
        for s in &out {
            while let Ok((len, from)) = s.recv_from(&mut buffer) {
                // Only the server that was asked is heard.
                if len < 12 || !upstream().contains(&from) {
                    continue;
                }
                if let Some(at) = asked.iter().position(|a| a.number == buffer[..2]) {
                    let a = asked.swap_remove(at);
                    buffer[..2].copy_from_slice(&a.theirs);
                    let _ = sockets[a.socket].send_to(&buffer[..len], a.client);
                }
            }
        }
    }
}

fn router_socket(bridge: &str) -> io::Result<Socket> {
    let s = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))?;
    s.bind_device(Some(bridge.as_bytes()))?;
    // RFC 4861 section 4.2: what came over a router is not taken.
    s.set_multicast_hops_v6(255)?;
    s.set_unicast_hops_v6(255)?;
    let index = crate::netlink::index_of(bridge)?;
    s.join_multicast_v6(&Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2), index)?;
    s.set_multicast_if_v6(index)?;
    s.set_multicast_loop_v6(false)?;
    s.set_nonblocking(true)?;
    Ok(s)
}

/// A router advertisement with prefix and name server (RFC 4861 section 4.2, RFC 8106). The kernel adds the checksum.
fn advertisement(prefix: IpAddr, dns: IpAddr, router: bool) -> Vec<u8> {
    let octets = |a: IpAddr| match a {
        IpAddr::V6(a) => a.octets(),
        IpAddr::V4(_) => [0; 16],
    };
    let lifetime: u16 = if router { 1800 } else { 0 };
    let mut m = vec![134, 0, 0, 0, 64, 0];
    m.extend(lifetime.to_be_bytes());
    m.extend([0; 8]);
    // Prefix: on the link, addresses are made of it.
    m.extend([3, 4, 64, 0xc0]);
    m.extend(86_400u32.to_be_bytes());
    m.extend(14_400u32.to_be_bytes());
    m.extend([0; 4]);
    m.extend(octets(prefix));
    m.extend([25, 3, 0, 0]);
    m.extend(1800u32.to_be_bytes());
    m.extend(octets(dns));
    m
}

fn advertise(socket: &Socket, message: &[u8], stop: &EventFd) {
    let index = socket.local_addr().ok().and_then(|a| a.as_socket_ipv6()).map_or(0, |a| a.scope_id());
    let all =
        SockAddr::from(std::net::SocketAddrV6::new(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1), 0, 0, index));
    let mut next = Instant::now();
    let mut buffer = Vec::new();
    loop {
        if Instant::now() >= next {
            let _ = socket.send_to(message, &all);
            next = Instant::now() + ADVERTISE;
        }
        let ready = wait(
            &[stop.as_raw_fd(), socket.as_raw_fd()],
            Some(next.saturating_duration_since(Instant::now())),
        );
        if ready[0] {
            return;
        }
        loop {
            buffer.clear();
            match crate::stream::receive(socket.as_raw_fd(), &mut buffer, 2048) {
                // Router solicitation.
                Ok(n) if n > 0 && buffer[0] == 133 => next = Instant::now(),
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
    }
}
