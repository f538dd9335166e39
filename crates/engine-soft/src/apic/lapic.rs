//! The shared register page of one local APIC.

use super::message::Destination;
use super::{BASE_BSP, BASE_ENABLE, BASE_EXTD, DEFAULT_BASE, Delivery, LVT_MASKED, SVR_ENABLE, esr, reg};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Version 0x14 (integrated), seven LVT entries, no suppression of EOI broadcasts.
const VERSION: u32 = 0x14 | 6 << 16;

/// How the APIC is addressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Off: the CPU behaves as if it had none.
    Disabled,
    /// By the MMIO page, 8-bit destinations.
    XApic,
    /// By MSRs, 32-bit destinations.
    X2Apic,
}

/// The part of a local APIC that messages reach from any thread. See the [module](super).
pub struct Lapic {
    /// Initial APIC ID: what CPUID says, and the ID in x2APIC mode.
    pub id: u32,
    base: AtomicU64,
    regs: [AtomicU32; reg::COUNT],
    /// Errors since ESR was last written.
    errors: AtomicU32,
}

impl Lapic {
    /// After reset.
    pub fn new(id: u32) -> Lapic {
        let lapic = Lapic {
            id,
            base: AtomicU64::new(0),
            regs: std::array::from_fn(|_| AtomicU32::new(0)),
            errors: AtomicU32::new(0),
        };
        lapic.reset(false);
        lapic
    }

    /// The state after power-on reset, or (with `init`) after INIT, which keeps the mode, the ID and the base address (Intel SDM 3A
    /// sections 12.4.7.1 to 12.4.7.3). Own thread only.
    pub(crate) fn reset(&self, init: bool) {
        if !init {
            let bsp = if self.id == 0 { BASE_BSP } else { 0 };
            self.base.store(DEFAULT_BASE | BASE_ENABLE | bsp, Ordering::SeqCst);
            self.set(reg::ID, self.id << 24);
        }
        for n in (0..reg::COUNT).filter(|&n| n != reg::ID) {
            self.set(n, 0);
        }
        self.errors.store(0, Ordering::SeqCst);
        self.set(reg::VERSION, VERSION);
        self.set(reg::DFR, u32::MAX);
        self.set(reg::SVR, 0xff);
        for n in LVTS {
            self.set(n, LVT_MASKED);
        }
        if self.id == 0 && !init {
            // What a PC's firmware sets up before anything else runs: the 8259 reaches the boot processor (virtual wire mode, MultiProcessor
            // Specification 1.4 section 3.6.2.2). Guests that are started without firmware rely on it.
            self.set(reg::LVT_LINT0, (Delivery::ExtInt as u32) << 8);
        }
        if self.mode() == Mode::X2Apic {
            self.enter_x2apic();
        }
    }

    /// ID and LDR as x2APIC mode fixes them (Intel SDM 3A section 12.12.10.2).
    pub(super) fn enter_x2apic(&self) {
        self.set(reg::ID, self.id);
        self.set(reg::LDR, self.id >> 4 << 16 | 1 << (self.id & 15));
    }

    /// IA32_APIC_BASE.
    pub fn base(&self) -> u64 {
        self.base.load(Ordering::Relaxed)
    }

    pub(super) fn set_base(&self, base: u64) {
        self.base.store(base, Ordering::SeqCst);
    }

    /// The mode, by IA32_APIC_BASE.
    pub fn mode(&self) -> Mode {
        match self.base() & (BASE_ENABLE | BASE_EXTD) {
            BASE_ENABLE => Mode::XApic,
            m if m & BASE_ENABLE != 0 => Mode::X2Apic,
            _ => Mode::Disabled,
        }
    }

    /// Whether SVR enables it (and it is not disabled altogether).
    pub fn software_enabled(&self) -> bool {
        self.get(reg::SVR) & SVR_ENABLE != 0 && self.mode() != Mode::Disabled
    }

    /// A register.
    #[inline]
    pub(crate) fn get(&self, n: usize) -> u32 {
        self.regs[n].load(Ordering::Relaxed)
    }

    /// Write a register. Own thread only, save for IRR and TMR.
    #[inline]
    pub(super) fn set(&self, n: usize, v: u32) {
        self.regs[n].store(v, Ordering::Relaxed);
    }

    /// Bit of `vector` in the 256-bit register that begins at `first`.
    #[inline]
    pub(super) fn bit(&self, first: usize, vector: u8) -> bool {
        self.regs[first + usize::from(vector >> 5)].load(Ordering::SeqCst) >> (vector & 31) & 1 != 0
    }

    #[inline]
    pub(super) fn set_bit(&self, first: usize, vector: u8) -> bool {
        let bit = 1 << (vector & 31);
        self.regs[first + usize::from(vector >> 5)].fetch_or(bit, Ordering::SeqCst) & bit != 0
    }

    #[inline]
    pub(super) fn clear_bit(&self, first: usize, vector: u8) {
        let bit = 1 << (vector & 31);
        self.regs[first + usize::from(vector >> 5)].fetch_and(!bit, Ordering::SeqCst);
    }

    /// The highest vector in the 256-bit register that begins at `first`.
    #[inline]
    pub(super) fn highest(&self, first: usize) -> Option<u8> {
        (0..8).rev().find_map(|n| {
            let w = self.regs[first + n].load(Ordering::SeqCst);
            (w != 0).then(|| (n as u32 * 32 + w.ilog2()) as u8)
        })
    }

    /// Post an interrupt. True if the vCPU must be told: it was not pending already. From any thread.
    #[must_use]
    pub fn post(&self, vector: u8, level: bool) -> bool {
        if vector < 16 {
            return self.error(esr::RECEIVED_ILLEGAL_VECTOR);
        }
        // TMR first: whoever sees the request sees its trigger mode.
        if level {
            self.set_bit(reg::TMR, vector);
        } else if self.bit(reg::TMR, vector) {
            self.clear_bit(reg::TMR, vector);
        }
        !self.set_bit(reg::IRR, vector)
    }

    /// Note an error and raise the error interrupt. True if the vCPU must be told. From any thread.
    #[must_use]
    pub fn error(&self, bits: u32) -> bool {
        let before = self.errors.fetch_or(bits, Ordering::SeqCst);
        let lvt = self.get(reg::LVT_ERROR);
        let vector = lvt as u8;
        // An error vector that is itself illegal only leaves its trace in ESR.
        if before & bits == bits || lvt & LVT_MASKED != 0 {
            return false;
        }
        if vector < 16 {
            self.errors.fetch_or(esr::RECEIVED_ILLEGAL_VECTOR, Ordering::SeqCst);
            return false;
        }
        self.clear_bit(reg::TMR, vector);
        !self.set_bit(reg::IRR, vector)
    }

    /// A write to ESR: the errors so far become readable and a new collection begins. Own thread only.
    pub(super) fn latch_errors(&self) {
        self.set(reg::ESR, self.errors.swap(0, Ordering::SeqCst));
    }

    /// Whether a message to `d` is for this APIC.
    pub fn is_destination(&self, d: Destination) -> bool {
        let mode = self.mode();
        match d {
            _ if mode == Mode::Disabled => false,
            Destination::Physical { id, broadcast } => {
                if id == broadcast {
                    return true;
                }
                match mode {
                    Mode::X2Apic => id == self.id,
                    _ => id == self.get(reg::ID) >> 24,
                }
            }
            Destination::Logical { mda, broadcast } => {
                if mda == broadcast {
                    return true;
                }
                let ldr = self.get(reg::LDR);
                if mode == Mode::X2Apic {
                    return ldr >> 16 == mda >> 16 && ldr & mda & 0xffff != 0;
                }
                let (ldr, Ok(mda)) = (ldr >> 24, u8::try_from(mda)) else { return false };
                let mda = u32::from(mda);
                match self.get(reg::DFR) >> 28 {
                    0xf => ldr & mda != 0,
                    0 => ldr >> 4 == mda >> 4 && ldr & mda & 0xf != 0,
                    _ => false,
                }
            }
        }
    }

    /// Whether `vector` was posted as level triggered.
    pub(crate) fn is_level(&self, vector: u8) -> bool {
        self.bit(reg::TMR, vector)
    }

    /// Whether any interrupt is posted.
    pub(crate) fn pending(&self) -> bool {
        self.highest(reg::IRR).is_some()
    }

    /// Processor priority, as of the last time its owner computed it. For lowest-priority arbitration.
    pub(super) fn priority(&self) -> u32 {
        self.get(reg::PPR)
    }
}

/// All LVT entries.
pub(super) const LVTS: [usize; 7] = [
    reg::LVT_CMCI,
    reg::LVT_TIMER,
    reg::LVT_THERMAL,
    reg::LVT_PERF,
    reg::LVT_LINT0,
    reg::LVT_LINT1,
    reg::LVT_ERROR,
];
