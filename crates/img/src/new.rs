//! New images: the options of `-o` that `create`, `convert` and `measure` take, and laying an image out.

use crate::args::{Cache, switch};
use crate::{Failure, size};
use ringfort_block::format::qcow2::header::{Compression, Header};
use ringfort_block::format::qcow2::{self, CreateOptions, Preallocation};
use ringfort_block::format::{Qcow2, relative_to};
use ringfort_block::node::Joint;
use ringfort_block::storage::{FileStorage, NewFile, StorageOptions};
use ringfort_block::{BlockBackend, Format, ImageOptions, SharedSlice, open_image, open_storage_image};
use std::path::Path;
use std::sync::Arc;

/// What a new image is to be.
pub struct New {
    pub format: Format,
    pub size: Option<u64>,
    pub qcow2: CreateOptions,
    pub preallocation: Preallocation,
}

/// Files that get their names when they are complete.
pub struct Made {
    image: NewFile,
    data: Option<NewFile>,
    cache: Cache,
}

/// A new image, open.
pub enum Opened {
    Raw(Arc<dyn BlockBackend>),
    Qcow2(Box<Qcow2>),
}

impl Opened {
    pub fn disk(&self) -> &dyn BlockBackend {
        match self {
            Opened::Raw(d) => &**d,
            Opened::Qcow2(q) => &**q,
        }
    }

    pub fn close(self) -> Result<(), Failure> {
        match self {
            Opened::Raw(d) => d.flush()?,
            Opened::Qcow2(q) => q.close()?,
        }
        Ok(())
    }
}

impl New {
    /// From `-o` and the letters beside it.
    pub fn from_options(format: Format, options: &[(String, String)]) -> Result<New, Failure> {
        let mut n =
            New { format, size: None, qcow2: CreateOptions::default(), preallocation: Preallocation::Off };
        for (k, v) in options {
            let q = &mut n.qcow2;
            match (k.as_str(), format) {
                ("size", _) => n.size = Some(size::parse(v)?),
                ("preallocation", _) => {
                    n.preallocation = v.parse().map_err(|()| {
                        Failure::new(format!(
                            "Invalid parameter '{v}': preallocation is off, metadata, falloc or full"
                        ))
                    })?;
                    if format == Format::Raw && n.preallocation == Preallocation::Metadata {
                        return Err(Failure::new("Unsupported preallocation mode 'metadata'"));
                    }
                }
                ("compat", Format::Qcow2) => q.version = version(v)?,
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
                (name, Format::Qcow2) if name == "encryption" || name.starts_with("encrypt.") => {
                    if name == "encryption" && !switch(k, v)? {
                        continue;
                    }
                    return Err(Failure::new(format!("{k}: encrypted images are not supported")));
                }
                _ => return Err(Failure::new(format!("Invalid parameter '{k}'"))),
            }
        }
        if n.qcow2.data_file_raw && n.preallocation == Preallocation::Off {
            // The data file is only the same disk by itself if every cluster has its place.
            n.preallocation = Preallocation::Metadata;
        }
        Ok(n)
    }

    /// Refuse what does not go together before anything is made.
    pub fn check(&self, bytes: u64) -> Result<(), String> {
        if self.format == Format::Qcow2 {
            CreateOptions { size: bytes, ..self.qcow2.clone() }.header()?;
            if self.preallocation != Preallocation::Off
                && self.qcow2.backing.is_some()
                && !self.qcow2.extended_l2
            {
                return Err(
                    "Backing file and preallocation can only be used at the same time if extended_l2 is enabled"
                        .into(),
                );
            }
        }
        Ok(())
    }

    /// What the new image is like, in qemu-img's words.
    pub fn describe(&self, bytes: u64) -> String {
        let q = &self.qcow2;
        let on = |b: bool| if b { "on" } else { "off" };
        let preallocation = match self.preallocation {
            Preallocation::Off => String::new(),
            p => format!(" preallocation={}", p.name()),
        };
        if self.format != Format::Qcow2 {
            return format!("fmt={} size={bytes}{preallocation}", self.format.name());
        }
        let mut t = String::from("fmt=qcow2");
        if q.version == 2 {
            t += " compat=0.10";
        }
        t += &format!(
            " cluster_size={} extended_l2={}{preallocation} compression_type={} size={bytes}",
            q.cluster_size,
            on(q.extended_l2),
            q.compression.name()
        );
        let names =
            [("backing_file", &q.backing), ("backing_fmt", &q.backing_format), ("data_file", &q.data_file)];
        for (k, v) in names {
            if let Some(v) = v {
                t += &format!(" {k}={v}");
            }
        }
        if q.data_file_raw {
            t += " data_file_raw=on";
        }
        t + &format!(" lazy_refcounts={} refcount_bits={}", on(q.lazy_refcounts), q.refcount_bits)
    }

    /// Lay it out in new files, which the caller names when they are filled. `backed` opens what it stands on.
    pub fn lay_out(
        &self,
        path: &str,
        bytes: u64,
        cache: Cache,
        backed: bool,
    ) -> Result<(Made, Opened), Failure> {
        let fail = |e: String| Failure::new(format!("{path}: {e}"));
        self.check(bytes).map_err(fail)?;
        let image = NewFile::create(Path::new(path))?;
        let file = open_new(&image, cache)?;
        if self.format != Format::Qcow2 {
            match self.preallocation {
                Preallocation::Falloc => file.reserve(bytes).map_err(|e| fail(e.to_string()))?,
                Preallocation::Full => fill(&file, 0, bytes)?,
                _ => {}
            }
            let long = |e| fail(format!("cannot make it {bytes} bytes long: {e}"));
            file.resize(bytes).map_err(long)?;
            let options = ImageOptions { format: Some(self.format), lock: false, ..ImageOptions::default() };
            let disk = open_storage_image(file, &options)?;
            return Ok((Made { image, data: None, cache }, Opened::Raw(disk)));
        }
        let options = CreateOptions { size: bytes, ..self.qcow2.clone() };
        qcow2::create(&file, &options).map_err(|e| fail(e.to_string()))?;
        let data = match &self.qcow2.data_file {
            // Relative names start at the working folder here, as in QEMU.
            Some(name) => Some(NewFile::create(Path::new(name))?),
            None => None,
        };
        let data_file = match &data {
            Some(d) => {
                let file = open_new(d, cache)?;
                file.resize(bytes)
                    .map_err(|e| fail(format!("cannot make its data file {bytes} bytes long: {e}")))?;
                Some(file)
            }
            None => None,
        };
        let below = match &self.qcow2.backing {
            Some(name) if backed => {
                let format = self.qcow2.backing_format.as_deref();
                let options = ImageOptions {
                    format: crate::open::format(format)?,
                    read_only: true,
                    ..ImageOptions::default()
                };
                Some(Arc::new(Joint::new(open_image(&relative_to(Path::new(path), name), &options)?)))
            }
            _ => None,
        };
        let header = Header::read(&file)?;
        let options = ImageOptions { format: Some(Format::Qcow2), lock: false, ..ImageOptions::default() };
        let q = Qcow2::with_files(file, header, data_file, below, &options)?;
        q.preallocate(0, bytes, self.preallocation).map_err(|e| fail(e.to_string()))?;
        Ok((Made { image, data, cache }, Opened::Qcow2(Box::new(q))))
    }
}

fn open_new(file: &NewFile, cache: Cache) -> Result<FileStorage, Failure> {
    let storage = if cache.direct { file.direct_storage()? } else { file.storage()? };
    Ok(if cache.syncs { storage } else { storage.without_syncs() })
}

/// Write zeroes.
fn fill(file: &FileStorage, from: u64, to: u64) -> Result<(), Failure> {
    let zeroes = vec![0; 1 << 20];
    let mut at = from;
    while at < to {
        let n = (to - at).min(zeroes.len() as u64);
        file.write(&[SharedSlice::new(&zeroes[..n as usize])], at)?;
        at += n;
    }
    Ok(())
}

/// Give a raw image the space of its bytes from `from` on. Its lock is held by who calls.
pub fn preallocate_raw(path: &str, from: u64, how: Preallocation) -> Result<(), Failure> {
    let options = StorageOptions { read_only: false, direct: false, lock: false };
    let file = FileStorage::open_any_size(Path::new(path), options)?;
    if how == Preallocation::Falloc {
        file.reserve(file.len())?
    } else {
        fill(&file, from, file.len())?
    }
    Ok(file.sync()?)
}

impl Made {
    /// Give the files their names: the data first, since the image needs it.
    pub fn publish(self) -> Result<(), Failure> {
        for file in [self.data, Some(self.image)].into_iter().flatten() {
            if self.cache.syncs { file.publish()? } else { file.publish_without_sync()? }
        }
        Ok(())
    }
}

/// A compatibility level.
pub fn version(text: &str) -> Result<u32, Failure> {
    match text {
        "0.10" | "v2" => Ok(2),
        "1.1" | "v3" => Ok(3),
        _ => Err(Failure::new(format!("Invalid parameter '{text}': compat is 0.10 or 1.1"))),
    }
}

/// What `-o help` says.
pub fn option_help(format: Format) -> String {
    let mut t = format!("Supported {} options:\n", format.name());
    let qcow2: &[(&str, &str)] = &[
        ("backing_file=<str>", "File name of a base image"),
        ("backing_fmt=<str>", "Image format of the base image"),
        ("cluster_size=<size>", "qcow2 cluster size"),
        ("compat=<str>", "Compatibility level (v2 [0.10] or v3 [1.1])"),
        ("compression_type=<str>", "Compression method used for image cluster compression (zlib, zstd)"),
        ("data_file=<str>", "File name of an external data file"),
        ("data_file_raw=<bool (on/off)>", "The external data file must stay valid as a raw image"),
        ("extended_l2=<bool (on/off)>", "Extended L2 tables"),
        ("lazy_refcounts=<bool (on/off)>", "Postpone refcount updates"),
        ("preallocation=<str>", "Preallocation mode (allowed values: off, metadata, falloc, full)"),
        ("refcount_bits=<num>", "Width of a reference count entry in bits"),
        ("size=<size>", "Virtual disk size"),
    ];
    let raw: &[(&str, &str)] = &[
        ("preallocation=<str>", "Preallocation mode (allowed values: off, falloc, full)"),
        ("size=<size>", "Virtual disk size"),
    ];
    for (name, what) in if format == Format::Qcow2 { qcow2 } else { raw } {
        t += &format!("  {name:<22} - {what}\n");
    }
    t
}

/// Whether `-o` asks for help.
pub fn wants_help<'a>(mut options: impl Iterator<Item = &'a str>) -> bool {
    options.any(|o| o.split(',').any(|w| w == "help" || w == "?"))
}
