//! Where sockets are: `unix:PATH`, `tcp:HOST:PORT`, `udp:HOST:PORT`.

use crate::NetError;
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use std::fmt;
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

/// Longest path of a unix socket (unix(7): 108 with the final NUL).
const LONGEST_PATH: usize = 107;

/// A stream socket's place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum StreamAddress {
    /// A unix socket.
    Unix(PathBuf),
    /// TCP: host and port.
    Tcp(String),
}

/// A datagram socket's place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DatagramAddress {
    /// A unix socket.
    Unix(PathBuf),
    /// UDP: host and port.
    Udp(String),
}

fn path(p: &str) -> Result<PathBuf, String> {
    match p.len() {
        0 => Err("a path must follow unix:".into()),
        1..=LONGEST_PATH => Ok(p.into()),
        n => Err(format!("a path of {n} bytes; a socket's has at most {LONGEST_PATH}")),
    }
}

fn host_port(text: &str) -> Result<String, String> {
    let (host, port) = text.rsplit_once(':').ok_or_else(|| format!("'{text}': give HOST:PORT"))?;
    port.parse::<u16>().map_err(|_| format!("'{port}' is no port; give 0 to 65535"))?;
    if host.is_empty() {
        return Err(format!("'{text}': give HOST:PORT"));
    }
    Ok(text.to_owned())
}

impl FromStr for StreamAddress {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("unix", p)) => path(p).map(StreamAddress::Unix),
            Some(("tcp", rest)) => host_port(rest).map(StreamAddress::Tcp),
            _ => Err(format!("'{text}': give unix:PATH or tcp:HOST:PORT")),
        }
    }
}

impl FromStr for DatagramAddress {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("unix", p)) => path(p).map(DatagramAddress::Unix),
            Some(("udp", rest)) => host_port(rest).map(DatagramAddress::Udp),
            _ => Err(format!("'{text}': give unix:PATH or udp:HOST:PORT")),
        }
    }
}

impl fmt::Display for StreamAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StreamAddress::Unix(p) => write!(f, "unix:{}", p.display()),
            StreamAddress::Tcp(a) => write!(f, "tcp:{a}"),
        }
    }
}

impl fmt::Display for DatagramAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DatagramAddress::Unix(p) => write!(f, "unix:{}", p.display()),
            DatagramAddress::Udp(a) => write!(f, "udp:{a}"),
        }
    }
}

/// The first address that a host and port stand for.
pub fn look_up(host_port: &str) -> io::Result<SocketAddr> {
    host_port.to_socket_addrs()?.next().ok_or_else(|| ErrorKind::AddrNotAvailable.into())
}

/// A stream socket that fits an address.
pub fn socket(to: &SockAddr) -> io::Result<Socket> {
    let protocol = if to.is_unix() { None } else { Some(Protocol::TCP) };
    Socket::new(Domain::from(i32::from(to.family())), Type::STREAM, protocol)
}

/// Remove a socket that nobody listens at any more.
///
/// # Errors
/// When somebody does, or when it is no socket.
pub fn clear_stale(path: &Path, kind: Type) -> io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Err(_) => Ok(()),
        Ok(m) if !m.file_type().is_socket() => Err(ErrorKind::AlreadyExists.into()),
        Ok(_) => {
            let probe = Socket::new(Domain::UNIX, kind, None)?;
            match probe.connect(&SockAddr::unix(path)?) {
                Err(e) if e.kind() == ErrorKind::ConnectionRefused => std::fs::remove_file(path),
                _ => Err(ErrorKind::AddrInUse.into()),
            }
        }
    }
}

impl StreamAddress {
    /// What to connect to.
    ///
    /// # Errors
    /// When the host has no address.
    pub fn resolve(&self) -> Result<SockAddr, NetError> {
        match self {
            StreamAddress::Unix(p) => SockAddr::unix(p),
            StreamAddress::Tcp(a) => look_up(a).map(SockAddr::from),
        }
        .map_err(NetError::host(self.to_string()))
    }

    pub(super) fn connect(&self, to: &SockAddr, patience: Duration) -> Result<Socket, NetError> {
        let connect = || {
            let s = socket(to)?;
            s.connect_timeout(to, patience)?;
            Ok(s)
        };
        connect().map_err(NetError::advise(
            format!("connecting to {self}"),
            "; start the other side first, or give reconnect=SECONDS to have it tried again",
        ))
    }

    /// Listen. A unix socket that nobody listens at any more is replaced.
    pub(super) fn listen(&self) -> Result<Socket, NetError> {
        let at = self.resolve()?;
        let listen = || {
            let s = socket(&at)?;
            match self {
                StreamAddress::Unix(p) => clear_stale(p, Type::STREAM)?,
                StreamAddress::Tcp(_) => s.set_reuse_address(true)?,
            }
            s.bind(&at)?;
            s.listen(1)?;
            s.set_nonblocking(true)?;
            Ok(s)
        };
        listen().map_err(NetError::advise(format!("listening at {self}"), "; choose another address"))
    }

    /// Remove the name of a socket that was listened at.
    pub(super) fn forget(&self) {
        if let StreamAddress::Unix(p) = self {
            let _ = std::fs::remove_file(p);
        }
    }
}

impl TryFrom<String> for StreamAddress {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<StreamAddress> for String {
    fn from(a: StreamAddress) -> String {
        a.to_string()
    }
}

impl TryFrom<String> for DatagramAddress {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<DatagramAddress> for String {
    fn from(a: DatagramAddress) -> String {
        a.to_string()
    }
}
