//! The translator: hot blocks of 64-bit code become host code.
//!
//! Guest RAX to RDI live in the same host registers but RSP, which is in host R12; guest R12 to R15, of which compilers make more use than of
//! R8 to R11, are in host R11, R9, R10 and R8; R8 to R11 stay in memory. GS
//! points to the [`Cpu`], R15 to the TLB set in force; R13 and R14 are scratch. Guest vector registers and MXCSR live in the host's from the
//! first instruction that wants them until something else than translated code runs ([`stubs::live`]). Guest flags are host flags while they
//! last; where host code clobbers them while they are still wanted ([`flags`]) they are made anew, or go to [`Cpu::arith`] ([`replay`]). A
//! memory access probes the TLB inline ([`memory`]), or compares with the page that it went to last ([`recall`]); what misses has its entry
//! made and tries again ([`refill`]). Where that does not help, and for every instruction that has no host form here, the interpreter's
//! handler for the op executes it, which sees the same state.
//!
//! How blocks lead to one another: [`control`].

mod asm;
mod bits;
mod block;
mod buffers;
mod choose;
mod control;
mod divide;
mod flags;
mod group;
mod gs;
mod idiom;
mod memory;
mod place;
mod recall;
mod refill;
mod replay;
mod slow;
mod strings;
mod stubs;
mod system;
mod uses;

use crate::cache::Block;
use crate::codemem::CodeMemory;
use crate::cpu::{Activity, Cpu, RIP};
use crate::decode::{Flow, Op};
use crate::mmu::{Access, CodeSlot, INDEX_MASK, frame};
use block::MOST_PER_OP;
pub(crate) use block::pinned;
pub(crate) use place::REGISTERS;
use std::mem::offset_of;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU32, Ordering};
use stubs::Stubs;

/// Bytes of code memory of one vCPU. When they are used up, all translations are dropped.
const CODE_SIZE: usize = 64 << 20;
/// Executions of a block by the interpreter before it is translated. Small guests of unit tests are to be translated too.
const HOT: u32 = if cfg!(test) { 2 } else { 4 };
/// Polls (backward jumps, calls, look-ups) between two looks at requests.
const BUDGET: i32 = 64;
/// Looks at requests before the run loop looks at the clock.
const LOOKS: i32 = 32;
/// Failing guards before a jump is linked anew.
const RELINK: i32 = 64;
/// Entries of the jump table.
pub(super) const JUMPS: usize = 16384;

/// Why translated code came back.
mod exit {
    /// A request waits, or the budget is used up. `regs[RIP]` is the next block's.
    pub const POLL: u64 = 0;
    /// There is no code for `regs[RIP]`.
    pub const LOOK_UP: u64 = 1;
    /// An op ended the block; the next instruction follows it.
    pub const ADVANCE: u64 = 2;
    /// An op branched.
    pub const BRANCH: u64 = 3;
    /// An op raised an exception.
    pub const TRAP: u64 = 4;
    /// A handler panicked.
    pub const PANIC: u64 = 5;
    /// The block at `regs[RIP]` cannot execute as translated: the interpreter is to do it.
    pub const INTERPRET: u64 = 6;
    /// Not a way out: an op has ended the block, `regs[RIP]` is the next one's, and translated code may go on there.
    pub const RESUME: u64 = 7;
}

/// Names of the exits, for statistics.
pub const EXITS: [&str; 7] = ["poll", "look-up", "advance", "branch", "trap", "panic", "interpret"];

/// An entry of the jump table. The layout is known to [`stubs`].
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub struct Jump {
    rip: u64,
    context: u64,
    word: *const AtomicU32,
    value: u32,
    /// Offset in code memory.
    code: u32,
}

const NO_JUMP: Jump = Jump { rip: 0, context: u64::MAX, word: std::ptr::null(), value: 0, code: 0 };

/// A jump between blocks.
#[derive(Clone, Copy)]
pub(super) struct Link {
    /// Offset in code memory of its distance, or of its guard ([`control::guard`]).
    at: u32,
    /// For a jump within a page that physical page's number, or [`Link::TOO_HIGH`]; else [`Link::GUARDED`] and the offset in code memory of
    /// what the guard's failure leads to.
    page: u32,
}

impl Link {
    /// It has a guard.
    const GUARDED: u32 = 1 << 31;
    /// 8 TiB or more: not linked.
    const TOO_HIGH: u32 = Link::GUARDED - 1;

    /// For a jump within the page at `gpa`.
    fn within(at: usize, gpa: u64) -> Link {
        Link { at: at as u32, page: Link::page_of(gpa) }
    }

    fn guarded(at: usize) -> Link {
        Link { at: at as u32, page: Link::GUARDED }
    }

    /// Where its guard's failure leads ([`control::failure`]).
    fn fails_at(&mut self, at: usize) {
        self.page = Link::GUARDED | at as u32;
    }

    /// Where that is, if it has a guard.
    fn failure(self) -> Option<usize> {
        (self.page & Link::GUARDED != 0).then_some((self.page & !Link::GUARDED) as usize)
    }

    fn page_of(gpa: u64) -> u32 {
        (gpa >> 12).min(Link::TOO_HIGH.into()) as u32
    }
}

const _: () = assert!(CODE_SIZE < Link::GUARDED as usize);

/// What generated code finds in the [`Cpu`].
#[repr(C)]
pub struct Hot {
    /// The requests of other threads.
    requests: *const AtomicU32,
    /// The jump table.
    jumps: *const Jump,
    /// The vCPU itself.
    cpu: *const Cpu,
    /// Address of code memory.
    code: usize,
    /// The host's stack pointer at the lowest pair.
    base: usize,
    /// Something put aside.
    kept: u64,
    /// What a register held before a shift: see [`replay`].
    undo: u64,
    /// Polls still to pass before requests are looked at.
    budget: i32,
    /// Looks at requests still to pass before coming back.
    looks: i32,
    /// Guards still to fail before a jump is linked anew.
    relink: i32,
    /// MXCSR of host code.
    host_mxcsr: u32,
    /// The place that missed when patience with it ended; bit 31 is set if there is one.
    missing: u32,
    /// What of the vector state is in the host's registers.
    live: u8,
    /// What of it may be.
    allowed: u8,
    /// The next block is to be interpreted.
    interpret: bool,
}

/// One vCPU's translations.
pub struct Translator {
    memory: CodeMemory,
    /// First free byte of the first half, for what usually executes.
    used: usize,
    /// The same of the second half, for what seldom does.
    cold_used: usize,
    stubs: Stubs,
    jumps: Box<[Jump; JUMPS]>,
    encoder: iced_x86::Encoder,
    info: iced_x86::InstructionInfoFactory,
    links: Vec<Link>,
    buffers: buffers::Buffers,
    /// Blocks by number.
    named: Vec<*const Block>,
    recall: recall::Recall,
    fast_pext: bool,
    panic: Option<Box<dyn std::any::Any + Send>>,
    /// Executions before translation.
    pub hot: u32,
    /// Blocks translated.
    pub blocks: u64,
    /// Times that all translations were dropped because code memory was full.
    pub flushes: u64,
    /// Jumps linked.
    pub linked: u64,
    /// Ways back to the run loop by cause, in the order of [`exit`] and [`EXITS`].
    pub exits: [u64; EXITS.len()],
}

// SAFETY: the raw pointers are to words that guest memory holds and to blocks of the same vCPU's cache; one thread uses a translator at a time.
unsafe impl Send for Translator {}

impl Hot {
    /// For a vCPU with these requests.
    pub fn new(requests: &AtomicU32) -> Hot {
        Hot {
            requests,
            jumps: std::ptr::null(),
            cpu: std::ptr::null(),
            code: 0,
            base: 0,
            kept: 0,
            undo: 0,
            budget: 0,
            looks: 0,
            relink: RELINK,
            host_mxcsr: 0x1f80,
            missing: 0,
            live: 0,
            allowed: 0,
            interpret: false,
        }
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
        let mut memory = CodeMemory::new(size, true)?;
        let stubs = Stubs::write(&mut memory);
        Ok(Box::new(Translator {
            cold_used: size / 2,
            memory,
            used: stubs.end,
            stubs,
            jumps: Box::new([NO_JUMP; JUMPS]),
            encoder: iced_x86::Encoder::new(64),
            info: iced_x86::InstructionInfoFactory::new(),
            links: Vec::new(),
            buffers: buffers::Buffers::default(),
            named: Vec::new(),
            recall: recall::Recall::new(),
            fast_pext: fast_pext(),
            panic: None,
            hot: HOT,
            blocks: 0,
            flushes: 0,
            linked: 0,
            exits: [0; EXITS.len()],
        }))
    }

    /// Remember where the code of `b`, which begins at `rip`, lies, if all of it is in one page: where the second one lies must be asked anew.
    #[inline]
    fn note_jump(&mut self, rip: u64, context: u64, b: &Block) {
        if !b.one_page() {
            return;
        }
        let (word, value) = b.stamp();
        let code = (b.code.get() - self.memory.address(0)) as u32;
        self.jumps[(rip ^ rip >> 12) as usize % JUMPS] = Jump { rip, context, word, value, code };
    }

    /// The number of `b`, which the cache holds until it is emptied.
    fn name(&mut self, b: &Block) -> u32 {
        b.number(|| {
            self.named.push(b);
            (self.named.len() - 1) as u32
        })
    }

    /// Bytes free in the half that has fewer, if there are numbers for further blocks.
    fn room(&self) -> usize {
        if self.named.len() >> (u32::BITS - OpName::OFFSET) != 0 {
            return 0;
        }
        (self.memory.size() / 2).saturating_sub(self.used).min(self.memory.size() - self.cold_used)
    }

    /// The distance that a jump holds at offset `at` of code memory if it leads to `b`.
    fn distance(&self, at: usize, b: &Block) -> [u8; 4] {
        (b.code.get().wrapping_sub(self.memory.address(at + 4)) as u32).to_le_bytes()
    }

    /// Forget all translations. The blocks' code pointers are the caller's to clear.
    pub fn clear(&mut self) {
        self.used = self.stubs.end;
        self.cold_used = self.memory.size() / 2;
        self.jumps.fill(NO_JUMP);
        self.links.clear();
        self.named.clear();
        self.recall.clear();
    }
}

/// What translated code names an op by: its block's number and, in the low bits, its offset in the page.
#[derive(Clone, Copy)]
struct OpName(u32);

impl OpName {
    /// Bits of the offset.
    const OFFSET: u32 = 12;

    fn new(block: u32, off: u16) -> OpName {
        OpName(block << OpName::OFFSET | u32::from(off))
    }

    fn block(self) -> usize {
        (self.0 >> OpName::OFFSET) as usize
    }

    fn off(self) -> u16 {
        (self.0 & ((1 << OpName::OFFSET) - 1)) as u16
    }
}

/// Execute `count` ops of a block for translated code; an [`exit`] code, or 0 to go on behind them. [`Cpu::current`] is the last one executed.
extern "C" fn call_ops(cpu: *mut Cpu, name: u32, count: u32) -> u32 {
    // SAFETY: translated code passes the Cpu that it runs for, to which no other reference is in use meanwhile.
    let cpu = unsafe { &mut *cpu };
    if cpu.hot.missing != 0 {
        cpu.reconsider();
    }
    let name = OpName(name);
    let Some(first) = cpu.named(name) else {
        // The code has changed: on with what is there now.
        cpu.regs[usize::from(RIP)] = cpu.regs[usize::from(RIP)].wrapping_add(name.off().into());
        return exit::BRANCH as u32;
    };
    let done = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: so many are there from the first on; no others are had back, and no block gets a translation, until they are done.
        let ops = unsafe { std::slice::from_raw_parts(first, count as usize) };
        ops.iter().map(|op| call_op(cpu, op)).find(|&code| code != 0)
    }));
    let code = done.unwrap_or_else(|panic| {
        if let Some(t) = &mut cpu.translator {
            t.panic = Some(panic);
        }
        Some(exit::PANIC)
    });
    code.unwrap_or(0) as u32
}

/// Execute one op: as for [`call_ops`].
fn call_op(cpu: &mut Cpu, op: &Op) -> u64 {
    // Just this op: frequent handlers would go on to the next one below `block_end`. Null afterwards means that the block is to end.
    cpu.current = op;
    cpu.block_end = op;
    match (op.run)(cpu, op) {
        Ok(Flow::Next) if !cpu.block_end.is_null() => 0,
        Ok(Flow::Next | Flow::EndBlock) if cpu.may_resume() => {
            cpu.regs[usize::from(RIP)] = cpu.next_ip(op);
            exit::RESUME
        }
        Ok(Flow::Next | Flow::EndBlock) => exit::ADVANCE,
        Ok(Flow::Branch) if cpu.may_resume() => exit::RESUME,
        Ok(Flow::Branch) => exit::BRANCH,
        Err(_) => exit::TRAP,
    }
}

/// For translated code whose access missed the TLB: 0 if it can be tried again. `wanted` is its size less one, and [`refill::WRITE`] for a store.
extern "sysv64" fn refill_tlb(cpu: *mut Cpu, lin: u64, wanted: u32) -> u32 {
    // SAFETY: translated code passes the Cpu that it runs for, to which no other reference is in use meanwhile.
    let cpu = unsafe { &mut *cpu };
    let size = (wanted & !refill::WRITE) as usize + 1;
    u32::from(!cpu.refill(lin, size, wanted & refill::WRITE != 0))
}

/// For translated code that goes on where the jump table knows nothing: the code's address, or 0 to leave.
extern "sysv64" fn resolve(cpu: *mut Cpu) -> usize {
    // SAFETY: just found; nothing was decoded since.
    found(cpu, |cpu| cpu.find_code().map(|b| unsafe { &*b }.code.get()))
}

/// For a jump that is not linked (or no longer rightly, or whose guard found nothing to go by): the same, and it is linked, or good again.
extern "sysv64" fn resolve_link(cpu: *mut Cpu, number: u64) -> usize {
    found(cpu, |cpu| {
        let renewed = cpu.renew_link(number as usize);
        renewed.or_else(|| {
            let block = cpu.find_code()?;
            // SAFETY: just found; nothing was decoded since.
            let b = unsafe { &*block };
            cpu.link(number as usize, b);
            Some(b.code.get())
        })
    })
}

fn found(cpu: *mut Cpu, find: impl FnOnce(&mut Cpu) -> Option<usize>) -> usize {
    // SAFETY: translated code passes the Cpu that it runs for, to which no other reference is in use meanwhile.
    let cpu = unsafe { &mut *cpu };
    match catch_unwind(AssertUnwindSafe(|| find(cpu))) {
        Ok(code) => code.unwrap_or(0),
        Err(panic) => {
            if let Some(t) = &mut cpu.translator {
                t.panic = Some(panic);
            }
            0
        }
    }
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
        if std::mem::take(&mut self.hot.interpret) && b.code.get() != 0 {
            if b.guarded.get() {
                // Its guard is out of date; the block is not, as it has just been found.
                let rip = self.regs[usize::from(RIP)];
                if self.renew_guard(b) {
                    return Some(self.enter(b));
                }
                let t = self.translator.as_mut()?;
                t.redirect(b);
                t.jumps[(rip ^ rip >> 12) as usize % JUMPS] = NO_JUMP;
                b.code.set(0);
                b.cool();
                b.guarded.set(false);
            }
            return None;
        }
        if b.code.get() == 0 {
            let heat = self.cache.warm(b);
            let t = self.translator.as_ref()?;
            if heat < t.hot || !self.translate_block(b) {
                return None;
            }
        }
        Some(self.enter(b))
    }

    /// See [`Translator::renew`].
    fn renew_guard(&mut self, b: &Block) -> bool {
        let context = self.cache.context;
        let at = control::context_at(context == self.mmu.global_context);
        let page = self.page_of(b);
        self.translator.as_mut().is_some_and(|t| t.renew(b, at, context, page))
    }

    /// Linear address of the page that holds `b`, which is at RIP.
    fn page_of(&self, b: &Block) -> u64 {
        self.regs[usize::from(RIP)].wrapping_sub(b.first())
    }

    /// Which vector instructions translated code may execute by itself: those that cannot fault for what control registers and MXCSR say.
    pub(crate) fn update_vectors(&mut self) {
        use ringfort_x86::cr::*;
        let mut allowed = 0;
        if self.cr0 & (CR0_EM | CR0_TS) == 0 && self.cr4 & CR4_OSFXSR != 0 {
            allowed = stubs::live::SSE;
            let enabled = XCR0_SSE | XCR0_AVX;
            if self.cr4 & CR4_OSXSAVE != 0 && self.xcr0 & enabled == enabled {
                allowed |= stubs::live::AVX;
            }
            // An exception that is not masked has to find the instruction: the interpreter's part.
            if self.vec.mxcsr & 0x1f80 == 0x1f80 {
                allowed |= stubs::live::MXCSR;
            }
        }
        self.hot.allowed = allowed;
    }

    /// Whether translated code may go on after an instruction that ended its block. What requests want comes to light at the look-up.
    #[inline]
    fn may_resume(&mut self) -> bool {
        let may = self.code64()
            && self.activity == Activity::Running
            && !self.step_by_step()
            && !self.debugged()
            && self.translator.is_some();
        if may {
            self.update_vectors();
        }
        may
    }

    /// The op that translated code means; `None` if it is no longer known and the code has changed.
    #[inline]
    fn named(&mut self, name: OpName) -> Option<*const Op> {
        let recent = self.cache.kept.recent(name.0);
        if recent.is_some() {
            return recent;
        }
        let block = *self.translator.as_ref()?.named.get(name.block())?;
        // SAFETY: blocks that have numbers are held as long as those are.
        let ops = self.ops_of(unsafe { &*block })?;
        // SAFETY: just found.
        let ops = unsafe { &*ops };
        let n = ops.partition_point(|op| op.off < name.off());
        let op = ops.get(n).filter(|op| op.off == name.off())?;
        self.cache.kept.note(name.0, op);
        Some(op)
    }

    #[inline]
    fn enter(&mut self, b: &Block) -> After {
        let rip = self.regs[usize::from(RIP)];
        let Some(t) = self.translator.as_mut() else { return After::GoOn };
        t.note_jump(rip, self.cache.context, b);
        self.hot.jumps = t.jumps.as_ptr();
        self.hot.code = t.memory.address(0);
        self.hot.budget = BUDGET;
        self.hot.looks = LOOKS;
        self.hot.cpu = self;
        self.enter_page(b.first());
        self.update_vectors();
        gs::point_to(self);
        let Some(t) = self.translator.as_deref() else { return After::GoOn };
        let t: *const Translator = t;
        // SAFETY: the translator lives in a box of its own, which nothing that runs meanwhile replaces.
        let why = stubs::enter(unsafe { &*t }, self, b.code.get());
        if let Some(t) = self.translator.as_mut()
            && let Some(n) = t.exits.get_mut(why as usize)
        {
            *n += 1;
        }
        match why {
            exit::POLL => After::Poll,
            exit::ADVANCE => {
                // SAFETY: the op belongs to a block that is still held, and its ops are.
                self.regs[usize::from(RIP)] = unsafe { self.next_ip(&*self.current) };
                After::GoOn
            }
            exit::TRAP => After::Trap(self.current),
            exit::PANIC | exit::LOOK_UP => match self.translator.as_mut().and_then(|t| t.panic.take()) {
                Some(panic) => resume_unwind(panic),
                None => After::GoOn,
            },
            exit::INTERPRET => {
                self.hot.interpret = true;
                After::GoOn
            }
            _ => After::GoOn,
        }
    }

    /// The code for `regs[RIP]`, made if the block is hot enough; then RIP is the page's. `None` if the run loop has to see to it. Translations
    /// from before are still there if there is an answer.
    fn find_code(&mut self) -> Option<*const Block> {
        if self.env.me.requests.load(Ordering::Relaxed) != 0 {
            return None;
        }
        // A fetch fault is raised again, and delivered, when the block is looked up in earnest.
        let flushes = self.translator.as_ref()?.flushes;
        let block = self.find_block(false).ok()?;
        // SAFETY: the cache keeps a block until another is decoded.
        let b = unsafe { &*block };
        if b.code.get() == 0 {
            let heat = self.cache.warm(b);
            if heat < self.translator.as_ref()?.hot || !self.translate_block(b) {
                return None;
            }
        }
        if b.guarded.get() {
            self.renew_guard(b);
        }
        let rip = self.regs[usize::from(RIP)];
        let context = self.cache.context;
        let t = self.translator.as_mut()?;
        if t.flushes != flushes {
            return None;
        }
        t.note_jump(rip, context, b);
        self.enter_page(b.first());
        Some(block)
    }

    /// For a link whose guard found no frame for the page at RIP: if that lies where the link leads, say so where guards look, and go on there.
    /// The address of the code.
    fn renew_link(&mut self, number: usize) -> Option<usize> {
        use control::guard;
        let rip = self.regs[usize::from(RIP)];
        let t = self.translator.as_ref()?;
        let link = t.links.get(number)?;
        link.failure()?;
        let guard = t.memory.read_array::<{ guard::END }>(link.at as usize)?;
        let word = |at: usize| guard[at..].first_chunk().map_or(0, |b| u32::from_le_bytes(*b));
        let page_at = control::slot_at(rip, offset_of!(CodeSlot, page));
        if !guard.starts_with(&guard::LOAD) || word(guard::PAGE_AT) != page_at as u32 {
            return None;
        }
        let to = t.memory.address(link.at as usize + guard::END);
        let code = to.wrapping_add_signed(word(guard::JUMP) as i32 as isize);
        let at = guard[guard::WORD..].first_chunk().map(|b| u64::from_le_bytes(*b))?;
        let mode = self.mmu.fetch_mode();
        let from = self.translate(rip, Access::Fetch, mode).ok()?;
        if frame(from.gpa) != Some(word(guard::FRAME)) {
            return None;
        }
        // SAFETY: the address of a page tracker's word, which lives as long as guest memory; `link` put it there.
        if unsafe { &*(at as *const AtomicU32) }.load(Ordering::Acquire) != word(guard::VALUE) {
            return None;
        }
        self.mmu.note_code(rip, word(guard::FRAME), &from);
        self.regs[usize::from(RIP)] = rip & !0xfff;
        Some(code)
    }

    /// Let a jump go straight to `b`, which was just found.
    #[cold]
    fn link(&mut self, number: usize, b: &Block) {
        self.hot.relink = RELINK;
        let page = self.regs[usize::from(RIP)];
        let Some(&link) = self.translator.as_ref().and_then(|t| t.links.get(number)) else { return };
        let at = link.at as usize;
        let Some(failure) = link.failure() else {
            // The page may be mapped elsewhere now, without the guest having said so.
            if link.page == Link::page_of(b.gpa()) && link.page != Link::TOO_HIGH {
                let Some(t) = self.translator.as_mut() else { return };
                let to = t.distance(at, b);
                t.memory.write(at, &to);
                t.linked += 1;
            }
            return;
        };
        let mode = self.mmu.fetch_mode();
        let Ok(from) = self.translate(page, Access::Fetch, mode) else { return };
        let Some(frame) = frame(b.gpa()).filter(|_| from.gpa == b.gpa() & !0xfff) else { return };
        self.mmu.note_code(page, frame, &from);
        let Some(t) = self.translator.as_mut() else { return };
        use control::{failure, guard};
        let (word, value) = b.stamp();
        let to = t.distance(at + guard::JUMP, b);
        let page_at = control::slot_at(page, offset_of!(CodeSlot, page)).to_le_bytes();
        let frame_at = control::slot_at(page, offset_of!(CodeSlot, frame)).to_le_bytes();
        t.memory.write(at, &guard::LOAD);
        t.memory.write(at + guard::PAGE_AT, &page_at);
        t.memory.write(at + guard::FRAME_AT, &frame_at);
        t.memory.write(at + guard::FRAME, &frame.to_le_bytes());
        t.memory.write(at + guard::WORD, &(word as u64).to_le_bytes());
        t.memory.write(at + guard::VALUE, &value.to_le_bytes());
        t.memory.write(at + guard::JUMP, &to);
        t.memory.write(failure + failure::INDEX, &((page & INDEX_MASK) as u32).to_le_bytes());
        t.memory.write(failure + failure::FRAME_AT, &frame_at);
        t.linked += 1;
    }
}

/// Whether PEXT takes a few cycles: not on AMD's CPUs before Zen 3.
fn fast_pext() -> bool {
    let amd = std::arch::x86_64::__cpuid(0).ebx.to_le_bytes() == *b"Auth";
    let family = std::arch::x86_64::__cpuid(1).eax >> 20 & 0xff;
    std::arch::is_x86_feature_detected!("bmi2") && (!amd || family >= 0xa)
}
