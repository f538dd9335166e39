//! Page walks: 32-bit, PAE and 4-level paging (Intel SDM 3A chapter 4; AMD APM 2 chapter 5).

use super::tlb::mode;
use crate::cpu::{Cpu, Trap};
use ringfort_memory::RamMap;
use ringfort_x86::cr::*;
use ringfort_x86::exception::*;
use ringfort_x86::paging as pte;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// The kind of an access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Load.
    Read,
    /// Store, or read-modify-write.
    Write,
    /// Instruction fetch.
    Fetch,
}

/// Where a page lies and what may be done with it.
#[derive(Debug, Clone, Copy)]
pub struct Translation {
    /// Guest physical address of the byte asked for.
    pub gpa: u64,
    /// Stores are allowed and the D bit is set: no later store needs a walk.
    pub write: bool,
    /// Fetches are allowed in this access mode.
    pub fetch: bool,
    /// Size of the page if larger than 4 KiB.
    pub large: Option<u64>,
    /// The translation is the same in all address spaces.
    pub global: bool,
}

/// What a walk needs to know of the CPU, so that it can run for another privilege than the current one.
#[derive(Debug, Clone, Copy)]
struct Rules {
    user: bool,
    /// Supervisor access to user pages is allowed (no SMAP, or AC).
    user_pages: bool,
    wp: bool,
    nx: bool,
    smep: bool,
    /// The G bit means something.
    pge: bool,
    reserved: u64,
}

/// A level's result: the combined rights so far.
struct Rights {
    write: bool,
    user: bool,
    nx: bool,
}

impl Cpu {
    /// Translate `lin` for `access` in access mode `m`, setting A and D bits.
    ///
    /// # Errors
    /// #PF; #GP(0) for a non-canonical address.
    pub fn translate(&mut self, lin: u64, access: Access, m: usize) -> Result<Translation, Trap> {
        if self.cr0 & CR0_PG == 0 {
            return Ok(Translation {
                gpa: lin & 0xffff_ffff,
                write: true,
                fetch: true,
                large: None,
                global: false,
            });
        }
        if self.long_mode() && (lin << 16) as i64 >> 16 != lin as i64 {
            return Err(self.non_canonical());
        }
        // PAE entries outside long mode have no use for bits 52 to 62 either.
        let pae_only = if self.long_mode() { 0 } else { 0x7ff << 52 };
        let rules = Rules {
            user: m == mode::USER,
            user_pages: m != mode::SUPERVISOR,
            wp: self.cr0 & CR0_WP != 0,
            // The old tables have no bit for it.
            nx: self.efer & EFER_NXE != 0 && self.cr4 & CR4_PAE != 0,
            smep: self.cr4 & CR4_SMEP != 0,
            pge: self.cr4 & CR4_PGE != 0,
            reserved: self.mmu.reserved_addr | pae_only,
        };
        let walked = if self.cr4 & CR4_PAE == 0 {
            walk32(&self.mmu.ram, self.cr3, self.cr4 & CR4_PSE != 0, lin as u32, access, &rules)
        } else if self.long_mode() {
            let root = self.cr3 & pte::ADDR;
            walk64(&self.mmu.ram, root + (lin >> 39 & 0x1ff) * 8, 4, lin, access, &rules)
        } else {
            let pdpte = self.pdptrs[(lin >> 30 & 3) as usize];
            if pdpte & pte::P == 0 {
                Err(0)
            } else {
                walk64(&self.mmu.ram, (pdpte & pte::ADDR) + (lin >> 21 & 0x1ff) * 8, 2, lin, access, &rules)
            }
        };
        walked.map_err(|code| {
            let fetch = access == Access::Fetch && (rules.nx || rules.smep);
            let code = code
                | if access == Access::Write { PF_WRITE } else { 0 }
                | if rules.user { PF_USER } else { 0 }
                | if fetch { PF_FETCH } else { 0 };
            self.page_fault(lin, code)
        })
    }

    /// As [`Cpu::translate`], for a debugger: no faults, no A and D bits, no rights. `None` where nothing is mapped.
    pub fn translate_debug(&self, lin: u64) -> Option<u64> {
        if self.cr0 & CR0_PG == 0 {
            return Some(lin & 0xffff_ffff);
        }
        let read = |gpa: u64| self.mmu.ram.host(gpa).map_or(0, load64);
        if self.cr4 & CR4_PAE == 0 {
            let read32 = |gpa: u64| self.mmu.ram.host(gpa).map_or(0, load32);
            let pde = read32((self.cr3 & 0xffff_f000) + (lin >> 22 & 0x3ff) * 4);
            if u64::from(pde) & pte::P == 0 {
                return None;
            }
            if u64::from(pde) & pte::PS != 0 && self.cr4 & CR4_PSE != 0 {
                return Some(large32(pde) | lin & 0x3f_ffff);
            }
            let e = read32(u64::from(pde & 0xffff_f000) + (lin >> 12 & 0x3ff) * 4);
            return (u64::from(e) & pte::P != 0).then(|| u64::from(e & 0xffff_f000) | lin & 0xfff);
        }
        let (mut table, mut level) = if self.long_mode() {
            (self.cr3 & pte::ADDR, 4)
        } else {
            let e = self.pdptrs[(lin >> 30 & 3) as usize];
            if e & pte::P == 0 {
                return None;
            }
            (e & pte::ADDR, 2)
        };
        loop {
            let shift = 12 + 9 * (level - 1);
            let e = read(table + (lin >> shift & 0x1ff) * 8);
            if e & pte::P == 0 {
                return None;
            }
            let size = 1u64 << shift;
            if level == 1 || (e & pte::PS != 0 && level <= 3) {
                return Some(e & pte::ADDR & !(size - 1) | lin & (size - 1));
            }
            table = e & pte::ADDR;
            level -= 1;
        }
    }
}

fn load64(p: *mut u8) -> u64 {
    // SAFETY: RamMap gives pointers valid to the end of the page; entries are naturally aligned within it, so this is an aligned access to
    // shared memory that everybody else also touches atomically or through raw pointers.
    unsafe { AtomicU64::from_ptr(p.cast()) }.load(Ordering::Acquire)
}

fn load32(p: *mut u8) -> u32 {
    // SAFETY: as for `load64`.
    unsafe { AtomicU32::from_ptr(p.cast()) }.load(Ordering::Acquire)
}

fn large32(pde: u32) -> u64 {
    // PSE-36: bits 13 to 20 of the entry are bits 32 to 39 of the address.
    u64::from(pde & 0xffc0_0000) | u64::from(pde >> 13 & 0xff) << 32
}

/// Whether the access is forbidden by `r`; the fault is then a protection violation.
fn denied(r: &Rights, access: Access, rules: &Rules) -> bool {
    if rules.user {
        !r.user || access == Access::Write && !r.write || access == Access::Fetch && r.nx
    } else {
        match access {
            Access::Fetch => r.nx || r.user && rules.smep,
            Access::Read => r.user && !rules.user_pages,
            Access::Write => r.user && !rules.user_pages || !r.write && rules.wp,
        }
    }
}

fn allowed(r: &Rights, gpa: u64, entry: u64, large: Option<u64>, rules: &Rules) -> Translation {
    Translation {
        gpa,
        write: entry & pte::D != 0 && !denied(r, Access::Write, rules),
        fetch: !denied(r, Access::Fetch, rules),
        large,
        global: rules.pge && entry & pte::G != 0,
    }
}

/// 4-level and PAE tables from `level` down; `entry` is the physical address of that level's entry. On failure the P and RSVD bits of the
/// error code.
fn walk64(
    ram: &RamMap,
    mut entry: u64,
    mut level: u32,
    lin: u64,
    access: Access,
    rules: &Rules,
) -> Result<Translation, u32> {
    let mut rights = Rights { write: true, user: true, nx: false };
    loop {
        // A table outside RAM reads as zero: not present.
        let Some(p) = ram.host(entry) else { return Err(0) };
        // SAFETY: entries are 8-byte aligned inside a RAM page; see `load64`.
        let cell = unsafe { AtomicU64::from_ptr(p.cast()) };
        loop {
            let e = cell.load(Ordering::Acquire);
            if e & pte::P == 0 {
                return Err(0);
            }
            let shift = 12 + 9 * (level - 1);
            let leaf = level == 1 || (e & pte::PS != 0 && level <= 3);
            let mut reserved = rules.reserved & !pte::NX;
            if !rules.nx {
                reserved |= pte::NX;
            }
            if leaf && level > 1 {
                // The address bits below the page size, but for the PAT bit.
                reserved |= ((1u64 << shift) - 1) & !0x1fff;
            } else if level == 4 {
                reserved |= pte::PS;
            }
            if e & reserved != 0 {
                return Err(PF_PRESENT | PF_RESERVED);
            }
            let here = Rights {
                write: rights.write && e & pte::W != 0,
                user: rights.user && e & pte::U != 0,
                nx: rights.nx || e & pte::NX != 0,
            };
            let mut set = e | pte::A;
            if leaf {
                if denied(&here, access, rules) {
                    return Err(PF_PRESENT);
                }
                if access == Access::Write {
                    set |= pte::D;
                }
            }
            if set != e && !update(ram, cell, e, set, entry) {
                continue; // another vCPU changed the entry: look again
            }
            if leaf {
                let size = 1u64 << shift;
                let gpa = e & pte::ADDR & !(size - 1) | lin & (size - 1);
                return Ok(allowed(&here, gpa, set, (level > 1).then_some(size), rules));
            }
            rights = here;
            level -= 1;
            entry = (e & pte::ADDR) + (lin >> (shift - 9) & 0x1ff) * 8;
            break;
        }
    }
}

fn update(ram: &RamMap, cell: &AtomicU64, old: u64, new: u64, gpa: u64) -> bool {
    let done = cell.compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed).is_ok();
    if done {
        ram.note_write(gpa);
    }
    done
}

/// Two-level 32-bit tables.
fn walk32(
    ram: &RamMap,
    cr3: u64,
    pse: bool,
    lin: u32,
    access: Access,
    rules: &Rules,
) -> Result<Translation, u32> {
    let mut entry = (cr3 & 0xffff_f000) + u64::from(lin >> 22) * 4;
    let mut rights = Rights { write: true, user: true, nx: false };
    let mut level = 2;
    loop {
        let Some(p) = ram.host(entry) else { return Err(0) };
        // SAFETY: entries are 4-byte aligned inside a RAM page; see `load64`.
        let cell = unsafe { AtomicU32::from_ptr(p.cast()) };
        loop {
            let e = cell.load(Ordering::Acquire);
            let bits = u64::from(e);
            if bits & pte::P == 0 {
                return Err(0);
            }
            let leaf = level == 1 || pse && bits & pte::PS != 0;
            if leaf && level == 2 && (e & 1 << 21 != 0 || large32(e) & rules.reserved != 0) {
                return Err(PF_PRESENT | PF_RESERVED);
            }
            let here = Rights {
                write: rights.write && bits & pte::W != 0,
                user: rights.user && bits & pte::U != 0,
                nx: false,
            };
            let mut set = e | pte::A as u32;
            if leaf {
                if denied(&here, access, rules) {
                    return Err(PF_PRESENT);
                }
                if access == Access::Write {
                    set |= pte::D as u32;
                }
            }
            if set != e {
                if cell.compare_exchange(e, set, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                    continue;
                }
                ram.note_write(entry);
            }
            if leaf {
                return Ok(if level == 2 {
                    allowed(&here, large32(e) | u64::from(lin & 0x3f_ffff), set.into(), Some(4 << 20), rules)
                } else {
                    allowed(&here, u64::from(e & 0xffff_f000 | lin & 0xfff), set.into(), None, rules)
                });
            }
            rights = here;
            level -= 1;
            entry = u64::from(e & 0xffff_f000) + u64::from(lin >> 12 & 0x3ff) * 4;
            break;
        }
    }
}
