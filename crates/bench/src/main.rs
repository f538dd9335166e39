//! `make bench`: the same guests under Ringfort and under QEMU's TCG, and where it can be on the host itself, in turns;
//! the medians compared, row by row.
//!
//! A round is one run of each engine. Most rows run in one boot of the bench guest (Debian's programs and C programs in
//! an initramfs), timed inside it; its runner prints each result on the console. The boot rows are boots of
//! their own, timed from the start of the process to the line that is waited for.
#![forbid(unsafe_code)]

mod engine;
mod images;
mod memory;
mod native;
mod process;
mod report;
mod rows;
mod run;

use std::{ffi::OsStr, path::PathBuf, process::ExitCode, time::Duration};

use clap::{Parser, ValueEnum};
use ringfort_guest::{DefaultGuest, Progress, TestGuest, UserlandGuest};

use engine::{Boot, Engine, Setup};
use native::Native;
use report::{Clock, Measured, Report};
use rows::{Content, Kind, ROWS, Row};
use run::{Outcome, Where};

/// Compare Ringfort with QEMU's TCG and with the host, row by row.
#[derive(Debug, Parser)]
#[command(after_help = AFTER)]
struct Cli {
    /// The ringfort program
    #[arg(long, default_value = "target/release/ringfort")]
    ringfort: PathBuf,
    /// The QEMU program
    #[arg(long, default_value = "qemu-system-x86_64")]
    qemu: PathBuf,
    /// Rows to run: names with `*` for anything, separated by commas; without it, all
    #[arg(long, value_name = "PATTERN")]
    rows: Option<String>,
    /// Show the names of the rows and leave
    #[arg(long)]
    list: bool,
    /// Rounds; the medians count
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Run these engines only, and print their times
    #[arg(long, value_name = "ENGINE", value_delimiter = ',', value_enum)]
    only: Vec<Only>,
    /// Engine of `ringfort run`, for instance soft,tier=interp
    #[arg(long, default_value = "soft")]
    accel: String,
    /// Compare CPU time on the host instead of time on the clock, for a machine that has other work
    #[arg(long)]
    cpu_time: bool,
    /// Guest memory in MiB
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(512..=65536))]
    memory: u32,
    /// Seconds after which a row counts as hung
    #[arg(long, default_value_t = 300)]
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
    /// Compare the image tool with qemu-img instead of guests (without it, and without --rows or --only, both are done)
    #[arg(long)]
    images: bool,
    /// The qemu-img program
    #[arg(long, default_value = "qemu-img")]
    qemu_img: PathBuf,
    /// Make the guests ready, say where they are, and leave
    #[arg(long)]
    prepare: bool,
}

const AFTER: &str = "\
Examples:
  make bench                                               everything, three rounds
  make bench ARGS='--rows python,chase-*,boot --rounds 5'
  make bench ARGS='--only ringfort --rounds 1'             Ringfort's times alone, for work on the engine
  make bench ARGS=--images                                 the image tool beside qemu-img
  make bench ARGS='--only ringfort --accel soft,tier=interp --rows fib'";

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Only {
    Native,
    Ringfort,
    Qemu,
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

/// The guests that the chosen rows need.
struct Guests {
    bench: UserlandGuest,
    test: TestGuest,
    debian: Option<DefaultGuest>,
}

impl Guests {
    fn ensure(rows: &[Row]) -> Result<Self, String> {
        let made = |e: ringfort_guest::GuestError| e.to_string();
        let cache = ringfort_guest::cache_dir().map_err(made)?;
        let bench = Content::new().describe(|u| ringfort_guest::ensure_userland(&cache, u, &mut Lines));
        let login = rows.iter().any(|r| r.kind == Kind::Login);
        Ok(Self {
            bench: bench.map_err(made)?,
            test: ringfort_guest::ensure_test(&cache, &mut Lines).map_err(made)?,
            debian: login.then(|| ringfort_guest::ensure(&cache, &mut Lines)).transpose().map_err(made)?,
        })
    }
}

/// The image tool's rows.
fn images(cli: &Cli) -> Result<(), String> {
    let ringfort =
        std::fs::canonicalize(&cli.ringfort).map_err(|e| format!("{}: {e}", cli.ringfort.display()))?;
    let images = images::Images {
        ringfort: &ringfort,
        qemu_img: &cli.qemu_img,
        dir: std::env::temp_dir().join(format!("ringfort-bench-images-{}", std::process::id())),
        rounds: cli.rounds,
    };
    let lines = images.measure_all()?;
    if cli.json {
        println!("{}", serde_json::to_string_pretty(&lines).map_err(|e| e.to_string())?);
    } else {
        print!("{}", images::table(&lines));
    }
    Ok(())
}

fn bench(cli: &Cli) -> Result<(), String> {
    if cli.images {
        return images(cli);
    }
    let rows = rows::select(cli.rows.as_deref())?;
    if cli.list {
        for row in ROWS {
            println!("{:12} {}", row.name, row.title);
        }
        return Ok(());
    }
    let guests = Guests::ensure(&rows)?;
    if cli.prepare {
        println!("kernel  {}", guests.bench.kernel.display());
        println!("initrd  {}", guests.bench.initrd.display());
        println!("cmdline {} rfb.rows=fib,python   (or rfb.shell)", guests.bench.cmdline);
        return Ok(());
    }
    let chosen = |e: Engine| {
        let only = match e {
            Engine::Native => Only::Native,
            Engine::Ringfort => Only::Ringfort,
            Engine::Qemu64 | Engine::QemuMax => Only::Qemu,
        };
        cli.only.is_empty() || cli.only.contains(&only)
    };
    let mut engines: Vec<Engine> = Engine::ALL.into_iter().filter(|e| chosen(*e)).collect();
    let native = if chosen(Engine::Native) {
        Native::prepare(&guests.bench)
            .inspect_err(|why| {
                eprintln!("native: skipped: {why}");
                engines.retain(|e| *e != Engine::Native);
            })
            .ok()
    } else {
        None
    };
    let runner = Runner {
        setup: Setup {
            ringfort: cli.ringfort.clone(),
            qemu: cli.qemu.clone(),
            accel: cli.accel.clone(),
            memory: cli.memory,
            ringfort_args: cli.ringfort_arg.clone(),
            qemu_args: cli.qemu_arg.clone(),
        },
        guests,
        native,
        patience: Duration::from_secs(cli.timeout),
    };
    let mut measured = Measured::default();
    for round in 1..=cli.rounds {
        for engine in &engines {
            eprintln!("round {round} of {}: {}", cli.rounds, engine.name());
            runner.round(*engine, &rows, &mut measured);
        }
    }
    let clock = if cli.cpu_time { Clock::Cpu } else { Clock::Wall };
    let report = Report::new(cli.rounds, clock, cli.memory, &rows, &measured);
    if cli.json {
        println!("{}", serde_json::to_string_pretty(&report).map_err(|e| e.to_string())?);
    } else {
        print!("{}", report.table(&engines));
    }
    if cli.rows.is_none() && cli.only.is_empty() {
        println!();
        images(cli)?;
    }
    Ok(())
}

struct Runner {
    setup: Setup,
    guests: Guests,
    native: Option<Native>,
    patience: Duration,
}

impl Runner {
    /// Run all of `rows` once with `engine`.
    fn round(&self, engine: Engine, rows: &[Row], measured: &mut Measured) {
        let scripts: Vec<&str> =
            rows.iter().filter(|r| matches!(r.kind, Kind::Script { .. })).map(|r| r.name).collect();
        for (name, outcome) in self.list(engine, &scripts, 1) {
            measured.add(engine, &name, outcome);
        }
        for row in rows {
            match row.kind {
                Kind::Script { .. } => {}
                Kind::Boot => {
                    let test = &self.guests.test;
                    let boot = boot(test.kernel.as_os_str(), test.initrd.as_os_str(), &test.cmdline);
                    self.boot(engine, row.name, &boot, None, measured);
                }
                Kind::Login => {
                    if let Some(d) = &self.guests.debian {
                        let disk = Some(d.disk.as_os_str());
                        let boot =
                            Boot { disk, ..boot(d.kernel.as_os_str(), d.initrd.as_os_str(), &d.cmdline) };
                        self.boot(engine, row.name, &boot, Some("login: "), measured);
                    }
                }
                Kind::Parallel(_) => {}
            }
        }
        // How a host scales says nothing about an engine, and one of QEMU's models is enough.
        if matches!(engine, Engine::Ringfort | Engine::Qemu64) {
            self.parallel(engine, rows, measured);
        }
    }

    /// The rows that compare two vCPUs with one, in one boot with two.
    fn parallel(&self, engine: Engine, rows: &[Row], measured: &mut Measured) {
        let pairs = rows.iter().filter_map(|r| match r.kind {
            Kind::Parallel(of) => Some([of, r.name]),
            _ => None,
        });
        let names: Vec<&str> = pairs.flatten().collect();
        for (name, outcome) in self.list(engine, &names, 2) {
            // The time of one alone counts with that of the two beside it, from the same boot.
            let alone = rows.iter().find(|r| matches!(r.kind, Kind::Parallel(of) if of == name));
            let name = alone.map_or(name, |r| format!("{}/1", r.name));
            measured.add(engine, &name, outcome);
        }
    }

    /// Rows of the bench guest, on `cpus` vCPUs.
    fn list(&self, engine: Engine, names: &[&str], cpus: u32) -> Vec<(String, Outcome)> {
        if names.is_empty() {
            return Vec::new();
        }
        let start = |left: &[&str]| match &self.native {
            Some(native) if engine == Engine::Native => native.command(left),
            _ => {
                let guest = &self.guests.bench;
                // The kernel's own messages would come between the results.
                let cmdline = format!("{} quiet rfb.rows={}", guest.cmdline, left.join(","));
                let boot =
                    Boot { cpus, ..boot(guest.kernel.as_os_str(), guest.initrd.as_os_str(), &cmdline) };
                self.setup.command(engine, &boot).unwrap_or_else(|| std::process::Command::new("false"))
            }
        };
        let on = if engine == Engine::Native { Where::Host } else { Where::Guest };
        run::rows(names, self.patience, on, start, tell)
    }

    fn boot(
        &self,
        engine: Engine,
        name: &str,
        boot: &Boot<'_>,
        until: Option<&str>,
        measured: &mut Measured,
    ) {
        // The host does not boot.
        let Some(command) = self.setup.command(engine, boot) else { return };
        let outcome = run::boot(command, until, u64::from(self.setup.memory) << 20, self.patience);
        tell(name, &outcome);
        measured.add(engine, name, outcome);
    }
}

fn boot<'a>(kernel: &'a OsStr, initrd: &'a OsStr, cmdline: &'a str) -> Boot<'a> {
    Boot { kernel, initrd, cmdline, disk: None, cpus: 1 }
}

fn tell(name: &str, outcome: &Outcome) {
    match outcome {
        Ok(s) => {
            let cpu = s.cpu_seconds.map_or(String::new(), |c| format!("  ({c:.4} s of CPU time)"));
            eprintln!("  {name:12} {:10.4} s{cpu}", s.seconds);
        }
        Err(why) => eprintln!("  {name:12} {why}"),
    }
}
