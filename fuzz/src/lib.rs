//! What the fuzz targets do, apart from libFuzzer, so that a finding can be replayed and the targets can be run on
//! random input by `cargo test` with a stable toolchain.
//!
//! A target finds a bug when it panics, overflows, takes too much memory, or does not end.
#![forbid(unsafe_code)]

mod boot;
mod cards;
mod decode;
mod disk;
mod frames;
mod network;
mod options;
mod pci;
mod queue;
mod state;

pub use boot::boot_loader;
pub use cards::{e1000e, net_services, virtio_net};
pub use decode::decoder;
pub use disk::{disk_import, disk_qcow2};
pub use frames::net_frames;
pub use network::user_network;
pub use options::options;
pub use pci::pci_config;
pub use queue::virtio_queue;
pub use state::state_file;

/// A fuzz target.
pub type Target = fn(&[u8]);

/// All of them, by name.
pub const TARGETS: [(&str, Target); 13] = [
    ("boot_loader", boot_loader),
    ("decoder", decoder),
    ("disk_import", disk_import),
    ("disk_qcow2", disk_qcow2),
    ("e1000e", e1000e),
    ("net_frames", net_frames),
    ("net_services", net_services),
    ("options", options),
    ("pci_config", pci_config),
    ("user_network", user_network),
    ("state_file", state_file),
    ("virtio_net", virtio_net),
    ("virtio_queue", virtio_queue),
];

/// Run `target` on each file named on the command line.
pub fn replay(target: Target) -> std::process::ExitCode {
    for path in std::env::args_os().skip(1) {
        match std::fs::read(&path) {
            Ok(data) => target(&data),
            Err(e) => {
                eprintln!("{}: {e}", path.display());
                return std::process::ExitCode::FAILURE;
            }
        }
    }
    std::process::ExitCode::SUCCESS
}

/// Takes values off the front of the input; zeroes when it is used up.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        let n = N.min(self.0.len());
        out[..n].copy_from_slice(&self.0[..n]);
        self.0 = &self.0[n..];
        out
    }
    fn u8(&mut self) -> u8 {
        self.bytes::<1>()[0]
    }
    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.bytes())
    }
    fn rest(self) -> &'a [u8] {
        self.0
    }
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
