//! The translator: hot blocks of 64-bit code become host code.
//!
//! Guest RAX to R10 live in the same host registers, guest RSP in host R12 and R12 in R11; guest R11, R13, R14 and R15 stay in memory. R15
//! points to the [`Cpu`]; R13 and R14 are scratch. Guest flags are host flags while they last; where host code clobbers them while they are
//! still wanted ([`flags`]) they are made anew, or go to [`Cpu::arith`] ([`replay`]). A memory access probes the TLB inline ([`memory`]); what
//! misses, and every instruction that has no host form here, is executed by the interpreter's handler for the op, which sees the same state.
//!
//! A block begins with a look at pending requests and a budget, so every loop comes back. Jumps within a page are patched to go straight to the
//! next block; others go through a table keyed by address and mapping.

mod asm;
mod block;
mod choose;
mod flags;
mod memory;
mod replay;
mod stubs;

use crate::cache::Block;
use crate::codemem::CodeMemory;
use crate::cpu::{Cpu, RIP};
use crate::decode::{Flow, Op};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::AtomicU32;
use stubs::Stubs;

/// Bytes of code memory of one vCPU. When they are used up, all translations are dropped.
const CODE_SIZE: usize = 24 << 20;
/// Executions of a block by the interpreter before it is translated. Small guests of unit tests are to be translated too.
const HOT: u32 = if cfg!(test) { 2 } else { 24 };
/// Blocks that run before the loop looks at the clock.
const BUDGET: i32 = 2048;
/// Entries of the jump table.
pub(super) const JUMPS: usize = 4096;

/// Why translated code came back.
mod exit {
    /// A request waits, or the budget is used up. `regs[RIP]` is the next block's.
    pub const POLL: u64 = 0;
    /// The jump table does not know `regs[RIP]`.
    pub const LOOK_UP: u64 = 1;
    /// A jump within the page that is not linked yet; its offset in code memory is the second value.
    pub const LINK: u64 = 2;
    /// An op (the second value) ended the block; the next instruction follows it.
    pub const ADVANCE: u64 = 3;
    /// An op branched.
    pub const BRANCH: u64 = 4;
    /// An op raised an exception.
    pub const TRAP: u64 = 5;
    /// A handler panicked.
    pub const PANIC: u64 = 6;
}

/// Names of the exits, for statistics.
pub const EXITS: [&str; 7] = ["poll", "look-up", "link", "advance", "branch", "trap", "panic"];

/// An entry of the jump table. The layout is known to [`stubs`].
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Jump {
    rip: u64,
    context: u64,
    code: usize,
    word: *const AtomicU32,
    value: u32,
}

const NO_JUMP: Jump = Jump { rip: 0, context: u64::MAX, code: 0, word: std::ptr::null(), value: 0 };

/// What generated code finds in the [`Cpu`].
#[repr(C)]
pub struct Hot {
    /// The requests of other threads.
    requests: *const AtomicU32,
    /// The jump table.
    jumps: *const Jump,
    /// Blocks still to run before coming back.
    budget: i32,
}

/// One vCPU's translations.
pub struct Translator {
    memory: CodeMemory,
    used: usize,
    stubs: Stubs,
    jumps: Box<[Jump; JUMPS]>,
    encoder: iced_x86::Encoder,
    panic: Option<Box<dyn std::any::Any + Send>>,
    /// Executions before translation.
    pub hot: u32,
    /// Blocks translated.
    pub blocks: u64,
    /// Times that all translations were dropped because code memory was full.
    pub flushes: u64,
    /// Jumps linked.
    pub links: u64,
    /// Ways back to the run loop by cause, in the order of [`exit`] and [`EXITS`].
    pub exits: [u64; EXITS.len()],
}

// SAFETY: the raw pointers of the jump table are to words that guest memory holds; one thread uses a translator at a time.
unsafe impl Send for Translator {}

impl Hot {
    /// For a vCPU with these requests.
    pub fn new(requests: &AtomicU32) -> Hot {
        Hot { requests, jumps: std::ptr::null(), budget: 0 }
    }
}

impl Translator {
    /// Nothing translated yet.
    ///
    /// # Errors
    /// When the host gives no memory for code.
    pub fn new() -> std::io::Result<Box<Translator>> {
        Translator::with_size(CODE_SIZE)
    }

    /// As [`Translator::new`], with `size` bytes of code memory (a whole number of pages).
    ///
    /// # Errors
    /// When the host gives no memory for code.
    pub fn with_size(size: usize) -> std::io::Result<Box<Translator>> {
        let mut memory = CodeMemory::new(size)?;
        let (stubs, used) = Stubs::write(&mut memory);
        Ok(Box::new(Translator {
            memory,
            used,
            stubs,
            jumps: Box::new([NO_JUMP; JUMPS]),
            encoder: iced_x86::Encoder::new(64),
            panic: None,
            hot: HOT,
            blocks: 0,
            flushes: 0,
            links: 0,
            exits: [0; EXITS.len()],
        }))
    }

    /// Forget all translations. The blocks' code pointers are the caller's to clear.
    pub fn clear(&mut self) {
        self.used = self.stubs.end;
        self.jumps.fill(NO_JUMP);
    }
}

/// Execute one op for translated code; an [`exit`] code, or 0 to go on.
extern "C" fn call_op(cpu: *mut Cpu, op: *const Op) -> u32 {
    // SAFETY: translated code passes the Cpu that it runs for, to which no other reference is in use meanwhile, and an op of a block that the cache holds.
    let (cpu, op) = unsafe { (&mut *cpu, &*op) };
    // Just this op: frequent handlers would go on to the next one below `block_end`. Null afterwards means that the block is to end.
    cpu.current = op;
    cpu.block_end = op;
    let code = match catch_unwind(AssertUnwindSafe(|| (op.run)(cpu, op))) {
        Ok(Ok(Flow::Next)) if !cpu.block_end.is_null() => 0,
        Ok(Ok(Flow::Next | Flow::EndBlock)) => exit::ADVANCE,
        Ok(Ok(Flow::Branch)) => exit::BRANCH,
        Ok(Err(_)) => exit::TRAP,
        Err(panic) => {
            if let Some(t) = &mut cpu.translator {
                t.panic = Some(panic);
            }
            exit::PANIC
        }
    };
    code as u32
}

/// What [`Cpu::run_translated`] leaves to do.
pub enum After {
    /// Go on with the block at `regs[RIP]`.
    GoOn,
    /// As well, and look at clock and requests first.
    Poll,
    /// The op raised an exception.
    Trap(*const Op),
}

impl Cpu {
    /// Execute `block` by translated code, if it has some or is hot enough to get some; `None` if the interpreter is to do it.
    #[inline]
    pub(crate) fn run_translated(&mut self, block: *const Block) -> Option<After> {
        // SAFETY: the cache keeps a block until another is decoded.
        let b = unsafe { &*block };
        if b.code.get() == 0 {
            let heat = b.heat.get() + 1;
            b.heat.set(heat);
            let t = self.translator.as_ref()?;
            if heat < t.hot || !self.translate_block(b) {
                return None;
            }
        }
        Some(self.enter(b))
    }

    #[inline]
    fn enter(&mut self, b: &Block) -> After {
        let context = self.mmu.context << 8 | self.mode_key;
        let rip = self.regs[usize::from(RIP)];
        let Some(t) = self.translator.as_mut() else { return After::GoOn };
        let (word, value) = b.stamp();
        t.jumps[(rip ^ rip >> 12) as usize % JUMPS] = Jump { rip, context, code: b.code.get(), word, value };
        self.hot.jumps = t.jumps.as_ptr();
        self.hot.budget = BUDGET;
        let entry = t.stubs.entry();
        let (why, what) = stubs::enter(entry, self, b.code.get());
        if let Some(t) = self.translator.as_mut()
            && let Some(n) = t.exits.get_mut(why as usize)
        {
            *n += 1;
        }
        match why {
            exit::POLL => After::Poll,
            exit::LINK => {
                self.link(what as usize);
                After::GoOn
            }
            exit::ADVANCE => {
                let op = what as *const Op;
                // SAFETY: the op belongs to a block that is still held.
                let rip = unsafe { self.next_ip(&*op) };
                self.regs[usize::from(RIP)] = rip;
                After::GoOn
            }
            exit::TRAP => After::Trap(what as *const Op),
            exit::PANIC => match self.translator.as_mut().and_then(|t| t.panic.take()) {
                Some(panic) => resume_unwind(panic),
                None => After::GoOn,
            },
            _ => After::GoOn,
        }
    }

    /// Let the jump at `slot` of code memory go straight to the block at `regs[RIP]`, which lies in the same page, if that has code.
    #[cold]
    fn link(&mut self, slot: usize) {
        // A fetch fault is raised again, and delivered, when the block is looked up in earnest.
        let before = self.cache.decoded;
        let Ok(block) = self.find_block(false) else { return };
        // SAFETY: the cache keeps a block until another is decoded.
        let b = unsafe { &*block };
        // Decoding may have dropped every block and translation, the jump's own included.
        if b.code.get() == 0 || self.cache.decoded != before {
            return;
        }
        if let Some(t) = self.translator.as_mut() {
            // The page may be mapped elsewhere now, without the guest having said so.
            if t.memory.read_u64(slot + block::SLOT_PAGE) != b.gpa & !0xfff {
                return;
            }
            let from = t.memory.address(slot + 5);
            let distance = b.code.get().wrapping_sub(from) as u32;
            t.memory.write(slot + 1, &distance.to_le_bytes());
            t.links += 1;
        }
    }
}
