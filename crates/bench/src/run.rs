//! One run of an engine: a list of rows in one boot, or a boot itself.

use std::{ffi::OsStr, ops::ControlFlow, process::Command, time::Duration};

use ringfort_guest::TEST_READY;
use serde::Serialize;

use crate::{
    memory::{self, Memory},
    process::{Said, cpu_seconds, watch},
};

/// One measurement of one row.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Sample {
    /// By the clock of whoever ran it (the guest's CLOCK_MONOTONIC); of a boot, by the host's.
    pub seconds: f64,
    /// CPU time that it took on the host, that of the whole VMM; none where only a rate is known.
    pub cpu_seconds: Option<f64>,
    /// What it printed, as a hash: equal work gives equal hashes.
    pub hash: Option<String>,
    /// The VMM's memory, of a boot.
    pub memory: Option<Memory>,
}

/// What a row came to: a sample, or why there is none.
pub type Outcome = Result<Sample, String>;

/// Whose CPU time a row's is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Where {
    /// The VMM's, looked at from outside: a guest does not know when it is not running.
    Guest,
    /// The row's own processes'.
    Host,
}

/// Run `rows` with the command that `start` makes of them. An engine that hangs or ends at a row is started again for the
/// rows after it. `tell` hears of each outcome as it comes.
pub fn rows(
    rows: &[&str],
    patience: Duration,
    on: Where,
    start: impl Fn(&[&str]) -> Command,
    mut tell: impl FnMut(&str, &Outcome),
) -> Vec<(String, Outcome)> {
    let mut outcomes: Vec<(String, Outcome)> = Vec::new();
    while outcomes.len() < rows.len() {
        let left = &rows[outcomes.len()..];
        let mut list = List { on, cpu_begin: 0.0, cpu: 0.0 };
        let before = outcomes.len();
        let ended = watch(start(left), patience, |said| {
            let mut progress = false;
            while let Some(line) = said.line() {
                match list.line(&line, || cpu_seconds(said.pid)) {
                    Heard::Nothing => {}
                    Heard::Progress => progress = true,
                    Heard::Outcome(name, outcome) => {
                        progress = true;
                        // Anything else would be a row that nobody asked for.
                        if rows.get(outcomes.len()).is_some_and(|r| *r == name) {
                            tell(&name, &outcome);
                            outcomes.push((name, outcome));
                        }
                    }
                    Heard::Done => return ControlFlow::Break(()),
                }
            }
            ControlFlow::Continue(progress)
        });
        if outcomes.len() < rows.len() {
            let name = rows[outcomes.len()];
            let why = ended.err().unwrap_or_else(|| "it left the row out".into());
            // Nothing at all came, twice over: it does not boot.
            let dead = outcomes.len() == before && before == 0;
            let outcome = Err(why);
            tell(name, &outcome);
            outcomes.push((name.to_owned(), outcome));
            if dead {
                let missing = rows[outcomes.len()..].iter();
                outcomes.extend(missing.map(|r| ((*r).to_owned(), Err("not run".to_owned()))));
            }
        }
    }
    outcomes
}

/// What a line of the runner in the guest meant.
#[derive(Debug, PartialEq)]
enum Heard {
    Nothing,
    Progress,
    Outcome(String, Outcome),
    Done,
}

/// Follows the runner's lines (see `workloads/run.c`).
struct List {
    on: Where,
    cpu_begin: f64,
    cpu: f64,
}

impl List {
    fn line(&mut self, line: &str, cpu_now: impl FnOnce() -> f64) -> Heard {
        // The kernel's own lines may come in between, and before the first.
        let Some(at) = line.find("rfb-") else { return Heard::Nothing };
        let mut words = line[at..].split_whitespace();
        let (kind, name) = (words.next().unwrap_or_default(), words.next().unwrap_or_default().to_owned());
        let rest: Vec<&str> = words.collect();
        match (kind, rest.as_slice()) {
            ("rfb-begin", _) => {
                self.cpu_begin = cpu_now();
                Heard::Progress
            }
            ("rfb-stop", _) => {
                self.cpu = cpu_now() - self.cpu_begin;
                Heard::Progress
            }
            ("rfb-end", &[seconds, cpu, status, hash]) => {
                let Ok(seconds) = seconds.parse::<f64>() else {
                    return Heard::Outcome(name, Err(format!("an unreadable result: {line}")));
                };
                let outcome = if status == "0" {
                    let own = cpu.parse::<f64>().ok();
                    let cpu_seconds = own.map(|own| if self.on == Where::Host { own } else { self.cpu });
                    Ok(Sample { seconds, cpu_seconds, hash: Some(hash.to_owned()), memory: None })
                } else {
                    Err(format!("it ended with status {status}"))
                };
                Heard::Outcome(name, outcome)
            }
            ("rfb-skip", why) => Heard::Outcome(name, Err(format!("skipped: {}", why.join(" ")))),
            ("rfb-done", _) => Heard::Done,
            _ => Heard::Nothing,
        }
    }
}

/// Boot to the line of the test guest's first program, or to a text such as a login prompt.
pub fn boot(command: Command, until: Option<&str>, ram: u64, patience: Duration) -> Outcome {
    let program = command.get_program().to_owned();
    watch(command, patience, |said| {
        let there = match until {
            None => ready(said.text).is_some(),
            Some(text) => said.text.windows(text.len()).any(|w| w == text.as_bytes()),
        };
        if there { ControlFlow::Break(arrived(said, ram, &program)) } else { ControlFlow::Continue(false) }
    })?
}

fn arrived(said: &Said<'_>, ram: u64, program: &OsStr) -> Outcome {
    let cpu_seconds = cpu_seconds(said.pid);
    let memory = memory::of(said.pid, ram)
        .ok_or_else(|| format!("{} ended right after the guest's line", program.to_string_lossy()))?;
    let seconds = said.at.duration_since(said.started).as_secs_f64();
    Ok(Sample { seconds, cpu_seconds: Some(cpu_seconds), hash: None, memory: Some(memory) })
}

/// The guest's clock, once its line is there in full.
fn ready(text: &[u8]) -> Option<f64> {
    let key = TEST_READY.as_bytes();
    let at = text.windows(key.len()).rposition(|w| w == key)? + key.len();
    let end = text[at..].iter().position(|b| matches!(b, b'\r' | b'\n'))?;
    std::str::from_utf8(&text[at..at + end]).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_counts_only_when_it_is_whole() {
        assert_eq!(ready(b"noise ringfort-init: user space at 1.6"), None);
        assert_eq!(ready(b"noise\r\nringfort-init: user space at 1.68\r\n"), Some(1.68));
        assert_eq!(ready(b"ringfort-init: user space at rubbish\n"), None);
        assert_eq!(ready(b""), None);
    }

    fn sh(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_boot_is_timed_and_its_memory_read() {
        let patience = Duration::from_secs(60);
        let line = sh("echo 'ringfort-init: user space at 2.5'; read x");
        let b = boot(line, None, 1 << 40, patience).expect("booted");
        assert!(b.seconds > 0.0 && b.memory.is_some_and(|m| m.peak > 0));
        let b = boot(sh("printf 'name login: '; read x"), Some("login: "), 1 << 40, patience);
        assert!(b.is_ok_and(|b| b.hash.is_none()));
    }

    #[test]
    fn rows_go_on_after_one_that_ends_the_engine() {
        let start = |left: &[&str]| match left {
            ["a", ..] => sh("echo '[1.0] rfb-begin a'; echo rfb-stop a; echo rfb-end a 1.5 1.0 0 77; \
                 echo rfb-begin b; exit 9"),
            ["c", "d"] => sh("echo rfb-begin c; echo rfb-end c 0.5 0.1 0x100 78; \
                 echo rfb-skip d no such thing; echo rfb-done; read x"),
            other => panic!("{other:?}"),
        };
        let mut told = Vec::new();
        let got = rows(&["a", "b", "c", "d"], Duration::from_secs(60), Where::Guest, start, |n, _| {
            told.push(n.to_owned())
        });
        assert_eq!(told, ["a", "b", "c", "d"]);
        let a = got[0].1.as_ref().expect("a");
        assert_eq!((a.seconds, a.hash.as_deref()), (1.5, Some("77")));
        let why = |n: usize| got[n].1.as_ref().expect_err("failed").clone();
        assert!(why(1).contains("exit status: 9"), "{}", why(1));
        assert!(why(2).contains("0x100") && why(3) == "skipped: no such thing", "{} {}", why(2), why(3));
    }

    #[test]
    fn an_engine_that_says_nothing_is_not_started_for_every_row() {
        let got = rows(&["a", "b"], Duration::from_secs(60), Where::Host, |_| sh("exit 1"), |_, _| {});
        assert!(got[0].1.is_err() && got[1].1.as_ref().is_err_and(|e| e == "not run"));
    }
}
