//! Disk images.
//!
//! Two floors. [`storage`] is where bytes lie: a file or a block device of the host, with the system calls and the
//! locks. [`format`](mod@format) is what they mean: it makes a [`BlockBackend`], the disk that a device model sees. An
//! [`Overlay`] stands on any back end and takes all writes, so that the disk below never changes.
//!
//! [`aio`] does many requests at once, by io_uring where the host has it and by threads elsewhere; [`node`] holds what
//! stands between a device and its image: limits of speed, faults for tests, a joint at which the graph can be changed.
//!
//! Images are locked with the same byte ranges as QEMU locks them, so that Ringfort and QEMU's tools refuse each
//! other rather than corrupt an image.

pub mod aio;
mod backend;
mod buffer;
mod error;
pub mod format;
mod gate;
pub mod job;
pub mod node;
mod overlay;
pub mod storage;

pub use backend::{BlockBackend, Limits, Located, SECTOR_SIZE, Status, check_range};
pub use buffer::{SharedSlice, SharedSliceMut, gather, scatter, slice_of, slice_of_mut, total, total_mut};
pub use error::BlockError;
pub use format::{Format, ImageOptions, open_image, open_storage_image};
pub use overlay::Overlay;
