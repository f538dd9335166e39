//! Network device (virtio 1.3 section 5.1).
//!
//! Each pair of queues has a transmit and a receive side that are served by threads of their own; what the guest sends is
//! handed on at once on the vCPU that rings, as long as it is little.

mod control;
mod filter;
mod rss;
#[cfg(test)]
mod tests;

use crate::served::{QueueServer, ServedQueue};
use crate::{Chain, Grouping, Queue, QueueError, Quick, Served, Signals, VirtioDevice};
use control::ControlState;
use filter::Filter;
use ringfort_bus::lock;
use ringfort_net::{MAX_FRAME, NetBackend, NetEvents, Offloads, Sent, Statistics, VnetHeader, hash};
use rss::{RssState, Scaling, Verdict};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

// Feature bits (virtio 1.3 section 5.1.3).
const F_CSUM: u64 = 1 << 0;
const F_GUEST_CSUM: u64 = 1 << 1;
const F_CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_GUEST_TSO6: u64 = 1 << 8;
const F_GUEST_ECN: u64 = 1 << 9;
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_HOST_ECN: u64 = 1 << 13;
const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;
const F_CTRL_VQ: u64 = 1 << 17;
const F_CTRL_RX: u64 = 1 << 18;
const F_CTRL_VLAN: u64 = 1 << 19;
const F_CTRL_RX_EXTRA: u64 = 1 << 20;
const F_GUEST_ANNOUNCE: u64 = 1 << 21;
const F_MQ: u64 = 1 << 22;
const F_CTRL_MAC_ADDR: u64 = 1 << 23;
const F_GUEST_USO4: u64 = 1 << 54;
const F_GUEST_USO6: u64 = 1 << 55;
const F_HOST_USO: u64 = 1 << 56;
const F_HASH_REPORT: u64 = 1 << 57;
const F_RSS: u64 = 1 << 60;

/// Features that need one of others (section 5.1.3.1).
const NEEDS: [(u64, u64); 5] = [
    (F_HOST_TSO4 | F_HOST_TSO6 | F_HOST_USO, F_CSUM),
    (F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_USO4 | F_GUEST_USO6, F_GUEST_CSUM),
    (F_HOST_ECN, F_HOST_TSO4 | F_HOST_TSO6),
    (F_GUEST_ECN, F_GUEST_TSO4 | F_GUEST_TSO6),
    (F_CTRL_RX | F_CTRL_VLAN | F_GUEST_ANNOUNCE | F_MQ | F_CTRL_MAC_ADDR | F_RSS, F_CTRL_VQ),
];

/// Entries of each receive and transmit queue.
const QUEUE_SIZE: u16 = 256;
/// Entries of the control queue.
const CONTROL_SIZE: u16 = 64;
/// Most pairs of queues.
pub const MAX_PAIRS: u16 = 16;
/// Least MTU that may be told (virtio 1.3 section 5.1.4.1: 68 to 65535).
const MIN_MTU: u16 = 68;
/// Bytes of the header in front of each frame.
const HEADER: usize = VnetHeader::LEN;
/// Bytes of the hash report that may follow it.
const REPORT: usize = 8;
/// Most frames that wait for a queue which another one's thread has taken them for.
const MAX_INBOX: usize = 256;
/// Most bytes that a vCPU hands on at one ring of the doorbell; more is the I/O thread's.
const QUICK_BYTES: u64 = 256 << 10;
/// Shortest frame that has an Ethernet header.
const MIN_FRAME: u64 = 14;
/// Chains that one frame may be spread over. The receive queue holds no more.
const MAX_MERGED: usize = QUEUE_SIZE as usize;

/// Bits of the configuration's status field.
const S_LINK_UP: u16 = 1;
const S_ANNOUNCE: u16 = 2;

/// How a network device is presented.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NetOptions {
    /// Its address: unicast, not all zero.
    pub mac: [u8; 6],
    /// Pairs of queues, 1 to [`MAX_PAIRS`].
    pub pairs: u16,
    /// The MTU that the driver is told, if any; otherwise the back end's.
    pub mtu: Option<u16>,
    /// Offer receive-side scaling and hash reports. They cost a hash of each frame when the driver takes them.
    pub rss: bool,
}

/// Frames and bytes that passed a pair of queues.
#[derive(Debug, Default)]
struct Counters {
    rx_frames: AtomicU64,
    rx_bytes: AtomicU64,
    rx_dropped: AtomicU64,
    tx_frames: AtomicU64,
    tx_bytes: AtomicU64,
    tx_dropped: AtomicU64,
}

/// Buffers of one pair that are kept between frames.
#[derive(Default)]
struct Receive {
    frame: Vec<u8>,
    /// The frame is whole and waits for the driver's buffers.
    pending: Option<(VnetHeader, Verdict)>,
}

/// A frame that came by another queue than its own.
struct Moved {
    header: VnetHeader,
    verdict: Verdict,
    frame: Vec<u8>,
}

#[derive(Default)]
struct Pair {
    receive: Mutex<Receive>,
    /// What other pairs' threads took for this one.
    inbox: Mutex<VecDeque<Moved>>,
    transmit: Mutex<Vec<u8>>,
    counters: Counters,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct State {
    features: u64,
    status: u16,
    mac: [u8; 6],
    control: ControlState,
    filter: Filter,
    rss: RssState,
}

/// A network device.
pub struct Net {
    backend: Arc<dyn NetBackend>,
    /// Who moves frames instead, by another way to the same network.
    server: Option<Arc<dyn QueueServer>>,
    options: NetOptions,
    mtu: Option<u16>,
    pairs: Vec<Pair>,
    state: Mutex<State>,
    /// The features of [`State`], for the way of the frames.
    features: AtomicU64,
    /// How frames are spread, if the driver wants that.
    scaling: Mutex<Option<Arc<Scaling>>>,
    signals: OnceLock<Arc<Signals>>,
}

/// What the back end holds of the device.
struct Events(std::sync::Weak<Net>);

impl NetEvents for Events {
    fn readable(&self, pair: u16) {
        self.kick(pair.saturating_mul(2));
    }
    fn take_now(&self, pair: u16) {
        // Frames reach the guest without a change of threads.
        if let Some(net) = self.0.upgrade()
            && let Some(s) = net.signals.get()
        {
            s.serve(pair.saturating_mul(2));
        }
    }
    fn writable(&self, pair: u16) {
        self.kick(pair.saturating_mul(2).saturating_add(1));
    }
    fn link(&self, up: bool) {
        if let Some(net) = self.0.upgrade() {
            net.set_link(up);
        }
    }
}

impl Events {
    fn kick(&self, queue: u16) {
        if let Some(net) = self.0.upgrade()
            && let Some(s) = net.signals.get()
        {
            s.kick(queue);
        }
    }
}

impl Net {
    /// A device whose frames `backend` carries.
    ///
    /// # Errors
    /// When an option is out of range, in words.
    pub fn new(backend: Arc<dyn NetBackend>, options: NetOptions) -> Result<Arc<Net>, String> {
        Net::served(backend, None, options)
    }

    /// The same; `server`, if there is one, moves the frames between queues and network, which `backend` is set up by.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn served(
        backend: Arc<dyn NetBackend>,
        server: Option<Arc<dyn QueueServer>>,
        options: NetOptions,
    ) -> Result<Arc<Net>, String> {
        let most = MAX_PAIRS.min(backend.max_pairs());
        if !(1..=most).contains(&options.pairs) {
            return Err(format!("{} pairs of queues: choose 1 to {most}", options.pairs));
        }
        if options.mac[0] & 1 != 0 || options.mac == [0; 6] {
            return Err("the MAC address is a group's or all zero: give a unicast address".into());
        }
        let mtu = options.mtu.or(backend.mtu());
        if mtu.is_some_and(|m| m < MIN_MTU) {
            return Err(format!("the MTU is too small: give {MIN_MTU} to 65535"));
        }
        let server = server
            .map(|server| -> Arc<dyn QueueServer> { Arc::new(Handed { server, backend: backend.clone() }) });
        let net = Arc::new(Net {
            pairs: (0..options.pairs).map(|_| Pair::default()).collect(),
            state: Mutex::new(State {
                features: 0,
                status: S_LINK_UP,
                mac: options.mac,
                control: ControlState::default(),
                filter: Filter::default(),
                rss: RssState::default(),
            }),
            features: AtomicU64::new(0),
            scaling: Mutex::new(None),
            backend,
            server,
            options,
            mtu,
            signals: OnceLock::new(),
        });
        net.backend.attach(Arc::new(Events(Arc::downgrade(&net))));
        Ok(net)
    }

    /// Plug the cable in or pull it; the driver is told.
    pub fn set_link(&self, up: bool) {
        {
            let mut s = lock(&self.state);
            let status = if up { s.status | S_LINK_UP } else { s.status & !S_LINK_UP };
            if status == s.status {
                return;
            }
            s.status = status;
        }
        if let Some(server) = &self.server {
            server.set_link(up);
        }
        if let Some(s) = self.signals.get() {
            s.config_changed();
            (0..self.options.pairs).for_each(|p| s.kick(2 * p));
        }
    }

    /// Whether the cable is plugged in.
    pub fn link(&self) -> bool {
        lock(&self.state).status & S_LINK_UP != 0
    }

    /// Have the driver announce its addresses (after the guest came to another host), if it can.
    pub fn announce(&self) {
        {
            let mut s = lock(&self.state);
            if s.features & F_GUEST_ANNOUNCE == 0 || s.status & S_LINK_UP == 0 {
                return;
            }
            s.status |= S_ANNOUNCE;
        }
        if let Some(s) = self.signals.get() {
            s.config_changed();
        }
    }

    /// What passed each pair of queues so far.
    pub fn statistics(&self) -> Vec<Statistics> {
        let get = |n: &AtomicU64| n.load(Ordering::Relaxed);
        let of_pair = |p: &Pair| Statistics {
            rx_frames: get(&p.counters.rx_frames),
            rx_bytes: get(&p.counters.rx_bytes),
            rx_dropped: get(&p.counters.rx_dropped),
            tx_frames: get(&p.counters.tx_frames),
            tx_bytes: get(&p.counters.tx_bytes),
            tx_dropped: get(&p.counters.tx_dropped),
        };
        self.pairs.iter().map(of_pair).collect()
    }

    /// What its network counts besides: names and numbers.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        self.backend.counters()
    }

    fn has(&self, feature: u64) -> bool {
        self.features.load(Ordering::Relaxed) & feature != 0
    }

    /// What the driver may leave to us.
    fn accepted(&self) -> Offloads {
        let has = |f| self.has(f);
        Offloads {
            checksum: has(F_CSUM),
            tso4: has(F_HOST_TSO4),
            tso6: has(F_HOST_TSO6),
            ecn: has(F_HOST_ECN),
            uso: has(F_HOST_USO),
        }
    }

    /// Bytes in front of each frame.
    fn header_len(&self) -> usize {
        if self.has(F_HASH_REPORT) { HEADER + REPORT } else { HEADER }
    }

    /// Spread frames as the state says from now on.
    fn follow_rss(&self, state: &RssState) {
        let wanted = state.types != 0 || !state.table.is_empty();
        *lock(&self.scaling) = wanted.then(|| Arc::new(Scaling::new(state)));
    }

    /// The control queue's number: behind the pairs that there are, or behind the first (section 5.1.2).
    fn control_queue(&self) -> u16 {
        if self.has(F_MQ | F_RSS) { 2 * self.options.pairs } else { 2 }
    }

    fn transmit(&self, queue: &mut Queue, pair: usize, mut budget: u64) -> Result<Served, QueueError> {
        let mut frame = lock(&self.pairs[pair].transmit);
        let counters = &self.pairs[pair].counters;
        let accepted = self.accepted();
        let up = lock(&self.state).status & S_LINK_UP != 0;
        let before = self.header_len() as u64;
        let mut sent = false;
        let outcome = loop {
            let Some(chain) = queue.pop()? else { break Served::Drained };
            let len = chain.readable().saturating_sub(before);
            if len > budget {
                queue.undo_pop(chain);
                break Served::Waiting;
            }
            budget -= len;
            match read_frame(&chain, before, accepted, &mut frame) {
                Some(header) if up => {
                    if self.backend.send(pair as u16, &header, &frame) == Sent::Full {
                        queue.undo_pop(chain);
                        break Served::Waiting;
                    }
                    counters.tx_frames.fetch_add(1, Ordering::Relaxed);
                    counters.tx_bytes.fetch_add(len, Ordering::Relaxed);
                    sent = true;
                }
                _ => _ = counters.tx_dropped.fetch_add(1, Ordering::Relaxed),
            }
            queue.push(chain, 0);
        };
        if sent {
            self.backend.flush(pair as u16);
        }
        queue.signal();
        Ok(outcome)
    }

    fn receive(&self, queue: &mut Queue, pair: usize) -> Result<Served, QueueError> {
        let mut r = lock(&self.pairs[pair].receive);
        let counters = &self.pairs[pair].counters;
        let outcome = loop {
            if !queue.is_open() {
                break Served::Waiting;
            }
            let Receive { frame, pending } = &mut *r;
            let (header, verdict) = match *pending {
                Some(p) => p,
                None => match self.next_frame(pair, frame) {
                    Some(p) => *pending.insert(p),
                    None => break Served::Waiting,
                },
            };
            match self.place(queue, &header, &verdict, frame)? {
                Placed::Done => {
                    counters.rx_frames.fetch_add(1, Ordering::Relaxed);
                    counters.rx_bytes.fetch_add(frame.len() as u64, Ordering::Relaxed);
                }
                Placed::TooLong => _ = counters.rx_dropped.fetch_add(1, Ordering::Relaxed),
                Placed::NoBuffers(seen) => {
                    if queue.wait_beyond(seen) {
                        continue;
                    }
                    // The driver's next buffers bring us back here.
                    break Served::Waiting;
                }
            }
            r.pending = None;
        };
        queue.signal();
        Ok(outcome)
    }

    /// The next frame for the driver's queue of this pair. Those that belong to other pairs are left to them.
    fn next_frame(&self, pair: usize, frame: &mut Vec<u8>) -> Option<(VnetHeader, Verdict)> {
        loop {
            if let Some(m) = lock(&self.pairs[pair].inbox).pop_front() {
                *frame = m.frame;
                return Some((m.header, m.verdict));
            }
            let mut header = self.backend.receive(pair as u16, frame)?;
            if !self.wanted(&mut header, frame) {
                self.pairs[pair].counters.rx_dropped.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            let scaling = lock(&self.scaling).clone();
            let verdict = scaling.map(|s| s.judge(frame)).unwrap_or_default();
            match verdict.pair.map(usize::from) {
                Some(other) if other != pair && other < self.pairs.len() => {
                    let mut inbox = lock(&self.pairs[other].inbox);
                    if inbox.len() < MAX_INBOX {
                        inbox.push_back(Moved { header, verdict, frame: std::mem::take(frame) });
                    } else {
                        self.pairs[other].counters.rx_dropped.fetch_add(1, Ordering::Relaxed);
                    }
                    drop(inbox);
                    if let Some(s) = self.signals.get() {
                        s.kick(2 * other as u16);
                    }
                }
                _ => return Some((header, verdict)),
            }
        }
    }

    /// Whether the driver gets a frame; its header then says no more than the driver understands.
    fn wanted(&self, header: &mut VnetHeader, frame: &[u8]) -> bool {
        let s = lock(&self.state);
        // Section 5.1.6.4.1: flags are for those who want checksums left to them.
        header.valid &= s.control.offloads & F_GUEST_CSUM != 0;
        // Section 5.1.4.1: nothing longer than the MTU that was agreed on, unless it is still to be cut.
        let tag = if matches!(frame.get(12..14), Some([0x81, 0] | [0x88, 0xa8])) { 4 } else { 0 };
        let most = self.mtu.filter(|_| s.features & F_MTU != 0 && header.gso.is_none());
        most.is_none_or(|m| frame.len() <= usize::from(m) + MIN_FRAME as usize + tag)
            && s.status & S_LINK_UP != 0
            && s.filter.wants(frame, &s.mac, s.features & F_CTRL_VLAN != 0)
    }

    /// Put a frame into the driver's buffers: into one chain, or as many as it needs with mergeable buffers
    /// (section 5.1.6.4).
    fn place(
        &self,
        queue: &mut Queue,
        header: &VnetHeader,
        verdict: &Verdict,
        frame: &[u8],
    ) -> Result<Placed, QueueError> {
        let before = self.header_len();
        let need = (before + frame.len()) as u64;
        let mut chains: Vec<Chain> = Vec::with_capacity(1);
        let mut room = 0;
        while room < need {
            let Some(chain) = queue.pop()? else {
                let seen = chains.len() as u16;
                chains.into_iter().rev().for_each(|c| queue.undo_pop(c));
                return Ok(Placed::NoBuffers(seen));
            };
            // A driver of empty buffers would have us collect without end.
            if (chains.is_empty() && chain.writable() < before as u64) || chains.len() == MAX_MERGED {
                return Err(QueueError::Shape);
            }
            room += chain.writable();
            chains.push(chain);
            if room < need && !self.has(F_MRG_RXBUF) {
                // The frame is lost, the buffer stays.
                chains.into_iter().for_each(|c| queue.undo_pop(c));
                return Ok(Placed::TooLong);
            }
        }
        let mut raw = [0; HEADER + REPORT];
        raw[..HEADER].copy_from_slice(&header.encode(chains.len() as u16));
        raw[HEADER..HEADER + 4].copy_from_slice(&verdict.hash.to_le_bytes());
        raw[HEADER + 4..HEADER + 6].copy_from_slice(&verdict.report.to_le_bytes());
        let mut rest = frame;
        for (n, chain) in chains.into_iter().enumerate() {
            let mut written = 0;
            if n == 0 {
                written = chain.write(0, &raw[..before]);
            }
            let done = chain.write(written as u64, rest);
            rest = &rest[done..];
            queue.push(chain, (written + done) as u32);
        }
        Ok(Placed::Done)
    }

    fn pair_of(&self, queue: u16) -> Option<usize> {
        let pair = usize::from(queue / 2);
        (pair < usize::from(lock(&self.state).control.pairs)).then_some(pair)
    }
}

/// Another's work on the queues, during which the back end rests.
struct Handed {
    server: Arc<dyn QueueServer>,
    backend: Arc<dyn NetBackend>,
}

impl QueueServer for Handed {
    fn start(&self, features: u64, queues: &[ServedQueue<'_>]) -> std::io::Result<()> {
        self.server.start(features, queues)?;
        self.backend.set_resting(true);
        Ok(())
    }

    fn stop(&self) -> Vec<(u16, u16)> {
        let reached = self.server.stop();
        self.backend.set_resting(false);
        reached
    }

    fn set_link(&self, up: bool) {
        self.server.set_link(up);
    }
}

enum Placed {
    Done,
    TooLong,
    /// There are only this many chains.
    NoBuffers(u16),
}

/// Copy a frame from a chain and read its header. `None` if it breaks a rule.
fn read_frame(chain: &Chain, before: u64, accepted: Offloads, frame: &mut Vec<u8>) -> Option<VnetHeader> {
    let raw = chain.read_array::<HEADER>(0)?;
    let len = chain.readable().checked_sub(before)?;
    if !(MIN_FRAME..=MAX_FRAME as u64).contains(&len) {
        return None;
    }
    // At most MAX_FRAME bytes, whatever the guest says.
    frame.resize(len as usize, 0);
    chain.read(before, frame);
    // Drivers say nothing about checksums that they have checked (section 5.1.6.2.1).
    VnetHeader::decode(&raw, frame.len(), accepted).map(|h| VnetHeader { valid: false, ..h })
}

impl VirtioDevice for Net {
    fn kind(&self) -> &'static str {
        "virtio-net"
    }

    fn device_type(&self) -> u16 {
        1
    }

    fn pci_class(&self) -> u32 {
        0x02_00_00
    }

    fn features(&self) -> u64 {
        let mut f = F_MAC
            | F_STATUS
            | F_MRG_RXBUF
            | F_CTRL_VQ
            | F_CTRL_RX
            | F_CTRL_RX_EXTRA
            | F_CTRL_VLAN
            | F_CTRL_MAC_ADDR
            | F_GUEST_ANNOUNCE;
        if self.options.pairs > 1 {
            f |= F_MQ;
        }
        if self.options.rss {
            f |= F_HASH_REPORT | if self.options.pairs > 1 { F_RSS } else { 0 };
        }
        if self.mtu.is_some() {
            f |= F_MTU;
        }
        let (a, p) = (self.backend.accepts(), self.backend.produces());
        for (on, bits) in [
            (a.checksum, F_CSUM),
            (a.checksum && a.tso4, F_HOST_TSO4),
            (a.checksum && a.tso6, F_HOST_TSO6),
            (a.checksum && a.ecn, F_HOST_ECN),
            (a.checksum && a.uso, F_HOST_USO),
            (p.checksum, F_GUEST_CSUM | F_CTRL_GUEST_OFFLOADS),
            (p.checksum && p.tso4, F_GUEST_TSO4),
            (p.checksum && p.tso6, F_GUEST_TSO6),
            (p.checksum && p.ecn, F_GUEST_ECN),
            (p.checksum && p.uso, F_GUEST_USO4 | F_GUEST_USO6),
        ] {
            if on {
                f |= bits;
            }
        }
        f
    }

    fn fits(&self, features: u64) -> bool {
        NEEDS.iter().all(|(who, what)| features & who == 0 || features & what != 0)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![QUEUE_SIZE; 2 * usize::from(self.options.pairs)];
        sizes.push(CONTROL_SIZE);
        sizes
    }

    fn grouping(&self) -> Grouping {
        Grouping::PerQueue
    }

    /// Section 5.1.4.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut image = [0; 24];
        {
            let s = lock(&self.state);
            image[..6].copy_from_slice(&s.mac);
            image[6..8].copy_from_slice(&s.status.to_le_bytes());
        }
        image[8..10].copy_from_slice(&self.options.pairs.to_le_bytes());
        image[10..12].copy_from_slice(&self.mtu.unwrap_or(0).to_le_bytes());
        if self.options.rss {
            image[17] = hash::KEY_LEN as u8;
            image[18..20].copy_from_slice(&rss::MAX_TABLE.to_le_bytes());
            image[20..24].copy_from_slice(&hash::types::ALL.to_le_bytes());
        }
        for (at, b) in (offset..image.len() as u64).zip(data) {
            *b = image[at as usize];
        }
    }

    fn attach(&self, signals: Arc<Signals>) {
        let _ = self.signals.set(signals);
    }

    fn server(&self) -> Option<Arc<dyn QueueServer>> {
        self.server.clone()
    }

    fn is_served(&self, queue: u16) -> bool {
        queue != self.control_queue()
    }

    fn activate(&self, features: u64) {
        let offloads = {
            let mut s = lock(&self.state);
            s.features = features;
            s.control.offloads = control::agreed(features);
            control::offloads(s.control.offloads)
        };
        self.features.store(features, Ordering::Relaxed);
        self.backend.set_offloads(offloads);
        // Until the driver says otherwise (section 5.1.6.5.5).
        self.backend.set_pairs(1);
    }

    fn service(&self, queue: &mut Queue) -> Result<Served, QueueError> {
        let index = queue.index();
        if self.has(F_CTRL_VQ) && index == self.control_queue() {
            return self.control(queue);
        }
        match self.pair_of(index) {
            Some(pair) if index & 1 == 0 => self.receive(queue, pair),
            Some(pair) => self.transmit(queue, pair, u64::MAX),
            None => Ok(Served::Waiting),
        }
    }

    fn has_quick(&self) -> bool {
        true
    }

    /// Back ends do not wait, so what is sent goes at once, and replies are on their way before the vCPU goes on.
    fn quick(&self, queue: &mut Queue) -> Result<Quick, QueueError> {
        let index = queue.index();
        if index & 1 == 0 {
            return Ok(Quick::Later);
        }
        let Some(pair) = self.pair_of(index) else { return Ok(Quick::Done) };
        Ok(match self.transmit(queue, pair, QUICK_BYTES)? {
            Served::Drained => Quick::Done,
            Served::Waiting => Quick::Later,
        })
    }

    fn reset(&self) {
        {
            let mut s = lock(&self.state);
            let up = s.status & S_LINK_UP;
            *s = State {
                features: 0,
                status: up,
                mac: self.options.mac,
                control: ControlState::default(),
                filter: Filter::default(),
                rss: RssState::default(),
            };
        }
        *lock(&self.scaling) = None;
        self.features.store(0, Ordering::Relaxed);
        self.backend.set_offloads(Offloads::default());
        for p in &self.pairs {
            lock(&p.receive).pending = None;
            lock(&p.inbox).clear();
        }
    }

    fn save(&self) -> Vec<u8> {
        crate::transport::encode(&*lock(&self.state))
    }

    fn load(&self, state: &[u8]) -> Result<(), String> {
        let saved: State = crate::transport::decode(state)?;
        saved.filter.check()?;
        saved.rss.check(self.options.pairs)?;
        if !(1..=self.options.pairs).contains(&saved.control.pairs) {
            return Err("more pairs of queues than the device has".into());
        }
        if control::agreed(saved.features) & saved.control.offloads != saved.control.offloads {
            return Err("offloads that were not agreed on".into());
        }
        let offloads = control::offloads(saved.control.offloads);
        self.features.store(saved.features, Ordering::Relaxed);
        self.follow_rss(&saved.rss);
        let pairs = saved.control.pairs;
        *lock(&self.state) = saved;
        self.backend.set_offloads(offloads);
        self.backend.set_pairs(pairs);
        Ok(())
    }
}
