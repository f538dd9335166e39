//! A saved state for people.

use super::Saved;
use crate::error::VmmError;
use ringfort_engine::{CpuState, FeatureSet};
use ringfort_state::{Chunk, Section, StateError};
use serde_json::{Value, json};
use std::io::Read;
use std::path::Path;

/// Read the state in the file `path` to its end, checking all of it, and describe it as JSON. Bodies of devices' sections are shown in
/// hexadecimal, too, if `bodies`.
///
/// # Errors
/// [`VmmError::State`].
pub fn show(path: &Path, bodies: bool) -> Result<Value, VmmError> {
    let mut saved = Saved::open(path)?;
    let streams = saved.streams().map_err(|e| VmmError::State(format!("{}: {e}", path.display())))?;
    let sections: Vec<Value> = saved
        .sections
        .iter()
        .map(|s| {
            let mut v = json!({
                "kind": s.kind, "instance": s.instance, "version": s.version, "bytes": s.body.len()
            });
            match fields(s) {
                Some(Ok(state)) => v["state"] = state,
                Some(Err(e)) => v["error"] = e.to_string().into(),
                None => {}
            }
            if bodies {
                v["body"] = s.body.iter().map(|b| format!("{b:02x}")).collect::<String>().into();
            }
            v
        })
        .collect();
    let disks: Vec<Value> = saved
        .config
        .disks
        .iter()
        .zip(&saved.disks)
        .map(|(d, s)| {
            json!({
                "path": d.path, "size": s.size, "overlay": s.overlay,
                "file": s.file.map(|(len, s, ns)| json!({ "bytes": len, "modified": format!("{s}.{ns:09}") })),
            })
        })
        .collect();
    let vcpus: Vec<Value> = saved.vcpus.iter().map(|v| vcpu(v.apic_id, &v.state)).collect();
    let m = &saved.machine;
    Ok(json!({
        "format": 1,
        "version": m.version,
        "engine": m.engine,
        "saved-at": m.saved_at_ns / 1_000_000_000,
        "uuid": m.uuid.iter().map(|b| format!("{b:02x}")).collect::<String>(),
        "tsc-khz": m.tsc_khz,
        "cpu-features": m.cpuid.first().map(|t| FeatureSet::from_table(t).names()),
        "clocks": { "machine-ns": saved.clocks.machine_ns, "paravirtual-ns": saved.clocks.paravirt_ns },
        "config": saved.config,
        "disks": disks,
        "vcpus": vcpus,
        "sections": sections,
        "streams": streams,
    }))
}

/// The fields of a device's state, if its kind is known here.
fn fields(section: &Section) -> Option<Result<Value, StateError>> {
    let mut formats = ringfort_devices::FORMATS.iter().chain(&ringfort_virtio::pci::FORMATS);
    Some(formats.find(|f| f.kind == section.kind)?.describe(section))
}

/// What a stream of pages holds.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct StreamSummary {
    /// `ram` or `overlay`.
    pub name: String,
    /// Which one.
    pub instance: u32,
    /// Pieces.
    pub chunks: u64,
    /// Bytes that are there.
    pub data_bytes: u64,
    /// Bytes that are zero.
    pub zero_bytes: u64,
}

impl<R: Read> Saved<R> {
    /// Read all streams, checking them, and sum up what they hold.
    ///
    /// # Errors
    /// What is damaged.
    pub fn streams(&mut self) -> Result<Vec<StreamSummary>, StateError> {
        let mut all = Vec::new();
        while let Some((name, instance)) = self.pages.next_stream()? {
            let mut sum = StreamSummary { name, instance, chunks: 0, data_bytes: 0, zero_bytes: 0 };
            while let Some(chunk) = self.pages.next_chunk()? {
                sum.chunks += 1;
                match chunk {
                    Chunk::Data(_, b) => sum.data_bytes += b.len() as u64,
                    // Nothing says that pieces do not lie above each other.
                    Chunk::Zeroes(_, n) => sum.zero_bytes = sum.zero_bytes.saturating_add(n),
                }
            }
            all.push(sum);
        }
        Ok(all)
    }
}

fn vcpu(apic_id: u32, s: &CpuState) -> Value {
    const GPR: [&str; 16] = [
        "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
        "r14", "r15",
    ];
    const SEGMENTS: [&str; 6] = ["es", "cs", "ss", "ds", "fs", "gs"];
    let hex = |v: u64| format!("{v:#x}");
    let segment = |g: &ringfort_x86::Segment| json!({ "selector": hex(g.selector.into()), "base": hex(g.base), "limit": hex(g.limit.into()), "attributes": hex(g.attrs.into()) });
    let mut registers = serde_json::Map::new();
    for (name, v) in GPR.iter().zip(s.gpr) {
        registers.insert((*name).into(), hex(v).into());
    }
    for (name, v) in [
        ("rip", s.rip),
        ("rflags", s.rflags),
        ("cr0", s.cr0),
        ("cr2", s.cr2),
        ("cr3", s.cr3),
        ("cr4", s.cr4),
        ("cr8", s.cr8),
        ("efer", s.efer),
        ("xcr0", s.xcr0),
        ("dr0", s.dr[0]),
        ("dr1", s.dr[1]),
        ("dr2", s.dr[2]),
        ("dr3", s.dr[3]),
        ("dr6", s.dr6),
        ("dr7", s.dr7),
    ] {
        registers.insert(name.into(), hex(v).into());
    }
    let mut segments = serde_json::Map::new();
    for (name, g) in SEGMENTS.iter().zip(&s.segments).chain([(&"tr", &s.tr), (&"ldtr", &s.ldtr)]) {
        segments.insert((*name).into(), segment(g));
    }
    let table = |t: &ringfort_x86::segment::TableRegister| json!({ "base": hex(t.base), "limit": hex(t.limit.into()) });
    let msrs: serde_json::Map<String, Value> =
        s.msrs.iter().map(|(n, v)| (hex((*n).into()), hex(*v).into())).collect();
    let words: Vec<u32> =
        s.apic.as_chunks::<16>().0.iter().map(|r| u32::from_le_bytes([r[0], r[1], r[2], r[3]])).collect();
    let apic: serde_json::Map<String, Value> = words
        .iter()
        .enumerate()
        .filter(|(_, v)| **v != 0)
        .map(|(n, v)| (hex(n as u64 * 16), hex((*v).into()).into()))
        .collect();
    json!({
        "apic-id": apic_id,
        "state": s.mp_state,
        "registers": registers,
        "segments": segments,
        "gdtr": table(&s.gdtr),
        "idtr": table(&s.idtr),
        "msrs": msrs,
        "local-apic": apic,
        "events": s.events,
        "xsave-bytes": s.xsave.len(),
    })
}
