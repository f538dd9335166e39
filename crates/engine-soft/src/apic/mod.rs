//! The local APIC (Intel SDM 3A chapter 12, AMD APM 2 chapter 16).
//!
//! [`Lapic`] is the register page. It is shared: other threads post interrupts into IRR and TMR and look at what decides whether a
//! message is for this APIC; every other register is written only by the vCPU's own thread. Registers are atomics, so neither side
//! takes a lock. What the vCPU's thread alone knows (the timer, paravirtual state) is in [`Local`].
//!
//! A message is delivered by [`VmShared::deliver`](crate::vcpu::VmShared::deliver), on the thread of whoever sends it.

mod access;
mod lapic;
mod local;
mod message;
mod saved;
mod timer;

#[cfg(test)]
mod tests;

pub use lapic::{Lapic, Mode};
pub use local::Local;
pub use message::{Delivery, Destination, Message, Shorthand};
pub use timer::TIMER_HZ;

/// Register numbers: the offset in the MMIO page divided by 16, which is also the x2APIC MSR's offset from 0x800
/// (Intel SDM 3A table 12-1 and 12-6).
#[allow(missing_docs, reason = "the names are the architecture's own")]
pub mod reg {
    pub const ID: usize = 0x02;
    pub const VERSION: usize = 0x03;
    pub const TPR: usize = 0x08;
    pub const APR: usize = 0x09;
    pub const PPR: usize = 0x0a;
    pub const EOI: usize = 0x0b;
    pub const RRD: usize = 0x0c;
    pub const LDR: usize = 0x0d;
    pub const DFR: usize = 0x0e;
    pub const SVR: usize = 0x0f;
    pub const ISR: usize = 0x10;
    pub const TMR: usize = 0x18;
    pub const IRR: usize = 0x20;
    pub const ESR: usize = 0x28;
    pub const LVT_CMCI: usize = 0x2f;
    pub const ICR: usize = 0x30;
    pub const ICR2: usize = 0x31;
    pub const LVT_TIMER: usize = 0x32;
    pub const LVT_THERMAL: usize = 0x33;
    pub const LVT_PERF: usize = 0x34;
    pub const LVT_LINT0: usize = 0x35;
    pub const LVT_LINT1: usize = 0x36;
    pub const LVT_ERROR: usize = 0x37;
    pub const INITIAL_COUNT: usize = 0x38;
    pub const CURRENT_COUNT: usize = 0x39;
    pub const DIVIDE: usize = 0x3e;
    pub const SELF_IPI: usize = 0x3f;
    /// Registers in the page that the save format covers.
    pub const COUNT: usize = 0x40;
}

/// IA32_APIC_BASE: the bootstrap processor.
pub const BASE_BSP: u64 = 1 << 8;
/// IA32_APIC_BASE: x2APIC mode.
pub const BASE_EXTD: u64 = 1 << 10;
/// IA32_APIC_BASE: the APIC is enabled.
pub const BASE_ENABLE: u64 = 1 << 11;
/// The page's address after reset.
pub const DEFAULT_BASE: u64 = 0xfee0_0000;

/// SVR: software enable.
pub const SVR_ENABLE: u32 = 1 << 8;
/// LVT: masked.
pub const LVT_MASKED: u32 = 1 << 16;
/// LVT of LINT0 and LINT1: level triggered.
pub const LVT_LEVEL: u32 = 1 << 15;
/// LVT of LINT0 and LINT1: a level-triggered interrupt was accepted and has not seen its EOI.
pub const LVT_REMOTE_IRR: u32 = 1 << 14;

/// Bits of the error status register (Intel SDM 3A section 12.5.3).
pub mod esr {
    /// A fixed interrupt with a vector below 16 was sent.
    pub const SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
    /// A message or a local interrupt had a vector below 16.
    pub const RECEIVED_ILLEGAL_VECTOR: u32 = 1 << 6;
    /// An access to a reserved register in the MMIO page.
    pub const ILLEGAL_REGISTER: u32 = 1 << 7;
}
