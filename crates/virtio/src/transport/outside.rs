//! Queues that a [`QueueServer`] has, and what it tells.

use super::active::ActiveQueue;
use crate::Interrupt;
use crate::queue::QueueLayout;
use crate::served::{QueueServer, ServedQueue};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

const WAKE: u64 = u64::MAX;

struct Handed {
    queue: Arc<ActiveQueue>,
    layout: QueueLayout,
    kick: Arc<EventFd>,
    call: Arc<EventFd>,
}

/// A device's queues that somebody else serves while the machine runs.
pub struct Outside {
    server: Arc<dyn QueueServer>,
    features: u64,
    queues: Vec<(u16, Handed)>,
    running: bool,
    stop: Arc<(AtomicBool, EventFd)>,
    relay: Option<JoinHandle<()>>,
}

impl Outside {
    /// Prepare to hand `queues` over; nothing is handed over yet. A thread passes interrupts on.
    pub fn new(
        server: Arc<dyn QueueServer>,
        features: u64,
        queues: Vec<(u16, Arc<ActiveQueue>, QueueLayout)>,
        interrupt: Arc<dyn Interrupt>,
    ) -> io::Result<Outside> {
        let event = || EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK);
        let stop = Arc::new((AtomicBool::new(false), event()?));
        let epoll = Epoll::new()?;
        epoll.ctl(ControlOperation::Add, stop.1.as_raw_fd(), EpollEvent::new(EventSet::IN, WAKE))?;
        let mut handed = Vec::new();
        for (index, queue, layout) in queues {
            let h = Handed { queue, layout, kick: Arc::new(event()?), call: Arc::new(event()?) };
            let interest = EpollEvent::new(EventSet::IN, u64::from(index));
            epoll.ctl(ControlOperation::Add, h.call.as_raw_fd(), interest)?;
            handed.push((index, h));
        }
        let calls: Vec<(u16, Arc<EventFd>)> = handed.iter().map(|(i, h)| (*i, h.call.clone())).collect();
        let of_thread = stop.clone();
        let relay = std::thread::Builder::new().name("virtio-calls".into()).spawn(move || {
            let mut events = [EpollEvent::default(); 32];
            while !of_thread.0.load(Ordering::SeqCst) {
                // An error other than an interruption cannot happen to an open descriptor.
                let n = match epoll.wait(-1, &mut events) {
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                    Err(_) => return,
                    Ok(n) => n,
                };
                for e in events[..n].iter().filter(|e| e.data() != WAKE) {
                    if let Some((index, call)) = calls.iter().find(|c| u64::from(c.0) == e.data()) {
                        let _ = call.read();
                        interrupt.queue(*index);
                    }
                }
            }
        })?;
        Ok(Outside { server, features, queues: handed, running: false, stop, relay: Some(relay) })
    }

    /// Hand the queues over.
    ///
    /// # Errors
    /// The server's; the device serves them then.
    pub fn start(&mut self) -> io::Result<()> {
        if self.running {
            return Ok(());
        }
        // Nobody of this process is at a queue once its lock was had.
        let served: Vec<ServedQueue<'_>> = self
            .queues
            .iter()
            .map(|(index, h)| ServedQueue {
                index: *index,
                size: h.layout.size,
                desc: h.layout.desc,
                avail: h.layout.avail,
                used: h.layout.used,
                next_avail: h.queue.hand_over(h.kick.clone()),
                kick: &h.kick,
                call: &h.call,
            })
            .collect();
        if let Err(e) = self.server.start(self.features, &served) {
            self.queues.iter().for_each(|(_, h)| h.queue.take_back(None));
            return Err(e);
        }
        self.running = true;
        // Whatever the driver did meanwhile, on either side.
        for (_, h) in &self.queues {
            let _ = h.kick.write(1);
            let _ = h.call.write(1);
        }
        Ok(())
    }

    /// Take the queues back; nobody serves them until somebody does again.
    pub fn stop(&mut self) {
        if !std::mem::take(&mut self.running) {
            return;
        }
        let reached = self.server.stop();
        for (index, h) in &self.queues {
            h.queue.take_back(reached.iter().find(|r| r.0 == *index).map(|r| r.1));
        }
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        self.stop();
        self.stop.0.store(true, Ordering::SeqCst);
        let _ = self.stop.1.write(1);
        if let Some(t) = self.relay.take() {
            let _ = t.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::{Net, NetOptions};
    use crate::testing::{BUFFERS, Rig};
    use ringfort_bus::lock;
    use ringfort_net::{NetBackend, NetEvents, Offloads, Sent, VnetHeader};
    use std::sync::Mutex;
    use std::sync::atomic::AtomicU32;

    const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];

    /// A network that counts what reaches it through this process.
    #[derive(Default)]
    struct Wire {
        sent: AtomicU32,
        resting: AtomicBool,
    }

    impl NetBackend for Wire {
        fn accepts(&self) -> Offloads {
            Offloads::default()
        }
        fn produces(&self) -> Offloads {
            Offloads::default()
        }
        fn attach(&self, _: Arc<dyn NetEvents>) {}
        fn set_offloads(&self, _: Offloads) {}
        fn set_resting(&self, resting: bool) {
            self.resting.store(resting, Ordering::SeqCst);
        }
        fn send(&self, _: u16, _: &VnetHeader, _: &[u8]) -> Sent {
            self.sent.fetch_add(1, Ordering::SeqCst);
            Sent::Done
        }
        fn receive(&self, _: u16, _: &mut Vec<u8>) -> Option<VnetHeader> {
            None
        }
    }

    /// What a server was told: the queues and where it was to begin; and descriptors of its own for kicks and calls.
    #[derive(Default)]
    struct Told {
        begun: Vec<(u16, u16)>,
        bells: Vec<(EventFd, EventFd)>,
    }

    #[derive(Default)]
    struct Server {
        told: Mutex<Told>,
        refuses: AtomicBool,
        links: Mutex<Vec<bool>>,
    }

    impl QueueServer for Server {
        fn start(&self, _: u64, queues: &[ServedQueue<'_>]) -> io::Result<()> {
            if self.refuses.load(Ordering::SeqCst) {
                return Err(io::Error::other("no more of it"));
            }
            let mut t = lock(&self.told);
            t.begun = queues.iter().map(|q| (q.index, q.next_avail)).collect();
            t.bells =
                queues.iter().map(|q| (q.kick.try_clone().unwrap(), q.call.try_clone().unwrap())).collect();
            Ok(())
        }

        /// It has taken three chains from each.
        fn stop(&self) -> Vec<(u16, u16)> {
            lock(&self.told).begun.iter().map(|(i, n)| (*i, n + 3)).collect()
        }

        fn set_link(&self, up: bool) {
            lock(&self.links).push(up);
        }
    }

    fn rig() -> (Arc<Wire>, Arc<Server>, Arc<Net>, Rig) {
        let (wire, server) = (Arc::new(Wire::default()), Arc::new(Server::default()));
        let options = NetOptions { mac: MAC, pairs: 1, mtu: None, rss: false };
        let net = Net::served(wire.clone(), Some(server.clone()), options).unwrap();
        let rig = Rig::new(net.clone(), 0);
        (wire, server, net, rig)
    }

    #[test]
    fn queues_are_anothers_until_the_machine_pauses() {
        let (wire, server, net, mut rig) = rig();
        assert_eq!(lock(&server.told).begun, [(0, 0), (1, 0)], "not the control queue");
        assert!(wire.resting.load(Ordering::SeqCst));
        // The doorbell is the server's, and nothing goes through this process.
        let (kick, call) = {
            let t = lock(&server.told);
            (t.bells[1].0.try_clone().unwrap(), t.bells[1].1.try_clone().unwrap())
        };
        while kick.read().is_ok() {}
        rig.send(1, &[(BUFFERS, 80, false)]);
        // The I/O thread may pass on what it was rung for at the start, too.
        assert!(kick.read().unwrap() >= 1);
        assert_eq!(wire.sent.load(Ordering::SeqCst), 0);
        // Its calls are interrupts.
        let before = rig.interrupts.count(Some(1));
        call.write(1).unwrap();
        rig.interrupts.wait(Some(1), before + 1);
        // It follows the cable.
        net.set_link(false);
        net.set_link(true);
        assert_eq!(*lock(&server.links), [false, true]);
        // Three chains were taken, and of two the use stands in the ring.
        rig.write(rig.rings[1].layout.used + 2, &2u16.to_le_bytes());
        rig.core.pause();
        assert!(!wire.resting.load(Ordering::SeqCst));
        let saved = rig.core.save();
        rig.core.resume();
        assert_eq!(lock(&server.told).begun, [(0, 3), (1, 3)]);
        rig.core.pause();
        rig.core.load(&saved).unwrap();
        rig.core.resume();
        assert_eq!(lock(&server.told).begun, [(0, 3), (1, 3)], "a saved machine begins where it was");
        rig.core.write_status(0);
        assert!(!wire.resting.load(Ordering::SeqCst));
    }

    #[test]
    fn a_server_that_fails_leaves_the_queues_to_this_process() {
        let (wire, server, _, mut rig) = rig();
        rig.core.pause();
        server.refuses.store(true, Ordering::SeqCst);
        rig.rings[1].start_at(3);
        rig.core.resume();
        assert!(rig.core.fault().unwrap().contains("no more of it"));
        rig.write(BUFFERS, &[0; 200]);
        rig.send(1, &[(BUFFERS, 80, false)]);
        assert_eq!(rig.used(1).1, 0);
        assert_eq!((wire.sent.load(Ordering::SeqCst), wire.resting.load(Ordering::SeqCst)), (1, false));
        // Without bus mastering nobody is at them.
        rig.core.set_dma(false);
        rig.send(1, &[(BUFFERS, 80, false)]);
        assert_eq!(wire.sent.load(Ordering::SeqCst), 1);
    }
}
