//! `ringfort info`: the host's facts that bear on virtual machines, without judgement (that is `ringfort doctor`'s).

use ringfort_base::host::{self, Ability};
use ringfort_engine::Hypervisor as _;
use serde_json::{Value, json};
use std::io::Write as _;
use std::process::ExitCode;

/// Look and print.
pub fn run(as_json: bool) -> ExitCode {
    let facts = facts();
    let text = if as_json { format!("{facts:#}\n") } else { lines(&facts) };
    // A reader that has gone is no failure.
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
    ExitCode::SUCCESS
}

fn word(a: Ability) -> &'static str {
    match a {
        Ability::On => "on",
        Ability::Off => "off",
        Ability::Absent => "absent",
    }
}

fn facts() -> Value {
    let cpu = host::cpu();
    let memory = host::memory();
    let hardware: serde_json::Map<String, Value> = host::virtualization()
        .all()
        .into_iter()
        .map(|(id, _, name, ability)| (id.to_owned(), json!({ "name": name, "state": word(ability) })))
        .collect();
    let kvm = match ringfort_engine_kvm::open(ringfort_engine_kvm::KvmOptions::default()) {
        Err(e) => json!({ "usable": false, "reason": e.to_string() }),
        Ok(kvm) => {
            let optional: serde_json::Map<String, Value> =
                kvm.optional().into_iter().map(|(name, has)| (name.to_owned(), has.into())).collect();
            let (recommended, most) = kvm.vcpu_limits();
            json!({
                "usable": true,
                "vcpus-recommended": recommended,
                "vcpus-most": most,
                "tsc-khz": kvm.capabilities().tsc_khz,
                "abilities": optional,
            })
        }
    };
    let models: Vec<&str> = ringfort_x86::cpuid::MODELS.iter().map(|m| m.name).collect();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "cpu": { "model": cpu.model, "usable": cpu.count, "virtual-machine": cpu.virtual_machine },
        "memory": memory.total,
        "numa-nodes": host::numa_nodes(),
        "huge-pages": host::huge_page_pools().iter().map(|p| json!({ "size": p.size, "total": p.total, "free": p.free })).collect::<Vec<_>>(),
        "hardware": hardware,
        "kvm": kvm,
        "cpu-models": models,
    })
}

/// For people: a line per fact.
fn lines(facts: &Value) -> String {
    let mut out = String::new();
    let mut line = |title: &str, text: String| out += &format!("{title:<18} {text}\n");
    let text = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_owned);
    let size = |v: &Value| ringfort_vmm::config::format_size(v.as_u64().unwrap_or(0));
    let cpu = &facts["cpu"];
    let inside = if cpu["virtual-machine"] == true { ", itself a virtual machine" } else { "" };
    line("Processor", format!("{}, {} usable{inside}", text(&cpu["model"]), cpu["usable"]));
    line("Memory", size(&facts["memory"]));
    line("NUMA nodes", facts["numa-nodes"].as_array().map_or(0, Vec::len).to_string());
    for p in facts["huge-pages"].as_array().into_iter().flatten() {
        line("Huge pages", format!("{} of {}, {} free", p["total"], size(&p["size"]), p["free"]));
    }
    for id in ["cpu", "paging", "interrupts", "iommu"] {
        let h = &facts["hardware"][id];
        line(&text(&h["name"]), text(&h["state"]));
    }
    let kvm = &facts["kvm"];
    if kvm["usable"] == true {
        let list = |wanted: bool| -> String {
            let has = kvm["abilities"].as_object().into_iter().flatten();
            has.filter(|(_, v)| **v == wanted).map(|(k, _)| k.as_str()).collect::<Vec<_>>().join(" ")
        };
        line("KVM", format!("up to {} vCPUs, TSC at {} kHz", kvm["vcpus-most"], kvm["tsc-khz"]));
        line("  has", list(true));
        line("  lacks", list(false));
    } else {
        line("KVM", text(&kvm["reason"]));
    }
    let models: Vec<String> = facts["cpu-models"].as_array().into_iter().flatten().map(text).collect();
    line("CPU models", models.join(" "));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_are_told_to_people_and_programs() {
        let f = facts();
        assert!(f["memory"].as_u64().is_some_and(|m| m > 0));
        for id in ["cpu", "paging", "interrupts", "iommu"] {
            let state = f["hardware"][id]["state"].as_str().expect("a state");
            assert!(["on", "off", "absent"].contains(&state), "{state}");
        }
        let said = lines(&f);
        for title in ["Processor", "Memory", "KVM", "CPU models"] {
            assert!(said.lines().any(|l| l.starts_with(title)), "{said}");
        }
    }
}
