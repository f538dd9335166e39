//! How the boot vCPU begins.

use super::{BootError, place, write};
use ringfort_engine::{CpuEvents, CpuState, MpState};
use ringfort_memory::GuestMemory;
use ringfort_x86::cr::{CR0_CD, CR0_ET, CR0_NW, CR0_PE, CR0_PG, CR4_PAE, DR6_FIXED, DR7_FIXED};
use ringfort_x86::cr::{EFER_LMA, EFER_LME, XCR0_X87};
use ringfort_x86::msr::IA32_MTRR_DEF_TYPE;
use ringfort_x86::segment::{ACCESSED, CODE, CS, DB, GRANULAR, LONG, PRESENT, RW, S, TableRegister};
use ringfort_x86::{Segment, flags, paging};

/// An entry point and its machine state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// The reset vector: firmware runs.
    Reset,
    /// 32-bit protected mode, flat segments, no paging, interrupts off.
    Protected {
        /// EIP.
        eip: u32,
        /// EAX.
        eax: u32,
        /// EBX.
        ebx: u32,
        /// ESI.
        esi: u32,
    },
    /// 64-bit mode, first 4 GiB mapped to themselves, interrupts off.
    Long {
        /// RIP.
        rip: u64,
        /// RSI.
        rsi: u64,
    },
}

const CODE32: u16 = PRESENT | S | CODE | RW | ACCESSED | DB | GRANULAR;
const CODE64: u16 = PRESENT | S | CODE | RW | ACCESSED | LONG | GRANULAR;
const DATA: u16 = PRESENT | S | RW | ACCESSED | DB | GRANULAR;
/// Selectors that the Linux and Multiboot entries use.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;

impl Entry {
    /// Write what the entry state refers to (GDT, page tables) into low RAM.
    pub(super) fn prepare(&self, memory: &GuestMemory) -> Result<(), BootError> {
        if *self == Entry::Reset {
            return Ok(());
        }
        let code = if matches!(self, Entry::Long { .. }) { CODE64 } else { CODE32 };
        let descriptor = |attrs: u16| 0xf_0000_0000_ffff_u64 | u64::from(attrs) << 40;
        let tss = 0x67 | u64::from(PRESENT | 0xb) << 40;
        let gdt = [0, 0, descriptor(code), descriptor(DATA), tss, 0];
        let bytes: Vec<u8> = gdt.iter().flat_map(|d| d.to_le_bytes()).collect();
        write(memory, place::GDT, &bytes)?;
        if let Entry::Long { .. } = self {
            let mut tables = Vec::with_capacity(6 * 512);
            let pdpt = place::PAGE_TABLES + 0x1000;
            let table = |n: usize, entry: &dyn Fn(u64) -> u64| {
                (0..512u64).map(|i| if i < n as u64 { entry(i) } else { 0 }).collect::<Vec<u64>>()
            };
            tables.extend(table(1, &|_| pdpt | paging::P | paging::W));
            tables.extend(table(4, &|i| (pdpt + 0x1000 * (i + 1)) | paging::P | paging::W));
            for gib in 0..4u64 {
                tables.extend(table(512, &|i| gib << 30 | i << 21 | paging::P | paging::W | paging::PS));
            }
            let bytes: Vec<u8> = tables.iter().flat_map(|e| e.to_le_bytes()).collect();
            write(memory, place::PAGE_TABLES, &bytes)?;
        }
        Ok(())
    }

    /// Turn the state after reset into the entry state. What is not part of the boot protocols (APIC, MSRs, x87) stays
    /// as it is, except that memory is made write-back by default, as firmware would have.
    pub fn apply(&self, state: &mut CpuState) {
        state.mp_state = MpState::Runnable;
        if *self == Entry::Reset {
            return;
        }
        let code = if matches!(self, Entry::Long { .. }) { CODE64 } else { CODE32 };
        state.segments = [Segment::flat(DATA_SELECTOR, DATA); 6];
        state.segments[CS] = Segment::flat(CODE_SELECTOR, code);
        state.tr = Segment { selector: TSS_SELECTOR, attrs: PRESENT | 0xb, limit: 0x67, base: 0 };
        state.ldtr = Segment::default();
        state.gdtr = TableRegister { base: place::GDT, limit: 6 * 8 - 1 };
        state.idtr = TableRegister::default();
        state.gpr = [0; 16];
        state.gpr[4] = place::STACK;
        state.rflags = flags::FIXED;
        state.cr0 = CR0_PE | CR0_ET;
        state.cr3 = 0;
        state.cr4 = 0;
        state.efer = 0;
        match *self {
            Entry::Protected { eip, eax, ebx, esi } => {
                state.rip = eip.into();
                state.gpr[0] = eax.into();
                state.gpr[3] = ebx.into();
                state.gpr[6] = esi.into();
            }
            Entry::Long { rip, rsi } => {
                state.rip = rip;
                state.gpr[6] = rsi;
                state.cr0 |= CR0_PG;
                state.cr3 = place::PAGE_TABLES;
                state.cr4 = CR4_PAE;
                state.efer = EFER_LME | EFER_LMA;
            }
            Entry::Reset => {}
        }
        if let Some(m) = state.msrs.iter_mut().find(|m| m.0 == IA32_MTRR_DEF_TYPE) {
            // MTRRs enabled, default type write-back (Intel SDM 3A section 12.11.2.1).
            m.1 = 0x806;
        }
    }

    /// The whole state of a vCPU that begins here, for a machine whose engine gives none to start from.
    pub fn state(&self, signature: u32) -> CpuState {
        let mut s = reset_state(signature);
        self.apply(&mut s);
        s
    }
}

/// The state of the boot vCPU after power-on (Intel SDM 3A table 10-1): real mode at the reset vector
/// 0xFFFFFFF0. `signature` is leaf 1's EAX, which EDX holds. The local APIC page is left empty: the engine's own
/// reset state stands.
pub fn reset_state(signature: u32) -> CpuState {
    let mut s = CpuState {
        rip: 0xfff0,
        rflags: flags::FIXED,
        segments: [Segment::real(0); 6],
        tr: Segment { selector: 0, attrs: PRESENT | 0xb, limit: 0xffff, base: 0 },
        ldtr: Segment { selector: 0, attrs: PRESENT | 2, limit: 0xffff, base: 0 },
        gdtr: TableRegister { base: 0, limit: 0xffff },
        idtr: TableRegister { base: 0, limit: 0xffff },
        cr0: CR0_CD | CR0_NW | CR0_ET,
        xcr0: XCR0_X87,
        dr6: DR6_FIXED,
        dr7: DR7_FIXED,
        xsave: vec![0; 576],
        events: CpuEvents::default(),
        mp_state: MpState::Runnable,
        ..CpuState::default()
    };
    s.gpr[2] = signature.into();
    s.segments[CS] = Segment {
        selector: 0xf000,
        attrs: PRESENT | S | CODE | RW | ACCESSED,
        limit: 0xffff,
        base: 0xffff_0000,
    };
    // x87 after reset: control word 0x40 by the manual's FINIT-less power-on; MXCSR 0x1f80.
    s.xsave[0..2].copy_from_slice(&0x40u16.to_le_bytes());
    s.xsave[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    // The header says that x87 and SSE state are given.
    s.xsave[512] = 3;
    s
}
