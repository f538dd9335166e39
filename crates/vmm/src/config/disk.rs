//! `--disk`: one disk of a machine.

use super::parse::{split, switch};
use super::{ParseError, parse_size};
use ringfort_block::aio::Aio;
use ringfort_block::node::{Bucket, CacheMode, ThrottleConfig};
use ringfort_virtio::blk::OnError;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::str::FromStr;

/// The format of a disk image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// The file's bytes are the disk's.
    Raw,
    /// QEMU's qcow2, with its backing files.
    Qcow2,
}

/// What becomes of space that the guest gives back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Discard {
    /// It stays allocated.
    #[default]
    Ignore,
    /// The host gets it back.
    Unmap,
}

/// One disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// File or block device.
    pub path: PathBuf,
    /// Image format; found out if not given.
    #[serde(default)]
    pub format: Option<DiskFormat>,
    /// The guest may not write.
    #[serde(default)]
    pub readonly: bool,
    /// Writes go to a throw-away layer.
    #[serde(default)]
    pub snapshot: bool,
    /// What the guest reads as serial number; at most 20 bytes.
    #[serde(default)]
    pub serial: Option<String>,
    /// Request queues; by default one per vCPU, at most 4.
    #[serde(default)]
    pub queues: Option<u16>,
    /// How the host caches it.
    #[serde(default)]
    pub cache: CacheMode,
    /// What becomes of space that the guest gives back.
    #[serde(default)]
    pub discard: Discard,
    /// How requests that wait for the host are done; by default io_uring where the host has it.
    #[serde(default)]
    pub aio: Option<Aio>,
    /// Limits of speed.
    #[serde(default)]
    pub throttle: ThrottleConfig,
    /// What becomes of writes that fail on the host; by default the machine stops when the host has no space, and the guest
    /// gets an error otherwise.
    #[serde(default)]
    pub werror: Option<OnError>,
    /// What becomes of reads that fail on the host; by default the guest gets an error.
    #[serde(default)]
    pub rerror: Option<OnError>,
}

const KNOWN: &str = "path, format, readonly, snapshot, cache, discard, aio, queues, serial, werror, rerror, \
                     bps, iops (also with _rd or _wr, and _max and _max_length behind that), iops_size";

impl Disk {
    /// The disk in `path`, with defaults for the rest.
    pub fn new(path: PathBuf) -> Disk {
        Disk {
            path,
            format: None,
            readonly: false,
            snapshot: false,
            serial: None,
            queues: None,
            cache: CacheMode::default(),
            discard: Discard::default(),
            aio: None,
            throttle: ThrottleConfig::default(),
            werror: None,
            rerror: None,
        }
    }

    /// What is wrong with it, by field.
    pub(super) fn validate(&self, problem: &mut dyn FnMut(&str, String)) {
        if self.serial.as_ref().is_some_and(|s| s.len() > 20 || s.contains(|c: char| c.is_control())) {
            problem("serial", "give at most 20 printable bytes".into());
        }
        if self.queues.is_some_and(|q| q == 0 || q > 16) {
            problem("queues", "give 1 to 16".into());
        }
        if let Err(e) = self.throttle.validate() {
            problem("throttle", e);
        }
        if self.rerror == Some(OnError::Enospc) {
            problem("rerror", "reads need no space: give report, stop or ignore".into());
        }
    }

    /// A limit of speed by its name in QEMU's `-drive`, old or new: `bps_rd_max`, `throttling.bps-read-max`.
    fn limit(&mut self, key: &str) -> Option<&mut u64> {
        let t = &mut self.throttle;
        let plain = match key.strip_prefix("throttling.") {
            Some(new) => {
                new.replace('-', "_").replace("_total", "").replace("_read", "_rd").replace("_write", "_wr")
            }
            None => key.to_owned(),
        };
        if plain == "iops_size" {
            return Some(&mut t.iops_size);
        }
        let (rest, field): (&str, fn(&mut Bucket) -> &mut u64) =
            if let Some(r) = plain.strip_suffix("_max_length") {
                (r, |b| &mut b.length)
            } else if let Some(r) = plain.strip_suffix("_max") {
                (r, |b| &mut b.max)
            } else {
                (&plain, |b| &mut b.avg)
            };
        let bucket = match rest {
            "bps" => &mut t.bps,
            "bps_rd" => &mut t.bps_rd,
            "bps_wr" => &mut t.bps_wr,
            "iops" => &mut t.iops,
            "iops_rd" => &mut t.iops_rd,
            "iops_wr" => &mut t.iops_wr,
            _ => return None,
        };
        Some(field(bucket))
    }
}

fn on_error(key: &str, value: &str) -> Result<OnError, ParseError> {
    Ok(match value {
        "report" => OnError::Report,
        "ignore" => OnError::Ignore,
        "stop" => OnError::Stop,
        "enospc" if key == "werror" => OnError::Enospc,
        _ => {
            let also = if key == "werror" { ", enospc" } else { "" };
            return Err(ParseError(format!("{key}={value}: give report, stop, ignore{also}")));
        }
    })
}

impl FromStr for Disk {
    type Err = ParseError;

    /// `path=F[,key=value…]`, or a path first.
    fn from_str(text: &str) -> Result<Disk, ParseError> {
        let mut disk = Disk::new(PathBuf::new());
        for (n, part) in split(text).iter().enumerate() {
            let (key, value) = match part.split_once('=') {
                Some((k, v)) => (k, Some(v)),
                None if n == 0 && !matches!(part.as_str(), "readonly" | "snapshot") => {
                    ("path", Some(part.as_str()))
                }
                None => (part.as_str(), None),
            };
            let need =
                || value.filter(|v| !v.is_empty()).ok_or_else(|| ParseError(format!("{key} needs a value")));
            match key {
                "path" | "file" => disk.path = need()?.into(),
                "format" => {
                    disk.format = Some(match need()? {
                        "raw" => DiskFormat::Raw,
                        "qcow2" => DiskFormat::Qcow2,
                        other => {
                            return Err(ParseError(format!("format={other}: the formats are raw and qcow2")));
                        }
                    });
                }
                "readonly" => disk.readonly = switch(key, value)?,
                "snapshot" => disk.snapshot = switch(key, value)?,
                "serial" => disk.serial = Some(need()?.into()),
                "cache" => disk.cache = need()?.parse().map_err(ParseError)?,
                "aio" => disk.aio = Some(need()?.parse().map_err(ParseError)?),
                "discard" => {
                    disk.discard = match need()? {
                        "ignore" | "off" => Discard::Ignore,
                        "unmap" | "on" => Discard::Unmap,
                        other => {
                            return Err(ParseError(format!("discard={other}: give ignore or unmap")));
                        }
                    };
                }
                "werror" => disk.werror = Some(on_error(key, need()?)?),
                "rerror" => disk.rerror = Some(on_error(key, need()?)?),
                "queues" => {
                    let v = need()?;
                    let n = v
                        .parse()
                        .map_err(|_| ParseError(format!("queues={v}: give a number from 1 to 16")))?;
                    disk.queues = Some(n);
                }
                _ => {
                    let Some(limit) = disk.limit(key) else {
                        return Err(ParseError(format!("unknown disk option '{key}'; known are {KNOWN}")));
                    };
                    let v = need()?;
                    *limit = parse_size(v, 1).map_err(|e| ParseError(format!("{key}={v}: {e}")))?;
                }
            }
        }
        if disk.path.as_os_str().is_empty() {
            return Err(ParseError("a disk needs path=FILE".into()));
        }
        Ok(disk)
    }
}

/// What is wrong with `disks`, by field.
pub(super) fn problems(disks: &[Disk]) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for (n, d) in disks.iter().enumerate() {
        d.validate(&mut |field, what| found.push((format!("disks[{n}].{field}"), what)));
        if disks[..n].iter().any(|o| o.path == d.path && !(o.readonly && d.readonly)) {
            let path = d.path.display();
            let what = format!("{path} is given twice; a disk that is written can be used once");
            found.push((format!("disks[{n}].path"), what));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks() {
        let d: Disk = "path=/a,,b=c.img,format=raw,readonly=on,serial=X1".parse().unwrap();
        assert_eq!(d.path, PathBuf::from("/a,b=c.img"));
        assert!(d.readonly && !d.snapshot && d.serial.as_deref() == Some("X1"));
        let d: Disk = "disk.img,snapshot".parse().unwrap();
        assert!(d.snapshot && d.path == *"disk.img");
        let d: Disk =
            "d,cache=none,aio=threads,discard=unmap,werror=stop,rerror=ignore,queues=2".parse().unwrap();
        assert_eq!((d.cache, d.aio, d.discard), (CacheMode::None, Some(Aio::Threads), Discard::Unmap));
        assert_eq!((d.werror, d.rerror, d.queues), (Some(OnError::Stop), Some(OnError::Ignore), Some(2)));
        for (bad, says) in [
            ("", "needs"),
            ("format=raw", "path"),
            ("path=", "value"),
            ("path=x,format=qcow9", "raw and qcow2"),
            ("path=x,readonly=maybe", "on or off"),
            ("path=x,colour=red", "unknown disk option 'colour'"),
            ("path=x,queues=many", "number"),
            ("path=x,cache=big", "writethrough"),
            ("path=x,aio=posix", "io_uring or threads"),
            ("path=x,discard=maybe", "ignore or unmap"),
            ("path=x,werror=panic", "enospc"),
            ("path=x,rerror=enospc", "report, stop, ignore"),
            ("path=x,iops=fast", "iops=fast"),
            ("path=x,iops_rd_min=5", "unknown disk option"),
        ] {
            let e = bad.parse::<Disk>().unwrap_err().to_string();
            assert!(e.contains(says), "{bad}: {e}");
        }
    }

    #[test]
    fn limits_by_their_old_and_new_names() {
        let old: Disk = "d,bps=10M,iops_rd=100,iops_rd_max=500,iops_rd_max_length=60,iops_wr=7,iops_size=4K"
            .parse()
            .unwrap();
        let new: Disk =
            "d,throttling.bps-total=10485760,throttling.iops-read=100,throttling.iops-read-max=500,\
                         throttling.iops-read-max-length=60,throttling.iops-write=7,throttling.iops-size=4096"
                .parse()
                .unwrap();
        assert_eq!(old, new);
        let t = old.throttle;
        assert_eq!((t.bps.avg, t.iops_wr.avg, t.iops_size), (10 << 20, 7, 4096));
        assert_eq!(t.iops_rd, Bucket { avg: 100, max: 500, length: 60 });
        let mut told = Vec::new();
        let bad: Disk = "d,iops=5,iops_rd=5,queues=99".parse().unwrap();
        bad.validate(&mut |field, what| told.push(format!("{field}: {what}")));
        assert!(
            told[0].starts_with("queues: ") && told[1].starts_with("throttle: iops limits both"),
            "{told:?}"
        );
    }
}
