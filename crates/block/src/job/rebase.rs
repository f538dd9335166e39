//! Putting an image on another backing file without changing what it reads as.

use super::{Job, STEP, copy::is_zero, in_steps};
use crate::{BlockBackend, SharedSlice, SharedSliceMut};
use std::io;

/// Write to the image `top` what it takes from `old`, its present backing disk, and what `new` does not hold at the
/// same place. Afterwards `top` reads the same on either of them. It is written in units of `unit` bytes (its cluster
/// size); `marks` says that a whole unit can be marked as zeroes.
///
/// # Errors
/// The host's, or [`io::ErrorKind::Interrupted`] when the job is cancelled. `top` reads as before in any case.
pub fn rebase(
    top: &dyn BlockBackend,
    old: Option<&dyn BlockBackend>,
    new: Option<&dyn BlockBackend>,
    (unit, marks): (u64, bool),
    threads: usize,
    job: &Job<'_>,
) -> io::Result<()> {
    in_steps(top.size(), STEP, threads, |at, buffer| {
        let len = buffer.len() as u64;
        let mut below = Vec::new();
        let (mut done, mut moved) = (0, 0);
        while done < len {
            let s = top.status(at + done, len - done)?;
            if s.depth > 0 || !s.present {
                let have = &mut buffer[..s.len as usize];
                below.resize(have.len(), 0);
                if read_to(old, have, at + done)? | read_to(new, &mut below, at + done)? {
                    moved += s.len;
                    write_differing(top, have, &below, at + done, unit as usize, marks)?;
                }
            }
            done += s.len;
        }
        job.advance(len, moved)
    })?;
    top.flush()
}

/// Fill `part` with what a disk holds, zeroes behind its end; `false` if all of it is known to be zeroes.
fn read_to(disk: Option<&dyn BlockBackend>, part: &mut [u8], at: u64) -> io::Result<bool> {
    let there = disk.map_or(0, |d| d.size().saturating_sub(at)).min(part.len() as u64);
    part[there as usize..].fill(0);
    let (mut done, mut any) = (0, false);
    while let (Some(d), true) = (disk, done < there) {
        let s = d.status(at + done, there - done)?;
        let piece = &mut part[done as usize..(done + s.len) as usize];
        if s.zero {
            piece.fill(0);
        } else {
            d.read_at(&[SharedSliceMut::new(piece)], at + done)?;
            any = true;
        }
        done += s.len;
    }
    Ok(any)
}

/// Write the units of `have` that differ from `below`.
fn write_differing(
    top: &dyn BlockBackend,
    have: &[u8],
    below: &[u8],
    at: u64,
    unit: usize,
    marks: bool,
) -> io::Result<()> {
    let mut from = 0;
    while from < have.len() {
        let start = at as usize + from;
        let to = (from + unit - start % unit).min(have.len());
        let h = &have[from..to];
        if h != &below[from..to] {
            // Parts of a unit are written as data even if they are zeroes: the image may count zeroes behind the end of
            // its present backing file as there already.
            if marks && h.len() == unit && is_zero(h) {
                top.write_zeroes(at + from as u64, h.len() as u64, false)?;
            } else {
                top.write_at(&[SharedSlice::new(h)], at + from as u64)?;
            }
        }
        from = to;
    }
    Ok(())
}
