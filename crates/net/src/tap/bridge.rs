//! A tap as the port of a bridge.

use super::TapConfig;
use crate::NetError;
use crate::netlink::{Link, Netlink};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

/// The remark on a bridge that was made for guests, and that goes with the last of them.
pub const OWNER: &str = "ringfort: goes with its last port";

/// The end of the remark on a bridge whose ports are to be isolated.
pub const ISOLATED: &str = " (isolated)";

/// Where those who make and remove bridges wait for each other.
const LOCK: &str = "/run/ringfort/bridges.lock";

/// Whether a bridge was made for guests.
pub fn is_ours(link: &Link) -> bool {
    link.alias.as_deref() == Some(OWNER)
}

/// Keep others from making and removing bridges until the file is closed.
fn take_lock() -> io::Result<File> {
    let path = Path::new(LOCK);
    if let Some(dir) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o755).create(dir)?;
    }
    let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path)?;
    file.lock()?;
    Ok(file)
}

/// Bridges that were made for guests and have no port any more: what guests leave that are killed.
///
/// # Errors
/// The host's.
pub fn left_behind() -> io::Result<Vec<Link>> {
    let links = Netlink::open()?.links()?;
    let alone = |b: &Link| is_ours(b) && !links.iter().any(|l| l.master == Some(b.index));
    Ok(links.iter().filter(|b| alone(b)).cloned().collect())
}

/// Remove what [`left_behind`] finds; gives the bridges' names.
///
/// # Errors
/// The host's.
pub fn recover() -> io::Result<Vec<String>> {
    if left_behind()?.is_empty() {
        return Ok(Vec::new());
    }
    // Under the lock nobody is between making a bridge and becoming its port.
    let _lock = take_lock()?;
    let mut netlink = Netlink::open()?;
    let mut removed = Vec::new();
    for bridge in left_behind()? {
        netlink.delete(bridge.index)?;
        removed.push(bridge.name);
    }
    Ok(removed)
}

/// What has to be undone when the tap goes.
pub struct Membership {
    /// The tap, if it stays when its descriptor is closed, and has to leave the bridge.
    port: Option<u32>,
    /// The tap, if it goes with its descriptor.
    fleeting: Option<u32>,
    bridge: String,
    may_remove: bool,
}

impl Membership {
    /// Make `tap` a port of `bridge`.
    pub fn join(
        netlink: &mut Netlink,
        tap: &Link,
        bridge: &str,
        config: &TapConfig,
        existed: bool,
    ) -> Result<Membership, NetError> {
        let _lock = if config.make_bridge { Some(take_lock().map_err(NetError::host(LOCK))?) } else { None };
        let mut made = None;
        let link = match netlink.link(bridge) {
            Ok(link) => link,
            Err(e) if e.kind() == io::ErrorKind::NotFound && config.make_bridge => {
                let index = netlink
                    .add_bridge(bridge, None, OWNER)
                    .map_err(NetError::advise(format!("making the bridge {bridge}"), "; run as root"))?;
                made = Some(index);
                match netlink.set_up(index).and_then(|()| netlink.link(bridge)) {
                    Ok(link) => link,
                    Err(e) => {
                        let _ = netlink.delete(index);
                        return Err(NetError::host(format!("the new bridge {bridge}"))(e));
                    }
                }
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let what = format!(
                    "there is no {bridge}; make it (ip link add {bridge} type bridge), or give --net bridge={bridge} to have it made"
                );
                return Err(NetError::Option { option: "bridge", what });
            }
            Err(e) => return Err(NetError::host(bridge.to_owned())(e)),
        };
        if link.kind.as_deref() != Some("bridge") {
            let what = format!("{bridge} is no bridge; name one");
            return Err(NetError::Option { option: "bridge", what });
        }
        if tap.master.is_some_and(|m| m != link.index) {
            let what = format!(
                "{} is a port of another bridge; take it off first: ip link set {} nomaster",
                tap.name, tap.name
            );
            return Err(NetError::Option { option: "bridge", what });
        }
        let membership = Membership {
            port: (existed && tap.master.is_none()).then_some(tap.index),
            fleeting: (!existed).then_some(tap.index),
            bridge: bridge.to_owned(),
            may_remove: made.is_some() || is_ours(&link),
        };
        // From here on dropping the membership undoes it.
        let mut set = || -> io::Result<()> {
            if tap.mtu != link.mtu && !existed {
                netlink.set_mtu(tap.index, link.mtu)?;
            }
            if tap.master.is_none() {
                netlink.set_master(tap.index, link.index)?;
            }
            if config.isolated || link.alias.as_deref().is_some_and(|a| a.ends_with(ISOLATED)) {
                netlink.set_isolated(tap.index, true)?;
            }
            Ok(())
        };
        match set() {
            Ok(()) => Ok(membership),
            Err(e) => {
                // Dropping it takes the lock.
                drop(_lock);
                drop(membership);
                Err(NetError::advise(format!("making {} a port of {bridge}", tap.name), "; run as root")(e))
            }
        }
    }

    fn leave(&self) -> io::Result<()> {
        let mut netlink = Netlink::open()?;
        if let Some(port) = self.port {
            netlink.set_master(port, 0)?;
        }
        if !self.may_remove {
            return Ok(());
        }
        let _lock = take_lock()?;
        let links = netlink.links()?;
        if let Some(b) = links.iter().find(|l| l.name == self.bridge)
            && is_ours(b)
            && !links.iter().any(|l| l.master == Some(b.index) && Some(l.index) != self.fleeting)
        {
            netlink.delete(b.index)?;
        }
        Ok(())
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        // Nobody is there to be told; the next guest of the bridge tries again.
        let _ = self.leave();
    }
}
