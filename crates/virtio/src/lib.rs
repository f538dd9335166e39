//! Virtio 1.x devices and transports.
//!
//! - [`queue`]: the rings. They are checked once; device code sees checked buffers only.
//! - [`VirtioDevice`]: what a device is, whatever the transport. Devices: [`blk`], [`console`], [`net`], [`rng`], [`balloon`].
//! - [`Core`]: the part of a transport that is the same for all: status, feature negotiation, queue set-up, I/O
//!   threads, pause, save and load.
//! - [`served`]: queues that the host's kernel or another process serves; [`vhost`]: over the vhost protocol.
//! - [`pci`] and [`mmio`]: the two transports.
//!
//! # Threads
//! A device's queues are served by I/O threads of their own (one per queue or one per device, as the device says), so
//! that a slow disk never holds up a vCPU. A device may do quick work at once on the vCPU that rings the doorbell
//! ([`VirtioDevice::quick`]): handing work to another thread costs 40 to 100 microseconds on small hosts, more than
//! most requests.

pub mod balloon;
pub mod blk;
pub mod console;
mod device;
pub mod mmio;
pub mod net;
pub mod pci;
pub mod queue;
pub mod rng;
pub mod served;
pub mod testing;
mod transport;
pub mod vhost;

pub use device::{Grouping, Interrupt, Quick, Served, Signals, VirtioDevice, feature, status};
pub use queue::{Chain, Queue, QueueError};
pub use transport::{Core, CoreState};
