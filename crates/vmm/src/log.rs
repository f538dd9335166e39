//! Remarks about what a guest does: to standard error, at a bounded rate, so that a guest cannot flood the host.

use ringfort_bus::lock;
use std::io::Write as _;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Longest line made of bytes.
const LINE: usize = 512;
/// Lines let through in a [`WINDOW`].
const BURST: u32 = 20;
/// Length of the window.
const WINDOW: Duration = Duration::from_secs(10);

/// A bounded log.
pub struct GuestLog {
    /// The machine's name.
    name: String,
    said: Mutex<(Instant, u32)>,
    /// A line that bytes have begun.
    begun: Mutex<Vec<u8>>,
}

impl GuestLog {
    /// Nothing said yet, by the machine of this name.
    pub fn new(name: &str) -> GuestLog {
        GuestLog { name: name.into(), said: Mutex::new((Instant::now(), 0)), begun: Mutex::default() }
    }

    /// Say `line`, unless too much was said of late.
    pub fn line(&self, line: &str) {
        let mut s = lock(&self.said);
        if s.0.elapsed() > WINDOW {
            *s = (Instant::now(), 0);
        }
        s.1 += 1;
        if s.1 <= BURST {
            // The terminal may be in raw mode.
            let clean: String = line.chars().filter(|c| !c.is_control()).collect();
            // Standard error may be closed; then nobody wants to know.
            let _ = write!(std::io::stderr().lock(), "ringfort: {}: {clean}\r\n", self.name);
        }
    }
}

impl GuestLog {
    /// Say what comes as bytes (firmware's debug port), line by line.
    pub fn bytes(&self, bytes: &[u8]) {
        for &b in bytes {
            let mut begun = lock(&self.begun);
            if b != b'\n' {
                begun.push(b);
            }
            if b == b'\n' || begun.len() >= LINE {
                let line = std::mem::take(&mut *begun);
                drop(begun);
                self.line(&String::from_utf8_lossy(&line));
            }
        }
    }
}
