//! A main loop over epoll: file descriptors, timers, and work posted by other threads.
//!
//! Callbacks run on the thread that runs the loop and get the loop itself, so they may add and remove sources,
//! themselves included. Readiness is level-triggered: a callback that leaves data unread is called again.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, VecDeque},
    io,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use vmm_sys_util::eventfd::EventFd;

/// Events taken from the kernel at a time.
const BATCH: usize = 64;
/// The token of the eventfd by which other threads wake the loop.
const WAKE: u64 = 0;

/// What a callback waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interest(u32);

impl Interest {
    /// Data to read, or a peer that hung up.
    pub const READ: Self = Self((libc::EPOLLIN | libc::EPOLLRDHUP) as u32);
    /// Room to write.
    pub const WRITE: Self = Self(libc::EPOLLOUT as u32);
    /// Either.
    pub const BOTH: Self = Self(Self::READ.0 | Self::WRITE.0);
    /// Nothing but errors and hang-ups, which are always reported.
    pub const NONE: Self = Self(0);
}

/// What happened on a file descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ready(u32);

impl Ready {
    /// Reading will not block: data, end of file, or an error to be told.
    #[must_use]
    pub fn readable(self) -> bool {
        self.0 & (libc::EPOLLIN | libc::EPOLLHUP | libc::EPOLLRDHUP | libc::EPOLLERR) as u32 != 0
    }
    /// Writing will not block.
    #[must_use]
    pub fn writable(self) -> bool {
        self.0 & (libc::EPOLLOUT | libc::EPOLLERR) as u32 != 0
    }
    /// The other side has gone.
    #[must_use]
    pub fn hung_up(self) -> bool {
        self.0 & (libc::EPOLLHUP | libc::EPOLLRDHUP) as u32 != 0
    }
    /// The descriptor is in error.
    #[must_use]
    pub fn error(self) -> bool {
        self.0 & libc::EPOLLERR as u32 != 0
    }
}

/// Names a registered file descriptor. Never used twice in one loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Token(u64);

/// Names a timer. Never used twice in one loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TimerId(u64);

type FdCallback<'a> = Box<dyn FnMut(&mut EventLoop<'a>, Ready) + 'a>;
type TimerCallback<'a> = Box<dyn FnOnce(&mut EventLoop<'a>) + 'a>;
type Posted = Box<dyn FnOnce() + Send>;

struct Source<'a> {
    fd: RawFd,
    /// Taken out while it runs.
    callback: Option<FdCallback<'a>>,
}

struct Shared {
    wake: EventFd,
    stop: AtomicBool,
    posted: Mutex<VecDeque<Posted>>,
}

/// How other threads reach a loop. Cheap to clone.
#[derive(Clone)]
pub struct Handle(Arc<Shared>);

impl Handle {
    /// Have the loop run `work` on its own thread, soon and in the order of posting.
    pub fn post(&self, work: impl FnOnce() + Send + 'static) {
        self.0.posted.lock().unwrap_or_else(PoisonError::into_inner).push_back(Box::new(work));
        self.wake();
    }

    /// Have [`EventLoop::run`] return when the callback at work is done.
    pub fn stop(&self) {
        self.0.stop.store(true, Ordering::Release);
        self.wake();
    }

    /// Have the loop go round once.
    pub fn wake(&self) {
        // Fails only when the counter is full, and then the loop wakes anyway.
        let _ = self.0.wake.write(1);
    }
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("event_loop::Handle")
    }
}

/// The loop. `'a` bounds what its callbacks may borrow.
pub struct EventLoop<'a> {
    epoll: OwnedFd,
    shared: Arc<Shared>,
    sources: HashMap<u64, Source<'a>>,
    timers: HashMap<TimerId, TimerCallback<'a>>,
    /// Deadlines, with those of cancelled timers among them: they are passed over when they come up.
    deadlines: BinaryHeap<Reverse<(Instant, TimerId)>>,
    next: u64,
}

impl std::fmt::Debug for EventLoop<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventLoop")
            .field("sources", &self.sources.len())
            .field("timers", &self.timers.len())
            .finish_non_exhaustive()
    }
}

impl<'a> EventLoop<'a> {
    /// An empty loop.
    ///
    /// # Errors
    /// When the process is out of file descriptors.
    pub fn new() -> io::Result<Self> {
        // SAFETY: epoll_create1 takes no pointers.
        let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        let epoll = unsafe { OwnedFd::from_raw_fd(fd) };
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let shared = Arc::new(Shared { wake, stop: AtomicBool::new(false), posted: Mutex::default() });
        let this = Self {
            epoll,
            shared,
            sources: HashMap::new(),
            timers: HashMap::new(),
            deadlines: BinaryHeap::new(),
            next: WAKE + 1,
        };
        this.control(libc::EPOLL_CTL_ADD, this.shared.wake.as_raw_fd(), Interest::READ, WAKE)?;
        Ok(this)
    }

    /// How other threads reach this loop.
    #[must_use]
    pub fn handle(&self) -> Handle {
        Handle(self.shared.clone())
    }

    /// Call `callback` whenever `fd` is ready. The descriptor must stay open until [`EventLoop::remove`]; one that is
    /// closed earlier is simply never ready again.
    ///
    /// # Errors
    /// When epoll does not take the descriptor: it is registered already, or it is a regular file (`EPERM`).
    pub fn add(
        &mut self,
        fd: &impl AsFd,
        interest: Interest,
        callback: impl FnMut(&mut EventLoop<'a>, Ready) + 'a,
    ) -> io::Result<Token> {
        let fd = fd.as_fd().as_raw_fd();
        let token = self.fresh();
        self.control(libc::EPOLL_CTL_ADD, fd, interest, token)?;
        self.sources.insert(token, Source { fd, callback: Some(Box::new(callback)) });
        Ok(Token(token))
    }

    /// Wait for something else on a registered descriptor.
    ///
    /// # Errors
    /// When the token is not registered, or its descriptor was closed.
    pub fn modify(&mut self, token: Token, interest: Interest) -> io::Result<()> {
        let fd = self.sources.get(&token.0).map(|s| s.fd).ok_or(io::ErrorKind::NotFound)?;
        self.control(libc::EPOLL_CTL_MOD, fd, interest, token.0)
    }

    /// Forget a descriptor; its callback is dropped and not called again. A token that is gone is no error.
    pub fn remove(&mut self, token: Token) {
        if let Some(source) = self.sources.remove(&token.0) {
            // A descriptor closed in the meantime has left epoll by itself.
            let _ = self.control(libc::EPOLL_CTL_DEL, source.fd, Interest::NONE, token.0);
        }
    }

    /// Call `callback` once, at `deadline` or as soon after as possible; never before.
    pub fn at(&mut self, deadline: Instant, callback: impl FnOnce(&mut EventLoop<'a>) + 'a) -> TimerId {
        let id = TimerId(self.fresh());
        self.timers.insert(id, Box::new(callback));
        self.deadlines.push(Reverse((deadline, id)));
        // Re-arming a far timer over and over leaves dead entries behind; they may not pile up without bound.
        if self.deadlines.len() > 64 + 2 * self.timers.len() {
            let timers = &self.timers;
            self.deadlines.retain(|Reverse((_, id))| timers.contains_key(id));
        }
        id
    }

    /// Call `callback` once, `delay` from now.
    pub fn after(&mut self, delay: Duration, callback: impl FnOnce(&mut EventLoop<'a>) + 'a) -> TimerId {
        let now = Instant::now();
        // Beyond what an Instant can hold is never; a century does for that.
        let deadline = now.checked_add(delay).unwrap_or(now + Duration::from_secs(100 * 365 * 86_400));
        self.at(deadline, callback)
    }

    /// Whether the timer was still to come; it will not now.
    pub fn cancel(&mut self, timer: TimerId) -> bool {
        self.timers.remove(&timer).is_some()
    }

    /// Go round until [`Handle::stop`] or [`EventLoop::stop`].
    ///
    /// # Errors
    /// When epoll fails, which it does not while the loop's descriptors are open.
    pub fn run(&mut self) -> io::Result<()> {
        while !self.shared.stop.swap(false, Ordering::AcqRel) {
            self.turn(None)?;
        }
        Ok(())
    }

    /// Have [`EventLoop::run`] return when the callback at work is done.
    pub fn stop(&mut self) {
        self.handle().stop();
    }

    /// Wait for events for at most `limit` (without end if none), run what is due, return.
    ///
    /// # Errors
    /// As [`EventLoop::run`].
    pub fn turn(&mut self, limit: Option<Duration>) -> io::Result<()> {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; BATCH];
        let timeout = self.timeout_ms(limit);
        // SAFETY: `events` is valid for BATCH entries for the length of the call.
        let n = unsafe {
            libc::epoll_wait(self.epoll.as_raw_fd(), events.as_mut_ptr(), BATCH as libc::c_int, timeout)
        };
        if n < 0 {
            let e = io::Error::last_os_error();
            return if e.kind() == io::ErrorKind::Interrupted { Ok(()) } else { Err(e) };
        }
        for event in &events[..n as usize] {
            let (token, ready) = (event.u64, Ready(event.events));
            if token == WAKE {
                let _ = self.shared.wake.read();
            } else if let Some(mut callback) = self.sources.get_mut(&token).and_then(|s| s.callback.take()) {
                callback(self, ready);
                if let Some(source) = self.sources.get_mut(&token) {
                    source.callback = Some(callback);
                }
            }
            if self.shared.stop.load(Ordering::Acquire) {
                return Ok(());
            }
        }
        self.run_posted();
        self.run_timers();
        Ok(())
    }

    fn run_posted(&mut self) {
        // Work that posts more work waits for the next turn, so that it cannot starve the rest.
        let work = std::mem::take(&mut *self.shared.posted.lock().unwrap_or_else(PoisonError::into_inner));
        for item in work {
            item();
        }
    }

    fn run_timers(&mut self) {
        let now = Instant::now();
        while let Some(Reverse((deadline, id))) = self.deadlines.peek().copied() {
            if deadline > now || self.shared.stop.load(Ordering::Acquire) {
                break;
            }
            self.deadlines.pop();
            if let Some(callback) = self.timers.remove(&id) {
                callback(self);
            }
        }
    }

    /// Milliseconds for epoll_wait: up to the next deadline, rounded up so that a timer does not spin, or -1.
    fn timeout_ms(&mut self, limit: Option<Duration>) -> libc::c_int {
        while let Some(Reverse((_, id))) = self.deadlines.peek() {
            if self.timers.contains_key(id) {
                break;
            }
            self.deadlines.pop();
        }
        let now = Instant::now();
        let due = self.deadlines.peek().map(|Reverse((at, _))| at.saturating_duration_since(now));
        match (due, limit) {
            (None, None) => -1,
            (a, b) => {
                let wait = a.into_iter().chain(b).min().unwrap_or_default();
                libc::c_int::try_from(wait.as_nanos().div_ceil(1_000_000)).unwrap_or(libc::c_int::MAX)
            }
        }
    }

    fn fresh(&mut self) -> u64 {
        let n = self.next;
        self.next += 1;
        n
    }

    fn control(&self, operation: libc::c_int, fd: RawFd, interest: Interest, token: u64) -> io::Result<()> {
        let mut event = libc::epoll_event { events: interest.0, u64: token };
        // SAFETY: `event` is valid for the length of the call.
        let r = unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), operation, fd, &raw mut event) };
        if r == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        cell::{Cell, RefCell},
        io::{Read as _, Write as _},
        os::unix::net::UnixStream,
    };

    #[test]
    fn reads_when_ready_and_stops() {
        let (mut a, mut b) = UnixStream::pair().expect("pair");
        let got = RefCell::new(Vec::new());
        let mut l = EventLoop::new().expect("loop");
        let reader = b.try_clone().expect("clone");
        l.add(&reader, Interest::READ, |l, ready| {
            let mut buf = [0; 16];
            let n = b.read(&mut buf).expect("read");
            if n == 0 {
                assert!(ready.hung_up());
                l.stop();
            }
            got.borrow_mut().extend_from_slice(&buf[..n]);
        })
        .expect("add");
        a.write_all(b"hello").expect("write");
        drop(a);
        l.run().expect("run");
        drop(l);
        assert_eq!(got.into_inner(), b"hello");
    }

    #[test]
    fn a_callback_may_remove_itself_and_add_others() {
        let (mut a, b) = UnixStream::pair().expect("pair");
        a.write_all(b"x").expect("write");
        let token = Cell::new(None);
        let calls = Cell::new(0);
        let second = b.try_clone().expect("clone");
        let mut l = EventLoop::new().expect("loop");
        let t = l
            .add(&b, Interest::READ, |l, _| {
                calls.set(calls.get() + 1);
                l.remove(Token::clone(&token.get().expect("token")));
                l.add(&second, Interest::READ, |l, _| {
                    calls.set(calls.get() + 10);
                    l.stop();
                })
                .expect("add");
            })
            .expect("add");
        token.set(Some(t));
        l.run().expect("run");
        drop(l);
        assert_eq!(calls.get(), 11, "the data was left unread, yet the removed callback ran once only");
    }

    #[test]
    fn interest_can_change() {
        let (a, _b) = UnixStream::pair().expect("pair");
        let hits = Cell::new(0);
        let mut l = EventLoop::new().expect("loop");
        let t = l.add(&a, Interest::NONE, |_, ready| {
            assert!(ready.writable());
            hits.set(hits.get() + 1);
        });
        let t = t.expect("add");
        l.turn(Some(Duration::ZERO)).expect("turn");
        assert_eq!(hits.get(), 0);
        l.modify(t, Interest::WRITE).expect("modify");
        l.turn(Some(Duration::ZERO)).expect("turn");
        assert_eq!(hits.get(), 1);
        l.remove(t);
        assert!(l.modify(t, Interest::WRITE).is_err());
        l.turn(Some(Duration::ZERO)).expect("turn");
        assert_eq!(hits.get(), 1);
    }

    #[test]
    fn timers_come_in_order_never_early_and_can_be_cancelled() {
        let order = RefCell::new(Vec::new());
        let start = Instant::now();
        let mut l = EventLoop::new().expect("loop");
        l.after(Duration::from_millis(20), |l| {
            assert!(start.elapsed() >= Duration::from_millis(20));
            order.borrow_mut().push(2);
            l.after(Duration::ZERO, |l| {
                order.borrow_mut().push(3);
                l.stop();
            });
        });
        l.after(Duration::from_millis(5), |_| order.borrow_mut().push(1));
        let dead = l.after(Duration::from_millis(1), |_| order.borrow_mut().push(99));
        l.after(Duration::MAX, |_| order.borrow_mut().push(98));
        assert!(l.cancel(dead));
        assert!(!l.cancel(dead));
        l.run().expect("run");
        drop(l);
        assert_eq!(order.into_inner(), [1, 2, 3]);
    }

    #[test]
    fn cancelled_timers_do_not_pile_up() {
        let mut l = EventLoop::new().expect("loop");
        for _ in 0..10_000 {
            let t = l.after(Duration::from_secs(3600), |_| {});
            l.cancel(t);
        }
        assert!(l.deadlines.len() <= 66, "{}", l.deadlines.len());
    }

    #[test]
    fn other_threads_post_and_stop() {
        let mut l = EventLoop::new().expect("loop");
        let handle = l.handle();
        let (tx, rx) = std::sync::mpsc::channel();
        let loop_thread = std::thread::current().id();
        let thread = std::thread::spawn(move || {
            for n in 0..1000 {
                let tx = tx.clone();
                handle.post(move || {
                    assert_eq!(std::thread::current().id(), loop_thread);
                    tx.send(n).expect("send");
                });
            }
            let h = handle.clone();
            handle.post(move || h.stop());
        });
        l.run().expect("run");
        thread.join().expect("thread");
        assert_eq!(rx.try_iter().collect::<Vec<_>>(), (0..1000).collect::<Vec<_>>());
    }

    #[test]
    fn a_regular_file_is_refused() {
        let mut l = EventLoop::new().expect("loop");
        let file = std::fs::File::open("/proc/self/exe").expect("file");
        let e = l.add(&file, Interest::READ, |_, _| {}).expect_err("refused");
        assert_eq!(e.raw_os_error(), Some(libc::EPERM));
    }
}
