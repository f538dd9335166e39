//! `--net passt`: networking by the program passt.

use super::KeyValue;
use crate::config::ParseError;
use ringfort_net::passt::PasstConfig;

const KNOWN: &str = "path, arg";

pub(super) fn options(options: &[KeyValue<'_>]) -> Result<PasstConfig, ParseError> {
    let mut c = PasstConfig::default();
    for o in options {
        match o.key {
            "path" => c.path = Some(o.need()?.into()),
            "arg" => c.arguments.push(o.need()?.into()),
            _ => return Err(o.unknown("passt", KNOWN)),
        }
    }
    Ok(c)
}
