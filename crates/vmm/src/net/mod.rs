//! Network cards: from what a configuration says to a device and what carries its frames.
//!
//! A back end is opened by [`open`], one arm and one file for each kind; what the guest sees of it is made by [`Card::new`].

use crate::config::{Link, Nic, NicModel, VmConfig};
use ringfort_devices::e1000e::E1000e;
use ringfort_net::guard::Guard;
use ringfort_net::passt::Passt;
use ringfort_net::stream::{Datagrams, Stream};
use ringfort_net::tap::{Tap, TapConfig};
use ringfort_net::user::UserNet;
use ringfort_net::{MacAddr, NetBackend, Statistics};
use ringfort_virtio::VirtioDevice;
use ringfort_virtio::net::{Net, NetOptions};
use ringfort_virtio::served::QueueServer;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// What carries the frames of `nic`, whose address is `mac`. `say` gets a line about what was chosen.
///
/// # Errors
/// One line: what cannot be had and what to do. Nothing is left behind.
pub fn open(
    nic: &Nic,
    mac: MacAddr,
    cpus: u32,
    say: &mut dyn FnMut(&str),
) -> Result<Arc<dyn NetBackend>, String> {
    let backend = open_link(nic, mac, cpus, say)?;
    if nic.guard.is_empty() {
        return Ok(backend);
    }
    let guard = Guard::new(backend, &nic.guard, mac).map_err(|e| format!("a thread for its limits: {e}"))?;
    Ok(Arc::new(guard))
}

fn open_link(
    nic: &Nic,
    mac: MacAddr,
    cpus: u32,
    say: &mut dyn FnMut(&str),
) -> Result<Arc<dyn NetBackend>, String> {
    match &nic.link {
        Link::Passt(config) => Ok(Arc::new(Passt::start(config).map_err(|e| e.to_string())?)),
        Link::Tap(config) => open_tap(nic, config, cpus, say),
        Link::Network(network) => open_tap(nic, &network.tap().map_err(|e| e.to_string())?, cpus, say),
        Link::Stream(config) => Ok(Arc::new(Stream::new(config).map_err(|e| e.to_string())?)),
        Link::Dgram(config) => Ok(Arc::new(Datagrams::new(config).map_err(|e| e.to_string())?)),
        Link::User(config) => {
            let net = UserNet::new((**config).clone(), Some(mac)).map_err(|e| e.to_string())?;
            for (f, at) in config.forwards.iter().zip(net.forwards()).filter(|(f, _)| f.host.port() == 0) {
                let protocol = if f.udp { "udp" } else { "tcp" };
                say(&format!("network: {protocol} {at} leads to the guest's port {}", f.guest.port()));
            }
            Ok(Arc::new(net))
        }
    }
}

fn open_tap(
    nic: &Nic,
    config: &TapConfig,
    cpus: u32,
    say: &mut dyn FnMut(&str),
) -> Result<Arc<dyn NetBackend>, String> {
    let config = TapConfig { queues: nic.pairs(cpus), ..config.clone() };
    let tap = Tap::new(&config).map_err(|e| e.to_string())?;
    if config.ifname.is_none() {
        say(&format!("network: tap {}", tap.name()));
    }
    Ok(Arc::new(tap))
}

/// A network card.
pub enum Card {
    /// virtio-net.
    Virtio(Arc<Net>),
    /// Intel's; made in its place on the bus.
    Intel(Arc<E1000e>),
}

impl Card {
    /// The card number `index` of a machine; `place` puts what it is given on the machine's buses.
    ///
    /// # Errors
    /// As [`open`].
    pub fn new(
        config: &VmConfig,
        index: usize,
        nic: &Nic,
        place: &mut dyn Place,
        say: &mut dyn FnMut(&str),
    ) -> Result<Card, String> {
        let mac = nic.address(&config.name, index);
        let backend = open(nic, mac, config.cpus, say)?;
        match nic.model {
            NicModel::VirtioNet => {
                let options = NetOptions {
                    mac: mac.bytes(),
                    pairs: nic.pairs(config.cpus),
                    mtu: nic.mtu,
                    rss: nic.rss,
                };
                let server = match nic.link.vhost() {
                    None | Some(Some(false)) => None,
                    Some(wanted) => match kernel_server(nic, &*backend, place) {
                        Ok(server) => Some(server),
                        Err(why) => {
                            // Where nobody asked for it, there is nothing to say.
                            if wanted == Some(true) {
                                say(&format!("network: no vhost-net, frames go through this process: {why}"));
                            }
                            None
                        }
                    },
                };
                let net = Net::served(backend, server, options)?;
                place.virtio(net.clone())?;
                Ok(Card::Virtio(net))
            }
            NicModel::E1000e => place.e1000e(backend, mac).map(Card::Intel),
        }
    }

    /// Plug the cable in or pull it.
    pub fn set_link(&self, up: bool) {
        match self {
            Card::Virtio(n) => n.set_link(up),
            Card::Intel(n) => n.set_link(up),
        }
    }

    /// Whether the cable is plugged in.
    pub fn link(&self) -> bool {
        match self {
            Card::Virtio(n) => n.link(),
            Card::Intel(n) => n.link(),
        }
    }

    /// Have the guest's driver say to its network where it is, if it can.
    pub fn announce(&self) {
        if let Card::Virtio(n) = self {
            n.announce();
        }
    }

    /// What passed so far: names as `queue0_rx_frames`, and what its network counts.
    pub fn statistics(&self) -> Vec<(String, u64)> {
        let (queues, network) = match self {
            Card::Virtio(n) => (n.statistics(), n.counters()),
            Card::Intel(n) => (vec![n.statistics()], n.counters()),
        };
        let of_queue =
            |(q, s): (usize, Statistics)| s.named().map(|(name, n)| (format!("queue{q}_{name}"), n));
        let mut all: Vec<_> = queues.into_iter().enumerate().flat_map(of_queue).collect();
        all.extend(network.into_iter().map(|(name, n)| (name.to_owned(), n)));
        all
    }

    /// Let it go on.
    pub fn resume(&self) {
        if let Card::Intel(n) = self {
            n.resume();
        }
    }

    /// Stop it: guest memory is not touched from then on. Those of virtio stop with their transport.
    pub fn pause(&self) {
        if let Card::Intel(n) = self {
            n.pause();
        }
    }
}

/// The host's kernel as the server of a card's queues.
fn kernel_server(
    nic: &Nic,
    backend: &dyn NetBackend,
    place: &dyn Place,
) -> Result<Arc<dyn QueueServer>, String> {
    if !nic.guard.is_empty() {
        return Err("it knows no limits and no macguard".into());
    }
    if nic.rss {
        return Err("it knows no rss".into());
    }
    let queues =
        backend.kernel_queues().ok_or("the tap was opened without headers of virtio (IFF_VNET_HDR)")?;
    place.vhost_net(&queues)
}

/// Where a machine's cards are put.
pub trait Place {
    /// The host's vhost-net for a tap's queues.
    ///
    /// # Errors
    /// Why there is none, in words.
    fn vhost_net(&self, taps: &[BorrowedFd<'_>]) -> Result<Arc<dyn QueueServer>, String>;

    /// A device of virtio.
    ///
    /// # Errors
    /// In words.
    fn virtio(&mut self, device: Arc<dyn VirtioDevice>) -> Result<(), String>;

    /// A card of Intel's.
    ///
    /// # Errors
    /// In words.
    fn e1000e(&mut self, backend: Arc<dyn NetBackend>, mac: MacAddr) -> Result<Arc<E1000e>, String>;
}
