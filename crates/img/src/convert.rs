//! `convert`: copy a disk into another image, by several threads.

use crate::args::{Cache, pairs, parse};
use crate::new::{Made, New, Opened, option_help, wants_help};
use crate::progress::Progress;
use crate::{Done, Failure, Streams, open, size};
use open::How;
use ringfort_block::format::Qcow2;
use ringfort_block::format::qcow2::Preallocation;
use ringfort_block::job::{self, CopyOptions, Job, MAX_THREADS, Target};
use ringfort_block::node::Concat;
use ringfort_block::{BlockBackend, Format};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::sync::{Arc, Mutex, PoisonError};

/// Threads that `-m` says, or one for each CPU.
pub fn threads(text: Option<&str>) -> Result<usize, Failure> {
    match text {
        None => Ok(std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS)),
        Some(m) => m.parse::<usize>().ok().filter(|m| (1..=MAX_THREADS).contains(m)).ok_or_else(|| {
            Failure::new("Invalid number of coroutines. Allowed number of coroutines is between 1 and 16")
        }),
    }
}

pub fn run(arguments: &[String], s: &mut Streams<'_>) -> Done {
    let flags = [
        "c",
        "p",
        "q",
        "n",
        "U",
        "C",
        "W",
        "target-is-zero",
        "bitmaps",
        "skip-broken-bitmaps",
        "salvage",
        "image-opts",
        "target-image-opts",
    ];
    let valued = ["f", "O", "o", "S", "m", "t", "T", "l", "b", "B", "F", "r", "object"];
    let p = parse(arguments, &flags, &valued)?;
    let out_format = open::new_format(p.value("O"))?;
    if wants_help(p.values("o")) {
        write!(s.out, "{}", option_help(out_format))?;
        return Ok(0);
    }
    let Some((to, from)) = p.rest.split_last().filter(|(_, from)| !from.is_empty()) else {
        return Err(Failure::new("Must specify one source and one output image file name"));
    };
    let new = new_image(&p, out_format)?;
    let (skip, packed) = (p.has("n"), p.has("c"));
    for (wrong, why) in [
        (packed && out_format != Format::Qcow2, "Compression not supported for this file format"),
        (
            packed && new.qcow2.data_file.is_some(),
            "Compression and a data file cannot be used at the same time",
        ),
        (
            packed && new.preallocation != Preallocation::Off,
            "Compression and preallocation not supported at the same time",
        ),
        (skip && p.value("o").is_some(), "-o has no effect with -n: leave one of them out"),
        (p.has("target-is-zero") && !skip, "--target-is-zero requires use of -n flag"),
        (p.has("target-image-opts") && !skip, "--target-image-opts requires use of -n flag"),
        (p.has("C") && packed, "Cannot enable copy offloading when -c is used"),
        (p.has("C") && p.value("S").is_some(), "Cannot enable copy offloading when -S is used"),
        (
            p.has("bitmaps") && out_format != Format::Qcow2,
            "Format driver does not support bitmaps: --bitmaps needs -O qcow2",
        ),
        (p.has("bitmaps") && p.value("l").is_some(), "Cannot copy bitmaps of a snapshot"),
        (
            p.has("skip-broken-bitmaps") && !p.has("bitmaps"),
            "Use of --skip-broken-bitmaps requires --bitmaps",
        ),
        (from.len() > 1 && p.has("bitmaps"), "Copying bitmaps only possible with single source"),
        (
            from.len() > 1 && new.qcow2.backing.is_some(),
            "Having a backing file for the target makes no sense when concatenating multiple input images",
        ),
        (from.len() > 1 && p.value("l").is_some(), "No support for concatenating multiple snapshot"),
    ] {
        if wrong {
            return Err(Failure::new(why));
        }
    }
    let threads = threads(p.value("m"))?;
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
    let source_cache = p.cache("T", Cache::WRITEBACK)?;
    let target_cache = p.cache("t", Cache::UNSAFE)?;
    let (source, bitmaps) = sources(from, source_cache, &p)?;
    // A device keeps its place: there is nothing to rename over it.
    let (to, to_format) = if p.has("target-image-opts") {
        open::name(to, p.value("O"), &p, "target-image-opts")?
    } else {
        (to.clone(), Some(out_format.name().to_owned()))
    };
    let device = std::fs::metadata(&to).is_ok_and(|m| m.file_type().is_block_device());
    let in_place = skip || device && out_format == Format::Raw;
    let mut made: Option<Made> = None;
    let target = if in_place {
        // What was there must not be half old and half new after a crash that nobody saw.
        let cache = p.cache("t", Cache::WRITEBACK)?;
        let how = How { format: to_format.as_deref(), read_only: false, cache };
        let opened = match open::qcow2(&to, &how, |o| o, &p)? {
            Some(q) => Opened::Qcow2(Box::new(q)),
            None => Opened::Raw(open::image(&to, &how, &p)?.0),
        };
        if opened.disk().size() < source.size() {
            return Err(Failure::new(format!("{to}: output file is smaller than input file")));
        }
        opened
    } else {
        let bytes = new.size.unwrap_or(0).max(source.size());
        let (files, opened) = new.lay_out(&to, bytes, target_cache, true)?;
        made = Some(files);
        opened
    };
    let backed = match &target {
        Opened::Qcow2(q) if !in_place => q.backing().map(|b| b.size()),
        _ => None,
    };
    let lost = Mutex::new(Vec::new());
    let salvage = |at: u64, len: u64, e: &io::Error| {
        lost.lock().unwrap_or_else(PoisonError::into_inner).push((at, len, e.to_string()));
    };
    let options = CopyOptions {
        sparse,
        blank: p.has("target-is-zero") || !in_place,
        backed,
        salvage: p.has("salvage").then_some(&salvage),
        threads,
    };
    let progress = Progress::new(s.out, p.has("p") && !p.has("q"), source.size());
    let watch = |done, _| progress.set(done);
    let job = Job::new(source.size(), p.rate()?, Some(&watch));
    let goal = match &target {
        Opened::Qcow2(q) if packed => Target::Packed(q),
        other => Target::Plain(other.disk()),
    };
    job::copy(&*source, goal, &options, &job)
        .map_err(|e| Failure::new(format!("error while converting {}: {e}", from.join(", "))))?;
    if let (Some(from), Opened::Qcow2(q)) = (&bitmaps, &target) {
        let skipped = q.copy_bitmaps(from, p.has("skip-broken-bitmaps"))?;
        for name in skipped {
            writeln!(s.err, "ringfort img: warning: Skipping inconsistent bitmap '{name}'")?;
        }
    }
    target.close()?;
    if let Some(files) = made {
        files.publish()?;
    }
    progress.end();
    if !p.has("q") {
        for (at, len, e) in lost.into_inner().unwrap_or_else(PoisonError::into_inner) {
            writeln!(s.err, "ringfort img: warning: error while reading {len} bytes at offset {at}: {e}")?;
        }
    }
    Ok(0)
}

/// What `-o`, `-B` and `-F` say.
fn new_image(p: &crate::args::Parsed, format: Format) -> Result<New, Failure> {
    let mut new = New::from_options(format, &pairs(p.values("o"))?)?;
    if let Some(b) = p.value("B").or(p.value("b")) {
        new.qcow2.backing = Some(b.into());
    }
    if let Some(f) = p.value("F") {
        new.qcow2.backing_format = Some(f.into());
    }
    if new.qcow2.backing.is_some() {
        if format != Format::Qcow2 {
            return Err(Failure::new(format!(
                "Backing file not supported for file format '{}'",
                format.name()
            )));
        }
        if new.qcow2.backing_format.is_none() {
            return Err(Failure::new("backing file specified without backing format: add -F FORMAT"));
        }
    }
    Ok(new)
}

/// A disk, and the image whose bitmaps are to be copied.
type Source = (Arc<dyn BlockBackend>, Option<Arc<Qcow2>>);

/// What is to be copied, and the image whose bitmaps are.
fn sources(from: &[String], cache: Cache, p: &crate::args::Parsed) -> Result<Source, Failure> {
    let mut list = Vec::new();
    for text in from {
        let (path, format) = open::name(text, p.value("f"), p, "image-opts")?;
        let how = How { cache, ..How::reading(format.as_deref()) };
        if let Some(key) = p.value("l") {
            return Ok((open::snapshot(&path, &how, key, p)?, None));
        }
        if p.has("bitmaps") {
            let q = open::qcow2(&path, &how, |o| o, p)?
                .ok_or_else(|| Failure::new("The source has no bitmaps: --bitmaps needs a qcow2 image"))?;
            let q = Arc::new(q);
            return Ok((q.clone(), Some(q)));
        }
        list.push(open::image(&path, &how, p)?.0);
    }
    Ok(match list.len() {
        1 => (list.remove(0), None),
        _ => (Arc::new(Concat::new(list)), None),
    })
}
