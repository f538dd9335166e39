//! Where the bytes of an image lie: a file or a block device of the host.

mod direct;
mod file;
mod lock;
#[cfg(test)]
pub(crate) mod tests;

pub use file::{FileStorage, StorageOptions};
pub use lock::Access;
