//! PUSH, POP, PUSHA, POPA, ENTER, LEAVE, and the stack accesses of everything else.

use crate::cpu::{Cpu, Int, Trap, gpr::*};
use crate::decode::{Ctx, Exec, Handler, Op};
use crate::mmu::Access;
use iced_x86::{Mnemonic, OpKind};
use ringfort_x86::Vector;
use ringfort_x86::segment::SS;

impl Cpu {
    /// The stack pointer, in the stack's width.
    #[inline(always)]
    pub fn sp(&self) -> u64 {
        self.regs[RSP] & self.sp_mask()
    }

    /// Which bits of RSP count.
    #[inline(always)]
    fn sp_mask(&self) -> u64 {
        if self.code64() {
            u64::MAX
        } else if self.seg[SS].db() {
            0xffff_ffff
        } else {
            0xffff
        }
    }

    /// Set the stack pointer; with a 16-bit stack the rest of ESP stays.
    #[inline(always)]
    pub fn set_sp(&mut self, v: u64) {
        let mask = self.sp_mask();
        self.regs[RSP] = if mask == 0xffff { self.regs[RSP] & !mask | v & mask } else { v & mask };
    }

    /// A non-canonical address is #SS when the stack is accessed.
    #[cold]
    fn on_stack(&mut self, t: Trap) -> Trap {
        if self.trap.non_canonical {
            self.trap.vector = Vector::StackFault as u8;
            self.trap.non_canonical = false;
        }
        t
    }

    /// Store at stack offset `sp`.
    ///
    /// # Errors
    /// As [`Cpu::store`], with #SS(0) for limits and non-canonical addresses.
    #[inline(always)]
    pub fn store_stack<T: Int>(&mut self, sp: u64, v: T) -> Result<(), Trap> {
        let lin = self.stack_linear(sp, T::SIZE, Access::Write)?;
        self.store(lin, v).map_err(|t| self.on_stack(t))
    }

    /// Load from stack offset `sp`.
    ///
    /// # Errors
    /// As [`Cpu::load`], with #SS(0) for limits and non-canonical addresses.
    #[inline(always)]
    pub fn load_stack<T: Int>(&mut self, sp: u64) -> Result<T, Trap> {
        let lin = self.stack_linear(sp, T::SIZE, Access::Read)?;
        self.load::<T>(lin).map_err(|t| self.on_stack(t))
    }

    /// Push `v`, with the current privilege.
    ///
    /// # Errors
    /// As [`Cpu::store_stack`]; then RSP is unchanged.
    #[inline(always)]
    pub fn push<T: Int>(&mut self, v: T) -> Result<(), Trap> {
        let sp = self.regs[RSP].wrapping_sub(T::SIZE as u64) & self.sp_mask();
        self.store_stack(sp, v)?;
        self.set_sp(sp);
        Ok(())
    }

    /// Fault as a push of `size` bytes would.
    ///
    /// # Errors
    /// As [`Cpu::push`].
    pub fn probe_push(&mut self, size: usize) -> Result<(), Trap> {
        let sp = self.regs[RSP].wrapping_sub(size as u64) & self.sp_mask();
        let lin = self.stack_linear(sp, size, Access::Write)?;
        self.probe_write(lin, size).map_err(|t| self.on_stack(t))
    }

    /// Pop, with the current privilege.
    ///
    /// # Errors
    /// As [`Cpu::load_stack`]; then RSP is unchanged.
    #[inline(always)]
    pub fn pop<T: Int>(&mut self) -> Result<T, Trap> {
        let sp = self.sp();
        let v = self.load_stack::<T>(sp)?;
        self.set_sp(sp.wrapping_add(T::SIZE as u64));
        Ok(v)
    }
}

/// 64-bit code, 64-bit operand: no segment, no masks.
fn push_reg64(cpu: &mut Cpu, op: &Op) -> Exec {
    let sp = cpu.regs[RSP].wrapping_sub(8);
    let Some(p) = cpu.probe(sp, 8, true) else { return push_reg::<u64>(cpu, op) };
    // SAFETY: as in `Cpu::store`.
    unsafe { p.cast::<u64>().write_unaligned(cpu.reg::<u64>(op.dst)) };
    cpu.regs[RSP] = sp;
    cpu.then(op)
}

fn pop_reg64(cpu: &mut Cpu, op: &Op) -> Exec {
    let sp = cpu.regs[RSP];
    let Some(p) = cpu.probe(sp, 8, false) else { return pop_reg::<u64>(cpu, op) };
    // SAFETY: as in `Cpu::load`.
    let v = unsafe { p.cast::<u64>().read_unaligned() };
    cpu.regs[RSP] = sp.wrapping_add(8);
    // After the increment: POP RSP keeps what was popped.
    cpu.set_reg(op.dst, v);
    cpu.then(op)
}

#[inline(never)]
fn push_reg<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.push(cpu.reg::<T>(op.dst))?;
    cpu.then(op)
}

fn push_imm<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.push(T::from_u64(op.imm))?;
    cpu.then(op)
}

fn push_mem<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let lin = cpu.linear(op, T::SIZE, Access::Read)?;
    let v = cpu.load::<T>(lin)?;
    cpu.push(v)?;
    cpu.then(op)
}

fn push_segment<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let selector = cpu.seg[usize::from(op.dst)].selector;
    cpu.push(T::from_u64(selector.into()))?;
    cpu.then(op)
}

#[inline(never)]
fn pop_reg<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let v = cpu.pop::<T>()?;
    cpu.set_reg(op.dst, v);
    cpu.then(op)
}

fn pop_mem<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let before = cpu.regs[RSP];
    let v = cpu.pop::<T>()?;
    // The address is formed with the incremented RSP.
    let stored = match cpu.linear(op, T::SIZE, Access::Write) {
        Ok(lin) => cpu.store(lin, v),
        Err(t) => Err(t),
    };
    if let Err(t) = stored {
        cpu.regs[RSP] = before;
        return Err(t);
    }
    cpu.then(op)
}

fn pusha<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let mask = cpu.sp_mask();
    let mut sp = cpu.sp();
    // What is stored before a fault lies beyond the stack pointer, which does not move then.
    for n in 0..8 {
        sp = sp.wrapping_sub(T::SIZE as u64) & mask;
        let v = cpu.reg::<T>(n * 8);
        cpu.store_stack(sp, v)?;
    }
    cpu.set_sp(sp);
    cpu.then(op)
}

fn popa<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let mask = cpu.sp_mask();
    let mut sp = cpu.sp();
    let mut values = [T::default(); 8];
    for v in values.iter_mut().rev() {
        *v = cpu.load_stack(sp)?;
        sp = sp.wrapping_add(T::SIZE as u64) & mask;
    }
    for (n, v) in values.into_iter().enumerate() {
        if n != RSP {
            cpu.set_reg(n as u8 * 8, v);
        }
    }
    cpu.set_sp(sp);
    cpu.then(op)
}

fn enter<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let mask = cpu.sp_mask();
    let size = T::SIZE as u64;
    let level = op.aux & 31;
    let mut sp = cpu.sp().wrapping_sub(size) & mask;
    cpu.store_stack(sp, cpu.reg::<T>(RBP as u8 * 8))?;
    let frame = sp;
    if level > 0 {
        let mut bp = cpu.regs[RBP];
        for _ in 1..level {
            bp = bp.wrapping_sub(size);
            let v = cpu.load_stack::<T>(bp & mask)?;
            sp = sp.wrapping_sub(size) & mask;
            cpu.store_stack(sp, v)?;
        }
        sp = sp.wrapping_sub(size) & mask;
        // With a 16-bit stack and 32-bit operands the upper half is that of ESP.
        let link = cpu.regs[RSP] & !mask | frame;
        cpu.store_stack(sp, T::from_u64(link))?;
    }
    sp = sp.wrapping_sub(op.imm & 0xffff) & mask;
    // The new top of the stack must be writable (Intel SDM 2A, ENTER).
    let lin = cpu.stack_linear(sp, T::SIZE, Access::Write)?;
    cpu.probe_write(lin, T::SIZE).map_err(|t| cpu.on_stack(t))?;
    let link = cpu.regs[RSP] & !mask | frame;
    cpu.set_reg(RBP as u8 * 8, T::from_u64(link));
    cpu.set_sp(sp);
    cpu.then(op)
}

fn leave<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let bp = cpu.regs[RBP] & cpu.sp_mask();
    let v = cpu.load_stack::<T>(bp)?;
    cpu.set_sp(bp.wrapping_add(T::SIZE as u64));
    cpu.set_reg(RBP as u8 * 8, v);
    cpu.then(op)
}

pub(super) fn lower(ctx: &mut Ctx<'_>) -> Option<Handler> {
    use Mnemonic as M;
    let i = ctx.i;
    let step = i.stack_pointer_increment().unsigned_abs() as usize;
    let in64 = ctx.mode.code == crate::cpu::CodeSize::Bits64;
    Some(match i.mnemonic() {
        M::Push => match i.op0_kind() {
            OpKind::Register if i.op0_register().is_segment_register() => wide!(step, push_segment),
            OpKind::Register if in64 && step == 8 => push_reg64,
            OpKind::Register => wide!(step, push_reg),
            OpKind::Memory => wide!(step, push_mem),
            _ => wide!(step, push_imm),
        },
        M::Pop => match i.op0_kind() {
            OpKind::Register if i.op0_register().is_segment_register() => return None,
            OpKind::Register if in64 && step == 8 => pop_reg64,
            OpKind::Register => wide!(step, pop_reg),
            _ => wide!(step, pop_mem),
        },
        M::Pusha => pusha::<u16>,
        M::Pushad => pusha::<u32>,
        M::Popa => popa::<u16>,
        M::Popad => popa::<u32>,
        M::Enter => wide!(ctx.op.opsize, enter),
        M::Leave => wide!(ctx.op.opsize, leave),
        _ => return None,
    })
}
