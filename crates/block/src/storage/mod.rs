//! Where the bytes of an image lie: a file or a block device of the host.

mod direct;
mod file;
#[cfg(test)]
pub(crate) mod hook;
mod lock;
mod new;
#[cfg(test)]
pub(crate) mod tests;

pub use file::{FileStorage, StorageOptions};
pub use lock::Access;
pub use new::NewFile;
