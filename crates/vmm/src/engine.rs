//! Which engine runs a machine.

use crate::config::{Accel, KvmConfig, KvmIrqchip, Tier, VmConfig};
use crate::error::VmmError;
use crate::saved::Saved;
use ringfort_base::kvm_probe::{self, KvmFitness};
use ringfort_engine::Hypervisor;
use ringfort_engine_kvm::KvmOptions;
use ringfort_engine_soft::vcpu::Tier as SoftTier;

/// Open the engine that `config` asks for. `say` gets a line that says which and why, if that was left open.
pub(crate) fn open(config: &VmConfig, say: &mut dyn FnMut(&str)) -> Result<Box<dyn Hypervisor>, VmmError> {
    match config.accel {
        Accel::Soft => soft(config.tier),
        Accel::Kvm => kvm(config),
        Accel::Auto => {
            let fitness = kvm_probe::probe();
            if let KvmFitness::Fit { .. } = fitness {
                match kvm(config) {
                    Ok(engine) => {
                        say(&format!("engine: kvm ({})", fitness_reason(&fitness)));
                        return Ok(engine);
                    }
                    Err(e) => say(&format!("engine: soft ({e})")),
                }
            } else {
                say(&format!("engine: soft ({})", fitness_reason(&fitness)));
            }
            soft(config.tier)
        }
    }
}

/// As [`open`], for a machine that was `saved`, if it was: where the engine was left open, one that its CPUs fit.
pub(crate) fn open_for(
    config: &VmConfig,
    saved: Option<&Saved>,
    say: &mut dyn FnMut(&str),
) -> Result<Box<dyn Hypervisor>, VmmError> {
    let engine = open(config, say)?;
    if let (Some(saved), Accel::Auto) = (saved, config.accel)
        && engine.name() != "soft"
        && let Err(e) = saved.cpuid(engine.name(), engine.capabilities())
    {
        say(&format!("engine: soft ({e})"));
        return soft(config.tier);
    }
    Ok(engine)
}

/// What was found out about KVM, in a few words.
fn fitness_reason(fitness: &KvmFitness) -> String {
    let millions = |speed: &f64| speed / 1e6;
    match fitness {
        KvmFitness::Fit { speed } => {
            format!("/dev/kvm runs guests at {:.0} million instructions a second", millions(speed))
        }
        KvmFitness::Slow { speed } => format!(
            "/dev/kvm is there, but only interprets guests, at {:.1} million instructions a second",
            millions(speed)
        ),
        KvmFitness::Broken { reason } => format!("/dev/kvm is there, but unfit: {reason}"),
        KvmFitness::Denied => "/dev/kvm may not be used by this user".into(),
        KvmFitness::Absent => "there is no /dev/kvm".into(),
    }
}

fn soft(tier: Tier) -> Result<Box<dyn Hypervisor>, VmmError> {
    let tier = match tier {
        Tier::Interp => SoftTier::Interpret,
        Tier::Translate => SoftTier::Translate,
    };
    let engine = ringfort_engine_soft::vcpu::open(tier).map_err(|e| VmmError::Accel(e.to_string()))?;
    Ok(Box::new(engine))
}

fn kvm(config: &VmConfig) -> Result<Box<dyn Hypervisor>, VmmError> {
    let KvmConfig { irqchip, dirty_ring, halt_poll_ns, ioeventfd, irqfd, coalesce } = config.kvm;
    let kernel_irqchip = irqchip == KvmIrqchip::Kernel;
    let options = KvmOptions {
        kernel_irqchip,
        dirty_ring,
        halt_poll_ns,
        ioeventfd,
        irqfd,
        coalesce,
        ..KvmOptions::default()
    };
    let engine = ringfort_engine_kvm::open(options).map_err(|e| VmmError::Accel(e.to_string()))?;
    Ok(Box::new(engine))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_verdict_has_a_reason_on_one_line() {
        for (fitness, says) in [
            (KvmFitness::Fit { speed: 2.5e9 }, "2500 million"),
            (KvmFitness::Slow { speed: 1.26e6 }, "1.3 million"),
            (KvmFitness::Broken { reason: "x failed".into() }, "x failed"),
            (KvmFitness::Denied, "may not be used"),
            (KvmFitness::Absent, "no /dev/kvm"),
        ] {
            let reason = fitness_reason(&fitness);
            assert!(reason.contains(says) && !reason.contains('\n'), "{reason}");
        }
    }
}
