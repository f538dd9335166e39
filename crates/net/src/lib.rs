//! Where a guest's Ethernet frames go: the seam between network devices and back ends, and the back ends.
//!
//! - [`NetBackend`]: what every back end is to a device; it is in no way tied to virtio.
//! - [`user`]: a router with NAT in this process.
//! - [`passt`]: the program of that name, over a socket.
//! - [`tap`]: a network device of the host, alone or on a bridge.
//! - [`stream`]: other machines over stream sockets and datagrams, QEMU's included.
//! - [`guard`]: limits and checks in front of any of them.
//! - [`managed`]: networks of the host that guests share: a bridge with addresses, NAT, DHCP and DNS.

mod backend;
mod dhcp;
pub mod dhcp6;
mod error;
pub mod guard;
pub mod hash;
mod mac;
pub mod managed;
pub mod netlink;
pub mod passt;
mod pcap;
mod poller;
mod resolver;
pub mod segment;
pub mod stream;
mod sys;
pub mod tap;
#[cfg(test)]
mod testing;
pub mod user;
mod wire;

pub use backend::{GsoKind, MAX_FRAME, NetBackend, NetEvents, Offloads, Sent, Statistics, VnetHeader};
pub use error::NetError;
pub use mac::{MacAddr, MacError};
pub use tap::{Tap, TapConfig};
