//! `amend`: change an image's features.

use crate::args::{Cache, pairs, parse, switch};
use crate::new::{version, wants_help};
use crate::progress::Progress;
use crate::{Done, Failure, Streams, open, size};
use open::How;
use ringfort_block::format::qcow2::Changes;

const OPTIONS: &str = "\
Amend options for 'qcow2':
  compat=<str>           - Compatibility level (v2 [0.10] or v3 [1.1])
  data_file=<str>        - File name of an external data file
  data_file_raw=<bool (on/off)> - The external data file must stay valid as a raw image
  lazy_refcounts=<bool (on/off)> - Postpone refcount updates
  refcount_bits=<num>    - Width of a reference count entry in bits
  size=<size>            - Virtual disk size
";

pub fn run(arguments: &[String], s: &mut Streams<'_>) -> Done {
    let p = parse(arguments, &["p", "q", "force", "image-opts"], &["f", "t", "o", "object"])?;
    if wants_help(p.values("o")) {
        s.out.write_all(OPTIONS.as_bytes())?;
        return Ok(0);
    }
    if p.value("o").is_none() {
        return Err(Failure::new("Must specify options (-o)"));
    }
    let (path, format) = open::name(p.one_file()?, p.value("f"), &p, "image-opts")?;
    let options = pairs(p.values("o"))?;
    let cache = p.cache("t", Cache::WRITEBACK)?;
    let how = How { format: format.as_deref(), read_only: false, cache };
    let q = open::qcow2(&path, &how, |o| o, &p)?
        .ok_or_else(|| Failure::new(format!("{path}: its format does not support option amendment")))?;
    let header = q.header();
    let mut c = Changes::default();
    for (k, v) in &options {
        match k.as_str() {
            "compat" => c.version = Some(version(v)?),
            "lazy_refcounts" => c.lazy_refcounts = Some(switch(k, v)?),
            "refcount_bits" => {
                let bits =
                    v.parse().map_err(|_| Failure::new("Parameter 'refcount_bits' expects a number"))?;
                c.refcount_bits = Some(bits);
            }
            "data_file" => c.data_file = Some(v.clone()),
            "data_file_raw" => c.data_file_raw = Some(switch(k, v)?),
            "size" => c.size = Some(size::parse(v)?),
            "backing_file" if header.backing.as_deref().unwrap_or("") == v => {}
            "backing_fmt" if header.backing_format.as_deref().unwrap_or("") == v => {}
            "backing_file" | "backing_fmt" => {
                return Err(Failure::new(
                    "Cannot amend the backing file: you can use 'ringfort img rebase' instead",
                ));
            }
            "cluster_size" | "extended_l2" | "compression_type" | "preallocation" => {
                return Err(Failure::new(format!(
                    "Invalid parameter '{k}': it is fixed when an image is made; convert it"
                )));
            }
            _ => return Err(Failure::new(format!("Invalid parameter '{k}'"))),
        }
    }
    let progress = Progress::new(s.out, p.has("p") && !p.has("q"), 1);
    q.amend(&c).map_err(|e| Failure::new(format!("{path}: {e}")))?;
    q.close()?;
    progress.end();
    Ok(0)
}
