//! The image tool, `ringfort img`: qemu-img's verbs, option letters, output and exit statuses, so that scripts carry
//! over. Images that it makes get their name when they are complete.
#![forbid(unsafe_code)]

mod args;
mod check;
mod compare;
mod convert;
mod create;
mod info;
mod map;
mod open;
mod progress;
mod resize;
mod size;
mod snapshot;

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

const HELP: &str = "\
Disk images: create, examine, convert. Verbs and options are qemu-img's.

usage: ringfort img COMMAND [OPTIONS]

  check [-q] [-f FMT] [--output=FMT] [-r leaks|all] [-U] FILE
  compare [-f FMT] [-F FMT] [-p] [-q] [-s] [-U] FILE1 FILE2
  convert [-c] [-p] [-q] [-n] [--target-is-zero] [-f FMT] [-O FMT] [-o OPTIONS] [-S SIZE] [-m N] [-U] [-W] FILE OUT
  create [-q] [-f FMT] [-b BACKING [-F FMT]] [-u] [-o OPTIONS] FILE [SIZE]
  info [-f FMT] [--output=FMT] [--backing-chain] [-U] FILE
  map [-f FMT] [--start-offset=N] [--max-length=N] [--output=FMT] [-U] FILE
  resize [-f FMT] [-q] [--shrink] FILE [+|-]SIZE
  snapshot [-q] [-U] [-l | -a NAME | -c NAME | -d NAME] FILE

FMT of images is raw or qcow2, of --output human or json. Sizes take the suffixes k, M, G, T, P, E.
Options of -o for qcow2: size, compat, cluster_size, refcount_bits, lazy_refcounts, extended_l2, compression_type,
backing_file, backing_fmt, data_file, data_file_raw.
";

/// Run one verb with its arguments; gives the exit status.
pub fn run(arguments: &[String], streams: &mut Streams<'_>) -> u8 {
    let Some((verb, rest)) = arguments.split_first() else {
        return say_failure(
            &Failure::new("Not enough arguments; `ringfort img --help` lists the verbs"),
            streams,
        );
    };
    if matches!(verb.as_str(), "-h" | "--help" | "help") || rest.iter().any(|a| a == "-h" || a == "--help") {
        return u8::from(streams.out.write_all(HELP.as_bytes()).is_err());
    }
    let done = match verb.as_str() {
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
