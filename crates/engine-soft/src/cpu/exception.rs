//! Delivery of exceptions and interrupts (Intel SDM 3A chapter 6, sections 20.3 and 20.1.4; AMD APM 2 chapter 8).

use super::segmentation::{canonical, null_segment, selector_error, v86_segment};
use super::stack::Stack;
use super::task::TaskCause;
use super::{Activity, Cpu, RIP, Shadow, Trap, TrapInfo, gpr};
use ringfort_x86::Vector;
use ringfort_x86::cr::*;
use ringfort_x86::exception::vector_has_error_code;
use ringfort_x86::flags::*;
use ringfort_x86::segment::*;

/// Where an interrupt or exception comes from: this decides on privilege checks, the return address and the EXT bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InterruptKind {
    /// An exception at the current instruction, with its error code if it has one.
    Exception(Option<u32>),
    /// INT n; the address of the next instruction.
    Software(u64),
    /// INT3 or INTO; the address of the next instruction. As INT n, but not subject to IOPL and redirection in virtual-8086 mode.
    IntTrap(u64),
    /// INT1; the address of the next instruction.
    Icebp(u64),
    /// An external interrupt.
    Hardware,
    /// An NMI.
    Nmi,
}

impl InterruptKind {
    fn ext(self) -> u32 {
        u32::from(!matches!(self, Self::Software(_) | Self::IntTrap(_)))
    }
    fn soft(self) -> bool {
        self.ext() == 0
    }
}

/// Exceptions that are faults: the pushed image has RF set so that an instruction breakpoint does not hit again on return.
fn is_fault(vector: u8) -> bool {
    matches!(vector, 0 | 5 | 6 | 7 | 10..=14 | 16 | 17 | 19..=21)
}

fn contributory(vector: u8) -> bool {
    matches!(vector, 0 | 10..=13)
}

/// Whether `second`, raised while `first` is being delivered, becomes a double fault (Intel SDM 3A table 6-5).
fn doubles(first: u8, second: u8) -> bool {
    let pf = Vector::PageFault as u8;
    contributory(first) && contributory(second) || first == pf && (second == pf || contributory(second))
}

/// An IDT entry, decoded.
struct Gate {
    /// Type field: 5 task, 6/7 16-bit, 14/15 32- or 64-bit interrupt/trap gate.
    kind: u8,
    selector: u16,
    offset: u64,
    ist: u8,
}

impl Cpu {
    /// Deliver an exception raised at `regs[RIP]`; nested faults become #DF and shutdown.
    pub fn deliver_exception(&mut self, info: TrapInfo) {
        let mut now = info;
        loop {
            if now.vector == Vector::PageFault as u8 {
                self.cr2 = now.address;
            }
            let code = vector_has_error_code(now.vector).then_some(now.error);
            let Err(_) = self.interrupt(now.vector, InterruptKind::Exception(code)) else { return };
            let second = self.trap;
            if now.vector == Vector::DoubleFault as u8 {
                self.activity = Activity::Shutdown;
                return;
            }
            if doubles(now.vector, second.vector) {
                if second.vector == Vector::PageFault as u8 {
                    self.cr2 = second.address;
                }
                now = TrapInfo { vector: Vector::DoubleFault as u8, ..TrapInfo::default() };
            } else {
                now = second;
            }
        }
    }

    /// Deliver an interrupt between instructions; what goes wrong on the way is delivered as an exception.
    pub fn deliver_interrupt(&mut self, vector: u8, kind: InterruptKind) {
        if self.interrupt(vector, kind).is_err() {
            let info = self.trap;
            self.deliver_exception(info);
        }
    }

    /// Deliver an interrupt or exception once.
    ///
    /// # Errors
    /// What the delivery itself raises; then nothing has changed (but for task switches that got past their point of no return).
    pub fn interrupt(&mut self, vector: u8, kind: InterruptKind) -> Result<(), Trap> {
        self.ext = kind.ext();
        let r = if self.protected() {
            self.interrupt_protected(vector, kind)
        } else {
            self.interrupt_real(vector, kind)
        };
        self.ext = 0;
        r?;
        if self.activity == Activity::Halted {
            self.activity = Activity::Running;
        }
        self.shadow = Shadow::None;
        if kind == InterruptKind::Nmi {
            self.nmi_blocked = true;
        }
        if vector == Vector::Debug as u8 {
            self.dr7 &= !DR7_GD;
        }
        Ok(())
    }

    /// The address that an interrupt returns to.
    fn return_address(&self, kind: InterruptKind) -> u64 {
        match kind {
            InterruptKind::Software(n) | InterruptKind::IntTrap(n) | InterruptKind::Icebp(n) => n,
            _ => self.regs[usize::from(RIP)],
        }
    }

    /// RFLAGS as an interrupt saves it.
    fn saved_flags(&self, vector: u8, kind: InterruptKind) -> u64 {
        let fault = matches!(kind, InterruptKind::Exception(_)) && is_fault(vector);
        self.rflags() | if fault { RF } else { 0 }
    }

    fn interrupt_real(&mut self, vector: u8, kind: InterruptKind) -> Result<(), Trap> {
        let at = u64::from(vector) * 4;
        if at + 3 > u64::from(self.idtr.limit) {
            return Err(self.gp(u32::from(vector) * 8 + 2));
        }
        let entry = self.load_system::<u32>(self.wrap_linear(self.idtr.base.wrapping_add(at)))?;
        self.enter_vector(entry, kind, self.rflags())?;
        self.sys_flags &= !(IF | TF | RF | AC);
        self.update_mmu_mode();
        Ok(())
    }

    /// Push a 16-bit frame and go to a real-mode vector.
    fn enter_vector(&mut self, entry: u32, kind: InterruptKind, flags: u64) -> Result<(), Trap> {
        let mut stack = self.current_stack();
        let frame = [flags, self.seg[CS].selector.into(), self.return_address(kind)];
        self.push_frame(&mut stack, &frame, 2)?;
        self.set_stack_pointer(&stack);
        self.seg[CS] = self.real_mode_segment(CS, (entry >> 16) as u16);
        self.set_rip(u64::from(entry & 0xffff));
        self.update_decode_mode();
        Ok(())
    }

    /// INT n in virtual-8086 mode with CR4.VME: whether the redirection bitmap sends it to the 8086 program's own vector.
    fn redirected(&mut self, vector: u8) -> Result<bool, Trap> {
        let limit = u64::from(self.tr.limit);
        if limit < 103 {
            return Err(self.gp(0));
        }
        let map = u64::from(self.load_system::<u16>(self.wrap_linear(self.tr.base.wrapping_add(102)))?);
        // The 32 bytes before the I/O bitmap.
        let at = map.wrapping_sub(32).wrapping_add(u64::from(vector / 8));
        if map < 32 || at > limit {
            return Err(self.gp(0));
        }
        let byte = self.load_system::<u8>(self.wrap_linear(self.tr.base.wrapping_add(at)))?;
        Ok(byte >> (vector % 8) & 1 == 0)
    }

    /// Go to the 8086 program's own handler (Intel SDM 3A table 20-2, methods 5 and 6).
    fn enter_redirected(&mut self, vector: u8, kind: InterruptKind) -> Result<(), Trap> {
        let m = self.mmu.access_mode;
        let entry = self.load_as::<u32>(u64::from(vector) * 4, m)?;
        let mut flags = self.rflags();
        let virtual_if = self.iopl() < 3;
        if virtual_if {
            flags = flags & !IF | IOPL | if flags & VIF != 0 { IF } else { 0 };
        }
        self.enter_vector(entry, kind, flags)?;
        self.sys_flags &= !(TF | RF | if virtual_if { VIF } else { IF });
        Ok(())
    }

    fn read_gate(&mut self, vector: u8, kind: InterruptKind) -> Result<Gate, Trap> {
        let long = self.long_mode();
        let size = if long { 16 } else { 8 };
        let error = u32::from(vector) * 8 + 2 + kind.ext();
        let at = u64::from(vector) * size;
        if at + size - 1 > u64::from(self.idtr.limit) {
            return Err(self.gp(error));
        }
        let lin = self.wrap_linear(self.idtr.base.wrapping_add(at));
        let raw = self.load_system::<u64>(lin)?;
        let high = if long { self.load_system::<u64>(lin.wrapping_add(8))? } else { 0 };
        let attrs = (raw >> 40) as u8;
        let gate_kind = attrs & 31;
        let known = if long { matches!(gate_kind, 14 | 15) } else { matches!(gate_kind, 5..=7 | 14 | 15) };
        if !known || kind.soft() && attrs >> 5 & 3 < self.cpl {
            return Err(self.gp(error));
        }
        if attrs & 0x80 == 0 {
            return Err(self.np(error));
        }
        let low = raw & 0xffff | raw >> 32 & 0xffff_0000;
        Ok(Gate {
            kind: gate_kind,
            selector: (raw >> 16) as u16,
            offset: match gate_kind {
                6 | 7 => low & 0xffff,
                _ if long => low | high << 32,
                _ => low,
            },
            ist: if long { (raw >> 32 & 7) as u8 } else { 0 },
        })
    }

    fn interrupt_protected(&mut self, vector: u8, kind: InterruptKind) -> Result<(), Trap> {
        if self.v86() && matches!(kind, InterruptKind::Software(_)) {
            if self.cr4 & CR4_VME != 0 && self.redirected(vector)? {
                return self.enter_redirected(vector, kind);
            }
            if self.iopl() < 3 {
                return Err(self.gp(0));
            }
        }
        let gate = self.read_gate(vector, kind)?;
        let error_code = match kind {
            InterruptKind::Exception(code) => code,
            _ => None,
        };
        if gate.kind == 5 {
            let back = self.return_address(kind);
            let flags = self.saved_flags(vector, kind);
            return self.interrupt_task(gate.selector, back, flags, error_code);
        }
        let ext = kind.ext();
        if gate.selector & 0xfffc == 0 {
            return Err(self.gp(ext));
        }
        let selector_fault = selector_error(gate.selector, ext);
        let raw = self.read_descriptor(gate.selector, Vector::GeneralProtection, ext)?;
        let mut cs = Segment::from_descriptor(gate.selector, raw);
        if !cs.is_code() || cs.dpl() > self.cpl {
            return Err(self.gp(selector_fault));
        }
        let long = self.long_mode();
        if long && (!cs.long() || cs.db()) {
            return Err(self.gp(selector_fault));
        }
        if !cs.present() {
            return Err(self.np(selector_fault));
        }
        let conforming = cs.attrs & EC != 0;
        let cpl = if conforming { self.cpl } else { cs.dpl() };
        let inner = cpl < self.cpl;
        if self.v86() && cpl != 0 {
            return Err(self.gp(selector_fault));
        }
        if if long { !canonical(gate.offset) } else { gate.offset > u64::from(cs.limit) } {
            return Err(self.gp(ext));
        }
        let mut stack = self.gate_stack(&gate, cpl, inner)?;
        let flags = self.saved_flags(vector, kind);
        let mut frame = [0u64; 10];
        let mut n = 0;
        let mut push = |v: u64| {
            frame[n] = v;
            n += 1;
        };
        if self.v86() {
            for s in [GS, FS, DS, ES] {
                push(self.seg[s].selector.into());
            }
        }
        if inner || long {
            push(self.seg[SS].selector.into());
            push(self.regs[gpr::RSP]);
        }
        push(flags);
        push(self.seg[CS].selector.into());
        push(self.return_address(kind));
        if let Some(code) = error_code {
            push(code.into());
        }
        let size = match gate.kind {
            _ if long => 8,
            6 | 7 => 2,
            _ => 4,
        };
        self.mark_accessed(gate.selector, raw, &mut cs)?;
        self.push_frame(&mut stack, &frame[..n], size)?;

        // From here on nothing can fail.
        if self.v86() {
            for s in [GS, FS, DS, ES] {
                self.seg[s] = null_segment(0);
            }
        }
        if inner {
            self.seg[SS] = stack.ss;
        }
        cs.selector = gate.selector & !3 | u16::from(cpl);
        self.seg[CS] = cs;
        self.set_stack_pointer(&stack);
        self.set_rip(gate.offset);
        self.cpl = cpl;
        self.sys_flags &= !(TF | VM | RF | NT);
        if gate.kind & 1 == 0 {
            self.sys_flags &= !IF;
        }
        self.update_decode_mode();
        self.update_mmu_mode();
        Ok(())
    }

    /// The stack that a gate's frame goes to.
    fn gate_stack(&mut self, gate: &Gate, cpl: u8, inner: bool) -> Result<Stack, Trap> {
        if !self.long_mode() {
            return if inner { self.inner_stack(cpl) } else { Ok(self.current_stack()) };
        }
        let mut stack = if inner {
            self.inner_stack64(cpl, gate.ist)?
        } else {
            // The handler's code is 64-bit, so RSP counts whole even when compatibility code is interrupted.
            let mut s = self.current_stack();
            s.width = 8;
            s.sp = self.regs[gpr::RSP];
            if gate.ist != 0 {
                s.sp = self.tss_stack64(cpl, gate.ist)?;
            }
            s
        };
        stack.sp &= !15;
        Ok(stack)
    }

    fn interrupt_task(
        &mut self,
        selector: u16,
        back: u64,
        flags: u64,
        error_code: Option<u32>,
    ) -> Result<(), Trap> {
        let ext = self.ext;
        let error = selector_error(selector, ext);
        if selector & 0xfffc == 0 || selector & 4 != 0 {
            return Err(self.gp(error));
        }
        let raw = self.read_descriptor(selector, Vector::GeneralProtection, ext)?;
        let tss = Segment::from_descriptor(selector, raw);
        if !matches!(tss.attrs & (S | 15), 1 | 9) {
            return Err(self.gp(error));
        }
        if !tss.present() {
            return Err(self.np(error));
        }
        self.task_switch(tss, TaskCause::Interrupt, back, flags, error_code)
    }

    /// Enter virtual-8086 mode's segments: all six by real-mode rules.
    pub(super) fn load_v86_segments(&mut self, selectors: [u16; 6]) {
        for (n, s) in selectors.into_iter().enumerate() {
            self.seg[n] = v86_segment(s);
        }
    }
}
