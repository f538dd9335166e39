//! The slow path of guest memory accesses: misses, page crossings, MMIO, and stores that somebody must notice.

use super::tlb::{Mapping, NO_PAGE, mode};
use super::walk::{Access, Translation};
use crate::cpu::{Cpu, Int, RIP, Trap};
use ringfort_memory::PAGE_SHIFT;
use ringfort_x86::Vector;
use ringfort_x86::cr::*;
use ringfort_x86::flags::AC;
use ringfort_x86::segment::CS;
use std::sync::{Mutex, PoisonError};

/// Where one piece (within a page) of an access goes.
#[derive(Debug, Clone, Copy)]
struct Piece {
    gpa: u64,
    /// Host address if it is RAM.
    host: Option<*mut u8>,
    lin: u64,
    len: usize,
}

/// The one or two pieces of an access of at most a page.
struct Pieces {
    first: Piece,
    second: Option<Piece>,
}

impl Pieces {
    fn each(&self) -> impl Iterator<Item = (usize, &Piece)> {
        let at = self.first.len;
        std::iter::once((0, &self.first)).chain(self.second.iter().map(move |p| (at, p)))
    }
}

/// Serialises locked accesses that no single host instruction can do: those that cross pages or touch MMIO.
static SPLIT_LOCK: Mutex<()> = Mutex::new(());

impl Cpu {
    /// Translate one piece, entering it into the TLB.
    fn piece(&mut self, lin: u64, len: usize, access: Access, m: usize) -> Result<Piece, Trap> {
        let t = self.translate(lin, access, m)?;
        self.mmu.misses += 1;
        let Some(mapping) = self.mapping(&t, access) else {
            return Ok(Piece { gpa: t.gpa, host: None, lin, len });
        };
        if mapping.write && self.runs_from(t.gpa) {
            self.stop_block();
        }
        if !self.watches(lin) {
            self.mmu.insert(m, lin, &mapping);
        }
        Ok(Piece { gpa: t.gpa, host: Some(mapping.host), lin, len })
    }

    /// What the TLB is to know of a page that was just translated, if it is RAM. If that lets this vCPU's stores go unseen, and the running
    /// code lies there, the block must end: what runs from a page without code is out of date, as another vCPU or a device has written there,
    /// and those stores have to count at once.
    fn mapping(&self, t: &Translation, access: Access) -> Option<Mapping> {
        let (slot, offset) = self.mmu.ram.find(t.gpa)?;
        // SAFETY: `find` gives an offset inside the slot's mapping.
        let host = unsafe { slot.host.add(offset as usize) };
        let log_first_write = slot.tracker.logging() && access != Access::Write;
        let write = t.write && !log_first_write && slot.tracker.allow_fast_writes(offset >> PAGE_SHIFT);
        let Translation { gpa, fetch, large, global, .. } = *t;
        Some(Mapping { gpa, host, write, fetch, large, global })
    }

    /// Whether a debugger watches something in the page of `lin`.
    fn watches(&self, lin: u64) -> bool {
        self.mmu.watched[0] != NO_PAGE && self.mmu.watched.contains(&(lin & !0xfff))
    }

    /// Let the TLB know the page of an access that is about to be made; false if it cannot be made by the TLB alone: it faults, crosses
    /// pages, goes to a device, or somebody must notice. But for A and D bits the guest sees nothing of it.
    pub(crate) fn refill(&mut self, lin: u64, size: usize, write: bool) -> bool {
        let armed = self.cpl == 3 && self.sys_flags & AC != 0;
        if armed || (lin & 0xfff) as usize + size > 0x1000 || self.watches(lin) {
            return false;
        }
        let (m, access) = (self.mmu.access_mode, if write { Access::Write } else { Access::Read });
        let Ok(t) = self.translate(lin, access, m) else { return false };
        let Some(mapping) = self.mapping(&t, access) else { return false };
        if write && !mapping.write || mapping.write && self.runs_from(t.gpa) {
            return false;
        }
        // Logged before it is made, as it will go unseen.
        if write && self.mmu.ram.note_write(t.gpa) {
            return false;
        }
        self.mmu.misses += 1;
        self.mmu.insert(m, lin, &mapping);
        true
    }

    fn pieces(&mut self, lin: u64, len: usize, access: Access, m: usize) -> Result<Pieces, Trap> {
        let lin = if self.long_mode() { lin } else { lin & 0xffff_ffff };
        let left = 0x1000 - (lin & 0xfff) as usize;
        if len <= left {
            return Ok(Pieces { first: self.piece(lin, len, access, m)?, second: None });
        }
        let mut next = lin.wrapping_add(left as u64);
        if !self.long_mode() {
            next &= 0xffff_ffff;
        } else if (next << 16) as i64 >> 16 != next as i64 {
            // That the second part's address cannot be comes before any fault of the first page.
            return Err(self.non_canonical());
        }
        let first = self.piece(lin, left, access, m)?;
        let second = self.piece(next, len - left, access, m)?;
        Ok(Pieces { first, second: Some(second) })
    }

    /// #AC for a misaligned data access at CPL 3 with AC and AM.
    pub(crate) fn check_alignment(&mut self, lin: u64, size: usize) -> Result<(), Trap> {
        let armed = self.cpl == 3 && self.sys_flags & AC != 0 && self.cr0 & CR0_AM != 0;
        if armed && size.is_power_of_two() && lin & (size as u64 - 1) != 0 {
            return Err(self.raise(Vector::AlignmentCheck, 0));
        }
        Ok(())
    }

    fn read_pieces(&mut self, pieces: &Pieces, buf: &mut [u8]) {
        for (at, p) in pieces.each() {
            let out = &mut buf[at..at + p.len];
            match p.host {
                // SAFETY: the piece lies in one mapped RAM page.
                Some(h) => unsafe { copy_from_guest(h, out) },
                None => self.mmio_read(p.gpa, out),
            }
            self.check_watch(p.lin, p.len, Access::Read);
        }
    }

    fn write_pieces(&mut self, pieces: &Pieces, data: &[u8]) {
        for (at, p) in pieces.each() {
            let from = &data[at..at + p.len];
            match p.host {
                Some(h) => {
                    // SAFETY: the piece lies in one mapped RAM page, and translation allowed the write.
                    unsafe { copy_to_guest(h, from) };
                    self.wrote(p.gpa);
                }
                None => self.mmio_write(p.gpa, from),
            }
            self.check_watch(p.lin, p.len, Access::Write);
        }
    }

    /// A store went to the RAM page of `gpa` by the slow path: log it, and if the page held code, end the current block.
    fn wrote(&mut self, gpa: u64) {
        // That it no longer does may be somebody else's doing, since the block was entered.
        if self.mmu.ram.note_write(gpa) || self.runs_from(gpa) {
            self.stop_block();
        }
    }

    /// Whether the code that runs lies in the page of `gpa`.
    fn runs_from(&self, gpa: u64) -> bool {
        let rip = self.regs[usize::from(RIP)];
        let lin = if self.code64() { rip } else { self.seg[CS].base.wrapping_add(rip) & 0xffff_ffff };
        let code = self.mmu.fetch_hit(lin).map(|f| f.gpa).or_else(|| self.translate_debug(lin));
        code.is_some_and(|code| code >> PAGE_SHIFT == gpa >> PAGE_SHIFT)
    }

    fn mmio_read(&mut self, gpa: u64, out: &mut [u8]) {
        let mut at = 0;
        while at < out.len() {
            let n = mmio_step(gpa + at as u64, out.len() - at);
            let (base, part) = (gpa + at as u64, &mut out[at..at + n]);
            if !self.apic_mmio_read(base, part) {
                self.env.bus.mmio_read(base, part);
            }
            at += n;
        }
    }

    fn mmio_write(&mut self, gpa: u64, data: &[u8]) {
        let mut at = 0;
        while at < data.len() {
            let n = mmio_step(gpa + at as u64, data.len() - at);
            let (base, part) = (gpa + at as u64, &data[at..at + n]);
            if !self.apic_mmio_write(base, part) {
                self.env.bus.mmio_write(base, part);
            }
            at += n;
        }
    }

    #[cold]
    pub(super) fn load_slow(&mut self, lin: u64, size: usize) -> Result<u64, Trap> {
        let mut buf = [0; 8];
        self.check_alignment(lin, size)?;
        let p = self.pieces(lin, size, Access::Read, self.mmu.access_mode)?;
        self.read_pieces(&p, &mut buf[..size]);
        Ok(u64::from_le_bytes(buf))
    }

    #[cold]
    pub(super) fn store_slow(&mut self, lin: u64, size: usize, v: u64) -> Result<(), Trap> {
        self.check_alignment(lin, size)?;
        let p = self.pieces(lin, size, Access::Write, self.mmu.access_mode)?;
        self.write_pieces(&p, &v.to_le_bytes()[..size]);
        Ok(())
    }

    #[cold]
    pub(super) fn modify_locked_slow<T: Int>(
        &mut self,
        lin: u64,
        mut f: impl FnMut(T) -> T,
    ) -> Result<(), Trap> {
        self.check_alignment(lin, T::SIZE)?;
        let p = self.pieces(lin, T::SIZE, Access::Write, self.mmu.access_mode)?;
        if let (Some(host), None) = (p.first.host, p.second) {
            atomic_update(host, f);
            self.wrote(p.first.gpa);
            self.check_watch(lin, T::SIZE, Access::Write);
            return Ok(());
        }
        let _serial = SPLIT_LOCK.lock().unwrap_or_else(PoisonError::into_inner);
        let mut buf = [0; 8];
        self.read_pieces(&p, &mut buf[..T::SIZE]);
        let new = f(T::from_u64(u64::from_le_bytes(buf)));
        self.write_pieces(&p, &new.to_u64().to_le_bytes()[..T::SIZE]);
        Ok(())
    }

    /// Load `buf.len()` bytes (at most a page). Not atomic. Faults before anything is read from a device.
    ///
    /// # Errors
    /// As [`Cpu::load`], without #AC.
    pub fn load_bytes(&mut self, lin: u64, buf: &mut [u8]) -> Result<(), Trap> {
        let p = self.pieces(lin, buf.len(), Access::Read, self.mmu.access_mode)?;
        self.read_pieces(&p, buf);
        Ok(())
    }

    /// Store `data` (at most a page). Not atomic. Faults before anything is stored.
    ///
    /// # Errors
    /// As [`Cpu::store`], without #AC.
    pub fn store_bytes(&mut self, lin: u64, data: &[u8]) -> Result<(), Trap> {
        let p = self.pieces(lin, data.len(), Access::Write, self.mmu.access_mode)?;
        self.write_pieces(&p, data);
        Ok(())
    }

    /// Fault as a store of `len` bytes (at most a page) at `lin` would, and change nothing but A and D bits.
    ///
    /// # Errors
    /// As [`Cpu::store`].
    pub fn probe_write(&mut self, lin: u64, len: usize) -> Result<(), Trap> {
        self.pieces(lin, len, Access::Write, self.mmu.access_mode).map(drop)
    }

    /// Fault as a load of `len` bytes (at most a page) at `lin` would.
    ///
    /// # Errors
    /// As [`Cpu::load`].
    pub fn probe_read(&mut self, lin: u64, len: usize) -> Result<(), Trap> {
        self.pieces(lin, len, Access::Read, self.mmu.access_mode).map(drop)
    }

    /// Let `f` change `len` bytes at `lin`, which do not cross a page, through their host address; `None` if they are no RAM. For atomic
    /// accesses wider than a register.
    ///
    /// # Errors
    /// As [`Cpu::store`], without #AC.
    pub fn update_in_ram<R>(
        &mut self,
        lin: u64,
        len: usize,
        f: impl FnOnce(*mut u8) -> R,
    ) -> Result<Option<R>, Trap> {
        let p = self.pieces(lin, len, Access::Write, self.mmu.access_mode)?;
        let (Some(host), None) = (p.first.host, p.second) else { return Ok(None) };
        let r = f(host);
        self.wrote(p.first.gpa);
        self.check_watch(lin, len, Access::Write);
        Ok(Some(r))
    }

    /// Load for the CPU itself (descriptor tables, TSS, interrupt stacks): supervisor access whatever the CPL.
    ///
    /// # Errors
    /// #PF, or #GP(0) for a non-canonical address.
    #[inline]
    pub fn load_system<T: Int>(&mut self, lin: u64) -> Result<T, Trap> {
        self.load_as(lin, self.system_mode())
    }

    /// Store for the CPU itself; see [`Cpu::load_system`].
    ///
    /// # Errors
    /// #PF, or #GP(0) for a non-canonical address.
    pub fn store_system<T: Int>(&mut self, lin: u64, v: T) -> Result<(), Trap> {
        self.store_bytes_as(lin, &v.to_u64().to_le_bytes()[..T::SIZE], self.system_mode())
    }

    /// Fault as [`Cpu::store_system`] of `len` bytes would.
    ///
    /// # Errors
    /// #PF, or #GP(0) for a non-canonical address.
    pub fn probe_write_system(&mut self, lin: u64, len: usize) -> Result<(), Trap> {
        self.probe_write_as(lin, len, self.system_mode())
    }

    /// Load with the rights of access mode `m`.
    ///
    /// # Errors
    /// #PF, or #GP(0) for a non-canonical address.
    #[inline]
    pub fn load_as<T: Int>(&mut self, lin: u64, m: usize) -> Result<T, Trap> {
        if let Some(p) = self.mmu.hit(m, lin, T::SIZE, false) {
            // SAFETY: a TLB hit means that the bytes lie in one mapped RAM page.
            return Ok(unsafe { p.cast::<T>().read_unaligned() });
        }
        let mut buf = [0; 8];
        let p = self.pieces(lin, T::SIZE, Access::Read, m)?;
        self.read_pieces(&p, &mut buf[..T::SIZE]);
        Ok(T::from_u64(u64::from_le_bytes(buf)))
    }

    /// Load `buf.len()` bytes (at most a page) with the rights of access mode `m`.
    ///
    /// # Errors
    /// #PF, or #GP(0) for a non-canonical address.
    #[inline]
    pub fn load_bytes_as(&mut self, lin: u64, buf: &mut [u8], m: usize) -> Result<(), Trap> {
        if let Some(p) = self.mmu.hit(m, lin, buf.len(), false) {
            // SAFETY: as in `load_as`.
            unsafe { std::ptr::copy_nonoverlapping(p, buf.as_mut_ptr(), buf.len()) };
            return Ok(());
        }
        let p = self.pieces(lin, buf.len(), Access::Read, m)?;
        self.read_pieces(&p, buf);
        Ok(())
    }

    /// Store `data` (at most a page) with the rights of access mode `m`. Faults before anything is stored.
    ///
    /// # Errors
    /// #PF, or #GP(0) for a non-canonical address.
    #[inline]
    pub fn store_bytes_as(&mut self, lin: u64, data: &[u8], m: usize) -> Result<(), Trap> {
        if let Some(p) = self.mmu.hit(m, lin, data.len(), true) {
            // SAFETY: as in `load_as`; the write tag stands only for RAM whose stores need no notice.
            unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), p, data.len()) };
            return Ok(());
        }
        let p = self.pieces(lin, data.len(), Access::Write, m)?;
        self.write_pieces(&p, data);
        Ok(())
    }

    /// Fault as [`Cpu::store_bytes_as`] of `len` bytes would.
    ///
    /// # Errors
    /// #PF, or #GP(0) for a non-canonical address.
    pub fn probe_write_as(&mut self, lin: u64, len: usize, m: usize) -> Result<(), Trap> {
        self.pieces(lin, len, Access::Write, m).map(drop)
    }

    /// Atomically change one byte for the CPU itself (a descriptor's type).
    ///
    /// # Errors
    /// #PF, or #GP(0) for a non-canonical address.
    pub fn modify_system(&mut self, lin: u64, mut f: impl FnMut(u8) -> u8) -> Result<(), Trap> {
        let p = self.pieces(lin, 1, Access::Write, self.system_mode())?;
        if let Some(host) = p.first.host {
            atomic_update(host, f);
            self.wrote(p.first.gpa);
            self.check_watch(lin, 1, Access::Write);
            return Ok(());
        }
        let mut b = [0];
        self.read_pieces(&p, &mut b);
        self.write_pieces(&p, &[f(b[0])]);
        Ok(())
    }

    /// The access mode of ordinary accesses at privilege level `cpl` with RFLAGS as they are.
    pub fn mode_at(&self, cpl: u8) -> usize {
        if cpl == 3 {
            mode::USER
        } else if self.cr4 & CR4_SMAP != 0 && (self.sys_flags & AC == 0 || self.cpl == 3) {
            mode::SUPERVISOR
        } else {
            mode::SUPERVISOR_USER
        }
    }

    /// Access mode of implicit supervisor accesses: SMAP applies to them whatever AC says (Intel SDM 3A section 4.6.1).
    pub(crate) fn system_mode(&self) -> usize {
        if self.cr4 & CR4_SMAP != 0 { mode::SUPERVISOR } else { mode::SUPERVISOR_USER }
    }

    /// Bring `lin`'s page into the TLB for a run of accesses, or fault.
    pub(super) fn fill_for_run(&mut self, lin: u64, access: Access) -> Result<(), Trap> {
        self.pieces(lin, 1, access, self.mmu.access_mode).map(drop)
    }

    /// Follow a change of CPL, RFLAGS.AC, RFLAGS.VM, CR0.PG or CR4.SMAP: choose the TLB set. Cheap.
    #[inline]
    pub fn update_mmu_mode(&mut self) {
        let m = self.mode_at(self.cpl);
        // Alignment checks are made on the slow path only.
        let checked = self.cpl == 3 && self.sys_flags & AC != 0 && self.cr0 & CR0_AM != 0;
        if checked != self.mmu.bypassed() {
            self.mmu.bypass(checked);
        }
        if m != self.mmu.access_mode {
            self.mmu.set_access_mode(m);
        }
    }

    /// Read from guest physical memory; MMIO included. For debuggers and PAE pointers.
    pub fn load_physical(&mut self, gpa: u64) -> u64 {
        match self.mmu.ram.host(gpa) {
            // SAFETY: RamMap's pointer is valid to the end of the page and the callers' addresses are 8-byte aligned.
            Some(p) => unsafe { p.cast::<u64>().read_unaligned() },
            None => {
                let mut buf = [0; 8];
                self.env.bus.mmio_read(gpa, &mut buf);
                u64::from_le_bytes(buf)
            }
        }
    }
}

/// Bytes of the next MMIO access: at most 8, a power of two, naturally aligned where it can be.
fn mmio_step(gpa: u64, left: usize) -> usize {
    let mut n = 8;
    while n > left {
        n /= 2;
    }
    while n > 1 && (gpa & 7) as usize + n > 8 {
        n /= 2;
    }
    n
}

/// Copy bytes that other vCPUs may be writing.
///
/// # Safety
/// `from` is valid for reads of `out.len()` bytes.
unsafe fn copy_from_guest(from: *const u8, out: &mut [u8]) {
    // Whole words where the size is one, so that an aligned guest access is a single host access.
    // SAFETY: the caller's; unaligned reads are used throughout.
    unsafe {
        match out.len() {
            2 => out.copy_from_slice(&from.cast::<u16>().read_unaligned().to_ne_bytes()),
            4 => out.copy_from_slice(&from.cast::<u32>().read_unaligned().to_ne_bytes()),
            8 => out.copy_from_slice(&from.cast::<u64>().read_unaligned().to_ne_bytes()),
            n => std::ptr::copy_nonoverlapping(from, out.as_mut_ptr(), n),
        }
    }
}

/// Copy bytes to where other vCPUs may be reading.
///
/// # Safety
/// `to` is valid for writes of `data.len()` bytes.
unsafe fn copy_to_guest(to: *mut u8, data: &[u8]) {
    // SAFETY: the caller's; the slices have the matched lengths.
    unsafe {
        match *data {
            [a, b] => to.cast::<u16>().write_unaligned(u16::from_ne_bytes([a, b])),
            [a, b, c, d] => to.cast::<u32>().write_unaligned(u32::from_ne_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] => {
                to.cast::<u64>().write_unaligned(u64::from_ne_bytes([a, b, c, d, e, f, g, h]));
            }
            _ => std::ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()),
        }
    }
}

/// Atomically replace the value at `p` (any alignment) by `f` of it, with the host's own LOCK CMPXCHG, which is atomic also across cache lines.
#[inline(always)]
pub(super) fn atomic_update<T: Int>(p: *mut u8, mut f: impl FnMut(T) -> T) {
    use std::arch::asm;
    loop {
        // SAFETY: callers pass a pointer to T::SIZE bytes of mapped RAM.
        let old: T = unsafe { p.cast::<T>().read_unaligned() };
        let new = f(old);
        let found: u64;
        // SAFETY: as above; the instruction touches only those bytes.
        unsafe {
            match T::SIZE {
                1 => asm!("lock cmpxchg [{p}], {n}", p = in(reg) p, n = in(reg_byte) new.to_u64() as u8,
                    inout("rax") old.to_u64() => found, options(nostack)),
                2 => asm!("lock cmpxchg [{p}], {n:x}", p = in(reg) p, n = in(reg) new.to_u64(),
                    inout("rax") old.to_u64() => found, options(nostack)),
                4 => asm!("lock cmpxchg [{p}], {n:e}", p = in(reg) p, n = in(reg) new.to_u64(),
                    inout("rax") old.to_u64() => found, options(nostack)),
                _ => asm!("lock cmpxchg [{p}], {n}", p = in(reg) p, n = in(reg) new.to_u64(),
                    inout("rax") old.to_u64() => found, options(nostack)),
            }
        }
        if T::from_u64(found) == old {
            return;
        }
    }
}
