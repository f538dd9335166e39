//! The whole state of a machine in a file: what `--save` writes and `ringfort restore` reads.
//!
//! First come sections (see `ringfort_state`): one about the machine as a whole, clocks, one per vCPU and disk, and one of every device. Then
//! streams of pages: RAM, and for each throw-away disk what the guest wrote to it. A file is read to its end, every checksum included, before
//! anything of it runs; it gets its name only when it is whole.

mod check;
mod disks;
mod read;
mod show;
mod write;

pub use check::Unfit;
pub use disks::{DiskState, OpenDisk};
pub use read::Saved;
pub use ringfort_state::Compression;
pub use show::{StreamSummary, show};
pub use write::SaveTarget;

use crate::config::VmConfig;
use ringfort_engine::{CpuState, CpuidTable};
use serde::{Deserialize, Serialize};

/// Kind and newest version of the section about the machine as a whole.
const MACHINE: (&str, u32) = ("machine", 1);
/// Of the clocks.
const CLOCKS: (&str, u32) = ("clocks", 1);
/// Of a vCPU.
const VCPU: (&str, u32) = ("vcpu", 1);
/// Of a disk: how its file stands.
const DISK: (&str, u32) = ("disk", 1);
/// Name of the stream of RAM; offsets are guest physical addresses.
const RAM: &str = "ram";
/// Name of the streams of what is written to throw-away disks; the instance is the disk's number, offsets are the disk's.
const OVERLAY: &str = "overlay";

/// The machine as a whole.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct MachineState {
    /// Version of Ringfort that wrote it.
    version: String,
    /// Engine that it ran under, for people.
    engine: String,
    /// Host's wall clock, in nanoseconds since 1970.
    saved_at_ns: u64,
    /// The configuration, as JSON: its fields come and go more often than a format may change.
    config: String,
    /// UUID in the firmware tables.
    uuid: [u8; 16],
    /// Frequency of the guest's TSC, in kHz.
    tsc_khz: u32,
    /// What CPUID says on each vCPU.
    cpuid: Vec<CpuidTable>,
}

/// Clocks, all read while they stood still. The TSCs are the vCPUs'.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct ClockState {
    /// Machine time of the devices, in nanoseconds.
    machine_ns: u64,
    /// The paravirtual clock, in nanoseconds.
    paravirt_ns: u64,
}

/// A vCPU.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct VcpuState {
    apic_id: u32,
    state: CpuState,
}

/// A progress report: what is being done, bytes done, bytes in all.
pub type Progress<'a> = dyn FnMut(&'static str, u64, u64) + 'a;

impl VmConfig {
    /// The same configuration so that it means the same in any folder and under any name: paths are absolute, addresses chosen.
    #[must_use]
    pub fn settled(&self) -> VmConfig {
        let absolute = |p: &mut std::path::PathBuf| {
            if !p.as_os_str().is_empty()
                && let Ok(full) = std::path::absolute(&*p)
            {
                *p = full;
            }
        };
        let mut config = self.clone();
        for (n, nic) in config.nets.iter_mut().enumerate() {
            nic.mac = Some(nic.address(&self.name, n));
        }
        absolute(&mut config.boot.kernel);
        config.boot.initrd.as_mut().map(absolute);
        config.disks.iter_mut().for_each(|d| absolute(&mut d.path));
        for line in [&mut config.serial, &mut config.console] {
            if let crate::config::Serial::File(p) | crate::config::Serial::Unix(p) = line {
                absolute(p);
            }
        }
        config
    }
}
