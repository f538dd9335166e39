//! Stack frames of interrupts and far transfers: written and read as a whole, so that a fault leaves nothing half done.

use super::segmentation::{canonical, selector_error};
use super::{Cpu, RIP, Trap, gpr};
use crate::mmu::Access;
use ringfort_x86::Vector;
use ringfort_x86::segment::{SS, Segment};

/// A stack that may not be the current one yet.
#[derive(Debug, Clone, Copy)]
pub struct Stack {
    /// Its segment.
    pub ss: Segment,
    /// Its pointer, inside `width`.
    pub sp: u64,
    /// Width of stack addresses in bytes: 2, 4, 8.
    pub width: u8,
    /// Access mode of the accesses ([`crate::mmu::mode`]).
    pub mode: usize,
    /// Error code of #SS for a frame outside the segment.
    pub error: u32,
}

impl Stack {
    fn mask(&self) -> u64 {
        match self.width {
            2 => 0xffff,
            4 => 0xffff_ffff,
            _ => u64::MAX,
        }
    }

    /// Stack pointer `by` bytes away, wrapped at the stack's width.
    pub fn offset(&self, by: u64) -> u64 {
        self.sp.wrapping_add(by) & self.mask()
    }
}

impl Cpu {
    /// The stack in force.
    pub fn current_stack(&self) -> Stack {
        let width = self.stack_size();
        let mut s = Stack {
            ss: self.seg[SS],
            sp: self.regs[gpr::RSP],
            width,
            mode: self.mmu.access_mode,
            error: self.ext,
        };
        s.sp &= s.mask();
        s
    }

    /// Make `s` the pointer of the current stack; bits of RSP above its width stay (32-bit writes clear the upper half).
    pub fn set_stack_pointer(&mut self, s: &Stack) {
        let old = self.regs[gpr::RSP];
        self.regs[gpr::RSP] = match s.width {
            2 => old & !0xffff | s.sp & 0xffff,
            4 => s.sp & 0xffff_ffff,
            _ => s.sp,
        };
    }

    /// The linear address of stack offset `sp`.
    fn frame_address(&mut self, s: &Stack, sp: u64, size: usize, access: Access) -> Result<u64, Trap> {
        if s.width == 8 {
            if !canonical(sp) || !canonical(sp.wrapping_add(size as u64 - 1)) {
                return Err(self.ss_fault(s.error));
            }
            return Ok(sp);
        }
        if !self.within_segment(&s.ss, sp, size, access) {
            return Err(self.ss_fault(s.error));
        }
        Ok(self.wrap_linear(s.ss.base.wrapping_add(sp)) & 0xffff_ffff)
    }

    fn within_segment(&self, s: &Segment, sp: u64, size: usize, access: Access) -> bool {
        self.within(s, sp, size, access)
    }

    /// Push `values`, first to last, each `size` bytes (2, 4, 8). On success the pointer in `s` has moved; nothing is stored on error.
    ///
    /// # Errors
    /// #SS with the stack's error code; #PF.
    pub fn push_frame(&mut self, s: &mut Stack, values: &[u64], size: usize) -> Result<(), Trap> {
        let total = values.len() * size;
        debug_assert!(total <= 288);
        let sp = s.offset((total as u64).wrapping_neg());
        let wraps = sp.checked_add(total as u64 - 1).is_none_or(|l| l > s.mask());
        if !wraps {
            let lin = self.frame_address(s, sp, total, Access::Write)?;
            let mut frame = [0u8; 288];
            for (n, v) in values.iter().rev().enumerate() {
                frame[n * size..(n + 1) * size].copy_from_slice(&v.to_le_bytes()[..size]);
            }
            if let Err(fault) = self.store_bytes_as(lin, &frame[..total], s.mode) {
                // The CPU pushes from the top: a fault there comes first, with that slot's address.
                self.probe_write_as(lin + (total - size) as u64, size, s.mode)?;
                return Err(fault);
            }
        } else {
            // A frame that wraps around the end of the stack's address space: slot by slot, after probing every one.
            let at = |n: usize| s.offset(((n as u64 + 1) * size as u64).wrapping_neg());
            for n in 0..values.len() {
                let lin = self.frame_address(s, at(n), size, Access::Write)?;
                self.probe_write_as(lin, size, s.mode)?;
            }
            for (n, v) in values.iter().enumerate() {
                let lin = self.frame_address(s, at(n), size, Access::Write)?;
                self.store_bytes_as(lin, &v.to_le_bytes()[..size], s.mode)?;
            }
        }
        s.sp = sp;
        Ok(())
    }

    /// Read `values.len()` slots of `size` bytes from `skip` bytes above the pointer. The pointer does not move.
    ///
    /// # Errors
    /// #SS with the stack's error code; #PF.
    pub fn peek_frame(&mut self, s: &Stack, skip: u64, values: &mut [u64], size: usize) -> Result<(), Trap> {
        let total = values.len() * size;
        debug_assert!(total <= 288);
        let sp = s.offset(skip);
        let wraps = sp.checked_add(total as u64 - 1).is_none_or(|l| l > s.mask());
        let mut frame = [0u8; 288];
        if !wraps {
            let lin = self.frame_address(s, sp, total, Access::Read)?;
            self.load_bytes_as(lin, &mut frame[..total], s.mode)?;
        } else {
            for n in 0..values.len() {
                let lin = self.frame_address(s, s.offset(skip + (n * size) as u64), size, Access::Read)?;
                self.load_bytes_as(lin, &mut frame[n * size..(n + 1) * size], s.mode)?;
            }
        }
        for (n, v) in values.iter_mut().enumerate() {
            let mut b = [0; 8];
            b[..size].copy_from_slice(&frame[n * size..(n + 1) * size]);
            *v = u64::from_le_bytes(b);
        }
        Ok(())
    }

    /// The stack pointer and selector for privilege level `cpl` out of the TSS (not in long mode).
    ///
    /// # Errors
    /// #TS with TR's selector when the TSS is too small; what the access raises.
    pub fn tss_stack(&mut self, cpl: u8) -> Result<(u16, u64), Trap> {
        let at = u64::from(cpl);
        let wide = self.tr.attrs & 8 != 0;
        let (offset, last) = if wide { (4 + at * 8, 4 + at * 8 + 5) } else { (2 + at * 4, 2 + at * 4 + 3) };
        self.check_tss(last)?;
        let lin = self.wrap_linear(self.tr.base.wrapping_add(offset));
        Ok(if wide {
            let sp = u64::from(self.load_system::<u32>(lin)?);
            (self.load_system::<u16>(self.wrap_linear(lin.wrapping_add(4)))?, sp)
        } else {
            let both = self.load_system::<u32>(lin)?;
            ((both >> 16) as u16, u64::from(both & 0xffff))
        })
    }

    /// A stack pointer out of the 64-bit TSS: of privilege level `cpl`, or of interrupt stack `ist` when that is not 0.
    ///
    /// # Errors
    /// #TS with TR's selector when the TSS is too small; #SS for a non-canonical pointer; what the access raises.
    pub fn tss_stack64(&mut self, cpl: u8, ist: u8) -> Result<u64, Trap> {
        let offset = if ist != 0 { 28 + u64::from(ist) * 8 } else { 4 + u64::from(cpl) * 8 };
        self.check_tss(offset + 7)?;
        let sp = self.load_system::<u64>(self.tr.base.wrapping_add(offset))?;
        if !canonical(sp) {
            return Err(self.ss_fault(self.ext));
        }
        Ok(sp)
    }

    fn check_tss(&mut self, last: u64) -> Result<(), Trap> {
        if !self.tr.present() || last > u64::from(self.tr.limit) {
            let error = selector_error(self.tr.selector, self.ext);
            return Err(self.ts(error));
        }
        Ok(())
    }

    /// The stack for a transfer to the more privileged level `cpl` by a legacy gate: from the TSS, checked.
    ///
    /// # Errors
    /// #TS, #SS, #PF.
    pub fn inner_stack(&mut self, cpl: u8) -> Result<Stack, Trap> {
        let (selector, sp) = self.tss_stack(cpl)?;
        let ext = self.ext;
        if selector & 0xfffc == 0 {
            return Err(self.ts(ext));
        }
        let ss = self.stack_segment(selector, cpl, Vector::InvalidTss, ext)?;
        let width = if ss.db() { 4 } else { 2 };
        let mut s = Stack { ss, sp, width, mode: self.mode_at(cpl), error: selector_error(selector, ext) };
        s.sp = s.offset(0);
        Ok(s)
    }

    /// The stack for a transfer to the more privileged level `cpl` in long mode.
    ///
    /// # Errors
    /// #TS, #SS, #PF.
    pub fn inner_stack64(&mut self, cpl: u8, ist: u8) -> Result<Stack, Trap> {
        let sp = self.tss_stack64(cpl, ist)?;
        let ss = self.null_stack(cpl.into());
        Ok(Stack { ss, sp, width: 8, mode: self.mode_at(cpl), error: self.ext })
    }

    /// Set RIP.
    #[inline(always)]
    pub fn set_rip(&mut self, ip: u64) {
        self.regs[usize::from(RIP)] = ip;
    }
}
