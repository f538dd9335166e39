//! `--net network=NAME`: a network that `ringfort net` keeps.

use super::KeyValue;
use crate::config::ParseError;
use ringfort_net::NetError;
use ringfort_net::managed::Networks;
use ringfort_net::tap::TapConfig;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

const KNOWN: &str = "state-dir, helper, vhost";

/// Which network.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkLink {
    /// Its name.
    pub name: String,
    /// Where networks are kept, if not where `ringfort net` does by itself.
    #[serde(default)]
    pub state_dir: Option<PathBuf>,
    /// The program that opens taps for those who may not; looked for if not given.
    #[serde(default)]
    pub helper: Option<PathBuf>,
    /// As of taps.
    #[serde(default)]
    pub vhost: Option<bool>,
}

impl NetworkLink {
    pub(super) fn parse(name: &str, options: &[KeyValue<'_>]) -> Result<NetworkLink, ParseError> {
        let mut c = NetworkLink { name: name.into(), ..NetworkLink::default() };
        for o in options {
            match o.key {
                "state-dir" => c.state_dir = Some(o.need()?.into()),
                "vhost" => c.vhost = Some(o.switch()?),
                "helper" => c.helper = Some(o.need()?.into()),
                _ => return Err(o.unknown("managed", KNOWN)),
            }
        }
        Ok(c)
    }

    /// The tap that joins it.
    ///
    /// # Errors
    /// There is no such network, or it is not up.
    pub fn tap(&self) -> Result<TapConfig, NetError> {
        let networks = match &self.state_dir {
            Some(dir) => Networks::below(dir),
            None => Networks::of_host(),
        };
        let c = networks.active(&self.name)?;
        Ok(TapConfig {
            bridge: Some(c.bridge()),
            isolated: c.isolate,
            helper: self.helper.clone(),
            vhost: self.vhost,
            ..TapConfig::default()
        })
    }
}
