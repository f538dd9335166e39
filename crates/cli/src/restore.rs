//! `ringfort restore`: a saved machine goes on. `ringfort state`: what is in the file.

use crate::{exit, run};
use clap::{Args, Subcommand, ValueHint};
use ringfort_vmm::config::{AccelOption, Serial};
use ringfort_vmm::gdb::GdbOption;
use ringfort_vmm::saved::{SaveTarget, Saved};
use ringfort_vmm::{Options, VmmError};
use std::path::PathBuf;
use std::process::ExitCode;

/// Go on with a machine that `ringfort run` saved (Ctrl-A s, or signal USR1).
///
/// The file holds the machine's options, memory and devices. Disks are opened where they were, and must not have been written to since; what
/// a guest wrote to disks with snapshot=on is in the file. The engine may be another one than before.
#[derive(Args, Debug)]
#[command(after_help = AFTER)]
pub struct RestoreArgs {
    /// The saved state
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
    file: PathBuf,
    /// Engine to go on with: auto, kvm, soft, or soft,tier=interp
    #[arg(long, value_name = "ENGINE", default_value = "auto")]
    accel: AccelOption,
    /// Where disk number N (from 1) is now; may be repeated
    #[arg(long, value_name = "N=FILE", value_parser = moved)]
    disk: Vec<(usize, PathBuf)>,
    /// Go on although disks were written to since: the guest's file systems may be damaged by it
    #[arg(long)]
    ignore_disk_changes: bool,
    /// Where the first serial port leads now: stdio, file:PATH (written on at its end), pty, unix:PATH or none
    #[arg(long, value_name = "WHERE")]
    serial: Option<Serial>,
    /// Where the virtio console leads now, if the machine has one
    #[arg(long, value_name = "WHERE")]
    console: Option<Serial>,
    /// Another name for the machine
    #[arg(long, value_name = "TEXT")]
    name: Option<String>,
    /// Leave when the guest resets, with status 3, instead of booting it again
    #[arg(long)]
    no_reboot: bool,
    /// Where Ctrl-A s and signal USR1 save it the next time; by default to the same file
    #[arg(long, value_name = "FILE[,compress=zstd|none]")]
    save: Option<SaveTarget>,
    /// Write the counters of the engine and of each network card's queues to this file at the end, as for `ringfort run`
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    stats: Option<PathBuf>,
    /// Wait for gdb, as for `ringfort run`
    #[arg(long, value_name = "[HOST]:PORT|unix:PATH|dev:PATH[,wait=off]")]
    gdb: Option<GdbOption>,
    /// Take commands in QEMU's machine protocol (QMP) at this unix socket, as for `ringfort run`
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath)]
    control: Option<PathBuf>,
}

const AFTER: &str = "\
Examples:
  ringfort run --save web.rfstate …        then Ctrl-A s, or kill -USR1
  ringfort restore web.rfstate
  ringfort restore web.rfstate --accel kvm --disk 1=/new/place/root.img
  ringfort state show web.rfstate

Keys and exit status are those of `ringfort run`.";

fn moved(text: &str) -> Result<(usize, PathBuf), String> {
    let (n, path) = text.split_once('=').ok_or("give the disk's number and its file, as in 1=root.img")?;
    match n.parse() {
        Ok(n @ 1..) if !path.is_empty() => Ok((n, path.into())),
        _ => Err("give the disk's number, from 1, and its file, as in 1=root.img".into()),
    }
}

impl RestoreArgs {
    /// Do it.
    pub fn run(self) -> ExitCode {
        let (stats, control) = (self.stats.clone(), self.control.clone());
        match self.prepare() {
            Ok((saved, save, gdb)) => {
                let config = saved.config.clone();
                let options =
                    Options { save, restore: Some(saved), gdb, control, stats, ..Options::default() };
                run::start(&config, options)
            }
            Err(e) => exit::usage(&e.to_string()),
        }
    }

    fn prepare(self) -> Result<(Saved, Option<SaveTarget>, Option<GdbOption>), VmmError> {
        let mut saved = Saved::open(&self.file)?;
        let wrong = |what: String| Err(VmmError::State(format!("{}: {what}", self.file.display())));
        let config = &mut saved.config;
        (config.accel, config.tier) = (self.accel.accel, self.accel.tier);
        for (n, path) in self.disk {
            match config.disks.get_mut(n - 1) {
                Some(disk) => disk.path = path,
                None => {
                    let have = config.disks.len();
                    return wrong(format!("--disk {n}=…: the machine has {have} disks"));
                }
            }
        }
        if let Some(serial) = self.serial {
            config.serial = serial;
        }
        if let Some(console) = self.console {
            if (console == Serial::None) != (config.console == Serial::None) {
                return wrong("--console: a console cannot be added to a saved machine or taken from it; change where it leads".into());
            }
            config.console = console;
        }
        config.name = self.name.unwrap_or_else(|| config.name.clone());
        config.no_reboot |= self.no_reboot;
        saved.check_disks(self.ignore_disk_changes)?;
        Ok((saved, self.save, self.gdb))
    }
}

/// What can be done with a saved state.
#[derive(Subcommand, Debug)]
pub enum StateCommand {
    /// Check a saved state to its last byte and show what is in it, as JSON
    Show {
        /// The saved state
        #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
        file: PathBuf,
        /// The encoded bodies of all sections too, in hexadecimal; their fields are shown in any case
        #[arg(long)]
        bodies: bool,
        /// JSON is what there is in any case
        #[arg(long, hide = true)]
        json: bool,
    },
}

impl StateCommand {
    /// Do it.
    pub fn run(self) -> ExitCode {
        let StateCommand::Show { file, bodies, json: _ } = self;
        match ringfort_vmm::saved::show(&file, bodies) {
            Ok(value) => {
                // Whoever closed the pipe has read enough.
                let _ = std::io::Write::write_all(&mut std::io::stdout(), format!("{value:#}\n").as_bytes());
                ExitCode::SUCCESS
            }
            Err(e) => exit::usage(&e.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moved_disks() {
        assert_eq!(moved("2=/a=b"), Ok((2, "/a=b".into())));
        for bad in ["", "1", "0=x", "1=", "x=y", "-1=x"] {
            assert!(moved(bad).is_err(), "{bad}");
        }
    }
}
