//! `--net stream` and `--net dgram`: cables to other machines over sockets.
//!
//! Addresses are written in one piece (`addr=unix:PATH`), or as QEMU has them (`addr.type=unix,addr.path=PATH`).

use super::KeyValue;
use crate::config::ParseError;
use ringfort_net::stream::{DatagramAddress, DatagramConfig, StreamAddress, StreamConfig};
use std::time::Duration;

/// An address in QEMU's pieces.
#[derive(Default)]
struct Pieces<'a> {
    kind: Option<&'a str>,
    path: Option<&'a str>,
    host: Option<&'a str>,
    port: Option<&'a str>,
}

impl<'a> Pieces<'a> {
    /// Take `PREFIX.type` and so on; false if it is none of them.
    fn take(&mut self, prefix: &str, o: &KeyValue<'a>) -> Result<bool, ParseError> {
        let Some(key) = o.key.strip_prefix(prefix).and_then(|k| k.strip_prefix('.')) else {
            return Ok(false);
        };
        let to = match key {
            "type" => &mut self.kind,
            "path" => &mut self.path,
            "host" => &mut self.host,
            "port" => &mut self.port,
            _ => return Ok(false),
        };
        *to = Some(o.need()?);
        Ok(true)
    }

    /// The address in one piece, if there was any; `inet` is its name for IP.
    fn join(&self, prefix: &str, inet: &str) -> Result<Option<String>, ParseError> {
        let fail = |what: &str| ParseError(format!("{prefix}: {what}"));
        match (self.kind, self.path, self.host, self.port) {
            (None, None, None, None) => Ok(None),
            (Some("unix"), Some(p), None, None) => Ok(Some(format!("unix:{p}"))),
            (Some("inet"), None, Some(h), Some(p)) if h.contains(':') => {
                Ok(Some(format!("{inet}:[{h}]:{p}")))
            }
            (Some("inet"), None, Some(h), Some(p)) => Ok(Some(format!("{inet}:{h}:{p}"))),
            (Some("unix"), ..) => Err(fail("an address of type unix has a path and nothing else")),
            (Some("inet"), ..) => Err(fail("an address of type inet has a host and a port and nothing else")),
            _ => Err(fail("the types of addresses are inet and unix")),
        }
    }
}

fn parse<T: std::str::FromStr<Err = String>>(key: &str, text: &str) -> Result<T, ParseError> {
    text.parse().map_err(|e| ParseError(format!("{key}: {e}")))
}

pub(super) fn stream(options: &[KeyValue<'_>]) -> Result<StreamConfig, ParseError> {
    let (mut address, mut pieces) = (None::<StreamAddress>, Pieces::default());
    let (mut server, mut reconnect) = (false, None);
    for o in options {
        match o.key {
            "addr" => address = Some(parse(o.key, o.need()?)?),
            "server" => server = o.switch()?,
            "reconnect" => {
                let seconds: u32 = o.number("seconds, 0 for never")?;
                reconnect = (seconds > 0).then(|| Duration::from_secs(seconds.into()));
            }
            _ if pieces.take("addr", o)? => {}
            _ => {
                return Err(o.unknown(
                    "stream",
                    "addr, addr.type, addr.path, addr.host, addr.port, server, reconnect",
                ));
            }
        }
    }
    if let Some(text) = pieces.join("addr", "tcp")? {
        address = Some(parse("addr", &text)?);
    }
    let address = address
        .ok_or_else(|| ParseError("a stream network needs addr=unix:PATH or addr=tcp:HOST:PORT".into()))?;
    if server && reconnect.is_some() {
        return Err(ParseError(
            "reconnect: a server waits for the next connection anyway; leave it out".into(),
        ));
    }
    Ok(StreamConfig { address, server, reconnect })
}

pub(super) fn datagrams(options: &[KeyValue<'_>]) -> Result<DatagramConfig, ParseError> {
    let (mut local, mut remote) = (None::<DatagramAddress>, None::<DatagramAddress>);
    let (mut local_pieces, mut remote_pieces) = (Pieces::default(), Pieces::default());
    for o in options {
        match o.key {
            "local" => local = Some(parse(o.key, o.need()?)?),
            "remote" => remote = Some(parse(o.key, o.need()?)?),
            _ if local_pieces.take("local", o)? || remote_pieces.take("remote", o)? => {}
            _ => return Err(o.unknown("dgram", "local, remote (unix:PATH or udp:HOST:PORT)")),
        }
    }
    if let Some(text) = local_pieces.join("local", "udp")? {
        local = Some(parse("local", &text)?);
    }
    if let Some(text) = remote_pieces.join("remote", "udp")? {
        remote = Some(parse("remote", &text)?);
    }
    let remote = remote.ok_or_else(|| {
        ParseError("a dgram network needs remote=udp:HOST:PORT (a machine's or a multicast group's) or remote=unix:PATH".into())
    })?;
    let config = DatagramConfig { local, remote };
    match config.problems().into_iter().next() {
        Some((option, what)) => Err(ParseError(format!("{option}: {what}"))),
        None => Ok(config),
    }
}
