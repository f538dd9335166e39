//! Where a guest's Ethernet frames go: the seam between network devices and back ends, and the back ends.
//!
//! - [`NetBackend`]: what every back end is to a device; it is in no way tied to virtio.
//! - [`user`]: a router with NAT in this process.

mod backend;
mod mac;
mod pcap;
mod sys;
pub mod user;
mod wire;

pub use backend::{GsoKind, MAX_FRAME, NetBackend, NetEvents, Offloads, Sent, VnetHeader};
pub use mac::{MacAddr, MacError};
