//! The host's DNS server, from /etc/resolv.conf.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

/// How often to look whether the file changed.
const LOOK: Duration = Duration::from_secs(5);

/// Which server names are looked up at.
pub struct Resolver {
    path: PathBuf,
    looked: Option<Instant>,
    changed: Option<SystemTime>,
    server: Option<SocketAddr>,
}

impl Default for Resolver {
    fn default() -> Self {
        Resolver { path: "/etc/resolv.conf".into(), looked: None, changed: None, server: None }
    }
}

impl Resolver {
    /// A server that is known otherwise.
    #[cfg(test)]
    pub fn fixed(server: SocketAddr) -> Resolver {
        let looked = Some(Instant::now() + Duration::from_secs(3600));
        Resolver { looked, server: Some(server), ..Resolver::default() }
    }

    /// The host's first server.
    pub fn address(&mut self) -> Option<SocketAddr> {
        if self.looked.is_some_and(|l| l.elapsed() < LOOK) {
            return self.server;
        }
        self.looked = Some(Instant::now());
        let changed = fs::metadata(&self.path).and_then(|m| m.modified()).ok();
        if self.server.is_none() || changed != self.changed {
            self.changed = changed;
            self.server = fs::read_to_string(&self.path).ok().and_then(|t| first_server(&t));
        }
        self.server
    }
}

/// The first `nameserver` line that can be used (resolv.conf(5)).
fn first_server(text: &str) -> Option<SocketAddr> {
    text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver")).then_some(())?;
        // A zone (fe80::1%eth0) is not understood here; the next line may do.
        Some(SocketAddr::new(words.next()?.parse::<IpAddr>().ok()?, 53))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_usable_server_counts() {
        let text = "# nameserver 1.1.1.1\nsearch a b\nnameserver fe80::1%eth0\n nameserver\t10.1.2.3 x\nnameserver 9.9.9.9\n";
        assert_eq!(first_server(text), Some("10.1.2.3:53".parse().unwrap()));
        assert_eq!(first_server("nameserver\nnameserver ::1\n"), Some("[::1]:53".parse().unwrap()));
        assert_eq!(first_server("options edns0"), None);
    }
}
