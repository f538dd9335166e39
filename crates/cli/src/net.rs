//! `ringfort net`: networks of the host that guests share.

use crate::exit;
use clap::{Args, Subcommand};
use ringfort_net::NetError;
use ringfort_net::managed::{self, Cidr, Forward, NetworkConfig, Networks, Service, StaticHost};
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

/// Networks of the host that guests share: a bridge with addresses, NAT, DHCP and DNS
#[derive(Debug, Args)]
#[command(after_help = AFTER)]
pub struct NetArgs {
    /// Keep definitions and what is running below this folder, instead of /etc/ringfort/networks and /run/ringfort/networks
    #[arg(long, global = true, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    #[command(subcommand)]
    verb: Verb,
}

const AFTER: &str = "\
A guest joins a network by its name: `ringfort run --net network=NAME` (as root, or through ringfort-bridge-helper).

Examples:
  ringfort net define lab --ipv4 192.168.124.0/24 --ipv6 fd00:124::/64
  ringfort net start lab
  ringfort run --net network=lab,macguard=on
  ringfort net leases lab
  ringfort net stop lab";

#[derive(Debug, Subcommand)]
enum Verb {
    /// Show all networks
    List {
        /// Write them as JSON
        #[arg(long)]
        json: bool,
    },
    /// Define a network, or define it anew; it is not started
    Define(Define),
    /// Forget a network's definition
    Undefine {
        /// Its name
        name: String,
    },
    /// Show a network's definition, as JSON
    Show {
        /// Its name
        name: String,
    },
    /// Make a network's bridge, addresses and rules, and answer its guests
    Start {
        /// Its name
        name: String,
    },
    /// Take a network down, with everything that belongs to it
    Stop {
        /// Its name
        name: String,
    },
    /// Show the addresses that a network's guests have
    Leases {
        /// Its name
        name: String,
        /// Write them as JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove what is left of networks whose keepers, and of bridges whose guests were killed; start does so, too
    Recover,
    /// The process that keeps a network up
    #[command(hide = true)]
    Keep { name: String },
    /// The process that watches the keeper
    #[command(hide = true)]
    Watch { name: String },
}

#[derive(Debug, Args)]
struct Define {
    /// Its name: letters, digits, hyphens and underscores
    name: String,
    /// IPv4 network, as 192.168.124.0/24; with a host's address in it, that is the bridge's
    #[arg(long, value_name = "CIDR")]
    ipv4: Option<Cidr>,
    /// IPv6 network of 64 bits, as fd00:124::/64
    #[arg(long, value_name = "CIDR")]
    ipv6: Option<Cidr>,
    /// The bridge's name; rf-NAME if not given
    #[arg(long, value_name = "NAME")]
    bridge: Option<String>,
    /// Where guests get to: nat (everywhere, with the host's addresses), route (everywhere, with their own), none
    #[arg(long, value_name = "HOW", default_value = "nat")]
    forward: Forward,
    /// Guests do not reach each other
    #[arg(long)]
    isolate: bool,
    /// Guests reach nothing of the host but DHCP, DNS and ping
    #[arg(long)]
    shield_host: bool,
    /// Who answers DHCP and DNS: auto (dnsmasq where it is installed), dnsmasq, builtin, none
    #[arg(long, value_name = "WHO", default_value = "auto")]
    service: Service,
    /// First and last address that DHCP gives, as 192.168.124.50-192.168.124.99
    #[arg(long, value_name = "FIRST-LAST", value_parser = range)]
    dhcp: Option<(Ipv4Addr, Ipv4Addr)>,
    /// A guest whose address is settled: MAC,ADDRESS[,NAME]; may be repeated
    #[arg(long, value_name = "HOST")]
    host: Vec<StaticHost>,
    /// The guests' domain
    #[arg(long, value_name = "NAME")]
    domain: Option<String>,
}

fn range(text: &str) -> Result<(Ipv4Addr, Ipv4Addr), String> {
    let fail = || format!("'{text}': give FIRST-LAST");
    let (first, last) = text.split_once('-').ok_or_else(fail)?;
    Ok((first.parse().map_err(|_| fail())?, last.parse().map_err(|_| fail())?))
}

impl NetArgs {
    /// Do what is asked for.
    pub fn run(self) -> ExitCode {
        let networks = match &self.state_dir {
            Some(dir) => Networks::below(dir),
            None => Networks::of_host(),
        };
        match self.act(&networks) {
            Ok(()) => ExitCode::SUCCESS,
            Err(e @ NetError::Option { .. }) => exit::usage(&e.to_string()),
            Err(e) => exit::failure(&e.to_string()),
        }
    }

    /// This program with the verb of a helper process.
    fn helper(&self, verb: &str) -> Command {
        let program = std::env::current_exe().unwrap_or_else(|_| "/proc/self/exe".into());
        let mut c = Command::new(program);
        c.arg("net");
        if let Some(dir) = &self.state_dir {
            c.arg("--state-dir").arg(dir);
        }
        c.arg(verb);
        c
    }

    fn act(&self, networks: &Networks) -> Result<(), NetError> {
        match &self.verb {
            Verb::List { json } => list(networks, *json),
            Verb::Define(d) => networks.define(&NetworkConfig {
                bridge: d.bridge.clone(),
                ipv6: d.ipv6,
                forward: d.forward,
                isolate: d.isolate,
                shield_host: d.shield_host,
                service: d.service,
                dhcp: d.dhcp,
                hosts: d.host.clone(),
                domain: d.domain.clone(),
                ..NetworkConfig::new(&d.name, d.ipv4)
            }),
            Verb::Undefine { name } => networks.undefine(name),
            Verb::Show { name } => {
                print_json(&networks.get(name)?);
                Ok(())
            }
            Verb::Start { name } => {
                for left in networks.recover()? {
                    eprintln!("ringfort: network {left}: its keeper was killed; what was left is removed");
                }
                for left in bridges(ringfort_net::tap::recover())? {
                    eprintln!("ringfort: bridge {left}: its last guest was killed; it is removed");
                }
                networks.start(name, &mut self.helper("keep"))
            }
            Verb::Stop { name } => networks.stop(name),
            Verb::Leases { name, json } => leases(networks, name, *json),
            Verb::Recover => {
                networks.recover()?.iter().for_each(|n| println!("network {n}"));
                bridges(ringfort_net::tap::recover())?.iter().for_each(|b| println!("bridge {b}"));
                Ok(())
            }
            Verb::Keep { name } => {
                managed::keep(networks, name, &|| self.helper("watch"), &mut std::io::stdout())
            }
            Verb::Watch { name } => managed::watch(networks, name, &mut std::io::stdin()),
        }
    }
}

fn bridges<T>(done: std::io::Result<T>) -> Result<T, NetError> {
    done.map_err(NetError::host("bridges that were made for guests"))
}

fn print_json<T: serde::Serialize>(value: &T) {
    // Plain structures always have a form.
    println!("{}", serde_json::to_string_pretty(value).unwrap_or_default());
}

fn list(networks: &Networks, json: bool) -> Result<(), NetError> {
    let all = networks.list()?;
    if json {
        print_json(&all);
        return Ok(());
    }
    for name in networks.left_behind()? {
        eprintln!(
            "ringfort: network {name}: its keeper was killed; `ringfort net recover` removes what is left of it"
        );
    }
    for b in bridges(ringfort_net::tap::left_behind())? {
        eprintln!(
            "ringfort: bridge {}: its last guest was killed; `ringfort net recover` removes it",
            b.name
        );
    }
    println!("{:<16} {:<9} {:<16} {:<8} {:<10} NETWORKS", "NAME", "STATE", "BRIDGE", "FORWARD", "SERVICE");
    for s in all {
        let state = if s.active { "active" } else { "inactive" };
        let forward = serde_json::to_value(s.config.forward).ok();
        let forward = forward.as_ref().and_then(|f| f.as_str()).unwrap_or("");
        let cidrs: Vec<String> = s.config.networks().map(|n| n.to_string()).collect();
        let service = s.service.as_deref().unwrap_or("-");
        println!(
            "{:<16} {state:<9} {:<16} {forward:<8} {service:<10} {}",
            s.name,
            s.config.bridge(),
            cidrs.join(" ")
        );
    }
    Ok(())
}

fn leases(networks: &Networks, name: &str, json: bool) -> Result<(), NetError> {
    let all = networks.leases(name)?;
    if json {
        print_json(&all);
        return Ok(());
    }
    println!("{:<18} {:<40} {:<20} EXPIRES (seconds since 1970)", "MAC", "ADDRESS", "NAME");
    for l in all {
        let expires = if l.expires == 0 { "never".into() } else { l.expires.to_string() };
        println!(
            "{:<18} {:<40} {:<20} {expires}",
            l.mac,
            l.address.to_string(),
            l.name.as_deref().unwrap_or("-")
        );
    }
    Ok(())
}
