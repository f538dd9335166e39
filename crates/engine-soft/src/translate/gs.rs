//! The GS base, by which translated code finds the vCPU. Nothing else in the process uses it: thread-local data is at FS.

use crate::cpu::Cpu;
use std::arch::asm;
use std::sync::OnceLock;

/// Whether the kernel lets processes use RDGSBASE and WRGSBASE (bit 1 of AT_HWCAP2).
fn has_instructions() -> bool {
    static HAS: OnceLock<bool> = OnceLock::new();
    // SAFETY: getauxval only reads what the kernel gave the process.
    *HAS.get_or_init(|| unsafe { libc::getauxval(libc::AT_HWCAP2) } & 2 != 0)
}

/// Let GS point to `cpu` on this thread.
#[inline]
pub fn point_to(cpu: *const Cpu) {
    let new = cpu as u64;
    if has_instructions() {
        let old: u64;
        // SAFETY: the kernel allows both, and nothing else in the process uses the GS base.
        unsafe {
            asm!("rdgsbase {}", out(reg) old, options(nomem, nostack, preserves_flags));
            if old != new {
                asm!("wrgsbase {}", in(reg) new, options(nostack, preserves_flags));
            }
        }
    } else {
        const ARCH_SET_GS: libc::c_long = 0x1001;
        // SAFETY: as above; the call changes nothing else.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, new) };
    }
}
