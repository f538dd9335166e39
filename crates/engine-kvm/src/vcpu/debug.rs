//! Debugging: single steps, breakpoints and watchpoints.

use super::KvmVcpu;
use crate::error::host;
use kvm_bindings::{
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP,
    kvm_debug_exit_arch, kvm_guest_debug,
};
use ringfort_engine::{DebugRequest, DebugStop, DebugVcpu, EngineError, WatchKind};

/// Debug registers for breakpoints.
const WATCHES: usize = 4;
/// DR6: BS.
const DR6_STEP: u64 = 1 << 14;
/// DR7: bit 10 is one; LE and GE, which old CPUs want for data breakpoints.
const DR7_BASE: u64 = 1 << 10 | 3 << 8;

impl KvmVcpu {
    /// What a debug exit means. `None` for one that nobody asked for: the run goes on.
    pub(super) fn debug_stop(&mut self, arch: &kvm_debug_exit_arch) -> Option<DebugStop> {
        if arch.exception == 3 {
            return self.debug.software.then_some(DebugStop::Software);
        }
        let hit = (0..self.debug.watches.len()).find(|n| arch.dr6 >> n & 1 != 0);
        match hit {
            Some(n) => Some(DebugStop::Watch(n)),
            None if self.debug.step || arch.dr6 & DR6_STEP != 0 => Some(DebugStop::Step),
            None => None,
        }
    }
}

/// DR0 to DR3 and DR7 for these watches (Intel SDM 3B section 18.2.4), as KVM wants them.
fn registers(request: &DebugRequest) -> Result<[u64; 8], EngineError> {
    if request.watches.len() > WATCHES {
        return Err(EngineError::Internal(format!(
            "{} watches; there are {WATCHES} debug registers",
            request.watches.len()
        )));
    }
    let mut regs = [0; 8];
    regs[7] = DR7_BASE;
    for (n, w) in request.watches.iter().enumerate() {
        let len = match (w.kind, w.len) {
            (WatchKind::Execute, 1) | (WatchKind::Write | WatchKind::Access, 1) => 0,
            (WatchKind::Write | WatchKind::Access, 2) => 1,
            (WatchKind::Write | WatchKind::Access, 4) => 3,
            (WatchKind::Write | WatchKind::Access, 8) => 2,
            (_, len) => {
                return Err(EngineError::Internal(format!("a watch of {len} bytes at {:#x}", w.address)));
            }
        };
        if !w.address.is_multiple_of(u64::from(w.len)) {
            return Err(EngineError::Internal(format!("a watch of {} bytes at {:#x}", w.len, w.address)));
        }
        let kind = match w.kind {
            WatchKind::Execute => 0,
            WatchKind::Write => 1,
            WatchKind::Access => 3,
        };
        regs[n] = w.address;
        regs[7] |= 2 << (2 * n) | (kind | len << 2) << (16 + 4 * n);
    }
    Ok(regs)
}

impl DebugVcpu for KvmVcpu {
    fn max_watches(&self) -> usize {
        WATCHES
    }

    fn set_debug(&mut self, request: &DebugRequest) -> Result<(), EngineError> {
        let mut d = kvm_guest_debug::default();
        d.arch.debugreg = registers(request)?;
        let flag = |on: bool, bit: u32| if on { bit } else { 0 };
        d.control = flag(request.step, KVM_GUESTDBG_SINGLESTEP)
            | flag(request.software, KVM_GUESTDBG_USE_SW_BP)
            | flag(!request.watches.is_empty(), KVM_GUESTDBG_USE_HW_BP);
        if d.control != 0 {
            d.control |= KVM_GUESTDBG_ENABLE;
        }
        self.fd.set_guest_debug(&d).map_err(host("setting up debugging"))?;
        self.debug = request.clone();
        Ok(())
    }

    fn translate(&mut self, address: u64) -> Result<Option<u64>, EngineError> {
        let t = self.fd.translate_gva(address).map_err(host("translating an address"))?;
        Ok((t.valid != 0).then_some(t.physical_address))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringfort_engine::Watch;

    fn request(watches: &[(WatchKind, u64, u8)]) -> DebugRequest {
        let watches = watches.iter().map(|&(kind, address, len)| Watch { kind, address, len }).collect();
        DebugRequest { watches, ..DebugRequest::default() }
    }

    #[test]
    fn debug_registers_by_the_manual() {
        let r = registers(&request(&[
            (WatchKind::Execute, 0x1003, 1),
            (WatchKind::Write, 0x2000, 8),
            (WatchKind::Access, 0x3004, 4),
        ]))
        .unwrap();
        assert_eq!(r[..4], [0x1003, 0x2000, 0x3004, 0]);
        // G0 to G2; R/W and LEN: 00 00, 01 10, 11 11.
        assert_eq!(r[7], 0x700 | 0b10_10_10 | 0b1001 << 20 | 0b1111 << 24);
        for bad in [
            request(&[(WatchKind::Write, 0x2001, 2)]),
            request(&[(WatchKind::Execute, 0x2000, 4)]),
            request(&[(WatchKind::Write, 0x2000, 3)]),
            request(&[(WatchKind::Write, 0, 1); 5]),
        ] {
            assert!(registers(&bad).is_err(), "{bad:?}");
        }
    }
}
