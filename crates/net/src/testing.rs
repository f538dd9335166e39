//! What tests of back ends need: network namespaces of their own, and a device that waits for events.

use crate::{NetBackend, NetEvents, VnetHeader};
use ringfort_bus::lock;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// How long a test waits for what must come.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Move this thread, and those that it starts, to a new network namespace. `false`, with the reason on standard error, where
/// that is not allowed.
pub fn new_namespace() -> bool {
    // SAFETY: no pointers; it concerns this thread only.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        eprintln!("skipped: no network namespace can be made here: {}", std::io::Error::last_os_error());
        return false;
    }
    if let Err(e) = std::fs::File::open("/dev/net/tun") {
        eprintln!("skipped: /dev/net/tun: {e}");
        return false;
    }
    true
}

/// A device's side of a back end.
#[derive(Default)]
pub struct Ear {
    state: Mutex<Heard>,
    changed: Condvar,
}

/// What was told.
#[derive(Default, Clone)]
pub struct Heard {
    readable: u64,
    pub writable: u64,
    pub link: Option<bool>,
}

impl NetEvents for Ear {
    fn readable(&self, _pair: u16) {
        lock(&self.state).readable += 1;
        self.changed.notify_all();
    }
    fn writable(&self, _pair: u16) {
        lock(&self.state).writable += 1;
        self.changed.notify_all();
    }
    fn link(&self, up: bool) {
        lock(&self.state).link = Some(up);
        self.changed.notify_all();
    }
}

impl Ear {
    /// Listen to a back end.
    pub fn at(backend: &dyn NetBackend) -> Arc<Ear> {
        let ear = Arc::new(Ear::default());
        backend.attach(ear.clone());
        ear
    }

    /// Return once `done` holds of what was told.
    pub fn wait(&self, what: &str, mut done: impl FnMut(&Heard) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        let mut s = lock(&self.state);
        while !done(&s) {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "waiting for {what}");
            s = self.changed.wait_timeout(s, left).map_or_else(|e| e.into_inner().0, |x| x.0);
        }
    }

    /// The next frame of a pair that `wanted` accepts.
    pub fn frame(
        &self,
        backend: &dyn NetBackend,
        pair: u16,
        wanted: impl Fn(&[u8]) -> bool,
    ) -> (VnetHeader, Vec<u8>) {
        let mut seen = 0;
        let mut frame = Vec::new();
        loop {
            while let Some(h) = backend.receive(pair, &mut frame) {
                if wanted(&frame) {
                    return (h, frame);
                }
            }
            self.wait("a frame", |h| h.readable > seen);
            seen = lock(&self.state).readable;
        }
    }
}

/// A frame with this content behind the addresses and an Ethernet type for experiments (RFC 5342: 0x88b5).
pub fn frame(to: [u8; 6], from: [u8; 6], content: &[u8]) -> Vec<u8> {
    [&to[..], &from, &[0x88, 0xb5], content].concat()
}
