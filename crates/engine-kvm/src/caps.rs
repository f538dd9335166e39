//! What KVM must be able to do.

use crate::error::unavailable;
use kvm_ioctls::Cap;
use ringfort_engine::EngineError;

/// The capabilities without which no guest is run, and what each is for (Linux Documentation/virt/kvm/api.rst).
pub const REQUIRED: [(Cap, &str); 12] = [
    (Cap::UserMemory, "guest memory"),
    (Cap::Irqchip, "local APICs in the kernel"),
    (Cap::SplitIrqchip, "I/O APIC and 8259 outside of the kernel"),
    (Cap::IrqRouting, "routes of interrupts"),
    (Cap::SignalMsi, "message-signalled interrupts"),
    (Cap::ExtCpuid, "CPU models"),
    (Cap::MpState, "start of application processors"),
    (Cap::VcpuEvents, "state of pending events"),
    (Cap::Debugregs, "debug registers"),
    (Cap::AdjustClock, "the paravirtual clock"),
    (Cap::ImmediateExit, "pausing without lost signals"),
    (Cap::SetTssAddr, "real mode on Intel CPUs"),
];

/// A capability that is missing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lacking {
    /// Its name in the kernel's API.
    pub name: String,
    /// What it is for.
    pub what_for: &'static str,
}

/// Those of [`REQUIRED`] that `has` denies.
pub fn lacking(has: impl Fn(Cap) -> bool) -> Vec<Lacking> {
    REQUIRED
        .iter()
        .filter(|(cap, _)| !has(*cap))
        .map(|&(cap, what_for)| Lacking { name: constant(cap), what_for })
        .collect()
}

/// `KVM_CAP_…` of a capability.
fn constant(cap: Cap) -> String {
    let mut name = String::from("KVM_CAP");
    for c in format!("{cap:?}").chars() {
        if c.is_uppercase() {
            name.push('_');
        }
        name.push(c.to_ascii_uppercase());
    }
    name
}

/// Refuse a KVM that lacks something.
pub(crate) fn check(has: impl Fn(Cap) -> bool) -> Result<(), EngineError> {
    let missing = lacking(has);
    if missing.is_empty() {
        return Ok(());
    }
    let list: Vec<String> = missing.iter().map(|l| format!("{} ({})", l.name, l.what_for)).collect();
    Err(unavailable(format!(
        "the host's KVM lacks {}; Linux 4.12 or newer has it; give --accel soft",
        list.join(", ")
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_with_its_purpose() {
        assert_eq!(check(|_| true).map_err(|e| e.to_string()), Ok(()));
        let e = check(|c| !matches!(c, Cap::SplitIrqchip | Cap::SignalMsi)).unwrap_err().to_string();
        assert!(e.contains("KVM_CAP_SPLIT_IRQCHIP (I/O APIC"), "{e}");
        assert!(e.contains("KVM_CAP_SIGNAL_MSI (message"), "{e}");
        assert!(!e.contains("MP_STATE"), "{e}");
        assert_eq!(lacking(|_| false).len(), REQUIRED.len());
    }
}
