//! Work on images, against `qemu-img` with the same arguments.

use super::{Cli, Row, Target};
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

/// Runs of a verb whose CPU time is counted: the host counts in hundredths of a second.
const RUNS: u32 = 40;
/// Most milliseconds of CPU time that verbs may take which touch no data.
const QUICK_MS: f64 = 10.0;

/// One of the two tools.
#[derive(Clone, Copy)]
struct Tool<'a> {
    program: &'a Path,
    ours: bool,
}

impl Tool<'_> {
    /// Run it; `OUT` in the arguments is its own file.
    fn run(self, dir: &Path, arguments: &str) -> Result<(), String> {
        let mut c = Command::new(self.program);
        if self.ours {
            c.arg("img");
        }
        let own = self.own();
        c.args(arguments.split(' ').map(|a| a.replace("OUT", own)));
        let out = c.current_dir(dir).stdin(Stdio::null()).output().map_err(|e| format!("{c:?}: {e}"))?;
        if out.status.success() {
            return Ok(());
        }
        Err(format!("{c:?}: {}", String::from_utf8_lossy(&out.stderr)))
    }

    fn own(self) -> &'static str {
        if self.ours { "ours" } else { "theirs" }
    }
}

/// Both tools by their full names, since they run elsewhere.
fn full(path: &Path) -> std::path::PathBuf {
    let here = if path.components().count() > 1 { path.canonicalize().ok() } else { None };
    here.unwrap_or_else(|| path.into())
}

pub fn rows(cli: &Cli, dir: &Path) -> Result<Vec<Row>, String> {
    let (ringfort, qemu_img) = (full(&cli.ringfort), full(&cli.qemu_img));
    let tools = [Tool { program: &ringfort, ours: true }, Tool { program: &qemu_img, ours: false }];
    let mib = f64::from(cli.size);
    mix(&dir.join("mixed.raw"), u64::from(cli.size) << 20).map_err(|e| format!("the mixed image: {e}"))?;
    tools[1].run(dir, "convert -f raw -O qcow2 mixed.raw mixed.qcow2")?;
    // 1 M clusters of 64 KiB, which take no space.
    tools[1].run(dir, "create -q -f qcow2 -o preallocation=metadata clusters.qcow2 64G")?;
    let mut rows = Vec::new();
    for (title, arguments, target, unit, amount) in [
        ("convert raw to qcow2", "convert -f raw -O qcow2 mixed.raw OUT", 1.0, "MiB/s", mib),
        ("convert qcow2 to raw", "convert -f qcow2 -O raw mixed.qcow2 OUT", 1.0, "MiB/s", mib),
        ("convert -c raw to qcow2", "convert -c -f raw -O qcow2 mixed.raw OUT", 1.5, "MiB/s", mib),
        ("check of 1 M clusters", "check clusters.qcow2", 1.0, "runs/s", 1.0),
    ] {
        let mut row = row(title, unit, Target::Ratio(target));
        for round in 0..cli.rounds {
            // Who is first changes.
            for i in [round, round + 1] {
                let tool = tools[(i % 2) as usize];
                let start = Instant::now();
                tool.run(dir, arguments)?;
                let figure = amount / start.elapsed().as_secs_f64();
                if tool.ours {
                    row.ringfort.push(figure)
                } else {
                    row.qemu.push(figure)
                }
                // Nor is one to wait for what the host still writes of the other.
                let _ = std::fs::remove_file(dir.join(tool.own()));
            }
        }
        eprint!("{}", row.line());
        rows.push(row);
    }
    for (title, arguments) in [
        ("create", "create -f qcow2 OUT 8G"),
        ("info", "info mixed.qcow2"),
        ("snapshot -c", "snapshot -c NAME OUT"),
    ] {
        let mut row = row(title, "ms CPU", Target::AtMost(QUICK_MS));
        for tool in tools {
            if arguments.starts_with("snapshot") {
                std::fs::copy(dir.join("mixed.qcow2"), dir.join(tool.own())).map_err(|e| e.to_string())?;
            }
            let before = children_ms()?;
            for run in 0..RUNS {
                tool.run(dir, &arguments.replace("NAME", &format!("s{run}")))?;
            }
            let figure = (children_ms()? - before) / f64::from(RUNS);
            if tool.ours {
                row.ringfort.push(figure)
            } else {
                row.qemu.push(figure)
            }
            let _ = std::fs::remove_file(dir.join(tool.own()));
        }
        eprint!("{}", row.line());
        rows.push(row);
    }
    Ok(rows)
}

fn row(title: &str, unit: &'static str, target: Target) -> Row {
    Row { title: format!("image: {title}"), unit, target, ringfort: Vec::new(), qemu: Vec::new() }
}

/// Milliseconds of CPU time of all processes that this one has waited for (proc(5), `stat`: fields 16 and 17).
fn children_ms() -> Result<f64, String> {
    let stat = std::fs::read_to_string("/proc/self/stat").map_err(|e| e.to_string())?;
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let ticks: f64 =
        after_name.split_whitespace().skip(13).take(2).filter_map(|f| f.parse::<f64>().ok()).sum();
    Ok(ticks * 10.0)
}

/// A disk as it is found in use: a quarter is holes, a tenth written zeroes, a third text, the rest does not pack; in pieces of
/// 4 KiB to 8 MiB.
fn mix(path: &Path, len: u64) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    file.set_len(len)?;
    let mut x = 0x2545_f491_4f6c_dd1du64;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    };
    let words: Vec<String> = (0..2000).map(|_| format!("{:x} ", next() >> (next() % 40 + 20))).collect();
    let mut at = 0;
    while at < len {
        let n = (4096u64 << [0, 2, 4, 6, 8, 10, 11][(next() % 7) as usize]).min(len - at);
        let kind = next() % 100;
        let mut piece = Vec::with_capacity(n as usize + 8);
        if kind >= 35 {
            while piece.len() < n as usize {
                if kind < 70 {
                    piece.extend_from_slice(words[(next() % 2000) as usize].as_bytes());
                } else {
                    piece.extend_from_slice(&next().to_le_bytes());
                }
            }
        }
        piece.resize(n as usize, 0);
        if kind >= 25 {
            file.seek(SeekFrom::Start(at))?;
            file.write_all(&piece)?;
        }
        at += n;
    }
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mixed_image_has_its_size_and_holes() {
        use std::os::unix::fs::MetadataExt;
        let path = std::env::temp_dir().join(format!("ringfort-bench-mixed-{}", std::process::id()));
        mix(&path, 64 << 20).expect("written");
        let meta = std::fs::metadata(&path).expect("there");
        std::fs::remove_file(&path).expect("removed");
        assert_eq!(meta.len(), 64 << 20);
        assert!(meta.blocks() * 512 > 16 << 20);
    }

    #[test]
    fn a_tool_that_fails_is_shown() {
        let tool = Tool { program: Path::new("false"), ours: false };
        assert!(tool.run(Path::new("/"), "check x").is_err_and(|e| e.contains("check")));
        let ours = Tool { program: Path::new("true"), ours: true };
        assert_eq!((ours.run(Path::new("/"), "check OUT"), ours.own()), (Ok(()), "ours"));
    }
}
