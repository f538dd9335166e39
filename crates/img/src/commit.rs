//! `commit`: write an overlay's content into what it stands on.

use crate::args::{Cache, parse};
use crate::convert::threads;
use crate::create::same_file;
use crate::progress::Progress;
use crate::{Done, Failure, Streams, open};
use open::How;
use ringfort_block::format::qcow2::Header;
use ringfort_block::format::{Qcow2, backing_of, detect};
use ringfort_block::job::{self, Job};
use ringfort_block::node::Joint;
use ringfort_block::storage::FileStorage;
use ringfort_block::{BlockBackend, Format};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Longest chain.
const MAX_CHAIN: usize = 128;

pub fn run(arguments: &[String], s: &mut Streams<'_>) -> Done {
    let p = parse(arguments, &["q", "d", "p", "image-opts"], &["f", "t", "b", "r", "object"])?;
    let (path, format) = open::name(p.one_file()?, p.value("f"), &p, "image-opts")?;
    let cache = p.cache("t", Cache::WRITEBACK)?;
    let how = How { format: format.as_deref(), read_only: false, cache };
    let none = || Failure::new(format!("{path}: Image does not have a backing file"));
    let file = open::storage_as(&path, &how, &p)?;
    if !matches!(format_of(format.as_deref(), &file)?, Format::Qcow2) {
        return Err(none());
    }
    // The layers above the base are read without what is below them: the base is opened once, for writing.
    let mut layers: Vec<(FileStorage, Header)> = Vec::new();
    let mut next = (PathBuf::from(&path), file);
    let mut seen = vec![next.1.identity()?];
    let (base, base_format) = loop {
        let (path, file) = next;
        let header = Header::read(&file)?;
        let Some(name) = &header.backing else {
            return Err(match p.value("b") {
                Some(b) if !layers.is_empty() => {
                    Failure::new(format!("Did not find '{b}' in the backing chain of '{}'", p.rest[0]))
                }
                _ => none(),
            });
        };
        let below = backing_of(&path, name)?;
        let format = open::format(header.backing_format.as_deref())?;
        layers.push((file, header));
        let here = match p.value("b") {
            None => true,
            Some(b) => same_file(&below, Path::new(b)) || below.to_string_lossy() == b,
        };
        if here {
            break (below, format);
        }
        let reading = How { cache, ..How::reading(None) };
        let file = open::storage_as(&below.to_string_lossy(), &reading, &p)?;
        let identity = file.identity()?;
        if seen.contains(&identity) || seen.len() >= MAX_CHAIN {
            return Err(Failure::new(format!("{}: its backing chain comes back to itself", p.rest[0])));
        }
        seen.push(identity);
        let format = match format {
            Some(f) => f,
            None => detect(&file)?,
        };
        if format != Format::Qcow2 {
            return Err(Failure::new(format!(
                "Did not find '{}' in the backing chain of '{}'",
                p.value("b").unwrap_or(""),
                p.rest[0]
            )));
        }
        next = (below, file);
    };
    let how = How { format: base_format.map(Format::name), read_only: false, cache };
    let (base, _) = open::image(&base.to_string_lossy(), &how, &p)?;
    let depth = layers.len() as u32;
    let mut below: Arc<Joint> = Arc::new(Joint::new(base.clone()));
    let mut top: Option<Qcow2> = None;
    while let Some((file, header)) = layers.pop() {
        let last = layers.is_empty();
        let options = open::options(Format::Qcow2, !last, &p);
        let q = Qcow2::with_backing(file, header, Some(below.clone()), &options)?;
        if last {
            top = Some(q);
        } else {
            below = Arc::new(Joint::new(Arc::new(q)));
        }
    }
    let top = top.ok_or_else(none)?;
    if base.size() < top.size() {
        base.resize(top.size())?;
    }
    let progress = Progress::new(s.out, p.has("p") && !p.has("q"), top.size());
    let watch = |done, _| progress.set(done);
    let job = Job::new(top.size(), p.rate()?, Some(&watch));
    job::commit(&top, depth, &*base, threads(None)?, &job)
        .map_err(|e| Failure::new(format!("Could not commit to the backing file: {e}")))?;
    if !p.has("d") && p.value("b").is_none() {
        top.make_empty().map_err(|e| {
            Failure::new(format!("Could not empty {path}: {e}; its content is in the backing file"))
        })?;
    }
    top.close()?;
    drop(below);
    base.flush()?;
    progress.end();
    if !p.has("q") {
        writeln!(s.out, "Image committed.")?;
    }
    Ok(0)
}

fn format_of(name: Option<&str>, file: &FileStorage) -> Result<Format, Failure> {
    match open::format(name)? {
        Some(f) => Ok(f),
        None => Ok(detect(file)?),
    }
}
