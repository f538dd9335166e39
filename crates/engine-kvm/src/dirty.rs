//! The log of the guest's writes: KVM's bitmaps, or a ring per vCPU, brought into the memory's trackers.

use crate::error::host;
use crate::vm::{VmShared, locked};
use kvm_bindings::{
    KVM_DIRTY_LOG_PAGE_OFFSET, KVM_MEM_LOG_DIRTY_PAGES, kvm_dirty_gfn, kvm_userspace_memory_region,
};
use ringfort_engine::EngineError;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, kvm_bindings::KVMIO, 0xc7);

/// An entry's page was written.
const DIRTY: u32 = 1;
/// It has been seen, and the entry can be used again.
const RESET: u32 = 2;

/// One vCPU's ring, mapped (Linux Documentation/virt/kvm/api.rst section 8.29).
pub(crate) struct Ring {
    entries: *mut kvm_dirty_gfn,
    count: u32,
    /// The next entry to be looked at.
    next: Mutex<u32>,
}

// SAFETY: the entries are memory shared with the kernel, changed only by atomic accesses to their flags under `next`'s lock.
unsafe impl Send for Ring {}
// SAFETY: as above.
unsafe impl Sync for Ring {}

impl Ring {
    pub(crate) fn map(vcpu: RawFd, count: u32) -> std::io::Result<Ring> {
        let length = count as usize * size_of::<kvm_dirty_gfn>();
        // SAFETY: a new mapping of the vCPU's file at an address of the kernel's choice; the kernel checks offset and length.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu,
                i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * 4096,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        Ok(Ring { entries: at.cast(), count, next: Mutex::new(0) })
    }

    /// Report each page in it to `note` (slot, page); gives how many there were.
    fn harvest(&self, mut note: impl FnMut(u32, u64)) -> u32 {
        let mut next = locked(&self.next);
        let mut found = 0;
        while found < self.count {
            // SAFETY: the index is below the count that was mapped; an entry is aligned, and its flags are only accessed atomically on
            // this side.
            let (flags, entry) = unsafe {
                let e = self.entries.add((*next % self.count) as usize);
                (AtomicU32::from_ptr(&raw mut (*e).flags), e)
            };
            if flags.load(Ordering::Acquire) & DIRTY == 0 {
                break;
            }
            // SAFETY: the kernel has written slot and offset before it set the flag, and leaves them until the entry is reset.
            let (slot, offset) = unsafe { ((*entry).slot, (*entry).offset) };
            note(slot, offset);
            flags.store(RESET, Ordering::Release);
            *next = next.wrapping_add(1);
            found += 1;
        }
        found
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let length = self.count as usize * size_of::<kvm_dirty_gfn>();
        // SAFETY: the mapping is ours, and nothing points into it any more.
        unsafe { libc::munmap(self.entries.cast(), length) };
    }
}

/// How a VM's writes are logged.
pub(crate) struct DirtyLog {
    /// Entries of each vCPU's ring; bitmaps if there are no rings.
    pub(crate) ring_entries: Option<u32>,
    rings: Mutex<Vec<Arc<Ring>>>,
    on: AtomicBool,
}

impl DirtyLog {
    pub(crate) fn new(ring_entries: Option<u32>) -> DirtyLog {
        DirtyLog { ring_entries, rings: Mutex::default(), on: AtomicBool::new(false) }
    }

    pub(crate) fn add_ring(&self, ring: Ring) {
        locked(&self.rings).push(Arc::new(ring));
    }

    pub(crate) fn set_logging(&self, vm: &VmShared, on: bool) {
        for slot in vm.ram.slots() {
            slot.tracker.set_logging(on);
        }
        if self.on.swap(on, Ordering::SeqCst) == on {
            return;
        }
        for (slot, s) in (0..).zip(vm.ram.slots()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
                guest_phys_addr: s.base,
                memory_size: s.size,
                userspace_addr: s.host as u64,
            };
            // SAFETY: the same range as when the VM was made, which stays mapped while the VM lives. Only the flag changes, which cannot
            // fail for a slot that exists, but for want of memory; then `sync` fails as well and says so.
            let _ = unsafe { vm.fd.set_user_memory_region(region) };
        }
    }

    /// Bring what KVM has logged since the last time into the trackers.
    pub(crate) fn sync(&self, vm: &VmShared) -> Result<(), EngineError> {
        if !self.on.load(Ordering::SeqCst) {
            return Ok(());
        }
        if self.ring_entries.is_some() {
            return self.sync_rings(vm);
        }
        for (slot, s) in (0..).zip(vm.ram.slots()) {
            let log = vm
                .fd
                .get_dirty_log(slot, s.size as usize)
                .map_err(host("reading the log of the guest's writes"))?;
            for (n, mut word) in (0..).zip(log) {
                while word != 0 {
                    let page = n * 64 + u64::from(word.trailing_zeros());
                    word &= word - 1;
                    if page < s.tracker.page_count() {
                        s.tracker.note_write(page);
                    }
                }
            }
        }
        Ok(())
    }

    /// Empty all rings. From any thread; a vCPU whose ring is full calls it as well.
    pub(crate) fn sync_rings(&self, vm: &VmShared) -> Result<(), EngineError> {
        let rings: Vec<Arc<Ring>> = locked(&self.rings).clone();
        let mut found = 0;
        for r in &rings {
            found += r.harvest(|slot, page| {
                if let Some(s) = vm.ram.slots().get(slot as usize)
                    && page < s.tracker.page_count()
                {
                    s.tracker.note_write(page);
                }
            });
        }
        if found != 0 {
            // SAFETY: the ioctl takes no argument and only works on the VM's rings.
            let done = unsafe { ioctl(&vm.fd, KVM_RESET_DIRTY_RINGS()) };
            if done < 0 {
                let source = std::io::Error::last_os_error();
                return Err(EngineError::Host { what: "KVM: resetting dirty rings".into(), source });
            }
        }
        Ok(())
    }

    /// A vCPU's ring is mapped from its descriptor.
    pub(crate) fn map_for(&self, vcpu: &impl AsRawFd) -> Result<(), EngineError> {
        if let Some(count) = self.ring_entries {
            let ring = Ring::map(vcpu.as_raw_fd(), count)
                .map_err(|source| EngineError::Host { what: "KVM: mapping a dirty ring".into(), source })?;
            self.add_ring(ring);
        }
        Ok(())
    }
}
