//! `ringfort run`: one virtual machine in the foreground.

use crate::exit;
use crate::progress::{BuildProgress, RunUi};
use clap::{Args, ValueHint};
use ringfort_vmm::config::{
    AccelOption, Boot, CpusOption, Disk, InvalidConfig, MemoryOption, NetOption, Serial, VmConfig,
};
use ringfort_vmm::gdb::{GdbAddress, GdbOption};
use ringfort_vmm::saved::SaveTarget;
use ringfort_vmm::{Options, Outcome, VmmError};
use std::path::PathBuf;
use std::process::ExitCode;

/// Boot a virtual machine and connect this terminal to its serial port.
///
/// Without --kernel it boots the default guest: a Debian system made from Debian's packages on first use and kept in the cache folder. Root
/// logs in on the console without a password. What the guest writes is thrown away at the end unless --keep is given.
#[derive(Args, Debug)]
#[command(after_help = AFTER)]
pub struct RunArgs {
    /// Kernel: bzImage, ELF with PVH note, or multiboot
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    initrd: Option<PathBuf>,
    /// Kernel command line; added to the default guest's own when no kernel is given
    #[arg(long, value_name = "TEXT")]
    cmdline: Option<String>,
    /// RAM, for instance 512M or 2G (plain numbers are MiB); options: hugepages=2M, shared=on, prealloc=on, node=0-1,
    /// policy=bind|preferred|interleave, merge=on, thp=off
    #[arg(long, short, value_name = "SIZE[,OPTIONS]", default_value = "1G")]
    memory: MemoryOption,
    /// Number of vCPUs, 1 to 16; options: pin=2-5 (a host CPU for each), realtime=PRIORITY
    #[arg(long, short, value_name = "N[,OPTIONS]", default_value = "1")]
    cpus: CpusOption,
    /// A disk: path=FILE[,KEY=VALUE…]; may be repeated; the keys are listed below
    #[arg(long, value_name = "OPTIONS")]
    disk: Vec<Disk>,
    /// Engine: auto; kvm[,irqchip=split|kernel][,dirty-ring=ENTRIES][,halt-poll=TIME]
    /// [,ioeventfd=off][,irqfd=off][,coalesce=off]; or soft[,tier=interp] (no translation; for debugging)
    #[arg(long, value_name = "ENGINE", default_value = "auto")]
    accel: AccelOption,
    /// CPU model and features, for instance max, qemu64,+avx2 or EPYC,-aes; portable for a machine that is to be saved under one engine
    /// and restored under another; `help` lists and explains them
    #[arg(long, value_name = "MODEL[,±FEATURE…]", default_value = "max")]
    cpu: String,
    /// First serial port: stdio, file:PATH, pty, unix:PATH or none
    #[arg(long, value_name = "WHERE", default_value = "stdio", default_value_if("console", "stdio", "none"))]
    serial: Serial,
    /// Virtio console (the guest's hvc0): where, as for --serial
    #[arg(long, value_name = "WHERE", default_value = "none")]
    console: Serial,
    /// A network card: user (the default), passt, tap, bridge=NAME, network=NAME, stream, dgram or none; with options as below; may be
    /// repeated
    #[arg(long, value_name = "KIND[,OPTIONS]")]
    net: Vec<NetOption>,
    /// Leave when the guest resets, with status 3, instead of booting it again
    #[arg(long)]
    no_reboot: bool,
    /// Name of the machine, for messages and process lists
    #[arg(long, value_name = "TEXT", default_value = "guest")]
    name: String,
    /// Keep what the default guest writes to its disk, in a copy of its own in the cache folder
    #[arg(long, conflicts_with = "kernel")]
    keep: bool,
    /// Where Ctrl-A s and signal USR1 save the machine, for `ringfort restore`; by default NAME.rfstate in this folder
    #[arg(long, value_name = "FILE[,compress=zstd|none]")]
    save: Option<SaveTarget>,
    /// Write the counters of the engine and of each network card's queues to this file at the end, as JSON (`-`: to standard error)
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    stats: Option<PathBuf>,
    /// Tell Linux perf where translated code lies (/tmp/perf-PID.map), for `perf record` and `perf report`
    #[arg(long)]
    jit_perf_map: bool,
    /// Wait for gdb (`target remote ADDRESS`), which has the vCPUs as threads; wait=off: let the guest run meanwhile
    #[arg(long, value_name = "[HOST]:PORT|unix:PATH|dev:PATH[,wait=off]")]
    pub gdb: Option<GdbOption>,
    /// Take commands in QEMU's machine protocol (QMP) at this unix socket
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath)]
    control: Option<PathBuf>,
}

const AFTER: &str = "\
Keys:
  Ctrl-A x    stop the machine and leave        Ctrl-A h    help
  Ctrl-A p    press the power button            Ctrl-A r    reset
  Ctrl-A l    pull the network cable, or plug it in
  Ctrl-A n    show what the network cards have counted, queue by queue
  Ctrl-A c    try again what failed on a disk, for a guest that stands because of it
  Ctrl-A s    save the machine and leave; `ringfort restore` goes on with it

Networks (--net):
  user   a router with NAT in this process; needs no rights. The guest gets 10.0.2.15 by DHCP, IPv6 by router advertisements, and the
         host's name servers at 10.0.2.3. Options:
           hostfwd=tcp|udp:[ADDR]:PORT-[ADDR]:PORT   a port of the host leads into the guest; may be repeated
           restrict=on           nothing but those ports leads in or out
           host-loopback=on      10.0.2.2 leads to the host's own loopback;  hostalias=ADDR does so at ADDR
           nameserver=ADDR[:PORT]   asked instead of the host's name servers; may be repeated
           net=CIDR  host=ADDR  dns=ADDR  dhcpstart=ADDR  lease=SECONDS  ipv6=off  ipv6-prefix=PREFIX::/64
           hostname=NAME  domainname=NAME  dnssearch=NAME (may be repeated)
           tftp=FOLDER  bootfile=NAME   for guests that boot from the network
           dump=FILE             record all frames for Wireshark or tcpdump
  tap    a network device of the host (root, or a tap that is yours):
           ifname=NAME  bridge=NAME  isolated=on (no word with other isolated guests)  queues=N  fd=N (may be repeated)
         vhost=on|off (the host's kernel moves the frames, under --accel kvm; by itself where there is a /dev/vhost-net)
  bridge=NAME   a tap on that bridge, which is made if there is none and goes with its last guest. Without root,
         ringfort-bridge-helper does it for bridges that /etc/ringfort/bridge.conf allows; helper=PATH names another
  network=NAME  a tap on a network that `ringfort net start NAME` keeps, with its DHCP, DNS and NAT
  stream a cable over a stream socket, to QEMU's `-netdev stream`, too:  addr=unix:PATH|tcp:HOST:PORT  server=on  reconnect=SECONDS
  dgram  the same over datagrams:  local=unix:PATH|udp:HOST:PORT  remote=unix:PATH|udp:HOST:PORT (a multicast group is a hub)
  passt  the program passt, when it is installed: path=FILE, arg=ARGUMENT (may be repeated; see passt(1))
  none   no network card
  For all: mac=52:54:00:12:34:56  mtu=N  model=virtio-net|e1000e  rss=on
           tx-rate=BYTES  tx-packets=N  rx-rate=BYTES  rx-packets=N   limits per second from and to the guest; -burst for each
           macguard=on           what the guest sends from other addresses than its own is lost

Keys of --disk, as QEMU's -drive has them (the first value is the default):
  format=raw|qcow2        found out from the image if not given
  readonly=off|on         the guest may not write
  snapshot=off|on         what the guest writes is thrown away at the end
  cache=writeback|none|writethrough|directsync|unsafe
                          none: past the host's page cache; writethrough: every write is durable at once;
                          unsafe: flushes are ignored
  discard=ignore|unmap    give back to the host what the guest gives back
  aio=io_uring|threads    io_uring where the host has it
  queues=N  serial=TEXT   1 to 16 request queues; what the guest reads as serial number
  bps=N  iops=N           limits per second, also bps_rd, bps_wr, iops_rd, iops_wr; with _max a burst rate, with
                          _max_length its seconds; iops_size=N: bytes that count as one operation
  werror=enospc|report|stop|ignore, rerror=report|stop|ignore
                          when the host fails: tell the guest, or stop it until the host is mended; enospc stops it
                          for want of space only, and it goes on by itself once there is some

Commands at the control socket (--control), one JSON object each, after {\"execute\":\"qmp_capabilities\"}:
  block_resize {\"device\":\"virtio0\",\"size\":BYTES}   another size for the first disk; the guest hears of it
  stop  cont  system_powerdown  system_reset  quit  query-block  query-status  query-name  query-version  query-commands

Exit status:
  0  the guest powered off, Ctrl-A x or s     3  the guest reset (--no-reboot)
  1  Ringfort failed                         4  the guest panicked
  2  bad options or files                    odd numbers from 5: the guest's debug-exit value

Examples:
  ringfort run                                          the default Debian guest
  ringfort run -m 2G -c 2 --keep                        the same, larger, and it remembers
  ringfort run --net user,hostfwd=tcp:127.0.0.1:2222-:22    then `ssh -p 2222 root@127.0.0.1`
  ringfort run --kernel vmlinuz --initrd initrd --cmdline console=ttyS0
  ringfort run --kernel vmlinuz --disk path=root.img --cmdline 'console=ttyS0 root=/dev/vda'";

impl RunArgs {
    /// Do it under gdb.
    pub fn debug(mut self) -> ExitCode {
        let usual = || GdbOption { address: GdbAddress::Tcp("127.0.0.1:1234".into()), wait: true };
        self.gdb.get_or_insert_with(usual);
        self.run()
    }

    /// Do it.
    pub fn run(self) -> ExitCode {
        if self.cpu == "help" {
            return cpu_help();
        }
        let (save, gdb, control) = (self.save.clone(), self.gdb.clone(), self.control.clone());
        let (stats, jit_perf_map) = (self.stats.clone(), self.jit_perf_map);
        let config = match self.config() {
            Ok(c) => c,
            Err(message) => return exit::usage(&message),
        };
        start(&config, Options { save, gdb, control, stats, jit_perf_map, ..Options::default() })
    }

    fn config(self) -> Result<VmConfig, String> {
        let mut config = VmConfig {
            name: self.name,
            accel: self.accel.accel,
            tier: self.accel.tier,
            kvm: self.accel.kvm,
            cpu: self.cpu,
            cpus: self.cpus.count,
            placement: self.cpus.placement,
            memory: self.memory.size,
            backing: self.memory.backing,
            boot: Boot::default(),
            disks: self.disk,
            serial: self.serial,
            console: self.console,
            nets: NetOption::nics(self.net).map_err(|e| format!("--net: {e}"))?,
            no_reboot: self.no_reboot,
        };
        match self.kernel {
            Some(kernel) => {
                config.boot = Boot { kernel, initrd: self.initrd, cmdline: self.cmdline.unwrap_or_default() };
            }
            None if self.initrd.is_some() => {
                return Err("--initrd needs --kernel: name the kernel that it belongs to".into());
            }
            None => {
                // Building the guest takes minutes: what is wrong with the rest is told before.
                config.boot.kernel = "vmlinuz".into();
                config.validate(ringfort_base::host::memory().total).map_err(|e| in_options(&e))?;
                default_guest(&mut config, self.cmdline, self.keep)?;
            }
        }
        Ok(config)
    }
}

/// Run the machine to its end.
pub fn start(config: &VmConfig, options: Options) -> ExitCode {
    match ringfort_vmm::run(config, options, &mut RunUi::default()) {
        Ok(Outcome::PowerOff | Outcome::Quit) => ExitCode::SUCCESS,
        Ok(Outcome::Saved(path)) => {
            exit::say(&format!("saved; `ringfort restore {}` goes on with it", path.display()));
            ExitCode::SUCCESS
        }
        Ok(Outcome::Reset) => ExitCode::from(exit::GUEST_RESET),
        Ok(Outcome::Panicked) => {
            exit::say("the guest panicked");
            ExitCode::from(exit::GUEST_PANIC)
        }
        Ok(Outcome::DebugExit(status)) => ExitCode::from(status),
        Err(VmmError::Config(e)) => exit::usage(&in_options(&e)),
        Err(e) if e.is_usage() => exit::usage(&e.to_string()),
        Err(e) => exit::failure(&e.to_string()),
    }
}

/// What is wrong, in terms of options instead of fields.
fn in_options(invalid: &InvalidConfig) -> String {
    let problems = invalid.0.iter().map(|p| {
        let of_list = |list: &str| p.field.strip_prefix(list)?.strip_prefix("s[")?.split_once(']');
        let found = ["disk", "net"].into_iter().find_map(|list| Some((list, of_list(list)?)));
        let option = match found {
            Some((list, (n, key))) => {
                let number = n.parse().map_or(0, |n: usize| n + 1);
                format!("--{list} (number {number}){}", key.replace('.', " "))
            }
            None if p.field == "disks" || p.field == "nets" => format!("--{}", p.field.trim_end_matches('s')),
            None => format!("--{}", p.field.trim_start_matches("boot.").replace('_', "-")),
        };
        format!("{option}: {}", p.what)
    });
    problems.collect::<Vec<_>>().join("; ")
}

/// `--cpu help`: all there is to choose from.
fn cpu_help() -> ExitCode {
    use ringfort_x86::cpuid::{MODELS, feature_names};
    let mut text = String::from("CPU models:\n");
    for m in &MODELS {
        text += &format!("  {:<16}{}\n", m.name, m.about);
    }
    text += "\nFeatures, to add (+) or take away (-):\n";
    for line in feature_names().collect::<Vec<_>>().chunks(8) {
        text += &format!("  {}\n", line.join(" "));
    }
    // Whoever closed the pipe has read enough.
    let _ = std::io::Write::write_all(&mut std::io::stdout(), text.as_bytes());
    ExitCode::SUCCESS
}

/// Fill in the default guest, built first if need be.
fn default_guest(config: &mut VmConfig, cmdline: Option<String>, keep: bool) -> Result<(), String> {
    let cache = ringfort_guest::cache_dir().map_err(|e| e.to_string())?;
    let mut progress = BuildProgress::new();
    let guest = ringfort_guest::ensure(&cache, &mut progress).map_err(|e| e.to_string())?;
    drop(progress);
    let path = if keep { kept_copy(&cache, &guest.disk)? } else { guest.disk };
    let disk = Disk { snapshot: !keep, ..Disk::new(path) };
    config.disks.insert(0, disk);
    config.boot = Boot { kernel: guest.kernel, initrd: Some(guest.initrd), cmdline: guest.cmdline };
    if let Some(extra) = cmdline {
        config.boot.cmdline = format!("{} {extra}", config.boot.cmdline);
    }
    Ok(())
}

/// The copy of the default disk that `--keep` writes to: made on first use, whole before it has its name.
fn kept_copy(cache: &std::path::Path, pristine: &std::path::Path) -> Result<PathBuf, String> {
    let kept = cache.join("kept.img");
    if kept.exists() {
        return Ok(kept);
    }
    let scratch = cache.join(format!(".kept-{}", std::process::id()));
    let fail = |e: std::io::Error| {
        format!(
            "cannot make {}: {e}; free some space or choose another folder with XDG_CACHE_HOME",
            kept.display()
        )
    };
    let made = ringfort_base::file::copy_sparse(pristine, &scratch)
        .and_then(|()| std::fs::rename(&scratch, &kept))
        .map_err(fail);
    if made.is_err() {
        // A scratch file that is not there needs no removing.
        let _ = std::fs::remove_file(&scratch);
    }
    made.map(|()| kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_are_told_in_terms_of_options() {
        let disk: Disk = "path=x,queues=99".parse().expect("a disk");
        let config = VmConfig { memory: 0, disks: vec![disk], ..VmConfig::default() };
        let told = in_options(&config.validate(1 << 40).expect_err("problems"));
        for part in ["--memory: 0 ", "--kernel: no kernel", "--disk (number 1) queues: "] {
            assert!(told.contains(part), "{told}");
        }
    }
}
