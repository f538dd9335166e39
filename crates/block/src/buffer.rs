//! Memory that a running guest shares.
//!
//! The bytes of a guest's buffer can change at any time, so no Rust reference to them may exist. These types carry
//! a pointer and a length that only system calls and raw copies touch. They have the layout of `struct iovec`.

use std::marker::PhantomData;

/// Bytes to read from (the source of a disk write).
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct SharedSlice<'a> {
    iov: libc::iovec,
    _life: PhantomData<&'a [u8]>,
}

/// Bytes to write to (the target of a disk read).
#[repr(transparent)]
pub struct SharedSliceMut<'a> {
    iov: libc::iovec,
    _life: PhantomData<&'a mut [u8]>,
}

// SAFETY: the pointer stands for memory valid for 'a; whoever made it allowed concurrent access (see `from_raw`).
unsafe impl Send for SharedSlice<'_> {}
// SAFETY: as above.
unsafe impl Sync for SharedSlice<'_> {}
// SAFETY: as above.
unsafe impl Send for SharedSliceMut<'_> {}
// SAFETY: as above.
unsafe impl Sync for SharedSliceMut<'_> {}

impl<'a> SharedSlice<'a> {
    /// Ordinary memory.
    pub fn new(data: &'a [u8]) -> Self {
        SharedSlice {
            iov: libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() },
            _life: PhantomData,
        }
    }

    /// Memory that others may write to at the same time.
    ///
    /// # Safety
    /// `ptr..ptr + len` must be mapped and readable for `'a`, and must not be memory for which Rust holds a `&mut`.
    pub unsafe fn from_raw(ptr: *const u8, len: usize) -> Self {
        SharedSlice { iov: libc::iovec { iov_base: ptr.cast_mut().cast(), iov_len: len }, _life: PhantomData }
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.iov.iov_len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(crate) fn addr(&self) -> usize {
        self.iov.iov_base as usize
    }

    /// Copy to `out` as much as both hold; gives the count.
    pub fn copy_to(&self, out: &mut [u8]) -> usize {
        let n = self.len().min(out.len());
        // SAFETY: `n` bytes are valid at both; `out` is exclusive, so they cannot overlap unless the maker of this
        // slice broke its promise. A guest that writes meanwhile gives any mix of old and new bytes.
        unsafe { std::ptr::copy_nonoverlapping(self.iov.iov_base.cast::<u8>(), out.as_mut_ptr(), n) };
        n
    }

    /// The `len` bytes from `skip` on, as far as they exist.
    #[must_use]
    pub fn part(&self, skip: usize, len: usize) -> SharedSlice<'a> {
        let skip = skip.min(self.len());
        let len = len.min(self.len() - skip);
        // SAFETY: `skip + len` lies inside this slice.
        let base = unsafe { self.iov.iov_base.cast::<u8>().add(skip) };
        SharedSlice { iov: libc::iovec { iov_base: base.cast(), iov_len: len }, _life: PhantomData }
    }
}

impl<'a> SharedSliceMut<'a> {
    /// Ordinary memory.
    pub fn new(data: &'a mut [u8]) -> Self {
        SharedSliceMut {
            iov: libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() },
            _life: PhantomData,
        }
    }

    /// Memory that others may access at the same time.
    ///
    /// # Safety
    /// `ptr..ptr + len` must be mapped and writable for `'a`, and must not be memory for which Rust holds a reference.
    pub unsafe fn from_raw(ptr: *mut u8, len: usize) -> Self {
        SharedSliceMut { iov: libc::iovec { iov_base: ptr.cast(), iov_len: len }, _life: PhantomData }
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.iov.iov_len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(crate) fn addr(&self) -> usize {
        self.iov.iov_base as usize
    }

    /// Copy from `data` as much as both hold; gives the count.
    pub fn copy_from(&self, data: &[u8]) -> usize {
        let n = self.len().min(data.len());
        // SAFETY: `n` bytes are valid at both; no Rust reference to the target exists.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), self.iov.iov_base.cast::<u8>(), n) };
        n
    }

    /// Fill with zeroes.
    pub fn zero(&self) {
        // SAFETY: the whole slice is valid for writing.
        unsafe { std::ptr::write_bytes(self.iov.iov_base.cast::<u8>(), 0, self.len()) };
    }

    /// The `len` bytes from `skip` on, as far as they exist. The part and the whole name the same memory, as two
    /// guest buffers may.
    #[must_use]
    pub fn part(&self, skip: usize, len: usize) -> SharedSliceMut<'a> {
        let skip = skip.min(self.len());
        let len = len.min(self.len() - skip);
        // SAFETY: `skip + len` lies inside this slice.
        let base = unsafe { self.iov.iov_base.cast::<u8>().add(skip) };
        SharedSliceMut { iov: libc::iovec { iov_base: base.cast(), iov_len: len }, _life: PhantomData }
    }
}

/// Bytes in all of `bufs`.
pub fn total(bufs: &[SharedSlice<'_>]) -> u64 {
    bufs.iter().map(|b| b.len() as u64).sum()
}

/// Bytes in all of `bufs`.
pub fn total_mut(bufs: &[SharedSliceMut<'_>]) -> u64 {
    bufs.iter().map(|b| b.len() as u64).sum()
}

/// The pieces of `bufs` that make up `len` bytes from `skip` on.
pub fn slice_of<'a>(bufs: &[SharedSlice<'a>], skip: u64, len: u64) -> Vec<SharedSlice<'a>> {
    let (mut skip, mut left, mut out) = (skip, len, Vec::new());
    for b in bufs {
        if left == 0 {
            break;
        }
        let size = b.len() as u64;
        if skip >= size {
            skip -= size;
            continue;
        }
        let part = b.part(skip as usize, left.min(size - skip) as usize);
        left -= part.len() as u64;
        skip = 0;
        out.push(part);
    }
    out
}

/// The pieces of `bufs` that make up `len` bytes from `skip` on.
pub fn slice_of_mut<'a>(bufs: &[SharedSliceMut<'a>], skip: u64, len: u64) -> Vec<SharedSliceMut<'a>> {
    let (mut skip, mut left, mut out) = (skip, len, Vec::new());
    for b in bufs {
        if left == 0 {
            break;
        }
        let size = b.len() as u64;
        if skip >= size {
            skip -= size;
            continue;
        }
        let part = b.part(skip as usize, left.min(size - skip) as usize);
        left -= part.len() as u64;
        skip = 0;
        out.push(part);
    }
    out
}

/// Copy the bytes of `bufs` to `out`; gives the count.
pub fn gather(bufs: &[SharedSlice<'_>], out: &mut [u8]) -> usize {
    let mut done = 0;
    for b in bufs {
        done += b.copy_to(&mut out[done..]);
    }
    done
}

/// Copy `data` to `bufs`; gives the count.
pub fn scatter(bufs: &[SharedSliceMut<'_>], data: &[u8]) -> usize {
    let mut done = 0;
    for b in bufs {
        done += b.copy_from(&data[done..]);
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cross_buffers() {
        let (a, b) = ([1u8, 2, 3], [4u8, 5]);
        let bufs = [SharedSlice::new(&a), SharedSlice::new(&[]), SharedSlice::new(&b)];
        for skip in 0..7u64 {
            for len in 0..7u64 {
                let mut out = [0; 8];
                let n = gather(&slice_of(&bufs, skip, len), &mut out);
                let want: Vec<u8> =
                    [1, 2, 3, 4, 5].into_iter().skip(skip as usize).take(len as usize).collect();
                assert_eq!(&out[..n], want);
            }
        }
    }

    #[test]
    fn scatter_fills_in_order() {
        let (mut a, mut b) = ([0u8; 2], [0u8; 3]);
        let bufs = [SharedSliceMut::new(&mut a), SharedSliceMut::new(&mut b)];
        assert_eq!(scatter(&slice_of_mut(&bufs, 1, 3), &[7, 8, 9, 10]), 3);
        assert_eq!((a, b), ([0, 7], [8, 9, 0]));
    }
}
