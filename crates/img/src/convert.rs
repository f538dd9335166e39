//! `convert`: copy a disk into another image, by several threads.

use crate::args::{pairs, parse};
use crate::create::New;
use crate::progress::Progress;
use crate::{Done, Failure, Streams, open, size};
use ringfort_block::format::Qcow2;
use ringfort_block::storage::NewFile;
use ringfort_block::{BlockBackend, Format, SharedSlice, SharedSliceMut, open_storage_image};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes that a thread takes at a time: a multiple of every cluster size.
const STEP: u64 = 2 << 20;
/// Most threads.
const MAX_THREADS: usize = 16;

/// Where the copy goes.
enum Target {
    Plain(Arc<dyn BlockBackend>),
    Packed(Box<Qcow2>),
}

impl Target {
    fn disk(&self) -> &dyn BlockBackend {
        match self {
            Target::Plain(d) => &**d,
            Target::Packed(q) => &**q,
        }
    }
}

/// How to copy.
struct Rules {
    /// Zeroes shorter than this are written; 0 writes all.
    sparse: u64,
    /// The target holds nothing but zeroes before.
    blank: bool,
    /// Bytes in a cluster of a compressed target.
    cluster: u64,
}

pub fn run(arguments: &[String], s: &mut Streams<'_>) -> Done {
    let flags = ["c", "p", "q", "n", "U", "C", "W", "target-is-zero"];
    let p = parse(arguments, &flags, &["f", "O", "o", "S", "m", "t", "T"])?;
    let [from, to] = p.rest.as_slice() else {
        return Err(Failure::new("Must specify one source and one output image file name"));
    };
    let out_format = open::format(p.value("O"))?.unwrap_or(Format::Raw);
    let (source, _) = open::image(from, p.value("f"), true, &p)?;
    let new = New::from_options(out_format, &pairs(p.values("o"))?)?;
    if new.qcow2.backing.is_some() {
        return Err(Failure::new(
            "a backing file for the output is not supported by convert yet: use create -b and rebase",
        ));
    }
    if p.has("c") && out_format != Format::Qcow2 {
        return Err(Failure::new("Compression not supported for this file format"));
    }
    if p.has("c") && new.qcow2.data_file.is_some() {
        return Err(Failure::new("Compression and a data file cannot be used at the same time"));
    }
    if p.has("n") && p.value("o").is_some() {
        return Err(Failure::new("-o has no effect with -n: leave one of them out"));
    }
    let threads = match p.value("m") {
        None => std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS),
        Some(m) => m.parse::<usize>().ok().filter(|m| (1..=MAX_THREADS).contains(m)).ok_or_else(|| {
            Failure::new("Invalid number of coroutines. Allowed number of coroutines is between 1 and 16")
        })?,
    };
    let sparse = match p.value("S") {
        None => 4096,
        Some(text) => {
            let n = size::parse(text)?;
            if !n.is_multiple_of(512) || n > 16 << 20 {
                return Err(Failure::new(
                    "Invalid buffer size for sparse output specified: it must be a multiple of 512, at most 16M",
                ));
            }
            n
        }
    };
    // A device keeps its place: there is nothing to rename over it.
    let device = std::fs::metadata(to).is_ok_and(|m| m.file_type().is_block_device());
    let in_place = p.has("n") || device && out_format == Format::Raw;
    if p.has("c") && in_place {
        return Err(Failure::new("-c cannot be used with -n or a device"));
    }
    let mut made: Option<NewFile> = None;
    let target = if in_place {
        let (disk, _) = open::image(to, Some(out_format.name()), false, &p)?;
        if disk.size() < source.size() {
            return Err(Failure::new(format!("{to}: output file is smaller than input file")));
        }
        Target::Plain(disk)
    } else {
        let bytes = new.size.unwrap_or(0).max(source.size());
        let file = made.insert(new.lay_out(to, bytes)?).storage()?;
        let options = ringfort_block::ImageOptions { lock: false, ..open::options(out_format, false, &p) };
        if p.has("c") {
            Target::Packed(Box::new(Qcow2::open(file, &options)?))
        } else {
            Target::Plain(open_storage_image(file, &options)?)
        }
    };
    let rules = Rules {
        sparse,
        blank: p.has("target-is-zero") || !in_place,
        cluster: match &target {
            Target::Packed(q) => q.header().cluster_size(),
            Target::Plain(_) => STEP,
        },
    };
    let progress = Progress::new(s.out, p.has("p") && !p.has("q"), source.size());
    copy(&*source, &target, &rules, threads, &progress)
        .map_err(|e| Failure::new(format!("error while converting {from}: {e}")))?;
    target.disk().flush()?;
    match target {
        Target::Packed(q) => q.close()?,
        Target::Plain(d) => drop(d),
    }
    if let Some(file) = made {
        file.publish()?;
    }
    progress.end();
    Ok(0)
}

fn copy(
    source: &dyn BlockBackend,
    target: &Target,
    rules: &Rules,
    threads: usize,
    progress: &Progress<'_>,
) -> io::Result<()> {
    let next = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let failed: Mutex<Option<io::Error>> = Mutex::new(None);
    let size = source.size();
    std::thread::scope(|s| {
        for _ in 0..threads {
            s.spawn(|| {
                let mut buffer = vec![0u8; STEP as usize];
                while !stop.load(Ordering::Relaxed) {
                    let at = next.fetch_add(STEP, Ordering::Relaxed);
                    if at >= size {
                        break;
                    }
                    let n = STEP.min(size - at);
                    if let Err(e) = copy_step(source, target, rules, at, &mut buffer[..n as usize]) {
                        stop.store(true, Ordering::Relaxed);
                        failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(e);
                    }
                    progress.add(n);
                }
            });
        }
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// Copy the piece at `at` that fills `buffer`.
fn copy_step(
    source: &dyn BlockBackend,
    target: &Target,
    rules: &Rules,
    at: u64,
    buffer: &mut [u8],
) -> io::Result<()> {
    let len = buffer.len() as u64;
    // What is known to be zeroes needs no reading.
    let mut done = 0;
    let mut any = false;
    while done < len {
        let x = source.status(at + done, len - done)?;
        let part = &mut buffer[done as usize..(done + x.len) as usize];
        if x.zero {
            part.fill(0);
        } else {
            source.read_at(&[SharedSliceMut::new(part)], at + done)?;
            any = true;
        }
        done += x.len;
    }
    if !any && rules.sparse > 0 {
        return zeroes(target, rules, at, len);
    }
    if let Target::Packed(q) = target {
        return pack(q, rules, at, buffer);
    }
    if rules.sparse == 0 {
        return target.disk().write_at(&[SharedSlice::new(buffer)], at);
    }
    // Runs of data and of zeroes, in units of what counts as a hole.
    let unit = rules.sparse.min(len) as usize;
    let mut from = 0;
    while from < buffer.len() {
        let zero = |i: usize| is_zero(&buffer[i..(i + unit).min(buffer.len())]);
        let kind = zero(from);
        let mut to = (from + unit).min(buffer.len());
        while to < buffer.len() && zero(to) == kind {
            to = (to + unit).min(buffer.len());
        }
        if kind {
            zeroes(target, rules, at + from as u64, (to - from) as u64)?;
        } else {
            target.disk().write_at(&[SharedSlice::new(&buffer[from..to])], at + from as u64)?;
        }
        from = to;
    }
    Ok(())
}

fn zeroes(target: &Target, rules: &Rules, at: u64, len: u64) -> io::Result<()> {
    if rules.blank { Ok(()) } else { target.disk().write_zeroes(at, len, true) }
}

fn pack(q: &Qcow2, rules: &Rules, at: u64, data: &[u8]) -> io::Result<()> {
    let cluster = rules.cluster as usize;
    let mut last = Vec::new();
    for (i, mut part) in data.chunks(cluster).enumerate() {
        let at = at + (i * cluster) as u64;
        if is_zero(part) && rules.sparse > 0 {
            continue;
        }
        let whole = part;
        if part.len() < cluster {
            // The disk ends in this cluster.
            last.extend_from_slice(part);
            last.resize(cluster, 0);
            part = &last;
        }
        match q.pack(part)? {
            Some(packed) => q.write_packed(at, &packed)?,
            None => q.write_at(&[SharedSlice::new(whole)], at)?,
        }
    }
    Ok(())
}

/// Whether all bytes are zero; compares words.
fn is_zero(data: &[u8]) -> bool {
    let (words, rest) = data.as_chunks::<32>();
    rest.iter().all(|b| *b == 0) && words.iter().all(|w| *w == [0; 32])
}
