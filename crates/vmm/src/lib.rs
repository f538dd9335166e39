//! One virtual machine: configuration, plan, build, run loop, lifecycle.
//!
//! [`run`] is the whole story: check the configuration, open the serial port's other end, build the [`machine`], and loop over what the
//! guest, the user and the host's signals want until the machine ends.
#![forbid(unsafe_code)]

pub mod chardev;
pub mod config;
pub mod control;
mod cpus;
pub mod disk;
mod engine;
mod error;
pub mod gdb;
mod halt;
mod lines;
mod log;
pub mod machine;
pub mod net;
mod run;
pub mod saved;
pub mod time;
pub mod vcpus;

pub use error::VmmError;
pub use run::{Options, Outcome, Ui, run};
