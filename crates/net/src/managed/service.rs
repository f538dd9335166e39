//! Who answers a network's guests: dnsmasq as a child, or threads of this process.

use super::config::{NetworkConfig, Service};
use super::leases::{self, Lease};
use super::names::Names;
use super::{dhcp, dhcp6};
use crate::NetError;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use std::fs;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener, UdpSocket};
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
        // Guests make addresses of their own, and may ask for one besides.
        let [first, last] = [dhcp6::RANGE.0, dhcp6::RANGE.1].map(|n| net.nth(u128::from(n)));
        lines.push(format!("dhcp-range={first},{last},slaac,64,{}s", dhcp6::LEASE));
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

pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Wait until one of `fds` can be read; gives which of them.
pub(super) fn wait(fds: &[RawFd], patience: Option<Duration>) -> Vec<bool> {
    let mut polls: Vec<libc::pollfd> =
        fds.iter().map(|&fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 }).collect();
    let timeout = patience.map_or(-1, |d| d.as_millis().min(600_000) as i32);
    // SAFETY: the list is valid for its length. An interrupted call says that nothing can be read.
    if unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, timeout) } < 0 {
        return vec![false; fds.len()];
    }
    polls.iter().map(|p| p.revents != 0).collect()
}

fn opened(bridge: &str, at: SocketAddr, kind: Type) -> io::Result<Socket> {
    let protocol = if kind == Type::DGRAM { Protocol::UDP } else { Protocol::TCP };
    let s = Socket::new(Domain::for_address(at), kind, Some(protocol))?;
    s.set_reuse_address(true)?;
    s.bind_device(Some(bridge.as_bytes()))?;
    s.set_nonblocking(true)?;
    if at.is_ipv6() {
        s.set_only_v6(true)?;
    }
    s.bind(&at.into())?;
    Ok(s)
}

fn bound(bridge: &str, at: SocketAddr) -> io::Result<UdpSocket> {
    let s = opened(bridge, at, Type::DGRAM)?;
    if at.is_ipv4() {
        s.set_broadcast(true)?;
    }
    Ok(s.into())
}

fn listening(bridge: &str, at: SocketAddr) -> io::Result<TcpListener> {
    let s = opened(bridge, at, Type::STREAM)?;
    s.listen(64)?;
    Ok(s.into())
}

/// Who has which address.
#[derive(Default)]
pub(super) struct Servers {
    v4: Option<dhcp::Server>,
    v6: Option<dhcp6::Server>,
}

impl Servers {
    /// The leases that are in use at `now`, in seconds since 1970.
    pub(super) fn leases(&self, now: u64) -> Vec<Lease> {
        let mut all = self.v4.as_ref().map_or(Vec::new(), |s| s.leases(now));
        all.extend(self.v6.iter().flat_map(|s| s.leases(now)));
        all
    }
}

type Shared = Arc<Mutex<Servers>>;

impl Builtin {
    fn start(c: &NetworkConfig, dir: &Path) -> Result<Builtin, NetError> {
        let fail = |what: &str| NetError::host(format!("{}: {what}", c.bridge()));
        let stop = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(fail("an event descriptor"))?);
        let mut b = Builtin { stop, threads: Vec::new() };
        let file = dir.join(LEASES);
        let before = leases::read(&file).map_err(fail("leases"))?;
        let servers: Shared = Arc::new(Mutex::new(Servers {
            v4: dhcp::Server::new(c, &before),
            v6: dhcp6::Server::new(c, c.mac(), &before),
        }));
        if c.ipv4.is_some() {
            let s = bound(&c.bridge(), SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 67))
                .map_err(fail("DHCP port 67"))?;
            let (servers, file) = (servers.clone(), file.clone());
            b.spawn("net-dhcp", move |stop| serve_dhcp(&s, &servers, &file, stop))
                .map_err(fail("a thread"))?;
        }
        if c.ipv6.is_some() {
            let s = bound(&c.bridge(), SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 547))
                .and_then(|s| {
                    s.join_multicast_v6(&ALL_SERVERS, crate::netlink::index_of(&c.bridge())?)?;
                    Ok(s)
                })
                .map_err(fail("DHCPv6 port 547"))?;
            let servers = servers.clone();
            b.spawn("net-dhcp6", move |stop| serve_dhcp6(&s, &servers, &file, stop))
                .map_err(fail("a thread"))?;
        }
        let at = || c.networks().map(|n| SocketAddr::new(n.gateway(), 53));
        let sockets = at().map(|a| bound(&c.bridge(), a)).collect::<io::Result<Vec<_>>>();
        let sockets = sockets.map_err(fail("DNS port 53"))?;
        let listeners = at().map(|a| listening(&c.bridge(), a)).collect::<io::Result<Vec<_>>>();
        let listeners = listeners.map_err(fail("DNS port 53 by TCP"))?;
        let names = Names::new(c, servers);
        let of_udp = names.clone();
        b.spawn("net-dns", move |stop| of_udp.serve_udp(&sockets, stop)).map_err(fail("a thread"))?;
        b.spawn("net-dns-tcp", move |stop| names.serve_tcp(&listeners, stop)).map_err(fail("a thread"))?;
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

/// Have a server answer, and write down who has which address if that changed.
fn handle<A>(
    servers: &Shared,
    file: &Path,
    answer: impl FnOnce(&mut Servers, u64) -> Option<A>,
) -> Option<A> {
    let mut s = ringfort_bus::lock(servers);
    let time = now();
    let before = s.leases(time);
    let answer = answer(&mut s, time);
    let after = s.leases(time);
    if after != before {
        // A lease that could not be written is a lease all the same; the guest asks again after a restart.
        let _ = leases::write(file, &after);
    }
    answer
}

fn serve_dhcp(socket: &UdpSocket, servers: &Shared, file: &Path, stop: &EventFd) {
    let mut buffer = [0; 1500];
    while !wait(&[stop.as_raw_fd(), socket.as_raw_fd()], None)[0] {
        while let Ok((n, _)) = socket.recv_from(&mut buffer) {
            let answer = handle(servers, file, |s, time| s.v4.as_mut()?.handle(&buffer[..n], time));
            if let Some(a) = answer {
                let to = a.to.unwrap_or(Ipv4Addr::BROADCAST);
                let _ = socket.send_to(&a.message, (to, 68));
            }
        }
    }
}

/// All servers and relays of DHCPv6 on a link (RFC 8415 section 7.1).
const ALL_SERVERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2);

fn serve_dhcp6(socket: &UdpSocket, servers: &Shared, file: &Path, stop: &EventFd) {
    let mut buffer = [0; 1500];
    while !wait(&[stop.as_raw_fd(), socket.as_raw_fd()], None)[0] {
        while let Ok((n, from)) = socket.recv_from(&mut buffer) {
            // Clients speak from their link-local addresses.
            let SocketAddr::V6(from) = from else { continue };
            if !from.ip().is_unicast_link_local() {
                continue;
            }
            let answer = handle(servers, file, |s, time| s.v6.as_mut()?.handle(&buffer[..n], time));
            if let Some(m) = answer {
                let _ = socket.send_to(&m, SocketAddrV6::new(*from.ip(), 546, 0, from.scope_id()));
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
    // Addresses and more are to be had by DHCPv6.
    let mut m = vec![134, 0, 0, 0, 64, 0xc0];
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
