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
Disk images: create, examine, convert. Verbs, options, output and exit statuses are qemu-img's.

usage: ringfort img COMMAND [OPTIONS]

  amend [-f FMT] [-p] [-q] [-t CACHE] -o OPTIONS FILE
  bench [-c COUNT] [-d DEPTH] [-s SIZE] [-o OFFSET] [-S STEP] [-w] [--pattern=BYTE] [--flush-interval=N [--no-drain]]
        [-f FMT] [-i native|io_uring|threads] [-n] [-t CACHE] [-q] [-U] FILE
  bitmap (--add [-g SIZE] | --remove | --clear | --enable | --disable | --merge SOURCE [-b FILE [-F FMT]])...
         [-f FMT] FILE BITMAP
  check [-q] [-f FMT] [--output=FMT] [-r leaks|all] [-T CACHE] [-U] FILE
  commit [-q] [-f FMT] [-t CACHE] [-b BASE] [-r RATE] [-d] [-p] FILE
  compare [-f FMT] [-F FMT] [-T CACHE] [-p] [-q] [-s] [-U] FILE1 FILE2
  convert [-c] [-p] [-q] [-n] [--target-is-zero] [--bitmaps [--skip-broken-bitmaps]] [--salvage] [-f FMT] [-O FMT]
          [-B BACKING -F FMT] [-o OPTIONS] [-l SNAPSHOT] [-S SIZE] [-m N] [-W] [-r RATE] [-t CACHE] [-T CACHE] [-U]
          FILE [FILE2...] OUT
  create [-q] [-f FMT] [-b BACKING -F FMT] [-u] [-o OPTIONS] FILE [SIZE]
  dd [-f FMT] [-O FMT] [-U] [bs=SIZE] [count=N] [skip=N] if=FILE of=OUT
  info [-f FMT] [--output=FMT] [--backing-chain] [-U] FILE
  map [-f FMT] [--start-offset=N] [--max-length=N] [--output=FMT] [-U] FILE
  measure [-f FMT] [-O FMT] [-o OPTIONS] [-l SNAPSHOT] [--output=FMT] [-U] (--size SIZE | FILE)
  rebase [-q] [-f FMT] [-t CACHE] [-T CACHE] [-p] [-u] -b BACKING [-F FMT] FILE
  resize [-f FMT] [-q] [--preallocation=MODE] [--shrink] FILE [+|-]SIZE
  snapshot [-q] [-U] [-l | -a NAME | -c NAME | -d NAME] FILE

FMT of images is raw or qcow2, and to read from vmdk, vpc (VHD), vhdx and vdi; of --output human or json.
SIZE takes the suffixes k, M, G, T, P, E. CACHE is none, writeback, writethrough, directsync or unsafe; convert writes new
files with unsafe: -t writeback waits until they are on the disk. `-o help` lists the options of a new image.
With --image-opts FILE is driver=FMT,file.filename=NAME. New files get their names when they are complete.
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
