//! Writing what the upper layers of a chain hold into a lower one.

use super::{Job, STEP, in_steps};
use crate::{BlockBackend, SharedSlice, SharedSliceMut};
use std::io;

/// Copy to `base` all that the `layers` topmost layers of `top` hold; `base` is the layer below them, and at least as
/// large. Afterwards `base` alone reads as `top` does.
///
/// # Errors
/// The host's, or [`io::ErrorKind::Interrupted`] when the job is cancelled. `base` may hold a part then; `top` still
/// reads as before.
pub fn commit(
    top: &dyn BlockBackend,
    layers: u32,
    base: &dyn BlockBackend,
    threads: usize,
    job: &Job<'_>,
) -> io::Result<()> {
    let size = top.size();
    in_steps(size, STEP, threads, |at, buffer| {
        let len = buffer.len() as u64;
        let (mut done, mut moved) = (0, 0);
        while done < len {
            let s = top.status(at + done, len - done)?;
            let below = s.depth >= layers || !s.present;
            if s.zero && !below {
                base.write_zeroes(at + done, s.len, true)?;
            } else if !below {
                let part = &mut buffer[..s.len as usize];
                top.read_at(&[SharedSliceMut::new(part)], at + done)?;
                base.write_at(&[SharedSlice::new(part)], at + done)?;
                moved += s.len;
            }
            done += s.len;
        }
        job.advance(len, moved)
    })?;
    base.flush()
}
