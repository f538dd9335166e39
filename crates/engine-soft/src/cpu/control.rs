//! Control registers, EFER, XCR0 and RFLAGS: what may be written, and what follows from it (Intel SDM 3A sections 2.5, 4.1.2, 4.10.4 and
//! 9.8.5; AMD APM 2 chapters 3 and 14).

use super::segmentation::canonical;
use super::{Cpu, Trap};
use ringfort_engine::CpuidTable;
use ringfort_x86::cr::*;
use ringfort_x86::flags::*;
use ringfort_x86::paging as pte;
use ringfort_x86::segment::CS;

/// What the CPU model makes of control registers: decided once, from CPUID.
#[derive(Debug, Clone, Copy, Default)]
pub struct ControlMasks {
    /// Bits of CR4 that exist.
    pub cr4: u64,
    /// Bits of EFER that may be set.
    pub efer: u64,
    /// Components of XCR0 that exist.
    pub xcr0: u64,
    /// Physical address bits beyond MAXPHYADDR (up to bit 63).
    pub beyond_physical: u64,
}

/// EFER.TCE (AMD): INVLPG drops only what it names.
const EFER_TCE: u64 = 1 << 15;
/// EFER.AIBRSE (AMD): automatic IBRS.
const EFER_AUTOIBRS: u64 = 1 << 21;

impl ControlMasks {
    /// What `t` declares.
    pub fn from_cpuid(t: &CpuidTable) -> ControlMasks {
        let leaf = |f, i| t.find(f, i).map_or((0, 0, 0, 0), |l| (l.eax, l.ebx, l.ecx, l.edx));
        let (_, _, c1, d1) = leaf(1, 0);
        let (_, b7, c7, _) = leaf(7, 0);
        let (_, _, cx, dx) = leaf(0x8000_0001, 0);
        let (a21, ..) = leaf(0x8000_0021, 0);
        let (d_low, _, _, d_high) = leaf(0xd, 0);
        let mut cr4 = CR4_PCE;
        for (word, bit, flags) in [
            (d1, 1, CR4_VME | CR4_PVI),
            (d1, 2, CR4_DE),
            (d1, 3, CR4_PSE),
            (d1, 4, CR4_TSD),
            (d1, 6, CR4_PAE),
            (d1, 7, CR4_MCE),
            (d1, 13, CR4_PGE),
            (d1, 24, CR4_OSFXSR),
            (d1, 25, CR4_OSXMMEXCPT),
            (c1, 17, CR4_PCIDE),
            (c1, 26, CR4_OSXSAVE),
            (b7, 0, CR4_FSGSBASE),
            (b7, 7, CR4_SMEP),
            (b7, 20, CR4_SMAP),
            (c7, 2, CR4_UMIP),
            (c7, 3, CR4_PKE),
        ] {
            if word >> bit & 1 != 0 {
                cr4 |= flags;
            }
        }
        let mut efer = 0;
        for (word, bit, flags) in [
            (dx, 11, EFER_SCE),
            (dx, 20, EFER_NXE),
            (dx, 25, EFER_FFXSR),
            (dx, 29, EFER_LME | EFER_LMA | EFER_SCE),
            (cx, 17, EFER_TCE),
            (a21, 8, EFER_AUTOIBRS),
        ] {
            if word >> bit & 1 != 0 {
                efer |= flags;
            }
        }
        let bits = t.find(0x8000_0008, 0).map_or(40, |l| l.eax & 0xff).clamp(32, 52);
        ControlMasks {
            cr4,
            efer,
            xcr0: (u64::from(d_high) << 32 | u64::from(d_low)) & (XCR0_X87 | XCR0_SSE | XCR0_AVX) | XCR0_X87,
            beyond_physical: !((1 << bits) - 1),
        }
    }
}

impl Cpu {
    /// Write CR0.
    ///
    /// # Errors
    /// #GP(0) for combinations that cannot be.
    pub fn set_cr0(&mut self, v: u64) -> Result<(), Trap> {
        let bad = v >> 32 != 0 || v & (CR0_PG | CR0_PE) == CR0_PG || v & (CR0_NW | CR0_CD) == CR0_NW;
        if bad {
            return Err(self.gp(0));
        }
        let v = v & CR0_VALID | CR0_ET;
        let changed = v ^ self.cr0;
        let mut efer = self.efer;
        if changed & CR0_PG != 0 {
            if v & CR0_PG != 0 {
                if efer & EFER_LME != 0 {
                    // Long mode needs PAE, and neither 64-bit code nor a 16-bit TSS at this moment.
                    if self.cr4 & CR4_PAE == 0 || self.seg[CS].long() || matches!(self.tr.kind(), 1 | 3) {
                        return Err(self.gp(0));
                    }
                    efer |= EFER_LMA;
                }
            } else {
                if self.code64() || self.cr4 & CR4_PCIDE != 0 {
                    return Err(self.gp(0));
                }
                efer &= !EFER_LMA;
            }
        }
        let pae = self.cr4 & CR4_PAE != 0 && efer & EFER_LMA == 0;
        if v & CR0_PG != 0 && pae && changed & (CR0_PG | CR0_CD | CR0_NW) != 0 && !self.load_pdptrs(self.cr3)
        {
            return Err(self.gp(0));
        }
        self.cr0 = v;
        self.efer = efer;
        self.update_vectors();
        if changed & (CR0_PG | CR0_WP | CR0_PE) != 0 {
            self.mmu.flush_all();
        }
        self.update_decode_mode();
        self.update_mmu_mode();
        self.serialize();
        Ok(())
    }

    /// Load the four PAE directory pointers from the table at `cr3`; false (and nothing changed) if one has a reserved bit set.
    pub fn load_pdptrs(&mut self, cr3: u64) -> bool {
        let at = cr3 & 0xffff_ffe0;
        let mut new = [0; 4];
        for (n, e) in new.iter_mut().enumerate() {
            *e = self.load_physical(at + n as u64 * 8);
            if *e & pte::P != 0 && *e & (self.masks.beyond_physical | 0x1e6) != 0 {
                return false;
            }
        }
        self.pdptrs = new;
        true
    }

    /// Write CR3.
    ///
    /// # Errors
    /// #GP(0) for reserved bits, or PAE directory pointers with reserved bits.
    pub fn set_cr3(&mut self, v: u64) -> Result<(), Trap> {
        let pcids = self.cr4 & CR4_PCIDE != 0;
        let mut keep = false;
        let mut v = v;
        if self.long_mode() {
            if pcids {
                keep = v >> 63 != 0;
                v &= !(1 << 63);
            }
            if v & self.masks.beyond_physical != 0 {
                return Err(self.gp(0));
            }
        } else {
            v &= 0xffff_ffff;
            if self.cr0 & CR0_PG != 0 && self.cr4 & CR4_PAE != 0 && !self.load_pdptrs(v) {
                return Err(self.gp(0));
            }
        }
        self.cr3 = v;
        self.mmu.switch(if pcids { (v & 0xfff) as u16 } else { 0 }, keep);
        self.serialize();
        Ok(())
    }

    /// Write CR4.
    ///
    /// # Errors
    /// #GP(0) for bits that the CPU model does not have, and combinations that cannot be.
    pub fn set_cr4(&mut self, v: u64) -> Result<(), Trap> {
        let changed = v ^ self.cr4;
        let enabling_pcid = changed & v & CR4_PCIDE != 0;
        let bad = v & !self.masks.cr4 != 0
            || self.long_mode() && v & CR4_PAE == 0
            || enabling_pcid && (!self.long_mode() || self.cr3 & 0xfff != 0);
        if bad {
            return Err(self.gp(0));
        }
        let paging = CR4_PSE | CR4_PAE | CR4_PGE | CR4_SMEP | CR4_PKE;
        let pae = self.cr0 & CR0_PG != 0 && v & CR4_PAE != 0 && !self.long_mode();
        if pae && changed & (CR4_PSE | CR4_PAE | CR4_PGE | CR4_SMEP) != 0 && !self.load_pdptrs(self.cr3) {
            return Err(self.gp(0));
        }
        self.cr4 = v;
        self.update_vectors();
        if changed & CR4_PCIDE != 0 {
            // Slots carry PCIDs from now on, or no longer.
            self.mmu.flush_all();
            let pcid = if v & CR4_PCIDE != 0 { (self.cr3 & 0xfff) as u16 } else { 0 };
            self.mmu.switch(pcid, false);
        } else if changed & paging != 0 {
            self.mmu.flush_all();
        }
        self.update_mmu_mode();
        self.serialize();
        Ok(())
    }

    /// Write CR8.
    ///
    /// # Errors
    /// #GP(0) above 15.
    pub fn set_cr8(&mut self, v: u64) -> Result<(), Trap> {
        if v > 15 {
            return Err(self.gp(0));
        }
        self.set_tpr((v << 4) as u8);
        Ok(())
    }

    /// Write EFER by WRMSR.
    ///
    /// # Errors
    /// #GP(0) for bits that the CPU model does not have, and for a change of LME while paging.
    pub fn set_efer(&mut self, v: u64) -> Result<(), Trap> {
        // LMA follows paging; writes of it are without effect.
        let v = v & !EFER_LMA | self.efer & EFER_LMA;
        let changed = v ^ self.efer;
        if v & !self.masks.efer != 0 || changed & EFER_LME != 0 && self.cr0 & CR0_PG != 0 {
            return Err(self.gp(0));
        }
        self.efer = v;
        if changed & EFER_NXE != 0 {
            self.mmu.flush_all();
        }
        self.update_decode_mode();
        Ok(())
    }

    /// Write XCR0.
    ///
    /// # Errors
    /// #GP(0) for components that do not exist, without x87, or AVX without SSE.
    pub fn set_xcr0(&mut self, v: u64) -> Result<(), Trap> {
        let avx_alone = v & (XCR0_AVX | XCR0_SSE) == XCR0_AVX;
        if v & !self.masks.xcr0 != 0 || v & XCR0_X87 == 0 || avx_alone {
            return Err(self.gp(0));
        }
        self.xcr0 = v;
        self.update_vectors();
        Ok(())
    }

    /// Replace the RFLAGS bits of `mask` by those of `new`, and let everything that depends on them follow.
    pub fn write_rflags(&mut self, new: u64, mask: u64) {
        let v = self.rflags() & !mask | new & mask;
        let before = self.sys_flags;
        self.set_rflags_raw(v);
        let changed = before ^ self.sys_flags;
        if changed & VM != 0 {
            self.update_decode_mode();
        }
        if changed & (VM | AC) != 0 {
            self.update_mmu_mode();
        }
    }

    /// INVLPG: drop the translations of the page of `lin`.
    pub fn invlpg(&mut self, lin: u64) {
        if !self.long_mode() {
            self.mmu.flush_page(lin & 0xffff_ffff);
        } else if canonical(lin) {
            self.mmu.flush_page(lin);
        }
    }

    /// INVPCID of the given type and descriptor.
    ///
    /// # Errors
    /// #GP(0) for an unknown type, reserved bits, a non-canonical address, or a PCID while CR4.PCIDE is clear.
    pub fn invpcid(&mut self, kind: u64, pcid: u64, lin: u64) -> Result<(), Trap> {
        let reserved = kind > 3 || pcid >> 12 != 0;
        let no_pcids = self.cr4 & CR4_PCIDE == 0 && pcid != 0;
        if reserved || kind < 2 && no_pcids || kind == 0 && !canonical(lin) {
            return Err(self.gp(0));
        }
        match kind {
            0 => self.mmu.flush_page(lin),
            1 => self.mmu.flush_pcid((pcid & 0xfff) as u16),
            _ => self.mmu.flush_all(),
        }
        Ok(())
    }
}
