//! What `make bench` prints.

use serde::Serialize;

use crate::run::Boot;

/// All boots of one VMM.
#[derive(Debug, Serialize)]
pub struct Side {
    /// Which VMM.
    pub name: &'static str,
    /// Its boots, in order.
    pub boots: Vec<Boot>,
}

impl Side {
    pub fn new(name: &'static str) -> Self {
        Self { name, boots: Vec::new() }
    }

    fn median(&self, of: impl Fn(&Boot) -> f64) -> f64 {
        median(self.boots.iter().map(of).collect())
    }
}

/// One row: a figure of both, and Ringfort's as a multiple of QEMU's.
#[derive(Debug, Serialize)]
pub struct Row {
    /// What was measured.
    pub what: &'static str,
    /// Its unit.
    pub unit: &'static str,
    /// Median under Ringfort.
    pub ringfort: f64,
    /// Median under QEMU.
    pub qemu: f64,
    /// The first through the second: below 1, Ringfort needs less.
    pub ratio: f64,
}

/// The outcome.
#[derive(Debug, Serialize)]
pub struct Report {
    rounds: u32,
    cpus: u32,
    memory_mib: u32,
    medians: Vec<Row>,
    raw: [Side; 2],
}

impl Report {
    pub fn new(rounds: u32, cpus: u32, memory_mib: u32, ringfort: Side, qemu: Side) -> Self {
        let row = |what, unit, of: fn(&Boot) -> f64| {
            let (a, b) = (ringfort.median(of), qemu.median(of));
            Row { what, unit, ringfort: a, qemu: b, ratio: if b > 0.0 { a / b } else { f64::NAN } }
        };
        let medians = vec![
            row("boot to user space", "s", |b| b.seconds),
            row("the same by the guest's clock", "s", |b| b.guest_seconds),
            row("peak memory", "MiB", |b| mib(b.memory.peak)),
            row("memory beyond guest RAM", "MiB", |b| mib(b.memory.beyond_guest)),
        ];
        Self { rounds, cpus, memory_mib, medians, raw: [ringfort, qemu] }
    }

    /// The medians as a table.
    pub fn table(&self) -> String {
        let mut text = format!(
            "medians of {} boots each, {} vCPU, {} MiB; ringfort --accel soft, qemu -accel tcg\n\n\
             {:30} {:>10} {:>10} {:>15}\n",
            self.rounds, self.cpus, self.memory_mib, "", "ringfort", "qemu", "ringfort / qemu"
        );
        for row in &self.medians {
            let label = format!("{} ({})", row.what, row.unit);
            text += &format!("{label:30} {:>10.2} {:>10.2} {:>15.2}\n", row.ringfort, row.qemu, row.ratio);
        }
        text
    }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => f64::midpoint(values[n / 2 - 1], values[n / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Memory;

    #[test]
    fn medians() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(vec![]).is_nan());
    }

    #[test]
    fn ratios_are_of_the_medians() {
        let boot = |seconds, peak| Boot {
            seconds,
            guest_seconds: 1.0,
            memory: Memory { peak, beyond_guest: 1 << 20 },
        };
        let mut a = Side::new("ringfort");
        a.boots = vec![boot(9.0, 64 << 20), boot(3.0, 64 << 20), boot(4.0, 64 << 20)];
        let mut b = Side::new("qemu");
        b.boots = vec![boot(2.0, 128 << 20); 3];
        let report = Report::new(3, 1, 512, a, b);
        assert_eq!(report.medians[0].ratio, 2.0);
        assert_eq!(report.medians[2].ratio, 0.5);
        let table = report.table();
        assert!(table.contains("boot to user space (s)") && table.contains("2.00"), "{table}");
        let json = serde_json::to_value(&report).expect("json");
        assert_eq!(json["raw"][0]["boots"].as_array().map(Vec::len), Some(3));
    }
}
