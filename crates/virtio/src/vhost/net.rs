//! vhost-net: the host's kernel moves frames between a guest's queues and a tap.

use super::{Part, Vhost};
use crate::device::feature;
use ringfort_memory::{GuestMemory, RamMap};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use vhost::net::VhostNet;
use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::net::Net;

/// Mergeable receive buffers: the header that frames have, and that the tap gives, is of this form.
const F_MRG_RXBUF: u64 = 1 << 15;

/// A pair of queues, and the tap's descriptor for it.
pub struct KernelNet {
    net: Net<Arc<GuestMemory>>,
    tap: File,
}

impl AsRawFd for KernelNet {
    fn as_raw_fd(&self) -> RawFd {
        self.net.as_raw_fd()
    }
}

impl VhostKernBackend for KernelNet {
    type AS = Arc<GuestMemory>;

    fn mem(&self) -> &Self::AS {
        self.net.mem()
    }
}

impl Part for KernelNet {
    fn queues(&self) -> usize {
        2
    }

    fn run(&self, n: usize, on: bool) -> vhost::Result<()> {
        self.net.set_backend(n, on.then_some(&self.tap))
    }
}

/// The host's vhost-net for a tap whose queues are these.
///
/// # Errors
/// In one line: there is none, it may not be opened, or it is older than what devices here offer.
pub fn open(
    taps: &[BorrowedFd<'_>],
    memory: &GuestMemory,
    ram: &Arc<RamMap>,
) -> Result<Vhost<KernelNet>, String> {
    let part = |tap: &BorrowedFd<'_>| -> io::Result<KernelNet> {
        let tap = File::from(tap.try_clone_to_owned()?);
        let net = Net::new(Arc::new(memory.clone())).map_err(|e| match e {
            vhost::Error::VhostOpen(e) => e,
            e => io::Error::other(e.to_string()),
        })?;
        Ok(KernelNet { net, tap })
    };
    let told = |e: io::Error| format!("/dev/vhost-net: {e}");
    let parts = taps.iter().map(part).collect::<io::Result<Vec<_>>>().map_err(told)?;
    let vhost = Vhost::new(parts, ram.clone()).map_err(told)?;
    let missing = (feature::COMMON | F_MRG_RXBUF) & !vhost.features().map_err(told)?;
    if missing != 0 {
        return Err(format!("/dev/vhost-net: lacks features {missing:#x}"));
    }
    Ok(vhost)
}
