//! The engine on /dev/kvm: guests run on the host CPU's virtualization.
//!
//! The local APICs and the paravirtual clock are KVM's; I/O APIC, 8259 and 8254 are the machine's ("split" interrupt controller), so that
//! their state is the same under every engine. Level-triggered interrupts end by the exits that KVM makes for the vectors of the
//! routes it was told of ([`ringfort_engine::Vm::ioapic_route`]).
//!
//! Time: the guest's TSC is the host's plus an offset. A pause moves all vCPUs' offsets by the same ticks, so their TSCs stay equal.

mod caps;
mod cpuid;
mod dirty;
mod error;
mod eventfd;
mod hypervisor;
mod irqchip;
mod msr;
mod time;
mod vcpu;
mod vm;

pub use caps::{Lacking, REQUIRED, lacking};
pub use error::{open_failed, vm_failed};
pub use hypervisor::{DEVICE, KvmHypervisor, KvmOptions, open};
