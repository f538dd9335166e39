//! x87 instructions. The guest's x87 and MMX registers live in the host's own while a vCPU runs on a thread: compiled Rust code never
//! touches them, and the kernel keeps them per thread. A thread-local says whose they are; another vCPU's first use puts them away.
//!
//! Instruction and data pointers are kept in software ([`Fpu`]), because the host's would be addresses of stubs.

use super::{LOAD, NO_MEM, STORE, Scratch, area, call, numeric, stub, x87_env};
use crate::cpu::{Cpu, Fpu, Trap};
use crate::decode::{Ctx, Exec, Flow, Handler, Op};
use crate::mmu::Access;
use ringfort_x86::Vector;
use ringfort_x86::cr::*;
use ringfort_x86::segment::CS;
use std::arch::asm;
use std::cell::Cell;

/// FSW: exception summary.
const FSW_ES: u16 = 1 << 7;

thread_local! {
    /// Whose state is in this thread's x87 registers; null if nobody's.
    static LIVE: Cell<*mut Fpu> = const { Cell::new(std::ptr::null_mut()) };
}

impl Drop for Fpu {
    fn drop(&mut self) {
        let me: *mut Fpu = self;
        // During the destruction of thread-locals nobody owns the registers any more.
        let _ = LIVE.try_with(|l| {
            if l.get() == me {
                l.set(std::ptr::null_mut())
            }
        });
    }
}

impl Fpu {
    fn put_away(&mut self) {
        // SAFETY: the image is 512 bytes, 64-byte aligned. FNINIT leaves the registers as compiled code may expect them.
        unsafe { asm!("fxsave64 [{0}]", "fninit", in(reg) self.image.as_mut_ptr(), options(nostack)) };
    }
}

impl Cpu {
    /// Make the host's x87 registers hold this vCPU's state.
    #[inline(always)]
    pub(super) fn own_fpu(&mut self) {
        if LIVE.get() != &raw mut self.fpu {
            self.take_fpu();
        }
    }

    #[cold]
    #[inline(never)]
    fn take_fpu(&mut self) {
        let other = LIVE.get();
        if !other.is_null() {
            // SAFETY: an owner's registers are put away before its vCPU moves to another thread (`fpu_save` ends each run), and dropping
            // it clears LIVE, so it is alive and nobody else uses it.
            unsafe { (*other).put_away() };
        }
        LIVE.set(&raw mut self.fpu);
        // MXCSR is loaded by FXRSTOR too; what stands in the image is of no meaning, so it is given the one in force.
        let mut mxcsr = 0u32;
        // SAFETY: stores MXCSR to a local; loads an image whose control words are those of some earlier FXSAVE or validated; FXRSTOR
        // does not fault on any x87 part. The XMM registers are declared clobbered by the ABI of the block's explicit list.
        unsafe {
            asm!("stmxcsr [{0}]", in(reg) &mut mxcsr, options(nostack));
            self.fpu.image[24..28].copy_from_slice(&mxcsr.to_le_bytes());
            asm!("fxrstor64 [{0}]", in(reg) self.fpu.image.as_ptr(), options(nostack),
                out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
                out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _);
        }
    }

    /// Prepare this thread for running the vCPU. Call at the start of each run.
    pub fn fpu_load(&mut self) {
        area::unblock_sigfpe();
    }

    /// Put the x87 state into [`Fpu::image`], so that the vCPU may be looked at or move to another thread. Call at the end of each run.
    pub fn fpu_save(&mut self) {
        if LIVE.get() == &raw mut self.fpu {
            self.fpu.put_away();
            LIVE.set(std::ptr::null_mut());
        }
    }

    /// Whether an unmasked x87 exception is pending.
    pub(super) fn x87_pending(&mut self) -> bool {
        self.own_fpu();
        fnstsw() & FSW_ES != 0
    }

    /// Execute `f` with all x87 exceptions masked, and put the guest's masks back.
    #[cold]
    pub(super) fn ignoring_errors(
        &mut self,
        f: impl FnOnce(&mut Cpu) -> Result<(), Trap>,
    ) -> Result<(), Trap> {
        self.fpu_save();
        let fcw = [self.fpu.image[0], self.fpu.image[1]];
        self.fpu.image[0] |= 0x3f;
        self.fpu.image[2] &= !(FSW_ES as u8);
        let done = f(self);
        self.fpu_save();
        if self.fpu.image[0] == fcw[0] | 0x3f && self.fpu.image[1] == fcw[1] {
            self.fpu.image[0] = fcw[0];
        }
        let unmasked = self.fpu.image[2] & !self.fpu.image[0] & 0x3f;
        if unmasked != 0 {
            self.fpu.image[2] |= FSW_ES as u8;
            self.fpu.image[3] |= 0x80;
        }
        done
    }

    /// Whether an x87 instruction may execute.
    ///
    /// # Errors
    /// #NM.
    #[inline(always)]
    pub(super) fn check_x87(&mut self) -> Result<(), Trap> {
        if self.cr0 & (CR0_EM | CR0_TS) != 0 {
            return Err(self.nm());
        }
        self.own_fpu();
        Ok(())
    }

    /// #MF if an unmasked exception is pending (and reported so).
    ///
    /// # Errors
    /// #MF.
    pub(super) fn check_pending(&mut self) -> Result<(), Trap> {
        if self.cr0 & CR0_NE != 0 && self.x87_pending() {
            return Err(self.raise(Vector::X87Error, 0));
        }
        Ok(())
    }

    #[inline(always)]
    fn note_x87(&mut self, op: &Op) {
        self.fpu.fip = self.this_ip(op);
        self.fpu.fcs = self.seg[CS].selector;
        self.fpu.fop = op.imm as u16;
    }

    #[inline(always)]
    fn note_x87_data(&mut self, op: &Op) {
        self.fpu.fdp = self.truncate(op, self.effective(op));
        self.fpu.fds = self.seg[usize::from(op.seg)].selector;
    }
}

pub(super) fn fnstsw() -> u16 {
    let sw: u16;
    // SAFETY: reads the status word; never faults.
    unsafe { asm!("fnstsw ax", out("ax") sw, options(nomem, nostack)) };
    sw
}

fn fnstcw() -> u16 {
    let mut cw = 0u16;
    // SAFETY: stores the control word to a local; never faults.
    unsafe { asm!("fnstcw word ptr [{0}]", in(reg) &mut cw, options(nostack)) };
    cw
}

/// Arithmetic and moves: the instruction and data pointers follow.
fn compute<const MEM: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.check_x87()?;
    let size = usize::from(op.memsize);
    match MEM {
        NO_MEM => call(cpu, op, std::ptr::null_mut())?,
        LOAD => operand::<LOAD>(cpu, op, size)?,
        _ => operand::<STORE>(cpu, op, size)?,
    }
    cpu.note_x87(op);
    if MEM != NO_MEM {
        cpu.note_x87_data(op);
    }
    Ok(Flow::Next)
}

/// Control words: FLDCW, FNSTCW, FNSTSW to memory, FNCLEX, and those that do nothing.
fn control<const MEM: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.check_x87()?;
    match MEM {
        NO_MEM => call(cpu, op, std::ptr::null_mut())?,
        LOAD => operand::<LOAD>(cpu, op, 2)?,
        _ => {
            let lin = cpu.linear(op, 2, Access::Write)?;
            let v = if op.imm as u16 & 0x700 == 0x100 { fnstcw() } else { fnstsw() };
            cpu.store(lin, v)?;
        }
    }
    Ok(Flow::Next)
}

#[inline(always)]
fn operand<const MEM: u8>(cpu: &mut Cpu, op: &Op, size: usize) -> Result<(), Trap> {
    let access = if MEM == LOAD { Access::Read } else { Access::Write };
    match cpu.linear(op, size, access) {
        Ok(lin) => match cpu.probe(lin, size, MEM == STORE) {
            Some(p) => call(cpu, op, p),
            None => indirect::<MEM>(cpu, op, lin, size),
        },
        Err(t) => Err(after_pending(cpu, t)),
    }
}

/// A memory operand faults: a pending #MF comes first.
#[cold]
pub(super) fn after_pending(cpu: &mut Cpu, t: Trap) -> Trap {
    let info = cpu.trap;
    match cpu.check_pending() {
        Err(mf) => mf,
        Ok(()) => {
            cpu.trap = info;
            t
        }
    }
}

#[cold]
#[inline(never)]
fn indirect<const MEM: u8>(cpu: &mut Cpu, op: &Op, lin: u64, size: usize) -> Result<(), Trap> {
    // 80-bit operands want the alignment of 64-bit ones (Intel SDM 3A table 6-7).
    if let Err(t) = cpu.check_alignment(lin, size.min(8)) {
        return Err(after_pending(cpu, t));
    }
    let mut buf = Scratch([0; 64]);
    let at = buf.0.as_mut_ptr();
    if MEM == LOAD {
        if let Err(t) = cpu.load_bytes(lin, &mut buf.0[..size]) {
            return Err(after_pending(cpu, t));
        }
        return call(cpu, op, at);
    }
    if let Err(t) = cpu.probe_write(lin, size) {
        return Err(after_pending(cpu, t));
    }
    call(cpu, op, at)?;
    // With an unmasked exception other than precision nothing has been stored (Intel SDM 1 section 8.5).
    let sw = fnstsw();
    if sw & FSW_ES != 0 && sw & !fnstcw() & 0x1f != 0 {
        return Ok(());
    }
    cpu.store_bytes(lin, &buf.0[..size])
}

fn fnstsw_ax(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.check_x87()?;
    cpu.set_reg::<u16>(0, fnstsw());
    Ok(Flow::Next)
}

fn fninit(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.check_x87()?;
    // SAFETY: FNINIT never faults, and the registers are the guest's.
    unsafe { asm!("fninit", options(nomem, nostack)) };
    cpu.clear_pointers();
    Ok(Flow::Next)
}

fn fwait(cpu: &mut Cpu, op: &Op) -> Exec {
    if cpu.cr0 & (CR0_MP | CR0_TS) == CR0_MP | CR0_TS {
        return Err(cpu.nm());
    }
    cpu.own_fpu();
    if cpu.x87_pending() {
        numeric(cpu, op, std::ptr::null_mut(), Vector::X87Error as u32)?;
    }
    Ok(Flow::Next)
}

impl Cpu {
    /// FIP, FDP, FOP and their selectors as FNINIT leaves them.
    pub(super) fn clear_pointers(&mut self) {
        (self.fpu.fip, self.fpu.fcs, self.fpu.fdp, self.fpu.fds, self.fpu.fop) = (0, 0, 0, 0, 0);
    }
}

/// The opcode byte and ModRM of an x87 instruction (9B stands alone).
fn opcode(bytes: &[u8]) -> Option<[u8; 2]> {
    let at = bytes.iter().position(
        |b| !matches!(b, 0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3 | 0x40..=0x4f),
    )?;
    match bytes[at] {
        0x9b => Some([0x9b, 0]),
        b @ 0xd8..=0xdf => Some([b, *bytes.get(at + 1)?]),
        _ => None,
    }
}

pub(super) fn lower(ctx: &mut Ctx<'_>) -> Option<Handler> {
    if ctx.i.encoding() != iced_x86::EncodingKind::Legacy || ctx.i.is_invalid() {
        return None;
    }
    // In 16- and 32-bit code 40 to 4F are INC and DEC, and never precede an x87 opcode within an instruction.
    let code = opcode(ctx.bytes)?;
    let [b, m] = code;
    let mem = b != 0x9b && m < 0xc0;
    let reg = m >> 3 & 7;
    ctx.op.imm = u64::from(b & 7) << 8 | u64::from(m);
    let special: Option<Handler> = match (b, reg) {
        (0x9b, _) => Some(fwait),
        (0xd9, 4) if mem => Some(x87_env::fldenv),
        (0xd9, 6) if mem => Some(x87_env::fnstenv),
        (0xdd, 4) if mem => Some(x87_env::frstor),
        (0xdd, 6) if mem => Some(x87_env::fnsave),
        _ if code == [0xdf, 0xe0] => Some(fnstsw_ax),
        _ if code == [0xdb, 0xe3] => Some(fninit),
        _ => None,
    };
    if special.is_some() {
        if mem {
            // 16-bit formats are half as long.
            let long = matches!(ctx.i.memory_size().size(), 28 | 108);
            ctx.op.opsize = if long { 4 } else { 2 };
        }
        return special;
    }
    // FCMOVcc reads flags, FCOMI and relatives write them.
    let flags = !mem && (matches!(b, 0xda | 0xdb) && (reg < 4 || b == 0xdb && matches!(reg, 5 | 6)))
        || !mem && b == 0xdf && matches!(reg, 5 | 6);
    ctx.op.aux = stub::x87(code, flags)? as u64;
    let store = mem
        && match b {
            0xd9 => matches!(reg, 2 | 3 | 7),
            0xdb => matches!(reg, 1..=3 | 7),
            0xdd => matches!(reg, 1..=3 | 7),
            0xdf => matches!(reg, 1..=3 | 6 | 7),
            _ => false,
        };
    let is_control =
        mem && (b == 0xd9 && matches!(reg, 5 | 7) || b == 0xdd && reg == 7) || !mem && b == 0xdb && reg == 4;
    if mem && !is_control && ctx.op.memsize == 0 {
        return None;
    }
    Some(match (is_control, mem, store) {
        (true, false, _) => control::<NO_MEM>,
        (true, _, false) => control::<LOAD>,
        (true, ..) => control::<STORE>,
        (_, false, _) => compute::<NO_MEM>,
        (_, _, false) => compute::<LOAD>,
        _ => compute::<STORE>,
    })
}
