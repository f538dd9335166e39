//! The software x86-64 CPU engine: runs unmodified guests without any help of the host CPU's virtualization.
//!
//! The parts, from the ground up:
//! - [`cpu`]: the state of one vCPU and what the architecture does with it: flags, segments, exceptions and interrupts,
//!   task switches, control registers and MSRs.
//! - [`mmu`]: page walks, the software TLB, and every access to guest memory.
//! - [`decode`]: guest bytes to [`Op`](decode::Op)s, once: operands resolved, a handler chosen.
//! - [`interp`]: the handlers of the integer and system instructions.
//! - [`native`]: SIMD and x87 instructions, executed by the host's own CPU on the guest's register values.
//! - [`cache`]: blocks of decoded ops by guest physical address, and how writes to code invalidate them.
//! - [`translate`]: hot 64-bit blocks as host code.
//! - `crash`: what a fatal signal in all this leaves behind.
//! - [`perf_map`]: where translations lie, for Linux perf.
//! - [`apic`]: the local APIC and its timer.
//! - [`vcpu`]: the run loop, and the engine seam's `Hypervisor`, `Vm` and `Vcpu`.
//!
//! Decoding, memory access, exceptions and state are made to be shared by a translator.

pub mod apic;
pub mod cache;
mod codemem;
pub mod cpu;
pub mod cpuid;
mod crash;
pub mod decode;
mod flaws;
mod hash;
pub mod interp;
pub mod mmu;
pub mod native;
pub mod perf_map;
#[doc(hidden)]
pub mod testing;
pub mod translate;
pub mod vcpu;
