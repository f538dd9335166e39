//! `key=value,key=value` options of the command line.

use super::{Accel, AccelOption, Disk, DiskFormat, Serial, Tier};
use std::path::PathBuf;
use std::str::FromStr;

/// What is wrong with an option's text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ParseError(pub String);

/// Split at single commas; a doubled comma is one literal comma, as in QEMU.
pub(super) fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let last = parts.len() - 1;
        if c != ',' {
            parts[last].push(c);
        } else if chars.next_if_eq(&',').is_some() {
            parts[last].push(',');
        } else {
            parts.push(String::new());
        }
    }
    parts
}

/// `on`/`off` and their synonyms; a bare key means on.
pub(super) fn switch(key: &str, value: Option<&str>) -> Result<bool, ParseError> {
    match value {
        None | Some("on" | "yes" | "true" | "1") => Ok(true),
        Some("off" | "no" | "false" | "0") => Ok(false),
        Some(v) => Err(ParseError(format!("{key}={v}: give on or off"))),
    }
}

impl FromStr for Disk {
    type Err = ParseError;

    /// `path=F[,format=raw|qcow2][,readonly=on][,snapshot=on][,serial=S][,queues=N]`, or just a path.
    fn from_str(text: &str) -> Result<Disk, ParseError> {
        let mut disk = Disk {
            path: PathBuf::new(),
            format: None,
            readonly: false,
            snapshot: false,
            serial: None,
            queues: None,
        };
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
                "queues" => {
                    let v = need()?;
                    let n = v
                        .parse()
                        .map_err(|_| ParseError(format!("queues={v}: give a number from 1 to 16")))?;
                    disk.queues = Some(n);
                }
                _ => {
                    return Err(ParseError(format!(
                        "unknown disk option '{key}'; known are path, format, readonly, snapshot, serial, queues"
                    )));
                }
            }
        }
        if disk.path.as_os_str().is_empty() {
            return Err(ParseError("a disk needs path=FILE".into()));
        }
        Ok(disk)
    }
}

impl FromStr for Serial {
    type Err = ParseError;

    /// `stdio`, `file:F`, `pty`, `unix:F`, `none`.
    fn from_str(text: &str) -> Result<Serial, ParseError> {
        let path = |p: &str| {
            if p.is_empty() {
                Err(ParseError(format!("{text}: a path must follow")))
            } else {
                Ok(PathBuf::from(p))
            }
        };
        match text.split_once(':') {
            None if text == "stdio" => Ok(Serial::Stdio),
            None if text == "pty" => Ok(Serial::Pty),
            None if text == "none" => Ok(Serial::None),
            Some(("file", p)) => Ok(Serial::File(path(p)?)),
            Some(("unix", p)) => Ok(Serial::Unix(path(p)?)),
            _ => Err(ParseError(format!("'{text}': give stdio, file:PATH, pty, unix:PATH or none"))),
        }
    }
}

impl FromStr for Accel {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Accel, ParseError> {
        match text {
            "auto" => Ok(Accel::Auto),
            "kvm" => Ok(Accel::Kvm),
            "soft" => Ok(Accel::Soft),
            _ => Err(ParseError(format!("'{text}': give auto, kvm or soft"))),
        }
    }
}

impl FromStr for AccelOption {
    type Err = ParseError;

    /// `auto`, `kvm`, `soft`, `soft,tier=translate`, `soft,tier=interp`.
    fn from_str(text: &str) -> Result<AccelOption, ParseError> {
        let (engine, options) = text.split_once(',').map_or((text, None), |(e, o)| (e, Some(o)));
        let accel: Accel = engine.parse()?;
        let tier = match options {
            None => Tier::default(),
            Some(_) if accel != Accel::Soft => {
                return Err(ParseError(format!("'{text}': only soft takes options")));
            }
            Some("tier=translate") => Tier::Translate,
            Some("tier=interp") => Tier::Interp,
            Some(o) => return Err(ParseError(format!("'{o}': give tier=translate or tier=interp"))),
        };
        Ok(AccelOption { accel, tier })
    }
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
        for (bad, says) in [
            ("", "needs"),
            ("format=raw", "path"),
            ("path=", "value"),
            ("path=x,format=qcow9", "raw and qcow2"),
            ("path=x,readonly=maybe", "on or off"),
            ("path=x,colour=red", "unknown disk option 'colour'"),
            ("path=x,queues=many", "number"),
        ] {
            let e = bad.parse::<Disk>().unwrap_err().to_string();
            assert!(e.contains(says), "{bad}: {e}");
        }
    }

    #[test]
    fn engines() {
        let soft = |tier| Ok(AccelOption { accel: Accel::Soft, tier });
        assert_eq!("soft".parse(), soft(Tier::Translate));
        assert_eq!("soft,tier=interp".parse(), soft(Tier::Interp));
        for bad in ["tcg", "kvm,tier=interp", "soft,tier=fast", "soft,", ""] {
            assert!(bad.parse::<AccelOption>().is_err(), "{bad}");
        }
    }

    #[test]
    fn serial_forms() {
        assert_eq!("file:/x:y".parse(), Ok(Serial::File("/x:y".into())));
        assert_eq!("pty".parse(), Ok(Serial::Pty));
        assert!("file:".parse::<Serial>().is_err());
        assert!("tcp:1".parse::<Serial>().is_err());
    }
}
