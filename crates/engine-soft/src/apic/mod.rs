//! The local APIC.

use crate::cpu::Cpu;

/// The part of a local APIC that messages reach from any thread.
pub struct Lapic {
    /// APIC ID.
    pub id: u32,
}

impl Lapic {
    /// After reset.
    pub fn new(id: u32) -> Lapic {
        Lapic { id }
    }
}

impl Cpu {
    /// Answer a load from the local APIC's page; false if `gpa` lies elsewhere.
    pub fn apic_mmio_read(&mut self, _gpa: u64, _data: &mut [u8]) -> bool {
        false
    }

    /// Take a store to the local APIC's page; false if `gpa` lies elsewhere.
    pub fn apic_mmio_write(&mut self, _gpa: u64, _data: &[u8]) -> bool {
        false
    }

    /// Look at the APIC timer: note an interrupt if it has expired.
    pub fn check_timer(&mut self) {}
}
