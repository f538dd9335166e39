//! Disk images.
//!
//! Two floors. [`storage`] is where bytes lie: a file or a block device of the host, with the system calls and the
//! locks. [`format`](mod@format) is what they mean: it makes a [`BlockBackend`], the disk that a device model sees. An
//! [`Overlay`] stands on any back end and takes all writes, so that the disk below never changes.
//!
//! Images are locked with the same byte ranges as QEMU locks them, so that Ringfort and QEMU's tools refuse each
//! other rather than corrupt an image.

mod backend;
mod buffer;
mod error;
pub mod format;
mod overlay;
pub mod storage;

pub use backend::{BlockBackend, Limits, SECTOR_SIZE, Status, check_range};
pub use buffer::{SharedSlice, SharedSliceMut, gather, scatter, slice_of, slice_of_mut, total, total_mut};
pub use error::BlockError;
pub use format::{Format, ImageOptions, open_image, open_storage_image};
pub use overlay::Overlay;
