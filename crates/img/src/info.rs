//! `info`.

use crate::args::parse;
use crate::{Done, Failure, Streams, json, open, size, snapshot};
use ringfort_block::format::qcow2::bitmap::Bitmap;
use ringfort_block::format::qcow2::header::{
    AUTOCLEAR_RAW_DATA, COMPAT_LAZY, Header, INCOMPAT_CORRUPT, INCOMPAT_DIRTY,
};
use ringfort_block::format::qcow2::snapshot::Snapshot;
use ringfort_block::format::{Qcow2, backing_of, detect, relative_to};
use ringfort_block::{Format, ImageOptions, open_storage_image};
use serde_json::{Map, Value, json};

/// Longest chain shown.
const MAX_CHAIN: usize = 128;

struct Facts {
    path: String,
    format: Format,
    virtual_size: u64,
    actual: u64,
    /// Bytes of the file.
    length: u64,
    qcow2: Option<Details>,
}

struct Details {
    header: Header,
    snapshots: Vec<Snapshot>,
    bitmaps: Vec<Bitmap>,
}

pub fn run(arguments: &[String], s: &mut Streams<'_>) -> Done {
    let p = parse(arguments, &["U", "backing-chain", "image-opts"], &["f", "output", "object"])?;
    let as_json = p.json()?;
    let (path, format) = open::name(p.one_file()?, p.value("f"), &p, "image-opts")?;
    let mut list: Vec<Facts> = Vec::new();
    let mut next = Some((path, open::format(format.as_deref())?));
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
        // In sectors, as qemu-img counts it.
        let (actual, length) = (file.allocated()?, file.len().next_multiple_of(512));
        let facts = match format {
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
                    let below = backing_of(q.path(), name)?.to_string_lossy().into_owned();
                    next = Some((below, open::format(header.backing_format.as_deref())?));
                }
                let virtual_size = header.size;
                let details = Details { header, snapshots: q.snapshots()?, bitmaps: q.bitmaps()? };
                Facts { path, format, virtual_size, actual, length, qcow2: Some(details) }
            }
            _ => {
                let disk = open_storage_image(file, &open::options(format, true, &p))?;
                Facts { path, format, virtual_size: disk.size(), actual, length, qcow2: None }
            }
        };
        list.push(facts);
    }
    if as_json {
        let all: Vec<Value> = list.iter().map(to_json).collect();
        let value = if p.has("backing-chain") {
            Value::Array(all)
        } else {
            all.into_iter().next().unwrap_or(Value::Null)
        };
        json::write(s.out, &value)?;
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
    if let Some(d) = &f.qcow2 {
        t += &qcow2_text(f, d);
    }
    t + &format!(
        "Child node '/file':\n    filename: {}\n    protocol type: file\n    file length: {} ({} bytes)\n    disk size: {}\n",
        f.path,
        size::human(f.length),
        f.length,
        size::human(f.actual)
    )
}

fn qcow2_text(f: &Facts, d: &Details) -> String {
    let h = &d.header;
    let mut t = String::new();
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
    if !d.snapshots.is_empty() {
        t += &snapshot::list(&d.snapshots);
    }
    t += "Format specific information:\n";
    if h.version == 2 {
        return t + &format!(
            "    compat: 0.10\n    compression type: zlib\n    refcount bits: {}\n",
            h.refcount_bits()
        );
    }
    t += &format!(
        "    compat: 1.1\n    compression type: {}\n    lazy refcounts: {}\n",
        h.compression.name(),
        h.compatible & COMPAT_LAZY != 0
    );
    if !d.bitmaps.is_empty() {
        t += "    bitmaps:\n";
        for (i, b) in d.bitmaps.iter().enumerate() {
            t += &format!("        [{i}]:\n            flags:\n");
            for (k, flag) in b.flag_names().iter().enumerate() {
                t += &format!("                [{k}]: {flag}\n");
            }
            t += &format!("            name: {}\n            granularity: {}\n", b.name, b.granularity());
        }
    }
    t += &format!("    refcount bits: {}\n", h.refcount_bits());
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
    // The file below, as versions 8.1 and later show it.
    let child = json!({
        "children": [], "virtual-size": f.length, "filename": f.path, "format": "file", "actual-size": f.actual,
        "format-specific": { "type": "file", "data": {} }, "dirty-flag": false,
    });
    m.insert("children".into(), json!([{ "name": "file", "info": child }]));
    let mut dirty = false;
    if let Some(Details { header: h, snapshots, bitmaps }) = &f.qcow2 {
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
            if !bitmaps.is_empty() {
                let one = |b: &Bitmap| json!({ "flags": b.flag_names(), "name": b.name, "granularity": b.granularity() });
                data["bitmaps"] = bitmaps.iter().map(one).collect();
            }
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
