//! The run loop: find a block, execute its ops, and look up between blocks.

use crate::cache::Block;
use crate::cpu::{Activity, Cpu, RIP, Shadow, Trap, TrapInfo};
use crate::decode::{Exec, Flow, Op, op_flags};
use crate::translate::After;
use ringfort_engine::VcpuExit;
use ringfort_x86::cr::DR6_BS;
use ringfort_x86::flags::{RF, TF};
use ringfort_x86::segment::SS;
use std::sync::atomic::Ordering;

/// Blocks between two looks at the timer.
const TIMER_CHECK: u32 = 128;

impl Cpu {
    /// Execute until something needs the caller.
    pub fn run_loop(&mut self) -> VcpuExit {
        if self.debugged() {
            return self.run_debugged();
        }
        let mut until_timer = 0;
        loop {
            if until_timer == 0 {
                until_timer = TIMER_CHECK;
                self.check_timer();
            }
            if self.env.me.requests.load(Ordering::Relaxed) != 0 || self.activity != Activity::Running {
                if let Some(exit) = self.look_up() {
                    return exit;
                }
                until_timer -= 1;
                continue;
            }
            until_timer = self.run_blocks(until_timer);
        }
    }

    /// Whether something must happen between instructions: after STI or MOV SS, while stepping or watching.
    #[inline(always)]
    pub(crate) fn step_by_step(&self) -> bool {
        (self.shadow != Shadow::None) | (self.sys_flags & (TF | RF) != 0) | self.debug_armed()
    }

    /// Execute up to `most` blocks; fewer when a request is there or the vCPU stops running. How many are left.
    fn run_blocks(&mut self, most: u32) -> u32 {
        for done in 0..most {
            if (self.env.me.requests.load(Ordering::Relaxed) != 0) | (self.activity != Activity::Running) {
                return most - done;
            }
            if self.step_block() {
                return 0;
            }
        }
        0
    }

    /// Execute one block (translated ones go on to others), or one instruction where something must happen between instructions. True if
    /// it is time to look at the clock.
    #[inline]
    pub fn step_block(&mut self) -> bool {
        if self.step_by_step() {
            self.step_single();
            return false;
        }
        match self.execute_block() {
            Ok(clock) => clock,
            Err((trap, op)) => {
                self.deliver_trap(trap, op);
                false
            }
        }
    }

    /// Execute the block at CS:RIP. True as for [`Cpu::step_block`]. What its fetch or one of its ops raised comes back, with the op.
    #[inline(always)]
    fn execute_block(&mut self) -> Result<bool, (Trap, Option<*const Op>)> {
        let block = self.find_block(false).map_err(|t| (t, None))?;
        match self.run_translated(block) {
            None => {}
            Some(After::GoOn) => return Ok(false),
            Some(After::Poll) => return Ok(true),
            Some(After::Trap(op)) => return Err((Trap::carried(), Some(op))),
        }
        self.interpret(block)
    }

    /// As [`Cpu::step_block`], without translated code.
    pub(super) fn step_block_interpreted(&mut self) {
        if self.step_by_step() {
            return self.step_single();
        }
        let done = self.find_block(false).map_err(|t| (t, None)).and_then(|block| self.interpret(block));
        if let Err((trap, op)) = done {
            self.deliver_trap(trap, op);
        }
    }

    /// Execute a block op by op.
    #[inline(always)]
    fn interpret(&mut self, block: *const Block) -> Result<bool, (Trap, Option<*const Op>)> {
        // SAFETY: the cache keeps a block until another is decoded, which no op does.
        let block = unsafe { &*block };
        // They may be gone, and the code have changed since the block was found.
        let Some(ops) = self.ops_of(block) else { return Ok(false) };
        // SAFETY: just found; no op has others back.
        let ops = unsafe { &*ops };
        self.enter_page(block.first());
        self.block_end = ops.as_ptr_range().end;
        self.current = ops.as_ptr();
        loop {
            // SAFETY: `current` is inside the block: handlers move it only while below `block_end` (see `Cpu::then`), and so does this loop.
            let r: Exec = unsafe { ((*self.current).run)(self, &*self.current) };
            let op = self.current;
            match r {
                Ok(Flow::Next) => {
                    // SAFETY: one past the last op at most.
                    let next = unsafe { op.add(1) };
                    if next < self.block_end {
                        self.current = next;
                        continue;
                    }
                    self.advance(op);
                }
                Ok(Flow::Branch) => {}
                Ok(Flow::EndBlock) => self.advance(op),
                Err(t) => return Err((t, Some(op))),
            }
            return Ok(false);
        }
    }

    /// The end of a handler that is done: goes on with the next op of the block without returning to the run loop (the compiler makes
    /// that a jump; should it not, a block's length bounds the depth). For `Ok(Flow::Next)` in handlers of frequent instructions.
    #[inline(always)]
    pub fn then(&mut self, op: &Op) -> Exec {
        let next = (&raw const *op).wrapping_add(1);
        if next < self.block_end {
            self.current = next;
            // SAFETY: below the block's end.
            unsafe { ((*next).run)(self, &*next) }
        } else {
            Ok(Flow::Next)
        }
    }

    /// From the architectural RIP, `first` bytes into a page, to the page's: see [`Cpu::regs`].
    #[inline(always)]
    pub(crate) fn enter_page(&mut self, first: u64) {
        self.regs[usize::from(RIP)] = self.regs[usize::from(RIP)].wrapping_sub(first);
    }

    /// Let RIP follow the op, which has not branched.
    #[inline(always)]
    fn advance(&mut self, op: *const Op) {
        // SAFETY: the op belongs to a block that is still held.
        let rip = unsafe { self.next_ip(&*op) };
        self.regs[usize::from(RIP)] = rip;
    }

    /// Offset in CS of the instruction after `op`, truncated to the code's width.
    #[inline(always)]
    pub fn next_ip(&self, op: &Op) -> u64 {
        let ip = self.regs[usize::from(RIP)].wrapping_add(u64::from(op.off) + u64::from(op.len));
        if self.code64() { ip } else { ip & 0xffff_ffff }
    }

    /// Offset in CS of `op` itself.
    #[inline(always)]
    pub fn this_ip(&self, op: &Op) -> u64 {
        self.regs[usize::from(RIP)].wrapping_add(u64::from(op.off))
    }

    /// Execute one instruction and what follows it: the end of an interrupt shadow, single step, data breakpoints.
    #[cold]
    pub(super) fn step_single(&mut self) {
        let shadow = std::mem::take(&mut self.shadow);
        let stepping = self.sys_flags & TF != 0;
        if self.debug_armed()
            && self.sys_flags & RF == 0
            && shadow != Shadow::MovSs
            && self.instruction_breakpoint()
        {
            return;
        }
        let block = match self.find_block(true) {
            Ok(b) => b,
            Err(t) => return self.deliver_trap(t, None),
        };
        // SAFETY: just decoded, and nothing is while it is executed.
        let op: &Op = unsafe { &(&*block).ops()[0] };
        self.enter_page(op.off.into());
        self.block_end = std::ptr::null();
        // Instructions that ran outside single steps may have left this behind.
        self.no_step_trap = false;
        // RF has done its work (Intel SDM 3B section 17.3.1.1); some instructions load it anew.
        self.sys_flags &= !RF;
        let here = self.this_ip(op);
        match (op.run)(self, op) {
            Ok(Flow::Next | Flow::EndBlock) => self.advance(op),
            // A repeated instruction that is not done: it is not to meet its breakpoint again.
            Ok(Flow::Branch)
                if op.flags & (op_flags::REP | op_flags::REPNE) != 0
                    && self.regs[usize::from(RIP)] == here =>
            {
                self.sys_flags |= RF;
            }
            Ok(Flow::Branch) => {}
            Err(t) => {
                self.deliver_trap(t, Some(op));
                if shadow != Shadow::None {
                    self.interrupts_maybe();
                }
                return;
            }
        }
        if shadow != Shadow::None && self.shadow == Shadow::None {
            self.interrupts_maybe();
        }
        let mut hits = std::mem::take(&mut self.pending_db);
        if stepping && !std::mem::take(&mut self.no_step_trap) {
            hits |= DR6_BS;
        }
        if hits != 0 {
            if self.shadow == Shadow::MovSs {
                // Held off until the instruction after MOV SS is done.
                self.pending_db = hits & !DR6_BS;
            } else {
                self.deliver_debug(hits);
            }
        }
    }

    /// Deliver what `op` (or the fetch, if `None`) raised.
    #[cold]
    fn deliver_trap(&mut self, trap: Trap, op: Option<*const Op>) {
        let info = self.settle_trap(trap, op);
        self.deliver_exception(info);
    }

    /// Point RIP to the op that raised the trap, and give the trap's details.
    fn settle_trap(&mut self, _: Trap, op: Option<*const Op>) -> TrapInfo {
        if let Some(op) = op {
            // SAFETY: the op belongs to a block that is still held.
            let op = unsafe { &*op };
            self.regs[usize::from(RIP)] = self.this_ip(op);
            if self.trap.non_canonical && usize::from(op.seg) == SS && op.flags & op_flags::MEM != 0 {
                self.trap.vector = ringfort_x86::Vector::StackFault as u8;
            }
        }
        self.pending_db = 0;
        self.no_step_trap = false;
        self.trap
    }

    /// For tests: execute one instruction, without debug features; what it raises comes back and is not delivered.
    #[doc(hidden)]
    pub fn step_undelivered(&mut self) -> Result<(), TrapInfo> {
        self.shadow = Shadow::None;
        let block = match self.find_block(true) {
            Ok(b) => b,
            Err(t) => return Err(self.settle_trap(t, None)),
        };
        // SAFETY: just decoded, and nothing is while it is executed.
        let op: &Op = unsafe { &(&*block).ops()[0] };
        self.enter_page(op.off.into());
        self.block_end = std::ptr::null();
        match (op.run)(self, op) {
            Ok(Flow::Next | Flow::EndBlock) => self.advance(op),
            Ok(Flow::Branch) => {}
            Err(t) => return Err(self.settle_trap(t, Some(op))),
        }
        Ok(())
    }

    /// For tests: as [`Cpu::step_undelivered`], but a whole block, from the cache.
    #[doc(hidden)]
    pub fn step_block_undelivered(&mut self) -> Result<(), TrapInfo> {
        self.shadow = Shadow::None;
        self.execute_block().map(drop).map_err(|(t, op)| self.settle_trap(t, op))
    }
}
