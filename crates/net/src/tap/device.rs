//! One queue of a tap: the descriptor and its controls (Linux include/uapi/linux/if_tun.h).

use crate::{NetError, Offloads, VnetHeader};
use std::ffi::CStr;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

/// Where taps come from.
const TUN: &str = "/dev/net/tun";
/// The kernel puts a number for `%d`.
const TEMPLATE: &str = "rftap%d";

const IFF_TAP: i16 = 0x0002;
const IFF_MULTI_QUEUE: i16 = 0x0100;
const IFF_ATTACH_QUEUE: i16 = 0x0200;
const IFF_DETACH_QUEUE: i16 = 0x0400;
const IFF_NO_PI: i16 = 0x1000;
const IFF_VNET_HDR: i16 = 0x4000;

const TUN_F_CSUM: libc::c_ulong = 0x01;
const TUN_F_TSO4: libc::c_ulong = 0x02;
const TUN_F_TSO6: libc::c_ulong = 0x04;
const TUN_F_TSO_ECN: libc::c_ulong = 0x08;
const TUN_F_USO4: libc::c_ulong = 0x20;
const TUN_F_USO6: libc::c_ulong = 0x40;

// _IOW('T', n, int) and _IOR('T', n, unsigned).
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNSETQUEUE: libc::c_ulong = 0x4004_54d9;
const TUNSETVNETLE: libc::c_ulong = 0x4004_54dc;

/// `struct ifreq` with flags in it.
#[repr(C)]
#[derive(Clone, Copy)]
struct IfReq {
    name: [u8; libc::IFNAMSIZ],
    flags: i16,
    rest: [u8; 22],
}

impl IfReq {
    fn new(name: &str, flags: i16) -> IfReq {
        let mut r = IfReq { name: [0; libc::IFNAMSIZ], flags, rest: [0; 22] };
        let n = name.len().min(libc::IFNAMSIZ - 1);
        r.name[..n].copy_from_slice(&name.as_bytes()[..n]);
        r
    }

    fn name(&self) -> String {
        CStr::from_bytes_until_nul(&self.name).map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
    }
}

/// A control with a structure that the kernel reads and may write.
fn control<T>(fd: RawFd, request: libc::c_ulong, value: &mut T) -> io::Result<()> {
    // SAFETY: each caller gives the structure that the request takes, valid for the call.
    match unsafe { libc::ioctl(fd, request as _, value as *mut T) } {
        n if n < 0 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn set_offload_bits(fd: RawFd, bits: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the argument is a number, not a pointer.
    match unsafe { libc::ioctl(fd, TUNSETOFFLOAD as _, bits) } {
        n if n < 0 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// A queue.
pub struct TapQueue {
    fd: OwnedFd,
    /// Frames have headers of virtio.
    headers: bool,
}

impl AsRawFd for TapQueue {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl AsFd for TapQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl TapQueue {
    /// Whether frames have headers of virtio in front.
    pub fn has_headers(&self) -> bool {
        self.headers
    }

    /// Open the queues of the tap `name`, or of a new one.
    pub fn open(name: Option<&str>, queues: u16) -> io::Result<Vec<TapQueue>> {
        let mut all: Vec<TapQueue> = Vec::with_capacity(usize::from(queues));
        let mut name = name.unwrap_or(TEMPLATE).to_owned();
        let mut many = if queues > 1 { IFF_MULTI_QUEUE } else { 0 };
        while all.len() < usize::from(queues) {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
                .open(TUN)?;
            let mut request = IfReq::new(&name, IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | many);
            if let Err(e) = control(file.as_raw_fd(), TUNSETIFF, &mut request) {
                // A tap that was made for several queues is opened as such only.
                if e.raw_os_error() == Some(libc::EINVAL) && many == 0 {
                    many = IFF_MULTI_QUEUE;
                    continue;
                }
                return Err(e);
            }
            name = request.name();
            let queue = TapQueue { fd: file.into(), headers: true };
            queue.set_up()?;
            all.push(queue);
        }
        Ok(all)
    }

    /// Take over a descriptor that this process inherited.
    pub fn adopt(fd: RawFd) -> Result<TapQueue, NetError> {
        // SAFETY: only asks about a number.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
            let what =
                format!("{fd}: no such descriptor was inherited; pass it on (in a shell: {fd}<>/dev/tapN)");
            return Err(NetError::Option { option: "fd", what });
        }
        // SAFETY: the descriptor is open, and the user gave it to this tap to own.
        TapQueue::from_owned(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Take over a descriptor of an open tap.
    pub fn from_owned(fd: OwnedFd) -> Result<TapQueue, NetError> {
        let raw = fd.as_raw_fd();
        let mut request = IfReq::new("", 0);
        let fail = |what: String| NetError::Option { option: "fd", what };
        control(raw, TUNGETIFF, &mut request)
            .map_err(|e| fail(format!("{raw}: is no tap ({e}); give the descriptor of one")))?;
        if request.flags & IFF_TAP == 0 || request.flags & IFF_NO_PI == 0 {
            let what = "carries packets without Ethernet, or with headers of another kind; open it with IFF_TAP and IFF_NO_PI";
            return Err(fail(format!("{raw}: {} {what}", request.name())));
        }
        let queue = TapQueue { fd, headers: request.flags & IFF_VNET_HDR != 0 };
        // SAFETY: plain calls on an open descriptor.
        let flags = unsafe { libc::fcntl(raw, libc::F_GETFL) };
        // SAFETY: as above.
        if flags < 0 || unsafe { libc::fcntl(raw, libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
            return Err(NetError::host(request.name())(io::Error::last_os_error()));
        }
        // SAFETY: as above.
        unsafe { libc::fcntl(raw, libc::F_SETFD, libc::FD_CLOEXEC) };
        queue.set_up().map_err(NetError::host(request.name()))?;
        Ok(queue)
    }

    fn set_up(&self) -> io::Result<()> {
        if self.headers {
            control(self.as_raw_fd(), TUNSETVNETHDRSZ, &mut (VnetHeader::LEN as libc::c_int))?;
            // An x86 kernel without the call has no other order than this one.
            let _ = control(self.as_raw_fd(), TUNSETVNETLE, &mut (1 as libc::c_int));
        }
        Ok(())
    }

    /// The tap's name.
    pub fn name(&self) -> io::Result<String> {
        let mut request = IfReq::new("", 0);
        control(self.as_raw_fd(), TUNGETIFF, &mut request)?;
        Ok(request.name())
    }

    /// What the kernel can do for both sides. Leaves all of it switched on.
    pub fn offloads(&self) -> Offloads {
        if !self.headers {
            return Offloads::default();
        }
        // UDP segmentation came with Linux 6.2.
        [
            Offloads::ALL,
            Offloads { uso: false, ..Offloads::ALL },
            Offloads { checksum: true, ..Offloads::default() },
        ]
        .into_iter()
        .find(|&o| self.set_offloads(o).is_ok())
        .unwrap_or_default()
    }

    /// What frames for the guest may leave undone.
    pub fn set_offloads(&self, o: Offloads) -> io::Result<()> {
        if !self.headers {
            return Ok(());
        }
        let bit = |on, bits| if on { bits } else { 0 };
        let tso = o.tso4 || o.tso6;
        set_offload_bits(
            self.as_raw_fd(),
            bit(o.checksum, TUN_F_CSUM)
                | bit(o.tso4, TUN_F_TSO4)
                | bit(o.tso6, TUN_F_TSO6)
                | bit(o.ecn && tso, TUN_F_TSO_ECN)
                | bit(o.uso, TUN_F_USO4 | TUN_F_USO6),
        )
    }

    /// Have frames come to this queue, or not.
    pub fn set_attached(&self, attached: bool) -> io::Result<()> {
        let flags = if attached { IFF_ATTACH_QUEUE } else { IFF_DETACH_QUEUE };
        control(self.as_raw_fd(), TUNSETQUEUE, &mut IfReq::new("", flags))
    }

    /// Give the host a frame.
    pub fn write(&self, header: &[u8; VnetHeader::LEN], frame: &[u8]) -> io::Result<()> {
        let piece =
            |data: &[u8]| libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
        let pieces = [piece(header), piece(frame)];
        let pieces = &pieces[usize::from(!self.headers)..];
        // SAFETY: the pieces are valid for their lengths, and are only read.
        let n = unsafe { libc::writev(self.as_raw_fd(), pieces.as_ptr(), pieces.len() as libc::c_int) };
        if n < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Take a frame of at most `most` bytes from the host.
    pub fn read(
        &self,
        header: &mut [u8; VnetHeader::LEN],
        frame: &mut Vec<u8>,
        most: usize,
    ) -> io::Result<()> {
        frame.clear();
        frame.reserve(most);
        let pieces = [
            libc::iovec { iov_base: header.as_mut_ptr().cast(), iov_len: header.len() },
            libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: most },
        ];
        let pieces = &pieces[usize::from(!self.headers)..];
        // SAFETY: the header is valid for its length, and `most` bytes of capacity were reserved.
        let n = unsafe { libc::readv(self.as_raw_fd(), pieces.as_ptr(), pieces.len() as libc::c_int) };
        if n < 0 {
            return Err(io::Error::last_os_error());
        }
        let before = if self.headers { header.len() } else { 0 };
        let len = (n as usize).checked_sub(before).ok_or(io::ErrorKind::UnexpectedEof)?;
        // SAFETY: the kernel wrote this many bytes behind the header, and they are within the capacity.
        unsafe { frame.set_len(len) };
        Ok(())
    }
}

/// Why a tap did not open, and what to do.
pub fn explain(name: Option<&str>, existed: bool, queues: u16, e: io::Error) -> NetError {
    let shown = name.unwrap_or("a new tap");
    match (e.raw_os_error(), existed) {
        (Some(libc::EACCES | libc::ENOENT | libc::ENODEV | libc::ENXIO), _) => NetError::Host {
            what: format!("opening {TUN}"),
            source: e,
            advice: "; run as root, load the module tun, or use --net user, which needs no rights",
        },
        (Some(libc::EPERM), false) => NetError::Host {
            what: format!("{shown}: there is none, and making it"),
            source: e,
            advice: "; run as root, or have it made: ip tuntap add NAME mode tap user YOU",
        },
        (Some(libc::EPERM), true) => NetError::Host {
            what: shown.to_owned(),
            source: e,
            advice: "; it belongs to another user: run as that one or as root",
        },
        (Some(libc::EBUSY), _) => NetError::Host {
            what: shown.to_owned(),
            source: e,
            advice: "; another program has it: name another tap",
        },
        (Some(libc::EINVAL), true) => NetError::Option {
            option: "ifname",
            what: if queues > 1 {
                format!(
                    "{shown} is no tap of several queues; make it with: ip tuntap add NAME mode tap multi_queue"
                )
            } else {
                format!("{shown} is no tap; name one, or a name that is not taken")
            },
        },
        _ => NetError::Host { what: shown.to_owned(), source: e, advice: "" },
    }
}
