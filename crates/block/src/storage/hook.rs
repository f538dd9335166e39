//! What tests see of a file's changes, and how they make them fail.

use std::io;
use std::sync::Arc;

/// A change of a file that is about to be made.
#[derive(Debug, Clone)]
pub(crate) enum Change {
    /// Bytes at an offset.
    Write(u64, Vec<u8>),
    /// A range that will read as zeroes: offset and length.
    Zero(u64, u64),
    /// Another length.
    Length(u64),
    /// Everything before is to be durable.
    Sync,
}

/// Hears of each change first; the change is not made if it fails.
pub(crate) type Hook = Arc<dyn Fn(Change) -> io::Result<()> + Send + Sync>;
