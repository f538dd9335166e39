//! Exit statuses, and the one line that goes with a failure.

use std::io::Write as _;
use std::process::ExitCode;

/// Ringfort itself failed.
pub const FAILURE: u8 = 1;
/// Bad options, or files that cannot be used.
pub const USAGE: u8 = 2;
/// The guest reset, and was not to be booted again.
pub const GUEST_RESET: u8 = 3;
/// The guest panicked.
pub const GUEST_PANIC: u8 = 4;

/// One line on standard error. A closed one is no reason to fail.
pub fn say(message: &str) {
    let _ = writeln!(std::io::stderr(), "ringfort: {message}");
}

/// Say what is wrong with what was asked for.
pub fn usage(message: &str) -> ExitCode {
    say(message);
    ExitCode::from(USAGE)
}

/// Say what failed.
pub fn failure(message: &str) -> ExitCode {
    say(message);
    ExitCode::from(FAILURE)
}
