//! gdb's `monitor`: what it has no commands of its own for.

use super::target::Debuggee;
use gdbstub::outputln;
use gdbstub::target::ext::monitor_cmd::{ConsoleOutput, MonitorCmd};
use ringfort_engine::MpState;
use ringfort_memory::{Bytes as _, GuestAddress};

/// Most words that `xp` shows at once.
const MOST_WORDS: u64 = 512;

const HELP: &str = "\
help                     this text
vcpus                    what each vCPU does, with RIP, CR3 and privilege level
translate ADDRESS        where the current vCPU's page tables put a linear address
xp ADDRESS [COUNT]       COUNT (1) words of 8 bytes at a physical address
stats                    counters of the engine and the network cards
nmi                      a non-maskable interrupt for the current vCPU, which takes it when it goes on
powerdown                press the power button; the guest's system sees it when it goes on
Numbers are decimal, or hexadecimal with 0x.";

/// A command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Command {
    Help,
    Vcpus,
    Translate(u64),
    Physical(u64, u64),
    Stats,
    Nmi,
    PowerDown,
}

fn number(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| format!("'{text}' is no number; give one like 4096 or 0x1000"))
}

fn parse(text: &str) -> Result<Command, String> {
    let words: Vec<&str> = text.split_whitespace().collect();
    match words[..] {
        [] | ["help"] => Ok(Command::Help),
        ["vcpus"] => Ok(Command::Vcpus),
        ["translate", address] => Ok(Command::Translate(number(address)?)),
        ["xp", address] => Ok(Command::Physical(number(address)?, 1)),
        ["xp", address, count] => match number(count)? {
            n @ 1..=MOST_WORDS => Ok(Command::Physical(number(address)?, n)),
            _ => Err(format!("'{count}' is too many words or none; give 1 to {MOST_WORDS}")),
        },
        ["stats"] => Ok(Command::Stats),
        ["nmi"] => Ok(Command::Nmi),
        ["powerdown"] => Ok(Command::PowerDown),
        _ => Err(format!("'{}' is no command here; `monitor help` names those there are", text.trim())),
    }
}

impl MonitorCmd for Debuggee {
    fn handle_monitor_cmd(&mut self, command: &[u8], mut out: ConsoleOutput<'_>) -> Result<(), Self::Error> {
        match parse(&String::from_utf8_lossy(command)) {
            Ok(command) => self.execute(command, &mut out),
            Err(why) => outputln!(out, "{why}"),
        }
        Ok(())
    }
}

impl Debuggee {
    fn execute(&self, command: Command, out: &mut ConsoleOutput<'_>) {
        let current = self.current;
        match command {
            Command::Help => outputln!(out, "{HELP}"),
            Command::Vcpus => self.vcpus(out),
            Command::Translate(address) => match self.physical(current, address) {
                Ok(Some(gpa)) => {
                    outputln!(out, "{address:#x} is at physical address {gpa:#x} for vCPU {current}")
                }
                Ok(None) => outputln!(out, "{address:#x} is not mapped for vCPU {current}"),
                Err(_) => outputln!(out, "vCPU {current} has failed"),
            },
            Command::Physical(address, count) => {
                for n in 0..count {
                    let at = address.wrapping_add(n * 8);
                    match self.machine.pc.memory().read_obj::<u64>(GuestAddress(at)) {
                        Ok(word) => outputln!(out, "{at:#018x}: {word:#018x}"),
                        Err(_) => return outputln!(out, "{at:#018x}: there is no RAM"),
                    }
                }
            }
            Command::Stats => {
                for (name, value) in self.machine.statistics() {
                    outputln!(out, "{name} {value}");
                }
            }
            Command::Nmi => {
                if let Some(id) = self.machine.apic_ids().nth(current) {
                    self.machine.vm.inject_nmi(id);
                    outputln!(out, "sent to vCPU {current}");
                }
            }
            Command::PowerDown => {
                self.machine.power_button();
                outputln!(out, "the power button was pressed");
            }
        }
    }

    fn vcpus(&self, out: &mut ConsoleOutput<'_>) {
        for n in 0..self.machine.vcpus.len() {
            let mark = if n == self.current { '*' } else { ' ' };
            let Ok(s) = self.state(n) else {
                outputln!(out, "{mark} vCPU {n}: failed");
                continue;
            };
            let doing = match s.mp_state {
                MpState::Runnable => "running",
                MpState::Halted => "halted",
                MpState::Uninitialized | MpState::WaitForSipi => "not started",
            };
            // CPL is the privilege level of SS (Intel SDM 3A section 5.5).
            let level = s.segments[ringfort_x86::segment::SS].dpl();
            outputln!(out, "{mark} vCPU {n}: {doing}, rip {:#x}, cr3 {:#x}, ring {level}", s.rip, s.cr3);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_and_what_is_wrong_with_them() {
        assert_eq!(parse(" "), Ok(Command::Help));
        assert_eq!(parse("xp 0x1000 4"), Ok(Command::Physical(0x1000, 4)));
        assert_eq!(parse("translate 4096"), Ok(Command::Translate(4096)));
        for (bad, says) in [
            ("xp", "'xp' is no command"),
            ("xp here", "'here' is no number"),
            ("xp 0 513", "give 1 to 512"),
            ("xp 0 0", "give 1 to 512"),
            ("translate -1", "'-1' is no number"),
            ("system_reset", "`monitor help`"),
        ] {
            assert!(parse(bad).is_err_and(|e| e.contains(says)), "{bad}: {:?}", parse(bad));
        }
        // Each word of the help's first column is known.
        for line in HELP.lines().filter(|l| l.as_bytes()[0].is_ascii_lowercase()) {
            let word = line.split(' ').next().expect("a word");
            let with_numbers =
                line.split("  ").next().expect("a form").replace("[COUNT]", "2").replace("ADDRESS", "0x10");
            assert!(parse(&with_numbers).is_ok(), "{word}: {with_numbers}");
        }
    }
}
