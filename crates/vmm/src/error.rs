//! Why a machine cannot be made or go on.

use crate::config::InvalidConfig;
use ringfort_engine::EngineError;
use std::io;

/// Why a machine cannot be made or go on. Every message is one line.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] InvalidConfig),
    /// The CPU model is not known.
    #[error("--cpu: {0}")]
    Cpu(String),
    /// vCPUs cannot run where or how they were to.
    #[error("--cpus: {0}")]
    Cpus(String),
    /// The engine asked for cannot be had.
    #[error("--accel: {0}")]
    Accel(String),
    /// A disk cannot be used.
    #[error("--disk: {0}")]
    Disk(String),
    /// A network cannot be had.
    #[error("--net: {0}")]
    Net(String),
    /// The kernel or what goes with it cannot be used.
    #[error("{0}")]
    Boot(String),
    /// The serial port's other end cannot be had.
    #[error("--serial: {0}")]
    Serial(io::Error),
    /// The console's other end cannot be had.
    #[error("--console: {0}")]
    Console(io::Error),
    /// RAM cannot be had.
    #[error("--memory: {0}")]
    Memory(#[from] ringfort_memory::MemoryError),
    /// The host refuses threads, descriptors or the like.
    #[error("{what}: {source}")]
    Host {
        /// What was wanted.
        what: &'static str,
        /// The host's answer.
        source: io::Error,
    },
    /// The devices cannot be put together.
    #[error("{0}")]
    Machine(String),
    /// A saved state cannot be written or taken over.
    #[error("{0}")]
    State(String),
    /// gdb cannot be listened for.
    #[error("--gdb: {0}")]
    Gdb(io::Error),
    /// The control socket cannot be had.
    #[error("--control: {0}")]
    Control(io::Error),
    /// The engine failed while the guest ran.
    #[error("{0}")]
    Engine(#[from] EngineError),
}

impl VmmError {
    /// Whether it is about what was asked for, and not a failure of Ringfort or the host.
    pub fn is_usage(&self) -> bool {
        !matches!(self, VmmError::Engine(_) | VmmError::Host { .. } | VmmError::Machine(_))
    }
}
