//! One user's requests.

use super::uring::Ring;
use super::{Aio, alarm, pool};
use crate::backend::Piece;
use crate::node::Throttle;
use crate::{BlockBackend, Located, SharedSlice, SharedSliceMut};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Pieces of one request that go through the ring; what is cut up more goes to a thread.
const MAX_PIECES: usize = 16;
/// Pieces in the ring at a time: no more than its completion queue holds.
const MAX_IN_RING: usize = 384;
/// Most buffers of one piece (IOV_MAX).
const MAX_BUFFERS: usize = 1024;

/// A range to discard or to make zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// For zeroes: the space may be given back.
    pub unmap: bool,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Fill the payload's targets.
    Read,
    /// Write the payload's sources.
    Write {
        /// Complete only when durable.
        through: bool,
    },
    /// Make what was completed durable.
    Flush,
    /// The content of ranges is no longer needed.
    Discard(Vec<Range>),
    /// Make ranges read as zeroes.
    Zeroes {
        /// Where.
        ranges: Vec<Range>,
        /// Complete only when durable.
        through: bool,
    },
}

/// A request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// What to do.
    pub op: Op,
    /// For reads and writes, the first byte on the disk.
    pub offset: u64,
    /// For reads and writes, the number of bytes; the payload's buffers have as many.
    pub len: u64,
}

impl Request {
    /// A request for something else than reading or writing.
    pub fn other(op: Op) -> Request {
        Request { op, offset: 0, len: 0 }
    }

    fn is_write(&self) -> bool {
        !matches!(self.op, Op::Read)
    }

    /// The bytes that limits of speed count; flushes pass.
    fn counted(&self) -> Option<u64> {
        match &self.op {
            Op::Read | Op::Write { .. } => Some(self.len),
            Op::Flush => None,
            Op::Discard(ranges) | Op::Zeroes { ranges, .. } => Some(ranges.iter().map(|r| r.len).sum()),
        }
    }
}

/// Whatever holds a request's buffers. The buffers must lie where they are for as long as the payload lives, however it
/// is moved.
pub trait Payload: Send + 'static {
    /// What a read fills.
    fn targets(&self) -> Vec<SharedSliceMut<'_>>;
    /// What a write takes.
    fn sources(&self) -> Vec<SharedSlice<'_>>;
}

/// A request that is done.
pub struct Done<P> {
    /// The request.
    pub request: Request,
    /// Its payload.
    pub payload: P,
    /// What became of it.
    pub result: io::Result<()>,
}

/// The event descriptor that tells a lane's user to look.
pub struct Wake(Arc<dyn AsRawFd + Send + Sync>);

impl Wake {
    pub fn wake(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: eight bytes from the stack to an open descriptor. It fails only when the count is at its end, which
        // wakes as well.
        unsafe { libc::write(self.0.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }
}

struct Job<P> {
    request: Request,
    payload: P,
}

/// What threads have done.
struct Returned<P> {
    done: Mutex<Vec<Done<P>>>,
    wake: Arc<Wake>,
}

/// A job in the ring.
struct InRing<P> {
    job: Job<P>,
    /// Buffers of all pieces, which the kernel reads while it works.
    _iovs: Vec<Vec<libc::iovec>>,
    found: Located,
    /// Pieces that are not complete, and bytes that are.
    left: usize,
    moved: u64,
    wanted: u64,
}

// SAFETY: the vectors of buffers name memory of the payload, which is `Send` and moves along.
unsafe impl<P: Send> Send for InRing<P> {}

/// Requests of one user under way.
///
/// Not dropped before all of them are complete: their memory is in use. Requests in the kernel hold parts of the image
/// until somebody looks at the lane, and requests with threads may wait for that: so each lane wants a thread that looks
/// at it whenever its event descriptor says so, and that waits for no other lane of the same disk.
pub struct Lane<P: Payload> {
    backend: Arc<dyn BlockBackend>,
    pace: Option<Arc<Throttle>>,
    ring: Option<Ring>,
    in_ring: HashMap<u64, InRing<P>>,
    pieces_in_ring: usize,
    next_tag: u64,
    with_threads: usize,
    returned: Arc<Returned<P>>,
    /// Held back by a limit of speed: reads, and all others.
    held: [VecDeque<Job<P>>; 2],
    alarm: [Option<Instant>; 2],
    done: VecDeque<Done<P>>,
    /// Whether requests may be done at once.
    inline: bool,
}

impl<P: Payload> Lane<P> {
    /// A lane to `backend`. The event descriptor `wake` is written whenever [`poll`](Self::poll) may have something.
    pub fn new(backend: Arc<dyn BlockBackend>, aio: Aio, wake: Arc<dyn AsRawFd + Send + Sync>) -> Lane<P> {
        let (pace, backend) = match backend.paced() {
            Some((limits, below)) => (Some(limits), below),
            None => (None, backend),
        };
        // A host may refuse one more ring (memory limits of old kernels): threads do as well.
        let ring = match aio {
            Aio::IoUring if super::io_uring_available() => Ring::new(wake.as_raw_fd()).ok(),
            _ => None,
        };
        let wake = Arc::new(Wake(wake));
        Lane {
            backend,
            pace,
            ring,
            in_ring: HashMap::new(),
            pieces_in_ring: 0,
            next_tag: 0,
            with_threads: 0,
            returned: Arc::new(Returned { done: Mutex::default(), wake }),
            held: [VecDeque::new(), VecDeque::new()],
            alarm: [None; 2],
            done: VecDeque::new(),
            inline: true,
        }
    }

    /// A lane for a user that does nothing else: with an event descriptor of its own, to be waited for by
    /// [`wait`](Self::wait).
    ///
    /// # Errors
    /// When the host gives no descriptor.
    pub fn of_its_own(backend: Arc<dyn BlockBackend>, aio: Aio) -> io::Result<Lane<P>> {
        // SAFETY: makes a descriptor or fails.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: fresh, and nobody else's.
        Ok(Lane::new(backend, aio, Arc::new(unsafe { OwnedFd::from_raw_fd(fd) })))
    }

    /// Whether requests may be done by the caller at once; on at first.
    pub fn set_inline(&mut self, inline: bool) {
        self.inline = inline;
    }

    /// Requests that were started and not given out by [`poll`](Self::poll).
    pub fn len(&self) -> usize {
        self.in_ring.len() + self.with_threads + self.held[0].len() + self.held[1].len() + self.done.len()
    }

    /// Whether no request is under way.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Begin a request. [`submit`](Self::submit) after the last of several.
    pub fn start(&mut self, request: Request, payload: P) {
        let job = Job { request, payload };
        match self.admit(&job.request, Instant::now()) {
            true => self.go(job),
            false => self.held[usize::from(job.request.is_write())].push_back(job),
        }
    }

    /// Do a request if that takes no waiting; otherwise give it back. Never while others are under way that could be
    /// waited for.
    ///
    /// # Errors
    /// The payload, to be given to [`start`](Self::start).
    pub fn try_now(&mut self, request: &Request, payload: P) -> Result<Done<P>, P> {
        if self.pace.is_some() {
            return Err(payload);
        }
        match self.at_once(request, &payload) {
            Some(result) => Ok(Done { request: request.clone(), payload, result }),
            None => Err(payload),
        }
    }

    /// Whether a request may go now, by the limits of speed.
    fn admit(&mut self, request: &Request, now: Instant) -> bool {
        let (Some(pace), Some(len)) = (&self.pace, request.counted()) else { return true };
        let side = usize::from(request.is_write());
        // In order: a small one does not overtake.
        if !self.held[side].is_empty() {
            return false;
        }
        match pace.admit(side == 1, len, now) {
            Ok(()) => true,
            Err(wait) => {
                self.set_alarm(side, now + wait);
                false
            }
        }
    }

    fn set_alarm(&mut self, side: usize, at: Instant) {
        self.alarm[side] = Some(at);
        alarm::set(at, self.returned.wake.clone());
    }

    /// Let go what was held back and may go now; `all` regardless of limits.
    fn release(&mut self, all: bool) {
        for side in 0..2 {
            if self.held[side].is_empty() {
                continue;
            }
            let now = Instant::now();
            if !all && self.alarm[side].is_some_and(|at| at > now) {
                continue;
            }
            self.alarm[side] = None;
            while let Some(job) = self.held[side].pop_front() {
                if !all
                    && let (Some(pace), Some(len)) = (&self.pace, job.request.counted())
                    && let Err(wait) = pace.admit(side == 1, len, now)
                {
                    self.held[side].push_front(job);
                    self.set_alarm(side, now + wait);
                    break;
                }
                self.go(job);
            }
        }
    }

    /// The result, if the request takes no waiting.
    fn at_once(&self, request: &Request, payload: &P) -> Option<io::Result<()>> {
        if !self.inline {
            return None;
        }
        match request.op {
            // Errors are found again, and told, by whoever does it in full.
            Op::Read => {
                let there = self.backend.try_read_at(&payload.targets(), request.offset);
                matches!(there, Ok(true)).then_some(Ok(()))
            }
            // Whoever waits inside a write for others to leave must not be the one who lets them go.
            Op::Write { through: false } if self.in_ring.is_empty() && self.backend.writes_are_cached() => {
                Some(perform(&*self.backend, request, payload))
            }
            Op::Flush if self.backend.flush_is_quick() => Some(perform(&*self.backend, request, payload)),
            _ => None,
        }
    }

    fn go(&mut self, job: Job<P>) {
        if let Some(result) = self.at_once(&job.request, &job.payload) {
            self.done.push_back(Done { request: job.request, payload: job.payload, result });
            return;
        }
        let Some(job) = self.give_to_ring(job) else { return };
        self.give_to_thread(job);
    }

    fn give_to_thread(&mut self, job: Job<P>) {
        self.with_threads += 1;
        let (backend, returned) = (self.backend.clone(), self.returned.clone());
        pool::spawn(move || {
            let Job { request, payload } = job;
            let result = perform(&*backend, &request, &payload);
            let mut list = returned.done.lock().unwrap_or_else(PoisonError::into_inner);
            list.push(Done { request, payload, result });
            // The first in the list tells; whoever takes the list takes all.
            if list.len() == 1 {
                returned.wake.wake();
            }
        });
    }

    /// Give a job to the ring; back if that cannot be.
    fn give_to_ring(&mut self, job: Job<P>) -> Option<Job<P>> {
        let write = match job.request.op {
            Op::Read => false,
            Op::Write { through: false } => true,
            _ => return Some(job),
        };
        if self.ring.is_none() || self.pieces_in_ring >= MAX_IN_RING || job.request.len == 0 {
            return Some(job);
        }
        let mut found = Located::default();
        // Errors are found again, and told, by the thread.
        let located = self.backend.locate(write, job.request.offset, job.request.len, &mut found);
        if !located.is_ok_and(|l| l) || found.pieces.len() > MAX_PIECES {
            return Some(job);
        }
        let Some(iovs) = cut(&job.payload, write, &found.pieces) else { return Some(job) };
        let Some(ring) = &mut self.ring else { return Some(job) };
        let tag = self.next_tag;
        self.next_tag = self.next_tag.wrapping_add(1);
        let mut entry = InRing { job, _iovs: Vec::new(), found, left: 0, moved: 0, wanted: 0 };
        let files = entry.found.pieces.iter().filter_map(|p| match *p {
            Piece::File { fd, offset, len, .. } => Some((fd, offset, len)),
            Piece::Zeroes { .. } => None,
        });
        let mut failed = false;
        for ((fd, offset, len), iov) in files.zip(&iovs) {
            entry.wanted += len;
            // SAFETY: the buffers' vectors are kept in the entry, the memory by its payload, the descriptor by the back
            // end and by what `found` holds; the entry stays in `in_ring` until all of its completions were seen.
            if failed || unsafe { ring.start(write, fd, iov, offset, tag) }.is_err() {
                failed = true;
            } else {
                entry.left += 1;
            }
        }
        entry._iovs = iovs;
        self.pieces_in_ring += entry.left;
        if entry.left == 0 {
            // Nothing but zeroes, which `cut` has written; or a ring that takes nothing.
            if failed {
                return Some(entry.job);
            }
            let Job { request, payload } = entry.job;
            self.done.push_back(Done { request, payload, result: Ok(()) });
            return None;
        }
        // A piece that the ring did not take counts as not moved: a thread does it all again.
        self.in_ring.insert(tag, entry);
        None
    }

    /// Tell the kernel of what was started.
    pub fn submit(&mut self) {
        if let Some(ring) = &mut self.ring
            && ring.submit().is_err()
        {
            // The kernel is short of something; it is told again at the next look, which this brings about.
            self.returned.wake.wake();
        }
    }

    /// The next request that is done.
    pub fn poll(&mut self) -> Option<Done<P>> {
        if self.done.is_empty() {
            self.reap();
        }
        self.done.pop_front()
    }

    fn reap(&mut self) {
        self.submit();
        self.reap_ring();
        if self.with_threads > 0 {
            let list =
                std::mem::take(&mut *self.returned.done.lock().unwrap_or_else(PoisonError::into_inner));
            self.with_threads -= list.len();
            self.done.extend(list);
        }
        self.release(false);
        self.submit();
    }

    fn reap_ring(&mut self) {
        while let Some((tag, result)) = self.ring.as_mut().and_then(Ring::next) {
            self.pieces_in_ring -= 1;
            let Some(entry) = self.in_ring.get_mut(&tag) else { continue };
            entry.left -= 1;
            entry.moved += u64::try_from(result).unwrap_or(0);
            if entry.left > 0 {
                continue;
            }
            let Some(entry) = self.in_ring.remove(&tag) else { continue };
            let whole = entry.moved == entry.wanted;
            let job = entry.job;
            // What was held must be let go before anybody waits.
            drop(entry.found);
            if whole {
                self.done.push_back(Done { request: job.request, payload: job.payload, result: Ok(()) });
            } else {
                self.give_to_thread(job);
            }
        }
    }

    /// Wait for what the kernel has, and only for that: afterwards this lane keeps nobody else waiting. Whoever ends
    /// several lanes of one disk does this to all of them first.
    pub fn quiesce(&mut self) {
        while !self.in_ring.is_empty() {
            self.submit();
            if self.ring.as_mut().is_none_or(|r| r.wait().is_err()) {
                self.wait_for_wake();
            }
            self.reap_ring();
        }
    }

    /// Wait until [`poll`](Self::poll) has something; returns at once when nothing is under way. Whoever waits for the
    /// event descriptor elsewhere does without this.
    pub fn wait(&mut self) {
        loop {
            if self.done.is_empty() {
                self.reap();
            }
            if !self.done.is_empty() || self.is_empty() {
                return;
            }
            // When nobody else has anything for us: the cheapest way to wait.
            let only_ring = self.with_threads == 0 && self.held.iter().all(VecDeque::is_empty);
            let waited = only_ring && self.ring.as_mut().is_some_and(|r| r.wait().is_ok());
            if !waited {
                self.wait_for_wake();
            }
        }
    }

    fn wait_for_wake(&self) {
        let fd = self.returned.wake.0.as_raw_fd();
        let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut count = [0u8; 8];
        let buffer = libc::iovec { iov_base: count.as_mut_ptr().cast(), iov_len: count.len() };
        // Bounded, so that a lost wake (its user read the descriptor elsewhere) costs a moment and no more. That may happen
        // between the two calls, so the second does not wait.
        // SAFETY: one structure on the stack; then eight bytes to the stack.
        unsafe {
            if libc::poll(&mut poll, 1, 50) == 1 {
                libc::preadv2(fd, &buffer, 1, -1, libc::RWF_NOWAIT);
            }
        }
    }

    /// Complete everything under way, limits of speed or not; `each` gets what is done.
    pub fn drain(&mut self, mut each: impl FnMut(Done<P>)) {
        self.release(true);
        self.quiesce();
        loop {
            self.wait();
            while let Some(done) = self.done.pop_front() {
                each(done);
            }
            if self.is_empty() {
                return;
            }
        }
    }
}

impl<P: Payload> Drop for Lane<P> {
    fn drop(&mut self) {
        self.held.iter_mut().for_each(VecDeque::clear);
        self.drain(drop);
    }
}

/// Do a request, however long it takes.
fn perform<P: Payload>(disk: &dyn BlockBackend, request: &Request, payload: &P) -> io::Result<()> {
    match &request.op {
        Op::Read => disk.read_at(&payload.targets(), request.offset),
        Op::Write { through } => {
            disk.write_at(&payload.sources(), request.offset)?;
            if *through { disk.flush() } else { Ok(()) }
        }
        Op::Flush => disk.flush(),
        Op::Discard(ranges) => ranges.iter().try_for_each(|r| disk.discard(r.offset, r.len)),
        Op::Zeroes { ranges, through } => {
            ranges.iter().try_for_each(|r| disk.write_zeroes(r.offset, r.len, r.unmap))?;
            if *through { disk.flush() } else { Ok(()) }
        }
    }
}

/// The payload's buffers, cut to the pieces that lie in files; those for zeroes are filled. `None` if a piece's buffers
/// are not aligned as its file wants, or are too many.
fn cut<P: Payload>(payload: &P, write: bool, pieces: &[Piece]) -> Option<Vec<Vec<libc::iovec>>> {
    let (mut out, mut skip) = (Vec::new(), 0);
    let (sources, targets) =
        if write { (payload.sources(), Vec::new()) } else { (Vec::new(), payload.targets()) };
    for piece in pieces {
        match *piece {
            Piece::Zeroes { len } => {
                crate::slice_of_mut(&targets, skip, len).iter().for_each(SharedSliceMut::zero);
                skip += len;
            }
            Piece::File { offset, len, align, .. } => {
                let iov: Vec<libc::iovec> = if write {
                    crate::slice_of(&sources, skip, len).iter().map(|b| iovec(b.addr(), b.len())).collect()
                } else {
                    crate::slice_of_mut(&targets, skip, len)
                        .iter()
                        .map(|b| iovec(b.addr(), b.len()))
                        .collect()
                };
                let mask = align - 1;
                let fits = |v: &libc::iovec| (v.iov_base as u64 | v.iov_len as u64) & mask == 0;
                if offset & mask != 0 || iov.len() > MAX_BUFFERS || !iov.iter().all(fits) {
                    return None;
                }
                skip += len;
                out.push(iov);
            }
        }
    }
    Some(out)
}

fn iovec(addr: usize, len: usize) -> libc::iovec {
    libc::iovec { iov_base: addr as *mut libc::c_void, iov_len: len }
}
