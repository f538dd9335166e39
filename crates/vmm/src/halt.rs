//! A machine that stands because a disk's host has trouble.

use crate::disk::DiskTrouble;
use std::collections::HashSet;
use std::time::{Duration, Instant};

/// How long after a lack of space the guest tries again, and how long it has to run for the trouble to count as over.
const AGAIN: Duration = Duration::from_secs(1);

/// What stands between the guest and going on.
#[derive(Default)]
pub struct Halt {
    trouble: Option<DiskTrouble>,
    /// The guest runs on trial since.
    trial: Option<Instant>,
    /// What was told already.
    told: HashSet<(String, bool, String)>,
}

/// What the main loop does.
#[derive(Debug, PartialEq, Eq)]
pub enum Act {
    /// Nothing.
    Nothing,
    /// Pause the machine.
    Pause,
    /// Let the machine run.
    Resume,
}

impl Halt {
    /// A request failed: what to do, and what to say.
    pub fn trouble(&mut self, t: DiskTrouble) -> (Act, Option<String>) {
        let what = if t.write { "write" } else { "read" };
        if !t.stop {
            let new = self.told.insert((t.disk.clone(), t.write, t.error.clone()));
            let line = format!("disk {}: {what} error: {}; the guest was told so", t.disk, t.error);
            return (Act::Nothing, new.then_some(line));
        }
        let known = self.trouble.as_ref() == Some(&t);
        let line = if t.full {
            format!(
                "disk {}: {}; the guest stands until there is space (Ctrl-A c tries at once)",
                t.disk, t.error
            )
        } else {
            format!(
                "disk {}: {what} error: {}; the guest stands: mend it, then press Ctrl-A c",
                t.disk, t.error
            )
        };
        self.trouble = Some(t);
        self.trial = None;
        (Act::Pause, (!known).then_some(line))
    }

    /// How long the main loop may wait for events.
    pub fn patience(&self) -> Option<Duration> {
        match (&self.trouble, self.trial) {
            (Some(_), Some(_)) => Some(AGAIN),
            (Some(t), None) if t.full => Some(AGAIN),
            _ => None,
        }
    }

    /// Nothing happened for as long as [`patience`](Self::patience) said.
    pub fn waited(&mut self) -> (Act, Option<String>) {
        match (&self.trouble, self.trial) {
            (Some(t), None) if t.full => self.again(),
            (Some(_), Some(since)) if since.elapsed() >= AGAIN => {
                let line = self.trouble.take().map(|t| format!("disk {}: the guest goes on", t.disk));
                self.trial = None;
                (Act::Nothing, line)
            }
            _ => (Act::Nothing, None),
        }
    }

    /// Try again.
    pub fn again(&mut self) -> (Act, Option<String>) {
        if self.trouble.is_none() || self.trial.is_some() {
            return (Act::Nothing, None);
        }
        self.trial = Some(Instant::now());
        (Act::Resume, None)
    }

    /// Whether the machine is kept from running.
    pub fn stands(&self) -> bool {
        self.trouble.is_some() && self.trial.is_none()
    }

    /// The trouble of the disk in file `disk` that the machine stands for, if any: whether it is a lack of space.
    pub fn trouble_of(&self, disk: &str) -> Option<bool> {
        self.trouble.as_ref().filter(|t| t.disk == disk).map(|t| t.full)
    }

    /// The machine starts over.
    pub fn forget(&mut self) {
        *self = Halt::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trouble(full: bool, stop: bool) -> DiskTrouble {
        DiskTrouble { disk: "d".into(), write: true, error: "E".into(), full, stop }
    }

    #[test]
    fn a_lack_of_space_is_tried_again_and_told_once() {
        let mut h = Halt::default();
        assert_eq!(h.patience(), None);
        let (act, line) = h.trouble(trouble(true, true));
        assert_eq!(act, Act::Pause);
        assert!(line.unwrap().contains("until there is space"));
        assert_eq!(h.patience(), Some(AGAIN));
        assert_eq!(h.waited(), (Act::Resume, None));
        // Still full: it stands again, without a word.
        assert_eq!(h.trouble(trouble(true, true)), (Act::Pause, None));
        assert_eq!(h.again(), (Act::Resume, None));
        assert_eq!(h.again(), (Act::Nothing, None));
        h.trial = Instant::now().checked_sub(AGAIN);
        let (act, line) = h.waited();
        assert_eq!((act, line.as_deref()), (Act::Nothing, Some("disk d: the guest goes on")));
        assert_eq!(h.patience(), None);
    }

    #[test]
    fn other_errors_wait_for_the_user() {
        let mut h = Halt::default();
        assert_eq!(h.trouble(trouble(false, true)).0, Act::Pause);
        assert_eq!((h.patience(), h.waited()), (None, (Act::Nothing, None)));
        assert_eq!(h.again().0, Act::Resume);
        h.forget();
        assert_eq!(h.again().0, Act::Nothing);
    }

    #[test]
    fn what_the_guest_is_told_is_said_once() {
        let mut h = Halt::default();
        assert!(h.trouble(trouble(false, false)).1.unwrap().contains("write error: E"));
        assert_eq!(h.trouble(trouble(false, false)), (Act::Nothing, None));
    }
}
