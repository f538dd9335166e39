//! The way in: a thread that reads and hands over.

use super::{Escape, Output};
use ringfort_bus::lock;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The guest's side.
pub trait Input: Send + Sync {
    /// Take as many of `bytes` as there is room for; how many. After fewer than all, the unblocker is called when there is room.
    fn receive(&self, bytes: &[u8]) -> usize;
}

/// Where bytes come from.
pub enum Source {
    /// Standard input, with an escape key.
    Terminal(Box<Escape>),
    /// A file descriptor.
    File(File),
    /// One client at a time.
    Listener(UnixListener),
}

/// A gate that opens when the guest's side has room, or when the reader is to end.
#[derive(Default)]
struct Gate {
    state: Mutex<(bool, bool)>,
    changed: Condvar,
}

impl Gate {
    fn open(&self) {
        lock(&self.state).0 = true;
        self.changed.notify_all();
    }
    fn stop(&self) {
        lock(&self.state).1 = true;
        self.changed.notify_all();
    }
    /// Wait for room; false to end.
    fn wait(&self) -> bool {
        let s = lock(&self.state);
        let mut s = self.changed.wait_while(s, |s| !s.0 && !s.1).unwrap_or_else(PoisonError::into_inner);
        s.0 = false;
        !s.1
    }
}

/// The reading thread.
pub struct Reader {
    gate: Arc<Gate>,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Reader {
    /// Start it.
    ///
    /// # Errors
    /// When the host has no more threads or descriptors.
    pub fn start(source: Source, input: Arc<dyn Input>, output: Arc<Output>) -> io::Result<Reader> {
        let stop = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let gate = Arc::new(Gate::default());
        let run = Run { input, output, gate: gate.clone(), stop: stop.clone() };
        let thread = std::thread::Builder::new().name("serial-in".into()).spawn(move || run.serve(source))?;
        Ok(Reader { gate, stop, thread: Some(thread) })
    }

    /// Call it when the guest's side has room.
    pub fn unblocker(&self) -> Arc<dyn Fn() + Send + Sync> {
        let gate = self.gate.clone();
        Arc::new(move || gate.open())
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.gate.stop();
        // Fails only if it is signalled already.
        let _ = self.stop.write(1);
        if let Some(t) = self.thread.take() {
            // Never joined from itself: an escape command only posts a request.
            let _ = t.join();
        }
    }
}

struct Run {
    input: Arc<dyn Input>,
    output: Arc<Output>,
    gate: Arc<Gate>,
    stop: Arc<EventFd>,
}

impl Run {
    fn serve(&self, source: Source) {
        match source {
            Source::Terminal(mut escape) => {
                // Not through `Stdin`, whose buffer would hold bytes that waiting for the descriptor does not see.
                let Ok(stdin) = io::stdin().as_fd().try_clone_to_owned() else { return };
                let mut stdin = File::from(stdin);
                self.pump(stdin.as_raw_fd(), &mut stdin, |b| escape.filter(b));
            }
            Source::File(mut f) => self.pump(f.as_raw_fd(), &mut f, <[u8]>::to_vec),
            Source::Listener(listener) => {
                while self.ready(listener.as_raw_fd()) {
                    let Ok((client, _)) = listener.accept() else { continue };
                    let Ok(mut reading) = client.try_clone() else { continue };
                    self.output.set_client(Some(client));
                    self.pump(reading.as_raw_fd(), &mut reading, <[u8]>::to_vec);
                    self.output.set_client(None);
                    // Shutting down a client that is gone changes nothing.
                    let _ = UnixStream::shutdown(&reading, std::net::Shutdown::Both);
                }
            }
        }
    }

    /// Wait until `fd` can be read; false to end. What cannot be polled (a plain file) always can.
    fn ready(&self, fd: RawFd) -> bool {
        let Ok(epoll) = Epoll::new() else { return false };
        let stop = EpollEvent::new(EventSet::IN, 0);
        if epoll.ctl(ControlOperation::Add, self.stop.as_raw_fd(), stop).is_err() {
            return false;
        }
        if epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 1)).is_err() {
            return true;
        }
        let mut events = [EpollEvent::default(); 2];
        loop {
            match epoll.wait(-1, &mut events) {
                Ok(n) => return events[..n].iter().all(|e| e.data() == 1),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
    }

    /// Read until the end of the source, or of the machine.
    fn pump(&self, fd: RawFd, from: &mut dyn Read, mut filter: impl FnMut(&[u8]) -> Vec<u8>) {
        let mut buf = [0; 4096];
        while self.ready(fd) {
            let n = match from.read(&mut buf) {
                Ok(0) => return,
                Ok(n) => n,
                Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {
                    continue;
                }
                Err(_) => return,
            };
            let bytes = filter(&buf[..n]);
            let mut sent = 0;
            while sent < bytes.len() {
                sent += self.input.receive(&bytes[sent..]);
                if sent < bytes.len() && !self.gate.wait() {
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chardev::Chardev;
    use crate::config::Serial;
    use std::io::Write;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    struct Slow(Mutex<Vec<u8>>, std::sync::mpsc::Sender<()>);
    impl Input for Slow {
        fn receive(&self, bytes: &[u8]) -> usize {
            lock(&self.0).push(bytes[0]);
            let _ = self.1.send(());
            1
        }
    }

    #[test]
    fn a_socket_client_talks_to_a_guest_that_takes_one_byte_at_a_time() {
        let dir = std::env::temp_dir().join(format!("ringfort-chardev-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("serial.sock");
        let mut dev = Chardev::open(&Serial::Unix(path.clone()), Box::new(|_| {})).unwrap();
        let (tx, rx) = channel();
        let guest = Arc::new(Slow(Mutex::default(), tx));
        dev.connect(guest.clone()).unwrap();
        let unblock = dev.unblock();
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(b"hello").unwrap();
        for _ in 0..5 {
            rx.recv_timeout(Duration::from_secs(20)).unwrap();
            unblock();
        }
        assert_eq!(*lock(&guest.0), b"hello");
        assert_eq!(dev.output().write(b"world"), 5);
        let mut back = [0; 5];
        client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        client.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"world");
        assert!(Chardev::open(&Serial::Unix(path.clone()), Box::new(|_| {})).is_err());
        drop(dev);
        assert!(!path.exists());
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
