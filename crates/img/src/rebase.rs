//! `rebase`: put an overlay on another backing file.

use crate::args::{Cache, parse};
use crate::convert::threads;
use crate::progress::Progress;
use crate::{Done, Failure, Streams, open};
use open::How;
use ringfort_block::format::{detect, relative_to};
use ringfort_block::job::{self, Job};
use ringfort_block::storage::{FileStorage, StorageOptions};
use ringfort_block::{BlockBackend, ImageOptions, open_image};
use std::path::Path;
use std::sync::Arc;

/// Longest chain.
const MAX_CHAIN: usize = 128;

pub fn run(arguments: &[String], s: &mut Streams<'_>) -> Done {
    let p = parse(arguments, &["q", "u", "p", "U", "c", "image-opts"], &["f", "t", "T", "b", "F", "object"])?;
    let (path, format) = open::name(p.one_file()?, p.value("f"), &p, "image-opts")?;
    let unsafely = p.has("u");
    if !unsafely && p.value("b").is_none() {
        return Err(Failure::new("Use backing file (-b) option to rebase image"));
    }
    if p.has("c") {
        return Err(Failure::new("-c is not supported by rebase: convert -c -B does the same"));
    }
    let cache = p.cache("t", Cache::WRITEBACK)?;
    let how = How { format: format.as_deref(), read_only: false, cache };
    let direct = p.cache("T", Cache::WRITEBACK)?.direct;
    let with = |o: ImageOptions| ImageOptions { backing: !unsafely, ..o };
    let q = open::qcow2(&path, &how, with, &p)?.ok_or_else(|| {
        Failure::new(format!("{path}: its format has no backing file, so that it cannot be rebased"))
    })?;
    let header = q.header();
    // Without -b only the format changes; an empty name takes the backing file out.
    let name = p.value("b").map_or(header.backing.clone(), |b| Some(b.to_owned()).filter(|b| !b.is_empty()));
    let new_format = match (p.value("F"), p.value("b")) {
        (Some(f), _) => Some(f.to_owned()),
        (None, None) => header.backing_format.clone(),
        (None, Some(_)) => None,
    };
    open::format(new_format.as_deref())?;
    if let (Some(name), None) = (&name, &new_format) {
        let below = relative_to(Path::new(&path), name);
        let options = StorageOptions { read_only: true, direct: false, lock: false };
        let found = FileStorage::open(&below, options).ok().and_then(|f| detect(&f).ok());
        let hint = found.map_or(String::new(), |f| format!("; it looks like {0}: add -F {0}", f.name()));
        return Err(Failure::new(format!(
            "Could not change the backing file to '{name}': backing format must be specified{hint}"
        )));
    }
    if !unsafely {
        let new: Option<Arc<dyn BlockBackend>> = match &name {
            None => None,
            Some(name) => {
                let below = relative_to(Path::new(&path), name);
                refuse_loop(&path, &below, new_format.as_deref())?;
                let options = ImageOptions {
                    format: open::format(new_format.as_deref())?,
                    read_only: true,
                    direct,
                    ..ImageOptions::default()
                };
                Some(
                    open_image(&below, &options)
                        .map_err(|e| Failure::new(format!("Could not open new backing file: {e}")))?,
                )
            }
        };
        let old = q.backing().map(|n| n.below());
        let progress = Progress::new(s.out, p.has("p") && !p.has("q"), q.size());
        let watch = |done, _| progress.set(done);
        let job = Job::new(q.size(), None, Some(&watch));
        let unit = (header.cluster_size(), header.version >= 3);
        job::rebase(&q, old.as_deref(), new.as_deref(), unit, threads(None)?, &job)
            .map_err(|e| Failure::new(format!("error while rebasing {path}: {e}")))?;
        q.set_backing_name(name.as_deref(), new_format.as_deref())?;
        progress.end();
    } else {
        q.set_backing_name(name.as_deref(), new_format.as_deref())?;
    }
    q.close()?;
    Ok(0)
}

/// A chain that would come back to the image itself.
fn refuse_loop(path: &str, below: &Path, format: Option<&str>) -> Result<(), Failure> {
    let options = StorageOptions { read_only: true, direct: false, lock: false };
    let top = FileStorage::open_any_size(Path::new(path), options)?.identity()?;
    let mut next = Some((below.to_path_buf(), open::format(format)?));
    for _ in 0..MAX_CHAIN {
        let Some((below, format)) = next.take() else { break };
        // What cannot be opened is told by whoever opens it to use it.
        let Ok(file) = FileStorage::open_any_size(&below, options) else { break };
        if file.identity()? == top {
            return Err(Failure::new(format!(
                "Backing file '{}' creates an infinite loop: it stands on {path} itself",
                below.display()
            )));
        }
        let format = match format {
            Some(f) => f,
            None => detect(&file)?,
        };
        if format == ringfort_block::Format::Qcow2 {
            let h = ringfort_block::format::qcow2::Header::read(&file)?;
            if let Some(b) = &h.backing {
                next = Some((relative_to(&below, b), open::format(h.backing_format.as_deref())?));
            }
        }
    }
    Ok(())
}
