//! The common pieces of generated code: the way in, the ways out, calls of op handlers, the jump table's look-up.

use super::asm::{CPU, Code, SP, T0, T1};
use super::{Hot, JUMPS, Jump, call_op, exit};
use crate::codemem::CodeMemory;
use crate::cpu::{Cpu, RIP};
use crate::mmu::Mmu;
use std::mem::offset_of;

/// Guest registers that live in host registers: (guest, host).
pub const PINNED: [(u8, u8); 12] =
    [(0, 0), (1, 1), (2, 2), (3, 3), (4, SP), (5, 5), (6, 6), (7, 7), (8, 8), (9, 9), (10, 10), (12, 11)];

/// Offset of a guest register (or RIP) in the `Cpu`.
pub const fn reg_at(n: u8) -> i32 {
    (offset_of!(Cpu, regs) + n as usize * 8) as i32
}

/// Offset of the arithmetic flags.
pub const ARITH: i32 = offset_of!(Cpu, arith) as i32;
/// Offset of the current TLB pointer.
pub const TLB: i32 = (offset_of!(Cpu, mmu) + offset_of!(Mmu, tlb)) as i32;
const CONTEXT: i32 = (offset_of!(Cpu, mmu) + offset_of!(Mmu, context)) as i32;
const MODE_KEY: i32 = offset_of!(Cpu, mode_key) as i32;
/// Offset of the pointer to pending requests.
pub const REQUESTS: i32 = (offset_of!(Cpu, hot) + offset_of!(Hot, requests)) as i32;
/// Offset of the block budget.
pub const BUDGET: i32 = (offset_of!(Cpu, hot) + offset_of!(Hot, budget)) as i32;
const JUMP_TABLE: i32 = (offset_of!(Cpu, hot) + offset_of!(Hot, jumps)) as i32;

/// Addresses of the stubs.
pub struct Stubs {
    enter: usize,
    /// Leave with [`exit::POLL`].
    pub poll: usize,
    /// Go to the block at `regs[RIP]`, which is also in [`T0`].
    pub look_up: usize,
    /// Leave with [`exit::LINK`] and the value of [`T1`].
    pub link: usize,
    /// Call the handler of the op in [`T0`].
    pub call: usize,
    /// First free offset after the stubs.
    pub end: usize,
}

#[repr(C)]
struct Returned {
    why: u64,
    what: u64,
}

fn spill(c: &mut Code) {
    for (guest, host) in PINNED {
        c.store(host, CPU, reg_at(guest));
    }
}

fn reload(c: &mut Code) {
    for (guest, host) in PINNED {
        c.load(host, CPU, reg_at(guest));
    }
}

/// `mov eax, code`.
fn mov_eax(c: &mut Code, code: u64) {
    c.raw(&[0xb8]);
    c.raw(&(code as u32).to_le_bytes());
}

impl Stubs {
    /// Write them at the beginning of `memory`; the second value is the first free offset.
    pub fn write(memory: &mut CodeMemory) -> (Stubs, usize) {
        let base = memory.address(0);
        let mut c = Code::default();
        // The way in: fn(cpu: rdi, code: rsi). Six pushes and eight bytes leave the stack aligned to 16.
        let enter = base + c.at();
        c.raw(&[0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57]);
        c.raw(&[0x48, 0x83, 0xec, 0x08]);
        c.mov(CPU, 7);
        c.mov(T0, 6);
        reload(&mut c);
        c.raw(&[0x41, 0xff, 0xe5]); // jmp r13
        // The way out; guest registers are in memory, RAX and RDX hold the result.
        let leave = c.at();
        c.raw(&[0x48, 0x83, 0xc4, 0x08]);
        c.raw(&[0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3]);
        let leave_from = |c: &mut Code| {
            let hole = c.jmp();
            c.fill(hole, leave);
        };
        let poll = base + c.at();
        spill(&mut c);
        mov_eax(&mut c, exit::POLL);
        leave_from(&mut c);
        let miss = c.at();
        spill(&mut c);
        mov_eax(&mut c, exit::LOOK_UP);
        leave_from(&mut c);
        let link = base + c.at();
        spill(&mut c);
        c.mov(2, T1);
        mov_eax(&mut c, exit::LINK);
        leave_from(&mut c);

        let call = base + c.at();
        spill(&mut c);
        c.raw(&[0x41, 0x55]); // push r13
        c.mov(7, CPU);
        c.mov(6, T0);
        c.imm64(0, call_op as *const () as u64);
        c.raw(&[0xff, 0xd0]); // call rax
        c.raw(&[0x41, 0x5d]); // pop r13
        c.raw(&[0x85, 0xc0]); // test eax, eax
        let stop = c.jcc(5);
        reload(&mut c);
        c.raw(&[0xc3]);
        c.land(stop);
        c.raw(&[0x48, 0x83, 0xc4, 0x08]); // the return address
        c.mov(2, T0);
        leave_from(&mut c);

        let look_up = base + c.at();
        c.mov(T1, T0);
        c.raw(&[0x49, 0xc1, 0xee, 0x0c]); // shr r14, 12
        c.rr(0x31, T0, T1); // xor r14, r13
        c.raw(&[0x41, 0x81, 0xe6]); // and r14d, JUMPS - 1
        c.raw(&(JUMPS as u32 - 1).to_le_bytes());
        c.raw(&[0x49, 0xc1, 0xe6, size_of::<Jump>().trailing_zeros() as u8]); // shl r14
        c.rm(0x03, T1, CPU, JUMP_TABLE); // add r14, [jumps]
        c.rm(0x3b, T0, T1, offset_of!(Jump, rip) as i32);
        let no_rip = c.jcc(5);
        c.load(T0, CPU, CONTEXT);
        c.raw(&[0x49, 0xc1, 0xe5, 0x08]); // shl r13, 8
        c.rm(0x0b, T0, CPU, MODE_KEY); // or
        c.rm(0x3b, T0, T1, offset_of!(Jump, context) as i32);
        let no_context = c.jcc(5);
        c.load(T0, T1, offset_of!(Jump, word) as i32);
        c.raw(&[0x45, 0x8b, 0x6d, 0x00]); // mov r13d, [r13]
        c.raw(&[0x45, 0x3b, 0xae]); // cmp r13d, [r14 + value]
        c.raw(&(offset_of!(Jump, value) as u32).to_le_bytes());
        let stale = c.jcc(5);
        c.raw(&[0x41, 0xff, 0xa6]); // jmp [r14 + code]
        c.raw(&(offset_of!(Jump, code) as u32).to_le_bytes());
        for m in [no_rip, no_context, stale] {
            c.fill(m, miss);
        }
        memory.write(0, &c.bytes);
        let end = c.at().next_multiple_of(64);
        (Stubs { enter, poll, look_up, link, call, end }, end)
    }

    /// The way in, for [`enter`].
    pub fn entry(&self) -> usize {
        self.enter
    }
}

/// Execute translated code by the way in at `entry`; the exit code and its value.
#[inline]
pub fn enter(entry: usize, cpu: *mut Cpu, code: usize) -> (u64, u64) {
    // SAFETY: the stub follows this signature and keeps to the System V ABI.
    let f: extern "sysv64" fn(*mut Cpu, usize) -> Returned = unsafe { std::mem::transmute(entry) };
    let r = f(cpu, code);
    (r.why, r.what)
}

const _: () = assert!(RIP == 17 && size_of::<Jump>() == 64);
