//! `measure`: how much room a new image needs.

use crate::args::{pairs, parse};
use crate::new::New;
use crate::{Done, Failure, Streams, json, open, size};
use open::How;
use ringfort_block::format::qcow2::{CreateOptions, Preallocation};
use ringfort_block::{BlockBackend, Format};
use serde_json::json;
use std::io;
use std::sync::Arc;

/// Clusters of a full qcow2 image beside its data, in bytes.
fn metadata_size(o: &CreateOptions, size: u64) -> u64 {
    let cluster = o.cluster_size;
    let clusters = size.div_ceil(cluster);
    let entry = if o.extended_l2 { 16 } else { 8 };
    // Whole L2 tables, a whole L1 table, the header.
    let l2 = (clusters.next_multiple_of(cluster / entry)) * entry;
    let l1 = ((l2 / cluster).next_multiple_of(cluster / 8)) * 8;
    let fixed = cluster + l2 + l1;
    // Refcounts count themselves.
    let used = fixed / cluster + clusters;
    let per = cluster * 8 / u64::from(o.refcount_bits);
    let (mut blocks, mut table) = (0, 0);
    loop {
        let b = (used + blocks + table).div_ceil(per);
        let t = (b * 8).div_ceil(cluster);
        if (b, t) == (blocks, table) {
            break;
        }
        (blocks, table) = (b, t);
    }
    fixed + (blocks + table) * cluster
}

/// Bytes in clusters of `cluster` bytes that hold something else than zeroes for certain.
fn data_size(disk: &dyn BlockBackend, cluster: u64) -> io::Result<u64> {
    let (mut at, mut sum, mut counted) = (0, 0, 0);
    while at < disk.size() {
        let s = disk.status(at, disk.size() - at)?;
        if !s.zero && s.data {
            // A cluster that two pieces share counts once.
            let (from, to) = (at / cluster * cluster, (at + s.len).next_multiple_of(cluster));
            sum += to - from.max(counted);
            counted = to;
        }
        at += s.len;
    }
    Ok(sum)
}

pub fn run(arguments: &[String], s: &mut Streams<'_>) -> Done {
    let p = parse(arguments, &["U", "image-opts"], &["f", "O", "o", "l", "s", "size", "output", "object"])?;
    let as_json = p.json()?;
    let format = open::new_format(p.value("O"))?;
    let new = New::from_options(format, &pairs(p.values("o"))?)?;
    let size = p.value("size").or(p.value("s")).map(size::parse).transpose()?;
    let mut bitmaps = None;
    let source: Option<Arc<dyn BlockBackend>> = match (p.rest.as_slice(), size) {
        ([], Some(_)) => None,
        ([text], None) => {
            let (path, name) = open::name(text, p.value("f"), &p, "image-opts")?;
            let how = How::reading(name.as_deref());
            let alone = |o| ringfort_block::ImageOptions { backing: false, ..o };
            if format == Format::Qcow2
                && let Some(q) = open::qcow2(&path, &how, alone, &p)?
                && q.header().version >= 3
            {
                bitmaps = Some(q.bitmaps_size(new.qcow2.cluster_size)?);
            }
            Some(match p.value("l") {
                Some(key) => open::snapshot(&path, &how, key, &p)?,
                None => open::image(&path, &how, &p)?.0,
            })
        }
        ([_], Some(_)) => return Err(Failure::new("--size N cannot be used together with a filename")),
        ([], None) => return Err(Failure::new("Either --size N or one filename must be specified")),
        _ => return Err(Failure::new("At most one filename argument is allowed.")),
    };
    let bytes = source.as_ref().map_or(size.unwrap_or(0), |d| d.size());
    let (required, full) = if format == Format::Qcow2 {
        let o = &new.qcow2;
        CreateOptions { size: bytes, ..o.clone() }.header().map_err(Failure::new)?;
        let all = bytes.next_multiple_of(o.cluster_size);
        let full = metadata_size(o, bytes) + all;
        let data = match &source {
            _ if matches!(new.preallocation, Preallocation::Falloc | Preallocation::Full) => all,
            // A backing file may hide what the source holds: all of it may be needed.
            Some(_) if o.backing.is_some() => all,
            Some(d) => data_size(&**d, o.cluster_size)?,
            None => 0,
        };
        (full - all + data, full)
    } else {
        let whole = bytes.next_multiple_of(512);
        (whole, whole)
    };
    if as_json {
        let mut v = json!({ "required": required, "fully-allocated": full });
        if let Some(b) = bitmaps {
            v["bitmaps"] = b.into();
        }
        json::write(s.out, &v)?;
    } else {
        writeln!(s.out, "required size: {required}\nfully allocated size: {full}")?;
        if let Some(b) = bitmaps {
            writeln!(s.out, "bitmaps size: {b}")?;
        }
    }
    Ok(0)
}
