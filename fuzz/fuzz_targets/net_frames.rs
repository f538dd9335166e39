#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|data: &[u8]| ringfort_fuzz::net_frames(data));

/// Without cargo-fuzz: run the inputs in the files named, to look into a finding.
#[cfg(not(fuzzing))]
fn main() -> std::process::ExitCode {
    ringfort_fuzz::replay(ringfort_fuzz::net_frames)
}
