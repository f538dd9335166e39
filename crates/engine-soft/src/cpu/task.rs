//! Hardware task switches (Intel SDM 3A chapter 7; AMD APM 2 section 12.3). Not in long mode.

use super::segmentation::{null_segment, selector_error};
use super::{Cpu, RIP, Trap};
use ringfort_x86::Vector;
use ringfort_x86::cr::*;
use ringfort_x86::flags::*;
use ringfort_x86::segment::*;

/// What switches tasks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskCause {
    /// JMP.
    Jump,
    /// CALL.
    Call,
    /// An interrupt or exception through a task gate.
    Interrupt,
    /// IRET with NT set.
    Return,
}

/// The fields of a TSS that a switch loads.
#[derive(Debug, Clone, Copy, Default)]
struct TaskImage {
    cr3: u32,
    eip: u32,
    eflags: u32,
    gpr: [u32; 8],
    /// ES CS SS DS FS GS.
    selectors: [u16; 6],
    ldt: u16,
    trap: bool,
}

impl Cpu {
    /// Switch to the task of `tss` (its descriptor, present and of a TSS type). `back` and `flags` are saved as the old task's EIP and
    /// EFLAGS. Faults after the point of no return belong to the new task: for instructions they are delivered here,
    /// while an interrupt's delivery gets them as its own.
    ///
    /// # Errors
    /// What is raised while the old task still runs; for [`TaskCause::Interrupt`] all.
    pub fn task_switch(
        &mut self,
        tss: Segment,
        cause: TaskCause,
        back: u64,
        flags: u64,
        error_code: Option<u32>,
    ) -> Result<(), Trap> {
        let ext = self.ext;
        let error = selector_error(tss.selector, ext);
        let busy = tss.attrs & 2 != 0;
        if busy != (cause == TaskCause::Return) {
            return Err(if cause == TaskCause::Return { self.ts(error) } else { self.gp(error) });
        }
        let wide = tss.attrs & 8 != 0;
        if u64::from(tss.limit) < if wide { 0x67 } else { 0x2b } {
            return Err(self.ts(error));
        }
        let image = self.read_task(&tss, wide)?;
        let old_wide = self.tr.attrs & 8 != 0;
        // All that will be written must be writable before anything changes.
        let (from, bytes) = if old_wide { (0x20, 0x40) } else { (0x0e, 0x1c) };
        let old_base = self.tr.base;
        if u64::from(self.tr.limit) < from + bytes - 1 {
            let error = selector_error(self.tr.selector, ext);
            return Err(self.ts(error));
        }
        self.probe_write_system(self.wrap_linear(old_base.wrapping_add(from)), bytes as usize)?;
        let nests = matches!(cause, TaskCause::Call | TaskCause::Interrupt);
        if nests {
            self.probe_write_system(tss.base, 2)?;
        }
        if matches!(cause, TaskCause::Jump | TaskCause::Return) {
            self.set_busy(self.tr.selector, false)?;
        }
        if cause != TaskCause::Return {
            self.set_busy(tss.selector, true)?;
        }
        let saved = if cause == TaskCause::Return { flags & !NT } else { flags };
        self.write_task(old_wide, back as u32, saved as u32)?;
        if nests {
            self.store_system::<u16>(tss.base, self.tr.selector)?;
        }

        // The new task runs from here on.
        self.tr = tss;
        self.tr.attrs |= 2;
        self.cr0 |= CR0_TS;
        let entered = self.enter_task(image, wide, nests);
        self.update_decode_mode();
        self.update_mmu_mode();
        let done = entered.and_then(|()| self.finish_task(wide, error_code));
        match done {
            Ok(()) => {
                if image.trap {
                    self.deliver_debug(DR6_BT);
                }
                Ok(())
            }
            Err(t) if cause == TaskCause::Interrupt => Err(t),
            Err(_) => {
                let info = self.trap;
                self.deliver_exception(info);
                Ok(())
            }
        }
    }

    fn read_task(&mut self, tss: &Segment, wide: bool) -> Result<TaskImage, Trap> {
        let mut buf = [0u8; 0x68];
        let len = if wide { 0x68 } else { 0x2c };
        let m = self.system_mode();
        self.load_bytes_as(tss.base, &mut buf[..len], m)?;
        let w = |at: usize| u16::from_le_bytes([buf[at], buf[at + 1]]);
        let d = |at: usize| u32::from(w(at)) | u32::from(w(at + 2)) << 16;
        let mut t = TaskImage::default();
        if wide {
            t.cr3 = d(0x1c);
            t.eip = d(0x20);
            t.eflags = d(0x24);
            for (n, r) in t.gpr.iter_mut().enumerate() {
                *r = d(0x28 + n * 4);
            }
            for (n, s) in t.selectors.iter_mut().enumerate() {
                *s = w(0x48 + n * 4);
            }
            t.ldt = w(0x60);
            t.trap = w(0x64) & 1 != 0;
        } else {
            t.eip = w(0x0e).into();
            t.eflags = w(0x10).into();
            for (n, r) in t.gpr.iter_mut().enumerate() {
                // The upper halves are undefined after a 16-bit switch; hardware sets them to ones.
                *r = u32::from(w(0x12 + n * 2)) | 0xffff_0000;
            }
            for (n, s) in t.selectors.iter_mut().take(4).enumerate() {
                *s = w(0x22 + n * 2);
            }
            t.ldt = w(0x2a);
        }
        Ok(t)
    }

    /// Save the old task's registers in its TSS.
    fn write_task(&mut self, wide: bool, eip: u32, eflags: u32) -> Result<(), Trap> {
        let mut out = Vec::with_capacity(0x40);
        let m = self.system_mode();
        if wide {
            out.extend(eip.to_le_bytes());
            out.extend(eflags.to_le_bytes());
            for r in &self.regs[..8] {
                out.extend((*r as u32).to_le_bytes());
            }
            for s in &self.seg {
                out.extend(u32::from(s.selector).to_le_bytes());
            }
            self.store_bytes_as(self.wrap_linear(self.tr.base.wrapping_add(0x20)), &out, m)
        } else {
            out.extend((eip as u16).to_le_bytes());
            out.extend((eflags as u16).to_le_bytes());
            for r in &self.regs[..8] {
                out.extend((*r as u16).to_le_bytes());
            }
            for s in &self.seg[..4] {
                out.extend(s.selector.to_le_bytes());
            }
            self.store_bytes_as(self.wrap_linear(self.tr.base.wrapping_add(0x0e)), &out, m)
        }
    }

    /// Load the new task's registers; segment registers hold only selectors until they are checked one by one.
    fn enter_task(&mut self, t: TaskImage, wide: bool, nested: bool) -> Result<(), Trap> {
        if wide && self.cr0 & CR0_PG != 0 {
            self.cr3 = u64::from(t.cr3);
            self.mmu.flush_all();
        }
        self.set_rip(t.eip.into());
        for (r, v) in self.regs[..8].iter_mut().zip(t.gpr) {
            *r = v.into();
        }
        let mut flags = u64::from(t.eflags);
        if !wide {
            flags &= 0xffff;
        }
        if nested {
            flags |= NT;
        }
        self.set_rflags_raw(flags);
        // DR7's local enable bits are cleared by a switch.
        self.dr7 &= !0x155;
        self.update_watched();
        for (s, &selector) in self.seg.iter_mut().zip(&t.selectors) {
            *s = null_segment(selector);
        }
        self.ldtr = null_segment(t.ldt);
        if wide && self.cr0 & CR0_PG != 0 && self.cr4 & CR4_PAE != 0 {
            let ext = self.ext;
            if !self.load_pdptrs(self.cr3) {
                return Err(self.ts(ext));
            }
        }
        if self.v86() {
            self.cpl = 3;
            self.load_v86_segments(t.selectors);
        } else {
            self.cpl = (t.selectors[CS] & 3) as u8;
        }
        self.update_mmu_mode();
        self.ldtr = self.load_ldt(t.ldt, Vector::InvalidTss)?;
        if self.v86() {
            return Ok(());
        }
        self.task_code(t.selectors[CS])?;
        self.update_decode_mode();
        let ss = t.selectors[SS];
        if ss & 0xfffc == 0 {
            let error = selector_error(ss, self.ext);
            return Err(self.ts(error));
        }
        self.seg[SS] = self.stack_segment(ss, self.cpl, Vector::InvalidTss, self.ext)?;
        for n in [ES, DS, FS, GS] {
            self.seg[n] = self.checked_segment(n, t.selectors[n], Vector::InvalidTss)?;
        }
        Ok(())
    }

    fn task_code(&mut self, selector: u16) -> Result<(), Trap> {
        let error = selector_error(selector, self.ext);
        if selector & 0xfffc == 0 {
            return Err(self.ts(error));
        }
        let raw = self.read_descriptor(selector, Vector::InvalidTss, self.ext)?;
        let mut cs = Segment::from_descriptor(selector, raw);
        let fits = if cs.attrs & EC != 0 { cs.dpl() <= cs.rpl() } else { cs.dpl() == cs.rpl() };
        if !cs.is_code() || !fits {
            return Err(self.ts(error));
        }
        if !cs.present() {
            return Err(self.np(error));
        }
        self.mark_accessed(selector, raw, &mut cs)?;
        self.seg[CS] = cs;
        Ok(())
    }

    /// What may still fault once the new task is complete: the error code's push, the first address.
    fn finish_task(&mut self, wide: bool, error_code: Option<u32>) -> Result<(), Trap> {
        if let Some(code) = error_code {
            let mut stack = self.current_stack();
            self.push_frame(&mut stack, &[code.into()], if wide { 4 } else { 2 })?;
            self.set_stack_pointer(&stack);
        }
        if self.regs[usize::from(RIP)] > u64::from(self.seg[CS].limit) {
            let ext = self.ext;
            return Err(self.gp(ext));
        }
        Ok(())
    }

    /// IRET with NT set: back to the task in the current TSS's link field.
    ///
    /// # Errors
    /// #TS, #NP, #GP, #PF.
    pub fn task_return(&mut self, next_ip: u64) -> Result<(), Trap> {
        let link = self.load_system::<u16>(self.tr.base)?;
        let error = selector_error(link, 0);
        if link & 4 != 0 || link & 0xfffc == 0 {
            return Err(self.ts(error));
        }
        let raw = self.read_descriptor(link, Vector::InvalidTss, 0)?;
        let tss = Segment::from_descriptor(link, raw);
        if !matches!(tss.attrs & (S | 15), 3 | 11) {
            return Err(self.ts(error));
        }
        if !tss.present() {
            return Err(self.np(error));
        }
        let flags = self.rflags();
        self.task_switch(tss, TaskCause::Return, next_ip, flags, None)
    }
}
