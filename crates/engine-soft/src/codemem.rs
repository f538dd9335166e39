//! Memory for generated code.
//!
//! One private mapping that is writable and executable, on huge pages where the host has them: a second mapping of shared memory, which would
//! keep writable and executable addresses apart, is barred from huge pages on most hosts and takes a page fault on either side, which made
//! boots a tenth slower and counted all code twice. QEMU's default is the same.

use std::io;

/// Size and alignment of what the host may map as one huge page.
const HUGE: usize = 2 << 20;

/// A piece of memory for code. Unmapped when dropped.
pub struct CodeMemory {
    mapping: *mut u8,
    mapped: usize,
    /// The first byte used: aligned to [`HUGE`].
    start: *mut u8,
    size: usize,
}

// SAFETY: the pointers are to a mapping that the value owns; whoever owns it decides who writes when.
unsafe impl Send for CodeMemory {}

impl CodeMemory {
    /// Map `size` bytes (a whole number of pages), which take host memory as they are touched: where there is likely to be much code by
    /// `huge` pages.
    ///
    /// # Errors
    /// The host's.
    pub fn new(size: usize, huge: bool) -> io::Result<CodeMemory> {
        let mapped = size + HUGE;
        // SAFETY: plain system calls on a mapping of this function's own.
        unsafe {
            let mapping = libc::mmap(
                std::ptr::null_mut(),
                mapped,
                libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            );
            if mapping == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            let mapping: *mut u8 = mapping.cast();
            let start = mapping.add(mapping.align_offset(HUGE));
            // A host without huge pages serves as well.
            libc::madvise(start.cast(), size, if huge { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE });
            Ok(CodeMemory { mapping, mapped, start, size })
        }
    }

    /// Bytes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The executable address of an offset.
    pub fn address(&self, offset: usize) -> usize {
        self.start as usize + offset
    }

    /// Copy what lies at `offset`; false if that is outside.
    pub fn read(&self, offset: usize, out: &mut [u8]) -> bool {
        let inside = offset <= self.size && out.len() <= self.size - offset;
        if inside {
            // SAFETY: the range lies inside the mapping; only the owner, who is here, writes to it.
            unsafe { std::ptr::copy_nonoverlapping(self.start.add(offset), out.as_mut_ptr(), out.len()) };
        }
        inside
    }

    /// What lies at `offset`, if that is inside.
    pub fn read_array<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        self.read(offset, &mut bytes).then_some(bytes)
    }

    /// Write `bytes` at `offset`. The caller makes sure that nobody executes what is overwritten.
    ///
    /// # Panics
    /// When the range lies outside.
    pub fn write(&mut self, offset: usize, bytes: &[u8]) {
        assert!(offset <= self.size && bytes.len() <= self.size - offset, "code memory: write outside");
        // SAFETY: the range was just checked to lie inside the mapping.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.add(offset), bytes.len()) };
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nothing refers to it any more.
        unsafe { libc::munmap(self.mapping.cast(), self.mapped) };
    }
}
