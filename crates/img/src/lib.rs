//! The image tool, `ringfort img`: qemu-img's verbs, option letters, output and exit statuses, so that scripts carry
//! over. Images that it makes get their name when they are complete.
#![forbid(unsafe_code)]

mod amend;
mod args;
mod bench;
mod bitmap;
mod check;
mod commit;
mod compare;
mod convert;
mod create;
mod dd;
mod help;
mod info;
mod json;
mod map;
mod measure;
mod new;
mod open;
mod progress;
mod rebase;
mod resize;
mod size;
mod snapshot;

use help::HELP;
use std::io::Write;

/// Where a verb writes to.
pub struct Streams<'a> {
    /// Standard output.
    pub out: &'a mut (dyn Write + Send),
    /// Standard error.
    pub err: &'a mut (dyn Write + Send),
}

/// Why a verb ends early: one line, and the exit status.
#[derive(Debug)]
pub struct Failure {
    message: String,
    status: u8,
}

impl Failure {
    fn new(message: impl Into<String>) -> Failure {
        Failure { message: message.into(), status: 1 }
    }

    fn with(status: u8, message: impl Into<String>) -> Failure {
        Failure { message: message.into(), status }
    }
}

impl From<ringfort_block::BlockError> for Failure {
    fn from(e: ringfort_block::BlockError) -> Failure {
        Failure::new(e.to_string())
    }
}

impl From<std::io::Error> for Failure {
    fn from(e: std::io::Error) -> Failure {
        Failure::new(e.to_string())
    }
}

type Done = Result<u8, Failure>;

/// Run one verb with its arguments; gives the exit status.
pub fn run(arguments: &[String], streams: &mut Streams<'_>) -> u8 {
    let Some((verb, rest)) = arguments.split_first() else {
        return say_failure(
            &Failure::new("Not enough arguments; `ringfort img --help` lists the verbs"),
            streams,
        );
    };
    if matches!(verb.as_str(), "-h" | "--help" | "help") {
        return u8::from(streams.out.write_all(HELP.as_bytes()).is_err());
    }
    if rest.iter().take_while(|a| *a != "--").any(|a| a == "-h" || a == "--help") {
        let text = help::of(verb).unwrap_or_else(|| HELP.to_owned());
        return u8::from(streams.out.write_all(text.as_bytes()).is_err());
    }
    let done = match verb.as_str() {
        "amend" => amend::run(rest, streams),
        "bench" => bench::run(rest, streams),
        "bitmap" => bitmap::run(rest, streams),
        "commit" => commit::run(rest, streams),
        "dd" => dd::run(rest, streams),
        "measure" => measure::run(rest, streams),
        "rebase" => rebase::run(rest, streams),
        "check" => check::run(rest, streams),
        "compare" => compare::run(rest, streams),
        "convert" => convert::run(rest, streams),
        "create" => create::run(rest, streams),
        "info" => info::run(rest, streams),
        "map" => map::run(rest, streams),
        "resize" => resize::run(rest, streams),
        "snapshot" => snapshot::run(rest, streams),
        other => {
            Err(Failure::new(format!("Command not found: {other}; `ringfort img --help` lists the verbs")))
        }
    };
    let done = done.and_then(|status| streams.out.flush().map(|()| status).map_err(Failure::from));
    done.unwrap_or_else(|f| say_failure(&f, streams))
}

fn say_failure(f: &Failure, streams: &mut Streams<'_>) -> u8 {
    // Where standard error cannot be written to, the status must do.
    let _ = writeln!(streams.err, "ringfort img: {}", f.message);
    f.status
}
