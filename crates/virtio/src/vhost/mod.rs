//! Queues served over the vhost protocol (Linux include/uapi/linux/vhost.h). A back end is anything that speaks it ([`VhostBackend`]): the host's
//! kernel here, and a process behind a vhost-user socket, whose front end in the crate `vhost` has the same trait.

mod net;

pub use net::{KernelNet, open as open_net};

use crate::served::{QueueServer, ServedQueue};
use ringfort_bus::lock;
use ringfort_memory::{RamMap, RamSlot};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};

/// One end of the protocol, which serves some of a device's queues in their order: all, or a pair of them.
pub trait Part: VhostBackend + Send + Sync {
    /// Queues of a part.
    fn queues(&self) -> usize;

    /// Begin to serve its queue `n`, whose rings are set up, or end.
    ///
    /// # Errors
    /// As the protocol's calls.
    fn run(&self, n: usize, on: bool) -> vhost::Result<()>;
}

/// A device's queues, by one or several parts.
pub struct Vhost<P> {
    parts: Vec<P>,
    ram: Arc<RamMap>,
    running: Mutex<Vec<u16>>,
    /// The cable is plugged in.
    link: AtomicBool,
}

fn words(what: &'static str) -> impl Fn(vhost::Error) -> io::Error {
    move |e| io::Error::other(format!("{what}: {e}"))
}

/// Guest RAM as the protocol has it. A process of its own maps it by descriptor, which takes memory that is shared (`shared=on`); the
/// kernel goes by addresses.
fn regions(ram: &RamMap) -> Vec<VhostUserMemoryRegionInfo> {
    let region = |s: &RamSlot| {
        let (mmap_handle, mmap_offset) = s.file.unwrap_or((-1, 0));
        VhostUserMemoryRegionInfo {
            guest_phys_addr: s.base,
            memory_size: s.size,
            userspace_addr: s.host.addr() as u64,
            mmap_offset,
            mmap_handle,
        }
    };
    ram.slots().iter().map(region).collect()
}

impl<P: Part> Vhost<P> {
    /// Parts that serve queues in their order, and have this memory for it.
    ///
    /// # Errors
    /// The host's, in words.
    pub fn new(parts: Vec<P>, ram: Arc<RamMap>) -> io::Result<Vhost<P>> {
        let regions = regions(&ram);
        for p in &parts {
            p.set_owner().map_err(words("taking a vhost device"))?;
            p.set_mem_table(&regions).map_err(words("giving memory to vhost"))?;
        }
        Ok(Vhost { parts, ram, running: Mutex::default(), link: AtomicBool::new(true) })
    }

    /// The features that every part has.
    ///
    /// # Errors
    /// The host's, in words.
    pub fn features(&self) -> io::Result<u64> {
        self.parts.iter().try_fold(u64::MAX, |all, p| {
            Ok(all & p.get_features().map_err(words("asking vhost for its features"))?)
        })
    }

    /// The part that has a queue, and the queue's number there.
    fn of(&self, queue: u16) -> Option<(&P, usize)> {
        let mut n = usize::from(queue);
        for p in &self.parts {
            if n < p.queues() {
                return Some((p, n));
            }
            n -= p.queues();
        }
        None
    }

    fn begin(&self, q: &ServedQueue<'_>) -> vhost::Result<()> {
        let (p, n) = self.of(q.index).ok_or(vhost::Error::InvalidQueue)?;
        p.set_vring_num(n, q.size)?;
        p.set_vring_addr(
            n,
            &VringConfigData {
                queue_max_size: q.size,
                queue_size: q.size,
                flags: 0,
                desc_table_addr: q.desc,
                used_ring_addr: q.used,
                avail_ring_addr: q.avail,
                log_addr: None,
            },
        )?;
        p.set_vring_base(n, q.next_avail)?;
        p.set_vring_kick(n, q.kick)?;
        p.set_vring_call(n, q.call)?;
        if self.link.load(Ordering::SeqCst) { p.run(n, true) } else { Ok(()) }
    }
}

impl<P: Part> QueueServer for Vhost<P> {
    fn start(&self, features: u64, queues: &[ServedQueue<'_>]) -> io::Result<()> {
        let can = self.features()?;
        for p in &self.parts {
            p.set_features(features & can).map_err(words("agreeing on features with vhost"))?;
        }
        for q in queues {
            let mut running = lock(&self.running);
            if let Err(e) = self.begin(q) {
                drop(running);
                self.stop();
                return Err(words("giving a queue to vhost")(e));
            }
            running.push(q.index);
        }
        Ok(())
    }

    fn stop(&self) -> Vec<(u16, u16)> {
        let running = std::mem::take(&mut *lock(&self.running));
        let mut reached = Vec::new();
        for index in running {
            let Some((p, n)) = self.of(index) else { continue };
            // A part that is gone has served nothing further.
            let _ = p.run(n, false);
            if let Ok(base) = p.get_vring_base(n) {
                reached.push((index, base as u16));
            }
        }
        // What was written meanwhile is not known page by page.
        for s in self.ram.slots().iter().filter(|s| s.tracker.logging()) {
            (0..s.tracker.page_count()).for_each(|page| _ = s.tracker.note_write(page));
        }
        reached
    }

    fn set_link(&self, up: bool) {
        // Under the lock nobody begins or ends meanwhile.
        let running = lock(&self.running);
        if self.link.swap(up, Ordering::SeqCst) == up {
            return;
        }
        for (p, n) in running.iter().filter_map(|&q| self.of(q)) {
            // A part that does not take it up again has lost its network; the driver sees silence, as on a dead cable.
            let _ = p.run(n, up);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringfort_memory::{Backing, Bytes, GuestAddress, allocate_with};
    use std::os::fd::BorrowedFd;
    use std::os::unix::fs::FileExt;

    #[test]
    fn memory_is_passed_on_by_descriptor_when_others_can_map_it() {
        const RAM: [(u64, u64); 2] = [(0, 1 << 20), (1 << 32, 2 << 20)];
        for shared in [true, false] {
            let memory = allocate_with(&RAM, &Backing { shared, ..Backing::default() }).unwrap();
            memory.write_slice(b"here", GuestAddress((1 << 32) + 5000)).unwrap();
            let regions = regions(&RamMap::new(&memory));
            let places: Vec<_> = regions.iter().map(|r| (r.guest_phys_addr, r.memory_size)).collect();
            assert_eq!(places, RAM);
            assert!(regions.iter().all(|r| (r.mmap_handle >= 0) == shared));
            if shared {
                let mut b = [0; 4];
                // SAFETY: the descriptor is open while the memory lives.
                let fd = unsafe { BorrowedFd::borrow_raw(regions[1].mmap_handle) };
                let file = std::fs::File::from(fd.try_clone_to_owned().unwrap());
                file.read_exact_at(&mut b, regions[1].mmap_offset + 5000).unwrap();
                assert_eq!(&b, b"here");
            }
        }
    }
}
