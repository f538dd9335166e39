//! The `ringfort` command: parses arguments and calls the crates that do the work.
#![forbid(unsafe_code)]

mod doctor;
mod exit;
mod info;
mod net;
mod progress;
mod restore;
mod run;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Virtual machines on Linux, with or without KVM.
#[derive(Debug, Parser)]
#[command(name = "ringfort", version, about, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(Box<run::RunArgs>),
    Net(net::NetArgs),
    /// Boot a virtual machine that waits for gdb: `ringfort run --gdb :1234`, with the same options
    Debug(Box<run::RunArgs>),
    Restore(Box<restore::RestoreArgs>),
    /// Look into a saved state
    #[command(subcommand)]
    State(restore::StateCommand),
    /// Say what this host offers for virtual machines, and what to do about what is missing
    Doctor {
        /// Write the findings as JSON
        #[arg(long)]
        json: bool,
    },
    /// Say what this host has: processor, memory, hardware virtualization, what its KVM can do, CPU models
    Info {
        /// Write it as JSON
        #[arg(long)]
        json: bool,
    },
    /// Create, examine and convert disk images, with qemu-img's verbs and options
    #[command(disable_help_flag = true)]
    Img {
        /// A verb and its arguments; --help lists them
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "VERB …")]
        arguments: Vec<String>,
    },
    /// Build the default guest now, if it is not there yet, and say where its files are
    Guest {
        /// The small guest of tests and benchmarks instead: a kernel and a busybox initramfs
        #[arg(long)]
        test: bool,
        /// Write the paths as JSON
        #[arg(long)]
        json: bool,
    },
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return usage(&e),
    };
    match cli.command {
        Command::Run(args) => args.run(),
        Command::Net(args) => args.run(),
        Command::Debug(args) => args.debug(),
        Command::Restore(args) => args.run(),
        Command::State(command) => command.run(),
        Command::Doctor { json } => doctor::run(json),
        Command::Info { json } => info::run(json),
        Command::Img { arguments } => {
            let (mut out, mut err) = (std::io::stdout(), std::io::stderr());
            let mut streams = ringfort_img::Streams { out: &mut out, err: &mut err };
            ExitCode::from(ringfort_img::run(&arguments, &mut streams))
        }
        Command::Guest { test, json } => guest(test, json),
    }
}

fn guest(test: bool, json: bool) -> ExitCode {
    let built = ringfort_guest::cache_dir().and_then(|dir| {
        let mut progress = progress::BuildProgress::new();
        if test {
            let g = ringfort_guest::ensure_test(&dir, &mut progress)?;
            Ok((g.kernel, g.initrd, None, g.cmdline))
        } else {
            let g = ringfort_guest::ensure(&dir, &mut progress)?;
            Ok((g.kernel, g.initrd, Some(g.disk), g.cmdline))
        }
    });
    match built {
        Ok((kernel, initrd, disk, cmdline)) if json => {
            let value = serde_json::json!({
                "kernel": kernel, "initrd": initrd, "disk": disk, "cmdline": cmdline
            });
            println!("{value:#}");
            ExitCode::SUCCESS
        }
        Ok((kernel, initrd, disk, cmdline)) => {
            println!("kernel   {}\ninitrd   {}", kernel.display(), initrd.display());
            if let Some(disk) = disk {
                println!("disk     {}", disk.display());
            }
            println!("cmdline  {cmdline}");
            ExitCode::SUCCESS
        }
        Err(e) => exit::usage(&e.to_string()),
    }
}

/// Help and version go out as they are; a mistake is one line on standard error and exit status 2.
fn usage(error: &clap::Error) -> ExitCode {
    use clap::error::ErrorKind;
    if matches!(
        error.kind(),
        ErrorKind::DisplayHelp
            | ErrorKind::DisplayVersion
            | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
    ) {
        let _ = error.print();
        return ExitCode::from(u8::from(error.use_stderr()) * 2);
    }
    let sub = std::env::args()
        .nth(1)
        .filter(|a| matches!(a.as_str(), "run" | "debug" | "restore" | "state" | "doctor" | "guest"));
    exit::usage(&one_line(&error.render().to_string(), sub.as_deref()))
}

/// What clap says in several lines, on one: the message and its tip, without the usage.
fn one_line(message: &str, subcommand: Option<&str>) -> String {
    let text = message.split("\n\nUsage:").next().unwrap_or(message);
    let text = text.split("\n\nFor more information").next().unwrap_or(text);
    let words: Vec<&str> = text.trim_start_matches("error: ").split_whitespace().collect();
    let command = subcommand.map_or(String::new(), |c| format!(" {c}"));
    format!("{}; `ringfort{command} --help` lists what there is", words.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parser_is_sound() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }

    #[test]
    fn img_takes_its_options_itself() {
        let cli = Cli::try_parse_from(["ringfort", "img", "create", "-f", "qcow2", "--help", "a", "8G"])
            .expect("parses");
        let Command::Img { arguments } = cli.command else { panic!("another command") };
        assert_eq!(arguments, ["create", "-f", "qcow2", "--help", "a", "8G"]);
    }

    #[test]
    fn a_mistake_is_told_on_one_line_that_names_it() {
        for (args, named) in [
            (vec!["ringfort", "doctor", "--bogus"], "--bogus"),
            (vec!["ringfort", "doctr"], "doctr"),
            (vec!["ringfort", "doctor", "a\nb"], "a b"),
        ] {
            let error = Cli::try_parse_from(args).expect_err("a mistake");
            let line = one_line(&error.render().to_string(), None);
            assert!(line.contains(named) && !line.contains('\n') && !line.contains("Usage"), "{line}");
        }
    }
}
