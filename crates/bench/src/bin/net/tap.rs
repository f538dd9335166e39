//! The comparison over a tap: the same guests and figures, with the tap's host end in a network namespace of its own.

use std::process::Command;

/// The tap's name.
pub const TAP: &str = "rfb0";
/// The ratio that is wanted of streams over it.
pub const WANTED: f64 = 1.5;

/// A network namespace that goes with the measurement.
struct Namespace(String);

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

fn run(words: &str) -> Result<(), String> {
    let mut words = words.split(' ');
    let program = words.next().unwrap_or_default();
    let done = Command::new(program).args(words).output().map_err(|e| format!("{program}: {e}"))?;
    if done.status.success() {
        return Ok(());
    }
    Err(format!("{program}: {} (root is needed)", String::from_utf8_lossy(&done.stderr).trim()))
}

/// Run this program again, in a namespace with a tap whose host end is 10.0.2.2.
pub fn run_inside() -> Result<(), String> {
    let ns = Namespace(super::leftovers::namespace());
    run(&format!("ip netns add {}", ns.0))?;
    for words in [
        "link set lo up".to_owned(),
        format!("tuntap add {TAP} mode tap vnet_hdr"),
        format!("addr add 10.0.2.2/24 dev {TAP}"),
        format!("link set {TAP} up"),
    ] {
        run(&format!("ip -n {} {words}", ns.0))?;
    }
    // One that goes by losses: what some hosts have instead guesses at the bandwidth, and then measures its guess.
    let _ = run(&format!("ip netns exec {} sysctl -q net.ipv4.tcp_congestion_control=cubic", ns.0));
    let program = std::env::current_exe().map_err(|e| e.to_string())?;
    let done = Command::new("ip")
        .args(["netns", "exec", &ns.0])
        .arg(program)
        .args(std::env::args_os().skip(1))
        .arg("--inside")
        .status()
        .map_err(|e| format!("ip netns exec: {e}"))?;
    if done.success() { Ok(()) } else { Err("the measurement failed".into()) }
}
