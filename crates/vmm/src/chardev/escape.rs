//! The escape key of an interactive terminal: Ctrl-A, then a letter.

use super::{OnCommand, Output};
use std::sync::Arc;

/// Ctrl-A.
const ESCAPE: u8 = 1;

/// What Ctrl-A h prints.
pub const HELP: &str = "\r\n\
Ctrl-A h    this help\r\n\
Ctrl-A x    stop the machine and leave\r\n\
Ctrl-A p    press the power button (asks the guest to shut down)\r\n\
Ctrl-A r    reset the machine\r\n\
Ctrl-A c    let a guest that stands for a disk's error try again\r\n\
Ctrl-A l    pull the network cable, or plug it in again\r\n\
Ctrl-A n    show what the network cards have counted\r\n\
Ctrl-A s    save the machine to a file and leave (--save names the file)\r\n\
Ctrl-A a    send Ctrl-A to the guest\r\n";

/// An order from the terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Stop the machine.
    Quit,
    /// Press the power button.
    PowerButton,
    /// Reset.
    Reset,
    /// Try again what failed on a disk.
    Continue,
    /// Pull the network cables, or plug them in again.
    ToggleLink,
    /// Show the network cards' counters.
    Counters,
    /// Save the state and stop.
    Save,
}

/// Filters the escape key out of what is typed.
pub struct Escape {
    pending: bool,
    output: Arc<Output>,
    on_command: OnCommand,
}

impl Escape {
    /// `output` gets the help text.
    pub fn new(output: Arc<Output>, on_command: OnCommand) -> Escape {
        Escape { pending: false, output, on_command }
    }

    /// What of `typed` goes to the guest.
    pub fn filter(&mut self, typed: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(typed.len());
        for &b in typed {
            if !std::mem::take(&mut self.pending) {
                if b == ESCAPE {
                    self.pending = true;
                } else {
                    out.push(b);
                }
                continue;
            }
            match b {
                b'x' | b'X' => (self.on_command)(Command::Quit),
                b'p' | b'P' => (self.on_command)(Command::PowerButton),
                b'r' | b'R' => (self.on_command)(Command::Reset),
                b'c' | b'C' => (self.on_command)(Command::Continue),
                b'l' | b'L' => (self.on_command)(Command::ToggleLink),
                b'n' | b'N' => (self.on_command)(Command::Counters),
                b's' | b'S' => (self.on_command)(Command::Save),
                b'a' | b'A' | ESCAPE => out.push(ESCAPE),
                // Any other letter asks for help rather than being lost.
                _ => drop(self.output.write(HELP.as_bytes())),
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn escapes() {
        let (tx, rx) = channel();
        let mut e = Escape::new(Output::discard(), Box::new(move |c| tx.send(c).unwrap()));
        assert_eq!(e.filter(b"ls\x01"), b"ls");
        assert_eq!(e.filter(b"x\n"), b"\n");
        assert_eq!(rx.try_recv(), Ok(Command::Quit));
        assert_eq!(e.filter(b"\x01a\x01\x01\x01hq"), b"\x01\x01q");
        assert!(rx.try_recv().is_err());
    }
}
