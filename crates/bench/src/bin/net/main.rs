//! The network part of `make bench`: the same guest under Ringfort's `--net user` and under QEMU's user networking (libslirp), both
//! with their CPUs in software, in turns; and the NAT alone, fed by a harness.
//!
//! iperf3 measures streams between guest and host; a program of ours sends a byte and waits for one back. The medians of all rounds
//! count.
#![forbid(unsafe_code)]

mod alone;
mod guest;
mod leftovers;
mod tap;
mod vm;

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    path::PathBuf,
    process::ExitCode,
};

use clap::Parser;
use serde::Serialize;

/// Compare Ringfort's networking with QEMU's.
#[derive(Debug, Parser)]
struct Cli {
    /// The ringfort program
    #[arg(long, default_value = "target/release/ringfort")]
    ringfort: PathBuf,
    /// The QEMU program
    #[arg(long, default_value = "qemu-system-x86_64")]
    qemu: PathBuf,
    /// Boots of each, alternating
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Seconds of each stream
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// Virtual CPUs
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16))]
    cpus: u32,
    /// Measure the NAT alone and no guest
    #[arg(long)]
    alone: bool,
    /// Over a tap instead of user networking; the host's end is in a network namespace made for it, which takes root
    #[arg(long, conflicts_with = "alone")]
    tap: bool,
    /// For this program's own use: it is in that namespace
    #[arg(long, hide = true)]
    inside: bool,
    /// Rates per second of the VMM's CPU time, and CPU time per exchange, for a host that has other work
    #[arg(long)]
    cpu_time: bool,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
    /// For this program's own use: the other end of a stream (sink or source)
    #[arg(long, hide = true)]
    far_end: Option<String>,
}

/// What is compared: name, unit, whether more is better, the ratio that is wanted of Ringfort's to QEMU's.
const ROWS: [(&str, &str, bool, f64); 5] = [
    ("guest to host, 1 stream", "Mbit/s", true, 2.0),
    ("guest to host, 4 streams", "Mbit/s", true, 2.0),
    ("host to guest, 1 stream", "Mbit/s", true, 2.0),
    ("host to guest, 4 streams", "Mbit/s", true, 2.0),
    ("a byte there and one back", "us", false, 1.0),
];

#[derive(Debug, Serialize)]
struct Row {
    what: &'static str,
    unit: &'static str,
    ringfort: f64,
    qemu: f64,
    /// Ringfort's as a multiple of QEMU's.
    ratio: f64,
    wanted: f64,
    reached: bool,
    raw: [Vec<f64>; 2],
}

#[derive(Debug, Serialize)]
struct Report {
    rounds: u32,
    cpus: u32,
    tap: bool,
    /// Figures are per second of the VMM's CPU time.
    cpu_time: bool,
    guests: Vec<Row>,
    alone: Vec<alone::Row>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if cli.far_end.is_none() && !cli.inside {
        leftovers::remove();
    }
    let done = match &cli.far_end {
        Some(kind) => far_end(kind),
        None if cli.tap && !cli.inside => tap::run_inside(),
        None => bench(&cli),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("bench of networks: {e}");
            ExitCode::FAILURE
        }
    }
}

fn bench(cli: &Cli) -> Result<(), String> {
    let alone = if cli.tap { Vec::new() } else { alone::measure(f64::from(cli.seconds))? };
    let mut results: [Vec<[f64; ROWS.len()]>; 2] = Default::default();
    if !cli.alone {
        let guest = guest::Guest::ensure()?;
        for round in 1..=cli.rounds {
            for (side, name) in ["ringfort", "qemu"].into_iter().enumerate() {
                let figures = match side {
                    0 => vm::ringfort(&cli.ringfort, &guest, cli.cpus, cli.tap),
                    _ => vm::qemu(&cli.qemu, &guest, cli.cpus, cli.tap),
                };
                let figures = vm::measure(figures, cli.seconds, cli.tap, cli.cpu_time)
                    .map_err(|e| format!("{name}: {e}"))?;
                eprintln!("round {round} of {}: {name:8} {figures:.0?}", cli.rounds);
                results[side].push(figures);
            }
        }
    }
    let column = |side: usize, n: usize| results[side].iter().map(|f| f[n]).collect::<Vec<f64>>();
    let row = |(n, &(what, unit, more, wanted)): (usize, &(&'static str, &'static str, bool, f64))| {
        let raw = [column(0, n), column(1, n)];
        let (ringfort, qemu) = (median(&raw[0]), median(&raw[1]));
        let ratio = ringfort / qemu;
        let wanted = if cli.tap && more { tap::WANTED } else { wanted };
        let reached = if more { ratio >= wanted } else { ratio <= wanted };
        Row { what, unit, ringfort, qemu, ratio, wanted, reached, raw }
    };
    let guests = if cli.alone { Vec::new() } else { ROWS.iter().enumerate().map(row).collect() };
    let report =
        Report { rounds: cli.rounds, cpus: cli.cpus, tap: cli.tap, cpu_time: cli.cpu_time, guests, alone };
    if cli.json {
        println!("{}", serde_json::to_string_pretty(&report).map_err(|e| e.to_string())?);
    } else {
        print!("{}", table(&report));
    }
    Ok(())
}

fn table(report: &Report) -> String {
    let mut text = String::new();
    if !report.guests.is_empty() {
        let clock = if report.cpu_time { "\nby the VMMs' CPU time" } else { "" };
        let net = if report.tap { "tap" } else { "user" };
        text += &format!(
            "networks: medians of {} boots each, {} vCPU; ringfort --accel soft --net {net}, qemu -accel tcg -netdev {net}{clock}\n\n\
             {:34} {:>10} {:>10} {:>15} {:>10}\n",
            report.rounds, report.cpus, "", "ringfort", "qemu", "ringfort / qemu", "wanted"
        );
    }
    for r in &report.guests {
        let label = format!("{} ({})", r.what, r.unit);
        let sign = if r.wanted > 1.0 { ">=" } else { "<=" };
        text += &format!(
            "{label:34} {:>10.0} {:>10.0} {:>15.2} {:>7} {}{}\n",
            r.ringfort,
            r.qemu,
            r.ratio,
            sign,
            r.wanted,
            if r.reached { "" } else { "  missed" }
        );
    }
    if !report.alone.is_empty() {
        text +=
            &format!("\n{:34} {:>10} {:>18}\n", "NAT alone, MTU 1500, offloads", "Gbit/s", "Gbit/s per core");
    }
    for r in &report.alone {
        let missed = if r.per_core < r.wanted { "  missed" } else { "" };
        text +=
            &format!("{:34} {:>10.1} {:>18.1} (>= {:.0}){missed}\n", r.what, r.rate, r.per_core, r.wanted);
    }
    text
}

fn median(values: &[f64]) -> f64 {
    let mut v = values.to_vec();
    v.sort_by(f64::total_cmp);
    match v.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => v[n / 2],
        n => f64::midpoint(v[n / 2 - 1], v[n / 2]),
    }
}

/// The other end of a stream, in a process of its own so that its CPU time is not the NAT's: prints its port, serves one
/// connection, and ends with it; or keeps a crowd of them open.
fn far_end(kind: &str) -> Result<(), String> {
    let fail = |e: std::io::Error| e.to_string();
    let listener = TcpListener::bind("127.0.0.1:0").map_err(fail)?;
    println!("{}", listener.local_addr().map_err(fail)?.port());
    if kind == "crowd" {
        // Until whoever started it ends it.
        let _all: Vec<TcpStream> = listener.incoming().map_while(Result::ok).collect();
        return Ok(());
    }
    let (mut stream, _) = listener.accept().map_err(fail)?;
    let mut buffer = vec![0; 1 << 20];
    // It ends when the other end goes away, in whatever way.
    match kind {
        "sink" => while matches!(stream.read(&mut buffer), Ok(n) if n > 0) {},
        _ => while stream.write_all(&buffer).is_ok() {},
    }
    Ok(())
}

/// Answers each byte with one.
pub(crate) fn answer_bytes(mut stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    let mut byte = [0];
    while matches!(stream.read(&mut byte), Ok(1)) && stream.write_all(&byte).is_ok() {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0]), 2.5);
    }

    #[test]
    fn what_was_missed_is_marked() {
        let row = |ratio, reached| Row {
            what: "x",
            unit: "us",
            ringfort: 1.0,
            qemu: 1.0,
            ratio,
            wanted: 1.0,
            reached,
            raw: Default::default(),
        };
        let alone = vec![alone::Row { what: "there", rate: 9.0, per_core: 4.9, wanted: alone::WANTED }];
        let text = table(&Report {
            rounds: 1,
            cpus: 1,
            tap: false,
            cpu_time: false,
            guests: vec![row(0.9, true), row(1.1, false)],
            alone,
        });
        let missed: Vec<bool> = text.lines().map(|l| l.ends_with("missed")).collect();
        assert_eq!(missed.iter().filter(|m| **m).count(), 2, "{text}");
        assert!(text.contains("0.90") && text.contains("4.9"), "{text}");
    }
}
