//! `ringfort doctor`: what this host offers for virtual machines, and what to do about what is missing.

mod checks;

use std::{
    io::{self, Write},
    process::ExitCode,
};

use serde::Serialize;

/// How a finding bears on running guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Worth knowing; nothing to do.
    Info,
    /// Something works less well than it could, or not at all; guests still run.
    Warning,
    /// Guests cannot run.
    Error,
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Stable name for programs, for instance `kvm.fitness`.
    pub id: &'static str,
    /// What was looked at, for people.
    pub title: &'static str,
    /// How it stands.
    pub status: Status,
    /// What was found.
    pub found: String,
    /// What to do about it, if anything.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

#[derive(Serialize)]
struct Report<'a> {
    version: &'a str,
    status: Status,
    findings: &'a [Finding],
}

/// Look at the host and print what was found. The exit status is 1 if guests cannot run here at all, else 0.
pub fn run(json: bool) -> ExitCode {
    let findings = checks::all();
    let worst = worst(&findings);
    let mut out = io::stdout().lock();
    let written = if json { write_json(&mut out, &findings) } else { write_text(&mut out, &findings) };
    // A reader that has gone (`ringfort doctor | head`) is no failure.
    match written {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            eprintln!("ringfort: cannot write the report: {e}");
            ExitCode::from(2)
        }
        _ if worst == Status::Error => ExitCode::FAILURE,
        _ => ExitCode::SUCCESS,
    }
}

fn worst(findings: &[Finding]) -> Status {
    let rank = |s: Status| match s {
        Status::Ok => 0,
        Status::Info => 1,
        Status::Warning => 2,
        Status::Error => 3,
    };
    findings.iter().map(|f| f.status).max_by_key(|s| rank(*s)).unwrap_or(Status::Ok)
}

fn write_json(out: &mut impl Write, findings: &[Finding]) -> io::Result<()> {
    let report = Report { version: env!("CARGO_PKG_VERSION"), status: worst(findings), findings };
    serde_json::to_writer_pretty(&mut *out, &report).map_err(io::Error::from)?;
    writeln!(out)
}

fn write_text(out: &mut impl Write, findings: &[Finding]) -> io::Result<()> {
    let width = findings.iter().map(|f| f.title.len()).max().unwrap_or(0);
    for finding in findings {
        let mark = match finding.status {
            Status::Ok => "ok  ",
            Status::Info => "    ",
            Status::Warning => "note",
            Status::Error => "BAD ",
        };
        writeln!(out, "{mark} {:width$}  {}", finding.title, finding.found)?;
        if let Some(advice) = &finding.advice {
            writeln!(out, "     {:width$}  -> {advice}", "")?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(status: Status, advice: Option<&str>) -> Finding {
        Finding { id: "a.b", title: "Thing", status, found: "x".into(), advice: advice.map(str::to_owned) }
    }

    #[test]
    fn the_worst_finding_is_the_verdict() {
        assert_eq!(worst(&[]), Status::Ok);
        assert_eq!(worst(&[finding(Status::Warning, None), finding(Status::Info, None)]), Status::Warning);
        assert_eq!(worst(&[finding(Status::Error, None), finding(Status::Ok, None)]), Status::Error);
    }

    #[test]
    fn both_forms_say_the_same() {
        let all = [finding(Status::Ok, None), finding(Status::Warning, Some("do y"))];
        let mut text = Vec::new();
        write_text(&mut text, &all).expect("text");
        let text = String::from_utf8(text).expect("utf-8");
        assert_eq!(text, "ok   Thing  x\nnote Thing  x\n            -> do y\n");
        let mut json = Vec::new();
        write_json(&mut json, &all).expect("json");
        let value: serde_json::Value = serde_json::from_slice(&json).expect("valid JSON");
        assert_eq!(value["status"], "warning");
        assert_eq!(value["findings"][1]["advice"], "do y");
        assert!(value["findings"][0].get("advice").is_none());
    }
}
