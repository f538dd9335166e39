//! Limits and checks of a card, whatever it is connected to.

use super::KeyValue;
use crate::config::ParseError;
use ringfort_net::guard::{GuardConfig, Limit, Rate};

pub(super) const KNOWN: &str = "tx-rate, tx-burst, tx-packets, tx-packets-burst, rx-rate, rx-burst, rx-packets, rx-packets-burst, macguard";

/// Numbers as they were given.
#[derive(Default)]
pub(super) struct Given {
    tx: [Option<u64>; 4],
    rx: [Option<u64>; 4],
    mac: bool,
}

impl Given {
    /// Take an option; false if it is none of these.
    pub fn take(&mut self, o: &KeyValue<'_>) -> Result<bool, ParseError> {
        if o.key == "macguard" {
            self.mac = o.switch()?;
            return Ok(true);
        }
        let (way, key) = match o.key.split_once('-') {
            Some(("tx", key)) => (&mut self.tx, key),
            Some(("rx", key)) => (&mut self.rx, key),
            _ => return Ok(false),
        };
        let at = match key {
            "rate" => 0,
            "burst" => 1,
            "packets" => 2,
            "packets-burst" => 3,
            _ => return Ok(false),
        };
        way[at] = Some(o.number("as in 10M")?);
        Ok(true)
    }

    pub fn finish(self) -> Result<GuardConfig, ParseError> {
        // Without a burst given, a tenth of a second may pass at once, and some frames in any case.
        let rate = |rate: Option<u64>, burst: Option<u64>, least: u64, name: &str| match (rate, burst) {
            (None, Some(_)) => Err(ParseError(format!("{name}-burst: there is no limit; give {name}, too"))),
            (None, None) => Ok(None),
            (Some(per_second), burst) => {
                Ok(Some(Rate { per_second, burst: burst.unwrap_or((per_second / 10).max(least)) }))
            }
        };
        let limit = |n: [Option<u64>; 4], way: &str| {
            Ok::<_, ParseError>(Limit {
                bytes: rate(n[0], n[1], 64 << 10, &format!("{way}-rate"))?,
                packets: rate(n[2], n[3], 16, &format!("{way}-packets"))?,
            })
        };
        Ok(GuardConfig { tx: limit(self.tx, "tx")?, rx: limit(self.rx, "rx")?, mac: self.mac })
    }
}
