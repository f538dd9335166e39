//! The built-in name server at work: questions by UDP and TCP (RFC 1035 section 4.2, RFC 7766), answers for guests, everything else handed on
//! to the host's servers.

use super::config::NetworkConfig;
use super::dns;
use super::leases::Lease;
use super::service::{Servers, now, wait};
use crate::resolver::Resolver;
use ringfort_bus::lock;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;

/// Queries that wait for the host's servers.
const MOST_QUERIES: usize = 1024;
/// How long they do.
const QUERY: Duration = Duration::from_secs(10);
/// A server that has not answered after this time is passed over.
const SILENCE: Duration = Duration::from_secs(2);
/// Guests' connections at a time, and how long one may be silent.
const MOST_CONNECTIONS: usize = 32;
const IDLE: Duration = Duration::from_secs(10);

/// What the name server goes by.
#[derive(Clone)]
pub struct Names {
    servers: Arc<Mutex<Servers>>,
    config: Arc<NetworkConfig>,
    resolver: Arc<Mutex<Resolver>>,
    connections: Arc<AtomicUsize>,
}

/// A query that was handed on.
struct Asked {
    number: [u8; 2],
    /// The question as it came.
    query: Vec<u8>,
    socket: usize,
    client: SocketAddr,
    server: SocketAddr,
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
        leases.iter().find_map(|l| match l.address {
            IpAddr::V4(a) if l.name.as_deref().is_some_and(|n| n.eq_ignore_ascii_case(name)) => Some(a),
            _ => None,
        })
    })
}

impl Names {
    /// A name server for a network whose guests `servers` know.
    pub fn new(config: &NetworkConfig, servers: Arc<Mutex<Servers>>) -> Names {
        Names {
            servers,
            config: Arc::new(config.clone()),
            resolver: Arc::default(),
            connections: Arc::default(),
        }
    }

    /// The answer that needs nobody else: to what is the network's own business.
    fn own(&self, query: &[u8], q: &dns::Question) -> Option<Vec<u8>> {
        let known = lock(&self.servers).leases(now());
        let of_domain = |d: &String| q.name == *d || q.name.ends_with(&format!(".{d}"));
        let found = address_of(&q.name, &self.config, &known);
        let own =
            found.is_some() || self.config.domain.as_ref().is_some_and(of_domain) || !q.name.contains('.');
        own.then(|| dns::answer(query, q, found))
    }

    /// Serve questions by UDP that come to `sockets`, until `stop` can be read.
    pub fn serve_udp(&self, sockets: &[UdpSocket], stop: &EventFd) {
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
        while !wait(&fds, None)[0] {
            for (n, socket) in sockets.iter().enumerate() {
                while let Ok((len, client)) = socket.recv_from(&mut buffer) {
                    let Some(q) = dns::question(&buffer[..len]) else { continue };
                    if let Some(answer) = self.own(&buffer[..len], &q) {
                        let _ = socket.send_to(&answer, client);
                        continue;
                    }
                    // Whoever asks again tells that the server was silent.
                    for a in asked.iter().filter(|a| a.since.elapsed() > SILENCE) {
                        lock(&self.resolver).failed(a.server);
                    }
                    asked.retain(|a| a.since.elapsed() < QUERY);
                    let to = lock(&self.resolver).address().filter(|_| asked.len() < MOST_QUERIES);
                    let via = to.and_then(|t| {
                        out.iter().find(|s| s.local_addr().is_ok_and(|a| a.is_ipv4() == t.is_ipv4()))
                    });
                    let (Some(server), Some(via)) = (to, via) else {
                        let _ = socket.send_to(&dns::failure(&buffer[..len], &q), client);
                        continue;
                    };
                    // A number that others cannot guess, and that is not in use.
                    let number = std::iter::repeat_with(|| fastrand::u16(..).to_be_bytes())
                        .find(|i| asked.iter().all(|a| a.number != *i))
                        .unwrap_or_default();
                    let query = buffer[..len].to_vec();
                    asked.push(Asked { number, query, socket: n, client, server, since: Instant::now() });
                    buffer[..2].copy_from_slice(&number);
                    let _ = via.send_to(&buffer[..len], server);
                }
            }
            for s in &out {
                while let Ok((len, from)) = s.recv_from(&mut buffer) {
                    // Only the server that was asked is heard.
                    let is_answer =
                        |a: &Asked| a.server == from && dns::responds(&buffer[..len], a.number, &a.query);
                    if let Some(at) = asked.iter().position(is_answer) {
                        let a = asked.swap_remove(at);
                        buffer[..2].copy_from_slice(&a.query[..2]);
                        let _ = sockets[a.socket].send_to(&buffer[..len], a.client);
                    }
                }
            }
        }
    }

    /// Serve questions by TCP that come to `listeners`, until `stop` can be read. Connections that are open then end by themselves.
    pub fn serve_tcp(&self, listeners: &[TcpListener], stop: &EventFd) {
        let mut fds = vec![stop.as_raw_fd()];
        fds.extend(listeners.iter().map(AsRawFd::as_raw_fd));
        while !wait(&fds, None)[0] {
            for l in listeners {
                while let Ok((stream, _)) = l.accept() {
                    if self.connections.fetch_add(1, Ordering::SeqCst) >= MOST_CONNECTIONS {
                        self.connections.fetch_sub(1, Ordering::SeqCst);
                        continue;
                    }
                    let names = self.clone();
                    let serve = move || {
                        // A guest that goes away in the middle is no failure.
                        let _ = names.converse(stream);
                        names.connections.fetch_sub(1, Ordering::SeqCst);
                    };
                    if std::thread::Builder::new().name("net-dns-tcp".into()).spawn(serve).is_err() {
                        self.connections.fetch_sub(1, Ordering::SeqCst);
                    }
                }
            }
        }
    }

    fn converse(&self, mut client: TcpStream) -> io::Result<()> {
        client.set_nonblocking(false)?;
        client.set_read_timeout(Some(IDLE))?;
        client.set_write_timeout(Some(IDLE))?;
        loop {
            let query = message(&mut client)?;
            let Some(q) = dns::question(&query) else { return Ok(()) };
            let answer = match self.own(&query, &q) {
                Some(a) => a,
                None => self.ask(&query).unwrap_or_else(|_| dns::failure(&query, &q)),
            };
            write_message(&mut client, &answer)?;
        }
    }

    /// Ask the host's servers, one after the other.
    fn ask(&self, query: &[u8]) -> io::Result<Vec<u8>> {
        loop {
            let Some(server) = lock(&self.resolver).address() else { return Err(ErrorKind::NotFound.into()) };
            let asked = (|| {
                let mut s = TcpStream::connect_timeout(&server, SILENCE)?;
                s.set_read_timeout(Some(QUERY))?;
                s.set_write_timeout(Some(QUERY))?;
                write_message(&mut s, query)?;
                message(&mut s)
            })();
            match asked {
                Ok(a) if dns::responds(&a, [query[0], query[1]], query) => return Ok(a),
                Ok(_) => return Err(ErrorKind::InvalidData.into()),
                // The last of them is asked next time, too; until then this question has waited long enough.
                Err(e) if !lock(&self.resolver).failed(server) || e.kind() == ErrorKind::WouldBlock => {
                    return Err(e);
                }
                Err(_) => {}
            }
        }
    }
}

/// A message behind its length.
fn message(from: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut len = [0; 2];
    from.read_exact(&mut len)?;
    let mut m = vec![0; usize::from(u16::from_be_bytes(len))];
    from.read_exact(&mut m)?;
    Ok(m)
}

fn write_message(to: &mut TcpStream, m: &[u8]) -> io::Result<()> {
    let len = u16::try_from(m.len()).map_err(|_| ErrorKind::InvalidData)?;
    to.write_all(&[&len.to_be_bytes()[..], m].concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    fn query(name: &str, id: u8) -> Vec<u8> {
        let mut m = vec![0, id, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for l in name.split('.') {
            m.push(l.len() as u8);
            m.extend(l.as_bytes());
        }
        m.extend([0, 0, 1, 0, 1]);
        m
    }

    /// A name server of the host's that answers every question with an address, by TCP.
    fn upstream(answers: usize) -> SocketAddr {
        let l = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = l.local_addr().unwrap();
        std::thread::spawn(move || {
            for mut s in l.incoming().take(answers).map_while(Result::ok) {
                let q = message(&mut s).unwrap();
                let parsed = dns::question(&q).unwrap();
                write_message(&mut s, &dns::answer(&q, &parsed, Some([9, 9, 9, 9].into()))).unwrap();
            }
        });
        at
    }

    #[test]
    fn questions_over_tcp_one_after_the_other_in_a_connection() {
        let mut config = NetworkConfig::new("lab", "10.9.0.0/24".parse().ok());
        config.domain = Some("lab.test".into());
        config.hosts = vec!["52:54:00:00:00:01,10.9.0.7,seven".parse().unwrap()];
        let mut names = Names::new(&config, Arc::default());
        // A server where nobody listens, and one that answers.
        let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        names.resolver = Arc::new(Mutex::new(Resolver::new(&[nobody, upstream(1)])));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let at = listener.local_addr().unwrap();
        let stop = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let (of_thread, served) = (stop.clone(), names.clone());
        let thread = std::thread::spawn(move || served.serve_tcp(&[listener], &of_thread));
        let mut s = TcpStream::connect(at).unwrap();
        for (id, name, last) in [(1, "seven.lab.test", [10, 9, 0, 7]), (2, "example.org", [9, 9, 9, 9])] {
            write_message(&mut s, &query(name, id)).unwrap();
            let a = message(&mut s).unwrap();
            assert_eq!((a[1], a[7], &a[a.len() - 4..]), (id, 1, &last[..]), "{name}");
        }
        // Nobody is left who answers: a failure, and no silence.
        names.resolver.lock().unwrap().failed(nobody);
        *names.resolver.lock().unwrap() = Resolver::new(&[nobody]);
        write_message(&mut s, &query("example.net", 3)).unwrap();
        assert_eq!(message(&mut s).unwrap()[3] & 15, 2);
        // Nonsense ends the connection.
        write_message(&mut s, &[0; 5]).unwrap();
        assert_eq!(s.read(&mut [0; 8]).unwrap(), 0);
        stop.write(1).unwrap();
        thread.join().unwrap();
    }

    #[test]
    fn a_silent_server_is_passed_over_by_udp() {
        let config = NetworkConfig::new("lab", "10.9.0.0/24".parse().ok());
        let mut names = Names::new(&config, Arc::default());
        let [silent, good] = [0, 1].map(|_| UdpSocket::bind("127.0.0.1:0").unwrap());
        let both = [silent.local_addr().unwrap(), good.local_addr().unwrap()];
        names.resolver = Arc::new(Mutex::new(Resolver::new(&both)));
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_nonblocking(true).unwrap();
        let at = socket.local_addr().unwrap();
        let stop = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let of_thread = stop.clone();
        let thread = std::thread::spawn(move || names.serve_udp(&[socket], &of_thread));
        std::thread::spawn(move || {
            let mut q = [0; 512];
            while let Ok((n, from)) = good.recv_from(&mut q) {
                let parsed = dns::question(&q[..n]).unwrap();
                good.send_to(&dns::answer(&q[..n], &parsed, Some([8; 4].into())), from).unwrap();
            }
        });
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        let mut answer = [0; 512];
        let got = (0..60).find_map(|_| {
            client.send_to(&query("example.org", 7), at).unwrap();
            client.recv(&mut answer).ok()
        });
        assert_eq!(answer[got.expect("an answer") - 4..][..4], [8; 4]);
        drop(silent);
        stop.write(1).unwrap();
        thread.join().unwrap();
    }
}
