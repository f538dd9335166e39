//! MOVS, STOS, LODS, SCAS, CMPS and their repeated forms.
//!
//! A repeated instruction works through the pages that its operands touch: within a page it runs on host memory. Between such runs its
//! registers are up to date, so a fault or an interrupt finds the architectural state.

use super::alu;
use crate::cpu::{A_ZF, Cpu, Int, RIP, Trap, gpr::*};
use crate::decode::{Ctx, Exec, Flow, Handler, Op, op_flags};
use crate::mmu::Access;
use iced_x86::Mnemonic;
use ringfort_x86::flags::{DF, TF};
use ringfort_x86::segment::{CS, ES};
use std::arch::asm;
use std::sync::atomic::Ordering;

/// Most bytes of a run, which nobody interrupts.
const LONGEST: u64 = 64 << 10;
/// Runs before a repeated instruction lets the run loop look up.
const RUNS: u32 = 32;

/// Which bits of RSI, RDI and RCX count.
#[inline(always)]
fn address_mask(op: &Op) -> u64 {
    if op.flags & op_flags::ADDR32 != 0 {
        0xffff_ffff
    } else if op.flags & op_flags::ADDR16 != 0 {
        0xffff
    } else {
        u64::MAX
    }
}

/// Set a register in the address size: 32 bits clear the rest, 16 bits keep it.
#[inline(always)]
fn set(cpu: &mut Cpu, n: usize, mask: u64, v: u64) {
    cpu.regs[n] = if mask == 0xffff { cpu.regs[n] & !mask | v & mask } else { v & mask };
}

/// Move RSI or RDI by `n` elements.
#[inline(always)]
fn step<T: Int>(cpu: &mut Cpu, reg: usize, op: &Op, n: u64) {
    let by = cpu.string_step(T::SIZE as u64).wrapping_mul(n);
    let v = cpu.regs[reg].wrapping_add(by);
    set(cpu, reg, address_mask(op), v);
}

/// Whether the offset in `seg` is the linear address.
#[inline(always)]
fn is_flat(cpu: &Cpu, seg: usize) -> bool {
    seg < 4 && (cpu.code64() || cpu.mode.flat && seg != CS)
}

#[inline(always)]
fn linear(cpu: &mut Cpu, seg: usize, offset: u64, size: usize, access: Access) -> Result<u64, Trap> {
    if is_flat(cpu, seg) { Ok(offset) } else { cpu.segmented(seg, offset, size, access) }
}

/// The linear address of the element at RSI or RDI.
#[inline(always)]
fn element<T: Int>(cpu: &mut Cpu, op: &Op, reg: usize, access: Access) -> Result<u64, Trap> {
    let seg = if reg == RSI { usize::from(op.seg) } else { ES };
    let offset = cpu.regs[reg] & address_mask(op);
    linear(cpu, seg, offset, T::SIZE, access)
}

/// Host memory of the element at RSI or RDI, and how many elements from there on (in the direction of DF, at most `most`) lie in
/// the same page and segment, or upwards in pages that follow each other in host memory too; `None` if the element must be accessed by the ordinary way.
#[inline(always)]
fn run<T: Int>(
    cpu: &mut Cpu,
    op: &Op,
    reg: usize,
    access: Access,
    most: u64,
) -> Result<Option<(*mut u8, u64)>, Trap> {
    let size = T::SIZE as u64;
    let seg = if reg == RSI { usize::from(op.seg) } else { ES };
    let mask = address_mask(op);
    let offset = cpu.regs[reg] & mask;
    let lin = linear(cpu, seg, offset, T::SIZE, access)?;
    let at = lin & 0xfff;
    if at + size > 0x1000 {
        return Ok(None);
    }
    let Some((host, _)) = cpu.host_run(lin, access)? else { return Ok(None) };
    let down = cpu.sys_flags & DF != 0;
    let (page, room) = if down {
        (at / size + 1, (offset / size).saturating_add(1))
    } else {
        let bytes = if is_flat(cpu, seg) && at % size == 0 && most > (0x1000 - at) / size {
            cpu.host_run_extent(lin, host, access, LONGEST.min(size.saturating_mul(most)))
        } else {
            0x1000 - at
        };
        (bytes / size, ((mask - offset) / size).saturating_add(1))
    };
    let mut n = page.min(room).min(most);
    // The last element may not reach beyond the address size: then it is done alone, and wraps or faults as it should.
    if !down && n > 1 && (mask - offset) < n * size - 1 {
        n -= 1;
    }
    if n > 1 && !is_flat(cpu, seg) {
        let first = if down { offset - (n - 1) * size } else { offset };
        if cpu.segmented(seg, first, (n * size) as usize, access).is_err() {
            n = 1;
        }
    }
    Ok(Some((host, n)))
}

/// One of the five instructions.
trait StringOp {
    /// One element, the ordinary way.
    fn one<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap>;
    /// As many elements as one run has, at most `most`; 0 if there is no run. Comparing instructions end with the first element whose
    /// ZF is `until`.
    fn run<T: Int>(cpu: &mut Cpu, op: &Op, most: u64, until: bool) -> Result<u64, Trap>;
    /// Whether it sets flags and a repetition ends by ZF.
    const COMPARES: bool = false;
}

struct Movs;
impl StringOp for Movs {
    #[inline(always)]
    fn one<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
        let from = element::<T>(cpu, op, RSI, Access::Read)?;
        let v = cpu.load::<T>(from)?;
        let to = element::<T>(cpu, op, RDI, Access::Write)?;
        cpu.store(to, v)?;
        step::<T>(cpu, RSI, op, 1);
        step::<T>(cpu, RDI, op, 1);
        Ok(())
    }
    #[inline(always)]
    fn run<T: Int>(cpu: &mut Cpu, op: &Op, most: u64, _: bool) -> Result<u64, Trap> {
        let Some((from, n)) = run::<T>(cpu, op, RSI, Access::Read, most)? else { return Ok(0) };
        let Some((to, n)) = run::<T>(cpu, op, RDI, Access::Write, n)? else { return Ok(0) };
        // SAFETY: `run` gives that many elements of mapped RAM in the direction of DF.
        unsafe { copy::<T>(to, from, n as usize, cpu.sys_flags & DF != 0) };
        step::<T>(cpu, RSI, op, n);
        step::<T>(cpu, RDI, op, n);
        Ok(n)
    }
}

/// Copy `n` elements as REP MOVS does, element by element in its direction where source and destination overlap.
///
/// # Safety
/// Both pointers are valid for `n` elements (downwards from the element they point to if `down`).
#[inline(always)]
unsafe fn copy<T: Int>(to: *mut u8, from: *const u8, n: usize, down: bool) {
    let bytes = n * T::SIZE;
    let apart = (to as usize).abs_diff(from as usize) >= bytes;
    // SAFETY: the caller's; the direction flag is clear again at the end.
    unsafe {
        if apart && bytes >= 64 && !down {
            std::ptr::copy_nonoverlapping(from, to, bytes);
            return;
        }
        macro_rules! rep {
            ($text:literal) => {
                if down {
                    asm!("std", $text, "cld", inout("rcx") n => _, inout("rsi") from => _, inout("rdi") to => _,
                        options(nostack));
                } else {
                    asm!($text, inout("rcx") n => _, inout("rsi") from => _, inout("rdi") to => _, options(nostack));
                }
            };
        }
        match T::SIZE {
            1 => rep!("rep movsb"),
            2 => rep!("rep movsw"),
            4 => rep!("rep movsd"),
            _ => rep!("rep movsq"),
        }
    }
}

struct Stos;
impl StringOp for Stos {
    #[inline(always)]
    fn one<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
        let to = element::<T>(cpu, op, RDI, Access::Write)?;
        cpu.store(to, cpu.reg::<T>(0))?;
        step::<T>(cpu, RDI, op, 1);
        Ok(())
    }
    #[inline(always)]
    fn run<T: Int>(cpu: &mut Cpu, op: &Op, most: u64, _: bool) -> Result<u64, Trap> {
        let Some((to, n)) = run::<T>(cpu, op, RDI, Access::Write, most)? else { return Ok(0) };
        let back = if cpu.sys_flags & DF != 0 { (n - 1) as usize * T::SIZE } else { 0 };
        // SAFETY: `run` gives that many elements of mapped RAM in the direction of DF; the order in which they are filled does not show.
        unsafe {
            let to = to.sub(back);
            let (n, v) = (n, cpu.regs[RAX]);
            match T::SIZE {
                1 => {
                    asm!("rep stosb", inout("rcx") n => _, inout("rdi") to => _, in("rax") v, options(nostack))
                }
                2 => {
                    asm!("rep stosw", inout("rcx") n => _, inout("rdi") to => _, in("rax") v, options(nostack))
                }
                4 => {
                    asm!("rep stosd", inout("rcx") n => _, inout("rdi") to => _, in("rax") v, options(nostack))
                }
                _ => {
                    asm!("rep stosq", inout("rcx") n => _, inout("rdi") to => _, in("rax") v, options(nostack))
                }
            }
        }
        step::<T>(cpu, RDI, op, n);
        Ok(n)
    }
}

/// Element `n` of a run.
///
/// # Safety
/// It lies in the run.
#[inline(always)]
unsafe fn nth<T: Int>(host: *const u8, n: u64, down: bool) -> T {
    let by = n as isize * T::SIZE as isize;
    // SAFETY: the caller's.
    unsafe { host.offset(if down { -by } else { by }).cast::<T>().read_unaligned() }
}

struct Lods;
impl StringOp for Lods {
    #[inline(always)]
    fn one<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
        let from = element::<T>(cpu, op, RSI, Access::Read)?;
        let v = cpu.load::<T>(from)?;
        cpu.set_reg(0, v);
        step::<T>(cpu, RSI, op, 1);
        Ok(())
    }
    #[inline(always)]
    fn run<T: Int>(cpu: &mut Cpu, op: &Op, most: u64, _: bool) -> Result<u64, Trap> {
        let Some((from, n)) = run::<T>(cpu, op, RSI, Access::Read, most)? else { return Ok(0) };
        // SAFETY: the run's last element.
        let v = unsafe { nth::<T>(from, n - 1, cpu.sys_flags & DF != 0) };
        cpu.set_reg(0, v);
        step::<T>(cpu, RSI, op, n);
        Ok(n)
    }
}

struct Scas;
impl StringOp for Scas {
    const COMPARES: bool = true;
    #[inline(always)]
    fn one<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
        let at = element::<T>(cpu, op, RDI, Access::Read)?;
        let v = cpu.load::<T>(at)?;
        alu::compare(cpu.reg::<T>(0), v, &mut cpu.arith);
        step::<T>(cpu, RDI, op, 1);
        Ok(())
    }
    #[inline(always)]
    fn run<T: Int>(cpu: &mut Cpu, op: &Op, most: u64, until: bool) -> Result<u64, Trap> {
        let Some((at, n)) = run::<T>(cpu, op, RDI, Access::Read, most)? else { return Ok(0) };
        let down = cpu.sys_flags & DF != 0;
        let acc = cpu.reg::<T>(0);
        // SAFETY: elements of the run.
        let get = |k: u64| unsafe { nth::<T>(at, k, down) };
        let mut k = 0;
        while k + 1 < n && (get(k) == acc) != until {
            k += 1;
        }
        alu::compare(acc, get(k), &mut cpu.arith);
        step::<T>(cpu, RDI, op, k + 1);
        Ok(k + 1)
    }
}

struct Cmps;
impl StringOp for Cmps {
    const COMPARES: bool = true;
    #[inline(always)]
    fn one<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
        let a = element::<T>(cpu, op, RSI, Access::Read)?;
        let a = cpu.load::<T>(a)?;
        let b = element::<T>(cpu, op, RDI, Access::Read)?;
        let b = cpu.load::<T>(b)?;
        alu::compare(a, b, &mut cpu.arith);
        step::<T>(cpu, RSI, op, 1);
        step::<T>(cpu, RDI, op, 1);
        Ok(())
    }
    #[inline(always)]
    fn run<T: Int>(cpu: &mut Cpu, op: &Op, most: u64, until: bool) -> Result<u64, Trap> {
        let Some((a, n)) = run::<T>(cpu, op, RSI, Access::Read, most)? else { return Ok(0) };
        let Some((b, n)) = run::<T>(cpu, op, RDI, Access::Read, n)? else { return Ok(0) };
        let down = cpu.sys_flags & DF != 0;
        // SAFETY: elements of both runs.
        let get = |k: u64| unsafe { (nth::<T>(a, k, down), nth::<T>(b, k, down)) };
        let mut k = 0;
        let mut pair = get(0);
        while k + 1 < n && (pair.0 == pair.1) != until {
            k += 1;
            pair = get(k);
        }
        alu::compare(pair.0, pair.1, &mut cpu.arith);
        step::<T>(cpu, RSI, op, k + 1);
        step::<T>(cpu, RDI, op, k + 1);
        Ok(k + 1)
    }
}

fn once<O: StringOp, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    O::one::<T>(cpu, op)?;
    Ok(Flow::Next)
}

fn repeat<O: StringOp, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let mask = address_mask(op);
    let until = op.flags & op_flags::REPNE != 0;
    // With TF or data breakpoints every iteration is an instruction.
    let single = cpu.sys_flags & TF != 0 || cpu.debug_armed();
    for _ in 0..RUNS {
        let left = cpu.regs[RCX] & mask;
        if left == 0 {
            return Ok(Flow::Next);
        }
        let mut done = if single { 0 } else { O::run::<T>(cpu, op, left, until)? };
        if done == 0 {
            O::one::<T>(cpu, op)?;
            done = 1;
        }
        set(cpu, RCX, mask, left - done);
        if done == left || O::COMPARES && (cpu.arith & A_ZF != 0) == until {
            return Ok(Flow::Next);
        }
        if single || cpu.env.me.requests.load(Ordering::Relaxed) != 0 {
            break;
        }
    }
    // Not finished: the same instruction again, after the run loop has looked up.
    cpu.regs[usize::from(RIP)] = cpu.this_ip(op);
    Ok(Flow::Branch)
}

fn form<O: StringOp>(ctx: &Ctx<'_>) -> Handler {
    let w = ctx.op.memsize;
    if ctx.op.flags & (op_flags::REP | op_flags::REPNE) != 0 {
        width!(w, repeat, O)
    } else {
        width!(w, once, O)
    }
}

pub(super) fn lower(ctx: &mut Ctx<'_>) -> Option<Handler> {
    use Mnemonic as M;
    let run = match ctx.i.mnemonic() {
        M::Movsb | M::Movsw | M::Movsq => form::<Movs>(ctx),
        // Shares its name with an SSE2 instruction.
        M::Movsd if ctx.i.is_string_instruction() => form::<Movs>(ctx),
        M::Stosb | M::Stosw | M::Stosd | M::Stosq => form::<Stos>(ctx),
        M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => form::<Lods>(ctx),
        M::Scasb | M::Scasw | M::Scasd | M::Scasq => form::<Scas>(ctx),
        M::Cmpsb | M::Cmpsw | M::Cmpsq => form::<Cmps>(ctx),
        M::Cmpsd if ctx.i.is_string_instruction() => form::<Cmps>(ctx),
        _ => return None,
    };
    if ctx.op.flags & (op_flags::REP | op_flags::REPNE) != 0 {
        // May ask to be run again, and its repetition is a place to look up at.
        ctx.op.flags |= op_flags::END;
    }
    Some(run)
}
