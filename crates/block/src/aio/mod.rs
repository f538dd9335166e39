//! Many requests at once.
//!
//! A [`Lane`] takes requests from one user (a queue of a disk, a benchmark) and completes them in any order. Each request goes
//! the cheapest way that it can:
//!
//! 1. at once, when its bytes are in the host's page cache or only go there, which costs less than any hand-over;
//! 2. by io_uring, when the back end can say where the bytes lie ([`BlockBackend::locate`]);
//! 3. by a thread of the pool, which may wait: allocations, flushes, discards, hosts without io_uring.
//!
//! What io_uring does not finish in full, for whatever reason, is done once more by a thread, whose answer counts.

mod alarm;
mod lane;
mod memory;
mod pool;
#[cfg(test)]
mod tests;
mod uring;

pub use lane::{Done, Lane, Op, Payload, Range, Request};
pub use memory::Memory;
pub use uring::available as io_uring_available;

use serde::{Deserialize, Serialize};

/// How requests that have to wait for the host are done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Aio {
    /// By the kernel's io_uring.
    IoUring,
    /// By threads.
    Threads,
}

impl Aio {
    /// io_uring where the host has it, threads elsewhere.
    pub fn best() -> Aio {
        if io_uring_available() { Aio::IoUring } else { Aio::Threads }
    }
}

impl std::str::FromStr for Aio {
    type Err = String;
    fn from_str(s: &str) -> Result<Aio, String> {
        match s {
            "io_uring" => Ok(Aio::IoUring),
            "threads" => Ok(Aio::Threads),
            other => Err(format!("aio {other:?}: give io_uring or threads")),
        }
    }
}
