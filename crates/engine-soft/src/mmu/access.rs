//! The fast path of guest memory accesses.

use super::tlb::TLB_ENTRIES;
use super::walk::Access;
use crate::cpu::{Cpu, Int, Trap};
use crate::decode::{Op, op_flags};

impl Cpu {
    /// The effective address of `op`'s memory operand before segmentation, untruncated.
    #[inline(always)]
    pub fn effective(&self, op: &Op) -> u64 {
        debug_assert!(op.base < 18 && op.index < 18);
        // SAFETY: the decoder makes only register numbers below 18.
        let (base, index) = unsafe {
            (*self.regs.get_unchecked(usize::from(op.base)), *self.regs.get_unchecked(usize::from(op.index)))
        };
        base.wrapping_add(index << op.scale).wrapping_add(op.disp)
    }

    /// The linear address of `op`'s memory operand, for an access of `size` bytes. Segment type and limit are checked where the mode
    /// has them.
    ///
    /// # Errors
    /// #GP(0) or #SS(0) for a segment violation.
    #[inline(always)]
    pub fn linear(&mut self, op: &Op, size: usize, access: Access) -> Result<u64, Trap> {
        let ea = self.effective(op);
        if op.flags & op_flags::FLAT != 0 {
            Ok(ea)
        } else if op.flags & op_flags::FLAT32 != 0 {
            Ok(u64::from(ea as u32))
        } else {
            self.segmented(op.seg.into(), self.truncate(op, ea), size, access)
        }
    }

    /// An address truncated to `op`'s address size.
    #[inline(always)]
    pub fn truncate(&self, op: &Op, address: u64) -> u64 {
        if op.flags & op_flags::ADDR16 != 0 {
            address & 0xffff
        } else if op.flags & op_flags::ADDR32 != 0 {
            address & 0xffff_ffff
        } else {
            address
        }
    }

    /// The host address for an access of `size` bytes at `lin` if the TLB allows it at once.
    #[inline(always)]
    pub(crate) fn probe(&self, lin: u64, size: usize, write: bool) -> Option<*mut u8> {
        let index = (lin >> 12) as usize % TLB_ENTRIES;
        // SAFETY: `tlb` points to the set in force, which the Mmu owns.
        let set = unsafe { &*self.mmu.tlb };
        // The last byte's page must be the tag: an access that crosses into the next page never matches.
        let page = lin.wrapping_add(size as u64 - 1) & !0xfff;
        let tag = if write { set.write[index] } else { set.read[index] };
        (page == tag).then(|| lin.wrapping_add(set.addend[index]) as *mut u8)
    }

    /// Load from linear address `lin` with the current privilege.
    ///
    /// # Errors
    /// #PF, #GP(0)/#SS(0) (non-canonical), #AC.
    #[inline(always)]
    pub fn load<T: Int>(&mut self, lin: u64) -> Result<T, Trap> {
        match self.probe(lin, T::SIZE, false) {
            // SAFETY: a TLB hit means that the bytes lie in one mapped RAM page. Other vCPUs may write them at the same time; on x86 a
            // plain load then gives some mix of bytes as hardware would, and no Rust reference to the memory exists anywhere.
            Some(p) => Ok(unsafe { p.cast::<T>().read_unaligned() }),
            None => self.load_slow(lin, T::SIZE).map(T::from_u64),
        }
    }

    /// Store to linear address `lin` with the current privilege.
    ///
    /// # Errors
    /// As [`Cpu::load`]; then nothing is stored.
    #[inline(always)]
    pub fn store<T: Int>(&mut self, lin: u64, v: T) -> Result<(), Trap> {
        match self.probe(lin, T::SIZE, true) {
            Some(p) => {
                // SAFETY: as in `load`; the write tag stands only for RAM whose stores need no notice.
                unsafe { p.cast::<T>().write_unaligned(v) };
                Ok(())
            }
            None => self.store_slow(lin, T::SIZE, v.to_u64()),
        }
    }

    /// The linear address of `op`'s memory operand where that takes no checks.
    #[inline(always)]
    fn quick_linear(&self, op: &Op) -> Option<u64> {
        let ea = self.effective(op);
        if op.flags & op_flags::FLAT != 0 {
            Some(ea)
        } else if op.flags & op_flags::FLAT32 != 0 {
            Some(u64::from(ea as u32))
        } else if op.flags & op_flags::BASED != 0 {
            debug_assert!(op.seg < 6);
            // SAFETY: the decoder makes only segment numbers below 6.
            Some(ea.wrapping_add(unsafe { self.seg.get_unchecked(usize::from(op.seg)) }.base))
        } else {
            None
        }
    }

    /// Load `op`'s memory operand if that can be done at once. Handlers of frequent instructions try this first and leave everything else
    /// to a function of its own, so that they need no stack frame.
    #[inline(always)]
    pub(crate) fn quick_load<T: Int>(&self, op: &Op) -> Option<T> {
        let p = self.probe(self.quick_linear(op)?, T::SIZE, false)?;
        // SAFETY: as in `load`.
        Some(unsafe { p.cast::<T>().read_unaligned() })
    }

    /// Store to `op`'s memory operand if that can be done at once.
    #[inline(always)]
    pub(crate) fn quick_store<T: Int>(&mut self, op: &Op, v: T) -> Option<()> {
        let p = self.probe(self.quick_linear(op)?, T::SIZE, true)?;
        // SAFETY: as in `store`.
        unsafe { p.cast::<T>().write_unaligned(v) };
        Some(())
    }

    /// Change `op`'s memory operand (not atomically) if that can be done at once; `f` gets the flags as well.
    #[inline(always)]
    pub(crate) fn quick_modify<T: Int>(&mut self, op: &Op, f: impl FnOnce(T, &mut u16) -> T) -> Option<()> {
        let p = self.probe(self.quick_linear(op)?, T::SIZE, true)?.cast::<T>();
        // SAFETY: as in `modify`.
        unsafe { p.write_unaligned(f(p.read_unaligned(), &mut self.arith)) };
        Some(())
    }

    /// Read, change, write back: not atomic. Faults before `f` runs, as for a write.
    ///
    /// # Errors
    /// As [`Cpu::store`].
    #[inline(always)]
    pub fn modify<T: Int>(&mut self, lin: u64, f: impl FnOnce(T) -> T) -> Result<(), Trap> {
        match self.probe(lin, T::SIZE, true) {
            // SAFETY: as in `store`; the write tag implies the right to read.
            Some(p) => unsafe {
                let p = p.cast::<T>();
                p.write_unaligned(f(p.read_unaligned()));
                Ok(())
            },
            None => {
                self.probe_write(lin, T::SIZE)?;
                let old = self.load_slow(lin, T::SIZE)?;
                self.store_slow(lin, T::SIZE, f(T::from_u64(old)).to_u64())
            }
        }
    }

    /// Read, change, write back, atomically with regard to all vCPUs (LOCK prefix). `f` may run several times; its last run counts.
    ///
    /// # Errors
    /// As [`Cpu::store`].
    #[inline(always)]
    pub fn modify_locked<T: Int>(&mut self, lin: u64, f: impl FnMut(T) -> T) -> Result<(), Trap> {
        match self.probe(lin, T::SIZE, true) {
            Some(p) => {
                super::slow::atomic_update(p, f);
                Ok(())
            }
            None => self.modify_locked_slow(lin, f),
        }
    }

    /// Push or pop addresses: the linear address of stack offset `sp` (already truncated to the stack's width).
    ///
    /// # Errors
    /// #SS(0) for a limit violation.
    #[inline(always)]
    pub fn stack_linear(&mut self, sp: u64, size: usize, access: Access) -> Result<u64, Trap> {
        if self.code64() { Ok(sp) } else { self.segmented(ringfort_x86::segment::SS, sp, size, access) }
    }

    /// A host pointer to `lin` and the bytes that may be accessed from it (to the end of its page), if it is plain RAM for such an access;
    /// `None` for MMIO, watched or code pages, which want the ordinary accessors. For string operations.
    ///
    /// # Errors
    /// As the access would raise.
    #[inline]
    pub fn host_run(&mut self, lin: u64, access: Access) -> Result<Option<(*mut u8, usize)>, Trap> {
        let left = 0x1000 - (lin & 0xfff) as usize;
        if let Some(p) = self.probe(lin, 1, access == Access::Write) {
            return Ok(Some((p, left)));
        }
        self.fill_for_run(lin, access)?;
        Ok(self.probe(lin, 1, access == Access::Write).map(|p| (p, left)))
    }

    /// How many bytes from `lin` on, for which [`Cpu::host_run`] gave `host`, lie one after another in host memory as well and may be accessed
    /// without further ado: to the end of a page, at most `most` unless that is less than the first.
    #[inline]
    pub fn host_run_extent(&self, lin: u64, host: *mut u8, access: Access, most: u64) -> u64 {
        let mut extent = 0x1000 - (lin & 0xfff);
        while extent < most
            && self.probe(lin.wrapping_add(extent), 1, access == Access::Write)
                == Some(host.wrapping_add(extent as usize))
        {
            extent += 0x1000;
        }
        extent
    }
}
