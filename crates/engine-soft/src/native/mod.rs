//! SIMD and x87 instructions, executed by the host's own CPU on the guest's register values.
//!
//! - [`stub`]: native code for one encoding, made at its first decoding and kept in the [`area`].
//! - this module: the handlers that check, find the memory operand, and call a stub.
//! - [`moves`]: moves of whole registers, without a stub.
//! - [`x87`]: the guest's x87 and MMX state lives in the host's x87 registers while a vCPU runs on its thread.
//! - [`state`]: FXSAVE and relatives; [`xsave`]: the XSAVE family.
//! - [`masked`]: what accesses memory by elements: gathers and masked moves.
//!
//! Numeric exceptions are precise: the guest's masks are in force while a stub executes, and a SIGFPE handler makes the host's exception the
//! stub's result.

mod area;
mod masked;
mod moves;
mod state;
mod stub;
#[cfg(test)]
mod tests;
mod x87;
mod x87_env;
mod xsave;

pub use state::MXCSR_MASK;
pub use stub::{available, uses_mxcsr};
pub use xsave::{AVX_AT, AVX_SIZE, XCR0_VALID, XSAVE_HEADER_END, XSAVE_SIZE};

use crate::cpu::{Cpu, Trap};
use crate::cpuid::host_is_amd;
use crate::decode::{Ctx, Exec, Flow, Handler, Op, op_flags};
use crate::mmu::Access;
use iced_x86::{CpuidFeature, EncodingKind, Instruction, Mnemonic, OpAccess, OpKind, Register};
use ringfort_x86::Vector;
use ringfort_x86::cr::*;
use stub::Stub;

/// The handler for a SIMD, x87 or MMX instruction.
pub fn lower(ctx: &mut Ctx<'_>) -> Option<Handler> {
    moves::lower(ctx)
        .or_else(|| x87::lower(ctx))
        .or_else(|| state::lower(ctx))
        .or_else(|| xsave::lower(ctx))
        .or_else(|| masked::lower(ctx))
        .or_else(|| hint(ctx))
        .or_else(|| simd(ctx))
}

/// What must hold for an instruction to be executed at all.
const SSE: u8 = 0;
const AVX: u8 = 1;
const MMX: u8 = 2;
const SSE_MMX: u8 = 3;

const NO_MEM: u8 = 0;
const LOAD: u8 = 1;
const STORE: u8 = 2;

impl Cpu {
    /// Whether a legacy SSE instruction may execute (Intel SDM 3A table 14-1).
    ///
    /// # Errors
    /// #UD, #NM.
    #[inline(always)]
    fn check_sse(&mut self) -> Result<(), Trap> {
        if self.cr0 & (CR0_EM | CR0_TS) != 0 || self.cr4 & CR4_OSFXSR == 0 {
            return Err(if self.cr0 & CR0_EM != 0 || self.cr4 & CR4_OSFXSR == 0 {
                self.ud()
            } else {
                self.nm()
            });
        }
        Ok(())
    }

    /// Whether a VEX-encoded SIMD instruction may execute (Intel SDM 2A section 2.4).
    ///
    /// # Errors
    /// #UD, #NM.
    #[inline(always)]
    fn check_avx(&mut self) -> Result<(), Trap> {
        let enabled = XCR0_SSE | XCR0_AVX;
        if self.real_segments() || self.cr4 & CR4_OSXSAVE == 0 || self.xcr0 & enabled != enabled {
            return Err(self.ud());
        }
        if self.cr0 & CR0_TS != 0 {
            return Err(self.nm());
        }
        Ok(())
    }

    /// Whether an MMX instruction may execute.
    ///
    /// # Errors
    /// #UD, #NM.
    #[inline(always)]
    fn check_mmx(&mut self) -> Result<(), Trap> {
        if self.cr0 & (CR0_EM | CR0_TS) != 0 {
            return Err(if self.cr0 & CR0_EM != 0 { self.ud() } else { self.nm() });
        }
        Ok(())
    }
}

#[inline(always)]
fn check<const CLASS: u8>(cpu: &mut Cpu) -> Result<(), Trap> {
    match CLASS {
        SSE => cpu.check_sse(),
        AVX => cpu.check_avx(),
        MMX => {
            cpu.check_mmx()?;
            cpu.own_fpu();
            Ok(())
        }
        _ => {
            cpu.check_sse()?;
            cpu.own_fpu();
            Ok(())
        }
    }
}

/// Call the op's stub on `mem` (valid for the op's access, or unused).
#[inline(always)]
fn call(cpu: &mut Cpu, op: &Op, mem: *mut u8) -> Result<(), Trap> {
    // SAFETY: lowering stored the address of a stub that is never freed.
    let stub: Stub = unsafe { std::mem::transmute(op.aux as usize) };
    // SAFETY: a stub touches the vCPU's registers, the op's slots, and the memory operand at `mem`, which the caller vouches for; the
    // CPU features it needs were found on this host when it was lowered.
    let r = unsafe { stub(cpu, mem, op) };
    if r == 0 { Ok(()) } else { numeric(cpu, op, mem, r) }
}

/// A numeric exception kept the stub from completing.
#[cold]
fn numeric(cpu: &mut Cpu, op: &Op, mem: *mut u8, vector: u32) -> Result<(), Trap> {
    if vector == Vector::SimdError as u32 {
        let signalled = cpu.cr4 & CR4_OSXMMEXCPT != 0;
        return Err(if signalled { cpu.raise(Vector::SimdError, 0) } else { cpu.ud() });
    }
    if cpu.cr0 & CR0_NE != 0 {
        return Err(cpu.raise(Vector::X87Error, 0));
    }
    // Errors are reported by FERR#, whose interrupt controller line this machine does not wire; go on as with IGNNE# asserted.
    cpu.ignoring_errors(|cpu| call(cpu, op, mem))
}

/// A buffer for a memory operand that cannot be used in place.
#[repr(C, align(64))]
struct Scratch([u8; 64]);

/// The handler of all instructions without special needs.
fn plain<const CLASS: u8, const MEM: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<CLASS>(cpu)?;
    if MEM == NO_MEM {
        call(cpu, op, std::ptr::null_mut())?;
        return Ok(Flow::Next);
    }
    let size = usize::from(op.memsize);
    let access = if MEM == LOAD { Access::Read } else { Access::Write };
    let lin = match cpu.linear(op, size, access) {
        Ok(lin) => lin,
        Err(t) => return Err(operand_fault::<CLASS>(cpu, t)),
    };
    // The alignment the instruction demands, less one.
    if lin & u64::from(op.opsize) != 0 {
        let t = cpu.gp(0);
        return Err(operand_fault::<CLASS>(cpu, t));
    }
    match cpu.probe(lin, size, MEM == STORE) {
        Some(p) => call(cpu, op, p)?,
        None => indirect::<CLASS, MEM>(cpu, op, lin)?,
    }
    Ok(Flow::Next)
}

/// The operand faults: where MMX registers are used, a pending #MF comes first.
#[cold]
fn operand_fault<const CLASS: u8>(cpu: &mut Cpu, t: Trap) -> Trap {
    if matches!(CLASS, MMX | SSE_MMX) { x87::after_pending(cpu, t) } else { t }
}

/// As [`plain`], when the operand is not simply RAM within a page that the TLB knows.
#[cold]
#[inline(never)]
fn indirect<const CLASS: u8, const MEM: u8>(cpu: &mut Cpu, op: &Op, lin: u64) -> Result<(), Trap> {
    let size = usize::from(op.memsize);
    // 32-byte operands need no more alignment than 16-byte ones (so on AMD's CPUs).
    if let Err(t) = cpu.check_alignment(lin, size.min(16)) {
        return Err(operand_fault::<CLASS>(cpu, t));
    }
    let mut buf = Scratch([0; 64]);
    let at = buf.0.as_mut_ptr();
    if MEM == LOAD {
        if let Err(t) = cpu.load_bytes(lin, &mut buf.0[..size]) {
            return Err(operand_fault::<CLASS>(cpu, t));
        }
        return call(cpu, op, at);
    }
    if let Err(t) = cpu.probe_write(lin, size) {
        return Err(operand_fault::<CLASS>(cpu, t));
    }
    call(cpu, op, at)?;
    cpu.store_bytes(lin, &buf.0[..size])
}

fn simd(ctx: &mut Ctx<'_>) -> Option<Handler> {
    let i = ctx.i;
    if !i.cpuid_features().iter().all(|&f| is_simd(f)) || i.mnemonic() == Mnemonic::Crc32 {
        return None;
    }
    let vex = match i.encoding() {
        EncodingKind::Legacy => false,
        EncodingKind::VEX => true,
        _ => return None,
    };
    let any = |p: fn(Register) -> bool| {
        (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && p(i.op_register(n)))
    };
    let class = match (vex, any(Register::is_mm), any(Register::is_xmm)) {
        (true, _, _) => AVX,
        (_, true, true) => SSE_MMX,
        (_, true, false) => MMX,
        _ if i.mnemonic() == Mnemonic::Emms => MMX,
        _ => SSE,
    };
    let mem = memory(i)?;
    ctx.op.aux = stub::simd(i)? as u64;
    ctx.op.imm = stub::slots(i);
    ctx.op.opsize = alignment(i).wrapping_sub(1);
    Some(match (class, mem) {
        (SSE, NO_MEM) => plain::<SSE, NO_MEM>,
        (SSE, LOAD) => plain::<SSE, LOAD>,
        (SSE, _) => plain::<SSE, STORE>,
        (AVX, NO_MEM) => plain::<AVX, NO_MEM>,
        (AVX, LOAD) => plain::<AVX, LOAD>,
        (AVX, _) => plain::<AVX, STORE>,
        (MMX, NO_MEM) => plain::<MMX, NO_MEM>,
        (MMX, LOAD) => plain::<MMX, LOAD>,
        (MMX, _) => plain::<MMX, STORE>,
        (_, NO_MEM) => plain::<SSE_MMX, NO_MEM>,
        (_, LOAD) => plain::<SSE_MMX, LOAD>,
        _ => plain::<SSE_MMX, STORE>,
    })
}

/// Whether `i` can be executed as it is on the guest's vector registers, given that its checks have been made: the alignment that its memory
/// operand must have if so. Not what uses x87 or MMX registers, accesses memory by elements, or does more than compute.
pub fn inline(i: &Instruction) -> Option<u8> {
    use Mnemonic as M;
    let simd = !i.cpuid_features().is_empty() && i.cpuid_features().iter().all(|&f| is_simd(f));
    let plain = simd
        && matches!(i.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
        && !(0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_mm())
        && !masked::by_element(i.mnemonic())
        && !matches!(
            i.mnemonic(),
            M::Emms
                | M::Crc32
                | M::Ldmxcsr
                | M::Stmxcsr
                | M::Vldmxcsr
                | M::Vstmxcsr
                | M::Movnti
                | M::Pause
                | M::Sfence
                | M::Lfence
                | M::Mfence
                | M::Clflush
                | M::Monitor
                | M::Mwait
                | M::Fisttp
        );
    (plain && i.op_count() > 0 || matches!(i.mnemonic(), M::Vzeroupper | M::Vzeroall))
        .then(|| memory(i).map(|_| alignment(i)))?
}

/// Whether `i`, for which [`inline`] has an answer, stores to its memory operand.
pub fn stores(i: &Instruction) -> bool {
    memory(i) == Some(STORE)
}

/// How `i` accesses its memory operand. `None` if not in one of the ways known here.
fn memory(i: &Instruction) -> Option<u8> {
    let mut factory = iced_x86::InstructionInfoFactory::new();
    let Some(n) = (0..i.op_count()).find(|&n| i.op_kind(n) == OpKind::Memory) else {
        return Some(NO_MEM);
    };
    let size = i.memory_size().size();
    if size == 0 || size > 32 {
        return None;
    }
    match factory.info(i).op_access(n) {
        OpAccess::Read => Some(LOAD),
        OpAccess::Write => Some(STORE),
        _ => None,
    }
}

/// The alignment that `i` demands of its memory operand (Intel SDM 1 section 14.9, SDM 3A section 6.15 on #GP).
fn alignment(i: &Instruction) -> u8 {
    use Mnemonic as M;
    let size = i.memory_size().size();
    if !(0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory) {
        return 1;
    }
    let m = i.mnemonic();
    let demanded = if i.encoding() == EncodingKind::Legacy {
        size == 16
            && !matches!(
                m,
                M::Movups
                    | M::Movupd
                    | M::Movdqu
                    | M::Lddqu
                    | M::Pcmpestri
                    | M::Pcmpestrm
                    | M::Pcmpestri64
                    | M::Pcmpestrm64
                    | M::Pcmpistri
                    | M::Pcmpistrm
            )
            // AMD's CPUs take misaligned operands of SHA instructions, against both makers' manuals.
            && !(i.cpuid_features() == [CpuidFeature::SHA] && host_is_amd())
    } else {
        matches!(
            m,
            M::Vmovaps | M::Vmovapd | M::Vmovdqa | M::Vmovntps | M::Vmovntpd | M::Vmovntdq | M::Vmovntdqa
        )
    };
    if demanded { size as u8 } else { 1 }
}

/// Whether instructions of this feature are executed by stubs.
fn is_simd(f: CpuidFeature) -> bool {
    use CpuidFeature as F;
    matches!(
        f,
        F::MMX
            | F::SSE
            | F::SSE2
            | F::SSE3
            | F::SSSE3
            | F::SSE4_1
            | F::SSE4_2
            | F::SSE4A
            | F::AES
            | F::PCLMULQDQ
            | F::SHA
            | F::GFNI
            | F::AVX
            | F::AVX2
            | F::F16C
            | F::FMA
            | F::VAES
            | F::VPCLMULQDQ
            | F::AVX_VNNI
            | F::AVX_IFMA
            | F::AVX_NE_CONVERT
            | F::AVX_VNNI_INT8
            | F::AVX_VNNI_INT16
    )
}

fn nop(_: &mut Cpu, _: &Op) -> Exec {
    Ok(Flow::Next)
}

fn fence(_: &mut Cpu, _: &Op) -> Exec {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    Ok(Flow::Next)
}

/// Cache hints and fences, and encodings that are no-operations where their feature is not offered.
fn hint(ctx: &mut Ctx<'_>) -> Option<Handler> {
    use Mnemonic as M;
    Some(match ctx.i.mnemonic() {
        M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetch
        | M::Prefetchw
        | M::Prefetchwt1
        | M::Prefetchit0
        | M::Prefetchit1
        | M::Cldemote
        | M::Endbr32
        | M::Endbr64
        | M::Rdsspd
        | M::Rdsspq => {
            // No access, so no fault whatever the address.
            ctx.op.flags &= !op_flags::MEM;
            nop
        }
        M::Sfence | M::Lfence | M::Mfence => fence,
        _ => return None,
    })
}
