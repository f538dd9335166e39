//! Network cards: what `--net` says.
//!
//! The text is `KIND[,key=value…]`. What concerns the card (`mac`, `model`, `mtu`, `queues`) is the same for all kinds of
//! networks; everything else is read by the kind's own file beside this one.

mod guard;
mod network;
mod passt;
mod sockets;
mod tap;
mod user;

pub use network::NetworkLink;

use super::parse::{ParseError, split, switch};
use super::size::parse_size;
use ringfort_net::MacAddr;
use ringfort_net::guard::GuardConfig;
use ringfort_net::passt::PasstConfig;
use ringfort_net::stream::{DatagramConfig, StreamConfig};
use ringfort_net::tap::TapConfig;
use ringfort_net::user::UserConfig;
use serde::{Deserialize, Serialize};
use std::str::FromStr;

/// Most network cards of one machine.
pub const MAX_NICS: usize = 8;
/// Most pairs of queues of a card.
pub const MAX_PAIRS: u16 = ringfort_virtio::net::MAX_PAIRS;

/// What a network card is to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum NicModel {
    /// virtio-net.
    #[default]
    #[serde(rename = "virtio-net")]
    VirtioNet,
    /// Intel 82574L, for guests without drivers of virtio.
    #[serde(rename = "e1000e")]
    E1000e,
}

impl NicModel {
    /// All models, by the names that the command line takes.
    pub const NAMES: [(&'static str, NicModel); 2] =
        [("virtio-net", NicModel::VirtioNet), ("e1000e", NicModel::E1000e)];
}

/// What a network card is connected to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "kind")]
pub enum Link {
    /// A router with NAT in this process.
    User(Box<UserConfig>),
    /// The program passt, which this process starts.
    Passt(PasstConfig),
    /// A network device of the host.
    Tap(Box<TapConfig>),
    /// A network that `ringfort net` keeps.
    Network(NetworkLink),
    /// Another machine, over a stream socket.
    Stream(Box<StreamConfig>),
    /// Another machine or several, over datagrams.
    Dgram(Box<DatagramConfig>),
}

impl Link {
    /// What the command line calls them.
    const KINDS: [&str; 7] = ["user", "passt", "tap", "bridge", "network", "stream", "dgram"];

    /// The kind, as the command line has it.
    pub fn kind(&self) -> &'static str {
        match self {
            Link::User(_) => "user",
            Link::Passt(_) => "passt",
            Link::Tap(_) => "tap",
            Link::Network(_) => "managed",
            Link::Stream(_) => "stream",
            Link::Dgram(_) => "dgram",
        }
    }

    /// Whether other machines share the link, so that addresses must differ.
    pub fn is_shared(&self) -> bool {
        match self {
            Link::User(_) | Link::Passt(_) => false,
            Link::Tap(_) | Link::Network(_) | Link::Stream(_) | Link::Dgram(_) => true,
        }
    }

    /// What the configuration says about vhost-net; `None` where there can be none.
    pub fn vhost(&self) -> Option<Option<bool>> {
        match self {
            Link::Tap(c) => Some(c.vhost),
            Link::Network(c) => Some(c.vhost),
            _ => None,
        }
    }

    /// The most pairs of queues that it can serve.
    fn max_pairs(&self) -> u16 {
        match self {
            Link::Tap(c) if c.fds.is_empty() => MAX_PAIRS,
            Link::Tap(c) => c.fds.len() as u16,
            Link::Network(_) => MAX_PAIRS,
            Link::User(_) | Link::Passt(_) | Link::Stream(_) | Link::Dgram(_) => 1,
        }
    }

    /// The pairs of queues of a card that says nothing about it, on a machine of `cpus` vCPUs.
    fn usual_pairs(&self, cpus: u32) -> u16 {
        match self {
            // A tap that somebody made has one queue, as a rule.
            Link::Tap(c) if c.fds.is_empty() => 1,
            Link::Tap(c) => c.fds.len() as u16,
            Link::Network(_) => 1,
            _ => (cpus.min(u32::from(MAX_PAIRS)) as u16).min(self.max_pairs()),
        }
    }

    /// A network of this kind, with what `options` say about it.
    fn parse(kind: &KeyValue<'_>, options: &[KeyValue<'_>]) -> Result<Link, ParseError> {
        match (kind.key, kind.value) {
            ("user", None) => {
                let mut c = UserConfig::default();
                user::options(&mut c, options)?;
                Ok(Link::User(Box::new(c)))
            }
            ("passt", None) => Ok(Link::Passt(passt::options(options)?)),
            ("tap", None) => {
                let mut c = TapConfig::default();
                tap::options(&mut c, options)?;
                Ok(Link::Tap(Box::new(c)))
            }
            ("bridge", Some(_)) => {
                let bridge = Some(kind.need()?.into());
                let mut c = TapConfig { bridge, make_bridge: true, ..TapConfig::default() };
                tap::options(&mut c, options)?;
                Ok(Link::Tap(Box::new(c)))
            }
            ("network", Some(_)) => Ok(Link::Network(NetworkLink::parse(kind.need()?, options)?)),
            ("stream", None) => Ok(Link::Stream(Box::new(sockets::stream(options)?))),
            ("dgram", None) => Ok(Link::Dgram(Box::new(sockets::datagrams(options)?))),
            (k, _) => Err(Link::unknown(k)),
        }
    }

    fn unknown(kind: &str) -> ParseError {
        if kind == "none" {
            return ParseError("none is no network card and has no options; leave them out".into());
        }
        ParseError(format!(
            "'{kind}': the networks are user, passt, tap, bridge=NAME, network=NAME, stream, dgram and none"
        ))
    }
}

/// A network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nic {
    /// What it is connected to.
    pub link: Link,
    /// Its address; chosen at start if not given.
    #[serde(default)]
    pub mac: Option<MacAddr>,
    /// What it is to the guest.
    #[serde(default)]
    pub model: NicModel,
    /// Pairs of queues; by default one per vCPU, as far as the network can serve them.
    #[serde(default)]
    pub queues: Option<u16>,
    /// The largest IP packet, told to the guest; the network's own if not given.
    #[serde(default)]
    pub mtu: Option<u16>,
    /// Let the guest spread what it gets over queues by its own table, and tell it each frame's hash.
    #[serde(default)]
    pub rss: bool,
    /// Limits and checks.
    #[serde(default)]
    pub guard: GuardConfig,
}

impl Default for Nic {
    /// User-mode networking.
    fn default() -> Nic {
        Nic::new(Link::User(Box::default()))
    }
}

impl Nic {
    /// A card with nothing special about it.
    pub fn new(link: Link) -> Nic {
        Nic {
            link,
            mac: None,
            model: NicModel::default(),
            queues: None,
            mtu: None,
            rss: false,
            guard: GuardConfig::default(),
        }
    }

    /// Its address: as given, or one that is the same at every start of the machine `machine` for its card `index`. On a link with
    /// other machines, which may have the same name, it is random.
    pub fn address(&self, machine: &str, index: usize) -> MacAddr {
        self.mac.unwrap_or_else(|| match self.link.is_shared() {
            true => MacAddr::random(),
            false => MacAddr::from_seed(&format!("{machine}/{index}")),
        })
    }

    /// How many pairs of queues it has on a machine of `cpus` vCPUs.
    pub fn pairs(&self, cpus: u32) -> u16 {
        match self.model {
            NicModel::VirtioNet => self.queues.unwrap_or_else(|| self.link.usual_pairs(cpus)),
            NicModel::E1000e => 1,
        }
    }

    /// All that is wrong with it, each with the field's name.
    pub(super) fn problems(&self) -> Vec<(&'static str, String)> {
        let mut p = match &self.link {
            Link::User(c) => c.problems(),
            Link::Tap(c) => {
                let queues = if c.fds.is_empty() { c.queues } else { c.fds.len() as u16 };
                TapConfig { queues, ..(**c).clone() }.problems()
            }
            Link::Passt(_) | Link::Network(_) | Link::Stream(_) => Vec::new(),
            Link::Dgram(c) => c.problems(),
        };
        p.extend(self.guard.problems());
        if self.model == NicModel::E1000e && (self.queues.is_some_and(|q| q != 1) || self.rss) {
            p.push((
                "model",
                "an e1000e has one queue, which its driver sets up by itself; leave queues and rss out"
                    .into(),
            ));
        }
        let most = self.link.max_pairs().min(MAX_PAIRS);
        if self.queues.is_some_and(|q| !(1..=most).contains(&q)) {
            let range = if most == 1 { "give 1".into() } else { format!("give 1 to {most}") };
            p.push(("queues", format!("{} networks serve at most {most}; {range}", self.link.kind())));
        }
        let checked = matches!(self.link, Link::User(_));
        if !checked && self.mtu.is_some_and(|m| m < 576) {
            // RFC 791: every host takes that much.
            p.push(("mtu", "give 576 to 65535".into()));
        }
        p
    }
}

impl FromStr for Nic {
    type Err = ParseError;

    /// `KIND[,mac=M][,model=M][,mtu=N][,queues=N][,…]`.
    fn from_str(text: &str) -> Result<Nic, ParseError> {
        let parts = split(text);
        let (kind, options) = parts.split_first().ok_or_else(|| ParseError("name a network".into()))?;
        let kind = KeyValue::new(kind);
        if !Link::KINDS.contains(&kind.key) {
            return Err(Link::unknown(kind.key));
        }
        let mut nic = Nic::default();
        let mut guard = guard::Given::default();
        let mut rest = Vec::new();
        for part in options {
            let option = KeyValue::new(part);
            match option.key {
                "mac" => {
                    let mac = option.need()?.parse();
                    nic.mac = Some(mac.map_err(|e| ParseError(format!("mac: {e}")))?);
                }
                "model" => {
                    let name = option.need()?;
                    let found = NicModel::NAMES.iter().find(|(n, _)| *n == name);
                    let known = || NicModel::NAMES.map(|(n, _)| n).join(", ");
                    nic.model = found
                        .map(|(_, m)| *m)
                        .ok_or_else(|| ParseError(format!("model={name}: the models are {}", known())))?;
                }
                "mtu" => nic.mtu = Some(option.number("576 to 65535")?),
                "queues" => nic.queues = Some(option.number(&format!("1 to {MAX_PAIRS}"))?),
                "rss" => nic.rss = option.switch()?,
                _ if guard.take(&option)? => {}
                _ => rest.push(option),
            }
        }
        nic.link = Link::parse(&kind, &rest)?;
        nic.guard = guard.finish()?;
        if let Link::User(c) = &mut nic.link {
            c.mtu = nic.mtu.unwrap_or(c.mtu);
        }
        Ok(nic)
    }
}

/// One `key=value` of an option, or a bare key.
#[derive(Debug, Clone, Copy)]
pub(super) struct KeyValue<'a> {
    pub key: &'a str,
    pub value: Option<&'a str>,
}

impl<'a> KeyValue<'a> {
    fn new(part: &'a str) -> KeyValue<'a> {
        let (key, value) = part.split_once('=').map_or((part, None), |(k, v)| (k, Some(v)));
        KeyValue { key, value }
    }

    /// Its value, which must be there.
    pub fn need(&self) -> Result<&'a str, ParseError> {
        self.value.filter(|v| !v.is_empty()).ok_or_else(|| ParseError(format!("{} needs a value", self.key)))
    }

    /// Its value as on or off; a bare key means on.
    pub fn switch(&self) -> Result<bool, ParseError> {
        switch(self.key, self.value)
    }

    /// Its value as what `T` reads; `wanted` says what to give.
    pub fn parse<T: FromStr>(&self, wanted: &str) -> Result<T, ParseError> {
        let v = self.need()?;
        v.parse().map_err(|_| ParseError(format!("{}={v}: give {wanted}", self.key)))
    }

    /// Its value as a number; suffixes k, M and so on may be used.
    pub fn number<T: TryFrom<u64>>(&self, wanted: &str) -> Result<T, ParseError> {
        let v = self.need()?;
        let n = parse_size(v, 1).ok().and_then(|n| T::try_from(n).ok());
        n.ok_or_else(|| ParseError(format!("{}={v}: give a number, {wanted}", self.key)))
    }

    /// The error for a key that nobody knows.
    pub fn unknown(&self, kind: &str, known: &str) -> ParseError {
        ParseError(format!(
            "unknown option '{}' of {kind} networks; known are mac, model, mtu, queues, rss, {}, {known}",
            self.key,
            guard::KNOWN
        ))
    }
}

/// One `--net` of the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetOption {
    /// No network card at all.
    None,
    /// A card.
    Nic(Box<Nic>),
}

impl FromStr for NetOption {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<NetOption, ParseError> {
        if text == "none" { Ok(NetOption::None) } else { Ok(NetOption::Nic(Box::new(text.parse()?))) }
    }
}

impl NetOption {
    /// The machine's cards, from all `--net` of the command line: user-mode networking if there is none.
    ///
    /// # Errors
    /// When `none` stands beside others.
    pub fn nics(options: Vec<NetOption>) -> Result<Vec<Nic>, ParseError> {
        if options.is_empty() {
            return Ok(vec![Nic::default()]);
        }
        let given = options.len();
        let nics: Vec<Nic> = options
            .into_iter()
            .filter_map(|o| match o {
                NetOption::None => None,
                NetOption::Nic(n) => Some(*n),
            })
            .collect();
        if nics.is_empty() || nics.len() == given {
            return Ok(nics);
        }
        Err(ParseError("none stands alone; leave it out, or the others".into()))
    }
}

#[cfg(test)]
mod tests;
