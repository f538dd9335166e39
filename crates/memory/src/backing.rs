//! What guest RAM is made of on the host: page sizes, sharing, placement on NUMA nodes, and what the kernel may do with it.

use crate::{GuestMemory, MemoryError, PAGE_SIZE, PageTracker};
use std::fs::File;
use std::os::fd::FromRawFd;
use std::path::PathBuf;
use vm_memory::bitmap::NewBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap};

/// How pages are spread over NUMA nodes (set_mempolicy(2)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NodePolicy {
    /// From these nodes only.
    #[default]
    Bind,
    /// From the first of these nodes while it has some.
    Preferred,
    /// From these nodes in turns.
    Interleave,
}

/// What RAM is made of. The default is private anonymous memory that gets transparent huge pages where the host has them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// Page size from the host's pool of huge pages, in bytes; small pages if not given.
    pub huge_pages: Option<u64>,
    /// A memory file that other processes can map, instead of memory of this process alone.
    pub shared: bool,
    /// Take all pages from the host now.
    pub prealloc: bool,
    /// NUMA nodes of the host; anywhere if empty.
    pub nodes: Vec<u32>,
    /// How pages are spread over them.
    pub policy: NodePolicy,
    /// Let the kernel merge equal pages (KSM).
    pub merge: bool,
    /// Let the kernel use transparent huge pages.
    pub transparent: bool,
}

impl Default for Backing {
    fn default() -> Backing {
        Backing {
            huge_pages: None,
            shared: false,
            prealloc: false,
            nodes: Vec::new(),
            policy: NodePolicy::default(),
            merge: false,
            transparent: true,
        }
    }
}

/// A page size as the kernel's folder of its pool names it.
fn pool(size: u64) -> PathBuf {
    format!("/sys/kernel/mm/hugepages/hugepages-{}kB", size >> 10).into()
}

/// Free pages of a pool, or `None` if the host has no pages of that size.
fn free_pages(size: u64) -> Option<u64> {
    std::fs::read_to_string(pool(size).join("free_hugepages")).ok()?.trim().parse().ok()
}

fn human(bytes: u64) -> String {
    match bytes {
        b if b.is_multiple_of(1 << 30) => format!("{}G", b >> 30),
        b if b.is_multiple_of(1 << 20) => format!("{}M", b >> 20),
        b => format!("{}K", b >> 10),
    }
}

impl Backing {
    /// Check what can be told before anything is allocated.
    fn check(&self, layout: &[(u64, u64)]) -> Result<(), MemoryError> {
        let Some(size) = self.huge_pages else { return Ok(()) };
        let fail = |what: String| Err(MemoryError::Backing(what));
        let Some(free) = free_pages(size) else {
            return fail(format!("this host has no huge pages of {}; 2M is usual", human(size)));
        };
        if let Some(&(base, bytes)) = layout.iter().find(|r| !(r.0 | r.1).is_multiple_of(size)) {
            return fail(format!(
                "{} of RAM at {base:#x} is no whole number of {} pages; give a size that is",
                human(bytes),
                human(size)
            ));
        }
        let wanted = layout.iter().map(|r| r.1).sum::<u64>() / size;
        if wanted > free {
            return fail(format!(
                "{wanted} huge pages of {} are needed and {free} are free; ask the host for more: \
                 echo {wanted} > {}/nr_hugepages",
                human(size),
                pool(size).display()
            ));
        }
        Ok(())
    }

    fn map(&self, base: u64, size: u64) -> Result<GuestRegionMmap<PageTracker>, MemoryError> {
        let fail = |reason: String| MemoryError::Allocate { base, size, reason };
        let length = usize::try_from(size).map_err(|e| fail(e.to_string()))?;
        // The page size's logarithm lies in the upper bits of the flags (mmap(2), memfd_create(2)).
        let log = self.huge_pages.map_or(0, |p| p.trailing_zeros() as i32);
        let mut builder = MmapRegionBuilder::new_with_bitmap(length, PageTracker::with_len(length))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
        if self.shared {
            let mut flags = libc::MFD_CLOEXEC;
            if self.huge_pages.is_some() {
                flags |= libc::MFD_HUGETLB | (log as u32) << libc::MAP_HUGE_SHIFT;
            }
            // SAFETY: the name is a C string; the kernel gives a new descriptor or an error.
            let fd = unsafe { libc::memfd_create(c"guest-ram".as_ptr(), flags) };
            if fd < 0 {
                return Err(fail(std::io::Error::last_os_error().to_string()));
            }
            // SAFETY: the descriptor is new and nobody else's.
            let file = unsafe { File::from_raw_fd(fd) };
            file.set_len(size).map_err(|e| fail(e.to_string()))?;
            // Pages of the pool are reserved by the mapping: a guest's store shall not find the pool empty.
            let reserve = if self.huge_pages.is_some() { 0 } else { libc::MAP_NORESERVE };
            builder = builder
                .with_mmap_flags(libc::MAP_SHARED | reserve)
                .with_file_offset(FileOffset::new(file, 0));
        } else {
            let huge = if self.huge_pages.is_some() {
                libc::MAP_HUGETLB | log << libc::MAP_HUGE_SHIFT
            } else {
                libc::MAP_NORESERVE
            };
            builder = builder.with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | huge);
        }
        if self.huge_pages.is_some() {
            builder = builder.with_hugetlbfs(true);
        }
        let region = builder.build().map_err(|e| fail(e.to_string()))?;
        self.place(region.as_ptr(), length).map_err(|e| fail(e.to_string()))?;
        GuestRegionMmap::new(region, GuestAddress(base))
            .ok_or_else(|| fail("beyond the address space".into()))
    }

    /// Advise and place a new mapping, and fill it if that is asked for.
    fn place(&self, at: *mut u8, length: usize) -> Result<(), MemoryError> {
        let advise = |advice: libc::c_int| {
            // SAFETY: the range is exactly one live mapping of guest RAM, and none of these advices changes its content.
            if unsafe { libc::madvise(at.cast(), length, advice) } == 0 {
                Ok(())
            } else {
                Err(std::io::Error::last_os_error())
            }
        };
        if self.huge_pages.is_none() {
            // A host without transparent huge pages refuses, which changes nothing.
            let _ = advise(if self.transparent { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE });
        }
        if self.merge {
            advise(libc::MADV_MERGEABLE).map_err(|e| {
                MemoryError::Backing(format!(
                    "merge=on: the host's kernel cannot merge pages ({e}); leave it out"
                ))
            })?;
        }
        if !self.nodes.is_empty() {
            self.bind(at, length)?;
        }
        if self.prealloc {
            advise(libc::MADV_POPULATE_WRITE).map_err(|e| {
                let hint = match e.raw_os_error() {
                    Some(libc::EINVAL) => "this needs Linux 5.14",
                    _ => "free some memory, or leave it out",
                };
                MemoryError::Backing(format!("prealloc=on: {e}; {hint}"))
            })?;
        }
        Ok(())
    }

    fn bind(&self, at: *mut u8, length: usize) -> Result<(), MemoryError> {
        let mut mask = [0u64; 16];
        for &n in &self.nodes {
            let word = mask.get_mut(n as usize / 64).ok_or_else(|| no_node(n))?;
            *word |= 1 << (n % 64);
        }
        if let Some(&missing) =
            self.nodes.iter().find(|n| !PathBuf::from(format!("/sys/devices/system/node/node{n}")).exists())
        {
            return Err(no_node(missing));
        }
        let mode = match self.policy {
            NodePolicy::Bind => libc::MPOL_BIND,
            NodePolicy::Preferred => libc::MPOL_PREFERRED,
            NodePolicy::Interleave => libc::MPOL_INTERLEAVE,
        };
        // The kernel looks at one bit less than it is told.
        let bits = mask.len() as libc::c_ulong * 64 + 1;
        // SAFETY: the range is one live mapping, and the mask has as many bits as are announced.
        let done = unsafe {
            libc::syscall(libc::SYS_mbind, at, length, mode, mask.as_ptr(), bits, 0 as libc::c_uint)
        };
        if done == 0 {
            return Ok(());
        }
        let e = std::io::Error::last_os_error();
        Err(MemoryError::Backing(format!("the host does not place memory on its nodes: {e}; leave node out")))
    }
}

fn no_node(n: u32) -> MemoryError {
    MemoryError::Backing(format!(
        "node={n}: this host has no such NUMA node; /sys/devices/system/node lists them"
    ))
}

/// Allocate RAM for the given (guest physical base, size in bytes) pairs, in ascending order.
///
/// # Errors
/// [`MemoryError`]; nothing stays allocated.
pub fn allocate_with(layout: &[(u64, u64)], backing: &Backing) -> Result<GuestMemory, MemoryError> {
    for &(base, size) in layout {
        if size == 0 || size % PAGE_SIZE != 0 || base % PAGE_SIZE != 0 {
            return Err(MemoryError::Layout(format!("{base:#x}+{size:#x} is not a whole number of pages")));
        }
    }
    backing.check(layout)?;
    let regions =
        layout.iter().map(|&(base, size)| backing.map(base, size)).collect::<Result<Vec<_>, _>>()?;
    GuestMemory::from_regions(regions).map_err(|e| MemoryError::Layout(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

    const MIB: u64 = 1 << 20;

    fn works(backing: &Backing) -> GuestMemory {
        let m =
            allocate_with(&[(0, 2 * MIB), (16 * MIB, 4 * MIB)], backing).unwrap_or_else(|e| panic!("{e}"));
        m.write_obj(0x1234_5678u32, GuestAddress(16 * MIB + 5000)).unwrap();
        assert_eq!(m.read_obj::<u32>(GuestAddress(16 * MIB + 5000)).unwrap(), 0x1234_5678);
        assert_eq!(m.read_obj::<u64>(GuestAddress(8)).unwrap(), 0);
        m
    }

    #[test]
    fn shared_memory_is_a_file_that_others_can_map() {
        let m = works(&Backing { shared: true, ..Backing::default() });
        let region = m.iter().nth(1).unwrap();
        let file = region.file_offset().expect("a file");
        assert_eq!(file.file().metadata().unwrap().len(), 4 * MIB);
        let mut b = [0; 4];
        std::os::unix::fs::FileExt::read_exact_at(file.file(), &mut b, 5000).unwrap();
        assert_eq!(u32::from_le_bytes(b), 0x1234_5678);
        assert!(works(&Backing::default()).iter().all(|r| r.file_offset().is_none()));
    }

    #[test]
    fn preallocated_pages_are_there() {
        for shared in [false, true] {
            let m = works(&Backing { prealloc: true, transparent: false, shared, ..Backing::default() });
            let map = crate::RamMap::new(&m);
            for slot in map.slots() {
                let mut resident = vec![0u8; (slot.size / PAGE_SIZE) as usize];
                // SAFETY: the range is a live mapping, and the vector has a byte for each of its pages.
                let done =
                    unsafe { libc::mincore(slot.host.cast(), slot.size as usize, resident.as_mut_ptr()) };
                assert_eq!(done, 0);
                assert!(resident.iter().all(|r| r & 1 != 0));
            }
        }
    }

    #[test]
    fn nodes_are_obeyed_or_refused() {
        let backing = |nodes: &[u32]| Backing { nodes: nodes.into(), ..Backing::default() };
        for missing in [777, 5000] {
            let e = allocate_with(&[(0, MIB)], &backing(&[missing])).unwrap_err().to_string();
            assert!(e.contains(&format!("node={missing}")), "{e}");
        }
        if !PathBuf::from("/sys/devices/system/node/node0").exists() {
            println!("skipped: this host tells of no NUMA nodes");
            return;
        }
        for policy in [NodePolicy::Bind, NodePolicy::Preferred, NodePolicy::Interleave] {
            match allocate_with(&[(0, MIB)], &Backing { policy, ..backing(&[0]) }) {
                Ok(_) => {}
                Err(e) => assert!(e.to_string().contains("does not place memory"), "{e}"),
            }
        }
    }

    #[test]
    fn huge_pages_are_used_or_asked_for() {
        let backing = |size| Backing { huge_pages: Some(size), ..Backing::default() };
        let e = allocate_with(&[(0, 4 * MIB)], &backing(1 << 40)).unwrap_err().to_string();
        assert!(e.contains("no huge pages of 1024G"), "{e}");
        let Some(free) = free_pages(2 * MIB) else {
            println!("skipped: this host has no huge pages of 2M");
            return;
        };
        let e = allocate_with(&[(0, 3 * MIB)], &backing(2 * MIB)).unwrap_err().to_string();
        assert!(e.contains("no whole number of 2M pages"), "{e}");
        let e = allocate_with(&[(0, (free + 1) * 2 * MIB)], &backing(2 * MIB)).unwrap_err().to_string();
        assert!(e.contains("nr_hugepages"), "{e}");
        if free < 4 {
            println!("skipped in part: this host has {free} huge pages free");
            return;
        }
        for shared in [false, true] {
            works(&Backing { shared, prealloc: true, ..backing(2 * MIB) });
        }
    }
}
