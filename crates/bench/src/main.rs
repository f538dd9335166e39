//! `make bench`: boots the same kernel and initramfs under Ringfort and under QEMU's TCG, in turns, and compares the
//! medians of boot time and memory.
//!
//! The clock runs from starting the process to the line that the guest's first program prints. Memory is read from
//! `/proc` at that moment: the peak of the process so far, and what lies outside the guest's RAM.
#![forbid(unsafe_code)]

mod memory;
mod report;
mod run;

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::Parser;
use ringfort_guest::{Progress, TestGuest};

use report::{Report, Side};

/// Compare Ringfort with QEMU on one boot.
#[derive(Debug, Parser)]
struct Cli {
    /// The ringfort program
    #[arg(long, default_value = "target/release/ringfort")]
    ringfort: PathBuf,
    /// The QEMU program
    #[arg(long, default_value = "qemu-system-x86_64")]
    qemu: PathBuf,
    /// Boots of each, alternating
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Virtual CPUs
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16))]
    cpus: u32,
    /// Guest memory in MiB
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(64..=65536))]
    memory: u32,
    /// Kernel; without it, the test guest from Debian's packages is built and used
    #[arg(long, requires = "initrd")]
    kernel: Option<PathBuf>,
    /// Initramfs, whose init prints the line of the test guest
    #[arg(long, requires = "kernel")]
    initrd: Option<PathBuf>,
    /// More words for the kernel command line
    #[arg(long, default_value = "")]
    cmdline: String,
    /// Seconds after which a boot counts as failed
    #[arg(long, default_value_t = 600)]
    timeout: u64,
    /// A further argument for QEMU (repeatable)
    #[arg(long, allow_hyphen_values = true)]
    qemu_arg: Vec<String>,
    /// A further argument for `ringfort run` (repeatable)
    #[arg(long, allow_hyphen_values = true)]
    ringfort_arg: Vec<String>,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

struct Lines;

impl Progress for Lines {
    fn step(&mut self, index: usize, total: usize, what: &str) {
        eprintln!("[{index}/{total}] {what}");
    }
    fn detail(&mut self, _: &str) {}
}

fn main() -> ExitCode {
    match bench(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("bench: {e}");
            ExitCode::FAILURE
        }
    }
}

fn guest(cli: &Cli) -> Result<TestGuest, String> {
    if let (Some(kernel), Some(initrd)) = (&cli.kernel, &cli.initrd) {
        return Ok(TestGuest {
            kernel: kernel.clone(),
            initrd: initrd.clone(),
            cmdline: ringfort_guest::TEST_CMDLINE.into(),
        });
    }
    ringfort_guest::cache_dir()
        .and_then(|dir| ringfort_guest::ensure_test(&dir, &mut Lines))
        .map_err(|e| e.to_string())
}

fn bench(cli: &Cli) -> Result<(), String> {
    let guest = guest(cli)?;
    let cmdline = format!("{} {}", guest.cmdline, cli.cmdline);
    let common = [
        ("kernel", guest.kernel.as_os_str()),
        ("initrd", guest.initrd.as_os_str()),
        ("cmdline", cmdline.trim().as_ref()),
    ];
    let (mut ringfort, mut qemu) = (Side::new("ringfort"), Side::new("qemu"));
    let limit = Duration::from_secs(cli.timeout);
    for round in 1..=cli.rounds {
        for side in [&mut ringfort, &mut qemu] {
            let command = if side.name == "ringfort" {
                run::ringfort(&cli.ringfort, &common, cli.cpus, cli.memory, &cli.ringfort_arg)
            } else {
                run::qemu(&cli.qemu, &common, cli.cpus, cli.memory, &cli.qemu_arg)
            };
            let boot = run::boot(command, u64::from(cli.memory) << 20, limit)
                .map_err(|e| format!("{} (round {round}): {e}", side.name))?;
            eprintln!("round {round} of {}: {:8} {:.2} s", cli.rounds, side.name, boot.seconds);
            side.boots.push(boot);
        }
    }
    let report = Report::new(cli.rounds, cli.cpus, cli.memory, ringfort, qemu);
    if cli.json {
        println!("{}", serde_json::to_string_pretty(&report).map_err(|e| e.to_string())?);
    } else {
        print!("{}", report.table());
    }
    Ok(())
}
