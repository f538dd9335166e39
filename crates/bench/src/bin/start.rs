//! What a start costs: CPU time from the start of the process to the guest's first instruction, and memory of the process beyond the
//! guest's RAM. `make bench-start`.
//!
//! The guest's first instruction writes a byte to the serial port. Once it has come out, the threads' CPU time so far is read, and what of
//! the process's memory is resident and is not the guest's RAM: all of it, and that of it which it shares with nobody.
#![forbid(unsafe_code)]

use clap::Parser;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};

/// Measure what a start of `ringfort run` costs.
#[derive(Debug, Parser)]
struct Cli {
    /// The ringfort program
    #[arg(long, default_value = "target/release/ringfort")]
    ringfort: PathBuf,
    /// Engine
    #[arg(long, default_value = "kvm")]
    accel: String,
    /// Starts; the medians count
    #[arg(long, default_value_t = 11, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Guest memory in MiB
    #[arg(long, default_value_t = 128)]
    memory: u32,
    /// vCPUs
    #[arg(long, default_value_t = 1)]
    cpus: u32,
}

/// A 32-bit kernel for the Multiboot protocol whose first instructions print `!` on the first serial port and halt.
fn kernel() -> Vec<u8> {
    const BASE: u32 = 0x10_0000;
    // Magic, flags (the addresses are given), checksum; then header, load begin and end, end of BSS, entry.
    let (magic, flags) = (0x1bad_b002u32, 1u32 << 16);
    let words = [magic, flags, 0u32.wrapping_sub(magic).wrapping_sub(flags), BASE, BASE, 0, 0, BASE + 32];
    let mut image: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    // mov dx, 3f8h; mov al, '!'; out dx, al; hlt; jmp to the hlt.
    image.extend([0x66, 0xba, 0xf8, 0x03, 0xb0, b'!', 0xee, 0xf4, 0xeb, 0xfd]);
    image
}

/// Ends with this value.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// One start.
struct Start {
    /// CPU time, in nanoseconds.
    cpu: u64,
    /// Resident memory beyond the guest's, in KiB.
    resident: u64,
    /// Of that, what is written and shared with nobody, in KiB.
    own: u64,
}

fn start(cli: &Cli, kernel: &Path) -> Result<Start, String> {
    let child = Command::new(&cli.ringfort)
        .args(["run", "--accel", &cli.accel, "--net", "none", "--cpus", &cli.cpus.to_string(), "--kernel"])
        .arg(kernel)
        // A memory file has a name by which its mapping is known.
        .args(["--memory", &format!("{}M,shared=on", cli.memory)])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|e| format!("{}: {e}", cli.ringfort.display()))?;
    let mut child = Running(child);
    let mut out = child.0.stdout.take().ok_or("no output")?;
    let mut byte = [0];
    out.read_exact(&mut byte).map_err(|_| "the guest did not start; see above".to_owned())?;
    let pid = child.0.id();
    let fail = |e: std::io::Error| format!("/proc/{pid}: {e}");
    let mut cpu = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task")).map_err(fail)? {
        let text = fs::read_to_string(thread.map_err(fail)?.path().join("schedstat")).map_err(fail)?;
        cpu += text.split_whitespace().next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
    }
    let (mut resident, mut own, mut guest) = (0, 0, false);
    for line in fs::read_to_string(format!("/proc/{pid}/smaps")).map_err(fail)?.lines() {
        let mut words = line.split_whitespace();
        let (key, number) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        // A mapping's own line begins with its addresses.
        if !key.ends_with(':') {
            guest = line.contains("guest-ram");
        } else if !guest {
            let kib = number.parse::<u64>().unwrap_or(0);
            match key {
                "Rss:" => resident += kib,
                // Not `Private_Dirty`: pages of a program that has just been built are that, too.
                "Anonymous:" => own += kib,
                _ => {}
            }
        }
    }
    Ok(Start { cpu, resident, own })
}

fn median(mut values: Vec<u64>) -> u64 {
    values.sort_unstable();
    values[values.len() / 2]
}

fn measure(cli: &Cli) -> Result<(), String> {
    let kernel_file = std::env::temp_dir().join(format!("ringfort-start-{}", std::process::id()));
    fs::write(&kernel_file, kernel()).map_err(|e| format!("{}: {e}", kernel_file.display()))?;
    let starts: Result<Vec<Start>, String> = (0..cli.rounds).map(|_| start(cli, &kernel_file)).collect();
    // A file that is left in the folder for temporary ones is no reason to fail.
    let _ = fs::remove_file(&kernel_file);
    let starts = starts?;
    let of = |f: fn(&Start) -> u64| median(starts.iter().map(f).collect());
    let mib = |kib: u64| kib as f64 / 1024.0;
    println!("{} starts, --accel {}, {} vCPUs, {} MiB; medians", cli.rounds, cli.accel, cli.cpus, cli.memory);
    println!("CPU time to the guest's first output    {:8.2} ms   (aim: 8)", of(|s| s.cpu) as f64 / 1e6);
    println!("resident memory beyond the guest's      {:8.2} MiB", mib(of(|s| s.resident)));
    println!("  of that written, and its own          {:8.2} MiB  (aim: 5)", mib(of(|s| s.own)));
    Ok(())
}

fn main() -> ExitCode {
    match measure(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("bench-start: {e}");
            ExitCode::FAILURE
        }
    }
}
