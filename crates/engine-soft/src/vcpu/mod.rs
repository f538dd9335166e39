//! The run loop, and the engine seam's `Hypervisor`, `Vm` and `Vcpu`.

mod debug;
mod env;
mod look_up;
mod paravirt;
mod run;
mod seam;
pub mod time;

#[cfg(test)]
mod tests;

pub use debug::Debugger;
pub use env::{Counters, Env, VcpuShared, VmShared, request};
pub use paravirt::{Paravirt, feature, paravirt_features};
pub(crate) use paravirt::{is_kvm, lower};
pub use seam::{SoftHypervisor, Tier, open};
