//! What clients hear of without asking: QMP's events (QEMU qapi/run-state.json, qapi/block-core.json).

use super::{Server, command};
use crate::disk::DiskTrouble;
use ringfort_virtio::blk::Action;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// A failing disk is told of at most so often.
const SELDOM: Duration = Duration::from_secs(1);

/// Tells the client of the control socket, if there is one.
#[derive(Default)]
pub struct Events {
    server: Option<Server>,
    /// What the client knows: the machine stands.
    stands: bool,
    /// When it was last told that requests of a disk fail, by disk and whether they were to write.
    failed: HashMap<(usize, bool), Instant>,
}

/// Why a machine ends or is reset, as QMP's `ShutdownCause` has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// The guest switched off.
    GuestShutdown,
    /// The guest reset.
    GuestReset,
    /// The guest's kernel panicked.
    GuestPanic,
    /// A command of the control socket.
    Control,
    /// A key.
    User,
    /// A signal.
    Signal,
    /// Something failed on the host.
    HostError,
}

impl Cause {
    fn data(self, reset: bool) -> Value {
        let (guest, reason) = match self {
            Cause::GuestShutdown => (true, "guest-shutdown"),
            Cause::GuestReset => (true, "guest-reset"),
            Cause::GuestPanic => (true, "guest-panic"),
            Cause::Control if reset => (false, "host-qmp-system-reset"),
            Cause::Control => (false, "host-qmp-quit"),
            Cause::User => (false, "host-ui"),
            Cause::Signal => (false, "host-signal"),
            Cause::HostError => (false, "host-error"),
        };
        json!({ "guest": guest, "reason": reason })
    }
}

impl Events {
    /// Events for the clients of `server`.
    pub fn new(server: Option<Server>) -> Events {
        Events { server, ..Events::default() }
    }

    /// Something without further words.
    pub fn tell(&self, name: &str, data: Value) {
        if let Some(s) = &self.server {
            s.event(name, data);
        }
    }

    /// Whether the machine stands now: `STOP` and `RESUME`.
    pub fn stands(&mut self, stands: bool) {
        if std::mem::replace(&mut self.stands, stands) != stands {
            self.tell(if stands { "STOP" } else { "RESUME" }, Value::Null);
        }
    }

    /// `BLOCK_IO_ERROR`. `known` is trouble for which the machine stands already and that is no news.
    pub fn disk(&mut self, t: &DiskTrouble, known: bool) {
        let now = Instant::now();
        let action = match t.action {
            Action::Report => "report",
            Action::Ignore => "ignore",
            Action::Stop => "stop",
        };
        if t.action == Action::Stop {
            if known {
                return;
            }
        } else {
            let last = self.failed.entry((t.number, t.write)).or_insert(now);
            if *last != now && now.duration_since(*last) < SELDOM {
                return;
            }
            *last = now;
        }
        let device = command::device(t.number);
        let data = json!({
            "device": device,
            "node-name": device,
            "operation": if t.write { "write" } else { "read" },
            "action": action,
            "nospace": t.full,
            "reason": t.error,
        });
        self.tell("BLOCK_IO_ERROR", data);
    }

    /// `RESET`.
    pub fn reset(&self, cause: Cause) {
        self.tell("RESET", cause.data(true));
    }

    /// `SHUTDOWN`; what was said goes out before this comes back.
    pub fn shut_down(&self, cause: Cause) {
        if cause == Cause::GuestPanic {
            self.tell("GUEST_PANICKED", json!({ "action": "poweroff" }));
        }
        self.tell("SHUTDOWN", cause.data(false));
        if let Some(s) = &self.server {
            s.flush();
        }
    }
}
