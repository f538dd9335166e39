//! Queues at work, and the threads that serve them.

use crate::device::Serve;
use crate::queue::QueueProgress;
use crate::{Interrupt, Queue, QueueError, Quick, Served, VirtioDevice, status};
use ringfort_bus::lock;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::thread::JoinHandle;
use vmm_sys_util::eventfd::EventFd;

/// How often a vCPU looks again for work that came while it was working, before the I/O thread takes over.
const QUICK_ROUNDS: u32 = 4;

/// Where remarks about a guest's doings go.
pub type Log = Box<dyn Fn(&str) + Send + Sync>;

/// Why a device needs a reset, in words.
#[derive(Default)]
pub struct Fault {
    text: Mutex<Option<String>>,
    log: OnceLock<Log>,
}

impl Fault {
    pub fn set_log(&self, log: Log) {
        let _ = self.log.set(log);
    }

    pub fn note(&self, text: String) {
        if let Some(log) = self.log.get() {
            log(&text);
        }
        *lock(&self.text) = Some(text);
    }

    pub fn clear(&self) {
        *lock(&self.text) = None;
    }

    pub fn text(&self) -> Option<String> {
        lock(&self.text).clone()
    }
}

/// One queue, its device, and what it takes to tell the driver.
pub struct ActiveQueue {
    queue: Mutex<Queue>,
    device: Arc<dyn VirtioDevice>,
    status: Arc<AtomicU8>,
    interrupt: Arc<dyn Interrupt>,
    kick: Arc<EventFd>,
    fault: Arc<Fault>,
    /// Rung while somebody else serves the queue, who alone may touch it then.
    outside: RwLock<Option<Arc<EventFd>>>,
}

impl ActiveQueue {
    pub fn new(
        queue: Queue,
        device: Arc<dyn VirtioDevice>,
        status: Arc<AtomicU8>,
        interrupt: Arc<dyn Interrupt>,
        kick: Arc<EventFd>,
        fault: Arc<Fault>,
    ) -> ActiveQueue {
        let outside = RwLock::default();
        ActiveQueue { queue: Mutex::new(queue), device, status, interrupt, kick, fault, outside }
    }

    /// One queue that is broken stops them all: the driver has to reset the device.
    fn is_broken(&self) -> bool {
        self.status.load(Ordering::SeqCst) & status::NEEDS_RESET != 0
    }

    fn fail(&self, queue: u16, e: QueueError) {
        self.status.fetch_or(status::NEEDS_RESET, Ordering::SeqCst);
        self.fault.note(format!("{}: queue {queue}: {e}", self.device.kind()));
        self.interrupt.config();
    }

    fn outside(&self) -> Option<Arc<EventFd>> {
        self.outside.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Somebody else serves the queue from now on, and looks at it when `kick` is written. Gives the next entry of the available ring.
    pub fn hand_over(&self, kick: Arc<EventFd>) -> u16 {
        let queue = lock(&self.queue);
        *self.outside.write().unwrap_or_else(PoisonError::into_inner) = Some(kick);
        queue.progress().next_avail
    }

    /// The queue is this process's again, after others have got as far as `next_avail` if they did anything.
    pub fn take_back(&self, next_avail: Option<u16>) {
        let mut queue = lock(&self.queue);
        if let Some(n) = next_avail {
            queue.resume_at(n);
        }
        *self.outside.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Serve the queue, on its I/O thread.
    fn serve(&self) {
        self.serve_queue(&mut lock(&self.queue));
    }

    fn serve_queue(&self, queue: &mut Queue) {
        if let Some(kick) = self.outside() {
            // The engine's doorbell rings this process's thread: it is for whoever has the queue.
            let _ = kick.write(1);
            return;
        }
        // Also while paused or broken: what is finished may be what others wait for.
        self.device.collect(queue, self.is_broken());
        // Also without new chains: the device may have been kicked for something that it holds.
        while !self.is_broken() && queue.is_open() {
            queue.disable_notifications();
            match self.device.service(queue) {
                Err(e) => return self.fail(queue.index(), e),
                Ok(Served::Waiting) => return,
                Ok(Served::Drained) => {
                    if !queue.enable_notifications() {
                        return;
                    }
                }
            }
        }
    }

    /// The doorbell, on a vCPU.
    pub fn ring(&self) {
        if let Some(kick) = self.outside() {
            // Fails only when 2^64 kicks are outstanding; one is as good.
            let _ = kick.write(1);
            return;
        }
        // Whoever has the queue looks again before it leaves, but perhaps did so already: hence the kick.
        if self.device.has_quick()
            && let Ok(mut queue) = self.queue.try_lock()
            && self.outside().is_none()
        {
            for _ in 0..QUICK_ROUNDS {
                if self.is_broken() {
                    return;
                }
                match self.device.quick(&mut queue) {
                    Err(e) => return self.fail(queue.index(), e),
                    Ok(Quick::Later) => break,
                    Ok(Quick::Done) => {
                        if !queue.enable_notifications() {
                            return;
                        }
                    }
                }
            }
        }
        let _ = self.kick.write(1);
    }

    /// Return when nobody is at the queue and nothing of it is under way. The gate is closed, so nothing begins.
    pub fn wait_idle(&self) {
        let mut queue = lock(&self.queue);
        self.device.drain(&mut queue, self.is_broken());
    }

    pub fn progress(&self) -> QueueProgress {
        lock(&self.queue).progress()
    }
}

impl Serve for ActiveQueue {
    fn try_serve(&self) -> bool {
        let Ok(mut queue) = self.queue.try_lock() else { return false };
        self.serve_queue(&mut queue);
        true
    }
}

/// An I/O thread; ends, after the request under way, when dropped.
pub struct Worker {
    stop: Arc<AtomicBool>,
    kick: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Serve `queues` whenever `kick` is written.
    pub fn start(name: &str, kick: Arc<EventFd>, queues: Vec<Arc<ActiveQueue>>) -> io::Result<Worker> {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, bell) = (stop.clone(), kick.clone());
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || {
            // An error other than an interruption cannot happen to an open descriptor; it ends the thread.
            loop {
                match bell.read() {
                    Ok(_) => {}
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                    Err(_) => return,
                }
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                queues.iter().for_each(|q| q.serve());
            }
        })?;
        Ok(Worker { stop, kick, thread: Some(thread) })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = self.kick.write(1);
        if let Some(t) = self.thread.take() {
            // A panic of the device was reported by the thread itself.
            let _ = t.join();
        }
    }
}
