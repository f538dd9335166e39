//! Memory for generated code: the same pages mapped twice, writable (never executable) and executable (never writable).

use std::io;

/// A doubly mapped piece of memory. Unmapped when dropped.
pub struct CodeMemory {
    writable: *mut u8,
    executable: *mut u8,
    size: usize,
}

// SAFETY: the pointers are to mappings that the value owns; whoever owns it decides who writes when.
unsafe impl Send for CodeMemory {}

impl CodeMemory {
    /// Map `size` bytes (a whole number of pages), which take host memory as they are touched.
    ///
    /// # Errors
    /// The host's.
    pub fn new(size: usize) -> io::Result<CodeMemory> {
        let failed = |p: *mut libc::c_void| p == libc::MAP_FAILED;
        // SAFETY: plain system calls on mappings of this function's own; what failed is undone.
        unsafe {
            let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
            let w = libc::mmap(std::ptr::null_mut(), size, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            if failed(w) {
                return Err(io::Error::last_os_error());
            }
            // A length of 0 maps a shared mapping's pages once more (mremap(2)). Linux perf takes such memory for a JIT's.
            let x = libc::mremap(w, 0, size, libc::MREMAP_MAYMOVE);
            if !failed(x) && libc::mprotect(x, size, libc::PROT_READ | libc::PROT_EXEC) == 0 {
                return Ok(CodeMemory { writable: w.cast(), executable: x.cast(), size });
            }
            let error = io::Error::last_os_error();
            libc::munmap(w, size);
            if !failed(x) {
                libc::munmap(x, size);
            }
            Err(error)
        }
    }

    /// Bytes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The executable address of an offset.
    pub fn address(&self, offset: usize) -> usize {
        self.executable as usize + offset
    }

    /// Copy what lies at `offset`; false if that is outside.
    pub fn read(&self, offset: usize, out: &mut [u8]) -> bool {
        let inside = offset <= self.size && out.len() <= self.size - offset;
        if inside {
            // SAFETY: the range lies inside the mapping; only the owner, who is here, writes to it.
            unsafe { std::ptr::copy_nonoverlapping(self.writable.add(offset), out.as_mut_ptr(), out.len()) };
        }
        inside
    }

    /// Write `bytes` at `offset`. The caller makes sure that nobody executes what is overwritten.
    ///
    /// # Panics
    /// When the range lies outside.
    pub fn write(&mut self, offset: usize, bytes: &[u8]) {
        assert!(offset <= self.size && bytes.len() <= self.size - offset, "code memory: write outside");
        // SAFETY: the range was just checked to lie inside the writable mapping.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.writable.add(offset), bytes.len()) };
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        // SAFETY: both mappings are this value's own, and nothing refers to them any more.
        unsafe {
            libc::munmap(self.writable.cast(), self.size);
            libc::munmap(self.executable.cast(), self.size);
        }
    }
}
