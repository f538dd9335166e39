//! `compare`.

use crate::args::{Cache, parse};
use crate::progress::Progress;
use crate::{Done, Failure, Streams, open};
use open::How;
use ringfort_block::{BlockBackend, SharedSliceMut};
use std::io;

/// Bytes compared at a time.
const STEP: u64 = 2 << 20;

pub fn run(arguments: &[String], s: &mut Streams<'_>) -> Done {
    let p = parse(arguments, &["p", "q", "s", "U", "image-opts"], &["f", "F", "T", "object"])?;
    let [one, two] = p.rest.as_slice() else {
        return Err(Failure::new("Expecting two image file names"));
    };
    let error = |f: Failure| Failure { status: 2, ..f };
    let cache = p.cache("T", Cache::WRITEBACK)?;
    let image = |text: &str, format| {
        let (path, format) = open::name(text, format, &p, "image-opts")?;
        open::image(&path, &How { cache, ..How::reading(format.as_deref()) }, &p)
    };
    let (a, _) = image(one, p.value("f")).map_err(error)?;
    let (b, _) = image(two, p.value("F")).map_err(error)?;
    let total = a.size().max(b.size());
    let shared = a.size().min(b.size());
    if a.size() != b.size() {
        if p.has("s") {
            if !p.has("q") {
                writeln!(s.out, "Strict mode: Image size mismatch!")?;
            }
            return Ok(1);
        }
        if !p.has("q") {
            writeln!(s.out, "Warning: Image size mismatch!")?;
        }
    }
    let progress = Progress::new(s.out, p.has("p"), total);
    let found = differ(&*a, &*b, shared, total, &progress)
        .map_err(|e| Failure::with(4, format!("Error while reading: {e}")))?;
    progress.end();
    if !p.has("q") {
        match found {
            Some(at) => writeln!(s.out, "Content mismatch at offset {at}!")?,
            None => writeln!(s.out, "Images are identical.")?,
        }
    }
    Ok(u8::from(found.is_some()))
}

/// The first byte that differs; a shorter disk counts as followed by zeroes.
fn differ(
    a: &dyn BlockBackend,
    b: &dyn BlockBackend,
    shared: u64,
    total: u64,
    progress: &Progress<'_>,
) -> io::Result<Option<u64>> {
    let (mut x, mut y) = (vec![0u8; STEP as usize], vec![0u8; STEP as usize]);
    let longer = if a.size() > b.size() { a } else { b };
    let mut at = 0;
    while at < total {
        let in_both = at < shared;
        let left = if in_both { shared - at } else { total - at };
        let (sa, sb) = if in_both {
            (a.status(at, left)?, b.status(at, left)?)
        } else {
            let only = longer.status(at, left)?;
            (only, ringfort_block::Status { zero: true, ..only })
        };
        let mut n = left.min(sa.len).min(sb.len);
        if !(sa.zero && sb.zero) {
            n = n.min(STEP);
            let (x, y) = (&mut x[..n as usize], &mut y[..n as usize]);
            if in_both {
                a.read_at(&[SharedSliceMut::new(x)], at)?;
                b.read_at(&[SharedSliceMut::new(y)], at)?;
            } else {
                longer.read_at(&[SharedSliceMut::new(x)], at)?;
                y.fill(0);
            }
            if x != y {
                let first = x.iter().zip(y.iter()).position(|(p, q)| p != q).unwrap_or(0);
                return Ok(Some(at + first as u64));
            }
        }
        at += n;
        progress.add(n);
    }
    Ok(None)
}
