//! Copying a disk into another one.

use super::relay::relay;
use super::{Job, STEP, in_some_steps};
use crate::format::Qcow2;
use crate::{BlockBackend, SharedSlice, SharedSliceMut};
use std::io;
use std::sync::Mutex;

/// Where a copy goes.
#[derive(Clone, Copy)]
pub enum Target<'a> {
    /// A disk.
    Plain(&'a dyn BlockBackend),
    /// A new image whose clusters are stored compressed.
    Packed(&'a Qcow2),
}

impl<'a> Target<'a> {
    fn disk(self) -> &'a dyn BlockBackend {
        match self {
            Target::Plain(d) => d,
            Target::Packed(q) => q,
        }
    }
}

/// How to copy.
#[derive(Clone, Copy)]
pub struct CopyOptions<'a> {
    /// Runs of zeroes of at least this many bytes are not written as data; 0 writes all.
    pub sparse: u64,
    /// The target reads as zeroes before, so that zeroes need no write at all.
    pub blank: bool,
    /// The target has a backing file of that many bytes with the content of what lies below the source's top layer: up
    /// to there, only what the top layer holds is copied.
    pub backed: Option<u64>,
    /// Pieces that cannot be read count as zeroes; told with offset, length and the error.
    #[allow(clippy::type_complexity, reason = "a callback")]
    pub salvage: Option<&'a (dyn Fn(u64, u64, &io::Error) + Sync)>,
    /// Threads.
    pub threads: usize,
}

/// The smallest piece that is tried by itself after a failed read.
const SECTOR: usize = 512;

/// Copy all of `source` to the beginning of `target`.
///
/// # Errors
/// The host's, or [`io::ErrorKind::Interrupted`] when the job is cancelled.
pub fn copy(
    source: &dyn BlockBackend,
    target: Target<'_>,
    options: &CopyOptions<'_>,
    job: &Job<'_>,
) -> io::Result<()> {
    let cluster = match target {
        Target::Packed(q) => q.header().cluster_size(),
        Target::Plain(_) => STEP,
    };
    let c = Copy { source, target, options, cluster, order: Mutex::new(()) };
    let (size, threads) = (source.size(), options.threads);
    // Whether to stop is asked with the next piece.
    let skip = |at| {
        let to = c.after_nothing(at, size);
        if to > at {
            let _ = job.advance(to - at, 0);
        }
        to
    };
    match target {
        Target::Plain(disk) if disk.writes_are_cached() => relay(
            size,
            STEP,
            threads,
            &skip,
            |at, buffer| c.fill(at, buffer),
            |at, buffer, piece| {
                c.write(at, buffer, &piece)?;
                job.advance(buffer.len() as u64, piece.moved)
            },
        ),
        _ => in_some_steps(size, STEP, threads, &skip, |at, buffer| {
            let piece = c.fill(at, buffer)?;
            c.write(at, buffer, &piece)?;
            job.advance(buffer.len() as u64, piece.moved)
        }),
    }
}

struct Copy<'a> {
    source: &'a dyn BlockBackend,
    target: Target<'a>,
    options: &'a CopyOptions<'a>,
    cluster: u64,
    /// Salvage reads byte ranges one by one; once is enough at a time.
    order: Mutex<()>,
}

/// What a piece of the source is to become.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Left to the target's backing file.
    Below,
    Zero,
    Data,
}

/// What was found out about a piece of the source.
struct Piece {
    /// Bytes that had to be read.
    moved: u64,
    /// Offset in the piece, length, and what it is to become.
    parts: Vec<(u64, u64, Kind)>,
}

impl Copy<'_> {
    /// Read the piece at `at` that fills `buffer`.
    fn fill(&self, at: u64, buffer: &mut [u8]) -> io::Result<Piece> {
        let len = buffer.len() as u64;
        let mut done = 0;
        let mut piece = Piece { moved: 0, parts: Vec::new() };
        // Compressed clusters are stored whole, whatever their parts are, and so may zeroes be.
        let packed = matches!(self.target, Target::Packed(_));
        while done < len {
            let (n, kind) = self.kind(at + done, len - done)?;
            let part = &mut buffer[done as usize..(done + n) as usize];
            match kind {
                Kind::Data => {
                    self.read(part, at + done)?;
                    piece.moved += n;
                }
                Kind::Zero if packed || self.options.sparse == 0 => part.fill(0),
                Kind::Below if packed => part.fill(0),
                Kind::Zero | Kind::Below => {}
            }
            match piece.parts.last_mut() {
                Some(last) if last.2 == kind => last.1 += n,
                _ => piece.parts.push((done, n, kind)),
            }
            done += n;
        }
        Ok(piece)
    }

    /// Write what [`fill`](Self::fill) has read.
    fn write(&self, at: u64, buffer: &[u8], piece: &Piece) -> io::Result<()> {
        if let Target::Packed(q) = self.target {
            return self.pack(q, at, buffer, &piece.parts);
        }
        for (from, n, kind) in piece.parts.iter().copied() {
            match kind {
                Kind::Below => {}
                Kind::Zero if self.options.sparse > 0 => self.zeroes(at + from, n)?,
                _ => self.data(at + from, &buffer[from as usize..(from + n) as usize])?,
            }
        }
        Ok(())
    }

    fn kind(&self, at: u64, len: u64) -> io::Result<(u64, Kind)> {
        let mut len = len;
        let backed = self.options.backed.unwrap_or(0);
        if at < backed {
            len = len.min(backed - at);
        }
        let s = self.source.status(at, len)?;
        let kind = if at < backed && (s.depth > 0 || !s.present) {
            Kind::Below
        } else if s.zero {
            Kind::Zero
        } else {
            Kind::Data
        };
        Ok((s.len, kind))
    }

    /// The first piece from `at` on of which something may have to be written: a huge disk that holds little takes as
    /// long as what it holds.
    fn after_nothing(&self, mut at: u64, size: u64) -> u64 {
        // Not for ever: between pieces it is asked whether to stop.
        for _ in 0..1024 {
            if at >= size {
                break;
            }
            // An error is told when the piece is read.
            let Ok((n, kind)) = self.kind(at, size - at) else { break };
            let nothing = match kind {
                Kind::Below => true,
                Kind::Zero => self.options.sparse > 0 && self.left_as_it_is(at),
                Kind::Data => false,
            };
            let whole = if at + n == size { n } else { n / STEP * STEP };
            if !nothing || whole == 0 {
                break;
            }
            at += whole;
        }
        at
    }

    fn read(&self, part: &mut [u8], at: u64) -> io::Result<()> {
        let Err(e) = self.source.read_at(&[SharedSliceMut::new(part)], at) else { return Ok(()) };
        let Some(tell) = self.options.salvage else { return Err(e) };
        let _one = self.order.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for (i, piece) in part.chunks_mut(SECTOR).enumerate() {
            let at = at + (i * SECTOR) as u64;
            if let Err(e) = self.source.read_at(&[SharedSliceMut::new(piece)], at) {
                piece.fill(0);
                tell(at, piece.len() as u64, &e);
            }
        }
        Ok(())
    }

    /// Zeroes from `at` on need no write.
    fn left_as_it_is(&self, at: u64) -> bool {
        self.options.blank && self.options.backed.is_none_or(|b| at >= b)
    }

    fn zeroes(&self, at: u64, len: u64) -> io::Result<()> {
        if self.left_as_it_is(at) {
            return Ok(());
        }
        self.target.disk().write_zeroes(at, len, true)
    }

    /// Runs of data and of zeroes, in units of what counts as a hole.
    fn data(&self, at: u64, data: &[u8]) -> io::Result<()> {
        let write = |from: usize, to: usize| {
            self.target.disk().write_at(&[SharedSlice::new(&data[from..to])], at + from as u64)
        };
        if self.options.sparse == 0 {
            return write(0, data.len());
        }
        let unit = self.options.sparse as usize;
        // Units lie on multiples of themselves, so that a piece that starts oddly finds the same holes.
        let end_of = |from: usize| (from + unit - (at as usize + from) % unit).min(data.len());
        let mut from = 0;
        while from < data.len() {
            let mut to = end_of(from);
            let kind = is_zero(&data[from..to]);
            while to < data.len() && is_zero(&data[to..end_of(to)]) == kind {
                to = end_of(to);
            }
            if kind {
                self.zeroes(at + from as u64, (to - from) as u64)?;
            } else {
                write(from, to)?;
            }
            from = to;
        }
        Ok(())
    }

    fn pack(&self, q: &Qcow2, at: u64, data: &[u8], pieces: &[(u64, u64, Kind)]) -> io::Result<()> {
        let cluster = self.cluster as usize;
        let mut next = pieces.iter().peekable();
        for (i, part) in data.chunks(cluster).enumerate() {
            let (from, to) = ((i * cluster) as u64, (i * cluster + part.len()) as u64);
            while next.peek().is_some_and(|p| p.0 + p.1 <= from) {
                next.next();
            }
            let touching = || next.clone().take_while(|p| p.0 < to);
            if touching().all(|p| p.2 == Kind::Below) {
                continue;
            }
            let at = at + from;
            let mixed = touching().any(|p| p.2 == Kind::Below);
            if self.options.sparse > 0 && !mixed && is_zero(part) {
                self.zeroes(at, part.len() as u64)?;
            } else if mixed {
                // A cluster is stored whole: what the top layer does not hold comes from below it.
                let mut whole = vec![0; part.len()];
                self.read(&mut whole, at)?;
                pack_cluster(q, at, &whole, cluster)?;
            } else {
                pack_cluster(q, at, part, cluster)?;
            }
        }
        Ok(())
    }
}

fn pack_cluster(q: &Qcow2, at: u64, part: &[u8], cluster: usize) -> io::Result<()> {
    let packed = if part.len() < cluster {
        if at + (part.len() as u64) < q.size() {
            // Only a part of this cluster is to change.
            return q.write_at(&[SharedSlice::new(part)], at);
        }
        // The disk ends in this cluster.
        let mut whole = part.to_vec();
        whole.resize(cluster, 0);
        q.pack(&whole)?
    } else {
        q.pack(part)?
    };
    match packed {
        Some(packed) => q.write_packed(at, &packed),
        None => q.write_at(&[SharedSlice::new(part)], at),
    }
}

/// Whether all bytes are zero; compares words.
pub fn is_zero(data: &[u8]) -> bool {
    let (words, rest) = data.as_chunks::<64>();
    rest.iter().all(|b| *b == 0) && words.iter().all(|w| *w == [0; 64])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::qcow2::{CreateOptions, create};
    use crate::storage::tests::{TempDir, read};
    use crate::{Format, ImageOptions, Status, open_image};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const SIZE: u64 = 16 << 40;
    const PLACE: u64 = (9 << 40) + 12_345_600;

    fn image(dir: &TempDir, name: &str) -> Arc<dyn BlockBackend> {
        let path = dir.0.join(name);
        let storage = crate::storage::NewFile::create(&path).expect("a file");
        let options = CreateOptions { size: SIZE, ..CreateOptions::default() };
        create(&storage.storage().expect("opens"), &options).expect("an image");
        storage.publish().expect("its name");
        let options = ImageOptions { format: Some(Format::Qcow2), ..ImageOptions::default() };
        open_image(&path, &options).expect("opens")
    }

    #[test]
    fn a_huge_disk_that_holds_little_takes_few_steps() {
        let dir = TempDir::new();
        let from = image(&dir, "from.qcow2");
        from.write_at(&[SharedSlice::new(&[7; 4096])], PLACE).expect("writes");
        for threads in [1, 4] {
            let to = image(&dir, &format!("to-{threads}.qcow2"));
            let steps = AtomicUsize::new(0);
            let watch = |_, _| {
                steps.fetch_add(1, Ordering::Relaxed);
            };
            let job = Job::new(SIZE, None, Some(&watch));
            let options = CopyOptions { sparse: 4096, blank: true, backed: None, salvage: None, threads };
            copy(&*from, Target::Plain(&*to), &options, &job).expect("copies");
            assert_eq!(job.done(), SIZE);
            // All pieces of two megabytes would be eight million.
            let steps = steps.into_inner();
            assert!(steps < 100, "{steps} steps");
            assert_eq!(read(&*to, PLACE, 4096), [7; 4096]);
            let Status { zero, len, .. } = to.status(0, PLACE).expect("looked up");
            assert!(zero && len > 0);
        }
    }
}
