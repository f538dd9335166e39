//! The run loop, and the engine seam's `Hypervisor`, `Vm` and `Vcpu`.

mod env;
mod run;

pub use env::{Env, VcpuShared, VmShared, request};
