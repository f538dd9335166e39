//! Networks of the host that guests share: a bridge with the host's addresses, ways out by forwarding and masquerade, and somebody who
//! answers DHCP and DNS.
//!
//! A network is defined by a file, and lives as long as its keeper, a process of its own, which takes everything down when it is told to
//! end. A second process watches the keeper and does the same should the keeper be killed. What was made is written down before it is
//! made, so that even when both are killed the next command finds what is left and removes it.

pub mod config;
pub mod dhcp;
pub mod dhcp6;
pub mod dns;
mod keeper;
pub mod leases;
mod names;
mod rules;
mod service;

pub use config::{Cidr, Forward, NetworkConfig, Service, StaticHost};
pub use keeper::{keep, watch};
pub use leases::Lease;

use crate::NetError;
use crate::netlink::Netlink;
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufRead, BufReader, ErrorKind, Read};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long a keeper may take to take its network down.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a keeper wrote down about its network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// As it was when the network was started.
    pub config: NetworkConfig,
    /// The keeper's process.
    pub pid: u32,
    /// Who answers DHCP and DNS.
    pub service: String,
}

/// What forwarding was before the first network changed it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Forwarding {
    /// The file below /proc/sys/net, and what it held.
    before: Vec<(String, String)>,
}

/// A network, as far as it is known.
#[derive(Debug, Clone, Serialize)]
pub struct Status {
    /// Its name.
    pub name: String,
    /// It is up.
    pub active: bool,
    /// It is defined, and may be started again.
    pub defined: bool,
    /// What it is.
    pub config: NetworkConfig,
    /// Its keeper's process.
    pub pid: Option<u32>,
    /// Who answers DHCP and DNS.
    pub service: Option<String>,
}

/// Where networks are kept.
#[derive(Debug, Clone)]
pub struct Networks {
    /// Definitions: `NAME.json`.
    definitions: PathBuf,
    /// What is running: a folder for each.
    running: PathBuf,
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> NetError {
    let what = path.display().to_string();
    move |e| match e.kind() {
        ErrorKind::PermissionDenied => NetError::advise(what, "; run as root")(e),
        _ => NetError::host(what)(e),
    }
}

impl Networks {
    /// The host's own networks.
    pub fn of_host() -> Networks {
        Networks { definitions: "/etc/ringfort/networks".into(), running: "/run/ringfort/networks".into() }
    }

    /// Networks that are kept below a folder.
    pub fn below(dir: &Path) -> Networks {
        Networks { definitions: dir.join("definitions"), running: dir.join("running") }
    }

    fn definition(&self, name: &str) -> PathBuf {
        self.definitions.join(format!("{name}.json"))
    }

    /// The folder of a running network.
    fn folder(&self, name: &str) -> PathBuf {
        self.running.join(name)
    }

    fn state_file(&self, name: &str) -> PathBuf {
        self.folder(name).join("state.json")
    }

    fn check_name(name: &str) -> Result<(), NetError> {
        if config::valid_network_name(name) {
            return Ok(());
        }
        Err(NetError::Option { option: "name", what: format!("'{name}' is no name of a network") })
    }

    fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>, NetError> {
        let text = match fs::read(path) {
            Ok(t) => t,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(at(path)(e)),
        };
        let wrong = |e: serde_json::Error| {
            NetError::Refused(format!("{}: {e}; mend or remove the file", path.display()))
        };
        serde_json::from_slice(&text).map(Some).map_err(wrong)
    }

    fn write<T: Serialize>(path: &Path, value: &T) -> Result<(), NetError> {
        let text = serde_json::to_vec_pretty(value).map_err(|e| NetError::Refused(e.to_string()))?;
        let dir = path.parent().unwrap_or(Path::new("/"));
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(dir)
            .map_err(NetError::advise(dir.display().to_string(), "; run as root"))?;
        leases::replace(path, &text).map_err(NetError::advise(path.display().to_string(), "; run as root"))
    }

    /// A definition.
    ///
    /// # Errors
    /// It does not exist, or cannot be read.
    pub fn get(&self, name: &str) -> Result<NetworkConfig, NetError> {
        Networks::check_name(name)?;
        Networks::read(&self.definition(name))?.ok_or_else(|| {
            NetError::Refused(format!("there is no network '{name}'; `ringfort net list` shows them, `ringfort net define` makes one"))
        })
    }

    /// A network that is up, as it was when it was started.
    ///
    /// # Errors
    /// It does not exist, or is not up.
    pub fn active(&self, name: &str) -> Result<NetworkConfig, NetError> {
        Networks::check_name(name)?;
        match self.state(name)? {
            Some(state) if self.is_kept(name)? => Ok(state.config),
            _ => {
                self.get(name)?;
                Err(NetError::Refused(format!(
                    "network {name} is not up; `ringfort net start {name}` starts it"
                )))
            }
        }
    }

    /// Define a network, or define it anew.
    ///
    /// # Errors
    /// It is not well-formed, or shares addresses or its bridge with another one.
    pub fn define(&self, c: &NetworkConfig) -> Result<(), NetError> {
        c.check()?;
        for other in self.all_definitions()?.iter().filter(|o| o.name != c.name) {
            if other.bridge() == c.bridge() {
                return Err(NetError::Option {
                    option: "bridge",
                    what: format!("{} is network {}'s; give another", c.bridge(), other.name),
                });
            }
            refuse_overlap(c, other)?;
        }
        Networks::write(&self.definition(&c.name), c)
    }

    /// Forget a definition. A network that is up stays so.
    ///
    /// # Errors
    /// It does not exist.
    pub fn undefine(&self, name: &str) -> Result<(), NetError> {
        self.get(name)?;
        let path = self.definition(name);
        fs::remove_file(&path).map_err(at(&path))
    }

    fn names(dir: &Path, end: &str) -> Result<Vec<String>, NetError> {
        let entries = match fs::read_dir(dir) {
            Ok(e) => e,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(at(dir)(e)),
        };
        let mut names: Vec<String> = entries
            .filter_map(|e| e.ok()?.file_name().into_string().ok()?.strip_suffix(end).map(str::to_owned))
            .filter(|n| config::valid_network_name(n))
            .collect();
        names.sort();
        Ok(names)
    }

    fn all_definitions(&self) -> Result<Vec<NetworkConfig>, NetError> {
        Networks::names(&self.definitions, ".json")?.iter().map(|n| self.get(n)).collect()
    }

    /// The lock of a running network: held by its keeper as long as that lives. `None` if somebody has it.
    fn try_lock(&self, name: &str) -> Result<Option<File>, NetError> {
        let dir = self.folder(name);
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&dir)
            .map_err(NetError::advise(dir.display().to_string(), "; run as root"))?;
        let path = dir.join("lock");
        let file =
            OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(at(&path))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(fs::TryLockError::WouldBlock) => Ok(None),
            Err(fs::TryLockError::Error(e)) => Err(at(&path)(e)),
        }
    }

    /// Whether a keeper lives.
    fn is_kept(&self, name: &str) -> Result<bool, NetError> {
        let path = self.folder(name).join("lock");
        match File::open(&path) {
            // A shared lock is enough to see that nobody has it alone.
            Ok(f) => match f.try_lock_shared() {
                Ok(()) => Ok(false),
                Err(fs::TryLockError::WouldBlock) => Ok(true),
                Err(fs::TryLockError::Error(e)) => Err(at(&path)(e)),
            },
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
            Err(e) => Err(at(&path)(e)),
        }
    }

    /// Who changes the host's settings does it alone.
    fn lock_all(&self) -> Result<File, NetError> {
        DirBuilder::new().recursive(true).mode(0o755).create(&self.running).map_err(at(&self.running))?;
        let path = self.running.join("changes.lock");
        let file =
            OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(at(&path))?;
        file.lock().map_err(at(&path))?;
        Ok(file)
    }

    fn state(&self, name: &str) -> Result<Option<State>, NetError> {
        Networks::read(&self.state_file(name))
    }

    /// Networks that were up when their keepers and watchers were killed, of which something may be left ([`Networks::recover`]).
    ///
    /// # Errors
    /// The host's.
    pub fn left_behind(&self) -> Result<Vec<String>, NetError> {
        let mut left = Vec::new();
        for name in Networks::names(&self.running, "")? {
            if self.state_file(&name).exists() && !self.is_kept(&name)? {
                left.push(name);
            }
        }
        Ok(left)
    }

    /// Remove what is left of networks whose keepers were killed. Gives their names.
    ///
    /// # Errors
    /// The host's; what is left is still written down.
    pub fn recover(&self) -> Result<Vec<String>, NetError> {
        let mut found = Vec::new();
        for name in Networks::names(&self.running, "")? {
            if self.state_file(&name).exists()
                && let Some(_lock) = self.try_lock(&name)?
                && let Some(state) = self.state(&name)?
            {
                self.take_down(&state.config)?;
                found.push(name);
            }
        }
        Ok(found)
    }

    /// All networks.
    ///
    /// # Errors
    /// A definition cannot be read.
    pub fn list(&self) -> Result<Vec<Status>, NetError> {
        let mut all: Vec<Status> = self
            .all_definitions()?
            .into_iter()
            .map(|config| Status {
                name: config.name.clone(),
                active: false,
                defined: true,
                config,
                pid: None,
                service: None,
            })
            .collect();
        for name in Networks::names(&self.running, "")? {
            let Some(state) = self.state(&name)? else { continue };
            if !self.is_kept(&name)? {
                continue;
            }
            let at = match all.iter().position(|s| s.name == name) {
                Some(n) => n,
                None => {
                    all.push(Status {
                        name,
                        active: false,
                        defined: false,
                        config: state.config.clone(),
                        pid: None,
                        service: None,
                    });
                    all.len() - 1
                }
            };
            all[at].active = true;
            (all[at].pid, all[at].service) = (Some(state.pid), Some(state.service));
        }
        Ok(all)
    }

    /// The addresses that guests have.
    ///
    /// # Errors
    /// There is no such network.
    pub fn leases(&self, name: &str) -> Result<Vec<Lease>, NetError> {
        if self.state(name)?.is_none() {
            self.get(name)?;
        }
        let path = self.folder(name).join(service::LEASES);
        leases::read(&path).map_err(at(&path))
    }

    /// Start a network: `program` with the arguments before the name is its keeper ([`keep`]).
    ///
    /// # Errors
    /// [`NetError`] in the keeper's words; nothing is left behind.
    pub fn start(&self, name: &str, keeper: &mut Command) -> Result<(), NetError> {
        self.get(name)?;
        if self.is_kept(name)? {
            return Err(NetError::Refused(format!("network {name} is up already")));
        }
        keeper.arg(name).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        // SAFETY: between fork and exec, a call that is allowed there. The keeper is no part of this terminal's session.
        unsafe {
            keeper.pre_exec(|| {
                libc::setsid();
                Ok(())
            });
        }
        let mut child = keeper.spawn().map_err(NetError::host("the network's keeper"))?;
        let mut line = String::new();
        if let Some(out) = child.stdout.take() {
            let _ = BufReader::new(out.take(8192)).read_line(&mut line);
        }
        match line.trim_end() {
            "ready" => Ok(()),
            words => {
                let status = child.wait().map_err(NetError::host("the network's keeper"))?;
                let words =
                    if words.is_empty() { format!("its keeper ended ({status})") } else { words.to_owned() };
                Err(NetError::Refused(format!("network {name}: {words}")))
            }
        }
    }

    /// Take a network down.
    ///
    /// # Errors
    /// It is not up, or does not end.
    pub fn stop(&self, name: &str) -> Result<(), NetError> {
        Networks::check_name(name)?;
        let Some(state) = self.state(name)? else {
            self.get(name)?;
            return Err(NetError::Refused(format!("network {name} is not up")));
        };
        if self.is_kept(name)? {
            // SAFETY: a plain call. The keeper holds its lock, so the number is still its.
            if unsafe { libc::kill(state.pid as i32, libc::SIGTERM) } < 0 {
                return Err(NetError::host(format!("network {name}: telling its keeper"))(
                    io::Error::last_os_error(),
                ));
            }
            let deadline = Instant::now() + PATIENCE;
            // There is no event to wait for that would not also wait for ever.
            while self.is_kept(name)? {
                if Instant::now() > deadline {
                    return Err(NetError::Refused(format!(
                        "network {name}: its keeper (process {}) does not end",
                        state.pid
                    )));
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        // What a keeper that was killed has left.
        self.recover().map(drop)
    }

    /// Refuse what shares addresses with other networks or with what the host has routes to.
    fn check_host(&self, c: &NetworkConfig, netlink: &mut Netlink) -> Result<(), NetError> {
        for other in self.list()?.iter().filter(|s| s.active && s.name != c.name) {
            refuse_overlap(c, &other.config)?;
        }
        let routes = netlink.routes().map_err(NetError::host("the host's routes"))?;
        let links = netlink.links().map_err(NetError::host("the host's links"))?;
        for (address, prefix, link) in routes {
            let there = Cidr { address, prefix };
            // Link-local networks are on every link.
            let local =
                matches!(address, std::net::IpAddr::V6(a) if a.is_unicast_link_local() || a.is_multicast());
            if let Some(mine) = c.networks().find(|n| !local && n.overlaps(there)) {
                let on = links.iter().find(|l| l.index == link).map_or("another link", |l| &l.name);
                return Err(NetError::Refused(format!(
                    "{mine} overlaps {there}, which the host has on {on}; choose another network"
                )));
            }
        }
        if links.iter().any(|l| l.name == c.bridge()) {
            return Err(NetError::Option {
                option: "bridge",
                what: format!("there is a link {} already; remove it, or give another name", c.bridge()),
            });
        }
        Ok(())
    }

    /// Make the bridge, with addresses and rules. On error nothing is left.
    fn set_up(&self, c: &NetworkConfig) -> Result<(), NetError> {
        let _alone = self.lock_all()?;
        let made = self.make(c);
        if made.is_err() {
            let _ = self.unmake(c);
        }
        made
    }

    fn make(&self, c: &NetworkConfig) -> Result<(), NetError> {
        let bridge = c.bridge();
        let mut netlink = Netlink::open().map_err(NetError::host("route netlink"))?;
        // A bridge takes the least address of its ports, and changes with them, unless it has one of its own.
        let index = netlink
            .add_bridge(&bridge, Some(c.mac()), &alias(c))
            .map_err(NetError::advise(format!("making the bridge {bridge}"), "; run as root"))?;
        for n in c.networks() {
            netlink
                .add_address(index, n.gateway(), n.prefix)
                .map_err(NetError::host(format!("{bridge}: address {}", n.gateway())))?;
        }
        netlink.set_up(index).map_err(NetError::host(format!("{bridge}: switching it on")))?;
        rules::apply(&rules::up(c))?;
        if c.forward != Forward::None {
            self.allow_forwarding(c)?;
        }
        Ok(())
    }

    fn forwarding_file(&self) -> PathBuf {
        self.running.join("forwarding.json")
    }

    fn allow_forwarding(&self, c: &NetworkConfig) -> Result<(), NetError> {
        let mut known: Forwarding = Networks::read(&self.forwarding_file())?.unwrap_or_default();
        let wanted =
            c.ipv4.map(|_| "ipv4/ip_forward").into_iter().chain(c.ipv6.map(|_| "ipv6/conf/all/forwarding"));
        for key in wanted {
            let path = Path::new("/proc/sys/net").join(key);
            let before = fs::read_to_string(&path).map_err(at(&path))?.trim().to_owned();
            if before != "0" {
                continue;
            }
            if !known.before.iter().any(|(k, _)| k == key) {
                known.before.push((key.into(), before));
                Networks::write(&self.forwarding_file(), &known)?;
            }
            fs::write(&path, "1").map_err(NetError::advise(path.display().to_string(), "; run as root"))?;
        }
        Ok(())
    }

    /// Take everything of a network away, whatever there is of it.
    fn unmake(&self, c: &NetworkConfig) -> Result<(), NetError> {
        service::end_left_over(&self.folder(&c.name));
        // Each is tried, whatever becomes of the others.
        let rules = rules::apply(&rules::down(&c.name));
        let bridge = Netlink::open().and_then(|mut n| match n.link(&c.bridge()) {
            // One of the same name that is not ours stays.
            Ok(l) if l.alias.as_deref() == Some(&alias(c)) => n.delete(l.index),
            Ok(_) => Ok(()),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
            Err(e) => Err(e),
        });
        let others = Networks::names(&self.running, "")?
            .into_iter()
            .any(|n| n != c.name && self.state_file(&n).exists());
        if !others && let Some(f) = Networks::read::<Forwarding>(&self.forwarding_file())? {
            for (key, before) in f.before {
                let path = Path::new("/proc/sys/net").join(key);
                fs::write(&path, before).map_err(at(&path))?;
            }
            fs::remove_file(self.forwarding_file()).map_err(at(&self.forwarding_file()))?;
        }
        bridge.map_err(NetError::host(format!("removing {}", c.bridge())))?;
        rules
    }

    /// As [`unmake`](Self::unmake), and forget that it was there.
    fn take_down(&self, c: &NetworkConfig) -> Result<(), NetError> {
        let _alone = self.lock_all()?;
        self.unmake(c)?;
        let path = self.state_file(&c.name);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(at(&path)(e)),
            _ => Ok(()),
        }
    }
}

/// The remark on a network's bridge.
fn alias(c: &NetworkConfig) -> String {
    format!("ringfort network {}{}", c.name, if c.isolate { crate::tap::ISOLATED } else { "" })
}

fn refuse_overlap(c: &NetworkConfig, other: &NetworkConfig) -> Result<(), NetError> {
    for mine in c.networks() {
        if let Some(theirs) = other.networks().find(|o| o.overlaps(mine)) {
            return Err(NetError::Refused(format!(
                "{mine} overlaps {theirs} of network {}; choose another",
                other.name
            )));
        }
    }
    Ok(())
}
