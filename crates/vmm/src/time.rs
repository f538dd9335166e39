//! Machine time: the clock that devices see, and their timers.

use ringfort_bus::{Clock, Timer, TimerDevice, lock};
use ringfort_machine_pc::Timers;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Monotonic machine time, which stands still while the machine is paused.
pub struct MachineClock {
    state: Mutex<ClockState>,
}

struct ClockState {
    /// Machine time at `since`.
    base: u64,
    /// When the clock was last started; `None` while paused.
    since: Option<Instant>,
}

impl MachineClock {
    /// Running, at zero.
    pub fn new() -> Arc<MachineClock> {
        Arc::new(MachineClock { state: Mutex::new(ClockState { base: 0, since: Some(Instant::now()) }) })
    }

    /// Stop.
    pub fn pause(&self) {
        let mut s = lock(&self.state);
        if let Some(since) = s.since.take() {
            s.base += since.elapsed().as_nanos() as u64;
        }
    }

    /// Let a clock that stands still go on from `now_ns`.
    pub fn set(&self, now_ns: u64) {
        let mut s = lock(&self.state);
        s.base = now_ns;
        s.since = s.since.map(|_| Instant::now());
    }

    /// Go on.
    pub fn resume(&self) {
        lock(&self.state).since.get_or_insert_with(Instant::now);
    }
}

impl Clock for MachineClock {
    fn now_ns(&self) -> u64 {
        let s = lock(&self.state);
        s.base + s.since.map_or(0, |t| t.elapsed().as_nanos() as u64)
    }

    fn wall_ns(&self) -> u64 {
        // A host clock before 1970 reads as 1970.
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
    }
}

/// Who is to be told when a timer goes off.
type Target = (Weak<Mutex<dyn TimerDevice>>, u32);

struct Queue {
    /// Deadline, timer number, generation; the earliest on top. An entry counts only if its timer's generation is still the same.
    heap: BinaryHeap<Reverse<(u64, usize, u64)>>,
    /// Per timer: generation (moves with each arm and cancel), whether armed, and target.
    timers: Vec<(u64, bool, Option<Target>)>,
    /// Nothing goes off for now.
    held: bool,
    /// A device is being told.
    busy: bool,
    stop: bool,
}

struct Service {
    clock: Arc<dyn Clock>,
    queue: Mutex<Queue>,
    changed: Condvar,
}

/// Runs the timers of one machine, on a thread of its own.
pub struct TimerService {
    service: Arc<Service>,
    thread: Option<JoinHandle<()>>,
}

struct Handle {
    service: Arc<Service>,
    number: usize,
}

impl TimerService {
    /// Start the thread.
    ///
    /// # Errors
    /// When the host has no more threads.
    pub fn start(clock: Arc<dyn Clock>) -> std::io::Result<TimerService> {
        let queue =
            Queue { heap: BinaryHeap::new(), timers: Vec::new(), held: false, busy: false, stop: false };
        let service = Arc::new(Service { clock, queue: Mutex::new(queue), changed: Condvar::new() });
        let run = service.clone();
        let thread = std::thread::Builder::new().name("timers".into()).spawn(move || run.serve())?;
        Ok(TimerService { service, thread: Some(thread) })
    }

    /// Let nothing go off, not even what is due; on return no device is being told.
    pub fn hold(&self) {
        let mut q = lock(&self.service.queue);
        q.held = true;
        while q.busy {
            q = self.service.changed.wait(q).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Go on after [`hold`](Self::hold).
    pub fn release(&self) {
        lock(&self.service.queue).held = false;
        self.service.changed.notify_all();
    }
}

impl Timers for TimerService {
    fn timer(&self) -> (Arc<dyn Timer>, usize) {
        let mut q = lock(&self.service.queue);
        q.timers.push((0, false, None));
        let number = q.timers.len() - 1;
        (Arc::new(Handle { service: self.service.clone(), number }), number)
    }

    fn bind(&self, number: usize, device: Weak<Mutex<dyn TimerDevice>>, index: u32) {
        if let Some(t) = lock(&self.service.queue).timers.get_mut(number) {
            t.2 = Some((device, index));
        }
        self.service.changed.notify_all();
    }
}

impl Drop for TimerService {
    fn drop(&mut self) {
        lock(&self.service.queue).stop = true;
        self.service.changed.notify_all();
        if let Some(t) = self.thread.take() {
            // A panic there has been reported by its own thread.
            let _ = t.join();
        }
    }
}

impl Service {
    fn serve(&self) {
        let mut q = lock(&self.queue);
        while !q.stop {
            if q.held {
                q = self.changed.wait(q).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let now = self.clock.now_ns();
            match q.heap.peek().copied() {
                Some(Reverse((_, number, generation))) if !live(&q, number, generation) => {
                    q.heap.pop();
                }
                Some(Reverse((deadline, number, _))) if deadline <= now => {
                    q.heap.pop();
                    q.timers[number].1 = false;
                    let target = q.timers[number].2.clone();
                    q.busy = true;
                    // The device's lock is never taken under the queue's: it arms timers under its own.
                    drop(q);
                    if let Some((device, index)) = target
                        && let Some(device) = device.upgrade()
                    {
                        lock(&device).timer_expired(index);
                    }
                    q = lock(&self.queue);
                    q.busy = false;
                    if q.held {
                        self.changed.notify_all();
                    }
                }
                Some(Reverse((deadline, ..))) => {
                    // A paused clock does not reach the deadline; looking again each second costs nothing then.
                    let wait = Duration::from_nanos(deadline - now).min(Duration::from_secs(1));
                    q = self.changed.wait_timeout(q, wait).unwrap_or_else(PoisonError::into_inner).0;
                }
                None => q = self.changed.wait(q).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

fn live(q: &Queue, number: usize, generation: u64) -> bool {
    q.timers[number].0 == generation && q.timers[number].1
}

impl Timer for Handle {
    fn arm(&self, deadline_ns: u64) {
        let mut q = lock(&self.service.queue);
        let earliest = q.heap.peek().is_none_or(|Reverse((d, ..))| deadline_ns < *d);
        let t = &mut q.timers[self.number];
        t.0 += 1;
        t.1 = true;
        let generation = t.0;
        // Entries of earlier arms are dropped when they come to the top; a guest that re-arms without end must not grow the heap.
        if q.heap.len() > 64 + 4 * q.timers.len() {
            let Queue { heap, timers, .. } = &mut *q;
            heap.retain(|Reverse((_, n, g))| timers[*n].0 == *g && timers[*n].1);
        }
        q.heap.push(Reverse((deadline_ns, self.number, generation)));
        drop(q);
        if earliest {
            self.service.changed.notify_all();
        }
    }

    fn cancel(&self) {
        let mut q = lock(&self.service.queue);
        let t = &mut q.timers[self.number];
        t.0 += 1;
        t.1 = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Sender, channel};

    struct Probe(Sender<u32>);
    impl TimerDevice for Probe {
        fn timer_expired(&mut self, index: u32) {
            self.0.send(index).unwrap();
        }
    }

    #[test]
    fn timers_go_off_in_order_and_cancelled_ones_do_not() {
        let clock = MachineClock::new();
        let service = TimerService::start(clock.clone()).unwrap();
        let (tx, rx) = channel();
        let device = ringfort_bus::shared(Probe(tx));
        let dynamic: Arc<Mutex<dyn TimerDevice>> = device.clone();
        let timers: Vec<_> = (0..4)
            .map(|i| {
                let (t, n) = service.timer();
                service.bind(n, Arc::downgrade(&dynamic), i);
                t
            })
            .collect();
        let now = clock.now_ns();
        timers[2].arm(now + 30_000_000);
        timers[1].arm(now + 20_000_000);
        timers[0].arm(now + 500_000_000);
        timers[3].arm(now + 10_000_000);
        timers[3].cancel();
        timers[0].arm(now + 10_000_000);
        let order: Vec<u32> = (0..3).map(|_| rx.recv_timeout(Duration::from_secs(20)).unwrap()).collect();
        assert_eq!(order, [0, 1, 2]);
        assert!(clock.now_ns() >= now + 30_000_000);
        for n in 0..100_000 {
            timers[3].arm(u64::MAX / 2 + n);
        }
        assert!(lock(&service.service.queue).heap.len() < 200);
    }

    #[test]
    fn what_is_due_while_held_goes_off_afterwards() {
        let clock = MachineClock::new();
        let service = TimerService::start(clock.clone()).unwrap();
        let (tx, rx) = channel();
        let device: Arc<Mutex<dyn TimerDevice>> = ringfort_bus::shared(Probe(tx));
        let (timer, n) = service.timer();
        service.bind(n, Arc::downgrade(&device), 7);
        service.hold();
        timer.arm(clock.now_ns());
        // The thread has had its chance once another of its wake-ups is over.
        service.service.changed.notify_all();
        assert!(rx.recv_timeout(Duration::from_millis(20)).is_err());
        service.release();
        assert_eq!(rx.recv_timeout(Duration::from_secs(20)), Ok(7));
    }

    #[test]
    fn a_paused_clock_stands_still() {
        let clock = MachineClock::new();
        clock.pause();
        let t = clock.now_ns();
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(clock.now_ns(), t);
        clock.resume();
        std::thread::sleep(Duration::from_millis(5));
        assert!(clock.now_ns() > t);
        clock.pause();
        clock.set(77);
        assert_eq!(clock.now_ns(), 77);
        clock.resume();
        assert!(clock.now_ns() >= 77);
    }
}
