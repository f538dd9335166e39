//! The vCPU threads: one each, running, paused, or executing an order between runs.

use ringfort_engine::{DebugStop, EngineError, Kick, Vcpu, VcpuExit};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

type Order = Box<dyn FnOnce(&mut dyn Vcpu) + Send>;

/// What a vCPU tells the main loop.
#[derive(Debug)]
pub enum VcpuEvent {
    /// A triple fault.
    Shutdown,
    /// What a debugger asked for.
    Debug(DebugStop),
    /// The engine cannot go on.
    Failed(EngineError),
}

struct One {
    orders: Sender<Order>,
    kicker: Arc<dyn Kick>,
    /// Does not run with the others.
    frozen: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// All vCPUs of a machine. Made paused; dropping it stops the threads.
pub struct Vcpus {
    all: Vec<One>,
    running: Arc<AtomicBool>,
}

impl Vcpus {
    /// Start the threads. `report` is called on a vCPU's thread with its number; the vCPU then stays paused.
    ///
    /// # Errors
    /// When the host has no more threads.
    pub fn start(
        vcpus: Vec<Box<dyn Vcpu>>,
        report: impl Fn(usize, VcpuEvent) + Send + Sync + 'static,
    ) -> io::Result<Vcpus> {
        let running = Arc::new(AtomicBool::new(false));
        let report = Arc::new(report);
        let mut all = Vec::with_capacity(vcpus.len());
        for (number, vcpu) in vcpus.into_iter().enumerate() {
            let (orders, queue) = channel();
            let kicker = vcpu.kicker();
            let frozen = Arc::new(AtomicBool::new(false));
            let held = frozen.clone();
            let (running, report) = (running.clone(), report.clone());
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{number}"))
                .spawn(move || serve(vcpu, &queue, &running, &held, |e| report(number, e)))?;
            all.push(One { orders, kicker, frozen, thread: Some(thread) });
        }
        Ok(Vcpus { all, running })
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Let all run.
    pub fn resume(&self) {
        if !self.running.swap(true, Ordering::SeqCst) {
            for one in &self.all {
                // An empty order makes the thread look again. It fails only if the thread has died, which it has reported.
                let _ = one.orders.send(Box::new(|_| {}));
            }
        }
    }

    /// Stop all, and wait until they have.
    pub fn pause(&self) {
        self.running.store(false, Ordering::SeqCst);
        self.with_each(|_, _| ());
    }

    /// Leave one out when the others run, or no longer. To be called while all are paused.
    pub fn freeze(&self, number: usize, frozen: bool) {
        if let Some(one) = self.all.get(number) {
            one.frozen.store(frozen, Ordering::SeqCst);
        }
    }

    /// Run `f` on one vCPU's own thread, between instructions. `None` if there is no such vCPU, or its thread has died.
    pub fn with_one<T: Send + 'static>(
        &self,
        number: usize,
        f: impl Fn(&mut dyn Vcpu) -> T + Send + 'static,
    ) -> Option<T> {
        let one = self.all.get(number)?;
        let (tx, rx) = channel();
        let order: Order = Box::new(move |vcpu| {
            let _ = tx.send(f(vcpu));
        });
        one.orders.send(order).ok()?;
        one.kicker.kick();
        rx.recv().ok()
    }

    /// Run `f` on every vCPU's own thread, between instructions, and collect the answers in order. A running machine goes on
    /// afterwards. Threads that have died give no answer.
    pub fn with_each<T: Send + 'static>(
        &self,
        f: impl Fn(usize, &mut dyn Vcpu) -> T + Send + Sync + 'static,
    ) -> Vec<T> {
        let f = Arc::new(f);
        let answers: Vec<Receiver<T>> = self
            .all
            .iter()
            .enumerate()
            .map(|(number, one)| {
                let (tx, rx) = channel();
                let f = f.clone();
                let order: Order = Box::new(move |vcpu| {
                    // Whoever asked may have given up; the order is done all the same.
                    let _ = tx.send(f(number, vcpu));
                });
                let _ = one.orders.send(order);
                one.kicker.kick();
                rx
            })
            .collect();
        answers.into_iter().filter_map(|rx| rx.recv().ok()).collect()
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.running.store(false, Ordering::SeqCst);
        for one in &mut self.all {
            // Closing the queue ends the thread.
            one.orders = channel().0;
            one.kicker.kick();
        }
        for one in &mut self.all {
            if let Some(t) = one.thread.take() {
                // A panic there has been reported by its own thread.
                let _ = t.join();
            }
        }
    }
}

fn serve(
    mut vcpu: Box<dyn Vcpu>,
    orders: &Receiver<Order>,
    running: &AtomicBool,
    frozen: &AtomicBool,
    report: impl Fn(VcpuEvent),
) {
    // After a shutdown or failure the vCPU does not run again until it is told to.
    let mut halted = false;
    loop {
        let order = if running.load(Ordering::SeqCst) && !frozen.load(Ordering::SeqCst) && !halted {
            match orders.try_recv() {
                Ok(order) => Some(order),
                Err(std::sync::mpsc::TryRecvError::Empty) => None,
                Err(std::sync::mpsc::TryRecvError::Disconnected) => return,
            }
        } else {
            match orders.recv() {
                Ok(order) => Some(order),
                Err(_) => return,
            }
        };
        if let Some(order) = order {
            order(vcpu.as_mut());
            halted &= running.load(Ordering::SeqCst);
            continue;
        }
        match vcpu.run() {
            Ok(VcpuExit::Kicked) => {}
            Ok(VcpuExit::Shutdown) => {
                halted = true;
                report(VcpuEvent::Shutdown);
            }
            Ok(VcpuExit::Debug(stop)) => {
                halted = true;
                report(VcpuEvent::Debug(stop));
            }
            Err(e) => {
                halted = true;
                report(VcpuEvent::Failed(e));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringfort_engine::CpuState;
    use std::sync::{Condvar, Mutex};

    /// A vCPU that waits in `run` until kicked, and shuts down at its third run.
    struct Fake {
        kicked: Arc<(Mutex<bool>, Condvar)>,
        runs: u32,
    }
    struct Kicker(Arc<(Mutex<bool>, Condvar)>);
    impl Kick for Kicker {
        fn kick(&self) {
            *self.0.0.lock().unwrap() = true;
            self.0.1.notify_all();
        }
    }
    impl Vcpu for Fake {
        fn run(&mut self) -> Result<VcpuExit, EngineError> {
            self.runs += 1;
            if self.runs == 3 {
                return Ok(VcpuExit::Shutdown);
            }
            let mut k = self.kicked.1.wait_while(self.kicked.0.lock().unwrap(), |k| !*k).unwrap();
            *k = false;
            Ok(VcpuExit::Kicked)
        }
        fn kicker(&self) -> Arc<dyn Kick> {
            Arc::new(Kicker(self.kicked.clone()))
        }
        fn state(&mut self) -> Result<CpuState, EngineError> {
            Ok(CpuState { rip: u64::from(self.runs), ..CpuState::default() })
        }
        fn set_state(&mut self, s: &CpuState) -> Result<(), EngineError> {
            self.runs = s.rip as u32;
            Ok(())
        }
        fn reset(&mut self) -> Result<(), EngineError> {
            self.runs = 0;
            Ok(())
        }
    }

    #[test]
    fn orders_pauses_and_shutdowns() {
        let fakes =
            (0..3).map(|_| Box::new(Fake { kicked: Arc::default(), runs: 0 }) as Box<dyn Vcpu>).collect();
        let (tx, rx) = channel();
        let tx = Mutex::new(tx);
        let vcpus =
            Vcpus::start(fakes, move |n, e| tx.lock().unwrap().send((n, format!("{e:?}"))).unwrap()).unwrap();
        assert_eq!(vcpus.with_each(|n, v| (n, v.state().unwrap().rip)), [(0, 0), (1, 0), (2, 0)]);
        vcpus.resume();
        // Each order ends at most one run, so at the latest the fourth finds every vCPU at its third.
        for _ in 0..4 {
            vcpus.with_each(|_, _| ());
        }
        let mut down: Vec<usize> = (0..3).map(|_| rx.recv().unwrap().0).collect();
        down.sort_unstable();
        assert_eq!(down, [0, 1, 2]);
        vcpus.pause();
        vcpus.with_each(|_, v| v.reset().unwrap());
        assert_eq!(vcpus.with_each(|_, v| v.state().unwrap().rip), [0, 0, 0]);
        vcpus.resume();
        drop(vcpus);
    }
}
