//! Builds a guest into a folder and prints where it is: `cargo run -p ringfort-guest --example guest -- test|debian [DIR]`.

use std::process::ExitCode;

struct Lines;

impl ringfort_guest::Progress for Lines {
    fn step(&mut self, index: usize, total: usize, what: &str) {
        eprintln!("[{index}/{total}] {what}");
    }
    fn detail(&mut self, line: &str) {
        eprintln!("      {line}");
    }
}

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let kind = args.next().unwrap_or_default();
    let dir = args.next().map(std::path::PathBuf::from);
    let built = dir.map_or_else(ringfort_guest::cache_dir, Ok).and_then(|dir| {
        Ok(match kind.to_str() {
            Some("test") => format!("{:#?}", ringfort_guest::ensure_test(&dir, &mut Lines)?),
            _ => format!("{:#?}", ringfort_guest::ensure(&dir, &mut Lines)?),
        })
    });
    match built {
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}
