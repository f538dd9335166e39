//! Each frame in a datagram: over UDP, a multicast group, or unix sockets.

use super::address::{self, DatagramAddress};
use crate::poller::Poller;
use crate::{MAX_FRAME, NetBackend, NetError, NetEvents, Offloads, Sent, VnetHeader};
use ringfort_bus::lock;
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};
use vmm_sys_util::epoll::EventSet;

/// Own addresses that are kept, to know what comes back from a group.
const OWN: usize = 8;

/// Where datagrams come in and go to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DatagramConfig {
    /// Where they come in. With a group it is the address of the interface to be used, and may be left out.
    pub local: Option<DatagramAddress>,
    /// Where they go to: another machine, or a group.
    pub remote: DatagramAddress,
}

impl DatagramConfig {
    /// What is wrong with it: the option, and what to do.
    pub fn problems(&self) -> Vec<(&'static str, String)> {
        match (&self.local, &self.remote) {
            (None, DatagramAddress::Unix(_)) => {
                vec![("local", "give unix:PATH for where frames come in".into())]
            }
            (Some(DatagramAddress::Unix(_)), DatagramAddress::Udp(_))
            | (Some(DatagramAddress::Udp(_)), DatagramAddress::Unix(_)) => {
                vec![("local", "give both as unix: or both as udp:".into())]
            }
            _ => Vec::new(),
        }
    }
}

/// A cable, or a hub (a multicast group), over datagrams.
pub struct Datagrams {
    _poller: Poller,
    socket: Arc<Socket>,
    to: SockAddr,
    /// Source addresses that the guest has used, if what it sends comes back.
    own: Option<Mutex<Vec<[u8; 6]>>>,
    events: Arc<OnceLock<Arc<dyn NetEvents>>>,
    /// To be removed with the socket.
    path: Option<PathBuf>,
}

impl Datagrams {
    /// Bind the socket.
    ///
    /// # Errors
    /// [`NetError`]; nothing is left behind then.
    pub fn new(config: &DatagramConfig) -> Result<Datagrams, NetError> {
        if let Some((option, what)) = config.problems().into_iter().next() {
            return Err(NetError::Option { option, what });
        }
        let fail = |what: String| NetError::advise(what, "; choose another address");
        let (socket, to, group, path) = match (&config.local, &config.remote) {
            (Some(DatagramAddress::Unix(at)), DatagramAddress::Unix(to)) => {
                let bind = || {
                    let s = Socket::new(Domain::UNIX, Type::DGRAM, None)?;
                    address::clear_stale(at, Type::DGRAM)?;
                    s.bind(&SockAddr::unix(at)?)?;
                    Ok((s, SockAddr::unix(to)?))
                };
                let (s, to) = bind().map_err(fail(format!("unix:{}", at.display())))?;
                (s, to, false, Some(at.clone()))
            }
            (local, DatagramAddress::Udp(to)) => {
                let shown = config.remote.to_string();
                let to = address::look_up(to).map_err(NetError::host(shown.clone()))?;
                let local = match local {
                    Some(DatagramAddress::Udp(at)) => {
                        Some(address::look_up(at).map_err(NetError::host(format!("udp:{at}")))?)
                    }
                    _ => None,
                };
                let group = to.ip().is_multicast();
                let s = if group {
                    join(to, local).map_err(fail(shown))?
                } else {
                    let s = Socket::new(Domain::for_address(to), Type::DGRAM, Some(Protocol::UDP))
                        .map_err(fail(shown.clone()))?;
                    if let Some(at) = local {
                        s.bind(&at.into()).map_err(fail(format!("local=udp:{at}")))?;
                    }
                    // Only the other side is to be heard, and the host tells nothing about a port that is not open yet.
                    s.connect(&to.into()).map_err(fail(shown))?;
                    s
                };
                (s, SockAddr::from(to), group, None)
            }
            // Refused above.
            (_, DatagramAddress::Unix(to)) => {
                let what = format!("unix:{}: there is no local socket", to.display());
                return Err(NetError::Option { option: "local", what });
            }
        };
        let events: Arc<OnceLock<Arc<dyn NetEvents>>> = Arc::default();
        let (of_thread, socket) = (events.clone(), Arc::new(socket));
        let poller = socket.set_nonblocking(true).and_then(|()| {
            Poller::start("net-dgram", &[socket.as_raw_fd()], EventSet::IN, move |_, ready| {
                if ready.readable
                    && let Some(e) = of_thread.get()
                {
                    e.take_now(0);
                }
            })
        });
        match poller {
            Ok(poller) => {
                Ok(Datagrams { _poller: poller, socket, to, own: group.then(Mutex::default), events, path })
            }
            Err(e) => {
                path.iter().for_each(|p| _ = std::fs::remove_file(p));
                Err(NetError::host("a thread for the network")(e))
            }
        }
    }

    /// Where datagrams come in, if that is UDP.
    pub fn local_address(&self) -> Option<SocketAddr> {
        self.socket.local_addr().ok()?.as_socket()
    }

    fn note_own(&self, frame: &[u8]) {
        if let (Some(own), Some(mac)) = (&self.own, frame.get(6..12).and_then(|m| m.try_into().ok())) {
            let mut own = lock(own);
            if !own.contains(&mac) {
                if own.len() == OWN {
                    own.remove(0);
                }
                own.push(mac);
            }
        }
    }

    fn is_own(&self, frame: &[u8]) -> bool {
        self.own
            .as_ref()
            .is_some_and(|own| frame.get(6..12).is_some_and(|m| lock(own).iter().any(|o| o == m)))
    }
}

fn join(group: SocketAddr, interface: Option<SocketAddr>) -> io::Result<Socket> {
    let s = Socket::new(Domain::for_address(group), Type::DGRAM, Some(Protocol::UDP))?;
    s.set_reuse_address(true)?;
    s.bind(&group.into())?;
    match group.ip() {
        IpAddr::V4(g) => {
            let at = match interface.map(|i| i.ip()) {
                Some(IpAddr::V4(a)) => a,
                _ => Ipv4Addr::UNSPECIFIED,
            };
            s.join_multicast_v4(&g, &at)?;
            s.set_multicast_if_v4(&at)?;
            s.set_multicast_loop_v4(true)?;
        }
        IpAddr::V6(g) => {
            s.join_multicast_v6(&g, 0)?;
            s.set_multicast_loop_v6(true)?;
        }
    }
    Ok(s)
}

impl Drop for Datagrams {
    fn drop(&mut self) {
        self.path.iter().for_each(|p| _ = std::fs::remove_file(p));
    }
}

impl NetBackend for Datagrams {
    fn accepts(&self) -> Offloads {
        Offloads::default()
    }

    fn produces(&self) -> Offloads {
        Offloads::default()
    }

    fn attach(&self, events: Arc<dyn NetEvents>) {
        if self.events.set(events.clone()).is_ok() {
            events.readable(0);
        }
    }

    fn set_offloads(&self, _offloads: Offloads) {}

    fn send(&self, _pair: u16, _header: &VnetHeader, frame: &[u8]) -> Sent {
        self.note_own(frame);
        // Nobody there, or no room: a network loses frames.
        let _ = match (self.path.is_some() || self.own.is_some(), frame) {
            (true, f) => self.socket.send_to(f, &self.to),
            (false, f) => self.socket.send(f),
        };
        Sent::Done
    }

    fn receive(&self, _pair: u16, frame: &mut Vec<u8>) -> Option<VnetHeader> {
        loop {
            frame.clear();
            match super::calls::receive(self.socket.as_raw_fd(), frame, MAX_FRAME) {
                Ok(0) => {}
                Ok(_) if self.is_own(frame) => {}
                Ok(_) => return Some(VnetHeader::default()),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return None,
                // A host that has no such port open says so once for each frame sent to it.
                Err(e)
                    if matches!(e.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::Interrupted) => {}
                Err(_) => return None,
            }
        }
    }
}
