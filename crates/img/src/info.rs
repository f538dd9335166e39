//! `info`.

use crate::args::parse;
use crate::{Done, Failure, Streams, open, size, snapshot};
use ringfort_block::format::qcow2::header::{
    AUTOCLEAR_RAW_DATA, COMPAT_LAZY, Header, INCOMPAT_CORRUPT, INCOMPAT_DIRTY,
};
use ringfort_block::format::qcow2::snapshot as qcow2_snapshot;
use ringfort_block::format::{Qcow2, detect, relative_to};
use ringfort_block::{Format, ImageOptions};
use serde_json::{Map, Value, json};

/// Longest chain shown.
const MAX_CHAIN: usize = 128;

struct Facts {
    path: String,
    format: Format,
    virtual_size: u64,
    actual: u64,
    qcow2: Option<(Header, Vec<qcow2_snapshot::Snapshot>)>,
}

pub fn run(arguments: &[String], s: &mut Streams<'_>) -> Done {
    let p = parse(arguments, &["U", "backing-chain"], &["f", "output"])?;
    let json = p.json()?;
    let path = p.one_file()?;
    let mut list: Vec<Facts> = Vec::new();
    let mut next = Some((path.to_owned(), open::format(p.value("f"))?));
    let mut seen = Vec::new();
    while let Some((path, format)) = next.take() {
        let file = open::storage(&path, true, &p)?;
        let identity = file.identity()?;
        if seen.contains(&identity) || seen.len() >= MAX_CHAIN {
            return Err(Failure::new(format!("Backing file '{path}' creates an infinite loop.")));
        }
        seen.push(identity);
        let format = match format {
            Some(f) => f,
            None => detect(&file)?,
        };
        let actual = file.allocated()?;
        let facts = match format {
            Format::Raw => {
                Facts { path, format, virtual_size: file.len().next_multiple_of(512), actual, qcow2: None }
            }
            Format::Qcow2 => {
                let header = Header::read(&file)?;
                let data = header.data_file.clone();
                let options =
                    ImageOptions { backing: false, repairing: true, ..open::options(format, true, &p) };
                let q = match data {
                    // What is asked for stands in the image itself.
                    Some(_) => Qcow2::with_backing(file, header, None, &options)?,
                    None => Qcow2::open(file, &options)?,
                };
                let header = q.header();
                if let (Some(name), true) = (&header.backing, p.has("backing-chain")) {
                    let below = relative_to(q.path(), name).to_string_lossy().into_owned();
                    next = Some((below, open::format(header.backing_format.as_deref())?));
                }
                Facts {
                    path,
                    format,
                    virtual_size: header.size,
                    actual,
                    qcow2: Some((header, q.snapshots()?)),
                }
            }
        };
        list.push(facts);
    }
    if json {
        let all: Vec<Value> = list.iter().map(to_json).collect();
        let value = if p.has("backing-chain") {
            Value::Array(all)
        } else {
            all.into_iter().next().unwrap_or(Value::Null)
        };
        // Four spaces, as qemu-img writes it.
        let mut text = Vec::new();
        let form = serde_json::ser::PrettyFormatter::with_indent(b"    ");
        let mut w = serde_json::Serializer::with_formatter(&mut text, form);
        serde::Serialize::serialize(&value, &mut w).map_err(|e| Failure::new(e.to_string()))?;
        text.push(b'\n');
        s.out.write_all(&text)?;
    } else {
        let all: Vec<String> = list.iter().map(to_text).collect();
        s.out.write_all(all.join("\n").as_bytes())?;
    }
    Ok(0)
}

fn to_text(f: &Facts) -> String {
    let mut t = format!(
        "image: {}\nfile format: {}\nvirtual size: {} ({} bytes)\ndisk size: {}\n",
        f.path,
        f.format.name(),
        size::human(f.virtual_size),
        f.virtual_size,
        size::human(f.actual)
    );
    let Some((h, snapshots)) = &f.qcow2 else { return t };
    if h.incompatible & INCOMPAT_DIRTY != 0 {
        t += "cleanly shut down: no\n";
    }
    t += &format!("cluster_size: {}\n", h.cluster_size());
    if let Some(b) = &h.backing {
        let full = relative_to(std::path::Path::new(&f.path), b);
        t += &format!("backing file: {b}");
        if full.as_os_str() != b.as_str() {
            t += &format!(" (actual path: {})", full.display());
        }
        t += "\n";
        if let Some(fmt) = &h.backing_format {
            t += &format!("backing file format: {fmt}\n");
        }
    }
    if !snapshots.is_empty() {
        t += &snapshot::list(snapshots);
    }
    t += "Format specific information:\n";
    if h.version == 2 {
        return t + &format!(
            "    compat: 0.10\n    compression type: zlib\n    refcount bits: {}\n",
            h.refcount_bits()
        );
    }
    t += &format!(
        "    compat: 1.1\n    compression type: {}\n    lazy refcounts: {}\n    refcount bits: {}\n",
        h.compression.name(),
        h.compatible & COMPAT_LAZY != 0,
        h.refcount_bits()
    );
    if let Some(d) = &h.data_file {
        t += &format!("    data file: {d}\n    data file raw: {}\n", h.autoclear & AUTOCLEAR_RAW_DATA != 0);
    }
    t + &format!(
        "    corrupt: {}\n    extended l2: {}\n",
        h.incompatible & INCOMPAT_CORRUPT != 0,
        h.extended_l2()
    )
}

fn to_json(f: &Facts) -> Value {
    let mut m = Map::new();
    m.insert("virtual-size".into(), f.virtual_size.into());
    m.insert("filename".into(), f.path.clone().into());
    m.insert("format".into(), f.format.name().into());
    m.insert("actual-size".into(), f.actual.into());
    let mut dirty = false;
    if let Some((h, snapshots)) = &f.qcow2 {
        dirty = h.incompatible & INCOMPAT_DIRTY != 0;
        m.insert("cluster-size".into(), h.cluster_size().into());
        if let Some(b) = &h.backing {
            m.insert("backing-filename".into(), b.clone().into());
            let full = relative_to(std::path::Path::new(&f.path), b);
            m.insert("full-backing-filename".into(), full.to_string_lossy().into_owned().into());
            if let Some(fmt) = &h.backing_format {
                m.insert("backing-filename-format".into(), fmt.clone().into());
            }
        }
        if !snapshots.is_empty() {
            m.insert("snapshots".into(), snapshots.iter().map(snapshot::to_json).collect());
        }
        let mut data = json!({
            "compat": if h.version == 2 { "0.10" } else { "1.1" },
            "compression-type": h.compression.name(),
            "refcount-bits": h.refcount_bits(),
        });
        if h.version == 3 {
            data["lazy-refcounts"] = (h.compatible & COMPAT_LAZY != 0).into();
            data["corrupt"] = (h.incompatible & INCOMPAT_CORRUPT != 0).into();
            data["extended-l2"] = h.extended_l2().into();
            if let Some(d) = &h.data_file {
                data["data-file"] = d.clone().into();
                data["data-file-raw"] = (h.autoclear & AUTOCLEAR_RAW_DATA != 0).into();
            }
        }
        m.insert("format-specific".into(), json!({ "type": "qcow2", "data": data }));
    }
    m.insert("dirty-flag".into(), dirty.into());
    Value::Object(m)
}
