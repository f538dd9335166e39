//! `key=value,key=value` options of the command line.

use super::{Accel, AccelOption, KvmConfig, Serial, Tier};
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

    /// `auto`, `kvm[,dirty-ring=N][,halt-poll=TIME]`, `soft`, `soft,tier=translate`, `soft,tier=interp`.
    fn from_str(text: &str) -> Result<AccelOption, ParseError> {
        let (engine, options) = text.split_once(',').map_or((text, None), |(e, o)| (e, Some(o)));
        let accel: Accel = engine.parse()?;
        let tier = match options {
            None => Tier::default(),
            Some(o) if accel == Accel::Kvm => {
                return Ok(AccelOption { accel, kvm: KvmConfig::from_options(o)?, ..AccelOption::default() });
            }
            Some(_) if accel != Accel::Soft => {
                return Err(ParseError(format!("'{text}': name an engine, kvm or soft, to give it options")));
            }
            Some("tier=translate") => Tier::Translate,
            Some("tier=interp") => Tier::Interp,
            Some(o) => return Err(ParseError(format!("'{o}': give tier=translate or tier=interp"))),
        };
        Ok(AccelOption { accel, tier, kvm: KvmConfig::default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines() {
        let soft = |tier| Ok(AccelOption { accel: Accel::Soft, tier, ..AccelOption::default() });
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
