//! Control and debug register bits (Intel SDM 3A sections 2.5 and 17.2).

/// CR0.PE: protected mode.
pub const CR0_PE: u64 = 1 << 0;
/// CR0.MP: WAIT honours TS.
pub const CR0_MP: u64 = 1 << 1;
/// CR0.EM: x87 is to be emulated (#NM), SSE is #UD.
pub const CR0_EM: u64 = 1 << 2;
/// CR0.TS: task switched; x87 and SSE use raises #NM.
pub const CR0_TS: u64 = 1 << 3;
/// CR0.ET: always one.
pub const CR0_ET: u64 = 1 << 4;
/// CR0.NE: x87 errors raise #MF, not IRQ 13.
pub const CR0_NE: u64 = 1 << 5;
/// CR0.WP: supervisor writes honour read-only pages.
pub const CR0_WP: u64 = 1 << 16;
/// CR0.AM: alignment checks are possible.
pub const CR0_AM: u64 = 1 << 18;
/// CR0.NW: not write-through.
pub const CR0_NW: u64 = 1 << 29;
/// CR0.CD: cache disable.
pub const CR0_CD: u64 = 1 << 30;
/// CR0.PG: paging.
pub const CR0_PG: u64 = 1 << 31;
/// The bits of CR0 that exist; the others read as zero (low half) or fault (high half).
pub const CR0_VALID: u64 =
    CR0_PE | CR0_MP | CR0_EM | CR0_TS | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_NW | CR0_CD | CR0_PG;

/// CR4.VME: virtual-8086 extensions.
pub const CR4_VME: u64 = 1 << 0;
/// CR4.PVI: protected-mode virtual interrupts.
pub const CR4_PVI: u64 = 1 << 1;
/// CR4.TSD: RDTSC is privileged.
pub const CR4_TSD: u64 = 1 << 2;
/// CR4.DE: DR4 and DR5 are #UD, I/O breakpoints exist.
pub const CR4_DE: u64 = 1 << 3;
/// CR4.PSE: 4 MiB pages in 32-bit paging.
pub const CR4_PSE: u64 = 1 << 4;
/// CR4.PAE: 64-bit page-table entries.
pub const CR4_PAE: u64 = 1 << 5;
/// CR4.MCE: machine checks.
pub const CR4_MCE: u64 = 1 << 6;
/// CR4.PGE: global pages.
pub const CR4_PGE: u64 = 1 << 7;
/// CR4.PCE: RDPMC in user mode.
pub const CR4_PCE: u64 = 1 << 8;
/// CR4.OSFXSR: SSE is usable.
pub const CR4_OSFXSR: u64 = 1 << 9;
/// CR4.OSXMMEXCPT: SSE errors raise #XM, not #UD.
pub const CR4_OSXMMEXCPT: u64 = 1 << 10;
/// CR4.UMIP: SGDT and friends are privileged.
pub const CR4_UMIP: u64 = 1 << 11;
/// CR4.FSGSBASE: RDFSBASE and friends are usable.
pub const CR4_FSGSBASE: u64 = 1 << 16;
/// CR4.PCIDE: process-context identifiers.
pub const CR4_PCIDE: u64 = 1 << 17;
/// CR4.OSXSAVE: XSAVE and XCR0 are usable.
pub const CR4_OSXSAVE: u64 = 1 << 18;
/// CR4.SMEP: no supervisor execution of user pages.
pub const CR4_SMEP: u64 = 1 << 20;
/// CR4.SMAP: no supervisor access to user pages unless AC.
pub const CR4_SMAP: u64 = 1 << 21;
/// CR4.PKE: protection keys for user pages.
pub const CR4_PKE: u64 = 1 << 22;

/// EFER.SCE: SYSCALL and SYSRET are usable.
pub const EFER_SCE: u64 = 1 << 0;
/// EFER.LME: long mode when paging is enabled.
pub const EFER_LME: u64 = 1 << 8;
/// EFER.LMA: long mode is active.
pub const EFER_LMA: u64 = 1 << 10;
/// EFER.NXE: no-execute pages.
pub const EFER_NXE: u64 = 1 << 11;
/// EFER.FFXSR (AMD): fast FXSAVE.
pub const EFER_FFXSR: u64 = 1 << 14;

/// XCR0: x87 state (always set).
pub const XCR0_X87: u64 = 1 << 0;
/// XCR0: SSE state.
pub const XCR0_SSE: u64 = 1 << 1;
/// XCR0: AVX state.
pub const XCR0_AVX: u64 = 1 << 2;

/// DR6 bits that always read as one.
pub const DR6_FIXED: u64 = 0xffff_0ff0;
/// DR6.BD: a debug register was touched while DR7.GD.
pub const DR6_BD: u64 = 1 << 13;
/// DR6.BS: single step.
pub const DR6_BS: u64 = 1 << 14;
/// DR6.BT: task switch.
pub const DR6_BT: u64 = 1 << 15;
/// DR7 bit that always reads as one.
pub const DR7_FIXED: u64 = 1 << 10;
/// DR7.GD: detect use of debug registers.
pub const DR7_GD: u64 = 1 << 13;
