//! The part of a transport that PCI and MMIO share (virtio 1.3 sections 2.1, 2.2, 3.1).

mod active;
mod outside;
#[cfg(test)]
mod tests;

use crate::device::Serve;
use crate::queue::{Gate, QueueLayout, QueueProgress};
use crate::{Grouping, Interrupt, Queue, Signals, VirtioDevice, feature, status};
use active::{ActiveQueue, Fault, Worker};
use outside::Outside;
use ringfort_bus::lock;
use ringfort_memory::RamMap;
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, Weak};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

/// One queue's registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
struct QueueRegs {
    size: u16,
    enabled: bool,
    desc: u64,
    avail: u64,
    used: u64,
}

/// The registers that every transport has in some form.
#[derive(Debug, Default)]
struct Regs {
    device_select: u32,
    driver_select: u32,
    driver_features: u64,
    queue_select: u16,
    queues: Vec<QueueRegs>,
}

struct Active {
    gate: Arc<Gate>,
    workers: Vec<Worker>,
    outside: Option<Outside>,
}

impl Active {
    /// Have others serve the queues that are theirs, or nobody.
    fn set_outside(&mut self, run: bool, fault: &Fault) {
        let Some(o) = &mut self.outside else { return };
        if !run {
            o.stop();
        } else if let Err(e) = o.start() {
            fault.note(format!("{e}; this process serves the queues instead"));
            self.outside = None;
        }
    }
}

struct Lifecycle {
    paused: bool,
    dma: bool,
    active: Option<Active>,
}

/// Saved state of transport-neutral registers, queues and device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoreState {
    status: u8,
    device_select: u32,
    driver_select: u32,
    driver_features: u64,
    queue_select: u16,
    generation: u32,
    queues: Vec<(QueueRegs, Option<QueueProgress>)>,
    device: Vec<u8>,
}

/// Which of a queue's three addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RingArea {
    Desc,
    Avail,
    Used,
}

/// A device behind a transport: status, features, queue set-up, I/O threads, life cycle.
///
/// Lock order: registers, life cycle, a queue's lane, a queue, the device's own locks. The doorbell takes its
/// queue's lane (shared) and, when the device works at once, that queue; nothing common to all queues.
pub struct Core {
    device: Arc<dyn VirtioDevice>,
    ram: Arc<RamMap>,
    signals: Arc<Signals>,
    interrupt: Arc<dyn Interrupt>,
    limits: Vec<u16>,
    status: Arc<AtomicU8>,
    fault: Arc<Fault>,
    regs: Mutex<Regs>,
    life: Mutex<Lifecycle>,
    lanes: Vec<RwLock<Option<Arc<ActiveQueue>>>>,
}

impl Core {
    /// Put `device` behind a transport that interrupts through `interrupt`.
    ///
    /// # Errors
    /// When the host gives no event descriptor.
    pub fn new(
        device: Arc<dyn VirtioDevice>,
        ram: Arc<RamMap>,
        interrupt: Arc<dyn Interrupt>,
    ) -> io::Result<Core> {
        let limits = device.queue_sizes();
        let mut kicks: Vec<Arc<EventFd>> = Vec::with_capacity(limits.len());
        for i in 0..limits.len() {
            let shared = (device.grouping() == Grouping::Single && i > 0).then(|| kicks[0].clone());
            kicks.push(match shared {
                Some(k) => k,
                None => Arc::new(EventFd::new(EFD_CLOEXEC)?),
            });
        }
        let signals = Arc::new(Signals::new(kicks));
        device.attach(signals.clone());
        let core = Core {
            lanes: limits.iter().map(|_| RwLock::new(None)).collect(),
            device,
            ram,
            signals,
            interrupt,
            limits,
            status: Arc::new(AtomicU8::new(0)),
            fault: Arc::default(),
            regs: Mutex::default(),
            life: Mutex::new(Lifecycle { paused: false, dma: true, active: None }),
        };
        core.clear_regs(&mut lock(&core.regs));
        Ok(core)
    }

    /// The device.
    pub fn device(&self) -> &Arc<dyn VirtioDevice> {
        &self.device
    }

    /// Number of queues.
    pub fn queue_count(&self) -> u16 {
        self.limits.len() as u16
    }

    /// The descriptor that makes a queue's I/O thread serve it, for engines that can ring it from the kernel
    /// (ioeventfd). Stays the same for the device's life.
    pub fn kick_fd(&self, queue: u16) -> Option<Arc<EventFd>> {
        self.signals.kicks().get(usize::from(queue)).cloned()
    }

    /// The queues that are being served.
    pub fn served_queues(&self) -> Vec<u16> {
        (0..).zip(&self.lanes).filter_map(|(n, lane)| read_lane(lane).is_some().then_some(n)).collect()
    }

    /// What made the device need a reset, in words.
    pub fn fault(&self) -> Option<String> {
        self.fault.text()
    }

    /// Tell `log`, once each time, why the device needs a reset: one line. Only the first log given counts.
    pub fn set_log(&self, log: impl Fn(&str) + Send + Sync + 'static) {
        self.fault.set_log(Box::new(log));
    }

    /// The driver rings a queue's doorbell. Unknown and inactive queues are ignored.
    pub fn notify(&self, queue: u16) {
        if let Some(q) = self.lanes.get(usize::from(queue))
            && let Some(q) = read_lane(q).as_ref()
        {
            q.ring();
        }
    }

    /// The status register.
    pub fn status(&self) -> u8 {
        self.status.load(Ordering::SeqCst)
    }

    /// The driver writes the status register; 0 resets.
    pub fn write_status(&self, value: u8) {
        if value == 0 {
            return self.reset();
        }
        let mut regs = lock(&self.regs);
        let old = self.status();
        // A driver must not take bits back other than by reset (virtio 1.3 section 2.1.1).
        let mut new = old | (value & !status::NEEDS_RESET);
        let fresh = new & !old;
        if fresh & status::FEATURES_OK != 0 && !self.features_fit(regs.driver_features) {
            new &= !status::FEATURES_OK;
        }
        if fresh & status::DRIVER_OK != 0 && new & status::FEATURES_OK == 0 {
            new &= !status::DRIVER_OK;
        }
        self.status.fetch_or(new, Ordering::SeqCst);
        if new & !old & status::DRIVER_OK != 0 {
            let progress = vec![None; regs.queues.len()];
            self.activate(&mut regs, &progress);
        }
    }

    fn offered(&self) -> u64 {
        self.device.features() | feature::COMMON
    }

    fn features_fit(&self, wanted: u64) -> bool {
        wanted & feature::VERSION_1 != 0 && wanted & !self.offered() == 0 && self.device.fits(wanted)
    }

    fn activate(&self, regs: &mut Regs, progress: &[Option<QueueProgress>]) {
        let mut life = lock(&self.life);
        let gate = Arc::new(Gate::default());
        gate.set_paused(life.paused);
        gate.set_dma(life.dma);
        let mut queues = Vec::new();
        for (i, (q, p)) in regs.queues.iter().zip(progress).enumerate().filter(|(_, (q, _))| q.enabled) {
            let layout = QueueLayout {
                size: q.size,
                desc: q.desc,
                avail: q.avail,
                used: q.used,
                event_idx: regs.driver_features & feature::EVENT_IDX != 0,
                indirect: regs.driver_features & feature::INDIRECT_DESC != 0,
            };
            let made = Queue::new(
                &self.ram,
                &layout,
                p.unwrap_or_default(),
                i as u16,
                gate.clone(),
                self.interrupt.clone(),
            );
            match made {
                Ok(queue) => queues.push((i, layout, queue)),
                Err(e) => return self.break_down(&format!("queue {i}: {e}")),
            }
        }
        self.device.activate(regs.driver_features);
        self.signals.connect(Some(self.interrupt.clone()));
        let kicks = self.signals.kicks();
        let mut groups: Vec<(Arc<EventFd>, Vec<Arc<ActiveQueue>>)> = Vec::new();
        let server = self.device.server();
        let mut served = Vec::new();
        for (i, layout, queue) in queues {
            let kick = kicks[i].clone();
            let active = Arc::new(ActiveQueue::new(
                queue,
                self.device.clone(),
                self.status.clone(),
                self.interrupt.clone(),
                kick.clone(),
                self.fault.clone(),
            ));
            *self.lanes[i].write().unwrap_or_else(PoisonError::into_inner) = Some(active.clone());
            if server.is_some() && self.device.is_served(i as u16) {
                served.push((i as u16, active.clone(), layout));
            }
            match groups.iter_mut().find(|g| Arc::ptr_eq(&g.0, &kick)) {
                Some(g) => g.1.push(active),
                None => groups.push((kick, vec![active])),
            }
        }
        let mut workers = Vec::new();
        for (n, (kick, queues)) in groups.into_iter().enumerate() {
            match Worker::start(&format!("{}-{n}", self.device.kind()), kick, queues) {
                Ok(w) => workers.push(w),
                Err(e) => {
                    gate.set_paused(true);
                    drop(workers);
                    self.close_lanes();
                    return self.break_down(&format!("no I/O thread: {e}"));
                }
            }
        }
        let outside = server
            .map(|s| Outside::new(s, regs.driver_features, served, self.interrupt.clone()))
            .transpose()
            .unwrap_or_else(|e| {
                self.fault.note(format!("{}: handing queues over: {e}", self.device.kind()));
                None
            });
        let mut active = Active { gate, workers, outside };
        active.set_outside(!life.paused && life.dma, &self.fault);
        life.active = Some(active);
        let serve = |lane: &RwLock<Option<Arc<ActiveQueue>>>| -> Weak<dyn Serve> {
            match read_lane(lane).as_ref() {
                Some(q) => {
                    let q: Arc<dyn Serve> = q.clone();
                    Arc::downgrade(&q)
                }
                None => Weak::<ActiveQueue>::new(),
            }
        };
        self.signals.set_servers(self.lanes.iter().map(serve).collect());
        drop(life);
        // Whatever was rung before the threads were there, and what the device itself has.
        (0..self.queue_count()).for_each(|q| self.signals.kick(q));
    }

    fn break_down(&self, why: &str) {
        self.status.fetch_or(status::NEEDS_RESET, Ordering::SeqCst);
        self.fault.note(format!("{}: {why}", self.device.kind()));
        self.interrupt.config();
    }

    fn close_lanes(&self) {
        for lane in &self.lanes {
            // Waits for a vCPU that works at once in there.
            *lane.write().unwrap_or_else(PoisonError::into_inner) = None;
        }
    }

    /// End all I/O; requests under way are completed first.
    fn deactivate(&self) {
        let active = lock(&self.life).active.take();
        if let Some(Active { gate, workers, outside }) = active {
            gate.set_paused(true);
            drop(outside);
            self.signals.set_servers(Vec::new());
            let queues: Vec<Arc<ActiveQueue>> =
                self.lanes.iter().filter_map(|lane| read_lane(lane).clone()).collect();
            self.close_lanes();
            drop(workers);
            // Threads of a back end may be at one still.
            queues.iter().for_each(|q| q.wait_idle());
        }
        self.signals.connect(None);
    }

    fn clear_regs(&self, regs: &mut Regs) {
        let queues = self.limits.iter().map(|&size| QueueRegs { size, ..Default::default() }).collect();
        *regs = Regs { queues, ..Default::default() };
    }

    /// The state after power-on; requests under way are completed first.
    pub fn reset(&self) {
        let mut regs = lock(&self.regs);
        self.deactivate();
        self.device.reset();
        self.clear_regs(&mut regs);
        self.fault.clear();
        self.status.store(0, Ordering::SeqCst);
    }

    /// Stop serving queues; on return no request is under way and memory is not touched.
    pub fn pause(&self) {
        let mut life = lock(&self.life);
        life.paused = true;
        if let Some(a) = &mut life.active {
            a.gate.set_paused(true);
            a.set_outside(false, &self.fault);
        }
        drop(life);
        for lane in &self.lanes {
            if let Some(q) = read_lane(lane).as_ref() {
                q.wait_idle();
            }
        }
    }

    /// Do `work` while no request is under way; afterwards the device is served again if it was before.
    pub fn while_paused<T>(&self, work: impl FnOnce() -> T) -> T {
        let was_paused = lock(&self.life).paused;
        self.pause();
        let done = work();
        if !was_paused {
            self.resume();
        }
        done
    }

    /// Go on after [`pause`](Self::pause) or [`load`](Self::load).
    pub fn resume(&self) {
        let mut life = lock(&self.life);
        life.paused = false;
        let dma = life.dma;
        if let Some(a) = &mut life.active {
            a.gate.set_paused(false);
            a.set_outside(dma, &self.fault);
        }
        drop(life);
        self.device.resumed();
        (0..self.queue_count()).for_each(|q| self.signals.kick(q));
    }

    /// Allow or forbid the device to access memory (PCI bus mastering).
    pub fn set_dma(&self, allowed: bool) {
        let mut life = lock(&self.life);
        if life.dma == allowed {
            return;
        }
        life.dma = allowed;
        let paused = life.paused;
        if let Some(a) = &mut life.active {
            a.gate.set_dma(allowed);
            a.set_outside(allowed && !paused, &self.fault);
        }
        drop(life);
        if allowed {
            (0..self.queue_count()).for_each(|q| self.signals.kick(q));
        } else {
            for lane in &self.lanes {
                if let Some(q) = read_lane(lane).as_ref() {
                    q.wait_idle();
                }
            }
        }
    }

    // Registers, for the transports.

    pub(crate) fn device_features(&self) -> u32 {
        match lock(&self.regs).device_select {
            0 => self.offered() as u32,
            1 => (self.offered() >> 32) as u32,
            _ => 0,
        }
    }
    pub(crate) fn device_select(&self) -> u32 {
        lock(&self.regs).device_select
    }
    pub(crate) fn set_device_select(&self, value: u32) {
        lock(&self.regs).device_select = value;
    }
    pub(crate) fn driver_select(&self) -> u32 {
        lock(&self.regs).driver_select
    }
    pub(crate) fn set_driver_select(&self, value: u32) {
        lock(&self.regs).driver_select = value;
    }
    pub(crate) fn driver_features(&self) -> u32 {
        let regs = lock(&self.regs);
        match regs.driver_select {
            0 => regs.driver_features as u32,
            1 => (regs.driver_features >> 32) as u32,
            _ => 0,
        }
    }
    pub(crate) fn set_driver_features(&self, value: u32) {
        let mut regs = lock(&self.regs);
        if self.status() & status::FEATURES_OK != 0 {
            return;
        }
        let (value, old) = (u64::from(value), regs.driver_features);
        match regs.driver_select {
            0 => regs.driver_features = old & !0xffff_ffff | value,
            1 => regs.driver_features = old & 0xffff_ffff | value << 32,
            _ => {}
        }
    }
    pub(crate) fn queue_select(&self) -> u16 {
        lock(&self.regs).queue_select
    }
    pub(crate) fn set_queue_select(&self, value: u16) {
        lock(&self.regs).queue_select = value;
    }
    /// The largest size of the selected queue; 0 if there is no such queue.
    pub(crate) fn queue_limit(&self) -> u16 {
        self.limits.get(usize::from(self.queue_select())).copied().unwrap_or(0)
    }
    pub(crate) fn queue_size(&self) -> u16 {
        self.with_queue(|q| q.size)
    }
    pub(crate) fn queue_enabled(&self) -> bool {
        self.with_queue(|q| q.enabled)
    }
    pub(crate) fn queue_area(&self, area: RingArea) -> u64 {
        self.with_queue(|q| match area {
            RingArea::Desc => q.desc,
            RingArea::Avail => q.avail,
            RingArea::Used => q.used,
        })
    }
    pub(crate) fn set_queue_size(&self, size: u16) {
        let limit = self.queue_limit();
        if size.is_power_of_two() && size <= limit {
            self.change_queue(|q| q.size = size);
        }
    }
    pub(crate) fn set_queue_enabled(&self) {
        self.change_queue(|q| q.enabled = true);
    }
    /// Unmake a queue before the driver is ready (virtio-mmio allows it).
    pub(crate) fn set_queue_disabled(&self) {
        let mut regs = lock(&self.regs);
        let i = usize::from(regs.queue_select);
        if self.status() & status::DRIVER_OK == 0
            && let Some(q) = regs.queues.get_mut(i)
        {
            q.enabled = false;
        }
    }
    /// Replace the bits of an address that `mask` selects.
    pub(crate) fn set_queue_area(&self, area: RingArea, value: u64, mask: u64) {
        self.change_queue(|q| {
            let a = match area {
                RingArea::Desc => &mut q.desc,
                RingArea::Avail => &mut q.avail,
                RingArea::Used => &mut q.used,
            };
            *a = *a & !mask | value & mask;
        });
    }
    fn with_queue<R: Default>(&self, f: impl FnOnce(&QueueRegs) -> R) -> R {
        let regs = lock(&self.regs);
        regs.queues.get(usize::from(regs.queue_select)).map(f).unwrap_or_default()
    }
    /// A queue's registers are settled once it is enabled or the driver is ready.
    fn change_queue(&self, f: impl FnOnce(&mut QueueRegs)) {
        let mut regs = lock(&self.regs);
        let i = usize::from(regs.queue_select);
        if self.status() & status::DRIVER_OK == 0
            && let Some(q) = regs.queues.get_mut(i)
            && !q.enabled
        {
            f(q);
        }
    }
    /// How often configuration space changed.
    pub(crate) fn generation(&self) -> u32 {
        self.signals.generation()
    }
    pub(crate) fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        self.device.read_config(offset, data);
    }
    pub(crate) fn write_config(&self, offset: u64, data: &[u8]) {
        self.device.write_config(offset, data);
    }

    /// The whole state. The machine must be paused ([`pause`](Self::pause)) for it to fit the RAM it is saved with.
    pub fn save(&self) -> CoreState {
        let regs = lock(&self.regs);
        let progress =
            self.lanes.iter().map(|l| read_lane(l).as_ref().map(|q| q.progress())).collect::<Vec<_>>();
        CoreState {
            status: self.status(),
            device_select: regs.device_select,
            driver_select: regs.driver_select,
            driver_features: regs.driver_features,
            queue_select: regs.queue_select,
            generation: self.signals.generation(),
            queues: regs.queues.iter().copied().zip(progress).collect(),
            device: self.device.save(),
        }
    }

    /// Check that a saved state can be this device's.
    ///
    /// # Errors
    /// What does not fit, in words.
    pub fn check(&self, s: &CoreState) -> Result<(), String> {
        if s.queues.len() != self.limits.len() {
            return Err(format!("{} queues, this device has {}", s.queues.len(), self.limits.len()));
        }
        for ((q, _), &limit) in s.queues.iter().zip(&self.limits) {
            if !q.size.is_power_of_two() || q.size > limit {
                return Err(format!("queue size {} is beyond {limit}", q.size));
            }
        }
        if s.status & status::FEATURES_OK != 0 && !self.features_fit(s.driver_features) {
            let extra = s.driver_features & !self.offered();
            return Err(match extra {
                0 => "the driver uses features that do not go together".into(),
                _ => format!("the driver uses features {extra:#x} that this device does not offer"),
            });
        }
        if s.status & status::DRIVER_OK != 0 && s.status & status::FEATURES_OK == 0 {
            return Err("impossible status".into());
        }
        Ok(())
    }

    /// Take over a saved state. The device is paused afterwards: [`resume`](Self::resume) it when RAM is there.
    ///
    /// # Errors
    /// What does not fit, in words; nothing has changed then.
    pub fn load(&self, s: &CoreState) -> Result<(), String> {
        self.check(s)?;
        let mut regs = lock(&self.regs);
        // Nothing may be served while the device changes; if it refuses, it goes on as before.
        let was_paused = lock(&self.life).paused;
        self.pause();
        if let Err(e) = self.device.load(&s.device) {
            if !was_paused {
                self.resume();
            }
            return Err(e);
        }
        self.deactivate();
        regs.device_select = s.device_select;
        regs.driver_select = s.driver_select;
        regs.driver_features = s.driver_features;
        regs.queue_select = s.queue_select;
        regs.queues = s.queues.iter().map(|q| q.0).collect();
        self.signals.set_generation(s.generation);
        self.fault.clear();
        self.status.store(s.status, Ordering::SeqCst);
        if s.status & status::DRIVER_OK != 0 && s.status & status::NEEDS_RESET == 0 {
            let progress: Vec<_> = s.queues.iter().map(|q| q.1).collect();
            self.activate(&mut regs, &progress);
        }
        Ok(())
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        self.deactivate();
    }
}

fn read_lane(lane: &RwLock<Option<Arc<ActiveQueue>>>) -> RwLockReadGuard<'_, Option<Arc<ActiveQueue>>> {
    lane.read().unwrap_or_else(PoisonError::into_inner)
}

/// A device's state as bytes.
pub(crate) fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    // Serialising a plain struct into a growing vector has no failing path.
    postcard::to_stdvec(value).unwrap_or_default()
}

/// A device's state from bytes.
pub(crate) fn decode<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    postcard::from_bytes(bytes).map_err(|e| format!("device state does not decode: {e}"))
}
