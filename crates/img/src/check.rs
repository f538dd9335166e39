//! `check`.

use crate::args::{Cache, parse};
use crate::{Done, Failure, Streams, json, open};
use open::How;
use ringfort_block::ImageOptions;
use ringfort_block::format::qcow2::check::Repair;
use serde_json::json;

/// Exit status: errors were found.
const ERRORS: u8 = 2;
/// Exit status: only leaks were found.
const LEAKS: u8 = 3;
/// Exit status: the format cannot be checked.
const UNSUPPORTED: u8 = 63;

pub fn run(arguments: &[String], s: &mut Streams<'_>) -> Done {
    let p = parse(arguments, &["q", "U", "image-opts"], &["f", "output", "r", "T", "object"])?;
    let as_json = p.json()?;
    let (path, format) = open::name(p.one_file()?, p.value("f"), &p, "image-opts")?;
    let cache = p.cache("T", Cache::WRITEBACK)?;
    let repair = match p.value("r") {
        None => Repair::None,
        Some("leaks") => Repair::Leaks,
        Some("all") => Repair::All,
        Some(_) => return Err(Failure::new("Repair mode must be 'leaks' or 'all'")),
    };
    let options = |o| ImageOptions { backing: false, repairing: true, ..o };
    let how = How { format: format.as_deref(), read_only: repair == Repair::None, cache };
    let q = open::qcow2(&path, &how, options, &p)?;
    let q = q.ok_or_else(|| Failure::with(UNSUPPORTED, "This image format does not support checks"))?;
    let r = q.check(repair)?;
    if repair != Repair::None {
        q.close()?;
    }
    let (corruptions, leaks) =
        (r.corruptions - r.corruptions_fixed.min(r.corruptions), r.leaks - r.leaks_fixed.min(r.leaks));
    if as_json {
        let mut v = json!({
            "image-end-offset": r.image_end, "total-clusters": r.total_clusters, "check-errors": r.check_errors,
            "filename": path, "format": "qcow2",
        });
        let more = [
            ("allocated-clusters", r.allocated_clusters),
            ("fragmented-clusters", r.fragmented_clusters),
            ("compressed-clusters", r.compressed_clusters),
            ("corruptions", corruptions),
            ("leaks", leaks),
            ("corruptions-fixed", r.corruptions_fixed),
            ("leaks-fixed", r.leaks_fixed),
        ];
        for (k, n) in more.into_iter().filter(|m| m.1 != 0) {
            v[k] = n.into();
        }
        json::write(s.out, &v)?;
    } else if !p.has("q") {
        for line in &r.lines {
            writeln!(s.out, "{line}")?;
        }
        if r.corruptions_fixed + r.leaks_fixed > 0 {
            writeln!(
                s.out,
                "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    {} corruptions\n",
                r.leaks_fixed, r.corruptions_fixed
            )?;
        }
        if corruptions + leaks + r.check_errors == 0 {
            writeln!(s.out, "No errors were found on the image.")?;
        }
        if corruptions > 0 {
            writeln!(
                s.out,
                "\n{corruptions} errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it."
            )?;
        }
        if leaks > 0 {
            writeln!(
                s.out,
                "\n{leaks} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data."
            )?;
        }
        if r.check_errors > 0 {
            writeln!(s.out, "\n{} internal errors have occurred during the check.", r.check_errors)?;
        }
        if r.total_clusters > 0 && r.allocated_clusters > 0 {
            let (all, of) = (r.total_clusters as f64, r.allocated_clusters as f64);
            writeln!(
                s.out,
                "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
                r.allocated_clusters,
                r.total_clusters,
                of * 100.0 / all,
                r.fragmented_clusters as f64 * 100.0 / of,
                r.compressed_clusters as f64 * 100.0 / of
            )?;
        }
        writeln!(s.out, "Image end offset: {}", r.image_end)?;
    }
    Ok(if r.check_errors > 0 {
        1
    } else if corruptions > 0 {
        ERRORS
    } else if leaks > 0 {
        LEAKS
    } else {
        0
    })
}
