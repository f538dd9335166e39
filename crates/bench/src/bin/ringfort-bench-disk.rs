//! The disk rows of `make bench`: the block layer alone against `qemu-img bench`, and fio in a guest under the software
//! engine against QEMU's TCG on the same host file. Both sides run in turns; the medians are compared.
#![forbid(unsafe_code)]

use clap::{Parser, ValueEnum};
use ringfort_guest::{FIO, Progress, TEST_PROMPT, TestGuest};
use serde::Serialize;
use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// Compare disks.
#[derive(Debug, Parser)]
#[command(name = "ringfort-bench-disk")]
struct Cli {
    /// The ringfort program
    #[arg(long, default_value = "target/release/ringfort")]
    ringfort: PathBuf,
    /// The QEMU program
    #[arg(long, default_value = "qemu-system-x86_64")]
    qemu: PathBuf,
    /// QEMU's image tool
    #[arg(long, default_value = "qemu-img")]
    qemu_img: PathBuf,
    /// Rounds; the medians count
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Only this part
    #[arg(long, value_enum)]
    only: Option<Part>,
    /// Size of the images in MiB
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(16..=65536))]
    size: u32,
    /// Requests of a run of the block layer
    #[arg(long, default_value_t = 50_000)]
    count: u32,
    /// Seconds that fio runs for
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// Folder for the images, on the file system to be measured
    #[arg(long, default_value = "/var/tmp")]
    dir: PathBuf,
    /// The host's cache, of both
    #[arg(long, default_value = "writeback", value_parser = ["writeback", "none"])]
    cache: String,
    /// Seconds after which a guest counts as hung
    #[arg(long, default_value_t = 600)]
    timeout: u64,
    /// Rates per second of CPU time of the VMM instead of the clock's, for a machine that has other work (guests only)
    #[arg(long)]
    cpu_time: bool,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// The block layer alone
    Layer,
    /// fio in a guest
    Guest,
}

struct Lines;

impl Progress for Lines {
    fn step(&mut self, index: usize, total: usize, what: &str) {
        eprintln!("[{index}/{total}] {what}");
    }
    fn detail(&mut self, _: &str) {}
}

/// A row: rates of both, one for each round; more is better.
#[derive(Debug, Serialize)]
struct Row {
    title: String,
    unit: &'static str,
    target: f64,
    ringfort: Vec<f64>,
    qemu: Vec<f64>,
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

impl Row {
    fn line(&self) -> String {
        let (a, b) = (median(&self.ringfort), median(&self.qemu));
        let mark = if a / b >= self.target { "pass" } else { "FAIL" };
        format!(
            "{:44} {a:>12.0} {b:>12.0} {:8} {:>7.2}   {}x  {mark}\n",
            self.title,
            self.unit,
            a / b,
            self.target
        )
    }
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

/// A folder that goes away.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn bench(cli: &Cli) -> Result<(), String> {
    let dir = cli.dir.join(format!("ringfort-bench-disk-{}", std::process::id()));
    std::fs::create_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let dir = Scratch(dir);
    let raw = dir.0.join("disk.raw");
    fill(&raw, u64::from(cli.size) << 20).map_err(|e| format!("{}: {e}", raw.display()))?;
    let mut rows = Vec::new();
    if cli.only != Some(Part::Guest) {
        rows.extend(layer(cli, &dir.0, &raw)?);
    }
    if cli.only != Some(Part::Layer) {
        rows.extend(guests(cli, &raw)?);
    }
    if cli.json {
        println!("{}", serde_json::to_string_pretty(&rows).map_err(|e| e.to_string())?);
        return Ok(());
    }
    println!(
        "disks: medians of {} rounds; fio in guests: ringfort --accel soft, qemu -accel tcg, cache={}{}\n",
        cli.rounds,
        cli.cache,
        if cli.cpu_time { ", per second of the VMM's CPU time" } else { "" }
    );
    println!("{:44} {:>12} {:>12} {:8} {:>7}   target", "", "ringfort", "qemu", "", "ratio");
    rows.iter().for_each(|r| print!("{}", r.line()));
    Ok(())
}

/// Fill a new file with bytes that no host makes smaller.
fn fill(path: &Path, len: u64) -> std::io::Result<()> {
    let mut to = BufWriter::with_capacity(1 << 20, File::create(path)?);
    let mut x = 0x9e37_79b9_7f4a_7c15u64;
    for _ in 0..len / 8 {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        to.write_all(&x.to_le_bytes())?;
    }
    to.into_inner()?.sync_all()
}

/// Requests per second of a `bench` verb.
fn verb(program: &mut Command, count: u32) -> Result<f64, String> {
    let out = program.output().map_err(|e| format!("{program:?}: {e}"))?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let seconds: Option<f64> = text
        .lines()
        .find_map(|l| l.strip_prefix("Run completed in ")?.strip_suffix(" seconds."))
        .and_then(|s| s.parse().ok());
    match seconds {
        Some(s) if out.status.success() && s > 0.0 => Ok(f64::from(count) / s),
        _ => Err(format!("{program:?}: {text}{}", String::from_utf8_lossy(&out.stderr))),
    }
}

fn layer(cli: &Cli, dir: &Path, raw: &Path) -> Result<Vec<Row>, String> {
    let qcow2 = dir.join("disk.qcow2");
    let made = Command::new(&cli.qemu_img)
        .args(["convert", "-f", "raw", "-O", "qcow2"])
        .args([raw, &qcow2])
        .status()
        .map_err(|e| format!("{}: {e}", cli.qemu_img.display()))?;
    if !made.success() {
        return Err("qemu-img convert failed".into());
    }
    let mut rows = Vec::new();
    for (format, image) in [("raw", raw), ("qcow2", &qcow2)] {
        for cache in ["writeback", "none"] {
            for write in [false, true] {
                // QEMU's tool by its default, threads, and by io_uring where it has that: the better one counts.
                let what = if write { "write" } else { "read" };
                let mut row = Row {
                    title: format!("block layer: 4 KiB {what}, depth 64, {format}, {cache}"),
                    unit: "req/s",
                    target: 1.0,
                    ringfort: Vec::new(),
                    qemu: Vec::new(),
                };
                for _ in 0..cli.rounds {
                    let count = cli.count.to_string();
                    let mut args = vec!["-c", &count, "-d", "64", "-s", "4096", "-t", cache, "-f", format];
                    if write {
                        args.push("-w");
                    }
                    let ours = |c: &mut Command| verb(c.args(&args).arg(image), cli.count);
                    row.ringfort.push(ours(Command::new(&cli.ringfort).args(["img", "bench"]))?);
                    let threads = ours(Command::new(&cli.qemu_img).arg("bench"))?;
                    let ring = ours(Command::new(&cli.qemu_img).args(["bench", "-i", "io_uring"]));
                    row.qemu.push(ring.map_or(threads, |r| r.max(threads)));
                }
                eprint!("{}", row.line());
                rows.push(row);
            }
        }
    }
    Ok(rows)
}

/// A guest at its shell.
struct Guest {
    child: Child,
    stdin: Option<std::process::ChildStdin>,
    output: Receiver<Vec<u8>>,
    said: String,
    limit: Instant,
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Guest {
    fn start(mut command: Command, limit: Duration) -> Result<Guest, String> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .map_err(|e| format!("{command:?}: {e}"))?;
        let mut from = child.stdout.take().ok_or("no output")?;
        let (tx, output) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n) = from.read(&mut buffer) {
                if n == 0 || tx.send(buffer[..n].to_vec()).is_err() {
                    return;
                }
            }
        });
        let stdin = child.stdin.take();
        Ok(Guest { child, stdin, output, said: String::new(), limit: Instant::now() + limit })
    }

    /// What it says up to `text`.
    fn until(&mut self, text: &str) -> Result<String, String> {
        loop {
            if let Some(at) = self.said.find(text) {
                let before = self.said[..at].to_owned();
                self.said.drain(..at + text.len());
                return Ok(before);
            }
            let left = self.limit.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(bytes) => self.said += &String::from_utf8_lossy(&bytes),
                Err(RecvTimeoutError::Timeout) => {
                    return Err(format!("{text:?} did not come: {}", self.said));
                }
                Err(RecvTimeoutError::Disconnected) => return Err(format!("it ended: {}", self.said)),
            }
        }
    }

    fn type_in(&mut self, line: &str) -> Result<(), String> {
        let to = self.stdin.as_mut().ok_or("no input")?;
        to.write_all(line.as_bytes()).and_then(|()| to.flush()).map_err(|e| e.to_string())
    }
}

/// A row of fio: title, its arguments, where its figure is in a terse line (1-based, fio's HOWTO), unit.
const JOBS: [(&str, &str, usize, &str); 4] = [
    ("fio 4 KiB randread, depth 32", "--rw=randread --bs=4k --iodepth=32", 8, "IOPS"),
    ("fio 4 KiB randwrite, depth 32", "--rw=randwrite --bs=4k --iodepth=32", 49, "IOPS"),
    ("fio 1 MiB sequential read", "--rw=read --bs=1m --iodepth=4", 7, "KiB/s"),
    ("fio 1 MiB sequential write", "--rw=write --bs=1m --iodepth=4", 48, "KiB/s"),
];

fn guests(cli: &Cli, raw: &Path) -> Result<Vec<Row>, String> {
    let made = |e: ringfort_guest::GuestError| e.to_string();
    let cache = ringfort_guest::cache_dir().map_err(made)?;
    let guest = ringfort_guest::ensure_fio(&cache, &mut Lines).map_err(made)?;
    let mut rows: Vec<Row> = JOBS
        .iter()
        .map(|(title, _, _, unit)| Row {
            title: format!("guest: {title}"),
            unit,
            target: 1.5,
            ringfort: Vec::new(),
            qemu: Vec::new(),
        })
        .collect();
    for round in 1..=cli.rounds {
        for ours in [true, false] {
            let command = if ours { ringfort(cli, &guest, raw) } else { qemu(cli, &guest, raw) };
            let figures = fio(cli, command)?;
            eprintln!("round {round}: {} {figures:.0?}", if ours { "ringfort" } else { "qemu" });
            for (row, figure) in rows.iter_mut().zip(figures) {
                if ours { row.ringfort.push(figure) } else { row.qemu.push(figure) }
            }
        }
    }
    Ok(rows)
}

fn ringfort(cli: &Cli, guest: &TestGuest, disk: &Path) -> Command {
    let mut c = Command::new(&cli.ringfort);
    c.args(["run", "--accel", "soft", "--net", "none", "--memory", "1G"]);
    c.arg("--kernel").arg(&guest.kernel).arg("--initrd").arg(&guest.initrd);
    c.args(["--cmdline", &format!("{} quiet", guest.cmdline)]);
    c.arg("--disk").arg(format!("path={},format=raw,cache={}", disk.display(), cli.cache));
    c
}

fn qemu(cli: &Cli, guest: &TestGuest, disk: &Path) -> Command {
    let mut c = Command::new(&cli.qemu);
    c.args(["-machine", "q35", "-accel", "tcg", "-cpu", "max", "-m", "1G", "-smp", "1"]);
    c.args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"]);
    c.arg("-kernel").arg(&guest.kernel).arg("-initrd").arg(&guest.initrd);
    c.args(["-append", &format!("{} quiet", guest.cmdline)]);
    let drive = format!("if=none,id=d,format=raw,cache={},file={}", cli.cache, disk.display());
    c.args(["-drive", &drive, "-device", "virtio-blk-pci,drive=d"]);
    c
}

fn fio(cli: &Cli, command: Command) -> Result<Vec<f64>, String> {
    let mut g = Guest::start(command, Duration::from_secs(cli.timeout))?;
    g.until(TEST_PROMPT)?;
    let mut figures = Vec::new();
    for (title, args, field, _) in JOBS {
        let before = cpu_seconds(g.child.id())?;
        g.type_in(&format!(
            "echo fio-'begin'; {FIO} --name=j --filename=/dev/vda --direct=1 --ioengine=libaio --time_based \
             --runtime={} --norandommap --randrepeat=1 --minimal {args}; echo fio-'end'\n",
            cli.seconds
        ))?;
        g.until("fio-begin")?;
        let said = g.until("fio-end")?;
        let line = said.lines().find(|l| l.starts_with("3;")).ok_or_else(|| format!("{title}: {said}"))?;
        let figure = line.split(';').nth(field - 1).and_then(|f| f.parse::<f64>().ok());
        let figure = figure.filter(|f| *f > 0.0).ok_or_else(|| format!("{title}: {line}"))?;
        let cpu = cpu_seconds(g.child.id())? - before;
        figures.push(if cli.cpu_time { figure * f64::from(cli.seconds) / cpu } else { figure });
    }
    Ok(figures)
}

/// CPU time of a process so far (proc(5), `stat`: fields 14 and 15, in hundredths of a second).
fn cpu_seconds(pid: u32) -> Result<f64, String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).map_err(|e| e.to_string())?;
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let ticks: f64 =
        after_name.split_whitespace().skip(11).take(2).filter_map(|f| f.parse::<f64>().ok()).sum();
    if ticks > 0.0 { Ok(ticks / 100.0) } else { Err(format!("no CPU time of process {pid}")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_marks() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[1.0, 2.0]), 1.5);
        let row = |a, b| Row { title: "t".into(), unit: "u", target: 1.5, ringfort: vec![a], qemu: vec![b] };
        assert!(row(3.0, 2.0).line().contains("pass") && row(2.9, 2.0).line().contains("FAIL"));
    }

    #[test]
    fn what_a_verb_says_is_read_or_shown() {
        let sh = |s: &str| {
            let mut c = Command::new("sh");
            c.args(["-c", s]);
            c
        };
        assert_eq!(verb(&mut sh("echo 'Run completed in 2.500 seconds.'"), 100), Ok(40.0));
        assert!(verb(&mut sh("echo bad >&2; exit 1"), 1).is_err_and(|e| e.contains("bad")));
    }
}
