//! Taps: network devices of the host whose other end a process holds (Linux Documentation/networking/tuntap.rst).
//!
//! A tap is opened by name, taken over as a descriptor, or made; a bridge joins it to others. With headers of virtio in front
//! of each frame the host's network stack completes checksums and cuts long frames, and gives such frames, too.

mod bridge;
mod device;
pub mod helper;
#[cfg(test)]
mod tests;

pub use bridge::{ISOLATED, OWNER, is_ours, left_behind, recover};

use crate::netlink::{self, Netlink};
use crate::poller::Poller;
use crate::{MAX_FRAME, NetBackend, NetError, NetEvents, Offloads, Sent, VnetHeader};
use bridge::Membership;
use device::TapQueue;
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, OnceLock};
use vmm_sys_util::epoll::EventSet;

/// Most queues of a tap (Linux drivers/net/tun.c, MAX_TAP_QUEUES is 256; a device here has 16 pairs).
pub const MAX_QUEUES: u16 = 16;

/// Which tap, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TapConfig {
    /// The tap's name; the kernel chooses one if not given.
    pub ifname: Option<String>,
    /// Descriptors of a tap that somebody else opened, one for each queue.
    pub fds: Vec<RawFd>,
    /// The bridge that the tap is to be a port of.
    pub bridge: Option<String>,
    /// Make the bridge if there is none; it goes again with its last port.
    pub make_bridge: bool,
    /// Pairs of queues.
    pub queues: u16,
    /// Keep the guest from other isolated ports of the bridge.
    pub isolated: bool,
    /// The program that opens taps for those who may not; looked for if not given.
    pub helper: Option<PathBuf>,
    /// The host's kernel moves the frames (vhost-net): where it can if not given, and with a word where it cannot if it is to.
    pub vhost: Option<bool>,
}

impl Default for TapConfig {
    fn default() -> Self {
        TapConfig {
            ifname: None,
            fds: Vec::new(),
            bridge: None,
            make_bridge: false,
            queues: 1,
            isolated: false,
            helper: None,
            vhost: None,
        }
    }
}

impl TapConfig {
    /// What is wrong with the options: the option, and what to do.
    pub fn problems(&self) -> Vec<(&'static str, String)> {
        let mut p = Vec::new();
        for (option, name) in [("ifname", &self.ifname), ("bridge", &self.bridge)] {
            if let Some(n) = name
                && !netlink::valid_name(n)
            {
                let most = netlink::NAME_MAX;
                p.push((option, format!("'{n}' is no name of a link; give 1 to {most} characters without blanks, slashes and colons")));
            }
        }
        if !(1..=MAX_QUEUES).contains(&self.queues) {
            p.push(("queues", format!("{} queues; give 1 to {MAX_QUEUES}", self.queues)));
        }
        if !self.fds.is_empty() {
            if self.ifname.is_some() || self.bridge.is_some() {
                p.push((
                    "fd",
                    "a descriptor's tap has its name and bridge already; leave ifname and bridge out".into(),
                ));
            }
            if self.fds.len() != usize::from(self.queues) {
                let (have, want) = (self.fds.len(), self.queues);
                p.push(("fd", format!("{have} descriptors for {want} queues; give one for each")));
            }
            if let Some(fd) = self.fds.iter().find(|&&fd| fd < 3) {
                p.push((
                    "fd",
                    format!("{fd} is standard input or output; give the number of the tap's descriptor"),
                ));
            }
        }
        p
    }
}

struct Inner {
    queues: Vec<TapQueue>,
    /// Queues that the host's frames are spread over.
    active: AtomicU16,
    can: Offloads,
    events: OnceLock<Arc<dyn NetEvents>>,
}

/// A guest's tap.
pub struct Tap {
    // They end before the descriptors are closed, and these before the bridge is left.
    pollers: Vec<Poller>,
    inner: Arc<Inner>,
    name: String,
    mtu: Option<u16>,
    _membership: Option<Membership>,
}

impl Tap {
    /// Open or make the tap, and put it on its bridge.
    ///
    /// # Errors
    /// [`NetError`]; nothing is left behind then.
    pub fn new(config: &TapConfig) -> Result<Tap, NetError> {
        if let Some((option, what)) = config.problems().into_iter().next() {
            return Err(NetError::Option { option, what });
        }
        let mut netlink = Netlink::open().map_err(NetError::host("route netlink"))?;
        let (queues, membership) = if config.fds.is_empty() {
            Tap::open(config, &mut netlink)?
        } else {
            (config.fds.iter().map(|&fd| TapQueue::adopt(fd)).collect::<Result<Vec<_>, _>>()?, None)
        };
        let name = queues[0].name().map_err(NetError::host("asking a tap for its name"))?;
        let can = queues[0].offloads();
        // What nobody has agreed on must not come.
        queues[0].set_offloads(Offloads::default()).map_err(NetError::host(format!("{name}: offloads")))?;
        // By descriptor it may be a link of another namespace, of which nothing is known here.
        let mtu = netlink.link(&name).ok().and_then(|l| u16::try_from(l.mtu).ok());
        let active = queues.len() as u16;
        let inner = Arc::new(Inner { queues, active: AtomicU16::new(active), can, events: OnceLock::new() });
        let fds: Vec<RawFd> = inner.queues.iter().map(AsRawFd::as_raw_fd).collect();
        let fail = NetError::host(format!("{name}: a thread that waits for frames"));
        let pollers = pollers(&inner, &fds).map_err(fail)?;
        Ok(Tap { pollers, inner, name, mtu, _membership: membership })
    }

    fn open(
        config: &TapConfig,
        netlink: &mut Netlink,
    ) -> Result<(Vec<TapQueue>, Option<Membership>), NetError> {
        let name = config.ifname.as_deref();
        let existed = name.is_some_and(|n| netlink::index_of(n).is_ok());
        let opened = TapQueue::open(name, config.queues);
        let queues = match (opened, &config.bridge) {
            (Err(e), Some(bridge)) if e.kind() == io::ErrorKind::PermissionDenied && name.is_none() => {
                if config.queues > 1 {
                    let what = "the helper gives taps of one queue; give queues=1, or run as root".into();
                    return Err(NetError::Option { option: "queues", what });
                }
                let fd = helper::ask(config.helper.as_deref(), bridge)?;
                return Ok((vec![TapQueue::from_owned(fd)?], None));
            }
            (Err(e), _) => return Err(device::explain(name, existed, config.queues, e)),
            (Ok(queues), _) => queues,
        };
        let name = queues[0].name().map_err(NetError::host("asking a tap for its name"))?;
        let link = netlink.link(&name).map_err(NetError::host(name.clone()))?;
        let membership = match &config.bridge {
            Some(bridge) => Some(Membership::join(netlink, &link, bridge, config, existed)?),
            None => None,
        };
        if !link.up {
            netlink.set_up(link.index).map_err(NetError::advise(
                format!("{name}: switching it on"),
                "; have it switched on: ip link set NAME up",
            ))?;
        }
        Ok((queues, membership))
    }

    /// The tap's name on the host.
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// A thread for what comes on each queue, which takes the frames itself, and one for room on all of them.
fn pollers(inner: &Arc<Inner>, fds: &[RawFd]) -> io::Result<Vec<Poller>> {
    let tell = |f: fn(&dyn NetEvents, u16)| {
        let inner = inner.clone();
        move |queue: usize| {
            if let Some(e) = inner.events.get() {
                f(&**e, queue as u16);
            }
        }
    };
    let mut all = Vec::new();
    for (n, fd) in fds.iter().enumerate() {
        let taken = tell(|e, queue| e.take_now(queue));
        all.push(Poller::start("net-tap", &[*fd], EventSet::IN, move |_, ready| {
            if ready.readable {
                taken(n);
            }
        })?);
    }
    let room = tell(|e, queue| e.writable(queue));
    all.push(Poller::start("net-tap-room", fds, EventSet::OUT, move |queue, ready| {
        if ready.writable {
            room(queue);
        }
    })?);
    Ok(all)
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.pollers.clear();
    }
}

impl NetBackend for Tap {
    fn accepts(&self) -> Offloads {
        self.inner.can
    }

    fn produces(&self) -> Offloads {
        self.inner.can
    }

    fn max_pairs(&self) -> u16 {
        self.inner.queues.len() as u16
    }

    fn mtu(&self) -> Option<u16> {
        self.mtu
    }

    fn attach(&self, events: Arc<dyn NetEvents>) {
        let pairs = self.max_pairs();
        if self.inner.events.set(events.clone()).is_ok() {
            // What came before there was anybody to tell.
            (0..pairs).for_each(|p| events.readable(p));
        }
    }

    fn set_offloads(&self, offloads: Offloads) {
        // They belong to the device, whichever queue is asked. What was offered is what the kernel took before.
        let _ = self.inner.queues[0].set_offloads(offloads.and(self.inner.can));
    }

    fn kernel_queues(&self) -> Option<Vec<BorrowedFd<'_>>> {
        let queues = &self.inner.queues;
        queues.iter().all(TapQueue::has_headers).then(|| queues.iter().map(AsFd::as_fd).collect())
    }

    fn set_resting(&self, resting: bool) {
        self.pollers.iter().for_each(|p| p.set_resting(resting));
    }

    /// What the host counts of it; what it sends is what the guest gets.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        let dir = Path::new("/sys/class/net").join(&self.name).join("statistics");
        // A tap of another network namespace is not to be seen there.
        let read = |file: &str| std::fs::read_to_string(dir.join(file)).ok()?.trim().parse().ok();
        [
            ("tap_rx_frames", "tx_packets"),
            ("tap_rx_bytes", "tx_bytes"),
            ("tap_rx_dropped", "tx_dropped"),
            ("tap_tx_frames", "rx_packets"),
            ("tap_tx_bytes", "rx_bytes"),
            ("tap_tx_dropped", "rx_dropped"),
        ]
        .into_iter()
        .filter_map(|(name, file)| Some((name, read(file)?)))
        .collect()
    }

    fn set_pairs(&self, pairs: u16) {
        let pairs = pairs.clamp(1, self.max_pairs());
        let before = self.inner.active.swap(pairs, Ordering::SeqCst);
        // The kernel spreads flows over the queues that are attached; the guest does not look at others.
        for q in self.inner.queues.iter().take(usize::from(before)).skip(usize::from(pairs)) {
            let _ = q.set_attached(false);
        }
        for q in self.inner.queues.iter().take(usize::from(pairs)).skip(usize::from(before)) {
            let _ = q.set_attached(true);
        }
    }

    fn send(&self, pair: u16, header: &VnetHeader, frame: &[u8]) -> Sent {
        let Some(queue) = self.inner.queues.get(usize::from(pair)) else { return Sent::Done };
        match queue.write(&header.encode(0), frame) {
            // Room comes with an edge of the poller.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Sent::Full,
            // A frame that the kernel does not take (a link that is down, a header that it finds wrong) is lost.
            _ => Sent::Done,
        }
    }

    fn receive(&self, pair: u16, frame: &mut Vec<u8>) -> Option<VnetHeader> {
        let queue = self.inner.queues.get(usize::from(pair))?;
        loop {
            let mut raw = [0; VnetHeader::LEN];
            // Nothing, or the link was removed under us: no frames then.
            queue.read(&mut raw, frame, MAX_FRAME).ok()?;
            if let Some(h) = VnetHeader::decode(&raw, frame.len(), self.inner.can) {
                return Some(h);
            }
        }
    }
}
