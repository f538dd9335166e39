//! Runs under a debugger. A vCPU of which a debugger wants something has a run loop of its own, so the usual one pays nothing for it.
//!
//! Software breakpoints and watchpoints leave translated code in force: INT3 and accesses to watched pages come to handlers anyway.
//! Breakpoints by address are compared at each block, which only the interpreter executes then; single steps are single.

use crate::cpu::{Activity, Cpu, RIP};
use crate::mmu::Access;
use ringfort_engine::{DebugRequest, DebugStop, EngineError, VcpuExit, Watch, WatchKind};
use ringfort_x86::segment::CS;
use std::sync::atomic::Ordering;

/// Most breakpoints and watchpoints by address, as debug registers have them.
pub const MAX_WATCHES: usize = 4;
/// Blocks between two looks at the timer.
const TIMER_CHECK: u32 = 128;

/// What a debugger wants of a vCPU.
#[derive(Debug, Default)]
pub struct Debugger {
    request: DebugRequest,
    /// Anything is wanted.
    active: bool,
    /// Data is watched.
    watching: bool,
    /// What the current instruction met.
    hit: Option<DebugStop>,
    /// The breakpoint at this linear address has been told: it does not hold up the instruction again.
    passed: Option<u64>,
}

impl Debugger {
    /// Whether data is watched.
    #[inline(always)]
    pub fn watching(&self) -> bool {
        self.watching
    }

    /// Whether interrupts are to wait: a step is to show the next instruction, not a handler.
    pub(super) fn holds_interrupts(&self) -> bool {
        self.request.step
    }

    /// The watched pages.
    pub(crate) fn watched_pages(&self) -> impl Iterator<Item = u64> {
        self.request.watches.iter().filter(|b| b.kind != WatchKind::Execute).map(|b| b.address & !0xfff)
    }

    /// Breakpoints by address, with their numbers.
    fn breakpoints(&self) -> impl Iterator<Item = (usize, &Watch)> + '_ {
        self.request.watches.iter().enumerate().filter(|(_, w)| w.kind == WatchKind::Execute)
    }
}

impl Cpu {
    /// Replace what a debugger wants.
    ///
    /// # Errors
    /// [`EngineError::State`]; then nothing has changed.
    pub fn set_debug_request(&mut self, request: &DebugRequest) -> Result<(), EngineError> {
        if request.watches.len() > MAX_WATCHES {
            return Err(EngineError::State(format!(
                "{} breakpoints by address; at most {MAX_WATCHES} are possible",
                request.watches.len()
            )));
        }
        for b in &request.watches {
            let fits = matches!(b.len, 1 | 2 | 4 | 8) && b.address.is_multiple_of(b.len.into());
            if !fits || b.kind == WatchKind::Execute && b.len != 1 {
                return Err(EngineError::State(format!(
                    "{} bytes at {:#x} cannot be watched",
                    b.len, b.address
                )));
            }
        }
        self.debugger.request = request.clone();
        self.debugger.active = !(*request == DebugRequest::default());
        self.debugger.watching = request.watches.iter().any(|b| b.kind != WatchKind::Execute);
        self.debugger.hit = None;
        self.update_watched();
        Ok(())
    }

    /// Whether a debugger wants something.
    #[inline]
    pub(crate) fn debugged(&self) -> bool {
        self.debugger.active
    }

    /// INT3: true if it is a debugger's to take.
    pub(crate) fn debugger_takes_int3(&mut self) -> bool {
        let takes = self.debugger.request.software;
        if takes {
            self.debugger.hit = Some(DebugStop::Software);
        }
        takes
    }

    /// Note whether an access that came by the slow path is watched; the block ends after the instruction then.
    #[cold]
    pub(crate) fn match_debugger_watch(&mut self, lin: u64, len: usize, access: Access) {
        let last = lin.wrapping_add(len as u64 - 1);
        let hit = self.debugger.request.watches.iter().position(|b| {
            let wanted = match b.kind {
                WatchKind::Execute => false,
                WatchKind::Write => access == Access::Write,
                WatchKind::Access => true,
            };
            wanted && lin <= b.address + u64::from(b.len - 1) && last >= b.address
        });
        if let Some(n) = hit {
            self.debugger.hit = Some(DebugStop::Watch(n));
            self.stop_block();
        }
    }

    fn linear_rip(&self) -> u64 {
        let rip = self.regs[usize::from(RIP)];
        if self.code64() { rip } else { self.seg[CS].base.wrapping_add(rip) & 0xffff_ffff }
    }

    /// The run loop while a debugger wants something.
    #[cold]
    pub(super) fn run_debugged(&mut self) -> VcpuExit {
        self.debugger.hit = None;
        let step = self.debugger.request.step;
        let by_address = self.debugger.breakpoints().next().is_some();
        let mut until_timer = 0;
        loop {
            if until_timer == 0 {
                until_timer = TIMER_CHECK;
                self.check_timer();
            }
            until_timer -= 1;
            if self.env.me.requests.load(Ordering::Relaxed) != 0 || self.activity != Activity::Running {
                if let Some(exit) = self.look_up() {
                    return exit;
                }
                // While stepping, interrupts stay requested.
                if !step || self.activity != Activity::Running {
                    continue;
                }
            }
            let lin = self.linear_rip();
            let passed = self.debugger.passed.take() == Some(lin);
            let reached = self.debugger.breakpoints().find(|(_, b)| b.address == lin).map(|(n, _)| n);
            if !passed && let Some(n) = reached {
                self.debugger.passed = Some(lin);
                return VcpuExit::Debug(DebugStop::Watch(n));
            }
            if step || self.breakpoint_in_block(lin) {
                self.step_single();
            } else if by_address {
                self.step_block_interpreted();
            } else if self.step_block() {
                until_timer = 0;
            }
            if let Some(event) = self.debugger.hit.take() {
                return VcpuExit::Debug(event);
            }
            if step {
                return VcpuExit::Debug(DebugStop::Step);
            }
        }
    }

    /// Whether a breakpoint lies in the block at `lin`, behind its first instruction.
    fn breakpoint_in_block(&mut self, lin: u64) -> bool {
        if self.debugger.breakpoints().next().is_none() {
            return false;
        }
        // A fetch fault is raised again, and delivered, when the block is executed.
        let Ok(block) = self.find_block(false) else { return false };
        // SAFETY: the cache keeps a block until another is decoded.
        let bytes = u64::from(unsafe { (*block).bytes });
        self.debugger.breakpoints().any(|(_, b)| (1..bytes).contains(&b.address.wrapping_sub(lin)))
    }
}
