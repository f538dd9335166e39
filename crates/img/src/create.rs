//! `create`, and the options of new images that `convert` takes as well.

use crate::args::{pairs, parse, switch};
use crate::{Done, Failure, Streams, open, size};
use ringfort_block::format::qcow2::header::Compression;
use ringfort_block::format::qcow2::{self, CreateOptions};
use ringfort_block::format::{detect, relative_to};
use ringfort_block::storage::{FileStorage, NewFile, StorageOptions};
use ringfort_block::{Format, ImageOptions, open_image};
use std::path::Path;

/// What a new image is to be.
pub struct New {
    pub format: Format,
    pub size: Option<u64>,
    pub qcow2: CreateOptions,
}

impl New {
    /// From `-o` and the letters beside it.
    pub fn from_options(format: Format, options: &[(String, String)]) -> Result<New, Failure> {
        let mut n = New { format, size: None, qcow2: CreateOptions::default() };
        for (k, v) in options {
            let q = &mut n.qcow2;
            match (k.as_str(), format) {
                ("size", _) => n.size = Some(size::parse(v)?),
                ("preallocation", _) if v == "off" => {}
                ("preallocation", _) => {
                    return Err(Failure::new(format!(
                        "preallocation={v} is not supported yet; there is off"
                    )));
                }
                ("compat", Format::Qcow2) => {
                    q.version = match v.as_str() {
                        "0.10" | "v2" => 2,
                        "1.1" | "v3" => 3,
                        _ => {
                            return Err(Failure::new(format!(
                                "Invalid parameter '{v}': compat is 0.10 or 1.1"
                            )));
                        }
                    };
                }
                ("cluster_size", Format::Qcow2) => q.cluster_size = size::parse(v)?,
                ("refcount_bits", Format::Qcow2) => {
                    q.refcount_bits =
                        v.parse().map_err(|_| Failure::new("Parameter 'refcount_bits' expects a number"))?;
                }
                ("lazy_refcounts", Format::Qcow2) => q.lazy_refcounts = switch(k, v)?,
                ("extended_l2", Format::Qcow2) => q.extended_l2 = switch(k, v)?,
                ("compression_type", Format::Qcow2) => {
                    q.compression = match v.as_str() {
                        "zlib" => Compression::Zlib,
                        "zstd" => Compression::Zstd,
                        _ => {
                            return Err(Failure::new(format!(
                                "Invalid parameter '{v}': compression_type is zlib or zstd"
                            )));
                        }
                    };
                }
                ("backing_file", Format::Qcow2) => q.backing = Some(v.clone()),
                ("backing_fmt", Format::Qcow2) => q.backing_format = Some(v.clone()),
                ("data_file", Format::Qcow2) => q.data_file = Some(v.clone()),
                ("data_file_raw", Format::Qcow2) => q.data_file_raw = switch(k, v)?,
                _ => return Err(Failure::new(format!("Invalid parameter '{k}'"))),
            }
        }
        Ok(n)
    }

    /// What the new image is like, in qemu-img's words.
    pub fn describe(&self, bytes: u64) -> String {
        let q = &self.qcow2;
        let on = |b: bool| if b { "on" } else { "off" };
        match self.format {
            Format::Raw => format!("fmt=raw size={bytes}"),
            Format::Qcow2 => {
                let mut t = String::from("fmt=qcow2");
                if q.version == 2 {
                    t += " compat=0.10";
                }
                t += &format!(
                    " cluster_size={} extended_l2={} compression_type={} size={bytes}",
                    q.cluster_size,
                    on(q.extended_l2),
                    q.compression.name()
                );
                for (k, v) in [
                    ("backing_file", &q.backing),
                    ("backing_fmt", &q.backing_format),
                    ("data_file", &q.data_file),
                ] {
                    if let Some(v) = v {
                        t += &format!(" {k}={v}");
                    }
                }
                t + &format!(" lazy_refcounts={} refcount_bits={}", on(q.lazy_refcounts), q.refcount_bits)
            }
        }
    }

    /// Lay it out in a new file; the caller gives it its name.
    pub fn lay_out(&self, path: &str, bytes: u64) -> Result<NewFile, Failure> {
        if let (Format::Qcow2, Some(data)) = (self.format, &self.qcow2.data_file) {
            let data = relative_to(Path::new(path), data);
            std::fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .open(&data)
                .map_err(|e| Failure::new(format!("{}: {e}", data.display())))?;
            let options = StorageOptions { read_only: false, direct: false, lock: true };
            let file = FileStorage::open_any_size(&data, options)?;
            file.resize(0)?;
            file.resize(bytes)?;
        }
        let new = NewFile::create(Path::new(path))?;
        let file = new.storage()?;
        match self.format {
            Format::Raw => file.resize(bytes)?,
            Format::Qcow2 => {
                let options = CreateOptions { size: bytes, ..self.qcow2.clone() };
                qcow2::create(&file, &options).map_err(|e| Failure::new(format!("{path}: {e}")))?;
            }
        }
        Ok(new)
    }
}

pub fn run(arguments: &[String], s: &mut Streams<'_>) -> Done {
    let p = parse(arguments, &["q", "u"], &["f", "b", "F", "o"])?;
    let format = open::format(p.value("f"))?.unwrap_or(Format::Raw);
    let (path, given) = match p.rest.as_slice() {
        [path] => (path, None),
        [path, bytes] => (path, Some(size::parse(bytes)?)),
        _ => return Err(Failure::new("Expecting image file name and size")),
    };
    let mut new = New::from_options(format, &pairs(p.values("o"))?)
        .map_err(|f| Failure::new(format!("{path}: {}", f.message)))?;
    if let Some(b) = p.value("b") {
        new.qcow2.backing = Some(b.into());
    }
    if let Some(f) = p.value("F") {
        new.qcow2.backing_format = Some(f.into());
    }
    let mut bytes = given.or(new.size);
    if let Some(name) = &new.qcow2.backing {
        if format == Format::Raw {
            return Err(Failure::new(format!("{path}: Backing file not supported for file format 'raw'")));
        }
        let below = relative_to(Path::new(path), name);
        match &new.qcow2.backing_format {
            None => {
                let options = StorageOptions { read_only: true, direct: false, lock: false };
                let found = FileStorage::open(&below, options).ok().and_then(|f| detect(&f).ok());
                let hint =
                    found.map_or(String::new(), |f| format!("; it looks like {0}: add -F {0}", f.name()));
                return Err(Failure::new(format!(
                    "{path}: Backing file specified without backing format{hint}"
                )));
            }
            Some(f) if !p.has("u") => {
                let options = ImageOptions {
                    format: open::format(Some(f))?,
                    read_only: true,
                    ..ImageOptions::default()
                };
                let disk = open_image(&below, &options)?;
                bytes = bytes.or(Some(disk.size()));
            }
            Some(f) => {
                open::format(Some(f))?;
            }
        }
    }
    let bytes =
        bytes.ok_or_else(|| Failure::new(format!("{path}: Image creation needs a size parameter")))?;
    let bytes = bytes.next_multiple_of(512);
    if !p.has("q") {
        writeln!(s.out, "Formatting '{path}', {}", new.describe(bytes))?;
    }
    new.lay_out(path, bytes)?.publish()?;
    Ok(0)
}
