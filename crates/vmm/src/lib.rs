//! One virtual machine: configuration, plan, build, run loop, lifecycle.
#![forbid(unsafe_code)]

pub mod config;
pub mod time;
