//! Memory for generated code: one memfd mapped twice, writable (never executable) and executable (never writable).

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
        // SAFETY: plain system calls; the name is NUL-terminated, and failed mappings are undone.
        unsafe {
            let fd = libc::memfd_create(c"ringfort-code".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            let map = |prot| libc::mmap(std::ptr::null_mut(), size, prot, libc::MAP_SHARED, fd, 0);
            let sized = libc::ftruncate(fd, size as libc::off_t);
            let w = map(libc::PROT_READ | libc::PROT_WRITE);
            let x = map(libc::PROT_READ | libc::PROT_EXEC);
            let error = io::Error::last_os_error();
            libc::close(fd);
            if sized == 0 && w != libc::MAP_FAILED && x != libc::MAP_FAILED {
                return Ok(CodeMemory { writable: w.cast(), executable: x.cast(), size });
            }
            for p in [w, x] {
                if p != libc::MAP_FAILED {
                    libc::munmap(p, size);
                }
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
