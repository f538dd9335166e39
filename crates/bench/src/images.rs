//! The image tool beside qemu-img: the same work by both in turns, medians compared.

use serde::Serialize;
use std::{
    fs::File,
    io::{self, BufWriter, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

/// Most memory that is touched before a row, in bytes: more than the images are.
const MOST_WARM: usize = 6 << 30;

/// What a row must reach.
#[derive(Debug, Clone, Copy)]
enum Target {
    /// So many times as fast as qemu-img.
    Times(f64),
    /// At most so many milliseconds of CPU time.
    CpuMs(f64),
}

/// A row: what both do, with names of files in the scratch folder.
struct Row {
    name: &'static str,
    title: &'static str,
    target: Target,
    /// Not timed, by qemu-img, before each run.
    before: &'static [&'static [&'static str]],
    timed: &'static [&'static str],
    /// Files that must not be there before each run.
    fresh: &'static [&'static str],
    /// Runs in a row that make one measurement.
    repeat: u32,
}

const ROWS: [Row; 7] = [
    Row {
        name: "img-to-qcow2",
        title: "convert a mixed 4 GiB raw image to qcow2",
        target: Target::Times(1.0),
        before: &[],
        timed: &["convert", "-f", "raw", "-O", "qcow2", "mixed.raw", "mixed.qcow2"],
        fresh: &["mixed.qcow2"],
        repeat: 1,
    },
    Row {
        name: "img-to-raw",
        title: "convert it back to raw",
        target: Target::Times(1.0),
        before: &[],
        timed: &["convert", "-f", "qcow2", "-O", "raw", "mixed.qcow2", "back.raw"],
        fresh: &["back.raw"],
        repeat: 1,
    },
    Row {
        name: "img-compress",
        title: "convert it to compressed qcow2",
        target: Target::Times(1.5),
        before: &[],
        timed: &["convert", "-c", "-f", "raw", "-O", "qcow2", "mixed.raw", "packed.qcow2"],
        fresh: &["packed.qcow2", "back.raw"],
        repeat: 1,
    },
    Row {
        name: "img-check",
        title: "check an image with 1 M allocated clusters",
        target: Target::Times(1.0),
        before: &[],
        timed: &["check", "million.qcow2"],
        fresh: &[],
        repeat: 3,
    },
    Row {
        name: "img-create",
        title: "create an image of 8 GiB",
        target: Target::CpuMs(10.0),
        before: &[],
        timed: &["create", "-f", "qcow2", "new.qcow2", "8G"],
        fresh: &[],
        repeat: 20,
    },
    Row {
        name: "img-info",
        title: "info of the mixed image",
        target: Target::CpuMs(10.0),
        before: &[],
        timed: &["info", "mixed.qcow2"],
        fresh: &[],
        repeat: 20,
    },
    Row {
        name: "img-snapshot",
        title: "snapshot -c of the mixed image",
        target: Target::CpuMs(10.0),
        before: &[&["snapshot", "-d", "s", "mixed.qcow2"]],
        timed: &["snapshot", "-c", "s", "mixed.qcow2"],
        fresh: &[],
        repeat: 1,
    },
];

/// Seconds on the clock and of CPU.
#[derive(Debug, Clone, Copy, Default)]
struct Took {
    wall: f64,
    cpu: f64,
}

/// A line of the outcome; seconds.
#[derive(Debug, Serialize)]
pub struct Line {
    name: &'static str,
    title: &'static str,
    ringfort: f64,
    ringfort_cpu: f64,
    qemu_img: f64,
    qemu_img_cpu: f64,
    /// How many times as fast Ringfort is.
    times: f64,
    target: String,
    pass: bool,
}

/// CPU time of all children that have been waited for, in seconds.
fn children_cpu() -> Result<f64, String> {
    Ok(ringfort_base::threads::children_cpu_time().map_err(|e| e.to_string())?.as_secs_f64())
}

/// Text, noise and holes, in pieces of 64 KiB to 1 MiB.
fn mixed(path: &Path, len: u64) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(1 << 20, File::create(path)?);
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut at = 0;
    while at < len {
        let n = (65536 << (next() % 5)).min(len - at);
        match next() % 20 {
            0..=6 => {
                out.flush()?;
                out.seek(SeekFrom::Start(at + n))?;
            }
            7..=13 => {
                let mut left = n as usize;
                while left > 0 {
                    let line = format!("{:016x} a line of a text file, as logs have them\n", next());
                    let part = &line.as_bytes()[..left.min(line.len())];
                    out.write_all(part)?;
                    left -= part.len();
                }
            }
            _ => (0..n / 8).try_for_each(|_| out.write_all(&next().to_le_bytes()))?,
        }
        at += n;
    }
    out.flush()?;
    out.get_ref().set_len(len)
}

/// Touch as much free memory as a row fills with the page cache: on a host that is a guest itself, whoever touches memory
/// first that had been given back pays for its return, which would be whoever has its turn first.
fn warm_up() {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let free = info.lines().find_map(|l| l.strip_prefix("MemFree:"));
    let free = free.and_then(|l| l.split_whitespace().next()).and_then(|n| n.parse::<usize>().ok());
    // In KiB there; some stays for everybody else.
    let len = (free.unwrap_or(0) * 1024 / 4 * 3).min(MOST_WARM);
    std::hint::black_box(vec![1u8; len]);
}

/// The tools and where they work.
pub struct Images<'a> {
    /// The ringfort program.
    pub ringfort: &'a Path,
    /// The qemu-img program.
    pub qemu_img: &'a Path,
    /// The scratch folder, which is made and taken away.
    pub dir: PathBuf,
    /// Rounds.
    pub rounds: u32,
}

impl Images<'_> {
    fn run(&self, tool: &Path, args: &[&str]) -> Result<(), String> {
        let mut command = Command::new(tool);
        if tool == self.ringfort {
            command.arg("img");
        }
        command.args(args).current_dir(&self.dir).stdout(Stdio::null()).stderr(Stdio::piped());
        let out = command.output().map_err(|e| format!("cannot start {}: {e}", tool.display()))?;
        if out.status.success() {
            return Ok(());
        }
        Err(format!("{} {}: {}", tool.display(), args.join(" "), String::from_utf8_lossy(&out.stderr).trim()))
    }

    fn measure(&self, row: &Row, tool: &Path) -> Result<Took, String> {
        for file in row.fresh {
            // It may not be there.
            let _ = std::fs::remove_file(self.dir.join(file));
        }
        for args in row.before {
            // The first time there is nothing to take back.
            let _ = self.run(self.qemu_img, args);
        }
        if !row.fresh.is_empty() {
            warm_up();
        }
        let (start, cpu) = (Instant::now(), children_cpu()?);
        for _ in 0..row.repeat {
            self.run(tool, row.timed)?;
        }
        let n = f64::from(row.repeat);
        Ok(Took { wall: start.elapsed().as_secs_f64() / n, cpu: (children_cpu()? - cpu) / n })
    }

    fn prepare(&self) -> Result<(), String> {
        std::fs::create_dir_all(&self.dir).map_err(|e| format!("{}: {e}", self.dir.display()))?;
        eprintln!("images: making a mixed image of 4 GiB in {}", self.dir.display());
        mixed(&self.dir.join("mixed.raw"), 4 << 30).map_err(|e| format!("the mixed image: {e}"))?;
        let million = ["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", "million.qcow2", "64G"];
        self.run(self.qemu_img, &million)
    }

    /// Measure all rows.
    pub fn measure_all(&self) -> Result<Vec<Line>, String> {
        let done = self.prepare().and_then(|()| ROWS.iter().map(|row| self.line(row)).collect());
        // What is left behind is seen by whoever named the folder.
        let _ = std::fs::remove_dir_all(&self.dir);
        done
    }

    fn line(&self, row: &Row) -> Result<Line, String> {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..self.rounds {
            ours.push(self.measure(row, self.ringfort)?);
            theirs.push(self.measure(row, self.qemu_img)?);
        }
        let median = |list: &[Took], of: fn(&Took) -> f64| {
            let mut v: Vec<f64> = list.iter().map(of).collect();
            v.sort_by(f64::total_cmp);
            v[v.len() / 2]
        };
        let (a, b) = (median(&ours, |t| t.wall), median(&theirs, |t| t.wall));
        let cpu = median(&ours, |t| t.cpu);
        let times = b / a;
        let (target, pass) = match row.target {
            Target::Times(n) => (format!("{n}x"), times >= n),
            Target::CpuMs(ms) => (format!("{ms} ms of CPU"), cpu * 1e3 < ms),
        };
        let line = Line {
            name: row.name,
            title: row.title,
            ringfort: a,
            ringfort_cpu: cpu,
            qemu_img: b,
            qemu_img_cpu: median(&theirs, |t| t.cpu),
            times,
            target,
            pass,
        };
        eprintln!("  {:14} {a:.4} s against {b:.4} s", row.name);
        Ok(line)
    }
}

/// The outcome for people.
pub fn table(lines: &[Line]) -> String {
    let mut t = format!(
        "{:44} {:>10} {:>10} {:>10} {:>10} {:>7}  {}\n",
        "the image tool", "ringfort", "(cpu)", "qemu-img", "(cpu)", "times", "target"
    );
    for l in lines {
        t += &format!(
            "{:44} {:>10.4} {:>10.4} {:>10.4} {:>10.4} {:>7.2}  {} {}\n",
            l.title,
            l.ringfort,
            l.ringfort_cpu,
            l.qemu_img,
            l.qemu_img_cpu,
            l.times,
            l.target,
            if l.pass { "reached" } else { "MISSED" }
        );
    }
    t
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mixed_image_has_holes_and_data_and_is_always_the_same() {
        let dir = std::env::temp_dir().join(format!("ringfort-bench-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a folder");
        let (a, b) = (dir.join("a"), dir.join("b"));
        mixed(&a, 9 << 20).expect("made");
        mixed(&b, 9 << 20).expect("made");
        let content = std::fs::read(&a).expect("read");
        assert!(content == std::fs::read(&b).expect("read") && content.len() == 9 << 20);
        let zero = content.chunks(65536).filter(|c| c.iter().all(|b| *b == 0)).count();
        assert!((10..130).contains(&zero), "{zero}");
        std::fs::remove_dir_all(dir).expect("removed");
    }

    #[test]
    fn children_use_cpu_time() {
        let before = children_cpu().expect("read");
        let spin = "i=0; while [ $i -lt 60000 ]; do i=$((i+1)); done";
        assert!(Command::new("sh").args(["-c", spin]).status().expect("runs").success());
        assert!(children_cpu().expect("read") > before);
    }
}
