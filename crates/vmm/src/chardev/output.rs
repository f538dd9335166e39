//! The way out: a bounded buffer and a thread that empties it.

use ringfort_bus::lock;
use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// Bytes held before the guest has to wait.
const CAPACITY: usize = 64 << 10;
/// How long [`Output::finish`] waits for a receiver that does not take what is left.
const PATIENCE: Duration = Duration::from_secs(2);

enum Target {
    Stream(Box<dyn Write + Send>),
    /// The client of a socket, when there is one.
    Client(Option<UnixStream>),
    Nothing,
}

struct State {
    buffer: VecDeque<u8>,
    /// The writer is about to wait for bytes.
    idle: bool,
    stop: bool,
    done: bool,
    client: Option<Option<UnixStream>>,
    when_writable: Option<Arc<dyn Fn() + Send + Sync>>,
    starved: bool,
}

/// A non-blocking sink of bytes.
pub struct Output {
    state: Mutex<State>,
    changed: Condvar,
    discard: bool,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Output {
    fn make(discard: bool) -> Arc<Output> {
        let state = State {
            buffer: VecDeque::new(),
            idle: false,
            stop: false,
            done: discard,
            client: None,
            when_writable: None,
            starved: false,
        };
        Arc::new(Output {
            state: Mutex::new(state),
            changed: Condvar::new(),
            discard,
            thread: Mutex::new(None),
        })
    }

    /// Everything is thrown away.
    pub fn discard() -> Arc<Output> {
        Self::make(true)
    }

    /// To a stream.
    ///
    /// # Errors
    /// When the host has no more threads.
    pub fn start(stream: Box<dyn Write + Send>) -> io::Result<Arc<Output>> {
        Self::spawn(Target::Stream(stream))
    }

    /// To whichever client a socket has; thrown away while there is none.
    ///
    /// # Errors
    /// When the host has no more threads.
    pub fn start_socket() -> io::Result<Arc<Output>> {
        Self::spawn(Target::Client(None))
    }

    fn spawn(target: Target) -> io::Result<Arc<Output>> {
        let out = Self::make(false);
        let run = out.clone();
        let thread =
            std::thread::Builder::new().name("serial-out".into()).spawn(move || run.serve(target))?;
        *lock(&out.thread) = Some(thread);
        Ok(out)
    }

    /// Take as many of `bytes` as there is room for; how many.
    pub fn write(&self, bytes: &[u8]) -> usize {
        if self.discard {
            return bytes.len();
        }
        let mut s = lock(&self.state);
        let n = bytes.len().min(CAPACITY.saturating_sub(s.buffer.len()));
        s.buffer.extend(&bytes[..n]);
        s.starved |= n < bytes.len();
        if s.idle && n > 0 {
            s.idle = false;
            self.changed.notify_all();
        }
        n
    }

    /// Whom to call when there is room again after a write that was cut short.
    pub fn when_writable(&self, call: Arc<dyn Fn() + Send + Sync>) {
        lock(&self.state).when_writable = Some(call);
    }

    /// Write to `client` from now on.
    pub(super) fn set_client(&self, client: Option<UnixStream>) {
        let mut s = lock(&self.state);
        s.client = Some(client);
        s.idle = false;
        self.changed.notify_all();
    }

    /// Write what is left, and end.
    pub fn finish(&self) {
        let mut s = lock(&self.state);
        s.stop = true;
        self.changed.notify_all();
        let waited = self.changed.wait_timeout_while(s, PATIENCE, |s| !s.done);
        s = waited.unwrap_or_else(PoisonError::into_inner).0;
        let done = s.done;
        drop(s);
        // A receiver that never takes the rest (a stopped terminal) must not keep the process: its thread is left behind.
        if done && let Some(t) = lock(&self.thread).take() {
            let _ = t.join();
        }
    }

    fn serve(&self, mut target: Target) {
        let mut s = lock(&self.state);
        loop {
            if let (Some(c), Target::Client(_)) = (s.client.take(), &target) {
                target = Target::Client(c);
            }
            if s.buffer.is_empty() {
                if s.stop {
                    break;
                }
                s.idle = true;
                s = self.changed.wait(s).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            s.idle = false;
            let bytes: Vec<u8> = s.buffer.drain(..).collect();
            let call = std::mem::take(&mut s.starved).then(|| s.when_writable.clone()).flatten();
            drop(s);
            if let Some(call) = call {
                call();
            }
            let written = match &mut target {
                Target::Stream(w) => w.write_all(&bytes).and_then(|()| w.flush()),
                Target::Client(Some(c)) => c.write_all(&bytes),
                Target::Client(None) | Target::Nothing => Ok(()),
            };
            if written.is_err() {
                // A client that left, a closed pipe, a full disk: the guest's serial port goes on without it.
                target = match target {
                    Target::Client(_) => Target::Client(None),
                    _ => Target::Nothing,
                };
            }
            s = lock(&self.state);
        }
        s.done = true;
        drop(s);
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, Sender, channel};

    struct Gate(Receiver<()>, Sender<Vec<u8>>);
    impl Write for Gate {
        fn write(&mut self, b: &[u8]) -> io::Result<usize> {
            let _ = self.0.recv();
            let _ = self.1.send(b.to_vec());
            Ok(b.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_slow_receiver_loses_nothing_and_blocks_nobody() {
        let (open, gate) = channel();
        let (tx, rx) = channel();
        let out = Output::start(Box::new(Gate(gate, tx))).unwrap();
        let (room, has_room) = channel();
        out.when_writable(Arc::new(move || room.send(()).unwrap()));
        let data: Vec<u8> = (0..200_000u32).map(|n| n as u8).collect();
        let mut sent = 0;
        let mut got = Vec::new();
        while sent < data.len() {
            let n = out.write(&data[sent..]);
            sent += n;
            if sent < data.len() {
                open.send(()).unwrap();
                has_room.recv_timeout(Duration::from_secs(20)).unwrap();
            }
        }
        drop(open);
        out.finish();
        while let Ok(b) = rx.try_recv() {
            got.extend(b);
        }
        assert!(got == data);
    }
}
