//! One virtual machine: configuration, plan, build, run loop, lifecycle.
#![forbid(unsafe_code)]

pub mod chardev;
pub mod config;
pub mod time;
pub mod vcpus;
