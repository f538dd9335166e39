//! The host's DNS servers, from /etc/resolv.conf.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

/// How often to look whether the file changed.
const LOOK: Duration = Duration::from_secs(5);
/// Most servers that are tried in turn.
const MOST: usize = 8;

/// Which server names are looked up at.
pub struct Resolver {
    path: PathBuf,
    /// The servers do not come from the file.
    fixed: bool,
    looked: Option<Instant>,
    changed: Option<SystemTime>,
    servers: Vec<SocketAddr>,
    /// Which of them is asked.
    current: usize,
}

impl Default for Resolver {
    fn default() -> Self {
        Resolver {
            path: "/etc/resolv.conf".into(),
            fixed: false,
            looked: None,
            changed: None,
            servers: Vec::new(),
            current: 0,
        }
    }
}

impl Resolver {
    /// These servers, or the host's if there is none.
    pub fn new(servers: &[SocketAddr]) -> Resolver {
        Resolver { fixed: !servers.is_empty(), servers: servers.to_vec(), ..Resolver::default() }
    }

    /// The host's server that is to be asked.
    pub fn address(&mut self) -> Option<SocketAddr> {
        if !self.fixed && self.looked.is_none_or(|l| l.elapsed() >= LOOK) {
            self.looked = Some(Instant::now());
            let changed = fs::metadata(&self.path).and_then(|m| m.modified()).ok();
            if self.servers.is_empty() || changed != self.changed {
                self.changed = changed;
                self.current = 0;
                self.servers = fs::read_to_string(&self.path).map(|t| servers(&t)).unwrap_or_default();
            }
        }
        self.servers.get(self.current).copied()
    }

    /// `server` does not answer: the next one is asked from now on. False if there is no other.
    pub fn failed(&mut self, server: SocketAddr) -> bool {
        if self.servers.get(self.current) == Some(&server) {
            self.current = (self.current + 1) % self.servers.len();
        }
        self.servers.get(self.current).is_some_and(|s| *s != server)
    }
}

/// The `nameserver` lines that can be used (resolv.conf(5)).
fn servers(text: &str) -> Vec<SocketAddr> {
    let usable = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver")).then_some(())?;
        // A zone (fe80::1%eth0) is not understood here; another line may do.
        Some(SocketAddr::new(words.next()?.parse::<IpAddr>().ok()?, 53))
    });
    usable.take(MOST).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usable_servers_count_in_their_order() {
        let text = "# nameserver 1.1.1.1\nsearch a b\nnameserver fe80::1%eth0\n nameserver\t10.1.2.3 x\nnameserver 9.9.9.9\n";
        assert_eq!(servers(text), ["10.1.2.3:53".parse().unwrap(), "9.9.9.9:53".parse().unwrap()]);
        assert_eq!(servers("nameserver\nnameserver ::1\n"), ["[::1]:53".parse().unwrap()]);
        assert_eq!(servers("options edns0"), []);
    }

    #[test]
    fn servers_that_fail_are_passed_over() {
        let [a, b] = ["1.1.1.1:53".parse().unwrap(), "2.2.2.2:53".parse().unwrap()];
        let mut r = Resolver::new(&[a, b]);
        assert_eq!(r.address(), Some(a));
        assert!(r.failed(a));
        assert!(r.failed(a), "told twice, it is still the other's turn");
        assert_eq!(r.address(), Some(b));
        assert!(r.failed(b));
        assert_eq!(r.address(), Some(a));
        assert!(!Resolver::new(&[a]).failed(a));
    }
}
