//! Causes, masks, and the three ways to the processor: INTx, MSI, MSI-X (82574 data sheet section 7.4).

use super::regs::{CTRL_EXT, EIAC, EITR, IAM, ICR, IMS, ITR, IVAR, cause, ctrl_ext};
use super::{Inner, Wiring};
use ringfort_bus::MsiMessage;
use std::time::{Duration, Instant};

/// Unit of the throttling registers.
const TICK: Duration = Duration::from_nanos(256);
/// Vectors, and the one interrupt there is without MSI-X.
pub const VECTORS: usize = 5;

/// Offsets in the MSI capability: control, address, its high half, data (PCI 3.0 section 6.8.1, 64-bit form).
mod msi {
    pub const CONTROL: u16 = 2;
    pub const LOW: u16 = 4;
    pub const HIGH: u16 = 8;
    pub const DATA: u16 = 12;
}

impl Wiring {
    fn msi_message(&self) -> Option<MsiMessage> {
        let at = self.msi_cap;
        self.config.with(|s| {
            let master = s.u16(4) & 4 != 0;
            (s.u16(at + msi::CONTROL) & 1 != 0 && master).then(|| MsiMessage {
                address: u64::from(s.u32(at + msi::LOW)) | u64::from(s.u32(at + msi::HIGH)) << 32,
                data: u32::from(s.u16(at + msi::DATA)),
            })
        })
    }

    fn msi_enabled(&self) -> bool {
        self.config.with(|s| s.u16(self.msi_cap + msi::CONTROL) & 1 != 0)
    }
}

impl Inner {
    /// Something happened.
    pub fn raise(&mut self, causes: u32) {
        let mut all = causes;
        if causes & cause::OTHERS != 0 && self.wiring.msix.is_enabled() {
            all |= cause::OTHER;
        }
        self.set(ICR, self.get(ICR) | all);
        self.update();
    }

    /// The causes of a queue, by the way that interrupts go.
    pub fn queue_cause(&self, queue: usize, receive: bool) -> u32 {
        match (self.wiring.msix.is_enabled(), receive) {
            (true, true) => cause::RXQ0 << queue,
            (true, false) => cause::TXQ0 << queue,
            (false, true) => cause::RXT0,
            (false, false) => cause::TXDW,
        }
    }

    /// Bring the interrupt in step with causes and masks.
    pub fn update(&mut self) {
        let wanted = self.get(ICR) & self.get(IMS) & !cause::ASSERTED;
        let fresh = wanted & !self.told;
        self.told = wanted;
        let icr = self.get(ICR) & !cause::ASSERTED;
        self.set(ICR, icr | if wanted != 0 { cause::ASSERTED } else { 0 });
        if self.wiring.msix.is_enabled() {
            self.wiring.config.set_intx(false);
            self.vectors(fresh);
        } else if self.wiring.msi_enabled() {
            self.wiring.config.set_intx(false);
            if fresh != 0 && self.may_tell(0, ITR) {
                self.send_msi();
            }
        } else {
            self.wiring.config.set_intx(wanted != 0);
        }
    }

    fn send_msi(&mut self) {
        if let Some(m) = self.wiring.msi_message() {
            self.wiring.sink.send(m);
        }
    }

    /// Tell each vector whose causes are new; what is told so clears and masks itself as the driver asked for.
    fn vectors(&mut self, fresh: u32) {
        let ivar = self.get(IVAR);
        for (bit, shift) in
            [(cause::RXQ0, 0), (cause::RXQ1, 4), (cause::TXQ0, 8), (cause::TXQ1, 12), (cause::OTHER, 16)]
        {
            let entry = ivar >> shift & 15;
            if fresh & bit == 0 || entry & 8 == 0 {
                continue;
            }
            let vector = (entry & 7) as usize;
            if vector < VECTORS && self.may_tell(vector, EITR + 4 * vector as u32) {
                self.wiring.msix.notify(vector as u16);
            }
            // The message clears the cause, and masks it until the driver has looked (sections 10.2.4.7 and 10.2.2.5).
            let cleared = bit & self.get(EIAC);
            let masked = if self.get(CTRL_EXT) & ctrl_ext::EIAME != 0 { bit & self.get(IAM) } else { 0 };
            self.set(ICR, self.get(ICR) & !cleared);
            self.set(IMS, self.get(IMS) & !masked);
            self.told &= !(cleared | masked);
        }
    }

    /// Whether an interrupt may go now; otherwise it goes when its time has come.
    fn may_tell(&mut self, vector: usize, register: u32) -> bool {
        let interval = TICK * (self.get(register) & 0xffff);
        if interval.is_zero() {
            return true;
        }
        let now = Instant::now();
        if self.held[vector].is_some() {
            return false;
        }
        let next = self.last[vector].map(|l| l + interval).filter(|&n| n > now);
        match next {
            Some(n) => {
                self.held[vector] = Some(n);
                self.wiring.bell.at(n);
                false
            }
            None => {
                self.last[vector] = Some(now);
                true
            }
        }
    }

    /// Let go what was held back and is due; gives when the next is.
    pub fn release(&mut self) -> Option<Instant> {
        let now = Instant::now();
        for v in 0..VECTORS {
            if self.held[v].is_some_and(|t| t <= now) {
                self.held[v] = None;
                self.last[v] = Some(now);
                if self.wiring.msix.is_enabled() {
                    self.wiring.msix.notify(v as u16);
                } else if v == 0 && self.wiring.msi_enabled() {
                    self.send_msi();
                }
            }
        }
        self.held.iter().flatten().min().copied()
    }

    /// The driver reads the causes: that clears them, and the mask bits that it asked for.
    pub fn read_causes(&mut self) -> u32 {
        let icr = self.get(ICR);
        // Section 7.4.5: always cleared while nothing is enabled, otherwise if an interrupt was told.
        if self.get(IMS) == 0 || icr & cause::ASSERTED != 0 || self.wiring.msix.is_enabled() {
            self.set(ICR, 0);
            if icr & cause::ASSERTED != 0 && self.get(CTRL_EXT) & ctrl_ext::IAME != 0 {
                self.set(IMS, self.get(IMS) & !self.get(IAM));
            }
            self.update();
        }
        icr
    }
}
