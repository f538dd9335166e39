//! What `make bench` prints.

use serde::Serialize;

use crate::{
    engine::Engine,
    rows::{Kind, Row, Target},
    run::{Outcome, Sample},
};

/// Which time counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Clock {
    /// Time on the clock.
    Wall,
    /// CPU time on the host, for hosts that have other work; on the clock where there is no CPU time.
    Cpu,
}

/// Everything measured.
#[derive(Debug, Default)]
pub struct Measured(Vec<(Engine, String, Outcome)>);

impl Measured {
    /// Add an outcome of row `name`.
    pub fn add(&mut self, engine: Engine, name: &str, outcome: Outcome) {
        self.0.push((engine, name.to_owned(), outcome));
    }

    fn of<'a>(&'a self, engine: Engine, name: &'a str) -> impl Iterator<Item = &'a Outcome> {
        self.0.iter().filter(move |(e, n, _)| *e == engine && n == name).map(|(_, _, o)| o)
    }

    fn samples<'a>(&'a self, engine: Engine, name: &'a str) -> impl Iterator<Item = &'a Sample> {
        self.of(engine, name).filter_map(|o| o.as_ref().ok())
    }

    fn median(&self, engine: Engine, name: &str, clock: Clock) -> Option<f64> {
        let of = |s: &Sample| match clock {
            Clock::Wall => s.seconds,
            Clock::Cpu => s.cpu_seconds.unwrap_or(s.seconds),
        };
        median(self.samples(engine, name).map(of).collect())
    }
}

/// One row of the table.
#[derive(Debug, Serialize)]
pub struct Line {
    /// Its short name.
    pub name: &'static str,
    /// What it is.
    pub title: &'static str,
    /// Median on the host, seconds.
    pub native: Option<f64>,
    /// Median under Ringfort, seconds.
    pub ringfort: Option<f64>,
    /// Median under QEMU with each CPU model, seconds.
    pub qemu64: Option<f64>,
    /// The other model.
    pub qemu_max: Option<f64>,
    /// The better of QEMU's two through Ringfort's: how many times as fast Ringfort is.
    pub times_tcg: Option<f64>,
    /// Ringfort's through the host's: how many times as slow Ringfort is.
    pub times_native: Option<f64>,
    /// Two vCPUs' work through one's, of Ringfort.
    pub scale: Option<f64>,
    /// The same of QEMU.
    pub qemu_scale: Option<f64>,
    /// What is to be reached: `4x tcg`, `1.15 of native`, `1.8x`.
    pub target: String,
    /// Whether it is reached; none when it was not measured.
    pub pass: Option<bool>,
    /// What went wrong: failures, and results that differ between engines.
    pub problems: Vec<String>,
}

/// The outcome.
#[derive(Debug, Serialize)]
pub struct Report {
    rounds: u32,
    clock: Clock,
    memory_mib: u32,
    rows: Vec<Line>,
    /// Geometric mean of `times_tcg` of all rows that have it.
    geometric_mean: Option<f64>,
    /// Rows whose pass is true, and all that have one.
    passed: (usize, usize),
    /// Ringfort's resident memory outside the guest's RAM when the guest has booted, MiB: median.
    memory_beyond_guest_mib: Option<f64>,
    /// The same of QEMU.
    qemu_memory_beyond_guest_mib: Option<f64>,
}

/// The geometric mean that all rows together must reach.
pub const MEAN_TARGET: f64 = 4.5;
/// The memory beyond guest RAM that is allowed, MiB.
pub const MEMORY_TARGET: f64 = 48.0;

impl Report {
    /// Work out `rows` from what was measured.
    pub fn new(rounds: u32, clock: Clock, memory_mib: u32, rows: &[Row], measured: &Measured) -> Self {
        let rows: Vec<Line> = rows.iter().map(|r| line(r, clock, measured)).collect();
        let ratios: Vec<f64> = rows.iter().filter_map(|r| r.times_tcg).collect();
        let mean = (!ratios.is_empty())
            .then(|| (ratios.iter().map(|r| r.ln()).sum::<f64>() / ratios.len() as f64).exp());
        let marks: Vec<bool> = rows.iter().filter_map(|r| r.pass).collect();
        let beyond = |engine| {
            let of = |s: &Sample| s.memory.map(|m| m.beyond_guest as f64 / f64::from(1 << 20));
            median(measured.samples(engine, "boot").filter_map(of).collect())
        };
        Self {
            rounds,
            clock,
            memory_mib,
            geometric_mean: mean,
            passed: (marks.iter().filter(|m| **m).count(), marks.len()),
            memory_beyond_guest_mib: beyond(Engine::Ringfort),
            qemu_memory_beyond_guest_mib: beyond(Engine::Qemu64),
            rows,
        }
    }

    /// As a table, with the columns of `engines`.
    pub fn table(&self, engines: &[Engine]) -> String {
        let clock = match self.clock {
            Clock::Wall => "seconds on the clock",
            Clock::Cpu => "seconds of CPU time",
        };
        let compared = engines.contains(&Engine::Ringfort) && engines.iter().any(|e| *e >= Engine::Qemu64);
        let mut text =
            format!("medians of {} rounds, {clock}; {} MiB\n\n{:42}", self.rounds, self.memory_mib, "");
        for engine in engines {
            text += &format!(" {:>9}", engine.name());
        }
        text += if compared { "     x TCG" } else { "" };
        text += &format!(" {:>9}   {}\n", "x native", "target");
        for row in &self.rows {
            text += &format!("{:42}", row.title);
            for engine in engines {
                text += &format!(" {:>9}", figure(row.of(*engine), 4));
            }
            if compared {
                text += &format!(" {:>9}", figure(row.times_tcg, 2));
            }
            text += &format!(" {:>9}   {}", figure(row.times_native, 2), row.target);
            if let Some(scale) = row.scale {
                text += &format!(", is {scale:.2}");
            }
            text += match row.pass {
                Some(true) => "  pass\n",
                Some(false) => "  FAIL\n",
                None => "\n",
            };
        }
        text.push('\n');
        if let Some(mean) = self.geometric_mean {
            let mark = if mean >= MEAN_TARGET { "pass" } else { "FAIL" };
            text += &format!("geometric mean against TCG: {mean:.2} (target {MEAN_TARGET}, {mark})\n");
        }
        if compared {
            text += &format!("rows that reach their target: {} of {}\n", self.passed.0, self.passed.1);
        }
        if let Some(memory) = self.memory_beyond_guest_mib {
            let mark = if memory <= MEMORY_TARGET { "pass" } else { "FAIL" };
            text += &format!(
                "memory beyond guest RAM after boot: {memory:.1} MiB (at most {MEMORY_TARGET}, {mark})"
            );
            text +=
                &self.qemu_memory_beyond_guest_mib.map_or(String::new(), |m| format!("; QEMU {m:.1} MiB"));
            text.push('\n');
        }
        for row in &self.rows {
            for problem in &row.problems {
                text += &format!("{}: {problem}\n", row.name);
            }
        }
        text
    }
}

impl Line {
    fn of(&self, engine: Engine) -> Option<f64> {
        match engine {
            Engine::Native => self.native,
            Engine::Ringfort => self.ringfort,
            Engine::Qemu64 => self.qemu64,
            Engine::QemuMax => self.qemu_max,
        }
    }
}

fn figure(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "-".into(), |v| format!("{v:.digits$}"))
}

fn line(row: &Row, clock: Clock, measured: &Measured) -> Line {
    let of = |engine| measured.median(engine, row.name, clock);
    let [native, ringfort, qemu64, qemu_max] = Engine::ALL.map(of);
    let best = match (qemu64, qemu_max) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    };
    let ratio = |a: Option<f64>, b: Option<f64>| Some(a? / b?).filter(|r| r.is_finite() && *r > 0.0);
    let (mut times_tcg, times_native) = (ratio(best, ringfort), ratio(ringfort, native));
    let (mut scale, mut qemu_scale) = (None, None);
    if let Kind::Parallel(_) = row.kind {
        // Two in parallel take as long as one alone: twice the work. How long they take is no row of its own.
        let alone = format!("{}/1", row.name);
        let of = |engine| {
            let together = measured.median(engine, row.name, Clock::Wall)?;
            ratio(measured.median(engine, &alone, Clock::Wall).map(|one| 2.0 * one), Some(together))
        };
        scale = of(Engine::Ringfort);
        qemu_scale = of(Engine::Qemu64);
        times_tcg = None;
    }
    let pass = match row.target {
        Target::Tcg(t) => times_tcg.map(|r| r >= t),
        // No row may be slower than TCG.
        Target::Native(t) => times_native.map(|r| r <= t && times_tcg.is_none_or(|r| r >= 1.0)),
        Target::Scale(t) => scale.map(|s| s >= t),
    };
    let target = match row.target {
        Target::Tcg(t) => format!("{t}x tcg"),
        Target::Native(t) => format!("{t} of native"),
        Target::Scale(t) => format!("{t}x"),
    };
    Line {
        name: row.name,
        title: row.title,
        native,
        ringfort,
        qemu64,
        qemu_max,
        times_tcg,
        times_native,
        scale,
        qemu_scale,
        target,
        pass,
        problems: problems(row.name, measured),
    }
}

fn problems(name: &str, measured: &Measured) -> Vec<String> {
    let mut problems = Vec::new();
    let mut hashes: Vec<(&str, &str)> = Vec::new();
    for engine in Engine::ALL {
        for outcome in measured.of(engine, name) {
            match outcome {
                Err(why) => problems.push(format!("{}: {why}", engine.name())),
                Ok(Sample { hash: Some(hash), .. }) => hashes.push((engine.name(), hash)),
                Ok(_) => {}
            }
        }
    }
    problems.dedup();
    hashes.dedup();
    if hashes.iter().any(|h| h.1 != hashes[0].1) {
        problems.push(format!("RESULTS DIFFER: {hashes:?}"));
    }
    problems
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => None,
        n if n % 2 == 1 => Some(values[n / 2]),
        n => Some(f64::midpoint(values[n / 2 - 1], values[n / 2])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Memory;

    fn row(name: &'static str, target: Target, kind: Kind) -> Row {
        Row { name, title: name, target, kind }
    }

    fn sample(seconds: f64, cpu: f64, hash: &str) -> Outcome {
        Ok(Sample { seconds, cpu_seconds: Some(cpu), hash: Some(hash.into()), memory: None })
    }

    const SCRIPT: Kind = Kind::Script { prepare: "", run: "" };

    #[test]
    fn medians() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(vec![]), None);
    }

    #[test]
    fn the_better_qemu_is_the_peer() {
        let mut m = Measured::default();
        for (engine, seconds) in Engine::ALL.into_iter().zip([1.0, 2.0, 12.0, 8.0]) {
            m.add(engine, "a", sample(seconds, seconds * 2.0, "5"));
        }
        m.add(Engine::Ringfort, "n", sample(1.2, 1.1, "5"));
        m.add(Engine::Native, "n", sample(1.0, 1.0, "5"));
        let rows = [row("a", Target::Tcg(4.1), SCRIPT), row("n", Target::Native(1.15), SCRIPT)];
        let wall = Report::new(3, Clock::Wall, 512, &rows, &m);
        assert_eq!((wall.rows[0].times_tcg, wall.rows[0].times_native), (Some(4.0), Some(2.0)));
        assert_eq!((wall.rows[0].pass, wall.rows[1].pass), (Some(false), Some(false)));
        assert_eq!((wall.passed, wall.geometric_mean), ((0, 2), Some(4.0)));
        let cpu = Report::new(3, Clock::Cpu, 512, &rows, &m);
        assert_eq!((cpu.rows[0].ringfort, cpu.rows[1].pass), (Some(4.0), Some(true)));
        let table = wall.table(&Engine::ALL);
        assert!(table.contains("FAIL") && table.contains("geometric mean against TCG: 4.00"), "{table}");
    }

    #[test]
    fn failures_and_differing_results_are_told() {
        let mut m = Measured::default();
        m.add(Engine::Native, "a", sample(1.0, 1.0, "5"));
        m.add(Engine::Ringfort, "a", sample(1.0, 1.0, "6"));
        m.add(Engine::Qemu64, "a", Err("it hung".into()));
        let report = Report::new(1, Clock::Wall, 512, &[row("a", Target::Tcg(1.0), SCRIPT)], &m);
        let table = report.table(&Engine::ALL);
        assert!(table.contains("RESULTS DIFFER") && table.contains("qemu64: it hung"), "{table}");
        assert_eq!(report.rows[0].pass, None);
    }

    #[test]
    fn scaling_is_of_one_boot_and_memory_of_the_boot_row() {
        let mut m = Measured::default();
        m.add(Engine::Ringfort, "2x/1", sample(1.0, 1.0, ""));
        m.add(Engine::Ringfort, "2x", sample(1.25, 2.0, ""));
        let memory = Some(Memory { peak: 64 << 20, beyond_guest: 50 << 20 });
        let boot = Sample { seconds: 1.0, cpu_seconds: None, hash: None, memory };
        m.add(Engine::Ringfort, "boot", Ok(boot));
        let rows =
            [row("2x", Target::Scale(1.8), Kind::Parallel("x")), row("boot", Target::Tcg(2.0), Kind::Boot)];
        let report = Report::new(1, Clock::Wall, 512, &rows, &m);
        assert_eq!((report.rows[0].scale, report.rows[0].pass), (Some(1.6), Some(false)));
        assert!(report.table(&[Engine::Ringfort]).contains("50.0 MiB (at most 48, FAIL)"));
        let json = serde_json::to_value(&report).expect("json");
        assert_eq!(json["rows"][0]["scale"], 1.6);
    }
}
