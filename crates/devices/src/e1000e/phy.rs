//! The PHY and the EEPROM: as much of them as drivers look at (82574 data sheet sections 6 and 10.2.2, IEEE 802.3 clause 22).

use serde::{Deserialize, Serialize};

/// Words of the EEPROM.
pub const NVM_WORDS: usize = 64;
/// What the EEPROM's words add up to (section 6.1.2.16).
const NVM_SUM: u16 = 0xbaba;

const BMCR: usize = 0;
const BMSR: usize = 1;
const BMCR_RESET: u16 = 1 << 15;
const BMCR_RESTART: u16 = 1 << 9;
const BMSR_LINK: u16 = 1 << 2;
const BMSR_DONE: u16 = 1 << 5;
/// Speed 1000, full duplex, resolved, link (the PHY's own status register).
const SPECIFIC: usize = 17;
const SPECIFIC_LINK: u16 = 1 << 10;
/// Which page the registers below 16 and 17 are of.
const PAGE: usize = 22;
/// The PHY's address on the bus.
const ADDRESS: u32 = 1;

/// An EEPROM with this address in it.
pub fn nvm(mac: [u8; 6]) -> Vec<u16> {
    let mut w = vec![0; NVM_WORDS];
    for (n, pair) in mac.chunks(2).enumerate() {
        w[n] = u16::from_le_bytes([pair[0], pair[1]]);
    }
    // Compatibility, PBA number, initialization control, subsystem, vendor and device, as an adapter of Intel's has them.
    for (at, v) in [
        (3, 0x0420),
        (4, 0xf746),
        (5, 0x2010),
        (6, 0xffff),
        (7, 0xffff),
        (10, 0x026b),
        (11, 0xa01f),
        (12, 0x8086),
        (13, 0x10d3),
        (14, 0x8086),
        (15, 0xd955),
        (16, 0xffff),
        (20, 0x0006),
        (23, 0x0603),
        (24, 0x0000),
        (26, 0x0001),
    ] {
        w[at] = v;
    }
    let sum = w[..NVM_WORDS - 1].iter().fold(0u16, |s, &v| s.wrapping_add(v));
    w[NVM_WORDS - 1] = NVM_SUM.wrapping_sub(sum);
    w
}

/// The PHY's registers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phy {
    regs: Vec<u16>,
    /// Registers of other pages, which nothing here depends on.
    paged: Vec<u16>,
}

impl Phy {
    /// After power-on.
    pub fn new(link: bool) -> Phy {
        let mut p = Phy { regs: vec![0; 32], paged: vec![0; 32 * 8] };
        p.reset(link);
        p
    }

    fn reset(&mut self, link: bool) {
        self.regs.fill(0);
        self.paged.fill(0);
        // Gigabit, auto-negotiation; all modes; Marvell's number for the 82574's PHY; what both sides can do.
        for (at, v) in [
            (BMCR, 0x1140),
            (BMSR, 0x7949),
            (2, 0x0141),
            (3, 0x0cb1),
            (4, 0x0de1),
            (5, 0xcde1),
            (6, 0x000f),
            (9, 0x0e00),
            (10, 0x3c00),
            (15, 0x3000),
            (16, 0x0060),
            (SPECIFIC, 0xa80c),
        ] {
            self.regs[at] = v;
        }
        self.set_link(link);
    }

    /// Whether saved registers have the right number.
    pub fn is_sound(&self) -> bool {
        self.regs.len() == 32 && self.paged.len() == 32 * 8
    }

    /// The cable is plugged in or not.
    pub fn set_link(&mut self, up: bool) {
        if up {
            self.regs[BMSR] |= BMSR_LINK | BMSR_DONE;
            self.regs[SPECIFIC] |= SPECIFIC_LINK;
        } else {
            self.regs[BMSR] &= !(BMSR_LINK | BMSR_DONE);
            self.regs[SPECIFIC] &= !SPECIFIC_LINK;
        }
    }

    /// Whether what is sent comes back (IEEE 802.3 section 22.2.4.1.2).
    pub fn loops(&self) -> bool {
        self.regs[BMCR] & 1 << 14 != 0
    }

    fn slot(&mut self, at: usize) -> &mut u16 {
        let page = usize::from(self.regs[PAGE] & 7);
        // Numbers and the choice of the page are the same on all pages.
        if page == 0 || at == PAGE || at < 2 || at == 2 || at == 3 {
            &mut self.regs[at]
        } else {
            &mut self.paged[page * 32 + at]
        }
    }

    /// The driver wrote MDIC; gives what it reads there. True in the second place if auto-negotiation was begun anew.
    pub fn access(&mut self, mdic: u32, link: bool) -> (u32, bool) {
        const READY: u32 = 1 << 28;
        const ERROR: u32 = 1 << 30;
        let (at, to, op) = ((mdic >> 16 & 31) as usize, mdic >> 21 & 31, mdic >> 26 & 3);
        if to != ADDRESS {
            return (mdic | READY | ERROR, false);
        }
        match op {
            2 => (mdic & !0xffff | u32::from(*self.slot(at)) | READY, false),
            1 => (mdic | READY, self.write(at, mdic as u16, link)),
            _ => (mdic | READY | ERROR, false),
        }
    }

    fn write(&mut self, at: usize, value: u16, link: bool) -> bool {
        match at {
            BMCR if value & BMCR_RESET != 0 => {
                self.reset(link);
                true
            }
            BMCR => {
                self.regs[BMCR] = value & !BMCR_RESTART;
                value & BMCR_RESTART != 0
            }
            // Status and numbers are the PHY's to say.
            BMSR | 2 | 3 | 5 | 10 | 15 => false,
            SPECIFIC if self.regs[PAGE] & 7 == 0 => false,
            _ => {
                *self.slot(at) = value;
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_eeprom_adds_up() {
        let w = nvm([0x52, 0x54, 0, 1, 2, 3]);
        assert_eq!(w.iter().fold(0u16, |s, &v| s.wrapping_add(v)), NVM_SUM);
        assert_eq!(w[..3], [0x5452, 0x0100, 0x0302]);
    }

    #[test]
    fn the_phy_says_who_it_is_and_whether_there_is_a_link() {
        let mut p = Phy::new(true);
        let read = |p: &mut Phy, at: u32| p.access(2 << 26 | 1 << 21 | at << 16, true).0;
        assert_eq!(read(&mut p, 2) & 0x5000_ffff, 0x1000_0141);
        assert_eq!(read(&mut p, 3) as u16, 0x0cb1);
        assert_eq!(read(&mut p, 1) & 0x24, 0x24);
        p.set_link(false);
        assert_eq!(read(&mut p, 1) & 0x24, 0);
        assert!(p.access(1 << 26 | 1 << 21 | 0x1340, true).1);
        assert_eq!(read(&mut p, 0) as u16, 0x1140);
        assert_ne!(p.access(2 << 26 | 2 << 21, true).0 & 1 << 30, 0, "nobody else is there");
        // A register of another page does not change those of the first.
        p.access(1 << 26 | 1 << 21 | 22 << 16 | 2, true);
        p.access(1 << 26 | 1 << 21 | 16 << 16 | 0xffff, true);
        p.access(1 << 26 | 1 << 21 | 22 << 16, true);
        assert_eq!(read(&mut p, 16) as u16, 0x0060);
    }
}
