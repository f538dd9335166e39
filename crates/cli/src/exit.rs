//! Exit statuses, and the one line that goes with a failure.

use std::process::ExitCode;

/// Ringfort itself failed.
pub const FAILURE: u8 = 1;
/// Bad options, or files that cannot be used.
pub const USAGE: u8 = 2;
/// The guest reset, and was not to be booted again.
pub const GUEST_RESET: u8 = 3;
/// The guest panicked.
pub const GUEST_PANIC: u8 = 4;

/// Say what is wrong with what was asked for.
pub fn usage(message: &str) -> ExitCode {
    eprintln!("ringfort: {message}");
    ExitCode::from(USAGE)
}

/// Say what failed.
pub fn failure(message: &str) -> ExitCode {
    eprintln!("ringfort: {message}");
    ExitCode::from(FAILURE)
}
