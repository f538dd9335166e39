//! `--net tap` and `--net bridge=NAME`: a network device of the host.

use super::KeyValue;
use crate::config::ParseError;
use ringfort_net::tap::TapConfig;

const KNOWN: &str = "ifname, bridge, fd, isolated, helper, vhost";

pub(super) fn options(c: &mut TapConfig, options: &[KeyValue<'_>]) -> Result<(), ParseError> {
    for o in options {
        match o.key {
            "ifname" => c.ifname = Some(o.need()?.into()),
            "bridge" | "br" if !c.make_bridge => c.bridge = Some(o.need()?.into()),
            // Several queues: repeated, or with colons between, as QEMU's fds.
            "fd" | "fds" => {
                for n in o.need()?.split(':') {
                    c.fds.push(n.parse().map_err(|_| {
                        ParseError(format!("{}={n}: give the number of an inherited descriptor", o.key))
                    })?);
                }
            }
            "isolated" => c.isolated = o.switch()?,
            "helper" => c.helper = Some(o.need()?.into()),
            "vhost" => c.vhost = Some(o.switch()?),
            _ => return Err(o.unknown("tap", KNOWN)),
        }
    }
    Ok(())
}
