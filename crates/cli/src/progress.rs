//! Progress of what takes time, on standard error: a line that renews itself on a terminal. Elsewhere the steps of a build are plain lines.

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

/// Remarks of a run, and the progress of saving and restoring.
#[derive(Default)]
pub struct RunUi {
    bar: Option<ProgressBar>,
}

impl ringfort_vmm::Ui for RunUi {
    fn say(&mut self, line: &str) {
        self.progress_ends();
        crate::exit::say(line);
    }

    fn progress(&mut self, what: &'static str, done: u64, total: u64) {
        if !std::io::stderr().is_terminal() {
            return;
        }
        let bar = self.bar.get_or_insert_with(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            if let Ok(style) =
                ProgressStyle::with_template("{prefix} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}")
            {
                bar.set_style(style);
            }
            bar
        });
        bar.set_prefix(what);
        bar.set_length(total);
        bar.set_position(done);
    }

    fn progress_ends(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
