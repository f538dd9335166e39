//! One boot, and all figures of it.

use std::{
    io::{Read, Write as _},
    net::TcpListener,
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    time::{Duration, Instant},
};

use ringfort_guest::TEST_PROMPT;

use crate::{ROWS, guest::Guest, tap::TAP};

/// Only a hang runs into it.
const PATIENCE: Duration = Duration::from_secs(300);
/// Rounds of the byte program.
const BYTES: u32 = 2000;

fn cmdline(guest: &Guest) -> String {
    // A guest in software on a busy host may find its timer's interrupts late, and give up.
    format!("{} quiet no_timer_check", guest.cmdline)
}

/// The command that boots it under Ringfort.
pub fn ringfort(program: &Path, guest: &Guest, cpus: u32, tap: bool) -> Command {
    let mut c = Command::new(program);
    c.arg("run").arg("--kernel").arg(&guest.kernel).arg("--initrd").arg(&guest.initrd);
    c.args(["--cmdline", &cmdline(guest), "--memory", "1G", "--cpus", &cpus.to_string()]);
    c.args(["--accel", "soft", "--serial", "stdio", "--net"]);
    c.arg(if tap { format!("tap,ifname={TAP}") } else { "user,host-loopback=on".into() });
    c
}

/// The command that boots it under QEMU.
pub fn qemu(program: &Path, guest: &Guest, cpus: u32, tap: bool) -> Command {
    let mut c = Command::new(program);
    c.arg("-kernel").arg(&guest.kernel).arg("-initrd").arg(&guest.initrd);
    c.args(["-append", &cmdline(guest), "-m", "1024", "-smp", &cpus.to_string(), "-cpu", "max"]);
    c.args(["-machine", "q35", "-accel", "tcg", "-nodefaults", "-no-user-config", "-no-reboot"]);
    c.args(["-display", "none", "-serial", "stdio"]);
    let net = match tap {
        true => format!("tap,id=net,ifname={TAP},script=no,downscript=no,vhost=off"),
        false => "user,id=net".into(),
    };
    c.args(["-netdev", &net, "-device", "virtio-net-pci,netdev=net"]);
    c
}

/// A process that does not outlive the measurement.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Console {
    vm: Guard,
    input: std::process::ChildStdin,
    output: Receiver<Vec<u8>>,
    text: String,
}

impl Console {
    fn start(mut command: Command) -> Result<Console, String> {
        let program = command.get_program().to_string_lossy().into_owned();
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let child = command.spawn().map_err(|e| format!("cannot start {program}: {e}"))?;
        let mut vm = Guard(child);
        let input = vm.0.stdin.take().ok_or("no standard input")?;
        let mut stdout = vm.0.stdout.take().ok_or("no standard output")?;
        let (tx, output) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = stdout.read(&mut buffer) {
                if tx.send(buffer[..n].to_vec()).is_err() {
                    return;
                }
            }
        });
        Ok(Console { vm, input, output, text: String::new() })
    }

    /// Wait for `mark`; gives what came before it.
    fn expect(&mut self, mark: &str) -> Result<String, String> {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.text.find(mark) {
                let before = self.text[..at].to_owned();
                self.text.drain(..at + mark.len());
                return Ok(before);
            }
            match self.output.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(bytes) => self.text.push_str(&String::from_utf8_lossy(&bytes)),
                Err(e) => return Err(format!("{mark:?} did not come ({e}) after: {}", tail(&self.text))),
            }
        }
    }

    /// CPU time of the VMM so far (proc(5): fields 14 and 15 of stat, in hundredths).
    fn cpu_seconds(&self) -> f64 {
        let text = std::fs::read_to_string(format!("/proc/{}/stat", self.vm.0.id())).unwrap_or_default();
        let after_name = text.rsplit_once(')').map_or("", |(_, rest)| rest);
        let ticks = after_name.split_whitespace().skip(11).take(2).filter_map(|f| f.parse::<f64>().ok());
        ticks.sum::<f64>() / 100.0
    }

    fn shell(&mut self, command: &str) -> Result<String, String> {
        // The marks are written so that the echo of the command line does not contain them.
        writeln!(self.input, "echo rf-'begin'; {command}; echo rf-'end'").map_err(|e| e.to_string())?;
        self.expect("rf-begin")?;
        self.expect("rf-end")
    }
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(8)..].join("\n")
}

/// A free port of the host's.
fn free_port() -> Result<u16, String> {
    let at = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).map_err(|e| e.to_string())?;
    Ok(at.port())
}

/// Boot `command` and take all figures, in the order of [`ROWS`].
///
/// With `cpu_time` they count the VMM's CPU time instead of the clock's.
pub fn measure(
    command: Command,
    seconds: u32,
    tap: bool,
    cpu_time: bool,
) -> Result<[f64; ROWS.len()], String> {
    let port = free_port()?;
    let mut server = Command::new("iperf3");
    server.args(["-s", "-p", &port.to_string()]).stdout(Stdio::null()).stderr(Stdio::null());
    let _server = Guard(server.spawn().map_err(|e| format!("cannot start iperf3: {e}; install it"))?);
    // Over a tap the guest reaches the host at its address there.
    let bytes =
        TcpListener::bind(if tap { "0.0.0.0:0" } else { "127.0.0.1:0" }).map_err(|e| e.to_string())?;
    let bytes_port = bytes.local_addr().map_err(|e| e.to_string())?.port();
    std::thread::spawn(move || {
        for stream in bytes.incoming().map_while(Result::ok) {
            std::thread::spawn(move || crate::answer_bytes(stream));
        }
    });
    let mut console = Console::start(command)?;
    console.expect(TEST_PROMPT)?;
    console.shell(
        "cd /sys/class/net; for c in e*; do ip addr add 10.0.2.15/24 dev $c; ip link set $c up; done; \
         ip route add default via 10.0.2.2; cd /",
    )?;
    // The first exchange waits for neighbours to be found.
    console.shell(&format!("/usr/bin/bytes 10.0.2.2 {bytes_port} 100"))?;
    let mut figures = [0.0; ROWS.len()];
    for (n, options) in ["", "-P 4", "-R", "-R -P 4"].into_iter().enumerate() {
        let before = console.cpu_seconds();
        let said =
            console.shell(&format!("/usr/bin/iperf3 -c 10.0.2.2 -p {port} -t {seconds} -f k {options}"))?;
        let used = console.cpu_seconds() - before;
        let scale = if cpu_time { f64::from(seconds) / used.max(0.01) } else { 1.0 };
        figures[n] = scale * rate(&said).ok_or_else(|| format!("no rate from iperf3: {}", tail(&said)))?;
    }
    let before = console.cpu_seconds();
    let said = console.shell(&format!("/usr/bin/bytes 10.0.2.2 {bytes_port} {BYTES}"))?;
    let used = console.cpu_seconds() - before;
    let time = said.lines().find_map(|l| l.trim().strip_suffix(" us"));
    figures[4] = time
        .and_then(|t| t.parse().ok())
        .ok_or_else(|| format!("no time from the byte program: {}", tail(&said)))?;
    if cpu_time {
        // It begins with a tenth more rounds that do not count.
        figures[4] = used * 1e6 / (f64::from(BYTES) * 1.1);
    }
    Ok(figures)
}

/// Mbit/s from iperf3's last line for the receiver: the sum, if there are several streams.
fn rate(text: &str) -> Option<f64> {
    let line = text.lines().rfind(|l| l.contains("receiver"))?;
    let words: Vec<&str> = line.split_whitespace().collect();
    let at = words.iter().position(|w| *w == "Kbits/sec")?;
    Some(words.get(at.checked_sub(1)?)?.parse::<f64>().ok()? / 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates() {
        let text = "[  5]   0.00-5.08   sec  2.76 GBytes  4670000 Kbits/sec   21             sender\r\n\
                    [  5]   0.00-5.00   sec  2.75 GBytes  4728000 Kbits/sec                  receiver\r\n\r\niperf Done.\r\n";
        assert_eq!(rate(text), Some(4728.0));
        assert_eq!(
            rate("[SUM]   0.00-5.00   sec  1.76 GBytes  3018 Kbits/sec                  receiver"),
            Some(3.018)
        );
        assert_eq!(rate("iperf3: error - unable to connect"), None);
    }
}
