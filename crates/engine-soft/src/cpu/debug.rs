//! Debug registers, breakpoints, watchpoints, single step (Intel SDM 3B chapter 18; AMD APM 2 section 13.1).

use super::{Cpu, InterruptKind, RIP, Trap};
use crate::mmu::Access;
use ringfort_x86::Vector;
use ringfort_x86::cr::*;
use ringfort_x86::segment::CS;

/// DR6 bits of the four breakpoints.
const HITS: u64 = 0xf;
/// Bits of DR7 that exist: enables, LE, GE, GD, and the conditions.
const DR7_VALID: u64 = 0xffff_23ff;

/// One breakpoint as DR7 describes it.
struct Breakpoint {
    enabled: bool,
    /// 0 execution, 1 writes, 2 ports, 3 reads and writes.
    condition: u64,
    start: u64,
    len: u64,
}

impl Cpu {
    fn breakpoint(&self, n: usize) -> Breakpoint {
        let len = [1, 2, 8, 4][(self.dr7 >> (18 + 4 * n) & 3) as usize];
        Breakpoint {
            enabled: self.dr7 >> (2 * n) & 3 != 0,
            condition: self.dr7 >> (16 + 4 * n) & 3,
            start: self.dr[n] & !(len - 1),
            len,
        }
    }

    /// Whether DR7 enables any breakpoint.
    #[inline(always)]
    pub fn debug_armed(&self) -> bool {
        self.dr7 & 0xff != 0
    }

    /// Deliver #DB if an instruction breakpoint stands at the current RIP; true if so.
    pub fn instruction_breakpoint(&mut self) -> bool {
        let rip = self.regs[usize::from(RIP)];
        let lin = if self.code64() { rip } else { self.seg[CS].base.wrapping_add(rip) & 0xffff_ffff };
        let mut hits = 0;
        for n in 0..4 {
            let b = self.breakpoint(n);
            if b.enabled && b.condition == 0 && b.len == 1 && b.start == lin {
                hits |= 1 << n;
            }
        }
        if hits != 0 {
            self.deliver_debug(hits);
        }
        hits != 0
    }

    /// A #DB with the given DR6 bits.
    pub fn deliver_debug(&mut self, dr6: u64) {
        self.dr6 = self.dr6 & !HITS | dr6 | DR6_FIXED;
        self.pending_db = 0;
        self.deliver_interrupt(Vector::Debug as u8, InterruptKind::Exception(None));
    }

    /// Note in `pending_db` whether a data breakpoint matches an access that came by the slow path.
    #[inline]
    pub fn check_watch(&mut self, lin: u64, len: usize, access: Access) {
        if self.debug_armed() {
            self.match_watch(lin, len, access);
        }
        if self.debugger.watching() {
            self.match_debugger_watch(lin, len, access);
        }
    }

    #[cold]
    fn match_watch(&mut self, lin: u64, len: usize, access: Access) {
        for n in 0..4 {
            let b = self.breakpoint(n);
            let wanted = b.condition == 3 || b.condition == 1 && access == Access::Write;
            let last = lin.wrapping_add(len as u64 - 1);
            if b.enabled && wanted && lin <= b.start + (b.len - 1) && last >= b.start {
                self.pending_db |= 1 << n;
            }
        }
    }

    /// As [`Cpu::check_watch`], for an access to `size` ports from `port`.
    pub fn check_io_watch(&mut self, port: u16, size: usize) {
        if !self.debug_armed() || self.cr4 & CR4_DE == 0 {
            return;
        }
        let (first, last) = (u64::from(port), u64::from(port) + size as u64 - 1);
        for n in 0..4 {
            let b = self.breakpoint(n);
            if b.enabled && b.condition == 2 && first <= b.start + (b.len - 1) && last >= b.start {
                self.pending_db |= 1 << n;
            }
        }
    }

    /// Recompute the list of watched pages from DR0 to DR3, DR7 and the debugger's watchpoints, so that the fast path misses on them.
    pub fn update_watched(&mut self) {
        let mut pages = [u64::MAX; 8];
        let mut used = 0;
        for n in 0..4 {
            let b = self.breakpoint(n);
            if b.enabled && matches!(b.condition, 1 | 3) {
                pages[used] = b.start & !0xfff;
                used += 1;
            }
        }
        for page in self.debugger.watched_pages() {
            pages[used] = page;
            used += 1;
        }
        if pages != self.mmu.watched {
            self.mmu.watched = pages;
            self.mmu.flush_all();
        }
    }

    /// MOV to or from a debug register: which one `n` means; #DB if DR7.GD guards them.
    fn debug_register(&mut self, n: usize) -> Result<usize, Trap> {
        if self.cpl != 0 {
            return Err(self.gp(0));
        }
        let n = match n {
            4 | 5 if self.cr4 & CR4_DE != 0 => return Err(self.ud()),
            4 | 5 => n + 2,
            0..=7 => n,
            _ => return Err(self.ud()),
        };
        if self.dr7 & DR7_GD != 0 {
            self.dr6 = self.dr6 & !HITS | DR6_BD;
            return Err(self.raise(Vector::Debug, 0));
        }
        Ok(n)
    }

    /// MOV from DR`n`.
    ///
    /// # Errors
    /// #GP(0), #UD, #DB.
    pub fn read_dr(&mut self, n: usize) -> Result<u64, Trap> {
        Ok(match self.debug_register(n)? {
            6 => self.dr6,
            7 => self.dr7,
            n => self.dr[n],
        })
    }

    /// MOV to DR`n`.
    ///
    /// # Errors
    /// #GP(0), #UD, #DB.
    pub fn write_dr(&mut self, n: usize, v: u64) -> Result<(), Trap> {
        let n = self.debug_register(n)?;
        if n >= 6 && v >> 32 != 0 {
            return Err(self.gp(0));
        }
        match n {
            6 => self.dr6 = v & (HITS | DR6_BD | DR6_BS | DR6_BT) | DR6_FIXED,
            7 => self.dr7 = v & DR7_VALID | DR7_FIXED,
            n => self.dr[n] = v,
        }
        self.update_watched();
        Ok(())
    }
}
