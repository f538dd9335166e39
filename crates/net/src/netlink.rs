//! Links and addresses of the host, by route netlink (rtnetlink(7); Linux include/uapi/linux/rtnetlink.h and if_link.h).
//!
//! The few messages that bridges and taps need are put together here: the crates that there are for it bring an
//! asynchronous run time, which the process of a machine has none of.

use std::ffi::CString;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Longest name of a link.
pub const NAME_MAX: usize = libc::IFNAMSIZ - 1;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const HEADER: usize = 16;
/// Bytes of `ifinfomsg`.
const LINK: usize = 16;
/// Bytes of `ifaddrmsg`.
const ADDRESS: usize = 8;
/// Bytes of `rtmsg`.
const ROUTE: usize = 12;
/// Bytes taken of an answer at a time.
const ANSWER: usize = 64 << 10;
/// Marks an attribute that holds attributes.
const NESTED: u16 = 1 << 15;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_MASTER: u16 = 10;
const IFLA_PROTINFO: u16 = 12;
const IFLA_LINKINFO: u16 = 18;
const IFLA_IFALIAS: u16 = 20;
const INFO_KIND: u16 = 1;
const INFO_DATA: u16 = 2;
const BR_FORWARD_DELAY: u16 = 1;
const BR_STP_STATE: u16 = 5;
const BRPORT_ISOLATED: u16 = 33;

/// A link of the host.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Link {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// What kind of device it is (`bridge`, `tun`, `veth`), if the kernel says.
    pub kind: Option<String>,
    /// The bridge that it is a port of.
    pub master: Option<u32>,
    /// A remark that somebody put on it.
    pub alias: Option<String>,
    /// Largest packet.
    pub mtu: u32,
    /// It is switched on.
    pub up: bool,
    /// Its address, if it is an Ethernet's.
    pub mac: Option<[u8; 6]>,
}

/// A socket of route netlink. Calls wait only for the kernel.
pub struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

struct Message(Vec<u8>);

impl Message {
    fn new(kind: u16, flags: i32, body: &[u8]) -> Message {
        let mut m = vec![0; HEADER];
        m[4..6].copy_from_slice(&kind.to_ne_bytes());
        m[6..8].copy_from_slice(&(flags as u16 | libc::NLM_F_REQUEST as u16).to_ne_bytes());
        m.extend_from_slice(body);
        Message(m)
    }

    /// About the link with this number, 0 for one that is named or new.
    fn link(kind: u16, flags: i32, family: u8, index: u32, up: bool) -> Message {
        let mut body = [0; LINK];
        body[0] = family;
        body[4..8].copy_from_slice(&index.to_ne_bytes());
        if up {
            // Flags, and which of them are to change.
            body[8] = libc::IFF_UP as u8;
            body[12] = libc::IFF_UP as u8;
        }
        Message::new(kind, flags, &body)
    }

    fn put(&mut self, kind: u16, value: &[u8]) {
        self.0.extend_from_slice(&(value.len() as u16 + 4).to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn text(&mut self, kind: u16, value: &str) {
        self.put(kind, &[value.as_bytes(), &[0]].concat());
    }

    fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Message)) {
        let at = self.0.len();
        self.put(kind | NESTED, &[]);
        fill(self);
        let len = (self.0.len() - at) as u16;
        self.0[at..at + 2].copy_from_slice(&len.to_ne_bytes());
    }
}

/// The attributes of a message.
fn attributes(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(u16::from_ne_bytes(rest.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(rest.get(2..4)?.try_into().ok()?) & !(3 << 14);
        let value = rest.get(4..len)?;
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or(&[]);
        Some((kind, value))
    })
}

fn word(value: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(value.get(..4)?.try_into().ok()?))
}

fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value.strip_suffix(&[0]).unwrap_or(value)).into_owned()
}

fn ip(value: &[u8]) -> Option<IpAddr> {
    match value.len() {
        4 => Some(IpAddr::from(<[u8; 4]>::try_from(value).ok()?)),
        16 => Some(IpAddr::from(<[u8; 16]>::try_from(value).ok()?)),
        _ => None,
    }
}

impl Netlink {
    /// Open it.
    ///
    /// # Errors
    /// The host's.
    pub fn open() -> io::Result<Netlink> {
        // SAFETY: no pointers; the result is checked before it is owned.
        let fd = unsafe {
            libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_ROUTE)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a descriptor that was just made and that nobody else has.
        Ok(Netlink { socket: unsafe { OwnedFd::from_raw_fd(fd) }, sequence: 0 })
    }

    /// Send a request; gives the bodies of the answers of the kind `wanted`.
    fn ask(&mut self, mut m: Message, wanted: u16) -> io::Result<Vec<Vec<u8>>> {
        self.sequence += 1;
        let len = m.0.len() as u32;
        m.0[..4].copy_from_slice(&len.to_ne_bytes());
        m.0[8..12].copy_from_slice(&self.sequence.to_ne_bytes());
        let fd = self.socket.as_raw_fd();
        // SAFETY: the buffer is valid for its length.
        if unsafe { libc::send(fd, m.0.as_ptr().cast(), m.0.len(), 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut found = Vec::new();
        let mut answer = vec![0; ANSWER];
        loop {
            // SAFETY: the buffer is valid for its length and is written to by the kernel only.
            let n = unsafe { libc::recv(fd, answer.as_mut_ptr().cast(), answer.len(), 0) };
            if n < 0 {
                match io::Error::last_os_error() {
                    e if e.kind() == io::ErrorKind::Interrupted => continue,
                    e => return Err(e),
                }
            }
            let mut rest = &answer[..n as usize];
            while let Some(len) = word(rest).map(|l| l as usize).filter(|&l| l >= HEADER && l <= rest.len()) {
                let (kind, flags) =
                    (u16::from_ne_bytes([rest[4], rest[5]]), u16::from_ne_bytes([rest[6], rest[7]]));
                let body = &rest[HEADER..len];
                match kind {
                    NLMSG_DONE => return Ok(found),
                    NLMSG_ERROR => {
                        return match word(body).unwrap_or(0) as i32 {
                            0 => Ok(found),
                            e => Err(io::Error::from_raw_os_error(-e)),
                        };
                    }
                    k if k == wanted => {
                        found.push(body.to_vec());
                        if i32::from(flags) & libc::NLM_F_MULTI == 0 {
                            return Ok(found);
                        }
                    }
                    _ => {}
                }
                rest = rest.get(len.next_multiple_of(4)..).unwrap_or(&[]);
            }
        }
    }

    fn tell(&mut self, m: Message) -> io::Result<()> {
        self.ask(m, 0).map(drop)
    }

    /// Make a bridge that forwards at once (no spanning tree), not yet switched on.
    ///
    /// # Errors
    /// The host's; `AlreadyExists` when the name is taken.
    pub fn add_bridge(&mut self, name: &str, mac: Option<[u8; 6]>, alias: &str) -> io::Result<u32> {
        check_name(name)?;
        let mut m = Message::link(
            libc::RTM_NEWLINK,
            libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_EXCL,
            0,
            0,
            false,
        );
        m.text(IFLA_IFNAME, name);
        if let Some(mac) = mac {
            m.put(IFLA_ADDRESS, &mac);
        }
        m.nest(IFLA_LINKINFO, |m| {
            m.put(INFO_KIND, b"bridge");
            m.nest(INFO_DATA, |m| {
                m.put(BR_STP_STATE, &0u32.to_ne_bytes());
                m.put(BR_FORWARD_DELAY, &0u32.to_ne_bytes());
            });
        });
        self.tell(m)?;
        let index = index_of(name)?;
        if let Err(e) = self.set_alias(index, alias) {
            let _ = self.delete(index);
            return Err(e);
        }
        Ok(index)
    }

    /// A remark on a link, for people and programs.
    ///
    /// # Errors
    /// The host's.
    pub fn set_alias(&mut self, index: u32, alias: &str) -> io::Result<()> {
        let mut m = Message::link(libc::RTM_NEWLINK, libc::NLM_F_ACK, 0, index, false);
        m.text(IFLA_IFALIAS, alias);
        self.tell(m)
    }

    /// A socket that has something to read whenever a link has changed; what that was is to be looked up.
    ///
    /// # Errors
    /// The host's.
    pub fn watch() -> io::Result<OwnedFd> {
        let netlink = Netlink::open()?;
        // SAFETY: an all-zero address is a valid value.
        let mut at: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        at.nl_family = libc::AF_NETLINK as u16;
        at.nl_groups = libc::RTMGRP_LINK as u32;
        let len = size_of::<libc::sockaddr_nl>() as u32;
        // SAFETY: the address is valid for its length.
        if unsafe { libc::bind(netlink.socket.as_raw_fd(), (&raw const at).cast(), len) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(netlink.socket)
    }

    /// Remove a link.
    ///
    /// # Errors
    /// The host's.
    pub fn delete(&mut self, index: u32) -> io::Result<()> {
        self.tell(Message::link(libc::RTM_DELLINK, libc::NLM_F_ACK, 0, index, false))
    }

    /// Make a link a port of a bridge.
    ///
    /// # Errors
    /// The host's.
    pub fn set_master(&mut self, index: u32, bridge: u32) -> io::Result<()> {
        let mut m = Message::link(libc::RTM_NEWLINK, libc::NLM_F_ACK, 0, index, false);
        m.put(IFLA_MASTER, &bridge.to_ne_bytes());
        self.tell(m)
    }

    /// Keep a port from the other isolated ports of its bridge.
    ///
    /// # Errors
    /// The host's.
    pub fn set_isolated(&mut self, port: u32, isolated: bool) -> io::Result<()> {
        let mut m = Message::link(libc::RTM_SETLINK, libc::NLM_F_ACK, libc::AF_BRIDGE as u8, port, false);
        m.nest(IFLA_PROTINFO, |m| m.put(BRPORT_ISOLATED, &[u8::from(isolated)]));
        self.tell(m)
    }

    /// Switch a link on.
    ///
    /// # Errors
    /// The host's.
    pub fn set_up(&mut self, index: u32) -> io::Result<()> {
        self.tell(Message::link(libc::RTM_NEWLINK, libc::NLM_F_ACK, 0, index, true))
    }

    /// Set a link's largest packet.
    ///
    /// # Errors
    /// The host's.
    pub fn set_mtu(&mut self, index: u32, mtu: u32) -> io::Result<()> {
        let mut m = Message::link(libc::RTM_NEWLINK, libc::NLM_F_ACK, 0, index, false);
        m.put(IFLA_MTU, &mtu.to_ne_bytes());
        self.tell(m)
    }

    /// Give a link an address with a prefix of so many bits.
    ///
    /// # Errors
    /// The host's.
    pub fn add_address(&mut self, index: u32, address: IpAddr, prefix: u8) -> io::Result<()> {
        const IFA_ADDRESS: u16 = 1;
        const IFA_LOCAL: u16 = 2;
        const IFA_BROADCAST: u16 = 4;
        /// No duplicate address detection: the bridge is new, and the address is to be bound at once.
        const IFA_F_NODAD: u8 = 2;
        let (family, octets) = match address {
            IpAddr::V4(a) => (libc::AF_INET, a.octets().to_vec()),
            IpAddr::V6(a) => (libc::AF_INET6, a.octets().to_vec()),
        };
        let mut body = [0; ADDRESS];
        (body[0], body[1], body[2]) = (family as u8, prefix, IFA_F_NODAD);
        body[4..].copy_from_slice(&index.to_ne_bytes());
        let flags = libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_EXCL;
        let mut m = Message::new(libc::RTM_NEWADDR, flags, &body);
        m.put(IFA_LOCAL, &octets);
        m.put(IFA_ADDRESS, &octets);
        if let IpAddr::V4(a) = address {
            let host = u32::MAX.checked_shr(prefix.into()).unwrap_or(0);
            m.put(IFA_BROADCAST, &(u32::from(a) | host).to_be_bytes());
        }
        self.tell(m)
    }

    /// A link, by name.
    ///
    /// # Errors
    /// The host's; `NotFound` when there is none.
    pub fn link(&mut self, name: &str) -> io::Result<Link> {
        let index = index_of(name)?;
        let found = self.ask(Message::link(libc::RTM_GETLINK, 0, 0, index, false), libc::RTM_NEWLINK)?;
        found.first().and_then(|m| parse_link(m)).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// All links.
    ///
    /// # Errors
    /// The host's.
    pub fn links(&mut self) -> io::Result<Vec<Link>> {
        let m = Message::link(libc::RTM_GETLINK, libc::NLM_F_DUMP, 0, 0, false);
        Ok(self.ask(m, libc::RTM_NEWLINK)?.iter().filter_map(|m| parse_link(m)).collect())
    }

    /// The networks that the host's main routing table leads to, with the number of the link; default routes are left out.
    ///
    /// # Errors
    /// The host's.
    pub fn routes(&mut self) -> io::Result<Vec<(IpAddr, u8, u32)>> {
        const RTA_DST: u16 = 1;
        const RTA_OIF: u16 = 4;
        let m = Message::new(libc::RTM_GETROUTE, libc::NLM_F_DUMP, &[0; ROUTE]);
        let found = self.ask(m, libc::RTM_NEWROUTE)?;
        Ok(found
            .iter()
            .filter(|m| m.get(4) == Some(&libc::RT_TABLE_MAIN) && m[1] > 0)
            .filter_map(|m| {
                let (mut to, mut link) = (None, 0);
                for (kind, value) in attributes(m.get(ROUTE..)?) {
                    match kind {
                        RTA_DST => to = ip(value),
                        RTA_OIF => link = word(value)?,
                        _ => {}
                    }
                }
                Some((to?, m[1], link))
            })
            .collect())
    }
}

fn parse_link(m: &[u8]) -> Option<Link> {
    let mut link = Link {
        index: word(m.get(4..)?)?,
        up: word(m.get(8..)?)? & libc::IFF_UP as u32 != 0,
        ..Link::default()
    };
    for (kind, value) in attributes(m.get(LINK..)?) {
        match kind {
            IFLA_IFNAME => link.name = text(value),
            IFLA_ADDRESS => link.mac = value.try_into().ok(),
            IFLA_MTU => link.mtu = word(value)?,
            IFLA_MASTER => link.master = word(value),
            IFLA_IFALIAS => link.alias = Some(text(value)),
            IFLA_LINKINFO => {
                link.kind = attributes(value).find(|a| a.0 == INFO_KIND).map(|a| text(a.1));
            }
            _ => {}
        }
    }
    Some(link)
}

/// Whether a link may have this name (Linux net/core/dev.c, `dev_valid_name`).
pub fn valid_name(name: &str) -> bool {
    (1..=NAME_MAX).contains(&name.len())
        && name != "."
        && name != ".."
        && !name.chars().any(|c| c == '/' || c == ':' || c.is_whitespace() || c.is_control())
}

fn check_name(name: &str) -> io::Result<()> {
    if valid_name(name) { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
}

/// The number of the link with this name.
///
/// # Errors
/// `NotFound` when there is none.
pub fn index_of(name: &str) -> io::Result<u32> {
    check_name(name)?;
    let c = CString::new(name).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: a valid C string.
    match unsafe { libc::if_nametoindex(c.as_ptr()) } {
        0 => Err(io::ErrorKind::NotFound.into()),
        n => Ok(n),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_links() {
        assert!(valid_name("br0") && valid_name("a-b.1") && valid_name("123456789012345"));
        for bad in ["", ".", "..", "a/b", "a b", "1234567890123456", "a:1", "a\n"] {
            assert!(!valid_name(bad), "{bad:?}");
        }
    }

    #[test]
    fn links_and_routes_are_read() {
        let mut netlink = Netlink::open().unwrap();
        let lo = netlink.link("lo").unwrap();
        assert_eq!((lo.name.as_str(), lo.master), ("lo", None));
        assert!(netlink.links().unwrap().iter().any(|l| l.name == "lo" && l.index == lo.index));
        assert_eq!(netlink.link("no-such-link").unwrap_err().kind(), io::ErrorKind::NotFound);
        netlink.routes().unwrap();
    }

    #[test]
    fn attributes_end_where_they_are_cut() {
        assert_eq!(
            attributes(&[5, 0, 1, 0, 7, 0, 0, 0, 4, 0, 2, 0]).collect::<Vec<_>>(),
            [(1, &[7][..]), (2, &[])]
        );
        assert_eq!(attributes(&[9, 0, 1, 0, 7]).count(), 0);
        assert_eq!(attributes(&[1, 0, 1, 0]).count(), 0);
    }
}
