//! A machine that stands because a disk's host has trouble.

use crate::disk::DiskTrouble;
use ringfort_virtio::blk::Action;
use std::collections::HashSet;
use std::time::{Duration, Instant};

/// How long after a lack of space the guest tries again, and how long it has to run for the trouble to count as over.
const AGAIN: Duration = Duration::from_secs(1);

/// What stands between the guest and going on.
#[derive(Default)]
pub struct Halt {
    trouble: Option<DiskTrouble>,
    /// The guest runs on trial.
    trial: Option<Trial>,
    /// When the trouble or the trial began.
    since: Option<Instant>,
    /// The user has stopped the machine.
    stopped: bool,
    /// What was told already.
    told: HashSet<(usize, bool, String)>,
}

struct Trial {
    /// Because the user wants it so.
    wanted: bool,
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
        let known = self.is_known(&t);
        let line = match t.action {
            Action::Report => format!("{what} error: {}; the guest was told so", t.error),
            Action::Ignore => format!("{what} error: {}; ignored, as the disk's options say", t.error),
            Action::Stop if t.full => {
                format!("{}; the guest stands until there is space (Ctrl-A c tries at once)", t.error)
            }
            Action::Stop => {
                format!("{what} error: {}; the guest stands: mend it, then press Ctrl-A c", t.error)
            }
        };
        let line = (!known).then(|| format!("disk {}: {line}", t.disk));
        if t.action != Action::Stop {
            self.told.insert((t.number, t.write, t.error));
            return (Act::Nothing, line);
        }
        self.trouble = Some(t);
        self.trial = None;
        self.since = Some(Instant::now());
        (Act::Pause, line)
    }

    /// Whether this is no news: the user has been told before, or the machine stands for it.
    pub fn is_known(&self, t: &DiskTrouble) -> bool {
        match t.action {
            Action::Stop => self.trouble.as_ref() == Some(t),
            _ => self.told.contains(&(t.number, t.write, t.error.clone())),
        }
    }

    /// How long the main loop may wait for events.
    pub fn patience(&self) -> Option<Duration> {
        let waits = match (&self.trouble, &self.trial) {
            _ if self.stopped => false,
            (Some(_), Some(_)) => true,
            (Some(t), None) => t.full,
            (None, _) => false,
        };
        waits.then(|| AGAIN.saturating_sub(self.since.map_or(AGAIN, |s| s.elapsed())))
    }

    /// Time has gone by: whether as much as [`patience`](Self::patience) said is found out here.
    pub fn waited(&mut self) -> (Act, Option<String>) {
        match (&self.trouble, &self.trial) {
            _ if self.patience() != Some(Duration::ZERO) => (Act::Nothing, None),
            (Some(t), None) if t.full => self.try_again(false),
            (Some(_), Some(_)) => {
                let line = self.trouble.take().map(|t| format!("disk {}: the guest goes on", t.disk));
                self.trial = None;
                (Act::Nothing, line)
            }
            _ => (Act::Nothing, None),
        }
    }

    fn try_again(&mut self, wanted: bool) -> (Act, Option<String>) {
        self.trial = Some(Trial { wanted });
        self.since = Some(Instant::now());
        (Act::Resume, None)
    }

    /// The user wants the machine to stop.
    pub fn stop(&mut self) -> (Act, Option<String>) {
        self.stopped = true;
        // What was on trial is not decided.
        self.trial = None;
        (Act::Pause, None)
    }

    /// The user wants it to go on: what failed is tried again.
    pub fn go_on(&mut self) -> (Act, Option<String>) {
        match (&self.trouble, &mut self.trial) {
            (Some(_), None) => {
                self.stopped = false;
                self.try_again(true)
            }
            (Some(_), Some(trial)) => {
                trial.wanted = true;
                (Act::Nothing, None)
            }
            _ if std::mem::take(&mut self.stopped) => (Act::Resume, None),
            _ => (Act::Nothing, None),
        }
    }

    /// Whether the machine is kept from running.
    pub fn stands(&self) -> bool {
        self.stopped || self.trouble.is_some() && self.trial.is_none()
    }

    /// Why the machine stands, as QMP's `RunState` has it; `None` while it runs. A guest that is tried out by itself now and
    /// then counts as standing until it has gone on.
    pub fn status(&self) -> Option<&'static str> {
        match (&self.trouble, &self.trial) {
            _ if self.stopped => Some("paused"),
            (Some(_), Some(trial)) if trial.wanted => None,
            (Some(_), _) => Some("io-error"),
            _ => None,
        }
    }

    /// The trouble that disk `number` has, if the machine stands for it: whether it is a lack of space.
    pub fn trouble_of(&self, number: usize) -> Option<bool> {
        self.trouble.as_ref().filter(|t| t.number == number).map(|t| t.full)
    }

    /// The machine starts over; one that the user has stopped stays so.
    pub fn forget(&mut self) {
        *self = Halt { stopped: self.stopped, ..Halt::default() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trouble(full: bool, stop: bool) -> DiskTrouble {
        let action = if stop { Action::Stop } else { Action::Report };
        DiskTrouble { number: 0, disk: "d".into(), write: true, error: "E".into(), full, action }
    }

    fn later(h: &mut Halt) {
        h.since = Instant::now().checked_sub(AGAIN);
    }

    #[test]
    fn a_lack_of_space_is_tried_again_and_told_once() {
        let mut h = Halt::default();
        assert_eq!(h.patience(), None);
        let (act, line) = h.trouble(trouble(true, true));
        assert_eq!(act, Act::Pause);
        assert!(line.unwrap().contains("until there is space"));
        assert!(h.patience().is_some_and(|p| p > Duration::ZERO));
        assert_eq!(h.waited(), (Act::Nothing, None));
        later(&mut h);
        assert_eq!(h.waited(), (Act::Resume, None));
        // Still full: it stands again, without a word.
        assert_eq!(h.trouble(trouble(true, true)), (Act::Pause, None));
        assert_eq!(h.status(), Some("io-error"));
        assert_eq!(h.go_on(), (Act::Resume, None));
        assert_eq!(h.go_on(), (Act::Nothing, None));
        assert_eq!(h.status(), None);
        assert_eq!(h.waited(), (Act::Nothing, None));
        later(&mut h);
        let (act, line) = h.waited();
        assert_eq!((act, line.as_deref()), (Act::Nothing, Some("disk d: the guest goes on")));
        assert_eq!(h.patience(), None);
    }

    #[test]
    fn other_errors_wait_for_the_user() {
        let mut h = Halt::default();
        assert_eq!(h.trouble(trouble(false, true)).0, Act::Pause);
        assert_eq!((h.patience(), h.waited()), (None, (Act::Nothing, None)));
        assert_eq!(h.go_on().0, Act::Resume);
        h.forget();
        assert_eq!(h.go_on().0, Act::Nothing);
    }

    #[test]
    fn a_user_who_stops_the_machine_has_the_last_word() {
        let mut h = Halt::default();
        assert_eq!((h.stop().0, h.status(), h.stands()), (Act::Pause, Some("paused"), true));
        assert_eq!((h.go_on().0, h.status(), h.stands()), (Act::Resume, None, false));
        // Not even space lets it go on by itself.
        h.trouble(trouble(true, true));
        later(&mut h);
        assert_eq!(h.waited().0, Act::Resume);
        assert!(!h.stands() && h.status() == Some("io-error"));
        h.stop();
        assert_eq!((h.patience(), h.status()), (None, Some("paused")));
        // A reset is no reason to go on.
        h.forget();
        assert!(h.stands());
        // What failed just before it stood is tried again.
        h.trouble(trouble(false, true));
        assert_eq!((h.go_on().0, h.status()), (Act::Resume, None));
        assert!(h.patience().is_some());
    }

    #[test]
    fn what_the_guest_is_told_is_said_once() {
        let mut h = Halt::default();
        assert!(h.trouble(trouble(false, false)).1.unwrap().contains("write error: E"));
        assert_eq!(h.trouble(trouble(false, false)), (Act::Nothing, None));
    }
}
