//! `snapshot`: internal snapshots.

use crate::args::parse;
use crate::{Done, Failure, Streams, open, size};
use ringfort_block::format::qcow2::snapshot::Snapshot;
use serde_json::{Value, json};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The table that `snapshot -l` and `info` show. Dates are in UTC.
pub fn list(snapshots: &[Snapshot]) -> String {
    let mut t = String::from(
        "Snapshot list:\nID        TAG               VM SIZE                DATE     VM CLOCK     ICOUNT\n",
    );
    for s in snapshots {
        let clock = Duration::from_nanos(s.vm_clock_nsec);
        let secs = clock.as_secs();
        let time =
            format!("{:02}:{:02}:{:02}.{:03}", secs / 3600, secs / 60 % 60, secs % 60, clock.subsec_millis());
        let icount = s.icount.map_or(String::new(), |i| i.to_string());
        t += &format!(
            "{:<10}{:<17} {:>7} {} {:>12} {:>10}\n",
            s.id,
            s.name,
            size::human(s.vm_state_size),
            date(s.date_sec),
            time,
            icount
        );
    }
    t
}

/// Year, month, day and time of seconds since 1970 (Howard Hinnant's days-to-civil).
fn date(seconds: u32) -> String {
    let (days, rest) = (i64::from(seconds / 86400) + 719_468, seconds % 86400);
    let era = days / 146_097;
    let day_of_era = days % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let m = (5 * day_of_year + 2) / 153;
    let (day, month) = (day_of_year - (153 * m + 2) / 5 + 1, if m < 10 { m + 3 } else { m - 9 });
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}", rest / 3600, rest / 60 % 60, rest % 60)
}

/// One entry of `info`'s list.
pub fn to_json(s: &Snapshot) -> Value {
    let mut v = json!({
        "id": s.id, "name": s.name, "vm-state-size": s.vm_state_size, "date-sec": s.date_sec, "date-nsec": s.date_nsec,
        "vm-clock-sec": s.vm_clock_nsec / 1_000_000_000, "vm-clock-nsec": s.vm_clock_nsec % 1_000_000_000,
    });
    if let Some(i) = s.icount {
        v["icount"] = i.into();
    }
    v
}

pub fn run(arguments: &[String], s: &mut Streams<'_>) -> Done {
    let p = parse(arguments, &["l", "q", "U", "image-opts"], &["a", "c", "d", "f", "object"])?;
    let (path, format) = open::name(p.one_file()?, p.value("f"), &p, "image-opts")?;
    let actions: Vec<&str> = ["l", "a", "c", "d"].into_iter().filter(|a| p.has(a)).collect();
    let action = match actions.as_slice() {
        [] => "l",
        [one] => one,
        _ => return Err(Failure::new("Cannot mix '-l', '-a', '-c', '-d'")),
    };
    let none = || Failure::new(format!("{path}: its format has no internal snapshots"));
    let how = open::How { read_only: action == "l", ..open::How::writing(format.as_deref()) };
    let with = |o| ringfort_block::ImageOptions { backing: action == "a", ..o };
    let q = open::qcow2(&path, &how, with, &p)?;
    let q = q.ok_or_else(none)?;
    let name = p.value(action).unwrap_or("");
    let (what, done) = match action {
        "l" => {
            let all = q.snapshots()?;
            if !all.is_empty() {
                s.out.write_all(list(&all).as_bytes())?;
            }
            return Ok(0);
        }
        "c" => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            ("create", q.snapshot_create(name, now))
        }
        "a" => ("apply", q.snapshot_apply(name)),
        _ => ("delete", q.snapshot_delete(name)),
    };
    done.map_err(|e| Failure::new(format!("Could not {what} snapshot '{name}': {e}")))?;
    q.close()?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    #[test]
    fn dates_are_right() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00"),
            (951_782_400, "2000-02-29 00:00:00"),
            (1_795_189_944, "2026-11-20 15:52:24"),
        ] {
            assert_eq!(super::date(seconds), text);
        }
    }
}
