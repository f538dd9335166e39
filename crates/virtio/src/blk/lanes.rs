//! Requests under way, and those that wait for the machine to go on after a host error.

use super::request::{Outcome, Step, Transfer};
use super::{Action, Blk, OnError};
use crate::{Queue, QueueError, Quick, Served};
use ringfort_block::aio::{Done, Lane, Request};
use ringfort_bus::lock;
use std::io;
use std::sync::atomic::Ordering;

/// Most bytes that a vCPU moves at one ring of the doorbell; more is the I/O thread's.
const QUICK_BYTES: u64 = 512 << 10;
/// Longest single request that a vCPU does.
const QUICK_REQUEST: u64 = 128 << 10;
/// The driver hears of what is done after as many bytes at the latest.
const SIGNAL_BYTES: u64 = 256 << 10;

/// One queue's requests.
#[derive(Default)]
pub struct Slot {
    /// Made when first needed.
    lane: Option<Lane<Transfer>>,
    /// Failed on the host; they are tried again when the machine goes on.
    parked: Vec<(Request, Transfer)>,
    /// Chains that were parked in a saved machine, by their first descriptors.
    pub heads: Vec<u16>,
}

impl Slot {
    /// First descriptors of what is parked.
    pub fn parked_heads(&self) -> impl Iterator<Item = u16> + '_ {
        self.parked.iter().map(|(_, t)| t.head()).chain(self.heads.iter().copied())
    }

    /// Wait for what the kernel has of this queue.
    pub fn quiesce(&mut self) {
        if let Some(lane) = &mut self.lane {
            lane.quiesce();
        }
    }

    /// Wait for the end of all requests and forget them, parked ones as well.
    pub fn forget(&mut self) {
        if let Some(lane) = &mut self.lane {
            lane.drain(drop);
        }
        self.parked.clear();
        self.heads.clear();
    }
}

impl Blk {
    /// Make a queue's lane if it has none. A device has its transport, and so its events, before a queue is served.
    fn prepare(&self, slot: &mut Slot, queue: u16) {
        if slot.lane.is_none()
            && let Some(kick) = self.signals.get().and_then(|s| s.kicks().get(usize::from(queue)))
        {
            slot.lane = Some(Lane::new(self.backend.clone(), self.aio, kick.clone()));
        }
    }

    /// The end of a request: its status to the driver, or its place among the parked.
    fn complete(&self, queue: &mut Queue, parked: &mut Vec<(Request, Transfer)>, done: Done<Transfer>) {
        let Done { request, payload, result } = done;
        let outcome = match &result {
            Ok(()) => Outcome::Ok,
            Err(e) if e.kind() == io::ErrorKind::Unsupported => Outcome::Unsupported,
            Err(e) => {
                let write = payload.is_write();
                let policy = if write { self.werror } else { self.rerror };
                let full = matches!(e.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT));
                let stop = policy == OnError::Stop || policy == OnError::Enospc && full;
                if stop {
                    parked.push((request, payload));
                    // Told once, whatever the number of requests.
                    if !self.held.swap(true, Ordering::SeqCst) {
                        self.tell(write, e, Action::Stop);
                    }
                    return;
                }
                let (action, outcome) = match policy {
                    OnError::Ignore => (Action::Ignore, Outcome::Ok),
                    _ => (Action::Report, Outcome::from(e)),
                };
                self.tell(write, e, action);
                outcome
            }
        };
        let written = payload.finish(outcome);
        queue.push(payload.into_chain(), written);
    }

    /// Give the driver what is done.
    fn hand_out(&self, queue: &mut Queue, slot: &mut Slot) {
        let Slot { lane: Some(lane), parked, .. } = slot else { return };
        while let Some(done) = lane.poll() {
            self.complete(queue, parked, done);
        }
        queue.signal();
    }

    pub(super) fn collect_queue(&self, queue: &mut Queue, broken: bool) {
        let mut slot = lock(&self.slots[usize::from(queue.index())]);
        if !broken {
            return self.hand_out(queue, &mut slot);
        }
        // The driver reset nothing yet, and gets nothing more until then.
        if let Some(lane) = &mut slot.lane {
            while lane.poll().is_some() {}
        }
    }

    pub(super) fn drain_queue(&self, queue: &mut Queue, broken: bool) {
        let mut slot = lock(&self.slots[usize::from(queue.index())]);
        let Slot { lane: Some(lane), parked, .. } = &mut *slot else { return };
        lane.drain(|done| {
            if !broken {
                self.complete(queue, parked, done);
            }
        });
        if !broken {
            queue.signal();
        }
    }

    pub(super) fn service_queue(&self, queue: &mut Queue) -> Result<Served, QueueError> {
        let mut guard = lock(&self.slots[usize::from(queue.index())]);
        let slot = &mut *guard;
        self.prepare(slot, queue.index());
        self.hand_out(queue, slot);
        if self.held.load(Ordering::SeqCst) {
            return Ok(Served::Waiting);
        }
        self.again(queue, slot)?;
        let Slot { lane: Some(lane), parked, .. } = slot else { return Ok(Served::Drained) };
        let mut unsaid = 0;
        while let Some(chain) = queue.pop()? {
            let transfer = Transfer::parse(chain)?;
            unsaid += transfer.size();
            match transfer.plan(self) {
                Step::End(outcome) => {
                    let written = transfer.finish(outcome);
                    queue.push(transfer.into_chain(), written);
                }
                Step::Start(request) => lane.start(request, transfer),
            }
            if unsaid >= SIGNAL_BYTES {
                unsaid = 0;
                while let Some(done) = lane.poll() {
                    self.complete(queue, parked, done);
                }
                queue.signal();
            }
        }
        lane.submit();
        self.hand_out(queue, slot);
        Ok(Served::Drained)
    }

    /// Try again what was parked.
    fn again(&self, queue: &mut Queue, slot: &mut Slot) -> Result<(), QueueError> {
        let Slot { lane: Some(lane), parked, heads } = slot else { return Ok(()) };
        if !queue.is_open() {
            return Ok(());
        }
        for (request, transfer) in parked.drain(..) {
            lane.start(request, transfer);
        }
        for head in heads.drain(..) {
            let transfer = Transfer::parse(queue.reopen(head)?)?;
            match transfer.plan(self) {
                Step::Start(request) => lane.start(request, transfer),
                Step::End(outcome) => {
                    let written = transfer.finish(outcome);
                    queue.push(transfer.into_chain(), written);
                }
            }
        }
        Ok(())
    }

    pub(super) fn quick_queue(&self, queue: &mut Queue) -> Result<Quick, QueueError> {
        let mut guard = lock(&self.slots[usize::from(queue.index())]);
        let slot = &mut *guard;
        if self.held.load(Ordering::SeqCst) || !slot.heads.is_empty() || !slot.parked.is_empty() {
            return Ok(Quick::Later);
        }
        self.prepare(slot, queue.index());
        let Slot { lane: Some(lane), parked, .. } = slot else { return Ok(Quick::Later) };
        let mut budget = QUICK_BYTES;
        while let Some(chain) = queue.pop()? {
            let transfer = Transfer::parse(chain)?;
            let size = transfer.size();
            let rest = if size > budget.min(QUICK_REQUEST) {
                Some(transfer)
            } else {
                match transfer.plan(self) {
                    Step::End(outcome) => {
                        let written = transfer.finish(outcome);
                        queue.push(transfer.into_chain(), written);
                        None
                    }
                    Step::Start(request) => match lane.try_now(&request, transfer) {
                        Ok(done) => {
                            self.complete(queue, parked, done);
                            None
                        }
                        Err(transfer) => Some(transfer),
                    },
                }
            };
            if let Some(transfer) = rest {
                queue.undo_pop(transfer.into_chain());
                queue.signal();
                return Ok(Quick::Later);
            }
            if self.held.load(Ordering::SeqCst) {
                queue.signal();
                return Ok(Quick::Later);
            }
            budget -= size;
        }
        queue.signal();
        Ok(Quick::Done)
    }
}
