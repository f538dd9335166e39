//! Addresses that guests have, in the file format of dnsmasq (dnsmasq(8), --dhcp-leasefile), which the built-in server writes, too:
//! a line for each with the time of its end, the card's address, the address, the name and the client's identifier.

use serde::Serialize;
use std::fs;
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::Path;

/// An address that a guest has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Lease {
    /// When it ends, in seconds since 1970; 0 for never.
    pub expires: u64,
    /// The card's address; for IPv6 what the client calls itself.
    pub mac: String,
    /// The address.
    pub address: IpAddr,
    /// The guest's name, if it told one.
    pub name: Option<String>,
}

/// The leases in a file's text. Lines of another form are passed over.
pub fn parse(text: &str) -> Vec<Lease> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let expires = words.next()?.parse().ok()?;
            let mac = words.next()?.to_owned();
            let address = words.next()?.trim_matches(['[', ']']).parse().ok()?;
            let name = words.next().filter(|n| *n != "*" && !n.is_empty()).map(str::to_owned);
            Some(Lease { expires, mac, address, name })
        })
        .collect()
}

/// The leases of a file; none if there is no file.
///
/// # Errors
/// The host's.
pub fn read(path: &Path) -> io::Result<Vec<Lease>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(parse(&text)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(e),
    }
}

/// Write a file anew: at no time is there half of one.
///
/// # Errors
/// The host's; the old file is then still there.
pub fn write(path: &Path, leases: &[Lease]) -> io::Result<()> {
    let mut text = String::new();
    for l in leases {
        let name = l.name.as_deref().unwrap_or("*");
        text.push_str(&format!("{} {} {} {name} *\n", l.expires, l.mac, l.address));
    }
    replace(path, text.as_bytes())
}

/// Replace a file's content, through a file beside it.
///
/// # Errors
/// The host's; the old file is then still there.
pub fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let beside = path.with_extension("new");
    let mut f = fs::File::create(&beside)?;
    f.write_all(content)?;
    f.sync_all()?;
    fs::rename(&beside, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dnsmasqs_lines() {
        let text = "1700000000 52:54:00:00:00:01 10.9.0.5 vm1 ff:00\n0 52:54:00:00:00:02 10.9.0.6 * *\nduid 00:01\nx y z\n1 55 fd00::5 n *\n";
        let l = parse(text);
        assert_eq!(l.len(), 3);
        assert_eq!(
            (l[0].expires, l[0].name.as_deref(), l[1].name.as_deref()),
            (1_700_000_000, Some("vm1"), None)
        );
        let path = std::env::temp_dir().join(format!("rf-leases-{}", std::process::id()));
        write(&path, &l).unwrap();
        assert_eq!(read(&path).unwrap(), l);
        fs::remove_file(&path).unwrap();
        assert_eq!(read(&path).unwrap(), []);
    }
}
