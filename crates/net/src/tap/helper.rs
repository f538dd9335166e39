//! Taps for users who may not make them: a small program with the right to do it opens the tap, puts it on a bridge that its
//! access list allows, and passes the descriptor on. Programs and lists are interchangeable with QEMU's bridge helper: the
//! same options, the same syntax of the list, the descriptor as SCM_RIGHTS over an inherited unix socket.

use super::device::TapQueue;
use crate::netlink::{self, Netlink};
use crate::{NetError, TapConfig};
use std::fs;
use std::io::{self, Read};
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Which bridges guests may be put on.
pub const ACCESS_LIST: &str = "/etc/ringfort/bridge.conf";
/// Where the helper is looked for, after the folder of this program.
const PLACES: [&str; 4] = [
    "/usr/libexec/ringfort/ringfort-bridge-helper",
    "/usr/lib/ringfort/ringfort-bridge-helper",
    "/usr/lib/qemu/qemu-bridge-helper",
    "/usr/libexec/qemu-bridge-helper",
];
/// Name of the helper's program.
const PROGRAM: &str = "ringfort-bridge-helper";
/// Longest access list, its inclusions included, in bytes.
const LONGEST_LIST: u64 = 1 << 20;
/// How deep lists may include each other.
const DEEPEST: usize = 8;
/// Most that is shown of what a helper complains about.
const MOST_WORDS: u64 = 4096;

/// An access list.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AccessList {
    /// Allowed or not, and which; nothing stands for all. Of those that fit, a denial wins.
    rules: Vec<(bool, Option<String>)>,
}

impl AccessList {
    /// Read a list: lines `allow NAME`, `deny NAME`, `include FILE`, with `all` for every bridge and `#` for remarks.
    ///
    /// # Errors
    /// What is wrong, with file and line.
    pub fn read(path: &Path) -> Result<AccessList, NetError> {
        let mut list = AccessList::default();
        list.add(path, 0)?;
        Ok(list)
    }

    fn add(&mut self, path: &Path, depth: usize) -> Result<(), NetError> {
        let shown = path.display();
        if depth > DEEPEST {
            return Err(NetError::Refused(format!(
                "{shown}: lists include each other more than {DEEPEST} deep"
            )));
        }
        let mut text = String::new();
        fs::File::open(path).and_then(|f| f.take(LONGEST_LIST).read_to_string(&mut text)).map_err(
            NetError::advise(
                format!("access list {shown}"),
                "; have root write it, with lines like: allow br0",
            ),
        )?;
        for (n, line) in text.lines().enumerate() {
            let mut words = line.split('#').next().unwrap_or("").split_whitespace();
            let wrong = |what: &str| NetError::Refused(format!("{shown}:{}: {what}", n + 1));
            let Some(verb) = words.next() else { continue };
            let (Some(name), None) = (words.next(), words.next()) else {
                return Err(wrong("one name must follow"));
            };
            match verb {
                "allow" | "deny" if name == "all" => self.rules.push((verb == "allow", None)),
                "allow" | "deny" if !netlink::valid_name(name) => {
                    return Err(wrong("that is no name of a bridge"));
                }
                "allow" | "deny" => self.rules.push((verb == "allow", Some(name.to_owned()))),
                // What cannot be read must not hide a denial in it.
                "include" => self.add(Path::new(name), depth + 1)?,
                _ => return Err(wrong("lines begin with allow, deny or include")),
            }
        }
        Ok(())
    }

    /// Whether guests may be put on this bridge.
    pub fn allows(&self, bridge: &str) -> bool {
        let fits = |r: &&(bool, Option<String>)| r.1.as_deref().is_none_or(|n| n == bridge);
        let mut found = self.rules.iter().filter(fits).peekable();
        found.peek().is_some() && found.all(|r| r.0)
    }
}

/// The helper's work: open a tap, put it on `bridge`, and pass it on over the socket `fd`.
///
/// # Errors
/// [`NetError`]; no tap is left behind then.
pub fn serve(list: &Path, bridge: &str, fd: RawFd) -> Result<(), NetError> {
    if !netlink::valid_name(bridge) {
        return Err(NetError::Option { option: "--br", what: format!("'{bridge}' is no name of a bridge") });
    }
    if !AccessList::read(list)?.allows(bridge) {
        let list = list.display();
        return Err(NetError::Refused(format!(
            "{bridge}: {list} does not allow it; have root add the line: allow {bridge}"
        )));
    }
    // SAFETY: only asks about a number.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(NetError::Option {
            option: "--fd",
            what: format!("{fd}: no such descriptor was inherited"),
        });
    }
    // SAFETY: open, inherited for this use.
    let socket = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
    let mut netlink = Netlink::open().map_err(NetError::host("route netlink"))?;
    let mut queues = TapQueue::open(None, 1).map_err(NetError::host("making a tap"))?;
    let queue = queues.swap_remove(0);
    let name = queue.name().map_err(NetError::host("asking a tap for its name"))?;
    let link = netlink.link(&name).map_err(NetError::host(name.clone()))?;
    // The bridge stays as it is; the tap leaves it by ending.
    let config = TapConfig { bridge: Some(bridge.into()), ..TapConfig::default() };
    let membership = super::Membership::join(&mut netlink, &link, bridge, &config, false)?;
    std::mem::forget(membership);
    netlink.set_up(link.index).map_err(NetError::host(format!("{name}: switching it on")))?;
    send_fd(&socket, queue.as_raw_fd()).map_err(NetError::host("passing the tap on"))
}

/// Keep the right to configure networks and nothing else, as the user who called (capabilities(7)). For a program that is
/// set-user-ID root; one with file capabilities has no more anyway.
///
/// # Errors
/// The host's.
pub fn drop_rights() -> io::Result<()> {
    const CAP_NET_ADMIN: u32 = 12;
    #[repr(C)]
    struct Head {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Sets {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    let check = |n: libc::c_int| if n < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    // SAFETY: calls without pointers.
    unsafe {
        if libc::geteuid() == 0 && libc::getuid() != 0 {
            check(libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0))?;
            check(libc::setresgid(libc::getgid(), libc::getgid(), libc::getgid()))?;
            check(libc::setresuid(libc::getuid(), libc::getuid(), libc::getuid()))?;
        }
    }
    let only = Sets { effective: 1 << CAP_NET_ADMIN, permitted: 1 << CAP_NET_ADMIN, inheritable: 0 };
    let none = Sets { effective: 0, permitted: 0, inheritable: 0 };
    // Version 3: two sets of 32 bits.
    let head = Head { version: 0x2008_0522, pid: 0 };
    let sets = [only, none];
    // SAFETY: pointers to structures of the kernel's layout, valid for the call.
    check(unsafe { libc::syscall(libc::SYS_capset, &head, sets.as_ptr()) } as libc::c_int)
}

/// Have the helper open a tap on `bridge`.
///
/// # Errors
/// [`NetError`], with the helper's own words where it has some.
pub fn ask(program: Option<&Path>, bridge: &str) -> Result<OwnedFd, NetError> {
    let program = match program {
        Some(p) => p.to_owned(),
        None => find().ok_or_else(|| {
            NetError::Refused(format!(
                "bridge {bridge}: making a tap takes root, and there is no {PROGRAM} that would do it; run as root, or install it set-user-ID root"
            ))
        })?,
    };
    let shown = program.display().to_string();
    let (ours, theirs) = UnixStream::pair().map_err(NetError::host("a pair of sockets"))?;
    let theirs_fd = theirs.as_raw_fd();
    let mut command = Command::new(&program);
    command
        .args(["--use-vnet", &format!("--fd={theirs_fd}"), &format!("--br={bridge}")])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    // SAFETY: between fork and exec, one call that is allowed there.
    unsafe {
        command.pre_exec(move || {
            if libc::fcntl(theirs_fd, libc::F_SETFD, 0) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let mut child = command.spawn().map_err(NetError::host(shown.clone()))?;
    drop(theirs);
    let mut words = String::new();
    if let Some(err) = child.stderr.take() {
        // Ends with the helper; a helper of ours says one line.
        let _ = err.take(MOST_WORDS).read_to_string(&mut words);
    }
    let status = child.wait().map_err(NetError::host(shown.clone()))?;
    if !status.success() {
        let words = words.split_whitespace().collect::<Vec<_>>().join(" ");
        let words = if words.is_empty() { format!("{status}") } else { words };
        return Err(NetError::Refused(format!(
            "bridge {bridge}: {shown}: {words}; run as root, or have the bridge allowed there"
        )));
    }
    receive_fd(&ours).map_err(NetError::host(format!("{shown}: taking the tap")))
}

fn find() -> Option<PathBuf> {
    let beside = std::env::current_exe().ok().and_then(|p| Some(p.parent()?.join(PROGRAM)));
    beside.into_iter().chain(PLACES.iter().map(PathBuf::from)).find(|p| p.is_file())
}

/// Room for one control message with one descriptor, aligned as such.
#[repr(C)]
union Control {
    _align: libc::cmsghdr,
    bytes: [u8; 64],
}

fn send_fd(socket: &UnixStream, fd: RawFd) -> io::Result<()> {
    let mut byte = 0u8;
    let mut piece = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    let mut control = Control { bytes: [0; 64] };
    // SAFETY: an all-zero message header is a valid value.
    let mut m: libc::msghdr = unsafe { zeroed() };
    m.msg_iov = &mut piece;
    m.msg_iovlen = 1;
    m.msg_control = (&raw mut control).cast();
    let len = size_of::<RawFd>() as u32;
    // SAFETY: the control buffer is aligned and larger than one message with one descriptor; all pointers are valid for
    // the call.
    let n = unsafe {
        m.msg_controllen = libc::CMSG_SPACE(len) as _;
        let c = libc::CMSG_FIRSTHDR(&m);
        (*c).cmsg_level = libc::SOL_SOCKET;
        (*c).cmsg_type = libc::SCM_RIGHTS;
        (*c).cmsg_len = libc::CMSG_LEN(len) as _;
        libc::CMSG_DATA(c).cast::<RawFd>().write_unaligned(fd);
        libc::sendmsg(socket.as_raw_fd(), &m, libc::MSG_NOSIGNAL)
    };
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn receive_fd(socket: &UnixStream) -> io::Result<OwnedFd> {
    let mut byte = 0u8;
    let mut piece = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    let mut control = Control { bytes: [0; 64] };
    // SAFETY: an all-zero message header is a valid value.
    let mut m: libc::msghdr = unsafe { zeroed() };
    m.msg_iov = &mut piece;
    m.msg_iovlen = 1;
    m.msg_control = (&raw mut control).cast();
    m.msg_controllen = size_of::<Control>() as _;
    // SAFETY: all pointers are valid for the call, with their lengths.
    if unsafe { libc::recvmsg(socket.as_raw_fd(), &mut m, libc::MSG_CMSG_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel filled in the header; the macros stay within the length that it says.
    unsafe {
        let c = libc::CMSG_FIRSTHDR(&m);
        if c.is_null() || (*c).cmsg_level != libc::SOL_SOCKET || (*c).cmsg_type != libc::SCM_RIGHTS {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "no descriptor came"));
        }
        Ok(OwnedFd::from_raw_fd(libc::CMSG_DATA(c).cast::<RawFd>().read_unaligned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(text: &str) -> Result<AccessList, NetError> {
        let path =
            std::env::temp_dir().join(format!("rf-acl-{}-{:x}", std::process::id(), fastrand::u64(..)));
        fs::write(&path, text).unwrap();
        let list = AccessList::read(&path);
        fs::remove_file(path).unwrap();
        list
    }

    #[test]
    fn what_is_not_allowed_is_denied_and_a_denial_wins() {
        let l = list("# bridges\nallow br0 # lab\n\nallow br1\ndeny br1\n").unwrap();
        assert_eq!(["br0", "br1", "br2"].map(|b| l.allows(b)), [true, false, false]);
        let l = list("allow all\ndeny br1\n").unwrap();
        assert_eq!(["br0", "br1"].map(|b| l.allows(b)), [true, false]);
        assert!(!list("deny all\nallow br0\n").unwrap().allows("br0"));
        assert!(!AccessList::default().allows("br0"));
        for (bad, says) in [
            ("allow\n", ":1:"),
            ("\nalow br0\n", ":2:"),
            ("allow a b\n", "one name"),
            ("allow a/b", "no name"),
        ] {
            let e = list(bad).unwrap_err().to_string();
            assert!(e.contains(says), "{e}");
        }
        assert!(list("include /no/such/list\n").is_err());
    }

    #[test]
    fn a_list_that_includes_itself_ends() {
        let path = std::env::temp_dir().join(format!("rf-loop-{}", std::process::id()));
        fs::write(&path, format!("include {}\n", path.display())).unwrap();
        assert!(AccessList::read(&path).unwrap_err().to_string().contains("deep"));
        fs::remove_file(path).unwrap();
    }

    #[test]
    fn descriptors_pass_a_socket() {
        let (a, b) = UnixStream::pair().unwrap();
        let (kept, passed) = UnixStream::pair().unwrap();
        send_fd(&a, passed.as_raw_fd()).unwrap();
        let got = UnixStream::from(receive_fd(&b).unwrap());
        drop(passed);
        io::Write::write_all(&mut &got, b"x").unwrap();
        let mut one = [0];
        (&kept).read_exact(&mut one).unwrap();
        assert_eq!(one, *b"x");
        drop(a);
        assert!(receive_fd(&b).is_err());
    }
}
