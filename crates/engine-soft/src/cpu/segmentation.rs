//! Segmented addresses, descriptors, and loads of data and stack segments (Intel SDM 3A chapters 3 and 5).

use super::{Cpu, Trap};
use crate::mmu::Access;
use ringfort_x86::Vector;
use ringfort_x86::segment::*;

/// A segment register loaded with a null selector in protected mode: nothing can be reached through it.
pub fn null_segment(selector: u16) -> Segment {
    Segment { selector, attrs: 0, limit: 0, base: 0 }
}

/// What a segment register holds in virtual-8086 mode.
pub fn v86_segment(selector: u16) -> Segment {
    Segment {
        selector,
        attrs: PRESENT | S | RW | ACCESSED | 3 << 5,
        limit: 0xffff,
        base: u64::from(selector) << 4,
    }
}

/// Whether `a` is a canonical 48-bit address.
#[inline(always)]
pub fn canonical(a: u64) -> bool {
    (a << 16) as i64 >> 16 == a as i64
}

/// Error code that names a selector.
pub fn selector_error(selector: u16, ext: u32) -> u32 {
    u32::from(selector & 0xfffc) | ext
}

impl Cpu {
    /// The linear address of `offset` in segment `seg` for an access of `size` bytes, by the rules of the mode: type, limit, base.
    ///
    /// # Errors
    /// #GP(0), or #SS(0) for SS.
    #[inline]
    pub fn segmented(&mut self, seg: usize, offset: u64, size: usize, access: Access) -> Result<u64, Trap> {
        let s = &self.seg[seg];
        if self.code64() {
            return Ok(if seg >= FS { s.base.wrapping_add(offset) } else { offset });
        }
        let base = s.base;
        if self.within(s, offset, size, access) {
            return Ok(base.wrapping_add(offset) & 0xffff_ffff);
        }
        Err(if seg == SS { self.ss_fault(0) } else { self.gp(0) })
    }

    /// Whether type and limit of `s` allow the access (not in 64-bit mode).
    #[inline]
    pub fn within(&self, s: &Segment, offset: u64, size: usize, access: Access) -> bool {
        if !self.real_segments() {
            // A null or otherwise absent segment, a system segment, and then what the type forbids.
            if s.attrs & (PRESENT | S) != PRESENT | S {
                return false;
            }
            let code = s.attrs & CODE != 0;
            let refused = match access {
                Access::Read => code && s.attrs & RW == 0,
                Access::Write => code || s.attrs & RW == 0,
                Access::Fetch => !code,
            };
            if refused {
                return false;
            }
        }
        let last = offset + (size as u64 - 1);
        if s.attrs & (CODE | EC) == EC {
            let top = if s.db() { 0xffff_ffff } else { 0xffff };
            offset > u64::from(s.limit) && last <= top
        } else {
            // In a full 4 GiB segment the address wraps, as it does on the processors in use.
            last <= u64::from(s.limit) || s.limit == u32::MAX
        }
    }

    /// The linear address of `selector`'s descriptor if `bytes` of it lie inside its table; `None` also for an unusable LDT.
    pub fn descriptor_address(&self, selector: u16, bytes: u64) -> Option<u64> {
        let (base, limit) = if selector & 4 == 0 {
            (self.gdtr.base, u64::from(self.gdtr.limit))
        } else {
            if !self.ldtr.present() || self.ldtr.selector & 0xfffc == 0 {
                return None;
            }
            (self.ldtr.base, u64::from(self.ldtr.limit))
        };
        let at = u64::from(selector & 0xfff8);
        (at + bytes - 1 <= limit).then(|| self.wrap_linear(base.wrapping_add(at)))
    }

    /// A linear address as wide as the mode has them.
    #[inline]
    pub fn wrap_linear(&self, lin: u64) -> u64 {
        if self.long_mode() { lin } else { lin & 0xffff_ffff }
    }

    /// The 8 bytes of `selector`'s descriptor.
    ///
    /// # Errors
    /// `vector` with the selector when it lies outside its table; what the access raises.
    pub fn read_descriptor(&mut self, selector: u16, vector: Vector, ext: u32) -> Result<u64, Trap> {
        match self.descriptor_address(selector, 8) {
            Some(lin) => self.load_system(lin),
            None => Err(self.raise(vector, selector_error(selector, ext))),
        }
    }

    /// The upper 8 bytes of a 64-bit system descriptor: the upper half of its base or offset, in the low 32 bits.
    ///
    /// # Errors
    /// `vector` with the selector when it lies outside its table or its type field is not zero; what the access raises.
    pub fn read_descriptor_high(&mut self, selector: u16, vector: Vector, ext: u32) -> Result<u64, Trap> {
        let Some(lin) = self.descriptor_address(selector, 16) else {
            return Err(self.raise(vector, selector_error(selector, ext)));
        };
        let high = self.load_system::<u64>(lin.wrapping_add(8))?;
        if high >> 40 & 0x1f != 0 {
            return Err(self.raise(vector, selector_error(selector, ext)));
        }
        Ok(high & 0xffff_ffff)
    }

    /// Set the accessed bit of `selector`'s descriptor, whose present contents are `raw`, and of `s`.
    ///
    /// # Errors
    /// What the store raises.
    pub fn mark_accessed(&mut self, selector: u16, raw: u64, s: &mut Segment) -> Result<(), Trap> {
        s.attrs |= ACCESSED;
        if raw >> 40 & 1 == 0
            && let Some(lin) = self.descriptor_address(selector, 8)
        {
            self.modify_system(lin.wrapping_add(5), |b| b | 1)?;
        }
        Ok(())
    }

    /// Load ES, SS, DS, FS or GS (any mode). SS counts as a stack segment for the current privilege level.
    ///
    /// # Errors
    /// #GP, #NP, #SS by the rules of Intel SDM 2B "MOV".
    pub fn load_segment(&mut self, seg: usize, selector: u16) -> Result<(), Trap> {
        if self.real_segments() {
            self.seg[seg] = self.real_mode_segment(seg, selector);
        } else {
            self.seg[seg] = self.checked_segment(seg, selector, Vector::GeneralProtection)?;
        }
        self.update_decode_mode();
        Ok(())
    }

    /// What a load of `selector` in real or virtual-8086 mode makes of register `seg`: in real mode limit and D/B stay as they were.
    pub fn real_mode_segment(&self, seg: usize, selector: u16) -> Segment {
        if self.v86() {
            return v86_segment(selector);
        }
        let old = &self.seg[seg];
        let kept = old.attrs & (DB | GRANULAR);
        // A register that protected mode left null has no limit worth keeping.
        let limit = if old.present() { old.limit } else { 0xffff };
        Segment { selector, attrs: kept | PRESENT | S | RW | ACCESSED, limit, base: u64::from(selector) << 4 }
    }

    /// Check and fetch a data or stack segment for the current privilege level, in protected mode. `vector` is #GP, or #TS in task switches.
    ///
    /// # Errors
    /// `vector`, #NP, #SS.
    pub fn checked_segment(&mut self, seg: usize, selector: u16, vector: Vector) -> Result<Segment, Trap> {
        let ext = self.ext;
        if selector & 0xfffc == 0 {
            if seg == SS {
                let rpl = (selector & 3) as u8;
                if !(self.code64() && self.cpl != 3 && rpl == self.cpl) {
                    return Err(self.raise(vector, ext));
                }
                return Ok(self.null_stack(selector));
            }
            return Ok(null_segment(selector));
        }
        if seg == SS {
            let cpl = self.cpl;
            return self.stack_segment(selector, cpl, vector, ext);
        }
        let raw = self.read_descriptor(selector, vector, ext)?;
        let mut s = Segment::from_descriptor(selector, raw);
        let error = selector_error(selector, ext);
        let readable = s.attrs & CODE == 0 || s.attrs & RW != 0;
        let conforming = s.attrs & (CODE | EC) == CODE | EC;
        if s.attrs & S_BIT == 0 || !readable || !conforming && (s.rpl().max(self.cpl) > s.dpl()) {
            return Err(self.raise(vector, error));
        }
        if !s.present() {
            return Err(self.np(error));
        }
        self.mark_accessed(selector, raw, &mut s)?;
        Ok(s)
    }

    /// SS as 64-bit mode has it with a null selector: unusable, but its DPL tells the privilege level.
    pub fn null_stack(&self, selector: u16) -> Segment {
        Segment { selector, attrs: (selector & 3) << 5, limit: 0, base: 0 }
    }

    /// Check and fetch a stack segment for privilege level `cpl`; `selector` is not null.
    ///
    /// # Errors
    /// `vector` (#GP or #TS), or #SS when it is not present.
    pub fn stack_segment(
        &mut self,
        selector: u16,
        cpl: u8,
        vector: Vector,
        ext: u32,
    ) -> Result<Segment, Trap> {
        let raw = self.read_descriptor(selector, vector, ext)?;
        let mut s = Segment::from_descriptor(selector, raw);
        let error = selector_error(selector, ext);
        if s.attrs & (S_BIT | CODE | RW) != S_BIT | RW || s.rpl() != cpl || s.dpl() != cpl {
            return Err(self.raise(vector, error));
        }
        if !s.present() {
            return Err(self.ss_fault(error));
        }
        self.mark_accessed(selector, raw, &mut s)?;
        Ok(s)
    }

    /// LLDT, and a task switch's load of LDTR.
    ///
    /// # Errors
    /// `vector` (#GP or #TS), #NP (#TS in a task switch).
    pub fn load_ldt(&mut self, selector: u16, vector: Vector) -> Result<Segment, Trap> {
        let ext = self.ext;
        if selector & 0xfffc == 0 {
            return Ok(null_segment(selector));
        }
        let error = selector_error(selector, ext);
        if selector & 4 != 0 {
            return Err(self.raise(vector, error));
        }
        let raw = self.read_descriptor(selector, vector, ext)?;
        let mut s = Segment::from_descriptor(selector, raw);
        if s.attrs & (S_BIT | 15) != 2 {
            return Err(self.raise(vector, error));
        }
        if !s.present() {
            let v = if vector == Vector::InvalidTss { vector } else { Vector::SegmentNotPresent };
            return Err(self.raise(v, error));
        }
        if self.long_mode() {
            s.base |= self.read_descriptor_high(selector, vector, ext)? << 32;
            if !canonical(s.base) {
                return Err(self.raise(vector, error));
            }
        }
        Ok(s)
    }

    /// LTR.
    ///
    /// # Errors
    /// #GP, #NP.
    pub fn load_tr(&mut self, selector: u16) -> Result<(), Trap> {
        if selector & 0xfffc == 0 {
            return Err(self.gp(0));
        }
        let error = selector_error(selector, 0);
        if selector & 4 != 0 {
            return Err(self.gp(error));
        }
        let raw = self.read_descriptor(selector, Vector::GeneralProtection, 0)?;
        let mut s = Segment::from_descriptor(selector, raw);
        let available = match s.attrs & (S_BIT | 15) {
            9 => true,
            1 => !self.long_mode(),
            _ => false,
        };
        if !available {
            return Err(self.gp(error));
        }
        if !s.present() {
            return Err(self.np(error));
        }
        if self.long_mode() {
            s.base |= self.read_descriptor_high(selector, Vector::GeneralProtection, 0)? << 32;
            if !canonical(s.base) {
                return Err(self.gp(error));
            }
        }
        self.set_busy(selector, true)?;
        s.attrs |= 2;
        self.tr = s;
        Ok(())
    }

    /// Set or clear the busy bit of the TSS descriptor of `selector`.
    ///
    /// # Errors
    /// What the store raises.
    pub fn set_busy(&mut self, selector: u16, busy: bool) -> Result<(), Trap> {
        if let Some(lin) = self.descriptor_address(selector, 8) {
            self.modify_system(lin.wrapping_add(5), |b| if busy { b | 2 } else { b & !2 })?;
        }
        Ok(())
    }

    /// VERR, VERW, LAR, LSL: the descriptor of `selector` if it can be seen from the current privilege level; its upper half too, for LSL.
    ///
    /// # Errors
    /// Only what the access itself raises.
    pub fn visible_descriptor(&mut self, selector: u16) -> Result<Option<Segment>, Trap> {
        if selector & 0xfffc == 0 {
            return Ok(None);
        }
        let Some(lin) = self.descriptor_address(selector, 8) else { return Ok(None) };
        let raw = self.load_system::<u64>(lin)?;
        let s = Segment::from_descriptor(selector, raw);
        let conforming = s.attrs & (S_BIT | CODE | EC) == S_BIT | CODE | EC;
        Ok((conforming || s.rpl().max(self.cpl) <= s.dpl()).then_some(s))
    }

    /// Make null every data segment register that the new, less privileged level may not use (RETF and IRET to an outer level).
    pub fn drop_inner_segments(&mut self) {
        for n in [ES, DS, FS, GS] {
            let s = &self.seg[n];
            let conforming = s.attrs & (CODE | EC) == CODE | EC;
            if !s.present() || !conforming && s.dpl() < self.cpl {
                // FS and GS bases survive where no descriptor was loaded (64-bit bases are set by MSR).
                if s.present() || s.selector & 0xfffc != 0 {
                    self.seg[n] = null_segment(0);
                }
            }
        }
    }
}

const S_BIT: u16 = S;
