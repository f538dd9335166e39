//! Ethernet addresses.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// An Ethernet address of a network card: unicast and not all zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddr([u8; 6]);

/// Why a text or six bytes are no card's address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{0}' is no address of a network card; write six bytes in hex, as in 52:54:00:12:34:56, the first one even"
)]
pub struct MacError(String);

impl MacAddr {
    /// An address from its bytes.
    ///
    /// # Errors
    /// [`MacError`] for a group's address and for all zeroes.
    pub fn new(bytes: [u8; 6]) -> Result<MacAddr, MacError> {
        let mac = MacAddr(bytes);
        if bytes[0] & 1 != 0 || bytes == [0; 6] { Err(MacError(mac.to_string())) } else { Ok(mac) }
    }

    /// A locally administered address (IEEE 802, U/L bit) below QEMU's and KVM's prefix 52:54:00, made of `seed`: the same seed gives
    /// the same address.
    pub fn from_seed(seed: &str) -> MacAddr {
        // FNV-1a, 64 bits: spreads short texts well and needs no keys.
        let hash = seed
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        let folded = (hash ^ hash >> 24 ^ hash >> 48).to_le_bytes();
        MacAddr([0x52, 0x54, 0, folded[0], folded[1], folded[2]])
    }

    /// A random address with the same prefix.
    pub fn random() -> MacAddr {
        let r = fastrand::u32(..).to_le_bytes();
        MacAddr([0x52, 0x54, 0, r[0], r[1], r[2]])
    }

    /// Its bytes.
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddr {
    type Err = MacError;

    fn from_str(text: &str) -> Result<MacAddr, MacError> {
        let fail = || MacError(text.chars().take(40).collect());
        let mut bytes = [0; 6];
        let separator = if text.contains('-') { '-' } else { ':' };
        let mut parts = text.split(separator);
        for b in &mut bytes {
            let part = parts.next().filter(|p| (1..=2).contains(&p.len()) && !p.starts_with('+'));
            *b = u8::from_str_radix(part.ok_or_else(fail)?, 16).map_err(|_| fail())?;
        }
        if parts.next().is_some() {
            return Err(fail());
        }
        MacAddr::new(bytes)
    }
}

impl TryFrom<String> for MacAddr {
    type Error = MacError;
    fn try_from(text: String) -> Result<MacAddr, MacError> {
        text.parse()
    }
}

impl From<MacAddr> for String {
    fn from(mac: MacAddr) -> String {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts() {
        for good in ["52:54:00:12:34:56", "52-54-0-12-34-56", "2:0:0:0:0:1"] {
            let mac: MacAddr = good.parse().unwrap();
            assert_eq!(mac.to_string().parse(), Ok(mac));
        }
        for bad in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "52:54:00:12:34:5g",
            "01:00:5e:00:00:01",
            "0:0:0:0:0:0",
            "ff:ff:ff:ff:ff:ff",
            "525400123456",
            "52:54:00:12:34:+6",
            "52:54:00:12:34:",
        ] {
            assert!(bad.parse::<MacAddr>().is_err(), "{bad}");
        }
    }

    #[test]
    fn seeds_give_lasting_and_different_addresses() {
        assert_eq!(MacAddr::from_seed("guest/0"), MacAddr::from_seed("guest/0"));
        assert_ne!(MacAddr::from_seed("guest/0"), MacAddr::from_seed("guest/1"));
        assert_eq!(MacAddr::from_seed("x").bytes()[..3], [0x52, 0x54, 0]);
    }
}
