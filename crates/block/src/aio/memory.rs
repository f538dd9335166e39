//! A buffer of the process's own for requests.

use super::Payload;
use crate::{SharedSlice, SharedSliceMut};
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::io;

/// Alignment that direct I/O is content with everywhere.
const ALIGN: usize = 4096;

/// Page-aligned bytes, zeroes at first.
pub struct Memory {
    ptr: *mut u8,
    len: usize,
    layout: Layout,
}

// SAFETY: it owns its allocation.
unsafe impl Send for Memory {}

impl Memory {
    /// `len` bytes.
    ///
    /// # Errors
    /// [`io::ErrorKind::OutOfMemory`].
    pub fn new(len: usize) -> io::Result<Memory> {
        let layout = Layout::from_size_align(len.max(1), ALIGN).map_err(|_| io::ErrorKind::OutOfMemory)?;
        // SAFETY: the layout's size is not zero.
        let ptr = unsafe { alloc_zeroed(layout) };
        if ptr.is_null() {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        Ok(Memory { ptr, len, layout })
    }

    /// The bytes.
    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: initialised, of this size, and borrowed through `self`, which no request has now.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.len) }
    }
}

impl Payload for Memory {
    fn targets(&self) -> Vec<SharedSliceMut<'_>> {
        // SAFETY: the allocation lives as long as `self`, and is only named by `&mut self` otherwise.
        vec![unsafe { SharedSliceMut::from_raw(self.ptr, self.len) }]
    }

    fn sources(&self) -> Vec<SharedSlice<'_>> {
        // SAFETY: as above.
        vec![unsafe { SharedSlice::from_raw(self.ptr, self.len) }]
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.ptr, self.layout) };
    }
}
