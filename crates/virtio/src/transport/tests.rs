use super::*;
use crate::rng::Rng;
use crate::testing::{BUFFERS, Rig};
use crate::{QueueError, Quick, Served};
use std::sync::atomic::AtomicU32;

#[test]
fn registers_are_settled_once_features_and_queues_are() {
    let rig = Rig::new(Arc::new(Rng::new()), 0);
    let c = &rig.core;
    let before = c.save();
    c.set_driver_select(0);
    c.set_driver_features(u32::MAX);
    c.set_queue_select(0);
    c.set_queue_size(2);
    c.set_queue_area(RingArea::Used, 0, u64::MAX);
    c.set_queue_disabled();
    c.set_driver_select(1);
    assert_eq!(c.save(), before);
    // Bits once set stay.
    c.write_status(status::ACKNOWLEDGE);
    assert_eq!(c.status(), 0xf);
    // A queue that does not exist.
    c.set_queue_select(9);
    c.set_queue_enabled();
    assert_eq!((c.queue_limit(), c.queue_size(), c.queue_enabled()), (0, 0, false));
    c.notify(9);
    assert!(c.kick_fd(9).is_none() && c.kick_fd(0).is_some());
}

#[test]
fn wrong_sizes_are_not_taken() {
    let rig = Rig::idle(Arc::new(Rng::new()));
    for size in [0, 3, 128, 0xffff] {
        rig.core.set_queue_size(size);
        assert_eq!(rig.core.queue_size(), 64);
    }
    rig.core.set_queue_size(32);
    assert_eq!(rig.core.queue_size(), 32);
}

#[test]
fn the_kernel_may_ring_instead_of_a_vcpu() {
    let mut rig = Rig::new(Arc::new(Rng::new()), 0);
    rig.rings[0].add(&[(BUFFERS, 8, true)]);
    rig.core.kick_fd(0).unwrap().write(1).unwrap();
    assert_eq!(rig.used(0).1, 8);
}

#[test]
fn states_that_cannot_be_are_refused() {
    let rig = Rig::new(Arc::new(Rng::new()), 0);
    rig.core.pause();
    let good = rig.core.save();
    let idle = Rig::idle(Arc::new(Rng::new()));
    type Spoil = fn(&mut CoreState);
    let spoils: [Spoil; 6] = [
        |s| s.queues[0].0.size = 3,
        |s| s.queues[0].0.size = 128,
        |s| s.queues.clear(),
        |s| s.driver_features = 0,
        |s| s.status = status::DRIVER_OK,
        |s| s.device = vec![1],
    ];
    for (i, spoil) in spoils.into_iter().enumerate() {
        let mut s = good.clone();
        spoil(&mut s);
        assert!(idle.core.load(&s).is_err(), "case {i}");
        assert_eq!(idle.core.status(), 0);
    }
    // Rings that are not in RAM are the guest's doing, not the file's: the device needs a reset.
    let mut s = good.clone();
    s.queues[0].0.desc = u64::MAX - 15;
    idle.core.load(&s).unwrap();
    assert_ne!(idle.core.status() & status::NEEDS_RESET, 0);
    assert!(idle.core.fault().unwrap().contains("descriptor ring"));
}

/// A device that counts what it serves, on whose thread.
#[derive(Default)]
struct Counter {
    quick: AtomicU32,
    thread: AtomicU32,
}

impl VirtioDevice for Counter {
    fn kind(&self) -> &'static str {
        "counter"
    }
    fn device_type(&self) -> u16 {
        4
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![256]
    }
    fn read_config(&self, _: u64, _: &mut [u8]) {}
    fn has_quick(&self) -> bool {
        true
    }
    fn service(&self, queue: &mut Queue) -> Result<Served, QueueError> {
        while let Some(c) = queue.pop()? {
            self.thread.fetch_add(1, Ordering::SeqCst);
            queue.complete(c, 0);
        }
        Ok(Served::Drained)
    }
    /// Does every other one.
    fn quick(&self, queue: &mut Queue) -> Result<Quick, QueueError> {
        while let Some(c) = queue.pop()? {
            if self.quick.fetch_add(1, Ordering::SeqCst) % 2 == 1 {
                queue.undo_pop(c);
                return Ok(Quick::Later);
            }
            queue.complete(c, 0);
        }
        Ok(Quick::Done)
    }
}

#[test]
fn no_request_is_lost_between_vcpus_and_thread() {
    for features in [0, feature::EVENT_IDX] {
        let device = Arc::new(Counter::default());
        let mut rig = Rig::idle(device.clone());
        rig.set_up(features | feature::VERSION_1);
        let mut sent = 0u32;
        for round in 0..2000u32 {
            for _ in 0..=round % 3 {
                rig.rings[0].set_used_event(sent as u16);
                // A driver rings only when it is asked to (virtio 1.3 section 2.7.10).
                let before = sent as u16;
                rig.rings[0].add(&[(BUFFERS, 1, true)]);
                sent += 1;
                std::sync::atomic::fence(Ordering::SeqCst);
                let wanted = if features == 0 {
                    rig.rings[0].used_flags() & 1 == 0
                } else {
                    rig.rings[0].avail_event() == before
                };
                if wanted {
                    rig.core.notify(0);
                }
            }
            for _ in 0..=round % 3 {
                rig.used(0);
            }
        }
        assert!(device.thread.load(Ordering::SeqCst) > 0 && device.quick.load(Ordering::SeqCst) > 0);
    }
}

#[test]
fn resets_and_pauses_under_load_lose_nothing_and_hang_never() {
    let device = Arc::new(Counter::default());
    for round in 0..50 {
        let mut rig = Rig::new(device.clone(), 0);
        std::thread::scope(|s| {
            let core = &rig.core;
            s.spawn(move || (0..200).for_each(|_| core.notify(0)));
            for _ in 0..20 {
                rig.rings[0].add(&[(BUFFERS, 1, true)]);
                core.notify(0);
                if round % 2 == 0 {
                    core.pause();
                    core.resume();
                }
            }
            if round % 3 == 0 {
                core.reset();
            }
        });
        if round % 3 != 0 {
            for _ in 0..20 {
                rig.used(0);
            }
        }
    }
}
