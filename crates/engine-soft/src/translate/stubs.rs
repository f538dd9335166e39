//! The common pieces of generated code: the way in, the ways out, calls of op handlers, the jump table's look-up, and the moves of vector
//! registers between the [`Cpu`] and the host's.
//!
//! While translated code runs, GS points to the [`Cpu`] and the host's stack holds, above [`Hot::base`], a pair for each guest call that
//! has not returned: the host address to go on at and the guest's return address. A guest's RET to that address is a host RET, which the host
//! predicts. The budget bounds how deep it gets. Below the first pair is one that no return address matches.

use super::asm::{Code, HOST_SP, SP, T0, T1, TLB};
use super::{Hot, JUMPS, Jump, Translator, call_ops, exit};
use crate::codemem::CodeMemory;
use crate::cpu::{Cpu, RIP, Vectors};
use crate::mmu::Mmu;
use std::mem::offset_of;

/// Guest registers that live in host registers: (guest, host).
pub const PINNED: [(u8, u8); 12] =
    [(0, 0), (1, 1), (2, 2), (3, 3), (4, SP), (5, 5), (6, 6), (7, 7), (12, 11), (13, 9), (14, 10), (15, 8)];

/// Offset of a guest register (or RIP) in the `Cpu`.
pub const fn reg_at(n: u8) -> i32 {
    (offset_of!(Cpu, regs) + n as usize * 8) as i32
}

const fn hot_at(field: usize) -> i32 {
    (offset_of!(Cpu, hot) + field) as i32
}

const fn mmu_at(field: usize) -> i32 {
    (offset_of!(Cpu, mmu) + field) as i32
}

/// Offset of RIP: of the page's while a block executes.
pub const RIP_AT: i32 = reg_at(RIP);
/// Offset of the arithmetic flags.
pub const ARITH: i32 = offset_of!(Cpu, arith) as i32;
/// Offset of the pointer to the TLB set in force.
pub const TLB_SET: i32 = mmu_at(offset_of!(Mmu, tlb));
/// Offset of what identifies where pages lie that are not global.
pub const CONTEXT: i32 = mmu_at(offset_of!(Mmu, context));
/// Offset of what identifies where global pages lie.
pub const GLOBAL_CONTEXT: i32 = mmu_at(offset_of!(Mmu, global_context));
/// Offset of the pointer to pending requests.
pub const REQUESTS: i32 = hot_at(offset_of!(Hot, requests));
/// Offset of the budget.
pub const BUDGET: i32 = hot_at(offset_of!(Hot, budget));
const LOOKS: i32 = hot_at(offset_of!(Hot, looks));
/// Offset of the count of failing links until one is made anew.
pub const RELINK: i32 = hot_at(offset_of!(Hot, relink));
/// Offset of what is live of the vector state; see [`live`].
pub const LIVE: i32 = hot_at(offset_of!(Hot, live));
/// Offset of a place for one value.
pub const KEPT: i32 = hot_at(offset_of!(Hot, kept));
/// Offset of the number of a place that often misses.
pub const MISSING: i32 = hot_at(offset_of!(Hot, missing));
/// Offset of what a register held before a shift.
pub const UNDO: i32 = hot_at(offset_of!(Hot, undo));
const ALLOWED: i32 = hot_at(offset_of!(Hot, allowed));
const BASE: i32 = hot_at(offset_of!(Hot, base));
/// Offset of the vCPU's own address.
pub const SELF: i32 = hot_at(offset_of!(Hot, cpu));
const CODE_BASE: i32 = hot_at(offset_of!(Hot, code));
const JUMP_TABLE: i32 = hot_at(offset_of!(Hot, jumps));
const HOST_MXCSR: i32 = hot_at(offset_of!(Hot, host_mxcsr));
const VEC: i32 = (offset_of!(Cpu, vec) + offset_of!(Vectors, ymm)) as i32;
const MXCSR: i32 = (offset_of!(Cpu, vec) + offset_of!(Vectors, mxcsr)) as i32;

/// What of the guest's vector state is in the host's registers, and what may be executed on it; for [`Hot::live`] and [`Hot::allowed`].
pub mod live {
    /// The registers' lower halves; SSE instructions may execute.
    pub const SSE: u8 = 1;
    /// All of the registers; AVX instructions may execute.
    pub const AVX: u8 = 2;
    /// MXCSR, which masks all exceptions: arithmetic may execute.
    pub const MXCSR: u8 = 4;
}

/// The guest's return address in the lowest pair on the host's stack: not canonical.
const NO_RETURN: u64 = 0x8000_5a5a_0000_a5a5;

/// How stubs put guest registers aside. Offsets of the pieces that they call.
pub struct Saved {
    save_vectors: usize,
    load_vectors: usize,
}

impl Saved {
    /// General registers go to the `Cpu`.
    pub fn spill(&self, c: &mut Code) {
        for (guest, host) in PINNED {
            c.store_cpu(host, reg_at(guest));
        }
    }

    /// The other way; flags stay.
    pub fn reload(&self, c: &mut Code) {
        for (guest, host) in PINNED {
            c.load_cpu(host, reg_at(guest));
        }
        c.load_cpu(TLB, TLB_SET);
    }

    /// What is live of the vector state goes to the `Cpu`. General registers stay.
    pub fn vectors(&self, c: &mut Code) {
        c.cpu32(&[0x80], 7, LIVE);
        c.raw(&[0]); // cmp byte [live], 0
        let dead = c.jcc(4);
        let call = c.call();
        c.fill(call, self.save_vectors);
        c.land(dead);
    }

    /// What AL says was live of the vector state is live again.
    pub fn vectors_back(&self, c: &mut Code) {
        c.raw(&[0x84, 0xc0]); // test al, al
        let dead = c.jcc(4);
        let call = c.call();
        c.fill(call, self.load_vectors);
        c.land(dead);
    }
}

/// Addresses of the stubs.
pub struct Stubs {
    enter: usize,
    /// Look whether somebody wants attention. To be called; leaves with [`exit::POLL`] if so, RIP being [`T0`] bytes from the page's.
    pub poll: usize,
    /// Link the jump whose number is in [`T1`] to the block [`T0`] bytes from the page's beginning, and go there.
    pub link: usize,
    /// Leave with [`exit::INTERPRET`]; RIP is [`T0`] bytes from the page's.
    pub interpret: usize,
    /// Find the code for the guest address in [`T0`]: its address in [`T1`], RIP set to the page. To be called.
    pub look_up: usize,
    /// The same, but not by what the jump table has. To be called.
    pub look_up_anew: usize,
    /// Go to the block at the guest address in [`T0`], to which a RET led that no host RET serves.
    pub return_miss: usize,
    /// Call the handler of the op that [`T0`] names ([`super::OpName`]). To be called.
    pub call: usize,
    /// The same of as many ops from there on as [`T1`] says.
    pub call_several: usize,
    /// Make the vector state live; [`T0`] says what is needed ([`live`], from bit 16 on) and where it is (offset in the page). To be called.
    /// Leaves with [`exit::INTERPRET`] if that is not allowed.
    pub vectors: usize,
    /// See [`super::recall::stub`].
    pub recall_read: usize,
    /// The same for stores.
    pub recall_write: usize,
    /// See [`super::refill::stub`].
    pub refill_read: usize,
    /// The same for stores.
    pub refill_write: usize,
    pub end: usize,
}

/// What is moved of vector registers, and by which instructions.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    /// Lower halves, upper halves stay.
    Lower,
    /// Lower halves, loads clear the upper halves.
    LowerAlone,
    /// Everything.
    All,
}

/// Move all vector registers between the `Cpu` and the host's.
fn vectors(c: &mut Code, store: bool, part: Part) {
    for n in 0..16u8 {
        let modrm = [(n & 7) << 3 | 4, 0x25];
        let high = n >> 3;
        match part {
            Part::Lower => c.raw(&[0x65, 0x40 | high << 2, 0x0f, 0x28 | u8::from(store)]), // movaps
            Part::LowerAlone => c.raw(&[0x65, 0xc5, (high ^ 1) << 7 | 0x78, 0x28 | u8::from(store)]),
            Part::All => c.raw(&[0x65, 0xc5, (high ^ 1) << 7 | 0x7c, 0x28 | u8::from(store)]), // vmovaps
        }
        c.raw(&modrm);
        c.raw(&(VEC + i32::from(n) * 32).to_le_bytes());
    }
}

/// Load all of the vector registers; flags are lost. Where all upper halves are 0, as a guest's VZEROUPPER leaves them, the host's are cleared
/// rather than loaded: after a load its SSE instructions would take hundreds of cycles on Intel's CPUs (Optimization Reference Manual,
/// "Mixing AVX Code with SSE Code"), which the guest has done its part to avoid.
fn load_vectors(c: &mut Code) {
    for n in 0..16 {
        c.raw(if n == 0 {
            &[0x65, 0xc5, 0xf9, 0x6f, 0x04, 0x25]
        } else {
            &[0x65, 0xc5, 0xf9, 0xeb, 0x04, 0x25]
        });
        c.raw(&(VEC + n * 32 + 16).to_le_bytes()); // vmovdqa xmm0, then vpor xmm0
    }
    c.raw(&[0xc4, 0xe2, 0x79, 0x17, 0xc0]); // vptest xmm0, xmm0
    let some = c.jcc(5);
    vectors(c, false, Part::LowerAlone);
    let loaded = c.jmp();
    c.land(some);
    vectors(c, false, Part::All);
    c.land(loaded);
}

/// `ldmxcsr` (2) or `stmxcsr` (3) `gs:[at]`.
fn mxcsr(c: &mut Code, direction: u8, at: i32) {
    c.raw(&[0x65, 0x0f, 0xae, direction << 3 | 4, 0x25]);
    c.raw(&at.to_le_bytes());
}

impl Stubs {
    /// Write them at the beginning of `memory`.
    pub fn write(memory: &mut CodeMemory) -> Stubs {
        let base = memory.address(0);
        let avx = std::arch::is_x86_feature_detected!("avx");
        let mut c = Code::default();

        // Vector registers and MXCSR go to the Cpu. Keeps all general registers.
        let save_vectors = c.at();
        if avx {
            c.test_cpu8(LIVE, live::AVX);
            let halves = c.jcc(4);
            vectors(&mut c, true, Part::All);
            c.raw(&[0xc5, 0xf8, 0x77]); // vzeroupper
            let saved = c.jmp();
            c.land(halves);
            vectors(&mut c, true, Part::Lower);
            c.land(saved);
        } else {
            vectors(&mut c, true, Part::Lower);
        }
        c.test_cpu8(LIVE, live::MXCSR);
        let plain = c.jcc(4);
        mxcsr(&mut c, 3, MXCSR);
        mxcsr(&mut c, 2, HOST_MXCSR);
        c.land(plain);
        c.cpu32(&[0xc6], 0, LIVE);
        c.raw(&[0, 0xc3]); // mov byte [live], 0; ret
        // The way back, of what AL says.
        let load_at = c.at();
        if avx {
            c.raw(&[0xa8, live::AVX]); // test al
            let halves = c.jcc(4);
            load_vectors(&mut c);
            let loaded = c.jmp();
            c.land(halves);
            vectors(&mut c, false, Part::Lower);
            c.land(loaded);
        } else {
            vectors(&mut c, false, Part::Lower);
        }
        c.raw(&[0xa8, live::MXCSR]); // test al
        let plain = c.jcc(4);
        mxcsr(&mut c, 2, MXCSR);
        c.land(plain);
        c.cpu32(&[0x88], 0, LIVE);
        c.raw(&[0xc3]); // mov [live], al; ret
        let saved = Saved { save_vectors, load_vectors: load_at };

        // The way in: fn(cpu: rdi, code: rsi). Six pushes and eight bytes leave the stack aligned to 16, and so do the pairs.
        let enter = base + c.at();
        c.raw(&[0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57]);
        c.raw(&[0x48, 0x83, 0xec, 0x08]);
        c.imm64(0, NO_RETURN);
        c.raw(&[0x50]); // push rax
        let no_return = c.at() + 2;
        c.imm64(0, 0);
        c.raw(&[0x50]);
        c.store_cpu(HOST_SP, BASE);
        c.mov(T0, 6);
        saved.reload(&mut c);
        c.raw(&[0x41, 0xff, 0xe5]); // jmp r13
        // The way out; guest registers are in memory, RAX holds the result.
        let leave = c.at();
        saved.vectors(&mut c);
        c.load_cpu(HOST_SP, BASE);
        c.raw(&[0x48, 0x83, 0xc4, 0x18]); // add rsp, 24
        c.raw(&[0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3]);
        let leave_with = |c: &mut Code, code: u64| {
            c.imm(0, code as i64);
            let hole = c.jmp();
            c.fill(hole, leave);
        };
        let simple = |c: &mut Code, code: u64, relative: bool| {
            let at = base + c.at();
            c.cpu(if relative { 0x01 } else { 0x89 }, T0, RIP_AT); // add or mov [rip], r13
            saved.spill(c);
            leave_with(c, code);
            at
        };
        let poll_relative = simple(&mut c, exit::POLL, true) - base;
        let poll_absolute = simple(&mut c, exit::POLL, false) - base;
        // Ask for the code for the RIP in memory; what is not there takes the run loop. The pairs on the stack stay good.
        let resolved = |c: &mut Code, function: usize| {
            saved.spill(c);
            c.mov(6, T1);
            saved.vectors(c);
            c.load_cpu(7, SELF);
            c.imm64(0, function as u64);
            c.raw(&[0xff, 0xd0]); // call rax
            c.raw(&[0x48, 0x85, 0xc0]); // test rax, rax
            let found = c.jcc(5);
            leave_with(c, exit::LOOK_UP);
            c.land(found);
            c.mov(T1, 0);
        };
        // The same as a continuation of the look-up, which was called.
        let miss = c.at();
        c.store_cpu(T0, RIP_AT);
        c.raw(&[0x48, 0x83, 0xec, 0x08]); // sub rsp, 8
        resolved(&mut c, super::resolve as *const () as usize);
        c.raw(&[0x48, 0x83, 0xc4, 0x08]); // add rsp, 8
        saved.reload(&mut c);
        c.raw(&[0xc3]);
        let link = base + c.at();
        c.cpu(0x01, T0, RIP_AT); // add [rip], r13
        resolved(&mut c, super::resolve_link as *const () as usize);
        saved.reload(&mut c);
        c.raw(&[0x41, 0xff, 0xe6]); // jmp r14
        let interpret = simple(&mut c, exit::INTERPRET, true);

        let call = base + c.at();
        c.imm(T1, 1);
        let call_several = base + c.at();
        saved.spill(&mut c);
        saved.vectors(&mut c);
        c.load_cpu(7, SELF);
        c.mov(6, T0);
        c.mov(2, T1);
        c.raw(&[0x50]); // push rax: the stack is aligned
        c.imm64(0, call_ops as *const () as u64);
        c.raw(&[0xff, 0xd0]); // call rax
        c.raw(&[0x59]); // pop rcx
        c.raw(&[0x85, 0xc0]); // test eax, eax
        let stop = c.jcc(5);
        saved.reload(&mut c);
        c.raw(&[0xc3]);
        c.land(stop);
        c.raw(&[0x83, 0xf8, exit::RESUME as u8]); // cmp eax
        let resume = c.jcc(4);
        let hole = c.jmp();
        c.fill(hole, leave);
        // On by the jump table. The mapping may have changed, so nothing on the stack counts.
        c.land(resume);
        c.load_cpu(HOST_SP, BASE);
        saved.reload(&mut c);
        c.load_cpu(T0, RIP_AT);
        // What the op itself asked for is due now.
        c.load_cpu(T1, REQUESTS);
        c.raw(&[0x41, 0x83, 0x3e, 0x00]); // cmp dword [r14], 0
        let requested = c.jcc(5);
        c.fill(requested, poll_absolute);
        let onward = c.call();
        c.raw(&[0x41, 0xff, 0xe6]); // jmp r14

        // Whether somebody wants attention, every so many polls. Clobbers T1; goes to `leave` if so.
        let look = |c: &mut Code, leave: usize| {
            c.load_cpu(T1, REQUESTS);
            c.raw(&[0x41, 0x83, 0x3e, 0x00]); // cmp dword [r14], 0
            let requested = c.jcc(5);
            c.decrement_cpu(LOOKS);
            let exhausted = c.jcc(8);
            c.cpu32(&[0xc7], 0, BUDGET); // mov dword [budget]
            c.raw(&super::BUDGET.to_le_bytes());
            for h in [exhausted, requested] {
                c.fill(h, leave);
            }
        };
        let poll = base + c.at();
        look(&mut c, poll_relative);
        c.raw(&[0xc3]);

        let look_up = base + c.at();
        c.fill(onward, c.at());
        c.decrement_cpu(BUDGET);
        let some_left = c.jcc(9);
        look(&mut c, poll_absolute);
        c.land(some_left);
        c.mov(T1, T0);
        c.raw(&[0x49, 0xc1, 0xee, 0x0c]); // shr r14, 12
        c.rr(0x31, T0, T1); // xor r14, r13
        c.raw(&[0x41, 0x81, 0xe6]); // and r14d, JUMPS - 1
        c.raw(&(JUMPS as u32 - 1).to_le_bytes());
        c.raw(&[0x49, 0xc1, 0xe6, size_of::<Jump>().trailing_zeros() as u8]); // shl r14
        c.cpu(0x03, T1, JUMP_TABLE); // add r14, [jumps]
        c.rm(0x3b, T0, T1, offset_of!(Jump, rip) as i32);
        let no_rip = c.jcc(5);
        c.load(T0, T1, offset_of!(Jump, context) as i32);
        c.cpu(0x3b, T0, GLOBAL_CONTEXT);
        let global = c.jcc(4);
        c.cpu(0x3b, T0, CONTEXT);
        let no_context = c.jcc(5);
        c.land(global);
        c.load(T0, T1, offset_of!(Jump, word) as i32);
        c.raw(&[0x45, 0x8b, 0x6d, 0x00]); // mov r13d, [r13]
        c.raw(&[0x45, 0x3b, 0x6e, offset_of!(Jump, value) as u8]); // cmp r13d, [r14 + value]
        let stale = c.jcc(5);
        c.load(T0, T1, offset_of!(Jump, rip) as i32);
        c.raw(&[0x49, 0x81, 0xe5, 0x00, 0xf0, 0xff, 0xff]); // and r13, -4096
        c.store_cpu(T0, RIP_AT);
        c.raw(&[0x45, 0x8b, 0x76, offset_of!(Jump, code) as u8]); // mov r14d, [r14 + code]
        c.cpu(0x03, T1, CODE_BASE);
        c.raw(&[0xc3]);
        for h in [no_context, stale] {
            c.land(h);
        }
        c.load(T0, T1, offset_of!(Jump, rip) as i32);
        c.fill(no_rip, miss);
        let hole = c.jmp();
        c.fill(hole, miss);

        let return_miss = base + c.at();
        c.cpu(0x3b, HOST_SP, BASE);
        let lowest = c.jcc(4);
        c.raw(&[0x48, 0x83, 0xc4, 0x10]); // add rsp, 16
        c.land(lowest);
        c.far(0xe8, base, look_up);
        c.raw(&[0x41, 0xff, 0xe6]); // jmp r14

        // Where the lowest pair leads: only a guest that guesses its return address comes here.
        let lowest_pair = base + c.at();
        c.load_cpu(HOST_SP, BASE);
        let hole = c.call();
        c.fill(hole, miss);
        c.raw(&[0x41, 0xff, 0xe6]); // jmp r14

        let vectors_at = base + c.at();
        c.raw(&[0x45, 0x89, 0xee]); // mov r14d, r13d
        c.raw(&[0x41, 0xc1, 0xee, 0x10]); // shr r14d, 16
        // Everything that is needed must be allowed.
        c.raw(&[0x41, 0xc1, 0xcd, 0x10]); // ror r13d, 16
        c.cpu32(&[0x22], T1, ALLOWED); // and r14b, [allowed]
        c.raw(&[0x45, 0x38, 0xee]); // cmp r14b, r13b
        let refused = c.jcc(5);
        // SSE instructions keep the upper halves, so as long as only they execute those stay in memory: the host takes a register whose upper
        // half was loaded for one that an SSE instruction depends on even where it writes all of the lower half.
        c.raw(&[0x41, 0xf6, 0xc5, live::AVX]); // test r13b
        let only_sse = c.jcc(4);
        c.test_cpu8(LIVE, live::AVX);
        let have_avx = c.jcc(5);
        c.test_cpu8(LIVE, live::SSE);
        let nothing = c.jcc(4);
        vectors(&mut c, true, Part::Lower);
        c.land(nothing);
        if avx {
            load_vectors(&mut c);
        }
        c.cpu32(&[0x80], 1, LIVE);
        c.raw(&[live::SSE | live::AVX]); // or byte [live]
        let loaded = c.jmp();
        c.land(only_sse);
        c.test_cpu8(LIVE, live::SSE);
        let have_sse = c.jcc(5);
        vectors(&mut c, false, Part::Lower);
        c.cpu32(&[0x80], 1, LIVE);
        c.raw(&[live::SSE]); // or byte [live]
        for h in [have_avx, loaded, have_sse] {
            c.land(h);
        }
        c.raw(&[0x41, 0xf6, 0xc5, live::MXCSR]); // test r13b
        let no_mxcsr = c.jcc(4);
        c.test_cpu8(LIVE, live::MXCSR);
        let have_mxcsr = c.jcc(5);
        mxcsr(&mut c, 2, MXCSR);
        c.cpu32(&[0x80], 1, LIVE);
        c.raw(&[live::MXCSR]); // or byte [live]
        c.land(no_mxcsr);
        c.land(have_mxcsr);
        c.raw(&[0xc3]);
        c.land(refused);
        c.raw(&[0x41, 0xc1, 0xed, 0x10]); // shr r13d, 16: the offset
        let hole = c.jmp();
        c.fill(hole, interpret - base);

        let fast_pext = super::fast_pext();
        let recall_read = base + c.at();
        super::recall::stub(&mut c, false, fast_pext, &saved);
        let recall_write = base + c.at();
        super::recall::stub(&mut c, true, fast_pext, &saved);
        let refill_read = base + c.at();
        super::refill::stub(&mut c, false, &saved);
        let refill_write = base + c.at();
        super::refill::stub(&mut c, true, &saved);

        c.bytes[no_return..no_return + 8].copy_from_slice(&lowest_pair.to_le_bytes());
        memory.write(0, &c.bytes);
        let end = c.at().next_multiple_of(64);
        Stubs {
            enter,
            poll,
            link,
            interpret,
            look_up,
            look_up_anew: base + miss,
            return_miss,
            call,
            call_several,
            vectors: vectors_at,
            recall_read,
            recall_write,
            refill_read,
            refill_write,
            end,
        }
    }
}

/// Execute translated code; the exit code.
#[inline]
pub fn enter(t: &Translator, cpu: *mut Cpu, code: usize) -> u64 {
    // SAFETY: the stub follows this signature and keeps to the System V ABI.
    let f: extern "sysv64" fn(*mut Cpu, usize) -> u64 = unsafe { std::mem::transmute(t.stubs.enter) };
    f(cpu, code)
}

const _: () = assert!(RIP == 17 && size_of::<Jump>() == 32);
