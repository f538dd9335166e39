//! Progress of building the default guest, on standard error: a line that renews itself on a terminal, plain lines elsewhere.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use ringfort_guest::Progress;
use std::io::IsTerminal as _;
use std::time::Duration;

/// Shows the steps of a build. Dropping it clears the line.
pub struct BuildProgress {
    bar: Option<ProgressBar>,
}

impl BuildProgress {
    /// On standard error.
    pub fn new() -> BuildProgress {
        BuildProgress { bar: std::io::stderr().is_terminal().then(bar) }
    }
}

fn bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix} ({elapsed}) {wide_msg:.dim}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

impl Progress for BuildProgress {
    fn step(&mut self, index: usize, total: usize, what: &str) {
        let text = format!("[{index}/{total}] {what}");
        match &self.bar {
            Some(bar) => {
                bar.set_prefix(text);
                bar.set_message("");
            }
            None => eprintln!("ringfort: {text}"),
        }
    }

    fn detail(&mut self, line: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(line.to_owned());
        }
    }
}

impl Drop for BuildProgress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
