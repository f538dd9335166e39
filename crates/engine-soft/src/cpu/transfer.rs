//! Far jumps, calls and returns, IRET, SYSCALL and SYSENTER (Intel SDM 2 and 3A chapter 5; AMD APM 2 section 4.7, 6.1).

use super::segmentation::{canonical, selector_error};
use super::task::TaskCause;
use super::{CodeSize, Cpu, RIP, Trap, gpr};
use crate::decode::Op;
use ringfort_x86::Vector;
use ringfort_x86::cr::*;
use ringfort_x86::flags::*;
use ringfort_x86::segment::*;

const FLAT_CODE: u16 = PRESENT | S | CODE | RW | ACCESSED | GRANULAR;
const FLAT_DATA: u16 = PRESENT | S | RW | ACCESSED | GRANULAR | DB;

fn at_level(attrs: u16, dpl: u8) -> u16 {
    attrs | u16::from(dpl) << 5
}

impl Cpu {
    /// JMP far to `selector`:`offset`.
    ///
    /// # Errors
    /// #GP, #NP, #TS, #PF by the rules of the mode.
    pub fn far_jump(&mut self, op: &Op, selector: u16, offset: u64) -> Result<(), Trap> {
        if self.real_segments() {
            return self.real_jump(selector, offset);
        }
        let next = self.next_ip(op);
        self.protected_transfer(selector, offset, next, None)
    }

    /// CALL far to `selector`:`offset`, operand size `size` (2, 4, 8).
    ///
    /// # Errors
    /// As [`Cpu::far_jump`], and #SS.
    pub fn far_call(&mut self, op: &Op, selector: u16, offset: u64, size: usize) -> Result<(), Trap> {
        let next = self.next_ip(op);
        if self.real_segments() {
            if offset > u64::from(self.seg[CS].limit) {
                return Err(self.gp(0));
            }
            let mut stack = self.current_stack();
            let frame = [self.seg[CS].selector.into(), next];
            self.push_frame(&mut stack, &frame, size)?;
            self.set_stack_pointer(&stack);
            return self.real_jump(selector, offset);
        }
        self.protected_transfer(selector, offset, next, Some(size))
    }

    fn real_jump(&mut self, selector: u16, offset: u64) -> Result<(), Trap> {
        let cs = self.real_mode_segment(CS, selector);
        if offset > u64::from(cs.limit) {
            return Err(self.gp(0));
        }
        self.seg[CS] = cs;
        self.set_rip(offset);
        self.update_decode_mode();
        Ok(())
    }

    /// Whether `offset` may be RIP in the code segment `cs`.
    fn check_target(&mut self, cs: &Segment, offset: u64) -> Result<(), Trap> {
        let good =
            if self.long_mode() && cs.long() { canonical(offset) } else { offset <= u64::from(cs.limit) };
        if good { Ok(()) } else { Err(self.gp(0)) }
    }

    /// A code segment for a direct transfer from the current level, or through a gate (which ignores RPL). Gives it with CPL as RPL.
    fn code_segment(&mut self, selector: u16, raw: u64, rpl_counts: bool) -> Result<Segment, Trap> {
        let mut cs = Segment::from_descriptor(selector, raw);
        let error = selector_error(selector, 0);
        let allowed = if cs.attrs & EC != 0 {
            cs.dpl() <= self.cpl
        } else {
            cs.dpl() == self.cpl && (!rpl_counts || cs.rpl() <= self.cpl)
        };
        if !cs.is_code() || !allowed || self.long_mode() && cs.long() && cs.db() {
            return Err(self.gp(error));
        }
        if !cs.present() {
            return Err(self.np(error));
        }
        cs.selector = selector & !3 | u16::from(self.cpl);
        Ok(cs)
    }

    /// Put a checked code segment and an offset in force.
    fn enter_code(&mut self, cs: Segment, offset: u64) {
        self.seg[CS] = cs;
        self.set_rip(offset);
        self.update_decode_mode();
    }

    /// JMP (`call` is none) or CALL (with its operand size) in protected mode.
    fn protected_transfer(
        &mut self,
        selector: u16,
        offset: u64,
        next: u64,
        call: Option<usize>,
    ) -> Result<(), Trap> {
        if selector & 0xfffc == 0 {
            return Err(self.gp(0));
        }
        let raw = self.read_descriptor(selector, Vector::GeneralProtection, 0)?;
        let seg = Segment::from_descriptor(selector, raw);
        let error = selector_error(selector, 0);
        if seg.attrs & S != 0 {
            let mut cs = self.code_segment(selector, raw, true)?;
            self.check_target(&cs, offset)?;
            self.mark_accessed(selector, raw, &mut cs)?;
            if let Some(size) = call {
                let mut stack = self.current_stack();
                let frame = [self.seg[CS].selector.into(), next];
                self.push_frame(&mut stack, &frame, size)?;
                self.set_stack_pointer(&stack);
            }
            self.enter_code(cs, offset);
            return Ok(());
        }
        let kind = seg.kind();
        let known = if self.long_mode() { kind == 12 } else { matches!(kind, 1 | 4 | 5 | 9 | 12) };
        if !known || seg.dpl() < self.cpl || seg.dpl() < seg.rpl() {
            return Err(self.gp(error));
        }
        if !seg.present() {
            return Err(self.np(error));
        }
        let cause = if call.is_some() { TaskCause::Call } else { TaskCause::Jump };
        let flags = self.rflags();
        match kind {
            1 | 9 => self.task_switch(seg, cause, next, flags, None),
            5 => self.task_gate((raw >> 16) as u16, cause, next),
            _ => self.call_gate(selector, raw, next, call.is_some()),
        }
    }

    fn task_gate(&mut self, selector: u16, cause: TaskCause, next: u64) -> Result<(), Trap> {
        let error = selector_error(selector, 0);
        if selector & 0xfffc == 0 || selector & 4 != 0 {
            return Err(self.gp(error));
        }
        let raw = self.read_descriptor(selector, Vector::GeneralProtection, 0)?;
        let tss = Segment::from_descriptor(selector, raw);
        if !matches!(tss.attrs & (S | 15), 1 | 9) {
            return Err(self.gp(error));
        }
        if !tss.present() {
            return Err(self.np(error));
        }
        let flags = self.rflags();
        self.task_switch(tss, cause, next, flags, None)
    }

    fn call_gate(&mut self, gate: u16, gate_raw: u64, next: u64, call: bool) -> Result<(), Trap> {
        let long = self.long_mode();
        let wide = gate_raw >> 40 & 8 != 0;
        let mut offset = gate_raw & 0xffff | gate_raw >> 32 & 0xffff_0000;
        if !wide {
            offset &= 0xffff;
        }
        if long {
            offset |= self.read_descriptor_high(gate, Vector::GeneralProtection, 0)? << 32;
        }
        let selector = (gate_raw >> 16) as u16;
        if selector & 0xfffc == 0 {
            return Err(self.gp(0));
        }
        let error = selector_error(selector, 0);
        let raw = self.read_descriptor(selector, Vector::GeneralProtection, 0)?;
        let mut cs = Segment::from_descriptor(selector, raw);
        if !cs.is_code() || cs.dpl() > self.cpl || long && (!cs.long() || cs.db()) {
            return Err(self.gp(error));
        }
        let inner = call && cs.attrs & EC == 0 && cs.dpl() < self.cpl;
        if !inner {
            cs = self.code_segment(selector, raw, false)?;
        } else if !cs.present() {
            return Err(self.np(error));
        }
        self.check_target(&cs, offset)?;
        let size = match (long, wide) {
            (true, _) => 8,
            (false, true) => 4,
            (false, false) => 2,
        };
        if !inner {
            self.mark_accessed(selector, raw, &mut cs)?;
            if call {
                let mut stack = self.current_stack();
                if long {
                    stack.width = 8;
                    stack.sp = self.regs[gpr::RSP];
                }
                self.push_frame(&mut stack, &[self.seg[CS].selector.into(), next], size)?;
                self.set_stack_pointer(&stack);
            }
            self.enter_code(cs, offset);
            return Ok(());
        }
        let cpl = cs.dpl();
        let old = self.current_stack();
        let mut stack = if long { self.inner_stack64(cpl, 0)? } else { self.inner_stack(cpl)? };
        let mut frame = [0u64; 36];
        frame[0] = self.seg[SS].selector.into();
        frame[1] = self.regs[gpr::RSP];
        let mut n = 2;
        let count = if long { 0 } else { (gate_raw >> 32 & 31) as usize };
        if count != 0 {
            let mut parameters = [0u64; 31];
            self.peek_frame(&old, 0, &mut parameters[..count], size)?;
            // The highest address first.
            for v in parameters[..count].iter().rev() {
                frame[n] = *v;
                n += 1;
            }
        }
        frame[n] = self.seg[CS].selector.into();
        frame[n + 1] = next;
        self.mark_accessed(selector, raw, &mut cs)?;
        self.push_frame(&mut stack, &frame[..n + 2], size)?;
        self.seg[SS] = stack.ss;
        self.cpl = cpl;
        cs.selector = selector & !3 | u16::from(cpl);
        self.enter_code(cs, offset);
        self.set_stack_pointer(&stack);
        self.update_mmu_mode();
        Ok(())
    }

    /// Code and stack segment of a return to privilege level `cs & 3` (RETF, IRET), and the new stack where it is an outer one.
    fn return_code(&mut self, selector: u16, offset: u64) -> Result<(Segment, u64), Trap> {
        if selector & 0xfffc == 0 {
            return Err(self.gp(0));
        }
        let error = selector_error(selector, 0);
        let raw = self.read_descriptor(selector, Vector::GeneralProtection, 0)?;
        let cs = Segment::from_descriptor(selector, raw);
        let rpl = cs.rpl();
        let fits = if cs.attrs & EC != 0 { cs.dpl() <= rpl } else { cs.dpl() == rpl };
        if rpl < self.cpl || !cs.is_code() || !fits || self.long_mode() && cs.long() && cs.db() {
            return Err(self.gp(error));
        }
        if !cs.present() {
            return Err(self.np(error));
        }
        self.check_target(&cs, offset)?;
        Ok((cs, raw))
    }

    /// The stack segment of a return whose code segment is `cs`.
    fn return_stack(&mut self, selector: u16, cs: &Segment) -> Result<Segment, Trap> {
        if selector & 0xfffc == 0 {
            // 64-bit code below level 3 may run with a null SS.
            if self.long_mode() && cs.long() && cs.rpl() != 3 && (selector & 3) as u8 == cs.rpl() {
                return Ok(self.null_stack(selector));
            }
            return Err(self.gp(0));
        }
        self.stack_segment(selector, cs.rpl(), Vector::GeneralProtection, 0)
    }

    /// RET far with `release` more bytes taken off the stack; operand size `size`.
    ///
    /// # Errors
    /// #GP, #NP, #SS, #PF.
    pub fn far_return(&mut self, size: usize, release: u64) -> Result<(), Trap> {
        let mut stack = self.current_stack();
        let mut v = [0; 2];
        self.peek_frame(&stack, 0, &mut v, size)?;
        let (ip, selector) = (v[0], v[1] as u16);
        let after = 2 * size as u64 + release;
        if self.real_segments() {
            self.real_jump(selector, ip)?;
            stack.sp = stack.offset(after);
            self.set_stack_pointer(&stack);
            return Ok(());
        }
        let (mut cs, raw) = self.return_code(selector, ip)?;
        if cs.rpl() == self.cpl {
            self.mark_accessed(selector, raw, &mut cs)?;
            stack.sp = stack.offset(after);
            self.set_stack_pointer(&stack);
            self.enter_code(cs, ip);
            return Ok(());
        }
        let mut outer = [0; 2];
        self.peek_frame(&stack, after, &mut outer, size)?;
        let ss = self.return_stack(outer[1] as u16, &cs)?;
        self.mark_accessed(selector, raw, &mut cs)?;
        self.enter_outer(cs, ip, ss, outer[0], release);
        self.drop_inner_segments();
        self.update_decode_mode();
        Ok(())
    }

    /// Enter `cs`:`ip` with a new stack; CPL becomes the RPL of `cs`.
    fn enter_outer(&mut self, cs: Segment, ip: u64, ss: Segment, sp: u64, release: u64) {
        self.cpl = cs.rpl();
        self.seg[SS] = ss;
        self.enter_code(cs, ip);
        let mut stack = self.current_stack();
        stack.sp = sp;
        stack.sp = stack.offset(release);
        self.set_stack_pointer(&stack);
        self.update_mmu_mode();
    }

    /// IRET, operand size `size`. `op` is the instruction.
    ///
    /// # Errors
    /// #GP, #NP, #SS, #TS, #PF.
    pub fn iret(&mut self, op: &Op, size: usize) -> Result<(), Trap> {
        if !self.amd {
            // On Intel also an IRET that faults unblocks NMIs (Intel SDM 3C section 28.2.3).
            self.nmi_blocked = false;
        }
        if !self.protected() {
            return self.iret_real(size);
        }
        if self.v86() {
            return self.iret_v86(size);
        }
        if self.sys_flags & NT != 0 {
            if self.long_mode() {
                return Err(self.gp(0));
            }
            let next = self.next_ip(op);
            self.task_return(next)?;
            self.nmi_blocked = false;
            return Ok(());
        }
        let mut stack = self.current_stack();
        let mut v = [0; 5];
        // 64-bit code always takes SS:RSP off as well.
        let slots = if self.code64() { 5 } else { 3 };
        self.peek_frame(&stack, 0, &mut v[..slots], size)?;
        let (ip, selector, flags) = (v[0], v[1] as u16, v[2]);
        if size == 4 && flags & VM != 0 && self.cpl == 0 && !self.long_mode() {
            return self.iret_to_v86(&stack, ip, selector, flags);
        }
        let (mut cs, raw) = self.return_code(selector, ip)?;
        let outer = cs.rpl() != self.cpl;
        if outer && slots == 3 {
            self.peek_frame(&stack, 3 * size as u64, &mut v[3..], size)?;
        }
        let mask = self.iret_flags(size);
        if outer || slots == 5 {
            let ss = self.return_stack(v[4] as u16, &cs)?;
            self.mark_accessed(selector, raw, &mut cs)?;
            self.enter_outer(cs, ip, ss, v[3], 0);
            if outer {
                self.drop_inner_segments();
                self.update_decode_mode();
            }
        } else {
            self.mark_accessed(selector, raw, &mut cs)?;
            stack.sp = stack.offset(3 * size as u64);
            self.set_stack_pointer(&stack);
            self.enter_code(cs, ip);
        }
        self.write_rflags(flags, mask);
        self.nmi_blocked = false;
        Ok(())
    }

    /// Flags that IRET may change at the current level (before it changes).
    fn iret_flags(&self, size: usize) -> u64 {
        let mut mask = ARITH | TF | DF | NT;
        if size > 2 {
            mask |= RF | AC | ID;
        }
        if self.cpl <= self.iopl() {
            mask |= IF;
        }
        if self.cpl == 0 {
            mask |= IOPL;
            if size > 2 {
                mask |= VIF | VIP;
            }
        }
        mask
    }

    fn iret_real(&mut self, size: usize) -> Result<(), Trap> {
        let mut stack = self.current_stack();
        let mut v = [0; 3];
        self.peek_frame(&stack, 0, &mut v, size)?;
        self.real_jump(v[1] as u16, v[0])?;
        stack.sp = stack.offset(3 * size as u64);
        self.set_stack_pointer(&stack);
        let mask = ARITH | TF | DF | NT | IF | IOPL | if size > 2 { RF | AC | ID } else { 0 };
        self.write_rflags(v[2], mask);
        self.nmi_blocked = false;
        Ok(())
    }

    fn iret_v86(&mut self, size: usize) -> Result<(), Trap> {
        let virtual_if = self.iopl() < 3;
        if virtual_if && (self.cr4 & CR4_VME == 0 || size != 2) {
            return Err(self.gp(0));
        }
        let mut stack = self.current_stack();
        let mut v = [0; 3];
        self.peek_frame(&stack, 0, &mut v, size)?;
        let mut flags = v[2];
        let mut mask = ARITH | TF | DF | NT;
        if virtual_if {
            if flags & TF != 0 || flags & IF != 0 && self.sys_flags & VIP != 0 {
                return Err(self.gp(0));
            }
            mask |= VIF;
            flags = flags & !VIF | if flags & IF != 0 { VIF } else { 0 };
        } else {
            mask |= IF | if size > 2 { RF | AC | ID } else { 0 };
        }
        self.real_jump(v[1] as u16, v[0])?;
        stack.sp = stack.offset(3 * size as u64);
        self.set_stack_pointer(&stack);
        self.write_rflags(flags, mask);
        self.nmi_blocked = false;
        Ok(())
    }

    fn iret_to_v86(&mut self, stack: &super::stack::Stack, ip: u64, cs: u16, flags: u64) -> Result<(), Trap> {
        // ESP, SS, ES, DS, FS, GS follow.
        let mut v = [0; 6];
        self.peek_frame(stack, 12, &mut v, 4)?;
        if ip & 0xffff_ffff > 0xffff {
            return Err(self.gp(0));
        }
        self.set_rflags_raw(flags);
        self.cpl = 3;
        self.load_v86_segments([v[2] as u16, cs, v[1] as u16, v[3] as u16, v[4] as u16, v[5] as u16]);
        self.regs[gpr::RSP] = v[0];
        self.set_rip(ip);
        self.nmi_blocked = false;
        self.update_decode_mode();
        self.update_mmu_mode();
        Ok(())
    }

    /// SYSCALL.
    ///
    /// # Errors
    /// #UD where it is not enabled; in legacy and compatibility mode it exists on AMD only.
    pub fn syscall(&mut self, op: &Op) -> Result<(), Trap> {
        let next = self.next_ip(op);
        if self.efer & EFER_SCE == 0 || !self.protected() || !self.code64() && !self.amd {
            return Err(self.ud());
        }
        if self.long_mode() {
            let target = if self.code64() { self.lstar } else { self.cstar };
            self.regs[gpr::RCX] = next;
            let flags = self.rflags() & !RF;
            self.regs[11] = flags;
            self.write_rflags(flags & !self.sfmask, !0);
            // No single-step trap once the mask has cleared TF.
            self.no_step_trap = self.sys_flags & TF == 0;
            self.enter_flat((self.star >> 32) as u16 & !3, 0, true, (self.star >> 32) as u16 & !3, 8);
            self.set_rip(target);
        } else {
            self.regs[gpr::RCX] = next;
            self.sys_flags &= !(IF | VM | RF);
            self.enter_flat((self.star >> 32) as u16 & !3, 0, false, (self.star >> 32) as u16 & !3, 8);
            self.set_rip(self.star & 0xffff_ffff);
        }
        Ok(())
    }

    /// Flat CS = `code` and SS = `stack` + `plus` at privilege level `cpl`, as the fast system calls make them.
    fn enter_flat(&mut self, code: u16, cpl: u8, long: bool, stack: u16, plus: u16) {
        let rpl = u16::from(cpl);
        let width = if long { LONG } else { DB };
        self.seg[CS] = Segment::flat(code | rpl, at_level(FLAT_CODE | width, cpl));
        self.seg[SS] = Segment::flat(stack.wrapping_add(plus) | rpl, at_level(FLAT_DATA, cpl));
        self.cpl = cpl;
        // From 64-bit code to 64-bit code nothing changes of how to decode.
        if !long || self.mode.code != CodeSize::Bits64 {
            self.update_decode_mode();
        }
        self.update_mmu_mode();
    }

    /// SYSRET, operand size `size`.
    ///
    /// # Errors
    /// #UD, #GP(0).
    pub fn sysret(&mut self, size: usize) -> Result<(), Trap> {
        if self.efer & EFER_SCE == 0 || !self.protected() || !self.code64() && !self.amd {
            return Err(self.ud());
        }
        if self.cpl != 0 {
            return Err(self.gp(0));
        }
        let rcx = self.regs[gpr::RCX];
        // AMD loads a non-canonical RIP and lets the fetch at level 3 fault.
        if size == 8 && !self.amd && !canonical(rcx) {
            return Err(self.gp(0));
        }
        let base = (self.star >> 48) as u16 & !3;
        let code64 = self.code64();
        if self.long_mode() && code64 {
            self.write_rflags(self.regs[11] & !(RF | VM), VALID);
        } else {
            self.sys_flags |= IF;
        }
        let ip = if size == 8 { rcx } else { rcx & 0xffff_ffff };
        if size == 8 {
            self.enter_flat(base.wrapping_add(16), 3, true, base, 8);
        } else {
            self.enter_flat(base, 3, false, base, 8);
        }
        self.set_rip(ip);
        Ok(())
    }

    /// SYSENTER.
    ///
    /// # Errors
    /// #GP(0); #UD in long mode on AMD.
    pub fn sysenter(&mut self) -> Result<(), Trap> {
        if self.amd && self.long_mode() {
            return Err(self.ud());
        }
        let [cs, sp, ip] = self.sysenter;
        if !self.protected() || cs & 0xfffc == 0 {
            return Err(self.gp(0));
        }
        let long = self.long_mode();
        let cs = cs as u16 & !3;
        self.sys_flags &= !(VM | IF | RF);
        self.enter_flat(cs, 0, long, cs, 8);
        self.regs[gpr::RSP] = if long { sp } else { sp & 0xffff_ffff };
        self.set_rip(if long { ip } else { ip & 0xffff_ffff });
        Ok(())
    }

    /// SYSEXIT, operand size `size`.
    ///
    /// # Errors
    /// #GP(0); #UD in long mode on AMD.
    pub fn sysexit(&mut self, size: usize) -> Result<(), Trap> {
        if self.amd && self.long_mode() {
            return Err(self.ud());
        }
        let cs = self.sysenter[0] as u16;
        let (sp, ip) = (self.regs[gpr::RCX], self.regs[gpr::RDX]);
        if !self.protected() || self.cpl != 0 || cs & 0xfffc == 0 {
            return Err(self.gp(0));
        }
        if size == 8 {
            if !canonical(sp) || !canonical(ip) {
                return Err(self.gp(0));
            }
            self.enter_flat(cs.wrapping_add(32) & !3, 3, true, cs & !3, 40);
        } else {
            self.enter_flat(cs.wrapping_add(16) & !3, 3, false, cs & !3, 24);
        }
        let mask = if size == 8 { u64::MAX } else { 0xffff_ffff };
        self.regs[gpr::RSP] = sp & mask;
        self.set_rip(ip & mask);
        Ok(())
    }

    /// RIP, for tests and messages.
    pub fn rip(&self) -> u64 {
        self.regs[usize::from(RIP)]
    }
}
